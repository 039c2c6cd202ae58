//! The raft log of all replicas of a node, behind a trait.

use raft::eraftpb::{Entry, HardState};

use super::StorageError;
use crate::ids::{DatabaseId, Epoch, GROUP_START, Index, Position, ReplicaId, ShardId, Term};
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
    /// Members for the catalogue, brought about by an entry that `hard_state` tells to be committed. Passed over
    /// if the catalogue has those of a later entry.
    pub membership: Option<RecordedMembership>,
}

/// The members of a group as a log entry left them.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct RecordedMembership {
    /// The entry, which is committed; 0: none has changed them since the replica was created.
    pub index: Index,
    /// The shard's epoch after it.
    pub epoch: Epoch,
    /// The members after it.
    pub members: Vec<Member>,
}

impl LogWrite {
    /// Bytes of its entries, about.
    pub fn size(&self) -> usize {
        let members = self.membership.as_ref().map_or(0, |membership| 64 + 24 * membership.members.len());
        64 + members + self.entries.iter().map(|e| 32 + e.data.len() + e.context.len()).sum::<usize>()
    }
}

/// Whether a replica lives or is only remembered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReplicaPhase {
    /// Started whenever the node starts.
    Active,
    /// Removed; the id is never started again.
    Tombstone,
    /// A tombstone whose state is known to be gone from the disk.
    Destroyed,
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
    /// The shard's epoch as of [`ReplicaRecord::members_at`].
    pub epoch: Epoch,
    /// The group's members: at creation, then as of [`ReplicaRecord::members_at`]. Empty: the replica is a
    /// newcomer, created for a group that exists. It learns who is a member from the snapshot that it begins with.
    pub members: Vec<Member>,
    /// The log entry that brought them about, or the last entry in the snapshot that they are from; 0: as at
    /// creation. Which changes the log holds behind it, its entries tell: none that is compacted away came later.
    pub members_at: Index,
    /// Install generation of its state keys.
    pub generation: u32,
    /// Map version at which the shard's record last changed when the replica was ordered: only a record that
    /// has changed since can say that it is to go.
    pub ordered_at: u64,
}

impl RecordedMembership {
    /// After which entry the log of a replica begins that is created with these members. A newcomer's begins at
    /// nothing, before that of any group: so no leader can bring it on without a snapshot.
    pub fn beginning(&self) -> Position {
        if self.members.is_empty() { Position::default() } else { GROUP_START }
    }
}

impl ReplicaRecord {
    /// After which entry its log begins when it is created.
    pub fn beginning(&self) -> Position {
        self.membership().beginning()
    }

    /// The hard state it is created with.
    pub(crate) fn first_hard_state(&self) -> HardState {
        let Position { index, term } = self.beginning();
        HardState { term, commit: index, ..HardState::default() }
    }

    /// The members it names.
    pub fn membership(&self) -> RecordedMembership {
        RecordedMembership { index: self.members_at, epoch: self.epoch, members: self.members.clone() }
    }

    /// The record with `membership`; `None` if it has that, or a later one.
    pub(crate) fn with(&self, membership: &RecordedMembership) -> Option<ReplicaRecord> {
        (membership.index > self.members_at).then(|| ReplicaRecord {
            epoch: membership.epoch,
            members: membership.members.clone(),
            members_at: membership.index,
            ..self.clone()
        })
    }
}

/// What a replica becomes whose state was loaded from a snapshot. See [`LogStore::install`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Install {
    /// The generation of state keys that the snapshot was loaded into, durably.
    pub generation: u32,
    /// The last entry that the snapshot covers: where the log then begins.
    pub position: Position,
    /// The term of the leader that sent it.
    pub leader_term: Term,
    /// The shard's epoch in the snapshot.
    pub epoch: Epoch,
    /// The group's members in the snapshot.
    pub members: Vec<Member>,
    /// The replica's own state is lost: it needs the snapshot even where its log goes on from there. What
    /// its log holds beyond is kept then.
    pub state_lost: bool,
}

/// A replica after an installation.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Installed {
    /// Its record.
    pub record: ReplicaRecord,
    /// Its hard state.
    pub hard_state: HardState,
    /// Its log. All entries of the log before that lie within it are kept, the others dropped: either all
    /// that follow the snapshot, or none at all.
    pub extent: Extent,
}

