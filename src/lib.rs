//! Pontoon: a sharded, replicated, strongly consistent key-value store. Many Rafts, one bridge.
//!
//! A cluster is a set of nodes. It holds databases; a database has P shards; a shard is a Raft group
//! of R replicas on R nodes. Shard 0, the metadata shard, holds the map of all that.
//!
//! Modules, from the ground up (imports point downward only):
//!
//! | module | what it is |
//! |---|---|
//! | [`ids`], [`limits`], [`schema`], [`codec`], [`refusal`], [`settings`], [`telemetry`], [`version`], [`failpoints`] | the ground floor |
//! | [`transport`] | framed Cap'n Proto between nodes |
//! | [`placement`] | key → shard → nodes; the cluster map; plans: pure |
//! | [`storage`] | raft log and state behind traits |
//! | [`machine`] | state machines: key-value, metadata |
//! | [`group`] | sans-I/O driver of one raft group: inputs in, effects out |
//! | [`balance`] | the reconciler: which replica moves next: pure |
//! | [`sim`] | the same core under simulated time, network and disk |
//! | [`node`] | the actors: supervisor, replicas, peer links; threads, flush, fsync |
//! | [`client`] | the client library |
//! | [`rpc`] | Cap'n Proto services for clients |
//! | [`cli`] | the subcommands of the `pontoon` binary |
//!
//! To read the source, start with `group`, then `node::replica`, then follow a write down to
//! `storage` and up to `rpc`; docs/architecture.md walks that path.

pub mod balance;
pub mod cli;
pub mod client;
pub mod codec;
pub mod failpoints;
pub mod group;
pub mod ids;
pub mod limits;
pub mod machine;
mod nice;
pub mod node;
pub mod placement;
pub mod refusal;
pub mod rpc;
pub mod schema;
pub mod settings;
pub mod sim;
pub mod storage;
pub mod telemetry;
pub mod transport;
pub mod version;
