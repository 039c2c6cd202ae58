//! The metadata shard's machine: nodes, databases, the shard map, and the allocation of ids.
//!
//! The map version is the shard's revision counter: a command that changes anything takes exactly one
//! revision and stamps it on every record it writes (`changed_at`); a command that changes nothing takes
//! none. Ids are counted up and never reused, replica ids across the whole cluster.
//!
//! *Determinism.* The result depends on the command and the state alone. Placement is not computed here: the
//! plan travels in the command and is only checked. The bounds in [`fixed`] belong to the format of the
//! commands: they don't follow [`crate::limits`], since two versions of the program with other limits must
//! still agree on each committed command.

use std::collections::BTreeSet;

use super::ApplyError;
use super::command::{MetaCommand, MetaRefusal, MetaReply};
use crate::ids::{ClusterId, DatabaseId, Epoch, METADATA_SHARD, NodeId, ReplicaId, ShardId};
use crate::placement::map::{ClusterMap, DatabaseRecord, Member, MemberRole, NodeRecord, ShardRecord};
use crate::placement::plan::PlannedShard;
use crate::placement::ring;
use crate::storage::{StateBatch, StateView, StorageError};
use records::Counters;

mod records;

/// What any version of the program accepts in a committed command. To raise one is to change the format:
/// it needs a feature level of the cluster. The limits at admission may be lower, never higher.
pub mod fixed {
    use crate::limits;

    /// Longest database name in bytes.
    pub const NAME_BYTES: usize = 64;
    /// Most voters of a shard.
    pub const REPLICAS: u32 = 7;
    /// Most shards of a database.
    pub const SHARDS: usize = 4096;
    /// Greatest id in the command that forms a cluster; later ones are counted on from there.
    pub const FIRST_ID: u64 = u32::MAX as u64;

    const _: () = assert!(limits::NAME_BYTES_MAX <= NAME_BYTES);
    const _: () = assert!(limits::REPLICAS_MAX <= REPLICAS);
    const _: () = assert!(limits::SHARDS_MAX as usize <= SHARDS);
}

/// Why a command gets no ordinary reply: the rules refuse it, which is a reply too, or the storage fails.
enum Stop {
    Refused(MetaRefusal),
    Failed(StorageError),
}

impl From<StorageError> for Stop {
    fn from(error: StorageError) -> Stop {
        Stop::Failed(error)
    }
}

impl From<MetaRefusal> for Stop {
    fn from(refusal: MetaRefusal) -> Stop {
        Stop::Refused(refusal)
    }
}

/// Applies one command. A command that is refused has changed nothing.
pub fn apply(command: &MetaCommand, state: &mut dyn StateBatch) -> Result<MetaReply, ApplyError> {
    let reply = match command {
        MetaCommand::Form { cluster_id, nodes, metadata } => form(*cluster_id, nodes, metadata, state),
        MetaCommand::AddNode(record) => add_node(record, state),
        MetaCommand::CreateDatabase { name, replicas, shards } => {
            create_database(name, *replicas, shards, state)
        }
        MetaCommand::DropDatabase { name, id } => drop_database(name, *id, state),
        MetaCommand::ObserveShard { .. }
        | MetaCommand::BeginMove { .. }
        | MetaCommand::CancelMove { .. }
        | MetaCommand::EndMove { .. }
        | MetaCommand::SetStanding { .. }
        | MetaCommand::SetPolicy(_)
        | MetaCommand::BeginRebalance { .. }
        | MetaCommand::ControlRebalance { .. }
        | MetaCommand::SetReplicas { .. }
        | MetaCommand::RecoverShard { .. } => Err(Stop::Refused(MetaRefusal::Other("not yet".into()))),
    };
    match reply {
        Ok(reply) => Ok(reply),
        Err(Stop::Refused(refusal)) => Ok(MetaReply::Refused(refusal)),
        Err(Stop::Failed(error)) => Err(error.into()),
    }
}

/// The cluster map that the state holds. Reads every record: call it after changes, not per request.
/// Before the cluster is formed it is the empty map.
pub fn cluster_map(state: &dyn StateView) -> Result<ClusterMap, StorageError> {
    let Some(counters) = records::load_counters(state)? else {
        return Ok(ClusterMap::default());
    };
    let nodes: Vec<NodeRecord> = records::all(state)?;
    let databases: Vec<DatabaseRecord> = records::all(state)?;
    let shards: Vec<ShardRecord> = records::all(state)?;
    Ok(ClusterMap {
        cluster_id: counters.cluster_id,
        version: state.revision(),
        nodes: nodes.into_iter().map(|n| (n.id, n)).collect(),
        databases: databases.into_iter().map(|d| (d.id, d)).collect(),
        shards: shards.into_iter().map(|s| (s.id, s)).collect(),
        ..ClusterMap::default()
    })
}

