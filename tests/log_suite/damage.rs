//! Damage to the files of a log that nobody uses: a bit flips, a file is cut short, gone, or of an older
//! copy. The log then opens with all that was acknowledged, or it is refused with the way out, and
//! the files are as good as they were.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use pontoon::storage::log_disk::env::DefaultFileSystem;

use super::lossy_fs::Rng;
use super::power::{Model, SMALL, compare, step};
use super::*;

/// The content of a log's files and of its mark, by name.
type Image = BTreeMap<PathBuf, Vec<u8>>;

const MARK: &str = "log.mark";

fn open(dir: &Path) -> Result<DiskLog, StorageError> {
    DiskLog::open_with_file_system(&dir.join("log"), SMALL, STORE, Arc::new(DefaultFileSystem))
}

/// The files as a killed process leaves them, if the log is open.
fn image(dir: &Path) -> Image {
    let mut image = Image::new();
    for file in fs::read_dir(dir.join("log")).unwrap() {
        let name = Path::new("log").join(file.unwrap().file_name());
        image.insert(name.clone(), fs::read(dir.join(name)).unwrap());
    }
    image.insert(MARK.into(), fs::read(dir.join(MARK)).unwrap());
    image
}

fn lay_out(image: &Image) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("log")).unwrap();
    for (name, content) in image {
        fs::write(dir.path().join(name), content).unwrap();
    }
    dir
}

/// The reason of a refusal, which comes with the way out.
fn refused(result: Result<DiskLog, StorageError>) -> String {
    match result {
        Err(error @ StorageError::Damaged { .. }) => {
            let text = error.to_string();
            assert!(text.contains("serve --rejoin"), "{text}");
            text
        }
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("the log was opened"),
    }
}

/// A log of several files in both queues, of a busy replica and an idle one, closed; and what it was like
/// some writes before, closed too.
fn with_older() -> (Image, Image) {
    let dir = tempfile::tempdir().unwrap();
    let mut log = open(dir.path()).unwrap();
    log.create(&[record(1), record(2)]).unwrap();
    log.write(&[write(2, 6..=8, 6)]).unwrap();
    let mut older = Image::new();
    for round in 0..40 {
        if round == 33 {
            drop(log);
            older = image(dir.path());
            log = open(dir.path()).unwrap();
        }
        let written = LogWrite {
            entries: vec![entry(6 + round, 6, 900)],
            hard_state: Some(hard_state(6, round, 5)),
            ..write(1, 6..=6, 6)
        };
        log.write(&[written]).unwrap();
        if round > 4 {
            log.compact(ReplicaId(1), Position { index: 2 + round, term: 6 }).unwrap();
        }
        log.purge().unwrap();
    }
    drop(log);
    let last = image(dir.path());
    assert!(files(&last, "raftlog").len() > 2 && !files(&last, "rewrite").is_empty(), "{:?}", last.keys());
    (older, last)
}

fn files(image: &Image, kind: &str) -> Vec<PathBuf> {
    image.keys().filter(|name| name.extension().is_some_and(|e| e == kind)).cloned().collect()
}

fn is_whole(dir: &Path) {
    let log = open(dir).unwrap();
    let state = log.load(ReplicaId(1)).unwrap();
    assert_eq!((state.last, state.hard_state.vote), (45, 39));
    log.entries(ReplicaId(1), state.truncated.index + 1, 46, usize::MAX).unwrap();
    assert_eq!(terms_of(&log, 2), [(6, 6), (7, 6), (8, 6)]);
}

