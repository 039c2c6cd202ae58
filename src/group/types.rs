//! What goes into a group and what comes out.

use crate::codec::GroupMessage;
use crate::ids::{Epoch, Incarnation, Index, NodeId, ReplicaId, Term};
use crate::machine::command::{Answer, Command, Query, Reply};
use crate::machine::session::SessionTag;
use crate::placement::map::Member;
use crate::refusal::Refusal;
use crate::storage::log::LogWrite;

/// One operation asked of a replica.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Operation {
    /// A write, or for the metadata shard a change of the map: goes through the log.
    Command {
        /// What to do.
        command: Command,
        /// For a command that may be sent again: whose it is, and which.
        session: Option<SessionTag>,
    },
    /// A linearizable read: waits for a read index, then reads the state.
    Query(Query),
    /// A change of the group's members: goes through the log, in an entry of its own.
    Change {
        /// The conf version that the caller knew. Refused as stale with another one.
        conf: u64,
        /// What to change.
        change: MembershipChange,
    },
    /// A mark in the log, which changes nothing: where it is applied the shell of each replica can keep what the
    /// state is there ([`Effects::marked`]).
    Mark,
}

/// A change of a group's members. A joint change, once begun, is ended by the group itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum MembershipChange {
    /// Adds replicas that receive the log without a vote. One that is a member already is left as it is.
    AddLearners(Vec<Member>),
    /// Begins a joint change: learners become voters, and voters go, all at once.
    Exchange {
        /// Learners that become voters. Refused unless they are caught up.
        promote: Vec<ReplicaId>,
        /// Voters that leave the group. Never the leader: it has to hand leadership over first.
        remove: Vec<ReplicaId>,
    },
    /// Removes learners. One that is no member is passed over, and the conf version grows all the same: so no
    /// earlier proposal can still add it.
    RemoveLearners(Vec<ReplicaId>),
}

/// What an operation comes to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Output {
    /// Of a command: committed and applied.
    Reply(Reply),
    /// Of a query.
    Answer(Answer),
    /// Of a change of members: committed and in force, under this conf version. After
    /// [`MembershipChange::Exchange`] the joint change has begun; it ends by itself.
    Changed(u64),
    /// Of a mark: it is committed and applied, at this index.
    Marked(Index),
}

/// Everything that came out of one pass over a group.
pub struct Effects<T> {
    /// Messages that may leave at once, with the node that holds their receiver.
    pub messages: Vec<(NodeId, GroupMessage)>,
    /// Must be made durable; then [`super::driver::Group::on_persisted`] is called with `number`.
    pub write: Option<NumberedWrite>,
    /// Operations that came to an end, with the token they were submitted with.
    pub done: Vec<(T, Result<Output, Refusal>)>,
    /// Queries that may be answered now from any state at least as new as the current one, because
    /// their key is not in memory: the shell reads it without blocking the group, and answers.
    pub reads: Vec<(T, Query)>,
    /// Log entries to read from the store; then [`super::driver::Group::on_fetched`].
    pub fetch: Option<Fetch>,
    /// A follower needs a snapshot of this replica's state. The shell makes one, tells
    /// [`super::driver::Group::snapshot_made`], brings it there, and ends, whatever the outcome, with
    /// [`super::driver::Group::snapshot_done`].
    pub snapshot: Option<SnapshotWanted>,
    /// Leadership as it is now, if it changed.
    pub leader: Option<LeaderChange>,
    /// A mark was applied, at this index, and nothing behind it: until the next pump the state is as it is there.
    pub marked: Option<Index>,
    /// True if committed entries are left for a further pass.
    pub more: bool,
}

impl<T> Effects<T> {
    /// Whether nothing came out.
    pub fn is_empty(&self) -> bool {
        self.messages.is_empty()
            && self.write.is_none()
            && self.done.is_empty()
            && self.reads.is_empty()
            && self.fetch.is_none()
            && self.snapshot.is_none()
            && self.leader.is_none()
            && self.marked.is_none()
            && !self.more
    }
}

/// A log write and the number that acknowledges it.
pub struct NumberedWrite {
    /// Grows with every write of one incarnation.
    pub number: u64,
    /// The write.
    pub write: LogWrite,
}

/// Log entries that left memory and are needed for a lagging follower.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fetch {
    /// First index.
    pub low: Index,
    /// One past the last index.
    pub high: Index,
    /// Bytes of data to read at most (but at least one entry).
    pub max_bytes: usize,
}

/// A snapshot that a follower needs: its next entries are gone from the log, or its state is lost.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SnapshotWanted {
    /// The follower.
    pub to: ReplicaId,
    /// Its node.
    pub node: NodeId,
    /// The term in which this replica leads, which goes along with the snapshot.
    pub term: Term,
    /// Exact at an earlier index it is of no use. That much is applied here, maybe not yet flushed.
    pub least: Index,
}

/// Who leads a group, as one replica sees it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LeaderChange {
    /// The term.
    pub term: Term,
    /// The leader; `None` while there is none known.
    pub leader: Option<ReplicaId>,
    /// Whether it is this replica.
    pub local: bool,
}

/// What a replica can tell of itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GroupStatus {
    /// Its raft role.
    pub role: raft::StateRole,
    /// Whether it receives the log without a vote.
    pub learner: bool,
    /// The term.
    pub term: Term,
    /// The leader it knows.
    pub leader: Option<ReplicaId>,
    /// Log positions.
    pub applied: Index,
    /// Highest index known to be committed.
    pub committed: Index,
    /// Last index in the log.
    pub last: Index,
    /// Up to which index its log holds no entries any more: of a leader, who lacks one of them gets a snapshot.
    pub truncated: Index,
    /// Term of the last entry. Of two logs, the one that ends in the later term knows more (Raft §5.4.1).
    pub last_term: Term,
    /// Still re-applying its log after a start.
    pub recovering: bool,
    /// Its state is lost: it waits for a snapshot at this index or a later one.
    pub state_lost: Option<Index>,
    /// Which start of the replica this is.
    pub incarnation: Incarnation,
    /// Versions of the shard's description, as applied here.
    pub epoch: Epoch,
    /// The members, as applied here.
    pub members: Vec<Member>,
    /// How far the others are; of a leader.
    pub followers: Vec<FollowerStatus>,
}

/// A follower as its leader sees it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FollowerStatus {
    /// Which.
    pub replica: ReplicaId,
    /// The last entry that it has acknowledged.
    pub matched: Index,
    /// Whether it answered within the last election timeout.
    pub active: bool,
    /// Whether it has so much of the log, and a state, that it could vote at once without holding the
    /// group up.
    pub caught_up: bool,
}
