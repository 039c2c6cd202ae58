//! The cluster map as a node keeps it on disk, to start from while the metadata shard is out of
//! reach. A cache: damage is noticed by the file's checksum and costs a pull from a peer.

use crate::codec::CodecError;
use crate::codec::records::{read_delta, write_delta};
use crate::limits;
use crate::placement::map::ClusterMap;
use crate::schema::types_capnp::map_delta;

/// The bytes of the file's content.
pub fn encode(map: &ClusterMap) -> Vec<u8> {
    let mut message = capnp::message::Builder::new_default();
    write_delta(&map.delta(0), message.init_root::<map_delta::Builder<'_>>());
    capnp::serialize::write_message_to_words(&message)
}

fn options() -> capnp::message::ReaderOptions {
    let mut options = capnp::message::ReaderOptions::new();
    options
        .traversal_limit_in_words(Some(limits::TRAVERSAL_BYTES_MAX / 8))
        .nesting_limit(limits::NESTING_MAX);
    options
}

/// Reads the file's content.
pub fn decode(mut bytes: &[u8]) -> Result<ClusterMap, CodecError> {
    let message = capnp::serialize::read_message(&mut bytes, options())?;
    let mut map = ClusterMap::default();
    map.merge(read_delta(message.get_root()?)?);
    Ok(map)
}
