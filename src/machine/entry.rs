//! The payload of a log entry, byte by byte.
//!
//! An entry is a batch of commands, applied in order. It is written once per command of every client and
//! read by every replica, so it has a form of its own instead of Cap'n Proto: no alignment, no pointers,
//! and keys and values are read as slices of the entry's buffer.
//!
//! ```text
//! entry    = version(1 byte: 1)  flags(1 byte)  [stamp(varint)]  [conf(varint)]  count(varint)  item…
//!            flag 0x01: the stamp is there, in milliseconds; so is a tagged command
//!            flag 0x02: the conf version is there: one replica goes on alone under it
//! item     = command                        count of them
//!          | session                        before a tagged command, not counted
//! command  = kind(1 byte)  flags(1 byte)  [sequence(varint)]  body
//!            flag 0x01: tagged: the sequence is there; it is one of the session before
//! body of kind
//!   1 put     = key(bytes)  value(bytes)
//!   2 delete  = key(bytes)
//!   3 cas     = key(bytes)  expect  value(bytes)
//!   16 meta   = message(bytes)              a MetaCommand of schema/store.capnp; never tagged
//! session  = 4(1 byte)  id(16 bytes)  flags(1 byte)  [lifetime(varint)]  acked below(varint)
//!            flag 0x01: open it, with that lifetime in milliseconds (at most 2³² - 1)
//! expect   = 0(1 byte)                      the key must not exist
//!          | 1(1 byte)  value(bytes)        its value must equal this
//!          | 2(1 byte)  version(varint)     its version must equal this
//! bytes    = length(varint)  byte{length}
//! varint   = the number in groups of 7 bits, low ones first, one per byte, the high bit set in all
//!            but the last; in the fewest bytes
//! ```
//!
//! Nothing follows the last command. Each entry has exactly one form: what is read and written again is
//! the same bytes (metadata messages aside). So a session stands directly before the first tagged command
//! that needs it, and differs from the session before it.
//!
//! *Room.* Kinds, flags and conditions other than these are free. A version, flag, kind or expect that the
//! reader doesn't know makes the whole entry unreadable: the replica stops, since skipping what others
//! apply would make replicas differ.

use bytes::Bytes;

use super::command::{Command, Expect, FormatError, KvCommand};
use super::session::SessionTag;
use crate::codec::meta;
use crate::codec::varint::{self, VarintError};
use crate::ids::SessionId;
use crate::limits;

const VERSION: u8 = 1;

const PUT: u8 = 1;
const DELETE: u8 = 2;
const CAS: u8 = 3;
const SESSION: u8 = 4;
const META: u8 = 16;

/// Of an entry: a stamp follows.
const STAMPED: u8 = 1;
/// Of an entry: a conf version follows, with which a generation of the shard begins.
const BEGINS: u8 = 2;
/// Of a command: a sequence follows.
const TAGGED: u8 = 1;
/// Of a session: a lifetime follows.
const OPEN: u8 = 1;

const EXPECT_ABSENT: u8 = 0;
const EXPECT_VALUE: u8 = 1;
const EXPECT_VERSION: u8 = 2;

/// Commands for which room is made before the first is read; `count` is not trusted beyond.
const COMMANDS_EXPECTED: usize = 64;

/// Bytes that an entry has beside its commands and their tags, at most.
pub const ENTRY_HEAD_BYTES: usize = 22;
/// Bytes that a command's tag takes in an entry, at most.
pub const TAG_BYTES: usize = 44;

const _: () = assert!(
    ENTRY_HEAD_BYTES + TAG_BYTES + 24 + limits::KEY_BYTES_MAX + 2 * limits::VALUE_BYTES_MAX
        <= limits::ENTRY_BYTES_MAX,
    "an entry has room for the greatest command"
);

/// A command and, if it may come again, whose it is and which.
pub type TaggedCommand = (Command, Option<SessionTag>);

/// A log entry, read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    /// The leader's session clock when the entry was made, in milliseconds; if a command is tagged.
    pub stamp: Option<u64>,
    /// One replica goes on alone under this conf version, with what it had: revisions that others had seen may be
    /// lost, so the next ones are of the generation of this.
    pub begins: Option<u64>,
    /// Commands, applied in order.
    pub commands: Vec<TaggedCommand>,
}

