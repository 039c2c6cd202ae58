//! Records of the cluster map in their Cap'n Proto form, for the wire and for the metadata log.
//!
//! Writing never fails. Reading checks everything the program relies on later: identities are 16
//! bytes, ranges are not reversed, enumerants are known, text is UTF-8. What it doesn't check is
//! policy (limits, names): those belong to whoever admits a request.

use capnp::{primitive_list, struct_list, text};

use super::CodecError;
use crate::ids::{DatabaseId, Epoch, NodeId, RandomId, ReplicaId, ShardId};
use crate::placement::map::{DatabaseRecord, MapDelta, Member, MemberRole, NodeRecord, ShardRecord};
use crate::placement::ring::RingRange;
use crate::schema::types_capnp::{
    self, database_record, map_delta, member_record, node_record, shard_record,
};

/// Writes a node.
pub fn write_node(record: &NodeRecord, mut to: node_record::Builder<'_>) {
    to.set_id(record.id.0);
    to.set_label(record.label.as_str());
    to.set_client_address(record.client_address.as_str());
    to.set_peer_address(record.peer_address.as_str());
    to.set_zone(record.zone.as_str());
    to.set_weight(record.weight);
    to.set_store_id(&record.store_id.0);
    to.set_changed_at(record.changed_at);
}

/// Reads a node.
pub fn read_node(from: node_record::Reader<'_>) -> Result<NodeRecord, CodecError> {
    Ok(NodeRecord {
        id: NodeId(from.get_id()),
        label: read_text(from.get_label()?)?,
        client_address: read_text(from.get_client_address()?)?,
        peer_address: read_text(from.get_peer_address()?)?,
        zone: read_text(from.get_zone()?)?,
        weight: from.get_weight(),
        store_id: read_id("storeId", from.get_store_id()?)?,
        changed_at: from.get_changed_at(),
    })
}

/// Writes a database.
pub fn write_database(record: &DatabaseRecord, mut to: database_record::Builder<'_>) {
    to.set_id(record.id.0);
    to.set_name(record.name.as_str());
    to.set_replicas(record.replicas);
    let mut shards = to.reborrow().init_shards(length(record.shards.len()));
    for (at, shard) in (0..).zip(&record.shards) {
        shards.set(at, shard.0);
    }
    to.set_dropped(record.dropped);
    to.set_changed_at(record.changed_at);
}

/// Reads a database.
pub fn read_database(from: database_record::Reader<'_>) -> Result<DatabaseRecord, CodecError> {
    Ok(DatabaseRecord {
        id: DatabaseId(from.get_id()),
        name: read_text(from.get_name()?)?,
        replicas: from.get_replicas(),
        shards: from.get_shards()?.iter().map(ShardId).collect(),
        dropped: from.get_dropped(),
        changed_at: from.get_changed_at(),
    })
}

/// Writes a shard.
pub fn write_shard(record: &ShardRecord, mut to: shard_record::Builder<'_>) {
    to.set_id(record.id.0);
    to.set_database(record.database.0);
    to.set_start(record.range.start);
    to.set_end(record.range.end);
    let mut epoch = to.reborrow().init_epoch();
    epoch.set_range(record.epoch.range);
    epoch.set_conf(record.epoch.conf);
    let mut members = to.reborrow().init_members(length(record.members.len()));
    for (at, member) in (0..).zip(&record.members) {
        write_member(member, members.reborrow().get(at));
    }
    to.set_dropped(record.dropped);
    to.set_changed_at(record.changed_at);
}

/// Reads a shard. Refuses a reversed range and a replica that is listed twice.
pub fn read_shard(from: shard_record::Reader<'_>) -> Result<ShardRecord, CodecError> {
    let id = ShardId(from.get_id());
    let epoch = from.get_epoch()?;
    let mut members: Vec<Member> = Vec::new();
    for member in from.get_members()?.iter() {
        let member = read_member(member)?;
        if members.iter().any(|m| m.replica == member.replica) {
            return Err(malformed(
                "ShardRecord",
                format!("shard {id} lists replica {} twice", member.replica),
            ));
        }
        members.push(member);
    }
    Ok(ShardRecord {
        id,
        database: DatabaseId(from.get_database()),
        range: read_range(from.get_start(), from.get_end())?,
        epoch: Epoch { range: epoch.get_range(), conf: epoch.get_conf() },
        members,
        dropped: from.get_dropped(),
        changed_at: from.get_changed_at(),
    })
}

