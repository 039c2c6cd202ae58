//! Heartbeats that would say nothing new.
//!
//! A follower that acknowledges an append has heard its leader, and its leader has heard it: what a heartbeat is for. A node
//! that leads many busy groups would otherwise send, and answer, more heartbeats than appends. So who has acknowledged an append
//! since the last heartbeat is spared the next, [`BEATS_SPARED_MAX`] times in a row at most: an acknowledgement may
//! be late, and some things are told by heartbeats only. Not spared are those that ask something: read rounds, and whether to
//! sleep.
//!
//! That is always safe, since a heartbeat may be lost as well. How long a follower hears nothing of a leader that is there
//! stays far below an election timeout, which is asserted below.

use crate::ids::{ReplicaId, Term};
use crate::limits::{BEATS_SPARED_MAX, ELECTION_TICKS_MIN, HEARTBEAT_TICKS};

// One may be lost besides.
const _: () = assert!((BEATS_SPARED_MAX as usize + 2) * HEARTBEAT_TICKS < ELECTION_TICKS_MIN);

/// See the module page. Of a leader.
#[derive(Default, Debug)]
pub(super) struct Beats {
    followers: Vec<Follower>,
}

#[derive(Debug)]
struct Follower {
    replica: ReplicaId,
    /// When it last acknowledged an append: the term of this leader, and the tick.
    acknowledged: (Term, u64),
    spared: u32,
}

impl Beats {
    /// A follower acknowledges an append of a leader of this term, at tick `now`.
    pub(super) fn acknowledges(&mut self, replica: ReplicaId, term: Term, now: u64) {
        match self.followers.iter_mut().find(|follower| follower.replica == replica) {
            Some(follower) => follower.acknowledged = (term, now),
            None => self.followers.push(Follower { replica, acknowledged: (term, now), spared: 0 }),
        }
    }

    /// Whether a follower is spared the heartbeat that is due at tick `now`. If not, it is sent.
    pub(super) fn spares(&mut self, replica: ReplicaId, term: Term, now: u64) -> bool {
        let Some(follower) = self.followers.iter_mut().find(|follower| follower.replica == replica) else {
            return false;
        };
        let (of, at) = follower.acknowledged;
        let is_new = of == term && now.saturating_sub(at) <= HEARTBEAT_TICKS as u64;
        if is_new && follower.spared < BEATS_SPARED_MAX {
            follower.spared += 1;
            return true;
        }
        follower.spared = 0;
        false
    }

    /// The members have changed: those who are none any more are forgotten.
    pub(super) fn retain(&mut self, is_member: impl Fn(ReplicaId) -> bool) {
        self.followers.retain(|follower| is_member(follower.replica));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: ReplicaId = ReplicaId(1);
    const EVERY: u64 = HEARTBEAT_TICKS as u64;

    #[test]
    fn who_acknowledges_is_spared_a_few_and_never_all() {
        let mut beats = Beats::default();
        assert!(!beats.spares(ONE, 5, 0), "nothing was heard of it");
        let mut sent = Vec::new();
        for beat in 1..=2 * (u64::from(BEATS_SPARED_MAX) + 1) {
            beats.acknowledges(ONE, 5, beat * EVERY - 1);
            if !beats.spares(ONE, 5, beat * EVERY) {
                sent.push(beat);
            }
        }
        let every = u64::from(BEATS_SPARED_MAX) + 1;
        assert_eq!(sent, [every, 2 * every]);
    }

    #[test]
    fn an_acknowledgement_counts_for_one_heartbeat_and_one_term() {
        let mut beats = Beats::default();
        beats.acknowledges(ONE, 5, 10);
        assert!(beats.spares(ONE, 5, 10 + EVERY));
        assert!(!beats.spares(ONE, 5, 10 + 2 * EVERY));
        beats.acknowledges(ONE, 5, 20);
        assert!(!beats.spares(ONE, 6, 20), "another leadership");
        assert!(!beats.spares(ReplicaId(2), 5, 20), "another's");
        beats.acknowledges(ONE, 6, 20);
        beats.retain(|replica| replica != ONE);
        assert!(!beats.spares(ONE, 6, 20));
    }
}
