//! The node's side of the protocol: requests are read and checked, results are written.

use bytes::Bytes;

use crate::client::{self, ClientError, NotApplied, OperationResult};
use crate::codec::CodecError;
use crate::codec::records::write_delta;
use crate::codec::refusal::write_refusal;
use crate::group::types::{Operation, Output};
use crate::ids::{ClusterId, ShardId};
use crate::limits::ANSWER_BYTES_MAX;
use crate::machine::command::{Answer, Command, Expect, KvCommand, KvReply, Query, Reply, Versioned};
use crate::node::handle::{NodePhase, NodeReport, ReplicaHealth};
use crate::placement::map::{ClusterMap, MapDelta};
use crate::refusal::{Outcome, Refusal};
use crate::schema::admin_capnp::{NodeState, ReplicaRole, ReplicaState, node_status, replica_status};
use crate::schema::kv_capnp::{expect, op_result, operation, scan_response};
use crate::schema::types_capnp::{Applied, error, map_delta};

/// Reads an operation. Keys and values are copied once, out of the message.
pub fn read_operation(from: operation::Reader<'_>) -> Result<client::Operation, CodecError> {
    let key = Bytes::copy_from_slice(from.get_key()?);
    Ok(match from.which().map_err(capnp::Error::from)? {
        operation::Get(()) => client::Operation::Get(key),
        operation::Put(value) => client::Operation::Put(key, Bytes::copy_from_slice(value?)),
        operation::Delete(()) => client::Operation::Delete(key),
        operation::Cas(cas) => client::Operation::Cas(
            key,
            read_expect(cas.get_expect()?)?,
            Bytes::copy_from_slice(cas.get_value()?),
        ),
    })
}

/// Reads the condition of a compare-and-set.
pub fn read_expect(from: expect::Reader<'_>) -> Result<Expect, CodecError> {
    Ok(match from.which().map_err(capnp::Error::from)? {
        expect::Absent(()) => Expect::Absent,
        expect::Value(value) => Expect::Value(Bytes::copy_from_slice(value?)),
        expect::Version(version) => Expect::Version(version),
    })
}

/// The operation as a replica takes it.
pub fn to_group(operation: client::Operation) -> Operation {
    let command = match operation {
        client::Operation::Get(key) => return Operation::Query(Query::Get { key }),
        client::Operation::Put(key, value) => KvCommand::Put { key, value },
        client::Operation::Delete(key) => KvCommand::Delete { key },
        client::Operation::Cas(key, expect, value) => KvCommand::Cas { key, expect, value },
    };
    Operation::Command(Command::Kv(command))
}

/// A replica's output as the result of an operation.
pub fn from_group(output: Output) -> Result<OperationResult, Refusal> {
    match output {
        Output::Answer(Answer::Value(value)) => Ok(OperationResult::Value(value)),
        Output::Reply(Reply::Kv(reply)) => Ok(match reply {
            KvReply::Written(version) => OperationResult::Written(version),
            KvReply::Deleted(version) => OperationResult::Deleted(Some(version)),
            KvReply::Absent => OperationResult::Deleted(None),
            KvReply::Mismatch(there) => OperationResult::Mismatch(there),
        }),
        Output::Answer(Answer::Page { .. }) | Output::Reply(Reply::Meta(_)) => {
            Err(Refusal::Unknown("the replica answered another question".into()))
        }
    }
}

/// Room for values in one answer.
pub struct Room {
    left: usize,
    used: bool,
}

impl Default for Room {
    fn default() -> Room {
        Room { left: ANSWER_BYTES_MAX, used: false }
    }
}

impl Room {
    /// Takes room for a value. The first always has room.
    fn take(&mut self, value: &Versioned) -> bool {
        let fits = value.value.len() <= self.left || !self.used;
        if fits {
            self.left = self.left.saturating_sub(value.value.len());
            self.used = true;
        }
        fits
    }
}

/// Writes the end of an operation. A value for which the answer has no room is left out: neither a get
/// nor a cas whose condition didn't hold changed anything, so both may simply be asked again.
pub fn write_result(
    result: Result<OperationResult, Refusal>,
    room: &mut Room,
    mut to: op_result::Builder<'_>,
) {
    match result {
        Ok(OperationResult::Value(Some(value)) | OperationResult::Mismatch(Some(value)))
            if !room.take(&value) =>
        {
            let busy = Refusal::Busy { what: "values in one answer".into(), retry_after_ms: 0 };
            write_refusal(&busy, to.init_error());
        }
        Ok(OperationResult::Value(Some(value))) => {
            let mut found = to.init_value();
            found.set_value(&value.value);
            found.set_version(value.version);
        }
        Ok(OperationResult::Value(None) | OperationResult::Deleted(None)) => to.set_absent(()),
        Ok(OperationResult::Written(version)) => to.set_written(version),
        Ok(OperationResult::Deleted(Some(version))) => to.set_deleted(version),
        Ok(OperationResult::Mismatch(there)) => {
            let mut mismatch = to.init_mismatch();
            mismatch.set_found(there.is_some());
            if let Some(value) = there {
                mismatch.set_value(&value.value);
                mismatch.set_version(value.version);
            }
        }
        Err(refusal) => write_refusal(&refusal, to.init_error()),
    }
}

