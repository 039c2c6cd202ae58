//! What the log reads back: its identity and catalogue when it opens, and the state of one replica.

use raft::eraftpb::HardState;
use raft_engine::env::FileSystem;
use raft_engine::{Command, LogBatch};

use super::guard::{Unread, owner};
use super::record::{self, CATALOGUE_GROUP, HARD_STATE_KEY, IDENTITY_KEY, TRUNCATED_KEY};
use super::{DiskLog, RaftEntries, Replicas, damaged_log};
use crate::ids::{Index, ReplicaId, StoreId, Term};
use crate::storage::StorageError;
use crate::storage::log::{Extent, LogState, ReplicaPhase, ReplicaRecord, term_starts};

impl<F: FileSystem + 'static> DiskLog<F> {
    /// Whether there is a log. False: it is empty, and may be.
    pub(super) fn check_identity(&self, store_id: StoreId, may_create: bool) -> Result<bool, StorageError> {
        let engine = self.engine.get();
        match (owner(&self.dir, engine, store_id)?, engine.is_empty()) {
            (true, _) => Ok(true),
            (false, true) if may_create => Ok(false),
            (false, true) => Err(super::lost(&self.dir)),
            (false, false) => Err(self.damaged("it has entries but no identity".into())),
        }
    }

    /// Writes the store id, the first thing in a log.
    pub(super) fn write_identity(&mut self, store_id: StoreId) -> Result<(), StorageError> {
        let mut batch = LogBatch::default();
        let value = record::encode_identity(store_id);
        self.put(&mut batch, CATALOGUE_GROUP, IDENTITY_KEY, value)?;
        self.engine.write(batch, true)?;
        self.is_new = true;
        Ok(())
    }

    /// Reads the catalogue and the extents of the logs, and finishes removals that a crash cut short.
    pub(super) fn read_catalogue(&mut self) -> Result<(), StorageError> {
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
        engine
            .scan_raw_messages(
                CATALOGUE_GROUP,
                Some(record::DESTROYED_PREFIX),
                Some(record::DESTROYED_END),
                false,
                |key, _| {
                    // Without its tombstone, a mark says nothing.
                    let record = record::destroyed_replica(key).and_then(|r| replicas.catalogue.get_mut(&r));
                    if let Some(record) = record.filter(|record| record.phase == ReplicaPhase::Tombstone) {
                        record.phase = ReplicaPhase::Destroyed;
                    }
                    true
                },
            )
            .map_err(|e| self.damaged(e.to_string()))?;
        let mut batch = LogBatch::default();
        for group in engine.raft_groups() {
            let record = replicas.catalogue.get(&ReplicaId(group));
            match record.map(|r| r.phase) {
                Some(ReplicaPhase::Active) => {
                    // An entry below the truncated position is left of a compaction whose command
                    // was lost with its file. The engine must forget it, or it sees a gap.
                    if let Ok(extent) = self.read_extent(ReplicaId(group)) {
                        if engine.first_index(group).is_some_and(|first| first <= extent.truncated.index) {
                            let index = extent.truncated.index + 1;
                            batch.add_command(group, Command::Compact { index });
                        }
                        replicas.extents.insert(ReplicaId(group), extent);
                    }
                }
                Some(ReplicaPhase::Tombstone | ReplicaPhase::Destroyed) => {
                    batch.add_command(group, Command::Clean);
                }
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
        *self.replicas_mut() = replicas;
        Ok(())
    }

    /// The extent of a replica's log as the engine has it.
    pub(super) fn read_extent(&self, replica: ReplicaId) -> Result<Extent, StorageError> {
        let engine = self.engine.get();
        let truncated = engine
            .get(replica.0, TRUNCATED_KEY)
            .ok_or_else(|| damaged_log(replica, "its truncated position is missing"))
            .and_then(|value| record::decode_position(&value).map_err(|e| damaged_log(replica, e)))?;
        let span = engine.first_index(replica.0).zip(engine.last_index(replica.0));
        let last = match span {
            Some((_, last)) if last <= truncated.index => truncated.index,
            Some((first, _)) if first > truncated.index + 1 => {
                return Err(damaged_log(
                    replica,
                    format!("entries {} to {} are missing", truncated.index + 1, first - 1),
                ));
            }
            Some((_, last)) => last,
            None => truncated.index,
        };
        Ok(Extent { truncated, last })
    }

    /// Hard state and extent of a log as the engine has them, verified.
    pub(super) fn read_state(&self, replica: ReplicaId) -> Result<LogState, StorageError> {
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
                format!("entry {} was committed, but its last entry is {last}", hard_state.commit),
            ));
        }
        let terms = term_starts(truncated.index + 1, last, |index| self.term(replica, index))?;
        if let Some(&(index, term)) = terms.first()
            && term < truncated.term
        {
            return Err(damaged_log(
                replica,
                format!("entry {index} has term {term}, below the truncated term {}", truncated.term),
            ));
        }
        let membership = self.replicas().catalogue.get(&replica).map(ReplicaRecord::membership);
        Ok(LogState { hard_state, truncated, last, terms, membership: membership.unwrap_or_default() })
    }

    /// The term of an entry that the log must have.
    pub(super) fn term(&self, replica: ReplicaId, index: Index) -> Result<Term, StorageError> {
        self.engine
            .read(|engine| engine.get_entry::<RaftEntries>(replica.0, index))
            .map_err(|e| unread(replica, e))?
            .map(|entry| entry.term)
            .ok_or_else(|| damaged_log(replica, format!("entry {index} is missing")))
    }
}

/// Why an entry couldn't be read: because it is damaged, or because the disk refused.
pub(super) fn unread(replica: ReplicaId, Unread { detail, damaged }: Unread) -> StorageError {
    if damaged {
        return damaged_log(replica, detail);
    }
    StorageError::Engine {
        engine: "raft log",
        reason: format!("reading the log of replica {replica}: {detail}"),
    }
}
