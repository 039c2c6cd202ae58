//! The picture of a cluster: what the map says, laid over what the nodes say of themselves. Pure.

use std::collections::BTreeMap;

use raft::StateRole;
use serde_json::{Value, json};

use super::output;
use super::status::{Reports, databases};
use crate::ids::{METADATA_SHARD, NodeId, ReplicaId, ShardId};
use crate::node::handle::{NodePhase, NodeReport, ReplicaHealth, ReplicaReport};
use crate::placement::map::{ClusterMap, MemberRole, MoveCause, ShardMove, ShardRecord, Standing};

/// The picture of a cluster.
#[derive(Clone, Debug, PartialEq)]
pub struct Overview {
    /// Identity of the cluster.
    pub cluster_id: String,
    /// Its nodes, but for those that were removed.
    pub nodes: Vec<NodeView>,
    /// The metadata shard; `None` where one database was asked for.
    pub metadata: Option<ShardView>,
    /// Its databases, or the one that was asked for.
    pub databases: Vec<DatabaseView>,
}

/// A node.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeView {
    /// Its id.
    pub id: NodeId,
    /// Its label.
    pub label: String,
    /// Address of its client port.
    pub address: String,
    /// Failure domain.
    pub zone: String,
    /// `ready`, `read-only`, `starting`, `stopping`, `unreachable`, or `replaced`: another node answers at its
    /// address.
    pub state: &'static str,
    /// What the cluster has decided about it: `member`, `pending`, `draining` or `leaving`.
    pub standing: &'static str,
    /// Shards it leads, the metadata shard included, whether in the picture or not.
    pub leaders: usize,
    /// Replicas it holds, likewise.
    pub replicas: usize,
    /// Bytes in its directory; `None` if it can't be asked.
    pub disk_bytes: Option<u64>,
}

/// A database.
#[derive(Clone, Debug, PartialEq)]
pub struct DatabaseView {
    /// Its name.
    pub name: String,
    /// Replicas that each shard should have.
    pub replicas: u32,
    /// Its shards.
    pub shards: Vec<ShardView>,
}

/// A shard.
#[derive(Clone, Debug, PartialEq)]
pub struct ShardView {
    /// The record in the map.
    pub record: ShardRecord,
    /// Node of its leader.
    pub leader: Option<NodeId>,
    /// Client address of that node.
    pub leader_address: Option<String>,
    /// Its replicas.
    pub replicas: Vec<ReplicaView>,
}

/// A replica.
#[derive(Clone, Debug, PartialEq)]
pub struct ReplicaView {
    /// Its node.
    pub node: NodeId,
    /// Client address of the node.
    pub address: Option<String>,
    /// `leader`, `follower`, `candidate`, `learner`; where only the map is known `voter`, `learner`, `incoming`
    /// or `outgoing`.
    pub role: &'static str,
    /// `serving`, `recovering`, `installing`, `refetching`, `restarting`, `quarantined`, `failed`, `missing`,
    /// `unreachable`, or `awaited`: a move is to bring it.
    pub state: &'static str,
    /// Its role in the map; `None` if a move is to bring it, and it is no member yet.
    pub member: Option<MemberRole>,
    /// Why it isn't serving.
    pub message: Option<String>,
    /// Index it has applied.
    pub applied: Option<u64>,
    /// Entries that its leader has committed and it has not applied.
    pub lag: Option<u64>,
}

impl Overview {
    /// Puts map and reports together.
    pub fn new(map: &ClusterMap, reports: &Reports, db: Option<&str>) -> Overview {
        let view = |id: &ShardId| map.shards.get(id).map(|s| ShardView::new(map, s, reports));
        let mut databases: Vec<DatabaseView> = databases(map)
            .map(|record| DatabaseView {
                name: record.name.clone(),
                replicas: record.replicas,
                shards: record.shards.iter().filter_map(view).collect(),
            })
            .collect();
        let metadata = view(&METADATA_SHARD);

        let mut leaders = BTreeMap::<NodeId, usize>::new();
        let mut replicas = BTreeMap::<NodeId, usize>::new();
        for shard in databases.iter().flat_map(|db| &db.shards).chain(&metadata) {
            if let Some(node) = shard.leader {
                *leaders.entry(node).or_default() += 1;
            }
            for replica in &shard.replicas {
                *replicas.entry(replica.node).or_default() += 1;
            }
        }
        databases.retain(|record| db.is_none_or(|name| record.name == name));
        let nodes = map
            .nodes
            .values()
            .filter(|record| record.standing != Standing::Removed)
            .map(|record| {
                let (report, state) = match answer(reports, record.id) {
                    Ok(report) => (Some(report), phase_name(report.phase)),
                    Err(Silence::Replaced(_)) => (None, "replaced"),
                    Err(Silence::Unreachable) => (None, "unreachable"),
                };
                NodeView {
                    id: record.id,
                    label: record.label.clone(),
                    address: record.client_address.clone(),
                    zone: record.zone.clone(),
                    state,
                    standing: standing_name(record.standing),
                    leaders: leaders.get(&record.id).copied().unwrap_or(0),
                    replicas: replicas.get(&record.id).copied().unwrap_or(0),
                    disk_bytes: report.map(|r| r.disk_bytes),
                }
            })
            .collect();
        Overview {
            cluster_id: map.cluster_id.to_string(),
            nodes,
            metadata: metadata.filter(|_| db.is_none()),
            databases,
        }
    }

