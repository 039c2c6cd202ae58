//! Reads that fail: what a replica sees of a disk that can't be read for a while, or on which a record
//! has rotted.
//!
//! The stores below are sound, and so is what the checks read of them; only what a group reads goes
//! through here. A record whose checksum is wrong answers [`StorageError::Damaged`], as the stores on
//! files do; that they notice is shown by their own suites.

use std::collections::BTreeSet;
use std::io;
use std::ops::Bound;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use raft::eraftpb::Entry;

use crate::ids::{Index, Position, ReplicaId};
use crate::storage::StorageError;
use crate::storage::engine::{Engine, Mutation};
use crate::storage::engine_memory::MemoryEngine;
use crate::storage::log::{Install, LogState, LogStore, LogWrite, ReplicaRecord};
use crate::storage::log_memory::MemoryLog;

/// What is wrong with a disk.
#[derive(Default)]
pub struct Faulty {
    /// A group reads: only then anything is wrong.
    reading: AtomicBool,
    /// Its reads fail.
    failing: AtomicBool,
    /// A failed read of a key looks like the absence of the key, which is a planted bug.
    absent: bool,
    /// One of them did.
    failed: AtomicBool,
    rotten: Mutex<Rotten>,
}

/// Replicas of which a record can't be read any more.
#[derive(Default)]
struct Rotten {
    logs: BTreeSet<ReplicaId>,
    states: BTreeSet<ReplicaId>,
}

impl Faulty {
    /// A sound disk. `absent`: see there.
    pub fn new(absent: bool) -> Faulty {
        Faulty { absent, ..Faulty::default() }
    }

    /// A group reads, until [`Faulty::end`]; `failing`: and can't.
    pub fn begin(&self, failing: bool) {
        self.failing.store(failing, Ordering::Relaxed);
        self.failed.store(false, Ordering::Relaxed);
        self.reading.store(true, Ordering::Relaxed);
    }

    /// The checks read.
    pub fn end(&self) {
        self.reading.store(false, Ordering::Relaxed);
    }

    /// A record in the log of a replica rots.
    pub fn rot_log(&self, replica: ReplicaId) {
        self.rotten().logs.insert(replica);
    }

    /// A record in the state of a replica rots.
    pub fn rot_state(&self, replica: ReplicaId) {
        self.rotten().states.insert(replica);
    }

    /// The state of a replica is another one from now on, in place of the one that has rotted.
    pub fn replace_state(&self, replica: ReplicaId) {
        self.rotten().states.remove(&replica);
    }

    /// Whether its log is rotten.
    pub fn has_rotten_log(&self, replica: ReplicaId) -> bool {
        self.rotten().logs.contains(&replica)
    }

    /// Whether anything of a replica is rotten.
    pub fn is_rotten(&self, replica: ReplicaId) -> bool {
        let rotten = self.rotten();
        rotten.logs.contains(&replica) || rotten.states.contains(&replica)
    }

    /// Whether a read of the group that reads, or read last, failed.
    pub fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }

    fn rotten(&self) -> MutexGuard<'_, Rotten> {
        self.rotten.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads a record of `replica`; `rotten` picks where.
    fn read(
        &self,
        what: &'static str,
        replica: ReplicaId,
        rotten: fn(&Rotten) -> &BTreeSet<ReplicaId>,
    ) -> Result<(), StorageError> {
        if !self.reading.load(Ordering::Relaxed) {
            return Ok(());
        }
        if self.failing.load(Ordering::Relaxed) {
            self.failed.store(true, Ordering::Relaxed);
            let source = io::Error::other("input/output error");
            return Err(StorageError::Io { action: "reading", path: what.into(), source });
        }
        if rotten(&self.rotten()).contains(&replica) {
            let what = format!("{what} of replica {replica}");
            return Err(StorageError::Damaged { what, detail: "a record has a wrong checksum".into() });
        }
        Ok(())
    }

    fn read_log(&self, replica: ReplicaId) -> Result<(), StorageError> {
        self.read("log", replica, |rotten| &rotten.logs)
    }

    fn read_state(&self, key: &[u8]) -> Result<(), StorageError> {
        let replica = key.first_chunk::<8>().map(|id| ReplicaId(u64::from_be_bytes(*id)));
        self.read("state", replica.unwrap_or_default(), |rotten| &rotten.states)
    }
}

