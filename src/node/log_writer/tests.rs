//! The writer over the log in memory, slowed down and broken where a case needs it.

use std::sync::atomic::AtomicBool;
use std::sync::mpsc;

use raft::eraftpb::{Entry, HardState};

use super::*;
use crate::ids::{DatabaseId, Epoch, Index, NodeId, Position, ShardId};
use crate::machine::MachineKind;
use crate::placement::map::{Member, MemberRole};
use crate::placement::ring::RingRange;
use crate::storage::log::{Install, LogState, ReplicaPhase, ReplicaRecord};
use crate::storage::log_memory::{FailedWrite, MemoryLog};

const LONG: Duration = Duration::from_secs(10);

/// A log whose writes wait for a permit where the case wants that, and which counts them.
struct GatedLog {
    inner: MemoryLog,
    begun: mpsc::Sender<Vec<LogWrite>>,
    permits: Mutex<Option<mpsc::Receiver<()>>>,
    held_back: Mutex<Vec<ReplicaId>>,
    rotten: AtomicBool,
}

impl LogStore for GatedLog {
    fn write(&self, writes: &[LogWrite]) -> Result<(), StorageError> {
        let _ = self.begun.send(writes.to_vec());
        if let Some(permits) = &*self.permits.lock().unwrap() {
            let _ = permits.recv_timeout(LONG);
        }
        self.inner.write(writes)
    }
    fn create(&self, records: &[ReplicaRecord]) -> Result<(), StorageError> {
        self.inner.create(records)
    }
    fn catalogue(&self) -> Result<Vec<ReplicaRecord>, StorageError> {
        self.inner.catalogue()
    }
    fn remove(&self, replicas: &[ReplicaId]) -> Result<(), StorageError> {
        self.inner.remove(replicas)
    }
    fn install(&self, replica: ReplicaId, install: &Install) -> Result<(), StorageError> {
        self.inner.install(replica, install)
    }

    fn destroyed(&self, replicas: &[ReplicaId]) -> Result<(), StorageError> {
        self.inner.destroyed(replicas)
    }
    fn load(&self, replica: ReplicaId) -> Result<LogState, StorageError> {
        self.inner.load(replica)
    }
    fn entries(
        &self,
        replica: ReplicaId,
        low: Index,
        high: Index,
        max_bytes: usize,
    ) -> Result<Vec<Entry>, StorageError> {
        self.inner.entries(replica, low, high, max_bytes)
    }
    fn compact(&self, replica: ReplicaId, to: Position) -> Result<(), StorageError> {
        self.inner.compact(replica, to)
    }
    fn purge(&self) -> Result<Vec<ReplicaId>, StorageError> {
        if self.rotten.load(Ordering::Relaxed) {
            return Err(StorageError::Damaged { what: "the raft log".into(), detail: "rotten".into() });
        }
        Ok(self.held_back.lock().unwrap().clone())
    }
    fn disk_bytes(&self) -> u64 {
        self.inner.disk_bytes()
    }
}

type Batch = Vec<(ReplicaId, Incarnation, u64)>;

struct Sink(mpsc::Sender<Batch>);

impl PersistSink for Sink {
    fn persisted(&self, batch: &[(ReplicaId, Incarnation, u64)]) {
        let _ = self.0.send(batch.to_vec());
    }
}

struct Setup {
    log: Arc<GatedLog>,
    writer: LogWriter,
    begun: mpsc::Receiver<Vec<LogWrite>>,
    permit: Option<mpsc::Sender<()>>,
    fatal: mpsc::Receiver<String>,
}

fn sink() -> (Arc<dyn PersistSink>, mpsc::Receiver<Batch>) {
    let (sender, receiver) = mpsc::channel();
    (Arc::new(Sink(sender)), receiver)
}

