//! Plans for even load: which replicas and leaders should be elsewhere.
//!
//! This is bounded-load rendezvous hashing with memory: what is where it may be stays there. A plan is made in
//! steps:
//!
//! 1. *Shares.* Each node has a share of all replicas, by its weight, but no more than one of each shard, and a
//!    failure domain no more than the least possible number of each (see [`super::plan`]); what that leaves
//!    over is shared by the others. A node is even if it has its share, rounded down or up.
//! 2. *Quotas.* Between those two numbers each node keeps what it has. Only what lies outside must move, so the
//!    sum of that is the least number of moves there can be.
//! 3. *Replicas.* First those leave that crowd a failure domain. Then nodes with too many give to nodes with too
//!    few: of all moves that help, that one is next by which the shard comes nearest to where hashing alone
//!    would have it. Where no single move helps any more, a chain of them does.
//! 4. *Leaders.* A leader whose replica stays goes on leading; then leaderships go, directly or along chains of
//!    shards, from nodes that lead more than their quota to such as lead less.
//!
//! A map without anything outside its bounds plans nothing, and what a plan arrives at is such a map. Nothing
//! depends on a clock, on chance or on the machine. Shards whose members are changing stay as that change
//! leaves them. The metadata shard stays where it is unless it crowds a failure domain: its members follow
//! other rules.

use std::collections::{BTreeMap, BTreeSet};

use xxhash_rust::xxh3::xxh3_64;

use super::loads::settled;
use super::map::{ClusterMap, RebalanceState, Standing};
use crate::ids::{NodeId, ShardId};
use crate::limits;
use board::Board;

mod board;
mod leaders;
mod replicas;
mod shares;
#[cfg(test)]
mod tests;

/// What is known of the shards beside the map. What isn't known is taken for ordinary.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Known {
    /// Who leads. A shard that isn't here is taken to be led by its first voter.
    pub leaders: BTreeMap<ShardId, NodeId>,
    /// Keys and bytes.
    pub sizes: BTreeMap<ShardId, ShardSize>,
    /// Nodes that can't get anything now: gone, or their disk is full. What they hold stays where it is; those that
    /// hold nothing have no share, and their failure domains no part, until they are fit again.
    pub unfit: BTreeSet<NodeId>,
    /// Nodes that won't answer again, for another runs at their address by now: what they hold goes.
    pub taken_over: BTreeSet<NodeId>,
    /// Shards whose members are to change for another reason first: their replicas stay where they are.
    pub fixed: BTreeSet<ShardId>,
}

/// How much one replica of a shard holds; estimates.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ShardSize {
    /// Keys.
    pub keys: u64,
    /// Bytes of keys and values.
    pub bytes: u64,
}

/// What moves.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum MoveKind {
    /// A replica, with its data.
    Replica,
    /// Leadership alone.
    Leader,
}

/// One move of a plan.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PlannedMove {
    /// The shard.
    pub shard: ShardId,
    /// Who gives.
    pub from: NodeId,
    /// Who gets.
    pub to: NodeId,
    /// What.
    pub kind: MoveKind,
    /// Keys that are copied: none with leadership.
    pub keys: u64,
    /// Bytes that are copied: none with leadership.
    pub bytes: u64,
}

/// Where a rebalancing wants a shard.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PlannedTarget {
    /// The shard.
    pub shard: ShardId,
    /// The conf version that the planner knew.
    pub conf: u64,
    /// Nodes of its voters, the one that should lead first.
    pub nodes: Vec<NodeId>,
}

/// Sums over the moves of replicas; leadership costs nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Totals {
    /// Replicas.
    pub moves: u32,
    /// Their keys.
    pub keys: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// A plan for even load. Without targets there is nothing to do.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Plan {
    /// Names it: a hash of the targets, above 0. Odd if and only if the plan takes back an earlier one.
    pub id: u64,
    /// The map that it was made for.
    pub map_version: u64,
    /// Its moves, those of replicas first.
    pub moves: Vec<PlannedMove>,
    /// The shards that are to be elsewhere, or to be led elsewhere.
    pub targets: Vec<PlannedTarget>,
    /// Sums.
    pub total: Totals,
    /// The fewest moves of replicas that any plan which achieves the same could do with.
    pub minimum: u32,
    /// Shards that should be elsewhere too, and are left for the plan after this one.
    pub left: u32,
}

