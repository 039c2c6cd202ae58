//! A shard replica as an actor: a mailbox in front of a [`Group`], and its effects carried out.
//!
//! Handlers only enqueue; one `Pump` per mailbox pass does the work, so that a burst of requests
//! becomes one proposal and one disk write. A panic anywhere in here, raft-rs included, ends this
//! actor alone: the guard it owns tells the supervisor, which rebuilds the replica from disk.

mod disk;
mod guard;
#[cfg(feature = "test-hooks")]
mod hooks;
mod memory;
mod reads;
mod rest;
mod traces;
mod view;

use std::ops::Bound;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::prelude::*;

use self::guard::Guard;
use self::traces::Traces;
use super::gather::Gather;
use super::hub::HubSink;
use super::log_writer::WriteTask;
use super::memory::MemoryShare;
use super::messages::*;
use super::roster::Roster;
use super::shared::Shared;
use super::snapshots::outgoing::Order;
use super::supervisor::Supervisor;
use super::ticket::{Ticket, tickets};
use super::trace::WriteStamps;
use crate::codec::trace;
use crate::failpoints::failpoint;
use crate::group::driver::Group;
use crate::group::types::{Effects, Fetch, Operation, SnapshotWanted};
use crate::ids::{Incarnation, METADATA_SHARD, Position, ReplicaId, ShardId};
use crate::limits;
use crate::machine::meta;
use crate::placement::map::ClusterMap;
use crate::refusal::Refusal;
use crate::storage::StorageError;
use crate::storage::log::LogStore;
use crate::storage::state::Frozen;
use crate::telemetry::metrics as names;

/// Replica → itself: the mailbox is drained, do the work.
#[derive(Message)]
#[rtype(result = "()")]
struct Pump;

/// Where a replica's mailbox is: one address for all who have it, since each clone of one takes memory.
pub type ReplicaAddr = Arc<Addr<ReplicaActor>>;

/// One replica of one shard.
pub struct ReplicaActor {
    shard: ShardId,
    replica: ReplicaId,
    incarnation: Incarnation,
    pub(super) group: Group<Ticket>,
    shared: Arc<Shared>,
    roster: Rc<Roster>,
    /// While it is asleep as the roster has it: the tick at which it fell asleep.
    asleep_since: Option<u64>,
    /// The supervisor knows that it sleeps as a leader.
    rests_as_leader: bool,
    sink: Arc<HubSink>,
    /// To the log writer and to other nodes.
    gather: Gather,
    guard: Guard,
    pump_queued: bool,
    /// Bytes of entries that other replicas have sent since the last pump.
    stepped_bytes: usize,
    memory: MemoryShare,
    /// The last state that is durable.
    flushed: Position,
    flushing: bool,
    /// What is flushed after that.
    flush_waiting: Option<Arc<Frozen>>,
    /// A state that is kept still for its digest.
    hold: Option<Box<view::Hold>>,
    /// The map last told to the supervisor, and the revision at which that was; of the metadata replica.
    map: Option<Arc<ClusterMap>>,
    map_revision: Option<u64>,
    ticks: u64,
    /// How the node's disk is, as last told.
    disk: DiskNews,
    traces: Traces,
    /// Ticks for which a new group's preferred leader goes on campaigning: the other replicas may not
    /// have been created when it began.
    eager_ticks: u64,
    /// Until it does so with ticks: the time to its next attempt.
    eager_pause: Duration,
}

impl Drop for ReplicaActor {
    fn drop(&mut self) {
        self.roster.leaves(self.replica, self.incarnation);
        // Its guard follows, and tells.
        self.guard.applying = self.group.applying();
    }
}

