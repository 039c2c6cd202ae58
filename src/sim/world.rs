//! The event loop: time, nodes, and the two phases of a run.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};

use super::checks::leaders::Leaders;
use super::checks::logs::Logs;
use super::checks::members::{Members, Replicas};
use super::checks::state::Truth;
use super::checks::{Violation, durable, linear, once};
use super::clients::CLIENTS_PER_SHARD;
use super::dice::Dice;
use super::faults::Faults;
use super::governor;
use super::history::{Action, Call, History, Told};
use super::network::Network;
use super::operator::{self, Operator};
use super::report::{Report, Trace, note};
use super::shell::{Node, NodeEvent};
use super::strikes::{FaultEvent, Striker};
use super::workload::{Client, KEYS};
use super::{SimOptions, Time};
use crate::codec::SleepWord;
use crate::group::types::Output;
use crate::ids::{DatabaseId, Epoch, Index, METADATA_SHARD, NodeId, ReplicaId, ShardId};
use crate::machine::MachineKind;
use crate::node::replicas::record_of;
use crate::placement::map::{ClusterMap, Member, MemberRole};
use crate::placement::ring::equal_ranges;
use crate::refusal::Refusal;
use crate::storage::log::{ReplicaPhase, ReplicaRecord};

/// The phase with faults ends after this time at the latest.
const SAFETY_MAX: Time = 120_000_000;
/// Without faults, each step of recovery ends within this time.
const LIVENESS_MAX: Time = 30_000_000;

/// Without faults, a governed cluster becomes what it should be within this time. A replica that can't be opened
/// is replaced after a minute, and steps that were refused are repeated after half of one.
const CONVERGENCE_MAX: Time = 400_000_000;

/// Something that will happen.
pub(super) enum Event {
    /// To a node; waits while the node is paused.
    Node(NodeId, NodeEvent),
    /// A client may begin its next operation.
    Begin(usize),
    /// A client tries its operation, again.
    Attempt(u64),
    /// A client gets an answer.
    Answer(u64, Result<Output, Refusal>),
    /// A client has waited long enough for an attempt.
    Timeout(u64),
    /// Something goes wrong, or is mended.
    Fault(FaultEvent),
    /// The operator looks at the cluster.
    Operate,
    /// The administrator of a governed cluster does.
    Administer,
}

/// Simulated time and what is to come.
pub(super) struct Clock {
    pub now: Time,
    next: u64,
    /// By time, then in the order of planning; with the place of the event, which stays where it is.
    queue: BinaryHeap<Reverse<(Time, u64, usize)>>,
    events: Vec<Option<Event>>,
    free: Vec<usize>,
}

impl Clock {
    fn new() -> Clock {
        Clock { now: 0, next: 0, queue: BinaryHeap::new(), events: Vec::new(), free: Vec::new() }
    }

    /// `event` happens `delay` from now, after what was planned for that moment before.
    pub fn after(&mut self, delay: Time, event: Event) {
        self.next += 1;
        let place = self.free.pop().unwrap_or_else(|| {
            self.events.push(None);
            self.events.len() - 1
        });
        self.events[place] = Some(event);
        self.queue.push(Reverse((self.now + delay, self.next, place)));
    }

    /// Time moves to the next event.
    fn advance(&mut self) -> Option<Event> {
        let Reverse((time, _, place)) = self.queue.pop()?;
        self.now = time;
        self.free.push(place);
        self.events[place].take()
    }
}

/// A simulated cluster and its clients.
pub struct World {
    pub(super) options: SimOptions,
    pub(super) clock: Clock,
    pub(super) dice: Dice,
    pub(super) network: Network,
    pub(super) nodes: BTreeMap<NodeId, Node>,
    pub(super) operator: Operator,
    pub(super) striker: Striker,
    pub(super) clients: Vec<Client>,
    pub(super) history: History,
    pub(super) leaders: Leaders,
    pub(super) logs: Logs,
    pub(super) truths: BTreeMap<ShardId, Truth>,
    /// Changes of members that some replica has in its log, or had: their entry, and what they make.
    pub(super) proposed: BTreeMap<ShardId, Vec<(Index, Vec<Member>)>>,
    pub(super) replicas: Replicas,
    /// What each replica has agreed to, of sleep, and in which term: a replica that is opened anew in the same process counts
    /// its attempts anew. A heartbeat that is late brings an earlier word again.
    pub(super) agreed: BTreeSet<(ReplicaId, u64, SleepWord)>,
    /// What each replica was asked last.
    pub(super) asked: BTreeMap<ReplicaId, SleepWord>,
    /// The newest map that the metadata shard has come to.
    pub(super) map: ClusterMap,
    pub(super) counts: BTreeMap<&'static str, u64>,
    pub(super) trace: Trace,
    events: u64,
    undecided: usize,
}