#[test]
fn whatever_becomes_of_a_file_of_the_log_is_noticed() {
    let (older, last) = with_older();
    is_whole(lay_out(&last).path());
    let mut old_copies = 0;
    for name in [files(&last, "raftlog"), files(&last, "rewrite")].concat() {
        let content = &last[&name];
        // The first rewritten file may be no more than a head.
        assert!(content.len() > 100, "{name:?} has {} bytes", content.len());
        let flip = |at: usize| {
            let mut content = content.clone();
            content[at] ^= 4;
            Some(content)
        };
        let mut damages = vec![
            ("gone", None),
            ("empty", Some(Vec::new())),
            // As a queue is that holds nothing yet.
            ("nothing but its head", Some(content[..69].to_vec())),
            ("half of it", Some(content[..content.len() / 2].to_vec())),
            ("a byte short", Some(content[..content.len() - 1].to_vec())),
            ("its head flipped", flip(20)),
            ("its first batch flipped", flip(80)),
            ("its middle flipped", flip(content.len() / 2)),
            ("its end flipped", flip(content.len() - 1)),
        ];
        if Some(&name) == files(&last, "raftlog").last() {
            // As a kill leaves it: with room behind its end.
            let with_room = |content: &[u8]| [content, &[0; 1 << 16]].concat();
            damages.push(("half of it, and room", Some(with_room(&content[..content.len() / 2]))));
            let copy = older.get(&name).filter(|copy| *copy != content);
            damages.extend(copy.map(|copy| ("an older copy, and room", Some(with_room(copy)))));
            let dir = lay_out(&last);
            fs::write(dir.path().join(&name), with_room(content)).unwrap();
            is_whole(dir.path());
        }
        if let Some(copy) = older.get(&name).filter(|copy| *copy != content) {
            damages.push(("an older copy", Some(copy.clone())));
            old_copies += 1;
        }
        for (what, damaged) in damages {
            let dir = lay_out(&last);
            let path = dir.path().join(&name);
            match &damaged {
                Some(content) => fs::write(&path, content).unwrap(),
                None => fs::remove_file(&path).unwrap(),
            }
            for _ in 0..2 {
                let reason = refused(open(dir.path()));
                let file = name.file_name().unwrap().to_str().unwrap();
                // A file in the middle that is shorter or longer is seen in the sum of all.
                assert!(reason.contains(file) || reason.contains("its files before"), "{what}: {reason}");
                assert_eq!(fs::read(&path).ok(), damaged, "{what}: it is as it was found");
            }
            fs::write(&path, content).unwrap();
            is_whole(dir.path());
        }
    }
    assert!(old_copies > 0, "no file of the older copy is still in use");
}

#[test]
fn an_old_copy_of_the_whole_log_is_noticed() {
    let (older, last) = with_older();
    let mut copy = older.clone();
    copy.insert(MARK.into(), last[Path::new(MARK)].clone());
    let dir = lay_out(&copy);
    let reason = refused(open(dir.path()));
    assert!(reason.contains("is missing") || reason.contains("were written"), "{reason}");
    for name in [files(&copy, "raftlog"), files(&copy, "rewrite"), vec![MARK.into()]].concat() {
        assert!(fs::read(dir.path().join(&name)).unwrap() == copy[&name], "{name:?} is as it was found");
    }
}

/// Whether or not its files happen to be such as the mark asks for.
#[test]
fn another_nodes_log_is_told_from_a_damaged_one() {
    let (_, last) = with_older();
    let other = pontoon::ids::RandomId([9; 16]);
    for writes in [0, 100] {
        let dir = tempfile::tempdir().unwrap();
        let log = DiskLog::open(&dir.path().join("log"), SMALL, other).unwrap();
        log.create(&[record(1)]).unwrap();
        for index in 6..6 + writes {
            log.write(&[LogWrite { entries: vec![entry(index, 6, 900)], ..write(1, 6..=6, 6) }]).unwrap();
        }
        drop(log);
        let mut mixed = last.clone();
        mixed.insert(MARK.into(), image(dir.path())[Path::new(MARK)].clone());
        let dir = lay_out(&mixed);
        let found = DiskLog::open(&dir.path().join("log"), SMALL, other).map(|_| ());
        assert!(matches!(found, Err(StorageError::Identity(_))), "{writes}: {found:?}");
    }
}

/// Nothing is lost with the mark, and the log knows by itself which files there must be.
#[test]
fn a_mark_that_is_gone_damaged_or_old_is_made_anew() {
    let (older, last) = with_older();
    let mark = Path::new(MARK);
    let content = &last[mark];
    let mut flipped = content.clone();
    flipped[50] ^= 1;
    flipped[600] ^= 1;
    let damages =
        [None, Some(Vec::new()), Some(content[..10].to_vec()), Some(flipped), Some(older[mark].clone())];
    for damaged in damages {
        let dir = lay_out(&last);
        let path = dir.path().join(mark);
        match &damaged {
            Some(content) => fs::write(&path, content).unwrap(),
            None => fs::remove_file(&path).unwrap(),
        }
        // A hole is noticed all the same.
        let appends = files(&last, "raftlog");
        for gone in &appends[..appends.len() - 1] {
            fs::remove_file(dir.path().join(gone)).unwrap();
            let reason = refused(open(dir.path()));
            assert!(reason.contains("is missing"), "{reason}");
            assert_eq!(fs::read(&path).ok(), damaged, "nothing is made up for a log that is refused");
            fs::write(dir.path().join(gone), &last[gone]).unwrap();
        }
        is_whole(dir.path());
        // It is there again.
        let end = dir.path().join(appends.last().unwrap());
        let whole = fs::read(&end).unwrap();
        fs::write(&end, &whole[..whole.len() - 1]).unwrap();
        refused(open(dir.path()));
    }
}

