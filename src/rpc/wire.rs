//! The node's side of the protocol: requests are read and checked, results are written.

use bytes::Bytes;
use capnp::struct_list;

use crate::client::{self, ClientError, NotApplied, OperationResult};
use crate::codec::CodecError;
use crate::codec::records::write_delta;
use crate::codec::refusal::write_refusal;
use crate::group::types::{Operation, Output};
use crate::ids::{ClusterId, SessionId, ShardId};
use crate::limits::{ANSWER_BYTES_MAX, BUSY_RETRY_MS};
use crate::machine::command::{Answer, Command, Expect, KvCommand, KvReply, Query, Reply, Versioned};
use crate::machine::session::SessionTag;
use crate::node::handle::{NodePhase, NodeReport, ReplicaHealth};
use crate::placement::map::{ClusterMap, MapDelta};
use crate::refusal::{Outcome, Refusal};
use crate::schema::admin_capnp::{
    NodeState, ReplicaRole, ReplicaState, node_status, replica_status, stuck_shard,
};
use crate::schema::kv_capnp::{batch_request, expect, op_result, operation, scan_response};
use crate::schema::types_capnp::{Applied, error, map_delta};
use crate::transport::backlog::Backlog;

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

/// What a batch says of its session.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BatchSession {
    id: SessionId,
    open: Option<u32>,
    acked_below: u64,
}

/// Reads the session of a batch, if it has one. The inner error is one of the sender's making.
pub fn read_session(
    from: batch_request::Reader<'_>,
) -> Result<Result<Option<BatchSession>, Refusal>, capnp::Error> {
    let bytes = from.get_session()?;
    let (ttl_ms, acked_below) = (from.get_open_ttl_ms(), from.get_acked_below());
    Ok(match SessionId::from_slice(bytes) {
        Some(id) => Ok(Some(BatchSession { id, open: (ttl_ms > 0).then_some(ttl_ms), acked_below })),
        None if !bytes.is_empty() => {
            Err(Refusal::Invalid(format!("the session has {} bytes; it must have 16", bytes.len())))
        }
        None if ttl_ms > 0 || acked_below > 0 => {
            Err(Refusal::Invalid("`openTtlMs` and `ackedBelow` say something of no session".into()))
        }
        None => Ok(None),
    })
}

/// The tag of an operation, if it has one.
pub fn read_tag(
    from: operation::Reader<'_>,
    session: Option<&BatchSession>,
) -> Result<Option<SessionTag>, Refusal> {
    let invalid = |text: &str| Err(Refusal::Invalid(text.into()));
    let sequence = from.get_sequence();
    match session {
        _ if sequence == 0 => Ok(None),
        _ if matches!(from.which(), Ok(operation::Get(()))) => {
            invalid("a get has no sequence: there is nothing to remember of it")
        }
        None => invalid("the operation has a sequence, but its batch no session"),
        Some(session) if sequence < session.acked_below => {
            invalid("the batch acknowledges the result of an operation that it asks for")
        }
        Some(session) => Ok(Some(SessionTag {
            session: session.id,
            sequence,
            acked_below: session.acked_below,
            open: session.open,
        })),
    }
}

/// The operation as a replica takes it.
pub fn to_group(operation: client::Operation, session: Option<SessionTag>) -> Operation {
    let command = match operation {
        client::Operation::Get(key) => return Operation::Query(Query::Get { key }),
        client::Operation::Put(key, value) => KvCommand::Put { key, value },
        client::Operation::Delete(key) => KvCommand::Delete { key },
        client::Operation::Cas(key, expect, value) => KvCommand::Cas { key, expect, value },
    };
    Operation::Command { command: Command::Kv(command), session }
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
        Output::Answer(Answer::Page { .. })
        | Output::Reply(Reply::Meta(_) | Reply::Session(_))
        | Output::Changed(_)
        | Output::Marked(_) => Err(Refusal::Unknown("the replica answered another question".into())),
    }
}

/// Room for values in one answer.
pub struct Room {
    left: usize,
    used: bool,
    /// The connection takes no more values at present.
    none: bool,
}

impl Default for Room {
    fn default() -> Room {
        Room { left: ANSWER_BYTES_MAX, used: false, none: false }
    }
}

impl Room {
    /// Room on a connection with this backlog: none if that is over its bound.
    pub fn on(connection: &Backlog) -> Room {
        Room { none: connection.full(), ..Room::default() }
    }

    /// Takes room for a value. The first always has room, if there is any.
    fn take(&mut self, value: &Versioned) -> bool {
        let fits = !self.none && (value.value.len() <= self.left || !self.used);
        if fits {
            self.left = self.left.saturating_sub(value.value.len());
            self.used = true;
        }
        fits
    }

