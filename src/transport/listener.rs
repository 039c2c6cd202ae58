//! What a node receives from others: the peer port, from the accepted socket to a [`PeerHandler`].
//!
//! Everything of a connection happens in one task on the thread of [`serve`]: bytes are read into one
//! buffer, all whole frames in it are decoded, and their raft messages are handed over as one batch.
//! A connection ends at the first thing wrong with it; the listener lives on.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::LocalBoxFuture;
use futures_util::stream::FuturesUnordered;
use metrics::{counter, gauge};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tracing::{debug, info, warn};

use super::frame::{self, FrameError, FrameReader, HEADER_BYTES};
use super::handshake::{Identity, accept_hello, accept_preamble};
use super::link::write;
use super::snapshot::receiver::{self, SnapshotSink};
use super::{Timings, TransportError, foreign};
use crate::codec::GroupMessage;
use crate::codec::hello::{HelloRefusal, Lane, PeerHello};
use crate::codec::peer::{NodeHeartbeat, PeerFrame, PeerRequest, PeerResponse, decode, encode};
use crate::codec::snapshot::{SnapshotAnswer, SnapshotOffer};
use crate::ids::NodeId;
use crate::limits::{FRAME_BYTES_MAX, PEER_CONNECTIONS_MAX, PEER_REQUESTS_MAX, REQUEST_FRAME_BYTES_MAX};
use crate::refusal::Refusal;
use crate::telemetry::hot::hot;
use crate::telemetry::metrics as names;

/// What a node does with what its peers send. Called on the thread of [`serve`]; must not block.
pub trait PeerHandler {
    /// Judges a dialler: who this node is, or a refusal for the dialler's log. See
    /// [`PeerHello::check`] for what every node checks.
    fn hello(&self, hello: &PeerHello) -> Result<Identity, HelloRefusal>;

    /// The connection that whoever said `hello` was welcome on has ended.
    fn gone(&self, _hello: &PeerHello) {}

    /// Raft messages from a member, checked in form, in the order they were sent.
    fn raft(&self, from: NodeId, messages: Vec<GroupMessage>);

    /// A member is alive. If it isn't to be one any more, its connection ends with the refusal.
    fn heartbeat(&self, heartbeat: NodeHeartbeat) -> Result<(), HelloRefusal>;

    /// A question of whoever said `hello`; its answer goes back on the connection it came on. The
    /// future runs to its end even if the caller hangs up, unless the listener is stopped.
    fn request(&self, hello: &PeerHello, request: PeerRequest) -> LocalBoxFuture<'static, PeerResponse>;

    /// A snapshot is offered: where its bytes go, or the answer that ends it.
    fn snapshot(
        &self,
        from: NodeId,
        offer: SnapshotOffer,
    ) -> LocalBoxFuture<'static, Result<Box<dyn SnapshotSink>, SnapshotAnswer>>;

    /// Where clients find this node, for those who dial the wrong port.
    fn client_address(&self) -> String;
}

/// Clocks and bounds of a listener.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ListenerConfig {
    /// Clocks of its connections.
    pub timings: Timings,
    /// Connections at a time; more wait in the listen queue.
    pub connections_max: usize,
}

impl Default for ListenerConfig {
    fn default() -> ListenerConfig {
        ListenerConfig { timings: Timings::default(), connections_max: PEER_CONNECTIONS_MAX }
    }
}

/// Serves the peer port.
#[derive(Clone, Copy, Debug, Default)]
pub struct PeerListener;

impl PeerListener {
    /// Accepts connections until `shutdown` resolves, then drops them all. Must run within a
    /// [`tokio::task::LocalSet`], as everything on an actix arbiter does.
    pub async fn serve(
        listener: TcpListener,
        handler: Rc<dyn PeerHandler>,
        shutdown: impl Future<Output = ()>,
    ) {
        serve(listener, handler, ListenerConfig::default(), shutdown).await;
    }
}

/// [`PeerListener::serve`] with other clocks and bounds.
pub async fn serve(
    listener: TcpListener,
    handler: Rc<dyn PeerHandler>,
    config: ListenerConfig,
    shutdown: impl Future<Output = ()>,
) {
    let connections = Arc::new(Semaphore::new(config.connections_max));
    let mut tasks = JoinSet::new();
    tokio::pin!(shutdown);
    loop {
        tokio::select! {
            () = &mut shutdown => return,
            (stream, from, permit) = accept(&listener, &connections) => {
                let handler = handler.clone();
                tasks.spawn_local(async move {
                    let _permit = permit;
                    let _counted = Counted::new();
                    let result = connection(stream, from, &*handler, &config.timings).await;
                    if let Err(error) = result {
                        report(from, &error);
                    }
                });
            }
            Some(ended) = tasks.join_next() => {
                if let Err(error) = ended && error.is_panic() {
                    std::panic::resume_unwind(error.into_panic());
                }
            }
        }
    }
}

