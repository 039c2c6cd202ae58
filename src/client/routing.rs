//! Where a key's operations go: the cached cluster map and, per shard, a guess at the leader. Both may
//! be wrong at any time; answers and failures correct them. Sans-I/O: time comes from outside.
//!
//! The guess starts at the shard's first member (the planner's preference). A hint from a replica
//! moves it to the node named, unless that node has just failed to answer: a follower goes on naming a
//! dead leader until it notices. A failure moves it on to the next member. Only a failure of the node
//! that is the guess counts: late news of calls sent elsewhere change nothing.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::trouble::Troubles;
use crate::ids::{ClusterId, NodeId, ShardId};
use crate::placement::map::{ClusterMap, MapDelta, Member, ShardRecord, is_quorum};
use crate::placement::ring;

/// For so long after a failure a node isn't followed as a leader on another's word.
const SUSPECT: Duration = Duration::from_secs(1);

/// For so long it counts that a node's replica of a shard was quarantined: longer than it takes to ask all
/// the others, some of which may not answer.
const QUARANTINED: Duration = Duration::from_secs(10);

/// The shard that a key belongs to, under the map in the cache.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Route {
    /// The shard.
    pub shard: ShardId,
    /// Its range version by which this was decided.
    pub range_version: u64,
    /// Last position of its range.
    pub end: u64,
}

/// A node to ask.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Target {
    /// The node.
    pub node: NodeId,
    /// Where it listens for clients.
    pub address: String,
}

/// The cache.
#[derive(Default)]
pub struct Routing {
    map: Arc<ClusterMap>,
    /// Living databases by name; derived from the map.
    names: HashMap<String, Vec<Route>>,
    /// Where the leader of a shard is believed to be.
    leaders: HashMap<ShardId, NodeId>,
    /// When a node last failed to answer.
    failed: HashMap<NodeId, Instant>,
    troubles: Troubles,
    /// When a node last said that its replica of a shard is quarantined, and nothing else since.
    quarantined: HashMap<(ShardId, NodeId), Instant>,
}

impl Routing {
    /// The map in the cache.
    pub fn map(&self) -> &Arc<ClusterMap> {
        &self.map
    }

    /// Takes over what a node told of the map. Refuses a map of another cluster, with its id.
    pub fn learn(&mut self, delta: MapDelta) -> Result<(), ClusterId> {
        let known = self.map.cluster_id;
        if known != ClusterId::default() && delta.cluster_id != known {
            return Err(delta.cluster_id);
        }
        if Arc::make_mut(&mut self.map).merge(delta) {
            self.index();
        }
        Ok(())
    }

    /// Replaces the map, if `map` is newer. For a client inside a node, which shares the node's map.
    pub fn adopt(&mut self, map: Arc<ClusterMap>) {
        if map.version > self.map.version {
            self.map = map;
            self.index();
        }
    }

    fn index(&mut self) {
        self.names.clear();
        for database in self.map.databases.values().filter(|d| !d.dropped) {
            let mut routes = Vec::with_capacity(database.shards.len());
            // A shard that the map lacks leaves a hole, which `route` reports as no route.
            for shard in database.shards.iter().filter_map(|id| self.map.shards.get(id)) {
                routes.push(Route {
                    shard: shard.id,
                    range_version: shard.epoch.range,
                    end: shard.range.end,
                });
            }
            self.names.insert(database.name.clone(), routes);
        }
        let map = &self.map;
        self.leaders.retain(|shard, node| {
            map.shards.get(shard).is_some_and(|s| !s.dropped && s.member_on(*node).is_some())
        });
        self.failed.retain(|node, _| map.nodes.contains_key(node));
        self.troubles.retain(|shard| map.shards.get(&shard).is_some_and(|s| !s.dropped));
        self.quarantined.retain(|(shard, _), _| map.shards.get(shard).is_some_and(|s| !s.dropped));
    }

    /// Whether the map has a database of this name.
    pub fn knows(&self, database: &str) -> bool {
        self.names.contains_key(database)
    }

    /// The shard of `database` that owns `key`.
    pub fn route(&self, database: &str, key: &[u8]) -> Option<Route> {
        self.route_at(database, ring::position(key))
    }

    /// The shard of `database` that owns a position of the ring.
    pub fn route_at(&self, database: &str, position: u64) -> Option<Route> {
        let routes = self.names.get(database)?;
        let route = *routes.get(routes.partition_point(|r| r.end < position))?;
        let shard = self.map.shards.get(&route.shard)?;
        (shard.range.contains(position) && !shard.dropped).then_some(route)
    }

    /// The range version of a shard under the map in the cache.
    pub fn range_version(&self, shard: ShardId) -> Option<u64> {
        let record = self.map.shards.get(&shard)?;
        (!record.dropped).then_some(record.epoch.range)
    }