    /// Why there is none.
    fn busy(&self) -> Refusal {
        if self.none {
            return unread();
        }
        Refusal::Busy { what: "values in one answer".into(), retry_after_ms: 0 }
    }
}

/// The refusal of a value on a connection that doesn't read what it was sent before.
pub fn unread() -> Refusal {
    Refusal::Busy { what: "answers that the connection hasn't read".into(), retry_after_ms: BUSY_RETRY_MS }
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
            write_refusal(&room.busy(), to.init_error());
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
        ClientError::Unknown(why) => {
            to.set_applied(Applied::Unknown);
            to.set_retryable(true);
            to.set_message(why.to_string().as_str());
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
        policy: None,
        rebalance: None,
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
        NodePhase::ReadOnly => NodeState::ReadOnly,
    });
    to.set_map_version(map_version);
    to.set_disk_bytes(report.disk_bytes);
    to.set_software(super::SOFTWARE);
    let mut protocol = to.reborrow().init_protocol();
    protocol.set_min(crate::version::PROTOCOL_MIN);
    protocol.set_max(crate::version::PROTOCOL_MAX);
    to.set_pid(std::process::id());
    to.set_uptime_ms(u64::try_from(report.uptime.as_millis()).unwrap_or(u64::MAX));
    to.set_snapshot_bytes(report.snapshot_bytes);
    write_stuck(
        &report.stuck,
        to.reborrow().init_stuck(u32::try_from(report.stuck.len()).unwrap_or(u32::MAX)),
    );
    let count = u32::try_from(report.replicas.len()).unwrap_or(u32::MAX);
    let mut replicas = to.init_replicas(count);
    for (at, replica) in (0..count).zip(&report.replicas) {
        write_replica(replica, replicas.reborrow().get(at));
    }
}

/// Writes where members should change and can't.
pub(super) fn write_stuck(from: &[(ShardId, String)], mut to: struct_list::Builder<'_, stuck_shard::Owned>) {
    for (at, (shard, why)) in (0..to.len()).zip(from) {
        let mut one = to.reborrow().get(at);
        one.set_shard(shard.0);
        one.set_why(why.as_str());
    }
}

