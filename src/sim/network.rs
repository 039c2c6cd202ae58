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

/// Why links carry nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Block {
    /// They are down, which a sender may notice.
    Partition,
    /// Their connections look alive to the sender.
    HalfOpen,
}

/// What becomes of a message.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Fate {
    /// It arrives at these times: once or twice.
    Arrives(Vec<Time>),
    /// It doesn't.
    Lost,
    /// It arrives with wrong bits: its receiver drops it for its checksum, and closes the connection.
    Corrupted,
    /// It doesn't, and nothing ever tells the sender.
    Vanishes,
}

/// All links between nodes.
pub struct Network {
    /// At present.
    pub quality: Quality,
    /// Messages that arrive with wrong bits, of 1000.
    pub corrupted: u64,
    /// Directed links that carry nothing, by the partition that blocks them.
    blocked: BTreeMap<u64, (Block, BTreeSet<(NodeId, NodeId)>)>,
    /// Nodes without any link.
    cut: BTreeSet<NodeId>,
    /// Last arrival on each link, so that order can be kept.
    last: BTreeMap<(NodeId, NodeId), Time>,
}

impl Network {
    /// A good network.
    pub fn new() -> Network {
        Network {
            quality: Quality::GOOD,
            corrupted: 0,
            blocked: BTreeMap::new(),
            cut: BTreeSet::new(),
            last: BTreeMap::new(),
        }
    }

    /// Blocks links until [`Network::heal`] with the same number.
    pub fn block(&mut self, partition: u64, links: BTreeSet<(NodeId, NodeId)>, kind: Block) {
        self.blocked.insert(partition, (kind, links));
    }

    /// Ends one partition.
    pub fn heal(&mut self, partition: u64) {
        self.blocked.remove(&partition);
    }

    /// All links of a node go away, or those that no partition blocks come back.
    pub fn cut(&mut self, node: NodeId, away: bool) {
        if away {
            self.cut.insert(node);
        } else {
            self.cut.remove(&node);
        }
    }

    /// Whether all links of a node are away.
    pub fn is_cut(&self, node: NodeId) -> bool {
        self.cut.contains(&node)
    }

    /// Ends all faults.
    pub fn repair(&mut self) {
        self.blocked.clear();
        self.cut.clear();
        self.quality = Quality::GOOD;
        self.corrupted = 0;
    }

    /// Whether nothing goes from `from` to `to`.
    pub fn is_blocked(&self, from: NodeId, to: NodeId) -> bool {
        self.blocks(from, to).is_some()
    }

    fn blocks(&self, from: NodeId, to: NodeId) -> Option<Block> {
        if self.is_cut(from) || self.is_cut(to) {
            return Some(Block::Partition);
        }
        let blocks = self.blocked.values().filter(|(_, links)| links.contains(&(from, to)));
        // A link that is down is noticed, whatever else is wrong with it.
        blocks.map(|(kind, _)| *kind).min_by_key(|kind| *kind == Block::HalfOpen)
    }

    /// When a message sent now arrives, or why it doesn't.
    pub fn send(&mut self, now: Time, from: NodeId, to: NodeId, dice: &mut Dice) -> Fate {
        let quality = self.quality;
        match self.blocks(from, to) {
            Some(Block::HalfOpen) => return Fate::Vanishes,
            Some(Block::Partition) => return Fate::Lost,
            None if dice.chance(quality.lost) => return Fate::Lost,
            None if self.corrupted > 0 && dice.chance(self.corrupted) => return Fate::Corrupted,
            None => {}
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
        Fate::Arrives(arrivals)
    }
}

impl Default for Network {
    fn default() -> Self {
        Network::new()
    }
}