/// Checks the name of a database: 1 to 64 of `A-Z a-z 0-9 _ -`.
pub fn check_name(name: &str) -> Result<(), MetaRefusal> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
    if (1..=fixed::NAME_BYTES).contains(&name.len()) && name.bytes().all(allowed) {
        return Ok(());
    }
    Err(MetaRefusal::InvalidPlan(format!(
        "`{}` is no name for a database: it must be 1 to {} of A-Z a-z 0-9 _ -",
        name.chars().take(fixed::NAME_BYTES + 1).collect::<String>(),
        fixed::NAME_BYTES
    )))
}

fn form(
    cluster_id: ClusterId,
    nodes: &[NodeRecord],
    metadata: &ShardRecord,
    state: &mut dyn StateBatch,
) -> Result<MetaReply, Stop> {
    if let Some(counters) = records::load_counters(state)? {
        if counters.cluster_id != cluster_id {
            return Err(Stop::Refused(MetaRefusal::OtherCluster {
                have: counters.cluster_id,
                asked: cluster_id,
            }));
        }
        return Ok(MetaReply::Formed(state.revision()));
    }
    check_formation(nodes, metadata)?;
    let version = state.next_revision();
    for node in nodes {
        let changed_at = version;
        records::save(&NodeRecord { changed_at, ..node.clone() }, state);
    }
    let shard = ShardRecord { changed_at: version, ..metadata.clone() };
    records::save(&shard, state);
    let node_ids = nodes.iter().map(|node| node.id.0);
    let replica_ids = metadata.members.iter().map(|member| member.replica.0);
    let counters = Counters {
        cluster_id,
        next_node: node_ids.max().unwrap_or(0) + 1,
        next_database: 1,
        next_shard: 1,
        next_replica: replica_ids.max().unwrap_or(0) + 1,
    };
    records::save_counters(&counters, version, state);
    Ok(MetaReply::Formed(version))
}

fn check_formation(nodes: &[NodeRecord], metadata: &ShardRecord) -> Result<(), MetaRefusal> {
    let invalid = |reason: &str| Err(MetaRefusal::InvalidPlan(reason.into()));
    let small = 1..=fixed::FIRST_ID;
    let ids: BTreeSet<_> = nodes.iter().map(|node| node.id).collect();
    let stores: BTreeSet<_> = nodes.iter().map(|node| node.store_id).collect();
    let replicas: BTreeSet<_> = metadata.members.iter().map(|m| m.replica).collect();
    let holders: BTreeSet<_> = metadata.members.iter().map(|m| m.node).collect();
    if ids.len() < nodes.len() || stores.len() < nodes.len() {
        return invalid("a first node is listed twice");
    }
    if metadata.id != METADATA_SHARD {
        return invalid("the first shard is not the metadata shard");
    }
    if replicas.is_empty()
        || replicas.len() < metadata.members.len()
        || holders.len() < metadata.members.len()
    {
        return invalid("the metadata shard has no members, or one of them twice");
    }
    if let Some(unknown) = holders.difference(&ids).next() {
        return Err(MetaRefusal::UnknownNode(*unknown));
    }
    let small_ids = ids.iter().all(|id| small.contains(&id.0));
    if !small_ids || !replicas.iter().all(|id| small.contains(&id.0)) {
        return invalid("the first ids must be small numbers above 0");
    }
    Ok(())
}

/// The record's `id` is not looked at: the store id says whether the node is known.
fn add_node(record: &NodeRecord, state: &mut dyn StateBatch) -> Result<MetaReply, Stop> {
    let mut counters = records::load_counters(state)?.ok_or(MetaRefusal::NotFormed)?;
    let nodes: Vec<NodeRecord> = records::all(state)?;
    let known = nodes.into_iter().find(|n| n.store_id == record.store_id);
    let mut record = record.clone();
    if let Some(known) = known {
        record.id = known.id;
        record.changed_at = known.changed_at;
        if record == known {
            return Ok(MetaReply::Node(known.id));
        }
        record.changed_at = state.next_revision();
    } else {
        record.id = NodeId(counters.next_node);
        record.changed_at = state.next_revision();
        counters.next_node += 1;
        records::save_counters(&counters, record.changed_at, state);
    }
    records::save(&record, state);
    Ok(MetaReply::Node(record.id))
}

