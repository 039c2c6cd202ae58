//! Nodes on real sockets: what is sent arrives; what is wrong costs one connection and nothing else.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::LocalBoxFuture;
use pontoon::codec::GroupMessage;
use pontoon::codec::digest::DigestRequest;
use pontoon::codec::hello::{HelloRefusal, Lane, PeerHello, PeerWelcome, ProtocolRange};
use pontoon::codec::peer::{NodeHeartbeat, PeerFrame, PeerRequest, PeerResponse, encode};
use pontoon::codec::snapshot::{SnapshotAnswer, SnapshotOffer};
use pontoon::ids::{ClusterId, Epoch, NodeId, ShardId};
use pontoon::placement::map::MapDelta;
use pontoon::transport::Timings;
use pontoon::transport::call::{CallError, HelloConfig, PeerClient, PeerLine};
use pontoon::transport::foreign::refusal_for_peer;
use pontoon::transport::frame::{self, FrameReader};
use pontoon::transport::handshake::{self, Identity};
use pontoon::transport::listener::{ListenerConfig, PeerHandler, serve};
use pontoon::transport::network::{PeerNetwork, PeerNetworkConfig};
use pontoon::transport::rpc_stream::{reader_options, rpc_streams};
use pontoon::transport::snapshot::receiver::SnapshotSink;
use raft::eraftpb::{Entry, Message, MessageType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, LocalSet, spawn_local};
use tokio::time::{Instant, sleep, timeout};

const CLUSTER: ClusterId = pontoon::ids::RandomId([7; 16]);
const CLIENT_ADDRESS: &str = "client.example:7700";

fn timings() -> Timings {
    Timings {
        connect: Duration::from_millis(500),
        redial_min: Duration::from_millis(5),
        redial_max: Duration::from_millis(40),
        keepalive: Duration::from_millis(50),
        idle: Duration::from_millis(400),
    }
}

/// Records what arrives at a node.
struct Recorder {
    node: NodeId,
    messages: RefCell<Vec<(NodeId, GroupMessage)>>,
    heartbeats: RefCell<Vec<NodeHeartbeat>>,
    hellos: Cell<usize>,
    /// Requests being answered, and the most there were.
    requests: Rc<Cell<(usize, usize)>>,
    /// Has an owner more for each digest that is being taken.
    digests: Rc<()>,
}

impl Recorder {
    fn new(node: u64) -> Rc<Recorder> {
        Rc::new(Recorder {
            node: NodeId(node),
            messages: RefCell::default(),
            heartbeats: RefCell::default(),
            hellos: Cell::default(),
            requests: Rc::default(),
            digests: Rc::default(),
        })
    }
}

impl PeerHandler for Recorder {
    fn hello(&self, hello: &PeerHello) -> Result<Identity, HelloRefusal> {
        self.hellos.set(self.hellos.get() + 1);
        hello.check(Some(CLUSTER), self.node)?;
        Ok(Identity { node: self.node, incarnation: 1 })
    }

    fn raft(&self, from: NodeId, messages: Vec<GroupMessage>) {
        let mut all = self.messages.borrow_mut();
        all.extend(messages.into_iter().map(|message| {
            // Told by the connection, not by the message.
            assert_eq!(message.node, from);
            (from, GroupMessage { node: NodeId::default(), ..message })
        }));
    }

    fn heartbeat(&self, heartbeat: NodeHeartbeat) -> Result<(), HelloRefusal> {
        self.heartbeats.borrow_mut().push(heartbeat);
        Ok(())
    }

