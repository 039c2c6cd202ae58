//! [`Group`]: inputs in, effects out. One function, [`Group::pump`], owns the order in which a
//! raft-rs `Ready` is handled; the comments there say what would break otherwise.

use std::collections::VecDeque;
use std::sync::Arc;

use raft::eraftpb::{Entry, Message, MessageType};
use raft::{Config, GetEntriesContext, ProgressState, RawNode, SnapshotStatus, StateRole};

use super::catch_up::{CatchUp, Retention};
use super::clock::SessionClock;
use super::election::{self, Ambition};
use super::log::{CachedBytes, GroupLog};
use super::messages::promises_no_write;
use super::proposals::Proposals;
use super::queue::Queue;
use super::reads::Reads;
use super::types::{
    Effects, Fetch, GroupStatus, LeaderChange, NumberedWrite, Operation, Output, SnapshotWanted,
};
use crate::codec::GroupMessage;
use crate::failpoints::failpoint;
use crate::ids::{Epoch, Incarnation, Index, NodeId, Position, ReplicaId, ShardId, Term};
use crate::limits;
use crate::machine::command::{Query, TaggedCommand, encode_entry};
use crate::machine::entry::tagged_size;
use crate::machine::{ApplyError, MachineKind};
use crate::refusal::Refusal;
use crate::storage::StorageError;
use crate::storage::log::{LogState, LogStore, LogWrite};
use crate::storage::state::{Frozen, ReplicaState};
use crate::telemetry::metrics as names;

/// Ticks after which proposals of a lost leadership are reported as unknown, if the log has not
/// decided them: long enough for the next leader to be elected and to commit.
const UNDECIDED_TICKS_MAX: u64 = 2 * limits::ELECTION_TICKS_MAX as u64;

