//! Random messages that keep the rules, and each rule broken once.

use super::*;
use proptest::collection::vec;
use proptest::prelude::*;

fn bytes(max: usize) -> impl Strategy<Value = Bytes> {
    vec(any::<u8>(), 0..max).prop_map(Bytes::from)
}

/// Entries that follow on `index`, with terms from `low` to `high`.
fn entries(index: u64, low: u64, high: u64) -> impl Strategy<Value = Vec<Entry>> {
    let entry = (low..=high, 0..3i32, bytes(300), bytes(20));
    vec(entry, 0..6).prop_map(move |mut parts| {
        parts.sort_by_key(|part| part.0);
        (index + 1..)
            .zip(parts)
            .map(|(index, (term, kind, data, context))| Entry {
                entry_type: EntryType::from_i32(kind).unwrap(),
                term,
                index,
                data,
                context,
                ..Entry::default()
            })
            .collect()
    })
}

fn snapshot(term: u64) -> impl Strategy<Value = Snapshot> {
    (1..=term, 1..POSITION_MAX, 1..5u64, any::<bool>()).prop_map(|(term, index, n, joint)| {
        let mut snapshot = Snapshot::default();
        let metadata = snapshot.mut_metadata();
        (metadata.index, metadata.term) = (index, term);
        let state = metadata.mut_conf_state();
        state.voters = (1..=n).collect();
        state.learners = vec![20, 21];
        if joint {
            state.voters_outgoing = vec![1, 30];
            state.learners_next = vec![30];
            state.auto_leave = true;
        }
        snapshot
    })
}

/// Any message that [`check`] passes.
pub(crate) fn any_message() -> impl Strategy<Value = GroupMessage> {
    let position = 0..POSITION_MAX;
    let head = (
        prop::sample::select(vec![3, 4, 5, 6, 7, 8, 9, 13, 14, 15, 16, 17, 18]),
        (1..POSITION_MAX, any::<u64>(), any::<u64>()),
        (1..1000u64, 1001..2000u64),
        (position.clone(), position.clone(), position.clone()),
        (position.clone(), any::<bool>(), any::<i64>()),
        bytes(40),
    );
    let address = (any::<u64>(), position.clone(), position.clone(), position);
    (head, address)
        .prop_flat_map(|(head, address)| {
            let (kind, (term, log_term, commit_term), ids, positions, rest, context) = head;
            let kind = MessageType::from_i32(kind).unwrap();
            let (log_term, commit_term) = (1 + log_term % term, commit_term % term);
            let index = positions.0.min(POSITION_MAX - 10);
            let list = entries(index, log_term, term);
            (list, snapshot(term)).prop_map(move |(entries, snapshot)| {
                let mut m = Message {
                    msg_type: kind,
                    to: ids.0,
                    from: ids.1,
                    term,
                    log_term,
                    index,
                    commit: positions.1,
                    commit_term,
                    reject_hint: positions.2,
                    request_snapshot: rest.0,
                    reject: rest.1,
                    priority: rest.2,
                    deprecated_priority: rest.2.max(0) as u64,
                    context: context.clone(),
                    ..Message::default()
                };
                match kind {
                    MessageType::MsgAppend => m.entries = entries.into(),
                    MessageType::MsgSnapshot => m.set_snapshot(snapshot),
                    MessageType::MsgReadIndex | MessageType::MsgReadIndexResp => {
                        m.entries =
                            vec![Entry { data: Bytes::from_static(b"context"), ..Entry::default() }].into();
                        if kind == MessageType::MsgReadIndex {
                            m.term = 0;
                        }
                    }
                    _ => {}
                }
                let beats = matches!(kind, MessageType::MsgHeartbeat | MessageType::MsgHeartbeatResponse);
                let word = SleepWord { process: rest.2 as u64, round: positions.2 };
                GroupMessage {
                    shard: ShardId(address.0),
                    epoch: Epoch { range: address.1, conf: address.2 },
                    safe_index: address.3,
                    message: m,
                    node: NodeId::default(),
                    sleep: (beats && rest.1).then_some(word),
                }
            })
        })
        .boxed()
}

fn append() -> GroupMessage {
    let entry = |index, term| Entry { index, term, ..Entry::default() };
    GroupMessage {
        shard: ShardId(1),
        epoch: Epoch::default(),
        safe_index: 0,
        message: Message {
            msg_type: MessageType::MsgAppend,
            to: 1,
            from: 2,
            term: 9,
            log_term: 5,
            index: 5,
            entries: vec![entry(6, 5), entry(7, 9)].into(),
            ..Message::default()
        },
        node: NodeId::default(),
        sleep: None,
    }
}

#[test]
fn what_makes_raft_panic_is_refused() {
    assert!(check(&append()).is_ok());
    type Change = fn(&mut Message);
    let changes: [(&str, Change); 17] = [
        ("is never sent", |m| m.msg_type = MessageType::MsgHup),
        ("is never sent", |m| m.msg_type = MessageType::MsgPropose),
        ("is never sent", |m| m.msg_type = MessageType::MsgCheckQuorum),
        ("from replica 0", |m| m.from = 0),
        ("to 0", |m| m.to = 0),
        ("from replica 1 to 1", |m| m.from = 1),
        ("of term 0", |m| m.term = 0),
        ("log term 10", |m| m.log_term = 10),
        ("commit term 10", |m| m.commit_term = 10),
        ("out of range", |m| m.reject_hint = u64::MAX),
        ("of no term", |m| m.log_term = 0),
        ("must follow", |m| m.index = 6),
        ("must follow", |m| m.entries[1].index = 9),
        ("of term 4", |m| m.entries[0].term = 4),
        ("of term 10", |m| m.entries[1].term = 10),
        ("with entries", |m| m.msg_type = MessageType::MsgHeartbeat),
        ("without its context", |m| {
            m.msg_type = MessageType::MsgReadIndex;
            m.term = 0;
        }),
    ];
    for (expected, change) in changes {
        let mut message = append();
        change(&mut message.message);
        let error = check(&message).expect_err(expected).to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
}

#[test]
fn a_snapshot_is_refused_if_its_membership_makes_no_sense() {
    type Change = fn(&mut Snapshot);
    let good = || {
        let mut message = append();
        message.message.msg_type = MessageType::MsgSnapshot;
        message.message.entries.clear();
        let snapshot = message.message.mut_snapshot();
        let metadata = snapshot.mut_metadata();
        (metadata.index, metadata.term) = (7, 5);
        metadata.mut_conf_state().voters = vec![1, 2];
        message
    };
    assert!(check(&good()).is_ok());
    let changes: [Change; 9] = [
        |s| s.data = Bytes::from_static(b"state"),
        |s| s.mut_metadata().index = 0,
        |s| s.mut_metadata().term = 10,
        |s| s.mut_metadata().mut_conf_state().voters.clear(),
        |s| s.mut_metadata().mut_conf_state().voters.push(1),
        |s| s.mut_metadata().mut_conf_state().voters.push(0),
        |s| s.mut_metadata().mut_conf_state().learners.push(2),
        |s| s.mut_metadata().mut_conf_state().learners_next.push(2),
        |s| s.mut_metadata().mut_conf_state().auto_leave = true,
    ];
    for (at, change) in changes.iter().enumerate() {
        let mut message = good();
        change(message.message.mut_snapshot());
        assert!(check(&message).is_err(), "change {at}");
    }
}
