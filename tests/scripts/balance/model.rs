//! A cluster as the reconciler sees it: nodes that are up or not, groups that have members, a leader and a conf
//! version, and the metadata shard's own machine. There are no logs, no data and no messages: whatever is asked
//! of a group is done at once, or refused by the rules by which groups refuse, and a newcomer catches up
//! within some seconds.

use std::collections::{BTreeMap, BTreeSet};

use pontoon::balance::facts::{Action, ShardReport, SickReplica, Survey};
use pontoon::balance::reconciler::Reconciler;
use pontoon::group::types::{FollowerStatus, MembershipChange};
use pontoon::ids::{Epoch, METADATA_DATABASE, METADATA_SHARD, NodeId, RandomId, ReplicaId, ShardId, Term};
use pontoon::machine::command::{MetaCommand, MetaReply};
use pontoon::machine::memory::MemoryState;
use pontoon::machine::meta;
use pontoon::placement::loads::metadata_voters;
use pontoon::placement::map::{ClusterMap, Member, MemberRole, NodeRecord, ShardRecord, Standing};
use pontoon::placement::plan::plan_database;
use pontoon::placement::ring::RingRange;

/// Seconds until a newcomer has caught up.
const CATCH_UP: u64 = 3;

/// A process.
#[derive(Default)]
pub struct Machine {
    pub up: bool,
    pub disk_full: bool,
    held: BTreeSet<(ShardId, ReplicaId)>,
    /// Replicas that it held and must never hold again.
    tombstones: BTreeSet<ReplicaId>,
}

/// A shard's group.
struct Group {
    conf: u64,
    members: Vec<Member>,
    term: Term,
    leader: Option<ReplicaId>,
    /// Seconds until a replica has caught up.
    behind: BTreeMap<ReplicaId, u64>,
    sick: BTreeSet<ReplicaId>,
}

/// See the module's page.
pub struct Model {
    state: MemoryState,
    pub map: ClusterMap,
    pub now_ms: u64,
    pub reconciler: Reconciler,
    pub machines: BTreeMap<NodeId, Machine>,
    groups: BTreeMap<ShardId, Group>,
    /// So many of the next actions are lost on their way.
    pub lose: usize,
    /// What was done, and refused, since somebody looked.
    pub trace: Vec<String>,
    /// What the reconciler should never have asked for.
    pub wrongs: Vec<String>,
}

impl Model {
    /// Forms a cluster; each node has a zone and a weight.
    pub fn form(nodes: &[(String, u32)]) -> Model {
        let mut model = Model {
            state: MemoryState::default(),
            map: ClusterMap::default(),
            now_ms: 1_000_000,
            reconciler: Reconciler::new(),
            machines: BTreeMap::new(),
            groups: BTreeMap::new(),
            lose: 0,
            trace: Vec::new(),
            wrongs: Vec::new(),
        };
        let records = (1..).zip(nodes).map(|(id, (zone, weight))| record(id, zone, *weight));
        let records: Vec<NodeRecord> = records.collect();
        let voters = (1..=metadata_voters(nodes.len()) as u64).map(|id| Member {
            replica: ReplicaId(id),
            node: NodeId(id),
            role: MemberRole::Voter,
        });
        let metadata = Box::new(ShardRecord {
            id: METADATA_SHARD,
            database: METADATA_DATABASE,
            range: RingRange::ALL,
            epoch: Epoch { range: 1, conf: 1 },
            members: voters.collect(),
            dropped: false,
            moving: None,
            target: None,
            previous: None,
            changed_at: 0,
        });
        let cluster_id = RandomId([7; 16]);
        let up = || Machine { up: true, ..Machine::default() };
        model.machines.extend(records.iter().map(|record| (record.id, up())));
        model.propose(MetaCommand::Form { cluster_id, nodes: records, metadata }).unwrap();
        model.begin_groups();
        model
    }

    /// A node joins.
    pub fn join(&mut self, zone: &str, weight: u32) -> NodeId {
        let id = self.map.nodes.keys().last().map_or(1, |last| last.0 + 1);
        self.propose(MetaCommand::AddNode(record(id, zone, weight))).unwrap();
        self.machines.insert(NodeId(id), Machine { up: true, ..Machine::default() });
        NodeId(id)
    }

