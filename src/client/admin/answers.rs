//! What nodes answer to operators: plans, how a rebalancing is, what is left of a shard, whether its replicas are
//! equal.

use crate::client::wire::read_stuck;
use crate::codec::CodecError;
use crate::codec::digest::read_hash;
use crate::codec::records::{read_rebalance_state, read_role};
use crate::codec::refusal::read_refusal;
use crate::ids::{Index, NodeId, ReplicaId, ShardId};
use crate::placement::map::{MemberRole, RebalanceState};
use crate::placement::rebalance::{MoveKind, PlannedMove, Totals};
use crate::refusal::Refusal;
use crate::schema::admin_capnp::{
    self, change_result, check_result, checked_replica, plan, plan_result, planned_move, rebalance_result,
    rebalance_status, recovery, recovery_result, shard_check, shard_copy, undo_result,
};
use crate::storage::digest::StateDigest;

/// What a rebalancing would do.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct RebalancePlan {
    /// Names it: the same for the same moves from the same state.
    pub id: u64,
    /// Version of the cluster map that it was made from.
    pub map_version: u64,
    /// What moves, replicas first.
    pub moves: Vec<PlannedMove>,
    /// Sums over the moves of replicas.
    pub total: Totals,
    /// The fewest moves of replicas that any plan could do with.
    pub minimum: u32,
    /// Shards that are left for another plan, where they are too many for one.
    pub left: u32,
    /// Nodes that didn't answer whoever made it: nothing moves to them.
    pub silent: Vec<NodeId>,
}

/// What an operator orders of a rebalancing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RebalanceOrder {
    /// Begin no further move.
    Pause,
    /// Go on.
    Resume,
    /// Begin no further move, and give those up that are still to come.
    Cancel,
}

/// How the last rebalancing is.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct RebalanceStatus {
    /// Names its plan; 0: there never was one.
    pub plan: u64,
    /// Its state.
    pub state: RebalanceState,
    /// Moves of replicas that have ended.
    pub done: u32,
    /// Moves of replicas in all.
    pub total: u32,
    /// Bytes of the moves that have ended, as last counted.
    pub bytes_done: u64,
    /// Bytes of all moves, likewise.
    pub bytes_total: u64,
    /// Bytes per second that all nodes together send in snapshots; `None`: there was no time to measure it.
    pub rate: Option<u64>,
    /// Seconds until it ends, by that rate; `None`: not to be told.
    pub eta_s: Option<u64>,
    /// Why it failed or was cancelled.
    pub reason: String,
    /// Version of the cluster map that this was told from.
    pub map_version: u64,
    /// Shards whose members change at this moment, for whatever reason.
    pub moving: u32,
    /// Where members should change and can't, for whatever reason, and why.
    pub stuck: Vec<(ShardId, String)>,
}

impl RebalanceStatus {
    /// Whether nothing of it is left to be done.
    pub fn has_ended(&self) -> bool {
        matches!(self.state, RebalanceState::Idle | RebalanceState::Failed)
    }
}

/// What is known of a shard whose majority is gone, and which replica would go on, or does.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Recovery {
    /// The shard.
    pub shard: ShardId,
    /// Its database.
    pub database: String,
    /// The replica that goes on.
    pub keep: ReplicaId,
    /// The conf version under which it does.
    pub conf: u64,
    /// All replicas by the map, that one included.
    pub copies: Vec<ShardCopy>,
    /// It leads its shard alone.
    pub done: bool,
    /// It is decided, now or before, and goes on by itself. False: nothing was changed.
    pub decided: bool,
}

/// One replica of such a shard, as far as is known.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ShardCopy {
    /// Its node.
    pub node: NodeId,
    /// The replica.
    pub replica: ReplicaId,
    /// Its role by the map.
    pub role: MemberRole,
    /// Its node told of it; else the rest is 0.
    pub answers: bool,
    /// It is open, with a state.
    pub serves: bool,
    /// Raft term.
    pub term: u64,
    /// Log index up to which its state is made.
    pub applied: u64,
    /// Log index up to which it knows entries as committed.
    pub committed: u64,
    /// Log index of its last entry.
    pub last: u64,
    /// Raft term of its last entry: a log that ends in a later one is worth more.
    pub last_term: u64,
    /// Keys, as last counted.
    pub keys: u64,
    /// Bytes of them and their values, likewise.
    pub bytes: u64,
}

