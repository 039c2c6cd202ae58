//! Moves, from their beginning to their end, and everything that must not happen on the way.

use super::*;
use crate::placement::map::MoveCause;
use MemberRole::{Incoming, Learner, Outgoing, Voter};

pub(super) fn begin(shard: u64, conf: u64, adds: &[u64], removes: &[u64]) -> MetaCommand {
    MetaCommand::BeginMove {
        shard: ShardId(shard),
        conf,
        adds: adds.iter().copied().map(NodeId).collect(),
        removes: removes.iter().copied().map(ReplicaId).collect(),
        cause: MoveCause::Repair,
    }
}

pub(super) fn observe(shard: u64, conf: u64, members: &[(u64, u64, MemberRole)]) -> MetaCommand {
    let member = |&(replica, node, role)| Member { replica: ReplicaId(replica), node: NodeId(node), role };
    MetaCommand::ObserveShard { shard: ShardId(shard), conf, members: members.iter().map(member).collect() }
}

fn end(shard: u64, id: u64) -> MetaCommand {
    MetaCommand::EndMove { shard: ShardId(shard), id }
}

fn cancel(shard: u64, id: u64) -> MetaCommand {
    MetaCommand::CancelMove { shard: ShardId(shard), id }
}

/// Nodes 1 to 5, and shard 0 with replicas 1 to 3 on nodes 1 to 3. Map version 3.
fn five() -> MemoryState {
    let mut state = formed(3);
    run(&MetaCommand::AddNode(node(4)), &mut state);
    run(&MetaCommand::AddNode(node(5)), &mut state);
    state
}

fn shard(id: u64, state: &MemoryState) -> ShardRecord {
    cluster_map(state).unwrap().shards.remove(&ShardId(id)).unwrap()
}

fn members(id: u64, state: &MemoryState) -> Vec<(u64, u64, MemberRole)> {
    shard(id, state).members.iter().map(|m| (m.replica.0, m.node.0, m.role)).collect()
}

#[test]
fn a_move_goes_by_what_the_shard_says() {
    let mut state = five();
    assert_eq!(run(&begin(0, 1, &[4], &[1]), &mut state), MetaReply::Done(4));
    let record = shard(0, &state);
    let moving = record.moving.clone().unwrap();
    assert_eq!((moving.id, moving.cancelling, moving.cause), (4, false, MoveCause::Repair));
    assert_eq!(moving.adds, [Member { replica: ReplicaId(4), node: NodeId(4), role: Learner }]);
    assert_eq!(record.ordered().count(), 4);
    let early = "the move of shard 0 is not at its end, as far as the shard has said";
    assert_eq!(refused(&end(0, 4), &mut state), early);

    let steps = [
        vec![(1, 1, Voter), (2, 2, Voter), (3, 3, Voter), (4, 4, Learner)],
        vec![(1, 1, Outgoing), (2, 2, Voter), (3, 3, Voter), (4, 4, Incoming)],
    ];
    for (conf, step) in (2..).zip(&steps) {
        assert!(matches!(run(&observe(0, conf, step), &mut state), MetaReply::Done(_)));
        assert_eq!(members(0, &state), *step);
        assert_eq!(refused(&end(0, 4), &mut state), early);
    }
    // Who comes takes the place of who goes, whatever the order of the report.
    let last = [(2, 2, Voter), (3, 3, Voter), (4, 4, Voter)];
    run(&observe(0, 4, &last), &mut state);
    assert_eq!(members(0, &state), [(4, 4, Voter), (2, 2, Voter), (3, 3, Voter)]);
    assert_eq!(run(&end(0, 4), &mut state), MetaReply::Done(8));
    assert_eq!(shard(0, &state).moving, None);
    assert_eq!(run(&end(0, 4), &mut state), MetaReply::Done(8));
    // An end that nobody began, of the future.
    assert_eq!(refused(&end(0, 99), &mut state), "the move of shard 0 has changed meanwhile");
}

#[test]
fn the_map_never_follows_a_report_back() {
    let mut state = five();
    run(&begin(0, 1, &[4], &[]), &mut state);
    let learner = [(1, 1, Voter), (2, 2, Voter), (3, 3, Voter), (4, 4, Learner)];
    run(&observe(0, 3, &learner), &mut state);
    let before = state.clone();
    for conf in 0..=3 {
        let old = observe(0, conf, &[(1, 1, Voter), (2, 2, Voter), (3, 3, Voter)]);
        assert_eq!(run(&old, &mut state), MetaReply::Done(before.revision));
    }
    assert_eq!(state, before);
}

