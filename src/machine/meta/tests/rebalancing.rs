//! Rebalancing: targets given, reached, and given up.

use super::moves::observe;
use super::*;
use crate::machine::command::PlannedTarget;
use crate::placement::map::{MoveCause, RebalanceState, ShardTarget};
use MemberRole::Voter;
use RebalanceState::{Cancelling, Failed, Idle, Paused, Running};

/// Three nodes; database `db` has shard 1 on nodes 1 and 2 and shard 2 on nodes 2 and 3: replicas 4 to 7.
fn two_shards() -> MemoryState {
    let mut state = formed(3);
    let half = u64::MAX / 2;
    let on = |start, end, nodes: [u64; 2]| PlannedShard {
        range: RingRange { start, end },
        nodes: nodes.map(NodeId).to_vec(),
    };
    let shards = vec![on(0, half, [1, 2]), on(half + 1, u64::MAX, [2, 3])];
    run(&MetaCommand::CreateDatabase { name: "db".into(), replicas: 2, shards }, &mut state);
    state
}

fn target(shard: u64, conf: u64, nodes: &[u64]) -> PlannedTarget {
    PlannedTarget { shard: ShardId(shard), conf, nodes: nodes.iter().copied().map(NodeId).collect() }
}

fn begin(plan: u64, targets: &[PlannedTarget]) -> MetaCommand {
    MetaCommand::BeginRebalance { plan, undoes: 0, targets: targets.to_vec(), moves: 2, bytes: 100 }
}

fn control(plan: u64, state: RebalanceState, reason: &str) -> MetaCommand {
    MetaCommand::ControlRebalance { plan, state, reason: reason.into() }
}

fn start_move(shard: u64, add: u64, remove: u64) -> MetaCommand {
    MetaCommand::BeginMove {
        shard: ShardId(shard),
        conf: 1,
        adds: vec![NodeId(add)],
        removes: vec![ReplicaId(remove)],
        cause: MoveCause::Rebalance,
    }
}

fn shard(id: u64, state: &MemoryState) -> ShardRecord {
    cluster_map(state).unwrap().shards.remove(&ShardId(id)).unwrap()
}

fn is(state: &MemoryState) -> (RebalanceState, String) {
    let last = cluster_map(state).unwrap().rebalance;
    (last.state, last.reason)
}

fn at(plan: u64, nodes: &[u64]) -> Option<ShardTarget> {
    Some(ShardTarget { plan, nodes: nodes.iter().copied().map(NodeId).collect() })
}

#[test]
fn a_rebalancing_runs_until_every_shard_is_where_it_should_be() {
    let mut state = two_shards();
    assert_eq!(refused(&start_move(1, 3, 4), &mut state), "the rebalancing has changed meanwhile");
    let begin = begin(7, &[target(1, 1, &[3, 2]), target(2, 1, &[3, 2])]);
    assert_eq!(run(&begin, &mut state), MetaReply::Done(3));
    assert_eq!(run(&begin, &mut state), MetaReply::Done(3));
    // Shard 2 only wants another leader: it is there at once, in the new order.
    let leads = shard(2, &state);
    assert_eq!((leads.target, leads.members[0].node, leads.previous), (None, NodeId(3), at(7, &[2, 3])));
    let moves = shard(1, &state);
    assert_eq!((moves.target, moves.previous), (at(7, &[3, 2]), at(7, &[1, 2])));
    assert_eq!(
        refused(&control(7, Idle, ""), &mut state),
        "1 shards are not where the plan wants them, shard 1 among them"
    );
    run(&start_move(1, 3, 4), &mut state);
    run(&observe(1, 4, &[(5, 2, Voter), (8, 3, Voter)]), &mut state);
    run(&MetaCommand::EndMove { shard: ShardId(1), id: 4 }, &mut state);
    let record = shard(1, &state);
    assert_eq!((record.moving, record.target, record.previous), (None, None, at(7, &[1, 2])));
    assert_eq!(record.members[0].node, NodeId(3), "in the order of the target");
    run(&control(7, Idle, "not told"), &mut state);
    assert_eq!(is(&state), (Idle, String::new()));
    // What one plan has left, the next clears away.
    run(&super::rebalancing::begin(8, &[]), &mut state);
    assert!((1..=2).all(|id| shard(id, &state).previous.is_none()));
}

