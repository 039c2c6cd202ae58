//! Snapshots of a shard: made from a replica's state while it is written to, and loaded into a new
//! generation of another replica's.
//!
//! ```text
//! flush thread   ─ flush ─┬──── flush ────── flush ──┬─ flush ─
//!                    begin│A    └─ redo ─┐   └ redo ┐│end B
//! snapshot thread         └─ scan … scan … scan … ──┴┴ overlay, overlay ─► file, exact at B
//! ```
//!
//! *Why it is exact.* Begin and end fall between flushes, when the engine holds whole flushes only: A
//! is what it holds at the begin, B at the end. The scan sees each key as it was after some flush in
//! between, or during one. A key that none of these flushes touched is as it was at A and at B. A
//! key that one touched is in that flush's redo file, and the last of them says what it is at B. So
//! the scan with all redo sections laid over it, in order, is the state at B. That the sections follow
//! one another from A to B without a gap is checked.
//!
//! *Loading.* A file is read whole and verified before anything of it is loaded, and verified again as
//! it is loaded. It goes into a generation that holds nothing, the header last, and is synced. Until
//! [`super::log::LogStore::install`] names that generation nobody reads it.
//!
//! Everything here is done in steps whose size the caller chooses, on a thread of the caller's: between
//! two steps it may pause, or give up by dropping what it holds.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use super::atomic_file::{self, io_error, sync_error};
use super::collect::{Collected, Collection};
use super::engine::Engine;
use super::flush_batch::Batch;
use super::redo::{self, RedoReader, Section};
use super::snapshot_file::{
    self as format, HEAD_BYTES, Origin, ReadError, Record, SnapshotReader, SnapshotWriter, Summary,
    TAIL_BYTES,
};
use super::state::StateHeader;
use super::{StorageError, generations, keys};
use crate::ids::{Index, ReplicaId};
use crate::limits::SNAPSHOT_SYNC_BYTES;
use crate::telemetry::hot::hot;

const BUFFER_BYTES: usize = 256 * 1024;

/// A complete snapshot file.
#[derive(Clone, PartialEq, Debug)]
pub struct SnapshotFile {
    /// Where it is.
    pub path: PathBuf,
    /// Its length.
    pub bytes: u64,
    /// Where it comes from.
    pub origin: Origin,
    /// What its end says.
    pub summary: Summary,
}

impl SnapshotFile {
    /// Looks at the beginning and the end of a file that this node has completed once. What lies
    /// between may be damaged: whoever loads it verifies it.
    pub fn look(path: &Path) -> Result<SnapshotFile, StorageError> {
        let read = || -> Result<(u64, Origin, Summary), ReadError> {
            let mut file = File::open(path).map_err(ReadError::Io)?;
            let bytes = file.metadata().map_err(ReadError::Io)?.len();
            let short = || ReadError::Damaged(format!("{bytes} bytes are no snapshot"));
            let tail_at = bytes.checked_sub(TAIL_BYTES as u64).ok_or_else(short)?;
            let mut head = [0; HEAD_BYTES];
            let mut tail = [0; TAIL_BYTES];
            file.read_exact(&mut head).map_err(|_| short())?;
            file.seek(SeekFrom::Start(tail_at)).map_err(ReadError::Io)?;
            file.read_exact(&mut tail).map_err(ReadError::Io)?;
            let end_at = format::read_tail(&tail)?;
            let len = tail_at.checked_sub(end_at).filter(|len| *len <= format::END_BLOCK_BYTES_MAX);
            let len = len.ok_or_else(|| ReadError::Damaged("its end is not where it should be".into()))?;
            let mut end = Vec::new();
            file.seek(SeekFrom::Start(end_at)).map_err(ReadError::Io)?;
            file.take(len).read_to_end(&mut end).map_err(ReadError::Io)?;
            Ok((bytes, format::read_origin(&head)?, format::read_end(&end)?))
        };
        let (bytes, origin, summary) = read().map_err(|error| read_error(path, error))?;
        Ok(SnapshotFile { path: path.to_owned(), bytes, origin, summary })
    }

    /// Verifies a whole file at once. For one that may be large: [`SnapshotCheck`].
    pub fn verify(path: &Path) -> Result<SnapshotFile, StorageError> {
        let mut check = SnapshotCheck::open(path)?;
        loop {
            if let Some(file) = check.step(u64::MAX)? {
                return Ok(file);
            }
        }
    }
}

