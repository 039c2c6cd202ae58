//! How the disks of the cluster are: whether this node's has room for new values and moves at all, and
//! which other nodes say that theirs has none.
//!
//! Below the reserve the node takes no new values, so that what is left serves what must go on: deletes,
//! which make room, votes, what leaders elsewhere send, the flushes and compactions that shorten the
//! log. It takes them again when there is a little more than the reserve, so that one write around it
//! doesn't turn the node to and fro.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::ids::NodeId;
use crate::limits;
use crate::storage::StorageError;
use crate::telemetry::metrics as names;

/// By how much of the reserve free space must exceed it before new values are taken again: an eighth.
const MARGIN: u64 = 8;

/// See the module page. One per node.
#[derive(Default)]
pub struct DiskHealth {
    free: AtomicU64,
    full: AtomicBool,
    stalled: AtomicBool,
    /// Nodes that said that their disk is full, and when they last did.
    others: Mutex<HashMap<NodeId, Instant>>,
    /// How many these are, to be read without the lock.
    others_full: AtomicUsize,
    #[cfg(feature = "test-hooks")]
    pretended: Mutex<Option<u64>>,
    #[cfg(feature = "test-hooks")]
    keeps_leading: AtomicBool,
}

impl DiskHealth {
    /// Whether this node has too little space for new values.
    pub fn is_full(&self) -> bool {
        self.full.load(Ordering::Relaxed)
    }

    /// Free bytes, as last measured.
    pub fn free_bytes(&self) -> u64 {
        self.free.load(Ordering::Relaxed)
    }

    /// So many bytes are free, and `reserve` should be.
    pub fn measured(&self, free: u64, reserve: u64) {
        #[cfg(feature = "test-hooks")]
        let free = self.pretended.lock().unwrap_or_else(PoisonError::into_inner).unwrap_or(free);
        self.free.store(free, Ordering::Relaxed);
        let enough = reserve.saturating_add(reserve / MARGIN);
        let was = self.is_full();
        let full = if was { free < enough } else { free < reserve };
        if full != was {
            self.full.store(full, Ordering::Relaxed);
            if full {
                tracing::warn!(
                    free,
                    reserve,
                    "the disk is nearly full: no new values are taken until there is space again"
                );
            } else {
                tracing::info!(free, reserve, "the disk has room again: new values are taken");
            }
        }
        metrics::gauge!(names::DISK_FREE_BYTES).set(free as f64);
        metrics::gauge!(names::READ_ONLY).set(f64::from(u8::from(full)));
    }

    /// A write of the raft log has been under way for so long. True if that is a stall; the first to
    /// notice says so.
    pub fn stalls(&self, under_way: Duration) -> bool {
        let stalls = under_way > Duration::from_millis(limits::LOG_STALL_MS);
        if self.stalled.swap(stalls, Ordering::Relaxed) != stalls {
            if stalls {
                metrics::counter!(names::LOG_STALLS).increment(1);
                tracing::warn!(?under_way, "the raft log's disk hangs: leaders of this node hand over");
            } else {
                tracing::info!("the raft log's disk moves again");
            }
        }
        #[cfg(feature = "test-hooks")]
        let stalls = stalls && !self.keeps_leading.load(Ordering::Relaxed);
        stalls
    }

    /// Another node says how its disk is.
    pub fn heard(&self, node: NodeId, full: bool) {
        // Once in a while per node: most of them say no, and then there is nothing to lock for.
        if !full && self.others_full.load(Ordering::Relaxed) == 0 {
            return;
        }
        let mut others = self.others();
        if full {
            others.insert(node, Instant::now());
        } else {
            others.remove(&node);
        }
        self.others_full.store(others.len(), Ordering::Relaxed);
    }

    /// Whether any other node said that it is full.
    pub fn any_other_full(&self) -> bool {
        self.others_full.load(Ordering::Relaxed) > 0
    }

    /// Whether that node said so lately. What a node said that isn't heard any more is forgotten.
    pub fn is_full_on(&self, node: NodeId) -> bool {
        let lately = Duration::from_millis(limits::DISK_NEWS_MS_MAX);
        self.any_other_full() && self.others().get(&node).is_some_and(|heard| heard.elapsed() < lately)
    }

