//! The snapshot thread: makes snapshot files from the state of replicas, loads received ones, takes
//! digests of states, and removes generations of state that nobody uses any more.
//!
//! It works in short steps and gives each kind of work its turn: a file that is loaded doesn't wait
//! until one is made, and what is only to be removed waits for all else. Of each kind there is one task at
//! a time, first come, first served.
//!
//! *Nobody waits behind it*, though it wants the same disk and the same cores as the writes of all shards:
//! what it writes in a second is bounded, as what is sent is, and after each step it rests for at least as
//! long as the step took. So where others work too, and a step takes longer, it does less. And where cores are
//! wanted by others, they have them first: the thread is nice ([`SNAPSHOT_NICE`]).
//!
//! *Which generations are safe to remove.* Those that are not the one of the replica's record, as the
//! caller tells, while nothing of that replica is being loaded: a load begins by removing them
//! itself, and calls off what was asked for before; the caller asks anew when the load has led to
//! something. Who reads an old generation has ended before: the replica that made it, its flushes,
//! and queries on the read thread.

use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;
use std::sync::mpsc::{self, RecvTimeoutError, TryRecvError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use tokio::sync::oneshot;

use crate::codec::snapshot::SnapshotOffer;
use crate::failpoints::failpoint;
use crate::ids::{Index, RandomId, ReplicaId, ShardId};
use crate::limits::{SNAPSHOT_DISK_FACTOR, SNAPSHOT_NICE, SNAPSHOT_STEP_BYTES, SWEEP_STEP_KEYS};
use crate::nice::be_nice;
use crate::node::fatal::Fatal;
use crate::node::flusher::FlushThread;
use crate::storage::digest::{Digester, StateDigest};
use crate::storage::engine::Engine;
use crate::storage::flush::Flusher;
use crate::storage::snapshot::{BuildStep, SnapshotBuilder, SnapshotCheck, SnapshotFile, SnapshotLoader};
use crate::storage::snapshot_dir::SnapshotDir;
use crate::storage::snapshot_file::{Origin, Summary};
use crate::storage::{StorageError, generations};
use crate::transport::snapshot::throttle::Throttle;

/// A snapshot to make. Dropping the receiver of its result calls it off.
pub struct Build {
    /// The shard.
    pub shard: ShardId,
    /// The replica whose state it is.
    pub replica: ReplicaId,
    /// The generation of that state.
    pub generation: u32,
    /// It has to be exact at this index or a later one.
    pub least: Index,
    /// Where the file goes.
    pub done: oneshot::Sender<Result<SnapshotFile, BuildError>>,
}

/// Why there is no snapshot.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The replica's state was never flushed, or not that far: on disk there is nothing to make it from.
    #[error("the state is not flushed as far as the snapshot has to reach")]
    NotFlushed,
    /// The disk, or something that only happens beside it.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The flush thread has ended.
    #[error("the node is stopping")]
    Stopping,
}

/// A received snapshot to check, and to load into the generation that follows on the replica's own.
pub struct Load {
    /// The file.
    pub path: PathBuf,
    /// What it should be.
    pub offer: SnapshotOffer,
    /// The generation of the replica's record.
    pub current: u32,
    /// What its end says, once all of it is loaded and durable.
    pub done: oneshot::Sender<Result<Summary, LoadError>>,
}

/// Why a snapshot is not loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file is damaged, or not what was offered.
    #[error("{0}")]
    Unusable(String),
    /// This node's disk.
    #[error(transparent)]
    Local(StorageError),
}

/// A digest to be taken. Dropping the receiver of its result calls it off.
pub struct TakeDigest {
    /// The replica whose state it is.
    pub replica: ReplicaId,
    /// The generation of that state.
    pub generation: u32,
    /// The index of the state that is meant.
    pub index: Index,
    /// Dropped with the task: whoever holds a state still for it can tell by that.
    pub reading: Arc<()>,
    /// Where the digest goes; [`DigestError::GoneOn`] if it can't be had any more.
    pub done: oneshot::Sender<Result<StateDigest, DigestError>>,
}

