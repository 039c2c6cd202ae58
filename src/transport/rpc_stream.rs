//! A TCP stream as `capnp_rpc::twoparty::VatNetwork` wants it: `futures` traits, buffered reads,
//! gathered writes, no Nagle.

use std::io;
use std::rc::Rc;

use capnp::message::ReaderOptions;
use capnp_rpc::rpc_twoparty_capnp::Side;
use capnp_rpc::twoparty::VatNetwork;
use futures_util::io::BufReader;
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedReadHalf;
use tokio_util::compat::{Compat, TokioAsyncReadCompatExt};

use super::backlog::{Backlog, Metered, metered};
use super::coalesce::{CoalescingWriter, coalesce};
use crate::limits::{COALESCE_BYTES_MAX, NESTING_MAX, READ_CHUNK_BYTES, TRAVERSAL_BYTES_MAX};

/// The reading side of an RPC connection. The library reads each message in two steps; the buffer
/// makes that one system call for all messages that are there.
pub type RpcReader = BufReader<Compat<OwnedReadHalf>>;

/// What an RPC connection on which calls are served runs on.
pub type ServedNetwork = Metered<VatNetwork<RpcReader>>;

/// Limits for messages from an RPC connection.
pub fn reader_options() -> ReaderOptions {
    ReaderOptions { traversal_limit_in_words: Some(TRAVERSAL_BYTES_MAX / 8), nesting_limit: NESTING_MAX }
}

/// Splits a stream for RPC. The future writes what the writer gathered: spawn it on the same thread.
/// It ends once the writer is dropped or closed and everything is written, and then closes the
/// sending direction; or when writing fails, with the error, which the writer gives too.
pub fn rpc_streams(
    stream: TcpStream,
) -> io::Result<(RpcReader, CoalescingWriter, impl Future<Output = io::Result<()>> + 'static)> {
    stream.set_nodelay(true)?;
    let (reader, writer) = stream.into_split();
    let (writer, flusher) = coalesce(writer, COALESCE_BYTES_MAX);
    let reader = BufReader::with_capacity(READ_CHUNK_BYTES, reader.compat());
    Ok((reader, writer, flusher))
}

/// A stream on which calls are served, with the count of what isn't sent on it yet, bounded by
/// `unsent_max` as [`super::backlog`] tells. The future as of [`rpc_streams`].
pub fn rpc_server(
    stream: TcpStream,
    unsent_max: usize,
) -> io::Result<(ServedNetwork, Rc<Backlog>, impl Future<Output = io::Result<()>> + 'static)> {
    stream.set_nodelay(true)?;
    let (reader, writer) = stream.into_split();
    let backlog = Backlog::new(unsent_max);
    let (writer, flusher) = coalesce(backlog.meter(writer), COALESCE_BYTES_MAX);
    let reader = BufReader::with_capacity(READ_CHUNK_BYTES, reader.compat());
    let network = VatNetwork::new(reader, writer, Side::Server, reader_options());
    Ok((metered(network, backlog.clone()), backlog, flusher))
}