fn setup(gated: bool) -> Setup {
    let (begun_sender, begun) = mpsc::channel();
    let (permit, permits) = mpsc::channel();
    let log = Arc::new(GatedLog {
        inner: MemoryLog::new(),
        begun: begun_sender,
        permits: Mutex::new(gated.then_some(permits)),
        held_back: Mutex::default(),
        rotten: AtomicBool::new(false),
    });
    let records: Vec<ReplicaRecord> = (1..=4)
        .map(|replica| ReplicaRecord {
            replica: ReplicaId(replica),
            shard: ShardId(1),
            database: DatabaseId(1),
            machine: MachineKind::Kv,
            phase: ReplicaPhase::Active,
            range: RingRange::ALL,
            epoch: Epoch::default(),
            members: vec![Member { replica: ReplicaId(replica), node: NodeId(1), role: MemberRole::Voter }],
            members_at: 0,
            ordered_at: 0,
            generation: 1,
        })
        .collect();
    log.create(&records).unwrap();
    let (fatal_sender, fatal) = mpsc::channel();
    let writer = LogWriter::start_with(
        log.clone(),
        Box::new(move |reason| fatal_sender.send(reason).unwrap()),
        Duration::from_millis(5),
    );
    Setup { log, writer, begun, permit: gated.then_some(permit), fatal }
}

fn task(replica: u64, incarnation: Incarnation, number: u64, done: &Arc<dyn PersistSink>) -> WriteTask {
    sized(replica, incarnation, number, 10, done)
}

fn sized(
    replica: u64,
    incarnation: Incarnation,
    number: u64,
    bytes: usize,
    done: &Arc<dyn PersistSink>,
) -> WriteTask {
    let entry = Entry { index: 5 + number, term: 6, data: vec![0; bytes].into(), ..Default::default() };
    let hard_state = HardState { term: 6, commit: 5, ..Default::default() };
    WriteTask {
        incarnation,
        number,
        write: LogWrite {
            replica: ReplicaId(replica),
            entries: vec![entry],
            hard_state: Some(hard_state),
            membership: None,
        },
        done: done.clone(),
        stamps: None,
    }
}

fn name(replica: u64, incarnation: Incarnation, number: u64) -> (ReplicaId, Incarnation, u64) {
    (ReplicaId(replica), incarnation, number)
}

#[test]
fn what_gathers_behind_a_write_becomes_one_and_each_sink_hears_once() {
    let setup = setup(true);
    let permit = setup.permit.as_ref().unwrap();
    let (one, heard_one) = sink();
    let (two, heard_two) = sink();
    setup.writer.submit(vec![task(1, 1, 1, &one)]);
    assert_eq!(setup.begun.recv_timeout(LONG).unwrap().len(), 1);
    setup.writer.submit(vec![task(2, 1, 1, &one), task(3, 1, 1, &two)]);
    setup.writer.submit(vec![task(1, 1, 2, &one), task(4, 7, 1, &two)]);
    assert!(heard_one.try_recv().is_err(), "told before it is durable");
    permit.send(()).unwrap();
    assert_eq!(heard_one.recv_timeout(LONG).unwrap(), [name(1, 1, 1)]);
    assert_eq!(setup.begun.recv_timeout(LONG).unwrap().len(), 4);
    permit.send(()).unwrap();
    assert_eq!(heard_one.recv_timeout(LONG).unwrap(), [name(2, 1, 1), name(1, 1, 2)]);
    assert_eq!(heard_two.recv_timeout(LONG).unwrap(), [name(3, 1, 1), name(4, 7, 1)]);
    setup.writer.stop();
    assert!(heard_one.try_recv().is_err() && heard_two.try_recv().is_err());
    assert_eq!(setup.log.load(ReplicaId(1)).unwrap().last, 7);
}

#[test]
fn a_batch_is_bounded_in_bytes_but_never_empty() {
    let setup = setup(true);
    let permit = setup.permit.as_ref().unwrap();
    let (sink, _heard) = sink();
    let half = limits::LOG_WRITE_TARGET_BYTES / 2;
    setup.writer.submit(vec![
        sized(1, 1, 1, 3 * half, &sink),
        sized(1, 1, 2, half - 200, &sink),
        sized(1, 1, 3, half - 200, &sink),
        sized(1, 1, 4, half - 200, &sink),
    ]);
    for expected in [1, 2, 1] {
        assert_eq!(setup.begun.recv_timeout(LONG).unwrap().len(), expected);
        permit.send(()).unwrap();
    }
    setup.writer.stop();
    assert_eq!(setup.log.load(ReplicaId(1)).unwrap().last, 9);
}

