//! What operators set for the cluster as a whole.

use super::{Known, Stop, fixed, formed, not_allowed, records};
use crate::machine::command::{MetaReply, PolicyChange};
use crate::placement::map::PolicyRecord;
use crate::storage::StateBatch;

pub(super) fn set(change: PolicyChange, known: Known, state: &mut dyn StateBatch) -> Result<MetaReply, Stop> {
    formed(state)?;
    let before: PolicyRecord = records::load_single(state)?;
    let mut policy = before;
    match change {
        PolicyChange::ReplaceAfterMs(ms) => policy.replace_after_ms = ms,
        PolicyChange::MovesAtATime(moves) => {
            let most = fixed::MOVES_AT_A_TIME;
            if !(1..=most).contains(&moves) {
                return not_allowed(format!("{moves} moves at a time; there can be 1 to {most}"));
            }
            policy.moves_at_a_time = moves;
        }
        PolicyChange::BytesPerSecond(bytes) => policy.bytes_per_second = bytes,
        PolicyChange::Automatic(on) => policy.automatic = on,
        PolicyChange::ApproveJoins(on) => policy.approve_joins = on,
    }
    if policy == before {
        return Ok(MetaReply::Done(state.revision()));
    }
    known.check(|| "the settings of the cluster".into(), before.changed_at)?;
    policy.changed_at = state.next_revision();
    records::save_single(&policy, state);
    Ok(MetaReply::Done(policy.changed_at))
}
