//! The state engine on fjall: on its tree of sorted tables (the crate `lsm-tree`), without the database around it.
//!
//! What that leaves out: a journal, which would write all data once more although redo files and raft logs bring
//! back whatever a crash takes; and its threads, which merge tables at the priority of all others. What is left is
//! what a flush needs: a sorted run becomes a table, is synced, and is part of the tree from then on, whole.
//!
//! - *Durable* is what is in a table, with nothing else to be synced: fjall syncs the table and its directory, then the
//!   version that names it, then the file that names the version (`fjall_files`). Writes outside of runs wait in
//!   memory until [`Engine::sync`], or until they are many, and become a table then.
//! - *Readers* wait for nobody (`fjall_view`).
//! - *Tables are merged* by one thread that is nice (`fjall_compaction`). Once
//!   [`FJALL_TABLES_WAITING_MAX`](crate::limits::FJALL_TABLES_WAITING_MAX) of them wait for that, who would make
//!   another merges them before.
//! - *Damage*: before a tree is opened its version and tables are held against their checksums; of a great
//!   one each block is, when it is read. What fails is [`StorageError::Damaged`], noted for the next start (`trust`).
//!   Every call is caught: a panic counts as damage where bytes of the disk were read.
//! - *A full disk* leaves the tree as it was. What was written of a table goes with the next merge, or at the
//!   next opening. A merge that would take the last of a disk is given up before, and begun again when there is more. Any
//!   other failure of a write leaves unknown what is on disk, so nothing is believed any more, and nothing removed.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::ops::Bound;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use arc_swap::ArcSwap;
use bytes::Bytes;
use lsm_tree::{
    AbstractTree, AnyIngestion, AnyTree, Cache, Config, InternalValue, KvPair, Memtable, SeqNo,
    SequenceNumberCounter, UserKey, ValueType,
};

use super::atomic_file::{self, io_error};
use super::engine::{Engine, Mutation, OnDamage, Run, Store, bounds, visit_each};
use super::fjall_compaction::{Attendants, Compaction, Ending};
use super::fjall_files::{self as files, damaged};
use super::fjall_view::View;
use super::identity::IdentityError;
use super::log_disk::panic_text;
use super::trust::Trust;
use super::{StorageError, aside, keys, owner};
use crate::ids::{RandomId, StoreId};
use crate::limits::FJALL_PENDING_BYTES;
use crate::telemetry::hot::hot;

const NAME: &str = "fjall";
/// How the detail of an error begins that was a panic of fjall's.
const PANICKED: &str = "fjall panicked";
/// Files and directories that fjall syncs for a run of one table.
const SYNCS_PER_RUN: u64 = 7;
/// The version of fjall's own formats that is read and written.
const FJALL_FORMAT: u32 = 3;

/// How to open the engine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FjallOptions {
    /// Memory for cached blocks of tables, in bytes.
    pub cache_bytes: u64,
}

impl Default for FjallOptions {
    fn default() -> FjallOptions {
        FjallOptions { cache_bytes: 64 << 20 }
    }
}

/// An open fjall store.
pub struct FjallEngine {
    // Dropped in this order: the thread has ended when the tree is closed, and that when it is unlocked.
    compaction: Compaction,
    core: Arc<Core>,
    created: bool,
    _lock: File,
}

/// What the thread that merges tables shares.
pub(super) struct Core {
    pub(super) path: PathBuf,
    pub(super) tree: AnyTree,
    /// The number that the next write gets. A later write of a key has a greater one.
    pub(super) next: SequenceNumberCounter,
    /// What readers read.
    pub(super) view: ArcSwap<View>,
    /// What they have read before, as long as any of them does.
    pub(super) older_views: Mutex<Vec<Weak<View>>>,
    /// Held by who writes, adds tables, or replaces the view.
    writer: Mutex<()>,
    /// How many make a table, by a run or a merge. Locked while remains of such are removed.
    pub(super) makers: Mutex<usize>,
    /// Held by who merges tables.
    pub(super) merging: Mutex<()>,
    /// Tables numbered from here on may be remains of a run or a merge that came to nothing; `u64::MAX`: there are none.
    pub(super) litter_from: AtomicU64,
    /// Bytes that were free when the last merge began, if it found that too little; else 0.
    pub(super) refused: AtomicU64,
    trust: Trust,
    /// The key whose value can't be read, for tests.
    #[cfg(test)]
    spoilt: Mutex<Option<Vec<u8>>>,
    /// No merge is begun any more, or ended.
    pub(super) ending: Ending,
}

