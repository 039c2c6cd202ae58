//! The state engine on sled.
//!
//! What sled 0.34.7 needs to be told or spared:
//!
//! - Its `flush()` on Linux is `sync_file_range`, not fsync: neither what it calls durable is that, nor
//!   what it builds on that. [`super::sled_files`] makes it so.
//! - A tree node that is greater than a quarter of a segment (128 KiB) goes to a file of its own in
//!   `blobs/`, which it never syncs, and whose loss takes the node. Nodes split at 16 keys, so small
//!   records keep nodes small: a value above [`INLINE_BYTES_MAX`], key included, is cut into chunks
//!   of [`CHUNK_BYTES`] in a tree of their own. Should a blob appear all the same, `sync` syncs it.
//! - A kill while it writes its snapshot (only at open) leaves `snap.….generating`, which the next
//!   open takes for a corrupt snapshot: removed before opening.
//! - Its batches and transactions take a process-wide lock, for good once one was used. Not needed:
//!   the redo file makes a flush whole. Each key is written by itself, in key order.
//! - It deadlocks if it grows its file while a truncation of it still waits for a thread, and all of its I/O threads are at work:
//!   each of them then waits for the lock that is held for that. In a loop of great writes and removals
//!   that takes less than a second. So it is never given more than a few of its segments (`UNFLUSHED_BYTES_MAX`) before
//!   it has written all of them: then most of those threads (it has seven) are idle.
//! - It panics where it meets what it doesn't expect, damaged files above all. Every call is caught;
//!   after a panic the engine answers nothing but errors, since sled's inside is unknown then.
//! - It opens damaged files as if data had never been written. `sled_sums` looks at them before.
//!
//! Damage that is found while the store is open is noted beside it ([`super::aside`]), since the next
//! opening might not meet it, and told to whoever asked for it ([`Store::on_damage`]).
//!
//! The form of records and chunks is in [`super::sled_record`].

use std::fs;
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use super::atomic_file::io_error;
use super::engine::{Engine, Mutation, OnDamage, Store, bounds, visit_each};
use super::identity::IdentityError;
use super::sled_calls::{NAME, PANICKED, contain, damaged, open_db};
use super::sled_files::SledFiles;
pub use super::sled_record::{CHUNK_BYTES, INLINE_BYTES_MAX};
use super::sled_record::{ChunkRef, Record, chunk_id, chunk_key, is_great};
use super::sled_sums::SledSums;
use super::trust::Trust;
use super::{StorageError, aside, keys, owner};
use crate::ids::{RandomId, StoreId};

/// Cache of sled unless set otherwise, in bytes.
pub const CACHE_BYTES_DEFAULT: u64 = 64 << 20;

/// Bytes that are given to sled, with [`WRITE_BYTES`] for each write, before it is made to write all that it has. It writes
/// three to five times as much, in segments of half a megabyte, of which there may be fewer than it has I/O threads. What
/// waits so is less than what that saves on a machine that has other work: flushes take as long as without, or less.
const UNFLUSHED_BYTES_MAX: usize = 256 << 10;
/// What a write counts for beside its key and the greater of the values before and after it: neighbours in its node are
/// written again with it.
const WRITE_BYTES: usize = 512;

/// How to open the engine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SledOptions {
    /// Memory for cached tree nodes, in bytes.
    pub cache_bytes: u64,
    /// Have each write of sled be durable when it returns, where the file system can. Without it a
    /// power loss during a flush costs the state store; for tests.
    pub synchronous: bool,
}

impl Default for SledOptions {
    fn default() -> SledOptions {
        SledOptions { cache_bytes: CACHE_BYTES_DEFAULT, synchronous: true }
    }
}

/// An open sled store.
pub struct SledEngine {
    path: PathBuf,
    db: sled::Db,
    chunks: sled::Tree,
    intents: sled::Tree,
    /// One writer at a time, so that chunk ids and intents need no more care. Dropped after all that sled
    /// has, for the sums.
    writer: Mutex<Writer>,
    trust: Trust,
    created: bool,
}

