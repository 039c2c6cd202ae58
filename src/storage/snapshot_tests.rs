//! Tests of [`super`]: a snapshot is the state at one index, whatever is flushed while it is made; what
//! is loaded is that state, whatever crash cuts it short.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, mpsc};

use proptest::prelude::*;

use super::*;
use crate::ids::{DatabaseId, Epoch, GROUP_START, NodeId, Position, RandomId, ShardId};
use crate::machine::MachineKind;
use crate::placement::map::{Member, MemberRole};
use crate::placement::ring::RingRange;
use crate::storage::engine_kind::{EngineKind, StateOptions};
use crate::storage::engine_memory::{CrashLoss, MemoryEngine};
use crate::storage::flush::{FlushPoint, Flusher};
use crate::storage::log::{Install, LogStore, LogWrite, ReplicaPhase, ReplicaRecord};
use crate::storage::log_memory::{FailedWrite, MemoryLog};
use crate::storage::snapshot_dir::SnapshotDir;
use crate::storage::state::ReplicaState;
use crate::storage::state::tests::initial;
use crate::storage::{StateBatch, StateView};

const MAKER: ReplicaId = ReplicaId(4);
const NEIGHBOUR: ReplicaId = ReplicaId(5);
const RECEIVER: ReplicaId = ReplicaId(6);
const GENERATION: u32 = 3;
const ORIGIN: Origin = Origin { stream: RandomId([1; 16]), shard: ShardId(2), replica: MAKER };

type Pairs = BTreeMap<Vec<u8>, Bytes>;

fn pairs(state: &ReplicaState) -> Pairs {
    let mut pairs = Pairs::new();
    state
        .scan(Bound::Unbounded, &mut |key, value| {
            pairs.insert(key.to_vec(), value.clone());
            true
        })
        .unwrap();
    pairs
}

fn open_state(engine: &Arc<dyn Engine>, replica: ReplicaId, generation: u32) -> ReplicaState {
    ReplicaState::open(engine.clone(), replica, generation, initial()).unwrap()
}

/// A small generator, so that a case is its seed.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 20) % bound
    }
}

/// A node with two replicas that are written to and flushed.
struct Node {
    _home: tempfile::TempDir,
    dir: SnapshotDir,
    engine: Arc<dyn Engine>,
    flusher: Flusher,
    states: [ReplicaState; 2],
    /// What the maker's state was at each flush.
    flushed: BTreeMap<Index, Pairs>,
    dice: Dice,
}

impl Node {
    fn new(engine: Arc<dyn Engine>, seed: u64) -> Node {
        let home = tempfile::tempdir().unwrap();
        let flusher = Flusher::open(home.path().join("redo"), engine.clone()).unwrap();
        let dir = SnapshotDir::open(&home.path().join("snapshots"), u64::MAX).unwrap();
        let states = [open_state(&engine, MAKER, GENERATION), open_state(&engine, NEIGHBOUR, GENERATION)];
        let dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        Node { _home: home, dir, engine, flusher, states, flushed: BTreeMap::new(), dice }
    }

    /// Applies an entry of a few writes and removals to one of the replicas.
    fn apply(&mut self, replica: usize, writes: u64, value_bytes: u64) {
        let state = &mut self.states[replica];
        let Position { index, term } = state.header().applied;
        for _ in 0..writes {
            let key = (self.dice.below(600) as u16).to_be_bytes();
            if self.dice.below(4) == 0 {
                state.delete(&key);
            } else {
                state.next_revision();
                let fill = self.dice.below(256) as u8;
                let len = 1 + self.dice.below(value_bytes) as usize;
                state.put(&key, vec![fill; len].into());
            }
        }
        state.set_applied(Position { index: index + 1, term });
    }

