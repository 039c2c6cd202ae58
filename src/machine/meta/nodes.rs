//! Nodes: those that the cluster begins with, those that join, and what is decided about them.

use std::collections::BTreeSet;

use super::records::{self, Counters};
use super::{Known, Stop, fixed, formed, not_allowed};
use crate::ids::{ClusterId, METADATA_SHARD, NodeId, ShardId, generation_of};
use crate::machine::command::{MetaRefusal, MetaReply};
use crate::placement::map::{MemberRole, NodeRecord, PolicyRecord, ShardRecord, Standing};
use crate::storage::{StateBatch, StateView};

/// The first content of a cluster.
pub(super) fn form(
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
        let standing = Standing::Member;
        records::save(&NodeRecord { standing, changed_at, ..node.clone() }, state);
    }
    let shard = ShardRecord {
        dropped: false,
        moving: None,
        target: None,
        previous: None,
        changed_at: version,
        ..metadata.clone()
    };
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
    if metadata.members.iter().any(|member| member.role != MemberRole::Voter) {
        return invalid("a member of the metadata shard is no voter");
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

/// The record's standing is not looked at: the store id says whether the node is known, and what is decided about a
/// node only [`set_standing`] changes. A removed one isn't taken back.
///
/// Nor is its `id`, but for one thing: this shard may have gone on with less than it had told, and then a node has an id
/// of which it has no record. Whoever says so keeps the id: replicas of shards are on the node under it.
pub(super) fn add_node(record: &NodeRecord, state: &mut dyn StateBatch) -> Result<MetaReply, Stop> {
    let mut counters = formed(state)?;
    let nodes: Vec<NodeRecord> = records::all(state)?;
    // Before that each id that was given out has its record.
    let has_lost_some = generation_of(state.revision()) > 0;
    let own = Some(record.id).filter(|id| has_lost_some && *id != NodeId(0));
    let known = nodes.iter().find(|n| n.store_id == record.store_id);
    let mut record = record.clone();
    if let Some(known) = known {
        if known.standing == Standing::Removed {
            return Err(Stop::Refused(MetaRefusal::NodeRemoved(known.id)));
        }
        if let Some(own) = own.filter(|own| *own != known.id) {
            return not_allowed(format!("the node is node {} here, not {own}", known.id));
        }
        record.id = known.id;
        record.standing = known.standing;
        record.changed_at = known.changed_at;
        if record == *known {
            return Ok(MetaReply::Node(known.id));
        }
        record.changed_at = state.next_revision();
    } else if let Some(own) = own {
        if nodes.iter().any(|node| node.id == own) {
            return not_allowed(format!("node {own} is another one here"));
        }
        if own.0 >= counters.next_node {
            return not_allowed(format!("there never was a node {own}"));
        }
        // It was one, or it would have no id of its own.
        record.standing = Standing::Member;
        record.changed_at = state.next_revision();
    } else {
        let policy: PolicyRecord = records::load_single(state)?;
        record.id = NodeId(counters.next_node);
        record.standing = if policy.approve_joins { Standing::Pending } else { Standing::Member };
        record.changed_at = state.next_revision();
        counters.next_node += 1;
        records::save_counters(&counters, record.changed_at, state);
    }
    records::save(&record, state);
    Ok(MetaReply::Node(record.id))
}

/// The ways between standings:
///
/// ```text
///   Pending ──► Member ◄──► Draining
///      │          ▲ ▲          ▲
///      │          │ └► Leaving ◄┘
///      └──────────┴───────┴────────► Removed, from each that holds nothing; for good
/// ```
pub(super) fn set_standing(
    node: NodeId,
    standing: Standing,
    known: Known,
    state: &mut dyn StateBatch,
) -> Result<MetaReply, Stop> {
    use Standing::{Draining, Leaving, Member, Pending, Removed};
    formed(state)?;
    let Some(record) = records::load::<NodeRecord>(state, node.0)? else {
        return Err(Stop::Refused(MetaRefusal::UnknownNode(node)));
    };
    if record.standing == standing {
        return Ok(MetaReply::Done(state.revision()));
    }
    known.check(|| format!("node {node}"), record.changed_at)?;
    match (record.standing, standing) {
        (Removed, _) => return Err(Stop::Refused(MetaRefusal::NodeRemoved(node))),
        (_, Removed) => check_unused(node, state)?,
        (_, Pending) => return not_allowed(format!("node {node} has been accepted already")),
        (Pending, Draining | Leaving) => {
            return not_allowed(format!("node {node} waits to be accepted: accept it, or remove it"));
        }
        (Pending | Member | Draining | Leaving, Member)
        | (Member | Draining | Leaving, Draining | Leaving) => {}
    }
    let changed_at = state.next_revision();
    records::save(&NodeRecord { standing, changed_at, ..record }, state);
    Ok(MetaReply::Done(changed_at))
}

/// No living shard has a replica on the node, nor is one to come there. Whoever removes a node relies on it: what it holds
/// is not read again.
fn check_unused(node: NodeId, state: &dyn StateView) -> Result<(), Stop> {
    let shards: Vec<ShardRecord> = records::all(state)?;
    let holds = |shard: &&ShardRecord| !shard.dropped && shard.ordered().any(|member| member.node == node);
    let held: Vec<ShardId> = shards.iter().filter(holds).map(|shard| shard.id).collect();
    let Ok(total @ 1..) = u32::try_from(held.len()) else {
        return Ok(());
    };
    let shards = held.into_iter().take(fixed::SHARDS_NAMED).collect();
    Err(Stop::Refused(MetaRefusal::NodeInUse { node, shards, total }))
}

/// New replicas may be placed on the node.
pub(super) fn check_takes_replicas(node: NodeId, state: &dyn StateView) -> Result<(), Stop> {
    match records::load::<NodeRecord>(state, node.0)? {
        Some(record) if record.standing.takes_replicas() => Ok(()),
        Some(record) => {
            let standing = match record.standing {
                Standing::Member => "a member",
                Standing::Pending => "waiting to be accepted",
                Standing::Draining => "being drained",
                Standing::Leaving => "leaving",
                Standing::Removed => "removed",
            };
            not_allowed(format!("node {node} is {standing}: it gets no new replicas"))
        }
        None => Err(Stop::Refused(MetaRefusal::UnknownNode(node))),
    }
}
