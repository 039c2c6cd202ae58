//! A cluster that governs itself: the metadata shard is one of its groups, each node has a map and obeys it, and
//! the node that leads the metadata shard runs the reconciler.
//!
//! ```text
//!   applied commands ─► map of a metadata replica's node ─► maps of others, now and then ─► replicas made, removed
//!   surveys of nodes ─► Reconciler::step ─► commands for the metadata shard, orders for leaders
//! ```
//!
//! Surveys, orders and maps travel over the simulated network: late, out of order, or not at all. What a node
//! makes of a map is decided by [`crate::node::replicas`], as in a real one.

use std::collections::BTreeMap;

use super::Time;
use super::checks::Violation;
use super::network::Fate;
use super::operator::{Request, exchanged};
use super::planted::Planted;
use super::report::{Shown, note};
use super::shell::{NodeEvent, Replica};
use super::world::{Event, World};
use crate::balance::facts::{Action, ShardReport, SickReplica, Survey};
use crate::balance::reconciler::Reconciler;
use crate::group::types::{MembershipChange, Operation};
use crate::ids::{ClusterId, Epoch, METADATA_DATABASE, METADATA_SHARD, NodeId, ReplicaId, ShardId, StoreId};
use crate::limits;
use crate::machine::command::{Command, MetaCommand};
use crate::machine::memory::MemoryState;
use crate::machine::meta::check::{check_change, check_map};
use crate::machine::meta::{self, cluster_map};
use crate::node::replicas::Replicas;
use crate::placement::map::{ClusterMap, MapDelta, Member, MemberRole, NodeRecord, ShardRecord, Standing};
use crate::placement::plan::PlannedShard;
use crate::placement::ring::{RingRange, equal_ranges};
use crate::storage::log::LogStore;

/// The database of all shards.
pub(super) const DATABASE: &str = "sim";

/// Greatest time between two nodes telling each other of the map.
const GOSSIP_MAX: Time = 600_000;

/// Something about how the cluster governs itself that happens to a node.
pub(super) enum GovernEvent {
    /// It is time for the process with this number to look whether it leads, and then to act.
    Tick(u64),
    /// It is time for the process with this number to tell another node what it knows.
    Gossip(u64),
    /// Another node tells what it knows.
    Map(Box<MapDelta>),
    /// That node wants to know how this one is.
    Ask(NodeId),
    /// A node says how it is.
    Heard(Box<Survey>),
    /// Leadership of a shard is to move to the replica on that node.
    HandOver(ShardId, NodeId),
}

/// The commands that a governed cluster begins with.
pub(super) fn first_commands(nodes: usize, shards: usize, replicas: usize) -> Vec<MetaCommand> {
    let ids = || (1..=nodes as u64).map(NodeId);
    let members: Vec<Member> = (ids().take(3).filter(|id| nodes > 2 || id.0 == 1))
        .map(|node| Member { replica: ReplicaId(node.0), node, role: MemberRole::Voter })
        .collect();
    let metadata = ShardRecord {
        id: METADATA_SHARD,
        database: METADATA_DATABASE,
        range: RingRange::ALL,
        epoch: Epoch { range: 1, conf: 1 },
        members,
        dropped: false,
        moving: None,
        target: None,
        previous: None,
        changed_at: 0,
    };
    let ranges = equal_ranges(u32::try_from(shards).unwrap_or(u32::MAX));
    let planned = ranges.into_iter().enumerate().map(|(at, range)| {
        let on = (0..replicas).map(|copy| NodeId(((at + copy) % nodes) as u64 + 1));
        PlannedShard { range, nodes: on.collect() }
    });
    vec![
        MetaCommand::Form {
            cluster_id: ClusterId::from_slice(&[7; 16]).unwrap_or_default(),
            nodes: ids().map(node_record).collect(),
            metadata: Box::new(metadata),
        },
        MetaCommand::CreateDatabase {
            name: DATABASE.into(),
            replicas: u32::try_from(replicas).unwrap_or(u32::MAX),
            shards: planned.collect(),
        },
    ]
}

