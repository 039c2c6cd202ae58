//! Records of the cluster map in their Cap'n Proto form, for the wire and for the metadata log.
//!
//! Writing never fails. Reading checks everything the program relies on later: identities are 16
//! bytes, ranges are not reversed, enumerants are known, text is UTF-8. What it doesn't check is
//! policy (limits, names): those belong to whoever admits a request.

use capnp::{primitive_list, struct_list, text};

use super::CodecError;
use crate::ids::{DatabaseId, Epoch, NodeId, RandomId, ReplicaId, ShardId};
use crate::placement::map::{
    DatabaseRecord, MapDelta, Member, MemberRole, MoveCause, NodeRecord, PolicyRecord, RebalanceRecord,
    RebalanceState, ShardMove, ShardRecord, ShardTarget, Standing,
};
use crate::placement::ring::RingRange;
use crate::schema::types_capnp::{
    self, database_record, map_delta, member_record, node_record, policy_record, rebalance_record,
    shard_move, shard_record, shard_target,
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
    to.set_standing(write_standing(record.standing));
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
        standing: read_standing(from.get_standing())?,
        changed_at: from.get_changed_at(),
    })
}

/// Writes a database.
pub fn write_database(record: &DatabaseRecord, mut to: database_record::Builder<'_>) {
    to.set_id(record.id.0);
    to.set_name(record.name.as_str());
    to.set_replicas(record.replicas);
    write_ids(
        record.shards.iter().map(|shard| shard.0),
        to.reborrow().init_shards(length(record.shards.len())),
    );
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
    write_members(&record.members, to.reborrow().init_members(length(record.members.len())));
    to.set_dropped(record.dropped);
    to.set_changed_at(record.changed_at);
    if let Some(moving) = &record.moving {
        write_move(moving, to.reborrow().init_moving());
    }
    if let Some(target) = &record.target {
        write_target(target, to.reborrow().init_target());
    }
    if let Some(previous) = &record.previous {
        write_target(previous, to.init_previous());
    }
}

/// Writes a list of members.
pub fn write_members(from: &[Member], mut to: struct_list::Builder<'_, member_record::Owned>) {
    for (at, member) in (0..).zip(from) {
        write_member(member, to.reborrow().get(at));
    }
}

/// Reads a list of members. Refuses a replica that is listed twice.
pub fn read_members(from: struct_list::Reader<'_, member_record::Owned>) -> Result<Vec<Member>, CodecError> {
    let mut members: Vec<Member> = Vec::new();
    for member in from.iter() {
        let member = read_member(member)?;
        if members.iter().any(|m| m.replica == member.replica) {
            return Err(malformed("MemberRecord", format!("replica {} is listed twice", member.replica)));
        }
        members.push(member);
    }
    Ok(members)
}

fn write_move(moving: &ShardMove, mut to: shard_move::Builder<'_>) {
    to.set_id(moving.id);
    write_members(&moving.adds, to.reborrow().init_adds(length(moving.adds.len())));
    let removes = moving.removes.iter().map(|replica| replica.0);
    write_ids(removes, to.reborrow().init_removes(length(moving.removes.len())));
    to.set_cancelling(moving.cancelling);
    to.set_cause(write_cause(moving.cause));
}

fn read_move(from: shard_move::Reader<'_>) -> Result<ShardMove, CodecError> {
    Ok(ShardMove {
        id: from.get_id(),
        adds: read_members(from.get_adds()?)?,
        removes: from.get_removes()?.iter().map(ReplicaId).collect(),
        cancelling: from.get_cancelling(),
        cause: read_cause(from.get_cause())?,
    })
}

pub(super) fn write_cause(cause: MoveCause) -> types_capnp::MoveCause {
    match cause {
        MoveCause::Rebalance => types_capnp::MoveCause::Rebalance,
        MoveCause::Repair => types_capnp::MoveCause::Repair,
        MoveCause::Drain => types_capnp::MoveCause::Drain,
        MoveCause::Replicas => types_capnp::MoveCause::Replicas,
    }
}

pub(super) fn read_cause(
    from: Result<types_capnp::MoveCause, capnp::NotInSchema>,
) -> Result<MoveCause, CodecError> {
    match from {
        Ok(types_capnp::MoveCause::Rebalance) => Ok(MoveCause::Rebalance),
        Ok(types_capnp::MoveCause::Repair) => Ok(MoveCause::Repair),
        Ok(types_capnp::MoveCause::Drain) => Ok(MoveCause::Drain),
        Ok(types_capnp::MoveCause::Replicas) => Ok(MoveCause::Replicas),
        Err(unknown) => Err(malformed("ShardMove", format!("unknown cause {}", unknown.0))),
    }
}

