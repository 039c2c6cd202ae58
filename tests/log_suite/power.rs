//! The log on a disk that loses power and fails syncs.
//!
//! A run writes to a few replicas, compacts, purges, creates and removes, until the power goes, or the
//! process is killed, at some operation of the file system, in the middle of a write for the most part. The log is then
//! opened again from what reached the disk and compared with a model: everything for which a call
//! returned before the power went is there. The call under way is there whole or not at all. The
//! run goes on from there, several times, so that recovered logs are broken too.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use pontoon::storage::log_disk::env::FileSystem;

use pontoon::storage::log::RecordedMembership;

use super::lossy_fs::{LossyFs, Rng};
use super::*;

const CRASHES: u64 = 4;
const STEPS: u64 = 40;

/// Small files, so that there are many.
pub(super) const SMALL: DiskLogOptions =
    DiskLogOptions { file_bytes: 4 << 10, purge_bytes: 16 << 10, spare_files: 1 };

fn open(dir: &Path, fs: &LossyFs) -> Result<DiskLog<LossyFs>, StorageError> {
    DiskLog::open_with_file_system(dir, SMALL, STORE, Arc::new(fs.clone()))
}

/// What one replica's log must hold.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Expected {
    hard_state: HardState,
    /// From the truncated position that is certainly durable on.
    entries: BTreeMap<Index, Entry>,
    /// Where it was compacted, durably or not.
    truncated: Position,
    last: Index,
    removed: bool,
    /// Grows with each installed snapshot.
    generation: u32,
    /// The last of these: the log never begins before it.
    installed: Position,
    /// In its record.
    membership: RecordedMembership,
}

pub(super) type Model = BTreeMap<u64, Expected>;

fn expected() -> Expected {
    Expected {
        hard_state: hard_state(GROUP_START.term, 0, GROUP_START.index),
        entries: BTreeMap::new(),
        truncated: GROUP_START,
        last: GROUP_START.index,
        removed: false,
        generation: record(1).generation,
        installed: GROUP_START,
        membership: RecordedMembership::default(),
    }
}

/// One random call on the log: how it ended, and the model as it is if the call was carried out.
pub(super) fn step<F: FileSystem>(
    log: &DiskLog<F>,
    model: &Model,
    rng: &mut Rng,
) -> (Result<(), StorageError>, Model) {
    let mut after = model.clone();
    let living: Vec<u64> = model.iter().filter(|(_, e)| !e.removed).map(|(r, _)| *r).collect();
    let some = living.get(rng.below(living.len().max(1) as u64) as usize);
    let result = match (rng.below(16), some) {
        (0, _) | (_, None) => {
            let new = model.len() as u64 + 1;
            after.insert(new, expected());
            after.insert(new + 1, expected());
            log.create(&[record(new), record(new + 1)])
        }
        (1, Some(replica)) if living.len() > 3 => {
            after.get_mut(replica).unwrap().removed = true;
            log.remove(&[ReplicaId(*replica)])
        }
        (2 | 3, Some(replica)) => {
            let e = after.get_mut(replica).unwrap();
            let index = e.truncated.index + rng.below(e.last - e.truncated.index + 1);
            if index > e.truncated.index {
                let term = e.entries[&index].term;
                e.truncated = Position { index, term };
                log.compact(ReplicaId(*replica), e.truncated)
            } else {
                Ok(())
            }
        }
        (4, Some(_)) => log.purge().map(|_| ()),
        (5, Some(replica)) => {
            let e = after.get_mut(replica).unwrap();
            let floor = e.hard_state.commit.max(e.truncated.index);
            // Beyond the log for the most part; else its entry there is of another term.
            let index = floor + 1 + rng.below(e.last - floor + 4);
            let position = Position { index, term: e.hard_state.term + 1 };
            let leader_term = position.term + rng.below(2);
            e.generation += 1;
            e.installed = position;
            e.truncated = position;
            e.entries.clear();
            e.last = index;
            e.hard_state = hard_state(leader_term, 0, index);
            let install = install(e.generation, index, position.term, leader_term);
            let (epoch, members) = (install.epoch, install.members.clone());
            e.membership = RecordedMembership { index, epoch, members };
            log.install(ReplicaId(*replica), &install)
        }
        _ => {
            let mut writes = Vec::new();
            for replica in &living {
                if rng.below(3) == 0 {
                    continue;
                }
                let e = after.get_mut(replica).unwrap();
                // Now and then a new term replaces what isn't committed.
                let floor = e.hard_state.commit.max(e.truncated.index);
                let mut term = e.hard_state.term;
                let mut first = e.last + 1;
                if rng.below(4) == 0 {
                    term += 1;
                    first = floor + 1 + rng.below(e.last - floor + 1);
                }
                let count = rng.below(4);
                let entries: Vec<Entry> =
                    (first..first + count).map(|index| entry(index, term, rng.below(700) as usize)).collect();
                if count > 0 {
                    e.entries.split_off(&first);
                    e.entries.extend(entries.iter().map(|entry| (entry.index, entry.clone())));
                    e.last = first + count - 1;
                }
                let commit = floor.max(e.last.saturating_sub(rng.below(4)));
                e.hard_state = hard_state(term, rng.below(3), commit);
                let membership = (rng.below(4) == 0).then(|| members_at(commit));
                if let Some(membership) = membership.as_ref().filter(|m| m.index > e.membership.index) {
                    e.membership = membership.clone();
                }
                writes.push(LogWrite {
                    replica: ReplicaId(*replica),
                    entries,
                    hard_state: Some(e.hard_state.clone()),
                    membership,
                });
            }
            log.write(&writes)
        }
    };
    (result, after)
}

