//! What a replica starts from: its log and its state as they are on disk, read behind a fence.

use std::sync::Arc;

use raft::eraftpb::ConfState;

use super::shared::Shared;
use crate::ids::{GROUP_START, Incarnation, ReplicaId};
use crate::placement::map::MemberRole;
use crate::storage::StorageError;
use crate::storage::engine::Engine;
use crate::storage::log::{LogState, LogStore, ReplicaRecord};
use crate::storage::state::{ReplicaState, StateHeader};

/// Waits until nothing of a dead incarnation can reach the disk any more.
pub async fn fence(shared: &Shared, replica: ReplicaId, incarnation: Incarnation) {
    if shared.log_writer.fence(replica, incarnation).await.is_err() || shared.flusher.barrier().await.is_err()
    {
        tracing::debug!("the node's storage threads have ended");
    }
}

/// Reads what the disk has of one replica.
pub fn open_stores(
    log: &dyn LogStore,
    engine: &Arc<dyn Engine>,
    record: &ReplicaRecord,
) -> Result<(LogState, ReplicaState), StorageError> {
    let log_state = log.load(record.replica)?;
    let of_role = |role| record.members.iter().filter(move |m| m.role == role).map(|m| m.replica.0);
    let conf_state = ConfState {
        voters: of_role(MemberRole::Voter).collect(),
        learners: of_role(MemberRole::Learner).collect(),
        ..ConfState::default()
    };
    let initial = StateHeader {
        applied: GROUP_START,
        revision: 0,
        epoch: record.epoch,
        members: record.members.clone(),
        conf_state,
    };
    let state = ReplicaState::open(engine.clone(), record.replica, record.generation, initial)?;
    Ok((log_state, state))
}
