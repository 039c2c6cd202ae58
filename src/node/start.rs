//! Starting and stopping a node: what is made in which order, and taken down in which.

use std::net::TcpListener;
use std::rc::Rc;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use actix::prelude::*;
use tokio::sync::{oneshot, watch};

use super::disk;
use super::fatal::Fatal;
use super::flusher::FlushThread;
use super::handle::{Member, NodeHandle, NodePhase};
use super::hub::{FreezeBatch, Hub, NodeGone, Unreachable};
use super::intake::Intake;
use super::log_writer::LogWriter;
use super::membership::{Applicant, keep_record, spread};
use super::memory::MemoryGauge;
use super::reader::ReadThread;
use super::replicas::Readiness;
use super::router::Router;
use super::service::{Destinations, PeerService};
use super::shared::Shared;
use super::snapshots::Snapshots;
use super::snapshots::{outgoing, worker};
use super::stall::{Pulses, WatchGuard};
use super::stores::Stores;
use super::supervisor::{EndReplica, HandOver, OpenAll, Site, StopAll, Supervisor};
use super::{Listeners, NodeError, claims, map_cache, panics, reconciler, removal, stall, stores};
use crate::codec::peer::Membership;
use crate::group::catch_up::Retention;
use crate::group::held::HeldLog;
use crate::ids::{ClusterId, NodeId, ReplicaId};
use crate::limits;
use crate::placement::map::{ClusterMap, NodeRecord, Standing};
use crate::settings::Settings;
use crate::storage::StorageError;
use crate::storage::engine::Engine;
use crate::storage::identity::DataDir;
use crate::storage::log::LogStore;
use crate::storage::log_disk::DiskLog;
use crate::telemetry::http::HealthView;
use crate::telemetry::metrics as names;
use crate::transport::call::HelloConfig;
use crate::transport::listener::{PeerHandler, PeerListener};
use crate::transport::network::{PeerNetwork, PeerNetworkConfig};
use crate::{rpc, telemetry};

/// A node that runs on threads of its own. Dropping it does not stop it; call [`RunningNode::stop`].
pub struct RunningNode {
    handle: NodeHandle,
    fatal: Fatal,
    readiness: watch::Receiver<Readiness>,
    shutdown: watch::Sender<bool>,
    data: Vec<Arbiter>,
    control: Arbiter,
    running: Arc<Mutex<Option<Running>>>,
    data_dir: Arc<Mutex<DataDir>>,
    _watch: WatchGuard,
}

/// What a member has beside its threads of actors.
struct Running {
    shared: Arc<Shared>,
    supervisor: Addr<Supervisor>,
    threads: Vec<JoinHandle<()>>,
}

/// Starts a node: opens its directory, binds its threads, and begins to form or join. Must be called
/// within an `actix::System`; several nodes may share one. Returns once the stores are open.
pub async fn start(settings: Settings, listeners: Listeners) -> Result<RunningNode, NodeError> {
    start_as(settings, listeners, false).await
}

/// [`start`]; but if the directory is too damaged to go on as the node that it was, it is set aside, and
/// the node joins its cluster as a new one. It never forms a cluster.
pub async fn start_rejoining(settings: Settings, listeners: Listeners) -> Result<RunningNode, NodeError> {
    start_as(settings, listeners, true).await
}