/// Whether the log holds what the model says. A compaction may have been lost, but not one whose
/// entries are gone: `entries` in the model go back to the first replica's first.
pub(super) fn compare<F: FileSystem>(log: &DiskLog<F>, model: &Model) -> Result<(), String> {
    let catalogue = log.catalogue().map_err(|e| e.to_string())?;
    if catalogue.len() != model.len() {
        return Err(format!("{} replicas, not {}", catalogue.len(), model.len()));
    }
    for record in catalogue {
        let replica = record.replica;
        let e = model.get(&replica.0).ok_or("unknown replica")?;
        if (record.phase != ReplicaPhase::Active) != e.removed {
            return Err(format!("replica {replica} is {:?}", record.phase));
        }
        if e.removed {
            continue;
        }
        if record.generation != e.generation {
            return Err(format!("replica {replica} has generation {}", record.generation));
        }
        let state = log.load(replica).map_err(|e| e.to_string())?;
        let low = state.truncated.index;
        let found = log.entries(replica, low + 1, state.last + 1, usize::MAX).map_err(|e| e.to_string())?;
        let wanted: Vec<Entry> = e.entries.range(low + 1..).map(|(_, entry)| entry.clone()).collect();
        if state.hard_state != e.hard_state
            || state.last != e.last
            || (state.membership != e.membership && e.membership.index > 0)
            || low > e.truncated.index
            || low < e.installed.index
            || (low == e.installed.index && state.truncated != e.installed)
            || found != wanted
        {
            return Err(format!("replica {replica}: {state:?} and {} entries, not {e:?}", found.len()));
        }
    }
    Ok(())
}

