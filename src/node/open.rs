//! What a replica starts from: its log and its state as they are on disk.

use std::sync::Arc;

use crate::storage::StorageError;
use crate::storage::engine::Engine;
use crate::storage::log::{LogState, LogStore, ReplicaRecord};
pub use crate::storage::opened::OpenedState;

/// Reads what the disk has of one replica.
pub fn open_stores(
    log: &dyn LogStore,
    engine: &Arc<dyn Engine>,
    record: &ReplicaRecord,
) -> Result<(LogState, OpenedState), StorageError> {
    let log_state = log.load(record.replica)?;
    let state = OpenedState::open(engine, record, &log_state)?;
    Ok((log_state, state))
}
