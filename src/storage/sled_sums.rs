//! Sums over sled's file, kept beside its directory, so that damage is seen that sled doesn't see.
//!
//! sled has a checksum in each message, but when it opens it takes a message that fails for the end of
//! its segment, and a segment whose head fails for a free one: pages then read as they were before. (Read
//! in its source, and tried: a bit that is flipped in what was written since the last opening goes
//! unnoticed, and keys have old values, or none.) A file that was cut, or replaced by an older copy, opens
//! just as well. So:
//!
//! - After each sync of the store, the sum of each segment that has changed is added to a file of our own,
//!   with one small sync. Segments are written once, from the front; the one that is being filled is summed
//!   up to its last message.
//! - Before sled opens its file, each segment that has the number (the LSN) it had at the last sync must
//!   have its sum; one with a later number was written since, and must be whole if it says that it is not
//!   the last; anything else is damage.
//!
//! What sled may do between two syncs, so that it is no damage: it writes new segments, in new places or
//! over those that it has no use for, and cuts such off the end of the file. While it opens it fills
//! them with zeros: that is noted before (`OPENING`), as nothing else would tell. It cuts on threads of its
//! own, at any time after whatever made a segment free, so that a cut may follow on the last sync without a
//! newer segment. Sums of a store that is open say that it is (`SEALED_OPEN`): its end may be missing then,
//! as sled cuts it, at a segment's beginning and never the newest. The number of the last flush, which is
//! in the store, limits what that can hide ([`super::flush`]). Only when sled has closed the store, and its
//! lock tells that no thread of it is left that might cut, are there sums of it that hold to the byte
//! (`SEALED`).
//!
//! The file: magic `PONTSUMS`, format version (4 bytes), then records: length (4) and crc32c (4) of what
//! follows, kind (1). Kinds [`SEALED`] and [`SEALED_OPEN`]: number of segments (4), then index (4), LSN (8),
//! bytes (4) and their crc32c (4) of each that has changed. All big endian. A last record that is cut short
//! was never relied on. Version 1 had no [`SEALED_OPEN`]: its sums are all taken for such.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::atomic_file::{self, io_error, sync_error};
use super::identity::IdentityError;
use super::{StorageError, beside};
use crate::telemetry::hot::hot;

/// Ending of the file's name, after that of the store's directory.
pub(super) const ENDING: &str = "sums";

const MAGIC: &[u8; 8] = b"PONTSUMS";
const FORMAT_VERSION: u32 = 2;
/// These are the sums of the store as it was closed.
const SEALED: u8 = 1;
/// sled is opening the store.
const OPENING: u8 = 2;
/// These are the sums of the store as it was synced, and sled has it open.
const SEALED_OPEN: u8 = 3;

/// Bytes of a segment, as sled has them by default.
const SEGMENT_BYTES: usize = 512 << 10;
const SEGMENT_HEAD_BYTES: usize = 20;
/// sled begins no message closer to the end of a segment.
const MESSAGE_HEAD_BYTES_MAX: usize = 32;
/// Kinds of messages: all smaller ones but 0, which is what free space is filled with, follow this.
const KIND_MAX: u8 = 11;
const KIND_CAP: u8 = 2;

/// Of a greater store, only what sled doesn't verify when it is read is looked through at a start.
const WHOLE_CHECK_BYTES_MAX: u64 = 1 << 30;
/// Far more than a node has: 64 TiB.
const SEGMENTS_MAX: u32 = 1 << 27;
/// The file is written anew when it is this much greater than twice its content.
const SLACK_BYTES: u64 = 64 << 10;

/// How long sled may take to end its cuts when it has closed the store; after that the sums stay those of
/// an open one.
const CLOSE_ATTEMPTS: u32 = 100;
const CLOSE_RETRY: Duration = Duration::from_millis(10);

/// What is known of a segment since the last sync.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Sum {
    /// [`NO_LSN`]: no segment of sled's, and whatever it is doesn't matter.
    lsn: u64,
    bytes: u32,
    sum: u32,
}

const NO_LSN: u64 = u64::MAX;

/// What is known of each segment, in the order of the file; `None`: it was blank.
type Segments = Vec<Option<Sum>>;

