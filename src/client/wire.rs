//! The client's side of the protocol: requests are written, answers are read. What can't be read is
//! an error, never a guess.

use bytes::Bytes;

use super::session::Header;
use super::{Operation, OperationResult};
use crate::codec::CodecError;
use crate::codec::refusal::read_refusal;
use crate::group::types::GroupStatus;
use crate::ids::{Epoch, NodeId, ReplicaId, ShardId};
use crate::machine::command::{Expect, Versioned};
use crate::node::handle::{NodePhase, NodeReport, ReplicaHealth, ReplicaReport};
use crate::refusal::Refusal;
use crate::schema::admin_capnp::{
    NodeState, ReplicaRole, ReplicaState, node_counters, node_status, stuck_shard,
};
use crate::schema::kv_capnp::{batch_request, expect, op_result, operation, scan_response};
use crate::telemetry::counters::Counters;

/// Writes the session of a batch's commands.
pub fn write_session(from: &Header, mut to: batch_request::Builder<'_>) {
    to.set_session(&from.id.0);
    to.set_open_ttl_ms(from.open_ttl_ms);
    to.set_acked_below(from.acked_below);
}

/// Writes an operation.
pub fn write_operation(from: &Operation, mut to: operation::Builder<'_>) {
    to.set_key(from.key());
    match from {
        Operation::Get(_) => to.set_get(()),
        Operation::Put(_, value) => to.set_put(value),
        Operation::Delete(_) => to.set_delete(()),
        Operation::Cas(_, condition, value) => {
            let mut cas = to.init_cas();
            cas.set_value(value);
            write_expect(condition, cas.init_expect());
        }
    }
}

/// Writes the condition of a compare-and-set.
pub fn write_expect(from: &Expect, mut to: expect::Builder<'_>) {
    match from {
        Expect::Absent => to.set_absent(()),
        Expect::Value(value) => to.set_value(value),
        Expect::Version(version) => to.set_version(*version),
    }
}

/// Reads the result of `operation`. The outer error: the answer is malformed or answers something
/// else.
pub fn read_result(
    operation: &Operation,
    from: op_result::Reader<'_>,
) -> Result<Result<OperationResult, Refusal>, CodecError> {
    let which = from.which().map_err(capnp::Error::from)?;
    Ok(Ok(match (which, operation) {
        (op_result::Error(error), _) => return Ok(Err(read_refusal(error?))),
        (op_result::Value(found), Operation::Get(_)) => {
            OperationResult::Value(Some(versioned(found.get_value()?, found.get_version())))
        }
        (op_result::Absent(()), Operation::Get(_)) => OperationResult::Value(None),
        (op_result::Absent(()), Operation::Delete(_)) => OperationResult::Deleted(None),
        (op_result::Deleted(version), Operation::Delete(_)) => OperationResult::Deleted(Some(version)),
        (op_result::Written(version), Operation::Put(..) | Operation::Cas(..)) => {
            OperationResult::Written(version)
        }
        (op_result::Mismatch(there), Operation::Cas(..)) if there.get_found() => {
            OperationResult::Mismatch(Some(versioned(there.get_value()?, there.get_version())))
        }
        (op_result::Mismatch(_), Operation::Cas(..)) => OperationResult::Mismatch(None),
        _ => {
            return Err(CodecError::Malformed {
                what: "OpResult",
                detail: "it answers another kind of operation".into(),
            });
        }
    }))
}

fn versioned(value: &[u8], version: u64) -> Versioned {
    Versioned { value: Bytes::copy_from_slice(value), version }
}

/// Pairs in key order, and whether there are more.
pub type Page = (Vec<(Bytes, Versioned)>, bool);

/// Reads a page of a scan.
pub fn read_page(from: scan_response::Reader<'_>) -> Result<Result<Page, Refusal>, CodecError> {
    match from.which().map_err(capnp::Error::from)? {
        scan_response::Error(error) => Ok(Err(read_refusal(error?))),
        scan_response::Page(page) => {
            let list = page.get_pairs()?;
            let mut pairs = Vec::with_capacity(list.len() as usize);
            for pair in list.iter() {
                let found = versioned(pair.get_value()?, pair.get_version());
                pairs.push((Bytes::copy_from_slice(pair.get_key()?), found));
            }
            if pairs.is_empty() && page.get_more() {
                // Asking again after the last key would ask the same for ever.
                return Err(CodecError::Malformed {
                    what: "ScanResponse",
                    detail: "an empty page that isn't the last".into(),
                });
            }
            Ok(Ok((pairs, page.get_more())))
        }
    }
}

