//! What holds of every cluster map that the machine makes, whatever commands it was given. For tests and the
//! simulator: the machine itself checks commands, not maps.

use std::collections::{BTreeMap, BTreeSet};

use super::fixed;
use crate::ids::{ClusterId, METADATA_SHARD, NodeId, ReplicaId, ShardId};
use crate::placement::map::{
    ClusterMap, DatabaseRecord, MemberRole, MoveCause, RebalanceState, ShardRecord, ShardTarget, Standing,
};
use crate::placement::ring;

/// Checks one map:
///
/// - *replicas*: an id is of one replica of one shard; no shard has, or is to get, two on one node;
/// - *quorums*: in each configuration of each shard somebody votes;
/// - *nodes*: living shards have replicas only on nodes that are members, removed ones excluded; a pending
///   node has none; a store is one node;
/// - *databases*: a name is of one living database, whose shards cover the ring; a shard is of one database,
///   and dropped with it, when nothing moves it any more;
/// - *rebalancing*: targets are of the last plan, and there are none but of moves under way when it is over;
/// - *versions*: nothing changed after the map's own version, and a move began with a change.
///
/// The empty map, of a cluster that isn't formed, holds too. Errors: the first thing that is wrong.
pub fn check_map(map: &ClusterMap) -> Result<(), String> {
    if map.cluster_id == ClusterId::default() {
        return if *map == ClusterMap::default() { Ok(()) } else { Err("a map without a cluster".into()) };
    }
    let keys = (map.nodes.iter().all(|(id, node)| *id == node.id))
        && map.databases.iter().all(|(id, database)| *id == database.id)
        && map.shards.iter().all(|(id, shard)| *id == shard.id);
    if !keys {
        return Err("a record has another id than it goes by".into());
    }
    let nodes = map.nodes.values().map(|node| node.changed_at);
    let databases = map.databases.values().map(|database| database.changed_at);
    let shards = map.shards.values().map(|shard| shard.changed_at);
    let single = [map.policy.changed_at, map.rebalance.changed_at];
    if nodes.chain(databases).chain(shards).chain(single).any(|changed_at| changed_at > map.version) {
        return Err(format!("a record changed after map version {}", map.version));
    }
    let stores: BTreeSet<_> = map.nodes.values().map(|node| node.store_id).collect();
    if stores.len() < map.nodes.len() {
        return Err("two nodes have one store".into());
    }
    let moves = map.policy.moves_at_a_time;
    if !(1..=fixed::MOVES_AT_A_TIME).contains(&moves) {
        return Err(format!("{moves} moves at a time"));
    }
    check_databases(map)?;
    let mut replicas = BTreeMap::new();
    for shard in map.shards.values() {
        for member in shard.ordered() {
            if let Some(other) = replicas.insert(member.replica, shard.id) {
                return Err(format!("replica {} is of shards {other} and {}", member.replica, shard.id));
            }
        }
        let checked = check_members(map, shard).and_then(|()| check_move(shard));
        let checked = checked.and_then(|()| check_target(map, shard));
        checked.map_err(|what| format!("shard {}: {what}", shard.id))?;
    }
    Ok(())
}

fn check_databases(map: &ClusterMap) -> Result<(), String> {
    let mut names = BTreeSet::new();
    let mut owned = BTreeSet::from([METADATA_SHARD]);
    for DatabaseRecord { id, name, replicas, shards, dropped, .. } in map.databases.values() {
        if !dropped && !names.insert(name) {
            return Err(format!("two databases are called `{name}`"));
        }
        if !(1..=fixed::REPLICAS).contains(replicas) {
            return Err(format!("database {id}: {replicas} replicas"));
        }
        let mut ranges = Vec::with_capacity(shards.len());
        for shard_id in shards {
            let Some(shard) = map.shards.get(shard_id).filter(|_| owned.insert(*shard_id)) else {
                return Err(format!("database `{name}`: shard {shard_id} is missing, or another's"));
            };
            if (shard.database, shard.dropped) != (*id, *dropped) {
                return Err(format!("database `{name}`: shard {shard_id} is not as the database is"));
            }
            ranges.push(shard.range);
        }
        if !ring::covers_ring(ranges) {
            return Err(format!("database `{name}`: its shards don't cover the ring"));
        }
    }
    match map.shards.keys().find(|id| !owned.contains(id)) {
        Some(id) => Err(format!("shard {id} is of no database")),
        None if !map.shards.contains_key(&METADATA_SHARD) => Err("there is no metadata shard".into()),
        None => Ok(()),
    }
}

