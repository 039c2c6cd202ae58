//! The contract of the raft log, held by every implementation: one suite, run on disk and in
//! memory. Then what only the disk can do: lose power, be full, tear a write, fail a sync, rot.

#[path = "log_suite/damage.rs"]
mod damage;
#[path = "log_suite/full.rs"]
mod full;
#[path = "support/lossy_fs.rs"]
mod lossy_fs;
#[path = "log_suite/lost_state.rs"]
mod lost_state;
#[path = "log_suite/membership.rs"]
mod membership;
#[path = "log_suite/power.rs"]
mod power;

use std::sync::Arc;

use lost_state::*;
use membership::*;
use pontoon::ids::{
    DatabaseId, Epoch, GROUP_START, Index, NodeId, Position, ReplicaId, ShardId, StoreId, Term,
};
use pontoon::machine::MachineKind;
use pontoon::placement::map::{Member, MemberRole};
use pontoon::placement::ring::RingRange;
use pontoon::storage::StorageError;
use pontoon::storage::log::{Install, LogState, LogStore, LogWrite, ReplicaPhase, ReplicaRecord};
use pontoon::storage::log_disk::{DiskLog, DiskLogOptions};
use pontoon::storage::log_memory::MemoryLog;
use raft::eraftpb::{Entry, HardState};

const STORE: StoreId = pontoon::ids::RandomId([7; 16]);

fn options() -> DiskLogOptions {
    DiskLogOptions { file_bytes: 64 << 10, purge_bytes: 256 << 10, spare_files: 1 }
}

fn record(replica: u64) -> ReplicaRecord {
    ReplicaRecord {
        replica: ReplicaId(replica),
        shard: ShardId(replica + 100),
        database: DatabaseId(1),
        machine: MachineKind::Kv,
        phase: ReplicaPhase::Active,
        range: RingRange { start: 0, end: 9 },
        epoch: Epoch { range: 1, conf: 2 },
        members: vec![Member { replica: ReplicaId(replica), node: NodeId(1), role: MemberRole::Voter }],
        members_at: 0,
        ordered_at: 0,
        generation: 1,
    }
}

fn entry(index: Index, term: Term, size: usize) -> Entry {
    Entry { index, term, data: vec![index as u8 ^ term as u8; size].into(), ..Default::default() }
}

fn write(replica: u64, indexes: std::ops::RangeInclusive<Index>, term: Term) -> LogWrite {
    LogWrite {
        replica: ReplicaId(replica),
        entries: indexes.map(|index| entry(index, term, 20)).collect(),
        hard_state: None,
        membership: None,
    }
}

fn hard_state(term: Term, vote: u64, commit: Index) -> HardState {
    HardState { term, vote, commit, ..Default::default() }
}

fn terms_of(log: &dyn LogStore, replica: u64) -> Vec<(Index, Term)> {
    let state = log.load(ReplicaId(replica)).unwrap();
    log.entries(ReplicaId(replica), state.truncated.index + 1, state.last + 1, usize::MAX)
        .unwrap()
        .iter()
        .map(|e| (e.index, e.term))
        .collect()
}

fn inconsistent(result: Result<(), StorageError>) {
    assert!(matches!(result, Err(StorageError::Inconsistent { .. })), "{result:?}");
}

/// An implementation under test. `reopen` is what a restart of the node does to it.
trait Subject {
    fn open() -> Self;
    fn log(&self) -> Arc<dyn LogStore>;
    fn reopen(&mut self);
}

struct Memory(Arc<MemoryLog>);

impl Subject for Memory {
    fn open() -> Memory {
        Memory(Arc::new(MemoryLog::new()))
    }
    fn log(&self) -> Arc<dyn LogStore> {
        self.0.clone()
    }
    fn reopen(&mut self) {
        self.0.crash();
    }
}

struct Disk {
    dir: tempfile::TempDir,
    log: Option<Arc<DiskLog>>,
}

impl Subject for Disk {
    fn open() -> Disk {
        let mut disk = Disk { dir: tempfile::tempdir().unwrap(), log: None };
        disk.reopen();
        disk
    }
    fn log(&self) -> Arc<dyn LogStore> {
        self.log.clone().unwrap()
    }
    fn reopen(&mut self) {
        if let Some(log) = self.log.take() {
            assert_eq!(Arc::strong_count(&log), 1, "the log is still in use");
        }
        let log = DiskLog::open(&self.dir.path().join("log"), options(), STORE).unwrap();
        self.log = Some(Arc::new(log));
    }
}

