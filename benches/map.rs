//! What a change of the cluster map costs: reading it from the metadata shard's state, and what each node does
//! with it.
//!
//! `cargo bench --bench map`. The state lies on the engine of a new directory, under `PONTOON_BENCH_DIR` or else under `target`.

use std::hint::black_box;
use std::path::PathBuf;

use criterion::{Criterion, criterion_group, criterion_main};
use pontoon::ids::{
    Epoch, GROUP_START, METADATA_DATABASE, METADATA_SHARD, NodeId, Position, RandomId, ReplicaId, ShardId,
};
use pontoon::machine::command::{MetaCommand, MetaReply};
use pontoon::machine::meta;
use pontoon::node::map_cache;
use pontoon::placement::map::{ClusterMap, Member, MemberRole, MoveCause, NodeRecord, ShardRecord, Standing};
use pontoon::placement::plan::plan_database;
use pontoon::placement::ring::RingRange;
use pontoon::storage::engine_kind::{EngineKind, StateOptions};
use pontoon::storage::flush::{FlushStep, Flusher};
use pontoon::storage::state::{ReplicaState, StateHeader};
use raft::eraftpb::ConfState;

const NODES: u64 = 5;
const SHARDS: u32 = 4096;

/// The metadata shard's state.
struct Metadata {
    state: ReplicaState,
    /// Moves begun, or rolled back.
    steps: u64,
}

impl Metadata {
    fn new(dir: &tempfile::TempDir) -> Metadata {
        let options = StateOptions { engine: None, cache_bytes: 64 << 20, synchronous: true };
        let engine = EngineKind::DEFAULT.open(&dir.path().join("state"), options, RandomId([1; 16])).unwrap();
        let initial = StateHeader {
            applied: GROUP_START,
            revision: 0,
            log_time: 0,
            epoch: Epoch::default(),
            members: Vec::new(),
            conf_state: ConfState::default(),
        };
        let state = ReplicaState::open(engine.clone(), ReplicaId(1), 1, initial).unwrap();
        let mut metadata = Metadata { state, steps: 0 };
        metadata.apply(&formation());
        let shards = plan_database(&metadata.map(), "db", 3, SHARDS).unwrap();
        metadata.apply(&MetaCommand::CreateDatabase { name: "db".into(), replicas: 3, shards });
        let mut flusher = Flusher::open(dir.path().join("redo"), engine.clone()).unwrap();
        let frozen = metadata.state.freeze().unwrap();
        let index = frozen.header.applied.index;
        let mut absorbed = |step| {
            if step == FlushStep::Absorbed {
                metadata.state.release(index);
            }
        };
        flusher.flush(&[frozen], &mut absorbed).unwrap();
        engine.sync().unwrap();
        metadata
    }

    fn map(&self) -> ClusterMap {
        meta::cluster_map(&self.state).unwrap()
    }

    fn apply(&mut self, command: &MetaCommand) {
        let reply = meta::apply(command, &mut self.state).unwrap();
        assert!(!matches!(reply, MetaReply::Refused(_)), "{reply:?}");
        let index = self.state.header().applied.index + 1;
        self.state.set_applied(Position { index, term: GROUP_START.term });
    }

    /// One step of a rebalancing: a change of one shard's record.
    fn step(&mut self, map: &ClusterMap) {
        let shard = ShardId(self.steps / 3 % u64::from(SHARDS) + 1);
        let record = &map.shards[&shard];
        let id = record.moving.as_ref().map_or(0, |moving| moving.id);
        let free = (1..=NODES).map(NodeId).find(|node| record.member_on(*node).is_none());
        self.apply(&match self.steps % 3 {
            0 => MetaCommand::BeginMove {
                shard,
                conf: record.epoch.conf,
                adds: free.into_iter().collect(),
                removes: Vec::new(),
                cause: MoveCause::Repair,
            },
            1 => MetaCommand::CancelMove { shard, id },
            _ => MetaCommand::EndMove { shard, id },
        });
        self.steps += 1;
    }
}

fn formation() -> MetaCommand {
    let node = |id: u64| NodeRecord {
        id: NodeId(id),
        label: format!("n{id}"),
        client_address: format!("127.0.0.1:71{id:02}"),
        peer_address: format!("127.0.0.1:72{id:02}"),
        zone: String::new(),
        weight: 100,
        store_id: RandomId([id as u8; 16]),
        standing: Standing::Member,
        changed_at: 0,
    };
    let voter = |id: u64| Member { replica: ReplicaId(id), node: NodeId(id), role: MemberRole::Voter };
    MetaCommand::Form {
        cluster_id: RandomId([0xc1; 16]),
        nodes: (1..=NODES).map(node).collect(),
        metadata: Box::new(ShardRecord {
            id: METADATA_SHARD,
            database: METADATA_DATABASE,
            range: RingRange::ALL,
            epoch: Epoch { range: 1, conf: 1 },
            members: (1..=NODES).map(voter).collect(),
            dropped: false,
            moving: None,
            target: None,
            previous: None,
            changed_at: 0,
        }),
    }
}

fn map(criterion: &mut Criterion) {
    let parent = std::env::var_os("PONTOON_BENCH_DIR")
        .map_or_else(|| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/target")), PathBuf::from);
    let dir = tempfile::tempdir_in(parent).unwrap();
    let mut metadata = Metadata::new(&dir);
    let mut known = metadata.map();

    let mut group = criterion.benchmark_group(format!("map of {SHARDS} shards"));
    group.sample_size(20);
    group.bench_function("read it whole", |b| b.iter(|| black_box(metadata.map())));
    group.bench_function("change a shard, and bring the map up to date", |b| {
        b.iter(|| {
            metadata.step(&known);
            meta::refresh(&mut known, &metadata.state).unwrap();
        });
    });
    group.bench_function("clone", |b| b.iter(|| black_box(known.clone())));
    group.bench_function("find out what changed last", |b| {
        b.iter(|| black_box(known.delta(known.version - 1)))
    });
    group.bench_function("encode for the file", |b| b.iter(|| black_box(map_cache::encode(&known))));
    group.finish();
}

criterion_group!(benches, map);
criterion_main!(benches);
