//! The receiving side of a transfer, from the accepted connection to a [`SnapshotSink`].

use bytes::Bytes;
use futures_util::future::LocalBoxFuture;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};
use tracing::debug;

use super::{next, say};
use crate::codec::hello::{Lane, PeerHello};
use crate::codec::snapshot::{SnapshotAnswer, SnapshotFrame, SnapshotOffer};
use crate::limits::SNAPSHOT_FRAME_BYTES_MAX;
use crate::transport::frame::FrameReader;
use crate::transport::listener::{PeerHandler, received};
use crate::transport::{Timings, TransportError};

/// Where the bytes of one snapshot go. Dropped before [`SnapshotSink::finish`]: the connection was
/// lost, and what came is worth keeping for the next one.
pub trait SnapshotSink {
    /// Bytes that are there already: those of earlier connections.
    fn offset(&self) -> u64;

    /// Appends the next bytes. An error is the answer to give; the transfer then ends.
    fn write(&mut self, data: Bytes) -> LocalBoxFuture<'_, Result<(), SnapshotAnswer>>;

    /// All bytes are there: checks, loads and installs them. What comes of it is the answer. Goes on
    /// by itself if it is dropped.
    fn finish(self: Box<Self>) -> LocalBoxFuture<'static, SnapshotAnswer>;
}

/// One connection of the lane.
pub(in crate::transport) async fn receive(
    mut stream: TcpStream,
    mut reader: FrameReader,
    hello: &PeerHello,
    handler: &dyn PeerHandler,
    timings: &Timings,
) -> Result<(), TransportError> {
    reader.set_max(SNAPSHOT_FRAME_BYTES_MAX);
    let SnapshotFrame::Offer(offer) = take(&mut reader, &mut stream, timings).await? else {
        return Err(TransportError::Protocol("a snapshot without an offer".into()));
    };
    let (judged, listening) =
        while_working(handler.snapshot(hello.from_node, offer), &mut stream, timings).await;
    if !listening {
        return Err(TransportError::Closed);
    }
    let mut sink = match judged {
        Ok(sink) => sink,
        Err(answer) => return part(stream, answer, timings).await,
    };
    let start = SnapshotFrame::Answer(SnapshotAnswer::ResumeAt(sink.offset()));
    say(&mut stream, start, timings).await?;
    if let Err(answer) = take_chunks(&mut reader, &mut stream, &offer, &mut *sink, timings).await? {
        return part(stream, answer, timings).await;
    }
    let (answer, listening) = while_working(sink.finish(), &mut stream, timings).await;
    match listening {
        true => part(stream, answer, timings).await,
        false => Ok(()),
    }
}

/// Waits for `work` and tells the other side now and then that it goes on; whether that still listens.
/// If it doesn't, it will ask again, and the work is done for its own sake.
async fn while_working<T>(
    mut work: LocalBoxFuture<'static, T>,
    stream: &mut TcpStream,
    timings: &Timings,
) -> (T, bool) {
    let mut listening = true;
    loop {
        tokio::select! {
            done = &mut work => return (done, listening),
            () = sleep(timings.keepalive), if listening => {
                let working = SnapshotFrame::Answer(SnapshotAnswer::Working);
                if let Err(error) = say(stream, working, timings).await {
                    debug!(%error, "the sender of a snapshot is gone");
                    listening = false;
                }
            }
        }
    }
}

async fn take(
    reader: &mut FrameReader,
    stream: &mut TcpStream,
    timings: &Timings,
) -> Result<SnapshotFrame, TransportError> {
    let (step, bytes) = next(reader, stream, timings).await?;
    received(Lane::Snapshot, bytes);
    Ok(step)
}

/// Takes all chunks, up to the end; inside, the answer that ends the transfer before.
async fn take_chunks(
    reader: &mut FrameReader,
    stream: &mut TcpStream,
    offer: &SnapshotOffer,
    sink: &mut dyn SnapshotSink,
    timings: &Timings,
) -> Result<Result<(), SnapshotAnswer>, TransportError> {
    let mut at = sink.offset();
    loop {
        match take(reader, stream, timings).await? {
            SnapshotFrame::Chunk { offset, data } => {
                let bytes = data.len() as u64;
                if offset != at || bytes > offer.bytes - at {
                    return Err(TransportError::Protocol(format!(
                        "{bytes} bytes at {offset} of a snapshot of {} bytes, of which {at} are here",
                        offer.bytes
                    )));
                }
                if let Err(answer) = sink.write(data).await {
                    return Ok(Err(answer));
                }
                at += bytes;
            }
            SnapshotFrame::End if at == offer.bytes => return Ok(Ok(())),
            SnapshotFrame::End => {
                return Err(TransportError::Protocol(format!(
                    "a snapshot of {} bytes ends after {at}",
                    offer.bytes
                )));
            }
            SnapshotFrame::Offer(_) | SnapshotFrame::Answer(_) => {
                return Err(TransportError::Protocol("an offer or answer among a snapshot's bytes".into()));
            }
        }
    }
}

/// Answers for the last time. What the other side sent meanwhile must be read before the socket is
/// closed, or the kernel resets the connection and takes the answer with it.
async fn part(
    mut stream: TcpStream,
    answer: SnapshotAnswer,
    timings: &Timings,
) -> Result<(), TransportError> {
    say(&mut stream, SnapshotFrame::Answer(answer), timings).await?;
    stream.shutdown().await?;
    let mut ignored = vec![0; 64 * 1024];
    let drain = async {
        while stream.read(&mut ignored).await? > 0 {}
        Ok::<_, std::io::Error>(())
    };
    match timeout(timings.connect, drain).await {
        Ok(result) => Ok(result?),
        Err(_) => Ok(()),
    }
}
