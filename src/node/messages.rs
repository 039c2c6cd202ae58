//! Every message between the actors of a node: who sends it, who receives it, and what happens when
//! the receiver's mailbox is full.

use std::sync::Arc;
use std::time::Instant;

use actix::prelude::*;
use bytes::Bytes;
use raft::eraftpb::Entry;
use tokio::sync::oneshot;

use super::handle::ReplicaReport;
use super::intake::Arrived;
use super::load::Admitted;
use super::snapshots::worker::DigestError;
use super::ticket::Results;
use super::trace::Sheet;
use crate::group::nodes::Alarm;
use crate::group::types::{GroupStatus, LeaderChange, Operation};
use crate::ids::{Incarnation, Index, NodeId, Position, ReplicaId, ShardId};
use crate::placement::map::{ClusterMap, MapDelta};
use crate::refusal::Refusal;
use crate::storage::digest::StateDigest;
use crate::storage::flush::FlushStep;
use crate::storage::state::StateReader;

/// Service → replica: operations of one client batch. Mailbox full: the service answers `Busy`.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Submit {
    /// The shard's range version by which the client routed.
    pub range_version: u64,
    /// What to do.
    pub operations: Vec<Operation>,
    /// Where the results go: all of them, or a refusal of the whole batch, of which none was started.
    pub reply: oneshot::Sender<Results>,
    /// What they count for on this node, until they have ended; of a client's.
    pub admitted: Option<Arc<Admitted>>,
    /// Where their time is noted, if anybody wants to know.
    pub trace: Option<Arc<Sheet>>,
}

/// Hub → replica: messages of other replicas. Mailbox full: dropped, raft sends again.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Step(pub Arrived);

/// Hub → replica: a tick has passed. Mailbox full: dropped; the replica is late anyway.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Tick;

/// Hub → replica: something is wrong with a node, or may be. Never dropped: one for each alarm.
#[derive(Message)]
#[rtype(result = "()")]
pub struct NodeAlarm(pub NodeId, pub Alarm);

/// Hub → replica: log writes up to this number are durable. Never dropped: at most
/// `WRITES_IN_FLIGHT_MAX` and a few readies are under way.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Persisted(pub u64);

/// Read thread → replica: what the state engine holds under these keys, if it stands where a reader with this
/// stamp was made ([`StateReader::stamp`]). Mailbox full: dropped, and read again when it is asked for again.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Learned(pub u64, pub Vec<(Bytes, Option<Bytes>)>);

/// Log reads → replica: the entries a lagging follower needs.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Fetched(pub Vec<Entry>);

/// Hub → replica: a flush has come this far. Never dropped: one flush is under way at a time.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Flushed {
    /// How far.
    pub step: FlushStep,
    /// Applied position of the flushed state.
    pub position: Position,
}

/// Hub → replica: flush the memtable soon.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Freeze {
    /// Not for memory but because the node's log is too large: the log gives way too.
    pub for_log: bool,
}

/// Snapshot thread → replica: the snapshot for this follower is made, exact at this position. Whether it
/// is wanted still.
#[derive(Message)]
#[rtype(result = "bool")]
pub struct SnapshotMade {
    /// The follower.
    pub to: ReplicaId,
    /// Its last entry.
    pub position: Position,
}

/// Snapshot thread → replica: what it did for this follower has ended. Never dropped: one for each
/// order.
#[derive(Message)]
#[rtype(result = "()")]
pub struct SnapshotDone {
    /// The follower.
    pub to: ReplicaId,
    /// Whether it has the snapshot, or what is better.
    pub installed: bool,
}

/// Hub → replica: a flush has freed memory, for whoever pauses for want of it. Mailbox full: dropped, the next tick
/// finds out too.
#[derive(Message)]
#[rtype(result = "()")]
pub struct MemoryFreed;

/// Hub → replica, on every change: how the node's disk is, and whether it is to lead at all.
#[derive(Message, Clone, Copy, PartialEq, Eq, Debug, Default)]
#[rtype(result = "()")]
pub struct DiskNews {
    /// It has too little space for new values.
    pub full: bool,
    /// A write of the raft log doesn't come to an end.
    pub stalled: bool,
    /// The node is to be emptied: others should lead.
    pub draining: bool,
}

