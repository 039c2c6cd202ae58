//! What operators are answered, in protocol form.

use crate::client::admin::answers::{
    CheckedReplica, CheckedState, RebalanceStatus, Recovery, ShardCheck, ShardCopy,
};
use crate::codec::records::{write_rebalance_state, write_role};
use crate::codec::refusal::write_refusal;
use crate::ids::NodeId;
use crate::placement::rebalance::{MoveKind, Plan, PlannedMove};
use crate::refusal::Refusal;
use crate::rpc::wire::write_stuck;
use crate::schema::admin_capnp::{
    self, change_result, check_result, checked_replica, node_counters, plan_result, planned_move,
    rebalance_result, recovery_result, shard_copy, undo_result,
};
use crate::telemetry::counters::Counters;

/// Writes what a node has counted.
pub(super) fn write_counters(node: NodeId, counters: &Counters, mut to: node_counters::Builder<'_>) {
    to.set_node(node.0);
    to.set_process(counters.process);
    let count = u32::try_from(counters.values.len()).unwrap_or(u32::MAX);
    let mut list = to.init_counters(count);
    for (at, (name, value)) in (0..count).zip(&counters.values) {
        let mut counter = list.reborrow().get(at);
        counter.set_name(name.as_str());
        counter.set_value(*value);
    }
}

/// Writes the map version from which on a change holds.
pub(super) fn write_change(result: Result<u64, Refusal>, mut to: change_result::Builder<'_>) {
    match result {
        Ok(version) => to.set_version(version),
        Err(refusal) => write_refusal(&refusal, to.init_error()),
    }
}

/// Writes the plan that leads back, and the map version from which on it is under way.
pub(super) fn write_undo(result: Result<(u64, u64), Refusal>, to: undo_result::Builder<'_>) {
    match result {
        Ok((plan, version)) => {
            let mut begun = to.init_begun();
            begun.set_plan(plan);
            begun.set_version(version);
        }
        Err(refusal) => write_refusal(&refusal, to.init_error()),
    }
}

/// Writes a plan, and which nodes weren't heard when it was made.
pub(super) fn write_plan(result: Result<(Plan, Vec<NodeId>), Refusal>, to: plan_result::Builder<'_>) {
    let (plan, silent) = match result {
        Ok(made) => made,
        Err(refusal) => return write_refusal(&refusal, to.init_error()),
    };
    let mut to = to.init_plan();
    to.set_id(plan.id);
    to.set_map_version(plan.map_version);
    to.set_minimum(plan.minimum);
    to.set_left(plan.left);
    let nodes = u32::try_from(silent.len()).unwrap_or(u32::MAX);
    let mut list = to.reborrow().init_silent(nodes);
    for (at, node) in (0..nodes).zip(silent) {
        list.set(at, node.0);
    }
    to.set_total_moves(plan.total.moves);
    to.set_total_keys(plan.total.keys);
    to.set_total_bytes(plan.total.bytes);
    let count = u32::try_from(plan.moves.len()).unwrap_or(u32::MAX);
    let mut moves = to.init_moves(count);
    for (at, one) in (0..count).zip(&plan.moves) {
        write_move(one, moves.reborrow().get(at));
    }
}

fn write_move(one: &PlannedMove, mut to: planned_move::Builder<'_>) {
    to.set_shard(one.shard.0);
    to.set_kind(match one.kind {
        MoveKind::Replica => admin_capnp::MoveKind::Replica,
        MoveKind::Leader => admin_capnp::MoveKind::Leader,
    });
    to.set_from(one.from.0);
    to.set_to(one.to.0);
    to.set_keys(one.keys);
    to.set_bytes(one.bytes);
}

/// Writes how a rebalancing is.
pub(super) fn write_status(result: Result<RebalanceStatus, Refusal>, to: rebalance_result::Builder<'_>) {
    let status = match result {
        Ok(status) => status,
        Err(refusal) => return write_refusal(&refusal, to.init_error()),
    };
    let mut to = to.init_status();
    to.set_plan(status.plan);
    to.set_state(write_rebalance_state(status.state));
    to.set_done(status.done);
    to.set_total(status.total);
    to.set_bytes_done(status.bytes_done);
    to.set_bytes_total(status.bytes_total);
    to.set_rate(status.rate.unwrap_or(0));
    to.set_unmeasured(status.rate.is_none());
    to.set_eta_s(status.eta_s.unwrap_or(0));
    to.set_reason(status.reason.as_str());
    to.set_map_version(status.map_version);
    to.set_moving(status.moving);
    write_stuck(&status.stuck, to.init_stuck(u32::try_from(status.stuck.len()).unwrap_or(u32::MAX)));
}

