//! How a group that has nothing to do goes to sleep, its leader too, and how it wakes.
//!
//! A replica that is asleep isn't ticked, and sends nothing. Thousands of groups then cost what their memory does.
//!
//! ```text
//!            idle for a while: asks, with        all who are there        ┌─ a request, a message of the group,
//!            each heartbeat                      have agreed              │  an order, an alarm about a node
//!   leader    Awake ──────────────► Drowsy ─────────────────► Asleep ─────┴──► Awake, sends heartbeats at once
//!                ◄── anything happens, or not all agree ──┘
//!   follower  Awake ── asked, and has nothing to do: agrees ──► Asleep ──────► Awake
//! ```
//!
//! *Who may sleep.* A group is idle if every member that is there has everything in its leader's log, committed and applied, and
//! has answered lately, if no change of members, transfer or snapshot is under way, and no operation waits. A follower agrees only
//! if the same holds of itself at the index that the leader names. So nobody who is asleep lacks anything, and a leader that is
//! asleep knows of every member that it is asleep, or was when it said so, or that its node isn't there.
//!
//! *Who isn't there.* A node that is down for a day must not keep thousands of groups awake. So a leader sleeps without the
//! members that have not answered for an election timeout, if a quorum is left with those that have agreed, and only as
//! long as it doesn't hear their nodes. It doesn't ask those who lack entries. Invariant of a leader that is asleep: *every other member has agreed and its node is heard, in
//! the process in which it has; or the leader sleeps without it, and its node isn't heard* ([`Group::is_watched_over`], looked at when
//! it falls asleep; each change of what it says is an alarm, which wakes it). Of somebody who isn't there nothing was promised, and it
//! is promised nothing: it may lack entries, which the leader's log keeps as for any silent follower.
//!
//! *What stands for heartbeats.* The heartbeats of nodes ([`super::nodes`]): a follower that is asleep has heard from its
//! leader as long as it hears the leader's node, in the process that the leader went to sleep in. Woken, it goes on as if the
//! last heartbeat of that node had been one of its leader: its election timeout, and the time for which it refuses others its
//! vote, count from there. If that process is gone there is nothing left of either.
//!
//! Whom an alarm or a request wakes calls its leader ([`Group::call_leader`]): if that is there after all it sends heartbeats to
//! all, and keeps its place.
//!
//! | alarm | of the leader's node | of another member's |
//! |---|---|---|
//! | silent | followers wake, about to begin an election, each in its own slot of the second that follows | the leader wakes, to see who answers, unless it sleeps without that member |
//! | gone | the same, each in its turn at once (the module `vacancy`) | the same |
//! | restarted | the same | the leader wakes, so that the replica there learns of it |
//! | returned | nobody sleeps who relied on it: they were woken when it fell silent | the leader wakes, so that the replica there learns of it |
//! | a replica has ended | followers wake; if it wasn't their leader, that answers their call | the leader wakes, to see who answers |
//!
//! *Why that is safe.* raft's safety doesn't depend on ticks: terms, votes and logs are what they were. What does depend on
//! time here is who believes to lead, and nothing follows from that alone: a read of a leader that was asleep waits for a
//! round of heartbeats like any other, whose answers tell whether it leads still, and its writes for their
//! acknowledgements. There are no leases of reads. When a leader wakes, nobody counts as having answered: if no majority does
//! within an election timeout it gives up, as always.
//!
//! *Why nothing sleeps for ever.* Of a group without a leader that serves, somebody wakes. If the node of the leader is gone or
//! has been started again, each follower has an alarm. If the leader alone has ended and is opened again, it comes back awake, and asks
//! for votes; a request for a vote wakes whoever gets it, and who takes the asker for its leader knows that it isn't any
//! more. If it isn't opened again its node tells that a replica has ended. And any request of a client wakes the
//! replica that it comes to, which counts from then on as an awake one does. Who is left awake when others fall asleep
//! wakes them within an election timeout, by asking for votes. A member without which its leader sleeps hears from that one when
//! its node is heard again, a learner too: the leader wakes, and doesn't sleep again before that member has agreed or its node is away
//! once more. Where the node of the leader ends meanwhile, its followers wake as ever; if they are too few for a quorum they are
//! awake, and ask for votes, when the missing one returns.
//!
//! *Messages that come late.* A follower sleeps only under the process that its leader's node runs at present, as far as is
//! known here ([`Group::is_watched_over`], which the shell asks): a word that a dead process has left in the network doesn't count. Any
//! other message of the group wakes. The word names the attempt, so an agreement to an earlier one isn't taken for one to
//! this.
//!
//! *Sessions.* The time of a shard's sessions goes on while its leader sleeps: the shell tells for how many ticks it did, and
//! those it has lived, like any ([`super::clock`]).