struct Writer {
    /// Bytes that were given to sled since it last wrote all that it had, see [`UNFLUSHED_BYTES_MAX`].
    unflushed: usize,
    next_chunks: u64,
    /// Whether any value is chunked: if none is, a write needn't look for the old one's.
    any_chunks: bool,
    /// The record at hand: sled makes its own copy.
    record: Vec<u8>,
    files: SledFiles,
    sums: SledSums,
}

impl SledEngine {
    /// Opens the store in directory `path`, or creates it for the data directory `store_id`. Errors:
    /// [`IdentityError::InUse`], [`IdentityError::ForeignStore`], [`IdentityError::Newer`];
    /// [`StorageError::Damaged`] for files that sled can't read, or that aren't what they were, and for a
    /// store of which that was noted before.
    pub fn open(path: &Path, options: SledOptions, store_id: StoreId) -> Result<SledEngine, StorageError> {
        if let Some(why) = aside::noted_damage(path)? {
            return Err(damaged(path, &why));
        }
        fs::create_dir_all(path).map_err(io_error("creating", path))?;
        owner::check(path, store_id)?;
        let files = SledFiles::prepare(path, options.synchronous)?;
        if !files.synchronous() {
            tracing::warn!(
                directory = %path.display(),
                "the file system has no synchronous files: a power loss during a flush costs the state store"
            );
        }
        let sums = SledSums::open(path)?;
        let config = sled::Config::new().path(path).cache_capacity(options.cache_bytes).flush_every_ms(None);
        let db = open_db(path, &config)?;
        let open_tree = |name| contain(path, || db.open_tree(name));
        let chunks = open_tree("chunks")?;
        let intents = open_tree("intents")?;
        let last = contain(path, || chunks.last())?;
        let next_chunks = match &last {
            Some((key, _)) => chunk_id(key).ok_or_else(|| damaged(path, "a chunk's key"))? + 1,
            None => 1,
        };
        let created = contain(path, || Ok(db.is_empty()))?;
        let engine = SledEngine {
            path: path.to_owned(),
            db,
            chunks,
            intents,
            writer: Mutex::new(Writer {
                unflushed: 0,
                next_chunks,
                any_chunks: last.is_some(),
                record: Vec::new(),
                files,
                sums,
            }),
            trust: Trust::new(NAME, path),
            created,
        };
        let format = (keys::format_key(), Some(Bytes::copy_from_slice(&keys::FORMAT_VERSION.to_be_bytes())));
        if created {
            engine.write(&[format, (keys::store_id_key(), Some(Bytes::copy_from_slice(&store_id.0)))])?;
        } else {
            let found = engine.check_identity(store_id)?;
            engine.finish_intents()?;
            if found < keys::FORMAT_VERSION {
                // The sums first: a store of this version without them is taken for damaged.
                engine.sync()?;
                engine.write(&[format])?;
            } else if !engine.writer().sums.known() {
                return Err(damaged(path, "its sums are missing: whether it is what it was can't be told"));
            }
        }
        // Names first: sums without the store that they are of would make it a damaged one.
        engine.writer().files.sync_names()?;
        engine.sync()?;
        owner::note(path, store_id)?;
        Ok(engine)
    }

    /// Checks whose store it is; its format.
    fn check_identity(&self, expected: StoreId) -> Result<u32, StorageError> {
        let format = self
            .get(&keys::format_key())?
            .and_then(|bytes| bytes[..].try_into().ok().map(u32::from_be_bytes))
            .ok_or_else(|| damaged(&self.path, "its format version is missing"))?;
        let path = || self.path.display().to_string();
        if format > keys::FORMAT_VERSION {
            return Err(
                IdentityError::Newer { path: path(), found: format, known: keys::FORMAT_VERSION }.into()
            );
        }
        let found = self.get(&keys::store_id_key())?.and_then(|bytes| RandomId::from_slice(&bytes));
        match found {
            Some(found) if found == expected => Ok(format),
            Some(found) => {
                Err(IdentityError::ForeignStore { path: path(), found: found.to_string(), expected }.into())
            }
            None => Err(damaged(&self.path, "its store id is missing")),
        }
    }

