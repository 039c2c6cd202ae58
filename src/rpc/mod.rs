//! Cap'n Proto services for clients: the client port of a node.
//!
//! - [`kv`]: data. - `gather`: batches for several shards in one call. - [`admin`]: administration. - [`wire`]: the program's
//!   types in protocol form. - `news`: what is told of the cluster map.
//!
//! The services are thin: they check limits, hand operations to the node, and write down what comes
//! back. Plain calls by key are carried to the shard's leader by the client library, one hop.
//!
//! ```text
//!   accept ─► first bytes ─► Gate.open: protocol range ─► Kv, Admin
//!     │           └ a node's? told so, closed
//!     └ at most CLIENT_CONNECTIONS_MAX; more wait in the listen queue
//! ```
//!
//! What comes in is bounded: connections, the size of a message, bytes of great messages that are still
//! arriving per thread ([`crate::transport::arrival`]), operations and bytes being worked on per thread
//! (`Busy` above). So are the answers that a connection hasn't read: above, no call is read
//! from it and no value is put out, and it is closed when it reads nothing at all for
//! [`CONNECTION_STUCK_MS_MAX`]. A connection that sends what can't be read is closed; nobody else
//! notices. Not here (yet): encryption, and who is calling.

pub mod admin;
mod gather;
pub mod kv;
mod news;
pub mod wire;

use std::cell::Cell;
use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use capnp_rpc::{RpcSystem, new_client};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::{JoinSet, spawn_local};

use self::news::News;
use crate::client::local::LocalClient;
use crate::limits::{
    ARRIVING_WINDOW_MS, CLIENT_CONNECTIONS_MAX, CLIENT_DRAIN_MS_MAX, CLIENT_LISTEN_QUEUE,
    CONNECTION_STUCK_MS_MAX, CONNECTION_UNSENT_BYTES_MAX, GREETING_MS_MAX, THREAD_ARRIVING_BATCHES_BYTES_MAX,
    THREAD_ARRIVING_BYTES_MAX, TIMEOUT_DEFAULT_MS, TIMEOUT_MAX_MS,
};
use crate::node::handle::NodeHandle;
use crate::node::load::{self, Admitted};
use crate::refusal::Refusal;
use crate::schema::kv_capnp::gate;
use crate::transport::arrival::Arrivals;
use crate::transport::foreign::refusal_for_peer;
use crate::transport::frame::is_peer_preamble;
use crate::transport::rpc_stream::rpc_server;

/// What the software calls itself to the other side.
pub const SOFTWARE: &str = concat!("pontoon ", env!("CARGO_PKG_VERSION"));

/// First and longest pause after a failed accept (no file descriptors left, for instance).
const ACCEPT_PAUSE: (Duration, Duration) = (Duration::from_millis(5), Duration::from_secs(1));
/// Time to write out the last answers on a connection that is being closed.
const FAREWELL: Duration = Duration::from_millis(200);

/// What all connections of one thread share.
pub(crate) struct Service {
    pub(crate) node: NodeHandle,
    /// Carries plain calls to other nodes.
    pub(crate) client: LocalClient,
    pub(crate) load: Rc<Load>,
    /// Room for great messages that arrive.
    pub(crate) arrivals: Rc<Arrivals>,
    /// What those are told who wait for a newer map.
    pub(crate) news: News,
}

