//! How often a step is named again while nothing shows that it was done.

use std::collections::BTreeMap;

use super::facts::Action;
use crate::ids::ShardId;
use crate::limits;
use crate::machine::command::MetaCommand;

/// What kind of step: those of one kind for one shard replace each other.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Lane {
    /// The map follows the shard.
    Observe,
    /// The map's wishes change.
    Wish,
    /// The shard's members change.
    Change,
    /// Its leader changes.
    Transfer,
    /// What is decided about nodes changes.
    Standing,
}

/// A step that was named, and when it is named again.
struct Pace {
    action: Action,
    again_at: u64,
    wait_ms: u64,
}

/// The last step of each kind for each shard, and for the cluster as a whole.
#[derive(Default)]
pub(super) struct Paces {
    paces: BTreeMap<(Option<ShardId>, Lane), Pace>,
}

impl Paces {
    /// Whether `action` is to be named now: at once if it is another than the last of its kind, else after a
    /// time that doubles.
    pub fn due(&mut self, now_ms: u64, action: &Action) -> bool {
        let pace = self.paces.get_mut(&place(action)).filter(|pace| pace.action == *action);
        let wait_ms = match pace {
            Some(pace) if now_ms < pace.again_at => return false,
            Some(pace) => (2 * pace.wait_ms).min(limits::STEP_RETRY_MS_MAX),
            None => limits::STEP_RETRY_MS_MIN,
        };
        let pace = Pace { action: action.clone(), again_at: now_ms + wait_ms, wait_ms };
        self.paces.insert(place(action), pace);
        true
    }

    /// `action` has been named, but nothing was made of it: it is due at once.
    pub fn put_off(&mut self, action: &Action) {
        let place = place(action);
        if self.paces.get(&place).is_some_and(|pace| pace.action == *action) {
            self.paces.remove(&place);
        }
    }

    /// Forgets steps that wait no more: their time came long ago, so what they were for has come true.
    pub fn forget(&mut self, now_ms: u64) {
        self.paces.retain(|_, pace| now_ms < pace.again_at + 2 * limits::STEP_RETRY_MS_MAX);
    }
}

fn place(action: &Action) -> (Option<ShardId>, Lane) {
    match action {
        Action::Change { shard, .. } => (Some(*shard), Lane::Change),
        Action::Transfer { shard, .. } => (Some(*shard), Lane::Transfer),
        Action::Meta(MetaCommand::ObserveShard { shard, .. }) => (Some(*shard), Lane::Observe),
        Action::Meta(
            MetaCommand::BeginMove { shard, .. }
            | MetaCommand::CancelMove { shard, .. }
            | MetaCommand::EndMove { shard, .. },
        ) => (Some(*shard), Lane::Wish),
        // Of orders the reconciler gives one kind.
        Action::Meta(MetaCommand::SetStanding { .. } | MetaCommand::Order { .. }) => (None, Lane::Standing),
        Action::Meta(_) => (None, Lane::Wish),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::NodeId;

    fn transfer(to: u64) -> Action {
        Action::Transfer { node: NodeId(1), shard: ShardId(1), to: NodeId(to) }
    }

    /// When, of every second up to `until`, the step is named.
    fn named(paces: &mut Paces, seconds: std::ops::Range<u64>, action: &Action) -> Vec<u64> {
        seconds.filter(|second| paces.due(second * 1000, action)).collect()
    }

    #[test]
    fn a_step_is_named_less_and_less_often_and_another_at_once() {
        let mut paces = Paces::default();
        assert_eq!(named(&mut paces, 0..100, &transfer(2)), [0, 1, 3, 7, 15, 31, 61, 91]);
        assert_eq!(named(&mut paces, 100..104, &transfer(3)), [100, 101, 103]);
        let end = Action::Meta(MetaCommand::EndMove { shard: ShardId(1), id: 1 });
        assert!(paces.due(104_000, &end), "another kind of step has its own pace");
        paces.put_off(&end);
        assert!(paces.due(104_001, &end) && !paces.due(104_002, &end));
        paces.put_off(&transfer(2));
        assert!(!paces.due(104_003, &transfer(3)), "that was another");
        paces.forget(1_000_000);
        assert!(paces.paces.is_empty());
    }
}
