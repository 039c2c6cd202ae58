//! The log writer: the thread that makes log writes durable, for all groups of a node.
//!
//! ```text
//! arbiter ──submit──►┐                 ┌── one LogStore::write, one fdatasync ──┐
//! arbiter ──submit──►│ queue ──gather──┤                                        ├─► persisted, once
//! anyone  ──run─────►┘                 └── job ─────────────────────────────────┘   per sink and batch
//! ```
//!
//! While one batch is on its way to the disk the next one gathers, so the busier the node, the more
//! writes share a sync. What is of one replica, writes and jobs on its behalf, is done in the order it was queued;
//! writes of different replicas may pass each other: while more waits than a batch takes, each replica gets its part of
//! the next, so that nobody waits for all that one which catches up has queued. A job on nobody's behalf sees all
//! writes queued before it and none queued after.
//!
//! A second thread purges the log every [`limits::LOG_PURGE_MS`], so that no write waits for the
//! rewriting of old entries.
//!
//! A write that contradicts its replica's log is that replica's bug and must not harm its neighbours:
//! the log refuses it before anything is written, so the others of the batch are written without
//! it, the replica's incarnation is fenced, and [`LogWriter::on_refused`] says which one must end.
//!
//! A full disk is waited for: the engine has written nothing of the batch, whoever wrote it was told
//! nothing, and the writes behind it wait too. How long the present write or job has been under way,
//! such waiting included, [`LogWriter::under_way`] tells.
//!
//! All else that goes wrong here (an error, a panic, also of a sink or a job) is the end of the node:
//! what is on disk is unknown. `on_fatal` hears of it once; nothing is persisted or reported after
//! that, fences fail, and what is submitted later is dropped.
//!
//! The queue holds [`limits::LOG_QUEUE_BYTES_MAX`]. Beyond that it still takes what comes, and warns
//! once: what keeps it there is [`super::intake`], which asks for its bytes, for what leaders
//! elsewhere send, and each group's own limits for what leaders here propose.

mod queue;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use self::queue::{Item, Phase, Queue, Work};
use super::trace::WriteStamps;
use crate::failpoints::failpoint;
use crate::ids::{Incarnation, ReplicaId};
use crate::limits;
use crate::storage::StorageError;
use crate::storage::log::{LogStore, LogWrite};
use crate::storage::log_disk::panic_text;
use crate::telemetry::hot::hot;

/// Told of what has become durable. One per arbiter: what crosses threads crosses in batches.
pub trait PersistSink: Send + Sync {
    /// The tasks of one batch that named this sink are durable, each replica's in the order they were submitted:
    /// replica, incarnation, number. Called on the log writer's thread: it must neither block nor
    /// panic.
    fn persisted(&self, batch: &[(ReplicaId, Incarnation, u64)]);
}

/// A write, and whom to tell.
pub struct WriteTask {
    /// Which start of the replica asks.
    pub incarnation: Incarnation,
    /// The group's own count of its writes, handed back.
    pub number: u64,
    /// The write.
    pub write: LogWrite,
    /// Told when it is durable.
    pub done: Arc<dyn PersistSink>,
    /// Where to note when it is begun and done, if anybody wants to know.
    pub stamps: Option<Arc<WriteStamps>>,
}

/// Something to be done with the log between two batches.
pub type LogJob = Box<dyn FnOnce(&dyn LogStore) + Send>;

type OnFatal = Box<dyn Fn(String) + Send + Sync>;
type OnRefused = Box<dyn Fn(ReplicaId, Incarnation, String) + Send + Sync>;
type OnHeldBack = Box<dyn Fn(Vec<ReplicaId>) + Send + Sync>;

/// The log writer of a node. Stops when dropped.
pub struct LogWriter {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

struct Shared {
    log: Arc<dyn LogStore>,
    started: Instant,
    /// When the present batch or job was begun, in milliseconds since `started`, and one; 0: there is
    /// none.
    begun: AtomicU64,
    on_fatal: OnFatal,
    queue: Mutex<Queue>,
    /// There is something to do for the writer.
    wake: Condvar,
    /// The purger should end.
    end: Condvar,
    on_refused: Mutex<Option<OnRefused>>,
    on_held_back: Mutex<Option<OnHeldBack>>,
}

impl LogWriter {
    /// Starts the writer of `log`. `on_fatal` is called at most once, on one of its threads.
    pub fn start(log: Arc<dyn LogStore>, on_fatal: Box<dyn Fn(String) + Send + Sync>) -> LogWriter {
        LogWriter::start_with(log, on_fatal, Duration::from_millis(limits::LOG_PURGE_MS))
    }

