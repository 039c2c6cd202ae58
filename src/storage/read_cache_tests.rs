//! Tests of [`super`]: what is known is what the engine holds.

use proptest::prelude::*;

use super::*;
use crate::ids::{Index, Position, ReplicaId};
use crate::storage::engine::Engine;
use crate::storage::engine_memory::MemoryEngine;
use crate::storage::state::{Frozen, Lookup, ReplicaState, StateReader, tests::initial};
use crate::storage::{StateBatch, StateView};
use std::collections::BTreeMap;

fn table(writes: &[(&[u8], &'static str)]) -> Arc<Memtable> {
    let mut table = Memtable::default();
    for (key, value) in writes {
        table.insert(key, Some(Bytes::from_static(value.as_bytes())));
    }
    Arc::new(table)
}

fn cache(room: usize) -> ReadCache {
    let mut cache = ReadCache::default();
    cache.allow(room);
    cache
}

const VALUE: Option<Bytes> = Some(Bytes::from_static(b"read"));

#[test]
fn what_was_read_before_a_table_was_absorbed_is_not_learned_after_it() {
    let mut cache = cache(10_000);
    let before = cache.stamp();
    cache.absorb(table(&[(b"a", "new")]));
    cache.learn(before, b"a", VALUE);
    cache.learn(before, b"b", VALUE);
    assert_eq!(cache.get(b"a").flatten().as_deref(), Some(&b"new"[..]));
    assert_eq!(cache.get(b"b"), None);
    cache.learn(cache.stamp(), b"b", None);
    assert_eq!(cache.get(b"b"), Some(None), "that there is nothing is known too");
}

#[test]
fn a_table_that_cannot_be_kept_takes_all_with_it() {
    let mut cache = cache(10_000);
    cache.absorb(table(&[(b"a", "old"), (b"b", "old")]));
    cache.learn(cache.stamp(), b"c", VALUE);
    cache.allow(0);
    cache.absorb(table(&[(b"a", "new")]));
    assert_eq!((cache.get(b"a"), cache.get(b"b"), cache.get(b"c"), cache.bytes()), (None, None, None, 0));
}

#[test]
fn what_is_asked_for_stays_and_the_rest_goes() {
    let key = |number: u32| number.to_be_bytes();
    let cost = Memtable::cost(&key(0), VALUE.as_ref());
    let mut cache = cache(100 * cost);
    for number in 0..1_000 {
        cache.learn(cache.stamp(), &key(number), VALUE);
        assert!(cache.recall(&key(0)).is_some(), "after {number}");
        assert!(cache.bytes() <= 101 * cost);
    }
    assert!(cache.get(&key(999)).is_some() && cache.get(&key(500)).is_none());
    assert!(cache.bytes() > 40 * cost, "a half is always used");
    cache.forget_older();
    cache.forget_older();
    assert_eq!((cache.bytes(), cache.room()), (0, 100 * cost));
}

#[derive(Clone, Debug)]
enum Step {
    Put(u8),
    Delete(u8),
    /// Ends an entry and freezes.
    Freeze,
    /// The engine gets so many of the keys of the oldest frozen table.
    Absorb(usize),
    /// The engine has all of that table.
    Release,
    Get(u8),
    /// A reader that was asked for a key answers.
    Answer(usize),
    Room(usize),
    Forget,
    /// The replica is opened again, as after an installation or a crash: memtables are gone.
    Open,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let key = 0..6_u8;
    prop::collection::vec(
        prop_oneof![
            4 => key.clone().prop_map(Step::Put),
            2 => key.clone().prop_map(Step::Delete),
            2 => Just(Step::Freeze),
            2 => (0..7_usize).prop_map(Step::Absorb),
            2 => Just(Step::Release),
            8 => key.prop_map(Step::Get),
            5 => (0..4_usize).prop_map(Step::Answer),
            2 => prop_oneof![Just(0), Just(300), Just(100_000)].prop_map(Step::Room),
            1 => Just(Step::Forget),
            1 => Just(Step::Open),
        ],
        1..120,
    )
}

/// A state, what it should be, and the readers that haven't answered yet.
struct World {
    engine: Arc<MemoryEngine>,
    state: ReplicaState,
    index: Index,
    model: BTreeMap<u8, Bytes>,
    /// The model at each freeze whose table the engine doesn't have, and the table.
    frozen: Vec<(BTreeMap<u8, Bytes>, Arc<Frozen>)>,
    durable: BTreeMap<u8, Bytes>,
    readers: Vec<(u8, StateReader)>,
}

impl World {
    fn step(&mut self, step: &Step) -> Result<(), TestCaseError> {
        match step {
            Step::Put(key) => {
                let value = Bytes::from(self.state.next_revision().to_string());
                self.state.put(&[*key], value.clone());
                self.model.insert(*key, value);
                self.applied();
            }
            Step::Delete(key) => {
                self.state.delete(&[*key]);
                self.model.remove(key);
                self.applied();
            }
            Step::Freeze => {
                if let Some(frozen) = self.state.freeze() {
                    self.frozen.push((self.model.clone(), frozen));
                }
            }
            Step::Absorb(keys) => {
                if let Some((_, frozen)) = self.frozen.first() {
                    let mutations = frozen.mutations();
                    self.engine.write(&mutations[mutations.len().saturating_sub(*keys)..]).unwrap();
                }
            }
            Step::Release => {
                if !self.frozen.is_empty() {
                    let (model, frozen) = self.frozen.remove(0);
                    self.engine.write(&frozen.mutations()).unwrap();
                    self.state.release(frozen.header.applied.index);
                    self.durable = model;
                }
            }
            Step::Get(key) => match self.state.recall(&[*key]) {
                Lookup::Known(value) => prop_assert_eq!(value.as_ref(), self.model.get(key), "key {}", key),
                Lookup::AskEngine => self.readers.push((*key, self.state.reader())),
            },
            Step::Answer(at) => {
                if *at < self.readers.len() {
                    let (key, reader) = self.readers.remove(*at);
                    let read = reader.get(&[key]).unwrap();
                    self.state.learn(reader.stamp(), &[key], read);
                }
            }
            Step::Room(room) => self.state.allow_known(*room),
            Step::Forget => self.state.forget_known(),
            Step::Open => {
                // A crash in the middle of a flush: its redo file completes it.
                if let Some((model, frozen)) = self.frozen.first() {
                    self.engine.write(&frozen.mutations()).unwrap();
                    self.durable = model.clone();
                }
                self.state = ReplicaState::open(self.engine.clone(), ReplicaId(7), 0, initial()).unwrap();
                self.index = self.state.header().applied.index;
                self.model = self.durable.clone();
                self.frozen.clear();
                // Those of an incarnation that has ended tell nobody.
                self.readers.clear();
            }
        }
        for key in 0..6 {
            let read = self.state.get(&[key]).unwrap();
            prop_assert_eq!(read.as_ref(), self.model.get(&key), "key {}", key);
        }
        Ok(())
    }

    fn applied(&mut self) {
        self.index += 1;
        self.state.set_applied(Position { index: self.index, term: 5 });
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// However writes, flushes in parts, late answers of readers and forgetting mix: a read says what was written
    /// last.
    #[test]
    fn nothing_stale_is_ever_read(steps in steps()) {
        let engine = Arc::new(MemoryEngine::new());
        let mut state = ReplicaState::open(engine.clone(), ReplicaId(7), 0, initial()).unwrap();
        state.allow_known(100_000);
        let index = state.header().applied.index;
        let mut world = World {
            engine,
            state,
            index,
            model: BTreeMap::new(),
            frozen: Vec::new(),
            durable: BTreeMap::new(),
            readers: Vec::new(),
        };
        for step in &steps {
            world.step(step)?;
        }
    }
}