async fn start_as(settings: Settings, listeners: Listeners, rejoins: bool) -> Result<RunningNode, NodeError> {
    panics::install();
    #[cfg(feature = "test-hooks")]
    crate::failpoints::arm_from_environment().map_err(NodeError::Fatal)?;
    if let Err(error) = telemetry::metrics::install() {
        tracing::warn!(%error, "this node counts nothing");
    }
    let fatal = Fatal::new();
    let handle = NodeHandle::new(settings.node.id.clone());
    let pulses = Pulses::default();
    let watch = stall::watch(&pulses, &fatal)
        .map_err(|error| NodeError::Fatal(format!("starting a thread: {error}")))?;
    let (data_dir, stores) = tokio::select! {
        opened = stores::open(&settings, handle.clone(), pulses.flush.clone(), rejoins) => opened?,
        error = fatal.raised() => return Err(error),
    };
    let store_id = data_dir.store_id();
    let data_dir = Arc::new(Mutex::new(data_dir));
    let record = NodeRecord {
        id: NodeId(0),
        label: settings.node.id.clone(),
        client_address: settings.client.advertise.clone(),
        peer_address: settings.peer.advertise.clone(),
        zone: settings.node.zone.clone(),
        weight: settings.node.weight,
        store_id,
        standing: Standing::Member,
        changed_at: 0,
    };
    let applicant = Arc::new(Applicant::new(data_dir.clone(), record, settings.cluster.clone()));
    let incarnation = rand::random::<u64>().max(1);
    let service = Arc::new(PeerService::new(applicant.clone(), handle.clone(), incarnation));
    let (shutdown, stopping) = watch::channel(false);
    let (readiness_tx, readiness) = watch::channel(Readiness::default());
    let data: Vec<Arbiter> = (0..data_threads(&settings)).map(|_| Arbiter::new()).collect();
    let control = Arbiter::new();
    let running = Arc::new(Mutex::new(None));

    for arbiter in &data {
        let client = clone_listener(&listeners.client)?;
        let peer = clone_listener(&listeners.peer)?;
        let (handle, service, stopping) = (handle.clone(), service.clone(), stopping.clone());
        let fatal = fatal.clone();
        arbiter.spawn_fn(move || serve_ports(client, peer, handle, service, stopping, fatal));
    }
    if let Some(http) = listeners.http {
        let health =
            Arc::new(Health { handle: handle.clone(), readiness: readiness.clone(), fatal: fatal.clone() });
        let stopped = wait_for_stop(stopping.clone());
        control.spawn(async move {
            if let Err(error) = telemetry::http::serve(http, health, stopped).await {
                tracing::error!(%error, "serving health and metrics");
            }
        });
    }
    let assembly = Assembly {
        settings,
        handle: handle.clone(),
        fatal: fatal.clone(),
        pulses,
        incarnation,
        applicant,
        service,
        data_dir: data_dir.clone(),
        data: data.iter().map(Arbiter::handle).collect(),
        readiness: readiness_tx,
        running: running.clone(),
    };
    let failed = fatal.clone();
    let mut cancelled = stopping;
    control.spawn(async move {
        tokio::select! {
            result = assembly.run(stores) => {
                if let Err(error) = result {
                    failed.raise_error(error);
                }
            }
            _ = cancelled.wait_for(|stop| *stop) => {}
        }
    });
    Ok(RunningNode { handle, fatal, readiness, shutdown, data, control, running, data_dir, _watch: watch })
}

fn data_threads(settings: &Settings) -> usize {
    match settings.node.data_threads {
        0 => std::thread::available_parallelism().map_or(1, |cores| cores.get().saturating_sub(1).max(1)),
        threads => threads,
    }
}

fn clone_listener(listener: &TcpListener) -> Result<TcpListener, NodeError> {
    let clone = || {
        listener.set_nonblocking(true)?;
        listener.try_clone()
    };
    clone().map_err(|error| NodeError::Fatal(format!("sharing a listening socket between threads: {error}")))
}

async fn wait_for_stop(mut stopping: watch::Receiver<bool>) {
    if stopping.wait_for(|stop| *stop).await.is_err() {
        tracing::debug!("the node is gone, which is a stop too");
    }
}

fn serve_ports(
    client: TcpListener,
    peer: TcpListener,
    handle: NodeHandle,
    service: Arc<PeerService>,
    stopping: watch::Receiver<bool>,
    fatal: Fatal,
) {
    let listeners = tokio::net::TcpListener::from_std(client)
        .and_then(|c| Ok((c, tokio::net::TcpListener::from_std(peer)?)));
    match listeners {
        Ok((client, peer)) => {
            let (clients, peers) = (fatal.guard("the client port"), fatal.guard("the peer port"));
            let stopped = wait_for_stop(stopping.clone());
            actix::spawn(async move {
                let _guard = clients;
                rpc::serve(client, handle, stopped).await;
            });
            let service: Rc<dyn PeerHandler> = Rc::new(service);
            actix::spawn(async move {
                let _guard = peers;
                PeerListener::serve(peer, service, wait_for_stop(stopping)).await;
            });
        }
        Err(error) => fatal.raise(format!("listening on the node's ports: {error}")),
    }
}