impl Install {
    /// What a replica is after the installation, or why it is refused: nothing may be dropped that the
    /// replica has promised to keep. `term_at` is the term of the log's own entry at
    /// [`Install::position`], if it has one.
    ///
    /// A replica whose state is lost may have committed and acknowledged more than the snapshot covers.
    /// An entry of the same index and term is the same entry, and so is all before it: its log then goes
    /// on from the snapshot as it is.
    pub(crate) fn apply(
        &self,
        record: &ReplicaRecord,
        extent: Extent,
        hard_state: &HardState,
        term_at: Option<Term>,
    ) -> Result<Installed, StorageError> {
        let refuse = |reason| Err(StorageError::Inconsistent { replica: record.replica, reason });
        let Position { index, term } = self.position;
        if self.generation <= record.generation {
            return refuse(format!(
                "generation {} is no later than {}, which it has",
                self.generation, record.generation
            ));
        }
        if self.epoch.generation() < record.epoch.generation() {
            return refuse(format!(
                "the replica has gone on alone under {:?}, the snapshot is of {:?}, from before that",
                record.epoch, self.epoch
            ));
        }
        if self.leader_term < term {
            return refuse(format!("no leader of term {} has an entry of term {term}", self.leader_term));
        }
        // What a log begins after counts as an entry of it: the state that had it is what was lost.
        let term_at = if self.state_lost && index == extent.truncated.index {
            Some(extent.truncated.term)
        } else {
            term_at
        };
        let keeps_log = self.state_lost && term_at == Some(term);
        if !keeps_log && index <= extent.truncated.index || term < extent.truncated.term {
            return refuse(format!(
                "a snapshot at entry {index} of term {term} isn't ahead of a log that begins after entry {} of term {}",
                extent.truncated.index, extent.truncated.term
            ));
        }
        if !keeps_log && index <= hard_state.commit {
            return refuse(match term_at {
                Some(other) if self.state_lost => {
                    format!("entry {index} is committed here with term {other}, not with term {term}")
                }
                _ => format!(
                    "a snapshot at entry {index} isn't needed: entries up to {} are committed here",
                    hard_state.commit
                ),
            });
        }
        if !keeps_log && term_at == Some(term) {
            return refuse(format!("it has entry {index} of term {term}: the log can go on from there"));
        }
        let record = ReplicaRecord {
            generation: self.generation,
            epoch: self.epoch,
            members: self.members.clone(),
            members_at: index,
            ..record.clone()
        };
        let rises = self.leader_term > hard_state.term;
        let hard_state = HardState {
            term: hard_state.term.max(self.leader_term),
            // A vote belongs to its term.
            vote: if rises { 0 } else { hard_state.vote },
            // All of what is kept, and no more, may have been committed beyond the snapshot.
            commit: hard_state.commit.max(index),
            ..Default::default()
        };
        let last = if keeps_log { extent.last } else { index };
        Ok(Installed { record, hard_state, extent: Extent { truncated: self.position, last } })
    }
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
    /// The members that its record names.
    pub membership: RecordedMembership,
}

/// The raft log, hard states and replica catalogue of one node. Shared by all its groups, so that
/// one sync makes the writes of many groups durable.
pub trait LogStore: Send + Sync + 'static {
    /// Makes all of `writes` durable, in order. On return they survive a power loss. What doesn't fit
    /// the log ([`StorageError::Inconsistent`]: unknown or removed replica, a gap, a commit index
    /// beyond the last entry, members of an entry that isn't committed with it) is found before anything is
    /// written. After any other error the node
    /// must stop: the state of the log is unknown, and every later write fails too.
    fn write(&self, writes: &[LogWrite]) -> Result<(), StorageError>;

    /// Adds replicas to the catalogue with an empty log that begins after
    /// [`ReplicaRecord::beginning`], durably and all together. A replica that is already in the
    /// catalogue, a tombstone too, is left as it is. A record that is a tombstone gets no log.
    fn create(&self, records: &[ReplicaRecord]) -> Result<(), StorageError>;

    /// Every replica of the node, tombstones included, by id.
    fn catalogue(&self) -> Result<Vec<ReplicaRecord>, StorageError>;

    /// Makes replicas tombstones, durably, and only then drops their logs. Unknown replicas and
    /// tombstones are passed over. A later write for a removed replica is
    /// [`StorageError::Inconsistent`]: the caller first makes sure that none is queued.
    fn remove(&self, replicas: &[ReplicaId]) -> Result<(), StorageError>;

    /// Goes on from a snapshot whose state the caller has loaded and synced: in one durable step the
    /// replica's record names the new generation, its entries are dropped, its log begins after the
    /// snapshot's position, which is committed, and its term is no lower than the leader's. After a
    /// crash there is the old replica or the new one, whole.
    ///
    /// [`StorageError::Inconsistent`], and nothing is written, if the replica isn't behind the
    /// snapshot (it has that very entry, or has committed or compacted as far): acknowledged entries
    /// are never dropped. The same if the snapshot is of an earlier generation of conf versions than the
    /// replica's record: it was on its way when an operator had the replica go on alone, and would undo
    /// that. The caller has stopped the replica and made sure that no write of it is
    /// queued.
    ///
    /// With [`Install::state_lost`] the replica needn't be behind: if its log holds the snapshot's very
    /// entry, or begins right after it, the entries that follow are kept, and stay committed as far as
    /// they were. Refused are then only a snapshot from before the log begins, and one that contradicts
    /// a committed entry.
    fn install(&self, replica: ReplicaId, install: &Install) -> Result<(), StorageError>;

    /// Notes that the state of these tombstones is gone, so that nobody looks for it at the next start.
    /// A power loss may make that forgotten. Replicas that are no tombstones are passed over.
    fn destroyed(&self, replicas: &[ReplicaId]) -> Result<(), StorageError>;

    /// Hard state and extent of a replica's log. An active replica without a hard state, or with a
    /// gap in its log, or a commit index beyond its last entry, is [`StorageError::Damaged`]. A log
    /// whose tail is lost can look whole: the caller compares `last` with the state's applied index.
    fn load(&self, replica: ReplicaId) -> Result<LogState, StorageError>;

    /// Entries in `[low, high)`, at least one, then no more than `max_bytes` of them as encoded.
    /// What lies beyond the last entry is left out: the log may have been cut since it was asked.
    fn entries(
        &self,
        replica: ReplicaId,
        low: Index,
        high: Index,
        max_bytes: usize,
    ) -> Result<Vec<Entry>, StorageError>;

    /// Drops the entries up to `to`. The caller has made the state up to there durable. A position
    /// below what is compacted already changes nothing; one beyond the last entry is
    /// [`StorageError::Inconsistent`]. A power loss may bring the entries back.
    fn compact(&self, replica: ReplicaId, to: Position) -> Result<(), StorageError>;

    /// Frees files that hold nothing needed, and names the replicas whose old entries hold back
    /// the most space: their state should be flushed, then their log compacted.
    fn purge(&self) -> Result<Vec<ReplicaId>, StorageError>;

    /// Bytes on disk.
    fn disk_bytes(&self) -> u64;
}

