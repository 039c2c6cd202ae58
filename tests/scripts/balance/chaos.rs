//! Whatever happens to a cluster: no step loses a quorum, and once it is left alone, it becomes what it should
//! be, and then nothing moves any more.

use std::collections::BTreeSet;

use pontoon::balance::reconciler::Reconciler;
use pontoon::ids::{METADATA_SHARD, NodeId, ShardId};
use pontoon::machine::command::{MetaCommand, PolicyChange};
use pontoon::placement::loads::metadata_voters;
use pontoon::placement::map::{Member, MemberRole, RebalanceState, ShardRecord, Standing};
use pontoon::placement::rebalance::{is_uneven, plan_rebalance, plan_undo};
use proptest::prelude::*;

use super::model::Model;

#[derive(Clone, Debug)]
enum Event {
    Kill(usize),
    Start(usize),
    /// Never comes back.
    Burn(usize),
    Join(usize),
    Drain(usize),
    Stay(usize),
    Leave(usize),
    Sicken(usize, usize),
    Full(usize),
    Replicas(u32),
    Rebalance(bool),
    Undo,
    Control(RebalanceState),
    CancelMove(usize),
    NewReconciler,
    Lose(usize),
    Wait(u64),
}

fn event() -> impl Strategy<Value = Event> {
    use RebalanceState::{Cancelling, Paused, Running};
    let state = prop_oneof![Just(Paused), Just(Running), Just(Cancelling)];
    prop_oneof![
        3 => (0..9_usize).prop_map(Event::Kill),
        3 => (0..9_usize).prop_map(Event::Start),
        1 => (0..9_usize).prop_map(Event::Burn),
        3 => (0..3_usize).prop_map(Event::Join),
        2 => (0..9_usize).prop_map(Event::Drain),
        1 => (0..9_usize).prop_map(Event::Stay),
        1 => (0..9_usize).prop_map(Event::Leave),
        1 => (0..9_usize, 0..9_usize).prop_map(|(shard, node)| Event::Sicken(shard, node)),
        1 => (0..9_usize).prop_map(Event::Full),
        2 => prop_oneof![Just(1_u32), Just(3), Just(5)].prop_map(Event::Replicas),
        2 => any::<bool>().prop_map(Event::Rebalance),
        1 => Just(Event::Undo),
        2 => state.prop_map(Event::Control),
        2 => (0..9_usize).prop_map(Event::CancelMove),
        2 => Just(Event::NewReconciler),
        2 => (1..6_usize).prop_map(Event::Lose),
        6 => (1..90_u64).prop_map(Event::Wait),
    ]
}

/// What makes voters useless, or too many, and little else: sick ones beside such as were given up, are gone, are to
/// be emptied, or are more than are wanted.
fn affliction() -> impl Strategy<Value = Event> {
    prop_oneof![
        8 => (0..2_usize, 0..6_usize).prop_map(|(shard, node)| Event::Sicken(shard, node)),
        4 => (0..6_usize).prop_map(Event::Leave),
        4 => (1..6_u32).prop_map(Event::Replicas),
        1 => (0..6_usize).prop_map(Event::Drain),
        1 => (0..6_usize).prop_map(Event::Kill),
        1 => (0..6_usize).prop_map(Event::Start),
        1 => (0..6_usize).prop_map(Event::Burn),
        1 => Just(Event::Join(0)),
        1 => Just(Event::NewReconciler),
        2 => (1..90_u64).prop_map(Event::Wait),
    ]
}

const ZONES: [&str; 3] = ["a", "b", "c"];

struct Chaos {
    model: Model,
    /// Whether nodes have zones.
    zones: bool,
    burnt: BTreeSet<NodeId>,
}

impl Chaos {
    fn new(nodes: usize, replicas: u32, shards: u32, zones: bool) -> Chaos {
        let zone = |at: usize| if zones { ZONES[at % 3].to_owned() } else { String::new() };
        let nodes: Vec<_> = (0..nodes).map(|at| (zone(at), 100)).collect();
        let mut model = Model::form(&nodes);
        model.create("db", replicas, shards).unwrap();
        model.propose(MetaCommand::SetPolicy(PolicyChange::ReplaceAfterMs(60_000))).unwrap();
        Chaos { model, zones, burnt: BTreeSet::new() }
    }

    fn node(&self, at: usize) -> NodeId {
        *self.model.map.nodes.keys().nth(at % self.model.map.nodes.len()).unwrap()
    }

