//! The thread that merges the tables of a fjall tree, so that few have to be looked at for a read.
//!
//! One thread, which lets all others have the cores first. It is woken after each flush and works until there is
//! nothing to merge. Who would make a table and finds too many merges them itself, or waits for that: so
//! writes are held back where merging can't keep up.

use std::io;
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, MutexGuard, PoisonError, TryLockError};
use std::thread::JoinHandle;
use std::time::Duration;

use lsm_tree::compaction::Leveled;
use lsm_tree::compaction::filter::{CompactionFilter, Context, Factory, ItemAccessor, Verdict};
use lsm_tree::{AbstractTree, KeyRange};

use super::atomic_file::io_error;
use super::engine_fjall::{Core, count};
use super::{StorageError, fjall_files as files, pulse};
use crate::limits::{COMPACTION_NICE, FJALL_RUNS_MAX, FJALL_SPARED_BYTES, FJALL_TABLES_WAITING_MAX};
use crate::nice::be_nice;

/// A merge looks after the free space each time that it has come so many bytes further.
const FREE_LOOK_BYTES: usize = 1 << 20;
/// Time between looks of who waits for a merge of somebody else's.
const HELD_BACK_LOOK: Duration = Duration::from_millis(5);

/// Has merges given up once the store is being closed: a great one takes seconds, and changes nothing
/// before it is done.
#[derive(Clone, Default)]
pub(super) struct Ending {
    begun: Arc<AtomicBool>,
    /// Pairs that merges have come to.
    pub(super) steps: Arc<AtomicU64>,
}

impl Ending {
    pub fn begin(&self) {
        self.begun.store(true, Ordering::Relaxed);
    }

    pub fn has_begun(&self) -> bool {
        self.begun.load(Ordering::Relaxed)
    }

    /// Another number each time, as long as a merge gets on.
    fn steps(&self) -> u64 {
        self.steps.load(Ordering::Relaxed)
    }
}

/// Makes the [`Attendant`] of each merge.
pub(super) struct Attendants {
    /// Directory of the tree.
    pub dir: PathBuf,
    pub ending: Ending,
    /// Tells how many bytes are free there, if that can be told.
    pub free: fn(&Path) -> Option<u64>,
}

impl Factory for Attendants {
    fn name(&self) -> &str {
        "attendants"
    }

    fn make_filter(&self, _: &Context) -> Box<dyn CompactionFilter> {
        // Where there is little, a small merge may still make some.
        let spared = (self.free)(&self.dir).map_or(0, |free| FJALL_SPARED_BYTES.min(free / 2));
        let (dir, ending) = (self.dir.clone(), self.ending.clone());
        Box::new(Attendant { dir, ending, free: self.free, spared, unlooked: 0 })
    }
}

/// Is there at each step of one merge. Gives it up if the store is being closed, or if it would take the last of the disk
/// from flushes and logs: it writes anew whatever it merges, before anything of that is removed.
struct Attendant {
    dir: PathBuf,
    ending: Ending,
    free: fn(&Path) -> Option<u64>,
    spared: u64,
    /// Bytes since the free ones were last looked at.
    unlooked: usize,
}

impl CompactionFilter for Attendant {
    fn filter_item(&mut self, item: ItemAccessor<'_>, _: &Context) -> lsm_tree::Result<Verdict> {
        if self.ending.has_begun() {
            return Err(io::Error::from(io::ErrorKind::Interrupted).into());
        }
        self.ending.steps.fetch_add(1, Ordering::Relaxed);
        // Who merges because it is held back is watched.
        pulse::beat();
        self.unlooked += item.key().len() + item.value()?.len();
        if self.unlooked >= FREE_LOOK_BYTES {
            self.unlooked = 0;
            if (self.free)(&self.dir).is_some_and(|free| free < self.spared) {
                return Err(io::Error::from(io::ErrorKind::StorageFull).into());
            }
        }
        Ok(Verdict::Keep)
    }
}

/// Its handle. Dropping it ends the thread.
pub(super) struct Compaction {
    wake: Option<SyncSender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Compaction {
    pub fn start(core: Arc<Core>) -> std::io::Result<Compaction> {
        let (wake, woken) = sync_channel(1);
        let thread =
            std::thread::Builder::new().name("compaction".into()).spawn(move || run(&core, &woken))?;
        Ok(Compaction { wake: Some(wake), thread: Some(thread) })
    }

    /// There may be something to do.
    pub fn wake(&self) {
        // It is woken already, or has ended since the store is broken.
        let _ = self.wake.as_ref().map(|wake| wake.try_send(()));
    }
}

impl Drop for Compaction {
    fn drop(&mut self) {
        drop(self.wake.take());
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the compaction thread has panicked");
        }
    }
}

