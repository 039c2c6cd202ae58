//! The bytes of a snapshot: a shard's whole state at one index, however it travels. Files of them are
//! made and loaded by [`super::snapshot`].
//!
//! All numbers are big endian.
//!
//! | bytes | content |
//! |---|---|
//! | 8 | magic `PONTSNAP` |
//! | 4 | format version |
//! | 16, 8, 8 | stream id, shard, replica that made it |
//! | 4 | crc32c of all before |
//! | n | blocks: length (4), so many bytes of records, crc32c of length and records (4) |
//! | 4 | zero: no block follows |
//! | n | the end, laid out as a block: writes of the scan (8), changes of the overlays (8), the state header |
//! | 8 | how many bytes precede the zero |
//! | 16 | xxh3-128 of all before |
//! | 8 | end magic `SNAP-END` |
//!
//! The records are one sequence of bytes, cut into blocks without regard to where a record ends: `1`,
//! length of key (4), length of value (4), key, value: a write; `2`, length of key (4), key: a
//! removal; `3`: a part ends and an overlay begins. A key is what [`keys::local_key`] says, so that
//! every kind of record travels, but for the header, which comes last: nobody knows it before.
//!
//! The first part is what a scan saw, writes alone; the overlays are laid over it one after another.
//! Within a part keys ascend. Together they are the state of which the header speaks.
//!
//! The blocks' sums tell where a file is damaged, and how far an incomplete one is whole. That all
//! blocks are there, and in order, only the sum of the whole tells: it is of another kind, since a
//! crc over blocks that carry their crc hardly depends on them.

use std::io::{self, Read, Write};

use bytes::Bytes;
use xxhash_rust::xxh3::Xxh3;

use super::keys;
use super::state::StateHeader;
use crate::ids::{RandomId, ReplicaId, ShardId, StreamId};
use crate::limits;

const MAGIC: &[u8; 8] = b"PONTSNAP";
const END_MAGIC: &[u8; 8] = b"SNAP-END";
const FORMAT_VERSION: u32 = 1;
/// Bytes before the first block.
pub const HEAD_BYTES: usize = 48;
/// Bytes after the end's block.
pub const TAIL_BYTES: usize = 32;

const WRITE: u8 = 1;
const REMOVAL: u8 = 2;
const OVERLAY: u8 = 3;

/// A header is bounded by the membership, far below.
const END_BYTES_MAX: usize = 64 * 1024;
/// Bytes from the zero up to the tail.
pub const END_BLOCK_BYTES_MAX: u64 = 12 + END_BYTES_MAX as u64;
/// What the metadata machine keeps under one key may be greater than a client's value.
const VALUE_BYTES_MAX: usize = limits::FRAME_BYTES_MAX;
const LOCAL_KEY_BYTES_MAX: usize = limits::KEY_BYTES_MAX + keys::PREFIX_BYTES;

/// Where a snapshot comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Origin {
    /// Drawn for this snapshot: no other has it.
    pub stream: StreamId,
    /// The shard whose state it is.
    pub shard: ShardId,
    /// The replica that made it.
    pub replica: ReplicaId,
}

/// What the end of a snapshot says.
#[derive(Clone, PartialEq, Debug)]
pub struct Summary {
    /// Where the state stands.
    pub header: StateHeader,
    /// Writes in the first part.
    pub scanned: u64,
    /// Writes and removals in the overlays.
    pub overlaid: u64,
}

/// One record of a snapshot.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Record {
    /// A local key and its value, or `None` for a removal.
    Change(Vec<u8>, Option<Bytes>),
    /// What follows is laid over what came before.
    Overlay,
}

impl Record {
    /// Its bytes in a snapshot, about; never 0.
    pub fn size(&self) -> u64 {
        match self {
            Record::Change(key, value) => (9 + key.len() + value.as_ref().map_or(0, Bytes::len)) as u64,
            Record::Overlay => 1,
        }
    }
}