/// Serves clients on `listener` until `shutdown` ends: then accepts nothing more, refuses new calls,
/// gives those in flight up to [`CLIENT_DRAIN_MS_MAX`], and closes the connections. Must run in a
/// `LocalSet`, such as an arbiter's; everything it starts stays on that thread. Several threads may
/// serve the same port through clones of its listener.
pub async fn serve(listener: TcpListener, node: NodeHandle, shutdown: impl Future) {
    // Bound with room for 128. After a node was away its clients come back all at once.
    if let Err(error) = rustix::net::listen(&listener, CLIENT_LISTEN_QUEUE) {
        tracing::warn!(%error, "the queue of clients to be accepted stays short");
    }
    let source = node.clone();
    let service = Rc::new(Service {
        client: LocalClient::start(Box::new(move || source.map())),
        node,
        load: Rc::default(),
        arrivals: Arrivals::new(
            THREAD_ARRIVING_BATCHES_BYTES_MAX,
            THREAD_ARRIVING_BYTES_MAX,
            Duration::from_millis(ARRIVING_WINDOW_MS),
        ),
        news: News::default(),
    });
    let permits = Arc::new(Semaphore::new(CLIENT_CONNECTIONS_MAX));
    let (stop, stopped) = watch::channel(false);
    let mut connections = JoinSet::new();
    let mut shutdown = pin!(shutdown);
    let mut pause = ACCEPT_PAUSE.0;
    loop {
        let accepted = tokio::select! {
            biased;
            _ = &mut shutdown => break,
            Some(ended) = connections.join_next() => {
                if let Err(error) = ended {
                    tracing::error!(%error, "serving a client connection panicked");
                }
                continue;
            }
            accepted = accept(&listener, &permits) => accepted,
        };
        match accepted {
            Ok((stream, permit)) => {
                pause = ACCEPT_PAUSE.0;
                let (service, stopped) = (service.clone(), stopped.clone());
                connections.spawn_local(async move {
                    converse(stream, &service, stopped).await;
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, ?pause, "can't accept a client connection; trying again");
                tokio::select! {
                    _ = &mut shutdown => break,
                    () = tokio::time::sleep(pause) => (),
                }
                pause = (pause * 2).min(ACCEPT_PAUSE.1);
            }
        }
    }
    drop(listener);
    service.load.stopping.set(true);
    let limit = Duration::from_millis(CLIENT_DRAIN_MS_MAX);
    if tokio::time::timeout(limit, service.load.idle()).await.is_err() {
        let calls = service.load.calls.get();
        tracing::warn!(calls, "client calls were still in flight at the end");
    }
    stop.send_replace(true);
    // Each ends within the time for a farewell, twice.
    while connections.join_next().await.is_some() {}
}

async fn accept(
    listener: &TcpListener,
    permits: &Arc<Semaphore>,
) -> io::Result<(TcpStream, OwnedSemaphorePermit)> {
    let permit = permits.clone().acquire_owned().await;
    let permit = permit.map_err(io::Error::other)?;
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return Ok((stream, permit)),
            // The client gave up while it waited in the listen queue.
            Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => (),
            Err(e) => return Err(e),
        }
    }
}

/// One connection, from its first bytes to its end.
async fn converse(mut stream: TcpStream, service: &Rc<Service>, mut stopped: watch::Receiver<bool>) {
    let limit = Duration::from_millis(GREETING_MS_MAX);
    let greeting = tokio::select! {
        _ = stopped.changed() => return,
        greeting = tokio::time::timeout(limit, is_peer(&stream)) => greeting,
    };
    match greeting {
        Ok(Ok(false)) => (),
        Ok(Ok(true)) => {
            tracing::warn!("a node dialled the client port; it needs the peer port");
            let (map, node) = (service.node.map(), service.node.node());
            let peer_address = map.nodes.get(&node).map_or("the peer port", |n| n.peer_address.as_str());
            if let Ok(refusal) = refusal_for_peer(peer_address) {
                let farewell = async {
                    stream.write_all(&refusal).await?;
                    stream.shutdown().await
                };
                // It is told if it listens.
                tokio::time::timeout(FAREWELL, farewell).await.ok();
            }
            return;
        }
        // It sent nothing, or is gone.
        Ok(Err(_)) | Err(_) => return,
    }
    let (network, backlog, flusher) = match rpc_server(stream, &service.arrivals, CONNECTION_UNSENT_BYTES_MAX)
    {
        Ok(streams) => streams,
        Err(error) => {
            tracing::debug!(%error, "a client connection broke at its start");
            return;
        }
    };
    let gate: gate::Client = new_client(kv::Gate::new(service.clone(), backlog.clone()));
    let mut system = RpcSystem::new(Box::new(network), Some(gate.client));
    let goodbye = system.get_disconnector();
    let mut flusher = spawn_local(flusher);
    tokio::select! {
        ended = &mut system => {
            if let Err(error) = ended {
                tracing::debug!(%error, "a client connection was closed");
            }
        }
        () = backlog.stuck(Duration::from_millis(CONNECTION_STUCK_MS_MAX)) => {
            tracing::info!(unsent = backlog.unsent(), "closed a client connection that reads no answers");
        }
        _ = stopped.changed() => {
            // The answers that are ready are sent, then the connection is closed.
            tokio::select! {
                _ = &mut system => (),
                _ = tokio::time::timeout(FAREWELL, goodbye) => (),
            }
        }
    }
    drop(system);
    if tokio::time::timeout(FAREWELL, &mut flusher).await.is_err() {
        flusher.abort();
    }
}