    pub fn create(&mut self, name: &str, replicas: u32, shards: u32) -> Result<(), String> {
        let plan = plan_database(&self.map, name, replicas, shards).map_err(|e| e.to_string())?;
        self.propose(MetaCommand::CreateDatabase { name: name.into(), replicas, shards: plan })?;
        self.begin_groups();
        Ok(())
    }

    /// Has the metadata shard apply a command.
    pub fn propose(&mut self, command: MetaCommand) -> Result<(), String> {
        let reply = meta::apply(&command, &mut self.state).map_err(|e| e.to_string())?;
        self.map = meta::cluster_map(&self.state).map_err(|e| e.to_string())?;
        match reply {
            MetaReply::Refused(refusal) => Err(refusal.to_string()),
            _ => Ok(()),
        }
    }

    fn begin_groups(&mut self) {
        for shard in self.map.shards.values() {
            self.groups.entry(shard.id).or_insert_with(|| Group {
                conf: shard.epoch.conf,
                members: shard.members.clone(),
                term: 1,
                leader: shard.members.first().map(|member| member.replica),
                behind: BTreeMap::new(),
                sick: BTreeSet::new(),
            });
        }
        self.supervise();
    }

    pub fn kill(&mut self, node: NodeId) {
        self.machines.get_mut(&node).unwrap().up = false;
    }

    /// What it missed it has to catch up with.
    pub fn start(&mut self, node: NodeId) {
        self.machines.get_mut(&node).unwrap().up = true;
        for group in self.groups.values_mut() {
            for member in group.members.iter().filter(|member| member.node == node) {
                group.behind.entry(member.replica).or_insert(1);
            }
        }
    }

    /// The replica on a node doesn't serve any more.
    pub fn sicken(&mut self, shard: ShardId, node: NodeId) {
        let group = self.groups.get_mut(&shard).unwrap();
        let replica = group.members.iter().find(|member| member.node == node).map(|m| m.replica);
        group.sick.extend(replica);
    }

    /// The node that leads a shard.
    pub fn leader(&self, shard: ShardId) -> Option<NodeId> {
        let group = &self.groups[&shard];
        group.members.iter().find(|member| Some(member.replica) == group.leader).map(|member| member.node)
    }

    /// The members of a shard as they are.
    pub fn members(&self, shard: ShardId) -> &[Member] {
        &self.groups[&shard].members
    }

    /// Whether every shard would still have majorities without these nodes.
    pub fn stands_without(&self, nodes: &BTreeSet<NodeId>) -> bool {
        let healthy = |group: &Group, member: &Member| {
            self.answers(group, member) && group.behind.get(&member.replica).is_none_or(|left| *left == 0)
        };
        self.living().all(|id| {
            let group = &self.groups[&id];
            majorities(&group.members, |m| !nodes.contains(&m.node) && healthy(group, m))
        })
    }

    fn living(&self) -> impl Iterator<Item = ShardId> {
        self.map.shards.values().filter(|shard| !shard.dropped).map(|shard| shard.id)
    }

    fn answers(&self, group: &Group, member: &Member) -> bool {
        let machine = &self.machines[&member.node];
        let held = machine.held.iter().any(|(_, replica)| *replica == member.replica);
        machine.up && held && !group.sick.contains(&member.replica)
    }

    /// Nodes create and remove replicas as the map orders.
    fn supervise(&mut self) {
        for (id, machine) in self.machines.iter_mut().filter(|(_, machine)| machine.up) {
            let living = self.map.shards.values().filter(|shard| !shard.dropped);
            let ordered = living.flat_map(|shard| shard.ordered().map(|member| (shard.id, *member)));
            let mine: BTreeSet<_> =
                ordered.filter(|(_, m)| m.node == *id).map(|(shard, m)| (shard, m.replica)).collect();
            machine.tombstones.extend(machine.held.difference(&mine).map(|(_, replica)| *replica));
            let tombstones = &machine.tombstones;
            machine.held = mine.into_iter().filter(|(_, replica)| !tombstones.contains(replica)).collect();
        }
    }

