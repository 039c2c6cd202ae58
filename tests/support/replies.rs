//! The network between clients and nodes, which loses replies: a proxy in front of each node's client
//! port. What a client sent arrives, sooner or later; what it gets back may not.
#![allow(dead_code)] // Each test binary uses its own part.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};

/// In how many of 1000 cases each fault comes.
#[derive(Clone, Copy, Default)]
pub struct Odds {
    /// Instead of carrying a reply, the connection is closed.
    pub close: u64,
    /// From a reply on nothing comes back any more, on a connection that stays open.
    pub silence: u64,
    /// A request is kept for longer than a client waits, and arrives then, whoever has left.
    pub late: u64,
}

/// A direction.
#[derive(Clone, Copy)]
pub enum Way {
    /// From clients to nodes.
    Requests,
    /// From nodes to clients.
    Replies,
}

/// For longer than an attempt of the library lasts.
const LATE: Duration = Duration::from_millis(2_600);

struct Shared {
    dice: Mutex<StdRng>,
    odds: Mutex<Odds>,
    faults: AtomicU64,
    /// Connections so far.
    made: AtomicU64,
    /// By direction: connections with a lower number have lost it.
    mute: [AtomicU64; 2],
}

impl Shared {
    fn is_mute(&self, connection: u64, way: Way) -> bool {
        connection < self.mute[way as usize].load(Ordering::Relaxed)
    }

    /// Whether a fault comes here, which `odds` says how often.
    fn strikes(&self, odds: impl Fn(&Odds) -> u64) -> bool {
        let permille = odds(&self.odds.lock().expect("no panic holds it"));
        let strikes = self.dice.lock().expect("no panic holds it").random_range(0..1000) < permille;
        self.faults.fetch_add(u64::from(strikes), Ordering::Relaxed);
        strikes
    }
}

/// Proxies on a thread of their own. Dropped: closed.
pub struct Replies {
    shared: Arc<Shared>,
    addresses: Vec<SocketAddr>,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Replies {
    /// Proxies for nodes whose client ports are `targets`. The seed is for the dice; who rolls them when
    /// is up to the machine.
    pub fn new(targets: &[String], seed: u64) -> Replies {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let shared = Arc::new(Shared {
            dice: Mutex::new(StdRng::seed_from_u64(seed)),
            odds: Mutex::default(),
            faults: AtomicU64::new(0),
            made: AtomicU64::new(0),
            mute: Default::default(),
        });
        let mut addresses = Vec::new();
        for target in targets {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
            listener.set_nonblocking(true).expect("a socket");
            addresses.push(listener.local_addr().expect("an address"));
            let (shared, target) = (shared.clone(), target.clone());
            runtime.spawn(async move {
                let listener = TcpListener::from_std(listener).expect("a listener");
                while let Ok((client, _)) = listener.accept().await {
                    tokio::spawn(carry(client, target.clone(), shared.clone()));
                }
            });
        }
        Replies { shared, addresses, runtime: Some(runtime) }
    }

    /// What the nodes should advertise, in the order of the targets.
    pub fn addresses(&self) -> Vec<String> {
        self.addresses.iter().map(SocketAddr::to_string).collect()
    }

    /// From now on.
    pub fn set(&self, odds: Odds) {
        *self.shared.odds.lock().expect("no panic holds it") = odds;
    }

    /// Nothing passes in this direction any more on the connections there are, which stay open: not even
    /// their end is told. With `new`, neither on those to come.
    pub fn mute(&self, way: Way, new: bool) {
        let below = if new { u64::MAX } else { self.shared.made.load(Ordering::Relaxed) };
        self.shared.mute[way as usize].store(below, Ordering::Relaxed);
    }

    /// Connections to come are whole again; those there are stay as they are.
    pub fn heal(&self) {
        for way in [Way::Requests, Way::Replies] {
            let there = self.shared.made.load(Ordering::Relaxed);
            self.shared.mute[way as usize].fetch_min(there, Ordering::Relaxed);
        }
    }

    /// How often replies were lost so far.
    pub fn faults(&self) -> u64 {
        self.shared.faults.load(Ordering::Relaxed)
    }
}

impl Drop for Replies {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn carry(client: TcpStream, target: String, shared: Arc<Shared>) {
    let number = shared.made.fetch_add(1, Ordering::Relaxed);
    let Ok(node) = TcpStream::connect(target).await else {
        return;
    };
    if client.set_nodelay(true).is_err() || node.set_nodelay(true).is_err() {
        return;
    }
    let (client_in, client_out) = client.into_split();
    let (node_in, node_out) = node.into_split();
    let deaf = Arc::new(AtomicBool::new(false));
    let back = tokio::spawn(replies(node_in, client_out, number, deaf.clone(), shared.clone()));
    requests(client_in, node_out, number, &deaf, &shared).await;
    // The client has left. What it sent is still to be read by the node.
    tokio::time::sleep(Duration::from_secs(1)).await;
    back.abort();
}

async fn requests(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    number: u64,
    deaf: &AtomicBool,
    shared: &Shared,
) {
    let mut bytes = vec![0; 64 * 1024];
    while let Ok(read @ 1..) = from.read(&mut bytes).await {
        if shared.is_mute(number, Way::Requests) {
            continue;
        }
        if shared.strikes(|odds| odds.late) {
            deaf.store(true, Ordering::Relaxed);
            tokio::time::sleep(LATE).await;
        }
        if to.write_all(&bytes[..read]).await.is_err() {
            return;
        }
    }
    if shared.is_mute(number, Way::Requests) {
        std::future::pending::<()>().await;
    }
    // Not closed at once: a node cancels what it hasn't begun.
    tokio::time::sleep(Duration::from_millis(500)).await;
}

async fn replies(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    number: u64,
    deaf: Arc<AtomicBool>,
    shared: Arc<Shared>,
) {
    let mut bytes = vec![0; 64 * 1024];
    while let Ok(read @ 1..) = from.read(&mut bytes).await {
        if shared.strikes(|odds| odds.silence) {
            deaf.store(true, Ordering::Relaxed);
        }
        if deaf.load(Ordering::Relaxed) || shared.is_mute(number, Way::Replies) {
            continue;
        }
        if shared.strikes(|odds| odds.close) || to.write_all(&bytes[..read]).await.is_err() {
            // Dropping its half tells the client at once.
            return;
        }
    }
}
