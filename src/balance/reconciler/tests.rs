//! Tests of what only direct reports show; the rest is in tests/scripts/balance.

use super::*;
use crate::balance::facts::{ShardReport, SickReplica};
use crate::group::types::FollowerStatus;
use crate::ids::{DatabaseId, Epoch, RandomId};
use crate::placement::map::{DatabaseRecord, MoveCause, NodeRecord};
use crate::placement::ring::RingRange;

const SHARD: ShardId = ShardId(1);

fn member(node: u64, role: MemberRole) -> Member {
    Member { replica: ReplicaId(10 * node), node: NodeId(node), role }
}

/// Nodes 1 to `nodes`, and one shard on the first three of them.
fn map(nodes: u64) -> ClusterMap {
    let node = |id: u64| NodeRecord {
        id: NodeId(id),
        label: String::new(),
        client_address: String::new(),
        peer_address: String::new(),
        zone: String::new(),
        weight: 100,
        store_id: RandomId::default(),
        standing: Standing::Member,
        changed_at: 1,
    };
    let shard = ShardRecord {
        id: SHARD,
        database: DatabaseId(1),
        range: RingRange::ALL,
        epoch: Epoch { range: 1, conf: 5 },
        members: (1..=3).map(|id| member(id, MemberRole::Voter)).collect(),
        dropped: false,
        moving: None,
        target: None,
        previous: None,
        changed_at: 1,
    };
    let database = DatabaseRecord {
        id: DatabaseId(1),
        name: "db".into(),
        replicas: 3,
        shards: vec![SHARD],
        dropped: false,
        changed_at: 1,
    };
    ClusterMap {
        version: 1,
        nodes: (1..=nodes).map(|id| (NodeId(id), node(id))).collect(),
        databases: [(database.id, database)].into(),
        shards: [(SHARD, shard)].into(),
        ..ClusterMap::default()
    }
}

fn report(leader: u64, term: u64, conf: u64, members: &[Member]) -> ShardReport {
    let others = members.iter().filter(|member| member.node.0 != leader);
    ShardReport {
        shard: SHARD,
        leader: ReplicaId(10 * leader),
        term,
        epoch: Epoch { range: 1, conf },
        members: members.to_vec(),
        followers: others
            .map(|member| FollowerStatus {
                replica: member.replica,
                matched: 9,
                active: true,
                caught_up: true,
            })
            .collect(),
        last: 9,
        keys: 0,
        bytes: 0,
    }
}

fn survey(map: &ClusterMap, node: u64, led: Vec<ShardReport>) -> Survey {
    let ordered = map.shards.values().flat_map(|shard| shard.ordered().map(|member| (shard.id, *member)));
    let held = ordered.filter(|(_, member)| member.node == NodeId(node));
    Survey {
        node: NodeId(node),
        disk_full: false,
        led,
        held: held.map(|(shard, member)| (shard, member.replica)).collect(),
        sick: Vec::new(),
        snapshot_bytes: 0,
    }
}

/// All nodes but `silent` answer; node `leader` leads.
fn hear(reconciler: &mut Reconciler, now_ms: u64, map: &ClusterMap, leader: u64, silent: &[u64]) {
    for node in map.nodes.keys().filter(|node| !silent.contains(&node.0)) {
        let shard = &map.shards[&SHARD];
        let led = (node.0 == leader).then(|| report(leader, 7, shard.epoch.conf, &shard.members));
        reconciler.heard(now_ms, survey(map, node.0, led.into_iter().collect()));
    }
}

fn observed(actions: &[Action]) -> Vec<u64> {
    let conf = |action: &Action| match action {
        Action::Meta(MetaCommand::ObserveShard { conf, .. }) => Some(*conf),
        _ => None,
    };
    actions.iter().filter_map(conf).collect()
}

