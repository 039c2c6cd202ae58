//! The snapshot thread over an engine in memory, beside a real flush thread.

use std::ops::Bound;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use raft::eraftpb::ConfState;

use super::*;
use crate::ids::{Epoch, Position};
use crate::limits::SNAPSHOT_BURST_MS;
use crate::storage::engine::Mutation;
use crate::storage::engine_memory::MemoryEngine;
use crate::storage::keys;
use crate::storage::state::StateHeader;

const SHARD: ShardId = ShardId(4);
const MADE_OF: ReplicaId = ReplicaId(7);
const LOADED_BY: ReplicaId = ReplicaId(8);
const POSITION: Position = Position { index: 90, term: 6 };

struct Setting {
    dir: tempfile::TempDir,
    engine: Arc<MemoryEngine>,
    flusher: Arc<FlushThread>,
    worker: Worker,
    threads: Vec<JoinHandle<()>>,
}

impl Drop for Setting {
    fn drop(&mut self) {
        self.worker.close();
        self.flusher.close();
        for thread in self.threads.drain(..) {
            // A panic of it is told by what the test waits for.
            let _ = thread.join();
        }
    }
}

fn snapshot_dir(root: &Path) -> SnapshotDir {
    SnapshotDir::open(&root.join("snapshots"), 1 << 30).unwrap()
}

fn setting() -> Setting {
    let dir = tempfile::tempdir().unwrap();
    let engine = Arc::new(MemoryEngine::new());
    let fatal = Fatal::new();
    let flusher = Flusher::open(dir.path().join("redo"), engine.clone()).unwrap();
    let (flusher, flushing) = FlushThread::start(flusher, fatal.clone(), Default::default()).unwrap();
    let flusher = Arc::new(flusher);
    let tools = Tools {
        dir: snapshot_dir(dir.path()),
        engine: engine.clone(),
        flusher: flusher.clone(),
        fatal,
        bytes_per_second: u64::MAX,
    };
    let (worker, working) = Worker::start(tools).unwrap();
    Setting { dir, engine, flusher, worker, threads: vec![working, flushing] }
}

fn header(applied: Position) -> StateHeader {
    StateHeader {
        applied,
        revision: 3,
        log_time: 0,
        epoch: Epoch { range: 1, conf: 1 },
        members: Vec::new(),
        conf_state: ConfState::default(),
    }
}

/// A generation with a header and keys that say whose they are.
fn fill(engine: &MemoryEngine, replica: ReplicaId, generation: u32, count: u32) {
    let mut batch: Vec<Mutation> =
        vec![(keys::header_key(replica, generation), Some(header(POSITION).encode().into()))];
    for key in 0..count {
        let value = format!("{replica} {generation} {key} {}", "x".repeat(500));
        batch.push((keys::user_key(replica, generation, &key.to_be_bytes()), Some(value.into())));
    }
    engine.write(&batch).unwrap();
}

/// Everything of a generation, under keys that name neither it nor the replica.
fn content(engine: &MemoryEngine, replica: ReplicaId, generation: u32) -> Vec<(Vec<u8>, Bytes)> {
    let (from, to) = keys::generation_range(replica, generation);
    let mut pairs = Vec::new();
    engine
        .scan(Bound::Included(&from), &to, &mut |key, value| {
            pairs.push((keys::local_key(key).unwrap().to_vec(), value));
            true
        })
        .unwrap();
    pairs
}

impl Setting {
    fn make(&self) -> Result<SnapshotFile, BuildError> {
        self.make_at(0)
    }

    fn make_at(&self, least: Index) -> Result<SnapshotFile, BuildError> {
        let (done, made) = oneshot::channel();
        self.worker.build(Build { shard: SHARD, replica: MADE_OF, generation: 1, least, done });
        made.blocking_recv().unwrap()
    }

    fn offer(&self, file: &SnapshotFile) -> SnapshotOffer {
        SnapshotOffer {
            stream: file.origin.stream,
            shard: SHARD,
            from: MADE_OF,
            to: LOADED_BY,
            epoch: Epoch::default(),
            position: POSITION,
            leader_term: 7,
            bytes: file.bytes,
        }
    }

    fn load(&self, path: &Path, offer: SnapshotOffer) -> Result<Summary, LoadError> {
        let (done, loaded) = oneshot::channel();
        self.worker.load(Load { path: path.to_owned(), offer, current: 2, done });
        loaded.blocking_recv().unwrap()
    }

