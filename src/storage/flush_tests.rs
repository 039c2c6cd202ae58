//! Tests of [`super`]: what the callers are told, and what is refused. Crashes: tests/flush_crash.rs.

use std::sync::Mutex;

use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::ids::Position;
use crate::storage::engine_memory::{CrashLoss, MemoryEngine};
use crate::storage::generations;
use crate::storage::state::ReplicaState;
use crate::storage::state::tests::initial;
use crate::storage::{StateBatch, StateView};

fn open_state(engine: &Arc<MemoryEngine>, replica: u64) -> ReplicaState {
    ReplicaState::open(engine.clone(), ReplicaId(replica), 0, initial()).unwrap()
}

fn apply(state: &mut ReplicaState, index: u64, key: &str, value: Option<&str>) {
    match value {
        Some(value) => state.put(key.as_bytes(), Bytes::copy_from_slice(value.as_bytes())),
        None => state.delete(key.as_bytes()),
    }
    state.set_applied(Position { index, term: 5 });
}

fn redo_files(dir: &Path) -> usize {
    std::fs::read_dir(dir).unwrap().count()
}

#[test]
fn memory_of_a_replica_is_free_before_the_others_are_absorbed() {
    let dir = tempfile::tempdir().unwrap();
    let engine = Arc::new(MemoryEngine::new());
    let mut flusher = Flusher::open(dir.path().join("redo"), engine.clone()).unwrap();
    let great = "x".repeat(FLUSH_PART_BYTES);
    let mut tables = Vec::new();
    for (replica, value) in [(1, "small"), (2, &great), (3, "small"), (4, "small")] {
        let mut state = open_state(&engine, replica);
        apply(&mut state, 6, "k", Some(value));
        tables.push(state.freeze().unwrap());
    }
    let mut told = Vec::new();
    let has = |replica| engine.get(&keys::header_key(ReplicaId(replica), 0)).unwrap().is_some();
    flusher
        .flush_parts(tables, &mut |progress| {
            if let Progress::Absorbed(parts) = progress {
                told.push(parts.iter().map(|(replica, _)| replica.0).collect::<Vec<_>>());
                assert!(parts.iter().all(|(replica, _)| has(replica.0)), "{told:?}");
                assert_eq!(has(4), told.len() == 2);
            }
        })
        .unwrap();
    assert_eq!(told, [vec![1, 2], vec![3, 4]]);
}

#[test]
fn a_round_over_several_replicas_and_tables() {
    let dir = tempfile::tempdir().unwrap();
    let engine = Arc::new(MemoryEngine::new());
    let mut flusher = Flusher::open(dir.path().join("redo"), engine.clone()).unwrap();
    let mut one = open_state(&engine, 1);
    let mut two = open_state(&engine, 2);
    apply(&mut one, 6, "a", Some("old"));
    apply(&mut one, 7, "b", Some("old"));
    let tables = [one.freeze().unwrap(), {
        apply(&mut one, 8, "a", Some("new"));
        apply(&mut one, 9, "b", None);
        one.freeze().unwrap()
    }];
    apply(&mut two, 6, "a", Some("other"));
    let tables = [&tables[..], &[two.freeze().unwrap()]].concat();
    let steps = Arc::new(Mutex::new(Vec::new()));
    let engine_seen = engine.clone();
    flusher
        .flush(&tables, &mut |step| {
            steps.lock().unwrap().push((step, engine_seen.len()));
        })
        .unwrap();
    let steps = steps.lock().unwrap().clone();
    assert_eq!(steps, [(FlushStep::Logged, 1), (FlushStep::Absorbed, 5)], "two keys, two headers, a number");
    assert_eq!(redo_files(&flusher.redo_dir), 0);
    engine.crash(CrashLoss::Everything);
    let one = open_state(&engine, 1);
    assert_eq!(one.header().applied.index, 9);
    assert_eq!(one.get(b"a").unwrap().unwrap(), "new");
    assert_eq!(one.get(b"b").unwrap(), None);
    assert_eq!(open_state(&engine, 2).get(b"a").unwrap().unwrap(), "other");

    flusher.destroy(&[ReplicaId(1), ReplicaId(3)]).unwrap();
    engine.crash(CrashLoss::Everything);
    assert_eq!(engine.len(), 3, "replica 2 is untouched");
}

