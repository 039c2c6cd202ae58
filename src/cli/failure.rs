//! How a command ends: exit codes, and failures with everything a person or a script needs to act.

use std::fmt;
use std::io;
use std::path::Path;

use super::output;
use crate::client::{ClientError, NotApplied, Unknown};
use crate::refusal::{Outcome, Refusal};

/// How the process ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exit {
    /// Done as asked.
    Done,
    /// A negative answer: absent, mismatch, refused, a test failed.
    Negative,
    /// The command line or a configuration is wrong; nothing was done.
    Usage,
    /// No answer in time; certainly not applied.
    Unavailable,
    /// It may have been applied.
    Unknown,
    /// A thread of the node failed.
    Internal,
    /// The second Ctrl-C.
    Interrupted,
}

impl Exit {
    /// The number the shell sees.
    pub fn code(self) -> u8 {
        match self {
            Exit::Done => 0,
            Exit::Negative => 1,
            Exit::Usage => 2,
            Exit::Unavailable => 3,
            Exit::Unknown => 4,
            Exit::Internal => 70,
            Exit::Interrupted => 130,
        }
    }
}

/// Why a command didn't do what it was asked to. The message names the thing, the cause and the way out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Failure {
    /// How the process ends.
    pub exit: Exit,
    /// A word for scripts; stable.
    pub code: &'static str,
    /// For people.
    pub message: String,
    /// Whether the same command may succeed later.
    pub retryable: bool,
    /// Whether anything may have been changed.
    pub outcome: Outcome,
}

impl Failure {
    /// A negative answer.
    pub fn negative(code: &'static str, message: impl Into<String>) -> Failure {
        Failure::new(Exit::Negative, code, message)
    }

    /// A mistake in the command line or a configuration.
    pub fn usage(code: &'static str, message: impl Into<String>) -> Failure {
        Failure::new(Exit::Usage, code, message)
    }

    /// Nothing answered in time, and nothing was changed.
    pub fn unavailable(message: impl Into<String>) -> Failure {
        Failure { retryable: true, ..Failure::new(Exit::Unavailable, "unavailable", message) }
    }

    /// It may have been done, or may yet be.
    pub fn unknown(message: impl Into<String>) -> Failure {
        Failure { outcome: Outcome::Unknown, ..Failure::new(Exit::Unknown, "outcome_unknown", message) }
    }

    /// This failure, of what followed on a change that was made, said as `done`: nobody may be told that nothing
    /// was changed. A refusal stays one; without an answer the end is unknown.
    pub fn after(self, done: &str) -> Failure {
        let message = match self.message.is_empty() {
            // Nobody is there to be told.
            true => return self,
            false => format!("{done}; {}", self.message),
        };
        let unanswered = self.exit == Exit::Unavailable;
        Failure {
            exit: if unanswered { Exit::Unknown } else { self.exit },
            code: if unanswered { "outcome_unknown" } else { self.code },
            message,
            retryable: self.retryable,
            outcome: Outcome::Unknown,
        }
    }

    /// A thread of a node failed.
    pub fn internal(message: impl Into<String>) -> Failure {
        Failure::new(Exit::Internal, "internal", message)
    }

    /// A file or directory that the command needs can't be used.
    pub fn io(action: &str, path: &Path, error: io::Error) -> Failure {
        Failure::usage("io", format!("{action} {}: {error}", path.display()))
    }

    /// The reader of stdout went away: the command ends quietly, for nobody is there to be told.
    pub fn pipe_closed() -> Failure {
        Failure::new(Exit::Done, "pipe_closed", "")
    }

