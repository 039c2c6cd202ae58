use super::*;
use proptest::prelude::*;

pub(crate) fn any_id() -> impl Strategy<Value = RandomId> {
    any::<[u8; 16]>().prop_map(RandomId)
}

pub(crate) fn any_node() -> impl Strategy<Value = NodeRecord> {
    let numbers = (any::<u64>(), any::<u32>(), any::<u64>());
    (numbers, ".{0,12}", ".{0,20}", ".{0,20}", "[a-z]{0,4}", any_standing(), any_id()).prop_map(
        |((id, weight, at), label, client, peer, zone, standing, store_id)| NodeRecord {
            id: NodeId(id),
            label,
            client_address: client,
            peer_address: peer,
            zone,
            weight,
            store_id,
            standing,
            changed_at: at,
        },
    )
}

pub(crate) fn any_standing() -> impl Strategy<Value = Standing> {
    use Standing::{Draining, Leaving, Member, Pending, Removed};
    prop::sample::select(vec![Member, Pending, Draining, Leaving, Removed])
}

pub(crate) fn any_cause() -> impl Strategy<Value = MoveCause> {
    use MoveCause::{Drain, Rebalance, Repair, Replicas};
    prop::sample::select(vec![Rebalance, Repair, Drain, Replicas])
}

pub(crate) fn any_members(most: usize) -> impl Strategy<Value = Vec<Member>> {
    use MemberRole::{Incoming, Learner, Outgoing, Voter};
    let role = prop::sample::select(vec![Voter, Learner, Incoming, Outgoing]);
    prop::collection::vec((1..u64::MAX, role), 0..most).prop_map(|members| {
        let member =
            |(replica, (node, role))| Member { replica: ReplicaId(replica), node: NodeId(node), role };
        (1..).zip(members).map(member).collect()
    })
}

fn any_move() -> impl Strategy<Value = ShardMove> {
    (any::<u64>(), any_members(3), prop::collection::vec(any::<u64>(), 0..3), any::<bool>(), any_cause())
        .prop_map(|(id, adds, removes, cancelling, cause)| ShardMove {
            id,
            adds,
            removes: removes.into_iter().map(ReplicaId).collect(),
            cancelling,
            cause,
        })
}

fn any_target() -> impl Strategy<Value = ShardTarget> {
    (any::<u64>(), prop::collection::vec(any::<u64>().prop_map(NodeId), 0..4))
        .prop_map(|(plan, nodes)| ShardTarget { plan, nodes })
}

fn any_policy() -> impl Strategy<Value = PolicyRecord> {
    (any::<[u64; 3]>(), any::<u32>(), any::<[bool; 2]>()).prop_map(
        |([replace_after_ms, bytes_per_second, changed_at], moves_at_a_time, [automatic, approve_joins])| {
            PolicyRecord {
                replace_after_ms,
                moves_at_a_time,
                bytes_per_second,
                automatic,
                approve_joins,
                changed_at,
            }
        },
    )
}

pub(crate) fn any_rebalance_state() -> impl Strategy<Value = RebalanceState> {
    use RebalanceState::{Cancelling, Failed, Idle, Paused, Running};
    prop::sample::select(vec![Idle, Running, Paused, Cancelling, Failed])
}

fn any_rebalance() -> impl Strategy<Value = RebalanceRecord> {
    (any::<[u64; 4]>(), any::<u32>(), any_rebalance_state(), ".{0,20}").prop_map(
        |([plan, bytes, undoes, changed_at], moves, state, reason)| RebalanceRecord {
            plan,
            state,
            moves,
            bytes,
            reason,
            undoes,
            changed_at,
        },
    )
}

pub(crate) fn any_database() -> impl Strategy<Value = DatabaseRecord> {
    (
        any::<u64>(),
        "[A-Za-z0-9_-]{0,64}",
        any::<u32>(),
        prop::collection::vec(any::<u64>().prop_map(ShardId), 0..9),
        any::<bool>(),
        any::<u64>(),
    )
        .prop_map(|(id, name, replicas, shards, dropped, changed_at)| DatabaseRecord {
            id: DatabaseId(id),
            name,
            replicas,
            shards,
            dropped,
            changed_at,
        })
}

