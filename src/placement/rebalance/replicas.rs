//! Step 3: replicas go from nodes with too many to nodes with too few.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};

use super::board::{Board, Place};
use super::shares::{Bounds, Share, quotas, shares};
use crate::placement::plan::level;
use crate::placement::rendezvous;

fn bounds(board: &Board) -> Bounds {
    let each = board.shards.len() as u32;
    let mut sizes = vec![0_u32; board.domains];
    board.nodes.iter().filter(|node| node.weight > 0).for_each(|node| sizes[node.domain] += 1);
    let mut of_most: BTreeMap<u32, u64> = BTreeMap::new();
    board.shards.iter().for_each(|place| *of_most.entry(place.most).or_default() += 1);
    let most = |size: &u32| of_most.iter().map(|(most, shards)| shards * u64::from(*size.min(most))).sum();
    Bounds { nodes: vec![each; board.nodes.len()], domains: sizes.iter().map(most).collect() }
}

fn shares_of(board: &Board, bounds: &Bounds) -> Vec<Share> {
    let total = board.held.iter().map(|held| u64::from(*held)).sum();
    shares(&board.nodes, total, bounds)
}

/// See [`super::is_uneven`].
pub(super) fn is_uneven(board: &Board) -> bool {
    let shares = shares_of(board, &bounds(board));
    let far = |at: &usize| !board.nodes[*at].frozen && shares[*at].is_far(board.held[*at]);
    (0..board.nodes.len()).any(|at| far(&at))
        || board.shards.iter().any(|place| place.movable && board.crowded(place).is_some())
}

/// Rounds of a plan: the second finds something to do only where zones or large replica counts kept some node
/// from its quota.
const ROUNDS_MAX: usize = 8;

/// Spreads the replicas over the nodes. Returns the least number of moves that this could have taken.
pub(super) fn spread(board: &mut Board) -> u32 {
    let bounds = bounds(board);
    let mut minimum = None;
    for _ in 0..ROUNDS_MAX {
        let shares = shares_of(board, &bounds);
        let quotas = quotas(&board.nodes, &board.held, &shares, &bounds);
        // Each node below its quota receives at least what it lacks; each crowded place gives at least one.
        let lacks = quotas.iter().zip(&board.held).map(|(quota, held)| quota.saturating_sub(*held));
        let lacking: u32 = lacks.sum();
        let held = board.held.clone();
        let mut spread = Spread { board, quotas, shares };
        let crowding = spread.uncrowd();
        spread.give();
        spread.give_along_chains();
        minimum.get_or_insert(lacking.max(crowding));
        // What a plan arrives at must leave nothing to the next one, which would begin from there: so does the last
        // round of this one.
        let begins_here = board.shards.iter().all(|place| place.nodes == place.base);
        if board.held == held && crowding == 0 && begins_here {
            break;
        }
        if board.held == held {
            board.shards.iter_mut().for_each(|place| place.base.clone_from(&place.nodes));
        }
    }
    minimum.unwrap_or(0)
}

/// A move that helps. The least of them gains most.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Offer {
    /// By how much the receiver's draw is lower than the giver's.
    gain: Reverse<i128>,
    shard: usize,
    from: usize,
    to: usize,
}

struct Spread<'a> {
    board: &'a mut Board,
    quotas: Vec<u32>,
    shares: Vec<Share>,
}