    fn shards(&self) -> impl Iterator<Item = &ShardView> {
        let databases = self.databases.iter().flat_map(|db| &db.shards);
        self.metadata.iter().chain(databases)
    }

    /// Whether every shard in the picture has a leader.
    pub fn every_shard_is_led(&self) -> bool {
        self.shards().all(|shard| shard.leader.is_some())
    }

    /// As a JSON object.
    pub fn json(&self) -> Value {
        let nodes = self.nodes.iter().map(|node| {
            json!({
                "id": node.id.0,
                "label": node.label,
                "address": node.address,
                "zone": node.zone,
                "state": node.state,
                "standing": node.standing,
                "leaders": node.leaders,
                "replicas": node.replicas,
                "disk_bytes": node.disk_bytes,
            })
        });
        let databases = self.databases.iter().map(|db| {
            json!({
                "name": db.name,
                "replicas": db.replicas,
                "shards": db.shards.iter().map(ShardView::json).collect::<Value>(),
            })
        });
        let mut object = json!({
            "cluster_id": self.cluster_id,
            "nodes": nodes.collect::<Value>(),
            "databases": databases.collect::<Value>(),
        });
        if let Some(metadata) = &self.metadata {
            object["metadata"] = metadata.json();
        }
        object
    }

    /// The nodes as a table.
    pub fn node_table(&self) -> String {
        let headings = ["node", "label", "address", "zone", "state", "leaders", "replicas", "disk"];
        let mut table = output::table(&headings);
        for node in &self.nodes {
            table.add_row([
                node.id.to_string(),
                node.label.clone(),
                node.address.clone(),
                if node.zone.is_empty() { "-".into() } else { node.zone.clone() },
                match node.standing {
                    "member" => node.state.to_owned(),
                    standing => format!("{}, {standing}", node.state),
                },
                node.leaders.to_string(),
                node.replicas.to_string(),
                node.disk_bytes.map_or("-".into(), output::size),
            ]);
        }
        table.to_string()
    }

    /// The shards as a table.
    pub fn shard_table(&self) -> String {
        let mut table = output::table(&["database", "shard", "range", "replicas", "leader", "state"]);
        let metadata = self.metadata.iter().map(|shard| ("(metadata)", shard));
        let databases =
            self.databases.iter().flat_map(|db| db.shards.iter().map(|shard| (db.name.as_str(), shard)));
        for (name, shard) in metadata.chain(databases) {
            table.add_row([
                name.to_owned(),
                shard.record.id.to_string(),
                format!("{}-{}", shard.start(), shard.end()),
                shard.replicas_text(),
                shard.leader_text(),
                shard.state_text(),
            ]);
        }
        table.to_string()
    }

    /// Both tables, the cluster's id, and a line on what is wrong, if anything is.
    pub fn text(&self) -> String {
        let mut text =
            format!("cluster {}\n{}\n{}\n", self.cluster_id, self.node_table(), self.shard_table());
        let leaderless = self.shards().filter(|s| s.leader.is_none()).count();
        if leaderless > 0 {
            let have = if leaderless == 1 { "has" } else { "have" };
            text.push_str(&format!("{} {have} no leader\n", output::count(leaderless as u64, "shard")));
        }
        let lost = self.shards().filter(|shard| shard.is_lost()).count();
        if lost > 0 {
            let (have, of) = if lost == 1 { ("has", "its") } else { ("have", "their") };
            text.push_str(&format!(
                "{} {have} lost {of} state at every replica: restore the database from a backup\n",
                output::count(lost as u64, "shard")
            ));
        }
        text
    }
}

