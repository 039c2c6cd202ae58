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
                for record in delta.$field {
                    if self.$field.get(&record.id).is_none_or(|have| have.changed_at < record.changed_at) {
                        self.$field.insert(record.id, record);
                        changed = true;
                    }
                }
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
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn node(id: u64, changed_at: u64) -> NodeRecord {
        NodeRecord {
            id: NodeId(id),
            label: format!("n{id} of {changed_at}"),
            client_address: String::new(),
            peer_address: String::new(),
            zone: String::new(),
            weight: 100,
            store_id: StoreId::default(),
            standing: Standing::Member,
            changed_at,
        }
    }

    fn database(id: u64, changed_at: u64, shards: Vec<ShardId>) -> DatabaseRecord {
        DatabaseRecord {
            id: DatabaseId(id),
            name: format!("db{id}"),
            replicas: 1,
            shards,
            dropped: false,
            changed_at,
        }
    }

    fn shard(id: u64, changed_at: u64, range: RingRange) -> ShardRecord {
        ShardRecord {
            id: ShardId(id),
            database: DatabaseId(1),
            range,
            epoch: Epoch { range: 1, conf: 1 },
            members: Vec::new(),
            dropped: false,
            moving: None,
            target: None,
            previous: None,
            changed_at,
        }
    }

    /// A map whose version 1, 2, … each came from changing the record that `changes` names.
    fn history(changes: &[u64]) -> Vec<ClusterMap> {
        let mut map =
            ClusterMap { cluster_id: ClusterId::from_slice(&[7; 16]).unwrap(), ..ClusterMap::default() };
        let mut versions = vec![map.clone()];
        for (version, change) in (1..).zip(changes) {
            map.version = version;
            match change % 3 {
                0 => drop(map.nodes.insert(NodeId(*change), node(*change, version))),
                1 => {
                    let record = database(*change, version, vec![ShardId(version)]);
                    map.databases.insert(DatabaseId(*change), record);
                }
                _ => {
                    let record = shard(*change, version, RingRange::ALL);
                    map.shards.insert(ShardId(*change), record);
                }
            }
            versions.push(map.clone());
        }
        versions
    }

    fn with_ranges(shards: u32) -> ClusterMap {
        let mut map = ClusterMap::default();
        let ids: Vec<_> = (1..=u64::from(shards)).map(ShardId).collect();
        for (id, range) in ids.iter().zip(ring::equal_ranges(shards)) {
            map.shards.insert(*id, shard(id.0, 1, range));
        }
        map.databases.insert(DatabaseId(1), database(1, 1, ids));
        map
    }

    #[test]
    fn a_delta_of_another_cluster_is_ignored() {
        let mut map = history(&[3, 4]).pop().unwrap();
        let mut foreign = history(&[6, 7, 8]).pop().unwrap().delta(0);
        foreign.cluster_id = ClusterId::from_slice(&[8; 16]).unwrap();
        let before = map.clone();
        assert!(!map.merge(foreign));
        assert_eq!(map, before);
    }

    #[test]
    fn a_gap_holds_the_version_back() {
        let versions = history(&[3, 4, 5]);
        let mut map = versions[1].clone();
        assert!(map.merge(versions[3].delta(2)));
        assert_eq!((map.version, map.shards.len()), (1, 1));
        assert!(map.merge(versions[3].delta(1)));
        assert_eq!(map, versions[3]);
        assert!(!map.merge(versions[3].delta(1)));
    }

    #[test]
    fn a_map_of_a_later_generation_replaces_what_was_known() {
        let known = history(&[3, 4, 5, 6]).pop().unwrap();
        // Went on from version 2, and has come to its third version since.
        let mut later = history(&[3, 4, 7]).pop().unwrap();
        later.version = (1 << 32) + 2;
        for record in later.nodes.values_mut() {
            record.changed_at = 1 << 32;
        }
        let mut map = known.clone();
        let part = MapDelta { since: 1 << 32, ..later.delta(1 << 32) };
        assert!(!map.merge(part), "it tells too little");
        assert_eq!(map, known);
        // Asked for what came after a version that is lost, it tells everything.
        let whole = later.delta(known.version);
        assert_eq!(whole.since, 0);
        assert!(map.merge(whole.clone()));
        assert_eq!(map, later, "nothing of what was lost is left");
        assert!(!map.merge(whole));
        for old in [known.delta(0), known.delta(known.version - 1)] {
            assert!(!map.merge(old));
        }
        assert_eq!(map, later);
        let ahead = known.delta(later.version);
        assert_eq!((ahead.nodes.len(), ahead.shards.len()), (0, 0));
    }

    #[test]
    fn only_a_living_database_is_found_by_name() {
        let mut map = with_ranges(1);
        assert_eq!(map.database("db1").unwrap().id, DatabaseId(1));
        map.databases.get_mut(&DatabaseId(1)).unwrap().dropped = true;
        assert_eq!(map.database("db1"), None);
        let mut again = database(2, 2, vec![]);
        again.name = "db1".into();
        map.databases.insert(again.id, again);
        assert_eq!(map.database("db1").unwrap().id, DatabaseId(2));
    }

    #[test]
    fn a_node_is_replaced_by_the_next_at_its_address_that_was_not_removed() {
        let at = |id: u64, standing| NodeRecord { peer_address: "p:1".into(), standing, ..node(id, 1) };
        let replaced = |nodes: &[NodeRecord]| {
            let nodes = nodes.iter().map(|node| (node.id, node.clone())).collect();
            ClusterMap { nodes, ..ClusterMap::default() }
                .replaced()
                .into_iter()
                .map(|id| id.0)
                .collect::<Vec<_>>()
        };
        let first = at(1, Standing::Member);
        assert_eq!(replaced(&[first.clone(), at(2, Standing::Member), at(3, Standing::Leaving)]), [1, 2]);
        // Anybody may ask to be accepted, and name any address.
        assert!(replaced(&[first.clone(), at(2, Standing::Pending)]).is_empty());
        assert_eq!(replaced(&[first.clone(), at(2, Standing::Pending), at(3, Standing::Member)]), [1]);
        assert_eq!(replaced(&[at(1, Standing::Pending), at(2, Standing::Member)]), [1]);
        assert!(replaced(&[first, at(2, Standing::Removed)]).is_empty());
        assert!(replaced(&[at(1, Standing::Removed), at(2, Standing::Member)]).is_empty());
    }

    #[test]
    fn a_missing_record_hides_only_its_own_range() {
        for missing in 1..=8 {
            let mut map = with_ranges(8);
            map.shards.remove(&ShardId(missing));
            for (id, range) in (1..).zip(ring::equal_ranges(8)) {
                let found = map.shard_at(&map.databases[&DatabaseId(1)], range.end);
                assert_eq!(found.map(|s| s.id.0), (id != missing).then_some(id));
            }
        }
    }

    proptest! {
        #[test]
        fn each_position_has_the_shard_whose_range_holds_it(shards in 1..300_u32, position: u64) {
            let map = with_ranges(shards);
            let found = map.shard_at(&map.databases[&DatabaseId(1)], position).unwrap();
            let holders = map.shards.values().filter(|s| s.range.contains(position));
            prop_assert_eq!(holders.map(|s| s.id).collect::<Vec<_>>(), [found.id]);
        }

        #[test]
        fn deltas_in_any_order_converge(
            changes in prop::collection::vec(0..9_u64, 1..30),
            picks in prop::collection::vec(any::<(prop::sample::Index, prop::sample::Index)>(), 0..20),
        ) {
            let versions = history(&changes);
            let mut map = ClusterMap::default();
            for (since, version) in picks {
                let since = since.index(versions.len()) as u64;
                let before = map.version;
                map.merge(version.get(&versions).delta(since));
                // What the map says it knows, it knows: no record is older than its version allows.
                prop_assert!(map.version >= before);
                for record in versions[map.version as usize].nodes.values() {
                    prop_assert!(map.nodes[&record.id].changed_at >= record.changed_at);
                }
            }
            let newest = versions.last().unwrap();
            map.merge(newest.delta(map.version));
            prop_assert_eq!(&map, newest);
        }
    }
}
