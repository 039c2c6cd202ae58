//! What every state engine must do, run over each of them. A new engine is one line in [`engines`].

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::ops::Bound;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use bytes::Bytes;
use pontoon::ids::{RandomId, ReplicaId, StoreId};
use pontoon::storage::engine::{Engine, Mutation, Run, Store};
use pontoon::storage::engine_fjall::{FjallEngine, FjallOptions};
use pontoon::storage::engine_kind::{EngineKind, StateOptions};
use pontoon::storage::engine_memory::MemoryEngine;
use pontoon::storage::engine_sled::{CHUNK_BYTES, INLINE_BYTES_MAX, SledEngine, SledOptions};
use pontoon::storage::identity::IdentityError;
use pontoon::storage::{StorageError, keys};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

const STORE: StoreId = RandomId([7; 16]);
/// What takes so long never ends.
const HUNG: Duration = Duration::from_secs(300);

fn open_sled(path: &Path) -> Result<SledEngine, StorageError> {
    SledEngine::open(path, SledOptions::default(), STORE)
}

fn open_fjall(path: &Path) -> Result<FjallEngine, StorageError> {
    FjallEngine::open(path, FjallOptions { cache_bytes: 1 << 20 }, STORE)
}

/// Each engine, empty but for its own records.
fn engines(home: &Path) -> Vec<Arc<dyn Engine>> {
    vec![
        Arc::new(MemoryEngine::new()),
        Arc::new(open_sled(&home.join("sled")).unwrap()),
        Arc::new(open_fjall(&home.join("fjall")).unwrap()),
    ]
}

fn each_engine(test: impl Fn(&dyn Engine)) {
    let home = tempfile::tempdir().unwrap();
    let _guard = Watchdog::new("a test of the storage suite");
    for engine in engines(home.path()) {
        test(&*engine);
    }
}

/// Ends the process if it lives for minutes: an engine may hang, and nothing else would end the checks then.
struct Watchdog {
    _ends: mpsc::Sender<Infallible>,
}

impl Watchdog {
    fn new(what: &'static str) -> Watchdog {
        let (_ends, ended) = mpsc::channel::<Infallible>();
        std::thread::spawn(move || {
            if ended.recv_timeout(HUNG) == Err(mpsc::RecvTimeoutError::Timeout) {
                eprintln!("{what} hasn't ended after {HUNG:?}: an engine hangs");
                std::process::abort();
            }
        });
        Watchdog { _ends }
    }
}

/// Tests stay in one replica's keys, away from an engine's own records.
fn key(name: impl AsRef<[u8]>) -> Vec<u8> {
    keys::user_key(ReplicaId(3), 1, name.as_ref())
}

fn put(name: impl AsRef<[u8]>, value: &[u8]) -> Mutation {
    (key(name), Some(Bytes::copy_from_slice(value)))
}

fn remove(name: impl AsRef<[u8]>) -> Mutation {
    (key(name), None)
}

fn collect(engine: &dyn Engine, from: Bound<&[u8]>, to: &[u8]) -> Vec<(Vec<u8>, Bytes)> {
    let mut found = Vec::new();
    engine
        .scan(from, to, &mut |key, value| {
            found.push((key.to_vec(), value));
            true
        })
        .unwrap();
    let mut keys = Vec::new();
    engine
        .scan_keys(from, to, &mut |key| {
            keys.push(key.to_vec());
            true
        })
        .unwrap();
    assert!(keys.iter().eq(found.iter().map(|(key, _)| key)));
    found
}

#[test]
fn reads_what_was_written() {
    each_engine(|engine| {
        assert_eq!(engine.get(&key("a")).unwrap(), None);
        engine.write(&[put("", b"empty key"), put("a", b""), put("b", b"2")]).unwrap();
        assert_eq!(engine.get(&key("")).unwrap().unwrap(), "empty key");
        assert_eq!(engine.get(&key("a")).unwrap().unwrap(), "");
        engine.write(&[put("a", b"3"), remove("b"), remove("c")]).unwrap();
        assert_eq!(engine.get(&key("a")).unwrap().unwrap(), "3");
        assert_eq!(engine.get(&key("b")).unwrap(), None);
        engine.write(&[]).unwrap();
        engine.sync().unwrap();
        assert!(engine.disk_bytes() > 0, "{}", engine.name());
    });
}

