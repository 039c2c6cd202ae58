//! How simulated nodes and replicas start and end.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::Time;
use super::checks::Violation;
use super::report::{Shown, note};
use super::shell::{Node, NodeEvent, Process, Replica};
use super::world::{Event, World};
use crate::group::catch_up::Retention;
use crate::group::driver::Group;
use crate::group::nodes::Nodes;
use crate::group::open::GroupOptions;
use crate::ids::{Incarnation, Index, METADATA_SHARD, NodeId, ReplicaId, Term};
use crate::limits;
use crate::placement::map::Member;
use crate::refusal::Refusal;
use crate::storage::StorageError;
use crate::storage::engine::Engine;
use crate::storage::engine_memory::CrashLoss;
use crate::storage::log::{LogStore, ReplicaRecord};
use crate::storage::opened::OpenedState;
use crate::storage::state::StateHeader;

/// Until others have noticed that a process has ended.
const GONE_TOLD_MAX: Time = 20_000;

impl World {
    pub(super) fn start(&mut self, id: NodeId) -> Result<(), Violation> {
        let Some(node) = self.nodes.get_mut(&id).filter(|node| node.process.is_none() && !node.lost) else {
            return Ok(());
        };
        node.starts += 1;
        let number = node.starts;
        note!(self.trace, "{} node {} starts, {}", self.clock.now, id, number);
        node.disk.recover(&mut self.dice).map_err(|e| Violation::new("disk", e.to_string()))?;
        node.process = Some(Process {
            number,
            replicas: BTreeMap::new(),
            reconciler: None,
            nodes: Nodes::new(),
            ended: 0,
        });
        node.installing.clear();
        node.switching.clear();
        node.removing.clear();
        node.reload_records().map_err(|e| Violation::new("disk", e.to_string()))?;
        let first_tick = self.dice.between(0, node.tick);
        let ids: Vec<ReplicaId> = node.records.iter().map(|record| record.replica).collect();
        for replica in ids {
            self.open(id, replica)?;
        }
        self.remove_remains(id)?;
        self.begin_governing(id, number)?;
        self.clock.after(first_tick, Event::Node(id, NodeEvent::Tick(number)));
        let freeze = self.dice.between(200_000, 3_000_000);
        self.clock.after(freeze, Event::Node(id, NodeEvent::Freeze(number)));
        Ok(())
    }

    /// Opens a replica from what is on disk.
    pub(super) fn open(&mut self, id: NodeId, replica_id: ReplicaId) -> Result<(), Violation> {
        let Some(node) = self.nodes.get_mut(&id) else { return Ok(()) };
        node.switching.remove(&replica_id);
        if node.removing.contains(&replica_id) {
            return Ok(());
        }
        node.incarnations += 1;
        let incarnation = node.incarnations;
        let Some(record) = node.record(replica_id) else {
            return Ok(());
        };
        self.replicas.open(replica_id)?;
        let shard = record.shard;
        node.disk.faulty.begin(node.unreadable && self.dice.chance(300));
        let opened = open_group(record, incarnation, self.options.retention, node);
        node.disk.faulty.end();
        let (mut group, terms) = match opened {
            Ok(opened) => opened,
            Err(detail) => return self.stays_closed(id, replica_id, &detail),
        };
        let flushed = group.state().header().applied;
        let state_lost = group.state_lost();
        if !state_lost {
            node.disk.has_state(replica_id);
        }
        if let Some(truth) = self.truths.get(&shard).filter(|_| !state_lost) {
            truth.compare(shard, replica_id, flushed.index, group.state(), group.state().session_table())?;
            let StateHeader { epoch, members, .. } = group.state().header();
            // A state that was never flushed begins with the members of the record.
            let known = if group.status().recovering { group.status().committed } else { 0 };
            // So it does with a change that nobody has applied yet: it is recorded before that.
            let proposed = self.proposed.get(&shard).into_iter().flatten();
            let recorded = |(index, change): &(Index, Vec<Member>)| *index <= known && change == members;
            let is_new = truth.members.newest().is_some_and(|newest| newest.conf + 1 == epoch.conf);
            if !(is_new && proposed.into_iter().any(recorded)) {
                truth.members.compare(shard, replica_id, (flushed.index, known), epoch.conf, members)?;
            }
        }
        if let Some(process) = &mut node.process {
            if shard != METADATA_SHARD {
                group.sleep_after(self.options.sleep_after, process.number);
            }
            let replica = Replica {
                shard,
                incarnation,
                group,
                flushed,
                flushing: false,
                pump_queued: false,
                ticks: 0,
                asleep_since: None,
                observed: flushed.index,
                terms,
                open: BTreeSet::new(),
                dies: None,
            };
            process.replicas.insert(replica_id, replica);
        }
        if state_lost {
            self.count("replicas without a state");
        } else if shard == METADATA_SHARD {
            self.publish(id, replica_id)?;
        }
        self.queue_pump(id, replica_id);
        Ok(())
    }

    /// The process ends at once, and comes back after a time. `loss`: what the engine loses;
    /// `torn`: the log write under way is torn.
    pub(super) fn crash(
        &mut self,
        id: NodeId,
        loss: CrashLoss,
        torn: bool,
        back: Time,
    ) -> Result<(), Violation> {
        let Some(node) = self.nodes.get_mut(&id) else { return Ok(()) };
        let Some(process) = node.process.take() else { return Ok(()) };
        note!(self.trace, "{} node {} crashes, {:?}, torn {}", self.clock.now, id, Shown(loss), torn);
        node.paused_until = 0;
        let torn = node.disk.crash(loss, torn, &mut self.dice);
        if torn.map_err(|e| Violation::new("disk", e.to_string()))? {
            self.count("torn writes");
        }
        for replica in process.replicas.into_values() {
            self.disconnect(replica);
        }
        // While it is down its port refuses.
        self.tell_gone(id, process.number, back.min(GONE_TOLD_MAX));
        self.clock.after(back, Event::Node(id, NodeEvent::Start));
        Ok(())
    }