/// One run. Returns the number of calls that were cut short and found done, and not done.
fn run(seed: u64) -> (u32, u32) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let mut rng = Rng(seed);
    let mut model = Model::new();
    let mut ends = (0, 0);
    for crash in 0..CRASHES {
        let fs = LossyFs::default();
        let mut in_doubt = None;
        if crash > 0 && rng.below(4) == 0 {
            // Now and then the power goes again while the log recovers.
            fs.power_loss_after(rng.below(6), rng.below(u64::MAX));
        }
        match open(&path, &fs) {
            Ok(log) if !fs.is_dead() => {
                compare(&log, &model).unwrap_or_else(|e| panic!("seed {seed}, {crash}: {e}"));
                match rng.below(4) {
                    0 => fs.kill_after(rng.below(160)),
                    _ => fs.power_loss_after(rng.below(160), rng.below(u64::MAX)),
                }
                for _ in 0..STEPS {
                    let (result, after) = step(&log, &model, &mut rng);
                    if fs.is_dead() {
                        in_doubt = Some(after);
                        break;
                    }
                    result.unwrap_or_else(|e| panic!("seed {seed}, {crash}: {e}"));
                    model = after;
                }
                fs.power_loss(rng.below(u64::MAX));
            }
            Ok(_) => {}
            Err(e) => assert!(fs.is_dead(), "seed {seed}, {crash}: {e}"),
        }
        let fs = LossyFs::default();
        let log = open(&path, &fs).unwrap_or_else(|e| panic!("seed {seed}, {crash}: {e}"));
        if let Some(after) = in_doubt {
            let without = compare(&log, &model);
            if let Err(with) = compare(&log, &after) {
                if let Err(without) = without {
                    panic!(
                        "seed {seed}, {crash}: neither with the last call ({with}) nor without it ({without})"
                    );
                }
                ends.1 += 1;
            } else {
                ends.0 += 1;
                model = after;
            }
        } else {
            compare(&log, &model).unwrap_or_else(|e| panic!("seed {seed}, {crash}: {e}"));
        }
        // What is there now stays there: opening has made it durable.
        for (replica, e) in &mut model {
            if !e.removed {
                e.truncated = log.load(ReplicaId(*replica)).unwrap().truncated;
            }
        }
    }
    ends
}

#[test]
fn what_was_acknowledged_survives_power_loss_at_any_point() {
    // More of them: PONTOON_SEEDS=1000 cargo test --test log_suite power
    let seeds = std::env::var("PONTOON_SEEDS").map_or(30, |n| n.parse().expect("a number"));
    let mut ends = (0, 0);
    for seed in 0..seeds {
        let (done, undone) = run(seed);
        ends = (ends.0 + done, ends.1 + undone);
    }
    // Else the runs show less than they claim.
    assert!(ends.0 > 5 && ends.1 > 5, "{ends:?}");
}

#[test]
fn each_write_is_one_sync_and_compaction_none() {
    let dir = tempfile::tempdir().unwrap();
    let fs = LossyFs::default();
    let log = open(&dir.path().join("log"), &fs).unwrap();
    let records: Vec<ReplicaRecord> = (1..=8).map(record).collect();
    log.create(&records).unwrap();
    let before = fs.syncs();
    let writes: Vec<LogWrite> = (1..=8).map(|replica| write(replica, 6..=7, 6)).collect();
    log.write(&writes).unwrap();
    assert_eq!(fs.syncs() - before, 1);
    log.compact(ReplicaId(1), Position { index: 6, term: 6 }).unwrap();
    assert_eq!(fs.syncs() - before, 1);
    // But before files are freed, what was compacted must be durable.
    log.purge().unwrap();
    assert_eq!(fs.syncs() - before, 2);
    log.purge().unwrap();
    assert_eq!(fs.syncs() - before, 2);
}

#[test]
fn a_failed_sync_is_an_error_for_ever() {
    let dir = tempfile::tempdir().unwrap();
    let fs = LossyFs::default();
    let log = open(&dir.path().join("log"), &fs).unwrap();
    log.create(&[record(1)]).unwrap();
    log.write(&[write(1, 6..=6, 6)]).unwrap();
    fs.fail_sync_after(0);
    let failed = |result: Result<(), StorageError>| {
        assert!(matches!(result, Err(StorageError::SyncFailed { .. })), "{result:?}");
    };
    failed(log.write(&[write(1, 7..=7, 6)]));
    // The disk syncs again, but what it forgot is gone: nothing may be acknowledged any more.
    failed(log.write(&[write(1, 7..=7, 6)]));
    failed(log.create(&[record(2)]));
    failed(log.remove(&[ReplicaId(1)]));
    failed(log.compact(ReplicaId(1), Position { index: 6, term: 6 }));
    failed(log.purge().map(|_| ()));
    drop(log);
    // The engine that failed keeps its lock until the process ends: look at a copy.
    fs.power_loss(3);
    let copy = dir.path().join("copy");
    std::fs::create_dir(&copy).unwrap();
    for file in std::fs::read_dir(dir.path().join("log")).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), copy.join(file.file_name())).unwrap();
    }
    let log = open(&copy, &LossyFs::default()).unwrap();
    let last = log.load(ReplicaId(1)).unwrap().last;
    assert!(last == 6 || last == 7, "{last}");
}