    /// A second passes.
    pub fn second(&mut self) {
        self.now_ms += 1000;
        self.supervise();
        let ids: Vec<ShardId> = self.living().collect();
        for id in ids {
            self.live(id);
        }
        let before = self.leader(METADATA_SHARD);
        if before.is_none() {
            return;
        }
        for survey in self.surveys() {
            self.reconciler.heard(self.now_ms, survey);
        }
        for action in self.reconciler.step(self.now_ms, &self.map) {
            self.carry_out(&action);
        }
        if self.leader(METADATA_SHARD) != before {
            self.reconciler = Reconciler::new();
        }
    }

    /// A group elects, ends joint changes, and catches up.
    fn live(&mut self, id: ShardId) {
        let Some(mut group) = self.groups.remove(&id) else { return };
        let answers = |group: &Group, member: &Member| self.answers(group, member);
        let caught_up = |group: &Group, replica| group.behind.get(&replica).is_none_or(|left| *left == 0);
        let able = majorities(&group.members, |member| answers(&group, member));
        let leads = group.members.iter().find(|m| Some(m.replica) == group.leader);
        if !able || leads.is_none_or(|m| !m.role.votes() || !answers(&group, m)) {
            group.leader = None;
        }
        if able && group.leader.is_none() {
            // Of a majority that answers one has everything, whatever it missed while nothing was decided.
            let able = group.members.iter().filter(|m| m.role.stays_voter() && answers(&group, m));
            let able: Vec<ReplicaId> = able.map(|m| m.replica).collect();
            let whole: Vec<ReplicaId> =
                able.iter().copied().filter(|replica| caught_up(&group, *replica)).collect();
            let candidates = if whole.is_empty() { able } else { whole };
            if !candidates.is_empty() {
                group.term += 1;
                group.leader = Some(candidates[group.term as usize % candidates.len()]);
            }
        }
        if group.leader.is_some() {
            if is_joint(&group.members) {
                group.members.retain(|member| member.role != MemberRole::Outgoing);
                group.members.iter_mut().filter(|m| m.role == MemberRole::Incoming).for_each(|m| {
                    m.role = MemberRole::Voter;
                });
                group.conf += 1;
            }
            let answering = group.members.iter().filter(|member| answers(&group, member));
            let answering: Vec<ReplicaId> = answering.map(|member| member.replica).collect();
            for replica in answering {
                if let Some(left) = group.behind.get_mut(&replica) {
                    *left = left.saturating_sub(1);
                }
            }
        }
        self.groups.insert(id, group);
    }

    fn surveys(&self) -> Vec<Survey> {
        let removed =
            |id: &NodeId| self.map.nodes.get(id).is_none_or(|node| node.standing == Standing::Removed);
        let up = self.machines.iter().filter(|(id, machine)| machine.up && !removed(id));
        up.map(|(id, machine)| self.survey(*id, machine)).collect()
    }

    fn survey(&self, node: NodeId, machine: &Machine) -> Survey {
        let led = self.living().filter(|shard| self.leader(*shard) == Some(node));
        let sick = machine.held.iter().filter(|(shard, replica)| self.groups[shard].sick.contains(replica));
        Survey {
            node,
            disk_full: machine.disk_full,
            led: led.map(|shard| self.report(shard)).collect(),
            held: machine.held.iter().copied().collect(),
            sick: sick
                .map(|(shard, replica)| SickReplica {
                    shard: *shard,
                    replica: *replica,
                    why: "its file is damaged".into(),
                })
                .collect(),
            snapshot_bytes: 0,
        }
    }

