//! Nodes that have not taken leadership which was handed to them: for a while it isn't handed there again, by any
//! replica of this node.
//!
//! Each attempt stops the writes of a shard until it lapses, and a node whose disk hangs takes none, though it
//! answers: its vote for itself waits for that disk. So the time between two attempts grows as they lapse, whichever shard they are of, until one
//! succeeds or the node's process is another. When such a time is over one shard tries first: the others follow once the node has taken
//! that one, and wait on if it hasn't. Invariant: after a node has lapsed, and until it has taken leadership, at most one shard hands it
//! over there in [`TRANSFER_MS_MAX`](limits::TRANSFER_MS_MAX). Except where leadership has to go and there is nobody else: a node
//! that stops, or whose own disk hangs, hands it to one that hasn't taken it rather than to none. What is remembered is bounded: a node is forgotten once it could long have been tried again.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::ids::NodeId;
use crate::limits;

/// See the module page. One per node.
#[derive(Debug, Default)]
pub struct Reluctance {
    nodes: Mutex<HashMap<NodeId, Wait>>,
    /// How many these are, to be read without the lock.
    count: AtomicUsize,
}

#[derive(Clone, Copy, Debug)]
struct Wait {
    until: Instant,
    wait: Duration,
    /// When the attempt of the one that tries first is over, whatever comes of it.
    trial_ends: Option<Instant>,
}

impl Wait {
    /// For how long nobody else is to try.
    fn lasts(&self, now: Instant) -> Option<Duration> {
        let until = self.trial_ends.unwrap_or(self.until).max(self.until);
        until.checked_duration_since(now).filter(|wait| !wait.is_zero())
    }
}

impl Reluctance {
    /// A node hasn't taken leadership.
    pub fn lapsed(&self, node: NodeId, now: Instant) {
        let mut nodes = self.nodes();
        nodes.retain(|_, wait| now < wait.until + Duration::from_millis(limits::TRANSFER_AGAIN_MS_MAX));
        let wait = match nodes.get(&node) {
            // One of several attempts that were under way together.
            Some(before) if now < before.until => return,
            Some(before) => 2 * before.wait,
            None => Duration::from_millis(limits::TRANSFER_AGAIN_MS_MIN),
        };
        let wait = wait.min(Duration::from_millis(limits::TRANSFER_AGAIN_MS_MAX));
        nodes.insert(node, Wait { until: now + wait, wait, trial_ends: None });
        self.count.store(nodes.len(), Ordering::Relaxed);
    }

    /// A node has come to lead, so it is well; or it is another process by now, and may be.
    pub fn forget(&self, node: NodeId) {
        if self.count.load(Ordering::Relaxed) > 0 {
            let mut nodes = self.nodes();
            nodes.remove(&node);
            self.count.store(nodes.len(), Ordering::Relaxed);
        }
    }

    /// For how long no leadership should be handed to a node; `None` if it may be.
    pub fn wait(&self, node: NodeId, now: Instant) -> Option<Duration> {
        if self.count.load(Ordering::Relaxed) == 0 {
            return None;
        }
        self.nodes().get(&node)?.lasts(now)
    }

    /// Leadership is about to be handed to a node: where that hasn't taken it before, nobody else hands it there until the end of
    /// this is known.
    ///
    /// # Errors
    /// It should not be yet, and for how long.
    pub fn begin(&self, node: NodeId, now: Instant) -> Result<(), Duration> {
        if self.count.load(Ordering::Relaxed) == 0 {
            return Ok(());
        }
        let mut nodes = self.nodes();
        let Some(wait) = nodes.get_mut(&node) else { return Ok(()) };
        if let Some(lasts) = wait.lasts(now) {
            return Err(lasts);
        }
        wait.trial_ends = Some(now + Duration::from_millis(limits::TRANSFER_MS_MAX));
        Ok(())
    }

    fn nodes(&self) -> MutexGuard<'_, HashMap<NodeId, Wait>> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: NodeId = NodeId(2);

    #[test]
    fn who_does_not_take_leadership_is_asked_more_and_more_seldom() {
        let reluctance = Reluctance::default();
        let mut now = Instant::now();
        assert_eq!(reluctance.wait(NODE, now), None);
        let mut waits = Vec::new();
        for _ in 0..7 {
            reluctance.lapsed(NODE, now);
            // Another shard's, begun before that was known.
            reluctance.lapsed(NODE, now + Duration::from_millis(100));
            let wait = reluctance.wait(NODE, now).expect("it isn't asked at once");
            waits.push(wait.as_secs());
            now += wait;
            assert_eq!(reluctance.wait(NODE, now), None);
        }
        assert_eq!(waits, [2, 4, 8, 16, 32, 60, 60]);
        assert_eq!(reluctance.wait(NodeId(3), now), None, "that is about one node");
        reluctance.lapsed(NODE, now);
        reluctance.forget(NODE);
        assert_eq!(reluctance.wait(NODE, now), None);
        reluctance.lapsed(NODE, now);
        assert_eq!(reluctance.wait(NODE, now), Some(Duration::from_secs(2)), "it begins anew");
    }

    #[test]
    fn when_the_time_is_over_one_tries_and_the_others_follow_when_it_was_taken() {
        let reluctance = Reluctance::default();
        let mut now = Instant::now();
        for _ in 0..3 {
            assert_eq!(reluctance.begin(NODE, now), Ok(()), "nothing is known of it");
        }
        let trial = Duration::from_millis(limits::TRANSFER_MS_MAX);
        reluctance.lapsed(NODE, now);
        for seconds in [2, 4, 8] {
            assert_eq!(reluctance.begin(NODE, now), Err(Duration::from_secs(seconds)));
            now += Duration::from_secs(seconds);
            assert_eq!(
                (reluctance.wait(NODE, now), reluctance.begin(NODE, now)),
                (None, Ok(())),
                "one tries"
            );
            assert_eq!((reluctance.wait(NODE, now), reluctance.begin(NODE, now)), (Some(trial), Err(trial)));
            now += trial - Duration::from_millis(1);
            assert!(reluctance.begin(NODE, now).is_err());
            reluctance.lapsed(NODE, now);
        }
        // The shard that tries may never tell: its leader has stopped.
        now += Duration::from_secs(16);
        assert_eq!(reluctance.begin(NODE, now), Ok(()));
        now += trial;
        assert_eq!((reluctance.begin(NODE, now), reluctance.begin(NODE, now)), (Ok(()), Err(trial)));
        reluctance.forget(NODE);
        for _ in 0..3 {
            assert_eq!(reluctance.begin(NODE, now), Ok(()), "it has taken one");
        }
    }

    #[test]
    fn a_node_that_lapsed_long_ago_is_as_any_other() {
        let reluctance = Reluctance::default();
        let now = Instant::now();
        reluctance.lapsed(NODE, now);
        let later =
            now + Duration::from_millis(limits::TRANSFER_AGAIN_MS_MIN + limits::TRANSFER_AGAIN_MS_MAX);
        reluctance.lapsed(NODE, later);
        assert_eq!(reluctance.wait(NODE, later), Some(Duration::from_millis(limits::TRANSFER_AGAIN_MS_MIN)));
    }
}