fn write_target(target: &ShardTarget, mut to: shard_target::Builder<'_>) {
    to.set_plan(target.plan);
    write_ids(target.nodes.iter().map(|node| node.0), to.init_nodes(length(target.nodes.len())));
}

fn read_target(from: shard_target::Reader<'_>) -> Result<ShardTarget, CodecError> {
    Ok(ShardTarget { plan: from.get_plan(), nodes: read_node_ids(from.get_nodes()?) })
}

pub(crate) fn write_standing(standing: Standing) -> types_capnp::Standing {
    match standing {
        Standing::Member => types_capnp::Standing::Member,
        Standing::Pending => types_capnp::Standing::Pending,
        Standing::Draining => types_capnp::Standing::Draining,
        Standing::Leaving => types_capnp::Standing::Leaving,
        Standing::Removed => types_capnp::Standing::Removed,
    }
}

/// A standing; one of a newer version is an error.
pub fn read_standing(
    from: Result<types_capnp::Standing, capnp::NotInSchema>,
) -> Result<Standing, CodecError> {
    match from {
        Ok(types_capnp::Standing::Member) => Ok(Standing::Member),
        Ok(types_capnp::Standing::Pending) => Ok(Standing::Pending),
        Ok(types_capnp::Standing::Draining) => Ok(Standing::Draining),
        Ok(types_capnp::Standing::Leaving) => Ok(Standing::Leaving),
        Ok(types_capnp::Standing::Removed) => Ok(Standing::Removed),
        Err(unknown) => Err(malformed("NodeRecord", format!("unknown standing {}", unknown.0))),
    }
}

/// Writes what operators have set.
pub fn write_policy(policy: &PolicyRecord, mut to: policy_record::Builder<'_>) {
    to.set_replace_after_ms(policy.replace_after_ms);
    to.set_moves_at_a_time(policy.moves_at_a_time);
    to.set_bytes_per_second(policy.bytes_per_second);
    to.set_automatic(policy.automatic);
    to.set_approve_joins(policy.approve_joins);
    to.set_changed_at(policy.changed_at);
}

/// Reads what operators have set.
pub fn read_policy(from: policy_record::Reader<'_>) -> Result<PolicyRecord, CodecError> {
    Ok(PolicyRecord {
        replace_after_ms: from.get_replace_after_ms(),
        moves_at_a_time: from.get_moves_at_a_time(),
        bytes_per_second: from.get_bytes_per_second(),
        automatic: from.get_automatic(),
        approve_joins: from.get_approve_joins(),
        changed_at: from.get_changed_at(),
    })
}

pub(crate) fn write_rebalance_state(state: RebalanceState) -> types_capnp::RebalanceState {
    match state {
        RebalanceState::Idle => types_capnp::RebalanceState::Idle,
        RebalanceState::Running => types_capnp::RebalanceState::Running,
        RebalanceState::Paused => types_capnp::RebalanceState::Paused,
        RebalanceState::Cancelling => types_capnp::RebalanceState::Cancelling,
        RebalanceState::Failed => types_capnp::RebalanceState::Failed,
    }
}

pub(crate) fn read_rebalance_state(
    from: Result<types_capnp::RebalanceState, capnp::NotInSchema>,
) -> Result<RebalanceState, CodecError> {
    match from {
        Ok(types_capnp::RebalanceState::Idle) => Ok(RebalanceState::Idle),
        Ok(types_capnp::RebalanceState::Running) => Ok(RebalanceState::Running),
        Ok(types_capnp::RebalanceState::Paused) => Ok(RebalanceState::Paused),
        Ok(types_capnp::RebalanceState::Cancelling) => Ok(RebalanceState::Cancelling),
        Ok(types_capnp::RebalanceState::Failed) => Ok(RebalanceState::Failed),
        Err(unknown) => Err(malformed("RebalanceRecord", format!("unknown state {}", unknown.0))),
    }
}