/// Why bytes can't be read as a snapshot.
#[derive(Debug)]
pub enum ReadError {
    /// The input failed.
    Io(io::Error),
    /// They are no snapshot, or a damaged one.
    Damaged(String),
}

fn damaged<T>(detail: impl Into<String>) -> Result<T, ReadError> {
    Err(ReadError::Damaged(detail.into()))
}

/// Writes a snapshot.
pub struct SnapshotWriter<W> {
    out: W,
    sum: Box<Xxh3>,
    /// Given to `out` so far.
    bytes: u64,
    block: Vec<u8>,
    order: Order,
}

impl<W: Write> SnapshotWriter<W> {
    /// Begins a snapshot.
    pub fn new(out: W, origin: Origin) -> io::Result<SnapshotWriter<W>> {
        let mut writer = SnapshotWriter {
            out,
            sum: Box::default(),
            bytes: 0,
            block: Vec::with_capacity(limits::SNAPSHOT_BLOCK_BYTES),
            order: Order::default(),
        };
        let mut head = Vec::with_capacity(HEAD_BYTES);
        head.extend_from_slice(MAGIC);
        head.extend_from_slice(&FORMAT_VERSION.to_be_bytes());
        head.extend_from_slice(&origin.stream.0);
        head.extend_from_slice(&origin.shard.0.to_be_bytes());
        head.extend_from_slice(&origin.replica.0.to_be_bytes());
        head.extend_from_slice(&crc32c::crc32c(&head).to_be_bytes());
        writer.put(&head)?;
        Ok(writer)
    }

    /// Adds a change of the current part. Its key must be above the last one of the part, and no
    /// header's; the first part has no removals. A breach of that is an error of the kind `InvalidInput`.
    pub fn change(&mut self, key: &[u8], value: Option<&[u8]>) -> io::Result<()> {
        let invalid = |reason| io::Error::new(io::ErrorKind::InvalidInput, reason);
        self.order.next(key, value.is_some()).map_err(invalid)?;
        match value {
            Some(value) => {
                self.record(&[WRITE])?;
                self.record(&length(key)?)?;
                self.record(&length(value)?)?;
                self.record(key)?;
                self.record(value)
            }
            None => {
                self.record(&[REMOVAL])?;
                self.record(&length(key)?)?;
                self.record(key)
            }
        }
    }

    /// Begins an overlay.
    pub fn overlay(&mut self) -> io::Result<()> {
        self.order.overlay();
        self.record(&[OVERLAY])
    }

    /// Completes the snapshot with the header of the state that its parts make together. Nothing may
    /// be written after that.
    pub fn finish(&mut self, header: &StateHeader) -> io::Result<Summary> {
        self.end_block()?;
        let blocks = self.bytes;
        self.put(&[0; 4])?;
        let mut end = self.order.scanned.to_be_bytes().to_vec();
        end.extend_from_slice(&self.order.overlaid.to_be_bytes());
        end.extend_from_slice(&header.encode());
        self.put_block(&end)?;
        self.put(&blocks.to_be_bytes())?;
        let sum = self.sum.digest128();
        self.put(&sum.to_be_bytes())?;
        self.put(END_MAGIC)?;
        self.out.flush()?;
        Ok(Summary { header: header.clone(), scanned: self.order.scanned, overlaid: self.order.overlaid })
    }

    /// Bytes written, and those of the block that is being filled.
    pub fn bytes(&self) -> u64 {
        self.bytes + self.block.len() as u64
    }

    /// The output.
    pub fn output(&self) -> &W {
        &self.out
    }

    /// The output, to close it.
    pub fn output_mut(&mut self) -> &mut W {
        &mut self.out
    }

