//! When faults strike, and whom.

use std::collections::BTreeSet;

use super::Time;
use super::checks::Violation;
use super::checks::members::majority;
use super::dice::Dice;
use super::faults::Faults;
use super::network::{Block, Quality};
use super::report::{Shown, note};
use super::shell::{Boundary, NodeEvent, ReplicaEvent};
use super::world::{Event, World};
use crate::ids::{NodeId, Position, ReplicaId, ShardId};
use crate::placement::map::Member;
use crate::storage::StorageError;
use crate::storage::engine_memory::CrashLoss;
use crate::storage::log::{LogState, LogStore};

/// A kind of fault that strikes at a moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Messages,
    Corruption,
    Partition,
    HalfOpen,
    Flapping,
    Crash,
    ReadErrors,
    Rot,
    Pause,
    Transfer,
    SlowDisk,
    Memory,
    Replica,
    Campaign,
    StateLoss,
    Boundary,
    Newcomer,
    NodeLoss,
    Refusal,
}

/// Something goes wrong, or is mended.
#[derive(Clone, Copy, Debug)]
pub(super) enum FaultEvent {
    /// The next fault.
    Strike,
    /// A partition ends.
    Heal(u64),
    /// The links of a node come back or go away, so many times more.
    Flap(NodeId, u64),
    /// Messages are treated well again.
    Calm,
    /// Frames arrive whole again.
    Whole,
    /// A disk is fast again.
    FastDisk(NodeId),
    /// A disk can be read again.
    ReadableDisk(NodeId),
    /// A replica is told to hand leadership over, if it leads.
    Transfer(NodeId, ReplicaId),
    /// A replica ends.
    CrashReplica(NodeId, ReplicaId),
}

/// Chooses faults.
pub(super) struct Striker {
    kinds: Vec<Kind>,
    power: bool,
    torn: bool,
    /// The node whose links flap, if one does.
    flapping: Option<NodeId>,
    /// Greatest time between two faults.
    every: Time,
    partitions: u64,
    over: bool,
}

impl Striker {
    pub fn new(faults: &Faults, dice: &mut Dice) -> Striker {
        let kinds = [
            (faults.messages, Kind::Messages),
            (faults.corruption, Kind::Corruption),
            (faults.partitions, Kind::Partition),
            (faults.half_open, Kind::HalfOpen),
            (faults.flapping, Kind::Flapping),
            (faults.crashes, Kind::Crash),
            (faults.eio, Kind::ReadErrors),
            (faults.rot, Kind::Rot),
            (faults.pauses, Kind::Pause),
            (faults.transfers, Kind::Transfer),
            (faults.slow_disks, Kind::SlowDisk),
            (faults.memory, Kind::Memory),
            (faults.replicas, Kind::Replica),
            (faults.campaigns, Kind::Campaign),
            (faults.state_loss, Kind::StateLoss),
            (faults.boundaries, Kind::Boundary),
            (faults.newcomers, Kind::Newcomer),
            (faults.node_loss, Kind::NodeLoss),
            (faults.refusals, Kind::Refusal),
        ];
        let kinds = kinds.into_iter().filter(|(on, _)| *on).map(|(_, kind)| kind).collect();
        let every = [500_000, 2_000_000, 6_000_000][dice.below(3)];
        let (power, torn) = (faults.power, faults.torn);
        Striker { kinds, power, torn, flapping: None, every, partitions: 0, over: false }
    }
}

impl World {
    /// Whether nothing goes wrong any more.
    pub(super) fn faults_are_over(&self) -> bool {
        self.striker.over
    }

    /// Whether links go down in this run.
    pub(super) fn strikes_partitions(&self) -> bool {
        self.striker.kinds.contains(&Kind::Partition)
    }