/// How a segment looks in the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Seen {
    /// The file ends before it.
    Missing,
    /// Never used, or filled with zeros since.
    Blank,
    /// Not sled's.
    Unreadable,
    /// Number of the segment, and the last that is stable, as it says.
    Head { lsn: u64, stable: u64 },
}

/// The sums of one store.
pub(super) struct SledSums {
    path: PathBuf,
    db: File,
    db_path: PathBuf,
    segments: Segments,
    /// Open for appending; `None`: to be written as a whole.
    file: Option<File>,
    bytes: u64,
    /// Kind of the last record; `None`: there is none, or it is unknown.
    last: Option<u8>,
    known: bool,
}

impl SledSums {
    /// Verifies the store in `dir`, which is about to be opened. Without sums it isn't known what it
    /// should be; see [`SledSums::known`].
    pub fn open(dir: &Path) -> Result<SledSums, StorageError> {
        let (path, db_path) = (beside(dir, ENDING), dir.join("db"));
        let db = File::open(&db_path).map_err(io_error("opening", &db_path))?;
        let empty = db.metadata().map_err(io_error("reading", &db_path))?.len() == 0;
        let read = read(&path)?;
        let known = read.is_some() || empty;
        let (segments, kind) = read.unwrap_or((Segments::new(), SEALED_OPEN));
        let mut sums = SledSums { path, db, db_path, segments, file: None, bytes: 0, last: None, known };
        if known {
            sums.check(dir, kind)?;
            sums.rewrite(OPENING)?;
        }
        Ok(sums)
    }

    /// Whether there were sums, or no store yet.
    pub fn known(&self) -> bool {
        self.known
    }

    /// Bytes of the store: to be asked for before that is synced, since the length of a cut that came
    /// later may not survive a power loss.
    pub fn store_bytes(&self) -> Result<u64, StorageError> {
        Ok(self.db.metadata().map_err(io_error("reading", &self.db_path))?.len())
    }

    /// Notes the sums of the store as it is while sled has it open. Everything that was written to it is
    /// durable, nobody writes to it meanwhile, and it had `store_bytes` before it was synced.
    pub fn seal(&mut self, store_bytes: u64) -> Result<(), StorageError> {
        self.seal_as(SEALED_OPEN, store_bytes)
    }

    /// No sums of it are made any more: what it holds can't be relied on.
    pub fn distrust(&mut self) {
        self.last = None;
    }

