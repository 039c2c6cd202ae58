//! The key-value machine.
//!
//! A write that changes something takes the next revision of the shard, which becomes the key's version; one
//! that changes nothing (a failed cas, the deletion of an absent key) takes none. A put always writes,
//! even the value that is there.

use std::ops::Bound;

use bytes::Bytes;

use super::ApplyError;
use super::command::{Answer, Expect, FormatError, KvCommand, KvReply, Query, Versioned};
use super::value;
use crate::limits;
use crate::storage::{StateBatch, StateView, StorageError};

/// Applies one command. Checks no limits: they are enforced before a command is proposed, and what is
/// committed is applied.
pub fn apply(command: &KvCommand, state: &mut dyn StateBatch) -> Result<KvReply, ApplyError> {
    match command {
        KvCommand::Put { key, value } => Ok(write(key, value, state)),
        KvCommand::Delete { key } => {
            if state.get(key)?.is_none() {
                return Ok(KvReply::Absent);
            }
            state.delete(key);
            Ok(KvReply::Deleted(state.next_revision()))
        }
        KvCommand::Cas { key, expect, value } => {
            let found = get(key, state)?;
            if !holds(expect, found.as_ref()) {
                return Ok(KvReply::Mismatch(found));
            }
            Ok(write(key, value, state))
        }
    }
}

/// Whether a condition holds for what was found at its key.
pub fn holds(expect: &Expect, found: Option<&Versioned>) -> bool {
    match (expect, found) {
        (Expect::Absent, found) => found.is_none(),
        (Expect::Value(expected), Some(found)) => *expected == found.value,
        (Expect::Version(expected), Some(found)) => *expected == found.version,
        (Expect::Value(_) | Expect::Version(_), None) => false,
    }
}

/// Answers one query.
///
/// A page of a scan ends before it exceeds the query's limit (0: none of its own),
/// [`limits::SCAN_PAIRS_MAX`] pairs or [`limits::SCAN_BYTES_MAX`] bytes of keys and values, but has at least
/// one pair if there is one. Values that aren't asked for are read all the same: once
/// [`limits::SCAN_READ_BYTES_MAX`] were, the page ends too. `more` is exact: there is a next pair if
/// and only if it is true.
pub fn query(query: &Query, state: &dyn StateView) -> Result<Answer, ApplyError> {
    match query {
        Query::Get { key } => Ok(Answer::Value(get(key, state)?)),
        Query::Scan { prefix, after, limit, keys_only } => {
            Ok(scan(prefix, after, *limit, *keys_only, state)?)
        }
    }
}

fn write(key: &[u8], value: &[u8], state: &mut dyn StateBatch) -> KvReply {
    let revision = state.next_revision();
    state.put(key, value::encode(revision, value));
    KvReply::Written(revision)
}

/// The value of a key.
pub fn get<S: StateView + ?Sized>(key: &[u8], state: &S) -> Result<Option<Versioned>, StorageError> {
    read(key, state.get(key)?.as_ref())
}

/// The value of a key of which this is stored.
pub fn read(key: &[u8], stored: Option<&Bytes>) -> Result<Option<Versioned>, StorageError> {
    let read = stored.map(value::decode).transpose();
    read.map_err(|error| damaged(key, &error))
}