/// Writes a member of a group.
pub fn write_member(member: &Member, mut to: member_record::Builder<'_>) {
    to.set_replica(member.replica.0);
    to.set_node(member.node.0);
    to.set_role(match member.role {
        MemberRole::Voter => types_capnp::MemberRole::Voter,
        MemberRole::Learner => types_capnp::MemberRole::Learner,
    });
}

/// Reads a member of a group. Refuses replica 0 and node 0, which stand for "none", and an unknown role:
/// taking a role for another would change a quorum.
pub fn read_member(from: member_record::Reader<'_>) -> Result<Member, CodecError> {
    let role = match from.get_role() {
        Ok(types_capnp::MemberRole::Voter) => MemberRole::Voter,
        Ok(types_capnp::MemberRole::Learner) => MemberRole::Learner,
        Err(unknown) => {
            return Err(malformed("MemberRecord", format!("unknown role {}", unknown.0)));
        }
    };
    let (replica, node) = (from.get_replica(), from.get_node());
    if replica == 0 || node == 0 {
        return Err(malformed(
            "MemberRecord",
            format!("replica {replica} on node {node}: both ids must be above 0"),
        ));
    }
    Ok(Member { replica: ReplicaId(replica), node: NodeId(node), role })
}

/// Writes a map delta.
pub fn write_delta(delta: &MapDelta, mut to: map_delta::Builder<'_>) {
    to.set_cluster_id(&delta.cluster_id.0);
    to.set_since(delta.since);
    to.set_version(delta.version);
    let mut nodes = to.reborrow().init_nodes(length(delta.nodes.len()));
    for (at, node) in (0..).zip(&delta.nodes) {
        write_node(node, nodes.reborrow().get(at));
    }
    let mut databases = to.reborrow().init_databases(length(delta.databases.len()));
    for (at, database) in (0..).zip(&delta.databases) {
        write_database(database, databases.reborrow().get(at));
    }
    let mut shards = to.reborrow().init_shards(length(delta.shards.len()));
    for (at, shard) in (0..).zip(&delta.shards) {
        write_shard(shard, shards.reborrow().get(at));
    }
}

/// Reads a map delta. An absent one (a null pointer, as in an answer without a route) is refused for its
/// empty cluster id: ask `has_…` first.
pub fn read_delta(from: map_delta::Reader<'_>) -> Result<MapDelta, CodecError> {
    Ok(MapDelta {
        cluster_id: read_id("clusterId", from.get_cluster_id()?)?,
        since: from.get_since(),
        version: from.get_version(),
        nodes: read_nodes(from.get_nodes()?)?,
        databases: from.get_databases()?.iter().map(read_database).collect::<Result<_, _>>()?,
        shards: from.get_shards()?.iter().map(read_shard).collect::<Result<_, _>>()?,
    })
}

/// Reads a list of nodes.
pub(super) fn read_nodes(
    from: struct_list::Reader<'_, node_record::Owned>,
) -> Result<Vec<NodeRecord>, CodecError> {
    from.iter().map(read_node).collect()
}

/// Reads a list of node ids.
pub(super) fn read_node_ids(from: primitive_list::Reader<'_, u64>) -> Vec<NodeId> {
    from.iter().map(NodeId).collect()
}

/// Reads a 128-bit identity.
pub(super) fn read_id(field: &'static str, bytes: &[u8]) -> Result<RandomId, CodecError> {
    RandomId::from_slice(bytes)
        .ok_or_else(|| malformed(field, format!("{} bytes instead of 16", bytes.len())))
}

/// Reads both ends of a range.
pub(super) fn read_range(start: u64, end: u64) -> Result<RingRange, CodecError> {
    if start > end {
        return Err(malformed("ring range", format!("it starts at {start:#018x} but ends at {end:#018x}")));
    }
    Ok(RingRange { start, end })
}

/// Reads text, which must be UTF-8.
pub(super) fn read_text(from: text::Reader<'_>) -> Result<String, CodecError> {
    Ok(from.to_string().map_err(capnp::Error::from)?)
}

pub(super) fn malformed(what: &'static str, detail: impl Into<String>) -> CodecError {
    CodecError::Malformed { what, detail: detail.into() }
}