    fn record(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            if self.block.len() == limits::SNAPSHOT_BLOCK_BYTES {
                self.end_block()?;
            }
            let room = limits::SNAPSHOT_BLOCK_BYTES - self.block.len();
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.block.extend_from_slice(now);
            bytes = later;
        }
        Ok(())
    }

    fn end_block(&mut self) -> io::Result<()> {
        if self.block.is_empty() {
            return Ok(());
        }
        let block = std::mem::take(&mut self.block);
        self.put_block(&block)?;
        self.block = block;
        self.block.clear();
        Ok(())
    }

    fn put_block(&mut self, block: &[u8]) -> io::Result<()> {
        let length = length(block)?;
        self.put(&length)?;
        self.put(block)?;
        self.put(&block_sum(length, block).to_be_bytes())
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)?;
        self.sum.update(bytes);
        self.bytes += bytes.len() as u64;
        Ok(())
    }
}

fn length(bytes: &[u8]) -> io::Result<[u8; 4]> {
    // Keys and values are bounded by `limits`, far below.
    let len = u32::try_from(bytes.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    Ok(len.to_be_bytes())
}

fn block_sum(length: [u8; 4], block: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&length), block)
}

/// Reads a snapshot from its beginning to its end. What it gives out is known to be what was written
/// only when [`SnapshotReader::read`] has said that there is no more.
pub struct SnapshotReader<R> {
    input: Summed<R>,
    origin: Origin,
    block: Vec<u8>,
    /// How much of `block` was given out.
    taken: usize,
    order: Order,
    summary: Option<Summary>,
}

impl<R: Read> SnapshotReader<R> {
    /// Reads the head.
    pub fn new(input: R) -> Result<SnapshotReader<R>, ReadError> {
        let mut input = Summed { inner: input, sum: Box::default(), bytes: 0 };
        let origin = read_origin(&input.array::<HEAD_BYTES>()?)?;
        Ok(SnapshotReader {
            input,
            origin,
            block: Vec::new(),
            taken: 0,
            order: Order::default(),
            summary: None,
        })
    }

    /// Where the snapshot comes from.
    pub fn origin(&self) -> Origin {
        self.origin
    }

    /// The end's content, once [`SnapshotReader::read`] has said that there is no more.
    pub fn summary(&self) -> Option<&Summary> {
        self.summary.as_ref()
    }

    /// Bytes read so far.
    pub fn bytes(&self) -> u64 {
        self.input.bytes
    }

    /// The next record; `None` if there is none and all that was read is whole.
    pub fn read(&mut self) -> Result<Option<Record>, ReadError> {
        if self.summary.is_some() {
            return Ok(None);
        }
        if self.taken == self.block.len() && !self.next_block()? {
            self.read_end()?;
            return Ok(None);
        }
        let [kind] = self.array()?;
        let (key, value) = match kind {
            WRITE => {
                let key = self.length("key", LOCAL_KEY_BYTES_MAX)?;
                let value = self.length("value", VALUE_BYTES_MAX)?;
                (self.take(key)?, Some(self.take(value)?.into()))
            }
            REMOVAL => {
                let key = self.length("key", LOCAL_KEY_BYTES_MAX)?;
                (self.take(key)?, None)
            }
            OVERLAY => {
                self.order.overlay();
                return Ok(Some(Record::Overlay));
            }
            kind => return damaged(format!("unknown kind of record {kind}")),
        };
        self.order.next(&key, value.is_some()).or_else(damaged)?;
        Ok(Some(Record::Change(key, value)))
    }

    /// Reads the next block; false at the zero that ends them.
    fn next_block(&mut self) -> Result<bool, ReadError> {
        self.taken = 0;
        self.block.clear();
        let length = self.input.array()?;
        if length == [0; 4] {
            return Ok(false);
        }
        self.input.block(length, limits::SNAPSHOT_BLOCK_BYTES, &mut self.block)?;
        Ok(true)
    }

