//! How fresh the map of a node is: when it was last known to be all that the metadata shard's leader knew.
//!
//! ```text
//!   metadata leader: all applied, now ─► its own node ─► heartbeats: "at version v, a ms ago" ─► other nodes,
//!                                                        which tell it on, with the time that has passed
//! ```
//!
//! A leader that is cut off from its group gives up within an election timeout, so its word is never much older than it
//! says; nor is that of others, by more than a heartbeat takes on its way. Words from before the start of this process
//! don't count: the map that it began with may have been saved long before the node went down.
//!
//! Nothing that is safe or not depends on this. It tells clients whom to believe: a node that is cut off can't say that a
//! database doesn't exist, and isn't one to wait at for news.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::limits;

/// See the module page. One per node.
pub struct Hearing {
    began: Instant,
    /// When the metadata shard was last heard.
    last: Mutex<Option<Instant>>,
    cut_off: watch::Sender<bool>,
}

impl Default for Hearing {
    /// Of a node that starts, and has heard nothing yet.
    fn default() -> Hearing {
        Hearing { began: Instant::now(), last: Mutex::default(), cut_off: watch::Sender::new(true) }
    }
}

impl Hearing {
    /// The map was known to be up to date at this time. Returns whether that ends the time in which the node was cut off.
    pub fn heard(&self, at: Instant, now: Instant) -> bool {
        {
            let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
            // A word that is on its way twice is as old as it is.
            *last = (*last).max(Some(at).filter(|at| *at >= self.began));
        }
        self.look(now) && !self.is_cut_off()
    }

    /// Milliseconds since then, if there was such a time.
    pub fn age_ms(&self, now: Instant) -> Option<u32> {
        let last = *self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let age = now.saturating_duration_since(last?).as_millis();
        Some(u32::try_from(age).unwrap_or(u32::MAX - 1).min(u32::MAX - 1))
    }

    /// Notices that too much time has passed. Returns whether anything has changed.
    pub fn look(&self, now: Instant) -> bool {
        let is_fresh =
            |age: u32| Duration::from_millis(age.into()) < Duration::from_millis(limits::MAP_STALE_MS);
        let cut_off = !self.age_ms(now).is_some_and(is_fresh);
        self.cut_off.send_if_modified(|told| std::mem::replace(told, cut_off) != cut_off)
    }

    /// Whether others may know more than this node: it hasn't heard from the metadata shard since it started, or for
    /// [`MAP_STALE_MS`](limits::MAP_STALE_MS).
    pub fn is_cut_off(&self) -> bool {
        *self.cut_off.borrow()
    }

    /// Waits until that is so.
    pub async fn cut_off(&self) {
        if self.cut_off.subscribe().wait_for(|cut_off| *cut_off).await.is_err() {
            unreachable!("the sender is this node's own");
        }
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
        let began = hearing.began;
        assert!(hearing.is_cut_off());
        assert_eq!(hearing.age_ms(began), None);
        // What was known before it started is no word of now, however fresh.
        if let Some(before) = began.checked_sub(ms(1)) {
            assert!(!hearing.heard(before, began));
            assert!(hearing.is_cut_off());
            assert_eq!(hearing.age_ms(began), None);
        }
        assert!(hearing.heard(began + ms(100), began + ms(300)), "it has just heard");
        assert!(!hearing.heard(began + ms(200), began + ms(400)), "no news");
        assert!(!hearing.heard(began + ms(150), began + ms(400)));
        assert_eq!(hearing.age_ms(began + ms(400)), Some(200), "the latest counts, not the last to come");
        let stale = began + ms(200 + limits::MAP_STALE_MS);
        assert!(!hearing.look(stale - ms(1)) && !hearing.is_cut_off());
        assert!(hearing.look(stale) && hearing.is_cut_off());
        assert!(!hearing.heard(began + ms(200), stale), "an old word changes nothing");
        assert!(hearing.heard(stale, stale) && !hearing.is_cut_off());
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
            hearing.look(now + ms(limits::MAP_STALE_MS));
        };
        let both = async { tokio::join!(told, late) };
        tokio::time::timeout(ms(5_000), both).await.expect("told");
    }
}
