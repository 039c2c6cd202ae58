//! A move under way: what its next step is. The members that the shard itself reports decide.

use super::facts::Action;
use super::view::{Led, View};
use crate::group::types::MembershipChange;
use crate::ids::{NodeId, ReplicaId};
use crate::limits;
use crate::machine::command::MetaCommand;
use crate::placement::map::{Member, MemberRole, ShardMove, ShardRecord};

/// What a shard needs.
#[derive(Debug)]
pub(super) enum Next {
    /// Nothing: what was begun goes on by itself.
    Nothing,
    /// Nothing, as long as the new replica on this node comes nearer.
    CatchingUp(NodeId),
    /// Something that isn't there: this.
    Wait(String),
    /// The same, but not for ever: if it doesn't come, another move may succeed.
    Stalled(String),
    /// This step.
    Do(Action),
    /// Learners are removed, whether or not there are any, so that no earlier order adds them any more.
    /// Only once the conf version has grown past this one, the move has been rolled back.
    Fence(u64, Action),
}

/// The next step of `moving`, the move of `record`. `fenced`: conf version at which the reconciler last had
/// the adds removed, for a move that is rolled back.
pub(super) fn next(
    view: &View,
    record: &ShardRecord,
    moving: &ShardMove,
    led: Led,
    fenced: Option<u64>,
) -> Next {
    let shard = record.id;
    let change = |change| Next::Do(Action::Change { node: led.node, shard, conf: led.conf(), change });
    let end = || match record.epoch.conf == led.conf() {
        true => Next::Do(Action::Meta(MetaCommand::EndMove { shard, id: moving.id })),
        // The map has to know the members first.
        false => Next::Nothing,
    };
    let role = |add: &Member| led.member(add.replica).map(|member| member.role);
    let going: Vec<ReplicaId> =
        moving.removes.iter().copied().filter(|replica| led.member(*replica).is_some()).collect();
    let done = moving.adds.iter().all(|add| role(add) == Some(MemberRole::Voter)) && going.is_empty();
    if done {
        return end();
    }
    let promoted = moving.adds.iter().any(|add| role(add).is_some_and(MemberRole::votes));
    if moving.cancelling && !promoted {
        let adds: Vec<ReplicaId> = moving.adds.iter().map(|add| add.replica).collect();
        let gone = adds.iter().all(|add| led.member(*add).is_none());
        if gone && fenced.is_some_and(|conf| conf < led.conf()) {
            return end();
        }
        let change = MembershipChange::RemoveLearners(adds);
        let action = Action::Change { node: led.node, shard, conf: led.conf(), change };
        return Next::Fence(led.conf(), action);
    }
    if let Some(why) = hopeless(view, record, moving, led) {
        if moving.cancelling {
            return Next::Wait(why);
        }
        return Next::Do(Action::Meta(MetaCommand::CancelMove { shard, id: moving.id }));
    }
    let missing: Vec<Member> = moving
        .adds
        .iter()
        .filter(|add| role(add).is_none())
        .map(|add| Member { role: MemberRole::Learner, ..*add })
        .collect();
    if !missing.is_empty() {
        return change(MembershipChange::AddLearners(missing));
    }
    let learner = |add: &ReplicaId| led.member(*add).is_some_and(|m| m.role == MemberRole::Learner);
    let promote: Vec<ReplicaId> = moving.adds.iter().map(|add| add.replica).filter(learner).collect();
    let (voters, learners): (Vec<ReplicaId>, Vec<ReplicaId>) =
        going.into_iter().partition(|replica| led.member(*replica).is_some_and(|m| m.role.votes()));
    if promote.is_empty() && voters.is_empty() {
        return change(MembershipChange::RemoveLearners(learners));
    }
    // What has been promoted is taken back for one reason only: see `way_back`.
    let stalled = |why| if promoted { Next::Wait(why) } else { Next::Stalled(why) };
    for add in moving.adds.iter().filter(|add| promote.contains(&add.replica)) {
        if !led.active(add.replica) {
            return stalled(format!("the leader doesn't hear from the new replica on node {}", add.node));
        }
        if !led.caught_up(add.replica) {
            return match promoted {
                true => Next::Nothing,
                false => Next::CatchingUp(add.node),
            };
        }
    }
    if let Err(why) = led.quorums(&promote, 0, &voters) {
        return way_back(view, record, moving, led).unwrap_or_else(|| stalled(format!("only {why}")));
    }
    if voters.contains(&led.report.leader) {
        return match heir(view, led, &voters) {
            Some(to) => Next::Do(Action::Transfer { node: led.node, shard, to }),
            None if led.voters().count() > voters.len() => {
                stalled("no voter that stays is able to lead".into())
            }
            // The newcomer is all that remains. A leader doesn't remove itself, and learners can't lead; so the
            // newcomer becomes a voter first, and then leads.
            None => change(MembershipChange::Exchange { promote, remove: Vec::new() }),
        };
    }
    change(MembershipChange::Exchange { promote, remove: voters })
}

