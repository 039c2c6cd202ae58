//! Members in the catalogue: written with the commit index that covers them, and what a newcomer begins with.

use pontoon::storage::log::RecordedMembership;

use super::*;

/// Members as of an entry, of conf version 30 and more.
pub fn members_at(index: Index) -> RecordedMembership {
    let member = |id| Member { replica: ReplicaId(id), node: NodeId(id), role: MemberRole::Incoming };
    RecordedMembership {
        index,
        epoch: Epoch { range: 1, conf: 30 + index },
        members: (1..2 + index % 4).map(member).collect(),
    }
}

/// A commit index up to `index`, and the members as of that.
fn recorded(index: Index) -> LogWrite {
    LogWrite {
        hard_state: Some(hard_state(6, 1, index)),
        membership: Some(members_at(index)),
        entries: Vec::new(),
        ..write(1, 6..=6, 6)
    }
}

pub fn the_last_recorded_members_count(mut subject: impl Subject) {
    subject.log().create(&[record(1), record(2)]).unwrap();
    subject.log().write(&[write(1, 6..=20, 6), write(2, 6..=8, 6)]).unwrap();
    // One after the other, in one batch, and with entries of the same write.
    subject.log().write(&[recorded(7)]).unwrap();
    subject.log().write(&[recorded(8), recorded(9)]).unwrap();
    let along = LogWrite { entries: vec![entry(21, 6, 9)], ..recorded(11) };
    subject.log().write(&[write(2, 9..=9, 6), along]).unwrap();
    // Of an earlier entry, as after a start that re-applies it: nothing goes back.
    subject.log().write(&[LogWrite { hard_state: Some(hard_state(6, 1, 12)), ..recorded(9) }]).unwrap();
    for _ in 0..2 {
        let log = subject.log();
        let state = log.load(ReplicaId(1)).unwrap();
        assert_eq!((state.membership, state.hard_state.commit, state.last), (members_at(11), 12, 21));
        let RecordedMembership { index, epoch, members } = members_at(11);
        let changed = ReplicaRecord { epoch, members, members_at: index, ..record(1) };
        assert_eq!(log.catalogue().unwrap(), [changed, record(2)]);
        drop(log);
        subject.reopen();
    }
}

pub fn members_need_a_commit_index_that_covers_them(subject: impl Subject) {
    let log = subject.log();
    log.create(&[record(1)]).unwrap();
    log.write(&[write(1, 6..=9, 6)]).unwrap();
    inconsistent(log.write(&[LogWrite { hard_state: None, ..recorded(8) }]));
    inconsistent(log.write(&[LogWrite { hard_state: Some(hard_state(6, 1, 7)), ..recorded(8) }]));
    // One of a batch spoils it all.
    inconsistent(log.write(&[recorded(7), LogWrite { hard_state: None, ..recorded(8) }]));
    let state = log.load(ReplicaId(1)).unwrap();
    assert_eq!((state.membership, state.hard_state.commit), (record(1).membership(), 5));
}

pub fn a_newcomer_begins_at_nothing(mut subject: impl Subject) {
    let newcomer = ReplicaRecord { members: vec![], ..record(1) };
    subject.log().create(std::slice::from_ref(&newcomer)).unwrap();
    for _ in 0..2 {
        let log = subject.log();
        let expected = LogState {
            hard_state: HardState::default(),
            truncated: Position::default(),
            last: 0,
            terms: vec![],
            membership: newcomer.membership(),
        };
        assert_eq!(log.load(ReplicaId(1)).unwrap(), expected);
        inconsistent(log.write(&[write(1, 6..=6, 6)]));
        drop(log);
        subject.reopen();
    }
    // It votes before it has a snapshot, and begins after that.
    subject.log().write(&[LogWrite { hard_state: Some(hard_state(7, 3, 0)), ..recorded(0) }]).unwrap();
    subject.log().install(ReplicaId(1), &install(2, 20, 6, 7)).unwrap();
    subject.log().write(&[write(1, 21..=22, 7)]).unwrap();
    subject.reopen();
    let state = subject.log().load(ReplicaId(1)).unwrap();
    assert_eq!((state.hard_state, state.last), (hard_state(7, 3, 20), 22));
    assert_eq!((state.truncated.index, state.membership.index), (20, 20));
    assert_eq!(state.membership.members, install(2, 20, 6, 7).members);
}