/// Purges free files without order, so a crash can leave old ones before a hole, which the engine neither
/// reads nor frees.
#[test]
fn old_files_before_a_hole_are_removed() {
    let (older, last) = with_older();
    let name = Path::new("log/0000000000000001.raftlog").to_owned();
    assert!(!last.contains_key(&name) && !last.contains_key(Path::new("log/0000000000000002.raftlog")));
    for without_mark in [false, true] {
        let mut left = last.clone();
        left.insert(name.clone(), older[&files(&older, "raftlog")[0]].clone());
        if without_mark {
            left.remove(Path::new(MARK));
        }
        let dir = lay_out(&left);
        is_whole(dir.path());
        assert!(!dir.path().join(&name).exists());
        is_whole(dir.path());
    }
}

/// By a program that had no mark: the store id alone in its log, no record of how far it reaches.
#[test]
fn a_log_of_an_older_program_is_taken_as_it_is_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let config = raft_engine::Config { dir: path.to_str().unwrap().into(), ..Default::default() };
    let engine = raft_engine::Engine::open(config).unwrap();
    let mut batch = raft_engine::LogBatch::default();
    batch.put(u64::MAX, b"i".to_vec(), [&[1][..], &STORE.0].concat()).unwrap();
    engine.write(&mut batch, true).unwrap();
    drop(engine);
    let log = open(dir.path()).unwrap();
    assert!(!log.is_new());
    drop(log);
    let file = path.join("0000000000000001.raftlog");
    let whole = fs::read(&file).unwrap();
    fs::write(&file, &whole[..whole.len() - 1]).unwrap();
    refused(open(dir.path()));
}

/// What rots under a node that runs is an error once it is read, and the end of the node: the log takes
/// no more writes, and at the next start it is refused.
#[test]
fn what_rots_while_the_log_is_open_ends_it() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path()).unwrap();
    log.create(&[record(1), record(2)]).unwrap();
    for index in 6..=20 {
        let entries = vec![entry(index, 6, 900)];
        log.write(&[LogWrite { entries, ..write(1, 6..=6, 6) }]).unwrap();
    }
    let path = dir.path().join("log/0000000000000002.raftlog");
    let mut content = fs::read(&path).unwrap();
    let is_in = |index: u8| content.windows(100).position(|bytes| bytes == [index ^ 6; 100]);
    let (index, at) = (6..=20).find_map(|index| Some((index, is_in(index)?))).unwrap();
    content[at] ^= 1;
    fs::write(&path, content).unwrap();
    let before = log.entries(ReplicaId(1), 6, u64::from(index), usize::MAX).unwrap();
    assert_eq!(before.len(), usize::from(index) - 6);
    log.load(ReplicaId(1)).unwrap();
    let found = log.entries(ReplicaId(1), 6, 21, usize::MAX).map(|entries| entries.len());
    assert!(matches!(found, Err(StorageError::Damaged { .. })), "{found:?}");
    for found in [
        log.write(&[write(2, 6..=6, 6)]),
        log.create(&[record(3)]),
        log.remove(&[ReplicaId(2)]),
        log.compact(ReplicaId(1), Position { index: 7, term: 6 }),
        log.purge().map(|_| ()),
    ] {
        let text = found.unwrap_err().to_string();
        assert!(text.contains("replica 1") && text.contains("serve --rejoin"), "{text}");
    }
    drop(log);
    let reason = refused(open(dir.path()));
    assert!(reason.contains("0002.raftlog can't be read"), "{reason}");
}

