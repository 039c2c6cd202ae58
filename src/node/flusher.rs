//! The flush thread: gathers frozen memtables of all replicas and makes them durable in one round,
//! one redo file and one sync for many; removes the state of dropped replicas in between, a batch at a time so
//! that no flush waits for all of a great one, and does there what must not fall into a flush.
//!
//! *A full disk.* Where there isn't room for all, the replicas with the smallest tables are flushed first, as many as there is room
//! for; the log that goes with each makes some for the next. A flush that finds no room at all is tried again now and then, with
//! what has come meanwhile: it has left nothing behind, and the log has all of it. The memtables stay in memory until then, so that
//! soon the node pauses applying. One that finds no room after its redo file was durable [goes on](Flusher::go_on) when there
//! is some. Until then nobody gets between two flushes, and what is removed, or fenced, is that of others.

use std::collections::{BTreeMap, VecDeque};
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

    /// Whether this replica is among them.
    fn concern(&self, replica: ReplicaId) -> bool {
        self.told.iter().any(|(replicas, _)| replicas.contains(&replica))
    }

    /// Whose turn it is: nobody of whose writes a flush that is half done has some.
    fn next(&self, flusher: &Flusher) -> Option<usize> {
        self.left.iter().position(|replica| !flusher.is_half_done_with(*replica))
    }

    /// Whether anything can be done for them at present.
    fn can_go_on(&self, flusher: &Flusher) -> bool {
        !self.are_done() && (self.left.is_empty() || self.next(flusher).is_some())
    }

    /// Removes some more.
    fn step(&mut self, flusher: &mut Flusher) -> Result<(), StorageError> {
        if let Some(at) = self.next(flusher)
            && flusher.destroy_step(self.left[at])?
        {
            self.left.remove(at);
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
        while self.concern(replica) {
            self.step(flusher)?;
        }
        Ok(())
    }
}

/// A disk that was found full by one kind of work.
#[derive(Default)]
struct Full {
    /// When it last was.
    at: Option<Instant>,
    told: bool,
}

impl Full {
    const WAIT: Duration = Duration::from_millis(limits::DISK_FULL_WAIT_MS);

    /// Whether the work is to be tried.
    fn is_due(&self) -> bool {
        self.at.is_none_or(|at| at.elapsed() >= Full::WAIT)
    }

    /// Whether it was found full when the work was last tried.
    fn waits(&self) -> bool {
        self.at.is_some()
    }

    fn found(&mut self, error: &StorageError, work: &str) {
        self.at = Some(Instant::now());
        if !std::mem::replace(&mut self.told, true) {
            tracing::error!(%error, "the disk is full: {work}, to be tried again");
        }
    }

    /// The work got on. `done`: nothing of it is left.
    fn passed(&mut self, done: bool, work: &str) {
        self.at = None;
        if done && std::mem::take(&mut self.told) {
            tracing::info!("there is space again: {work} is done");
        }
    }
}

fn run(mut flusher: Flusher, queue: mpsc::Receiver<Work>, fatal: Fatal) {
    let mut flushes = Flushes::default();
    let mut removals = Removals::default();
    let (mut no_flush, mut no_removal) = (Full::default(), Full::default());
    // Who waits until a flush that is half done is complete.
    let (mut jobs, mut barriers) = (Vec::new(), Vec::new());
    loop {
        let removes = removals.can_go_on(&flusher);
        let flushes_left = !flushes.are_done(&flusher);
        let next = if removes && !no_removal.waits() || flushes_left && !no_flush.waits() {
            queue.recv_timeout(Duration::ZERO)
        } else if removes || flushes_left {
            queue.recv_timeout(Full::WAIT)
        } else {
            queue.recv().map_err(|_| RecvTimeoutError::Disconnected)
        };
        let first = match next {
            Ok(work) => Some(work),
            Err(RecvTimeoutError::Timeout) => None,
            // The node stops; the log has what isn't flushed, a redo file what is half flushed, and tombstones tell what isn't
            // removed.
            Err(RecvTimeoutError::Disconnected) => return,
        };
        let _working = pulse::work();
        for work in first.into_iter().chain(queue.try_iter()) {
            match work {
                Work::Flush(job) => flushes.waiting.push(job),
                Work::Run(job) => jobs.push(job),
                Work::Destroy(replicas, done) => removals.begin(&mut flusher, replicas, done),
                Work::Barrier(replica, done) => barriers.push((replica, done)),
            }
        }
        // Not between any two steps of a removal: an attempt writes as much as there is space for.
        if no_flush.is_due() {
            match flushes.step(&mut flusher) {
                Ok(()) => no_flush.passed(flushes.are_done(&flusher), "flushing state"),
                Err(error) if flusher.may_retry(&error) => no_flush.found(&error, "flushing state"),
                Err(error) => {
                    fatal.raise(format!("flushing state to disk: {error}"));
                    return;
                }
            }
        }
        let bears = flusher.engine.bears_a_full_disk();
        if no_removal.is_due() && removals.can_go_on(&flusher) {
            // What was removed before waits in the engine's memory: to remove more would only add to that.
            let room = if no_removal.waits() { flusher.end_destroy() } else { Ok(()) };
            match room.and_then(|()| removals.step(&mut flusher)) {
                Ok(()) => no_removal.passed(removals.are_done(), "removing state"),
                Err(error) if error.is_full() && bears => no_removal.found(&error, "removing state"),
                Err(error) => {
                    fatal.raise(format!("removing state from disk: {error}"));
                    return;
                }
            }
        }
        if !flusher.is_half_done() {
            for job in jobs.drain(..) {
                job(&mut flusher);
            }
        }
        for (replica, done) in std::mem::take(&mut barriers) {
            let removed = removals.concern(replica);
            if flusher.is_half_done_with(replica) || removed && (flusher.is_half_done() || no_removal.waits())
            {
                barriers.push((replica, done));
                continue;
            }
            match removals.finish(&mut flusher, replica) {
                Ok(()) => {}
                Err(error) if error.is_full() && bears => {
                    no_removal.found(&error, "removing state");
                    barriers.push((replica, done));
                    continue;
                }
                Err(error) => {
                    fatal.raise(format!("removing state from disk: {error}"));
                    return;
                }
            }
            // Frozen by an incarnation that has ended; nothing of it is on disk.
            flushes.waiting.retain(|job| job.frozen.replica != replica);
            if flushes.are_done(&flusher) {
                no_flush = Full::default();
            }
            if done.send(()).is_err() {
                tracing::trace!("nobody waits any more: the node is stopping");
            }
        }
    }
}