/// Why there is no digest.
#[derive(Debug, thiserror::Error)]
pub enum DigestError {
    /// The state on disk is another by now, or not yet that one.
    #[error("the state on disk isn't, or isn't any more, that of the index that is asked for")]
    GoneOn,
    /// The disk.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The flush thread has ended.
    #[error("the node is stopping")]
    Stopping,
}

enum Task {
    Build(Build),
    Digest(TakeDigest),
    Load(Load),
    Sweep(ReplicaId, u32),
}

/// What the thread works with.
pub struct Tools {
    /// Where files are made.
    pub dir: SnapshotDir,
    /// The state of all replicas.
    pub engine: Arc<dyn Engine>,
    /// What flushes it.
    pub flusher: Arc<FlushThread>,
    /// Raised if the state can't be synced.
    pub fatal: Fatal,
    /// Bytes per second that the node may send in snapshots; it may make and load [`SNAPSHOT_DISK_FACTOR`] times as many.
    pub bytes_per_second: u64,
}

/// See the module page. Bounded by its callers: one load for each transfer, one build for each replica
/// that leads, one sweep for each replica, one digest for each that an operator waits for.
pub struct Worker {
    tasks: Mutex<Option<mpsc::Sender<Task>>>,
    throttle: Arc<Throttle>,
}

impl Worker {
    /// Starts the thread.
    ///
    /// # Errors
    /// The system has no thread to give.
    pub fn start(tools: Tools) -> io::Result<(Worker, JoinHandle<()>)> {
        let (tasks, queue) = mpsc::channel();
        let fatal = tools.fatal.clone();
        let throttle = Arc::new(Throttle::new(on_disk(tools.bytes_per_second)));
        let shared = throttle.clone();
        let thread = fatal.thread("pontoon-snapshot", "the snapshot thread", move || {
            be_nice("snapshot", SNAPSHOT_NICE);
            let (builds, loads, digests, sweeps) = Default::default();
            Work { tools, throttle: shared, builds, loads, digests, sweeps }.run(queue);
        })?;
        Ok((Worker { tasks: Mutex::new(Some(tasks)), throttle }, thread))
    }

    /// From now on the cluster allows each node to send so many bytes a second; 0: any number. The node's own
    /// limit holds beside it.
    pub fn limit(&self, bytes_per_second: u64) {
        self.throttle.limit(on_disk(bytes_per_second));
    }

    /// Has a snapshot made.
    pub fn build(&self, build: Build) {
        self.send(Task::Build(build));
    }

    /// Has a digest taken.
    pub fn digest(&self, digest: TakeDigest) {
        self.send(Task::Digest(digest));
    }

    /// Has a snapshot loaded. Nothing reads the replica's older generations any more.
    pub fn load(&self, load: Load) {
        self.send(Task::Load(load));
    }

    /// Has all generations of a replica's state removed but `current`, some time.
    pub fn sweep(&self, replica: ReplicaId, current: u32) {
        self.send(Task::Sweep(replica, current));
    }