    pub(super) fn on_fault(&mut self, event: FaultEvent) -> Result<(), Violation> {
        if self.striker.over {
            return Ok(());
        }
        match event {
            FaultEvent::Strike => {
                let delay = self.dice.between(1_000, self.striker.every);
                self.clock.after(delay, Event::Fault(FaultEvent::Strike));
                if let Some(kind) = self.dice.pick(&self.striker.kinds).copied() {
                    self.strike(kind)?;
                }
            }
            FaultEvent::Heal(partition) => self.network.heal(partition),
            FaultEvent::Flap(node, left) => self.flap(node, left),
            FaultEvent::Calm => self.network.quality = Quality::GOOD,
            FaultEvent::Whole => self.network.corrupted = 0,
            FaultEvent::ReadableDisk(node) => {
                if let Some(node) = self.nodes.get_mut(&node) {
                    node.unreadable = false;
                }
            }
            FaultEvent::Transfer(node, replica) => self.transfer(node, replica),
            FaultEvent::CrashReplica(node, replica) => self.crash_replica(node, replica),
            FaultEvent::FastDisk(node) => {
                if let Some(node) = self.nodes.get_mut(&node) {
                    node.slow = false;
                }
            }
        }
        Ok(())
    }

    fn strike(&mut self, kind: Kind) -> Result<(), Violation> {
        let now = self.clock.now;
        let Some((node, replica)) = self.victim() else { return Ok(()) };
        note!(self.trace, "{} {:?} strikes node {} replica {}", now, Shown(kind), node, replica);
        match kind {
            Kind::Messages => {
                self.count("bad network");
                self.network.quality = Quality {
                    lost: [0, 10, 100, 300][self.dice.below(4)],
                    duplicated: [0, 10, 200][self.dice.below(3)],
                    delay_max: [1_000, 20_000, 300_000, 2_000_000][self.dice.below(4)],
                    reordered: self.dice.chance(700),
                };
                let until = self.dice.between(100_000, 4_000_000);
                self.clock.after(until, Event::Fault(FaultEvent::Calm));
            }
            Kind::Corruption => {
                self.count("corrupting network");
                self.network.corrupted = [5, 50, 300][self.dice.below(3)];
                let until = self.dice.between(100_000, 4_000_000);
                self.clock.after(until, Event::Fault(FaultEvent::Whole));
            }
            Kind::Partition => self.partition(node),
            Kind::HalfOpen => self.half_open(node),
            Kind::Flapping => self.begin_flapping(node),
            Kind::ReadErrors => {
                self.count("unreadable disks");
                if let Some(node) = self.nodes.get_mut(&node) {
                    node.unreadable = true;
                }
                let until = self.dice.between(10_000, 2_000_000);
                self.clock.after(until, Event::Fault(FaultEvent::ReadableDisk(node)));
            }
            Kind::Rot => self.rot(node, replica)?,
            Kind::StateLoss => self.lose_state(node)?,
            Kind::Newcomer => self.join(),
            Kind::NodeLoss => self.lose_node(node)?,
            Kind::Crash => {
                self.count("crashes");
                let victims: Vec<NodeId> = match self.dice.below(20) {
                    0 => self.nodes.keys().copied().collect(),
                    _ => vec![node],
                };
                for victim in victims {
                    let loss = match (self.striker.power, self.dice.below(3)) {
                        (false, _) | (_, 0) => CrashLoss::Nothing,
                        (_, 1) => CrashLoss::Everything,
                        _ => CrashLoss::Random(self.dice.any()),
                    };
                    let back = [20_000, 500_000, 6_000_000][self.dice.below(3)];
                    let back = self.dice.between(10_000, back);
                    let torn = self.striker.torn && self.dice.chance(700);
                    self.crash(victim, loss, torn, back)?;
                }
            }
            Kind::Refusal => {
                if let Some(number) = self.nodes.get(&node).and_then(|node| node.process_number()) {
                    self.count("living nodes taken for gone");
                    self.tell_gone(node, number, 50_000);
                }
            }
            Kind::Pause => {
                self.count("pauses");
                let until = now + self.dice.between(10_000, 5_000_000);
                if let Some(node) = self.nodes.get_mut(&node) {
                    node.paused_until = until;
                }
            }
            Kind::Transfer => {
                self.transfer(node, replica);
                if self.dice.chance(400) {
                    self.contest(node, replica);
                }
            }
            Kind::SlowDisk => {
                self.count("slow disks");
                if let Some(node) = self.nodes.get_mut(&node) {
                    node.slow = true;
                }
                let until = self.dice.between(100_000, 5_000_000);
                self.clock.after(until, Event::Fault(FaultEvent::FastDisk(node)));
            }
            Kind::Memory => {
                let until = self.dice.between(10_000, 3_000_000);
                if let Some(of) = self.replica(node, replica) {
                    of.group.pause_apply(true);
                    let event = NodeEvent::Replica(replica, of.incarnation, ReplicaEvent::ResumeApply);
                    self.clock.after(until, Event::Node(node, event));
                    self.count("apply pauses");
                }
            }
            Kind::Replica => {
                self.count("replica crashes");
                self.crash_replica(node, replica);
            }
            Kind::Boundary => {
                let boundary = self.dice.pick(&Boundary::ALL).copied();
                if let Some(replica) = self.replica(node, replica) {
                    replica.dies = boundary;
                }
            }
            Kind::Campaign => {
                if let Some(replica) = self.replica(node, replica) {
                    let campaign = replica.group.campaign();
                    campaign.map_err(|e| Violation::new("replica", format!("campaign: {e}")))?;
                    self.count("campaigns");
                }
                self.queue_pump(node, replica);
            }
        }
        Ok(())
    }

