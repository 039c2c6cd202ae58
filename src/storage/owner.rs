//! Whose store a directory holds: a small file beside the engine's own ones, so that a store of another
//! data directory is refused before anything in it is opened, changed, or taken for damage.

use std::fs;
use std::io;
use std::path::Path;

use super::StorageError;
use super::atomic_file::{self, io_error};
use super::identity::IdentityError;
use crate::ids::StoreId;

/// The file's name.
const OWNER: &str = "OWNER";

/// Whether the file is there, in whatever state: it is the last that is made of a new store.
pub(super) fn is_noted(dir: &Path) -> bool {
    dir.join(OWNER).exists()
}

/// Notes whose store this is, for [`check`].
pub(super) fn note(dir: &Path, store_id: StoreId) -> Result<(), StorageError> {
    let path = dir.join(OWNER);
    let bytes = owner_bytes(store_id);
    // Missing or damaged, it is made anew: the store itself has the id too.
    if fs::read(&path).is_ok_and(|found| found == bytes) {
        Ok(())
    } else {
        atomic_file::replace(&path, &bytes)
    }
}

/// Refuses a store of another data directory.
pub(super) fn check(dir: &Path, expected: StoreId) -> Result<(), StorageError> {
    let path = dir.join(OWNER);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io_error("reading", &path)(error)),
    };
    let found = bytes.split_last_chunk::<4>().and_then(|(id, _)| StoreId::from_slice(id));
    match found.filter(|id| owner_bytes(*id) == bytes && *id != expected) {
        None => Ok(()),
        Some(found) => {
            let path = dir.display().to_string();
            Err(IdentityError::ForeignStore { path, found: found.to_string(), expected }.into())
        }
    }
}

/// The id and its crc32c.
fn owner_bytes(store_id: StoreId) -> Vec<u8> {
    [&store_id.0[..], &crc32c::crc32c(&store_id.0).to_be_bytes()].concat()
}
