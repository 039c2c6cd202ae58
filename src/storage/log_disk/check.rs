//! Looks at the engine's files before the engine does, which is more forgiving than a raft log may be:
//! it passes over files before a hole, takes anything unreadable in the last file for a torn tail and
//! cuts it off, and reads entries only when they are asked for. Here every batch of every file is read
//! once and its checksums are compared. What was acknowledged and can't be read is found before anything
//! is changed.
//!
//! A file begins with a head of magic, format version, and in version 2 an alignment that is zero here.
//! Batches follow: a head of 16 bytes (length and compression, offset of the items), entries with a
//! crc32, items with a crc32 that in version 2 is combined with the file's number, so that what is left
//! in a file that is used again doesn't count.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufReader, ErrorKind, Read};
use std::path::{Path, PathBuf};

use raft_engine::env::{FileSystem, Handle, Permission};
use raft_engine::internals::{FileId, LogQueue};

use super::mark::{QUEUES, Reach};
use crate::storage::{StorageError, atomic_file};

const MAGIC: &[u8] = b"RAFT-LOG-FILE-HEADER-9986AB3E47F320B394C8E84916EB0ED5";
const HEAD_BYTES_V1: usize = MAGIC.len() + 8;
/// Bytes of the head of a file that the engine begins.
pub const FILE_HEAD_BYTES: u64 = HEAD_BYTES_V1 as u64 + 8;
const BATCH_HEAD_BYTES: u64 = 16;
const SUM_BYTES: u64 = 4;
const READ_BYTES: usize = 256 << 10;

/// Number and size of the files of each queue.
pub type Listing = [BTreeMap<u64, u64>; 2];

/// The engine's name of a file.
pub fn file_name(queue: LogQueue, seq: u64) -> String {
    match queue {
        LogQueue::Append => format!("{seq:016}.raftlog"),
        LogQueue::Rewrite => format!("{seq:016}.rewrite"),
    }
}

/// The file that a name stands for; `None` if it belongs to no queue.
pub fn parse_name(name: &OsStr) -> Option<FileId> {
    let (number, kind) = name.to_str()?.split_once('.')?;
    let queue = match kind {
        "raftlog" => LogQueue::Append,
        "rewrite" => LogQueue::Rewrite,
        _ => return None,
    };
    Some(FileId { queue, seq: number.parse().ok()? })
}

/// Lists the files of a log.
pub fn list(dir: &Path) -> Result<Listing, StorageError> {
    let failed = || atomic_file::io_error("listing", dir);
    let mut files = Listing::default();
    for entry in std::fs::read_dir(dir).map_err(failed())? {
        let entry = entry.map_err(failed())?;
        if let Some(id) = parse_name(&entry.file_name()) {
            let bytes = entry.metadata().map_err(failed())?.len();
            files[id.queue as usize].insert(id.seq, bytes);
        }
    }
    Ok(files)
}

/// Where the last files without a hole among them begin; 0: there are none.
fn run_start(files: &BTreeMap<u64, u64>) -> u64 {
    let mut start = 0;
    for &seq in files.keys().rev() {
        if start != 0 && seq + 1 != start {
            break;
        }
        start = seq;
    }
    start
}

/// What the mark, or a record in the log, asks of the files; what is missing is the error. Files before
/// `first` need not be there: somebody who knows better has said so.
pub fn compare(files: &Listing, reach: &Reach, first: [u64; 2]) -> Result<(), String> {
    for ((queue, span), first) in QUEUES.into_iter().zip(reach.spans).zip(first) {
        let files = &files[queue as usize];
        let from = span.first.max(first);
        if span.last == 0 || from > span.last {
            continue;
        }
        if let Some(gone) = (from..=span.last).find(|seq| !files.contains_key(seq)) {
            return Err(format!("its file {} is missing", file_name(queue, gone)));
        }
        let closed: u64 = files.range(from..span.last).map(|(_, bytes)| bytes).sum();
        if from == span.first && closed != span.closed_bytes {
            return Err(format!(
                "its files before {} have {closed} bytes, but {} were written",
                file_name(queue, span.last),
                span.closed_bytes
            ));
        }
        let bytes = files.get(&span.last).copied().unwrap_or(0);
        if bytes < span.end {
            let name = file_name(queue, span.last);
            return Err(format!("its file {name} has {bytes} bytes, but {} were written", span.end));
        }
    }
    Ok(())
}

