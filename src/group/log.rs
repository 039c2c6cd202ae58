//! The log of one group as raft-rs reads it: a cache of recent entries over the node's [`LogStore`].
//!
//! With async ready, raft-rs considers an entry stable as soon as it was handed to the log writer,
//! and reads it back from here. So the cache always holds what is not yet durable. Older entries are
//! read from the store: on this thread where raft can't wait (they are few: after a start, before an
//! election), and through [`super::types::Fetch`] for a lagging follower, which can be long.
//!
//! Invariant: `truncated ≤ cached.first - 1` and `persisted ≤ last`; indexes in the cache are contiguous
//! and end at `last`.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use raft::eraftpb::{ConfState, Entry, Snapshot};
use raft::{GetEntriesContext, RaftState, Storage, StorageError as RaftStorageError};

use super::per_member::PerMember;
use super::types::Fetch;
use crate::ids::{Index, Position, ReplicaId, Term};
use crate::limits;
use crate::storage::StorageError;
use crate::storage::log::{LogState, LogStore};

/// Bytes of log entries in the caches of all groups of a node. One per node; each group tells it what
/// it holds, and holds less while all together hold too much.
#[derive(Debug, Default)]
pub struct CachedBytes(AtomicUsize);

impl CachedBytes {
    /// The sum.
    pub fn get(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    fn add(&self, bytes: usize) {
        self.0.fetch_add(bytes, Ordering::Relaxed);
    }

    fn sub(&self, bytes: usize) {
        self.0.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// Bytes that an entry costs in memory and on the wire, about.
pub fn entry_bytes(entry: &Entry) -> usize {
    64 + entry.data.len() + entry.context.len()
}

/// See the module page.
pub struct GroupLog {
    replica: ReplicaId,
    store: Arc<dyn LogStore>,
    /// What raft begins with; gone once it has.
    initial: Option<Box<RaftState>>,
    truncated: Position,
    last: Index,
    /// First index of each term, ascending; covers `(truncated, last]`.
    terms: Vec<(Index, Term)>,
    cache: VecDeque<Entry>,
    cache_bytes: usize,
    /// Bytes of all entries appended since the log was opened, replaced ones left out.
    appended_bytes: u64,
    /// Bytes between two marks.
    mark_bytes: u64,
    /// Now and then an index, and `appended_bytes` before the entry that follows on it; ascending.
    marks: VecDeque<(Index, u64)>,
    /// Counts `cache_bytes` of all groups.
    node_bytes: Arc<CachedBytes>,
    persisted: Index,
    /// There is seldom anything in it: usually all that raft asks for is in memory.
    beyond: RefCell<Option<Box<Beyond>>>,
}

/// What raft asks for that isn't in memory.
#[derive(Default)]
struct Beyond {
    /// A read that a follower needs and raft is told to wait for.
    wanted: Option<(Fetch, GetEntriesContext)>,
    /// What was fetched, until raft has asked for it again.
    fetched: Vec<Entry>,
    /// Followers for which raft asked for a snapshot, since it was last looked at.
    snapshots_wanted: Vec<ReplicaId>,
    /// Snapshots that followers have installed, for raft to learn of.
    snapshots: PerMember<Position>,
    /// Why the store could not be read; raft only sees "unavailable".
    failure: Option<StorageError>,
}

impl Beyond {
    /// Whether the shell is to do something about it.
    fn asks(&self) -> bool {
        self.failure.is_some() || self.wanted.is_some() || !self.snapshots_wanted.is_empty()
    }

    fn is_empty(&self) -> bool {
        !self.asks() && self.fetched.is_empty() && self.snapshots.is_empty()
    }
}

impl GroupLog {
    /// A log as the store has it, with the configuration of the applied state. `node_bytes` is shared by
    /// the groups of a node.
    pub fn new(
        replica: ReplicaId,
        store: Arc<dyn LogStore>,
        state: LogState,
        conf_state: ConfState,
        mark_bytes: u64,
        node_bytes: Arc<CachedBytes>,
    ) -> GroupLog {
        GroupLog {
            replica,
            store,
            initial: Some(Box::new(RaftState::new(state.hard_state, conf_state))),
            truncated: state.truncated,
            last: state.last,
            terms: state.terms,
            cache: VecDeque::new(),
            cache_bytes: 0,
            appended_bytes: 0,
            mark_bytes,
            marks: VecDeque::from([(state.last, 0)]),
            node_bytes,
            persisted: state.last,
            beyond: RefCell::new(None),
        }
    }

    /// Raft has begun: it keeps hard state and configuration itself from now on.
    pub fn begun(&mut self) {
        self.initial = None;
    }

    /// Takes over entries that are on their way to the log writer. They replace what is there from
    /// the first of them on.
    pub fn append(&mut self, entries: &[Entry]) {
        let Some(first) = entries.first() else { return };
        assert!(first.index > self.truncated.index, "append below the truncated index");
        assert!(first.index <= self.last + 1, "append leaves a gap in the log");
        if first.index <= self.last {
            self.truncate_suffix(first.index);
        }
        for entry in entries {
            debug_assert_eq!(entry.index, self.last + 1);
            if self.terms.last().is_none_or(|&(_, term)| term != entry.term) {
                self.terms.push((entry.index, entry.term));
            }
            self.last = entry.index;
            let bytes = entry_bytes(entry);
            self.cache_bytes += bytes;
            self.node_bytes.add(bytes);
            self.appended_bytes += bytes as u64;
            if self.marks.back().is_none_or(|&(_, at)| self.appended_bytes - at >= self.mark_bytes) {
                self.marks.push_back((entry.index, self.appended_bytes));
            }
            self.cache.push_back(entry.clone());
        }
    }

    /// The least index behind which the log holds no more than `bytes`, told by marks, so a little
    /// less; the truncated one if it holds less. What the log held when it
    /// was opened counts for nothing, since its size is not known without reading it.
    pub fn index_before(&self, bytes: u64) -> Index {
        let from = self.appended_bytes.saturating_sub(bytes);
        match self.marks.partition_point(|&(_, at)| at < from) {
            0 => self.truncated.index,
            first => self.marks.get(first).map_or(self.last, |&(index, _)| index),
        }
    }

    /// Bytes of the entries behind `index`, told by marks, so a little more.
    pub fn bytes_behind(&self, index: Index) -> u64 {
        let before = self.marks.partition_point(|&(at, _)| at <= index);
        let at = before.checked_sub(1).and_then(|mark| self.marks.get(mark)).map_or(0, |&(_, at)| at);
        self.appended_bytes - at
    }

    /// Bytes of the entries in `[low, high)` that [`GroupLog::read`] returns for `max_bytes`; `max_bytes`, where they aren't
    /// in memory.
    pub fn pass_bytes(&self, low: Index, high: Index, max_bytes: usize) -> usize {
        let Some(skip) = low.checked_sub(self.cache_first()) else { return max_bytes };
        let (skip, count) = (skip as usize, high.saturating_sub(low) as usize);
        let mut bytes = 0;
        for entry in self.cache.iter().skip(skip).take(count) {
            let with = bytes + entry_bytes(entry);
            if bytes > 0 && with > max_bytes {
                break;
            }
            bytes = with;
        }
        bytes
    }

    fn truncate_suffix(&mut self, from: Index) {
        while self.cache.back().is_some_and(|e| e.index >= from) {
            if let Some(entry) = self.cache.pop_back() {
                self.forget(&entry);
            }
        }
        while self.terms.last().is_some_and(|&(index, _)| index >= from) {
            self.terms.pop();
        }
        self.last = from - 1;
        while self.marks.back().is_some_and(|&(index, _)| index > self.last) {
            self.marks.pop_back();
        }
        // A little too much, by what follows on the last mark: it makes the log give way early.
        if self.marks.is_empty() {
            self.marks.push_back((self.last, self.appended_bytes));
        }
        self.persisted = self.persisted.min(self.last);
        // What was fetched for a follower may have been replaced.
        if let Some(beyond) = self.beyond.get_mut() {
            beyond.fetched.clear();
        }
        // A cache that began above `from` is empty now; it stays contiguous because the next entry
        // appended is `from`.
    }

    /// The log writer has everything up to `index`, unless it was replaced meanwhile.
    pub fn set_persisted(&mut self, position: Position) {
        if position.index > self.persisted && self.term_at(position.index) == Some(position.term) {
            self.persisted = position.index;
        }
    }

    /// Bytes of the entries in memory.
    #[cfg(test)]
    pub fn cache_bytes(&self) -> usize {
        self.cache_bytes
    }

    /// Forgets cached entries up to `done`, oldest first, that are durable and beyond the cache's bound:
    /// this group's own, or the node's for all groups, in which case nothing is kept that needn't be.
    pub fn trim_cache(&mut self, done: Index) {
        let evictable = done.min(self.persisted);
        while self.cache_bytes > limits::ENTRY_CACHE_BYTES
            || self.node_bytes.get() > limits::ENTRY_CACHE_NODE_BYTES
        {
            if self.cache.front().is_none_or(|front| front.index > evictable) {
                break;
            }
            if let Some(entry) = self.cache.pop_front() {
                self.forget(&entry);
            }
        }
    }

    /// Forgets all cached entries up to `done` that are durable, and gives back all room that nothing needs: the group sleeps.
    pub fn rest(&mut self, done: Index) {
        let evictable = done.min(self.persisted);
        while self.cache.front().is_some_and(|front| front.index <= evictable) {
            if let Some(entry) = self.cache.pop_front() {
                self.forget(&entry);
            }
        }
        self.cache.shrink_to_fit();
        self.terms.shrink_to_fit();
        self.marks.shrink_to_fit();
        self.beyond.get_mut().take_if(|beyond| beyond.is_empty());
    }

    /// Counts an entry that left the cache.
    fn forget(&mut self, entry: &Entry) {
        let bytes = entry_bytes(entry);
        self.cache_bytes -= bytes;
        self.node_bytes.sub(bytes);
    }

    /// Forgets everything up to `to`, which the caller drops from the store too.
    pub fn compact(&mut self, to: Position) {
        if to.index <= self.truncated.index {
            return;
        }
        assert!(
            to.index <= self.last && self.term_at(to.index) == Some(to.term),
            "compacting beyond the log"
        );
        while self.cache.front().is_some_and(|e| e.index <= to.index) {
            if let Some(entry) = self.cache.pop_front() {
                self.forget(&entry);
            }
        }
        while self.marks.len() > 1 && self.marks[1].0 <= to.index {
            self.marks.pop_front();
        }
        let runs_before = self.terms.partition_point(|&(index, _)| index <= to.index + 1);
        if runs_before > 0 {
            self.terms.drain(..runs_before - 1);
            self.terms[0].0 = self.terms[0].0.max(to.index + 1);
        }
        self.truncated = to;
        if self.terms.first().is_some_and(|&(index, _)| index > self.last) {
            self.terms.clear();
        }
    }

    /// The term of the entry at `index`; of the truncated one too.
    pub fn term_at(&self, index: Index) -> Option<Term> {
        if index == self.truncated.index {
            return Some(self.truncated.term);
        }
        if index < self.truncated.index || index > self.last {
            return None;
        }
        let run = self.terms.partition_point(|&(first, _)| first <= index);
        Some(self.terms[run.checked_sub(1)?].1)
    }

    /// The last entry that was compacted away.
    pub fn truncated(&self) -> Position {
        self.truncated
    }

    /// Entries in `[low, high)`, from cache or store, at least one, then no more than `max_bytes`.
    /// Reads the disk if they have left memory.
    pub fn read(&self, low: Index, high: Index, max_bytes: usize) -> Result<Vec<Entry>, StorageError> {
        if low <= self.truncated.index {
            return Err(StorageError::Compacted(self.truncated.index));
        }
        match self.cached(low, high, max_bytes) {
            Some(entries) => Ok(entries),
            None => self.store.entries(self.replica, low, high.min(self.cache_first()), max_bytes),
        }
    }

    fn cache_first(&self) -> Index {
        self.cache.front().map_or(self.last + 1, |e| e.index)
    }

    fn cached(&self, low: Index, high: Index, max_bytes: usize) -> Option<Vec<Entry>> {
        let first = self.cache_first();
        if low < first {
            return None;
        }
        let skip = (low - first) as usize;
        let count = (high - low) as usize;
        Some(take_bytes(self.cache.iter().skip(skip).take(count), max_bytes))
    }

    /// Whether raft waits for a read or a snapshot, or a read has failed: all of these are to be taken out below.
    pub fn asks(&self) -> bool {
        self.beyond.borrow().as_ref().is_some_and(|beyond| beyond.asks())
    }

    /// The read that raft waits for, if any; handed out once.
    pub fn take_wanted(&mut self) -> Option<(Fetch, GetEntriesContext)> {
        self.beyond.get_mut().as_mut()?.wanted.take()
    }

    /// Entries that were fetched from the store; raft asks for them again.
    pub fn set_fetched(&mut self, entries: Vec<Entry>) {
        // They may have been replaced or compacted while the read was under way.
        let valid = entries.iter().all(|e| self.term_at(e.index) == Some(e.term));
        if let Some(beyond) = self.beyond.get_mut() {
            beyond.fetched = Vec::new();
        }
        if valid && !entries.is_empty() {
            self.beyond.get_mut().get_or_insert_default().fetched = entries;
        }
    }

    /// Followers for which raft asked for a snapshot since the last call.
    pub fn take_snapshots_wanted(&mut self) -> Vec<ReplicaId> {
        self.beyond
            .get_mut()
            .as_mut()
            .map_or_else(Vec::new, |beyond| std::mem::take(&mut beyond.snapshots_wanted))
    }

    /// Sets which followers have installed a snapshot, and where, for raft to go on from there.
    pub fn set_snapshots(&mut self, installed: impl Iterator<Item = (ReplicaId, Position)>) {
        if let Some(beyond) = self.beyond.get_mut() {
            beyond.snapshots.clear();
        }
        for (replica, position) in installed {
            self.beyond.get_mut().get_or_insert_default().snapshots.insert(replica, position);
        }
    }

    /// Why the store could not be read, if it couldn't. The replica must stop.
    pub fn take_failure(&mut self) -> Option<StorageError> {
        self.beyond.get_mut().as_mut()?.failure.take()
    }
}

impl Drop for GroupLog {
    fn drop(&mut self) {
        self.node_bytes.sub(self.cache_bytes);
    }
}

fn take_bytes<'a>(entries: impl Iterator<Item = &'a Entry>, max_bytes: usize) -> Vec<Entry> {
    let mut taken = Vec::new();
    let mut bytes = 0;
    for entry in entries {
        bytes += entry_bytes(entry);
        if !taken.is_empty() && bytes > max_bytes {
            break;
        }
        taken.push(entry.clone());
    }
    taken
}

impl Storage for GroupLog {
    fn initial_state(&self) -> raft::Result<RaftState> {
        // Asked once, when raft begins.
        self.initial.as_deref().cloned().ok_or_else(|| RaftStorageError::Unavailable.into())
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        context: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        if low <= self.truncated.index {
            return Err(RaftStorageError::Compacted.into());
        }
        let max_bytes = max_size.into().map_or(usize::MAX, |m| usize::try_from(m).unwrap_or(usize::MAX));
        if let Some(entries) = self.cached(low, high, max_bytes) {
            return Ok(entries);
        }
        if let Some(fetched) = self.beyond.borrow().as_ref().map(|beyond| &beyond.fetched)
            && let (Some(first), Some(last)) = (fetched.first(), fetched.last())
            && first.index <= low
            && low <= last.index
        {
            let skip = (low - first.index) as usize;
            let count = (high.min(last.index + 1) - low) as usize;
            return Ok(take_bytes(fetched.iter().skip(skip).take(count), max_bytes));
        }
        if context.can_async() {
            let high = high.min(self.cache_first());
            let fetch = Fetch { low, high, max_bytes: max_bytes.min(limits::APPEND_TARGET_BYTES) };
            // One read at a time: raft asks again for the other followers once this one is answered.
            self.beyond.borrow_mut().get_or_insert_default().wanted.get_or_insert((fetch, context));
            return Err(RaftStorageError::LogTemporarilyUnavailable.into());
        }
        // raft-rs treats a short answer as the whole range only if it is limited by size, so a range
        // that spans store and cache is read from the store alone: what is in the cache and was
        // evicted before it is durable. What is not yet durable can't be asked for here with `low`
        // below the cache.
        self.store.entries(self.replica, low, high.min(self.persisted + 1), max_bytes).map_err(|error| {
            self.beyond.borrow_mut().get_or_insert_default().failure = Some(error);
            RaftStorageError::Unavailable.into()
        })
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        if index < self.truncated.index {
            return Err(RaftStorageError::Compacted.into());
        }
        self.term_at(index).ok_or_else(|| RaftStorageError::Unavailable.into())
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.truncated.index + 1)
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last)
    }

