//! What becomes of a transfer after an attempt: decisions alone, time is passed in.

use std::time::{Duration, Instant};

use crate::limits::{SNAPSHOT_AGAIN_MS_MAX, SNAPSHOT_AGAIN_MS_MIN, SNAPSHOT_BUSY_MS, SNAPSHOT_PATIENCE_MS};
use crate::transport::snapshot::sender::{Delivery, SendError};

/// What to do next.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Next {
    /// Try again after this time.
    Again(Duration),
    /// The follower has what it needs: this snapshot, or more.
    Done,
    /// Give up; the file may serve another time.
    GiveUp(String),
    /// Give up; the file is of no use.
    Discard(String),
}

/// The attempts to bring one snapshot to one node.
#[derive(Debug)]
pub struct Attempts {
    /// When the first attempt ended that came no farther than those before it.
    failing_since: Option<Instant>,
    /// Bytes that were there at the beginning of the attempt that got farthest.
    farthest: u64,
    delay: Duration,
}

impl Default for Attempts {
    fn default() -> Self {
        Attempts::new()
    }
}

impl Attempts {
    /// Before the first.
    pub fn new() -> Attempts {
        Attempts { failing_since: None, farthest: 0, delay: Duration::from_millis(SNAPSHOT_AGAIN_MS_MIN) }
    }

    /// The node has so many bytes already.
    pub fn resumed(&mut self, at: u64) {
        if at > self.farthest {
            self.farthest = at;
            self.failing_since = None;
            self.delay = Duration::from_millis(SNAPSHOT_AGAIN_MS_MIN);
        }
    }

    /// An attempt has ended.
    pub fn after(&mut self, result: Result<Delivery, SendError>, now: Instant) -> Next {
        let (least, why) = match result {
            Ok(Delivery::Installed | Delivery::NotNeeded) => return Next::Done,
            Ok(Delivery::Refused(why)) => return Next::GiveUp(why),
            Ok(Delivery::Failed(why)) => return Next::Discard(why),
            Err(error @ SendError::File(_)) => return Next::Discard(error.to_string()),
            Ok(Delivery::Busy(after)) => {
                // A node that says at once when to come back is not asked more often than that.
                let after = after.clamp(
                    Duration::from_millis(u64::from(SNAPSHOT_BUSY_MS) / 2),
                    Duration::from_millis(10 * u64::from(SNAPSHOT_BUSY_MS)),
                );
                (after, "the node has been busy for too long".to_owned())
            }
            Err(SendError::Link(error)) => (Duration::ZERO, error.to_string()),
        };
        let waited = now.saturating_duration_since(*self.failing_since.get_or_insert(now));
        if waited >= Duration::from_millis(SNAPSHOT_PATIENCE_MS) {
            return Next::GiveUp(why);
        }
        let delay = self.delay.max(least);
        self.delay = (self.delay * 2).min(Duration::from_millis(SNAPSHOT_AGAIN_MS_MAX));
        Next::Again(delay)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::TransportError;

    fn lost() -> Result<Delivery, SendError> {
        Err(SendError::Link(TransportError::Closed))
    }

    #[test]
    fn verdicts_are_final() {
        let now = Instant::now();
        let mut attempts = Attempts::new();
        assert_eq!(attempts.after(Ok(Delivery::Installed), now), Next::Done);
        assert_eq!(attempts.after(Ok(Delivery::NotNeeded), now), Next::Done);
        assert_eq!(attempts.after(Ok(Delivery::Refused("no".into())), now), Next::GiveUp("no".into()));
        assert_eq!(attempts.after(Ok(Delivery::Failed("bad".into())), now), Next::Discard("bad".into()));
        let unreadable = Err(SendError::File(std::io::ErrorKind::UnexpectedEof.into()));
        assert!(matches!(attempts.after(unreadable, now), Next::Discard(_)));
    }

    #[test]
    fn lost_connections_are_tried_again_more_and_more_seldom_until_patience_ends() {
        let begun = Instant::now();
        let mut attempts = Attempts::new();
        let mut now = begun;
        let mut delays = Vec::new();
        while let Next::Again(delay) = attempts.after(lost(), now) {
            delays.push(delay.as_millis() as u64);
            now += delay;
        }
        assert_eq!(delays[..6], [100, 200, 400, 800, 1600, SNAPSHOT_AGAIN_MS_MAX]);
        assert!((now - begun).as_millis() as u64 >= SNAPSHOT_PATIENCE_MS);
        assert!(delays.len() < 25);
    }

    #[test]
    fn progress_renews_patience() {
        let begun = Instant::now();
        let patience = Duration::from_millis(SNAPSHOT_PATIENCE_MS);
        let mut attempts = Attempts::new();
        assert!(matches!(attempts.after(lost(), begun), Next::Again(_)));
        attempts.resumed(1000);
        let late = begun + patience;
        assert!(matches!(attempts.after(lost(), late), Next::Again(_)));
        attempts.resumed(1000);
        assert!(matches!(attempts.after(lost(), late + patience), Next::GiveUp(_)), "no farther than before");
    }

    #[test]
    fn a_busy_node_says_when_within_reason() {
        let now = Instant::now();
        let mut attempts = Attempts::new();
        let mut busy = |ms| match attempts.after(Ok(Delivery::Busy(Duration::from_millis(ms))), now) {
            Next::Again(delay) => delay.as_millis() as u64,
            other => panic!("{other:?}"),
        };
        assert_eq!(busy(900), 900);
        assert_eq!(busy(0), u64::from(SNAPSHOT_BUSY_MS) / 2);
        assert_eq!(busy(86_400_000), 10 * u64::from(SNAPSHOT_BUSY_MS));
    }
}