impl World {
    /// A cluster that has not started yet. Numbers that make no sense are moved to the nearest that do.
    pub fn new(mut options: SimOptions) -> World {
        options.nodes = options.nodes.max(1);
        options.shards = options.shards.max(1);
        options.replicas = options.replicas.clamp(1, options.nodes);
        let mut dice = Dice::new(options.seed);
        let mut nodes = BTreeMap::new();
        for id in (1..=options.nodes as u64).map(NodeId) {
            let tick = draw_tick(&mut dice, options.faults.drift);
            nodes.insert(id, Node::new(id, &options, tick));
        }
        let striker = Striker::new(&options.faults, &mut dice);
        let mut world = World {
            clock: Clock::new(),
            dice,
            network: Network::new(),
            nodes,
            operator: Operator::default(),
            striker,
            clients: Vec::new(),
            history: History::default(),
            leaders: Leaders::default(),
            logs: Logs::default(),
            truths: BTreeMap::new(),
            proposed: BTreeMap::new(),
            replicas: Replicas::default(),
            agreed: BTreeSet::new(),
            asked: BTreeMap::new(),
            map: ClusterMap::default(),
            counts: BTreeMap::new(),
            trace: Trace::new(options.trace),
            events: 0,
            undecided: 0,
            options,
        };
        if world.is_governed() {
            world.place_by_map();
        } else {
            world.place_shards();
        }
        world
    }

    /// The shards of a governed cluster, the metadata shard among them, where its first map has them.
    fn place_by_map(&mut self) {
        let SimOptions { nodes, shards, replicas, operations, .. } = self.options;
        let map = governor::first_map(&governor::first_commands(nodes, shards, replicas));
        for node in self.nodes.values_mut() {
            node.map = map.clone();
        }
        for shard in map.shards.values() {
            for member in &shard.members {
                if let Some(node) = self.nodes.get_mut(&member.node) {
                    node.records.push(record_of(shard, member.replica));
                }
            }
            self.operator.place(shard.id, shard.range, &shard.members);
            let members = Members::first(shard.epoch.conf, shard.members.clone());
            if shard.id == METADATA_SHARD {
                self.truths.insert(shard.id, Truth::of_metadata(members));
                continue;
            }
            self.truths.insert(shard.id, Truth::new(members));
            for _ in 0..CLIENTS_PER_SHARD {
                let budget = operations / (shards * CLIENTS_PER_SHARD);
                self.clients.push(Client::new(self.clients.len(), shard.id, budget));
            }
        }
    }

    fn place_shards(&mut self) {
        let SimOptions { nodes, shards, replicas, operations, .. } = self.options;
        let ranges = equal_ranges(u32::try_from(shards).unwrap_or(u32::MAX));
        for (at, range) in ranges.into_iter().enumerate() {
            let shard = ShardId(at as u64 + 1);
            let members: Vec<Member> = (0..replicas)
                .map(|copy| Member {
                    replica: ReplicaId(shard.0 * 100 + copy as u64 + 1),
                    node: NodeId(((at + copy) % nodes) as u64 + 1),
                    role: MemberRole::Voter,
                })
                .collect();
            for member in &members {
                if let Some(node) = self.nodes.get_mut(&member.node) {
                    node.records.push(ReplicaRecord {
                        replica: member.replica,
                        shard,
                        database: DatabaseId(1),
                        machine: MachineKind::Kv,
                        phase: ReplicaPhase::Active,
                        range,
                        epoch: Epoch { range: 1, conf: 1 },
                        members: members.clone(),
                        members_at: 0,
                        ordered_at: 0,
                        generation: 1,
                    });
                }
            }
            self.operator.place(shard, range, &members);
            self.truths.insert(shard, Truth::new(Members::first(1, members)));
            for _ in 0..CLIENTS_PER_SHARD {
                let budget = operations / (shards * CLIENTS_PER_SHARD);
                self.clients.push(Client::new(self.clients.len(), shard, budget));
            }
        }
    }

