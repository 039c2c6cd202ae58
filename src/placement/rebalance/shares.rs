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

    fn low(self) -> u32 {
        self.part.checked_div(self.parts).map_or(0, |low| low.min(u128::from(u32::MAX)) as u32)
    }

    fn high(self) -> u32 {
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
/// down and rounded up; and then as many more, or fewer, as are still to be had, by those lowest, or highest,
/// per weight, within the bounds.
pub(super) fn quotas(nodes: &[Spot], held: &[u32], shares: &[Share], bounds: &Bounds) -> Vec<u32> {
    let total: u64 = held.iter().map(|held| u64::from(*held)).sum();
    let mut quotas: Vec<u32> = (0..nodes.len())
        .map(|at| match nodes[at].frozen {
            true => held[at],
            false => held[at].clamp(shares[at].low(), shares[at].high()),
        })
        .collect();
    let mut domains = vec![0_u64; bounds.domains.len()];
    let mut sum = 0;
    for (node, quota) in nodes.iter().zip(&quotas) {
        domains[node.domain] += u64::from(*quota);
        sum += u64::from(*quota);
    }
    let able = || (0..nodes.len()).filter(|at| nodes[*at].weight > 0 && !nodes[*at].frozen);
    let up = |at: usize, quota: u32| (quota >= shares[at].high(), level(quota, nodes[at].weight), at);
    let mut lowest: BinaryHeap<_> = able().map(|at| Reverse(up(at, quotas[at]))).collect();
    while sum < total {
        let Some(Reverse((.., at))) = lowest.pop() else { break };
        let domain = &mut domains[nodes[at].domain];
        if quotas[at] < bounds.nodes[at] && *domain < bounds.domains[nodes[at].domain] {
            quotas[at] += 1;
            *domain += 1;
            sum += 1;
            lowest.push(Reverse(up(at, quotas[at])));
        }
    }
    let down = |at: usize, quota: u32| {
        (quota > shares[at].low(), level(quota.saturating_sub(1), nodes[at].weight), at)
    };
    let mut highest: BinaryHeap<_> = able().map(|at| down(at, quotas[at])).collect();
    while sum > total {
        let Some((.., at)) = highest.pop() else { break };
        if quotas[at] > 0 {
            quotas[at] -= 1;
            sum -= 1;
            highest.push(down(at, quotas[at]));
        }
    }
    quotas
}
