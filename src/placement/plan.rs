//! The placement of a new database's shards.
//!
//! Rendezvous hashing alone would leave nodes far from their share (at 100 replicas per node the standard
//! deviation is 10 %), so it only states preferences. The plan is made in three steps, each exact:
//!
//! 1. *Quotas.* The new replicas are dealt out one by one, each to the node that is then lowest in
//!    replicas per weight, counting what it holds already of living shards. A node gets at most one replica of each shard,
//!    and a zone no more than `zone_most` of each: 1 while there are as many zones as replicas, the least
//!    possible number otherwise. This is bounded-load hashing with the tightest bound there is: plain
//!    rendezvous would be followed for more replicas under a looser one (at 100 replicas per node, 4 %
//!    of them), but a node may then also end far below its share.
//! 2. *Choice.* Shard after shard takes the nodes it prefers among those with quota left, as long as the
//!    shards after it can still be placed. That is so as long as no node has more quota left than there
//!    are shards left, and no zone more than `zone_most` times that: then the quotas can be dealt out
//!    round-robin in zone order, and no shard meets a node twice or a zone too often.
//! 3. *Leaders.* The first node of each shard, the one that should lead it, is chosen so that leaders too
//!    are spread by weight: the lowest of its nodes, counting what each should lead already; then leaderships
//!    are handed on along chains of shards (augmenting paths) until no chain evens them out further.
//!
//! *Nodes that are down.* Who plans may have heard which nodes are up ([`plan_among`]). Nothing is placed on the
//! others while those suffice. If they don't, each shard is on all of them, and on as few others as it takes, as
//! long as a majority of it is up from the beginning: who preferably leads is up then too.
//!
//! A node without a zone is a zone of its own. A node of weight 0 takes no replicas, nor does one that is no
//! ordinary member, or at whose address another runs by now. Nothing here depends on a clock, on chance or on
//! the machine: equal maps, and equal nodes that are up, give equal plans.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};

use super::loads::settled;
use super::map::{ClusterMap, NodeRecord};
use super::rendezvous;
use super::ring::{self, RingRange};
use crate::ids::NodeId;

/// A shard of a database to be created: its range and the nodes that shall hold its voters.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PlannedShard {
    /// The part of the ring it owns.
    pub range: RingRange,
    /// Nodes of its voters, in order of preference for leadership. Leaders are spread evenly if the
    /// first of each shard leads it.
    pub nodes: Vec<NodeId>,
}

/// Why no placement exists.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PlanError {
    /// There are fewer nodes than replicas asked for.
    #[error(
        "{replicas} replicas need {replicas} nodes, but the cluster has {nodes} (of a weight above 0): add nodes or ask for fewer replicas"
    )]
    TooFewNodes {
        /// Replicas asked for.
        replicas: u32,
        /// Nodes there are, without those of weight 0.
        nodes: usize,
    },
    /// So few nodes are up that a shard would begin without a majority.
    #[error(
        "{replicas} replicas need {majority} nodes that are up, not {up}: start those that are down or ask for fewer replicas",
        majority = majority(*.replicas)
    )]
    TooFewUp {
        /// Replicas asked for.
        replicas: u32,
        /// Nodes that are up, without those of weight 0.
        up: usize,
        /// Those that aren't.
        down: Vec<NodeId>,
    },
    /// A database has at least one shard and one replica.
    #[error("a database needs at least one replica and one shard")]
    Empty,
}

/// Plans `shards` equal ranges with `replicas` voters each over the nodes of `map`. Checks no upper limits:
/// those are the caller's. 10,000 shards on 100 nodes take a fraction of a second.
pub fn plan_database(
    map: &ClusterMap,
    name: &str,
    replicas: u32,
    shards: u32,
) -> Result<Vec<PlannedShard>, PlanError> {
    plan_among(map, name, replicas, shards, |_| true)
}

