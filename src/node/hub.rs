//! One per thread that owns replicas: what comes from other threads arrives here in batches and is
//! handed to the replicas of this thread; the thread's one timer is here too.

use std::collections::HashMap;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use actix::prelude::*;

use super::fatal::{Fatal, FatalGuard};
use super::flusher::FlushSink;
use super::gather::Gather;
use super::intake::Arrived;
use super::log_writer::PersistSink;
use super::messages::*;
use super::panics::contained;
use super::replica::{ReplicaActor, ReplicaAddr};
use super::roster::Roster;
use super::shared::Shared;
use super::supervisor::Supervisor;
use super::ticker;
use super::ticket::Ticket;
use crate::failpoints::failpoint;
use crate::group::driver::Group;
use crate::group::nodes::Alarm;
use crate::group::open::GroupOptions;
use crate::ids::{Incarnation, METADATA_SHARD, NodeId, Position, ReplicaId, ShardId};
use crate::limits;
use crate::storage::flush::FlushStep;
use crate::storage::log::LogState;
use crate::storage::state::ReplicaState;
use crate::telemetry::metrics as names;

/// See the module page.
pub struct Hub {
    shared: Arc<Shared>,
    replicas: HashMap<ReplicaId, (Incarnation, ReplicaAddr)>,
    /// One for all replicas of this thread: the log and flush threads call it once per batch.
    sink: Option<Arc<HubSink>>,
    /// Whom they tell of their end, one address for all of them: each clone of one takes memory. Theirs, so that it ends
    /// with them.
    supervisor: Weak<Addr<Supervisor>>,
    /// What they write to the log and send.
    gather: Gather,
    /// How often replicas were told of time or memory: who is first is another each time.
    rounds: usize,
    disk: DiskNews,
    /// Which of the replicas are awake, and what is heard of other nodes.
    roster: Rc<Roster>,
    ticks: u64,
    /// Its ticks tell other nodes that this one is alive.
    beats: bool,
    _guard: FatalGuard,
}

/// Supervisor → hub: run a replica whose log and state were read from disk.
#[derive(Message)]
#[rtype(result = "Result<ReplicaAddr, String>")]
pub struct StartReplica {
    /// Who it is.
    pub options: GroupOptions,
    /// Its log as found.
    pub log: LogState,
    /// Its state as found.
    pub state: ReplicaState,
    /// Whom to tell of its end.
    pub supervisor: Addr<Supervisor>,
}

/// Supervisor → hub: this incarnation is gone.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Forget(pub ReplicaId, pub Incarnation);

/// Supervisor → hub: end this incarnation, if it runs, with an error, to be rebuilt from disk.
#[derive(Message)]
#[rtype(result = "()")]
pub struct FailReplica(pub ReplicaId, pub Incarnation, pub String);

/// Peer connections → hub: messages for replicas of this thread. Mailbox full: dropped.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Deliver(pub Arrived);

/// Log writer → hub: these log writes are durable.
#[derive(Message)]
#[rtype(result = "()")]
pub struct PersistedBatch(pub Vec<(ReplicaId, Incarnation, u64)>);

/// Flush thread → hub: these flushes have come so far.
#[derive(Message)]
#[rtype(result = "()")]
pub struct FlushedBatch(pub FlushStep, pub Vec<(ReplicaId, Incarnation, Position)>);

/// Log writer → hub: flush these replicas of yours, they hold back log space. Others' are ignored.
#[derive(Message, Clone)]
#[rtype(result = "()")]
pub struct FreezeBatch(pub Arc<Vec<ReplicaId>>);

/// Peer connections → hub: a heartbeat has come from a node. Mailbox full: dropped, another follows.
#[derive(Message, Clone, Copy)]
#[rtype(result = "()")]
pub struct NodeHeard {
    /// Which.
    pub node: NodeId,
    /// Which start of its process.
    pub process: u64,
    /// How many replicas have ended on it.
    pub ended: u64,
}

/// Network → hub: this process on a node is gone. Never dropped: told at each attempt to reach it, seldom.
#[derive(Message, Clone, Copy)]
#[rtype(result = "()")]
pub struct NodeGone {
    /// Where it was.
    pub node: NodeId,
    /// Which start of the node's process.
    pub process: u64,
}

/// Network → hub: messages to this node were lost.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Unreachable(pub NodeId);

/// The way from the log and flush threads to a hub.
pub struct HubSink(pub Addr<Hub>);

impl PersistSink for HubSink {
    fn persisted(&self, batch: &[(ReplicaId, Incarnation, u64)]) {
        self.0.do_send(PersistedBatch(batch.to_vec()));
    }
}

impl FlushSink for HubSink {
    fn flushed(&self, step: FlushStep, batch: Vec<(ReplicaId, Incarnation, Position)>) {
        self.0.do_send(FlushedBatch(step, batch));
    }
}

