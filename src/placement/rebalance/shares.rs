//! What each node should have: its share by weight, bounded, and the quota next to what it has.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::board::Spot;
use crate::placement::plan::level;

/// A share, exactly: `part` of `parts`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Share {
    part: u128,
    /// 0: nothing.
    parts: u128,
}

impl Share {
    fn whole(count: u64) -> Share {
        Share { part: u128::from(count), parts: 1 }
    }

    pub fn low(self) -> u32 {
        self.part.checked_div(self.parts).map_or(0, |low| low.min(u128::from(u32::MAX)) as u32)
    }

    pub fn high(self) -> u32 {
        self.low() + u32::from(self.part.checked_rem(self.parts).is_some_and(|rest| rest > 0))
    }

    /// Whether `count` is off by more than 15 % and more than one.
    pub fn is_far(self, count: u32) -> bool {
        let off = (u128::from(count) * self.parts).abs_diff(self.part);
        let count_only = self.parts == 0 && count > 0;
        count_only || (off > self.parts && 100 * off > 15 * self.part)
    }
}

/// Most that each node, and all nodes of a failure domain together, can have.
pub(super) struct Bounds {
    pub nodes: Vec<u32>,
    pub domains: Vec<u64>,
}

/// The shares of `total` by weight within bounds: what is beyond a bound is shared by the others.
pub(super) fn shares(nodes: &[Spot], total: u64, bounds: &Bounds) -> Vec<Share> {
    let mut shares = vec![Share::default(); nodes.len()];
    let mut open: Vec<usize> = (0..nodes.len()).filter(|at| nodes[*at].weight > 0).collect();
    let mut left = total;
    loop {
        left = fill(nodes, &mut open, left, &bounds.nodes, &mut shares);
        // A failure domain that is over its bound has exactly that, and its nodes share it.
        let mut weights = vec![0_u128; bounds.domains.len()];
        let mut fixed = vec![0_u128; bounds.domains.len()];
        for (node, share) in nodes.iter().zip(&shares) {
            fixed[node.domain] += if share.parts == 1 { share.part } else { 0 };
        }
        for at in &open {
            weights[nodes[*at].domain] += u128::from(nodes[*at].weight);
            fixed[nodes[*at].domain] -= if shares[*at].parts == 1 { shares[*at].part } else { 0 };
        }
        let all: u128 = weights.iter().sum();
        let over = |at: &usize| {
            let domain = nodes[*at].domain;
            let room = u128::from(bounds.domains[domain]).saturating_sub(fixed[domain]);
            u128::from(left) * weights[domain] > room * all
        };
        let Some(domain) = open.iter().find(|at| over(at)).map(|at| nodes[*at].domain) else {
            return shares;
        };
        let mut inner: Vec<usize> =
            (0..nodes.len()).filter(|at| nodes[*at].domain == domain && nodes[*at].weight > 0).collect();
        // What its nodes had been given at their own bound is shared anew.
        let fixed = inner.iter().filter(|at| !open.contains(at));
        left += fixed.map(|at| u64::from(bounds.nodes[*at])).sum::<u64>();
        open.retain(|at| nodes[*at].domain != domain);
        let most = bounds.domains[domain].min(left);
        fill(nodes, &mut inner, most, &bounds.nodes, &mut shares);
        left -= most;
    }
}

/// Shares `total` among `open`, taking out of it those that reach their bound. Returns what is left for those
/// that stay in it.
fn fill(nodes: &[Spot], open: &mut Vec<usize>, total: u64, most: &[u32], shares: &mut [Share]) -> u64 {
    let mut left = total;
    loop {
        let parts: u128 = open.iter().map(|at| u128::from(nodes[*at].weight)).sum();
        let before = open.len();
        let mut full = 0;
        open.retain(|at| {
            let part = u128::from(left) * u128::from(nodes[*at].weight);
            let over = part >= u128::from(most[*at]) * parts;
            if over {
                full += u64::from(most[*at]);
                shares[*at] = Share::whole(most[*at].into());
            } else {
                shares[*at] = Share { part, parts };
            }
            !over
        });
        left = left.saturating_sub(full);
        if open.len() == before || open.is_empty() {
            return left;
        }
    }
}