#[test]
fn a_paused_one_begins_no_moves_and_a_cancelled_one_takes_them_back() {
    let mut state = two_shards();
    run(&begin(7, &[target(1, 1, &[3, 2]), target(2, 1, &[1, 2])]), &mut state);
    run(&start_move(1, 3, 4), &mut state);
    run(&control(7, Paused, ""), &mut state);
    assert_eq!(refused(&start_move(2, 1, 7), &mut state), "the rebalancing has changed meanwhile");
    run(&control(7, Running, ""), &mut state);
    run(&control(7, Paused, ""), &mut state);
    run(&control(7, Cancelling, "by hand"), &mut state);
    assert_eq!(is(&state), (Cancelling, "by hand".into()));
    let (under_way, waiting) = (shard(1, &state), shard(2, &state));
    assert!(under_way.moving.unwrap().cancelling && under_way.target.is_some());
    assert_eq!((waiting.target, waiting.previous), (None, None));
    assert_eq!(refused(&control(7, Running, ""), &mut state), "the rebalancing is being cancelled");
    assert_eq!(refused(&begin(9, &[]), &mut state), "the rebalancing by plan 0000000000000007 is under way");
    run(&MetaCommand::EndMove { shard: ShardId(1), id: 4 }, &mut state);
    let record = shard(1, &state);
    assert_eq!((record.moving, record.target, record.previous), (None, None, None));
    run(&control(7, Idle, ""), &mut state);
    assert_eq!(is(&state), (Idle, "by hand".into()));
    assert_eq!(refused(&control(7, Paused, ""), &mut state), "the rebalancing has ended");
}

#[test]
fn one_that_fails_lets_go_of_what_has_not_begun() {
    let mut state = two_shards();
    run(&begin(7, &[target(1, 1, &[3, 2]), target(2, 1, &[1, 2])]), &mut state);
    run(&start_move(1, 3, 4), &mut state);
    let reason = "ü".repeat(600);
    run(&control(7, Failed, &reason), &mut state);
    assert_eq!(is(&state), (Failed, "ü".repeat(512)));
    assert!(!shard(1, &state).moving.unwrap().cancelling, "it ends as it was meant to");
    assert_eq!(shard(2, &state).target, None);
    // The next may begin at once, even for the shard that is still moving.
    run(&begin(8, &[target(1, 1, &[1, 3])]), &mut state);
    assert_eq!(shard(1, &state).target, at(8, &[1, 3]));
    run(&observe(1, 4, &[(5, 2, Voter), (8, 3, Voter)]), &mut state);
    run(&MetaCommand::EndMove { shard: ShardId(1), id: 4 }, &mut state);
    assert_eq!(shard(1, &state).target, at(8, &[1, 3]), "not there yet");
}

#[test]
fn a_plan_that_is_stale_or_breaks_a_rule_is_refused() {
    let mut state = two_shards();
    run(&MetaCommand::AddNode(node(4)), &mut state);
    run(&standings::stand(4, Standing::Leaving), &mut state);
    let mut refused = |targets: &[PlannedTarget]| refused(&begin(7, targets), &mut state);
    assert_eq!(refused(&[target(1, 2, &[1, 3])]), "shard 1 has changed meanwhile");
    assert_eq!(refused(&[target(9, 1, &[1, 3])]), "there is no shard 9");
    let on = |nodes| format!("plan 0000000000000007 wants shard 1 on nodes {nodes}");
    assert_eq!(refused(&[target(1, 1, &[])]), on(""));
    assert_eq!(refused(&[target(1, 1, &[3, 3])]), on("3, 3"));
    assert_eq!(refused(&[target(1, 1, &[1, 3]), target(1, 1, &[1, 3])]), on("1, 3"));
    assert_eq!(refused(&[target(1, 1, &[1, 2, 3, 4, 5, 6, 7, 8])]), on("1, 2, 3, 4, 5, 6, 7, 8"));
    assert_eq!(refused(&[target(1, 1, &[1, 4])]), "node 4 is leaving: it gets no new replicas");
    assert_eq!(refused(&[target(1, 1, &[1, 5])]), "node 5 is not a member of the cluster");
    let nameless = super::refused(&begin(0, &[]), &mut state);
    assert_eq!(nameless, "plan 0 of 0 shards; there can be 16384");
    let many = super::refused(&begin(7, &vec![target(1, 1, &[1]); 16385]), &mut state);
    assert_eq!(many, "plan 7 of 16385 shards; there can be 16384");
    let other = "the rebalancing has changed meanwhile";
    assert_eq!(super::refused(&control(0, Paused, ""), &mut state), other);
    run(&begin(7, &[]), &mut state);
    assert_eq!(super::refused(&control(8, Paused, ""), &mut state), other);
    run(&MetaCommand::DropDatabase { name: "db".into(), id: None }, &mut state);
    run(&control(7, Idle, ""), &mut state);
    assert_eq!(super::refused(&begin(8, &[target(1, 1, &[1])]), &mut state), "shard 1 has changed meanwhile");
}

