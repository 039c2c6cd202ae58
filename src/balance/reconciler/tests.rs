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
        let led = (node.0 == leader).then(|| {
            let mut report = report(leader, 7, shard.epoch.conf, &shard.members);
            let there = |f: &FollowerStatus| !silent.contains(&(f.replica.0 / 10));
            report.followers.iter_mut().for_each(|f| (f.active, f.caught_up) = (there(f), there(f)));
            report
        });
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
    reconciler.done(ShardId(SHARD.0 + 1));
    assert_eq!(reconciler.stuck().len(), 1, "that was another");
    reconciler.done(SHARD);
    assert_eq!(reconciler.stuck(), [], "it has gone on");
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

/// A node whose replica was sick when it was stopped isn't given up any sooner than others.
#[test]
fn who_was_sick_before_its_node_was_stopped_is_waited_for() {
    let map = map(4);
    let mut reconciler = Reconciler::new();
    for second in 0..300_u64 {
        let now_ms = 1000 * second;
        hear(&mut reconciler, now_ms, &map, 1, if second < 20 { &[] } else { &[2] });
        if second < 20 {
            let sick = SickReplica { shard: SHARD, replica: ReplicaId(20), why: "crashed".into() };
            reconciler.heard(now_ms, Survey { sick: vec![sick], ..survey(&map, 2, Vec::new()) });
        }
        assert_eq!(reconciler.step(now_ms, &map), [], "second {second}");
    }
}

/// The moves that were begun, and when, in seconds.
fn begun(actions: &[(u64, Action)]) -> Vec<(u64, ShardId)> {
    let begin = |(second, action): &(u64, Action)| match action {
        Action::Meta(MetaCommand::BeginMove { shard, .. }) => Some((*second, *shard)),
        _ => None,
    };
    actions.iter().filter_map(begin).collect()
}

/// Every second from `from` on nodes tell what `surveys` says; what is done about it, but for repetitions.
fn run(
    reconciler: &mut Reconciler,
    seconds: std::ops::Range<u64>,
    map: &ClusterMap,
    surveys: impl Fn(u64) -> Vec<Survey>,
) -> Vec<(u64, Action)> {
    let mut done: Vec<(u64, Action)> = Vec::new();
    for second in seconds {
        surveys(second).into_iter().for_each(|survey| reconciler.heard(1000 * second, survey));
        for action in reconciler.step(1000 * second, map) {
            if done.iter().all(|(_, before)| *before != action) {
                done.push((second, action));
            }
        }
    }
    done
}

#[test]
fn a_node_that_others_hear_from_is_not_gone() {
    let map = map(4);
    let led = || report(1, 7, 5, &map.shards[&SHARD].members);
    let surveys = |hears: bool| {
        let mut led = led();
        led.followers.iter_mut().for_each(|f| f.active = hears || f.replica != ReplicaId(30));
        vec![survey(&map, 1, vec![led]), survey(&map, 2, Vec::new()), survey(&map, 4, Vec::new())]
    };
    let mut reconciler = Reconciler::new();
    assert_eq!(run(&mut reconciler, 0..2000, &map, |_| surveys(true)), []);
    assert_eq!(reconciler.silent_ms(NodeId(3)), 1_999_000);
    let done = run(&mut reconciler, 2000..2010, &map, |_| surveys(false));
    assert_eq!(begun(&done), [(2000, SHARD)]);
    // A node that is given up is not asked whether it is there.
    let mut map = map.clone();
    map.nodes.get_mut(&NodeId(3)).unwrap().standing = Standing::Leaving;
    let done = run(&mut Reconciler::new(), 0..2, &map, |_| surveys(true));
    assert_eq!(begun(&done), [(0, SHARD)]);
}

#[test]
fn an_address_that_another_gives_evicts_nobody_who_is_there() {
    let mut map = map(4);
    for (id, node) in &mut map.nodes {
        node.peer_address = format!("10.0.0.{}:1", id.0);
    }
    let mut copy = map.nodes[&NodeId(3)].clone();
    (copy.id, copy.store_id) = (NodeId(5), RandomId([5; 16]));
    map.nodes.insert(copy.id, copy);
    assert_eq!(map.replaced(), [NodeId(3)].into());
    let all = |silent: &[u64]| {
        let mut led = report(1, 7, 5, &map.shards[&SHARD].members);
        led.followers.iter_mut().for_each(|f| f.active = !silent.contains(&(f.replica.0 / 10)));
        let others = [2, 3, 4].into_iter().filter(|node| !silent.contains(node));
        let others = others.map(|node| survey(&map, node, Vec::new()));
        others.chain([survey(&map, 1, vec![led])]).collect::<Vec<_>>()
    };
    let mut reconciler = Reconciler::new();
    assert_eq!(run(&mut reconciler, 0..500, &map, |_| all(&[])), []);
    assert!(reconciler.known().taken_over.is_empty());
    let voters = |reconciler: &Reconciler| {
        let record = ShardRecord { id: crate::ids::METADATA_SHARD, ..map.shards[&SHARD].clone() };
        let now_ms = reconciler.memory.now_ms;
        wants::wanted(&reconciler.ears.view(now_ms, &map), &record)
    };
    assert_eq!(voters(&reconciler), 5, "the node counts, and so does the other");
    // When it falls silent, it is what it seems to be: a node whose directory was lost.
    let done = run(&mut reconciler, 500..600, &map, |_| all(&[3]));
    assert_eq!(begun(&done), [(500 + limits::SICK_MS / 1000 - 1, SHARD)]);
    assert_eq!(reconciler.known().taken_over, [NodeId(3)].into());
    assert_eq!(voters(&reconciler), 3);
}

