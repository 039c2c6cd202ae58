//! One attempt to bring a snapshot file to another node.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::throttle::Throttle;
use super::{next, say};
use crate::codec::hello::{Lane, PeerHello, ProtocolRange};
use crate::codec::snapshot::{SnapshotAnswer, SnapshotFrame, SnapshotOffer};
use crate::ids::{ClusterId, NodeId};
use crate::limits::{SNAPSHOT_CHUNK_BYTES, SNAPSHOT_FRAME_BYTES_MAX};
use crate::telemetry::hot::hot;
use crate::transport::frame::FrameReader;
use crate::transport::link::open;
use crate::transport::{Timings, TransportError, handshake};

/// Who sends, to whom.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Parties {
    /// The cluster of both.
    pub cluster_id: ClusterId,
    /// The node that sends.
    pub from: NodeId,
    /// Which start of its process this is.
    pub incarnation: u64,
    /// The node that is to receive.
    pub to: NodeId,
}

/// How an attempt ended that reached the other side.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Delivery {
    /// The follower stands at the snapshot, durably.
    Installed,
    /// It has all that is in it.
    NotNeeded,
    /// Not now; to be tried again after this time.
    Busy(Duration),
    /// The node doesn't take it, now or ever.
    Refused(String),
    /// The node got it and can't use it.
    Failed(String),
}

/// Why an attempt ended without an answer.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The file can't be read as it was offered.
    #[error("reading the snapshot: {0}")]
    File(#[source] io::Error),
    /// The connection; another attempt may go on where this one ended.
    #[error(transparent)]
    Link(#[from] TransportError),
}

/// Offers the snapshot in `file` to the node at `address` (HOST:PORT, resolved now), sends what that
/// node doesn't have of it, and waits for its verdict. `resumed` is called if it has a part already.
/// May be dropped at any point.
pub async fn send(
    address: &str,
    parties: &Parties,
    offer: &SnapshotOffer,
    file: &Arc<File>,
    throttle: &Throttle,
    timings: &Timings,
    resumed: impl FnOnce(u64),
) -> Result<Delivery, SendError> {
    let mut stream = open(address, timings).await?;
    let mut reader = greet(&mut stream, parties, timings).await?;
    reader.set_max(SNAPSHOT_FRAME_BYTES_MAX);
    let (mut input, mut output) = stream.split();
    send_step(&mut output, SnapshotFrame::Offer(*offer), timings).await?;
    let at = match verdict(&mut reader, &mut input, timings).await? {
        SnapshotAnswer::ResumeAt(at) if at <= offer.bytes => at,
        SnapshotAnswer::ResumeAt(at) => {
            let reason = format!("it wants to go on at byte {at} of {}", offer.bytes);
            return Err(TransportError::Protocol(reason).into());
        }
        verdict => return delivered(verdict),
    };
    if at > 0 {
        resumed(at);
    }
    // An answer that comes early is a verdict: the rest isn't wanted.
    tokio::select! {
        early = read_early(&mut reader, &mut input, timings) => return delivered(early?),
        sent = send_chunks(&mut output, at, offer.bytes, file, throttle, timings) => sent?,
    }
    delivered(verdict(&mut reader, &mut input, timings).await?)
}

/// Passes the handshake; what the other side sent after its welcome is in the reader.
async fn greet(
    stream: &mut TcpStream,
    parties: &Parties,
    timings: &Timings,
) -> Result<FrameReader, TransportError> {
    let hello = PeerHello {
        protocol: ProtocolRange::OURS,
        cluster_id: Some(parties.cluster_id),
        from_node: parties.from,
        to_node: parties.to,
        lane: Lane::Snapshot,
        incarnation: parties.incarnation,
    };
    let (_, reader) = timeout(timings.connect, handshake::dial(stream, &hello))
        .await
        .map_err(|_| TransportError::Timeout("the handshake"))??;
    Ok(reader)
}

async fn answer(
    reader: &mut FrameReader,
    input: &mut (impl AsyncRead + Unpin),
    timings: &Timings,
) -> Result<SnapshotAnswer, TransportError> {
    match next(reader, input, timings).await?.0 {
        SnapshotFrame::Answer(answer) => Ok(answer),
        _ => Err(out_of_turn("no answer")),
    }
}

/// The next answer that says something: while the other side works, it says so now and then.
async fn verdict(
    reader: &mut FrameReader,
    input: &mut (impl AsyncRead + Unpin),
    timings: &Timings,
) -> Result<SnapshotAnswer, TransportError> {
    loop {
        match answer(reader, input, timings).await? {
            SnapshotAnswer::Working => {}
            verdict => return Ok(verdict),
        }
    }
}

/// As [`answer`], however long it takes: silence is right while chunks flow.
async fn read_early(
    reader: &mut FrameReader,
    input: &mut (impl AsyncRead + Unpin),
    timings: &Timings,
) -> Result<SnapshotAnswer, TransportError> {
    loop {
        match answer(reader, input, timings).await {
            Err(TransportError::Timeout(_)) => {}
            Ok(SnapshotAnswer::Working) => return Err(out_of_turn("working")),
            result => return result,
        }
    }
}

fn delivered(verdict: SnapshotAnswer) -> Result<Delivery, SendError> {
    Ok(match verdict {
        SnapshotAnswer::Installed => Delivery::Installed,
        SnapshotAnswer::NotNeeded => Delivery::NotNeeded,
        SnapshotAnswer::Busy { retry_after_ms } => {
            Delivery::Busy(Duration::from_millis(retry_after_ms.into()))
        }
        SnapshotAnswer::Refused(reason) => Delivery::Refused(reason),
        SnapshotAnswer::Failed(reason) => Delivery::Failed(reason),
        SnapshotAnswer::ResumeAt(_) => return Err(out_of_turn("where to go on").into()),
        SnapshotAnswer::Working => return Err(out_of_turn("working").into()),
    })
}

fn out_of_turn(what: &str) -> TransportError {
    TransportError::Protocol(format!("out of turn on lane snapshot: {what}"))
}

async fn send_chunks(
    output: &mut (impl AsyncWriteExt + Unpin),
    mut at: u64,
    end: u64,
    file: &Arc<File>,
    throttle: &Throttle,
    timings: &Timings,
) -> Result<(), SendError> {
    while at < end {
        let bytes = usize::try_from(end - at).unwrap_or(usize::MAX).min(SNAPSHOT_CHUNK_BYTES);
        throttle.pass(bytes).await;
        let data = read(file.clone(), at, bytes).await.map_err(SendError::File)?;
        send_step(output, SnapshotFrame::Chunk { offset: at, data }, timings).await?;
        at += bytes as u64;
    }
    send_step(output, SnapshotFrame::End, timings).await?;
    Ok(())
}

/// Reads off this thread: the file may have left the system's cache.
async fn read(file: Arc<File>, at: u64, bytes: usize) -> io::Result<Bytes> {
    let read = move || {
        let mut data = vec![0; bytes];
        file.read_exact_at(&mut data, at)?;
        Ok(data.into())
    };
    tokio::task::spawn_blocking(read).await.unwrap_or_else(|error| Err(io::Error::other(error)))
}

async fn send_step(
    output: &mut (impl AsyncWriteExt + Unpin),
    step: SnapshotFrame,
    timings: &Timings,
) -> Result<(), TransportError> {
    let bytes = say(output, step, timings).await?;
    let sent = hot().sent(Lane::Snapshot.name());
    sent.frames.increment(1);
    sent.bytes.increment(bytes as u64);
    Ok(())
}
