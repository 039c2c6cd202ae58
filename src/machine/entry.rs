//! The payload of a log entry, byte by byte.
//!
//! An entry is a batch of commands, applied in order. It is written once per command of every client and
//! read by every replica, so it has a form of its own instead of Cap'n Proto: no alignment, no pointers,
//! and keys and values are read as slices of the entry's buffer.
//!
//! ```text
//! entry    = version(1 byte: 1)  flags(1 byte)  count(varint)  command{count}
//! command  = kind(1 byte)  flags(1 byte)  body
//! body of kind
//!   1 put     = key(bytes)  value(bytes)
//!   2 delete  = key(bytes)
//!   3 cas     = key(bytes)  expect  value(bytes)
//!   16 meta   = message(bytes)              a MetaCommand of schema/store.capnp
//! expect   = 0(1 byte)                      the key must not exist
//!          | 1(1 byte)  value(bytes)        its value must equal this
//!          | 2(1 byte)  version(varint)     its version must equal this
//! bytes    = length(varint)  byte{length}
//! varint   = the number in groups of 7 bits, low ones first, one per byte, the high bit set in all
//!            but the last; in the fewest bytes
//! ```
//!
//! Nothing follows the last command. Each entry has exactly one form: what is read and written again is
//! the same bytes (metadata messages aside).
//!
//! *Room.* All flags are 0 today. Reserved are: entry flag 0x01, a stamp follows the flags (varint,
//! milliseconds of the leader's clock for sessions); command flag 0x01, a session and sequence follow the
//! flags (16 bytes, varint). A version, flag, kind or expect that the reader doesn't know makes the whole
//! entry unreadable: the replica stops, since skipping what others apply would make replicas differ.

use bytes::Bytes;

use super::command::{Command, Expect, FormatError, KvCommand};
use crate::codec::meta;

const VERSION: u8 = 1;

const PUT: u8 = 1;
const DELETE: u8 = 2;
const CAS: u8 = 3;
const META: u8 = 16;

const EXPECT_ABSENT: u8 = 0;
const EXPECT_VALUE: u8 = 1;
const EXPECT_VERSION: u8 = 2;

/// Commands for which room is made before the first is read; `count` is not trusted beyond.
const COMMANDS_EXPECTED: usize = 64;

/// The payload of one log entry: a batch of commands, applied in order.
pub fn encode_entry(commands: &[Command]) -> Vec<u8> {
    let size: usize = commands.iter().map(Command::size).sum();
    let mut to = Vec::with_capacity(size + 16);
    to.extend([VERSION, 0]);
    write_varint(&mut to, commands.len() as u64);
    for command in commands {
        match command {
            Command::Kv(KvCommand::Put { key, value }) => {
                to.extend([PUT, 0]);
                write_bytes(&mut to, key);
                write_bytes(&mut to, value);
            }
            Command::Kv(KvCommand::Delete { key }) => {
                to.extend([DELETE, 0]);
                write_bytes(&mut to, key);
            }
            Command::Kv(KvCommand::Cas { key, expect, value }) => {
                to.extend([CAS, 0]);
                write_bytes(&mut to, key);
                match expect {
                    Expect::Absent => to.push(EXPECT_ABSENT),
                    Expect::Value(expected) => {
                        to.push(EXPECT_VALUE);
                        write_bytes(&mut to, expected);
                    }
                    Expect::Version(version) => {
                        to.push(EXPECT_VERSION);
                        write_varint(&mut to, *version);
                    }
                }
                write_bytes(&mut to, value);
            }
            Command::Meta(command) => {
                to.extend([META, 0]);
                write_bytes(&mut to, &meta::encode_command(command));
            }
        }
    }
    to
}

/// Reads the payload of a log entry. Keys and values share the buffer of `data`.
///
/// Errors: the bytes end early or go on, a number has more than one form, or anything has a version, kind
/// or flag that this version of the program doesn't know. No bytes make it panic.
pub fn decode_entry(data: &Bytes) -> Result<Vec<Command>, FormatError> {
    let mut from = Cursor { data, at: 0 };
    known("entry version", from.byte("an entry's version")?, VERSION)?;
    known("entry flags", from.byte("an entry's flags")?, 0)?;
    let count = from.varint("an entry's count of commands")?;
    let room = usize::try_from(count).unwrap_or(usize::MAX);
    let mut commands = Vec::with_capacity(room.min(COMMANDS_EXPECTED));
    for _ in 0..count {
        commands.push(from.command()?);
    }
    if from.at != data.len() {
        return Err(FormatError::Malformed("entry: bytes follow its end"));
    }
    Ok(commands)
}

