//! How much the shards hold that this node leads: keys and bytes, counted in the background.
//!
//! A plan for moves names what each of them carries, and how far one is can only be told by that. An
//! estimate is enough: a shard is counted page by page while it changes, at most every
//! [`limits::COUNT_MS`], and only if it has changed much. The pages are read on the read thread like any
//! scan, between the queries of clients, and take a small part of its time.

use std::collections::HashMap;
use std::ops::Bound;
use std::time::{Duration, Instant};

use actix::prelude::*;
use bytes::Bytes;
use tokio::sync::oneshot;

use super::messages::CountPage;
use super::replica::ReplicaAddr;
use super::supervisor::Supervisor;
use crate::ids::ReplicaId;
use crate::limits;
use crate::storage::state::StateReader;
use crate::storage::{StateView, StorageError};

/// What a replica's state holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counted {
    /// Keys.
    pub keys: u64,
    /// Bytes of keys and values.
    pub bytes: u64,
}

/// The last count of a replica.
#[derive(Clone, Copy, Debug)]
struct Count {
    counted: Counted,
    /// The shard's revision counter when it began.
    revision: u64,
    /// When it ended, or when it was found to be good still.
    at: Instant,
}

/// The last counts. Owned by the supervisor.
#[derive(Debug, Default)]
pub struct Counts {
    counts: HashMap<ReplicaId, Count>,
    /// One is counted at a time.
    under_way: bool,
}

/// Part of a count: what a page holds, and the key after which the next begins; `None`: that was the last.
pub struct Page {
    counted: Counted,
    next: Option<Bytes>,
}

impl Counts {
    /// As last counted; nothing before that.
    pub fn of(&self, replica: ReplicaId) -> Counted {
        self.counts.get(&replica).map_or(Counted::default(), |count| count.counted)
    }

    /// Which of these is to be counted next: one that never was, else the one whose count is oldest, if that
    /// is old enough.
    fn due(&self, led: impl Iterator<Item = ReplicaId>, now: Instant) -> Option<ReplicaId> {
        let since = |replica: &ReplicaId| self.counts.get(replica).map(|count| count.at);
        let oldest = led.min_by_key(since)?;
        let old = Duration::from_millis(limits::COUNT_MS);
        since(&oldest).is_none_or(|at| now.saturating_duration_since(at) >= old).then_some(oldest)
    }

    /// Whether a shard at `revision` has changed so much that it is worth counting again.
    fn is_stale(&self, replica: ReplicaId, revision: u64) -> bool {
        self.counts.get(&replica).is_none_or(|count| {
            // Each change takes a revision. So many may be a twentieth of the keys, or less.
            revision.abs_diff(count.revision) > count.counted.keys / 20
        })
    }
}

/// Counts a page of a state, on a thread that may wait for the disk.
pub fn count_page(reader: &StateReader, after: &Bytes) -> Result<Page, StorageError> {
    let mut counted = Counted::default();
    let (mut pairs, mut next) = (0, None);
    let from = if after.is_empty() { Bound::Unbounded } else { Bound::Excluded(&after[..]) };
    reader.scan(from, &mut |key, value| {
        pairs += 1;
        counted.keys += 1;
        counted.bytes += (key.len() + value.len()) as u64;
        let full = pairs >= limits::COUNT_STEP_PAIRS || counted.bytes >= limits::COUNT_STEP_BYTES as u64;
        if full {
            next = Some(Bytes::copy_from_slice(key));
        }
        !full
    })?;
    Ok(Page { counted, next })
}

impl Supervisor {
    /// Begins to count one of the shards that are led here, if one is due and none is being counted.
    pub(super) fn count_next(&mut self, ctx: &mut Context<Self>) {
        if self.counts.under_way || self.stopping {
            return;
        }
        let addrs = &self.addrs;
        self.counts.counts.retain(|replica, _| addrs.contains_key(replica));
        let led = self.replicas.iter().filter(|slot| self.led.contains(&slot.record.shard));
        let due = self.counts.due(led.map(|slot| slot.record.replica), Instant::now());
        let Some((replica, addr)) = due.and_then(|due| Some((due, self.addrs.get(&due)?.clone()))) else {
            return;
        };
        self.counts.under_way = true;
        let first = ask(addr.clone(), Bytes::new());
        ctx.spawn(fut::wrap_future(first).then(move |reader, act: &mut Self, _| {
            let reader = reader.filter(|reader| act.counts.is_stale(replica, reader.revision()));
            let shared = act.shared.clone();
            fut::wrap_future(async move {
                let mut reader = reader?;
                let revision = reader.revision();
                let (mut all, mut after) = (Counted::default(), Bytes::new());
                loop {
                    let begun = Instant::now();
                    let (done, page) = oneshot::channel();
                    shared.reader.count(reader, after, done);
                    let Page { counted, next } = page.await.ok()?;
                    all.keys += counted.keys;
                    all.bytes += counted.bytes;
                    after = match next {
                        Some(next) => next,
                        None => return Some((all, revision)),
                    };
                    actix::clock::sleep(begun.elapsed() * (limits::COUNT_SHARE - 1)).await;
                    reader = ask(addr.clone(), after.clone()).await?;
                }
            })
            .map(move |counted, act: &mut Self, _| act.counts.end(replica, counted))
        }));
    }
}

