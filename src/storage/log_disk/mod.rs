//! The raft log on raft-engine: all groups of a node in one sequence of files, so that one
//! `fdatasync` makes the writes of many groups durable.
//!
//! Each replica is a group of the engine; one reserved group holds the catalogue ([`record`] has the
//! formats). What this module adds to the engine, and why ([`guard`] has the rest):
//!
//! - *Checks before writes.* The engine panics on a gap between entries. Every write is first held
//!   against the extent of its log, which is kept here in memory.
//! - *Compaction in order.* A `Compact` command and the truncated position that tells of it are one
//!   batch. It isn't synced, but nothing is purged before it is: else a power loss could bring back
//!   the old position without the entries that should follow it.
//! - *Tombstones first.* A removed replica's record is durable before its log is dropped, and a
//!   removal that a crash cut short is finished at the next open.
//!
//! The engine tolerates a torn tail: it drops the last, unfinished batch, which nobody was told of.
//! It can't tell that from a tail that was acknowledged and lost. So [`LogStore::load`] refuses a
//! commit index beyond the last entry, the caller compares [`LogState::last`] with the applied index
//! of the state, and [`DiskLog::is_new`] tells a caller who knows better that the log is missing.
//!
//! Not compressed: entries are written once and, but for a lagging follower, never read; one thread
//! writes for all groups, and a compressed block would have to be unpacked whole for one entry.

mod guard;
pub mod record;

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use raft::eraftpb::{Entry, HardState};
pub use raft_engine::env;
use raft_engine::env::{DefaultFileSystem, FileSystem};
use raft_engine::{Command, LogBatch, MessageExt};