#[test]
fn a_flush_that_fails_before_its_file_may_be_tried_again() {
    let dir = tempfile::tempdir().unwrap();
    let engine = Arc::new(MemoryEngine::new());
    let mut flusher = Flusher::open(dir.path().to_owned(), engine.clone()).unwrap();
    let mut state = open_state(&engine, 1);
    apply(&mut state, 6, "a", Some("x"));
    let table = state.freeze().unwrap();
    let mut fail = true;
    flusher.set_hook(Box::new(move |point| {
        if point == FlushPoint::RedoWritten && std::mem::take(&mut fail) {
            return Err(full_disk());
        }
        Ok(())
    }));
    assert!(flusher.flush(std::slice::from_ref(&table), &mut |_| panic!("too early")).is_err());
    assert_eq!(redo_files(dir.path()), 0);
    flusher.flush(&[table], &mut |_| {}).unwrap();
    assert_eq!(open_state(&engine, 1).get(b"a").unwrap().unwrap(), "x");
}

#[test]
fn a_flush_that_fails_after_its_file_ends_flushing() {
    let dir = tempfile::tempdir().unwrap();
    let engine = Arc::new(MemoryEngine::new());
    let mut flusher = Flusher::open(dir.path().to_owned(), engine.clone()).unwrap();
    let mut state = open_state(&engine, 1);
    apply(&mut state, 6, "a", Some("x"));
    let first = state.freeze().unwrap();
    apply(&mut state, 7, "a", Some("y"));
    let second = state.freeze().unwrap();
    flusher.set_hook(Box::new(|point| match point {
        FlushPoint::BatchWritten => Err(full_disk()),
        _ => Ok(()),
    }));
    assert!(flusher.flush(&[first], &mut |_| {}).is_err());
    assert_eq!(redo_files(dir.path()), 1);
    let error = flusher.flush(&[second], &mut |_| {}).unwrap_err();
    assert!(error.to_string().contains("restart the node"), "{error}");
    engine.crash(CrashLoss::Everything);
    Flusher::open(dir.path().to_owned(), engine.clone()).unwrap();
    assert_eq!(redo_files(dir.path()), 0);
    assert_eq!(open_state(&engine, 1).get(b"a").unwrap().unwrap(), "x");
}

#[test]
fn a_redo_file_older_than_the_state_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let engine = Arc::new(MemoryEngine::new());
    let mut state = open_state(&engine, 1);
    let mut flusher = Flusher::open(dir.path().to_owned(), engine.clone()).unwrap();
    let mut old = RedoWriter::create(dir.path(), 1).unwrap();
    old.section(&section(0)).unwrap();
    old.change(keys::KIND_USER, b"a", Some(b"stale")).unwrap();
    old.finish().unwrap();
    let old = std::fs::read(redo::list(dir.path()).unwrap().remove(0).1).unwrap();
    apply(&mut state, 6, "a", Some("x"));
    flusher.flush(&[state.freeze().unwrap()], &mut |_| {}).unwrap();
    std::fs::write(dir.path().join("0000000000000001.redo"), old).unwrap();
    let error = Flusher::open(dir.path().to_owned(), engine).err().unwrap();
    assert!(error.to_string().contains("at 6 already"), "{error}");
}

/// What is left on disk of the flush with this number, of an engine that holds the one before.
fn redo_file(sequence: u64) -> (tempfile::TempDir, Arc<MemoryEngine>) {
    let dir = tempfile::tempdir().unwrap();
    let engine = Arc::new(MemoryEngine::new());
    let mut flusher = Flusher::open(dir.path().to_owned(), engine.clone()).unwrap();
    let mut state = open_state(&engine, 1);
    for index in 0..sequence {
        apply(&mut state, 6 + index, "a", Some("x"));
        if index + 1 == sequence {
            flusher.set_hook(Box::new(|point| match point {
                FlushPoint::RedoDurable => Err(full_disk()),
                _ => Ok(()),
            }));
        }
        let flushed = flusher.flush(&[state.freeze().unwrap()], &mut |_| {});
        assert_eq!(flushed.is_err(), index + 1 == sequence);
    }
    engine.sync().unwrap();
    (dir, engine)
}

