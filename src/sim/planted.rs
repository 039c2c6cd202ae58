//! Bugs that are put in on purpose, to see that the checks find them.
//!
//! Each is a mistake in what surrounds a group, at the place where [`crate::node`] or [`crate::storage`]
//! could make it. Only a build with test hooks can ask for one.

/// A bug, and what it does wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Planted {
    /// Log writes are acknowledged before they are durable.
    AcknowledgeEarly,
    /// Votes don't reach the disk.
    VoteNotPersisted,
    /// Reads are answered from the state of any replica that takes itself for the leader, without
    /// asking the others.
    StaleReads,
    /// Reads are answered from the state of any replica that is asked.
    FollowerReads,
    /// The log is compacted when a memtable is frozen, before that is durable.
    CompactEarly,
    /// Flushes write the engine without a redo file before it.
    NoRedoFile,
    /// Redo files are removed before what they hold is durable in the engine.
    RedoRemovedEarly,
    /// A memtable is forgotten once its redo file is durable, before the engine has it.
    ReleaseEarly,
    /// Flushes leave out the session table.
    SessionsForgotten,
    /// A command that is sent again is taken for another one.
    RetryAppliesTwice,
    /// Snapshots are installed before what is loaded of them is durable.
    InstallUnsynced,
    /// Snapshots leave out the session table.
    SnapshotWithoutSessions,
    /// A snapshot claims to be exact at what its maker has applied, but holds what was flushed.
    SnapshotAhead,
    /// A replica that ended alone is opened while writes of its last start are still queued.
    OldIncarnationWrites,
    /// The hard state of a torn log write is taken for whole.
    TornAccepted,
    /// Rotten records are read as if they were sound.
    RotUnnoticed,
    /// A key that can't be read is taken for absent.
    ErrorReadAsAbsent,
    /// A lost state is taken for a whole one.
    LostStateServed,
    /// A node that lost its state begins with new logs too, and forgets what it has promised.
    LogResetWithState,
    /// A snapshot in place of a lost state drops the entries behind it from the log.
    SuffixDropped,
    /// What a learner acknowledges is counted as a voter's.
    LearnerCounted,
    /// The state of a removed replica is gone before its tombstone is on disk.
    TombstoneLate,
    /// New replicas get ids that replicas had before which have left.
    ReplicaIdReused,
    /// That a change of members is committed doesn't reach the disk before the change is in force.
    ChangeUnrecorded,
    /// The metadata shard takes members of the past for news.
    StaleReportTaken,
    /// Whoever is asked to sleep is taken to agree.
    AgreementAssumed,
    /// Replicas that are asleep don't hear that a node has gone, or was started again.
    AlarmsUnheard,
}

impl Planted {
    /// All of them.
    pub const ALL: [Planted; 27] = [
        Planted::AcknowledgeEarly,
        Planted::VoteNotPersisted,
        Planted::StaleReads,
        Planted::FollowerReads,
        Planted::CompactEarly,
        Planted::NoRedoFile,
        Planted::RedoRemovedEarly,
        Planted::ReleaseEarly,
        Planted::SessionsForgotten,
        Planted::RetryAppliesTwice,
        Planted::InstallUnsynced,
        Planted::SnapshotWithoutSessions,
        Planted::SnapshotAhead,
        Planted::OldIncarnationWrites,
        Planted::TornAccepted,
        Planted::RotUnnoticed,
        Planted::ErrorReadAsAbsent,
        Planted::LostStateServed,
        Planted::LogResetWithState,
        Planted::SuffixDropped,
        Planted::LearnerCounted,
        Planted::TombstoneLate,
        Planted::ReplicaIdReused,
        Planted::ChangeUnrecorded,
        Planted::StaleReportTaken,
        Planted::AgreementAssumed,
        Planted::AlarmsUnheard,
    ];

    /// What it does wrong, in one line.
    pub fn text(self) -> &'static str {
        match self {
            Planted::AcknowledgeEarly => "log writes are acknowledged before they are durable",
            Planted::VoteNotPersisted => "votes don't reach the disk",
            Planted::StaleReads => "a leader answers reads without a round",
            Planted::FollowerReads => "whoever is asked answers reads",
            Planted::CompactEarly => "the log is compacted before the flush is durable",
            Planted::NoRedoFile => "flushes write the engine without a redo file",
            Planted::RedoRemovedEarly => "redo files are removed before the engine is synced",
            Planted::ReleaseEarly => "memtables are forgotten before the engine has them",
            Planted::SessionsForgotten => "flushes leave out the session table",
            Planted::RetryAppliesTwice => "a command sent again is taken for another one",
            Planted::InstallUnsynced => "snapshots are installed before they are durable",
            Planted::SnapshotWithoutSessions => "snapshots leave out the session table",
            Planted::SnapshotAhead => "a snapshot claims a later index than it holds",
            Planted::OldIncarnationWrites => "writes of a replica's last start reach the disk after the next",
            Planted::TornAccepted => "the hard state of a torn log write is taken for whole",
            Planted::RotUnnoticed => "rotten records are read as if they were sound",
            Planted::ErrorReadAsAbsent => "a key that can't be read is taken for absent",
            Planted::LostStateServed => "a lost state is taken for a whole one",
            Planted::LogResetWithState => "a node that lost its state begins with new logs too",
            Planted::SuffixDropped => "a snapshot in place of a lost state drops the log behind it",
            Planted::LearnerCounted => "what a learner acknowledges is counted as a voter's",
            Planted::TombstoneLate => "a removed replica's state goes before its tombstone is on disk",
            Planted::ReplicaIdReused => "new replicas get ids of others that have left",
            Planted::StaleReportTaken => "the map takes over members that a shard had before",
            Planted::AgreementAssumed => "whoever is asked to sleep is taken to agree",
            Planted::AlarmsUnheard => "who sleeps doesn't hear that a node has gone or was started again",
            Planted::ChangeUnrecorded => "changes of members are in force before their commit is on disk",
        }
    }
}

/// The bug of a simulation, if it has one.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Plant(Option<Planted>);

impl Plant {
    /// None.
    pub const NONE: Plant = Plant(None);

    /// Whether it is this one.
    pub(super) fn is(self, bug: Planted) -> bool {
        self.0 == Some(bug)
    }
}

#[cfg(feature = "test-hooks")]
impl Plant {
    /// This one.
    pub fn of(bug: Planted) -> Plant {
        Plant(Some(bug))
    }
}