impl ReplicaActor {
    /// An actor for a group that was just opened from disk, of this start of a replica of this shard.
    pub fn new(
        (shard, replica, incarnation): (ShardId, ReplicaId, Incarnation),
        group: Group<Ticket>,
        shared: Arc<Shared>,
        (roster, sink, gather): (Rc<Roster>, Arc<HubSink>, Gather),
        supervisor: Rc<Addr<Supervisor>>,
    ) -> ReplicaActor {
        roster.wakes(replica, incarnation);
        let guard = Guard::new(replica, incarnation, supervisor);
        let flushed = group.state().header().applied;
        ReplicaActor {
            shard,
            replica,
            incarnation,
            group,
            memory: MemoryShare::new(shared.clone()),
            shared,
            roster,
            asleep_since: None,
            rests_as_leader: false,
            sink,
            gather,
            guard,
            pump_queued: false,
            stepped_bytes: 0,
            flushed,
            flushing: false,
            flush_waiting: None,
            hold: None,
            map: None,
            map_revision: None,
            ticks: 0,
            disk: DiskNews::default(),
            traces: Traces::default(),
            eager_ticks: 0,
            eager_pause: Duration::ZERO,
        }
    }

    fn queue_pump(&mut self, ctx: &mut Context<Self>) {
        if !self.pump_queued {
            self.pump_queued = true;
            ctx.notify(Pump);
        }
    }

    /// The same, if there is anything for it to do.
    fn queue_pump_for_work(&mut self, ctx: &mut Context<Self>) {
        if self.group.has_work() || !self.traces.is_empty() {
            self.queue_pump(ctx);
        }
    }

    fn pump(&mut self, ctx: &mut Context<Self>) {
        self.pump_queued = false;
        self.stepped_bytes = 0;
        self.mind_memory();
        self.allow_known();
        let mut effects = match self.group.pump() {
            Ok(effects) => effects,
            Err(error) => return self.fail(error.to_string(), ctx),
        };
        let stamps = self.traces.pumped(&self.group, &mut effects);
        self.carry_out(effects, stamps, ctx);
        self.account_memory();
        self.settle();
        self.freeze_in_time();
        if self.shard == METADATA_SHARD {
            self.tell_map(ctx);
        }
    }

    fn carry_out(
        &mut self,
        effects: Effects<Ticket>,
        stamps: Option<Arc<WriteStamps>>,
        ctx: &mut Context<Self>,
    ) {
        let Effects { messages, write, done, reads, fetch, snapshot, leader, marked, more } = effects;
        // Messages of this pass are those that may leave before the write below.
        self.gather.send(messages);
        if let Some(numbered) = write {
            failpoint!(WriteBefore, self.replica, why => return self.fail(why, ctx));
            self.gather.put(WriteTask {
                incarnation: self.incarnation,
                number: numbered.number,
                write: numbered.write,
                done: self.sink.clone(),
                stamps,
            });
            failpoint!(WriteAfter, self.replica, why => return self.fail(why, ctx));
        }
        failpoint!(Answer, self.replica, why => return self.fail(why, ctx));
        for (ticket, result) in done {
            if let Err(refusal) = &result {
                metrics::counter!(names::REFUSALS, "reason" => refusal.kind()).increment(1);
            }
            ticket.finish(result);
        }
        if let Some(index) = marked {
            self.keep_still(index);
        }
        self.read_elsewhere(reads, ctx);
        if let Some(fetch) = fetch {
            self.fetch(fetch, ctx);
        }
        if let Some(wanted) = snapshot {
            self.bring_snapshot(wanted, ctx);
        }
        if let Some(change) = leader {
            if !change.local {
                self.shared.snapshots.outgoing.cancel(self.replica);
            }
            if let Some(node) = change.leader.and_then(|leader| self.group.node_of(leader)) {
                self.shared.reluctance.forget(node);
            }
            metrics::counter!(names::LEADER_CHANGES).increment(1);
            self.guard.supervisor.do_send(LeaderChanged { shard: self.shard, replica: self.replica, change });
        }
        if more {
            // Others on this thread get their turn first.
            ctx.spawn(
                fut::wrap_future(tokio::task::yield_now()).map(|(), act: &mut Self, ctx| act.queue_pump(ctx)),
            );
        }
    }

    fn fetch(&mut self, fetch: Fetch, ctx: &mut Context<Self>) {
        let log = self.shared.log.clone();
        let replica = self.replica;
        let read =
            tokio::task::spawn_blocking(move || log.entries(replica, fetch.low, fetch.high, fetch.max_bytes));
        ctx.spawn(fut::wrap_future(read).map(|entries, act: &mut Self, ctx| match entries {
            Ok(Ok(entries)) => {
                act.group.on_fetched(entries);
                act.queue_pump(ctx);
            }
            // Compacted while the read was under way: raft asks anew, or finds that it needn't.
            Ok(Err(StorageError::Compacted(_))) => act.group.on_fetched(Vec::new()),
            Ok(Err(error)) => act.fail(error.to_string(), ctx),
            Err(error) => act.fail(format!("reading the raft log: {error}"), ctx),
        }));
    }

