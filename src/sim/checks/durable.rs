//! No acknowledged write is lost: each one is the committed change of the version it was told, and
//! versions follow real time. Nor is anything read that isn't committed.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::Violation;
use super::state::Truth;
use crate::ids::ShardId;
use crate::sim::history::{Action, Call, Told};
use crate::sim::workload::{key_bytes, value_bytes};

/// Checks all acknowledged writes against what is committed.
pub fn check(calls: &[Call], truths: &BTreeMap<ShardId, Truth>) -> Result<(), Violation> {
    let mut by_shard: BTreeMap<ShardId, Vec<&Call>> = BTreeMap::new();
    for call in calls {
        if let Told::Found(Some((value, version))) | Told::Mismatch(Some((value, version))) = call.told {
            let seen = (key_bytes(call.key), Some(Bytes::from(value_bytes(value))));
            let committed = truths.get(&call.shard).and_then(|truth| truth.change(version));
            if committed != Some(&seen) {
                return Err(Violation::new(
                    "durable",
                    format!("read, but not committed: {call:?}; committed: {committed:?}"),
                ));
            }
        }
        let Some(version) = call.told.version() else { continue };
        by_shard.entry(call.shard).or_default().push(call);
        let value = match call.action {
            Action::Put(value) | Action::Cas(_, value) => Some(Bytes::from(value_bytes(value))),
            Action::Get | Action::Delete => None,
        };
        let told = (key_bytes(call.key), value);
        let committed = truths.get(&call.shard).and_then(|truth| truth.change(version));
        if committed != Some(&told) {
            return Err(Violation::new(
                "durable",
                format!(
                    "acknowledged, but not committed as version {version}: {call:?}; committed: {committed:?}"
                ),
            ));
        }
    }
    for calls in by_shard.values_mut() {
        in_real_time_order(calls)?;
    }
    Ok(())
}

/// A write that began after another had ended has the greater version.
fn in_real_time_order(calls: &mut [&Call]) -> Result<(), Violation> {
    calls.sort_by_key(|call| call.told.version());
    for pair in calls.windows(2) {
        if pair[0].told.version() == pair[1].told.version() {
            let detail = format!("two writes of one version: {:?} and {:?}", pair[0], pair[1]);
            return Err(Violation::new("durable", detail));
        }
    }
    // From the greatest version down: nothing so far may have ended before this began.
    let mut ended: Option<&Call> = None;
    for call in calls.iter().rev() {
        if let Some(ended) = ended
            && ended.returned < call.invoked
        {
            let detail = format!("{call:?} began after {ended:?} had ended, but has the lower version");
            return Err(Violation::new("durable", detail));
        }
        if ended.is_none_or(|ended| call.returned < ended.returned) {
            ended = Some(call);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(invoked: u64, returned: u64, version: u64) -> Call {
        let told = Told::Written(version);
        let action = Action::Put(version);
        Call { client: 0, shard: ShardId(1), key: 0, action, tag: None, invoked, returned, told }
    }

    #[test]
    fn an_acknowledged_write_must_be_committed() {
        assert!(check(&[put(1, 2, 1)], &BTreeMap::new()).is_err());
        let read = Call { action: Action::Get, told: Told::Found(Some((1, 1))), ..put(1, 2, 1) };
        assert!(check(&[read], &BTreeMap::new()).is_err());
    }

    #[test]
    fn versions_follow_real_time() {
        let check = |calls: &[Call]| in_real_time_order(&mut calls.iter().collect::<Vec<_>>());
        assert!(check(&[put(1, 2, 1), put(3, 4, 2)]).is_ok());
        assert!(check(&[put(1, 4, 2), put(2, 3, 1)]).is_ok());
        assert!(check(&[put(1, 2, 2), put(3, 4, 1)]).is_err());
        assert!(check(&[put(1, 2, 2), put(3, 9, 1), put(1, 9, 3)]).is_err());
        assert!(check(&[put(1, 2, 1), put(3, 4, 1)]).is_err());
    }
}
