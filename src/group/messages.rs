//! Messages of raft on their way in and out: what is let in, and what leaves, to which node.

use raft::StateRole;
use raft::eraftpb::{Message, MessageType};

use super::driver::Group;
use super::log::GroupLog;
use super::lost::ask_along;
use super::types::Effects;
use crate::codec::GroupMessage;
use crate::ids::{Epoch, GROUP_START, METADATA_SHARD, NodeId, ReplicaId, Term};
use crate::limits;
use crate::telemetry::hot::hot;

impl<T> Group<T> {
    /// What raft-rs would panic on, were it true, and what it would believe though it can't be.
    pub(super) fn check(&self, message: &Message) -> Result<(), &'static str> {
        let log = &self.raft.raft.raft_log;
        if message.term > self.raft.raft.term.saturating_add(limits::TERM_JUMP_MAX) {
            return Err("no peer can be so many terms ahead");
        }
        let of_a_leader =
            matches!(message.get_msg_type(), MessageType::MsgHeartbeat | MessageType::MsgAppend);
        // One whose leader goes away with a joint change may be the only voter before that leader is gone.
        let led_by = self.raft.raft.leader_id == message.from && message.term == self.raft.raft.term;
        if (of_a_leader || message.term > self.raft.raft.term) && !led_by && self.is_only_voter() {
            return Err("nobody else can be elected in a group of one voter");
        }
        match message.get_msg_type() {
            // A leader of the past may well be of another opinion. Raft tells it of the present term.
            MessageType::MsgHeartbeat | MessageType::MsgAppend if message.term < self.raft.raft.term => {
                Ok(())
            }
            MessageType::MsgHeartbeat if message.commit > log.last_index() => {
                Err("a leader counts on entries that this log has lost")
            }
            // Else a newcomer without a state would go on from there.
            MessageType::MsgAppend if message.index < GROUP_START.index => {
                Err("no log of a group reaches so far back")
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
            // Counted, it would commit what no quorum has. A follower has entries of this term, and what is
            // committed, from the leader of the term, which is this replica.
            MessageType::MsgAppendResponse
                if !message.reject
                    && message.term == self.raft.raft.term
                    && self.leads()
                    && message.index > log.last_index() =>
            {
                Err("a follower acknowledges entries that its leader doesn't have")
            }
            // Such a log begins behind an entry that was committed, and a leader has all of those.
            MessageType::MsgHeartbeatResponse
                if message.request_snapshot > log.last_index()
                    && message.term == self.raft.raft.term
                    && self.leads() =>
            {
                Err("a follower asks for a snapshot of entries that its leader doesn't have")
            }
            // It asks for votes when its log is on disk, and raft-rs relies on that when it has won.
            MessageType::MsgRequestVoteResponse | MessageType::MsgRequestPreVoteResponse
                if log.last_index() > log.persisted
                    && message.term >= self.raft.raft.term
                    && matches!(self.raft.raft.state, StateRole::Candidate | StateRole::PreCandidate) =>
            {
                Err("a vote that this replica hasn't asked for yet")
            }
            MessageType::MsgSnapshot => Err("snapshots travel on a lane of their own"),
            // A follower would send these on to its leader; raft-rs panics on one that has a term.
            MessageType::MsgReadIndex
            | MessageType::MsgReadIndexResp
            | MessageType::MsgPropose
            | MessageType::MsgTransferLeader => Err("requests are not forwarded between replicas"),
            _ => Ok(()),
        }
    }

    /// Whether a message is from a replica that an operator has given up, and that seeks to lead, or does, by members of
    /// before that. This one has gone on without it, alone at first ([`Epoch::generation`]), or is of those who have
    /// joined since; and an acknowledgement of it would count in a majority of those that were given up. Answers are
    /// let in: raft takes those of members only, and a newcomer has no conf version yet.
    pub(super) fn is_of_those_given_up(&self, kind: MessageType, epoch: Epoch) -> bool {
        let would_lead = matches!(
            kind,
            MessageType::MsgAppend
                | MessageType::MsgHeartbeat
                | MessageType::MsgRequestVote
                | MessageType::MsgRequestPreVote
                | MessageType::MsgTimeoutNow
        );
        would_lead && epoch.generation() < self.epoch().generation()
    }

