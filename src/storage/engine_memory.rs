//! The state engine in memory, for tests and simulation. It forgets unsynced writes on demand, all
//! of them or any part, as a disk may when the power fails.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use bytes::Bytes;

use super::StorageError;
use super::engine::{Engine, Mutation};

/// An ordered map with a memory of what is durable. Cloning what is inside is not offered: share it
/// behind an `Arc`.
#[derive(Default)]
pub struct MemoryEngine {
    tables: RwLock<Tables>,
}

#[derive(Default)]
struct Tables {
    /// What a reader sees.
    current: BTreeMap<Vec<u8>, Bytes>,
    /// For each key written since the last sync: its value at that sync.
    unsynced: BTreeMap<Vec<u8>, Option<Bytes>>,
}

/// Which unsynced writes a crash takes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CrashLoss {
    /// None: the process died, the machine lives.
    Nothing,
    /// All: nothing reached the disk by itself.
    Everything,
    /// For each key written since the last sync, its durable or its newest value, as this seed
    /// decides.
    Random(u64),
}

impl MemoryEngine {
    /// An empty engine.
    pub fn new() -> MemoryEngine {
        MemoryEngine::default()
    }

    /// Loses unsynced writes as a crash would. What is left counts as durable.
    pub fn crash(&self, loss: CrashLoss) {
        let mut guard = self.lock_mut();
        let tables = &mut *guard;
        let unsynced = std::mem::take(&mut tables.unsynced);
        for (key, durable) in unsynced {
            let lost = match loss {
                CrashLoss::Nothing => false,
                CrashLoss::Everything => true,
                // A hash, not a generator: the fate of a key doesn't depend on the other keys.
                CrashLoss::Random(seed) => xxhash_rust::xxh3::xxh3_64_with_seed(&key, seed) & 1 == 0,
            };
            match durable {
                _ if !lost => {}
                Some(value) => {
                    tables.current.insert(key, value);
                }
                None => {
                    tables.current.remove(&key);
                }
            }
        }
    }

    /// Number of keys.
    pub fn len(&self) -> usize {
        self.lock().current.len()
    }

    /// Whether there are no keys.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    // A panic while the lock was held can't leave the maps broken: they are changed by single calls.
    fn lock(&self) -> RwLockReadGuard<'_, Tables> {
        self.tables.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_mut(&self) -> RwLockWriteGuard<'_, Tables> {
        self.tables.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Engine for MemoryEngine {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StorageError> {
        Ok(self.lock().current.get(key).cloned())
    }

    fn scan(
        &self,
        from: Bound<&[u8]>,
        to: &[u8],
        visit: &mut dyn FnMut(&[u8], Bytes) -> bool,
    ) -> Result<(), StorageError> {
        let tables = self.lock();
        for (key, value) in tables
            .current
            .range::<[u8], _>((from, Bound::Unbounded))
            .take_while(|(key, _)| to.is_empty() || key.as_slice() < to)
        {
            if !visit(key, value.clone()) {
                break;
            }
        }
        Ok(())
    }

    fn write(&self, batch: &[Mutation]) -> Result<(), StorageError> {
        let mut guard = self.lock_mut();
        let tables = &mut *guard;
        for (key, value) in batch {
            let before = match value {
                Some(value) => tables.current.insert(key.clone(), value.clone()),
                None => tables.current.remove(key),
            };
            tables.unsynced.entry(key.clone()).or_insert(before);
        }
        Ok(())
    }

    fn sync(&self) -> Result<(), StorageError> {
        self.lock_mut().unsynced.clear();
        Ok(())
    }

    fn disk_bytes(&self) -> u64 {
        let tables = self.lock();
        let bytes: usize = tables.current.iter().map(|(k, v)| k.len() + v.len()).sum();
        bytes as u64
    }

    fn name(&self) -> &'static str {
        "memory"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(key: &str, value: &str) -> Mutation {
        (key.as_bytes().to_vec(), Some(Bytes::copy_from_slice(value.as_bytes())))
    }

    #[test]
    fn a_crash_takes_what_was_not_synced() {
        let engine = MemoryEngine::new();
        engine.write(&[put("a", "1"), put("b", "1")]).unwrap();
        engine.sync().unwrap();
        engine.write(&[put("a", "2"), put("c", "2")]).unwrap();
        engine.write(&[put("a", "3"), (b"b".to_vec(), None)]).unwrap();
        engine.crash(CrashLoss::Everything);
        assert_eq!(engine.get(b"a").unwrap().unwrap(), "1");
        assert_eq!(engine.get(b"b").unwrap().unwrap(), "1");
        assert_eq!(engine.get(b"c").unwrap(), None);
        engine.write(&[put("c", "4")]).unwrap();
        engine.crash(CrashLoss::Nothing);
        assert_eq!(engine.get(b"c").unwrap().unwrap(), "4");
        engine.crash(CrashLoss::Everything);
        assert_eq!(engine.get(b"c").unwrap().unwrap(), "4", "it was left once");
    }

    #[test]
    fn a_random_crash_takes_a_part() {
        let engine = MemoryEngine::new();
        let batch: Vec<_> = (0..64).map(|i| put(&format!("{i:02}"), "x")).collect();
        engine.write(&batch).unwrap();
        engine.crash(CrashLoss::Random(7));
        assert!((1..64).contains(&engine.len()), "{} left", engine.len());
    }
}
