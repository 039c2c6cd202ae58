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
//! Each flush has a number, that of its redo file. The first thing that it writes to the engine is that
//! this number has begun, the last that it is complete. So an engine that is found with a redo file has
//! completed its number, or the one before, or else has lost (or regained) a flush that was durable: what
//! the file was made to is gone, and laying it over what is there would make a state that never was. And
//! one that has begun what it hasn't completed has a redo file, or else that was lost.

use std::collections::BTreeSet;
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use super::collect::{self, Collected, Collection, Collections};
use super::engine::{Engine, Mutation, Run};
use super::fjall_files::free_bytes;
use super::flush_numbers::{Numbers, check_numbers, last_flush};
use super::flush_source::{Source, held, in_parts, sources};
use super::redo::{self, Record, RedoReader, RedoWriter, Section};
use super::state::{Frozen, StateHeader};
use super::{StorageError, atomic_file, keys, pulse};
use crate::ids::ReplicaId;
use crate::limits::{FLUSH_BATCH_BYTES, FLUSH_BATCH_KEYS, FLUSH_PART_BYTES};

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

/// Flushes frozen memtables of a node's replicas. One at a time; runs on the flush thread.
pub struct Flusher {
    /// Directory of the redo files.
    pub redo_dir: PathBuf,
    /// The engine below.
    pub engine: Arc<dyn Engine>,
    next_sequence: u64,
    /// Why a redo file was left behind: nothing may be flushed any more.
    failed: Option<String>,
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
    /// flush may be tried again (a full disk), unless it is [`StorageError::SyncFailed`]. After any other error the
    /// node must stop; the next start completes the flush.
    pub fn flush_parts(
        &mut self,
        tables: Vec<Arc<Frozen>>,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<(), StorageError> {
        self.check_usable()?;
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
        let result = self.absorb(sources, &path, progress);
        if let Err(error) = &result {
            self.failed = Some(error.to_string());
        }
        result
    }

    /// Whether a flush that has just failed with `error` may be tried again: there was no space, so nothing is on disk.
    pub fn may_retry(&self, error: &StorageError) -> bool {
        self.failed.is_none() && error.is_full()
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

    /// Whether there is room for all of a flush: for its redo file, and for what the engine makes of that. Once the file is
    /// there the flush must come to its end, and a node whose engine finds no room for it can only stop.
    fn check_space(&self, sources: &[Source]) -> Result<(), StorageError> {
        let bytes: usize = sources.iter().map(Source::bytes).sum();
        let wanted = 2 * bytes as u64 + SLACK_BYTES;
        match free_bytes(&self.redo_dir) {
            Some(free) if free < wanted => {
                let full = std::io::ErrorKind::StorageFull;
                Err(atomic_file::io_error("finding room for a flush in", &self.redo_dir)(full.into()))
            }
            _ => Ok(()),
        }
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

    fn absorb(
        &mut self,
        sources: Vec<Source>,
        path: &Path,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<(), StorageError> {
        self.at(FlushPoint::RedoDurable)?;
        progress(Progress::Logged);
        let number = self.next_sequence - 1;
        let flushed: BTreeSet<_> = sources.iter().map(Source::name).collect();
        let engine = self.engine.clone();
        match engine.begin_run()? {
            Some(first) => self.absorb_runs(&*engine, first, sources, progress)?,
            None => self.absorb_batches(&*engine, sources, progress)?,
        }
        self.engine.sync()?;
        self.at(FlushPoint::EngineSynced)?;
        self.collections.keep(path, number, |replica, generation| flushed.contains(&(replica, generation)));
        atomic_file::remove(path)?;
        self.at(FlushPoint::RedoRemoved)
    }

    /// Hands the engine sorted runs, of some replicas each. What is in the first says that the flush has begun, what is in
    /// the last that it is complete: a run counts whole, and after those before it.
    fn absorb_runs(
        &mut self,
        engine: &dyn Engine,
        first: Box<dyn Run + '_>,
        sources: Vec<Source>,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<(), StorageError> {
        let number = self.next_sequence - 1;
        // What is told is let go with the next, see below.
        let (mut run, mut told) = (Some(first), Vec::new());
        let mut parts = in_parts(sources).into_iter().peekable();
        while let Some(part) = parts.next() {
            let mut writer = match run.take() {
                Some(first) => first,
                None => engine.begin_run()?.ok_or_else(|| StorageError::Engine {
                    engine: engine.name(),
                    reason: "it takes in no more sorted runs".into(),
                })?,
            };
            let complete = if parts.peek().is_none() { number } else { number - 1 };
            // The numbers' key is the least of all, a header's the least of its generation.
            writer.push(&keys::flush_key(), Some(&Numbers { complete, begun: number }.encode()))?;
            for source in &part {
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
            drop(std::mem::replace(&mut told, part));
            progress(Progress::Absorbed(&absorbed));
        }
        Ok(())
    }

    /// Hands the engine small batches.
    fn absorb_batches(
        &mut self,
        engine: &dyn Engine,
        sources: Vec<Source>,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<(), StorageError> {
        let number = self.next_sequence - 1;
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

/// Collects changes and hands them to the engine in bounded, sorted batches, so that nobody who
/// reads beside waits for long.
pub(super) struct Batch<'a> {
    engine: &'a dyn Engine,
    mutations: Vec<Mutation>,
    bytes: usize,
}

impl<'a> Batch<'a> {
    pub fn new(engine: &'a dyn Engine) -> Batch<'a> {
        Batch { engine, mutations: Vec::with_capacity(FLUSH_BATCH_KEYS), bytes: 0 }
    }

    /// Adds a change; true if that completed a batch, which the engine then has.
    pub fn push(&mut self, key: Vec<u8>, value: Option<Bytes>) -> Result<bool, StorageError> {
        self.bytes += key.len() + value.as_ref().map_or(0, Bytes::len);
        self.mutations.push((key, value));
        let full = self.mutations.len() >= FLUSH_BATCH_KEYS || self.bytes >= FLUSH_BATCH_BYTES;
        if full {
            self.write()?;
        }
        Ok(full)
    }

    /// Writes what is left of a section, then its header, as the last thing.
    fn finish(&mut self, section: &Section) -> Result<(), StorageError> {
        self.write()?;
        let key = keys::header_key(section.replica, section.generation);
        self.mutations.push((key, Some(section.header.encode().into())));
        self.write()
    }

    /// Writes what is left.
    pub fn write(&mut self) -> Result<(), StorageError> {
        if !self.mutations.is_empty() {
            self.engine.write(&self.mutations)?;
            self.mutations.clear();
            self.bytes = 0;
            pulse::beat();
        }
        Ok(())
    }
}

/// Writes everything in a redo file to the engine again.
fn reapply(path: &Path, sequence: u64, engine: &dyn Engine) -> Result<(), StorageError> {
    let mut reader = RedoReader::open(path, sequence)?;
    let mut batch = Batch::new(engine);
    let mut current: Option<Section> = None;
    while let Some(record) = reader.read()? {
        match record {
            Record::Section(section) => {
                if let Some(complete) = current.take() {
                    batch.finish(&complete)?;
                }
                check_fits(path, engine, &section)?;
                current = Some(section);
            }
            Record::Change(kind, key, value) => {
                let Some(section) = &current else {
                    return Err(StorageError::Damaged {
                        what: format!("redo file {}", path.display()),
                        detail: "a change precedes the first section".into(),
                    });
                };
                let key = keys::key_of_kind(section.replica, section.generation, kind, &key);
                batch.push(key, value)?;
            }
        }
    }
    if let Some(complete) = current {
        batch.finish(&complete)?;
    }
    tracing::info!(file = %path.display(), "re-applied a redo file");
    Ok(())
}

/// A redo file is made to the state that the engine held durably, and goes before the engine gets
/// anything newer. An engine that is behind its base has lost what was durable; one that is ahead of
/// its header would be taken back by a file that somebody has put there.
fn check_fits(path: &Path, engine: &dyn Engine, section: &Section) -> Result<(), StorageError> {
    let held = held(engine, section.replica, section.generation)?;
    let to = section.header.applied.index;
    if held < section.base {
        return Err(StorageError::Damaged {
            what: format!("state of replica {}", section.replica),
            detail: format!(
                "it was durable up to entry {}, but the {} store has it up to {held} only",
                section.base,
                engine.name()
            ),
        });
    }
    if held > to {
        return Err(StorageError::Damaged {
            what: format!("redo file {}", path.display()),
            detail: format!(
                "it leads replica {} to entry {to}, but the state is at {held} already",
                section.replica
            ),
        });
    }
    Ok(())
}

#[cfg(test)]
#[path = "flush_tests.rs"]
mod tests;
