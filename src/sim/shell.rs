//! A simulated node: what the actors of [`crate::node`] do around groups, as events.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::checks::Violation;
use super::disk::Disk;
use super::governor::GovernEvent;
use super::membership::RemoveEvent;
use super::planted::Planted;
use super::report::{Shown, note};
use super::snapshots::{InstallEvent, SnapshotEvent};
use super::world::{Event, World};
use super::{SimOptions, Time};
use crate::balance::reconciler::Reconciler;
use crate::codec::GroupMessage;
use crate::group::driver::Group;
use crate::group::held::HeldLog;
use crate::group::nodes::Nodes;
use crate::group::types::{Effects, Fetch, Operation, Output};
use crate::ids::{Incarnation, Index, NodeId, Position, ReplicaId, ShardId, Term};
use crate::limits;
use crate::machine::MachineKind;
use crate::machine::command::Query;
use crate::placement::map::ClusterMap;
use crate::refusal::Refusal;
use crate::storage::StorageError;
use crate::storage::flush::FlushStep;
use crate::storage::log::{LogStore, ReplicaPhase, ReplicaRecord};
use crate::storage::state::StateReader;

/// Something that happens to a node.
pub(super) enum NodeEvent {
    /// The process starts.
    Start,
    /// Time passes for the process with this number.
    Tick(u64),
    /// A message arrives.
    Message(NodeId, Box<GroupMessage>),
    /// A link is found broken.
    Unreachable(NodeId),
    /// The process with this number of a node is found to be gone.
    Gone(NodeId, u64),
    /// A heartbeat of a node arrives: of which process it is, and how many replicas have ended in that.
    Heard(NodeId, u64, u64),
    /// A client asks.
    Request { token: u64, shard: ShardId, operation: Box<Operation> },
    /// The log write under way is done.
    LogWritten(u64),
    /// A step of the flush under way is done.
    FlushStep(u64),
    /// Time to freeze memtables.
    Freeze(u64),
    /// A replica that crashed alone is opened again, once its old work is done.
    Reopen(u64, ReplicaId),
    /// Something for one start of a replica.
    Replica(ReplicaId, Incarnation, ReplicaEvent),
    /// A step of the installation of a snapshot.
    Install(InstallEvent),
    /// It is to hold this replica.
    Make(Box<ReplicaRecord>),
    /// A step of the removal of a replica.
    Remove(RemoveEvent),
    /// How the cluster governs itself.
    Govern(GovernEvent),
}

/// Something that happens to one start of a replica.
pub(super) enum ReplicaEvent {
    /// Its inputs are to be worked on.
    Pump,
    /// A log write is durable.
    Persisted(u64),
    /// Log entries are read.
    Fetch(Fetch),
    /// Queries are answered from the engine.
    Read(Box<StateReader>, Vec<(u64, Query)>),
    /// It has memory again.
    ResumeApply,
    /// About a snapshot that it gives to a follower.
    Snapshot(SnapshotEvent),
}

/// A node: its disk, and its process while it runs.
pub(super) struct Node {
    pub id: NodeId,
    pub disk: Disk,
    /// Log that its leaders keep behind snapshots.
    pub held: Arc<HeldLog>,
    pub process: Option<Process>,
    /// It is gone for good.
    pub lost: bool,
    /// Replicas it holds, as its log has them; without tombstones.
    pub records: Vec<ReplicaRecord>,
    /// Replicas for which a snapshot is being loaded.
    pub installing: BTreeSet<ReplicaId>,
    /// Those of them that have ended for it, and are opened again after it.
    pub switching: BTreeSet<ReplicaId>,
    /// Replicas that have ended, and get a tombstone once their writes are done.
    pub removing: BTreeSet<ReplicaId>,
    /// The newest map it knows of; on its disk too.
    pub map: ClusterMap,
    /// Nothing happens in its process until then.
    pub paused_until: Time,
    /// Its disk is slow.
    pub slow: bool,
    /// Reads of its disk fail, now and then.
    pub unreadable: bool,
    pub tick: Time,
    pub starts: u64,
    pub incarnations: Incarnation,
}

