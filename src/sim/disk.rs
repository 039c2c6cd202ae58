//! What one simulated node keeps on disk, and what a crash leaves of it.
//!
//! The log and the engine are the in-memory stores of [`crate::storage`]; this is the time that
//! passes between asking for a write and having it, which is where a crash can come. One log write is
//! under way at a time, for all replicas of the node, and one flush.
//!
//! ```text
//! flush:  freeze ─► (redo file durable) "logged" ─► engine.write … engine.write ─► engine.sync ─► "absorbed"
//! ```

use std::collections::{BTreeSet, VecDeque};
use std::ops::Bound;
use std::sync::Arc;

use super::dice::Dice;
use super::media::{Faulty, ReadEngine, ReadLog};
use super::planted::{Plant, Planted};
use crate::ids::{Incarnation, Index, Position, ReplicaId, Term};
use crate::storage::engine::{Engine, Mutation};
use crate::storage::engine_memory::{CrashLoss, MemoryEngine};
use crate::storage::flush::FlushStep;
use crate::storage::log::{Install, LogState, LogStore, LogWrite, ReplicaRecord};
use crate::storage::log_memory::MemoryLog;
use crate::storage::opened::OpenedState;
use crate::storage::state::Frozen;
use crate::storage::{StorageError, keys};

/// What of a torn write is there or not there as a whole. Small, since the writes of a simulation are.
const SECTOR_BYTES: usize = 64;

/// A log write that is acknowledged with this.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct WriteName {
    /// Whose.
    pub replica: ReplicaId,
    /// Which start of it.
    pub incarnation: Incarnation,
    /// Its number there.
    pub number: u64,
}

enum LogWork {
    Write(WriteName, LogWrite),
    Compact(ReplicaId, Position),
}

struct FlushJob {
    incarnation: Incarnation,
    frozen: Arc<Frozen>,
}

/// Where the flush under way stands.
enum Stage {
    /// The redo file is being written.
    Logging,
    /// The engine gets the rest of these.
    Writing(VecDeque<Mutation>),
}

/// How far a flush came.
#[derive(Clone, Copy, Debug)]
pub struct FlushProgress {
    /// Whose.
    pub replica: ReplicaId,
    /// Which start of it.
    pub incarnation: Incarnation,
    /// The stage that was reached.
    pub step: FlushStep,
    /// Applied position of what is flushed.
    pub position: Position,
}

/// See the module page.
pub struct Disk {
    /// The raft log.
    pub log: Arc<MemoryLog>,
    /// The engine under the states.
    pub engine: Arc<MemoryEngine>,
    /// What is wrong with it.
    pub faulty: Arc<Faulty>,
    planted: Plant,
    /// With a disk that acknowledges early, what is really on it.
    honest: MemoryLog,
    /// Durable redo files, oldest first.
    redo: VecDeque<Arc<Frozen>>,
    queued: VecDeque<LogWork>,
    writing: VecDeque<LogWork>,
    flushes: VecDeque<FlushJob>,
    flushing: Option<(FlushJob, Stage)>,
    /// An older copy of the engine, made while there were no redo files.
    copy: Option<Vec<Mutation>>,
    /// Replicas whose state a fault has taken, and that have no other yet.
    robbed: BTreeSet<ReplicaId>,
}

impl Disk {
    /// An empty disk.
    pub fn new(planted: Plant) -> Disk {
        Disk {
            log: Arc::new(MemoryLog::new()),
            engine: Arc::new(MemoryEngine::new()),
            faulty: Arc::new(Faulty::new(planted.is(Planted::ErrorReadAsAbsent))),
            planted,
            honest: MemoryLog::new(),
            redo: VecDeque::new(),
            queued: VecDeque::new(),
            writing: VecDeque::new(),
            flushes: VecDeque::new(),
            flushing: None,
            copy: None,
            robbed: BTreeSet::new(),
        }
    }

    /// The log as groups read it.
    pub fn read_log(&self) -> Arc<ReadLog> {
        Arc::new(ReadLog { log: self.log.clone(), faulty: self.faulty.clone() })
    }

    /// The engine as groups read it.
    pub fn read_engine(&self) -> Arc<ReadEngine> {
        Arc::new(ReadEngine { engine: self.engine.clone(), faulty: self.faulty.clone() })
    }

    /// Queues a log write. True: it is acknowledged at once, which is a planted bug.
    pub fn write(&mut self, name: WriteName, write: LogWrite) -> Result<bool, StorageError> {
        let early = self.planted.is(Planted::AcknowledgeEarly);
        if early {
            self.log.write(std::slice::from_ref(&write))?;
        }
        self.queued.push_back(LogWork::Write(name, write));
        Ok(early)
    }

