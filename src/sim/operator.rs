//! An operator who changes the members of shards while everything else goes wrong: learners are added on
//! nodes without a replica, exchanged for voters, removed; shards grow and shrink between one voter and five;
//! moves are given up halfway; and some of what it asks for makes no sense, or is meant for other members than
//! there are. Once faults end it brings what it has begun to an end, and replaces what is gone for good.
//!
//! It tells nodes which replicas to have, by what it knows of the members, as the cluster map does: those that
//! are members, those that a move brings, and no others. Ids are never used again.

use std::collections::{BTreeMap, BTreeSet};

use super::Time;
use super::checks::Violation;
use super::checks::members::is_joint;
use super::membership::RemoveEvent;
use super::planted::Planted;
use super::report::{Shown, note};
use super::shell::NodeEvent;
use super::workload::Client;
use super::world::{Event, World};
use crate::group::types::{MembershipChange, Operation, Output};
use crate::ids::{DatabaseId, Epoch, NodeId, ReplicaId, ShardId};
use crate::machine::MachineKind;
use crate::machine::command::{MetaReply, Reply};
use crate::placement::map::{Member, MemberRole};
use crate::placement::ring::RingRange;
use crate::refusal::Refusal;
use crate::storage::log::{ReplicaPhase, ReplicaRecord};

/// When it first looks at the cluster.
pub(super) const FIRST: Time = 2_000_000;

/// The client that its requests are sent as.
const CLIENT: u64 = u32::MAX as u64;

/// Time within which a request that wasn't answered has been proposed, or never will be: it may be late, its
/// node may stand still, and wait for its disk.
const PROPOSED: Time = 15_000_000;

/// How often a step is tried that would stop the shard now.
const PATIENCE: u32 = 20;

/// Whether a token is of a request of the operator's.
pub(super) fn is_its(token: u64) -> bool {
    Client::of_token(token) as u64 == CLIENT
}

/// A shard, as the operator knows it, and what it does to it.
struct Plan {
    range: RingRange,
    /// The newest conf version it has heard of.
    conf: u64,
    /// The members under that.
    members: Vec<Member>,
    /// Replicas that are to become voters.
    adds: Vec<Member>,
    /// Replicas that are to go.
    removes: Vec<ReplicaId>,
    /// It gives the move up.
    cancelling: bool,
    /// How often the shard couldn't have gone on with its next step.
    waited: u32,
    /// The conf version under which no earlier request can add what it has given up.
    fenced: Option<u64>,
    /// Requests that may still begin a joint change, and until when.
    exchanging: BTreeMap<u64, Time>,
    /// Requests that fence what it gives up.
    fencing: BTreeSet<u64>,
}

impl Plan {
    fn is_moving(&self) -> bool {
        !self.adds.is_empty() || !self.removes.is_empty()
    }

    /// Replicas that should exist.
    fn ordered(&self) -> impl Iterator<Item = &Member> {
        let new = |add: &&Member| self.members.iter().all(|member| member.replica != add.replica);
        self.members.iter().chain(self.adds.iter().filter(new))
    }

    fn role(&self, replica: ReplicaId) -> Option<MemberRole> {
        self.members.iter().find(|member| member.replica == replica).map(|member| member.role)
    }

    fn end(&mut self) {
        self.adds.clear();
        self.removes.clear();
        self.cancelling = false;
        self.waited = 0;
        self.fenced = None;
        self.fencing.clear();
    }
}

/// The members while a joint change is under way.
pub(super) fn exchanged(members: &[Member], promote: &[ReplicaId], remove: &[ReplicaId]) -> Vec<Member> {
    let mut members = members.to_vec();
    for member in &mut members {
        match member.role {
            MemberRole::Learner if promote.contains(&member.replica) => member.role = MemberRole::Incoming,
            MemberRole::Voter if remove.contains(&member.replica) => member.role = MemberRole::Outgoing,
            _ => {}
        }
    }
    members
}

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Request {
    /// Nothing that matters here.
    Other,
    /// A joint change of a shard, at this time.
    Exchange(ShardId, Time),
}

/// See the module page.
#[derive(Default)]
pub(super) struct Operator {
    plans: BTreeMap<ShardId, Plan>,
    replicas: u64,
    requests: u64,
}