/// Bytes that a command takes in a log entry with its tag, about.
pub fn tagged_size((command, tag): &TaggedCommand) -> usize {
    command.size() + tag.map_or(0, |_| TAG_BYTES)
}

/// The payload of one log entry: a batch of commands, applied in order. `stamp` is written only if a
/// command is tagged. A metadata command is always written without a tag.
pub fn encode_entry(commands: &[TaggedCommand], stamp: u64) -> Vec<u8> {
    let size = commands.iter().map(tagged_size).sum::<usize>();
    let mut to = Vec::with_capacity(ENTRY_HEAD_BYTES + size);
    if commands.iter().any(|(command, tag)| tag.is_some() && matches!(command, Command::Kv(_))) {
        to.extend([VERSION, STAMPED]);
        varint::write(&mut to, stamp);
    } else {
        to.extend([VERSION, 0]);
    }
    varint::write(&mut to, commands.len() as u64);
    let mut in_force = None;
    for (command, tag) in commands {
        match command {
            Command::Kv(command) => write_command(&mut to, command, *tag, &mut in_force),
            Command::Meta(command) => {
                to.extend([META, 0]);
                write_bytes(&mut to, &meta::encode_command(command));
            }
        }
    }
    to
}

/// The payload of the entry with which a generation of a shard begins, under the conf version `conf`.
pub fn encode_beginning(conf: u64) -> Vec<u8> {
    let mut to = vec![VERSION, BEGINS];
    varint::write(&mut to, conf);
    varint::write(&mut to, 0);
    to
}

/// What of a tag its session's commands have in common.
type SessionItem = (SessionId, Option<u32>, u64);

fn write_command(
    to: &mut Vec<u8>,
    command: &KvCommand,
    tag: Option<SessionTag>,
    in_force: &mut Option<SessionItem>,
) {
    if let Some(tag) = tag {
        let item = (tag.session, tag.open, tag.acked_below);
        if *in_force != Some(item) {
            write_session(to, item);
            *in_force = Some(item);
        }
    }
    to.push(match command {
        KvCommand::Put { .. } => PUT,
        KvCommand::Delete { .. } => DELETE,
        KvCommand::Cas { .. } => CAS,
    });
    match tag {
        None => to.push(0),
        Some(tag) => {
            to.push(TAGGED);
            varint::write(to, tag.sequence);
        }
    }
    match command {
        KvCommand::Put { key, value } => {
            write_bytes(to, key);
            write_bytes(to, value);
        }
        KvCommand::Delete { key } => write_bytes(to, key),
        KvCommand::Cas { key, expect, value } => {
            write_bytes(to, key);
            match expect {
                Expect::Absent => to.push(EXPECT_ABSENT),
                Expect::Value(expected) => {
                    to.push(EXPECT_VALUE);
                    write_bytes(to, expected);
                }
                Expect::Version(version) => {
                    to.push(EXPECT_VERSION);
                    varint::write(to, *version);
                }
            }
            write_bytes(to, value);
        }
    }
}

fn write_session(to: &mut Vec<u8>, (session, open, acked_below): SessionItem) {
    to.push(SESSION);
    to.extend(session.0);
    match open {
        None => to.push(0),
        Some(lifetime_ms) => {
            to.push(OPEN);
            varint::write(to, lifetime_ms.into());
        }
    }
    varint::write(to, acked_below);
}

/// Reads the payload of a log entry. Keys and values share the buffer of `data`.
///
/// Errors: the bytes end early or go on, something has more than one form, or anything has a version, kind
/// or flag that this version of the program doesn't know. No bytes make it panic.
pub fn decode_entry(data: &Bytes) -> Result<Entry, FormatError> {
    let mut from = Cursor { data, at: 0 };
    known("entry version", from.byte("an entry's version")?, VERSION)?;
    let flags = from.byte("an entry's flags")?;
    if flags & !(STAMPED | BEGINS) != 0 {
        return Err(unknown("entry flags", flags));
    }
    let stamped = flags & STAMPED != 0;
    let stamp = if stamped { Some(from.varint("an entry's stamp")?) } else { None };
    let begins = if flags & BEGINS != 0 { Some(from.varint("a generation's conf version")?) } else { None };
    let count = from.varint("an entry's count of commands")?;
    let room = usize::try_from(count).unwrap_or(usize::MAX);
    let mut commands = Vec::with_capacity(room.min(COMMANDS_EXPECTED));
    let mut session = None;
    let mut tagged = false;
    for _ in 0..count {
        let (command, tag) = from.command(&mut session)?;
        tagged |= tag.is_some();
        commands.push((command, tag));
    }
    if from.at != data.len() {
        return Err(FormatError::Malformed("entry: bytes follow its end"));
    }
    if tagged != stamped {
        return Err(FormatError::Malformed("entry: it has a stamp or a tagged command, not both"));
    }
    Ok(Entry { stamp, begins, commands })
}

