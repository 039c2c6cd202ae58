//! Storage: the raft log of all replicas of a node, and the state that committed entries make.
//!
//! - [`log`]: the trait of the raft log; [`log_disk`] on raft-engine, [`log_memory`] for tests and simulation.
//! - [`engine`]: the trait of the ordered key-value engine under the state; [`engine_sled`], [`engine_fjall`] and
//!   [`engine_memory`]. [`engine_kind`]: which of them a data directory has.
//! - [`sessions`]: what one replica remembers of client sessions.
//! - [`memtable`]: recent applied writes of one replica, by [`table_key`]. [`state`]: one replica's state: memtables over the engine;
//!   [`opened`]: as it is found at a start, whole or lost. `read_cache`: what is known of the engine without asking it.
//! - [`flush`]: freezing memtables into redo files ([`redo`]) and the engine; recovery from redo files. `flush_source`: what
//!   is flushed of each replica; `flush_numbers`: how lost flushes are recognised.
//! - [`sled_files`], [`sled_record`], `sled_sums`: what sled's files need, how it stores a value, and how
//!   damage is seen that it doesn't see itself. `fjall_files`, `fjall_view`, `fjall_compaction`: fjall's files, what
//!   readers see of them, and who merges them.
//! - `owner`: whose a store is. `trust`: whether it may be believed. [`aside`]: what becomes of a damaged state.
//! - [`snapshot`]: a shard's state as a file ([`snapshot_file`]), exact at one index; [`snapshot_dir`]: where
//!   these files are; [`collect`]: what flushes leave for them; [`generations`]: what they are loaded into.
//! - [`digest`]: what a state is, in a few bytes, for comparing replicas.
//! - [`keys`]: the layout of state keys. [`identity`]: who owns a data directory.
//!
//! What is assumed of the disk: data is safe once `fdatasync` on its file (and, for a new or renamed
//! file, `fsync` on its directory) has returned success; a failed sync tells nothing about what is
//! on disk and is never retried; anything else may be lost, torn or old after a crash.

pub mod aside;
mod atomic_file;
pub mod collect;
pub mod digest;
pub mod engine;
pub mod engine_fjall;
pub mod engine_kind;
pub mod engine_memory;
pub mod engine_sled;
mod fjall_compaction;
mod fjall_files;
mod fjall_view;
pub mod flush;
mod flush_batch;
mod flush_numbers;
mod flush_source;
pub mod generations;
mod header;
pub mod identity;
pub mod keys;
pub mod log;
pub mod log_disk;
pub mod log_memory;
pub mod memtable;
mod merge;
pub mod opened;
mod owner;
pub mod pulse;
mod read_cache;
pub mod redo;
pub mod sessions;
mod sled_calls;
pub mod sled_files;
pub mod sled_record;
mod sled_sums;
pub mod snapshot;
pub mod snapshot_dir;
pub mod snapshot_file;
pub mod state;
pub mod table_key;
mod trust;

use std::io::ErrorKind;
use std::ops::Bound;
use std::path::{Path, PathBuf};

use bytes::Bytes;

/// What goes wrong with storage. All of it is local to the node: it is never an answer to a client.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// The operating system refused an operation.
    #[error("{action} {path}: {source}")]
    Io {
        /// What was tried, as "writing", "opening", ….
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A sync failed. What is on disk is unknown: the node must stop, and never retry.
    #[error("syncing {path}: {reason}; what is on disk is unknown, the node must stop")]
    SyncFailed {
        /// The file.
        path: PathBuf,
        /// The reason.
        reason: String,
    },
    /// Bytes on disk fail their checksum, contradict each other, or are missing.
    #[error("{what} is damaged: {detail}")]
    Damaged {
        /// What is damaged.
        what: String,
        /// How that was seen.
        detail: String,
    },
    /// The directory belongs to another cluster, is newer than this program, or is in use.
    #[error("{0}")]
    Identity(#[from] identity::IdentityError),
    /// The log or the state engine reports an error of its own.
    #[error("{engine}: {reason}")]
    Engine {
        /// Which engine.
        engine: &'static str,
        /// Its message.
        reason: String,
    },
    /// A write contradicts what the log holds, which is a bug in the caller. Nothing was written.
    #[error("log of replica {replica}: {reason}; nothing was written")]
    Inconsistent {
        /// Whose log.
        replica: crate::ids::ReplicaId,
        /// What doesn't fit.
        reason: String,
    },
    /// The entries asked for were compacted away.
    #[error("log entries up to {0} are compacted")]
    Compacted(crate::ids::Index),
}

impl StorageError {
    /// Whether there was no space for it. Nothing has happened then that would forbid to try again.
    pub fn is_full(&self) -> bool {
        matches!(self, StorageError::Io { source, .. }
            if matches!(source.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded))
    }

    /// Whether a node that can't open its directory for this reason may have lost what it promised its
    /// cluster to keep. Trying again doesn't help: it can only begin anew, as another node.
    pub fn ends_identity(&self) -> bool {
        use identity::IdentityError::{Damaged, ForeignStore, Nameless};
        matches!(
            self,
            StorageError::Damaged { .. }
                | StorageError::Identity(Damaged { .. } | Nameless { .. } | ForeignStore { .. })
        )
    }
}

/// The path of what belongs to `path` and lies beside it.
fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(ending);
    PathBuf::from(name)
}

/// A shard's state as a state machine reads it: an ordered map from keys to values.
pub trait StateView {
    /// The value of `key`.
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StorageError>;

    /// Calls `visit` with each pair from `from` on, in key order, until it returns false.
    fn scan(
        &self,
        from: Bound<&[u8]>,
        visit: &mut dyn FnMut(&[u8], &Bytes) -> bool,
    ) -> Result<(), StorageError>;

    /// The shard's revision counter.
    fn revision(&self) -> u64;
}

/// A shard's state as a state machine changes it. Changes are visible at once and become part of
/// the state together with the entry that made them.
pub trait StateBatch: StateView {
    /// Sets the value of `key`. `value` is kept as it is and must own its bytes: a slice of a log entry
    /// would keep all of that in memory.
    fn put(&mut self, key: &[u8], value: Bytes);

    /// Removes `key`.
    fn delete(&mut self, key: &[u8]);

    /// Increments the shard's revision counter and returns the new revision.
    fn next_revision(&mut self) -> u64;

    /// Raises the shard's revision counter to `least`, if it is lower: the next revision is a later one.
    fn raise_revision(&mut self, least: u64);

    /// The session table, to be changed.
    fn sessions(&mut self) -> &mut sessions::SessionTable;
}