#[test]
fn a_report_that_no_group_could_make_is_refused() {
    let mut state = five();
    run(&begin(0, 1, &[4], &[]), &mut state);
    let mut refused = |members: &[(u64, u64, MemberRole)]| refused(&observe(0, 9, members), &mut state);
    let twice = "a member is listed twice, or two of them are on one node";
    assert_eq!(refused(&[(1, 1, Voter), (1, 2, Voter)]), twice);
    assert_eq!(refused(&[(1, 1, Voter), (2, 1, Voter)]), twice);
    let nobody = "one of the configurations has no voter";
    assert_eq!(refused(&[]), nobody);
    assert_eq!(refused(&[(1, 1, Learner)]), nobody);
    assert_eq!(refused(&[(1, 1, Incoming), (2, 2, Learner)]), nobody);
    assert_eq!(refused(&[(1, 1, Outgoing)]), nobody);
    let many: Vec<_> = (1..=22).map(|id| (id, id, Voter)).collect();
    assert_eq!(refused(&many), "22 members; there can be 21");
    assert_eq!(
        refused(&[(1, 1, Voter), (5, 5, Voter)]),
        "replica 5 of shard 0: there never was a replica of that id"
    );
    // Replica 4 is to be on node 4.
    assert_eq!(
        refused(&[(1, 1, Voter), (4, 5, Voter)]),
        "replica 4 on node 5 can't be of shard 0: it is of shard 0"
    );
    assert_eq!(super::refused(&observe(7, 2, &[(1, 1, Voter)]), &mut state), "there is no shard 7");
}

#[test]
fn a_member_that_came_after_all_is_taken_for_true() {
    let mut state = five();
    run(&begin(0, 1, &[4], &[]), &mut state);
    run(&cancel(0, 4), &mut state);
    run(&end(0, 4), &mut state);
    assert_eq!(shard(0, &state).moving, None);
    run(&create("db", 1, 1, &state), &mut state);
    // A late order made it a learner, although the map has given the move up.
    let late = [(1, 1, Voter), (2, 2, Voter), (3, 3, Voter), (4, 4, Learner)];
    run(&observe(0, 2, &late), &mut state);
    assert_eq!(members(0, &state), late);
    // It can go as any other does. Nobody else's replica can come that way.
    run(&begin(0, 2, &[], &[4]), &mut state);
    let of_another = members(1, &state)[0];
    assert!(refused(&observe(0, 3, &[(1, 1, Voter), of_another]), &mut state).ends_with("it is of shard 1"));
}

#[test]
fn there_is_one_move_at_a_time_for_the_conf_that_is() {
    let mut state = five();
    let stale = "shard 0 has changed meanwhile";
    assert_eq!(refused(&begin(0, 2, &[4], &[]), &mut state), stale);
    assert_eq!(refused(&begin(0, 0, &[4], &[]), &mut state), stale);
    run(&begin(0, 1, &[4], &[]), &mut state);
    assert_eq!(refused(&begin(0, 1, &[5], &[]), &mut state), stale);
    assert_eq!(refused(&begin(7, 1, &[5], &[]), &mut state), "there is no shard 7");
    assert_eq!(refused(&cancel(0, 3), &mut state), "the move of shard 0 has changed meanwhile");
}

#[test]
fn a_move_that_breaks_a_rule_is_refused() {
    let mut state = five();
    run(&standings::stand(5, Standing::Draining), &mut state);
    let mut refused = |adds: &[u64], removes: &[u64]| refused(&begin(0, 1, adds, removes), &mut state);
    assert_eq!(refused(&[], &[]), "shard 0: a move without a change");
    assert_eq!(refused(&[4, 4], &[]), "shard 0 would have two replicas on node 4");
    // Not even on the node whose replica goes.
    assert_eq!(refused(&[1], &[1]), "shard 0 would have two replicas on node 1");
    assert_eq!(refused(&[5], &[]), "node 5 is being drained: it gets no new replicas");
    assert_eq!(refused(&[6], &[]), "node 6 is not a member of the cluster");
    assert_eq!(refused(&[], &[4]), "shard 0 has no replica 4 that could go");
    assert_eq!(refused(&[], &[2, 2]), "shard 0 has no replica 2 that could go");
    assert_eq!(refused(&[], &[1, 2, 3]), "shard 0 would have 0 voters; there can be 1 to 7");
    assert_eq!(refused(&[4; 8], &[]), "shard 0: a move of too many replicas");
    let mut state = formed(7);
    run(&MetaCommand::AddNode(node(8)), &mut state);
    assert_eq!(
        super::refused(&begin(0, 1, &[8], &[]), &mut state),
        "shard 0 would have 8 voters; there can be 1 to 7"
    );
}