    /// Ends the thread after its present step; what is unfinished comes to nothing.
    pub fn close(&self) {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    fn send(&self, task: Task) {
        let tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        if tasks.as_ref().is_none_or(|tasks| tasks.send(task).is_err()) {
            tracing::debug!("the snapshot thread has ended");
        }
    }
}

/// What may be made or loaded in a second where so much may be sent.
fn on_disk(bytes_per_second: u64) -> u64 {
    bytes_per_second.saturating_mul(SNAPSHOT_DISK_FACTOR)
}

struct Work {
    tools: Tools,
    throttle: Arc<Throttle>,
    builds: VecDeque<(Build, Option<SnapshotBuilder>)>,
    loads: VecDeque<(Load, Stage)>,
    digests: VecDeque<(TakeDigest, Option<Box<Digester>>)>,
    sweeps: VecDeque<Sweep>,
}

/// How far a build has come.
enum Progress {
    Begun(SnapshotBuilder),
    Complete(SnapshotFile),
}

/// Where a load stands.
enum Stage {
    /// To remove what is left of earlier ones.
    Clearing(Option<Sweep>),
    Checking(Box<SnapshotCheck>),
    Loading(Box<(SnapshotLoader, Summary)>),
}

struct Sweep {
    replica: ReplicaId,
    current: u32,
    /// Generations yet to be removed; `None`: not looked for yet.
    strays: Option<Vec<u32>>,
    /// Where the removal of the last of them goes on.
    from: Vec<u8>,
}

impl Sweep {
    /// Removes some; true if nothing is left.
    fn step(&mut self, engine: &dyn Engine) -> Result<bool, StorageError> {
        let strays = match &mut self.strays {
            Some(strays) => strays,
            None => self.strays.insert(generations::strays(engine, self.replica, self.current)?),
        };
        let Some(generation) = strays.last() else {
            return Ok(true);
        };
        if generations::destroy(engine, self.replica, *generation, &mut self.from, SWEEP_STEP_KEYS)? {
            self.from.clear();
            tracing::info!(replica = %self.replica, generation, "removed an old generation of a replica's state");
            strays.pop();
        }
        Ok(strays.is_empty())
    }
}

impl From<BuildError> for DigestError {
    fn from(error: BuildError) -> DigestError {
        match error {
            BuildError::NotFlushed => DigestError::GoneOn,
            BuildError::Storage(error) => DigestError::Storage(error),
            BuildError::Stopping => DigestError::Stopping,
        }
    }
}

impl Work {
    /// Until nobody can ask for anything any more.
    fn run(mut self, queue: mpsc::Receiver<Task>) {
        loop {
            let asked = self.builds.len() + self.loads.len() + self.digests.len();
            if asked == 0 && self.sweeps.is_empty() {
                match queue.recv() {
                    Ok(task) => self.take(task),
                    Err(mpsc::RecvError) => return,
                }
            }
            loop {
                match queue.try_recv() {
                    Ok(task) => self.take(task),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return,
                }
            }
            let begun = Instant::now();
            let bytes = self.step_load() + self.step_build();
            self.step_digest();
            if self.builds.is_empty() && self.loads.is_empty() && self.digests.is_empty() {
                self.step_sweep();
            }
            let now = Instant::now();
            let rest = self.throttle.take(bytes, now).max(now - begun);
            if !self.rest(&queue, now + rest) {
                return;
            }
        }
    }

