//! How the replicas of a node share the memory for their memtables.
//!
//! What a replica applies waits in memory until the flush thread has brought it to the state store. All of a
//! node's tables together have one bound, and the disk may be slower than a replica applies: one that catches up on
//! hundreds of megabytes fills whatever it is given. So how much a replica may hold depends on what is left:
//!
//! ```text
//! share = 8 · free² / limit
//! ```
//!
//! The less is free, the smaller a replica has to be to go on: the greatest pause first, the least last. One that
//! fills memory alone comes to 70 % of the bound, each of two to 39 %, each of eight to 11 %; what they leave is for all
//! those that hold less, and that is never nothing: a pass of
//! [`APPLY_PASS_BYTES`](crate::limits::APPLY_PASS_BYTES) is begun only with the square root of `pass · limit / 8` left
//! behind it, 2 MiB of 32. Nobody has to know who leads, who catches up, or how many they are.
//!
//! Promises:
//! - *bounded*: passes one after the other never exceed the bound. Those begun at the same time on other threads, and
//!   what a table takes beyond the bytes of the entries, come on top: a pass for each thread.
//! - *fair*: whoever is refused would hold more than anybody who isn't, at the same moment.
//! - *progress*: while no more than half of the bound is taken nobody is refused, not even an entry that is
//!   greater than any share; above half everything is flushed. So who pauses goes on after a flush.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::shared::Shared;
use crate::limits::{FLUSH_FREE_PART, FLUSH_TIGHT_BYTES_MIN};

/// The rule, without anything that is shared between threads. Sizes are in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Sharing {
    limit: usize,
}

impl Sharing {
    /// The rule for memory with this bound.
    pub fn new(limit: usize) -> Sharing {
        Sharing { limit }
    }

    /// What a replica may hold while all together hold `total`: nothing, once that is the bound.
    pub fn share(&self, total: usize) -> usize {
        let free = self.limit.saturating_sub(total) as u128;
        let share = free.saturating_mul(free).saturating_mul(8) / (self.limit as u128).max(1);
        usize::try_from(share).unwrap_or(usize::MAX)
    }

    /// Whether a replica that holds `own` of the `total` may apply entries of `adds` bytes.
    pub fn admits(&self, total: usize, own: usize, adds: usize) -> bool {
        total <= self.limit / 2 || own.saturating_add(adds) < self.share(total.saturating_add(adds))
    }

    /// Whether tables that take writes are to be flushed, all of them together holding `active`: at half of the
    /// bound, so that the other half takes what is written while that is under way.
    pub fn must_flush(&self, active: usize) -> bool {
        active > self.limit / 2
    }

    /// What may be known of engines on top of what is: what `tables` leave, but half of the bound at most, as a node
    /// that isn't written needn't be as large as one that is. Memtables come first: what is known never makes them pause.
    /// A follower answers next to nobody: it may know of its engine only as long as all together know less than an eighth.
    pub fn room(&self, tables: usize, known: usize, leads: bool) -> usize {
        let most = if leads { self.limit / 2 } else { self.limit / 8 };
        self.limit.saturating_sub(tables.saturating_add(known)).min(most.saturating_sub(known))
    }

    /// Whether there is hardly any such room.
    pub fn is_tight(&self, tables: usize, known: usize) -> bool {
        self.room(tables, known, true) < self.limit / 16
    }

    /// Bytes in the active table of one replica above which it is flushed by itself.
    pub fn replica_limit(&self) -> usize {
        self.limit / 4
    }
}

/// Bytes in memtables of all replicas of a node, against their bound, and what is known of their engine beside them;
/// and their sessions, whose tables are bounded per shard.
pub struct MemoryGauge {
    active: AtomicUsize,
    frozen: AtomicUsize,
    known: AtomicUsize,
    sessions: AtomicUsize,
    paused: AtomicUsize,
    sharing: Sharing,
}

/// What one replica counts for in a node's gauge: nothing any more once it is dropped, on unwinding too.
pub struct MemoryShare {
    shared: Arc<Shared>,
    bytes: (usize, usize),
    known: usize,
    sessions: usize,
    paused: bool,
}

impl MemoryShare {
    /// Of a replica without memtables.
    pub fn new(shared: Arc<Shared>) -> MemoryShare {
        MemoryShare { shared, bytes: (0, 0), known: 0, sessions: 0, paused: false }
    }

    /// The replica's memtables have so many bytes now, active and frozen.
    pub fn set(&mut self, bytes: (usize, usize)) {
        if bytes != self.bytes {
            self.shared.memory.update(self.bytes, bytes);
            self.bytes = bytes;
        }
    }

