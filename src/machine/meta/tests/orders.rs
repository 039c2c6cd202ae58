//! Orders that come late, or again: a newer decision about the same thing stands.

use proptest::prelude::*;

use super::standings::stand;
use super::*;
use crate::machine::command::PolicyChange;
use crate::placement::map::RebalanceState;
use Standing::{Draining, Leaving};

/// What an order is refused with whose record changed at `version`.
fn changed(what: &str, version: u64) -> MetaReply {
    MetaReply::Refused(MetaRefusal::Changed { what: what.into(), version })
}

#[test]
fn an_order_that_comes_again_undoes_nothing() {
    let mut state = formed(3);
    run(&create("db", 1, 1, &state), &mut state);
    let replicas = |count| MetaCommand::SetReplicas { name: "db".into(), replicas: count };
    let policy = |moves| MetaCommand::SetPolicy(PolicyChange::MovesAtATime(moves));
    for (what, order, newer) in [
        ("node 2", stand(2, Draining), stand(2, Standing::Member)),
        ("database `db`", replicas(3), replicas(2)),
        ("the settings of the cluster", policy(7), policy(8)),
    ] {
        let order = order.seen(state.revision);
        let done = run(&order, &mut state);
        assert_eq!(done, MetaReply::Done(state.revision), "{what}");
        assert_eq!(run(&order, &mut state), done, "it is so already: {what}");
        run(&newer.seen(state.revision), &mut state);
        let before = state.clone();
        assert_eq!(run(&order, &mut state), changed(what, before.revision));
        assert_eq!(state.pairs, before.pairs, "{what}");
    }
}

#[test]
fn an_order_by_a_map_without_the_last_change_is_refused() {
    let mut state = formed(3);
    run(&stand(2, Draining), &mut state);
    assert_eq!(run(&stand(2, Leaving).seen(1), &mut state), changed("node 2", 2));
    // Another record's change is nothing to it.
    assert_eq!(run(&stand(3, Draining).seen(1), &mut state), MetaReply::Done(3));
    assert_eq!(run(&stand(2, Leaving).seen(2), &mut state), MetaReply::Done(4));
    // One of another database of the name.
    run(&create("db", 1, 1, &state), &mut state);
    run(&MetaCommand::DropDatabase { name: "db".into(), id: None }, &mut state);
    run(&create("db", 1, 1, &state), &mut state);
    let replicas = MetaCommand::SetReplicas { name: "db".into(), replicas: 2 };
    assert_eq!(run(&replicas.seen(5), &mut state), changed("database `db`", 7));
}

#[test]
fn a_rebalancing_is_neither_begun_nor_paused_by_an_order_of_before() {
    let mut state = formed(3);
    let begin =
        MetaCommand::BeginRebalance { plan: 4, undoes: 0, targets: Vec::new(), moves: 0, bytes: 0 }.seen(1);
    let control = |wanted| MetaCommand::ControlRebalance { plan: 4, state: wanted, reason: String::new() };
    assert_eq!(run(&begin, &mut state), MetaReply::Done(2));
    assert_eq!(run(&begin, &mut state), MetaReply::Done(2));
    let pause = control(RebalanceState::Paused).seen(2);
    assert_eq!(run(&pause, &mut state), MetaReply::Done(3));
    assert_eq!(run(&control(RebalanceState::Running).seen(3), &mut state), MetaReply::Done(4));
    assert_eq!(run(&pause, &mut state), changed("the rebalancing", 4));
    run(&control(RebalanceState::Cancelling), &mut state);
    run(&control(RebalanceState::Idle), &mut state);
    assert_eq!(run(&begin, &mut state), changed("the rebalancing", 6));
}

#[test]
fn what_is_no_order_is_refused_as_one() {
    let mut state = formed(1);
    let add = MetaCommand::AddNode(node(2));
    let order = |command, seen| MetaCommand::Order { seen, command: Box::new(command) };
    let error = refused(&order(add, 1), &mut state);
    assert_eq!(error, "a command can't be an order that is about no single record");
    let nested = order(order(stand(1, Draining), 1), 1);
    assert!(refused(&nested, &mut state).contains("can't be an order"));
    for seen in [0, 2] {
        let error = refused(&order(stand(1, Draining), seen), &mut state);
        assert_eq!(error, format!("there is no map of version {seen} yet that an order could go by"));
    }
    let mut empty = MemoryState::default();
    assert_eq!(run(&order(stand(1, Draining), 1), &mut empty), MetaReply::Refused(MetaRefusal::NotFormed));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever was decided in between: who has been told that it is done can rely on it that it isn't done again.
    #[test]
    fn no_order_is_carried_out_twice(
        choices in prop::collection::vec((history::any_choice(), 0..4_u64, any::<u8>()), 0..100),
    ) {
        let mut state = formed(3);
        let mut done: Vec<MetaCommand> = Vec::new();
        for (choice, behind, again) in choices {
            let map = cluster_map(&state).unwrap();
            let Some(command) = history::command(choice, &map) else {
                continue;
            };
            // Its giver may not know the last few changes.
            let command = match command.is_order() {
                true => command.seen(state.revision.saturating_sub(behind).max(1)),
                false => command,
            };
            let reply = run(&command, &mut state);
            if let (MetaCommand::Order { .. }, MetaReply::Done(_)) = (&command, &reply) {
                done.push(command);
            }
            if let Some(late) = done.get(usize::from(again) % (done.len() + 1)) {
                let before = state.clone();
                run(late, &mut state);
                prop_assert_eq!(&state.pairs, &before.pairs, "{:?}", late);
            }
        }
    }
}
