//! What the supervisor decides about its replicas, without any actors.

use super::*;
use crate::ids::DatabaseId;
use crate::placement::map::{Member, MemberRole, MoveCause, ShardMove};
use crate::placement::ring::RingRange;

fn map(dropped: bool) -> ClusterMap {
    let shard = ShardRecord {
        id: ShardId(4),
        database: DatabaseId(1),
        range: RingRange::ALL,
        epoch: Epoch { range: 1, conf: 1 },
        members: vec![Member { replica: ReplicaId(9), node: NodeId(2), role: MemberRole::Voter }],
        dropped,
        moving: None,
        target: None,
        previous: None,
        changed_at: 3,
    };
    ClusterMap { shards: [(shard.id, shard)].into(), ..ClusterMap::default() }
}

/// The same after `change`, by a record of version `changed_at`.
fn changed(changed_at: u64, change: impl FnOnce(&mut ShardRecord)) -> ClusterMap {
    let mut map = map(false);
    let shard = map.shards.get_mut(&ShardId(4)).unwrap();
    shard.changed_at = changed_at;
    change(shard);
    map
}

fn member(replica: u64, node: u64, role: MemberRole) -> Member {
    Member { replica: ReplicaId(replica), node: NodeId(node), role }
}

fn moving(adds: Vec<Member>) -> Option<ShardMove> {
    Some(ShardMove { id: 4, adds, removes: Vec::new(), cancelling: false, cause: MoveCause::Repair })
}

#[test]
fn only_a_first_member_knows_the_group_from_the_start() {
    use MemberRole::{Learner, Voter};
    let replicas = Replicas::default();
    let created = |map: ClusterMap, node| {
        let mut create = replicas.orders(&map, NodeId(node)).create;
        assert_eq!(create.len(), 1);
        create.pop().unwrap()
    };
    let first = created(map(false), 2);
    assert_eq!((first.members.len(), first.epoch.conf, first.ordered_at), (1, 1, 3));
    // By a move; and later, when the group has taken it in already before this node heard of it.
    let coming = changed(4, |shard| shard.moving = moving(vec![member(12, 3, Learner)]));
    let there = changed(5, |shard| {
        shard.epoch.conf = 2;
        shard.members.push(member(12, 3, Learner));
        shard.moving = moving(vec![member(12, 3, Learner)]);
    });
    let moved = changed(6, |shard| {
        shard.epoch.conf = 4;
        shard.members = vec![member(12, 3, Voter)];
    });
    for map in [coming, there, moved] {
        let newcomer = created(map, 3);
        assert_eq!((newcomer.replica, newcomer.members.len()), (ReplicaId(12), 0));
        assert_eq!(newcomer.epoch, Epoch { range: 1, conf: 0 });
    }
    // A first member whose node was away while the group went on.
    let late = created(changed(5, |shard| shard.epoch.conf = 2), 2);
    assert!(late.members.is_empty());
}

#[test]
fn a_replica_goes_by_a_newer_record_of_its_own_shard_alone() {
    use MemberRole::{Learner, Voter};
    let mut replicas = Replicas::default();
    let coming = changed(5, |shard| shard.moving = moving(vec![member(12, 3, Learner)]));
    replicas.created(&replicas.orders(&coming, NodeId(3)).create);
    let removed = |map: &ClusterMap| replicas.orders(map, NodeId(3)).remove;
    assert_eq!(removed(&coming), []);
    // Maps from before the move, as a node may have cached one, or hear of it from another that lags.
    assert_eq!(removed(&map(false)), []);
    assert_eq!(removed(&changed(4, |_| ())), []);
    assert_eq!(removed(&changed(5, |_| ())), []);
    assert_eq!(removed(&ClusterMap::default()), [], "it says nothing of the shard");
    // It is a member, the move is over: it stays.
    assert_eq!(removed(&changed(6, |shard| shard.members.push(member(12, 3, Voter)))), []);
    // Rolled back, without any change of the shard's conf version that the map has seen.
    assert_eq!(removed(&changed(6, |_| ())), [ReplicaId(12)]);
    // On this node there is another one by now.
    let again = changed(7, |shard| shard.moving = moving(vec![member(13, 3, Learner)]));
    assert_eq!(removed(&again), [ReplicaId(12)]);
    assert_eq!(replicas.orders(&again, NodeId(3)).create[0].replica, ReplicaId(13));
    let dropped = changed(4, |shard| shard.dropped = true);
    assert_eq!(removed(&dropped), [ReplicaId(12)]);
}