    fn transfer(&mut self, node: NodeId, replica: ReplicaId) {
        let successors = self.replica(node, replica).map(|r| r.group.successors());
        let to = successors.and_then(|all| self.dice.pick(&all).copied());
        if let (Some(to), Some(replica)) = (to, self.replica(node, replica)) {
            replica.group.transfer(to);
            self.count("transfers");
        }
        self.queue_pump(node, replica);
    }

    /// Two replicas are told to take over in the same term, and a third forgets what isn't on disk.
    fn contest(&mut self, node: NodeId, replica: ReplicaId) {
        let delay = self.dice.between(200, 3_000);
        self.clock.after(delay, Event::Fault(FaultEvent::Transfer(node, replica)));
        let members = self.shard_of(node, replica).map_or(&[][..], |shard| self.members(shard));
        let voters: Vec<Member> = members.iter().filter(|m| m.replica != replica).copied().collect();
        if let Some(voter) = self.dice.pick(&voters).filter(|_| self.striker.kinds.contains(&Kind::Replica)) {
            let delay = self.dice.between(1_000, 100_000);
            self.clock.after(delay, Event::Fault(FaultEvent::CrashReplica(voter.node, voter.replica)));
            self.count("contests");
        }
    }

    /// A node and one of its replicas: often the leader of a shard, since that hurts most.
    fn victim(&mut self) -> Option<(NodeId, ReplicaId)> {
        let shards: Vec<ShardId> = self.truths.keys().copied().collect();
        let shard = *self.dice.pick(&shards)?;
        let members = &self.truths.get(&shard)?.members.newest()?.members;
        let leads = |node| self.nodes.get(&node).is_some_and(|node| node.leads(shard));
        let leader = members.iter().find(|member| leads(member.node));
        let member = match leader {
            Some(leader) if self.dice.chance(500) => leader,
            _ => self.dice.pick(members)?,
        };
        Some((member.node, member.replica))
    }