struct Health {
    handle: NodeHandle,
    readiness: watch::Receiver<Readiness>,
    fatal: Fatal,
}

impl HealthView for Health {
    fn alive(&self) -> Result<(), String> {
        self.fatal.reason().map_or(Ok(()), Err)
    }

    fn ready(&self) -> Result<(), String> {
        match self.handle.phase() {
            NodePhase::Starting => Err("the node is not yet a member of a cluster".into()),
            NodePhase::Stopping => Err("the node is stopping".into()),
            NodePhase::Ready | NodePhase::ReadOnly => match &*self.readiness.borrow() {
                Readiness { closed: Some(why), .. } => Err(why.clone()),
                told if told.all_tried() => Ok(()),
                _ => Err("replicas are being opened".into()),
            },
        }
    }
}

/// What it takes to go from open stores to a member at work. Runs on the control arbiter.
struct Assembly {
    settings: Settings,
    handle: NodeHandle,
    fatal: Fatal,
    pulses: Pulses,
    incarnation: u64,
    applicant: Arc<Applicant>,
    service: Arc<PeerService>,
    data_dir: Arc<Mutex<DataDir>>,
    data: Vec<ArbiterHandle>,
    readiness: watch::Sender<Readiness>,
    running: Arc<Mutex<Option<Running>>>,
}

