//! Where a key's operations go: the cached cluster map and, per shard, a guess at the leader. Both may
//! be wrong at any time; answers and failures correct them. Sans-I/O: time comes from outside.
//!
//! The guess starts at the shard's first voter (the planner's preference). A hint from a replica
//! moves it to the node named, unless that node has just failed to answer: a follower goes on naming a
//! dead leader until it notices. A failure moves it on to the next voter. Only a failure of the node
//! that is the guess counts: late news of calls sent elsewhere change nothing.
//!
//! Whatever is learned, only nodes are asked that hold a replica of the shard under the map in the cache, or
//! get one by the move under way, and that belong to the cluster still. Among them a learner is asked
//! only if another replica names it as the leader, which it may be by now, or if there is no voter to ask.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::trouble::Troubles;
use crate::ids::{ClusterId, DatabaseId, NodeId, ShardId};
use crate::placement::map::{ClusterMap, MapDelta, Member, ShardRecord, Standing, is_quorum};
use crate::placement::ring;

/// For so long after a failure a node isn't followed as a leader on another's word.
const SUSPECT: Duration = Duration::from_secs(1);

/// For so long it counts that a node's replica of a shard was quarantined: longer than it takes to ask all
/// the others, some of which may not answer.
const QUARANTINED: Duration = Duration::from_secs(10);

/// The shard that a key belongs to, under the map in the cache.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Route {
    /// The shard.
    pub shard: ShardId,
    /// Its range version by which this was decided.
    pub range_version: u64,
    /// Last position of its range.
    pub end: u64,
}

/// A node to ask.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Target {
    /// The node.
    pub node: NodeId,
    /// Where it listens for clients.
    pub address: String,
}

/// The shards of a database, in the order of their ranges.
#[derive(PartialEq, Eq, Debug)]
struct Routes {
    database: DatabaseId,
    routes: Vec<Route>,
}

/// The cache.
#[derive(Default)]
pub struct Routing {
    map: Arc<ClusterMap>,
    /// Living databases by name; derived from the map.
    names: HashMap<String, Routes>,
    /// Where the leader of a shard is believed to be.
    leaders: HashMap<ShardId, NodeId>,
    /// When a node last failed to answer.
    failed: HashMap<NodeId, Instant>,
    troubles: Troubles,
    /// When a node last said that its replica of a shard is quarantined, and nothing else since.
    quarantined: HashMap<(ShardId, NodeId), Instant>,
}

impl Routing {
    /// The map in the cache.
    pub fn map(&self) -> &Arc<ClusterMap> {
        &self.map
    }

    /// Takes over what a node told of the map. Refuses a map of another cluster, with its id.
    pub fn learn(&mut self, delta: MapDelta) -> Result<(), ClusterId> {
        let known = self.map.cluster_id;
        if known != ClusterId::default() && delta.cluster_id != known {
            return Err(delta.cluster_id);
        }
        if delta.since == 0 {
            if Arc::make_mut(&mut self.map).merge(delta) {
                self.index();
            }
            return Ok(());
        }
        // While shards move there are many of these, each about a few shards, whose ranges stay.
        let databases = self.rerouted(&delta);
        let shards: Vec<ShardId> = delta.shards.iter().map(|shard| shard.id).collect();
        let any_node = !delta.nodes.is_empty();
        if Arc::make_mut(&mut self.map).merge(delta) {
            self.reindex(&databases);
            if any_node {
                self.forget_the_gone();
            } else {
                shards.into_iter().for_each(|shard| self.forget_gone_from(shard));
            }
        }
        Ok(())
    }

    /// Replaces the map, if `map` is newer; whether it was. For a client inside a node, which shares the node's map.
    pub fn adopt(&mut self, map: Arc<ClusterMap>) -> bool {
        let is_newer = map.version > self.map.version;
        if is_newer {
            self.map = map;
            self.index();
        }
        is_newer
    }

    fn index(&mut self) {
        self.names.clear();
        let all = self.map.databases.keys().copied().collect();
        self.reindex(&all);
        self.forget_the_gone();
    }

    /// The databases whose routes may be others after `delta`: they change themselves, or their shards' ranges do.
    fn rerouted(&self, delta: &MapDelta) -> BTreeSet<DatabaseId> {
        let is_same = |shard: &&ShardRecord| {
            let have = self.map.shards.get(&shard.id);
            have.is_some_and(|have| (have.range, have.epoch.range) == (shard.range, shard.epoch.range))
        };
        let shards = delta.shards.iter().filter(|shard| !is_same(shard)).map(|shard| shard.database);
        delta.databases.iter().map(|database| database.id).chain(shards).collect()
    }