impl Hub {
    /// A hub without replicas.
    pub fn new(shared: Arc<Shared>, fatal: Fatal) -> Hub {
        let _guard = fatal.guard("a hub");
        let gather = Gather::new(shared.clone());
        Hub {
            shared,
            gather,
            replicas: HashMap::new(),
            sink: None,
            supervisor: Weak::new(),
            rounds: 0,
            disk: DiskNews::default(),
            roster: Rc::default(),
            ticks: 0,
            beats: false,
            _guard,
        }
    }

    /// The one of a node that tells the others that it is alive: groups that sleep rely on that, so it comes from a thread
    /// that would otherwise send their heartbeats.
    pub fn beating(self) -> Hub {
        Hub { beats: true, ..self }
    }

    /// Something is wrong with a node, or may be: those wake that rely on it, and who is about to sleep begins anew.
    fn alarm(&self, node: NodeId, alarm: Alarm) {
        tracing::debug!(%node, ?alarm, "an alarm for who sleeps");
        for (_, addr) in self.replicas.values() {
            addr.do_send(NodeAlarm(node, alarm));
        }
    }

    fn tick(&mut self) {
        let memory = &self.shared.memory;
        let must_flush = memory.must_flush() || memory.is_much_for(self.shared.disk.free_bytes());
        let (active, frozen) = memory.bytes();
        metrics::gauge!(names::MEMTABLE_BYTES).set((active + frozen) as f64);
        metrics::gauge!(names::PAUSED_REPLICAS).set(memory.paused() as f64);
        metrics::gauge!(names::SESSIONS).set(memory.sessions() as f64);
        metrics::gauge!(names::KNOWN_BYTES).set(memory.known() as f64);
        metrics::gauge!(names::LOG_QUEUE_BYTES).set(self.shared.intake.bytes() as f64);
        metrics::gauge!(names::CACHED_ENTRY_BYTES).set(self.shared.cached_entries.get() as f64);
        let held = &self.shared.held_log;
        held.grant(!self.shared.disk.is_full());
        metrics::gauge!(names::HELD_LOG_BYTES).set(held.bytes() as f64);
        metrics::counter!(names::SNAPSHOTS_OUTRUN).absolute(held.outrun());
        let disk = DiskNews {
            full: self.shared.disk.is_full(),
            stalled: self.shared.disk.stalls(self.shared.log_writer.under_way()),
            draining: self.shared.draining.load(Ordering::Relaxed),
        };
        let news = disk != self.disk;
        self.disk = disk;
        self.ticks += 1;
        if self.beats && self.ticks.is_multiple_of(limits::HEARTBEAT_TICKS as u64) {
            self.shared.heartbeat();
        }
        for node in self.roster.tick() {
            self.alarm(node, Alarm::Silent);
        }
        if must_flush {
            // All that have anything: a flush covers all tables frozen in a round, at one sync.
            for addr in self.in_turn(&self.roster.unflushed()) {
                addr.do_send(Freeze { for_log: false });
            }
        }
        if news {
            for (_, addr) in self.replicas.values() {
                addr.do_send(disk);
            }
        }
        // Who sleeps costs nothing here.
        self.rounds = self.rounds.wrapping_add(1);
        for addr in self.in_turn(&self.roster.awake()) {
            // A full mailbox means that the replica is behind; another tick wouldn't help it.
            if let Err(SendError::Full(_)) = addr.try_send(Tick) {
                tracing::debug!("a replica missed a tick");
            }
        }
        self.roster.show();
    }

    /// These replicas, from another one on each round: those that are told first take what memory there is.
    fn in_turn<'a>(&'a self, of: &'a [ReplicaId]) -> impl Iterator<Item = &'a ReplicaAddr> {
        let first = self.rounds % of.len().max(1);
        let turn = of[first..].iter().chain(&of[..first]);
        turn.filter_map(|replica| self.replicas.get(replica)).map(|(_, addr)| addr)
    }

    /// Memory was freed: those that paused may go on. Nobody sleeps who has anything to apply.
    fn tell_of_memory(&mut self) {
        if self.shared.memory.paused() == 0 {
            return;
        }
        self.rounds = self.rounds.wrapping_add(1);
        for addr in self.in_turn(&self.roster.awake()) {
            // Who is that busy looks for itself, or at the next tick.
            if addr.try_send(MemoryFreed).is_err() {
                tracing::trace!("a replica is too busy to be told of memory");
            }
        }
    }

    fn living(&self, replica: ReplicaId, incarnation: Incarnation) -> Option<&ReplicaAddr> {
        let (current, addr) = self.replicas.get(&replica)?;
        (*current == incarnation).then_some(addr)
    }
}

impl Actor for Hub {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Context<Self>) {
        ctx.set_mailbox_capacity(limits::HUB_MAILBOX_MAX);
        ticker::every(ctx, Duration::from_millis(limits::TICK_MS), |hub, _| hub.tick());
    }
}

