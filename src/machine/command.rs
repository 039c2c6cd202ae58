//! Commands, replies, queries and answers, and their limits. Their form in a log entry is
//! [`super::entry`]'s.

use bytes::Bytes;

use crate::ids::{ClusterId, DatabaseId, NodeId, ReplicaId, ShardId};
use crate::limits;
use crate::placement::map::{
    DatabaseRecord, Member, MoveCause, NodeRecord, RebalanceState, ShardRecord, Standing,
};
use crate::placement::plan::PlannedShard;
pub use crate::placement::rebalance::PlannedTarget;
use crate::refusal::Refusal;

pub use super::entry::{Entry, TaggedCommand, decode_entry, encode_entry};
use super::session::SessionReply;

/// What a state machine executes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Command {
    /// For a shard of a database.
    Kv(KvCommand),
    /// For the metadata shard.
    Meta(MetaCommand),
}

/// A write to one key.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum KvCommand {
    /// Set the key's value.
    Put {
        /// The key.
        key: Bytes,
        /// Its new value.
        value: Bytes,
    },
    /// Remove the key.
    Delete {
        /// The key.
        key: Bytes,
    },
    /// Set the key's value if `expect` holds.
    Cas {
        /// The key.
        key: Bytes,
        /// The condition.
        expect: Expect,
        /// Its new value.
        value: Bytes,
    },
}

/// The condition of a compare-and-set.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Expect {
    /// The key must not exist.
    Absent,
    /// Its value must equal this.
    Value(Bytes),
    /// Its version must equal this.
    Version(u64),
}

/// A value and the shard revision that wrote it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Versioned {
    /// The value.
    pub value: Bytes,
    /// The revision.
    pub version: u64,
}

/// What the key-value machine answers to a command.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum KvReply {
    /// Put or cas: done, with the key's new version.
    Written(u64),
    /// Delete: done, with the version of the deletion.
    Deleted(u64),
    /// Delete: there was no such key; nothing changed.
    Absent,
    /// Cas: the condition didn't hold; nothing changed. What is there instead.
    Mismatch(Option<Versioned>),
}

/// A change of the cluster map.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum MetaCommand {
    /// The first content of a cluster. Repeating it changes nothing.
    Form {
        /// Identity of the cluster.
        cluster_id: ClusterId,
        /// Its first nodes, with their ids.
        nodes: Vec<NodeRecord>,
        /// The metadata shard itself.
        metadata: Box<ShardRecord>,
    },
    /// Add a node (`id` 0) or, for a known store id, update its addresses, zone, weight and label.
    AddNode(NodeRecord),
    /// Create a database with shards as planned by the proposer.
    CreateDatabase {
        /// Its name.
        name: String,
        /// Voters per shard.
        replicas: u32,
        /// Its shards, in ascending order of range, covering the ring.
        shards: Vec<PlannedShard>,
    },
    /// Remove a database.
    DropDatabase {
        /// Its name.
        name: String,
        /// Only the one of this id; else whichever has the name when the command is applied. Whoever repeats
        /// the command names it: meanwhile another may have got the name.
        id: Option<DatabaseId>,
    },
    /// What a shard says of its own members. Counts if the conf version is greater than the record's: the
    /// shard is the truth, and the map follows.
    ObserveShard {
        /// The shard.
        shard: ShardId,
        /// Its conf version.
        conf: u64,
        /// Its members as of that.
        members: Vec<Member>,
    },
    /// Begin to change the members of a shard.
    BeginMove {
        /// The shard.
        shard: ShardId,
        /// The conf version that the proposer knew; with another the move is stale.
        conf: u64,
        /// Nodes that get a replica.
        adds: Vec<NodeId>,
        /// Replicas that go.
        removes: Vec<ReplicaId>,
        /// Why.
        cause: MoveCause,
    },
    /// Roll a move back, if it hasn't come to the joint change; else let it end.
    CancelMove {
        /// The shard.
        shard: ShardId,
        /// The move's id.
        id: u64,
    },
    /// The members of a shard, as observed, show that its move is done or rolled back.
    EndMove {
        /// The shard.
        shard: ShardId,
        /// The move's id.
        id: u64,
    },
    /// Decide about a node.
    SetStanding {
        /// The node.
        node: NodeId,
        /// Its standing from now on.
        standing: Standing,
    },
    /// Change one setting of the cluster.
    SetPolicy(PolicyChange),
    /// Give shards targets: a rebalancing begins.
    BeginRebalance {
        /// Names the plan; above 0.
        plan: u64,
        /// The plan that it takes back, which must be the last then; 0: none.
        undoes: u64,
        /// Shards that are to move.
        targets: Vec<PlannedTarget>,
        /// Replicas to move in all.
        moves: u32,
        /// Bytes of those.
        bytes: u64,
    },
    /// Change the state of the last rebalancing.
    ControlRebalance {
        /// Its plan.
        plan: u64,
        /// What becomes of it.
        state: RebalanceState,
        /// Why, if it failed or is cancelled.
        reason: String,
    },
    /// How many voters each shard of a database should have from now on.
    SetReplicas {
        /// Name of the database.
        name: String,
        /// Voters per shard.
        replicas: u32,
    },
    /// A shard's majority is lost for good: one replica goes on alone, under a conf version above all that
    /// the shard ever had.
    RecoverShard {
        /// The shard.
        shard: ShardId,
        /// The replica.
        keep: ReplicaId,
        /// The conf version.
        conf: u64,
    },
    /// A decision of somebody who knew the map of a version: it counts only if its record hasn't changed since, or
    /// is so already. However late it comes, and how often, it never undoes a newer one.
    Order {
        /// That version.
        seen: u64,
        /// What is decided: one of [`MetaCommand::is_order`].
        command: Box<MetaCommand>,
    },
}