fn read_error(path: &Path, error: ReadError) -> StorageError {
    match error {
        ReadError::Io(error) => io_error("reading", path)(error),
        ReadError::Damaged(detail) => {
            StorageError::Damaged { what: format!("snapshot file {}", path.display()), detail }
        }
    }
}

fn open_reader(path: &Path) -> Result<SnapshotReader<BufReader<File>>, StorageError> {
    let file = File::open(path).map_err(io_error("opening", path))?;
    SnapshotReader::new(BufReader::with_capacity(BUFFER_BYTES, file)).map_err(|error| read_error(path, error))
}

/// Verifies a file in steps: every byte of it.
pub struct SnapshotCheck {
    path: PathBuf,
    reader: SnapshotReader<BufReader<File>>,
}

impl SnapshotCheck {
    /// Opens the file and reads its head.
    pub fn open(path: &Path) -> Result<SnapshotCheck, StorageError> {
        Ok(SnapshotCheck { path: path.to_owned(), reader: open_reader(path)? })
    }

    /// Reads on for about `bytes`; the file, if that was the rest of it and all of it is whole.
    pub fn step(&mut self, bytes: u64) -> Result<Option<SnapshotFile>, StorageError> {
        let mut done = 0;
        while done < bytes {
            match self.reader.read().map_err(|error| read_error(&self.path, error))? {
                Some(record) => done += record.size(),
                None => break,
            }
        }
        Ok(self.reader.summary().map(|summary| SnapshotFile {
            path: self.path.clone(),
            bytes: self.reader.bytes(),
            origin: self.reader.origin(),
            summary: summary.clone(),
        }))
    }
}

/// What a step of a [`SnapshotBuilder`] came to.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "looked at once and gone; the large one comes once per file")]
pub enum BuildStep {
    /// There is more to do.
    More,
    /// The scan is complete: the collection is to be ended ([`super::flush::Flusher::end_collection`])
    /// and its files given to [`SnapshotBuilder::lay_over`].
    Scanned,
    /// The file is durable under its name.
    Complete(SnapshotFile),
}

/// Makes a snapshot file in steps. See the module page.
pub struct SnapshotBuilder {
    writer: SnapshotWriter<Unfinished>,
    origin: Origin,
    path: PathBuf,
    engine: Arc<dyn Engine>,
    collection: Collection,
    stage: Stage,
}

enum Stage {
    /// Keys up to this one are copied; `None`: none yet.
    Scanning(Option<Vec<u8>>),
    Scanned,
    Overlaying(Box<Overlays>),
    Complete,
}

struct Overlays {
    collected: Collected,
    /// Redo files yet to be copied, the oldest last.
    left: Vec<(u64, PathBuf)>,
    /// Where the state stands without them.
    reached: StateHeader,
}

impl SnapshotBuilder {
    /// Begins a file of at most `bytes_max` bytes at `path`, which gets this name when it is complete.
    /// `collection` runs in the flusher of `engine`.
    pub fn create(
        path: PathBuf,
        bytes_max: u64,
        origin: Origin,
        engine: Arc<dyn Engine>,
        collection: Collection,
    ) -> Result<SnapshotBuilder, StorageError> {
        let out = Unfinished::create(&path, bytes_max)?;
        let temporary = out.path.clone();
        let writer = SnapshotWriter::new(out, origin).map_err(io_error("writing", &temporary))?;
        Ok(SnapshotBuilder { writer, origin, path, engine, collection, stage: Stage::Scanning(None) })
    }

    /// The collection that its overlays come from.
    pub fn collection(&self) -> &Collection {
        &self.collection
    }

    /// Bytes written so far.
    pub fn bytes(&self) -> u64 {
        self.writer.bytes()
    }

    /// Copies about `bytes` of the scan, or one redo file.
    pub fn step(&mut self, bytes: usize) -> Result<BuildStep, StorageError> {
        match std::mem::replace(&mut self.stage, Stage::Complete) {
            Stage::Scanning(last) => {
                self.stage = self.scan(last, bytes)?;
            }
            Stage::Scanned => self.stage = Stage::Scanned,
            Stage::Overlaying(mut overlays) => {
                let Some((sequence, path)) = overlays.left.pop() else {
                    return self.complete(&overlays).map(BuildStep::Complete);
                };
                overlays.reached = self.overlay(&path, sequence, overlays.reached)?;
                self.stage = Stage::Overlaying(overlays);
            }
            Stage::Complete => return Err(self.misuse("it has failed, or is complete")),
        }
        Ok(match self.stage {
            Stage::Scanned => BuildStep::Scanned,
            _ => BuildStep::More,
        })
    }

