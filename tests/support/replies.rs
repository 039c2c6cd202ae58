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

/// For longer than an attempt of the library lasts.
const LATE: Duration = Duration::from_millis(2_600);

struct Shared {
    dice: Mutex<StdRng>,
    odds: Mutex<Odds>,
    faults: AtomicU64,
}

impl Shared {
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
    let Ok(node) = TcpStream::connect(target).await else {
        return;
    };
    if client.set_nodelay(true).is_err() || node.set_nodelay(true).is_err() {
        return;
    }
    let (client_in, client_out) = client.into_split();
    let (node_in, node_out) = node.into_split();
    let deaf = Arc::new(AtomicBool::new(false));
    let back = tokio::spawn(replies(node_in, client_out, deaf.clone(), shared.clone()));
    requests(client_in, node_out, &deaf, &shared).await;
    // The client has left. What it sent is still to be read by the node.
    tokio::time::sleep(Duration::from_secs(1)).await;
    back.abort();
}

async fn requests(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, deaf: &AtomicBool, shared: &Shared) {
    let mut bytes = vec![0; 64 * 1024];
    while let Ok(read @ 1..) = from.read(&mut bytes).await {
        if shared.strikes(|odds| odds.late) {
            deaf.store(true, Ordering::Relaxed);
            tokio::time::sleep(LATE).await;
        }
        if to.write_all(&bytes[..read]).await.is_err() {
            return;
        }
    }
    // Not closed at once: a node cancels what it hasn't begun.
    tokio::time::sleep(Duration::from_millis(500)).await;
}

async fn replies(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    deaf: Arc<AtomicBool>,
    shared: Arc<Shared>,
) {
    let mut bytes = vec![0; 64 * 1024];
    while let Ok(read @ 1..) = from.read(&mut bytes).await {
        if shared.strikes(|odds| odds.silence) {
            deaf.store(true, Ordering::Relaxed);
        }
        if deaf.load(Ordering::Relaxed) {
            continue;
        }
        if shared.strikes(|odds| odds.close) || to.write_all(&bytes[..read]).await.is_err() {
            // Dropping its half tells the client at once.
            return;
        }
    }
}
