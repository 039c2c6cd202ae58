//! Tests of [`super`]: that damage is seen, and that nothing that sled does by itself is taken for it.

use std::collections::BTreeMap;
use std::ops::Bound;

use bytes::Bytes;

use super::*;
use crate::ids::RandomId;
use crate::storage::engine::{Engine, Mutation};
use crate::storage::engine_sled::{SledEngine, SledOptions};
use crate::storage::sled_record::Record;

const STORE: RandomId = RandomId([3; 16]);

type Content = BTreeMap<Vec<u8>, Bytes>;

fn open(home: &Path) -> Result<SledEngine, StorageError> {
    SledEngine::open(&home.join("state"), SledOptions { synchronous: false, ..SledOptions::default() }, STORE)
}

fn content(engine: &SledEngine) -> Result<Content, StorageError> {
    let mut content = Content::new();
    engine.scan(Bound::Included(&[]), &[], &mut |key, value| {
        content.insert(key.to_vec(), value);
        true
    })?;
    Ok(content)
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for item in fs::read_dir(from).unwrap() {
        let item = item.unwrap();
        if item.file_type().unwrap().is_dir() {
            copy(&item.path(), &to.join(item.file_name()));
        } else {
            fs::copy(item.path(), to.join(item.file_name())).unwrap();
        }
    }
}

fn fresh_copy(from: &Path) -> tempfile::TempDir {
    let to = tempfile::tempdir().unwrap();
    copy(from, to.path());
    to
}

/// A small generator, so that each run is the same.
struct Draw(u64);

impl Draw {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % end
    }

    /// Changes of random keys, some of them removals.
    fn batch(&mut self, changes: u64, keys: u64, value_bytes: u64) -> Vec<Mutation> {
        let batch: BTreeMap<_, _> = (0..changes)
            .map(|_| {
                let key = format!("key-{:06}", self.below(keys)).into_bytes();
                let fill = self.below(256) as u8;
                let value = (self.below(8) > 0).then(|| vec![fill; self.below(value_bytes) as usize].into());
                (key, value)
            })
            .collect();
        batch.into_iter().collect()
    }
}

/// A closed store that was written and synced several times since it was opened.
fn store() -> (tempfile::TempDir, Content) {
    let home = tempfile::tempdir().unwrap();
    let mut draw = Draw(88);
    let engine = open(home.path()).unwrap();
    for _ in 0..12 {
        engine.write(&draw.batch(600, 4000, 400)).unwrap();
        engine.sync().unwrap();
    }
    let content = content(&engine).unwrap();
    drop(engine);
    (home, content)
}

/// What opening and reading a damaged store comes to: its content, unless it is refused.
fn outcome(home: &Path) -> Option<Content> {
    let found = open(home).and_then(|engine| content(&engine));
    match found {
        Ok(content) => Some(content),
        Err(StorageError::Damaged { .. }) => None,
        Err(error) => panic!("{error}"),
    }
}

fn segment_lsns(home: &Path) -> Vec<Seen> {
    let db = File::open(home.join("state").join("db")).unwrap();
    let count = segments_in(db.metadata().unwrap().len());
    (0..count).map(|index| look(&db, index).unwrap()).collect()
}

#[test]
fn the_form_of_the_file_is_understood() {
    let (home, _) = store();
    let seen = segment_lsns(home.path());
    assert!(seen.len() > 3, "{seen:?}");
    let db = File::open(home.path().join("state").join("db")).unwrap();
    let last = seen.iter().filter_map(Seen::lsn).max().unwrap();
    let mut buffer = Vec::new();
    for (index, seen) in seen.iter().enumerate() {
        let Seen::Head { lsn, .. } = *seen else { panic!("segment {index} is {seen:?}") };
        assert_eq!(lsn % SEGMENT_BYTES as u64, 0);
        read_segment(&db, index, &mut buffer).unwrap();
        let end = messages_end(&buffer, lsn, 0);
        if lsn == last {
            assert!(matches!(end, End::Early(at) if at > SEGMENT_HEAD_BYTES), "{end:?}");
        } else {
            assert_eq!(end, End::Full(SEGMENT_BYTES));
        }
    }
}

