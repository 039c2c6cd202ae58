//! The files of a fjall tree: who has them open, and whether they are what they were.
//!
//! | file | content |
//! |---|---|
//! | `current` | which version counts: its number (8 bytes, little endian), its file's checksum (16), kind of the checksum (1: 0) |
//! | `vN` | version N: the tables by level, each with its number and checksum |
//! | `tables/N` | a table: sorted pairs in checksummed blocks |
//! | `.tmp*` | a `current` that a kill has left unfinished: removed at open |
//! | `LOCK` | locked by whoever has the tree open |
//! | `OWNER` | whose it is ([`super::owner`]), the last file that is made of a new tree |
//!
//! fjall has each table on disk (file and directory synced) before it writes a version that names it, and that
//! before `current` names it. So after a crash `current` leads to whole tables, and whatever it doesn't lead to
//! is removed at open. But fjall believes a version without looking at its checksum, looks at a table's blocks
//! only when they are read, and makes a new, empty tree where `current` is missing. So all of that is looked at here,
//! before anything is believed.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read};
use std::path::Path;
use std::time::Duration;

use lsm_tree::{AbstractTree, AnyTree};
use xxhash_rust::xxh3::Xxh3Default;

use super::atomic_file::io_error;
use super::identity::IdentityError;
use super::{StorageError, owner};

const CURRENT: &str = "current";
const TABLES: &str = "tables";
const LOCK: &str = "LOCK";
/// How the names begin of files that are being written to be renamed.
const UNFINISHED: &str = ".tmp";

/// Number, checksum, kind of the checksum.
const CURRENT_BYTES: usize = 25;
/// Of a greater store, tables are verified block by block as they are read, and not at a start.
const WHOLE_CHECK_BYTES_MAX: u64 = 1 << 30;
/// A store that was just closed may take a moment to let go of its files.
const LOCK_ATTEMPTS: u32 = 100;
const LOCK_RETRY: Duration = Duration::from_millis(10);

/// Whether a directory holds files of a tree.
pub(super) fn is_there(dir: &Path) -> bool {
    [CURRENT, TABLES].iter().any(|name| dir.join(name).exists())
}

/// Locks the tree for this process. It is unlocked when the file is closed.
pub(super) fn lock(dir: &Path) -> Result<File, StorageError> {
    let path = dir.join(LOCK);
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(io_error("opening", &path))?;
    let mut attempts = 0;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if attempts < LOCK_ATTEMPTS => attempts += 1,
            Err(TryLockError::WouldBlock) => {
                let path = dir.display().to_string();
                return Err(IdentityError::InUse { path, holder: String::new() }.into());
            }
            Err(TryLockError::Error(error)) => return Err(io_error("locking", &path)(error)),
        }
        std::thread::sleep(LOCK_RETRY);
    }
}

/// Whether there is a tree, of which the version that counts is whole. False: there is none yet.
pub(super) fn check_version(dir: &Path) -> Result<bool, StorageError> {
    let path = dir.join(CURRENT);
    let current = match fs::read(&path) {
        Ok(current) => current,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if owner::is_noted(dir) || holds_tables(dir)? {
                return Err(damaged(dir, "its file `current` is missing"));
            }
            return Ok(false);
        }
        Err(error) => return Err(io_error("reading", &path)(error)),
    };
    let malformed = || damaged(dir, "its file `current` is none");
    let current: [u8; CURRENT_BYTES] = current[..].try_into().map_err(|_| malformed())?;
    let (number, rest) = current.split_first_chunk::<8>().ok_or_else(malformed)?;
    let (sum, kind) = rest.split_first_chunk::<16>().ok_or_else(malformed)?;
    if kind != [0] {
        return Err(malformed());
    }
    let name = format!("v{}", u64::from_le_bytes(*number));
    match sum_of(&dir.join(&name)) {
        Ok(found) if found == u128::from_le_bytes(*sum) => Ok(true),
        Ok(_) => Err(damaged(dir, &format!("the checksum of its file `{name}` does not match"))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(damaged(dir, &format!("its file `{name}` is missing")))
        }
        Err(error) => Err(io_error("reading", &dir.join(name))(error)),
    }
}

/// The version that `current` names.
pub(super) fn current_version(dir: &Path) -> io::Result<u64> {
    let current = fs::read(dir.join(CURRENT))?;
    let number = current.first_chunk().ok_or(io::ErrorKind::UnexpectedEof)?;
    Ok(u64::from_le_bytes(*number))
}

/// Removes what a kill has left of files that were to become `current`. Nobody else has the tree open.
pub(super) fn remove_unfinished(dir: &Path) -> Result<(), StorageError> {
    for item in fs::read_dir(dir).map_err(io_error("listing", dir))? {
        let item = item.map_err(io_error("listing", dir))?;
        if item.file_name().to_string_lossy().starts_with(UNFINISHED) {
            let path = item.path();
            fs::remove_file(&path).map_err(io_error("removing", &path))?;
        }
    }
    Ok(())
}

/// Verifies each table as a whole, unless they are too large together.
pub(super) fn check_tables(dir: &Path, tree: &AnyTree) -> Result<(), StorageError> {
    if tree.disk_space() > WHOLE_CHECK_BYTES_MAX {
        return Ok(());
    }
    for table in tree.current_version().iter_tables() {
        let found = sum_of(&table.path).map_err(io_error("reading", &table.path))?;
        if found != table.checksum().into_u128() {
            return Err(damaged(dir, &format!("the checksum of table {} does not match", table.id())));
        }
    }
    Ok(())
}

/// Removes what is left of tables numbered `from` or later that aren't part of the tree. Nobody is making
/// any.
pub(super) fn remove_litter(dir: &Path, tree: &AnyTree, from: u64) -> io::Result<()> {
    let version = tree.current_version();
    for item in fs::read_dir(dir.join(TABLES))? {
        let item = item?;
        let number = item.file_name().to_str().and_then(|name| name.parse::<u64>().ok());
        if number
            .is_some_and(|number| number >= from && version.iter_tables().all(|table| table.id() != number))
        {
            fs::remove_file(item.path())?;
        }
    }
    Ok(())
}

/// Bytes that may still be written there, if the system tells.
pub(super) fn free_bytes(dir: &Path) -> Option<u64> {
    rustix::fs::statvfs(dir).ok().map(|found| found.f_bavail.saturating_mul(found.f_frsize))
}

/// Bytes of all files.
pub(super) fn bytes(dir: &Path) -> u64 {
    [dir.to_owned(), dir.join(TABLES)]
        .iter()
        .filter_map(|dir| fs::read_dir(dir).ok())
        .flatten()
        .filter_map(|item| item.and_then(|item| item.metadata()).ok())
        .filter(fs::Metadata::is_file)
        .map(|metadata| metadata.len())
        .sum()
}

/// What is wrong with a store.
pub(super) fn damaged(dir: &Path, detail: &str) -> StorageError {
    StorageError::Damaged { what: format!("state store {}", dir.display()), detail: detail.to_owned() }
}

fn holds_tables(dir: &Path) -> Result<bool, StorageError> {
    let path = dir.join(TABLES);
    match fs::read_dir(&path) {
        Ok(mut items) => Ok(items.next().is_some()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(io_error("listing", &path)(error)),
    }
}

/// The checksum that fjall has of a whole file.
fn sum_of(path: &Path) -> io::Result<u128> {
    let mut file = File::open(path)?;
    let mut hash = Xxh3Default::new();
    let mut buffer = vec![0; 256 * 1024];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hash.digest128()),
            read => hash.update(&buffer[..read]),
        }
    }
}