fn run(core: &Core, woken: &Receiver<()>) {
    be_nice("compaction", COMPACTION_NICE);
    let mut told = false;
    while woken.recv().is_ok() {
        // Whatever goes wrong, the tree is as it was before, unless the store is broken.
        loop {
            match core.compact() {
                Ok(true) => told = false,
                Ok(false) => break,
                Err(error) if core.is_broken() => {
                    tracing::error!(%error, "merging tables of the state store");
                    return;
                }
                // Once: what waits for room wakes it some times a second.
                Err(error) if error.is_full() && std::mem::replace(&mut told, true) => {
                    tracing::debug!(%error, "merging tables of the state store, still");
                    break;
                }
                Err(error) => {
                    tracing::warn!(%error, "merging tables of the state store; tried again after the next flush");
                    break;
                }
            }
        }
    }
}

impl Core {
    /// Removes remains of tables, unless one is being made.
    fn tidy(&self) {
        let from = self.litter_from.load(Ordering::Relaxed);
        // What a broken store has on disk may be more than it knows of.
        if from == u64::MAX || self.is_broken() {
            return;
        }
        let makers = count(&self.makers);
        if *makers > 0 {
            return;
        }
        // What is no part of the tree any more may still be read.
        let views = self.older_views.lock().unwrap_or_else(PoisonError::into_inner);
        if views.iter().any(|view| view.strong_count() > 0) {
            return;
        }
        drop(views);
        match files::remove_litter(&self.path, &self.tree, from) {
            Ok(()) => self.litter_from.store(u64::MAX, Ordering::Relaxed),
            Err(error) => tracing::warn!(%error, "remains of tables of the state store stay"),
        }
    }

    /// Merges some tables, if there is anything to merge. True: something was done.
    pub fn compact(&self) -> Result<bool, StorageError> {
        let merging = self.merging.lock().unwrap_or_else(PoisonError::into_inner);
        self.merge(&merging)
    }

    /// The same, by who has the lock.
    pub(super) fn merge(&self, _merging: &MutexGuard<'_, ()>) -> Result<bool, StorageError> {
        if self.ending.has_begun() {
            return Ok(false);
        }
        self.tidy();
        let free = files::free_bytes(&self.path);
        let refused = self.refused.load(Ordering::Relaxed);
        if free.is_some_and(|free| free <= refused + refused / 8) {
            // It would write as much again, and come as far as it did.
            return Err(io_error("merging tables in", &self.path)(io::ErrorKind::StorageFull.into()));
        }
        let before = self.tree.current_version().id();
        let merged = self.making_table(|| self.tree.compact(Arc::new(Leveled::default()), self.next.get()));
        if self.ending.has_begun() {
            return Ok(false);
        }
        match &merged {
            Ok(()) => self.refused.store(0, Ordering::Relaxed),
            Err(error) if error.is_full() => {
                // At once: what it has written is what others lack now.
                self.tidy();
                self.refused.store(free.unwrap_or(0), Ordering::Relaxed);
            }
            Err(_) => {}
        }
        merged?;
        if self.tree.current_version().id() == before {
            return Ok(false);
        }
        let writer = self.writer();
        let pending = self.view.load().pending.clone();
        self.publish(&writer, pending)?;
        Ok(true)
    }

    /// Drops the tables that have nothing but keys of `[from, to)`, which costs no more than a new version of the tree.
    /// Nothing is dropped while tables are merged, which may take minutes, or for want of space.
    pub fn drop_tables(&self, from: &[u8], to: &[u8]) -> Result<(), StorageError> {
        let Ok(_merging) = self.merging.try_lock() else { return Ok(()) };
        let within = |range: &KeyRange| from <= &range.min()[..] && (to.is_empty() || &range.max()[..] < to);
        let version = self.tree.current_version();
        if !version.iter_tables().any(|table| within(&table.metadata.key_range)) {
            return Ok(());
        }
        // It keeps the files until it is dropped.
        drop(version);
        let upper = if to.is_empty() { Bound::Unbounded } else { Bound::Excluded(to) };
        match self.making_table(|| self.tree.drop_range::<&[u8], _>((Bound::Included(from), upper))) {
            Err(error) if error.is_full() => return Ok(()),
            dropped => dropped?,
        }
        let writer = self.writer();
        let pending = self.view.load().pending.clone();
        self.publish(&writer, pending)
    }

    /// Waits until there is room for another table. As long as the merging gets on, so does the calling thread, whoever
    /// does it: on a slow disk a merge takes minutes.
    pub fn hold_back(&self) -> Result<(), StorageError> {
        while self.tree.level_table_count(0).unwrap_or(0) >= FJALL_TABLES_WAITING_MAX {
            let merging = match self.merging.try_lock() {
                Ok(merging) => merging,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => {
                    let before = self.ending.steps();
                    std::thread::sleep(HELD_BACK_LOOK);
                    if self.ending.steps() != before {
                        pulse::beat();
                    }
                    continue;
                }
            };
            match self.merge(&merging) {
                Ok(true) => pulse::beat(),
                // There may be room for the table all the same.
                Ok(false) => break,
                Err(error) if error.is_full() && self.tree.l0_run_count() < FJALL_RUNS_MAX => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