macro_rules! suite {
    ($($case:ident),* $(,)?) => {
        mod memory {
            $(#[test] fn $case() { super::$case(<super::Memory as super::Subject>::open()) })*
        }
        mod disk {
            $(#[test] fn $case() { super::$case(<super::Disk as super::Subject>::open()) })*
        }
    };
}

suite!(
    a_new_replica_begins_at_group_start,
    appended_entries_survive_a_restart,
    a_lower_append_replaces_the_suffix,
    several_writes_of_a_replica_in_one_batch_apply_in_order,
    what_does_not_fit_is_refused_and_changes_nothing,
    compaction_drops_the_prefix,
    a_fully_compacted_log_goes_on,
    create_is_idempotent_and_batched,
    tombstones_never_come_back,
    the_last_hard_state_counts,
    terms_are_found,
    entries_are_bounded_in_bytes,
    a_write_covers_many_replicas,
    purging_loses_nothing,
    an_installed_snapshot_begins_the_log_anew,
    an_installation_keeps_a_vote_of_its_term,
    a_snapshot_that_is_not_needed_is_refused,
    what_an_installation_drops_never_comes_back,
    a_replica_that_lost_its_state_keeps_what_follows_the_snapshot,
    a_replica_that_lost_its_state_takes_what_lies_beyond_its_log,
    a_snapshot_that_contradicts_the_log_is_refused,
    a_log_kept_beyond_a_snapshot_survives_purges,
    the_last_recorded_members_count,
    members_need_a_commit_index_that_covers_them,
    a_newcomer_begins_at_nothing,
);

fn a_new_replica_begins_at_group_start(mut subject: impl Subject) {
    subject.log().create(&[record(1)]).unwrap();
    for _ in 0..2 {
        let found = subject.log().load(ReplicaId(1)).unwrap();
        let expected = LogState {
            hard_state: hard_state(GROUP_START.term, 0, GROUP_START.index),
            truncated: GROUP_START,
            last: GROUP_START.index,
            terms: vec![],
            membership: record(1).membership(),
        };
        assert_eq!(found, expected);
        subject.reopen();
    }
    assert!(subject.log().load(ReplicaId(2)).is_err());
}

fn appended_entries_survive_a_restart(mut subject: impl Subject) {
    subject.log().create(&[record(1)]).unwrap();
    let written = write(1, 6..=9, 6);
    subject.log().write(std::slice::from_ref(&written)).unwrap();
    for _ in 0..2 {
        let log = subject.log();
        assert_eq!(log.load(ReplicaId(1)).unwrap().last, 9);
        let found = log.entries(ReplicaId(1), 6, 10, usize::MAX).unwrap();
        assert_eq!(found, written.entries);
        let middle = log.entries(ReplicaId(1), 7, 9, usize::MAX).unwrap();
        assert_eq!(middle, written.entries[1..3]);
        drop(log);
        subject.reopen();
    }
}

fn a_lower_append_replaces_the_suffix(mut subject: impl Subject) {
    subject.log().create(&[record(1)]).unwrap();
    subject.log().write(&[write(1, 6..=15, 6)]).unwrap();
    subject.log().write(&[write(1, 8..=9, 7)]).unwrap();
    for _ in 0..2 {
        let log = subject.log();
        assert_eq!(terms_of(&*log, 1), [(6, 6), (7, 6), (8, 7), (9, 7)]);
        // What lies beyond the end is left out, not an error: the log may have been cut meanwhile.
        let found = log.entries(ReplicaId(1), 9, 16, usize::MAX).unwrap();
        assert_eq!(found.len(), 1);
        let found = log.entries(ReplicaId(1), 12, 16, usize::MAX).unwrap();
        assert!(found.is_empty());
        drop(log);
        subject.reopen();
    }
    subject.log().write(&[write(1, 6..=6, 8)]).unwrap();
    subject.reopen();
    assert_eq!(terms_of(&*subject.log(), 1), [(6, 8)]);
}

fn several_writes_of_a_replica_in_one_batch_apply_in_order(mut subject: impl Subject) {
    subject.log().create(&[record(1)]).unwrap();
    let mut last = write(1, 8..=8, 7);
    last.hard_state = Some(hard_state(7, 1, 8));
    let mut first = write(1, 6..=9, 6);
    first.hard_state = Some(hard_state(6, 1, 6));
    subject.log().write(&[first, last]).unwrap();
    subject.reopen();
    let log = subject.log();
    assert_eq!(terms_of(&*log, 1), [(6, 6), (7, 6), (8, 7)]);
    let state = log.load(ReplicaId(1)).unwrap();
    assert_eq!(state.hard_state, hard_state(7, 1, 8));
}

fn what_does_not_fit_is_refused_and_changes_nothing(mut subject: impl Subject) {
    subject.log().create(&[record(1), record(2)]).unwrap();
    subject.log().write(&[write(1, 6..=8, 6)]).unwrap();
    let log = subject.log();
    inconsistent(log.write(&[write(1, 10..=10, 6)]));
    inconsistent(log.write(&[write(1, 5..=5, 5)]));
    inconsistent(log.write(&[write(3, 6..=6, 6)]));
    let at = |index| Position { index, term: 6 };
    inconsistent(log.compact(ReplicaId(1), at(9)));
    inconsistent(log.compact(ReplicaId(3), at(6)));
    // The good write beside a bad one isn't made either.
    inconsistent(log.write(&[write(2, 6..=6, 6), write(1, 10..=10, 6)]));
    let mut early = write(1, 9..=9, 6);
    early.hard_state = Some(hard_state(6, 1, 10));
    inconsistent(log.write(&[early]));
    drop(log);
    for _ in 0..2 {
        let log = subject.log();
        assert_eq!(log.load(ReplicaId(1)).unwrap().last, 8);
        assert_eq!(log.load(ReplicaId(2)).unwrap().last, 5);
        drop(log);
        subject.reopen();
    }
    // And the log goes on.
    subject.log().write(&[write(1, 9..=9, 6)]).unwrap();
}

fn compaction_drops_the_prefix(mut subject: impl Subject) {
    subject.log().create(&[record(1)]).unwrap();
    subject.log().write(&[write(1, 6..=15, 6)]).unwrap();
    let to = Position { index: 10, term: 6 };
    subject.log().compact(ReplicaId(1), to).unwrap();
    let lower = Position { index: 8, term: 6 };
    subject.log().compact(ReplicaId(1), lower).unwrap();
    for _ in 0..2 {
        let log = subject.log();
        let state = log.load(ReplicaId(1)).unwrap();
        assert_eq!((state.truncated, state.last), (to, 15));
        assert_eq!(state.terms, [(11, 6)]);
        let found = log.entries(ReplicaId(1), 10, 12, usize::MAX);
        assert!(matches!(found, Err(StorageError::Compacted(10))), "{found:?}");
        inconsistent(log.write(&[write(1, 10..=16, 6)]));
        drop(log);
        subject.reopen();
    }
}

fn a_fully_compacted_log_goes_on(mut subject: impl Subject) {
    subject.log().create(&[record(1)]).unwrap();
    subject.log().write(&[write(1, 6..=15, 6)]).unwrap();
    let to = Position { index: 15, term: 6 };
    subject.log().compact(ReplicaId(1), to).unwrap();
    subject.reopen();
    let state = subject.log().load(ReplicaId(1)).unwrap();
    assert_eq!((state.truncated, state.last, state.terms), (to, 15, vec![]));
    subject.log().write(&[write(1, 16..=17, 7)]).unwrap();
    subject.reopen();
    assert_eq!(terms_of(&*subject.log(), 1), [(16, 7), (17, 7)]);
}

fn create_is_idempotent_and_batched(mut subject: impl Subject) {
    let records: Vec<ReplicaRecord> = (1..=12_000).map(record).collect();
    subject.log().create(&records).unwrap();
    subject.log().write(&[write(1, 6..=8, 6)]).unwrap();
    let mut other = record(1);
    other.generation = 9;
    subject.log().create(&[other, record(12_001)]).unwrap();
    for _ in 0..2 {
        let log = subject.log();
        let catalogue = log.catalogue().unwrap();
        assert_eq!(catalogue.len(), 12_001);
        assert_eq!(catalogue[..12_000], records);
        assert_eq!(log.load(ReplicaId(1)).unwrap().last, 8);
        assert_eq!(log.load(ReplicaId(12_001)).unwrap().last, 5);
        drop(log);
        subject.reopen();
    }
}

fn tombstones_never_come_back(mut subject: impl Subject) {
    subject.log().create(&[record(1), record(2)]).unwrap();
    subject.log().write(&[write(1, 6..=8, 6), write(2, 6..=8, 6)]).unwrap();
    subject.log().remove(&[ReplicaId(1), ReplicaId(77)]).unwrap();
    let born_dead = ReplicaRecord { phase: ReplicaPhase::Tombstone, ..record(3) };
    subject.log().create(&[born_dead]).unwrap();
    for _ in 0..2 {
        let log = subject.log();
        log.create(&[record(1), record(3)]).unwrap();
        log.remove(&[ReplicaId(1)]).unwrap();
        let phases: Vec<_> = log.catalogue().unwrap().iter().map(|r| (r.replica.0, r.phase)).collect();
        let expected =
            [(1, ReplicaPhase::Tombstone), (2, ReplicaPhase::Active), (3, ReplicaPhase::Tombstone)];
        assert_eq!(phases, expected);
        for gone in [1, 3] {
            assert!(log.load(ReplicaId(gone)).is_err());
            inconsistent(log.write(&[write(gone, 6..=6, 6)]));
        }
        assert_eq!(log.load(ReplicaId(2)).unwrap().last, 8);
        drop(log);
        subject.reopen();
    }
    // Nor do those whose state is gone; a living one can't be.
    subject.log().destroyed(&[ReplicaId(1), ReplicaId(2), ReplicaId(77)]).unwrap();
    for _ in 0..2 {
        let log = subject.log();
        log.create(&[record(1)]).unwrap();
        log.remove(&[ReplicaId(1)]).unwrap();
        let phases: Vec<_> = log.catalogue().unwrap().iter().map(|r| (r.replica.0, r.phase)).collect();
        let expected =
            [(1, ReplicaPhase::Destroyed), (2, ReplicaPhase::Active), (3, ReplicaPhase::Tombstone)];
        assert_eq!(phases, expected);
        assert!(log.load(ReplicaId(1)).is_err());
        inconsistent(log.write(&[write(1, 6..=6, 6)]));
        drop(log);
        subject.reopen();
    }
}

fn the_last_hard_state_counts(mut subject: impl Subject) {
    subject.log().create(&[record(1)]).unwrap();
    for vote in 1..=3 {
        let mut write = write(1, 6..=6, 6);
        write.hard_state = Some(hard_state(6 + vote, vote, 5));
        subject.log().write(&[write]).unwrap();
    }
    let mut alone = write(1, 6..=6, 6);
    alone.entries.clear();
    alone.hard_state = Some(hard_state(9, 3, 6));
    subject.log().write(&[alone]).unwrap();
    subject.reopen();
    let state = subject.log().load(ReplicaId(1)).unwrap();
    assert_eq!(state.hard_state, hard_state(9, 3, 6));
}

fn terms_are_found(mut subject: impl Subject) {
    subject.log().create(&[record(1)]).unwrap();
    let log = subject.log();
    log.write(&[write(1, 6..=40, 6)]).unwrap();
    log.write(&[write(1, 41..=41, 8)]).unwrap();
    log.write(&[write(1, 42..=80, 9)]).unwrap();
    log.write(&[write(1, 60..=61, 12)]).unwrap();
    drop(log);
    subject.reopen();
    let log = subject.log();
    let terms = log.load(ReplicaId(1)).unwrap().terms;
    assert_eq!(terms, [(6, 6), (41, 8), (42, 9), (60, 12)]);
    log.compact(ReplicaId(1), Position { index: 45, term: 9 }).unwrap();
    let terms = log.load(ReplicaId(1)).unwrap().terms;
    assert_eq!(terms, [(46, 9), (60, 12)]);
}

fn entries_are_bounded_in_bytes(subject: impl Subject) {
    subject.log().create(&[record(1)]).unwrap();
    let entries: Vec<Entry> = (6..16).map(|index| entry(index, 6, 1000)).collect();
    let size = protobuf::Message::compute_size(&entries[0]) as usize;
    let written = LogWrite { replica: ReplicaId(1), entries, hard_state: None, membership: None };
    let log = subject.log();
    log.write(&[written]).unwrap();
    for (max, count) in [(0, 1), (size, 1), (2 * size - 1, 1), (2 * size, 2), (usize::MAX, 10)] {
        let found = log.entries(ReplicaId(1), 6, 16, max).unwrap();
        assert_eq!(found.len(), count, "with {max} bytes");
    }
    assert!(log.entries(ReplicaId(1), 8, 8, 1).unwrap().is_empty());
}

fn a_write_covers_many_replicas(mut subject: impl Subject) {
    let records: Vec<ReplicaRecord> = (1..=300).map(record).collect();
    subject.log().create(&records).unwrap();
    let writes: Vec<LogWrite> = (1..=300)
        .map(|replica| LogWrite {
            hard_state: Some(hard_state(6, replica, 6)),
            ..write(replica, 6..=6 + replica % 5, 6)
        })
        .collect();
    subject.log().write(&writes).unwrap();
    subject.reopen();
    let log = subject.log();
    for replica in 1..=300 {
        let state = log.load(ReplicaId(replica)).unwrap();
        assert_eq!(state.last, 6 + replica % 5);
        assert_eq!(state.hard_state.vote, replica);
    }
}

/// One busy replica fills many files, which are freed behind its compactions; an idle one, whose
/// records lie in the first file, keeps all it has.
fn purging_loses_nothing(mut subject: impl Subject) {
    subject.log().create(&[record(1), record(2)]).unwrap();
    subject.log().write(&[write(1, 6..=8, 6)]).unwrap();
    let mut next = 6;
    let mut greatest = 0;
    for round in 0..120 {
        let written = LogWrite {
            replica: ReplicaId(2),
            entries: (next..next + 20).map(|index| entry(index, 6, 1000)).collect(),
            hard_state: Some(hard_state(6, 2, next)),
            membership: None,
        };
        next += 20;
        let log = subject.log();
        log.write(&[written]).unwrap();
        let to = Position { index: next - 10, term: 6 };
        log.compact(ReplicaId(2), to).unwrap();
        log.purge().unwrap();
        greatest = greatest.max(log.disk_bytes());
        drop(log);
        if round % 40 == 39 {
            subject.reopen();
        }
        let log = subject.log();
        let state = log.load(ReplicaId(2)).unwrap();
        assert_eq!((state.truncated, state.last), (to, next - 1));
        assert_eq!(terms_of(&*log, 1), [(6, 6), (7, 6), (8, 6)]);
    }
    assert!(greatest < 1 << 20, "{greatest} bytes on disk");
}

/// A snapshot at an entry of a term, sent by the leader of another.
fn install(generation: u32, index: Index, term: Term, leader_term: Term) -> Install {
    Install {
        generation,
        position: Position { index, term },
        leader_term,
        epoch: Epoch { range: 1, conf: 7 },
        members: vec![Member { replica: ReplicaId(1), node: NodeId(4), role: MemberRole::Learner }],
        state_lost: false,
    }
}

fn an_installed_snapshot_begins_the_log_anew(mut subject: impl Subject) {
    subject.log().create(&[record(1), record(2)]).unwrap();
    let voted = LogWrite { hard_state: Some(hard_state(6, 3, 7)), ..write(1, 6..=9, 6) };
    subject.log().write(&[voted, write(2, 6..=8, 6)]).unwrap();
    subject.log().install(ReplicaId(1), &install(2, 20, 8, 9)).unwrap();
    for _ in 0..2 {
        let log = subject.log();
        let Install { generation, epoch, members, .. } = install(2, 20, 8, 9);
        let installed = ReplicaRecord { generation, epoch, members, members_at: 20, ..record(1) };
        let expected = LogState {
            hard_state: hard_state(9, 0, 20),
            truncated: Position { index: 20, term: 8 },
            last: 20,
            terms: vec![],
            membership: installed.membership(),
        };
        assert_eq!(log.load(ReplicaId(1)).unwrap(), expected);
        assert_eq!(log.catalogue().unwrap(), [installed, record(2)]);
        let found = log.entries(ReplicaId(1), 8, 10, usize::MAX);
        assert!(matches!(found, Err(StorageError::Compacted(20))), "{found:?}");
        assert_eq!(log.load(ReplicaId(2)).unwrap().last, 8);
        inconsistent(log.write(&[write(1, 10..=10, 9)]));
        drop(log);
        subject.reopen();
    }
    subject.log().write(&[write(1, 21..=23, 9)]).unwrap();
    subject.reopen();
    assert_eq!(terms_of(&*subject.log(), 1), [(21, 9), (22, 9), (23, 9)]);
    // And again: it has fallen behind once more.
    subject.log().install(ReplicaId(1), &install(3, 40, 9, 9)).unwrap();
    subject.reopen();
    assert_eq!(subject.log().load(ReplicaId(1)).unwrap().last, 40);
}

fn an_installation_keeps_a_vote_of_its_term(mut subject: impl Subject) {
    subject.log().create(&[record(1)]).unwrap();
    let voted = LogWrite { hard_state: Some(hard_state(9, 3, 7)), ..write(1, 6..=9, 6) };
    subject.log().write(&[voted]).unwrap();
    subject.log().install(ReplicaId(1), &install(2, 20, 8, 8)).unwrap();
    subject.reopen();
    let log = subject.log();
    assert_eq!(log.load(ReplicaId(1)).unwrap().hard_state, hard_state(9, 3, 20), "a term never falls");
    log.install(ReplicaId(1), &install(3, 30, 8, 9)).unwrap();
    assert_eq!(log.load(ReplicaId(1)).unwrap().hard_state, hard_state(9, 3, 30));
}

fn a_snapshot_that_is_not_needed_is_refused(mut subject: impl Subject) {
    subject.log().create(&[record(1), record(2)]).unwrap();
    let log = subject.log();
    let committed = LogWrite { hard_state: Some(hard_state(7, 3, 12)), ..write(1, 6..=15, 7) };
    log.write(&[committed]).unwrap();
    log.compact(ReplicaId(1), Position { index: 10, term: 7 }).unwrap();
    log.remove(&[ReplicaId(2)]).unwrap();
    let before = log.load(ReplicaId(1)).unwrap();
    for (what, replica, install) in [
        ("it has the entry", 1, install(2, 14, 7, 9)),
        ("it is compacted", 1, install(2, 10, 7, 9)),
        ("it is compacted", 1, install(2, 8, 7, 9)),
        ("it is committed", 1, install(2, 12, 8, 9)),
        ("a term below what is compacted", 1, install(2, 20, 6, 9)),
        ("a leader that can't have it", 1, install(2, 20, 9, 8)),
        ("the generation that it has", 1, install(1, 20, 8, 9)),
        ("removed", 2, install(2, 20, 8, 9)),
        ("unknown", 3, install(2, 20, 8, 9)),
    ] {
        let found = log.install(ReplicaId(replica), &install);
        assert!(matches!(found, Err(StorageError::Inconsistent { .. })), "{what}: {found:?}");
    }
    drop(log);
    subject.reopen();
    let log = subject.log();
    assert_eq!(log.load(ReplicaId(1)).unwrap(), before);
    assert_eq!(log.catalogue().unwrap()[0], record(1));
    // An entry of another term there is no reason: it was never committed.
    log.install(ReplicaId(1), &install(2, 14, 8, 9)).unwrap();
}

/// The old entries have been moved by purges, a part of them lies beyond the snapshot, and the file
/// that says they are gone is freed in turn. They must stay gone.
fn what_an_installation_drops_never_comes_back(mut subject: impl Subject) {
    subject.log().create(&[record(1), record(2)]).unwrap();
    subject.log().write(&[write(1, 6..=30, 6)]).unwrap();
    let mut next = 6;
    for round in 0..120 {
        let written = LogWrite {
            replica: ReplicaId(2),
            entries: (next..next + 20).map(|index| entry(index, 6, 1000)).collect(),
            hard_state: Some(hard_state(6, 2, next)),
            membership: None,
        };
        next += 20;
        let log = subject.log();
        log.write(&[written]).unwrap();
        log.compact(ReplicaId(2), Position { index: next - 10, term: 6 }).unwrap();
        if round == 40 {
            log.install(ReplicaId(1), &install(2, 20, 8, 9)).unwrap();
        }
        if round == 80 {
            log.write(&[write(1, 21..=22, 9)]).unwrap();
        }
        log.purge().unwrap();
        drop(log);
        if round % 20 == 19 {
            subject.reopen();
            let state = subject.log().load(ReplicaId(1)).unwrap();
            let expected = match round {
                0..40 => (GROUP_START, 30),
                40..80 => (Position { index: 20, term: 8 }, 20),
                _ => (Position { index: 20, term: 8 }, 22),
            };
            assert_eq!((state.truncated, state.last), expected, "after round {round}");
        }
    }
}
