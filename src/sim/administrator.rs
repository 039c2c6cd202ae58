//! Whoever runs a governed cluster: forms it, takes nodes in, empties them, gives them up and removes them, changes
//! how many replicas there are, has load spread and stops that again. Once faults end, wants nothing more than that
//! all is well.

use super::SimOptions;
use super::dice::Dice;
use super::governor::{self, DATABASE};
use super::operator::Request;
use super::report::{Shown, note};
use super::shell::NodeEvent;
use super::world::{Event, World};
use crate::group::types::Operation;
use crate::ids::{METADATA_SHARD, NodeId};
use crate::machine::command::{Command, MetaCommand, PolicyChange};
use crate::placement::loads::metadata_voters;
use crate::placement::map::{ClusterMap, RebalanceState, Standing};
use crate::placement::rebalance::{Known, plan_rebalance};

/// A node that is gone for so long is replaced, when faults have ended.
const REPLACE_AFTER_MS: u64 = 8_000;

/// Nodes that stay members, whatever is decided about the others.
const MEMBERS_MIN: usize = 3;

impl World {
    /// The administrator looks at the cluster, and decides something.
    pub(super) fn administer(&mut self) {
        let calm = self.faults_are_over();
        let delay = if calm { (100_000, 500_000) } else { (300_000, 5_000_000) };
        let delay = self.dice.between(delay.0, delay.1);
        self.clock.after(delay, Event::Administer);
        let decided = match self.needed(calm) {
            None if !calm => self.wish(),
            needed => needed,
        };
        if let Some(command) = decided {
            self.decide(command);
        }
    }

    fn decide(&mut self, command: MetaCommand) {
        let leaders: Vec<NodeId> =
            self.nodes.values().filter(|node| node.leads(METADATA_SHARD)).map(|node| node.id).collect();
        let Some(&node) = self.dice.pick(&leaders) else { return };
        note!(self.trace, "{} administrator: {:?}", self.clock.now, Shown(&command));
        self.count("decisions about the cluster");
        let token = self.operator.request(Request::Other);
        let late = self.options.faults.messages && self.dice.chance(50);
        let delay = self.dice.between(50, if late { 4_000_000 } else { 1_000 });
        let operation = Operation::Command { command: Command::Meta(command), session: None };
        let operation = Box::new(operation);
        let request = NodeEvent::Request { token, shard: METADATA_SHARD, operation };
        self.clock.after(delay, Event::Node(node, request));
    }

    /// What has to be decided; `calm`: for all to be well.
    fn needed(&self, calm: bool) -> Option<MetaCommand> {
        let map = &self.map;
        let SimOptions { nodes, shards, replicas, .. } = self.options;
        let mut first = governor::first_commands(nodes, shards, replicas).into_iter();
        let (form, create) = (first.next(), first.next());
        if map.version == 0 {
            return form;
        }
        let Some(database) = map.database(DATABASE) else { return create };
        let strangers = self.nodes.values().filter(|node| !node.lost && !map.nodes.contains_key(&node.id));
        if let Some(stranger) = strangers.map(|node| node.id).next() {
            return Some(MetaCommand::AddNode(governor::node_record(stranger)));
        }
        if !calm {
            return None;
        }
        if map.policy.replace_after_ms != REPLACE_AFTER_MS {
            return Some(MetaCommand::SetPolicy(PolicyChange::ReplaceAfterMs(REPLACE_AFTER_MS)));
        }
        for node in map.nodes.values() {
            let standing = match (node.standing, self.is_lost(node.id)) {
                (Standing::Member | Standing::Draining, true) => Standing::Leaving,
                (Standing::Draining, false) => Standing::Member,
                _ => continue,
            };
            return Some(MetaCommand::SetStanding { node: node.id, standing });
        }
        let members = self.members_of_cluster(map).len();
        if database.replicas as usize > members {
            let replicas = u32::try_from(members).unwrap_or(1).max(1);
            return Some(MetaCommand::SetReplicas { name: DATABASE.into(), replicas });
        }
        (map.rebalance.state == RebalanceState::Paused).then(|| MetaCommand::ControlRebalance {
            plan: map.rebalance.plan,
            state: RebalanceState::Running,
            reason: String::new(),
        })
    }

    /// Nodes that may hold replicas.
    fn members_of_cluster(&self, map: &ClusterMap) -> Vec<NodeId> {
        let members = map.nodes.values().filter(|node| node.standing == Standing::Member);
        members.map(|node| node.id).filter(|node| !self.is_lost(*node)).collect()
    }

