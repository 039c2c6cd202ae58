//! Redo files kept for snapshots: from the moment a scan begins until it has ended, every flush that
//! holds writes of the replica leaves a second name (a hard link) of its redo file behind, so that the
//! writes can be laid over what the scan saw. The flush itself waits for nothing.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use super::atomic_file::io_error;
use super::engine::Engine;
use super::state::StateHeader;
use super::{StorageError, keys};
use crate::ids::ReplicaId;
use crate::limits::SNAPSHOT_REDO_BYTES_MAX;

/// Ending of the second names.
pub(super) const LINK: &str = "link";

/// A collection that runs in a [`super::flush::Flusher`]. It ends there when this is dropped.
#[derive(Debug)]
pub struct Collection {
    /// Whose redo sections are kept.
    pub replica: ReplicaId,
    /// Of which generation.
    pub generation: u32,
    /// Where the state stood that the engine held when it began.
    pub base: StateHeader,
    number: u64,
    _wanted: Arc<()>,
}

impl Collection {
    /// Its name in the flusher.
    pub fn number(&self) -> u64 {
        self.number
    }
}

/// The redo files of an ended collection, oldest first. They are removed when this is dropped.
#[derive(Default, Debug)]
pub struct Collected {
    /// Sequence number and second name of each.
    pub files: Vec<(u64, PathBuf)>,
}

impl Drop for Collected {
    fn drop(&mut self) {
        for (_, path) in &self.files {
            // One that stays is removed at the next start.
            if let Err(error) = std::fs::remove_file(path) {
                tracing::warn!(path = %path.display(), %error, "a redo file kept for a snapshot stays");
            }
        }
    }
}

/// The collections of a flusher.
#[derive(Default)]
pub(super) struct Collections {
    running: Vec<Running>,
    begun: u64,
}

struct Running {
    number: u64,
    replica: ReplicaId,
    generation: u32,
    dir: PathBuf,
    wanted: Weak<()>,
    collected: Collected,
    bytes: u64,
    failed: Option<String>,
}

impl Collections {
    /// Begins one whose files go to `dir`; `None` if the engine holds no state of that generation yet.
    pub fn begin(
        &mut self,
        engine: &dyn Engine,
        replica: ReplicaId,
        generation: u32,
        dir: &Path,
    ) -> Result<Option<Collection>, StorageError> {
        let Some(bytes) = engine.get(&keys::header_key(replica, generation))? else {
            return Ok(None);
        };
        let what = format!("state of replica {replica} (generation {generation})");
        let base = StateHeader::decode(&bytes, &what)?;
        self.begun += 1;
        let wanted = Arc::new(());
        self.running.push(Running {
            number: self.begun,
            replica,
            generation,
            dir: dir.to_owned(),
            wanted: Arc::downgrade(&wanted),
            collected: Collected::default(),
            bytes: 0,
            failed: None,
        });
        Ok(Some(Collection { replica, generation, base, number: self.begun, _wanted: wanted }))
    }

    /// Keeps a durable redo file for each collection that wants it, which `holds` tells. What goes
    /// wrong is told at the end: it must not hold up the flush.
    pub fn keep(&mut self, path: &Path, sequence: u64, holds: impl Fn(ReplicaId, u32) -> bool) {
        self.running.retain(|running| running.wanted.strong_count() > 0);
        for running in &mut self.running {
            if running.failed.is_none()
                && holds(running.replica, running.generation)
                && let Err(reason) = running.keep(path, sequence)
            {
                running.fail(reason);
            }
        }
    }

    /// The replica's state goes: its collections come to nothing.
    pub fn fail(&mut self, replica: ReplicaId, reason: &str) {
        for running in self.running.iter_mut().filter(|running| running.replica == replica) {
            running.fail(reason.to_owned());
        }
    }

    /// Ends one and hands over its files.
    pub fn end(&mut self, collection: &Collection) -> Result<Collected, StorageError> {
        let failed = |reason| StorageError::Engine {
            engine: "snapshot",
            reason: format!("making a snapshot of replica {}: {reason}", collection.replica),
        };
        let Some(at) = self.running.iter().position(|running| running.number == collection.number) else {
            return Err(failed("the flusher doesn't know of it".to_owned()));
        };
        let running = self.running.swap_remove(at);
        match running.failed {
            Some(reason) => Err(failed(reason)),
            None => Ok(running.collected),
        }
    }
}

impl Running {
    fn keep(&mut self, path: &Path, sequence: u64) -> Result<(), String> {
        let size = std::fs::metadata(path).map_err(|e| io_error("reading", path)(e).to_string())?.len();
        self.bytes = self.bytes.saturating_add(size);
        if self.bytes > SNAPSHOT_REDO_BYTES_MAX {
            return Err(format!(
                "more than {SNAPSHOT_REDO_BYTES_MAX} bytes were flushed meanwhile: it is written faster than it is read"
            ));
        }
        let link = self.dir.join(format!("{:016x}-{sequence:016x}.{LINK}", self.number));
        std::fs::hard_link(path, &link).map_err(|e| io_error("linking", &link)(e).to_string())?;
        self.collected.files.push((sequence, link));
        Ok(())
    }

    fn fail(&mut self, reason: String) {
        self.failed = Some(reason);
        self.collected = Collected::default();
        self.bytes = 0;
    }
}
