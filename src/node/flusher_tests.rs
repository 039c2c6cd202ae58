//! Tests of [`super`].

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use super::*;
use crate::limits::FLUSH_BATCH_KEYS;
use crate::storage::engine::{Engine, Mutation, Run};
use crate::storage::engine_memory::MemoryEngine;
use crate::storage::flush::FlushPoint;
use crate::storage::keys;
use crate::storage::state::ReplicaState;
use crate::storage::state::tests::initial;
use crate::storage::{StateBatch, StateView};

const LONG: Duration = Duration::from_secs(10);

struct Told(Mutex<mpsc::Sender<(FlushStep, ReplicaId)>>);

impl FlushSink for Told {
    fn flushed(&self, step: FlushStep, batch: Vec<(ReplicaId, Incarnation, Position)>) {
        for (replica, ..) in batch {
            self.0.lock().unwrap().send((step, replica)).unwrap();
        }
    }
}

fn frozen(engine: &Arc<MemoryEngine>, replica: u64) -> Arc<Frozen> {
    let mut state = ReplicaState::open(engine.clone(), ReplicaId(replica), 0, initial()).unwrap();
    state.put(b"k", bytes::Bytes::from_static(b"v"));
    state.set_applied(Position { index: 6, term: 5 });
    state.freeze().expect("a change")
}

#[test]
fn a_flush_waits_for_space_and_nobody_waits_for_what_a_dead_replica_froze() {
    let dir = tempfile::tempdir().unwrap();
    let engine = Arc::new(MemoryEngine::new());
    let mut flusher = Flusher::open(dir.path().join("redo"), engine.clone()).unwrap();
    let full = Arc::new(AtomicU32::new(u32::MAX));
    let left = full.clone();
    flusher.set_hook(Box::new(move |point| {
        let fails = |left: u32| left.checked_sub(1);
        if point != FlushPoint::RedoWritten
            || left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, fails).is_err()
        {
            return Ok(());
        }
        let source = io::ErrorKind::StorageFull.into();
        Err(StorageError::Io { action: "writing", path: "redo".into(), source })
    }));
    let fatal = Fatal::new();
    let (thread, joined) = FlushThread::start(flusher, fatal.clone(), Pulse::default()).unwrap();
    let (told, steps) = mpsc::channel();
    let sink = Arc::new(Told(Mutex::new(told)));
    for replica in [1, 2] {
        let frozen = frozen(&engine, replica);
        thread.submit(FlushJob { incarnation: 1, frozen, done: sink.clone() });
    }
    thread.barrier(ReplicaId(2)).blocking_recv().expect("the thread goes on");
    assert!(steps.try_recv().is_err(), "nothing is flushed");
    full.store(2, Ordering::SeqCst);
    for step in [FlushStep::Logged, FlushStep::Absorbed] {
        assert_eq!(steps.recv_timeout(LONG), Ok((step, ReplicaId(1))));
    }
    assert_eq!(fatal.reason(), None);
    let kept = ReplicaState::open(engine.clone(), ReplicaId(1), 0, initial()).unwrap();
    assert_eq!(kept.get(b"k").unwrap().as_deref(), Some(&b"v"[..]));
    let dropped = ReplicaState::open(engine.clone(), ReplicaId(2), 0, initial()).unwrap();
    assert_eq!(dropped.get(b"k").unwrap(), None, "its fence dropped what it had frozen");
    thread.close();
    joined.join().unwrap();
    assert_eq!(std::fs::read_dir(dir.path().join("redo")).unwrap().count(), 0);
}

#[test]
fn the_thread_ends_although_the_disk_is_full() {
    let dir = tempfile::tempdir().unwrap();
    let engine = Arc::new(MemoryEngine::new());
    let mut flusher = Flusher::open(dir.path().join("redo"), engine.clone()).unwrap();
    flusher.set_hook(Box::new(|_| {
        let source = io::ErrorKind::StorageFull.into();
        Err(StorageError::Io { action: "writing", path: "redo".into(), source })
    }));
    let (thread, joined) = FlushThread::start(flusher, Fatal::new(), Pulse::default()).unwrap();
    let (told, _steps) = mpsc::channel();
    let done = Arc::new(Told(Mutex::new(told)));
    thread.submit(FlushJob { incarnation: 1, frozen: frozen(&engine, 1), done });
    thread.close();
    joined.join().unwrap();
}