use std::collections::BTreeSet;

use raft::eraftpb::{Message, MessageType};
use raft::{ProgressState, StateRole};

use super::beats::Beats;
use super::driver::{Group, GroupError};
use super::election::Ambition;
use super::membership::is_joint;
use super::nodes::{Alarm, Nodes, SILENT_TICKS};
use crate::codec::{GroupMessage, SleepWord};
use crate::ids::{Index, NodeId, ReplicaId};
use crate::limits;
use crate::placement::map::{Member, MemberRole, is_quorum};

/// Whether a replica is awake, as far as its own part goes: plain state, decided by what it is told.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Rest {
    /// It is ticked. Of a leader: the ticks since anything happened.
    Awake { idle: u64 },
    /// A leader asks the others.
    Drowsy { at: Index, ticks: usize, agreed: BTreeSet<ReplicaId> },
    /// It isn't ticked. Of a follower: what it has agreed to. Of a leader: the members without which it sleeps.
    Asleep { word: Option<SleepWord>, without: Vec<ReplicaId> },
}

/// See the module page.
#[derive(Debug)]
pub(super) struct Sleep {
    /// Ticks of idleness after which a leader asks; 0: this replica never sleeps.
    after: u64,
    process: u64,
    round: u64,
    rest: Rest,
    /// The shell needs its ticks.
    kept_awake: bool,
}

impl Sleep {
    /// Of a replica that never sleeps.
    pub(super) fn never() -> Sleep {
        Sleep { after: 0, process: 0, round: 0, rest: Rest::Awake { idle: 0 }, kept_awake: false }
    }

    fn may(&self) -> bool {
        self.after > 0 && !self.kept_awake
    }

    fn is_asleep(&self) -> bool {
        matches!(self.rest, Rest::Asleep { .. })
    }

    /// Something has happened: the time without begins anew.
    fn disturb(&mut self) {
        self.rest = Rest::Awake { idle: 0 };
    }

    /// A tick of a leader whose log ends at `last`. `idle`: nothing is left to do for anybody.
    fn tick(&mut self, idle: bool, last: Index) {
        match &mut self.rest {
            Rest::Awake { idle: ticks } if idle => {
                *ticks += 1;
                if *ticks >= self.after {
                    self.round += 1;
                    self.rest = Rest::Drowsy { at: last, ticks: 0, agreed: BTreeSet::new() };
                }
            }
            // Somebody doesn't agree, or its answers are lost: those who have are woken by the next heartbeat.
            Rest::Drowsy { at, ticks, .. } if idle && *at == last && *ticks < limits::ELECTION_TICKS_MIN => {
                *ticks += 1;
            }
            Rest::Awake { .. } | Rest::Drowsy { .. } => self.disturb(),
            Rest::Asleep { .. } => {}
        }
    }

    /// What a leader whose log ends at `last` asks with its heartbeats, if it does.
    fn asks(&self, last: Index) -> Option<SleepWord> {
        match self.rest {
            Rest::Drowsy { at, .. } if at == last => {
                Some(SleepWord { process: self.process, round: self.round })
            }
            _ => None,
        }
    }

    /// A member has agreed, to this.
    fn agrees(&mut self, from: ReplicaId, word: SleepWord) {
        let current = word.process == self.process && word.round == self.round;
        if let Rest::Drowsy { agreed, .. } = &mut self.rest
            && current
        {
            agreed.insert(from);
        }
    }

    /// Whether it is asleep without this member.
    fn is_without(&self, replica: ReplicaId) -> bool {
        matches!(&self.rest, Rest::Asleep { without, .. } if without.contains(&replica))
    }

