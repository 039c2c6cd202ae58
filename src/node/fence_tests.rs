//! What a start of a replica has left behind when it ended changes nothing for the next one: each way from
//! a replica to a shared thread and back, with the thread held up until the replica has ended.

use std::sync::mpsc;
use std::time::Duration;

use bytes::Bytes;
use raft::eraftpb::{ConfState, Entry, HardState};
use tokio::sync::oneshot;

use super::handle::ReplicaHealth;
use super::hub::{FlushedBatch, HubSink, PersistedBatch};
use super::log_writer::WriteTask;
use super::messages::{AskStatus, Campaign, Submit};
use super::snapshots::install::InstallSnapshot;
use super::snapshots::worker::Load;
use super::supervisor::{EndReplica, OpenAll};
use super::test_node::{PATIENCE, TestNode, record};
use super::ticket::Results;
use crate::codec::snapshot::{SnapshotAnswer, SnapshotOffer};
use crate::group::types::{Operation, Output};
use crate::ids::{GROUP_START, Position, RandomId, ReplicaId, ShardId};
use crate::machine::command::{Answer, Command, KvCommand, Query};
use crate::refusal::Refusal;
use crate::storage::flush::FlushStep;
use crate::storage::keys;
use crate::storage::log::{Install, LogWrite};
use crate::storage::state::StateHeader;

const REPLICA: ReplicaId = ReplicaId(1);

/// Long enough for whatever wouldn't wait. Nothing is made to fail by its being too short.
const MOMENT: Duration = Duration::from_millis(400);

/// A shared thread that does nothing until this is dropped.
pub(super) struct Held {
    _release: mpsc::Sender<()>,
    begun: oneshot::Receiver<()>,
}

impl Held {
    /// Waits until the thread does nothing: what was queued before is done, what is queued from now on isn't begun.
    pub(super) async fn begun(&mut self) {
        let begun = tokio::time::timeout(PATIENCE, &mut self.begun).await;
        begun.expect("the thread's turn in time").expect("it waits");
    }
}

pub(super) fn hold() -> (Held, impl FnOnce() + Send) {
    let (release, held) = mpsc::channel::<()>();
    let (begins, begun) = oneshot::channel();
    let wait = move || {
        // Nobody needs to know.
        begins.send(()).ok();
        // Fails when the other end is dropped, which is the release.
        held.recv().ok();
    };
    (Held { _release: release, begun }, wait)
}

impl TestNode {
    /// A node whose first replica leads and holds `before`.
    pub(super) async fn leading(dir: &std::path::Path) -> TestNode {
        TestNode::new(dir).led().await
    }

    /// The same of one that isn't opened yet.
    pub(super) async fn led(self) -> TestNode {
        self.supervisor.do_send(OpenAll);
        self.serves(1, 1).await;
        self.lead().await;
        for key in ["a", "b", "c"] {
            self.submit(put(key, "before"))
                .await
                .expect("an answer")
                .expect("started")
                .remove(0)
                .expect("ok");
        }
        self
    }

    async fn lead(&self) {
        let addr = self.shared.router.replica(ShardId(1)).expect("it runs");
        addr.do_send(Campaign);
        let leads = |r: &super::handle::ReplicaReport| {
            r.group.as_ref().is_some_and(|group| group.role == raft::StateRole::Leader)
        };
        self.until(1, "leading", leads).await;
    }

    pub(super) fn submit(&self, operation: Operation) -> oneshot::Receiver<Results> {
        let (reply, results) = oneshot::channel();
        let addr = self.shared.router.replica(ShardId(1)).expect("it runs");
        addr.do_send(Submit {
            range_version: 1,
            operations: vec![operation],
            reply,
            admitted: None,
            trace: None,
        });
        results
    }

    /// Waits until the replica has done what it was told before.
    async fn settle(&self) {
        let addr = self.shared.router.replica(ShardId(1)).expect("it runs");
        for _ in 0..3 {
            addr.send(AskStatus).await.expect("it runs");
        }
    }

    /// Waits until the replica has this entry in memory.
    async fn proposed(&self, index: u64) {
        self.until(1, "proposed", |r| r.group.as_ref().is_some_and(|group| group.last >= index)).await;
    }

    pub(super) async fn value(&self, key: &str) -> Option<Bytes> {
        let get = Operation::Query(Query::Get { key: key.to_owned().into() });
        let results = tokio::time::timeout(PATIENCE, self.submit(get)).await.expect("in time");
        match results.expect("an answer").expect("started").remove(0) {
            Ok(Output::Answer(Answer::Value(found))) => found.map(|found| found.value),
            other => panic!("{other:?}"),
        }
    }

    /// Ends the present start of the first replica as a crash does.
    fn crash(&self, incarnation: u64) {
        let reason = "for the test".to_owned();
        self.supervisor.do_send(EndReplica { replica: REPLICA, incarnation, reason });
    }

    async fn hold_log(&self) -> Held {
        let (mut held, wait) = hold();
        self.shared.log_writer.run(Box::new(move |_| wait()));
        held.begun().await;
        held
    }

