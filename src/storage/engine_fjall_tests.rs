use std::time::Instant;

use super::*;
use crate::ids::ReplicaId;
use crate::limits::FJALL_TABLES_WAITING_MAX;
use crate::storage::pulse::{self, Pulse};

/// A machine that is slow takes long, and one that hangs is to be told from it.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(120);

fn open(path: &Path) -> FjallEngine {
    FjallEngine::open(path, FjallOptions { cache_bytes: 1 << 20 }, RandomId([7; 16])).unwrap()
}

/// One more table, which the others overlap.
fn add_table(engine: &FjallEngine, value: &'static str) {
    for name in ["a", "z"] {
        let key = keys::user_key(ReplicaId(3), 1, name.as_bytes());
        engine.write(&[(key, Some(Bytes::from_static(value.as_bytes())))]).unwrap();
    }
    engine.sync().unwrap();
}

#[test]
fn who_is_held_back_gets_on_as_long_as_the_merging_does() {
    let home = tempfile::tempdir().unwrap();
    let engine = open(&home.path().join("state"));
    let waiting = || engine.core.tree.level_table_count(0).unwrap();
    let merging = engine.core.merging.lock().unwrap();
    while waiting() < FJALL_TABLES_WAITING_MAX {
        add_table(&engine, "before");
    }
    let pulse = Pulse::default();
    std::thread::scope(|scope| {
        let held_back = scope.spawn(|| {
            let _attached = pulse.attach();
            let _working = pulse::work();
            add_table(&engine, "after");
        });
        let begun = Instant::now();
        let mut beats = std::collections::BTreeSet::new();
        while beats.len() < 10 {
            // Somebody else's merge.
            engine.core.ending.steps.fetch_add(1, Ordering::Relaxed);
            beats.extend(pulse.at_work());
            assert!(begun.elapsed() < PATIENCE, "it seems to hang");
            std::thread::yield_now();
        }
        assert!(!held_back.is_finished());
        assert_eq!(waiting(), FJALL_TABLES_WAITING_MAX);
        drop(merging);
        held_back.join().unwrap();
    });
    assert!(waiting() < FJALL_TABLES_WAITING_MAX, "they were merged before");
    let key = keys::user_key(ReplicaId(3), 1, b"a");
    assert_eq!(engine.get(&key).unwrap().unwrap(), "after");
}

#[test]
fn tables_that_somebody_reads_are_no_remains() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("state");
    let engine = open(&path);
    add_table(&engine, "before");
    let tables = || std::fs::read_dir(path.join("tables")).unwrap().count();
    let reads = engine.core.view.load_full();
    for _ in 0..8 {
        add_table(&engine, "after");
    }
    // As after a merge for which there was no space. Not before there is a newer view: who merges in the background would
    // find no remains, and look for them no more.
    engine.core.litter(0);
    while engine.core.compact().unwrap() {}
    assert!(tables() > engine.core.tree.table_count(), "what is read was removed");
    std::fs::write(path.join("tables").join("1000000"), "remains").unwrap();
    drop(reads);
    engine.core.compact().unwrap();
    assert_eq!(tables(), engine.core.tree.table_count());
}

/// Free bytes that a merge finds when it begins and at each look afterwards.
fn merge_with(free: fn(&Path) -> Option<u64>) -> (lsm_tree::Result<()>, usize) {
    let home = tempfile::tempdir().unwrap();
    let attendants = Attendants { dir: home.path().to_owned(), ending: Ending::default(), free };
    let tree = Config::new(home.path(), Default::default(), Default::default())
        .with_compaction_filter_factory(Some(Arc::new(attendants)))
        .open()
        .unwrap();
    for _ in 0..4 {
        let mut ingestion = tree.ingestion().unwrap();
        for name in [b"a", b"z"] {
            ingestion.write(&name[..], vec![7; 2 << 20]).unwrap();
        }
        ingestion.finish().unwrap();
    }
    let merged = tree.compact(Arc::new(lsm_tree::compaction::Leveled::default()), SeqNo::MAX);
    (merged, tree.level_table_count(0).unwrap())
}

#[test]
fn a_merge_leaves_some_of_the_disk_to_others() {
    use std::sync::atomic::AtomicU64;
    static LEFT: AtomicU64 = AtomicU64::new(1 << 20);
    let (merged, waiting) = merge_with(|_| Some(LEFT.fetch_sub(300 << 10, Ordering::Relaxed)));
    let error = contain(Path::new("state"), || merged, Doing::Writing).unwrap_err();
    assert!(error.is_full(), "{error}");
    assert_eq!(waiting, 4);
    for free in [|_: &Path| None, |_: &Path| Some(1 << 20)] {
        let (merged, waiting) = merge_with(free);
        merged.unwrap();
        assert_eq!(waiting, 0, "as little is left as before");
    }
}

