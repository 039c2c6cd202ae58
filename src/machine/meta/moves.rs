//! Moves: how the members of a shard change, as far as the map has to do with it.
//!
//! ```text
//!              begin                        the shard, in steps                     end
//!   at rest ──────────► adds get their ids ─────────────────────► adds are voters ──────► at rest
//!      ▲                and may be created    observe, observe …  removes are gone
//!      │                        │ cancel
//!      │           end          ▼
//!      └──────── no add is a member: before the joint change the adds go again, after it the move ends
//! ```
//!
//! The map says what is wanted; what is, says the shard, and the map only follows: by conf version, so that
//! reports may come late, twice, and in any order. A move is begun for the conf version that its proposer
//! knew, and there is one at a time, so two proposers can't work on a shard at cross purposes. It is ended by
//! what the shard has said, never by what somebody meant to do.

use std::collections::BTreeSet;

use super::records::{self, Counters};
use super::{Stop, fixed, formed, nodes, not_allowed, rebalance, stale};
use crate::ids::{Epoch, METADATA_SHARD, NodeId, ReplicaId, ShardId, generation_of, generation_start};
use crate::machine::command::MetaReply;
use crate::placement::map::{
    DatabaseRecord, Member, MemberRole, MoveCause, NodeRecord, PolicyRecord, RebalanceRecord, RebalanceState,
    ShardMove, ShardRecord, Standing,
};
use crate::storage::{StateBatch, StateView};

/// Takes over what a shard says of its members, if it is news.
pub(super) fn observe(
    shard: ShardId,
    conf: u64,
    members: &[Member],
    state: &mut dyn StateBatch,
) -> Result<MetaReply, Stop> {
    let counters = formed(state)?;
    let record = load(shard, state)?;
    // Never back, whoever says so: a report may have been on its way for long.
    if record.dropped || conf <= record.epoch.conf {
        return Ok(MetaReply::Done(state.revision()));
    }
    check_members(members)?;
    for member in members {
        if !record.ordered().any(|known| (known.replica, known.node) == (member.replica, member.node)) {
            check_stranger(shard, member, &counters, state)?;
        }
    }
    let changed_at = state.next_revision();
    let members = arrange(&record, members);
    let epoch = Epoch { conf, ..record.epoch };
    let mut record = ShardRecord { members, epoch, changed_at, ..record };
    if record.moving.is_none() && record.target.is_some() && !is_joint(&record) {
        // It may have come to its target by no move of the map's.
        rebalance::settle(&mut record, &records::load_single(state)?);
    }
    records::save(&record, state);
    Ok(MetaReply::Done(changed_at))
}

/// What every group's members keep to.
fn check_members(members: &[Member]) -> Result<(), Stop> {
    let replicas: BTreeSet<_> = members.iter().map(|member| member.replica).collect();
    let nodes: BTreeSet<_> = members.iter().map(|member| member.node).collect();
    if replicas.len() < members.len() || nodes.len() < members.len() {
        return not_allowed("a member is listed twice, or two of them are on one node");
    }
    if members.len() > fixed::MEMBERS {
        let most = fixed::MEMBERS;
        return not_allowed(format!("{} members; there can be {most}", members.len()));
    }
    let outgoing = |member: &Member| matches!(member.role, MemberRole::Voter | MemberRole::Outgoing);
    if !members.iter().any(|member| member.role.stays_voter()) || !members.iter().any(outgoing) {
        return not_allowed("one of the configurations has no voter");
    }
    Ok(())
}

/// A member that the map hasn't placed there. It may be so after a move was rolled back, if an order of a
/// leader since deposed came through all the same. The shard is the truth, so the map follows, as long as the
/// replica can be none of another shard's.
fn check_stranger(
    shard: ShardId,
    member: &Member,
    counters: &Counters,
    state: &dyn StateView,
) -> Result<(), Stop> {
    let Member { replica, node, .. } = *member;
    if replica.0 >= counters.next_replica {
        return not_allowed(format!(
            "replica {replica} of shard {shard}: there never was a replica of that id"
        ));
    }
    match records::load::<NodeRecord>(state, node.0)? {
        Some(record) if !matches!(record.standing, Standing::Pending | Standing::Removed) => {}
        _ => return not_allowed(format!("replica {replica} of shard {shard}: node {node} is no member")),
    }
    let shards: Vec<ShardRecord> = records::all(state)?;
    match shards.iter().find(|other| other.ordered().any(|known| known.replica == replica)) {
        None => Ok(()),
        Some(other) => not_allowed(format!(
            "replica {replica} on node {node} can't be of shard {shard}: it is of shard {}",
            other.id
        )),
    }
}