#[test]
fn only_who_is_named_alone_in_a_later_generation_goes_on_alone() {
    use MemberRole::{Learner, Voter};
    let mut replicas = Replicas::default();
    let three = |shard: &mut ShardRecord| {
        shard.members = (2..=4).map(|node| member(7 + node, node, Voter)).collect();
    };
    replicas.created(&replicas.orders(&changed(3, three), NodeId(2)).create);
    let alone = |conf, members: &[Member]| {
        let members = members.to_vec();
        let map = changed(9, |shard| (shard.epoch.conf, shard.members) = (conf, members));
        replicas.recoveries(&map, NodeId(2)).into_iter().map(|(replica, _)| replica).collect::<Vec<_>>()
    };
    let (own, other) = (member(9, 2, Voter), member(10, 3, Voter));
    // Its group has shrunk to it by itself; it will learn that from its log.
    assert_eq!(alone(7, &[own]), []);
    assert_eq!(alone(1 << 32, &[own]), [ReplicaId(9)]);
    assert_eq!(alone((1 << 32) + 5, &[own, member(14, 5, Learner)]), [], "not alone any more");
    assert_eq!(alone(1 << 32, &[other]), []);
    assert_eq!(alone(1 << 32, &[member(9, 2, Learner)]), []);
    // Once, and again if another operator decides it again.
    let epoch = Epoch { range: 1, conf: 1 << 32 };
    let membership = RecordedMembership { index: 20, epoch, members: vec![own] };
    let stopped = |replicas: &mut Replicas| {
        replicas.get_mut(ReplicaId(9)).unwrap().opening = false;
        replicas.begin_install(ReplicaId(9)).unwrap();
    };
    stopped(&mut replicas);
    let as_it_was = replicas.end_recovery(ReplicaId(9), None).unwrap();
    assert_eq!(as_it_was.members.len(), 3);
    stopped(&mut replicas);
    let record = replicas.end_recovery(ReplicaId(9), Some(membership)).unwrap();
    assert_eq!((record.epoch, record.members_at, record.members), (epoch, 20, vec![own]));
    let due = |conf| {
        let map = changed(9, |shard| (shard.epoch.conf, shard.members) = (conf, vec![own]));
        replicas.recoveries(&map, NodeId(2)).len()
    };
    assert_eq!((due(1 << 32), due((1 << 32) + 4), due(2 << 32)), (0, 0, 1));
    // A newcomer has no log to go on with.
    let mut replicas = Replicas::default();
    let newcomer = changed(9, |shard| (shard.epoch.conf, shard.members) = (1 << 32, vec![own]));
    replicas.created(&replicas.orders(&newcomer, NodeId(2)).create);
    assert_eq!(replicas.recoveries(&newcomer, NodeId(2)), []);
}

fn boom(at: Instant) -> Crash {
    Crash { reason: "boom".into(), applying: None, at }
}

#[test]
fn a_started_id_is_never_created_again() {
    let mut replicas = Replicas::default();
    assert!(replicas.orders(&map(false), NodeId(1)).create.is_empty(), "another node's");
    let orders = replicas.orders(&map(false), NodeId(2));
    assert_eq!(orders.create.len(), 1);
    replicas.created(&orders.create);
    assert!(replicas.orders(&map(false), NodeId(2)).create.is_empty());
    assert_eq!(replicas.orders(&map(true), NodeId(2)).remove, vec![ReplicaId(9)]);
    replicas.removed(ReplicaId(9));
    assert!(replicas.orders(&map(false), NodeId(2)).create.is_empty(), "a tombstone stays one");
}