/// Why a replica can't go on. Its shell drops the group; what can be retried is a [`Refusal`].
#[derive(Debug, thiserror::Error)]
pub enum GroupError {
    /// A committed entry can't be applied.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// The log or the state can't be read, or they contradict each other.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// raft-rs refuses to go on.
    #[error("raft: {0}")]
    Raft(#[from] raft::Error),
}

/// Who a group is.
pub struct GroupOptions {
    /// The shard.
    pub shard: ShardId,
    /// The machine it runs.
    pub machine: MachineKind,
    /// This replica.
    pub replica: ReplicaId,
    /// Which start of the replica this is.
    pub incarnation: Incarnation,
    /// What is kept of the log for followers that lag.
    pub retention: Retention,
    /// Where raft-rs logs.
    pub logger: slog::Logger,
    /// Log entries in memory of all groups of the node.
    pub cached: Arc<CachedBytes>,
}

/// A write that the log writer has not acknowledged, and what waits for it.
struct Unpersisted {
    /// The ready it is of, or the last one without a write that came after it.
    ready: u64,
    write: u64,
    /// The first and the last entry of the write.
    entries: Option<(Index, Position)>,
    /// The term in the write.
    term: Term,
    /// What may leave after that: a vote or an acknowledgement promises what is on disk.
    pub(super) messages: Vec<Message>,
}

/// One replica of a shard. `T` is the caller's token for an operation: handed in by
/// [`Group::submit`], handed back once with the result.
pub struct Group<T> {
    pub(super) shard: ShardId,
    pub(super) machine: MachineKind,
    pub(super) replica: ReplicaId,
    incarnation: Incarnation,
    pub(super) raft: RawNode<GroupLog>,
    pub(super) state: ReplicaState,
    /// Commands not yet proposed.
    queued: Queue<T, TaggedCommand>,
    pub(super) proposals: Proposals<T>,
    pub(super) reads: Reads<(T, Query)>,
    unpersisted: VecDeque<Unpersisted>,
    writes: u64,
    /// The term that is on disk.
    durable_term: Term,
    /// Committed before the start: until it is applied the replica takes no part in elections, nor
    /// serves, since it may not know its own configuration.
    recover_to: Index,
    /// The last committed entry that raft has handed out.
    pub(super) handed: Index,
    /// The entry that is being applied; after a panic or an error, the one at fault.
    pub(super) applying: Option<Index>,
    pub(super) apply_paused: bool,
    fetching: Option<GetEntriesContext>,
    ticks: u64,
    /// What entries with commands of sessions are stamped with.
    clock: SessionClock,
    stepped_down: Option<u64>,
    leader: LeaderChange,
    /// The election timeout in ticks, and the term it holds in.
    timeout: (Term, usize),
    ambition: Ambition,
    /// As told by the leader.
    safe_index: Index,
    catch_up: CatchUp,
    pub(super) messages: Vec<Message>,
    pub(super) done: Vec<(T, Result<Output, Refusal>)>,
}

impl<T> Group<T> {
    /// Rebuilds a replica from its log and state. Nothing in memory survives a crash; whatever was
    /// promised is on disk.
    pub fn open(
        options: GroupOptions,
        store: Arc<dyn LogStore>,
        mut log: LogState,
        state: ReplicaState,
    ) -> Result<Group<T>, GroupError> {
        let applied = state.header().applied;
        if log.last < applied.index {
            return Err(damaged(
                options.replica,
                format!("the log ends at {}, the state is applied up to {}", log.last, applied.index),
            ));
        }
        if applied.index < log.truncated.index {
            return Err(damaged(
                options.replica,
                format!(
                    "the state is applied up to {}, the log begins after {}",
                    applied.index, log.truncated.index
                ),
            ));
        }
        if log.hard_state.commit > log.last {
            return Err(damaged(
                options.replica,
                format!("entry {} is committed, the log ends at {}", log.hard_state.commit, log.last),
            ));
        }
        // The commit index is stored with the next write, not for its own sake: the state may be ahead.
        log.hard_state.commit = log.hard_state.commit.max(applied.index);
        let recover_to = log.hard_state.commit;
        let durable_term = log.hard_state.term;
        let config = Config {
            id: options.replica.0,
            election_tick: limits::ELECTION_TICKS_MIN,
            heartbeat_tick: limits::HEARTBEAT_TICKS,
            min_election_tick: limits::ELECTION_TICKS_MIN,
            max_election_tick: limits::ELECTION_TICKS_MAX + election::LAST_TICKS,
            applied: applied.index,
            max_size_per_msg: limits::APPEND_TARGET_BYTES as u64,
            max_inflight_msgs: limits::APPENDS_IN_FLIGHT_MAX,
            check_quorum: true,
            pre_vote: true,
            batch_append: true,
            max_uncommitted_size: limits::UNCOMMITTED_BYTES_MAX as u64,
            max_committed_size_per_ready: limits::APPLY_PASS_BYTES,
            ..Config::default()
        };
        let conf_state = state.header().conf_state.clone();
        let marks = options.retention.mark_bytes();
        let log = GroupLog::new(options.replica, store, log, conf_state, marks, options.cached);
        let raft = RawNode::new(&config, log, &options.logger)?;
        let mut group = Group {
            shard: options.shard,
            machine: options.machine,
            replica: options.replica,
            incarnation: options.incarnation,
            leader: LeaderChange { term: raft.raft.term, leader: None, local: false },
            raft,
            state,
            queued: Queue::new(),
            proposals: Proposals::new(),
            reads: Reads::new(options.incarnation),
            unpersisted: VecDeque::new(),
            writes: 0,
            durable_term,
            recover_to,
            handed: applied.index,
            applying: None,
            apply_paused: false,
            fetching: None,
            ticks: 0,
            clock: SessionClock::default(),
            stepped_down: None,
            timeout: (Term::MAX, 0),
            ambition: Ambition::Usual,
            safe_index: 0,
            catch_up: CatchUp::new(options.retention),
            messages: Vec::new(),
            done: Vec::new(),
        };
        group.draw_timeout();
        Ok(group)
    }

