//! What is to be flushed of each replica, out of its frozen tables.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::sync::Arc;

use bytes::Bytes;

use super::engine::Engine;
use super::redo::Section;
use super::state::{Frozen, StateHeader};
use super::{StorageError, keys, merge, pulse};
use crate::ids::{Index, ReplicaId};

/// Takes the kind of a key, the key and its new value.
pub(super) type Change<'a> = dyn FnMut(u8, &[u8], Option<&Bytes>) -> Result<(), StorageError> + 'a;

/// All tables of one replica generation in a flush, as if they were one.
pub(super) struct Source {
    pub section: Section,
    /// Newest first.
    pub tables: Vec<Arc<Frozen>>,
}

impl Source {
    /// Whose, and of which generation.
    pub fn name(&self) -> (ReplicaId, u32) {
        (self.section.replica, self.section.generation)
    }

    /// Bytes of its tables in memory.
    pub fn bytes(&self) -> usize {
        self.tables.iter().map(|frozen| frozen.bytes()).sum()
    }

    /// Calls `change` with the newest change of each key, in key order.
    pub fn each(&self, change: &mut Change<'_>) -> Result<(), StorageError> {
        for (at, kind) in [keys::KIND_USER, keys::KIND_SESSION].into_iter().enumerate() {
            let parts = self.tables.iter().map(|frozen| frozen.parts()[at].1);
            let mut layers: Vec<_> = parts.map(|table| merge::layer(table, Bound::Unbounded, &[])).collect();
            while let Some((key, value)) = merge::next(&mut layers, None) {
                change(kind, key, value.as_ref())?;
                // A great table takes long to write, on a slow disk for longer than a store may stand still.
                pulse::beat();
            }
        }
        Ok(())
    }
}

/// Tables by replica generation, in key order.
pub(super) fn sources(tables: Vec<Arc<Frozen>>, engine: &dyn Engine) -> Result<Vec<Source>, StorageError> {
    let mut sources = BTreeMap::<(ReplicaId, u32), Source>::new();
    for frozen in tables {
        let source = match sources.entry((frozen.replica, frozen.generation)) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(Source {
                section: Section {
                    replica: frozen.replica,
                    generation: frozen.generation,
                    base: held(engine, frozen.replica, frozen.generation)?,
                    header: frozen.header.clone(),
                },
                tables: Vec::new(),
            }),
        };
        assert!(
            source.section.header.applied.index <= frozen.header.applied.index,
            "tables of replica {} out of order",
            frozen.replica
        );
        source.section.header = frozen.header.clone();
        source.tables.insert(0, frozen);
    }
    Ok(sources.into_values().collect())
}

/// Sources in the same order, together in parts of about `size` bytes. One that has as many is a part by itself.
pub(super) fn in_parts(sources: impl IntoIterator<Item = Source>, size: usize) -> VecDeque<Vec<Source>> {
    let mut parts: VecDeque<Vec<Source>> = VecDeque::new();
    let mut bytes = size;
    for source in sources {
        if bytes.max(source.bytes()) >= size {
            parts.push_back(Vec::new());
            bytes = 0;
        }
        bytes += source.bytes();
        if let Some(part) = parts.back_mut() {
            part.push(source);
        }
    }
    parts
}

/// The applied index of the state that the engine holds; 0 if it holds none.
pub(super) fn held(engine: &dyn Engine, replica: ReplicaId, generation: u32) -> Result<Index, StorageError> {
    match engine.get(&keys::header_key(replica, generation))? {
        Some(bytes) => {
            let what = format!("state of replica {replica} (generation {generation})");
            Ok(StateHeader::decode(&bytes, &what)?.applied.index)
        }
        None => Ok(0),
    }
}
