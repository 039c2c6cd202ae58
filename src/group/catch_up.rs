//! How followers that lag are brought back: which log entries are kept for them, and who needs a
//! snapshot because they are gone.
//!
//! The log is kept, beyond what every replica has, up to a bound of bytes: [`Retention::live`] for a
//! follower that answers, [`Retention::dead`] for one that has been silent for
//! [`limits::FOLLOWER_DEAD_TICKS`]. So a short outage costs a look into the log, a long one a
//! snapshot, and a dead follower never more disk than the bound. While the node's log as a whole is
//! too large ([`super::driver::Group::press_log`]), the bounds shrink.
//!
//! ```text
//!               raft asks                shell: made at B          shell: installed
//!   (nothing) ────────────► Making ──────────────────────► Bringing ───────────────► Offered ─► Noted ─► (nothing)
//!                             │ log held where it begins      │ log held at B    raft takes the offer  │ follower acknowledges
//!                             └───────────── failed ──────────┴──► Resting ─► asked anew ◄─────────────┘ or needs more
//! ```
//!
//! raft-rs learns of a snapshot only when it is installed already: its progress then goes through the
//! state `Snapshot` at once, and its message is not sent. What travels to the follower, and how it is
//! installed there, is the shell's. Until then raft finds the snapshot "temporarily unavailable", asks
//! again with every heartbeat, and goes on counting the follower's answers.
//!
//! Invariant: while a snapshot at B is under way, and until the follower has acknowledged an entry behind it,
//! the entries after B stay in this log, unless that would take more than [`Retention::snapshot`];
//! then the snapshot is worth nothing and is made anew.

use std::collections::BTreeMap;

use super::log::GroupLog;
use crate::ids::{Index, Position, ReplicaId};
use crate::limits;

/// Bytes of log that are kept for followers that lag.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Retention {
    /// For one that answers.
    pub live: u64,
    /// For one that doesn't.
    pub dead: u64,
    /// Behind a snapshot that is being made or brought to a follower.
    pub snapshot: u64,
}

impl Retention {
    /// From the one number that an operator sets: what a dead follower is kept.
    pub fn new(dead: u64) -> Retention {
        let snapshot = dead.saturating_mul(16).max(limits::SNAPSHOT_LOG_BYTES_MIN);
        Retention { live: dead.saturating_mul(4), dead, snapshot }
    }

    /// How finely a log has to know its size to keep these bounds.
    pub fn mark_bytes(self) -> u64 {
        (self.dead / 64).clamp(64, 64 * 1024)
    }

    /// While the node's log is too large.
    fn pressed(self) -> Retention {
        Retention { live: self.dead, dead: 0, snapshot: self.live }
    }
}

/// Where a snapshot for one follower stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Transfer {
    /// The shell makes it; it will be at this index or a later one.
    Making(Index),
    /// It is made, exact at this position, and on its way.
    Bringing(Position),
    /// It is installed; raft is to be told.
    Offered(Position),
    /// raft goes on from there, or is about to.
    Noted(Position),
    /// It failed; not asked for again before this tick.
    Resting(u64),
}

impl Transfer {
    /// From where on the log has to stay for it.
    fn held(&self) -> Option<Index> {
        match *self {
            Transfer::Making(held) => Some(held),
            Transfer::Bringing(at) | Transfer::Offered(at) | Transfer::Noted(at) => Some(at.index),
            Transfer::Resting(_) => None,
        }
    }
}

/// The followers of a leader.
pub struct CatchUp {
    retention: Retention,
    /// The tick at which each was last known to answer.
    seen: BTreeMap<ReplicaId, u64>,
    transfers: BTreeMap<ReplicaId, Transfer>,
    /// Until this tick the log is pressed.
    pressed_until: u64,
}

impl CatchUp {
    /// Nobody yet.
    pub fn new(retention: Retention) -> CatchUp {
        CatchUp { retention, seen: BTreeMap::new(), transfers: BTreeMap::new(), pressed_until: 0 }
    }

    /// Leadership begins or ends at tick `now`: what was known of followers is void, and a snapshot
    /// under way is not for this replica to follow up any more.
    pub fn reset(&mut self) {
        self.seen.clear();
        self.transfers.clear();
    }