/// Writes what became of a call that was carried to another node.
pub fn write_client_error(from: &ClientError, mut to: error::Builder<'_>) {
    match from {
        ClientError::Unknown(text) => {
            to.set_applied(Applied::Unknown);
            to.set_retryable(true);
            to.set_message(text.as_str());
            to.set_unknown_outcome(());
        }
        ClientError::Invalid(text) => write_refusal(&Refusal::Invalid(text.clone()), to),
        ClientError::NotApplied(NotApplied::UnknownDatabase(name)) => {
            write_refusal(&Refusal::UnknownDatabase(name.clone()), to);
        }
        ClientError::NotApplied(NotApplied::Refused(refusal)) => write_refusal(refusal, to),
        ClientError::NotApplied(other) => {
            to.set_applied(Applied::No);
            to.set_retryable(true);
            to.set_message(other.to_string().as_str());
            to.set_unavailable(());
        }
    }
}

/// Writes a page of a scan.
pub fn write_page(pairs: &[(Bytes, Versioned)], more: bool, to: scan_response::Builder<'_>) {
    let mut page = to.init_page();
    page.set_more(more);
    let count = u32::try_from(pairs.len()).unwrap_or(u32::MAX);
    let mut list = page.init_pairs(count);
    for (at, (key, found)) in (0..count).zip(pairs) {
        let mut pair = list.reborrow().get(at);
        pair.set_key(key);
        pair.set_value(&found.value);
        pair.set_version(found.version);
    }
}

/// Whether a refusal is healed by a fresh route.
pub fn wants_route(refusal: &Refusal) -> bool {
    matches!(refusal, Refusal::NotLeader { .. } | Refusal::StaleRoute { .. })
}

/// Writes the records that tell where `shard` is: its own, its database's, its nodes'.
pub fn write_route(map: &ClusterMap, shard: ShardId, to: map_delta::Builder<'_>) {
    let shard = map.shards.get(&shard);
    let database = shard.and_then(|s| map.databases.get(&s.database));
    let members = shard.into_iter().flat_map(|s| &s.members);
    let delta = MapDelta {
        cluster_id: map.cluster_id,
        // Partial: a receiver takes the records over, but doesn't believe to be up to date.
        since: map.version,
        version: map.version,
        nodes: members.filter_map(|m| map.nodes.get(&m.node)).cloned().collect(),
        databases: database.into_iter().cloned().collect(),
        shards: shard.into_iter().cloned().collect(),
    };
    write_delta(&delta, to);
}

/// Writes what a node tells of itself.
pub fn write_report(
    report: &NodeReport,
    cluster_id: ClusterId,
    map_version: u64,
    mut to: node_status::Builder<'_>,
) {
    to.set_node(report.node.0);
    to.set_cluster_id(&cluster_id.0);
    to.set_label(report.label.as_str());
    to.set_state(match report.phase {
        NodePhase::Starting => NodeState::Starting,
        NodePhase::Ready => NodeState::Ready,
        NodePhase::Stopping => NodeState::Stopping,
    });
    to.set_map_version(map_version);
    to.set_disk_bytes(report.disk_bytes);
    to.set_software(super::SOFTWARE);
    let mut protocol = to.reborrow().init_protocol();
    protocol.set_min(crate::version::PROTOCOL_MIN);
    protocol.set_max(crate::version::PROTOCOL_MAX);
    to.set_pid(std::process::id());
    to.set_uptime_ms(u64::try_from(report.uptime.as_millis()).unwrap_or(u64::MAX));
    let count = u32::try_from(report.replicas.len()).unwrap_or(u32::MAX);
    let mut replicas = to.init_replicas(count);
    for (at, replica) in (0..count).zip(&report.replicas) {
        write_replica(replica, replicas.reborrow().get(at));
    }
}

fn write_replica(replica: &crate::node::handle::ReplicaReport, mut to: replica_status::Builder<'_>) {
    to.set_shard(replica.shard.0);
    to.set_replica(replica.replica.0);
    to.set_restarts(replica.restarts);
    let (state, message) = match &replica.health {
        // Between its start and its first word a replica has nothing to show yet.
        ReplicaHealth::Serving if replica.group.is_none() => (ReplicaState::Recovering, ""),
        ReplicaHealth::Serving => (ReplicaState::Serving, ""),
        ReplicaHealth::Recovering => (ReplicaState::Recovering, ""),
        ReplicaHealth::Restarting(why) => (ReplicaState::Restarting, why.as_str()),
        ReplicaHealth::Quarantined(why) => (ReplicaState::Quarantined, why.as_str()),
        ReplicaHealth::Failed(why) => (ReplicaState::Failed, why.as_str()),
    };
    to.set_state(state);
    to.set_message(message);
    let Some(group) = &replica.group else {
        return;
    };
    to.set_role(match group.role {
        _ if group.learner => ReplicaRole::Learner,
        raft::StateRole::Leader => ReplicaRole::Leader,
        raft::StateRole::Follower => ReplicaRole::Follower,
        raft::StateRole::Candidate | raft::StateRole::PreCandidate => ReplicaRole::Candidate,
    });
    to.set_term(group.term);
    to.set_leader(group.leader.map_or(0, |leader| leader.0));
    to.set_applied(group.applied);
    to.set_committed(group.committed);
    to.set_last(group.last);
}

/// The refusal of a change that was made but whose consequence is not there yet.
pub fn not_yet(text: String) -> Refusal {
    Refusal::Other { outcome: Outcome::Unknown, retryable: true, retry_after_ms: 0, message: text }
}
