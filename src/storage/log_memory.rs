//! The raft log in memory, for tests and simulation.
//!
//! It keeps the contract of [`LogStore`] to the letter: a write is durable when it returns, so a
//! crash of the node loses nothing of it, and what a crash may lose (a write under way) the
//! simulation decides by having it fail. Deterministic: no clock, no randomness, ordered maps.
//! A clone is an independent copy, as of a disk.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use protobuf::Message;
use raft::eraftpb::{Entry, HardState};

use super::StorageError;
use super::log::{
    Extent, Install, Installed, LogState, LogStore, LogWrite, ReplicaPhase, ReplicaRecord, term_starts,
};
use crate::ids::{Index, Position, ReplicaId};

/// What a write that is made to fail leaves behind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FailedWrite {
    /// Nothing of it.
    Lost,
    /// All of it, though the caller was told of a failure.
    Kept,
}

/// The raft log of one simulated node.
#[derive(Default)]
pub struct MemoryLog {
    content: Mutex<Content>,
}

#[derive(Clone, Default)]
struct Content {
    catalogue: BTreeMap<ReplicaId, ReplicaRecord>,
    logs: BTreeMap<ReplicaId, ReplicaLog>,
    /// Durable operations since the log was made.
    writes: u64,
    /// Set by a test: the write with this number fails.
    fail: Option<(u64, FailedWrite)>,
    /// A write failed: nothing works until [`MemoryLog::crash`].
    failed: bool,
    /// Replicas whose logs a test has damaged.
    damaged: BTreeSet<ReplicaId>,
}

#[derive(Clone)]
struct ReplicaLog {
    extent: Extent,
    hard_state: HardState,
    /// The entries `extent.truncated.index + 1 ..= extent.last`.
    entries: VecDeque<Entry>,
}

impl Clone for MemoryLog {
    fn clone(&self) -> MemoryLog {
        MemoryLog { content: Mutex::new(self.lock().clone()) }
    }
}

impl MemoryLog {
    /// An empty log.
    pub fn new() -> MemoryLog {
        MemoryLog::default()
    }

    /// Makes the durable operation after the next `skip` ones fail, and all later ones until
    /// [`MemoryLog::crash`].
    pub fn fail_write(&self, skip: u64, leaves: FailedWrite) {
        let mut content = self.lock();
        content.fail = Some((content.writes + skip, leaves));
    }

    /// The node crashed and opens its log again: everything that was written is there, and a
    /// failure that was asked for is over.
    pub fn crash(&self) {
        let mut content = self.lock();
        content.fail = None;
        content.failed = false;
    }

    /// From now on a replica's log can't be read; it can still be written and removed.
    pub fn damage(&self, replica: ReplicaId) {
        self.lock().damaged.insert(replica);
    }

    /// Durable operations so far.
    pub fn writes(&self) -> u64 {
        self.lock().writes
    }