fn create_database(
    name: &str,
    replicas: u32,
    shards: &[PlannedShard],
    state: &mut dyn StateBatch,
) -> Result<MetaReply, Stop> {
    let mut counters = records::load_counters(state)?.ok_or(MetaRefusal::NotFormed)?;
    check_name(name)?;
    // The name first: whoever repeats the command may have planned anew, and differently.
    if let Some(record) = records::load_by_name(state, name)? {
        if record.replicas == replicas && record.shards.len() == shards.len() {
            let created = false;
            return Ok(MetaReply::Database { record, created });
        }
        return Err(Stop::Refused(MetaRefusal::NameTaken {
            name: name.into(),
            replicas: record.replicas,
            shards: record.shards.len(),
        }));
    }
    check_plan(replicas, shards, state)?;

    let changed_at = state.next_revision();
    let database = DatabaseId(counters.next_database);
    counters.next_database += 1;
    let mut ids = Vec::with_capacity(shards.len());
    for shard in shards {
        let id = ShardId(counters.next_shard);
        counters.next_shard += 1;
        ids.push(id);
        // The order of the nodes is kept: the first is preferred as leader.
        let members = (counters.next_replica..)
            .zip(&shard.nodes)
            .map(|(replica, node)| Member {
                replica: ReplicaId(replica),
                node: *node,
                role: MemberRole::Voter,
            })
            .collect();
        counters.next_replica += shard.nodes.len() as u64;
        let record = ShardRecord {
            id,
            database,
            range: shard.range,
            epoch: Epoch { range: 1, conf: 1 },
            members,
            dropped: false,
            moving: None,
            target: None,
            previous: None,
            changed_at,
        };
        records::save(&record, state);
    }
    let record =
        DatabaseRecord { id: database, name: name.into(), replicas, shards: ids, dropped: false, changed_at };
    records::save(&record, state);
    records::save_name(&record, state);
    records::save_counters(&counters, changed_at, state);
    let created = true;
    Ok(MetaReply::Database { record, created })
}

fn check_plan(replicas: u32, shards: &[PlannedShard], state: &dyn StateView) -> Result<(), Stop> {
    let invalid = |reason: String| Err(Stop::Refused(MetaRefusal::InvalidPlan(reason)));
    if !(1..=fixed::REPLICAS).contains(&replicas) {
        let most = fixed::REPLICAS;
        return invalid(format!("{replicas} replicas; there can be 1 to {most}"));
    }
    if !(1..=fixed::SHARDS).contains(&shards.len()) {
        let most = fixed::SHARDS;
        return invalid(format!("{} shards; there can be 1 to {most}", shards.len()));
    }
    if !ring::covers_ring(shards.iter().map(|shard| shard.range)) {
        return invalid("the ranges of the shards don't cover the ring in ascending order".into());
    }
    let mut known = BTreeSet::new();
    for (at, shard) in shards.iter().enumerate() {
        let nodes: BTreeSet<_> = shard.nodes.iter().copied().collect();
        if nodes.len() != shard.nodes.len() || shard.nodes.len() != replicas as usize {
            let list: Vec<_> = shard.nodes.iter().map(|node| node.to_string()).collect();
            return invalid(format!(
                "shard number {at} is on nodes {}; it must be on {replicas} different ones",
                list.join(", ")
            ));
        }
        for node in nodes {
            if known.insert(node) && records::load::<NodeRecord>(state, node.0)?.is_none() {
                return Err(Stop::Refused(MetaRefusal::UnknownNode(node)));
            }
        }
    }
    Ok(())
}

fn drop_database(name: &str, id: Option<DatabaseId>, state: &mut dyn StateBatch) -> Result<MetaReply, Stop> {
    if records::load_counters(state)?.is_none() {
        return Err(Stop::Refused(MetaRefusal::NotFormed));
    }
    // A name belongs to one living database at a time, so an id that isn't its is gone or never was.
    let living = records::load_by_name(state, name)?;
    let Some(mut record) = living.filter(|record| id.is_none_or(|id| record.id == id)) else {
        return Err(Stop::Refused(MetaRefusal::UnknownDatabase(name.into())));
    };
    let mut shards = Vec::with_capacity(record.shards.len());
    for id in &record.shards {
        let shard: Option<ShardRecord> = records::load(state, id.0)?;
        let missing = || records::damaged(&format!("database `{name}`"), format!("shard {id} is missing"));
        shards.push(shard.ok_or_else(missing)?);
    }
    let changed_at = state.next_revision();
    for shard in shards {
        let dropped = true;
        records::save(&ShardRecord { dropped, changed_at, ..shard }, state);
    }
    record.dropped = true;
    record.changed_at = changed_at;
    records::save(&record, state);
    records::free_name(name, state);
    let created = false;
    Ok(MetaReply::Database { record, created })
}

#[cfg(test)]
mod tests;