/// A running process.
pub(super) struct Process {
    pub number: u64,
    pub replicas: BTreeMap<ReplicaId, Replica>,
    /// While it leads the metadata shard.
    pub reconciler: Option<Reconciler>,
    /// What it hears of the others.
    pub nodes: Nodes,
    /// Replicas that have ended alone.
    pub ended: u64,
}

/// A moment within a pass over a replica.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Boundary {
    /// Entries are applied; nothing of the pass has left.
    Applied,
    /// Messages have left, the write that they go before has not.
    Sent,
    /// The write is with the log writer; nobody was answered.
    Written,
    /// Operations were answered; what else the pass asks for is not begun.
    Answered,
}

impl Boundary {
    pub const ALL: [Boundary; 4] = [Boundary::Applied, Boundary::Sent, Boundary::Written, Boundary::Answered];

    /// Whether a pass with these effects comes by.
    pub fn is_in<T>(self, effects: &Effects<T>) -> bool {
        match self {
            Boundary::Applied => true,
            Boundary::Sent => effects.write.is_some() && !effects.messages.is_empty(),
            Boundary::Written => effects.write.is_some(),
            Boundary::Answered => !effects.done.is_empty(),
        }
    }
}

/// A replica and what its actor would keep beside the group.
pub(super) struct Replica {
    pub shard: ShardId,
    pub incarnation: Incarnation,
    pub group: Group<u64>,
    pub flushed: Position,
    pub flushing: bool,
    pub pump_queued: bool,
    pub ticks: u64,
    /// While it sleeps: the tick of its node at which it fell asleep.
    pub asleep_since: Option<u64>,
    /// What the checks have seen it apply.
    pub observed: Index,
    /// Terms of the entries in its log, as handed to the log writer.
    pub terms: BTreeMap<Index, Term>,
    /// Operations submitted and not ended.
    pub open: BTreeSet<u64>,
    /// It ends in the next pass that comes by this.
    pub dies: Option<Boundary>,
}

impl Node {
    pub fn new(id: NodeId, options: &SimOptions, tick: Time) -> Node {
        Node {
            id,
            disk: Disk::new(options.planted),
            held: Arc::new(HeldLog::new(options.held_bytes())),
            process: None,
            lost: false,
            records: Vec::new(),
            installing: BTreeSet::new(),
            switching: BTreeSet::new(),
            removing: BTreeSet::new(),
            map: ClusterMap::default(),
            paused_until: 0,
            slow: false,
            unreadable: false,
            tick,
            starts: 0,
            incarnations: 0,
        }
    }

    pub fn replica(&self, id: ReplicaId) -> Option<&Replica> {
        self.process.as_ref()?.replicas.get(&id)
    }

    /// The number of the process, while it runs.
    pub fn process_number(&self) -> Option<u64> {
        self.process.as_ref().map(|process| process.number)
    }

    /// The record of a replica.
    pub fn record(&self, id: ReplicaId) -> Option<&ReplicaRecord> {
        self.records.iter().find(|record| record.replica == id)
    }

    /// Reads its records from its log.
    pub fn reload_records(&mut self) -> Result<(), StorageError> {
        self.records = self.disk.log.catalogue()?;
        self.records.retain(|record| record.phase == ReplicaPhase::Active);
        Ok(())
    }

    pub fn replica_mut(&mut self, id: ReplicaId) -> Option<&mut Replica> {
        self.process.as_mut()?.replicas.get_mut(&id)
    }

    fn is_process(&self, number: u64) -> bool {
        self.process.as_ref().is_some_and(|process| process.number == number)
    }

    /// Whether it takes itself for the leader of a shard.
    pub fn leads(&self, shard: ShardId) -> bool {
        self.replicas().any(|(_, replica)| replica.shard == shard && replica.group.leads())
    }