/// The members in the order of the record: the first is preferred as leader. Who comes for a replica that goes
/// takes its place; who comes besides is last.
fn arrange(record: &ShardRecord, members: &[Member]) -> Vec<Member> {
    let now = |replica: ReplicaId| members.iter().find(|member| member.replica == replica);
    let successor = |gone: ReplicaId| {
        let moving = record.moving.as_ref()?;
        let at = moving.removes.iter().position(|replica| *replica == gone)?;
        now(moving.adds.get(at)?.replica)
    };
    let kept =
        record.members.iter().filter_map(|member| now(member.replica).or_else(|| successor(member.replica)));
    let mut arranged: Vec<Member> = Vec::with_capacity(members.len());
    for member in kept.chain(members) {
        if arranged.iter().all(|placed| placed.replica != member.replica) {
            arranged.push(*member);
        }
    }
    arranged
}

/// Begins to change the members of a shard: gives the replicas that come their ids.
pub(super) fn begin(
    shard: ShardId,
    conf: u64,
    adds: &[NodeId],
    removes: &[ReplicaId],
    cause: MoveCause,
    state: &mut dyn StateBatch,
) -> Result<MetaReply, Stop> {
    let mut counters = formed(state)?;
    let record = load(shard, state)?;
    if record.dropped || record.moving.is_some() || record.epoch.conf != conf {
        return stale(format!("shard {shard}"));
    }
    if cause == MoveCause::Rebalance {
        // Whoever pauses or cancels a rebalancing may rely on it that no more of its moves begin.
        let last: RebalanceRecord = records::load_single(state)?;
        let wanted = record.target.as_ref().is_some_and(|target| target.plan == last.plan);
        if !wanted || last.state != RebalanceState::Running {
            return stale("the rebalancing");
        }
    }
    check_move(&record, adds, removes, state)?;
    let id = state.next_revision();
    let replicas = (counters.next_replica..).map(ReplicaId);
    let role = MemberRole::Learner;
    let adds: Vec<_> =
        replicas.zip(adds).map(|(replica, node)| Member { replica, node: *node, role }).collect();
    counters.next_replica += adds.len() as u64;
    let moving = ShardMove { id, adds, removes: removes.to_vec(), cancelling: false, cause };
    records::save(&ShardRecord { moving: Some(moving), changed_at: id, ..record }, state);
    records::save_counters(&counters, id, state);
    Ok(MetaReply::Done(id))
}

fn check_move(
    record: &ShardRecord,
    adds: &[NodeId],
    removes: &[ReplicaId],
    state: &dyn StateView,
) -> Result<(), Stop> {
    let shard = record.id;
    if adds.is_empty() && removes.is_empty() {
        return not_allowed(format!("shard {shard}: a move without a change"));
    }
    if adds.len() > fixed::REPLICAS as usize || removes.len() > fixed::MEMBERS {
        return not_allowed(format!("shard {shard}: a move of too many replicas"));
    }
    if is_joint(record) {
        return not_allowed(format!("shard {shard} is in a joint change still"));
    }
    for (at, node) in adds.iter().enumerate() {
        nodes::check_takes_replicas(*node, state)?;
        if adds[..at].contains(node) || record.ordered().any(|member| member.node == *node) {
            return not_allowed(format!("shard {shard} would have two replicas on node {node}"));
        }
    }
    for (at, replica) in removes.iter().enumerate() {
        if removes[..at].contains(replica) || record.node_of(*replica).is_none() {
            return not_allowed(format!("shard {shard} has no replica {replica} that could go"));
        }
    }
    let stays = |member: &&Member| member.role.stays_voter() && !removes.contains(&member.replica);
    let voters = record.members.iter().filter(stays).count() + adds.len();
    if !(1..=fixed::REPLICAS as usize).contains(&voters) {
        let most = fixed::REPLICAS;
        return not_allowed(format!("shard {shard} would have {voters} voters; there can be 1 to {most}"));
    }
    Ok(())
}

/// Has a move rolled back.
pub(super) fn cancel(shard: ShardId, id: u64, state: &mut dyn StateBatch) -> Result<MetaReply, Stop> {
    formed(state)?;
    let mut record = load(shard, state)?;
    let Some(moving) = record.moving.as_mut().filter(|moving| moving.id == id) else {
        return stale(format!("the move of shard {shard}"));
    };
    if moving.cancelling {
        return Ok(MetaReply::Done(state.revision()));
    }
    moving.cancelling = true;
    record.changed_at = state.next_revision();
    records::save(&record, state);
    Ok(MetaReply::Done(record.changed_at))
}

