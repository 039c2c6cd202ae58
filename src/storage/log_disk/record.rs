//! What lies in the log engine beside entries and hard states: the catalogue of replicas, the store
//! id, and where each log was truncated.
//!
//! | group | key | value |
//! |---|---|---|
//! | [`CATALOGUE_GROUP`] | `i` | format version (1 byte), store id (16 bytes) |
//! | [`CATALOGUE_GROUP`] | `r` + replica id (8 bytes, big-endian) | version (1 byte), `ReplicaRecord` of store.capnp |
//! | [`CATALOGUE_GROUP`] | `d` + replica id (8 bytes, big-endian) | version (1 byte): the state of this tombstone is gone |
//! | [`CATALOGUE_GROUP`] | `n` | version (1 byte), how far the log reached before this write, and its number (`Reach`); part of each synced write |
//! | replica id | `h` | hard state as raft's protobuf message |
//! | replica id | `t` | version (1 byte), index and term of the last entry compacted away (8 bytes each, little-endian) |

use capnp::message::{Builder, ReaderOptions};
use capnp::serialize;

use super::super::StorageError;
use super::super::log::{ReplicaPhase, ReplicaRecord};
use super::mark::Reach;
use crate::codec::records::{read_role, write_role};
use crate::ids::{DatabaseId, Epoch, NodeId, Position, ReplicaId, ShardId, StoreId};
use crate::machine::MachineKind;
use crate::placement::map::Member;
use crate::placement::ring::RingRange;
use crate::schema::store_capnp;

/// The log engine's group that holds the catalogue. No replica has this id.
pub const CATALOGUE_GROUP: u64 = u64::MAX;
/// Key of the store id.
pub const IDENTITY_KEY: &[u8] = b"i";
/// First byte of the keys of replica records.
pub const REPLICA_PREFIX: &[u8] = b"r";
/// The first key after all replica records.
pub const REPLICA_END: &[u8] = b"s";
/// First byte of the keys that mark replicas as destroyed.
pub const DESTROYED_PREFIX: &[u8] = b"d";
/// The first key after all of those.
pub const DESTROYED_END: &[u8] = b"e";
/// Key of how far the log reached before the last synced write.
pub const REACH_KEY: &[u8] = b"n";
/// Key of a replica's hard state.
pub const HARD_STATE_KEY: &[u8] = b"h";
/// Key of a replica's truncated position.
pub const TRUNCATED_KEY: &[u8] = b"t";

/// Version of these formats. A log with a newer one is refused.
pub const FORMAT: u8 = 1;

/// Why a record can't be read.
pub type RecordError = String;

/// The key of a replica's record.
pub fn replica_key(replica: ReplicaId) -> Vec<u8> {
    [REPLICA_PREFIX, &replica.0.to_be_bytes()].concat()
}

/// The key that marks a replica as destroyed.
pub fn destroyed_key(replica: ReplicaId) -> Vec<u8> {
    [DESTROYED_PREFIX, &replica.0.to_be_bytes()].concat()
}

/// The replica that a key marks as destroyed.
pub fn destroyed_replica(key: &[u8]) -> Option<ReplicaId> {
    let id = key.strip_prefix(DESTROYED_PREFIX)?.try_into().ok()?;
    Some(ReplicaId(u64::from_be_bytes(id)))
}

/// The value under [`IDENTITY_KEY`].
pub fn encode_identity(store_id: StoreId) -> Vec<u8> {
    [&[FORMAT][..], &store_id.0].concat()
}

/// Reads the value under [`IDENTITY_KEY`].
pub fn decode_identity(value: &[u8]) -> Result<StoreId, RecordError> {
    StoreId::from_slice(body(value)?).ok_or_else(|| format!("the store id has {} bytes, not 17", value.len()))
}

/// The value under [`REACH_KEY`].
pub fn encode_reach(reach: &Reach) -> Vec<u8> {
    [&[FORMAT][..], &reach.encode()].concat()
}

/// Reads the value under [`REACH_KEY`].
pub fn decode_reach(value: &[u8]) -> Result<Reach, RecordError> {
    Reach::decode(body(value)?).ok_or_else(|| format!("how far it reaches takes {} bytes", value.len()))
}

/// The value under [`TRUNCATED_KEY`].
pub fn encode_position(position: Position) -> Vec<u8> {
    [&[FORMAT][..], &position.index.to_le_bytes(), &position.term.to_le_bytes()].concat()
}

/// Reads the value under [`TRUNCATED_KEY`].
pub fn decode_position(value: &[u8]) -> Result<Position, RecordError> {
    let wrong = || format!("the truncated position has {} bytes, not 17", value.len());
    let (index, term) = body(value)?.split_at_checked(8).ok_or_else(wrong)?;
    Ok(Position {
        index: u64::from_le_bytes(index.try_into().map_err(|_| wrong())?),
        term: u64::from_le_bytes(term.try_into().map_err(|_| wrong())?),
    })
}

