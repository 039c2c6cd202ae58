//! A TCP stream as `capnp_rpc::twoparty::VatNetwork` wants it: `futures` traits, buffered reads,
//! gathered writes, no Nagle.

use std::io;
use std::rc::Rc;
use std::time::Duration;

use capnp::message::ReaderOptions;
use capnp_rpc::rpc_twoparty_capnp::Side;
use capnp_rpc::twoparty::VatNetwork;
use futures_util::io::BufReader;
use rustix::net::sockopt;
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedReadHalf;
use tokio_util::compat::{Compat, TokioAsyncReadCompatExt};

use super::arrival::{Arrivals, Paced};
use super::backlog::{Backlog, Metered, metered};
use super::coalesce::{CoalescingWriter, coalesce};
use crate::limits::{
    CLIENT_PROBE_AGAIN_S, CLIENT_PROBE_S, CLIENT_PROBES_MAX, CLIENT_UNACKED_MS_MAX, COALESCE_BYTES_MAX,
    NESTING_MAX, READ_CHUNK_BYTES, TRAVERSAL_BYTES_MAX,
};

/// The reading side of an RPC connection. The library reads each message in two steps; the buffer
/// makes that one system call for all messages that are there.
pub type RpcReader = BufReader<Compat<OwnedReadHalf>>;

/// What an RPC connection on which calls are served runs on.
pub type ServedNetwork = Metered<VatNetwork<Paced<RpcReader>>>;

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

/// Has the kernel ask whether the other side is still there when it is silent for long, and give up
/// what the other side doesn't acknowledge. A client whose machine or network went away says nothing of
/// it, and would hold its connection for ever.
fn probe_when_idle(stream: &TcpStream) -> io::Result<()> {
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, Duration::from_secs(CLIENT_PROBE_S))?;
    sockopt::set_tcp_keepintvl(stream, Duration::from_secs(CLIENT_PROBE_AGAIN_S))?;
    sockopt::set_tcp_keepcnt(stream, CLIENT_PROBES_MAX)?;
    // Elsewhere the system's own patience has to do.
    #[cfg(any(target_os = "linux", target_os = "android"))]
    sockopt::set_tcp_user_timeout(stream, CLIENT_UNACKED_MS_MAX)?;
    Ok(())
}

/// A stream on which calls are served: great messages wait for room among `arrivals`; with the count of
/// what isn't sent on it yet, bounded by `unsent_max` as [`super::backlog`] tells. The future as of
/// [`rpc_streams`].
pub fn rpc_server(
    stream: TcpStream,
    arrivals: &Rc<Arrivals>,
    unsent_max: usize,
) -> io::Result<(ServedNetwork, Rc<Backlog>, impl Future<Output = io::Result<()>> + 'static)> {
    stream.set_nodelay(true)?;
    probe_when_idle(&stream)?;
    let (reader, writer) = stream.into_split();
    let backlog = Backlog::new(unsent_max);
    let (writer, flusher) = coalesce(backlog.meter(writer), COALESCE_BYTES_MAX);
    let reader = BufReader::with_capacity(READ_CHUNK_BYTES, reader.compat());
    let reader = arrivals.pace(reader);
    let network = VatNetwork::new(reader, writer, Side::Server, reader_options());
    Ok((metered(network, backlog.clone()), backlog, flusher))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_silent_client_is_probed() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        let same = stream.into_std().unwrap();
        let (_network, _backlog, _flusher) = rpc_server(
            TcpStream::from_std(same.try_clone().unwrap()).unwrap(),
            &Arrivals::new(0, 0, Duration::from_secs(1)),
            1,
        )
        .unwrap();
        assert!(sockopt::socket_keepalive(&same).unwrap());
        assert_eq!(sockopt::tcp_keepidle(&same).unwrap(), Duration::from_secs(CLIENT_PROBE_S));
        assert_eq!(sockopt::tcp_keepcnt(&same).unwrap(), CLIENT_PROBES_MAX);
        #[cfg(any(target_os = "linux", target_os = "android"))]
        assert_eq!(sockopt::tcp_user_timeout(&same).unwrap(), CLIENT_UNACKED_MS_MAX);
    }
}
