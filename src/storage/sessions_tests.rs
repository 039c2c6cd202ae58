//! Tests of [`super`]: the table is a plain map that forgets, and survives its records.

use super::*;
use crate::ids::RandomId;
use proptest::prelude::*;

fn id(number: u8) -> SessionId {
    RandomId([number; 16])
}

fn reloaded(store: &BTreeMap<Vec<u8>, Bytes>, log_time: u64) -> SessionTable {
    let mut table = SessionTable::new(log_time);
    for (id, record) in store {
        table.load(id, record).unwrap();
    }
    table
}

fn absorb(store: &mut BTreeMap<Vec<u8>, Bytes>, changes: Memtable) {
    for (id, record) in changes.entries {
        match record {
            Some(record) => store.insert(id.to_vec(), record),
            None => store.remove(&id[..]),
        };
    }
}

#[test]
fn the_form_of_a_record_is_pinned() {
    let mut table = SessionTable::new(300);
    table.open(id(1), 10_000);
    table.touch(id(1), 5);
    table.remember(id(1), 7, SessionResult::Written(300));
    table.remember(id(1), 5, SessionResult::Unchanged);
    table.remember(id(1), 6, SessionResult::Deleted(2));
    table.remember(id(1), u64::MAX, SessionResult::Unchanged);
    let record = b"\x01\x90\x4e\xac\x02\x05\x04\
        \x00\x00\
        \x00\x02\x02\
        \x00\x01\xac\x02\
        \xf7\xff\xff\xff\xff\xff\xff\xff\xff\x01\x00";
    assert_eq!(table.records()[&id(1)], record);
    let store = BTreeMap::from([(id(1).0.to_vec(), Bytes::from_static(record))]);
    assert_eq!(reloaded(&store, 300), table);
}

#[test]
fn bytes_that_are_no_record_are_damage() {
    let mut table = SessionTable::new(0);
    table.open(id(1), 10_000);
    table.touch(id(1), 0);
    table.remember(id(1), 3, SessionResult::Written(9));
    table.remember(id(1), 4, SessionResult::Unchanged);
    let record = table.records()[&id(1)].clone();
    let refused = |id: &[u8], record: &[u8]| {
        let error = SessionTable::new(0).load(id, record).unwrap_err();
        assert!(matches!(error, StorageError::Damaged { .. }), "{error}");
        error.to_string()
    };
    for cut in 0..record.len() {
        refused(&id(1).0, &record[..cut]);
    }
    assert!(refused(&id(1).0, &[&record[..], b"\0"].concat()).contains("bytes follow"));
    assert!(refused(&id(1).0[..15], &record).contains("15 bytes"));
    assert!(refused(&id(1).0, b"\x02\x01\x01\x01\x00").contains("format 2"));
    assert!(refused(&id(1).0, b"\x01\x01\x01\x01\x01\x00\x07").contains("kind of result 7"));
    assert!(refused(&id(1).0, b"\x01\xff\xff\xff\xff\x10\x01\x01\x00").contains("lifetime"));
    let behind_the_last = b"\x01\x01\x01\x00\x02\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01\x00\x00\x00";
    assert!(refused(&id(1).0, behind_the_last).contains("too great"));
}

#[test]
fn a_session_ends_after_its_lifetime_and_not_before() {
    let mut table = SessionTable::new(1_000);
    table.open(id(1), 500);
    table.advance(1_500);
    assert!(table.get(id(1)).is_some(), "it lives for its whole lifetime");
    table.touch(id(1), 0);
    table.advance(2_000);
    table.advance(1_700);
    assert_eq!((table.log_time(), table.len()), (2_000, 1), "time never goes back");
    table.open(id(1), 800);
    table.open(id(1), 600);
    table.advance(2_300);
    assert_eq!(table.len(), 1, "the greatest lifetime counts");
    table.advance(2_301);
    assert!(table.is_empty());
}