    /// The node to ask for `shard`: the believed leader, else its first member with a known address.
    pub fn target(&self, shard: ShardId) -> Option<Target> {
        let record = self.map.shards.get(&shard)?;
        let guess = self.leaders.get(&shard).copied();
        let members = record.members.iter().map(|m| m.node);
        guess.into_iter().chain(members).find_map(|node| self.target_at(node))
    }

    /// Whether another node than `node` may be asked for `shard`.
    pub fn has_others(&self, shard: ShardId, node: NodeId) -> bool {
        let record = self.map.shards.get(&shard);
        record.is_some_and(|record| {
            record.members.iter().any(|m| m.node != node && self.target_at(m.node).is_some())
        })
    }

    /// `node` didn't serve `shard`, and why, for [`Routing::told`].
    pub fn trouble(&mut self, shard: ShardId, node: NodeId, why: &str, now: Instant) {
        if self.map.shards.contains_key(&shard) {
            self.troubles.add(shard, node, why, now);
        }
    }

    /// What to tell a person of a shard that doesn't serve, if that is more than the failure of one node.
    pub fn told(&self, shard: ShardId, now: Instant) -> Option<String> {
        let address = |node| self.target_at(node).map_or("an unknown address".into(), |t| t.address);
        self.troubles.tell(shard, now, address)
    }

    fn target_at(&self, node: NodeId) -> Option<Target> {
        let address = &self.map.nodes.get(&node)?.client_address;
        (!address.is_empty()).then(|| Target { node, address: address.clone() })
    }

    /// Addresses of all nodes in the map.
    pub fn addresses(&self) -> impl Iterator<Item = &str> {
        let addresses = self.map.nodes.values().map(|n| n.client_address.as_str());
        addresses.filter(|address| !address.is_empty())
    }

    /// `node` answered as the leader of `shard`.
    pub fn succeeded(&mut self, shard: ShardId, node: NodeId) {
        if self.leaders.get(&shard) != Some(&node) {
            self.leaders.insert(shard, node);
        }
        if !self.failed.is_empty() {
            self.failed.remove(&node);
        }
        self.troubles.over(shard);
        // It serves, so whatever was said of its replicas is old.
        if !self.quarantined.is_empty() {
            self.quarantined.retain(|(of, _), _| *of != shard);
        }
    }

    /// `node` says that it doesn't lead `shard`, and perhaps who does.
    pub fn not_leader(&mut self, shard: ShardId, node: NodeId, hint: Option<NodeId>, now: Instant) {
        self.failed.remove(&node);
        self.isnt_quarantined(shard, node);
        let Some(record) = self.map.shards.get(&shard) else {
            return;
        };
        let follow = hint
            .filter(|hint| *hint != node && record.member_on(*hint).is_some() && !self.suspect(*hint, now));
        match follow {
            Some(leader) => {
                self.leaders.insert(shard, leader);
            }
            None => self.rotate(shard, node),
        }
    }

    /// `node` can't serve `shard` now, though it answers.
    pub fn unavailable(&mut self, shard: ShardId, node: NodeId) {
        self.isnt_quarantined(shard, node);
        self.rotate(shard, node);
    }

    /// `node` could not be reached, or didn't answer in time.
    pub fn unreachable(&mut self, shard: ShardId, node: NodeId, now: Instant) {
        self.failed.insert(node, now);
        // It may be on its way back with a replica in its next life.
        self.isnt_quarantined(shard, node);
        self.rotate(shard, node);
    }

    /// `node` says that its replica of `shard` is quarantined. Whether so many have said so lately, and
    /// nothing else since, that the others are no majority: then nobody can serve the shard.
    pub fn quarantined(&mut self, shard: ShardId, node: NodeId, now: Instant) -> bool {
        self.quarantined.insert((shard, node), now);
        self.rotate(shard, node);
        let Some(record) = self.map.shards.get(&shard) else {
            return false;
        };
        let lately = |said: &Instant| now.saturating_duration_since(*said) < QUARANTINED;
        let is_lost = |m: &Member| self.quarantined.get(&(shard, m.node)).is_some_and(lately);
        !is_quorum(&record.members, |member| !is_lost(member))
    }

    fn isnt_quarantined(&mut self, shard: ShardId, node: NodeId) {
        if !self.quarantined.is_empty() {
            self.quarantined.remove(&(shard, node));
        }
    }

    fn suspect(&self, node: NodeId, now: Instant) -> bool {
        let failed = self.failed.get(&node);
        failed.is_some_and(|at| now.saturating_duration_since(*at) < SUSPECT)
    }

