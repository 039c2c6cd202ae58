//! A digest of a replica's state at one applied index, by which replicas of a shard can be compared.
//!
//! It is taken of what the engine holds, on disk in the end: so what it shows is what a restart would find. The engine
//! holds the state of one moment, that of its header, from one flush of the replica to the next. Begin and end
//! fall between flushes ([`super::flush::Flusher::header`]). A flush writes the header last and
//! moves it forward, and the removal of a generation begins with it: the same header at both ends means that nothing
//! was written or removed between them. Else there is no digest.
//!
//! *What it covers*: all that applying entries makes, by index alone, and what every replica therefore has alike: keys
//! and values, with their versions; and, apart from these, the sessions with the revision counter and the clock
//! beside them. Not the members: after a restart the header may name later ones than its index has.

use std::ops::Bound;
use std::sync::Arc;

use xxhash_rust::xxh3::Xxh3;

use super::engine::Engine;
use super::state::StateHeader;
use super::{StorageError, keys};
use crate::ids::{Index, ReplicaId};

/// What a state is, in a few bytes. Of two replicas of a shard, to be compared at the same index alone.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct StateDigest {
    /// The last entry that the state is made of.
    pub index: Index,
    /// xxh3-128 over all keys and values, in the order of keys.
    pub data: u128,
    /// xxh3-128 over revision counter, log time and all sessions, in the order of ids.
    pub sessions: u128,
    /// Keys.
    pub keys: u64,
    /// Bytes of keys and values.
    pub bytes: u64,
}

/// Takes a digest in steps. See the module page.
pub struct Digester {
    engine: Arc<dyn Engine>,
    replica: ReplicaId,
    generation: u32,
    header: StateHeader,
    data: Xxh3,
    sessions: Xxh3,
    keys: u64,
    bytes: u64,
    /// The last key that was read.
    last: Option<Vec<u8>>,
}

impl Digester {
    /// Begins; `header` is that of the generation in the engine, as read between flushes.
    pub fn new(
        engine: Arc<dyn Engine>,
        replica: ReplicaId,
        generation: u32,
        header: StateHeader,
    ) -> Digester {
        let mut sessions = Xxh3::new();
        sessions.update(&header.revision.to_le_bytes());
        sessions.update(&header.log_time.to_le_bytes());
        let (data, last) = (Xxh3::new(), None);
        Digester { engine, replica, generation, header, data, sessions, keys: 0, bytes: 0, last }
    }

    /// Reads on for about `bytes`; true: that was the rest.
    ///
    /// # Errors
    /// The engine's.
    pub fn step(&mut self, bytes: usize) -> Result<bool, StorageError> {
        let (first, end) = keys::generation_range(self.replica, self.generation);
        let begin = self.last.take();
        let from = match &begin {
            Some(last) => Bound::Excluded(&last[..]),
            None => Bound::Included(&first[..]),
        };
        let (data, sessions) = (&mut self.data, &mut self.sessions);
        let (mut size, mut keys, mut pairs) = (0, 0, 0);
        let mut last = None;
        self.engine.scan(from, &end, &mut |key, value| {
            size += key.len() + value.len();
            if let Some((kind, key)) = keys::local_key(key).and_then(|local| local.split_first()) {
                match *kind {
                    keys::KIND_USER => {
                        add(data, key, &value);
                        keys += 1;
                        pairs += (key.len() + value.len()) as u64;
                    }
                    keys::KIND_SESSION => add(sessions, key, &value),
                    // The header is compared as a whole, and holds where this replica stands.
                    _ => {}
                }
            }
            let full = size >= bytes;
            if full {
                last = Some(key.to_vec());
            }
            !full
        })?;
        self.keys += keys;
        self.bytes += pairs;
        self.last = last;
        Ok(self.last.is_none())
    }

    /// The digest, if the header that the engine holds now, between flushes, is the one with which it was begun.
    pub fn finish(self, header: Option<&StateHeader>) -> Option<StateDigest> {
        (header == Some(&self.header)).then(|| StateDigest {
            index: self.header.applied.index,
            data: self.data.digest128(),
            sessions: self.sessions.digest128(),
            keys: self.keys,
            bytes: self.bytes,
        })
    }
}