    fn report(&self, shard: ShardId) -> ShardReport {
        let group = &self.groups[&shard];
        let others = group.members.iter().filter(|member| Some(member.replica) != group.leader);
        ShardReport {
            shard,
            leader: group.leader.unwrap(),
            term: group.term,
            epoch: Epoch { range: 1, conf: group.conf },
            members: group.members.clone(),
            followers: others
                .map(|member| {
                    let active = self.answers(group, member);
                    let behind = group.behind.get(&member.replica).copied().unwrap_or(0);
                    FollowerStatus {
                        replica: member.replica,
                        matched: 100 - behind,
                        active,
                        caught_up: active && behind == 0,
                    }
                })
                .collect(),
            last: 100,
            keys: 10,
            bytes: 1000,
        }
    }

    fn carry_out(&mut self, action: &Action) {
        let mut line = describe(action);
        if self.lose > 0 {
            self.lose -= 1;
            self.trace.push(line + ": lost");
            return;
        }
        let result = match action {
            Action::Meta(command) => self.propose(command.clone()),
            Action::Change { node, shard, conf, change } => {
                self.check_quorum(*node, *shard, *conf, change);
                self.change(*node, *shard, *conf, change)
            }
            Action::Transfer { node, shard, to } => self.transfer(*node, *shard, *to),
        };
        if let Err(why) = result {
            line += &format!(": refused, {why}");
            if let Action::Change { shard, .. } | Action::Transfer { shard, .. } = action {
                self.reconciler.refused(*shard, why);
            }
        }
        self.trace.push(line);
    }

    /// The reconciler has just been told how things are: it has no excuse for a step that loses a majority.
    fn check_quorum(&mut self, node: NodeId, shard: ShardId, conf: u64, change: &MembershipChange) {
        let group = &self.groups[&shard];
        let MembershipChange::Exchange { promote, remove } = change else { return };
        if conf != group.conf || self.leader(shard) != Some(node) {
            return;
        }
        let mut members = group.members.clone();
        members.retain(|member| !remove.contains(&member.replica));
        members.iter_mut().filter(|m| promote.contains(&m.replica)).for_each(|m| m.role = MemberRole::Voter);
        let wrong = !majorities(&members, |member| self.answers(group, member));
        if wrong || group.leader.is_none_or(|leader| remove.contains(&leader)) {
            self.wrongs.push(format!("shard {shard}: {change:?} of {:?}", group.members));
        }
    }

    fn change(
        &mut self,
        node: NodeId,
        shard: ShardId,
        conf: u64,
        change: &MembershipChange,
    ) -> Result<(), String> {
        if self.leader(shard) != Some(node) {
            return Err("another leads".into());
        }
        let group = &self.groups[&shard];
        if group.conf != conf || is_joint(&group.members) {
            return Err(format!("stale: the conf version is {}", group.conf));
        }
        let mut members = group.members.clone();
        let mut comes = Vec::new();
        match change {
            MembershipChange::AddLearners(adds) => {
                for add in adds.iter().filter(|add| members.iter().all(|m| m.replica != add.replica)) {
                    assert_eq!(add.role, MemberRole::Learner);
                    assert!(members.iter().all(|member| member.node != add.node), "two replicas on a node");
                    comes.push(*add);
                }
                members.extend(&comes);
            }
            MembershipChange::RemoveLearners(removes) => {
                let voter = |m: &Member| removes.contains(&m.replica) && m.role != MemberRole::Learner;
                assert!(!members.iter().any(voter), "voters aren't removed as learners");
                members.retain(|member| !removes.contains(&member.replica));
            }
            MembershipChange::Exchange { promote, remove } => {
                for replica in promote {
                    let add = members.iter_mut().find(|m| m.replica == *replica).ok_or("no member")?;
                    assert_eq!(add.role, MemberRole::Learner);
                    add.role = MemberRole::Incoming;
                    if group.behind.get(replica).is_some_and(|left| *left > 0) {
                        return Err(format!("replica {replica} is not caught up"));
                    }
                }
                for member in members.iter_mut().filter(|member| remove.contains(&member.replica)) {
                    member.role = MemberRole::Outgoing;
                }
                if !majorities(&members, |member| self.answers(group, member)) {
                    return Err("too many do not answer".into());
                }
            }
        }
        let group = self.groups.get_mut(&shard).unwrap();
        group.behind.extend(comes.iter().map(|add| (add.replica, CATCH_UP)));
        group.members = members;
        group.conf += 1;
        Ok(())
    }