    /// Moves the guess from `node`, if that is the guess, to the next member with an address.
    fn rotate(&mut self, shard: ShardId, node: NodeId) {
        let Some(record) = self.map.shards.get(&shard) else {
            return;
        };
        if self.target(shard).is_some_and(|t| t.node != node) {
            return;
        }
        if let Some(next) = next_member(record, node, |n| self.target_at(n).is_some()) {
            self.leaders.insert(shard, next);
        }
    }
}

fn next_member(record: &ShardRecord, node: NodeId, usable: impl Fn(NodeId) -> bool) -> Option<NodeId> {
    let count = record.members.len();
    let at = record.members.iter().position(|m| m.node == node);
    let first = at.map_or(0, |at| at + 1);
    (0..count).map(|step| record.members[(first + step) % count].node).find(|n| usable(*n))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{DatabaseId, Epoch, RandomId, ReplicaId};
    use crate::placement::map::{DatabaseRecord, Member, MemberRole, NodeRecord};
    use crate::placement::ring::RingRange;
    use proptest::prelude::*;

    const SHARD: ShardId = ShardId(1);

    fn node(id: u64) -> NodeRecord {
        NodeRecord {
            id: NodeId(id),
            label: String::new(),
            client_address: format!("n{id}:1"),
            peer_address: String::new(),
            zone: String::new(),
            weight: 100,
            store_id: RandomId::default(),
            standing: Default::default(),
            changed_at: 1,
        }
    }

    fn shard(id: u64, start: u64, end: u64, nodes: &[u64]) -> ShardRecord {
        let members = nodes.iter().map(|n| Member {
            replica: ReplicaId(id * 10 + n),
            node: NodeId(*n),
            role: MemberRole::Voter,
        });
        ShardRecord {
            id: ShardId(id),
            database: DatabaseId(1),
            range: RingRange { start, end },
            epoch: Epoch { range: 1, conf: 1 },
            members: members.collect(),
            dropped: false,
            moving: None,
            target: None,
            previous: None,
            changed_at: 1,
        }
    }

    fn delta() -> MapDelta {
        let half = u64::MAX / 2;
        MapDelta {
            cluster_id: RandomId([7; 16]),
            since: 0,
            version: 1,
            nodes: vec![node(1), node(2), node(3)],
            databases: vec![DatabaseRecord {
                id: DatabaseId(1),
                name: "db".into(),
                replicas: 3,
                shards: vec![ShardId(1), ShardId(2)],
                dropped: false,
                changed_at: 1,
            }],
            shards: vec![shard(1, 0, half, &[1, 2, 3]), shard(2, half + 1, u64::MAX, &[2, 3, 1])],
            policy: None,
            rebalance: None,
        }
    }

    fn routing() -> Routing {
        let mut routing = Routing::default();
        routing.learn(delta()).unwrap();
        routing
    }

    fn guess(routing: &Routing) -> u64 {
        routing.target(SHARD).unwrap().node.0
    }

    #[test]
    fn a_shard_is_quarantined_when_a_majority_says_so_and_nothing_else_since() {
        let (mut routing, now) = (routing(), Instant::now());
        let node = NodeId;
        assert!(!routing.quarantined(SHARD, node(1), now));
        assert_eq!(guess(&routing), 2, "others may serve");
        assert!(!routing.quarantined(SHARD, node(1), now), "the same one again");
        assert!(!routing.quarantined(ShardId(2), node(2), now), "another shard");
        assert!(routing.quarantined(SHARD, node(2), now));
        // One of them is back: it leads, follows, starts, or doesn't answer.
        let back: [fn(&mut Routing, Instant); 5] = [
            |routing, _| routing.succeeded(SHARD, NodeId(1)),
            |routing, _| routing.succeeded(SHARD, NodeId(3)),
            |routing, now| routing.not_leader(SHARD, NodeId(1), None, now),
            |routing, _| routing.unavailable(SHARD, NodeId(1)),
            |routing, now| routing.unreachable(SHARD, NodeId(1), now),
        ];
        for news in back {
            routing.quarantined(SHARD, node(1), now);
            news(&mut routing, now);
            assert!(!routing.quarantined(SHARD, node(2), now));
        }
        routing.quarantined(SHARD, node(1), now);
        assert!(!routing.quarantined(SHARD, node(2), now + QUARANTINED), "what was said long ago");
    }

    #[test]
    fn keys_find_their_shard_and_its_first_member() {
        let routing = routing();
        assert_eq!(routing.route_at("db", 0).unwrap().shard, ShardId(1));
        assert_eq!(routing.route_at("db", u64::MAX / 2).unwrap().shard, ShardId(1));
        assert_eq!(routing.route_at("db", u64::MAX / 2 + 1).unwrap().shard, ShardId(2));
        assert_eq!(routing.route_at("db", u64::MAX).unwrap().shard, ShardId(2));
        assert_eq!(routing.route("none", b"a"), None);
        assert_eq!(routing.target(ShardId(2)).unwrap().address, "n2:1");
        assert_eq!(routing.target(ShardId(9)), None);
    }

    #[test]
    fn hints_are_followed_and_failures_rotate() {
        let now = Instant::now();
        let mut r = routing();
        r.not_leader(SHARD, NodeId(1), Some(NodeId(3)), now);
        assert_eq!(guess(&r), 3);
        // News about a node that is no longer the guess changes nothing.
        r.unreachable(SHARD, NodeId(1), now);
        assert_eq!(guess(&r), 3);
        r.unreachable(SHARD, NodeId(3), now);
        assert_eq!(guess(&r), 1);
        // Node 2 goes on naming the dead leader: not followed until the suspicion is over.
        r.unavailable(SHARD, NodeId(1));
        assert_eq!(guess(&r), 2);
        r.not_leader(SHARD, NodeId(2), Some(NodeId(3)), now);
        assert_eq!(guess(&r), 3, "the next member, not the hint");
        r.unreachable(SHARD, NodeId(3), now);
        r.not_leader(SHARD, NodeId(1), Some(NodeId(3)), now);
        assert_eq!(guess(&r), 2, "still suspect");
        r.not_leader(SHARD, NodeId(2), Some(NodeId(3)), now + SUSPECT);
        assert_eq!(guess(&r), 3);
        // A node that answered isn't suspect.
        r.unreachable(SHARD, NodeId(3), now);
        r.succeeded(ShardId(2), NodeId(3));
        r.not_leader(SHARD, NodeId(1), Some(NodeId(3)), now);
        assert_eq!(guess(&r), 3);
    }

    #[test]
    fn strangers_and_unknown_hints_rotate() {
        let now = Instant::now();
        let mut r = routing();
        r.not_leader(SHARD, NodeId(1), Some(NodeId(99)), now);
        assert_eq!(guess(&r), 2);
        r.not_leader(SHARD, NodeId(2), Some(NodeId(2)), now);
        assert_eq!(guess(&r), 3);
        r.not_leader(SHARD, NodeId(3), None, now);
        assert_eq!(guess(&r), 1);
    }

    #[test]
    fn a_fresh_record_heals_the_cache() {
        let mut r = routing();
        r.succeeded(SHARD, NodeId(3));
        let mut moved = shard(1, 0, u64::MAX / 2, &[1, 2]);
        moved.epoch.range = 4;
        moved.changed_at = 5;
        let partial = MapDelta {
            shards: vec![moved],
            databases: vec![],
            nodes: vec![],
            since: 4,
            version: 5,
            ..delta()
        };
        r.learn(partial).unwrap();
        assert_eq!(guess(&r), 1, "node 3 holds no replica any more");
        assert_eq!(r.route_at("db", 0).unwrap().range_version, 4);
        assert_eq!(r.map().version, 1, "a partial delta leaves a gap");
        let foreign = MapDelta { cluster_id: RandomId([8; 16]), ..delta() };
        assert_eq!(r.learn(foreign), Err(RandomId([8; 16])));
    }

    #[test]
    fn a_dropped_database_has_no_route() {
        let mut r = routing();
        let mut change = delta();
        change.databases[0].dropped = true;
        change.databases[0].changed_at = 2;
        change.version = 2;
        r.learn(change).unwrap();
        assert!(!r.knows("db"));
        assert_eq!(r.route("db", b"a"), None);
    }

    proptest! {
        /// Whatever happens, there is a member to ask; and failures in a row reach every member.
        #[test]
        fn always_a_target_and_every_member_in_turn(
            steps in prop::collection::vec((0u8..4, 1u64..5, prop::option::of(1u64..6), 0u64..3000), 0..40)
        ) {
            let start = Instant::now();
            let mut r = routing();
            for (what, node, hint, ms) in steps {
                let (node, now) = (NodeId(node), start + Duration::from_millis(ms));
                match what {
                    0 => r.not_leader(SHARD, node, hint.map(NodeId), now),
                    1 => r.unreachable(SHARD, node, now),
                    2 => r.unavailable(SHARD, node),
                    _ => if node.0 <= 3 { r.succeeded(SHARD, node) },
                }
                prop_assert!((1..=3).contains(&guess(&r)));
            }
            let mut seen = std::collections::BTreeSet::new();
            for _ in 0..3 {
                let target = r.target(SHARD).unwrap().node;
                seen.insert(target);
                r.unreachable(SHARD, target, start);
            }
            prop_assert_eq!(seen.len(), 3);
        }
    }
}