impl FjallEngine {
    /// Opens the store in directory `path`, or creates it for the data directory `store_id`. Errors:
    /// [`IdentityError::InUse`], [`IdentityError::ForeignStore`], [`IdentityError::Newer`];
    /// [`StorageError::Damaged`] for files that can't be read, or that aren't what they were, and for a
    /// store of which that was noted before.
    pub fn open(path: &Path, options: FjallOptions, store_id: StoreId) -> Result<FjallEngine, StorageError> {
        if let Some(why) = aside::noted_damage(path)? {
            return Err(damaged(path, &why));
        }
        fs::create_dir_all(path).map_err(io_error("creating", path))?;
        owner::check(path, store_id)?;
        let lock = files::lock(path)?;
        let there = files::check_version(path)?;
        files::remove_unfinished(path)?;
        let (next, visible) = (SequenceNumberCounter::default(), SequenceNumberCounter::default());
        let ending = Ending::default();
        let config = Config::new(path, next.clone(), visible.clone())
            .use_cache(Arc::new(Cache::with_capacity_bytes(options.cache_bytes)))
            .with_compaction_filter_factory(Some(Arc::new(Attendants {
                dir: path.to_owned(),
                ending: ending.clone(),
                free: files::free_bytes,
            })));
        let tree = contain(path, || config.open(), Doing::Reading)?;
        contain(path, || Ok(files::check_tables(path, &tree)), Doing::Reading)??;
        let greatest = contain(path, || Ok(tree.get_highest_seqno()), Doing::Reading)?;
        next.fetch_max(greatest.map_or(0, |greatest| greatest + 1));
        visible.fetch_max(next.get());
        // A creation that a crash cut short has left no table, and no owner.
        let created = !there || !owner::is_noted(path) && tree.table_count() == 0;
        let view = View::new(&tree, Arc::new(Memtable::new(0)));
        let core = Arc::new(Core {
            path: path.to_owned(),
            tree,
            next,
            view: ArcSwap::from_pointee(view),
            older_views: Mutex::default(),
            writer: Mutex::default(),
            makers: Mutex::default(),
            merging: Mutex::default(),
            litter_from: AtomicU64::new(u64::MAX),
            refused: AtomicU64::new(0),
            trust: Trust::new(NAME, path),
            #[cfg(test)]
            spoilt: Mutex::default(),
            ending,
        });
        let compaction = Compaction::start(core.clone()).map_err(io_error("starting a thread for", path))?;
        let engine = FjallEngine { compaction, core, created, _lock: lock };
        if created {
            let format = Bytes::copy_from_slice(&keys::FORMAT_VERSION.to_be_bytes());
            let id = Bytes::copy_from_slice(&store_id.0);
            engine.write(&[(keys::format_key(), Some(format)), (keys::store_id_key(), Some(id))])?;
            engine.sync()?;
            atomic_file::sync_parent(path)?;
        } else {
            engine.check_identity(store_id)?;
        }
        owner::note(path, store_id)?;
        engine.compaction.wake();
        Ok(engine)
    }

    /// Visits the pairs of `[from, to)`, as of now, until `visit` returns false.
    fn visit_pairs(
        &self,
        from: Bound<&[u8]>,
        to: &[u8],
        mut visit: impl FnMut(KvPair) -> bool,
    ) -> Result<(), StorageError> {
        let Some(bounds) = bounds(from, to) else { return Ok(()) };
        let view = self.core.view.load_full();
        let mut items = self.core.run(|| Ok(view.range(&bounds)), Doing::Reading)?;
        visit_each(|| self.core.run(|| items.next().transpose(), Doing::Reading), |pair| Ok(visit(pair)))
    }