#[test]
fn an_engine_that_lost_or_regained_a_flush_is_refused() {
    let set = |engine: &MemoryEngine, number| Numbers::complete(number).write(engine).unwrap();
    for held in [0, 1, 4, 5, u64::MAX] {
        let (dir, engine) = redo_file(3);
        set(&engine, held);
        let error = Flusher::open(dir.path().to_owned(), engine.clone()).err().unwrap();
        assert!(error.to_string().contains(&format!("its last flush has the number {held}")), "{error}");
        assert_eq!(redo_files(dir.path()), 1, "nothing was thrown away");
    }
    for held in [2, 3] {
        let (dir, engine) = redo_file(3);
        set(&engine, held);
        let flusher = Flusher::open(dir.path().to_owned(), engine.clone()).unwrap();
        assert_eq!((last_flush(&*engine).unwrap(), flusher.next_sequence), (Some(Numbers::complete(3)), 4));
        engine.crash(CrashLoss::Everything);
        assert_eq!(Flusher::open(dir.path().to_owned(), engine).unwrap().next_sequence, 4);
    }
}

/// What the engine holds of it is no state of any moment.
#[test]
fn half_a_flush_without_its_redo_file_is_refused() {
    for batches in 1..=3 {
        let dir = tempfile::tempdir().unwrap();
        let engine = Arc::new(MemoryEngine::new());
        let mut flusher = Flusher::open(dir.path().to_owned(), engine.clone()).unwrap();
        let mut state = open_state(&engine, 1);
        apply(&mut state, 6, "a", Some("x"));
        flusher.flush(&[state.freeze().unwrap()], &mut |_| {}).unwrap();
        for index in 7..400 {
            apply(&mut state, index, &format!("key-{index}"), Some("x"));
        }
        let mut left = batches;
        flusher.set_hook(Box::new(move |point| {
            left -= u64::from(point == FlushPoint::BatchWritten);
            if left == 0 { Err(full_disk()) } else { Ok(()) }
        }));
        flusher.flush(&[state.freeze().unwrap()], &mut |_| {}).unwrap_err();
        let redo = redo::list(dir.path()).unwrap().remove(0).1;
        let bytes = std::fs::read(&redo).unwrap();
        std::fs::remove_file(&redo).unwrap();
        let opened = Flusher::open(dir.path().to_owned(), engine.clone());
        if batches == 3 {
            opened.unwrap();
            continue;
        }
        let error = opened.err().unwrap();
        assert!(error.to_string().contains("a part of flush 2"), "{error}");
        std::fs::write(&redo, bytes).unwrap();
        Flusher::open(dir.path().to_owned(), engine.clone()).unwrap();
        assert_eq!(open_state(&engine, 1).header().applied.index, 399);
    }
}

#[test]
fn a_store_from_before_flushes_had_numbers_is_taken_over() {
    let (dir, engine) = redo_file(3);
    engine.write(&[(keys::flush_key(), None)]).unwrap();
    let flusher = Flusher::open(dir.path().to_owned(), engine.clone()).unwrap();
    assert_eq!((last_flush(&*engine).unwrap(), flusher.next_sequence), (Some(Numbers::complete(3)), 4));
    engine.write(&[(keys::flush_key(), None)]).unwrap();
    Flusher::open(dir.path().to_owned(), engine.clone()).unwrap();
    assert_eq!(last_flush(&*engine).unwrap(), Some(Numbers::complete(0)));
}

#[test]
fn an_engine_behind_the_base_of_a_redo_file_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = RedoWriter::create(dir.path(), 1).unwrap();
    writer.section(&section(3)).unwrap();
    writer.finish().unwrap();
    let engine = Arc::new(MemoryEngine::new());
    let error = Flusher::open(dir.path().to_owned(), engine).err().unwrap();
    assert!(error.to_string().contains("up to entry 3, but"), "{error}");
    assert_eq!(redo_files(dir.path()), 1, "nothing was thrown away");
}

#[test]
fn the_largest_tables_go_first() {
    let active = [(1, 10), (2, 50), (3, 30), (4, 20)].map(|(r, bytes)| (ReplicaId(r), bytes));
    assert_eq!(choose(&active, 110), []);
    assert_eq!(choose(&active, 109), [ReplicaId(2), ReplicaId(3)]);
    assert_eq!(choose(&active, 0).len(), 4);
}

fn section(base: u64) -> Section {
    Section { replica: ReplicaId(1), generation: 0, base, header: initial() }
}

fn full_disk() -> StorageError {
    StorageError::Io {
        action: "writing",
        path: PathBuf::from("redo"),
        source: std::io::ErrorKind::StorageFull.into(),
    }
}