/// Where a replica's log begins and ends, as far as a write must fit it.
/// Invariant: `truncated.index <= last`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Extent {
    /// The last entry that was compacted away.
    pub truncated: Position,
    /// Index of the last entry; `truncated.index` if there is none.
    pub last: Index,
}

impl Extent {
    /// The empty log of a new replica.
    pub fn new(record: &ReplicaRecord) -> Extent {
        let truncated = record.beginning();
        Extent { truncated, last: truncated.index }
    }

    /// The extent after `write`, or why it doesn't fit: its entries must follow one another and the
    /// log without a gap, their terms must not fall, and nothing may be committed that isn't there.
    pub fn after(self, write: &LogWrite) -> Result<Extent, StorageError> {
        let refuse = |reason| Err(StorageError::Inconsistent { replica: write.replica, reason });
        let mut last = self.last;
        if let Some(first) = write.entries.first() {
            if first.index <= self.truncated.index || first.index - 1 > self.last {
                return refuse(format!(
                    "entry {} doesn't fit a log that holds ({}, {}]",
                    first.index, self.truncated.index, self.last
                ));
            }
            let mut before = Position { index: first.index - 1, term: self.truncated.term };
            for entry in &write.entries {
                if before.index.checked_add(1) != Some(entry.index) || entry.term < before.term {
                    return refuse(format!(
                        "entry {} of term {} can't follow entry {} of term {}",
                        entry.index, entry.term, before.index, before.term
                    ));
                }
                before = Position { index: entry.index, term: entry.term };
            }
            last = before.index;
        }
        if let Some(hard_state) = &write.hard_state
            && hard_state.commit > last
        {
            return refuse(format!("commit index {} lies beyond the last entry {last}", hard_state.commit));
        }
        if let Some(RecordedMembership { index, .. }) = &write.membership
            && write.hard_state.as_ref().is_none_or(|hard_state| hard_state.commit < *index)
        {
            return refuse(format!("members as of entry {index} without a commit index that covers it"));
        }
        Ok(Extent { last, ..self })
    }

    /// The extent after compacting up to `to`; `None` if that changes nothing.
    pub fn compacted(self, replica: ReplicaId, to: Position) -> Result<Option<Extent>, StorageError> {
        if to.index <= self.truncated.index {
            return Ok(None);
        }
        if to.index > self.last {
            return Err(StorageError::Inconsistent {
                replica,
                reason: format!("can't compact up to {}, the last entry is {}", to.index, self.last),
            });
        }
        Ok(Some(Extent { truncated: to, ..self }))
    }
}

