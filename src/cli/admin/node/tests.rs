use super::list::{rows, table};
use super::*;
use crate::ids::{DatabaseId, Epoch, ReplicaId, StoreId};
use crate::node::handle::{NodePhase, NodeReport};
use crate::placement::map::{DatabaseRecord, Member, MemberRole, ShardRecord};
use crate::placement::ring::RingRange;

fn node(id: u64, standing: Standing) -> NodeRecord {
    NodeRecord {
        id: NodeId(id),
        label: format!("n{id}"),
        client_address: format!("h{id}:7101"),
        peer_address: format!("h{id}:7201"),
        zone: if id == 1 { "a".into() } else { String::new() },
        weight: 100,
        store_id: StoreId::default(),
        standing,
        changed_at: 1,
    }
}

fn shard(id: u64, database: u64, nodes: &[u64]) -> ShardRecord {
    let member = |node: &u64| Member {
        replica: ReplicaId(10 * id + node),
        node: NodeId(*node),
        role: MemberRole::Voter,
    };
    ShardRecord {
        id: ShardId(id),
        database: DatabaseId(database),
        range: RingRange::ALL,
        epoch: Epoch { range: 1, conf: 1 },
        members: nodes.iter().map(member).collect(),
        dropped: false,
        moving: None,
        target: None,
        previous: None,
        changed_at: 1,
    }
}

fn map(standings: &[Standing], shards: &[ShardRecord]) -> ClusterMap {
    let mut map = ClusterMap { version: 5, ..ClusterMap::default() };
    map.nodes.extend((1..).zip(standings).map(|(id, standing)| (NodeId(id), node(id, *standing))));
    map.shards.extend(shards.iter().map(|shard| (shard.id, shard.clone())));
    let database = DatabaseRecord {
        id: DatabaseId(1),
        name: "demo".into(),
        replicas: 3,
        shards: vec![ShardId(1), ShardId(2)],
        dropped: false,
        changed_at: 1,
    };
    map.databases.insert(database.id, database);
    map
}

use Standing::{Draining, Leaving, Member as Ordinary, Pending, Removed};

#[test]
fn the_list_has_the_documented_shape() {
    let map = map(&[Ordinary, Draining, Removed, Pending], &[shard(1, 1, &[1, 2])]);
    let report = NodeReport {
        node: NodeId(1),
        label: "n1".into(),
        phase: NodePhase::Ready,
        disk_bytes: 4096,
        replicas: Vec::new(),
        uptime: Duration::ZERO,
        snapshot_bytes: 0,
        stuck: Vec::new(),
    };
    let reports = Reports::from([(NodeId(1), Ok(report))]);
    let shown = rows(&map, &reports, false);
    assert_eq!(shown.iter().map(|row| row.id.0).collect::<Vec<_>>(), [1, 2, 4]);
    assert_eq!(rows(&map, &reports, true).len(), 4);
    assert_eq!(
        shown[0].json().to_string(),
        r#"{"id":1,"label":"n1","address":"h1:7101","peer_address":"h1:7201","zone":"a","weight":100,"standing":"member","state":"ready","up":true,"replicas":1,"leaders":0,"bytes":0,"disk_bytes":4096}"#
    );
    assert_eq!(
        shown[1].json().to_string(),
        r#"{"id":2,"label":"n2","address":"h2:7101","peer_address":"h2:7201","zone":"","weight":100,"standing":"draining","state":"unreachable","up":false,"replicas":1,"leaders":null,"bytes":null,"disk_bytes":null}"#
    );
    let table = table(&shown);
    for word in ["standing", "draining", "pending", "unreachable", "h4:7201", "4.0 KiB"] {
        assert!(table.contains(word), "{word}: {table}");
    }
}

#[test]
fn a_node_in_use_is_refused_naming_shards() {
    let shards: Vec<_> = (1..=12).map(|id| shard(id, 1, &[1, 2])).collect();
    let map = map(&[Ordinary, Ordinary], &[&[shard(0, 0, &[2])], &shards[..]].concat());
    let failure = in_use(&map.nodes[&NodeId(2)], &shards_on(&map, NodeId(2)));
    assert_eq!((failure.exit, failure.code), (Exit::Negative, "node_in_use"));
    for text in ["13 shards: 0 ((metadata)), 1 (demo),", "9 (demo), and 3 more", "drain 2 --wait", "--dead"] {
        assert!(failure.message.contains(text), "{text}: {}", failure.message);
    }
}

