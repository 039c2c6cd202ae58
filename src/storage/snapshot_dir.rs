//! Where a node keeps snapshot files: those it makes (`out`) and those it receives (`in`).
//!
//! | file | what it is | at start |
//! |---|---|---|
//! | `out/<replica>-<stream>.snap` | a complete snapshot that this node made | kept: a receiver may be in the middle of it |
//! | `out/….snap.tmp` | one that is being made | removed |
//! | `out/….link` | a redo file kept for one that is being made | removed |
//! | `in/<shard>-<replica>.part` | what a replica of this node has received | kept: it is gone on with |
//!
//! All of it may be lost at any time at the price of starting over: nothing here is the only copy of
//! anything. Bytes that were received and not synced may be wrong after a power loss; so what
//! is there is looked through before it is gone on with, and the whole is verified before it is loaded.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::atomic_file::{self, UNFINISHED, io_error, sync_error};
use super::collect::LINK;
use super::snapshot::SnapshotFile;
use super::{StorageError, snapshot_file};
use crate::ids::{ReplicaId, ShardId, StreamId};
use crate::limits::SNAPSHOT_SYNC_BYTES;
use crate::telemetry::hot::hot;

const COMPLETE: &str = "snap";
const PARTIAL: &str = "part";

/// The snapshot files of a node. One per directory; used by one thread at a time.
#[derive(Clone, Debug)]
pub struct SnapshotDir {
    out: PathBuf,
    received: PathBuf,
    bytes_max: u64,
}

impl SnapshotDir {
    /// Opens the directory, creating it if need be, and removes what a crash left unfinished. All its
    /// files together are kept below `bytes_max`.
    pub fn open(path: &Path, bytes_max: u64) -> Result<SnapshotDir, StorageError> {
        let dir = SnapshotDir { out: path.join("out"), received: path.join("in"), bytes_max };
        for part in [&dir.out, &dir.received] {
            fs::create_dir_all(part).map_err(io_error("creating", part))?;
        }
        for path in list(&dir.out)? {
            match ending(&path) {
                Some(UNFINISHED | LINK) => atomic_file::remove(&path)?,
                Some(COMPLETE) => {}
                _ => tracing::warn!(path = %path.display(), "not a snapshot file; it is left alone"),
            }
        }
        Ok(dir)
    }

    /// Where redo files are kept for snapshots that are being made.
    pub fn link_dir(&self) -> &Path {
        &self.out
    }

    /// The name of a snapshot that is made here.
    pub fn made_path(&self, replica: ReplicaId, stream: StreamId) -> PathBuf {
        self.out.join(format!("{:016x}-{stream}.{COMPLETE}", replica.0))
    }

    /// The complete snapshots made here. One that can't be read is removed: it can be made again.
    pub fn made(&self) -> Result<Vec<SnapshotFile>, StorageError> {
        let mut files = Vec::new();
        for path in list(&self.out)? {
            if ending(&path) != Some(COMPLETE) {
                continue;
            }
            match SnapshotFile::look(&path) {
                Ok(file) => files.push(file),
                Err(error) => {
                    tracing::warn!(%error, "a snapshot file is of no use and is removed");
                    atomic_file::remove(&path)?;
                }
            }
        }
        Ok(files)
    }

    /// Removes a snapshot made here.
    pub fn remove(&self, file: &SnapshotFile) -> Result<(), StorageError> {
        atomic_file::remove(&file.path)
    }

    /// What has been received, whole or in part: for which shard and which replica of this node.
    pub fn received(&self) -> Result<Vec<(ShardId, ReplicaId)>, StorageError> {
        let name = |path: &Path| {
            let stem = path.file_stem()?.to_str()?;
            let (shard, replica) = stem.split_once('-')?;
            let number = |text: &str| u64::from_str_radix(text, 16).ok();
            let found = (ShardId(number(shard)?), ReplicaId(number(replica)?));
            (ending(path) == Some(PARTIAL)).then_some(found)
        };
        Ok(list(&self.received)?.iter().filter_map(|path| name(path)).collect())
    }