#[derive(Clone, Debug)]
enum Step {
    Put(u8, u8),
    Delete(u8),
    Freeze,
    Flush,
    /// Crash and reopen; the writes that were not flushed are applied again, as the log would.
    Reopen(CrashLoss),
    Scan(u8, u8),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let loss = prop_oneof![
        Just(CrashLoss::Nothing),
        Just(CrashLoss::Everything),
        any::<u64>().prop_map(CrashLoss::Random),
    ];
    let step = prop_oneof![
        8 => (0..24u8, any::<u8>()).prop_map(|(key, value)| Step::Put(key, value)),
        4 => (0..24u8).prop_map(Step::Delete),
        2 => Just(Step::Freeze),
        1 => Just(Step::Flush),
        1 => loss.prop_map(Step::Reopen),
        1 => (0..24u8, 1..8u8).prop_map(|(from, pairs)| Step::Scan(from, pairs)),
    ];
    proptest::collection::vec(step, 1..80)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    /// Whatever happens in whatever order, the state reads as the map that the same writes make.
    #[test]
    fn state_agrees_with_a_map(steps in steps()) {
        use std::collections::BTreeMap;
        use std::ops::Bound;
        let dir = tempfile::tempdir().unwrap();
        let engine = Arc::new(MemoryEngine::new());
        let mut flusher = Flusher::open(dir.path().to_owned(), engine.clone()).unwrap();
        let mut state = open_state(&engine, 1);
        let mut model: BTreeMap<Vec<u8>, Bytes> = BTreeMap::new();
        let mut log: Vec<(u64, Vec<u8>, Option<Bytes>)> = Vec::new();
        let mut waiting: Vec<Arc<Frozen>> = Vec::new();
        let run = |state: &mut ReplicaState, (index, key, value): &(u64, Vec<u8>, Option<Bytes>)| {
            match value {
                Some(value) => state.put(key, value.clone()),
                None => state.delete(key),
            }
            state.set_applied(Position { index: *index, term: 5 });
        };
        for step in steps {
            match step {
                Step::Put(..) | Step::Delete(_) => {
                    let (key, value) = match step {
                        Step::Put(key, value) => (vec![key], Some(Bytes::from(vec![value; 3]))),
                        Step::Delete(key) => (vec![key], None),
                        _ => unreachable!(),
                    };
                    match &value {
                        Some(value) => model.insert(key.clone(), value.clone()),
                        None => model.remove(&key),
                    };
                    log.push((6 + log.len() as u64, key, value));
                    run(&mut state, log.last().unwrap());
                }
                Step::Freeze => waiting.extend(state.freeze()),
                Step::Flush => {
                    flusher.flush(&waiting, &mut |_| {}).unwrap();
                    if let Some(last) = waiting.drain(..).next_back() {
                        state.release(last.header.applied.index);
                        prop_assert_eq!(state.memory_bytes().1, 0);
                    }
                }
                Step::Reopen(loss) => {
                    waiting.clear();
                    engine.crash(loss);
                    flusher = Flusher::open(dir.path().to_owned(), engine.clone()).unwrap();
                    state = open_state(&engine, 1);
                    let applied = state.header().applied.index;
                    for entry in log.iter().filter(|(index, _, _)| *index > applied) {
                        run(&mut state, entry);
                    }
                }
                Step::Scan(from, pairs) => {
                    let from = Bound::Included(&[from][..]);
                    let reader = state.scan_reader(from, &[], pairs.into());
                    let mut page = Vec::new();
                    reader.scan(from, &mut |key, value| {
                        page.push((key.to_vec(), value.clone()));
                        page.len() < pairs.into()
                    }).unwrap();
                    let expected: Vec<_> = model
                        .range::<[u8], _>((from, Bound::Unbounded))
                        .take(pairs.into())
                        .map(|(key, value)| (key.clone(), value.clone()))
                        .collect();
                    prop_assert_eq!(page, expected);
                }
            }
            for key in 0..24u8 {
                prop_assert_eq!(state.get(&[key]).unwrap(), model.get(&vec![key]).cloned());
            }
            let mut all = Vec::new();
            state.scan(Bound::Unbounded, &mut |key, value| {
                all.push((key.to_vec(), value.clone()));
                true
            }).unwrap();
            prop_assert_eq!(all, model.clone().into_iter().collect::<Vec<_>>());
        }
    }
}