    /// Checks whose store it is, and its format.
    fn check_identity(&self, expected: StoreId) -> Result<(), StorageError> {
        let path = &self.core.path;
        let format = self
            .get(&keys::format_key())?
            .and_then(|bytes| bytes[..].try_into().ok().map(u32::from_be_bytes))
            .ok_or_else(|| damaged(path, "its format version is missing"))?;
        let shown = || path.display().to_string();
        if format > keys::FORMAT_VERSION {
            return Err(
                IdentityError::Newer { path: shown(), found: format, known: keys::FORMAT_VERSION }.into()
            );
        }
        match self.get(&keys::store_id_key())?.and_then(|bytes| RandomId::from_slice(&bytes)) {
            Some(found) if found == expected => Ok(()),
            Some(found) => {
                Err(IdentityError::ForeignStore { path: shown(), found: found.to_string(), expected }.into())
            }
            None => Err(damaged(path, "its store id is missing")),
        }
    }
}

impl Core {
    /// Whether nothing of the store is believed any more.
    pub fn is_broken(&self) -> bool {
        self.trust.is_broken()
    }

    /// Calls into fjall.
    fn run<T>(&self, call: impl FnOnce() -> lsm_tree::Result<T>, doing: Doing) -> Result<T, StorageError> {
        self.trust.check()?;
        // A panic may be a mistake about memory: at the next start the checksums tell what is on disk.
        self.trust.note(contain(&self.path, call, doing), |detail| !detail.starts_with(PANICKED))
    }

    #[cfg(test)]
    fn check_spoilt(&self, key: &[u8]) -> Result<(), StorageError> {
        let spoilt = self.spoilt.lock().expect("locked").as_deref() == Some(key);
        let result = if spoilt { Err(damaged(&self.path, "spoilt for a test")) } else { Ok(()) };
        self.trust.note(result, |_| true)
    }

    // What the locks guard is changed by single assignments; a panic leaves it usable.
    pub(super) fn writer(&self) -> MutexGuard<'_, ()> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has readers see the tables that there are now, below `pending`. `_writer` is the writer's lock.
    pub(super) fn publish(
        &self,
        _writer: &MutexGuard<'_, ()>,
        pending: Arc<Memtable>,
    ) -> Result<(), StorageError> {
        // Versions before this one: readers that have one keep what they need of it.
        let forget = || self.tree.get_version_history_lock().maintenance(&self.path, SeqNo::MAX);
        let published = self.run(forget, Doing::Writing);
        if published.is_err() {
            // Readers don't see what was written.
            self.trust.distrust();
        }
        let older = self.view.swap(Arc::new(View::new(&self.tree, pending)));
        let mut views = self.older_views.lock().unwrap_or_else(PoisonError::into_inner);
        views.retain(|view| view.strong_count() > 0);
        views.push(Arc::downgrade(&older));
        published
    }

    /// Makes a table of what was written outside of runs.
    fn flush_pending(&self, writer: &MutexGuard<'_, ()>) -> Result<(), StorageError> {
        let pending = self.view.load().pending.clone();
        if pending.is_empty() {
            return Ok(());
        }
        self.making_table(|| {
            let mut ingestion = self.tree.ingestion()?;
            let mut last: Option<UserKey> = None;
            // Of each key the newest comes first.
            for entry in pending.iter() {
                let key = entry.key.user_key.clone();
                if last.as_ref() == Some(&key) {
                    continue;
                }
                match entry.is_tombstone() {
                    true => ingestion.write_tombstone(key.clone())?,
                    false => ingestion.write(key.clone(), entry.value)?,
                }
                last = Some(key);
            }
            ingestion.finish()
        })?;
        hot().state_syncs.increment(SYNCS_PER_RUN);
        self.publish(writer, Arc::new(Memtable::new(pending.id() + 1)))
    }

    /// Runs what makes tables, and remembers what it leaves behind if it fails.
    pub(super) fn making_table<T>(
        &self,
        call: impl FnOnce() -> lsm_tree::Result<T>,
    ) -> Result<T, StorageError> {
        let _making = Making::begin(&self.makers);
        let first = self.tree.next_table_id();
        let result = self.counted(self.run(call, Doing::Writing));
        if result.is_err() {
            self.litter(first);
        }
        result
    }

    /// A write for which there was no space has left the tree as it was, and may be made again. That is so unless the
    /// space was lacking at the very end of it, when the system was to sync that `current` names the new version: then
    /// the disk has it, fjall doesn't know, and the next attempt would write over files that count.
    fn counted<T>(&self, result: Result<T, StorageError>) -> Result<T, StorageError> {
        let Err(error) = &result else { return result };
        // In this order: meanwhile another thread may make a version, which the tree knows as soon as the file names it.
        let named = files::current_version(&self.path);
        let known = self.tree.current_version().id();
        if !error.is_full() || named.is_ok_and(|named| named <= known) {
            return result;
        }
        let reason = format!("{error}; which version of the tree counts is unknown");
        self.trust.note(Err(StorageError::SyncFailed { path: self.path.clone(), reason }), |_| false)
    }

