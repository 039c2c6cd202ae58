//! Redo files: the writes of one flush as one durable file, before the engine gets them in parts.
//!
//! A file holds one section per replica generation, in key order. All numbers are big endian.
//!
//! | bytes | content |
//! |---|---|
//! | 8 | magic `PONTREDO` |
//! | 4 | format version |
//! | 8 | sequence number, also in the file's name |
//! | n | records |
//! | 8 | length of all before |
//! | 4 | crc32c of all before, the length included |
//! | 8 | end magic `REDO-END` |
//!
//! Records: `1`, replica (8), generation (4), base (8), length (4) and bytes of the header: a section
//! begins; the base is the applied index that the engine had before, so that an engine which has lost
//! more than this file can repair is recognised;
//! `2`, length of key (4), length of value (4), key, value: a write; `3`, length of key (4), key: a
//! removal; `4`, number of writes and removals in all sections (8): the last record; `5`, kind (1): the
//! keys of what follows in the section are of this kind of [`keys`]; before it they are users' keys.
//! Format 1 had no records `5`.
//!
//! The file is written as `….redo.tmp`, synced, renamed, and its directory synced: what has the
//! final name was complete once, so that a defect in it is damage, not a crash.

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use bytes::Bytes;

use super::atomic_file::{self, io_error};
use super::identity::IdentityError;
use super::state::StateHeader;
use super::{StorageError, keys};
use crate::ids::{Index, ReplicaId};
use crate::limits;

const MAGIC: &[u8; 8] = b"PONTREDO";
const END_MAGIC: &[u8; 8] = b"REDO-END";
const FORMAT_VERSION: u32 = 2;
const HEAD_BYTES: u64 = 20;
const FOOT_BYTES: u64 = 20;
const ENDING: &str = "redo";

const SECTION: u8 = 1;
const WRITE: u8 = 2;
const REMOVAL: u8 = 3;
const LAST: u8 = 4;
const KIND: u8 = 5;

/// A header record is bounded by the membership, far below.
const HEADER_BYTES_MAX: usize = 64 * 1024;
/// What the metadata machine keeps under one key may be greater than a client's value.
const VALUE_BYTES_MAX: usize = limits::FRAME_BYTES_MAX;

/// One record of a redo file.
#[derive(Debug, PartialEq)]
pub enum Record {
    /// What follows belongs to this replica generation.
    Section(Section),
    /// The kind of a key of the current section, the key, and its new value, or `None` for a removal.
    Change(u8, Vec<u8>, Option<Bytes>),
}

/// What a section says of its changes.
#[derive(Clone, Debug, PartialEq)]
pub struct Section {
    /// Whose state they change.
    pub replica: ReplicaId,
    /// In which generation of its keys.
    pub generation: u32,
    /// The applied index of the state they are made to; 0 if there was none.
    pub base: Index,
    /// The header of the state they lead to.
    pub header: StateHeader,
}

/// Writes one redo file.
pub struct RedoWriter {
    path: PathBuf,
    temporary: PathBuf,
    out: Checked<BufWriter<File>>,
    kind: u8,
    changes: u64,
}

impl RedoWriter {
    /// Begins file number `sequence` in `dir`.
    pub fn create(dir: &Path, sequence: u64) -> Result<RedoWriter, StorageError> {
        let path = dir.join(format!("{sequence:016x}.{ENDING}"));
        let temporary = atomic_file::unfinished(&path);
        let file = atomic_file::create(&temporary)?;
        let mut writer = RedoWriter {
            path,
            temporary,
            out: Checked::new(BufWriter::with_capacity(256 * 1024, file)),
            kind: keys::KIND_USER,
            changes: 0,
        };
        writer.put(&[MAGIC, &FORMAT_VERSION.to_be_bytes(), &sequence.to_be_bytes()])?;
        Ok(writer)
    }

    /// Begins a section.
    pub fn section(&mut self, section: &Section) -> Result<(), StorageError> {
        let header = section.header.encode();
        self.kind = keys::KIND_USER;
        self.put(&[
            &[SECTION],
            &section.replica.0.to_be_bytes(),
            &section.generation.to_be_bytes(),
            &section.base.to_be_bytes(),
            &length(&header),
            &header,
        ])
    }

    /// Adds a change of the current section, to a key of this kind.
    pub fn change(&mut self, kind: u8, key: &[u8], value: Option<&[u8]>) -> Result<(), StorageError> {
        if std::mem::replace(&mut self.kind, kind) != kind {
            self.put(&[&[KIND, kind]])?;
        }
        self.changes += 1;
        match value {
            Some(value) => self.put(&[&[WRITE], &length(key), &length(value), key, value]),
            None => self.put(&[&[REMOVAL], &length(key), key]),
        }
    }

