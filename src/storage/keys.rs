//! The layout of keys in the state engine.
//!
//! | bytes | content |
//! |---|---|
//! | 8 | ReplicaId, big endian; 0 (no replica) marks records of the whole store |
//! | 4 | install generation, big endian; 0 for records of the whole store |
//! | 1 | kind: [`KIND_HEADER`], [`KIND_USER`], [`KIND_SESSION`] or [`KIND_STORE`] |
//! | n | kind header: nothing. Kind user: the user's key. Kind session: its id. Kind store: the record's name |
//!
//! Big endian keeps one replica's keys together and a generation's user keys in user-key order, so
//! that a scan of a shard is one range of the engine, and the header precedes the data.
//!
//! Store records: [`store_id_key`] (16 bytes: which data directory the store belongs to),
//! [`format_key`] (u32 big endian: [`FORMAT_VERSION`]) and [`flush_key`] (twice u64 big endian: the numbers
//! of the last flush that the store holds whole, and of the last that was begun). An engine may keep more
//! keyspaces of its own (the chunks of great values in `engine_sled`); they are invisible above it.

use crate::ids::ReplicaId;

/// Version of this layout; a greater one in a store is refused. A store of version 1 had no sums beside
/// it (`sled_sums`).
pub const FORMAT_VERSION: u32 = 2;

/// Kind of the record that says where a replica's state stands.
pub const KIND_HEADER: u8 = 0;
/// Kind of the records of a replica's data.
pub const KIND_USER: u8 = 1;
/// Kind of the records of client sessions.
pub const KIND_SESSION: u8 = 2;
/// Kind of the records of the whole store.
pub const KIND_STORE: u8 = 0xff;

/// Bytes before the user's key, or what stands in its place.
pub const PREFIX_BYTES: usize = 13;
/// Bytes before the kind: what tells one generation's keys from those of others.
pub const GENERATION_BYTES: usize = 12;

/// What all keys of one kind of one replica generation begin with.
pub fn prefix(replica: ReplicaId, generation: u32, kind: u8) -> [u8; PREFIX_BYTES] {
    let mut bytes = [0; PREFIX_BYTES];
    bytes[..8].copy_from_slice(&replica.0.to_be_bytes());
    bytes[8..12].copy_from_slice(&generation.to_be_bytes());
    bytes[12] = kind;
    bytes
}

/// The key of a replica's header.
pub fn header_key(replica: ReplicaId, generation: u32) -> Vec<u8> {
    prefix(replica, generation, KIND_HEADER).to_vec()
}

/// The engine's key for a user's key.
pub fn user_key(replica: ReplicaId, generation: u32, key: &[u8]) -> Vec<u8> {
    key_of_kind(replica, generation, KIND_USER, key)
}

/// The engine's key for what one kind of records calls `key`.
pub fn key_of_kind(replica: ReplicaId, generation: u32, kind: u8, key: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(PREFIX_BYTES + key.len());
    bytes.extend_from_slice(&prefix(replica, generation, kind));
    bytes.extend_from_slice(key);
    bytes
}

/// The first key after all user keys of a replica's generation.
pub fn user_end(replica: ReplicaId, generation: u32) -> [u8; PREFIX_BYTES] {
    prefix(replica, generation, KIND_USER + 1)
}

/// The range of all keys of one generation of a replica, of every kind: from the first (inclusive)
/// to the second (exclusive; empty: no upper bound).
pub fn generation_range(replica: ReplicaId, generation: u32) -> (Vec<u8>, Vec<u8>) {
    let from = prefix(replica, generation, 0)[..GENERATION_BYTES].to_vec();
    let to = match generation.checked_add(1) {
        Some(next) => prefix(replica, next, 0)[..GENERATION_BYTES].to_vec(),
        None => replica_range(replica).1,
    };
    (from, to)
}

