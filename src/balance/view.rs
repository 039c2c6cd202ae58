//! What the reconciler knows in one step: the map, and what fresh reports say.

use std::collections::{BTreeMap, BTreeSet};

use super::facts::{ShardReport, Survey};
use crate::group::types::FollowerStatus;
use crate::ids::{NodeId, ReplicaId, ShardId};
use crate::limits;
use crate::placement::map::{ClusterMap, Member, MemberRole, NodeRecord, RebalanceState, Standing};

/// A node, as far as steps depend on it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct NodeView {
    pub standing: Standing,
    /// It has answered lately.
    pub alive: bool,
    /// It hasn't answered for so long.
    pub silent_ms: u64,
    /// A leader hears from a replica on it, whether or not it answers here.
    pub vouched: bool,
    /// Another has given its address, and nobody hears from it any more.
    pub replaced: bool,
    /// That has been so for long enough to count on it.
    pub taken_over: bool,
    /// Its disk has less free than its reserve.
    pub disk_full: bool,
    /// It may get replicas now.
    pub fit: bool,
    /// It may lead: it is an ordinary node with room on its disk.
    pub may_lead: bool,
    /// It won't come back, as far as the policy goes, or has been given up: why what it holds is replaced.
    pub lost: Option<&'static str>,
}

/// The leader of a shard, and what it says.
#[derive(Clone, Copy)]
pub(super) struct Led<'a> {
    pub node: NodeId,
    pub report: &'a ShardReport,
}

/// See the module's page.
pub(super) struct View<'a> {
    pub map: &'a ClusterMap,
    pub nodes: BTreeMap<NodeId, NodeView>,
    pub leaders: BTreeMap<ShardId, Led<'a>>,
    /// Shards led by each node, with what this step hands over.
    pub leads: BTreeMap<NodeId, u32>,
    /// Replicas that have been sick, or missing, for long enough; and what is with them.
    pub sick: BTreeMap<(ShardId, ReplicaId), String>,
}

impl<'a> View<'a> {
    /// Puts together what `surveys`, all of them fresh, and the map say. `silence` is for how long each node
    /// hasn't answered.
    pub fn new(
        map: &'a ClusterMap,
        surveys: impl Iterator<Item = &'a Survey>,
        silence: &BTreeMap<NodeId, u64>,
        sick: BTreeMap<(ShardId, ReplicaId), String>,
    ) -> View<'a> {
        let surveys: BTreeMap<NodeId, &Survey> = surveys.map(|survey| (survey.node, survey)).collect();
        let replaced = map.replaced();
        let vouched = vouched(surveys.values().copied());
        let mut view =
            View { map, nodes: BTreeMap::new(), leaders: BTreeMap::new(), leads: BTreeMap::new(), sick };
        for record in map.nodes.values() {
            let survey = surveys.get(&record.id).copied();
            let silent_ms = silence.get(&record.id).copied().unwrap_or(0);
            let (replaced, vouched) = (replaced.contains(&record.id), vouched.contains(&record.id));
            let node = node_view(record, map, survey, silent_ms, vouched, replaced);
            view.nodes.insert(record.id, node);
        }
        for survey in surveys.into_values() {
            if view.nodes.get(&survey.node).is_some_and(|node| node.standing != Standing::Removed) {
                survey.led.iter().for_each(|report| view.take_report(survey.node, report));
            }
        }
        for led in view.leaders.values() {
            *view.leads.entry(led.node).or_default() += 1;
        }
        view
    }

    /// Of two who say they lead the one with the later term does: the other hasn't heard yet.
    fn take_report(&mut self, node: NodeId, report: &'a ShardReport) {
        let living = self.map.shards.get(&report.shard).is_some_and(|shard| !shard.dropped);
        let own = report.members.iter().any(|m| m.replica == report.leader && m.node == node);
        let newer = self.leaders.get(&report.shard).is_none_or(|led| led.report.term < report.term);
        if living && own && newer {
            self.leaders.insert(report.shard, Led { node, report });
        }
    }

    pub fn fit(&self, node: NodeId) -> bool {
        self.nodes.get(&node).is_some_and(|node| node.fit)
    }

    /// Whether a node is to be emptied, and stays otherwise.
    pub fn drains(&self, node: NodeId) -> bool {
        self.nodes.get(&node).is_some_and(|node| node.standing == Standing::Draining)
    }

    /// Nodes that can't get replicas now although the map would allow it.
    pub fn unfit(&self) -> BTreeSet<NodeId> {
        self.nodes.iter().filter(|(_, node)| !node.fit).map(|(id, _)| *id).collect()
    }

    /// Why a replica is to be replaced, if it is. Never the one that leads, unless its node is given up.
    pub fn lost(&self, shard: ShardId, member: &Member) -> Option<String> {
        let Some(node) = self.nodes.get(&member.node) else {
            return Some(format!("node {} is not in the map", member.node));
        };
        if let Some(why) = node.lost {
            return Some(format!("node {} {why}", member.node));
        }
        let leads = self.leaders.get(&shard).is_some_and(|led| led.report.leader == member.replica);
        let sick = self.sick.get(&(shard, member.replica)).filter(|_| !leads)?;
        Some(format!("the replica on node {} {sick}", member.node))
    }

    /// Whether targets of the last rebalancing are to be followed.
    pub fn follows_targets(&self) -> bool {
        self.map.rebalance.state == RebalanceState::Running
    }
}