    pub fn replicas(&self) -> impl Iterator<Item = (ReplicaId, &Replica)> {
        self.process.iter().flat_map(|process| process.replicas.iter().map(|(id, replica)| (*id, replica)))
    }

    /// Applied index of a replica that runs.
    pub fn applied(&self, id: ReplicaId) -> Option<Index> {
        Some(self.replica(id)?.observed)
    }

    /// Operations that were submitted and have not ended.
    pub fn open_tokens(&self) -> impl Iterator<Item = (ReplicaId, u64)> {
        self.replicas().flat_map(|(id, replica)| replica.open.iter().map(move |token| (id, *token)))
    }

    /// For a report.
    pub fn describe(&self) -> String {
        if self.process.is_none() {
            return if self.lost { "gone for good".into() } else { "down".into() };
        }
        let line = |(id, replica): (ReplicaId, &Replica)| format!("\n    {id}: {:?}", replica.group.status());
        self.replicas().map(line).collect()
    }
}

impl World {
    pub(super) fn on_node_event(&mut self, id: NodeId, event: NodeEvent) -> Result<(), Violation> {
        let now = self.clock.now;
        match event {
            NodeEvent::Start => self.start(id),
            NodeEvent::Tick(process) => {
                let Some(node) = self.nodes.get_mut(&id).filter(|node| node.is_process(process)) else {
                    return Ok(());
                };
                self.clock.after(node.tick, Event::Node(id, NodeEvent::Tick(process)));
                self.watch(id)?;
                let Some(node) = self.nodes.get(&id) else { return Ok(()) };
                let awake = node.replicas().filter(|(_, replica)| replica.asleep_since.is_none());
                let ids: Vec<ReplicaId> = awake.map(|(id, _)| id).collect();
                for replica_id in ids {
                    let Some(replica) = self.replica(id, replica_id) else { continue };
                    replica.group.tick();
                    replica.ticks += 1;
                    if replica.ticks.is_multiple_of(limits::COMPACT_TICKS) {
                        self.compact(id, replica_id);
                    }
                    self.settle(id, replica_id)?;
                    if self.replica(id, replica_id).is_some_and(|replica| !replica.group.at_rest()) {
                        self.queue_pump(id, replica_id);
                    }
                }
                Ok(())
            }
            NodeEvent::Message(from, mut message) => {
                message.node = from;
                let target = ReplicaId(message.message.to);
                let Some(replica) = self.replica(id, target) else { return Ok(()) };
                if !replica.group.sleeps_through(&message) {
                    self.rouse(id, target);
                }
                let Some(replica) = self.replica(id, target) else { return Ok(()) };
                replica.group.step(*message).map_err(|error| {
                    Violation::new("replica", format!("replica {target}, message of node {from}: {error}"))
                })?;
                self.settle(id, target)?;
                self.queue_pump(id, target);
                Ok(())
            }
            NodeEvent::Heard(from, process, ended) => self.on_heard(id, from, process, ended),
            NodeEvent::Gone(about, process) => self.on_gone(id, about, process),
            NodeEvent::Unreachable(peer) => {
                let Some(node) = self.nodes.get_mut(&id) else { return Ok(()) };
                let mut told = Vec::new();
                let replicas = node.process.iter_mut().flat_map(|p| p.replicas.iter_mut());
                for (replica_id, replica) in replicas.filter(|(_, r)| r.asleep_since.is_none()) {
                    if let Some(of_peer) = replica.group.replica_on(peer) {
                        replica.group.on_unreachable(of_peer);
                        told.push(*replica_id);
                    }
                }
                told.into_iter().for_each(|replica| self.queue_pump(id, replica));
                Ok(())
            }
            NodeEvent::Request { token, shard, operation } => self.on_request(id, token, shard, *operation),
            NodeEvent::LogWritten(process) => {
                let Some(node) = self.nodes.get_mut(&id).filter(|node| node.is_process(process)) else {
                    return Ok(());
                };
                let names = node.disk.finish_write().map_err(|e| Violation::new("disk", e.to_string()))?;
                note!(self.trace, "{} node {} log written {:?}", now, id, names);
                for name in names {
                    let delay = self.dice.between(0, 200);
                    let event = ReplicaEvent::Persisted(name.number);
                    let event = NodeEvent::Replica(name.replica, name.incarnation, event);
                    self.clock.after(delay, Event::Node(id, event));
                }
                self.drive_disk(id);
                Ok(())
            }
            NodeEvent::FlushStep(process) => self.on_flush_step(id, process),
            NodeEvent::Freeze(process) => {
                self.freeze_some(id, process);
                Ok(())
            }
            NodeEvent::Reopen(process, replica) => {
                let Some(node) = self.nodes.get_mut(&id).filter(|node| node.is_process(process)) else {
                    return Ok(());
                };
                if node.replica(replica).is_some() || node.switching.contains(&replica) {
                    return Ok(());
                }
                let waits = !self.options.planted.is(Planted::OldIncarnationWrites);
                if waits && node.disk.is_busy_with(replica) {
                    self.clock.after(5_000, Event::Node(id, NodeEvent::Reopen(process, replica)));
                    return Ok(());
                }
                self.open(id, replica)
            }
            NodeEvent::Install(event) => self.on_install(id, event),
            NodeEvent::Make(record) => self.make_replica(id, *record),
            NodeEvent::Remove(event) => self.on_remove(id, event),
            NodeEvent::Govern(event) => self.on_govern(id, event),
            NodeEvent::Replica(replica, incarnation, event) => {
                if self.replica(id, replica).is_none_or(|r| r.incarnation != incarnation) {
                    return Ok(());
                }
                self.on_replica_event(id, replica, event)
            }
        }
    }