    /// Whether all of these have agreed; a leader alone has nobody to ask.
    fn all_agree(&self, mut others: impl Iterator<Item = ReplicaId>) -> bool {
        match &self.rest {
            Rest::Drowsy { agreed, .. } => others.all(|other| agreed.contains(&other)),
            _ => false,
        }
    }
}

impl<T> Group<T> {
    /// From now on the replica goes to sleep when its group has been idle for so many ticks, and agrees to it; 0: it
    /// doesn't. `process`: the number by which other nodes know the process that it runs in.
    pub fn sleep_after(&mut self, ticks: u64, process: u64) {
        self.sleep.after = ticks;
        self.sleep.process = process;
    }

    /// Whether the replica is asleep: it needs no ticks, and must be woken ([`Group::wake`]) when a node that it watches
    /// ([`Group::heeds`]) isn't what it was.
    pub fn is_asleep(&self) -> bool {
        self.sleep.is_asleep()
    }

    /// Whether the shell needs the replica awake for something of its own.
    pub fn keep_awake(&mut self, keep: bool) {
        self.sleep.kept_awake = keep;
        if keep {
            self.disturb();
        }
    }

    /// The replica is to be awake. If it was asleep, `slept` is for how many ticks it was, and `silence` for how many its
    /// leader's node hasn't been heard; [`SILENT_TICKS`] if the process that its leader went to sleep in is gone.
    pub fn wake(&mut self, slept: u64, silence: u64) {
        if !self.is_asleep() {
            return;
        }
        self.sleep.disturb();
        if !self.leads() {
            // As if the node's last heartbeat had been the leader's.
            self.raft.raft.election_elapsed = silence.min(SILENT_TICKS) as usize;
            return;
        }
        self.clock.pass(self.raft.raft.term, slept);
        // What was heard before the sleep says nothing of who is there now: whoever is there is to hear of it at once.
        self.beats = Beats::default();
        self.raft.raft.election_elapsed = 0;
        let this = self.replica.0;
        for (id, progress) in self.raft.raft.mut_prs().iter_mut() {
            progress.recent_active = *id == this;
        }
        self.raft.raft.ping();
    }

    /// A follower that was woken by something else than its leader tells that one: alive, it sends heartbeats to all, and
    /// nobody has a reason to take over from it. What is told is what an answer to a heartbeat tells: that this replica is
    /// there, in this term.
    pub fn call_leader(&mut self) {
        let raft = &self.raft.raft;
        if raft.state != StateRole::Follower || raft.leader_id == raft::INVALID_ID || self.is_asleep() {
            return;
        }
        let mut message = Message {
            to: raft.leader_id,
            from: self.replica.0,
            term: raft.term,
            commit: raft.raft_log.committed,
            ..Message::default()
        };
        message.set_msg_type(MessageType::MsgHeartbeatResponse);
        // Who is asleep has no write under way, so the term is on disk.
        self.messages.push(message);
    }

    /// Whether a replica that is asleep has to wake for an alarm about a node; if so, what [`Group::wake`] is to be told of
    /// its leader's silence.
    pub fn heeds(&self, node: NodeId, alarm: Alarm, nodes: &Nodes) -> Option<u64> {
        let leads = self.leads();
        let leader = self.leader_node();
        if leads {
            // It has to see who answers. One that was opened anew has to learn of its leader; one that can't be opened mustn't be
            // taken for active. That somebody isn't there who wasn't is no news.
            let away = matches!(alarm, Alarm::Silent | Alarm::Gone);
            let concerns =
                |member: &Member| member.node == node && !(away && self.sleep.is_without(member.replica));
            return self.members().iter().any(concerns).then_some(0);
        }
        let silence = match alarm {
            Alarm::Silent | Alarm::Restarted | Alarm::Gone => SILENT_TICKS,
            Alarm::ReplicaEnded => nodes.silence(node),
            Alarm::Returned => return None,
        };
        (leader == Some(node)).then_some(silence)
    }