    /// Lives through both phases.
    pub(super) fn live(&mut self) -> Result<(), Violation> {
        for id in self.nodes.keys().copied().collect::<Vec<_>>() {
            if let Some(node) = self.nodes.get_mut(&id) {
                let records = node.records.clone();
                node.disk.create(&records).map_err(|e| Violation::new("disk", e.to_string()))?;
                for record in &records {
                    self.replicas.make(record.replica, id)?;
                }
            }
            self.clock.after(0, Event::Node(id, NodeEvent::Start));
        }
        for client in 0..self.clients.len() {
            let delay = self.dice.between(0, 2_000_000);
            self.clock.after(delay, Event::Begin(client));
        }
        self.clock.after(0, Event::Fault(FaultEvent::Strike));
        if self.is_governed() {
            self.clock.after(operator::FIRST, Event::Administer);
        } else if self.options.faults.membership {
            self.clock.after(operator::FIRST, Event::Operate);
        }
        while self.clock.now < SAFETY_MAX && !self.clients.iter().all(Client::is_idle) {
            self.step()?;
        }
        self.end_faults();
        self.recover()?;
        note!(self.trace, "{} checks the history", self.clock.now);
        durable::check(&self.history.calls, &self.truths)?;
        once::check(&self.history.calls, &self.truths)?;
        let effect = |call: &Call| self.truths.get(&call.shard).and_then(|truth| truth.effects.of(call));
        self.undecided = linear::check(&self.history.calls, effect)?.undecided;
        self.check_flapping()
    }

    /// Pre-vote and check-quorum: a node that comes and goes takes no leadership from others. Each shard
    /// has a first leader, and another one if that was on the node.
    fn check_flapping(&self) -> Result<(), Violation> {
        let others = Faults { flapping: false, ..self.options.faults };
        let (elections, most) = (self.leaders.elections(), 2 * self.options.shards as u64);
        if others != Faults::NONE || self.options.replicas < 3 || elections <= most {
            return Ok(());
        }
        Err(Violation::new("flapping", format!("{elections} elections, no more than {most} were needed")))
    }

    /// The phase without faults: everything must work again, within bounds.
    fn recover(&mut self) -> Result<(), Violation> {
        for client in &mut self.clients {
            client.budget = 0;
        }
        self.run_until("a shard has no leader", World::every_shard_is_led)?;
        self.run_until("a client waits for an answer", |world| world.clients.iter().all(Client::is_idle))?;
        if self.is_governed() {
            self.run_within(CONVERGENCE_MAX, "the cluster isn't as its map wants it", World::is_well)?;
        } else if self.options.faults.membership {
            // The operator brings what it has begun to an end, and replaces what is gone for good.
            self.run_until("the members of a shard are not in place", World::members_in_place)?;
        }
        let mut scripts = Vec::new();
        for shard in self.truths.keys().copied().filter(|shard| *shard != METADATA_SHARD).collect::<Vec<_>>()
        {
            let mut client = Client::new(self.clients.len(), shard, 0);
            for key in 0..KEYS {
                let value = client.next_value();
                client.script.extend([(key, Action::Get), (key, Action::Put(value)), (key, Action::Get)]);
            }
            scripts.push(client.script.len());
            self.clock.after(0, Event::Begin(self.clients.len()));
            self.clients.push(client);
        }
        self.run_until("a new operation does not succeed", |world| {
            let last = world.clients.iter().rev().take(world.options.shards);
            last.zip(scripts.iter().rev()).all(|(client, wanted)| client.scripted == *wanted)
        })?;
        self.run_until("the replicas of a shard are not equal", World::replicas_agree)?;
        self.run_until("a submitted operation does not end", |world| {
            world.nodes.values().all(|node| node.open_tokens().next().is_none())
        })?;
        Ok(())
    }

    fn run_until(&mut self, otherwise: &str, done: impl FnMut(&World) -> bool) -> Result<(), Violation> {
        self.run_within(LIVENESS_MAX, otherwise, done)
    }

