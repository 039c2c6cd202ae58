//! What an RPC connection was given to send and hasn't sent yet, and what follows from it.
//!
//! The RPC library takes calls in and puts answers out whether or not anybody reads them, into a queue
//! without a bound. So the bytes are counted here: up when a message is put out, down when the socket
//! has taken them. While more than a bound is unsent no further call is read from the connection; the
//! services ask too, before they add an answer to a call that came in before; and whoever serves the
//! connection ends it when nothing at all gets through for a while.
//!
//! ```text
//!   socket ──► calls ─────────► services ──► answers ──► writer ──► socket
//!        waits above the bound     asks      up ↘              ↙ down
//!                                              [`Backlog`]
//! ```

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, Instant};

use capnp::capability::Promise;
use capnp::message::{Builder, HeapAllocator};
use capnp_rpc::rpc_twoparty_capnp::Side;
use capnp_rpc::{Connection, FlowController, IncomingMessage, OutgoingMessage, VatNetwork};
use tokio::io::AsyncWrite;

/// See the module page. One per connection, shared by all that is on its thread.
pub struct Backlog {
    bound: usize,
    /// Bytes put out since the connection began.
    put: Cell<u64>,
    /// Of these, sent.
    sent: Cell<u64>,
    /// Who waits to read the next call.
    reader: RefCell<Option<Waker>>,
}

impl Backlog {
    /// Of a new connection; above `bound` bytes unsent, no call is read from it.
    pub fn new(bound: usize) -> Rc<Backlog> {
        Rc::new(Backlog { bound, put: Cell::default(), sent: Cell::default(), reader: RefCell::default() })
    }

    /// Bytes not sent yet.
    pub fn unsent(&self) -> usize {
        usize::try_from(self.put.get().saturating_sub(self.sent.get())).unwrap_or(usize::MAX)
    }

    /// Whether it is over its bound.
    pub fn full(&self) -> bool {
        self.unsent() > self.bound
    }

    /// Counts what passes on its way to the socket.
    pub fn meter<W>(self: &Rc<Backlog>, inner: W) -> Metered<W> {
        Metered { inner, backlog: self.clone() }
    }

    /// Waits until something is unsent and nothing has got through for `limit`, or a little longer.
    pub async fn stuck(&self, limit: Duration) {
        let (mut sent, mut since) = (self.sent.get(), Instant::now());
        loop {
            tokio::time::sleep(limit / 4).await;
            if self.unsent() == 0 || self.sent.get() != sent {
                (sent, since) = (self.sent.get(), Instant::now());
            } else if since.elapsed() >= limit {
                return;
            }
        }
    }

    fn add(&self, bytes: usize) {
        self.put.set(self.put.get() + bytes as u64);
    }

    fn remove(&self, bytes: usize) {
        self.sent.set(self.sent.get() + bytes as u64);
        if !self.full()
            && let Some(reader) = self.reader.take()
        {
            reader.wake();
        }
    }

    async fn within_bound(&self) {
        poll_fn(|cx| {
            if !self.full() {
                return Poll::Ready(());
            }
            self.reader.replace(Some(cx.waker().clone()));
            Poll::Pending
        })
        .await;
    }
}

/// A part of a connection, counted. Around a socket's writing half: what it takes. Around a
/// [`VatNetwork`]: what it is given to send, and no reading above the bound.
pub struct Metered<T> {
    inner: T,
    backlog: Rc<Backlog>,
}

impl<W: AsyncWrite + Unpin> AsyncWrite for Metered<W> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.inner).poll_write(cx, bytes))?;
        self.backlog.remove(written);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

impl<N: VatNetwork<Side>> VatNetwork<Side> for Metered<N> {
    fn connect(&mut self, to: Side) -> Option<Box<dyn Connection<Side>>> {
        let inner = self.inner.connect(to)?;
        Some(Box::new(Metered { inner, backlog: self.backlog.clone() }))
    }

    fn accept(&mut self) -> Promise<Box<dyn Connection<Side>>, capnp::Error> {
        let (accepted, backlog) = (self.inner.accept(), self.backlog.clone());
        Promise::from_future(async move {
            let inner = accepted.await?;
            Ok(Box::new(Metered { inner, backlog }) as Box<dyn Connection<Side>>)
        })
    }

    fn drive_until_shutdown(&mut self) -> Promise<(), capnp::Error> {
        self.inner.drive_until_shutdown()
    }
}

impl Connection<Side> for Metered<Box<dyn Connection<Side>>> {
    fn get_peer_vat_id(&self) -> Side {
        self.inner.get_peer_vat_id()
    }

    fn new_outgoing_message(&mut self, first_segment_words: u32) -> Box<dyn OutgoingMessage> {
        let inner = self.inner.new_outgoing_message(first_segment_words);
        Box::new(Metered { inner, backlog: self.backlog.clone() })
    }

