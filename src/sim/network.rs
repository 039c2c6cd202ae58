//! The simulated network: when a message arrives, how often, and whether at all.

use std::collections::{BTreeMap, BTreeSet};

use super::Time;
use super::dice::Dice;
use crate::ids::NodeId;

/// How good all links are at present.
#[derive(Clone, Copy, Debug)]
pub struct Quality {
    /// Messages lost, of 1000.
    pub lost: u64,
    /// Messages delivered twice, of 1000.
    pub duplicated: u64,
    /// Greatest delay in microseconds.
    pub delay_max: Time,
    /// Messages of one link may overtake each other.
    pub reordered: bool,
}

impl Quality {
    /// A good network.
    pub const GOOD: Quality = Quality { lost: 0, duplicated: 0, delay_max: 1_000, reordered: false };
}

/// All links between nodes.
pub struct Network {
    /// At present.
    pub quality: Quality,
    /// Directed links that carry nothing, by the partition that blocks them.
    blocked: BTreeMap<u64, BTreeSet<(NodeId, NodeId)>>,
    /// Last arrival on each link, so that order can be kept.
    last: BTreeMap<(NodeId, NodeId), Time>,
}

impl Network {
    /// A good network.
    pub fn new() -> Network {
        Network { quality: Quality::GOOD, blocked: BTreeMap::new(), last: BTreeMap::new() }
    }

    /// Blocks links until [`Network::heal`] with the same number.
    pub fn block(&mut self, partition: u64, links: BTreeSet<(NodeId, NodeId)>) {
        self.blocked.insert(partition, links);
    }

    /// Ends one partition.
    pub fn heal(&mut self, partition: u64) {
        self.blocked.remove(&partition);
    }

    /// Ends all faults.
    pub fn repair(&mut self) {
        self.blocked.clear();
        self.quality = Quality::GOOD;
    }

    /// Whether nothing goes from `from` to `to`.
    pub fn is_blocked(&self, from: NodeId, to: NodeId) -> bool {
        self.blocked.values().any(|links| links.contains(&(from, to)))
    }

    /// When a message sent now arrives: never, once, or twice.
    pub fn arrivals(&mut self, now: Time, from: NodeId, to: NodeId, dice: &mut Dice) -> Vec<Time> {
        let quality = self.quality;
        if self.is_blocked(from, to) || dice.chance(quality.lost) {
            return Vec::new();
        }
        let copies = if dice.chance(quality.duplicated) { 2 } else { 1 };
        let mut arrivals = Vec::with_capacity(copies);
        for _ in 0..copies {
            let mut at = now + dice.between(50, quality.delay_max.max(51));
            if !quality.reordered {
                let last = self.last.entry((from, to)).or_insert(0);
                at = at.max(*last);
                *last = at;
            }
            arrivals.push(at);
        }
        arrivals
    }
}

impl Default for Network {
    fn default() -> Self {
        Network::new()
    }
}