/// The same as far as the nodes suffice that are up; see the module page.
pub fn plan_among(
    map: &ClusterMap,
    name: &str,
    replicas: u32,
    shards: u32,
    is_up: impl Fn(NodeId) -> bool,
) -> Result<Vec<PlannedShard>, PlanError> {
    if replicas == 0 || shards == 0 {
        return Err(PlanError::Empty);
    }
    let replaced = map.replaced();
    let takes = |node: &&NodeRecord| {
        node.standing.takes_replicas() && node.weight > 0 && !replaced.contains(&node.id)
    };
    let (up, down): (Vec<_>, Vec<_>) = map.nodes.values().filter(takes).partition(|node| is_up(node.id));
    let live = u32::try_from(up.len()).unwrap_or(u32::MAX);
    if up.len() + down.len() < replicas as usize {
        return Err(PlanError::TooFewNodes { replicas, nodes: up.len() + down.len() });
    }
    if live >= replicas {
        return Ok(plan(map, &up, name, replicas, shards));
    }
    if live < majority(replicas) {
        let down = down.into_iter().map(|node| node.id).collect();
        return Err(PlanError::TooFewUp { replicas, up: up.len(), down });
    }
    // Each shard is on all that are up. Of the others those that share no zone with them come first.
    let missing = replicas - live;
    let apart = |node: &&NodeRecord| node.zone.is_empty() || up.iter().all(|live| live.zone != node.zone);
    let (apart, beside): (Vec<_>, Vec<_>) = down.into_iter().partition(apart);
    let others = if apart.len() >= missing as usize { apart } else { [apart, beside].concat() };
    let mut planned = plan(map, &up, name, live, shards);
    for (shard, more) in planned.iter_mut().zip(plan(map, &others, name, missing, shards)) {
        shard.nodes.extend(more.nodes);
    }
    Ok(planned)
}

/// So many of that many replicas commit.
fn majority(replicas: u32) -> u32 {
    replicas / 2 + 1
}

/// The plan over these nodes, which are as many as there are replicas to a shard, or more.
fn plan(
    map: &ClusterMap,
    nodes: &[&NodeRecord],
    name: &str,
    replicas: u32,
    shards: u32,
) -> Vec<PlannedShard> {
    let mut planner = Planner::new(map, nodes, replicas, shards);
    let ranges = ring::equal_ranges(shards);
    let mut chosen: Vec<Vec<usize>> = (0..shards)
        .rev()
        .zip(&ranges)
        .map(|(later, range)| planner.choose(rendezvous::shard_key(name, range.start), later))
        .collect();
    planner.spread_leaders(&mut chosen);
    ranges
        .into_iter()
        .zip(chosen)
        .map(|(range, nodes)| PlannedShard {
            range,
            nodes: nodes.into_iter().map(|at| planner.nodes[at].id).collect(),
        })
        .collect()
}

/// A node that takes replicas. Nodes and zones are named by their place in the planner's tables.
struct Candidate {
    id: NodeId,
    weight: u32,
    zone: usize,
    /// Replicas of living shards it holds already.
    held: u32,
    /// Living shards it should lead already: those whose first member it is.
    led: u32,
    /// New replicas it shall get and has not yet got.
    quota: u32,
}

struct Planner {
    nodes: Vec<Candidate>,
    /// Quota left in each zone.
    zones: Vec<u32>,
    /// Most replicas of one shard in one zone.
    zone_most: u32,
    replicas: u32,
    /// All nodes have the same weight.
    uniform: bool,
}

impl Planner {
    fn new(map: &ClusterMap, able: &[&NodeRecord], replicas: u32, shards: u32) -> Planner {
        let mut zone_names = BTreeMap::new();
        let mut nodes: Vec<Candidate> = Vec::new();
        let mut places = BTreeMap::new();
        for record in able {
            let own = (record.zone.is_empty()).then_some(record.id);
            let next = zone_names.len();
            places.insert(record.id, nodes.len());
            nodes.push(Candidate {
                id: record.id,
                weight: record.weight,
                zone: *zone_names.entry((record.zone.as_str(), own)).or_insert(next),
                held: 0,
                led: 0,
                quota: 0,
            });
        }
        debug_assert!(nodes.len() >= replicas as usize, "{} nodes for {replicas} replicas", nodes.len());
        for shard in map.shards.values().filter(|s| !s.dropped) {
            for (at, member) in settled(shard).enumerate() {
                if let Some(place) = places.get(&member.node) {
                    nodes[*place].held += 1;
                    nodes[*place].led += u32::from(at == 0);
                }
            }
        }
        let mut sizes = vec![0_u32; zone_names.len()];
        for node in &nodes {
            sizes[node.zone] += 1;
        }
        let room = |most: u32| sizes.iter().map(|&size| size.min(most)).sum::<u32>();
        let zone_most = (1..replicas).find(|&most| room(most) >= replicas).unwrap_or(replicas);
        let uniform = nodes.iter().all(|node| node.weight == nodes[0].weight);
        let mut planner = Planner { zones: vec![0; sizes.len()], nodes, zone_most, replicas, uniform };
        planner.deal_quotas(shards);
        planner
    }