/// What each node should have after as few moves as possible: what it has, brought between its share rounded
/// down and rounded up; and then as many more, or fewer, as failure domains and the sum demand, by those lowest,
/// or highest, per weight.
pub(super) fn quotas(nodes: &[Spot], held: &[u32], shares: &[Share], bounds: &Bounds) -> Vec<u32> {
    let quota = |at: usize| match nodes[at].frozen {
        true => held[at],
        false => held[at].clamp(shares[at].low(), shares[at].high()),
    };
    let total: u64 = held.iter().map(|held| u64::from(*held)).sum();
    let mut dealing = Dealing {
        nodes,
        shares,
        bounds,
        quotas: (0..nodes.len()).map(quota).collect(),
        domains: vec![0; bounds.domains.len()],
        least: vec![0; bounds.domains.len()],
        sum: 0,
    };
    for (node, quota) in nodes.iter().zip(&dealing.quotas) {
        dealing.domains[node.domain] += u64::from(*quota);
        dealing.sum += u64::from(*quota);
    }
    let room: u64 = bounds.domains.iter().sum();
    for domain in 0..bounds.domains.len() {
        // What the others can't hold.
        dealing.least[domain] = (total + bounds.domains[domain]).saturating_sub(room);
        let inside: Vec<usize> = (0..nodes.len()).filter(|at| nodes[*at].domain == domain).collect();
        let (least, most) = (dealing.least[domain], bounds.domains[domain]);
        dealing.lower(&inside, |dealing| dealing.domains[domain] > most, |_, _| true);
        dealing.raise(&inside, |dealing| dealing.domains[domain] < least);
    }
    let all: Vec<usize> = (0..nodes.len()).collect();
    dealing.raise(&all, |dealing| dealing.sum < total);
    dealing.lower(
        &all,
        |dealing| dealing.sum > total,
        |dealing, domain| dealing.domains[domain] > dealing.least[domain],
    );
    dealing.quotas
}

struct Dealing<'a> {
    nodes: &'a [Spot],
    shares: &'a [Share],
    bounds: &'a Bounds,
    quotas: Vec<u32>,
    /// Sums of failure domains.
    domains: Vec<u64>,
    /// What each of them must have.
    least: Vec<u64>,
    sum: u64,
}

impl Dealing<'_> {
    fn able(&self, among: &[usize]) -> impl Iterator<Item = usize> {
        among.iter().copied().filter(|at| self.nodes[*at].weight > 0 && !self.nodes[*at].frozen)
    }

    /// Gives one after another of `among` one more, as long as `goes_on`: who is below its share first, then the
    /// lowest.
    fn raise(&mut self, among: &[usize], goes_on: impl Fn(&Self) -> bool) {
        let rank = |dealing: &Self, at: usize| {
            let quota = dealing.quotas[at];
            let full = quota >= dealing.shares[at].high();
            Reverse((full, level(quota, dealing.nodes[at].weight), at))
        };
        let mut lowest: BinaryHeap<_> = self.able(among).map(|at| rank(self, at)).collect();
        while goes_on(self) {
            let Some(Reverse((.., at))) = lowest.pop() else { break };
            let domain = self.nodes[at].domain;
            let room = self.domains[domain] < self.bounds.domains[domain];
            if room && self.quotas[at] < self.bounds.nodes[at] {
                self.quotas[at] += 1;
                self.domains[domain] += 1;
                self.sum += 1;
                lowest.push(rank(self, at));
            }
        }
    }

    /// Takes one from one after another of `among`, as long as `goes_on` and its failure domain `can_spare` it: from
    /// who is above its share first, then from the highest.
    fn lower(
        &mut self,
        among: &[usize],
        goes_on: impl Fn(&Self) -> bool,
        can_spare: impl Fn(&Self, usize) -> bool,
    ) {
        let rank = |dealing: &Self, at: usize| {
            let quota = dealing.quotas[at];
            let above = quota > dealing.shares[at].low();
            (above, level(quota.saturating_sub(1), dealing.nodes[at].weight), Reverse(at))
        };
        let mut highest: BinaryHeap<_> = self.able(among).map(|at| rank(self, at)).collect();
        while goes_on(self) {
            let Some((.., Reverse(at))) = highest.pop() else { break };
            let domain = self.nodes[at].domain;
            if self.quotas[at] > 0 && can_spare(self, domain) {
                self.quotas[at] -= 1;
                self.domains[domain] -= 1;
                self.sum -= 1;
                highest.push(rank(self, at));
            }
        }
    }
}
