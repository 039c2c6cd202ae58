//! What must hold at all times, and at the end.
//!
//! - [`leaders`]: one leader per term, and it has everything committed before.
//! - [`logs`]: entries with the same index and term are the same, and so are those before them.
//! - [`state`]: all replicas apply the same entries, and come to the state that a plain map comes to.
//! - [`durable`]: what was acknowledged is among the committed entries.
//! - [`once`]: a command takes effect once at most, and exactly once if its client was told so.
//! - [`linear`]: the history of each key is linearizable.
//! - [`members`]: who belongs to a shard, and that a majority of those holds what is committed.

pub mod durable;
pub mod leaders;
pub mod linear;
pub mod logs;
pub mod members;
pub mod once;
pub mod state;

/// Every check, by the name that a violation of it bears, and what must hold.
pub const CHECKS: [(&str, &str); 19] = [
    ("leaders", "a term has one leader at most, and it has everything committed before"),
    ("logs", "entries of one index and term are the same, and so are those before them"),
    ("state", "replicas apply the same entries and have equal states at equal indexes, sessions included"),
    ("durable", "acknowledged writes are committed; nothing else is read; versions follow real time"),
    ("once", "a command takes effect once at most, and as its client was told"),
    ("linear", "the history of each key is linearizable, operations of unknown outcome included"),
    (
        "quorum",
        "what is applied is on disk at a majority of the voters, of both configurations in a joint change",
    ),
    (
        "members",
        "members change as the log says, alike everywhere; no replica comes back; in the end all is in place",
    ),
    ("map", "the map keeps its rules, and names members that the shards had at that conf version"),
    ("answers", "each operation ends once, with an answer to what was asked"),
    ("liveness", "once faults end, all is led, answered and equal again within a bound"),
    (
        "sleep",
        "a leader falls asleep only if a majority has agreed to it, each of whom has all that is in its log, and all others are on nodes that it doesn't hear",
    ),
    ("flapping", "a node whose links flap, and nothing else, costs each shard one election at most"),
    ("open", "a replica can be opened from what a crash leaves"),
    ("replica", "no replica stops but for its disk"),
    ("disk", "the log is asked for nothing that contradicts it"),
    ("messages", "messages fit their bounds"),
    ("snapshots", "a snapshot is asked only of what its leader has applied"),
    ("panic", "the core doesn't panic"),
];

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
        debug_assert!(CHECKS.iter().any(|(name, _)| *name == check), "{check} is not among the checks");
        Violation { check, detail: detail.into() }
    }
}
