//! The cluster map: nodes, databases, shards, and who holds which replica. It is the metadata
//! shard's content, cached by every node and client; a replica's own epoch decides in a dispute.

use std::collections::BTreeMap;

use super::ring::RingRange;
use crate::ids::{ClusterId, DatabaseId, Epoch, NodeId, ReplicaId, ShardId, StoreId};

/// One process of the cluster as the metadata shard knows it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NodeRecord {
    /// Its id.
    pub id: NodeId,
    /// The operator's name for it; no meaning to the cluster.
    pub label: String,
    /// HOST:PORT that clients dial.
    pub client_address: String,
    /// HOST:PORT that other nodes dial.
    pub peer_address: String,
    /// Failure domain; empty if none was given.
    pub zone: String,
    /// Share of replicas relative to other nodes; 100 is ordinary.
    pub weight: u32,
    /// Identity of its data directory.
    pub store_id: StoreId,
    /// Map version at which this record last changed.
    pub changed_at: u64,
}

/// A database and its shards.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DatabaseRecord {
    /// Its id.
    pub id: DatabaseId,
    /// Its name, unique among the databases that are not dropped.
    pub name: String,
    /// Voters that each shard should have.
    pub replicas: u32,
    /// Its shards in ascending order of their ranges.
    pub shards: Vec<ShardId>,
    /// Whether it was dropped.
    pub dropped: bool,
    /// Map version at which this record last changed.
    pub changed_at: u64,
}

/// What a member of a group may do.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum MemberRole {
    /// Counts in the quorum.
    Voter,
    /// Receives the log without a vote.
    Learner,
}

/// One replica of a shard and the node that holds it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Member {
    /// The raft id.
    pub replica: ReplicaId,
    /// The node that holds it.
    pub node: NodeId,
    /// Its role.
    pub role: MemberRole,
}

/// A shard: its range, epoch and members.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ShardRecord {
    /// Its id.
    pub id: ShardId,
    /// The database it belongs to.
    pub database: DatabaseId,
    /// The part of the ring it owns.
    pub range: RingRange,
    /// Versions of range and membership.
    pub epoch: Epoch,
    /// Its replicas.
    pub members: Vec<Member>,
    /// Whether its database was dropped.
    pub dropped: bool,
    /// Map version at which this record last changed.
    pub changed_at: u64,
}

/// The cluster map at one version. Dropped records stay, so that deltas can tell of them.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ClusterMap {
    /// Identity of the cluster.
    pub cluster_id: ClusterId,
    /// Grows with every change.
    pub version: u64,
    /// Nodes by id.
    pub nodes: BTreeMap<NodeId, NodeRecord>,
    /// Databases by id.
    pub databases: BTreeMap<DatabaseId, DatabaseRecord>,
    /// Shards by id.
    pub shards: BTreeMap<ShardId, ShardRecord>,
}

/// What changed in a [`ClusterMap`] after a version.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct MapDelta {
    /// Identity of the cluster.
    pub cluster_id: ClusterId,
    /// The version it builds on; 0: it is the whole map.
    pub since: u64,
    /// The version after applying it.
    pub version: u64,
    /// Changed nodes.
    pub nodes: Vec<NodeRecord>,
    /// Changed databases.
    pub databases: Vec<DatabaseRecord>,
    /// Changed shards.
    pub shards: Vec<ShardRecord>,
}

impl ClusterMap {
    /// Everything that changed after version `since`.
    pub fn delta(&self, since: u64) -> MapDelta {
        MapDelta {
            cluster_id: self.cluster_id,
            since,
            version: self.version,
            nodes: self
                .nodes
                .values()
                .filter(|n| n.changed_at > since)
                .cloned()
                .collect(),
            databases: self
                .databases
                .values()
                .filter(|d| d.changed_at > since)
                .cloned()
                .collect(),
            shards: self
                .shards
                .values()
                .filter(|s| s.changed_at > since)
                .cloned()
                .collect(),
        }
    }

    /// Takes over what `delta` tells, record by record: the one changed later wins. Returns whether
    /// anything changed. The map's version advances only if the delta leaves no gap
    /// (`delta.since <= self.version`); records of a partial delta are still taken.
    pub fn merge(&mut self, delta: MapDelta) -> bool {
        let mut changed = false;
        macro_rules! take {
            ($field:ident) => {
                for record in delta.$field {
                    if self
                        .$field
                        .get(&record.id)
                        .is_none_or(|have| have.changed_at < record.changed_at)
                    {
                        self.$field.insert(record.id, record);
                        changed = true;
                    }
                }
            };
        }
        take!(nodes);
        take!(databases);
        take!(shards);
        if delta.since <= self.version && delta.version > self.version {
            self.version = delta.version;
            changed = true;
        }
        if self.cluster_id == ClusterId::default() {
            self.cluster_id = delta.cluster_id;
        }
        changed
    }

    /// The living database of this name.
    pub fn database(&self, name: &str) -> Option<&DatabaseRecord> {
        self.databases
            .values()
            .find(|d| !d.dropped && d.name == name)
    }

    /// The shard of `database` that owns `position`; binary search over its ordered ranges.
    pub fn shard_at(&self, database: &DatabaseRecord, position: u64) -> Option<&ShardRecord> {
        let at = database
            .shards
            .partition_point(|id| self.shards.get(id).is_some_and(|s| s.range.end < position));
        let shard = self.shards.get(database.shards.get(at)?)?;
        shard.range.contains(position).then_some(shard)
    }
}

impl ShardRecord {
    /// The node that holds `replica`.
    pub fn node_of(&self, replica: ReplicaId) -> Option<NodeId> {
        self.members
            .iter()
            .find(|m| m.replica == replica)
            .map(|m| m.node)
    }

    /// The member on `node`.
    pub fn member_on(&self, node: NodeId) -> Option<&Member> {
        self.members.iter().find(|m| m.node == node)
    }
}