    /// The node's log is too large.
    pub fn press(&mut self, now: u64) {
        self.pressed_until = now + limits::LOG_PRESSED_TICKS;
    }

    /// Whether the log is pressed at tick `now`.
    pub fn is_pressed(&self, now: u64) -> bool {
        now < self.pressed_until
    }

    /// A tick: `active` is whether raft heard of the follower lately.
    pub fn observe(&mut self, replica: ReplicaId, active: bool, now: u64) {
        let seen = self.seen.entry(replica).or_insert(now);
        if active {
            *seen = now;
        }
    }

    /// Up to which index a leader's log isn't needed by its followers, whose matched indexes are
    /// `matched`.
    pub fn safe_index(
        &self,
        matched: impl Iterator<Item = (ReplicaId, Index)>,
        log: &GroupLog,
        now: u64,
    ) -> Index {
        let retention = match self.is_pressed(now) {
            true => self.retention.pressed(),
            false => self.retention,
        };
        // Usually nobody lags, and the look-ups are for nothing.
        let (mut live, mut dead) = (None, None);
        let mut safe = Index::MAX;
        for (replica, matched) in matched {
            if matched >= safe {
                continue;
            }
            let silent = self.seen.get(&replica).map_or(0, |seen| now.saturating_sub(*seen));
            let kept = match silent < limits::FOLLOWER_DEAD_TICKS {
                true => *live.get_or_insert_with(|| log.index_before(retention.live)),
                false => *dead.get_or_insert_with(|| log.index_before(retention.dead)),
            };
            safe = safe.min(matched.max(kept));
        }
        for held in self.transfers.values().filter_map(Transfer::held) {
            if held < safe {
                safe = safe.min(held.max(log.index_before(retention.snapshot)));
            }
        }
        safe
    }

    /// raft wants to send a snapshot to `replica`. Whether the shell is to be asked to make one.
    pub fn wanted(&mut self, replica: ReplicaId, log: &GroupLog, now: u64) -> bool {
        match self.transfers.get(&replica) {
            Some(Transfer::Resting(until)) if now < *until => false,
            None | Some(Transfer::Resting(_) | Transfer::Noted(_)) => {
                self.transfers.insert(replica, Transfer::Making(log.truncated().index));
                true
            }
            Some(_) => false,
        }
    }

    /// The snapshot for `replica` is exact at `position`. False: it isn't wanted any more.
    pub fn made(&mut self, replica: ReplicaId, position: Position, log: &GroupLog) -> bool {
        match self.transfers.get_mut(&replica) {
            Some(transfer @ Transfer::Making(_)) if position.index >= log.truncated().index => {
                *transfer = Transfer::Bringing(position);
                true
            }
            _ => false,
        }
    }

    /// What the shell did for `replica` has ended. `installed`: the follower has the snapshot, or
    /// something better.
    pub fn done(&mut self, replica: ReplicaId, installed: bool, log: &GroupLog, now: u64) {
        let Some(transfer) = self.transfers.get_mut(&replica) else { return };
        *transfer = match *transfer {
            Transfer::Bringing(at) if installed && at.index >= log.truncated().index => Transfer::Offered(at),
            _ => Transfer::Resting(now + limits::SNAPSHOT_RETRY_TICKS),
        };
    }

    /// raft has taken the offer.
    pub fn noted(&mut self, replica: ReplicaId) {
        if let Some(transfer) = self.transfers.get_mut(&replica)
            && let Transfer::Offered(position) = *transfer
        {
            *transfer = Transfer::Noted(position);
        }
    }

    /// The follower gets entries from the log, the last acknowledged one at `matched`. If that is
    /// behind its snapshot, or it doesn't need one any more, there is nothing more to do.
    pub fn replicates(&mut self, replica: ReplicaId, matched: Index) {
        if self.transfers.get(&replica).is_some_and(|transfer| transfer.held().is_none_or(|at| at <= matched))
        {
            self.transfers.remove(&replica);
        }
    }

    /// The position from which raft may go on with `replica`.
    pub fn offered(&self) -> impl Iterator<Item = (ReplicaId, Position)> {
        self.transfers.iter().filter_map(|(replica, transfer)| match transfer {
            Transfer::Offered(position) => Some((*replica, *position)),
            _ => None,
        })
    }
}
