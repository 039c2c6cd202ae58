//! A shard's state in a map in memory: the simplest that keeps the contract of [`StateBatch`]. For tests of
//! the machines, and as the model that real states are compared with, in tests and in [`crate::sim`].

use std::collections::BTreeMap;
use std::ops::Bound;

use bytes::Bytes;

use crate::storage::sessions::SessionTable;
use crate::storage::{StateBatch, StateView, StorageError};

/// The state.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct MemoryState {
    /// Keys and stored values.
    pub pairs: BTreeMap<Vec<u8>, Bytes>,
    /// The revision counter.
    pub revision: u64,
    /// Clients' sessions.
    pub sessions: SessionTable,
}

impl StateView for MemoryState {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StorageError> {
        Ok(self.pairs.get(key).cloned())
    }

    fn scan(
        &self,
        from: Bound<&[u8]>,
        visit: &mut dyn FnMut(&[u8], &Bytes) -> bool,
    ) -> Result<(), StorageError> {
        let range = (from, Bound::Unbounded);
        let mut pairs = self.pairs.range::<[u8], _>(range);
        pairs.all(|(key, value)| visit(key, value));
        Ok(())
    }

    fn revision(&self) -> u64 {
        self.revision
    }
}

impl StateBatch for MemoryState {
    fn put(&mut self, key: &[u8], value: Bytes) {
        self.pairs.insert(key.to_vec(), value);
    }

    fn delete(&mut self, key: &[u8]) {
        self.pairs.remove(key);
    }

    fn next_revision(&mut self) -> u64 {
        self.revision += 1;
        self.revision
    }

    fn raise_revision(&mut self, least: u64) {
        self.revision = self.revision.max(least);
    }

    fn sessions(&mut self) -> &mut SessionTable {
        &mut self.sessions
    }
}
