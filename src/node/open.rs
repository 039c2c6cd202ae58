//! What a replica starts from: its log and its state as they are on disk.

use std::sync::Arc;

use raft::eraftpb::ConfState;

use crate::ids::GROUP_START;
use crate::placement::map::MemberRole;
use crate::storage::StorageError;
use crate::storage::engine::Engine;
use crate::storage::log::{LogState, LogStore, ReplicaRecord};
use crate::storage::state::{ReplicaState, StateHeader};

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
        log_time: 0,
        epoch: record.epoch,
        members: record.members.clone(),
        conf_state,
    };
    let state = ReplicaState::open(engine.clone(), record.replica, record.generation, initial)?;
    Ok((log_state, state))
}
