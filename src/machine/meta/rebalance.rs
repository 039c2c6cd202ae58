//! Rebalancing: shards get targets, and lose them as they arrive.
//!
//! ```text
//!                        ┌──────────┐ pause  ┌────────┐
//!   begin: Idle, Failed ►│ Running  ├───────►│ Paused │
//!                        │          │◄───────┤        │
//!                        └──┬───────┘ resume └───┬────┘
//!                           ├──► Cancelling ◄────┤
//!                           ▼         ▼          ▼
//!                        Idle, once no shard has a target; Failed at any time
//! ```
//!
//! A target is kept until the shard's members are where it wants them, and given up by whoever cancels. In
//! states other than Running and Paused only shards with a move under way have one still.

use std::collections::BTreeSet;

use super::{Known, Stop, fixed, formed, nodes, not_allowed, records, stale};
use crate::ids::NodeId;
use crate::machine::command::{MetaReply, PlannedTarget};
use crate::placement::map::{MoveCause, RebalanceRecord, RebalanceState, ShardRecord, ShardTarget};
use crate::storage::{StateBatch, StateView};

/// What an order of operators is about, in words.
const THE_REBALANCING: &str = "the rebalancing";

/// Begins a rebalancing. Whoever repeats the command finds it under way; one that takes another back, also when
/// it has ended.
pub(super) fn begin(
    plan: u64,
    undoes: u64,
    targets: &[PlannedTarget],
    moves: u32,
    bytes: u64,
    known: Known,
    state: &mut dyn StateBatch,
) -> Result<MetaReply, Stop> {
    formed(state)?;
    let last: RebalanceRecord = records::load_single(state)?;
    let under_way = !matches!(last.state, RebalanceState::Idle | RebalanceState::Failed);
    let undone = undoes != 0 && last.undoes == undoes && last.reason.is_empty();
    if last.plan == plan && (under_way || undone) {
        return Ok(MetaReply::Done(state.revision()));
    }
    known.check(|| THE_REBALANCING.into(), last.changed_at)?;
    if undoes != 0 && last.plan != undoes {
        return stale("the rebalancing to take back");
    }
    if plan == 0 || targets.len() > fixed::TARGETS {
        let most = fixed::TARGETS;
        return not_allowed(format!("plan {plan} of {} shards; there can be {most}", targets.len()));
    }
    let shards: Vec<ShardRecord> = records::all(state)?;
    if under_way && shards.iter().any(|shard| shard.target.is_some()) {
        return not_allowed(format!("the rebalancing by plan {:016x} is under way", last.plan));
    }
    let placed = place(plan, targets, &shards, state)?;

    let changed_at = state.next_revision();
    for (mut shard, placed) in shards.into_iter().zip(placed) {
        let before = shard.clone();
        // What older plans have left.
        shard.target = None;
        shard.previous = None;
        if let Some(nodes) = placed {
            shard.previous = Some(ShardTarget { plan, nodes: voters(&shard) });
            shard.target = Some(ShardTarget { plan, nodes });
            arrive(&mut shard);
        }
        if shard != before {
            records::save(&ShardRecord { changed_at, ..shard }, state);
        }
    }
    let record = RebalanceRecord {
        plan,
        state: RebalanceState::Running,
        moves,
        bytes,
        reason: String::new(),
        undoes,
        changed_at,
    };
    records::save_single(&record, state);
    Ok(MetaReply::Done(changed_at))
}

/// Where the plan wants each of `shards`, if anywhere; checked.
fn place(
    plan: u64,
    targets: &[PlannedTarget],
    shards: &[ShardRecord],
    state: &dyn StateView,
) -> Result<Vec<Option<Vec<NodeId>>>, Stop> {
    let mut placed = vec![None; shards.len()];
    let mut taking = BTreeSet::new();
    for target in targets {
        let id = target.shard;
        let found = shards.binary_search_by_key(&id, |shard| shard.id).ok();
        let Some((at, shard)) = found.map(|at| (at, &shards[at])) else {
            return not_allowed(format!("there is no shard {id}"));
        };
        if shard.dropped || shard.epoch.conf != target.conf {
            return stale(format!("shard {id}"));
        }
        let nodes: BTreeSet<_> = target.nodes.iter().copied().collect();
        let many = !(1..=fixed::REPLICAS as usize).contains(&target.nodes.len());
        if many || nodes.len() < target.nodes.len() || placed[at].is_some() {
            let list: Vec<_> = target.nodes.iter().map(NodeId::to_string).collect();
            return not_allowed(format!("plan {plan:016x} wants shard {id} on nodes {}", list.join(", ")));
        }
        for node in nodes.into_iter().filter(|node| shard.member_on(*node).is_none()) {
            if taking.insert(node) {
                nodes::check_takes_replicas(node, state)?;
            }
        }
        placed[at] = Some(target.nodes.clone());
    }
    Ok(placed)
}