/// A hole among the files from `first` on.
pub fn hole(files: &Listing, first: [u64; 2]) -> Result<(), String> {
    for (queue, first) in QUEUES.into_iter().zip(first) {
        let files = &files[queue as usize];
        let start = run_start(files);
        if first != 0 && first < start {
            return Err(format!("its file {} is missing", file_name(queue, start - 1)));
        }
    }
    Ok(())
}

/// What was found before the engine opens its files.
pub struct Checked {
    /// The files, without their torn tails.
    pub files: Listing,
    /// Files that the mark asks for are missing, all of them the oldest: unless the log itself says that
    /// they aren't needed, it is damaged.
    pub missing: Option<String>,
    /// Files with what nobody was told of, and where it begins; `None`: nothing else is in them.
    torn_tails: Vec<(PathBuf, Option<u64>)>,
}

impl Checked {
    /// Removes what nobody was told of.
    pub fn cut<F: FileSystem>(&self, dir: &Path, file_system: &F) -> Result<(), StorageError> {
        for (path, end) in &self.torn_tails {
            let Some(end) = end else {
                file_system.delete(path).map_err(atomic_file::io_error("removing", path))?;
                continue;
            };
            let cut = || {
                let file = file_system.open(path, Permission::ReadWrite)?;
                file.truncate(usize::try_from(*end).unwrap_or(usize::MAX))?;
                file.sync()
            };
            cut().map_err(atomic_file::io_error("cutting a torn tail off", path))?;
        }
        if self.torn_tails.iter().any(|(_, end)| end.is_none()) {
            atomic_file::sync_dir(dir)?;
        }
        Ok(())
    }
}

/// Holds the files against the mark and reads them all. Nothing is changed, see [`Checked::cut`].
pub fn check(dir: &Path, floor: &Reach) -> Result<Checked, StorageError> {
    let mut files = list(dir)?;
    let damaged = |detail| Err(super::refused(dir, detail));
    let first = [0, 1].map(|q| run_start(&files[q]));
    for (queue, span) in QUEUES.into_iter().zip(floor.spans) {
        if files[queue as usize].last_key_value().is_none_or(|(last, _)| *last < span.last) && span.last != 0
        {
            return damaged(format!("its file {} is missing", file_name(queue, span.last)));
        }
    }
    if let Err(detail) = compare(&files, floor, first) {
        return damaged(detail);
    }
    let missing = hole(&files, floor.spans.map(|span| span.first)).err();
    let mut torn_tails = Vec::new();
    for queue in QUEUES {
        let span = floor.spans[queue as usize];
        let mut ends = Vec::new();
        for (&seq, &bytes) in files[queue as usize].range(first[queue as usize]..) {
            let path = dir.join(file_name(queue, seq));
            let (end, torn) =
                read(&path, FileId { queue, seq }, bytes).map_err(atomic_file::io_error("reading", &path))?;
            ends.push((seq, path, end, torn));
        }
        // Begun on a full disk, which had no room for their heads: the engine went on in the one before. A
        // mark that is durable names a file before the first acknowledgement in it.
        while let [.., (seq, _, end, _)] = &ends[..]
            && ends.len() > 1
            && span.last != 0
            && *seq > span.last
            && *end <= FILE_HEAD_BYTES
        {
            files[queue as usize].remove(seq);
            torn_tails.extend(ends.pop().map(|(_, path, ..)| (path, None)));
        }
        let last = ends.last().map(|(seq, ..)| *seq);
        for (seq, path, end, torn) in ends {
            let Some(torn) = torn else {
                continue;
            };
            if Some(seq) != last || (seq == span.last && end < span.end) {
                let name = file_name(queue, seq);
                return damaged(format!("its file {name} can't be read from byte {end} on: {torn}"));
            }
            // A head that is torn the engine writes anew.
            if end > 0 {
                torn_tails.push((path, Some(end)));
                files[queue as usize].insert(seq, end);
            }
        }
    }
    Ok(Checked { files, missing, torn_tails })
}