impl Operator {
    /// A shard is placed on these members.
    pub fn place(&mut self, shard: ShardId, range: RingRange, members: &[Member]) {
        let plan = Plan {
            range,
            conf: 1,
            members: members.to_vec(),
            adds: Vec::new(),
            removes: Vec::new(),
            cancelling: false,
            waited: 0,
            fenced: None,
            exchanging: BTreeMap::new(),
            fencing: BTreeSet::new(),
        };
        self.plans.insert(shard, plan);
        self.replicas = self.replicas.max(1_000);
    }

    /// Whether a joint change of a shard may be about to begin, for all that can be seen at a time.
    pub fn exchanges(&self, shard: ShardId, now: Time) -> bool {
        self.plans.get(&shard).is_some_and(|plan| plan.exchanging.values().any(|until| now < *until))
    }

    /// A token for something that the cluster asks of itself.
    pub fn request(&mut self, request: Request) -> u64 {
        self.requests += 1;
        let token = CLIENT << 32 | self.requests;
        if let Request::Exchange(shard, now) = request
            && let Some(plan) = self.plans.get_mut(&shard)
        {
            plan.exchanging.retain(|_, until| now < *until);
            plan.exchanging.insert(token, now + PROPOSED);
        }
        token
    }

    fn next_replica(&mut self) -> ReplicaId {
        self.replicas += 1;
        ReplicaId(self.replicas)
    }
}

impl World {
    /// The operator looks at the cluster, and does something.
    pub(super) fn operate(&mut self) {
        let calm = self.faults_are_over();
        let delay = if calm { (20_000, 200_000) } else { (50_000, 1_500_000) };
        let delay = self.dice.between(delay.0, delay.1);
        self.clock.after(delay, Event::Operate);
        let mut shards: Vec<ShardId> = self.truths.keys().copied().collect();
        if !calm {
            let one = self.dice.below(shards.len());
            shards = vec![shards[one]];
        }
        for shard in shards {
            self.operate_on(shard, calm);
        }
    }

    fn operate_on(&mut self, shard: ShardId, calm: bool) {
        // Whom it takes for the leader may be one of the past.
        let leaders: Vec<(NodeId, ReplicaId)> = (self.nodes.values())
            .flat_map(|node| node.replicas().map(move |(id, replica)| (node.id, id, replica)))
            .filter(|(_, _, replica)| replica.shard == shard && replica.group.leads())
            .map(|(node, id, _)| (node, id))
            .collect();
        let Some((node, leader)) = self.dice.pick(&leaders).copied() else { return };
        if calm || self.dice.chance(800) {
            self.ask_for_members(shard, node, leader);
        }
        self.order_replicas(shard);
        if !calm && self.dice.chance(200) {
            self.ask_for_nonsense(shard, node);
            return;
        }
        if !self.operator.plans.get(&shard).is_some_and(Plan::is_moving) {
            self.begin_move(shard, calm);
        }
        self.advance_move(shard, node, leader, calm);
    }

    fn ask_for_members(&mut self, shard: ShardId, node: NodeId, leader: ReplicaId) {
        let Some(status) = self.replica(node, leader).map(|replica| replica.group.status()) else { return };
        let Some(plan) = self.operator.plans.get_mut(&shard) else { return };
        if status.epoch.conf > plan.conf {
            plan.conf = status.epoch.conf;
            plan.members = status.members;
        }
    }

    /// Tells nodes what they are to have of a shard.
    fn order_replicas(&mut self, shard: ShardId) {
        let Some(plan) = self.operator.plans.get(&shard) else { return };
        let ordered: Vec<Member> = plan.ordered().copied().collect();
        let record = |member: &Member| ReplicaRecord {
            replica: member.replica,
            shard,
            database: DatabaseId(1),
            machine: MachineKind::Kv,
            phase: ReplicaPhase::Active,
            range: plan.range,
            epoch: Epoch { range: 1, conf: 0 },
            members: Vec::new(),
            members_at: 0,
            ordered_at: 0,
            generation: 1,
        };
        let mut orders = Vec::new();
        for node in self.nodes.values().filter(|node| !node.lost) {
            let held: Vec<ReplicaId> =
                node.records.iter().filter(|record| record.shard == shard).map(|r| r.replica).collect();
            for member in ordered.iter().filter(|m| m.node == node.id && !held.contains(&m.replica)) {
                orders.push((node.id, NodeEvent::Make(Box::new(record(member)))));
            }
            for replica in held {
                if ordered.iter().all(|member| member.replica != replica) {
                    orders.push((node.id, NodeEvent::Remove(RemoveEvent::Order(replica))));
                }
            }
        }
        for (node, order) in orders {
            // Now and then an order is late: it must not bring back what another has removed meanwhile.
            let late = self.options.faults.messages && self.dice.chance(100);
            let delay = self.dice.between(1_000, if late { 4_000_000 } else { 50_000 });
            self.clock.after(delay, Event::Node(node, order));
        }
    }