    fn on_replica_event(
        &mut self,
        id: NodeId,
        replica_id: ReplicaId,
        event: ReplicaEvent,
    ) -> Result<(), Violation> {
        match event {
            ReplicaEvent::Pump => return self.pump(id, replica_id),
            ReplicaEvent::Persisted(number) => {
                if let Some(replica) = self.replica(id, replica_id) {
                    replica.group.on_persisted(number);
                }
            }
            ReplicaEvent::Fetch(fetch) => {
                self.count("fetches");
                let Some(node) = self.nodes.get_mut(&id) else { return Ok(()) };
                node.disk.faulty.begin(node.unreadable && self.dice.chance(300));
                let log = node.disk.read_log();
                let read = log.entries(replica_id, fetch.low, fetch.high, fetch.max_bytes);
                node.disk.faulty.end();
                let entries = match read {
                    Ok(entries) => entries,
                    // Compacted while the read was under way.
                    Err(StorageError::Compacted(_)) => Vec::new(),
                    Err(error) => return self.stops(id, replica_id, &error.to_string()),
                };
                if let Some(replica) = node.replica_mut(replica_id) {
                    replica.group.on_fetched(entries);
                }
            }
            ReplicaEvent::Read(reader, reads) => {
                let mut learned = Vec::new();
                for (token, query) in reads {
                    self.count("engine reads");
                    let Some(node) = self.nodes.get_mut(&id) else { return Ok(()) };
                    node.disk.faulty.begin(node.unreadable && self.dice.chance(300));
                    let answer = MachineKind::Kv.query(&query, &*reader);
                    if let (Query::Get { key }, Ok(_)) = (&query, &answer)
                        && let Ok(stored) = reader.get(key)
                    {
                        learned.push((key.clone(), stored));
                    }
                    node.disk.faulty.end();
                    let answer = match answer {
                        Ok(answer) => Ok(Output::Answer(answer)),
                        Err(error) => {
                            self.excuse(id, replica_id, &error.to_string())?;
                            Err(Refusal::Unavailable("the engine can't be read".into()))
                        }
                    };
                    self.answer(id, replica_id, token, answer)?;
                }
                if let Some(replica) = self.replica(id, replica_id) {
                    replica.group.learn(reader.stamp(), learned);
                }
                return Ok(());
            }
            ReplicaEvent::Snapshot(event) => return self.on_snapshot(id, replica_id, event),
            ReplicaEvent::ResumeApply => {
                if let Some(replica) = self.replica(id, replica_id) {
                    replica.group.pause_apply(false);
                }
            }
        }
        self.queue_pump(id, replica_id);
        Ok(())
    }