#[test]
fn a_cancelled_move_ends_when_nothing_of_it_is_left() {
    let mut state = five();
    run(&begin(0, 1, &[4, 5], &[2]), &mut state);
    let learners = [(1, 1, Voter), (2, 2, Voter), (3, 3, Voter), (4, 4, Learner), (5, 5, Learner)];
    run(&observe(0, 2, &learners), &mut state);
    assert_eq!(run(&cancel(0, 4), &mut state), MetaReply::Done(6));
    assert_eq!(run(&cancel(0, 4), &mut state), MetaReply::Done(6));
    let early = "the move of shard 0 is not at its end, as far as the shard has said";
    assert_eq!(refused(&end(0, 4), &mut state), early);
    run(&observe(0, 3, &learners[..4]), &mut state);
    assert_eq!(refused(&end(0, 4), &mut state), early);
    run(&observe(0, 4, &learners[..3]), &mut state);
    run(&end(0, 4), &mut state);
    assert_eq!((shard(0, &state).moving, members(0, &state)), (None, learners[..3].to_vec()));
    // The ids are gone for good, and the next move is another.
    run(&begin(0, 4, &[4], &[]), &mut state);
    let moving = shard(0, &state).moving.unwrap();
    assert_eq!((moving.id, moving.adds[0].replica), (10, ReplicaId(6)));
    assert_eq!(run(&end(0, 4), &mut state), MetaReply::Done(10), "it has ended");
    assert!(shard(0, &state).moving.is_some());
}

#[test]
fn a_move_that_was_cancelled_too_late_ends_forward() {
    let mut state = five();
    run(&begin(0, 1, &[4], &[1]), &mut state);
    run(&cancel(0, 4), &mut state);
    let joint = [(1, 1, Outgoing), (2, 2, Voter), (3, 3, Voter), (4, 4, Incoming)];
    run(&observe(0, 3, &joint), &mut state);
    let early = "the move of shard 0 is not at its end, as far as the shard has said";
    assert_eq!(refused(&end(0, 4), &mut state), early);
    run(&observe(0, 4, &[(2, 2, Voter), (3, 3, Voter), (4, 4, Voter)]), &mut state);
    run(&end(0, 4), &mut state);
    assert_eq!(members(0, &state), [(4, 4, Voter), (2, 2, Voter), (3, 3, Voter)]);
}

#[test]
fn a_dropped_shard_neither_moves_nor_speaks() {
    let mut state = five();
    run(&create("db", 1, 1, &state), &mut state);
    let (replica, on, _) = members(1, &state)[0];
    let elsewhere = if on == 5 { 4 } else { 5 };
    let MetaReply::Done(id) = run(&begin(1, 1, &[elsewhere], &[replica]), &mut state) else {
        panic!("not begun");
    };
    run(&MetaCommand::DropDatabase { name: "db".into(), id: None }, &mut state);
    assert_eq!(shard(1, &state).moving, None);
    let before = state.clone();
    assert_eq!(refused(&begin(1, 1, &[elsewhere], &[]), &mut state), "shard 1 has changed meanwhile");
    assert_eq!(refused(&cancel(1, id), &mut state), "the move of shard 1 has changed meanwhile");
    let news = observe(1, 2, &[(replica, on, Voter)]);
    assert_eq!(run(&news, &mut state), MetaReply::Done(before.revision));
    assert_eq!(run(&end(1, id), &mut state), MetaReply::Done(before.revision));
    let recover = MetaCommand::RecoverShard { shard: ShardId(1), keep: ReplicaId(replica), conf: 9 };
    assert_eq!(refused(&recover, &mut state), "shard 1 has changed meanwhile");
    assert_eq!(state, before);
}

#[test]
fn a_shard_whose_majority_is_lost_goes_on_alone() {
    let mut state = five();
    run(&begin(0, 1, &[4], &[1]), &mut state);
    let recover =
        |keep, conf| MetaCommand::RecoverShard { shard: METADATA_SHARD, keep: ReplicaId(keep), conf };
    assert_eq!(refused(&recover(4, 100), &mut state), "shard 0 has no replica 4 that could go on alone");
    assert_eq!(refused(&recover(2, 1), &mut state), "shard 0 has changed meanwhile");
    assert_eq!(run(&recover(2, 100), &mut state), MetaReply::Done(5));
    assert_eq!(run(&recover(2, 100), &mut state), MetaReply::Done(5));
    assert_eq!((members(0, &state), shard(0, &state).moving), (vec![(2, 2, Voter)], None));
    // What the others may still say is of the past.
    let report = observe(0, 99, &[(1, 1, Voter), (3, 3, Voter)]);
    assert_eq!(run(&report, &mut state), MetaReply::Done(5));
}