    fn flush(&mut self) {
        let tables: Vec<_> = self.states.iter_mut().filter_map(ReplicaState::freeze).collect();
        let state = &self.states[0];
        self.flushed.insert(state.header().applied.index, pairs(state));
        self.flusher.flush(&tables, &mut |_| {}).unwrap();
        for state in &mut self.states {
            state.release(state.header().applied.index);
        }
    }

    fn builder(&mut self) -> SnapshotBuilder {
        let link_dir = self.dir.link_dir().to_owned();
        let collection = self.flusher.begin_collection(MAKER, GENERATION, &link_dir).unwrap().unwrap();
        let path = self.dir.made_path(MAKER, ORIGIN.stream);
        SnapshotBuilder::create(path, u64::MAX, ORIGIN, self.engine.clone(), collection).unwrap()
    }

    fn files(&self) -> usize {
        std::fs::read_dir(self.dir.link_dir()).unwrap().count()
    }
}

/// Ends the collection and completes the file.
fn complete(flusher: &mut Flusher, builder: &mut SnapshotBuilder) -> SnapshotFile {
    let collected = flusher.end_collection(builder.collection()).unwrap();
    builder.lay_over(collected).unwrap();
    loop {
        if let BuildStep::Complete(file) = builder.step(1).unwrap() {
            return file;
        }
    }
}

fn load(
    file: &SnapshotFile,
    engine: &Arc<dyn Engine>,
    replica: ReplicaId,
    generation: u32,
) -> Result<(), StorageError> {
    let mut loader = SnapshotLoader::open(file.clone(), engine.clone(), replica, generation)?;
    while !loader.step(1000)? {}
    assert!(loader.step(1000)?, "complete is complete");
    Ok(())
}

/// The file is the maker's state at the index that it names.
fn check(node: &Node, file: &SnapshotFile) {
    assert_eq!(*file, SnapshotFile::verify(&file.path).unwrap());
    assert_eq!(*file, SnapshotFile::look(&file.path).unwrap());
    let engine: Arc<dyn Engine> = Arc::new(MemoryEngine::new());
    load(file, &engine, RECEIVER, 1).unwrap();
    let state = open_state(&engine, RECEIVER, 1);
    assert_eq!(state.header(), &file.summary.header);
    let expected = &node.flushed[&file.summary.header.applied.index];
    assert!(pairs(&state) == *expected, "not the state at {:?}", file.summary.header.applied);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Steps of the scan fall between flushes, and between the batches of a flush; flushes fall before,
    /// within and after the scan, and after the collection too.
    #[test]
    fn a_snapshot_is_exact_wherever_flushes_fall(seed in any::<u64>(), page in 1..2000usize) {
        let mut node = Node::new(Arc::new(MemoryEngine::new()), seed);
        for _ in 0..3 {
            node.apply(0, 400, 20);
            node.apply(1, 400, 20);
        }
        node.flush();
        let base = node.states[0].header().applied.index;
        let builder = Arc::new(Mutex::new(node.builder()));
        let (stepped, mut dice) = (builder.clone(), Dice(seed | 1));
        node.flusher.set_hook(Box::new(move |_| {
            for _ in 0..dice.below(4) {
                stepped.lock().unwrap().step(page)?;
            }
            Ok(())
        }));
        let mut scanned = false;
        while !scanned || node.dice.below(3) != 0 {
            match node.dice.below(4) {
                0 => {
                    let writes = node.dice.below(700);
                    let replica = node.dice.below(2) as usize;
                    node.apply(replica, writes, 20);
                    node.flush();
                }
                _ => scanned = matches!(builder.lock().unwrap().step(page).unwrap(), BuildStep::Scanned),
            }
        }
        node.flusher.set_hook(Box::new(|_| Ok(())));
        let ended = node.states[0].header().applied.index;
        let collected = node.flusher.end_collection(builder.lock().unwrap().collection()).unwrap();
        builder.lock().unwrap().lay_over(collected).unwrap();
        node.apply(0, 500, 20);
        node.flush();
        let file = loop {
            if let BuildStep::Complete(file) = builder.lock().unwrap().step(page).unwrap() {
                break file;
            }
        };
        prop_assert!(base <= file.summary.header.applied.index);
        prop_assert_eq!(file.summary.header.applied.index, ended);
        check(&node, &file);
        drop(builder);
        prop_assert_eq!(node.files(), 1, "the kept redo files are gone");
    }
}

