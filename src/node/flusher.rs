//! The flush thread: gathers frozen memtables of all replicas and makes them durable in one round,
//! one redo file and one sync for many; removes the state of dropped replicas in between, a batch at a time so
//! that no flush waits for all of a great one, and does there what must not fall into a flush.
//!
//! A flush that finds the disk full is tried again now and then, with what has come meanwhile: it has
//! left nothing behind, and the log has all of it. The memtables stay in memory until then, so that
//! soon the node pauses applying.

use std::collections::VecDeque;
use std::io;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::fatal::Fatal;
use crate::ids::{Incarnation, Position, ReplicaId};
use crate::limits;
use crate::storage::StorageError;
use crate::storage::flush::{FlushStep, Flusher, Progress};
use crate::storage::pulse::{self, Pulse};
use crate::storage::state::Frozen;
use crate::telemetry::metrics as names;

/// A frozen memtable on its way to disk.
pub struct FlushJob {
    /// Which start of its replica froze it.
    pub incarnation: Incarnation,
    /// The writes.
    pub frozen: Arc<Frozen>,
    /// Who hears of its progress.
    pub done: Arc<dyn FlushSink>,
}

/// Where the progress of flushes goes; called for some replicas at a time, once per step and replica.
pub trait FlushSink: Send + Sync {
    /// The flushes of these replicas have come so far.
    fn flushed(&self, step: FlushStep, batch: Vec<(ReplicaId, Incarnation, Position)>);
}

/// Told that the state of these replicas is gone, durably.
pub type Destroyed = Box<dyn FnOnce(&[ReplicaId]) + Send>;

/// Something to be done with the flusher between two flushes. It must not take long: flushes wait.
pub type FlusherJob = Box<dyn FnOnce(&mut Flusher) + Send>;

enum Work {
    Flush(FlushJob),
    Run(FlusherJob),
    Destroy(Vec<ReplicaId>, Destroyed),
    /// Answered when everything submitted before of the replica is done.
    Barrier(ReplicaId, oneshot::Sender<()>),
}

/// See the module page. Bounded: a replica has one flush under way.
pub struct FlushThread {
    work: Mutex<Option<mpsc::Sender<Work>>>,
}

impl FlushThread {
    /// Starts the thread. `fatal` is raised if a flush fails or panics: what is on disk is then
    /// unknown, and the node must stop. `pulse` tells how it gets on.
    pub fn start(flusher: Flusher, fatal: Fatal, pulse: Pulse) -> io::Result<(FlushThread, JoinHandle<()>)> {
        let (work, queue) = mpsc::channel();
        let raised = fatal.clone();
        let thread = fatal.thread("pontoon-flush", "the flush thread", move || {
            let _attached = pulse.attach();
            run(flusher, queue, raised);
        })?;
        Ok((FlushThread { work: Mutex::new(Some(work)) }, thread))
    }

    /// Hands over a frozen memtable.
    pub fn submit(&self, job: FlushJob) {
        self.send(Work::Flush(job));
    }

    /// Does something between two flushes. Dropped undone once the thread has ended.
    pub fn run(&self, job: FlusherJob) {
        self.send(Work::Run(job));
    }

    /// Removes all state of replicas that are tombstones, then tells so, on the thread. What the thread hasn't come
    /// to when the node stops is left: the tombstones stay, and the next start hands it over again.
    pub fn destroy(&self, replicas: Vec<ReplicaId>, done: Destroyed) {
        if !replicas.is_empty() {
            self.send(Work::Destroy(replicas, done));
        }
    }

    /// Resolves when everything submitted before of this replica is done, or dropped since there is no
    /// space for it; the fence before a replica is reopened.
    pub fn barrier(&self, replica: ReplicaId) -> oneshot::Receiver<()> {
        let (done, receiver) = oneshot::channel();
        self.send(Work::Barrier(replica, done));
        receiver
    }

    /// Takes no more work; the thread ends when it is done with what it has.
    pub fn close(&self) {
        self.work.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    fn send(&self, work: Work) {
        let sender = self.work.lock().unwrap_or_else(PoisonError::into_inner);
        if sender.as_ref().is_none_or(|sender| sender.send(work).is_err()) {
            tracing::debug!("the flush thread has ended");
        }
    }
}

/// Replicas whose state is being removed.
#[derive(Default)]
struct Removals {
    /// Of those that are next, something may be left.
    left: VecDeque<ReplicaId>,
    /// Who hears of their end.
    told: Vec<(Vec<ReplicaId>, Destroyed)>,
}

impl Removals {
    fn begin(&mut self, flusher: &mut Flusher, replicas: Vec<ReplicaId>, done: Destroyed) {
        replicas.iter().for_each(|replica| flusher.begin_destroy(*replica));
        self.left.extend(&replicas);
        self.told.push((replicas, done));
    }

    fn are_done(&self) -> bool {
        self.told.is_empty()
    }

    /// Removes some more.
    fn step(&mut self, flusher: &mut Flusher) -> Result<(), StorageError> {
        if let Some(replica) = self.left.front()
            && flusher.destroy_step(*replica)?
        {
            self.left.pop_front();
        }
        if self.left.is_empty() && !self.are_done() {
            // One sync, however many: at the start of a node that may be all that were ever removed.
            flusher.end_destroy()?;
            for (replicas, done) in self.told.drain(..) {
                done(&replicas);
            }
        }
        Ok(())
    }

