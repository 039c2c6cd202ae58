use std::time::Duration;

use super::*;
use crate::client::{ClientError, NotApplied};
use crate::group::types::GroupStatus;
use crate::ids::{DatabaseId, Epoch, StoreId};
use crate::node::handle::NodeReport;
use crate::placement::map::{DatabaseRecord, Member, NodeRecord, Standing};
use crate::placement::ring::RingRange;

fn member(n: u64) -> Member {
    Member { replica: ReplicaId(10 + n), node: NodeId(n), role: MemberRole::Voter }
}

/// Three nodes and a database of one shard on all of them.
fn map() -> ClusterMap {
    let mut map = ClusterMap::default();
    for n in 1..=3 {
        map.nodes.insert(
            NodeId(n),
            NodeRecord {
                id: NodeId(n),
                label: format!("n{n}"),
                client_address: format!("h:{n}"),
                peer_address: format!("p:{n}"),
                zone: String::new(),
                weight: 100,
                store_id: StoreId::default(),
                standing: Standing::Member,
                changed_at: 1,
            },
        );
    }
    for (id, name, shard, dropped) in [(1, "db", 1, false), (2, "old", 2, true)] {
        map.databases.insert(
            DatabaseId(id),
            DatabaseRecord {
                id: DatabaseId(id),
                name: name.into(),
                replicas: 3,
                shards: vec![ShardId(shard)],
                dropped,
                changed_at: 1,
            },
        );
    }
    map.shards.insert(
        ShardId(1),
        ShardRecord {
            id: ShardId(1),
            database: DatabaseId(1),
            range: RingRange::ALL,
            epoch: Epoch { range: 1, conf: 2 },
            members: (1..=3).map(member).collect(),
            dropped: false,
            moving: None,
            target: None,
            previous: None,
            changed_at: 1,
        },
    );
    map
}

fn report(n: u64, role: StateRole, term: u64, applied: u64, committed: u64) -> NodeReport {
    NodeReport {
        node: NodeId(n),
        label: format!("n{n}"),
        phase: NodePhase::Ready,
        disk_bytes: 4096,
        replicas: vec![ReplicaReport {
            shard: ShardId(1),
            replica: ReplicaId(10 + n),
            health: ReplicaHealth::Serving,
            group: Some(GroupStatus {
                role,
                learner: false,
                term,
                leader: None,
                applied,
                committed,
                truncated: 0,
                last: committed,
                last_term: term,
                recovering: false,
                state_lost: None,
                incarnation: 1,
                epoch: Default::default(),
                members: Vec::new(),
                followers: Vec::new(),
            }),
            restarts: 0,
            keys: 0,
            bytes: 0,
        }],
        uptime: Duration::ZERO,
        snapshot_bytes: 0,
        stuck: Vec::new(),
    }
}

fn down() -> Result<NodeReport, ClientError> {
    Err(ClientError::NotApplied(NotApplied::Closed))
}

fn reports(list: [Result<NodeReport, ClientError>; 3]) -> Reports {
    (1..).map(NodeId).zip(list).collect()
}

#[test]
fn a_healthy_cluster_in_json() {
    let reports = reports([
        Ok(report(1, StateRole::Leader, 7, 20, 20)),
        Ok(report(2, StateRole::Follower, 7, 18, 19)),
        Ok(report(3, StateRole::Follower, 7, 20, 20)),
    ]);
    let seen = Overview::new(&map(), &reports, Some("db"));
    assert!(seen.every_shard_is_led());
    let json = seen.json();
    let node = &json["nodes"][0];
    assert_eq!(
        node.to_string(),
        r#"{"id":1,"label":"n1","address":"h:1","zone":"","state":"ready","standing":"member","leaders":1,"replicas":1,"disk_bytes":4096}"#
    );
    assert_eq!(json["databases"].as_array().unwrap().len(), 1, "dropped ones are not shown");
    assert_eq!(
        json["databases"][0]["shards"][0].to_string(),
        concat!(
            r#"{"id":1,"start":"0000000000000000","end":"ffffffffffffffff","#,
            r#""epoch":{"range":1,"conf":2},"leader":1,"state":"ok","replicas":["#,
            r#"{"node":1,"role":"leader","state":"serving","message":null,"applied":20,"lag":0},"#,
            r#"{"node":2,"role":"follower","state":"serving","message":null,"applied":18,"lag":2},"#,
            r#"{"node":3,"role":"follower","state":"serving","message":null,"applied":20,"lag":0}],"moving":null}"#
        )
    );
    let text = seen.text();
    assert!(text.contains("1 (h:1)") && text.contains("1 2 3"), "{text}");
}

