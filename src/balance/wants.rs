//! What a shard without a move under way needs: other members, or another leader.

use super::departures;
use super::view::{Led, View};
use crate::ids::{METADATA_SHARD, NodeId, ReplicaId};
use crate::placement::loads::{Loads, metadata_voters};
use crate::placement::map::{Member, MoveCause, ShardRecord, ShardTarget, Standing};

/// How pressing something is; the first comes first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Urgency {
    /// A replica is lost. So many more losses the shard can stand.
    Repair(usize),
    /// A node is to be emptied.
    Drain,
    /// The number of replicas isn't what it should be.
    Replicas,
    /// A plan wants it elsewhere.
    Target,
}

/// Members that should change.
#[derive(Debug)]
pub(super) struct Want {
    pub urgency: Urgency,
    pub kind: Kind,
    /// Why, for whoever asks what stands still.
    pub why: String,
}

#[derive(Debug)]
pub(super) enum Kind {
    /// These go, [in this order](departures::in_order), and others come for them as far as the shard needs them.
    Replace(Vec<Member>),
    /// So many come.
    Grow(usize),
    /// So many go.
    Shrink(usize),
    /// It is to be on these nodes.
    Target(ShardTarget),
}

/// A change of members that can be begun.
#[derive(Debug)]
pub(super) struct Begin {
    pub adds: Vec<NodeId>,
    pub removes: Vec<ReplicaId>,
    pub cause: MoveCause,
}

/// How many voters a shard should have.
pub(super) fn wanted(view: &View, record: &ShardRecord) -> usize {
    if record.id != METADATA_SHARD {
        let database = view.map.databases.get(&record.database);
        return database.map_or(record.members.len(), |database| database.replicas as usize);
    }
    let holds = |node| record.members.iter().any(|member| member.node == node);
    let members = view.nodes.iter().filter(|(id, node)| {
        let takes = view.map.nodes.get(id).is_some_and(|record| record.weight > 0) || holds(**id);
        node.standing == Standing::Member && takes && !node.replaced
    });
    let (mut all, mut living) = (0, 0);
    for (_, node) in members {
        all += 1;
        living += usize::from(node.lost.is_none());
    }
    // Nodes that are merely gone never take it below three: a copy on a dead disk is more than none. And two
    // copies, once there, are not made one: without its leader the metadata shard can be missed for a while,
    // without its only copy the cluster is lost.
    let two = usize::from(living >= 2 && record.members.len() >= 2) * 2;
    metadata_voters(living).max(metadata_voters(all).min(3)).max(two)
}

/// What the shard needs most, if anything.
pub(super) fn want(view: &View, record: &ShardRecord, led: Led) -> Option<Want> {
    let voters: Vec<&Member> = led.voters().collect();
    let lost: Vec<Member> =
        voters.iter().filter(|m| view.lost(record.id, m).is_some()).map(|m| **m).collect();
    let lost = departures::in_order(led, lost);
    if let Some(why) = lost.first().and_then(|first| view.lost(record.id, first)) {
        let answer = voters.iter().filter(|m| led.active(m.replica)).count();
        let spare = answer.saturating_sub(voters.len() / 2 + 1);
        return Some(Want { urgency: Urgency::Repair(spare), kind: Kind::Replace(lost), why });
    }
    let draining: Vec<Member> = voters.iter().filter(|m| view.drains(m.node)).map(|m| **m).collect();
    let draining = departures::in_order(led, draining);
    if let Some(first) = draining.first() {
        let why = format!("node {} is to be emptied", first.node);
        return Some(Want { urgency: Urgency::Drain, kind: Kind::Replace(draining), why });
    }
    let wanted = wanted(view, record);
    if voters.len() != wanted {
        let why = format!("it has {} replicas instead of {wanted}", voters.len());
        let kind = match voters.len() < wanted {
            true => Kind::Grow(wanted - voters.len()),
            false => Kind::Shrink(voters.len() - wanted),
        };
        return Some(Want { urgency: Urgency::Replicas, kind, why });
    }
    let target = record.target.as_ref().filter(|target| {
        let moves = target.nodes.iter().any(|node| voters.iter().all(|m| m.node != *node));
        view.follows_targets() && target.plan == view.map.rebalance.plan && moves
    })?;
    let why = "a plan wants it elsewhere".into();
    Some(Want { urgency: Urgency::Target, kind: Kind::Target(target.clone()), why })
}

/// Turns a want into a move. `Err` says why there is none for now.
pub(super) fn begin(
    view: &View,
    loads: &mut Loads,
    record: &ShardRecord,
    led: Led,
    want: &Want,
    shunned: &[NodeId],
) -> Result<Begin, String> {
    let wanted = wanted(view, record);
    let cause = match want.urgency {
        Urgency::Repair(_) => MoveCause::Repair,
        Urgency::Drain => MoveCause::Drain,
        Urgency::Replicas => MoveCause::Replicas,
        Urgency::Target => MoveCause::Rebalance,
    };
    let mut staying: Vec<NodeId> = led.voters().map(|m| m.node).collect();
    let preferred = match &record.target {
        Some(target) if view.follows_targets() => target.nodes.as_slice(),
        _ => &[],
    };
    let mut add = |staying: &mut Vec<NodeId>, count: usize| {
        let mut adds = Vec::new();
        while adds.len() < count {
            let replicas = wanted.max(staying.len() + 1);
            let Some(node) = loads.choose(record, staying, replicas, preferred, shunned) else { break };
            staying.push(node);
            adds.push(node);
        }
        adds
    };
    let (adds, removes) = match &want.kind {
        Kind::Replace(lost) => {
            staying.retain(|node| lost.iter().all(|m| m.node != *node));
            let needed = wanted.saturating_sub(staying.len()).min(lost.len());
            let adds = add(&mut staying, needed);
            let mut removes = departures::with_successors(view, loads, led, lost, adds.len(), wanted);
            // Then none are too many either: one that doesn't answer and stays is never why nobody goes.
            if removes.is_empty() {
                let alone = departures::alone(view, record, led, lost);
                let alone =
                    alone.ok_or_else(|| format!("{}, and no other node can take a replica", want.why));
                removes.push(alone?);
            }
            (adds, removes)
        }
        Kind::Grow(count) => {
            let present = staying.len();
            let mut adds = add(&mut staying, *count);
            // An even number on the way stands no more losses than one fewer, and every decision needs one more node.
            // Two are worth it all the same: of the only copy there is none left if its disk fails.
            let then = present + adds.len();
            if adds.len() < *count && then.is_multiple_of(2) && then > 2 {
                adds.pop();
            }
            if adds.is_empty() {
                return Err(format!("{}, and too few nodes can take one", want.why));
            }
            (adds, Vec::new())
        }
        Kind::Shrink(count) => (Vec::new(), departures::superfluous(view, loads, led, &[], *count)),
        Kind::Target(target) => {
            let adds: Vec<NodeId> =
                target.nodes.iter().filter(|node| !staying.contains(node)).copied().collect();
            if let Some(node) = adds.iter().find(|node| !view.fit(**node)) {
                return Err(format!("node {node}, where a plan wants it, can take no replica now"));
            }
            let going = led.voters().filter(|m| !target.nodes.contains(&m.node));
            (adds, going.map(|m| m.replica).collect())
        }
    };
    if let Err(why) = led.quorums(&[], adds.len(), &removes) {
        return Err(format!("{}, but only {why}", want.why));
    }
    Ok(Begin { adds, removes, cause })
}