    fn snapshot(&self, request_index: u64, to: u64) -> raft::Result<Snapshot> {
        let to = ReplicaId(to);
        let mut beyond = self.beyond.borrow_mut();
        match beyond.as_ref().and_then(|beyond| beyond.snapshots.get(to)) {
            Some(at) if at.index >= self.truncated.index.max(request_index) => {
                let mut snapshot = Snapshot::default();
                let metadata = snapshot.mut_metadata();
                metadata.index = at.index;
                metadata.term = at.term;
                Ok(snapshot)
            }
            _ => {
                let wanted = &mut beyond.get_or_insert_default().snapshots_wanted;
                if !wanted.contains(&to) {
                    wanted.push(to);
                }
                Err(RaftStorageError::SnapshotTemporarilyUnavailable.into())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use raft::eraftpb::HardState;

    use super::*;
    use crate::ids::GROUP_START;
    use crate::storage::log::RecordedMembership;
    use crate::storage::log_memory::MemoryLog;

    fn log(node_bytes: &Arc<CachedBytes>) -> GroupLog {
        let state = LogState {
            hard_state: HardState::default(),
            truncated: GROUP_START,
            last: GROUP_START.index,
            terms: Vec::new(),
            membership: RecordedMembership::default(),
        };
        let store = Arc::new(MemoryLog::new());
        GroupLog::new(ReplicaId(1), store, state, ConfState::default(), 1, node_bytes.clone())
    }

    /// Appends entries of together about `bytes` bytes; returns the position of the last.
    fn append(log: &mut GroupLog, bytes: usize) -> Position {
        let data = bytes::Bytes::from(vec![7; limits::ENTRY_CACHE_BYTES / 4]);
        for _ in 0..bytes / data.len() {
            let entry = Entry { index: log.last + 1, term: 6, data: data.clone(), ..Entry::default() };
            log.append(&[entry]);
        }
        Position { index: log.last, term: 6 }
    }

    #[test]
    fn a_group_keeps_its_share_and_less_while_all_hold_too_much() {
        let node_bytes = Arc::default();
        let (mut one, mut other) = (log(&node_bytes), log(&node_bytes));
        let last = append(&mut one, 4 * limits::ENTRY_CACHE_BYTES);
        let whole = one.cache_bytes;
        one.trim_cache(last.index);
        assert_eq!(one.cache_bytes, whole, "what isn't durable stays");
        one.set_persisted(last);
        one.trim_cache(last.index);
        assert!((limits::ENTRY_CACHE_BYTES / 2..=limits::ENTRY_CACHE_BYTES).contains(&one.cache_bytes));

        append(&mut other, limits::ENTRY_CACHE_NODE_BYTES);
        assert_eq!(node_bytes.get(), one.cache_bytes + other.cache_bytes);
        one.trim_cache(last.index - 1);
        assert_eq!(one.cache.len(), 1, "what isn't applied stays");
        one.trim_cache(last.index);
        assert_eq!(one.cache_bytes, 0);
        drop(other);
        assert_eq!(node_bytes.get(), 0);
    }

    #[test]
    fn who_rests_keeps_no_more_room_than_it_needs() {
        let mut log = log(&Arc::default());
        assert!(log.initial_state().is_ok());
        log.begun();
        assert!(log.initial_state().is_err(), "raft has begun with it");
        let last = append(&mut log, 16 * limits::ENTRY_CACHE_BYTES);
        log.set_persisted(last);
        log.set_fetched(log.read(last.index, last.index + 1, 1).expect("cached"));
        let to = ReplicaId(2);
        log.set_snapshots([(to, last)].into_iter());
        assert!(!log.asks());
        log.rest(last.index);
        assert_eq!((log.cache.capacity(), log.marks.capacity()), (0, log.marks.len()));
        assert!(log.snapshot(0, to.0).is_ok(), "what raft hasn't taken yet stays");
        log.set_fetched(Vec::new());
        log.set_snapshots([].into_iter());
        log.rest(last.index);
        assert!(log.beyond.get_mut().is_none());
        assert!(log.snapshot(0, to.0).is_err() && log.asks());
        log.rest(last.index);
        assert_eq!(log.take_snapshots_wanted(), [to], "nor is anything forgotten that raft has asked for");
    }
}