    /// Has a follower brought up to date whose next log entries are gone, or whose state is.
    fn bring_snapshot(&mut self, wanted: SnapshotWanted, ctx: &mut Context<Self>) {
        failpoint!(SnapshotWanted, self.replica, why => return self.fail(why, ctx));
        let SnapshotWanted { to, node, term, least } = wanted;
        tracing::info!(shard = %self.shard, replica = %self.replica, %to, %node, "a follower needs a snapshot");
        self.shared.snapshots.outgoing.bring(Order {
            shard: self.shard,
            from: self.replica,
            generation: self.group.state().reader().generation,
            term,
            least,
            to,
            node,
            replica: ctx.address(),
        });
    }

    /// Ends this replica because of an error; the supervisor rebuilds it from disk.
    fn fail(&mut self, reason: String, ctx: &mut Context<Self>) {
        tracing::error!(shard = %self.shard, replica = %self.replica, reason, "replica stops");
        self.guard.reason = Some(reason);
        for (ticket, result) in self.group.abandon("the replica stopped because of an error") {
            ticket.finish(result);
        }
        ctx.stop();
    }

    /// Drops log entries that are in the durable state here and on disk at every replica.
    fn compact(&mut self) {
        if let Some(to) = self.group.compact(self.flushed) {
            failpoint!(Compact, self.replica);
            let replica = self.replica;
            let compact = move |log: &dyn LogStore| {
                failpoint!(LogCompactBefore, replica);
                if let Err(error) = log.compact(replica, to) {
                    tracing::error!(%replica, %error, "compacting the raft log");
                }
                failpoint!(LogCompactAfter, replica);
            };
            self.shared.log_writer.run_for(replica, self.incarnation, Box::new(compact));
        }
    }

    fn campaign_eagerly(&mut self, ctx: &mut Context<Self>) {
        if self.eager_ticks == 0 {
            return;
        }
        let status = self.group.status();
        if status.leader.is_some() || self.disk != DiskNews::default() {
            self.eager_ticks = 0;
            return;
        }
        self.eager_ticks -= 1;
        // Votes on their way need their time: beginning anew at each tick would void them.
        if status.role == raft::StateRole::Candidate || !self.eager_ticks.is_multiple_of(limits::EAGER_TICKS)
        {
            return;
        }
        if let Err(error) = self.group.campaign() {
            self.fail(error.to_string(), ctx);
        }
    }

    /// The same between ticks: the other replicas are usually there a moment later.
    fn campaign_soon(&mut self, ctx: &mut Context<Self>) {
        let pause = self.eager_pause;
        if pause >= Duration::from_millis(limits::EAGER_TICKS * limits::TICK_MS) {
            return;
        }
        self.eager_pause = pause * 2;
        ctx.run_later(pause, |act, ctx| {
            let status = act.group.status();
            // With pre-votes on their way it may ask for them again: they count for the same term.
            if act.eager_ticks == 0 || status.leader.is_some() || act.disk != DiskNews::default() {
                return;
            }
            if status.role != raft::StateRole::Candidate {
                if let Err(error) = act.group.campaign() {
                    return act.fail(error.to_string(), ctx);
                }
                act.queue_pump(ctx);
            }
            act.campaign_soon(ctx);
        });
    }

    /// Tells the supervisor of a changed map.
    fn tell_map(&mut self, ctx: &mut Context<Self>) {
        let revision = self.group.state().header().revision;
        if self.group.recovering() || self.group.state_lost() || self.map_revision == Some(revision) {
            return;
        }
        self.map_revision = Some(revision);
        let map = self.map.get_or_insert_default();
        match meta::refresh(Arc::make_mut(map), self.group.state()) {
            Ok(()) => self.guard.supervisor.do_send(MapApplied(map.clone())),
            Err(error) => self.fail(error.to_string(), ctx),
        }
    }

