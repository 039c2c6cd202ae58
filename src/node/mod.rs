//! The composition root and the actors of one node.
//!
//! | thread | what runs on it | may it block? |
//! |---|---|---|
//! | data arbiters (K) | [`replica::ReplicaActor`]s, their [`hub::Hub`], client connections, peer connections | never |
//! | control arbiter | [`supervisor::Supervisor`], the metadata replica, HTTP, membership | never |
//! | log writer | one gathered write and sync at a time, for all replicas | on the disk |
//! | flush thread | one flush of frozen memtables at a time | on the disk |
//! | read thread | queries that memory can't answer | on the disk |
//! | snapshot thread | one snapshot made and one loaded at a time, in turns ([`snapshots`]) | on the disk and the flush thread |
//! | sending thread | snapshots on their way to other nodes | never for long |
//! | stall thread | whether the state store hangs ([`stall`]) | never |
//!
//! What crosses threads crosses in batches. A panic in a replica ends that replica; a panic in
//! anything shared (a hub, the supervisor, a thread of the table's lower half) is fatal for the node:
//! [`RunningNode::failed`] tells, and the process ends with exit code 70.

pub mod claims;
pub mod counting;
pub mod digest;
pub mod disk;
pub mod fatal;
#[cfg(test)]
mod fence_tests;
pub mod flusher;
pub mod gather;
pub mod handle;
pub mod hearing;
#[cfg(feature = "test-hooks")]
mod hooks;
pub mod hub;
pub mod intake;
pub mod load;
pub mod log_writer;
pub mod map_cache;
pub mod membership;
pub mod memory;
pub mod messages;
pub mod open;
mod opening;
pub mod panics;
mod patience;
pub mod reader;
pub mod reconciler;
mod recover;
pub mod reluctance;
pub mod removal;
pub mod replica;
pub mod replicas;
pub mod roster;
pub mod router;
pub mod service;
pub mod shared;
pub mod snapshots;
pub mod stall;
pub mod start;
mod state_store;
mod stores;
pub mod supervisor;
pub mod survey;
#[cfg(test)]
mod test_node;
pub mod ticker;
pub mod ticket;
pub mod trace;
mod transfer;
#[cfg(test)]
mod view_tests;

use std::net::TcpListener;

use crate::storage::StorageError;

pub use start::{RunningNode, start, start_rejoining};

/// The ports of a node, bound by the caller, so that an address in use is found before anything is
/// created, and a port 0 is known before it is advertised.
pub struct Listeners {
    /// For clients.
    pub client: TcpListener,
    /// For other nodes.
    pub peer: TcpListener,
    /// For health and metrics.
    pub http: Option<TcpListener>,
}

/// Why a node doesn't start or can't go on.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// Its data directory or a store in it.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// It can't become a member of the cluster.
    #[error("{0}")]
    Membership(String),
    /// It was removed from its cluster, and what it held is gone.
    #[error("{0}")]
    Removed(String),
    /// Its state store hangs; its process must end (exit 70).
    #[error(transparent)]
    Stalled(#[from] stall::Stalled),
    /// A thread of the node failed; its process must end (exit 70).
    #[error("{0}")]
    Fatal(String),
}
