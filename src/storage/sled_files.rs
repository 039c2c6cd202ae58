//! What sled's files need so that a power loss can't take more than what wasn't synced.
//!
//! sled is a log of segments that it reuses. It counts a segment's successor as safe once
//! `sync_file_range` has returned, and then overwrites the old one. A power loss may take the
//! successor all the same, and with it data that was durable long before; sled then opens without a
//! word, and without that data. (Tried: copies of its file with any part of the unsynced blocks
//! missing gave every third time an error and every third time a store with holes.) So:
//!
//! - The file `db` gets the file system's attribute *synchronous* (`chattr +S`: ext4, xfs, btrfs):
//!   each of sled's writes, half a megabyte as a rule, returns when it is durable, which is what sled
//!   takes for granted. `blobs/` gets it too and hands it to the files made there.
//! - Where the file system has no such attribute, a marker file with the machine's boot id lies
//!   beside `db` from before the first write until after the next sync. A store with the marker of
//!   an earlier boot is refused: its machine went down in between. (A process that is killed loses
//!   nothing: the boot id is the same.)

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use super::StorageError;
use super::atomic_file::{self, io_error, sync_error};
use crate::telemetry::hot::hot;

const MARKER: &str = "UNSYNCED";

/// sled's files beside sled.
pub(super) struct SledFiles {
    dir: PathBuf,
    /// A handle of our own: open while sled writes, so that a failed writing back is reported to it.
    db: File,
    /// Each write is durable when it returns.
    synchronous: bool,
    /// Text of the marker; `None` where it isn't needed or would say nothing.
    boot: Option<String>,
    /// The marker lies there.
    marked: bool,
    synced_blobs: BTreeSet<OsString>,
}

impl SledFiles {
    /// Makes directory `dir` ready for sled to open. `synchronous`: ask for synchronous files.
    pub fn prepare(dir: &Path, synchronous: bool) -> Result<SledFiles, StorageError> {
        let blobs = dir.join("blobs");
        fs::create_dir_all(&blobs).map_err(io_error("creating", &blobs))?;
        remove_unfinished_snapshots(dir)?;
        for item in fs::read_dir(dir).map_err(io_error("listing", dir))? {
            remove_if_damaged(&item.map_err(io_error("listing", dir))?.path())?;
        }
        let path = dir.join("db");
        let db = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(io_error("opening", &path))?;
        let blobs = File::open(&blobs).map_err(io_error("opening", &blobs))?;
        let synchronous = synchronous && set_synchronous(&db) && set_synchronous(&blobs);
        let boot = if synchronous { None } else { boot_id() };
        let mut files = SledFiles {
            dir: dir.to_owned(),
            db,
            synchronous,
            boot,
            marked: false,
            synced_blobs: BTreeSet::new(),
        };
        files.check_marker()?;
        Ok(files)
    }

    /// Whether each write of sled is durable when it returns.
    pub fn synchronous(&self) -> bool {
        self.synchronous
    }

    /// To be called before sled is given anything to write.
    pub fn before_write(&mut self) -> Result<(), StorageError> {
        if let Some(boot) = &self.boot
            && !self.marked
        {
            atomic_file::replace(&self.dir.join(MARKER), boot.as_bytes())?;
            self.marked = true;
        }
        Ok(())
    }

    /// Makes durable what sled has flushed.
    pub fn sync(&mut self) -> Result<(), StorageError> {
        let path = self.dir.join("db");
        hot().state_syncs.increment(1);
        self.db.sync_data().map_err(sync_error(&path))?;
        self.sync_blobs()?;
        if self.marked {
            atomic_file::remove(&self.dir.join(MARKER))?;
            self.marked = false;
        }
        Ok(())
    }

    /// Makes durable what opening has created: names, and `conf`, which sled doesn't sync.
    pub fn sync_names(&self) -> Result<(), StorageError> {
        let conf = self.dir.join("conf");
        File::open(&conf).and_then(|file| file.sync_all()).map_err(sync_error(&conf))?;
        atomic_file::sync_dir(&self.dir)?;
        atomic_file::sync_parent(&self.dir)
    }

