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
//!   (nothing) ────────────► Making ──────────────────────► Bringing ───────────────► Offered ─► Noted ─► Following ─► (nothing)
//!                             │ log held where it begins      │ log held at B    raft takes the offer  │           caught up
//!                             └───────────── failed ──────────┴──► Resting ─► asked anew ◄─────────────┘ needs more
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
//! Invariant: from the moment a snapshot at B is asked for, until the follower has caught up behind it, the entries that
//! it will need next stay in this log: those after B, then those after what it has acknowledged. Else a shard that is
//! written without pause would need the next snapshot as soon as one is installed, and so on for ever. What is kept for
//! that beyond [`Retention::live`] is this group's share of one bound for the whole node ([`super::held`]), whether its
//! log is too large or not. If more than that is written meanwhile, the follower is *outrun*: the log goes on without
//! it, which is told and counted, what is on its way to it is worth nothing, and after a rest a snapshot is made
//! anew. The log is let go as well when the transfer has failed, and when the follower is silent, or
//! acknowledges nothing, for [`limits::FOLLOWER_DEAD_TICKS`].
//!
//! A new leader doesn't know whom the one before was bringing on. The log that it has, which is what that one kept, it
//! keeps until each follower has been heard of. What was on its way is made anew by the new leader if the follower needs it:
//! the file was the old one's. A follower whose own log is too large has kept nothing, and as the next leader makes a snapshot.
//!
//! A follower that has asked, and acknowledged the entries up to B or further, has what follows on B in its own log: for
//! that one this log needn't keep any.

use std::sync::Arc;

use super::held::{HeldLog, Share};
use super::log::GroupLog;
use super::per_member::PerMember;
use crate::ids::{Index, Position, ReplicaId};
use crate::limits;

/// Bytes of log that are kept for followers that lag.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Retention {
    /// For one that answers.
    pub live: u64,
    /// For one that doesn't.
    pub dead: u64,
}

impl Retention {
    /// From the one number that an operator sets: what a dead follower is kept.
    pub fn new(dead: u64) -> Retention {
        Retention { live: dead.saturating_mul(4), dead }
    }

    /// How finely a log has to know its size to keep these bounds.
    pub fn mark_bytes(self) -> u64 {
        (self.dead / 64).clamp(64, 64 * 1024)
    }

    /// While the node's log is too large.
    fn pressed(self) -> Retention {
        Retention { live: self.dead, dead: 0 }
    }
}

/// Where a snapshot for one follower stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Transfer {
    /// This replica has come to lead at this tick, and hasn't heard how far the follower is. The log is held from this
    /// index on, where it began then.
    Unheard(Index, u64),
    /// The shell makes it, or finds one that it has made before. The log is held from this index on, where it
    /// began when that was asked for.
    Making(Index),
    /// It is made, exact at this position, and on its way.
    Bringing(Position),
    /// It is installed, since this tick; raft is to be told.
    Offered(Position, u64),
    /// raft goes on from there, or is about to; since when it was offered.
    Noted(Position, u64),
    /// It gets what follows from the log, and has acknowledged this much, at this tick last.
    Following(Index, u64),
    /// It failed, or the follower goes on by itself; not asked for again before this tick.
    Resting(u64),
}