    /// Takes the redo files that were kept while the scan ran.
    pub fn lay_over(&mut self, collected: Collected) -> Result<(), StorageError> {
        if !matches!(self.stage, Stage::Scanned) {
            return Err(self.misuse("redo files were given to it before or after their time"));
        }
        let left = collected.files.links.iter().rev().cloned().collect();
        let reached = self.collection.base.clone();
        self.stage = Stage::Overlaying(Box::new(Overlays { collected, left, reached }));
        Ok(())
    }

    fn scan(&mut self, last: Option<Vec<u8>>, bytes: usize) -> Result<Stage, StorageError> {
        let Collection { replica, generation, .. } = self.collection;
        let (first, end) = keys::generation_range(replica, generation);
        let from = match &last {
            Some(last) => Bound::Excluded(&last[..]),
            None => Bound::Included(&first[..]),
        };
        // Copied before it is written: nobody may wait for the disk within the engine.
        let mut page: Vec<(Vec<u8>, Bytes)> = Vec::new();
        let mut size = 0;
        self.engine.scan(from, &end, &mut |key, value| {
            size += key.len() + value.len();
            page.push((key.to_vec(), value));
            size < bytes
        })?;
        for (key, value) in &page {
            let local = keys::local_key(key).unwrap_or_default();
            if local.first() != Some(&keys::KIND_HEADER) {
                self.change(local, Some(value))?;
            }
        }
        Ok(match page.pop() {
            Some((last, _)) => Stage::Scanning(Some(last)),
            None => Stage::Scanned,
        })
    }

    /// Lays the replica's sections of a redo file over what there is; where the state then stands.
    fn overlay(
        &mut self,
        path: &Path,
        sequence: u64,
        mut reached: StateHeader,
    ) -> Result<StateHeader, StorageError> {
        let mut reader = RedoReader::open(path, sequence)?;
        let mut ours = false;
        while let Some(record) = reader.read()? {
            match record {
                redo::Record::Section(section) => {
                    ours = (section.replica, section.generation)
                        == (self.collection.replica, self.collection.generation);
                    if ours {
                        follows(path, reached.applied.index, &section)?;
                        reached = section.header;
                        self.writer.overlay().map_err(self.write_error())?;
                    }
                }
                redo::Record::Change(kind, key, value) if ours => {
                    let local = [&[kind], &key[..]].concat();
                    self.change(&local, value.as_ref())?;
                }
                redo::Record::Change(..) => {}
            }
        }
        Ok(reached)
    }

    fn change(&mut self, local: &[u8], value: Option<&Bytes>) -> Result<(), StorageError> {
        self.writer.change(local, value.map(|value| &value[..])).map_err(self.write_error())?;
        self.writer.output_mut().pace()
    }

    fn complete(&mut self, overlays: &Overlays) -> Result<SnapshotFile, StorageError> {
        let Overlays { collected, reached: header, .. } = overlays;
        if *header != collected.header {
            return Err(self.misuse(&format!(
                "it has reached entry {} and the state is at {}: a flush is missing",
                header.applied.index, collected.header.applied.index
            )));
        }
        let error = self.write_error();
        let summary = self.writer.finish(header).map_err(error)?;
        let bytes = self.writer.bytes();
        self.writer.output_mut().finish(&self.path)?;
        Ok(SnapshotFile { path: self.path.clone(), bytes, origin: self.origin, summary })
    }

    fn write_error(&self) -> impl FnOnce(io::Error) -> StorageError + use<> {
        io_error("writing", &self.writer.output().path)
    }

    fn misuse(&self, reason: &str) -> StorageError {
        StorageError::Engine {
            engine: "snapshot",
            reason: format!("making a snapshot of replica {}: {reason}", self.collection.replica),
        }
    }
}

/// A section leads on from the state that was reached before; else a flush is missing between.
fn follows(path: &Path, reached: Index, section: &Section) -> Result<(), StorageError> {
    if section.base == reached {
        return Ok(());
    }
    Err(StorageError::Damaged {
        what: format!("redo file {}", path.display()),
        detail: format!(
            "it leads replica {} on from entry {}, but the snapshot has reached {reached}",
            section.replica, section.base
        ),
    })
}

