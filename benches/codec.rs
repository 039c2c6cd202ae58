//! What it costs to put commands and messages into bytes and to read them back: entries of the log, and frames between
//! nodes.
//!
//! `cargo bench --bench codec`. Entries hold puts of a session, as clients send them.

use std::hint::black_box;

use bytes::Bytes;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use pontoon::codec::GroupMessage;
use pontoon::codec::peer::{self, PeerFrame};
use pontoon::ids::{Epoch, NodeId, RandomId, ShardId};
use pontoon::machine::command::{Command, KvCommand};
use pontoon::machine::entry::{TaggedCommand, decode_entry, encode_entry};
use pontoon::machine::session::SessionTag;
use raft::eraftpb::{Entry, Message, MessageType};

const VALUE_BYTES: usize = 128;
/// Groups that share a frame.
const GROUPS: u64 = 8;

fn commands(count: u64) -> Vec<TaggedCommand> {
    let value = Bytes::from(vec![7; VALUE_BYTES]);
    let command = |sequence| {
        let key = format!("k{sequence:015}").into();
        let tag = SessionTag { session: RandomId([1; 16]), sequence, acked_below: 1, open: None };
        (Command::Kv(KvCommand::Put { key, value: value.clone() }), Some(tag))
    };
    (1..=count).map(command).collect()
}

fn entries(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("entry");
    for count in [1, 64] {
        let commands = commands(count);
        let bytes = Bytes::from(encode_entry(&commands, 1));
        assert_eq!(decode_entry(&bytes).unwrap().commands, commands);
        group.throughput(Throughput::Elements(count));
        group.bench_function(format!("encode {count} puts"), |b| {
            b.iter(|| encode_entry(black_box(&commands), 1));
        });
        group.bench_function(format!("decode {count} puts"), |b| b.iter(|| decode_entry(black_box(&bytes))));
    }
    group.finish();
}

/// A message of each group: appends with an entry of `puts` commands, or the answers to them.
fn messages(puts: u64) -> Vec<GroupMessage> {
    let data = (puts > 0).then(|| Bytes::from(encode_entry(&commands(puts), 1)));
    let message = |shard| {
        let mut message = Message { to: 2, from: 1, term: 6, index: 100, ..Message::default() };
        match &data {
            Some(data) => {
                message.set_msg_type(MessageType::MsgAppend);
                message.log_term = 6;
                message.commit = 100;
                let entry = Entry { term: 6, index: 101, data: data.clone(), ..Entry::default() };
                message.set_entries(vec![entry].into());
            }
            None => message.set_msg_type(MessageType::MsgAppendResponse),
        }
        let epoch = Epoch { range: 1, conf: 1 };
        GroupMessage { shard: ShardId(shard), epoch, safe_index: 90, message, node: NodeId(0), sleep: None }
    };
    (1..=GROUPS).map(message).collect()
}

fn frames(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("frame");
    for (puts, name) in
        [(0, "answers".to_owned()), (1, "appends of a put".into()), (64, "appends of 64 puts".into())]
    {
        let messages = messages(puts);
        let mut bytes = Vec::new();
        peer::encode_raft(&messages, &mut bytes).unwrap();
        let payload = Bytes::from(bytes);
        assert_eq!(peer::decode(payload.clone()).unwrap(), PeerFrame::Raft(messages.clone()));
        group.throughput(Throughput::Elements(GROUPS));
        let mut buffer = Vec::new();
        group.bench_function(format!("encode {GROUPS} {name}"), |b| {
            b.iter(|| {
                buffer.clear();
                peer::encode_raft(black_box(&messages), &mut buffer).unwrap();
            });
        });
        group.bench_function(format!("decode {GROUPS} {name}"), |b| {
            b.iter(|| peer::decode(black_box(&payload).clone()).unwrap());
        });
    }
    group.finish();
}

criterion_group!(benches, entries, frames);
criterion_main!(benches);
