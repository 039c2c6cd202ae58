//! An order of operators, over its attempts. Sans-I/O.
//!
//! An order that is on its way for long may arrive after another about the same thing, and one whose answer was lost
//! is sent again. So it says by which version of the cluster map it was given: which, is settled before the first
//! attempt, and is changed only while no attempt may have had an effect. The metadata shard refuses it for what has
//! changed since, so no attempt undoes what was decided later, however late it comes.
//!
//! A client may have given it by an older map than others know already. Then nothing was done, and it is given once
//! more, by a map in which the change is.

use super::retry::Failure;
use crate::refusal::{Outcome, Refusal};

/// See the module page.
#[derive(Default)]
pub struct Order {
    /// The version, once it is settled.
    seen: Option<u64>,
    /// The version in which the change was that the first map didn't have; 0: there was none.
    least: u64,
    /// Whether an attempt may have had an effect.
    in_doubt: bool,
}

impl Order {
    /// While it isn't settled by which map the order is given: the version that it must have at least.
    pub fn wants(&self) -> Option<u64> {
        self.seen.is_none().then_some(self.least.max(1))
    }

    /// The order is given by the map of this version.
    pub fn settle(&mut self, version: u64) {
        assert!(!self.in_doubt, "an attempt may have had an effect: the next is to say the same");
        self.seen = Some(version);
    }

    /// An attempt leaves. Returns by which map version the order is given, 0 while that isn't settled, and whether an
    /// attempt before it may have had an effect.
    pub fn begin(&mut self) -> (u64, bool) {
        (self.seen.unwrap_or(0), std::mem::replace(&mut self.in_doubt, true))
    }

    /// The attempt ended so, with an answer; one without an answer stays in doubt. `before` as
    /// [`Order::begin`] told.
    pub fn end<T>(&mut self, before: bool, end: Result<T, Failure>) -> Result<T, Failure> {
        let Err(failure) = end else { return end };
        self.in_doubt = before || failure.outcome() == Outcome::Unknown;
        match &failure {
            // Once: what changes again was changed by somebody, not known late.
            Failure::Refused(Refusal::Changed { what, version }) if !self.in_doubt && self.least == 0 => {
                (self.seen, self.least) = (None, *version);
                Err(Failure::NotSent(format!(
                    "{what} has changed at map version {version}, which isn't known here"
                )))
            }
            _ => Err(failure),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changed(version: u64) -> Result<u64, Failure> {
        Err(Failure::Refused(Refusal::Changed { what: "node 3".into(), version }))
    }

    fn lost() -> Result<u64, Failure> {
        Err(Failure::Lost("no answer".into()))
    }

    fn given(version: u64) -> Order {
        let mut order = Order::default();
        assert_eq!(order.wants(), Some(1), "any map");
        order.settle(version);
        order
    }

    #[test]
    fn an_attempt_in_doubt_is_repeated_by_the_same_map() {
        let mut order = given(7);
        let (seen, before) = order.begin();
        assert_eq!((seen, before), (7, false));
        assert_eq!(order.end(before, lost()), lost());
        let (seen, before) = order.begin();
        assert_eq!((seen, before), (7, true));
        // It was done and then changed, or changed and never done: this order does nothing any more.
        assert_eq!(order.end(before, changed(9)), changed(9));
        assert_eq!(order.wants(), None);
        let (seen, before) = order.begin();
        assert_eq!((seen, order.end(before, Ok(8))), (7, Ok(8)));
    }

    #[test]
    fn one_that_was_given_by_an_old_map_is_given_once_more() {
        let mut order = given(7);
        let (_, before) = order.begin();
        assert!(matches!(order.end(before, changed(9)), Err(Failure::NotSent(_))), "to be tried again");
        assert_eq!(order.wants(), Some(9));
        order.settle(11);
        let (seen, before) = order.begin();
        assert_eq!((seen, before), (11, false));
        assert_eq!(order.end(before, changed(12)), changed(12), "somebody else decides about it right now");
    }

    #[test]
    fn a_certain_refusal_leaves_no_doubt() {
        let mut order = given(7);
        let starting = || Err::<u64, _>(Failure::Refused(Refusal::Unavailable("starting".into())));
        let (_, before) = order.begin();
        assert_eq!(order.end(before, starting()), starting());
        let (seen, before) = order.begin();
        assert_eq!((seen, before), (7, false));
        assert!(order.end(before, changed(9)).is_err_and(|failure| failure.outcome() == Outcome::NotApplied));
        assert_eq!(order.wants(), Some(9));
    }
}
