//! What a leader does about its followers' logs: how much of its own it keeps for them, and who gets a
//! snapshot. The decisions are [`CatchUp`](super::catch_up::CatchUp)'s; here they meet raft's progress.

use raft::eraftpb::{Message, MessageType};
use raft::{ProgressState, SnapshotStatus};

use super::driver::Group;
use super::types::SnapshotWanted;
use crate::ids::{Index, Position, ReplicaId};
use crate::limits;

impl<T> Group<T> {
    /// Forgets log entries that are in the durable state up to `flushed` and that no follower will be
    /// sent any more ([`super::catch_up`]). Returns the position up to which the shell must drop them from
    /// the store.
    pub fn compact(&mut self, flushed: Position) -> Option<Position> {
        if self.state_lost {
            return None;
        }
        let to = self.forget_to(flushed);
        self.settle_held();
        to
    }

    fn forget_to(&mut self, flushed: Position) -> Option<Position> {
        let index = flushed.index.min(self.compactable());
        let log = self.raft.mut_store();
        if index <= log.truncated().index {
            return None;
        }
        let to = Position { index, term: log.term_at(index)? };
        // What changed the members before that is in the record: see `super::lost`.
        assert!(
            self.barrier.as_ref().is_none_or(|barrier| barrier.index() > index),
            "compacting an unrecorded change"
        );
        let log = self.raft.mut_store();
        log.compact(to);
        Some(to)
    }

    /// Counts what a leader's log holds behind snapshots, and tells of followers that were outrun.
    fn settle_held(&mut self) {
        if !self.leads() {
            return;
        }
        let progress = self.raft.raft.prs().iter();
        let matched = progress.map(|(id, progress)| (ReplicaId(*id), progress.matched));
        for follower in self.catch_up.settle(matched, self.raft.raft.raft_log.store(), self.ticks) {
            tracing::warn!(shard = %self.shard, replica = %self.replica, %follower, "more was written while a follower got a snapshot than this node keeps of the log meanwhile: it needs another");
        }
        self.raft.mut_store().set_snapshots(self.catch_up.offered());
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
        // Without its state it leads for a moment only, and leaves the logs of the others as they are.
        if self.leads() && !self.state_lost {
            let progress = self.raft.raft.prs().iter();
            let matched = progress.map(|(id, progress)| (ReplicaId(*id), progress.matched));
            // Who sleeps counts no ticks: a member without which it does is as one that has long been silent. The others
            // have everything.
            let now = self.ticks + if self.is_asleep() { limits::FOLLOWER_DEAD_TICKS } else { 0 };
            self.catch_up.safe_index(matched, self.raft.store(), now).min(self.raft.raft.raft_log.committed)
        } else {
            self.safe_index
        }
    }

    pub(super) fn observe_followers(&mut self) {
        if !self.leads() {
            return;
        }
        let log = &self.raft.raft.raft_log;
        for (id, progress) in self.raft.raft.prs().iter() {
            let (id, matched) = (ReplicaId(*id), progress.matched);
            self.catch_up.observe(id, progress.recent_active || id == self.replica, self.ticks);
            if progress.state == ProgressState::Replicate {
                self.catch_up.replicates(id, matched, log.committed, log.store(), self.ticks);
            }
        }
        self.raft.mut_store().set_snapshots(self.catch_up.offered());
    }

    /// A follower answers this leader: it is there, and an answer to a heartbeat says whether its state is lost.
    pub(super) fn hear_answer(&mut self, message: &Message) {
        if self.leads()
            && message.term == self.raft.raft.term
            && self.raft.raft.prs().get(message.from).is_some()
        {
            self.catch_up.answers(ReplicaId(message.from), self.ticks);
            if message.get_msg_type() == MessageType::MsgAppendResponse && !message.reject {
                let (from, matched) = (ReplicaId(message.from), message.index);
                self.beats.acknowledges(from, message.term, self.ticks);
                let log = &self.raft.raft.raft_log;
                self.catch_up.acknowledges(from, matched, log.committed, log.store(), self.ticks);
            }
        }
        if message.get_msg_type() != MessageType::MsgHeartbeatResponse
            || !self.leads()
            || message.term != self.raft.raft.term
            || self.raft.raft.prs().get(message.from).is_none()
        {
            return;
        }
        let least = (message.request_snapshot != raft::INVALID_INDEX).then_some(message.request_snapshot);
        self.catch_up.hear(ReplicaId(message.from), least);
    }

    /// Whether a follower of this leader has said last that its state is lost.
    pub fn lacks_state(&self, replica: ReplicaId) -> bool {
        self.catch_up.lacks_state(replica)
    }

    pub(super) fn want_snapshot(&mut self) -> Option<SnapshotWanted> {
        let mut asked = self.raft.mut_store().take_snapshots_wanted();
        // There is nothing to make one of while the state is lost.
        if !self.leads() || self.state_lost {
            return None;
        }
        // Asked for in passing, before `mend_progress`.
        asked.retain(|to| {
            let progress = self.raft.raft.prs().get(to.0);
            progress.is_some_and(|progress| progress.matched < self.raft.store().truncated().index)
        });
        let asked = asked.into_iter().map(|to| (to, false));
        let requests = self.catch_up.take_requests().into_iter().map(|to| (to, true));
        // One at a time; the others are asked for again.
        asked.chain(requests).find_map(|(to, itself)| {
            let node = self.node_of(to)?;
            let least = self.catch_up.least(to, self.raft.store()).max(self.ahead_to);
            if least > self.applied() {
                return None;
            }
            let wanted = self.catch_up.wanted(to, itself, self.raft.store(), self.ticks);
            wanted.then_some(SnapshotWanted { to, node, term: self.raft.raft.term, least })
        })
    }

    /// raft has taken note of snapshots that are installed: it may go on behind them. Its own messages
    /// about them don't leave ([`Group::route_messages`]).
    pub(super) fn conclude_snapshots(&mut self) {
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
        let matched = self.matched(to);
        self.leads() && self.catch_up.made(to, position, matched, self.raft.store())
    }

    /// The follower has installed the snapshot, or has no need of it; or that has failed, or can't be
    /// told, and it is asked for anew if need be.
    pub fn snapshot_done(&mut self, to: ReplicaId, installed: bool) {
        let matched = self.matched(to);
        self.catch_up.done(to, installed, matched, self.raft.store(), self.ticks);
        self.raft.mut_store().set_snapshots(self.catch_up.offered());
    }

    pub(super) fn matched(&self, follower: ReplicaId) -> Index {
        self.raft.raft.prs().get(follower.0).map_or(0, |progress| progress.matched)
    }
}