#[test]
fn a_move_that_cannot_go_on_holds_up_no_other() {
    let mut map = map(5);
    map.policy.moves_at_a_time = 1;
    let mut other = map.shards[&SHARD].clone();
    other.id = ShardId(2);
    map.shards.insert(other.id, other);
    let record = map.shards.get_mut(&SHARD).unwrap();
    // A joint change of which too few voters are left to end it.
    record.members[2].role = MemberRole::Outgoing;
    record.members.push(member(4, MemberRole::Incoming));
    let (adds, removes) = (vec![member(4, MemberRole::Learner)], vec![ReplicaId(30)]);
    record.moving = Some(ShardMove { id: 1, adds, removes, cancelling: false, cause: MoveCause::Drain });
    map.nodes.get_mut(&NodeId(3)).unwrap().standing = Standing::Draining;
    let mut stands = report(1, 7, 5, &map.shards[&SHARD].members);
    stands.followers.iter_mut().for_each(|f| f.active = f.replica == ReplicaId(30));
    let goes = ShardReport { shard: ShardId(2), ..report(1, 7, 5, &map.shards[&ShardId(2)].members) };
    let surveys = |_| {
        let led = vec![stands.clone(), goes.clone()];
        (2..=5).map(|node| survey(&map, node, Vec::new())).chain([survey(&map, 1, led)]).collect()
    };
    let mut reconciler = Reconciler::new();
    assert_eq!(run(&mut reconciler, 0..60, &map, surveys), []);
    let why = |shard, why: &str| (ShardId(shard), why.to_owned());
    assert_eq!(
        reconciler.stuck(),
        [
            why(1, "a joint change can't end: only 1 of its 3 voters after it answer"),
            why(2, "node 3 is to be emptied; it waits for 1 moves under way"),
        ]
    );
    let done = run(&mut reconciler, 60..70, &map, surveys);
    assert_eq!(begun(&done), [(60, ShardId(2))]);
}

#[test]
fn newcomers_go_again_if_one_is_lost_and_those_before_them_would_leave_too_few() {
    let mut map = map(5);
    map.databases.get_mut(&DatabaseId(1)).unwrap().replicas = 2;
    let record = map.shards.get_mut(&SHARD).unwrap();
    record.members.push(member(4, MemberRole::Voter));
    let adds = vec![member(3, MemberRole::Learner), member(4, MemberRole::Learner)];
    let removes = vec![ReplicaId(10), ReplicaId(20)];
    record.moving = Some(ShardMove { id: 1, adds, removes, cancelling: false, cause: MoveCause::Drain });
    let first = |map: &ClusterMap, leader: u64, silent: &[u64]| {
        let mut led = report(leader, 7, 5, &map.shards[&SHARD].members);
        led.followers.iter_mut().for_each(|f| f.active = !silent.contains(&(f.replica.0 / 10)));
        let surveys = |_| {
            let led = |node| if node == leader { vec![led.clone()] } else { Vec::new() };
            let survey = |node| survey(map, node, led(node));
            let why = "can't be opened".to_owned();
            let sick = vec![SickReplica { shard: SHARD, replica: ReplicaId(30), why }];
            let third = Survey { sick, ..survey(3) };
            [1, 2, 4, 5].map(survey).into_iter().chain([third]).collect()
        };
        let done = run(&mut Reconciler::new(), 0..limits::SICK_MS / 1000 + 2, map, surveys);
        done.into_iter().map(|(_, action)| action).next()
    };
    let cancel = Action::Meta(MetaCommand::CancelMove { shard: SHARD, id: 1 });
    assert_eq!(first(&map, 4, &[3]), Some(cancel));
    assert_eq!(first(&map, 4, &[2, 3]), None, "who was there before can't go on alone either");
    map.shards.get_mut(&SHARD).unwrap().moving.as_mut().unwrap().cancelling = true;
    let transfer = |from: u64| Action::Transfer { node: NodeId(from), shard: SHARD, to: NodeId(1) };
    assert_eq!(first(&map, 4, &[3]), Some(transfer(4)));
    let remove = vec![ReplicaId(30), ReplicaId(40)];
    let change = MembershipChange::Exchange { promote: Vec::new(), remove };
    let change = Action::Change { node: NodeId(1), shard: SHARD, conf: 5, change };
    assert_eq!(first(&map, 1, &[3]), Some(change));
}

