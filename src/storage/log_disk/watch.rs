//! Watches what the engine does to its files, and keeps the mark ([`super::mark`]) true to it.
//!
//! The engine works on a [`WatchedFiles`] in front of the real file system. What is seen there:
//!
//! - *Syncs and appends*: how far each queue is durable. Only that goes into a [`Reach`].
//! - *Removals*: a file that is deleted, or renamed to be used again, must first have gone from the
//!   durable mark.
//! - *Cuts*: recovery cuts off what it takes for a torn tail. It is stopped where the mark says that this
//!   was acknowledged, and the file stays as it is.
//!
//! Locks: the mark's, then the state's; neither is held while the engine is called.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use raft_engine::env::{FileSystem, Handle, Permission};
use raft_engine::internals::{EventListener, FileBlockHandle, FileId, LogQueue};

use super::ahead::AheadWriter;
use super::check::{FILE_HEAD_BYTES, Listing, file_name, parse_name};
use super::mark::{MarkFile, QUEUES, Reach, Span};
use crate::ids::StoreId;
use crate::storage::{StorageError, atomic_file};
use crate::telemetry::hot::hot;

/// What is known of the engine's files.
pub struct Watch<F: FileSystem> {
    files: Arc<F>,
    dir: PathBuf,
    /// What recovery must not cut into.
    floor: Reach,
    state: Mutex<State>,
    /// `None` until the log is open.
    mark: Mutex<Option<MarkFile<F>>>,
}

#[derive(Default)]
struct State {
    writes: u64,
    queues: [Queue; 2],
    /// The engine has recovered: from here on everything counts.
    running: bool,
    /// Files have gone since it was last asked.
    freed: bool,
    /// The cut that recovery wanted to make and mustn't.
    refused_cut: Option<String>,
}

/// Files of a queue. Invariant: `synced <= written`, and `closed` has every file of `first..last`.
#[derive(Default)]
struct Queue {
    first: u64,
    last: u64,
    closed: BTreeMap<u64, u64>,
    closed_bytes: u64,
    /// End of the last batch in the last file, and as much of it as was synced.
    written: u64,
    synced: u64,
}

impl Queue {
    fn span(&self) -> Span {
        Span { first: self.first, last: self.last, closed_bytes: self.closed_bytes, end: self.synced }
    }

    /// Files before `first` aren't needed any more. False: they weren't before.
    fn raise(&mut self, first: u64) -> bool {
        if first <= self.first {
            return false;
        }
        self.first = first;
        self.closed = self.closed.split_off(&first);
        self.closed_bytes = self.closed.values().sum();
        true
    }
}

impl State {
    fn reach(&self) -> Reach {
        Reach { writes: self.writes, spans: [self.queues[0].span(), self.queues[1].span()] }
    }
}

impl<F: FileSystem> Watch<F> {
    /// Begins to watch `files`, whose log must reach as far as `floor`.
    pub fn new(files: Arc<F>, dir: &Path, floor: Reach) -> Arc<Watch<F>> {
        let (state, mark) = (Mutex::default(), Mutex::new(None));
        Arc::new(Watch { files, dir: dir.to_owned(), floor, state, mark })
    }

    /// The engine has recovered and uses the files of `spans`; `listing` has the sizes of the closed
    /// ones. What a killed process left in the last ones, though the engine takes it for written, may not
    /// be on the disk: it is synced here.
    pub fn start(&self, spans: [(u64, u64); 2], listing: &Listing, writes: u64) -> Result<(), StorageError> {
        let mut queues: [Queue; 2] = Default::default();
        for ((queue, id), (first, last)) in queues.iter_mut().zip(QUEUES).zip(spans) {
            let path = self.dir.join(file_name(id, last));
            let handle = self.files.open(&path, Permission::ReadWrite);
            let handle = handle.map_err(atomic_file::io_error("opening", &path))?;
            handle.sync().map_err(atomic_file::sync_error(&path))?;
            let end = handle.file_size().map_err(atomic_file::io_error("measuring", &path))? as u64;
            let closed: BTreeMap<u64, u64> =
                listing[id as usize].range(first..last).map(|(seq, bytes)| (*seq, *bytes)).collect();
            let closed_bytes = closed.values().sum();
            *queue = Queue { first, last, closed, closed_bytes, written: end, synced: end };
        }
        let mut state = self.state();
        state.queues = queues;
        state.writes = writes;
        state.running = true;
        Ok(())
    }