/// The length of a list. Lists beyond `u32` can't arise: Cap'n Proto ends at 2^29 elements, memory and
/// the limits of the map long before.
pub(super) fn length(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(crate) fn any_id() -> impl Strategy<Value = RandomId> {
        any::<[u8; 16]>().prop_map(RandomId)
    }

    pub(crate) fn any_node() -> impl Strategy<Value = NodeRecord> {
        (any::<u64>(), ".{0,12}", ".{0,20}", ".{0,20}", "[a-z]{0,4}", any::<u32>(), any_id(), any::<u64>())
            .prop_map(|(id, label, client, peer, zone, weight, store_id, at)| NodeRecord {
                id: NodeId(id),
                label,
                client_address: client,
                peer_address: peer,
                zone,
                weight,
                store_id,
                changed_at: at,
            })
    }

    pub(crate) fn any_database() -> impl Strategy<Value = DatabaseRecord> {
        (
            any::<u64>(),
            "[A-Za-z0-9_-]{0,64}",
            any::<u32>(),
            prop::collection::vec(any::<u64>().prop_map(ShardId), 0..9),
            any::<bool>(),
            any::<u64>(),
        )
            .prop_map(|(id, name, replicas, shards, dropped, changed_at)| DatabaseRecord {
                id: DatabaseId(id),
                name,
                replicas,
                shards,
                dropped,
                changed_at,
            })
    }

    pub(crate) fn any_range() -> impl Strategy<Value = RingRange> {
        (any::<u64>(), any::<u64>()).prop_map(|(a, b)| RingRange { start: a.min(b), end: a.max(b) })
    }

    pub(crate) fn any_shard() -> impl Strategy<Value = ShardRecord> {
        let member = (1..u64::MAX, any::<bool>()).prop_map(|(node, voter)| {
            let role = if voter { MemberRole::Voter } else { MemberRole::Learner };
            (NodeId(node), role)
        });
        (any::<[u64; 5]>(), any_range(), prop::collection::vec(member, 0..5), any::<bool>()).prop_map(
            |([id, database, range, conf, at], ring, members, dropped)| ShardRecord {
                id: ShardId(id),
                database: DatabaseId(database),
                range: ring,
                epoch: Epoch { range, conf },
                members: (1..)
                    .zip(members)
                    .map(|(replica, (node, role))| Member { replica: ReplicaId(replica), node, role })
                    .collect(),
                dropped,
                changed_at: at,
            },
        )
    }

    pub(crate) fn any_delta() -> impl Strategy<Value = MapDelta> {
        (
            any_id(),
            any::<(u64, u64)>(),
            prop::collection::vec(any_node(), 0..4),
            prop::collection::vec(any_database(), 0..4),
            prop::collection::vec(any_shard(), 0..4),
        )
            .prop_map(|(cluster_id, (since, version), nodes, databases, shards)| MapDelta {
                cluster_id,
                since,
                version,
                nodes,
                databases,
                shards,
            })
    }

    fn shard_message(change: impl FnOnce(shard_record::Builder<'_>)) -> Result<ShardRecord, String> {
        let record = ShardRecord {
            id: ShardId(7),
            database: DatabaseId(1),
            range: RingRange { start: 5, end: 9 },
            epoch: Epoch { range: 1, conf: 1 },
            members: vec![Member { replica: ReplicaId(1), node: NodeId(1), role: MemberRole::Voter }],
            dropped: false,
            changed_at: 3,
        };
        let mut message = capnp::message::Builder::new_default();
        write_shard(&record, message.init_root());
        change(message.get_root().unwrap());
        read_shard(message.get_root_as_reader().unwrap()).map_err(|e| e.to_string())
    }

    #[test]
    fn a_shard_that_contradicts_itself_is_refused() {
        assert!(shard_message(|_| ()).is_ok());
        assert_eq!(
            shard_message(|mut s| s.set_start(10)).unwrap_err(),
            "malformed ring range: it starts at 0x000000000000000a but ends at 0x0000000000000009"
        );
        assert_eq!(
            shard_message(|s| s.get_members().unwrap().get(0).set_replica(0)).unwrap_err(),
            "malformed MemberRecord: replica 0 on node 1: both ids must be above 0"
        );
        let twice = shard_message(|s| {
            let mut members = s.init_members(2);
            for at in 0..2 {
                members.reborrow().get(at).set_replica(4);
                members.reborrow().get(at).set_node(2);
            }
        });
        assert_eq!(twice.unwrap_err(), "malformed ShardRecord: shard 7 lists replica 4 twice");
    }

    #[test]
    fn an_identity_of_another_length_is_refused() {
        let mut message = capnp::message::Builder::new_default();
        let mut delta = message.init_root::<map_delta::Builder<'_>>();
        delta.set_cluster_id(&[1; 15]);
        let error = read_delta(delta.into_reader()).unwrap_err();
        assert_eq!(error.to_string(), "malformed clusterId: 15 bytes instead of 16");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn a_delta_survives_the_wire(delta in any_delta()) {
            let mut message = capnp::message::Builder::new_default();
            write_delta(&delta, message.init_root());
            prop_assert_eq!(read_delta(message.get_root_as_reader()?).unwrap(), delta);
        }
    }
}