    /// Notes the sums of the store that sled has closed, unless one of its threads still has the file.
    fn close(&mut self) -> Result<(), StorageError> {
        let mut attempts = 0;
        loop {
            match self.db.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if attempts < CLOSE_ATTEMPTS => {
                    attempts += 1;
                    std::thread::sleep(CLOSE_RETRY);
                }
                Err(TryLockError::WouldBlock) => return Ok(()),
                Err(TryLockError::Error(error)) => return Err(io_error("locking", &self.db_path)(error)),
            }
        }
        let bytes = self.store_bytes()?;
        hot().state_syncs.increment(1);
        self.db.sync_data().map_err(sync_error(&self.db_path))?;
        self.seal_as(SEALED, bytes)
    }

    fn seal_as(&mut self, kind: u8, store_bytes: u64) -> Result<(), StorageError> {
        let changes = self.look_at_changes(store_bytes).map_err(io_error("reading", &self.db_path))?;
        if self.last == Some(kind) && changes.is_none() {
            return Ok(());
        }
        let changes = changes.unwrap_or_default();
        let full = 2 * sum_bytes(self.segments.len()) + SLACK_BYTES;
        let record = record(kind, self.segments.len(), changes.into_iter());
        match &mut self.file {
            Some(file) if self.bytes + record.len() as u64 <= full => {
                hot().state_syncs.increment(1);
                let written = file.write_all(&record).map_err(io_error("writing", &self.path));
                let written = written.and_then(|()| file.sync_data().map_err(sync_error(&self.path)));
                self.bytes += record.len() as u64;
                self.last = written.is_ok().then_some(kind);
                if written.is_err() {
                    // Nothing may follow on a part of a record.
                    self.file = None;
                }
                written
            }
            _ => self.rewrite(kind),
        }
    }

    /// Writes all that is known as one record, and that sled is opening the store if it is.
    fn rewrite(&mut self, kind: u8) -> Result<(), StorageError> {
        let known = self.segments.iter().enumerate();
        let known = known.filter_map(|(index, sum)| sum.map(|sum| (index, sum)));
        let mut bytes = [&MAGIC[..], &FORMAT_VERSION.to_be_bytes()].concat();
        let sealed = if kind == OPENING { SEALED_OPEN } else { kind };
        bytes.extend(record(sealed, self.segments.len(), known));
        if kind == OPENING {
            bytes.extend(record(OPENING, 0, std::iter::empty()));
        }
        // An older handle would write to the file that is replaced.
        self.file = None;
        atomic_file::replace(&self.path, &bytes)?;
        let open = OpenOptions::new().append(true).open(&self.path);
        self.file = Some(open.map_err(io_error("opening", &self.path))?);
        self.bytes = bytes.len() as u64;
        self.last = Some(kind);
        Ok(())
    }

    /// Brings the sums up to date: those that have changed, `None` if nothing has.
    fn look_at_changes(&mut self, store_bytes: u64) -> io::Result<Option<Vec<(usize, Sum)>>> {
        let count = segments_in(store_bytes);
        let seen: Vec<Seen> = (0..count).map(|index| look(&self.db, index)).collect::<io::Result<_>>()?;
        let last = seen.iter().filter_map(Seen::lsn).max();
        let mut changed = count != self.segments.len();
        let mut changes = Vec::new();
        let mut buffer = Vec::new();
        self.segments.resize(count, None);
        for (index, (seen, known)) in seen.iter().zip(&mut self.segments).enumerate() {
            let now = match seen {
                // Cut off since the sync: a power loss may bring it back.
                Seen::Missing => *known,
                Seen::Blank => None,
                Seen::Unreadable => Some(Sum { lsn: NO_LSN, bytes: 0, sum: 0 }),
                Seen::Head { lsn, .. } => {
                    let mut sum =
                        known.filter(|sum| sum.lsn == *lsn).unwrap_or(Sum { lsn: *lsn, bytes: 0, sum: 0 });
                    if (sum.bytes as usize) < SEGMENT_BYTES {
                        read_segment(&self.db, index, &mut buffer)?;
                        let end = if Some(*lsn) == last {
                            messages_end(&buffer, *lsn, sum.bytes as usize).at()
                        } else {
                            buffer.len()
                        };
                        if let Some(more) = buffer.get(sum.bytes as usize..end) {
                            sum = Sum { sum: crc32c::crc32c_append(sum.sum, more), bytes: end as u32, ..sum };
                        }
                    }
                    Some(sum)
                }
            };
            if *known != now {
                *known = now;
                changed = true;
                changes.push((index, now.unwrap_or(Sum { lsn: NO_LSN, bytes: 0, sum: 0 })));
            }
        }
        Ok(changed.then_some(changes))
    }

    /// Whether the file can be what it was at the last sync, with what sled may have done to it since.
    fn check(&self, dir: &Path, kind: u8) -> Result<(), StorageError> {
        let unread = |source| io_error("reading", &self.db_path)(source);
        let len = self.db.metadata().map_err(unread)?.len();
        let count = segments_in(len).max(self.segments.len());
        let mut seen = Vec::with_capacity(count);
        for index in 0..count {
            seen.push(look(&self.db, index).map_err(unread)?);
        }
        let known = self.segments.iter().flatten().filter(|sum| sum.lsn != NO_LSN);
        let sealed_to = known.map(|sum| sum.lsn).max();
        let is_newer = |lsn: u64| sealed_to.is_none_or(|to| lsn > to);
        let written_since = seen.iter().filter_map(Seen::lsn).any(is_newer);
        let stable = seen.iter().filter_map(Seen::stable).max().unwrap_or(0);
        let unverified = if len <= WHOLE_CHECK_BYTES_MAX { 0 } else { newest_snapshot(dir)? };
        let opening = kind == OPENING;
        let cut = kind == SEALED_OPEN && len % SEGMENT_BYTES as u64 == 0;
        let newest = seen.iter().rposition(|seen| seen.lsn().is_some_and(is_newer));
        let mut buffer = Vec::new();
        for (index, seen) in seen.iter().enumerate() {
            let known = self.segments.get(index).copied().flatten();
            let damaged = |detail: &str| StorageError::Damaged {
                what: format!("state store {}", dir.display()),
                detail: format!("segment {index} of its file `db` {detail}"),
            };
            match (known, *seen) {
                (Some(sum), Seen::Head { lsn, .. }) if sum.lsn == lsn => {
                    let begun_since = written_since && (sum.bytes as usize) < SEGMENT_BYTES;
                    if lsn + SEGMENT_BYTES as u64 <= unverified && !begun_since {
                        continue;
                    }
                    read_segment(&self.db, index, &mut buffer).map_err(unread)?;
                    let sealed = buffer.get(..sum.bytes as usize);
                    if sealed.is_none_or(|bytes| crc32c::crc32c(bytes) != sum.sum) {
                        return Err(damaged("has not the sum that it had"));
                    }
                    if begun_since && is_whole(lsn, stable) {
                        messages_end(&buffer, lsn, sum.bytes as usize).whole().map_err(damaged)?;
                    }
                }
                (_, Seen::Head { lsn, .. }) if is_newer(lsn) => {
                    if is_whole(lsn, stable) {
                        read_segment(&self.db, index, &mut buffer).map_err(unread)?;
                        messages_end(&buffer, lsn, 0).whole().map_err(damaged)?;
                    }
                }
                (None, Seen::Missing | Seen::Blank) => {}
                (Some(Sum { lsn: NO_LSN, .. }), Seen::Missing | Seen::Blank | Seen::Unreadable) => {}
                (Some(_), Seen::Missing) if opening || written_since => {}
                (Some(sum), Seen::Missing) if cut && sealed_to != Some(sum.lsn) => {}
                (Some(_), Seen::Blank) if opening => {}
                // Cut off, and the file was then written beyond it, which sled does in no order.
                (Some(_), Seen::Blank) if kind == SEALED_OPEN && newest.is_some_and(|at| at > index) => {
                    read_segment(&self.db, index, &mut buffer).map_err(unread)?;
                    if buffer.iter().any(|byte| *byte != 0) {
                        return Err(damaged("is blank"));
                    }
                }
                (_, Seen::Missing) => return Err(damaged("is missing")),
                (_, Seen::Blank) => return Err(damaged("is blank")),
                (_, Seen::Unreadable) => return Err(damaged("has a head that can't be read")),
                (_, Seen::Head { .. }) => return Err(damaged("is of another time")),
            }
        }
        Ok(())
    }
}

