//! A crash at any moment of a flush leaves a state that the replayed log leads on from: exactly the
//! state at one applied index, no older than what the flusher called `Logged`.
//!
//! The entries here look at the state before they change it (compare and set, delete if equal, copy),
//! so that replaying them over anything but a whole state goes wrong for certain.

#[path = "flush_crash/damage.rs"]
mod damage;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use pontoon::ids::{Epoch, GROUP_START, Index, Position, RandomId, ReplicaId, StoreId};
use pontoon::machine::memory::MemoryState;
use pontoon::storage::engine::{Engine, Mutation};
use pontoon::storage::engine_kind::{EngineKind, StateOptions};
use pontoon::storage::engine_memory::{CrashLoss, MemoryEngine};
use pontoon::storage::flush::{FlushPoint, FlushStep, Flusher};
use pontoon::storage::sessions::SessionResult;
use pontoon::storage::state::{Frozen, ReplicaState, StateHeader};
use pontoon::storage::{StateBatch, StateView, StorageError};

const STORE: StoreId = RandomId([9; 16]);
const REPLICAS: [ReplicaId; 2] = [ReplicaId(4), ReplicaId(5)];

/// An entry of a log.
#[derive(Clone, Debug)]
enum Op {
    Put(Vec<u8>, Bytes),
    DeleteIf(Vec<u8>, Bytes),
    Cas(Vec<u8>, Bytes, Bytes),
    Copy(Vec<u8>, Vec<u8>),
    /// A put under this session and sequence, unless that has been.
    Once(u8, u64, Vec<u8>),
}

fn apply(op: &Op, state: &mut dyn StateBatch) {
    state.next_revision();
    match op {
        Op::Put(key, value) => state.put(key, value.clone()),
        Op::DeleteIf(key, value) => {
            if state.get(key).unwrap().as_ref() == Some(value) {
                state.delete(key);
            }
        }
        Op::Cas(key, expect, value) => {
            if state.get(key).unwrap().as_ref() == Some(expect) {
                state.put(key, value.clone());
            }
        }
        Op::Copy(from, to) => match state.get(from).unwrap() {
            Some(value) => state.put(to, value),
            None => state.delete(to),
        },
        Op::Once(number, sequence, key) => {
            let (id, revision) = (RandomId([*number; 16]), state.revision());
            let table = state.sessions();
            table.advance(10 * revision);
            table.open(id, 400);
            let session = table.touch(id, sequence.saturating_sub(30)).unwrap();
            if *sequence >= session.acked_below() && session.find(*sequence).is_none() {
                table.remember(id, *sequence, SessionResult::Written(revision));
                state.put(key, Bytes::from(format!("{number}-{sequence}-{revision}")));
            }
        }
    }
}

/// The raft log of one replica; entry i has index `GROUP_START.index + 1 + i`.
struct Log {
    replica: ReplicaId,
    ops: Vec<Op>,
}

impl Log {
    /// Overwrites a few hundred keys with small values, and some with values of many chunks.
    fn draw(replica: ReplicaId, entries: usize, keys: u64, great: bool) -> Log {
        let mut seed = replica.0.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut draw = |below: u64| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            (seed >> 20) % below
        };
        let ops = (0..entries)
            .map(|_| {
                let key = |n: u64| format!("key-{n:05}").into_bytes();
                let at = key(draw(keys));
                let few = |n: u64| Bytes::from(format!("value-{n}"));
                match draw(10) {
                    0..3 => Op::Put(at, few(draw(3))),
                    3 if great && draw(4) == 0 => {
                        let fill = draw(256) as u8;
                        Op::Put(at, vec![fill; 5_000 + draw(40_000) as usize].into())
                    }
                    3 => Op::Put(at, vec![b'x'; draw(1500) as usize].into()),
                    4 => Op::Once(draw(40) as u8, draw(100), at),
                    5 => Op::DeleteIf(at, few(draw(3))),
                    6..8 => Op::Cas(at, few(draw(3)), few(draw(3))),
                    _ => Op::Copy(at, key(draw(keys))),
                }
            })
            .collect();
        Log { replica, ops }
    }

    fn model(&self, applied: Index) -> MemoryState {
        let mut model = MemoryState::default();
        for op in &self.ops[..(applied - GROUP_START.index) as usize] {
            apply(op, &mut model);
        }
        model
    }

    fn open(&self, engine: Arc<dyn Engine>) -> ReplicaState {
        let initial = StateHeader {
            applied: GROUP_START,
            revision: 0,
            log_time: 0,
            epoch: Epoch::default(),
            members: Vec::new(),
            conf_state: Default::default(),
        };
        ReplicaState::open(engine, self.replica, 0, initial).unwrap()
    }

    /// Applies entries until `to` entries are applied.
    fn run(&self, state: &mut ReplicaState, to: usize) {
        let from = (state.header().applied.index - GROUP_START.index) as usize;
        for (i, op) in self.ops.iter().enumerate().take(to).skip(from) {
            apply(op, state);
            state.set_applied(Position { index: GROUP_START.index + 1 + i as u64, term: 5 });
        }
    }

    /// The state is exactly what the entries up to its applied index make.
    fn difference(&self, state: &ReplicaState) -> Option<String> {
        let model = self.model(state.header().applied.index);
        let mut pairs = BTreeMap::new();
        let scanned = state.scan(Bound::Unbounded, &mut |key, value| {
            pairs.insert(key.to_vec(), value.clone());
            true
        });
        if let Err(error) = scanned {
            return Some(error.to_string());
        }
        let applied = state.header().applied.index;
        let sessions = *state.session_table() == model.sessions;
        if pairs == model.pairs && state.revision() == model.revision && sessions {
            return None;
        }
        let missing = model.pairs.iter().filter(|(k, v)| pairs.get(*k) != Some(v));
        let extra = pairs.keys().filter(|k| !model.pairs.contains_key(*k));
        Some(format!(
            "at {applied}: {} pairs missing or wrong, {} too many, sessions right: {sessions}, revision {} for {}",
            missing.count(),
            extra.count(),
            state.revision(),
            model.revision
        ))
    }
}