    fn lock(&self) -> MutexGuard<'_, Content> {
        // Every change is made only after all checks, so a panic leaves the content whole.
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Content {
    fn log(&self, replica: ReplicaId) -> Result<&ReplicaLog, StorageError> {
        self.logs.get(&replica).ok_or_else(|| unknown(replica))
    }

    /// The same for whoever reads it.
    fn readable(&self, replica: ReplicaId) -> Result<&ReplicaLog, StorageError> {
        if self.damaged.contains(&replica) {
            return Err(StorageError::Damaged {
                what: format!("the log of replica {replica}"),
                detail: "a test asked for it".into(),
            });
        }
        self.log(replica)
    }

    /// Counts one durable operation and carries it out, unless it is the one that should fail.
    fn durably(&mut self, change: impl FnOnce(&mut Content)) -> Result<(), StorageError> {
        let failure = || StorageError::SyncFailed {
            path: PathBuf::from("memory"),
            reason: "failure asked for by a test".into(),
        };
        if self.failed {
            return Err(failure());
        }
        let number = self.writes;
        self.writes += 1;
        match self.fail {
            Some((at, leaves)) if at == number => {
                self.failed = true;
                if leaves == FailedWrite::Kept {
                    change(self);
                }
                Err(failure())
            }
            _ => {
                change(self);
                Ok(())
            }
        }
    }
}

fn unknown(replica: ReplicaId) -> StorageError {
    StorageError::Inconsistent { replica, reason: "the node has no such replica, or removed it".into() }
}

impl LogStore for MemoryLog {
    fn write(&self, writes: &[LogWrite]) -> Result<(), StorageError> {
        let mut content = self.lock();
        let mut after = BTreeMap::new();
        for write in writes {
            let before = match after.get(&write.replica) {
                Some(extent) => *extent,
                None => content.log(write.replica)?.extent,
            };
            after.insert(write.replica, before.after(write)?);
        }
        if writes.is_empty() {
            return Ok(());
        }
        content.durably(|content| {
            for write in writes {
                let Some(log) = content.logs.get_mut(&write.replica) else {
                    continue;
                };
                if let Some(first) = write.entries.first() {
                    let keep = first.index - 1 - log.extent.truncated.index;
                    log.entries.truncate(keep as usize);
                    log.entries.extend(write.entries.iter().cloned());
                    log.extent.last = log.extent.truncated.index + log.entries.len() as u64;
                }
                if let Some(hard_state) = &write.hard_state {
                    log.hard_state = hard_state.clone();
                }
                let record = content.catalogue.get(&write.replica);
                let change = write.membership.as_ref().zip(record);
                if let Some(record) = change.and_then(|(membership, record)| record.with(membership)) {
                    content.catalogue.insert(write.replica, record);
                }
            }
        })
    }

    fn create(&self, records: &[ReplicaRecord]) -> Result<(), StorageError> {
        self.lock().durably(|content| {
            for record in records {
                if content.catalogue.contains_key(&record.replica) {
                    continue;
                }
                content.catalogue.insert(record.replica, record.clone());
                if record.phase == ReplicaPhase::Active {
                    let (extent, hard_state) = (Extent::new(record), record.first_hard_state());
                    let log = ReplicaLog { extent, hard_state, entries: VecDeque::new() };
                    content.logs.insert(record.replica, log);
                }
            }
        })
    }

    fn catalogue(&self) -> Result<Vec<ReplicaRecord>, StorageError> {
        Ok(self.lock().catalogue.values().cloned().collect())
    }

    fn remove(&self, replicas: &[ReplicaId]) -> Result<(), StorageError> {
        self.lock().durably(|content| {
            for replica in replicas {
                let record = content.catalogue.get_mut(replica);
                if let Some(record) = record.filter(|record| record.phase == ReplicaPhase::Active) {
                    record.phase = ReplicaPhase::Tombstone;
                    content.logs.remove(replica);
                }
            }
        })
    }

    fn install(&self, replica: ReplicaId, install: &Install) -> Result<(), StorageError> {
        let mut content = self.lock();
        let log = content.log(replica)?;
        let record = content.catalogue.get(&replica).ok_or_else(|| unknown(replica))?;
        let Position { index, .. } = install.position;
        let offset = index.checked_sub(log.extent.truncated.index + 1);
        let term_at = offset.and_then(|offset| log.entries.get(offset as usize)).map(|entry| entry.term);
        let after = install.apply(record, log.extent, &log.hard_state, term_at)?;
        let Installed { record, hard_state, extent } = after;
        content.durably(|content| {
            let kept = (extent.last - index) as usize;
            let before = content.logs.remove(&replica).map(|log| log.entries).unwrap_or_default();
            let entries = before.into_iter().rev().take(kept).rev().collect();
            content.catalogue.insert(replica, record);
            content.logs.insert(replica, ReplicaLog { extent, hard_state, entries });
        })
    }

    fn destroyed(&self, replicas: &[ReplicaId]) -> Result<(), StorageError> {
        self.lock().durably(|content| {
            for replica in replicas {
                let record = content.catalogue.get_mut(replica);
                if let Some(record) = record.filter(|record| record.phase == ReplicaPhase::Tombstone) {
                    record.phase = ReplicaPhase::Destroyed;
                }
            }
        })
    }

