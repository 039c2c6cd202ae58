//! The connection to one peer on one lane: dialled, written, watched, and dialled again.
//!
//! A link takes what waits in its outbox, puts it into one frame and writes that at once. There is no
//! delay to gather more: while one write is under way, the next batch gathers by itself.
//!
//! A dead peer is noticed in three ways: the socket says so; a write makes no progress; what was sent
//! isn't acknowledged (`TCP_USER_TIMEOUT`, where there is such a thing, without which the kernel would
//! go on for a quarter of an hour and resume minutes after the network has healed). An empty frame now
//! and then lets an idle link notice too, and tells the other side that it is alive.

use std::sync::Arc;
use std::time::Duration;

use metrics::counter;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{debug, info, warn};

use super::network::{Peer, PeerLane, PeerNetworkConfig, count_dropped};
use super::outbox::Batch;
use super::room::Room;
use super::{Timings, TransportError, frame, handshake};
use crate::codec::hello::{Lane, PeerHello, ProtocolRange};
use crate::codec::peer::{PeerFrame, encode, encode_raft};
use crate::limits::FRAME_TARGET_BYTES;
use crate::telemetry::hot::hot;
use crate::telemetry::metrics as names;

/// How a link is doing.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct LinkState {
    /// Whether it is connected.
    pub connected: bool,
    /// Incarnation of the peer, as of the last connection; 0: there was none.
    pub incarnation: u64,
    /// Connections made so far.
    pub connections: u64,
    /// Why it isn't connected, or why the last connection ended.
    pub error: Option<String>,
    /// Refusals in a row. A few are usual while a cluster forms: this node is a member already, the
    /// peer is about to be.
    pub refusals: u32,
}

/// Refusals in a row that say nothing yet; with the delays between attempts, a second or two of them.
const REFUSALS_USUAL: u32 = 6;

/// Between news of a node and the attempt to reach it that they lead to. Doubles with each, until a connection lasts: two
/// nodes each of which ends the other's connections would give each other news for ever.
const NEWS_PAUSE: Duration = Duration::from_millis(5);

/// A connection that passed its handshake.
struct Connection {
    stream: TcpStream,
    incarnation: u64,
}

/// Keeps one link until its outbox is closed.
pub(super) async fn run_link(config: PeerNetworkConfig, peer: Arc<Peer>, lane: Lane) {
    let link = peer.lane(lane);
    let (mut delay, mut news_pause) = (config.timings.redial_min, NEWS_PAUSE);
    // The start of the peer's process that this link was last connected to, if no other was seen since.
    let mut process = None;
    while !link.outbox.is_closed() {
        let address = peer.address.load_full();
        let lost = match connect(&config, &peer, lane, &address).await {
            Ok(connection) => {
                let since = Instant::now();
                if let Some(before) = process.replace(connection.incarnation)
                    && before != connection.incarnation
                {
                    (config.on_gone)(peer.node, before);
                }
                connected(&peer, link, &address, connection.incarnation);
                let end = drive(connection.stream, &config.timings, &peer, lane, &address).await;
                let lasted = since.elapsed() > config.timings.redial_max;
                if lasted {
                    (delay, news_pause) = (config.timings.redial_min, NEWS_PAUSE);
                }
                match end {
                    // Closed, or to be dialled elsewhere: not the peer's doing.
                    Ok(()) => {
                        link.state().connected = false;
                        debug!(node = %peer.node, lane = lane.name(), "peer link put down");
                        continue;
                    }
                    Err(error) => {
                        disconnected(&peer, link, &address, &error);
                        if lasted {
                            // Whether the process is gone, its port can tell.
                            (config.on_unreachable)(peer.node);
                            continue;
                        }
                        true
                    }
                }
            }
            Err(error) => {
                disconnected(&peer, link, &address, &error);
                if let TransportError::Refused(refusal) = &error {
                    (config.on_refused)(peer.node, refusal);
                }
                if let Some(process) = process.filter(|_| is_nobody_there(&error)) {
                    (config.on_gone)(peer.node, process);
                }
                let dropped = link.outbox.clear();
                count_dropped(lane, "unreachable", dropped);
                dropped > 0
            }
        };
        if lost {
            (config.on_unreachable)(peer.node);
        }
        let jitter = rand::random_range(0.5..1.0);
        if pause(&peer, link, &address, delay.mul_f64(jitter), news_pause).await {
            news_pause = (news_pause * 2).min(config.timings.redial_max);
        }
        delay = (delay * 2).min(config.timings.redial_max);
    }
}

