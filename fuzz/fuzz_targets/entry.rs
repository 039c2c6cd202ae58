//! The data of a log entry, which peers send and every replica applies.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use pontoon::machine::command::{Command, decode_entry, encode_entry};

fuzz_target!(|data: &[u8]| {
    let data = Bytes::copy_from_slice(data);
    let Ok(entry) = decode_entry(&data) else { return };
    // There is one form of an entry, unless it holds a command of the metadata shard.
    if !entry.commands.iter().any(|(command, _)| matches!(command, Command::Meta(_))) {
        assert_eq!(encode_entry(&entry.commands, entry.stamp.unwrap_or(0)), data);
    }
});