    /// Does nothing until then but hear what else is asked for; false if nobody can ask any more.
    fn rest(&mut self, queue: &mpsc::Receiver<Task>, until: Instant) -> bool {
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return true;
            }
            match queue.recv_timeout(left) {
                Ok(task) => self.take(task),
                Err(RecvTimeoutError::Timeout) => return true,
                Err(RecvTimeoutError::Disconnected) => return false,
            }
        }
    }

    fn take(&mut self, task: Task) {
        match task {
            Task::Build(build) => self.builds.push_back((build, None)),
            Task::Digest(digest) => self.digests.push_back((digest, None)),
            Task::Load(load) => {
                self.sweeps.retain(|sweep| sweep.replica != load.offer.to);
                self.loads.push_back((load, Stage::Clearing(None)));
            }
            Task::Sweep(replica, current) => {
                // A snapshot of what goes would not be exact.
                self.builds.retain(|(build, _)| build.replica != replica || build.generation == current);
                self.sweeps.retain(|sweep| sweep.replica != replica);
                self.sweeps.push_back(Sweep { replica, current, strays: None, from: Vec::new() });
            }
        }
    }

    /// Returns how many bytes it has written.
    fn step_build(&mut self) -> usize {
        let Some((build, builder)) = self.builds.front_mut() else {
            return 0;
        };
        if build.done.is_closed() {
            tracing::debug!(replica = %build.replica, "nobody waits for a snapshot any more");
            self.builds.pop_front();
            return 0;
        }
        let before = builder.as_ref().map_or(0, SnapshotBuilder::bytes);
        let result = match builder.take() {
            None => begin_build(&self.tools, build).map(Progress::Begun),
            Some(builder) => go_on_building(&self.tools, builder),
        };
        let written = |now: u64| usize::try_from(now.saturating_sub(before)).unwrap_or(usize::MAX);
        let (outcome, bytes) = match result {
            Ok(Progress::Begun(begun)) => {
                let bytes = written(begun.bytes());
                *builder = Some(begun);
                return bytes;
            }
            Ok(Progress::Complete(file)) => {
                let bytes = written(file.bytes);
                (Ok(file), bytes)
            }
            Err(error) => (Err(error), 0),
        };
        if let Some((build, _)) = self.builds.pop_front()
            && let Err(Ok(file)) = build.done.send(outcome)
            && let Err(error) = self.tools.dir.remove(&file)
        {
            tracing::warn!(%error, "a snapshot that nobody waits for stays");
        }
        bytes
    }

    fn step_digest(&mut self) {
        let Some((digest, digester)) = self.digests.front_mut() else {
            return;
        };
        if digest.done.is_closed() {
            tracing::debug!(replica = %digest.replica, "nobody waits for a digest any more");
            self.digests.pop_front();
            return;
        }
        let outcome = match step_digest(&self.tools, digest, digester) {
            Ok(None) => return,
            Ok(Some(taken)) => Ok(taken),
            Err(error) => Err(error),
        };
        if let Some((TakeDigest { replica, reading, done, .. }, _)) = self.digests.pop_front() {
            // Before it is told: who hears of it may put another mark at once.
            drop(reading);
            if done.send(outcome).is_err() {
                tracing::debug!(%replica, "nobody waits for a digest that was taken");
            }
        }
    }

    /// Returns how many bytes it has written, about.
    fn step_load(&mut self) -> usize {
        let Some((load, stage)) = self.loads.front_mut() else {
            return 0;
        };
        // To check costs no writing, and is quick.
        let bytes = if matches!(stage, Stage::Loading(_)) { SNAPSHOT_STEP_BYTES } else { 0 };
        let outcome = match step_load(&self.tools, load, stage) {
            Ok(None) => return bytes,
            Ok(Some(summary)) => Ok(summary),
            Err(error) => {
                if let LoadError::Local(error @ StorageError::SyncFailed { .. }) = &error {
                    self.tools.fatal.raise(format!("loading a snapshot: {error}"));
                }
                Err(error)
            }
        };
        if let Some((load, _)) = self.loads.pop_front()
            && load.done.send(outcome).is_err()
        {
            tracing::debug!(replica = %load.offer.to, "nobody waits for a loaded snapshot");
        }
        bytes
    }

    fn step_sweep(&mut self) {
        let Some(sweep) = self.sweeps.front_mut() else {
            return;
        };
        match sweep.step(&*self.tools.engine) {
            Ok(false) => return,
            Ok(true) => {}
            Err(error) => {
                tracing::warn!(replica = %sweep.replica, %error, "an old generation of a replica's state stays");
            }
        }
        self.sweeps.pop_front();
    }
}

fn begin_build(tools: &Tools, build: &Build) -> Result<SnapshotBuilder, BuildError> {
    failpoint!(SnapshotMake, build.replica);
    let (replica, generation) = (build.replica, build.generation);
    let dir = tools.dir.link_dir().to_owned();
    let collection =
        between_flushes(tools, move |flusher| flusher.begin_collection(replica, generation, &dir))?
            .filter(|collection| collection.base.applied.index >= build.least)
            .ok_or(BuildError::NotFlushed)?;
    let origin = Origin { stream: RandomId::random(), shard: build.shard, replica };
    let path = tools.dir.made_path(replica, origin.stream);
    let room = tools.dir.room()?;
    Ok(SnapshotBuilder::create(path, room, origin, tools.engine.clone(), collection)?)
}

fn go_on_building(tools: &Tools, mut builder: SnapshotBuilder) -> Result<Progress, BuildError> {
    failpoint!(SnapshotStep);
    match builder.step(SNAPSHOT_STEP_BYTES)? {
        BuildStep::More => Ok(Progress::Begun(builder)),
        BuildStep::Scanned => {
            let (mut builder, collected) = between_flushes(tools, move |flusher| {
                let collected = flusher.end_collection(builder.collection())?;
                Ok((builder, collected))
            })?;
            builder.lay_over(collected)?;
            Ok(Progress::Begun(builder))
        }
        BuildStep::Complete(file) => Ok(Progress::Complete(file)),
    }
}