#[test]
fn it_tells_how_much_waits() {
    let setup = setup(true);
    let permit = setup.permit.as_ref().unwrap();
    let (sink, heard) = sink();
    let queued = setup.writer.queued_bytes();
    setup.writer.submit(vec![task(1, 1, 1, &sink)]);
    setup.begun.recv_timeout(LONG).unwrap();
    assert_eq!(queued(), 0, "what is being written doesn't wait");
    let (one, two) = (sized(2, 1, 1, 1000, &sink), sized(3, 1, 1, 2000, &sink));
    let sizes = [one.write.size(), two.write.size()];
    setup.writer.submit(vec![one, two]);
    assert_eq!(queued(), sizes[0] + sizes[1]);
    let _fence = setup.writer.fence(ReplicaId(2), 1);
    assert_eq!(queued(), sizes[1]);
    permit.send(()).unwrap();
    permit.send(()).unwrap();
    heard.recv_timeout(LONG).unwrap();
    heard.recv_timeout(LONG).unwrap();
    assert_eq!(queued(), 0);
    setup.writer.stop();
}

#[test]
fn a_fence_waits_for_what_is_under_way_and_drops_the_rest() {
    let setup = setup(true);
    let permit = setup.permit.as_ref().unwrap();
    let (sink, heard) = sink();
    setup.writer.submit(vec![task(1, 1, 1, &sink)]);
    setup.begun.recv_timeout(LONG).unwrap();
    setup.writer.submit(vec![task(1, 1, 2, &sink), task(2, 1, 1, &sink)]);
    let mut fence = setup.writer.fence(ReplicaId(1), 1);
    assert!(fence.try_recv().is_err(), "its write is under way");
    // Late tasks of the dead incarnation are dropped, those of the next one are not.
    setup.writer.submit(vec![task(1, 1, 3, &sink), task(1, 2, 2, &sink)]);
    permit.send(()).unwrap();
    fence.blocking_recv().unwrap();
    assert_eq!(heard.recv_timeout(LONG).unwrap(), [name(1, 1, 1)]);
    permit.send(()).unwrap();
    assert_eq!(heard.recv_timeout(LONG).unwrap(), [name(2, 1, 1), name(1, 2, 2)]);
    // Jobs on behalf of a start are dropped with it.
    let (run, ran) = mpsc::channel();
    for incarnation in [1, 2] {
        let run = run.clone();
        let job = Box::new(move |_: &dyn LogStore| run.send(incarnation).unwrap());
        setup.writer.run_for(ReplicaId(1), incarnation, job);
    }
    assert_eq!(ran.recv_timeout(LONG), Ok(2));
    setup.writer.submit(vec![task(4, 1, 1, &sink)]);
    setup.begun.recv_timeout(LONG).unwrap();
    setup.writer.run_for(ReplicaId(1), 2, Box::new(move |_| run.send(3).unwrap()));
    let fence = setup.writer.fence(ReplicaId(1), 2);
    permit.send(()).unwrap();
    fence.blocking_recv().unwrap();
    assert!(ran.recv_timeout(Duration::from_millis(50)).is_err(), "it was dropped");
    // With nothing under way it is there at once. An older fence doesn't lift a newer one.
    setup.writer.run(Box::new(|_| {}));
    setup.writer.fence(ReplicaId(3), 5).blocking_recv().unwrap();
    setup.writer.fence(ReplicaId(3), 4).blocking_recv().unwrap();
    setup.writer.submit(vec![task(3, 5, 1, &sink)]);
    setup.writer.stop();
    assert_eq!(setup.log.load(ReplicaId(3)).unwrap().last, 5);
}