/// Waits before dialling again, no longer than until the peer is dropped or has moved, or `news_pause` after there is news
/// of it. Returns whether there was.
async fn pause(
    peer: &Peer,
    link: &PeerLane,
    address: &Arc<String>,
    delay: Duration,
    news_pause: Duration,
) -> bool {
    let moved = async {
        while !link.outbox.is_closed() && Arc::ptr_eq(&peer.address.load(), address) {
            link.outbox.changed().await;
        }
    };
    let end = Instant::now() + delay;
    let news = async {
        link.redial.notified().await;
        sleep_until(end.min(Instant::now() + news_pause)).await;
    };
    // What was queued meanwhile must wake the link once it is connected; it looks before it waits.
    tokio::select! {
        () = sleep_until(end) => false,
        () = news => true,
        () = moved => false,
    }
}

/// Whether a machine has answered that nobody listens at the address.
fn is_nobody_there(error: &TransportError) -> bool {
    matches!(error, TransportError::Io(error) if error.kind() == std::io::ErrorKind::ConnectionRefused)
}

async fn connect(
    config: &PeerNetworkConfig,
    peer: &Peer,
    lane: Lane,
    address: &str,
) -> Result<Connection, TransportError> {
    let hello = PeerHello {
        protocol: ProtocolRange::OURS,
        cluster_id: Some(config.cluster_id),
        from_node: config.node,
        to_node: peer.node,
        lane,
        incarnation: config.incarnation,
    };
    let limit = config.timings.connect;
    let mut stream = open(address, &config.timings).await?;
    let (welcome, reader) = timeout(limit, handshake::dial(&mut stream, &hello))
        .await
        .map_err(|_| TransportError::Timeout("the handshake"))??;
    if !reader.is_empty() {
        return Err(TransportError::Protocol("it sends on this lane".into()));
    }
    Ok(Connection { stream, incarnation: welcome.incarnation })
}

/// Dials, and sets the socket up as every outgoing peer connection wants it.
pub(super) async fn open(address: &str, timings: &Timings) -> Result<TcpStream, TransportError> {
    let stream = timeout(timings.connect, TcpStream::connect(address))
        .await
        .map_err(|_| TransportError::Timeout("connecting"))??;
    stream.set_nodelay(true)?;
    #[cfg(target_os = "linux")]
    {
        let millis = u32::try_from(timings.idle.as_millis()).unwrap_or(u32::MAX);
        if let Err(error) = rustix::net::sockopt::set_tcp_user_timeout(&stream, millis) {
            debug!(%error, "a peer connection goes without a TCP user timeout");
        }
    }
    Ok(stream)
}

fn connected(peer: &Peer, link: &PeerLane, address: &str, incarnation: u64) {
    let mut state = link.state();
    let first = state.connections == 0;
    state.connected = true;
    state.incarnation = incarnation;
    state.connections += 1;
    state.error = None;
    state.refusals = 0;
    drop(state);
    let lane = link.lane.name();
    if !first {
        counter!(names::PEER_RECONNECTS, "lane" => lane).increment(1);
    }
    info!(node = %peer.node, address, lane, incarnation, "connected to a peer");
}