    /// Derives the routes of these databases anew.
    fn reindex(&mut self, databases: &BTreeSet<DatabaseId>) {
        if databases.is_empty() {
            return;
        }
        // First, for another may have the name of one that is gone.
        self.names.retain(|_, routes| !databases.contains(&routes.database));
        let named = databases.iter().filter_map(|id| self.map.databases.get(id));
        for database in named.filter(|d| !d.dropped) {
            let mut routes = Vec::with_capacity(database.shards.len());
            // A shard that the map lacks leaves a hole, which `route` reports as no route.
            for shard in database.shards.iter().filter_map(|id| self.map.shards.get(id)) {
                routes.push(Route {
                    shard: shard.id,
                    range_version: shard.epoch.range,
                    end: shard.range.end,
                });
            }
            self.names.insert(database.name.clone(), Routes { database: database.id, routes });
        }
    }

    /// Forgets what is known of nodes and replicas that the map doesn't have any more.
    fn forget_the_gone(&mut self) {
        let map = &self.map;
        self.leaders.retain(|shard, node| leads_under(map, *shard, *node));
        self.failed.retain(|node, _| map.nodes.contains_key(node));
        self.troubles.retain(|shard| map.shards.get(&shard).is_some_and(|s| !s.dropped));
        self.quarantined.retain(|(shard, _), _| map.shards.get(shard).is_some_and(|s| !s.dropped));
    }

    /// The same for one shard, while the nodes are what they were.
    fn forget_gone_from(&mut self, shard: ShardId) {
        if self.leaders.get(&shard).is_some_and(|node| !leads_under(&self.map, shard, *node)) {
            self.leaders.remove(&shard);
        }
        if self.map.shards.get(&shard).is_none_or(|s| s.dropped) {
            self.troubles.over(shard);
            self.quarantined.retain(|(of, _), _| *of != shard);
        }
    }

    /// Whether the map has a database of this name.
    pub fn knows(&self, database: &str) -> bool {
        self.names.contains_key(database)
    }

    /// The shard of `database` that owns `key`.
    pub fn route(&self, database: &str, key: &[u8]) -> Option<Route> {
        self.route_at(database, ring::position(key))
    }

    /// The shard of `database` that owns a position of the ring.
    pub fn route_at(&self, database: &str, position: u64) -> Option<Route> {
        let routes = &self.names.get(database)?.routes;
        let route = *routes.get(routes.partition_point(|r| r.end < position))?;
        let shard = self.map.shards.get(&route.shard)?;
        (shard.range.contains(position) && !shard.dropped).then_some(route)
    }

    /// The range version of a shard under the map in the cache.
    pub fn range_version(&self, shard: ShardId) -> Option<u64> {
        let record = self.map.shards.get(&shard)?;
        (!record.dropped).then_some(record.epoch.range)
    }

    /// The node to ask for `shard`: the believed leader, else the first of those that may lead.
    pub fn target(&self, shard: ShardId) -> Option<Target> {
        let record = self.map.shards.get(&shard)?;
        let guess = self.leaders.get(&shard).and_then(|node| self.target_at(*node));
        guess.or_else(|| self.target_at(*self.candidates(record).first()?))
    }

    /// Whether another node than `node` may be asked for `shard`.
    pub fn has_others(&self, shard: ShardId, node: NodeId) -> bool {
        let record = self.map.shards.get(&shard);
        record.is_some_and(|record| self.candidates(record).into_iter().any(|other| other != node))
    }

    /// The nodes that may lead a shard and whose address is known, in the order of its members, those that
    /// are given up last. Only if there is none, its learners: they may be voters by now.
    fn candidates(&self, record: &ShardRecord) -> Vec<NodeId> {
        let given_up =
            |node: &NodeId| self.map.nodes.get(node).is_some_and(|n| n.standing == Standing::Leaving);
        let reached = |votes: bool| {
            let members = record.members.iter().filter(move |m| m.role.votes() == votes);
            members.map(|m| m.node).filter(|node| serves(&self.map, *node))
        };
        let (last, mut nodes): (Vec<_>, Vec<_>) = reached(true).partition(given_up);
        nodes.extend(last);
        if nodes.is_empty() {
            nodes.extend(reached(false));
        }
        nodes
    }

    /// `node` didn't serve `shard`, and why, for [`Routing::told`].
    pub fn trouble(&mut self, shard: ShardId, node: NodeId, why: &str, now: Instant) {
        if self.map.shards.contains_key(&shard) {
            self.troubles.add(shard, node, why, now);
        }
    }

    /// What to tell a person of a shard that doesn't serve, if that is more than the failure of one node.
    pub fn told(&self, shard: ShardId, now: Instant) -> Option<String> {
        let address = |node| self.target_at(node).map_or("an unknown address".into(), |t| t.address);
        self.troubles.tell(shard, now, address)
    }

    /// Where a node is asked, if it is one to ask.
    fn target_at(&self, node: NodeId) -> Option<Target> {
        let record = self.map.nodes.get(&node).filter(|_| serves(&self.map, node))?;
        Some(Target { node, address: record.client_address.clone() })
    }

    /// Addresses at which something may be learned of the cluster.
    pub fn addresses(&self) -> impl Iterator<Item = &str> {
        let nodes = self.map.nodes.values().filter(|node| serves(&self.map, node.id));
        nodes.map(|node| node.client_address.as_str())
    }

