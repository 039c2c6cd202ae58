//! A network between nodes that can be cut: one proxy in front of each node's peer port, with rules
//! per direction. A cut holds bytes back, as a lost link does until TCP gives up; healing lets them go on.
#![allow(dead_code)] // Each test binary uses its own part.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use pontoon::codec::hello::{Lane, PeerHello};
use pontoon::transport::frame::{HEADER_BYTES, PREAMBLE_BYTES};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};

/// Who a connection is from or to: a NodeId; 0 for a request that doesn't say who asks.
pub type End = u64;

#[derive(Default)]
struct Rules {
    cut: HashSet<(End, End)>,
    delay: HashMap<(End, End), Duration>,
    /// How often connections of a lane were broken, and how many passed since.
    broken: HashMap<Lane, u64>,
    passing: HashMap<Lane, u64>,
}

/// Proxies in front of nodes 1, 2, …, on a thread of their own. Dropped: closed.
pub struct Network {
    rules: Arc<Mutex<Rules>>,
    addresses: Vec<SocketAddr>,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Network {
    /// Proxies for nodes whose peer ports are `targets`, in the order of their ids.
    pub fn new(targets: &[SocketAddr]) -> Network {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let rules: Arc<Mutex<Rules>> = Arc::default();
        let mut addresses = Vec::new();
        for (target, node) in targets.iter().copied().zip(1..) {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
            listener.set_nonblocking(true).expect("a socket");
            addresses.push(listener.local_addr().expect("an address"));
            let rules = rules.clone();
            runtime.spawn(async move {
                let listener = TcpListener::from_std(listener).expect("a listener");
                while let Ok((stream, _)) = listener.accept().await {
                    tokio::spawn(carry(stream, node, target, rules.clone()));
                }
            });
        }
        Network { rules, addresses, runtime: Some(runtime) }
    }

    /// What the nodes should advertise, in the order of their ids.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    fn change(&self, change: impl FnOnce(&mut Rules)) {
        change(&mut self.rules.lock().expect("no panic holds it"));
    }

    /// Nothing that `from` sends reaches `to`, until [`Network::heal`].
    pub fn cut(&self, from: End, to: End) {
        self.change(|rules| {
            rules.cut.insert((from, to));
        });
    }

    /// Nothing passes between `node` and the others; no anonymous request passes at all.
    pub fn isolate(&self, node: End) {
        for other in 0..=self.addresses.len() as End {
            self.cut(node, other);
            self.cut(other, node);
            self.cut(0, other);
            self.cut(other, 0);
        }
    }

    /// What `from` sends to `to` takes this much longer.
    pub fn delay(&self, from: End, to: End, by: Duration) {
        self.change(|rules| {
            rules.delay.insert((from, to), by);
        });
    }

    /// Closes the connections of a lane; new ones pass.
    pub fn break_lane(&self, lane: Lane) {
        self.change(|rules| {
            *rules.broken.entry(lane).or_default() += 1;
            rules.passing.remove(&lane);
        });
    }

    /// Bytes that have passed on a lane since it was last broken.
    pub fn passed(&self, lane: Lane) -> u64 {
        self.rules.lock().expect("no panic holds it").passing.get(&lane).copied().unwrap_or(0)
    }

    /// Everything passes again, what was held back first.
    pub fn heal(&self) {
        self.change(|rules| *rules = Rules::default());
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// One connection to node `to`. Whoever dials says who it is in its first frame.
async fn carry(mut dialler: TcpStream, to: End, target: SocketAddr, rules: Arc<Mutex<Rules>>) {
    let _ = dialler.set_nodelay(true);
    let mut start = vec![0; PREAMBLE_BYTES + HEADER_BYTES];
    if dialler.read_exact(&mut start).await.is_err() {
        return;
    }
    let length = &start[PREAMBLE_BYTES..PREAMBLE_BYTES + 4];
    let length = u32::from_le_bytes(length.try_into().expect("four bytes")) as usize;
    assert!(length < 1 << 20, "not a hello");
    start.resize(PREAMBLE_BYTES + HEADER_BYTES + length, 0);
    if dialler.read_exact(&mut start[PREAMBLE_BYTES + HEADER_BYTES..]).await.is_err() {
        return;
    }
    let hello = Bytes::copy_from_slice(&start[PREAMBLE_BYTES + HEADER_BYTES..]);
    let hello = PeerHello::decode(hello).expect("a hello");
    let (from, lane) = (hello.from_node.0, hello.lane);
    let Ok(acceptor) = TcpStream::connect(target).await else {
        return;
    };
    let _ = acceptor.set_nodelay(true);
    let (dialler_in, dialler_out) = dialler.into_split();
    let (acceptor_in, acceptor_out) = acceptor.into_split();
    let there = pass(start, dialler_in, acceptor_out, (from, to), lane, rules.clone());
    let back = pass(Vec::new(), acceptor_in, dialler_out, (to, from), lane, rules);
    // The end of one direction ends the connection: peers don't half-close for long.
    tokio::select! {
        () = there => {}
        () = back => {}
    }
}

async fn pass(
    mut bytes: Vec<u8>,
    mut input: OwnedReadHalf,
    mut output: OwnedWriteHalf,
    way: (End, End),
    lane: Lane,
    rules: Arc<Mutex<Rules>>,
) {
    let broken = || rules.lock().expect("no panic holds it").broken.get(&lane).copied();
    let unbroken = broken();
    loop {
        let delay = rules.lock().expect("no panic holds it").delay.get(&way).copied();
        if let Some(delay) = delay {
            tokio::time::sleep(delay).await;
        }
        while rules.lock().expect("no panic holds it").cut.contains(&way) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        if broken() != unbroken {
            return;
        }
        *rules.lock().expect("no panic holds it").passing.entry(lane).or_default() += bytes.len() as u64;
        if output.write_all(&bytes).await.is_err() {
            return;
        }
        bytes.resize(64 * 1024, 0);
        match input.read(&mut bytes).await {
            Ok(0) | Err(_) => return,
            Ok(read) => bytes.truncate(read),
        }
    }
}
