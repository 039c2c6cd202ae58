//! Tests of [`super`]: the layers agree with a plain map.

use raft::eraftpb::ConfState;

use super::*;
use crate::ids::GROUP_START;
use crate::storage::engine_memory::MemoryEngine;

pub(crate) fn initial() -> StateHeader {
    StateHeader {
        applied: GROUP_START,
        revision: 0,
        log_time: 0,
        epoch: Epoch { range: 1, conf: 1 },
        members: Vec::new(),
        conf_state: ConfState::default(),
    }
}

fn open(engine: &Arc<MemoryEngine>) -> ReplicaState {
    ReplicaState::open(engine.clone(), ReplicaId(7), 0, initial()).unwrap()
}

fn at(index: Index) -> Position {
    Position { index, term: 5 }
}

/// What a flush leaves in the engine.
fn absorb(engine: &MemoryEngine, frozen: &Frozen) {
    engine.write(&frozen.mutations()).unwrap();
}

fn pairs(view: &dyn StateView, from: Bound<&[u8]>) -> Vec<(Vec<u8>, Bytes)> {
    let mut found = Vec::new();
    view.scan(from, &mut |key, value| {
        found.push((key.to_vec(), value.clone()));
        true
    })
    .unwrap();
    found
}

fn names(view: &dyn StateView) -> String {
    pairs(view, Bound::Unbounded)
        .into_iter()
        .map(|(key, value)| {
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            format!("{}{} ", text(&key), text(&value))
        })
        .collect()
}

#[test]
fn newest_layer_wins_and_removals_hide() {
    let engine = Arc::new(MemoryEngine::new());
    let mut state = open(&engine);
    for key in [b"a", b"b", b"c", b"d", b"e"] {
        state.put(key, Bytes::from_static(b"1"));
    }
    state.set_applied(at(6));
    let first = state.freeze().unwrap();
    absorb(&engine, &first);
    state.release(6);
    state.put(b"b", Bytes::from_static(b"2"));
    state.delete(b"c");
    state.delete(b"e");
    state.set_applied(at(7));
    state.freeze().unwrap();
    state.put(b"c", Bytes::from_static(b"3"));
    state.delete(b"a");
    state.put(b"f", Bytes::from_static(b"3"));
    assert_eq!(names(&state), "b2 c3 d1 f3 ");
    assert_eq!(state.lookup(b"a"), Lookup::Known(None));
    assert_eq!(state.lookup(b"d"), Lookup::AskEngine);
    assert_eq!(state.reader().get(b"d").unwrap().unwrap(), "1");
    assert_eq!(state.reader().get(b"e").unwrap(), None);
    let after_b = pairs(&state, Bound::Excluded(b"b"));
    assert_eq!(after_b[0].0, b"c");
    let (active, frozen) = state.memory_bytes();
    assert!(active > 0 && frozen > 0);
}

#[test]
fn freeze_gives_nothing_twice_and_keeps_the_header() {
    let engine = Arc::new(MemoryEngine::new());
    let mut state = open(&engine);
    assert!(state.freeze().is_none(), "nothing was applied");
    state.put(b"a", Bytes::from_static(b"1"));
    assert_eq!(state.next_revision(), 1);
    state.set_applied(at(9));
    let frozen = state.freeze().unwrap();
    assert_eq!((frozen.header.applied, frozen.header.revision), (at(9), 1));
    assert!(state.freeze().is_none(), "nothing since");
    state.set_applied(at(10));
    let empty = state.freeze().unwrap();
    assert!(empty.table.is_empty(), "an empty entry still moves applied");
    absorb(&engine, &frozen);
    absorb(&engine, &empty);
    let again = open(&engine);
    assert_eq!(again.header(), &empty.header);
}