    pub(super) fn partition(&mut self, node: NodeId) {
        let nodes: Vec<NodeId> = self.nodes.keys().copied().collect();
        let Some(&other) = self.dice.pick(&nodes) else { return };
        let shape = self.dice.below(6);
        let side: BTreeSet<NodeId> = nodes.iter().copied().filter(|_| self.dice.chance(500)).collect();
        let mut links = BTreeSet::new();
        for &from in &nodes {
            for &to in nodes.iter().filter(|to| **to != from) {
                let blocked = match shape {
                    // One node can't be reached, can't reach anybody, or both.
                    0 => to == node,
                    1 => from == node,
                    2 => from == node || to == node,
                    // Two nodes can't reach each other.
                    3 => (from == node && to == other) || (from == other && to == node),
                    // Two sides have only one node in common.
                    4 if from == node || to == node => false,
                    _ => side.contains(&from) != side.contains(&to),
                };
                if blocked {
                    links.insert((from, to));
                }
            }
        }
        self.count("partitions");
        let partition = self.block(links, Block::Partition);
        let until = self.dice.between(50_000, 6_000_000);
        self.clock.after(until, Event::Fault(FaultEvent::Heal(partition)));
    }

    fn block(&mut self, links: BTreeSet<(NodeId, NodeId)>, kind: Block) -> u64 {
        self.striker.partitions += 1;
        self.network.block(self.striker.partitions, links, kind);
        self.striker.partitions
    }

    /// A connection of a node is dead in one direction.
    fn half_open(&mut self, node: NodeId) {
        let others: Vec<NodeId> = self.nodes.keys().copied().filter(|other| *other != node).collect();
        let Some(&other) = self.dice.pick(&others) else { return };
        let link = if self.dice.chance(500) { (node, other) } else { (other, node) };
        self.count("half-open links");
        let partition = self.block(BTreeSet::from([link]), Block::HalfOpen);
        let until = self.dice.between(200_000, 20_000_000);
        self.clock.after(until, Event::Fault(FaultEvent::Heal(partition)));
    }

    /// The links of a node begin to flap, once every shard is led. It is one node in the whole run.
    fn begin_flapping(&mut self, node: NodeId) {
        let flaps = self.striker.flapping.is_some_and(|flapping| self.network.is_cut(flapping));
        if flaps || !self.every_shard_is_led() {
            return;
        }
        let node = *self.striker.flapping.get_or_insert(node);
        let times = self.dice.between(1, 20);
        self.flap(node, times);
    }

    fn flap(&mut self, node: NodeId, left: u64) {
        let away = self.network.is_cut(node);
        self.network.cut(node, !away);
        if !away {
            self.count("flaps");
        }
        // It comes back at last.
        if left > 0 || !away {
            let until = self.dice.between(20_000, 3_000_000);
            self.clock.after(until, Event::Fault(FaultEvent::Flap(node, left.saturating_sub(1))));
        }
    }

    /// A node crashes, and finds no state store when it is back, or an older copy; unless one of its
    /// replicas has what nobody else could give to the others.
    fn lose_state(&mut self, id: NodeId) -> Result<(), Violation> {
        let disk = |error: StorageError| Violation::new("disk", error.to_string());
        for node in self.nodes.values_mut() {
            if self.dice.chance(300) {
                node.disk.keep_copy().map_err(disk)?;
            }
        }
        let now = self.clock.now;
        let needs = |shard: &ShardId| {
            let held = self.possible(*shard).any(|group| group.iter().any(|member| member.node == id));
            let had = || self.possible(*shard).all(|group| self.state_is_had(*shard, group, id));
            held && (self.operator.exchanges(*shard, now) || !had())
        };
        if self.truths.keys().any(needs) {
            return Ok(());
        }
        let older = self.dice.chance(400);
        let back = self.dice.between(10_000, 2_000_000);
        self.crash(id, CrashLoss::Nothing, false, back)?;
        let Some(node) = self.nodes.get_mut(&id).filter(|node| node.process.is_none()) else { return Ok(()) };
        let older = node.disk.lose_state(older).map_err(disk)?;
        self.count(if older { "older copies of a state store" } else { "state stores lost" });
        Ok(())
    }