    fn new(exit: Exit, code: &'static str, message: impl Into<String>) -> Failure {
        Failure { exit, code, message: message.into(), retryable: false, outcome: Outcome::NotApplied }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Failure {
        let message = error.to_string();
        match error {
            ClientError::Unknown(why) => Failure {
                code: match why {
                    Unknown::NoAnswer(_) => "outcome_unknown",
                    Unknown::SessionExpired => "session_expired",
                },
                ..Failure::unknown(format!("{message}; read the key to find out"))
            },
            ClientError::Invalid(_) => Failure::usage("invalid", message),
            ClientError::NotApplied(why) => match why {
                NotApplied::UnknownDatabase(_) => Failure::negative("unknown_database", why.to_string()),
                NotApplied::Refused(refusal) if !refusal.retryable() => match refusal {
                    Refusal::Deadline => Failure::unavailable(refusal.to_string()),
                    Refusal::ShardQuarantined(_) => Failure {
                        code: "quarantined",
                        retryable: false,
                        ..Failure::unavailable(format!(
                            "{refusal}. Nothing was changed. `pontoon status` says which nodes hold them; restart \
                             those to try again"
                        ))
                    },
                    Refusal::Changed { .. } => Failure::negative("changed", refusal.to_string()),
                    Refusal::Behind { .. } => {
                        Failure { retryable: true, ..Failure::negative("behind", refusal.to_string()) }
                    }
                    _ => Failure::negative("refused", refusal.to_string()),
                },
                // Still refused for a passing reason when the time was over.
                NotApplied::Refused(refusal) => Failure::unavailable(format!(
                    "not applied: {refusal}; try again, or allow more time with --timeout"
                )),
                NotApplied::Unavailable { within, last } => Failure::unavailable(format!(
                    "no answer within {}: {last}; nothing was changed. See `pontoon status`, or allow more time \
                     with --timeout",
                    output::seconds(within)
                )),
                NotApplied::Closed => Failure::unavailable(message),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::ids::{NodeId, ShardId};

    #[test]
    fn what_was_done_is_never_told_as_not_applied() {
        for (failure, exit, code) in [
            (Failure::unavailable("no answer"), 4, "outcome_unknown"),
            (Failure::unknown("lost"), 4, "outcome_unknown"),
            (Failure::negative("stuck", "nobody can take it"), 1, "stuck"),
        ] {
            let after = failure.clone().after("node 1 drains");
            assert_eq!((after.exit.code(), after.code, after.outcome), (exit, code, Outcome::Unknown));
            assert_eq!(after.message, format!("node 1 drains; {failure}"));
            assert_eq!(after.retryable, failure.retryable);
        }
        assert_eq!(Failure::pipe_closed().after("node 1 drains"), Failure::pipe_closed());
    }

    #[test]
    fn each_client_error_has_its_exit_code() {
        let refused = |refusal| ClientError::NotApplied(NotApplied::Refused(refusal));
        let busy = Refusal::Busy { what: "queue".into(), retry_after_ms: 10 };
        for (error, exit, code) in [
            (ClientError::Unknown("lost".into()), 4, "outcome_unknown"),
            (ClientError::Unknown(Unknown::SessionExpired), 4, "session_expired"),
            (ClientError::Invalid("empty key".into()), 2, "invalid"),
            (ClientError::NotApplied(NotApplied::UnknownDatabase("x".into())), 1, "unknown_database"),
            (refused(Refusal::Invalid("no".into())), 1, "refused"),
            (refused(Refusal::Changed { what: "node 3".into(), version: 9 }), 1, "changed"),
            (refused(Refusal::Behind { shard: ShardId(1), node: NodeId(2), entries: 9 }), 1, "behind"),
            (refused(Refusal::Deadline), 3, "unavailable"),
            (refused(Refusal::ShardQuarantined("poison".into())), 3, "quarantined"),
            (refused(busy), 3, "unavailable"),
            (
                ClientError::NotApplied(NotApplied::Unavailable {
                    within: Duration::from_secs(1),
                    last: "refused".into(),
                }),
                3,
                "unavailable",
            ),
        ] {
            let failure = Failure::from(error.clone());
            assert_eq!(failure.exit.code(), exit, "{error:?}");
            assert_eq!(failure.code, code, "{error:?}");
            assert_eq!(failure.outcome == Outcome::Unknown, exit == 4, "{error:?}");
            assert!(!failure.message.is_empty());
        }
    }
}