    /// Removes chunks that a crash left without a record.
    fn finish_intents(&self) -> Result<(), StorageError> {
        let mut writer = self.writer();
        writer.files.before_write()?;
        for item in self.intents.iter() {
            let (id, intent) = self.run(|| item)?;
            let malformed = || damaged(&self.path, "an intent");
            let id = chunk_id(&id).ok_or_else(malformed)?;
            let (count, key) = intent.split_first_chunk::<4>().ok_or_else(malformed)?;
            let record = self.run(|| self.db.get(key))?;
            let kept = match &record {
                Some(record) => self.parse(record)?.chunks().is_some_and(|at| at.id == id),
                None => false,
            };
            if !kept {
                self.remove_chunks(&mut writer, id, u32::from_be_bytes(*count))?;
            }
            self.remove(&mut writer, &self.intents, &id.to_be_bytes())?;
        }
        drop(writer);
        Ok(())
    }

    fn write_one(&self, writer: &mut Writer, key: &[u8], value: Option<&Bytes>) -> Result<(), StorageError> {
        let old = if writer.any_chunks {
            match self.run(|| self.db.get(key))? {
                Some(record) => self.parse(&record)?.chunks(),
                None => None,
            }
        } else {
            None
        };
        if let Some(old) = old {
            self.intend(writer, old, key)?;
        }
        let new = match value {
            Some(value) if is_great(key, value) => Some(self.write_chunks(writer, key, value)?),
            _ => None,
        };
        match (value, new) {
            (Some(_), Some(at)) => self.insert(writer, &self.db, key, &at.encode())?,
            (Some(value), None) => {
                let mut record = std::mem::take(&mut writer.record);
                Record::encode_inline(value, &mut record);
                let written = self.insert(writer, &self.db, key, &record);
                writer.record = record;
                written?;
            }
            (None, _) => self.remove(writer, &self.db, key)?,
        }
        if let Some(old) = old {
            self.remove_chunks(writer, old.id, old.count())?;
        }
        for at in old.iter().chain(&new) {
            self.remove(writer, &self.intents, &at.id.to_be_bytes())?;
        }
        Ok(())
    }

    fn insert(
        &self,
        writer: &mut Writer,
        tree: &sled::Tree,
        key: &[u8],
        value: &[u8],
    ) -> Result<(), StorageError> {
        let old = self.run(|| tree.insert(key, value))?;
        let old = old.map_or(0, |old| old.len());
        self.given(writer, key.len() + value.len().max(old))
    }

    fn remove(&self, writer: &mut Writer, tree: &sled::Tree, key: &[u8]) -> Result<(), StorageError> {
        let old = self.run(|| tree.remove(key))?;
        self.given(writer, key.len() + old.map_or(0, |old| old.len()))
    }

    /// So much more was given to sled. Waits for it, if that is too much.
    fn given(&self, writer: &mut Writer, bytes: usize) -> Result<(), StorageError> {
        writer.unflushed += WRITE_BYTES + bytes;
        if writer.unflushed >= UNFLUSHED_BYTES_MAX {
            self.run(|| self.db.flush())?;
            writer.unflushed = 0;
        }
        Ok(())
    }

    fn write_chunks(&self, writer: &mut Writer, key: &[u8], value: &Bytes) -> Result<ChunkRef, StorageError> {
        let len = u32::try_from(value.len()).map_err(|_| StorageError::Engine {
            engine: NAME,
            reason: format!("a value of {} bytes is too long", value.len()),
        })?;
        let at = ChunkRef { id: writer.next_chunks, len, sum: crc32c::crc32c(value) };
        writer.next_chunks += 1;
        writer.any_chunks = true;
        self.intend(writer, at, key)?;
        for (number, chunk) in (0..).zip(value.chunks(CHUNK_BYTES)) {
            self.insert(writer, &self.chunks, &chunk_key(at.id, number), chunk)?;
        }
        Ok(at)
    }

    fn intend(&self, writer: &mut Writer, at: ChunkRef, key: &[u8]) -> Result<(), StorageError> {
        let intent = [&at.count().to_be_bytes()[..], key].concat();
        self.insert(writer, &self.intents, &at.id.to_be_bytes(), &intent)
    }

