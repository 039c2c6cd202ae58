//! Cap'n Proto services for clients.
/// STUB
pub async fn serve(_: tokio::net::TcpListener, _: crate::node::handle::NodeHandle, _: impl Future<Output = ()>) {}
