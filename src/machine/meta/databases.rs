//! Databases: their names, their shards as planned, and how many replicas each should have.

use std::collections::BTreeSet;

use super::{Known, Stop, fixed, formed, nodes, records};
use crate::ids::{DatabaseId, Epoch, ReplicaId, ShardId};
use crate::machine::command::{MetaRefusal, MetaReply};
use crate::placement::map::{DatabaseRecord, Member, MemberRole, ShardRecord};
use crate::placement::plan::PlannedShard;
use crate::placement::ring;
use crate::storage::{StateBatch, StateView};

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

pub(super) fn create(
    name: &str,
    replicas: u32,
    shards: &[PlannedShard],
    state: &mut dyn StateBatch,
) -> Result<MetaReply, Stop> {
    let mut counters = formed(state)?;
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
    check_replicas(replicas)?;
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
            if known.insert(node) {
                nodes::check_takes_replicas(node, state)?;
            }
        }
    }
    Ok(())
}

pub(super) fn drop(
    name: &str,
    id: Option<DatabaseId>,
    state: &mut dyn StateBatch,
) -> Result<MetaReply, Stop> {
    formed(state)?;
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
        // Nothing moves it any more; its replicas are removed as they are.
        let (dropped, moving, target, previous) = (true, None, None, None);
        records::save(&ShardRecord { dropped, moving, target, previous, changed_at, ..shard }, state);
    }
    record.dropped = true;
    record.changed_at = changed_at;
    records::save(&record, state);
    records::free_name(name, state);
    let created = false;
    Ok(MetaReply::Database { record, created })
}

/// What the shards have is not changed here: whoever looks after them begins moves until they have as many.
pub(super) fn set_replicas(
    name: &str,
    replicas: u32,
    known: Known,
    state: &mut dyn StateBatch,
) -> Result<MetaReply, Stop> {
    formed(state)?;
    check_replicas(replicas)?;
    let Some(record) = records::load_by_name(state, name)? else {
        return Err(Stop::Refused(MetaRefusal::UnknownDatabase(name.into())));
    };
    if record.replicas == replicas {
        return Ok(MetaReply::Done(state.revision()));
    }
    // Another of the name, too: it was made later.
    known.check(|| format!("database `{name}`"), record.changed_at)?;
    let changed_at = state.next_revision();
    records::save(&DatabaseRecord { replicas, changed_at, ..record }, state);
    Ok(MetaReply::Done(changed_at))
}

fn check_replicas(replicas: u32) -> Result<(), MetaRefusal> {
    const MOST: u32 = fixed::REPLICAS;
    if (1..=MOST).contains(&replicas) {
        return Ok(());
    }
    Err(MetaRefusal::InvalidPlan(format!("{replicas} replicas; there can be 1 to {MOST}")))
}
