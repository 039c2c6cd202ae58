//! Generations of a replica's state keys: each snapshot is loaded into one of its own, and what isn't
//! of the generation that the replica's record names is a stray. A crash in a load leaves one, and
//! every installation does: the state before it.
//!
//! Removing is not durable by itself and needn't be: what a crash brings back is still a stray.

use std::ops::Bound;

use super::engine::{Engine, Mutation};
use super::{StorageError, keys};
use crate::ids::ReplicaId;
use crate::limits::FLUSH_BATCH_KEYS;

/// The generations of which the engine holds anything for `replica`, ascending, but `current`. A few
/// look-ups, however much there is.
pub fn strays(engine: &dyn Engine, replica: ReplicaId, current: u32) -> Result<Vec<u32>, StorageError> {
    let mut found = Vec::new();
    let (mut from, end) = keys::replica_range(replica);
    loop {
        let mut next = None;
        engine.scan_keys(Bound::Included(&from), &end, &mut |key| {
            next = keys::generation_of(key);
            false
        })?;
        let Some(generation) = next else { return Ok(found) };
        if generation != current {
            found.push(generation);
        }
        from = keys::generation_range(replica, generation).1;
        if from == end {
            return Ok(found);
        }
    }
}

/// Removes up to `keys` keys of a generation in small batches; true if nothing is left of it. The
/// caller has made sure that no flush or load of that generation is under way or to come.
///
/// `from` is for the next call, empty for the first: an engine may have a mark for each key that is gone, and to
/// pass over all of them each time would take ever longer.
pub fn destroy(
    engine: &dyn Engine,
    replica: ReplicaId,
    generation: u32,
    from: &mut Vec<u8>,
    keys: usize,
) -> Result<bool, StorageError> {
    let (first, to) = keys::generation_range(replica, generation);
    if from.is_empty() {
        engine.forget_range(&first, &to)?;
        *from = first;
    }
    let mut left = keys;
    loop {
        let wanted = left.min(FLUSH_BATCH_KEYS);
        let mut batch: Vec<Mutation> = Vec::with_capacity(wanted);
        let mut more = false;
        engine.scan_keys(Bound::Included(from), &to, &mut |key| {
            more = batch.len() == wanted;
            if !more {
                batch.push((key.to_vec(), None));
            }
            !more
        })?;
        if let Some((last, _)) = batch.last() {
            from.clone_from(last);
            engine.write(&batch)?;
        }
        left -= batch.len();
        if !more || left == 0 {
            return Ok(!more);
        }
    }
}

/// Whether the engine holds nothing of a generation.
pub fn is_empty(engine: &dyn Engine, replica: ReplicaId, generation: u32) -> Result<bool, StorageError> {
    let (from, to) = keys::generation_range(replica, generation);
    let mut empty = true;
    engine.scan_keys(Bound::Included(&from), &to, &mut |_| {
        empty = false;
        false
    })?;
    Ok(empty)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::engine_memory::MemoryEngine;

    fn fill(engine: &MemoryEngine, replica: u64, generation: u32, keys: u32) {
        let mut batch: Vec<Mutation> =
            vec![(keys::header_key(ReplicaId(replica), generation), Some("h".into()))];
        for key in 0..keys {
            batch.push((
                keys::user_key(ReplicaId(replica), generation, &key.to_be_bytes()),
                Some("value".into()),
            ));
        }
        engine.write(&batch).unwrap();
    }

    #[test]
    fn strays_are_found_and_removed_and_nothing_else() {
        let engine = MemoryEngine::new();
        for (replica, generation) in [(6, 0), (7, 0), (7, 3), (7, 4), (7, u32::MAX), (8, 3)] {
            fill(&engine, replica, generation, 700);
        }
        let replica = ReplicaId(7);
        assert_eq!(strays(&engine, replica, 3).unwrap(), [0, 4, u32::MAX]);
        assert_eq!(strays(&engine, replica, 9).unwrap(), [0, 3, 4, u32::MAX]);
        assert!(strays(&engine, ReplicaId(u64::MAX), 0).unwrap().is_empty());
        for stray in [0, 4, u32::MAX] {
            let (mut rounds, mut from) = (1, Vec::new());
            while !destroy(&engine, replica, stray, &mut from, 300).unwrap() {
                rounds += 1;
            }
            assert_eq!(rounds, 3, "701 keys");
            assert!(is_empty(&engine, replica, stray).unwrap());
        }
        assert!(strays(&engine, replica, 3).unwrap().is_empty());
        assert_eq!(engine.len(), 3 * 701, "the current generation and the other replicas");
        assert!(!is_empty(&engine, replica, 3).unwrap());
    }
}
