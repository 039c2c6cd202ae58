//! A replica whose state is lost: the state store was damaged and set aside, or it lacks what the log was
//! compacted for. Its vote and its log are whole (a log that isn't keeps the node from starting), so what it
//! has promised to others it keeps: it takes and acknowledges entries, and it votes. It applies nothing,
//! serves nobody, flushes and compacts nothing, and seeks to lead after all the others only, until it is
//! opened anew from a snapshot of its leader.
//!
//! *Why it may vote.* A vote promises that it is the only one in its term, and that the candidate has every
//! entry that this replica has acknowledged. Hard state and log tell both; the state tells neither. Other
//! replicas wait with their vote until they have applied what was committed before their start, since what
//! they haven't applied may say who votes. This one takes the members from its record in the catalogue: they are
//! those of the last change that was compacted away, or of a later one ([`super::membership`]). The entries behind
//! that up to the commit index it looks through, before it takes part in anything, and those that are committed
//! later as they come: it carries out the changes of members among them, with the same barrier as any replica,
//! and nothing else.
//!
//! *Why it should.* Mute, it would count as down: a group of three could lose nobody else meanwhile.
//!
//! *Why it may have to lead.* Its log may hold what the others that are left don't have, acknowledged by it and by
//! one that is gone: then they don't get its vote, and nobody else could be elected. So after a long silence
//! ([`super::election::LOST_TICKS`]) it begins an election too. That is as safe as its vote: what a leader must have
//! is in its log. It proposes nothing but raft's own first entry, refuses every operation, makes no
//! snapshots, and tells nobody what to compact; it brings the others' logs up to its own, and gives way to the first
//! that has all of it and a state.
//!
//! *How it asks.* With every answer to a heartbeat, in `request_snapshot`, which raft-rs doesn't look at
//! there: so whatever is lost on the way is said again. It names the entry behind which this log begins; an
//! older snapshot would leave a gap between the two. What a leader does about it: [`super::catch_up`]. A
//! leader that doesn't know of this takes no notice, and goes on with a follower that acknowledges.
//!
//! Who can't be helped: a group of which every replica has lost its state, or all those whose state reaches to where
//! the logs of the lost ones begin. Nobody serves it.

use raft::eraftpb::{Message, MessageType};

use super::driver::Group;
use crate::ids::Index;
use crate::refusal::Refusal;

impl<T> Group<T> {
    /// Whether the state is lost. [`Group::state`] is empty then: nothing of it may be told to anybody.
    pub fn state_lost(&self) -> bool {
        self.state_lost
    }

    /// The least index of a snapshot that a replica without its state can go on from.
    pub(super) fn wanted_index(&self) -> Option<Index> {
        self.state_lost.then(|| self.raft.store().truncated().index)
    }

    /// Whether entries that are committed stay in the log for now, and aren't looked at.
    pub(super) fn holds_apply(&self) -> bool {
        self.barrier.is_some() || (self.paused_at.is_some() && !self.state_lost)
    }

    /// Up to where entries needn't be in memory any more: applied, or, without a state, looked through for changes
    /// of the members.
    pub(super) fn done_to(&self) -> Index {
        if self.state_lost { self.looked_to } else { self.applied() }
    }

    /// Why a replica without its state does nothing for a caller, where nobody is known who would.
    pub(super) fn lost_refusal(&self) -> Option<Refusal> {
        let leader = self.raft.raft.leader_id;
        let alone = self.state_lost && (leader == raft::INVALID_ID || leader == self.replica.0);
        alone.then(|| {
            Refusal::Unavailable(
                "the replica's state was lost, and no leader is known to fetch it from".into(),
            )
        })
    }
}

/// Has an answer to a heartbeat say that its sender needs a snapshot, at `least` or a later index.
pub(super) fn ask_along(message: &mut Message, least: Option<Index>) {
    if let Some(least) = least
        && message.get_msg_type() == MessageType::MsgHeartbeatResponse
    {
        message.request_snapshot = least;
    }
}