    // ----------------------------------------------------------------------------------- inputs

    /// Time: one tick has passed.
    pub fn tick(&mut self) {
        self.ticks += 1;
        // A group at rest gives way to others.
        let applied = self.applied();
        self.raft.mut_store().trim_cache(applied);
        if self.recovering() || (self.stays_behind() && !self.leads()) {
            self.end_undecided();
            return;
        }
        self.raft.tick();
        self.draw_timeout();
        if self.leads() {
            self.clock.tick(self.raft.raft.term, self.state.header().log_time);
        }
        self.observe_followers();
        self.end_undecided();
    }

    /// Gives up proposals of a lost leadership that the log hasn't decided in time. At once where the
    /// log can't be written: it decides nothing then, and the next leader can be asked.
    fn end_undecided(&mut self) {
        let patience = if self.ambition == Ambition::None { 0 } else { UNDECIDED_TICKS_MAX };
        if self.stepped_down.is_some_and(|at| self.ticks - at > patience) {
            self.stepped_down = None;
            // Elected again, it decides what is older itself, with its first entry; what it has
            // proposed since is none of those.
            let below = if self.leads() { self.raft.raft.term } else { Term::MAX };
            self.done.extend(self.proposals.drain_below(below).into_iter().map(|caller| {
                (caller, Err(Refusal::Unknown("leadership was lost before the entry was committed".into())))
            }));
        }
    }

    /// A message from another replica of the group. One that isn't for this replica, or that would
    /// contradict what is committed here, is dropped.
    pub fn step(&mut self, message: GroupMessage) -> Result<(), GroupError> {
        let safe_index = message.safe_index;
        let message = message.message;
        if message.to != self.replica.0 || self.recovering() {
            return Ok(());
        }
        if message.get_msg_type() == MessageType::MsgTimeoutNow && self.stays_behind() {
            return Ok(());
        }
        if let Err(reason) = self.check(&message) {
            tracing::error!(shard = %self.shard, replica = %self.replica, from = message.from, kind = ?message.get_msg_type(), reason, "dropped a message of a peer");
            return Ok(());
        }
        if matches!(message.get_msg_type(), MessageType::MsgAppend | MessageType::MsgHeartbeat)
            && message.term >= self.raft.raft.term
        {
            self.safe_index = self.safe_index.max(safe_index);
        }
        let from = message.from;
        match self.raft.step(message) {
            // From a replica that isn't a member (any more), or with nothing to do about it.
            Ok(())
            | Err(raft::Error::StepPeerNotFound | raft::Error::StepLocalMsg | raft::Error::ProposalDropped) =>
                {}
            Err(error) => return Err(error.into()),
        }
        self.mend_progress(from);
        self.draw_timeout();
        Ok(())
    }

    /// Asks for an operation. Its end comes with `token` in the effects of this or a later pump.
    pub fn submit(&mut self, operation: Operation, token: T) {
        if let Some(refusal) = self.refusal() {
            self.done.push((token, Err(refusal)));
            return;
        }
        match operation {
            Operation::Command { command, session } => {
                let command = (command, session);
                let bytes = tagged_size(&command);
                self.queued.push(token, command, bytes);
            }
            Operation::Query(query) => self.reads.push((token, query)),
        }
    }

    /// Why nothing can be submitted now.
    fn refusal(&self) -> Option<Refusal> {
        if self.recovering() {
            Some(Refusal::Unavailable("the replica is re-applying its log after a start".into()))
        } else if !self.leads() {
            Some(self.not_leader())
        } else if self.queued.len() + self.proposals.len() + self.reads.len() >= limits::REPLICA_PENDING_MAX {
            Some(busy("operations of the shard"))
        } else if self.queued.bytes() >= limits::UNCOMMITTED_BYTES_MAX {
            Some(busy("bytes of the shard's commands"))
        } else if self.apply_paused {
            Some(busy("writes of the node on their way to its state store"))
        } else {
            None
        }
    }