    /// So many bytes are known of its engine now.
    pub fn set_known(&mut self, known: usize) {
        if known != self.known {
            self.shared.memory.update_known(self.known, known);
            self.known = known;
        }
    }

    /// Its shard has so many sessions now.
    pub fn set_sessions(&mut self, sessions: usize) {
        if sessions != self.sessions {
            self.shared.memory.update_sessions(self.sessions, sessions);
            self.sessions = sessions;
        }
    }

    /// Whether the replica has to pause, with entries of so many bytes to apply next.
    pub fn must_pause(&mut self, adds: usize) -> bool {
        let paused = !self.shared.memory.admits(self.bytes.0 + self.bytes.1, adds);
        self.set_paused(paused);
        paused
    }

    /// As it was last told.
    pub fn is_paused(&self) -> bool {
        self.paused
    }

    /// Bytes in its active memtable.
    pub fn active(&self) -> usize {
        self.bytes.0
    }

    fn set_paused(&mut self, paused: bool) {
        if paused != self.paused {
            self.shared.memory.update_paused(self.paused, paused);
            self.paused = paused;
        }
    }
}

impl Drop for MemoryShare {
    fn drop(&mut self) {
        self.set((0, 0));
        self.set_known(0);
        self.set_sessions(0);
        self.set_paused(false);
    }
}

impl MemoryGauge {
    /// A gauge with a bound in bytes.
    pub fn new(limit: usize) -> MemoryGauge {
        let zero = || AtomicUsize::new(0);
        MemoryGauge {
            active: zero(),
            frozen: zero(),
            known: zero(),
            sessions: zero(),
            paused: zero(),
            sharing: Sharing::new(limit),
        }
    }

    /// A replica's memtables went from `before` to `after` (active, frozen) bytes.
    fn update(&self, before: (usize, usize), after: (usize, usize)) {
        // Wrapping, so that one atomic add does both directions; the sums never go below zero.
        // A table that is being frozen counts twice rather than not at all.
        self.frozen.fetch_add(after.1.wrapping_sub(before.1), Ordering::Relaxed);
        self.active.fetch_add(after.0.wrapping_sub(before.0), Ordering::Relaxed);
    }

    fn update_known(&self, before: usize, after: usize) {
        self.known.fetch_add(after.wrapping_sub(before), Ordering::Relaxed);
    }

    fn update_sessions(&self, before: usize, after: usize) {
        self.sessions.fetch_add(after.wrapping_sub(before), Ordering::Relaxed);
    }

    fn update_paused(&self, before: bool, after: bool) {
        self.paused.fetch_add(usize::from(after).wrapping_sub(usize::from(before)), Ordering::Relaxed);
    }

    /// Sessions of all replicas.
    pub fn sessions(&self) -> usize {
        self.sessions.load(Ordering::Relaxed)
    }

    /// Replicas that pause.
    pub fn paused(&self) -> usize {
        self.paused.load(Ordering::Relaxed)
    }

    /// Bytes in active and in frozen memtables.
    pub fn bytes(&self) -> (usize, usize) {
        (self.active.load(Ordering::Relaxed), self.frozen.load(Ordering::Relaxed))
    }

    /// Whether a replica that holds `own` bytes may apply entries of `adds` bytes.
    pub fn admits(&self, own: usize, adds: usize) -> bool {
        let (active, frozen) = self.bytes();
        self.sharing.admits(active.wrapping_add(frozen), own, adds)
    }

    /// Bytes that are known of engines.
    pub fn known(&self) -> usize {
        self.known.load(Ordering::Relaxed)
    }

    /// See [`Sharing::room`].
    pub fn room(&self, leads: bool) -> usize {
        let (active, frozen) = self.bytes();
        self.sharing.room(active.wrapping_add(frozen), self.known(), leads)
    }

    /// See [`Sharing::is_tight`].
    pub fn is_tight(&self) -> bool {
        let (active, frozen) = self.bytes();
        self.sharing.is_tight(active.wrapping_add(frozen), self.known())
    }

    /// See [`Sharing::must_flush`].
    pub fn must_flush(&self) -> bool {
        self.sharing.must_flush(self.bytes().0)
    }

    /// Whether tables that take writes are to be flushed for the sake of a disk that has so many bytes free: each needs room as a
    /// whole, so they must not grow to more than a part of that. 0: it wasn't looked at.
    pub fn is_much_for(&self, free: u64) -> bool {
        free > 0 && self.bytes().0 as u64 > (free / FLUSH_FREE_PART).max(FLUSH_TIGHT_BYTES_MIN)
    }

    /// See [`Sharing::replica_limit`].
    pub fn replica_limit(&self) -> usize {
        self.sharing.replica_limit()
    }
}

#[cfg(test)]
#[path = "memory_tests.rs"]
mod tests;
