//! Tests of [`super`]: a command takes effect once, and each way to be turned away.

use std::collections::BTreeMap;

use bytes::Bytes;
use proptest::prelude::*;

use super::super::command::{Entry, Expect, decode_entry, encode_entry};
use super::super::memory::MemoryState;
use super::*;
use crate::ids::RandomId;

fn id(number: u8) -> SessionId {
    RandomId([number; 16])
}

fn tag(session: u8, sequence: u64) -> SessionTag {
    SessionTag { session: id(session), sequence, acked_below: 0, open: None }
}

fn opening(session: u8, sequence: u64) -> SessionTag {
    SessionTag { open: Some(10_000), ..tag(session, sequence) }
}

fn put(value: &'static str) -> Command {
    Command::Kv(KvCommand::Put { key: "k".into(), value: value.into() })
}

fn cas(expect: &'static str, value: &'static str) -> Command {
    Command::Kv(KvCommand::Cas { key: "k".into(), expect: Expect::Value(expect.into()), value: value.into() })
}

/// Applies one command as an entry of its own, by way of its bytes.
fn run(state: &mut MemoryState, stamp: u64, command: Command, tag: SessionTag) -> Reply {
    let data = Bytes::from(encode_entry(&[(command, Some(tag))], stamp));
    let entry = decode_entry(&data).unwrap();
    MachineKind::Kv.apply_entry(&entry, state).unwrap().remove(0)
}

fn written(revision: u64) -> Reply {
    Reply::Kv(KvReply::Written(revision))
}

fn value(state: &MemoryState) -> Bytes {
    kv::get(b"k", state).unwrap().unwrap().value
}

#[test]
fn a_command_that_comes_again_gets_its_answer_again() {
    let mut state = MemoryState::default();
    assert_eq!(run(&mut state, 0, put("a"), opening(1, 1)), written(1));
    assert_eq!(run(&mut state, 0, put("b"), tag(1, 2)), written(2));
    assert_eq!(run(&mut state, 0, put("a"), opening(1, 1)), written(1));
    assert_eq!(run(&mut state, 0, put("a"), tag(1, 1)), written(1));
    assert_eq!((state.revision, value(&state)), (2, "b".into()));
    let delete = || Command::Kv(KvCommand::Delete { key: "k".into() });
    assert_eq!(run(&mut state, 0, delete(), tag(1, 3)), Reply::Kv(KvReply::Deleted(3)));
    assert_eq!(run(&mut state, 0, put("c"), tag(1, 4)), written(4));
    assert_eq!(run(&mut state, 0, delete(), tag(1, 3)), Reply::Kv(KvReply::Deleted(3)));
    assert_eq!(value(&state), "c");
    assert_eq!(run(&mut state, 0, put("x"), opening(2, 1)), written(5), "sessions are apart");
}

#[test]
fn a_command_that_changed_nothing_never_takes_effect_later() {
    let mut state = MemoryState::default();
    let delete = || Command::Kv(KvCommand::Delete { key: "k".into() });
    assert_eq!(run(&mut state, 0, delete(), opening(1, 1)), Reply::Kv(KvReply::Absent));
    let absent = Reply::Kv(KvReply::Mismatch(None));
    assert_eq!(run(&mut state, 0, cas("a", "b"), tag(1, 2)), absent);
    assert_eq!(run(&mut state, 0, cas("a", "b"), tag(1, 2)), absent);
    run(&mut state, 0, put("a"), opening(2, 1));
    // The client may have been told of the failure, and have gone on.
    let stale = Reply::Session(SessionReply::Stale);
    assert_eq!(run(&mut state, 0, cas("a", "b"), tag(1, 2)), stale);
    assert_eq!(run(&mut state, 0, delete(), tag(1, 1)), Reply::Kv(KvReply::Absent));
    assert_eq!(value(&state), "a");
    run(&mut state, 0, put("c"), tag(2, 2));
    let now = Reply::Kv(KvReply::Mismatch(kv::get(b"k", &state).unwrap()));
    assert_eq!(run(&mut state, 0, cas("a", "b"), tag(1, 2)), now);
    assert_eq!(run(&mut state, 0, put("d"), tag(1, 2)), stale, "another command than before");
    assert_eq!(state.revision, 2);
}

#[test]
fn what_is_acknowledged_is_forgotten() {
    let mut state = MemoryState::default();
    for sequence in 1..=4 {
        run(&mut state, 0, put("a"), opening(1, sequence));
    }
    let later = SessionTag { acked_below: 3, ..tag(1, 5) };
    assert_eq!(run(&mut state, 0, put("b"), later), written(5));
    assert_eq!(state.sessions.results(), 3);
    let stale = Reply::Session(SessionReply::Stale);
    assert_eq!(run(&mut state, 0, put("a"), tag(1, 2)), stale);
    assert_eq!(run(&mut state, 0, put("a"), tag(1, 3)), written(3));
    let wrong = SessionTag { acked_below: 9, ..tag(1, 6) };
    assert_eq!(run(&mut state, 0, put("a"), wrong), stale, "nothing is new below what is acknowledged");
    assert_eq!((state.revision, state.sessions.results()), (5, 0));
}