impl Assembly {
    async fn run(self, stores: Stores) -> Result<(), NodeError> {
        let fatal = self.fatal.clone();
        stores.engine.on_damage(Box::new(move |error| {
            let way_out = match error {
                StorageError::Damaged { .. } => {
                    "; start the node again: it sets this state aside, and gets another"
                }
                _ => "",
            };
            fatal.raise(format!("{error}{way_out}"));
        }));
        let returns = matches!(self.applicant.stage(), Membership::Member(..));
        let (cluster, node) = self.applicant.become_member().await?;
        tracing::info!(%cluster, %node, "member");
        let map = self.map_to_start_from(cluster, node, stores.log.clone(), stores.engine.clone()).await?;
        if returns {
            let hello = HelloConfig { cluster_id: Some(cluster), node, incarnation: self.incarnation };
            claims::settle(&self.applicant, &map, hello).await?;
        }
        let first_map = (map.version == 0).then(|| Arc::new(map.clone()));
        let router = Arc::new(Router::new(map));
        let incarnation = self.incarnation;
        let catalogue = stores.log.catalogue()?;
        let log: Arc<dyn LogStore> = stores.log;
        let fatal = self.fatal.clone();
        let (log_writer, mut threads) =
            (LogWriter::start(log.clone(), Box::new(move |reason| fatal.raise(reason))), Vec::new());
        let no_thread = |error: std::io::Error| NodeError::Fatal(format!("starting a thread: {error}"));
        let flusher = stores.flusher;
        #[cfg(feature = "test-hooks")]
        let flusher = super::hooks::hooked(flusher);
        let (flusher, thread) =
            FlushThread::start(flusher, self.fatal.clone(), self.pulses.flush.clone()).map_err(no_thread)?;
        threads.push(thread);
        let (reader, thread) = ReadThread::start(&self.fatal, self.pulses.read.clone()).map_err(no_thread)?;
        threads.push(thread);
        // The hubs come after the network that they send through.
        let hubs: Arc<OnceLock<Vec<Addr<Hub>>>> = Arc::default();
        let told = hubs.clone();
        let on_unreachable = move |node: NodeId| {
            for hub in told.get().into_iter().flatten() {
                hub.do_send(Unreachable(node));
            }
        };
        let mut config = PeerNetworkConfig::new(cluster, node, incarnation, Arc::new(on_unreachable));
        // The service holds the network in its turn, which would keep both for ever.
        let (told, service) = (hubs.clone(), Arc::downgrade(&self.service));
        config.on_gone = Arc::new(move |node, process| {
            // As long as a connection of its own is open it lives, whatever becomes of those to it. Without a service
            // this node is about to end.
            if service.upgrade().is_none_or(|service| service.hears(node, process)) {
                return;
            }
            for hub in told.get().into_iter().flatten() {
                hub.do_send(NodeGone { node, process });
            }
        });
        let refusals = removal::Refusals::default();
        config.on_refused = refusals.sink();
        let network = PeerNetwork::new(config);
        let intake = Arc::new(Intake::new(log_writer.queued_bytes()));
        let (flusher, fatal) = (Arc::new(flusher), self.fatal.clone());
        let (engine, dir) = (stores.engine.clone(), stores.snapshots);
        let bytes_per_second = self.settings.snapshot.bytes_per_second;
        let tools = worker::Tools { dir, engine, flusher: flusher.clone(), fatal, bytes_per_second };
        let origin = outgoing::Origin {
            cluster_id: cluster,
            node,
            incarnation,
            network: network.clone(),
            bytes_per_second,
        };
        let (snapshots, more) = Snapshots::start(tools, origin).map_err(no_thread)?;
        threads.extend(more);
        let shared = Arc::new(Shared {
            node,
            process: incarnation,
            sleep_ticks: self.settings.raft.sleep_ticks(),
            ended: Default::default(),
            log,
            log_writer,
            intake: intake.clone(),
            flusher,
            reader,
            snapshots,
            network,
            router: router.clone(),
            memory: MemoryGauge::new(
                usize::try_from(self.settings.storage.memtable_bytes).unwrap_or(usize::MAX),
            ),
            disk: self.handle.disk().clone(),
            draining: Default::default(),
            reluctance: Default::default(),
            cached_entries: Arc::default(),
            held_log: Arc::new(HeldLog::new(
                self.settings.storage.log_bytes.saturating_mul(limits::HELD_LOG_FACTOR),
            )),
        });

        let mut data_hubs = Vec::new();
        for arbiter in &self.data {
            let (shared, fatal) = (shared.clone(), self.fatal.clone());
            let beats = data_hubs.is_empty();
            data_hubs.push(Hub::start_in_arbiter(arbiter, move |_| match beats {
                true => Hub::new(shared, fatal).beating(),
                false => Hub::new(shared, fatal),
            }));
        }
        let control_hub = Hub::new(shared.clone(), self.fatal.clone()).start();
        let all_hubs: Vec<_> = data_hubs.iter().chain([&control_hub]).cloned().collect();
        if hubs.set(all_hubs.clone()).is_err() {
            unreachable!("hubs are made once");
        }
        let site = Site {
            node,
            incarnation,
            store_id: self.applicant.record().store_id,
            data_dir: self.data_dir.clone(),
            engine: stores.engine,
            retention: Retention::new(self.settings.storage.log_keep_bytes),
        };
        let mut readiness = self.readiness.subscribe();
        let supervisor = Supervisor::new(
            site,
            shared.clone(),
            data_hubs.clone(),
            control_hub.clone(),
            catalogue,
            self.readiness,
            self.fatal.clone(),
        )
        .start();

        let links = shared.clone();
        let guard = self.fatal.guard("the network");
        self.data[0].spawn(async move {
            let _guard = guard;
            links.network.run().await;
        });
        flush_what_holds_back(&shared, all_hubs);
        let refused = supervisor.clone();
        shared.log_writer.on_refused(Box::new(move |replica, incarnation, reason| {
            refused.do_send(EndReplica { replica, incarnation, reason });
        }));
        *self.running.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(Running { shared: shared.clone(), supervisor: supervisor.clone(), threads });
        self.service.set_destinations(Destinations {
            data_hubs,
            control_hub,
            intake,
            shared,
            supervisor: supervisor.clone(),
            disk: self.handle.disk().clone(),
        });
        self.handle.set_member(Member { node, incarnation, router, supervisor: supervisor.clone() });
        supervisor.do_send(OpenAll);
        actix::spawn(refusals.follow(cluster, self.handle.clone(), supervisor.clone()));
        let (handle, guard) = (self.handle.clone(), self.fatal.guard("the reconciler's shell"));
        actix::spawn(async move {
            let _guard = guard;
            reconciler::run(handle).await;
        });
        if let Some(map) = first_map.filter(|_| node == NodeId(1)) {
            actix::spawn(spread(map));
        }
        actix::spawn(keep_record(self.applicant.clone(), self.handle.clone(), supervisor));
        let (data_dir, reserve) = (self.settings.node.data_dir.clone(), self.settings.storage.reserve_bytes);
        actix::spawn(disk::watch(self.handle.disk().clone(), data_dir, reserve));
        actix::spawn(measure_disk(self.handle.clone(), self.settings.node.data_dir.clone()));
        if readiness.wait_for(Readiness::all_tried).await.is_ok() {
            self.handle.set_phase(NodePhase::Ready);
        }
        Ok(())
    }