/// A map that a metadata shard gave up must be told from any that it comes to later: by its version, and by every id.
#[test]
fn a_metadata_shard_that_goes_on_alone_takes_nothing_back() {
    let mut state = five();
    run(&create("db", 3, 2, &state), &mut state);
    run(&begin(0, 1, &[4], &[1]), &mut state);
    // This was acknowledged; the replica that goes on hasn't got it.
    let behind = state.clone();
    run(&create("lost", 3, 4, &state), &mut state);
    run(&MetaCommand::DropDatabase { name: "db".into(), id: None }, &mut state);
    let lost = cluster_map(&state).unwrap();
    let mut state = behind;
    let conf = 1 << 32;
    let recover = MetaCommand::RecoverShard { shard: METADATA_SHARD, keep: ReplicaId(2), conf };
    assert_eq!(run(&recover, &mut state), MetaReply::Done(conf));
    assert_eq!((members(0, &state), shard(0, &state).moving), (vec![(2, 2, Voter)], None));
    // Once per generation.
    assert_eq!(run(&recover, &mut state), MetaReply::Done(conf));
    let map = cluster_map(&state).unwrap();
    let mut known = lost.clone();
    assert!(known.merge(map.delta(lost.version)));
    assert_eq!(known, map);
    let mut refreshed = lost.clone();
    refresh(&mut refreshed, &state).unwrap();
    assert_eq!(refreshed, map);
    assert!(map.shards.values().all(|shard| shard.changed_at == conf));
    run(&create("new", 3, 4, &state), &mut state);
    let map = cluster_map(&state).unwrap();
    let new = map.database("new").unwrap();
    assert!(lost.databases.keys().all(|id| *id < new.id));
    assert!(lost.shards.keys().all(|id| *id < new.shards[0]));
    let replicas = |map: &ClusterMap, shards: &[ShardId]| -> Vec<ReplicaId> {
        shards.iter().flat_map(|id| map.shards[id].members.iter().map(|member| member.replica)).collect()
    };
    let all: Vec<_> = lost.shards.keys().copied().collect();
    assert!(replicas(&lost, &all).iter().max() < replicas(&map, &new.shards).iter().min());
    // Its members may not be in the map that is left: the map goes on all the same, and follows later.
    let stranger = MetaCommand::RecoverShard { shard: METADATA_SHARD, keep: ReplicaId(77), conf: 2 << 32 };
    assert_eq!(run(&stranger, &mut state), MetaReply::Done(2 << 32));
    assert_eq!(members(0, &state), [(2, 2, Voter)]);
}

/// Replicas are on a node under its id, whatever has become of its record.
#[test]
fn a_node_whose_record_was_lost_keeps_its_id() {
    let mut state = five();
    run(&create("db", 3, 1, &state), &mut state);
    let behind = state.clone();
    assert_eq!(run(&MetaCommand::AddNode(node(6)), &mut state), MetaReply::Node(NodeId(6)));
    let (mut state, known) = (behind, cluster_map(&state).unwrap());
    assert!(known.nodes.contains_key(&NodeId(6)));
    let recover = MetaCommand::RecoverShard { shard: METADATA_SHARD, keep: ReplicaId(2), conf: 1 << 32 };
    run(&recover, &mut state);
    // The shard has moved to it since, and says so: that can't be believed of a node that isn't there.
    let mut members = shard(1, &state).members;
    members[2] = Member { replica: ReplicaId(9), node: NodeId(6), role: Voter };
    let observe = MetaCommand::ObserveShard { shard: ShardId(1), conf: 7, members };
    assert!(refused(&observe, &mut state).contains("node 6 is no member"));
    run(&MetaCommand::SetPolicy(crate::machine::command::PolicyChange::ApproveJoins(true)), &mut state);
    let back = MetaCommand::AddNode(NodeRecord { standing: Standing::Pending, ..node(6) });
    assert_eq!(run(&back, &mut state), MetaReply::Node(NodeId(6)));
    let version = state.revision;
    assert_eq!(run(&back, &mut state), MetaReply::Node(NodeId(6)));
    assert_eq!(state.revision, version, "once");
    assert_eq!(cluster_map(&state).unwrap().nodes[&NodeId(6)].standing, Standing::Member);
    assert!(matches!(run(&observe, &mut state), MetaReply::Done(_)));
    assert!(shard(1, &state).member_on(NodeId(6)).is_some());
    // Nobody takes the id of another, one that was never given out, or a second one.
    for (wrong, why) in [
        (NodeRecord { store_id: id(60), ..node(6) }, "node 6 is another one here"),
        (NodeRecord { id: NodeId(2 << 32), ..node(7) }, "there never was a node"),
        (NodeRecord { id: NodeId(7), ..node(6) }, "the node is node 6 here, not 7"),
    ] {
        assert!(refused(&MetaCommand::AddNode(wrong.clone()), &mut state).contains(why), "{wrong:?}");
    }
    // Who has none yet gets a new one.
    let fresh = NodeRecord { id: NodeId(0), ..node(8) };
    assert_eq!(run(&MetaCommand::AddNode(fresh), &mut state), MetaReply::Node(NodeId((1 << 32) + 6)));
}
