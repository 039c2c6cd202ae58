//! Why an operation got no result: one vocabulary from the replica to the client's caller. Each
//! refusal says whether the operation may have had an effect, and whether to try again.

use std::borrow::Cow;

use crate::ids::{NodeId, ShardId};
use crate::limits::DISK_FULL_RETRY_MS;

/// Whether a failed operation may have had an effect.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// Certainly no effect, now or later.
    NotApplied,
    /// It may have taken effect, or may yet.
    Unknown,
}

/// Why an operation got no output.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Refusal {
    /// This replica doesn't lead its shard.
    #[error("this replica of shard {shard} is not its leader")]
    NotLeader {
        /// The shard.
        shard: ShardId,
        /// Node of the leader, as far as known.
        leader: Option<NodeId>,
    },
    /// The request was routed by an old map, or to a node without this shard.
    #[error("shard {shard} is not here under range version {asked}; it is at version {range_version}")]
    StaleRoute {
        /// The shard.
        shard: ShardId,
        /// Version in the request.
        asked: u64,
        /// Version in force here; 0 if the shard isn't here.
        range_version: u64,
    },
    /// A bounded queue is full.
    #[error("{BUSY}{what}")]
    Busy {
        /// Which bound was met.
        what: Cow<'static, str>,
        /// When to come back, in milliseconds.
        retry_after_ms: u32,
    },
    /// The replica that is to lead lacks so much of the log that it can't yet. Nobody else leads meanwhile.
    #[error(
        "node {node} can't lead shard {shard} yet: it lacks {entries} entries of its log. Order it again when it has \
         caught up (`pontoon status` tells), or choose another node"
    )]
    Behind {
        /// The shard.
        shard: ShardId,
        /// The node.
        node: NodeId,
        /// So many entries are missing there.
        entries: u64,
    },
    /// A limit or a rule is broken; no retry helps.
    #[error("{0}")]
    Invalid(String),
    /// Another entry was committed at its place in the log.
    #[error("another leader's entry took its place in the log")]
    Superseded,
    /// Proposed, but its end can't be seen from here any more.
    #[error("{UNKNOWN}{0}")]
    Unknown(Cow<'static, str>),
    /// The replica is starting, stopping, or has no leader.
    #[error("{0}")]
    Unavailable(Cow<'static, str>),
    /// The replica crashed too often and is out of service on this node.
    #[error("{QUARANTINED}{0}")]
    Quarantined(String),
    /// So many replicas of the shard are out of service for that reason that the others are no majority.
    /// It stays so until their nodes are restarted, and then too if an entry of the log is to blame.
    #[error("{SHARD_QUARANTINED}{0}")]
    ShardQuarantined(String),
    /// The time given ran out before the operation was proposed.
    #[error("the deadline passed before the operation was started")]
    Deadline,
    /// No database of this name.
    #[error("there is no database `{0}`; create it with `pontoon db create`")]
    UnknownDatabase(String),
    /// The metadata shard refused a change of the cluster; it will refuse it again.
    #[error("{0}")]
    Refused(String),
    /// What an order is about has changed since its giver looked: the order counts no more, however often it comes.
    #[error(
        "{what} has changed meanwhile, at map version {version}; look at it, and give the order again if it holds still"
    )]
    Changed {
        /// What has.
        what: String,
        /// The map version at which it did.
        version: u64,
    },
    /// The shard doesn't have the command's session: it was never opened there, or not used for its
    /// lifetime. Whether an earlier attempt under it took effect can't be told any more.
    #[error(
        "the shard does not have the session of this command (any more); it may have been applied before"
    )]
    SessionExpired,
    /// The session has acknowledged this command's result, and the shard has forgotten it.
    #[error("the session has acknowledged the result of this command before; it may have been applied")]
    StaleCommand,
    /// The node that leads, or too many of those that hold the shard, have too little disk space for new
    /// values.
    #[error("{DISK_FULL}{0}")]
    DiskFull(Cow<'static, str>),
    /// A refusal of a newer version of the program, in its words. Never made here, only read.
    #[error("{message}")]
    Other {
        /// Whether the operation may have had an effect.
        outcome: Outcome,
        /// Whether to try again.
        retryable: bool,
        /// When to come back, in milliseconds.
        retry_after_ms: u32,
        /// What the other side says.
        message: String,
    },
}

/// How the text of [`Refusal::Quarantined`] begins.
pub(crate) const QUARANTINED: &str = "the replica is quarantined after repeated crashes: ";

/// How the text of [`Refusal::ShardQuarantined`] begins.
pub(crate) const SHARD_QUARANTINED: &str =
    "the shard is quarantined, a majority of its replicas crashed repeatedly: ";

/// How the text of [`Refusal::Busy`] begins.
pub(crate) const BUSY: &str = "too much is in flight: ";

/// How the text of [`Refusal::DiskFull`] begins.
pub(crate) const DISK_FULL: &str = "too little disk space is left for new values: ";

/// How the text of [`Refusal::Unknown`] begins.
pub(crate) const UNKNOWN: &str = "the outcome can't be known: ";

impl Refusal {
    /// Whether the operation may have had an effect.
    pub fn outcome(&self) -> Outcome {
        match self {
            Refusal::Unknown(_) | Refusal::SessionExpired | Refusal::StaleCommand => Outcome::Unknown,
            Refusal::Other { outcome, .. } => *outcome,
            _ => Outcome::NotApplied,
        }
    }

    /// Whether the same operation may succeed later or elsewhere, if repeating it is acceptable.
    pub fn retryable(&self) -> bool {
        match self {
            Refusal::Invalid(_)
            | Refusal::Behind { .. }
            | Refusal::Deadline
            | Refusal::UnknownDatabase(_)
            | Refusal::Refused(_)
            | Refusal::Changed { .. }
            | Refusal::ShardQuarantined(_)
            | Refusal::SessionExpired
            | Refusal::StaleCommand => false,
            Refusal::Other { retryable, .. } => *retryable,
            _ => true,
        }
    }

    /// One word for the kind, for metrics.
    pub fn kind(&self) -> &'static str {
        match self {
            Refusal::NotLeader { .. } => "not_leader",
            Refusal::StaleRoute { .. } => "stale_route",
            Refusal::Busy { .. } => "busy",
            Refusal::Behind { .. } => "behind",
            Refusal::Invalid(_) => "invalid",
            Refusal::Superseded => "superseded",
            Refusal::Unknown(_) => "unknown_outcome",
            Refusal::Unavailable(_) => "unavailable",
            Refusal::Quarantined(_) => "quarantined",
            Refusal::ShardQuarantined(_) => "shard_quarantined",
            Refusal::Deadline => "deadline",
            Refusal::UnknownDatabase(_) => "unknown_database",
            Refusal::Refused(_) => "refused",
            Refusal::Changed { .. } => "changed",
            Refusal::SessionExpired => "session_expired",
            Refusal::StaleCommand => "stale_command",
            Refusal::DiskFull(_) => "disk_full",
            Refusal::Other { .. } => "other",
        }
    }

    /// Milliseconds to wait before trying again; 0: at once.
    pub fn retry_after_ms(&self) -> u32 {
        match self {
            Refusal::Busy { retry_after_ms, .. } | Refusal::Other { retry_after_ms, .. } => *retry_after_ms,
            Refusal::DiskFull(_) => DISK_FULL_RETRY_MS,
            _ => 0,
        }
    }
}