/// One connection in the gauge, also if its task is stopped.
struct Counted;

impl Counted {
    fn new() -> Counted {
        gauge!(names::PEER_CONNECTIONS).increment(1.0);
        Counted
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        gauge!(names::PEER_CONNECTIONS).decrement(1.0);
    }
}

/// Accepts the next connection as soon as there is room for it. May be dropped while it waits.
async fn accept(
    listener: &TcpListener,
    connections: &Arc<Semaphore>,
) -> (TcpStream, SocketAddr, OwnedSemaphorePermit) {
    let permit = match connections.clone().acquire_owned().await {
        Ok(permit) => permit,
        // The semaphore is never closed.
        Err(_) => std::future::pending().await,
    };
    let mut delay = Duration::from_millis(5);
    loop {
        match listener.accept().await {
            Ok((stream, from)) => return (stream, from, permit),
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            // Out of file descriptors or memory: it takes others to give some back.
            Err(error) => {
                warn!(%error, ?delay, "can't accept a peer connection, waiting");
                sleep(delay).await;
                delay = (delay * 2).min(Duration::from_secs(1));
            }
        }
    }
}

fn report(from: SocketAddr, error: &TransportError) {
    match error {
        TransportError::Frame(_) | TransportError::Codec(_) | TransportError::Protocol(_) => {
            counter!(names::PEER_MALFORMED).increment(1);
            warn!(%from, %error, "closed a peer connection");
        }
        // The dialler logs it, once.
        TransportError::Refused(_) => {
            counter!(names::PEER_REFUSED).increment(1);
            debug!(%from, %error, "refused a peer connection");
        }
        _ => debug!(%from, %error, "a peer connection ended"),
    }
}

async fn connection(
    mut stream: TcpStream,
    from: SocketAddr,
    handler: &dyn PeerHandler,
    timings: &Timings,
) -> Result<(), TransportError> {
    stream.set_nodelay(true)?;
    let limit = timings.connect;
    match timeout(limit, accept_preamble(&mut stream)).await {
        Err(_) => return Err(TransportError::Timeout("the first bytes")),
        Ok(Err(TransportError::Frame(FrameError::Foreign))) => {
            counter!(names::PEER_FOREIGN).increment(1);
            info!(%from, "answered a client that dialled the peer port");
            return answer_client(stream, handler, timings).await;
        }
        Ok(result) => result?,
    }
    let (hello, reader) = timeout(limit, accept_hello(&mut stream, |hello| handler.hello(hello)))
        .await
        .map_err(|_| TransportError::Timeout("the handshake"))??;
    let lane = hello.lane.name();
    debug!(%from, node = %hello.from_node, lane, "a peer connected");
    let ended = match hello.lane {
        Lane::Request => answer(stream, reader, &hello, handler, timings).await,
        Lane::Snapshot => receiver::receive(stream, reader, &hello, handler, timings).await,
        Lane::Control | Lane::Append => receive(stream, reader, &hello, handler, timings).await,
    };
    handler.gone(&hello);
    ended
}

/// Tells an RPC client where it should have gone. What it sent must be read before the socket is
/// closed, or the kernel resets the connection and takes the answer with it.
async fn answer_client(
    mut stream: TcpStream,
    handler: &dyn PeerHandler,
    timings: &Timings,
) -> Result<(), TransportError> {
    let message = foreign::abort_for_client(&handler.client_address())?;
    write(&mut stream, &message, timings.idle).await?;
    stream.shutdown().await?;
    let mut ignored = [0; 1024];
    let drain = async {
        while stream.read(&mut ignored).await? > 0 {}
        Ok::<_, io::Error>(())
    };
    match timeout(timings.connect, drain).await {
        Ok(result) => Ok(result?),
        Err(_) => Ok(()),
    }
}

/// The lanes of raft messages.
async fn receive(
    mut stream: TcpStream,
    mut reader: FrameReader,
    hello: &PeerHello,
    handler: &dyn PeerHandler,
    timings: &Timings,
) -> Result<(), TransportError> {
    reader.set_max(FRAME_BYTES_MAX);
    loop {
        let mut messages = Vec::new();
        let frames = take_frames(&mut reader, hello, handler, &mut messages);
        // What came before a bad frame was good.
        if !messages.is_empty() {
            hot().received(hello.lane.name()).messages.increment(messages.len() as u64);
            handler.raft(hello.from_node, messages);
        }
        frames?;
        match timeout(timings.idle, reader.fill(&mut stream)).await {
            Err(_) => return Err(TransportError::Timeout("the next frame")),
            Ok(Ok(0)) if reader.is_empty() => return Ok(()),
            Ok(Ok(0)) => return Err(TransportError::Closed),
            Ok(read) => read?,
        };
    }
}