#[test]
fn scans_within_bounds_in_order() {
    each_engine(|engine| {
        let names: Vec<String> = (0..100).map(|i| format!("{i:03}")).collect();
        let batch: Vec<_> = names.iter().map(|name| put(name, name.as_bytes())).collect();
        engine.write(&batch).unwrap();
        let end = keys::user_end(ReplicaId(3), 1);
        let names_in = |from: Bound<&str>, to: &[u8]| -> Vec<String> {
            let from = from.map(key);
            let from = match &from {
                Bound::Included(from) => Bound::Included(&from[..]),
                Bound::Excluded(from) => Bound::Excluded(&from[..]),
                Bound::Unbounded => Bound::Unbounded,
            };
            collect(engine, from, to)
                .into_iter()
                .map(|(_, value)| String::from_utf8(value.to_vec()).unwrap())
                .collect()
        };
        assert_eq!(names_in(Bound::Included(""), &end), names);
        assert_eq!(names_in(Bound::Included("042"), &end), names[42..]);
        assert_eq!(names_in(Bound::Excluded("042"), &end), names[43..]);
        assert_eq!(names_in(Bound::Excluded("042"), &key("050")), names[43..50]);
        assert_eq!(names_in(Bound::Included("042"), b""), names[42..]);
        assert_eq!(names_in(Bound::Included("9"), &end).len(), 0);
        assert_eq!(names_in(Bound::Included("5"), &key("4")).len(), 0, "crossed");
        assert_eq!(names_in(Bound::Excluded("042"), &key("042")).len(), 0);
        let mut seen = 0;
        engine
            .scan(Bound::Included(&key("")), &end, &mut |_, _| {
                seen += 1;
                seen < 3
            })
            .unwrap();
        assert_eq!(seen, 3, "it stops when told");
    });
}

#[test]
fn values_of_every_size_survive_overwrites() {
    let sizes = [
        0,
        1,
        INLINE_BYTES_MAX - 40,
        INLINE_BYTES_MAX,
        CHUNK_BYTES * 2 - 1,
        CHUNK_BYTES * 2,
        CHUNK_BYTES * 2 + 1,
        300_000,
        8 << 20,
    ];
    each_engine(|engine| {
        let value = |size: usize| -> Vec<u8> { (0..size).map(|i| (i * 7 + size) as u8).collect() };
        let long_key = vec![b'k'; 4096];
        for name in [&b"short"[..], &long_key] {
            for first in sizes {
                for second in [0, CHUNK_BYTES * 2, 70_000] {
                    engine.write(&[put(name, &value(first))]).unwrap();
                    assert_eq!(engine.get(&key(name)).unwrap().unwrap(), value(first));
                    engine.write(&[put(name, &value(second))]).unwrap();
                    assert_eq!(engine.get(&key(name)).unwrap().unwrap(), value(second));
                }
                engine.write(&[remove(name)]).unwrap();
                assert_eq!(engine.get(&key(name)).unwrap(), None);
            }
        }
    });
}

/// Left to itself sled hangs here within a second: its file shrinks and grows while it writes.
#[test]
fn great_values_that_come_and_go_are_no_end() {
    each_engine(|engine| {
        let sizes = [16 << 10, 300_000, 32 << 10, 8 << 20, 1 << 20];
        let mut given = 0;
        for round in 0_usize.. {
            let size = sizes[(round * round + round / 3) % sizes.len()];
            engine.write(&[put(round.to_be_bytes(), &vec![round as u8; size])]).unwrap();
            given += size;
            if let Some(old) = round.checked_sub(2 + round % 3) {
                engine.write(&[remove(old.to_be_bytes())]).unwrap();
            }
            if given > 96 << 20 {
                break;
            }
        }
        engine.sync().unwrap();
    });
}