/// What each replica of a shard is at one and the same entry of its log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ShardCheck {
    /// The shard.
    pub shard: ShardId,
    /// The last entry in all the states.
    pub index: Index,
    /// The replica that led then.
    pub leader: ReplicaId,
    /// All members.
    pub replicas: Vec<CheckedReplica>,
}

/// One replica that was asked what its state is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CheckedReplica {
    /// Its node.
    pub node: NodeId,
    /// The replica.
    pub replica: ReplicaId,
    /// Its role.
    pub role: MemberRole,
    /// What it told.
    pub state: CheckedState,
}

/// What a replica told of its state.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum CheckedState {
    /// Its digest.
    Digest(StateDigest),
    /// Its state is another by now: to be asked anew. For a person.
    GoneOn(String),
    /// There is none, and why. For a person.
    Missing(String),
}

impl CheckedReplica {
    /// Its digest, if it told one.
    pub fn digest(&self) -> Option<&StateDigest> {
        match &self.state {
            CheckedState::Digest(digest) => Some(digest),
            CheckedState::GoneOn(_) | CheckedState::Missing(_) => None,
        }
    }
}

/// What comes of comparing the replicas of a shard.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// All members have told the same.
    Equal,
    /// Two have told what differs.
    Different,
    /// Those who told are equal, and of others nothing is known, for they have gone on.
    GoneOn,
    /// Those who told are equal, and of others nothing is known.
    Unknown,
}

impl ShardCheck {
    /// What it shows. A difference is one whoever else is missing.
    pub fn verdict(&self) -> Verdict {
        let mut told = self.replicas.iter().filter_map(CheckedReplica::digest);
        let first = told.next();
        if told.any(|digest| Some(digest) != first) {
            Verdict::Different
        } else if self.replicas.iter().any(|one| matches!(one.state, CheckedState::Missing(_))) {
            Verdict::Unknown
        } else if self.replicas.iter().any(|one| matches!(one.state, CheckedState::GoneOn(_))) {
            Verdict::GoneOn
        } else {
            Verdict::Equal
        }
    }
}

/// An answer, or why there is none.
pub(crate) type Answer<T> = Result<Result<T, Refusal>, CodecError>;

/// Reads the version from which on a change holds.
pub(crate) fn read_change(from: change_result::Reader<'_>) -> Answer<u64> {
    Ok(match from.which().map_err(capnp::Error::from)? {
        change_result::Version(version) => Ok(version),
        change_result::Error(error) => Err(read_refusal(error?)),
    })
}

/// Reads the plan that leads back, and the version from which on it is under way.
pub(crate) fn read_undo(from: undo_result::Reader<'_>) -> Answer<(u64, u64)> {
    Ok(match from.which().map_err(capnp::Error::from)? {
        undo_result::Begun(begun) => begun.map(|begun| Ok((begun.get_plan(), begun.get_version())))?,
        undo_result::Error(error) => Err(read_refusal(error?)),
    })
}

/// Reads a plan.
pub(crate) fn read_plan_result(from: plan_result::Reader<'_>) -> Answer<RebalancePlan> {
    Ok(match from.which().map_err(capnp::Error::from)? {
        plan_result::Plan(plan) => Ok(read_plan(plan?)?),
        plan_result::Error(error) => Err(read_refusal(error?)),
    })
}

fn read_plan(from: plan::Reader<'_>) -> Result<RebalancePlan, CodecError> {
    Ok(RebalancePlan {
        id: from.get_id(),
        map_version: from.get_map_version(),
        moves: from.get_moves()?.iter().map(read_move).collect::<Result<_, _>>()?,
        total: Totals {
            moves: from.get_total_moves(),
            keys: from.get_total_keys(),
            bytes: from.get_total_bytes(),
        },
        minimum: from.get_minimum(),
        left: from.get_left(),
        silent: from.get_silent()?.iter().map(NodeId).collect(),
    })
}

fn read_move(from: planned_move::Reader<'_>) -> Result<PlannedMove, CodecError> {
    Ok(PlannedMove {
        shard: ShardId(from.get_shard()),
        kind: match from.get_kind().map_err(|_| newer("PlannedMove.kind"))? {
            admin_capnp::MoveKind::Replica => MoveKind::Replica,
            admin_capnp::MoveKind::Leader => MoveKind::Leader,
        },
        from: NodeId(from.get_from()),
        to: NodeId(from.get_to()),
        keys: from.get_keys(),
        bytes: from.get_bytes(),
    })
}