fn crash() -> StorageError {
    StorageError::Engine { engine: "test", reason: "crash".into() }
}

/// Applies all logs and flushes `rounds` times on the way, until the flusher fails. Returns the
/// greatest index per replica that was `Logged`.
fn run_node(
    engine: &Arc<dyn Engine>,
    flusher: &mut Flusher,
    logs: &[Log],
    rounds: usize,
    logged: &Mutex<Vec<Index>>,
) -> Result<(), StorageError> {
    let mut states: Vec<_> = logs.iter().map(|log| log.open(engine.clone())).collect();
    for round in 1..=rounds {
        let mut tables: Vec<Arc<Frozen>> = Vec::new();
        for (log, state) in logs.iter().zip(&mut states) {
            let end = log.ops.len() * round / rounds;
            // Two tables of one replica in one flush, now and then.
            if round % 2 == 0 {
                log.run(state, end - log.ops.len() / rounds / 3);
                tables.extend(state.freeze());
            }
            log.run(state, end);
            tables.extend(state.freeze());
        }
        flusher.flush(&tables, &mut |step| {
            if step == FlushStep::Logged {
                for (i, state) in states.iter().enumerate() {
                    logged.lock().unwrap()[i] = state.header().applied.index;
                }
            }
        })?;
        for (log, state) in logs.iter().zip(&mut states) {
            state.release(state.header().applied.index);
            assert_eq!(log.difference(state), None);
        }
    }
    Ok(())
}

/// Opens after a crash, checks every replica, then replays the log to its end and checks again.
fn check_recovery(
    engine: &Arc<dyn Engine>,
    flusher: &mut Flusher,
    logs: &[Log],
    logged: &[Index],
    context: &str,
) {
    for (log, logged) in logs.iter().zip(logged) {
        let mut state = log.open(engine.clone());
        let applied = state.header().applied.index;
        assert!(
            applied >= *logged,
            "{context}: {applied} is applied, and the log may be gone up to {logged}"
        );
        assert_eq!(log.difference(&state), None, "{context}");
        log.run(&mut state, log.ops.len());
        assert_eq!(log.difference(&state), None, "{context}, replayed");
        let tables: Vec<_> = state.freeze().into_iter().collect();
        flusher.flush(&tables, &mut |_| {}).unwrap();
        assert_eq!(log.difference(&log.open(engine.clone())), None, "{context}, flushed");
    }
}

fn losses() -> Vec<CrashLoss> {
    let mut losses = vec![CrashLoss::Nothing, CrashLoss::Everything];
    losses.extend((0..4).map(CrashLoss::Random));
    losses
}

