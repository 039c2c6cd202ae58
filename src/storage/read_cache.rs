//! What the engine is known to hold of some keys of one replica, so that reading them again needn't ask it.
//!
//! ```text
//! active ─► frozen ─► young: read, table ─► old: read, table ─► engine
//! ```
//!
//! It lies between the frozen tables and the engine: what is applied is looked up above it, so nothing has to
//! be taken out of it when a key is written. It has two generations, and each of them two parts: the table
//! whose absorption by the engine began the generation, if one did, and what was read of the engine since.
//! When a table is absorbed, or the younger generation has half of the room, the older is forgotten and the
//! younger becomes it. Nothing is copied for that; what is read of the old one joins the young.
//!
//! Invariant: for a key that no frozen table has, the first of the parts that knows it says what the engine
//! holds. It holds since
//!
//! - the engine changes a key of this replica only when it absorbs a frozen table, and from then on until it is
//!   in here that table hides the key;
//! - a table is laid over all that was known before it; if it can't be kept, nothing is;
//! - what is read counts only if no table was absorbed since its reader was made ([`ReadCache::stamp`]), and
//!   joins what is newer than the last table;
//! - parts are forgotten from the oldest on.

use std::sync::Arc;

use bytes::Bytes;

use super::memtable::Memtable;

/// See the module page. Owned by the state of which it knows something, and gone with it.
#[derive(Default)]
pub(super) struct ReadCache {
    young: Generation,
    old: Generation,
    /// How many tables were absorbed.
    stamp: u64,
    /// Bytes by which it may grow.
    room: usize,
}

#[derive(Default)]
struct Generation {
    /// Newer than the table.
    read: Memtable,
    table: Option<Arc<Memtable>>,
}

impl Generation {
    fn get(&self, key: &[u8]) -> Option<Option<Bytes>> {
        self.read.get(key).or_else(|| self.table.as_ref()?.get(key))
    }

    fn bytes(&self) -> usize {
        self.read.bytes + self.table.as_ref().map_or(0, |table| table.bytes)
    }
}

impl ReadCache {
    /// What the engine holds under `key`, if that is known; only for a key that no frozen table has.
    pub fn get(&self, key: &[u8]) -> Option<Option<Bytes>> {
        self.young.get(key).or_else(|| self.old.get(key))
    }

    /// Like [`ReadCache::get`]; what is found so stays a while longer.
    pub fn recall(&mut self, key: &[u8]) -> Option<Option<Bytes>> {
        if let Some(found) = self.young.get(key) {
            return Some(found);
        }
        let found = self.old.get(key)?;
        self.keep(key, found.clone());
        Some(found)
    }

    /// Says of which state of the engine a reader learns, for [`ReadCache::learn`].
    pub fn stamp(&self) -> u64 {
        self.stamp
    }

    /// Takes in what was read of the engine after it stood at `stamp`.
    pub fn learn(&mut self, stamp: u64, key: &[u8], value: Option<Bytes>) {
        // Of the engine before the last table: that may have changed the key, and would be forgotten first.
        if stamp == self.stamp {
            self.keep(key, value);
        }
    }

    fn keep(&mut self, key: &[u8], value: Option<Bytes>) {
        let before = self.young.read.bytes;
        if Memtable::cost(key, value.as_ref()) > self.room {
            // Nothing of others is forgotten for it, but the half that is due.
            self.forget_older();
            return;
        }
        self.young.read.insert(key, value);
        self.room = self.room.saturating_sub(self.young.read.bytes - before);
        if self.young.bytes() > self.old.bytes() + self.room {
            self.forget_older();
        }
    }

    /// The engine has absorbed `table`, which hides its keys no more.
    pub fn absorb(&mut self, table: Arc<Memtable>) {
        self.stamp += 1;
        if self.room == 0 {
            // What it has written isn't known any more, so what was known before mustn't be either.
            self.clear();
        } else {
            self.forget_older();
            self.young.table = Some(table);
        }
    }

    /// Forgets what wasn't asked for lately.
    pub fn forget_older(&mut self) {
        self.room += self.old.bytes();
        self.old = std::mem::take(&mut self.young);
    }

    fn clear(&mut self) {
        self.room += self.bytes();
        (self.young, self.old) = (Generation::default(), Generation::default());
    }

    /// Says by how many bytes it may grow from here on. Tables that are absorbed don't count: the
    /// memory is there already.
    pub fn allow(&mut self, room: usize) {
        self.room = room;
    }

    /// Bytes by which it may still grow.
    pub fn room(&self) -> usize {
        self.room
    }

    /// Bytes in it, about.
    pub fn bytes(&self) -> usize {
        self.young.bytes() + self.old.bytes()
    }
}

#[cfg(test)]
#[path = "read_cache_tests.rs"]
mod tests;