/// A purge moves old entries, and can't if they can't be read.
#[test]
fn what_a_purge_can_not_read_ends_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path()).unwrap();
    log.create(&[record(1), record(2)]).unwrap();
    log.write(&[write(2, 6..=8, 6)]).unwrap();
    let path = dir.path().join("log/0000000000000001.raftlog");
    let mut content = fs::read(&path).unwrap();
    let in_entry_8 = content.windows(20).position(|bytes| bytes == [8 ^ 6; 20]).unwrap();
    content[in_entry_8] ^= 1;
    fs::write(&path, content).unwrap();
    let mut found = Ok(Vec::new());
    for index in 6..=60 {
        let written = LogWrite { entries: vec![entry(index, 6, 900)], ..write(1, 6..=6, 6) };
        log.write(&[written]).unwrap();
        log.compact(ReplicaId(1), Position { index, term: 6 }).unwrap();
        found = log.purge();
        if found.is_err() {
            break;
        }
    }
    assert!(matches!(found, Err(StorageError::Damaged { .. })), "{found:?}");
    let text = log.write(&[write(2, 9..=9, 6)]).unwrap_err().to_string();
    assert!(text.contains("serve --rejoin"), "{text}");
}

/// A random history, images of it on the way, and what the log must hold at its end, killed or closed.
fn history(rng: &mut Rng) -> (Vec<Image>, Image, Model) {
    let dir = tempfile::tempdir().unwrap();
    let mut log = open(dir.path()).unwrap();
    let (mut older, mut model) = (Vec::new(), Model::new());
    for round in 0..90 {
        let (result, after) = step(&log, &model, rng);
        result.unwrap();
        model = after;
        if round % 15 == 14 {
            older.push(image(dir.path()));
        }
        if rng.below(40) == 0 {
            drop(log);
            log = open(dir.path()).unwrap();
        }
    }
    if rng.below(2) == 0 {
        return (older, image(dir.path()), model);
    }
    drop(log);
    (older, image(dir.path()), model)
}

/// One file of the image, damaged at random; `None`: gone.
fn damage(older: &[Image], last: &Image, rng: &mut Rng) -> (PathBuf, Option<Vec<u8>>) {
    let name = last.keys().nth(rng.below(last.len() as u64) as usize).unwrap().clone();
    let content = &last[&name];
    let len = content.len() as u64;
    let at = [0, len / 2, len.saturating_sub(1), rng.below(len.max(1))][rng.below(4) as usize] as usize;
    let old = older[rng.below(older.len() as u64) as usize].get(&name);
    let damaged = match rng.below(5) {
        0 => None,
        1 => Some(content[..at].to_vec()),
        2 if old.is_some() => old.cloned(),
        _ if content.is_empty() => None,
        _ => {
            let mut content = content.clone();
            content[at] ^= 1 << rng.below(8);
            Some(content)
        }
    };
    (name, damaged)
}

#[test]
fn random_damage_never_costs_what_was_acknowledged() {
    // More of them: PONTOON_SEEDS=1000 cargo test --test log_suite damage
    let seeds = std::env::var("PONTOON_SEEDS").map_or(6, |n| n.parse().expect("a number"));
    let mut ends = (0, 0);
    for seed in 0..seeds {
        let mut rng = Rng(seed);
        let (older, last, model) = history(&mut rng);
        let whole = |dir: &Path, what: &dyn std::fmt::Debug| {
            let log = open(dir).unwrap_or_else(|e| panic!("seed {seed}, {what:?}: {e}"));
            compare(&log, &model).unwrap_or_else(|e| panic!("seed {seed}, {what:?}: {e}"));
        };
        whole(lay_out(&last).path(), &"untouched");
        for _ in 0..30 {
            let (name, damaged) = damage(&older, &last, &mut rng);
            let what = (&name, damaged.as_ref().map(Vec::len));
            let dir = lay_out(&last);
            let path = dir.path().join(&name);
            match &damaged {
                Some(content) => fs::write(&path, content).unwrap(),
                None => fs::remove_file(&path).unwrap(),
            }
            match open(dir.path()) {
                Ok(log) => {
                    compare(&log, &model).unwrap_or_else(|e| panic!("seed {seed}, {what:?}: {e}"));
                    ends.0 += 1;
                }
                refusal => {
                    refused(refusal);
                    // Nothing else was spoilt.
                    fs::write(&path, &last[&name]).unwrap();
                    whole(dir.path(), &what);
                    ends.1 += 1;
                }
            }
        }
    }
    assert!(ends.0 > 5 && ends.1 > 5, "{ends:?}");
}