/// sled by itself opens many of them without a word, and with other values.
#[test]
fn a_flipped_bit_is_never_a_wrong_value() {
    let (home, expected) = store();
    let bytes = fs::read(home.path().join("state").join("db")).unwrap();
    let mut draw = Draw(5);
    let (mut refused, mut unnoticed_by_sled) = (0, 0);
    for round in 0..60 {
        let copied = fresh_copy(home.path());
        let db = copied.path().join("state").join("db");
        let segment = draw.below(bytes.len() as u64 / SEGMENT_BYTES as u64) as usize * SEGMENT_BYTES;
        let at = match round % 4 {
            0 => segment + draw.below(SEGMENT_HEAD_BYTES as u64) as usize,
            _ => draw.below(bytes.len() as u64) as usize,
        };
        let mut flipped = bytes.clone();
        flipped[at] ^= 1 << draw.below(8);
        fs::write(&db, &flipped).unwrap();
        if round % 2 == 0 {
            let raw = tempfile::tempdir().unwrap();
            copy(&copied.path().join("state"), &raw.path().join("state"));
            let read = std::panic::catch_unwind(|| {
                let db = sled::Config::new().path(raw.path().join("state")).open()?;
                db.iter().map(|item| item.map(|_| ())).collect::<sled::Result<Vec<()>>>()
            });
            unnoticed_by_sled +=
                usize::from(matches!(read, Ok(Ok(found)) if found.len() != expected.len() + 2));
        }
        match outcome(copied.path()) {
            Some(found) => {
                assert!(without_records(found) == without_records(expected.clone()), "a bit at {at}")
            }
            None => refused += 1,
        }
    }
    assert!(refused > 40, "{refused} refused");
    assert!(unnoticed_by_sled > 0, "then sled has got better, and this is not needed any more");
}

/// Without what the engine keeps for itself.
fn without_records(mut content: Content) -> Content {
    content.retain(|key, _| key.starts_with(b"key-"));
    content
}

#[test]
fn a_file_that_is_cut_old_or_gone_is_refused() {
    let older = tempfile::tempdir().unwrap();
    let home = tempfile::tempdir().unwrap();
    let mut draw = Draw(9);
    let engine = open(home.path()).unwrap();
    for round in 0..10 {
        engine.write(&draw.batch(600, 4000, 400)).unwrap();
        engine.sync().unwrap();
        if round == 6 {
            copy(home.path(), older.path());
        }
    }
    drop(engine);
    let db = |home: &Path| home.join("state").join("db");
    let len = fs::metadata(db(home.path())).unwrap().len();
    for cut in
        [0, 1, SEGMENT_BYTES as u64, len / 2, len - SEGMENT_BYTES as u64, len - len % SEGMENT_BYTES as u64]
    {
        if cut == len {
            continue;
        }
        let copied = fresh_copy(home.path());
        OpenOptions::new().write(true).open(db(copied.path())).unwrap().set_len(cut).unwrap();
        assert!(outcome(copied.path()).is_none(), "cut to {cut} of {len}");
    }
    let copied = fresh_copy(home.path());
    fs::remove_file(db(copied.path())).unwrap();
    assert!(outcome(copied.path()).is_none(), "the file is gone");
    let copied = fresh_copy(home.path());
    fs::remove_dir_all(copied.path().join("state")).unwrap();
    assert!(outcome(copied.path()).is_none(), "all files are gone");
    let copied = fresh_copy(home.path());
    fs::copy(db(older.path()), db(copied.path())).unwrap();
    assert!(outcome(copied.path()).is_none(), "an older file");
    let copied = fresh_copy(home.path());
    fs::remove_dir_all(copied.path().join("state")).unwrap();
    copy(&older.path().join("state"), &copied.path().join("state"));
    assert!(outcome(copied.path()).is_none(), "an older directory");
    let copied = fresh_copy(home.path());
    fs::remove_file(copied.path().join("state.sums")).unwrap();
    assert!(outcome(copied.path()).is_none(), "the sums are gone");
    // Sums of an earlier sync tell less, and the store is whole.
    let copied = fresh_copy(home.path());
    fs::copy(older.path().join("state.sums"), copied.path().join("state.sums")).unwrap();
    assert!(outcome(copied.path()).is_some(), "older sums");
}

