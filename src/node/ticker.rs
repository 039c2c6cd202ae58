//! A regular call of an actor's that never runs ahead of time.
//!
//! actix's own interval makes up for what it missed: after a stall of a minute (a stopped process, a
//! machine asleep) six hundred ticks of a tenth of a second would come at once. Elections would be held
//! and sessions expire by time that has passed for nobody. Here a call that is late is made once, and
//! those that were missed are skipped.

use std::time::{Duration, Instant};

use actix::prelude::*;

/// Calls `tick` every `period`, the first time after one.
pub fn every<A: Actor<Context = Context<A>>>(
    ctx: &mut Context<A>,
    period: Duration,
    tick: impl FnMut(&mut A, &mut Context<A>) + 'static,
) {
    arm(ctx, Instant::now() + period, period, tick);
}

fn arm<A: Actor<Context = Context<A>>>(
    ctx: &mut Context<A>,
    due: Instant,
    period: Duration,
    mut tick: impl FnMut(&mut A, &mut Context<A>) + 'static,
) {
    ctx.run_later(due.saturating_duration_since(Instant::now()), move |actor, ctx| {
        tick(actor, ctx);
        arm(ctx, next_due(due, Instant::now(), period), period, tick);
    });
}

/// When the call after the one that was due at `due` is due. In step with the first, so that calls
/// aren't ever fewer for being a little late each; but where one was missed, a whole period from now.
fn next_due(due: Instant, now: Instant, period: Duration) -> Instant {
    let next = due + period;
    if next > now { next } else { now + period }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::rc::Rc;

    struct Counter(Rc<Cell<u32>>);

    impl Actor for Counter {
        type Context = Context<Self>;
        fn started(&mut self, ctx: &mut Context<Self>) {
            every(ctx, PERIOD, |counter, _| counter.0.set(counter.0.get() + 1));
        }
    }

    const PERIOD: Duration = Duration::from_millis(20);

    #[actix::test]
    async fn what_was_missed_in_a_stall_is_skipped() {
        let (count, begun) = (Rc::new(Cell::new(0)), Instant::now());
        let _counter = Counter(count.clone()).start();
        while count.get() < 5 {
            actix::clock::sleep(PERIOD / 4).await;
        }
        assert!(begun.elapsed() >= 5 * PERIOD, "never ahead of time");
        let before = count.get();
        std::thread::sleep(20 * PERIOD);
        let back = Instant::now();
        actix::clock::sleep(PERIOD / 2).await;
        let made = count.get() - before;
        let possible = 1 + back.elapsed().div_duration_f64(PERIOD).ceil() as u32;
        assert!((1..=possible).contains(&made), "{made} calls of at most {possible}");
    }

    #[test]
    fn a_late_call_doesnt_shift_the_next_and_a_missed_one_does() {
        let due = Instant::now();
        assert_eq!(next_due(due, due, PERIOD), due + PERIOD);
        assert_eq!(next_due(due, due + PERIOD * 9 / 10, PERIOD), due + PERIOD);
        assert_eq!(next_due(due, due + PERIOD, PERIOD), due + 2 * PERIOD);
        assert_eq!(next_due(due, due + 7 * PERIOD, PERIOD), due + 8 * PERIOD);
    }
}