#[derive(Clone, Debug)]
enum Step {
    Advance(u64),
    Open(u8, u32),
    Touch(u8, u64),
    Remember(u8, u64),
    Freeze,
    Restart,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let session = || 0..5_u8;
    let step = prop_oneof![
        4 => (0..400_u64).prop_map(Step::Advance),
        3 => (session(), 1..1_000_u32).prop_map(|(id, lifetime)| Step::Open(id, lifetime)),
        4 => (session(), 0..12_u64).prop_map(|(id, acked)| Step::Touch(id, acked)),
        8 => (session(), 0..20_u64).prop_map(|(id, sequence)| Step::Remember(id, sequence)),
        2 => Just(Step::Freeze),
        1 => Just(Step::Restart),
    ];
    prop::collection::vec(step, 0..120)
}

#[derive(Clone, Default, PartialEq, Debug)]
struct Plain {
    lifetime: u32,
    last_used: u64,
    acked_below: u64,
    results: BTreeMap<u64, SessionResult>,
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn it_is_a_map_that_forgets(steps in steps()) {
        let mut table = SessionTable::default();
        let mut plain: BTreeMap<u8, Plain> = BTreeMap::new();
        let mut time = 0;
        let mut store = BTreeMap::new();
        for (at, step) in (1..).zip(steps) {
            match step {
                Step::Advance(by) => {
                    time += by;
                    table.advance(time);
                    plain.retain(|_, session| session.last_used + u64::from(session.lifetime) >= time);
                }
                Step::Open(n, lifetime) => {
                    table.open(id(n), lifetime);
                    table.touch(id(n), 0);
                    let session = plain.entry(n).or_default();
                    session.lifetime = session.lifetime.max(lifetime);
                    session.last_used = time;
                }
                Step::Touch(n, acked_below) => {
                    let found = table.touch(id(n), acked_below).is_some();
                    prop_assert_eq!(found, plain.contains_key(&n));
                    if let Some(session) = plain.get_mut(&n) {
                        session.last_used = time;
                        session.acked_below = session.acked_below.max(acked_below);
                        session.results = session.results.split_off(&session.acked_below);
                    }
                }
                Step::Remember(n, sequence) => {
                    let Some(session) = plain.get_mut(&n) else { continue };
                    let found = table.get(id(n)).and_then(|session| session.find(sequence));
                    prop_assert_eq!(found, session.results.get(&sequence).copied());
                    if sequence >= session.acked_below && found.is_none() {
                        let result = [
                            SessionResult::Unchanged,
                            SessionResult::Written(at),
                            SessionResult::Deleted(at),
                        ][at as usize % 3];
                        session.last_used = time;
                        session.results.insert(sequence, result);
                        table.touch(id(n), 0);
                        table.remember(id(n), sequence, result);
                    }
                }
                Step::Freeze => {
                    absorb(&mut store, table.take_changes());
                    prop_assert_eq!(&reloaded(&store, time), &table);
                }
                Step::Restart => {
                    absorb(&mut store, table.take_changes());
                    table = reloaded(&store, time);
                }
            }
            prop_assert_eq!(table.log_time(), time);
            prop_assert_eq!(table.len(), plain.len());
            let results: usize = plain.values().map(|session| session.results.len()).sum();
            prop_assert_eq!(table.results(), results);
            for (n, session) in &plain {
                let found = table.get(id(*n)).unwrap();
                let seen = Plain {
                    lifetime: found.lifetime_ms,
                    last_used: found.last_used,
                    acked_below: found.acked_below(),
                    results: found.results.iter().copied().collect(),
                };
                prop_assert_eq!(&seen, session);
            }
            let changed = |session: &&Session| session.changed;
            let results: usize = table.sessions.values().filter(changed).map(Session::results).sum();
            prop_assert_eq!(table.changed_results, results, "what changed is counted");
            prop_assert_eq!(table.due.len(), table.len(), "one look per session");
        }
    }
}