/// Ends a move that is done, or rolled back.
pub(super) fn end(shard: ShardId, id: u64, state: &mut dyn StateBatch) -> Result<MetaReply, Stop> {
    formed(state)?;
    let mut record = load(shard, state)?;
    // Their ids only grow: one that isn't the present one has ended, unless there never was any such.
    let ended = record.moving.as_ref().is_none_or(|moving| id < moving.id) && id <= state.revision();
    if ended {
        return Ok(MetaReply::Done(state.revision()));
    }
    let Some(moving) = record.moving.as_ref().filter(|moving| moving.id == id) else {
        return stale(format!("the move of shard {shard}"));
    };
    let role = |replica: ReplicaId| record.members.iter().find(|m| m.replica == replica).map(|m| m.role);
    let done = moving.adds.iter().all(|add| role(add.replica) == Some(MemberRole::Voter))
        && moving.removes.iter().all(|replica| role(*replica).is_none());
    let undone = moving.cancelling && moving.adds.iter().all(|add| role(add.replica).is_none());
    if is_joint(&record) || !(done || undone) {
        return not_allowed(format!(
            "the move of shard {shard} is not at its end, as far as the shard has said"
        ));
    }
    record.moving = None;
    let last: RebalanceRecord = records::load_single(state)?;
    rebalance::settle(&mut record, &last);
    record.changed_at = state.next_revision();
    records::save(&record, state);
    Ok(MetaReply::Done(record.changed_at))
}

/// Makes one replica the only member of a shard. Whoever proposes it has seen to it that the others are gone
/// for good.
///
/// The metadata shard's own is not proposed: the replica that goes on alone has it in its log, behind all that it
/// had before.
pub(super) fn recover(
    shard: ShardId,
    keep: ReplicaId,
    conf: u64,
    state: &mut dyn StateBatch,
) -> Result<MetaReply, Stop> {
    let counters = formed(state)?;
    let mut record = load(shard, state)?;
    if shard == METADATA_SHARD && generation_of(conf) > generation_of(state.revision()) {
        return begin_generation(record, keep, conf, counters, state);
    }
    if record.dropped {
        return stale(format!("shard {shard}"));
    }
    let Some(member) = record.members.iter().find(|member| member.replica == keep) else {
        return not_allowed(format!("shard {shard} has no replica {keep} that could go on alone"));
    };
    let alone = vec![Member { role: MemberRole::Voter, ..*member }];
    if record.epoch.conf == conf && record.members == alone && record.moving.is_none() {
        return Ok(MetaReply::Done(state.revision()));
    }
    // No report of the others may count any more.
    if conf <= record.epoch.conf {
        return stale(format!("shard {shard}"));
    }
    record.members = alone;
    record.epoch.conf = conf;
    (record.moving, record.target, record.previous) = (None, None, None);
    record.changed_at = state.next_revision();
    records::save(&record, state);
    Ok(MetaReply::Done(record.changed_at))
}

/// The metadata shard goes on with what one replica had, and that may be less than what was told of the map: versions
/// may be lost, and ids that are in use. None of them is given out again. So the versions go on in the next
/// generation, and all ids behind any that can have been given out; and every record is of the new version, so
/// that it counts for more than what is known of it elsewhere.
fn begin_generation(
    mut metadata: ShardRecord,
    keep: ReplicaId,
    conf: u64,
    counters: Counters,
    state: &mut dyn StateBatch,
) -> Result<MetaReply, Stop> {
    // So that its first revision is the first number of the generation.
    state.raise_revision(generation_start(conf) - 1);
    let version = state.next_revision();
    // If the map doesn't know that replica yet, it follows what the shard itself says, as ever.
    let member = metadata.ordered().find(|member| member.replica == keep).copied();
    if let Some(member) = member
        && conf > metadata.epoch.conf
    {
        metadata.members = vec![Member { role: MemberRole::Voter, ..member }];
        metadata.epoch.conf = conf;
        (metadata.moving, metadata.target, metadata.previous) = (None, None, None);
        records::save(&metadata, state);
    }
    for record in records::all::<NodeRecord>(state)? {
        records::save(&NodeRecord { changed_at: version, ..record }, state);
    }
    for record in records::all::<DatabaseRecord>(state)? {
        let record = DatabaseRecord { changed_at: version, ..record };
        records::save(&record, state);
        if !record.dropped {
            records::save_name(&record, state);
        }
    }
    for record in records::all::<ShardRecord>(state)? {
        records::save(&ShardRecord { changed_at: version, ..record }, state);
    }
    let policy: PolicyRecord = records::load_single(state)?;
    records::save_single(&PolicyRecord { changed_at: version, ..policy }, state);
    let last: RebalanceRecord = records::load_single(state)?;
    records::save_single(&RebalanceRecord { changed_at: version, ..last }, state);
    records::save_counters(&counters.behind_all_given_out(), version, state);
    Ok(MetaReply::Done(version))
}

fn load(shard: ShardId, state: &dyn StateView) -> Result<ShardRecord, Stop> {
    match records::load(state, shard.0)? {
        Some(record) => Ok(record),
        None => not_allowed(format!("there is no shard {shard}")),
    }
}

fn is_joint(record: &ShardRecord) -> bool {
    let joint = |member: &Member| matches!(member.role, MemberRole::Incoming | MemberRole::Outgoing);
    record.members.iter().any(joint)
}