fn known(what: &'static str, found: u8, wanted: u8) -> Result<(), FormatError> {
    if found == wanted { Ok(()) } else { Err(unknown(what, found)) }
}

fn unknown(what: &'static str, value: u8) -> FormatError {
    FormatError::Unknown { what, value: value.into() }
}

fn write_bytes(to: &mut Vec<u8>, bytes: &[u8]) {
    varint::write(to, bytes.len() as u64);
    to.extend_from_slice(bytes);
}

struct Cursor<'a> {
    data: &'a Bytes,
    at: usize,
}

impl Cursor<'_> {
    /// Reads a command, and before it the session of its tag unless that is `in_force` already.
    fn command(&mut self, in_force: &mut Option<SessionItem>) -> Result<TaggedCommand, FormatError> {
        let mut kind = self.byte("a command's kind")?;
        let renewed = kind == SESSION;
        if renewed {
            let item = self.session()?;
            if *in_force == Some(item) {
                return Err(FormatError::Malformed("session: it is the one before"));
            }
            *in_force = Some(item);
            kind = self.byte("a command's kind")?;
        }
        if !matches!(kind, PUT | DELETE | CAS | META) {
            return Err(unknown("kind of command", kind));
        }
        let allowed = if kind == META { 0 } else { TAGGED };
        let tagged = self.flag("command flags", "a command's flags", allowed)?;
        let tag = match (tagged, *in_force) {
            (true, Some((session, open, acked_below))) => {
                let sequence = self.varint("a command's sequence")?;
                Some(SessionTag { session, sequence, acked_below, open })
            }
            (true, None) => return Err(FormatError::Malformed("command: it is tagged without a session")),
            (false, _) if renewed => {
                return Err(FormatError::Malformed("session: no tagged command follows"));
            }
            (false, _) => None,
        };
        let command = match kind {
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
        };
        Ok((command, tag))
    }

    /// The rest of a session item, behind its kind.
    fn session(&mut self) -> Result<SessionItem, FormatError> {
        let end = self.at + SessionId::default().0.len();
        let id = self.data.get(self.at..end).and_then(SessionId::from_slice);
        let id = id.ok_or(FormatError::Truncated("a session's id"))?;
        self.at = end;
        let open = if self.flag("session flags", "a session's flags", OPEN)? {
            let lifetime_ms = u32::try_from(self.varint("a session's lifetime")?);
            Some(lifetime_ms.map_err(|_| FormatError::Malformed("session: its lifetime is too long"))?)
        } else {
            None
        };
        Ok((id, open, self.varint("what a session has acknowledged")?))
    }

    /// Reads flags of which only `allowed` is known: whether it is set.
    fn flag(&mut self, of: &'static str, what: &'static str, allowed: u8) -> Result<bool, FormatError> {
        let flags = self.byte(what)?;
        if flags & !allowed == 0 { Ok(flags != 0) } else { Err(unknown(of, flags)) }
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
        let (number, taken) =
            varint::read(self.data.get(self.at..).unwrap_or_default()).map_err(|error| match error {
                VarintError::Truncated => FormatError::Truncated(what),
                VarintError::TooLong => FormatError::Malformed("varint: it has more than 64 bits"),
                VarintError::NotShortest => FormatError::Malformed("varint: it is not in the fewest bytes"),
            })?;
        self.at += taken;
        Ok(number)
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
    use crate::ids::RandomId;
    use crate::machine::MachineKind;
    use crate::machine::memory::MemoryState;
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

    fn any_tag() -> impl Strategy<Value = SessionTag> {
        // Few of each, so that tags repeat.
        (0..2_u8, 0..3_u64, 0..2_u64, prop_oneof![Just(None), Just(Some(7)), Just(Some(u32::MAX))]).prop_map(
            |(session, sequence, acked_below, open)| SessionTag {
                session: RandomId([session; 16]),
                sequence,
                acked_below,
                open,
            },
        )
    }

    fn any_commands(most: usize) -> impl Strategy<Value = Vec<TaggedCommand>> {
        let tagged = (any_command(), prop::option::of(any_tag())).prop_map(|(command, tag)| {
            let tag = tag.filter(|_| matches!(command, Command::Kv(_)));
            (command, tag)
        });
        prop::collection::vec(tagged, 0..most)
    }

    fn untagged(commands: impl IntoIterator<Item = KvCommand>) -> Vec<TaggedCommand> {
        commands.into_iter().map(|command| (Command::Kv(command), None)).collect()
    }

    fn decode(bytes: &[u8]) -> Result<Entry, FormatError> {
        decode_entry(&Bytes::copy_from_slice(bytes))
    }

    #[test]
    fn the_form_is_pinned() {
        let commands = untagged([
            KvCommand::Put { key: "k".into(), value: "val".into() },
            KvCommand::Delete { key: "k".into() },
            KvCommand::Cas { key: "k".into(), expect: Expect::Version(300), value: "".into() },
            KvCommand::Cas { key: "k".into(), expect: Expect::Value("a".into()), value: "b".into() },
            KvCommand::Cas { key: "k".into(), expect: Expect::Absent, value: "b".into() },
        ]);
        let bytes = b"\x01\x00\x05\
            \x01\x00\x01k\x03val\
            \x02\x00\x01k\
            \x03\x00\x01k\x02\xac\x02\x00\
            \x03\x00\x01k\x01\x01a\x01b\
            \x03\x00\x01k\x00\x01b";
        assert_eq!(encode_entry(&commands, 77), bytes);
        assert_eq!(decode(bytes).unwrap(), Entry { stamp: None, begins: None, commands });
    }

    #[test]
    fn a_generation_begins_behind_all_revisions_that_may_be_lost() {
        let bytes = b"\x01\x02\x80\x80\x80\x80\x20\x00";
        let conf = 2 << 32;
        assert_eq!(encode_beginning(conf), bytes);
        let begins = Entry { stamp: None, begins: Some(conf), commands: Vec::new() };
        assert_eq!(decode(bytes).unwrap(), begins);
        let mut state = MemoryState { revision: 77, ..MemoryState::default() };
        let put = Entry {
            begins: None,
            commands: untagged([KvCommand::Put { key: "k".into(), value: "v".into() }]),
            ..begins.clone()
        };
        for (entry, revision) in [(&begins, conf), (&put, conf + 1), (&begins, conf + 1)] {
            MachineKind::Kv.apply_entry(entry, &mut state).unwrap();
            assert_eq!(state.revision, revision);
        }
    }

    #[test]
    fn the_form_of_sessions_is_pinned() {
        let delete = || Command::Kv(KvCommand::Delete { key: "k".into() });
        let first = SessionTag {
            session: RandomId(*b"0123456789abcdef"),
            sequence: 300,
            acked_below: 299,
            open: Some(10_000),
        };
        let second = SessionTag { sequence: 301, ..first };
        let third = SessionTag { sequence: 302, open: None, ..first };
        let commands = vec![
            (delete(), None),
            (delete(), Some(first)),
            (delete(), None),
            (delete(), Some(second)),
            (delete(), Some(third)),
        ];
        let bytes = b"\x01\x01\xac\x02\x05\
            \x02\x00\x01k\
            \x040123456789abcdef\x01\x90\x4e\xab\x02\x02\x01\xac\x02\x01k\
            \x02\x00\x01k\
            \x02\x01\xad\x02\x01k\
            \x040123456789abcdef\x00\xab\x02\x02\x01\xae\x02\x01k";
        assert_eq!(encode_entry(&commands, 300), bytes);
        assert_eq!(decode(bytes).unwrap(), Entry { stamp: Some(300), begins: None, commands });
    }

    #[test]
    fn sessions_have_one_form() {
        const ID: &[u8] = b"0123456789abcdef";
        let refused = |items: &[&[u8]]| decode(&items.concat()).unwrap_err().to_string();
        let session = [b"\x04", ID, b"\x00\x01"].concat();
        let tagged = b"\x02\x01\x05\x01k";
        assert!(decode(&[b"\x01\x01\x09\x01", &session[..], tagged].concat()).is_ok());
        assert_eq!(
            refused(&[b"\x01\x01\x09\x02", &session, tagged, &session, tagged]),
            "malformed session: it is the one before"
        );
        assert_eq!(
            refused(&[b"\x01\x01\x09\x02", &session, b"\x02\x00\x01k", tagged]),
            "malformed session: no tagged command follows"
        );
        assert_eq!(refused(&[b"\x01\x01\x09\x01", &session, &session, tagged]), "unknown kind of command 4");
        assert_eq!(
            refused(&[b"\x01\x01\x09\x01", &session, tagged, &session]),
            "malformed entry: bytes follow its end"
        );
        assert_eq!(
            refused(&[b"\x01\x01\x09\x01", tagged]),
            "malformed command: it is tagged without a session"
        );
        let both = "malformed entry: it has a stamp or a tagged command, not both";
        assert_eq!(refused(&[b"\x01\x00\x01", &session, tagged]), both);
        assert_eq!(refused(&[b"\x01\x01\x09\x01\x02\x00\x01k"]), both);
        assert_eq!(
            refused(&[b"\x01\x01\x09\x01\x04", ID, b"\x01\xff\xff\xff\xff\x10\x00", tagged]),
            "malformed session: its lifetime is too long"
        );
        assert_eq!(refused(&[b"\x01\x01\x09\x01\x04", ID, b"\x02\x00", tagged]), "unknown session flags 2");
        assert_eq!(refused(&[b"\x01\x01\x09\x01\x04", &ID[1..]]), "the bytes end within a session's id");
        assert_eq!(refused(&[b"\x01\x01\x09\x01", &session, b"\x10\x01\x00"]), "unknown command flags 1");
    }

    #[test]
    fn what_is_not_known_is_never_skipped() {
        let unknown = |bytes: &[u8]| decode(bytes).unwrap_err().to_string();
        assert_eq!(unknown(b"\x02\x00\x00"), "unknown entry version 2");
        assert_eq!(unknown(b"\x01\x04\x00"), "unknown entry flags 4");
        assert_eq!(unknown(b"\x01\x00\x01\x09\x00"), "unknown kind of command 9");
        assert_eq!(unknown(b"\x01\x00\x01\x02\x03\x00"), "unknown command flags 3");
        assert_eq!(unknown(b"\x01\x00\x01\x03\x00\x01k\x07"), "unknown kind of condition 7");
        assert_eq!(unknown(b""), "the bytes end within an entry's version");
        assert_eq!(unknown(b"\x01\x01"), "the bytes end within an entry's stamp");
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
        let put = KvCommand::Put { key: "key".into(), value: vec![7; 1000].into() };
        let data = Bytes::from(encode_entry(&untagged([put]), 0));
        let (Command::Kv(KvCommand::Put { value, .. }), None) = &decode_entry(&data).unwrap().commands[0]
        else {
            panic!("not a put");
        };
        assert!(data.as_ptr_range().contains(&value.as_ptr()));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        #[test]
        fn entries_survive(commands in any_commands(8), stamp: u64) {
            let bytes = encode_entry(&commands, stamp);
            prop_assert!(bytes.len() <= ENTRY_HEAD_BYTES + commands.iter().map(tagged_size).sum::<usize>());
            let stamp = commands.iter().any(|(_, tag)| tag.is_some()).then_some(stamp);
            prop_assert_eq!(decode(&bytes).unwrap(), Entry { stamp, begins: None, commands });
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = decode(&bytes);
            let _ = decode(&[&[1, 0, 1], &bytes[..]].concat());
            let _ = decode(&[&[1, 1, 0, 1, 4], &bytes[..]].concat());
        }

        #[test]
        fn a_damaged_entry_is_refused_or_has_one_form(
            commands in any_commands(4), stamp in 0..300_u64,
            at: prop::sample::Index, byte: u8, cut: prop::sample::Index,
        ) {
            let mut bytes = encode_entry(&commands, stamp);
            prop_assert!(decode(&bytes[..cut.index(bytes.len())]).is_err());
            let at = at.index(bytes.len());
            bytes[at] = byte;
            let metadata = |entry: &Entry| entry.commands.iter().any(|(c, _)| matches!(c, Command::Meta(_)));
            if let Ok(read) = decode(&bytes) && !metadata(&read) {
                prop_assert_eq!(encode_entry(&read.commands, read.stamp.unwrap_or(0)), bytes);
            }
        }
    }
}