    fn receive_incoming_message(&mut self) -> Promise<Option<Box<dyn IncomingMessage>>, capnp::Error> {
        let (next, backlog) = (self.inner.receive_incoming_message(), self.backlog.clone());
        Promise::from_future(async move {
            backlog.within_bound().await;
            next.await
        })
    }

    fn new_stream(&mut self) -> (Box<dyn FlowController>, Promise<(), capnp::Error>) {
        self.inner.new_stream()
    }

    fn shutdown(&mut self, result: capnp::Result<()>) -> Promise<(), capnp::Error> {
        self.inner.shutdown(result)
    }
}

impl OutgoingMessage for Metered<Box<dyn OutgoingMessage>> {
    fn get_body(&mut self) -> capnp::Result<capnp::any_pointer::Builder<'_>> {
        self.inner.get_body()
    }

    fn get_body_as_reader(&self) -> capnp::Result<capnp::any_pointer::Reader<'_>> {
        self.inner.get_body_as_reader()
    }

    fn send(self: Box<Self>) -> (Promise<(), capnp::Error>, Rc<Builder<HeapAllocator>>) {
        let (sent, message) = self.inner.send();
        // Its frame included, exactly what the socket will take.
        self.backlog.add(8 * capnp::serialize::compute_serialized_size_in_words(&message));
        (sent, message)
    }

    fn take(self: Box<Self>) -> Builder<HeapAllocator> {
        self.inner.take()
    }

    fn size_in_words(&self) -> usize {
        self.inner.size_in_words()
    }
}

/// Counts what `network` is given to send.
pub fn metered<N: VatNetwork<Side>>(network: N, backlog: Rc<Backlog>) -> Metered<N> {
    Metered { inner: network, backlog }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::coalesce::coalesce;
    use capnp::message::ReaderOptions;
    use capnp_rpc::twoparty;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
    use tokio::task::{LocalSet, spawn_local};
    use tokio::time::{sleep, timeout};
    use tokio_util::compat::TokioAsyncReadCompatExt;

    const SHORT: Duration = Duration::from_millis(20);

    #[tokio::test]
    async fn what_isnt_read_is_counted_and_no_more_is_taken_in() {
        LocalSet::new()
            .run_until(async {
                let (near, mut far) = duplex(64);
                let (reader, writer) = tokio::io::split(near);
                let backlog = Backlog::new(500);
                let (writer, flusher) = coalesce(backlog.meter(writer), 1024);
                spawn_local(flusher);
                let network =
                    twoparty::VatNetwork::new(reader.compat(), writer, Side::Server, ReaderOptions::new());
                let mut network = metered(network, backlog.clone());
                spawn_local(network.drive_until_shutdown());
                let mut connection = network.accept().await.expect("a connection");

                let mut put = 0;
                for bytes in [100, 600] {
                    let mut message = connection.new_outgoing_message(0);
                    let body = message.get_body().expect("a body");
                    body.initn_as::<capnp::data::Builder<'_>>(bytes).fill(7);
                    // It leaves whether or not it is waited for.
                    drop(message.send());
                    put += bytes as usize;
                }
                assert!((put..put + 128).contains(&backlog.unsent()), "{} unsent", backlog.unsent());
                let all = backlog.unsent();

                // A call is there, and isn't read.
                let mut call = Builder::new_default();
                call.initn_root::<capnp::data::Builder<'_>>(1);
                let call = capnp::serialize::write_message_to_words(&call);
                far.write_all(&call).await.expect("room for a call");
                let next = connection.receive_incoming_message();
                tokio::pin!(next);
                assert!(timeout(SHORT, &mut next).await.is_err(), "the answers before aren't read");
                assert!(backlog.full());

                let mut got = vec![0; all];
                far.read_exact(&mut got).await.expect("the answers");
                assert!(timeout(Duration::from_secs(5), next).await.expect("read now").is_ok());
                assert_eq!((backlog.unsent(), backlog.full()), (0, false));
            })
            .await;
    }

    #[tokio::test]
    async fn it_is_stuck_only_while_nothing_at_all_gets_through() {
        let backlog = Backlog::new(10);
        assert!(timeout(5 * SHORT, backlog.stuck(SHORT)).await.is_err(), "nothing to send");
        backlog.add(1000);
        let moved = Cell::new(Instant::now());
        let slowly = async {
            for _ in 0..20 {
                sleep(2 * SHORT).await;
                backlog.remove(1);
                moved.set(Instant::now());
            }
        };
        // Half as long as it takes; and a busy machine has a good while to come to each.
        let limit = 20 * SHORT;
        tokio::select! {
            // On a machine that stood still for so long it is.
            () = backlog.stuck(limit) => {
                assert!(moved.get().elapsed() >= limit, "it gets through, if slowly");
                return;
            }
            () = slowly => (),
        }
        timeout(Duration::from_secs(5), backlog.stuck(limit)).await.expect("stuck");
    }
}