/// A digest counts only if the state on disk is that of the index that is meant, both when it is begun and
/// when it is ended.
fn step_digest(
    tools: &Tools,
    digest: &TakeDigest,
    digester: &mut Option<Box<Digester>>,
) -> Result<Option<StateDigest>, DigestError> {
    let (replica, generation) = (digest.replica, digest.generation);
    let Some(running) = digester else {
        let header = between_flushes(tools, move |flusher| flusher.header(replica, generation))?
            .filter(|header| header.applied.index == digest.index)
            .ok_or(DigestError::GoneOn)?;
        *digester = Some(Box::new(Digester::new(tools.engine.clone(), replica, generation, header)));
        return Ok(None);
    };
    if !running.step(SNAPSHOT_STEP_BYTES)? {
        return Ok(None);
    }
    let header = between_flushes(tools, move |flusher| flusher.header(replica, generation))?;
    let taken = digester.take().and_then(|digester| digester.finish(header.as_ref()));
    taken.map(Some).ok_or(DigestError::GoneOn)
}

/// Has the flush thread do something that must fall between two flushes, and waits for it.
fn between_flushes<T: Send + 'static>(
    tools: &Tools,
    work: impl FnOnce(&mut Flusher) -> Result<T, StorageError> + Send + 'static,
) -> Result<T, BuildError> {
    let (done, result) = oneshot::channel();
    tools.flusher.run(Box::new(move |flusher| {
        if done.send(work(flusher)).is_err() {
            tracing::debug!("the snapshot thread has ended");
        }
    }));
    Ok(result.blocking_recv().map_err(|_| BuildError::Stopping)??)
}

fn step_load(tools: &Tools, load: &Load, stage: &mut Stage) -> Result<Option<Summary>, LoadError> {
    match stage {
        Stage::Clearing(sweep) => {
            let begin =
                || Sweep { replica: load.offer.to, current: load.current, strays: None, from: Vec::new() };
            if sweep.get_or_insert_with(begin).step(&*tools.engine).map_err(LoadError::Local)? {
                let check = SnapshotCheck::open(&load.path).map_err(load_error)?;
                *stage = Stage::Checking(Box::new(check));
            }
        }
        Stage::Checking(check) => {
            if let Some(file) = check.step(SNAPSHOT_STEP_BYTES as u64).map_err(load_error)? {
                fits(&load.offer, &file)?;
                let generation = load.current.checked_add(1);
                let generation =
                    generation.ok_or_else(|| LoadError::Unusable("there are no generations left".into()))?;
                let summary = file.summary.clone();
                let loader = SnapshotLoader::open(file, tools.engine.clone(), load.offer.to, generation);
                *stage = Stage::Loading(Box::new((loader.map_err(load_error)?, summary)));
            }
        }
        Stage::Loading(loading) => {
            failpoint!(SnapshotLoad, load.offer.to);
            let (loader, summary) = &mut **loading;
            if loader.step(SNAPSHOT_STEP_BYTES as u64).map_err(load_error)? {
                failpoint!(SnapshotLoaded, load.offer.to);
                return Ok(Some(summary.clone()));
            }
        }
    }
    Ok(None)
}

/// Whether a file is what was offered.
fn fits(offer: &SnapshotOffer, file: &SnapshotFile) -> Result<(), LoadError> {
    let found = (file.origin.stream, file.origin.shard, file.summary.header.applied, file.bytes);
    let offered = (offer.stream, offer.shard, offer.position, offer.bytes);
    if found == offered {
        return Ok(());
    }
    Err(LoadError::Unusable(format!(
        "offered as {offered:?}, it is {found:?} (stream, shard, position, bytes)"
    )))
}

fn load_error(error: StorageError) -> LoadError {
    match error {
        StorageError::Damaged { .. } => LoadError::Unusable(error.to_string()),
        other => LoadError::Local(other),
    }
}

#[cfg(test)]
mod tests;