    fn request(&self, _: &PeerHello, request: PeerRequest) -> LocalBoxFuture<'static, PeerResponse> {
        if matches!(request, PeerRequest::Digest(_)) {
            let digest = self.digests.clone();
            return Box::pin(async move {
                let _taken = digest;
                std::future::pending().await
            });
        }
        let requests = self.requests.clone();
        let (now, most) = requests.get();
        requests.set((now + 1, most.max(now + 1)));
        Box::pin(async move {
            sleep(Duration::from_millis(10)).await;
            let (now, most) = requests.get();
            requests.set((now - 1, most));
            match request {
                PeerRequest::Map { since } => {
                    PeerResponse::Map(MapDelta { cluster_id: CLUSTER, since, ..MapDelta::default() })
                }
                _ => PeerResponse::Claimed,
            }
        })
    }

    fn snapshot(
        &self,
        _from: NodeId,
        _offer: SnapshotOffer,
    ) -> LocalBoxFuture<'static, Result<Box<dyn SnapshotSink>, SnapshotAnswer>> {
        Box::pin(std::future::ready(Err(SnapshotAnswer::NotNeeded)))
    }

    fn client_address(&self) -> String {
        CLIENT_ADDRESS.to_owned()
    }
}

/// A listening node; stops when dropped.
struct Node {
    address: SocketAddr,
    seen: Rc<Recorder>,
    task: JoinHandle<()>,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn node(id: u64) -> Node {
    node_at(id, "127.0.0.1:0").await
}

async fn node_at(id: u64, address: &str) -> Node {
    let config = ListenerConfig { timings: timings(), ..ListenerConfig::default() };
    node_with(id, address, config).await
}

async fn node_with(id: u64, address: &str, config: ListenerConfig) -> Node {
    let listener = TcpListener::bind(address).await.unwrap();
    let address = listener.local_addr().unwrap();
    let seen = Recorder::new(id);
    let handler = seen.clone();
    let task = spawn_local(serve(listener, handler, config, std::future::pending()));
    Node { address, seen, task }
}

/// The sending side of a node, running.
struct Sender {
    network: PeerNetwork,
    unreachable: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn sender(id: u64, peers: &[(u64, SocketAddr)]) -> Sender {
    sender_with(id, peers, |_| {})
}

fn sender_with(id: u64, peers: &[(u64, SocketAddr)], change: impl FnOnce(&mut PeerNetworkConfig)) -> Sender {
    let unreachable = Arc::new(AtomicUsize::new(0));
    let count = unreachable.clone();
    let on_unreachable = Arc::new(move |_| {
        count.fetch_add(1, Ordering::Relaxed);
    });
    let mut config = PeerNetworkConfig::new(CLUSTER, NodeId(id), 1, on_unreachable);
    config.timings = timings();
    change(&mut config);
    let network = PeerNetwork::new(config);
    let peers: Vec<_> = peers.iter().map(|(node, address)| (NodeId(*node), address.to_string())).collect();
    network.set_peers(&peers);
    let running = network.clone();
    Sender { network, unreachable, task: spawn_local(async move { running.run().await }) }
}

fn append(shard: u64, index: u64, bytes: usize) -> GroupMessage {
    let entry =
        Entry { index: index + 1, term: 3, data: Bytes::from(vec![index as u8; bytes]), ..Entry::default() };
    let mut message = beat(shard, index);
    message.message.msg_type = MessageType::MsgAppend;
    message.message.index = index;
    message.message.log_term = 3;
    message.message.entries = vec![entry].into();
    message
}

fn beat(shard: u64, commit: u64) -> GroupMessage {
    GroupMessage {
        shard: ShardId(shard),
        epoch: Epoch { range: 1, conf: 2 },
        safe_index: 4,
        message: Message {
            msg_type: MessageType::MsgHeartbeat,
            to: 11,
            from: 12,
            term: 3,
            commit,
            ..Message::default()
        },
        node: NodeId::default(),
        sleep: None,
    }
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(10), "never: {what}");
        sleep(Duration::from_millis(2)).await;
    }
}

async fn local(test: impl Future<Output = ()>) {
    LocalSet::new().run_until(test).await;
}

fn hello(lane: Lane) -> PeerHello {
    PeerHello {
        protocol: ProtocolRange::OURS,
        cluster_id: Some(CLUSTER),
        from_node: NodeId(2),
        to_node: NodeId(1),
        lane,
        incarnation: 1,
    }
}

async fn dial(node: &Node, hello: &PeerHello) -> Result<TcpStream, String> {
    let mut stream = TcpStream::connect(node.address).await.unwrap();
    handshake::dial(&mut stream, hello).await.map(|_| stream).map_err(|error| error.to_string())
}

