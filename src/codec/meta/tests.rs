use super::*;
use crate::codec::records::tests::{
    any_cause, any_database, any_id, any_members, any_node, any_range, any_rebalance_state, any_shard,
    any_standing,
};
use crate::placement::ring::RingRange;
use proptest::prelude::*;

pub(crate) fn any_command() -> impl Strategy<Value = MetaCommand> {
    (any_plain_command(), any::<u64>()).prop_map(|(command, seen)| match command.is_order() {
        true if seen % 2 == 1 => command.seen(seen),
        _ => command,
    })
}

fn any_plain_command() -> impl Strategy<Value = MetaCommand> {
    let planned = (any_range(), prop::collection::vec(any::<u64>().prop_map(NodeId), 0..5))
        .prop_map(|(range, nodes)| PlannedShard { range, nodes });
    prop_oneof![
        (any_id(), prop::collection::vec(any_node(), 0..4), any_shard().prop_map(Box::new))
            .prop_map(|(cluster_id, nodes, metadata)| MetaCommand::Form { cluster_id, nodes, metadata }),
        any_node().prop_map(MetaCommand::AddNode),
        (".{0,20}", any::<u32>(), prop::collection::vec(planned, 0..9))
            .prop_map(|(name, replicas, shards)| MetaCommand::CreateDatabase { name, replicas, shards }),
        (".{0,20}", any::<Option<u64>>())
            .prop_map(|(name, id)| MetaCommand::DropDatabase { name, id: id.map(DatabaseId) }),
        any_change_of_members(),
        (any::<u64>(), any_standing())
            .prop_map(|(node, standing)| MetaCommand::SetStanding { node: NodeId(node), standing }),
        any_policy_change().prop_map(MetaCommand::SetPolicy),
        any_rebalancing(),
        (".{0,20}", any::<u32>()).prop_map(|(name, replicas)| MetaCommand::SetReplicas { name, replicas }),
    ]
}

fn any_nodes() -> impl Strategy<Value = Vec<NodeId>> {
    prop::collection::vec(any::<u64>().prop_map(NodeId), 0..5)
}

fn any_change_of_members() -> impl Strategy<Value = MetaCommand> {
    let removes = prop::collection::vec(any::<u64>().prop_map(ReplicaId), 0..5);
    prop_oneof![
        (any::<[u64; 2]>(), any_members(5)).prop_map(|([shard, conf], members)| {
            MetaCommand::ObserveShard { shard: ShardId(shard), conf, members }
        }),
        (any::<[u64; 2]>(), any_nodes(), removes, any_cause()).prop_map(
            |([shard, conf], adds, removes, cause)| MetaCommand::BeginMove {
                shard: ShardId(shard),
                conf,
                adds,
                removes,
                cause,
            }
        ),
        any::<[u64; 2]>().prop_map(|[shard, id]| MetaCommand::CancelMove { shard: ShardId(shard), id }),
        any::<[u64; 2]>().prop_map(|[shard, id]| MetaCommand::EndMove { shard: ShardId(shard), id }),
        any::<[u64; 3]>().prop_map(|[shard, keep, conf]| MetaCommand::RecoverShard {
            shard: ShardId(shard),
            keep: ReplicaId(keep),
            conf,
        }),
    ]
}

fn any_policy_change() -> impl Strategy<Value = PolicyChange> {
    prop_oneof![
        any::<u64>().prop_map(PolicyChange::ReplaceAfterMs),
        any::<u32>().prop_map(PolicyChange::MovesAtATime),
        any::<u64>().prop_map(PolicyChange::BytesPerSecond),
        any::<bool>().prop_map(PolicyChange::Automatic),
        any::<bool>().prop_map(PolicyChange::ApproveJoins),
    ]
}

fn any_rebalancing() -> impl Strategy<Value = MetaCommand> {
    let target = (any::<[u64; 2]>(), any_nodes()).prop_map(|([shard, conf], nodes)| PlannedTarget {
        shard: ShardId(shard),
        conf,
        nodes,
    });
    prop_oneof![
        (any::<[u64; 3]>(), any::<u32>(), prop::collection::vec(target, 0..5)).prop_map(
            |([plan, undoes, bytes], moves, targets)| MetaCommand::BeginRebalance {
                plan,
                undoes,
                targets,
                moves,
                bytes
            }
        ),
        (any::<u64>(), any_rebalance_state(), ".{0,20}")
            .prop_map(|(plan, state, reason)| MetaCommand::ControlRebalance { plan, state, reason }),
    ]
}