fn take_frames(
    reader: &mut FrameReader,
    hello: &PeerHello,
    handler: &dyn PeerHandler,
    messages: &mut Vec<GroupMessage>,
) -> Result<(), TransportError> {
    while let Some(payload) = reader.take()? {
        received(hello.lane, HEADER_BYTES + payload.len());
        match decode(payload)? {
            PeerFrame::Raft(mut more) => {
                more.iter_mut().for_each(|message| message.node = hello.from_node);
                if messages.is_empty() {
                    *messages = more;
                } else {
                    messages.extend(more);
                }
            }
            PeerFrame::Heartbeat(heartbeat) => {
                let (node, incarnation) = (heartbeat.node, heartbeat.incarnation);
                if (node, incarnation) != (hello.from_node, hello.incarnation) {
                    return Err(TransportError::Protocol(format!(
                        "node {} sends the heartbeat of node {node}, incarnation {incarnation}",
                        hello.from_node
                    )));
                }
                handler.heartbeat(heartbeat).map_err(TransportError::Refused)?;
            }
            PeerFrame::Request(..) | PeerFrame::Response(..) | PeerFrame::Snapshot(..) => {
                return Err(TransportError::Protocol(format!(
                    "a request, response or snapshot on lane {}",
                    hello.lane.name()
                )));
            }
        }
    }
    Ok(())
}

/// Counts a frame of so many bytes.
pub(super) fn received(lane: Lane, bytes: usize) {
    let received = hot().received(lane.name());
    received.frames.increment(1);
    received.bytes.increment(bytes as u64);
}

/// The lane of requests.
async fn answer(
    mut stream: TcpStream,
    mut reader: FrameReader,
    hello: &PeerHello,
    handler: &dyn PeerHandler,
    timings: &Timings,
) -> Result<(), TransportError> {
    reader.set_max(REQUEST_FRAME_BYTES_MAX);
    let (mut input, mut output) = stream.split();
    let mut pending = FuturesUnordered::new();
    let mut open = true;
    // Dropped when the other side hangs up.
    let (line, hung_up) = watch::channel(());
    let mut line = Some(line);
    loop {
        while pending.len() < PEER_REQUESTS_MAX {
            let Some(payload) = reader.take()? else {
                break;
            };
            received(Lane::Request, HEADER_BYTES + payload.len());
            let PeerFrame::Request(id, request) = decode(payload)? else {
                return Err(TransportError::Protocol("not a request on lane request".into()));
            };
            // To read a replica is for the asker's sake alone, and takes minutes.
            let is_for_asker = matches!(request, PeerRequest::Digest(_));
            let (response, mut hung_up) = (handler.request(hello, request), hung_up.clone());
            pending.push(async move {
                tokio::select! {
                    response = response => (id, response),
                    _ = hung_up.changed(), if is_for_asker => (id, PeerResponse::Refused(Refusal::Deadline)),
                }
            });
        }
        if !open && pending.is_empty() {
            return Ok(());
        }
        tokio::select! {
            Some((id, response)) = pending.next(), if !pending.is_empty() => {
                let bytes = sealed_response(id, response)?;
                match write(&mut output, &bytes, timings.idle).await {
                    // It hung up; the rest is done for its own sake.
                    Err(_) if !open => {}
                    result => result?,
                }
            }
            read = reader.fill(&mut input), if open && pending.len() < PEER_REQUESTS_MAX => {
                open = read? > 0;
                if !open {
                    line.take();
                }
            }
            () = sleep(timings.idle), if pending.is_empty() => {
                return Err(TransportError::Timeout("the next request"));
            }
        }
    }
}

/// A response in its frame; if it doesn't fit one, a refusal that says so.
fn sealed_response(id: u64, response: PeerResponse) -> Result<Vec<u8>, TransportError> {
    let mut bytes = Vec::new();
    let frame = PeerFrame::Response(id, response);
    if let Err(error) = frame::append(&mut bytes, |out| encode(&frame, out)) {
        warn!(%error, "can't send the answer to a peer's request");
        let refusal = Refusal::Invalid(format!("the answer can't be sent: {error}"));
        let frame = PeerFrame::Response(id, PeerResponse::Refused(refusal));
        frame::append(&mut bytes, |out| encode(&frame, out))?;
    }
    Ok(bytes)
}
