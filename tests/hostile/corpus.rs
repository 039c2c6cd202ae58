//! What is sent: conversations as they are held, and what becomes of them under the dice.

use std::sync::{Arc, Mutex};

use pontoon::client::Client;
use pontoon::codec::GroupMessage;
use pontoon::codec::hello::{Lane, PeerHello, ProtocolRange};
use pontoon::codec::peer::{NodeHeartbeat, PeerFrame, PeerRequest, encode};
use pontoon::ids::{ClusterId, NodeId};
use pontoon::placement::map::ShardRecord;
use pontoon::transport::frame;
use raft::eraftpb::{Entry, Message, MessageType};
use rand::rngs::StdRng;
use rand::{Rng, RngExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::cluster::Cluster;
use crate::wire::{Session, What, Wire, dial};

/// Where an input goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Port {
    Client,
    Peer,
    Http,
}

/// See the module page.
pub struct Corpus {
    /// What a client sent: its hello and its calls.
    conversations: Vec<Vec<u8>>,
    /// By node: hellos that it accepts, sealed behind a preamble, with their lanes.
    hellos: Vec<Vec<(Lane, Vec<u8>)>>,
    /// By node: payloads of frames in a peer's name.
    payloads: Vec<Vec<(Lane, Vec<u8>)>>,
}

const REQUESTS: [&str; 6] = [
    "GET /metrics HTTP/1.1\r\nhost: localhost\r\n\r\n",
    "GET /readyz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n",
    "POST /healthz HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nffffffffffff\r\nx\r\n0\r\n\r\n",
    "GET /metrics HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99999999999999999999\r\n\r\n",
    "GET / HTTP/1.1\r\nupgrade: h2c\r\nconnection: upgrade\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n",
    "HEAD /%00%ff/../../metrics?a=b HTTP/1.0\r\n\r\nGET /metrics HTTP/1.1\r\n\r\n",
];

impl Corpus {
    /// Holds the conversations. Needs a `LocalSet`.
    pub async fn gather(cluster: &Cluster, client: &Client) -> Corpus {
        let map = client.map().await.expect("the map");
        let shard = map.database("served").expect("the database").shards[0];
        let shard = &map.shards[&shard];
        let mut conversations = Vec::new();
        for node in &cluster.nodes {
            let (address, heard) = overheard(node.client.clone()).await;
            let kv = dial(&address).await.expect("connected");
            // Keys of this shard or not: a node judges.
            let wire = Wire::new(client, "served").await;
            let id = [7; 16];
            let session = Session { id: &id, open_ttl_ms: 10_000, acked_below: 1 };
            let batch =
                [(1, What::Put("hostile")), (2, What::Delete), (0, What::Get), (3, What::Create("x"))];
            // What comes of it doesn't matter, and a node that doesn't lead says so.
            wire.send(&kv, session, &batch).await.expect("an answer");
            let mut scan = kv.scan_request();
            scan.get().init_request().set_limit(10);
            scan.send().promise.await.expect("an answer");
            conversations.push(heard.lock().expect("no panic holds it").clone());
        }
        let nodes = 1..=cluster.nodes.len() as u64;
        let of = |node: &u64| (map.cluster_id, NodeId(*node));
        Corpus {
            conversations,
            hellos: nodes.clone().map(|node| hellos(of(&node))).collect(),
            payloads: nodes.map(|node| payloads(of(&node), shard)).collect(),
        }
    }
}

/// A way to `target` that keeps what passes towards it.
async fn overheard(target: String) -> (String, Arc<Mutex<Vec<u8>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    let heard = Arc::<Mutex<Vec<u8>>>::default();
    let keep = heard.clone();
    tokio::spawn(async move {
        let (client, _) = listener.accept().await.expect("a connection");
        let node = TcpStream::connect(target).await.expect("connected");
        let (mut from_client, mut to_client) = client.into_split();
        let (mut from_node, mut to_node) = node.into_split();
        let there = async {
            let mut bytes = vec![0; 64 * 1024];
            while let Ok(read @ 1..) = from_client.read(&mut bytes).await {
                keep.lock().expect("no panic holds it").extend_from_slice(&bytes[..read]);
                to_node.write_all(&bytes[..read]).await.expect("sent");
            }
        };
        tokio::select! {
            () = there => {}
            _ = tokio::io::copy(&mut from_node, &mut to_client) => {}
        }
    });
    (address, heard)
}

