//! What all threads of a node use: the log writer, the flush and read threads,
//! snapshots, the network, the
//! memory gauge. Each is safe to call from an arbiter: none of them blocks.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use super::disk::DiskHealth;
use super::flusher::FlushThread;
use super::intake::Intake;
use super::log_writer::LogWriter;
use super::reader::ReadThread;
use super::router::Router;
use super::snapshots::Snapshots;
use crate::codec::peer::NodeHeartbeat;
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
    /// The cluster wants this node emptied.
    pub draining: AtomicBool,
    /// Log entries in memory.
    pub cached_entries: Arc<CachedBytes>,
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

/// Bytes in memtables of all replicas of a node, against their bound; and their sessions, whose tables
/// are bounded per shard.
pub struct MemoryGauge {
    active: AtomicUsize,
    frozen: AtomicUsize,
    sessions: AtomicUsize,
    limit: usize,
}

/// What one replica counts for in a node's gauge: nothing any more once it is dropped, on unwinding too.
pub struct MemoryShare {
    shared: Arc<Shared>,
    bytes: (usize, usize),
    sessions: usize,
}

impl MemoryShare {
    /// Of a replica without memtables.
    pub fn new(shared: Arc<Shared>) -> MemoryShare {
        MemoryShare { shared, bytes: (0, 0), sessions: 0 }
    }

    /// The replica's memtables have so many bytes now, active and frozen.
    pub fn set(&mut self, bytes: (usize, usize)) {
        if bytes != self.bytes {
            self.shared.memory.update(self.bytes, bytes);
            self.bytes = bytes;
        }
    }

    /// Its shard has so many sessions now.
    pub fn set_sessions(&mut self, sessions: usize) {
        if sessions != self.sessions {
            self.shared.memory.update_sessions(self.sessions, sessions);
            self.sessions = sessions;
        }
    }

    /// Bytes in its active memtable.
    pub fn active(&self) -> usize {
        self.bytes.0
    }
}

impl Drop for MemoryShare {
    fn drop(&mut self) {
        self.shared.memory.update(self.bytes, (0, 0));
        self.shared.memory.update_sessions(self.sessions, 0);
    }
}

/// What a replica should do about memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pressure {
    /// Nothing.
    Low,
    /// The largest memtables should be flushed.
    Flush,
    /// Applying should pause until flushes have caught up.
    Pause,
}

impl MemoryGauge {
    /// A gauge with a bound in bytes.
    pub fn new(limit: usize) -> MemoryGauge {
        let zero = || AtomicUsize::new(0);
        MemoryGauge { active: zero(), frozen: zero(), sessions: zero(), limit }
    }

    /// A replica's memtables went from `before` to `after` (active, frozen) bytes.
    pub fn update(&self, before: (usize, usize), after: (usize, usize)) {
        // Wrapping, so that one atomic add does both directions; the sums never go below zero.
        self.active.fetch_add(after.0.wrapping_sub(before.0), Ordering::Relaxed);
        self.frozen.fetch_add(after.1.wrapping_sub(before.1), Ordering::Relaxed);
    }

    /// The sessions of a replica went from `before` to `after`.
    pub fn update_sessions(&self, before: usize, after: usize) {
        self.sessions.fetch_add(after.wrapping_sub(before), Ordering::Relaxed);
    }

    /// Sessions of all replicas.
    pub fn sessions(&self) -> usize {
        self.sessions.load(Ordering::Relaxed)
    }

    /// Bytes in active and in frozen memtables.
    pub fn bytes(&self) -> (usize, usize) {
        (self.active.load(Ordering::Relaxed), self.frozen.load(Ordering::Relaxed))
    }

    /// What the whole node should do. Flushing begins at half the bound, so that the other half takes
    /// what is written while it is under way.
    pub fn pressure(&self) -> Pressure {
        let (active, frozen) = self.bytes();
        if active + frozen > self.limit {
            Pressure::Pause
        } else if active > self.limit / 2 {
            Pressure::Flush
        } else {
            Pressure::Low
        }
    }

    /// Active bytes of one replica above which it flushes by itself.
    pub fn replica_limit(&self) -> usize {
        self.limit / 4
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pressure_follows_the_sums_both_ways() {
        let gauge = MemoryGauge::new(100);
        gauge.update((0, 0), (30, 0));
        gauge.update((0, 0), (25, 0));
        assert_eq!(gauge.pressure(), Pressure::Flush);
        gauge.update((30, 0), (0, 30));
        assert_eq!(gauge.pressure(), Pressure::Low);
        gauge.update((25, 0), (75, 0));
        assert_eq!(gauge.pressure(), Pressure::Pause);
        gauge.update((0, 30), (0, 0));
        gauge.update((75, 0), (0, 0));
        assert_eq!(gauge.bytes(), (0, 0));
        gauge.update_sessions(0, 3);
        gauge.update_sessions(2, 1);
        assert_eq!(gauge.sessions(), 2);
    }
}
