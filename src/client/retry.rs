//! What a failed attempt means for an operation: try again, and when, or give up, and with which
//! error. Sans-I/O: the time left and a random number come from outside.
//!
//! | the attempt | read | command with a tag | repeatable change | tried once |
//! |---|---|---|---|---|
//! | certainly not applied, may work later | again | again | again | again |
//! | outcome unknown | again | again, under the same tag | again: at least once | fails as unknown |
//! | the shard doesn't have its session | – | again under a new one, unless an earlier attempt's outcome is unknown: then it fails so | – | – |
//! | forgotten by its session | – | again under a new tag: it had no effect | – | – |
//! | certainly not applied, never will | fails | fails | fails | fails |
//! | no time left | not applied | unknown if any attempt was | unknown if any attempt was | not applied |
//!
//! *Forgotten* (`StaleCommand`) is a command that its client acknowledged, or one that changed nothing when
//! it came first and would now. This library acknowledges no command under way, so to it only the second
//! can be said; and that settles what became of all attempts under this tag, now and later.
//!
//! A write that fails for good after an earlier attempt with unknown outcome is reported as unknown:
//! that earlier attempt may have been applied. Repeatable changes are those of the cluster: a database
//! that is created twice exists once.

use std::time::Duration;

use super::{ClientError, NotApplied, Unknown};
use crate::limits::{RETRY_MS_MAX, RETRY_MS_MIN};
use crate::refusal::{Outcome, Refusal};

/// An attempt isn't begun with less time than this: one that the deadline cuts short would turn a
/// certain "not applied" into an "unknown".
const ATTEMPT_MIN: Duration = Duration::from_millis(25);

/// What may be repeated.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Has no effect: repeat at will.
    Read,
    /// A command with the tag of a session: repeat it under the same tag, and under another one only
    /// if no attempt may have had an effect.
    ExactlyOnce,
    /// A change that does no more when it is made twice.
    Repeatable,
    /// A write that must not be repeated after an unknown outcome.
    Once,
}

/// How an attempt failed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Failure {
    /// A node answered so.
    Refused(Refusal),
    /// It was never sent: no connection, no route.
    NotSent(String),
    /// It was sent, and no answer came or none that can be read.
    Lost(String),
}

impl Failure {
    /// Whether the attempt may have had an effect.
    pub fn outcome(&self) -> Outcome {
        match self {
            Failure::Refused(refusal) => refusal.outcome(),
            Failure::NotSent(_) => Outcome::NotApplied,
            Failure::Lost(_) => Outcome::Unknown,
        }
    }

    /// Whether another attempt may succeed. The node's own deadline is that of one attempt, so a
    /// further one is worth the time that is left.
    fn retryable(&self) -> bool {
        match self {
            Failure::Refused(Refusal::Deadline) => true,
            Failure::Refused(refusal) => refusal.retryable(),
            Failure::NotSent(_) | Failure::Lost(_) => true,
        }
    }

    /// Whether the answer tells where to go instead, so that going there at once makes sense.
    fn redirects(&self) -> bool {
        matches!(
            self,
            Failure::Refused(Refusal::NotLeader { leader: Some(_), .. } | Refusal::StaleRoute { .. })
        )
    }

    /// Whether it tells of the node that was asked, rather than of the operation.
    pub fn is_of_the_node(&self) -> bool {
        match self {
            Failure::Refused(refusal) => matches!(
                refusal,
                Refusal::NotLeader { .. }
                    | Refusal::Unavailable(_)
                    | Refusal::Quarantined(_)
                    | Refusal::Unknown(_)
            ),
            Failure::NotSent(_) | Failure::Lost(_) => true,
        }
    }

    /// For a person.
    pub fn text(&self) -> String {
        match self {
            Failure::Refused(refusal) => refusal.to_string(),
            Failure::NotSent(text) | Failure::Lost(text) => text.clone(),
        }
    }
}

/// The attempts of one operation so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Attempts {
    /// How many failed.
    pub failed: u32,
    /// Whether one of them may have had an effect.
    pub unknown: bool,
}

/// What to do after a failed attempt.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Decision {
    /// Try again after this time, which is less than the time left.
    Retry(Duration),
    /// The same, under another tag.
    Renew(Duration),
    /// Give up.
    Fail(ClientError),
}