    /// Has the leader of a shard, on this node, change the members.
    fn ask(&mut self, shard: ShardId, node: NodeId, conf: u64, change: MembershipChange) {
        self.operator.requests += 1;
        let token = CLIENT << 32 | self.operator.requests;
        let now = self.clock.now;
        note!(self.trace, "{} operator {:x} asks shard {}: {:?}", now, token, shard, Shown((conf, &change)));
        if let Some(plan) = self.operator.plans.get_mut(&shard) {
            match &change {
                MembershipChange::Exchange { .. } => {
                    plan.exchanging.retain(|_, until| now < *until);
                    plan.exchanging.insert(token, now + PROPOSED);
                }
                MembershipChange::RemoveLearners(_) if plan.cancelling => {
                    plan.fencing.insert(token);
                }
                _ => {}
            }
        }
        self.count("changes asked for");
        let late = self.options.faults.messages && self.dice.chance(50);
        let delay = self.dice.between(50, if late { 4_000_000 } else { 1_000 });
        let operation = Box::new(Operation::Change { conf, change });
        self.clock.after(delay, Event::Node(node, NodeEvent::Request { token, shard, operation }));
    }

    /// What the operator asked for has come to an end.
    pub(super) fn on_changed(
        &mut self,
        token: u64,
        result: Result<Output, Refusal>,
    ) -> Result<(), Violation> {
        let proposed = match &result {
            Ok(Output::Changed(_) | Output::Reply(Reply::Meta(_))) => false,
            Ok(other) => {
                return Err(Violation::new("answers", format!("{other:?} is no answer to a change")));
            }
            Err(refusal) => refusal.outcome() == crate::refusal::Outcome::Unknown,
        };
        for (shard, plan) in &mut self.operator.plans {
            if !proposed {
                plan.exchanging.remove(&token);
            }
            let fences = plan.fencing.remove(&token);
            let Ok(Output::Changed(conf)) = result else { continue };
            if fences {
                plan.fenced = plan.fenced.max(Some(conf));
            }
            // Told is what is in force, and stays so.
            let newest = self.truths.get(shard).and_then(|truth| truth.members.newest());
            if fences && newest.is_none_or(|newest| newest.conf < conf) {
                let detail =
                    format!("conf version {conf} of shard {shard} is told, {newest:?} is the newest");
                return Err(Violation::new("answers", detail));
            }
        }
        self.count(match result {
            Ok(Output::Changed(_)) => "changes done",
            Ok(Output::Reply(Reply::Meta(MetaReply::Refused(_)))) => "decisions refused",
            Ok(_) => "decisions made",
            Err(_) if self.is_governed() => "requests refused",
            Err(_) => "changes refused",
        });
        Ok(())
    }

    /// Asks for something that makes no sense, or not now.
    fn ask_for_nonsense(&mut self, shard: ShardId, node: NodeId) {
        let living = self.living();
        let Some(plan) = self.operator.plans.get(&shard) else { return };
        let conf = plan.conf.saturating_sub(self.dice.below(2) as u64);
        let some = |dice: &mut super::dice::Dice, of: &dyn Fn(MemberRole) -> bool| -> Vec<ReplicaId> {
            let members = plan.members.iter().filter(|member| of(member.role));
            members.filter(|_| dice.chance(500)).map(|member| member.replica).collect()
        };
        let change = match self.dice.below(3) {
            0 => {
                let free: Vec<NodeId> =
                    living.into_iter().filter(|node| plan.ordered().all(|m| m.node != *node)).collect();
                let Some(&on) = self.dice.pick(&free) else { return };
                let replica = self.operator.next_replica();
                MembershipChange::AddLearners(vec![Member { replica, node: on, role: MemberRole::Learner }])
            }
            1 => {
                let promote = some(&mut self.dice, &|role| role == MemberRole::Learner);
                let remove = some(&mut self.dice, &|role| role != MemberRole::Learner);
                let after = exchanged(&plan.members, &promote, &remove);
                let refused = !after.iter().any(|member| member.role.stays_voter());
                // Nobody would ask for so much that the shard couldn't go on.
                if !refused && !self.would_go_on(shard, &after, None) {
                    return;
                }
                MembershipChange::Exchange { promote, remove }
            }
            _ => {
                let mut all = some(&mut self.dice, &|_| true);
                // What a move brings would be brought again.
                all.retain(|replica| plan.adds.iter().all(|add| add.replica != *replica));
                MembershipChange::RemoveLearners(all)
            }
        };
        self.count("changes that make no sense");
        self.ask(shard, node, conf, change);
    }

