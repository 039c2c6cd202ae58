//! Frames survive the wire; damaged ones never panic.

use super::*;
use crate::codec::digest::tests::{any_digest, any_digest_request, any_marked};
use crate::codec::messages::tests::any_message;
use crate::codec::records::tests::{any_delta, any_id, any_node, any_shard};
use crate::codec::snapshot::tests::any_snapshot_frame;
use crate::codec::survey::tests::{any_order, any_survey};
use proptest::collection::vec;
use proptest::prelude::*;
use raft::eraftpb::{Entry, Message, MessageType};

fn any_member() -> impl Strategy<Value = NodeId> {
    (1..u64::MAX).prop_map(NodeId)
}

fn any_request() -> impl Strategy<Value = PeerRequest> {
    let formation = (any_id(), any_member(), vec(any_node(), 0..4), any_shard());
    prop_oneof![
        Just(PeerRequest::Probe),
        any_id().prop_map(PeerRequest::Claim),
        formation.prop_map(|(cluster_id, node, nodes, metadata)| {
            PeerRequest::Form(Formation { cluster_id, node, nodes, metadata })
        }),
        (prop::option::of(any_id()), any_node())
            .prop_map(|(cluster_id, record)| PeerRequest::Join { cluster_id, record }),
        any::<u64>().prop_map(|since| PeerRequest::Map { since }),
        any_node().prop_map(|node| PeerRequest::Meta(MetaCommand::AddNode(node))),
        Just(PeerRequest::Survey),
        any_order().prop_map(PeerRequest::Order),
        any::<u64>().prop_map(|shard| PeerRequest::Mark(ShardId(shard))),
        any_digest_request().prop_map(PeerRequest::Digest),
    ]
}

fn any_probe() -> impl Strategy<Value = ProbeAnswer> {
    let membership = prop_oneof![
        Just(Membership::Empty),
        any_id().prop_map(Membership::Claimed),
        (any_id(), any_member()).prop_map(|(id, node)| Membership::Member(id, node)),
    ];
    (membership, any_node()).prop_map(|(membership, mut record)| {
        record.changed_at = 0;
        record.standing = Standing::Member;
        record.id = match membership {
            Membership::Member(_, node) => node,
            _ => NodeId(0),
        };
        ProbeAnswer { membership, record }
    })
}

fn any_response() -> impl Strategy<Value = PeerResponse> {
    prop_oneof![
        ".{0,20}".prop_map(|text| PeerResponse::Refused(Refusal::Invalid(text))),
        any_probe().prop_map(PeerResponse::Probe),
        Just(PeerResponse::Claimed),
        Just(PeerResponse::Formed),
        (any_member(), any_delta()).prop_map(|(node, map)| PeerResponse::Joined { node, map }),
        any_delta().prop_map(PeerResponse::Map),
        any_member().prop_map(|node| PeerResponse::Meta(MetaReply::Node(node))),
        any_survey().prop_map(PeerResponse::Survey),
        any_member().prop_map(PeerResponse::Pending),
        Just(PeerResponse::Done),
        any_marked().prop_map(PeerResponse::Marked),
        any_digest().prop_map(PeerResponse::Digest),
    ]
}

fn any_frame() -> impl Strategy<Value = PeerFrame> {
    prop_oneof![
        vec(any_message(), 0..8).prop_map(PeerFrame::Raft),
        (any_member(), any::<[u64; 3]>(), any::<bool>(), prop::option::of(0..u32::MAX)).prop_map(
            |(node, [incarnation, map_version, ended], disk_full, map_age_ms)| {
                let heartbeat =
                    NodeHeartbeat { node, incarnation, map_version, disk_full, map_age_ms, ended };
                PeerFrame::Heartbeat(heartbeat)
            }
        ),
        (any::<u64>(), any_request()).prop_map(|(id, it)| PeerFrame::Request(id, it)),
        (any::<u64>(), any_response()).prop_map(|(id, it)| PeerFrame::Response(id, it)),
        any_snapshot_frame().prop_map(PeerFrame::Snapshot),
    ]
}

