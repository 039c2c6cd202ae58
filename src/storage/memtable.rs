//! Recent applied writes of one replica, in memory.
//!
//! The raft log is their write-ahead log: after a crash they are made again by applying it.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Bound;

use bytes::Bytes;

use super::table_key::TableKey;

/// What an entry costs beside its key and value: its share of the tree's nodes and the
/// allocators' own, about.
pub const ENTRY_OVERHEAD_BYTES: usize = 128;

/// Recent writes in key order; `None` marks a removed key.
#[derive(Default, Debug, Clone)]
pub struct Memtable {
    /// The newest write to each key.
    pub entries: BTreeMap<TableKey, Option<Bytes>>,
    /// Bytes of keys and values and their bookkeeping, about.
    pub bytes: usize,
}

impl Memtable {
    /// Records the newest write to `key`. The value should own its bytes: a slice of a greater
    /// buffer would keep all of that in memory, uncounted.
    pub fn insert(&mut self, key: &[u8], value: Option<Bytes>) {
        let added = value.as_ref().map_or(0, Bytes::len);
        let before = match TableKey::short(key) {
            Some(short) => match self.entries.entry(short) {
                Entry::Occupied(mut place) => Some(place.insert(value)),
                Entry::Vacant(place) => {
                    place.insert(value);
                    None
                }
            },
            // Nothing is allocated to find one that is there.
            None => match self.entries.get_mut(key) {
                Some(place) => Some(std::mem::replace(place, value)),
                None => {
                    self.entries.insert(TableKey::new(key), value);
                    None
                }
            },
        };
        match before {
            Some(before) => self.bytes -= before.map_or(0, |value| value.len()),
            None => self.bytes += ENTRY_OVERHEAD_BYTES + key.len(),
        }
        self.bytes += added;
    }

    /// What a write of `value` to `key`, which isn't here, adds to the bytes.
    pub fn cost(key: &[u8], value: Option<&Bytes>) -> usize {
        ENTRY_OVERHEAD_BYTES + key.len() + value.map_or(0, Bytes::len)
    }

    /// The newest write to `key`, if it is here: `Some(None)` for a removal.
    pub fn get(&self, key: &[u8]) -> Option<Option<Bytes>> {
        let found = match TableKey::short(key) {
            Some(short) => self.entries.get(&short),
            None => self.entries.get(key),
        };
        found.cloned()
    }

    /// Writes in `[from, to)` in key order; `to` empty: no upper bound.
    pub fn range<'a>(
        &'a self,
        from: Bound<&[u8]>,
        to: &[u8],
    ) -> impl Iterator<Item = (&'a [u8], &'a Option<Bytes>)> + use<'a> {
        let upper = if to.is_empty() { Bound::Unbounded } else { Bound::Excluded(to) };
        // The tree panics on a range that ends before it starts.
        let empty = match from {
            Bound::Included(from) | Bound::Excluded(from) => !to.is_empty() && from >= to,
            Bound::Unbounded => false,
        };
        let range = if empty { None } else { Some(self.entries.range::<[u8], _>((from, upper))) };
        range.into_iter().flatten().map(|(key, value)| (&**key, value))
    }

    /// Whether nothing was written.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Number of keys written or removed.
    pub fn len(&self) -> usize {
        self.entries.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_follow_every_overwrite() {
        let mut table = Memtable::default();
        table.insert(b"key", Some(Bytes::from_static(b"12345")));
        assert_eq!(table.bytes, ENTRY_OVERHEAD_BYTES + 3 + 5);
        table.insert(b"key", Some(Bytes::from_static(b"1")));
        assert_eq!(table.bytes, ENTRY_OVERHEAD_BYTES + 3 + 1);
        table.insert(b"key", None);
        assert_eq!(table.bytes, ENTRY_OVERHEAD_BYTES + 3);
        table.insert(b"other", None);
        assert_eq!(table.bytes, 2 * ENTRY_OVERHEAD_BYTES + 3 + 5);
        assert_eq!(table.get(b"key"), Some(None));
        assert_eq!(table.get(b"none"), None);
    }

    #[test]
    fn ranges_that_end_before_they_start_are_empty() {
        let mut table = Memtable::default();
        table.insert(b"b", None);
        let count = |from: Bound<&[u8]>, to: &[u8]| table.range(from, to).count();
        assert_eq!(count(Bound::Included(b"b"), b""), 1);
        assert_eq!(count(Bound::Excluded(b"b"), b""), 0);
        assert_eq!(count(Bound::Excluded(b"b"), b"b"), 0);
        assert_eq!(count(Bound::Included(b"c"), b"a"), 0);
        assert_eq!(count(Bound::Unbounded, b"b"), 0);
        assert_eq!(count(Bound::Unbounded, b"c"), 1);
    }
}
