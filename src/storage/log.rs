//! The raft log of all replicas of a node, behind a trait.

use raft::eraftpb::{Entry, HardState};

use super::StorageError;
use crate::ids::{DatabaseId, Epoch, Index, Position, ReplicaId, ShardId, Term};
use crate::machine::MachineKind;
use crate::placement::map::Member;
use crate::placement::ring::RingRange;

/// What one ready of one group adds to the log. Entries replace whatever the log holds from the
/// first of them on.
#[derive(Clone, Debug)]
pub struct LogWrite {
    /// Whose log.
    pub replica: ReplicaId,
    /// Contiguous entries; the first directly follows, or lies within, what the log holds.
    pub entries: Vec<Entry>,
    /// Term, vote and commit, written as one record.
    pub hard_state: Option<HardState>,
}

impl LogWrite {
    /// Bytes of its entries, about.
    pub fn size(&self) -> usize {
        64 + self
            .entries
            .iter()
            .map(|e| 32 + e.data.len() + e.context.len())
            .sum::<usize>()
    }
}

/// Whether a replica lives or is only remembered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReplicaPhase {
    /// Started whenever the node starts.
    Active,
    /// Removed; the id is never started again.
    Tombstone,
}

/// A replica in the node's catalogue.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ReplicaRecord {
    /// Its id, which names its log group and its state keys.
    pub replica: ReplicaId,
    /// The shard it is a copy of.
    pub shard: ShardId,
    /// The shard's database.
    pub database: DatabaseId,
    /// The machine it runs.
    pub machine: MachineKind,
    /// Whether it lives.
    pub phase: ReplicaPhase,
    /// The shard's range.
    pub range: RingRange,
    /// The shard's epoch at creation.
    pub epoch: Epoch,
    /// The group's members at creation.
    pub members: Vec<Member>,
    /// Install generation of its state keys.
    pub generation: u32,
}

/// What the log knows of one replica when the node starts.
#[derive(Clone, PartialEq, Debug)]
pub struct LogState {
    /// Term, vote and commit.
    pub hard_state: HardState,
    /// The last entry that was compacted away.
    pub truncated: Position,
    /// Index of the last entry; `truncated.index` if there is none.
    pub last: Index,
    /// The first index of each term in the log, ascending; without the truncated entry.
    pub terms: Vec<(Index, Term)>,
}

/// The raft log, hard states and replica catalogue of one node. Shared by all its groups, so that
/// one sync makes the writes of many groups durable.
pub trait LogStore: Send + Sync + 'static {
    /// Makes all of `writes` durable, in order. On return they survive a power loss. After an error
    /// the node must stop: the state of the log is unknown.
    fn write(&self, writes: &[LogWrite]) -> Result<(), StorageError>;

    /// Adds replicas to the catalogue with an empty log that begins after
    /// [`crate::ids::GROUP_START`], durably and all together. A replica that is already in the
    /// catalogue, a tombstone too, is left as it is.
    fn create(&self, records: &[ReplicaRecord]) -> Result<(), StorageError>;

    /// Every replica of the node, tombstones included, by id.
    fn catalogue(&self) -> Result<Vec<ReplicaRecord>, StorageError>;

    /// Makes replicas tombstones, durably, and drops their logs.
    fn remove(&self, replicas: &[ReplicaId]) -> Result<(), StorageError>;

    /// Hard state and extent of a replica's log. An active replica without a hard state, or with a
    /// gap in its log, is [`StorageError::Damaged`].
    fn load(&self, replica: ReplicaId) -> Result<LogState, StorageError>;

    /// Entries in `[low, high)`, at least one, then no more than `max_bytes` of data.
    fn entries(
        &self,
        replica: ReplicaId,
        low: Index,
        high: Index,
        max_bytes: usize,
    ) -> Result<Vec<Entry>, StorageError>;

    /// Drops the entries up to `to`. The caller has made the state up to there durable. A position
    /// below what is compacted already changes nothing.
    fn compact(&self, replica: ReplicaId, to: Position) -> Result<(), StorageError>;

    /// Frees files that hold nothing needed, and names the replicas whose old entries hold back
    /// the most space: their state should be flushed, then their log compacted.
    fn purge(&self) -> Result<Vec<ReplicaId>, StorageError>;

    /// Bytes on disk.
    fn disk_bytes(&self) -> u64;
}
