//! From frozen memtables to durable state: redo files, then the engine.
//!
//! ```text
//! tables ─► redo file (synced) ─► Logged ─► engine, in parts ─► Absorbed ─► engine synced ─► file removed
//! ```
//!
//! Why the file: an engine that holds a part of a flush is no state of any moment. With k=a in it
//! and the entries "delete k if it is c" and "set k to c if it is a", a crash that keeps k=c would
//! have the replayed log delete k. So whatever part of a flush the engine holds after a crash, the
//! whole of it is written again from the redo file before anybody reads.
//!
//! Promises: when `Logged` is told, a crash can't take the state back behind the tables' headers, so
//! the log may be compacted to there. When `Absorbed` is told of a replica, readers of the engine see all its
//! writes, so its tables' memory may be released. A file is removed only after its writes are durable in the
//! engine, and no second flush begins before that: so at most one finished file exists, and what it
//! says is never older than what the engine holds. A flush that fails after `Logged` leaves its
//! file; the flusher then refuses to go on, since a later flush could be undone by that file at the
//! next start.
//!
//! *A full disk.* An engine may [bear](Engine::bears_a_full_disk) it: then a flush that finds no room after `Logged` is not at
//! an end. What the engine hasn't taken is kept, with the file, and tried again ([`Flusher::go_on`]); until it has all of it no
//! other flush begins, and of whose writes the file has some nothing is removed ([`Flusher::is_half_done`]). So such a flush
//! needs room for its file to begin, and no more: once that is there the log may go, which makes some.
//!
//! Each flush has a number, that of its redo file. The first thing that it writes to the engine is that
//! this number has begun, the last that it is complete. So an engine that is found with a redo file has
//! completed its number, or the one before, or else has lost (or regained) a flush that was durable: what
//! the file was made to is gone, and laying it over what is there would make a state that never was. And
//! one that has begun what it hasn't completed has a redo file, or else that was lost.

use std::collections::{BTreeSet, VecDeque};
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::collect::{self, Collected, Collection, Collections};
use super::engine::{Engine, Mutation, Run};
use super::fjall_files::free_bytes;
use super::flush_batch::{Batch, reapply};
use super::flush_numbers::{Numbers, check_numbers, last_flush};
use super::flush_source::{Source, in_parts, sources};
use super::redo::{self, RedoWriter, Section};
use super::state::{Frozen, StateHeader};
use super::{StorageError, atomic_file, keys, pulse};
use crate::ids::ReplicaId;
use crate::limits::{FLUSH_BATCH_KEYS, FLUSH_PART_BYTES, FLUSH_RUN_BYTES};

/// Steps of a flush that its caller wants to hear of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FlushStep {
    /// All tables are in one durable redo file: the log may be compacted up to their headers.
    Logged,
    /// The engine holds all of them: their memory may be released.
    Absorbed,
}

/// How far a flush has come, see [`FlushStep`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Progress<'a> {
    /// That step, of all tables.
    Logged,
    /// That step, of the tables of these replicas and generations. Told of each of them once.
    Absorbed(&'a [(ReplicaId, u32)]),
}

/// What is to be free beyond a flush before it begins: raft logs are written beside it, and tables merged.
const SLACK_BYTES: u64 = 16 << 20;
/// What a redo file leaves at least, for what the logs write until they are shorter.
const LAST_BYTES: u64 = 1 << 20;

/// Moments at which a [`FlushHook`] is asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FlushPoint {
    /// The redo file is written under its unfinished name, and not yet synced.
    RedoWritten,
    /// The redo file is durable.
    RedoDurable,
    /// The engine has taken one more batch.
    BatchWritten,
    /// The engine is durable; the redo file still exists.
    EngineSynced,
    /// The redo file is gone.
    RedoRemoved,
}

/// Called at each [`FlushPoint`]; an error ends the flush there, as if the disk had failed.
pub type FlushHook = Box<dyn FnMut(FlushPoint) -> Result<(), StorageError> + Send>;

/// A flush whose redo file is durable.
struct HalfDone {
    path: PathBuf,
    number: u64,
    /// Whose writes are in the file.
    names: BTreeSet<(ReplicaId, u32)>,
    /// What the engine hasn't taken, in key order.
    left: VecDeque<Vec<Source>>,
}

