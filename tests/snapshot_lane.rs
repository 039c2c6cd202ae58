//! Snapshot files between nodes on real sockets: whole, or resumed, or refused; and what a wrong or
//! silent sender can't do.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::LocalBoxFuture;
use pontoon::codec::GroupMessage;
use pontoon::codec::hello::{HelloRefusal, Lane, PeerHello, ProtocolRange};
use pontoon::codec::peer::{NodeHeartbeat, PeerFrame, PeerRequest, PeerResponse, encode};
use pontoon::codec::snapshot::{SnapshotAnswer, SnapshotFrame, SnapshotOffer};
use pontoon::ids::{ClusterId, Epoch, NodeId, Position, RandomId, ReplicaId, ShardId, StreamId};
use pontoon::limits::{SNAPSHOT_BLOCK_BYTES, SNAPSHOT_CHUNK_BYTES};
use pontoon::node::snapshots::inbox::{Inbox, PartSink};
use pontoon::storage::snapshot_dir::SnapshotDir;
use pontoon::storage::snapshot_file::{HEAD_BYTES, Origin, SnapshotWriter};
use pontoon::storage::state::StateHeader;
use pontoon::transport::Timings;
use pontoon::transport::frame;
use pontoon::transport::handshake::{self, Identity};
use pontoon::transport::listener::{ListenerConfig, PeerHandler, serve};
use pontoon::transport::snapshot::receiver::SnapshotSink;
use pontoon::transport::snapshot::sender::{Delivery, Parties, SendError, send};
use pontoon::transport::snapshot::throttle::Throttle;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, LocalSet, spawn_local};
use tokio::time::{sleep, timeout};

const CLUSTER: ClusterId = RandomId([7; 16]);
const MIB: usize = 1 << 20;
const STREAM: StreamId = RandomId([3; 16]);
const POSITION: Position = Position { index: 100, term: 6 };
/// Bytes up to the end of the first block: from here on a transfer can go on.
const BLOCK: usize = HEAD_BYTES + 4 + SNAPSHOT_BLOCK_BYTES + 4;

fn timings() -> Timings {
    Timings {
        connect: Duration::from_secs(5),
        redial_min: Duration::from_millis(5),
        redial_max: Duration::from_millis(40),
        keepalive: Duration::from_millis(50),
        idle: Duration::from_secs(1),
    }
}

/// For what takes a moment, on a busy machine.
const LONG: Duration = Duration::from_secs(10);

/// What a node does with a whole file.
type Verdict = Rc<dyn Fn(PathBuf) -> LocalBoxFuture<'static, SnapshotAnswer>>;

/// A node that takes snapshots into a directory.
struct Taker {
    inbox: Inbox,
    /// Answers instead of taking anything.
    instead: RefCell<Option<SnapshotAnswer>>,
    /// Takes so many bytes, then there is no room.
    room: Cell<u64>,
    verdict: RefCell<Verdict>,
    /// Where each transfer began.
    begun: RefCell<Vec<u64>>,
    /// Each transfer under way has one.
    open: Rc<()>,
}

impl Taker {
    /// Whether a transfer is under way.
    fn receives(&self) -> bool {
        Rc::strong_count(&self.open) > 1
    }
}

/// A sink whose disk fills up.
struct Bounded {
    sink: PartSink,
    room: u64,
    _open: Rc<()>,
}

impl SnapshotSink for Bounded {
    fn offset(&self) -> u64 {
        self.sink.offset()
    }

    fn write(&mut self, data: Bytes) -> LocalBoxFuture<'_, Result<(), SnapshotAnswer>> {
        if self.sink.offset() + data.len() as u64 > self.room {
            return Box::pin(std::future::ready(Err(SnapshotAnswer::Busy { retry_after_ms: 77 })));
        }
        self.sink.write(data)
    }

    fn finish(self: Box<Self>) -> LocalBoxFuture<'static, SnapshotAnswer> {
        Box::new(self.sink).finish()
    }
}

impl PeerHandler for Taker {
    fn hello(&self, hello: &PeerHello) -> Result<Identity, HelloRefusal> {
        hello.check(Some(CLUSTER), NodeId(1))?;
        Ok(Identity { node: NodeId(1), incarnation: 1 })
    }

    fn raft(&self, _: NodeId, _: Vec<GroupMessage>) {}

    fn heartbeat(&self, _: NodeHeartbeat) -> Result<(), HelloRefusal> {
        Ok(())
    }

