//! The record that says where a replica's state stands: [`StateHeader`] and its bytes.

use capnp::message::{Builder, ReaderOptions};
use raft::eraftpb::ConfState;

use super::StorageError;
use super::identity::IdentityError;
use crate::codec::records::{read_role, write_role};
use crate::ids::{Epoch, NodeId, Position, ReplicaId};
use crate::placement::map::{Member, MemberRole};
use crate::schema::store_capnp::state_header;

/// Version of the record. 1 had no log time, and no sessions beside it.
const FORMAT_VERSION: u32 = 2;

/// The configuration that `members` make, as raft counts it. It is all in their roles: there are voters of two
/// configurations during a joint change, which never ends by itself as far as raft knows, and in which no
/// voter becomes a learner.
pub fn conf_state_of(members: &[Member]) -> ConfState {
    use MemberRole::{Incoming, Learner, Outgoing, Voter};
    let of = |roles: &[MemberRole]| -> Vec<u64> {
        members.iter().filter(|m| roles.contains(&m.role)).map(|m| m.replica.0).collect()
    };
    let is_joint = members.iter().any(|m| matches!(m.role, Incoming | Outgoing));
    ConfState {
        voters: of(&[Voter, Incoming]),
        voters_outgoing: if is_joint { of(&[Voter, Outgoing]) } else { Vec::new() },
        learners: of(&[Learner]),
        ..ConfState::default()
    }
}

/// Where a replica's state stands; stored in the same batch as the data it describes.
#[derive(Clone, PartialEq, Debug)]
pub struct StateHeader {
    /// The last entry applied.
    pub applied: Position,
    /// The shard's revision counter.
    pub revision: u64,
    /// The shard's epoch.
    pub epoch: Epoch,
    /// The group's members, with their nodes.
    pub members: Vec<Member>,
    /// The group's configuration as raft counts it.
    pub conf_state: ConfState,
    /// The time by which sessions end: the greatest stamp of an applied entry, in milliseconds.
    pub log_time: u64,
}

impl StateHeader {
    /// Its bytes: the format version (u32, big endian), then `StateHeader` of store.capnp.
    pub fn encode(&self) -> Vec<u8> {
        let mut message = Builder::new_default();
        let mut header = message.init_root::<state_header::Builder<'_>>();
        header.set_applied(self.applied.index);
        header.set_applied_term(self.applied.term);
        header.set_revision(self.revision);
        let mut epoch = header.reborrow().init_epoch();
        epoch.set_range(self.epoch.range);
        epoch.set_conf(self.epoch.conf);
        let mut members = header.reborrow().init_members(list_len(self.members.len()));
        for (i, member) in (0..).zip(&self.members) {
            let mut record = members.reborrow().get(i);
            record.set_replica(member.replica.0);
            record.set_node(member.node.0);
            record.set_role(write_role(member.role));
        }
        let conf = &self.conf_state;
        // A list of u64 in memory always fits: `set_*` fails only on a foreign reader.
        set_ids(&mut header.reborrow().init_voters(list_len(conf.voters.len())), &conf.voters);
        set_ids(&mut header.reborrow().init_learners(list_len(conf.learners.len())), &conf.learners);
        set_ids(
            &mut header.reborrow().init_voters_outgoing(list_len(conf.voters_outgoing.len())),
            &conf.voters_outgoing,
        );
        set_ids(
            &mut header.reborrow().init_learners_next(list_len(conf.learners_next.len())),
            &conf.learners_next,
        );
        header.set_auto_leave(conf.auto_leave);
        header.set_log_time(self.log_time);
        let mut bytes = FORMAT_VERSION.to_be_bytes().to_vec();
        bytes.extend_from_slice(&capnp::serialize::write_message_to_words(&message));
        bytes
    }