    fn others(&self) -> MutexGuard<'_, HashMap<NodeId, Instant>> {
        self.others.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Test hook: from the next look on, so much seems to be free; `None`: what really is.
    #[cfg(feature = "test-hooks")]
    pub fn pretend(&self, free: Option<u64>) {
        *self.pretended.lock().unwrap_or_else(PoisonError::into_inner) = free;
    }

    /// Test hook: leaders stay where they are when the disk stalls.
    #[cfg(feature = "test-hooks")]
    pub fn keep_leading(&self) {
        self.keeps_leading.store(true, Ordering::Relaxed);
    }
}

/// Looks at the free space now and then, for as long as it is polled. On a thread that may wait for the
/// disk.
pub async fn watch(disk: Arc<DiskHealth>, dir: PathBuf, reserve: u64) {
    loop {
        let path = dir.clone();
        match tokio::task::spawn_blocking(move || free_bytes(&path)).await {
            Ok(Ok(free)) => disk.measured(free, reserve),
            // What was last measured holds.
            Ok(Err(error)) => tracing::warn!(%error, "measuring the free space of the data directory"),
            Err(error) => tracing::debug!(%error, "measuring the free space of the data directory"),
        }
        tokio::time::sleep(Duration::from_millis(limits::DISK_WATCH_MS)).await;
    }
}

/// Bytes that may still be written below `dir`, which need not exist yet.
pub fn free_bytes(dir: &Path) -> io::Result<u64> {
    #[cfg(feature = "test-hooks")]
    if let Some(free) = std::env::var("PONTOON_TEST_FREE_BYTES").ok().and_then(|free| free.parse().ok()) {
        return Ok(free);
    }
    let mut at = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    loop {
        match rustix::fs::statvfs(at) {
            Ok(found) => return Ok(found.f_bavail.saturating_mul(found.f_frsize)),
            Err(rustix::io::Errno::NOENT) => match at.parent() {
                Some(parent) if !parent.as_os_str().is_empty() => at = parent,
                Some(_) => at = Path::new("."),
                None => return Err(rustix::io::Errno::NOENT.into()),
            },
            Err(error) => return Err(error.into()),
        }
    }
}

/// Whether a node may be started in `dir` at all, before anything there is touched: opening stores in no
/// space would leave them half done.
///
/// # Errors
/// A [`StorageError::is_full`], if there is too little space.
pub fn room_to_start(dir: &Path, free: u64) -> Result<(), StorageError> {
    if free >= limits::START_FREE_BYTES_MIN {
        return Ok(());
    }
    let why = format!(
        "its disk has {free} bytes free, and a node needs {} to start; nothing was changed",
        limits::START_FREE_BYTES_MIN
    );
    let source = io::Error::new(io::ErrorKind::StorageFull, why);
    Err(StorageError::Io { action: "starting a node in", path: dir.to_path_buf(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_near_its_reserve_doesnt_turn_to_and_fro() {
        let disk = DiskHealth::default();
        for (free, full) in [(800, false), (799, true), (800, true), (899, true), (900, false), (800, false)]
        {
            disk.measured(free, 800);
            assert_eq!((disk.is_full(), disk.free_bytes()), (full, free));
        }
        disk.measured(0, 0);
        assert!(!disk.is_full(), "without a reserve it goes on to the end");
    }

    #[test]
    fn what_others_say_holds_until_they_say_otherwise() {
        let disk = DiskHealth::default();
        disk.heard(NodeId(2), false);
        assert!(!disk.any_other_full());
        disk.heard(NodeId(2), true);
        disk.heard(NodeId(3), false);
        assert!(disk.is_full_on(NodeId(2)) && !disk.is_full_on(NodeId(3)));
        disk.heard(NodeId(2), false);
        assert!(!disk.any_other_full() && !disk.is_full_on(NodeId(2)));
    }

    #[test]
    fn the_space_of_a_directory_to_be_is_that_of_its_parent() {
        let dir = tempfile::tempdir().unwrap();
        assert!(free_bytes(&dir.path().join("a/b")).unwrap() > 0);
        assert!(free_bytes(Path::new("not-here")).unwrap() > 0);
        assert!(room_to_start(dir.path(), limits::START_FREE_BYTES_MIN).is_ok());
        let error = room_to_start(dir.path(), limits::START_FREE_BYTES_MIN - 1).unwrap_err();
        assert!(error.is_full(), "{error}");
    }
}