/// A kill in the middle of a write leaves a part of it; a file that is used again has old content there.
#[test]
fn a_torn_tail_that_nobody_was_told_of_is_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let log = DiskLog::open(&path, options(), STORE).unwrap();
    log.create(&[record(1)]).unwrap();
    log.write(&[write(1, 6..=6, 6)]).unwrap();
    drop(log);
    let file = path.join("0000000000000001.raftlog");
    let whole = std::fs::read(&file).unwrap();
    for tail in [&whole[69..100], &[0; 4096], b"x"] {
        std::fs::write(&file, [&whole[..], tail].concat()).unwrap();
        let log = DiskLog::open(&path, options(), STORE).unwrap();
        assert_eq!(terms_of(&log, 1), [(6, 6)]);
        drop(log);
        assert_eq!(std::fs::read(&file).unwrap(), whole);
    }
}

#[test]
fn a_lost_tail_is_damage_if_the_commit_index_shows_it() {
    let dir = tempfile::tempdir().unwrap();
    let fs = LossyFs::default();
    let path = dir.path().join("log");
    let log = open(&path, &fs).unwrap();
    log.create(&[record(1)]).unwrap();
    log.write(&[write(1, 6..=6, 6)]).unwrap();
    drop(log);
    // By hand, past the checks: a commit index without its entries.
    let config = raft_engine::Config { dir: path.to_str().unwrap().into(), ..Default::default() };
    let engine = raft_engine::Engine::open(config).unwrap();
    let mut batch = raft_engine::LogBatch::default();
    batch.put_message(1, b"h".to_vec(), &hard_state(6, 1, 7)).unwrap();
    engine.write(&mut batch, true).unwrap();
    drop(engine);
    let log = open(&path, &LossyFs::default()).unwrap();
    let found = log.load(ReplicaId(1));
    assert!(matches!(found, Err(StorageError::Damaged { .. })), "{found:?}");
}

#[test]
fn a_directory_that_is_not_this_nodes_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let log = DiskLog::open(&path, options(), STORE).unwrap();
    assert!(log.is_new());
    let second = DiskLog::open(&path, options(), STORE).map(|_| ());
    assert!(matches!(second, Err(StorageError::Identity(_))), "{second:?}");
    drop(log);
    assert!(!DiskLog::open(&path, options(), STORE).unwrap().is_new());
    let other = pontoon::ids::RandomId([8; 16]);
    let foreign = DiskLog::open(&path, options(), other).map(|_| ());
    assert!(matches!(foreign, Err(StorageError::Identity(_))), "{foreign:?}");
}

#[test]
fn a_log_that_should_be_there_is_never_made_anew() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let refused = || {
        let found = DiskLog::open_existing(&path, options(), STORE).map(|_| ());
        assert!(matches!(found, Err(StorageError::Identity(_))), "{found:?}");
    };
    std::fs::create_dir(&path).unwrap();
    refused();
    assert_eq!(std::fs::read_dir(&path).unwrap().count(), 0, "nothing is put there");
    // A file without content, as after a power loss or a careless copy.
    std::fs::write(path.join("0000000000000001.raftlog"), b"").unwrap();
    for _ in 0..3 {
        refused();
    }
    drop(DiskLog::open(&path, options(), STORE).unwrap());
    DiskLog::open_existing(&path, options(), STORE).unwrap();
}

