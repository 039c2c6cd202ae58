//! Heartbeats that would say nothing new.
//!
//! A follower that acknowledges an append has heard its leader, and its leader has heard it: what a heartbeat is for. A node
//! that leads many busy groups would otherwise send, and answer, as many heartbeats as appends. So who acknowledges appends
//! between any two heartbeats is spared some of them, [`BEATS_SPARED_MAX`] in a row at most: an acknowledgement may
//! be late, and some things are told by heartbeats only. Not spared are those that ask something: read rounds, and whether to
//! sleep.
//!
//! That is always safe, since a heartbeat may be lost as well. How long a follower hears nothing of a leader that is there
//! stays below an election timeout, which is asserted below.

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
    /// It had acknowledged one when the last heartbeat was due.
    steady: bool,
    spared: u32,
}

impl Beats {
    /// A follower acknowledges an append of a leader of this term, at tick `now`.
    pub(super) fn acknowledges(&mut self, replica: ReplicaId, term: Term, now: u64) {
        match self.followers.iter_mut().find(|follower| follower.replica == replica) {
            Some(follower) => follower.acknowledged = (term, now),
            None => {
                let acknowledged = (term, now);
                self.followers.push(Follower { replica, acknowledged, steady: false, spared: 0 });
            }
        }
    }

    /// Whether a follower is spared the heartbeat that is due at tick `now`. If not, it is sent.
    pub(super) fn spares(&mut self, replica: ReplicaId, term: Term, now: u64) -> bool {
        let Some(follower) = self.followers.iter_mut().find(|follower| follower.replica == replica) else {
            return false;
        };
        let (of, at) = follower.acknowledged;
        let is_new = of == term && now.saturating_sub(at) <= HEARTBEAT_TICKS as u64;
        let was_new = std::mem::replace(&mut follower.steady, is_new);
        if is_new && was_new && follower.spared < BEATS_SPARED_MAX {
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

    /// The heartbeats that are sent, of so many, to a follower that acknowledges appends before these.
    fn sent(beats: &mut Beats, term: Term, count: u64, acknowledged: impl Fn(u64) -> bool) -> Vec<u64> {
        let mut is_sent = |beat: &u64| {
            if acknowledged(*beat) {
                beats.acknowledges(ONE, term, beat * EVERY - 1);
            }
            !beats.spares(ONE, term, beat * EVERY)
        };
        (1..=count).filter(|beat| is_sent(beat)).collect()
    }

    #[test]
    fn who_acknowledges_all_the_time_is_spared_some_and_never_all() {
        let every = u64::from(BEATS_SPARED_MAX) + 1;
        let mut beats = Beats::default();
        let sent = sent(&mut beats, 5, 3 * every, |_| true);
        assert_eq!(sent, [1, 1 + every, 1 + 2 * every]);
    }

    #[test]
    fn who_acknowledges_now_and_then_is_spared_none() {
        assert_eq!(sent(&mut Beats::default(), 5, 6, |beat| beat % 2 == 0), [1, 2, 3, 4, 5, 6]);
        assert_eq!(sent(&mut Beats::default(), 5, 6, |beat| beat <= 2), [1, 3, 4, 5, 6], "it has ceased");
    }

    #[test]
    fn another_leadership_and_another_follower_begin_anew() {
        let mut beats = Beats::default();
        assert_eq!(sent(&mut beats, 5, 2, |_| true), [1]);
        assert!(!beats.spares(ONE, 6, 2 * EVERY));
        assert!(!beats.spares(ReplicaId(2), 5, 2 * EVERY));
        assert_eq!(sent(&mut beats, 7, 2, |_| true), [1]);
        beats.retain(|replica| replica != ONE);
        beats.acknowledges(ONE, 7, 3 * EVERY);
        assert!(!beats.spares(ONE, 7, 3 * EVERY));
    }
}