#[test]
fn only_the_state_of_tombstones_that_may_have_one_is_looked_for() {
    let phases = [ReplicaPhase::Active, ReplicaPhase::Tombstone, ReplicaPhase::Destroyed];
    let records = (1..).zip(phases).map(|(number, phase)| ReplicaRecord {
        replica: ReplicaId(number),
        phase,
        ..record_of(&map(false).shards[&ShardId(4)], ReplicaId(number))
    });
    let mut replicas = Replicas::new(records.collect());
    assert_eq!(replicas.take_remains(), [ReplicaId(2)]);
    assert_eq!(replicas.take_remains(), []);
    assert_eq!(replicas.iter().map(|slot| slot.record.replica).collect::<Vec<_>>(), [ReplicaId(1)]);
}

#[test]
fn a_crash_that_is_known_before_the_start_is_not_forgotten() {
    let mut replicas = Replicas::default();
    replicas.created(&replicas.orders(&map(false), NodeId(2)).create);
    let now = Instant::now();
    for incarnation in 1..=limits::CRASHES_MAX as Incarnation {
        replicas.get_mut(ReplicaId(9)).unwrap().incarnation = incarnation;
        assert!(replicas.crashed(ReplicaId(9), incarnation, &boom(now)).is_some());
        assert_eq!(replicas.started(ReplicaId(9), incarnation, Ok(None)), Started::Old);
    }
    let health = replicas.get_mut(ReplicaId(9)).unwrap().health.clone();
    assert_eq!(health, ReplicaHealth::Quarantined("boom".into()));
    assert_eq!(replicas.started(ReplicaId(8), 1, Ok(None)), Started::Old, "removed");
    assert!(replicas.closed().expect("one is down").contains("shard 4 is quarantined: boom"));
    replicas.get_mut(ReplicaId(9)).unwrap().incarnation += 1;
    let next = limits::CRASHES_MAX as Incarnation + 1;
    assert_eq!(replicas.started(ReplicaId(9), next, Ok(None)), Started::Serving { failures: 0 });
    assert_eq!(replicas.get_mut(ReplicaId(9)).unwrap().health, ReplicaHealth::Serving);
    assert_eq!(replicas.closed(), None);
}

#[test]
fn a_replica_that_cant_be_opened_is_tried_again_ever_more_slowly() {
    let mut replicas = Replicas::default();
    replicas.created(&replicas.orders(&map(false), NodeId(2)).create);
    assert_eq!(replicas.closed(), None, "it was not tried yet");
    let mut last = Duration::ZERO;
    for incarnation in 1..20 {
        replicas.get_mut(ReplicaId(9)).unwrap().incarnation = incarnation;
        let reason = if incarnation < 10 { "no descriptors" } else { "no memory" };
        let Started::Failed { again, news } = replicas.started(ReplicaId(9), incarnation, Err(reason.into()))
        else {
            panic!("it failed");
        };
        assert!(again > last || again == Duration::from_millis(limits::REOPEN_MS_MAX), "{again:?}");
        assert_eq!(news, incarnation == 1 || incarnation == 10);
        last = again;
    }
    assert_eq!(last, Duration::from_millis(limits::REOPEN_MS_MAX));
    assert_eq!(
        replicas.closed().as_deref(),
        Some("1 of 1 replicas can't serve; that of shard 4 is failed: no memory")
    );
    replicas.get_mut(ReplicaId(9)).unwrap().incarnation = 20;
    assert_eq!(replicas.started(ReplicaId(9), 20, Ok(None)), Started::Serving { failures: 19 });
    replicas.get_mut(ReplicaId(9)).unwrap().incarnation = 21;
    let Started::Failed { again, .. } = replicas.started(ReplicaId(9), 21, Err("no".into())) else {
        panic!("it failed");
    };
    assert_eq!(again, Duration::from_millis(limits::RESTART_BACKOFF_MS), "it begins anew");
}

fn offer() -> SnapshotOffer {
    SnapshotOffer {
        stream: crate::ids::RandomId([1; 16]),
        shard: ShardId(4),
        from: ReplicaId(8),
        to: ReplicaId(9),
        epoch: Epoch { range: 1, conf: 1 },
        position: crate::ids::Position { index: 80, term: 6 },
        leader_term: 6,
        bytes: 100,
    }
}

