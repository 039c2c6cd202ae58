//! [`Group`]: inputs in, effects out. One function, [`Group::pump`], owns the order in which a
//! raft-rs `Ready` is handled; the comments there say what would break otherwise.

use std::collections::VecDeque;
use std::sync::Arc;

use raft::eraftpb::{Entry, EntryType, Message, MessageType};
use raft::{Config, GetEntriesContext, RawNode, StateRole};

use super::election;
use super::log::GroupLog;
use super::proposals::Proposals;
use super::queue::Queue;
use super::reads::Reads;
use super::types::{Effects, Fetch, GroupStatus, LeaderChange, NumberedWrite, Operation, Output};
use crate::codec::GroupMessage;
use crate::ids::{Epoch, Incarnation, Index, NodeId, Position, ReplicaId, ShardId, Term};
use crate::limits;
use crate::machine::command::{Command, FormatError, Query, decode_entry, encode_entry};
use crate::machine::{ApplyError, MachineKind};
use crate::refusal::Refusal;
use crate::storage::StorageError;
use crate::storage::log::{LogState, LogStore, LogWrite};
use crate::storage::state::{Frozen, Lookup, ReplicaState};
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
    /// Where raft-rs logs.
    pub logger: slog::Logger,
}

/// A ready that the log writer has not acknowledged.
struct Unpersisted {
    ready: u64,
    /// The write that must be durable; of a ready without one, that of the ready before it.
    write: u64,
    /// The last entry of the ready.
    last: Option<Position>,
    /// What may leave after that: a vote or an acknowledgement promises what is on disk.
    messages: Vec<Message>,
}

/// One replica of a shard. `T` is the caller's token for an operation: handed in by
/// [`Group::submit`], handed back once with the result.
pub struct Group<T> {
    shard: ShardId,
    machine: MachineKind,
    replica: ReplicaId,
    incarnation: Incarnation,
    raft: RawNode<GroupLog>,
    state: ReplicaState,
    /// Commands not yet proposed.
    queued: Queue<T, Command>,
    proposals: Proposals<T>,
    reads: Reads<(T, Query)>,
    unpersisted: VecDeque<Unpersisted>,
    writes: u64,
    /// Committed before the start: until it is applied the replica takes no part in elections, nor
    /// serves, since it may not know its own configuration.
    recover_to: Index,
    /// The last committed entry that raft has handed out.
    handed: Index,
    apply_paused: bool,
    fetching: Option<GetEntriesContext>,
    ticks: u64,
    stepped_down: Option<u64>,
    leader: LeaderChange,
    /// The election timeout in ticks, and the term it holds in.
    timeout: (Term, usize),
    /// As told by the leader.
    safe_index: Index,
    messages: Vec<Message>,
    done: Vec<(T, Result<Output, Refusal>)>,
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
        let config = Config {
            id: options.replica.0,
            election_tick: limits::ELECTION_TICKS_MIN,
            heartbeat_tick: limits::HEARTBEAT_TICKS,
            min_election_tick: limits::ELECTION_TICKS_MIN,
            max_election_tick: limits::ELECTION_TICKS_MAX,
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
        let log = GroupLog::new(options.replica, store, log, state.header().conf_state.clone());
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
            recover_to,
            handed: applied.index,
            apply_paused: false,
            fetching: None,
            ticks: 0,
            stepped_down: None,
            timeout: (Term::MAX, 0),
            safe_index: 0,
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
        if self.recovering() {
            return;
        }
        self.raft.tick();
        self.draw_timeout();
        if self.stepped_down.is_some_and(|at| self.ticks - at > UNDECIDED_TICKS_MAX) {
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
        if let Err(reason) = self.check(&message) {
            tracing::error!(shard = %self.shard, replica = %self.replica, from = message.from, kind = ?message.get_msg_type(), reason, "dropped a message of a peer");
            return Ok(());
        }
        if matches!(message.get_msg_type(), MessageType::MsgAppend | MessageType::MsgHeartbeat)
            && message.term >= self.raft.raft.term
        {
            self.safe_index = self.safe_index.max(safe_index);
        }
        match self.raft.step(message) {
            // From a replica that isn't a member (any more), or with nothing to do about it.
            Ok(())
            | Err(raft::Error::StepPeerNotFound | raft::Error::StepLocalMsg | raft::Error::ProposalDropped) =>
                {}
            Err(error) => return Err(error.into()),
        }
        self.draw_timeout();
        Ok(())
    }

    /// What raft-rs would panic on, were it true.
    fn check(&self, message: &Message) -> Result<(), &'static str> {
        let log = &self.raft.raft.raft_log;
        match message.get_msg_type() {
            // A leader of the past may well be of another opinion. Raft tells it of the present term.
            MessageType::MsgHeartbeat | MessageType::MsgAppend if message.term < self.raft.raft.term => {
                Ok(())
            }
            MessageType::MsgHeartbeat if message.commit > log.last_index() => {
                Err("a leader counts on entries that this log has lost")
            }
            MessageType::MsgAppend => {
                let committed = message.entries.iter().take_while(|e| e.index <= log.committed);
                for entry in committed {
                    // Raft's own view: the store may still hold what an unstable entry has replaced.
                    // Compacted entries (term 0 or an error) can't be compared; raft-rs answers those.
                    if log.term(entry.index).is_ok_and(|term| term != 0 && term != entry.term) {
                        return Err("a leader's entries contradict what is committed here");
                    }
                }
                Ok(())
            }
            MessageType::MsgSnapshot => Err("snapshots are not taken"),
            MessageType::MsgReadIndex | MessageType::MsgReadIndexResp | MessageType::MsgPropose => {
                Err("requests are not forwarded between replicas")
            }
            _ => Ok(()),
        }
    }