/// Writes what is left of a shard.
pub(super) fn write_recovery(result: Result<Recovery, Refusal>, to: recovery_result::Builder<'_>) {
    let recovery = match result {
        Ok(recovery) => recovery,
        Err(refusal) => return write_refusal(&refusal, to.init_error()),
    };
    let mut to = to.init_recovery();
    to.set_shard(recovery.shard.0);
    to.set_database(recovery.database.as_str());
    to.set_keep(recovery.keep.0);
    to.set_conf(recovery.conf);
    to.set_done(recovery.done);
    to.set_decided(recovery.decided);
    let count = u32::try_from(recovery.copies.len()).unwrap_or(u32::MAX);
    let mut copies = to.init_copies(count);
    for (at, copy) in (0..count).zip(&recovery.copies) {
        write_copy(copy, copies.reborrow().get(at));
    }
}

fn write_copy(copy: &ShardCopy, mut to: shard_copy::Builder<'_>) {
    to.set_node(copy.node.0);
    to.set_replica(copy.replica.0);
    to.set_role(write_role(copy.role));
    to.set_answers(copy.answers);
    to.set_serves(copy.serves);
    to.set_term(copy.term);
    to.set_applied(copy.applied);
    to.set_committed(copy.committed);
    to.set_last(copy.last);
    to.set_last_term(copy.last_term);
    to.set_keys(copy.keys);
    to.set_bytes(copy.bytes);
}

/// Writes what the replicas of a shard are.
pub(super) fn write_check(result: Result<ShardCheck, Refusal>, to: check_result::Builder<'_>) {
    let check = match result {
        Ok(check) => check,
        Err(refusal) => return write_refusal(&refusal, to.init_error()),
    };
    let mut to = to.init_check();
    to.set_shard(check.shard.0);
    to.set_index(check.index);
    to.set_leader(check.leader.0);
    let count = u32::try_from(check.replicas.len()).unwrap_or(u32::MAX);
    let mut replicas = to.init_replicas(count);
    for (at, one) in (0..count).zip(&check.replicas) {
        write_checked(one, replicas.reborrow().get(at));
    }
}

