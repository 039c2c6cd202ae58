//! The end of a node whose state store hangs.
//!
//! A flush that never ends would have the node's replicas pause one after the other, for ever; a read that never
//! ends leaves callers waiting. Nothing is lost by an end of the process: log and redo files have what the state store
//! lacks, and the next start goes on from there, which is all that helps. sled 0.34.7 can hang by itself:
//! see [`crate::storage::engine_sled`].
//!
//! The thread here looks whether the others get on ([`Pulse`]), and has no other task: all others may be waiting for the
//! store. Watched are the opening (from when redo files are re-applied), the flush thread and the read thread. A snapshot that is
//! loaded holds up flushes if it hangs.

use std::convert::Infallible;
use std::io;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::fatal::Fatal;
use crate::limits;
use crate::storage::pulse::Pulse;

const LOOK: Duration = Duration::from_millis(limits::STATE_LOOK_MS);

/// The pulses that are watched.
#[derive(Clone, Default)]
pub struct Pulses {
    /// Of the opening, and then of the flush thread.
    pub flush: Pulse,
    /// Of the read thread.
    pub read: Pulse,
}

/// The state store hangs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "the state store hangs: for {} s, {what} hasn't come a step further. Start the node again: it goes on from its log \
     and redo file. If it hangs again, look after the disk",
    .patience.as_secs_f64()
)]
pub struct Stalled {
    /// What was under way.
    pub what: &'static str,
    /// For how long nothing moved.
    pub patience: Duration,
}

/// Tells from looks at pulses whether one stands still.
struct Watch {
    patience: Duration,
    watched: Vec<Watched>,
    last: Option<Instant>,
}

struct Watched {
    what: &'static str,
    pulse: Pulse,
    seen: Option<u64>,
    still: Duration,
}

impl Watch {
    fn new(pulses: &Pulses, patience: Duration) -> Watch {
        let watched = [("flushing state to disk", &pulses.flush), ("reading state", &pulses.read)];
        let watched = watched.into_iter().map(|(what, pulse)| Watched {
            what,
            pulse: pulse.clone(),
            seen: None,
            still: Duration::ZERO,
        });
        Watch { patience, watched: watched.collect(), last: None }
    }

    /// To be called once in [`limits::STATE_LOOK_MS`]. What lies between two looks counts for two such times at most: a
    /// process that was stopped, or a machine that slept, has had no time to do anything.
    fn look(&mut self, now: Instant) -> Option<Stalled> {
        let passed = self.last.map_or(Duration::ZERO, |last| now.saturating_duration_since(last));
        self.last = Some(now);
        for watched in &mut self.watched {
            let seen = watched.pulse.at_work();
            watched.still = match seen.is_some() && seen == watched.seen {
                true => watched.still + passed.min(2 * LOOK),
                false => Duration::ZERO,
            };
            watched.seen = seen;
        }
        let stalled = self.watched.iter().find(|watched| watched.still >= self.patience)?;
        Some(Stalled { what: stalled.what, patience: self.patience })
    }
}

/// Ends the watch when it is dropped.
pub struct WatchGuard {
    _ends: mpsc::Sender<Infallible>,
}

/// Begins to watch, on a thread of its own. `fatal` is raised if the state store hangs.
///
/// # Errors
/// The system has no thread to give.
pub fn watch(pulses: &Pulses, fatal: &Fatal) -> io::Result<WatchGuard> {
    let (ends, ended) = mpsc::channel::<Infallible>();
    let (mut watch, raised) = (Watch::new(pulses, patience()), fatal.clone());
    fatal.thread("pontoon-stall", "the thread that watches the state store", move || {
        while let Err(RecvTimeoutError::Timeout) = ended.recv_timeout(LOOK) {
            if let Some(stalled) = watch.look(Instant::now()) {
                raised.raise_stalled(stalled);
                return;
            }
        }
    })?;
    Ok(WatchGuard { _ends: ends })
}

fn patience() -> Duration {
    #[cfg(feature = "test-hooks")]
    if let Some(patience) = super::hooks::stall_patience() {
        return patience;
    }
    Duration::from_millis(limits::STATE_STALL_MS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::pulse;

    const PATIENCE: Duration = Duration::from_secs(60);

    #[test]
    fn only_work_that_stands_still_is_a_stall() {
        let pulses = Pulses::default();
        let mut watch = Watch::new(&pulses, PATIENCE);
        let mut now = Instant::now();
        let mut looks = |watch: &mut Watch, count: u32| {
            (0..count).find_map(|_| {
                now += LOOK;
                watch.look(now)
            })
        };
        assert_eq!(looks(&mut watch, 200), None, "nothing to do");
        let attached = pulses.read.attach();
        let work = pulse::work();
        for _ in 0..3 {
            assert_eq!(looks(&mut watch, 60), None);
            pulse::beat();
        }
        let stalled = Stalled { what: "reading state", patience: PATIENCE };
        assert_eq!(looks(&mut watch, 61), Some(stalled));
        assert!(stalled.to_string().contains("for 60 s, reading state"), "{stalled}");
        drop((work, attached));
        assert_eq!(looks(&mut watch, 200), None, "it has ended after all");
    }

    #[test]
    fn time_in_which_nobody_ran_is_no_stall() {
        let pulses = Pulses::default();
        let mut watch = Watch::new(&pulses, PATIENCE);
        let _attached = pulses.flush.attach();
        let _work = pulse::work();
        let mut now = Instant::now();
        for _ in 0..10 {
            // As after a stop, or a sleep of the machine.
            now += Duration::from_secs(3_600);
            assert_eq!(watch.look(now), None);
        }
    }
}