    /// Tells the supervisor, if this replica leads the metadata shard, that there is no newer map than the one told last.
    /// An older leader has given up by itself, or is about to.
    fn confirm_map(&self) {
        let all_known =
            self.shard == METADATA_SHARD && self.group.is_up_to_date() && !self.group.state_lost();
        let version = self.map.as_ref().map_or(0, |map| map.version);
        if all_known && version > 0 {
            self.guard.supervisor.do_send(MapConfirmed { version, at: Instant::now() });
        }
    }
}

impl Actor for ReplicaActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Context<Self>) {
        ctx.set_mailbox_capacity(limits::REPLICA_MAILBOX_MAX);
        self.queue_pump(ctx);
    }
}

impl Handler<Pump> for ReplicaActor {
    type Result = ();
    fn handle(&mut self, _: Pump, ctx: &mut Context<Self>) {
        self.pump(ctx);
    }
}

impl Handler<Submit> for ReplicaActor {
    type Result = ();
    fn handle(&mut self, submit: Submit, ctx: &mut Context<Self>) {
        if submit.reply.is_closed() {
            // Its caller gave up while it was in the mailbox.
            metrics::counter!(names::REFUSALS, "reason" => Refusal::Deadline.kind())
                .increment(submit.operations.len() as u64);
            return;
        }
        let range_version = self.group.epoch().range;
        if submit.range_version != range_version {
            let refusal =
                Refusal::StaleRoute { shard: self.shard, asked: submit.range_version, range_version };
            if submit.reply.send(Err(refusal)).is_err() {
                tracing::trace!("nobody waits for a refusal");
            }
            return;
        }
        self.rouse_for_a_request();
        // What was so at the last pass may be so no more.
        self.mind_memory();
        if let Some(sheet) = &submit.trace {
            let writes = submit.operations.iter().any(|operation| !matches!(operation, Operation::Query(_)));
            self.traces.taken(sheet.clone(), writes, Instant::now());
        }
        let tickets = tickets(&submit.operations, submit.reply, submit.admitted, submit.trace);
        let no_room = self.no_room();
        for (operation, ticket) in submit.operations.into_iter().zip(tickets) {
            match &no_room {
                Some(refusal) if disk::adds_value(&operation) => {
                    metrics::counter!(names::REFUSALS, "reason" => refusal.kind()).increment(1);
                    ticket.finish(Err(refusal.clone()));
                }
                _ => self.group.submit(operation, ticket),
            }
        }
        self.queue_pump(ctx);
    }
}

impl Handler<Step> for ReplicaActor {
    type Result = ();
    fn handle(&mut self, mut step: Step, ctx: &mut Context<Self>) {
        failpoint!(Step, self.replica, why => return self.fail(why, ctx));
        self.stepped_bytes += step.0.bytes();
        for mut message in step.0.take() {
            self.rouse_for(&message);
            if trace::may_concern(&message.message) || !self.traces.is_empty() {
                self.traces.step(&mut message.message, step.0.stamped(), Instant::now());
            }
            if let Err(error) = self.group.step(message) {
                return self.fail(error.to_string(), ctx);
            }
        }
        self.settle();
        // What is written at once holds up all others' writes: not everything that a leader has sent meanwhile.
        if self.stepped_bytes >= limits::LOG_WRITE_TARGET_BYTES {
            self.pump(ctx);
        } else {
            self.queue_pump_for_work(ctx);
        }
    }
}

impl Handler<Tick> for ReplicaActor {
    type Result = ();
    fn handle(&mut self, _: Tick, ctx: &mut Context<Self>) {
        if self.asleep_since.is_some() {
            // It fell asleep while this was in the mailbox.
            return;
        }
        self.ticks += 1;
        self.group.keep_awake(self.hold.is_some());
        self.group.tick();
        self.note_lapsed();
        self.group.discard(Ticket::abandoned);
        self.let_go();
        self.make_room();
        self.campaign_eagerly(ctx);
        self.make_way_now_and_then();
        self.confirm_map();
        if self.ticks.is_multiple_of(limits::COMPACT_TICKS) {
            self.compact();
        }
        self.go_on(ctx);
        self.settle();
        // With thousands of groups at rest, a pump after each tick would be most of what a node does.
        if !self.group.at_rest() {
            self.queue_pump(ctx);
        }
    }
}

