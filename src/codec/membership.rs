//! What a log entry says that changes a group's members (schema/store.capnp). It is the entry's context; its data is
//! raft's own, for the checks when it is proposed, and is never read from a log or a peer.

use capnp::message::Builder;
use capnp::serialize;

use super::CodecError;
use super::meta::read_message;
use super::records::{length, malformed, read_members, write_members};
use crate::limits::SNAPSHOT_MEMBERS_MAX;
use crate::placement::map::Member;
use crate::schema::store_capnp::membership_entry;

/// A change of a group's members, as its entry tells it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MembershipEntry {
    /// The conf version that it follows on. It makes it greater by one.
    pub conf: u64,
    /// All members after it.
    pub members: Vec<Member>,
}

/// The bytes of a change of members.
pub fn encode(entry: &MembershipEntry) -> Vec<u8> {
    let mut message = Builder::new_default();
    let mut root = message.init_root::<membership_entry::Builder<'_>>();
    root.set_conf(entry.conf);
    write_members(&entry.members, root.init_members(length(entry.members.len())));
    serialize::write_message_to_words(&message)
}

/// Reads a change of members. Errors: not a message, longer or shorter than it says, an unknown role, a replica
/// listed twice, or more members than a group can have.
pub fn decode(bytes: &[u8]) -> Result<MembershipEntry, CodecError> {
    read_message("MembershipEntry", bytes, |message| {
        let root = message.get_root::<membership_entry::Reader<'_>>()?;
        let members = root.get_members()?;
        if members.len() as usize > SNAPSHOT_MEMBERS_MAX {
            return Err(malformed("MembershipEntry", format!("{} members", members.len())));
        }
        Ok(MembershipEntry { conf: root.get_conf(), members: read_members(members)? })
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ids::{NodeId, ReplicaId};
    use crate::placement::map::MemberRole::{Incoming, Learner, Outgoing, Voter};

    fn sample(count: u64) -> MembershipEntry {
        let role = |at: u64| [Voter, Outgoing, Incoming, Learner][at as usize % 4];
        let member = |at| Member { replica: ReplicaId(7 + at), node: NodeId(1 + at), role: role(at) };
        MembershipEntry { conf: 12, members: (0..count).map(member).collect() }
    }

    #[test]
    fn what_is_written_is_read_back() {
        for count in [0, 1, 5, SNAPSHOT_MEMBERS_MAX as u64] {
            assert_eq!(decode(&encode(&sample(count))).unwrap(), sample(count));
        }
        assert!(decode(&encode(&sample(SNAPSHOT_MEMBERS_MAX as u64 + 1))).is_err());
        let mut twice = sample(2);
        twice.members[1].replica = twice.members[0].replica;
        assert!(decode(&encode(&twice)).is_err());
        assert!(decode(&[]).is_err());
    }

    proptest! {
        /// Bytes from a peer are an error, never a panic.
        #[test]
        fn damaged_bytes_do_not_panic(at in 0usize..200, bit in 0u8..8, cut in 0usize..200) {
            let mut bytes = encode(&sample(4));
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            let _ = decode(&bytes);
            bytes.truncate(cut);
            let _ = decode(&bytes);
        }
    }
}
