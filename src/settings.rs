//! Settings of a node: TOML and environment to one validated [`Settings`].

use std::net::SocketAddr;
use std::path::PathBuf;

/// Everything an operator can set, validated as a whole. `config/default.toml` documents each key.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// `node.*`
    pub node: NodeSettings,
    /// `client.*`: the port for clients.
    pub client: ListenSettings,
    /// `peer.*`: the port for other nodes.
    pub peer: ListenSettings,
    /// `http.listen`: health and metrics; `None` turns it off.
    pub http_listen: Option<SocketAddr>,
    /// `cluster.*`
    pub cluster: ClusterSettings,
    /// `log.*`
    pub log: LogSettings,
    /// `storage.*`
    pub storage: StorageSettings,
}

/// Who this node is.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeSettings {
    /// A label for people; the cluster gives the NodeId.
    pub id: String,
    /// Where everything is kept.
    pub data_dir: PathBuf,
    /// Failure domain; empty for none.
    pub zone: String,
    /// Share of replicas relative to other nodes, 100 is ordinary.
    pub weight: u32,
    /// Threads that own replicas and client connections; 0: one less than the cores, at least 1.
    pub data_threads: usize,
}

/// A port.
#[derive(Clone, Debug, PartialEq)]
pub struct ListenSettings {
    /// Address to listen on.
    pub listen: SocketAddr,
    /// HOST:PORT that others dial; defaults to `listen`.
    pub advertise: String,
}

/// Which cluster, and how to get into it.
#[derive(Clone, Debug, PartialEq)]
pub struct ClusterSettings {
    /// Its name, for people.
    pub name: String,
    /// Peer addresses of all first nodes, the same list in each file; the first of them forms the cluster.
    pub initial: Vec<String>,
    /// Peer addresses of members to join through.
    pub join: Vec<String>,
}

/// Format of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// What is logged, and how.
#[derive(Clone, Debug, PartialEq)]
pub struct LogSettings {
    /// A level or filter directives as `info,pontoon::group=debug`.
    pub level: String,
    /// The format.
    pub format: LogFormat,
}

/// Bounds of memory and disk.
#[derive(Clone, Debug, PartialEq)]
pub struct StorageSettings {
    /// Cache of the state engine, in bytes.
    pub cache_bytes: u64,
    /// Memtables of all replicas together, in bytes: above, the largest are flushed; above twice
    /// this, applying pauses.
    pub memtable_bytes: u64,
    /// Size of one raft log file, in bytes.
    pub log_file_bytes: u64,
    /// Raft log size above which old entries are flushed and compacted, in bytes.
    pub log_bytes: u64,
    /// Log files prepared ahead for reuse.
    pub log_spare_files: usize,
}