/// The connection is closed by the other side, without another byte.
async fn closed(mut stream: TcpStream) {
    let mut rest = Vec::new();
    let read = timeout(Duration::from_secs(5), stream.read_to_end(&mut rest));
    match read.await.expect("the connection stays open") {
        Ok(_) => assert!(rest.is_empty()),
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
    }
}

/// The listener still does its work.
async fn lives(node: &Node) {
    let before = node.seen.messages.borrow().len();
    let sender = sender(9, &[(1, node.address)]);
    sender.network.send(vec![(NodeId(1), vec![append(1, 1, 10)])]);
    until("a message after the trouble", || node.seen.messages.borrow().len() > before).await;
}

#[tokio::test]
async fn two_nodes_exchange_messages_in_order() {
    local(async {
        let (one, two) = (node(1).await, node(2).await);
        let from_one = sender(1, &[(2, two.address), (1, one.address)]);
        let from_two = sender(2, &[(1, one.address)]);
        let mut sent = Vec::new();
        for round in 0..50 {
            let batch: Vec<_> =
                (0..20).flat_map(|shard| [append(shard, round, 50), beat(shard, round)]).collect();
            sent.extend(batch.clone());
            from_one.network.send(vec![(NodeId(2), batch)]);
            from_two.network.send(vec![(NodeId(1), vec![append(1, round, 100_000)])]);
            if round % 10 == 0 {
                sleep(Duration::from_millis(1)).await;
            }
        }
        from_one.network.broadcast_heartbeat(NodeHeartbeat {
            node: NodeId(1),
            incarnation: 1,
            map_version: 5,
            disk_full: false,
            map_age_ms: None,
            ended: 0,
        });
        until("everything", || {
            two.seen.messages.borrow().len() == sent.len()
                && one.seen.messages.borrow().len() == 50
                && !two.seen.heartbeats.borrow().is_empty()
        })
        .await;
        let got = two.seen.messages.borrow();
        for kind in [MessageType::MsgAppend, MessageType::MsgHeartbeat] {
            let of_kind = |m: &&GroupMessage| m.message.get_msg_type() == kind;
            let sent: Vec<_> = sent.iter().filter(of_kind).collect();
            let got: Vec<_> = got.iter().map(|(_, m)| m).filter(of_kind).collect();
            assert!(sent == got, "{kind:?} changed or out of order");
        }
        assert!(got.iter().all(|(from, _)| *from == NodeId(1)));
        assert_eq!(two.seen.heartbeats.borrow()[0].map_version, 5);
        assert_eq!(two.seen.hellos.get(), 2, "one connection per lane");
        assert_eq!(from_one.unreachable.load(Ordering::Relaxed), 0);
        let status = from_one.network.status();
        assert_eq!(status.len(), 1, "not itself");
        assert!(status[0].append.connected && status[0].control.connected);
        assert_eq!(status[0].queued_bytes, 0);
    })
    .await;
}

#[tokio::test]
async fn the_greatest_message_fits_and_a_greater_one_is_not_sent() {
    local(async {
        let one = node(1).await;
        let sender = sender(2, &[(1, one.address)]);
        let great = append(1, 1, pontoon::limits::ENTRY_BYTES_MAX);
        let small = append(1, 2, 100);
        let too_great = append(1, 3, pontoon::limits::FRAME_BYTES_MAX);
        let last = append(1, 4, 10);
        let batch = vec![great.clone(), small.clone(), too_great, last.clone()];
        sender.network.send(vec![(NodeId(1), batch)]);
        until("three messages", || one.seen.messages.borrow().len() == 3).await;
        let got = one.seen.messages.borrow();
        let got: Vec<_> = got.iter().map(|(_, message)| message).collect();
        assert!(got == [&great, &small, &last]);
        assert_eq!(sender.network.status()[0].append.connections, 1);
    })
    .await;
}