    pub(super) fn is_only_voter(&self) -> bool {
        let raft = &self.raft.raft;
        let voters = raft.prs().conf().voters().ids();
        let mut voters = voters.iter();
        voters.next() == Some(raft.id) && voters.next().is_none()
    }

    /// Sends a follower what comes after that which it has acknowledged, and nothing before.
    ///
    /// A rejection that an acknowledgement has overtaken makes raft-rs 0.7.0 go back further than that. If
    /// the log is compacted there, the follower would be sent a snapshot that it doesn't need.
    pub(super) fn mend_progress(&mut self, follower: u64) {
        if let Some(progress) = self.raft.raft.mut_prs().get_mut(follower) {
            progress.next_idx = progress.next_idx.max(progress.matched + 1);
        }
    }

    /// Whether a message is a heartbeat that would say nothing new ([`super::beats`]). Of the metadata shard all are sent:
    /// by them the nodes hear in time of the map that is committed.
    fn is_spared(&mut self, message: &Message, leads_term: Option<Term>) -> bool {
        let is_plain = message.get_msg_type() == MessageType::MsgHeartbeat
            && message.context.is_empty()
            && leads_term == Some(message.term)
            && self.shard != METADATA_SHARD
            && self.word_for(message).is_none();
        if !is_plain {
            return false;
        }
        let (this, raft) = (self.replica, &self.raft.raft);
        let others = || raft.prs().iter().map(|(id, _)| ReplicaId(*id)).filter(|id| *id != this);
        // Who lacks its state asks for it with its answer to a heartbeat.
        !others().any(|id| self.catch_up.lacks_state(id))
            && self.beats.are_spared(message.term, self.ticks, others())
    }

    pub(super) fn route_messages(&mut self, effects: &mut Effects<T>) {
        if self.messages.is_empty() {
            return;
        }
        let safe_index = self.safe_index();
        let epoch = self.epoch();
        let leads_term = self.leads().then_some(self.raft.raft.term);
        let wanted_index = self.wanted_index();
        for mut message in std::mem::take(&mut self.messages) {
            let to = ReplicaId(message.to);
            // What it would ask for is done already, or by a leader of the past.
            if message.get_msg_type() == MessageType::MsgSnapshot {
                continue;
            }
            if !mend_append(&mut message, leads_term, self.raft.store()) {
                continue;
            }
            if self.is_spared(&message, leads_term) {
                continue;
            }
            ask_along(&mut message, wanted_index);
            match self.node_of_any(to) {
                Some(to) => {
                    hot().message(message.get_msg_type()).increment(1);
                    let node = NodeId::default();
                    let sleep = self.word_for(&message);
                    let message = GroupMessage { shard: self.shard, epoch, safe_index, message, node, sleep };
                    effects.messages.push((to, message));
                }
                None => {
                    tracing::debug!(shard = %self.shard, to = %to, "no node for a raft message")
                }
            }
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

/// Whether a follower's message needn't wait for the writes under way: it answers a heartbeat, read
/// rounds included, of a term that is on disk here.
///
/// The leader concludes two things from it. This replica is alive. And, for a read: at a moment after
/// the round began this replica was in the leader's term, so it had not voted in a later one. Votes and
/// terms leave only when they are durable, so no crash makes it have voted otherwise before that
/// moment; and if a quorum says so, no later leader was elected before the round began, nor has one
/// acknowledged a write that the read would miss. That is about the past: no write under way changes it.
/// Of the log the answer says nothing: the commit index it carries counts for no quorum, and what this
/// replica holds is told by its acknowledgements of appends, which do wait. They may be overtaken; raft
/// expects as much of any network.
///
/// A term that isn't on disk is left to wait, since this replica could forget that it ever was in it.
///
/// Without this each linearizable read would pay for a follower's sync, whoever wrote.
pub(super) fn promises_no_write(message: &Message, durable_term: Term) -> bool {
    message.get_msg_type() == MessageType::MsgHeartbeatResponse && message.term <= durable_term
}