/// Hub → replica: messages to the replica on this node were lost. Mailbox full: dropped, a hint only.
#[derive(Message)]
#[rtype(result = "()")]
pub struct PeerUnreachable(pub NodeId);

/// Supervisor → replica: begin an election at once; for a new group's preferred first leader.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Campaign;

/// Service or supervisor → replica: hand leadership to the replica on this node, or to the best successor.
#[derive(Message)]
#[rtype(result = "Result<(), Refusal>")]
pub struct Transfer(pub Option<NodeId>);

/// Supervisor → replica: how are you?
#[derive(Message)]
#[rtype(result = "GroupStatus")]
pub struct AskStatus;

/// Supervisor → replica: a page of the state after this key, to be counted.
#[derive(Message)]
#[rtype(result = "StateReader")]
pub struct CountPage(pub Bytes);

/// Service → replica: a digest of the state as it is at the mark of this index.
#[derive(Message)]
#[rtype(result = "Digesting")]
pub struct AskDigest(pub Index);

/// How a digest is that was asked for. The texts are for a person.
pub enum Digesting {
    /// The state isn't there yet: to be asked again. Whether the replica ever gets there isn't known.
    Behind(String),
    /// The state is there, and about to be on disk: to be asked again.
    Coming(String),
    /// It is being taken of this replica; what comes of it.
    Begun(ReplicaId, oneshot::Receiver<Result<StateDigest, DigestError>>),
    /// The replica has gone on: there may be one at another mark.
    GoneOn(String),
    /// There is none, nor will be.
    Never(String),
}

/// Supervisor → replica: answer everybody and end.
#[derive(Message)]
#[rtype(result = "()")]
pub struct StopReplica;

/// Hub → replica: end with an error, to be rebuilt from disk.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Fail(pub String);

/// Test hook → replica: fail in the named way.
#[cfg(feature = "test-hooks")]
#[derive(Message)]
#[rtype(result = "()")]
pub struct Inject(pub String);

/// Replica → supervisor: leadership of a shard as this replica sees it.
#[derive(Message)]
#[rtype(result = "()")]
pub struct LeaderChanged {
    /// The shard.
    pub shard: ShardId,
    /// The replica that tells.
    pub replica: ReplicaId,
    /// Who leads.
    pub change: LeaderChange,
}

/// Replica → supervisor: it leads and has fallen asleep, and how its group is until it tells that it is awake again (`None`).
#[derive(Message)]
#[rtype(result = "()")]
pub struct LeaderRests {
    /// Which.
    pub replica: ReplicaId,
    /// How its group is.
    pub status: Option<Box<GroupStatus>>,
}

/// Replica → supervisor, on every end of a replica but an ordered one; also while unwinding.
#[derive(Message)]
#[rtype(result = "()")]
pub struct ReplicaDown {
    /// Which.
    pub replica: ReplicaId,
    /// Which start of it.
    pub incarnation: Incarnation,
    /// Why.
    pub reason: String,
    /// The entry that it was applying when it failed, if that is when.
    pub applying: Option<Index>,
}

/// The metadata replica → supervisor: the map as applied here.
#[derive(Message)]
#[rtype(result = "()")]
pub struct MapApplied(pub Arc<ClusterMap>);

/// Peer or formation → supervisor: news of the map.
#[derive(Message)]
#[rtype(result = "()")]
pub struct MapNews(pub MapDelta);

/// The metadata replica or peer connections → supervisor: a map of this version was all that the metadata shard's leader
/// knew, at this time.
#[derive(Message)]
#[rtype(result = "()")]
pub struct MapConfirmed {
    /// The version.
    pub version: u64,
    /// When.
    pub at: Instant,
}

/// Service → supervisor: report all replicas.
#[derive(Message)]
#[rtype(result = "Reported")]
pub struct Report;

/// What a supervisor reports.
#[derive(Default)]
pub struct Reported {
    /// All replicas, by shard.
    pub replicas: Vec<ReplicaReport>,
    /// Bytes that the node has sent in snapshots since it started.
    pub snapshot_bytes: u64,
}
