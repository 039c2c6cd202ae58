//! Cases of the suite about a replica that lost its state: it takes a snapshot although its log needs none.

use super::*;

/// The same for a replica whose state is lost.
fn restore(generation: u32, index: Index, term: Term, leader_term: Term) -> Install {
    Install { state_lost: true, ..install(generation, index, term, leader_term) }
}

/// Within the log, at its end, and right before its beginning.
pub fn a_replica_that_lost_its_state_keeps_what_follows_the_snapshot(mut subject: impl Subject) {
    subject.log().create(&[record(1), record(2)]).unwrap();
    let log = subject.log();
    let voted = LogWrite { hard_state: Some(hard_state(8, 3, 12)), ..write(1, 13..=15, 8) };
    log.write(&[write(1, 6..=12, 7), voted, write(2, 6..=8, 6)]).unwrap();
    log.compact(ReplicaId(1), Position { index: 8, term: 7 }).unwrap();
    drop(log);
    let mut expected = vec![(9, 7), (10, 7), (11, 7), (12, 7), (13, 8), (14, 8), (15, 8)];
    // Committed up to 12, then as far as the snapshot.
    let steps = [(8, 7, 8, 12), (10, 7, 8, 12), (14, 8, 9, 14), (15, 8, 9, 15)];
    for (generation, (index, term, leader_term, commit)) in (2..).zip(steps) {
        subject.log().install(ReplicaId(1), &restore(generation, index, term, leader_term)).unwrap();
        expected.retain(|(at, _)| *at > index);
        for _ in 0..2 {
            let log = subject.log();
            let state = log.load(ReplicaId(1)).unwrap();
            // A vote belongs to its term.
            let vote = if leader_term == 8 { 3 } else { 0 };
            assert_eq!(state.hard_state, hard_state(leader_term, vote, commit), "{index}");
            assert_eq!((state.truncated, state.last), (Position { index, term }, 15));
            assert_eq!(terms_of(&*log, 1), expected);
            let record = &log.catalogue().unwrap()[0];
            assert_eq!((record.generation, record.epoch.conf), (generation, 7));
            let found = log.entries(ReplicaId(1), index, index + 1, usize::MAX);
            assert!(matches!(found, Err(StorageError::Compacted(to)) if to == index), "{found:?}");
            drop(log);
            subject.reopen();
        }
    }
    subject.log().write(&[write(1, 16..=17, 9)]).unwrap();
    subject.reopen();
    assert_eq!(terms_of(&*subject.log(), 1), [(16, 9), (17, 9)]);
    assert_eq!(subject.log().load(ReplicaId(2)).unwrap().last, 8);
}

pub fn a_replica_that_lost_its_state_takes_what_lies_beyond_its_log(mut subject: impl Subject) {
    subject.log().create(&[record(1)]).unwrap();
    let log = subject.log();
    let committed = LogWrite { hard_state: Some(hard_state(7, 3, 12)), ..write(1, 6..=15, 7) };
    log.write(&[committed]).unwrap();
    // Another entry than its own at 14, which wasn't committed; then one that it never had.
    for (generation, index) in [(2, 14), (3, 20)] {
        log.install(ReplicaId(1), &restore(generation, index, 8, 9)).unwrap();
        let Install { epoch, members, .. } = restore(generation, index, 8, 9);
        let expected = LogState {
            hard_state: hard_state(9, 0, index),
            truncated: Position { index, term: 8 },
            last: index,
            terms: vec![],
            membership: pontoon::storage::log::RecordedMembership { index, epoch, members },
        };
        assert_eq!(log.load(ReplicaId(1)).unwrap(), expected);
    }
    drop(log);
    subject.reopen();
    assert_eq!(subject.log().load(ReplicaId(1)).unwrap().last, 20);
}

pub fn a_snapshot_that_contradicts_the_log_is_refused(mut subject: impl Subject) {
    subject.log().create(&[record(1), record(2)]).unwrap();
    let log = subject.log();
    let committed = LogWrite { hard_state: Some(hard_state(7, 3, 12)), ..write(1, 6..=15, 7) };
    log.write(&[committed]).unwrap();
    log.compact(ReplicaId(1), Position { index: 10, term: 7 }).unwrap();
    log.remove(&[ReplicaId(2)]).unwrap();
    let before = log.load(ReplicaId(1)).unwrap();
    for (what, replica, install) in [
        ("from before the log", 1, restore(2, 9, 7, 9)),
        ("another entry before the log", 1, restore(2, 10, 8, 9)),
        ("a term below what is compacted", 1, restore(2, 20, 6, 9)),
        ("another entry than was committed", 1, restore(2, 12, 8, 9)),
        ("a leader that can't have it", 1, restore(2, 11, 7, 6)),
        ("the generation that it has", 1, restore(1, 11, 7, 9)),
        ("removed", 2, restore(2, 20, 8, 9)),
        ("unknown", 3, restore(2, 20, 8, 9)),
    ] {
        let found = log.install(ReplicaId(replica), &install);
        assert!(matches!(found, Err(StorageError::Inconsistent { .. })), "{what}: {found:?}");
    }
    drop(log);
    subject.reopen();
    assert_eq!(subject.log().load(ReplicaId(1)).unwrap(), before);
    assert_eq!(subject.log().catalogue().unwrap()[0], record(1));
}

/// The kept entries are moved by purges together with the records that say where they begin.
pub fn a_log_kept_beyond_a_snapshot_survives_purges(mut subject: impl Subject) {
    subject.log().create(&[record(1), record(2)]).unwrap();
    subject.log().write(&[write(1, 6..=30, 6)]).unwrap();
    let mut next = 6;
    for round in 0..80 {
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
        if round == 30 {
            log.install(ReplicaId(1), &restore(2, 20, 6, 9)).unwrap();
        }
        log.purge().unwrap();
        drop(log);
        if round % 20 == 19 {
            subject.reopen();
            let log = subject.log();
            let (from, generation) = if round < 30 { (6, 1) } else { (21, 2) };
            let expected: Vec<_> = (from..=30).map(|index| (index, 6)).collect();
            assert_eq!(terms_of(&*log, 1), expected, "after round {round}");
            assert_eq!(log.catalogue().unwrap()[0].generation, generation);
        }
    }
}