/// Changes the state of the last rebalancing.
pub(super) fn control(
    plan: u64,
    wanted: RebalanceState,
    reason: &str,
    known: Known,
    state: &mut dyn StateBatch,
) -> Result<MetaReply, Stop> {
    use RebalanceState::{Cancelling, Failed, Idle, Paused, Running};
    formed(state)?;
    let last: RebalanceRecord = records::load_single(state)?;
    if last.plan != plan || plan == 0 {
        return stale("the rebalancing");
    }
    if last.state == wanted {
        return Ok(MetaReply::Done(state.revision()));
    }
    known.check(|| THE_REBALANCING.into(), last.changed_at)?;
    match (last.state, wanted) {
        (Idle | Failed, _) => return not_allowed("the rebalancing has ended"),
        (Cancelling, Running | Paused) => return not_allowed("the rebalancing is being cancelled"),
        (Running | Paused, Running | Paused) | (_, Cancelling | Failed | Idle) => {}
    }
    let mut shards: Vec<ShardRecord> = Vec::new();
    if !matches!(wanted, Running | Paused) {
        shards = records::all(state)?;
        shards.retain(|shard| shard.target.is_some());
    }
    if let (Idle, Some(shard)) = (wanted, shards.first()) {
        return not_allowed(format!(
            "{} shards are not where the plan wants them, shard {} among them",
            shards.len(),
            shard.id
        ));
    }
    let changed_at = state.next_revision();
    for mut shard in shards {
        match shard.moving.as_mut().filter(|moving| moving.cause == MoveCause::Rebalance) {
            // What is under way comes to its end.
            Some(moving) if moving.cancelling || wanted == Failed => continue,
            Some(moving) => moving.cancelling = true,
            None => give_up(&mut shard),
        }
        records::save(&ShardRecord { changed_at, ..shard }, state);
    }
    let reason = match wanted {
        Cancelling | Failed => reason[..reason.floor_char_boundary(fixed::REASON_BYTES)].to_owned(),
        Running | Paused => String::new(),
        // Why it was cancelled, if it was.
        Idle => last.reason.clone(),
    };
    let record = RebalanceRecord { state: wanted, reason, changed_at, ..last };
    records::save_single(&record, state);
    Ok(MetaReply::Done(changed_at))
}

/// After a change of members: takes the target away from a shard that has arrived, or whose rebalancing is over.
pub(super) fn settle(shard: &mut ShardRecord, last: &RebalanceRecord) {
    arrive(shard);
    let goes_on = matches!(last.state, RebalanceState::Running | RebalanceState::Paused);
    if shard.target.as_ref().is_some_and(|target| !goes_on || target.plan != last.plan) {
        give_up(shard);
    }
}

/// Takes the target away if the members are where it wants them, and puts them in its order: the first
/// should lead.
fn arrive(shard: &mut ShardRecord) {
    let Some(target) = shard.target.take() else {
        return;
    };
    let there = same_nodes(&voters(shard), &target.nodes) && shard.members.len() == target.nodes.len();
    if there && shard.moving.is_none() {
        let place = |node: NodeId| target.nodes.iter().position(|wanted| *wanted == node);
        shard.members.sort_by_key(|member| place(member.node));
    } else {
        shard.target = Some(target);
    }
}

/// Takes the target away. A shard that is where it was before has nothing to go back to.
fn give_up(shard: &mut ShardRecord) {
    shard.target = None;
    let voters = voters(shard);
    shard.previous.take_if(|previous| same_nodes(&previous.nodes, &voters));
}

/// Nodes of the voters, those of a joint change that stay.
fn voters(shard: &ShardRecord) -> Vec<NodeId> {
    shard.members.iter().filter(|member| member.role.stays_voter()).map(|member| member.node).collect()
}

fn same_nodes(some: &[NodeId], others: &[NodeId]) -> bool {
    some.len() == others.len() && some.iter().all(|node| others.contains(node))
}
