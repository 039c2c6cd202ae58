//! Tests of the metadata machine.

use super::super::memory::MemoryState;
use super::super::value;
use super::check::{check_change, check_map};
use super::*;
use crate::ids::{
    DatabaseId, Epoch, METADATA_DATABASE, METADATA_SHARD, NodeId, RandomId, ReplicaId, ShardId,
    generation_start,
};
use crate::placement::map::{Member, MemberRole, Standing};
use crate::placement::plan::{PlannedShard, plan_database};
use crate::placement::ring::RingRange;

mod history;
mod moves;
mod orders;
mod rebalancing;
mod standings;

fn id(byte: u8) -> RandomId {
    RandomId([byte; 16])
}

fn node(number: u8) -> NodeRecord {
    NodeRecord {
        id: NodeId(number.into()),
        label: format!("n{number}"),
        client_address: format!("127.0.0.1:71{number:02}"),
        peer_address: format!("127.0.0.1:72{number:02}"),
        zone: String::new(),
        weight: 100,
        store_id: id(number),
        standing: Standing::Member,
        changed_at: 0,
    }
}

fn formation(nodes: u8) -> MetaCommand {
    let voter = |number: u8| Member {
        replica: ReplicaId(number.into()),
        node: NodeId(number.into()),
        role: MemberRole::Voter,
    };
    MetaCommand::Form {
        cluster_id: id(0xc1),
        nodes: (1..=nodes).map(node).collect(),
        metadata: Box::new(ShardRecord {
            id: METADATA_SHARD,
            database: METADATA_DATABASE,
            range: RingRange::ALL,
            epoch: Epoch { range: 1, conf: 1 },
            members: (1..=nodes).map(voter).collect(),
            dropped: false,
            moving: None,
            target: None,
            previous: None,
            changed_at: 0,
        }),
    }
}

fn formed(nodes: u8) -> MemoryState {
    let mut state = MemoryState::default();
    let reply = run(&formation(nodes), &mut state);
    assert_eq!(reply, MetaReply::Formed(1));
    state
}

/// Applies, and checks what holds for every command: the version grows by one if and only if anything
/// changed, all that changed is stamped with it, and the map is sound.
fn run(command: &MetaCommand, state: &mut MemoryState) -> MetaReply {
    let before = state.clone();
    let known = cluster_map(&before).unwrap();
    let reply = apply(command, state).unwrap();
    if state.pairs == before.pairs {
        assert_eq!(state.revision, before.revision);
    } else {
        let next = before.revision + 1;
        let begins = generation_of(state.revision) > generation_of(next);
        assert_eq!(state.revision, if begins { generation_start(state.revision) } else { next });
    }
    let map = cluster_map(state).unwrap();
    let mut merged = known.clone();
    merged.merge(map.delta(known.version));
    assert_eq!(merged, map, "a delta tells every change");
    let mut refreshed = known.clone();
    refresh(&mut refreshed, state).unwrap();
    assert_eq!(refreshed, map, "a map brought up to date is the map");
    check_map(&map).unwrap_or_else(|what| panic!("{command:?}: {what}"));
    check_change(&known, &map).unwrap_or_else(|what| panic!("{command:?}: {what}"));
    reply
}

fn create(name: &str, replicas: u32, shards: u32, state: &MemoryState) -> MetaCommand {
    let map = cluster_map(state).unwrap();
    MetaCommand::CreateDatabase {
        name: name.into(),
        replicas,
        shards: plan_database(&map, name, replicas, shards).unwrap(),
    }
}

fn refused(command: &MetaCommand, state: &mut MemoryState) -> String {
    let before = state.clone();
    match run(command, state) {
        MetaReply::Refused(refusal) => {
            assert_eq!(*state, before);
            refusal.to_string()
        }
        reply => panic!("not refused: {reply:?}"),
    }
}

#[test]
fn nothing_works_before_the_cluster_is_formed() {
    let mut state = MemoryState::default();
    assert_eq!(cluster_map(&state).unwrap(), ClusterMap::default());
    let drop = MetaCommand::DropDatabase { name: "a".into(), id: None };
    let create = MetaCommand::CreateDatabase { name: "a".into(), replicas: 1, shards: vec![] };
    for command in [MetaCommand::AddNode(node(1)), drop, create] {
        assert_eq!(refused(&command, &mut state), "the cluster is not formed yet");
    }
}

