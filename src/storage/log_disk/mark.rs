//! How far the log certainly reaches, written beside it: what the log itself can't tell once its tail,
//! or one of its files, is gone.
//!
//! A [`Reach`] says which files of both queues of the engine there must be, how long the closed ones
//! are together, and up to where the last one was synced. Each synced batch carries one, of the moment
//! before it; and after the sync one goes into the *mark*, a small file beside the log's directory,
//! by one `pwrite` without a sync:
//!
//! - After a kill the page cache has the mark, and a log that falls short of it has lost what was
//!   acknowledged.
//! - After a power cut the mark may be an older one, never one ahead of the log: nothing is written to it
//!   before the log's own sync has returned.
//! - A file is removed only when a mark that doesn't ask for it any more is durable. So a file that even an
//!   old mark asks for is there, whenever the crash came.
//!
//! The file has two slots, written in turn, each in a sector of its own: a torn write leaves the other.
//!
//! | bytes of a slot | what |
//! |---|---|
//! | 8 | magic |
//! | 4 | format version, big-endian |
//! | 8 | number of the write, little-endian; the slot with the greater one counts |
//! | 16 | store id |
//! | 72 | the reach: nine numbers, little-endian |
//! | 4 | crc32c of all before, little-endian |

use std::fs;
use std::io::{self, ErrorKind, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use raft_engine::env::{FileSystem, Handle};
use raft_engine::internals::LogQueue;

use crate::ids::StoreId;
use crate::storage::{StorageError, atomic_file};

const MAGIC: &[u8; 8] = b"PONTLOGM";
const FORMAT: u32 = 1;
/// Distance of the slots: the smallest unit that a disk writes.
const SLOT_BYTES: u64 = 512;
const CONTENT_BYTES: usize = 8 + 4 + 8 + 16 + REACH_BYTES + 4;
/// Length of an encoded [`Reach`].
pub const REACH_BYTES: usize = 9 * 8;

/// The queues of the engine, as its own index.
pub const QUEUES: [LogQueue; 2] = [LogQueue::Append, LogQueue::Rewrite];

/// The files of one queue that there must be. They are numbered without a gap.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Span {
    /// The first file that is needed.
    pub first: u64,
    /// The last file; 0: nothing is known of any.
    pub last: u64,
    /// Bytes of the files before the last together: they never change any more.
    pub closed_bytes: u64,
    /// Bytes of the last file that were synced.
    pub end: u64,
}

/// How far the log reaches, all of it durable.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Reach {
    /// Synced writes since the log was made.
    pub writes: u64,
    /// The files of each queue.
    pub spans: [Span; 2],
}

impl Reach {
    /// So far that nothing may be cut off.
    pub const MAX: Reach = {
        let span = Span { first: 0, last: u64::MAX, closed_bytes: 0, end: u64::MAX };
        Reach { writes: 0, spans: [span; 2] }
    };

    /// As bytes.
    pub fn encode(&self) -> [u8; REACH_BYTES] {
        let [a, r] = self.spans;
        let numbers =
            [self.writes, a.first, a.last, a.closed_bytes, a.end, r.first, r.last, r.closed_bytes, r.end];
        let mut bytes = [0; REACH_BYTES];
        for (to, number) in bytes.chunks_exact_mut(8).zip(numbers) {
            to.copy_from_slice(&number.to_le_bytes());
        }
        bytes
    }

    /// From bytes; `None` if their number is wrong.
    pub fn decode(bytes: &[u8]) -> Option<Reach> {
        let mut numbers = [0; 9];
        if bytes.len() != REACH_BYTES {
            return None;
        }
        for (number, from) in numbers.iter_mut().zip(bytes.chunks_exact(8)) {
            *number = u64::from_le_bytes(from.try_into().ok()?);
        }
        let span = |at: usize| Span {
            first: numbers[at],
            last: numbers[at + 1],
            closed_bytes: numbers[at + 2],
            end: numbers[at + 3],
        };
        Some(Reach { writes: numbers[0], spans: [span(1), span(5)] })
    }
}

