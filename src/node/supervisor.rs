//! The supervisor actor, one per node: it owns the router, starts replicas as the cluster map
//! orders, rebuilds those that crash, and keeps the map.
//!
//! A crashed replica is rebuilt from disk, never from memory, and only behind a fence: writes of the
//! dead incarnation that are still queued would otherwise land after its log was read, and an old
//! hard state could replace a newer vote.

use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use actix::prelude::*;
use tokio::sync::watch;

use super::counting::Counts;
use super::fatal::{Fatal, FatalGuard};
use super::handle::ReplicaHealth;
use super::hub::{FailReplica, Forget, Hub, hub_of};
use super::map_cache;
use super::messages::*;
use super::removal::{self, destroy};
use super::replica::ReplicaAddr;
use super::replicas::{Crash, Orders, Readiness, Replicas, Started, Verdict};
use super::router::Route;
use super::shared::Shared;
use super::ticker;
use crate::failpoints::failpoint;
use crate::group::catch_up::Retention;
use crate::group::types::GroupStatus;
use crate::ids::{Incarnation, METADATA_SHARD, NodeId, ReplicaId, ShardId, StoreId};
use crate::limits;
use crate::machine::command::{Command, MetaCommand};
use crate::placement::map::{ClusterMap, Standing};
use crate::storage::engine::Engine;
use crate::storage::identity::DataDir;
use crate::storage::log::ReplicaRecord;
use crate::telemetry::metrics as names;

mod report;

/// What a node is and where it keeps things.
pub struct Site {
    /// This node.
    pub node: NodeId,
    /// Which start of its process.
    pub incarnation: u64,
    /// Identity of its directory.
    pub store_id: StoreId,
    /// Its directory.
    pub data_dir: Arc<Mutex<DataDir>>,
    /// Its state engine.
    pub engine: Arc<dyn Engine>,
    /// What its replicas keep of their logs for others that lag.
    pub retention: Retention,
}

/// See the module page.
pub struct Supervisor {
    pub(super) site: Site,
    pub(super) shared: Arc<Shared>,
    data_hubs: Vec<Addr<Hub>>,
    control_hub: Addr<Hub>,
    pub(super) replicas: Replicas,
    pub(super) addrs: BTreeMap<ReplicaId, ReplicaAddr>,
    pub(super) led: HashSet<ShardId>,
    /// Of leaders that sleep: how their groups are.
    pub(super) resting: BTreeMap<ReplicaId, Box<GroupStatus>>,
    /// Replicas of the catalogue that were not tried yet.
    pub(super) untried: HashSet<ReplicaId>,
    /// How much the shards hold that are led here.
    pub(super) counts: Counts,
    readiness: watch::Sender<Readiness>,
    /// All replicas are to end: none is opened any more.
    pub(super) stopping: bool,
    /// The node is removed from its cluster, and is burying its replicas.
    pub(super) leaving: bool,
    #[cfg(feature = "test-hooks")]
    pub(super) hooks: super::hooks::Hooks,
    saving_map: bool,
    map_unsaved: bool,
    /// What the map orders will be looked at once more.
    obeys_again: bool,
    pub(super) fatal: Fatal,
    _guard: FatalGuard,
}

/// Node → supervisor: open every replica of the catalogue.
#[derive(Message)]
#[rtype(result = "()")]
pub struct OpenAll;

/// Node → supervisor: hand over leadership, as far as others can take it; the number still led.
#[derive(Message)]
#[rtype(result = "usize")]
pub struct HandOver;

/// Log writer → supervisor: this incarnation's write contradicts its log; rebuild it from disk.
#[derive(Message)]
#[rtype(result = "()")]
pub struct EndReplica {
    /// Which.
    pub replica: ReplicaId,
    /// Which start of it.
    pub incarnation: Incarnation,
    /// What is wrong with the write.
    pub reason: String,
}

/// Node → supervisor: end all replicas.
#[derive(Message)]
#[rtype(result = "()")]
pub struct StopAll;