fn check_members(map: &ClusterMap, shard: &ShardRecord) -> Result<(), String> {
    let mut nodes = BTreeSet::new();
    for member in shard.ordered() {
        if !nodes.insert(member.node) {
            return Err(format!("two replicas on node {}", member.node));
        }
        let standing = map.nodes.get(&member.node).map(|node| node.standing);
        let gone = matches!(standing, None | Some(Standing::Pending | Standing::Removed));
        if gone && !shard.dropped {
            return Err(format!("replica {} is on node {}: {standing:?}", member.replica, member.node));
        }
    }
    let outgoing = |role: MemberRole| matches!(role, MemberRole::Voter | MemberRole::Outgoing);
    let roles = || shard.members.iter().map(|member| member.role);
    if !roles().any(MemberRole::stays_voter) || !roles().any(outgoing) {
        return Err("nobody votes".into());
    }
    if shard.members.len() > fixed::MEMBERS || shard.epoch.conf == 0 {
        return Err(format!("{} members, conf version {}", shard.members.len(), shard.epoch.conf));
    }
    Ok(())
}

fn check_move(shard: &ShardRecord) -> Result<(), String> {
    let Some(moving) = &shard.moving else {
        return Ok(());
    };
    if shard.dropped {
        return Err("it moves, but is dropped".into());
    }
    if moving.id > shard.changed_at || moving.id == 0 {
        return Err(format!("its move {} began after its last change", moving.id));
    }
    if moving.adds.is_empty() && moving.removes.is_empty() {
        return Err("a move without a change".into());
    }
    if moving.adds.iter().any(|add| add.role != MemberRole::Learner || moving.removes.contains(&add.replica))
    {
        return Err("a replica comes as a voter, or comes and goes".into());
    }
    Ok(())
}

fn check_target(map: &ClusterMap, shard: &ShardRecord) -> Result<(), String> {
    if shard.dropped && (shard.target.is_some() || shard.previous.is_some()) {
        return Err("a plan has to do with it, but it is dropped".into());
    }
    for ShardTarget { plan, nodes } in shard.target.iter().chain(&shard.previous) {
        let distinct: BTreeSet<&NodeId> = nodes.iter().collect();
        if *plan != map.rebalance.plan || nodes.is_empty() || distinct.len() < nodes.len() {
            return Err(format!("plan {plan:016x} wants it, or found it, on {nodes:?}"));
        }
    }
    let state = map.rebalance.state;
    let goes_on = matches!(state, RebalanceState::Running | RebalanceState::Paused);
    let moves = shard.moving.as_ref().is_some_and(|moving| moving.cause == MoveCause::Rebalance);
    if shard.target.is_some() && !goes_on && !(moves && state != RebalanceState::Idle) {
        return Err(format!("it has a target, but the rebalancing is {state:?}"));
    }
    Ok(())
}

/// Checks two maps of one cluster, one later than the other: versions only grow, conf versions too, members
/// stay as they are while theirs does, a replica stays where it is, nothing is forgotten, and what was
/// removed or dropped never comes back. Errors: the first thing that is wrong.
pub fn check_change(before: &ClusterMap, after: &ClusterMap) -> Result<(), String> {
    if before.cluster_id == ClusterId::default() {
        return Ok(());
    }
    if before.cluster_id != after.cluster_id || before.version > after.version {
        return Err(format!("from map version {} to {}", before.version, after.version));
    }
    for (id, node) in &before.nodes {
        let Some(now) = after.nodes.get(id) else {
            return Err(format!("node {id} is forgotten"));
        };
        let removed = node.standing == Standing::Removed && now.standing != Standing::Removed;
        if removed || now.store_id != node.store_id {
            return Err(format!("node {id} was removed, and is back, or has another store"));
        }
    }
    for (id, database) in &before.databases {
        if after.databases.get(id).is_none_or(|now| database.dropped && !now.dropped) {
            return Err(format!("database {id} is forgotten, or back"));
        }
    }
    let mut replicas: BTreeMap<ReplicaId, (ShardId, NodeId)> = BTreeMap::new();
    for (id, shard) in &before.shards {
        let Some(now) = after.shards.get(id).filter(|now| now.dropped || !shard.dropped) else {
            return Err(format!("shard {id} is forgotten, or back"));
        };
        if now.epoch.conf < shard.epoch.conf || now.epoch.range < shard.epoch.range {
            return Err(format!("shard {id}: from {:?} back to {:?}", shard.epoch, now.epoch));
        }
        let roles = |shard: &ShardRecord| {
            let members = shard.members.iter().map(|m| (m.replica, (m.node, m.role)));
            members.collect::<BTreeMap<_, _>>()
        };
        if now.epoch.conf == shard.epoch.conf && roles(now) != roles(shard) {
            return Err(format!("shard {id}: other members of conf version {}", now.epoch.conf));
        }
        replicas.extend(shard.ordered().map(|member| (member.replica, (*id, member.node))));
    }
    for (id, shard) in &after.shards {
        for member in shard.ordered() {
            let place = (*id, member.node);
            if let Some(was) = replicas.get(&member.replica).filter(|was| **was != place) {
                return Err(format!("replica {}: of {was:?}, now of {place:?}", member.replica));
            }
        }
    }
    Ok(())
}
