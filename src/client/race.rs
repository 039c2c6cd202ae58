//! Asking several nodes of which any will do, without waiting for one that hangs and without troubling
//! all of them: one after the other, each as soon as the one before has failed or has taken
//! [`STAGGER_MS`], while the earlier ones go on.

use std::collections::VecDeque;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::time::Instant;

use crate::limits::STAGGER_MS;

/// Futures that are begun one after the other.
pub struct Race<F> {
    /// Not begun yet: a future does nothing before it is polled.
    waiting: VecDeque<F>,
    running: FuturesUnordered<F>,
    /// When the next one begins, if no end comes before.
    next: Instant,
}

impl<F: Future> Race<F> {
    /// Begins `at_once` of them, and the others in turn.
    pub fn new(entrants: impl IntoIterator<Item = F>, at_once: usize) -> Race<F> {
        let mut waiting: VecDeque<F> = entrants.into_iter().collect();
        let running = waiting.drain(..at_once.min(waiting.len())).collect();
        Race { waiting, running, next: Instant::now() + Duration::from_millis(STAGGER_MS) }
    }

    /// The next end; `None` when all have ended. Whoever asks for another end couldn't use the last one,
    /// so another entrant begins in the place of the one that ended.
    pub async fn next(&mut self) -> Option<F::Output> {
        loop {
            if self.running.is_empty() {
                self.running.push(self.waiting.pop_front()?);
                self.next = Instant::now() + Duration::from_millis(STAGGER_MS);
            }
            let ended = match self.waiting.is_empty() {
                true => Ok(self.running.next().await),
                false => tokio::time::timeout_at(self.next, self.running.next()).await,
            };
            if let Ok(Some(end)) = ended {
                self.next = Instant::now();
                return Some(end);
            }
            if let Some(entrant) = self.waiting.pop_front() {
                self.running.push(entrant);
                self.next = Instant::now() + Duration::from_millis(STAGGER_MS);
            }
        }
    }

    /// Nobody further begins.
    pub fn close(&mut self) {
        self.waiting.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;
    use std::cell::RefCell;
    use std::rc::Rc;

    /// Entrants that take so long; also who has begun so far.
    fn race(
        entrants: &[(char, u64)],
        at_once: usize,
    ) -> (Race<impl Future<Output = char>>, Rc<RefCell<String>>) {
        let begun = Rc::<RefCell<String>>::default();
        let futures = entrants.iter().map(|&(name, ms)| {
            let begun = begun.clone();
            async move {
                begun.borrow_mut().push(name);
                tokio::time::sleep(Duration::from_millis(ms)).await;
                name
            }
        });
        (Race::new(futures.collect::<Vec<_>>(), at_once), begun)
    }

    /// Whether who begun in this order are those that should have since `start`. A machine that stood still meanwhile gave
    /// others their turn, too.
    fn are(begun: &RefCell<String>, these: &str, start: Instant, turns: u64) -> bool {
        let late = start.elapsed() >= Duration::from_millis(turns * STAGGER_MS);
        *begun.borrow() == these || late && begun.borrow().starts_with(these)
    }

    #[tokio::test]
    async fn one_that_hangs_holds_nobody_up() {
        let start = Instant::now();
        let (mut race, begun) = race(&[('a', 60_000), ('b', 60_000), ('c', 1), ('d', 1)], 1);
        assert_eq!(race.next().await, Some('c'));
        assert!(start.elapsed() >= Duration::from_millis(2 * STAGGER_MS), "each had its time");
        assert!(are(&begun, "abc", start, 3), "{begun:?}");
        assert_eq!(race.next().await, Some('d'));
        assert!(start.elapsed() < Duration::from_secs(30));
    }

    #[tokio::test]
    async fn the_end_of_one_begins_the_next_at_once() {
        let start = Instant::now();
        let (mut race, begun) = race(&[('a', 1), ('b', 1), ('c', 1)], 1);
        assert_eq!(race.next().await, Some('a'));
        assert!(
            are(&begun, "a", start, 1),
            "nobody is troubled before the first has had its time: {begun:?}"
        );
        if begun.borrow().len() > 1 {
            return;
        }
        assert_eq!(race.next().now_or_never(), None);
        assert!(are(&begun, "ab", start, 1), "at once: {begun:?}");
        assert_eq!(race.next().await, Some('b'));
        race.close();
        assert_eq!(race.next().await, None);
    }

    #[tokio::test]
    async fn some_may_begin_at_once() {
        let start = Instant::now();
        let (mut race, begun) = race(&[('a', 60_000), ('b', 1), ('c', 60_000)], 2);
        assert_eq!(race.next().await, Some('b'));
        assert!(are(&begun, "ab", start, 1), "{begun:?}");
        assert!(Race::<std::future::Ready<()>>::new([], 8).next().await.is_none());
    }
}
