//! What goes wrong, and when.

use std::collections::BTreeSet;

use super::Time;
use super::checks::Violation;
use super::dice::Dice;
use super::network::Quality;
use super::shell::{NodeEvent, ReplicaEvent};
use super::world::{Event, World};
use crate::ids::{NodeId, ReplicaId, ShardId};
use crate::storage::engine_memory::CrashLoss;

/// Which kinds of faults happen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Faults {
    /// Messages are lost, doubled, late and out of order; what clients send is late.
    pub messages: bool,
    /// Links carry nothing for a while, in both directions or in one.
    pub partitions: bool,
    /// Processes end and start again.
    pub crashes: bool,
    /// Crashes take unsynced writes with them.
    pub power: bool,
    /// Processes stand still for a while.
    pub pauses: bool,
    /// Leadership is handed over.
    pub transfers: bool,
    /// Disks are slow for a while.
    pub slow_disks: bool,
    /// Replicas stop applying for a while, for want of memory.
    pub memory: bool,
    /// Single replicas end and are opened again.
    pub replicas: bool,
    /// Replicas begin elections without a reason.
    pub campaigns: bool,
    /// Time passes at different speeds.
    pub drift: bool,
}

impl Faults {
    /// None.
    pub const NONE: Faults = Faults {
        messages: false,
        partitions: false,
        crashes: false,
        power: false,
        pauses: false,
        transfers: false,
        slow_disks: false,
        memory: false,
        replicas: false,
        campaigns: false,
        drift: false,
    };

    /// All.
    pub const ALL: Faults = Faults {
        messages: true,
        partitions: true,
        crashes: true,
        power: true,
        pauses: true,
        transfers: true,
        slow_disks: true,
        memory: true,
        replicas: true,
        campaigns: true,
        drift: true,
    };

    /// Their names, in the order of the fields.
    pub const NAMES: [&'static str; 11] = [
        "messages",
        "partitions",
        "crashes",
        "power",
        "pauses",
        "transfers",
        "slow-disks",
        "memory",
        "replicas",
        "campaigns",
        "drift",
    ];

    fn switch(&mut self, name: &str) -> Option<&mut bool> {
        Some(match name {
            "messages" => &mut self.messages,
            "partitions" => &mut self.partitions,
            "crashes" => &mut self.crashes,
            "power" => &mut self.power,
            "pauses" => &mut self.pauses,
            "transfers" => &mut self.transfers,
            "slow-disks" => &mut self.slow_disks,
            "memory" => &mut self.memory,
            "replicas" => &mut self.replicas,
            "campaigns" => &mut self.campaigns,
            "drift" => &mut self.drift,
            _ => return None,
        })
    }

    /// Reads a list of names separated by commas; `all` and `none` are lists too. The error is the name
    /// that is none.
    pub fn parse(list: &str) -> Result<Faults, String> {
        let mut faults = Faults::NONE;
        for name in list.split(',').map(str::trim) {
            match (name, faults.switch(name)) {
                (_, Some(on)) => *on = true,
                ("all", _) => faults = Faults::ALL,
                ("none" | "", _) => {}
                _ => return Err(name.to_owned()),
            }
        }
        Ok(faults)
    }

    /// The names of those that are on, separated by commas.
    pub fn names(mut self) -> String {
        let on = Faults::NAMES.iter().filter(|name| self.switch(name).is_some_and(|on| *on));
        let on: Vec<&str> = on.copied().collect();
        if on.is_empty() { "none".into() } else { on.join(",") }
    }

    /// Each with an even chance.
    pub(super) fn some(dice: &mut Dice) -> Faults {
        let mut toss = || dice.chance(500);
        Faults {
            messages: toss(),
            partitions: toss(),
            crashes: toss(),
            power: toss(),
            pauses: toss(),
            transfers: toss(),
            slow_disks: toss(),
            memory: toss(),
            replicas: toss(),
            campaigns: toss(),
            drift: toss(),
        }
    }
}

/// A kind of fault that strikes at a moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Messages,
    Partition,
    Crash,
    Pause,
    Transfer,
    SlowDisk,
    Memory,
    Replica,
    Campaign,
}

/// Something goes wrong, or is mended.
#[derive(Clone, Copy, Debug)]
pub(super) enum FaultEvent {
    /// The next fault.
    Strike,
    /// A partition ends.
    Heal(u64),
    /// Messages are treated well again.
    Calm,
    /// A disk is fast again.
    FastDisk(NodeId),
    /// A replica is told to hand leadership over, if it leads.
    Transfer(NodeId, ReplicaId),
    /// A replica ends.
    CrashReplica(NodeId, ReplicaId),
}

