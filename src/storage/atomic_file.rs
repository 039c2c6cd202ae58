//! Small files that are replaced as a whole: after a crash there is the old content or the new,
//! never a mixture; and the syncs that make names in directories durable.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::StorageError;
use crate::telemetry::hot::hot;

/// Ending of files that are being written and don't count yet.
pub(super) const UNFINISHED: &str = "tmp";

/// Where `path` is written before it takes its name.
pub(super) fn unfinished(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(UNFINISHED);
    PathBuf::from(name)
}

/// Creates the unfinished form of a file, readable by its owner only, replacing an older attempt.
pub(super) fn create(path: &Path) -> Result<File, StorageError> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .map_err(io_error("creating", path))
}

/// Makes the content of an unfinished file durable, then gives it its name, durably.
pub(super) fn finish(file: &File, from: &Path, to: &Path) -> Result<(), StorageError> {
    hot().state_syncs.increment(1);
    file.sync_data().map_err(sync_error(from))?;
    fs::rename(from, to).map_err(io_error("renaming", from))?;
    sync_parent(to)
}

/// Replaces a file by `bytes`, durably.
pub(super) fn replace(path: &Path, bytes: &[u8]) -> Result<(), StorageError> {
    let temporary = unfinished(path);
    let mut file = create(&temporary)?;
    file.write_all(bytes).map_err(io_error("writing", &temporary))?;
    finish(&file, &temporary, path)
}

/// Removes a file, durably. One that isn't there is fine.
pub(super) fn remove(path: &Path) -> Result<(), StorageError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("removing", path)(error)),
        _ => sync_parent(path),
    }
}

/// Makes the names in a directory durable.
pub(super) fn sync_dir(path: &Path) -> Result<(), StorageError> {
    hot().state_syncs.increment(1);
    File::open(path).and_then(|dir| dir.sync_all()).map_err(sync_error(path))
}

/// Makes the name of a file or directory durable.
pub(super) fn sync_parent(path: &Path) -> Result<(), StorageError> {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => sync_dir(Path::new(".")),
        Some(parent) => sync_dir(parent),
        None => Ok(()),
    }
}

/// Wraps a refusal of the operating system.
pub(super) fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StorageError + use<> {
    let path = path.to_owned();
    move |source| StorageError::Io { action, path, source }
}

/// Wraps a failed sync.
pub(super) fn sync_error(path: &Path) -> impl FnOnce(io::Error) -> StorageError + use<> {
    let path = path.to_owned();
    move |source| StorageError::SyncFailed { path, reason: source.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replacing_leaves_no_trace_of_the_attempt() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(unfinished(&path), "an older attempt, longer").unwrap();
        replace(&path, b"one").unwrap();
        replace(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        remove(&path).unwrap();
        remove(&path).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
