//! Load and leaders spread anew when all is quiet, and the state of the rebalancing under way.
//!
//! A shard that nobody leads can't be moved, and how long that lasts nobody knows: it is left where it is, and what
//! else there is to spread doesn't wait for it. Moves add replicas, or exchange them with a majority of old and new
//! ones at hand, so they are no less safe while another shard is in need; what is in need itself comes before them.

use std::collections::{BTreeMap, BTreeSet};

use super::facts::Action;
use super::reconciler::Round;
use super::wants;
use crate::ids::{NodeId, ShardId};
use crate::limits;
use crate::machine::command::MetaCommand;
use crate::placement::map::{MemberRole, MoveCause, PolicyRecord, RebalanceState, ShardRecord, Standing};
use crate::placement::rebalance::{Known, MoveKind, is_uneven, plan_rebalance};

/// What a round leaves for the next.
#[derive(Default)]
pub(super) struct Memory {
    /// Nodes with their weights, and whether they are alive and ordinary.
    nodes: BTreeMap<NodeId, (u32, bool, bool)>,
    /// Since when that hasn't changed.
    since_ms: u64,
    /// When load was last looked at: with many shards that takes a while.
    looked_ms: Option<u64>,
    /// Leaders were too uneven, and are spread until they are even: from one bound to the other, so that small
    /// changes don't set it off again.
    spreading: bool,
    /// The rebalancing whose replicas are in place, and since when.
    in_place: Option<(u64, u64)>,
    /// Living shards that nobody is known to lead, each since when.
    unserved: BTreeMap<ShardId, u64>,
}

impl Memory {
    /// For how long nobody has been known to lead the shard, in milliseconds; 0: somebody is.
    fn unserved_ms(&self, shard: ShardId, now_ms: u64) -> u64 {
        self.unserved.get(&shard).map_or(0, |since_ms| now_ms.saturating_sub(*since_ms))
    }
}

/// How far the leadership of a shard is whose replicas are where the plan wants them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Handover {
    /// It is where it should be.
    There,
    /// It can go there.
    Now { from: NodeId, to: NodeId },
    /// It isn't there and can't go yet: nobody is known to lead, or the heir can't.
    Later,
}

impl Round<'_> {
    /// Looks which shards nobody leads. To be called once in a step, before all else here; returns them.
    pub(super) fn unserved(&mut self) -> impl Iterator<Item = ShardId> {
        let now_ms = self.now_ms();
        let (shards, leaders) = (&self.view.map.shards, &self.view.leaders);
        let unled = |id: &ShardId| shards.get(id).is_some_and(|s| !s.dropped) && !leaders.contains_key(id);
        let unserved = &mut self.memory.even.unserved;
        unserved.retain(|id, _| unled(id));
        for id in shards.keys().filter(|id| unled(id)) {
            unserved.entry(*id).or_insert(now_ms);
        }
        unserved.keys().copied()
    }

    /// Ends the rebalancing once nothing is left of it, and gives it up if it can't end.
    pub(super) fn control_rebalance(&mut self) {
        let map = self.view.map;
        let last = &map.rebalance;
        let mut left = false;
        let mut impossible = None;
        // Of what is left: one that nobody leads for long, and whether there is any other.
        let (mut unled, mut others) = (None, false);
        let mut handovers = Vec::new();
        let mut led_elsewhere = false;
        for shard in map.shards.values().filter(|shard| !shard.dropped) {
            let moves = shard.moving.as_ref().is_some_and(|moving| moving.cause == MoveCause::Rebalance);
            if moves || shard.target.is_some() {
                left = true;
                match self.memory.even.unserved_ms(shard.id, self.now_ms()) >= limits::SICK_MS {
                    true => unled = unled.or(Some(shard.id)),
                    false => others = true,
                }
            }
            if shard.target.is_some() {
                impossible = impossible.or_else(|| self.impossible(shard));
            } else if shard.previous.as_ref().is_some_and(|previous| previous.plan == last.plan) {
                let handover = self.handover(shard);
                led_elsewhere |= handover != Handover::There;
                if let Handover::Now { from, to } = handover {
                    handovers.push((shard.id, from, to));
                }
            }
        }
        // It would hold up every other rebalancing, for as long as that shard is in need.
        if let Some(shard) = unled.filter(|_| !others) {
            impossible.get_or_insert_with(|| {
                format!("shard {shard}, which is to move, has had no leader for {} s", limits::SICK_MS / 1000)
            });
        }
        let plan = last.plan;
        let control = |state, reason| Action::Meta(MetaCommand::ControlRebalance { plan, state, reason });
        match last.state {
            RebalanceState::Running if impossible.is_some() => {
                self.act(control(RebalanceState::Failed, impossible.unwrap_or_default()));
            }
            RebalanceState::Running if !left && self.waits_for_leaders(plan, led_elsewhere) => {
                for (shard, from, to) in handovers {
                    self.transfer(shard, from, to);
                }
            }
            RebalanceState::Running | RebalanceState::Paused | RebalanceState::Cancelling if !left => {
                self.act(control(RebalanceState::Idle, last.reason.clone()));
            }
            RebalanceState::Running => {
                for (shard, from, to) in handovers {
                    self.transfer(shard, from, to);
                }
            }
            _ => {}
        }
    }

    /// Whether there are leaderships to hand over still, and it hasn't been tried for long.
    fn waits_for_leaders(&mut self, plan: u64, led_elsewhere: bool) -> bool {
        let now_ms = self.now_ms();
        let since = self.memory.even.in_place.filter(|(of, _)| *of == plan).map_or(now_ms, |(_, at)| at);
        self.memory.even.in_place = Some((plan, since));
        led_elsewhere && now_ms.saturating_sub(since) < limits::REBALANCE_LEADERS_MS_MAX
    }

    /// Leadership of a shard whose replicas are where the plan wants them goes to the first of them, as soon as
    /// that can lead.
    fn handover(&self, shard: &ShardRecord) -> Handover {
        let Some(first) = shard.members.first() else { return Handover::There };
        let Some(led) = self.view.leaders.get(&shard.id) else { return Handover::Later };
        if led.node == first.node {
            return Handover::There;
        }
        let able = first.role == MemberRole::Voter
            && led.caught_up(first.replica)
            && self.view.nodes.get(&first.node).is_some_and(|node| node.may_lead);
        match able && shard.moving.is_none() {
            true => Handover::Now { from: led.node, to: first.node },
            false => Handover::Later,
        }
    }

    /// Why a shard can't come to its target any more.
    fn impossible(&self, shard: &ShardRecord) -> Option<String> {
        let id = shard.id;
        let target = shard.target.as_ref()?;
        let wanted = wants::wanted(&self.view, shard);
        if target.nodes.len() != wanted {
            let planned = target.nodes.len();
            return Some(format!(
                "shard {id} should have {wanted} replicas by now, and {planned} were planned"
            ));
        }
        for node in &target.nodes {
            let why = match self.view.nodes.get(node) {
                None => "is not in the map",
                Some(view) if view.standing == Standing::Draining => "is to be emptied",
                Some(view) if view.standing != Standing::Member => "was removed",
                Some(view) => match view.lost {
                    Some(why) => why,
                    None => continue,
                },
            };
            return Some(format!("node {node}, where shard {id} should be, {why}"));
        }
        None
    }
}