    fn run_within(
        &mut self,
        most: Time,
        otherwise: &str,
        mut done: impl FnMut(&World) -> bool,
    ) -> Result<(), Violation> {
        let deadline = self.clock.now + most;
        while !done(self) {
            if self.clock.now > deadline {
                let seconds = most / 1_000_000;
                let detail = format!("{otherwise}, {seconds} s after it should; {}", self.describe());
                return Err(Violation::new("liveness", detail));
            }
            // Looking after each single event would cost more than the events.
            for _ in 0..50 {
                self.step()?;
            }
        }
        Ok(())
    }

    pub(super) fn every_shard_is_led(&self) -> bool {
        let led = |shard: &ShardId| self.members(*shard).iter().any(|member| self.leads(member));
        self.truths.keys().all(led)
    }

    fn replicas_agree(&self) -> bool {
        self.truths.iter().all(|(shard, truth)| {
            let last = truth.last();
            let members = self.members(*shard).iter().filter(|member| !self.is_lost(member.node));
            let mut sound = members.filter(|member| !self.has_rotten_log(member.node, member.replica));
            sound.all(|member| {
                let node = self.nodes.get(&member.node);
                node.and_then(|node| node.applied(member.replica)) == Some(last)
            })
        })
    }

    /// A new node's tick.
    pub(super) fn draw_tick(&mut self) -> Time {
        draw_tick(&mut self.dice, self.options.faults.drift)
    }

    fn leads(&self, member: &Member) -> bool {
        let node = self.nodes.get(&member.node);
        node.and_then(|node| node.replica(member.replica)).is_some_and(|replica| replica.group.leads())
    }

    fn describe(&self) -> String {
        let mut text = self.describe_map();
        for node in self.nodes.values() {
            for (replica, token) in node.open_tokens() {
                text += &format!("\n  operation {token:x} waits at replica {replica}");
            }
            text += &format!("\n  node {}: {}", node.id, node.describe());
        }
        text
    }

    /// One event.
    fn step(&mut self) -> Result<(), Violation> {
        let Some(event) = self.clock.advance() else {
            return Err(Violation::new("liveness", "nothing will ever happen again"));
        };
        let time = self.clock.now;
        self.events += 1;
        match event {
            Event::Node(id, event) => {
                let paused_until = self.nodes.get(&id).map_or(0, |node| node.paused_until);
                if paused_until > time {
                    self.clock.after(paused_until - time, Event::Node(id, event));
                    return Ok(());
                }
                self.on_node_event(id, event)
            }
            Event::Begin(client) => {
                self.begin(client);
                Ok(())
            }
            Event::Attempt(token) => {
                self.attempt(token);
                Ok(())
            }
            Event::Answer(token, result) => self.on_answer(token, result),
            Event::Timeout(token) => {
                self.on_timeout(token);
                Ok(())
            }
            Event::Fault(event) => self.on_fault(event),
            Event::Operate => {
                self.operate();
                Ok(())
            }
            Event::Administer => {
                self.administer();
                Ok(())
            }
        }
    }

    /// One more of what the report counts.
    pub(super) fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    // ----------------------------------------------------------------------------------- report

    pub(super) fn into_report(mut self, violation: Option<Violation>) -> Report {
        let mut operations: BTreeMap<&'static str, u64> = BTreeMap::new();
        for call in &self.history.calls {
            let kind = match call.told {
                Told::Unknown if call.action == Action::Get => "unanswered",
                Told::Unknown => "unknown",
                Told::Refused => "refused",
                _ => "answered",
            };
            *operations.entry(kind).or_default() += 1;
        }
        self.counts.insert("elections", self.leaders.elections());
        let changes = self.truths.values().map(|truth| truth.members.changes()).sum();
        self.counts.insert("changes of members", changes);
        self.counts.insert("entries", self.truths.values().map(|t| t.last()).sum());
        Report {
            options: self.options,
            violation,
            counts: self.counts,
            time: self.clock.now,
            events: self.events,
            operations,
            undecided: self.undecided,
            trace_hash: self.trace.hash(),
            trace: self.trace.into_lines(),
        }
    }
}

fn draw_tick(dice: &mut Dice, drift: bool) -> Time {
    let drift = if drift { (70, 140) } else { (98, 102) };
    crate::limits::TICK_MS * 10 * dice.between(drift.0, drift.1)
}