impl Supervisor {
    /// A supervisor of the replicas in `catalogue`. `readiness` shows how far they are.
    pub fn new(
        site: Site,
        shared: Arc<Shared>,
        data_hubs: Vec<Addr<Hub>>,
        control_hub: Addr<Hub>,
        catalogue: Vec<ReplicaRecord>,
        readiness: watch::Sender<Readiness>,
        fatal: Fatal,
    ) -> Supervisor {
        Supervisor {
            site,
            shared,
            data_hubs,
            control_hub,
            replicas: Replicas::new(catalogue),
            addrs: BTreeMap::new(),
            led: HashSet::new(),
            resting: BTreeMap::new(),
            untried: HashSet::new(),
            counts: Counts::default(),
            readiness,
            stopping: false,
            leaving: false,
            #[cfg(feature = "test-hooks")]
            hooks: Default::default(),
            saving_map: false,
            map_unsaved: false,
            obeys_again: false,
            _guard: fatal.guard("the supervisor"),
            fatal,
        }
    }

    /// Whether the cluster has removed this node, as far as is known here.
    pub(super) fn is_removed(&self) -> bool {
        removal::is_removed(&self.shared.router.map(), self.site.node, self.site.store_id)
    }

    pub(super) fn hub(&self, shard: ShardId) -> &Addr<Hub> {
        if shard == METADATA_SHARD {
            &self.control_hub
        } else {
            &self.data_hubs[hub_of(shard, self.data_hubs.len())]
        }
    }

    pub(super) fn tell_readiness(&self) {
        let now = Readiness { untried: Some(self.untried.len()), closed: self.replicas.closed() };
        self.readiness.send_if_modified(|told| {
            let news = *told != now;
            *told = now;
            news
        });
    }

    /// A better map is known: keep it, tell others, do what it orders.
    fn take_map(&mut self, map: Arc<ClusterMap>, ctx: &mut Context<Self>) {
        if map.cluster_id != self.shared.router.map().cluster_id {
            // What another cluster orders must not end anything here.
            return tracing::error!(cluster = %map.cluster_id, "the map of another cluster is not taken");
        }
        tracing::debug!(version = map.version, "new cluster map");
        metrics::gauge!(names::MAP_VERSION).set(map.version as f64);
        let moving = map.shards.values().filter(|shard| shard.moving.is_some()).count();
        metrics::gauge!(names::MOVES).set(moving as f64);
        let orders = self.replicas.orders(&map, self.site.node);
        let peers: Vec<_> = (map.nodes.values())
            .filter(|n| n.id != self.site.node && n.standing != Standing::Removed)
            .map(|n| (n.id, n.peer_address.clone()))
            .collect();
        let own = map.nodes.get(&self.site.node).map(|own| own.standing);
        let drains = matches!(own, Some(Standing::Draining | Standing::Leaving));
        self.shared.draining.store(drains, Ordering::Relaxed);
        self.shared.snapshots.limit(map.policy.bytes_per_second);
        self.shared.network.set_peers(&peers);
        self.shared.router.set_map(map);
        self.shared.heartbeat();
        self.save_map(ctx);
        if self.is_removed() {
            return self.leave(ctx);
        }
        self.obey(orders, ctx);
        self.recover(ctx);
    }

    fn obey(&mut self, orders: Orders, ctx: &mut Context<Self>) {
        let map = self.shared.router.map();
        for replica in orders.remove {
            let slot = self.replicas.get_mut(replica);
            let shard = slot.and_then(|slot| map.shards.get(&slot.record.shard));
            match shard.filter(|shard| !shard.dropped) {
                Some(shard) => {
                    if !self.remove_unordered(replica, shard.epoch.conf, ctx) {
                        self.obey_again(ctx);
                    }
                }
                None => {
                    let removal = self.remove(replica);
                    // One that can't be recorded is told there, and tried again at the next start.
                    ctx.spawn(fut::wrap_future(removal).map(|_, _, _| ()));
                }
            }
        }
        if !orders.create.is_empty() {
            self.create(orders.create, ctx);
        }
    }

    /// Something can't be done now that the map orders.
    fn obey_again(&mut self, ctx: &mut Context<Self>) {
        if std::mem::replace(&mut self.obeys_again, true) {
            return;
        }
        ctx.run_later(Duration::from_millis(limits::DISK_WATCH_MS), |act, ctx| {
            act.obeys_again = false;
            if !act.stopping && !act.leaving {
                let orders = act.replicas.orders(&act.shared.router.map(), act.site.node);
                act.obey(orders, ctx);
            }
        });
    }

