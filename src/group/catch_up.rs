//! How followers that lag are brought back: which log entries are kept for them, and who needs a
//! snapshot because they are gone, or because its own state is ([`super::lost`]).
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
//! A follower whose state is lost asks for itself, with every answer to a heartbeat, though it may have every
//! entry. It goes on taking and acknowledging entries meanwhile: that ends nothing here, nor is there anything
//! for raft to learn if it has all behind B. So its way is
//!
//! ```text
//!   (nothing) ─ it asks ─► Making ─► Bringing ─► Resting, a while for late answers ─ it asks no more ─► (nothing)
//! ```
//!
//! Invariant: while a snapshot at B is under way, and until the follower has acknowledged an entry behind it,
//! the entries after B stay in this log, unless that would take more than [`Retention::snapshot`];
//! then the snapshot is worth nothing and is made anew. A follower that has asked, and acknowledged the entries up to B
//! or further, has what follows on B in its own log: for that one this log needn't keep any.

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
    /// The shell makes it, or finds one that it has made before. The log is held from this index on, where it
    /// began when that was asked for.
    Making(Index),
    /// It is made, exact at this position, and on its way.
    Bringing(Position),
    /// It is installed; raft is to be told.
    Offered(Position),
    /// raft goes on from there, or is about to.
    Noted(Position),
    /// It failed, or the follower goes on by itself; not asked for again before this tick.
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

/// A follower whose state is lost.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Request {
    /// Its log begins behind this index: it can't go on from an earlier one.
    least: Index,
    /// It has said so since requests were last looked at.
    fresh: bool,
}

/// The followers of a leader.
pub struct CatchUp {
    retention: Retention,
    /// The tick at which each was last known to answer.
    seen: BTreeMap<ReplicaId, u64>,
    /// The tick at which each has last answered. raft's own note of that is good for less: it is made when a
    /// member is added, and unmade whenever the quorum is checked.
    answered: BTreeMap<ReplicaId, u64>,
    transfers: BTreeMap<ReplicaId, Transfer>,
    /// Who said last that its state is lost.
    requests: BTreeMap<ReplicaId, Request>,
    /// Until this tick the log is pressed.
    pressed_until: u64,
}

impl CatchUp {
    /// Nobody yet.
    pub fn new(retention: Retention) -> CatchUp {
        CatchUp {
            retention,
            seen: BTreeMap::new(),
            answered: BTreeMap::new(),
            transfers: BTreeMap::new(),
            requests: BTreeMap::new(),
            pressed_until: 0,
        }
    }

    /// Leadership begins or ends at tick `now`: what was known of followers is void, and a snapshot
    /// under way is not for this replica to follow up any more.
    pub fn reset(&mut self) {
        self.seen.clear();
        self.answered.clear();
        self.transfers.clear();
        self.requests.clear();
    }

    /// The members have changed: those who are none any more are forgotten.
    pub fn retain(&mut self, is_member: impl Fn(ReplicaId) -> bool) {
        self.seen.retain(|replica, _| is_member(*replica));
        self.answered.retain(|replica, _| is_member(*replica));
        self.transfers.retain(|replica, _| is_member(*replica));
        self.requests.retain(|replica, _| is_member(*replica));
    }

    /// A follower has answered in this term.
    pub fn answers(&mut self, replica: ReplicaId, now: u64) {
        self.answered.insert(replica, now);
    }