/// Flushes frozen memtables of a node's replicas. One at a time; runs on the flush thread.
pub struct Flusher {
    /// Directory of the redo files.
    pub redo_dir: PathBuf,
    /// The engine below.
    pub engine: Arc<dyn Engine>,
    next_sequence: u64,
    /// Why a redo file was left behind: nothing may be flushed any more.
    failed: Option<String>,
    /// A flush that waits for room.
    half_done: Option<HalfDone>,
    collections: Collections,
    /// Whose state is being removed, and the last key of it that was.
    removed_to: Option<(ReplicaId, Vec<u8>)>,
    /// Of whose state the engine has let go what it could at once: whose turn it was last.
    forgotten: Option<ReplicaId>,
    hook: Option<FlushHook>,
}

impl Flusher {
    /// Opens the directory, creating it if need be, re-applies whole every redo file left by a crash,
    /// in order, and makes the result durable. To be called before any [`super::state::ReplicaState`]
    /// is opened. Damaged files are an error, unfinished ones (`.tmp`) are removed.
    pub fn open(redo_dir: PathBuf, engine: Arc<dyn Engine>) -> Result<Flusher, StorageError> {
        std::fs::create_dir_all(&redo_dir).map_err(atomic_file::io_error("creating", &redo_dir))?;
        let files = redo::list(&redo_dir)?;
        let flushed = match last_flush(&*engine)? {
            Some(numbers) => {
                check_numbers(&files, numbers, &*engine)?;
                Some(numbers.complete)
            }
            None => None,
        };
        // From here on: sled may take long to open a great store, and tells of no step of that.
        let _working = pulse::work();
        for (sequence, path) in &files {
            reapply(path, *sequence, &*engine)?;
        }
        let last = files.last().map(|(sequence, _)| *sequence).or(flushed);
        let next_sequence = last.unwrap_or(0).checked_add(1).ok_or_else(|| StorageError::Damaged {
            what: format!("the {} store", engine.name()),
            detail: "there is no number left for a flush".into(),
        })?;
        if !files.is_empty() || flushed.is_none() {
            // A store without a number is new, or from before there were any.
            Numbers::complete(last.unwrap_or(0)).write(&*engine)?;
            engine.sync()?;
        }
        for (_, path) in &files {
            // One by one, oldest first, each removal durable: a newer file never goes before an older.
            atomic_file::remove(path)?;
        }
        Ok(Flusher {
            redo_dir,
            engine,
            next_sequence,
            failed: None,
            half_done: None,
            collections: Collections::default(),
            removed_to: None,
            forgotten: None,
            hook: None,
        })
    }

    /// Has `hook` called at each point of the flushes to come, so that a test can fail or copy there.
    pub fn set_hook(&mut self, hook: FlushHook) {
        self.hook = Some(hook);
    }

    /// Flushes `tables` (oldest first per replica) like [`Flusher::flush_parts`] and tells `progress` of each
    /// step when it is done for all of them.
    pub fn flush(
        &mut self,
        tables: &[Arc<Frozen>],
        progress: &mut dyn FnMut(FlushStep),
    ) -> Result<(), StorageError> {
        let parts = tables.iter().map(|frozen| (frozen.replica, frozen.generation)).collect::<BTreeSet<_>>();
        let mut left = parts.len();
        self.flush_parts(tables.to_vec(), &mut |told| match told {
            Progress::Logged => progress(FlushStep::Logged),
            Progress::Absorbed(parts) => {
                left -= parts.len();
                if left == 0 {
                    progress(FlushStep::Absorbed);
                }
            }
        })
    }