/// Loads a verified file into a generation of a replica's state, in steps.
pub struct SnapshotLoader {
    file: SnapshotFile,
    reader: SnapshotReader<BufReader<File>>,
    engine: Arc<dyn Engine>,
    replica: ReplicaId,
    generation: u32,
    complete: bool,
}

impl SnapshotLoader {
    /// Begins to load. An error if the generation holds anything: what a load that was given up left
    /// is to be destroyed first ([`generations::destroy`]).
    pub fn open(
        file: SnapshotFile,
        engine: Arc<dyn Engine>,
        replica: ReplicaId,
        generation: u32,
    ) -> Result<SnapshotLoader, StorageError> {
        if !generations::is_empty(&*engine, replica, generation)? {
            return Err(StorageError::Engine {
                engine: engine.name(),
                reason: format!(
                    "generation {generation} of replica {replica} isn't empty: a snapshot can't be loaded into it"
                ),
            });
        }
        let reader = open_reader(&file.path)?;
        Ok(SnapshotLoader { file, reader, engine, replica, generation, complete: false })
    }

    /// Loads about `bytes` more; true if that was all, and it is durable. After an error the
    /// generation is to be destroyed.
    pub fn step(&mut self, bytes: u64) -> Result<bool, StorageError> {
        if self.complete {
            return Ok(true);
        }
        let mut done = 0;
        let mut batch = Batch::new(&*self.engine);
        while done < bytes {
            let record = self.reader.read().map_err(|error| read_error(&self.file.path, error))?;
            done += record.as_ref().map_or(0, Record::size);
            match record {
                Some(Record::Change(local, value)) => {
                    batch.push(keys::from_local(self.replica, self.generation, &local), value)?;
                }
                // Keys begin again from the lowest: a batch has each key once, in order.
                Some(Record::Overlay) => batch.write()?,
                None => {
                    batch.write()?;
                    return self.finish().map(|()| true);
                }
            }
        }
        batch.write()?;
        Ok(false)
    }

    fn finish(&mut self) -> Result<(), StorageError> {
        // The file was verified before; this is about what was read now.
        if self.reader.summary() != Some(&self.file.summary) || self.reader.origin() != self.file.origin {
            return Err(StorageError::Damaged {
                what: format!("snapshot file {}", self.file.path.display()),
                detail: "it has changed since it was verified".into(),
            });
        }
        let key = keys::header_key(self.replica, self.generation);
        self.engine.write(&[(key, Some(self.file.summary.header.encode().into()))])?;
        self.engine.sync()?;
        self.complete = true;
        Ok(())
    }
}

/// A file that is being written under its unfinished name: synced now and then, bounded, and removed
/// when it is dropped before it is finished.
struct Unfinished {
    path: PathBuf,
    file: File,
    bytes_left: u64,
    unsynced: u64,
    finished: bool,
}

impl Unfinished {
    fn create(path: &Path, bytes_max: u64) -> Result<Unfinished, StorageError> {
        let path = atomic_file::unfinished(path);
        let file = atomic_file::create(&path)?;
        Ok(Unfinished { path, file, bytes_left: bytes_max, unsynced: 0, finished: false })
    }

    /// Syncs it if much was written since the last time.
    fn pace(&mut self) -> Result<(), StorageError> {
        if self.unsynced >= SNAPSHOT_SYNC_BYTES {
            hot().state_syncs.increment(1);
            self.file.sync_data().map_err(sync_error(&self.path))?;
            self.unsynced = 0;
        }
        Ok(())
    }

    /// Makes it durable under its name.
    fn finish(&mut self, to: &Path) -> Result<(), StorageError> {
        atomic_file::finish(&self.file, &self.path, to)?;
        self.finished = true;
        Ok(())
    }
}

impl Write for Unfinished {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() as u64 > self.bytes_left {
            return Err(io::Error::new(
                io::ErrorKind::QuotaExceeded,
                "the snapshot files of this node have reached their limit",
            ));
        }
        let written = self.file.write(bytes)?;
        self.bytes_left -= written as u64;
        self.unsynced += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.finished
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "an unfinished snapshot file stays until the next start");
        }
    }
}

#[cfg(test)]
#[path = "snapshot_tests.rs"]
mod tests;