    /// Tables numbered `from` or later may be remains.
    fn litter(&self, from: u64) {
        self.litter_from.fetch_min(from, Ordering::Relaxed);
    }
}

/// Somebody makes a table.
struct Making<'a>(&'a Mutex<usize>);

impl<'a> Making<'a> {
    fn begin(makers: &'a Mutex<usize>) -> Making<'a> {
        *count(makers) += 1;
        Making(makers)
    }
}

impl Drop for Making<'_> {
    fn drop(&mut self) {
        *count(self.0) -= 1;
    }
}

// A number can't be left half changed by a panic.
pub(super) fn count(makers: &Mutex<usize>) -> MutexGuard<'_, usize> {
    makers.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A run that becomes a table, or several great ones.
struct FjallRun<'a> {
    engine: &'a FjallEngine,
    /// `None` once it is to be finished.
    ingestion: Option<AnyIngestion<'a>>,
    /// Anything was pushed.
    begun: bool,
    /// Number of its first table, while it isn't part of the tree.
    unfinished: Option<u64>,
    /// Until it is dropped.
    making: Option<Making<'a>>,
}

impl Run for FjallRun<'_> {
    fn push(&mut self, key: &[u8], value: Option<&Bytes>) -> Result<(), StorageError> {
        let Some(ingestion) = &mut self.ingestion else { return Ok(()) };
        self.begun = true;
        self.engine.core.run(
            || match value {
                Some(value) => ingestion.write(key, &value[..]),
                None => ingestion.write_tombstone(key),
            },
            Doing::Writing,
        )
    }

    fn finish(mut self: Box<Self>) -> Result<(), StorageError> {
        let core = &self.engine.core;
        let writer = core.writer();
        // What was written before is older, and must not lie above it.
        core.flush_pending(&writer)?;
        if let Some(ingestion) = self.ingestion.take().filter(|_| self.begun) {
            core.counted(core.run(|| ingestion.finish(), Doing::Writing))?;
        } else {
            // Of a file without a table nobody knows.
            return Ok(());
        }
        self.unfinished = None;
        hot().state_syncs.increment(SYNCS_PER_RUN);
        core.publish(&writer, core.view.load().pending.clone())?;
        drop(writer);
        self.engine.compaction.wake();
        Ok(())
    }
}

impl Drop for FjallRun<'_> {
    fn drop(&mut self) {
        if let Some(first) = self.unfinished {
            drop(self.ingestion.take());
            self.engine.core.litter(first);
            drop(self.making.take());
            // It takes space, which may be what the run has lacked.
            self.engine.compaction.wake();
        }
    }
}

impl Engine for FjallEngine {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StorageError> {
        #[cfg(test)]
        self.core.check_spoilt(key)?;
        let view = self.core.view.load();
        let value = self.core.run(|| view.get(key), Doing::Reading)?;
        // A copy: it may be kept for long, and would keep its whole block.
        Ok(value.map(|value| Bytes::copy_from_slice(&value)))
    }

    fn scan(
        &self,
        from: Bound<&[u8]>,
        to: &[u8],
        visit: &mut dyn FnMut(&[u8], Bytes) -> bool,
    ) -> Result<(), StorageError> {
        self.visit_pairs(from, to, |(key, value)| visit(&key, Bytes::copy_from_slice(&value)))
    }

    fn scan_keys(
        &self,
        from: Bound<&[u8]>,
        to: &[u8],
        visit: &mut dyn FnMut(&[u8]) -> bool,
    ) -> Result<(), StorageError> {
        self.visit_pairs(from, to, |(key, _)| visit(&key))
    }