fn encoded(frame: &PeerFrame) -> Vec<u8> {
    let mut out = Vec::new();
    encode(frame, &mut out).unwrap();
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn a_frame_survives_the_wire(frame in any_frame(), shift in 0usize..8) {
        let bytes = encoded(&frame);
        prop_assert_eq!(bytes.len() % 8, 0);
        if let PeerFrame::Raft(messages) = &frame {
            // The outbox counts with this.
            let guess: usize = messages.iter().map(messages::wire_size).sum();
            prop_assert!(bytes.len().abs_diff(guess) <= 64 + 32 * messages.len(), "{} {guess}", bytes.len());
        }
        // Also from where Cap'n Proto can't read it in place.
        let mut moved = vec![0; shift];
        moved.extend_from_slice(&bytes);
        prop_assert_eq!(decode(Bytes::from(moved).slice(shift..)).unwrap(), frame);
    }

    #[test]
    fn damaged_frames_are_refused_or_read_but_never_panic(
        frame in any_frame(),
        changes in vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes = encoded(&frame);
        let whole = bytes.len();
        for (at, value) in &changes {
            bytes[at.index(whole)] = *value;
        }
        if let Ok(PeerFrame::Raft(messages)) = decode(Bytes::from(bytes.clone())) {
            for message in &messages {
                prop_assert!(check(message).is_ok());
            }
        }
        bytes.truncate(cut.index(whole));
        let _ = decode(Bytes::from(bytes));
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in vec(any::<u8>(), 0..400)) {
        let _ = decode(Bytes::from(bytes.clone()));
        let mut framed = vec![0, 0, 0, 0];
        framed.extend_from_slice(&((bytes.len() / 8) as u32).to_le_bytes());
        framed.extend_from_slice(&bytes);
        let _ = decode(Bytes::from(framed));
    }
}

fn append(entries: Vec<Bytes>) -> GroupMessage {
    let entries: Vec<Entry> =
        (1..).zip(entries).map(|(index, data)| Entry { index, term: 1, data, ..Entry::default() }).collect();
    GroupMessage {
        shard: crate::ids::ShardId(1),
        epoch: crate::ids::Epoch::default(),
        safe_index: 0,
        message: Message {
            msg_type: MessageType::MsgAppend,
            to: 1,
            from: 2,
            term: 1,
            entries: entries.into(),
            ..Message::default()
        },
        node: NodeId::default(),
        sleep: None,
    }
}

#[test]
fn entries_do_not_pin_the_frame_they_came_in() {
    let message = append(vec![Bytes::from(vec![1; 100_000]); 2]);
    let payload = Bytes::from(encoded(&PeerFrame::Raft(vec![message])));
    let frame = decode(payload.clone()).unwrap();
    assert!(payload.is_unique(), "{} bytes are kept", payload.len());
    drop(frame);
}

#[test]
fn one_segment_holds_any_frame_of_raft_messages() {
    let messages = vec![append(vec![Bytes::from(vec![1; 5000]); 50]); 3];
    let bytes = encoded(&PeerFrame::Raft(messages));
    assert_eq!(bytes[..4], [0; 4], "one segment");
}

#[test]
fn a_few_bytes_cannot_claim_many_entries() {
    // A frame whose one message has a list of very many entries of no size.
    let mut builder = capnp::message::Builder::new_default();
    let mut list = builder.init_root::<peer_frame::Builder<'_>>().init_raft(1);
    let mut message = list.reborrow().get(0);
    message.set_kind(MessageType::MsgAppend as u8);
    message.init_entries(3);
    let mut bytes = Vec::new();
    write_frame_bytes(&builder, &mut bytes).unwrap();
    let tag = |count: u64, words: u64| (count << 2 | words << 32).to_le_bytes();
    let at = bytes.chunks(8).position(|word| word == tag(3, 3 | 2 << 16)).expect("the list's tag");
    bytes[at * 8..at * 8 + 8].copy_from_slice(&tag(1 << 28, 0));
    let error = decode(Bytes::from(bytes)).unwrap_err();
    assert!(matches!(error, CodecError::Capnp(_)), "{error}");
}