fn any_refusal() -> impl Strategy<Value = MetaRefusal> {
    prop_oneof![
        (any_id(), any_id()).prop_map(|(have, asked)| MetaRefusal::OtherCluster { have, asked }),
        (".{0,20}", any::<u32>(), 0..9999_usize)
            .prop_map(|(name, replicas, shards)| { MetaRefusal::NameTaken { name, replicas, shards } }),
        ".{0,20}".prop_map(MetaRefusal::UnknownDatabase),
        any::<u64>().prop_map(|node| MetaRefusal::UnknownNode(NodeId(node))),
        ".{0,20}".prop_map(MetaRefusal::InvalidPlan),
        Just(MetaRefusal::NotFormed),
        ".{0,20}".prop_map(MetaRefusal::Stale),
        (any::<u64>(), prop::collection::vec(any::<u64>().prop_map(ShardId), 0..9), any::<u32>())
            .prop_map(|(node, shards, total)| MetaRefusal::NodeInUse { node: NodeId(node), shards, total }),
        any::<u64>().prop_map(|node| MetaRefusal::NodeRemoved(NodeId(node))),
        ".{0,20}".prop_map(MetaRefusal::NotAllowed),
        (".{0,20}", any::<u64>()).prop_map(|(what, version)| MetaRefusal::Changed { what, version }),
        ".{0,20}".prop_map(MetaRefusal::Other),
    ]
}

fn any_reply() -> impl Strategy<Value = MetaReply> {
    prop_oneof![
        any::<u64>().prop_map(MetaReply::Formed),
        any::<u64>().prop_map(|node| MetaReply::Node(NodeId(node))),
        (any_database(), any::<bool>()).prop_map(|(record, created)| MetaReply::Database { record, created }),
        any::<u64>().prop_map(MetaReply::Done),
        any_refusal().prop_map(MetaReply::Refused),
    ]
}

#[test]
fn bytes_after_the_message_are_refused() {
    let mut bytes = encode_reply(&MetaReply::Formed(3));
    bytes.extend([0; 8]);
    let error = decode_reply(&bytes).unwrap_err().to_string();
    assert_eq!(error, "malformed MetaReply: 8 bytes follow its end");
    assert!(decode_reply(&bytes[..bytes.len() - 16]).is_err());
    assert!(decode_reply(&[]).is_err());
}

#[test]
fn a_refusal_of_an_unknown_kind_keeps_its_text() {
    let mut message = Builder::new_default();
    let mut reply = message.init_root::<meta_reply::Builder<'_>>();
    reply.set_refused("no, for a new reason");
    let bytes = serialize::write_message_to_words(&message);
    assert_eq!(
        decode_reply(&bytes).unwrap(),
        MetaReply::Refused(MetaRefusal::Other("no, for a new reason".into()))
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn commands_survive_at_any_alignment(command in any_command(), shift in 0..8_usize) {
        let bytes = encode_command(&command);
        let shifted = [vec![0xff; shift], bytes].concat();
        prop_assert_eq!(decode_command(&shifted[shift..]).unwrap(), command);
    }

    #[test]
    fn replies_survive(reply in any_reply()) {
        prop_assert_eq!(decode_reply(&encode_reply(&reply)).unwrap(), reply);
    }

    #[test]
    fn damaged_commands_never_panic(
        command in any_command(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes = encode_command(&command);
        for (at, byte) in damage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        let _ = decode_command(&bytes);
        let _ = decode_reply(&bytes);
        let _ = decode_command(&bytes[..cut.index(bytes.len())]);
    }
}

fn creation(shards: usize) -> MetaCommand {
    let shard = PlannedShard { range: RingRange::ALL, nodes: vec![NodeId(1)] };
    MetaCommand::CreateDatabase { name: "wide".into(), replicas: 1, shards: vec![shard; shards] }
}

#[test]
fn who_knows_no_more_than_4096_shards_stops_at_a_database_with_more() {
    for (shards, wide) in
        [(1, false), (fixed::SHARDS_NARROW, false), (fixed::SHARDS_NARROW + 1, true), (fixed::SHARDS, true)]
    {
        let bytes = encode_command(&creation(shards));
        let is_wide = read_message("MetaCommand", &bytes, |message| {
            let root: meta_command::Reader<'_> = message.get_root()?;
            Ok(matches!(root.which(), Ok(meta_command::CreateWideDatabase(_))))
        });
        assert_eq!(is_wide.unwrap(), wide, "{shards} shards");
        assert_eq!(decode_command(&bytes).unwrap(), creation(shards));
    }
}

#[test]
fn neither_kind_of_creation_is_read_with_the_shards_of_the_other() {
    let narrow = fixed::SHARDS_NARROW as u32;
    let mut message = Builder::new_default();
    message.init_root::<meta_command::Builder<'_>>().init_create_database().init_shards(narrow + 1);
    let error = decode_command(&serialize::write_message_to_words(&message)).unwrap_err();
    assert!(error.to_string().contains("another kind"), "{error}");
    let mut message = Builder::new_default();
    message.init_root::<meta_command::Builder<'_>>().init_create_wide_database().init_shards(narrow);
    let error = decode_command(&serialize::write_message_to_words(&message)).unwrap_err();
    assert!(error.to_string().contains("another kind"), "{error}");
}