#[test]
fn damaged_sums_never_make_a_wrong_value() {
    let (home, expected) = store();
    let bytes = fs::read(home.path().join("state.sums")).unwrap();
    let mut draw = Draw(17);
    for round in 0..24 {
        let copied = fresh_copy(home.path());
        let mut damaged = bytes.clone();
        match round % 2 {
            0 => damaged.truncate(draw.below(bytes.len() as u64) as usize),
            _ => damaged[draw.below(bytes.len() as u64) as usize] ^= 1 << draw.below(8),
        }
        fs::write(copied.path().join("state.sums"), damaged).unwrap();
        match open(copied.path()).and_then(|engine| content(&engine)) {
            Ok(found) => assert!(found == expected),
            Err(StorageError::Damaged { .. } | StorageError::Identity(IdentityError::Newer { .. })) => {}
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn what_sled_can_make_anew_is_no_loss() {
    let (home, expected) = store();
    // Opened once more, so that there is a snapshot of where pages are.
    drop(open(home.path()).unwrap());
    let names = |home: &Path| -> Vec<PathBuf> {
        let items = fs::read_dir(home.join("state")).unwrap();
        items
            .map(|item| item.unwrap().path())
            .filter(|path| path.is_file() && !path.ends_with("db"))
            .collect()
    };
    assert!(names(home.path()).len() >= 2, "{:?}", names(home.path()));
    for original in names(home.path()) {
        let bytes = fs::read(&original).unwrap();
        for damage in ["flip", "cut", "empty", "remove"] {
            let copied = fresh_copy(home.path());
            let path = copied.path().join("state").join(original.file_name().unwrap());
            let mut changed = bytes.clone();
            match damage {
                "flip" => changed[bytes.len() / 2] ^= 4,
                "cut" => changed.truncate(bytes.len() / 2),
                _ => changed.clear(),
            }
            match damage {
                "remove" => fs::remove_file(&path).unwrap(),
                _ => fs::write(&path, changed).unwrap(),
            }
            let found = outcome(copied.path());
            assert!(found.as_ref() == Some(&expected), "{damage} {}", original.display());
        }
    }
}

/// Overwriting and removing make sled use segments again and cut its file. At each sync, and between any
/// two, a killed process leaves a store that opens with all of it.
#[test]
fn nothing_that_sled_does_is_taken_for_damage() {
    let home = tempfile::tempdir().unwrap();
    let mut draw = Draw(2024);
    let mut engine = open(home.path()).unwrap();
    let (mut reused, mut cut) = (0, 0);
    let mut before = Vec::new();
    for round in 0.. {
        // Whether sled cuts its file while there is something to cut is a matter of its threads.
        if round >= 90 && (cut > 0 || round >= 900) {
            break;
        }
        // Grows, then shrinks, then is overwritten in place.
        let batch = match round % 30 {
            0..10 => draw.batch(700, 6000, 700),
            10..16 => {
                let from = draw.below(5000);
                (from..from + 900).map(|n| (format!("key-{n:06}").into_bytes(), None)).collect()
            }
            _ => draw.batch(700, 1200, 300),
        };
        for part in batch.chunks(256) {
            engine.write(part).unwrap();
        }
        if round % 5 == 3 {
            // Killed before the sync: what is there is any part of the last writes over what was synced.
            let copied = fresh_copy(home.path());
            let engine =
                open(copied.path()).unwrap_or_else(|error| panic!("round {round}, unsynced: {error}"));
            content(&engine).unwrap();
        }
        engine.sync().unwrap();
        if round % 6 == 1 {
            let copied = fresh_copy(home.path());
            let opened = open(copied.path()).unwrap_or_else(|error| panic!("round {round}: {error}"));
            assert!(content(&opened).unwrap() == content(&engine).unwrap(), "round {round}");
        }
        let now = segment_lsns(home.path());
        cut += usize::from(now.len() < before.len());
        reused += now.iter().zip(&before).filter(|(now, before)| now != before).count();
        before = now;
        if round % 13 == 12 {
            // A close writes what is left, a start fills free space.
            let expected = content(&engine).unwrap();
            drop(engine);
            engine = open(home.path()).unwrap_or_else(|error| panic!("round {round}, reopened: {error}"));
            assert!(content(&engine).unwrap() == expected, "round {round}");
            before = segment_lsns(home.path());
        }
    }
    assert!(reused > 20 && cut > 0, "{reused} segments used again, {cut} cuts");
}

#[test]
fn a_kill_while_sled_opens_is_no_damage() {
    let (home, expected) = store();
    let dir = home.path().join("state");
    // Free space, which an opening fills.
    let engine = open(home.path()).unwrap();
    for _ in 0..4 {
        engine.write(&Draw(1).batch(900, 900, 900)).unwrap();
        engine.sync().unwrap();
    }
    let expected_now = content(&engine).unwrap();
    assert!(expected_now.len() >= expected.len() / 2);
    drop(engine);
    let sums = SledSums::open(&dir).unwrap();
    assert!(sums.known());
    let raw = sled::Config::new().path(&dir).flush_every_ms(None).open().unwrap();
    let copied = fresh_copy(home.path());
    drop((raw, sums));
    assert!(outcome(copied.path()) == Some(expected_now));
}

/// The head of a segment.
fn head(lsn: u64) -> Vec<u8> {
    let numbers = [lsn, 0].map(|number| (number ^ (u64::MAX >> 1)).to_le_bytes()).concat();
    [&(crc32fast::hash(&numbers) ^ u32::MAX).to_le_bytes()[..], &numbers].concat()
}

/// A store with two segments at its end that sled has no use for, as it is before it has cut them off, and
/// sums of that as of an open store.
fn with_free_segments() -> (tempfile::TempDir, SledSums) {
    let (home, _) = store();
    let dir = home.path().join("state");
    let mut bytes = fs::read(dir.join("db")).unwrap();
    for _ in 0..2 {
        bytes.resize(bytes.len().next_multiple_of(SEGMENT_BYTES), 0);
        bytes.extend(head(0));
    }
    bytes.resize(bytes.len().next_multiple_of(SEGMENT_BYTES), 0);
    fs::write(dir.join("db"), bytes).unwrap();
    fs::remove_file(home.path().join("state.sums")).unwrap();
    let mut sums = SledSums::open(&dir).unwrap();
    sums.seal(sums.store_bytes().unwrap()).unwrap();
    (home, sums)
}

/// The same, killed.
fn killed() -> tempfile::TempDir {
    let (home, mut sums) = with_free_segments();
    sums.distrust();
    home
}

fn cut_off(home: &Path, bytes: u64) {
    let db = OpenOptions::new().write(true).open(home.join("state").join("db")).unwrap();
    db.set_len(db.metadata().unwrap().len() - bytes).unwrap();
}

fn sealed(home: &Path) -> (usize, u8) {
    let (segments, kind) = read(&home.join("state.sums")).unwrap().unwrap();
    (segments.len(), kind)
}

/// Whether the next start takes the store for whole.
fn fits(home: &Path) -> bool {
    match SledSums::open(&home.join("state")) {
        Ok(_) => true,
        Err(StorageError::Damaged { .. }) => false,
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn a_cut_after_a_sync_and_a_kill_are_no_damage() {
    let home = killed();
    let segment = SEGMENT_BYTES as u64;
    let seen = segment_lsns(home.path());
    let newest = (0..seen.len()).max_by_key(|index| seen[*index].lsn()).unwrap();
    // What sled doesn't cut: a part of a segment, and the newest one.
    let with_newest = (seen.len() - newest) as u64 * segment;
    for (bytes, whole) in [(0, true), (segment, true), (2 * segment, true), (1, false), (with_newest, false)]
    {
        let copied = fresh_copy(home.path());
        cut_off(copied.path(), bytes);
        assert_eq!(fits(copied.path()), whole, "cut by {bytes} bytes");
    }
}

#[test]
fn a_power_loss_may_take_a_cut_back() {
    let home = killed();
    let mut sums = SledSums::open(&home.path().join("state")).unwrap();
    let uncut = fresh_copy(home.path());
    let before = sums.store_bytes().unwrap();
    cut_off(home.path(), SEGMENT_BYTES as u64);
    sums.seal(before).unwrap();
    assert_eq!(sealed(home.path()).0, segments_in(before));
    fs::copy(home.path().join("state.sums"), uncut.path().join("state.sums")).unwrap();
    assert!(fits(uncut.path()));
    // The next sync has it on disk.
    sums.seal(sums.store_bytes().unwrap()).unwrap();
    assert_eq!(sealed(home.path()).0, segments_in(before) - 1);
}

#[test]
fn a_store_is_closed_when_nobody_is_left_who_might_cut_it() {
    let (home, expected) = store();
    assert_eq!(sealed(home.path()).1, SEALED);
    let engine = open(home.path()).unwrap();
    assert_eq!(sealed(home.path()).1, SEALED_OPEN, "opening has synced it");
    drop(engine);
    assert_eq!(sealed(home.path()).1, SEALED);
    assert!(outcome(home.path()) == Some(expected));
    for late in [false, true] {
        let (home, sums) = with_free_segments();
        let count = sums.segments.len();
        // As a thread of sled's that still has the file.
        let db = File::open(home.path().join("state").join("db")).unwrap();
        db.lock().unwrap();
        let closing = std::thread::spawn(move || drop(sums));
        if late {
            closing.join().unwrap();
            assert_eq!(sealed(home.path()), (count, SEALED_OPEN));
            cut_off(home.path(), 2 * SEGMENT_BYTES as u64);
        } else {
            cut_off(home.path(), 2 * SEGMENT_BYTES as u64);
            drop(db);
            closing.join().unwrap();
            assert_eq!(sealed(home.path()), (count - 2, SEALED));
        }
        assert!(fits(home.path()), "late: {late}");
    }
    // From then on nothing is cut.
    let (home, sums) = with_free_segments();
    drop(sums);
    cut_off(home.path(), SEGMENT_BYTES as u64);
    assert!(!fits(home.path()));
}

#[test]
fn a_hole_before_a_newer_segment_is_no_damage() {
    let home = killed();
    let newer = segment_lsns(home.path()).iter().filter_map(Seen::lsn).max().unwrap() + SEGMENT_BYTES as u64;
    let count = sealed(home.path()).0;
    // Cut by two, and then the second of two new ones is written first.
    cut_off(home.path(), 2 * SEGMENT_BYTES as u64);
    let db = OpenOptions::new().write(true).open(home.path().join("state").join("db")).unwrap();
    db.write_all_at(&head(newer), (count as u64 - 1) * SEGMENT_BYTES as u64).unwrap();
    assert_eq!(segment_lsns(home.path())[count - 2], Seen::Blank);
    assert!(fits(fresh_copy(home.path()).path()));
    db.write_all_at(&[1], (count as u64 - 2) * SEGMENT_BYTES as u64 + 999).unwrap();
    assert!(!fits(home.path()), "only its head is gone");
}

#[test]
fn a_store_from_before_there_were_sums_gets_them() {
    let (home, expected) = store();
    let dir = home.path().join("state");
    let raw = sled::Config::new().path(&dir).flush_every_ms(None).open().unwrap();
    let format = crate::storage::keys::format_key();
    let mut record = Vec::new();
    Record::encode_inline(&1u32.to_be_bytes(), &mut record);
    raw.insert(format, record).unwrap();
    raw.flush().unwrap();
    drop(raw);
    fs::remove_file(home.path().join("state.sums")).unwrap();
    assert!(outcome(home.path()) == Some(expected));
    fs::remove_file(home.path().join("state.sums")).unwrap();
    assert!(outcome(home.path()).is_none(), "from then on they belong to it");
}