    /// [`LogWriter::start`] with another time between purges.
    pub fn start_with(log: Arc<dyn LogStore>, on_fatal: OnFatal, purge_every: Duration) -> LogWriter {
        let shared = Arc::new(Shared {
            log,
            started: Instant::now(),
            begun: AtomicU64::new(0),
            on_fatal,
            queue: Mutex::default(),
            wake: Condvar::new(),
            end: Condvar::new(),
            on_refused: Mutex::default(),
            on_held_back: Mutex::default(),
        });
        let mut threads = Vec::new();
        let spawn = |name: &'static str, body: fn(&Shared, Duration) -> Result<(), StorageError>| {
            let shared = shared.clone();
            std::thread::Builder::new().name(name.into()).spawn(move || {
                let ended = catch_unwind(AssertUnwindSafe(|| body(&shared, purge_every)));
                match ended {
                    Ok(Ok(())) => {}
                    Ok(Err(e)) => shared.fail(e.to_string()),
                    Err(panic) => {
                        shared.fail(format!("the thread {name} panicked: {}", panic_text(panic.as_ref())))
                    }
                }
            })
        };
        for (name, body) in [
            ("log-writer", write_all as fn(&Shared, Duration) -> Result<(), StorageError>),
            ("log-purge", purge_all),
        ] {
            match spawn(name, body) {
                Ok(thread) => threads.push(thread),
                Err(e) => shared.fail(format!("starting the thread {name}: {e}")),
            }
        }
        LogWriter { shared, threads: Mutex::new(threads) }
    }

    /// Sets who is told of an incarnation whose write contradicts its log, and how: its replica must
    /// be ended; none of its writes from that one on is made. Called on the writer's thread: it must
    /// neither block nor panic. As long as nobody is set, such a write is fatal.
    pub fn on_refused(&self, tell: Box<dyn Fn(ReplicaId, Incarnation, String) + Send + Sync>) {
        let mut slot = self.shared.on_refused.lock();
        *slot.as_deref_mut().unwrap_or_else(|e| e.get_mut()) = Some(tell);
    }

    /// Sets who is told, after each purge that finds some, which replicas' old entries hold back the
    /// most space: their state should be flushed, then their log compacted. Called on the purging
    /// thread.
    pub fn on_held_back(&self, tell: Box<dyn Fn(Vec<ReplicaId>) + Send + Sync>) {
        let mut slot = self.shared.on_held_back.lock();
        *slot.as_deref_mut().unwrap_or_else(|e| e.get_mut()) = Some(tell);
    }

    /// Tells, whenever it is called, how many bytes are queued.
    pub fn queued_bytes(&self) -> Box<dyn Fn() -> usize + Send + Sync> {
        let bytes = self.shared.queue().bytes.clone();
        Box::new(move || bytes.load(Ordering::Relaxed))
    }

    /// For how long the batch or the job that is under way has been; zero if there is none.
    pub fn under_way(&self) -> Duration {
        match self.shared.begun.load(Ordering::Relaxed) {
            0 => Duration::ZERO,
            begun => self.shared.started.elapsed().saturating_sub(Duration::from_millis(begun - 1)),
        }
    }

    /// Queues writes. Never blocks for the disk. Tasks of a fenced incarnation are dropped, all of
    /// them after the writer has stopped or failed.
    pub fn submit(&self, tasks: Vec<WriteTask>) {
        let mut queue = self.shared.queue();
        if queue.phase != Phase::Running {
            return;
        }
        for task in tasks {
            queue.push(Item::Write(task));
        }
        self.shared.wake(queue);
    }

    /// Queues a job. It runs on the writer's thread after everything queued before it; all writes queued
    /// later wait for it, so it must be short. Dropped unrun after the writer has stopped or failed.
    pub fn run(&self, job: LogJob) {
        self.queue_job(None, job);
    }

    /// The same on behalf of one start of a replica: it runs after what was queued before it of that replica, and is
    /// dropped like its writes once that is fenced. What it
    /// holds must not come back here when it is dropped.
    pub fn run_for(&self, replica: ReplicaId, incarnation: Incarnation, job: LogJob) {
        self.queue_job(Some((replica, incarnation)), job);
    }

    fn queue_job(&self, owner: Option<(ReplicaId, Incarnation)>, job: LogJob) {
        let mut queue = self.shared.queue();
        if queue.phase != Phase::Running {
            return;
        }
        queue.push(Item::Job(owner, job));
        self.shared.wake(queue);
    }