/// Writes the last rebalancing.
pub fn write_rebalance(record: &RebalanceRecord, mut to: rebalance_record::Builder<'_>) {
    to.set_plan(record.plan);
    to.set_state(write_rebalance_state(record.state));
    to.set_moves(record.moves);
    to.set_bytes(record.bytes);
    to.set_reason(record.reason.as_str());
    to.set_undoes(record.undoes);
    to.set_changed_at(record.changed_at);
}

/// Reads the last rebalancing.
pub fn read_rebalance(from: rebalance_record::Reader<'_>) -> Result<RebalanceRecord, CodecError> {
    Ok(RebalanceRecord {
        plan: from.get_plan(),
        state: read_rebalance_state(from.get_state())?,
        moves: from.get_moves(),
        bytes: from.get_bytes(),
        reason: read_text(from.get_reason()?)?,
        undoes: from.get_undoes(),
        changed_at: from.get_changed_at(),
    })
}

/// Reads a shard. Refuses a reversed range and a replica that is listed twice.
pub fn read_shard(from: shard_record::Reader<'_>) -> Result<ShardRecord, CodecError> {
    let id = ShardId(from.get_id());
    let epoch = from.get_epoch()?;
    let members = read_members(from.get_members()?)?;
    let target = |from: capnp::Result<shard_target::Reader<'_>>| read_target(from?);
    let moving = from.has_moving().then(|| read_move(from.get_moving()?)).transpose()?;
    Ok(ShardRecord {
        id,
        database: DatabaseId(from.get_database()),
        range: read_range(from.get_start(), from.get_end())?,
        epoch: Epoch { range: epoch.get_range(), conf: epoch.get_conf() },
        members,
        dropped: from.get_dropped(),
        moving,
        target: from.has_target().then(|| target(from.get_target())).transpose()?,
        previous: from.has_previous().then(|| target(from.get_previous())).transpose()?,
        changed_at: from.get_changed_at(),
    })
}

/// Writes a role.
pub fn write_role(role: MemberRole) -> types_capnp::MemberRole {
    match role {
        MemberRole::Voter => types_capnp::MemberRole::Voter,
        MemberRole::Learner => types_capnp::MemberRole::Learner,
        MemberRole::Incoming => types_capnp::MemberRole::Incoming,
        MemberRole::Outgoing => types_capnp::MemberRole::Outgoing,
    }
}

/// Reads a role. An unknown one is an error: taking a role for another would change a quorum.
pub fn read_role(
    from: Result<types_capnp::MemberRole, capnp::NotInSchema>,
) -> Result<MemberRole, capnp::NotInSchema> {
    from.map(|role| match role {
        types_capnp::MemberRole::Voter => MemberRole::Voter,
        types_capnp::MemberRole::Learner => MemberRole::Learner,
        types_capnp::MemberRole::Incoming => MemberRole::Incoming,
        types_capnp::MemberRole::Outgoing => MemberRole::Outgoing,
    })
}

/// Writes a member of a group.
pub fn write_member(member: &Member, mut to: member_record::Builder<'_>) {
    to.set_replica(member.replica.0);
    to.set_node(member.node.0);
    to.set_role(write_role(member.role));
}

/// Reads a member of a group. Refuses replica 0 and node 0, which stand for "none", and an unknown role.
pub fn read_member(from: member_record::Reader<'_>) -> Result<Member, CodecError> {
    let role = read_role(from.get_role())
        .map_err(|unknown| malformed("MemberRecord", format!("unknown role {}", unknown.0)))?;
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
    if let Some(policy) = &delta.policy {
        write_policy(policy, to.reborrow().init_policy());
    }
    if let Some(rebalance) = &delta.rebalance {
        write_rebalance(rebalance, to.init_rebalance());
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
        policy: from.has_policy().then(|| read_policy(from.get_policy()?)).transpose()?,
        rebalance: from.has_rebalance().then(|| read_rebalance(from.get_rebalance()?)).transpose()?,
    })
}

/// Reads a list of nodes.
pub(super) fn read_nodes(
    from: struct_list::Reader<'_, node_record::Owned>,
) -> Result<Vec<NodeRecord>, CodecError> {
    from.iter().map(read_node).collect()
}

/// Writes a list of ids, which has room for them.
pub(super) fn write_ids(ids: impl Iterator<Item = u64>, mut to: primitive_list::Builder<'_, u64>) {
    for (at, id) in (0..).zip(ids) {
        to.set(at, id);
    }
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
pub(crate) mod tests;