    /// Decides what is to become of a shard; `calm`: nothing, if it is well.
    fn begin_move(&mut self, shard: ShardId, calm: bool) {
        let Some(plan) = self.operator.plans.get(&shard) else { return };
        if is_joint(&plan.members) || (!calm && self.dice.chance(500)) {
            return;
        }
        let sound =
            |member: &Member| !self.is_lost(member.node) && !self.has_rotten_log(member.node, member.replica);
        let members = plan.members.clone();
        let mut free: Vec<NodeId> = self.living();
        free.retain(|node| members.iter().all(|member| member.node != *node));
        let (mut stay, mut go): (Vec<Member>, Vec<Member>) =
            members.iter().partition(|member| sound(member) && member.role == MemberRole::Voter);
        let mut wanted = go.iter().filter(|member| member.role == MemberRole::Voter).count();
        if !calm {
            // Some of those that could stay go too, and the number changes now and then.
            stay.retain(|member| {
                let stays = self.dice.chance(700);
                if !stays {
                    go.push(*member);
                }
                stays
            });
            let size = [members.len(), 1, 3, 3, 5][self.dice.below(5)];
            while stay.len() > size {
                let one = self.dice.below(stay.len());
                go.push(stay.remove(one));
            }
            wanted = size - stay.len();
        }
        let mut adds = Vec::new();
        while adds.len() < wanted && !free.is_empty() {
            let node = free.remove(self.dice.below(free.len()));
            let replica = match self.options.planted.is(Planted::ReplicaIdReused) {
                false => self.operator.next_replica(),
                true => {
                    let last = members.iter().chain(&adds).map(|member| member.replica).max();
                    ReplicaId(last.unwrap_or_default().0 + 1)
                }
            };
            adds.push(Member { replica, node, role: MemberRole::Learner });
        }
        if stay.is_empty() && adds.is_empty() {
            return;
        }
        let removes: Vec<ReplicaId> = go.iter().map(|member| member.replica).collect();
        let Some(plan) = self.operator.plans.get_mut(&shard) else { return };
        if adds.is_empty() && removes.is_empty() {
            return;
        }
        note!(
            self.trace,
            "{} operator moves shard {}: {:?}",
            self.clock.now,
            shard,
            Shown((&adds, &removes))
        );
        plan.adds = adds;
        plan.removes = removes;
        self.count("moves begun");
        self.order_replicas(shard);
    }