    /// Drops the queued tasks and jobs of all incarnations of `replica` up to `incarnation`, also those that
    /// are submitted later. The receiver completes when none of them is on its way to the log any
    /// more: what the log holds of the replica then is final, until a later incarnation writes. It
    /// fails if the writer has failed. Not to be waited for within a job.
    pub fn fence(&self, replica: ReplicaId, incarnation: Incarnation) -> oneshot::Receiver<()> {
        let (done, receiver) = oneshot::channel();
        let mut queue = self.shared.queue();
        queue.fence(replica, incarnation);
        if queue.phase == Phase::Failed {
            // The sender is dropped.
        } else if queue.busy {
            queue.fences.push(done);
        } else {
            // Nobody may be waiting any more.
            let _ = done.send(());
        }
        receiver
    }

    /// Does everything queued so far, accepts nothing more, and ends the threads.
    pub fn stop(&self) {
        let mut queue = self.shared.queue();
        if queue.phase == Phase::Running {
            queue.phase = Phase::Stopping;
        }
        self.shared.end.notify_all();
        self.shared.wake(queue);
        let threads: Vec<_> = {
            let mut threads = self.threads.lock();
            let threads = threads.as_deref_mut().unwrap_or_else(|e| e.get_mut());
            std::mem::take(threads)
        };
        for thread in threads {
            // A job or a callback may hold the last reference; a thread can't wait for itself.
            if thread.thread().id() != std::thread::current().id() && thread.join().is_err() {
                tracing::error!("a thread of the log ended with a panic");
            }
        }
    }
}

impl Drop for LogWriter {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        // No panic happens while it is held that would leave it half changed.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes the writer if it sleeps: a wake-up costs a system call.
    fn wake(&self, mut queue: MutexGuard<'_, Queue>) {
        let asleep = std::mem::take(&mut queue.asleep);
        drop(queue);
        if asleep {
            self.wake.notify_one();
        }
    }

    /// A write of `replica` in a batch of `names` contradicts its log: fences the incarnation and
    /// says so, or fails if there is nobody to tell.
    fn refuse(
        &self,
        replica: ReplicaId,
        reason: String,
        names: &[(Name, Arc<dyn PersistSink>)],
    ) -> Result<(), StorageError> {
        let incarnation = names.iter().filter(|(name, _)| name.0 == replica);
        let incarnation = incarnation.map(|(name, _)| name.1).max();
        let tell = self.on_refused.lock();
        let tell = tell.unwrap_or_else(PoisonError::into_inner);
        let (Some(incarnation), Some(tell)) = (incarnation, &*tell) else {
            return Err(StorageError::Inconsistent { replica, reason });
        };
        self.queue().fence(replica, incarnation);
        tell(replica, incarnation, reason);
        Ok(())
    }

    /// Waits a little for space on the disk. False: the writer is to stop, or has failed.
    fn wait_for_space(&self) -> bool {
        let due = Instant::now() + Duration::from_millis(limits::DISK_FULL_WAIT_MS);
        let mut queue = self.queue();
        while queue.phase == Phase::Running {
            let left = due.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return true;
            }
            (queue, _) = self.end.wait_timeout(queue, left).unwrap_or_else(PoisonError::into_inner);
        }
        false
    }

    /// The writer can't finish what it was given before it stops. Nobody was told of any of it.
    fn leave_unwritten(&self) {
        let mut queue = self.queue();
        if queue.phase == Phase::Stopping {
            queue.phase = Phase::Stopped;
        }
        let items = std::mem::take(&mut queue.items);
        let fences = std::mem::take(&mut queue.fences);
        queue.bytes.store(0, Ordering::Relaxed);
        drop(queue);
        tracing::warn!("the node stops with its disk full: what waited for the raft log is not written");
        drop((items, fences));
    }

    /// Ends everything, and says so once.
    fn fail(&self, reason: String) {
        let mut queue = self.queue();
        if queue.phase == Phase::Failed {
            return;
        }
        queue.phase = Phase::Failed;
        // Dropped outside the lock: a job may hold anything.
        let items = std::mem::take(&mut queue.items);
        let fences = std::mem::take(&mut queue.fences);
        queue.bytes.store(0, Ordering::Relaxed);
        self.end.notify_all();
        self.wake(queue);
        drop((items, fences));
        (self.on_fatal)(reason);
    }
}