    fn write(&self, batch: &[Mutation]) -> Result<(), StorageError> {
        let core = &self.core;
        core.trust.check()?;
        let writer = core.writer();
        let view = core.view.load();
        for (key, value) in batch {
            let kind = if value.is_some() { ValueType::Value } else { ValueType::Tombstone };
            let value = value.as_deref().unwrap_or_default();
            view.pending.insert(InternalValue::from_components(&key[..], value, core.next.next(), kind));
        }
        if view.pending.size() < FJALL_PENDING_BYTES {
            return Ok(());
        }
        drop((view, writer));
        core.hold_back()?;
        let writer = core.writer();
        core.flush_pending(&writer)?;
        drop(writer);
        self.compaction.wake();
        Ok(())
    }

    fn begin_run(&self) -> Result<Option<Box<dyn Run + '_>>, StorageError> {
        let core = &self.core;
        core.hold_back()?;
        let making = Making::begin(&core.makers);
        let first = core.tree.next_table_id();
        let ingestion = core.run(|| core.tree.ingestion(), Doing::Writing);
        if ingestion.is_err() {
            core.litter(first);
        }
        let (ingestion, unfinished) = (Some(ingestion?), Some(first));
        Ok(Some(Box::new(FjallRun {
            engine: self,
            ingestion,
            begun: false,
            unfinished,
            making: Some(making),
        })))
    }

    fn forget_range(&self, from: &[u8], to: &[u8]) -> Result<(), StorageError> {
        self.core.drop_tables(from, to)
    }

    fn sync(&self) -> Result<(), StorageError> {
        self.core.trust.check()?;
        if !self.core.view.load().pending.is_empty() {
            self.core.hold_back()?;
        }
        let writer = self.core.writer();
        self.core.flush_pending(&writer)?;
        drop(writer);
        self.compaction.wake();
        Ok(())
    }

    // A run that found no room is nothing, and what was written outside of runs waits in memory. Any other failure to write
    // isn't told as a full disk.
    fn bears_a_full_disk(&self) -> bool {
        true
    }

    fn disk_bytes(&self) -> u64 {
        files::bytes(&self.core.path)
    }

    fn name(&self) -> &'static str {
        NAME
    }
}

impl Store for FjallEngine {
    fn created(&self) -> bool {
        self.created
    }

    fn on_damage(&self, hook: OnDamage) {
        self.core.trust.on_damage(hook);
    }

    #[cfg(test)]
    fn spoil(&self, key: &[u8]) {
        *self.core.spoilt.lock().expect("locked") = Some(key.to_vec());
    }
}

impl Drop for FjallEngine {
    fn drop(&mut self) {
        self.core.ending.begin();
    }
}

/// What fjall is asked to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Doing {
    /// Nothing is written, or nothing that counts yet.
    Reading,
    /// Files are written and synced; others may be read for that.
    Writing,
}

/// Runs a call of fjall and makes errors and panics ours.
fn contain<T>(
    path: &Path,
    call: impl FnOnce() -> lsm_tree::Result<T>,
    doing: Doing,
) -> Result<T, StorageError> {
    let error = match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(error)) => error,
        Err(panic) => return Err(damaged(path, &format!("{PANICKED}: {}", panic_text(panic.as_ref())))),
    };
    match error {
        lsm_tree::Error::Io(error) if error.kind() == ErrorKind::Interrupted => {
            let reason = format!("{}: a merge was given up", path.display());
            Err(StorageError::Engine { engine: NAME, reason })
        }
        // What it has noted of a file isn't there, or leads to a place that is none.
        lsm_tree::Error::Io(error)
            if matches!(
                error.kind(),
                ErrorKind::UnexpectedEof
                    | ErrorKind::NotFound
                    | ErrorKind::InvalidData
                    | ErrorKind::InvalidInput
            ) =>
        {
            Err(damaged(path, &format!("a file is too short, gone, or none: {error}")))
        }
        lsm_tree::Error::Io(error) => {
            let error = io_error("reading or writing in", path)(error);
            // Whether it was a sync that failed isn't known, so it counts as one.
            match doing {
                Doing::Writing if !error.is_full() => {
                    Err(StorageError::SyncFailed { path: path.to_owned(), reason: error.to_string() })
                }
                _ => Err(error),
            }
        }
        lsm_tree::Error::InvalidVersion(found) => Err(IdentityError::Newer {
            path: path.display().to_string(),
            found: found.into(),
            known: FJALL_FORMAT,
        }
        .into()),
        error => Err(damaged(path, &format!("fjall can't read it: {error:?}"))),
    }
}

#[cfg(test)]
#[path = "engine_fjall_tests.rs"]
mod tests;