impl Transfer {
    /// From where on the log has to stay for it.
    fn held(&self) -> Option<Index> {
        match *self {
            Transfer::Unheard(held, _) | Transfer::Making(held) | Transfer::Following(held, _) => Some(held),
            Transfer::Bringing(at) | Transfer::Offered(at, _) | Transfer::Noted(at, _) => Some(at.index),
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
    /// What this group holds behind snapshots.
    share: Share,
    /// The tick at which each was last known to answer.
    seen: PerMember<u64>,
    /// The tick at which each has last answered. raft's own note of that is good for less: it is made when a
    /// member is added, and unmade whenever the quorum is checked.
    answered: PerMember<u64>,
    transfers: PerMember<Transfer>,
    /// Who said last that its state is lost.
    requests: PerMember<Request>,
    /// Until this tick the log is pressed.
    pressed_until: u64,
}

impl CatchUp {
    /// Nobody yet.
    pub fn new(retention: Retention, held: Arc<HeldLog>) -> CatchUp {
        CatchUp {
            retention,
            share: Share::new(held),
            seen: PerMember::default(),
            answered: PerMember::default(),
            transfers: PerMember::default(),
            requests: PerMember::default(),
            pressed_until: 0,
        }
    }

    /// Leadership begins or ends: what was known of followers is void, and a snapshot under way is not for this
    /// replica to follow up any more.
    pub fn reset(&mut self) {
        self.seen.clear();
        self.answered.clear();
        self.transfers.clear();
        self.requests.clear();
        self.share.settle(0);
    }

    /// Leadership begins at tick `now`, with these followers.
    pub fn begin(&mut self, followers: impl Iterator<Item = ReplicaId>, log: &GroupLog, now: u64) {
        let truncated = log.truncated().index;
        followers.for_each(|replica| self.transfers.insert(replica, Transfer::Unheard(truncated, now)));
    }

    /// The members have changed: those who are none any more are forgotten.
    pub fn retain(&mut self, is_member: impl Fn(ReplicaId) -> bool) {
        self.seen.retain(&is_member);
        self.answered.retain(&is_member);
        self.transfers.retain(&is_member);
        self.requests.retain(&is_member);
    }

    /// A follower has answered in this term.
    pub fn answers(&mut self, replica: ReplicaId, now: u64) {
        self.answered.insert(replica, now);
    }

    /// Whether a follower has answered within an election timeout.
    pub fn is_active(&self, replica: ReplicaId, now: u64) -> bool {
        let answered = self.answered.get(replica);
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
        let seen = self.seen.or_insert(replica, now);
        if active {
            *seen = now;
        }
        // One whose disk is full or hangs answers heartbeats, and acknowledges nothing.
        let is_long_ago = |tick: u64| now.saturating_sub(tick) >= limits::FOLLOWER_DEAD_TICKS;
        let is_over = match self.transfers.get(replica) {
            Some(
                Transfer::Unheard(_, since)
                | Transfer::Offered(_, since)
                | Transfer::Noted(_, since)
                | Transfer::Following(_, since),
            ) => is_long_ago(*seen) || is_long_ago(*since),
            // While a snapshot is made and brought, the shell tells when there is no hope.
            Some(Transfer::Making(_) | Transfer::Bringing(_) | Transfer::Resting(_)) | None => false,
        };
        if is_over {
            self.transfers.remove(replica);
        }
    }

    fn retention(&self, now: u64) -> Retention {
        match self.is_pressed(now) {
            true => self.retention.pressed(),
            false => self.retention,
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
        let retention = self.retention(now);
        // Usually nobody lags, and the look-ups are for nothing.
        let (mut live, mut dead) = (None, None);
        let mut safe = Index::MAX;
        let mut held = Index::MAX;
        for (replica, matched) in matched {
            held = held.min(self.held_for(replica, matched));
            if matched >= safe {
                continue;
            }
            let silent = self.seen.get(replica).map_or(0, |seen| now.saturating_sub(*seen));
            let kept = match silent < limits::FOLLOWER_DEAD_TICKS {
                true => *live.get_or_insert_with(|| log.index_before(retention.live)),
                false => *dead.get_or_insert_with(|| log.index_before(retention.dead)),
            };
            safe = safe.min(matched.max(kept));
        }
        if held < safe {
            safe = safe.min(held.max(log.index_before(self.share.granted().max(retention.live))));
        }
        safe
    }

    /// From where on the log is held for a follower, for a snapshot's sake; `Index::MAX` if it isn't.
    fn held_for(&self, replica: ReplicaId, matched: Index) -> Index {
        match self.transfers.get(replica).and_then(Transfer::held) {
            // A follower that asked, and has all that follows on its snapshot, needs nothing of this log.
            Some(held) if self.lacks_state(replica) && matched >= held => Index::MAX,
            Some(held) => held,
            None => Index::MAX,
        }
    }

    /// The log now begins behind `truncated`, of followers whose matched indexes are `matched`: counts what is held, and gives
    /// up on those whose part of it is gone. Returns them.
    pub fn settle(
        &mut self,
        matched: impl Iterator<Item = (ReplicaId, Index)>,
        log: &GroupLog,
        now: u64,
    ) -> Vec<ReplicaId> {
        let truncated = log.truncated().index;
        let mut held = Index::MAX;
        let mut outrun = Vec::new();
        for (replica, matched) in matched {
            let from = self.held_for(replica, matched);
            // A snapshot that isn't made yet will stand where the log begins then.
            let is_made =
                !matches!(self.transfers.get(replica), Some(Transfer::Unheard(..) | Transfer::Making(_)));
            if from < truncated && is_made {
                outrun.push(replica);
            } else {
                held = held.min(from);
            }
        }
        for replica in &outrun {
            self.share.note_outrun();
            self.transfers.insert(*replica, Transfer::Resting(now + limits::SNAPSHOT_RETRY_TICKS));
        }
        let bytes = if held == Index::MAX { 0 } else { log.bytes_behind(held.max(truncated)) };
        self.share.settle(bytes.min(self.share.granted()));
        outrun
    }

    /// A follower has answered: its state is lost, and it can go on from a snapshot at `least` or later; or
    /// it says nothing of the kind.
    pub fn hear(&mut self, replica: ReplicaId, least: Option<Index>) {
        match least {
            Some(least) => {
                self.requests.insert(replica, Request { least, fresh: true });
            }
            None => {
                self.requests.remove(replica);
            }
        }
    }

    /// Whether a follower's state is lost, as far as it has told.
    pub fn lacks_state(&self, replica: ReplicaId) -> bool {
        self.requests.contains(replica)
    }

    /// Whether anybody has asked for a snapshot since requests were last looked at.
    pub fn asks(&self) -> bool {
        self.requests.values().any(|request| request.fresh)
    }

    /// Who has asked for a snapshot since the last call.
    pub fn take_requests(&mut self) -> Vec<ReplicaId> {
        let requests = self.requests.iter_mut();
        requests.filter_map(|(of, request)| std::mem::take(&mut request.fresh).then_some(of)).collect()
    }

    /// A snapshot for `replica` at an earlier index than this would be of no use.
    pub fn least(&self, replica: ReplicaId, log: &GroupLog) -> Index {
        self.requests.get(replica).map_or(0, |request| request.least).max(log.truncated().index)
    }

    /// `replica` needs a snapshot: raft wants to send one, or it has `asked` itself. Whether the shell is to be
    /// asked to make one.
    pub fn wanted(&mut self, replica: ReplicaId, asked: bool, log: &GroupLog, now: u64) -> bool {
        match self.transfers.get(replica) {
            Some(Transfer::Resting(until)) if now < *until => false,
            // raft knows better than an answer from before the snapshot was installed.
            Some(Transfer::Noted(..)) if asked => false,
            None
            | Some(
                Transfer::Unheard(..) | Transfer::Following(..) | Transfer::Resting(_) | Transfer::Noted(..),
            ) => {
                self.transfers.insert(replica, Transfer::Making(log.truncated().index));
                true
            }
            Some(_) => false,
        }
    }

    /// The snapshot for `replica`, which has everything up to `matched` in its log, is exact at `position`.
    /// False: it isn't wanted any more.
    pub fn made(&mut self, replica: ReplicaId, position: Position, matched: Index, log: &GroupLog) -> bool {
        let least = self.requests.get(replica).map_or(0, |request| request.least);
        let goes_on = position.index >= log.truncated().index || self.goes_on(replica, position, matched);
        match self.transfers.get_mut(replica) {
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
        let Some(transfer) = self.transfers.get(replica) else { return };
        let rest = Transfer::Resting(now + limits::SNAPSHOT_RETRY_TICKS);
        let next = match *transfer {
            // Its log goes on from there by itself. What it said before may still be on its way.
            Transfer::Bringing(at) if installed && self.goes_on(replica, at, matched) => rest,
            Transfer::Bringing(at) if installed && at.index >= log.truncated().index => {
                Transfer::Offered(at, now)
            }
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
        if let Some(transfer) = self.transfers.get_mut(replica)
            && let Transfer::Offered(position, since) = *transfer
        {
            *transfer = Transfer::Noted(position, since);
        }
    }

    /// The follower gets entries from the log, the last acknowledged one at `matched`. If that is
    /// behind its snapshot, it has what follows held for it until it has caught up; so has one that a new leader hears of
    /// for the first time. If it doesn't need a snapshot any more, there is nothing more to do. One whose
    /// state is lost needs it all the same.
    pub fn replicates(
        &mut self,
        replica: ReplicaId,
        matched: Index,
        committed: Index,
        log: &GroupLog,
        now: u64,
    ) {
        if !self.transfers.contains(replica) {
            return;
        }
        let caught_up = self.has_caught_up(matched, committed, log, now);
        let Some(transfer) = self.transfers.get_mut(replica) else { return };
        let is_over = match *transfer {
            Transfer::Making(_) | Transfer::Bringing(_) | Transfer::Resting(_) => {
                let over = transfer.held().is_none_or(|at| at <= matched);
                over && !self.requests.contains(replica)
            }
            Transfer::Offered(at, _) | Transfer::Noted(at, _) if matched < at.index => false,
            Transfer::Following(before, _) if matched == before => caught_up,
            Transfer::Unheard(..) | Transfer::Offered(..) | Transfer::Noted(..) | Transfer::Following(..) => {
                *transfer = Transfer::Following(matched, now);
                caught_up
            }
        };
        if is_over {
            self.transfers.remove(replica);
        }
    }

    /// A follower has acknowledged the log up to `matched`: a new leader then knows of it.
    pub fn acknowledges(
        &mut self,
        replica: ReplicaId,
        matched: Index,
        committed: Index,
        log: &GroupLog,
        now: u64,
    ) {
        if let Some(Transfer::Unheard(..)) = self.transfers.get(replica) {
            self.replicates(replica, matched, committed, log, now);
        }
    }

    /// Whether a follower has all that is committed, or lacks so little that the normal bounds keep it, with room to spare.
    fn has_caught_up(&self, matched: Index, committed: Index, log: &GroupLog, now: u64) -> bool {
        matched >= committed || log.bytes_behind(matched) <= self.retention(now).live / 2
    }

    /// Whether nobody is being brought up to date, or has asked to be.
    pub fn is_calm(&self) -> bool {
        let rests = |transfer: &Transfer| matches!(transfer, Transfer::Resting(_));
        self.requests.is_empty() && self.transfers.values().all(rests)
    }

    /// The position from which raft may go on with `replica`.
    pub fn offered(&self) -> impl Iterator<Item = (ReplicaId, Position)> {
        self.transfers.iter().filter_map(|(replica, transfer)| match transfer {
            Transfer::Offered(position, _) => Some((replica, *position)),
            _ => None,
        })
    }
}