#[test]
fn a_crash_at_any_point_in_memory() {
    let logs = REPLICAS.map(|replica| Log::draw(replica, 1500, 400, false));
    let mut stop_at = 0;
    loop {
        let mut completed = false;
        for loss in losses() {
            let dir = tempfile::tempdir().unwrap();
            let memory = Arc::new(MemoryEngine::new());
            let engine: Arc<dyn Engine> = memory.clone();
            let mut flusher = Flusher::open(dir.path().to_owned(), engine.clone()).unwrap();
            let mut point = 0;
            flusher.set_hook(Box::new(move |_| {
                point += 1;
                if point > stop_at { Err(crash()) } else { Ok(()) }
            }));
            let logged = Mutex::new(vec![GROUP_START.index; logs.len()]);
            completed = run_node(&engine, &mut flusher, &logs, 4, &logged).is_ok();
            drop(flusher);
            memory.crash(loss);
            let mut flusher = Flusher::open(dir.path().to_owned(), engine.clone()).unwrap();
            let context = format!("stopped at point {stop_at}, lost {loss:?}");
            check_recovery(&engine, &mut flusher, &logs, &logged.into_inner().unwrap(), &context);
        }
        if completed {
            break;
        }
        stop_at += 1;
    }
    assert!(stop_at > 20, "only {stop_at} points");
}

/// Fails after so many batches.
struct Failing {
    inner: Arc<MemoryEngine>,
    left: AtomicUsize,
}

impl Engine for Failing {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StorageError> {
        self.inner.get(key)
    }

    fn scan(
        &self,
        from: Bound<&[u8]>,
        to: &[u8],
        visit: &mut dyn FnMut(&[u8], Bytes) -> bool,
    ) -> Result<(), StorageError> {
        self.inner.scan(from, to, visit)
    }

    fn write(&self, batch: &[Mutation]) -> Result<(), StorageError> {
        self.left
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1))
            .map_err(|_| crash())?;
        self.inner.write(batch)
    }

    fn sync(&self) -> Result<(), StorageError> {
        self.inner.sync()
    }

    fn disk_bytes(&self) -> u64 {
        0
    }

    fn name(&self) -> &'static str {
        "failing"
    }
}

#[test]
fn crashes_during_recovery_itself() {
    let logs = REPLICAS.map(|replica| Log::draw(replica, 1500, 400, false));
    for loss in losses() {
        let dir = tempfile::tempdir().unwrap();
        let memory = Arc::new(MemoryEngine::new());
        let engine: Arc<dyn Engine> = memory.clone();
        let mut flusher = Flusher::open(dir.path().to_owned(), engine.clone()).unwrap();
        let mut batches = 0;
        flusher.set_hook(Box::new(move |point| {
            batches += usize::from(point == FlushPoint::BatchWritten);
            if batches > 7 { Err(crash()) } else { Ok(()) }
        }));
        let logged = Mutex::new(vec![GROUP_START.index; logs.len()]);
        assert!(run_node(&engine, &mut flusher, &logs, 2, &logged).is_err());
        memory.crash(loss);
        let mut attempts = 0;
        loop {
            let failing = Arc::new(Failing { inner: memory.clone(), left: AtomicUsize::new(attempts) });
            if Flusher::open(dir.path().to_owned(), failing).is_ok() {
                break;
            }
            memory.crash(loss);
            attempts += 1;
        }
        assert!(attempts >= 4, "recovery took {attempts} batches");
        let mut flusher = Flusher::open(dir.path().to_owned(), engine.clone()).unwrap();
        let context = format!("lost {loss:?}");
        check_recovery(&engine, &mut flusher, &logs, &logged.into_inner().unwrap(), &context);
    }
}

/// The story that redo files exist for. In the engine k=a. Entries: delete k if it is c; set k to c
/// if it is a. The crash keeps k=c, and not the header.
#[test]
fn a_half_flushed_value_is_not_replayed_over() {
    let value = |text: &'static str| Bytes::from_static(text.as_bytes());
    let k = || b"k".to_vec();
    let mut ops =
        vec![Op::Put(k(), value("a")), Op::DeleteIf(k(), value("c")), Op::Cas(k(), value("a"), value("c"))];
    // More than one batch, so that the header is not written together with k.
    ops.extend((0..600).map(|i| Op::Put(format!("z{i}").into_bytes(), value("z"))));
    let log = Log { replica: REPLICAS[0], ops };
    let dir = tempfile::tempdir().unwrap();
    let engine: Arc<dyn Engine> = Arc::new(MemoryEngine::new());
    let mut flusher = Flusher::open(dir.path().to_owned(), engine.clone()).unwrap();
    let mut state = log.open(engine.clone());
    log.run(&mut state, 1);
    flusher.flush(&[state.freeze().unwrap()], &mut |_| {}).unwrap();
    log.run(&mut state, log.ops.len());
    flusher.set_hook(Box::new(|point| match point {
        FlushPoint::BatchWritten => Err(crash()),
        _ => Ok(()),
    }));
    assert!(flusher.flush(&[state.freeze().unwrap()], &mut |_| {}).is_err());

    // Without the redo file, replaying deletes k: the danger is real.
    let mut half = log.open(engine.clone());
    assert_eq!(half.header().applied.index, GROUP_START.index + 1);
    assert_eq!(half.get(b"k").unwrap().unwrap(), "c");
    log.run(&mut half, log.ops.len());
    assert_eq!(half.get(b"k").unwrap(), None);
    assert!(log.difference(&half).is_some());

    // With it, nothing is left to replay.
    Flusher::open(dir.path().to_owned(), engine.clone()).unwrap();
    let state = log.open(engine);
    assert_eq!(state.header().applied.index, GROUP_START.index + log.ops.len() as u64);
    assert_eq!(state.get(b"k").unwrap().unwrap(), "c");
    assert_eq!(log.difference(&state), None);
}