    fn read_end(&mut self) -> Result<(), ReadError> {
        let blocks = self.input.bytes - 4;
        let length = self.input.array()?;
        let mut end = Vec::new();
        self.input.block(length, END_BYTES_MAX, &mut end)?;
        let summary = read_summary(&end)?;
        if u64::from_be_bytes(self.input.array()?) != blocks {
            return damaged("its length is not the one that it names");
        }
        let sum = self.input.sum.digest128();
        if u128::from_be_bytes(self.input.array()?) != sum {
            return damaged("its checksum does not match");
        }
        if &self.input.array()? != END_MAGIC {
            return damaged("its end is missing");
        }
        let mut beyond = [0];
        match self.input.inner.read(&mut beyond) {
            Ok(0) => {}
            Ok(_) => return damaged("something follows its end"),
            Err(error) => return Err(ReadError::Io(error)),
        }
        if (summary.scanned, summary.overlaid) != (self.order.scanned, self.order.overlaid) {
            return damaged("it does not hold as many records as it says");
        }
        self.summary = Some(summary);
        Ok(())
    }

    fn length(&mut self, what: &str, max: usize) -> Result<usize, ReadError> {
        let len = u32::from_be_bytes(self.array()?) as usize;
        if len > max { damaged(format!("a {what} of {len} bytes")) } else { Ok(len) }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], ReadError> {
        let mut bytes = [0; N];
        for byte in &mut bytes {
            if self.taken == self.block.len() && !self.next_block()? {
                return damaged("a record runs over the end");
            }
            *byte = self.block[self.taken];
            self.taken += 1;
        }
        Ok(bytes)
    }

    /// The next bytes, however many blocks they lie in. Memory is asked for as they come.
    fn take(&mut self, len: usize) -> Result<Vec<u8>, ReadError> {
        let mut bytes = Vec::with_capacity(len.min(limits::SNAPSHOT_BLOCK_BYTES));
        while bytes.len() < len {
            if self.taken == self.block.len() && !self.next_block()? {
                return damaged("a record runs over the end");
            }
            let rest = &self.block[self.taken..];
            let rest = &rest[..rest.len().min(len - bytes.len())];
            bytes.extend_from_slice(rest);
            self.taken += rest.len();
        }
        Ok(bytes)
    }
}

/// What the head says.
pub fn read_origin(head: &[u8; HEAD_BYTES]) -> Result<Origin, ReadError> {
    let number = |at: usize| u64::from_be_bytes(std::array::from_fn(|i| head[at + i]));
    if &head[..8] != MAGIC {
        return damaged("it does not begin as a snapshot");
    }
    if head[44..] != crc32c::crc32c(&head[..44]).to_be_bytes() {
        return damaged("the checksum of its head does not match");
    }
    let version = u32::from_be_bytes([head[8], head[9], head[10], head[11]]);
    if version != FORMAT_VERSION {
        return damaged(format!("format {version}; this program reads {FORMAT_VERSION}"));
    }
    Ok(Origin {
        stream: RandomId(std::array::from_fn(|i| head[12 + i])),
        shard: ShardId(number(28)),
        replica: ReplicaId(number(36)),
    })
}

/// How many bytes precede the zero, as the tail says. For a look at a file's end without reading it.
pub fn read_tail(tail: &[u8; TAIL_BYTES]) -> Result<u64, ReadError> {
    if &tail[24..] != END_MAGIC {
        return damaged("its end is missing");
    }
    Ok(u64::from_be_bytes(std::array::from_fn(|i| tail[i])))
}

/// What the end's block says: from the zero on, without the tail.
pub fn read_end(bytes: &[u8]) -> Result<Summary, ReadError> {
    let Some((zero, mut rest)) = bytes.split_first_chunk::<4>() else {
        return damaged("its end is missing");
    };
    let mut input = Summed { inner: &mut rest, sum: Box::default(), bytes: 0 };
    let length = input.array()?;
    let mut end = Vec::new();
    input.block(length, END_BYTES_MAX, &mut end)?;
    if *zero != [0; 4] || !rest.is_empty() {
        return damaged("its end is not where it should be");
    }
    read_summary(&end)
}