impl Drop for SledSums {
    /// sled has closed the store, or else still has its lock.
    fn drop(&mut self) {
        if self.last == Some(SEALED_OPEN)
            && let Err(error) = self.close()
        {
            tracing::warn!(%error, "the next start will take the state store for one that wasn't closed");
        }
    }
}

impl Seen {
    fn lsn(&self) -> Option<u64> {
        match self {
            Seen::Head { lsn, .. } => Some(*lsn),
            _ => None,
        }
    }

    fn stable(&self) -> Option<u64> {
        match self {
            Seen::Head { stable, .. } => Some(*stable),
            _ => None,
        }
    }
}

/// Whether all of a segment is on disk if everything up to `stable`, inclusive, is.
fn is_whole(lsn: u64, stable: u64) -> bool {
    lsn.checked_add(SEGMENT_BYTES as u64).is_some_and(|end| end <= stable.saturating_add(1))
}

fn segments_in(len: u64) -> usize {
    usize::try_from(len.div_ceil(SEGMENT_BYTES as u64)).unwrap_or(usize::MAX)
}

fn sum_bytes(segments: usize) -> u64 {
    32 + 20 * segments as u64
}

fn record(kind: u8, segments: usize, sums: impl Iterator<Item = (usize, Sum)>) -> Vec<u8> {
    let mut body = vec![kind];
    if kind != OPENING {
        body.extend((segments as u32).to_be_bytes());
        for (index, Sum { lsn, bytes, sum }) in sums {
            body.extend((index as u32).to_be_bytes());
            body.extend(lsn.to_be_bytes());
            body.extend(bytes.to_be_bytes());
            body.extend(sum.to_be_bytes());
        }
    }
    let mut record = (body.len() as u32).to_be_bytes().to_vec();
    record.extend(crc32c::crc32c(&body).to_be_bytes());
    record.extend(body);
    record
}

