//! Tests of [`super`]: what survives a start, what is gone on with, and the bound.

use super::*;
use crate::ids::RandomId;
use crate::storage::snapshot_file::{Origin, SnapshotWriter};
use crate::storage::state::tests::initial;

const STREAM: StreamId = RandomId([5; 16]);

fn snapshot(stream: StreamId, shard: u64) -> Vec<u8> {
    let origin = Origin { stream, shard: ShardId(shard), replica: ReplicaId(8) };
    let mut bytes = Vec::new();
    let mut writer = SnapshotWriter::new(&mut bytes, origin).unwrap();
    writer.change(&[1, b'k'], Some(&vec![b'v'; 600_000])).unwrap();
    writer.finish(&initial()).unwrap();
    bytes
}

fn open(root: &Path) -> SnapshotDir {
    SnapshotDir::open(&root.join("snapshots"), 3_000_000).unwrap()
}

fn receive(dir: &SnapshotDir, stream: StreamId, bytes: u64) -> Partial {
    dir.receive(ShardId(3), ReplicaId(9), stream, bytes).unwrap()
}

#[test]
fn a_start_keeps_what_can_be_used() {
    let root = tempfile::tempdir().unwrap();
    let dir = open(root.path());
    let path = dir.made_path(ReplicaId(8), STREAM);
    let bytes = snapshot(STREAM, 3);
    fs::write(&path, &bytes).unwrap();
    fs::write(dir.link_dir().join("1.link"), "x").unwrap();
    fs::write(atomic_file::unfinished(&dir.made_path(ReplicaId(1), STREAM)), "x").unwrap();
    fs::write(dir.made_path(ReplicaId(2), STREAM), &bytes[..bytes.len() - 1]).unwrap();
    fs::write(dir.link_dir().join("notes.txt"), "x").unwrap();
    let mut partial = receive(&dir, STREAM, bytes.len() as u64);
    partial.append(0, &bytes[..300_000]).unwrap();

    let dir = open(root.path());
    let names = || list(dir.link_dir()).unwrap();
    assert_eq!(names().len(), 3, "{:?}", names());
    let made = dir.made().unwrap();
    assert_eq!(made, [SnapshotFile::verify(&path).unwrap()]);
    assert_eq!(names().len(), 2, "the damaged one is gone");
    assert_eq!(dir.received().unwrap(), [(ShardId(3), ReplicaId(9))]);
    dir.remove(&made[0]).unwrap();
    dir.discard(ShardId(3), ReplicaId(9)).unwrap();
    dir.discard(ShardId(3), ReplicaId(9)).unwrap();
    assert_eq!((dir.made().unwrap(), dir.received().unwrap()), (vec![], vec![]));
}

#[test]
fn a_stream_goes_on_where_it_is_whole() {
    let root = tempfile::tempdir().unwrap();
    let bytes = snapshot(STREAM, 3);
    let total = bytes.len() as u64;
    let dir = open(root.path());
    let mut partial = receive(&dir, STREAM, total);
    assert_eq!(partial.offset(), 0);
    partial.append(0, &bytes[..300_000]).unwrap();
    assert!(!partial.is_complete());
    drop(partial);
    // Killed in the middle of the second block.
    let partial = receive(&dir, STREAM, total);
    let first = partial.offset();
    assert_eq!(first, 48 + 256 * 1024 + 8, "the first block");
    let path = partial.path().to_owned();
    drop(partial);
    // A power loss left zeros where bytes were.
    let mut file = fs::read(&path).unwrap();
    file[1000] ^= 1;
    file.extend([0; 500]);
    fs::write(&path, &file).unwrap();
    let mut partial = receive(&dir, STREAM, total);
    assert_eq!(partial.offset(), 48);
    while !partial.is_complete() {
        let at = partial.offset() as usize;
        partial.append(at as u64, &bytes[at..(at + 1000).min(bytes.len())]).unwrap();
    }
    assert_eq!(SnapshotFile::verify(partial.path()).unwrap().bytes, total);
    drop(partial);
    // Killed before it was installed: only its end comes again.
    let mut partial = receive(&dir, STREAM, total);
    let at = partial.offset() as usize;
    assert!(at + 1000 > bytes.len());
    partial.append(at as u64, &bytes[at..]).unwrap();
    SnapshotFile::verify(partial.path()).unwrap();
}

#[test]
fn another_stream_begins_anew() {
    let root = tempfile::tempdir().unwrap();
    let dir = open(root.path());
    let bytes = snapshot(STREAM, 3);
    receive(&dir, STREAM, bytes.len() as u64).append(0, &bytes).unwrap();
    assert_eq!(receive(&dir, RandomId([6; 16]), 1000).offset(), 0);
    // The same stream said to be shorter than what is there, or of another shard.
    receive(&dir, STREAM, bytes.len() as u64).append(0, &bytes).unwrap();
    assert_eq!(receive(&dir, STREAM, 1000).offset(), 0);
    let bytes = snapshot(STREAM, 4);
    receive(&dir, STREAM, bytes.len() as u64).append(0, &bytes).unwrap();
    assert_eq!(receive(&dir, STREAM, bytes.len() as u64).offset(), 0);
}

#[test]
fn what_does_not_follow_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let dir = open(root.path());
    let mut partial = receive(&dir, STREAM, 100);
    partial.append(0, &[1; 60]).unwrap();
    for (offset, len) in [(0, 10), (59, 10), (61, 10), (60, 41), (u64::MAX, 1)] {
        let found = partial.append(offset, &vec![1; len]);
        assert!(matches!(found, Err(StorageError::Damaged { .. })), "{offset}, {len}: {found:?}");
    }
    partial.append(60, &[1; 40]).unwrap();
    assert!(partial.is_complete());
}

#[test]
fn all_files_together_are_bounded() {
    let root = tempfile::tempdir().unwrap();
    let dir = open(root.path());
    assert!(dir.receive(ShardId(3), ReplicaId(9), STREAM, u64::MAX).is_err());
    fs::write(dir.made_path(ReplicaId(8), STREAM), vec![0; 2_000_000]).unwrap();
    assert_eq!(dir.room().unwrap(), 1_000_000);
    let found = dir.receive(ShardId(3), ReplicaId(9), STREAM, 1_000_001).unwrap_err();
    assert!(found.to_string().contains("limit"), "{found}");
    receive(&dir, STREAM, 1_000_000);
}