    /// Records new replicas in the catalogue, durably, before any of them starts.
    fn create(&mut self, records: Vec<ReplicaRecord>, ctx: &mut Context<Self>) {
        tracing::info!(count = records.len(), "creating replicas");
        self.replicas.created(&records);
        self.record_new(records, ctx);
    }

    fn record_new(&mut self, records: Vec<ReplicaRecord>, ctx: &mut Context<Self>) {
        let node = self.site.node;
        // The placement lists the preferred leader first; it needn't wait for a timeout.
        let campaign = (records.iter())
            .filter(|record| record.members.first().is_some_and(|first| first.node == node))
            .map(|record| record.replica)
            .collect();
        let (done, written) = tokio::sync::oneshot::channel();
        let to_write = records.clone();
        self.shared.log_writer.run(Box::new(move |log| {
            failpoint!(LogCreateBefore);
            let created = log.create(&to_write);
            failpoint!(LogCreateAfter);
            if done.send(created).is_err() {
                tracing::debug!("nobody waits for the creation of replicas");
            }
        }));
        ctx.spawn(fut::wrap_future(written).map(move |written, act: &mut Self, ctx| match written {
            Ok(Ok(())) => {
                if records.iter().any(|record| record.members.is_empty()) {
                    failpoint!(NewcomerCreated);
                }
                act.open(records, campaign, ctx);
            }
            Ok(Err(error)) if error.is_full() => {
                tracing::warn!(%error, "recording new replicas, to be tried again");
                let again = Duration::from_millis(limits::DISK_WATCH_MS);
                ctx.run_later(again, move |act, ctx| act.record_again(records, ctx));
            }
            Ok(Err(error)) => {
                tracing::error!(%error, "recording new replicas, to be tried again");
                act.not_recorded(records, &format!("it can't be recorded: {error}"), ctx);
            }
            Err(_) => tracing::debug!("the log writer has ended"),
        }));
    }

    /// Tries again, but for those that were removed meanwhile.
    fn record_again(&mut self, mut records: Vec<ReplicaRecord>, ctx: &mut Context<Self>) {
        records.retain(|record| self.replicas.get_mut(record.replica).is_some());
        if !records.is_empty() && !self.stopping {
            self.record_new(records, ctx);
        }
    }

    /// Whoever asks is told why these replicas aren't there, so that others can be made elsewhere if that
    /// doesn't pass.
    fn not_recorded(&mut self, records: Vec<ReplicaRecord>, why: &str, ctx: &mut Context<Self>) {
        let mut after = Duration::from_millis(limits::REOPEN_MS_MAX);
        for record in &records {
            // None of them has been started: that would be number 1.
            if let Started::Failed { again, .. } =
                self.replicas.started(record.replica, 0, Err(why.to_owned()))
            {
                after = after.min(again);
            }
        }
        let route = |record: &ReplicaRecord| {
            let target = Err(ReplicaHealth::Failed(why.to_owned()));
            (record.shard, Route { replica: record.replica, target })
        };
        self.shared.router.update(|routes| routes.extend(records.iter().map(route)));
        self.tell_readiness();
        ctx.run_later(after, move |act, ctx| act.record_again(records, ctx));
    }

    fn save_map(&mut self, ctx: &mut Context<Self>) {
        if self.saving_map {
            self.map_unsaved = true;
            return;
        }
        self.saving_map = true;
        self.map_unsaved = false;
        let map = self.shared.router.map();
        let data_dir = self.site.data_dir.clone();
        let save = tokio::task::spawn_blocking(move || {
            let dir = data_dir.lock().unwrap_or_else(PoisonError::into_inner);
            dir.save_map(&map_cache::encode(&map))
        });
        ctx.spawn(fut::wrap_future(save).map(|saved, act: &mut Self, ctx| {
            match saved {
                Ok(Ok(())) => {}
                // The metadata shard has it; only a start without that would miss the newest map.
                Ok(Err(error)) => tracing::warn!(%error, "saving the cluster map"),
                Err(error) => tracing::warn!(%error, "saving the cluster map"),
            }
            act.map_saved(ctx);
        }));
    }