#[test]
fn a_drain_is_stuck_when_nobody_can_take_what_is_left() {
    let full = [shard(0, 0, &[1, 2, 3]), shard(1, 1, &[1, 2, 3])];
    // The metadata shard shrinks by itself, so something goes on.
    assert_eq!(stuck(&map(&[Ordinary, Ordinary, Draining], &full), NodeId(3)), None);
    let why = stuck(&map(&[Ordinary, Ordinary, Draining], &full[1..]), NodeId(3)).expect("stuck");
    assert!(why.contains("2 nodes") && why.contains("set-replicas"), "{why}");
    // A fourth node can take it, unless it takes nothing either.
    assert_eq!(stuck(&map(&[Ordinary, Ordinary, Draining, Ordinary], &full[1..]), NodeId(3)), None);
    for useless in [Pending, Draining, Leaving, Removed] {
        assert!(stuck(&map(&[Ordinary, Ordinary, Draining, useless], &full[1..]), NodeId(3)).is_some());
    }
    // One replica too many simply goes; a move under way ends first; nothing left is no trouble.
    let mut more = map(&[Ordinary, Ordinary, Draining], &full[1..]);
    more.databases.get_mut(&DatabaseId(1)).unwrap().replicas = 1;
    assert_eq!(stuck(&more, NodeId(3)), None);
    assert_eq!(stuck(&map(&[Ordinary, Ordinary, Draining], &[]), NodeId(3)), None);
}

#[test]
fn a_node_is_found_by_either_address_and_the_newest_counts() {
    let mut map = map(&[Removed, Pending, Ordinary], &[]);
    assert_eq!(at_address(&map, "h2:7201").unwrap().id, NodeId(2));
    assert_eq!(at_address(&map, "h3:7101").unwrap().id, NodeId(3));
    let failure = at_address(&map, "h9:7101").unwrap_err();
    assert!(failure.message.contains("h2:7101") && failure.message.contains("cluster.join"), "{failure}");
    assert!(at_address(&map, "h1:7101").is_err(), "it was removed");
    map.nodes.get_mut(&NodeId(3)).unwrap().client_address = "h2:7101".into();
    assert_eq!(at_address(&map, "h2:7101").unwrap().id, NodeId(3));
    assert!(find(&map, NodeId(7)).unwrap_err().message.contains("2 (n2), 3 (n3)"));
}

#[test]
fn what_is_left_is_told_with_the_estimate() {
    let left = Left {
        shards: vec![(ShardId(1), "demo".into()), (ShardId(2), "demo".into())],
        leaders: Some(1),
        bytes: Some(2048),
        rate: Some(100),
        standing: Draining,
        ..Left::default()
    };
    assert_eq!(
        left.json(NodeId(3)).to_string(),
        r#"{"node":3,"standing":"draining","empty":false,"replicas":2,"leaders":1,"bytes":2048,"rate":100,"eta_s":21,"obstacle":null}"#
    );
    assert_eq!(left.text(), "2 replicas left, leads 1, 2.0 KiB, 100 B/s");
    // Who doesn't answer isn't known to lead nothing.
    let unknown = Left { leaders: None, bytes: None, rate: None, ..left };
    let json = unknown.json(NodeId(3));
    assert!(json["leaders"].is_null() && json["bytes"].is_null() && json["eta_s"].is_null(), "{json}");
    assert_eq!(unknown.text(), "2 replicas left");

    let sent = |pairs: &[(u64, u64)]| pairs.iter().map(|(node, sent)| (NodeId(*node), *sent)).collect();
    assert_eq!(sent_since(&sent(&[(1, 10), (2, 50), (3, 1)]), &sent(&[(1, 30), (2, 0), (4, 9)])), 20);
}

#[test]
fn a_wait_for_an_empty_node_ends_as_the_emptying_does() {
    let shards = vec![(ShardId(1), "demo".to_owned())];
    let left = Left { shards, standing: Draining, stuck: Some("full".into()), ..Left::default() };
    let code =
        |left: &Left| progress(left, 2, "emptying").end.map(|end| end.err().map(|failure| failure.code));
    assert_eq!(code(&left), Some(Some("stuck")));
    let left = Left { leaders: Some(1), ..left };
    assert_eq!(code(&left), None, "leadership still goes");
    let left = Left { standing: Ordinary, ..left };
    assert_eq!(code(&left), Some(Some("called_off")), "somebody has cancelled it");
    assert_eq!(code(&Left { standing: Removed, ..Left::default() }), Some(None), "nothing is left");
    let given_up = Left { standing: Leaving, ..Left::default() };
    assert_eq!(code(&given_up), None, "the cluster knows when it may be removed");
}