/// Reads how a rebalancing is.
pub(crate) fn read_status_result(from: rebalance_result::Reader<'_>) -> Answer<RebalanceStatus> {
    Ok(match from.which().map_err(capnp::Error::from)? {
        rebalance_result::Status(status) => Ok(read_status(status?)?),
        rebalance_result::Error(error) => Err(read_refusal(error?)),
    })
}

fn read_status(from: rebalance_status::Reader<'_>) -> Result<RebalanceStatus, CodecError> {
    Ok(RebalanceStatus {
        plan: from.get_plan(),
        state: read_rebalance_state(from.get_state())?,
        done: from.get_done(),
        total: from.get_total(),
        bytes_done: from.get_bytes_done(),
        bytes_total: from.get_bytes_total(),
        rate: (!from.get_unmeasured()).then(|| from.get_rate()),
        eta_s: Some(from.get_eta_s()).filter(|seconds| *seconds > 0),
        reason: from.get_reason()?.to_string().map_err(capnp::Error::from)?,
        map_version: from.get_map_version(),
        moving: from.get_moving(),
        stuck: read_stuck(from.get_stuck()?)?,
    })
}

/// Reads what is left of a shard.
pub(crate) fn read_recovery_result(from: recovery_result::Reader<'_>) -> Answer<Recovery> {
    Ok(match from.which().map_err(capnp::Error::from)? {
        recovery_result::Recovery(recovery) => Ok(read_recovery(recovery?)?),
        recovery_result::Error(error) => Err(read_refusal(error?)),
    })
}

fn read_recovery(from: recovery::Reader<'_>) -> Result<Recovery, CodecError> {
    Ok(Recovery {
        shard: ShardId(from.get_shard()),
        database: from.get_database()?.to_string().map_err(capnp::Error::from)?,
        keep: ReplicaId(from.get_keep()),
        conf: from.get_conf(),
        copies: from.get_copies()?.iter().map(read_copy).collect::<Result<_, _>>()?,
        done: from.get_done(),
        decided: from.get_decided(),
    })
}

fn read_copy(from: shard_copy::Reader<'_>) -> Result<ShardCopy, CodecError> {
    Ok(ShardCopy {
        node: NodeId(from.get_node()),
        replica: ReplicaId(from.get_replica()),
        role: read_role(from.get_role())?,
        answers: from.get_answers(),
        serves: from.get_serves(),
        term: from.get_term(),
        applied: from.get_applied(),
        committed: from.get_committed(),
        last: from.get_last(),
        last_term: from.get_last_term(),
        keys: from.get_keys(),
        bytes: from.get_bytes(),
    })
}

/// Reads what the replicas of a shard are.
pub(crate) fn read_check_result(from: check_result::Reader<'_>) -> Answer<ShardCheck> {
    Ok(match from.which().map_err(capnp::Error::from)? {
        check_result::Check(check) => Ok(read_check(check?)?),
        check_result::Error(error) => Err(read_refusal(error?)),
    })
}

fn read_check(from: shard_check::Reader<'_>) -> Result<ShardCheck, CodecError> {
    let index = from.get_index();
    Ok(ShardCheck {
        shard: ShardId(from.get_shard()),
        index,
        leader: ReplicaId(from.get_leader()),
        replicas: (from.get_replicas()?.iter())
            .map(|replica| read_checked(index, replica))
            .collect::<Result<_, _>>()?,
    })
}

fn read_checked(index: Index, from: checked_replica::Reader<'_>) -> Result<CheckedReplica, CodecError> {
    let text = |from: capnp::Result<capnp::text::Reader<'_>>| -> Result<String, CodecError> {
        Ok(from?.to_string().map_err(capnp::Error::from)?)
    };
    let state = match from.which().map_err(|_| newer("CheckedReplica"))? {
        checked_replica::Digest(digest) => CheckedState::Digest(StateDigest {
            index,
            data: read_hash("CheckedReplica.data", digest.get_data()?)?,
            sessions: read_hash("CheckedReplica.sessions", digest.get_sessions()?)?,
            keys: digest.get_keys(),
            bytes: digest.get_bytes(),
        }),
        checked_replica::GoneOn(why) => CheckedState::GoneOn(text(why)?),
        checked_replica::Missing(why) => CheckedState::Missing(text(why)?),
    };
    Ok(CheckedReplica {
        node: NodeId(from.get_node()),
        replica: ReplicaId(from.get_replica()),
        role: read_role(from.get_role())?,
        state,
    })
}

fn newer(what: &'static str) -> CodecError {
    CodecError::Malformed { what, detail: "unknown kind: the node is newer than this program".into() }
}
