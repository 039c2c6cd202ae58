//! The cluster map: nodes, databases, shards, and who holds which replica. It is the metadata
//! shard's content, cached by every node and client; a replica's own epoch decides in a dispute.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::ring::{self, RingRange};
use crate::ids::{ClusterId, DatabaseId, Epoch, NodeId, ReplicaId, ShardId, StoreId, generation_of};

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
    /// What the cluster has decided about it.
    pub standing: Standing,
    /// Map version at which this record last changed.
    pub changed_at: u64,
}

/// What the cluster has decided about a node. Whether the node is up is nothing to this.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash)]
pub enum Standing {
    /// An ordinary node.
    #[default]
    Member,
    /// It asked to join, and waits for an operator's word; it holds nothing.
    Pending,
    /// It gives away what it leads and holds, and gets nothing new.
    Draining,
    /// Given up: what it holds is replaced elsewhere, without its help.
    Leaving,
    /// No member any more. The id stays, so that the node is known again.
    Removed,
}

impl Standing {
    /// Whether such a node may get new replicas.
    pub fn takes_replicas(self) -> bool {
        self == Standing::Member
    }
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

/// What a member of a group may do. The incoming and the outgoing configuration differ only during a
/// joint change; then a decision takes a quorum of each (Raft dissertation, §4.3).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum MemberRole {
    /// Counts in the quorum; in both of them during a joint change.
    Voter,
    /// Receives the log without a vote.
    Learner,
    /// Counts in the incoming configuration alone: it becomes a voter.
    Incoming,
    /// Counts in the outgoing configuration alone: it leaves the group.
    Outgoing,
}

impl MemberRole {
    /// Whether it counts in any quorum.
    pub fn votes(self) -> bool {
        self != MemberRole::Learner
    }

    /// Whether it was a voter before the joint change under way, if any.
    pub fn was_voter(self) -> bool {
        matches!(self, MemberRole::Voter | MemberRole::Outgoing)
    }

    /// Whether it is a voter when the joint change under way, if any, has ended.
    pub fn stays_voter(self) -> bool {
        matches!(self, MemberRole::Voter | MemberRole::Incoming)
    }
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

/// Whether those of `members` that `counts` says are there can decide: they are a majority of the voters, and during
/// a joint change of those before and of those after it.
pub fn is_quorum(members: &[Member], counts: impl Fn(&Member) -> bool) -> bool {
    let is_majority = |votes: fn(MemberRole) -> bool| {
        let voters = members.iter().filter(|m| votes(m.role));
        let (all, there) = voters.fold((0, 0), |(all, there), m| (all + 1, there + usize::from(counts(m))));
        there > all / 2
    };
    is_majority(MemberRole::was_voter) && is_majority(MemberRole::stays_voter)
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
    /// The change of its members that is under way.
    pub moving: Option<ShardMove>,
    /// Where a rebalancing wants it, as long as it isn't there.
    pub target: Option<ShardTarget>,
    /// Where it was before the last rebalancing moved it.
    pub previous: Option<ShardTarget>,
    /// Map version at which this record last changed.
    pub changed_at: u64,
}

/// Why the members of a shard change.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum MoveCause {
    /// A plan for even load.
    Rebalance,
    /// A node is gone.
    Repair,
    /// A node is to be emptied.
    Drain,
    /// The shard has too few replicas, or too many.
    Replicas,
}

/// A change of a shard's members that is under way: replicas that come, and replicas that go for them. How far
/// it is, the members tell: the record says only what is wanted.
///
/// A node creates the replicas that `adds` places on it, as it does those of [`ShardRecord::members`], and
/// no others. It removes a replica of its own that neither names any more: ids are never used again, so none
/// comes back.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ShardMove {
    /// The map version at which it was begun.
    pub id: u64,
    /// Come as learners, and are voters in the end.
    pub adds: Vec<Member>,
    /// Voters or learners that are no members in the end.
    pub removes: Vec<ReplicaId>,
    /// It is to be rolled back, if it hasn't come to the joint change; else it ends as it was meant to.
    pub cancelling: bool,
    /// Why.
    pub cause: MoveCause,
}

/// Where a plan wants a shard, or found it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ShardTarget {
    /// The plan.
    pub plan: u64,
    /// Nodes of the voters, the one that should lead first.
    pub nodes: Vec<NodeId>,
}