    fn remove_chunks(&self, writer: &mut Writer, id: u64, count: u32) -> Result<(), StorageError> {
        for number in 0..count {
            self.remove(writer, &self.chunks, &chunk_key(id, number))?;
        }
        Ok(())
    }

    /// The value of a record that was just read under `key`.
    fn resolve(&self, key: &[u8], record: sled::IVec) -> Result<Option<Bytes>, StorageError> {
        let mut record = record;
        loop {
            let at = match self.parse(&record)? {
                Record::Inline(value) => return Ok(Some(value)),
                Record::Chunked(at) => at,
            };
            if let Some(value) = self.read_chunks(at)? {
                return Ok(Some(value));
            }
            // The chunks go only after the record has changed, and ids don't come back.
            match self.run(|| self.db.get(key))? {
                None => return Ok(None),
                Some(again) if again == record => {
                    return Err(damaged(&self.path, "chunks of a value are missing or wrong"));
                }
                Some(again) => record = again,
            }
        }
    }

    fn read_chunks(&self, at: ChunkRef) -> Result<Option<Bytes>, StorageError> {
        let mut value = Vec::with_capacity(at.len as usize);
        for number in 0..at.count() {
            match self.run(|| self.chunks.get(chunk_key(at.id, number)))? {
                Some(chunk) => value.extend_from_slice(&chunk),
                None => return Ok(None),
            }
        }
        let whole = value.len() == at.len as usize && crc32c::crc32c(&value) == at.sum;
        Ok(whole.then(|| value.into()))
    }

    fn parse(&self, bytes: &[u8]) -> Result<Record, StorageError> {
        Record::decode(bytes).ok_or_else(|| damaged(&self.path, "a record has an unknown form"))
    }

    /// Calls into sled.
    fn run<T>(&self, call: impl FnOnce() -> sled::Result<T>) -> Result<T, StorageError> {
        self.trust.check()?;
        let result = contain(&self.path, call);
        if matches!(result, Err(StorageError::Damaged { .. } | StorageError::SyncFailed { .. })) {
            self.trust.distrust();
        }
        result
    }

    fn noting<T>(&self, result: Result<T, StorageError>) -> Result<T, StorageError> {
        // A panic may be a mistake of sled's about memory: at the next start the sums tell what is on disk.
        self.trust.note(result, |detail| !detail.starts_with(PANICKED))
    }

    fn get_record(&self, key: &[u8]) -> Result<Option<Bytes>, StorageError> {
        match self.run(|| self.db.get(key))? {
            Some(record) => self.resolve(key, record),
            None => Ok(None),
        }
    }

    fn scan_records(
        &self,
        from: Bound<&[u8]>,
        to: &[u8],
        visit: &mut dyn FnMut(&[u8], Bytes) -> bool,
    ) -> Result<(), StorageError> {
        let Some(mut items) = self.range(from, to) else { return Ok(()) };
        visit_each(
            || self.run(|| items.next().transpose()),
            |(key, record)| Ok(self.resolve(&key, record)?.is_none_or(|value| visit(&key, value))),
        )
    }

    fn scan_only_keys(
        &self,
        from: Bound<&[u8]>,
        to: &[u8],
        visit: &mut dyn FnMut(&[u8]) -> bool,
    ) -> Result<(), StorageError> {
        let Some(mut items) = self.range(from, to) else { return Ok(()) };
        visit_each(|| self.run(|| items.next().transpose()), |(key, _)| Ok(visit(&key)))
    }

    fn write_all(&self, batch: &[Mutation]) -> Result<(), StorageError> {
        let mut writer = self.writer();
        writer.files.before_write()?;
        for (key, value) in batch {
            self.write_one(&mut writer, key, value.as_ref())?;
        }
        Ok(())
    }

    // What the lock guards is changed by single assignments; a panic leaves it usable.
    fn writer(&self) -> MutexGuard<'_, Writer> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn range(&self, from: Bound<&[u8]>, to: &[u8]) -> Option<sled::Iter> {
        bounds(from, to).map(|bounds| self.db.range::<Vec<u8>, _>(bounds))
    }
}