/// What a node says of itself when it joins.
pub(super) fn node_record(id: NodeId) -> NodeRecord {
    let mut store = [1; 16];
    store[..8].copy_from_slice(&id.0.to_be_bytes());
    NodeRecord {
        id,
        label: String::new(),
        client_address: format!("n{id}:1"),
        peer_address: format!("n{id}:2"),
        zone: String::new(),
        weight: 100,
        store_id: StoreId::from_slice(&store).unwrap_or_default(),
        standing: Standing::Member,
        changed_at: 0,
    }
}

/// The map that those commands come to.
pub(super) fn first_map(commands: &[MetaCommand]) -> ClusterMap {
    let mut state = MemoryState::default();
    for command in commands {
        if let Err(error) = meta::apply(command, &mut state) {
            unreachable!("a state in memory can be written: {error}");
        }
    }
    cluster_map(&state).unwrap_or_default()
}

impl World {
    /// Whether the metadata shard is part of the cluster.
    pub(super) fn is_governed(&self) -> bool {
        self.options.faults.rebalancing
    }

    /// What a process does of itself from its start on.
    pub(super) fn begin_governing(&mut self, id: NodeId, process: u64) -> Result<(), Violation> {
        if !self.is_governed() {
            return Ok(());
        }
        self.govern_later(id, limits::SURVEY_MS * 1_000, GovernEvent::Tick(process));
        self.govern_later(id, GOSSIP_MAX, GovernEvent::Gossip(process));
        self.obey(id)
    }

    fn govern_later(&mut self, id: NodeId, most: Time, event: GovernEvent) {
        let delay = self.dice.between(most / 2, most);
        self.clock.after(delay, Event::Node(id, NodeEvent::Govern(event)));
    }

    pub(super) fn on_govern(&mut self, id: NodeId, event: GovernEvent) -> Result<(), Violation> {
        let Some(number) = self.nodes.get(&id).and_then(|node| node.process_number()) else { return Ok(()) };
        match event {
            GovernEvent::Tick(process) | GovernEvent::Gossip(process) if process != number => Ok(()),
            GovernEvent::Tick(_) => {
                self.govern_later(id, limits::SURVEY_MS * 1_000, GovernEvent::Tick(number));
                self.reconcile(id);
                Ok(())
            }
            GovernEvent::Gossip(_) => {
                self.govern_later(id, GOSSIP_MAX, GovernEvent::Gossip(number));
                self.gossip(id);
                Ok(())
            }
            GovernEvent::Map(delta) => self.take_map(id, *delta),
            GovernEvent::Ask(from) => {
                let survey = self.survey(id);
                self.carry(id, from, GovernEvent::Heard(Box::new(survey)));
                Ok(())
            }
            GovernEvent::Heard(survey) => {
                let now_ms = self.clock.now / 1_000;
                let process = self.nodes.get_mut(&id).and_then(|node| node.process.as_mut());
                if let Some(reconciler) = process.and_then(|process| process.reconciler.as_mut()) {
                    reconciler.heard(now_ms, *survey);
                }
                Ok(())
            }
            GovernEvent::HandOver(shard, to) => {
                let Some(node) = self.nodes.get_mut(&id) else { return Ok(()) };
                let replicas = node.process.iter_mut().flat_map(|process| process.replicas.iter_mut());
                let leader = replicas.into_iter().find(|(_, of)| of.shard == shard && of.group.leads());
                let Some((replica, of)) = leader else { return Ok(()) };
                let replica = *replica;
                if let Some(heir) = of.group.replica_on(to) {
                    of.group.transfer(heir);
                }
                self.count("leaders moved");
                self.queue_pump(id, replica);
                Ok(())
            }
        }
    }

    /// Something goes from one node to another, or doesn't arrive.
    fn carry(&mut self, from: NodeId, to: NodeId, event: GovernEvent) {
        self.carry_event(from, to, NodeEvent::Govern(event));
    }

    fn carry_event(&mut self, from: NodeId, to: NodeId, event: NodeEvent) {
        let now = self.clock.now;
        if from == to {
            return self.clock.after(10, Event::Node(to, event));
        }
        if let Fate::Arrives(at) = self.network.send(now, from, to, &mut self.dice)
            && let Some(at) = at.first()
        {
            self.clock.after(at - now, Event::Node(to, event));
        }
    }

    // -------------------------------------------------------------------------------------- maps