    /// Step 1.
    fn deal_quotas(&mut self, shards: u32) {
        let zone_limit = self.zone_most.saturating_mul(shards);
        let zone_of = |at: usize| self.nodes[at].zone;
        let zones = &mut self.zones;
        let start: Vec<(u32, u32)> = self.nodes.iter().map(|n| (n.held, n.weight)).collect();
        let quotas = deal(&start, u64::from(shards) * u64::from(self.replicas), |at, quota| {
            let zone = &mut zones[zone_of(at)];
            let room = quota < shards && *zone < zone_limit;
            *zone += u32::from(room);
            room
        });
        for (node, quota) in self.nodes.iter_mut().zip(quotas) {
            node.quota = quota;
        }
    }

    /// Step 2 for one shard, `later` others of which are still to come: the nodes of its replicas by
    /// preference.
    fn choose(&mut self, shard_key: u64, later: u32) -> Vec<usize> {
        // A few are nearly always enough.
        let mut taken = self.pick(&self.order(shard_key, 8 * self.replicas as usize), later);
        if taken.len() < self.replicas as usize {
            taken = self.pick(&self.order(shard_key, usize::MAX), later);
        }
        debug_assert_eq!(taken.len(), self.replicas as usize, "the quotas left can't be dealt out");
        for &at in &taken {
            self.nodes[at].quota -= 1;
            self.zones[self.nodes[at].zone] -= 1;
        }
        taken
    }

    /// The first `most` of the nodes with quota left, or some more, as the shard prefers them.
    fn order(&self, shard_key: u64, most: usize) -> Vec<usize> {
        let able = self.nodes.iter().enumerate().filter(|(_, node)| node.quota > 0);
        let hashes = able.map(|(at, node)| (Reverse(rendezvous::hash(shard_key, node.id)), at));
        let mut hashes: Vec<(Reverse<u64>, usize)> = hashes.collect();
        // Among nodes of one weight the greatest hash comes first, and that is quicker to compare.
        if self.uniform && most < hashes.len() {
            hashes.select_nth_unstable(most);
            hashes.truncate(most);
        }
        let draw = |(Reverse(hash), at): (Reverse<u64>, usize)| {
            let node = &self.nodes[at];
            rendezvous::draw_of(hash, node.weight).map(|draw| (draw, node.id, at))
        };
        let mut draws: Vec<_> = hashes.into_iter().filter_map(draw).collect();
        draws.sort_unstable();
        draws.into_iter().map(|(_, _, at)| at).collect()
    }

    /// The first nodes in `order` that the shard can have: too few if there are no more of them in it.
    fn pick(&self, order: &[usize], later: u32) -> Vec<usize> {
        // A node with more quota than later shards could use must be taken now ...
        let must_take = |node: &Candidate| node.quota > later;
        // ... and so must as many nodes of a zone as are too many for later.
        let mut zone_must: Vec<u32> =
            self.zones.iter().map(|left| left.saturating_sub(self.zone_most.saturating_mul(later))).collect();
        let mut zone_must_nodes = vec![0; self.zones.len()];
        for node in self.nodes.iter().filter(|node| must_take(node)) {
            zone_must_nodes[node.zone] += 1;
        }
        let mut musts = 0;
        for (must, nodes) in zone_must.iter_mut().zip(&zone_must_nodes) {
            *must = (*must).max(*nodes);
            musts += *must;
        }

        let mut taken = Vec::with_capacity(self.replicas as usize);
        let mut zone_taken = vec![0; self.zones.len()];
        let mut free = self.replicas;
        for &at in order {
            let node = &self.nodes[at];
            let zone = node.zone;
            let reserved = zone_must_nodes[zone] - u32::from(must_take(node));
            if free == 0 || zone_taken[zone] + 1 + reserved > self.zone_most {
                continue;
            }
            // Taking it fills one of the zone's musts, unless those left are all for other nodes.
            let fills = zone_must[zone] > reserved;
            if !fills && free <= musts {
                continue;
            }
            zone_must[zone] -= u32::from(fills);
            musts -= u32::from(fills);
            zone_must_nodes[zone] = reserved;
            zone_taken[zone] += 1;
            free -= 1;
            taken.push(at);
        }
        taken
    }

