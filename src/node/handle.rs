//! A node as its services see it.

use std::sync::Arc;
use std::time::Duration;

use crate::group::types::{GroupStatus, Operation, Output};
use crate::ids::{NodeId, ReplicaId, ShardId};
use crate::machine::command::{MetaCommand, MetaReply};
use crate::placement::map::ClusterMap;
use crate::refusal::Refusal;

/// What a service on any thread of the node may do with it. Cheap to clone.
#[derive(Clone)]
pub struct NodeHandle {
    map: Arc<ClusterMap>,
}

/// What a node is doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NodePhase {
    /// Opening, forming or joining.
    Starting,
    /// Serving.
    Ready,
    /// On its way out.
    Stopping,
}

/// How a replica is, as its supervisor sees it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ReplicaHealth {
    /// Running.
    Serving,
    /// Re-applying its log after a start.
    Recovering,
    /// Crashed; will be rebuilt.
    Restarting(String),
    /// Crashed too often.
    Quarantined(String),
    /// Its disk state can't be used.
    Failed(String),
}

/// One replica in a node's report.
#[derive(Clone, Debug)]
pub struct ReplicaReport {
    /// The shard.
    pub shard: ShardId,
    /// The replica.
    pub replica: ReplicaId,
    /// How it is.
    pub health: ReplicaHealth,
    /// What it tells of itself; `None` while it isn't running.
    pub group: Option<GroupStatus>,
    /// Restarts since the node started.
    pub restarts: u32,
}

/// What a node tells of itself.
#[derive(Clone, Debug)]
pub struct NodeReport {
    /// Its id; 0 while not a member.
    pub node: NodeId,
    /// Its label.
    pub label: String,
    /// What it is doing.
    pub phase: NodePhase,
    /// Bytes in its data directory, as last measured.
    pub disk_bytes: u64,
    /// Its replicas, by shard.
    pub replicas: Vec<ReplicaReport>,
    /// Time since it started.
    pub uptime: Duration,
}

impl NodeHandle {
    /// This node's id; 0 while it isn't a member.
    pub fn node(&self) -> NodeId {
        NodeId(0)
    }

    /// The cluster map as this node knows it; a cheap snapshot.
    pub fn map(&self) -> Arc<ClusterMap> {
        self.map.clone()
    }

    /// Hands operations to this node's replica of `shard`, if `range_version` is the one in force,
    /// and waits for their ends. An outer refusal holds for all of them and means none was started.
    pub async fn submit(
        &self,
        shard: ShardId,
        range_version: u64,
        operations: Vec<Operation>,
        timeout: Duration,
    ) -> Result<Vec<Result<Output, Refusal>>, Refusal> {
        let _ = (shard, range_version, operations, timeout);
        Err(Refusal::Unavailable("starting"))
    }

    /// Has the metadata shard's leader, wherever it is, execute a command.
    pub async fn meta(
        &self,
        command: MetaCommand,
        timeout: Duration,
    ) -> Result<MetaReply, Refusal> {
        let _ = (command, timeout);
        Err(Refusal::Unavailable("starting"))
    }

    /// This node's own view of itself and its replicas.
    pub async fn report(&self) -> NodeReport {
        NodeReport {
            node: self.node(),
            label: String::new(),
            phase: NodePhase::Starting,
            disk_bytes: 0,
            replicas: Vec::new(),
            uptime: Duration::ZERO,
        }
    }

    /// Starts moving the leadership of `shard` from this node's replica to the one on `to`, and
    /// waits until it has moved.
    pub async fn transfer(
        &self,
        shard: ShardId,
        to: NodeId,
        timeout: Duration,
    ) -> Result<(), Refusal> {
        let _ = (shard, to, timeout);
        Err(Refusal::Unavailable("starting"))
    }

    /// Test hook: makes this node's replica of `shard` fail in the named way. A build without the
    /// feature `test-hooks` refuses.
    pub async fn inject(&self, shard: ShardId, fault: &str) -> Result<(), Refusal> {
        let _ = (shard, fault);
        Err(Refusal::Invalid("this build has no test hooks".into()))
    }
}