#[test]
fn the_leader_of_the_newest_term_is_the_leader() {
    let reports = reports([
        Ok(report(1, StateRole::Leader, 7, 20, 20)),
        Ok(report(2, StateRole::Leader, 8, 25, 25)),
        down(),
    ]);
    let seen = Overview::new(&map(), &reports, None);
    let shard = &seen.databases[0].shards[0];
    assert_eq!(shard.leader, Some(NodeId(2)));
    assert_eq!(shard.state(), "degraded");
    assert_eq!(shard.replicas[0].lag, Some(5));
    let gone = &shard.replicas[2];
    assert_eq!((gone.state, gone.role, gone.lag), ("unreachable", "voter", None));
    assert_eq!(seen.nodes[2].state, "unreachable");
    assert_eq!(seen.nodes[2].disk_bytes, None);
}

#[test]
fn a_shard_without_a_leader_is_unavailable() {
    let mut broken = report(1, StateRole::Follower, 7, 20, 20);
    broken.replicas[0].health = ReplicaHealth::Quarantined("poison".into());
    broken.replicas[0].group = None;
    let mut empty = report(2, StateRole::Follower, 7, 20, 20);
    empty.replicas.clear();
    let seen = Overview::new(&map(), &reports([Ok(broken), Ok(empty), down()]), None);
    let shard = &seen.databases[0].shards[0];
    assert!(!seen.every_shard_is_led());
    assert_eq!(shard.state(), "unavailable");
    assert_eq!(shard.replicas[0].message.as_deref(), Some("poison"));
    assert_eq!(shard.replicas[1].state, "missing");
    assert!(seen.text().contains("1 shard has no leader\n"));
    let poisoned = |n| {
        let mut report = report(n, StateRole::Follower, 7, 20, 20);
        report.replicas[0].health = ReplicaHealth::Quarantined("poison".into());
        report.replicas[0].group = None;
        Ok(report)
    };
    let alone = report(3, StateRole::Candidate, 9, 20, 20);
    let seen = Overview::new(&map(), &reports([poisoned(1), poisoned(2), Ok(alone)]), None);
    assert_eq!(seen.databases[0].shards[0].state(), "quarantined");
}

#[test]
fn a_node_that_runs_in_place_of_another_is_not_taken_for_it() {
    let mut map = map();
    let newcomer = NodeRecord { id: NodeId(4), ..map.nodes[&NodeId(3)].clone() };
    map.nodes.insert(NodeId(4), newcomer);
    let mut fresh = report(4, StateRole::Follower, 7, 20, 20);
    fresh.replicas.clear();
    let mut reports = reports([
        Ok(report(1, StateRole::Leader, 7, 20, 20)),
        Ok(report(2, StateRole::Follower, 7, 20, 20)),
        Ok(fresh.clone()),
    ]);
    reports.insert(NodeId(4), Ok(fresh));
    let seen = Overview::new(&map, &reports, None);
    let states: Vec<_> = seen.nodes.iter().map(|node| (node.state, node.disk_bytes)).collect();
    let ready = ("ready", Some(4096));
    assert_eq!(states, [ready, ready, ("replaced", None), ready]);
    let lost = &seen.databases[0].shards[0].replicas[2];
    assert_eq!((lost.node, lost.state), (NodeId(3), "unreachable"));
    assert_eq!(lost.message.as_deref(), Some("node 4 runs in place of its node"));
}