    fn check_marker(&mut self) -> Result<(), StorageError> {
        let path = self.dir.join(MARKER);
        match fs::read_to_string(&path) {
            Ok(text) if boot_id().as_deref() == Some(text.as_str()) => {
                // The killed process's writes are in the page cache; the next sync clears the marker.
                self.marked = true;
                Ok(())
            }
            Ok(_) => Err(StorageError::Damaged {
                what: format!("state store {}", self.dir.display()),
                detail: "the machine went down while it was written, on a file system without \
                         synchronous files: data that was durable may be gone"
                    .into(),
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(io_error("reading", &path)(error)),
        }
    }

    fn sync_blobs(&mut self) -> Result<(), StorageError> {
        let dir = self.dir.join("blobs");
        let mut present = BTreeSet::new();
        let mut new = false;
        for item in fs::read_dir(&dir).map_err(io_error("listing", &dir))? {
            let name = item.map_err(io_error("listing", &dir))?.file_name();
            if !self.synced_blobs.contains(&name) {
                let path = dir.join(&name);
                match File::open(&path) {
                    Ok(file) => {
                        hot().state_syncs.increment(1);
                        file.sync_all().map_err(sync_error(&path))?;
                    }
                    // sled removes blobs in the background.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                    Err(error) => return Err(io_error("opening", &path)(error)),
                }
                new = true;
            }
            present.insert(name);
        }
        if new {
            atomic_file::sync_dir(&dir)?;
        }
        self.synced_blobs = present;
        Ok(())
    }
}

/// Asks the file system to make each write to a file durable before it returns. Not all can.
#[cfg(target_os = "linux")]
fn set_synchronous(file: &File) -> bool {
    use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};
    ioctl_getflags(file)
        .is_ok_and(|flags| flags.contains(IFlags::SYNC) || ioctl_setflags(file, flags | IFlags::SYNC).is_ok())
}

/// Elsewhere sled syncs the file after each of its writes.
#[cfg(not(target_os = "linux"))]
fn set_synchronous(_: &File) -> bool {
    true
}

/// Which start of the machine this is.
fn boot_id() -> Option<String> {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()
}

/// Whether a directory holds files of sled.
pub(super) fn is_there(dir: &Path) -> bool {
    ["db", "conf", "blobs"].iter().any(|name| dir.join(name).exists())
}

fn remove_unfinished_snapshots(dir: &Path) -> Result<(), StorageError> {
    for item in fs::read_dir(dir).map_err(io_error("listing", dir))? {
        let item = item.map_err(io_error("listing", dir))?;
        let name = item.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("snap.") && name.ends_with(".generating") {
            fs::remove_file(item.path()).map_err(io_error("removing", &item.path()))?;
        }
    }
    Ok(())
}

/// Removes a file that sled makes anew if it is missing, from what is in `db` or in this program: a
/// snapshot of where its pages are, or its settings. Damaged, it would keep sled from opening.
fn remove_if_damaged(path: &Path) -> Result<(), StorageError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // Bytes between what is summed and the sum.
    let between = match &*name {
        "conf" => 0,
        name if name.starts_with("snap.") => 8,
        _ => return Ok(()),
    };
    let bytes = fs::read(path).map_err(io_error("reading", path))?;
    let whole = bytes.split_last_chunk::<4>().is_some_and(|(rest, sum)| {
        let summed = rest.len().checked_sub(between).filter(|len| *len > 0).map(|len| &rest[..len]);
        summed.is_some_and(|summed| crc32fast::hash(summed) == u32::from_le_bytes(*sum))
    });
    if !whole {
        tracing::warn!(file = %path.display(), "damaged; removed, to be made anew from the store");
        atomic_file::remove(path)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_marker_lies_there_while_anything_is_unsynced() {
        let dir = tempfile::tempdir().unwrap();
        let marker = dir.path().join(MARKER);
        let mut files = SledFiles::prepare(dir.path(), false).unwrap();
        assert!(!files.synchronous());
        files.before_write().unwrap();
        assert!(marker.exists());
        files.sync().unwrap();
        assert!(!marker.exists());
        files.before_write().unwrap();
        drop(files);
        // Killed: the same boot goes on, and clears it with its first sync.
        let mut files = SledFiles::prepare(dir.path(), false).unwrap();
        files.sync().unwrap();
        assert!(!marker.exists());
        // The machine went down.
        fs::write(&marker, "another boot").unwrap();
        for synchronous in [false, true] {
            let error = SledFiles::prepare(dir.path(), synchronous).err().unwrap();
            assert!(matches!(error, StorageError::Damaged { .. }), "{error}");
        }
    }

    #[test]
    fn new_blobs_are_synced_once() {
        let dir = tempfile::tempdir().unwrap();
        let mut files = SledFiles::prepare(dir.path(), true).unwrap();
        fs::write(dir.path().join("blobs").join("1"), "x").unwrap();
        files.sync().unwrap();
        assert_eq!(files.synced_blobs.len(), 1);
        fs::remove_file(dir.path().join("blobs").join("1")).unwrap();
        files.sync().unwrap();
        assert!(files.synced_blobs.is_empty());
    }
}
