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
    // As after a merge for which there was no space.
    engine.core.litter(0);
    for _ in 0..8 {
        add_table(&engine, "after");
    }
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