    fn request(&self, _: &PeerHello, _: PeerRequest) -> LocalBoxFuture<'static, PeerResponse> {
        Box::pin(std::future::ready(PeerResponse::Claimed))
    }

    fn snapshot(
        &self,
        from: NodeId,
        offer: SnapshotOffer,
    ) -> LocalBoxFuture<'static, Result<Box<dyn SnapshotSink>, SnapshotAnswer>> {
        assert_eq!(from, NodeId(2));
        let result = match self.instead.borrow().clone() {
            Some(answer) => Err(answer),
            None => self.inbox.begin(&offer).map(|part| {
                self.begun.borrow_mut().push(part.offset());
                let verdict = self.verdict.borrow().clone();
                let sink = PartSink::new(part, Box::new(move |part| verdict(part.path().to_owned())));
                let open = self.open.clone();
                Box::new(Bounded { sink, room: self.room.get(), _open: open }) as Box<dyn SnapshotSink>
            }),
        };
        Box::pin(std::future::ready(result))
    }

    fn client_address(&self) -> String {
        "client.example:1".into()
    }
}

/// A listening node, and a snapshot file to send to it.
struct Setting {
    dir: tempfile::TempDir,
    address: SocketAddr,
    taker: Rc<Taker>,
    task: JoinHandle<()>,
    content: Vec<u8>,
    file: Arc<File>,
}

