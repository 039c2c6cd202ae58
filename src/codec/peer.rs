//! Frames of the peer port.

use crate::codec::GroupMessage;
use crate::ids::{ClusterId, NodeId};
use crate::machine::command::{MetaCommand, MetaReply};
use crate::placement::map::{MapDelta, NodeRecord, ShardRecord};
use crate::refusal::Refusal;

/// One frame between nodes.
#[derive(Debug)]
pub enum PeerFrame {
    /// Messages of many groups.
    Raft(Vec<GroupMessage>),
    /// A node's liveness and the map version it holds.
    Heartbeat(NodeHeartbeat),
    /// A question; the id is echoed in the answer.
    Request(u64, PeerRequest),
    /// The answer to the request of that id.
    Response(u64, PeerResponse),
}

/// Liveness of a node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NodeHeartbeat {
    /// Who.
    pub node: NodeId,
    /// Which start of its process.
    pub incarnation: u64,
    /// Version of the cluster map it holds.
    pub map_version: u64,
}

/// A question between nodes.
#[derive(Clone, PartialEq, Debug)]
pub enum PeerRequest {
    /// Formation: who are you?
    Probe,
    /// Formation: record this cluster id durably.
    Claim(ClusterId),
    /// Formation: become this voter of the metadata shard.
    Form(Formation),
    /// Make me a member.
    Join {
        /// The cluster meant; `None`: any.
        cluster_id: Option<ClusterId>,
        /// Who I am, with id 0.
        record: NodeRecord,
    },
    /// What changed in the cluster map after this version?
    Map {
        /// The version the asker has.
        since: u64,
    },
    /// A command for the metadata shard, if you lead it.
    Meta(MetaCommand),
}

/// The answer to a [`PeerRequest`].
#[derive(Clone, PartialEq, Debug)]
pub enum PeerResponse {
    /// No.
    Refused(Refusal),
    /// To `Probe`.
    Probe(ProbeAnswer),
    /// To `Claim`.
    Claimed,
    /// To `Form`.
    Formed,
    /// To `Join`.
    Joined {
        /// The id given.
        node: NodeId,
        /// The whole map.
        map: MapDelta,
    },
    /// To `Map`.
    Map(MapDelta),
    /// To `Meta`.
    Meta(MetaReply),
}

/// The first content of a cluster, alike for all its first voters.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Formation {
    /// Identity of the cluster.
    pub cluster_id: ClusterId,
    /// Which of `nodes` the receiver is.
    pub node: NodeId,
    /// The first nodes.
    pub nodes: Vec<NodeRecord>,
    /// The metadata shard.
    pub metadata: ShardRecord,
}

/// How far a node is on its way into a cluster.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Membership {
    /// No cluster id recorded.
    Empty,
    /// Has recorded this cluster id, not yet a member.
    Claimed(ClusterId),
    /// Belongs to this cluster.
    Member(ClusterId, NodeId),
}

/// The answer to a probe.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ProbeAnswer {
    /// How far the node is.
    pub membership: Membership,
    /// Who it is: id 0 unless a member.
    pub record: NodeRecord,
}
