use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::ids::{DatabaseId, Epoch, RandomId, ReplicaId};
use crate::placement::map::{DatabaseRecord, MemberRole, MoveCause, NodeRecord, ShardMove};
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
    let partial =
        MapDelta { shards: vec![moved], databases: vec![], nodes: vec![], since: 4, version: 5, ..delta() };
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

fn role(of: u8) -> MemberRole {
    [MemberRole::Voter, MemberRole::Learner, MemberRole::Incoming, MemberRole::Outgoing][usize::from(of) % 4]
}

#[test]
fn learners_and_nodes_that_are_gone_come_last_or_never() {
    let now = Instant::now();
    let mut r = Routing::default();
    let mut change = delta();
    change.nodes.extend([node(4), node(5)]);
    change.nodes[0].standing = Standing::Leaving;
    change.nodes[3].standing = Standing::Removed;
    change.shards[0] = shard(1, 0, u64::MAX / 2, &[1, 2, 3, 4]);
    change.shards[0].members[1].role = MemberRole::Learner;
    let adds = vec![Member { replica: ReplicaId(15), node: NodeId(5), role: MemberRole::Learner }];
    change.shards[0].moving =
        Some(ShardMove { id: 1, adds, removes: vec![], cancelling: false, cause: MoveCause::Drain });
    r.learn(change.clone()).unwrap();
    // Node 1 is given up, 2 learns, 4 is removed, 5 is to get a replica.
    assert_eq!(guess(&r), 3);
    r.unreachable(SHARD, NodeId(3), now);
    assert_eq!(guess(&r), 1);
    r.unreachable(SHARD, NodeId(1), now);
    assert_eq!(guess(&r), 3);
    assert!(r.has_others(SHARD, NodeId(3)));
    r.not_leader(SHARD, NodeId(3), Some(NodeId(4)), now);
    assert_eq!(guess(&r), 1, "a removed node is not followed");
    r.not_leader(SHARD, NodeId(1), Some(NodeId(5)), now);
    assert_eq!(guess(&r), 5, "it may lead before the map has heard that it is a member");
    r.unavailable(SHARD, NodeId(5));
    assert_eq!(guess(&r), 3);
    // Late news of a node that has no part in the shard any more.
    r.succeeded(SHARD, NodeId(4));
    assert_eq!(guess(&r), 3);
    assert_eq!(r.addresses().collect::<Vec<_>>(), ["n1:1", "n2:1", "n3:1", "n5:1"]);
    assert!(r.is_abandoned("n4:1") && !r.is_abandoned("n1:1") && !r.is_abandoned("elsewhere:1"));

    // Nobody votes under this map: the learner may, by now.
    for node in &mut change.nodes {
        node.standing = if node.id.0 == 2 { Standing::Member } else { Standing::Removed };
        node.changed_at = 2;
    }
    r.learn(change).unwrap();
    assert_eq!(guess(&r), 2);
    assert!(!r.has_others(SHARD, NodeId(2)));
}

#[test]
fn during_a_joint_change_both_majorities_are_needed() {
    let now = Instant::now();
    // Voters 1 and 2; 3 goes, 4 comes: {1, 2, 3} and {1, 2, 4}.
    let joint = || {
        let mut change = delta();
        change.nodes.extend([node(4)]);
        change.shards[0] = shard(1, 0, u64::MAX / 2, &[1, 2, 3, 4]);
        change.shards[0].members[2].role = MemberRole::Outgoing;
        change.shards[0].members[3].role = MemberRole::Incoming;
        let mut routing = Routing::default();
        routing.learn(change).unwrap();
        routing
    };
    for (first, second, all) in [(3, 4, false), (1, 4, true), (1, 3, true), (1, 2, true)] {
        let mut r = joint();
        assert!(!r.quarantined(SHARD, NodeId(first), now));
        assert_eq!(r.quarantined(SHARD, NodeId(second), now), all, "{first} and {second}");
    }
}

/// What a delta says of a shard: replicas by node and role, and those that a move brings.
type Told = (Vec<(u64, u8)>, Vec<u64>);

