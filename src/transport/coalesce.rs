//! An [`AsyncWrite`] that gathers messages: writing appends to a buffer, flushing is free, and a
//! *flusher* writes the buffer out.
//!
//! The RPC library writes a message in pieces and flushes after each, and a small TCP write costs more
//! than all the rest of a call. Here the flusher runs when the task that writes has nothing more to
//! write for now; what was flushed meanwhile leaves in one write. When the last write held more than
//! one message, more are likely on their way (answers that other tasks of this thread are about to
//! give), so the flusher lets these run once before it writes. A lone caller never waits for that.
//!
//! ```text
//!   writer ──append──► buffer ──swap──► flusher ──write──► socket
//!      ▲ waits while the buffer is full     │
//!      └────────────── wake, error ◄────────┘
//! ```
//!
//! Memory is bounded by two buffers of the cap. The two halves share one thread.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use tokio::io::AsyncWriteExt;

/// Capacity that the spare buffer may keep between writes.
const SPARE_BYTES_MAX: usize = 256 * 1024;

/// The writing half; see the module page. Dropping it closes the stream once all is written.
#[derive(Debug)]
pub struct CoalescingWriter {
    shared: Rc<RefCell<Shared>>,
}

#[derive(Debug)]
struct Shared {
    /// Written by the writer, swapped out by the flusher.
    buffer: Vec<u8>,
    cap: usize,
    /// Messages in `buffer`, as counted by flushes.
    messages: usize,
    /// No more will be appended.
    closing: bool,
    /// The flusher has ended; with this error, or well.
    ended: Option<Result<(), (io::ErrorKind, String)>>,
    writer: Option<Waker>,
    flusher: Option<Waker>,
}

impl Shared {
    fn wake_flusher(&mut self) {
        if let Some(waker) = self.flusher.take() {
            waker.wake();
        }
    }

    fn wake_writer(&mut self) {
        if let Some(waker) = self.writer.take() {
            waker.wake();
        }
    }

    /// The error that ended the flusher; an end without one is an error to who still writes.
    fn error(&self) -> Option<io::Error> {
        match self.ended.as_ref()? {
            Ok(()) => Some(io::ErrorKind::BrokenPipe.into()),
            Err((kind, text)) => Some(io::Error::new(*kind, text.clone())),
        }
    }

    fn wait(&mut self, cx: &Context<'_>) {
        self.writer = Some(cx.waker().clone());
    }
}

/// Puts a gathering writer before `inner`, with a buffer of at most `cap` bytes. The future is the
/// flusher: the caller spawns it on the same thread. It ends with an error when writing fails, and
/// well when the writer was closed or dropped, everything is written, and `inner` is shut down.
pub fn coalesce<W: tokio::io::AsyncWrite + Unpin + 'static>(
    inner: W,
    cap: usize,
) -> (CoalescingWriter, impl Future<Output = io::Result<()>> + 'static) {
    let shared = Rc::new(RefCell::new(Shared {
        buffer: Vec::new(),
        cap: cap.max(1),
        messages: 0,
        closing: false,
        ended: None,
        writer: None,
        flusher: None,
    }));
    let writer = CoalescingWriter { shared: shared.clone() };
    // Made here, not in the future: one that is dropped before its first poll must tell the writer too.
    let end = End { shared };
    let flusher = async move {
        let result = flush(inner, &end.shared).await;
        let outcome = result.as_ref().map_err(|e| (e.kind(), e.to_string()));
        end.shared.borrow_mut().ended = Some(outcome.copied());
        result
    };
    (writer, flusher)
}

/// Tells the writer when the flusher is gone, also when its task was dropped.
struct End {
    shared: Rc<RefCell<Shared>>,
}

impl Drop for End {
    fn drop(&mut self) {
        let mut shared = self.shared.borrow_mut();
        if shared.ended.is_none() {
            let text = "the task that writes this connection was stopped".to_owned();
            shared.ended = Some(Err((io::ErrorKind::BrokenPipe, text)));
        }
        shared.buffer = Vec::new();
        shared.wake_writer();
    }
}

async fn flush<W: tokio::io::AsyncWrite + Unpin>(mut inner: W, shared: &RefCell<Shared>) -> io::Result<()> {
    let mut spare = Vec::new();
    let mut expect_more = false;
    while wait_for_bytes(shared).await {
        if expect_more && !is_full(shared) {
            tokio::task::yield_now().await;
        }
        {
            let mut shared = shared.borrow_mut();
            std::mem::swap(&mut shared.buffer, &mut spare);
            expect_more = std::mem::take(&mut shared.messages) > 1;
            shared.wake_writer();
        }
        inner.write_all(&spare).await?;
        spare.clear();
        if spare.capacity() > SPARE_BYTES_MAX {
            spare = Vec::new();
        }
    }
    inner.shutdown().await
}

fn is_full(shared: &RefCell<Shared>) -> bool {
    let shared = shared.borrow();
    shared.buffer.len() >= shared.cap
}

/// Waits until there is a whole message, a full buffer, or the writer closes. False at the very end.
async fn wait_for_bytes(shared: &RefCell<Shared>) -> bool {
    poll_fn(|cx| {
        let mut shared = shared.borrow_mut();
        if shared.messages > 0 || shared.buffer.len() >= shared.cap || shared.closing {
            return Poll::Ready(!shared.buffer.is_empty());
        }
        shared.flusher = Some(cx.waker().clone());
        Poll::Pending
    })
    .await
}

impl futures_util::io::AsyncWrite for CoalescingWriter {
    /// Takes what there is room for; waits while there is none.
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let mut shared = self.shared.borrow_mut();
        if let Some(error) = shared.error() {
            return Poll::Ready(Err(error));
        }
        if shared.closing {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let room = shared.cap.saturating_sub(shared.buffer.len());
        if room == 0 && !bytes.is_empty() {
            shared.wait(cx);
            shared.wake_flusher();
            return Poll::Pending;
        }
        let taken = room.min(bytes.len());
        shared.buffer.extend_from_slice(&bytes[..taken]);
        Poll::Ready(Ok(taken))
    }

    /// Marks the end of a message; doesn't wait for it to leave.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut shared = self.shared.borrow_mut();
        if let Some(error) = shared.error() {
            return Poll::Ready(Err(error));
        }
        if !shared.buffer.is_empty() {
            shared.messages += 1;
            shared.wake_flusher();
        }
        Poll::Ready(Ok(()))
    }

    /// Waits until everything is written and the stream is shut down.
    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut shared = self.shared.borrow_mut();
        match &shared.ended {
            Some(Ok(())) => return Poll::Ready(Ok(())),
            Some(Err((kind, text))) => {
                return Poll::Ready(Err(io::Error::new(*kind, text.clone())));
            }
            None => {}
        }
        shared.closing = true;
        shared.wait(cx);
        shared.wake_flusher();
        Poll::Pending
    }
}

impl Drop for CoalescingWriter {
    fn drop(&mut self) {
        let mut shared = self.shared.borrow_mut();
        shared.closing = true;
        shared.wake_flusher();
    }
}