/// What a file of sums says: the segments, and the kind of the last record; `None` if there is no file.
fn read(path: &Path) -> Result<Option<(Segments, u8)>, StorageError> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io_error("reading", path)(error)),
    };
    let damaged = |detail: &str| StorageError::Damaged {
        what: format!("the sums of the state store, {},", path.display()),
        detail: detail.into(),
    };
    let mut rest = bytes.strip_prefix(MAGIC).ok_or_else(|| damaged("it doesn't begin as such a file"))?;
    let version = take_u32(&mut rest).ok_or_else(|| damaged("it is cut short"))?;
    if !(1..=FORMAT_VERSION).contains(&version) {
        let path = path.display().to_string();
        return Err(IdentityError::Newer { path, found: version, known: FORMAT_VERSION }.into());
    }
    let (mut segments, mut last, mut any) = (Vec::new(), OPENING, false);
    // What follows on a record that can't be read isn't believed. The store is then held against sums of
    // an earlier sync, which it has to fit as well.
    while let Some(mut body) = take_record(&mut rest) {
        match body.split_off_first() {
            Some(&kind @ (SEALED | SEALED_OPEN)) => {
                let applied = apply(&mut segments, body);
                applied.ok_or_else(|| damaged("a record is of an impossible length"))?;
                (last, any) = (if version == 1 { SEALED_OPEN } else { kind }, true);
            }
            Some(&OPENING) => last = OPENING,
            _ => return Err(damaged("it has a record of an unknown kind")),
        }
    }
    if !any {
        return Err(damaged("it has no sums"));
    }
    Ok(Some((segments, last)))
}

fn take_u32(bytes: &mut &[u8]) -> Option<u32> {
    let (number, rest) = bytes.split_first_chunk::<4>()?;
    *bytes = rest;
    Some(u32::from_be_bytes(*number))
}

fn take_record<'a>(bytes: &mut &'a [u8]) -> Option<&'a [u8]> {
    let len = take_u32(bytes)?;
    let sum = take_u32(bytes)?;
    let (body, rest) = bytes.split_at_checked(len as usize)?;
    *bytes = rest;
    (crc32c::crc32c(body) == sum).then_some(body)
}

fn apply(segments: &mut Segments, mut body: &[u8]) -> Option<()> {
    let count = take_u32(&mut body).filter(|count| *count <= SEGMENTS_MAX)?;
    segments.resize(count as usize, None);
    while !body.is_empty() {
        let index = take_u32(&mut body)? as usize;
        let (lsn, rest) = body.split_first_chunk::<8>()?;
        body = rest;
        let sum =
            Sum { lsn: u64::from_be_bytes(*lsn), bytes: take_u32(&mut body)?, sum: take_u32(&mut body)? };
        *segments.get_mut(index)? = Some(sum);
    }
    Some(())
}

/// The greatest number of a snapshot of sled's: what is on pages that were written before has its
/// checksum verified when it is read.
fn newest_snapshot(dir: &Path) -> Result<u64, StorageError> {
    let mut newest = 0;
    for item in fs::read_dir(dir).map_err(io_error("listing", dir))? {
        let name = item.map_err(io_error("listing", dir))?.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("snap."));
        if let Some(number) = number.and_then(|number| u64::from_str_radix(number, 16).ok()) {
            newest = newest.max(number / SEGMENT_BYTES as u64 * SEGMENT_BYTES as u64);
        }
    }
    Ok(newest)
}

