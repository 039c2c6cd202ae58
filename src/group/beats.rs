//! Heartbeats that would say nothing new.
//!
//! A follower that acknowledges an append has heard its leader, and its leader has heard it: what a heartbeat is for. A node
//! that leads many busy groups would otherwise send, and answer, as many heartbeats as appends. So where all followers acknowledge
//! appends between any two heartbeats, they are spared some of these, [`BEATS_SPARED_MAX`] in a row at most: an acknowledgement
//! may be late, and some things are told by heartbeats only. Not spared are those that ask something: read rounds, and whether
//! to sleep.
//!
//! That is always safe, since a heartbeat may be lost as well. How long a follower hears nothing of a leader that is there
//! stays below an election timeout, which is asserted below. And all or none are spared: appends go to all at once, as
//! heartbeats do, so followers still begin to wait for their leader at one moment, and their election windows stay apart.

use crate::ids::{ReplicaId, Term};
use crate::limits::{BEATS_SPARED_MAX, BEATS_STEADY_MIN, ELECTION_TICKS_MIN, HEARTBEAT_TICKS};

// One may be lost besides.
const _: () = assert!((BEATS_SPARED_MAX as usize + 2) * HEARTBEAT_TICKS < ELECTION_TICKS_MIN);

/// See the module page. Of a leader.
#[derive(Default, Debug)]
pub(super) struct Beats {
    /// When each follower last acknowledged an append: the term of this leader, and the tick.
    acknowledged: Vec<(ReplicaId, Term, u64)>,
    /// The term and the tick of the last heartbeats that were due, and whether they were spared.
    last: Option<(Term, u64, bool)>,
    /// Heartbeats in a row before which all had acknowledged one.
    steady: u32,
    spared: u32,
}

impl Beats {
    /// A follower acknowledges an append of a leader of this term, at tick `now`.
    pub(super) fn acknowledges(&mut self, replica: ReplicaId, term: Term, now: u64) {
        match self.acknowledged.iter_mut().find(|(of, ..)| *of == replica) {
            Some(known) => *known = (replica, term, now),
            None => self.acknowledged.push((replica, term, now)),
        }
    }

    /// Whether the heartbeats that are due at tick `now` to these followers, all there are, are spared. If not, they are sent.
    /// Asked again at that tick, it says the same.
    pub(super) fn are_spared(
        &mut self,
        term: Term,
        now: u64,
        mut followers: impl Iterator<Item = ReplicaId>,
    ) -> bool {
        if let Some((of, at, spared)) = self.last
            && (of, at) == (term, now)
        {
            return spared;
        }
        let is_new = |replica: ReplicaId| {
            let known = self.acknowledged.iter().find(|(of, ..)| *of == replica);
            known.is_some_and(|(_, of, at)| *of == term && now.saturating_sub(*at) <= HEARTBEAT_TICKS as u64)
        };
        self.steady = if followers.all(is_new) { self.steady.saturating_add(1) } else { 0 };
        let spared = self.steady > BEATS_STEADY_MIN && self.spared < BEATS_SPARED_MAX;
        self.spared = if spared { self.spared + 1 } else { 0 };
        self.last = Some((term, now, spared));
        spared
    }

    /// The members have changed: those who are none any more are forgotten.
    pub(super) fn retain(&mut self, is_member: impl Fn(ReplicaId) -> bool) {
        self.acknowledged.retain(|(replica, ..)| is_member(*replica));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOTH: [ReplicaId; 2] = [ReplicaId(1), ReplicaId(2)];
    const EVERY: u64 = HEARTBEAT_TICKS as u64;

    /// The heartbeats that are sent, of so many, where followers acknowledge appends before these.
    fn sent(
        beats: &mut Beats,
        term: Term,
        count: u64,
        acknowledges: impl Fn(ReplicaId, u64) -> bool,
    ) -> Vec<u64> {
        let mut is_sent = |beat: &u64| {
            for replica in BOTH.into_iter().filter(|replica| acknowledges(*replica, *beat)) {
                beats.acknowledges(replica, term, beat * EVERY - 1);
            }
            let spared = beats.are_spared(term, beat * EVERY, BOTH.into_iter());
            assert_eq!(beats.are_spared(term, beat * EVERY, BOTH.into_iter()), spared, "all or none");
            !spared
        };
        (1..=count).filter(|beat| is_sent(beat)).collect()
    }

    #[test]
    fn who_acknowledge_all_the_time_are_spared_some_and_never_all() {
        let every = u64::from(BEATS_SPARED_MAX) + 1;
        let first = u64::from(BEATS_STEADY_MIN);
        let sent = sent(&mut Beats::default(), 5, first + 2 * every, |_, _| true);
        let expected: Vec<u64> = (1..=first).chain([first + every, first + 2 * every]).collect();
        assert_eq!(sent, expected);
    }

    #[test]
    fn who_acknowledge_now_and_then_or_not_all_are_spared_none() {
        let all = [1, 2, 3, 4, 5, 6];
        assert_eq!(sent(&mut Beats::default(), 5, 6, |_, beat| beat % 2 == 0), all);
        assert_eq!(sent(&mut Beats::default(), 5, 6, |replica, _| replica == BOTH[0]), all);
        assert_eq!(
            sent(&mut Beats::default(), 5, 6, |_, beat| beat <= 3),
            [1, 2, 4, 5, 6],
            "they have ceased"
        );
    }

    #[test]
    fn another_leadership_and_another_follower_begin_anew() {
        let mut beats = Beats::default();
        assert_eq!(sent(&mut beats, 5, 3, |_, _| true), [1, 2]);
        assert!(!beats.are_spared(6, 3 * EVERY, BOTH.into_iter()));
        assert_eq!(sent(&mut beats, 7, 3, |_, _| true), [1, 2]);
        for replica in BOTH {
            beats.acknowledges(replica, 7, 4 * EVERY);
        }
        let newcomer = ReplicaId(3);
        assert!(!beats.are_spared(7, 4 * EVERY, BOTH.into_iter().chain([newcomer])));
        beats.retain(|replica| replica != BOTH[0]);
        assert_eq!(beats.acknowledged.len(), 1);
    }
}
