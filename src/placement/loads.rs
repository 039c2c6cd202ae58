//! How much each node holds, and which one should get a replica that is lacking.

use std::collections::{BTreeMap, BTreeSet};

use super::map::{ClusterMap, Member, NodeRecord, ShardRecord};
use super::plan::level;
use super::rendezvous;
use crate::ids::NodeId;
use crate::limits;

/// Voters that the metadata shard should have in a cluster of so many nodes: as many, up to five, but an odd
/// number, since an even one stands no more losses than one fewer would.
pub fn metadata_voters(nodes: usize) -> usize {
    let most = nodes.clamp(1, limits::METADATA_VOTERS_MAX);
    most - usize::from(most.is_multiple_of(2))
}

/// The failure domain of a node: its zone, or itself if it has none.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Domain<'a>(&'a str, Option<NodeId>);

impl<'a> Domain<'a> {
    /// That of `node`.
    pub fn of(node: &'a NodeRecord) -> Domain<'a> {
        Domain(&node.zone, node.zone.is_empty().then_some(node.id))
    }
}

/// The least possible number of replicas of one shard in one failure domain, if the domains have so many
/// nodes and the shard so many replicas.
pub fn domain_most(sizes: impl Iterator<Item = usize> + Clone, replicas: usize) -> usize {
    let room = |most: usize| sizes.clone().map(|size| size.min(most)).sum::<usize>();
    (1..replicas).find(|&most| room(most) >= replicas).unwrap_or(replicas)
}

/// The members that a shard has when the move under way, if any, has ended.
pub fn settled(shard: &ShardRecord) -> impl Iterator<Item = &Member> {
    let moving = shard.moving.as_ref();
    shard.ordered().filter(move |member| {
        let adds = moving.is_some_and(|moving| moving.adds.iter().any(|add| add.replica == member.replica));
        match moving {
            Some(moving) if moving.cancelling => !adds && member.role.stays_voter(),
            Some(moving) => adds || (member.role.stays_voter() && !moving.removes.contains(&member.replica)),
            None => member.role.stays_voter(),
        }
    })
}

struct Load<'a> {
    weight: u32,
    domain: Domain<'a>,
    /// Replicas of living shards, as they will be when the moves under way have ended.
    held: u32,
}

/// What the nodes hold that can get replicas now.
pub struct Loads<'a> {
    map: &'a ClusterMap,
    nodes: BTreeMap<NodeId, Load<'a>>,
    weight: u64,
    replicas: u64,
}

impl<'a> Loads<'a> {
    /// Counts. Nodes in `unfit` get nothing, nor do those that the map excludes by standing or weight 0.
    pub fn new(map: &'a ClusterMap, unfit: &BTreeSet<NodeId>) -> Loads<'a> {
        let takes = |node: &&NodeRecord| {
            node.standing.takes_replicas() && node.weight > 0 && !unfit.contains(&node.id)
        };
        let load = |node: &'a NodeRecord| Load { weight: node.weight, domain: Domain::of(node), held: 0 };
        let nodes: BTreeMap<_, _> =
            map.nodes.values().filter(takes).map(|node| (node.id, load(node))).collect();
        let weight = nodes.values().map(|node| u64::from(node.weight)).sum();
        let mut loads = Loads { map, nodes, weight, replicas: 0 };
        for member in map.shards.values().filter(|shard| !shard.dropped).flat_map(settled) {
            loads.replicas += 1;
            if let Some(node) = loads.nodes.get_mut(&member.node) {
                node.held += 1;
            }
        }
        loads
    }

    /// Replicas on `node`; 0 if it can get none.
    pub fn held(&self, node: NodeId) -> u32 {
        self.nodes.get(&node).map_or(0, |node| node.held)
    }

    /// The node that should get one more replica of `shard`, which will have `replicas` of them, those on
    /// `staying` included; the choice is counted from then on. As far apart as zones allow; then one of
    /// `preferred`, and none of `shunned` if possible; then the one that rendezvous hashing puts first among those below their share; then the one
    /// with the least load. `None` if each node that could take it has one already.
    pub fn choose(
        &mut self,
        shard: &ShardRecord,
        staying: &[NodeId],
        replicas: usize,
        preferred: &[NodeId],
        shunned: &[NodeId],
    ) -> Option<NodeId> {
        let name = self.map.databases.get(&shard.database).map_or("", |database| &database.name);
        let shard_key = rendezvous::shard_key(name, shard.range.start);
        let mut sizes: BTreeMap<Domain, usize> = BTreeMap::new();
        for node in self.nodes.values() {
            *sizes.entry(node.domain).or_default() += 1;
        }
        let most = domain_most(sizes.values().copied(), replicas);
        let domains: Vec<Domain> =
            staying.iter().filter_map(|node| self.map.nodes.get(node)).map(Domain::of).collect();
        let rank = |id: NodeId, node: &Load| {
            let there = domains.iter().filter(|domain| **domain == node.domain).count();
            let crowded = (there + 1).saturating_sub(most);
            let share = (self.replicas * u64::from(node.weight)).div_ceil(self.weight.max(1));
            let full = u64::from(node.held) >= share;
            let order = if full {
                level(node.held, node.weight)
            } else {
                rendezvous::draw(shard_key, id, node.weight).unwrap_or(u64::MAX)
            };
            (crowded, shunned.contains(&id), !preferred.contains(&id), full, order, id)
        };
        let free = |id: &NodeId| shard.ordered().all(|m| m.node != *id) && !staying.contains(id);
        let best = self.nodes.iter().filter(|(id, _)| free(id)).map(|(id, node)| rank(*id, node)).min()?.5;
        if let Some(node) = self.nodes.get_mut(&best) {
            node.held += 1;
            self.replicas += 1;
        }
        Some(best)
    }
}
