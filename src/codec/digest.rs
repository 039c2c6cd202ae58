//! Marks and digests, as parts of requests between nodes and of answers to clients.

use super::CodecError;
use super::records::{length, malformed, read_members, write_members};
use super::survey::read_replica;
use crate::ids::{Index, ReplicaId, ShardId};
use crate::placement::map::Member;
use crate::schema::peer_capnp::{digest_request, marked, replica_digest};
use crate::storage::digest::StateDigest;

/// A mark in the log of a shard.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Marked {
    /// Where it is.
    pub index: Index,
    /// Who led.
    pub leader: ReplicaId,
    /// The members, as the leader has applied them.
    pub members: Vec<Member>,
}

/// Of which replica a digest is wanted, and where.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DigestRequest {
    /// The shard whose replica on the receiver is meant.
    pub shard: ShardId,
    /// The index of a mark.
    pub index: Index,
    /// Milliseconds that the asker waits.
    pub timeout_ms: u32,
}

/// What a replica's state is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ReplicaDigest {
    /// Whose.
    pub replica: ReplicaId,
    /// Its digest.
    pub digest: StateDigest,
}

pub(super) fn write_marked(from: &Marked, mut to: marked::Builder<'_>) {
    to.set_index(from.index);
    to.set_leader(from.leader.0);
    write_members(&from.members, to.init_members(length(from.members.len())));
}

pub(super) fn read_marked(from: marked::Reader<'_>) -> Result<Marked, CodecError> {
    Ok(Marked {
        index: from.get_index(),
        leader: read_replica(from.get_leader())?,
        members: read_members(from.get_members()?)?,
    })
}

pub(super) fn write_digest_request(from: DigestRequest, mut to: digest_request::Builder<'_>) {
    to.set_shard(from.shard.0);
    to.set_index(from.index);
    to.set_timeout_ms(from.timeout_ms);
}

pub(super) fn read_digest_request(from: digest_request::Reader<'_>) -> DigestRequest {
    DigestRequest {
        shard: ShardId(from.get_shard()),
        index: from.get_index(),
        timeout_ms: from.get_timeout_ms(),
    }
}

pub(super) fn write_digest(from: &ReplicaDigest, mut to: replica_digest::Builder<'_>) {
    let digest = from.digest;
    to.set_replica(from.replica.0);
    to.set_index(digest.index);
    to.set_data(&digest.data.to_be_bytes());
    to.set_sessions(&digest.sessions.to_be_bytes());
    to.set_keys(digest.keys);
    to.set_bytes(digest.bytes);
}

pub(super) fn read_digest(from: replica_digest::Reader<'_>) -> Result<ReplicaDigest, CodecError> {
    let digest = StateDigest {
        index: from.get_index(),
        data: read_hash("ReplicaDigest.data", from.get_data()?)?,
        sessions: read_hash("ReplicaDigest.sessions", from.get_sessions()?)?,
        keys: from.get_keys(),
        bytes: from.get_bytes(),
    };
    Ok(ReplicaDigest { replica: read_replica(from.get_replica())?, digest })
}

/// Reads a hash of 128 bits, the high byte first.
///
/// # Errors
/// It hasn't 16 bytes.
pub fn read_hash(field: &'static str, bytes: &[u8]) -> Result<u128, CodecError> {
    let bytes = <[u8; 16]>::try_from(bytes)
        .map_err(|_| malformed(field, format!("{} bytes instead of 16", bytes.len())))?;
    Ok(u128::from_be_bytes(bytes))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::codec::records::tests::any_members;
    use proptest::prelude::*;

    pub(in crate::codec) fn any_marked() -> impl Strategy<Value = Marked> {
        (any::<u64>(), 1..u64::MAX, any_members(4)).prop_map(|(index, leader, members)| Marked {
            index,
            leader: ReplicaId(leader),
            members,
        })
    }

    pub(in crate::codec) fn any_digest_request() -> impl Strategy<Value = DigestRequest> {
        (any::<u64>(), any::<u64>(), any::<u32>()).prop_map(|(shard, index, timeout_ms)| DigestRequest {
            shard: ShardId(shard),
            index,
            timeout_ms,
        })
    }

    pub(in crate::codec) fn any_digest() -> impl Strategy<Value = ReplicaDigest> {
        (1..u64::MAX, any::<[u64; 3]>(), any::<[u128; 2]>()).prop_map(
            |(replica, [index, keys, bytes], [data, sessions])| ReplicaDigest {
                replica: ReplicaId(replica),
                digest: StateDigest { index, data, sessions, keys, bytes },
            },
        )
    }

    #[test]
    fn a_hash_has_sixteen_bytes() {
        assert_eq!(read_hash("x", &7_u128.to_be_bytes()).unwrap(), 7);
        for bytes in [&[0; 15][..], &[0; 17], &[]] {
            assert!(read_hash("x", bytes).is_err(), "{bytes:?}");
        }
    }
}