    /// A replica can't be opened. While its disk can't be read it is tried again.
    fn stays_closed(&mut self, id: NodeId, replica_id: ReplicaId, detail: &str) -> Result<(), Violation> {
        let rotten = self.has_rotten_log(id, replica_id);
        let node = self.nodes.get(&id).filter(|node| rotten || node.disk.faulty.has_failed());
        let Some(number) = node.and_then(Node::process_number) else {
            let detail = format!("replica {replica_id} of node {id} can't be opened: {detail}");
            return Err(Violation::new("open", detail));
        };
        note!(self.trace, "{} replica {} stays closed: {}", self.clock.now, replica_id, detail);
        if rotten {
            self.count("refusals to open a rotten replica");
            return Ok(());
        }
        self.count("replicas not opened by read errors");
        let delay = limits::RESTART_BACKOFF_MS * 1_000;
        self.clock.after(delay, Event::Node(id, NodeEvent::Reopen(number, replica_id)));
        Ok(())
    }

    /// A replica stops because of an error, and is opened again.
    pub(super) fn stops(&mut self, id: NodeId, replica_id: ReplicaId, error: &str) -> Result<(), Violation> {
        self.excuse(id, replica_id, error)?;
        self.count("replicas stopped by read errors");
        self.crash_replica(id, replica_id);
        Ok(())
    }

    /// Nothing but the faults of its disk is an excuse for an error.
    pub(super) fn excuse(&self, id: NodeId, replica_id: ReplicaId, error: &str) -> Result<(), Violation> {
        let failed = self.nodes.get(&id).is_some_and(|node| node.disk.faulty.has_failed());
        if failed || self.is_rotten(id, replica_id) {
            return Ok(());
        }
        Err(Violation::new("replica", format!("replica {replica_id} stops: {error}")))
    }

    /// One replica ends, as after a panic, and is opened again.
    pub(super) fn crash_replica(&mut self, id: NodeId, replica_id: ReplicaId) {
        let Some(process) = self.nodes.get_mut(&id).and_then(|node| node.process.as_mut()) else { return };
        let Some(replica) = process.replicas.remove(&replica_id) else { return };
        process.ended += 1;
        let number = process.number;
        note!(self.trace, "{} replica {} crashes", self.clock.now, replica_id);
        self.disconnect(replica);
        // Sooner than in a node, so that messages of before meet the new start.
        let delay = self.dice.between(500, limits::RESTART_BACKOFF_MS * 1_000);
        self.clock.after(delay, Event::Node(id, NodeEvent::Reopen(number, replica_id)));
    }

    /// One replica ends for the installation of a snapshot, which opens it again.
    pub(super) fn end_replica(&mut self, id: NodeId, replica_id: ReplicaId) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        node.switching.insert(replica_id);
        let ended = node.process.as_mut().and_then(|process| process.replicas.remove(&replica_id));
        if let Some(replica) = ended {
            self.disconnect(replica);
        }
    }

    /// Clients learn that the replica is gone, or they don't.
    fn disconnect(&mut self, replica: Replica) {
        for token in replica.open {
            if self.dice.chance(700) {
                let delay = self.dice.between(100, 2_000);
                let refusal = Refusal::Unknown("the connection was lost".into());
                self.clock.after(delay, Event::Answer(token, Err(refusal)));
            }
        }
    }
}

/// A group from what is on disk, with the terms of the entries in its log.
fn open_group(
    record: &ReplicaRecord,
    incarnation: Incarnation,
    retention: u64,
    node: &Node,
) -> Result<(Group<u64>, BTreeMap<Index, Term>), String> {
    let text = |error: StorageError| error.to_string();
    let disk = &node.disk;
    let store = disk.read_log();
    let log = store.load(record.replica).map_err(text)?;
    let entries = store.entries(record.replica, log.truncated.index + 1, log.last + 1, usize::MAX);
    let mut terms: BTreeMap<Index, Term> =
        entries.map_err(text)?.iter().map(|entry| (entry.index, entry.term)).collect();
    terms.insert(log.truncated.index, log.truncated.term);
    let engine: Arc<dyn Engine> = disk.read_engine();
    let (state, state_lost) = match OpenedState::open(&engine, record, &log).map_err(text)? {
        OpenedState::Whole(state) => (state, false),
        OpenedState::Lost { why, .. } if !disk.may_lack_state(record.replica) => {
            return Err(format!("its state is lost, which nothing has damaged: {why}"));
        }
        OpenedState::Lost { state, .. } => (state, !disk.serves_lost_states()),
    };
    let options = GroupOptions {
        shard: record.shard,
        machine: record.machine,
        replica: record.replica,
        incarnation,
        retention: Retention::new(retention),
        logger: slog::Logger::root(slog::Discard, slog::o!()),
        cached: Arc::default(),
        held: node.held.clone(),
        state_lost,
    };
    let group = Group::open(options, store, log, state).map_err(|error| error.to_string())?;
    Ok((group, terms))
}
