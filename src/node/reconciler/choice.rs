//! Which actions are begun while others are under way.

use super::shard_of;
use crate::balance::facts::Action;
use crate::machine::command::MetaCommand;
use crate::placement::map::MoveCause;

/// Which of `actions` are begun now beside those at work, `most` in all, in the order in which they were named;
/// and which are put off: there is no room for them, or the shard's leader is still at another order. If not all
/// have room, those go first that make room, or without which data may be lost.
pub(super) fn choose(actions: Vec<Action>, at_work: &[Action], most: usize) -> (Vec<Action>, Vec<Action>) {
    let mut put_off = Vec::new();
    let mut due: Vec<(usize, Action)> = Vec::new();
    for action in actions {
        // What is under way already needs no more than that.
        if at_work.contains(&action) {
            continue;
        }
        let busy = at_work.iter().chain(due.iter().map(|(_, due)| due)).any(|other| excludes(other, &action));
        match busy {
            true => put_off.push(action),
            false => due.push((due.len(), action)),
        }
    }
    due.sort_by_key(|(at, action)| (urgency(action), *at));
    let room = most.saturating_sub(at_work.len()).min(due.len());
    put_off.extend(due.split_off(room).into_iter().map(|(_, action)| action));
    due.sort_by_key(|(at, _)| *at);
    (due.into_iter().map(|(_, action)| action).collect(), put_off)
}

/// What comes first where not all has room: the least.
fn urgency(action: &Action) -> u8 {
    match action {
        Action::Meta(
            MetaCommand::EndMove { .. } | MetaCommand::BeginMove { cause: MoveCause::Repair, .. },
        ) => 0,
        // Until the map has followed the shard, no further step of a move is taken.
        Action::Meta(MetaCommand::ObserveShard { .. } | MetaCommand::CancelMove { .. }) => 1,
        Action::Change { .. } => 2,
        Action::Meta(_) => 3,
        Action::Transfer { .. } => 4,
    }
}

/// Whether `later` has to wait for the end of `earlier`, or is the same.
fn excludes(earlier: &Action, later: &Action) -> bool {
    match (earlier, later) {
        (Action::Meta(one), Action::Meta(other)) => one == other,
        (Action::Meta(_), _) | (_, Action::Meta(_)) => false,
        _ => shard_of(earlier) == shard_of(later),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::group::types::MembershipChange;
    use crate::ids::{NodeId, ShardId};

    #[test]
    fn one_order_at_a_time_for_a_shard_and_each_command_once() {
        let change = |shard, conf| Action::Change {
            node: NodeId(1),
            shard: ShardId(shard),
            conf,
            change: MembershipChange::RemoveLearners(Vec::new()),
        };
        let transfer = Action::Transfer { node: NodeId(1), shard: ShardId(4), to: NodeId(2) };
        let end = |id| Action::Meta(MetaCommand::EndMove { shard: ShardId(4), id });
        assert!(excludes(&change(4, 1), &change(4, 2)) && excludes(&transfer, &change(4, 1)));
        assert!(!excludes(&change(4, 1), &change(5, 1)));
        assert!(excludes(&end(1), &end(1)) && !excludes(&end(1), &end(2)));
        assert!(!excludes(&end(1), &change(4, 1)), "they are about different groups");
    }

    #[test]
    fn what_has_no_room_is_put_off_and_what_is_pressing_goes_first() {
        let transfer = |shard| Action::Transfer { node: NodeId(1), shard: ShardId(shard), to: NodeId(2) };
        let end = |shard| Action::Meta(MetaCommand::EndMove { shard: ShardId(shard), id: 1 });
        let begin = |shard, cause| {
            let (shard, conf, adds, removes) = (ShardId(shard), 1, vec![NodeId(3)], Vec::new());
            Action::Meta(MetaCommand::BeginMove { shard, conf, adds, removes, cause })
        };
        let (drain, repair) = (begin(3, MoveCause::Drain), begin(4, MoveCause::Repair));
        let all = vec![transfer(1), transfer(2), drain.clone(), repair.clone(), end(5)];
        assert_eq!(choose(all.clone(), &[], 5), (all.clone(), Vec::new()));
        let (begun, put_off) = choose(all.clone(), &[transfer(9)], 4);
        assert_eq!(begun, [drain, repair, end(5)]);
        assert_eq!(put_off, [transfer(1), transfer(2)]);
        assert_eq!(
            choose(all.clone(), &[transfer(8), transfer(9)], 2),
            (Vec::new(), {
                let mut put_off = all;
                put_off.sort_by_key(urgency);
                put_off
            })
        );
        // What is at work is neither begun nor put off; what its leader has no time for is.
        assert_eq!(choose(vec![transfer(1), end(5)], &[transfer(1), end(5)], 9), (Vec::new(), Vec::new()));
        let other = Action::Transfer { node: NodeId(1), shard: ShardId(1), to: NodeId(3) };
        assert_eq!(choose(vec![other.clone()], &[transfer(1)], 9), (Vec::new(), vec![other]));
    }
}