#[test]
fn a_report_of_the_past_changes_nothing() {
    let map = map(4);
    let now = &map.shards[&SHARD].members.clone();
    let later = [now[0], now[1], member(4, MemberRole::Voter)];
    let mut reconciler = Reconciler::new();
    hear(&mut reconciler, 0, &map, 0, &[]);
    reconciler.heard(0, survey(&map, 1, vec![report(1, 9, 8, &later)]));
    assert_eq!(observed(&reconciler.step(0, &map)), [8]);

    // Another says it leads: of a later term, but it has yet to apply what the one before it had applied. The
    // map is told the same as before, and no step is taken by what the new leader says.
    reconciler.heard(2_000, survey(&map, 1, Vec::new()));
    reconciler.heard(2_000, survey(&map, 2, vec![report(2, 10, 6, now)]));
    let actions = reconciler.step(2_000, &map);
    assert_eq!((observed(&actions), actions.len()), (vec![8], 1));
    assert_eq!(reconciler.stuck(), [(SHARD, "its leader is at conf version 6, not yet at 8".into())]);

    // A leader that has been deposed and doesn't know it.
    reconciler.heard(3_000, survey(&map, 1, vec![report(1, 9, 8, &later)]));
    reconciler.step(3_000, &map);
    assert_eq!(reconciler.known().leaders[&SHARD], NodeId(2));
}

#[test]
fn silence_counts_only_while_somebody_listens() {
    let map = map(4);
    let mut reconciler = Reconciler::new();
    let mut now_ms = 0;
    let mut begun = Vec::new();
    let mut run = |reconciler: &mut Reconciler, seconds: u64, now_ms: &mut u64| {
        for _ in 0..seconds {
            *now_ms += 1000;
            hear(reconciler, *now_ms, &map, 1, &[3]);
            begun.extend(reconciler.step(*now_ms, &map).into_iter().map(|action| (*now_ms, action)));
        }
    };
    run(&mut reconciler, 300, &mut now_ms);
    // The process was suspended, or its disk hung, for a day.
    now_ms += 86_400_000;
    run(&mut reconciler, 290, &mut now_ms);
    assert_eq!(reconciler.silent_ms(NodeId(3)), 299_000 + 3_000 + 289_000);
    run(&mut reconciler, 10, &mut now_ms);
    let expected = MetaCommand::BeginMove {
        shard: SHARD,
        conf: 5,
        adds: vec![NodeId(4)],
        removes: vec![ReplicaId(30)],
        cause: MoveCause::Repair,
    };
    assert_eq!(begun.first(), Some(&(86_400_000 + 599_000, Action::Meta(expected))));
}

#[test]
fn nothing_is_done_on_the_word_of_nobody() {
    let mut map = map(4);
    let mut reconciler = Reconciler::new();
    hear(&mut reconciler, 0, &map, 1, &[]);
    map.nodes.get_mut(&NodeId(3)).unwrap().standing = Standing::Leaving;
    // The answers are too old by now.
    assert_eq!(reconciler.step(limits::SURVEY_FRESH_MS + 1, &map), []);
    assert_eq!(
        reconciler.stuck(),
        [(
            SHARD,
            "no leader is known: node 1 doesn't answer; node 2 doesn't answer; node 3 was given up".into()
        )]
    );
    reconciler.refused(SHARD, "the disk is full".into());
    hear(&mut reconciler, 6_000, &map, 1, &[]);
    assert_eq!(reconciler.step(6_000, &map).len(), 1);
    assert_eq!(reconciler.stuck(), [(SHARD, "the disk is full".into())]);
}

#[test]
fn who_is_sick_for_a_moment_only_is_left_alone() {
    let map = map(4);
    let mut reconciler = Reconciler::new();
    for second in 0..200_u64 {
        let now_ms = 1000 * second;
        hear(&mut reconciler, now_ms, &map, 1, &[]);
        if second % 50 > 0 {
            let sick = SickReplica { shard: SHARD, replica: ReplicaId(20), why: "crashed".into() };
            reconciler.heard(now_ms, Survey { sick: vec![sick], ..survey(&map, 2, Vec::new()) });
        }
        assert_eq!(reconciler.step(now_ms, &map), []);
    }
    // A replica that isn't there at all is as good as sick.
    for second in 200..=260_u64 {
        let now_ms = 1000 * second;
        hear(&mut reconciler, now_ms, &map, 1, &[]);
        reconciler.heard(now_ms, Survey { held: Vec::new(), ..survey(&map, 2, Vec::new()) });
        assert_eq!(reconciler.step(now_ms, &map).len(), usize::from(second == 260));
    }
}