    fn until(&self, what: &str, condition: impl Fn(&MemoryEngine) -> bool) {
        let begun = std::time::Instant::now();
        while !condition(&self.engine) {
            assert!(begun.elapsed() < std::time::Duration::from_secs(20), "never: {what}");
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    }
}

#[cfg(target_os = "linux")]
#[test]
fn others_have_the_cores_first() {
    let setting = setting();
    fill(&setting.engine, MADE_OF, 1, 1);
    setting.make().unwrap();
    let mut found = 0;
    for thread in std::fs::read_dir("/proc/self/task").unwrap() {
        // Threads of other tests end at any time.
        let Ok(text) = std::fs::read_to_string(thread.unwrap().path().join("stat")) else { continue };
        let (name, rest) = text.rsplit_once(')').unwrap();
        // The system keeps 15 letters of a name. proc(5) counts from the process id: niceness is the 19th.
        let nice = rest.split_whitespace().nth(16).unwrap();
        if name.ends_with("(pontoon-snapsho") {
            found += u32::from(nice == crate::limits::SNAPSHOT_NICE.to_string());
        }
    }
    assert!(found > 0, "no snapshot thread, or none that is nice");
}

#[test]
fn what_is_made_of_one_replica_loads_into_the_next_generation_of_another() {
    let setting = setting();
    fill(&setting.engine, MADE_OF, 1, 3000);
    fill(&setting.engine, LOADED_BY, 2, 10);
    // What a crash in an earlier load has left, and the state before the present one.
    fill(&setting.engine, LOADED_BY, 3, 20);
    fill(&setting.engine, LOADED_BY, 1, 20);
    let file = setting.make().unwrap();
    assert!(file.bytes > 4 * SNAPSHOT_STEP_BYTES as u64, "more than one step");
    let summary = setting.load(&file.path, setting.offer(&file)).unwrap();
    assert_eq!(summary.header, header(POSITION));
    assert!(content(&setting.engine, LOADED_BY, 3) == content(&setting.engine, MADE_OF, 1));
    assert_eq!(content(&setting.engine, LOADED_BY, 2).len(), 11, "the present state stays");
    assert!(content(&setting.engine, LOADED_BY, 1).is_empty(), "strays go first");

    setting.worker.sweep(LOADED_BY, 3);
    setting.until("the removal of the old state", |engine| content(engine, LOADED_BY, 2).is_empty());
    assert_eq!(content(&setting.engine, LOADED_BY, 3).len(), 3001);
    assert_eq!(content(&setting.engine, MADE_OF, 1).len(), 3001);
}

#[test]
fn a_load_calls_off_the_removal_that_was_asked_for_before() {
    let setting = setting();
    fill(&setting.engine, MADE_OF, 1, 4000);
    fill(&setting.engine, LOADED_BY, 2, 10);
    let file = setting.make().unwrap();
    // Asked for while the record still names generation 2; by the time the thread gets to it,
    // generation 3 is there, and may be the one that counts.
    // Something to make keeps it from being removed before the load is asked for.
    let (done, _made) = oneshot::channel();
    setting.worker.build(Build { shard: SHARD, replica: MADE_OF, generation: 1, least: 0, done });
    let (done, loaded) = oneshot::channel();
    setting.worker.sweep(LOADED_BY, 2);
    setting.worker.load(Load { path: file.path.clone(), offer: setting.offer(&file), current: 2, done });
    loaded.blocking_recv().unwrap().unwrap();
    // Removals are done in the order in which they were asked for.
    fill(&setting.engine, ReplicaId(50), 1, 1);
    setting.worker.sweep(ReplicaId(50), 2);
    setting.until("another replica's removal", |engine| content(engine, ReplicaId(50), 1).is_empty());
    assert_eq!(content(&setting.engine, LOADED_BY, 3).len(), 4001);
}

#[test]
fn a_state_that_was_never_flushed_or_not_so_far_gives_no_snapshot() {
    let setting = setting();
    assert!(matches!(setting.make(), Err(BuildError::NotFlushed)));
    fill(&setting.engine, MADE_OF, 1, 10);
    assert!(matches!(setting.make_at(POSITION.index + 1), Err(BuildError::NotFlushed)));
    assert!(snapshot_dir(setting.dir.path()).made().unwrap().is_empty());
    assert!(setting.make_at(POSITION.index).is_ok());
}

#[test]
fn a_file_that_is_damaged_or_not_what_was_offered_is_not_loaded() {
    let setting = setting();
    fill(&setting.engine, MADE_OF, 1, 1000);
    fill(&setting.engine, LOADED_BY, 2, 1);
    let file = setting.make().unwrap();
    let good = setting.offer(&file);
    let wrong: [fn(&mut SnapshotOffer); 4] = [
        |o| o.stream = RandomId([9; 16]),
        |o| o.shard = ShardId(5),
        |o| o.position.index += 1,
        |o| o.bytes += 1,
    ];
    for change in wrong {
        let mut offer = good;
        change(&mut offer);
        assert!(matches!(setting.load(&file.path, offer), Err(LoadError::Unusable(_))), "{offer:?}");
    }
    let mut bytes = std::fs::read(&file.path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    let damaged = setting.dir.path().join("damaged");
    std::fs::write(&damaged, &bytes).unwrap();
    assert!(matches!(setting.load(&damaged, good), Err(LoadError::Unusable(_))));
    let missing = setting.dir.path().join("missing");
    assert!(matches!(setting.load(&missing, good), Err(LoadError::Local(_))));
    assert!(content(&setting.engine, LOADED_BY, 3).is_empty(), "nothing of it was loaded");
    assert_eq!(content(&setting.engine, LOADED_BY, 2).len(), 2);
}

#[test]
fn a_snapshot_that_nobody_waits_for_leaves_nothing() {
    let setting = setting();
    fill(&setting.engine, MADE_OF, 1, 3000);
    let (done, made) = oneshot::channel();
    setting.worker.build(Build { shard: SHARD, replica: MADE_OF, generation: 1, least: 0, done });
    drop(made);
    // The next one is made after it.
    let file = setting.make().unwrap();
    assert_eq!(snapshot_dir(setting.dir.path()).made().unwrap(), [file]);
}

#[test]
fn a_digest_is_of_the_index_that_is_meant_or_there_is_none() {
    let setting = setting();
    let digest = |replica, generation, index| {
        let (done, taken) = oneshot::channel();
        let reading = Arc::new(());
        setting.worker.digest(TakeDigest { replica, generation, index, reading, done });
        taken.blocking_recv().unwrap()
    };
    let none = |taken| matches!(taken, Err(DigestError::GoneOn));
    assert!(none(digest(MADE_OF, 1, POSITION.index)), "there is no state");
    fill(&setting.engine, MADE_OF, 1, 3000);
    let taken = digest(MADE_OF, 1, POSITION.index).unwrap();
    assert_eq!((taken.index, taken.keys), (POSITION.index, 3000));
    for index in [POSITION.index - 1, POSITION.index + 1] {
        assert!(none(digest(MADE_OF, 1, index)), "{index}");
    }
    assert!(none(digest(MADE_OF, 2, POSITION.index)));
    // The same content elsewhere is the same; another isn't.
    let moved = content(&setting.engine, MADE_OF, 1)
        .into_iter()
        .map(|(local, value)| (keys::key_of_kind(LOADED_BY, 9, local[0], &local[1..]), Some(value)));
    setting.engine.write(&moved.collect::<Vec<_>>()).unwrap();
    assert_eq!(digest(LOADED_BY, 9, POSITION.index).unwrap(), taken);
    setting.engine.write(&[(keys::user_key(LOADED_BY, 9, &[0; 4]), Some("x".into()))]).unwrap();
    assert_ne!(digest(LOADED_BY, 9, POSITION.index).unwrap().data, taken.data);
}

#[test]
fn the_thread_writes_no_faster_than_it_is_allowed_to() {
    let setting = setting();
    fill(&setting.engine, MADE_OF, 1, 4_000);
    setting.worker.limit(1 << 20);
    let begun = Instant::now();
    let file = setting.make().unwrap();
    assert!(file.bytes > 1 << 20, "{}", file.bytes);
    setting.load(&file.path, setting.offer(&file)).unwrap();
    // Made and loaded, at twice that, but for a burst and the last step of each, after which nobody waits.
    let free = (1 << 21) as u64 * SNAPSHOT_BURST_MS / 1000 + 2 * SNAPSHOT_STEP_BYTES as u64;
    let least = Duration::from_secs_f64((2 * file.bytes - free) as f64 / (1 << 21) as f64);
    assert!(begun.elapsed() >= least, "{:?}, at least {least:?}", begun.elapsed());
}

#[test]
fn the_thread_ends_although_it_rests() {
    let setting = setting();
    fill(&setting.engine, MADE_OF, 1, 2_000);
    setting.worker.limit(1);
    let (done, made) = oneshot::channel();
    setting.worker.build(Build { shard: SHARD, replica: MADE_OF, generation: 1, least: 0, done });
    std::thread::sleep(Duration::from_millis(50));
    // Hours before the thread would go on by itself.
    drop(setting);
    assert!(made.blocking_recv().is_err());
}