impl ShardView {
    /// Puts a shard's record together with what the holders of its replicas say.
    pub fn new(map: &ClusterMap, record: &ShardRecord, reports: &Reports) -> ShardView {
        let report_of = |node: NodeId, replica: ReplicaId| -> Option<&ReplicaReport> {
            let report = answer(reports, node).ok()?;
            report.replicas.iter().find(|r| r.shard == record.id && r.replica == replica)
        };
        // An old leader that is cut off still believes in itself; the newest term is right.
        let leader = record
            .members
            .iter()
            // Without a state it serves nobody, and leads only until it finds one to whom it can hand that.
            .filter_map(|m| {
                let report = report_of(m.node, m.replica)?;
                let whole = !matches!(report.health, ReplicaHealth::Refetching(_));
                Some((m, report.group.as_ref().filter(|_| whole)?))
            })
            .filter(|(_, group)| group.role == StateRole::Leader)
            .max_by_key(|(_, group)| group.term);
        let committed = leader.map(|(_, group)| group.committed);
        let address = |node: NodeId| map.nodes.get(&node).map(|n| n.client_address.clone());
        let replicas = record
            .ordered()
            .map(|member| {
                let is_member = record.node_of(member.replica).is_some();
                let answer = answer(reports, member.node);
                let report = report_of(member.node, member.replica);
                let group = report.and_then(|r| r.group.as_ref());
                let (state, message) = match (report.map(|r| &r.health), answer) {
                    (Some(health), _) => {
                        let (state, why) = health_name(health);
                        (state, why.map(str::to_owned))
                    }
                    (None, _) if !is_member => ("awaited", None),
                    (None, Ok(_)) => ("missing", None),
                    (None, Err(Silence::Unreachable)) => ("unreachable", None),
                    (None, Err(Silence::Replaced(by))) => {
                        ("unreachable", Some(format!("node {by} runs in place of its node")))
                    }
                };
                // A lost state has none of it.
                let applied = group.filter(|_| state != "refetching").map(|g| g.applied);
                ReplicaView {
                    node: member.node,
                    address: address(member.node),
                    role: match (group, member.role) {
                        (Some(group), _) if group.learner => "learner",
                        (Some(group), _) => role_name(group.role),
                        (None, MemberRole::Learner) => "learner",
                        (None, MemberRole::Voter) => "voter",
                        (None, MemberRole::Incoming) => "incoming",
                        (None, MemberRole::Outgoing) => "outgoing",
                    },
                    state,
                    member: Some(member.role).filter(|_| is_member),
                    message,
                    applied,
                    lag: applied.zip(committed).map(|(applied, committed)| committed.saturating_sub(applied)),
                }
            })
            .collect();
        let leader = leader.map(|(member, _)| member.node);
        ShardView { record: record.clone(), leader, leader_address: leader.and_then(address), replicas }
    }

    /// `ok`: led, all voters serve; `degraded`: led, some don't; `quarantined`: no leader, since a majority
    /// of its replicas is quarantined; `unavailable`: no leader, for another reason.
    pub fn state(&self) -> &'static str {
        match self.leader {
            None if self.is_quarantined() => "quarantined",
            None => "unavailable",
            Some(_) if self.voters().all(|r| r.state == "serving") => "ok",
            Some(_) => "degraded",
        }
    }

    /// The replicas that vote. Those that a move brings are nobody's loss until they do.
    fn voters(&self) -> impl Iterator<Item = &ReplicaView> {
        self.replicas.iter().filter(|replica| replica.member.is_some_and(MemberRole::votes))
    }

    /// Whether no replica has a state to give to the others.
    fn is_lost(&self) -> bool {
        self.voters().all(|replica| replica.state == "refetching")
    }

    /// Whether so many of its voters are quarantined that the others are no majority.
    fn is_quarantined(&self) -> bool {
        let voters = self.record.members.iter().filter(|m| m.role.votes());
        let lost = |node: NodeId| self.replicas.iter().any(|r| r.node == node && r.state == "quarantined");
        let (all, lost) = voters.fold((0, 0), |(all, count), m| (all + 1, count + usize::from(lost(m.node))));
        all - lost < all / 2 + 1
    }

    /// First ring position, in hexadecimal: JSON numbers don't hold 64 bits everywhere.
    pub fn start(&self) -> String {
        format!("{:016x}", self.record.range.start)
    }

    /// Last ring position.
    pub fn end(&self) -> String {
        format!("{:016x}", self.record.range.end)
    }

    /// The nodes that hold replicas, for a table: `+` before one whose replica is coming, `-` before one whose
    /// replica is going.
    pub fn replicas_text(&self) -> String {
        let sign = |replica: &ReplicaView| match replica.member {
            Some(MemberRole::Voter) => "",
            Some(MemberRole::Outgoing) => "-",
            Some(MemberRole::Learner | MemberRole::Incoming) | None => "+",
        };
        let nodes: Vec<String> = self.replicas.iter().map(|r| format!("{}{}", sign(r), r.node)).collect();
        nodes.join(" ")
    }

    /// The leader, for a table.
    pub fn leader_text(&self) -> String {
        match (self.leader, &self.leader_address) {
            (Some(node), Some(address)) => format!("{node} ({address})"),
            (Some(node), None) => node.to_string(),
            (None, _) => "-".into(),
        }
    }

    /// The state, for a table: with the replicas that don't serve, and why.
    fn state_text(&self) -> String {
        let mut text = self.state().to_owned();
        for replica in self.replicas.iter().filter(|r| r.state != "serving") {
            text.push_str(&format!("; node {} {}", replica.node, replica.state));
            if let Some(message) = &replica.message {
                text.push_str(&format!(": {}", output::printable(message.as_bytes())));
            }
        }
        if let Some(moving) = &self.record.moving {
            let nodes = |sign, nodes: Vec<NodeId>| {
                nodes.into_iter().map(|node| format!(" {sign}{node}")).collect::<String>()
            };
            let (adds, removes) = self.move_nodes(moving);
            let done = if moving.cancelling { "rolled back" } else { "under way" };
            let cause = cause_name(moving.cause);
            text.push_str(&format!("; {cause} {done}:{}{}", nodes('+', adds), nodes('-', removes)));
        }
        text
    }

    /// Nodes of the replicas that a move brings, and of those it takes away, as far as they are there still.
    fn move_nodes(&self, moving: &ShardMove) -> (Vec<NodeId>, Vec<NodeId>) {
        let removes = moving.removes.iter().filter_map(|replica| self.record.node_of(*replica));
        (moving.adds.iter().map(|add| add.node).collect(), removes.collect())
    }

    fn json(&self) -> Value {
        let replicas = self.replicas.iter().map(|replica| {
            json!({
                "node": replica.node.0,
                "role": replica.role,
                "state": replica.state,
                "message": replica.message,
                "applied": replica.applied,
                "lag": replica.lag,
            })
        });
        let moving = self.record.moving.as_ref().map(|moving| {
            let ids = |nodes: Vec<NodeId>| nodes.into_iter().map(|node| node.0).collect::<Value>();
            let (adds, removes) = self.move_nodes(moving);
            json!({
                "id": moving.id,
                "cause": cause_name(moving.cause),
                "cancelling": moving.cancelling,
                "adds": ids(adds),
                "removes": ids(removes),
            })
        });
        json!({
            "id": self.record.id.0,
            "start": self.start(),
            "end": self.end(),
            "epoch": {"range": self.record.epoch.range, "conf": self.record.epoch.conf},
            "leader": self.leader.map(|node| node.0),
            "state": self.state(),
            "replicas": replicas.collect::<Value>(),
            "moving": moving,
        })
    }
}