    /// What an operator asks for may be refused.
    fn ask(&mut self, command: MetaCommand) {
        drop(self.model.propose(command));
    }

    fn run(&mut self, seconds: u64) -> Result<(), TestCaseError> {
        for _ in 0..seconds {
            self.model.second();
            prop_assert_eq!(&self.model.wrongs, &Vec::<String>::new());
        }
        Ok(())
    }

    fn happen(&mut self, event: &Event) -> Result<(), TestCaseError> {
        self.strike(event)?;
        self.run(1)
    }

    /// What happens, before anybody can do anything about it.
    fn strike(&mut self, event: &Event) -> Result<(), TestCaseError> {
        let standing = |node, standing| MetaCommand::SetStanding { node, standing };
        match *event {
            Event::Kill(at) => self.model.kill(self.node(at)),
            Event::Start(at) => {
                if !self.burnt.contains(&self.node(at)) {
                    self.model.start(self.node(at));
                }
            }
            Event::Burn(at) => {
                let node = self.node(at);
                let mut without = self.burnt.clone();
                without.insert(node);
                if self.model.stands_without(&without) {
                    self.model.kill(node);
                    self.burnt.insert(node);
                }
            }
            Event::Join(zone) => {
                if self.model.map.nodes.len() < 9 {
                    self.model.join(if self.zones { ZONES[zone] } else { "" }, 100);
                }
            }
            Event::Drain(at) => self.ask(standing(self.node(at), Standing::Draining)),
            Event::Stay(at) => self.ask(standing(self.node(at), Standing::Member)),
            Event::Leave(at) => self.ask(standing(self.node(at), Standing::Leaving)),
            Event::Sicken(shard, node) => {
                let shard = ShardId((shard % self.model.map.shards.len()) as u64);
                let node = self.node(node);
                let mut without = self.burnt.clone();
                without.insert(node);
                if self.model.stands_without(&without) {
                    self.model.sicken(shard, node);
                }
            }
            Event::Full(at) => {
                let node = self.node(at);
                self.model.machines.get_mut(&node).unwrap().disk_full ^= true;
            }
            Event::Replicas(replicas) => self.ask(MetaCommand::SetReplicas { name: "db".into(), replicas }),
            Event::Rebalance(leaders_only) => {
                let plan = plan_rebalance(&self.model.map, self.model.reconciler.known(), leaders_only);
                let (plan, targets, moves, bytes) =
                    (plan.id, plan.targets, plan.total.moves, plan.total.bytes);
                self.ask(MetaCommand::BeginRebalance { plan, undoes: 0, targets, moves, bytes });
            }
            Event::Undo => {
                if let Ok(plan) = plan_undo(&self.model.map, self.model.reconciler.known()) {
                    let (plan, targets, moves, bytes) =
                        (plan.id, plan.targets, plan.total.moves, plan.total.bytes);
                    let undoes = self.model.map.rebalance.plan;
                    self.ask(MetaCommand::BeginRebalance { plan, undoes, targets, moves, bytes });
                }
            }
            Event::Control(state) => {
                let plan = self.model.map.rebalance.plan;
                self.ask(MetaCommand::ControlRebalance { plan, state, reason: "by hand".into() });
            }
            Event::CancelMove(at) => {
                let moving =
                    self.model.map.shards.values().filter_map(|s| Some((s.id, s.moving.as_ref()?.id)));
                if let Some((shard, id)) = moving.collect::<Vec<_>>().get(at) {
                    self.ask(MetaCommand::CancelMove { shard: *shard, id: *id });
                }
            }
            Event::NewReconciler => self.model.reconciler = Reconciler::new(),
            Event::Lose(actions) => self.model.lose = actions,
            Event::Wait(seconds) => self.run(seconds)?,
        }
        Ok(())
    }

    /// All that may come back does, and nothing goes wrong any more.
    fn heal(&mut self) -> Result<(), TestCaseError> {
        let nodes: Vec<NodeId> = self.model.map.nodes.keys().copied().collect();
        for node in nodes {
            if !self.burnt.contains(&node) && !self.model.machines[&node].up {
                self.model.start(node);
            }
            self.model.machines.get_mut(&node).unwrap().disk_full = false;
        }
        self.model.lose = 0;
        let plan = self.model.map.rebalance.plan;
        if self.model.map.rebalance.state == RebalanceState::Paused {
            let (state, reason) = (RebalanceState::Running, String::new());
            self.ask(MetaCommand::ControlRebalance { plan, state, reason });
        }
        // Longer than anything waits: for the gone, the sick, or another attempt.
        let (mut still, mut seconds) = (0, 0);
        while still < 130 {
            self.model.trace.clear();
            self.run(1)?;
            seconds += 1;
            still = if self.model.trace.is_empty() { still + 1 } else { 0 };
            prop_assert!(seconds < 3000, "it doesn't come to rest: {:?}", self.model.trace);
        }
        Ok(())
    }