/// The same on each engine of a disk, in threads, with values that sled has in many chunks.
#[test]
fn a_snapshot_is_exact_beside_a_writer_on_disk() {
    for kind in EngineKind::ALL {
        exact_beside_a_writer(kind);
    }
}

fn exact_beside_a_writer(kind: EngineKind) {
    let home = tempfile::tempdir().unwrap();
    let options = StateOptions { engine: Some(kind), cache_bytes: 1 << 20, synchronous: false };
    let engine = kind.open(&home.path().join("state"), options, RandomId([2; 16])).unwrap();
    let mut node = Node::new(engine, 7);
    for _ in 0..20 {
        node.apply(0, 60, 9000);
    }
    node.flush();
    for _ in 0..3 {
        let mut builder = node.builder();
        let before = node.flushed.len();
        let scanned = AtomicBool::new(false);
        let (turns, turn) = mpsc::channel();
        std::thread::scope(|scope| {
            let (builder, scanned) = (&mut builder, &scanned);
            let scan = scope.spawn(move || {
                // As much at a time as a flush takes, so that each has a part of the scan beside it.
                while turn.recv().is_ok() {
                    let mut steps = (0..60).map(|_| builder.step(4000).unwrap());
                    if steps.any(|step| matches!(step, BuildStep::Scanned)) {
                        scanned.store(true, Ordering::SeqCst);
                        return;
                    }
                }
            });
            while !scanned.load(Ordering::SeqCst) {
                node.apply(0, 60, 9000);
                node.apply(1, 60, 9000);
                // Nobody listens once the scan is complete.
                let _ = turns.send(());
                node.flush();
            }
            drop(turns);
            scan.join().unwrap();
        });
        let beside = node.flushed.len() - before;
        assert!(beside > 3, "only {beside} flushes beside the scan");
        let file = complete(&mut node.flusher, &mut builder);
        check(&node, &file);
        node.dir.remove(&file).unwrap();
    }
}

#[test]
fn every_kind_of_record_travels() {
    let mut node = Node::new(Arc::new(MemoryEngine::new()), 1);
    node.apply(0, 10, 5);
    node.flush();
    let other = |replica, generation| keys::from_local(replica, generation, &[7, b'x']);
    node.engine.write(&[(other(MAKER, GENERATION), Some("of a later kind".into()))]).unwrap();
    let mut builder = node.builder();
    while !matches!(builder.step(1).unwrap(), BuildStep::Scanned) {}
    let file = complete(&mut node.flusher, &mut builder);
    load(&file, &node.engine, RECEIVER, 9).unwrap();
    assert_eq!(node.engine.get(&other(RECEIVER, 9)).unwrap().unwrap(), "of a later kind");
}

#[test]
fn a_flush_that_is_missing_is_seen() {
    for missing in 0..3 {
        let mut node = Node::new(Arc::new(MemoryEngine::new()), 1);
        node.apply(0, 10, 5);
        node.flush();
        let mut builder = node.builder();
        while !matches!(builder.step(1).unwrap(), BuildStep::Scanned) {}
        for _ in 0..3 {
            node.apply(0, 10, 5);
            node.flush();
        }
        let mut collected = node.flusher.end_collection(builder.collection()).unwrap();
        collected.files.links.remove(missing);
        builder.lay_over(collected).unwrap();
        let last = loop {
            match builder.step(1) {
                Ok(BuildStep::More) => {}
                last => break last,
            }
        };
        let error = last.unwrap_err();
        assert!(error.to_string().contains("has reached"), "without file {missing}: {error}");
    }
}