#[test]
fn a_rebalancing_waits_for_leaders_that_cannot_be_handed_over_yet() {
    let mut map = map(3);
    map.rebalance.plan = 4;
    map.rebalance.state = crate::placement::map::RebalanceState::Running;
    let record = map.shards.get_mut(&SHARD).unwrap();
    record.members.swap(0, 1);
    let nodes = vec![NodeId(1), NodeId(2), NodeId(3)];
    record.previous = Some(crate::placement::map::ShardTarget { plan: 4, nodes });
    let surveys = |leader: u64, ready: bool| {
        let mut led = report(leader, 7, 5, &map.shards[&SHARD].members);
        led.followers.iter_mut().for_each(|f| f.caught_up = ready);
        let led = |node| if node == leader { vec![led.clone()] } else { Vec::new() };
        (1..=3).map(|node| survey(&map, node, led(node))).collect::<Vec<_>>()
    };
    let named = |done: Vec<(u64, Action)>| {
        let kind = |action: &Action| matches!(action, Action::Transfer { .. });
        done.iter().map(|(second, action)| (*second, kind(action))).collect::<Vec<_>>()
    };
    let mut reconciler = Reconciler::new();
    // Its heir lacks entries, and then nobody is known to lead.
    assert_eq!(run(&mut reconciler, 0..20, &map, |_| surveys(1, false)), []);
    assert_eq!(run(&mut reconciler, 20..40, &map, |_| surveys(0, false)), []);
    assert_eq!(named(run(&mut reconciler, 40..45, &map, |_| surveys(1, true))), [(40, true)]);
    let ends = limits::REBALANCE_LEADERS_MS_MAX / 1000;
    assert_eq!(named(run(&mut reconciler, 45..ends + 2, &map, |_| surveys(1, false))), [(ends, false)]);
    let mut reconciler = Reconciler::new();
    assert_eq!(named(run(&mut reconciler, 0..5, &map, |_| surveys(2, true))), [(0, false)]);
}

/// When a move of [`SHARD`] to node 4 is rolled back, if its newcomer has come so far as `newcomer` says.
fn rolled_back(seconds: u64, bytes: u64, newcomer: impl Fn(u64) -> (u64, bool)) -> Option<u64> {
    let mut map = map(4);
    map.policy.bytes_per_second = 1 << 20;
    map.policy.moves_at_a_time = 1;
    let record = map.shards.get_mut(&SHARD).unwrap();
    record.members.push(member(4, MemberRole::Learner));
    let (adds, removes) = (vec![member(4, MemberRole::Learner)], vec![ReplicaId(30)]);
    record.moving = Some(ShardMove { id: 1, adds, removes, cancelling: false, cause: MoveCause::Drain });
    let surveys = |second| {
        let mut led = ShardReport { bytes, ..report(1, 7, 5, &map.shards[&SHARD].members) };
        let learner = led.followers.last_mut().unwrap();
        (learner.matched, learner.active) = newcomer(second);
        learner.caught_up = false;
        (2..=4).map(|node| survey(&map, node, Vec::new())).chain([survey(&map, 1, vec![led])]).collect()
    };
    let done = run(&mut Reconciler::new(), 0..seconds, &map, surveys);
    let cancel = Action::Meta(MetaCommand::CancelMove { shard: SHARD, id: 1 });
    done.iter().find(|(_, action)| *action == cancel).map(|(second, _)| *second)
}

#[test]
fn a_newcomer_that_comes_no_further_is_given_up() {
    // From the step on that finds it so; it lacked something since the one before.
    let still = (limits::CATCH_UP_STILL_MS + limits::SICK_MS) / 1000 - 1;
    assert_eq!(rolled_back(2 * still, 0, |_| (5, true)), Some(still));
    assert_eq!(rolled_back(4 * still, 0, |second| (second / 300, true)), None, "slow is not still");
    // What there is to copy takes its time, as the policy has it.
    assert_eq!(rolled_back(2 * still, 100 << 20, |_| (5, true)), Some(still + 400));
}

#[test]
fn a_newcomer_that_comes_and_goes_is_given_up() {
    assert_eq!(rolled_back(100, 0, |_| (5, false)), Some(60));
    let at = rolled_back(300, 0, |second| (second, second % 2 == 0)).expect("rolled back");
    assert!((200..260).contains(&at), "{at}");
    assert_eq!(rolled_back(600, 0, |second| (second, second % 4 > 0)), None);
}

