//! The payload of a frame on the peer port. Raft messages that are read can be written again, and are read
//! the same.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use pontoon::codec::peer::{PeerFrame, decode, encode};

fuzz_target!(|data: &[u8]| {
    let Ok(frame @ PeerFrame::Raft(_)) = decode(Bytes::copy_from_slice(data)) else { return };
    let mut bytes = Vec::new();
    encode(&frame, &mut bytes).expect("what was read can be written");
    assert_eq!(decode(bytes.into()).expect("what was written can be read"), frame);
});