/// What operators have set for the cluster as a whole.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PolicyRecord {
    /// A node that is gone for so many milliseconds is replaced; 0: never.
    pub replace_after_ms: u64,
    /// Shards whose members change at the same time.
    pub moves_at_a_time: u32,
    /// Most that a node sends in snapshots in a second; 0: no limit.
    pub bytes_per_second: u64,
    /// Replicas and leaders are spread anew when nodes come and go.
    pub automatic: bool,
    /// New nodes wait for an operator's word.
    pub approve_joins: bool,
    /// Map version at which this record last changed.
    pub changed_at: u64,
}

impl Default for PolicyRecord {
    fn default() -> PolicyRecord {
        PolicyRecord {
            replace_after_ms: 600_000,
            moves_at_a_time: 8,
            bytes_per_second: 32 << 20,
            automatic: true,
            approve_joins: false,
            changed_at: 0,
        }
    }
}

/// How a rebalancing is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum RebalanceState {
    /// There is nothing to do: the last one, if any, has ended.
    #[default]
    Idle,
    /// Moves are begun until every shard is where it should be.
    Running,
    /// None is begun.
    Paused,
    /// None is begun; those under way end or are rolled back.
    Cancelling,
    /// It can't go on.
    Failed,
}

/// The last rebalancing. How far it is, the targets of the shards tell.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct RebalanceRecord {
    /// Names the plan; 0: there never was one.
    pub plan: u64,
    /// How it is.
    pub state: RebalanceState,
    /// Replicas to move in all.
    pub moves: u32,
    /// Bytes of those, as estimated when it was planned.
    pub bytes: u64,
    /// Why it failed or was cancelled; empty otherwise.
    pub reason: String,
    /// The plan that it takes back; 0: none.
    pub undoes: u64,
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
    /// What operators have set.
    pub policy: PolicyRecord,
    /// The last rebalancing.
    pub rebalance: RebalanceRecord,
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
    /// What operators have set, if that changed.
    pub policy: Option<PolicyRecord>,
    /// The last rebalancing, if it changed.
    pub rebalance: Option<RebalanceRecord>,
}

/// Puts records into their table. Many of them at once make it anew, in one pass: put in one by one, in ascending order as
/// they come, thousands would leave its leaves half empty.
pub fn take_over<K: Ord, V>(table: &mut BTreeMap<K, V>, records: impl ExactSizeIterator<Item = (K, V)>) {
    const MANY: usize = 256;
    if records.len() >= MANY && records.len() >= table.len() / 4 {
        let before = std::mem::take(table);
        *table = before.into_iter().chain(records).collect();
    } else {
        table.extend(records);
    }
}

impl ClusterMap {
    /// Everything that changed after version `since`; everything there is if that is of an earlier generation: see
    /// [`ClusterMap::merge`].
    pub fn delta(&self, since: u64) -> MapDelta {
        let since = if generation_of(since) < generation_of(self.version) { 0 } else { since };
        MapDelta {
            cluster_id: self.cluster_id,
            since,
            version: self.version,
            nodes: self.nodes.values().filter(|n| n.changed_at > since).cloned().collect(),
            databases: self.databases.values().filter(|d| d.changed_at > since).cloned().collect(),
            shards: self.shards.values().filter(|s| s.changed_at > since).cloned().collect(),
            policy: Some(self.policy).filter(|policy| policy.changed_at > since),
            rebalance: Some(&self.rebalance).filter(|last| last.changed_at > since).cloned(),
        }
    }

