//! Recent applied writes of one replica.

use std::collections::BTreeMap;

use bytes::Bytes;

/// Recent writes in key order; `None` marks a removed key.
#[derive(Default, Debug, Clone)]
pub struct Memtable {
    /// The newest write to each key.
    pub entries: BTreeMap<Vec<u8>, Option<Bytes>>,
    /// Bytes of keys and values and their bookkeeping, about.
    pub bytes: usize,
}
