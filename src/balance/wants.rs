//! What a shard without a move under way needs: other members, or another leader.

use super::view::{Led, View};
use crate::ids::{METADATA_SHARD, NodeId, ReplicaId};
use crate::placement::loads::{Domain, Loads, metadata_voters};
use crate::placement::map::{Member, MemberRole, MoveCause, ShardRecord, ShardTarget, Standing};

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
    /// These go, and others come for them as far as the shard needs them.
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
    let lost: Vec<(Member, String)> =
        voters.iter().filter_map(|m| Some((**m, view.lost(record.id, m)?))).collect();
    if let Some((_, why)) = lost.first() {
        let answer = voters.iter().filter(|m| led.active(m.replica)).count();
        let spare = answer.saturating_sub(voters.len() / 2 + 1);
        let why = why.clone();
        let kind = Kind::Replace(lost.into_iter().map(|(member, _)| member).collect());
        return Some(Want { urgency: Urgency::Repair(spare), kind, why });
    }
    let draining: Vec<Member> = voters.iter().filter(|m| drains(view, m.node)).map(|m| **m).collect();
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

fn drains(view: &View, node: NodeId) -> bool {
    view.nodes.get(&node).is_some_and(|node| node.standing == Standing::Draining)
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
            let surplus = lost.len() - needed;
            let adds = add(&mut staying, needed);
            let mut removes: Vec<ReplicaId> =
                lost.iter().take(surplus + adds.len()).map(|member| member.replica).collect();
            if removes.is_empty() {
                removes.push(
                    anew(view, record, led, lost)
                        .ok_or_else(|| format!("{}, and no other node can take a replica", want.why))?,
                );
            }
            // What there is too much of goes in the same change: with one voter less than an odd number the
            // shard would stand fewer losses on the way than before and after, and might not get so far at all
            // if others are silent, which go first.
            let left = led.voters().count() + adds.len() - removes.len();
            if adds.is_empty() && left > wanted {
                removes.extend(superfluous(view, loads, led, &removes, left - wanted));
            }
            (adds, removes)
        }
        Kind::Grow(count) => {
            let present = staying.len();
            let mut adds = add(&mut staying, *count);
            // An even number on the way stands no more losses than one fewer.
            let odd = |adds: usize| !(present + adds).is_multiple_of(2);
            if adds.len() < *count && !odd(adds.len()) {
                adds.pop();
            }
            if adds.is_empty() {
                return Err(format!("{}, and too few nodes can take one", want.why));
            }
            (adds, Vec::new())
        }
        Kind::Shrink(count) => (Vec::new(), superfluous(view, loads, led, &[], *count)),
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

/// A lost replica for which there is no other node, but which can be made anew on its own: it goes first, and
/// the shard, which then has too few, gets another. With it sick all the others were needed too, so nothing
/// is risked.
fn anew(view: &View, record: &ShardRecord, led: Led, lost: &[Member]) -> Option<ReplicaId> {
    let sick =
        |member: &&Member| view.fit(member.node) && view.sick.contains_key(&(record.id, member.replica));
    let others = |replica| led.voters().filter(move |m| m.replica != replica);
    let sick = lost.iter().find(sick)?.replica;
    let (all, active) = (others(sick).count(), others(sick).filter(|m| led.active(m.replica)).count());
    // Without it the shard can stand no fewer losses than with it, since it doesn't answer.
    let whole = all >= 2 && active > all / 2;
    whole.then_some(sick)
}

/// The voters that a shard with too many should lose: such as don't answer first, then such as share a failure
/// domain with another, then those on the fullest nodes; the leader last. `going` are about to go anyway.
fn superfluous(view: &View, loads: &Loads, led: Led, going: &[ReplicaId], count: usize) -> Vec<ReplicaId> {
    let stay = led.voters().filter(|m| m.role == MemberRole::Voter && !going.contains(&m.replica));
    let mut voters: Vec<Member> = stay.copied().collect();
    let mut gone = Vec::new();
    while gone.len() < count && voters.len() > 1 {
        let domain = |member: &Member| view.map.nodes.get(&member.node).map(Domain::of);
        let rank = |(at, member): (usize, &Member)| {
            let leads = member.replica == led.report.leader;
            let answers = led.active(member.replica);
            let near = voters.iter().filter(|other| domain(other) == domain(member)).count();
            let weight = view.map.nodes.get(&member.node).map_or(1, |node| u64::from(node.weight.max(1)));
            let load = (u64::from(loads.held(member.node)) << 32) / weight;
            (!leads, !answers, near, load, at)
        };
        let Some((.., at)) = voters.iter().enumerate().map(rank).max() else { break };
        gone.push(voters.remove(at).replica);
    }
    gone
}