/// Writes `count` keys of a replica into the engine.
fn fill(engine: &MemoryEngine, replica: ReplicaId, count: u32) {
    let (from, _) = keys::replica_range(replica);
    let batch: Vec<Mutation> = (0..count)
        .map(|at| ([&from[..], &at.to_be_bytes()].concat(), Some(bytes::Bytes::from_static(b"v"))))
        .collect();
    engine.write(&batch).unwrap();
}

fn held(engine: &MemoryEngine, replica: ReplicaId) -> usize {
    let (from, to) = keys::replica_range(replica);
    let mut held = 0;
    let mut count = |_: &[u8]| {
        held += 1;
        true
    };
    engine.scan_keys(std::ops::Bound::Included(&from), &to, &mut count).unwrap();
    held
}

#[test]
fn a_flush_waits_for_no_more_than_a_batch_of_a_great_removal() {
    let dir = tempfile::tempdir().unwrap();
    let engine = Arc::new(MemoryEngine::new());
    let mut flusher = Flusher::open(dir.path().join("redo"), engine.clone()).unwrap();
    let (great, small) = (ReplicaId(7), ReplicaId(8));
    fill(&engine, great, 10 * FLUSH_BATCH_KEYS as u32);
    fill(&engine, small, 3);
    let (told, ends) = mpsc::channel();
    let mut removals = Removals::default();
    removals.begin(&mut flusher, vec![great, small], Box::new(move |all| told.send(all.to_vec()).unwrap()));
    removals.step(&mut flusher).unwrap();
    assert_eq!(held(&engine, great), 9 * FLUSH_BATCH_KEYS, "one batch");
    assert!(ends.try_recv().is_err() && !removals.are_done());
    // Nobody who waits for another replica waits for this one; who waits for one of them does.
    removals.finish(&mut flusher, ReplicaId(9)).unwrap();
    assert_eq!(held(&engine, great), 9 * FLUSH_BATCH_KEYS);
    removals.finish(&mut flusher, small).unwrap();
    assert_eq!((held(&engine, great), held(&engine, small)), (0, 0));
    assert_eq!(ends.try_recv(), Ok(vec![great, small]));
    assert!(removals.are_done());
}

/// Of the first part's table, whether it is in memory when each part is told.
struct Watching(std::sync::Weak<Frozen>, Mutex<mpsc::Sender<(ReplicaId, bool)>>);

impl FlushSink for Watching {
    fn flushed(&self, step: FlushStep, batch: Vec<(ReplicaId, Incarnation, Position)>) {
        if step == FlushStep::Absorbed {
            let told = (batch[0].0, self.0.strong_count() > 0);
            self.1.lock().unwrap().send(told).unwrap();
        }
    }
}

#[test]
fn memory_that_is_told_to_be_free_is_not_held_until_the_flush_is_over() {
    let dir = tempfile::tempdir().unwrap();
    let engine = Arc::new(MemoryEngine::new());
    let mut flusher = Flusher::open(dir.path().join("redo"), engine.clone()).unwrap();
    let tables = [1, 2, 3].map(|replica| {
        let mut state = ReplicaState::open(engine.clone(), ReplicaId(replica), 0, initial()).unwrap();
        state.put(b"k", bytes::Bytes::from(vec![7; limits::FLUSH_PART_BYTES]));
        state.set_applied(Position { index: 6, term: 5 });
        state.freeze().expect("a change")
    });
    let (told, parts) = mpsc::channel();
    let done = Arc::new(Watching(Arc::downgrade(&tables[0]), Mutex::new(told)));
    let jobs: Vec<FlushJob> =
        tables.into_iter().map(|frozen| FlushJob { incarnation: 1, frozen, done: done.clone() }).collect();
    let mut flushes = Flushes { waiting: jobs, ..Flushes::default() };
    flushes.step(&mut flusher).unwrap();
    assert!(flushes.are_done(&flusher));
    let parts: Vec<_> = parts.try_iter().collect();
    assert_eq!(parts, [(ReplicaId(1), true), (ReplicaId(2), false), (ReplicaId(3), false)]);
}

