//! How fresh the map of a node is: when it was last known to be all that the metadata shard's leader knew.
//!
//! ```text
//!   metadata leader: all applied, now ─► its own node ─► heartbeats: "at version v, a ms ago" ─► other nodes,
//!                                                        which tell it on, with the time that has passed
//! ```
//!
//! A leader that is cut off from its group gives up within an election timeout of its own running time. As long as processes
//! run and connections flow, a word is not much older than it says. But a word that has lain somewhere, in a process
//! that was stopped or on a connection that stood still, is older than it says by as long:
//!
//! - A node that didn't run itself notices: it has looked at nothing for longer than [`MAP_STALE_MS`]. It forgets what it
//!   had heard, and what comes in the next two heartbeats' time doesn't count, which empties the connections. A machine that
//!   sleeps and whose monotonic clock sleeps with it notices nothing.
//! - What has lain with another node, or between, it can't tell. The words that come after it on the same connection are
//!   fresh, so it is misled for a moment.
//!
//! Words of before the start of this process don't count: the map that it began with may have been saved long before the
//! node went down. Nor do words of another generation of the map: a leader from before the metadata shard was
//! recovered knows nothing of what came then.
//!
//! Nothing that is safe or not depends on this. It tells clients whom to believe: a node that is cut off can't say that a
//! database doesn't exist, and isn't one to wait at for news.
//!
//! [`MAP_STALE_MS`]: crate::limits::MAP_STALE_MS

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::ids::generation_of;
use crate::limits;

const STALE: Duration = Duration::from_millis(limits::MAP_STALE_MS);

/// See the module page. One per node.
pub struct Hearing {
    heard: Mutex<Heard>,
    cut_off: watch::Sender<bool>,
}

struct Heard {
    /// Words of before don't count.
    began: Instant,
    /// When the metadata shard was last heard.
    last: Option<Instant>,
    /// When the supervisor was last at it: it is every [`NODE_HEARTBEAT_MS`](limits::NODE_HEARTBEAT_MS), as long as
    /// the process runs.
    looked: Instant,
}

impl Heard {
    /// Whether this process seems to have been stopped until now.
    fn stood_still(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.looked) > STALE
    }

    fn is_cut_off(&self, now: Instant) -> bool {
        let stale = |last| now.saturating_duration_since(last) >= STALE;
        self.stood_still(now) || self.last.is_none_or(stale)
    }

    fn look(&mut self, now: Instant) {
        if self.stood_still(now) {
            self.last = None;
            self.began = now + Duration::from_millis(2 * limits::NODE_HEARTBEAT_MS);
        }
        self.looked = self.looked.max(now);
    }
}

impl Default for Hearing {
    /// Of a node that starts, and has heard nothing yet.
    fn default() -> Hearing {
        let now = Instant::now();
        let heard = Heard { began: now, last: None, looked: now };
        Hearing { heard: Mutex::new(heard), cut_off: watch::Sender::new(true) }
    }
}

/// Whether a node whose map has version `map` knows all that is in a map of version `confirmed`.
pub fn knows(map: u64, confirmed: u64) -> bool {
    confirmed <= map && generation_of(confirmed) == generation_of(map)
}

impl Hearing {
    /// The map was known to be up to date at the time `at`. Returns whether that ends the time in which the node was cut off.
    pub fn heard(&self, at: Instant, now: Instant) -> bool {
        let mut heard = self.lock();
        heard.look(now);
        // A word that is on its way twice is as old as it is.
        heard.last = heard.last.max(Some(at).filter(|at| *at >= heard.began));
        self.tell(&heard, now) && !heard.is_cut_off(now)
    }

    /// Milliseconds since the map was last known to be up to date, if there was such a time.
    pub fn age_ms(&self, now: Instant) -> Option<u32> {
        let heard = self.lock();
        let last = heard.last.filter(|_| !heard.stood_still(now))?;
        let age = now.saturating_duration_since(last).as_millis();
        Some(u32::try_from(age).unwrap_or(u32::MAX - 1).min(u32::MAX - 1))
    }

    /// Notices that too much time has passed. To be called every [`NODE_HEARTBEAT_MS`](limits::NODE_HEARTBEAT_MS).
    /// Returns whether anything has changed.
    pub fn look(&self, now: Instant) -> bool {
        let mut heard = self.lock();
        heard.look(now);
        self.tell(&heard, now)
    }