    /// Ends the operations that wait to be started and whose caller is `gone`: nobody would hear of
    /// them, and they would only keep those waiting who are still there.
    pub fn discard(&mut self, gone: impl Fn(&T) -> bool) {
        let mut dead = self.queued.discard(&gone);
        dead.extend(self.reads.discard(|(token, _)| gone(token)).into_iter().map(|(token, _)| token));
        self.done.extend(dead.into_iter().map(|token| (token, Err(Refusal::Deadline))));
    }

    /// The log writer has made the write of this number, and all before it, durable.
    pub fn on_persisted(&mut self, number: u64) {
        while self.unpersisted.front().is_some_and(|u| u.write <= number) {
            let Some(unpersisted) = self.unpersisted.pop_front() else {
                break;
            };
            // Entries that a write under way replaces must not be counted as durable: those that replace
            // them may bear the same terms again, and would be taken for them.
            let replaced = unpersisted.entries.is_some_and(|(_, last)| {
                let later = self.unpersisted.iter().filter_map(|u| u.entries);
                later.into_iter().any(|(first, _)| first <= last.index)
            });
            if !replaced {
                if let Some((_, last)) = unpersisted.entries {
                    self.raft.mut_store().set_persisted(last);
                }
                // Covers those of the readies before it that were passed over.
                self.raft.on_persist_ready(unpersisted.ready);
            }
            self.durable_term = unpersisted.term;
            self.messages.extend(unpersisted.messages);
        }
    }

    /// The entries that a [`Fetch`] asked for.
    pub fn on_fetched(&mut self, entries: Vec<Entry>) {
        if let Some(context) = self.fetching.take() {
            self.raft.mut_store().set_fetched(entries);
            self.raft.on_entries_fetched(context);
            // Raft has copied what it wanted; another follower's range is asked for anew.
            self.raft.mut_store().set_fetched(Vec::new());
        }
    }

    /// Messages to this replica can't be delivered at present.
    pub fn on_unreachable(&mut self, replica: ReplicaId) {
        self.raft.report_unreachable(replica.0);
    }

    /// Begins an election now, rather than after a timeout; for a new group's first leader.
    pub fn campaign(&mut self) -> Result<(), GroupError> {
        if !self.recovering() && !self.stays_behind() {
            self.raft.campaign()?;
        }
        Ok(())
    }

    /// Begins to move leadership to `to`. It succeeds, or lapses after an election timeout. Only a leader
    /// can: a follower would send the request on, and none is taken from others.
    pub fn transfer(&mut self, to: ReplicaId) {
        if self.leads() {
            self.raft.transfer_leader(to.0);
        }
    }

    /// How far this replica is to seek leadership from now on.
    pub fn set_ambition(&mut self, ambition: Ambition) {
        self.ambition = ambition;
        self.draw_timeout();
    }

    /// Stops or resumes applying, because of memory. Committed entries stay in the log meanwhile.
    pub fn pause_apply(&mut self, paused: bool) {
        self.apply_paused = paused;
    }

    /// Ends everything that waits: the replica is going away.
    pub fn abandon(&mut self, reason: &'static str) -> Vec<(T, Result<Output, Refusal>)> {
        let mut done = std::mem::take(&mut self.done);
        done.extend(
            self.queued.drain().into_iter().map(|token| (token, Err(Refusal::Unavailable(reason.into())))),
        );
        done.extend(
            self.reads
                .drain()
                .into_iter()
                .map(|(token, _)| (token, Err(Refusal::Unavailable(reason.into())))),
        );
        done.extend(self.proposals.drain().map(|token| (token, Err(Refusal::Unknown(reason.into())))));
        done
    }

    // ------------------------------------------------------------------------------------- pump

    /// Whether a pump would find nothing to do; so it is after most ticks of a group at rest.
    pub fn at_rest(&self) -> bool {
        self.queued.is_empty()
            && self.done.is_empty()
            && self.messages.is_empty()
            && self.reads.is_empty()
            && (self.apply_paused || self.handed == self.applied())
            && !self.raft.has_ready()
    }

