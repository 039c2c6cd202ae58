//! The supervisor and its hubs over stores in memory.

use super::*;
use crate::ids::Epoch;
use crate::node::hub::NodeHeard;
use crate::node::survey::TakeSurvey;
use crate::node::test_node::{PATIENCE, TestNode, record};
use crate::placement::map::{MapDelta, Member, MemberRole, ShardRecord};
use crate::storage::log::{LogWrite, RecordedMembership, ReplicaPhase};

/// The record of shard 1, at a version of the map, with a replica on some node.
fn shard_on(node: u64, replica: u64, changed_at: u64) -> MapDelta {
    let ReplicaRecord { shard, database, range, epoch, .. } = record(1);
    let members = vec![Member { replica: ReplicaId(replica), node: NodeId(node), role: MemberRole::Voter }];
    let (dropped, moving, target, previous) = (false, None, None, None);
    let shard = ShardRecord {
        id: shard,
        database,
        range,
        epoch,
        members,
        dropped,
        moving,
        target,
        previous,
        changed_at,
    };
    MapDelta { since: 0, version: changed_at, shards: vec![shard], ..MapDelta::default() }
}

/// The log may refuse a write of a replica while others of its node are still on their way up.
#[actix::test]
async fn a_replica_that_must_end_while_others_start_ends() {
    let dir = tempfile::tempdir().expect("a directory");
    let node = TestNode::new(dir.path());
    // The thread of replica 2 is busy: replica 1 runs long before both do.
    let (release, held) = std::sync::mpsc::channel::<()>();
    node.threads[0].spawn_fn(move || {
        held.recv().ok();
    });
    node.supervisor.do_send(OpenAll);
    let begun = Instant::now();
    while node.report(1).await.restarts == 0 {
        let reason = "a write that contradicts the log".to_owned();
        node.supervisor.do_send(EndReplica { replica: ReplicaId(1), incarnation: 1, reason });
        assert!(begun.elapsed() < PATIENCE, "it goes on, though nothing it writes is kept");
        actix::clock::sleep(Duration::from_millis(20)).await;
    }
    release.send(()).expect("the thread waits");
    // And it is there again, with the other.
    node.serves(1, 2).await;
    node.serves(2, 1).await;
    assert_eq!((node.report(1).await.restarts, node.report(2).await.restarts), (1, 0));
    node.stop().await;
}

/// What a replica is replaced by elsewhere may be known late; what is known is acted upon, once, and for good.
#[actix::test]
async fn a_replica_that_is_replaced_goes_and_a_map_of_before_it_ends_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    let node = TestNode::ordered_at(dir.path(), 5);
    node.supervisor.do_send(OpenAll);
    node.serves(1, 1).await;
    node.serves(2, 1).await;
    let begun = Instant::now();
    while node.supervisor.send(TakeSurvey).await.expect("a survey").led.len() < 2 {
        assert!(begun.elapsed() < PATIENCE, "each leads its group");
        actix::clock::sleep(Duration::from_millis(10)).await;
    }
    let survey = node.supervisor.send(TakeSurvey).await.expect("a survey");
    assert_eq!(survey.held, [(ShardId(1), ReplicaId(1)), (ShardId(2), ReplicaId(2))]);
    assert_eq!(survey.led[0].members, record(1).members);
    // Late news of another replica of the shard says nothing of the one that is here.
    let change = crate::group::types::LeaderChange { term: 9, leader: None, local: false };
    let late = LeaderChanged { shard: ShardId(1), replica: ReplicaId(9), change };
    node.supervisor.send(late).await.expect("ignored");
    assert_eq!(node.supervisor.send(TakeSurvey).await.expect("a survey").led.len(), 2);

    // As of before it was ordered, and of another cluster.
    node.supervisor.send(MapNews(shard_on(2, 7, 4))).await.expect("taken");
    let foreign = MapDelta { cluster_id: crate::ids::RandomId([9; 16]), ..shard_on(2, 7, 9) };
    node.supervisor.send(MapNews(foreign)).await.expect("refused");
    assert_eq!(node.supervisor.send(TakeSurvey).await.expect("a survey").held, survey.held);

    node.supervisor.send(MapNews(shard_on(2, 7, 6))).await.expect("taken");
    node.holds(&[2]).await;
    let phase = || {
        let catalogue = node.shared.log.catalogue().expect("a catalogue");
        catalogue.iter().find(|r| r.replica == ReplicaId(1)).expect("it is remembered").phase
    };
    let begun = Instant::now();
    while phase() != ReplicaPhase::Destroyed {
        assert!(begun.elapsed() < PATIENCE, "{:?}", phase());
        actix::clock::sleep(Duration::from_millis(10)).await;
    }
    // It doesn't come back, whatever a map says; another one may.
    node.supervisor.send(MapNews(shard_on(1, 1, 7))).await.expect("taken");
    node.holds(&[2]).await;
    node.supervisor.send(MapNews(shard_on(1, 8, 8))).await.expect("taken");
    node.holds(&[2, 8]).await;
    node.serves(8, 1).await;
    node.stop().await;
}

