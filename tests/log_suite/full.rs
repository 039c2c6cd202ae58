//! A log whose disk is full: nothing is written, nothing is acknowledged, and nothing is lost.

use std::path::Path;
use std::sync::Mutex;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use pontoon::ids::Incarnation;
use pontoon::limits;
use pontoon::node::log_writer::{LogWriter, PersistSink, WriteTask};

use super::lossy_fs::LossyFs;
use super::power::SMALL;
use super::*;

const LONG: Duration = Duration::from_secs(10);

/// How much of a write finds room: nothing, a part, or another file's head beside it.
const ROOMS: [usize; 6] = [0, 1, 16, 600, 1_500, 2_990];

fn great_write() -> LogWrite {
    LogWrite {
        replica: ReplicaId(1),
        entries: vec![entry(7, 6, 3_000)],
        hard_state: Some(hard_state(6, 1, 6)),
        membership: None,
    }
}

fn one_entry(dir: &Path, fs: &LossyFs) -> DiskLog<LossyFs> {
    let log =
        DiskLog::open_with_file_system(&dir.join("log"), options(), STORE, Arc::new(fs.clone())).unwrap();
    log.create(&[record(1)]).unwrap();
    log.write(&[write(1, 6..=6, 6)]).unwrap();
    log
}

fn reopen(dir: &Path) -> DiskLog<LossyFs> {
    DiskLog::open_with_file_system(&dir.join("log"), options(), STORE, Arc::new(LossyFs::default())).unwrap()
}

#[test]
fn a_full_disk_leaves_the_log_as_it_was_and_usable() {
    for (room, killed) in ROOMS.into_iter().flat_map(|room| [(room, false), (room, true)]) {
        let dir = tempfile::tempdir().unwrap();
        let fs = LossyFs::default();
        let log = one_entry(dir.path(), &fs);
        for _ in 0..3 {
            fs.set_room(Some(room));
            let error = log.write(&[great_write()]).unwrap_err();
            assert!(error.is_full(), "{room}: {error}");
            fs.set_room(Some(0));
            assert!(log.create(&[record(2)]).unwrap_err().is_full());
            assert_eq!(terms_of(&log, 1), [(6, 6)], "{room}");
            assert_eq!(log.catalogue().unwrap().len(), 1);
        }
        fs.set_room(None);
        log.write(&[great_write()]).unwrap();
        log.create(&[record(2)]).unwrap();
        log.write(&[write(1, 8..=9, 6), write(2, 6..=6, 7)]).unwrap();
        let after = [(6, 6), (7, 6), (8, 6), (9, 6)];
        assert_eq!(terms_of(&log, 1), after);
        // Before it is closed: the file has room behind its end, and so may one that was begun in vain.
        if killed {
            fs.kill();
        } else {
            fs.power_loss(room as u64);
        }
        drop(log);
        let log = reopen(dir.path());
        assert_eq!((terms_of(&log, 1), terms_of(&log, 2)), (after.to_vec(), vec![(6, 7)]), "{room}");
        assert_eq!(log.load(ReplicaId(1)).unwrap().hard_state.vote, 1);
    }
}

#[test]
fn a_power_loss_on_a_full_disk_brings_nothing_up() {
    for room in ROOMS {
        let dir = tempfile::tempdir().unwrap();
        let fs = LossyFs::default();
        let log = one_entry(dir.path(), &fs);
        fs.set_room(Some(room));
        assert!(log.write(&[great_write()]).unwrap_err().is_full());
        fs.power_loss(room as u64);
        drop(log);
        let log = reopen(dir.path());
        assert_eq!(terms_of(&log, 1), [(6, 6)], "{room}");
        log.write(&[write(1, 7..=7, 7)]).unwrap();
    }
}

