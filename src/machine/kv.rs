//! The key-value machine.

use super::ApplyError;
use super::command::{Answer, KvCommand, KvReply, Query};
use crate::storage::{StateBatch, StateView};

/// Applies one command.
pub fn apply(command: &KvCommand, state: &mut dyn StateBatch) -> Result<KvReply, ApplyError> {
    let _ = (command, state);
    Ok(KvReply::Absent)
}

/// Answers one query.
pub fn query(query: &Query, state: &dyn StateView) -> Result<Answer, ApplyError> {
    let _ = (query, state);
    Ok(Answer::Value(None))
}