    /// Does what the inputs since the last call ask for, within bounds.
    pub fn pump(&mut self) -> Result<Effects<T>, GroupError> {
        self.propose_queued();
        self.start_read_round();
        let mut effects = Effects {
            messages: Vec::new(),
            write: None,
            done: Vec::new(),
            reads: Vec::new(),
            fetch: None,
            snapshot: None,
            leader: None,
            more: false,
        };
        let mut committed = Vec::new();
        if self.raft.has_ready() {
            (effects.write, committed) = self.take_ready();
        }
        self.apply(committed)?;
        if let Some(error) = self.raft.mut_store().take_failure() {
            return Err(error.into());
        }
        self.follow_leadership(&mut effects);
        self.serve_reads(&mut effects)?;
        // Reads that arrived during a round which has just ended, or before this leader's first entry
        // was committed: there may be no other input that would start their round.
        self.start_read_round();
        effects.fetch = self.start_fetch();
        effects.snapshot = self.want_snapshot();
        self.route_messages(&mut effects);
        effects.done = std::mem::take(&mut self.done);
        effects.more = self.raft.has_ready() || (!self.apply_paused && self.handed > self.applied());
        Ok(effects)
    }

    /// Makes entries of the queued commands. While the log writer is busy they wait a little, so
    /// that many share an entry; a lone command goes at once.
    fn propose_queued(&mut self) {
        while !self.queued.is_empty() && self.unpersisted.len() < limits::WRITES_IN_FLIGHT_MAX {
            if !self.leads() {
                break; // Answered by `follow_leadership`.
            }
            let (mut bytes, mut reads) = (0, 0);
            let mut tokens = Vec::new();
            let mut commands = Vec::new();
            while let Some(((command, _), size)) = self.queued.next() {
                reads += usize::from(command.reads());
                let full = bytes + size > limits::ENTRY_TARGET_BYTES
                    || commands.len() >= limits::ENTRY_COMMANDS_MAX
                    || reads > limits::ENTRY_READS_MAX;
                if full && !commands.is_empty() {
                    break;
                }
                bytes += size;
                if let Some((token, command)) = self.queued.pop() {
                    tokens.push(token);
                    commands.push(command);
                }
            }
            let stamp = self.clock.stamp(self.raft.raft.term, self.state.header().log_time);
            let data = encode_entry(&commands, stamp);
            match self.raft.propose(Vec::new(), data) {
                Ok(()) => {
                    metrics::counter!(names::PROPOSALS).increment(tokens.len() as u64);
                    let position =
                        Position { index: self.raft.raft.raft_log.last_index(), term: self.raft.raft.term };
                    self.proposals.insert(position, tokens);
                }
                // Dropped before it entered the log: leadership is moving, or too much is uncommitted.
                Err(_) => {
                    let refuse = |token| (token, Err(busy("uncommitted entries of the shard")));
                    self.done.extend(tokens.into_iter().map(refuse));
                    self.done.extend(self.queued.drain().into_iter().map(refuse));
                }
            }
        }
    }

    fn start_read_round(&mut self) {
        // raft-rs drops a read index silently before the leader has committed in its own term.
        if self.leads()
            && self.raft.raft.commit_to_current_term()
            && let Some(context) = self.reads.start_round()
        {
            self.raft.read_index(context);
        }
    }

