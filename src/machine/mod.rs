//! State machines: what a shard does with its committed commands. Deterministic: the result of
//! applying an entry depends on the entry and the shard's state alone, never on a clock, a random
//! number, a setting, the build or the machine it runs on.
//!
//! - [`command`]: commands, replies, queries, limits. - [`entry`]: the format of a log entry.
//! - [`kv`]: the key-value machine. - [`value`]: the format of a stored value.
//! - [`session`]: which commands clients' sessions let through. - [`meta`]: the metadata shard's machine.
//! - [`memory`]: a state in memory, for models.

pub mod command;
pub mod entry;
pub mod kv;
pub mod memory;
pub mod meta;
pub mod session;
pub mod value;

use bytes::Bytes;

use crate::ids::generation_start;
use crate::storage::{StateBatch, StateView, StorageError};
use command::{Answer, Command, Query, Reply};
use entry::Entry;

/// Why a replica can't go on applying. Every variant stops the replica; a command that is merely
/// refused (a failed cas, a name taken) is a [`Reply`], since all replicas agree on it.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// This node's storage failed; other replicas may be fine.
    #[error("applying a committed command: {0}")]
    Storage(#[from] StorageError),
    /// The entry has a format or a command this version doesn't know. It is never skipped.
    #[error(
        "committed entry can't be understood: {0}; this node is older than the cluster's feature level or its log is damaged"
    )]
    Format(#[from] command::FormatError),
    /// A change of members that no leader of this group can have proposed. Skipped, it would leave the group under a
    /// configuration that others have left.
    #[error("the committed change of members in entry {index} can't be carried out: {reason}")]
    Membership {
        /// The entry.
        index: crate::ids::Index,
        /// What is wrong.
        reason: String,
    },
}

/// Which machine a shard runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MachineKind {
    /// Keys and values.
    Kv,
    /// The metadata shard's.
    Metadata,
}

impl MachineKind {
    /// Applies a whole entry: its commands in order, those of sessions as [`session`] decides. Gives one
    /// reply per command.
    pub fn apply_entry(self, entry: &Entry, state: &mut dyn StateBatch) -> Result<Vec<Reply>, ApplyError> {
        if let Some(stamp) = entry.stamp {
            state.sessions().advance(stamp);
        }
        if let Some(conf) = entry.begins {
            state.raise_revision(generation_start(conf));
        }
        let mut replies = Vec::with_capacity(entry.commands.len());
        for (command, tag) in &entry.commands {
            replies.push(match tag {
                None => self.apply(command, state)?,
                Some(tag) => session::apply(self, command, tag, state)?,
            });
        }
        Ok(replies)
    }

    /// Applies one command, whoever's it is. What it writes goes to `state`, in the order of the calls,
    /// and is seen by the calls that follow.
    pub fn apply(self, command: &Command, state: &mut dyn StateBatch) -> Result<Reply, ApplyError> {
        match (self, command) {
            (MachineKind::Kv, Command::Kv(command)) => Ok(Reply::Kv(kv::apply(command, state)?)),
            (MachineKind::Metadata, Command::Meta(command)) => Ok(Reply::Meta(meta::apply(command, state)?)),
            _ => Err(command::FormatError::WrongMachine.into()),
        }
    }

    /// Answers a get from what the state holds under its key.
    pub fn answer(self, key: &[u8], stored: Option<&Bytes>) -> Result<Answer, ApplyError> {
        match self {
            MachineKind::Kv => Ok(Answer::Value(kv::read(key, stored)?)),
            MachineKind::Metadata => Err(command::FormatError::WrongMachine.into()),
        }
    }

    /// Answers a query from the state.
    pub fn query(self, query: &Query, state: &dyn StateView) -> Result<Answer, ApplyError> {
        match self {
            MachineKind::Kv => Ok(kv::query(query, state)?),
            MachineKind::Metadata => Err(command::FormatError::WrongMachine.into()),
        }
    }
}