fn refused(verdict: Result<u32, SnapshotAnswer>) -> bool {
    matches!(verdict, Err(SnapshotAnswer::Refused(_)))
}

#[test]
fn snapshots_are_for_replicas_of_this_node_that_are_not_just_being_opened() {
    let mut replicas = Replicas::default();
    assert_eq!(replicas.judge(&offer()), Err(busy()), "not created yet");
    replicas.created(&replicas.orders(&map(false), NodeId(2)).create);
    assert_eq!(replicas.judge(&offer()), Err(busy()), "being opened");
    replicas.get_mut(ReplicaId(9)).unwrap().incarnation = 1;
    assert_eq!(replicas.started(ReplicaId(9), 1, Ok(None)), Started::Serving { failures: 0 });
    assert_eq!(replicas.judge(&offer()), Ok(1));
    assert!(refused(replicas.judge(&SnapshotOffer { shard: ShardId(5), ..offer() })));
    assert!(refused(replicas.judge(&SnapshotOffer { epoch: Epoch { range: 0, conf: 1 }, ..offer() })));
    assert!(refused(replicas.judge(&SnapshotOffer { epoch: Epoch { range: 1, conf: 0 }, ..offer() })));
    let now = Instant::now();
    assert!(replicas.crashed(ReplicaId(9), 1, &boom(now)).is_some());
    assert_eq!(replicas.judge(&offer()), Err(busy()), "about to be opened");
    assert_eq!(replicas.begin_install(ReplicaId(9)), Err(busy()));
    for _ in 1..limits::CRASHES_MAX {
        replicas.crashed(ReplicaId(9), 1, &boom(now));
    }
    assert!(refused(replicas.judge(&offer())), "quarantined");
    replicas.removed(ReplicaId(9));
    assert!(refused(replicas.judge(&offer())), "removed");
}

#[test]
fn who_has_lost_its_state_takes_one_from_before_the_last_change_of_members() {
    let mut replicas = Replicas::default();
    let at = |conf| Epoch { range: 1, conf };
    replicas.created(&replicas.orders(&map(false), NodeId(2)).create);
    replicas.get_mut(ReplicaId(9)).unwrap().record.epoch = at((1 << 32) + 5);
    let start = |replicas: &mut Replicas, lost: Option<String>| {
        let incarnation = replicas.begin_start(ReplicaId(9)).unwrap();
        replicas.started(ReplicaId(9), incarnation, Ok(lost));
    };
    let judge = |replicas: &Replicas, conf| replicas.judge(&SnapshotOffer { epoch: at(conf), ..offer() });
    start(&mut replicas, Some("gone".into()));
    assert_eq!(judge(&replicas, (1 << 32) + 4), Ok(1), "its log tells of the change");
    assert!(refused(judge(&replicas, 7)), "an operator had it go on without those");
    let range = Epoch { range: 0, conf: (1 << 32) + 5 };
    assert!(refused(replicas.judge(&SnapshotOffer { epoch: range, ..offer() })));
    start(&mut replicas, None);
    assert!(refused(judge(&replicas, (1 << 32) + 4)), "it has applied the change");
}

#[test]
fn nothing_is_begun_with_a_log_that_is_being_read() {
    let mut replicas = Replicas::default();
    replicas.created(&replicas.orders(&map(false), NodeId(2)).create);
    let replica = ReplicaId(9);
    let first = replicas.begin_start(replica).unwrap();
    replicas.started(replica, first, Err("no descriptors".into()));
    // Between two attempts nobody reads it.
    assert!(replicas.begin_install(replica).is_ok());
    assert_eq!(replicas.begin_start(replica), None, "it is another log by now");
    assert_eq!(replicas.begin_reopen(replica, first), None, "it is opened when that is done");
    assert!(replicas.end_install(replica, None).is_some());
    let second = replicas.begin_start(replica).unwrap();
    replicas.started(replica, second, Err("no descriptors".into()));
    assert_eq!(replicas.begin_reopen(replica, first), None, "old news");
    assert!(replicas.begin_reopen(replica, second).is_some());
    assert_eq!(replicas.begin_install(replica), Err(busy()));
    assert_eq!(replicas.judge(&offer()), Err(busy()));
    let third = replicas.begin_start(replica).unwrap();
    assert_eq!(replicas.started(replica, third, Ok(None)), Started::Serving { failures: 2 });
    assert!(replicas.begin_install(replica).is_ok());
    replicas.removed(replica);
    assert_eq!((replicas.begin_start(replica), replicas.begin_reopen(replica, third)), (None, None));
}

