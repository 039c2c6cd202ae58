//! The flush thread: gathers frozen memtables of all replicas and makes them durable in one round,
//! one redo file and one sync for many; removes the state of dropped replicas in between, and does
//! there what must not fall into a flush.

use std::io;
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use tokio::sync::oneshot;

use super::fatal::Fatal;
use crate::ids::{Incarnation, Position, ReplicaId};
use crate::storage::flush::{FlushStep, Flusher};
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

/// Where the progress of flushes goes; called once per step and round.
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
    /// Answered when everything submitted before is done.
    Barrier(oneshot::Sender<()>),
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

    /// Resolves when everything submitted before is done; the fence before a replica is reopened.
    pub fn barrier(&self) -> oneshot::Receiver<()> {
        let (done, receiver) = oneshot::channel();
        self.send(Work::Barrier(done));
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
    while let Ok(first) = queue.recv() {
        let mut flushes = Vec::new();
        let mut destroy = Vec::new();
        let mut jobs = Vec::new();
        let mut barriers = Vec::new();
        for work in std::iter::once(first).chain(queue.try_iter()) {
            match work {
                Work::Flush(job) => flushes.push(job),
                Work::Run(job) => jobs.push(job),
                Work::Destroy(replicas, done) => destroy.push((replicas, done)),
                Work::Barrier(done) => barriers.push(done),
            }
        }
        let result = flush(&mut flusher, &flushes).and_then(|()| match destroy.is_empty() {
            true => Ok(()),
            // One sync, however many: at the start of a node that may be all that were ever removed.
            false => flusher.destroy(&destroy.iter().flat_map(|(all, _)| all).copied().collect::<Vec<_>>()),
        });
        if let Err(error) = result {
            fatal.raise(format!("flushing state to disk: {error}"));
            return;
        }
        for (replicas, done) in destroy {
            done(&replicas);
        }
        for job in jobs {
            job(&mut flusher);
        }
        for done in barriers {
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
    flusher.flush(&tables, &mut |step| {
        let mut told: Vec<(&Arc<dyn FlushSink>, Vec<_>)> = Vec::new();
        for job in jobs {
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
