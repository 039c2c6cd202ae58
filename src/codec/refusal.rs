//! Refusals and the wire's `Error`.
//!
//! The fixed fields of an `Error` (applied, retryable, retryAfterMs, message) decide what a caller may
//! conclude; its union only adds detail. So reading takes the union's member where it is known and
//! agrees with the fixed fields, and falls back on [`Refusal::Other`] otherwise. It never fails: an
//! answer that says "no" in an unreadable way is still a "no".

use std::borrow::Cow;

use super::CodecError;
use super::records::read_text;
use crate::ids::{NodeId, ShardId};
use crate::refusal::{BUSY, DISK_FULL, Outcome, QUARANTINED, Refusal, SHARD_QUARANTINED, UNKNOWN};
use crate::schema::types_capnp::{Applied, error};

/// Writes a refusal.
pub fn write_refusal(refusal: &Refusal, mut to: error::Builder<'_>) {
    to.set_applied(match refusal.outcome() {
        Outcome::NotApplied => Applied::No,
        Outcome::Unknown => Applied::Unknown,
    });
    to.set_retryable(refusal.retryable());
    to.set_retry_after_ms(refusal.retry_after_ms());
    to.set_message(refusal.to_string().as_str());
    match refusal {
        Refusal::NotLeader { shard, leader } => {
            let mut not_leader = to.init_not_leader();
            not_leader.set_shard(shard.0);
            not_leader.set_leader_node(leader.map_or(0, |node| node.0));
        }
        Refusal::StaleRoute { shard, asked, range_version } => {
            let mut stale = to.init_stale_route();
            stale.set_shard(shard.0);
            stale.set_asked(*asked);
            stale.set_range_version(*range_version);
        }
        Refusal::Busy { .. } => to.set_busy(()),
        Refusal::Behind { shard, node, entries } => {
            let mut behind = to.init_behind();
            behind.set_shard(shard.0);
            behind.set_node(node.0);
            behind.set_entries(*entries);
        }
        Refusal::Invalid(_) => to.set_invalid(()),
        Refusal::Superseded => to.set_superseded(()),
        Refusal::Unknown(_) => to.set_unknown_outcome(()),
        Refusal::Unavailable(_) => to.set_unavailable(()),
        Refusal::Quarantined(_) | Refusal::ShardQuarantined(_) => to.set_quarantined(()),
        Refusal::Deadline => to.set_deadline(()),
        Refusal::UnknownDatabase(name) => to.set_unknown_database(name.as_str()),
        Refusal::Refused(_) => to.set_refused(()),
        Refusal::Changed { what, version } => {
            let mut changed = to.init_changed();
            changed.set_what(what.as_str());
            changed.set_version(*version);
        }
        Refusal::SessionExpired => to.set_session_expired(()),
        Refusal::StaleCommand => to.set_stale_command(()),
        Refusal::DiskFull(_) => to.set_disk_full(()),
        Refusal::Other { .. } => to.set_other(()),
    }
}

/// Reads a refusal, its words included.
pub fn read_refusal(from: error::Reader<'_>) -> Refusal {
    let outcome = match from.get_applied() {
        Ok(Applied::No) => Outcome::NotApplied,
        // An outcome that this version can't name is not one to build on.
        Ok(Applied::Unknown) | Err(_) => Outcome::Unknown,
    };
    let message = match from.get_message().map_err(CodecError::from) {
        Ok(text) => read_text(text).unwrap_or_else(|_| "(unreadable message)".into()),
        Err(_) => "(unreadable message)".into(),
    };
    match read_member(from, &message) {
        Some(refusal) if refusal.outcome() == outcome && refusal.retryable() == from.get_retryable() => {
            refusal
        }
        _ => Refusal::Other {
            outcome,
            retryable: from.get_retryable(),
            retry_after_ms: from.get_retry_after_ms(),
            message,
        },
    }
}

