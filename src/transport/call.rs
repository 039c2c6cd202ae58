//! One request to a node, one answer, on a connection of its own: formation, join, map pulls. These are
//! rare; a pool of connections would be more to go wrong than it saves.

use std::io;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::timeout;

use super::frame;
use super::link::{open, write};
use super::{Timings, TransportError, handshake};
use crate::codec::hello::{HelloRefusal, Lane, PeerHello, ProtocolRange};
use crate::codec::peer::{PeerFrame, PeerRequest, PeerResponse, decode, encode};
use crate::ids::{ClusterId, NodeId};
use crate::limits::FRAME_BYTES_MAX;

/// Who asks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct HelloConfig {
    /// Its cluster; `None` while it has none.
    pub cluster_id: Option<ClusterId>,
    /// Its id; 0 while it has none.
    pub node: NodeId,
    /// Which start of its process this is.
    pub incarnation: u64,
}

/// Why a call has no answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The address can't be reached: the request was not sent.
    #[error("can't reach {address}: {source}")]
    Unreachable {
        /// HOST:PORT.
        address: String,
        /// Why.
        source: io::Error,
    },
    /// The node doesn't want to talk to this one: the request was not sent.
    #[error("{address} refuses this node: {reason}")]
    Refused {
        /// HOST:PORT.
        address: String,
        /// In its words.
        reason: HelloRefusal,
    },
    /// The time given ran out. The request may have been carried out.
    #[error("{address} did not answer within {timeout:?}")]
    Timeout {
        /// HOST:PORT.
        address: String,
        /// The time given.
        timeout: Duration,
    },
    /// The connection failed before the answer came. The request may have been carried out.
    #[error("no answer from {address}: {source}")]
    Failed {
        /// HOST:PORT.
        address: String,
        /// Why.
        source: TransportError,
    },
}

/// Asks nodes, one call at a time.
#[derive(Clone, Copy, Debug, Default)]
pub struct PeerClient;

impl PeerClient {
    /// Asks whoever listens at `address` (HOST:PORT, resolved now). The answer comes within `timeout`,
    /// or an error does.
    pub async fn call(
        address: &str,
        hello: HelloConfig,
        request: PeerRequest,
        timeout: Duration,
    ) -> Result<PeerResponse, CallError> {
        let exchange = async {
            let stream = connect(address, timeout).await?;
            exchange(stream, hello, request).await.map_err(|error| match error {
                TransportError::Refused(reason) => CallError::Refused { address: address.to_owned(), reason },
                source => CallError::Failed { address: address.to_owned(), source },
            })
        };
        tokio::time::timeout(timeout, exchange)
            .await
            .unwrap_or_else(|_| Err(CallError::Timeout { address: address.to_owned(), timeout }))
    }
}

async fn connect(address: &str, limit: Duration) -> Result<TcpStream, CallError> {
    let mut timings = Timings::default();
    timings.connect = timings.connect.min(limit);
    open(address, &timings).await.map_err(|error| {
        let source = match error {
            TransportError::Io(source) => source,
            other => io::Error::new(io::ErrorKind::TimedOut, other.to_string()),
        };
        CallError::Unreachable { address: address.to_owned(), source }
    })
}

async fn exchange(
    mut stream: TcpStream,
    hello: HelloConfig,
    request: PeerRequest,
) -> Result<PeerResponse, TransportError> {
    /// The connection carries one request, so its number is as good as any.
    const ID: u64 = 1;
    let timings = Timings::default();
    let hello = PeerHello {
        protocol: ProtocolRange::OURS,
        cluster_id: hello.cluster_id,
        from_node: hello.node,
        to_node: NodeId(0),
        lane: Lane::Request,
        incarnation: hello.incarnation,
    };
    let (_, mut reader) = timeout(timings.connect, handshake::dial(&mut stream, &hello))
        .await
        .map_err(|_| TransportError::Timeout("the handshake"))??;
    let mut out = Vec::new();
    frame::append(&mut out, |out| encode(&PeerFrame::Request(ID, request), out))?;
    write(&mut stream, &out, timings.idle).await?;
    reader.set_max(FRAME_BYTES_MAX);
    match decode(reader.read(&mut stream).await?)? {
        PeerFrame::Response(ID, response) => Ok(response),
        _ => Err(TransportError::Protocol("something else than the answer came back".into())),
    }
}
