//! Shards to replicas of this node, and the cluster map: immutable pictures behind atomic pointers,
//! read on every request from any thread, replaced by the supervisor alone.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use arc_swap::ArcSwap;
use tokio::sync::watch;

use super::handle::ReplicaHealth;
use super::hearing::{self, Hearing};
use super::replica::ReplicaAddr;
use crate::ids::{ReplicaId, ShardId};
use crate::placement::map::ClusterMap;
use crate::refusal::Refusal;

/// This node's replica of a shard.
#[derive(Clone)]
pub struct Route {
    /// The replica.
    pub replica: ReplicaId,
    /// Its mailbox while it runs, else why it doesn't.
    pub target: Result<ReplicaAddr, ReplicaHealth>,
}

/// See the module page.
pub struct Router {
    routes: ArcSwap<HashMap<ShardId, Route>>,
    map: ArcSwap<ClusterMap>,
    /// Version of the map, for those who wait for a newer one.
    news: watch::Sender<u64>,
    /// How fresh the map is.
    hearing: Hearing,
}

impl Router {
    /// A router without replicas.
    pub fn new(map: ClusterMap) -> Router {
        let news = watch::Sender::new(map.version);
        Router {
            routes: ArcSwap::default(),
            map: ArcSwap::from_pointee(map),
            news,
            hearing: Hearing::default(),
        }
    }

    /// How fresh the map is.
    pub fn hearing(&self) -> &Hearing {
        &self.hearing
    }

    /// A map of this version was all that was known at the time `at`. Returns whether that ends the time in which this node
    /// was cut off.
    pub fn confirmed(&self, version: u64, at: Instant) -> bool {
        hearing::knows(self.map.load().version, version) && self.hearing.heard(at, Instant::now())
    }

    /// The cluster map as this node knows it.
    pub fn map(&self) -> Arc<ClusterMap> {
        self.map.load_full()
    }

    /// The version of that.
    pub fn map_version(&self) -> u64 {
        self.map.load().version
    }

    /// Waits until the map is newer than version `since`.
    pub async fn map_after(&self, since: u64) -> Arc<ClusterMap> {
        // Subscribed before the look, so that no change falls between.
        let mut news = self.news.subscribe();
        loop {
            let map = self.map();
            if map.version > since {
                return map;
            }
            if news.changed().await.is_err() {
                unreachable!("the sender is this router's own");
            }
        }
    }

    /// Replaces the map; the supervisor's alone. Who waits for a newer one is woken.
    pub fn set_map(&self, map: Arc<ClusterMap>) {
        let version = map.version;
        self.map.store(map);
        self.news.send_replace(version);
    }

    /// Changes routes; the supervisor's alone. Costs a copy of all of them: changes are rare and
    /// come many at a time.
    pub fn update(&self, change: impl FnOnce(&mut HashMap<ShardId, Route>)) {
        let mut routes = HashMap::clone(&self.routes.load());
        change(&mut routes);
        self.routes.store(Arc::new(routes));
    }

    /// This node's running replica of `shard`.
    pub fn replica(&self, shard: ShardId) -> Result<ReplicaAddr, Refusal> {
        let routes = self.routes.load();
        match routes.get(&shard) {
            Some(Route { target: Ok(addr), .. }) => Ok(addr.clone()),
            Some(Route { target: Err(ReplicaHealth::Quarantined(reason)), .. }) => {
                Err(Refusal::Quarantined(reason.clone()))
            }
            Some(Route { target: Err(ReplicaHealth::Failed(reason)), .. }) => {
                // It is tried again by itself.
                Err(Refusal::Unavailable(format!("the replica can't be opened: {reason}").into()))
            }
            Some(Route { target: Err(ReplicaHealth::Installing), .. }) => {
                Err(Refusal::Unavailable("the replica is being brought up to date".into()))
            }
            Some(_) => Err(Refusal::Unavailable("the replica is being rebuilt after a crash".into())),
            None => Err(Refusal::StaleRoute { shard, asked: 0, range_version: 0 }),
        }
    }
}