fn look(db: &File, index: usize) -> io::Result<Seen> {
    let mut head = [0; SEGMENT_HEAD_BYTES];
    let read = read_at(db, &mut head, index)?;
    if read == 0 {
        return Ok(Seen::Missing);
    }
    if head == [0; SEGMENT_HEAD_BYTES] {
        return Ok(Seen::Blank);
    }
    let number = |at: usize| {
        let bytes: [u8; 8] = std::array::from_fn(|i| head[at + i]);
        u64::from_le_bytes(bytes) ^ (u64::MAX >> 1)
    };
    let sum = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) ^ u32::MAX;
    let (lsn, stable) = (number(4), number(12));
    // Both are signed there; a segment that knows of nothing stable has -1.
    let stable = if stable > u64::MAX >> 1 { 0 } else { stable };
    let whole = read == head.len() && crc32fast::hash(&head[4..]) == sum && lsn <= u64::MAX >> 1;
    Ok(if whole { Seen::Head { lsn, stable } } else { Seen::Unreadable })
}

fn read_segment(db: &File, index: usize, buffer: &mut Vec<u8>) -> io::Result<()> {
    buffer.resize(SEGMENT_BYTES, 0);
    let read = read_at(db, buffer, index)?;
    buffer.truncate(read);
    Ok(())
}

/// Reads from the beginning of a segment as much as there is.
fn read_at(db: &File, buffer: &mut [u8], index: usize) -> io::Result<usize> {
    let at = index as u64 * SEGMENT_BYTES as u64;
    let mut read = 0;
    while read < buffer.len() {
        match db.read_at(&mut buffer[read..], at + read as u64) {
            Ok(0) => break,
            Ok(more) => read += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(read)
}

/// Where the messages of a segment end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum End {
    /// There is no room for another.
    Full(usize),
    /// Here, before the end of the segment.
    Early(usize),
}

impl End {
    fn at(self) -> usize {
        match self {
            End::Full(at) | End::Early(at) => at,
        }
    }

    fn whole(self) -> Result<(), &'static str> {
        match self {
            End::Full(_) => Ok(()),
            End::Early(_) => Err("has a message that can't be read"),
        }
    }
}

/// Walks the messages of a segment, from where one begins on (0: the first).
fn messages_end(segment: &[u8], lsn: u64, from: usize) -> End {
    let mut at = from.max(SEGMENT_HEAD_BYTES);
    loop {
        if at + MESSAGE_HEAD_BYTES_MAX > SEGMENT_BYTES {
            return End::Full(segment.len());
        }
        match segment.get(at..).and_then(|bytes| message(bytes, lsn / SEGMENT_BYTES as u64)) {
            Some((KIND_CAP, _)) => return End::Full(segment.len()),
            Some((_, len)) => at += len,
            None => return End::Early(at.min(segment.len())),
        }
    }
}

/// Kind and length of the message that `bytes` begin with, if it is whole and of this segment. A message
/// is a checksum (4 bytes), its kind (1), length of the body, number of the segment, number of the page
/// (up to 9 each), and the body.
fn message(bytes: &[u8], segment: u64) -> Option<(u8, usize)> {
    let (sum, rest) = bytes.split_first_chunk::<4>()?;
    let (&kind, mut rest) = rest.split_first()?;
    let len = usize::try_from(varint(&mut rest)?).ok()?;
    let of = varint(&mut rest)?;
    varint(&mut rest)?;
    let body = rest.get(..len)?;
    let head = &bytes[4..bytes.len() - rest.len()];
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(body);
    hasher.update(head);
    let whole = hasher.finalize() ^ u32::MAX == u32::from_le_bytes(*sum);
    (whole && of == segment && (1..=KIND_MAX).contains(&kind)).then_some((kind, 4 + head.len() + len))
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let (&first, rest) = bytes.split_first()?;
    let (len, number) = match first {
        0..=240 => (0, u64::from(first)),
        241..=248 => (1, 240 + 256 * (u64::from(first) - 241) + u64::from(*rest.first()?)),
        249 => (2, 2288 + 256 * u64::from(*rest.first()?) + u64::from(*rest.get(1)?)),
        _ => {
            let len = usize::from(first - 247);
            let mut number = [0; 8];
            number[..len].copy_from_slice(rest.get(..len)?);
            (len, u64::from_le_bytes(number))
        }
    };
    *bytes = rest.get(len..)?;
    Some(number)
}

#[cfg(test)]
#[path = "sled_sums_tests.rs"]
mod tests;