/// Where the mark of the log in `dir` is: beside it, so that an old copy of the whole directory
/// falls short of it.
pub fn path_of(dir: &Path) -> PathBuf {
    let mut path = dir.as_os_str().to_owned();
    path.push(".mark");
    PathBuf::from(path)
}

/// What lies where the mark should be.
#[derive(PartialEq, Debug)]
pub enum Found {
    /// Nothing.
    Absent,
    /// Something that is no mark of this log, and why.
    Unusable(String),
    /// The mark, and the number of the write that made it.
    Mark(u64, Reach),
}

/// Looks for a mark.
pub fn read(path: &Path, store_id: StoreId) -> Result<Found, StorageError> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Found::Absent),
        Err(error) => return Err(atomic_file::io_error("reading", path)(error)),
    };
    let slots = [0, SLOT_BYTES as usize].map(|at| decode(bytes.get(at..).unwrap_or_default(), store_id));
    let newest = slots.iter().flatten().max_by_key(|(version, _)| *version);
    Ok(match (newest, &slots[0]) {
        (Some(&(version, reach)), _) => Found::Mark(version, reach),
        (None, Err(reason)) => Found::Unusable(reason.clone()),
        (None, Ok(_)) => Found::Unusable("it has no content".into()),
    })
}

fn encode(version: u64, store_id: StoreId, reach: &Reach) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(CONTENT_BYTES);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&FORMAT.to_be_bytes());
    bytes.extend_from_slice(&version.to_le_bytes());
    bytes.extend_from_slice(&store_id.0);
    bytes.extend_from_slice(&reach.encode());
    let sum = crc32c::crc32c(&bytes);
    bytes.extend_from_slice(&sum.to_le_bytes());
    bytes
}

fn decode(slot: &[u8], store_id: StoreId) -> Result<(u64, Reach), String> {
    let short = || format!("{} bytes are too few", slot.len());
    let slot = slot.get(..CONTENT_BYTES).ok_or_else(short)?;
    let (content, sum) = slot.split_last_chunk::<4>().ok_or_else(short)?;
    if u32::from_le_bytes(*sum) != crc32c::crc32c(content) {
        return Err("its checksum does not match".into());
    }
    let (magic, rest) = content.split_first_chunk::<8>().ok_or_else(short)?;
    let (format, rest) = rest.split_first_chunk::<4>().ok_or_else(short)?;
    if magic != MAGIC || u32::from_be_bytes(*format) != FORMAT {
        return Err("it is of a kind that this program doesn't know".into());
    }
    let (version, rest) = rest.split_first_chunk::<8>().ok_or_else(short)?;
    let (owner, rest) = rest.split_first_chunk::<16>().ok_or_else(short)?;
    if *owner != store_id.0 {
        return Err("it belongs to another data directory".into());
    }
    let reach = Reach::decode(rest).ok_or_else(short)?;
    Ok((u64::from_le_bytes(*version), reach))
}

/// The mark, open for writing.
pub struct MarkFile<F: FileSystem> {
    path: PathBuf,
    handle: Arc<F::Handle>,
    writer: F::Writer,
    store_id: StoreId,
    /// Number of the last write.
    version: u64,
    /// What is on the disk whatever happens: a lower bound.
    durable: Reach,
    /// Why nothing more can be promised of it: a sync failed.
    failed: Option<String>,
    /// A write failed, and that was said.
    warned: bool,
}

impl<F: FileSystem> MarkFile<F> {
    /// Opens the mark, or makes one, that is durable and says `reach`. `version` is that of the mark that
    /// was found.
    pub fn open(
        files: &F,
        path: &Path,
        store_id: StoreId,
        version: u64,
        reach: &Reach,
    ) -> Result<MarkFile<F>, StorageError> {
        let create = || {
            let handle = Arc::new(files.create(path)?);
            Ok((files.new_writer(handle.clone())?, handle))
        };
        let (writer, handle) = create().map_err(atomic_file::io_error("creating", path))?;
        let mut mark: MarkFile<F> = MarkFile {
            path: path.to_owned(),
            handle,
            writer,
            store_id,
            version,
            durable: Reach::default(),
            failed: None,
            warned: false,
        };
        for _ in 0..2 {
            mark.put(reach).map_err(atomic_file::io_error("writing", path))?;
        }
        mark.handle.sync().map_err(atomic_file::sync_error(path))?;
        atomic_file::sync_parent(path)?;
        mark.durable = *reach;
        Ok(mark)
    }