/// Notes a failed attempt in `attempts` and says what to do. `left` is the time to the deadline,
/// `within` the whole time that was given, `entropy` a random number for the jitter.
pub fn decide(
    kind: Kind,
    attempts: &mut Attempts,
    failure: Failure,
    left: Duration,
    within: Duration,
    entropy: u64,
) -> Decision {
    attempts.failed = attempts.failed.saturating_add(1);
    let tagged = kind == Kind::ExactlyOnce;
    let expired = tagged && failure == Failure::Refused(Refusal::SessionExpired);
    let settled = tagged && failure == Failure::Refused(Refusal::StaleCommand);
    // Either is said instead of applying the command: of this attempt it is certain.
    let renew = expired || settled;
    let unknown = kind != Kind::Read && !renew && failure.outcome() == Outcome::Unknown;
    attempts.unknown = (attempts.unknown || unknown) && !settled;
    let hopeless = match renew {
        // Under a new session the command would be a new one.
        true => attempts.unknown,
        false => (unknown && kind == Kind::Once) || !failure.retryable(),
    };
    if hopeless || left <= ATTEMPT_MIN {
        return Decision::Fail(give_up(attempts.unknown, failure, within));
    }
    // Whatever the delay, leave time for one more attempt.
    let after = delay(attempts.failed, &failure, entropy).min(left * 3 / 4);
    if renew { Decision::Renew(after) } else { Decision::Retry(after) }
}

/// The error of an operation that is given up after `failure`.
pub fn give_up(unknown: bool, failure: Failure, within: Duration) -> ClientError {
    if unknown {
        return ClientError::Unknown(match failure {
            Failure::Refused(Refusal::SessionExpired) => Unknown::SessionExpired,
            failure => Unknown::NoAnswer(failure.text()),
        });
    }
    match failure {
        Failure::Refused(Refusal::Invalid(text)) => ClientError::Invalid(text),
        Failure::Refused(Refusal::UnknownDatabase(name)) => {
            ClientError::NotApplied(NotApplied::UnknownDatabase(name))
        }
        // What more time would have helped is not a "no".
        Failure::Refused(refusal)
            if !refusal.retryable()
                && !matches!(
                    refusal,
                    Refusal::Deadline | Refusal::SessionExpired | Refusal::StaleCommand
                ) =>
        {
            ClientError::NotApplied(NotApplied::Refused(refusal))
        }
        failure => ClientError::NotApplied(NotApplied::Unavailable { within, last: failure.text() }),
    }
}