#[test]
fn what_is_given_up_leaves_nothing() {
    let mut node = Node::new(Arc::new(MemoryEngine::new()), 1);
    let link_dir = node.dir.link_dir().to_owned();
    assert!(
        node.flusher.begin_collection(MAKER, GENERATION, &link_dir).unwrap().is_none(),
        "nothing was ever flushed"
    );
    node.apply(0, 10, 5);
    node.flush();
    let mut builder = node.builder();
    while !matches!(builder.step(1).unwrap(), BuildStep::Scanned) {}
    let mut other = node.builder();
    other.step(1).unwrap();
    node.apply(1, 10, 5);
    node.flush();
    assert_eq!(node.files(), 1, "an unfinished file, and no flush that doesn't concern it");
    node.apply(0, 10, 5);
    node.flush();
    assert_eq!(node.files(), 3);
    drop(other);
    node.apply(0, 10, 5);
    node.flush();
    assert!(node.files() <= 3, "nobody collects for the one that was dropped");
    drop(node.flusher.end_collection(builder.collection()).unwrap());
    assert!(node.flusher.end_collection(builder.collection()).is_err(), "it has ended");
    drop(builder);
    assert_eq!(node.files(), 0);
}

#[test]
fn the_removal_of_the_replica_ends_its_snapshot() {
    let mut node = Node::new(Arc::new(MemoryEngine::new()), 1);
    node.apply(0, 10, 5);
    node.flush();
    let builder = node.builder();
    node.apply(0, 10, 5);
    node.flush();
    node.flusher.destroy(&[MAKER]).unwrap();
    let error = node.flusher.end_collection(builder.collection()).unwrap_err();
    assert!(error.to_string().contains("removed"), "{error}");
    drop(builder);
    assert_eq!(node.files(), 0);
}

/// The maker installs a snapshot itself, and what it has read from goes.
#[test]
fn the_removal_of_the_generation_ends_its_snapshot() {
    let mut node = Node::new(Arc::new(MemoryEngine::new()), 1);
    node.apply(0, 500, 5);
    node.flush();
    let mut builder = node.builder();
    builder.step(100).unwrap();
    assert!(!generations::destroy(&*node.engine, MAKER, GENERATION, &mut Vec::new(), 10).unwrap());
    while !matches!(builder.step(1000).unwrap(), BuildStep::Scanned) {}
    let error = node.flusher.end_collection(builder.collection()).unwrap_err();
    assert!(error.to_string().contains("destroyed"), "{error}");
}

#[test]
fn a_snapshot_beyond_its_bound_is_given_up() {
    let mut node = Node::new(Arc::new(MemoryEngine::new()), 1);
    node.apply(0, 500, 4000);
    node.flush();
    let link_dir = node.dir.link_dir().to_owned();
    let collection = node.flusher.begin_collection(MAKER, GENERATION, &link_dir).unwrap().unwrap();
    let path = node.dir.made_path(MAKER, ORIGIN.stream);
    let mut builder =
        SnapshotBuilder::create(path, 400_000, ORIGIN, node.engine.clone(), collection).unwrap();
    let error = loop {
        match builder.step(50_000) {
            Ok(BuildStep::More) => {}
            Ok(other) => panic!("{other:?}"),
            Err(error) => break error,
        }
    };
    assert!(error.to_string().contains("limit"), "{error}");
    assert!(builder.step(1).is_err(), "it has failed for good");
    drop(builder);
    assert_eq!(node.files(), 0);
}

fn sample(node: &mut Node) -> SnapshotFile {
    for _ in 0..4 {
        node.apply(0, 500, 20);
    }
    node.flush();
    let mut builder = node.builder();
    while !matches!(builder.step(1000).unwrap(), BuildStep::Scanned) {
        if node.dice.below(4) == 0 {
            node.apply(0, 100, 20);
            node.flush();
        }
    }
    complete(&mut node.flusher, &mut builder)
}