/// Another node than `node`, of three.
fn other(node: NodeId) -> NodeId {
    NodeId(node.0 % 3 + 1)
}

fn hellos((cluster, node): (ClusterId, NodeId)) -> Vec<(Lane, Vec<u8>)> {
    let lanes = [Lane::Control, Lane::Append, Lane::Request, Lane::Snapshot];
    lanes
        .into_iter()
        .map(|lane| {
            let hello = PeerHello {
                protocol: ProtocolRange::OURS,
                cluster_id: Some(cluster),
                from_node: other(node),
                to_node: node,
                lane,
                incarnation: 99,
            };
            let payload = hello.encode().expect("a hello");
            let mut bytes = frame::preamble().to_vec();
            bytes.extend(frame::sealed(&payload).expect("a frame"));
            (lane, bytes)
        })
        .collect()
}

fn payloads((cluster, node): (ClusterId, NodeId), shard: &ShardRecord) -> Vec<(Lane, Vec<u8>)> {
    use MessageType::*;
    let replica = |node| shard.members.iter().find(|m| m.node == node).expect("a replica").replica.0;
    let (from, to) = (replica(other(node)), replica(node));
    let kinds = [
        MsgAppend,
        MsgAppendResponse,
        MsgRequestVote,
        MsgRequestVoteResponse,
        MsgHeartbeat,
        MsgHeartbeatResponse,
        MsgTransferLeader,
        MsgTimeoutNow,
        MsgReadIndex,
        MsgReadIndexResp,
        MsgRequestPreVote,
        MsgRequestPreVoteResponse,
    ];
    let messages = kinds.into_iter().map(|kind| {
        // Of a term that is over, and about a log that isn't this one.
        let index = 0x0000_5555_5555_5555;
        let mut m = Message { from, to, term: 1, index, log_term: 1, ..Message::default() };
        m.set_msg_type(kind);
        (m.commit, m.reject_hint) = (index, index);
        let entry = |index| Entry { index, term: 1, data: vec![1, 0, 0].into(), ..Entry::default() };
        match kind {
            MsgAppend => m.entries = vec![entry(index + 1), entry(index + 2)].into(),
            MsgReadIndex | MsgReadIndexResp => m.entries = vec![entry(0)].into(),
            _ => {}
        }
        if kind == MsgReadIndex {
            (m.term, m.log_term) = (0, 0);
        }
        GroupMessage {
            shard: shard.id,
            epoch: shard.epoch,
            safe_index: 0,
            message: m,
            node: NodeId::default(),
            sleep: None,
        }
    });
    let messages: Vec<GroupMessage> = messages.collect();
    let heartbeat = NodeHeartbeat {
        node: other(node),
        incarnation: 99,
        map_version: u64::MAX,
        disk_full: false,
        map_age_ms: None,
        ended: 0,
    };
    let claim = PeerRequest::Claim(ClusterId::random());
    let lanes = [Lane::Control, Lane::Append];
    let raft = messages.iter().map(|message| PeerFrame::Raft(vec![message.clone()]));
    let frames = raft.chain([PeerFrame::Raft(messages.clone()), PeerFrame::Heartbeat(heartbeat)]);
    let mut payloads: Vec<_> = frames.flat_map(|frame| lanes.map(|lane| (lane, encoded(&frame)))).collect();
    for request in
        [PeerRequest::Probe, PeerRequest::Map { since: 0 }, claim, PeerRequest::Map { since: u64::MAX }]
    {
        payloads.push((Lane::Request, encoded(&PeerFrame::Request(cluster.0[0].into(), request))));
    }
    payloads
}