/// The first index of each term among the entries `first..=last`, ascending, with few calls of
/// `term_of`: terms never fall along a log, so between two entries of one term there is no other.
pub(crate) fn term_starts(
    first: Index,
    last: Index,
    mut term_of: impl FnMut(Index) -> Result<Term, StorageError>,
) -> Result<Vec<(Index, Term)>, StorageError> {
    if first > last {
        return Ok(Vec::new());
    }
    let first_term = term_of(first)?;
    let last_term = if first == last { first_term } else { term_of(last)? };
    let mut starts = vec![(first, first_term)];
    // Ranges yet to be looked into, the leftmost on top.
    let mut ranges = vec![((first, first_term), (last, last_term))];
    while let Some((low, high)) = ranges.pop() {
        if low.1 > high.1 {
            return Err(StorageError::Damaged {
                what: "raft log".into(),
                detail: format!(
                    "term {} of entry {} exceeds term {} of entry {}",
                    low.1, low.0, high.1, high.0
                ),
            });
        }
        if low.1 == high.1 {
            continue;
        }
        if high.0 - low.0 == 1 {
            starts.push(high);
            continue;
        }
        let index = low.0 + (high.0 - low.0) / 2;
        let middle = (index, term_of(index)?);
        ranges.push((middle, high));
        ranges.push((low, middle));
    }
    Ok(starts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NEW: Extent = Extent { truncated: GROUP_START, last: GROUP_START.index };

    fn write(indexes: &[(Index, Term)], commit: Option<Index>) -> LogWrite {
        LogWrite {
            replica: ReplicaId(1),
            entries: indexes
                .iter()
                .map(|&(index, term)| Entry { index, term, ..Default::default() })
                .collect(),
            hard_state: commit.map(|commit| HardState { commit, ..Default::default() }),
            membership: None,
        }
    }

    #[test]
    fn writes_that_fit_move_the_end() {
        let extent = NEW;
        let extent = extent.after(&write(&[(6, 5), (7, 6), (8, 6)], Some(8))).unwrap();
        assert_eq!(extent.last, 8);
        assert_eq!(extent.after(&write(&[(7, 7)], None)).unwrap().last, 7);
        assert_eq!(extent.after(&write(&[], Some(8))).unwrap().last, 8);
    }

    #[test]
    fn writes_that_do_not_fit_are_refused() {
        let extent = Extent { last: 8, ..NEW };
        for bad in [
            write(&[(0, 5)], None),
            write(&[(5, 5)], None),
            write(&[(10, 6)], None),
            write(&[(u64::MAX, 6)], None),
            write(&[(9, 6), (11, 6)], None),
            write(&[(9, 6), (9, 6)], None),
            write(&[(9, 6), (0, 6)], None),
            write(&[(9, 7), (10, 6)], None),
            write(&[(9, 4)], None),
            write(&[], Some(9)),
            write(&[(7, 6)], Some(8)),
        ] {
            let found = extent.after(&bad);
            assert!(matches!(found, Err(StorageError::Inconsistent { .. })), "{bad:?}: {found:?}");
        }
    }

    #[test]
    fn compaction_only_moves_forward_and_within_the_log() {
        let extent = Extent { last: 8, ..NEW };
        let at = |index| Position { index, term: 6 };
        assert!(extent.compacted(ReplicaId(1), at(5)).unwrap().is_none());
        let compacted = extent.compacted(ReplicaId(1), at(8)).unwrap().unwrap();
        assert_eq!((compacted.truncated, compacted.last), (at(8), 8));
        assert!(extent.compacted(ReplicaId(1), at(9)).is_err());
    }

    #[test]
    fn falling_terms_are_damage() {
        let terms = [3, 3, 4, 2];
        assert!(term_starts(1, 4, |i| Ok(terms[i as usize - 1])).is_err());
    }

    proptest! {
        /// The search finds exactly the starts that a walk over all entries finds, and a log of one
        /// term costs two look-ups whatever its length.
        #[test]
        fn term_starts_match_a_full_walk(steps in prop::collection::vec(0u64..3, 0..200)) {
            let terms: Vec<Term> = steps
                .iter()
                .scan(5, |term, step| {
                    *term += step / 2;
                    Some(*term)
                })
                .collect();
            let first = 6;
            let walked: Vec<(Index, Term)> = terms
                .iter()
                .enumerate()
                .filter(|&(i, term)| i == 0 || terms[i - 1] != *term)
                .map(|(i, &term)| (first + i as u64, term))
                .collect();
            let mut calls = 0;
            let found = term_starts(first, first + terms.len() as u64 - 1, |index| {
                calls += 1;
                Ok(terms[(index - first) as usize])
            }).unwrap();
            prop_assert_eq!(&found, &walked);
            if walked.len() <= 1 {
                prop_assert!(calls <= 2);
            }
        }
    }
}
