//! The flush thread: gathers frozen memtables of all replicas and makes them durable in one round,
//! one redo file and one sync for many; removes the state of dropped replicas in between, and does
//! there what must not fall into a flush.
//!
//! A flush that finds the disk full is tried again now and then, with what has come meanwhile: it has
//! left nothing behind, and the log has all of it. The memtables stay in memory until then, so that
//! soon the node pauses applying.

use std::io;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::fatal::Fatal;
use crate::ids::{Incarnation, Position, ReplicaId};
use crate::limits;
use crate::storage::flush::{FlushStep, Flusher, Progress};
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
    /// unknown, and the node must stop.
    pub fn start(flusher: Flusher, fatal: Fatal) -> io::Result<(FlushThread, JoinHandle<()>)> {
        let (work, queue) = mpsc::channel();
        let raised = fatal.clone();
        let thread =
            fatal.thread("pontoon-flush", "the flush thread", move || run(flusher, queue, raised))?;
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

    /// Removes all state of replicas that are tombstones, then tells so, on the thread.
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

fn run(mut flusher: Flusher, queue: mpsc::Receiver<Work>, fatal: Fatal) {
    // Those that found the disk full.
    let mut flushes: Vec<FlushJob> = Vec::new();
    loop {
        let first = match flushes.is_empty() {
            true => queue.recv().ok(),
            false => match queue.recv_timeout(Duration::from_millis(limits::DISK_FULL_WAIT_MS)) {
                Err(RecvTimeoutError::Timeout) => None,
                // The node stops; the log has what isn't flushed.
                Err(RecvTimeoutError::Disconnected) => return,
                Ok(work) => Some(work),
            },
        };
        if first.is_none() && flushes.is_empty() {
            return;
        }
        let waited = !flushes.is_empty();
        let mut destroy = Vec::new();
        let mut jobs = Vec::new();
        let mut barriers = Vec::new();
        for work in first.into_iter().chain(queue.try_iter()) {
            match work {
                Work::Flush(job) => flushes.push(job),
                Work::Run(job) => jobs.push(job),
                Work::Destroy(replicas, done) => destroy.push((replicas, done)),
                Work::Barrier(replica, done) => barriers.push((replica, done)),
            }
        }
        match flush(&mut flusher, &flushes) {
            Ok(()) => {
                if waited {
                    tracing::info!("there is space again: state is flushed to disk");
                }
                flushes.clear();
            }
            Err(error) if flusher.may_retry(&error) => {
                if !waited {
                    tracing::error!(%error, "the disk is full: flushing state, to be tried again");
                }
            }
            Err(error) => {
                fatal.raise(format!("flushing state to disk: {error}"));
                return;
            }
        }
        if !destroy.is_empty() {
            // One sync, however many: at the start of a node that may be all that were ever removed.
            let all: Vec<_> = destroy.iter().flat_map(|(all, _)| all).copied().collect();
            if let Err(error) = flusher.destroy(&all) {
                fatal.raise(format!("removing state from disk: {error}"));
                return;
            }
        }
        for (replicas, done) in destroy {
            done(&replicas);
        }
        for job in jobs {
            job(&mut flusher);
        }
        for (replica, done) in barriers {
            // Frozen by an incarnation that has ended; nothing of it is on disk.
            flushes.retain(|job| job.frozen.replica != replica);
            if done.send(()).is_err() {
                tracing::trace!("nobody waits any more: the node is stopping");
            }
        }
    }
}

fn flush(flusher: &mut Flusher, jobs: &[FlushJob]) -> Result<(), crate::storage::StorageError> {
    if jobs.is_empty() {
        return Ok(());
    }
    let begun = Instant::now();
    let tables: Vec<_> = jobs.iter().map(|job| job.frozen.clone()).collect();
    flusher.flush_parts(&tables, &mut |so_far| {
        let (step, parts) = match so_far {
            Progress::Logged => (FlushStep::Logged, None),
            Progress::Absorbed(parts) => (FlushStep::Absorbed, Some(parts)),
        };
        let concerns = |job: &&FlushJob| {
            parts.is_none_or(|parts| parts.contains(&(job.frozen.replica, job.frozen.generation)))
        };
        let mut told: Vec<(&Arc<dyn FlushSink>, Vec<_>)> = Vec::new();
        for job in jobs.iter().filter(concerns) {
            let progress = (job.frozen.replica, job.incarnation, job.frozen.header.applied);
            match told.iter_mut().find(|(sink, _)| Arc::ptr_eq(sink, &job.done)) {
                Some((_, batch)) => batch.push(progress),
                None => told.push((&job.done, vec![progress])),
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
    use crate::storage::StorageError;
    use crate::storage::engine_memory::MemoryEngine;
    use crate::storage::flush::FlushPoint;
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
        let (thread, joined) = FlushThread::start(flusher, fatal.clone()).unwrap();
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
        let (thread, joined) = FlushThread::start(flusher, Fatal::new()).unwrap();
        let (told, _steps) = mpsc::channel();
        let done = Arc::new(Told(Mutex::new(told)));
        thread.submit(FlushJob { incarnation: 1, frozen: frozen(&engine, 1), done });
        thread.close();
        joined.join().unwrap();
    }
}