#[test]
fn jobs_run_between_the_writes_they_were_queued_between() {
    let setup = setup(true);
    let permit = setup.permit.as_ref().unwrap();
    let (sink, _heard) = sink();
    let (sender, seen) = mpsc::channel();
    setup.writer.submit(vec![task(1, 1, 1, &sink)]);
    setup.writer.run(Box::new(move |log| {
        sender.send(log.load(ReplicaId(1)).unwrap().last).unwrap();
        let to = Position { index: 6, term: 6 };
        log.compact(ReplicaId(1), to).unwrap();
    }));
    setup.writer.submit(vec![task(1, 1, 2, &sink)]);
    permit.send(()).unwrap();
    permit.send(()).unwrap();
    setup.writer.stop();
    assert_eq!(seen.recv_timeout(LONG).unwrap(), 6);
    let state = setup.log.load(ReplicaId(1)).unwrap();
    assert_eq!((state.truncated.index, state.last), (6, 7));
}

#[test]
fn an_error_is_fatal_once_and_nothing_follows() {
    let setup = setup(false);
    let (sink, heard) = sink();
    setup.log.inner.fail_write(0, FailedWrite::Kept);
    setup.writer.submit(vec![task(1, 1, 1, &sink)]);
    let reason = setup.fatal.recv_timeout(LONG).unwrap();
    assert!(reason.contains("the node must stop"), "{reason}");
    setup.log.inner.crash();
    setup.writer.submit(vec![task(2, 1, 1, &sink)]);
    setup.writer.run(Box::new(|_| panic!("must not run")));
    assert!(setup.writer.fence(ReplicaId(1), 1).blocking_recv().is_err());
    setup.writer.stop();
    assert!(heard.try_recv().is_err(), "told of what may be lost");
    assert!(setup.fatal.try_recv().is_err(), "told twice");
    assert_eq!(setup.log.load(ReplicaId(2)).unwrap().last, 5);
}

#[test]
fn a_write_that_does_not_fit_ends_its_replica_alone() {
    let setup = setup(true);
    let permit = setup.permit.as_ref().unwrap();
    let (sink, heard) = sink();
    let (sender, refused) = mpsc::channel();
    setup.writer.on_refused(Box::new(move |replica, incarnation, reason| {
        let _ = sender.send((replica, incarnation, reason));
    }));
    setup.writer.submit(vec![task(4, 1, 1, &sink)]);
    setup.begun.recv_timeout(LONG).unwrap();
    setup.writer.submit(vec![
        task(1, 1, 1, &sink),
        task(2, 3, 1, &sink),
        // A gap.
        task(2, 3, 3, &sink),
        task(3, 1, 1, &sink),
    ]);
    for _ in 0..3 {
        permit.send(()).unwrap();
    }
    let (replica, incarnation, reason) = refused.recv_timeout(LONG).unwrap();
    assert_eq!((replica, incarnation), (ReplicaId(2), 3), "{reason}");
    setup.writer.submit(vec![task(2, 3, 2, &sink)]);
    setup.writer.stop();
    let told: Batch = heard.try_iter().flatten().collect();
    assert_eq!(told, [name(4, 1, 1), name(1, 1, 1), name(3, 1, 1)]);
    assert_eq!(setup.log.load(ReplicaId(2)).unwrap().last, 5);
    assert!(setup.fatal.try_recv().is_err());
}

#[test]
fn a_write_that_does_not_fit_is_fatal_if_nobody_hears_of_it() {
    let setup = setup(false);
    let (sink, heard) = sink();
    setup.writer.submit(vec![task(1, 1, 1, &sink), task(2, 1, 3, &sink)]);
    let reason = setup.fatal.recv_timeout(LONG).unwrap();
    assert!(reason.contains("replica 2"), "{reason}");
    assert!(heard.try_recv().is_err());
}

#[test]
fn a_panic_is_fatal_and_fails_the_fences_that_wait() {
    let setup = setup(false);
    let (go, wait) = mpsc::channel::<()>();
    let (at, begun) = mpsc::channel();
    setup.writer.run(Box::new(move |_| {
        at.send(()).unwrap();
        let _ = wait.recv_timeout(LONG);
        panic!("a job went wrong");
    }));
    begun.recv_timeout(LONG).unwrap();
    let fence = setup.writer.fence(ReplicaId(1), 1);
    go.send(()).unwrap();
    let reason = setup.fatal.recv_timeout(LONG).unwrap();
    assert!(reason.contains("a job went wrong"), "{reason}");
    assert!(fence.blocking_recv().is_err());
}

