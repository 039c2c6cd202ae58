//! What nodes tell the reconciler, and what it asks of them.

use crate::group::types::{FollowerStatus, MembershipChange};
use crate::ids::{Epoch, Index, NodeId, ReplicaId, ShardId, Term};
use crate::machine::command::MetaCommand;
use crate::placement::map::Member;

/// A shard as the replica sees it that leads it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ShardReport {
    /// The shard.
    pub shard: ShardId,
    /// The replica that leads.
    pub leader: ReplicaId,
    /// Its term.
    pub term: Term,
    /// Versions of the shard's description.
    pub epoch: Epoch,
    /// Its members, as applied.
    pub members: Vec<Member>,
    /// How far the others are.
    pub followers: Vec<FollowerStatus>,
    /// The last entry of the leader's log.
    pub last: Index,
    /// Keys, as last counted; an estimate.
    pub keys: u64,
    /// Bytes of keys and values, as last counted; an estimate.
    pub bytes: u64,
}

/// A replica that a node holds and that doesn't serve, for a reason that won't pass by itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SickReplica {
    /// The shard.
    pub shard: ShardId,
    /// The replica.
    pub replica: ReplicaId,
    /// Why it doesn't serve.
    pub why: String,
}

/// What a node answers when the reconciler asks how it is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Survey {
    /// The node.
    pub node: NodeId,
    /// Its disk has less free than its reserve.
    pub disk_full: bool,
    /// The shards that it leads.
    pub led: Vec<ShardReport>,
    /// All replicas that it holds.
    pub held: Vec<(ShardId, ReplicaId)>,
    /// Those of them that are quarantined or can't be opened.
    pub sick: Vec<SickReplica>,
    /// Bytes of snapshots that it has sent since it started.
    pub snapshot_bytes: u64,
}

/// Something to be done for the cluster to become what it should be. Any of them may fail, or be repeated.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Action {
    /// Propose this to the metadata shard.
    Meta(MetaCommand),
    /// Have the leader of a shard, on this node, change the members.
    Change {
        /// The leader's node.
        node: NodeId,
        /// The shard.
        shard: ShardId,
        /// The conf version that is known.
        conf: u64,
        /// What to change.
        change: MembershipChange,
    },
    /// Have the leader of a shard, on this node, hand leadership over.
    Transfer {
        /// The leader's node.
        node: NodeId,
        /// The shard.
        shard: ShardId,
        /// The node that is to lead.
        to: NodeId,
    },
}
