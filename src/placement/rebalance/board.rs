//! Nodes and shards by their place in tables, and what is where while a plan is made.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::Known;
use crate::ids::{METADATA_SHARD, NodeId, ShardId};
use crate::placement::loads::{Domain, domain_most, settled};
use crate::placement::map::{ClusterMap, ShardRecord};
use crate::placement::rendezvous;

/// A node.
pub(super) struct Spot {
    pub id: NodeId,
    /// 0: it should hold nothing.
    pub weight: u32,
    pub domain: usize,
    /// What it holds stays, and nothing comes.
    pub frozen: bool,
}

/// A shard.
pub(super) struct Place {
    pub id: ShardId,
    pub key: u64,
    pub conf: u64,
    /// Where it was when the plan began.
    pub before: Vec<usize>,
    /// Where the chains under way take it to be: what has left one of these is moved already, and goes on at no cost.
    pub base: Vec<usize>,
    /// Where the plan has it.
    pub nodes: Vec<usize>,
    /// Who led when the plan began.
    pub led_by: usize,
    /// Who should lead.
    pub leader: usize,
    /// Its members may change.
    pub movable: bool,
    /// Its leader may change.
    pub leadable: bool,
    /// Most replicas in one failure domain.
    pub most: u32,
}

pub(super) struct Board {
    pub nodes: Vec<Spot>,
    /// In order of ids.
    pub shards: Vec<Place>,
    /// Failure domains.
    pub domains: usize,
    /// Replicas on each node.
    pub held: Vec<u32>,
    places: HashMap<NodeId, usize>,
}

/// Nodes that can't get anything now and hold nothing, since it was replaced: they count as if they weren't there.
/// Else a share would be kept for them that the others have to take, and a place in each shard for their failure
/// domain, though the others are as far apart as they can be.
fn absent(map: &ClusterMap, known: &Known) -> HashSet<NodeId> {
    let mut absent: HashSet<NodeId> = known.unfit.iter().copied().collect();
    if !absent.is_empty() {
        for member in map.shards.values().filter(|shard| !shard.dropped).flat_map(settled) {
            absent.remove(&member.node);
        }
    }
    absent
}

impl Board {
    pub fn new(map: &ClusterMap, known: &Known) -> Board {
        let mut board = Board {
            nodes: Vec::with_capacity(map.nodes.len()),
            shards: Vec::with_capacity(map.shards.len()),
            domains: 0,
            held: vec![0; map.nodes.len()],
            places: HashMap::with_capacity(map.nodes.len()),
        };
        let absent = absent(map, known);
        let mut domains = BTreeMap::new();
        for record in map.nodes.values() {
            let next = domains.len();
            let domain = *domains.entry(Domain::of(record)).or_insert(next);
            let takes = record.standing.takes_replicas() && !known.taken_over.contains(&record.id);
            let weight = if takes && !absent.contains(&record.id) { record.weight } else { 0 };
            let frozen = weight > 0 && known.unfit.contains(&record.id);
            board.places.insert(record.id, board.nodes.len());
            board.nodes.push(Spot { id: record.id, weight, domain, frozen });
        }
        board.domains = domains.len();
        let mut sizes = vec![0_usize; domains.len()];
        for node in board.nodes.iter().filter(|node| node.weight > 0) {
            sizes[node.domain] += 1;
        }
        let mut most: HashMap<usize, u32> = HashMap::new();
        for record in map.shards.values().filter(|shard| !shard.dropped) {
            let replicas = settled(record).count();
            let least = || domain_most(sizes.iter().copied(), replicas) as u32;
            let most = *most.entry(replicas).or_insert_with(least);
            board.add(map, known, record, most);
        }
        board
    }

    fn add(&mut self, map: &ClusterMap, known: &Known, record: &ShardRecord, most: u32) {
        let at = |node: &NodeId| self.places.get(node).copied();
        let nodes: Vec<usize> = settled(record).filter_map(|member| at(&member.node)).collect();
        let Some(first) = nodes.first().copied() else { return };
        let leader = known.leaders.get(&record.id).and_then(at).unwrap_or(first);
        let name = map.databases.get(&record.database).map_or("", |database| &database.name);
        let still = record.moving.is_none() && nodes.len() == settled(record).count();
        let mut place = Place {
            id: record.id,
            key: rendezvous::shard_key(name, record.range.start),
            conf: record.epoch.conf,
            before: nodes.clone(),
            base: nodes.clone(),
            nodes,
            led_by: leader,
            leader,
            movable: still && !known.fixed.contains(&record.id),
            leadable: still && record.id != METADATA_SHARD,
            most,
        };
        for node in &place.nodes {
            self.held[*node] += 1;
        }
        if record.id == METADATA_SHARD {
            place.movable &= self.crowded(&place).is_some();
        }
        self.shards.push(place);
    }

    /// Replicas of a shard in a failure domain.
    pub fn in_domain(&self, place: &Place, domain: usize) -> u32 {
        place.nodes.iter().filter(|node| self.nodes[**node].domain == domain).count() as u32
    }

    /// A failure domain with more replicas of a shard than need be.
    pub fn crowded(&self, place: &Place) -> Option<usize> {
        let domain = |node: &usize| self.nodes[*node].domain;
        place.nodes.iter().map(domain).find(|domain| self.in_domain(place, *domain) > place.most)
    }

    /// Whether the replica of a shard on `from` could be on `to` instead.
    pub fn fits(&self, shard: usize, from: usize, to: usize) -> bool {
        let place = &self.shards[shard];
        let (out, into) = (self.nodes[from].domain, self.nodes[to].domain);
        let free = self.nodes[to].weight > 0 && !self.nodes[to].frozen && !place.nodes.contains(&to);
        free && (out == into || self.in_domain(place, into) < place.most)
    }

    /// Has the replica of a shard on `from` be on `to`.
    pub fn shift(&mut self, shard: usize, from: usize, to: usize) {
        let place = &mut self.shards[shard];
        for node in place.nodes.iter_mut().filter(|node| **node == from) {
            *node = to;
        }
        self.held[from] -= 1;
        self.held[to] += 1;
    }

    /// Has a shard be on these nodes, led by the first.
    pub fn place(&mut self, id: ShardId, nodes: &[NodeId]) {
        let nodes: Vec<usize> = nodes.iter().filter_map(|node| self.places.get(node).copied()).collect();
        if let Ok(at) = self.shards.binary_search_by_key(&id, |place| place.id)
            && let Some(first) = nodes.first()
        {
            self.shards[at].leader = *first;
            self.shards[at].nodes = nodes;
        }
    }
}
