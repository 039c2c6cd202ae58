//! What all threads of a node use: the log writer, the flush and read threads, snapshots, the network, the
//! memory gauge. Each is safe to call from an arbiter: none of them blocks.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use super::disk::DiskHealth;
use super::flusher::FlushThread;
use super::intake::Intake;
use super::log_writer::LogWriter;
use super::memory::MemoryGauge;
use super::reader::ReadThread;
use super::reluctance::Reluctance;
use super::router::Router;
use super::snapshots::Snapshots;
use crate::codec::peer::NodeHeartbeat;
use crate::group::held::HeldLog;
use crate::group::log::CachedBytes;
use crate::ids::{Incarnation, NodeId, ReplicaId};
use crate::storage::log::LogStore;
use crate::transport::network::PeerNetwork;

/// See the module page. One per node, behind an `Arc`.
pub struct Shared {
    /// This node.
    pub node: NodeId,
    /// Which start of its process.
    pub process: u64,
    /// Ticks of idleness after which its groups go to sleep; 0: they don't.
    pub sleep_ticks: u64,
    /// Replicas that have ended by themselves. See [`NodeHeartbeat::ended`].
    pub ended: AtomicU64,
    /// The raft log of all replicas.
    pub log: Arc<dyn LogStore>,
    /// Its writer.
    pub log_writer: LogWriter,
    /// Before it, for what other nodes send.
    pub intake: Arc<Intake>,
    /// Flushes memtables.
    pub flusher: Arc<FlushThread>,
    /// Reads the state engine.
    pub reader: ReadThread,
    /// Snapshots from and to other nodes.
    pub snapshots: Snapshots,
    /// To other nodes.
    pub network: PeerNetwork,
    /// Shards to replicas, and the cluster map.
    pub router: Arc<Router>,
    /// Memtables of the node.
    pub memory: MemoryGauge,
    /// How its disk is, and the other nodes'.
    pub disk: Arc<DiskHealth>,
    /// Nodes that leadership isn't handed to for now.
    pub reluctance: Reluctance,
    /// The cluster wants this node emptied.
    pub draining: AtomicBool,
    /// Log entries in memory.
    pub cached_entries: Arc<CachedBytes>,
    /// Log that is kept behind snapshots.
    pub held_log: Arc<HeldLog>,
}

impl Shared {
    /// Tells the other nodes that this one is alive, and how it is.
    pub fn heartbeat(&self) {
        self.network.broadcast_heartbeat(NodeHeartbeat {
            node: self.node,
            incarnation: self.process,
            map_version: self.router.map_version(),
            disk_full: self.disk.is_full(),
            map_age_ms: self.router.hearing().age_ms(Instant::now()),
            ended: self.ended.load(Ordering::Relaxed),
        });
    }

    /// Waits until nothing of a dead incarnation can reach the disk any more.
    pub async fn fence(&self, replica: ReplicaId, incarnation: Incarnation) {
        if self.log_writer.fence(replica, incarnation).await.is_err()
            || self.flusher.barrier(replica).await.is_err()
        {
            tracing::debug!("the node's storage threads have ended");
        }
    }
}
