//! How a node begins anew in its directory when what is there can't be used any more.
//!
//! Nothing is deleted, and the directory isn't renamed: it may be a mount point, or the only one that
//! the node may write to. Its content moves into `aside-<seconds since 1970>` within it:
//!
//! ```text
//!   link IDENTITY into aside-N ─► move log ─► move the rest ─► replace IDENTITY by a new one
//! ```
//!
//! Until the last step the old identity is in force, over a directory without a log, which is refused; from
//! then on the new one. So whenever that is cut short, the node doesn't start as the old one, with less
//! than it promised to keep, and what is still to be moved can be moved later.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::{
    DataDir, IDENTITY, Identity, IdentityError, LOCK, MAP, MAP_MAGIC, from_storage, io_error, is_ours,
    load_map, lock, read_identity, show, write_identity,
};
use crate::ids::ClusterId;
use crate::storage::atomic_file;
use crate::storage::engine_kind::EngineKind;

/// What of a directory is moved first.
const LOG: &str = "log";

/// What the directories begin with that hold what was there before.
const ASIDE: &str = "aside-";

/// What stays where it is.
const STAYS: [&str; 4] = [IDENTITY, LOCK, "IDENTITY.tmp", "lost+found"];

/// What else a node puts into its directory. A name may be followed by `.` and more: what is being
/// written, or was set aside by itself.
const PARTS: [&str; 5] = [LOG, "state", "redo", "snapshots", MAP];

impl DataDir {
    /// Sets aside what is in a directory that no process uses, and makes it that of a new node of the
    /// same cluster, for this process alone. `cluster_of` reads the cluster's id out of a saved map, for
    /// when IDENTITY can't tell it. Also returns where everything went; `None`: a former attempt had
    /// moved it.
    pub fn begin_anew(
        path: &Path,
        cluster_of: impl FnOnce(&[u8]) -> Option<ClusterId>,
    ) -> Result<(DataDir, Option<PathBuf>), IdentityError> {
        if !is_ours(path) && !holds_stores(path)? {
            return Err(IdentityError::NotOurs { path: show(path) });
        }
        let lock = lock(path)?;
        let cluster_id = match read_identity(path) {
            Ok(identity) => identity.cluster_id,
            Err(IdentityError::Damaged { .. }) => None,
            Err(IdentityError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => None,
            // Not for us to replace.
            Err(error) => return Err(error),
        };
        let cluster_id = cluster_id.or_else(|| cluster_of(&load_map(path)?));
        let aside = set_aside(path)?;
        let identity = Identity { cluster_id, ..Identity::new(true) };
        write_identity(path, &identity)?;
        Ok((DataDir::of(path, identity, lock)?, aside))
    }
}

fn set_aside(path: &Path) -> Result<Option<PathBuf>, IdentityError> {
    let mut names = Vec::new();
    for item in fs::read_dir(path).map_err(io_error("listing", path))? {
        let name = item.map_err(io_error("listing", path))?.file_name();
        if !STAYS.iter().any(|stays| *name == **stays) && !is_aside(&name) {
            names.push(name);
        }
    }
    let identity = path.join(IDENTITY);
    if names.is_empty() && !identity.exists() {
        return Ok(None);
    }
    let aside = make_aside(path)?;
    if identity.exists() {
        let kept = aside.join(IDENTITY);
        // A file system without hard links: a copy serves as well.
        fs::hard_link(&identity, &kept)
            .or_else(|_| fs::copy(&identity, &kept).map(drop))
            .map_err(io_error("copying", &identity))?;
    }
    names.sort_by_key(|name| *name != *OsStr::new(LOG));
    for (moved, name) in names.iter().enumerate() {
        let from = path.join(name);
        fs::rename(&from, aside.join(name)).map_err(io_error("moving", &from))?;
        if moved == 0 {
            // What follows may reach the disk in any order, but not before the log is gone.
            sync(&aside, path)?;
        }
    }
    sync(&aside, path)?;
    Ok(Some(aside))
}

/// Where things are now is durable before it is that they aren't where they were.
fn sync(aside: &Path, path: &Path) -> Result<(), IdentityError> {
    atomic_file::sync_dir(aside).and_then(|()| atomic_file::sync_dir(path)).map_err(from_storage)
}

/// A directory of a name that isn't taken: that of this second, or of one that comes.
fn make_aside(path: &Path) -> Result<PathBuf, IdentityError> {
    let mut seconds =
        SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    loop {
        let aside = path.join(format!("{ASIDE}{seconds}"));
        match fs::create_dir(&aside) {
            Ok(()) => return Ok(aside),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => seconds += 1,
            Err(error) => return Err(io_error("creating", &aside)(error)),
        }
    }
}

fn is_aside(name: &OsStr) -> bool {
    name.to_str().is_some_and(|name| name.starts_with(ASIDE))
}

/// Whether a directory without a readable IDENTITY is a node's all the same: everything in it has a name
/// that a node gives, and some of it can come from nobody else.
pub(super) fn holds_stores(path: &Path) -> Result<bool, IdentityError> {
    let mut evidence = has_store(path);
    for item in fs::read_dir(path).map_err(io_error("listing", path))? {
        let name = item.map_err(io_error("listing", path))?.file_name();
        let Some(text) = name.to_str() else {
            return Ok(false);
        };
        if is_aside(&name) {
            evidence |= is_ours(&path.join(&name)) || has_store(&path.join(&name));
            continue;
        }
        let is_part = |part: &&str| {
            text.strip_prefix(*part).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        if !STAYS.contains(&text) && !PARTS.iter().any(is_part) {
            return Ok(false);
        }
    }
    Ok(evidence)
}

fn has_store(dir: &Path) -> bool {
    let has_file = |part: &str, is_ours: fn(&str) -> bool| {
        fs::read_dir(dir.join(part))
            .is_ok_and(|items| items.flatten().any(|item| item.file_name().to_str().is_some_and(is_ours)))
    };
    fs::read(dir.join(MAP)).is_ok_and(|bytes| bytes.starts_with(MAP_MAGIC))
        || has_file(LOG, |name| name.ends_with(".raftlog") || name.ends_with(".rewrite"))
        || EngineKind::is_there(&dir.join("state"))
}