    /// Handles one ready, in this order:
    /// 1. A leader's messages leave at once: its own disk write runs beside the followers' (Raft
    ///    thesis §10.2.1). Everyone else's wait for the write, since they promise what is in it;
    ///    those that don't ([`promises_no_write`]) leave at once too.
    /// 2. Entries enter the cache *before* `advance_append_async`, after which raft reads them there.
    /// 3. Entries and hard state go to the writer as one write: a vote on disk without its term, or
    ///    the reverse, would be a double vote.
    /// 4. Committed entries are applied after that; raft hands out only those that are durable here.
    fn take_ready(&mut self) -> (Option<NumberedWrite>, Vec<Entry>) {
        let mut ready = self.raft.ready();
        self.messages.append(&mut ready.take_messages());
        for read_state in ready.take_read_states() {
            self.reads.confirm(&read_state.request_ctx, read_state.index);
        }
        let committed = ready.take_committed_entries();
        let entries = ready.take_entries();
        let ends = entries.first().zip(entries.last());
        let ends = ends.map(|(first, last)| (first.index, Position { index: last.index, term: last.term }));
        self.raft.mut_store().append(&entries);
        let number = ready.number();
        let mut messages = ready.take_persisted_messages();
        let durable_term = self.durable_term;
        self.messages.extend(messages.extract_if(.., |m| promises_no_write(m, durable_term)));
        // A ready that only moves the commit index needs no write: it is taken along by the next, and
        // after a crash the quorum tells.
        let must_sync = ready.must_sync();
        failpoint!(HardState, self.replica, if must_sync && ends.is_none());
        self.raft.advance_append_async(ready);
        self.conclude_snapshots();
        if must_sync {
            self.writes += 1;
            let (write, hard_state) = (self.writes, self.raft.raft.hard_state());
            self.unpersisted.push_back(Unpersisted {
                ready: number,
                write,
                entries: ends,
                term: hard_state.term,
                messages,
            });
            let write = LogWrite { replica: self.replica, entries, hard_state: Some(hard_state) };
            return (Some(NumberedWrite { number: self.writes, write }), committed);
        }
        match self.unpersisted.back_mut() {
            // It waits for the last write before it, and doesn't count as one more under way.
            Some(before) => {
                before.ready = number;
                before.messages.append(&mut messages);
            }
            None => {
                self.raft.on_persist_ready(number);
                self.messages.append(&mut messages);
            }
        }
        (None, committed)
    }

    /// Notices who leads, and sends away whom it can't serve any more.
    fn follow_leadership(&mut self, effects: &mut Effects<T>) {
        let raft = &self.raft.raft;
        let now = LeaderChange {
            term: raft.term,
            leader: (raft.leader_id != 0).then_some(ReplicaId(raft.leader_id)),
            local: raft.state == StateRole::Leader,
        };
        if now != self.leader {
            if self.leader.local && !now.local {
                // While older proposals wait, theirs is the time that counts.
                if self.stepped_down.is_none() || !self.proposals.any_below(self.leader.term) {
                    self.stepped_down = Some(self.ticks);
                }
            }
            self.leader = now;
            self.catch_up.reset();
            effects.leader = Some(now);
        }
        let waiting = !self.queued.is_empty() || !self.reads.is_empty();
        if !now.local && waiting {
            let refusal = self.not_leader();
            let queued = self.queued.drain();
            let reads = self.reads.drain().into_iter().map(|(token, _)| token);
            self.done.extend(queued.into_iter().chain(reads).map(|token| (token, Err(refusal.clone()))));
        }
    }

    fn start_fetch(&mut self) -> Option<Fetch> {
        if self.fetching.is_some() {
            return None;
        }
        let (fetch, context) = self.raft.mut_store().take_wanted()?;
        self.fetching = Some(context);
        Some(fetch)
    }

    // ------------------------------------------------------------------------- flush and compaction

    /// Freezes recent writes for a flush; `None` if there are none.
    pub fn freeze(&mut self) -> Option<Arc<Frozen>> {
        self.state.freeze()
    }

    /// The engine has all that was frozen up to `index`: its memory is free.
    pub fn release(&mut self, index: Index) {
        self.state.release(index);
    }