#[test]
fn nothing_is_loaded_over_anything_or_from_a_file_that_changed() {
    let mut node = Node::new(Arc::new(MemoryEngine::new()), 3);
    let file = sample(&mut node);
    load(&file, &node.engine, MAKER, GENERATION).unwrap_err();
    load(&file, &node.engine, MAKER, GENERATION + 1).unwrap();
    let again = load(&file, &node.engine, MAKER, GENERATION + 1).unwrap_err();
    assert!(again.to_string().contains("isn't empty"), "{again}");

    let bytes = std::fs::read(&file.path).unwrap();
    let engine: Arc<dyn Engine> = Arc::new(MemoryEngine::new());
    for place in (0..bytes.len()).step_by(997).chain([bytes.len() - 9, bytes.len() - 1]) {
        let mut damaged = bytes.clone();
        damaged[place] ^= 4;
        std::fs::write(&file.path, &damaged).unwrap();
        assert!(SnapshotFile::verify(&file.path).is_err(), "flipped at {place}");
        assert!(load(&file, &engine, RECEIVER, 1).is_err(), "flipped at {place}");
        assert!(engine.get(&keys::header_key(RECEIVER, 1)).unwrap().is_none(), "flipped at {place}");
        let mut from = Vec::new();
        while !generations::destroy(&*engine, RECEIVER, 1, &mut from, 100).unwrap() {}
    }
    // A whole file, but another one.
    let mut other = Node::new(Arc::new(MemoryEngine::new()), 4);
    std::fs::copy(sample(&mut other).path, &file.path).unwrap();
    let error = load(&file, &engine, RECEIVER, 1).unwrap_err();
    assert!(error.to_string().contains("has changed"), "{error}");
}

fn record() -> ReplicaRecord {
    ReplicaRecord {
        replica: RECEIVER,
        shard: ORIGIN.shard,
        database: DatabaseId(1),
        machine: MachineKind::Kv,
        phase: ReplicaPhase::Active,
        range: RingRange::ALL,
        epoch: Epoch::default(),
        members: vec![Member { replica: RECEIVER, node: NodeId(1), role: MemberRole::Voter }],
        members_at: 0,
        ordered_at: 0,
        generation: 0,
    }
}

/// Loads, installs and removes the old state; a crash comes at the step `stop`. False if there are
/// fewer steps.
fn install(engine: &Arc<dyn Engine>, log: &dyn LogStore, file: &SnapshotFile, stop: usize) -> bool {
    let mut left = stop;
    let mut stopped = || {
        left = left.wrapping_sub(1);
        left == usize::MAX
    };
    let mut loader = SnapshotLoader::open(file.clone(), engine.clone(), RECEIVER, 1).unwrap();
    loop {
        if stopped() {
            return true;
        }
        if loader.step(3000).unwrap() {
            break;
        }
    }
    if stopped() {
        return true;
    }
    let header = &file.summary.header;
    let install = Install {
        generation: 1,
        position: header.applied,
        leader_term: header.applied.term,
        epoch: header.epoch,
        members: header.members.clone(),
        state_lost: false,
    };
    if log.install(RECEIVER, &install).is_err() {
        return true;
    }
    loop {
        if stopped() {
            return true;
        }
        if generations::destroy(&**engine, RECEIVER, 0, &mut Vec::new(), 100).unwrap() {
            return stopped();
        }
    }
}

