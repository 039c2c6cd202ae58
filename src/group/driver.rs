//! [`Group`]: inputs in, effects out. One function, [`Group::pump`], owns the order in which a
//! raft-rs `Ready` is handled; the comments there say what would break otherwise.

use std::collections::VecDeque;

use raft::eraftpb::{Entry, Message, MessageType};
use raft::{GetEntriesContext, RawNode};

use super::beats::Beats;
use super::catch_up::CatchUp;
use super::clock::SessionClock;
use super::election::Ambition;
use super::log::GroupLog;
use super::membership::Barrier;
use super::messages::promises_no_write;
use super::per_member::PerMember;
use super::proposals::Proposals;
use super::queue::Queue;
use super::reads::Reads;
use super::sleep::Sleep;
use super::types::{
    Effects, Fetch, GroupStatus, LeaderChange, MembershipChange, NumberedWrite, Operation, Output,
};
use super::vacancy::{Vacancy, position};
use crate::codec::GroupMessage;
use crate::failpoints::failpoint;
use crate::ids::{Epoch, Incarnation, Index, NodeId, Position, ReplicaId, ShardId, Term};
use crate::limits;
use crate::machine::command::{Query, TaggedCommand, encode_entry};
use crate::machine::entry::tagged_size;
use crate::machine::{ApplyError, MachineKind};
use crate::refusal::Refusal;
use crate::storage::StorageError;
use crate::storage::log::LogWrite;
use crate::storage::state::ReplicaState;
use crate::telemetry::hot::hot;

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

/// A write that the log writer has not acknowledged, and what waits for it.
pub(super) struct Unpersisted {
    /// The ready it is of, or the last one without a write that came after it.
    pub(super) ready: u64,
    pub(super) write: u64,
    /// The first and the last entry of the write.
    pub(super) entries: Option<(Index, Position)>,
    /// The term in the write.
    pub(super) term: Term,
    /// What may leave after that: a vote or an acknowledgement promises what is on disk.
    pub(super) messages: Vec<Message>,
}

/// One replica of a shard. `T` is the caller's token for an operation: handed in by
/// [`Group::submit`], handed back once with the result.
pub struct Group<T> {
    pub(super) shard: ShardId,
    pub(super) machine: MachineKind,
    pub(super) replica: ReplicaId,
    pub(super) incarnation: Incarnation,
    pub(super) raft: RawNode<GroupLog>,
    pub(super) state: ReplicaState,
    /// Commands not yet proposed.
    pub(super) queued: Queue<T, TaggedCommand>,
    /// Changes of members not yet proposed, with the conf version that each was asked for.
    pub(super) changes: Vec<(T, u64, MembershipChange)>,
    /// Callers of marks not yet proposed.
    pub(super) marks: Vec<T>,
    /// The mark that was applied in this pump.
    pub(super) marked: Option<Index>,
    pub(super) proposals: Proposals<T>,
    pub(super) reads: Reads<(T, Query)>,
    pub(super) unpersisted: VecDeque<Unpersisted>,
    /// The last durable write with entries was replaced by one that is under way: raft wasn't told of it.
    pub(super) passed_over: bool,
    pub(super) writes: u64,
    /// The term that is on disk.
    pub(super) durable_term: Term,
    /// Committed before the start: until it is applied the replica takes no part in elections, nor
    /// serves, since it may not know its own configuration.
    pub(super) recover_to: Index,
    /// The last committed entry that raft has handed out.
    pub(super) handed: Index,
    /// Without a state: the last committed entry that was looked at for a change of members.
    pub(super) looked_to: Index,
    /// The last change of members that the replica's record names, durably.
    pub(super) recorded: Index,
    /// The last change of members that was passed over when it was re-applied, since the state had begun with later ones:
    /// what is flushed before that names members that its position doesn't have. No snapshot is made of it.
    pub(super) ahead_to: Index,
    /// The change behind `recorded`, while it waits for that.
    pub(super) barrier: Option<Box<Barrier>>,
    /// The conf versions that other members have in force, as they last said.
    pub(super) confs: PerMember<u64>,
    /// Where replicas are that have written and aren't members here.
    pub(super) strangers: PerMember<NodeId>,
    /// The entry that is being applied; after a panic or an error, the one at fault.
    pub(super) applying: Option<Index>,
    /// The tick at which applying was paused, while it is: see [`super::pause`].
    pub(super) paused_at: Option<u64>,
    /// See [`super::lost`].
    pub(super) state_lost: bool,
    pub(super) fetching: Option<GetEntriesContext>,
    pub(super) ticks: u64,
    /// What entries with commands of sessions are stamped with.
    pub(super) clock: SessionClock,
    pub(super) stepped_down: Option<u64>,
    pub(super) leader: LeaderChange,
    /// The election timeout in ticks, and the term it holds in.
    pub(super) timeout: (Term, usize),
    pub(super) ambition: Ambition,
    /// Of a leader that leaves the group: the tick at which it next tries to hand leadership over.
    pub(super) gives_way_at: u64,
    /// To whom leadership is being handed over, and since which tick.
    pub(super) handing_over: Option<(ReplicaId, u64)>,
    /// Who hasn't taken it.
    pub(super) lapsed: Option<ReplicaId>,
    /// As told by the leader.
    pub(super) safe_index: Index,
    pub(super) catch_up: CatchUp,
    pub(super) beats: Beats,
    pub(super) sleep: Sleep,
    pub(super) vacancy: Vacancy,
    pub(super) messages: Vec<Message>,
    pub(super) done: Vec<(T, Result<Output, Refusal>)>,
}