fn scan(
    prefix: &[u8],
    after: &[u8],
    limit: usize,
    keys_only: bool,
    state: &dyn StateView,
) -> Result<Answer, StorageError> {
    let most = match limit {
        0 => limits::SCAN_PAIRS_MAX,
        limit => limit.min(limits::SCAN_PAIRS_MAX),
    };
    let mut pairs: Vec<(Bytes, Versioned)> = Vec::new();
    let (mut bytes, mut read) = (0, 0);
    let mut more = false;
    let mut failed = None;
    state.scan(scan_start(prefix, after), &mut |key, stored| {
        // Keys with the prefix follow each other.
        if !key.starts_with(prefix) {
            return false;
        }
        let mut versioned = match value::decode(stored) {
            Ok(versioned) => versioned,
            Err(error) => {
                failed = Some(damaged(key, &error));
                return false;
            }
        };
        if keys_only {
            versioned.value = Bytes::new();
        }
        bytes += key.len() + versioned.value.len();
        let full = bytes > limits::SCAN_BYTES_MAX || read > limits::SCAN_READ_BYTES_MAX;
        if pairs.len() == most || (full && !pairs.is_empty()) {
            more = true;
            return false;
        }
        read += key.len() + stored.len();
        pairs.push((Bytes::copy_from_slice(key), versioned));
        true
    })?;
    match failed {
        Some(error) => Err(error),
        None => Ok(Answer::Page { pairs, more }),
    }
}

/// Where a page of a scan begins: after the last key of the page before, or at the prefix.
pub fn scan_start<'a>(prefix: &'a [u8], after: &'a [u8]) -> Bound<&'a [u8]> {
    if !after.is_empty() && after >= prefix { Bound::Excluded(after) } else { Bound::Included(prefix) }
}