    /// Whether a follower has answered within an election timeout.
    pub fn is_active(&self, replica: ReplicaId, now: u64) -> bool {
        let answered = self.answered.get(&replica);
        answered.is_some_and(|at| now.saturating_sub(*at) <= limits::ELECTION_TICKS_MIN as u64)
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
        let mut snapshots = Index::MAX;
        for (replica, matched) in matched {
            // A follower that asked, and has all that follows on its snapshot, needs nothing of this log.
            if let Some(held) = self.transfers.get(&replica).and_then(Transfer::held)
                && !(self.lacks_state(replica) && matched >= held)
            {
                snapshots = snapshots.min(held);
            }
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
        if snapshots < safe {
            safe = safe.min(snapshots.max(log.index_before(retention.snapshot)));
        }
        safe
    }

    /// A follower has answered: its state is lost, and it can go on from a snapshot at `least` or later; or
    /// it says nothing of the kind.
    pub fn hear(&mut self, replica: ReplicaId, least: Option<Index>) {
        match least {
            Some(least) => {
                self.requests.insert(replica, Request { least, fresh: true });
            }
            None => {
                self.requests.remove(&replica);
            }
        }
    }

    /// Whether a follower's state is lost, as far as it has told.
    pub fn lacks_state(&self, replica: ReplicaId) -> bool {
        self.requests.contains_key(&replica)
    }

    /// Whether anybody has asked for a snapshot since requests were last looked at.
    pub fn asks(&self) -> bool {
        self.requests.values().any(|request| request.fresh)
    }

    /// Who has asked for a snapshot since the last call.
    pub fn take_requests(&mut self) -> Vec<ReplicaId> {
        let requests = self.requests.iter_mut();
        requests.filter_map(|(of, request)| std::mem::take(&mut request.fresh).then_some(*of)).collect()
    }

    /// A snapshot for `replica` at an earlier index than this would be of no use.
    pub fn least(&self, replica: ReplicaId, log: &GroupLog) -> Index {
        self.requests.get(&replica).map_or(0, |request| request.least).max(log.truncated().index)
    }

    /// `replica` needs a snapshot: raft wants to send one, or it has `asked` itself. Whether the shell is to be
    /// asked to make one.
    pub fn wanted(&mut self, replica: ReplicaId, asked: bool, log: &GroupLog, now: u64) -> bool {
        match self.transfers.get(&replica) {
            Some(Transfer::Resting(until)) if now < *until => false,
            // raft knows better than an answer from before the snapshot was installed.
            Some(Transfer::Noted(_)) if asked => false,
            None | Some(Transfer::Resting(_) | Transfer::Noted(_)) => {
                self.transfers.insert(replica, Transfer::Making(log.truncated().index));
                true
            }
            Some(_) => false,
        }
    }

    /// The snapshot for `replica`, which has everything up to `matched` in its log, is exact at `position`.
    /// False: it isn't wanted any more.
    pub fn made(&mut self, replica: ReplicaId, position: Position, matched: Index, log: &GroupLog) -> bool {
        let least = self.requests.get(&replica).map_or(0, |request| request.least);
        let goes_on = position.index >= log.truncated().index || self.goes_on(replica, position, matched);
        match self.transfers.get_mut(&replica) {
            Some(transfer @ Transfer::Making(_)) if goes_on && position.index >= least => {
                *transfer = Transfer::Bringing(position);
                true
            }
            _ => false,
        }
    }

    /// What the shell did for `replica`, which has everything up to `matched` in its log, has ended.
    /// `installed`: the follower has the snapshot, or something better.
    pub fn done(&mut self, replica: ReplicaId, installed: bool, matched: Index, log: &GroupLog, now: u64) {
        let Some(transfer) = self.transfers.get(&replica) else { return };
        let rest = Transfer::Resting(now + limits::SNAPSHOT_RETRY_TICKS);
        let next = match *transfer {
            // Its log goes on from there by itself. What it said before may still be on its way.
            Transfer::Bringing(at) if installed && self.goes_on(replica, at, matched) => rest,
            Transfer::Bringing(at) if installed && at.index >= log.truncated().index => Transfer::Offered(at),
            _ => rest,
        };
        self.transfers.insert(replica, next);
    }

    /// Whether the log of a follower that asks for a snapshot reaches to `position` at least, so that it goes on
    /// behind that with its own entries, and gets what follows like any other.
    fn goes_on(&self, replica: ReplicaId, position: Position, matched: Index) -> bool {
        self.lacks_state(replica) && matched >= position.index
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
    /// behind its snapshot, or it doesn't need one any more, there is nothing more to do. One whose state is
    /// lost needs it all the same.
    pub fn replicates(&mut self, replica: ReplicaId, matched: Index) {
        let Some(transfer) = self.transfers.get(&replica) else { return };
        let over = match transfer {
            Transfer::Making(_) | Transfer::Bringing(_) | Transfer::Resting(_)
                if self.lacks_state(replica) =>
            {
                false
            }
            transfer => transfer.held().is_none_or(|at| at <= matched),
        };
        if over {
            self.transfers.remove(&replica);
        }
    }

    /// Whether nobody is being brought up to date, or has asked to be.
    pub fn is_calm(&self) -> bool {
        let rests = |transfer: &Transfer| matches!(transfer, Transfer::Resting(_));
        self.requests.is_empty() && self.transfers.values().all(rests)
    }

    /// The position from which raft may go on with `replica`.
    pub fn offered(&self) -> impl Iterator<Item = (ReplicaId, Position)> {
        self.transfers.iter().filter_map(|(replica, transfer)| match transfer {
            Transfer::Offered(position) => Some((*replica, *position)),
            _ => None,
        })
    }
}
