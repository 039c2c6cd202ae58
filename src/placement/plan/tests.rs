//! Tests of the planner.

use super::*;
use crate::ids::{DatabaseId, Epoch, ReplicaId, ShardId};
use crate::placement::map::{Member, MemberRole, NodeRecord, ShardRecord, Standing};
use proptest::prelude::*;
use std::collections::BTreeSet;

fn cluster(nodes: impl IntoIterator<Item = (&'static str, u32)>) -> ClusterMap {
    let mut map = ClusterMap::default();
    for (id, (zone, weight)) in (1..).zip(nodes) {
        let id = NodeId(id);
        let record = NodeRecord {
            id,
            label: format!("n{id}"),
            client_address: String::new(),
            peer_address: String::new(),
            zone: zone.into(),
            weight,
            store_id: Default::default(),
            standing: Standing::Member,
            changed_at: 1,
        };
        map.nodes.insert(id, record);
    }
    map
}

fn add_to(map: &mut ClusterMap, plan: &[PlannedShard]) {
    for shard in plan {
        let id = ShardId(map.shards.len() as u64 + 1);
        let members = shard.nodes.iter().map(|&node| Member {
            replica: ReplicaId(1000 * id.0 + node.0),
            node,
            role: MemberRole::Voter,
        });
        let record = ShardRecord {
            id,
            database: DatabaseId(1),
            range: shard.range,
            epoch: Epoch::default(),
            members: members.collect(),
            dropped: false,
            moving: None,
            target: None,
            previous: None,
            changed_at: 1,
        };
        map.shards.insert(id, record);
    }
}

/// Replicas and leaders of each node.
fn loads(map: &ClusterMap) -> BTreeMap<NodeId, (u32, u32)> {
    let mut loads: BTreeMap<_, _> = map.nodes.keys().map(|id| (*id, (0, 0))).collect();
    for shard in map.shards.values() {
        for (at, member) in shard.members.iter().enumerate() {
            let load = loads.get_mut(&member.node).unwrap();
            load.0 += 1;
            load.1 += u32::from(at == 0);
        }
    }
    loads
}

fn check_form(map: &ClusterMap, plan: &[PlannedShard], replicas: u32) {
    assert!(ring::covers_ring(plan.iter().map(|s| s.range)));
    for shard in plan {
        let nodes: BTreeSet<_> = shard.nodes.iter().collect();
        assert_eq!(nodes.len(), replicas as usize, "{shard:?}");
        assert!(nodes.iter().all(|node| map.nodes[node].weight > 0));
    }
}

fn zones_of(map: &ClusterMap, shard: &PlannedShard) -> usize {
    let zones: BTreeSet<_> = shard.nodes.iter().map(|n| &map.nodes[n].zone).collect();
    zones.len()
}

#[test]
fn a_node_whose_address_another_has_taken_over_gets_nothing() {
    let mut map = cluster([("", 100), ("", 100), ("", 100), ("", 100)]);
    for (node, address) in [(1, "a"), (2, "b"), (3, "c"), (4, "b")] {
        map.nodes.get_mut(&NodeId(node)).unwrap().peer_address = address.into();
    }
    let plan = plan_database(&map, "db", 3, 8).unwrap();
    let used: BTreeSet<_> = plan.iter().flat_map(|shard| shard.nodes.iter().copied()).collect();
    assert_eq!(used, [NodeId(1), NodeId(3), NodeId(4)].into());
    assert!(matches!(plan_database(&map, "db", 4, 1), Err(PlanError::TooFewNodes { nodes: 3, .. })));
}

#[test]
fn too_few_nodes_and_nothing_are_refused() {
    let map = cluster([("", 100), ("", 100), ("", 0)]);
    assert_eq!(
        plan_database(&map, "a", 3, 8).unwrap_err().to_string(),
        "3 replicas need 3 nodes, but the cluster has 2 (of a weight above 0): add nodes or ask for fewer replicas"
    );
    assert_eq!(plan_database(&map, "a", 0, 8), Err(PlanError::Empty));
    assert_eq!(plan_database(&map, "a", 1, 0), Err(PlanError::Empty));
}

#[test]
fn nothing_is_placed_on_who_is_down_while_the_others_suffice() {
    let map = cluster([("a", 100), ("a", 100), ("b", 100), ("b", 100), ("c", 100)]);
    let among = |replicas, up: &[u64]| {
        plan_among(&map, "db", replicas, 8, |node| up.contains(&node.0))
            .inspect(|plan| check_form(&map, plan, replicas))
    };
    let nodes = |plan: &[PlannedShard]| -> BTreeSet<u64> {
        plan.iter().flat_map(|shard| shard.nodes.iter().map(|node| node.0)).collect()
    };
    assert_eq!(among(3, &[1, 2, 3, 4, 5]).unwrap(), plan_database(&map, "db", 3, 8).unwrap());
    assert_eq!(nodes(&among(3, &[1, 2, 4]).unwrap()), [1, 2, 4].into());
    assert_eq!(nodes(&among(1, &[2]).unwrap()), [2].into());
    // One is missing: each shard has a majority, and a leader, of who is up. The zones of the others come first.
    let plan = among(3, &[1, 3]).unwrap();
    assert!(plan.iter().all(|shard| [1, 3].contains(&shard.nodes[0].0) && shard.nodes[2] == NodeId(5)));
    let led = plan.iter().filter(|shard| shard.nodes[0] == NodeId(1)).count();
    assert_eq!(led, 4, "{plan:?}");
    let plan = among(5, &[1, 3, 5]).unwrap();
    assert!(plan.iter().all(|shard| shard.nodes[3..].iter().all(|node| [2, 4].contains(&node.0))));
    // No majority.
    let error = among(3, &[4]).unwrap_err();
    let down = [1, 2, 3, 5].map(NodeId).to_vec();
    assert_eq!(error, PlanError::TooFewUp { replicas: 3, up: 1, down });
    assert_eq!(
        error.to_string(),
        "3 replicas need 2 nodes that are up, not 1: start those that are down or ask for fewer replicas"
    );
    assert!(matches!(among(2, &[1]), Err(PlanError::TooFewUp { up: 1, .. })));
    assert!(matches!(among(6, &[1]), Err(PlanError::TooFewNodes { nodes: 5, .. })));
}

#[test]
fn a_zone_with_few_nodes_holds_one_replica_of_each_shard() {
    let map = cluster([("a", 100), ("b", 100), ("b", 100), ("b", 100), ("c", 100)]);
    for shard in plan_database(&map, "db", 3, 30).unwrap() {
        assert_eq!(zones_of(&map, &shard), 3);
    }
    // Two zones can't keep three replicas apart; then at most two are in one.
    let map = cluster([("a", 100), ("a", 100), ("b", 100), ("b", 100)]);
    for shard in plan_database(&map, "db", 3, 30).unwrap() {
        assert_eq!(zones_of(&map, &shard), 2);
    }
    // One lone node in a zone and four in the other: the least there can be is four in one zone.
    let map = cluster([("a", 100), ("b", 100), ("b", 100), ("b", 100), ("b", 100)]);
    let plan = plan_database(&map, "db", 5, 7).unwrap();
    check_form(&map, &plan, 5);
}

#[test]
fn ten_thousand_shards_are_planned_quickly_and_evenly() {
    let zones = ["a", "b", "c", "d"];
    let mut map = cluster((0..100).map(|at| (zones[at % 4], 100)));
    let start = std::time::Instant::now();
    let plan = plan_database(&map, "large", 3, 10_000).unwrap();
    println!("10,000 shards x 3 on 100 nodes: {:?}", start.elapsed());
    check_form(&map, &plan, 3);
    let preferred = plan.iter().map(|shard| {
        let weights = map.nodes.values().map(|n| (n.id, n.weight));
        let ranked = rendezvous::rank(rendezvous::shard_key("large", shard.range.start), weights);
        // The best three in three zones: what there would be without quotas.
        let mut zones = BTreeSet::new();
        let best: Vec<_> = ranked.into_iter().filter(|n| zones.insert(&map.nodes[n].zone)).take(3).collect();
        shard.nodes.iter().filter(|n| best.contains(n)).count()
    });
    let preferred: usize = preferred.sum();
    println!("{} % of replicas are where hashing alone puts them", preferred / 300);
    assert!(preferred > 27_000);
    add_to(&mut map, &plan);
    for (replicas, leaders) in loads(&map).into_values() {
        assert_eq!((replicas, leaders), (300, 100));
    }
}

#[test]
fn a_second_database_fills_what_the_first_left() {
    let mut map = cluster([("", 100); 3]);
    let plan = plan_database(&map, "one", 3, 5).unwrap();
    add_to(&mut map, &plan);
    let more = cluster([("", 100); 5]);
    map.nodes.extend(more.nodes.into_iter().skip(3));
    let plan = plan_database(&map, "two", 3, 10).unwrap();
    check_form(&map, &plan, 3);
    add_to(&mut map, &plan);
    for (replicas, leaders) in loads(&map).into_values() {
        assert_eq!((replicas, leaders), (9, 3));
    }
    // Shards of a dropped database count for nothing.
    map.shards.values_mut().for_each(|shard| shard.dropped = true);
    assert_eq!(plan_database(&map, "two", 3, 10), plan_database(&cluster([("", 100); 5]), "two", 3, 10));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn nodes_are_near_their_share_and_zones_apart(
        zones in 1..5_usize, per_zone in 1..6_usize, replicas in 1..6_u32, shards in 1..80_u32,
        name in "[a-z]{1,8}",
    ) {
        let names = ["a", "b", "c", "d"];
        let nodes = zones * per_zone;
        prop_assume!(nodes >= replicas as usize);
        let mut map = cluster((0..nodes).map(|at| (names[at % zones], 100)));
        let plan = plan_database(&map, &name, replicas, shards).unwrap();
        check_form(&map, &plan, replicas);
        for shard in &plan {
            for zone in &names[..zones] {
                let here = shard.nodes.iter().filter(|node| map.nodes[node].zone == *zone);
                prop_assert!(here.count() <= (replicas as usize).div_ceil(zones));
            }
        }
        add_to(&mut map, &plan);
        let near = |have: u32, count: u32| {
            let share = f64::from(count) / nodes as f64;
            (f64::from(have) - share).abs() <= (0.15 * share).max(1.0)
        };
        for (have, leads) in loads(&map).into_values() {
            prop_assert!(near(have, shards * replicas), "{} replicas", have);
            prop_assert!(near(leads, shards), "{} leaders", leads);
        }
    }

    #[test]
    fn weights_are_kept(
        weights in prop::collection::vec(50..151_u32, 6..20), shards in 1..150_u32,
    ) {
        let total: u32 = weights.iter().sum();
        let mut map = cluster(weights.iter().map(|&weight| ("", weight)));
        let plan = plan_database(&map, "db", 3, shards).unwrap();
        check_form(&map, &plan, 3);
        add_to(&mut map, &plan);
        let share = |count: u32, weight| f64::from(count) * f64::from(weight) / f64::from(total);
        for ((have, leads), &weight) in loads(&map).into_values().zip(&weights) {
            // A node can't hold a shard twice.
            let wanted = share(3 * shards, weight).min(f64::from(shards));
            let off = (f64::from(have) - wanted).abs();
            prop_assert!(off <= (0.15 * wanted).max(1.0), "{} instead of {}", have, wanted);
            let wanted = share(shards, weight);
            let off = (f64::from(leads) - wanted).abs();
            prop_assert!(off <= (0.15 * wanted).max(1.0), "{} instead of {}", leads, wanted);
        }
    }

    #[test]
    fn any_cluster_gets_a_sound_plan(
        nodes in prop::collection::vec(("[a-c]?", 0..4_u32), 1..12),
        first in (1..4_u32, 1..20_u32), second in (1..8_u32, 1..40_u32), down in any::<u16>(),
    ) {
        let mut map = cluster(nodes.iter().map(|(_, weight)| ("", *weight)));
        for (record, (zone, _)) in map.nodes.values_mut().zip(&nodes) {
            record.zone.clone_from(zone);
        }
        let takers = nodes.iter().filter(|(_, weight)| *weight > 0).count();
        for (replicas, shards) in [first, second] {
            let up = |node: NodeId| down >> node.0 & 1 == 0;
            let ups = map.nodes.values().filter(|node| node.weight > 0 && up(node.id)).count();
            let live = plan_among(&map, "db", replicas, shards, up);
            let enough = takers >= replicas as usize && ups > replicas as usize / 2;
            prop_assert_eq!(live.is_ok(), enough);
            for shard in live.iter().flatten() {
                let there = shard.nodes.iter().filter(|node| up(**node)).count();
                prop_assert_eq!(there, ups.min(replicas as usize));
                prop_assert!(up(shard.nodes[0]));
            }
            let plan = plan_database(&map, "db", replicas, shards);
            prop_assert_eq!(plan.is_ok(), takers >= replicas as usize);
            if let Ok(plan) = plan {
                check_form(&map, &plan, replicas);
                prop_assert_eq!(&plan, &plan_database(&map, "db", replicas, shards).unwrap());
                add_to(&mut map, &plan);
            }
        }
    }
}