    /// Queues a compaction behind all writes so far.
    pub fn compact(&mut self, replica: ReplicaId, to: Position) {
        self.queued.push_back(LogWork::Compact(replica, to));
    }

    /// Begins to write all that is queued, unless a write is under way or nothing is queued.
    pub fn begin_write(&mut self) -> bool {
        if !self.writing.is_empty() || self.queued.is_empty() {
            return false;
        }
        std::mem::swap(&mut self.writing, &mut self.queued);
        true
    }

    /// The write under way is durable. Returns whose they were.
    pub fn finish_write(&mut self) -> Result<Vec<WriteName>, StorageError> {
        let mut names = Vec::new();
        for work in std::mem::take(&mut self.writing) {
            if let LogWork::Write(name, _) = &work {
                names.push(*name);
            }
            self.store(work)?;
        }
        Ok(names)
    }

    /// Adds replicas with empty logs.
    pub fn create(&mut self, records: &[ReplicaRecord]) -> Result<(), StorageError> {
        self.honest.create(records)?;
        self.log.create(records)
    }

    /// Makes a replica a tombstone, and drops its log. No write of it may be queued.
    pub fn remove(&mut self, replica: ReplicaId) -> Result<(), StorageError> {
        self.honest.remove(&[replica])?;
        self.robbed.remove(&replica);
        self.log.remove(&[replica])
    }

    /// Removes what the engine has of a replica.
    pub fn destroy(&mut self, replica: ReplicaId) -> Result<(), StorageError> {
        // No state has this generation.
        self.sweep(replica, 0)
    }

    /// Whether an entry is really on the disk, or was and is compacted.
    pub fn has_entry(&self, replica: ReplicaId, index: Index, term: Term) -> bool {
        let early = self.planted.is(Planted::AcknowledgeEarly);
        let log: &dyn LogStore = if early { &self.honest } else { &*self.log };
        match log.entries(replica, index, index + 1, usize::MAX) {
            Ok(entries) => entries.first().is_some_and(|entry| (entry.index, entry.term) == (index, term)),
            Err(error) => matches!(error, StorageError::Compacted(_)),
        }
    }

    fn store(&self, work: LogWork) -> Result<(), StorageError> {
        if self.planted.is(Planted::AcknowledgeEarly) {
            if let LogWork::Compact(replica, to) = work {
                self.log.compact(replica, to)?;
            }
            return store(&self.honest, work);
        }
        match work {
            LogWork::Write(name, mut write) => {
                if self.planted.is(Planted::VoteNotPersisted)
                    && let Some(hard_state) = &mut write.hard_state
                {
                    hard_state.vote = 0;
                }
                if self.planted.is(Planted::ChangeUnrecorded)
                    && let Some(hard_state) = &mut write.hard_state
                {
                    hard_state.commit = self.log.load(write.replica)?.hard_state.commit;
                    write.membership = None;
                }
                store(&self.log, LogWork::Write(name, write))
            }
            work @ LogWork::Compact(..) => store(&self.log, work),
        }
    }

    /// Queues a flush.
    pub fn flush(&mut self, incarnation: Incarnation, frozen: Arc<Frozen>) {
        self.flushes.push_back(FlushJob { incarnation, frozen });
    }

    /// Begins the next flush, unless one is under way or none is queued.
    pub fn begin_flush(&mut self) -> bool {
        if self.flushing.is_some() {
            return false;
        }
        self.flushing = self.flushes.pop_front().map(|job| (job, Stage::Logging));
        self.flushing.is_some()
    }

    /// The step of the flush under way is done. Returns what its replica is to be told, and whether
    /// the flush goes on.
    pub fn step_flush(&mut self, dice: &mut Dice) -> Result<(Option<FlushProgress>, bool), StorageError> {
        let Some((job, stage)) = self.flushing.take() else {
            return Ok((None, false));
        };
        let progress = |step| FlushProgress {
            replica: job.frozen.replica,
            incarnation: job.incarnation,
            step,
            position: job.frozen.header.applied,
        };
        match stage {
            Stage::Logging => {
                let told = progress(FlushStep::Logged);
                if !self.planted.is(Planted::NoRedoFile) {
                    self.redo.push_back(job.frozen.clone());
                }
                let mutations = self.mutations(&job.frozen).into();
                self.flushing = Some((job, Stage::Writing(mutations)));
                Ok((Some(told), true))
            }
            Stage::Writing(mut rest) if !rest.is_empty() => {
                let count = 1 + dice.below(rest.len().min(4));
                let batch: Vec<Mutation> = rest.drain(..count).collect();
                self.engine.write(&batch)?;
                self.flushing = Some((job, Stage::Writing(rest)));
                Ok((None, true))
            }
            Stage::Writing(_) => {
                if !self.planted.is(Planted::RedoRemovedEarly) {
                    self.engine.sync()?;
                }
                let told = progress(FlushStep::Absorbed);
                self.redo.retain(|frozen| !Arc::ptr_eq(frozen, &job.frozen));
                Ok((Some(told), false))
            }
        }
    }