/// Reads a file. The end of its whole batches, and why it isn't the end of the file.
fn read(path: &Path, id: FileId, bytes: u64) -> io::Result<(u64, Option<String>)> {
    let mut file = BufReader::with_capacity(READ_BYTES, File::open(path)?);
    let torn = |end, why: &str| Ok((end, Some(why.to_owned())));
    let mut head = [0; HEAD_BYTES_V1];
    if bytes < HEAD_BYTES_V1 as u64 {
        return torn(0, "its head is cut off");
    }
    file.read_exact(&mut head)?;
    let (magic, version) = head.split_at(MAGIC.len());
    let signature = match (magic == MAGIC, version) {
        (true, [0, 0, 0, 0, 0, 0, 0, 1]) => None,
        (true, [0, 0, 0, 0, 0, 0, 0, 2]) => {
            let mut alignment = [0; 8];
            match file.read_exact(&mut alignment) {
                Ok(()) if alignment == [0; 8] => {}
                Err(error) if error.kind() != ErrorKind::UnexpectedEof => return Err(error),
                _ => return torn(0, "its head is wrong"),
            }
            // As the engine does it.
            Some(id.seq as u32)
        }
        _ => return torn(0, "its head is wrong"),
    };
    let mut at = HEAD_BYTES_V1 as u64 + if signature.is_some() { 8 } else { 0 };
    let mut batch = Vec::new();
    while at < bytes {
        if bytes - at < BATCH_HEAD_BYTES {
            return torn(at, "a batch is cut off");
        }
        let mut head = [0; BATCH_HEAD_BYTES as usize];
        file.read_exact(&mut head)?;
        let [length, items] = [0, 8].map(|from| {
            head[from..from + 8].iter().fold(0u64, |number, byte| number << 8 | u64::from(*byte))
        });
        let (length, compression) = (length >> 8, length as u8);
        let fits = |from: u64, to: u64| to.checked_sub(from).is_some_and(|bytes| bytes > SUM_BYTES);
        if compression != 0
            || length > bytes - at
            || !(items == BATCH_HEAD_BYTES || fits(BATCH_HEAD_BYTES, items))
            || !fits(items, length)
        {
            return torn(at, "the head of a batch is wrong");
        }
        batch.resize((length - BATCH_HEAD_BYTES) as usize, 0);
        file.read_exact(&mut batch)?;
        let (entries, items) = batch.split_at((items - BATCH_HEAD_BYTES) as usize);
        if !(entries.is_empty() || is_whole(entries, None)) || !is_whole(items, signature) {
            return torn(at, "the checksum of a batch does not match");
        }
        at += length;
    }
    Ok((at, None))
}

fn is_whole(bytes: &[u8], signature: Option<u32>) -> bool {
    bytes.split_last_chunk::<4>().is_some_and(|(content, sum)| {
        crc32fast::hash(content) == u32::from_le_bytes(*sum) ^ signature.unwrap_or(0)
    })
}

#[cfg(test)]
mod tests {
    use super::super::mark::Span;
    use super::*;

    fn files(append: &[(u64, u64)]) -> Listing {
        [append.iter().copied().collect(), BTreeMap::new()]
    }

    #[test]
    fn names_are_the_engines() {
        for id in
            [FileId { queue: LogQueue::Append, seq: 7 }, FileId { queue: LogQueue::Rewrite, seq: 1 << 60 }]
        {
            let name = file_name(id.queue, id.seq);
            assert_eq!(parse_name(OsStr::new(&name)), Some(id));
        }
        for other in ["LOCK", "0000000000000001.raftlog.reserved", "x.raftlog", "é.rewrite", "1"] {
            assert_eq!(parse_name(OsStr::new(other)), None, "{other}");
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        let span = Span { first: 3, last: 5, closed_bytes: 30, end: 7 };
        let reach = Reach { writes: 1, spans: [span, Span::default()] };
        let found = |append: &[(u64, u64)]| compare(&files(append), &reach, [0; 2]);
        assert_eq!(found(&[(3, 10), (4, 20), (5, 7)]), Ok(()));
        assert_eq!(found(&[(1, 4), (3, 10), (4, 20), (5, 9), (6, 1)]), Ok(()), "and what came later");
        for (append, what) in [
            (&[(4, 20), (5, 7)][..], "0003.raftlog is missing"),
            (&[(3, 10), (5, 7)], "0004.raftlog is missing"),
            (&[(3, 10), (4, 20)], "0005.raftlog is missing"),
            (&[(3, 10), (4, 19), (5, 7)], "29 bytes"),
            (&[(3, 10), (4, 21), (5, 7)], "31 bytes"),
            (&[(3, 10), (4, 20), (5, 6)], "6 bytes"),
        ] {
            let detail = found(append).unwrap_err();
            assert!(detail.contains(what), "{detail}");
        }
        // What the log itself says isn't needed may be gone.
        assert_eq!(compare(&files(&[(4, 20), (5, 7)]), &reach, [4, 0]), Ok(()));
        assert_eq!(compare(&files(&[(9, 1)]), &reach, [9, 0]), Ok(()));
        assert!(hole(&files(&[(3, 1), (5, 1), (6, 1)]), [3, 0]).unwrap_err().contains("0004"));
        assert_eq!(hole(&files(&[(1, 1), (5, 1), (6, 1)]), [5, 0]), Ok(()));
    }
}