impl Handler<StartReplica> for Hub {
    type Result = Result<ReplicaAddr, String>;
    fn handle(&mut self, start: StartReplica, ctx: &mut Context<Self>) -> Self::Result {
        let GroupOptions { shard, replica, incarnation, .. } = start.options;
        // raft-rs panics on a log it can't make sense of; that is this replica's end, not the hub's.
        let log = self.shared.log.clone();
        let opened = contained(|| {
            failpoint!(Open, replica);
            Group::open(start.options, log, start.log, start.state)
        });
        let mut group: Group<Ticket> = opened?.map_err(|error| error.to_string())?;
        if shard != METADATA_SHARD {
            // What the cluster is governed by is to be awake, and its leader says so with every tick.
            group.sleep_after(self.shared.sleep_ticks, self.shared.process);
        }
        let sink = self.sink.get_or_insert_with(|| Arc::new(HubSink(ctx.address()))).clone();
        let supervisor = self.supervisor.upgrade().unwrap_or_else(|| Rc::new(start.supervisor));
        self.supervisor = Rc::downgrade(&supervisor);
        let actor = ReplicaActor::new(
            (shard, replica, incarnation),
            group,
            self.shared.clone(),
            (self.roster.clone(), sink, self.gather.clone()),
            supervisor,
        );
        let addr = Arc::new(actor.start());
        if self.disk != DiskNews::default() {
            addr.do_send(self.disk);
        }
        self.replicas.insert(replica, (incarnation, addr.clone()));
        Ok(addr)
    }
}

impl Handler<Forget> for Hub {
    type Result = ();
    fn handle(&mut self, Forget(replica, incarnation): Forget, _: &mut Context<Self>) {
        if self.living(replica, incarnation).is_some() {
            self.replicas.remove(&replica);
        }
    }
}

impl Handler<NodeHeard> for Hub {
    type Result = ();
    fn handle(&mut self, heard: NodeHeard, _: &mut Context<Self>) {
        if let Some(alarm) = self.roster.heard(heard.node, heard.process, heard.ended) {
            if alarm == Alarm::Restarted {
                self.shared.reluctance.forget(heard.node);
            }
            self.alarm(heard.node, alarm);
        }
    }
}

impl Handler<NodeGone> for Hub {
    type Result = ();
    fn handle(&mut self, NodeGone { node, process }: NodeGone, _: &mut Context<Self>) {
        if let Some(alarm) = self.roster.gone(node, process) {
            self.alarm(node, alarm);
        }
    }
}

impl Handler<FailReplica> for Hub {
    type Result = ();
    fn handle(&mut self, FailReplica(replica, incarnation, reason): FailReplica, _: &mut Context<Self>) {
        if let Some(addr) = self.living(replica, incarnation) {
            addr.do_send(Fail(reason));
        }
    }
}

impl Handler<Deliver> for Hub {
    type Result = ();
    fn handle(&mut self, deliver: Deliver, _: &mut Context<Self>) {
        // Neighbours in a frame are often for the same replica.
        for (to, batch) in deliver.0.by_receiver() {
            let Some((_, addr)) = self.replicas.get(&ReplicaId(to)) else {
                tracing::debug!(replica = to, "no such replica here for a raft message");
                continue;
            };
            if addr.try_send(Step(batch)).is_err() {
                metrics::counter!(names::PEER_DROPPED).increment(1);
            }
        }
    }
}

impl Handler<PersistedBatch> for Hub {
    type Result = ();
    fn handle(&mut self, batch: PersistedBatch, _: &mut Context<Self>) {
        for (replica, incarnation, number) in batch.0 {
            if let Some(addr) = self.living(replica, incarnation) {
                addr.do_send(Persisted(number));
            }
        }
    }
}

impl Handler<FlushedBatch> for Hub {
    type Result = ();
    fn handle(&mut self, FlushedBatch(step, batch): FlushedBatch, ctx: &mut Context<Self>) {
        for (replica, incarnation, position) in batch {
            if let Some(addr) = self.living(replica, incarnation) {
                addr.do_send(Flushed { step, position });
            }
        }
        if step == FlushStep::Absorbed {
            // When all of them have freed theirs. The first would take it all, flush by flush the same ones.
            ctx.spawn(
                fut::wrap_future(tokio::task::yield_now()).map(|(), hub: &mut Self, _| hub.tell_of_memory()),
            );
        }
    }
}

impl Handler<Unreachable> for Hub {
    type Result = ();
    fn handle(&mut self, unreachable: Unreachable, _: &mut Context<Self>) {
        // Who sleeps has sent nothing.
        for (_, addr) in self.roster.awake().iter().filter_map(|replica| self.replicas.get(replica)) {
            // Only a hint; raft finds out by itself.
            if addr.try_send(PeerUnreachable(unreachable.0)).is_err() {
                tracing::trace!("a replica is too busy for a hint");
            }
        }
    }
}

impl Handler<FreezeBatch> for Hub {
    type Result = ();
    fn handle(&mut self, batch: FreezeBatch, _: &mut Context<Self>) {
        for replica in batch.0.iter() {
            if let Some((_, addr)) = self.replicas.get(replica) {
                addr.do_send(Freeze { for_log: true });
            }
        }
    }
}

/// Which of `hubs` data hubs owns the replicas of a shard.
pub fn hub_of(shard: ShardId, hubs: usize) -> usize {
    // Neighbouring shards spread over all threads.
    (shard.0 % hubs as u64) as usize
}