#[test]
fn a_destroy_cut_short_is_finished_later() {
    let logs = REPLICAS.map(|replica| Log::draw(replica, 1500, 600, false));
    let dir = tempfile::tempdir().unwrap();
    let memory = Arc::new(MemoryEngine::new());
    let engine: Arc<dyn Engine> = memory.clone();
    let mut flusher = Flusher::open(dir.path().to_owned(), engine.clone()).unwrap();
    let logged = Mutex::new(vec![0; 2]);
    run_node(&engine, &mut flusher, &logs, 1, &logged).unwrap();
    flusher.set_hook(Box::new(|_| Err(crash())));
    assert!(flusher.destroy(&REPLICAS[..1]).is_err());
    memory.crash(CrashLoss::Random(3));
    let mut flusher = Flusher::open(dir.path().to_owned(), engine.clone()).unwrap();
    flusher.destroy(&REPLICAS[..1]).unwrap();
    assert_eq!(logs[1].difference(&logs[1].open(engine.clone())), None);
    let kept = logs[1].model(logged.lock().unwrap()[1]);
    // With its header, and the number of the last flush.
    let rest = kept.pairs.len() + kept.sessions.len() + 2;
    assert_eq!(memory.len(), rest, "nothing of the destroyed replica is left");
}

/// How the files of an image differ from what the page cache held.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Image {
    /// Not at all: the process was killed; or the power failed, and each write of sled was durable.
    Killed,
    /// Nothing since the last sync of each file arrived.
    OnlySynced,
    /// The power failed on a file system without synchronous files: files are cut to the length they
    /// had at the last sync, what was written below that arrived, and the machine has a new boot id.
    Cut,
}

/// A copy of a node's files at one point of a flush.
struct Copied {
    point: String,
    path: PathBuf,
    logged: Vec<Index>,
    image: Image,
}

fn copy_dir(from: &Path, to: &Path) {
    try_copy_dir(from, to).unwrap();
}

fn try_copy_dir(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    for item in fs::read_dir(from)? {
        let item = item?;
        let target = to.join(item.file_name());
        if item.file_type()?.is_dir() {
            try_copy_dir(&item.path(), &target)?;
        } else {
            fs::copy(item.path(), target)?;
        }
    }
    Ok(())
}

/// Copies a node's state store and its sums, if it has any.
fn copy_state(from: &Path, to: &Path) {
    if from.join("state.sums").exists() {
        copy_dir(&from.join("state"), &to.join("state"));
        fs::copy(from.join("state.sums"), to.join("state.sums")).unwrap();
        return;
    }
    // fjall merges tables meanwhile, and then removes some: a moment is wanted at which it didn't.
    let current = || fs::read(from.join("state").join("current")).unwrap();
    loop {
        let before = current();
        let whole = try_copy_dir(&from.join("state"), &to.join("state")).is_ok();
        if whole && current() == before {
            return;
        }
        fs::remove_dir_all(to.join("state")).unwrap();
    }
}

/// Cuts each file in `image` to its length in `synced`.
fn cut_to_synced(image: &Path, synced: &Path) {
    for item in fs::read_dir(image).unwrap() {
        let item = item.unwrap();
        let durable = synced.join(item.file_name());
        if item.file_type().unwrap().is_dir() {
            cut_to_synced(&item.path(), &durable);
        } else if let Ok(metadata) = fs::metadata(&durable) {
            let file = fs::OpenOptions::new().write(true).open(item.path()).unwrap();
            if metadata.len() < file.metadata().unwrap().len() {
                file.set_len(metadata.len()).unwrap();
            }
        } else {
            fs::remove_file(item.path()).unwrap();
        }
    }
}