/// Which leaders sleep, as the supervisor knows?
#[derive(Message)]
#[rtype(result = "Vec<ReplicaId>")]
struct AskResting;

impl Handler<AskResting> for Supervisor {
    type Result = Vec<ReplicaId>;
    fn handle(&mut self, _: AskResting, _: &mut Context<Self>) -> Vec<ReplicaId> {
        self.resting.keys().copied().collect()
    }
}

/// What is known of leaders that sleep goes with them: databases come and go, and ids aren't used again.
#[actix::test]
async fn nothing_is_kept_of_a_replica_that_slept_when_it_was_removed() {
    let dir = tempfile::tempdir().expect("a directory");
    let node = TestNode::sleeping_after(dir.path(), 3);
    node.supervisor.do_send(OpenAll);
    let begun = Instant::now();
    while node.supervisor.send(AskResting).await.expect("an answer") != [ReplicaId(1), ReplicaId(2)] {
        assert!(begun.elapsed() < PATIENCE, "they sleep");
        actix::clock::sleep(Duration::from_millis(10)).await;
    }
    node.supervisor.send(MapNews(shard_on(2, 7, 6))).await.expect("taken");
    node.holds(&[2]).await;
    assert_eq!(node.supervisor.send(AskResting).await.expect("an answer"), [ReplicaId(2)]);
    node.stop().await;
}

/// Whom the map doesn't order any more may count in its group all the same, by an order that came late.
#[actix::test]
async fn a_replica_whose_record_is_ahead_of_the_map_is_not_buried() {
    let dir = tempfile::tempdir().expect("a directory");
    let node = TestNode::ordered_at(dir.path(), 5);
    node.supervisor.do_send(OpenAll);
    node.serves(1, 1).await;
    node.serves(2, 1).await;
    let begun = Instant::now();
    while node.supervisor.send(TakeSurvey).await.expect("a survey").led.len() < 2 {
        assert!(begun.elapsed() < PATIENCE, "each leads its group");
        actix::clock::sleep(Duration::from_millis(10)).await;
    }
    // Its members have changed since the node read the catalogue.
    let replica = ReplicaId(1);
    node.shared.log_writer.run(Box::new(move |log| {
        let state = log.load(replica).expect("its log");
        let (index, epoch) = (state.hard_state.commit, Epoch { range: 1, conf: 3 });
        let membership = Some(RecordedMembership { index, epoch, members: record(1).members });
        let hard_state = Some(state.hard_state);
        log.write(&[LogWrite { replica, entries: Vec::new(), hard_state, membership }]).expect("written");
    }));
    let without_it = |conf, changed_at| {
        let mut delta = shard_on(2, 7, changed_at);
        delta.shards[0].epoch.conf = conf;
        MapNews(delta)
    };
    let phase = || {
        let catalogue = node.shared.log.catalogue().expect("a catalogue");
        catalogue.iter().find(|r| r.replica == replica).expect("it is remembered").phase
    };
    node.supervisor.send(without_it(2, 6)).await.expect("taken");
    node.serves(1, 2).await;
    assert_eq!(phase(), ReplicaPhase::Active);
    // It isn't even stopped any more.
    node.supervisor.send(without_it(2, 7)).await.expect("taken");
    assert_eq!(node.report(1).await.group.map(|group| group.incarnation), Some(2));
    // The map knows better by now.
    node.supervisor.send(without_it(3, 8)).await.expect("taken");
    node.holds(&[2]).await;
    assert_ne!(phase(), ReplicaPhase::Active);
    node.stop().await;
}

/// A dropped shard's replicas go whatever they say.
#[actix::test]
async fn a_replica_of_a_dropped_shard_is_buried_though_its_record_is_ahead() {
    let dir = tempfile::tempdir().expect("a directory");
    let node = TestNode::ordered_at(dir.path(), 5);
    node.supervisor.do_send(OpenAll);
    node.serves(1, 1).await;
    let mut delta = shard_on(2, 7, 6);
    (delta.shards[0].dropped, delta.shards[0].epoch.conf) = (true, 0);
    node.supervisor.send(MapNews(delta)).await.expect("taken");
    node.holds(&[2]).await;
    node.stop().await;
}

/// What kept a process from leading may have gone with it.
#[actix::test]
async fn the_next_process_of_a_node_may_lead_at_once() {
    let dir = tempfile::tempdir().expect("a directory");
    let node = TestNode::new(dir.path());
    let (other, waits) =
        (NodeId(2), |node: &TestNode| node.shared.reluctance.wait(NodeId(2), Instant::now()));
    let heard = async |process, ended| {
        node.hub(1).send(NodeHeard { node: other, process, ended }).await.expect("told");
    };
    heard(1, 0).await;
    // So late that it is long until it is asked again.
    node.shared.reluctance.lapsed(other, Instant::now() + Duration::from_secs(3_600));
    // The same process, whatever becomes of its replicas.
    heard(1, 0).await;
    heard(1, 1).await;
    assert!(waits(&node).is_some(), "it is asked again at once");
    heard(2, 0).await;
    assert_eq!(waits(&node), None);
    node.stop().await;
}