#[test]
fn whom_its_group_counts_on_stays_until_the_map_has_caught_up() {
    use MemberRole::{Learner, Voter};
    let mut replicas = Replicas::default();
    let coming = changed(5, |shard| shard.moving = moving(vec![member(12, 3, Learner)]));
    replicas.created(&replicas.orders(&coming, NodeId(3)).create);
    let removed = |replicas: &Replicas, conf, dropped| {
        let map = changed(6, |shard| (shard.epoch.conf, shard.dropped) = (conf, dropped));
        replicas.orders(&map, NodeId(3)).remove
    };
    assert_eq!(removed(&replicas, 4, false), [ReplicaId(12)]);
    let record = &mut replicas.get_mut(ReplicaId(12)).unwrap().record;
    (record.epoch.conf, record.members) = (5, vec![member(9, 2, Voter), member(12, 3, Voter)]);
    assert_eq!(removed(&replicas, 4, false), []);
    assert_eq!(removed(&replicas, 5, false), [ReplicaId(12)]);
    assert_eq!(removed(&replicas, 4, true), [ReplicaId(12)]);
    // A record that doesn't name it says nothing for it.
    replicas.get_mut(ReplicaId(12)).unwrap().record.members.pop();
    assert_eq!(removed(&replicas, 4, false), [ReplicaId(12)]);
}

#[test]
fn an_installation_ends_one_start_and_the_record_names_the_next_generation() {
    let mut replicas = Replicas::default();
    replicas.created(&replicas.orders(&map(false), NodeId(2)).create);
    replicas.get_mut(ReplicaId(9)).unwrap().incarnation = 1;
    assert_eq!(replicas.started(ReplicaId(9), 1, Ok(None)), Started::Serving { failures: 0 });
    assert_eq!(replicas.begin_install(ReplicaId(9)), Ok((ShardId(4), 1)));
    assert_eq!(replicas.begin_install(ReplicaId(9)), Err(busy()), "one at a time");
    assert_eq!(replicas.judge(&offer()), Err(busy()));
    assert_eq!(replicas.crashed(ReplicaId(9), 1, &boom(Instant::now())), None, "its end is no crash");
    let install = Install {
        generation: 2,
        position: offer().position,
        leader_term: 6,
        epoch: Epoch { range: 1, conf: 3 },
        members: Vec::new(),
        state_lost: false,
    };
    let record = replicas.end_install(ReplicaId(9), Some(install)).expect("a replica");
    assert_eq!((record.generation, record.epoch.conf), (2, 3));
    assert_eq!(
        replicas.judge(&offer()),
        Err(SnapshotAnswer::Refused(
            "replica 9 knows of Epoch { range: 1, conf: 3 }, the snapshot is of Epoch { range: 1, conf: 1 }"
                .into()
        ))
    );
    replicas.get_mut(ReplicaId(9)).unwrap().incarnation = 2;
    assert_eq!(replicas.started(ReplicaId(9), 2, Ok(None)), Started::Serving { failures: 0 });
    // One that comes to nothing leaves the record as it was.
    assert_eq!(replicas.begin_install(ReplicaId(9)), Ok((ShardId(4), 2)));
    assert_eq!(replicas.end_install(ReplicaId(9), None), Some(record));
    replicas.removed(ReplicaId(9));
    assert_eq!(replicas.end_install(ReplicaId(9), None), None);
}