    fn map_saved(&mut self, ctx: &mut Context<Self>) {
        // While shards move, the map changes many times a second. Else it is saved at once: a node that starts
        // from an old one would know nothing of a new database until it has heard of it.
        let moves = self.shared.router.map().shards.values().any(|shard| shard.moving.is_some());
        let pause = if moves { Duration::from_millis(limits::MAP_SAVE_MS) } else { Duration::ZERO };
        ctx.run_later(pause, |act: &mut Self, ctx| {
            act.saving_map = false;
            if act.map_unsaved {
                act.save_map(ctx);
            }
        });
    }

    /// The first leader of a new cluster's metadata shard writes what formation agreed on.
    fn form(&self) {
        let map = self.shared.router.map();
        let Some(metadata) = map.shards.get(&METADATA_SHARD) else {
            return;
        };
        let command = MetaCommand::Form {
            cluster_id: map.cluster_id,
            nodes: map.nodes.values().cloned().collect(),
            metadata: Box::new(metadata.clone()),
        };
        let (reply, results) = tokio::sync::oneshot::channel();
        let submit = Submit {
            range_version: metadata.epoch.range,
            operations: vec![crate::group::types::Operation::Command {
                command: Command::Meta(command),
                session: None,
            }],
            reply,
            admitted: None,
            trace: None,
        };
        match self.shared.router.replica(METADATA_SHARD) {
            Ok(addr) => addr.do_send(submit),
            Err(error) => return tracing::warn!(%error, "forming the cluster"),
        }
        actix::spawn(async move {
            // Repeated by the next leader if it failed: the map stays at version 0.
            match results.await {
                Ok(Ok(results)) => tracing::info!(?results, "cluster formed"),
                Ok(Err(error)) => tracing::warn!(%error, "forming the cluster"),
                Err(_) => tracing::warn!("the metadata replica ended while forming the cluster"),
            }
        });
    }
}

impl Actor for Supervisor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Context<Self>) {
        ctx.set_mailbox_capacity(limits::HUB_MAILBOX_MAX);
        let period = Duration::from_millis(limits::NODE_HEARTBEAT_MS);
        ticker::every(ctx, period, |supervisor, ctx| {
            supervisor.shared.router.hearing().look(Instant::now());
            supervisor.count_next(ctx);
            // Replicas end in several ways.
            metrics::gauge!(names::REPLICAS).set(supervisor.addrs.len() as f64);
            metrics::gauge!(names::LEADERS).set(supervisor.led.len() as f64);
        });
    }
}

impl Handler<OpenAll> for Supervisor {
    type Result = ();
    fn handle(&mut self, _: OpenAll, ctx: &mut Context<Self>) {
        // A crash may have come between a tombstone and the end of the deletion.
        destroy(&self.shared, self.replicas.take_remains());
        if self.is_removed() {
            return self.leave(ctx);
        }
        let records: Vec<_> = self.replicas.iter().map(|slot| slot.record.clone()).collect();
        for record in &records {
            // What a crash has left of a snapshot that was being loaded, or of the state before one.
            self.shared.snapshots.worker.sweep(record.replica, record.generation);
        }
        // Told before anything is started, so that nobody sees "ready" in between.
        self.untried = records.iter().map(|record| record.replica).collect();
        self.tell_readiness();
        self.open(records, HashSet::new(), ctx);
        self.take_map(self.shared.router.map(), ctx);
    }
}

impl Handler<ReplicaDown> for Supervisor {
    type Result = ();
    fn handle(&mut self, down: ReplicaDown, ctx: &mut Context<Self>) {
        let ReplicaDown { replica, incarnation, reason, applying } = down;
        let crash = Crash { reason, applying, at: Instant::now() };
        let Some((shard, verdict)) = self.replicas.crashed(replica, incarnation, &crash) else {
            return;
        };
        let reason = crash.reason;
        tracing::error!(%shard, %replica, incarnation, reason, applying, ?verdict, "replica crashed");
        metrics::counter!(names::REPLICA_RESTARTS).increment(1);
        self.shared.snapshots.outgoing.cancel(replica);
        self.addrs.remove(&replica);
        self.resting.remove(&replica);
        self.led.remove(&shard);
        // The others may be asleep, and take this node's heartbeats for its.
        self.shared.ended.fetch_add(1, Ordering::Relaxed);
        self.shared.heartbeat();
        self.tell_readiness();
        self.hub(shard).do_send(Forget(replica, incarnation));
        let Some(slot) = self.replicas.get_mut(replica) else {
            return;
        };
        let target = Err(slot.health.clone());
        let record = slot.record.clone();
        self.shared.router.update(|routes| {
            routes.insert(shard, Route { replica, target });
        });
        let Verdict::Restart(after) = verdict else {
            return;
        };
        slot.restarts += 1;
        let shared = self.shared.clone();
        let fence = async move {
            actix::clock::sleep(after).await;
            shared.fence(replica, incarnation).await;
        };
        ctx.spawn(fut::wrap_future(fence).map(move |(), act: &mut Self, ctx| {
            failpoint!(Rebuild, replica);
            act.open(vec![record], HashSet::new(), ctx);
        }));
    }
}