    /// Forgets log entries that are in the durable state up to `flushed` and that no follower will be
    /// sent any more ([`super::catch_up`]). Returns the position up to which the shell must drop them from
    /// the store.
    pub fn compact(&mut self, flushed: Position) -> Option<Position> {
        let index = flushed.index.min(self.compactable());
        let log = self.raft.mut_store();
        if index <= log.truncated().index {
            return None;
        }
        let to = Position { index, term: log.term_at(index)? };
        log.compact(to);
        Some(to)
    }

    /// The node's log is too large: for a while, less of it is kept for followers that lag.
    pub fn press_log(&mut self) {
        self.catch_up.press(self.ticks);
    }

    fn compactable(&self) -> Index {
        if !self.leads() && self.catch_up.is_pressed(self.ticks) {
            // Kept for the case that this replica leads next; a snapshot does as well.
            return self.applied();
        }
        self.safe_index()
    }

    /// Up to which index no replica of the group will be sent entries any more, as far as known.
    pub(super) fn safe_index(&self) -> Index {
        if self.leads() {
            let progress = self.raft.raft.prs().iter();
            let matched = progress.map(|(id, progress)| (ReplicaId(*id), progress.matched));
            self.catch_up
                .safe_index(matched, self.raft.store(), self.ticks)
                .min(self.raft.raft.raft_log.committed)
        } else {
            self.safe_index
        }
    }

    fn observe_followers(&mut self) {
        if !self.leads() {
            return;
        }
        for (id, progress) in self.raft.raft.prs().iter() {
            let id = ReplicaId(*id);
            self.catch_up.observe(id, progress.recent_active || id == self.replica, self.ticks);
            if progress.state == ProgressState::Replicate {
                self.catch_up.replicates(id, progress.matched);
            }
        }
        self.raft.mut_store().set_snapshots(self.catch_up.offered());
    }

    fn want_snapshot(&mut self) -> Option<SnapshotWanted> {
        let asked = self.raft.mut_store().take_snapshots_wanted();
        if !self.leads() {
            return None;
        }
        // One at a time; raft asks again for the others.
        asked.into_iter().find_map(|to| {
            let node = self.node_of(to)?;
            // Asked for in passing, before `mend_progress`.
            let matched = self.raft.raft.prs().get(to.0)?.matched;
            if matched >= self.raft.store().truncated().index {
                return None;
            }
            let wanted = self.catch_up.wanted(to, self.raft.store(), self.ticks);
            wanted.then_some(SnapshotWanted { to, node, term: self.raft.raft.term })
        })
    }

    /// raft has taken note of snapshots that are installed: it may go on behind them. Its own messages
    /// about them don't leave ([`Group::route_messages`]).
    fn conclude_snapshots(&mut self) {
        let noted: Vec<u64> = (self.messages.iter())
            .filter(|message| message.get_msg_type() == MessageType::MsgSnapshot)
            .map(|message| message.to)
            .collect();
        if noted.is_empty() {
            return;
        }
        for to in noted {
            self.raft.report_snapshot(to, SnapshotStatus::Finish);
            self.catch_up.noted(ReplicaId(to));
        }
        self.raft.mut_store().set_snapshots(self.catch_up.offered());
    }

    /// The snapshot for `to` is made, exact at `position`, and can be brought there. False: nobody
    /// wants it any more (leadership has moved, or the log has gone on too far), and it can be dropped.
    pub fn snapshot_made(&mut self, to: ReplicaId, position: Position) -> bool {
        self.leads() && self.catch_up.made(to, position, self.raft.store())
    }

    /// The follower has installed the snapshot, or has no need of it; or that has failed, or can't be
    /// told, and it is asked for anew if need be.
    pub fn snapshot_done(&mut self, to: ReplicaId, installed: bool) {
        self.catch_up.done(to, installed, self.raft.store(), self.ticks);
        self.raft.mut_store().set_snapshots(self.catch_up.offered());
    }

    // ------------------------------------------------------------------------------------ queries

    /// Whether this replica leads its group, as far as it knows.
    pub fn leads(&self) -> bool {
        self.raft.raft.state == StateRole::Leader
    }