    /// Something that comes to the administrator's mind.
    fn wish(&mut self) -> Option<MetaCommand> {
        let map = self.map.clone();
        let members = self.members_of_cluster(&map);
        let all: Vec<NodeId> = map.nodes.keys().copied().collect();
        let dice = &mut self.dice;
        let plan = map.rebalance.plan;
        match dice.below(7) {
            0 | 1 => {
                let node = *dice.pick(&all)?;
                let standing = [Standing::Member, Standing::Draining, Standing::Leaving][dice.below(3)];
                let spared = members.len() > MEMBERS_MIN || !members.contains(&node);
                (spared || standing == Standing::Member)
                    .then_some(MetaCommand::SetStanding { node, standing })
            }
            2 => {
                let given_up = map.nodes.values().filter(|node| node.standing == Standing::Leaving);
                let given_up: Vec<NodeId> = given_up.map(|node| node.id).collect();
                let node = *dice.pick(&given_up)?;
                Some(MetaCommand::SetStanding { node, standing: Standing::Removed })
            }
            3 => {
                let replicas = [1, 3, 3, 5][dice.below(4)];
                (replicas as usize <= members.len())
                    .then(|| MetaCommand::SetReplicas { name: DATABASE.into(), replicas })
            }
            4 => {
                let leaders_only = dice.chance(300);
                let known = self.known_to_the_reconciler();
                let plan = plan_rebalance(&map, &known, leaders_only);
                (!plan.targets.is_empty()).then_some(MetaCommand::BeginRebalance {
                    plan: plan.id,
                    undoes: 0,
                    targets: plan.targets,
                    moves: plan.total.moves,
                    bytes: plan.total.bytes,
                })
            }
            5 => {
                let state = [RebalanceState::Paused, RebalanceState::Running, RebalanceState::Cancelling];
                let state = state[dice.below(3)];
                Some(MetaCommand::ControlRebalance { plan, state, reason: "simulated".into() })
            }
            _ => Some(MetaCommand::SetPolicy(policy(dice))),
        }
    }

    fn known_to_the_reconciler(&self) -> Known {
        let reconcilers = self.nodes.values().filter_map(|node| node.process.as_ref()?.reconciler.as_ref());
        reconcilers.map(|reconciler| reconciler.known().clone()).next().unwrap_or_default()
    }

    /// What a governed cluster wants, and what stands still; for a report.
    pub(super) fn describe_map(&self) -> String {
        let mut text = String::new();
        if !self.is_governed() {
            return text;
        }
        text +=
            &format!("\n  map version {}: {:?}, {:?}", self.map.version, self.map.policy, self.map.rebalance);
        let standings: Vec<_> = self.map.nodes.values().map(|node| (node.id, node.standing)).collect();
        text += &format!("\n  {standings:?}");
        for shard in self.map.shards.values() {
            text += &format!("\n  {:?} {:?} {:?}", shard.members, shard.moving, shard.target);
        }
        for database in self.map.databases.values() {
            text += &format!("\n  {} replicas of each shard", database.replicas);
        }
        for node in self.nodes.values() {
            if let Some(reconciler) = node.process.as_ref().and_then(|process| process.reconciler.as_ref()) {
                text += &format!("\n  as node {} reconciles: {:?}", node.id, reconciler.stuck());
            }
        }
        text
    }

    /// Whether everything is as the map wants it, and nothing is left to be decided.
    pub(super) fn is_well(&self) -> bool {
        let map = &self.map;
        let Some(database) = map.database(DATABASE) else { return false };
        let members = self.members_of_cluster(map);
        let in_place = |shard: &crate::placement::map::ShardRecord| {
            let wanted = match shard.id == METADATA_SHARD {
                // One more is no harm.
                true => metadata_voters(members.len())..=metadata_voters(members.len()) + 1,
                false => database.replicas as usize..=database.replicas as usize,
            };
            shard.moving.is_none()
                && shard.target.is_none()
                && wanted.contains(&shard.members.len())
                && shard.members.iter().all(|member| members.contains(&member.node))
                && self.configuration(shard.id).is_some_and(|newest| newest.conf == shard.epoch.conf)
        };
        self.needed(true).is_none() && map.shards.values().all(in_place) && self.members_in_place()
    }
}

fn policy(dice: &mut Dice) -> PolicyChange {
    match dice.below(3) {
        0 => PolicyChange::ReplaceAfterMs([0, 5_000, 20_000][dice.below(3)]),
        1 => PolicyChange::MovesAtATime([1, 2, 8][dice.below(3)]),
        _ => PolicyChange::Automatic(dice.chance(500)),
    }
}