/// Whether a connection begins as a node's does. Waits for the bytes that tell.
async fn is_peer(stream: &TcpStream) -> io::Result<bool> {
    let mut start = [0; 4];
    loop {
        let got = stream.peek(&mut start).await?;
        if got == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if got == start.len() || start[0] != b'P' {
            return Ok(is_peer_preamble(&start[..got]));
        }
        // The rest is on its way; peeking again would return the same at once.
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// What one thread is working on for its clients.
#[derive(Default)]
pub(crate) struct Load {
    /// Calls whose answer isn't given yet.
    calls: Cell<usize>,
    /// Operations that haven't ended, whether or not their call is still waited for.
    admitted: Arc<load::Load>,
    stopping: Cell<bool>,
    idle: Notify,
}

impl Load {
    /// Admits a call with so many operations and bytes, or says why not. The call counts until the guard
    /// is dropped, its operations until they have ended too: see [`load`].
    pub(crate) fn enter(self: &Rc<Load>, operations: usize, bytes: usize) -> Result<LoadGuard, Refusal> {
        if self.stopping.get() {
            return Err(Refusal::Unavailable("the node is stopping".into()));
        }
        let admitted = Arc::new(self.admitted.admit(operations, bytes)?);
        self.calls.set(self.calls.get() + 1);
        Ok(LoadGuard { load: self.clone(), admitted })
    }

    async fn idle(&self) {
        while self.calls.get() > 0 {
            self.idle.notified().await;
        }
    }
}

/// See [`Load::enter`].
pub(crate) struct LoadGuard {
    load: Rc<Load>,
    admitted: Arc<Admitted>,
}

impl LoadGuard {
    /// To go along with the call's operations.
    pub(crate) fn admitted(&self) -> Arc<Admitted> {
        self.admitted.clone()
    }
}

impl Drop for LoadGuard {
    fn drop(&mut self) {
        let load = &self.load;
        load.calls.set(load.calls.get() - 1);
        if load.calls.get() == 0 {
            load.idle.notify_one();
        }
    }
}

/// The time a request names, within bounds.
pub(crate) fn timeout(ms: u32) -> Duration {
    Duration::from_millis(match u64::from(ms) {
        0 => TIMEOUT_DEFAULT_MS,
        ms => ms.min(TIMEOUT_MAX_MS),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::THREAD_OPERATIONS_MAX;

    #[test]
    fn a_call_whose_operations_go_on_is_no_call_but_still_a_load() {
        let load = Rc::<Load>::default();
        let guard = load.enter(THREAD_OPERATIONS_MAX, 1).unwrap();
        let admitted = guard.admitted();
        drop(guard);
        assert_eq!(load.calls.get(), 0);
        assert!(matches!(load.enter(1, 1), Err(Refusal::Busy { .. })));
        drop(admitted);
        assert!(load.enter(1, 1).is_ok());
        load.stopping.set(true);
        assert!(matches!(load.enter(1, 1), Err(Refusal::Unavailable(_))));
    }

    #[test]
    fn timeouts_have_a_default_and_an_end() {
        assert_eq!(timeout(0), Duration::from_millis(TIMEOUT_DEFAULT_MS));
        assert_eq!(timeout(7), Duration::from_millis(7));
        assert_eq!(timeout(u32::MAX), Duration::from_millis(TIMEOUT_MAX_MS));
    }
}