#[tokio::test]
async fn garbage_costs_one_connection() {
    local(async {
        let one = node(1).await;
        let good = |frame: &PeerFrame| {
            let mut bytes = Vec::new();
            frame::append(&mut bytes, |out| encode(frame, out)).unwrap();
            bytes
        };
        let frame = PeerFrame::Raft(vec![append(1, 1, 10)]);
        let mut bad_crc = good(&frame);
        *bad_crc.last_mut().unwrap() ^= 1;
        let mut oversized = u32::MAX.to_le_bytes().to_vec();
        oversized.extend_from_slice(&[0; 100]);
        let not_capnp = frame::sealed(&[0xff; 64]).unwrap();
        let stranger = PeerFrame::Heartbeat(NodeHeartbeat {
            node: NodeId(3),
            incarnation: 1,
            map_version: 0,
            disk_full: false,
            map_age_ms: None,
            ended: 0,
        });
        let request = PeerFrame::Request(1, PeerRequest::Probe);
        for bytes in [bad_crc, oversized, not_capnp, good(&stranger), good(&request)] {
            let mut stream = dial(&one, &hello(Lane::Append)).await.unwrap();
            stream.write_all(&bytes).await.unwrap();
            closed(stream).await;
        }
        assert!(one.seen.messages.borrow().is_empty());
        assert!(one.seen.heartbeats.borrow().is_empty());

        // What came whole before the garbage counts.
        let mut stream = dial(&one, &hello(Lane::Append)).await.unwrap();
        let mut bytes = good(&frame);
        bytes.extend_from_slice(&[0xff; 16]);
        stream.write_all(&bytes).await.unwrap();
        closed(stream).await;
        assert_eq!(one.seen.messages.borrow().len(), 1);

        // A preamble and then nothing, a hello that is none, half a hello.
        for bytes in [
            frame::preamble().to_vec(),
            [&frame::preamble()[..], &frame::sealed(&[1; 32]).unwrap()].concat(),
            [&frame::preamble()[..], &[16, 0, 0, 0, 1]].concat(),
        ] {
            let mut stream = TcpStream::connect(one.address).await.unwrap();
            stream.write_all(&bytes).await.unwrap();
            closed(stream).await;
        }
        lives(&one).await;
    })
    .await;
}

#[tokio::test]
async fn a_message_that_would_make_raft_panic_closes_the_connection() {
    local(async {
        let one = node(1).await;
        let mut gap = append(1, 1, 10);
        gap.message.mut_entries()[0].index = 9;
        let mut bytes = Vec::new();
        // `encode` refuses it, as a sender of this build would; another build may not.
        assert!(encode(&PeerFrame::Raft(vec![gap.clone()]), &mut bytes).is_err());
        frame::append(&mut bytes, |out| pontoon::codec::peer::encode_raft(&[gap], out)).unwrap();
        let mut stream = dial(&one, &hello(Lane::Append)).await.unwrap();
        stream.write_all(&bytes).await.unwrap();
        closed(stream).await;
        assert!(one.seen.messages.borrow().is_empty());
        lives(&one).await;
    })
    .await;
}

#[tokio::test]
async fn strangers_are_refused_with_the_reason() {
    local(async {
        let one = node(1).await;
        let with = |change: fn(&mut PeerHello)| {
            let mut hello = hello(Lane::Control);
            change(&mut hello);
            hello
        };
        let cases: [(&str, PeerHello); 5] = [
            ("belongs to cluster", with(|h| h.cluster_id = Some(pontoon::ids::RandomId([1; 16])))),
            ("this is node 1", with(|h| h.to_node = NodeId(5))),
            ("says it is node 1", with(|h| h.from_node = NodeId(1))),
            ("upgrade the older node", with(|h| h.protocol = ProtocolRange { min: 7, max: 9 })),
            // Without a cluster there is no lane but `request`; this isn't worth an answer.
            ("closed", with(|h| h.cluster_id = None)),
        ];
        for (expected, hello) in cases {
            let error = dial(&one, &hello).await.expect_err(expected);
            assert!(error.contains(expected), "{expected}: {error}");
        }
        // A link tells its reason, too, and goes on trying.
        let sender = sender(1, &[(1, one.address)]);
        sender.network.set_peers(&[(NodeId(5), one.address.to_string())]);
        until("the refusal", || {
            let status = sender.network.status();
            let error = status[0].control.error.clone().unwrap_or_default();
            error.contains("the caller means node 5")
        })
        .await;
        lives(&one).await;
    })
    .await;
}

