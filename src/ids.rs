//! Identifiers. Each is a type of its own so that one can't be passed for another; all but the
//! random ones are allocated by the metadata shard and never reused.

use std::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id!(
    /// One process of a cluster. 0 stands for "none yet".
    NodeId
);
id!(
    /// A slice of the key space, replicated by one Raft group. 0 is the metadata shard.
    ShardId
);
id!(
    /// One node's copy of a shard, and its id within raft. 0 stands for "none".
    ReplicaId
);
id!(
    /// A database. 0 is the metadata shard's own.
    DatabaseId
);

/// The shard that holds nodes, databases and the shard map.
pub const METADATA_SHARD: ShardId = ShardId(0);

/// The replica ids of the metadata shard's first voters are 1, 2, … and its database is this one.
pub const METADATA_DATABASE: DatabaseId = DatabaseId(0);

/// Index of an entry in a raft log. 0 precedes the first.
pub type Index = u64;

/// A raft term.
pub type Term = u64;

/// Which start of a replica on its node this is: everything that outlives a crash of the replica
/// (queued log writes, flushes, timers) carries it, so that the work of a dead incarnation can be
/// told from that of the living one. Counted by the supervisor from 1.
pub type Incarnation = u64;

/// An entry's place in a log: the index and the term it was written in.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Hash)]
pub struct Position {
    /// Index of the entry.
    pub index: Index,
    /// Term in which it was proposed.
    pub term: Term,
}

/// Where the log of every new group begins: an index and a term that no proposal can have, already
/// truncated, so that a replica which is added later always starts from a snapshot.
pub const GROUP_START: Position = Position { index: 5, term: 5 };

/// Versions of a shard's description.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash)]
pub struct Epoch {
    /// Grows when the ring range changes. Client requests are checked against this.
    pub range: u64,
    /// Grows when the membership changes: by one with each change that the group makes itself, to the next
    /// [generation](Epoch::generation) when an operator has one replica go on alone.
    pub conf: u64,
}

/// Changes of members within one generation: more than a group can make.
const GENERATION_BITS: u32 = 32;

/// The generation that a conf version belongs to, or a revision: those of a shard begin anew with each of its
/// generations, behind all that the one before can have come to.
pub fn generation_of(number: u64) -> u64 {
    number >> GENERATION_BITS
}

/// The first number of the generation of `number`.
pub fn generation_start(number: u64) -> u64 {
    generation_of(number) << GENERATION_BITS
}

impl Epoch {
    /// How often an operator has had the group go on with one replica alone.
    pub fn generation(self) -> u64 {
        generation_of(self.conf)
    }

    /// The first conf version of the generation after that of `conf`; `None`: there is none.
    pub fn next_generation(conf: u64) -> Option<u64> {
        ((conf >> GENERATION_BITS) + 1).checked_mul(1 << GENERATION_BITS)
    }
}

/// 128 random bits in hexadecimal: the identity of a cluster, a node's directory or a session.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct RandomId(pub [u8; 16]);

/// Identity of a cluster, drawn by the node that forms it.
pub type ClusterId = RandomId;

/// Identity of a node's data directory, drawn when it is made.
pub type StoreId = RandomId;

/// Identity of a client's session, drawn by the client.
pub type SessionId = RandomId;

/// Identity of a snapshot file, drawn when it is begun: what a receiver has of one stream never goes
/// on with another.
pub type StreamId = RandomId;

impl RandomId {
    /// Draws a new one from the operating system's generator.
    pub fn random() -> RandomId {
        RandomId(rand::random())
    }

    /// Reads one from wire or disk; `None` unless there are exactly 16 bytes.
    pub fn from_slice(bytes: &[u8]) -> Option<RandomId> {
        bytes.try_into().ok().map(RandomId)
    }
}

impl fmt::Display for RandomId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for RandomId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