impl<T> Group<T> {
    // ----------------------------------------------------------------------------------- inputs

    /// Time: one tick has passed.
    pub fn tick(&mut self) {
        self.ticks += 1;
        // A group at rest gives way to others.
        let done = self.done_to();
        self.raft.mut_store().trim_cache(done);
        if self.recovering() {
            self.end_undecided();
            return;
        }
        if self.stays_behind() && !self.leads() {
            // No election of its own; but the time in which it gives nobody else its vote, for the sake of a
            // leader that it has heard, has to pass here as well.
            self.draw_timeout();
            if self.raft.raft.election_elapsed < limits::ELECTION_TICKS_MIN {
                self.raft.tick();
            }
            self.end_undecided();
            return;
        }
        self.raft.tick();
        self.draw_timeout();
        self.stand_again();
        if self.leads() {
            self.clock.tick(self.raft.raft.term, self.state.header().log_time);
        }
        self.observe_followers();
        self.watch_transfer();
        self.give_way();
        self.end_undecided();
        self.grow_drowsy();
    }

    /// Gives up proposals of a lost leadership that the log hasn't decided in time. At once where the
    /// log can't be written, or has long not been applied: it decides nothing then, and the next leader can be asked.
    fn end_undecided(&mut self) {
        let decides = self.ambition != Ambition::None && !self.is_held_up();
        let patience = if decides { UNDECIDED_TICKS_MAX } else { 0 };
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
        let (safe_index, node, epoch) = (message.safe_index, message.node, message.epoch);
        let whole = message;
        let message = &whole.message;
        if message.to != self.replica.0 || self.recovering() {
            return Ok(());
        }
        if message.get_msg_type() == MessageType::MsgTimeoutNow && !self.takes_leadership() {
            return Ok(());
        }
        if self.is_of_those_given_up(message.get_msg_type(), epoch) {
            tracing::debug!(shard = %self.shard, replica = %self.replica, from = message.from, kind = ?message.get_msg_type(), ?epoch, "dropped a message of a replica that was given up");
            return Ok(());
        }
        if let Err(reason) = self.check(message) {
            tracing::error!(shard = %self.shard, replica = %self.replica, from = message.from, kind = ?message.get_msg_type(), reason, "dropped a message of a peer");
            return Ok(());
        }
        if matches!(message.get_msg_type(), MessageType::MsgAppend | MessageType::MsgHeartbeat)
            && message.term >= self.raft.raft.term
        {
            self.safe_index = self.safe_index.max(safe_index);
        }
        self.hear_answer(message);
        let from = message.from;
        self.hear_conf(ReplicaId(from), epoch);
        self.remember_stranger(ReplicaId(from), node);
        self.before_step(&whole);
        self.keep_early(&whole.message);
        let GroupMessage { message, sleep, .. } = whole;
        let asked = (message.get_msg_type() == MessageType::MsgRequestPreVote).then(|| position(&message));
        let (kind, term, commit) = (message.get_msg_type(), message.term, message.commit);
        match self.raft.step(message) {
            // From a replica that isn't a member (any more), or with nothing to do about it.
            Ok(())
            | Err(raft::Error::StepPeerNotFound | raft::Error::StepLocalMsg | raft::Error::ProposalDropped) =>
                {}
            Err(error) => return Err(error.into()),
        }
        self.mend_progress(from);
        self.draw_timeout();
        if let Some(of) = asked {
            self.answer_with_more(of)?;
        }
        if let Some(word) = sleep {
            self.after_step(kind, from, term, commit, word);
        }
        Ok(())
    }

