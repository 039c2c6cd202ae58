//! Reading several layers of writes as one ordered map.

use std::iter::Peekable;
use std::ops::Bound;

use bytes::Bytes;

use super::engine::Engine;
use super::memtable::Memtable;
use super::{StorageError, keys};
use crate::ids::ReplicaId;

/// A memtable's writes from some key on.
pub(super) type Layer<'a> = Peekable<Box<dyn Iterator<Item = (&'a [u8], &'a Option<Bytes>)> + 'a>>;

/// The layer of a memtable for keys in `[from, to)`; `to` empty: no upper bound.
pub(super) fn layer<'a>(table: &'a Memtable, from: Bound<&[u8]>, to: &[u8]) -> Layer<'a> {
    let range: Box<dyn Iterator<Item = _>> = Box::new(table.range(from, to));
    range.peekable()
}

/// Which user keys to read.
pub(super) struct UserRange<'a> {
    pub replica: ReplicaId,
    pub generation: u32,
    pub from: Bound<&'a [u8]>,
    /// Exclusive; empty: no upper bound.
    pub to: &'a [u8],
}

/// Calls `visit` with each pair of user keys in the range, in key order, until it returns false. For
/// a key in several layers the first of them counts; a removal hides the key; the engine comes last.
pub(super) fn scan(
    mut layers: Vec<Layer<'_>>,
    engine: &dyn Engine,
    range: UserRange<'_>,
    visit: &mut dyn FnMut(&[u8], &Bytes) -> bool,
) -> Result<(), StorageError> {
    let key_of = |key: &[u8]| keys::user_key(range.replica, range.generation, key);
    let (first, included) = match range.from {
        Bound::Included(key) => (key_of(key), true),
        Bound::Excluded(key) => (key_of(key), false),
        Bound::Unbounded => (key_of(&[]), true),
    };
    let from = if included { Bound::Included(first.as_slice()) } else { Bound::Excluded(first.as_slice()) };
    let to = if range.to.is_empty() {
        keys::user_end(range.replica, range.generation).to_vec()
    } else {
        key_of(range.to)
    };
    if first > to {
        return Ok(());
    }

    let mut stopped = false;
    engine.scan(from, &to, &mut |key, value| {
        let key = &key[keys::PREFIX_BYTES..];
        while let Some((above, newer)) = next(&mut layers, Some(key)) {
            if let Some(newer) = newer
                && !visit(above, newer)
            {
                stopped = true;
                return false;
            }
            if above == key {
                return true;
            }
        }
        stopped = !visit(key, &value);
        !stopped
    })?;
    while !stopped && let Some((key, value)) = next(&mut layers, None) {
        if let Some(value) = value {
            stopped = !visit(key, value);
        }
    }
    Ok(())
}

/// Takes the least key of all layers, if it is not above `limit`, with the first layer's write to it.
pub(super) fn next<'a>(
    layers: &mut [Layer<'a>],
    limit: Option<&[u8]>,
) -> Option<(&'a [u8], &'a Option<Bytes>)> {
    let least = layers.iter_mut().filter_map(|layer| layer.peek().map(|(key, _)| *key)).min()?;
    if limit.is_some_and(|limit| least > limit) {
        return None;
    }
    let mut found = None;
    for layer in layers {
        if let Some(write) = layer.next_if(|(key, _)| *key == least) {
            found = found.or(Some(write));
        }
    }
    found
}