fn damaged(key: &[u8], error: &FormatError) -> StorageError {
    let start = &key[..key.len().min(32)];
    StorageError::Damaged {
        what: format!("the value of the key that begins `{}`", start.escape_ascii()),
        detail: error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory::MemoryState;
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    #[test]
    fn stored_values_do_not_pin_the_entry_they_came_in() {
        let entry = Bytes::from(vec![1u8; 1 << 16]);
        let mut state = MemoryState::default();
        let command = KvCommand::Put { key: entry.slice(..3), value: entry.slice(10..20) };
        apply(&command, &mut state).unwrap();
        drop(command);
        assert!(entry.is_unique(), "the state holds a copy");
    }

    fn put(state: &mut MemoryState, key: &str, value: &[u8]) -> KvReply {
        let command = KvCommand::Put {
            key: Bytes::copy_from_slice(key.as_bytes()),
            value: Bytes::copy_from_slice(value),
        };
        apply(&command, state).unwrap()
    }

    fn page(state: &MemoryState, query_: Query) -> (Vec<String>, bool) {
        match query(&query_, state).unwrap() {
            Answer::Page { pairs, more } => {
                let key = |(key, _): &(Bytes, _)| String::from_utf8(key.to_vec()).unwrap();
                (pairs.iter().map(key).collect(), more)
            }
            Answer::Value(_) => panic!("not a page"),
        }
    }

    fn all(after: String, limit: usize, keys_only: bool) -> Query {
        Query::Scan { prefix: Bytes::new(), after: after.into(), limit, keys_only }
    }

    #[test]
    fn a_page_is_bounded_in_pairs_and_bytes() {
        let mut state = MemoryState::default();
        for at in 0..limits::SCAN_PAIRS_MAX + 1 {
            put(&mut state, &format!("{at:06}"), b"");
        }
        let (keys, more) = page(&state, all(String::new(), usize::MAX, false));
        assert_eq!((keys.len(), more), (limits::SCAN_PAIRS_MAX, true));
        let (keys, more) = page(&state, all(keys.last().unwrap().clone(), 0, false));
        assert_eq!((keys.len(), more), (1, false));

        let mut state = MemoryState::default();
        let half = vec![0; limits::SCAN_BYTES_MAX / 2];
        for key in ["a", "b", "c"] {
            put(&mut state, key, &half);
        }
        // Two halves and their keys are more than the bound.
        assert_eq!(page(&state, all(String::new(), 9, false)), (vec!["a".into()], true));
        assert_eq!(page(&state, all(String::new(), 9, true)).0.len(), 3);
        put(&mut state, "a", &vec![0; 2 * limits::SCAN_BYTES_MAX]);
        assert_eq!(page(&state, all(String::new(), 9, false)), (vec!["a".into()], true));
    }

    #[test]
    fn a_page_of_keys_is_bounded_by_the_values_it_reads_over() {
        let mut state = MemoryState::default();
        for key in ["a", "b", "c", "d"] {
            put(&mut state, key, &vec![0; limits::SCAN_READ_BYTES_MAX / 2]);
        }
        let (keys, more) = page(&state, all(String::new(), 9, true));
        assert_eq!((keys, more), (vec!["a".into(), "b".into()], true));
        let (keys, more) = page(&state, all("b".into(), 9, true));
        assert_eq!((keys, more), (vec!["c".into(), "d".into()], false), "nothing follows");
    }

    #[test]
    fn a_damaged_value_is_an_error_of_the_storage() {
        let mut state = MemoryState::default();
        state.pairs.insert(b"k".to_vec(), Bytes::from_static(b"\x09"));
        let get = Query::Get { key: "k".into() };
        for query_ in [get, all(String::new(), 1, false)] {
            let error = query(&query_, &state).unwrap_err();
            assert!(matches!(error, ApplyError::Storage(StorageError::Damaged { .. })));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Against a model that is written differently.
        #[test]
        fn it_behaves_like_a_map(
            commands in prop::collection::vec((0..4_u8, "[ab]{1,2}", "[xy]", 0..12_u64), 0..40),
        ) {
            let mut state = MemoryState::default();
            let mut model: BTreeMap<String, (String, u64)> = BTreeMap::new();
            let mut revision = 0;
            for (kind, key, text, version) in commands {
                let (key_bytes, value) = (Bytes::from(key.clone()), Bytes::from(text.clone()));
                let there = model.get(&key).cloned();
                let expect = match version % 3 {
                    0 => Expect::Absent,
                    1 => Expect::Value(Bytes::from_static(b"x")),
                    _ => Expect::Version(version),
                };
                let changes = match (kind, &expect, &there) {
                    (0, ..) => true,
                    (1, _, there) => there.is_some(),
                    (_, Expect::Absent, there) => there.is_none(),
                    (_, Expect::Value(_), there) => there.as_ref().is_some_and(|t| t.0 == "x"),
                    (_, Expect::Version(v), there) => there.as_ref().is_some_and(|t| t.1 == *v),
                };
                let command = match kind {
                    0 => KvCommand::Put { key: key_bytes, value },
                    1 => KvCommand::Delete { key: key_bytes },
                    _ => KvCommand::Cas { key: key_bytes, expect, value },
                };
                revision += u64::from(changes);
                let reply = apply(&command, &mut state).unwrap();
                let found = there.map(|(text, version)| Versioned { value: text.into(), version });
                let expected = match (kind, changes) {
                    (1, true) => KvReply::Deleted(revision),
                    (1, false) => KvReply::Absent,
                    (_, true) => KvReply::Written(revision),
                    (_, false) => KvReply::Mismatch(found),
                };
                prop_assert_eq!(reply, expected);
                if kind == 1 {
                    model.remove(&key);
                } else if changes {
                    model.insert(key, (text, revision));
                }
            }
            prop_assert_eq!(state.revision, revision);
            for prefix in ["", "a", "ab", "b", "c"] {
                let mut found = Vec::new();
                loop {
                    let after = found.last().map_or(Bytes::new(), |(key, _): &(Bytes, _)| key.clone());
                    let query_ = Query::Scan { prefix: prefix.into(), after, limit: 2, keys_only: false };
                    let Answer::Page { pairs, more } = query(&query_, &state).unwrap() else {
                        panic!("not a page");
                    };
                    found.extend(pairs);
                    if !more {
                        break;
                    }
                }
                let expected: Vec<_> = model.iter().filter(|(key, _)| key.starts_with(prefix))
                    .map(|(key, (text, version))| {
                        let versioned = Versioned { value: text.clone().into(), version: *version };
                        (Bytes::from(key.clone()), versioned)
                    })
                    .collect();
                prop_assert_eq!(found, expected);
            }
        }
    }
}
