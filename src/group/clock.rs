//! The clock of sessions, as a leader shows it in the entries it makes.
//!
//! A shard's time is the greatest stamp in its log. A leader begins with that and adds the ticks it has
//! lived through since: so the time never goes back, never runs faster than real time, and stands
//! still while nobody leads, and while the leader's process is stopped. No wall clock is asked.

use crate::ids::Term;
use crate::limits::TICK_MS;

/// The clock of one replica. It shows something only while the replica leads.
#[derive(Default)]
pub struct SessionClock {
    /// The term it runs in.
    term: Term,
    now: u64,
}

impl SessionClock {
    /// One tick has passed while the replica led `term`. `log_time` is the shard's time as applied.
    pub fn tick(&mut self, term: Term, log_time: u64) {
        // The first tick of a term began before it did.
        if self.term == term {
            self.now += TICK_MS;
        }
        self.stamp(term, log_time);
    }

    /// So many ticks have passed while the replica led `term`, and slept.
    pub fn pass(&mut self, term: Term, ticks: u64) {
        if self.term == term {
            self.now = self.now.saturating_add(ticks.saturating_mul(TICK_MS));
        }
    }

    /// The time for an entry that is made now, in milliseconds.
    pub fn stamp(&mut self, term: Term, log_time: u64) -> u64 {
        if self.term != term {
            *self = SessionClock { term, now: 0 };
        }
        // Entries of former leaders may have been applied since the election.
        self.now = self.now.max(log_time);
        self.now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_goes_on_from_the_log_by_lived_ticks() {
        let mut clock = SessionClock::default();
        assert_eq!(clock.stamp(6, 5_000), 5_000);
        clock.tick(6, 5_000);
        clock.tick(6, 5_000);
        assert_eq!(clock.stamp(6, 5_000), 5_000 + 2 * TICK_MS);
        // Another term: what was counted and never reached the log is forgotten.
        clock.tick(9, 5_010);
        assert_eq!(clock.stamp(9, 5_010), 5_010, "the first tick counts for nothing");
        clock.tick(9, 5_010);
        assert_eq!(clock.stamp(9, 5_010), 5_010 + TICK_MS);
    }

    #[test]
    fn it_is_never_behind_the_log() {
        let mut clock = SessionClock::default();
        clock.tick(6, 100);
        assert_eq!(clock.stamp(6, 9_000), 9_000);
        clock.tick(6, 9_000);
        assert_eq!(clock.stamp(6, 9_000), 9_000 + TICK_MS);
    }
}
