//! Newer cluster maps as they come: one call waits at some node until that has news.
//!
//! ```text
//!   first map ── a moment ──► a node ──┬─► news: taken over; again
//!                               ▲      ├─► nothing new: again, some times; then another node
//!                               │      ├─► it is cut off itself: the next; after the last a pause
//!                               │      ├─► it is an old one, where no call can wait: asked now, and later
//!                               │      └─► it fails, or the cluster has given it up ─┐
//!                               └──────────── the next; after the last a pause ──────┘
//! ```
//!
//! So a client that does nothing, and meets no error, knows where the cluster is when all nodes that it began
//! with are gone. It changes nodes when one says that it is cut off from the metadata shard, and now and then
//! anyway: an older one doesn't say so, and has nothing new either. Where it has been it leaves no connection, unless there
//! is other use for it. A client inside a node shares the node's map and needs none of this.

use std::collections::HashSet;
use std::rc::{Rc, Weak};
use std::time::{Duration, Instant};

use capnp::ErrorKind;
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

use super::connection::{Connection, Obstacle};
use super::driver::Driver;
use crate::codec::records::read_delta;
use crate::limits::{
    ATTEMPT_MS_MAX, MAP_POLL_MS, MAP_WATCH_AFTER_MS, MAP_WATCH_BACKOFF_MS_MAX, MAP_WATCH_MS,
    MAP_WATCH_PAUSE_MS, MAP_WATCH_TURNS,
};
use crate::placement::map::Standing;

/// After every answer: changes that come one upon the other are told together.
const PAUSE: Duration = Duration::from_millis(MAP_WATCH_PAUSE_MS);

/// Follows the map of a client, from when it is `mapped`, until the client ends.
pub(super) async fn follow(driver: Weak<Driver>, mapped: Rc<Notify>) {
    mapped.notified().await;
    sleep(Duration::from_millis(MAP_WATCH_AFTER_MS)).await;
    let mut pause = PAUSE;
    while let Some(places) = driver.upgrade().map(|driver| driver.places()) {
        let mut followed = false;
        for address in places {
            let left = stay(&driver, &address).await;
            if let Some(driver) = driver.upgrade() {
                driver.pool.close_idle(Instant::now());
            }
            match left {
                Stay::Over => return,
                Stay::Left => followed = true,
                // The next may not be. If all are, the metadata shard has no leader, and a longer pause follows.
                Stay::CutOff => {
                    tracing::debug!(address, "following the cluster map: the node is cut off");
                    sleep(PAUSE).await;
                    continue;
                }
                Stay::Failed(why) => {
                    tracing::debug!(%why, "following the cluster map");
                    continue;
                }
            }
            break;
        }
        if followed {
            pause = PAUSE;
        } else {
            sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(MAP_WATCH_BACKOFF_MS_MAX));
        }
    }
}

/// How it was at one node.
enum Stay {
    /// It told what it knew; another may know more.
    Left,
    /// It says that it doesn't hear from the metadata shard.
    CutOff,
    /// It is of no use.
    Failed(Obstacle),
    /// The client has ended.
    Over,
}

/// Waits for news at one node, as long as that makes sense.
async fn stay(driver: &Weak<Driver>, address: &str) -> Stay {
    let Some(pool) = driver.upgrade().map(|driver| driver.pool.clone()) else {
        return Stay::Over;
    };
    let connection = match pool.get(address, true).await {
        Ok(connection) => connection,
        Err(why) => return Stay::Failed(why),
    };
    let told = |what: &dyn std::fmt::Display| Stay::Failed(format!("{address}: {what}").into());
    let (mut quiet, mut heard) = (0, false);
    while quiet < MAP_WATCH_TURNS {
        let (since, answer) = match driver.upgrade() {
            None => return Stay::Over,
            Some(driver) if driver.of_use(&connection) => {
                let since = driver.routing.borrow().map().version;
                let mut request = connection.kv.watch_map_request();
                request.get().set_since(since);
                request.get().set_timeout_ms(MAP_WATCH_MS as u32);
                (since, request.send().promise)
            }
            Some(_) if heard => return Stay::Left,
            Some(_) => {
                // It may have been dialled before it joined.
                pool.discard(&connection);
                return told(&"the node isn't a member of this cluster");
            }
        };
        let began = Instant::now();
        let limit = Duration::from_millis(MAP_WATCH_MS + ATTEMPT_MS_MAX);
        let answer = timeout(limit, answer).await;
        let Some(driver) = driver.upgrade() else {
            return Stay::Over;
        };
        let answer = match answer {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) if error.kind == ErrorKind::Unimplemented => {
                return poll(driver, address).await;
            }
            Ok(Err(error)) => return told(&error),
            Err(_) => {
                driver.pool.unanswered(&connection, began, false);
                return told(&format!("no word of the cluster map within {limit:?}"));
            }
        };
        let cut_off = answer.get().is_ok_and(|answer| answer.get_cut_off());
        let delta = answer.get().and_then(|answer| answer.get_delta());
        let delta =
            match delta.map_err(|e| e.to_string()).and_then(|d| read_delta(d).map_err(|e| e.to_string())) {
                Ok(delta) if delta.version > 0 => delta,
                Ok(_) => return told(&"the node isn't a member of a cluster yet"),
                Err(error) => return told(&error),
            };
        if let Err(error) = driver.learn(delta, address) {
            return told(&error);
        }
        heard = true;
        if driver.routing.borrow().map().version > since {
            quiet = 0;
            driver.prune();
            driver.release();
        } else {
            quiet += 1;
        }
        if cut_off {
            return Stay::CutOff;
        }
        drop(driver);
        sleep(PAUSE).await;
    }
    Stay::Left
}

/// Asks a node that lets no call wait, and waits here instead.
async fn poll(driver: Rc<Driver>, address: &str) -> Stay {
    match driver.ask_node(address).await {
        Ok(_) => {}
        Err(why) => return Stay::Failed(why),
    }
    driver.prune();
    driver.release();
    drop(driver);
    sleep(Duration::from_millis(MAP_POLL_MS)).await;
    Stay::Left
}

impl Driver {
    /// Addresses of nodes to wait at: the ordinary ones, each client's in an order of its own; then whatever else
    /// is known.
    fn places(&self) -> Vec<String> {
        let mut places: Vec<String> = {
            let routing = self.routing.borrow();
            let nodes = routing.map().nodes.values().filter(|node| node.standing == Standing::Member);
            nodes.map(|node| node.client_address.clone()).filter(|address| !address.is_empty()).collect()
        };
        places.sort_by_cached_key(|_| rand::random::<u64>());
        places.extend(self.addresses());
        let mut named = HashSet::new();
        places.retain(|address| named.insert(address.clone()));
        places
    }

    /// Whether the node behind `connection` is one to hear news from: the cluster hasn't given it up.
    fn of_use(&self, connection: &Connection) -> bool {
        let routing = self.routing.borrow();
        let node = routing.map().nodes.get(&connection.node);
        // One that isn't in the map may be too new for it.
        let member = node.is_none_or(|n| matches!(n.standing, Standing::Member | Standing::Draining));
        member && !connection.broken() && connection.cluster_id == routing.map().cluster_id
    }
}