    /// Writes the mark for the first time since the start, durably.
    pub fn open_mark(&self, path: &Path, store_id: StoreId, version: u64) -> Result<(), StorageError> {
        let mut mark = self.mark();
        *mark = Some(MarkFile::open(&*self.files, path, store_id, version, &self.state().reach())?);
        Ok(())
    }

    /// Removes a file that the engine doesn't know of.
    pub fn remove(&self, path: &Path) -> io::Result<()> {
        self.before_removal(path)?;
        self.files.delete(path)
    }

    /// What the next synced batch carries: its own number, and what is durable before it.
    pub fn next(&self) -> Reach {
        let mut reach = self.state().reach();
        reach.writes += 1;
        reach
    }

    /// That batch is durable. An error means that a sync failed: it is as if it were the log's.
    pub fn acknowledge(&self, writes: u64) -> Result<(), String> {
        let mut mark = self.mark();
        let reach = {
            let mut state = self.state();
            state.writes = writes;
            state.reach()
        };
        let Some(mark) = &mut *mark else {
            return Ok(());
        };
        // Once per file, so that even after a power cut a last file that is gone is missed.
        let has_begun = |q: usize| reach.spans[q].last > mark.durable().spans[q].last;
        if (has_begun(0) || has_begun(1)) && mark.note_durably(&reach).is_ok() {
            return Ok(());
        }
        if let Some(reason) = mark.failed() {
            return Err(reason.to_owned());
        }
        mark.note(&reach);
        Ok(())
    }

    /// A purge has ended and left the files from `first` on. Whether any has gone since the last time.
    pub fn purged(&self, first: [u64; 2]) -> bool {
        let mut mark = self.mark();
        let (freed, reach) = {
            let mut state = self.state();
            for (queue, first) in first.into_iter().enumerate() {
                state.freed |= state.queues[queue].raise(first);
            }
            (std::mem::take(&mut state.freed), state.reach())
        };
        if freed && let Some(mark) = &mut *mark {
            mark.note(&reach);
        }
        freed
    }

    /// Makes the mark durable, if it isn't: the log is closed.
    pub fn close(&self) {
        let mut mark = self.mark();
        let reach = self.state().reach();
        if let Some(mark) = &mut *mark
            && *mark.durable() != reach
            && let Err(error) = mark.note_durably(&reach)
        {
            tracing::warn!(%error, "the mark of the raft log may not survive a power loss");
        }
    }

    /// Why the mark's sync failed, if it did.
    pub fn failed(&self) -> Option<String> {
        self.mark().as_ref().and_then(|mark| mark.failed().map(str::to_owned))
    }

    /// The cut that recovery wanted to make into what was acknowledged.
    pub fn refused_cut(&self) -> Option<String> {
        self.state().refused_cut.clone()
    }

    /// A file is about to go. A purge has synced what it moved out of it: so what is durable of either
    /// queue now makes up for it, and no mark may ask for it from here on.
    fn before_removal(&self, path: &Path) -> io::Result<()> {
        let Some(FileId { queue, seq }) = path.file_name().and_then(parse_name) else {
            return Ok(());
        };
        let mut mark = self.mark();
        let reach = {
            let mut state = self.state();
            if !state.running {
                return Ok(());
            }
            state.freed |= state.queues[queue as usize].raise(seq + 1);
            state.reach()
        };
        match &mut *mark {
            Some(mark) if mark.durable().spans[queue as usize].first <= seq => mark.note_durably(&reach),
            _ => Ok(()),
        }
    }

    fn may_cut(&self, FileId { queue, seq }: FileId, offset: usize) -> io::Result<()> {
        let span = self.floor.spans[queue as usize];
        if seq < span.last || (seq == span.last && (offset as u64) < span.end) {
            let name = file_name(queue, seq);
            let reason = format!(
                "what {name} holds from byte {offset} on can't be read, and up to byte {} of {} it was written",
                span.end,
                file_name(queue, span.last)
            );
            self.state().refused_cut.get_or_insert(reason.clone());
            return Err(io::Error::other(reason));
        }
        Ok(())
    }

    /// How much of a file is written, if it is its queue's last.
    fn written(&self, id: FileId) -> Option<u64> {
        let state = self.state();
        let queue = &state.queues[id.queue as usize];
        (state.running && queue.last == id.seq).then_some(queue.written)
    }

    fn synced(&self, id: FileId, end: u64) {
        let mut state = self.state();
        let queue = &mut state.queues[id.queue as usize];
        if queue.last == id.seq {
            queue.synced = queue.synced.max(end);
        }
    }