    /// The next step of the move of a shard.
    fn advance_move(&mut self, shard: ShardId, node: NodeId, leader: ReplicaId, calm: bool) {
        let gives_up = !calm && self.dice.chance(40);
        let Some(plan) = self.operator.plans.get_mut(&shard) else { return };
        if !plan.is_moving() || is_joint(&plan.members) {
            return;
        }
        let learners = |plan: &Plan, of: &[ReplicaId]| -> Vec<ReplicaId> {
            of.iter().copied().filter(|r| plan.role(*r) == Some(MemberRole::Learner)).collect()
        };
        // What has left again doesn't come back: another move may bring a new one. Who doesn't know of the newest members
        // can't tell one that has left from one that has come.
        let has_left = |plan: &Plan, add: &Member| {
            let Some(truth) = self.truths.get(&shard) else { return false };
            let newest = truth.members.newest().is_none_or(|newest| newest.conf <= plan.conf);
            newest && truth.members.had(add.replica) && plan.role(add.replica).is_none()
        };
        let left: Vec<Member> = plan.adds.iter().filter(|add| has_left(plan, add)).copied().collect();
        plan.adds.retain(|add| !left.contains(add));
        if plan.cancelling && plan.adds.is_empty() {
            plan.end();
            self.count("moves given up");
            self.order_replicas(shard);
            return;
        }
        let adds: Vec<ReplicaId> = plan.adds.iter().map(|add| add.replica).collect();
        let joined = adds.iter().any(|add| plan.role(*add) == Some(MemberRole::Voter));
        let nodes = &self.nodes;
        let is_dead = |add: &Member| {
            let node = nodes.get(&add.node).filter(|node| !node.lost);
            node.is_none_or(|node| node.disk.faulty.has_rotten_log(add.replica))
        };
        let dead = plan.adds.iter().any(is_dead);
        // Another replica came in between.
        let crowded = plan.adds.iter().any(|add| {
            plan.role(add.replica).is_none() && plan.members.iter().any(|member| member.node == add.node)
        });
        plan.cancelling = (plan.cancelling || gives_up || dead || crowded) && !joined && !adds.is_empty();
        plan.cancelling |= plan.waited > PATIENCE && !joined && !adds.is_empty();
        if joined {
            // Where a part has come for good, such are left out. Requests to add them are refused: those for
            // these members, since there would be two on a node, those for others as out of date.
            let members = plan.members.clone();
            let added = |add: &Member| members.iter().any(|member| member.replica == add.replica);
            let crowded = |add: &Member| members.iter().any(|member| member.node == add.node);
            plan.adds.retain(|add| added(add) || !crowded(add));
            // And so is a learner that will never come up: the next move removes it.
            let learns = |add: &Member| {
                let same = |member: &&Member| member.replica == add.replica;
                members.iter().find(same).is_some_and(|member| member.role == MemberRole::Learner)
            };
            plan.adds.retain(|add| !(learns(add) && is_dead(add)));
        }
        let conf = plan.conf;
        if plan.cancelling {
            let fenced = plan.fenced.is_some_and(|fenced| fenced <= conf);
            if fenced && adds.iter().all(|add| plan.role(*add).is_none()) {
                plan.end();
                self.count("moves given up");
                self.order_replicas(shard);
            } else {
                self.ask(shard, node, conf, MembershipChange::RemoveLearners(adds));
            }
            return;
        }
        let missing: Vec<Member> =
            plan.adds.iter().filter(|add| plan.role(add.replica).is_none()).copied().collect();
        if !missing.is_empty() {
            self.ask(shard, node, conf, MembershipChange::AddLearners(missing));
            return;
        }
        let superfluous = learners(plan, &plan.removes);
        if !superfluous.is_empty() {
            self.ask(shard, node, conf, MembershipChange::RemoveLearners(superfluous));
            return;
        }
        let promote = learners(plan, &adds);
        let remove: Vec<ReplicaId> =
            plan.removes.iter().copied().filter(|r| plan.role(*r).is_some()).collect();
        if promote.is_empty() && remove.is_empty() {
            plan.end();
            self.count("moves done");
            self.order_replicas(shard);
            return;
        }
        let after = exchanged(&plan.members, &promote, &remove);
        if !after.iter().any(|member| member.role.stays_voter()) {
            // Overtaken by a change that made no sense.
            plan.end();
            return;
        }
        let members = plan.members.clone();
        let heirs: Vec<ReplicaId> = (members.iter())
            .filter(|m| m.role == MemberRole::Voter && !remove.contains(&m.replica) && !self.is_damaged(m))
            .map(|m| m.replica)
            .collect();
        if !self.would_go_on(shard, &after, None) {
            // Not yet, or never.
            let Some(plan) = self.operator.plans.get_mut(&shard) else { return };
            plan.waited += 1;
            if plan.waited > PATIENCE {
                // Once some of those that come are voters, by a change that made no sense, nothing can be given
                // up. All are members by now, so no late request adds any: the next move removes the others.
                match promote.is_empty() || joined {
                    true => plan.end(),
                    false => plan.cancelling = true,
                }
            }
            return;
        }
        if remove.contains(&leader) && (calm || self.dice.chance(900)) {
            // Where none of the voters stays, those that come have to be voters before.
            match self.dice.pick(&heirs).copied() {
                Some(heir) => {
                    if let Some(replica) = self.replica(node, leader) {
                        replica.group.transfer(heir);
                        self.count("transfers");
                    }
                    self.queue_pump(node, leader);
                }
                None => {
                    self.ask(shard, node, conf, MembershipChange::Exchange { promote, remove: Vec::new() })
                }
            }
            return;
        }
        self.ask(shard, node, conf, MembershipChange::Exchange { promote, remove });
        if !calm && self.strikes_partitions() && self.dice.chance(200) {
            self.partition(node);
        }
    }
}