#[test]
fn stop_does_what_is_queued_and_accepts_nothing_more() {
    let setup = setup(false);
    let (sink, heard) = sink();
    setup.writer.submit((1..=100).map(|n| task(1, 1, n, &sink)).collect());
    setup.writer.stop();
    assert_eq!(heard.try_iter().map(|batch| batch.len()).sum::<usize>(), 100);
    setup.writer.submit(vec![task(1, 1, 101, &sink)]);
    setup.writer.fence(ReplicaId(1), 1).blocking_recv().unwrap();
    setup.writer.stop();
    assert_eq!(setup.log.load(ReplicaId(1)).unwrap().last, 105);
}

#[test]
fn purging_names_who_holds_back_space() {
    let setup = setup(false);
    let (sender, named) = mpsc::channel();
    setup.writer.on_held_back(Box::new(move |replicas| {
        let _ = sender.send(replicas);
    }));
    assert!(named.recv_timeout(Duration::from_millis(30)).is_err());
    *setup.log.held_back.lock().unwrap() = vec![ReplicaId(2)];
    assert_eq!(named.recv_timeout(LONG).unwrap(), [ReplicaId(2)]);
}

#[test]
fn a_purge_that_finds_damage_is_fatal() {
    let setup = setup(false);
    setup.log.rotten.store(true, Ordering::Relaxed);
    let reason = setup.fatal.recv_timeout(LONG).unwrap();
    assert!(reason.contains("rotten"), "{reason}");
}

#[test]
fn what_one_replica_has_queued_holds_up_no_other() {
    let setup = setup(true);
    let permit = setup.permit.as_ref().unwrap();
    let (sink, heard) = sink();
    let target = limits::LOG_WRITE_TARGET_BYTES;
    setup.writer.submit(vec![task(4, 1, 1, &sink)]);
    setup.begun.recv_timeout(LONG).unwrap();
    // One that catches up, then two that write little; the second has a job behind what it writes, and then more.
    let great = target / 2;
    setup.writer.submit((1..=6).map(|number| sized(1, 1, number, great, &sink)).collect());
    setup.writer.submit((1..=3).map(|number| task(2, 1, number, &sink)).collect());
    setup.writer.submit(vec![task(3, 1, 1, &sink)]);
    let (ran, order) = mpsc::channel();
    let tell = ran.clone();
    let job = move |log: &dyn LogStore| tell.send(log.load(ReplicaId(3)).unwrap().last).unwrap();
    setup.writer.run_for(ReplicaId(3), 1, Box::new(job));
    setup.writer.submit(vec![task(3, 1, 2, &sink)]);
    // One on nobody's behalf: nothing passes by it.
    setup
        .writer
        .run(Box::new(move |log: &dyn LogStore| ran.send(log.load(ReplicaId(1)).unwrap().last).unwrap()));
    setup.writer.submit(vec![task(4, 1, 2, &sink)]);
    for _ in 0..9 {
        // More permits than there are batches do no harm.
        permit.send(()).unwrap();
    }
    let mut batches = Vec::new();
    while batches.iter().flatten().count() < 13 {
        batches.push(heard.recv_timeout(LONG).unwrap());
    }
    let of = |replica: u64| {
        let all = batches.iter().flatten().filter(move |(of, ..)| of.0 == replica);
        all.map(|(_, _, number)| *number).collect::<Vec<_>>()
    };
    assert_eq!(of(1), [1, 2, 3, 4, 5, 6]);
    assert_eq!((of(2), of(3), of(4)), (vec![1, 2, 3], vec![1, 2], vec![1, 2]));
    let second = &batches[1];
    for passed in [name(1, 1, 1), name(2, 1, 1), name(2, 1, 2), name(2, 1, 3), name(3, 1, 1)] {
        assert!(second.contains(&passed), "{second:?}");
    }
    assert!(!second.contains(&name(3, 1, 2)), "it is behind a job of the same replica");
    // The replica's log ends with what was queued before the job, and not with what came after.
    assert_eq!(order.recv_timeout(LONG), Ok(6));
    assert_eq!(order.recv_timeout(LONG), Ok(11));
    assert_eq!(batches.last().expect("some").last(), Some(&name(4, 1, 2)));
}