/// The writer's thread.
fn write_all(shared: &Shared, _: Duration) -> Result<(), StorageError> {
    loop {
        let work = {
            let mut queue = shared.queue();
            queue.busy = false;
            for fence in queue.fences.drain(..) {
                // Nobody may be waiting any more.
                let _ = fence.send(());
            }
            loop {
                if queue.phase == Phase::Failed {
                    return Ok(());
                }
                if let Some(work) = queue.take() {
                    break work;
                }
                if queue.phase == Phase::Stopping {
                    queue.phase = Phase::Stopped;
                    return Ok(());
                }
                queue.asleep = true;
                queue = shared.wake.wait(queue).unwrap_or_else(PoisonError::into_inner);
            }
        };
        let now = u64::try_from(shared.started.elapsed().as_millis()).unwrap_or(u64::MAX - 1);
        shared.begun.store(now + 1, Ordering::Relaxed);
        let done = match work {
            Work::Job(job) => {
                job(&*shared.log);
                true
            }
            Work::Batch(batch) => write_batch(shared, batch)?,
        };
        shared.begun.store(0, Ordering::Relaxed);
        if !done {
            shared.leave_unwritten();
            return Ok(());
        }
    }
}

/// What is told of a task, and to whom.
type Name = (ReplicaId, Incarnation, u64);

/// False: the writer must stop before there is space for the batch.
fn write_batch(shared: &Shared, batch: Vec<WriteTask>) -> Result<bool, StorageError> {
    let mut writes = Vec::with_capacity(batch.len());
    let mut names: Vec<(Name, Arc<dyn PersistSink>)> = Vec::with_capacity(batch.len());
    let mut traced = Vec::new();
    for task in batch {
        let name = (task.write.replica, task.incarnation, task.number);
        writes.push(task.write);
        names.push((name, task.done));
        traced.extend(task.stamps);
    }
    let begun = Instant::now();
    traced.iter().for_each(|stamps| stamps.begin(begun));
    let mut full = false;
    failpoint!(LogSyncBefore);
    loop {
        match shared.log.write(&writes) {
            Ok(()) => break,
            Err(e) if e.is_full() => {
                if !std::mem::replace(&mut full, true) {
                    tracing::error!("{e}: no write is acknowledged here until there is space");
                }
                if !shared.wait_for_space() {
                    return Ok(false);
                }
            }
            Err(StorageError::Inconsistent { replica, reason }) => {
                shared.refuse(replica, reason, &names)?;
                // Each round takes all writes of a replica out, so this ends.
                writes.retain(|write| write.replica != replica);
                names.retain(|(name, _)| name.0 != replica);
            }
            Err(e) => return Err(e),
        }
    }
    traced.iter().for_each(|stamps| stamps.synced(Instant::now()));
    failpoint!(LogSyncAfter);
    if full {
        tracing::info!("there is space again: the raft log is written");
    }
    hot().log_sync_seconds.record(begun.elapsed().as_secs_f64());
    hot().log_entries.increment(writes.iter().map(|w| w.entries.len() as u64).sum());
    hot().log_writes.increment(1);
    let bytes: usize = writes.iter().map(LogWrite::size).sum();
    hot().log_bytes.increment(bytes as u64);
    // There are as many sinks as arbiters: a few.
    let mut told: Vec<(Arc<dyn PersistSink>, Vec<Name>)> = Vec::new();
    for (name, done) in names {
        match told.iter_mut().find(|(sink, _)| Arc::ptr_eq(sink, &done)) {
            Some((_, names)) => names.push(name),
            None => told.push((done, vec![name])),
        }
    }
    for (sink, names) in told {
        sink.persisted(&names);
    }
    Ok(true)
}

/// The purging thread.
fn purge_all(shared: &Shared, every: Duration) -> Result<(), StorageError> {
    loop {
        let due = Instant::now() + every;
        let mut queue = shared.queue();
        loop {
            if queue.phase != Phase::Running {
                return Ok(());
            }
            let left = due.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            (queue, _) = shared.end.wait_timeout(queue, left).unwrap_or_else(PoisonError::into_inner);
        }
        drop(queue);
        failpoint!(LogPurge);
        match shared.log.purge() {
            Ok(named) if named.is_empty() => {}
            Ok(named) => {
                let tell = shared.on_held_back.lock();
                if let Some(tell) = &*tell.unwrap_or_else(PoisonError::into_inner) {
                    tell(named);
                }
            }
            // What can't be read can't be purged either, now or later.
            Err(e @ (StorageError::SyncFailed { .. } | StorageError::Damaged { .. })) => return Err(e),
            // The log is as it was, only larger than it should be; a full disk says so again when
            // something is written.
            Err(e) => tracing::warn!("purging the raft log, to be tried again: {e}"),
        }
    }
}

#[cfg(test)]
mod tests;