#[test]
fn sessions_are_frozen_and_found_again() {
    use crate::ids::RandomId;
    use crate::storage::sessions::SessionResult;
    let engine = Arc::new(MemoryEngine::new());
    let mut state = open(&engine);
    let (stays, ends) = (RandomId([1; 16]), RandomId([2; 16]));
    state.sessions().advance(1_000);
    for id in [stays, ends] {
        state.sessions().open(id, if id == stays { 900 } else { 50 });
        state.sessions().touch(id, 0);
        state.sessions().remember(id, 1, SessionResult::Written(7));
    }
    state.set_applied(at(6));
    assert!(state.memory_bytes().0 > 0, "what a flush would write is counted");
    let first = state.freeze().unwrap();
    assert_eq!((first.header.log_time, first.sessions.len(), first.table.len()), (1_000, 2, 0));
    assert_eq!(state.memory_bytes().0, 0, "sessions that haven't changed are not");
    absorb(&engine, &first);
    assert_eq!(open(&engine).session_table(), state.session_table());

    state.sessions().advance(1_100);
    state.set_applied(at(7));
    let second = state.freeze().unwrap();
    assert_eq!(second.sessions.get(&ends.0), Some(None), "a removal");
    assert_eq!(second.sessions.get(&stays.0), None, "unchanged");
    absorb(&engine, &second);
    let again = open(&engine);
    assert_eq!(again.session_table(), state.session_table());
    assert_eq!((again.session_table().len(), again.session_table().log_time()), (1, 1_100));
    assert_eq!(names(&again), "", "sessions are no keys");

    let damaged = keys::key_of_kind(ReplicaId(7), 0, keys::KIND_SESSION, &[3; 16]);
    engine.write(&[(damaged, Some(Bytes::from_static(b"?")))]).unwrap();
    let error = ReplicaState::open(engine, ReplicaId(7), 0, initial()).err().unwrap();
    assert!(matches!(error, StorageError::Damaged { .. }), "{error}");
}

#[test]
#[should_panic(expected = "freezing within an entry")]
fn an_entry_with_a_session_is_never_split() {
    let mut state = open(&Arc::new(MemoryEngine::new()));
    state.set_applied(at(6));
    state.sessions().advance(1);
    state.freeze();
}

#[test]
#[should_panic(expected = "freezing within an entry")]
fn an_entry_is_never_split() {
    let mut state = open(&Arc::new(MemoryEngine::new()));
    state.set_applied(at(6));
    state.put(b"a", Bytes::new());
    state.freeze();
}

#[test]
#[should_panic(expected = "applied must grow")]
fn an_entry_is_never_applied_twice() {
    let mut state = open(&Arc::new(MemoryEngine::new()));
    state.set_applied(at(6));
    state.set_applied(at(6));
}

#[test]
fn replicas_and_generations_share_an_engine_unseen() {
    let engine = Arc::new(MemoryEngine::new());
    for (replica, generation) in [(6, 0), (7, 1), (8, 0)] {
        let key = keys::user_key(ReplicaId(replica), generation, b"x");
        engine.write(&[(key, Some(Bytes::from_static(b"foreign")))]).unwrap();
    }
    let state = open(&engine);
    assert_eq!(names(&state), "");
    assert_eq!(state.get(b"x").unwrap(), None);
}

#[test]
fn a_page_on_another_thread_keeps_its_moment() {
    let engine = Arc::new(MemoryEngine::new());
    let mut state = open(&engine);
    for i in 0..10u8 {
        state.put(&[b'a' + i], Bytes::from_static(b"1"));
    }
    state.set_applied(at(6));
    absorb(&engine, &state.freeze().unwrap());
    state.release(6);
    for key in [b"b", b"d", b"f"] {
        state.put(key, Bytes::from_static(b"2"));
    }
    state.delete(b"c");
    let from = Bound::Included(b"b".as_slice());
    let reader = state.scan_reader(from, b"g", 2);
    state.put(b"b", Bytes::from_static(b"3"));
    state.delete(b"d");
    let mut page = String::new();
    reader
        .scan(from, &mut |key, value| {
            page.push_str(&format!("{}{} ", key[0] as char, value[0] as char));
            page.len() < 6
        })
        .unwrap();
    assert_eq!(page, "b2 d2 ");
    let error = reader.scan(from, &mut |_, _| true).unwrap_err();
    assert!(error.to_string().contains("beyond the page"), "{error}");
    let error = state.reader().scan(from, &mut |_, _| true).unwrap_err();
    assert!(error.to_string().contains("single keys"), "{error}");
    let whole = state.scan_reader(from, b"g", 100);
    assert_eq!(pairs(&whole, from).len(), 3, "b, e, f");
}