    /// The cached map, or another that serves as well.
    async fn map_to_start_from(
        &self,
        cluster: ClusterId,
        node: NodeId,
        log: Arc<DiskLog>,
        engine: Arc<dyn Engine>,
    ) -> Result<ClusterMap, NodeError> {
        let cached = map_cache::load(&self.data_dir.lock().unwrap_or_else(PoisonError::into_inner), cluster);
        let why = match cached {
            Ok(map) => return Ok(map),
            Err(why) => why,
        };
        tracing::warn!(why, "the cached cluster map can't be used; looking for another");
        let own = NodeRecord { id: node, ..self.applicant.record().clone() };
        let read =
            tokio::task::spawn_blocking(move || map_cache::of_own_replica(&*log, &engine, cluster, own));
        match read.await.map_err(|error| error.to_string()).map(|map| map.map_err(|e| e.to_string())) {
            Ok(Ok(Some(map))) => return Ok(map),
            Ok(Ok(None)) => {}
            Ok(Err(error)) | Err(error) => {
                tracing::warn!(error, "the metadata replica here has no map either")
            }
        }
        self.applicant.map_of_a_peer(cluster).await.ok_or_else(|| {
            NodeError::Membership(format!(
                "the cached cluster map in {} can't be used: {why}; and the settings name no other node to ask for \
                 it. Name one in `cluster.join`, or copy its file `map` here",
                self.settings.node.data_dir.display()
            ))
        })
    }
}

/// Has the replicas flushed whose old log entries hold back the most space.
fn flush_what_holds_back(shared: &Arc<Shared>, hubs: Vec<Addr<Hub>>) {
    shared.log_writer.on_held_back(Box::new(move |replicas: Vec<ReplicaId>| {
        let batch = FreezeBatch(Arc::new(replicas));
        for hub in &hubs {
            hub.do_send(batch.clone());
        }
    }));
}

async fn measure_disk(handle: NodeHandle, path: std::path::PathBuf) {
    loop {
        let dir = path.clone();
        match tokio::task::spawn_blocking(move || bytes_under(&dir)).await {
            Ok(bytes) => {
                handle.set_disk_bytes(bytes);
                metrics::gauge!(names::DISK_BYTES).set(bytes as f64);
            }
            Err(error) => tracing::debug!(%error, "measuring the data directory"),
        }
        tokio::time::sleep(Duration::from_millis(limits::DISK_MEASURE_MS)).await;
    }
}

/// Bytes of the files under `path`; files that vanish meanwhile don't count.
fn bytes_under(path: &std::path::Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(path) else {
        return 0;
    };
    entries
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => bytes_under(&entry.path()),
            Ok(metadata) => metadata.len(),
            Err(_) => 0,
        })
        .sum()
}

impl RunningNode {
    /// The node as services see it.
    pub fn handle(&self) -> NodeHandle {
        self.handle.clone()
    }

    /// Waits until the node is a member and has opened every replica it held before, or has tried to.
    pub async fn ready(&self) -> Result<(), NodeError> {
        let mut readiness = self.readiness.clone();
        tokio::select! {
            error = self.fatal.raised() => Err(error),
            tried = readiness.wait_for(Readiness::all_tried) => match tried {
                Ok(_) => Ok(()),
                // What ended it is told a moment later.
                Err(_) => {
                    let moment = Duration::from_millis(limits::STATUS_MS_MAX);
                    let told = tokio::time::timeout(moment, self.fatal.raised()).await;
                    Err(told.unwrap_or_else(|_| NodeError::Fatal("the node ended before it was ready".into())))
                }
            },
        }
    }