#[test]
fn forming_twice_changes_nothing_and_another_identity_is_refused() {
    let mut state = formed(3);
    assert_eq!(run(&formation(3), &mut state), MetaReply::Formed(1));
    assert_eq!(run(&formation(2), &mut state), MetaReply::Formed(1));
    let mut other = formation(3);
    if let MetaCommand::Form { cluster_id, .. } = &mut other {
        *cluster_id = id(0xc2);
    }
    let error = refused(&other, &mut state);
    assert_eq!(error, format!("this cluster is {}, not {}", id(0xc1), id(0xc2)));
}

#[test]
fn a_formation_that_contradicts_itself_is_refused() {
    let broken = |change: fn(&mut Vec<NodeRecord>, &mut ShardRecord)| {
        let mut command = formation(3);
        if let MetaCommand::Form { nodes, metadata, .. } = &mut command {
            change(nodes, metadata);
        }
        refused(&command, &mut MemoryState::default())
    };
    let twice = "invalid plan: a first node is listed twice";
    assert_eq!(broken(|nodes, _| nodes[1].id = NodeId(1)), twice);
    assert_eq!(broken(|nodes, _| nodes[1].store_id = id(1)), twice);
    assert_eq!(broken(|nodes, _| drop(nodes.pop())), "node 3 is not a member of the cluster");
    let members = "invalid plan: the metadata shard has no members, or one of them twice";
    assert_eq!(broken(|_, shard| shard.members.clear()), members);
    assert_eq!(broken(|_, shard| shard.members[0].replica.0 = 2), members);
    assert_eq!(broken(|_, shard| shard.members[0].node.0 = 2), members);
    assert_eq!(
        broken(|_, shard| shard.members[0].role = MemberRole::Learner),
        "invalid plan: a member of the metadata shard is no voter"
    );
    assert_eq!(
        broken(|_, shard| shard.members[0].replica.0 = u64::MAX),
        "invalid plan: the first ids must be small numbers above 0"
    );
    assert_eq!(
        broken(|_, shard| shard.id = ShardId(1)),
        "invalid plan: the first shard is not the metadata shard"
    );
}

#[test]
fn a_map_that_is_no_older_state_of_the_shard_is_read_anew() {
    let mut state = formed(2);
    let other = ClusterMap { cluster_id: id(0xc2), ..cluster_map(&state).unwrap() };
    let future = ClusterMap { version: 9, nodes: Default::default(), ..cluster_map(&state).unwrap() };
    run(&MetaCommand::AddNode(node(3)), &mut state);
    for mut map in [other, future] {
        refresh(&mut map, &state).unwrap();
        assert_eq!(map, cluster_map(&state).unwrap());
        refresh(&mut map, &MemoryState::default()).unwrap();
        assert_eq!(map, ClusterMap::default());
    }
}

#[test]
fn a_node_is_known_by_its_store() {
    let mut state = formed(1);
    let mut joining = node(9);
    joining.id = NodeId(0);
    assert_eq!(run(&MetaCommand::AddNode(joining.clone()), &mut state), MetaReply::Node(NodeId(2)));
    assert_eq!(run(&MetaCommand::AddNode(joining.clone()), &mut state), MetaReply::Node(NodeId(2)));
    assert_eq!(state.revision, 2);
    joining.peer_address = "10.0.0.9:7200".into();
    assert_eq!(run(&MetaCommand::AddNode(joining), &mut state), MetaReply::Node(NodeId(2)));
    let map = cluster_map(&state).unwrap();
    assert_eq!((map.version, map.nodes[&NodeId(2)].changed_at), (3, 3));
    assert_eq!(map.nodes[&NodeId(2)].peer_address, "10.0.0.9:7200");
    assert_eq!(map.nodes[&NodeId(1)].changed_at, 1);
    assert_eq!(run(&MetaCommand::AddNode(node(8)), &mut state), MetaReply::Node(NodeId(3)));
}

