//! The first frame of a peer connection, as its two ends read it.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use pontoon::codec::hello::{PeerHello, PeerWelcome};

fuzz_target!(|data: &[u8]| {
    let payload = Bytes::copy_from_slice(data);
    if let Ok(hello) = PeerHello::decode(payload.clone()) {
        let bytes = hello.encode().expect("what was read can be written");
        assert_eq!(PeerHello::decode(bytes.into()).expect("what was written can be read"), hello);
    }
    // Its text is cut and cleaned as it is read, so only whether it is read counts.
    PeerWelcome::decode(payload).ok();
});