impl Spread<'_> {
    fn is_over(&self, node: usize) -> bool {
        !self.board.nodes[node].frozen && self.board.held[node] > self.quotas[node]
    }

    fn is_under(&self, node: usize) -> bool {
        self.board.held[node] < self.quotas[node]
    }

    /// No shard crowds a failure domain any more, as far as there is room elsewhere. Returns how many replicas
    /// were too many.
    fn uncrowd(&mut self) -> u32 {
        let mut moves = 0;
        for shard in 0..self.board.shards.len() {
            while self.board.shards[shard].movable
                && let Some(domain) = self.board.crowded(&self.board.shards[shard])
            {
                let board = &*self.board;
                let place = &board.shards[shard];
                let inside = place.nodes.iter().copied().filter(|node| board.nodes[*node].domain == domain);
                let surplus = |node: &usize| i64::from(board.held[*node]) - i64::from(self.quotas[*node]);
                let Some(from) = inside.max_by_key(surplus) else { break };
                let rank = |to: &usize| {
                    let node = &board.nodes[*to];
                    let hash = rendezvous::hash(place.key, node.id);
                    (!self.is_under(*to), level(board.held[*to], node.weight), Reverse(hash))
                };
                let fits = |to: &usize| board.nodes[*to].domain != domain && board.fits(shard, from, *to);
                let Some(to) = (0..board.nodes.len()).filter(fits).min_by_key(rank) else { break };
                self.board.shift(shard, from, to);
                moves += 1;
            }
        }
        moves
    }

    /// Single moves, those first that gain most by the draws.
    fn give(&mut self) {
        let mut under: Vec<usize> = (0..self.board.nodes.len()).filter(|node| self.is_under(*node)).collect();
        // Nodes of one weight together: of them the greatest hash is enough.
        under.sort_by_key(|node| (self.board.nodes[*node].weight, *node));
        let offers = (0..self.board.shards.len()).filter_map(|shard| self.offer(shard, &under));
        let mut offers: BinaryHeap<_> = offers.map(Reverse).collect();
        while let Some(Reverse(offer)) = offers.pop() {
            if under.is_empty() {
                break;
            }
            let Offer { shard, from, to, .. } = offer;
            if self.offer(shard, &under) == Some(offer) {
                self.board.shift(shard, from, to);
                if !self.is_under(to) {
                    under.retain(|node| *node != to);
                }
            }
            // For another replica of the same shard too, and if one of the two has what it should meanwhile.
            offers.extend(self.offer(shard, &under).map(Reverse));
        }
    }

    /// The move of a replica of `shard` that helps, to one of `under`, and gains most by the draws.
    fn offer(&self, shard: usize, under: &[usize]) -> Option<Offer> {
        let place = &self.board.shards[shard];
        if !place.movable || !place.nodes.iter().any(|node| self.is_over(*node)) {
            return None;
        }
        let hash = |node: usize| rendezvous::hash(place.key, self.board.nodes[node].id);
        let draw = |node: usize, hash: u64| {
            // A node that should hold nothing has the worst.
            i128::from(rendezvous::draw_of(hash, self.board.nodes[node].weight).unwrap_or(u64::MAX))
        };
        let of_weight = |a: &usize, b: &usize| self.board.nodes[*a].weight == self.board.nodes[*b].weight;
        let mut best: Option<Offer> = None;
        for group in under.chunk_by(of_weight) {
            let able = |from: usize, to: usize| self.is_over(from) && self.board.fits(shard, from, to);
            let takers = group.iter().copied().filter(|to| place.nodes.iter().any(|from| able(*from, *to)));
            let Some((hash_to, Reverse(to))) = takers.map(|to| (hash(to), Reverse(to))).max() else {
                continue;
            };
            let givers = place.nodes.iter().copied().filter(|from| able(*from, to));
            let Some((given, from)) = givers.map(|from| (draw(from, hash(from)), from)).max() else {
                continue;
            };
            let offer = Offer { gain: Reverse(given - draw(to, hash_to)), shard, from, to };
            best = best.into_iter().chain([offer]).min();
        }
        best
    }

    /// Chains of moves, where no single one helps.
    fn give_along_chains(&mut self) {
        let over: Vec<usize> = (0..self.board.nodes.len()).filter(|node| self.is_over(*node)).collect();
        if over.is_empty() {
            return;
        }
        let mut shards: Vec<Vec<usize>> = vec![Vec::new(); self.board.nodes.len()];
        for (at, Place { nodes, .. }) in self.board.shards.iter().enumerate().filter(|(_, p)| p.movable) {
            nodes.iter().for_each(|node| shards[*node].push(at));
        }
        // Nodes from which no chain leads to one with too few.
        let mut closed = vec![false; shards.len()];
        for from in over {
            while self.is_over(from)
                && let Some(chain) = self.chain(from, &shards, &mut closed)
            {
                for (shard, from, to) in chain {
                    self.board.shift(shard, from, to);
                    shards[from].retain(|at| *at != shard);
                    shards[to].push(shard);
                }
            }
        }
    }

    /// Nodes that have their quota, and could have one less as far as their share goes.
    fn could_give(&self, node: usize) -> bool {
        let (held, quota) = (self.board.held[node], self.quotas[node]);
        !self.board.nodes[node].frozen && held == quota && quota > self.shares[node].low()
    }

    /// Nodes that have their quota, and could have one more as far as their share goes.
    fn could_take(&self, node: usize) -> bool {
        self.board.held[node] == self.quotas[node] && self.quotas[node] < self.shares[node].high()
    }

    /// The cheapest chain of moves from `from` to a node with too few, each shard moving once at most: what it
    /// may do on its own it may then do in the chain. What this plan has put on a node goes on from there at no
    /// cost. If `from` may as well keep what it has, or the node with too few do without, another node may be
    /// the one to give, or to take; then they exchange quotas.
    fn chain(
        &mut self,
        from: usize,
        shards: &[Vec<usize>],
        closed: &mut [bool],
    ) -> Option<Vec<(usize, usize, usize)>> {
        let nodes = 0..shards.len();
        let mut reached: Vec<Option<(usize, usize)>> = vec![None; shards.len()];
        let mut costs = vec![u32::MAX; shards.len()];
        let mut done = vec![false; shards.len()];
        let mut queue = VecDeque::from([from]);
        if self.quotas[from] < self.shares[from].high() {
            queue.extend(nodes.clone().filter(|node| self.could_give(*node)));
        }
        queue.iter().for_each(|source| costs[*source] = 0);
        let lacking =
            nodes.clone().find(|node| self.is_under(*node) && self.quotas[*node] > self.shares[*node].low());
        while let Some(giver) = queue.pop_front() {
            if std::mem::replace(&mut done[giver], true) {
                continue;
            }
            let taken = reached[giver].is_some();
            if self.is_under(giver) || (taken && lacking.is_some() && self.could_take(giver)) {
                let mut chain = Vec::new();
                let mut first = giver;
                while let Some((shard, giver)) = reached[first] {
                    chain.push((shard, giver, first));
                    first = giver;
                }
                let times = |shard| chain.iter().filter(|(other, ..)| *other == shard).count();
                if chain.iter().all(|(shard, ..)| times(*shard) == 1) {
                    self.exchange_quotas(first, from);
                    if let Some(lacking) = lacking.filter(|_| !self.is_under(giver)) {
                        self.exchange_quotas(lacking, giver);
                    }
                    return Some(chain);
                }
                continue;
            }
            for &shard in &shards[giver] {
                let place = &self.board.shards[shard];
                for taker in nodes.clone() {
                    let fresh = !place.base.contains(&taker) && place.base.contains(&giver);
                    let cost = costs[giver] + u32::from(fresh);
                    let better = !done[taker] && !closed[taker] && cost < costs[taker];
                    if better && self.board.fits(shard, giver, taker) {
                        costs[taker] = cost;
                        reached[taker] = Some((shard, giver));
                        match fresh {
                            true => queue.push_back(taker),
                            false => queue.push_front(taker),
                        }
                    }
                }
            }
        }
        closed.iter_mut().zip(done).for_each(|(closed, done)| *closed |= done);
        None
    }

    /// One of `less`'s quota becomes one of `more`'s.
    fn exchange_quotas(&mut self, less: usize, more: usize) {
        if less != more {
            self.quotas[less] -= 1;
            self.quotas[more] += 1;
        }
    }
}