/// The state of a follower, its log, and its way to a snapshot's: after a crash anywhere it is the old
/// one or the new one, whole, and what is left over is found and removed.
#[test]
fn a_crash_in_an_installation_leaves_the_old_state_or_the_new() {
    let mut node = Node::new(Arc::new(MemoryEngine::new()), 5);
    let file = sample(&mut node);
    let new = node.flushed[&file.summary.header.applied.index].clone();
    let losses = [CrashLoss::Nothing, CrashLoss::Everything, CrashLoss::Random(1), CrashLoss::Random(2)];
    let log_ends = [None, Some(FailedWrite::Lost), Some(FailedWrite::Kept)];
    for (loss, log_end) in losses.iter().flat_map(|loss| log_ends.iter().map(move |end| (*loss, *end))) {
        let (mut kept_old, mut took_new) = (0, 0);
        for stop in 0.. {
            let memory = Arc::new(MemoryEngine::new());
            let engine: Arc<dyn Engine> = memory.clone();
            let home = tempfile::tempdir().unwrap();
            let mut flusher = Flusher::open(home.path().to_owned(), engine.clone()).unwrap();
            let log = MemoryLog::new();
            log.create(&[record()]).unwrap();
            let mut state = open_state(&engine, RECEIVER, 0);
            for key in 0..300u16 {
                state.put(&key.to_be_bytes(), "old".into());
            }
            let applied = Position { index: GROUP_START.index + 1, term: GROUP_START.term };
            state.set_applied(applied);
            let entry =
                raft::eraftpb::Entry { index: applied.index, term: applied.term, ..Default::default() };
            log.write(&[LogWrite {
                replica: RECEIVER,
                entries: vec![entry],
                hard_state: None,
                membership: None,
            }])
            .unwrap();
            flusher.flush(&[state.freeze().unwrap()], &mut |_| {}).unwrap();
            let old = pairs(&state);
            if let Some(leaves) = log_end {
                log.fail_write(0, leaves);
            }
            let stopped = install(&engine, &log, &file, stop);
            memory.crash(loss);
            log.crash();

            let generation = log.catalogue().unwrap()[0].generation;
            for stray in generations::strays(&*engine, RECEIVER, generation).unwrap() {
                let mut from = Vec::new();
                while !generations::destroy(&*engine, RECEIVER, stray, &mut from, 100).unwrap() {}
            }
            let state = open_state(&engine, RECEIVER, generation);
            let held = log.load(RECEIVER).unwrap();
            let context = format!("stopped at {stop}, lost {loss:?}, log {log_end:?}");
            // Beside its header there is the number of the last flush.
            assert_eq!(memory.len(), pairs(&state).len() + 2, "{context}: something is left over");
            if generation == 0 {
                kept_old += 1;
                assert!(pairs(&state) == old, "{context}");
                assert_eq!((held.truncated, held.last), (GROUP_START, applied.index), "{context}");
                load(&file, &engine, RECEIVER, 1).unwrap();
            } else {
                took_new += 1;
                assert!(pairs(&state) == new, "{context}");
                assert_eq!(held.truncated, file.summary.header.applied, "{context}");
            }
            assert!(pairs(&open_state(&engine, RECEIVER, 1)) == new, "{context}");
            if !stopped || took_new > 8 || (log_end.is_some() && kept_old + took_new > 40) {
                break;
            }
        }
        assert!(kept_old > 3 || log_end == Some(FailedWrite::Kept), "{kept_old}, lost {loss:?}, {log_end:?}");
        assert!(took_new > 0 || log_end == Some(FailedWrite::Lost), "{took_new}, lost {loss:?}, {log_end:?}");
    }
}

/// So that no step of the scan is the only one that a flush can meet.
#[test]
fn flush_points_are_as_the_exactness_test_needs_them() {
    let mut node = Node::new(Arc::new(MemoryEngine::new()), 1);
    let batches = Arc::new(Mutex::new(0));
    let seen = batches.clone();
    node.flusher.set_hook(Box::new(move |point| {
        *seen.lock().unwrap() += usize::from(point == FlushPoint::BatchWritten);
        Ok(())
    }));
    for _ in 0..3 {
        node.apply(0, 700, 20);
    }
    node.flush();
    assert!(*batches.lock().unwrap() > 2, "a flush is written in several batches");
}