    /// Removes what has been received for a replica.
    pub fn discard(&self, shard: ShardId, replica: ReplicaId) -> Result<(), StorageError> {
        atomic_file::remove(&self.partial_path(shard, replica))
    }

    /// Goes on with what has been received of a stream of `bytes` bytes, or begins it: what there is
    /// of another stream for the same replica is dropped.
    pub fn receive(
        &self,
        shard: ShardId,
        replica: ReplicaId,
        stream: StreamId,
        bytes: u64,
    ) -> Result<Partial, StorageError> {
        let path = self.partial_path(shard, replica);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(io_error("opening", &path))?;
        let (origin, whole) =
            snapshot_file::whole_beginning(BufReader::new(&file)).map_err(io_error("reading", &path))?;
        let known = origin.is_some_and(|origin| (origin.stream, origin.shard) == (stream, shard));
        let offset = if known && whole <= bytes { whole } else { 0 };
        file.set_len(offset)
            .and_then(|()| file.seek(SeekFrom::Start(offset)))
            .map_err(io_error("cutting", &path))?;
        if bytes.saturating_sub(offset) > self.room()? {
            return Err(quota(&path));
        }
        Ok(Partial { path, file, offset, bytes, unsynced: 0 })
    }

    /// Bytes that may yet be added.
    pub fn room(&self) -> Result<u64, StorageError> {
        let mut used: u64 = 0;
        for dir in [&self.out, &self.received] {
            for path in list(dir)? {
                match fs::metadata(&path) {
                    Ok(metadata) => used = used.saturating_add(metadata.len()),
                    // Another thread was done with it.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => return Err(io_error("reading", &path)(error)),
                }
            }
        }
        Ok(self.bytes_max.saturating_sub(used))
    }

    fn partial_path(&self, shard: ShardId, replica: ReplicaId) -> PathBuf {
        self.received.join(format!("{:016x}-{:016x}.{PARTIAL}", shard.0, replica.0))
    }
}

/// A snapshot that is being received.
#[derive(Debug)]
pub struct Partial {
    path: PathBuf,
    file: File,
    offset: u64,
    bytes: u64,
    unsynced: u64,
}

impl Partial {
    /// How many bytes are there: the stream goes on from here.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Whether all bytes are there.
    pub fn is_complete(&self) -> bool {
        self.offset == self.bytes
    }

    /// Where it is; to be verified there ([`super::snapshot::SnapshotCheck`]) once it is complete.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Adds what follows. [`StorageError::Damaged`] if it doesn't: the sender is at fault.
    pub fn append(&mut self, offset: u64, data: &[u8]) -> Result<(), StorageError> {
        if offset != self.offset || data.len() as u64 > self.bytes - self.offset {
            return Err(StorageError::Damaged {
                what: format!("the stream for {}", self.path.display()),
                detail: format!(
                    "{} bytes at {offset} do not fit {} of {} bytes",
                    data.len(),
                    self.offset,
                    self.bytes
                ),
            });
        }
        self.file.write_all(data).map_err(io_error("writing", &self.path))?;
        self.offset += data.len() as u64;
        self.unsynced += data.len() as u64;
        if self.unsynced >= SNAPSHOT_SYNC_BYTES {
            hot().state_syncs.increment(1);
            self.file.sync_data().map_err(sync_error(&self.path))?;
            self.unsynced = 0;
        }
        Ok(())
    }
}

fn quota(path: &Path) -> StorageError {
    let source = io::Error::new(
        io::ErrorKind::QuotaExceeded,
        "the snapshot files of this node have reached their limit",
    );
    io_error("writing", path)(source)
}

fn ending(path: &Path) -> Option<&str> {
    path.extension().and_then(|ending| ending.to_str())
}

/// The files of a directory, sorted.
fn list(dir: &Path) -> Result<Vec<PathBuf>, StorageError> {
    let mut paths = Vec::new();
    for item in fs::read_dir(dir).map_err(io_error("listing", dir))? {
        paths.push(item.map_err(io_error("listing", dir))?.path());
    }
    paths.sort_unstable();
    Ok(paths)
}

#[cfg(test)]
#[path = "snapshot_dir_tests.rs"]
mod tests;
