//! A key in a table in memory: short ones lie in the tree's own nodes, so that looking for one touches no memory
//! beside them.
//!
//! With keys of their own allocation, each comparison on the way down a tree of some thousand keys is one more cache
//! line to wait for, and those were most of what applying a write cost.

use std::borrow::Borrow;
use std::cmp::Ordering;
use std::fmt;
use std::ops::Deref;

/// The longest key that needs no allocation: with its length and the mark of the kind it takes as much as a vector does.
pub const SHORT_KEY_BYTES: usize = 22;

/// A key, in the order of its bytes.
#[derive(Clone)]
pub struct TableKey(Kind);

#[derive(Clone)]
enum Kind {
    /// Zeros follow on the bytes of the key.
    Short {
        len: u8,
        bytes: [u8; SHORT_KEY_BYTES],
    },
    Long(Box<[u8]>),
}

const _: () = assert!(size_of::<TableKey>() == size_of::<Vec<u8>>());

impl TableKey {
    /// A copy of the bytes.
    pub fn new(key: &[u8]) -> TableKey {
        TableKey::short(key).unwrap_or_else(|| TableKey(Kind::Long(key.into())))
    }

    /// A copy of the bytes, if that needs no allocation.
    pub fn short(key: &[u8]) -> Option<TableKey> {
        let mut bytes = [0; SHORT_KEY_BYTES];
        bytes.get_mut(..key.len())?.copy_from_slice(key);
        Some(TableKey(Kind::Short { len: key.len() as u8, bytes }))
    }
}

impl Deref for TableKey {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.0 {
            Kind::Short { len, bytes } => &bytes[..usize::from(*len)],
            Kind::Long(bytes) => bytes,
        }
    }
}

impl Borrow<[u8]> for TableKey {
    fn borrow(&self) -> &[u8] {
        self
    }
}

impl Ord for TableKey {
    fn cmp(&self, other: &TableKey) -> Ordering {
        match (&self.0, &other.0) {
            // The same order as of the bytes alone: where they are the same up to the end of the shorter one, so are its zeros
            // and what the longer one has there, or that is greater. Of a fixed number of bytes this takes three comparisons of
            // numbers.
            (Kind::Short { len: a_len, bytes: a }, Kind::Short { len: b_len, bytes: b }) => {
                a.cmp(b).then(a_len.cmp(b_len))
            }
            _ => self[..].cmp(&other[..]),
        }
    }
}

impl PartialOrd for TableKey {
    fn partial_cmp(&self, other: &TableKey) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for TableKey {
    fn eq(&self, other: &TableKey) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for TableKey {}

impl fmt::Debug for TableKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.escape_ascii())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn keys_are_ordered_as_their_bytes_are(
            // Few bytes, the least among them, and lengths around the bound, so that many are alike.
            a in prop::collection::vec(0..2_u8, 0..2 * SHORT_KEY_BYTES),
            cut in 0..2 * SHORT_KEY_BYTES,
            b in prop::collection::vec(0..2_u8, 0..3),
        ) {
            let b = [&a[..cut.min(a.len())], &b].concat();
            let (key_a, key_b) = (TableKey::new(&a), TableKey::new(&b));
            prop_assert_eq!(&key_a[..], &a[..]);
            prop_assert_eq!(TableKey::short(&a).is_some(), a.len() <= SHORT_KEY_BYTES);
            prop_assert_eq!(key_a.cmp(&key_b), a.cmp(&b), "{:?} {:?}", key_a, key_b);
            prop_assert_eq!(key_a == key_b, a == b);
        }
    }
}