    // No panic can leave these half changed.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn mark(&self) -> MutexGuard<'_, Option<MarkFile<F>>> {
        self.mark.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Hears from the engine what it writes.
pub struct Listener<F: FileSystem>(pub Arc<Watch<F>>);

impl<F: FileSystem> EventListener for Listener<F> {
    /// The engine has closed and synced the file before, and synced the head and the name of this one.
    fn post_new_log_file(&self, id: FileId) {
        let mut state = self.0.state();
        if !state.running {
            return;
        }
        let queue = &mut state.queues[id.queue as usize];
        queue.closed.insert(queue.last, queue.written);
        queue.closed_bytes += queue.written;
        queue.last = id.seq;
        (queue.written, queue.synced) = (FILE_HEAD_BYTES, FILE_HEAD_BYTES);
    }

    fn on_append_log_file(&self, handle: FileBlockHandle) {
        let mut state = self.0.state();
        let queue = &mut state.queues[handle.id.queue as usize];
        if queue.last == handle.id.seq {
            queue.written = handle.offset + handle.len as u64;
        }
    }
}

/// The file system, watched.
pub struct WatchedFiles<F: FileSystem>(pub Arc<Watch<F>>);

/// An open file.
pub struct WatchedHandle<F: FileSystem> {
    inner: Arc<F::Handle>,
    watch: Arc<Watch<F>>,
    /// `None`: no file of a queue.
    id: Option<FileId>,
}

impl<F: FileSystem> WatchedFiles<F> {
    fn watched(&self, path: &Path, inner: F::Handle) -> WatchedHandle<F> {
        let id = path.file_name().and_then(parse_name);
        WatchedHandle { inner: Arc::new(inner), watch: self.0.clone(), id }
    }
}

impl<F: FileSystem> FileSystem for WatchedFiles<F> {
    type Handle = WatchedHandle<F>;
    type Reader = F::Reader;
    type Writer = AheadWriter<F::Writer>;

    fn create<P: AsRef<Path>>(&self, path: P) -> io::Result<WatchedHandle<F>> {
        let inner = self.0.files.create(path.as_ref())?;
        Ok(self.watched(path.as_ref(), inner))
    }

    fn open<P: AsRef<Path>>(&self, path: P, permission: Permission) -> io::Result<WatchedHandle<F>> {
        let inner = self.0.files.open(path.as_ref(), permission)?;
        Ok(self.watched(path.as_ref(), inner))
    }

    fn delete<P: AsRef<Path>>(&self, path: P) -> io::Result<()> {
        self.0.before_removal(path.as_ref())?;
        self.0.files.delete(path)
    }

    fn rename<P: AsRef<Path>>(&self, from: P, to: P) -> io::Result<()> {
        self.0.before_removal(from.as_ref())?;
        self.0.files.rename(from, to)
    }

    fn reuse<P: AsRef<Path>>(&self, from: P, to: P) -> io::Result<()> {
        self.0.before_removal(from.as_ref())?;
        self.0.files.reuse(from, to)
    }

    fn delete_metadata<P: AsRef<Path>>(&self, path: P) -> io::Result<()> {
        self.0.files.delete_metadata(path)
    }

    fn exists_metadata<P: AsRef<Path>>(&self, path: P) -> bool {
        self.0.files.exists_metadata(path)
    }

    fn new_reader(&self, handle: Arc<WatchedHandle<F>>) -> io::Result<F::Reader> {
        self.0.files.new_reader(handle.inner.clone())
    }

    fn new_writer(&self, handle: Arc<WatchedHandle<F>>) -> io::Result<AheadWriter<F::Writer>> {
        // The other queue is written in great pieces, seldom.
        let is_appended = handle.id.is_some_and(|id| id.queue == LogQueue::Append);
        Ok(AheadWriter::new(self.0.files.new_writer(handle.inner.clone())?, is_appended))
    }
}

impl<F: FileSystem> Handle for WatchedHandle<F> {
    /// Only recovery calls this; the engine's writers cut through their own.
    fn truncate(&self, offset: usize) -> io::Result<()> {
        if let Some(id) = self.id {
            self.watch.may_cut(id, offset)?;
        }
        self.inner.truncate(offset)
    }

    fn file_size(&self) -> io::Result<usize> {
        self.inner.file_size()
    }

    fn sync(&self) -> io::Result<()> {
        // What is written meanwhile may not be covered.
        let written = self.id.and_then(|id| Some((id, self.watch.written(id)?)));
        hot().log_syncs.increment(1);
        self.inner.sync()?;
        if let Some((id, end)) = written {
            self.watch.synced(id, end);
        }
        Ok(())
    }
}
