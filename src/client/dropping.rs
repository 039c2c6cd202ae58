//! The drop of a database, over its attempts. Sans-I/O.
//!
//! A name may be given to another database as soon as the first is gone, and a request whose answer was
//! lost is sent again. So what is dropped is an id: which, is settled before the first attempt, and is
//! changed only while no attempt may have had an effect. That it is gone is an error then, and success
//! later.

use super::retry::Failure;
use crate::ids::DatabaseId;
use crate::refusal::{Outcome, Refusal};

/// See the module page.
pub struct Dropping {
    name: String,
    /// Whether `database` is settled.
    resolved: bool,
    /// `None`: no node knows one of that name, so the metadata shard has the last word, once.
    database: Option<DatabaseId>,
    /// The one that turned out to be gone before the first attempt.
    gone: Option<DatabaseId>,
    /// Whether an attempt may have had an effect.
    in_doubt: bool,
}

impl Dropping {
    /// Of the database with this name.
    pub fn new(name: String) -> Dropping {
        Dropping { name, resolved: false, database: None, gone: None, in_doubt: false }
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether it is settled which database is meant.
    pub fn is_resolved(&self) -> bool {
        self.resolved
    }

    /// Settles which database is meant: the one that nodes know by the name, if any.
    pub fn resolve(&mut self, database: Option<DatabaseId>) {
        // One that is gone again: those nodes have heard neither of its end nor of another.
        self.database = database.filter(|_| database != self.gone);
        self.resolved = true;
    }

    /// What the next attempt is to drop; `None`: whichever has the name. An error ends the operation.
    pub fn next(&self) -> Result<Option<DatabaseId>, Failure> {
        if self.in_doubt && self.database.is_none() {
            let text = "the last attempt was not answered, and it would hit another database of the name now";
            return Err(Failure::Refused(Refusal::Refused(text.into())));
        }
        Ok(self.database)
    }

    /// An attempt leaves. Returns whether one before it may have had an effect.
    pub fn begin(&mut self) -> bool {
        std::mem::replace(&mut self.in_doubt, true)
    }

    /// The attempt ended so, with an answer; one without an answer stays in doubt. `before` as
    /// [`Dropping::begin`] told.
    pub fn end<T>(&mut self, before: bool, end: Result<T, Failure>) -> Result<(), Failure> {
        let Err(failure) = end else { return Ok(()) };
        let absent = matches!(failure, Failure::Refused(Refusal::UnknownDatabase(_)));
        if absent && before {
            return Ok(());
        }
        self.in_doubt = before || failure.outcome() == Outcome::Unknown;
        if absent && self.database.is_some() {
            // The map that named it was old, and there may be another of the name.
            (self.resolved, self.gone) = (false, self.database);
            return Err(Failure::NotSent(format!("database `{}` is another one by now", self.name)));
        }
        Err(failure)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: Option<DatabaseId> = Some(DatabaseId(5));
    const NEW: Option<DatabaseId> = Some(DatabaseId(7));

    fn absent() -> Result<(), Failure> {
        Err(Failure::Refused(Refusal::UnknownDatabase("app".into())))
    }

    fn resolved(database: Option<DatabaseId>) -> Dropping {
        let mut plan = Dropping::new("app".into());
        assert!(!plan.is_resolved());
        plan.resolve(database);
        plan
    }

    #[test]
    fn an_attempt_in_doubt_is_repeated_for_the_same_database() {
        let mut plan = resolved(OLD);
        assert_eq!(plan.next(), Ok(OLD));
        assert!(!plan.begin());
        // No answer came. The next attempt means the same, and its absence is success.
        assert!(plan.is_resolved());
        assert_eq!(plan.next(), Ok(OLD));
        let before = plan.begin();
        assert_eq!(plan.end(before, absent()), Ok(()));
    }

    #[test]
    fn a_certain_refusal_leaves_no_doubt() {
        let mut plan = resolved(OLD);
        let before = plan.begin();
        let busy = Failure::Refused(Refusal::Unavailable("starting".into()));
        assert_eq!(plan.end::<()>(before, Err(busy.clone())), Err(busy));
        assert!(!plan.begin());
        let unknown = Failure::Refused(Refusal::Unknown("lost".into()));
        assert!(plan.end::<()>(false, Err(unknown)).is_err());
        assert!(plan.begin());
    }

    #[test]
    fn one_that_was_gone_before_gives_way_to_another_of_the_name() {
        let mut plan = resolved(OLD);
        let before = plan.begin();
        assert!(matches!(plan.end(before, absent()), Err(Failure::NotSent(_))), "to be tried again");
        assert!(!plan.is_resolved());
        plan.resolve(NEW);
        assert_eq!(plan.next(), Ok(NEW));
        // No node knows of another: the metadata shard decides by name, and once.
        plan.resolve(OLD);
        assert_eq!(plan.next(), Ok(None));
        let before = plan.begin();
        assert_eq!(plan.end(before, absent()), absent());
    }

    #[test]
    fn without_an_id_no_attempt_follows_one_in_doubt() {
        let mut plan = resolved(None);
        assert_eq!(plan.next(), Ok(None));
        plan.begin();
        assert!(matches!(plan.next(), Err(Failure::Refused(Refusal::Refused(_)))));
    }
}
