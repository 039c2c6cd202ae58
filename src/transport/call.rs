//! One request to a node, one answer, on a connection of its own: formation, join, map pulls. These are
//! rare; a pool of connections would be more to go wrong than it saves. Whoever asks the same node every second keeps a
//! [`PeerLine`] to it.

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
            let line = PeerLine::open(address, hello, timeout).await?;
            // The time is kept around it all.
            line.ask(request, timeout).await
        };
        let answer = tokio::time::timeout(timeout, exchange).await;
        let (_, answer) =
            answer.unwrap_or_else(|_| Err(CallError::Timeout { address: address.to_owned(), timeout }))?;
        Ok(answer)
    }
}

/// A connection to a node that is asked again and again: one question at a time. The node closes it when nothing
/// is asked for [`PEER_IDLE_MS_MAX`](crate::limits::PEER_IDLE_MS_MAX); whoever keeps one has to expect that.
pub struct PeerLine {
    address: String,
    stream: TcpStream,
    reader: frame::FrameReader,
    /// Questions so far: the last one's number.
    asked: u64,
}

impl PeerLine {
    /// A connection to whoever listens at `address` (HOST:PORT, resolved now), within `limit` and as long again for
    /// the handshake.
    ///
    /// # Errors
    /// Nobody is there, or the node doesn't want to talk to this one.
    pub async fn open(address: &str, hello: HelloConfig, limit: Duration) -> Result<PeerLine, CallError> {
        let mut stream = connect(address, limit).await?;
        let hello = PeerHello {
            protocol: ProtocolRange::OURS,
            cluster_id: hello.cluster_id,
            from_node: hello.node,
            to_node: NodeId(0),
            lane: Lane::Request,
            incarnation: hello.incarnation,
        };
        let dialled = timeout(Timings::default().connect, handshake::dial(&mut stream, &hello)).await;
        let dialled = dialled.unwrap_or(Err(TransportError::Timeout("the handshake")));
        let (_, mut reader) = dialled.map_err(|error| failed(address, error))?;
        reader.set_max(FRAME_BYTES_MAX);
        Ok(PeerLine { address: address.to_owned(), stream, reader, asked: 0 })
    }

    /// Where it leads.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Asks, and waits for the answer for `limit`. An answer that came after that would be taken for the next one's, so
    /// the connection ends with any error.
    ///
    /// # Errors
    /// There is no answer; the request may have been carried out.
    pub async fn ask(
        mut self,
        request: PeerRequest,
        limit: Duration,
    ) -> Result<(PeerLine, PeerResponse), CallError> {
        match timeout(limit, self.exchange(request)).await {
            Ok(Ok(response)) => Ok((self, response)),
            Ok(Err(error)) => Err(failed(&self.address, error)),
            Err(_) => Err(CallError::Timeout { address: self.address, timeout: limit }),
        }
    }

    async fn exchange(&mut self, request: PeerRequest) -> Result<PeerResponse, TransportError> {
        self.asked += 1;
        let mut out = Vec::new();
        frame::append(&mut out, |out| encode(&PeerFrame::Request(self.asked, request), out))?;
        write(&mut self.stream, &out, Timings::default().idle).await?;
        match decode(self.reader.read(&mut self.stream).await?)? {
            PeerFrame::Response(id, response) if id == self.asked => Ok(response),
            _ => Err(TransportError::Protocol("something else than the answer came back".into())),
        }
    }
}

fn failed(address: &str, error: TransportError) -> CallError {
    match error {
        TransportError::Refused(reason) => CallError::Refused { address: address.to_owned(), reason },
        source => CallError::Failed { address: address.to_owned(), source },
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