impl Drop for Setting {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A snapshot file with values of so many bytes together.
fn content(bytes: usize) -> Vec<u8> {
    let origin = Origin { stream: STREAM, shard: ShardId(1), replica: ReplicaId(12) };
    let mut content = Vec::new();
    let mut writer = SnapshotWriter::new(&mut content, origin).unwrap();
    let mut left = bytes;
    for key in 0u32.. {
        if left == 0 {
            break;
        }
        let value = vec![key as u8; left.min(1000)];
        writer.change(&[&[1][..], &key.to_be_bytes()].concat(), Some(&value)).unwrap();
        left -= value.len();
    }
    let header = StateHeader {
        applied: POSITION,
        revision: 1,
        log_time: 0,
        epoch: Epoch::default(),
        members: Vec::new(),
        conf_state: raft::eraftpb::ConfState::default(),
    };
    writer.finish(&header).unwrap();
    content
}

async fn setting(bytes: usize) -> Setting {
    let dir = tempfile::tempdir().unwrap();
    let inbox = Inbox::new(SnapshotDir::open(&dir.path().join("snapshots"), 1 << 30).unwrap());
    let taker = Rc::new(Taker {
        inbox,
        instead: RefCell::default(),
        room: Cell::new(u64::MAX),
        verdict: RefCell::new(Rc::new(|_| Box::pin(std::future::ready(SnapshotAnswer::Installed)))),
        begun: RefCell::default(),
        open: Rc::default(),
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let config = ListenerConfig { timings: timings(), ..ListenerConfig::default() };
    let task = spawn_local(serve(listener, taker.clone(), config, std::future::pending()));
    let content = content(bytes);
    let path = dir.path().join("snapshot");
    std::fs::write(&path, &content).unwrap();
    let file = Arc::new(File::open(path).unwrap());
    Setting { dir, address, taker, task, content, file }
}

impl Setting {
    fn offer(&self) -> SnapshotOffer {
        SnapshotOffer {
            stream: STREAM,
            shard: ShardId(1),
            from: ReplicaId(12),
            to: ReplicaId(11),
            epoch: Epoch::default(),
            position: POSITION,
            leader_term: 7,
            bytes: self.content.len() as u64,
        }
    }

    async fn send_to(&self, address: SocketAddr, throttle: &Throttle) -> Result<(Delivery, u64), SendError> {
        let parties = Parties { cluster_id: CLUSTER, from: NodeId(2), incarnation: 1, to: NodeId(1) };
        let mut resumed = 0;
        let address = address.to_string();
        let note = |at| resumed = at;
        let sent = send(&address, &parties, &self.offer(), &self.file, throttle, &timings(), note).await;
        sent.map(|delivery| (delivery, resumed))
    }

    async fn send(&self) -> Result<(Delivery, u64), SendError> {
        self.send_to(self.address, &Throttle::new(1 << 32)).await
    }

    /// What has been received so far.
    fn received(&self) -> Vec<u8> {
        let mut entries = std::fs::read_dir(self.dir.path().join("snapshots/in")).unwrap();
        let entry = entries.next().expect("a part").unwrap();
        assert!(entries.next().is_none(), "one part");
        std::fs::read(entry.path()).unwrap()
    }

    /// A connection that has passed the handshake of the lane.
    async fn dial(&self) -> TcpStream {
        let hello = PeerHello {
            protocol: ProtocolRange::OURS,
            cluster_id: Some(CLUSTER),
            from_node: NodeId(2),
            to_node: NodeId(1),
            lane: Lane::Snapshot,
            incarnation: 1,
        };
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        handshake::dial(&mut stream, &hello).await.unwrap();
        stream
    }
}

fn sealed(frame: &PeerFrame) -> Vec<u8> {
    let mut bytes = Vec::new();
    frame::append(&mut bytes, |out| encode(frame, out)).unwrap();
    bytes
}

fn step(frame: SnapshotFrame) -> Vec<u8> {
    sealed(&PeerFrame::Snapshot(frame))
}

async fn local(test: impl Future<Output = ()>) {
    LocalSet::new().run_until(test).await;
}

/// Passes bytes on to `target`, of one connection after another; each is cut after so many.
async fn cutting_proxy(target: SocketAddr, cuts: Vec<usize>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    spawn_local(async move {
        for cut in cuts {
            let (mut dialler, _) = listener.accept().await.unwrap();
            let mut acceptor = TcpStream::connect(target).await.unwrap();
            let (mut dialler_in, mut dialler_out) = dialler.split();
            let (mut acceptor_in, mut acceptor_out) = acceptor.split();
            let mut there = (&mut dialler_in).take(cut as u64);
            tokio::select! {
                _ = tokio::io::copy(&mut there, &mut acceptor_out) => {}
                _ = tokio::io::copy(&mut acceptor_in, &mut dialler_out) => {}
            }
        }
    });
    address
}

#[tokio::test]
async fn a_file_arrives_whole() {
    local(async {
        for bytes in [0, SNAPSHOT_CHUNK_BYTES, 3 * MIB + 5] {
            let setting = setting(bytes).await;
            assert_eq!(setting.send().await.unwrap(), (Delivery::Installed, 0));
            assert!(setting.received() == setting.content);
        }
    })
    .await;
}

#[tokio::test]
async fn a_transfer_that_is_cut_goes_on_where_it_ended() {
    local(async {
        let setting = setting(4 * MIB).await;
        let proxy = cutting_proxy(setting.address, vec![MIB, 2 * MIB, usize::MAX]).await;
        let throttle = Throttle::new(1 << 32);
        let mut attempts = 0;
        let resumed = loop {
            attempts += 1;
            match setting.send_to(proxy, &throttle).await {
                Ok((delivery, resumed)) => {
                    assert_eq!(delivery, Delivery::Installed);
                    break resumed;
                }
                Err(SendError::Link(_)) => assert!(attempts < 3, "it never arrives"),
                Err(error) => panic!("{error}"),
            }
            // The receiving side has noticed when it has let go of what it received.
            let begun = Instant::now();
            while setting.taker.receives() {
                assert!(begun.elapsed() < LONG, "it waits for more");
                sleep(Duration::from_millis(5)).await;
            }
        };
        assert_eq!(attempts, 3);
        assert!(resumed as usize > MIB, "resumed at {resumed}");
        assert_eq!(setting.taker.begun.borrow().len(), 3);
        assert!(setting.received() == setting.content);
    })
    .await;
}

#[tokio::test]
async fn every_answer_reaches_the_sender() {
    local(async {
        let setting = setting(10).await;
        for (answer, delivery) in [
            (SnapshotAnswer::NotNeeded, Delivery::NotNeeded),
            (SnapshotAnswer::Busy { retry_after_ms: 70 }, Delivery::Busy(Duration::from_millis(70))),
            (SnapshotAnswer::Refused("no".into()), Delivery::Refused("no".into())),
            (SnapshotAnswer::Failed("bad".into()), Delivery::Failed("bad".into())),
        ] {
            *setting.taker.instead.borrow_mut() = Some(answer.clone());
            assert_eq!(setting.send().await.unwrap().0, delivery, "in place of the first byte");
            *setting.taker.instead.borrow_mut() = None;
            *setting.taker.verdict.borrow_mut() =
                Rc::new(move |_| Box::pin(std::future::ready(answer.clone())));
            assert_eq!(setting.send().await.unwrap().0, delivery, "in the end");
        }
        *setting.taker.instead.borrow_mut() = Some(SnapshotAnswer::ResumeAt(1 << 40));
        assert!(matches!(setting.send().await, Err(SendError::Link(_))), "beyond the end");
    })
    .await;
}

#[tokio::test]
async fn a_verdict_amid_the_bytes_ends_the_transfer() {
    local(async {
        let setting = setting(32 * MIB).await;
        setting.taker.room.set(2 * MIB as u64);
        let busy = Delivery::Busy(Duration::from_millis(77));
        assert_eq!(setting.send().await.unwrap(), (busy, 0));
        // What came before is kept.
        setting.taker.room.set(u64::MAX);
        let (delivery, resumed) = setting.send().await.unwrap();
        assert_eq!(delivery, Delivery::Installed);
        assert!(resumed as usize > MIB, "resumed at {resumed}");
        assert!(setting.received() == setting.content);
    })
    .await;
}

#[tokio::test]
async fn a_long_installation_keeps_the_connection() {
    local(async {
        let setting = setting(10).await;
        *setting.taker.verdict.borrow_mut() = Rc::new(|_| {
            Box::pin(async {
                sleep(3 * timings().idle).await;
                SnapshotAnswer::Installed
            })
        });
        assert_eq!(setting.send().await.unwrap(), (Delivery::Installed, 0));
    })
    .await;
}

#[tokio::test]
async fn the_throttle_holds_a_transfer_back() {
    local(async {
        let setting = setting(3 * MIB).await;
        let begun = Instant::now();
        let sent = setting.send_to(setting.address, &Throttle::new(2 * MIB as u64)).await;
        assert_eq!(sent.unwrap().0, Delivery::Installed);
        let took = begun.elapsed();
        assert!(took > Duration::from_millis(1100), "{took:?}");
    })
    .await;
}

#[tokio::test]
async fn a_file_that_is_shorter_than_offered_is_the_senders_fault() {
    local(async {
        let mut setting = setting(MIB).await;
        setting.content.push(1);
        assert!(matches!(setting.send().await, Err(SendError::File(_))));
    })
    .await;
}

#[tokio::test]
async fn a_wrong_step_costs_the_connection_and_no_byte_that_came_before() {
    local(async {
        let setting = setting(MIB).await;
        let offer = step(SnapshotFrame::Offer(setting.offer()));
        let whole = setting.content.len() as u64;
        let chunk = |offset: u64, bytes: usize| {
            let at = usize::try_from(offset).unwrap_or(0).min(setting.content.len() - bytes);
            let data = setting.content[at..at + bytes].to_vec();
            step(SnapshotFrame::Chunk { offset, data: data.into() })
        };
        let block = BLOCK as u64;
        let first = [
            chunk(0, SNAPSHOT_CHUNK_BYTES),
            chunk(SNAPSHOT_CHUNK_BYTES as u64, BLOCK - SNAPSHOT_CHUNK_BYTES),
        ];
        let heartbeat = NodeHeartbeat {
            node: NodeId(2),
            incarnation: 1,
            map_version: 0,
            disk_full: false,
            map_age_ms: None,
            ended: 0,
        };
        let mut garbled = chunk(block, 100);
        *garbled.last_mut().unwrap() ^= 1;
        let wrong = [
            chunk(block + 1, 10),
            chunk(0, 10),
            chunk(whole - 10, 11),
            chunk(u64::MAX, 1),
            step(SnapshotFrame::End),
            offer.clone(),
            step(SnapshotFrame::Answer(SnapshotAnswer::Installed)),
            sealed(&PeerFrame::Heartbeat(heartbeat)),
            garbled,
            u32::MAX.to_le_bytes().to_vec(),
        ];
        for (case, wrong) in wrong.into_iter().enumerate() {
            let mut stream = setting.dial().await;
            let first = if case == 0 { first.concat() } else { Vec::new() };
            stream.write_all(&[&offer[..], &first, &wrong].concat()).await.unwrap();
            let mut answers = Vec::new();
            let read = timeout(Duration::from_secs(5), stream.read_to_end(&mut answers)).await;
            // Closed, with nothing after the answer to the offer.
            let resume =
                step(SnapshotFrame::Answer(SnapshotAnswer::ResumeAt(if case == 0 { 0 } else { block })));
            if read.expect("the connection stays open").is_ok() {
                assert_eq!(answers, resume, "case {case}");
            }
            assert!(setting.received() == setting.content[..BLOCK], "case {case}");
        }
        // No offer at all.
        let mut stream = setting.dial().await;
        stream.write_all(&chunk(0, 1)).await.unwrap();
        let mut answers = Vec::new();
        let read = timeout(Duration::from_secs(5), stream.read_to_end(&mut answers)).await;
        assert!(read.expect("the connection stays open").map_or(true, |bytes| bytes == 0));
        assert_eq!(setting.send().await.unwrap(), (Delivery::Installed, block));
        assert!(setting.received() == setting.content);
    })
    .await;
}

#[tokio::test]
async fn a_silent_sender_makes_room_for_the_next() {
    local(async {
        let setting = setting(1000).await;
        let mut silent = setting.dial().await;
        silent.write_all(&step(SnapshotFrame::Offer(setting.offer()))).await.unwrap();
        let begun = Instant::now();
        while !setting.taker.receives() {
            assert!(begun.elapsed() < LONG, "it isn't begun");
            sleep(Duration::from_millis(1)).await;
        }
        let begun = Instant::now();
        let next = setting.send().await.unwrap().0;
        // On a busy machine that takes so long that the silent one is gone.
        let held_up = begun.elapsed() > timings().idle / 2;
        assert!(matches!(next, Delivery::Busy(_)) || held_up, "{next:?}");
        while setting.taker.receives() {
            assert!(begun.elapsed() < LONG, "it waits for the silent one");
            sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(setting.send().await.unwrap().0, Delivery::Installed);
        drop(silent);
    })
    .await;
}
