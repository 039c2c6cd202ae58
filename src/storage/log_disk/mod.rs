//! The raft log on raft-engine: all groups of a node in one sequence of files, so that one
//! `fdatasync` makes the writes of many groups durable.
//!
//! Each replica is a group of the engine; one reserved group holds the catalogue ([`record`] has the
//! formats). What this module adds to the engine, and why (`guard` has the rest):
//!
//! - *Checks before writes.* The engine panics on a gap between entries. Every write is first held
//!   against the extent of its log, which is kept here in memory.
//! - *Compaction in order.* A `Compact` command and the truncated position that tells of it are one
//!   batch. It isn't synced, but nothing is purged before it is: else a power loss could bring back
//!   the old position without the entries that should follow it.
//! - *Installations whole.* The command that drops a log and the records that begin it anew are one
//!   batch, in that order; the engine remembers the command until files older than it are gone.
//! - *Tombstones first.* A removed replica's record is durable before its log is dropped, and a
//!   removal that a crash cut short is finished at the next open.
//!
//! # Damage
//!
//! The engine drops a torn tail, the last, unfinished batch, which nobody was told of. It takes whatever it
//! can't read in its last file for one, passes over files before a hole, and doesn't miss files at either
//! end: acknowledged entries and votes would go with them. Here they don't:
//!
//! - The mark beside the log tells up to which byte of which file it was acknowledged, which files there must be
//!   and how long they are together. It is never ahead of the log, and behind it only after a power cut.
//! - Before the engine opens the files, all of them are read whole: what was acknowledged and
//!   fails its checksum, is cut off, missing, or of an older copy, is found before anything is changed.
//! - A log that isn't whole is [`StorageError::Damaged`]: the node doesn't start under this identity, since it can't
//!   know which votes and entries it has promised to keep. A mark that is missing or damaged is made anew, with a warning:
//!   each write also carries its number and what the files were before it.
//! - What rots while the node runs is found when it is read. From then on every write and purge fails, which
//!   ends the node; the next start reads all and refuses.
//!
//! What remains unseen: a tail lost in a power cut that the disk had confirmed (the mark may be as old), damage
//! to log and mark at once, an old copy of the whole data directory. So [`LogStore::load`] also refuses a
//! commit index beyond the last entry, the caller compares [`LogState::last`] with the applied index
//! of the state, and [`DiskLog::open_existing`] is for a caller who knows that there was a log.
//!
//! Not compressed: entries are written once and, but for a lagging follower, never read; one thread
//! writes for all groups, and a compressed block would have to be unpacked whole for one entry.

mod ahead;
mod check;
mod guard;
mod mark;
pub mod record;
mod recover;
mod watch;

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use raft::eraftpb::Entry;
pub use raft_engine::env;
use raft_engine::env::{DefaultFileSystem, FileSystem};
use raft_engine::{Command, LogBatch, MessageExt};

use super::StorageError;
use super::identity::IdentityError;
use super::log::{Extent, Install, Installed, LogState, LogStore, LogWrite, ReplicaPhase, ReplicaRecord};
use crate::ids::{Index, Position, ReplicaId, StoreId};
use guard::EngineGuard;
pub(crate) use guard::panic_text;
use record::{CATALOGUE_GROUP, HARD_STATE_KEY, TRUNCATED_KEY};

/// Sizes of the log's files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskLogOptions {
    /// Size of one file, in bytes; a file is closed by the first write that passes it.
    pub file_bytes: u64,
    /// Size of all files, in bytes, above which [`LogStore::purge`] rewrites what is small, frees
    /// what is old, and names the replicas that hold back the rest.
    pub purge_bytes: u64,
    /// Files written ahead with zeros when the log opens: a sync of a write into such a file moves
    /// no metadata. The engine prepares 0, 1, 3, 4, 6, … files: the greatest such number that
    /// doesn't exceed this is taken.
    pub spare_files: usize,
}

/// The raft log of a node on disk. `F` is the file system, which tests replace.
pub struct DiskLog<F: FileSystem + 'static = DefaultFileSystem> {
    engine: EngineGuard<F>,
    dir: PathBuf,
    is_new: bool,
    /// Held by whatever writes, from the check against the extents to their change.
    order: Mutex<WriteOrder>,
    replicas: RwLock<Replicas>,
    /// What was found damaged since the log was opened.
    damage: OnceLock<String>,
}

/// What the order of writes depends on.
struct WriteOrder {
    /// There are compactions that aren't known to be durable.
    unsynced: bool,
    /// Files are being freed: a compaction must be durable before it is seen.
    purging: bool,
}