fn write_replica(replica: &crate::node::handle::ReplicaReport, mut to: replica_status::Builder<'_>) {
    to.set_shard(replica.shard.0);
    to.set_replica(replica.replica.0);
    to.set_restarts(replica.restarts);
    to.set_keys(replica.keys);
    to.set_bytes(replica.bytes);
    let (state, message) = match &replica.health {
        // Between its start and its first word a replica has nothing to show yet.
        ReplicaHealth::Serving if replica.group.is_none() => (ReplicaState::Recovering, ""),
        ReplicaHealth::Serving => (ReplicaState::Serving, ""),
        ReplicaHealth::Recovering => (ReplicaState::Recovering, ""),
        ReplicaHealth::Installing => (ReplicaState::Installing, ""),
        // The same for who doesn't know the difference; a text is what makes it.
        ReplicaHealth::Refetching(why) => (ReplicaState::Installing, why.as_str()),
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
    to.set_conf(group.epoch.conf);
    to.set_applied(group.applied);
    to.set_committed(group.committed);
    to.set_truncated(group.truncated);
    to.set_last(group.last);
    to.set_last_term(group.last_term);
}

/// The refusal of a change that was made but whose consequence is not there yet.
pub fn not_yet(text: String) -> Refusal {
    Refusal::Other { outcome: Outcome::Unknown, retryable: true, retry_after_ms: 0, message: text }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::wire::{read_page, read_report, read_result, write_operation};
    use crate::group::types::GroupStatus;
    use crate::ids::{Epoch, NodeId, ReplicaId};
    use crate::node::handle::ReplicaReport;
    use proptest::prelude::*;
    use std::time::Duration;

    fn any_bytes() -> impl Strategy<Value = Bytes> {
        prop::collection::vec(any::<u8>(), 0..40).prop_map(Bytes::from)
    }

    fn any_versioned() -> impl Strategy<Value = Versioned> {
        (any_bytes(), any::<u64>()).prop_map(|(value, version)| Versioned { value, version })
    }

    fn any_operation() -> impl Strategy<Value = client::Operation> {
        let expect = prop_oneof![
            Just(Expect::Absent),
            any_bytes().prop_map(Expect::Value),
            any::<u64>().prop_map(Expect::Version),
        ];
        prop_oneof![
            any_bytes().prop_map(client::Operation::Get),
            (any_bytes(), any_bytes()).prop_map(|(k, v)| client::Operation::Put(k, v)),
            any_bytes().prop_map(client::Operation::Delete),
            (any_bytes(), expect, any_bytes()).prop_map(|(k, e, v)| client::Operation::Cas(k, e, v)),
        ]
    }

    /// An operation and a result that it may have.
    fn any_end() -> impl Strategy<Value = (client::Operation, OperationResult)> {
        use OperationResult::{Deleted, Mismatch, Value, Written};
        let there = prop::option::of(any_versioned());
        (any_operation(), there, any::<u64>(), any::<bool>()).prop_map(|(operation, there, version, flag)| {
            let result = match operation {
                client::Operation::Get(_) => Value(there),
                client::Operation::Delete(_) => Deleted(flag.then_some(version)),
                client::Operation::Cas(..) if flag => Mismatch(there),
                _ => Written(version),
            };
            (operation, result)
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn operations_survive_the_wire(operation in any_operation()) {
            let mut message = capnp::message::Builder::new_default();
            write_operation(&operation, message.init_root());
            prop_assert_eq!(read_operation(message.get_root_as_reader()?).unwrap(), operation);
        }

        #[test]
        fn results_survive_the_wire((operation, result) in any_end()) {
            let mut message = capnp::message::Builder::new_default();
            write_result(Ok(result.clone()), &mut Room::default(), message.init_root());
            let read = read_result(&operation, message.get_root_as_reader()?).unwrap();
            prop_assert_eq!(read, Ok(result));
        }

        #[test]
        fn pages_survive_the_wire(pairs in prop::collection::vec((any_bytes(), any_versioned()), 1..6), more: bool) {
            let mut message = capnp::message::Builder::new_default();
            write_page(&pairs, more, message.init_root());
            prop_assert_eq!(read_page(message.get_root_as_reader()?).unwrap(), Ok((pairs, more)));
        }
    }

    /// What a node makes of a batch's session and its one operation.
    fn tag(
        session: &[u8],
        header: (u32, u64),
        sequence: u64,
        operation: &client::Operation,
    ) -> Result<Option<SessionTag>, Refusal> {
        let mut message = capnp::message::Builder::new_default();
        let mut request = message.init_root::<batch_request::Builder<'_>>();
        request.set_session(session);
        request.set_open_ttl_ms(header.0);
        request.set_acked_below(header.1);
        let mut one = request.init_operations(1).get(0);
        one.set_sequence(sequence);
        write_operation(operation, one);
        let request: batch_request::Reader<'_> = message.get_root_as_reader().unwrap();
        let session = read_session(request).unwrap()?;
        read_tag(request.get_operations().unwrap().get(0), session.as_ref())
    }

    #[test]
    fn tags_are_checked() {
        let (get, put) = (
            client::Operation::Get(Bytes::from_static(b"k")),
            client::Operation::Put(Bytes::from_static(b"k"), Bytes::from_static(b"v")),
        );
        let id = [7; 16];
        let whole = SessionTag {
            session: SessionId::from_slice(&id).unwrap(),
            sequence: 5,
            acked_below: 5,
            open: Some(10_000),
        };
        assert_eq!(tag(&id, (10_000, 5), 5, &put), Ok(Some(whole)));
        assert_eq!(tag(&id, (0, 0), 1, &put).unwrap().unwrap().open, None);
        for (session, header, sequence, operation) in
            [(&id[..], (10_000, 5), 0, &put), (&id[..], (10_000, 5), 0, &get), (&[], (0, 0), 0, &put)]
        {
            assert_eq!(tag(session, header, sequence, operation), Ok(None));
        }
        for (session, header, sequence, operation) in [
            (&id[..15], (0, 0), 1, &put),
            (&[0; 17][..], (0, 0), 0, &put),
            (&[], (0, 0), 1, &put),
            (&[], (10_000, 0), 0, &put),
            (&[], (0, 1), 0, &get),
            (&id[..], (0, 6), 5, &put),
            (&id[..], (0, 0), 1, &get),
        ] {
            let refused = tag(session, header, sequence, operation);
            assert!(matches!(refused, Err(Refusal::Invalid(_))), "{refused:?}");
        }
    }

    #[test]
    fn an_answer_to_another_question_is_refused() {
        let mut message = capnp::message::Builder::new_default();
        let get = client::Operation::Get(Bytes::from_static(b"k"));
        write_result(Ok(OperationResult::Written(1)), &mut Room::default(), message.init_root());
        assert!(read_result(&get, message.get_root_as_reader().unwrap()).is_err());
        let mut message = capnp::message::Builder::new_default();
        write_page(&[], true, message.init_root());
        assert!(read_page(message.get_root_as_reader().unwrap()).is_err());
    }

    #[test]
    fn an_answer_holds_one_value_of_any_size_and_no_more_than_its_bound() {
        let great = Versioned { value: Bytes::from(vec![0; ANSWER_BYTES_MAX + 1]), version: 1 };
        let get = client::Operation::Get(Bytes::from_static(b"k"));
        let mut room = Room::default();
        let mut ask = || {
            let mut message = capnp::message::Builder::new_default();
            let result = Ok(OperationResult::Value(Some(great.clone())));
            write_result(result, &mut room, message.init_root());
            let options = capnp::message::ReaderOptions { traversal_limit_in_words: None, nesting_limit: 8 };
            let bytes = capnp::serialize::write_message_to_words(&message);
            let message = capnp::serialize::read_message(&bytes[..], options).unwrap();
            read_result(&get, message.get_root().unwrap()).unwrap()
        };
        assert!(ask().is_ok());
        let second = ask().unwrap_err();
        assert!(second.retryable() && second.outcome() == Outcome::NotApplied);
        // None at all where the answers before aren't read; but what a write came to is told.
        let mut room = Room { none: true, ..Room::default() };
        assert!(!room.take(&Versioned { value: Bytes::new(), version: 1 }));
        assert_eq!(room.busy(), unread());
        let mut message = capnp::message::Builder::new_default();
        write_result(Ok(OperationResult::Written(1)), &mut room, message.init_root());
        let put = client::Operation::Put(Bytes::from_static(b"k"), Bytes::new());
        assert!(read_result(&put, message.get_root_as_reader().unwrap()).unwrap().is_ok());
    }

    #[test]
    fn what_a_forwarded_call_came_to_is_kept() {
        let told = |error: &ClientError| {
            let mut message = capnp::message::Builder::new_default();
            write_client_error(error, message.init_root());
            crate::codec::refusal::read_refusal(message.get_root_as_reader().unwrap())
        };
        let unknown = told(&ClientError::Unknown("gone".into()));
        assert_eq!(unknown.outcome(), Outcome::Unknown);
        let within = Duration::from_secs(1);
        let last = "no leader".into();
        let late = ClientError::NotApplied(NotApplied::Unavailable { within, last });
        assert_eq!(told(&late).outcome(), Outcome::NotApplied);
        assert!(told(&late).retryable());
        let invalid = told(&ClientError::Invalid("no".into()));
        assert_eq!(invalid, Refusal::Invalid("no".into()));
    }

    #[test]
    fn reports_survive_the_wire() {
        let group = GroupStatus {
            role: raft::StateRole::Leader,
            learner: false,
            term: 7,
            leader: Some(ReplicaId(3)),
            applied: 10,
            committed: 11,
            truncated: 5,
            last: 12,
            last_term: 6,
            recovering: false,
            state_lost: None,
            incarnation: 3,
            epoch: Epoch { range: 0, conf: 9 },
            members: Vec::new(),
            followers: Vec::new(),
        };
        let replica = |shard, health, group: Option<GroupStatus>| ReplicaReport {
            shard: ShardId(shard),
            replica: ReplicaId(3),
            health,
            group,
            restarts: 2,
            keys: 5,
            bytes: 60,
        };
        let recovering = GroupStatus { recovering: true, ..group.clone() };
        let why = || "poison".to_owned();
        let report = NodeReport {
            node: NodeId(4),
            label: "n4".into(),
            phase: NodePhase::Stopping,
            disk_bytes: 99,
            replicas: vec![
                replica(1, ReplicaHealth::Serving, Some(group.clone())),
                replica(2, ReplicaHealth::Recovering, Some(recovering)),
                replica(3, ReplicaHealth::Restarting(why()), None),
                replica(4, ReplicaHealth::Quarantined(why()), None),
                replica(5, ReplicaHealth::Failed(why()), None),
                replica(6, ReplicaHealth::Installing, Some(group.clone())),
                replica(7, ReplicaHealth::Refetching(why()), Some(group)),
            ],
            uptime: Duration::from_millis(1234),
            snapshot_bytes: 77,
            stuck: vec![(ShardId(6), "no node takes it".into())],
        };
        let mut message = capnp::message::Builder::new_default();
        write_report(&report, ClusterId::default(), 5, message.init_root());
        let read = read_report(message.get_root_as_reader().unwrap()).unwrap();
        assert_eq!(format!("{read:?}"), format!("{report:?}"));
    }
}
