//! Who of a shard's voters goes, when some have to: so many at a time, and in such an order, that the shard can
//! decide before each change, while it is under way, and after it.
//!
//! A decision takes a majority of the voters, and of both configurations while they change. Of `v` voters of which
//! `a` answer, `a − (v / 2 + 1)` more may fall silent: that is what the shard *stands*. It must not fall below
//! nothing, whatever is sick, dead, given up, to be emptied or too many, and in whatever mixture. So:
//!
//! 1. *Who doesn't answer goes before who does.* A voter that is lost and silent is of no use to any decision, but
//!    counts in each: without it, the shard stands as much or more. One that is lost and answers (its node was given
//!    up, or is to be emptied, and runs still) helps to decide until another is in its place.
//! 2. *As many go as come*, and so many more as there are too many. Who comes has caught up by then and answers;
//!    one for one, the shard stands what it stood before.
//! 3. *Of those too many, the lost go first, unless the shard couldn't decide without them.* Voters that should stay
//!    and are silent for the moment go in their place then, as few as possible.
//! 4. *If nobody can come, and there are none too many, a lost one that is silent goes alone* where that helps: if
//!    its own node can get another replica for it, which may be the only one that can; or if the voters are
//!    of an even number, of which one fewer stands one more. Two at least are left then.
//!
//! Each of these changes leaves fewer lost voters, or fewer too many. While a shard is led, and all its voters either
//! answer or are lost, there is one of them as long as something is to be done and nodes are left to do it with.

use super::view::{Led, View};
use crate::ids::ReplicaId;
use crate::placement::loads::{Domain, Loads};
use crate::placement::map::{Member, MemberRole, ShardRecord};

/// `lost` in the order in which they go: the silent first, the leader last.
pub(super) fn in_order(led: Led, mut lost: Vec<Member>) -> Vec<Member> {
    lost.sort_by_key(|member| (led.active(member.replica), member.replica == led.report.leader));
    lost
}

/// Who goes with a change in which `adds` voters come: of `lost`, which are [in order](in_order), and of those of
/// which there are too many for `wanted`. Nobody, if none can go (rule 4 may know one).
pub(super) fn with_successors(
    view: &View,
    loads: &Loads,
    led: Led,
    lost: &[Member],
    adds: usize,
    wanted: usize,
) -> Vec<ReplicaId> {
    let present = led.voters().count();
    let too_many = present.saturating_sub(wanted);
    let count = adds + too_many;
    let lost: Vec<ReplicaId> = lost.iter().map(|member| member.replica).collect();
    let others = superfluous(view, loads, led, &lost, present - lost.len());
    let choice = |instead: usize| {
        let first = lost.iter().take(count - instead);
        let rest = others.iter().take(count - first.len());
        first.chain(rest).copied().collect::<Vec<_>>()
    };
    let choices = (0..=too_many).map(choice);
    let mut possible = choices.filter(|removes| led.quorums(&[], adds, removes).is_ok());
    possible.next().unwrap_or_else(|| choice(0))
}

/// Who of `lost`, which are [in order](in_order), goes although nobody comes and none are too many: see rule 4.
pub(super) fn alone(view: &View, record: &ShardRecord, led: Led, lost: &[Member]) -> Option<ReplicaId> {
    let even = led.voters().count().is_multiple_of(2);
    let anew = |m: &Member| view.fit(m.node) && view.sick.contains_key(&(record.id, m.replica));
    let helps = |member: &&Member| {
        let silent = !led.active(member.replica) && view.lost(record.id, member).is_some();
        silent && (even || anew(member))
    };
    lost.iter().find(helps).map(|member| member.replica)
}

/// The voters that a shard with too many should lose: such as don't answer first, then such as are to be emptied
/// anyway, then such as share a failure domain with another, then those on the fullest nodes; the leader last. `going`
/// are about to go anyway.
pub(super) fn superfluous(
    view: &View,
    loads: &Loads,
    led: Led,
    going: &[ReplicaId],
    count: usize,
) -> Vec<ReplicaId> {
    let stay = led.voters().filter(|m| m.role == MemberRole::Voter && !going.contains(&m.replica));
    let mut voters: Vec<Member> = stay.copied().collect();
    let mut gone = Vec::new();
    while gone.len() < count {
        let domain = |member: &Member| view.map.nodes.get(&member.node).map(Domain::of);
        let rank = |(at, member): (usize, &Member)| {
            let leads = member.replica == led.report.leader;
            let answers = led.active(member.replica);
            let drains = view.drains(member.node);
            let near = voters.iter().filter(|other| domain(other) == domain(member)).count();
            let weight = view.map.nodes.get(&member.node).map_or(1, |node| u64::from(node.weight.max(1)));
            let load = (u64::from(loads.held(member.node)) << 32) / weight;
            (!leads, !answers, drains, near, load, at)
        };
        let Some((.., at)) = voters.iter().enumerate().map(rank).max() else { break };
        gone.push(voters.remove(at).replica);
    }
    gone
}

#[cfg(test)]
mod tests;
