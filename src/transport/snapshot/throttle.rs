//! A bound on bytes per second, shared by all transfers of a node, or by all that is done for them on its disk.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::limits::SNAPSHOT_BURST_MS;
use crate::telemetry::metrics as names;

/// Lets so many bytes a second pass, over all who ask; each in the order of asking.
#[derive(Debug)]
pub struct Throttle {
    bucket: Mutex<Bucket>,
    /// What is allowed here, whatever the cluster allows.
    own: u64,
    passed: AtomicU64,
}

impl Throttle {
    /// At most `bytes_per_second`, from now on.
    pub fn new(bytes_per_second: u64) -> Throttle {
        Throttle {
            bucket: Mutex::new(Bucket::new(bytes_per_second, Instant::now())),
            own: bytes_per_second,
            passed: AtomicU64::new(0),
        }
    }

    /// From now on at most so many, or what was allowed at first if that is less; 0: only that holds. Who
    /// waits already waits as long as it was told.
    pub fn limit(&self, bytes_per_second: u64) {
        let limit = if bytes_per_second == 0 { self.own } else { self.own.min(bytes_per_second) };
        self.bucket.lock().unwrap_or_else(PoisonError::into_inner).bytes_per_second = limit.max(1);
    }

    /// Returns when `bytes` may be sent.
    pub async fn pass(&self, bytes: usize) {
        let wait = self.take(bytes, Instant::now());
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
        self.passed.fetch_add(bytes as u64, Ordering::Relaxed);
        metrics::counter!(names::SNAPSHOT_SENT_BYTES).increment(bytes as u64);
    }

    /// Takes `bytes`, for who waits by other means: for how long. They don't count as passed.
    pub fn take(&self, bytes: usize, now: Instant) -> Duration {
        self.bucket.lock().unwrap_or_else(PoisonError::into_inner).take(bytes, now)
    }

    /// Bytes that have passed.
    pub fn passed(&self) -> u64 {
        self.passed.load(Ordering::Relaxed)
    }
}

/// The same without a clock: when what was taken so far is paid for.
#[derive(Debug)]
pub struct Bucket {
    bytes_per_second: u64,
    /// Everything that was let pass has been, at the rate, by then.
    paid: Instant,
}

impl Bucket {
    /// A bucket that is full at `now`.
    pub fn new(bytes_per_second: u64, now: Instant) -> Bucket {
        let burst = Duration::from_millis(SNAPSHOT_BURST_MS);
        Bucket { bytes_per_second: bytes_per_second.max(1), paid: now.checked_sub(burst).unwrap_or(now) }
    }

    /// Takes `bytes` and tells how long to wait before they may be sent. What wasn't used for some
    /// time is not saved up beyond a short burst.
    pub fn take(&mut self, bytes: usize, now: Instant) -> Duration {
        let burst = Duration::from_millis(SNAPSHOT_BURST_MS);
        let begin = match now.checked_sub(burst) {
            Some(earliest) => self.paid.max(earliest),
            None => self.paid,
        };
        self.paid = begin + Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
        self.paid.saturating_duration_since(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_holds_over_all_who_take_and_idle_time_is_not_saved_up() {
        let start = Instant::now() + Duration::from_secs(3600);
        let mut bucket = Bucket::new(1000, start);
        let mut sent = 0;
        let mut now = start;
        while now < start + Duration::from_secs(10) {
            now += bucket.take(100, now);
            sent += 100;
        }
        assert!((10_000..=10_400).contains(&sent), "{sent} bytes in ten seconds");
        // An hour later there is a burst, and no more.
        now += Duration::from_secs(3600);
        let mut at_once = 0;
        while bucket.take(10, now).is_zero() {
            at_once += 10;
        }
        assert_eq!(at_once, 1000 * SNAPSHOT_BURST_MS / 1000);
    }

    #[tokio::test]
    async fn the_lower_of_both_limits_holds_from_when_it_is_set() {
        let throttle = Throttle::new(1 << 20);
        let rate = |throttle: &Throttle| throttle.bucket.lock().unwrap().bytes_per_second;
        for (cluster, both) in [(1 << 10, 1 << 10), (1 << 30, 1 << 20), (0, 1 << 20), (1, 1)] {
            throttle.limit(cluster);
            assert_eq!(rate(&throttle), both);
        }
        throttle.limit(0);
        throttle.pass(1000).await;
        throttle.pass(24).await;
        assert_eq!(throttle.passed(), 1024);
    }

    #[test]
    fn those_who_ask_together_wait_one_after_another() {
        let now = Instant::now() + Duration::from_secs(3600);
        let mut bucket = Bucket::new(1000, now);
        assert!(bucket.take(100, now).is_zero());
        let waits: Vec<_> = (0..3).map(|_| bucket.take(500, now).as_millis()).collect();
        assert_eq!(waits, [500, 1000, 1500]);
    }
}