    /// Flushes `tables` (oldest first per replica) in one durable step and tells `progress` of each
    /// stage; a table is held until the next part is told. An error before `Logged` leaves everything as it was, and the
    /// flush may be tried again (a full disk), unless it is [`StorageError::SyncFailed`]. After an error that leaves the
    /// flush [half done](Flusher::is_half_done) it goes on with [`Flusher::go_on`]. After any other the
    /// node must stop; the next start completes the flush.
    pub fn flush_parts(
        &mut self,
        tables: Vec<Arc<Frozen>>,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<(), StorageError> {
        self.check_usable()?;
        assert!(self.half_done.is_none(), "a flush begins before the last one is complete");
        if tables.is_empty() {
            progress(Progress::Logged);
            progress(Progress::Absorbed(&[]));
            return Ok(());
        }
        let sources = sources(tables, &*self.engine)?;
        self.check_space(&sources)?;
        let path = match self.write_redo(&sources) {
            Ok(path) => path,
            Err(error) => {
                if matches!(error, StorageError::SyncFailed { .. }) {
                    self.failed = Some(error.to_string());
                }
                return Err(error);
            }
        };
        let logged = self.at(FlushPoint::RedoDurable);
        if let Err(error) = &logged {
            self.failed = Some(error.to_string());
        }
        logged?;
        progress(Progress::Logged);
        let names = sources.iter().map(Source::name).collect();
        let number = self.next_sequence - 1;
        self.half_done = Some(HalfDone { path, number, names, left: in_parts(sources, FLUSH_RUN_BYTES) });
        self.go_on(progress)
    }

    /// Goes on with a flush that is half done, if there is one, and tells `progress` of the parts that it comes to. Errors are
    /// those of [`Flusher::flush_parts`] after `Logged`.
    pub fn go_on(&mut self, progress: &mut dyn FnMut(Progress<'_>)) -> Result<(), StorageError> {
        self.check_usable()?;
        let Some(mut half) = self.half_done.take() else { return Ok(()) };
        let result = self.absorb(&mut half, progress);
        match &result {
            Ok(()) => {}
            // Nothing of the part that found no room is there, and of what was taken before nothing is missing.
            Err(error) if error.is_full() && self.engine.bears_a_full_disk() => {
                // Less at a time needs less room. Not each replica by itself: many would take very many syncs.
                half.left = in_parts(half.left.into_iter().flatten(), FLUSH_PART_BYTES);
                self.half_done = Some(half);
            }
            Err(error) => self.failed = Some(error.to_string()),
        }
        result
    }

    /// Whether a flush has found no room after its redo file was durable: it is to go on before anything else is flushed, and
    /// before anybody relies on what the engine holds of a replica between two flushes.
    pub fn is_half_done(&self) -> bool {
        self.half_done.is_some()
    }

    /// Whether a flush that is half done has writes of this replica. The next start may lay them over whatever the engine
    /// holds then, so none of its state may be removed.
    pub fn is_half_done_with(&self, replica: ReplicaId) -> bool {
        let names = self.half_done.as_ref().map(|half| &half.names);
        names.is_some_and(|names| names.range((replica, 0)..=(replica, u32::MAX)).next().is_some())
    }

    /// Whether a flush that has just failed with `error` may be tried again, or go on if it is half done: there was no space.
    pub fn may_retry(&self, error: &StorageError) -> bool {
        self.failed.is_none() && error.is_full()
    }

    /// Bytes of memtables that there is room for at present in one flush; `None`: for any number of them.
    pub fn room(&self) -> Option<u64> {
        free_bytes(&self.redo_dir).map(|free| self.room_in(free))
    }

    /// Removes all state of `replicas`, all generations, in small batches, durably, with one sync for
    /// all. The caller has recorded before that they are gone: a crash leaves a part, to be removed by
    /// calling again.
    pub fn destroy(&mut self, replicas: &[ReplicaId]) -> Result<(), StorageError> {
        for replica in replicas {
            self.begin_destroy(*replica);
            while !self.destroy_step(*replica)? {}
        }
        self.end_destroy()
    }

    /// The state of a replica is about to be removed: no collection of its writes can come to a good end.
    pub fn begin_destroy(&mut self, replica: ReplicaId) {
        self.collections.fail(replica, "the replica is removed");
    }

    /// Removes a batch of the state of a replica, of all its generations, not yet durably. True: nothing of it is left.
    pub fn destroy_step(&mut self, replica: ReplicaId) -> Result<bool, StorageError> {
        self.check_usable()?;
        assert!(!self.is_half_done_with(replica), "state is removed that a redo file leads on from");
        // What was there is gone, but an engine may have a mark for each of it, and would pass over all of them each time.
        let removed_to = self.removed_to.take().filter(|(of, _)| *of == replica);
        let (first, to) = keys::replica_range(replica);
        // Here, not when the removal of many begins: each may cost some syncs, and flushes go on in between. Whoever's turn
        // comes after another's has everything removed from its beginning, so nothing that comes to light stays.
        if self.forgotten.replace(replica) != Some(replica)
            && let Err(error) = self.engine.forget_range(&first, &to)
        {
            // It fails again below, if it matters.
            tracing::warn!(%error, %replica, "the state of a replica is removed key by key");
        }
        let from = match &removed_to {
            Some((_, last)) => Bound::Excluded(&last[..]),
            None => Bound::Included(&first[..]),
        };
        let mut batch: Vec<Mutation> = Vec::with_capacity(FLUSH_BATCH_KEYS);
        self.engine.scan_keys(from, &to, &mut |key| {
            batch.push((key.to_vec(), None));
            batch.len() < FLUSH_BATCH_KEYS
        })?;
        let Some((last, _)) = batch.last() else {
            // Once more from the beginning, for what may have come behind.
            return Ok(removed_to.is_none());
        };
        self.removed_to = Some((replica, last.clone()));
        self.engine.write(&batch)?;
        self.at(FlushPoint::BatchWritten)?;
        Ok(false)
    }

    /// Makes durable what was removed since. Only then may anybody record that it is gone.
    pub fn end_destroy(&mut self) -> Result<(), StorageError> {
        self.check_usable()?;
        self.engine.sync()
    }

    /// Begins to keep the redo files of the flushes to come that hold writes of this generation, as second names in `dir`,
    /// which is on the same file system. `None` if the engine holds no state of it: the caller has it flushed first.
    pub fn begin_collection(
        &mut self,
        replica: ReplicaId,
        generation: u32,
        dir: &Path,
    ) -> Result<Option<Collection>, StorageError> {
        self.check_usable()?;
        self.collections.begin(&*self.engine, replica, generation, dir)
    }

    /// Ends a collection: every flush since its begin that holds writes of its generation is in one of the files, and the
    /// engine has them all. An error if one couldn't be kept, or the generation was destroyed meanwhile.
    pub fn end_collection(&mut self, collection: &Collection) -> Result<Collected, StorageError> {
        self.check_usable()?;
        self.collections.end(&*self.engine, collection)
    }

    /// Where the state of a generation stands that the engine holds, as between any two flushes; `None` if it
    /// holds none. As long as this is the same, nothing was written to it.
    pub fn header(
        &mut self,
        replica: ReplicaId,
        generation: u32,
    ) -> Result<Option<StateHeader>, StorageError> {
        self.check_usable()?;
        collect::header(&*self.engine, replica, generation)
    }

    fn check_usable(&self) -> Result<(), StorageError> {
        match &self.failed {
            None => Ok(()),
            Some(reason) => Err(StorageError::Engine {
                engine: self.engine.name(),
                reason: format!("an earlier flush failed ({reason}); restart the node to complete it"),
            }),
        }
    }

    /// Whether there is room for a flush: for its redo file, and for what the engine makes of that. Once the file is
    /// there the flush must come to its end. An engine that bears a full disk waits for room then, so the file is enough;
    /// with any other a node whose engine finds none can only stop.
    fn check_space(&self, sources: &[Source]) -> Result<(), StorageError> {
        let bytes = sources.iter().map(Source::bytes).sum::<usize>() as u64;
        let Some(free) = free_bytes(&self.redo_dir) else { return Ok(()) };
        let logs = self.engine.bears_a_full_disk() && bytes.saturating_add(LAST_BYTES) <= free;
        if logs || bytes <= self.room_in(free) {
            return Ok(());
        }
        let full = std::io::ErrorKind::StorageFull;
        Err(atomic_file::io_error("finding room for a flush in", &self.redo_dir)(full.into()))
    }

    /// Bytes of memtables that a flush may have where so many are free: they are written twice, and something stays for what else
    /// is written meanwhile. All of that where the engine must not find the disk full: it may write more than it is given.
    fn room_in(&self, free: u64) -> u64 {
        let slack = if self.engine.bears_a_full_disk() { SLACK_BYTES.min(free / 4) } else { SLACK_BYTES };
        free.saturating_sub(slack) / 2
    }

    /// Makes the redo file durable. On an error there is none, or its state is unknown (`SyncFailed`).
    fn write_redo(&mut self, sources: &[Source]) -> Result<PathBuf, StorageError> {
        let mut writer = RedoWriter::create(&self.redo_dir, self.next_sequence)?;
        let filled = sources.iter().try_for_each(|source| {
            writer.section(&source.section)?;
            source.each(&mut |kind, key, value| writer.change(kind, key, value.map(|value| &value[..])))
        });
        if let Err(error) = filled.and_then(|()| self.at(FlushPoint::RedoWritten)) {
            // Frees the space, which may be what is missing. The first error is the one to tell; an
            // unfinished file that stays is removed at the next start.
            if let Err(second) = writer.abandon() {
                tracing::warn!(%second, "an unfinished redo file stays");
            }
            return Err(error);
        }
        let path = writer.finish()?;
        self.next_sequence += 1;
        Ok(path)
    }

    /// Hands the engine what it hasn't taken, and removes the file.
    fn absorb(
        &mut self,
        half: &mut HalfDone,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<(), StorageError> {
        let engine = self.engine.clone();
        if !half.left.is_empty() {
            match engine.begin_run()? {
                Some(first) => self.absorb_runs(&*engine, first, half, progress)?,
                None => {
                    // What goes in batches isn't kept for another attempt, which would take it for done.
                    assert!(!engine.bears_a_full_disk(), "an engine bears a full disk, and takes no runs");
                    let sources = std::mem::take(&mut half.left).into_iter().flatten();
                    self.absorb_batches(&*engine, half.number, sources, progress)?;
                }
            }
        }
        self.engine.sync()?;
        self.at(FlushPoint::EngineSynced)?;
        let names = &half.names;
        let holds = |replica, generation| names.contains(&(replica, generation));
        self.collections.keep(&half.path, half.number, holds);
        atomic_file::remove(&half.path)?;
        self.at(FlushPoint::RedoRemoved)
    }

    /// Hands the engine sorted runs, of some replicas each. What is in the first says that the flush has begun, what is in
    /// the last that it is complete: a run counts whole, and after those before it.
    fn absorb_runs(
        &mut self,
        engine: &dyn Engine,
        first: Box<dyn Run + '_>,
        half: &mut HalfDone,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<(), StorageError> {
        let number = half.number;
        // What is told is let go with the next, see below.
        let (mut run, mut told) = (Some(first), None);
        while let Some(part) = half.left.front() {
            let mut writer = match run.take() {
                Some(first) => first,
                None => engine.begin_run()?.ok_or_else(|| StorageError::Engine {
                    engine: engine.name(),
                    reason: "it takes in no more sorted runs".into(),
                })?,
            };
            let complete = if half.left.len() == 1 { number } else { number - 1 };
            // The numbers' key is the least of all, a header's the least of its generation.
            writer.push(&keys::flush_key(), Some(&Numbers { complete, begun: number }.encode()))?;
            for source in part {
                let Section { replica, generation, header, .. } = &source.section;
                let (replica, generation) = (*replica, *generation);
                writer.push(&keys::header_key(replica, generation), Some(&header.encode().into()))?;
                source.each(&mut |kind, key, value| {
                    writer.push(&keys::key_of_kind(replica, generation, kind, key), value)
                })?;
            }
            writer.finish()?;
            self.at(FlushPoint::BatchWritten)?;
            let absorbed: Vec<_> = part.iter().map(Source::name).collect();
            drop(std::mem::replace(&mut told, half.left.pop_front()));
            progress(Progress::Absorbed(&absorbed));
        }
        Ok(())
    }

    /// Hands the engine small batches.
    fn absorb_batches(
        &mut self,
        engine: &dyn Engine,
        number: u64,
        sources: impl Iterator<Item = Source>,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<(), StorageError> {
        Numbers { complete: number - 1, begun: number }.write(engine)?;
        let mut batch = Batch::new(engine);
        // A node that waits for memory waits for the first of them, not for all. What is told is let go with the next:
        // then this thread is the last to hold it, and no arbiter spends its time on that.
        let (mut absorbed, mut bytes, mut held, mut told) = (Vec::new(), 0, Vec::new(), Vec::new());
        for source in sources {
            let (replica, generation) = source.name();
            source.each(&mut |kind, key, value| {
                let key = keys::key_of_kind(replica, generation, kind, key);
                if batch.push(key, value.cloned())? {
                    self.at(FlushPoint::BatchWritten)?;
                }
                Ok(())
            })?;
            batch.finish(&source.section)?;
            self.at(FlushPoint::BatchWritten)?;
            absorbed.push((replica, generation));
            bytes += source.bytes();
            held.push(source);
            if bytes >= FLUSH_PART_BYTES {
                drop(std::mem::replace(&mut told, std::mem::take(&mut held)));
                progress(Progress::Absorbed(&std::mem::take(&mut absorbed)));
                bytes = 0;
            }
        }
        drop(told);
        if !absorbed.is_empty() {
            progress(Progress::Absorbed(&absorbed));
        }
        Numbers::complete(number).write(engine)?;
        self.at(FlushPoint::BatchWritten)
    }

    fn at(&mut self, point: FlushPoint) -> Result<(), StorageError> {
        pulse::beat();
        self.hook.as_mut().map_or(Ok(()), |hook| hook(point))
    }
}

/// Which replicas to flush when their active memtables together are above `bytes_max`: the largest
/// first, until what stays is at most half of it. `active` is each replica's bytes in its active
/// table. Nothing if they are within the bound.
pub fn choose(active: &[(ReplicaId, usize)], bytes_max: usize) -> Vec<ReplicaId> {
    let mut left: usize = active.iter().map(|(_, bytes)| bytes).sum();
    if left <= bytes_max {
        return Vec::new();
    }
    let mut by_size = active.to_vec();
    by_size.sort_unstable_by_key(|(replica, bytes)| (std::cmp::Reverse(*bytes), *replica));
    by_size
        .into_iter()
        .take_while(|(_, bytes)| {
            let wanted = left > bytes_max / 2;
            left -= bytes;
            wanted
        })
        .map(|(replica, _)| replica)
        .collect()
}

#[cfg(test)]
#[path = "flush_tests.rs"]
mod tests;