/// The catalogue, and the extents of the logs of active replicas. A replica whose log is damaged
/// has no extent.
#[derive(Default)]
struct Replicas {
    catalogue: BTreeMap<ReplicaId, ReplicaRecord>,
    extents: HashMap<ReplicaId, Extent>,
}

/// Tells the engine how entries are encoded.
struct RaftEntries;

impl MessageExt for RaftEntries {
    type Entry = Entry;

    fn index(entry: &Entry) -> u64 {
        entry.index
    }
}

impl DiskLog<DefaultFileSystem> {
    /// Opens the log in `dir`, or makes one. It must carry `store_id`; another one, or damage that a
    /// torn tail doesn't explain, is [`StorageError::Damaged`].
    pub fn open(dir: &Path, options: DiskLogOptions, store_id: StoreId) -> Result<DiskLog, StorageError> {
        DiskLog::open_with_file_system(dir, options, store_id, Arc::new(DefaultFileSystem))
    }

    /// [`DiskLog::open`] for a node that has had a log. If there is none, or an empty one, it is lost: the
    /// node is refused, now and whenever it is tried again, since nothing is written that a later try
    /// could take for the log.
    pub fn open_existing(
        dir: &Path,
        options: DiskLogOptions,
        store_id: StoreId,
    ) -> Result<DiskLog, StorageError> {
        if !has_files(dir)? {
            return Err(lost(dir));
        }
        DiskLog::open_as(dir, options, store_id, Arc::new(DefaultFileSystem), false)
    }
}