/// Why the last rebalancing can't be taken back.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum UndoError {
    /// No shard remembers where it was.
    #[error("there is no rebalancing to take back")]
    Nothing,
    /// The rebalancing hasn't ended.
    #[error("the rebalancing is still under way: cancel it first")]
    UnderWay,
    /// A node that would get replicas back can't take any.
    #[error("node {node}, which held shard {shard}, {why}")]
    NodeUnfit {
        /// The node.
        node: NodeId,
        /// A shard that it held.
        shard: ShardId,
        /// What is with it.
        why: &'static str,
    },
    /// A shard has another number of replicas by now.
    #[error("shard {shard} had {then} replicas and should have {now} now")]
    OtherCount {
        /// The shard.
        shard: ShardId,
        /// Replicas it had.
        then: usize,
        /// Replicas it should have.
        now: usize,
    },
    /// The members of a shard are changing.
    #[error("the members of shard {0} are changing")]
    Moving(ShardId),
}

impl Plan {
    /// The plan for the first `most` shards alone; those whose replicas move come first.
    fn cut(mut self, most: usize) -> Plan {
        if self.targets.len() <= most {
            return self;
        }
        let moved: BTreeSet<ShardId> =
            self.moves.iter().filter(|m| m.kind == MoveKind::Replica).map(|m| m.shard).collect();
        self.targets.sort_by_key(|target| (!moved.contains(&target.shard), target.shard));
        self.left = u32::try_from(self.targets.len() - most).unwrap_or(u32::MAX);
        self.targets.truncate(most);
        self.targets.sort_by_key(|target| target.shard);
        let kept: BTreeSet<ShardId> = self.targets.iter().map(|target| target.shard).collect();
        self.moves.retain(|planned| kept.contains(&planned.shard));
        self.total = Totals::default();
        for planned in self.moves.iter().filter(|m| m.kind == MoveKind::Replica) {
            self.total.moves += 1;
            self.total.keys = self.total.keys.saturating_add(planned.keys);
            self.total.bytes = self.total.bytes.saturating_add(planned.bytes);
        }
        self.minimum = self.minimum.min(self.total.moves);
        self.id = name(&self.targets, self.id % 2 == 1);
        self
    }
}

/// Plans for even load: of leaders alone, or of replicas too; for as many shards as one command can name
/// ([`limits::REBALANCE_TARGETS_MAX`]). What is left then is planned when that is done.
pub fn plan_rebalance(map: &ClusterMap, known: &Known, leaders_only: bool) -> Plan {
    plan_whole(map, known, leaders_only).cut(limits::REBALANCE_TARGETS_MAX)
}

/// Plans for even load, for however many shards.
pub fn plan_whole(map: &ClusterMap, known: &Known, leaders_only: bool) -> Plan {
    let mut board = Board::new(map, known);
    let mut minimum = 0;
    if !leaders_only {
        minimum = replicas::spread(&mut board);
    }
    leaders::spread(&mut board);
    to_plan(map, known, &board, minimum, false)
}

/// Whether some node has more, or less, than its share by more than 15 % and more than one: of replicas, or of
/// leaders; or whether a shard crowds a failure domain that has room to spare elsewhere.
pub fn is_uneven(map: &ClusterMap, known: &Known, leaders_only: bool) -> bool {
    let board = Board::new(map, known);
    match leaders_only {
        true => leaders::is_uneven(&board),
        false => replicas::is_uneven(&board),
    }
}