/// Notes where scans of keys begin, and ranges that are forgotten at once.
struct Noting {
    inner: MemoryEngine,
    begins: Mutex<Vec<Bound<Vec<u8>>>>,
    forgotten: Mutex<Vec<Vec<u8>>>,
}

impl Engine for Noting {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StorageError> {
        self.inner.get(key)
    }
    fn scan(
        &self,
        from: Bound<&[u8]>,
        to: &[u8],
        visit: &mut dyn FnMut(&[u8], Bytes) -> bool,
    ) -> Result<(), StorageError> {
        self.begins.lock().unwrap().push(from.map(<[u8]>::to_vec));
        self.inner.scan(from, to, visit)
    }
    fn write(&self, batch: &[Mutation]) -> Result<(), StorageError> {
        self.inner.write(batch)
    }
    fn forget_range(&self, from: &[u8], _to: &[u8]) -> Result<(), StorageError> {
        self.forgotten.lock().unwrap().push(from.to_vec());
        Ok(())
    }
    fn sync(&self) -> Result<(), StorageError> {
        self.inner.sync()
    }
    fn disk_bytes(&self) -> u64 {
        self.inner.disk_bytes()
    }
    fn name(&self) -> &'static str {
        "noting"
    }
}

#[test]
fn a_removal_does_not_pass_over_what_it_has_removed_at_each_step() {
    let dir = tempfile::tempdir().unwrap();
    let engine = Arc::new(Noting {
        inner: MemoryEngine::new(),
        begins: Mutex::default(),
        forgotten: Mutex::default(),
    });
    let mut flusher = Flusher::open(dir.path().join("redo"), engine.clone()).unwrap();
    let replica = ReplicaId(7);
    let count = 3 * FLUSH_BATCH_KEYS as u32;
    let key = |number: u32| keys::user_key(replica, 1, &number.to_be_bytes());
    let pair = |number| (key(number), Some(Bytes::from_static(b"v")));
    engine.write(&(0..count).map(pair).collect::<Vec<_>>()).unwrap();
    for replica in [replica, ReplicaId(6)] {
        flusher.begin_destroy(replica);
    }
    // There may be thousands, and flushes wait meanwhile.
    assert!(engine.forgotten.lock().unwrap().is_empty());
    for batch in 1..=3 {
        assert!(!flusher.destroy_step(replica).unwrap());
        assert_eq!(engine.inner.get(&key(batch * FLUSH_BATCH_KEYS as u32 - 1)).unwrap(), None);
    }
    let last = |batch: u32| Bound::Excluded(key(batch * FLUSH_BATCH_KEYS as u32 - 1));
    let begins = engine.begins.lock().unwrap().split_off(0);
    assert_eq!(begins, [Bound::Included(keys::replica_range(replica).0), last(1), last(2)]);
    // What has come behind it goes, too.
    engine.write(&[pair(0)]).unwrap();
    while !flusher.destroy_step(replica).unwrap() {}
    assert_eq!(engine.inner.get(&key(0)).unwrap(), None);
    // The next one begins at its beginning.
    engine.begins.lock().unwrap().clear();
    while !flusher.destroy_step(ReplicaId(6)).unwrap() {}
    assert_eq!(engine.begins.lock().unwrap()[0], Bound::Included(keys::replica_range(ReplicaId(6)).0));
    // Once for each, before anything of it was removed.
    let begins = [replica, ReplicaId(6)].map(|replica| keys::replica_range(replica).0);
    assert_eq!(std::mem::take(&mut *engine.forgotten.lock().unwrap()), begins);
    // So it is with one generation.
    engine.write(&(0..3).map(pair).collect::<Vec<_>>()).unwrap();
    let mut from = Vec::new();
    while !generations::destroy(&*engine, replica, 1, &mut from, 1).unwrap() {}
    assert_eq!(*engine.forgotten.lock().unwrap(), [keys::generation_range(replica, 1).0]);
    assert!(generations::is_empty(&*engine, replica, 1).unwrap());
}

#[test]
fn a_store_that_must_not_find_the_disk_full_is_left_more_than_it_is_given() {
    let dir = tempfile::tempdir().unwrap();
    let flusher = Flusher::open(dir.path().join("redo"), Arc::new(MemoryEngine::new())).unwrap();
    for free in [0, 1, SLACK_BYTES] {
        assert_eq!(flusher.room_in(free), 0);
    }
    assert_eq!(flusher.room_in(SLACK_BYTES + 4096), 2048);
}
