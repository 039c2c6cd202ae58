//! A supervisor and its hubs over stores in memory, for unit tests of the actors.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use actix::prelude::*;
use tokio::sync::watch;

use super::fatal::Fatal;
use super::flusher::FlushThread;
use super::handle::{ReplicaHealth, ReplicaReport};
use super::hub::{Hub, hub_of};
use super::intake::Intake;
use super::log_writer::LogWriter;
use super::memory::MemoryGauge;
use super::messages::Report;
use super::reader::ReadThread;
use super::replicas::Readiness;
use super::router::Router;
use super::shared::Shared;
use super::snapshots::{Snapshots, outgoing, worker};
use super::supervisor::{Site, StopAll, Supervisor};
use crate::group::catch_up::Retention;
use crate::group::held::HeldLog;
use crate::ids::{DatabaseId, Epoch, NodeId, RandomId, ReplicaId, ShardId};
use crate::machine::MachineKind;
use crate::placement::map::{ClusterMap, Member, MemberRole};
use crate::placement::ring::RingRange;
use crate::storage::engine::Engine;
use crate::storage::engine_memory::MemoryEngine;
use crate::storage::flush::Flusher;
use crate::storage::identity::DataDir;
use crate::storage::log::{LogStore, ReplicaPhase, ReplicaRecord};
use crate::storage::log_memory::MemoryLog;
use crate::storage::snapshot_dir::SnapshotDir;
use crate::transport::network::{PeerNetwork, PeerNetworkConfig};

const NODE: NodeId = NodeId(1);

/// For whatever should take a moment, on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A replica alone in its group, on this node.
pub fn record(number: u64) -> ReplicaRecord {
    ReplicaRecord {
        replica: ReplicaId(number),
        shard: ShardId(number),
        database: DatabaseId(1),
        machine: MachineKind::Kv,
        phase: ReplicaPhase::Active,
        range: RingRange::ALL,
        epoch: Epoch { range: 1, conf: 1 },
        members: vec![Member { replica: ReplicaId(number), node: NODE, role: MemberRole::Voter }],
        members_at: 0,
        ordered_at: 0,
        generation: 1,
    }
}

/// A node with replicas 1 and 2, each on a thread of its own; shard 1's is the second.
pub struct TestNode {
    pub supervisor: Addr<Supervisor>,
    pub shared: Arc<Shared>,
    pub engine: Arc<dyn Engine>,
    pub hubs: Vec<Addr<Hub>>,
    pub threads: [Arbiter; 2],
    /// It can't go on.
    pub fatal: Fatal,
}

impl TestNode {
    /// Nothing is opened yet.
    pub fn new(dir: &Path) -> TestNode {
        TestNode::made(dir, 0, 0)
    }

    /// The same; its replicas sleep when they have been idle for so many ticks.
    pub fn sleeping_after(dir: &Path, ticks: u64) -> TestNode {
        TestNode::made(dir, 0, ticks)
    }

    /// The same; the replicas were ordered at this version of the map.
    pub fn ordered_at(dir: &Path, ordered_at: u64) -> TestNode {
        TestNode::made(dir, ordered_at, 0)
    }