/// The log engine caches the last block read on a thread without asking whose it is.
#[test]
fn two_logs_read_on_one_thread_do_not_mix() {
    let dir = tempfile::tempdir().unwrap();
    let logs: Vec<DiskLog> = (0..2)
        .map(|i| {
            let log = DiskLog::open(&dir.path().join(i.to_string()), options(), STORE).unwrap();
            log.create(&[record(1)]).unwrap();
            let entry = Entry { data: vec![i; 9].into(), ..entry(6, 6, 0) };
            let write =
                LogWrite { replica: ReplicaId(1), entries: vec![entry], hard_state: None, membership: None };
            log.write(&[write]).unwrap();
            log
        })
        .collect();
    for _ in 0..2 {
        for (i, log) in logs.iter().enumerate() {
            let found = log.entries(ReplicaId(1), 6, 7, usize::MAX).unwrap();
            assert_eq!(found[0].data[..], [i as u8; 9]);
        }
    }
}

/// A compaction isn't synced by itself. If the files it freed went before it is durable, the log
/// would come back with the old truncated position and a gap behind it.
#[test]
fn files_are_freed_only_behind_durable_compactions() {
    for seed in 0..10 {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let fs = LossyFs::default();
        let log = open(&path, &fs).unwrap();
        log.create(&[record(1)]).unwrap();
        for first in (6..=105).step_by(10) {
            let write = LogWrite {
                entries: (first..first + 10).map(|index| entry(index, 6, 400)).collect(),
                ..write(1, first..=first, 6)
            };
            log.write(&[write]).unwrap();
        }
        let files = || std::fs::read_dir(&path).unwrap().count();
        let before = files();
        let to = Position { index: 100, term: 6 };
        log.compact(ReplicaId(1), to).unwrap();
        log.purge().unwrap();
        assert!(files() < before, "no file was freed: the case shows nothing");
        fs.power_loss(seed);
        drop(log);
        let log = open(&path, &LossyFs::default()).unwrap();
        let state = log.load(ReplicaId(1)).unwrap();
        assert_eq!((state.truncated, state.last), (to, 105));
    }
}

/// Entries are looked up and read in two steps, and a purge moves them or frees their file in
/// between. A reader must see them, or that they are compacted, never damage.
#[test]
fn reading_beside_writes_and_purges_is_never_damage() {
    let dir = tempfile::tempdir().unwrap();
    let fs = LossyFs::default();
    let log = open(&dir.path().join("log"), &fs).unwrap();
    let records: Vec<ReplicaRecord> = (1..=4).map(record).collect();
    log.create(&records).unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let (reads, compacted) = std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut rng = Rng(1);
            let mut ends = (0, 0);
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let replica = ReplicaId(1 + rng.below(4));
                let state = log.load(replica).unwrap();
                let (low, high) = (state.truncated.index + 1, state.last + 1);
                match log.entries(replica, low, high, 2000) {
                    Ok(entries) => {
                        for (i, entry) in entries.iter().enumerate() {
                            assert_eq!(entry.index, low + i as u64);
                            assert_eq!(entry.data[..], super::entry(entry.index, 6, 300).data[..]);
                        }
                        ends.0 += 1;
                    }
                    Err(StorageError::Compacted(_)) => ends.1 += 1,
                    Err(e) => panic!("{e}"),
                }
            }
            ends
        });
        let purger = scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                log.purge().unwrap();
            }
        });
        for round in 0..300 {
            let writes: Vec<LogWrite> = (1..=4)
                .map(|replica| LogWrite {
                    replica: ReplicaId(replica),
                    entries: vec![entry(6 + round, 6, 300)],
                    hard_state: None,
                    membership: None,
                })
                .collect();
            log.write(&writes).unwrap();
            if round > 20 {
                let index = round - 20 + round % 5;
                for replica in 1..=round % 4 {
                    log.compact(ReplicaId(replica), Position { index, term: 6 }).unwrap();
                }
            }
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        purger.join().unwrap();
        reader.join().unwrap()
    });
    assert!(reads > 10, "{reads} reads, {compacted} of what was gone");
}