    /// A job of this start of the first replica, behind what is queued by now. It is dropped with the rest when the start
    /// is fenced, which [`fenced`] waits for.
    fn queue_behind(&self, incarnation: u64) -> oneshot::Receiver<()> {
        let (runs, job) = oneshot::channel();
        self.shared.log_writer.run_for(
            REPLICA,
            incarnation,
            Box::new(move |_| {
                runs.send(()).ok();
            }),
        );
        job
    }

    /// The start has other generations of the first replica's state removed, some time. Calls that off as the load of a
    /// snapshot does, of which there is no file here: what is written next would be taken for remains.
    async fn call_off_sweeps(&self) {
        let offer = SnapshotOffer {
            stream: RandomId([3; 16]),
            shard: ShardId(1),
            from: ReplicaId(9),
            to: REPLICA,
            epoch: record(1).epoch,
            position: GROUP_START,
            leader_term: GROUP_START.term,
            bytes: 1,
        };
        let (done, loaded) = oneshot::channel();
        let path = "no such file".into();
        self.shared.snapshots.worker.load(Load { path, offer, current: 1, done });
        let loaded = tokio::time::timeout(PATIENCE, loaded).await.expect("in time").expect("an answer");
        assert!(loaded.is_err(), "there is nothing to load");
    }

    /// Waits until the first replica has ended, and isn't rebuilt yet.
    async fn ended(&self) {
        let ended = |r: &super::handle::ReplicaReport| {
            matches!(r.health, ReplicaHealth::Restarting(_)) && r.group.is_none()
        };
        self.until(1, "ended", ended).await;
        // It stays so.
        actix::clock::sleep(MOMENT).await;
        let report = self.report(1).await;
        assert!(ended(&report), "{report:?}");
    }
}

/// Waits until a start of a replica is fenced: what it had queued up to `job` is dropped, however long that took.
async fn fenced(job: oneshot::Receiver<()>) {
    let ended = tokio::time::timeout(PATIENCE, job).await.expect("fenced in time");
    assert!(ended.is_err(), "its queued work was done");
}

pub(super) fn put(key: &str, value: &str) -> Operation {
    let (key, value) = (key.to_owned().into(), value.to_owned().into());
    Operation::Command { command: Command::Kv(KvCommand::Put { key, value }), session: None }
}

/// A snapshot as it was loaded into the second generation.
fn install_at(position: Position) -> Install {
    let record = record(1);
    Install {
        generation: 2,
        position,
        leader_term: position.term,
        epoch: record.epoch,
        members: record.members,
        state_lost: false,
    }
}

/// Without the fence it is read and rebuilt beside its own write, which reaches the log after that.
#[actix::test]
async fn a_replica_is_rebuilt_when_the_log_writer_is_done_with_its_last_start() {
    let dir = tempfile::tempdir().expect("a directory");
    let node = TestNode::leading(dir.path()).await;
    let before = node.logs()[&1];
    let held = node.hold_log().await;
    let late = node.submit(put("a", "late"));
    node.proposed(before.1 + 1).await;
    node.crash(1);
    let ended = tokio::time::timeout(PATIENCE, late).await.expect("in time").expect("an answer");
    assert!(matches!(ended.expect("started").remove(0), Err(Refusal::Unknown(_))));
    node.ended().await;
    drop(held);
    node.serves(1, 2).await;
    assert_eq!(node.logs()[&1], before, "the write of the last start is dropped");
    node.lead().await;
    assert_eq!(node.value("a").await.as_deref(), Some(&b"before"[..]));
    node.stop().await;
}

/// Without the barrier its state is read while its own flush changes it.
#[actix::test]
async fn a_replica_is_rebuilt_when_the_flush_thread_is_done_with_its_last_start() {
    let dir = tempfile::tempdir().expect("a directory");
    let node = TestNode::leading(dir.path()).await;
    let (mut held, wait) = hold();
    node.shared.flusher.run(Box::new(move |_| wait()));
    held.begun().await;
    node.crash(1);
    node.ended().await;
    drop(held);
    node.serves(1, 2).await;
    node.lead().await;
    assert_eq!(node.value("b").await.as_deref(), Some(&b"before"[..]));
    node.stop().await;
}

/// Both starts number their writes from one: taken for the present one's, the news would acknowledge a
/// write that is on no disk.
#[actix::test]
async fn news_of_the_last_start_s_log_writes_acknowledge_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    let node = TestNode::leading(dir.path()).await;
    node.crash(1);
    node.serves(1, 2).await;
    node.lead().await;
    assert_eq!(node.value("a").await.as_deref(), Some(&b"before"[..]));
    let held = node.hold_log().await;
    let mut waits = node.submit(put("a", "after"));
    node.proposed(node.logs()[&1].1 + 1).await;
    node.hub(1).send(PersistedBatch(vec![(REPLICA, 1, u64::MAX)])).await.expect("told");
    node.settle().await;
    actix::clock::sleep(MOMENT).await;
    assert!(waits.try_recv().is_err(), "acknowledged, and not on disk");
    drop(held);
    let result = tokio::time::timeout(PATIENCE, waits).await.expect("in time").expect("an answer");
    assert!(result.expect("started").remove(0).is_ok());
    assert_eq!(node.value("a").await.as_deref(), Some(&b"after"[..]));
    node.stop().await;
}