#[test]
fn agrees_with_a_map() {
    let mutation = (0..40u8, proptest::option::of((any::<u8>(), 0..3usize)));
    let steps =
        proptest::collection::vec(proptest::collection::btree_map(mutation.0, mutation.1, 0..20), 1..20);
    let mut runner = TestRunner::new(ProptestConfig::with_cases(24));
    runner
        .run(&steps, |steps| {
            each_engine(|engine| {
                let mut model = BTreeMap::new();
                for batch in &steps {
                    let batch: Vec<Mutation> = batch
                        .iter()
                        .map(|(name, value)| {
                            let value =
                                value.map(|(fill, size)| Bytes::from(vec![fill; [5, 1000, 9000][size]]));
                            (key([*name]), value)
                        })
                        .collect();
                    engine.write(&batch).unwrap();
                    for (key, value) in batch {
                        match value {
                            Some(value) => model.insert(key, value),
                            None => model.remove(&key),
                        };
                    }
                }
                let end = keys::user_end(ReplicaId(3), 1);
                let all = collect(engine, Bound::Included(&key("")), &end);
                assert_eq!(all, model.into_iter().collect::<Vec<_>>());
            });
            Ok(())
        })
        .unwrap();
}

/// A reader beside a writer sees each value whole, old or new.
#[test]
fn reads_beside_a_writer_are_never_torn() {
    each_engine(|engine| {
        let done = AtomicBool::new(false);
        let fill = |round: usize| vec![round as u8; [10, 20_000, 100_000][round % 3]];
        engine.write(&[put("a", &fill(0)), put("b", &fill(0))]).unwrap();
        std::thread::scope(|scope| {
            // Reads first and looks at the flag then: on a busy machine the writer may be done before
            // the reader runs at all.
            let reader = scope.spawn(|| {
                loop {
                    let got = engine.get(&key("a")).unwrap().unwrap();
                    assert_eq!(got, fill(usize::from(got[0])), "torn value");
                    for (_, got) in collect(engine, Bound::Included(&key("")), &key("zz")) {
                        assert_eq!(got, fill(usize::from(got[0])), "torn value in a scan");
                    }
                    if done.load(Ordering::Relaxed) {
                        break;
                    }
                }
            });
            for round in 1..150 {
                engine.write(&[put("a", &fill(round)), put("b", &fill(round))]).unwrap();
            }
            done.store(true, Ordering::Relaxed);
            reader.join().unwrap();
        });
    });
}

fn open_store(kind: EngineKind, path: &Path, store_id: StoreId) -> Result<Arc<dyn Store>, StorageError> {
    kind.open(path, StateOptions { engine: Some(kind), cache_bytes: 1 << 20, synchronous: true }, store_id)
}

#[test]
fn stores_keep_what_was_synced() {
    for kind in EngineKind::ALL {
        let home = tempfile::tempdir().unwrap();
        let great = vec![3; 1 << 20];
        let engine = open_store(kind, home.path(), STORE).unwrap();
        assert!(engine.created());
        engine.write(&[put("a", b"0"), put("b", &great), put("c", b"1")]).unwrap();
        engine.write(&[put("a", b"1"), remove("c")]).unwrap();
        engine.sync().unwrap();
        drop(engine);
        for _ in 0..2 {
            let engine = open_store(kind, home.path(), STORE).unwrap();
            assert!(!engine.created());
            assert_eq!(engine.get(&key("a")).unwrap().unwrap(), "1");
            assert_eq!(engine.get(&key("b")).unwrap().unwrap(), great);
            assert_eq!(engine.get(&key("c")).unwrap(), None);
        }
    }
}

/// What is in a run counts as a whole, over what was written before, and not at all if it isn't finished.
#[test]
fn a_run_is_there_whole_or_not_at_all() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("fjall");
    let engine = open_fjall(&path).unwrap();
    let fill = |run: &mut dyn Run, value: &'static [u8]| {
        for number in 0..2000u32 {
            run.push(&key(number.to_be_bytes()), Some(&Bytes::from_static(value))).unwrap();
        }
        run.push(&key("z"), None).unwrap();
    };
    let all = |engine: &dyn Engine| collect(engine, Bound::Included(&key("")), &key("zz"));
    engine.write(&[put(3u32.to_be_bytes(), b"before"), put("z", b"before")]).unwrap();
    let before = all(&engine);
    let mut run = engine.begin_run().unwrap().unwrap();
    fill(&mut *run, b"never");
    assert_eq!(all(&engine), before, "nothing is seen before it is finished");
    drop(run);
    assert_eq!(all(&engine), before);
    let mut run = engine.begin_run().unwrap().unwrap();
    fill(&mut *run, b"run");
    // Older than the run, whenever it was written.
    engine.write(&[put(4u32.to_be_bytes(), b"meanwhile")]).unwrap();
    run.finish().unwrap();
    let whole = all(&engine);
    assert_eq!(whole.len(), 2000, "the removal too");
    assert!(whole.iter().all(|(_, value)| value == "run"));
    assert!(whole.iter().all(|(key, value)| engine.get(key).unwrap().as_ref() == Some(value)));
    engine.write(&[put(5u32.to_be_bytes(), b"after")]).unwrap();
    assert_eq!(engine.get(&key(5u32.to_be_bytes())).unwrap().unwrap(), "after");
    // Not synced: only the run is sure to be there.
    drop(engine);
    let engine = open_fjall(&path).unwrap();
    assert_eq!(all(&engine), whole);
    let run = engine.begin_run().unwrap().unwrap();
    run.finish().unwrap();
    assert_eq!(all(&engine), whole, "an empty one changes nothing");
}