/// The refusal that the union alone stands for, if this version knows its member.
fn read_member(from: error::Reader<'_>, message: &str) -> Option<Refusal> {
    Some(match from.which().ok()? {
        error::NotLeader(not_leader) => {
            let leader = not_leader.get_leader_node();
            Refusal::NotLeader {
                shard: ShardId(not_leader.get_shard()),
                leader: (leader != 0).then_some(NodeId(leader)),
            }
        }
        error::StaleRoute(stale) => Refusal::StaleRoute {
            shard: ShardId(stale.get_shard()),
            asked: stale.get_asked(),
            range_version: stale.get_range_version(),
        },
        error::Busy(()) => {
            Refusal::Busy { what: inner(message, BUSY), retry_after_ms: from.get_retry_after_ms() }
        }
        error::Behind(behind) => Refusal::Behind {
            shard: ShardId(behind.get_shard()),
            node: NodeId(behind.get_node()),
            entries: behind.get_entries(),
        },
        error::UnknownDatabase(name) => Refusal::UnknownDatabase(read_text(name.ok()?).ok()?),
        error::Invalid(()) => Refusal::Invalid(message.to_owned()),
        error::UnknownOutcome(()) => Refusal::Unknown(inner(message, UNKNOWN)),
        error::Superseded(()) => Refusal::Superseded,
        error::Unavailable(()) => Refusal::Unavailable(inner(message, "")),
        // One replica, or the whole shard: then nobody need be asked again.
        error::Quarantined(()) if from.get_retryable() => {
            Refusal::Quarantined(inner(message, QUARANTINED).into_owned())
        }
        error::Quarantined(()) => Refusal::ShardQuarantined(inner(message, SHARD_QUARANTINED).into_owned()),
        error::Refused(()) => Refusal::Refused(message.to_owned()),
        error::Changed(changed) => Refusal::Changed {
            what: read_text(changed.get_what().ok()?).ok()?,
            version: changed.get_version(),
        },
        error::Deadline(()) => Refusal::Deadline,
        error::SessionExpired(()) => Refusal::SessionExpired,
        error::StaleCommand(()) => Refusal::StaleCommand,
        error::DiskFull(()) => Refusal::DiskFull(inner(message, DISK_FULL)),
        error::Other(()) => return None,
    })
}

/// What a message says beyond the words that every refusal of its kind begins with.
fn inner(message: &str, prefix: &str) -> Cow<'static, str> {
    message.strip_prefix(prefix).unwrap_or(message).to_owned().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_refusal() -> impl Strategy<Value = Refusal> {
        let reason = ".{0,40}".prop_map(Cow::from);
        let outcome = prop_oneof![Just(Outcome::NotApplied), Just(Outcome::Unknown)];
        prop_oneof![
            (any::<u64>(), any::<u64>()).prop_map(|(shard, node)| Refusal::NotLeader {
                shard: ShardId(shard),
                leader: (node % 2 == 1).then_some(NodeId(node)),
            }),
            any::<[u64; 3]>().prop_map(|[shard, asked, range_version]| Refusal::StaleRoute {
                shard: ShardId(shard),
                asked,
                range_version,
            }),
            any::<[u64; 3]>().prop_map(|[shard, node, entries]| Refusal::Behind {
                shard: ShardId(shard),
                node: NodeId(node),
                entries,
            }),
            (reason.clone(), any::<u32>())
                .prop_map(|(what, retry_after_ms)| Refusal::Busy { what, retry_after_ms }),
            ".{0,40}".prop_map(Refusal::Invalid),
            Just(Refusal::Superseded),
            reason.clone().prop_map(Refusal::Unknown),
            reason.clone().prop_map(Refusal::Unavailable),
            reason.prop_map(Refusal::DiskFull),
            ".{0,40}".prop_map(Refusal::Quarantined),
            ".{0,40}".prop_map(Refusal::ShardQuarantined),
            Just(Refusal::Deadline),
            Just(Refusal::SessionExpired),
            Just(Refusal::StaleCommand),
            ".{0,40}".prop_map(Refusal::UnknownDatabase),
            ".{0,40}".prop_map(Refusal::Refused),
            (".{0,40}", any::<u64>()).prop_map(|(what, version)| Refusal::Changed { what, version }),
            (outcome, any::<bool>(), any::<u32>(), ".{0,40}").prop_map(
                |(outcome, retryable, retry_after_ms, message)| Refusal::Other {
                    outcome,
                    retryable,
                    retry_after_ms,
                    message,
                }
            ),
        ]
    }

    fn read_back(write: impl FnOnce(error::Builder<'_>)) -> Refusal {
        let mut message = capnp::message::Builder::new_default();
        write(message.init_root());
        read_refusal(message.get_root_as_reader().unwrap())
    }

    #[test]
    fn the_fixed_fields_win_over_the_union() {
        let read = read_back(|mut to| {
            to.set_applied(Applied::Unknown);
            to.set_retryable(true);
            to.set_retry_after_ms(7);
            to.set_message("lost in a new way");
            to.set_superseded(());
        });
        let fallback = Refusal::Other {
            outcome: Outcome::Unknown,
            retryable: true,
            retry_after_ms: 7,
            message: "lost in a new way".into(),
        };
        assert_eq!(read, fallback);
    }

    proptest! {
        #[test]
        fn refusals_survive_the_wire(refusal in any_refusal()) {
            let read = read_back(|to| write_refusal(&refusal, to));
            prop_assert_eq!(&read, &refusal);
            prop_assert_eq!(read.to_string(), refusal.to_string());
        }
    }
}