impl MetaCommand {
    /// Whether it is a decision about one record, which another decision may follow: repeated late, it would undo
    /// that. So it is given as an [`MetaCommand::Order`], or, by itself, once.
    pub fn is_order(&self) -> bool {
        matches!(
            self,
            MetaCommand::SetStanding { .. }
                | MetaCommand::SetPolicy(_)
                | MetaCommand::SetReplicas { .. }
                | MetaCommand::BeginRebalance { .. }
                | MetaCommand::ControlRebalance { .. }
        )
    }

    /// As [`Command::size`].
    fn size(&self) -> usize {
        match self {
            MetaCommand::CreateDatabase { shards, .. } => 256 + shards.len() * 128,
            MetaCommand::BeginRebalance { targets, .. } => 256 + targets.len() * 128,
            MetaCommand::Form { nodes, .. } => 1024 + nodes.len() * 1024,
            MetaCommand::ControlRebalance { reason, .. } => 256 + reason.len(),
            MetaCommand::Order { command, .. } => 64 + command.size(),
            _ => 1024,
        }
    }

    /// The command as a decision of somebody who knew map version `seen`; 0: as it is.
    ///
    /// # Panics
    /// If it is none that [can be](MetaCommand::is_order).
    pub fn seen(self, seen: u64) -> MetaCommand {
        assert!(self.is_order(), "{self:?} is no order");
        if seen == 0 { self } else { MetaCommand::Order { seen, command: Box::new(self) } }
    }
}

/// One setting of the cluster; see [`crate::placement::map::PolicyRecord`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PolicyChange {
    /// Milliseconds.
    ReplaceAfterMs(u64),
    /// Shards.
    MovesAtATime(u32),
    /// Bytes.
    BytesPerSecond(u64),
    /// On or off.
    Automatic(bool),
    /// On or off.
    ApproveJoins(bool),
}

/// What the metadata machine answers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum MetaReply {
    /// Form: the map version.
    Formed(u64),
    /// AddNode: the node's id.
    Node(NodeId),
    /// CreateDatabase, DropDatabase: the record, and whether the command made it.
    Database {
        /// The database as it now is.
        record: DatabaseRecord,
        /// False if it was there already with the same numbers.
        created: bool,
    },
    /// All other commands: it is so now, whether or not it was before. The map version.
    Done(u64),
    /// The command breaks a rule; nothing changed.
    Refused(MetaRefusal),
}

