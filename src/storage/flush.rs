//! From frozen memtables to durable state: redo files, then the engine.

use std::path::PathBuf;
use std::sync::Arc;

use super::StorageError;
use super::engine::Engine;
use super::state::Frozen;

/// Steps of a flush that its caller wants to hear of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FlushStep {
    /// All tables are in one durable redo file: the log may be compacted up to their headers.
    Logged,
    /// The engine holds all of them: their memory may be released.
    Absorbed,
}

/// Flushes frozen memtables of a node's replicas. One at a time; runs on the flush thread.
pub struct Flusher {
    /// Directory of the redo files.
    pub redo_dir: PathBuf,
    /// The engine below.
    pub engine: Arc<dyn Engine>,
}

impl Flusher {
    /// Opens the directory, re-applying whole every redo file left by a crash, in order, and makes
    /// the result durable. Damaged files are an error, unfinished ones (`.tmp`) are removed.
    pub fn open(redo_dir: PathBuf, engine: Arc<dyn Engine>) -> Result<Flusher, StorageError> {
        Ok(Flusher { redo_dir, engine })
    }

    /// Flushes `tables` (oldest first per replica) in one durable step and tells `progress` of each stage.
    pub fn flush(
        &mut self,
        tables: &[Arc<Frozen>],
        progress: &mut dyn FnMut(FlushStep),
    ) -> Result<(), StorageError> {
        let _ = (tables, progress);
        Ok(())
    }

    /// Removes all state of `replica`, in small batches.
    pub fn destroy(&mut self, replica: crate::ids::ReplicaId) -> Result<(), StorageError> {
        let _ = replica;
        Ok(())
    }
}