#[test]
fn a_full_disk_is_not_tried_at_each_step_of_a_removal() {
    let dir = tempfile::tempdir().unwrap();
    let engine = Arc::new(MemoryEngine::new());
    let mut flusher = Flusher::open(dir.path().join("redo"), engine.clone()).unwrap();
    let tries = Arc::new(AtomicU32::new(0));
    let tried = tries.clone();
    flusher.set_hook(Box::new(move |point| {
        if point != FlushPoint::RedoWritten {
            return Ok(());
        }
        tried.fetch_add(1, Ordering::SeqCst);
        let source = io::ErrorKind::StorageFull.into();
        Err(StorageError::Io { action: "writing", path: "redo".into(), source })
    }));
    let steps = 200;
    fill(&engine, ReplicaId(7), steps * FLUSH_BATCH_KEYS as u32);
    let (thread, joined) = FlushThread::start(flusher, Fatal::new(), Pulse::default()).unwrap();
    let (told, _steps) = mpsc::channel();
    let done = Arc::new(Told(Mutex::new(told)));
    thread.submit(FlushJob { incarnation: 1, frozen: frozen(&engine, 1), done });
    let (told, ends) = mpsc::channel();
    let begun = Instant::now();
    thread.destroy(vec![ReplicaId(7)], Box::new(move |_| told.send(()).unwrap()));
    ends.recv_timeout(LONG).unwrap();
    let waits = begun.elapsed().as_millis() as u64 / limits::DISK_FULL_WAIT_MS;
    let tries = tries.load(Ordering::SeqCst);
    assert!(u64::from(tries) <= waits + 2 && tries > 0, "{tries} tries in {:?}", begun.elapsed());
    thread.close();
    joined.join().unwrap();
}

/// Finds no room while it is told so.
struct FullEngine {
    inner: Arc<MemoryEngine>,
    /// For runs.
    is: AtomicBool,
    /// For what was written outside of runs, which stays in memory.
    syncs_are: AtomicBool,
    runs: AtomicU32,
    syncs: AtomicU32,
}

impl FullEngine {
    fn new(inner: &Arc<MemoryEngine>, runs: bool, syncs: bool) -> Arc<FullEngine> {
        let inner = inner.clone();
        let (is, syncs_are) = (runs.into(), syncs.into());
        Arc::new(FullEngine { inner, is, syncs_are, runs: 0.into(), syncs: 0.into() })
    }
}

fn unless(full: &AtomicBool) -> Result<(), StorageError> {
    if full.load(Ordering::SeqCst) {
        let source = io::ErrorKind::StorageFull.into();
        return Err(StorageError::Io { action: "writing", path: "table".into(), source });
    }
    Ok(())
}

struct FullRun<'a>(&'a FullEngine, Vec<Mutation>);

impl Run for FullRun<'_> {
    fn push(&mut self, key: &[u8], value: Option<&bytes::Bytes>) -> Result<(), StorageError> {
        self.1.push((key.to_vec(), value.cloned()));
        Ok(())
    }
    fn finish(self: Box<Self>) -> Result<(), StorageError> {
        unless(&self.0.is)?;
        self.0.runs.fetch_add(1, Ordering::SeqCst);
        self.0.inner.write(&self.1)
    }
}

impl Engine for FullEngine {
    fn get(&self, key: &[u8]) -> Result<Option<bytes::Bytes>, StorageError> {
        self.inner.get(key)
    }
    fn scan(
        &self,
        from: std::ops::Bound<&[u8]>,
        to: &[u8],
        visit: &mut dyn FnMut(&[u8], bytes::Bytes) -> bool,
    ) -> Result<(), StorageError> {
        self.inner.scan(from, to, visit)
    }
    fn write(&self, batch: &[Mutation]) -> Result<(), StorageError> {
        self.inner.write(batch)?;
        unless(&self.syncs_are)
    }
    fn begin_run(&self) -> Result<Option<Box<dyn Run + '_>>, StorageError> {
        Ok(Some(Box::new(FullRun(self, Vec::new()))))
    }
    fn sync(&self) -> Result<(), StorageError> {
        self.syncs.fetch_add(1, Ordering::SeqCst);
        unless(&self.syncs_are)?;
        self.inner.sync()
    }
    fn bears_a_full_disk(&self) -> bool {
        true
    }
    fn disk_bytes(&self) -> u64 {
        0
    }
    fn name(&self) -> &'static str {
        "full"
    }
}