    /// Completes the file and makes it durable under its name, which is returned. Without this call
    /// what was written doesn't count.
    pub fn finish(mut self) -> Result<PathBuf, StorageError> {
        if let Err(error) = self.end() {
            // What it takes may be what is missing; the first error is the one to tell.
            if let Err(second) = self.abandon() {
                tracing::warn!(%second, "an unfinished redo file stays");
            }
            return Err(error);
        }
        let file = self
            .out
            .inner
            .into_inner()
            .map_err(|error| io_error("writing", &self.temporary)(error.into_error()))?;
        atomic_file::finish(&file, &self.temporary, &self.path)?;
        Ok(self.path)
    }

    /// Writes the end, and with it all that is still in memory.
    fn end(&mut self) -> Result<(), StorageError> {
        self.put(&[&[LAST], &self.changes.to_be_bytes()])?;
        self.put(&[&self.out.count.to_be_bytes()])?;
        self.put(&[&self.out.sum.to_be_bytes(), END_MAGIC])?;
        self.out.inner.flush().map_err(io_error("writing", &self.temporary))
    }

    /// Gives up: removes what was written.
    pub fn abandon(self) -> Result<(), StorageError> {
        atomic_file::remove(&self.temporary)
    }

    fn put(&mut self, parts: &[&[u8]]) -> Result<(), StorageError> {
        for part in parts {
            self.out.write_all(part).map_err(io_error("writing", &self.temporary))?;
        }
        Ok(())
    }
}

fn length(bytes: &[u8]) -> [u8; 4] {
    // Keys and values are bounded by `limits` to a few MiB.
    u32::try_from(bytes.len()).expect("keys and values are bounded").to_be_bytes()
}

/// Removes unfinished files from `dir` and lists the finished ones in the order of their numbers.
pub fn list(dir: &Path) -> Result<Vec<(u64, PathBuf)>, StorageError> {
    let mut found = Vec::new();
    let mut removed = false;
    for item in fs::read_dir(dir).map_err(io_error("listing", dir))? {
        let path = item.map_err(io_error("listing", dir))?.path();
        let ending = path.extension().and_then(|ending| ending.to_str());
        if ending == Some(atomic_file::UNFINISHED) {
            fs::remove_file(&path).map_err(io_error("removing", &path))?;
            removed = true;
            continue;
        }
        let sequence = path
            .file_stem()
            .and_then(|stem| stem.to_str())
            .filter(|stem| stem.len() == 16 && ending == Some(ENDING))
            .and_then(|stem| u64::from_str_radix(stem, 16).ok());
        match sequence {
            Some(sequence) => found.push((sequence, path)),
            // Nothing of ours, and no reason to give up what is.
            None => {
                return Err(StorageError::Engine {
                    engine: "redo files",
                    reason: format!("`{}` is not a redo file; move it away", path.display()),
                });
            }
        }
    }
    if removed {
        atomic_file::sync_dir(dir)?;
    }
    found.sort_unstable();
    Ok(found)
}

/// A redo file whose checksum holds, ready to be read.
pub struct RedoReader {
    path: PathBuf,
    input: io::Take<BufReader<File>>,
    kind: u8,
    changes: u64,
    done: bool,
}

impl RedoReader {
    /// Opens a file and checks it as a whole before the first record is believed.
    pub fn open(path: &Path, sequence: u64) -> Result<RedoReader, StorageError> {
        let read = io_error("reading", path);
        let (body, version) = match check(path, sequence) {
            Ok(Ok(found)) => found,
            Ok(Err(problem)) => return Err(damaged(path, problem)),
            Err(error) => return Err(read(error)),
        };
        if version > FORMAT_VERSION {
            // Not damage, which would be repaired: the newer program can read it.
            let path = path.display().to_string();
            return Err(IdentityError::Newer { path, found: version, known: FORMAT_VERSION }.into());
        }
        let open = || -> io::Result<BufReader<File>> {
            let mut input = BufReader::with_capacity(256 * 1024, File::open(path)?);
            io::copy(&mut input.by_ref().take(HEAD_BYTES), &mut io::sink())?;
            Ok(input)
        };
        Ok(RedoReader {
            path: path.to_owned(),
            input: open().map_err(io_error("reading", path))?.take(body),
            kind: keys::KIND_USER,
            changes: 0,
            done: false,
        })
    }

