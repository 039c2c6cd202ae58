//! What those hear who dial the wrong port: a client of the RPC protocol on the peer port, a node on
//! the client port. Each is answered in its own protocol, so that a person reads the reason.

use capnp_rpc::rpc_capnp::{exception, message};

use super::handshake::opening;
use crate::codec::CodecError;
use crate::codec::hello::PeerWelcome;
use crate::ids::NodeId;

/// How the answer to an RPC client on the peer port begins.
const PEER_PORT: &str = "this is the peer port of a Pontoon node";

/// For an RPC client on the peer port: a whole RPC message that ends the connection.
pub fn abort_for_client(client_address: &str) -> Result<Vec<u8>, CodecError> {
    let mut message = capnp::message::Builder::new_default();
    let mut abort = message.init_root::<message::Builder<'_>>().init_abort();
    abort.set_type(exception::Type::Failed);
    abort.set_reason(format!("{PEER_PORT}; clients use {client_address}").as_str());
    Ok(capnp::serialize::write_message_to_words(&message))
}

/// Whether an RPC connection failed for [`abort_for_client`]. The message has no field of ours for it, so
/// the text tells.
pub fn is_abort_for_client(error: &capnp::Error) -> bool {
    error.extra.contains(PEER_PORT)
}

/// For a node on the client port, recognised by [`super::frame::is_peer_preamble`]: a refusal that
/// its link logs. Write it, then close the connection.
pub fn refusal_for_peer(peer_address: &str) -> Result<Vec<u8>, CodecError> {
    let welcome = PeerWelcome {
        outcome: Err(format!("this is the client port of a Pontoon node; nodes use {peer_address}").into()),
        node: NodeId(0),
        incarnation: 0,
    };
    Ok(opening(&welcome.encode()?)?)
}