    /// Asks for an operation. Its end comes with `token` in the effects of this or a later pump.
    pub fn submit(&mut self, operation: Operation, token: T) {
        if let Some(refusal) = self.refusal() {
            self.done.push((token, Err(refusal)));
            return;
        }
        match operation {
            Operation::Command(command) => {
                let bytes = command.size();
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
            if let Some(last) = unpersisted.last {
                self.raft.mut_store().set_persisted(last);
            }
            self.raft.on_persist_ready(unpersisted.ready);
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
        if !self.recovering() {
            self.raft.campaign()?;
        }
        Ok(())
    }

    /// Begins to move leadership to `to`. It succeeds, or lapses after an election timeout.
    pub fn transfer(&mut self, to: ReplicaId) {
        self.raft.transfer_leader(to.0);
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
            let mut bytes = 0;
            let mut tokens = Vec::new();
            let mut commands = Vec::new();
            while let Some(size) = self.queued.next_bytes() {
                let full =
                    bytes + size > limits::ENTRY_TARGET_BYTES || commands.len() >= limits::ENTRY_COMMANDS_MAX;
                if full && !commands.is_empty() {
                    break;
                }
                bytes += size;
                if let Some((token, command)) = self.queued.pop() {
                    tokens.push(token);
                    commands.push(command);
                }
            }
            let data = encode_entry(&commands);
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
    ///    thesis §10.2.1). Everyone else's wait for the write, since they promise what is in it.
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
        let last = entries.last().map(|e| Position { index: e.index, term: e.term });
        self.raft.mut_store().append(&entries);
        let number = ready.number();
        let messages = ready.take_persisted_messages();
        // A ready that only moves the commit index needs no write: it is taken along by the next, and
        // after a crash the quorum tells.
        let write = ready.must_sync().then(|| {
            self.writes += 1;
            let hard_state = self.raft.raft.hard_state();
            NumberedWrite {
                number: self.writes,
                write: LogWrite { replica: self.replica, entries, hard_state: Some(hard_state) },
            }
        });
        self.raft.advance_append_async(ready);
        if write.is_some() || !self.unpersisted.is_empty() {
            self.unpersisted.push_back(Unpersisted { ready: number, write: self.writes, last, messages });
        } else {
            self.raft.on_persist_ready(number);
            self.messages.extend(messages);
        }
        (write, committed)
    }

    /// Applies committed entries: those just handed out if nothing waits, else from the log.
    fn apply(&mut self, committed: Vec<Entry>) -> Result<(), GroupError> {
        let caught_up = self.handed == self.applied();
        if let Some(last) = committed.last() {
            assert!(committed[0].index == self.handed + 1, "raft hands out committed entries in order");
            self.handed = last.index;
        }
        if self.apply_paused {
            return Ok(());
        }
        let entries = if caught_up {
            committed
        } else {
            let (low, high) = (self.applied() + 1, self.handed + 1);
            self.raft.store().read(low, high, limits::APPLY_PASS_BYTES as usize)?
        };
        let Some(last) = entries.last().map(|e| e.index) else {
            return Ok(());
        };
        let count = entries.len() as u64;
        for entry in entries {
            self.apply_entry(entry)?;
        }
        self.raft.advance_apply_to(last);
        self.raft.mut_store().trim_cache(last);
        metrics::counter!(names::APPLY_ENTRIES).increment(count);
        Ok(())
    }

    fn apply_entry(&mut self, entry: Entry) -> Result<(), GroupError> {
        let position = Position { index: entry.index, term: entry.term };
        if entry.get_entry_type() != EntryType::EntryNormal {
            // Never skipped: the group would go on under a configuration that others have left.
            return Err(ApplyError::Format(FormatError::Unknown {
                what: "entry type",
                value: entry.get_entry_type() as u64,
            })
            .into());
        }
        let mut replies = Vec::new();
        // An empty entry is a new leader's first.
        if !entry.data.is_empty() {
            let commands = decode_entry(&entry.data).map_err(ApplyError::Format)?;
            replies.reserve(commands.len());
            for command in &commands {
                replies.push(self.machine.apply(command, &mut self.state)?);
            }
        }
        self.state.set_applied(position);
        let decided = self.proposals.decide(position);
        if !decided.applied.is_empty() {
            assert_eq!(decided.applied.len(), replies.len(), "an entry has one reply per command");
            self.done.extend(
                decided.applied.into_iter().zip(replies).map(|(t, reply)| (t, Ok(Output::Reply(reply)))),
            );
        }
        self.done.extend(decided.superseded.into_iter().map(|t| (t, Err(Refusal::Superseded))));
        Ok(())
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

    /// Answers reads whose index is applied: at once if memory knows the key, else by the shell.
    fn serve_reads(&mut self, effects: &mut Effects<T>) -> Result<(), GroupError> {
        let ready = self.reads.ready(self.applied());
        if !ready.is_empty() {
            metrics::counter!(names::READS).increment(ready.len() as u64);
        }
        for (token, query) in ready {
            let in_memory = match &query {
                Query::Get { key } => self.state.lookup(key) != Lookup::AskEngine,
                Query::Scan { .. } => false,
            };
            if in_memory {
                let answer = self.machine.query(&query, &self.state)?;
                self.done.push((token, Ok(Output::Answer(answer))));
            } else {
                effects.reads.push((token, query));
            }
        }
        Ok(())
    }

    fn start_fetch(&mut self) -> Option<Fetch> {
        if self.fetching.is_some() {
            return None;
        }
        let (fetch, context) = self.raft.mut_store().take_wanted()?;
        self.fetching = Some(context);
        Some(fetch)
    }

    fn route_messages(&mut self, effects: &mut Effects<T>) {
        if self.messages.is_empty() {
            return;
        }
        let safe_index = self.safe_index();
        let epoch = self.epoch();
        let members = &self.state.header().members;
        let leads_term = self.leads().then_some(self.raft.raft.term);
        for mut message in self.messages.drain(..) {
            let to = ReplicaId(message.to);
            if !mend_append(&mut message, leads_term, self.raft.store()) {
                continue;
            }
            match members.iter().find(|m| m.replica == to) {
                Some(member) => {
                    let message = GroupMessage { shard: self.shard, epoch, safe_index, message };
                    effects.messages.push((member.node, message));
                }
                None => {
                    tracing::debug!(shard = %self.shard, to = %to, "no node for a raft message")
                }
            }
        }
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

    /// Forgets log entries that every replica has and that are in the durable state up to
    /// `flushed`. Returns the position up to which the shell must drop them from the store.
    pub fn compact(&mut self, flushed: Position) -> Option<Position> {
        let index = flushed.index.min(self.safe_index());
        let log = self.raft.mut_store();
        if index <= log.truncated().index {
            return None;
        }
        let to = Position { index, term: log.term_at(index)? };
        log.compact(to);
        Some(to)
    }

    /// The highest index that every replica of the group has on disk, as far as known.
    fn safe_index(&self) -> Index {
        if self.leads() {
            self.raft.raft.prs().iter().map(|(_, progress)| progress.matched).min().unwrap_or(0)
        } else {
            self.safe_index
        }
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

    fn applied(&self) -> Index {
        self.state.header().applied.index
    }

    fn draw_timeout(&mut self) {
        // raft-rs draws at random whenever it resets, within a term too; ours is put back after every input.
        let term = self.raft.raft.term;
        if self.timeout.0 != term {
            let rank = election::rank(self.replica, self.state.header().members.iter().map(|m| m.replica));
            self.timeout = (term, election::timeout_ticks(self.shard, term, rank));
        }
        if self.raft.raft.randomized_election_timeout() != self.timeout.1 {
            self.raft.raft.set_randomized_election_timeout(self.timeout.1);
        }
    }
}

/// Makes an append say which entry its entries follow; false if that can't be told any more.
///
/// raft-rs 0.7.0 batches entries into an append that waits for the same follower. If that one is
/// empty it doesn't look whether they follow on it, and after a rejection, or an acknowledgement
/// that came out of order, they don't: the follower would panic, or the message be refused on its way
/// and sent again only after a while.
///
/// Only the leader of the message's term still has the log that the entries are from.
fn mend_append(message: &mut Message, leads_term: Option<Term>, log: &GroupLog) -> bool {
    if message.get_msg_type() != MessageType::MsgAppend {
        return true;
    }
    let Some(before) = message.entries.first().map(|first| first.index - 1) else { return true };
    if before != message.index {
        let Some(term) = log.term_at(before).filter(|_| leads_term == Some(message.term)) else {
            return false;
        };
        message.index = before;
        message.log_term = term;
    }
    true
}

fn busy(what: &'static str) -> Refusal {
    Refusal::Busy { what: what.into(), retry_after_ms: limits::BUSY_RETRY_MS }
}

fn damaged(replica: ReplicaId, detail: String) -> GroupError {
    StorageError::Damaged { what: format!("replica {replica}"), detail }.into()
}