impl Handler<Persisted> for ReplicaActor {
    type Result = ();
    fn handle(&mut self, persisted: Persisted, ctx: &mut Context<Self>) {
        failpoint!(Persisted, self.replica, why => return self.fail(why, ctx));
        if !self.traces.is_empty() {
            self.traces.persisted(persisted.0, Instant::now());
        }
        self.group.on_persisted(persisted.0);
        self.queue_pump_for_work(ctx);
    }
}

impl Handler<SnapshotMade> for ReplicaActor {
    type Result = bool;
    fn handle(&mut self, made: SnapshotMade, _: &mut Context<Self>) -> bool {
        failpoint!(SnapshotMade, self.replica);
        self.group.snapshot_made(made.to, made.position)
    }
}

impl Handler<SnapshotDone> for ReplicaActor {
    type Result = ();
    fn handle(&mut self, done: SnapshotDone, ctx: &mut Context<Self>) {
        failpoint!(SnapshotDone, self.replica);
        self.group.snapshot_done(done.to, done.installed);
        self.queue_pump(ctx);
    }
}

impl Handler<PeerUnreachable> for ReplicaActor {
    type Result = ();
    fn handle(&mut self, unreachable: PeerUnreachable, ctx: &mut Context<Self>) {
        if let Some(replica) = self.group.replica_on(unreachable.0) {
            self.group.on_unreachable(replica);
            self.queue_pump(ctx);
        }
    }
}

impl Handler<Campaign> for ReplicaActor {
    type Result = ();
    fn handle(&mut self, _: Campaign, ctx: &mut Context<Self>) {
        self.rouse();
        self.eager_ticks = limits::ELECTION_TICKS_MIN as u64 + 1;
        self.campaign_eagerly(ctx);
        self.eager_pause = Duration::from_millis(limits::EAGER_MS_MIN);
        self.campaign_soon(ctx);
        self.queue_pump(ctx);
    }
}

impl Handler<Transfer> for ReplicaActor {
    type Result = Result<(), Refusal>;
    fn handle(&mut self, transfer: Transfer, ctx: &mut Context<Self>) -> Result<(), Refusal> {
        if !self.group.leads() {
            return Err(self.group.not_leader());
        }
        let asked = transfer.0.is_some();
        let to = match transfer.0 {
            Some(node) => self.group.replica_on(node).ok_or_else(|| {
                Refusal::Refused(format!("node {node} holds no replica of shard {}", self.shard))
            })?,
            None => self.heir().ok_or(Refusal::Unavailable("no other replica is in reach".into()))?,
        };
        self.group.check_successor(to)?;
        self.rouse();
        if asked {
            self.group.check_in_reach(to)?;
            self.check_willing(to)?;
        }
        self.group.transfer(to);
        self.queue_pump(ctx);
        Ok(())
    }
}

impl Handler<AskStatus> for ReplicaActor {
    type Result = MessageResult<AskStatus>;
    fn handle(&mut self, _: AskStatus, _: &mut Context<Self>) -> MessageResult<AskStatus> {
        MessageResult(self.group.status())
    }
}

impl Handler<CountPage> for ReplicaActor {
    type Result = MessageResult<CountPage>;
    fn handle(&mut self, CountPage(after): CountPage, _: &mut Context<Self>) -> MessageResult<CountPage> {
        let from = if after.is_empty() { Bound::Unbounded } else { Bound::Excluded(&after[..]) };
        MessageResult(self.group.state().scan_reader(from, &[], limits::COUNT_STEP_PAIRS + 1))
    }
}

impl Handler<StopReplica> for ReplicaActor {
    type Result = ();
    fn handle(&mut self, _: StopReplica, ctx: &mut Context<Self>) {
        self.guard.ordered = true;
        for (ticket, result) in self.group.abandon("the replica is being stopped") {
            ticket.finish(result);
        }
        ctx.stop();
    }
}

impl Handler<Fail> for ReplicaActor {
    type Result = ();
    fn handle(&mut self, fail: Fail, ctx: &mut Context<Self>) {
        self.fail(fail.0, ctx);
    }
}