/// Spreads what the present nodes hold and lead, if that is uneven and they have been the same for a while.
pub(super) fn spread(round: &mut Round, known: &Known) {
    let map = round.view.map;
    if !settled(round) || !map.policy.automatic {
        round.memory.even.spreading = false;
        return;
    }
    let now_ms = round.now_ms();
    let memory = &mut round.memory.even;
    // They may be about to elect one.
    if memory.unserved.values().any(|since_ms| now_ms < since_ms + limits::SETTLE_MS) {
        return;
    }
    let soon = memory.looked_ms.is_some_and(|looked| now_ms < looked + limits::EVEN_LOOK_MS);
    if soon && !memory.spreading {
        return;
    }
    memory.looked_ms = Some(now_ms);
    let last = &map.rebalance;
    let over = matches!(last.state, RebalanceState::Idle | RebalanceState::Failed);
    if over && !is_kept(round) && map.policy.moves_at_a_time > 0 && is_uneven(map, known, false) {
        let plan = plan_rebalance(map, known, false);
        if plan.total.moves > 0 {
            // Leaders follow when the replicas are there.
            let moves = plan.moves.iter().filter(|planned| planned.kind == MoveKind::Replica);
            let moved: BTreeSet<ShardId> = moves.map(|planned| planned.shard).collect();
            let targets =
                plan.targets.iter().filter(|target| moved.contains(&target.shard)).cloned().collect();
            let (moves, bytes) = (plan.total.moves, plan.total.bytes);
            let (plan, undoes) = (plan.id, 0);
            round.act(Action::Meta(MetaCommand::BeginRebalance { plan, undoes, targets, moves, bytes }));
            return;
        }
    }
    if !round.memory.even.spreading {
        round.memory.even.spreading = is_uneven(map, known, true);
    }
    if round.memory.even.spreading {
        let plan = plan_rebalance(map, known, true);
        round.memory.even.spreading = !plan.moves.is_empty();
        for planned in plan.moves {
            let Some(led) = round.view.leaders.get(&planned.shard).copied() else { continue };
            let to = led.voters().find(|member| member.node == planned.to);
            if to.is_some_and(|member| led.caught_up(member.replica)) && led.node == planned.from {
                round.transfer(planned.shard, planned.from, planned.to);
            }
        }
    }
}

/// Whether an operator has had the shards put where they are, by taking a rebalancing back or cancelling it, and
/// the nodes are the same as then. That isn't undone by itself.
fn is_kept(round: &Round) -> bool {
    let last = &round.view.map.rebalance;
    let by_hand = last.plan % 2 == 1 || !last.reason.is_empty();
    let newest = round.view.map.nodes.values().map(|node| node.changed_at).max().unwrap_or(0);
    last.state == RebalanceState::Idle && by_hand && newest < last.changed_at
}

/// Whether the nodes have been the same for long enough, each either alive or gone: for good, as the policy has it, or
/// for so long that a cluster whose policy nobody has changed would count on it.
fn settled(round: &mut Round) -> bool {
    let now_ms = round.now_ms();
    let view = &round.view;
    let weight = |node: &NodeId| view.map.nodes.get(node).map_or(0, |node| node.weight);
    let nodes: BTreeMap<_, _> = view
        .nodes
        .iter()
        .map(|(id, node)| (*id, (weight(id), node.fit, node.standing == Standing::Member)))
        .collect();
    let waits = view
        .nodes
        .values()
        .filter(|node| node.standing == Standing::Member && !node.alive && node.lost.is_none())
        .any(|node| node.silent_ms < PolicyRecord::default().replace_after_ms);
    let memory = &mut round.memory.even;
    if memory.nodes != nodes || waits {
        memory.nodes = nodes;
        memory.since_ms = now_ms;
    }
    now_ms.saturating_sub(memory.since_ms) >= limits::SETTLE_MS
}