    /// The next record; `None` at the end.
    pub fn read(&mut self) -> Result<Option<Record>, StorageError> {
        if self.done {
            return Ok(None);
        }
        let [mut kind] = self.array()?;
        if kind == KIND {
            let [of_keys] = self.array()?;
            if !matches!(of_keys, keys::KIND_USER | keys::KIND_SESSION) {
                return Err(damaged(&self.path, format!("unknown kind of key {of_keys}")));
            }
            self.kind = of_keys;
            [kind] = self.array()?;
        }
        match kind {
            SECTION => {
                self.kind = keys::KIND_USER;
                let replica = ReplicaId(u64::from_be_bytes(self.array()?));
                let generation = u32::from_be_bytes(self.array()?);
                let base = u64::from_be_bytes(self.array()?);
                let len = self.length("header", HEADER_BYTES_MAX)?;
                let header = self.bytes(len)?;
                let what = format!("redo file {}", self.path.display());
                let header = StateHeader::decode(&header, &what)?;
                Ok(Some(Record::Section(Section { replica, generation, base, header })))
            }
            WRITE => {
                let key = self.length("key", limits::KEY_BYTES_MAX + keys::PREFIX_BYTES)?;
                let value = self.length("value", VALUE_BYTES_MAX)?;
                self.changes += 1;
                let key = self.bytes(key)?;
                Ok(Some(Record::Change(self.kind, key, Some(self.bytes(value)?.into()))))
            }
            REMOVAL => {
                let key = self.length("key", limits::KEY_BYTES_MAX + keys::PREFIX_BYTES)?;
                self.changes += 1;
                Ok(Some(Record::Change(self.kind, self.bytes(key)?, None)))
            }
            LAST => {
                let changes = u64::from_be_bytes(self.array()?);
                if changes != self.changes || self.input.limit() != 0 {
                    return Err(damaged(
                        &self.path,
                        format!("it says {changes} changes and holds {}", self.changes),
                    ));
                }
                self.done = true;
                Ok(None)
            }
            kind => Err(damaged(&self.path, format!("unknown kind of record {kind}"))),
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], StorageError> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn length(&mut self, what: &str, max: usize) -> Result<usize, StorageError> {
        let len = u32::from_be_bytes(self.array()?) as usize;
        if len > max {
            return Err(damaged(&self.path, format!("a {what} of {len} bytes")));
        }
        Ok(len)
    }

    fn bytes(&mut self, len: usize) -> Result<Vec<u8>, StorageError> {
        let mut bytes = vec![0; len];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), StorageError> {
        self.input.read_exact(bytes).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => damaged(&self.path, "a record runs over the end".into()),
            _ => io_error("reading", &self.path)(error),
        })
    }
}

/// Reads a whole file: the length of its records and its format, or what is wrong with it.
fn check(path: &Path, sequence: u64) -> io::Result<Result<(u64, u32), String>> {
    let file = File::open(path)?;
    let total = file.metadata()?.len();
    let Some(body) = total.checked_sub(HEAD_BYTES + FOOT_BYTES) else {
        return Ok(Err(format!("{total} bytes are no redo file")));
    };
    let mut input = Checked::new(BufReader::with_capacity(256 * 1024, file));
    let mut head = [0; HEAD_BYTES as usize];
    input.read_exact(&mut head)?;
    if &head[..8] != MAGIC {
        return Ok(Err("it does not begin as a redo file".into()));
    }
    let version = u32::from_be_bytes([head[8], head[9], head[10], head[11]]);
    if version == 0 {
        return Ok(Err("format 0".into()));
    }
    if head[12..] != sequence.to_be_bytes() {
        return Ok(Err("its number is not the one in its name".into()));
    }
    io::copy(&mut input.by_ref().take(body), &mut io::sink())?;
    let mut len = [0; 8];
    input.read_exact(&mut len)?;
    let sum = input.sum;
    let mut foot = [0; 12];
    input.read_exact(&mut foot)?;
    if &foot[4..] != END_MAGIC || u64::from_be_bytes(len) != HEAD_BYTES + body {
        return Ok(Err("its end is missing".into()));
    }
    if foot[..4] != sum.to_be_bytes() {
        return Ok(Err("its checksum does not match".into()));
    }
    Ok(Ok((body, version)))
}

fn damaged(path: &Path, detail: String) -> StorageError {
    StorageError::Damaged { what: format!("redo file {}", path.display()), detail }
}

/// Counts and sums what passes through.
struct Checked<T> {
    inner: T,
    sum: u32,
    count: u64,
}

impl<T> Checked<T> {
    fn new(inner: T) -> Checked<T> {
        Checked { inner, sum: 0, count: 0 }
    }

    fn pass(&mut self, bytes: &[u8]) {
        self.sum = crc32c::crc32c_append(self.sum, bytes);
        self.count += bytes.len() as u64;
    }
}

impl<T: Read> Read for Checked<T> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.pass(&buffer[..read]);
        Ok(read)
    }
}

