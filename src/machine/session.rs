//! Sessions: what makes a command that a client sends again take effect once.
//!
//! A client draws a [`SessionId`] and numbers its commands within it. The shard remembers per session
//! what each command came to; a command that arrives a second time gets that answer again.

use crate::ids::SessionId;
use crate::limits;
use crate::refusal::Refusal;

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
    /// The client has said that it won't ask for this command any more; its result is forgotten.
    Stale,
    /// The session has as many results as may be kept for it.
    WindowFull,
    /// The shard has as many sessions as it may have.
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
