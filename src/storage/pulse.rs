//! Signs of life of threads that work on a store.
//!
//! A store may hang: a disk that doesn't answer, or an engine that waits for itself. Who is inside it then can't tell
//! anybody. So a thread tells as long as it goes on: it is attached to a [`Pulse`], and work on stores beats there at each
//! of its steps. Somebody else looks whether the beats go on. On a thread without a pulse nothing of this happens.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The lowest bit: the thread has work under way. The others count beats.
const AT_WORK: u64 = 1;
const BEAT: u64 = 2;

thread_local! {
    static OWN: RefCell<Option<Pulse>> = const { RefCell::new(None) };
}

/// How a thread gets on. Written by that thread alone, read by any.
#[derive(Clone, Default, Debug)]
pub struct Pulse(Arc<AtomicU64>);

impl Pulse {
    /// Has the work of this thread beat here, until what is returned is dropped.
    pub fn attach(&self) -> Attached {
        Attached { before: OWN.replace(Some(self.clone())) }
    }

    /// `None`: the thread has nothing to do. Else a number that changes with each of its beats.
    pub fn at_work(&self) -> Option<u64> {
        let told = self.0.load(Ordering::Relaxed);
        (told & AT_WORK != 0).then_some(told)
    }

    fn tell(&self, at_work: bool) {
        // Nobody else writes, so nothing is lost between the two.
        let beats = (self.0.load(Ordering::Relaxed) & !AT_WORK).wrapping_add(BEAT);
        self.0.store(beats | u64::from(at_work), Ordering::Relaxed);
    }
}

/// A thread and its pulse.
#[must_use]
pub struct Attached {
    before: Option<Pulse>,
}

impl Drop for Attached {
    fn drop(&mut self) {
        OWN.set(self.before.take());
    }
}

/// Work is under way on this thread, until what is returned is dropped; by a panic, too.
pub fn work() -> Working {
    let own = OWN.with_borrow(Clone::clone);
    // Who is at work already stays so at the end of this.
    let begun = own.filter(|own| own.at_work().is_none());
    if let Some(own) = &begun {
        own.tell(true);
    }
    Working { begun }
}

/// One step more of the work under way on this thread is done.
pub fn beat() {
    OWN.with_borrow(|own| {
        if let Some(own) = own {
            own.tell(own.at_work().is_some());
        }
    });
}

/// Work that is under way.
#[must_use]
pub struct Working {
    begun: Option<Pulse>,
}

impl Drop for Working {
    fn drop(&mut self) {
        if let Some(own) = &self.begun {
            own.tell(false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_beats_while_it_works_and_is_attached() {
        let pulse = Pulse::default();
        beat();
        drop(work());
        assert_eq!(pulse.at_work(), None, "nobody is attached");
        let attached = pulse.attach();
        beat();
        assert_eq!(pulse.at_work(), None, "it has nothing to do");
        let outer = work();
        let begun = pulse.at_work();
        assert!(begun.is_some());
        let inner = work();
        assert_eq!(pulse.at_work(), begun, "no step is done yet");
        beat();
        assert!(pulse.at_work().is_some() && pulse.at_work() != begun);
        drop(inner);
        assert!(pulse.at_work().is_some(), "the outer goes on");
        drop(outer);
        assert_eq!(pulse.at_work(), None);
        drop(attached);
        let _work = work();
        assert_eq!(pulse.at_work(), None);
    }
}