fn write_checked(one: &CheckedReplica, mut to: checked_replica::Builder<'_>) {
    to.set_node(one.node.0);
    to.set_replica(one.replica.0);
    to.set_role(write_role(one.role));
    match &one.state {
        CheckedState::Digest(digest) => {
            let mut to = to.init_digest();
            to.set_data(&digest.data.to_be_bytes());
            to.set_sessions(&digest.sessions.to_be_bytes());
            to.set_keys(digest.keys);
            to.set_bytes(digest.bytes);
        }
        CheckedState::GoneOn(why) => to.set_gone_on(why.as_str()),
        CheckedState::Missing(why) => to.set_missing(why.as_str()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::admin::answers::{
        Verdict, read_check_result, read_plan_result, read_recovery_result, read_status_result,
    };
    use crate::ids::{NodeId, ReplicaId, ShardId};
    use crate::placement::map::{MemberRole, RebalanceState};
    use crate::placement::rebalance::Totals;
    use crate::storage::digest::StateDigest;

    #[test]
    fn plans_survive_the_wire() {
        let one = |shard, kind, bytes| PlannedMove {
            shard: ShardId(shard),
            from: NodeId(1),
            to: NodeId(2),
            kind,
            keys: bytes / 10,
            bytes,
        };
        let plan = Plan {
            id: u64::MAX - 1,
            map_version: 9,
            moves: vec![one(4, MoveKind::Replica, 1000), one(5, MoveKind::Leader, 0)],
            targets: Vec::new(),
            total: Totals { moves: 1, keys: 100, bytes: 1000 },
            minimum: 1,
            left: 3,
        };
        let mut message = capnp::message::Builder::new_default();
        write_plan(Ok((plan.clone(), vec![NodeId(5), NodeId(7)])), message.init_root());
        let read = read_plan_result(message.get_root_as_reader().unwrap()).unwrap().unwrap();
        assert_eq!((read.id, read.map_version, read.minimum), (plan.id, plan.map_version, plan.minimum));
        assert_eq!((read.moves, read.total, read.left), (plan.moves, plan.total, plan.left));
        assert_eq!(read.silent, [NodeId(5), NodeId(7)]);

        let mut message = capnp::message::Builder::new_default();
        write_plan(Err(Refusal::Refused("no".into())), message.init_root());
        let read = read_plan_result(message.get_root_as_reader().unwrap()).unwrap();
        assert_eq!(read.unwrap_err(), Refusal::Refused("no".into()));
    }

    #[test]
    fn statuses_survive_the_wire() {
        for (rate, eta_s) in [(None, None), (Some(0), None), (Some(5), Some(7))] {
            let status = RebalanceStatus {
                plan: 3,
                state: RebalanceState::Cancelling,
                done: 1,
                total: 2,
                bytes_done: 10,
                bytes_total: 20,
                rate,
                eta_s,
                reason: "asked to".into(),
                map_version: 8,
                moving: 1,
                stuck: vec![(ShardId(3), "why".into())],
            };
            let mut message = capnp::message::Builder::new_default();
            write_status(Ok(status.clone()), message.init_root());
            let read = read_status_result(message.get_root_as_reader().unwrap()).unwrap();
            assert_eq!(read, Ok(status));
        }
    }

    #[test]
    fn recoveries_survive_the_wire() {
        let copy = |node, answers| ShardCopy {
            node: NodeId(node),
            replica: ReplicaId(10 + node),
            role: MemberRole::Outgoing,
            answers,
            serves: answers,
            term: node,
            applied: 1,
            committed: 2,
            last: 3,
            last_term: 6,
            keys: 4,
            bytes: 5,
        };
        let recovery = Recovery {
            shard: ShardId(7),
            database: "demo".into(),
            keep: ReplicaId(11),
            conf: 1 << 33,
            copies: vec![copy(1, true), copy(2, false)],
            done: true,
            decided: true,
        };
        let mut message = capnp::message::Builder::new_default();
        write_recovery(Ok(recovery.clone()), message.init_root());
        let read = read_recovery_result(message.get_root_as_reader().unwrap()).unwrap();
        assert_eq!(read, Ok(recovery));
    }

    fn check(states: Vec<CheckedState>) -> ShardCheck {
        let replicas = (1..).zip(states).map(|(node, state)| CheckedReplica {
            node: NodeId(node),
            replica: ReplicaId(10 + node),
            role: MemberRole::Learner,
            state,
        });
        ShardCheck { shard: ShardId(4), index: 77, leader: ReplicaId(11), replicas: replicas.collect() }
    }

    fn told(data: u128, sessions: u128) -> CheckedState {
        CheckedState::Digest(StateDigest { index: 77, data, sessions, keys: 3, bytes: 9 })
    }

    #[test]
    fn checks_survive_the_wire() {
        let check = check(vec![
            told(1 << 100, 5),
            CheckedState::GoneOn("it has gone on".into()),
            CheckedState::Missing("no answer".into()),
        ]);
        let mut message = capnp::message::Builder::new_default();
        write_check(Ok(check.clone()), message.init_root());
        let read = read_check_result(message.get_root_as_reader().unwrap()).unwrap();
        assert_eq!(read, Ok(check));
    }

    #[test]
    fn a_difference_is_one_whoever_is_missing_and_nothing_else_is() {
        let gone_on = || CheckedState::GoneOn(String::new());
        let missing = || CheckedState::Missing(String::new());
        for (states, verdict) in [
            (vec![told(1, 2), told(1, 2), told(1, 2)], Verdict::Equal),
            (vec![told(1, 2)], Verdict::Equal),
            (vec![told(1, 2), told(1, 2), told(3, 2)], Verdict::Different),
            (vec![told(1, 2), told(1, 3), missing()], Verdict::Different),
            (vec![gone_on(), told(1, 2), told(1, 3)], Verdict::Different),
            (vec![told(1, 2), gone_on(), told(1, 2)], Verdict::GoneOn),
            (vec![missing(), gone_on(), told(1, 2)], Verdict::Unknown),
            (vec![missing(), missing()], Verdict::Unknown),
        ] {
            assert_eq!(check(states.clone()).verdict(), verdict, "{states:?}");
        }
    }
}
