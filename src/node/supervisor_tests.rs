//! The supervisor and its hubs over stores in memory.

use super::*;
use crate::ids::{DatabaseId, Epoch, RandomId};
use crate::machine::MachineKind;
use crate::node::flusher::FlushThread;
use crate::node::intake::Intake;
use crate::node::log_writer::LogWriter;
use crate::node::reader::ReadThread;
use crate::node::router::Router;
use crate::node::shared::MemoryGauge;
use crate::node::snapshots::{Snapshots, outgoing, worker};
use crate::placement::map::Member;
use crate::placement::map::MemberRole;
use crate::placement::ring::RingRange;
use crate::storage::engine_memory::MemoryEngine;
use crate::storage::flush::Flusher;
use crate::storage::log::LogStore;
use crate::storage::log::ReplicaPhase;
use crate::storage::log_memory::MemoryLog;
use crate::storage::snapshot_dir::SnapshotDir;
use crate::transport::network::{PeerNetwork, PeerNetworkConfig};

const NODE: NodeId = NodeId(1);

/// A replica alone in its group, on this node.
fn record(number: u64) -> ReplicaRecord {
    ReplicaRecord {
        replica: ReplicaId(number),
        shard: ShardId(number),
        database: DatabaseId(1),
        machine: MachineKind::Kv,
        phase: ReplicaPhase::Active,
        range: RingRange::ALL,
        epoch: Epoch { range: 1, conf: 1 },
        members: vec![Member { replica: ReplicaId(number), node: NODE, role: MemberRole::Voter }],
        generation: 1,
    }
}

/// A supervisor of two replicas, each on a thread of its own; shard 1's is the second.
fn supervised(dir: &std::path::Path, threads: &[Arbiter; 2]) -> Addr<Supervisor> {
    let log: Arc<dyn LogStore> = Arc::new(MemoryLog::new());
    let catalogue = vec![record(1), record(2)];
    log.create(&catalogue).expect("created");
    let engine: Arc<dyn Engine> = Arc::new(MemoryEngine::new());
    let fatal = Fatal::new();
    let log_writer = LogWriter::start(log.clone(), Box::new(|reason| panic!("{reason}")));
    let flusher = Flusher::open(dir.join("redo"), engine.clone()).expect("a flusher");
    let (flusher, _) = FlushThread::start(flusher, fatal.clone()).expect("a thread");
    let (reader, _) = ReadThread::start(&fatal).expect("a thread");
    let config = PeerNetworkConfig::new(RandomId([1; 16]), NODE, 1, Arc::new(|_: NodeId| ()));
    let flusher = Arc::new(flusher);
    let network = PeerNetwork::new(config);
    let snapshots = SnapshotDir::open(&dir.join("snapshots"), 1 << 20).expect("a directory");
    let tools = worker::Tools {
        dir: snapshots,
        engine: engine.clone(),
        flusher: flusher.clone(),
        fatal: fatal.clone(),
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
        snapshots,
        disk: Arc::default(),
        cached_entries: Arc::default(),
        log,
        intake: Arc::new(Intake::new(log_writer.queued_bytes())),
        log_writer,
        flusher,
        reader,
        network,
        router: Arc::new(Router::new(ClusterMap::default())),
        memory: MemoryGauge::new(1 << 20),
    });
    let hub = |arbiter: &Arbiter| {
        let (shared, fatal) = (shared.clone(), fatal.clone());
        Hub::start_in_arbiter(&arbiter.handle(), move |_| Hub::new(shared, fatal))
    };
    let data_hubs = threads.iter().map(hub).collect();
    let control_hub = Hub::new(shared.clone(), fatal.clone()).start();
    let data_dir = Arc::new(Mutex::new(DataDir::open(&dir.join("data")).expect("a directory")));
    let retention = Retention::new(0);
    let site = Site { node: NODE, incarnation: 1, data_dir, engine, retention };
    let (readiness, _) = watch::channel(Readiness::default());
    Supervisor::new(site, shared, data_hubs, control_hub, catalogue, readiness, fatal).start()
}

/// The log may refuse a write of a replica while others of its node are still on their way up.
#[actix::test]
async fn a_replica_that_must_end_while_others_start_ends() {
    let dir = tempfile::tempdir().expect("a directory");
    let threads = [Arbiter::new(), Arbiter::new()];
    let supervisor = supervised(dir.path(), &threads);
    // The thread of replica 2 is busy: replica 1 runs long before both do.
    let (release, held) = std::sync::mpsc::channel::<()>();
    threads[0].spawn_fn(move || {
        held.recv().ok();
    });
    supervisor.do_send(OpenAll);
    let restarts = async |replica: u64| {
        let reports = supervisor.send(Report).await.expect("a report");
        let report = reports.into_iter().find(|r| r.replica == ReplicaId(replica)).expect("a replica");
        report.restarts
    };
    let begun = Instant::now();
    while restarts(1).await == 0 {
        let reason = "a write that contradicts the log".to_owned();
        supervisor.do_send(EndReplica { replica: ReplicaId(1), incarnation: 1, reason });
        assert!(begun.elapsed() < Duration::from_secs(20), "it goes on, though nothing it writes is kept");
        actix::clock::sleep(Duration::from_millis(20)).await;
    }
    release.send(()).expect("the thread waits");
    // And it is there again, with the other.
    loop {
        let reports = supervisor.send(Report).await.expect("a report");
        if reports.iter().all(|r| r.health == ReplicaHealth::Serving && r.group.is_some()) {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "{reports:?}");
        actix::clock::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!((restarts(1).await, restarts(2).await), (1, 0));
    supervisor.send(StopAll).await.expect("stopped");
}