    /// Takes over what `delta` tells, record by record: the one changed later wins. Returns whether
    /// anything changed. The map's version advances only if the delta leaves no gap
    /// (`delta.since <= self.version`); records of a partial delta are still taken. So deltas may come in
    /// any order and more than once. A delta of another cluster changes nothing.
    ///
    /// *Generations.* A metadata shard that has lost its majority goes on with what one replica had of the map, so
    /// versions that others know may be lost, with what they told. Its versions are of a later generation from
    /// then on. Nothing of an earlier one counts beside it: the first whole map of a later generation replaces
    /// what was known, a part of one doesn't help, and whatever comes from before is ignored.
    pub fn merge(&mut self, delta: MapDelta) -> bool {
        let mut changed = false;
        if self.cluster_id == ClusterId::default() {
            changed |= self.cluster_id != delta.cluster_id;
            self.cluster_id = delta.cluster_id;
        } else if self.cluster_id != delta.cluster_id {
            return false;
        }
        match generation_of(delta.version).cmp(&generation_of(self.version)) {
            Ordering::Less => return false,
            Ordering::Greater if delta.since > 0 => return changed,
            Ordering::Greater => {
                *self = ClusterMap { cluster_id: self.cluster_id, ..ClusterMap::default() };
            }
            Ordering::Equal => {}
        }
        macro_rules! take {
            ($field:ident) => {
                let mut newer = delta.$field;
                newer.retain(|record| {
                    self.$field.get(&record.id).is_none_or(|have| have.changed_at < record.changed_at)
                });
                changed |= !newer.is_empty();
                // Of two with one id the newest stays, whoever sends such.
                newer.sort_by_key(|record| (record.id, record.changed_at));
                take_over(&mut self.$field, newer.into_iter().map(|record| (record.id, record)));
            };
        }
        take!(nodes);
        take!(databases);
        take!(shards);
        if let Some(policy) = delta.policy
            && self.policy.changed_at < policy.changed_at
        {
            self.policy = policy;
            changed = true;
        }
        if let Some(rebalance) = delta.rebalance
            && self.rebalance.changed_at < rebalance.changed_at
        {
            self.rebalance = rebalance;
            changed = true;
        }
        if delta.since <= self.version && delta.version > self.version {
            self.version = delta.version;
            changed = true;
        }
        changed
    }

    /// Nodes whose address a later node has given as its own. Usually it runs in their place, with another
    /// identity, after their directories were lost; then they come back only if they are started at another
    /// address. But an address can be wrong, and it is not proved by being given: whether the earlier node is
    /// there, only its answers tell. A node that was removed, or waits to be accepted, is in nobody's place, and
    /// nobody in that of a removed one.
    pub fn replaced(&self) -> BTreeSet<NodeId> {
        let mut newest: HashMap<&str, NodeId> = HashMap::new();
        let mut replaced = BTreeSet::new();
        let living = self.nodes.values().filter(|node| node.standing != Standing::Removed);
        for node in living.filter(|node| !node.peer_address.is_empty()) {
            let before = newest.get(node.peer_address.as_str()).copied();
            if before.is_some() && node.standing == Standing::Pending {
                continue;
            }
            // In order of their ids, which are never used again.
            replaced.extend(before);
            newest.insert(&node.peer_address, node.id);
        }
        replaced
    }

    /// The living database of this name.
    pub fn database(&self, name: &str) -> Option<&DatabaseRecord> {
        self.databases.values().find(|d| !d.dropped && d.name == name)
    }

    /// The shard of `database` that owns `position`; binary search over its ordered ranges. `None` if the
    /// map has no record of it, which may be while only part of a delta has arrived.
    pub fn shard_at(&self, database: &DatabaseRecord, position: u64) -> Option<&ShardRecord> {
        let owner = |id: &ShardId| {
            let shard = self.shards.get(id)?;
            shard.range.contains(position).then_some(shard)
        };
        let at =
            database.shards.partition_point(|id| self.shards.get(id).is_some_and(|s| s.range.end < position));
        // A missing record misleads the search; then every shard is asked.
        (database.shards.get(at).and_then(owner)).or_else(|| database.shards.iter().find_map(owner))
    }

    /// The shard of `database` that owns `key`.
    pub fn shard_of_key(&self, database: &DatabaseRecord, key: &[u8]) -> Option<&ShardRecord> {
        self.shard_at(database, ring::position(key))
    }
}

impl ShardRecord {
    /// The node that holds `replica`.
    pub fn node_of(&self, replica: ReplicaId) -> Option<NodeId> {
        self.members.iter().find(|m| m.replica == replica).map(|m| m.node)
    }

    /// The member on `node`.
    pub fn member_on(&self, node: NodeId) -> Option<&Member> {
        self.members.iter().find(|m| m.node == node)
    }

    /// All replicas that should exist: the members, and those that a move brings.
    pub fn ordered(&self) -> impl Iterator<Item = &Member> {
        let adds = self.moving.iter().flat_map(|moving| &moving.adds);
        let new = adds.filter(|add| self.members.iter().all(|member| member.replica != add.replica));
        self.members.iter().chain(new)
    }
}

#[cfg(test)]
mod tests;
