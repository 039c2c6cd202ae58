//! What state costs: applying to a memtable, by itself and by the machine that reads the entry and keeps its session,
//! flushing one into sled and into fjall, and reading beside that.
//!
//! `cargo bench --bench storage`. The directory is made under `PONTOON_BENCH_DIR`, or else under
//! `target`: the temporary directory may lie in memory, where a sync costs nothing.

use std::hint::black_box;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use pontoon::ids::{Epoch, GROUP_START, Position, RandomId, ReplicaId};
use pontoon::machine::MachineKind;
use pontoon::machine::command::{Command, KvCommand};
use pontoon::machine::entry::{decode_entry, encode_entry};
use pontoon::machine::session::SessionTag;
use pontoon::storage::StateBatch;
use pontoon::storage::engine::Store as Engine;
use pontoon::storage::engine_kind::{EngineKind, StateOptions};
use pontoon::storage::flush::{FlushStep, Flusher};
use pontoon::storage::state::{ReplicaState, StateHeader};
use raft::eraftpb::ConfState;

const REPLICA: ReplicaId = ReplicaId(1);
const VALUE_BYTES: usize = 128;
/// Keys in the store.
const KEYS: u64 = 100_000;
/// Keys in a flush, spread over all.
const FLUSHED: u64 = 10_000;
/// Keys written by one entry.
const ENTRY_KEYS: u64 = 64;
/// How long a session lives.
const SESSION_MS: u32 = 600_000;

/// One replica's state on an engine, and who flushes it.
struct Store {
    engine: Arc<dyn Engine>,
    state: ReplicaState,
    flusher: Flusher,
    writes: u64,
}

impl Store {
    fn open(dir: &tempfile::TempDir, kind: EngineKind) -> Store {
        let options = StateOptions { engine: Some(kind), cache_bytes: 64 << 20, synchronous: true };
        let engine = kind.open(&dir.path().join("state"), options, RandomId([1; 16])).unwrap();
        let initial = StateHeader {
            applied: GROUP_START,
            revision: 0,
            log_time: 0,
            epoch: Epoch::default(),
            members: Vec::new(),
            conf_state: ConfState::default(),
        };
        let state = ReplicaState::open(engine.clone(), REPLICA, 1, initial).unwrap();
        let flusher = Flusher::open(dir.path().join("redo"), engine.clone()).unwrap();
        Store { engine, state, flusher, writes: 0 }
    }

    /// Applies an entry.
    fn apply(&mut self, value: &Bytes) {
        for _ in 0..ENTRY_KEYS {
            self.writes += 1;
            self.state.put(&key(self.writes), value.clone());
        }
        let index = self.state.header().applied.index + 1;
        self.state.set_applied(Position { index, term: GROUP_START.term });
    }

    /// The bytes of the entry that comes next, of puts of a session.
    fn entry(&mut self, value: &Bytes) -> Bytes {
        let first = self.writes + 1;
        self.writes += ENTRY_KEYS;
        let command = |sequence| {
            let tag = SessionTag {
                session: RandomId([1; 16]),
                sequence,
                acked_below: first,
                open: Some(SESSION_MS),
            };
            (Command::Kv(KvCommand::Put { key: key(sequence).into(), value: value.clone() }), Some(tag))
        };
        let commands: Vec<_> = (first..first + ENTRY_KEYS).map(command).collect();
        Bytes::from(encode_entry(&commands, 1))
    }

    /// Applies an entry as a replica does.
    fn apply_entry(&mut self, bytes: &Bytes) {
        let entry = decode_entry(bytes).unwrap();
        let replies = MachineKind::Kv.apply_entry(&entry, &mut self.state).unwrap();
        assert_eq!(black_box(replies).len(), ENTRY_KEYS as usize);
        let index = self.state.header().applied.index + 1;
        self.state.set_applied(Position { index, term: GROUP_START.term });
    }

    /// Makes what was applied durable.
    fn flush(&mut self) {
        let Some(frozen) = self.state.freeze() else { return };
        let index = frozen.header.applied.index;
        let state = &mut self.state;
        let mut absorbed = |step| {
            if step == FlushStep::Absorbed {
                state.release(index);
            }
        };
        self.flusher.flush(&[frozen], &mut absorbed).unwrap();
    }

    fn fill(&mut self, keys: u64) {
        let value = Bytes::from(vec![7; VALUE_BYTES]);
        for _ in 0..keys.div_ceil(ENTRY_KEYS) {
            self.apply(&value);
        }
    }
}

/// All keys, in an order that is none.
fn key(number: u64) -> Vec<u8> {
    format!("k{:015}", number * 7919 % KEYS).into_bytes()
}

/// Reads one key after the other.
fn read(reader: &pontoon::storage::state::StateReader, number: &mut u64) {
    *number += 1;
    assert!(black_box(reader.get(&key(*number))).unwrap().is_some());
}

fn state(criterion: &mut Criterion) {
    for kind in EngineKind::ALL {
        state_on(kind, criterion);
    }
}

fn state_on(kind: EngineKind, criterion: &mut Criterion) {
    let parent = std::env::var_os("PONTOON_BENCH_DIR")
        .map_or_else(|| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/target")), PathBuf::from);
    let dir = tempfile::tempdir_in(parent).unwrap();
    let mut store = Store::open(&dir, kind);
    store.fill(KEYS);
    store.flush();
    store.engine.sync().unwrap();

    let mut group = criterion.benchmark_group(format!("state on {kind}"));
    group.sample_size(20);
    let value = Bytes::from(vec![7; VALUE_BYTES]);
    group.throughput(Throughput::Elements(ENTRY_KEYS));
    group.bench_function(format!("apply an entry of {ENTRY_KEYS} puts"), |b| {
        b.iter(|| store.apply(&value));
    });
    store.flush();
    group.bench_function(format!("decode and apply an entry of {ENTRY_KEYS} puts of a session"), |b| {
        // The entry is made beforehand; one whose commands were applied already would be answered from memory.
        b.iter_custom(|rounds| {
            let mut spent = Duration::ZERO;
            for _ in 0..rounds {
                let entry = store.entry(&value);
                let begun = Instant::now();
                store.apply_entry(&entry);
                spent += begun.elapsed();
            }
            spent
        });
    });
    store.flush();
    group.throughput(Throughput::Elements(FLUSHED));
    group.bench_function(format!("apply and flush {FLUSHED} keys"), |b| {
        b.iter(|| {
            store.fill(FLUSHED);
            store.flush();
        });
    });

    group.throughput(Throughput::Elements(1));
    let (reader, mut number) = (store.state.reader(), 0);
    group.bench_function("read a key", |b| b.iter(|| read(&reader, &mut number)));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                store.fill(FLUSHED);
                store.flush();
            }
        });
        group.bench_function("read a key beside flushes", |b| b.iter(|| read(&reader, &mut number)));
        stop.store(true, Ordering::Relaxed);
    });
    group.finish();
}

criterion_group!(benches, state);
criterion_main!(benches);