    /// Whether a group comes back without the state of its replica on a node: a majority can be opened, with
    /// a state or without, and some other replica has its own and a log that reaches to where those of the
    /// replicas without one begin.
    fn state_is_had(&self, shard: ShardId, group: &[Member], id: NodeId) -> bool {
        let log_of = |member: &Member| self.nodes.get(&member.node)?.disk.log.load(member.replica).ok();
        let opens = |member: &Member| {
            !self.is_lost(member.node)
                && !self.is_rotten(member.node, member.replica)
                && self.knows_members(shard, member)
        };
        let voters = group.iter().filter(|member| member.role.votes() && !self.is_lost(member.node));
        let (lost, whole): (Vec<_>, Vec<_>) =
            voters.partition(|member| member.node == id || self.is_damaged(member));
        let begin: Option<Vec<Position>> =
            lost.into_iter().map(|member| Some(log_of(member)?.truncated)).collect();
        let Some(begin) = begin.and_then(|all| all.into_iter().max_by_key(|at| at.index)) else {
            return false;
        };
        let reaches = |log: LogState| {
            let run = log.terms.partition_point(|&(first, _)| first <= begin.index);
            let term = run.checked_sub(1).and_then(|run| log.terms.get(run)).map(|&(_, term)| term);
            log.truncated.index >= begin.index || log.last >= begin.index && term == Some(begin.term)
        };
        majority(group, opens) && whole.into_iter().filter_map(log_of).any(reaches)
    }

    /// Whether something of a replica is rotten, or its state is lost.
    pub(super) fn is_damaged(&self, member: &Member) -> bool {
        let Some(node) = self.nodes.get(&member.node).filter(|node| !node.lost) else { return true };
        let lacks_state = node.record(member.replica).is_none_or(|record| node.disk.lacks_state(record));
        lacks_state || self.is_rotten(member.node, member.replica)
    }

    /// A record of a replica rots, unless the others of its group need it.
    fn rot(&mut self, id: NodeId, replica: ReplicaId) -> Result<(), Violation> {
        let Some(shard) = self.shard_of(id, replica) else { return Ok(()) };
        if self.is_rotten(id, replica) || !self.can_spare(shard, id) {
            return Ok(());
        }
        self.count("rotten replicas");
        if let Some(node) = self.nodes.get_mut(&id) {
            let rots = node.disk.rot(replica, &mut self.dice);
            rots.map_err(|e| Violation::new("disk", e.to_string()))?;
        }
        // If nobody reads it before.
        let delay = self.dice.between(1_000, 5_000_000);
        self.clock.after(delay, Event::Fault(FaultEvent::CrashReplica(id, replica)));
        Ok(())
    }

    /// Whether a replica can't be opened any more.
    pub(super) fn has_rotten_log(&self, node: NodeId, replica: ReplicaId) -> bool {
        self.nodes.get(&node).is_some_and(|node| node.disk.faulty.has_rotten_log(replica))
    }

    /// Whether a replica has a record that can't be read any more.
    pub(super) fn is_rotten(&self, node: NodeId, replica: ReplicaId) -> bool {
        self.nodes.get(&node).is_some_and(|node| node.disk.faulty.is_rotten(replica))
    }

    /// Nothing goes wrong from now on, and what is broken is mended.
    pub(super) fn end_faults(&mut self) {
        note!(self.trace, "{} faults end", self.clock.now);
        self.striker.over = true;
        self.network.repair();
        let mut resume = Vec::new();
        for (id, node) in &mut self.nodes {
            node.paused_until = 0;
            node.slow = false;
            node.unreadable = false;
            if node.process.is_none() {
                self.clock.after(0, Event::Node(*id, NodeEvent::Start));
            }
            for (replica, of) in node.process.iter_mut().flat_map(|p| p.replicas.iter_mut()) {
                of.group.pause_apply(false);
                resume.push((*id, *replica));
            }
        }
        for (node, replica) in resume {
            self.queue_pump(node, replica);
            // What nobody has read is read now.
            if self.is_rotten(node, replica) {
                self.crash_replica(node, replica);
            }
        }
    }
}
