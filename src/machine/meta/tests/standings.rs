//! What is decided about nodes, and what operators set.

use super::*;
use crate::machine::command::PolicyChange;
use Standing::{Draining, Leaving, Pending, Removed};

pub(super) fn stand(node: u64, standing: Standing) -> MetaCommand {
    MetaCommand::SetStanding { node: NodeId(node), standing }
}

fn standing(node: u64, state: &MemoryState) -> Standing {
    cluster_map(state).unwrap().nodes[&NodeId(node)].standing
}

#[test]
fn a_node_that_must_be_accepted_holds_nothing_until_it_is() {
    let mut state = formed(1);
    let approve = MetaCommand::SetPolicy(PolicyChange::ApproveJoins(true));
    assert_eq!(run(&approve, &mut state), MetaReply::Done(2));
    assert_eq!(run(&approve, &mut state), MetaReply::Done(2));
    assert_eq!(run(&MetaCommand::AddNode(node(2)), &mut state), MetaReply::Node(NodeId(2)));
    assert_eq!(standing(2, &state), Pending);
    // Neither another address nor what the record says of itself makes it a member.
    let moved = NodeRecord { peer_address: "10.0.0.2:7200".into(), ..node(2) };
    assert_eq!(run(&MetaCommand::AddNode(moved), &mut state), MetaReply::Node(NodeId(2)));
    assert_eq!(standing(2, &state), Pending);
    let waits = "node 2 is waiting to be accepted: it gets no new replicas";
    let shards = vec![PlannedShard { range: RingRange::ALL, nodes: vec![NodeId(1), NodeId(2)] }];
    let create = MetaCommand::CreateDatabase { name: "db".into(), replicas: 2, shards };
    assert_eq!(refused(&create, &mut state), waits);
    assert_eq!(refused(&moves::begin(0, 1, &[2], &[]), &mut state), waits);
    for wanted in [Draining, Leaving] {
        let error = refused(&stand(2, wanted), &mut state);
        assert_eq!(error, "node 2 waits to be accepted: accept it, or remove it");
    }
    run(&stand(2, Standing::Member), &mut state);
    assert_eq!(standing(2, &state), Standing::Member);
    assert_eq!(refused(&stand(2, Pending), &mut state), "node 2 has been accepted already");
    assert!(matches!(run(&create, &mut state), MetaReply::Database { created: true, .. }));

    // Those who were there before, and those who come after it is switched off, need nobody's word.
    run(&MetaCommand::SetPolicy(PolicyChange::ApproveJoins(false)), &mut state);
    run(&MetaCommand::AddNode(node(3)), &mut state);
    assert_eq!((standing(1, &state), standing(3, &state)), (Standing::Member, Standing::Member));
}

#[test]
fn a_node_is_removed_when_it_holds_nothing_and_for_good() {
    let mut state = formed(3);
    run(&MetaCommand::AddNode(node(4)), &mut state);
    run(&create("db", 3, 12, &state), &mut state);
    let error = refused(&stand(1, Removed), &mut state);
    assert!(error.starts_with("node 1 holds replicas of "), "{error}");
    assert!(error.contains(" shards still, 0, "), "{error}");
    run(&MetaCommand::DropDatabase { name: "db".into(), id: None }, &mut state);
    // The metadata shard's replica is left; node 4 has none of it, but one is to come.
    assert_eq!(
        refused(&stand(1, Removed), &mut state),
        "node 1 holds replicas of 1 shards still, 0 among them"
    );
    let MetaReply::Done(id) = run(&moves::begin(0, 1, &[4], &[1]), &mut state) else {
        panic!("not begun");
    };
    assert!(refused(&stand(4, Removed), &mut state).contains("holds replicas of 1 shards"));
    run(&MetaCommand::CancelMove { shard: METADATA_SHARD, id }, &mut state);
    run(&MetaCommand::EndMove { shard: METADATA_SHARD, id }, &mut state);
    for wanted in [Draining, Leaving, Standing::Member, Leaving, Draining, Removed] {
        run(&stand(4, wanted), &mut state);
        assert_eq!(standing(4, &state), wanted);
    }
    let gone = "node 4 was removed from the cluster; it can only come back with an empty data directory, as a new node";
    for wanted in [Standing::Member, Pending, Draining, Leaving] {
        assert_eq!(refused(&stand(4, wanted), &mut state), gone);
    }
    assert!(matches!(run(&stand(4, Removed), &mut state), MetaReply::Done(_)));
    assert_eq!(refused(&MetaCommand::AddNode(node(4)), &mut state), gone);
    assert_eq!(refused(&stand(5, Draining), &mut state), "node 5 is not a member of the cluster");
    // At its address another may join.
    let reborn = NodeRecord { store_id: id_of(44), ..node(4) };
    assert_eq!(run(&MetaCommand::AddNode(reborn), &mut state), MetaReply::Node(NodeId(5)));
}

fn id_of(byte: u8) -> RandomId {
    RandomId([byte; 16])
}

#[test]
fn the_refusal_to_remove_names_a_few_shards_and_counts_all() {
    let mut state = formed(1);
    run(&create("db", 1, 20, &state), &mut state);
    let MetaReply::Refused(MetaRefusal::NodeInUse { shards, total, .. }) =
        run(&stand(1, Removed), &mut state)
    else {
        panic!("not refused");
    };
    assert_eq!(shards, (0..8).map(ShardId).collect::<Vec<_>>());
    assert_eq!(total, 21);
}

#[test]
fn each_setting_is_kept_and_bounded() {
    let mut state = formed(1);
    for change in [
        PolicyChange::ReplaceAfterMs(0),
        PolicyChange::MovesAtATime(1),
        PolicyChange::BytesPerSecond(u64::MAX),
        PolicyChange::Automatic(false),
    ] {
        run(&MetaCommand::SetPolicy(change), &mut state);
    }
    let policy = cluster_map(&state).unwrap().policy;
    assert_eq!((policy.replace_after_ms, policy.moves_at_a_time), (0, 1));
    assert_eq!((policy.bytes_per_second, policy.automatic, policy.approve_joins), (u64::MAX, false, false));
    assert_eq!(policy.changed_at, 5);
    for moves in [0, 1025] {
        let error = refused(&MetaCommand::SetPolicy(PolicyChange::MovesAtATime(moves)), &mut state);
        assert_eq!(error, format!("{moves} moves at a time; there can be 1 to 1024"));
    }
}

#[test]
fn a_living_database_may_want_other_numbers_of_replicas() {
    let mut state = formed(3);
    let create = create("db", 1, 2, &state);
    run(&create, &mut state);
    let set = |replicas| MetaCommand::SetReplicas { name: "db".into(), replicas };
    assert_eq!(run(&set(3), &mut state), MetaReply::Done(3));
    assert_eq!(run(&set(3), &mut state), MetaReply::Done(3));
    assert_eq!(cluster_map(&state).unwrap().database("db").unwrap().replicas, 3);
    assert_eq!(refused(&set(0), &mut state), "invalid plan: 0 replicas; there can be 1 to 7");
    assert_eq!(refused(&set(8), &mut state), "invalid plan: 8 replicas; there can be 1 to 7");
    run(&MetaCommand::DropDatabase { name: "db".into(), id: None }, &mut state);
    assert_eq!(refused(&set(1), &mut state), "there is no database `db`");
}