impl Drop for SledEngine {
    /// The sums, the last of what is dropped, seal the store when sled has closed it.
    fn drop(&mut self) {
        if self.trust.is_broken() {
            self.writer().sums.distrust();
        }
    }
}

impl Engine for SledEngine {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StorageError> {
        self.noting(self.get_record(key))
    }

    fn scan(
        &self,
        from: Bound<&[u8]>,
        to: &[u8],
        visit: &mut dyn FnMut(&[u8], Bytes) -> bool,
    ) -> Result<(), StorageError> {
        self.noting(self.scan_records(from, to, visit))
    }

    fn scan_keys(
        &self,
        from: Bound<&[u8]>,
        to: &[u8],
        visit: &mut dyn FnMut(&[u8]) -> bool,
    ) -> Result<(), StorageError> {
        self.noting(self.scan_only_keys(from, to, visit))
    }

    fn write(&self, batch: &[Mutation]) -> Result<(), StorageError> {
        self.noting(self.write_all(batch))
    }

    fn sync(&self) -> Result<(), StorageError> {
        let mut writer = self.writer();
        writer.unflushed = 0;
        let Writer { files, sums, .. } = &mut *writer;
        let result = match self.run(|| self.db.flush()) {
            // In this order: the sums are of what is durable, its length too.
            Ok(_) => sums.store_bytes().and_then(|bytes| files.sync().and_then(|()| sums.seal(bytes))),
            Err(error @ StorageError::Damaged { .. }) => Err(error),
            Err(error) => {
                Err(StorageError::SyncFailed { path: self.path.join("db"), reason: error.to_string() })
            }
        };
        if result.is_err() {
            self.trust.distrust();
        }
        drop(writer);
        self.noting(result)
    }

    fn disk_bytes(&self) -> u64 {
        [self.path.clone(), self.path.join("blobs")]
            .iter()
            .filter_map(|dir| fs::read_dir(dir).ok())
            .flatten()
            .filter_map(|item| item.and_then(|item| item.metadata()).ok())
            .filter(fs::Metadata::is_file)
            .map(|metadata| metadata.len())
            .sum()
    }

    fn name(&self) -> &'static str {
        NAME
    }
}

impl Store for SledEngine {
    fn created(&self) -> bool {
        self.created
    }

    fn on_damage(&self, hook: OnDamage) {
        self.trust.on_damage(hook);
    }

    #[cfg(test)]
    fn spoil(&self, key: &[u8]) {
        self.db.insert(key, &[9]).expect("written");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(path: &Path) -> SledEngine {
        SledEngine::open(path, SledOptions::default(), RandomId([1; 16])).unwrap()
    }

    #[test]
    fn chunks_without_a_record_are_removed_at_open() {
        let home = tempfile::tempdir().unwrap();
        let engine = open(home.path());
        let great = Some(Bytes::from(vec![1; 3 * CHUNK_BYTES]));
        engine.write(&[(b"kept".to_vec(), great.clone())]).unwrap();
        // A crash between the chunks and their record, and one between a removal and its chunks.
        let mut writer = engine.writer();
        let value = Bytes::from(vec![2; 5 * CHUNK_BYTES]);
        engine.write_chunks(&mut writer, b"never", &value).unwrap();
        let record = engine.db.get("kept").unwrap().unwrap();
        let kept = Record::decode(&record).unwrap().chunks().unwrap();
        engine.intend(&mut writer, kept, b"kept").unwrap();
        drop(writer);
        assert_eq!((engine.chunks.len(), engine.intents.len()), (8, 2));
        drop(engine);
        let engine = open(home.path());
        assert_eq!((engine.chunks.len(), engine.intents.len()), (3, 0));
        assert_eq!(engine.get(b"kept").unwrap(), great);
        engine.write(&[(b"kept".to_vec(), None)]).unwrap();
        assert_eq!((engine.chunks.len(), engine.intents.len()), (0, 0));
    }
}