/// The generation that a replica's key belongs to; `None` for bytes that are no such key.
pub fn generation_of(key: &[u8]) -> Option<u32> {
    let bytes = key.get(8..GENERATION_BYTES)?;
    Some(u32::from_be_bytes(bytes.try_into().ok()?))
}

/// What a key is within its generation, whosever that is: its kind and what follows. `None` for bytes
/// that are no key of a replica.
pub fn local_key(key: &[u8]) -> Option<&[u8]> {
    key.get(GENERATION_BYTES..).filter(|local| !local.is_empty())
}

/// The engine's key for a local key.
pub fn from_local(replica: ReplicaId, generation: u32, local: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(GENERATION_BYTES + local.len());
    bytes.extend_from_slice(&prefix(replica, generation, 0)[..GENERATION_BYTES]);
    bytes.extend_from_slice(local);
    bytes
}

/// The range of all keys of a replica, in all generations: from the first (inclusive) to the second
/// (exclusive; empty: no upper bound).
pub fn replica_range(replica: ReplicaId) -> (Vec<u8>, Vec<u8>) {
    let end = replica.0.checked_add(1).map(|next| next.to_be_bytes().to_vec());
    (replica.0.to_be_bytes().to_vec(), end.unwrap_or_default())
}

/// The key of the store's identity.
pub fn store_id_key() -> Vec<u8> {
    store_key(b"id")
}

/// The key of the store's format version.
pub fn format_key() -> Vec<u8> {
    store_key(b"format")
}

/// The key of the numbers of the last flushes.
pub fn flush_key() -> Vec<u8> {
    store_key(b"flush")
}

fn store_key(name: &[u8]) -> Vec<u8> {
    let mut bytes = prefix(ReplicaId(0), 0, KIND_STORE).to_vec();
    bytes.extend_from_slice(name);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layout_is_what_the_table_says() {
        let key = user_key(ReplicaId(0x0102), 3, b"ab");
        assert_eq!(key, [0, 0, 0, 0, 0, 0, 1, 2, 0, 0, 0, 3, 1, b'a', b'b']);
        assert_eq!(store_id_key(), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, b'i', b'd']);
    }

    #[test]
    fn a_local_key_is_the_same_in_every_generation() {
        let key = user_key(ReplicaId(7), 3, b"ab");
        assert_eq!(generation_of(&key), Some(3));
        let local = local_key(&key).unwrap();
        assert_eq!(local, [KIND_USER, b'a', b'b']);
        assert_eq!(from_local(ReplicaId(9), 4, local), user_key(ReplicaId(9), 4, b"ab"));
        assert_eq!((local_key(&key[..12]), generation_of(&key[..11])), (None, None));
    }

    #[test]
    fn order_is_replica_generation_kind_user_key() {
        let keys = [
            store_id_key(),
            header_key(ReplicaId(1), 0),
            user_key(ReplicaId(1), 0, b""),
            user_key(ReplicaId(1), 0, &[0xff; 40]),
            user_end(ReplicaId(1), 0).to_vec(),
            key_of_kind(ReplicaId(1), 0, KIND_SESSION, &[0; 16]),
            key_of_kind(ReplicaId(1), 0, KIND_SESSION, &[0xff; 16]),
            header_key(ReplicaId(1), 1),
            user_key(ReplicaId(1), 1, b"a"),
            header_key(ReplicaId(256), 0),
            user_key(ReplicaId(u64::MAX), 0, b"z"),
        ];
        assert!(keys.is_sorted());
        let (from, to) = generation_range(ReplicaId(1), 0);
        assert!(keys[0] < from && keys[1] >= from && keys[6] < to && keys[7] >= to);
        assert_eq!(generation_range(ReplicaId(1), u32::MAX).1, replica_range(ReplicaId(1)).1);
        let (from, to) = replica_range(ReplicaId(1));
        assert!(keys[0] < from && keys[1] >= from && keys[8] < to && keys[9] >= to);
        assert!(replica_range(ReplicaId(u64::MAX)).1.is_empty());
    }
}