    /// There is an alarm about a node, and the replica is awake: what members have agreed to before it counts for nothing,
    /// since who agreed may be what has ended. If it was the leader, for certain, the next is elected at once
    /// (the module `vacancy`); returns whether that is so.
    ///
    /// # Errors
    /// Those of [`Group::campaign`].
    pub fn alarmed(&mut self, node: NodeId, alarm: Alarm) -> Result<bool, GroupError> {
        if !self.is_asleep() {
            self.sleep.disturb();
        }
        match alarm {
            Alarm::Restarted | Alarm::Gone => self.leader_is_gone(node),
            Alarm::Silent | Alarm::ReplicaEnded | Alarm::Returned => Ok(false),
        }
    }

    /// Whether the nodes on which the sleep of this replica relies are there, the leader's in the process in which the
    /// leader went to sleep, and none of those without whose members it sleeps. Else it must be woken at once.
    pub fn is_watched_over(&self, nodes: &Nodes) -> bool {
        if self.leads() {
            let mut others = self.members().iter().filter(|member| member.replica != self.replica);
            return others
                .all(|member| nodes.process(member.node).is_some() != self.sleep.is_without(member.replica));
        }
        let Rest::Asleep { word: Some(word), .. } = &self.sleep.rest else { return false };
        let running = self.leader_node().and_then(|node| nodes.process(node));
        running == Some(word.process)
    }

    /// For how many ticks the node of a follower's leader hasn't been heard.
    pub fn leader_silence(&self, nodes: &Nodes) -> u64 {
        self.leader_node().map_or(SILENT_TICKS, |node| nodes.silence(node))
    }

    fn leader_node(&self) -> Option<NodeId> {
        self.node_of(ReplicaId(self.raft.raft.leader_id))
    }

    /// Whether a message leaves a replica asleep that is. Its shell then needn't wake it before.
    pub fn sleeps_through(&self, message: &GroupMessage) -> bool {
        let (Some(word), raft) = (message.sleep, &self.raft.raft) else { return false };
        let m = &message.message;
        if !self.is_asleep() || m.term != raft.term {
            return false;
        }
        match m.get_msg_type() {
            // Asked once more: the answer was lost, or the leader hasn't all of them yet.
            MessageType::MsgHeartbeat => m.from == raft.leader_id && self.may_rest(m.commit),
            // An answer that came twice.
            MessageType::MsgHeartbeatResponse => {
                self.leads() && word.process == self.sleep.process && word.round == self.sleep.round
            }
            _ => false,
        }
    }

    /// What this leader asked last.
    pub fn last_word(&self) -> SleepWord {
        SleepWord { process: self.sleep.process, round: self.sleep.round }
    }

    /// Something happens in the group: it isn't idle.
    pub(super) fn disturb(&mut self) {
        match self.is_asleep() {
            // The shell knows for how long, and wakes it before; what it doesn't tell counts for nothing.
            true => self.wake(0, 0),
            false => self.sleep.disturb(),
        }
    }

    /// A message is about to be handed to raft.
    pub(super) fn before_step(&mut self, message: &GroupMessage) {
        let (m, leader) = (&message.message, self.raft.raft.leader_id);
        // Answers to heartbeats come all the time while it is awake.
        let is_answer = m.get_msg_type() == MessageType::MsgHeartbeatResponse && !self.is_asleep();
        if !is_answer && !self.sleeps_through(message) {
            self.disturb();
        }
        // Whoever asks for votes doesn't lead: nobody else is to be refused a vote for its sake.
        let asks = matches!(m.get_msg_type(), MessageType::MsgRequestVote | MessageType::MsgRequestPreVote);
        if self.sleep.after > 0 && asks && m.from == leader && m.term > self.raft.raft.term && !self.leads() {
            let raft = &mut self.raft.raft;
            raft.election_elapsed = raft.election_elapsed.max(SILENT_TICKS as usize);
        }
    }

    /// Raft has taken a message of this kind, with a word about sleep.
    pub(super) fn after_step(
        &mut self,
        kind: MessageType,
        from: u64,
        term: u64,
        commit: Index,
        word: SleepWord,
    ) {
        if term != self.raft.raft.term {
            return;
        }
        match kind {
            MessageType::MsgHeartbeat if from == self.raft.raft.leader_id && !self.leads() => {
                if self.may_rest(commit) {
                    self.fall_asleep(Some(word), Vec::new());
                } else {
                    self.disturb();
                }
            }
            MessageType::MsgHeartbeatResponse if self.leads() => {
                self.sleep.agrees(ReplicaId(from), word);
                self.sleep_if_all_agree();
            }
            _ => {}
        }
    }

