//! What durability costs: writes of the raft log, each with its `fdatasync`.
//!
//! `cargo bench --bench log`. The directory is made under `PONTOON_BENCH_DIR`, or else under
//! `target`: the temporary directory may lie in memory, where a sync costs nothing.

use std::hint::black_box;
use std::path::PathBuf;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use pontoon::ids::{DatabaseId, Epoch, GROUP_START, Index, Position, RandomId, ReplicaId, ShardId};
use pontoon::machine::MachineKind;
use pontoon::placement::ring::RingRange;
use pontoon::storage::log::{LogStore, LogWrite, ReplicaPhase, ReplicaRecord};
use pontoon::storage::log_disk::{DiskLog, DiskLogOptions};
use raft::eraftpb::{Entry, HardState};

const GROUPS: u64 = 8;
const ENTRY_BYTES: usize = 150;
/// Entries that each group keeps; the rest is compacted, so that files are freed and used again.
const KEEP: Index = 20_000;

fn open(dir: &tempfile::TempDir) -> DiskLog {
    let options = DiskLogOptions { file_bytes: 32 << 20, purge_bytes: 256 << 20, spare_files: 3 };
    let log = DiskLog::open(&dir.path().join("log"), options, RandomId([1; 16])).unwrap();
    let records: Vec<ReplicaRecord> = (1..=GROUPS)
        .map(|replica| ReplicaRecord {
            replica: ReplicaId(replica),
            shard: ShardId(replica),
            database: DatabaseId(1),
            machine: MachineKind::Kv,
            phase: ReplicaPhase::Active,
            range: RingRange::ALL,
            epoch: Epoch::default(),
            members: Vec::new(),
            generation: 1,
        })
        .collect();
    log.create(&records).unwrap();
    log
}

/// Appends `entries` entries spread over the groups in one write.
fn append(log: &DiskLog, extents: &mut [[Index; GROUPS as usize]; 2], entries: u64) {
    let [truncated, last] = extents;
    let groups = entries.min(GROUPS);
    let mut writes = Vec::new();
    for group in 0..groups {
        let first = last[group as usize] + 1;
        let count = entries / groups;
        last[group as usize] += count;
        writes.push(LogWrite {
            replica: ReplicaId(group + 1),
            entries: (first..first + count)
                .map(|index| Entry {
                    index,
                    term: 6,
                    data: vec![7; ENTRY_BYTES].into(),
                    ..Default::default()
                })
                .collect(),
            hard_state: Some(HardState { term: 6, commit: first - 1, ..Default::default() }),
        });
    }
    log.write(black_box(&writes)).unwrap();
    for group in 0..groups {
        let [truncated, last] = [&mut truncated[group as usize], &mut last[group as usize]];
        if *last - *truncated > 2 * KEEP {
            *truncated = *last - KEEP;
            let to = Position { index: *truncated, term: 6 };
            log.compact(ReplicaId(group + 1), to).unwrap();
            log.purge().unwrap();
        }
    }
}

fn durable_append(criterion: &mut Criterion) {
    let parent = std::env::var_os("PONTOON_BENCH_DIR")
        .map_or_else(|| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/target")), PathBuf::from);
    let dir = tempfile::tempdir_in(parent).unwrap();
    let log = open(&dir);
    let mut extents = [[GROUP_START.index; GROUPS as usize]; 2];
    let mut group = criterion.benchmark_group("durable_append");
    for entries in [1, 64, 256] {
        group.throughput(Throughput::Elements(entries));
        group.bench_function(format!("{entries} entries"), |bencher| {
            bencher.iter(|| append(&log, &mut extents, entries));
        });
    }
    group.finish();
}

criterion_group!(benches, durable_append);
criterion_main!(benches);