#[tokio::test]
async fn a_link_finds_a_restarted_peer_and_a_moved_one() {
    local(async {
        let one = node(1).await;
        let address = one.address;
        let sender = sender(2, &[(1, address)]);
        let send = |index| {
            sender.network.send(vec![(NodeId(1), vec![append(1, index, 10)])]);
        };
        send(1);
        until("the first", || one.seen.messages.borrow().len() == 1).await;
        drop(one);
        until("the loss is noticed without sending", || !sender.network.status()[0].append.connected).await;
        send(2);
        until("what was sent meanwhile is reported", || {
            sender.unreachable.load(Ordering::Relaxed) > 0 && sender.network.status()[0].queued_bytes == 0
        })
        .await;
        let one = node_at(1, &address.to_string()).await;
        until("both lanes again", || {
            let status = &sender.network.status()[0];
            status.append.connected && status.control.connected
        })
        .await;
        send(3);
        until("the third", || !one.seen.messages.borrow().is_empty()).await;
        assert_eq!(one.seen.messages.borrow()[0].1, append(1, 3, 10));
        assert!(sender.network.status()[0].append.connections >= 2);

        // The same node at another address.
        let moved = node(1).await;
        sender.network.set_peers(&[(NodeId(1), moved.address.to_string())]);
        until("the connection to the new address", || moved.seen.hellos.get() == 2).await;
        send(4);
        until("the fourth", || !moved.seen.messages.borrow().is_empty()).await;

        // A node that is no peer any more.
        sender.network.set_peers(&[]);
        let before = sender.unreachable.load(Ordering::Relaxed);
        send(5);
        assert_eq!(sender.unreachable.load(Ordering::Relaxed), before + 1);
        sleep(Duration::from_millis(50)).await;
        assert_eq!(moved.seen.messages.borrow().len(), 1);
    })
    .await;
}

#[tokio::test]
async fn news_of_a_peer_hasten_the_next_attempt_and_not_all_that_follow() {
    local(async {
        // Takes connections, and ends them.
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let attempts = Rc::new(Cell::new(0));
        let count = attempts.clone();
        let server = spawn_local(async move {
            while listener.accept().await.is_ok() {
                count.set(count.get() + 1);
            }
        });
        let day = Duration::from_secs(24 * 3600);
        let sender = sender_with(2, &[(1, address)], |config| {
            config.timings = Timings { redial_min: day, redial_max: day, ..timings() };
        });
        until("the first attempt on both lanes", || attempts.get() == 2).await;
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(1) {
            sender.network.redial(NodeId(1));
            sleep(Duration::from_millis(1)).await;
        }
        server.abort();
        // After 5, 10, 20 … ms.
        assert!((4..=2 + 2 * 8).contains(&attempts.get()), "{} attempts", attempts.get());
    })
    .await;
}

#[tokio::test]
async fn a_peer_that_stops_reading_fills_a_bounded_outbox() {
    local(async {
        // Says welcome, and then nothing.
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let accepted = Rc::new(Cell::new(0));
        let count = accepted.clone();
        spawn_local(async move {
            let mut held = Vec::new();
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut start = [0; 8];
                stream.read_exact(&mut start).await.unwrap();
                FrameReader::new(1 << 16).read(&mut stream).await.unwrap();
                let welcome = PeerWelcome { outcome: Ok(1), node: NodeId(1), incarnation: 1 };
                let payload = frame::sealed(&welcome.encode().unwrap()).unwrap();
                let bytes = [&frame::preamble()[..], &payload].concat();
                stream.write_all(&bytes).await.unwrap();
                held.push(stream);
                count.set(count.get() + 1);
            }
        });
        const MAX: usize = 4 << 20;
        let sender = sender_with(2, &[(1, address)], |config| config.append_bytes_max = MAX);
        until("a connection", || sender.network.status()[0].append.connected).await;
        let start = Instant::now();
        let mut index = 0;
        while sender.unreachable.load(Ordering::Relaxed) == 0 {
            index += 1;
            sender.network.send(vec![(NodeId(1), vec![append(1, index, 200_000)])]);
            assert!(sender.network.status()[0].queued_bytes <= MAX);
            if index % 8 == 0 {
                tokio::task::yield_now().await;
            }
            assert!(start.elapsed() < Duration::from_secs(10), "nothing is dropped");
        }
        // The other lane isn't held up, and the stalled connection is given up.
        assert!(sender.network.status()[0].control.connected);
        let before = accepted.get();
        until("the link gives up and dials again", || accepted.get() > before).await;
    })
    .await;
}