    fn load(&self, replica: ReplicaId) -> Result<LogState, StorageError> {
        let content = self.lock();
        let log = content.readable(replica)?;
        let first = log.extent.truncated.index + 1;
        Ok(LogState {
            hard_state: log.hard_state.clone(),
            truncated: log.extent.truncated,
            last: log.extent.last,
            terms: term_starts(first, log.extent.last, |index| {
                Ok(log.entries[(index - first) as usize].term)
            })?,
            membership: content.catalogue.get(&replica).map(ReplicaRecord::membership).unwrap_or_default(),
        })
    }

    fn entries(
        &self,
        replica: ReplicaId,
        low: Index,
        high: Index,
        max_bytes: usize,
    ) -> Result<Vec<Entry>, StorageError> {
        let content = self.lock();
        let log = content.readable(replica)?;
        let truncated = log.extent.truncated.index;
        if low <= truncated {
            return Err(StorageError::Compacted(truncated));
        }
        let mut bytes = 0;
        Ok(log
            .entries
            .iter()
            .skip((low - truncated - 1) as usize)
            .take(high.saturating_sub(low) as usize)
            .enumerate()
            .take_while(|(i, entry)| {
                bytes += entry.compute_size() as usize;
                *i == 0 || bytes <= max_bytes
            })
            .map(|(_, entry)| entry.clone())
            .collect())
    }

    fn compact(&self, replica: ReplicaId, to: Position) -> Result<(), StorageError> {
        let mut content = self.lock();
        let Some(after) = content.log(replica)?.extent.compacted(replica, to)? else {
            return Ok(());
        };
        content.durably(|content| {
            if let Some(log) = content.logs.get_mut(&replica) {
                log.entries.drain(..(to.index - log.extent.truncated.index) as usize);
                log.extent = after;
            }
        })
    }

    fn purge(&self) -> Result<Vec<ReplicaId>, StorageError> {
        Ok(Vec::new())
    }

    fn disk_bytes(&self) -> u64 {
        let entries = |log: &ReplicaLog| log.entries.iter().map(|e| u64::from(e.compute_size())).sum::<u64>();
        self.lock().logs.values().map(entries).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{DatabaseId, Epoch, NodeId, ShardId};
    use crate::machine::MachineKind;
    use crate::placement::map::{Member, MemberRole};
    use crate::placement::ring::RingRange;

    fn log() -> MemoryLog {
        let log = MemoryLog::new();
        log.create(&[ReplicaRecord {
            replica: ReplicaId(7),
            shard: ShardId(1),
            database: DatabaseId(1),
            machine: MachineKind::Kv,
            phase: ReplicaPhase::Active,
            range: RingRange::ALL,
            epoch: Epoch::default(),
            members: vec![Member { replica: ReplicaId(7), node: NodeId(1), role: MemberRole::Voter }],
            members_at: 0,
            ordered_at: 0,
            generation: 1,
        }])
        .unwrap();
        log
    }

    fn append(log: &MemoryLog, index: Index) -> Result<(), StorageError> {
        let entry = Entry { index, term: 6, ..Default::default() };
        log.write(&[LogWrite {
            replica: ReplicaId(7),
            entries: vec![entry],
            hard_state: None,
            membership: None,
        }])
    }

    #[test]
    fn a_failed_write_is_lost_or_kept_as_asked_and_stops_the_log() {
        for (leaves, last) in [(FailedWrite::Lost, 6), (FailedWrite::Kept, 7)] {
            let log = log();
            log.fail_write(1, leaves);
            append(&log, 6).unwrap();
            assert!(append(&log, 7).is_err());
            assert!(append(&log, 8).is_err());
            log.crash();
            assert_eq!(log.load(ReplicaId(7)).unwrap().last, last);
            append(&log, last + 1).unwrap();
        }
    }

    #[test]
    fn a_clone_is_a_copy() {
        let log = log();
        let copy = log.clone();
        append(&log, 6).unwrap();
        assert_eq!(copy.load(ReplicaId(7)).unwrap().last, 5);
    }
}