/// Nodes that leaders hear from: whoever is cut off from the metadata shard's leader alone, or slow to answer,
/// is not gone.
fn vouched<'a>(surveys: impl Iterator<Item = &'a Survey>) -> BTreeSet<NodeId> {
    let mut nodes = BTreeSet::new();
    for report in surveys.flat_map(|survey| &survey.led) {
        for follower in report.followers.iter().filter(|follower| follower.active) {
            nodes.extend(report.members.iter().find(|m| m.replica == follower.replica).map(|m| m.node));
        }
    }
    nodes
}

fn node_view(
    record: &NodeRecord,
    map: &ClusterMap,
    survey: Option<&Survey>,
    silent_ms: u64,
    vouched: bool,
    replaced: bool,
) -> NodeView {
    let alive = survey.is_some();
    let disk_full = survey.is_some_and(|survey| survey.disk_full);
    let member = record.standing == Standing::Member;
    let after = map.policy.replace_after_ms;
    let gone = after > 0 && silent_ms >= after && !vouched;
    // Whoever answers, or is heard by others, is there, whatever another says of its address.
    let replaced = replaced && !vouched && !(alive && silent_ms == 0);
    let patience = if after > 0 { after.min(limits::SICK_MS) } else { limits::SICK_MS };
    let taken_over = replaced && silent_ms >= patience;
    let lost = match record.standing {
        Standing::Leaving => Some("was given up"),
        Standing::Removed => Some("was removed"),
        _ if gone => Some("is gone"),
        _ if taken_over && after > 0 => Some("is gone, another runs at its address"),
        _ => None,
    };
    NodeView {
        standing: record.standing,
        alive,
        silent_ms,
        vouched,
        replaced,
        taken_over,
        disk_full,
        fit: member && alive && !disk_full && record.weight > 0 && !replaced,
        may_lead: member && alive && !disk_full,
        lost,
    }
}

impl Led<'_> {
    pub fn conf(&self) -> u64 {
        self.report.epoch.conf
    }

    /// How far a follower is.
    pub fn follower(&self, replica: ReplicaId) -> Option<&FollowerStatus> {
        self.report.followers.iter().find(|follower| follower.replica == replica)
    }

    pub fn member(&self, replica: ReplicaId) -> Option<&Member> {
        self.report.members.iter().find(|member| member.replica == replica)
    }

    /// Whether a joint change is under way.
    pub fn joint(&self) -> bool {
        self.report.members.iter().any(|m| matches!(m.role, MemberRole::Incoming | MemberRole::Outgoing))
    }

    pub fn voters(&self) -> impl Iterator<Item = &Member> {
        self.report.members.iter().filter(|m| m.role.stays_voter())
    }

    /// Whether the leader hears from a replica; from itself always.
    pub fn active(&self, replica: ReplicaId) -> bool {
        replica == self.report.leader || self.follower(replica).is_some_and(|follower| follower.active)
    }

    /// Whether a replica has all that it needs to vote or lead at once.
    pub fn caught_up(&self, replica: ReplicaId) -> bool {
        replica == self.report.leader
            || self.follower(replica).is_some_and(|follower| follower.active && follower.caught_up)
    }

    /// Whether decisions could still be made, now and afterwards, if these replicas became voters and those
    /// went. `Err` says what is missing. Newcomers count only if they are members that answer, or else if the
    /// caller counts on them (`trusted`).
    pub fn quorums(&self, adds: &[ReplicaId], trusted: usize, removes: &[ReplicaId]) -> Result<(), String> {
        let check = |voters: Vec<ReplicaId>, trusted: usize, when: &str| {
            let answer = voters.iter().filter(|replica| self.active(**replica)).count() + trusted;
            let all = voters.len() + trusted;
            if answer > all / 2 {
                return Ok(());
            }
            Err(format!("{answer} of its {all} voters {when} the change answer"))
        };
        let now = self.report.members.iter().filter(|m| m.role == MemberRole::Voter);
        let now: Vec<ReplicaId> = now.map(|m| m.replica).collect();
        let stay = now.iter().filter(|replica| !removes.contains(replica)).copied();
        let later = stay.chain(adds.iter().copied()).collect();
        check(now.clone(), 0, "before")?;
        check(later, trusted, "after")
    }

    /// Whether the joint change under way can end. `Err` says what is missing.
    pub fn joint_quorums(&self) -> Result<(), String> {
        for (out, when) in [(MemberRole::Incoming, "before it"), (MemberRole::Outgoing, "after it")] {
            let voters = || self.report.members.iter().filter(|m| m.role.votes() && m.role != out);
            let answer = voters().filter(|m| self.active(m.replica)).count();
            if answer <= voters().count() / 2 {
                return Err(format!("{answer} of its {} voters {when} answer", voters().count()));
            }
        }
        Ok(())
    }
}