/// Tables are merged beside reads, writes and runs, and nothing of that is seen.
#[test]
fn merging_tables_changes_nothing() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("fjall");
    let engine = open_fjall(&path).unwrap();
    let mut model = BTreeMap::new();
    let mut seed = 7u64;
    for round in 0..60u64 {
        let mut changes = BTreeMap::new();
        for _ in 0..300 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let value = (seed >> 60 != 0).then(|| Bytes::from(vec![round as u8; 200]));
            changes.insert(key(&(seed >> 33).to_be_bytes()[6..]), value);
        }
        if round % 3 == 0 {
            engine.write(&changes.clone().into_iter().collect::<Vec<_>>()).unwrap();
            engine.sync().unwrap();
        } else {
            let mut run = engine.begin_run().unwrap().unwrap();
            for (key, value) in &changes {
                run.push(key, value.as_ref()).unwrap();
            }
            run.finish().unwrap();
        }
        for (key, value) in changes {
            match value {
                Some(value) => model.insert(key, value),
                None => model.remove(&key),
            };
        }
        let found = collect(&engine, Bound::Included(&key("")), &[]);
        assert_eq!(found, model.clone().into_iter().collect::<Vec<_>>(), "round {round}");
        let (key, value) = model.iter().nth(model.len() / 2).unwrap();
        assert_eq!(engine.get(key).unwrap().as_ref(), Some(value));
    }
    drop(engine);
    let engine = open_fjall(&path).unwrap();
    let found = collect(&engine, Bound::Included(&key("")), &[]);
    assert_eq!(found, model.into_iter().collect::<Vec<_>>());
    let tables = std::fs::read_dir(path.join("tables")).unwrap().count();
    assert!(tables < 30, "{tables} tables were never merged");
}

#[test]
fn a_directory_keeps_its_engine() {
    let other = |kind| EngineKind::ALL.into_iter().find(|other| *other != kind);
    for kind in EngineKind::ALL {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("state");
        assert_eq!(EngineKind::of(&path, None).unwrap(), EngineKind::DEFAULT);
        assert_eq!(EngineKind::of(&path, Some(kind)).unwrap(), kind);
        drop(open_store(kind, &path, STORE).unwrap());
        assert_eq!(EngineKind::of(&path, None).unwrap(), kind);
        assert_eq!(EngineKind::of(&path, Some(kind)).unwrap(), kind);
        let error = EngineKind::of(&path, other(kind)).unwrap_err();
        assert!(matches!(error, StorageError::Identity(IdentityError::OtherEngine { .. })), "{error}");
        assert!(!error.ends_identity());
    }
    // Whatever made the second one: neither is taken for the state by itself.
    let home = tempfile::tempdir().unwrap();
    drop(open_store(EngineKind::Fjall, home.path(), STORE).unwrap());
    std::fs::write(home.path().join("db"), "").unwrap();
    assert!(EngineKind::of(home.path(), None).is_err());
}