/// Plans the way back to where the shards were before the last rebalancing.
pub fn plan_undo(map: &ClusterMap, known: &Known) -> Result<Plan, UndoError> {
    if !matches!(map.rebalance.state, RebalanceState::Idle | RebalanceState::Failed) {
        return Err(UndoError::UnderWay);
    }
    let mut board = Board::new(map, known);
    let mut any = false;
    for shard in map.shards.values().filter(|shard| !shard.dropped) {
        let Some(previous) = &shard.previous else { continue };
        if previous.plan != map.rebalance.plan {
            continue;
        }
        any = true;
        if shard.moving.is_some() {
            return Err(UndoError::Moving(shard.id));
        }
        let present: Vec<NodeId> = settled(shard).map(|member| member.node).collect();
        if previous.nodes.len() != present.len() {
            let (then, now) = (previous.nodes.len(), present.len());
            return Err(UndoError::OtherCount { shard: shard.id, then, now });
        }
        for &node in previous.nodes.iter().filter(|node| !present.contains(node)) {
            if let Some(why) = no_taker(map, known, node) {
                return Err(UndoError::NodeUnfit { node, shard: shard.id, why });
            }
        }
        board.place(shard.id, &previous.nodes);
    }
    if !any {
        return Err(UndoError::Nothing);
    }
    let mut plan = to_plan(map, known, &board, 0, true);
    plan.minimum = plan.total.moves;
    Ok(plan)
}

fn no_taker(map: &ClusterMap, known: &Known, node: NodeId) -> Option<&'static str> {
    let Some(record) = map.nodes.get(&node) else { return Some("is not in the map") };
    match record.standing {
        Standing::Member if record.weight == 0 => Some("takes no replicas: its weight is 0"),
        Standing::Member if known.unfit.contains(&node) => Some("doesn't answer, or its disk is full"),
        Standing::Member => None,
        Standing::Pending => Some("is no member yet"),
        Standing::Draining => Some("is being emptied"),
        Standing::Leaving | Standing::Removed => Some("was removed"),
    }
}

/// What the board has come to, as a plan.
fn to_plan(map: &ClusterMap, known: &Known, board: &Board, minimum: u32, takes_back: bool) -> Plan {
    let mut plan = Plan { map_version: map.version, ..Plan::default() };
    let mut handovers = Vec::new();
    for shard in &board.shards {
        let leads = (shard.leader != shard.led_by).then_some((shard.led_by, shard.leader));
        let comes = || shard.nodes.iter().filter(|node| !shard.before.contains(node));
        let goes = shard.before.iter().filter(|node| !shard.nodes.contains(node));
        if leads.is_none() && comes().next().is_none() {
            continue;
        }
        let id = |at: usize| board.nodes[at].id;
        let size = known.sizes.get(&shard.id).copied().unwrap_or_default();
        for (from, to) in goes.zip(comes()) {
            plan.moves.push(PlannedMove {
                shard: shard.id,
                from: id(*from),
                to: id(*to),
                kind: MoveKind::Replica,
                keys: size.keys,
                bytes: size.bytes,
            });
            plan.total.moves += 1;
            plan.total.keys = plan.total.keys.saturating_add(size.keys);
            plan.total.bytes = plan.total.bytes.saturating_add(size.bytes);
        }
        if let Some((from, to)) = leads {
            let (shard, from, to, kind) = (shard.id, id(from), id(to), MoveKind::Leader);
            handovers.push(PlannedMove { shard, from, to, kind, keys: 0, bytes: 0 });
        }
        let others = shard.nodes.iter().filter(|node| **node != shard.leader);
        let nodes = std::iter::once(&shard.leader).chain(others).map(|at| id(*at)).collect();
        plan.targets.push(PlannedTarget { shard: shard.id, conf: shard.conf, nodes });
    }
    plan.moves.append(&mut handovers);
    // Where not all can come to their quotas, less is achieved, by fewer moves.
    plan.minimum = minimum.min(plan.total.moves);
    if !plan.targets.is_empty() {
        plan.id = name(&plan.targets, takes_back);
    }
    plan
}

/// Equal plans have equal names.
fn name(targets: &[PlannedTarget], takes_back: bool) -> u64 {
    let mut bytes = Vec::new();
    for target in targets {
        bytes.extend(target.shard.0.to_be_bytes());
        bytes.extend(target.conf.to_be_bytes());
        bytes.extend((target.nodes.len() as u64).to_be_bytes());
        target.nodes.iter().for_each(|node| bytes.extend(node.0.to_be_bytes()));
    }
    (xxh3_64(&bytes) & !1).max(2) | u64::from(takes_back)
}