    /// Still re-applying what was committed before the start.
    pub fn recovering(&self) -> bool {
        self.applied() < self.recover_to
    }

    /// So much is committed and not applied that this replica begins no election: as a leader it
    /// could serve nobody for long, and raft-rs would read all of that at once, looking for
    /// changes of membership in it.
    fn backlogged(&self) -> bool {
        self.raft.store().bytes_behind(self.applied()) > limits::CAMPAIGN_BACKLOG_BYTES_MAX
    }

    /// Whether it must not come to lead.
    fn stays_behind(&self) -> bool {
        self.ambition == Ambition::None || self.backlogged()
    }

    /// The shard's epoch, as applied here.
    pub fn epoch(&self) -> Epoch {
        self.state.header().epoch
    }

    /// The state, for reading.
    pub fn state(&self) -> &ReplicaState {
        &self.state
    }

    /// The machine of the shard.
    pub fn machine(&self) -> MachineKind {
        self.machine
    }

    /// Replicas other than this one that hold everything committed, best first: whom to hand
    /// leadership to.
    pub fn successors(&self) -> Vec<ReplicaId> {
        let mut others: Vec<_> = (self.raft.raft.prs().iter())
            .filter(|&(&id, progress)| id != self.replica.0 && progress.recent_active)
            .map(|(&id, progress)| (std::cmp::Reverse(progress.matched), id))
            .collect();
        others.sort_unstable();
        others.into_iter().map(|(_, id)| ReplicaId(id)).collect()
    }

    /// The node of a member.
    pub fn node_of(&self, replica: ReplicaId) -> Option<NodeId> {
        self.state.header().members.iter().find(|m| m.replica == replica).map(|m| m.node)
    }

    /// The replica on a node.
    pub fn replica_on(&self, node: NodeId) -> Option<ReplicaId> {
        self.state.header().members.iter().find(|m| m.node == node).map(|m| m.replica)
    }

    /// How the replica stands.
    pub fn status(&self) -> GroupStatus {
        let raft = &self.raft.raft;
        GroupStatus {
            role: raft.state,
            learner: raft.prs().conf().learners().contains(&self.replica.0),
            term: raft.term,
            leader: (raft.leader_id != 0).then_some(ReplicaId(raft.leader_id)),
            applied: self.applied(),
            committed: raft.raft_log.committed,
            last: raft.raft_log.last_index(),
            recovering: self.recovering(),
            incarnation: self.incarnation,
        }
    }

    /// The refusal that sends a caller to the leader.
    pub fn not_leader(&self) -> Refusal {
        let leader = ReplicaId(self.raft.raft.leader_id);
        let leader = (leader != self.replica).then(|| self.node_of(leader)).flatten();
        Refusal::NotLeader { shard: self.shard, leader }
    }

    pub(super) fn applied(&self) -> Index {
        self.state.header().applied.index
    }

    fn draw_timeout(&mut self) {
        // raft-rs draws at random whenever it resets, within a term too; ours is put back after every input.
        let term = self.raft.raft.term;
        if self.timeout.0 != term {
            let rank = election::rank(self.replica, self.state.header().members.iter().map(|m| m.replica));
            self.timeout = (term, election::timeout_ticks(self.shard, term, rank));
        }
        let last = if self.ambition == Ambition::Last { election::LAST_TICKS } else { 0 };
        if self.raft.raft.randomized_election_timeout() != self.timeout.1 + last {
            self.raft.raft.set_randomized_election_timeout(self.timeout.1 + last);
        }
    }
}

fn busy(what: &'static str) -> Refusal {
    Refusal::Busy { what: what.into(), retry_after_ms: limits::BUSY_RETRY_MS }
}

fn damaged(replica: ReplicaId, detail: String) -> GroupError {
    StorageError::Damaged { what: format!("replica {replica}"), detail }.into()
}

#[cfg(test)]
#[path = "driver_tests.rs"]
mod tests;