/// Whom the progress of a flush concerns.
struct Concerned {
    sink: Arc<dyn FlushSink>,
    part: (ReplicaId, u32),
    progress: (ReplicaId, Incarnation, Position),
}

/// What is to be flushed.
#[derive(Default)]
struct Flushes {
    /// What no redo file has.
    waiting: Vec<FlushJob>,
    /// Who hasn't heard yet that the engine has what is in the file of the flush under way.
    concerned: Vec<Concerned>,
}

impl Flushes {
    /// Whether nothing is left to do. When all have heard of a flush its file may still be there: the engine had no room for what
    /// others have written beside it.
    fn are_done(&self, flusher: &Flusher) -> bool {
        self.waiting.is_empty() && !flusher.is_half_done()
    }

    /// Ends the flush that is half done; or begins the next, of all of them, or as many as there is room for. Those are taken out
    /// when a crash can't undo that any more: nobody tries them again then, and
    /// their memory is to be free as soon as their replicas let go of it.
    fn step(&mut self, flusher: &mut Flusher) -> Result<(), StorageError> {
        let Flushes { waiting, concerned } = self;
        if flusher.is_half_done() {
            return flusher.go_on(&mut |so_far| tell(concerned, so_far));
        }
        if waiting.is_empty() {
            return Ok(());
        }
        let begun = Instant::now();
        let count = fitting(waiting, flusher.room());
        let tables = waiting[..count].iter().map(|job| job.frozen.clone()).collect();
        flusher.flush_parts(tables, &mut |so_far| {
            if so_far == Progress::Logged {
                concerned.extend(waiting.drain(..count).map(|FlushJob { incarnation, frozen, done }| {
                    let progress = (frozen.replica, incarnation, frozen.header.applied);
                    Concerned { sink: done, part: (frozen.replica, frozen.generation), progress }
                }));
            }
            tell(concerned, so_far);
        })?;
        metrics::histogram!(names::FLUSH_SECONDS).record(begun.elapsed());
        Ok(())
    }
}

/// Tells those whom a flush concerns how far it has come. Who has heard of the last step is none of them any more.
fn tell(concerned: &mut Vec<Concerned>, so_far: Progress<'_>) {
    let mut told: Vec<(Arc<dyn FlushSink>, Vec<_>)> = Vec::new();
    let mut hears = |Concerned { sink, progress, .. }: &Concerned| match told
        .iter_mut()
        .find(|(other, _)| Arc::ptr_eq(other, sink))
    {
        Some((_, batch)) => batch.push(*progress),
        None => told.push((sink.clone(), vec![*progress])),
    };
    let step = match so_far {
        Progress::Logged => {
            concerned.iter().for_each(hears);
            FlushStep::Logged
        }
        Progress::Absorbed(parts) => {
            concerned.extract_if(.., |one| parts.contains(&one.part)).for_each(|one| hears(&one));
            FlushStep::Absorbed
        }
    };
    for (sink, batch) in told {
        sink.flushed(step, batch);
    }
}

/// How many of these are to be flushed together, of which there are some: all if there is room for them. Else they are
/// put in order, the smallest replicas first, and it is as many as there is room for, one replica at least.
fn fitting(jobs: &mut [FlushJob], room: Option<u64>) -> usize {
    let bytes = |jobs: &[FlushJob]| jobs.iter().map(|job| job.frozen.bytes() as u64).sum::<u64>();
    let Some(room) = room.filter(|room| bytes(jobs) > *room) else { return jobs.len() };
    let mut sizes = BTreeMap::<ReplicaId, u64>::new();
    for job in &*jobs {
        *sizes.entry(job.frozen.replica).or_default() += job.frozen.bytes() as u64;
    }
    // The tables of one replica stay together, and in their order.
    let size = |job: &FlushJob| sizes.get(&job.frozen.replica).copied();
    jobs.sort_by_key(|job| (size(job), job.frozen.replica));
    let (mut count, mut taken) = (0, 0);
    for replica in jobs.chunk_by(|one, other| one.frozen.replica == other.frozen.replica) {
        taken += bytes(replica);
        if count > 0 && taken > room {
            break;
        }
        count += replica.len();
    }
    count
}

#[cfg(test)]
#[path = "flusher_tests.rs"]
mod tests;