/// The value under [`replica_key`].
pub fn encode_replica(record: &ReplicaRecord) -> Result<Vec<u8>, StorageError> {
    let mut message = Builder::new_default();
    let mut to = message.init_root::<store_capnp::replica_record::Builder>();
    to.set_replica(record.replica.0);
    to.set_shard(record.shard.0);
    to.set_database(record.database.0);
    to.set_machine(match record.machine {
        MachineKind::Kv => store_capnp::MachineKind::Kv,
        MachineKind::Metadata => store_capnp::MachineKind::Metadata,
    });
    to.set_phase(match record.phase {
        ReplicaPhase::Active => store_capnp::ReplicaPhase::Active,
        // That it is destroyed is a mark of its own.
        ReplicaPhase::Tombstone | ReplicaPhase::Destroyed => store_capnp::ReplicaPhase::Tombstone,
    });
    to.set_start(record.range.start);
    to.set_end(record.range.end);
    let mut epoch = to.reborrow().init_epoch();
    epoch.set_range(record.epoch.range);
    epoch.set_conf(record.epoch.conf);
    let mut members = to.reborrow().init_members(record.members.len() as u32);
    for (i, member) in record.members.iter().enumerate() {
        let mut to = members.reborrow().get(i as u32);
        to.set_replica(member.replica.0);
        to.set_node(member.node.0);
        to.set_role(write_role(member.role));
    }
    to.set_generation(record.generation);
    to.set_members_at(record.members_at);
    to.set_ordered_at(record.ordered_at);
    // The log engine keeps it in memory: no room to spare.
    let mut value = Vec::with_capacity(1 + 8 * serialize::compute_serialized_size_in_words(&message));
    value.push(FORMAT);
    serialize::write_message(&mut value, &message).map_err(|e| StorageError::Engine {
        engine: "raft log",
        reason: format!("encoding the record of replica {}: {e}", record.replica),
    })?;
    Ok(value)
}

/// Reads the value under [`replica_key`].
pub fn decode_replica(value: &[u8]) -> Result<ReplicaRecord, RecordError> {
    let bytes = body(value)?;
    read_replica(bytes).map_err(|e| e.to_string())
}

fn read_replica(mut bytes: &[u8]) -> capnp::Result<ReplicaRecord> {
    let message = serialize::read_message(&mut bytes, ReaderOptions::new())?;
    let from = message.get_root::<store_capnp::replica_record::Reader>()?;
    let epoch = from.get_epoch()?;
    let mut members = Vec::new();
    for member in from.get_members()? {
        members.push(Member {
            replica: ReplicaId(member.get_replica()),
            node: NodeId(member.get_node()),
            role: read_role(member.get_role())?,
        });
    }
    Ok(ReplicaRecord {
        replica: ReplicaId(from.get_replica()),
        shard: ShardId(from.get_shard()),
        database: DatabaseId(from.get_database()),
        machine: match from.get_machine()? {
            store_capnp::MachineKind::Kv => MachineKind::Kv,
            store_capnp::MachineKind::Metadata => MachineKind::Metadata,
        },
        phase: match from.get_phase()? {
            store_capnp::ReplicaPhase::Active => ReplicaPhase::Active,
            store_capnp::ReplicaPhase::Tombstone => ReplicaPhase::Tombstone,
        },
        range: RingRange { start: from.get_start(), end: from.get_end() },
        epoch: Epoch { range: epoch.get_range(), conf: epoch.get_conf() },
        members,
        members_at: from.get_members_at(),
        generation: from.get_generation(),
        ordered_at: from.get_ordered_at(),
    })
}

/// What follows the version byte, if this program knows the version.
fn body(value: &[u8]) -> Result<&[u8], RecordError> {
    match value.split_first() {
        Some((&FORMAT, body)) => Ok(body),
        Some((version, _)) => Err(format!(
            "format {version} is not format {FORMAT}, the one this program knows; use the version of the program that wrote it"
        )),
        None => Err("it is empty".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::placement::map::MemberRole;
    use proptest::prelude::*;

    fn record(members: u64) -> ReplicaRecord {
        ReplicaRecord {
            replica: ReplicaId(12),
            shard: ShardId(3),
            database: DatabaseId(2),
            machine: MachineKind::Metadata,
            phase: ReplicaPhase::Tombstone,
            range: RingRange { start: 5, end: u64::MAX },
            epoch: Epoch { range: 8, conf: 9 },
            members: (0..members)
                .map(|i| Member {
                    replica: ReplicaId(10 + i),
                    node: NodeId(1 + i),
                    role: [MemberRole::Voter, MemberRole::Learner][i as usize % 2],
                })
                .collect(),
            members_at: 33,
            ordered_at: 34,
            generation: 4,
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        for members in [0, 1, 7] {
            let record = record(members);
            let value = encode_replica(&record).unwrap();
            assert_eq!(decode_replica(&value), Ok(record));
        }
        assert_eq!(destroyed_replica(&destroyed_key(ReplicaId(12))), Some(ReplicaId(12)));
        assert_eq!(destroyed_replica(&replica_key(ReplicaId(12))), None);
        let position = Position { index: 77, term: 8 };
        assert_eq!(decode_position(&encode_position(position)), Ok(position));
        let reach = Reach { writes: 7, ..Reach::default() };
        assert_eq!(decode_reach(&encode_reach(&reach)), Ok(reach));
        assert!(decode_reach(&[FORMAT; 9]).is_err());
        let id = crate::ids::RandomId([9; 16]);
        assert_eq!(decode_identity(&encode_identity(id)), Ok(id));
    }

    #[test]
    fn a_newer_format_and_a_wrong_length_are_refused() {
        let mut value = encode_position(Position::default());
        value[0] = FORMAT + 1;
        assert!(decode_position(&value).unwrap_err().contains("format 2"));
        assert!(decode_position(&encode_position(Position::default())[..16]).is_err());
        assert!(decode_position(&[]).is_err());
        assert!(decode_identity(&[FORMAT; 16]).is_err());
    }

    proptest! {
        /// Damaged records are errors, never panics.
        #[test]
        fn damaged_records_do_not_panic(at in 0usize..200, bit in 0u8..8, cut in 0usize..200) {
            let mut value = encode_replica(&record(3)).unwrap();
            let at = at % value.len();
            value[at] ^= 1 << bit;
            let _ = decode_replica(&value);
            value.truncate(cut);
            let _ = decode_replica(&value);
        }
    }
}