    /// A replica of the metadata shard has applied something: its node has that map.
    pub(super) fn publish(&mut self, id: NodeId, replica: ReplicaId) -> Result<(), Violation> {
        let Some(of) = self.nodes.get(&id).and_then(|node| node.replica(replica)) else { return Ok(()) };
        let map = cluster_map(of.group.state()).map_err(|e| Violation::new("replica", e.to_string()))?;
        let delta = map.delta(0);
        self.take_map(id, delta)
    }

    fn take_map(&mut self, id: NodeId, delta: MapDelta) -> Result<(), Violation> {
        let changed = self.nodes.get_mut(&id).is_some_and(|node| node.map.merge(delta));
        if changed { self.obey(id) } else { Ok(()) }
    }

    fn gossip(&mut self, id: NodeId) {
        let others: Vec<NodeId> = self.living().into_iter().filter(|other| *other != id).collect();
        let Some(&to) = self.dice.pick(&others) else { return };
        let theirs = self.nodes.get(&to).map_or(0, |node| node.map.version);
        let Some(node) = self.nodes.get(&id).filter(|node| node.map.version > theirs) else { return };
        let delta = node.map.delta(theirs);
        self.carry(id, to, GovernEvent::Map(Box::new(delta)));
    }

    /// A node has the replicas that its map orders.
    fn obey(&mut self, id: NodeId) -> Result<(), Violation> {
        let Some(node) = self.nodes.get(&id).filter(|node| node.process.is_some()) else { return Ok(()) };
        let catalogue = node.disk.log.catalogue().map_err(|e| Violation::new("disk", e.to_string()))?;
        let orders = Replicas::new(catalogue).orders(&node.map, id);
        for record in orders.create {
            self.make_replica(id, record)?;
        }
        for replica in orders.remove {
            self.on_remove(id, super::membership::RemoveEvent::Order(replica))?;
        }
        Ok(())
    }

    // -------------------------------------------------------------------------------- reconciler

    fn survey(&self, id: NodeId) -> Survey {
        let mut survey = Survey {
            node: id,
            disk_full: false,
            led: Vec::new(),
            held: Vec::new(),
            sick: Vec::new(),
            snapshot_bytes: 0,
        };
        let Some(node) = self.nodes.get(&id) else { return survey };
        for record in &node.records {
            survey.held.push((record.shard, record.replica));
            if node.disk.faulty.has_rotten_log(record.replica) {
                let why = "its log is rotten".into();
                survey.sick.push(SickReplica { shard: record.shard, replica: record.replica, why });
            }
        }
        let may_tell = |replica: &Replica| replica.group.leads() && replica.group.members_are_known();
        for (leader, replica) in node.replicas().filter(|(_, replica)| may_tell(replica)) {
            let status = replica.group.status();
            survey.led.push(ShardReport {
                shard: replica.shard,
                leader,
                term: status.term,
                epoch: status.epoch,
                members: status.members,
                followers: status.followers,
                last: status.last,
                keys: 0,
                bytes: 0,
            });
        }
        survey
    }

    fn reconcile(&mut self, id: NodeId) {
        let now_ms = self.clock.now / 1_000;
        let Some(node) = self.nodes.get_mut(&id) else { return };
        // The shards are there from the start, under the ids that they get if nothing comes before them.
        let leads = node.leads(METADATA_SHARD) && self.map.database(DATABASE).is_some();
        let Some(process) = &mut node.process else { return };
        if !leads {
            process.reconciler = None;
            return;
        }
        let reconciler = process.reconciler.get_or_insert_with(Reconciler::new);
        let actions = if node.map.version > 0 { reconciler.step(now_ms, &node.map) } else { Vec::new() };
        let asked = node.map.nodes.values();
        let asked = asked.filter(|n| !matches!(n.standing, Standing::Pending | Standing::Removed));
        let asked: Vec<NodeId> = asked.map(|node| node.id).collect();
        for to in asked {
            self.carry(id, to, GovernEvent::Ask(id));
        }
        for action in actions {
            self.carry_out(id, action);
        }
    }