pub(crate) fn any_range() -> impl Strategy<Value = RingRange> {
    (any::<u64>(), any::<u64>()).prop_map(|(a, b)| RingRange { start: a.min(b), end: a.max(b) })
}

pub(crate) fn any_shard() -> impl Strategy<Value = ShardRecord> {
    let change =
        (prop::option::of(any_move()), prop::option::of(any_target()), prop::option::of(any_target()));
    (any::<[u64; 5]>(), any_range(), any_members(5), any::<bool>(), change).prop_map(
        |([id, database, range, conf, at], ring, members, dropped, (moving, target, previous))| ShardRecord {
            id: ShardId(id),
            database: DatabaseId(database),
            range: ring,
            epoch: Epoch { range, conf },
            members,
            dropped,
            moving,
            target,
            previous,
            changed_at: at,
        },
    )
}

pub(crate) fn any_delta() -> impl Strategy<Value = MapDelta> {
    (
        any_id(),
        any::<(u64, u64)>(),
        prop::collection::vec(any_node(), 0..4),
        prop::collection::vec(any_database(), 0..4),
        prop::collection::vec(any_shard(), 0..4),
        (prop::option::of(any_policy()), prop::option::of(any_rebalance())),
    )
        .prop_map(|(cluster_id, (since, version), nodes, databases, shards, (policy, rebalance))| {
            MapDelta { cluster_id, since, version, nodes, databases, shards, policy, rebalance }
        })
}

fn shard_message(change: impl FnOnce(shard_record::Builder<'_>)) -> Result<ShardRecord, String> {
    let record = ShardRecord {
        id: ShardId(7),
        database: DatabaseId(1),
        range: RingRange { start: 5, end: 9 },
        epoch: Epoch { range: 1, conf: 1 },
        members: vec![Member { replica: ReplicaId(1), node: NodeId(1), role: MemberRole::Voter }],
        dropped: false,
        moving: None,
        target: None,
        previous: None,
        changed_at: 3,
    };
    let mut message = capnp::message::Builder::new_default();
    write_shard(&record, message.init_root());
    change(message.get_root().unwrap());
    read_shard(message.get_root_as_reader().unwrap()).map_err(|e| e.to_string())
}

#[test]
fn a_shard_that_contradicts_itself_is_refused() {
    assert!(shard_message(|_| ()).is_ok());
    assert_eq!(
        shard_message(|mut s| s.set_start(10)).unwrap_err(),
        "malformed ring range: it starts at 0x000000000000000a but ends at 0x0000000000000009"
    );
    assert_eq!(
        shard_message(|s| s.get_members().unwrap().get(0).set_replica(0)).unwrap_err(),
        "malformed MemberRecord: replica 0 on node 1: both ids must be above 0"
    );
    let twice = shard_message(|s| {
        let mut members = s.init_members(2);
        for at in 0..2 {
            members.reborrow().get(at).set_replica(4);
            members.reborrow().get(at).set_node(2);
        }
    });
    assert_eq!(twice.unwrap_err(), "malformed MemberRecord: replica 4 is listed twice");
}

#[test]
fn an_identity_of_another_length_is_refused() {
    let mut message = capnp::message::Builder::new_default();
    let mut delta = message.init_root::<map_delta::Builder<'_>>();
    delta.set_cluster_id(&[1; 15]);
    let error = read_delta(delta.into_reader()).unwrap_err();
    assert_eq!(error.to_string(), "malformed clusterId: 15 bytes instead of 16");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_delta_survives_the_wire(delta in any_delta()) {
        let mut message = capnp::message::Builder::new_default();
        write_delta(&delta, message.init_root());
        prop_assert_eq!(read_delta(message.get_root_as_reader()?).unwrap(), delta);
    }
}