/// Why the metadata shard refuses a command.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum MetaRefusal {
    /// Form: this cluster was formed with another identity.
    #[error("this cluster is {have}, not {asked}")]
    OtherCluster {
        /// Identity it has.
        have: ClusterId,
        /// Identity in the command.
        asked: ClusterId,
    },
    /// CreateDatabase: the name is taken by a database with other numbers.
    #[error("database `{name}` exists with {replicas} replicas and {shards} shards")]
    NameTaken {
        /// The name.
        name: String,
        /// Replicas of the one that is there.
        replicas: u32,
        /// Shards of the one that is there.
        shards: usize,
    },
    /// No database of this name, or none of it and the id.
    #[error("there is no database `{0}`")]
    UnknownDatabase(String),
    /// The command names a node that isn't a member.
    #[error("node {0} is not a member of the cluster")]
    UnknownNode(NodeId),
    /// CreateDatabase, SetReplicas: name, counts or ranges break a rule.
    #[error("invalid plan: {0}")]
    InvalidPlan(String),
    /// The cluster isn't formed yet.
    #[error("the cluster is not formed yet")]
    NotFormed,
    /// The proposer knew an older state of this.
    #[error("{0} has changed meanwhile")]
    Stale(String),
    /// SetStanding: a node that holds replicas can't be removed.
    #[error("node {node} holds replicas of {total} shards still, {} among them", list(.shards))]
    NodeInUse {
        /// The node.
        node: NodeId,
        /// The first few of them.
        shards: Vec<ShardId>,
        /// How many there are.
        total: u32,
    },
    /// AddNode, SetStanding: the node was removed, which is for good.
    #[error(
        "node {0} was removed from the cluster; it can only come back with an empty data directory, as a new node"
    )]
    NodeRemoved(NodeId),
    /// Another rule of the map, in words.
    #[error("{0}")]
    NotAllowed(String),
    /// Order: its record has changed since its giver looked.
    #[error("{}", changed(.what, .version))]
    Changed {
        /// What has.
        what: String,
        /// The map version at which it did.
        version: u64,
    },
    /// A rule of a newer version of the program, in its words. Never made here, only read.
    #[error("{0}")]
    Other(String),
}

fn changed(what: &str, version: &u64) -> String {
    Refusal::Changed { what: what.to_owned(), version: *version }.to_string()
}

fn list(shards: &[ShardId]) -> String {
    shards.iter().map(ShardId::to_string).collect::<Vec<_>>().join(", ")
}

impl From<MetaRefusal> for Refusal {
    fn from(refusal: MetaRefusal) -> Refusal {
        match refusal {
            MetaRefusal::UnknownDatabase(name) => Refusal::UnknownDatabase(name),
            MetaRefusal::Changed { what, version } => Refusal::Changed { what, version },
            other => Refusal::Refused(other.to_string()),
        }
    }
}

/// A read of a shard's state.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Query {
    /// One key.
    Get {
        /// The key.
        key: Bytes,
    },
    /// One page of keys in order.
    Scan {
        /// Only keys that begin so.
        prefix: Bytes,
        /// Only keys greater than this; empty: from the start.
        after: Bytes,
        /// At most so many pairs (0: no limit of the caller's); bounded further by `limits::SCAN_PAIRS_MAX` and `SCAN_BYTES_MAX`.
        limit: usize,
        /// Leave out the values.
        keys_only: bool,
    },
}

/// What a query finds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Answer {
    /// Get: the value, if the key exists.
    Value(Option<Versioned>),
    /// Scan: the pairs, and whether there are more.
    Page {
        /// Keys and values in key order.
        pairs: Vec<(Bytes, Versioned)>,
        /// True: ask again after the last key.
        more: bool,
    },
}

/// What a state machine answers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Reply {
    /// From the key-value machine.
    Kv(KvReply),
    /// From the metadata machine.
    Meta(MetaReply),
    /// From the session table: the command was not executed.
    Session(SessionReply),
}

/// Bytes that are not a command or an entry this version understands.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FormatError {
    /// The bytes end too early.
    #[error("the bytes end within {0}")]
    Truncated(&'static str),
    /// A format version or a kind of command that this version doesn't know.
    #[error("unknown {what} {value}")]
    Unknown {
        /// What has the number.
        what: &'static str,
        /// The number.
        value: u64,
    },
    /// The metadata command inside can't be read.
    #[error("unreadable metadata command: {0}")]
    Metadata(String),
    /// The content contradicts itself.
    #[error("malformed {0}")]
    Malformed(&'static str),
    /// A command for another machine.
    #[error("the command is for another kind of shard")]
    WrongMachine,
}

/// A command or query breaks a limit; it is refused before it is proposed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum LimitError {
    /// Keys have at least one byte.
    #[error("the key is empty; a key has 1 to {most} bytes", most = limits::KEY_BYTES_MAX)]
    EmptyKey,
    /// Something is too long.
    #[error("the {what} has {bytes} bytes; the limit is {most}")]
    TooLong {
        /// What.
        what: &'static str,
        /// Its length.
        bytes: usize,
        /// The greatest length.
        most: usize,
    },
}