/// The next step back from where new replicas are voters already, and one of them is lost before those that it came for have
/// left: too few would answer without them, for ever. Those who were there before go on alone, if enough of them answer.
fn way_back(view: &View, record: &ShardRecord, moving: &ShardMove, led: Led) -> Option<Next> {
    let shard = record.id;
    let came: Vec<Member> =
        led.voters().filter(|m| moving.adds.iter().any(|add| add.replica == m.replica)).copied().collect();
    if !came.iter().any(|member| view.lost(shard, member).is_some()) {
        return None;
    }
    let remove: Vec<ReplicaId> = came.iter().map(|member| member.replica).collect();
    led.quorums(&[], 0, &remove).ok()?;
    if !moving.cancelling {
        return Some(Next::Do(Action::Meta(MetaCommand::CancelMove { shard, id: moving.id })));
    }
    if remove.contains(&led.report.leader) {
        let to = heir(view, led, &remove)?;
        return Some(Next::Do(Action::Transfer { node: led.node, shard, to }));
    }
    let change = MembershipChange::Exchange { promote: Vec::new(), remove };
    Some(Next::Do(Action::Change { node: led.node, shard, conf: led.conf(), change }))
}

/// Why the move can't succeed any more although it hasn't come to the joint change: a new replica is not to be
/// had where it should be.
fn hopeless(view: &View, record: &ShardRecord, moving: &ShardMove, led: Led) -> Option<String> {
    for add in &moving.adds {
        if led.member(add.replica).is_some_and(|member| member.role.votes()) {
            continue;
        }
        let Some(node) = view.nodes.get(&add.node) else {
            return Some(format!("node {} is not in the map", add.node));
        };
        if !node.standing.takes_replicas() {
            return Some(format!("node {} takes no replicas any more", add.node));
        }
        if node.silent_ms >= limits::NEWCOMER_SILENT_MS && !led.active(add.replica) {
            return Some(format!("node {} doesn't answer", add.node));
        }
        if node.disk_full && !led.caught_up(add.replica) {
            return Some(format!("the disk of node {} is full", add.node));
        }
        if let Some(why) = view.sick.get(&(record.id, add.replica)) {
            return Some(format!("the new replica on node {} {why}", add.node));
        }
    }
    None
}

/// The voter that should lead instead of the present leader, none of `removes`: one that is caught up, on a
/// node that may lead and leads least for its weight; if there is none, any other that is caught up.
pub(super) fn heir(view: &View, led: Led, removes: &[ReplicaId]) -> Option<NodeId> {
    let able = led.report.members.iter().filter(|member| {
        member.role == MemberRole::Voter
            && member.replica != led.report.leader
            && !removes.contains(&member.replica)
            && led.caught_up(member.replica)
    });
    let rank = |member: &Member| {
        let may_lead = view.nodes.get(&member.node).is_some_and(|node| node.may_lead);
        let weight = view.map.nodes.get(&member.node).map_or(1, |node| u64::from(node.weight.max(1)));
        let leads = u64::from(view.leads.get(&member.node).copied().unwrap_or(0));
        (!may_lead, (leads << 32) / weight, member.node)
    };
    able.map(rank).min().map(|(_, _, node)| node)
}