    /// A tick of a leader has passed.
    pub(super) fn grow_drowsy(&mut self) {
        if self.sleep.after == 0 || !self.leads() {
            return;
        }
        let last = self.raft.raft.raft_log.last_index();
        let idle = self.sleep.may() && self.is_group_idle();
        self.sleep.tick(idle, last);
        self.sleep_if_all_agree();
    }

    fn sleep_if_all_agree(&mut self) {
        let others = || self.raft.raft.prs().iter().map(|(id, _)| ReplicaId(*id));
        let last = self.raft.raft.raft_log.last_index();
        if self.sleep.all_agree(others().filter(|id| *id != self.replica && self.is_there(*id)))
            && self.sleep.asks(last).is_some()
            && self.sleep.may()
            && self.is_group_idle()
        {
            let without = others().filter(|id| !self.is_there(*id)).collect();
            self.fall_asleep(None, without);
        }
    }

    /// Whether a member has answered this leader within an election timeout; it is there itself.
    fn is_there(&self, replica: ReplicaId) -> bool {
        replica == self.replica || self.catch_up.is_active(replica, self.ticks)
    }

    fn fall_asleep(&mut self, word: Option<SleepWord>, without: Vec<ReplicaId>) {
        if !self.is_asleep() {
            self.give_room_back();
        }
        self.sleep.rest = Rest::Asleep { word, without };
    }

    /// What was needed while there was something to do isn't kept while there is nothing.
    fn give_room_back(&mut self) {
        let done = self.done_to();
        self.raft.mut_store().rest(done);
        let raft = &mut self.raft.raft;
        raft.maybe_free_inflight_buffers();
        raft.raft_log.unstable.entries.shrink_to_fit();
        raft.msgs.shrink_to_fit();
        raft.read_states.shrink_to_fit();
        self.unpersisted.shrink_to_fit();
        self.queued.shrink();
        self.reads.shrink();
        self.changes.shrink_to_fit();
        self.marks.shrink_to_fit();
        self.messages.shrink_to_fit();
        self.done.shrink_to_fit();
        // Whoever wakes knows nothing of who has answered before.
        self.beats = Beats::default();
        self.vacancy.forget_old(self.ticks);
        self.state.shrink();
    }

    /// The word that goes along with a message of this replica.
    pub(super) fn word_for(&self, message: &Message) -> Option<SleepWord> {
        if message.term != self.raft.raft.term {
            return None;
        }
        match (message.get_msg_type(), &self.sleep.rest) {
            (MessageType::MsgHeartbeat, Rest::Drowsy { .. }) if self.leads() && self.is_idle() => {
                let last = self.raft.raft.raft_log.last_index();
                // A heartbeat names no more than what its receiver has: one that lacks entries would take that for all there is.
                let has_all =
                    self.raft.raft.prs().get(message.to).is_some_and(|progress| progress.matched == last);
                self.sleep.asks(last).filter(|_| has_all)
            }
            (MessageType::MsgHeartbeatResponse, Rest::Asleep { word, .. }) => {
                word.filter(|_| message.to == self.raft.raft.leader_id)
            }
            _ => None,
        }
    }

    /// Whether a follower may sleep under a leader whose log ends at `last`.
    fn may_rest(&self, last: Index) -> bool {
        self.sleep.may()
            && self.raft.raft.state == StateRole::Follower
            && self.raft.raft.raft_log.last_index() == last
            && self.is_idle()
    }

    /// Whether this leader's group is idle. Of a member that isn't there it is enough that the others are a quorum.
    fn is_group_idle(&self) -> bool {
        let raft = &self.raft.raft;
        let last = raft.raft_log.last_index();
        let follows = |(id, progress): (&u64, &raft::Progress)| {
            *id == self.replica.0
                || progress.state != ProgressState::Snapshot
                    && (progress.matched == last || !self.is_there(ReplicaId(*id)))
        };
        self.is_idle()
            && raft.commit_to_current_term()
            && self.members_are_known()
            && self.catch_up.is_calm()
            && is_quorum(self.members(), |member| self.is_there(member.replica))
            && raft.prs().iter().all(follows)
    }