/// Why a node says nothing of itself.
enum Silence {
    /// It doesn't answer.
    Unreachable,
    /// The one that answers at its address says that it is another.
    Replaced(NodeId),
}

/// What a node says of itself. One that has yet to learn who it is may be the right one.
fn answer(reports: &Reports, node: NodeId) -> Result<&NodeReport, Silence> {
    match reports.get(&node) {
        Some(Ok(report)) if report.node == node || report.node == NodeId(0) => Ok(report),
        Some(Ok(report)) => Err(Silence::Replaced(report.node)),
        Some(Err(_)) | None => Err(Silence::Unreachable),
    }
}

/// A node's phase as a word.
pub fn phase_name(phase: NodePhase) -> &'static str {
    match phase {
        NodePhase::Starting => "starting",
        NodePhase::Ready => "ready",
        NodePhase::Stopping => "stopping",
        NodePhase::ReadOnly => "read-only",
    }
}

/// A standing as a word.
pub fn standing_name(standing: Standing) -> &'static str {
    match standing {
        Standing::Member => "member",
        Standing::Pending => "pending",
        Standing::Draining => "draining",
        Standing::Leaving => "leaving",
        Standing::Removed => "removed",
    }
}

/// Why members change, as a word.
pub fn cause_name(cause: MoveCause) -> &'static str {
    match cause {
        MoveCause::Rebalance => "rebalance",
        MoveCause::Repair => "repair",
        MoveCause::Drain => "drain",
        MoveCause::Replicas => "replicas",
    }
}

fn role_name(role: StateRole) -> &'static str {
    match role {
        StateRole::Leader => "leader",
        StateRole::Follower => "follower",
        StateRole::Candidate | StateRole::PreCandidate => "candidate",
    }
}

fn health_name(health: &ReplicaHealth) -> (&'static str, Option<&str>) {
    match health {
        ReplicaHealth::Serving => ("serving", None),
        ReplicaHealth::Recovering => ("recovering", None),
        ReplicaHealth::Installing => ("installing", Some("receives or installs a snapshot")),
        ReplicaHealth::Refetching(why) => ("refetching", Some(why)),
        ReplicaHealth::Restarting(why) => ("restarting", Some(why)),
        ReplicaHealth::Quarantined(why) => ("quarantined", Some(why)),
        ReplicaHealth::Failed(why) => ("failed", Some(why)),
    }
}

#[cfg(test)]
mod tests;
