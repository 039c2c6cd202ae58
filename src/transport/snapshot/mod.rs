//! The lane of snapshots: one connection brings one snapshot file to one follower's node.
//!
//! ```text
//!   leader's node                                     follower's node
//!   offer: which file, for whom, how long ─────────►
//!       ◄───────────────── resume at N  (or: not needed, busy, refused)
//!   chunk at N, chunk, … end ──────────────────────►   into a partial file
//!       ◄───────────────── working …                   checks, loads, installs
//!       ◄───────────────── installed  (or: not needed, failed)
//! ```
//!
//! [`sender`] is one attempt of the left side, [`receiver`] the right side; [`throttle`] spreads the
//! bytes of all transfers of a node over time. What was received before a connection ended is kept
//! by the receiving node, which tells in its answer where to go on; so an attempt that fails costs
//! what was under way, and the next one is made with the same file. Whether the bytes are the right
//! ones is seen from the file itself, once all of them are there: frames have checksums, files have
//! their own.
//!
//! Not here: when a snapshot is made, for whom, how often it is tried (`node`), and what is in it
//! (`storage`).

pub mod receiver;
pub mod sender;
pub mod throttle;

use tokio::io::{AsyncRead, AsyncWriteExt};
use tokio::time::timeout;

use super::frame::{self, FrameReader};
use super::link::write;
use super::{Timings, TransportError};
use crate::codec::peer::{PeerFrame, decode, encode};
use crate::codec::snapshot::SnapshotFrame;

/// The next step that the other side sends, within the time that a silent connection has.
async fn next(
    reader: &mut FrameReader,
    input: &mut (impl AsyncRead + Unpin),
    timings: &Timings,
) -> Result<(SnapshotFrame, usize), TransportError> {
    let payload = timeout(timings.idle, reader.read(input))
        .await
        .map_err(|_| TransportError::Timeout("the next step of a snapshot"))??;
    let bytes = frame::HEADER_BYTES + payload.len();
    match decode(payload)? {
        PeerFrame::Snapshot(step) => Ok((step, bytes)),
        _ => Err(TransportError::Protocol("another frame than a snapshot's on lane snapshot".into())),
    }
}

/// Sends a step; returns the bytes it took.
async fn say(
    output: &mut (impl AsyncWriteExt + Unpin),
    step: SnapshotFrame,
    timings: &Timings,
) -> Result<usize, TransportError> {
    let mut bytes = Vec::new();
    frame::append(&mut bytes, |out| encode(&PeerFrame::Snapshot(step), out))?;
    write(output, &bytes, timings.idle).await?;
    Ok(bytes.len())
}