    fn carry_out(&mut self, id: NodeId, action: Action) {
        note!(self.trace, "{} node {} reconciles: {:?}", self.clock.now, id, Shown(&action));
        self.count("steps of the reconciler");
        match action {
            Action::Meta(command) => {
                let command = self.distort(command);
                let token = self.operator.request(Request::Other);
                let operation = Operation::Command { command: Command::Meta(command), session: None };
                let operation = Box::new(operation);
                let request = NodeEvent::Request { token, shard: METADATA_SHARD, operation };
                self.carry_event(id, id, request);
            }
            Action::Change { node, shard, conf, change } => {
                let exchanges = match &change {
                    MembershipChange::Exchange { promote, remove } => {
                        // A record may have rotted that nobody has read since: those that go are needed then. Such
                        // an order is lost on its way.
                        let after = exchanged(self.members(shard), promote, remove);
                        if !self.would_go_on(shard, &after, None) {
                            return;
                        }
                        true
                    }
                    _ => false,
                };
                let now = self.clock.now;
                let request = if exchanges { Request::Exchange(shard, now) } else { Request::Other };
                let token = self.operator.request(request);
                let operation = Box::new(Operation::Change { conf, change });
                self.carry_event(id, node, NodeEvent::Request { token, shard, operation });
            }
            Action::Transfer { node, shard, to } => {
                self.carry_event(id, node, NodeEvent::Govern(GovernEvent::HandOver(shard, to)));
            }
        }
    }

    /// With a planted bug, a report of members of the past passes for news.
    fn distort(&self, command: MetaCommand) -> MetaCommand {
        match command {
            MetaCommand::ObserveShard { shard, conf, members }
                if self.options.planted.is(Planted::StaleReportTaken) =>
            {
                let before =
                    self.truths.get(&shard).and_then(|truth| truth.members.of_conf(conf.checked_sub(1)?));
                let members = before.map_or(members, |before| before.members.clone());
                MetaCommand::ObserveShard { shard, conf, members }
            }
            command => command,
        }
    }

    // ------------------------------------------------------------------------------------ checks

    /// The metadata shard has come to a new map.
    pub(super) fn check_new_map(&mut self) -> Result<(), Violation> {
        let violation = |what: String| Violation::new("map", what);
        let Some(truth) = self.truths.get(&METADATA_SHARD) else { return Ok(()) };
        let map = truth.map().map_err(|error| violation(error.to_string()))?;
        if map.version == self.map.version {
            return Ok(());
        }
        check_map(&map).map_err(violation)?;
        check_change(&self.map, &map).map_err(violation)?;
        for record in map.shards.values().filter(|record| !record.dropped) {
            let had = self.truths.get(&record.id).and_then(|truth| truth.members.of_conf(record.epoch.conf));
            let sorted = |members: &[Member]| {
                members.iter().map(|m| (m.replica, (m.node, m.role))).collect::<BTreeMap<_, _>>()
            };
            let as_it_was = match had {
                Some(had) => sorted(&had.members) == sorted(&record.members),
                // A leader without its state has from its record what nobody has applied yet.
                None => self.is_recorded_next(record.id, record.epoch.conf, |members| {
                    sorted(members) == sorted(&record.members)
                })?,
            };
            if !as_it_was {
                return Err(violation(format!("map version {}: {record:?}; it had {had:?}", map.version)));
            }
        }
        self.map = map;
        Ok(())
    }

    /// Whether a change was proposed that makes those the members of the next conf version for whom `are` holds, and a
    /// replica has it recorded: that is done once it is committed, durably, and before anybody applies it.
    fn is_recorded_next(
        &self,
        shard: ShardId,
        conf: u64,
        are: impl Fn(&[Member]) -> bool,
    ) -> Result<bool, Violation> {
        let newest = self.truths.get(&shard).and_then(|truth| truth.members.newest());
        if newest.is_none_or(|newest| newest.conf + 1 != conf) {
            return Ok(false);
        }
        for node in self.nodes.values() {
            for record in node.records.iter().filter(|record| record.shard == shard) {
                let log = node.disk.read_log().load(record.replica);
                let at = log.map_err(|error| Violation::new("disk", error.to_string()))?.membership.index;
                let proposed = self.proposed.get(&shard).into_iter().flatten();
                if proposed.filter(|(index, _)| *index == at).any(|(_, members)| are(members)) {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }
}
