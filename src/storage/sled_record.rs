//! How the sled engine stores a value: as one record, or as a record that points to chunks.
//!
//! A record of the main tree is `0` and the value, or `1`, id of its chunks (8 bytes), length of
//! the value (4), crc32c of the value (4), all big endian; its chunks are under id (8) and number
//! (4) in the tree `chunks`. Ids are never used twice between two opens, so that a reader who finds
//! chunks gone looks at the record again: it has changed. The tree `intents` names, by id, the chunks
//! that a write is about to make or to orphan: their number (4) and the key of their record; what a
//! crash leaves of them is removed at open.

use bytes::Bytes;

/// Key and value together up to here are one record of the main tree.
pub const INLINE_BYTES_MAX: usize = 4096;
/// Bytes of a value in one chunk.
pub const CHUNK_BYTES: usize = 4096;

const INLINE: u8 = 0;
const CHUNKED: u8 = 1;

/// What the main tree holds under a key.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Record {
    /// The value itself.
    Inline(Bytes),
    /// Where the value is.
    Chunked(ChunkRef),
}

/// Where the chunks of a value are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct ChunkRef {
    pub id: u64,
    /// Bytes of the value.
    pub len: u32,
    /// Its crc32c.
    pub sum: u32,
}

impl Record {
    /// Makes `record` the bytes of a record that holds its value.
    pub fn encode_inline(value: &[u8], record: &mut Vec<u8>) {
        record.clear();
        record.push(INLINE);
        record.extend_from_slice(value);
    }

    /// `None` for bytes that are no record.
    pub fn decode(bytes: &[u8]) -> Option<Record> {
        match bytes.split_first()? {
            (&INLINE, value) => Some(Record::Inline(Bytes::copy_from_slice(value))),
            (&CHUNKED, rest) => {
                let (id, rest) = rest.split_first_chunk::<8>()?;
                let (len, rest) = rest.split_first_chunk::<4>()?;
                let sum: [u8; 4] = rest.try_into().ok()?;
                Some(Record::Chunked(ChunkRef {
                    id: u64::from_be_bytes(*id),
                    len: u32::from_be_bytes(*len),
                    sum: u32::from_be_bytes(sum),
                }))
            }
            _ => None,
        }
    }

    /// Where the chunks are, if it has any.
    pub fn chunks(&self) -> Option<ChunkRef> {
        match self {
            Record::Inline(_) => None,
            Record::Chunked(at) => Some(*at),
        }
    }
}

impl ChunkRef {
    /// Number of chunks.
    pub fn count(self) -> u32 {
        self.len.div_ceil(CHUNK_BYTES as u32)
    }

    /// The bytes of the record that points here.
    pub fn encode(self) -> Vec<u8> {
        let mut record = vec![CHUNKED];
        record.extend_from_slice(&self.id.to_be_bytes());
        record.extend_from_slice(&self.len.to_be_bytes());
        record.extend_from_slice(&self.sum.to_be_bytes());
        record
    }
}

/// Whether a value is to be cut. One that is hardly longer than the record which would point to its
/// chunks never is.
pub(super) fn is_great(key: &[u8], value: &[u8]) -> bool {
    key.len() + value.len() > INLINE_BYTES_MAX && value.len() > 64
}

/// The key of a chunk.
pub(super) fn chunk_key(id: u64, number: u32) -> [u8; 12] {
    let mut key = [0; 12];
    key[..8].copy_from_slice(&id.to_be_bytes());
    key[8..].copy_from_slice(&number.to_be_bytes());
    key
}

/// The id in the key of a chunk or an intent.
pub(super) fn chunk_id(key: &[u8]) -> Option<u64> {
    key.first_chunk::<8>().map(|id| u64::from_be_bytes(*id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_survive_their_bytes() {
        let value = Bytes::from_static(b"value");
        let mut inline = vec![7; 9];
        Record::encode_inline(&value, &mut inline);
        assert_eq!(Record::decode(&inline), Some(Record::Inline(value)));
        let at = ChunkRef { id: 1 << 40, len: CHUNK_BYTES as u32 + 1, sum: 77 };
        let bytes = at.encode();
        assert_eq!(Record::decode(&bytes), Some(Record::Chunked(at)));
        assert_eq!(at.count(), 2);
        assert_eq!(chunk_id(&chunk_key(at.id, 9)), Some(at.id));
        for len in 0..bytes.len() {
            assert_eq!(Record::decode(&bytes[..len]), None, "cut at {len}");
        }
        assert_eq!(Record::decode(&[2, 0]), None);
    }
}