impl Counts {
    /// A count has ended; `None`: it wasn't needed, or came to nothing.
    fn end(&mut self, replica: ReplicaId, counted: Option<(Counted, u64)>) {
        self.under_way = false;
        let at = Instant::now();
        match counted {
            Some((counted, revision)) => drop(self.counts.insert(replica, Count { counted, revision, at })),
            // One that comes to nothing each time has had its turn all the same, and the others have theirs.
            None => {
                let none = Count { counted: Counted::default(), revision: 0, at };
                self.counts.entry(replica).or_insert(none).at = at;
            }
        }
    }
}

/// A page of the state after this key; `None` if the replica has ended or is too busy.
async fn ask(addr: ReplicaAddr, after: Bytes) -> Option<StateReader> {
    let patience = Duration::from_millis(limits::STATUS_MS_MAX);
    tokio::time::timeout(patience, addr.send(CountPage(after))).await.ok()?.ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    use crate::storage::StateBatch;
    use crate::storage::engine::Engine;
    use crate::storage::engine_memory::MemoryEngine;
    use crate::storage::state::{ReplicaState, StateHeader};

    #[test]
    fn all_pages_together_are_the_whole() {
        let engine: Arc<dyn Engine> = Arc::new(MemoryEngine::new());
        let header = StateHeader {
            applied: crate::ids::GROUP_START,
            revision: 0,
            log_time: 0,
            epoch: Default::default(),
            members: Vec::new(),
            conf_state: Default::default(),
        };
        let mut state = ReplicaState::open(engine, ReplicaId(1), 1, header).unwrap();
        let count = |state: &ReplicaState| {
            let (mut all, mut after, mut pages) = (Counted::default(), Bytes::new(), 0);
            loop {
                let from = if after.is_empty() { Bound::Unbounded } else { Bound::Excluded(&after[..]) };
                let reader = state.scan_reader(from, &[], limits::COUNT_STEP_PAIRS + 1);
                let Page { counted, next } = count_page(&reader, &after).unwrap();
                (all.keys, all.bytes, pages) =
                    (all.keys + counted.keys, all.bytes + counted.bytes, pages + 1);
                match next {
                    Some(next) => after = next,
                    None => return (all, pages),
                }
            }
        };
        assert_eq!(count(&state), (Counted::default(), 1));
        let keys = 3 * limits::COUNT_STEP_PAIRS as u64 + 10;
        for key in 0..keys {
            state.put(&key.to_be_bytes(), Bytes::from_static(b"12345"));
        }
        assert_eq!(count(&state), (Counted { keys, bytes: 13 * keys }, 4));
        // Some of it below, and changed since: each key counts once.
        state.set_applied(crate::ids::Position { index: 6, term: 5 });
        state.freeze().expect("something to flush");
        state.put(&7_u64.to_be_bytes(), Bytes::from_static(b"1"));
        state.delete(&9_u64.to_be_bytes());
        assert_eq!(count(&state), (Counted { keys: keys - 1, bytes: 13 * (keys - 1) - 4 }, 4));
        // Great values make small pages.
        for key in 0..3_u64 {
            state.put(&key.to_be_bytes(), Bytes::from(vec![0; limits::COUNT_STEP_BYTES]));
        }
        assert_eq!(count(&state).1, 7);
    }

    #[test]
    fn each_shard_gets_its_turn_and_is_counted_again_when_it_has_changed() {
        let mut counts = Counts::default();
        let led = || [1, 2].map(ReplicaId).into_iter();
        let start = Instant::now();
        assert_eq!(counts.due(led(), start), Some(ReplicaId(1)));
        counts.end(ReplicaId(1), Some((Counted { keys: 100, bytes: 5 }, 40)));
        assert_eq!(counts.due(led(), start), Some(ReplicaId(2)), "it never was");
        counts.end(ReplicaId(2), Some((Counted::default(), 0)));
        assert_eq!(counts.due(led(), Instant::now()), None);
        let later = Instant::now() + Duration::from_millis(limits::COUNT_MS);
        assert_eq!(counts.due(led(), later), Some(ReplicaId(1)));
        assert!(!counts.is_stale(ReplicaId(1), 45) && counts.is_stale(ReplicaId(1), 46));
        assert!(counts.is_stale(ReplicaId(2), 1) && !counts.is_stale(ReplicaId(2), 0));
        counts.end(ReplicaId(1), None);
        assert_eq!(counts.of(ReplicaId(1)), Counted { keys: 100, bytes: 5 }, "found to be good still");
        assert_eq!(counts.due(led(), later), Some(ReplicaId(2)));
        assert_eq!(counts.of(ReplicaId(3)), Counted::default());
    }

    #[test]
    fn one_that_cannot_be_counted_is_not_in_the_way_of_others() {
        let mut counts = Counts::default();
        let led = || [1, 2].map(ReplicaId).into_iter();
        let start = Instant::now();
        assert_eq!(counts.due(led(), start), Some(ReplicaId(1)));
        counts.end(ReplicaId(1), None);
        assert_eq!(counts.due(led(), start), Some(ReplicaId(2)));
        counts.end(ReplicaId(2), None);
        assert_eq!(counts.due(led(), start), None);
        let later = Instant::now() + Duration::from_millis(limits::COUNT_MS);
        assert_eq!(counts.due(led(), later), Some(ReplicaId(1)));
        assert!(counts.is_stale(ReplicaId(1), 1), "what it holds is not known");
    }
}