/// Chooses faults.
pub(super) struct Striker {
    kinds: Vec<Kind>,
    power: bool,
    /// Greatest time between two faults.
    every: Time,
    partitions: u64,
    over: bool,
}

impl Striker {
    pub fn new(faults: &Faults, dice: &mut Dice) -> Striker {
        let kinds = [
            (faults.messages, Kind::Messages),
            (faults.partitions, Kind::Partition),
            (faults.crashes, Kind::Crash),
            (faults.pauses, Kind::Pause),
            (faults.transfers, Kind::Transfer),
            (faults.slow_disks, Kind::SlowDisk),
            (faults.memory, Kind::Memory),
            (faults.replicas, Kind::Replica),
            (faults.campaigns, Kind::Campaign),
        ];
        let kinds = kinds.into_iter().filter(|(on, _)| *on).map(|(_, kind)| kind).collect();
        let every = [500_000, 2_000_000, 6_000_000][dice.below(3)];
        Striker { kinds, power: faults.power, every, partitions: 0, over: false }
    }
}

impl World {
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
            FaultEvent::Calm => self.network.quality = Quality::GOOD,
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
        self.trace.note(format_args!("{now} {kind:?} strikes node {node} replica {replica}"));
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
            Kind::Partition => self.partition(node),
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
                    self.crash(victim, loss, back)?;
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
        let voters = self.members.values().find(|members| members.iter().any(|m| m.replica == replica));
        let voters: Vec<_> = voters.into_iter().flatten().filter(|m| m.replica != replica).collect();
        if let Some(voter) = self.dice.pick(&voters).filter(|_| self.striker.kinds.contains(&Kind::Replica)) {
            let delay = self.dice.between(1_000, 100_000);
            self.clock.after(delay, Event::Fault(FaultEvent::CrashReplica(voter.node, voter.replica)));
            self.count("contests");
        }
    }

    /// A node and one of its replicas: often the leader of a shard, since that hurts most.
    fn victim(&mut self) -> Option<(NodeId, ReplicaId)> {
        let shards: Vec<ShardId> = self.members.keys().copied().collect();
        let shard = *self.dice.pick(&shards)?;
        let members = self.members.get(&shard)?;
        let leads = |node| self.nodes.get(&node).is_some_and(|node| node.leads(shard));
        let leader = members.iter().find(|member| leads(member.node));
        let member = match leader {
            Some(leader) if self.dice.chance(500) => leader,
            _ => self.dice.pick(members)?,
        };
        Some((member.node, member.replica))
    }

    fn partition(&mut self, node: NodeId) {
        let nodes: Vec<NodeId> = self.nodes.keys().copied().collect();
        let Some(&other) = self.dice.pick(&nodes) else { return };
        let shape = self.dice.below(5);
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
                    _ => side.contains(&from) != side.contains(&to),
                };
                if blocked {
                    links.insert((from, to));
                }
            }
        }
        self.striker.partitions += 1;
        let partition = self.striker.partitions;
        self.network.block(partition, links);
        self.count("partitions");
        let until = self.dice.between(50_000, 6_000_000);
        self.clock.after(until, Event::Fault(FaultEvent::Heal(partition)));
    }

    /// Nothing goes wrong from now on, and what is broken is mended.
    pub(super) fn end_faults(&mut self) {
        self.trace.note(format_args!("{} faults end", self.clock.now));
        self.striker.over = true;
        self.network.repair();
        let mut resume = Vec::new();
        for (id, node) in &mut self.nodes {
            node.paused_until = 0;
            node.slow = false;
            if node.process.is_none() {
                self.clock.after(0, Event::Node(*id, NodeEvent::Start));
            }
            for (replica, of) in node.process.iter_mut().flat_map(|p| p.replicas.iter_mut()) {
                of.group.pause_apply(false);
                resume.push((*id, *replica));
            }
        }
        resume.into_iter().for_each(|(node, replica)| self.queue_pump(node, replica));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_names_are_read_back() {
        for faults in [Faults::NONE, Faults::ALL, Faults { power: true, slow_disks: true, ..Faults::NONE }] {
            assert_eq!(Faults::parse(&faults.names()), Ok(faults));
        }
        assert_eq!(Faults::parse("all"), Ok(Faults::ALL));
        assert_eq!(Faults::NAMES.join(","), Faults::ALL.names());
        assert_eq!(Faults::parse("crashes,floods"), Err("floods".into()));
    }
}