    fn made(dir: &Path, ordered_at: u64, sleep_ticks: u64) -> TestNode {
        let log: Arc<dyn LogStore> = Arc::new(MemoryLog::new());
        let catalogue = [1, 2].map(|number| ReplicaRecord { ordered_at, ..record(number) }).to_vec();
        log.create(&catalogue).expect("created");
        let engine: Arc<dyn Engine> = Arc::new(MemoryEngine::new());
        let fatal = Fatal::new();
        let raised = fatal.clone();
        let log_writer = LogWriter::start(log.clone(), Box::new(move |reason| raised.raise(reason)));
        let flusher = Flusher::open(dir.join("redo"), engine.clone()).expect("a flusher");
        let (flusher, _) = FlushThread::start(flusher, fatal.clone(), Default::default()).expect("a thread");
        let (reader, _) = ReadThread::start(&fatal, Default::default()).expect("a thread");
        let config = PeerNetworkConfig::new(RandomId([1; 16]), NODE, 1, Arc::new(|_: NodeId| ()));
        let flusher = Arc::new(flusher);
        let network = PeerNetwork::new(config);
        let snapshots = SnapshotDir::open(&dir.join("snapshots"), 1 << 20).expect("a directory");
        let tools = worker::Tools {
            dir: snapshots,
            engine: engine.clone(),
            flusher: flusher.clone(),
            fatal: fatal.clone(),
            bytes_per_second: 1 << 20,
        };
        let origin = outgoing::Origin {
            cluster_id: RandomId([1; 16]),
            node: NODE,
            incarnation: 1,
            network: network.clone(),
            bytes_per_second: 1 << 20,
        };
        let (snapshots, _) = Snapshots::start(tools, origin).expect("threads");
        let shared = Arc::new(Shared {
            node: NODE,
            process: 1,
            sleep_ticks,
            ended: Default::default(),
            snapshots,
            disk: Arc::default(),
            draining: Default::default(),
            reluctance: Default::default(),
            cached_entries: Arc::default(),
            held_log: Arc::new(HeldLog::new(u64::MAX)),
            log,
            intake: Arc::new(Intake::new(log_writer.queued_bytes())),
            log_writer,
            flusher,
            reader,
            network,
            router: Arc::new(Router::new(ClusterMap::default())),
            memory: MemoryGauge::new(1 << 20),
        });
        let threads = [Arbiter::new(), Arbiter::new()];
        let hub = |arbiter: &Arbiter| {
            let (shared, fatal) = (shared.clone(), fatal.clone());
            Hub::start_in_arbiter(&arbiter.handle(), move |_| Hub::new(shared, fatal))
        };
        let hubs: Vec<_> = threads.iter().map(hub).collect();
        let control_hub = Hub::new(shared.clone(), fatal.clone()).start();
        let data_dir = Arc::new(Mutex::new(DataDir::open(&dir.join("data")).expect("a directory")));
        let site = Site {
            node: NODE,
            incarnation: 1,
            store_id: RandomId([2; 16]),
            data_dir,
            engine: engine.clone(),
            // Nobody is missing from a group that doesn't sleep.
            retention: Retention::new(if sleep_ticks > 0 { 1 << 20 } else { 0 }),
        };
        let (readiness, _) = watch::channel(Readiness::default());
        let supervisor = Supervisor::new(
            site,
            shared.clone(),
            hubs.clone(),
            control_hub,
            catalogue,
            readiness,
            fatal.clone(),
        );
        TestNode { supervisor: supervisor.start(), shared, engine, hubs, threads, fatal }
    }

    /// The hub of a replica.
    pub fn hub(&self, replica: u64) -> &Addr<Hub> {
        &self.hubs[hub_of(ShardId(replica), self.hubs.len())]
    }

    /// What the supervisor tells of a replica.
    pub async fn report(&self, replica: u64) -> ReplicaReport {
        let reports = self.supervisor.send(Report).await.expect("a report");
        reports.replicas.into_iter().find(|r| r.replica == ReplicaId(replica)).expect("a replica")
    }

    /// Waits until a replica is as wanted.
    pub async fn until(
        &self,
        replica: u64,
        what: &str,
        wanted: impl Fn(&ReplicaReport) -> bool,
    ) -> ReplicaReport {
        let begun = Instant::now();
        loop {
            let report = self.report(replica).await;
            if wanted(&report) {
                return report;
            }
            assert!(begun.elapsed() < PATIENCE, "not {what} in time: {report:?}, {:?}", self.fatal.reason());
            actix::clock::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Waits until this start of a replica serves.
    pub async fn serves(&self, replica: u64, incarnation: u64) {
        let wanted = |r: &ReplicaReport| {
            r.health == ReplicaHealth::Serving
                && r.group.as_ref().is_some_and(|group| group.incarnation == incarnation)
        };
        self.until(replica, "serving", wanted).await;
    }

    /// Waits until these are the replicas that it holds.
    pub async fn holds(&self, replicas: &[u64]) {
        let begun = Instant::now();
        loop {
            let reports = self.supervisor.send(Report).await.expect("a report");
            let mut held: Vec<u64> = reports.replicas.iter().map(|report| report.replica.0).collect();
            held.sort_unstable();
            if held == replicas {
                return;
            }
            assert!(begun.elapsed() < PATIENCE, "{held:?}, not {replicas:?}");
            actix::clock::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Ends all replicas.
    pub async fn stop(self) {
        self.supervisor.send(StopAll).await.expect("stopped");
        assert_eq!(self.fatal.reason(), None);
    }

    /// What each replica's log begins after and ends with.
    pub fn logs(&self) -> BTreeMap<u64, (u64, u64)> {
        let state = |replica| self.shared.log.load(ReplicaId(replica)).expect("a log");
        (1..=2).map(|replica| (replica, (state(replica).truncated.index, state(replica).last))).collect()
    }
}