/// Time before the next attempt: none for the first two redirects (one from a stale cache, one from a
/// node that learned of a new leader late), else exponential with jitter, and never less than a busy
/// node asks for.
fn delay(failed: u32, failure: &Failure, entropy: u64) -> Duration {
    if failure.redirects() && failed <= 2 {
        return Duration::ZERO;
    }
    let ceiling = RETRY_MS_MIN.saturating_mul(1 << failed.min(16)).min(RETRY_MS_MAX);
    // Between half the ceiling and the ceiling, in microseconds.
    let half = ceiling * 500;
    let backoff = Duration::from_micros(half + entropy % (half + 1));
    let asked = match failure {
        Failure::Refused(refusal) => {
            Duration::from_millis(u64::from(refusal.retry_after_ms()).min(10 * RETRY_MS_MAX))
        }
        _ => Duration::ZERO,
    };
    backoff.max(asked)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{NodeId, ShardId};
    use proptest::prelude::*;

    const WITHIN: Duration = Duration::from_secs(10);

    fn busy(ms: u32) -> Failure {
        Failure::Refused(Refusal::Busy { what: "pending operations".into(), retry_after_ms: ms })
    }

    fn after(kind: Kind, failure: Failure) -> Decision {
        decide(kind, &mut Attempts::default(), failure, WITHIN, WITHIN, 0)
    }

    #[test]
    fn the_table_on_the_module_page() {
        use Kind::*;
        let lost = || Failure::Lost("gone".into());
        let never = || Failure::Refused(Refusal::Invalid("too long".into()));
        let unknown = Decision::Fail(ClientError::Unknown("gone".into()));
        let invalid = Decision::Fail(ClientError::Invalid("too long".into()));
        let retries = |decision: Decision| matches!(decision, Decision::Retry(_));
        for kind in [Read, ExactlyOnce, Repeatable, Once] {
            for failure in [
                busy(1),
                Failure::NotSent("down".into()),
                Failure::Refused(Refusal::Deadline),
                Failure::Refused(Refusal::Superseded),
                Failure::Refused(Refusal::DiskFull("n1".into())),
                Failure::Refused(Refusal::Quarantined("poison".into())),
            ] {
                assert!(retries(after(kind, failure.clone())), "{kind:?} {failure:?}");
            }
            assert_eq!(after(kind, never()), invalid);
            let quarantined = Refusal::ShardQuarantined("poison".into());
            let failed = ClientError::NotApplied(NotApplied::Refused(quarantined.clone()));
            assert_eq!(after(kind, Failure::Refused(quarantined)), Decision::Fail(failed));
        }
        assert!(retries(after(Read, lost())));
        assert!(retries(after(ExactlyOnce, lost())));
        assert!(retries(after(Repeatable, lost())));
        assert_eq!(after(Once, lost()), unknown);
        let expired = || Failure::Refused(Refusal::SessionExpired);
        assert!(matches!(after(ExactlyOnce, expired()), Decision::Renew(_)));
        let stale = || Failure::Refused(Refusal::StaleCommand);
        assert!(matches!(after(ExactlyOnce, stale()), Decision::Renew(_)));
        for (kind, failure) in [(Once, stale()), (Repeatable, expired()), (Once, expired())] {
            let end = after(kind, failure.clone());
            assert!(matches!(end, Decision::Fail(ClientError::Unknown(_))), "{kind:?} {failure:?}");
        }
        assert_eq!(
            after(Once, Failure::Refused(Refusal::Unknown("gone".into()))),
            Decision::Fail(ClientError::Unknown("the outcome can't be known: gone".into()))
        );
    }

    #[test]
    fn an_unknown_attempt_is_not_forgotten() {
        let mut attempts = Attempts::default();
        let lost = Failure::Lost("gone".into());
        assert!(matches!(
            decide(Kind::Repeatable, &mut attempts, lost, WITHIN, WITHIN, 7),
            Decision::Retry(_)
        ));
        let refused = Failure::Refused(Refusal::UnknownDatabase("db".into()));
        assert!(matches!(
            decide(Kind::Repeatable, &mut attempts, refused, WITHIN, WITHIN, 7),
            Decision::Fail(ClientError::Unknown(_))
        ));
        // A read had no effect whatever happened.
        let mut attempts = Attempts::default();
        decide(Kind::Read, &mut attempts, Failure::Lost("gone".into()), WITHIN, WITHIN, 7);
        let end = decide(Kind::Read, &mut attempts, busy(1), Duration::ZERO, WITHIN, 7);
        assert!(matches!(end, Decision::Fail(ClientError::NotApplied(NotApplied::Unavailable { .. }))));
    }

    #[test]
    fn a_command_changes_its_session_only_while_nothing_can_have_happened() {
        let expired = || Failure::Refused(Refusal::SessionExpired);
        let mut attempts = Attempts::default();
        let mut next = |failure| decide(Kind::ExactlyOnce, &mut attempts, failure, WITHIN, WITHIN, 7);
        assert!(matches!(next(busy(1)), Decision::Retry(_)));
        assert!(matches!(next(expired()), Decision::Renew(_)));
        assert!(matches!(next(expired()), Decision::Renew(_)), "nothing happened meanwhile either");
        assert!(matches!(next(Failure::Lost("gone".into())), Decision::Retry(_)));
        assert_eq!(next(expired()), Decision::Fail(ClientError::Unknown(Unknown::SessionExpired)));
        // That it changed nothing under its tag is known again; then it may have another.
        let mut attempts = Attempts::default();
        let mut next = |failure| decide(Kind::ExactlyOnce, &mut attempts, failure, WITHIN, WITHIN, 7);
        assert!(matches!(next(Failure::Lost("gone".into())), Decision::Retry(_)));
        assert!(matches!(next(Failure::Refused(Refusal::StaleCommand)), Decision::Renew(_)));
        assert!(matches!(next(expired()), Decision::Renew(_)));
        // Too late for a new one: certainly not applied, but no refusal for good.
        let late = decide(Kind::ExactlyOnce, &mut Attempts::default(), expired(), Duration::ZERO, WITHIN, 7);
        assert!(matches!(late, Decision::Fail(ClientError::NotApplied(NotApplied::Unavailable { .. }))));
    }

    #[test]
    fn delays() {
        let redirect = Failure::Refused(Refusal::NotLeader { shard: ShardId(1), leader: Some(NodeId(2)) });
        assert_eq!(delay(1, &redirect, 0), Duration::ZERO);
        assert_eq!(delay(3, &redirect, 0), Duration::from_millis(8));
        assert_eq!(delay(1, &busy(10), 0), Duration::from_millis(10));
        assert_eq!(delay(1, &Failure::NotSent(String::new()), 0), Duration::from_millis(2));
        assert_eq!(
            delay(40, &Failure::NotSent(String::new()), u64::MAX - 1),
            Duration::from_millis(100) + Duration::from_micros((u64::MAX - 1) % 100_001)
        );
    }

    fn any_failure() -> impl Strategy<Value = Failure> {
        prop_oneof![
            any::<u32>().prop_map(busy),
            Just(Failure::NotSent("down".into())),
            Just(Failure::Lost("gone".into())),
            Just(Failure::Refused(Refusal::Unknown("gone".into()))),
            Just(Failure::Refused(Refusal::Superseded)),
            Just(Failure::Refused(Refusal::Deadline)),
            Just(Failure::Refused(Refusal::Invalid("no".into()))),
            Just(Failure::Refused(Refusal::SessionExpired)),
            Just(Failure::Refused(Refusal::StaleCommand)),
            any::<bool>().prop_map(|known| Failure::Refused(Refusal::NotLeader {
                shard: ShardId(1),
                leader: known.then_some(NodeId(1)),
            })),
            (any::<bool>(), any::<bool>(), any::<u32>()).prop_map(|(unknown, retryable, ms)| {
                Failure::Refused(Refusal::Other {
                    outcome: if unknown { Outcome::Unknown } else { Outcome::NotApplied },
                    retryable,
                    retry_after_ms: ms,
                    message: "new".into(),
                })
            }),
        ]
    }

    proptest! {
        /// Attempts that take no time at all, failing in any way until the operation is given up.
        #[test]
        fn ends_in_time_and_tells_the_truth(
            kind in prop::sample::select(vec![
                Kind::Read,
                Kind::ExactlyOnce,
                Kind::Repeatable,
                Kind::Once,
            ]),
            failures in prop::collection::vec((any_failure(), any::<u64>()), 1..8),
            within_ms in 0u64..20_000,
        ) {
            let within = Duration::from_millis(within_ms);
            let (mut spent, mut attempts, mut may_have_happened) =
                (Duration::ZERO, Attempts::default(), false);
            let mut rounds = 0;
            for (failure, entropy) in failures.iter().cycle() {
                rounds += 1;
                prop_assert!(rounds < 50_000, "it never ends");
                prop_assert!(!(kind == Kind::Once && may_have_happened), "repeated after an unknown outcome");
                // These two tell a tagged command that this attempt had no effect, or none ever had.
                let tagged = kind == Kind::ExactlyOnce;
                let expired = tagged && *failure == Failure::Refused(Refusal::SessionExpired);
                let settled = tagged && *failure == Failure::Refused(Refusal::StaleCommand);
                may_have_happened |= failure.outcome() == Outcome::Unknown && !expired;
                may_have_happened &= !settled;
                match decide(kind, &mut attempts, failure.clone(), within - spent, within, *entropy) {
                    Decision::Renew(after) => {
                        prop_assert!(expired || settled);
                        prop_assert!(!may_have_happened, "re-sent under another tag");
                        prop_assert!(spent + after < within);
                        spent += after;
                    }
                    Decision::Retry(after) => {
                        prop_assert!(!expired && !settled, "under a tag that leads nowhere");
                        prop_assert!(spent + after < within);
                        spent += after;
                    }
                    Decision::Fail(error) => {
                        let unknown = matches!(error, ClientError::Unknown(_));
                        prop_assert_eq!(unknown, may_have_happened && kind != Kind::Read);
                        return Ok(());
                    }
                }
            }
        }
    }
}