    /// Step 3: puts the node that should lead each shard first.
    fn spread_leaders(&self, chosen: &mut [Vec<usize>]) {
        let mut leaders = Leaders {
            count: self.nodes.iter().map(|n| n.led).collect(),
            weights: self.nodes.iter().map(|n| n.weight).collect(),
            shards: vec![Vec::new(); self.nodes.len()],
        };
        for (shard, nodes) in chosen.iter_mut().enumerate() {
            let level = |i: &usize| level(leaders.count[nodes[*i]], leaders.weights[nodes[*i]]);
            // The first of the lowest: the one the shard prefers.
            let best = (0..nodes.len()).min_by_key(level).unwrap_or(0);
            nodes[..=best].rotate_right(1);
            leaders.count[nodes[0]] += 1;
            leaders.shards[nodes[0]].push(shard);
        }
        let mut settled = false;
        while !settled {
            settled = true;
            for from in 0..self.nodes.len() {
                while let Some(handovers) = leaders.chain(from, chosen) {
                    leaders.hand_over(from, handovers, chosen);
                    settled = false;
                }
            }
        }
    }
}

/// Who should lead what while step 3 evens it out.
struct Leaders {
    /// Shards led by each node, those of other databases included.
    count: Vec<u32>,
    weights: Vec<u32>,
    /// The shards of the plan led by each node.
    shards: Vec<Vec<usize>>,
}

impl Leaders {
    /// The shortest chain of handovers (shard, new leader) that begins with a shard led by `from` and ends
    /// with a node that would have less per weight afterwards than `from` has now.
    fn chain(&self, from: usize, chosen: &[Vec<usize>]) -> Option<Vec<(usize, usize)>> {
        let top = level(self.count[from].checked_sub(1)?, self.weights[from]);
        // By whom and with which shard each node was reached.
        let mut reached: Vec<Option<(usize, usize)>> = vec![None; self.shards.len()];
        let mut queue = VecDeque::from([from]);
        while let Some(giver) = queue.pop_front() {
            for &shard in &self.shards[giver] {
                for &taker in &chosen[shard] {
                    if taker == from || reached[taker].is_some() {
                        continue;
                    }
                    reached[taker] = Some((giver, shard));
                    if level(self.count[taker], self.weights[taker]) < top {
                        let mut handovers = Vec::new();
                        let mut at = taker;
                        while let Some((giver, shard)) = reached[at] {
                            handovers.push((shard, at));
                            at = giver;
                        }
                        handovers.reverse();
                        return Some(handovers);
                    }
                    queue.push_back(taker);
                }
            }
        }
        None
    }

    fn hand_over(&mut self, from: usize, handovers: Vec<(usize, usize)>, chosen: &mut [Vec<usize>]) {
        let mut giver = from;
        for (shard, taker) in handovers {
            self.shards[giver].retain(|s| *s != shard);
            self.shards[taker].push(shard);
            if let Some(at) = chosen[shard].iter().position(|node| *node == taker) {
                chosen[shard][..=at].rotate_right(1);
            }
            giver = taker;
        }
        self.count[from] -= 1;
        self.count[giver] += 1;
    }
}

/// How much a node of that weight has, per weight, if it has `count` and gets one more: counted halfway
/// between the two (Webster's method), which brings each node as near to its share as whole units can.
pub(super) fn level(count: u32, weight: u32) -> u64 {
    ((2 * u64::from(count) + 1) << 30) / u64::from(weight.max(1))
}

/// Deals out `count` units one by one, each to whoever then has the lowest [`level`], given what each has at
/// the `start` and its weight; ties go to the first. `room` is asked before each unit whether its receiver,
/// who got so many already, may have one more; who may not gets none from then on. Returns what each got.
fn deal(start: &[(u32, u32)], count: u64, mut room: impl FnMut(usize, u32) -> bool) -> Vec<u32> {
    let mut got = vec![0_u32; start.len()];
    let level = |at: usize, got: u32| level(start[at].0.saturating_add(got), start[at].1);
    let mut heap: BinaryHeap<_> = (0..start.len()).map(|at| Reverse((level(at, 0), at))).collect();
    let mut left = count;
    while left > 0 {
        let Some(Reverse((_, at))) = heap.pop() else {
            break;
        };
        if room(at, got[at]) {
            got[at] += 1;
            left -= 1;
            heap.push(Reverse((level(at, got[at]), at)));
        }
    }
    got
}

#[cfg(test)]
mod tests;