#[test]
fn a_shard_whose_state_is_lost_everywhere_is_told_as_such() {
    let lost = |node| {
        let mut report = report(node, StateRole::Follower, 7, 20, 20);
        report.replicas[0].health = ReplicaHealth::Refetching("gone".into());
        report
    };
    // One of them leads, to bring the others' logs up to its own; it serves nobody.
    let mut leads = lost(3);
    if let Some(group) = &mut leads.replicas[0].group {
        group.role = StateRole::Leader;
    }
    let seen = Overview::new(&map(), &reports([Ok(lost(1)), Ok(lost(2)), Ok(leads)]), None);
    let shard = &seen.databases[0].shards[0];
    assert_eq!((shard.state(), shard.replicas[0].state), ("unavailable", "refetching"));
    assert_eq!((shard.replicas[0].applied, shard.replicas[0].lag), (None, None));
    let text = seen.text();
    assert!(text.contains("1 shard has no leader"), "{text}");
    assert!(text.contains("1 shard has lost its state at every replica"), "{text}");

    let leader = report(3, StateRole::Leader, 7, 20, 20);
    let seen = Overview::new(&map(), &reports([Ok(lost(1)), Ok(lost(2)), Ok(leader)]), None);
    assert_eq!(seen.databases[0].shards[0].state(), "degraded");
    assert!(!seen.text().contains("state at every replica"), "one of them gives it to the others");
}

#[test]
fn what_is_decided_and_what_moves_is_shown() {
    let mut map = map();
    for (id, standing) in [(2, Standing::Draining), (4, Standing::Member), (5, Standing::Removed)] {
        let record = NodeRecord { id: NodeId(id), standing, ..map.nodes[&NodeId(1)].clone() };
        map.nodes.insert(NodeId(id), record);
    }
    let record = map.shards.get_mut(&ShardId(1)).unwrap();
    record.moving = Some(ShardMove {
        id: 9,
        adds: vec![Member { role: MemberRole::Learner, ..member(4) }],
        removes: vec![ReplicaId(12)],
        cancelling: false,
        cause: MoveCause::Drain,
    });
    let reports = reports([
        Ok(report(1, StateRole::Leader, 7, 20, 20)),
        Ok(report(2, StateRole::Follower, 7, 20, 20)),
        Ok(report(3, StateRole::Follower, 7, 20, 20)),
    ]);
    let seen = Overview::new(&map, &reports, Some("db"));
    let standings: Vec<_> = seen.nodes.iter().map(|node| (node.id.0, node.standing)).collect();
    assert_eq!(standings, [(1, "member"), (2, "draining"), (3, "member"), (4, "member")]);
    assert!(seen.node_table().contains("ready, draining"), "{}", seen.node_table());
    // Who is awaited is not missed.
    let shard = &seen.databases[0].shards[0];
    assert_eq!((shard.state(), shard.replicas_text().as_str()), ("ok", "1 2 3 +4"));
    assert_eq!((shard.replicas[3].role, shard.replicas[3].state), ("learner", "awaited"));
    assert!(seen.text().contains("ok; node 4 awaited; drain under way: +4 -2"), "{}", seen.text());
    let moving = &seen.json()["databases"][0]["shards"][0]["moving"];
    assert_eq!(moving.to_string(), r#"{"id":9,"cause":"drain","cancelling":false,"adds":[4],"removes":[2]}"#);

    let record = map.shards.get_mut(&ShardId(1)).unwrap();
    record.members[1].role = MemberRole::Outgoing;
    record.members.push(Member { role: MemberRole::Incoming, ..member(4) });
    let seen = Overview::new(&map, &reports, Some("db"));
    let shard = &seen.databases[0].shards[0];
    // Its vote counts by now, and its node says nothing.
    assert_eq!((shard.state(), shard.replicas_text().as_str()), ("degraded", "1 -2 3 +4"));
    assert_eq!((shard.replicas[3].role, shard.replicas[3].state), ("incoming", "unreachable"));
}