#[test]
fn sessions_end_by_the_stamps_of_entries() {
    let mut state = MemoryState::default();
    let expired = Reply::Session(SessionReply::Expired);
    assert_eq!(run(&mut state, 0, put("a"), tag(1, 1)), expired);
    assert_eq!(run(&mut state, 1_000, put("a"), opening(1, 1)), written(1));
    assert_eq!(run(&mut state, 11_000, put("a"), tag(1, 1)), written(1));
    assert_eq!(run(&mut state, 21_000, put("b"), tag(1, 2)), written(2));
    // An entry that comes behind, of a leader with a slower clock, ends nothing.
    assert_eq!(run(&mut state, 5, put("b"), tag(1, 2)), written(2));
    assert_eq!(state.sessions.log_time(), 21_000);
    assert_eq!(run(&mut state, 31_001, put("c"), tag(1, 3)), expired);
    assert_eq!(value(&state), "b");
    assert!(state.sessions.is_empty());
}

#[test]
fn lifetimes_are_bounded() {
    let mut state = MemoryState::default();
    let ends = |state: &MemoryState, n| state.sessions.get(id(n)).map(|session| session.ends());
    for (n, asked, given) in [(1, 0, 10_000), (2, 12_345, 12_345), (3, u32::MAX, 6_000_000)] {
        run(&mut state, 0, put("a"), SessionTag { open: Some(asked), ..tag(n, 1) });
        assert_eq!(ends(&state, n), Some(given));
    }
}

#[test]
fn the_table_is_bounded() {
    let mut state = MemoryState::default();
    run(&mut state, 0, put("a"), opening(1, 1));
    for sequence in 2..=RESULTS_MAX as u64 {
        state.sessions.remember(id(1), sequence, SessionResult::Unchanged);
    }
    let next = RESULTS_MAX as u64 + 1;
    let window_full = Reply::Session(SessionReply::WindowFull);
    assert_eq!(run(&mut state, 0, put("b"), tag(1, next)), window_full);
    assert_eq!(run(&mut state, 0, put("a"), tag(1, 1)), written(1), "what is known is answered");
    let acked = SessionTag { acked_below: 2, ..tag(1, next) };
    assert_eq!(run(&mut state, 0, put("b"), acked), written(2));

    let number = |n: usize| {
        let mut id = [0xee; 16];
        id[..8].copy_from_slice(&(n as u64).to_be_bytes());
        RandomId(id)
    };
    for n in 1..SESSIONS_MAX {
        state.sessions.open(number(n), 10_000);
    }
    let table_full = Reply::Session(SessionReply::TableFull);
    assert_eq!(run(&mut state, 0, put("c"), opening(2, 1)), table_full);
    assert_eq!(run(&mut state, 0, put("c"), opening(1, next + 1)), window_full);
    let acked = SessionTag { acked_below: next, ..opening(1, next + 1) };
    assert_eq!(run(&mut state, 0, put("c"), acked), written(3), "it has its place");
    for n in 1..=SHARD_RESULTS_MAX / RESULTS_MAX {
        state.sessions.touch(number(n), 0);
        for sequence in 0..RESULTS_MAX as u64 {
            state.sessions.remember(number(n), sequence, SessionResult::Unchanged);
        }
    }
    assert_eq!(run(&mut state, 0, put("d"), tag(1, next + 2)), table_full);
    assert_eq!(state.revision, 3, "nothing more took effect");
    let busy = Refusal::from(SessionReply::TableFull);
    assert!(busy.retryable() && matches!(busy, Refusal::Busy { .. }));
}

/// The command that a session sends under a sequence.
fn command(session: u8, sequence: u64) -> Command {
    let key = Bytes::from(vec![b'a' + (sequence % 2) as u8]);
    let value = Bytes::from(format!("{session}.{sequence}"));
    Command::Kv(match (u64::from(session) + sequence) % 4 {
        0 => KvCommand::Delete { key },
        1 => KvCommand::Cas { key, expect: Expect::Absent, value },
        _ => KvCommand::Put { key, value },
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// However often a command is sent, in whatever order and with whichever others in one entry: it
    /// has one effect, and one answer.
    #[test]
    fn batches_may_be_split_and_sent_anew(
        sent in prop::collection::vec((0..3_u8, 1..8_u64, any::<bool>()), 1..60),
    ) {
        let mut state = MemoryState::default();
        let mut first: BTreeMap<(u8, u64), Reply> = BTreeMap::new();
        let mut effects = 0;
        let mut batch = Vec::new();
        let last = sent.len() - 1;
        for (at, (session, sequence, ends)) in sent.into_iter().enumerate() {
            batch.push((session, sequence));
            if !ends && at < last {
                continue;
            }
            let commands: Vec<_> = batch.iter()
                .map(|&(session, sequence)| (command(session, sequence), Some(opening(session, sequence))))
                .collect();
            let data = Bytes::from(encode_entry(&commands, at as u64));
            let entry: Entry = decode_entry(&data).unwrap();
            let replies = MachineKind::Kv.apply_entry(&entry, &mut state).unwrap();
            prop_assert_eq!(replies.len(), batch.len());
            for (name, reply) in batch.drain(..).zip(replies) {
                let Some(before) = first.get(&name) else {
                    effects += u64::from(matches!(
                        reply,
                        Reply::Kv(KvReply::Written(_) | KvReply::Deleted(_))
                    ));
                    first.insert(name, reply);
                    continue;
                };
                match before {
                    Reply::Kv(KvReply::Mismatch(_)) => prop_assert!(matches!(
                        reply,
                        Reply::Kv(KvReply::Mismatch(_)) | Reply::Session(SessionReply::Stale)
                    )),
                    before => prop_assert_eq!(&reply, before),
                }
            }
            prop_assert_eq!(state.revision, effects);
        }
    }
}