impl Handler<EndReplica> for Supervisor {
    type Result = ();
    fn handle(&mut self, end: EndReplica, _: &mut Context<Self>) {
        // Its hub knows the replica from its start on; here it is known only when all that were to start
        // with it have. Its guard then reports its end, with this reason.
        if let Some(slot) = self.replicas.get_mut(end.replica) {
            let shard = slot.record.shard;
            self.hub(shard).do_send(FailReplica(end.replica, end.incarnation, end.reason));
        }
    }
}

impl Handler<LeaderChanged> for Supervisor {
    type Result = ();
    fn handle(&mut self, changed: LeaderChanged, _: &mut Context<Self>) {
        if self.replicas.get_mut(changed.replica).is_none() {
            // It was removed meanwhile: the shard may have another replica here, and that may lead.
            return;
        }
        // What it told of itself before, in another term or by another start, is void.
        self.resting.remove(&changed.replica);
        if changed.change.local {
            self.led.insert(changed.shard);
            if changed.shard == METADATA_SHARD && self.shared.router.map().version == 0 {
                self.form();
            }
        } else {
            self.led.remove(&changed.shard);
        }
        metrics::gauge!(names::LEADERS).set(self.led.len() as f64);
    }
}

impl Handler<MapApplied> for Supervisor {
    type Result = ();
    fn handle(&mut self, applied: MapApplied, ctx: &mut Context<Self>) {
        if applied.0.version > self.shared.router.map().version {
            // The same one as the replica's: of thousands of shards two would be a good part of a node's memory.
            self.take_map(applied.0, ctx);
        }
    }
}

impl Handler<MapNews> for Supervisor {
    type Result = ();
    fn handle(&mut self, news: MapNews, ctx: &mut Context<Self>) {
        let mut map = ClusterMap::clone(&self.shared.router.map());
        if map.merge(news.0) {
            self.take_map(Arc::new(map), ctx);
        }
    }
}

impl Handler<MapConfirmed> for Supervisor {
    type Result = ();
    fn handle(&mut self, confirmed: MapConfirmed, _: &mut Context<Self>) {
        // What brings the map comes before this: if it could not be taken, this node doesn't know that version.
        if self.shared.router.confirmed(confirmed.version, confirmed.at) {
            // Others may wait for this word, as this node did.
            self.shared.heartbeat();
        }
    }
}

impl Handler<HandOver> for Supervisor {
    type Result = usize;
    fn handle(&mut self, _: HandOver, _: &mut Context<Self>) -> usize {
        let mut led = 0;
        for (replica, addr) in &self.addrs {
            let leads =
                self.replicas.get_mut(*replica).is_some_and(|slot| self.led.contains(&slot.record.shard));
            if leads {
                led += 1;
                addr.do_send(Transfer(None));
            }
        }
        led
    }
}

impl Handler<StopAll> for Supervisor {
    type Result = ResponseFuture<()>;
    fn handle(&mut self, _: StopAll, _: &mut Context<Self>) -> Self::Result {
        self.stopping = true;
        let stops: Vec<_> = self.addrs.values().map(|addr| addr.send(StopReplica)).collect();
        self.shared.router.update(|routes| routes.clear());
        self.addrs.clear();
        Box::pin(async move {
            for stopped in futures_util::future::join_all(stops).await {
                if let Err(error) = stopped {
                    tracing::debug!(%error, "the replica had ended already");
                }
            }
        })
    }
}

#[cfg(test)]
#[path = "supervisor_tests.rs"]
mod tests;