#[test]
fn sled_never_puts_values_into_unsynced_files() {
    let home = tempfile::tempdir().unwrap();
    let engine = open_sled(home.path()).unwrap();
    for round in 0..4u8 {
        for name in 0..200u32 {
            // The greatest inline records, under the longest keys; and chunks.
            let mut long = name.to_be_bytes().to_vec();
            long.resize(4096, b'k');
            let inline = vec![round; INLINE_BYTES_MAX - 4 - 13];
            engine.write(&[put(long, &[round; 64]), put(name.to_be_bytes(), &inline)]).unwrap();
            if name % 20 == 0 {
                engine.write(&[put([0xff, name as u8], &vec![round; 200_000])]).unwrap();
            }
        }
        engine.sync().unwrap();
        let blobs = std::fs::read_dir(home.path().join("blobs")).unwrap().count();
        assert_eq!(blobs, 0, "in round {round}");
    }
}

#[test]
fn stores_refuse_what_is_not_their_own() {
    for kind in EngineKind::ALL {
        let home = tempfile::tempdir().unwrap();
        let engine = open_store(kind, home.path(), STORE).unwrap();
        let error = open_store(kind, home.path(), STORE).err().unwrap();
        assert!(matches!(error, StorageError::Identity(IdentityError::InUse { .. })), "{error}");
        let newer = Bytes::copy_from_slice(&(keys::FORMAT_VERSION + 1).to_be_bytes());
        engine.write(&[(keys::format_key(), Some(newer))]).unwrap();
        engine.sync().unwrap();
        drop(engine);
        let error = open_store(kind, home.path(), STORE).err().unwrap();
        assert!(matches!(error, StorageError::Identity(IdentityError::Newer { .. })), "{error}");

        let home = tempfile::tempdir().unwrap();
        drop(open_store(kind, home.path(), STORE).unwrap());
        for owner in [true, false] {
            let error = open_store(kind, home.path(), RandomId([8; 16])).err().unwrap();
            assert!(matches!(error, StorageError::Identity(IdentityError::ForeignStore { .. })), "{error}");
            // The store itself has it too.
            if owner {
                std::fs::remove_file(home.path().join("OWNER")).unwrap();
            }
        }
    }
}

#[test]
fn sled_opens_over_an_unfinished_snapshot() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("sled");
    let engine = open_sled(&path).unwrap();
    engine.write(&[put("a", b"1")]).unwrap();
    engine.sync().unwrap();
    drop(engine);
    let left = path.join("snap.00000000DEADBEEF.generating");
    std::fs::write(&left, "half").unwrap();
    let engine = open_sled(&path).unwrap();
    assert_eq!(engine.get(&key("a")).unwrap().unwrap(), "1");
    assert!(!left.exists());
}

/// Bytes changed anywhere in sled's files lead to an error or to the state that was there, never to a panic
/// or to another state.
#[test]
fn sled_reports_damage() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("whole");
    let engine = open_sled(&path).unwrap();
    for i in 0..300u32 {
        engine.write(&[put(i.to_be_bytes(), &[1; 900])]).unwrap();
    }
    engine.sync().unwrap();
    drop(engine);
    drop(open_sled(&path).unwrap());
    let mut refused = 0;
    for file in std::fs::read_dir(&path).unwrap() {
        let file = file.unwrap();
        if !file.metadata().unwrap().is_file() {
            continue;
        }
        let bytes = std::fs::read(file.path()).unwrap();
        for step in 0..6 {
            let copy = home.path().join(format!("{:?}-{step}", file.file_name()));
            copy_dir(&path, &copy);
            let sums = format!("{}.sums", copy.display());
            std::fs::copy(home.path().join("whole.sums"), sums).unwrap();
            let mut bad = bytes.clone();
            let place = bad.len() * step / 6;
            let end = (place + 40).min(bad.len());
            bad[place..end].fill(0xee);
            std::fs::write(copy.join(file.file_name()), bad).unwrap();
            let result = open_sled(&copy).and_then(|engine| {
                let mut pairs = 0;
                engine.scan(Bound::Included(&key("")), &[], &mut |_, value| {
                    pairs += usize::from(value[..] == [1; 900]);
                    true
                })?;
                assert_eq!(pairs, 300, "{}", copy.display());
                engine.write(&[put("z", b"z")])?;
                engine.sync()
            });
            refused += usize::from(result.is_err());
        }
    }
    assert!(refused > 0);
}