    /// Whether `address` is only that of nodes that are removed.
    pub fn is_abandoned(&self, address: &str) -> bool {
        let mut there = self.map.nodes.values().filter(|node| node.client_address == address).peekable();
        there.peek().is_some() && there.all(|node| node.standing == Standing::Removed)
    }

    /// `node` answered as the leader of `shard`.
    pub fn succeeded(&mut self, shard: ShardId, node: NodeId) {
        // The answer may be older than the news that the node has no part in the shard any more.
        if self.leaders.get(&shard) != Some(&node) && self.may_lead(shard, node) {
            self.leaders.insert(shard, node);
        }
        if !self.failed.is_empty() {
            self.failed.remove(&node);
        }
        self.troubles.over(shard);
        // It serves, so whatever was said of its replicas is old.
        if !self.quarantined.is_empty() {
            self.quarantined.retain(|(of, _), _| *of != shard);
        }
    }

    /// `node` says that it doesn't lead `shard`, and perhaps who does.
    pub fn not_leader(&mut self, shard: ShardId, node: NodeId, hint: Option<NodeId>, now: Instant) {
        self.failed.remove(&node);
        self.isnt_quarantined(shard, node);
        if !self.map.shards.contains_key(&shard) {
            return;
        }
        let follow =
            hint.filter(|hint| *hint != node && self.may_lead(shard, *hint) && !self.suspect(*hint, now));
        match follow {
            Some(leader) => {
                self.leaders.insert(shard, leader);
            }
            None => self.rotate(shard, node),
        }
    }

    /// `node` can't serve `shard` now, though it answers.
    pub fn unavailable(&mut self, shard: ShardId, node: NodeId) {
        self.isnt_quarantined(shard, node);
        self.rotate(shard, node);
    }

    /// `node` could not be reached, or didn't answer in time.
    pub fn unreachable(&mut self, shard: ShardId, node: NodeId, now: Instant) {
        self.failed.insert(node, now);
        // It may be on its way back with a replica in its next life.
        self.isnt_quarantined(shard, node);
        self.rotate(shard, node);
    }

    /// `node` says that its replica of `shard` is quarantined. Whether so many have said so lately, and
    /// nothing else since, that the others are no majority: then nobody can serve the shard.
    pub fn quarantined(&mut self, shard: ShardId, node: NodeId, now: Instant) -> bool {
        self.quarantined.insert((shard, node), now);
        self.rotate(shard, node);
        let Some(record) = self.map.shards.get(&shard) else {
            return false;
        };
        let lately = |said: &Instant| now.saturating_duration_since(*said) < QUARANTINED;
        let is_lost = |m: &Member| self.quarantined.get(&(shard, m.node)).is_some_and(lately);
        !is_quorum(&record.members, |member| !is_lost(member))
    }

    /// Whether `node` may lead `shard`, on the word of somebody who knows: the map may not yet have heard of
    /// a member that a move has brought.
    fn may_lead(&self, shard: ShardId, node: NodeId) -> bool {
        self.map.shards.get(&shard).is_some_and(|record| holds(record, node)) && serves(&self.map, node)
    }

    fn isnt_quarantined(&mut self, shard: ShardId, node: NodeId) {
        if !self.quarantined.is_empty() {
            self.quarantined.remove(&(shard, node));
        }
    }

    fn suspect(&self, node: NodeId, now: Instant) -> bool {
        let failed = self.failed.get(&node);
        failed.is_some_and(|at| now.saturating_duration_since(*at) < SUSPECT)
    }

    /// Moves the guess from `node`, if that is the guess, to the next one that may lead.
    fn rotate(&mut self, shard: ShardId, node: NodeId) {
        let Some(record) = self.map.shards.get(&shard) else {
            return;
        };
        if self.target(shard).is_some_and(|t| t.node != node) {
            return;
        }
        let nodes = self.candidates(record);
        // One that was only named, and isn't among them, is followed by the first.
        let next = nodes.iter().position(|n| *n == node).map_or(0, |at| (at + 1) % nodes.len());
        if let Some(next) = nodes.get(next) {
            self.leaders.insert(shard, *next);
        }
    }
}

/// Whether a leader of `shard` may be remembered on `node`. One that has no vote yet was named by somebody who knew more
/// than the map, and has to be again.
fn leads_under(map: &ClusterMap, shard: ShardId, node: NodeId) -> bool {
    let record = map.shards.get(&shard).filter(|shard| !shard.dropped);
    record.and_then(|shard| shard.member_on(node)).is_some_and(|m| m.role.votes()) && serves(map, node)
}

/// Whether a shard has a replica on `node`, or gets one.
fn holds(record: &ShardRecord, node: NodeId) -> bool {
    record.ordered().any(|member| member.node == node)
}

/// Whether `node` can be asked: it has an address, and belongs to the cluster. One that is removed, or isn't let
/// in yet, hears of nothing.
fn serves(map: &ClusterMap, node: NodeId) -> bool {
    map.nodes.get(&node).is_some_and(|node| {
        !node.client_address.is_empty() && !matches!(node.standing, Standing::Removed | Standing::Pending)
    })
}

#[cfg(test)]
mod tests;
