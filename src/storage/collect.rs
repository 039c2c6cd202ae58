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

/// What an ended collection has.
#[derive(Debug)]
pub struct Collected {
    /// Where the state stands that the engine holds at the end.
    pub header: StateHeader,
    /// The redo files that lead there from [`Collection::base`].
    pub files: RedoLinks,
}

/// Redo files by their second names, oldest first. They are removed when this is dropped.
#[derive(Default, Debug)]
pub struct RedoLinks {
    /// Sequence number and name of each.
    pub links: Vec<(u64, PathBuf)>,
}

impl Drop for RedoLinks {
    fn drop(&mut self) {
        for (_, path) in &self.links {
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
    files: RedoLinks,
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
        let Some(base) = header(engine, replica, generation)? else {
            return Ok(None);
        };
        self.begun += 1;
        let wanted = Arc::new(());
        self.running.push(Running {
            number: self.begun,
            replica,
            generation,
            dir: dir.to_owned(),
            wanted: Arc::downgrade(&wanted),
            files: RedoLinks::default(),
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

    /// Ends one and hands over what it has.
    pub fn end(&mut self, engine: &dyn Engine, collection: &Collection) -> Result<Collected, StorageError> {
        let Collection { replica, generation, .. } = *collection;
        let failed = |reason: String| StorageError::Engine {
            engine: "snapshot",
            reason: format!("making a snapshot of replica {replica}: {reason}"),
        };
        let Some(at) = self.running.iter().position(|running| running.number == collection.number) else {
            return Err(failed("the flusher doesn't know of it".into()));
        };
        let running = self.running.swap_remove(at);
        if let Some(reason) = running.failed {
            return Err(failed(reason));
        }
        // The header is the first thing to go when a generation is destroyed: as long as it is there,
        // nothing was missing under the scan.
        let header = header(engine, replica, generation)?
            .ok_or_else(|| failed(format!("generation {generation} was destroyed meanwhile")))?;
        Ok(Collected { header, files: running.files })
    }
}

/// Where the state of a generation stands in the engine; `None` if it holds none.
pub(super) fn header(
    engine: &dyn Engine,
    replica: ReplicaId,
    generation: u32,
) -> Result<Option<StateHeader>, StorageError> {
    let what = || format!("state of replica {replica} (generation {generation})");
    let bytes = engine.get(&keys::header_key(replica, generation))?;
    bytes.map(|bytes| StateHeader::decode(&bytes, &what())).transpose()
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
        self.files.links.push((sequence, link));
        Ok(())
    }

    fn fail(&mut self, reason: String) {
        self.failed = Some(reason);
        self.files = RedoLinks::default();
        self.bytes = 0;
    }
}