#[test]
fn a_dropped_or_recovered_shard_has_no_target() {
    let mut state = two_shards();
    run(&begin(7, &[target(0, 1, &[1]), target(1, 1, &[3, 2])]), &mut state);
    run(&MetaCommand::RecoverShard { shard: METADATA_SHARD, keep: ReplicaId(2), conf: 9 }, &mut state);
    run(&MetaCommand::DropDatabase { name: "db".into(), id: None }, &mut state);
    for id in 0..2 {
        let record = shard(id, &state);
        assert_eq!((record.target, record.previous), (None, None));
    }
    run(&control(7, Idle, ""), &mut state);
}

#[test]
fn a_shard_that_comes_to_its_target_by_no_move_has_arrived() {
    let mut state = two_shards();
    run(&begin(7, &[target(1, 1, &[3, 2])]), &mut state);
    let MetaReply::Done(id) = run(&start_move(1, 3, 4), &mut state) else { panic!("begun") };
    run(&MetaCommand::CancelMove { shard: ShardId(1), id }, &mut state);
    run(&MetaCommand::EndMove { shard: ShardId(1), id }, &mut state);
    assert_eq!(shard(1, &state).target, at(7, &[3, 2]), "it is tried again");
    // The orders of the move were on their way still.
    run(&observe(1, 2, &[(4, 1, Voter), (5, 2, Voter), (8, 3, MemberRole::Learner)]), &mut state);
    let joint = [(4, 1, MemberRole::Outgoing), (5, 2, Voter), (8, 3, MemberRole::Incoming)];
    run(&observe(1, 3, &joint), &mut state);
    assert_eq!(shard(1, &state).target, at(7, &[3, 2]), "not yet");
    run(&observe(1, 4, &[(5, 2, Voter), (8, 3, Voter)]), &mut state);
    let record = shard(1, &state);
    assert_eq!((record.target, record.previous), (None, at(7, &[1, 2])));
    assert_eq!(record.members[0].node, NodeId(3), "in the order of the target");
    run(&control(7, Idle, ""), &mut state);
}

#[test]
fn only_the_last_rebalancing_is_taken_back_and_once() {
    let mut state = two_shards();
    let back = |plan, undoes, nodes: &[u64]| MetaCommand::BeginRebalance {
        plan,
        undoes,
        targets: vec![target(1, 1, nodes)],
        moves: 0,
        bytes: 0,
    };
    // Of leadership alone: it has arrived at once.
    run(&begin(8, &[target(1, 1, &[2, 1])]), &mut state);
    run(&control(8, RebalanceState::Idle, ""), &mut state);
    assert!(matches!(run(&back(9, 7, &[1, 2]), &mut state), MetaReply::Refused(MetaRefusal::Stale(_))));
    let begun = run(&back(9, 8, &[1, 2]), &mut state);
    assert!(matches!(begun, MetaReply::Done(_)), "{begun:?}");
    run(&control(9, RebalanceState::Idle, ""), &mut state);
    assert_eq!(cluster_map(&state).unwrap().rebalance.undoes, 8);
    let version = cluster_map(&state).unwrap().version;
    assert_eq!(
        run(&back(9, 8, &[1, 2]), &mut state),
        MetaReply::Done(version),
        "said again, once it has ended"
    );
    run(&begin(10, &[target(1, 1, &[2, 1])]), &mut state);
    assert_eq!(cluster_map(&state).unwrap().rebalance.undoes, 0);
}