/// Takes in a pair, so that no other pairs look like it.
fn add(hash: &mut Xxh3, key: &[u8], value: &[u8]) {
    for part in [key, value] {
        hash.update(&(part.len() as u64).to_le_bytes());
        hash.update(part);
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::ids::{GROUP_START, Position, SessionId};
    use crate::storage::StateBatch;
    use crate::storage::engine_memory::MemoryEngine;
    use crate::storage::flush::Flusher;
    use crate::storage::state::ReplicaState;

    fn initial() -> StateHeader {
        StateHeader {
            applied: GROUP_START,
            revision: 0,
            log_time: 0,
            epoch: Default::default(),
            members: Vec::new(),
            conf_state: Default::default(),
        }
    }

    /// A node with one replica, which applies what it is given and flushes as it is told.
    struct Node {
        _dir: tempfile::TempDir,
        engine: Arc<MemoryEngine>,
        flusher: Flusher,
        state: ReplicaState,
        replica: ReplicaId,
        generation: u32,
    }

    impl Node {
        fn new(replica: u64, generation: u32) -> Node {
            let dir = tempfile::tempdir().unwrap();
            let engine = Arc::new(MemoryEngine::new());
            let flusher = Flusher::open(dir.path().join("redo"), engine.clone()).unwrap();
            let replica = ReplicaId(replica);
            let state = ReplicaState::open(engine.clone(), replica, generation, initial()).unwrap();
            Node { _dir: dir, engine, flusher, state, replica, generation }
        }

        fn apply(&mut self, entry: impl FnOnce(&mut dyn StateBatch)) {
            entry(&mut self.state);
            let index = self.state.header().applied.index + 1;
            self.state.set_applied(Position { index, term: 5 });
        }

        fn put(&mut self, key: &[u8], value: &'static [u8]) {
            self.apply(|state| state.put(key, Bytes::from_static(value)));
        }

        fn flush(&mut self) {
            let frozen = self.state.freeze().expect("something to flush");
            let index = frozen.header.applied.index;
            self.flusher.flush(&[frozen], &mut |_| {}).unwrap();
            self.state.release(index);
        }

        fn header(&mut self) -> Option<StateHeader> {
            self.flusher.header(self.replica, self.generation).unwrap()
        }

        fn begin(&mut self) -> Digester {
            let header = self.header().expect("it was flushed");
            Digester::new(self.engine.clone(), self.replica, self.generation, header)
        }

        fn digest(&mut self, step: usize) -> StateDigest {
            let mut digester = self.begin();
            while !digester.step(step).unwrap() {}
            let header = self.header();
            digester.finish(header.as_ref()).expect("nothing was written")
        }
    }

    #[test]
    fn the_same_entries_make_the_same_digest_whenever_they_are_flushed() {
        let (mut one, mut other) = (Node::new(1, 1), Node::new(900, 7));
        let session = SessionId::from_slice(&[7; 16]).unwrap();
        for node in [&mut one, &mut other] {
            node.put(b"a", b"1");
            node.apply(|state| state.sessions().open(session, 20_000));
        }
        other.flush();
        for node in [&mut one, &mut other] {
            node.put(b"b", b"2");
            node.put(b"a", b"3");
            node.apply(|state| state.delete(b"b"));
            node.flush();
        }
        let digest = one.digest(usize::MAX);
        assert_eq!((digest.index, digest.keys, digest.bytes), (GROUP_START.index + 5, 1, 2));
        assert_eq!(other.digest(1), digest, "step by step");
        // Whatever differs is seen, in its own part.
        other.apply(|state| {
            state.sessions().touch(session, 5);
        });
        other.flush();
        let used = other.digest(usize::MAX);
        assert!(used.data == digest.data && used.sessions != digest.sessions, "{used:?}, {digest:?}");
        one.apply(|state| state.put(b"a", Bytes::from_static(b"4")));
        one.flush();
        let written = one.digest(usize::MAX);
        assert!(
            written.data != digest.data && written.sessions == digest.sessions,
            "{written:?}, {digest:?}"
        );
    }

    #[test]
    fn keys_and_values_are_told_apart() {
        let digest = |pairs: &[(&[u8], &'static [u8])]| {
            let mut node = Node::new(1, 1);
            for (key, value) in pairs {
                node.put(key, value);
            }
            node.flush();
            node.digest(usize::MAX).data
        };
        let all = [
            digest(&[(b"ab", b"c")]),
            digest(&[(b"a", b"bc")]),
            digest(&[(b"a", b"b"), (b"c", b"")]),
            digest(&[(b"a", b""), (b"bc", b"")]),
        ];
        for (at, one) in all.iter().enumerate() {
            assert!(!all[..at].contains(one), "{at}");
        }
    }

    #[test]
    fn a_state_that_goes_on_meanwhile_has_no_digest() {
        let mut node = Node::new(1, 1);
        node.put(b"a", b"1");
        node.flush();
        // Writes in memory are no matter.
        let mut digester = node.begin();
        node.put(b"b", b"2");
        while !digester.step(1).unwrap() {}
        let header = node.header();
        assert!(digester.finish(header.as_ref()).is_some());
        let mut digester = node.begin();
        node.flush();
        while !digester.step(1).unwrap() {}
        let header = node.header();
        assert_eq!(digester.finish(header.as_ref()), None, "a flush came between");
        let digester = node.begin();
        node.flusher.destroy(&[node.replica]).unwrap();
        let header = node.header();
        assert_eq!(digester.finish(header.as_ref()), None, "it was removed");
    }
}