    /// Nodes that take replicas.
    fn takers(&self) -> BTreeSet<NodeId> {
        let members = self.model.map.nodes.values().filter(|node| node.standing == Standing::Member);
        members.map(|node| node.id).filter(|node| !self.burnt.contains(node)).collect()
    }

    fn check(&self) -> Result<(), TestCaseError> {
        let map = &self.model.map;
        let takers = self.takers();
        let state = map.rebalance.state;
        prop_assert!(
            matches!(state, RebalanceState::Idle | RebalanceState::Failed),
            "{:?}, {:?}",
            map.rebalance,
            self.model.reconciler.stuck()
        );
        for shard in map.shards.values() {
            self.check_shard(shard, &takers)?;
        }
        let known = self.model.reconciler.known();
        let enough =
            map.shards.values().all(|shard| shard.members.iter().all(|member| takers.contains(&member.node)));
        // Taken back or cancelled by hand, it stays as it is until nodes come or go.
        let kept = map.rebalance.plan % 2 == 1 || !map.rebalance.reason.is_empty();
        if enough && !kept && is_uneven(map, known, false) {
            let plan = plan_rebalance(map, known, false);
            prop_assert!(plan.total.moves == 0, "{:?} could be better: {:?}", map.shards, plan.moves);
        }
        Ok(())
    }

    fn check_shard(&self, shard: &ShardRecord, takers: &BTreeSet<NodeId>) -> Result<(), TestCaseError> {
        let id = shard.id;
        let stuck: Vec<_> = self.model.reconciler.stuck();
        let why = stuck.iter().find(|(stuck, _)| *stuck == id).map(|(_, why)| why.as_str());
        prop_assert!(shard.moving.is_none() && shard.target.is_none(), "{:?}: {:?}", shard, why);
        let ids = |members: &[Member]| members.iter().map(|m| m.replica).collect::<BTreeSet<_>>();
        prop_assert_eq!(ids(&shard.members), ids(self.model.members(id)));
        prop_assert!(shard.members.iter().all(|member| member.role == MemberRole::Voter));
        let wanted = match id {
            METADATA_SHARD => metadata_voters(takers.len()),
            _ => self.model.map.databases[&shard.database].replicas as usize,
        };
        if wanted > 1 && takers.len() > 1 {
            let copies = shard.members.iter().filter(|member| takers.contains(&member.node)).count();
            prop_assert!(copies > 1, "there is one copy of {:?}, with {:?} there: {:?}", shard, takers, why);
        }
        if takers.len() < wanted || (id == METADATA_SHARD && takers.len() < 3) {
            return Ok(());
        }
        let nodes: BTreeSet<NodeId> = shard.members.iter().map(|member| member.node).collect();
        prop_assert_eq!(nodes.len(), shard.members.len());
        prop_assert!(nodes.len() == wanted, "{:?} instead of {}: {:?}", nodes, wanted, why);
        prop_assert!(nodes.is_subset(takers), "{:?} of {:?}: {:?}", nodes, takers, why);
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), failure_persistence: None, max_shrink_iters: 300, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_no_quorum_is_lost_and_all_comes_to_rest(
        nodes in 3..6_usize, replicas in prop_oneof![Just(1_u32), Just(3)], shards in 1..10_u32,
        zones: bool, events in prop::collection::vec(event(), 1..40),
    ) {
        let mut chaos = Chaos::new(nodes, replicas, shards, zones);
        for event in &events {
            chaos.happen(event)?;
        }
        chaos.heal()?;
        chaos.check()?;
    }

    #[test]
    fn chaos_of_sick_and_leaving_voters_ends_with_all_of_them_replaced(
        nodes in 3..6_usize, fewer in 0..3_u32, events in prop::collection::vec(affliction(), 1..12),
    ) {
        let replicas = u32::try_from(nodes).unwrap() - fewer;
        let mut chaos = Chaos::new(nodes, replicas, 1, false);
        for event in &events {
            chaos.strike(event)?;
        }
        chaos.heal()?;
        chaos.check()?;
    }
}

fn cases() -> u32 {
    std::env::var("CHAOS_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(32)
}