/// Taken for the present one's, the news would have the log compacted beyond what any store holds.
#[actix::test]
async fn news_of_the_last_start_s_flushes_compact_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    let node = TestNode::leading(dir.path()).await;
    node.crash(1);
    node.serves(1, 2).await;
    node.lead().await;
    node.value("a").await;
    let applied = node.report(1).await.group.expect("it runs");
    let position = Position { index: applied.applied, term: applied.term };
    let compacted = async |incarnation| {
        let news = vec![(REPLICA, incarnation, position)];
        node.hub(1).send(FlushedBatch(FlushStep::Logged, news)).await.expect("told");
        node.settle().await;
        let (done, log) = oneshot::channel();
        node.shared.log_writer.run(Box::new(move |log| {
            done.send(log.load(REPLICA).expect("a log").truncated.index).ok();
        }));
        log.await.expect("the log writer")
    };
    assert_eq!(compacted(1).await, GROUP_START.index);
    assert_eq!(compacted(2).await, position.index, "it would have been seen");
    node.stop().await;
}

/// What the last start still had to write would end up behind the snapshot, as if it followed on it.
#[actix::test]
async fn nothing_of_the_start_that_a_snapshot_ends_is_written_after_it() {
    let dir = tempfile::tempdir().expect("a directory");
    let node = TestNode::leading(dir.path()).await;
    let install = install_at(Position { index: 90, term: 50 });
    let header = StateHeader {
        applied: install.position,
        revision: 7,
        log_time: 0,
        epoch: install.epoch,
        members: install.members.clone(),
        conf_state: ConfState { voters: vec![REPLICA.0], ..ConfState::default() },
    };
    let loaded = [
        (keys::user_key(REPLICA, 2, b"a"), None),
        (keys::header_key(REPLICA, 2), Some(Bytes::from(header.encode()))),
    ];
    node.call_off_sweeps().await;
    node.engine.write(&loaded).expect("loaded");
    let held = node.hold_log().await;
    let queued = node.submit(put("a", "late"));
    node.proposed(node.logs()[&1].1 + 1).await;
    let job = node.queue_behind(1);
    let switched = node.supervisor.send(InstallSnapshot { replica: REPLICA, install });
    let late = node.hub(1).clone();
    let shared = node.shared.clone();
    let switched = actix::spawn(switched);
    // Without the fence the thread would have done what it was given.
    fenced(job).await;
    drop(held);
    assert_eq!(switched.await.expect("the task").expect("an answer"), Ok(()));
    node.serves(1, 2).await;
    assert_eq!(node.logs()[&1], (90, 90));
    let queued = queued.await.expect("an answer").expect("started").remove(0);
    assert!(matches!(queued, Err(Refusal::Unknown(_))), "{queued:?}");

    // One that comes later still.
    let entry = Entry { index: 91, term: 50, ..Entry::default() };
    let hard_state = HardState { term: 50, commit: 91, ..HardState::default() };
    shared.log_writer.submit(vec![WriteTask {
        incarnation: 1,
        number: 99,
        write: LogWrite {
            replica: REPLICA,
            entries: vec![entry],
            hard_state: Some(hard_state),
            membership: None,
        },
        done: std::sync::Arc::new(HubSink(late)),
        stamps: None,
    }]);
    let (done, written) = oneshot::channel();
    shared.log_writer.run(Box::new(move |_| {
        done.send(()).ok();
    }));
    written.await.expect("the log writer");
    assert_eq!(node.logs()[&1], (90, 90));
    node.lead().await;
    assert_eq!(node.value("a").await, None, "it stands at the snapshot");
    node.stop().await;
}

/// A snapshot that was loaded for the last start, and that the next one has no use for.
#[actix::test]
async fn a_snapshot_that_comes_after_the_next_start_has_gone_on_takes_nothing_back() {
    let dir = tempfile::tempdir().expect("a directory");
    let node = TestNode::leading(dir.path()).await;
    let then = node.report(1).await.group.expect("it runs");
    let then = Position { index: then.applied, term: then.term };
    node.crash(1);
    node.serves(1, 2).await;
    node.lead().await;
    let after = node.submit(put("a", "after")).await.expect("an answer").expect("started").remove(0);
    assert!(after.is_ok(), "{after:?}");
    let before = node.logs()[&1];
    let order = InstallSnapshot { replica: REPLICA, install: install_at(then) };
    let answer = node.supervisor.send(order).await.expect("an answer");
    assert_eq!(answer, Err(SnapshotAnswer::NotNeeded));
    node.serves(1, 3).await;
    assert_eq!(node.logs()[&1], before);
    node.lead().await;
    assert_eq!(node.value("a").await.as_deref(), Some(&b"after"[..]));
    node.stop().await;
}