    /// Whether others may know more than this node: it hasn't heard from the metadata shard since it started, or for
    /// [`MAP_STALE_MS`](limits::MAP_STALE_MS).
    pub fn is_cut_off(&self, now: Instant) -> bool {
        self.lock().is_cut_off(now)
    }

    /// Waits until that is so.
    pub async fn cut_off(&self) {
        let mut told = self.cut_off.subscribe();
        // Nobody may have looked for a while.
        self.look(Instant::now());
        if told.wait_for(|cut_off| *cut_off).await.is_err() {
            unreachable!("the sender is this node's own");
        }
    }

    fn tell(&self, heard: &Heard, now: Instant) -> bool {
        let cut_off = heard.is_cut_off(now);
        self.cut_off.send_if_modified(|told| std::mem::replace(told, cut_off) != cut_off)
    }

    fn lock(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_node_is_cut_off_until_it_has_heard_and_when_it_hears_no_more() {
        let hearing = Hearing::default();
        let began = hearing.lock().began;
        assert!(hearing.is_cut_off(began));
        assert_eq!(hearing.age_ms(began), None);
        // What was known before it started is no word of now, however fresh.
        if let Some(before) = began.checked_sub(ms(1)) {
            assert!(!hearing.heard(before, began));
            assert!(hearing.is_cut_off(began));
            assert_eq!(hearing.age_ms(began), None);
        }
        assert!(hearing.heard(began + ms(100), began + ms(300)), "it has just heard");
        assert!(!hearing.heard(began + ms(200), began + ms(400)), "no news");
        assert!(!hearing.heard(began + ms(150), began + ms(400)));
        assert_eq!(hearing.age_ms(began + ms(400)), Some(200), "the latest counts, not the last to come");
        let stale = began + ms(200) + STALE;
        assert!(!hearing.look(stale - ms(1)) && !hearing.is_cut_off(stale - ms(1)));
        assert!(hearing.is_cut_off(stale), "it needs no look for that");
        assert!(hearing.look(stale));
        assert!(!hearing.heard(began + ms(200), stale), "an old word changes nothing");
        assert!(hearing.heard(stale, stale) && !hearing.is_cut_off(stale));
    }

    #[test]
    fn a_process_that_was_stopped_believes_nothing_that_waited_for_it() {
        let hearing = Hearing::default();
        let began = hearing.lock().began;
        assert!(hearing.heard(began, began));
        // It went on hearing until it was stopped, at its last look.
        let stopped = began + ms(4_000);
        hearing.heard(stopped, stopped);
        assert!(!hearing.is_cut_off(stopped + STALE - ms(1)));
        let woken = stopped + STALE + ms(1);
        assert!(hearing.is_cut_off(woken), "before anybody has looked");
        assert_eq!(hearing.age_ms(woken), None);
        // A heartbeat that lay in a buffer, handled before the look and after it.
        assert!(!hearing.heard(woken, woken));
        assert!(!hearing.heard(woken + ms(100), woken + ms(100)) && hearing.is_cut_off(woken + ms(100)));
        assert!(!hearing.look(woken + ms(500)), "it said so already");
        let again = woken + ms(2 * limits::NODE_HEARTBEAT_MS);
        assert!(!hearing.heard(again - ms(1), again) && hearing.is_cut_off(again));
        assert!(hearing.heard(again, again) && !hearing.is_cut_off(again));
    }

    #[test]
    fn who_was_recovered_without_doesnt_confirm_the_map_of_after() {
        let recovered = |count| (1_u64 << 32) + count;
        assert!(knows(7, 7) && knows(8, 7) && !knows(7, 8));
        assert!(knows(recovered(8), recovered(7)));
        assert!(!knows(recovered(1), 7), "a leader from before");
        assert!(!knows(7, recovered(1)));
    }

    #[tokio::test]
    async fn who_waits_is_told_when_it_is_cut_off() {
        let hearing = Hearing::default();
        hearing.cut_off().await;
        let now = Instant::now();
        hearing.heard(now, now);
        let told = hearing.cut_off();
        let late = async {
            tokio::time::sleep(ms(20)).await;
            hearing.look(now + STALE);
        };
        let both = async { tokio::join!(told, late) };
        tokio::time::timeout(ms(5_000), both).await.expect("told");
    }
}