fn read_summary(bytes: &[u8]) -> Result<Summary, ReadError> {
    let (scanned, rest) = split_number(bytes)?;
    let (overlaid, rest) = split_number(rest)?;
    let header =
        StateHeader::decode(rest, "its header").map_err(|error| ReadError::Damaged(error.to_string()))?;
    Ok(Summary { header, scanned, overlaid })
}

fn split_number(bytes: &[u8]) -> Result<(u64, &[u8]), ReadError> {
    match bytes.split_first_chunk() {
        Some((number, rest)) => Ok((u64::from_be_bytes(*number), rest)),
        None => damaged("its end is too short"),
    }
}

/// How many of `input`'s bytes are the beginning of a snapshot and whole: the head and the blocks that
/// follow, whose checksums hold. An incomplete file goes on from there.
pub fn whole_beginning(input: impl Read) -> io::Result<(Option<Origin>, u64)> {
    let mut input = Summed { inner: input, sum: Box::default(), bytes: 0 };
    let mut whole = 0;
    let mut origin = None;
    let mut block = Vec::new();
    let mut steps = || -> Result<(), ReadError> {
        origin = Some(read_origin(&input.array::<HEAD_BYTES>()?)?);
        loop {
            whole = input.bytes;
            let length = input.array()?;
            if length == [0; 4] {
                return Ok(());
            }
            block.clear();
            input.block(length, limits::SNAPSHOT_BLOCK_BYTES, &mut block)?;
        }
    };
    match steps() {
        Err(ReadError::Io(error)) => Err(error),
        // The end is short: it is fetched again rather than looked at.
        Ok(()) | Err(ReadError::Damaged(_)) => Ok((origin, whole)),
    }
}

/// The rules on what may follow what, the same for writer and reader; counts on the way.
#[derive(Default)]
struct Order {
    scanned: u64,
    overlaid: u64,
    within_overlay: bool,
    /// Of this part; empty before the first.
    last: Vec<u8>,
}

impl Order {
    fn next(&mut self, key: &[u8], is_write: bool) -> Result<(), String> {
        match key.first() {
            None => return Err("an empty key".into()),
            Some(&keys::KIND_HEADER) => return Err("a header among the records".into()),
            Some(_) => {}
        }
        if key <= &self.last[..] {
            return Err(format!("key {} is out of order", key.escape_ascii()));
        }
        if !self.within_overlay && !is_write {
            return Err("a removal in the first part".into());
        }
        let count = if self.within_overlay { &mut self.overlaid } else { &mut self.scanned };
        *count += 1;
        self.last.clear();
        self.last.extend_from_slice(key);
        Ok(())
    }

    fn overlay(&mut self) {
        self.within_overlay = true;
        self.last.clear();
    }
}

/// Counts and sums what is read.
struct Summed<R> {
    inner: R,
    sum: Box<Xxh3>,
    bytes: u64,
}

impl<R: Read> Summed<R> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], ReadError> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    /// Reads what follows a block's length, and its checksum.
    fn block(&mut self, length: [u8; 4], max: usize, into: &mut Vec<u8>) -> Result<(), ReadError> {
        let len = u32::from_be_bytes(length) as usize;
        if len > max {
            return damaged(format!("a block of {len} bytes"));
        }
        into.resize(len, 0);
        self.fill(into)?;
        if self.array()? != block_sum(length, into).to_be_bytes() {
            return damaged(format!("the checksum of the block that ends at {} does not match", self.bytes));
        }
        Ok(())
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), ReadError> {
        self.inner.read_exact(bytes).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => ReadError::Damaged("it is cut short".into()),
            _ => ReadError::Io(error),
        })?;
        self.sum.update(bytes);
        self.bytes += bytes.len() as u64;
        Ok(())
    }
}

#[cfg(test)]
#[path = "snapshot_file_tests.rs"]
mod tests;