/// Notes why a link is down: loudly if it is news, once per change and not once per attempt.
fn disconnected(peer: &Peer, link: &PeerLane, address: &str, error: &TransportError) {
    let text = error.to_string();
    let mut state = link.state();
    let was_connected = std::mem::replace(&mut state.connected, false);
    let news = was_connected || state.error.as_deref() != Some(&text);
    state.error = Some(text);
    let refused =
        matches!(error, TransportError::Refused(_) | TransportError::Protocol(_) | TransportError::Frame(_));
    state.refusals = if refused { state.refusals.saturating_add(1) } else { 0 };
    let refusals = state.refusals;
    drop(state);
    let (node, lane) = (peer.node, link.lane.name());
    match error {
        _ if refused && refusals < REFUSALS_USUAL => {
            debug!(%node, address, lane, %error, "a peer doesn't take this node's connection yet");
        }
        _ if refused && (refusals == REFUSALS_USUAL || news) => {
            warn!(%node, address, lane, %error, "a peer doesn't take this node's connection");
        }
        _ if was_connected => info!(%node, address, lane, %error, "lost the connection to a peer"),
        _ if news => info!(%node, address, lane, %error, "can't reach a peer, still trying"),
        _ => debug!(%node, address, lane, %error, "can't reach a peer, still trying"),
    }
}

/// Writes what the outbox gives until the connection fails (an error), or isn't wanted any more.
async fn drive(
    mut stream: TcpStream,
    timings: &Timings,
    peer: &Peer,
    lane: Lane,
    address: &Arc<String>,
) -> Result<(), TransportError> {
    let link = peer.lane(lane);
    let (mut reader, mut writer) = stream.split();
    let (mut buffer, mut room) = (Vec::new(), Room::default());
    let mut ignored = [0; 8];
    while !link.outbox.is_closed() && Arc::ptr_eq(&peer.address.load(), address) {
        let batch = link.outbox.take(FRAME_TARGET_BYTES);
        if batch.is_empty() {
            tokio::select! {
                () = link.outbox.changed() => continue,
                // Nothing is ever sent this way: to wake up here means the connection has ended.
                read = reader.read(&mut ignored) => return Err(match read {
                    Ok(0) => TransportError::Closed,
                    Ok(_) => TransportError::Protocol("it sends on this lane".into()),
                    Err(error) => error.into(),
                }),
                () = sleep(timings.keepalive) => {}
            }
        }
        buffer.clear();
        let frames = fill(&mut buffer, &batch, peer, lane);
        let (messages, bytes) = (batch.messages.len(), batch.bytes);
        drop(batch);
        let result = write(&mut writer, &buffer, timings.idle).await;
        link.outbox.written(bytes);
        if let Err(error) = result {
            count_dropped(lane, "connection lost", messages);
            return Err(error);
        }
        let sent = hot().sent(lane.name());
        sent.frames.increment(frames);
        sent.messages.increment(messages as u64);
        sent.bytes.increment(buffer.len() as u64);
        if buffer.capacity() > 4 * FRAME_TARGET_BYTES || room.is_excess(buffer.len(), buffer.capacity()) {
            buffer = Vec::new();
        }
    }
    Ok(())
}

/// Puts a batch into frames; an empty batch becomes an empty frame. Returns how many.
fn fill(buffer: &mut Vec<u8>, batch: &Batch, peer: &Peer, lane: Lane) -> u64 {
    let mut frames = 0;
    let mut sealed = |result: Result<(), TransportError>| match result {
        Ok(()) => frames += 1,
        // Messages are checked before they are queued, so this takes a bug in the codec. To lose them
        // is what raft expects of a network.
        Err(error) => {
            count_dropped(lane, "invalid", batch.messages.len());
            warn!(node = %peer.node, lane = lane.name(), %error, "can't put messages into a frame");
        }
    };
    if let Some(heartbeat) = batch.heartbeat {
        sealed(frame::append(buffer, |out| Ok(encode(&PeerFrame::Heartbeat(heartbeat), out)?)));
    }
    if batch.heartbeat.is_none() || !batch.messages.is_empty() {
        sealed(frame::append(buffer, |out| Ok(encode_raft(&batch.messages, out)?)));
    }
    frames
}

/// Writes everything, however long it takes, as long as something moves within `stall`.
pub(super) async fn write(
    writer: &mut (impl AsyncWriteExt + Unpin),
    mut bytes: &[u8],
    stall: Duration,
) -> Result<(), TransportError> {
    while !bytes.is_empty() {
        let written =
            timeout(stall, writer.write(bytes)).await.map_err(|_| TransportError::Timeout("writing"))??;
        if written == 0 {
            return Err(TransportError::Closed);
        }
        bytes = &bytes[written..];
    }
    Ok(())
}