#[test]
fn a_replica_without_its_state_runs_and_is_told_of_until_it_has_another() {
    let mut replicas = Replicas::default();
    replicas.created(&replicas.orders(&map(false), NodeId(2)).create);
    let start = |replicas: &mut Replicas, incarnation, lost: Option<&str>| {
        replicas.get_mut(ReplicaId(9)).unwrap().incarnation = incarnation;
        replicas.started(ReplicaId(9), incarnation, Ok(lost.map(str::to_owned)))
    };
    let told = "1 of 1 replicas can't serve; that of shard 4 is refetching: gone";
    assert_eq!(start(&mut replicas, 1, Some("gone")), Started::WithoutState { news: true });
    let health = replicas.get_mut(ReplicaId(9)).unwrap().health.clone();
    assert_eq!(health, ReplicaHealth::Refetching("gone".into()));
    assert_eq!(replicas.closed().as_deref(), Some(told));
    assert_eq!(replicas.judge(&offer()), Ok(1), "it takes snapshots");
    assert_eq!(replicas.begin_install(ReplicaId(9)), Ok((ShardId(4), 1)));
    assert_eq!(replicas.closed().as_deref(), Some(told), "not yet");
    assert!(replicas.end_install(ReplicaId(9), None).is_some());
    assert_eq!(replicas.closed().as_deref(), Some(told), "nor when it is opened");
    assert_eq!(start(&mut replicas, 2, Some("gone")), Started::WithoutState { news: false });
    assert_eq!(start(&mut replicas, 3, None), Started::Serving { failures: 0 });
    assert_eq!(replicas.closed(), None);
}

#[test]
fn an_entry_that_crashes_each_start_is_found_however_long_they_take_to_reach_it() {
    let mut replicas = Replicas::default();
    replicas.created(&replicas.orders(&map(false), NodeId(2)).create);
    let mut now = Instant::now();
    let mut crash = |replicas: &mut Replicas, applying| {
        now += Duration::from_millis(limits::CRASH_WINDOW_MS + 1);
        let crash = Crash { applying, ..boom(now) };
        replicas.crashed(ReplicaId(9), 0, &crash).map(|(_, verdict)| verdict)
    };
    let restart = Some(Verdict::Restart(Duration::from_millis(limits::RESTART_BACKOFF_MS)));
    // Others than always the same one mean nothing, nor does what is no entry's fault.
    for entry in 1..20 {
        assert_eq!(crash(&mut replicas, Some(entry)), restart);
        assert_eq!(crash(&mut replicas, None), restart);
    }
    for _ in 1..limits::CRASHES_MAX {
        assert_eq!(crash(&mut replicas, Some(77)), restart);
    }
    assert_eq!(crash(&mut replicas, Some(77)), Some(Verdict::Quarantine));
    let why = replicas.closed().expect("it is closed");
    assert!(why.contains("entry 77 of its log crashed it 5 times in a row: boom"), "{why}");
}

#[test]
fn crashes_back_off_then_quarantine_and_old_news_is_ignored() {
    let mut replicas = Replicas::default();
    replicas.created(&replicas.orders(&map(false), NodeId(2)).create);
    let now = Instant::now();
    let crash = |replicas: &mut Replicas, at| replicas.crashed(ReplicaId(9), 0, &boom(at)).map(|(_, v)| v);
    let first = crash(&mut replicas, now);
    let second = crash(&mut replicas, now);
    assert_eq!(first, Some(Verdict::Restart(Duration::from_millis(limits::RESTART_BACKOFF_MS))));
    assert_eq!(second, Some(Verdict::Restart(Duration::from_millis(2 * limits::RESTART_BACKOFF_MS))));
    assert_eq!(replicas.crashed(ReplicaId(9), 7, &boom(now)), None);
    for _ in 2..limits::CRASHES_MAX - 1 {
        crash(&mut replicas, now);
    }
    let later = now + Duration::from_millis(limits::CRASH_WINDOW_MS + 1);
    assert!(matches!(crash(&mut replicas, later), Some(Verdict::Restart(_))), "old crashes don't count");
    for _ in 1..limits::CRASHES_MAX - 1 {
        crash(&mut replicas, later);
    }
    assert_eq!(crash(&mut replicas, later), Some(Verdict::Quarantine));
}
