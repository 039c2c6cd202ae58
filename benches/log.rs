//! What durability costs: writes of the raft log, each with its `fdatasync`.
//!
//! `cargo bench --bench log`. The directory is made under `PONTOON_BENCH_DIR`, or else under
//! `target`: the temporary directory may lie in memory, where a sync costs nothing.

use std::hint::black_box;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use pontoon::ids::{DatabaseId, Epoch, GROUP_START, Index, NodeId, Position, RandomId, ReplicaId, ShardId};
use pontoon::machine::MachineKind;
use pontoon::placement::map::{Member, MemberRole};
use pontoon::placement::ring::RingRange;
use pontoon::storage::log::{LogStore, LogWrite, ReplicaPhase, ReplicaRecord};
use pontoon::storage::log_disk::{DiskLog, DiskLogOptions};
use raft::eraftpb::{Entry, HardState};
use raft_engine::{Config, Engine, LogBatch, MessageExt, ReadableSize};

const GROUPS: u64 = 8;
const ENTRY_BYTES: usize = 150;
/// Entries that each group keeps; the rest is compacted, so that files are freed and used again.
const KEEP: Index = 20_000;

const OPTIONS: DiskLogOptions =
    DiskLogOptions { file_bytes: 32 << 20, purge_bytes: 256 << 20, spare_files: 3 };

fn open(dir: &tempfile::TempDir) -> DiskLog {
    let log = DiskLog::open(&dir.path().join("log"), OPTIONS, RandomId([1; 16])).unwrap();
    let records: Vec<ReplicaRecord> = (1..=GROUPS)
        .map(|replica| ReplicaRecord {
            replica: ReplicaId(replica),
            shard: ShardId(replica),
            database: DatabaseId(1),
            machine: MachineKind::Kv,
            phase: ReplicaPhase::Active,
            range: RingRange::ALL,
            epoch: Epoch::default(),
            members: vec![Member { replica: ReplicaId(replica), node: NodeId(1), role: MemberRole::Voter }],
            members_at: 0,
            ordered_at: 0,
            generation: 1,
        })
        .collect();
    log.create(&records).unwrap();
    log
}

/// The engine alone, as the log sets it up.
fn bare(dir: &std::path::Path) -> Engine {
    let config = Config {
        dir: dir.to_str().unwrap().into(),
        batch_compression_threshold: ReadableSize(0),
        target_file_size: ReadableSize(OPTIONS.file_bytes),
        purge_threshold: ReadableSize(OPTIONS.purge_bytes),
        prefill_for_recycle: true,
        prefill_limit: Some(ReadableSize(2 * OPTIONS.file_bytes)),
        ..Config::default()
    };
    Engine::open(config).unwrap()
}

struct RaftEntries;

impl MessageExt for RaftEntries {
    type Entry = Entry;

    fn index(entry: &Entry) -> u64 {
        entry.index
    }
}

/// What the log adds to the engine alone: the checks, the record in each batch, the mark behind it. One
/// write of either after one of the other, so that both meet the same disk.
fn beside_the_engine(_: &mut Criterion) {
    let rounds = if std::env::args().any(|arg| arg == "--bench") { 4_000 } else { 10 };
    let (log_dir, bare_dir) = (dir(), dir());
    let (log, engine) = (open(&log_dir), bare(&bare_dir.path().join("log")));
    for entries in [1, 64] {
        let mut times: [Vec<Duration>; 2] = Default::default();
        for round in 0..rounds {
            let first = log.load(ReplicaId(1)).unwrap().last + 1;
            let hard_state = HardState { term: 6, commit: first - 1, ..Default::default() };
            let write = LogWrite {
                replica: ReplicaId(1),
                entries: (first..first + entries).map(entry).collect(),
                hard_state: Some(hard_state.clone()),
                membership: None,
            };
            let mut batch = LogBatch::with_capacity(2);
            let begun = Instant::now();
            batch.add_entries::<RaftEntries>(1, &write.entries).unwrap();
            batch.put_message(1, b"h".to_vec(), &hard_state).unwrap();
            engine.write(&mut batch, true).unwrap();
            times[0].push(begun.elapsed());
            let begun = Instant::now();
            log.write(std::slice::from_ref(&write)).unwrap();
            times[1].push(begun.elapsed());
            if round % 1_000 == 999 {
                std::thread::sleep(Duration::from_millis(50));
            }
        }
        let [bare, ours] = times.map(|mut times| {
            times.sort_unstable();
            let mean = times.iter().sum::<Duration>() / times.len() as u32;
            (times[times.len() / 2], mean)
        });
        println!(
            "{entries} entries per write: median {:?}, of the engine alone {:?}, ratio {:.3}; mean {:?}, {:?}, ratio {:.3}",
            ours.0,
            bare.0,
            ours.0.as_secs_f64() / bare.0.as_secs_f64(),
            ours.1,
            bare.1,
            ours.1.as_secs_f64() / bare.1.as_secs_f64(),
        );
    }
    drop((log, engine));
    let begun = Instant::now();
    drop(bare(&log_dir.path().join("log")));
    let bare = begun.elapsed();
    let begun = Instant::now();
    let log = open(&log_dir);
    println!("opening {} MB: {:?}, the engine alone {bare:?}", log.disk_bytes() >> 20, begun.elapsed());
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
            entries: (first..first + count).map(entry).collect(),
            hard_state: Some(HardState { term: 6, commit: first - 1, ..Default::default() }),
            membership: None,
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

fn entry(index: Index) -> Entry {
    Entry { index, term: 6, data: vec![7; ENTRY_BYTES].into(), ..Default::default() }
}

fn dir() -> tempfile::TempDir {
    let parent = std::env::var_os("PONTOON_BENCH_DIR")
        .map_or_else(|| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/target")), PathBuf::from);
    tempfile::tempdir_in(parent).unwrap()
}

fn durable_append(criterion: &mut Criterion) {
    let dir = dir();
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

criterion_group!(benches, beside_the_engine, durable_append);
criterion_main!(benches);