#[tokio::test]
async fn a_silent_peer_is_closed_and_an_idle_link_is_not() {
    local(async {
        let one = node(1).await;
        let start = Instant::now();
        let stream = dial(&one, &hello(Lane::Control)).await.unwrap();
        closed(stream).await;
        assert!(start.elapsed() >= timings().idle / 2);
        // A link with nothing to say keeps its connections.
        let sender = sender(2, &[(1, one.address)]);
        sleep(timings().idle * 3).await;
        let status = &sender.network.status()[0];
        assert!(status.append.connected && status.control.connected);
        assert_eq!((status.append.connections, status.control.connections), (1, 1));
    })
    .await;
}

#[tokio::test]
async fn calls_are_answered_also_before_there_is_a_cluster() {
    local(async {
        let one = node(1).await;
        let address = one.address.to_string();
        let config = HelloConfig { cluster_id: None, node: NodeId(0), incarnation: 3 };
        let long = Duration::from_secs(5);
        let answer = PeerClient::call(&address, config, PeerRequest::Map { since: 8 }, long).await;
        assert!(matches!(answer, Ok(PeerResponse::Map(map)) if map.since == 8));

        let other = HelloConfig { cluster_id: Some(pontoon::ids::RandomId([1; 16])), ..config };
        let answer = PeerClient::call(&address, other, PeerRequest::Probe, long).await;
        assert!(matches!(answer, Err(CallError::Refused { .. })));

        let short = Duration::from_millis(2);
        let answer = PeerClient::call(&address, config, PeerRequest::Probe, short).await;
        assert!(matches!(answer, Err(CallError::Timeout { .. })));

        // A port that nobody listens on.
        let free = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let nobody = free.local_addr().unwrap().to_string();
        drop(free);
        let answer = PeerClient::call(&nobody, config, PeerRequest::Probe, long).await;
        assert!(matches!(answer, Err(CallError::Unreachable { .. })));
    })
    .await;
}

