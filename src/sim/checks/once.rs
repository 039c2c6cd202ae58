//! Exactly once: among the committed changes no command has two, however often it was sent; the one that
//! a client was told of is its own, and none belongs to a command that a client was told had no effect.
//!
//! Commands are told apart by session and sequence, and by their values, of which no two are the same:
//! the latter sees too what happens under a wrong tag, or without any.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::Violation;
use super::state::Truth;
use crate::ids::{SessionId, ShardId};
use crate::machine::session::SessionTag;
use crate::sim::history::{Action, Call, Told};
use crate::sim::workload::value_bytes;

/// Which commands made the changes of one shard.
#[derive(Default)]
pub struct Effects {
    by_tag: BTreeMap<(SessionId, u64), u64>,
    by_value: BTreeMap<Bytes, u64>,
}

impl Effects {
    /// A command made the change with this version; `value` unless it is a deletion.
    pub fn add(
        &mut self,
        shard: ShardId,
        tag: Option<SessionTag>,
        value: Option<&Bytes>,
        version: u64,
    ) -> Result<(), Violation> {
        let name = tag.map(|tag| (tag.session, tag.sequence));
        let before = [
            name.and_then(|name| self.by_tag.insert(name, version)),
            value.and_then(|value| self.by_value.insert(value.clone(), version)),
        ];
        match before.into_iter().flatten().next() {
            None => Ok(()),
            Some(first) => Err(Violation::new(
                "once",
                format!("in shard {shard}, {tag:?} with value {value:?} made both {first} and {version}"),
            )),
        }
    }

    /// The version of the change that a call made, if it made one.
    pub fn of(&self, call: &Call) -> Option<u64> {
        let by_value = match call.action {
            Action::Put(value) | Action::Cas(_, value) => {
                self.by_value.get(value_bytes(value).as_slice()).copied()
            }
            Action::Get | Action::Delete => None,
        };
        by_value.or_else(|| self.by_tag.get(&call.tag?).copied())
    }
}

/// Checks what clients were told.
pub fn check(calls: &[Call], truths: &BTreeMap<ShardId, Truth>) -> Result<(), Violation> {
    for call in calls {
        let effect = truths.get(&call.shard).and_then(|truth| truth.effects.of(call));
        let wrong = match call.told {
            Told::Unknown | Told::Found(_) => false,
            Told::Written(version) => effect != Some(version),
            // Without a tag nobody knows which change is a deletion's.
            Told::Deleted(version) => call.tag.is_some() && effect != Some(version),
            Told::Refused | Told::Absent | Told::Mismatch(_) => effect.is_some(),
        };
        if wrong {
            return Err(Violation::new("once", format!("{call:?} made {effect:?}")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::RandomId;

    fn tag(sequence: u64) -> SessionTag {
        SessionTag { session: RandomId([1; 16]), sequence, acked_below: 0, open: None }
    }

    fn call(action: Action, sequence: u64, told: Told) -> Call {
        Call {
            client: 0,
            shard: ShardId(1),
            key: 0,
            action,
            tag: Some((RandomId([1; 16]), sequence)),
            invoked: 1,
            returned: 2,
            told,
        }
    }

    #[test]
    fn a_second_effect_is_seen_by_tag_and_by_value() {
        let mut effects = Effects::default();
        let value = |text: &'static str| Bytes::from_static(text.as_bytes());
        effects.add(ShardId(1), Some(tag(1)), Some(&value("a")), 1).unwrap();
        effects.add(ShardId(1), Some(tag(2)), None, 2).unwrap();
        assert!(effects.add(ShardId(1), Some(tag(2)), None, 3).is_err());
        assert!(effects.add(ShardId(1), None, Some(&value("a")), 4).is_err());
    }

    #[test]
    fn what_a_client_is_told_must_be_what_happened() {
        let mut truth = Truth::default();
        let written = Bytes::from(value_bytes(7));
        truth.effects.add(ShardId(1), Some(tag(1)), Some(&written), 1).unwrap();
        truth.effects.add(ShardId(1), Some(tag(2)), None, 2).unwrap();
        let truths = BTreeMap::from([(ShardId(1), truth)]);
        let right = |call: Call| check(&[call], &truths).is_ok();
        assert!(right(call(Action::Put(7), 1, Told::Written(1))));
        assert!(!right(call(Action::Put(7), 1, Told::Written(2))));
        assert!(!right(call(Action::Put(7), 1, Told::Refused)));
        assert!(right(call(Action::Put(7), 1, Told::Unknown)));
        assert!(!right(call(Action::Put(8), 3, Told::Written(3))));
        assert!(right(call(Action::Delete, 2, Told::Deleted(2))));
        assert!(!right(call(Action::Delete, 2, Told::Absent)));
        assert!(!right(call(Action::Delete, 3, Told::Deleted(2))));
        assert!(right(call(Action::Delete, 3, Told::Absent)));
    }
}
