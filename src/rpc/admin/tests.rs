use super::*;
use crate::ids::{DatabaseId, Epoch, ReplicaId, StoreId};
use crate::node::handle::{NodePhase, ReplicaHealth, ReplicaReport};
use crate::placement::map::{Member, MemberRole, NodeRecord};
use crate::placement::ring::RingRange;

#[test]
fn too_few_nodes_are_told_with_those_passed_over() {
    let mut map = ClusterMap::default();
    let error = PlanError::TooFewNodes { replicas: 3, nodes: 1 };
    assert_eq!(why_no_plan(&map, &error), error.to_string());
    use Standing::{Draining, Leaving, Member, Pending, Removed};
    for (id, standing) in (1..).zip([Member, Pending, Draining, Leaving, Removed]) {
        let record = NodeRecord {
            id: NodeId(id),
            label: String::new(),
            client_address: String::new(),
            peer_address: String::new(),
            zone: String::new(),
            weight: 100,
            store_id: StoreId::default(),
            standing,
            changed_at: 1,
        };
        map.nodes.insert(record.id, record);
    }
    let passed = "(node 2 waits to be accepted, node 3 is being drained, node 4 is leaving)";
    assert_eq!(why_no_plan(&map, &error), format!("{error} {passed}"));
    assert_eq!(why_no_plan(&map, &PlanError::Empty), PlanError::Empty.to_string());
    map.nodes.get_mut(&NodeId(1)).unwrap().label = "n1".into();
    let error = PlanError::TooFewUp { replicas: 1, up: 0, down: vec![NodeId(1)] };
    assert_eq!(why_no_plan(&map, &error), format!("{error} (no answer from node 1 (n1))"));
}

#[test]
fn a_shard_is_ended_when_a_majority_of_its_nodes_say_so() {
    let member = |node| Member { replica: ReplicaId(node), node: NodeId(node), role: MemberRole::Voter };
    let shard = ShardRecord {
        id: ShardId(7),
        database: DatabaseId(1),
        range: RingRange::ALL,
        epoch: Epoch { range: 1, conf: 1 },
        members: (1..=3).map(member).collect(),
        dropped: true,
        moving: None,
        target: None,
        previous: None,
        changed_at: 9,
    };
    let report = |node, held: &[u64]| {
        let replica = |shard: &u64| ReplicaReport {
            shard: ShardId(*shard),
            replica: ReplicaId(node),
            health: ReplicaHealth::Serving,
            group: None,
            restarts: 0,
            keys: 0,
            bytes: 0,
        };
        NodeReport {
            node: NodeId(node),
            label: String::new(),
            phase: NodePhase::Ready,
            disk_bytes: 0,
            replicas: held.iter().map(replica).collect(),
            uptime: Duration::ZERO,
            snapshot_bytes: 0,
            stuck: Vec::new(),
        }
    };
    assert!(can_commit(&shard, &[]), "nobody has answered");
    assert!(can_commit(&shard, &[report(1, &[]), report(2, &[7])]));
    // A node that isn't a member yet holds nothing, and may know of the shard when it is.
    assert!(can_commit(&shard, &[report(1, &[]), report(0, &[]), report(9, &[])]));
    assert!(!can_commit(&shard, &[report(1, &[]), report(2, &[7]), report(3, &[8])]));
}

#[test]
fn names_and_numbers() {
    assert!(check_numbers("a-B_9", 7, 16_384).is_ok());
    let long = "x".repeat(65);
    for (name, replicas, shards) in [
        ("", 1, 1),
        ("a b", 1, 1),
        ("ä", 1, 1),
        (long.as_str(), 1, 1),
        ("a", 0, 1),
        ("a", 8, 1),
        ("a", 1, 0),
        ("a", 1, 16_385),
    ] {
        let refused = check_numbers(name, replicas, shards);
        assert!(matches!(refused, Err(Refusal::Invalid(_))), "{name} {replicas} {shards}");
    }
}
