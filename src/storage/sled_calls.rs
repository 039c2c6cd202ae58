//! Calls into sled: its errors and panics made ours.

use std::io::ErrorKind;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::Duration;

use super::StorageError;
use super::identity::IdentityError;
use super::log_disk::panic_text;

/// The engine's name, for messages.
pub(super) const NAME: &str = "sled";
/// A store that was just closed may take a moment to let go of its files.
const LOCK_ATTEMPTS: u32 = 100;
const LOCK_RETRY: Duration = Duration::from_millis(10);
/// How the detail of an error begins that was a panic of sled's.
pub(super) const PANICKED: &str = "sled panicked";

/// Opens a database, which may still be in use for a moment by who has just closed it.
pub(super) fn open_db(path: &Path, config: &sled::Config) -> Result<sled::Db, StorageError> {
    let mut attempts = 0;
    loop {
        let result = contain(path, || config.open());
        // sled tells a held lock from other errors by this text alone.
        let locked = matches!(
            &result,
            Err(StorageError::Engine { reason, .. }) if reason.contains("could not acquire lock")
        );
        if !locked {
            return result;
        }
        attempts += 1;
        if attempts == LOCK_ATTEMPTS {
            return Err(
                IdentityError::InUse { path: path.display().to_string(), holder: String::new() }.into()
            );
        }
        std::thread::sleep(LOCK_RETRY);
    }
}

/// Runs a call of sled and makes errors and panics ours.
pub(super) fn contain<T>(path: &Path, call: impl FnOnce() -> sled::Result<T>) -> Result<T, StorageError> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(sled::Error::Corruption { at, .. })) => {
            let place = at.map_or(String::new(), |at| format!(" at {at:?}"));
            Err(damaged(path, &format!("sled finds it corrupt{place}")))
        }
        // What it has noted of its file isn't there.
        Ok(Err(sled::Error::Io(error))) if error.kind() == ErrorKind::UnexpectedEof => {
            Err(damaged(path, &format!("sled finds it too short: {error}")))
        }
        Ok(Err(error)) => {
            Err(StorageError::Engine { engine: NAME, reason: format!("{}: {error}", path.display()) })
        }
        Err(panic) => {
            let text = panic_text(panic.as_ref());
            // It has had an error of the system that it didn't reckon with. What it was about to write is
            // unknown; what is on disk isn't damaged by that.
            if text.contains("Os {") || text.contains("Io(") {
                return Err(StorageError::SyncFailed { path: path.to_owned(), reason: text });
            }
            Err(damaged(path, &format!("{PANICKED}: {text}")))
        }
    }
}

/// What is found of the store in `path` is not what was written.
pub(super) fn damaged(path: &Path, detail: &str) -> StorageError {
    StorageError::Damaged { what: format!("state store {}", path.display()), detail: detail.to_owned() }
}