#[test]
fn a_kill_after_a_purge_that_met_a_full_disk_loses_nothing() {
    let mut failed = 0;
    for room in ROOMS {
        let dir = tempfile::tempdir().unwrap();
        let fs = LossyFs::default();
        let open =
            || DiskLog::open_with_file_system(&dir.path().join("log"), SMALL, STORE, Arc::new(fs.clone()));
        let log = open().unwrap();
        log.create(&[record(1), record(2)]).unwrap();
        log.write(&[write(2, 6..=8, 6)]).unwrap();
        for round in 0..20 {
            log.write(&[LogWrite { entries: vec![entry(6 + round, 6, 900)], ..write(1, 6..=6, 6) }]).unwrap();
            if round > 4 {
                log.compact(ReplicaId(1), Position { index: 2 + round, term: 6 }).unwrap();
            }
            fs.set_room(Some(room));
            failed += usize::from(log.purge().is_err());
            fs.set_room(None);
            if round % 3 == 0 {
                log.purge().unwrap();
            }
        }
        let before = [1, 2].map(|replica| terms_of(&log, replica));
        fs.kill();
        drop(log);
        let log = DiskLog::open_with_file_system(
            &dir.path().join("log"),
            SMALL,
            STORE,
            Arc::new(LossyFs::default()),
        )
        .unwrap_or_else(|error| panic!("{room}: {error}"));
        // The last compaction, which no purge has synced, may be gone.
        for (replica, before) in [1, 2].into_iter().zip(before) {
            let after = terms_of(&log, replica);
            assert!(after.ends_with(&before), "{room}, replica {replica}: {after:?}, before: {before:?}");
        }
    }
    assert!(failed > 0, "no purge has met a full disk");
}

struct Told(Mutex<mpsc::Sender<u64>>);

impl PersistSink for Told {
    fn persisted(&self, batch: &[(ReplicaId, Incarnation, u64)]) {
        for (_, _, number) in batch {
            self.0.lock().unwrap().send(*number).unwrap();
        }
    }
}

/// A writer over a log with one entry, what it persists, and why it failed.
struct Writer {
    fs: LossyFs,
    writer: LogWriter,
    sink: Arc<Told>,
    persisted: mpsc::Receiver<u64>,
    failed: mpsc::Receiver<String>,
    _dir: tempfile::TempDir,
}

impl Writer {
    fn new() -> Writer {
        let dir = tempfile::tempdir().unwrap();
        let fs = LossyFs::default();
        let log = Arc::new(one_entry(dir.path(), &fs));
        let (told, persisted) = mpsc::channel();
        let (fails, failed) = mpsc::channel();
        let fails = Mutex::new(fails);
        let on_fatal = move |reason| fails.lock().unwrap().send(reason).unwrap();
        let writer = LogWriter::start(log, Box::new(on_fatal));
        Writer { fs, writer, sink: Arc::new(Told(Mutex::new(told))), persisted, failed, _dir: dir }
    }

    fn submit(&self, number: u64, write: LogWrite) {
        let done = self.sink.clone();
        self.writer.submit(vec![WriteTask { incarnation: 1, number, write, done, stamps: None }]);
    }
}

#[test]
fn the_writer_waits_for_space_and_says_for_how_long() {
    let w = Writer::new();
    w.fs.set_room(Some(100));
    w.submit(1, great_write());
    w.submit(2, write(1, 8..=8, 6));
    let begun = Instant::now();
    while w.writer.under_way() < Duration::from_millis(limits::LOG_STALL_MS) {
        assert!(begun.elapsed() < LONG, "it isn't told that the write takes long");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(w.persisted.try_recv().is_err(), "nothing is acknowledged");
    assert!(w.failed.try_recv().is_err(), "and nothing has failed");
    w.fs.set_room(None);
    assert_eq!([w.persisted.recv_timeout(LONG), w.persisted.recv_timeout(LONG)], [Ok(1), Ok(2)]);
    let begun = Instant::now();
    while !w.writer.under_way().is_zero() {
        assert!(begun.elapsed() < LONG, "nothing is under way any more");
        std::thread::yield_now();
    }
}

#[test]
fn the_writer_stops_although_the_disk_is_full() {
    let w = Writer::new();
    w.fs.set_room(Some(0));
    w.submit(1, great_write());
    w.submit(2, write(1, 8..=8, 6));
    let begun = Instant::now();
    w.writer.stop();
    assert!(begun.elapsed() < LONG, "{:?}", begun.elapsed());
    assert!(w.persisted.try_recv().is_err() && w.failed.try_recv().is_err());
}

#[test]
fn a_failed_sync_is_the_end_and_says_so() {
    let w = Writer::new();
    w.fs.fail_sync_after(0);
    w.submit(1, write(1, 7..=7, 6));
    let reason = w.failed.recv_timeout(LONG).expect("the node is told");
    assert!(reason.starts_with("syncing ") && reason.contains("the node must stop"), "{reason}");
    w.submit(2, write(1, 8..=8, 6));
    assert!(w.persisted.recv_timeout(Duration::from_millis(200)).is_err(), "nothing is acknowledged");
}