#[test]
fn what_was_put_off_is_named_again_at_once() {
    let mut map = map(4);
    map.nodes.get_mut(&NodeId(3)).unwrap().standing = Standing::Leaving;
    let mut reconciler = Reconciler::new();
    let mut named = 0;
    for second in 0..4 {
        hear(&mut reconciler, 1000 * second, &map, 1, &[]);
        for action in reconciler.step(1000 * second, &map) {
            named += 1;
            reconciler.put_off(&action);
        }
    }
    assert_eq!(named, 4);
}

#[test]
fn who_was_given_up_and_holds_nothing_is_removed() {
    let mut map = map(5);
    for node in [4, 5] {
        map.nodes.get_mut(&NodeId(node)).unwrap().standing = Standing::Leaving;
    }
    let seen = map.nodes[&NodeId(4)].changed_at;
    let removed = |node| {
        let command = MetaCommand::SetStanding { node: NodeId(node), standing: Standing::Removed };
        Action::Meta(command.seen(seen))
    };
    let mut reconciler = Reconciler::new();
    // What the shard says of its members the map has yet to follow.
    let mut members = map.shards[&SHARD].members.clone();
    members.push(member(4, MemberRole::Learner));
    reconciler.heard(0, survey(&map, 1, vec![report(1, 7, 6, &members)]));
    assert!(reconciler.step(0, &map).contains(&removed(5)));
    map.nodes.get_mut(&NodeId(5)).unwrap().standing = Standing::Removed;
    reconciler.heard(1000, survey(&map, 1, vec![report(1, 7, 6, &members)]));
    assert!(!reconciler.step(1000, &map).contains(&removed(4)));
    members.pop();
    reconciler.heard(2000, survey(&map, 1, vec![report(1, 7, 7, &members)]));
    assert!(reconciler.step(2000, &map).contains(&removed(4)));
}

/// The map may have been recovered from an old replica: what it doesn't place may be there all the same.
#[test]
fn who_was_given_up_stays_until_each_shard_has_told_and_while_it_holds_something() {
    let mut map = map(5);
    let untold = ShardId(2);
    map.shards.insert(untold, ShardRecord { id: untold, ..map.shards[&SHARD].clone() });
    map.nodes.get_mut(&NodeId(4)).unwrap().standing = Standing::Leaving;
    let command = MetaCommand::SetStanding { node: NodeId(4), standing: Standing::Removed };
    let removed = Action::Meta(command.seen(map.nodes[&NodeId(4)].changed_at));
    let members = map.shards[&SHARD].members.clone();
    let led =
        |conf| vec![report(1, 7, 5, &members), ShardReport { shard: untold, ..report(1, 7, conf, &members) }];
    let why = |reconciler: &Reconciler, shard| {
        reconciler
            .stuck()
            .into_iter()
            .find(|(stuck, _)| *stuck == shard)
            .map(|(_, why)| why)
            .unwrap_or_default()
    };
    let mut reconciler = Reconciler::new();
    // A shard without a leader, one whose leader is older than the map, then one that is led.
    reconciler.heard(0, survey(&map, 1, led(5)[..1].to_vec()));
    assert!(!reconciler.step(0, &map).contains(&removed));
    assert!(why(&reconciler, untold).contains("node 4, which was given up"), "{}", why(&reconciler, untold));
    reconciler.heard(1000, survey(&map, 1, led(4)));
    assert!(!reconciler.step(1000, &map).contains(&removed));
    assert!(why(&reconciler, untold).contains("node 4, which was given up"));
    reconciler.heard(2000, survey(&map, 1, led(5)));
    assert!(reconciler.step(2000, &map).contains(&removed), "a dead node tells nothing");
    assert_eq!(why(&reconciler, untold), "");

    // It is back, and holds what the map knows nothing of: until it doesn't, or falls silent.
    let holds = |shard| Survey { held: vec![(shard, ReplicaId(77))], ..survey(&map, 4, Vec::new()) };
    let is_removed = |held: Survey, now: u64| {
        let mut reconciler = Reconciler::new();
        reconciler.heard(0, held);
        reconciler.heard(now, survey(&map, 1, led(5)));
        let is_removed = reconciler.step(now, &map).contains(&removed);
        assert_eq!(why(&reconciler, SHARD).is_empty(), is_removed);
        is_removed
    };
    assert!(!is_removed(holds(SHARD), 0));
    assert!(is_removed(holds(SHARD), limits::SURVEY_FRESH_MS + 1));
    assert!(is_removed(survey(&map, 4, Vec::new()), 0));
    assert!(is_removed(holds(ShardId(99)), 0), "of a shard that there isn't");
}
