//! Sessions: what makes a command that a client sends again take effect once.
//!
//! A client draws a [`SessionId`] and numbers its commands within it. The shard remembers per session
//! what each command came to, in its [`SessionTable`](crate::storage::sessions::SessionTable); a command
//! that arrives a second time, by whatever way, gets that answer again. Results are kept until the client
//! says that it has them, sessions until they weren't used for their lifetime. That is counted in the
//! shard's own time, which the stamps of entries carry: no clock is read here.
//!
//! For each command with a [`SessionTag`], in this order:
//!
//! 1. The session is unknown: if the command opens it, there it is, unless the table is full
//!    ([`SessionReply::TableFull`]); else [`SessionReply::Expired`].
//! 2. The session is used now; results below `acked_below` are forgotten.
//! 3. The sequence is below: [`SessionReply::Stale`].
//! 4. There is a result: it is the reply, without a second effect.
//! 5. There are too many results: [`SessionReply::WindowFull`] or [`SessionReply::TableFull`].
//! 6. The command is applied, and what it came to is remembered.
//!
//! *A command that changed nothing* is remembered too, though not what it saw (a value may be great). If it
//! comes again it is tried against the present: that its condition fails now is as good an answer as the
//! first. But should it hold now, the command must not be applied, since the client may have been told,
//! by an answer to another attempt, that it failed. Then nothing true is left to say but
//! [`SessionReply::Stale`].
//!
//! *What this can't tell*: whether a command that opens a session is new, or comes so late that its session
//! has ended since. A client must see to it that nothing it has sent arrives after the session's
//! lifetime.

use super::command::{Command, KvCommand, KvReply, Reply};
use super::{ApplyError, MachineKind, kv};
use crate::ids::SessionId;
use crate::limits;
use crate::refusal::Refusal;
use crate::storage::StateBatch;
use crate::storage::sessions::SessionResult;

// These four decide what applying an entry comes to. All replicas must have the same: to change one
// takes a new feature level of the cluster, as a new command does.

/// Most sessions of a shard.
pub const SESSIONS_MAX: usize = 16 * 1024;
/// Most results of one session that its client has not acknowledged.
pub const RESULTS_MAX: usize = 16 * 1024;
/// Most results of all sessions of a shard.
pub const SHARD_RESULTS_MAX: usize = 1024 * 1024;
/// Bounds of a session's lifetime in milliseconds; others are moved to the nearest.
pub const LIFETIME_MS: std::ops::RangeInclusive<u32> = 10_000..=6_000_000;

const _: () = assert!(*LIFETIME_MS.end() as u64 >= 10 * limits::TIMEOUT_MAX_MS);

/// What a client says of a command so that sending it again is harmless.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SessionTag {
    /// The client's session.
    pub session: SessionId,
    /// The command's number in it, from 1. No two commands of a session have the same.
    pub sequence: u64,
    /// The client has the results of all commands with a smaller number, or has given them up, and
    /// won't ask for them again: the shard may forget them.
    pub acked_below: u64,
    /// Open the session first if the shard doesn't have it, with this lifetime in milliseconds.
    pub open: Option<u32>,
}

/// Why the session table didn't let a command through. Nothing of it took effect this time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SessionReply {
    /// The shard doesn't have the session, and the command doesn't open it.
    Expired,
    /// The command's result is forgotten: because the client has said that it won't ask for it any more,
    /// or because the command changed nothing, and would now.
    Stale,
    /// The session has as many results as may be kept for it.
    WindowFull,
    /// The shard has as many sessions, or results of all of them, as it may have.
    TableFull,
}

impl From<SessionReply> for Refusal {
    fn from(reply: SessionReply) -> Refusal {
        let busy =
            |what: &'static str| Refusal::Busy { what: what.into(), retry_after_ms: limits::BUSY_RETRY_MS };
        match reply {
            SessionReply::Expired => Refusal::SessionExpired,
            SessionReply::Stale => Refusal::StaleCommand,
            SessionReply::WindowFull => busy("results that the session has not acknowledged"),
            SessionReply::TableFull => busy("sessions of the shard"),
        }
    }
}

/// Applies a command of a session, see the module page. The entry's stamp has been taken in before.
pub(super) fn apply(
    machine: MachineKind,
    command: &Command,
    tag: &SessionTag,
    state: &mut dyn StateBatch,
) -> Result<Reply, ApplyError> {
    match admit(tag, state) {
        Admitted::New => {
            let reply = machine.apply(command, state)?;
            let result = match &reply {
                Reply::Kv(KvReply::Written(revision)) => SessionResult::Written(*revision),
                Reply::Kv(KvReply::Deleted(revision)) => SessionResult::Deleted(*revision),
                _ => SessionResult::Unchanged,
            };
            state.sessions().remember(tag.session, tag.sequence, result);
            Ok(reply)
        }
        Admitted::Again(SessionResult::Written(revision)) => Ok(Reply::Kv(KvReply::Written(revision))),
        Admitted::Again(SessionResult::Deleted(revision)) => Ok(Reply::Kv(KvReply::Deleted(revision))),
        Admitted::Again(SessionResult::Unchanged) => again_unchanged(command, state),
        Admitted::Not(reply) => Ok(Reply::Session(reply)),
    }
}

enum Admitted {
    New,
    Again(SessionResult),
    Not(SessionReply),
}

fn admit(tag: &SessionTag, state: &mut dyn StateBatch) -> Admitted {
    let table = state.sessions();
    if let Some(lifetime_ms) = tag.open {
        if table.len() >= SESSIONS_MAX && table.get(tag.session).is_none() {
            return Admitted::Not(SessionReply::TableFull);
        }
        table.open(tag.session, lifetime_ms.clamp(*LIFETIME_MS.start(), *LIFETIME_MS.end()));
    }
    let Some(session) = table.touch(tag.session, tag.acked_below) else {
        return Admitted::Not(SessionReply::Expired);
    };
    if tag.sequence < session.acked_below() {
        return Admitted::Not(SessionReply::Stale);
    }
    if let Some(result) = session.find(tag.sequence) {
        return Admitted::Again(result);
    }
    if session.results() >= RESULTS_MAX {
        return Admitted::Not(SessionReply::WindowFull);
    }
    if table.results() >= SHARD_RESULTS_MAX {
        return Admitted::Not(SessionReply::TableFull);
    }
    Admitted::New
}

/// What to say to a command that changed nothing when it came first.
fn again_unchanged(command: &Command, state: &dyn StateBatch) -> Result<Reply, ApplyError> {
    match command {
        // That there was nothing to delete is all there is to say of it.
        Command::Kv(KvCommand::Delete { .. }) => Ok(Reply::Kv(KvReply::Absent)),
        Command::Kv(KvCommand::Cas { key, expect, .. }) => {
            let found = kv::get(key, state)?;
            if kv::holds(expect, found.as_ref()) {
                Ok(Reply::Session(SessionReply::Stale))
            } else {
                Ok(Reply::Kv(KvReply::Mismatch(found)))
            }
        }
        // Another command than the first time under this sequence: the client breaks the rules.
        Command::Kv(KvCommand::Put { .. }) | Command::Meta(_) => Ok(Reply::Session(SessionReply::Stale)),
    }
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