/// Reads what a node has counted.
pub fn read_counters(from: node_counters::Reader<'_>) -> Result<Counters, CodecError> {
    let mut counters = Counters { process: from.get_process(), ..Counters::default() };
    for counter in from.get_counters()?.iter() {
        counters.values.insert(text(counter.get_name()?)?, counter.get_value());
    }
    Ok(counters)
}

/// Reads what a node tells of itself.
pub fn read_report(from: node_status::Reader<'_>) -> Result<NodeReport, CodecError> {
    let unknown = |what: &'static str| CodecError::Malformed {
        what,
        detail: "unknown state: the node is newer than this program".into(),
    };
    let mut replicas = Vec::new();
    for replica in from.get_replicas()?.iter() {
        let message = || text(replica.get_message()?);
        let health = match replica.get_state().map_err(|_| unknown("ReplicaStatus.state"))? {
            ReplicaState::Serving => ReplicaHealth::Serving,
            ReplicaState::Recovering => ReplicaHealth::Recovering,
            ReplicaState::Restarting => ReplicaHealth::Restarting(message()?),
            ReplicaState::Quarantined => ReplicaHealth::Quarantined(message()?),
            ReplicaState::Failed => ReplicaHealth::Failed(message()?),
            ReplicaState::Installing => match message()? {
                why if why.is_empty() => ReplicaHealth::Installing,
                why => ReplicaHealth::Refetching(why),
            },
        };
        let role = replica.get_role().map_err(|_| unknown("ReplicaStatus.role"))?;
        let running = match health {
            ReplicaHealth::Serving | ReplicaHealth::Recovering | ReplicaHealth::Refetching(_) => true,
            // It is stopped for the moment of the switch; every replica that runs has a term.
            ReplicaHealth::Installing => replica.get_term() > 0,
            _ => false,
        };
        let leader = replica.get_leader();
        let group = running.then(|| GroupStatus {
            role: match role {
                ReplicaRole::Leader => raft::StateRole::Leader,
                ReplicaRole::Candidate => raft::StateRole::Candidate,
                ReplicaRole::Follower | ReplicaRole::Learner => raft::StateRole::Follower,
            },
            learner: role == ReplicaRole::Learner,
            term: replica.get_term(),
            leader: (leader != 0).then_some(ReplicaId(leader)),
            applied: replica.get_applied(),
            committed: replica.get_committed(),
            truncated: replica.get_truncated(),
            last: replica.get_last(),
            last_term: replica.get_last_term(),
            recovering: health == ReplicaHealth::Recovering,
            // That it is, its health says; from where on, only its own node needs to know.
            state_lost: None,
            incarnation: u64::from(replica.get_restarts()) + 1,
            // The map tells the rest of these; a report doesn't.
            epoch: Epoch { conf: replica.get_conf(), ..Epoch::default() },
            members: Vec::new(),
            followers: Vec::new(),
        });
        replicas.push(ReplicaReport {
            shard: ShardId(replica.get_shard()),
            replica: ReplicaId(replica.get_replica()),
            health,
            group,
            restarts: replica.get_restarts(),
            keys: replica.get_keys(),
            bytes: replica.get_bytes(),
        });
    }
    Ok(NodeReport {
        node: NodeId(from.get_node()),
        label: text(from.get_label()?)?,
        phase: match from.get_state().map_err(|_| unknown("NodeStatus.state"))? {
            NodeState::Starting => NodePhase::Starting,
            NodeState::Ready => NodePhase::Ready,
            NodeState::Stopping => NodePhase::Stopping,
            NodeState::ReadOnly => NodePhase::ReadOnly,
        },
        disk_bytes: from.get_disk_bytes(),
        replicas,
        uptime: std::time::Duration::from_millis(from.get_uptime_ms()),
        snapshot_bytes: from.get_snapshot_bytes(),
        stuck: read_stuck(from.get_stuck()?)?,
    })
}

/// Reads where members should change and can't.
pub fn read_stuck(
    from: capnp::struct_list::Reader<'_, stuck_shard::Owned>,
) -> Result<Vec<(ShardId, String)>, CodecError> {
    from.iter().map(|one| Ok((ShardId(one.get_shard()), text(one.get_why()?)?))).collect()
}

fn text(from: capnp::text::Reader<'_>) -> Result<String, CodecError> {
    Ok(from.to_string().map_err(capnp::Error::from)?)
}