    /// Asks for an operation. Its end comes with `token` in the effects of this or a later pump.
    pub fn submit(&mut self, operation: Operation, token: T) {
        self.disturb();
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
            Operation::Change { conf, change } => self.changes.push((token, conf, change)),
            Operation::Mark => self.marks.push(token),
        }
    }

    /// Why nothing can be submitted now.
    fn refusal(&self) -> Option<Refusal> {
        if self.recovering() {
            Some(Refusal::Unavailable("the replica is re-applying its log after a start".into()))
        } else if let Some(refusal) = self.lost_refusal() {
            Some(refusal)
        } else if !self.leads() {
            Some(self.not_leader())
        } else if self.waiting() >= limits::REPLICA_PENDING_MAX {
            Some(busy("operations of the shard"))
        } else if self.queued.bytes() >= limits::UNCOMMITTED_BYTES_MAX {
            Some(busy("bytes of the shard's commands"))
        } else if self.paused_at.is_some() {
            Some(busy("writes of the node on their way to its state store"))
        } else {
            None
        }
    }

    /// How many operations have been submitted and haven't ended.
    pub(super) fn waiting(&self) -> usize {
        let unproposed = self.queued.len() + self.changes.len() + self.marks.len();
        unproposed + self.proposals.len() + self.reads.len()
    }

    /// Ends the operations that wait to be started and whose caller is `gone`: nobody would hear of
    /// them, and they would only keep those waiting who are still there.
    pub fn discard(&mut self, gone: impl Fn(&T) -> bool) {
        let mut dead = self.queued.discard(&gone);
        dead.extend(self.changes.extract_if(.., |(token, ..)| gone(token)).map(|(token, ..)| token));
        dead.extend(self.marks.extract_if(.., |token| gone(token)));
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
            // Nor may a write without entries tell raft that all readies up to its own are durable, as long as theirs
            // is among those.
            if let Some((_, last)) = unpersisted.entries {
                let mut later = self.unpersisted.iter().filter_map(|u| u.entries);
                self.passed_over = later.any(|(first, _)| first <= last.index);
            }
            if !self.passed_over {
                if let Some((_, last)) = unpersisted.entries {
                    self.raft.mut_store().set_persisted(last);
                }
                // Covers those of the readies before it that were passed over: raft goes by the last one's entries.
                self.raft.on_persist_ready(unpersisted.ready);
            }
            self.durable_term = unpersisted.term;
            self.messages.extend(unpersisted.messages);
        }
        self.pass_barrier(number);
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

    /// Ends everything that waits: the replica is going away.
    pub fn abandon(&mut self, reason: &'static str) -> Vec<(T, Result<Output, Refusal>)> {
        let mut done = std::mem::take(&mut self.done);
        done.extend(
            self.queued.drain().into_iter().map(|token| (token, Err(Refusal::Unavailable(reason.into())))),
        );
        let changes = self.changes.drain(..);
        done.extend(changes.map(|(token, ..)| (token, Err(Refusal::Unavailable(reason.into())))));
        let marks = self.marks.drain(..);
        done.extend(marks.map(|token| (token, Err(Refusal::Unavailable(reason.into())))));
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
            && self.changes.is_empty()
            && self.marks.is_empty()
            && self.done.is_empty()
            && self.messages.is_empty()
            && self.reads.is_empty()
            && (self.holds_apply() || self.handed == self.done_to())
            && !self.may_leave_joint()
            && !self.raft.has_ready()
    }

    /// Whether a pump is worth its while after a message or the end of a write. Most acknowledgements find a leader that has
    /// gone on already by those of others.
    pub fn has_work(&self) -> bool {
        !self.at_rest() || self.raft.store().asks() || self.catch_up.asks()
    }

    /// Does what the inputs since the last call ask for, within bounds.
    pub fn pump(&mut self) -> Result<Effects<T>, GroupError> {
        self.propose_queued();
        self.propose_changes();
        self.propose_mark();
        self.start_read_round();
        let mut effects = Effects {
            messages: Vec::new(),
            write: None,
            done: Vec::new(),
            reads: Vec::new(),
            fetch: None,
            snapshot: None,
            leader: None,
            marked: None,
            more: false,
        };
        let mut committed = Vec::new();
        if self.raft.has_ready() {
            hot().readies.increment(1);
            (effects.write, committed) = self.take_ready();
        }
        self.apply(committed)?;
        self.write_barrier(&mut effects);
        self.leave_joint();
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
        effects.marked = self.marked.take();
        effects.more = self.raft.has_ready() || (!self.holds_apply() && self.handed > self.done_to());
        Ok(effects)
    }

    /// Whether what is queued is to be proposed now. A lone command goes at once. While a write of this group is
    /// under way the others wait for its end, and then share an entry, its messages and its syncs: nothing could
    /// be applied here before that write is durable anyway. Where much waits, more writes are worth their cost.
    fn is_time_to_propose(&self) -> bool {
        let is_much = self.queued.len() >= limits::PROPOSE_COMMANDS_MIN
            || self.queued.bytes() >= limits::PROPOSE_BYTES_MIN;
        !self.queued.is_empty()
            && match self.unpersisted.len() {
                0 => true,
                under_way => is_much && under_way < limits::WRITES_IN_FLIGHT_MAX,
            }
    }

    /// Makes entries of the queued commands.
    fn propose_queued(&mut self) {
        if !self.is_time_to_propose() {
            return;
        }
        // All of them: those beyond a full entry belong to the next at once.
        while !self.queued.is_empty() {
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
                    hot().proposals.increment(tokens.len() as u64);
                    hot().entries_proposed.increment(1);
                    self.proposals.insert(self.last_proposed(), tokens);
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

    /// Where the entry stands that this leader has just proposed: nobody else appends to its log in its term.
    pub(super) fn last_proposed(&self) -> Position {
        Position { index: self.raft.raft.raft_log.last_index(), term: self.raft.raft.term }
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
            let write =
                LogWrite { replica: self.replica, entries, hard_state: Some(hard_state), membership: None };
            return (Some(NumberedWrite { number: self.writes, write }), committed);
        }
        match self.unpersisted.back_mut() {
            // It waits for the last write before it, and doesn't count as one more under way.
            Some(before) => {
                before.ready = number;
                before.messages.append(&mut messages);
            }
            None => {
                assert!(!self.passed_over, "what replaces a write is under way until it is durable");
                self.raft.on_persist_ready(number);
                self.messages.append(&mut messages);
            }
        }
        (None, committed)
    }

    fn start_fetch(&mut self) -> Option<Fetch> {
        if self.fetching.is_some() {
            return None;
        }
        let (fetch, context) = self.raft.mut_store().take_wanted()?;
        self.fetching = Some(context);
        Some(fetch)
    }

    // ------------------------------------------------------------------------------------ queries

    /// Still re-applying what was committed before the start; without a state, looking through that.
    pub fn recovering(&self) -> bool {
        self.done_to() < self.recover_to
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

    /// The node of a member.
    pub fn node_of(&self, replica: ReplicaId) -> Option<NodeId> {
        self.state.header().members.iter().find(|m| m.replica == replica).map(|m| m.node)
    }

    /// The replica on a node.
    pub fn replica_on(&self, node: NodeId) -> Option<ReplicaId> {
        self.state.header().members.iter().find(|m| m.node == node).map(|m| m.replica)
    }

    /// The entry that an operation is in whose token `which` is true of, until it is decided.
    pub fn proposed_at(&self, which: impl Fn(&T) -> bool) -> Option<Position> {
        self.proposals.position(which)
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
            truncated: raft.raft_log.store().truncated().index,
            last: raft.raft_log.last_index(),
            last_term: raft.raft_log.last_term(),
            recovering: self.recovering(),
            state_lost: self.wanted_index(),
            incarnation: self.incarnation,
            epoch: self.epoch(),
            members: self.state.header().members.clone(),
            followers: self.followers(),
        }
    }

    pub(super) fn applied(&self) -> Index {
        self.state.header().applied.index
    }
}

pub(super) fn busy(what: &'static str) -> Refusal {
    Refusal::Busy { what: what.into(), retry_after_ms: limits::BUSY_RETRY_MS }
}

#[cfg(test)]
#[path = "driver_tests.rs"]
mod tests;