impl From<LimitError> for Refusal {
    fn from(error: LimitError) -> Refusal {
        Refusal::Invalid(error.to_string())
    }
}

/// Checks a key against the limits.
pub fn check_key(key: &[u8]) -> Result<(), LimitError> {
    if key.is_empty() {
        return Err(LimitError::EmptyKey);
    }
    check_length("key", key, limits::KEY_BYTES_MAX)
}

/// Checks a value against the limits.
pub fn check_value(value: &[u8]) -> Result<(), LimitError> {
    check_length("value", value, limits::VALUE_BYTES_MAX)
}

/// Checks a write against the limits. Applying doesn't: whoever proposes a command must have checked it.
pub fn check(command: &KvCommand) -> Result<(), LimitError> {
    match command {
        KvCommand::Put { key, value } => {
            check_key(key)?;
            check_value(value)
        }
        KvCommand::Delete { key } => check_key(key),
        KvCommand::Cas { key, expect, value } => {
            check_key(key)?;
            if let Expect::Value(expected) = expect {
                check_length("expected value", expected, limits::VALUE_BYTES_MAX)?;
            }
            check_value(value)
        }
    }
}

/// Checks a query against the limits.
pub fn check_query(query: &Query) -> Result<(), LimitError> {
    match query {
        Query::Get { key } => check_key(key),
        Query::Scan { prefix, after, .. } => {
            check_length("prefix", prefix, limits::KEY_BYTES_MAX)?;
            check_length("key to scan after", after, limits::KEY_BYTES_MAX)
        }
    }
}

fn check_length(what: &'static str, bytes: &[u8], most: usize) -> Result<(), LimitError> {
    if bytes.len() > most {
        let bytes = bytes.len();
        return Err(LimitError::TooLong { what, bytes, most });
    }
    Ok(())
}

impl Command {
    /// Whether applying it looks at what is there.
    pub fn reads(&self) -> bool {
        !matches!(self, Command::Kv(KvCommand::Put { .. }))
    }

    /// Bytes this command takes in a log entry, about; for batching and limits.
    pub fn size(&self) -> usize {
        match self {
            Command::Kv(KvCommand::Put { key, value }) => 16 + key.len() + value.len(),
            Command::Kv(KvCommand::Delete { key }) => 16 + key.len(),
            Command::Kv(KvCommand::Cas { key, expect, value }) => {
                let expected = if let Expect::Value(value) = expect { value.len() } else { 0 };
                24 + key.len() + value.len() + expected
            }
            Command::Meta(command) => command.size(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(command: &KvCommand) -> String {
        check(command).unwrap_err().to_string()
    }

    #[test]
    fn limits_are_named_with_what_was_asked() {
        let bytes = |len: usize| Bytes::from(vec![0; len]);
        let cas = |expect, value| KvCommand::Cas { key: bytes(1), expect, value };
        let most = bytes(limits::VALUE_BYTES_MAX);
        let greatest = KvCommand::Put { key: bytes(limits::KEY_BYTES_MAX), value: most.clone() };
        assert_eq!(check(&greatest), Ok(()));
        assert_eq!(check(&cas(Expect::Value(most.clone()), most)), Ok(()));
        assert_eq!(
            refused(&KvCommand::Delete { key: bytes(0) }),
            "the key is empty; a key has 1 to 4096 bytes"
        );
        assert_eq!(
            refused(&KvCommand::Delete { key: bytes(4097) }),
            "the key has 4097 bytes; the limit is 4096"
        );
        let over = bytes(limits::VALUE_BYTES_MAX + 1);
        assert_eq!(
            refused(&cas(Expect::Absent, over.clone())),
            "the value has 8388609 bytes; the limit is 8388608"
        );
        assert_eq!(
            refused(&cas(Expect::Value(over), bytes(0))),
            "the expected value has 8388609 bytes; the limit is 8388608"
        );
        let scan = Query::Scan { prefix: bytes(5000), after: bytes(0), limit: 1, keys_only: false };
        assert_eq!(
            check_query(&scan).unwrap_err().to_string(),
            "the prefix has 5000 bytes; the limit is 4096"
        );
    }
}