impl<T: Write> Write for Checked<T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.pass(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::state::tests::initial;

    fn section(replica: u64, generation: u32) -> Section {
        Section { replica: ReplicaId(replica), generation, base: 4, header: initial() }
    }

    fn sample(dir: &Path, sequence: u64) -> PathBuf {
        let mut writer = RedoWriter::create(dir, sequence).unwrap();
        writer.section(&section(1, 0)).unwrap();
        writer.change(keys::KIND_USER, b"a", Some(b"one")).unwrap();
        writer.change(keys::KIND_USER, b"b", None).unwrap();
        writer.change(keys::KIND_SESSION, b"id", Some(b"record")).unwrap();
        writer.change(keys::KIND_SESSION, b"jd", None).unwrap();
        writer.section(&section(2, 3)).unwrap();
        writer.change(keys::KIND_USER, b"", Some(&[7; 100_000])).unwrap();
        writer.finish().unwrap()
    }

    fn read(path: &Path, sequence: u64) -> Result<Vec<Record>, StorageError> {
        let mut reader = RedoReader::open(path, sequence)?;
        let mut records = Vec::new();
        while let Some(record) = reader.read()? {
            records.push(record);
        }
        Ok(records)
    }

    #[test]
    fn a_file_gives_back_its_records() {
        let dir = tempfile::tempdir().unwrap();
        let path = sample(dir.path(), 17);
        assert_eq!(list(dir.path()).unwrap(), [(17, path.clone())]);
        let records = read(&path, 17).unwrap();
        assert_eq!(
            records,
            [
                Record::Section(section(1, 0)),
                Record::Change(keys::KIND_USER, b"a".to_vec(), Some(Bytes::from_static(b"one"))),
                Record::Change(keys::KIND_USER, b"b".to_vec(), None),
                Record::Change(keys::KIND_SESSION, b"id".to_vec(), Some(Bytes::from_static(b"record"))),
                Record::Change(keys::KIND_SESSION, b"jd".to_vec(), None),
                Record::Section(section(2, 3)),
                Record::Change(keys::KIND_USER, Vec::new(), Some(vec![7; 100_000].into())),
            ]
        );
    }

    #[test]
    fn unfinished_files_do_not_count() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = RedoWriter::create(dir.path(), 3).unwrap();
        writer.section(&section(1, 0)).unwrap();
        drop(writer);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert_eq!(list(dir.path()).unwrap(), []);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        fs::write(dir.path().join("notes.txt"), "x").unwrap();
        assert!(list(dir.path()).is_err(), "a stranger's file");
    }

    #[test]
    fn a_file_of_the_first_format_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = RedoWriter::create(dir.path(), 1).unwrap();
        writer.section(&section(1, 0)).unwrap();
        writer.change(keys::KIND_USER, b"key", Some(b"value")).unwrap();
        let path = writer.finish().unwrap();
        let mut bytes = fs::read(&path).unwrap();
        let body = bytes.len() - 12;
        bytes[11] = 1;
        let sum = crc32c::crc32c(&bytes[..body]).to_be_bytes();
        bytes[body..body + 4].copy_from_slice(&sum);
        fs::write(&path, &bytes).unwrap();
        assert_eq!(read(&path, 1).unwrap().len(), 2);
        bytes[11] = 3;
        let sum = crc32c::crc32c(&bytes[..body]).to_be_bytes();
        bytes[body..body + 4].copy_from_slice(&sum);
        fs::write(&path, &bytes).unwrap();
        let error = read(&path, 1).unwrap_err().to_string();
        assert!(error.contains("has format 3, this program knows up to 2"), "{error}");
    }

    #[test]
    fn every_cut_and_every_flipped_bit_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = RedoWriter::create(dir.path(), 1).unwrap();
        writer.section(&section(1, 0)).unwrap();
        writer.change(keys::KIND_USER, b"key", Some(b"value")).unwrap();
        writer.change(keys::KIND_SESSION, b"id", Some(b"record")).unwrap();
        let path = writer.finish().unwrap();
        let bytes = fs::read(&path).unwrap();
        assert!(read(&path, 1).is_ok());
        assert!(read(&path, 2).is_err(), "a renamed file");
        for len in 0..bytes.len() {
            fs::write(&path, &bytes[..len]).unwrap();
            assert!(matches!(read(&path, 1), Err(StorageError::Damaged { .. })), "cut at {len}");
        }
        for place in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[place] ^= 0x10;
            fs::write(&path, &flipped).unwrap();
            assert!(matches!(read(&path, 1), Err(StorageError::Damaged { .. })), "flipped at {place}");
        }
    }
}