fn known(what: &'static str, found: u8, wanted: u8) -> Result<(), FormatError> {
    if found == wanted { Ok(()) } else { Err(unknown(what, found)) }
}

fn unknown(what: &'static str, value: u8) -> FormatError {
    FormatError::Unknown { what, value: value.into() }
}

fn write_varint(to: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        to.push(number as u8 | 0x80);
        number >>= 7;
    }
    to.push(number as u8);
}

fn write_bytes(to: &mut Vec<u8>, bytes: &[u8]) {
    write_varint(to, bytes.len() as u64);
    to.extend_from_slice(bytes);
}

struct Cursor<'a> {
    data: &'a Bytes,
    at: usize,
}

impl Cursor<'_> {
    fn command(&mut self) -> Result<Command, FormatError> {
        let kind = self.byte("a command's kind")?;
        let flags = self.byte("a command's flags")?;
        if !matches!(kind, PUT | DELETE | CAS | META) {
            return Err(unknown("kind of command", kind));
        }
        known("command flags", flags, 0)?;
        Ok(match kind {
            PUT => Command::Kv(KvCommand::Put { key: self.bytes("a key")?, value: self.bytes("a value")? }),
            DELETE => Command::Kv(KvCommand::Delete { key: self.bytes("a key")? }),
            CAS => Command::Kv(KvCommand::Cas {
                key: self.bytes("a key")?,
                expect: self.expect()?,
                value: self.bytes("a value")?,
            }),
            _ => {
                let message = self.bytes("a metadata command")?;
                let command = meta::decode_command(&message);
                Command::Meta(command.map_err(|e| FormatError::Metadata(e.to_string()))?)
            }
        })
    }

    fn expect(&mut self) -> Result<Expect, FormatError> {
        match self.byte("a condition")? {
            EXPECT_ABSENT => Ok(Expect::Absent),
            EXPECT_VALUE => Ok(Expect::Value(self.bytes("an expected value")?)),
            EXPECT_VERSION => Ok(Expect::Version(self.varint("an expected version")?)),
            other => Err(unknown("kind of condition", other)),
        }
    }

    fn byte(&mut self, what: &'static str) -> Result<u8, FormatError> {
        let byte = self.data.get(self.at);
        self.at += 1;
        byte.copied().ok_or(FormatError::Truncated(what))
    }

    fn varint(&mut self, what: &'static str) -> Result<u64, FormatError> {
        let mut number = 0_u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte(what)?;
            let group = u64::from(byte & 0x7f);
            if group << shift >> shift != group {
                return Err(FormatError::Malformed("varint: it has more than 64 bits"));
            }
            number |= group << shift;
            if byte & 0x80 == 0 {
                if byte == 0 && shift > 0 {
                    return Err(FormatError::Malformed("varint: it is not in the fewest bytes"));
                }
                return Ok(number);
            }
        }
        Err(FormatError::Malformed("varint: it has more than 64 bits"))
    }

    fn bytes(&mut self, what: &'static str) -> Result<Bytes, FormatError> {
        let length = self.varint(what)?;
        let end = usize::try_from(length)
            .ok()
            .and_then(|length| self.at.checked_add(length))
            .filter(|end| *end <= self.data.len())
            .ok_or(FormatError::Truncated(what))?;
        let bytes = self.data.slice(self.at..end);
        self.at = end;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::meta::tests::any_command as any_meta_command;
    use proptest::prelude::*;

    fn any_bytes() -> impl Strategy<Value = Bytes> {
        prop::collection::vec(any::<u8>(), 0..200).prop_map(Bytes::from)
    }

    fn any_command() -> impl Strategy<Value = Command> {
        let expect = prop_oneof![
            Just(Expect::Absent),
            any_bytes().prop_map(Expect::Value),
            any::<u64>().prop_map(Expect::Version),
        ];
        prop_oneof![
            4 => (any_bytes(), any_bytes())
                .prop_map(|(key, value)| Command::Kv(KvCommand::Put { key, value })),
            2 => any_bytes().prop_map(|key| Command::Kv(KvCommand::Delete { key })),
            4 => (any_bytes(), expect, any_bytes())
                .prop_map(|(key, expect, value)| Command::Kv(KvCommand::Cas { key, expect, value })),
            1 => any_meta_command().prop_map(Command::Meta),
        ]
    }

    fn decode(bytes: &[u8]) -> Result<Vec<Command>, FormatError> {
        decode_entry(&Bytes::copy_from_slice(bytes))
    }

    #[test]
    fn the_form_is_pinned() {
        let commands = [
            Command::Kv(KvCommand::Put { key: "k".into(), value: "val".into() }),
            Command::Kv(KvCommand::Delete { key: "k".into() }),
            Command::Kv(KvCommand::Cas { key: "k".into(), expect: Expect::Version(300), value: "".into() }),
            Command::Kv(KvCommand::Cas {
                key: "k".into(),
                expect: Expect::Value("a".into()),
                value: "b".into(),
            }),
            Command::Kv(KvCommand::Cas { key: "k".into(), expect: Expect::Absent, value: "b".into() }),
        ];
        let bytes = b"\x01\x00\x05\
            \x01\x00\x01k\x03val\
            \x02\x00\x01k\
            \x03\x00\x01k\x02\xac\x02\x00\
            \x03\x00\x01k\x01\x01a\x01b\
            \x03\x00\x01k\x00\x01b";
        assert_eq!(encode_entry(&commands), bytes);
        assert_eq!(decode(bytes).unwrap(), commands);
    }

    #[test]
    fn what_is_not_known_is_never_skipped() {
        let unknown = |bytes: &[u8]| decode(bytes).unwrap_err().to_string();
        assert_eq!(unknown(b"\x02\x00\x00"), "unknown entry version 2");
        assert_eq!(unknown(b"\x01\x01\x00"), "unknown entry flags 1");
        assert_eq!(unknown(b"\x01\x00\x01\x09\x00"), "unknown kind of command 9");
        assert_eq!(unknown(b"\x01\x00\x01\x02\x01\x00"), "unknown command flags 1");
        assert_eq!(unknown(b"\x01\x00\x01\x03\x00\x01k\x07"), "unknown kind of condition 7");
        assert_eq!(unknown(b""), "the bytes end within an entry's version");
        assert_eq!(unknown(b"\x01\x00\x01\x02\x00\x05k"), "the bytes end within a key");
        assert_eq!(unknown(b"\x01\x00\x00\x00"), "malformed entry: bytes follow its end");
        assert_eq!(unknown(b"\x01\x00\x80\x00"), "malformed varint: it is not in the fewest bytes");
        assert_eq!(
            unknown(b"\x01\x00\xff\xff\xff\xff\xff\xff\xff\xff\xff\x02"),
            "malformed varint: it has more than 64 bits"
        );
        let meta = unknown(b"\x01\x00\x01\x10\x00\x03abc");
        assert!(meta.starts_with("unreadable metadata command: "), "{meta}");
    }

    #[test]
    fn keys_and_values_share_the_buffer() {
        let command = Command::Kv(KvCommand::Put { key: "key".into(), value: vec![7; 1000].into() });
        let data = Bytes::from(encode_entry(&[command]));
        let Command::Kv(KvCommand::Put { value, .. }) = &decode_entry(&data).unwrap()[0] else {
            panic!("not a put");
        };
        assert!(data.as_ptr_range().contains(&value.as_ptr()));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        #[test]
        fn entries_survive(commands in prop::collection::vec(any_command(), 0..8)) {
            let bytes = encode_entry(&commands);
            prop_assert!(bytes.len() <= 16 + commands.iter().map(Command::size).sum::<usize>());
            prop_assert_eq!(decode(&bytes).unwrap(), commands);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = decode(&bytes);
            let _ = decode(&[&[1, 0, 1], &bytes[..]].concat());
        }

        #[test]
        fn a_damaged_entry_is_refused_or_has_one_form(
            commands in prop::collection::vec(any_command(), 1..4),
            at: prop::sample::Index, byte: u8, cut: prop::sample::Index,
        ) {
            let mut bytes = encode_entry(&commands);
            prop_assert!(decode(&bytes[..cut.index(bytes.len())]).is_err());
            let at = at.index(bytes.len());
            bytes[at] = byte;
            if let Ok(read) = decode(&bytes) && !read.iter().any(|c| matches!(c, Command::Meta(_))) {
                prop_assert_eq!(encode_entry(&read), bytes);
            }
        }
    }
}