    pub(super) fn replica(&mut self, node: NodeId, replica: ReplicaId) -> Option<&mut Replica> {
        self.nodes.get_mut(&node)?.replica_mut(replica)
    }

    /// The replica is pumped soon, once for all inputs that come until then.
    pub(super) fn queue_pump(&mut self, id: NodeId, replica_id: ReplicaId) {
        let delay = self.dice.between(0, 200);
        let Some(replica) = self.replica(id, replica_id) else { return };
        if !std::mem::replace(&mut replica.pump_queued, true) {
            let event = NodeEvent::Replica(replica_id, replica.incarnation, ReplicaEvent::Pump);
            self.clock.after(delay, Event::Node(id, event));
        }
    }

    // ------------------------------------------------------------------------------------ inputs

    fn on_request(
        &mut self,
        id: NodeId,
        token: u64,
        shard: ShardId,
        operation: Operation,
    ) -> Result<(), Violation> {
        let planted = self.options.planted;
        let process = self.nodes.get_mut(&id).and_then(|node| node.process.as_mut());
        // The newest, where an older one is still to be removed.
        let found = process.and_then(|p| p.replicas.iter_mut().rev().find(|(_, r)| r.shard == shard));
        let Some((replica_id, replica)) = found else {
            let refusal = Err(Refusal::Unavailable("starting".into()));
            let delay = self.dice.between(50, 500);
            self.clock.after(delay, Event::Answer(token, refusal));
            return Ok(());
        };
        let replica_id = *replica_id;
        if !replica.open.insert(token) {
            return Err(Violation::new("answers", format!("operation {token:x} was submitted twice")));
        }
        if let Operation::Query(query) = &operation
            && (planted.is(Planted::FollowerReads)
                || planted.is(Planted::StaleReads) && replica.group.leads())
        {
            let answer = MachineKind::Kv.query(query, replica.group.state());
            let answer = answer.map_err(|e| Violation::new("replica", e.to_string()))?;
            return self.answer(id, replica_id, token, Ok(Output::Answer(answer)));
        }
        if replica.asleep_since.is_some() {
            self.count("wakes by a request");
            self.rouse(id, replica_id);
            if let Some(replica) = self.replica(id, replica_id) {
                replica.group.call_leader();
            }
        }
        let Some(replica) = self.replica(id, replica_id) else { return Ok(()) };
        replica.group.submit(operation, token);
        self.queue_pump(id, replica_id);
        Ok(())
    }

    /// An operation ends: its client hears of it.
    pub(super) fn answer(
        &mut self,
        id: NodeId,
        replica_id: ReplicaId,
        token: u64,
        result: Result<Output, Refusal>,
    ) -> Result<(), Violation> {
        if self.replica(id, replica_id).is_some_and(|replica| !replica.open.remove(&token)) {
            let detail = format!("replica {replica_id} ended operation {token:x} twice: {result:?}");
            return Err(Violation::new("answers", detail));
        }
        let delay = self.dice.between(50, 500);
        self.clock.after(delay, Event::Answer(token, result));
        Ok(())
    }