    /// Reads what [`StateHeader::encode`] wrote. `what` names the record in an error:
    /// [`StorageError::Damaged`], or [`IdentityError::Newer`] if a newer program wrote it.
    pub fn decode(bytes: &[u8], what: &str) -> Result<StateHeader, StorageError> {
        let damaged = |detail: String| StorageError::Damaged { what: what.to_owned(), detail };
        let (version, body) = bytes
            .split_first_chunk::<4>()
            .ok_or_else(|| damaged(format!("{} bytes are no header", bytes.len())))?;
        let version = u32::from_be_bytes(*version);
        if version > FORMAT_VERSION {
            // Not damage, which would be repaired: the newer program can read it.
            let path = what.to_owned();
            return Err(IdentityError::Newer { path, found: version, known: FORMAT_VERSION }.into());
        }
        if version == 0 {
            return Err(damaged("header format 0".into()));
        }
        read(body).map_err(|error| damaged(error.to_string()))
    }
}

/// Length of a list in a message. Memberships are bounded by `limits::REPLICAS_MAX`, far below.
fn list_len(len: usize) -> u32 {
    u32::try_from(len).expect("memberships are bounded")
}

fn set_ids(list: &mut capnp::primitive_list::Builder<'_, u64>, ids: &[u64]) {
    for (i, id) in (0..).zip(ids) {
        list.set(i, *id);
    }
}

fn read(mut body: &[u8]) -> capnp::Result<StateHeader> {
    let message = capnp::serialize::read_message(&mut body, ReaderOptions::new())?;
    let header = message.get_root::<state_header::Reader<'_>>()?;
    let epoch = header.get_epoch()?;
    let mut members = Vec::new();
    for record in header.get_members()? {
        members.push(Member {
            replica: ReplicaId(record.get_replica()),
            node: NodeId(record.get_node()),
            role: read_role(record.get_role())?,
        });
    }
    Ok(StateHeader {
        applied: Position { index: header.get_applied(), term: header.get_applied_term() },
        revision: header.get_revision(),
        epoch: Epoch { range: epoch.get_range(), conf: epoch.get_conf() },
        members,
        conf_state: ConfState {
            voters: header.get_voters()?.iter().collect(),
            learners: header.get_learners()?.iter().collect(),
            voters_outgoing: header.get_voters_outgoing()?.iter().collect(),
            learners_next: header.get_learners_next()?.iter().collect(),
            auto_leave: header.get_auto_leave(),
            ..ConfState::default()
        },
        log_time: header.get_log_time(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::placement::map::MemberRole;

    fn sample() -> StateHeader {
        StateHeader {
            applied: Position { index: 77, term: 9 },
            revision: 1234,
            epoch: Epoch { range: 3, conf: 8 },
            members: vec![
                Member { replica: ReplicaId(11), node: NodeId(1), role: MemberRole::Voter },
                Member { replica: ReplicaId(12), node: NodeId(2), role: MemberRole::Learner },
            ],
            conf_state: ConfState {
                voters: vec![11, 13],
                learners: vec![12],
                voters_outgoing: vec![11],
                learners_next: vec![14],
                auto_leave: true,
                ..ConfState::default()
            },
            log_time: 987_654,
        }
    }

    #[test]
    fn header_survives_its_bytes() {
        let header = sample();
        assert_eq!(StateHeader::decode(&header.encode(), "header").unwrap(), header);
    }

    #[test]
    fn the_first_version_is_read() {
        let header = StateHeader { log_time: 0, ..sample() };
        let mut bytes = header.encode();
        bytes[3] = 1;
        assert_eq!(StateHeader::decode(&bytes, "header").unwrap(), header);
    }

    #[test]
    fn bytes_that_are_no_header_are_damage() {
        let bytes = sample().encode();
        for len in 0..bytes.len() {
            assert!(
                matches!(StateHeader::decode(&bytes[..len], "header"), Err(StorageError::Damaged { .. })),
                "cut at {len}"
            );
        }
        let mut newer = bytes;
        newer[3] += 1;
        let error = StateHeader::decode(&newer, "header of replica 4").unwrap_err();
        assert_eq!(
            error.to_string(),
            "header of replica 4 has format 3, this program knows up to 2; use the newer program that wrote it"
        );
    }
}