#[test]
fn a_merge_that_found_no_room_is_tried_again_when_there_is_more() {
    let home = tempfile::tempdir().unwrap();
    let engine = open(&home.path().join("state"));
    let core = &engine.core;
    for _ in 0..FJALL_TABLES_WAITING_MAX / 2 {
        let merging = core.merging.lock().unwrap();
        add_table(&engine, "v");
        drop(merging);
    }
    // The thread that merges tells how its merge went, if it has one under way.
    let merging = core.merging.lock().unwrap();
    core.refused.store(u64::MAX / 2, Ordering::Relaxed);
    assert!(core.merge(&merging).unwrap_err().is_full());
    drop(merging);
    core.refused.store(1, Ordering::Relaxed);
    while core.compact().unwrap() {}
    assert_eq!(core.refused.load(Ordering::Relaxed), 0);
    assert!(core.tree.level_table_count(0).unwrap() < 4);
}

#[test]
fn an_unfinished_file_of_a_kill_goes_at_the_next_opening() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("state");
    drop(open(&path));
    std::fs::write(path.join(".tmpAb3dE9"), "half of it").unwrap();
    drop(open(&path));
    assert!(!path.join(".tmpAb3dE9").exists());
}

/// The system may say that there is no space when it is asked to sync the renaming of `current`.
#[test]
fn a_version_that_may_count_ends_the_store_and_takes_no_table_with_it() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("state");
    let engine = open(&path);
    let core = &engine.core;
    let full = || Err::<(), _>(std::io::Error::from(ErrorKind::StorageFull).into());
    assert!(core.making_table(full).unwrap_err().is_full());
    // No thread makes one more meanwhile.
    let merging = core.merging.lock().unwrap();
    add_table(&engine, "v");
    let known = std::fs::read(path.join("current")).unwrap();
    // Another thread has made a version since the file was looked at.
    let before = || {
        let mut earlier = known.clone();
        earlier[0] -= 1;
        std::fs::write(path.join("current"), earlier).unwrap();
        full()
    };
    assert!(core.making_table(before).unwrap_err().is_full());
    std::fs::write(path.join("current"), &known).unwrap();
    let table = path.join("tables").join("1000000");
    let renamed = || {
        std::fs::write(&table, "of the version after this").unwrap();
        let mut next = known.clone();
        next[0] += 1;
        std::fs::write(path.join("current"), next).unwrap();
        full()
    };
    let error = core.making_table(renamed).unwrap_err();
    assert!(matches!(error, StorageError::SyncFailed { .. }), "{error}");
    assert!(engine.get(b"a").is_err(), "nothing of it is believed any more");
    drop(merging);
    assert!(core.compact().is_err());
    assert!(table.exists());
}

#[test]
fn tables_of_a_generation_alone_are_dropped_and_nothing_comes_back() {
    use crate::storage::generations;
    let home = tempfile::tempdir().unwrap();
    let engine = open(&home.path().join("state"));
    let core = &engine.core;
    let replica = ReplicaId(3);
    let put = |generation, name: &str, value: Option<&'static str>| {
        (keys::user_key(replica, generation, name.as_bytes()), value.map(Bytes::from))
    };
    let table = |batch: &[Mutation]| {
        engine.write(batch).unwrap();
        engine.sync().unwrap();
    };
    // No thread merges them meanwhile.
    let merging = core.merging.lock().unwrap();
    table(&[put(1, "kept", Some("v")), put(2, "early", Some("old")), put(2, "late", Some("old"))]);
    // Within the generation: dropped as a whole, a removal with it, below which there is an older value.
    table(&[put(2, "early", None), put(2, "late", Some("new"))]);
    table(&[put(2, "late", Some("newer")), put(3, "kept", Some("v"))]);
    drop(merging);
    let tables = core.tree.table_count();
    let (from, to) = keys::generation_range(replica, 2);
    let merging = core.merging.lock().unwrap();
    engine.forget_range(&from, &to).unwrap();
    assert_eq!(core.tree.table_count(), tables, "not while tables are merged");
    drop(merging);
    let mut from = Vec::new();
    while !generations::destroy(&engine, replica, 2, &mut from, 100).unwrap() {}
    engine.sync().unwrap();
    assert!(generations::is_empty(&engine, replica, 2).unwrap());
    drop(engine);
    let engine = open(&home.path().join("state"));
    assert!(generations::is_empty(&engine, replica, 2).unwrap());
    for generation in [1, 3] {
        let key = keys::user_key(replica, generation, b"kept");
        assert_eq!(engine.get(&key).unwrap().unwrap(), "v");
    }
}

#[test]
fn a_generation_that_has_tables_of_its_own_goes_without_a_mark_for_each_key() {
    use crate::storage::generations;
    let home = tempfile::tempdir().unwrap();
    let engine = open(&home.path().join("state"));
    let replica = ReplicaId(3);
    let batch: Vec<Mutation> = (0..1000u32)
        .map(|key| (keys::user_key(replica, 2, &key.to_be_bytes()), Some(Bytes::from(vec![7; 1000]))))
        .collect();
    engine.write(&batch).unwrap();
    engine.sync().unwrap();
    let begun = Instant::now();
    let (first, end) = keys::generation_range(replica, 2);
    // Unless the thread that merges is looking for something to merge just then.
    while engine.disk_bytes() > 100_000 {
        engine.forget_range(&first, &end).unwrap();
        assert!(begun.elapsed() < PATIENCE);
    }
    let mut from = Vec::new();
    assert!(generations::destroy(&engine, replica, 2, &mut from, 1).unwrap(), "there is nothing left");
    assert!(engine.core.view.load().pending.is_empty(), "nothing was written");
}
