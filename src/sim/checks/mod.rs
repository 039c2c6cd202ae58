//! What must hold at all times, and at the end.
//!
//! - [`leaders`]: one leader per term, and it has everything committed before.
//! - [`logs`]: entries with the same index and term are the same, and so are those before them.
//! - [`state`]: all replicas apply the same entries, and come to the state that a plain map comes to.
//! - [`durable`]: what was acknowledged is among the committed entries.
//! - [`once`]: a command takes effect once at most, and exactly once if its client was told so.
//! - [`linear`]: the history of each key is linearizable.

pub mod durable;
pub mod leaders;
pub mod linear;
pub mod logs;
pub mod once;
pub mod state;

/// Something that must never happen has happened.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Violation {
    /// Which check saw it.
    pub check: &'static str,
    /// What it saw.
    pub detail: String,
}

impl Violation {
    /// Seen by `check`.
    pub fn new(check: &'static str, detail: impl Into<String>) -> Violation {
        Violation { check, detail: detail.into() }
    }
}