use super::StorageError;
use super::log::{Extent, LogState, LogStore, LogWrite, ReplicaPhase, ReplicaRecord, term_starts};
use crate::ids::{GROUP_START, Index, Position, ReplicaId, StoreId, Term};
use guard::EngineGuard;
pub(crate) use guard::panic_text;
use record::{CATALOGUE_GROUP, HARD_STATE_KEY, IDENTITY_KEY, MARKER_KEY, TRUNCATED_KEY};

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
    pub fn open(
        dir: &Path,
        options: DiskLogOptions,
        store_id: StoreId,
    ) -> Result<DiskLog, StorageError> {
        DiskLog::open_with_file_system(dir, options, store_id, Arc::new(DefaultFileSystem))
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
        let io = |action, path: &Path| {
            let path = path.to_path_buf();
            move |source| StorageError::Io {
                action,
                path,
                source,
            }
        };
        std::fs::create_dir_all(dir).map_err(io("creating", dir))?;
        let engine = EngineGuard::open(dir, options, file_system)?;
        // The engine syncs the directory when it adds files, but not after making the first ones.
        for path in [Some(dir), dir.parent()].into_iter().flatten() {
            // A relative path of one component has the empty path for a parent.
            if !path.as_os_str().is_empty() {
                File::open(path)
                    .and_then(|directory| directory.sync_all())
                    .map_err(io("syncing", path))?;
            }
        }
        let mut log = DiskLog {
            engine,
            dir: dir.to_path_buf(),
            is_new: false,
            order: Mutex::new(WriteOrder {
                unsynced: false,
                purging: false,
            }),
            replicas: RwLock::default(),
        };
        log.check_identity(store_id)?;
        log.read_catalogue()?;
        Ok(log)
    }

    /// Whether opening found no log and made an empty one. If the node has had one, it is lost, and
    /// the node must not start under its identity.
    pub fn is_new(&self) -> bool {
        self.is_new
    }

    fn check_identity(&mut self, store_id: StoreId) -> Result<(), StorageError> {
        let engine = self.engine.get();
        match engine.get(CATALOGUE_GROUP, IDENTITY_KEY) {
            Some(value) => {
                let found = record::decode_identity(&value).map_err(|e| self.damaged(e))?;
                if found != store_id {
                    return Err(self.damaged(format!(
                        "it belongs to store {found}, but the directory's identity says {store_id}; restore the directory as it was, or have the node rejoin with an empty one"
                    )));
                }
            }
            None if engine.is_empty() => {
                let mut batch = LogBatch::default();
                let value = record::encode_identity(store_id);
                self.put(&mut batch, CATALOGUE_GROUP, IDENTITY_KEY, value)?;
                self.engine.write(batch, true)?;
                self.is_new = true;
            }
            None => return Err(self.damaged("it has entries but no identity".into())),
        }
        Ok(())
    }

    /// Reads the catalogue and the extents of the logs, and finishes removals that a crash cut short.
    fn read_catalogue(&mut self) -> Result<(), StorageError> {
        let engine = self.engine.get();
        let mut replicas = Replicas::default();
        let mut bad = None;
        engine
            .scan_raw_messages(
                CATALOGUE_GROUP,
                Some(record::REPLICA_PREFIX),
                Some(record::REPLICA_END),
                false,
                |key, value| match record::decode_replica(value) {
                    Ok(record) if record::replica_key(record.replica) == key => {
                        replicas.catalogue.insert(record.replica, record);
                        true
                    }
                    Ok(record) => {
                        let key = key.escape_ascii();
                        bad = Some(format!("replica {} has the key {key}", record.replica));
                        false
                    }
                    Err(e) => {
                        bad = Some(format!("a record of its catalogue: {e}"));
                        false
                    }
                },
            )
            .map_err(|e| self.damaged(e.to_string()))?;
        if let Some(bad) = bad {
            return Err(self.damaged(bad));
        }
        let mut batch = LogBatch::default();
        for group in engine.raft_groups() {
            let record = replicas.catalogue.get(&ReplicaId(group));
            match record.map(|r| r.phase) {
                Some(ReplicaPhase::Active) => {
                    // An entry below the truncated position is left of a compaction whose command
                    // was lost with its file. The engine must forget it, or it sees a gap.
                    if let Ok(extent) = self.read_extent(ReplicaId(group)) {
                        if engine
                            .first_index(group)
                            .is_some_and(|first| first <= extent.truncated.index)
                        {
                            let index = extent.truncated.index + 1;
                            batch.add_command(group, Command::Compact { index });
                        }
                        replicas.extents.insert(ReplicaId(group), extent);
                    }
                }
                Some(ReplicaPhase::Tombstone) => batch.add_command(group, Command::Clean),
                None if group == CATALOGUE_GROUP => {}
                None => {
                    return Err(self.damaged(format!(
                        "it has a log of replica {group}, which its catalogue doesn't name"
                    )));
                }
            }
        }
        if !batch.is_empty() {
            self.engine.write(batch, true)?;
        }
        self.replicas = RwLock::new(replicas);
        Ok(())
    }

    /// The extent of a replica's log as the engine has it.
    fn read_extent(&self, replica: ReplicaId) -> Result<Extent, StorageError> {
        let engine = self.engine.get();
        let truncated = engine
            .get(replica.0, TRUNCATED_KEY)
            .ok_or_else(|| damaged_log(replica, "its truncated position is missing"))
            .and_then(|value| {
                record::decode_position(&value).map_err(|e| damaged_log(replica, e))
            })?;
        let span = engine
            .first_index(replica.0)
            .zip(engine.last_index(replica.0));
        let last = match span {
            Some((_, last)) if last <= truncated.index => truncated.index,
            Some((first, _)) if first > truncated.index + 1 => {
                return Err(damaged_log(
                    replica,
                    format!(
                        "entries {} to {} are missing",
                        truncated.index + 1,
                        first - 1
                    ),
                ));
            }
            Some((_, last)) => last,
            None => truncated.index,
        };
        Ok(Extent { truncated, last })
    }

    fn term(&self, replica: ReplicaId, index: Index) -> Result<Term, StorageError> {
        self.engine
            .read(|engine| engine.get_entry::<RaftEntries>(replica.0, index))
            .map_err(|e| damaged_log(replica, e))?
            .map(|entry| entry.term)
            .ok_or_else(|| damaged_log(replica, format!("entry {index} is missing")))
    }

    fn extent(&self, replica: ReplicaId) -> Result<Extent, StorageError> {
        let replicas = self.replicas();
        replicas.extents.get(&replica).copied().ok_or_else(|| {
            let reason = match replicas.catalogue.get(&replica).map(|r| r.phase) {
                Some(ReplicaPhase::Active) => "it was damaged when the node started",
                Some(ReplicaPhase::Tombstone) => "the replica was removed",
                None => "the node has no such replica",
            };
            StorageError::Inconsistent {
                replica,
                reason: reason.into(),
            }
        })
    }

    fn put(
        &self,
        batch: &mut LogBatch,
        group: u64,
        key: &[u8],
        value: Vec<u8>,
    ) -> Result<(), StorageError> {
        batch
            .put(group, key.to_vec(), value)
            .map_err(|e| self.engine.error(e))
    }

    fn damaged(&self, detail: String) -> StorageError {
        StorageError::Damaged {
            what: format!("the raft log in {}", self.dir.display()),
            detail,
        }
    }

    // No panic can leave these half changed: what panics is caught inside `EngineGuard`.
    fn order(&self) -> MutexGuard<'_, WriteOrder> {
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn replicas(&self) -> RwLockReadGuard<'_, Replicas> {
        self.replicas.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn replicas_mut(&self) -> RwLockWriteGuard<'_, Replicas> {
        self.replicas
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl<F: FileSystem + 'static> LogStore for DiskLog<F> {
    fn write(&self, writes: &[LogWrite]) -> Result<(), StorageError> {
        let _order = self.order();
        let mut after: HashMap<ReplicaId, Extent> = HashMap::with_capacity(writes.len());
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
        }
        if batch.is_empty() {
            return Ok(());
        }
        self.engine.write(batch, true)?;
        self.replicas_mut().extents.extend(after);
        Ok(())
    }

    fn create(&self, records: &[ReplicaRecord]) -> Result<(), StorageError> {
        let _order = self.order();
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
                let hard_state = HardState {
                    term: GROUP_START.term,
                    commit: GROUP_START.index,
                    ..Default::default()
                };
                batch
                    .put_message(replica.0, HARD_STATE_KEY.to_vec(), &hard_state)
                    .map_err(|e| self.engine.error(e))?;
                let truncated = record::encode_position(GROUP_START);
                self.put(&mut batch, replica.0, TRUNCATED_KEY, truncated)?;
                created.extents.insert(replica, Extent::NEW);
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
        let _order = self.order();
        let mut tombstones = BTreeMap::new();
        for replica in replicas {
            if let Some(record) = self.replicas().catalogue.get(replica)
                && record.phase == ReplicaPhase::Active
            {
                let phase = ReplicaPhase::Tombstone;
                tombstones.insert(
                    *replica,
                    ReplicaRecord {
                        phase,
                        ..record.clone()
                    },
                );
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

    fn load(&self, replica: ReplicaId) -> Result<LogState, StorageError> {
        let phase = self.replicas().catalogue.get(&replica).map(|r| r.phase);
        if phase != Some(ReplicaPhase::Active) {
            // Says why there is none.
            self.extent(replica)?;
        }
        let Extent { truncated, last } = self.read_extent(replica)?;
        let hard_state = self
            .engine
            .get()
            .get_message::<HardState>(replica.0, HARD_STATE_KEY)
            .map_err(|e| damaged_log(replica, format!("its hard state: {e}")))?
            .ok_or_else(|| damaged_log(replica, "its hard state is missing"))?;
        if hard_state.commit > last {
            return Err(damaged_log(
                replica,
                format!(
                    "entry {} was committed, but its last entry is {last}",
                    hard_state.commit
                ),
            ));
        }
        let terms = term_starts(truncated.index + 1, last, |index| self.term(replica, index))?;
        if let Some(&(index, term)) = terms.first()
            && term < truncated.term
        {
            return Err(damaged_log(
                replica,
                format!(
                    "entry {index} has term {term}, below the truncated term {}",
                    truncated.term
                ),
            ));
        }
        Ok(LogState {
            hard_state,
            truncated,
            last,
            terms,
        })
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
        result.map_err(|e| damaged_log(replica, e))
    }

    fn compact(&self, replica: ReplicaId, to: Position) -> Result<(), StorageError> {
        let mut order = self.order();
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
            let mut order = self.order();
            if order.purging {
                return Ok(Vec::new());
            }
            if order.unsynced {
                // The engine's own sync of an empty batch does nothing.
                let mut batch = LogBatch::default();
                self.put(&mut batch, CATALOGUE_GROUP, MARKER_KEY, Vec::new())?;
                self.engine.write(batch, true)?;
                order.unsynced = false;
            }
            order.purging = true;
        }
        let named = self.engine.purge();
        self.order().purging = false;
        let replicas = self.replicas();
        let mut named: Vec<ReplicaId> = named?
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

fn damaged_log(replica: ReplicaId, detail: impl ToString) -> StorageError {
    StorageError::Damaged {
        what: format!("the raft log of replica {replica}"),
        detail: detail.to_string(),
    }
}