    /// What the mark says even after a power cut, or more.
    pub fn durable(&self) -> &Reach {
        &self.durable
    }

    /// Writes `reach`, for all but a power cut. What can't be written leaves the older mark, which
    /// is no less true.
    pub fn note(&mut self, reach: &Reach) {
        let result = self.put(reach);
        match result {
            Ok(()) => self.warned = false,
            Err(error) if !std::mem::replace(&mut self.warned, true) => tracing::warn!(
                %error, path = %self.path.display(),
                "the mark of the raft log can't be written: should the log lose its tail, it may go unnoticed"
            ),
            Err(_) => {}
        }
    }

    /// Writes `reach` into both slots, durably. A failed sync is never tried again: every later call
    /// fails too.
    pub fn note_durably(&mut self, reach: &Reach) -> io::Result<()> {
        if let Some(reason) = &self.failed {
            return Err(io::Error::other(reason.clone()));
        }
        for _ in 0..2 {
            self.put(reach)?;
        }
        if let Err(error) = self.handle.sync() {
            let reason = format!("syncing {}: {error}", self.path.display());
            self.failed = Some(reason.clone());
            return Err(io::Error::other(reason));
        }
        self.durable = *reach;
        Ok(())
    }

    /// Why the mark's sync failed, if it did.
    pub fn failed(&self) -> Option<&str> {
        self.failed.as_deref()
    }

    fn put(&mut self, reach: &Reach) -> io::Result<()> {
        let version = self.version + 1;
        let bytes = encode(version, self.store_id, reach);
        self.writer.seek(SeekFrom::Start(version % 2 * SLOT_BYTES))?;
        self.writer.write_all(&bytes)?;
        self.version = version;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use raft_engine::env::DefaultFileSystem;

    use super::*;
    use crate::ids::RandomId;

    const OURS: StoreId = RandomId([7; 16]);

    fn reach(writes: u64) -> Reach {
        let span = |last| Span { first: 2, last, closed_bytes: 700, end: 30 + writes };
        Reach { writes, spans: [span(5), span(3)] }
    }

    #[test]
    fn the_newer_slot_counts_and_a_torn_one_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = path_of(&dir.path().join("log"));
        assert!(path.ends_with("log.mark"));
        assert_eq!(read(&path, OURS).unwrap(), Found::Absent);
        let mut mark = MarkFile::open(&DefaultFileSystem, &path, OURS, 0, &reach(1)).unwrap();
        assert_eq!(read(&path, OURS).unwrap(), Found::Mark(2, reach(1)));
        mark.note(&reach(2));
        assert_eq!(mark.durable(), &reach(1));
        mark.note(&reach(3));
        assert_eq!(read(&path, OURS).unwrap(), Found::Mark(4, reach(3)));
        // Version 4 lies in the first slot.
        let mut bytes = fs::read(&path).unwrap();
        bytes[40] ^= 1;
        fs::write(&path, &bytes).unwrap();
        assert_eq!(read(&path, OURS).unwrap(), Found::Mark(3, reach(2)));
        bytes[600] ^= 1;
        fs::write(&path, &bytes).unwrap();
        assert!(matches!(read(&path, OURS).unwrap(), Found::Unusable(_)));
        mark.note_durably(&reach(4)).unwrap();
        assert_eq!(mark.durable(), &reach(4));
        let foreign = read(&path, RandomId([8; 16])).unwrap();
        assert!(matches!(&foreign, Found::Unusable(why) if why.contains("another")), "{foreign:?}");
        fs::write(&path, b"").unwrap();
        assert!(matches!(read(&path, OURS).unwrap(), Found::Unusable(_)));
    }

    #[test]
    fn what_is_encoded_is_decoded() {
        let reach = reach(u64::MAX - 40);
        assert_eq!(Reach::decode(&reach.encode()), Some(reach));
        assert_eq!(Reach::decode(&reach.encode()[1..]), None);
        assert_eq!(Reach::decode(&[]), None);
    }
}