    /// A frozen table as the engine stores it, sorted by key.
    fn mutations(&self, frozen: &Frozen) -> Vec<Mutation> {
        let mut mutations = frozen.mutations();
        if self.planted.is(Planted::SessionsForgotten) {
            let session = |key: &[u8]| key.get(keys::PREFIX_BYTES - 1) == Some(&keys::KIND_SESSION);
            mutations.retain(|(key, _)| !session(key));
        }
        mutations
    }

    /// Whether work of a replica is under way or queued.
    pub fn is_busy_with(&self, replica: ReplicaId) -> bool {
        let log = self.queued.iter().chain(&self.writing).any(|work| match work {
            LogWork::Write(name, _) => name.replica == replica,
            LogWork::Compact(of, _) => *of == replica,
        });
        log || self.is_flushing(replica)
    }

    /// Whether a flush of a replica is under way or queued.
    pub fn is_flushing(&self, replica: ReplicaId) -> bool {
        let jobs = self.flushes.iter().chain(self.flushing.iter().map(|(job, _)| job));
        jobs.into_iter().any(|job| job.frozen.replica == replica)
    }

    /// A replica goes on from a snapshot.
    pub fn install(&mut self, replica: ReplicaId, install: &Install) -> Result<(), StorageError> {
        if self.planted.is(Planted::AcknowledgeEarly) {
            self.honest.install(replica, install)?;
        }
        if self.planted.is(Planted::SuffixDropped) && install.state_lost {
            self.drop_suffix(replica, install.position)?;
        }
        self.log.install(replica, install)?;
        self.faulty.replace_state(replica);
        self.robbed.remove(&replica);
        Ok(())
    }

    /// Drops the entries behind `position`, if that is in the log.
    fn drop_suffix(&self, replica: ReplicaId, position: Position) -> Result<(), StorageError> {
        let Position { index, term } = position;
        let LogState { mut hard_state, truncated, .. } = self.log.load(replica)?;
        if index <= truncated.index {
            return Ok(());
        }
        let entries = self.log.entries(replica, index, index + 1, usize::MAX)?;
        if entries.iter().any(|entry| entry.term == term) {
            hard_state.commit = hard_state.commit.min(index);
            self.log.write(&[LogWrite {
                replica,
                entries,
                hard_state: Some(hard_state),
                membership: None,
            }])?;
        }
        Ok(())
    }

    /// Whether lost states are taken for whole ones, which is a planted bug.
    pub fn serves_lost_states(&self) -> bool {
        self.planted.is(Planted::LostStateServed)
    }

    /// Whether a fault is the reason if a replica starts without its state.
    pub fn may_lack_state(&self, replica: ReplicaId) -> bool {
        self.robbed.contains(&replica) || self.faulty.is_rotten(replica)
    }

    /// A replica has started with its state.
    pub fn has_state(&mut self, replica: ReplicaId) {
        self.robbed.remove(&replica);
    }

    /// Whether a replica would have to start without its state.
    pub fn lacks_state(&self, record: &ReplicaRecord) -> bool {
        let Ok(log) = self.log.load(record.replica) else { return true };
        let redone = self.redo.iter().any(|frozen| {
            (frozen.replica, frozen.generation) == (record.replica, record.generation)
                && frozen.header.applied.index >= log.truncated.index
        });
        let engine: Arc<dyn Engine> = self.engine.clone();
        !redone && !matches!(OpenedState::open(&engine, record, &log), Ok(OpenedState::Whole(_)))
    }

    /// Copies the engine, unless a flush is under way: the copy is a state of one moment.
    pub fn keep_copy(&mut self) -> Result<(), StorageError> {
        if self.flushing.is_some() || !self.redo.is_empty() {
            return Ok(());
        }
        let mut copy = Vec::new();
        self.engine.scan(Bound::Unbounded, &[], &mut |key, value| {
            copy.push((key.to_vec(), Some(value)));
            true
        })?;
        self.copy = Some(copy);
        Ok(())
    }

    /// The state store is gone while nothing runs, and in its place is the older copy of it, if there is one
    /// and it is to be `older`. Returns whether it is.
    pub fn lose_state(&mut self, older: bool) -> Result<bool, StorageError> {
        self.redo.clear();
        self.engine = Arc::new(MemoryEngine::new());
        self.robbed.extend(self.log.catalogue()?.iter().map(|record| record.replica));
        if self.planted.is(Planted::LogResetWithState) {
            let records = self.log.catalogue()?;
            self.log = Arc::new(MemoryLog::new());
            self.log.create(&records)?;
        }
        let Some(copy) = self.copy.as_ref().filter(|_| older) else { return Ok(false) };
        self.engine.write(copy)?;
        self.engine.sync()?;
        Ok(true)
    }