    fn transfer(&mut self, node: NodeId, shard: ShardId, to: NodeId) -> Result<(), String> {
        if self.leader(shard) != Some(node) {
            return Err("another leads".into());
        }
        let group = &self.groups[&shard];
        let heir = group.members.iter().find(|m| m.node == to && m.role.stays_voter()).ok_or("no voter")?;
        let behind = group.behind.get(&heir.replica).is_some_and(|left| *left > 0);
        if behind || !self.answers(group, heir) {
            return Err(format!("node {to} can't lead yet"));
        }
        let heir = heir.replica;
        let group = self.groups.get_mut(&shard).unwrap();
        group.leader = Some(heir);
        group.term += 1;
        Ok(())
    }
}

fn record(id: u64, zone: &str, weight: u32) -> NodeRecord {
    NodeRecord {
        id: NodeId(id),
        label: format!("n{id}"),
        client_address: format!("127.0.0.1:{}", 7000 + id),
        peer_address: format!("127.0.0.1:{}", 8000 + id),
        zone: zone.into(),
        weight,
        store_id: RandomId([id as u8; 16]),
        standing: Standing::Member,
        changed_at: 0,
    }
}

fn is_joint(members: &[Member]) -> bool {
    members.iter().any(|m| matches!(m.role, MemberRole::Incoming | MemberRole::Outgoing))
}

/// Whether a majority of each configuration answers.
fn majorities(members: &[Member], answers: impl Fn(&Member) -> bool) -> bool {
    [MemberRole::Incoming, MemberRole::Outgoing].into_iter().all(|other| {
        let voters = || members.iter().filter(|member| member.role.votes() && member.role != other);
        voters().filter(|member| answers(member)).count() > voters().count() / 2
    })
}

/// An action in few words.
pub fn describe(action: &Action) -> String {
    let replicas = |ids: &[ReplicaId]| ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
    let nodes = |ids: &[NodeId]| ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
    match action {
        Action::Change { shard, change, .. } => match change {
            MembershipChange::AddLearners(adds) => {
                let adds: Vec<String> =
                    adds.iter().map(|add| format!("{} on node {}", add.replica, add.node)).collect();
                format!("shard {shard}: add {}", adds.join(", "))
            }
            MembershipChange::Exchange { promote, remove } => {
                format!("shard {shard}: promote [{}], remove [{}]", replicas(promote), replicas(remove))
            }
            MembershipChange::RemoveLearners(removes) => {
                format!("shard {shard}: remove learners [{}]", replicas(removes))
            }
        },
        Action::Transfer { node, shard, to } => format!("shard {shard}: leader {node} -> {to}"),
        Action::Meta(command) => match command {
            MetaCommand::ObserveShard { shard, conf, members } => {
                let members = members.iter().map(|member| {
                    let role = match member.role {
                        MemberRole::Voter => "",
                        MemberRole::Learner => "?",
                        MemberRole::Incoming => "+",
                        MemberRole::Outgoing => "-",
                    };
                    format!("{}{role}", member.node)
                });
                let members: Vec<String> = members.collect();
                format!("map: shard {shard} at {conf} on {}", members.join(" "))
            }
            MetaCommand::BeginMove { shard, adds, removes, cause, .. } => {
                let (adds, removes) = (nodes(adds), replicas(removes));
                format!("map: begin shard {shard}, {cause:?}: to nodes [{adds}] for replicas [{removes}]")
            }
            MetaCommand::CancelMove { shard, .. } => format!("map: cancel the move of shard {shard}"),
            MetaCommand::EndMove { shard, .. } => format!("map: end the move of shard {shard}"),
            MetaCommand::BeginRebalance { targets, moves, .. } => {
                format!("map: rebalance {} shards, {moves} moves", targets.len())
            }
            MetaCommand::ControlRebalance { state, reason, .. } => {
                format!("map: the rebalancing is {state:?} {reason}").trim_end().to_owned()
            }
            MetaCommand::Order { command, .. } => format!("map: {command:?}"),
            other => format!("map: {other:?}"),
        },
    }
}