    /// Whether this replica, taken alone, has nothing to do: its log is durable, committed and applied to its end, and
    /// nobody waits for anything.
    fn is_idle(&self) -> bool {
        let raft = &self.raft.raft;
        let last = raft.raft_log.last_index();
        let log_is_done =
            raft.raft_log.committed == last && raft.raft_log.persisted == last && self.applied() == last;
        let nothing_waits = self.waiting() == 0
            && self.done.is_empty()
            && self.unpersisted.is_empty()
            && self.fetching.is_none()
            && self.barrier.is_none()
            && self.stepped_down.is_none();
        log_is_done
            && nothing_waits
            && !self.state_lost
            && self.paused_at.is_none()
            && self.ambition == Ambition::Usual
            && raft.lead_transferee.is_none()
            && !raft.has_pending_conf()
            && !is_joint(self.members())
            && self.role().is_some_and(|role| role.stays_voter() || role == MemberRole::Learner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OTHERS: [ReplicaId; 2] = [ReplicaId(2), ReplicaId(3)];

    fn drowsy() -> Sleep {
        let mut sleep = Sleep { after: 3, process: 9, ..Sleep::never() };
        for _ in 0..3 {
            assert_eq!(sleep.asks(7), None);
            sleep.tick(true, 7);
        }
        sleep
    }

    #[test]
    fn a_leader_asks_after_a_while_without_anything_and_needs_all() {
        let mut sleep = drowsy();
        let word = sleep.asks(7).expect("it asks");
        assert_eq!(word, SleepWord { process: 9, round: 1 });
        assert!(!sleep.all_agree(OTHERS.into_iter()));
        sleep.agrees(OTHERS[0], word);
        assert!(!sleep.all_agree(OTHERS.into_iter()), "one is no majority of those who have to agree");
        sleep.agrees(OTHERS[1], word);
        assert!(sleep.all_agree(OTHERS.into_iter()));
        assert!(drowsy().all_agree([].into_iter()), "alone there is nobody to ask");
    }

    #[test]
    fn anything_that_happens_makes_it_begin_anew() {
        let mut sleep = Sleep { after: 3, ..Sleep::never() };
        for idle in [true, true, false, true, true] {
            sleep.tick(idle, 7);
            assert_eq!(sleep.asks(7), None);
        }
        sleep.tick(true, 7);
        let first = sleep.asks(7).expect("it asks");
        sleep.agrees(OTHERS[0], first);
        sleep.disturb();
        assert_eq!(sleep.asks(7), None);
        for _ in 0..3 {
            sleep.tick(true, 7);
        }
        let second = sleep.asks(7).expect("it asks again");
        assert_ne!(first, second);
        sleep.agrees(OTHERS[0], first);
        sleep.agrees(OTHERS[1], second);
        assert!(
            !sleep.all_agree(OTHERS.into_iter()),
            "an agreement to the first attempt is none to the second"
        );
    }

    #[test]
    fn an_entry_between_two_ticks_ends_the_attempt() {
        let mut sleep = drowsy();
        assert_eq!(sleep.asks(8), None);
        sleep.tick(true, 8);
        assert_eq!(sleep.rest, Rest::Awake { idle: 0 });
    }

    #[test]
    fn an_attempt_that_not_all_agree_to_ends() {
        let mut sleep = drowsy();
        for _ in 0..limits::ELECTION_TICKS_MIN {
            sleep.tick(true, 7);
            assert!(sleep.asks(7).is_some());
        }
        sleep.tick(true, 7);
        assert_eq!(sleep.rest, Rest::Awake { idle: 0 });
    }

    #[test]
    fn who_is_kept_awake_or_never_sleeps_may_not() {
        assert!(!Sleep::never().may());
        let mut sleep = drowsy();
        assert!(sleep.may());
        sleep.kept_awake = true;
        assert!(!sleep.may());
    }
}
