//! Plans for even load: which replicas and leaders should be elsewhere.

use std::collections::{BTreeMap, BTreeSet};

use super::map::ClusterMap;
use crate::ids::{NodeId, ShardId};

/// What is known of the shards beside the map. What isn't known is taken for ordinary.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Known {
    /// Who leads. A shard that isn't here is taken to be led by its first voter.
    pub leaders: BTreeMap<ShardId, NodeId>,
    /// Keys and bytes.
    pub sizes: BTreeMap<ShardId, ShardSize>,
    /// Nodes that can't get anything now: gone, or their disk is full. What they hold stays where it is.
    pub unfit: BTreeSet<NodeId>,
}

/// How much one replica of a shard holds; estimates.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ShardSize {
    /// Keys.
    pub keys: u64,
    /// Bytes of keys and values.
    pub bytes: u64,
}

/// What moves.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum MoveKind {
    /// A replica, with its data.
    Replica,
    /// Leadership alone.
    Leader,
}

/// One move of a plan.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PlannedMove {
    /// The shard.
    pub shard: ShardId,
    /// Who gives.
    pub from: NodeId,
    /// Who gets.
    pub to: NodeId,
    /// What.
    pub kind: MoveKind,
    /// Keys that are copied: none with leadership.
    pub keys: u64,
    /// Bytes that are copied: none with leadership.
    pub bytes: u64,
}

/// Where a rebalancing wants a shard.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PlannedTarget {
    /// The shard.
    pub shard: ShardId,
    /// The conf version that the planner knew.
    pub conf: u64,
    /// Nodes of its voters, the one that should lead first.
    pub nodes: Vec<NodeId>,
}

/// Sums over the moves of replicas; leadership costs nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Totals {
    /// Replicas.
    pub moves: u32,
    /// Their keys.
    pub keys: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// A plan for even load. Without targets there is nothing to do.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Plan {
    /// Names it: a hash of the targets, above 0. Odd if and only if the plan takes back an earlier one.
    pub id: u64,
    /// The map that it was made for.
    pub map_version: u64,
    /// Its moves, those of replicas first.
    pub moves: Vec<PlannedMove>,
    /// The shards that are to be elsewhere, or to be led elsewhere.
    pub targets: Vec<PlannedTarget>,
    /// Sums.
    pub total: Totals,
    /// The fewest moves of replicas that any plan could do with.
    pub minimum: u32,
}

/// Why the last rebalancing can't be taken back.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum UndoError {
    /// No shard remembers where it was.
    #[error("there is no rebalancing to take back")]
    Nothing,
    /// The rebalancing hasn't ended.
    #[error("the rebalancing is still under way: cancel it first")]
    UnderWay,
    /// A node that would get replicas back can't take any.
    #[error("node {node}, which held shard {shard}, {why}")]
    NodeUnfit {
        /// The node.
        node: NodeId,
        /// A shard that it held.
        shard: ShardId,
        /// What is with it.
        why: &'static str,
    },
    /// A shard has another number of replicas by now.
    #[error("shard {shard} had {then} replicas and should have {now} now")]
    OtherCount {
        /// The shard.
        shard: ShardId,
        /// Replicas it had.
        then: usize,
        /// Replicas it should have.
        now: usize,
    },
    /// The members of a shard are changing.
    #[error("the members of shard {0} are changing")]
    Moving(ShardId),
}

/// Plans for even load: of leaders alone, or of replicas too.
pub fn plan_rebalance(map: &ClusterMap, known: &Known, leaders_only: bool) -> Plan {
    let _ = (map, known, leaders_only);
    Plan::default()
}

/// Plans the way back to where the shards were before the last rebalancing.
pub fn plan_undo(map: &ClusterMap, known: &Known) -> Result<Plan, UndoError> {
    let _ = (map, known);
    Err(UndoError::Nothing)
}