/// The log of a node as its groups read it.
pub struct ReadLog {
    /// What is there.
    pub log: Arc<MemoryLog>,
    /// What is wrong with it.
    pub faulty: Arc<Faulty>,
}

impl LogStore for ReadLog {
    fn write(&self, writes: &[LogWrite]) -> Result<(), StorageError> {
        self.log.write(writes)
    }

    fn create(&self, records: &[ReplicaRecord]) -> Result<(), StorageError> {
        self.log.create(records)
    }

    fn catalogue(&self) -> Result<Vec<ReplicaRecord>, StorageError> {
        self.log.catalogue()
    }

    fn remove(&self, replicas: &[ReplicaId]) -> Result<(), StorageError> {
        self.log.remove(replicas)
    }

    fn install(&self, replica: ReplicaId, install: &Install) -> Result<(), StorageError> {
        self.log.install(replica, install)
    }

    fn destroyed(&self, replicas: &[ReplicaId]) -> Result<(), StorageError> {
        self.log.destroyed(replicas)
    }

    fn load(&self, replica: ReplicaId) -> Result<LogState, StorageError> {
        self.faulty.read_log(replica)?;
        self.log.load(replica)
    }

    fn entries(
        &self,
        replica: ReplicaId,
        low: Index,
        high: Index,
        max_bytes: usize,
    ) -> Result<Vec<Entry>, StorageError> {
        self.faulty.read_log(replica)?;
        self.log.entries(replica, low, high, max_bytes)
    }

    fn compact(&self, replica: ReplicaId, to: Position) -> Result<(), StorageError> {
        self.log.compact(replica, to)
    }

    fn purge(&self) -> Result<Vec<ReplicaId>, StorageError> {
        self.log.purge()
    }

    fn disk_bytes(&self) -> u64 {
        self.log.disk_bytes()
    }
}

/// The engine of a node as its groups read it.
pub struct ReadEngine {
    /// What is there.
    pub engine: Arc<MemoryEngine>,
    /// What is wrong with it.
    pub faulty: Arc<Faulty>,
}

impl Engine for ReadEngine {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StorageError> {
        match self.faulty.read_state(key) {
            Ok(()) => self.engine.get(key),
            Err(_) if self.faulty.absent => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn scan(
        &self,
        from: Bound<&[u8]>,
        to: &[u8],
        visit: &mut dyn FnMut(&[u8], Bytes) -> bool,
    ) -> Result<(), StorageError> {
        if let Bound::Included(key) | Bound::Excluded(key) = from {
            self.faulty.read_state(key)?;
        }
        self.engine.scan(from, to, visit)
    }

    fn write(&self, batch: &[Mutation]) -> Result<(), StorageError> {
        self.engine.write(batch)
    }

    fn sync(&self) -> Result<(), StorageError> {
        self.engine.sync()
    }

    fn disk_bytes(&self) -> u64 {
        self.engine.disk_bytes()
    }

    fn name(&self) -> &'static str {
        self.engine.name()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::keys;

    #[test]
    fn a_faulty_disk_answers_errors_and_a_sound_one_what_is_there() {
        let faulty = Arc::new(Faulty::new(false));
        let engine = ReadEngine { engine: Arc::new(MemoryEngine::new()), faulty: faulty.clone() };
        let keys = [1, 2].map(|replica| keys::user_key(ReplicaId(replica), 1, b"k"));
        for key in &keys {
            engine.write(&[(key.clone(), Some(Bytes::from_static(b"v")))]).unwrap();
        }
        faulty.rot_state(ReplicaId(1));
        assert!(engine.get(&keys[0]).unwrap().is_some(), "the checks see what is there");
        faulty.begin(false);
        assert!(matches!(engine.get(&keys[0]), Err(StorageError::Damaged { .. })));
        assert_eq!(engine.get(&keys[1]).unwrap(), Some(Bytes::from_static(b"v")));
        faulty.begin(true);
        assert!(matches!(engine.get(&keys[1]), Err(StorageError::Io { .. })));
        faulty.end();
        assert!(engine.get(&keys[1]).unwrap().is_some());
        assert!(faulty.has_failed());
        assert!(faulty.is_rotten(ReplicaId(1)) && !faulty.is_rotten(ReplicaId(2)));
        assert!(!faulty.has_rotten_log(ReplicaId(1)));
        faulty.replace_state(ReplicaId(1));
        assert!(!faulty.is_rotten(ReplicaId(1)));
    }
}