/// The same of fjall's files, of which each may also be cut, or gone.
#[test]
fn fjall_reports_damage() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("whole");
    let engine = open_fjall(&path).unwrap();
    for round in 0..3 {
        let mut run = engine.begin_run().unwrap().unwrap();
        for i in (0..300u32).filter(|i| round == 0 || i % 7 == round) {
            run.push(&key(i.to_be_bytes()), Some(&Bytes::from(vec![1; 900]))).unwrap();
        }
        run.finish().unwrap();
    }
    drop(engine);
    let read = |copy: &Path| {
        let engine = open_fjall(copy)?;
        let mut pairs = 0;
        engine.scan(Bound::Included(&key("")), &[], &mut |_, value| {
            pairs += usize::from(value[..] == [1; 900]);
            true
        })?;
        assert_eq!(pairs, 300, "{}", copy.display());
        engine.write(&[put("z", b"z")])?;
        engine.sync()
    };
    let files = [path.clone(), path.join("tables")];
    let files = files.iter().flat_map(|dir| std::fs::read_dir(dir).unwrap()).map(Result::unwrap);
    let (mut refused, mut whole, mut number) = (0, 0, 0);
    for file in files.filter(|file| file.metadata().unwrap().is_file()) {
        let bytes = std::fs::read(file.path()).unwrap();
        let name = file.file_name().into_string().unwrap();
        let places = (0..bytes.len()).step_by((bytes.len() / 24).max(1));
        let flipped = places.map(|place| {
            let mut bad = bytes.clone();
            bad[place] ^= 0x10;
            Some(bad)
        });
        let cut = [bytes.len() / 2, bytes.len().saturating_sub(1), 0].map(|len| Some(bytes[..len].to_vec()));
        for bad in flipped.chain(cut).chain([None]) {
            number += 1;
            let copy = home.path().join(number.to_string());
            copy_dir(&path, &copy);
            let target = copy.join(file.path().strip_prefix(&path).unwrap());
            match bad {
                Some(bad) => std::fs::write(target, bad).unwrap(),
                None => std::fs::remove_file(target).unwrap(),
            }
            match read(&copy) {
                Ok(()) => {
                    assert!(["LOCK", "OWNER"].contains(&name.as_str()), "{name} has no checksum");
                    whole += 1;
                }
                Err(StorageError::Damaged { .. }) => refused += 1,
                Err(error) => panic!("{name}: {error}"),
            }
            std::fs::remove_dir_all(copy).unwrap();
        }
    }
    assert!(refused > 80 && whole > 0, "{refused} refused, {whole} whole");
}

/// A block that goes bad while the store is open: an error, and from then on nothing but errors.
#[test]
fn fjall_believes_nothing_after_damage() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("fjall");
    let engine = open_fjall(&path).unwrap();
    let mut run = engine.begin_run().unwrap().unwrap();
    for i in 0..20_000u32 {
        run.push(&key(i.to_be_bytes()), Some(&Bytes::from(vec![1; 300]))).unwrap();
    }
    run.finish().unwrap();
    let told = Arc::new(AtomicBool::new(false));
    let hears = told.clone();
    engine.on_damage(Box::new(move |_| hears.store(true, Ordering::Relaxed)));
    for table in std::fs::read_dir(path.join("tables")).unwrap() {
        let table = table.unwrap().path();
        let mut bytes = std::fs::read(&table).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&table, bytes).unwrap();
    }
    let mut damage = 0;
    for i in 0..20_000u32 {
        match engine.get(&key(i.to_be_bytes())) {
            Ok(value) => {
                assert_eq!(damage, 0, "it is believed again");
                assert_eq!(value.unwrap(), vec![1; 300]);
            }
            Err(StorageError::Damaged { .. }) => damage += 1,
            Err(error) => {
                assert!(damage > 0 && error.to_string().contains("restart the node"), "{error}");
            }
        }
    }
    assert_eq!(damage, 1);
    assert!(told.load(Ordering::Relaxed));
    assert!(
        engine.write(&[put("a", b"a")]).is_err() && engine.sync().is_err() && engine.begin_run().is_err()
    );
    drop(engine);
    let error = open_fjall(&path).err().unwrap();
    assert!(matches!(error, StorageError::Damaged { .. }), "it was noted: {error}");
}

fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for item in std::fs::read_dir(from).unwrap() {
        let item = item.unwrap();
        let target = to.join(item.file_name());
        if item.file_type().unwrap().is_dir() {
            copy_dir(&item.path(), &target);
        } else {
            std::fs::copy(item.path(), target).unwrap();
        }
    }
}
