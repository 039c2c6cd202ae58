//! For how long a node doesn't repeat what was refused.
//!
//! What the metadata shard refuses it refuses for good, as a rule: only its recovery may change that. Yet a refusal may
//! also come of what is new to one node and not to another, so the first repetitions come soon.

use std::time::{Duration, Instant};

use crate::limits;

const SHORTEST: Duration = Duration::from_millis(limits::NODE_HEARTBEAT_MS);
const LONGEST: Duration = Duration::from_millis(limits::REFUSED_MS_MAX);

/// See the module page.
#[derive(Default)]
pub(super) struct Patience {
    /// After so long, until then, and as long as the map is of this generation.
    waits: Option<(Duration, Instant, u64)>,
}

impl Patience {
    /// It was refused, once more, under a map of this generation.
    pub fn refused(&mut self, generation: u64, now: Instant) {
        let before = self.waits.filter(|(_, until, of)| *of == generation && now <= *until + LONGEST);
        let pause = before.map_or(SHORTEST, |(pause, ..)| (pause * 2).min(LONGEST));
        self.waits = Some((pause, now + pause, generation));
    }

    /// Whether it may be repeated.
    pub fn is_over(&self, generation: u64, now: Instant) -> bool {
        self.waits.is_none_or(|(_, until, of)| of != generation || now >= until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_refused_for_good_is_repeated_seldom() {
        let began = Instant::now();
        let mut patience = Patience::default();
        assert!(patience.is_over(0, began));
        // As the callers do it: a look with every heartbeat.
        let times = |patience: &mut Patience, from: Instant, generation| {
            let looks = (0..600).map(|n| from + n * SHORTEST);
            let mut times = Vec::new();
            for now in looks {
                if patience.is_over(generation, now) {
                    times.push((now - from).as_secs_f64());
                    patience.refused(generation, now);
                }
            }
            times
        };
        let five_minutes = times(&mut patience, began, 0);
        assert_eq!(five_minutes[..8], [0.0, 0.5, 1.5, 3.5, 7.5, 15.5, 31.5, 61.5]);
        assert_eq!(five_minutes.len(), 15, "{five_minutes:?}");
        let later = began + 600 * SHORTEST;
        assert!(!patience.is_over(0, later));
        assert!(patience.is_over(1, later), "after a recovery it may be another matter");
        assert_eq!(times(&mut patience, later, 1)[..3], [0.0, 0.5, 1.5]);
        // Something else, much later.
        let again = later + 1200 * SHORTEST;
        assert_eq!(times(&mut patience, again, 1)[..3], [0.0, 0.5, 1.5]);
    }
}
