//! Step 4: leaderships go from nodes that lead too many shards to nodes that lead too few.

use std::collections::VecDeque;

use super::board::{Board, Place};
use super::shares::{Bounds, Share, quotas, shares};
use crate::placement::plan::level;

/// Leaderships that count: not that of the metadata shard, which is no load.
fn counted(board: &Board) -> impl Iterator<Item = &Place> {
    board.shards.iter().filter(|place| place.id != crate::ids::METADATA_SHARD)
}

fn counts(board: &Board) -> Vec<u32> {
    let mut counts = vec![0; board.nodes.len()];
    counted(board).for_each(|place| counts[place.leader] += 1);
    counts
}

fn bounds(board: &Board) -> Bounds {
    let mut nodes = vec![0; board.nodes.len()];
    for place in counted(board) {
        place.nodes.iter().for_each(|node| nodes[*node] += 1);
    }
    // Failure domains don't matter.
    Bounds { nodes, domains: vec![u32::MAX.into(); board.domains] }
}

fn shares_of(board: &Board, counts: &[u32], bounds: &Bounds) -> Vec<Share> {
    shares(&board.nodes, counts.iter().map(|count| u64::from(*count)).sum(), bounds)
}

/// See [`super::is_uneven`].
pub(super) fn is_uneven(board: &Board) -> bool {
    let counts = counts(board);
    let shares = shares_of(board, &counts, &bounds(board));
    (0..board.nodes.len()).any(|at| !board.nodes[at].frozen && shares[at].is_far(counts[at]))
}

/// Spreads leadership over the nodes that hold replicas.
pub(super) fn spread(board: &mut Board) {
    let may_lead = |board: &Board, node: usize| board.nodes[node].weight > 0;
    let mut counts = vec![0_u32; board.nodes.len()];
    for place in counted(board) {
        if place.nodes.contains(&place.leader) && may_lead(board, place.leader) {
            counts[place.leader] += 1;
        }
    }
    // Who can't go on leading is followed by the one that leads least.
    for at in 0..board.shards.len() {
        let place = &board.shards[at];
        if !place.leadable || (place.nodes.contains(&place.leader) && may_lead(board, place.leader)) {
            continue;
        }
        let able = place.nodes.iter().copied().filter(|node| may_lead(board, *node));
        let rank =
            |node: &usize| (board.nodes[*node].frozen, level(counts[*node], board.nodes[*node].weight));
        if let Some(heir) = able.min_by_key(rank) {
            counts[heir] += 1;
            board.shards[at].leader = heir;
        }
    }
    let bounds = bounds(board);
    let quotas = {
        let shares = shares_of(board, &counts, &bounds);
        quotas(&board.nodes, &counts, &shares, &bounds)
    };
    let mut led: Vec<Vec<usize>> = vec![Vec::new(); board.nodes.len()];
    for (at, place) in board.shards.iter().enumerate().filter(|(_, place)| place.leadable) {
        led[place.leader].push(at);
    }
    let mut handing = Handing { board, counts, quotas, led, closed: Vec::new() };
    handing.closed = vec![false; handing.led.len()];
    handing.run();
}

struct Handing<'a> {
    board: &'a mut Board,
    counts: Vec<u32>,
    quotas: Vec<u32>,
    /// The shards that each node leads.
    led: Vec<Vec<usize>>,
    /// Nodes from which no chain leads to one that leads too few. They stay so: whatever they lead has
    /// replicas on such nodes alone.
    closed: Vec<bool>,
}

impl Handing<'_> {
    fn run(&mut self) {
        for from in 0..self.led.len() {
            while self.counts[from] > self.quotas[from] && !self.board.nodes[from].frozen {
                let Some(chain) = self.chain(from) else { break };
                for (shard, giver, taker) in chain {
                    self.led[giver].retain(|at| *at != shard);
                    self.led[taker].push(shard);
                    self.counts[giver] -= 1;
                    self.counts[taker] += 1;
                    self.board.shards[shard].leader = taker;
                }
            }
        }
    }

    /// The shortest chain of handovers (shard, giver, taker) from `from` to a node that leads too few.
    fn chain(&mut self, from: usize) -> Option<Vec<(usize, usize, usize)>> {
        let mut reached: Vec<Option<(usize, usize)>> = vec![None; self.led.len()];
        let mut seen = vec![from];
        let mut queue = VecDeque::from([from]);
        while let Some(giver) = queue.pop_front() {
            for &shard in &self.led[giver] {
                for &taker in &self.board.shards[shard].nodes {
                    let node = &self.board.nodes[taker];
                    let able = node.weight > 0 && !node.frozen && !self.closed[taker];
                    if !able || taker == from || reached[taker].is_some() {
                        continue;
                    }
                    reached[taker] = Some((shard, giver));
                    if self.counts[taker] < self.quotas[taker] {
                        let mut chain = Vec::new();
                        let mut at = taker;
                        while let Some((shard, giver)) = reached[at] {
                            chain.push((shard, giver, at));
                            at = giver;
                        }
                        return Some(chain);
                    }
                    seen.push(taker);
                    queue.push_back(taker);
                }
            }
        }
        seen.into_iter().for_each(|node| self.closed[node] = true);
        None
    }
}