/// Runs a node and copies its files at every point of every flush. What is in `redo` under a
/// final name is synced by then; what is in `state` is as durable as the last `sync` of the engine.
fn images(
    home: &Path,
    kind: EngineKind,
    logs: &[Log],
    rounds: usize,
    synchronous: bool,
    kinds: &'static [Image],
) -> Vec<Copied> {
    let live = home.join("live");
    let synced = home.join("synced");
    let engine = open(kind, &live, synchronous).unwrap();
    let mut flusher = Flusher::open(live.join("redo"), engine.clone()).unwrap();
    let logged = Arc::new(Mutex::new(vec![GROUP_START.index; logs.len()]));
    copy_state(&live, &synced);
    let images = Arc::new(Mutex::new(Vec::new()));
    flusher.set_hook(Box::new({
        let (home, logged, images) = (home.to_owned(), logged.clone(), images.clone());
        let mut number = 0;
        move |point| {
            if point == FlushPoint::EngineSynced {
                fs::remove_dir_all(&synced).unwrap();
                copy_state(&live, &synced);
            }
            number += 1;
            for &image in kinds {
                let path = home.join(format!("{number}-{image:?}"));
                copy_dir(&live.join("redo"), &path.join("redo"));
                match image {
                    Image::OnlySynced => copy_state(&synced, &path),
                    _ => copy_state(&live, &path),
                }
                if image == Image::Cut {
                    let marker = path.join("state").join("UNSYNCED");
                    let marked = marker.exists();
                    cut_to_synced(&path.join("state"), &synced.join("state"));
                    if marked {
                        fs::write(marker, "another boot").unwrap();
                    }
                }
                images.lock().unwrap().push(Copied {
                    point: format!("{number} ({point:?})"),
                    path,
                    logged: logged.lock().unwrap().clone(),
                    image,
                });
            }
            Ok(())
        }
    }));
    run_node(&engine, &mut flusher, logs, rounds, &logged).unwrap();
    drop(flusher);
    Arc::into_inner(images).unwrap().into_inner().unwrap()
}

fn open(kind: EngineKind, node: &Path, synchronous: bool) -> Result<Arc<dyn Engine>, StorageError> {
    let options = StateOptions { engine: Some(kind), cache_bytes: 16 << 20, synchronous };
    Ok(kind.open(&node.join("state"), options, STORE)?)
}

fn check_image(copied: &Copied, engine: &Arc<dyn Engine>, logs: &[Log]) {
    let context = format!("point {}, {:?}", copied.point, copied.image);
    let mut flusher = Flusher::open(copied.path.join("redo"), engine.clone()).unwrap();
    check_recovery(engine, &mut flusher, logs, &copied.logged, &context);
}

#[test]
fn a_crash_at_any_point_on_disk() {
    // fjall takes a flush in one run: fewer points.
    for (kind, least) in [(EngineKind::Sled, 40), (EngineKind::Fjall, 20)] {
        let logs = REPLICAS.map(|replica| Log::draw(replica, 1200, 500, true));
        let home = tempfile::tempdir().unwrap();
        let images = images(home.path(), kind, &logs, 3, true, &[Image::Killed, Image::OnlySynced]);
        assert!(images.len() > least, "only {} images of {kind}", images.len());
        for copied in images {
            let engine = open(kind, &copied.path, false).unwrap();
            check_image(&copied, &engine, &logs);
            drop(engine);
            fs::remove_dir_all(copied.path).unwrap();
        }
    }
}

/// Where writes can't be made durable one by one, sled may lose old data to a power loss without a
/// word. A store that was being written then is refused; one that wasn't is whole.
#[test]
fn a_power_loss_without_synchronous_files_is_seen() {
    let logs = REPLICAS.map(|replica| Log::draw(replica, 1200, 500, true));
    let home = tempfile::tempdir().unwrap();
    let images = images(home.path(), EngineKind::Sled, &logs, 3, false, &[Image::Cut]);
    let (mut refused, mut whole) = (0, 0);
    for copied in images {
        match open(EngineKind::Sled, &copied.path, false) {
            Ok(engine) => {
                check_image(&copied, &engine, &logs);
                whole += 1;
            }
            Err(StorageError::Damaged { .. }) => refused += 1,
            Err(error) => panic!("point {}: {error}", copied.point),
        }
        fs::remove_dir_all(copied.path).unwrap();
    }
    assert!(refused > 10 && whole > 5, "{refused} refused, {whole} whole");
}