    fn freeze_some(&mut self, id: NodeId, process: u64) {
        let Some(node) = self.nodes.get_mut(&id).filter(|node| node.is_process(process)) else { return };
        let early = self.options.planted.is(Planted::CompactEarly);
        let mut compact = Vec::new();
        let ids: Vec<ReplicaId> = node.replicas().map(|(id, _)| id).collect();
        for replica_id in ids {
            let chosen = self.dice.chance(600);
            let Some(replica) = node.replica_mut(replica_id).filter(|r| chosen && !r.flushing) else {
                continue;
            };
            if let Some(frozen) = replica.group.freeze() {
                replica.flushing = true;
                if early {
                    replica.flushed = frozen.header.applied;
                    compact.push(replica_id);
                }
                let incarnation = replica.incarnation;
                node.disk.flush(incarnation, frozen);
            }
        }
        compact.into_iter().for_each(|replica| self.compact(id, replica));
        self.drive_disk(id);
        let next = self.dice.between(200_000, 3_000_000);
        self.clock.after(next, Event::Node(id, NodeEvent::Freeze(process)));
    }

    /// Freezes the memtable of one replica, unless it is flushed already.
    pub(super) fn freeze(&mut self, id: NodeId, replica_id: ReplicaId) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        let Some(replica) = node.replica_mut(replica_id).filter(|r| !r.flushing) else { return };
        if let Some(frozen) = replica.group.freeze() {
            replica.flushing = true;
            let incarnation = replica.incarnation;
            node.disk.flush(incarnation, frozen);
        }
        self.drive_disk(id);
    }

    fn on_flush_step(&mut self, id: NodeId, process: u64) -> Result<(), Violation> {
        let Some(node) = self.nodes.get_mut(&id).filter(|node| node.is_process(process)) else {
            return Ok(());
        };
        let stepped = node.disk.step_flush(&mut self.dice);
        let (told, goes_on) = stepped.map_err(|e| Violation::new("disk", e.to_string()))?;
        if let Some(told) = told {
            note!(self.trace, "{} node {} flush {:?}", self.clock.now, id, Shown(told));
            let replica = node.replica_mut(told.replica).filter(|r| r.incarnation == told.incarnation);
            match (replica, told.step) {
                (Some(replica), FlushStep::Logged) => {
                    replica.flushed = told.position;
                    if self.options.planted.is(Planted::ReleaseEarly) {
                        replica.group.release(told.position.index);
                    }
                    self.compact(id, told.replica);
                }
                (Some(replica), FlushStep::Absorbed) => {
                    replica.group.release(told.position.index);
                    replica.flushing = false;
                    self.count("flushes");
                }
                (None, _) => {}
            }
        }
        if goes_on {
            let delay = self.dice.between(100, 20_000);
            self.clock.after(delay, Event::Node(id, NodeEvent::FlushStep(process)));
        }
        self.drive_disk(id);
        Ok(())
    }

    pub(super) fn compact(&mut self, id: NodeId, replica_id: ReplicaId) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        let Some(replica) = node.replica_mut(replica_id) else { return };
        let flushed = replica.flushed;
        if let Some(to) = replica.group.compact(flushed) {
            replica.terms = replica.terms.split_off(&to.index);
            note!(self.trace, "{} replica {} compacts to {:?}", self.clock.now, replica_id, to);
            node.disk.compact(replica_id, to);
            self.count("compactions");
            self.drive_disk(id);
        }
    }

    /// Begins what the disk is asked for, as far as it is idle.
    pub(super) fn drive_disk(&mut self, id: NodeId) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        let Some(number) = node.process.as_ref().map(|process| process.number) else { return };
        // A disk that acknowledges early takes its time to write.
        let late = self.options.planted.is(Planted::AcknowledgeEarly);
        let slow = if node.slow || late { 100 } else { 1 };
        if node.disk.begin_write() {
            let latency = self.dice.between(100, 3_000) * slow;
            self.clock.after(latency, Event::Node(id, NodeEvent::LogWritten(number)));
        }
        if node.disk.begin_flush() {
            let latency = self.dice.between(500, 30_000) * slow.min(10);
            self.clock.after(latency, Event::Node(id, NodeEvent::FlushStep(number)));
        }
    }
}
