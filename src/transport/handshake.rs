//! The first exchange on a peer connection, as the dialler and as the acceptor see it. Generic over
//! the stream; the caller bounds the time it may take.

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::TransportError;
use super::frame::{self, FrameError, FrameReader, PREAMBLE_BYTES, check_preamble, preamble};
use crate::codec::hello::{HelloRefusal, PeerHello, PeerWelcome, ProtocolRange};
use crate::ids::NodeId;
use crate::limits::HELLO_FRAME_BYTES_MAX;

/// Who answers a hello.
#[derive(Default, Clone, Copy, PartialEq, Eq, Debug)]
pub struct Identity {
    /// The node; 0 while it isn't a member.
    pub node: NodeId,
    /// Which start of its process this is.
    pub incarnation: u64,
}

/// Preamble and a sealed first frame, as one write.
pub(super) fn opening(payload: &[u8]) -> Result<Vec<u8>, FrameError> {
    let mut bytes = preamble().to_vec();
    bytes.extend(frame::sealed(payload)?);
    Ok(bytes)
}

/// The dialler's side: says hello and waits to be welcome. What the other side sent after its welcome
/// is in the reader that is returned.
pub async fn dial<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    hello: &PeerHello,
) -> Result<(PeerWelcome, FrameReader), TransportError> {
    stream.write_all(&opening(&hello.encode()?)?).await?;
    let mut start = [0; PREAMBLE_BYTES];
    read_start(stream, &mut start).await?;
    check_preamble(&start)?;
    let mut reader = FrameReader::new(HELLO_FRAME_BYTES_MAX);
    let welcome = PeerWelcome::decode(reader.read(stream).await?)?;
    match &welcome.outcome {
        Err(reason) => return Err(TransportError::Refused(reason.clone())),
        Ok(version) if !(hello.protocol.min..=hello.protocol.max).contains(version) => {
            return Err(TransportError::Protocol(format!(
                "it chose protocol version {version}, which was not offered"
            )));
        }
        Ok(_) => {}
    }
    if hello.to_node.0 != 0 && welcome.node != hello.to_node {
        return Err(TransportError::Protocol(format!(
            "node {} answered in place of node {}",
            welcome.node, hello.to_node
        )));
    }
    Ok((welcome, reader))
}

async fn read_start<S: AsyncRead + Unpin>(
    stream: &mut S,
    start: &mut [u8; PREAMBLE_BYTES],
) -> Result<(), TransportError> {
    match stream.read_exact(start).await {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Err(TransportError::Closed),
        Err(error) => Err(error.into()),
    }
}

/// The acceptor's side, first half: the dialler's preamble. `Foreign` if it is another protocol's.
pub async fn accept_preamble<S: AsyncRead + Unpin>(stream: &mut S) -> Result<(), TransportError> {
    let mut start = [0; PREAMBLE_BYTES];
    read_start(stream, &mut start).await?;
    Ok(check_preamble(&start)?)
}

/// The acceptor's side, second half: the dialler's hello, judged by `judge`, and the answer. A refusal
/// is sent to the dialler and returned.
pub async fn accept_hello<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    judge: impl FnOnce(&PeerHello) -> Result<Identity, HelloRefusal>,
) -> Result<(PeerHello, FrameReader), TransportError> {
    let mut reader = FrameReader::new(HELLO_FRAME_BYTES_MAX);
    let payload: Bytes = reader.read(stream).await?;
    let hello = PeerHello::decode(payload)?;
    let judgement = judge(&hello);
    let identity = judgement.as_ref().map_or_else(|_| Identity::default(), |identity| *identity);
    let ours = ProtocolRange::OURS;
    let outcome = judgement.and_then(|_| {
        ours.common(hello.protocol).ok_or_else(|| {
            HelloRefusal::from(format!(
                "this node speaks peer protocol versions {} to {}, the caller {} to {}; upgrade the older node first",
                ours.min, ours.max, hello.protocol.min, hello.protocol.max
            ))
        })
    });
    let welcome = PeerWelcome { outcome, node: identity.node, incarnation: identity.incarnation };
    stream.write_all(&opening(&welcome.encode()?)?).await?;
    match welcome.outcome {
        Ok(_) => Ok((hello, reader)),
        Err(reason) => Err(TransportError::Refused(reason)),
    }
}