#[tokio::test]
async fn a_digest_for_which_nobody_waits_any_more_is_not_taken() {
    local(async {
        let one = node(1).await;
        let address = one.address.to_string();
        let config = HelloConfig { cluster_id: None, node: NodeId(0), incarnation: 3 };
        let request = DigestRequest { shard: ShardId(1), index: 5, timeout_ms: 600_000 };
        let owners = || Rc::strong_count(&one.seen.digests);
        let idle = owners();
        let call = spawn_local(async move {
            let long = Duration::from_secs(600);
            PeerClient::call(&address, config, PeerRequest::Digest(request), long).await
        });
        let begun = Instant::now();
        while owners() == idle {
            assert!(begun.elapsed() < Duration::from_secs(10), "it isn't begun");
            sleep(Duration::from_millis(5)).await;
        }
        call.abort();
        let ended = Instant::now();
        while owners() > idle {
            assert!(ended.elapsed() < Duration::from_secs(10), "it is taken for nobody");
            sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_line_takes_one_question_after_another_and_ends_with_an_error() {
    local(async {
        let one = node(1).await;
        let address = one.address.to_string();
        let config = HelloConfig { cluster_id: None, node: NodeId(0), incarnation: 3 };
        let long = Duration::from_secs(5);
        let mut line = PeerLine::open(&address, config, long).await.expect("open");
        for since in 0..3 {
            let (again, answer) = line.ask(PeerRequest::Map { since }, long).await.expect("answered");
            assert!(matches!(answer, PeerResponse::Map(map) if map.since == since));
            line = again;
        }
        // This one is answered late: after that nobody knows which answer comes next.
        let late = line.ask(PeerRequest::Probe, Duration::from_millis(2)).await;
        assert!(matches!(late, Err(CallError::Timeout { .. })));
    })
    .await;
}

#[tokio::test]
async fn requests_on_one_connection_run_side_by_side_within_a_bound() {
    local(async {
        let one = node(1).await;
        let mut stream = dial(&one, &hello(Lane::Request)).await.unwrap();
        let mut bytes = Vec::new();
        for id in 0..200 {
            let request = PeerFrame::Request(id, PeerRequest::Map { since: id });
            frame::append(&mut bytes, |out| encode(&request, out)).unwrap();
        }
        stream.write_all(&bytes).await.unwrap();
        let mut reader = FrameReader::new(1 << 20);
        let mut seen = [false; 200];
        for _ in 0..200 {
            let payload = reader.read(&mut stream).await.unwrap();
            match pontoon::codec::peer::decode(payload).unwrap() {
                PeerFrame::Response(id, PeerResponse::Map(map)) if map.since == id => {
                    seen[id as usize] = true;
                }
                other => panic!("{other:?}"),
            }
        }
        assert!(seen.iter().all(|seen| *seen));
        let (now, most) = one.seen.requests.get();
        assert_eq!((now, most), (0, pontoon::limits::PEER_REQUESTS_MAX));
    })
    .await;
}

#[tokio::test]
async fn connections_beyond_the_bound_wait_for_room() {
    local(async {
        let config = ListenerConfig { timings: timings(), connections_max: 2 };
        let one = node_with(1, "127.0.0.1:0", config).await;
        let first = dial(&one, &hello(Lane::Control)).await.unwrap();
        let _second = dial(&one, &hello(Lane::Append)).await.unwrap();
        let hello = hello(Lane::Request);
        let third = dial(&one, &hello);
        tokio::pin!(third);
        let early = timeout(Duration::from_millis(100), &mut third).await;
        assert!(early.is_err(), "a third connection was served");
        drop(first);
        let served = timeout(Duration::from_secs(5), third).await;
        served.expect("no room after one has left").unwrap();
    })
    .await;
}

#[tokio::test]
async fn an_rpc_client_on_the_peer_port_reads_where_to_go() {
    use capnp_rpc::rpc_twoparty_capnp::Side;
    use capnp_rpc::{RpcSystem, twoparty::VatNetwork};

    local(async {
        let one = node(1).await;
        let stream = TcpStream::connect(one.address).await.unwrap();
        let (reader, writer, flusher) = rpc_streams(stream).unwrap();
        spawn_local(flusher);
        let network = VatNetwork::new(reader, writer, Side::Client, reader_options());
        let mut system = RpcSystem::new(Box::new(network), None);
        let gate: pontoon::schema::kv_capnp::gate::Client = system.bootstrap(Side::Server);
        spawn_local(system);
        let error = match gate.open_request().send().promise.await {
            Ok(_) => panic!("the peer port answered a client"),
            Err(error) => error.to_string(),
        };
        assert!(error.contains("this is the peer port"), "{error}");
        assert!(error.contains(CLIENT_ADDRESS), "{error}");
        lives(&one).await;
    })
    .await;
}

#[tokio::test]
async fn a_node_on_the_client_port_learns_where_to_go() {
    local(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        spawn_local(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut start = [0; 8];
                stream.read_exact(&mut start).await.unwrap();
                assert!(frame::is_peer_preamble(&start));
                let refusal = refusal_for_peer("peer.example:7701").unwrap();
                stream.write_all(&refusal).await.unwrap();
            }
        });
        let sender = sender(2, &[(1, address)]);
        until("the refusal", || {
            let error = sender.network.status()[0].append.error.clone();
            error.is_some_and(|e| e.contains("nodes use peer.example:7701"))
        })
        .await;
    })
    .await;
}