    /// Removes all that is left up to this replica's, if that is among them.
    fn finish(&mut self, flusher: &mut Flusher, replica: ReplicaId) -> Result<(), StorageError> {
        while self.told.iter().any(|(replicas, _)| replicas.contains(&replica)) {
            self.step(flusher)?;
        }
        Ok(())
    }
}

fn run(mut flusher: Flusher, queue: mpsc::Receiver<Work>, fatal: Fatal) {
    // Those that found the disk full, and when.
    let mut flushes: Vec<FlushJob> = Vec::new();
    let mut full_at: Option<Instant> = None;
    let full_wait = Duration::from_millis(limits::DISK_FULL_WAIT_MS);
    let mut removals = Removals::default();
    loop {
        let next = match (removals.are_done(), flushes.is_empty()) {
            (true, true) => queue.recv().map_err(|_| RecvTimeoutError::Disconnected),
            (true, false) => queue.recv_timeout(full_wait),
            (false, _) => queue.recv_timeout(Duration::ZERO),
        };
        let first = match next {
            Ok(work) => Some(work),
            Err(RecvTimeoutError::Timeout) => None,
            // The node stops; the log has what isn't flushed, and tombstones tell what isn't removed.
            Err(RecvTimeoutError::Disconnected) => return,
        };
        let _working = pulse::work();
        let mut jobs = Vec::new();
        let mut barriers = Vec::new();
        for work in first.into_iter().chain(queue.try_iter()) {
            match work {
                Work::Flush(job) => flushes.push(job),
                Work::Run(job) => jobs.push(job),
                Work::Destroy(replicas, done) => removals.begin(&mut flusher, replicas, done),
                Work::Barrier(replica, done) => barriers.push((replica, done)),
            }
        }
        // Not between any two steps of a removal: an attempt writes as much as there is space for.
        if full_at.is_none_or(|at| at.elapsed() >= full_wait) {
            match flush(&mut flusher, &mut flushes) {
                Ok(()) => {
                    if full_at.take().is_some() {
                        tracing::info!("there is space again: state is flushed to disk");
                    }
                }
                Err(error) if flusher.may_retry(&error) => {
                    if full_at.replace(Instant::now()).is_none() {
                        tracing::error!(%error, "the disk is full: flushing state, to be tried again");
                    }
                }
                Err(error) => {
                    fatal.raise(format!("flushing state to disk: {error}"));
                    return;
                }
            }
        }
        if let Err(error) = removals.step(&mut flusher) {
            fatal.raise(format!("removing state from disk: {error}"));
            return;
        }
        for job in jobs {
            job(&mut flusher);
        }
        for (replica, done) in barriers {
            if let Err(error) = removals.finish(&mut flusher, replica) {
                fatal.raise(format!("removing state from disk: {error}"));
                return;
            }
            // Frozen by an incarnation that has ended; nothing of it is on disk.
            flushes.retain(|job| job.frozen.replica != replica);
            if flushes.is_empty() {
                full_at = None;
            }
            if done.send(()).is_err() {
                tracing::trace!("nobody waits any more: the node is stopping");
            }
        }
    }
}

/// Flushes all of them. They are taken out when a crash can't undo that any more: nobody tries them again then, and
/// their memory is to be free as soon as their replicas let go of it.
fn flush(flusher: &mut Flusher, jobs: &mut Vec<FlushJob>) -> Result<(), StorageError> {
    if jobs.is_empty() {
        return Ok(());
    }
    let begun = Instant::now();
    let tables = jobs.iter().map(|job| job.frozen.clone()).collect();
    let concerned: Vec<_> = (jobs.iter())
        .map(|FlushJob { incarnation, frozen, done }| {
            let part = (frozen.replica, frozen.generation);
            (done.clone(), part, (frozen.replica, *incarnation, frozen.header.applied))
        })
        .collect();
    flusher.flush_parts(tables, &mut |so_far| {
        let (step, parts) = match so_far {
            Progress::Logged => {
                jobs.clear();
                (FlushStep::Logged, None)
            }
            Progress::Absorbed(parts) => (FlushStep::Absorbed, Some(parts)),
        };
        let mut told: Vec<(&Arc<dyn FlushSink>, Vec<_>)> = Vec::new();
        for (sink, part, progress) in &concerned {
            if parts.is_some_and(|parts| !parts.contains(part)) {
                continue;
            }
            match told.iter_mut().find(|(other, _)| Arc::ptr_eq(other, sink)) {
                Some((_, batch)) => batch.push(*progress),
                None => told.push((sink, vec![*progress])),
            }
        }
        for (sink, batch) in told {
            sink.flushed(step, batch);
        }
    })?;
    metrics::histogram!(names::FLUSH_SECONDS).record(begun.elapsed());
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use raft::eraftpb::ConfState;

    use super::*;
    use crate::ids::{Epoch, GROUP_START};
    use crate::limits::FLUSH_BATCH_KEYS;
    use crate::storage::engine::{Engine, Mutation};
    use crate::storage::engine_memory::MemoryEngine;
    use crate::storage::flush::FlushPoint;
    use crate::storage::keys;
    use crate::storage::state::{ReplicaState, StateHeader};
    use crate::storage::{StateBatch, StateView};

    const LONG: Duration = Duration::from_secs(10);

    fn initial() -> StateHeader {
        StateHeader {
            applied: GROUP_START,
            revision: 0,
            log_time: 0,
            epoch: Epoch { range: 1, conf: 1 },
            members: Vec::new(),
            conf_state: ConfState::default(),
        }
    }

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
        removals.begin(
            &mut flusher,
            vec![great, small],
            Box::new(move |all| told.send(all.to_vec()).unwrap()),
        );
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
        let mut jobs: Vec<FlushJob> = tables
            .into_iter()
            .map(|frozen| FlushJob { incarnation: 1, frozen, done: done.clone() })
            .collect();
        flush(&mut flusher, &mut jobs).unwrap();
        assert!(jobs.is_empty());
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
}
