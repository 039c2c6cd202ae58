//! Framed Cap'n Proto between nodes, and the byte streams under client RPC.
//!
//! ```text
//!   dialler                                            acceptor
//!   "PNTP" version ──────────────────────────────────►            preamble
//!   [len][crc32c][PeerHello] ────────────────────────►            who, whom, which lane
//!              ◄──────────────────────────── "PNTP" version [len][crc32c][PeerWelcome]
//!   [len][crc32c][PeerFrame] … ──────────────────────►            raft, heartbeats; or requests
//!              ◄──────────────────────────── [len][crc32c][PeerFrame] …   answers, lane `request` only
//! ```
//!
//! - [`frame`]: preamble, length, checksum. - [`handshake`]: both sides of the first exchange.
//! - [`network`]: what a node sends: one [`network::PeerNetwork`] for all its groups and threads.
//! - [`outbox`], [`link`]: a bounded queue and a connection per peer and lane, beneath it.
//! - [`listener`]: what a node receives. - [`call`]: one request to a node, one answer.
//! - [`snapshot`]: one snapshot file to one node.
//! - [`coalesce`], [`backlog`], [`rpc_stream`]: a TCP stream as client RPC wants it.
//! - [`foreign`]: what a client hears on the peer port, and a node on the client port.
//!
//! Promises: messages of one group and lane arrive in the order they were sent, each at most once, and
//! unaltered, or not at all. A message that was not delivered may be lost without a word; the node
//! behind it is then reported as unreachable. Nothing that arrives can make the process panic or
//! allocate beyond its limits: what is malformed costs the connection it came on.
//!
//! Not here (yet): encryption, and proof of who is calling. The peer port belongs on a private network.

pub mod arrival;
pub mod backlog;
pub mod call;
pub mod coalesce;
pub mod foreign;
pub mod frame;
pub mod handshake;
pub mod link;
pub mod listener;
pub mod network;
pub mod outbox;
mod room;
pub mod rpc_stream;
pub mod snapshot;

use std::io;
use std::time::Duration;

use crate::codec::CodecError;
use crate::codec::hello::HelloRefusal;
use crate::limits::{CONNECT_MS_MAX, KEEPALIVE_MS, PEER_IDLE_MS_MAX, REDIAL_MS_MAX, REDIAL_MS_MIN};
use frame::FrameError;

/// Why a peer connection was not made, or ended.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The socket.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// What arrived is not a frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The content of a frame.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// A frame that has no place on this connection.
    #[error("protocol violation: {0}")]
    Protocol(String),
    /// The other side doesn't want this connection.
    #[error("refused: {0}")]
    Refused(HelloRefusal),
    /// The other side closed the connection.
    #[error("closed by the other side")]
    Closed,
    /// Nothing moved for too long.
    #[error("{0} took too long")]
    Timeout(&'static str),
}

/// The clocks of a peer connection. The defaults come from [`crate::limits`]; tests use shorter ones.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Timings {
    /// To connect, and again for the handshake.
    pub connect: Duration,
    /// First delay before dialling again.
    pub redial_min: Duration,
    /// Longest delay before dialling again.
    pub redial_max: Duration,
    /// A link that sent nothing for so long sends an empty frame.
    pub keepalive: Duration,
    /// A connection without progress for so long is closed.
    pub idle: Duration,
}

impl Default for Timings {
    fn default() -> Timings {
        Timings {
            connect: Duration::from_millis(CONNECT_MS_MAX),
            redial_min: Duration::from_millis(REDIAL_MS_MIN),
            redial_max: Duration::from_millis(REDIAL_MS_MAX),
            keepalive: Duration::from_millis(KEEPALIVE_MS),
            idle: Duration::from_millis(PEER_IDLE_MS_MAX),
        }
    }
}