/// Waits until it is so.
fn until(what: &str, mut is: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is() {
        assert!(begun.elapsed() < LONG, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn while_a_flush_is_half_done_nobody_gets_between_and_others_are_removed() {
    let dir = tempfile::tempdir().unwrap();
    let memory = Arc::new(MemoryEngine::new());
    let engine = FullEngine::new(&memory, true, false);
    let flusher = Flusher::open(dir.path().join("redo"), engine.clone()).unwrap();
    fill(&memory, ReplicaId(7), 3);
    let fatal = Fatal::new();
    let (thread, joined) = FlushThread::start(flusher, fatal.clone(), Pulse::default()).unwrap();
    let (told, steps) = mpsc::channel();
    let done = Arc::new(Told(Mutex::new(told)));
    thread.submit(FlushJob { incarnation: 1, frozen: frozen(&memory, 1), done: done.clone() });
    assert_eq!(steps.recv_timeout(LONG), Ok((FlushStep::Logged, ReplicaId(1))), "its file is there");
    // Of the replica that is under way nothing may be removed, and nobody may rely on what the engine holds of it.
    let mut fence = thread.barrier(ReplicaId(1));
    thread.barrier(ReplicaId(2)).blocking_recv().expect("others are fenced");
    assert!(fence.try_recv().is_err(), "the flush isn't over");
    let (told, between) = mpsc::channel();
    thread.run(Box::new(move |flusher| told.send(flusher.is_half_done()).unwrap()));
    let (told, ends) = mpsc::channel();
    for replica in [1, 7] {
        let told = told.clone();
        thread.destroy(vec![ReplicaId(replica)], Box::new(move |all| told.send(all.to_vec()).unwrap()));
    }
    thread.barrier(ReplicaId(2)).blocking_recv().expect("others are fenced");
    until("what makes room doesn't wait for room", || held(&memory, ReplicaId(7)) == 0);
    assert!(fence.try_recv().is_err() && between.try_recv().is_err() && ends.try_recv().is_err());
    assert!(steps.try_recv().is_err(), "nothing is absorbed");
    engine.is.store(false, Ordering::SeqCst);
    assert_eq!(steps.recv_timeout(LONG), Ok((FlushStep::Absorbed, ReplicaId(1))));
    fence.blocking_recv().expect("fenced");
    assert_eq!(between.recv_timeout(LONG), Ok(false));
    for _ in 0..2 {
        ends.recv_timeout(LONG).expect("removed");
    }
    assert_eq!(held(&memory, ReplicaId(1)), 0, "the flush didn't bring it back");
    assert_eq!(fatal.reason(), None);
    thread.close();
    joined.join().unwrap();
    assert_eq!(std::fs::read_dir(dir.path().join("redo")).unwrap().count(), 0);
}

#[test]
fn a_flush_of_which_all_is_told_still_ends_when_there_is_room_for_what_others_wrote() {
    let dir = tempfile::tempdir().unwrap();
    let memory = Arc::new(MemoryEngine::new());
    let engine = FullEngine::new(&memory, false, false);
    let flusher = Flusher::open(dir.path().join("redo"), engine.clone()).unwrap();
    engine.syncs_are.store(true, Ordering::SeqCst);
    let fatal = Fatal::new();
    let (thread, joined) = FlushThread::start(flusher, fatal.clone(), Pulse::default()).unwrap();
    let (told, steps) = mpsc::channel();
    let done = Arc::new(Told(Mutex::new(told)));
    thread.submit(FlushJob { incarnation: 1, frozen: frozen(&memory, 1), done });
    for step in [FlushStep::Logged, FlushStep::Absorbed] {
        assert_eq!(steps.recv_timeout(LONG), Ok((step, ReplicaId(1))));
    }
    let mut fence = thread.barrier(ReplicaId(1));
    thread.barrier(ReplicaId(2)).blocking_recv().expect("others are fenced");
    assert!(fence.try_recv().is_err(), "its file is there");
    // Nobody asks for anything more.
    engine.syncs_are.store(false, Ordering::SeqCst);
    until("its end doesn't wait for others' work", || fence.try_recv().is_ok());
    assert_eq!(std::fs::read_dir(dir.path().join("redo")).unwrap().count(), 0);
    assert_eq!(fatal.reason(), None);
    thread.close();
    joined.join().unwrap();
}

#[test]
fn a_removal_that_finds_no_room_does_not_fill_memory_instead() {
    let dir = tempfile::tempdir().unwrap();
    let memory = Arc::new(MemoryEngine::new());
    let engine = FullEngine::new(&memory, false, false);
    let flusher = Flusher::open(dir.path().join("redo"), engine.clone()).unwrap();
    fill(&memory, ReplicaId(7), 5 * FLUSH_BATCH_KEYS as u32);
    engine.syncs_are.store(true, Ordering::SeqCst);
    engine.syncs.store(0, Ordering::SeqCst);
    let fatal = Fatal::new();
    let (thread, joined) = FlushThread::start(flusher, fatal.clone(), Pulse::default()).unwrap();
    let (told, ends) = mpsc::channel();
    thread.destroy(vec![ReplicaId(7)], Box::new(move |_| told.send(()).unwrap()));
    until("it looks for room", || engine.syncs.load(Ordering::SeqCst) >= 3);
    assert_eq!(held(&memory, ReplicaId(7)), 4 * FLUSH_BATCH_KEYS, "one batch waits, and no more");
    engine.syncs_are.store(false, Ordering::SeqCst);
    ends.recv_timeout(LONG).expect("removed");
    assert_eq!((held(&memory, ReplicaId(7)), fatal.reason()), (0, None));
    thread.close();
    joined.join().unwrap();
}

#[test]
fn what_goes_on_of_many_small_replicas_goes_on_together() {
    let dir = tempfile::tempdir().unwrap();
    let memory = Arc::new(MemoryEngine::new());
    let engine = FullEngine::new(&memory, true, false);
    let mut flusher = Flusher::open(dir.path().join("redo"), engine.clone()).unwrap();
    let (told, steps) = mpsc::channel();
    let done = Arc::new(Told(Mutex::new(told)));
    let job = |replica| FlushJob { incarnation: 1, frozen: frozen(&memory, replica), done: done.clone() };
    let mut flushes = Flushes { waiting: (1..=100).map(job).collect(), ..Flushes::default() };
    flushes.step(&mut flusher).expect_err("no room");
    assert!(flusher.is_half_done() && !flushes.are_done(&flusher));
    assert_eq!(steps.try_iter().filter(|(step, _)| *step == FlushStep::Logged).count(), 100);
    engine.is.store(false, Ordering::SeqCst);
    flushes.step(&mut flusher).unwrap();
    assert!(flushes.are_done(&flusher) && flushes.concerned.is_empty());
    assert_eq!(steps.try_iter().filter(|(step, _)| *step == FlushStep::Absorbed).count(), 100);
    assert_eq!(engine.runs.load(Ordering::SeqCst), 1, "each run takes some syncs");
}

#[test]
fn where_not_all_has_room_the_smallest_replicas_are_flushed_first() {
    let engine = Arc::new(MemoryEngine::new());
    let (told, _steps) = mpsc::channel();
    let done = Arc::new(Told(Mutex::new(told)));
    let mut jobs: Vec<FlushJob> = [(1, 9000), (2, 2000), (3, 1000), (4, 5000)]
        .map(|(replica, bytes)| {
            let mut state = ReplicaState::open(engine.clone(), ReplicaId(replica), 0, initial()).unwrap();
            state.put(b"k", bytes::Bytes::from(vec![7; bytes]));
            state.set_applied(Position { index: 6, term: 5 });
            FlushJob { incarnation: 1, frozen: state.freeze().expect("a change"), done: done.clone() }
        })
        .into();
    let order = |jobs: &[FlushJob]| jobs.iter().map(|job| job.frozen.replica.0).collect::<Vec<_>>();
    for room in [None, Some(1 << 20)] {
        assert_eq!(fitting(&mut jobs, room), 4);
        assert_eq!(order(&jobs), [1, 2, 3, 4], "all go, as they came");
    }
    assert_eq!(fitting(&mut jobs, Some(5000)), 2);
    assert_eq!(order(&jobs), [3, 2, 4, 1]);
    assert_eq!(fitting(&mut jobs, Some(10_000)), 3);
    assert_eq!(fitting(&mut jobs, Some(0)), 1, "one is tried");
}