fn encoded(frame: &PeerFrame) -> Vec<u8> {
    let mut out = Vec::new();
    encode(frame, &mut out).expect("a frame");
    out
}

fn one_of<'a, T>(list: &'a [T], dice: &mut StdRng) -> &'a T {
    &list[dice.random_range(0..list.len())]
}

fn noise(dice: &mut StdRng, most: usize) -> Vec<u8> {
    let mut bytes = vec![0; dice.random_range(1..most)];
    dice.fill_bytes(&mut bytes);
    bytes
}

/// Changes some of it: bytes, words, its length, its order.
fn mutate(bytes: &mut Vec<u8>, dice: &mut StdRng) {
    for _ in 0..dice.random_range(1..5) {
        if bytes.is_empty() {
            return;
        }
        let at = dice.random_range(0..bytes.len());
        let word = at & !7;
        match dice.random_range(0..8) {
            0 => bytes[at] = dice.random(),
            1 => bytes[at] ^= 1 << dice.random_range(0..8),
            2 => bytes.truncate(at),
            3 if word + 8 <= bytes.len() => {
                let extremes = [0, 1, u64::MAX, u64::MAX >> 2, 1 << 31, u64::from(u32::MAX), 1 << 63];
                let extreme = *one_of(&extremes, dice);
                bytes[word..word + 8].copy_from_slice(&extreme.to_le_bytes());
            }
            4 => {
                let from = dice.random_range(0..bytes.len());
                let copy = bytes[from.min(at)..from.max(at)].to_vec();
                bytes.splice(at..at, copy);
            }
            5 => {
                let end = (at + dice.random_range(1..64)).min(bytes.len());
                bytes.drain(at..end);
            }
            6 => drop(bytes.splice(at..at, noise(dice, 64))),
            _ => bytes[at] = 0xff,
        }
    }
}

/// The next input: the port and the index of the node it goes to, and whether to wait for an answer.
pub fn input(corpus: &Corpus, dice: &mut StdRng) -> (Port, usize, Vec<u8>, bool) {
    let node = dice.random_range(0..corpus.hellos.len());
    let listen = dice.random_range(0..4) == 0;
    let (port, bytes) = match dice.random_range(0..20) {
        0..6 => {
            let mut bytes = one_of(&corpus.conversations, dice).clone();
            mutate(&mut bytes, dice);
            (Port::Client, bytes)
        }
        6 => (Port::Client, noise(dice, 2000)),
        7 => (Port::Peer, noise(dice, 2000)),
        8..10 => {
            // A hello that isn't quite one.
            let mut bytes = one_of(&corpus.hellos[node], dice).1.clone();
            mutate(&mut bytes, dice);
            (Port::Peer, bytes)
        }
        10..17 => {
            let (lane, mut bytes) = one_of(&corpus.hellos[node], dice).clone();
            for _ in 0..dice.random_range(1..6) {
                let payloads = &corpus.payloads[node];
                let mut payload = one_of(payloads, dice).1.clone();
                if dice.random_range(0..4) > 0 {
                    let fit: Vec<_> = payloads.iter().filter(|(of, _)| *of == lane).collect();
                    if !fit.is_empty() {
                        payload.clone_from(&one_of(&fit, dice).1);
                    }
                }
                mutate(&mut payload, dice);
                payload.resize(payload.len().next_multiple_of(8).max(8), 0);
                // The checksum is right: what is in it gets as far as it can.
                bytes.extend(frame::sealed(&payload).expect("whole words"));
            }
            if dice.random_range(0..4) == 0 {
                mutate(&mut bytes, dice);
            }
            (Port::Peer, bytes)
        }
        17..19 => {
            let mut bytes = one_of(&REQUESTS, dice).as_bytes().to_vec();
            mutate(&mut bytes, dice);
            (Port::Http, bytes)
        }
        _ => (Port::Http, noise(dice, 2000)),
    };
    (port, node, bytes, listen)
}