    /// Waits until the node fails for good. Never returns while it runs.
    pub async fn failed(&self) -> NodeError {
        self.fatal.raised().await
    }

    /// Stops cleanly: accepts nothing more, hands leadership over, finishes or refuses what is in
    /// flight, closes the stores; within `deadline`, whatever the rest of the cluster does.
    pub async fn stop(self, deadline: Duration) -> Result<(), NodeError> {
        let end = Instant::now() + deadline;
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(running) = &running {
            hand_over(&running.supervisor, end).await;
        }
        // From here on nothing more is taken; what was taken before may still be committed by the next
        // leader, and its callers should hear so.
        self.handle.set_phase(NodePhase::Stopping);
        self.shutdown.send_replace(true);
        let patience = end.min(Instant::now() + Duration::from_millis(limits::IN_FLIGHT_MS_MAX));
        if tokio::time::timeout_at(patience.into(), self.handle.idle()).await.is_err() {
            tracing::info!("operations are still in flight; their outcome is unknown to their callers");
        }
        let mut threads = Vec::new();
        if let Some(running) = running {
            if tokio::time::timeout_at(end.into(), running.supervisor.send(StopAll)).await.is_err() {
                tracing::warn!("replicas didn't end in time");
            }
            // Connections get a moment to write what they were just answered.
            tokio::time::sleep(Duration::from_millis(limits::LAST_ANSWERS_MS)).await;
            running.shared.snapshots.close();
            running.shared.flusher.close();
            running.shared.network.set_peers(&[]);
            threads = running.threads;
            let shared = running.shared;
            threads.push(std::thread::spawn(move || shared.log_writer.stop()));
        }
        for arbiter in self.data.iter().chain([&self.control]) {
            arbiter.stop();
        }
        let arbiters: Vec<_> = self.data.into_iter().chain([self.control]).collect();
        let (done, joined) = oneshot::channel();
        let late = self.running;
        // Joining blocks; a thread that hangs must not keep the process.
        std::thread::spawn(move || {
            for arbiter in arbiters {
                if arbiter.join().is_err() {
                    tracing::error!("a thread of actors panicked");
                }
            }
            // The node may have become a member while it was told to stop: then its stores are open, and
            // the next start in this process would find them in use.
            let late = late.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(Running { shared, threads: more, .. }) = late {
                shared.snapshots.close();
                shared.flusher.close();
                shared.log_writer.stop();
                threads.extend(more);
            }
            for thread in threads {
                if thread.join().is_err() {
                    tracing::error!("a storage thread panicked");
                }
            }
            if done.send(()).is_err() {
                tracing::debug!("the node's threads ended after its deadline");
            }
        });
        let joined = tokio::time::timeout_at(end.into(), joined).await.is_ok();
        drop(self.data_dir);
        if joined {
            Ok(())
        } else {
            Err(NodeError::Fatal(format!("threads were still busy after {deadline:?}")))
        }
    }
}

/// Moves leadership away, as far as there is somebody in reach to take it.
async fn hand_over(supervisor: &Addr<Supervisor>, end: Instant) {
    let until = end.min(Instant::now() + Duration::from_millis(limits::HAND_OVER_MS_MAX));
    let mut least = usize::MAX;
    let mut progress = Instant::now();
    while Instant::now() < until {
        match tokio::time::timeout_at(until.into(), supervisor.send(HandOver)).await {
            Ok(Ok(0)) | Ok(Err(_)) | Err(_) => return,
            Ok(Ok(led)) if led < least => (least, progress) = (led, Instant::now()),
            // Nobody takes it: the others are down, or stopping as well.
            Ok(Ok(_)) if progress.elapsed() > Duration::from_millis(limits::HAND_OVER_MS_MAX / 3) => {
                return;
            }
            Ok(Ok(_)) => {}
        }
        tokio::time::sleep(Duration::from_millis(limits::META_RETRY_MS)).await;
    }
}