proptest! {
    /// Whatever is learned and happens, in whatever order: who is asked has a replica under the newest map, or
    /// gets one, and belongs to the cluster. A learner is asked only if it was named since the map has changed, or
    /// if nobody votes.
    #[test]
    fn only_those_are_asked_who_have_a_part_in_the_shard(
        steps in prop::collection::vec(
            prop_oneof![
                (prop::collection::btree_map(1u64..7, 0u8..4, 0..5), prop::collection::vec(1u64..7, 0..3))
                    .prop_map(|(members, adds)| Ok((members.into_iter().collect(), adds))),
                (0u8..6, 1u64..8, prop::option::of(1u64..8), 0u64..3000).prop_map(Err),
            ],
            1..60,
        ),
    ) {
        let start = Instant::now();
        let mut r = routing();
        r.learn(MapDelta { nodes: (4..=6).map(node).collect(), since: 1, ..delta() }).unwrap();
        let (mut version, mut named) = (1, BTreeSet::new());
        for step in steps {
            match step {
                Ok(told) => {
                    version += 1;
                    named.clear();
                    let (members, adds): Told = told;
                    let mut record = shard(1, 0, u64::MAX / 2, &members.iter().map(|m| m.0).collect::<Vec<_>>());
                    for (member, (_, of)) in record.members.iter_mut().zip(members) {
                        member.role = role(of);
                    }
                    let adds = adds.iter().map(|node| Member {
                        replica: ReplicaId(100 * version + node), node: NodeId(*node), role: MemberRole::Learner,
                    });
                    record.moving = Some(ShardMove {
                        id: version, adds: adds.collect(), removes: vec![], cancelling: false, cause: MoveCause::Drain,
                    });
                    record.changed_at = version;
                    let change = MapDelta {
                        shards: vec![record], nodes: vec![], databases: vec![], since: version - 1, version, ..delta()
                    };
                    r.learn(change).unwrap();
                }
                Err((what, of, hint, ms)) => {
                    let now = start + Duration::from_millis(ms);
                    match what {
                        0 => {
                            named.extend(hint);
                            r.not_leader(SHARD, NodeId(of), hint.map(NodeId), now)
                        }
                        1 => r.unreachable(SHARD, NodeId(of), now),
                        2 => r.unavailable(SHARD, NodeId(of)),
                        3 => {
                            named.insert(of);
                            r.succeeded(SHARD, NodeId(of));
                        }
                        _ => {
                            let standing = [Standing::Removed, Standing::Pending, Standing::Leaving,
                                Standing::Draining, Standing::Member][ms as usize % 5];
                            version += 1;
                            let changed = NodeRecord { standing, changed_at: version, ..node(of.min(6)) };
                            let change = MapDelta {
                                shards: vec![], nodes: vec![changed], databases: vec![], since: version - 1, version,
                                ..delta()
                            };
                            r.learn(change).unwrap();
                        }
                    }
                }
            }
            let map = r.map().clone();
            let record = &map.shards[&SHARD];
            let asks = |node: NodeId| {
                let known = map.nodes.get(&node);
                known.is_some_and(|n| !matches!(n.standing, Standing::Removed | Standing::Pending))
            };
            let voters: BTreeSet<_> =
                record.members.iter().filter(|m| m.role.votes() && asks(m.node)).map(|m| m.node).collect();
            match r.target(SHARD) {
                Some(target) => {
                    prop_assert!(record.ordered().any(|m| m.node == target.node), "{target:?} of {record:?}");
                    prop_assert!(asks(target.node), "{target:?} is no part of the cluster");
                    let votes = voters.contains(&target.node);
                    prop_assert!(votes || voters.is_empty() || named.contains(&target.node.0), "{target:?}");
                }
                None => prop_assert!(voters.is_empty()),
            }
            // Failures in a row lead to every voter.
            let mut seen = BTreeSet::new();
            for _ in 0..=voters.len() {
                let Some(target) = r.target(SHARD) else { break };
                seen.insert(target.node);
                r.unavailable(SHARD, target.node);
            }
            prop_assert!(voters.is_subset(&seen), "{seen:?} of {voters:?}");
        }
    }
}

/// What is derived from the map.
fn derived(routing: &Routing) -> (BTreeMap<&String, &Routes>, BTreeMap<&ShardId, &NodeId>) {
    (routing.names.iter().collect(), routing.leaders.iter().collect())
}

/// A random change of a map with three databases of four shards each; a few have names of others that are dropped.
fn change(map: &mut ClusterMap, (what, of, how): (u8, u64, u64)) {
    map.version += 1;
    let version = map.version;
    let database = 1 + of % 3;
    match what % 5 {
        0 => {
            let shards = (0..4).map(|n| ShardId(database * 4 + n)).collect();
            let (id, name) = (DatabaseId(database), format!("db{}", how % 2));
            let dropped = how % 3 == 0;
            // No two living databases have one name.
            let taken = map.databases.values().any(|d| !d.dropped && d.name == name && d.id != id);
            let record = DatabaseRecord {
                id,
                name,
                replicas: 3,
                shards,
                dropped: dropped || taken,
                changed_at: version,
            };
            map.databases.insert(id, record);
        }
        1 | 2 => {
            let quarter = u64::MAX / 4;
            let n = of % 4;
            let end = if n == 3 { u64::MAX } else { (n + 1) * quarter + how % 2 };
            let mut record = shard(database * 4 + n, n * quarter, end, &[1 + how % 4, 1 + (how + 1) % 4]);
            record.database = DatabaseId(database);
            record.epoch = Epoch { range: 1 + how % 2, conf: version };
            record.dropped = how % 7 == 0;
            record.changed_at = version;
            map.shards.insert(record.id, record);
        }
        3 => {
            let mut record = node(1 + of % 4);
            record.standing = if how % 2 == 0 { Standing::Member } else { Standing::Removed };
            record.changed_at = version;
            map.nodes.insert(record.id, record);
        }
        _ => map.version -= 1,
    }
}

proptest! {
    #[test]
    fn a_part_of_the_map_is_taken_over_as_the_whole_would_be(
        changes in prop::collection::vec((any::<u8>(), any::<u64>(), any::<u64>()), 1..60),
        leaders in prop::collection::vec((4..16_u64, 1..5_u64), 0..20),
    ) {
        let mut routing = Routing::default();
        let mut map = ClusterMap { cluster_id: RandomId([7; 16]), version: 1, ..ClusterMap::default() };
        (1..5).for_each(|id| drop(map.nodes.insert(NodeId(id), node(id))));
        routing.learn(map.delta(0)).unwrap();
        for (at, step) in changes.into_iter().enumerate() {
            change(&mut map, step);
            // Nobody leads a shard that is dropped.
            if let Some((shard, node)) = leaders.get(at)
                && routing.range_version(ShardId(*shard)).is_some()
            {
                routing.succeeded(ShardId(*shard), NodeId(*node));
            }
            // Some deltas tell of several changes.
            if at % 3 != 0 {
                let mut whole = Routing { leaders: routing.leaders.clone(), ..Routing::default() };
                routing.learn(map.delta(routing.map.version)).unwrap();
                whole.learn(map.delta(0)).unwrap();
                prop_assert_eq!(&routing.map, &whole.map);
                prop_assert_eq!(derived(&routing), derived(&whole));
            }
        }
    }
}