#[test]
fn a_plan_that_breaks_a_rule_is_refused() {
    let mut state = formed(3);
    let good = create("db", 3, 2, &state);
    let mut broken = |change: fn(&mut String, &mut u32, &mut Vec<PlannedShard>)| {
        let mut command = good.clone();
        if let MetaCommand::CreateDatabase { name, replicas, shards } = &mut command {
            change(name, replicas, shards);
        }
        refused(&command, &mut state)
    };
    assert_eq!(
        broken(|name, _, _| *name = "a/b".into()),
        "invalid plan: `a/b` is no name for a database: it must be 1 to 64 of A-Z a-z 0-9 _ -"
    );
    assert!(broken(|name, _, _| *name = String::new()).contains("is no name"));
    assert!(broken(|name, _, _| *name = "x".repeat(65)).contains("is no name"));
    assert_eq!(broken(|_, replicas, _| *replicas = 8), "invalid plan: 8 replicas; there can be 1 to 7");
    assert_eq!(broken(|_, replicas, _| *replicas = 0), "invalid plan: 0 replicas; there can be 1 to 7");
    assert_eq!(broken(|_, _, shards| shards.clear()), "invalid plan: 0 shards; there can be 1 to 16384");
    let cover = "invalid plan: the ranges of the shards don't cover the ring in ascending order";
    assert_eq!(broken(|_, _, shards| shards.swap(0, 1)), cover);
    assert_eq!(broken(|_, _, shards| drop(shards.pop())), cover);
    assert_eq!(
        broken(|_, _, shards| shards[1].nodes = vec![NodeId(1), NodeId(2), NodeId(1)]),
        "invalid plan: shard number 1 is on nodes 1, 2, 1; it must be on 3 different ones"
    );
    assert!(broken(|_, _, shards| shards[0].nodes.truncate(2)).contains("must be on 3 different"));
    assert_eq!(
        broken(|_, _, shards| shards[0].nodes[2] = NodeId(4)),
        "node 4 is not a member of the cluster"
    );
}

#[test]
fn a_name_is_free_again_after_the_drop() {
    let mut state = formed(3);
    let first = create("db", 3, 2, &state);
    let MetaReply::Database { record, created: true } = run(&first, &mut state) else {
        panic!("not created");
    };
    assert_eq!((record.id, record.changed_at), (DatabaseId(1), 2));
    assert_eq!(record.shards, [ShardId(1), ShardId(2)]);
    let again = MetaReply::Database { record, created: false };
    assert_eq!(run(&first, &mut state), again);
    assert_eq!(
        refused(&create("db", 1, 2, &state), &mut state),
        "database `db` exists with 3 replicas and 2 shards"
    );
    let drop = MetaCommand::DropDatabase { name: "db".into(), id: None };
    let MetaReply::Database { record, .. } = run(&drop, &mut state) else {
        panic!("not dropped");
    };
    assert!(record.dropped);
    assert_eq!(refused(&drop, &mut state), "there is no database `db`");
    let MetaReply::Database { record, created: true } = run(&create("db", 1, 1, &state), &mut state) else {
        panic!("not created");
    };
    assert_eq!((record.id, &record.shards[..]), (DatabaseId(2), &[ShardId(3)][..]));
    let map = cluster_map(&state).unwrap();
    let dropped: Vec<_> = map.shards.values().map(|shard| shard.dropped).collect();
    assert_eq!(dropped, [false, true, true, false]);
    // Replicas 1 to 3 are the metadata shard's, 4 to 9 the dropped database's.
    assert_eq!(map.shards[&ShardId(3)].members[0].replica, ReplicaId(10));
    assert_eq!(map.database("db").unwrap().id, DatabaseId(2));
}

#[test]
fn damage_is_an_error_not_a_reply() {
    for key in [&b"c"[..], b"n\0\0\0\0\0\0\0\x01", b"s\0\0\0\0\0\0\0\0"] {
        let mut state = formed(1);
        let value = state.pairs[key].slice(..20);
        state.pairs.insert(key.to_vec(), value);
        assert!(matches!(cluster_map(&state), Err(StorageError::Damaged { .. })));
    }
    for key in [&b"p"[..], b"r"] {
        let mut state = formed(1);
        state.pairs.insert(key.to_vec(), value::encode(1, b"not a message"));
        assert!(matches!(cluster_map(&state), Err(StorageError::Damaged { .. })));
    }
    let mut state = formed(1);
    let stored = state.pairs[&b"n\0\0\0\0\0\0\0\x01"[..]].clone();
    state.pairs.insert(b"n\0\0\0\0\0\0\0\x02".to_vec(), stored);
    let error = cluster_map(&state).unwrap_err().to_string();
    assert_eq!(error, "the metadata state: node 2 is damaged: its record says 1");
}
