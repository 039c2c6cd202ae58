//! Between the program's types and their Cap'n Proto forms.
//!
//! - [`records`]: nodes, databases, shards, map deltas (wire and disk).
//! - [`meta`]: commands and replies of the metadata shard. - [`membership`]: entries that change a group's members.
//! - [`peer`]: frames of the peer port. - [`messages`]: the raft messages in them, and their rules.
//! - [`snapshot`]: what goes over the lane of snapshots.
//! - [`survey`]: what nodes report to the reconciler, and what it orders.
//! - [`digest`]: marks in logs, and digests of states there.
//! - [`trace`]: where the time of one batch went.
//! - [`hello`]: the first frame each way on a peer connection.
//! - [`refusal`]: [`crate::refusal::Refusal`] and `Error`. - [`varint`]: numbers in few bytes.

pub mod digest;
pub mod hello;
pub mod membership;
pub mod messages;
pub mod meta;
pub mod peer;
pub mod records;
pub mod refusal;
pub mod snapshot;
pub mod survey;
pub mod trace;
pub mod varint;

use raft::eraftpb::Message;

use crate::ids::{Epoch, Index, NodeId, ShardId};

/// A raft message with its address.
#[derive(Clone, PartialEq, Debug)]
pub struct GroupMessage {
    /// The shard whose group it is for.
    pub shard: ShardId,
    /// Epoch of the sender.
    pub epoch: Epoch,
    /// From a leader: no replica of the group still needs a log entry up to here. 0: unknown.
    pub safe_index: Index,
    /// The message of raft-rs, with ReplicaIds in `to` and `from`.
    pub message: Message,
    /// The node that it came from: where an answer goes to a replica that isn't a member yet, as far as its
    /// receiver knows. Not part of what is sent: who receives it knows whom the connection is to. 0: unknown.
    pub node: NodeId,
    /// With a heartbeat: the leader asks whether the replica will do without any further ones. With the answer to it:
    /// yes. See [`crate::group::sleep`].
    pub sleep: Option<SleepWord>,
}

/// What a leader asks before its group goes to sleep, and what who agrees repeats.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct SleepWord {
    /// Which start of the process the leader runs in: the heartbeats of its node stand for it as long as they name
    /// this one.
    pub process: u64,
    /// Which attempt of the leader's it is. An agreement to an earlier one says nothing: who gave it may have been
    /// woken since.
    pub round: u64,
}

/// Bytes from disk or network that don't have the form they should.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// Not a readable Cap'n Proto message, or beyond its limits.
    #[error("unreadable message: {0}")]
    Capnp(#[from] capnp::Error),
    /// Readable, but a field holds what it can't.
    #[error("malformed {what}: {detail}")]
    Malformed {
        /// Which structure.
        what: &'static str,
        /// What is wrong.
        detail: String,
    },
}

impl From<capnp::NotInSchema> for CodecError {
    fn from(unknown: capnp::NotInSchema) -> CodecError {
        CodecError::Capnp(unknown.into())
    }
}