    /// Removes what the engine has of a replica in other generations than this.
    pub fn sweep(&mut self, replica: ReplicaId, generation: u32) -> Result<(), StorageError> {
        let (from, to) = keys::replica_range(replica);
        let mut stray: Vec<Mutation> = Vec::new();
        self.engine.scan_keys(Bound::Included(&from), &to, &mut |key| {
            if keys::generation_of(key) != Some(generation) {
                stray.push((key.to_vec(), None));
            }
            true
        })?;
        self.engine.write(&stray)?;
        self.engine.sync()
    }

    /// A record of a replica rots, in its state or in its log.
    pub fn rot(&mut self, replica: ReplicaId, dice: &mut Dice) -> Result<(), StorageError> {
        if self.planted.is(Planted::RotUnnoticed) {
            return self.flip(replica);
        }
        if dice.chance(500) {
            self.faulty.rot_state(replica)
        } else {
            self.faulty.rot_log(replica)
        }
        Ok(())
    }

    /// A value of a replica changes, and nobody notices.
    fn flip(&self, replica: ReplicaId) -> Result<(), StorageError> {
        let (from, to) = keys::replica_range(replica);
        let mut flipped = None;
        self.engine.scan(Bound::Included(&from), &to, &mut |key, value| {
            if key.get(keys::PREFIX_BYTES - 1) == Some(&keys::KIND_USER) {
                let mut value = value.to_vec();
                if let Some(last) = value.last_mut() {
                    *last ^= 1;
                }
                flipped = Some((key.to_vec(), Some(value.into())));
            }
            flipped.is_none()
        })?;
        self.engine.write(&Vec::from_iter(flipped))?;
        self.engine.sync()
    }

    /// The node crashes. Of the log write under way a prefix has reached the disk: none, some or
    /// all of the replicas' parts, each whole; or, if it is `torn`, the part behind those up to a sector,
    /// of which the log keeps the entries that are whole. What was queued is gone, and of what was
    /// written to the engine without a sync as much as `loss` says. Returns whether entries or a hard
    /// state were torn off.
    pub fn crash(&mut self, loss: CrashLoss, torn: bool, dice: &mut Dice) -> Result<bool, StorageError> {
        let kept = dice.below(self.writing.len() + 1);
        let mut parts = std::mem::take(&mut self.writing).into_iter();
        for work in parts.by_ref().take(kept) {
            self.store(work)?;
        }
        let mut tears = false;
        if torn && let Some(LogWork::Write(name, write)) = parts.next() {
            tears = true;
            let write = self.tear(write, dice);
            if !write.entries.is_empty() || write.hard_state.is_some() {
                self.store(LogWork::Write(name, write))?;
            }
        }
        self.queued.clear();
        self.flushes.clear();
        self.flushing = None;
        if self.planted.is(Planted::AcknowledgeEarly) {
            self.log = Arc::new(self.honest.clone());
        }
        self.engine.crash(loss);
        Ok(tears)
    }

    /// What is whole of a write that is cut at a sector. Its hard state comes last.
    fn tear(&self, mut write: LogWrite, dice: &mut Dice) -> LogWrite {
        let sectors = write.size().div_ceil(SECTOR_BYTES);
        let cut = dice.below(sectors.max(1)) * SECTOR_BYTES;
        let mut end = 0;
        write.entries.retain(|entry| {
            end += 32 + entry.data.len() + entry.context.len();
            end <= cut
        });
        if self.planted.is(Planted::TornAccepted) {
            write.entries.clear();
        } else {
            write.hard_state = None;
        }
        write.membership = None;
        write
    }

    /// The node starts: redo files are applied whole, in order, before anything is read. It may crash
    /// on the way and begin anew.
    pub fn recover(&mut self, dice: &mut Dice) -> Result<(), StorageError> {
        if dice.chance(250) {
            let all: Vec<Mutation> = self.redo.iter().flat_map(|frozen| self.mutations(frozen)).collect();
            for mutation in all.iter().take(dice.below(all.len() + 1)) {
                self.engine.write(std::slice::from_ref(mutation))?;
            }
            self.engine.crash(CrashLoss::Random(dice.any()));
        }
        for frozen in &self.redo {
            self.engine.write(&self.mutations(frozen))?;
        }
        self.engine.sync()?;
        self.redo.clear();
        Ok(())
    }
}

fn store(log: &MemoryLog, work: LogWork) -> Result<(), StorageError> {
    match work {
        LogWork::Write(_, write) => log.write(&[write]),
        LogWork::Compact(replica, to) => log.compact(replica, to),
    }
}