impl<F: FileSystem + 'static> DiskLog<F> {
    /// [`DiskLog::open`] on a file system of the caller's.
    pub fn open_with_file_system(
        dir: &Path,
        options: DiskLogOptions,
        store_id: StoreId,
        file_system: Arc<F>,
    ) -> Result<DiskLog<F>, StorageError> {
        DiskLog::open_as(dir, options, store_id, file_system, true)
    }

    fn open_as(
        dir: &Path,
        options: DiskLogOptions,
        store_id: StoreId,
        file_system: Arc<F>,
        may_create: bool,
    ) -> Result<DiskLog<F>, StorageError> {
        let io = |action, path: &Path| {
            let path = path.to_path_buf();
            move |source| StorageError::Io { action, path, source }
        };
        std::fs::create_dir_all(dir).map_err(io("creating", dir))?;
        let (engine, recovered) = EngineGuard::open(dir, options, store_id, file_system)?;
        // The engine syncs the directory when it adds files, but not after making the first ones.
        for path in [Some(dir), dir.parent()].into_iter().flatten() {
            // A relative path of one component has the empty path for a parent.
            if !path.as_os_str().is_empty() {
                File::open(path).and_then(|directory| directory.sync_all()).map_err(io("syncing", path))?;
            }
        }
        let mut log = DiskLog {
            engine,
            dir: dir.to_path_buf(),
            is_new: false,
            order: Mutex::new(WriteOrder { unsynced: false, purging: false }),
            replicas: RwLock::default(),
            damage: OnceLock::new(),
        };
        let exists = log.check_identity(store_id, may_create)?;
        log.engine.begin(recovered, store_id)?;
        if !exists {
            log.write_identity(store_id)?;
        }
        log.read_catalogue()?;
        Ok(log)
    }

    /// Whether opening found no log and made an empty one.
    pub fn is_new(&self) -> bool {
        self.is_new
    }

    fn extent(&self, replica: ReplicaId) -> Result<Extent, StorageError> {
        let replicas = self.replicas();
        replicas.extents.get(&replica).copied().ok_or_else(|| {
            let reason = match replicas.catalogue.get(&replica).map(|r| r.phase) {
                Some(ReplicaPhase::Active) => "it was damaged when the node started",
                Some(ReplicaPhase::Tombstone | ReplicaPhase::Destroyed) => "the replica was removed",
                None => "the node has no such replica",
            };
            StorageError::Inconsistent { replica, reason: reason.into() }
        })
    }

    /// Makes what was written so far durable. The engine's own sync of an empty batch does nothing; this
    /// one carries what every synced batch does.
    fn sync(&self) -> Result<(), StorageError> {
        self.engine.write(LogBatch::with_capacity(1), true)
    }

    fn put(&self, batch: &mut LogBatch, group: u64, key: &[u8], value: Vec<u8>) -> Result<(), StorageError> {
        batch.put(group, key.to_vec(), value).map_err(|e| self.engine.error(e))
    }

    fn damaged(&self, detail: String) -> StorageError {
        refused(&self.dir, detail)
    }

    /// Remembers damage, so that the node ends.
    fn found<T>(&self, result: Result<T, StorageError>) -> Result<T, StorageError> {
        if let Err(StorageError::Damaged { what, detail }) = &result {
            let detail = format!("{what}: {detail}");
            if self.damage.set(detail.clone()).is_ok() {
                tracing::error!(detail, "the raft log is damaged; the node can't go on with it");
            }
        }
        result
    }

    /// Before any write. Nothing is written to a log that was found damaged: what it promised may be gone.
    fn order(&self) -> Result<MutexGuard<'_, WriteOrder>, StorageError> {
        match self.damage.get() {
            Some(detail) => Err(self.damaged(detail.clone())),
            None => Ok(self.lock_order()),
        }
    }

    // No panic can leave these half changed: what panics is caught inside `EngineGuard`.
    fn lock_order(&self) -> MutexGuard<'_, WriteOrder> {
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn replicas(&self) -> RwLockReadGuard<'_, Replicas> {
        self.replicas.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn replicas_mut(&self) -> RwLockWriteGuard<'_, Replicas> {
        self.replicas.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<F: FileSystem + 'static> LogStore for DiskLog<F> {
    fn write(&self, writes: &[LogWrite]) -> Result<(), StorageError> {
        let _order = self.order()?;
        let mut after: HashMap<ReplicaId, Extent> = HashMap::with_capacity(writes.len());
        let mut records: BTreeMap<ReplicaId, ReplicaRecord> = BTreeMap::new();
        let mut batch = LogBatch::with_capacity(2 * writes.len());
        for write in writes {
            let extent = match after.get(&write.replica) {
                Some(extent) => *extent,
                None => self.extent(write.replica)?,
            };
            after.insert(write.replica, extent.after(write)?);
            batch
                .add_entries::<RaftEntries>(write.replica.0, &write.entries)
                .map_err(|e| self.engine.error(e))?;
            if let Some(hard_state) = &write.hard_state {
                batch
                    .put_message(write.replica.0, HARD_STATE_KEY.to_vec(), hard_state)
                    .map_err(|e| self.engine.error(e))?;
            }
            if let Some(membership) = &write.membership {
                let replicas = self.replicas();
                let record = records.get(&write.replica).or_else(|| replicas.catalogue.get(&write.replica));
                records.extend(record.and_then(|record| Some((write.replica, record.with(membership)?))));
            }
        }
        for (replica, record) in &records {
            let key = record::replica_key(*replica);
            self.put(&mut batch, CATALOGUE_GROUP, &key, record::encode_replica(record)?)?;
        }
        if batch.is_empty() {
            return Ok(());
        }
        self.engine.write(batch, true)?;
        let mut replicas = self.replicas_mut();
        replicas.extents.extend(after);
        replicas.catalogue.append(&mut records);
        Ok(())
    }

    fn create(&self, records: &[ReplicaRecord]) -> Result<(), StorageError> {
        let _order = self.order()?;
        let mut created = Replicas::default();
        let mut batch = LogBatch::with_capacity(3 * records.len());
        for record in records {
            let replica = record.replica;
            if replica.0 == 0 || replica.0 == CATALOGUE_GROUP {
                return Err(StorageError::Inconsistent {
                    replica,
                    reason: "no replica may have this id".into(),
                });
            }
            if self.replicas().catalogue.contains_key(&replica)
                || created.catalogue.insert(replica, record.clone()).is_some()
            {
                continue;
            }
            let value = record::encode_replica(record)?;
            let key = record::replica_key(replica);
            self.put(&mut batch, CATALOGUE_GROUP, &key, value)?;
            if record.phase == ReplicaPhase::Active {
                batch
                    .put_message(replica.0, HARD_STATE_KEY.to_vec(), &record.first_hard_state())
                    .map_err(|e| self.engine.error(e))?;
                let truncated = record::encode_position(record.beginning());
                self.put(&mut batch, replica.0, TRUNCATED_KEY, truncated)?;
                created.extents.insert(replica, Extent::new(record));
            }
        }
        if batch.is_empty() {
            return Ok(());
        }
        self.engine.write(batch, true)?;
        let mut replicas = self.replicas_mut();
        replicas.catalogue.append(&mut created.catalogue);
        replicas.extents.extend(created.extents);
        Ok(())
    }

    fn catalogue(&self) -> Result<Vec<ReplicaRecord>, StorageError> {
        Ok(self.replicas().catalogue.values().cloned().collect())
    }

    fn remove(&self, replicas: &[ReplicaId]) -> Result<(), StorageError> {
        let _order = self.order()?;
        let mut tombstones = BTreeMap::new();
        for replica in replicas {
            if let Some(record) = self.replicas().catalogue.get(replica)
                && record.phase == ReplicaPhase::Active
            {
                let phase = ReplicaPhase::Tombstone;
                tombstones.insert(*replica, ReplicaRecord { phase, ..record.clone() });
            }
        }
        if tombstones.is_empty() {
            return Ok(());
        }
        let mut batch = LogBatch::with_capacity(tombstones.len());
        for record in tombstones.values() {
            let key = record::replica_key(record.replica);
            let value = record::encode_replica(record)?;
            self.put(&mut batch, CATALOGUE_GROUP, &key, value)?;
        }
        // Durable before any log is dropped: a replica that may have voted must never come back empty.
        self.engine.write(batch, true)?;
        let mut batch = LogBatch::with_capacity(tombstones.len());
        for replica in tombstones.keys() {
            batch.add_command(replica.0, Command::Clean);
        }
        {
            let mut replicas = self.replicas_mut();
            for replica in tombstones.keys() {
                replicas.extents.remove(replica);
            }
            replicas.catalogue.append(&mut tombstones);
        }
        self.engine.write(batch, true)
    }

    fn install(&self, replica: ReplicaId, install: &Install) -> Result<(), StorageError> {
        let _order = self.order()?;
        let extent = self.extent(replica)?;
        let held = self.read_state(replica)?;
        let position = install.position;
        let term_at = (extent.truncated.index < position.index && position.index <= extent.last)
            .then(|| self.term(replica, position.index))
            .transpose()?;
        let Installed { record, hard_state, extent: after } = {
            let replicas = self.replicas();
            let record = replicas.catalogue.get(&replica).ok_or_else(|| StorageError::Inconsistent {
                replica,
                reason: "the node has no such replica".into(),
            })?;
            install.apply(record, extent, &held.hard_state, term_at)?
        };
        let mut batch = LogBatch::with_capacity(4);
        // First: the engine carries out a batch in order.
        if after.last == position.index {
            // Drops the records too.
            batch.add_command(replica.0, Command::Clean);
        } else if extent.truncated.index < position.index {
            batch.add_command(replica.0, Command::Compact { index: position.index + 1 });
        }
        batch
            .put_message(replica.0, HARD_STATE_KEY.to_vec(), &hard_state)
            .map_err(|e| self.engine.error(e))?;
        self.put(&mut batch, replica.0, TRUNCATED_KEY, record::encode_position(position))?;
        let key = record::replica_key(replica);
        self.put(&mut batch, CATALOGUE_GROUP, &key, record::encode_replica(&record)?)?;
        // The extent changes first, as in a compaction; the record only when it is durable.
        self.replicas_mut().extents.insert(replica, after);
        self.engine.write(batch, true)?;
        self.replicas_mut().catalogue.insert(replica, record);
        Ok(())
    }

    fn destroyed(&self, replicas: &[ReplicaId]) -> Result<(), StorageError> {
        let _order = self.order()?;
        let is_tombstone = |replica: &&ReplicaId| {
            let phase = self.replicas().catalogue.get(replica).map(|r| r.phase);
            phase == Some(ReplicaPhase::Tombstone)
        };
        let destroyed: Vec<ReplicaId> = replicas.iter().filter(is_tombstone).copied().collect();
        let mut batch = LogBatch::with_capacity(destroyed.len());
        for replica in &destroyed {
            let key = record::destroyed_key(*replica);
            self.put(&mut batch, CATALOGUE_GROUP, &key, vec![record::FORMAT])?;
        }
        if batch.is_empty() {
            return Ok(());
        }
        // Not worth a sync: forgotten, it costs a look at the next start.
        self.engine.write(batch, false)?;
        let catalogue = &mut self.replicas_mut().catalogue;
        for replica in &destroyed {
            if let Some(record) = catalogue.get_mut(replica) {
                record.phase = ReplicaPhase::Destroyed;
            }
        }
        Ok(())
    }

    fn load(&self, replica: ReplicaId) -> Result<LogState, StorageError> {
        let phase = self.replicas().catalogue.get(&replica).map(|r| r.phase);
        if phase != Some(ReplicaPhase::Active) {
            // Says why there is none.
            self.extent(replica)?;
        }
        // A compaction or write between two of its look-ups can make a whole log seem damaged.
        self.found(self.read_state(replica).or_else(|_| {
            let _order = self.lock_order();
            self.read_state(replica)
        }))
    }

    fn entries(
        &self,
        replica: ReplicaId,
        low: Index,
        high: Index,
        max_bytes: usize,
    ) -> Result<Vec<Entry>, StorageError> {
        let result = self.engine.read(|engine| {
            let mut entries = Vec::new();
            // Beside a writer the log may change between these two lines: then this fails and is
            // tried again, or finds the change below.
            let last = engine.last_index(replica.0).unwrap_or(0);
            let high = high.min(last.saturating_add(1));
            if low < high {
                engine.fetch_entries_to::<RaftEntries>(
                    replica.0,
                    low,
                    high,
                    Some(max_bytes),
                    &mut entries,
                )?;
            }
            Ok(entries)
        });
        // After the read: what was compacted meanwhile is reported as compacted.
        let extent = self.extent(replica)?;
        if low <= extent.truncated.index {
            return Err(StorageError::Compacted(extent.truncated.index));
        }
        self.found(result.map_err(|e| recover::unread(replica, e)))
    }

    fn compact(&self, replica: ReplicaId, to: Position) -> Result<(), StorageError> {
        let mut order = self.order()?;
        let Some(after) = self.extent(replica)?.compacted(replica, to)? else {
            return Ok(());
        };
        let mut batch = LogBatch::with_capacity(2);
        let value = record::encode_position(after.truncated);
        self.put(&mut batch, replica.0, TRUNCATED_KEY, value)?;
        let index = after.truncated.index + 1;
        batch.add_command(replica.0, Command::Compact { index });
        // The extent changes first: a reader that finds the entries gone finds them compacted.
        self.replicas_mut().extents.insert(replica, after);
        self.engine.write(batch, order.purging)?;
        order.unsynced |= !order.purging;
        Ok(())
    }

    fn purge(&self) -> Result<Vec<ReplicaId>, StorageError> {
        {
            let mut order = self.order()?;
            if order.purging {
                return Ok(Vec::new());
            }
            if order.unsynced {
                self.sync()?;
                order.unsynced = false;
            }
            order.purging = true;
        }
        let purged = self.found(self.engine.purge());
        self.lock_order().purging = false;
        // Fails if damage was found, with the way out.
        let order = self.order()?;
        let (named, freed) = purged?;
        if freed {
            // So that the log itself tells, too, that those files aren't needed any more.
            self.sync()?;
        }
        drop(order);
        let replicas = self.replicas();
        let mut named: Vec<ReplicaId> = named
            .into_iter()
            .map(ReplicaId)
            .filter(|replica| replicas.extents.contains_key(replica))
            .collect();
        named.sort_unstable();
        Ok(named)
    }

    fn disk_bytes(&self) -> u64 {
        let sizes = std::fs::read_dir(&self.dir).map(|files| {
            files
                .filter_map(|file| file.and_then(|file| file.metadata()).ok())
                .map(|metadata| metadata.len())
                .sum()
        });
        // A file that goes away meanwhile is left out; a directory that can't be listed leaves the
        // engine's own estimate.
        sizes.unwrap_or_else(|_| self.engine.get().get_used_size() as u64)
    }
}

/// Whether a directory holds any file of a log that has content.
fn has_files(dir: &Path) -> Result<bool, StorageError> {
    Ok(check::list(dir)?.iter().flat_map(|queue| queue.values()).any(|bytes| *bytes > 0))
}

/// The error of a node whose log is damaged, with the way out.
fn refused(dir: &Path, detail: String) -> StorageError {
    StorageError::Damaged {
        what: format!("the raft log in {}", dir.display()),
        detail: format!(
            "{detail}; entries and votes that this node promised to keep may be gone, so it can't go on as the \
             member it was: see `serve --rejoin`"
        ),
    }
}

/// The error of a node whose log is gone.
fn lost(dir: &Path) -> StorageError {
    let detail = "the raft log is missing, though this node is a member: votes and entries that it promised to \
                  keep are gone";
    IdentityError::Damaged { path: dir.display().to_string(), detail: detail.into() }.into()
}

fn damaged_log(replica: ReplicaId, detail: impl ToString) -> StorageError {
    StorageError::Damaged { what: format!("the raft log of replica {replica}"), detail: detail.to_string() }
}
