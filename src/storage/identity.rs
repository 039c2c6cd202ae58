//! Who owns a data directory.
//!
//! ```text
//! DIR/IDENTITY   who this is: store id, cluster id, node id (replaced atomically)
//! DIR/LOCK       held by the process that uses the directory; its text is the process id
//! DIR/log/       raft log        DIR/state/  state engine        DIR/redo/  redo files
//! DIR/log.mark   how far the raft log reaches
//! DIR/map        the last cluster map, a cache
//! DIR/state.sums what the files of the state engine should be
//! DIR/aside-N/   what was there before the node began anew ([`DataDir::begin_anew`]), never read again
//! ```
//!
//! A directory is used by one process at a time, belongs to one cluster for good once it has
//! recorded one, and is never taken over from somebody else: one that has content but no IDENTITY is
//! refused. IDENTITY is written before anything else is put there, so that a crash at any moment
//! leaves an empty directory or ours.
//!
//! Log and state store carry the store id too; their opening checks it, so that parts of two nodes'
//! directories can't be put together.

mod anew;

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use capnp::message::{Builder, ReaderOptions};

use super::{StorageError, atomic_file};
use crate::ids::{ClusterId, NodeId, RandomId, StoreId};
use crate::schema::store_capnp::identity;

const IDENTITY: &str = "IDENTITY";
const LOCK: &str = "LOCK";
const MAP: &str = "map";

const IDENTITY_MAGIC: &[u8; 8] = b"PONTNODE";
const MAP_MAGIC: &[u8; 8] = b"PONTCMAP";
/// Format of the directory: of IDENTITY itself and of which files lie beside it.
pub const FORMAT_VERSION: u32 = 1;
const MAP_FORMAT_VERSION: u32 = 1;

/// Why a data directory can't be used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// Another process holds it.
    #[error("{path} is in use by another process{holder}; stop that one first or choose another directory")]
    InUse {
        /// The directory.
        path: String,
        /// " (pid N)" where known.
        holder: String,
    },
    /// It has content that isn't ours.
    #[error("{path} is not empty and not a Pontoon data directory; choose another directory or empty it")]
    NotOurs {
        /// The directory.
        path: String,
    },
    /// It holds the stores of a node, and IDENTITY is gone.
    #[error("{path} holds what a node stores, but its file IDENTITY is missing: who it is can't be told")]
    Nameless {
        /// The directory.
        path: String,
    },
    /// A newer program wrote it.
    #[error(
        "{path} has format {found}, this program knows up to {known}; use the newer program that wrote it"
    )]
    Newer {
        /// The file or store.
        path: String,
        /// Its format version.
        found: u32,
        /// The greatest one known here.
        known: u32,
    },
    /// The identity can't be read.
    #[error("{path} is damaged: {detail}")]
    Damaged {
        /// The file.
        path: String,
        /// How that was seen.
        detail: String,
    },
    /// It belongs to another cluster.
    #[error(
        "{path} belongs to cluster {recorded}, not to {asked}; use a directory of its own for each cluster"
    )]
    OtherCluster {
        /// The directory.
        path: String,
        /// The cluster it has recorded.
        recorded: ClusterId,
        /// The cluster it was asked to join.
        asked: ClusterId,
    },
    /// It is already another member of its cluster.
    #[error("{path} is node {recorded} of its cluster and can't become node {asked}")]
    OtherNode {
        /// The directory.
        path: String,
        /// The node it has recorded.
        recorded: NodeId,
        /// The node it was told to be.
        asked: NodeId,
    },
    /// A store within the directory was made for another directory.
    #[error("{path} belongs to the data directory with store id {found}, not to {expected}")]
    ForeignStore {
        /// The store.
        path: String,
        /// The id it carries.
        found: String,
        /// The id of the directory it lies in.
        expected: StoreId,
    },
    /// Its state was made by another engine than the settings ask for.
    #[error(
        "{path} holds a state made by {found}, and `storage.engine` is \"{asked}\": set that to \"{found}\" or \
         \"auto\", or give this node another engine as docs/operations.md tells under \"The state's engine\""
    )]
    OtherEngine {
        /// The directory of the state.
        path: String,
        /// The engine that made it.
        found: &'static str,
        /// The one that was asked for.
        asked: &'static str,
    },
    /// The operating system refused an operation.
    #[error("{action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or directory.
        path: String,
        /// The system's reason.
        source: io::Error,
    },
    /// A sync failed: what was to be recorded may be lost.
    #[error("{0}")]
    Sync(String),
}

/// A data directory in use by this process. Dropping it lets another process in.
pub struct DataDir {
    path: PathBuf,
    identity: Identity,
    /// Holds the lock for as long as it is open.
    _lock: File,
}

/// What IDENTITY says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Identity {
    store_id: StoreId,
    cluster_id: Option<ClusterId>,
    node: Option<NodeId>,
    rejoins: bool,
}

impl Identity {
    /// A directory that nobody knows yet.
    fn new(rejoins: bool) -> Identity {
        Identity { store_id: StoreId::random(), cluster_id: None, node: None, rejoins }
    }
}

impl DataDir {
    /// Opens a data directory for this process alone, creating it (mode 0700) if it is absent or
    /// empty. Nothing is created or changed if it is refused.
    pub fn open(path: &Path) -> Result<DataDir, IdentityError> {
        DataDir::open_as(path, false)
    }

    /// [`DataDir::open`] for a node that, unless it is a member, may join a cluster and must not form
    /// one. That is recorded.
    pub fn open_to_rejoin(path: &Path) -> Result<DataDir, IdentityError> {
        let mut dir = DataDir::open_as(path, true)?;
        if dir.node().is_none() && !dir.rejoins() {
            dir.record(Identity { rejoins: true, ..dir.identity })?;
        }
        Ok(dir)
    }

    fn open_as(path: &Path, rejoins: bool) -> Result<DataDir, IdentityError> {
        create_dir(path)?;
        let found = survey(path)?;
        let lock = lock(path)?;
        // Another process may have made it its own between the look and the lock.
        let identity = match found.or(survey(path)?) {
            Some(()) => read_identity(path)?,
            None => {
                let identity = Identity::new(rejoins);
                write_identity(path, &identity)?;
                identity
            }
        };
        DataDir::of(path, identity, lock)
    }

    fn of(path: &Path, identity: Identity, lock: File) -> Result<DataDir, IdentityError> {
        let dir = DataDir { path: path.to_owned(), identity, _lock: lock };
        for part in [dir.log_path(), dir.state_path(), dir.redo_path()] {
            create_dir(&part)?;
        }
        Ok(dir)
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Identity of this directory, which its stores carry too.
    pub fn store_id(&self) -> StoreId {
        self.identity.store_id
    }

    /// The cluster it belongs to, once recorded.
    pub fn cluster_id(&self) -> Option<ClusterId> {
        self.identity.cluster_id
    }

    /// The node it is, once recorded. From then on its stores must be there: an empty log is a lost one.
    pub fn node(&self) -> Option<NodeId> {
        self.identity.node
    }

    /// Whether it was made by a node that was a member before, or is taken for one: it joins a cluster,
    /// and never forms one. Else nodes that have all lost their directories would form their cluster
    /// again, empty.
    pub fn rejoins(&self) -> bool {
        self.identity.rejoins
    }

    /// Where the raft log is.
    pub fn log_path(&self) -> PathBuf {
        self.path.join("log")
    }

    /// Where the state engine is.
    pub fn state_path(&self) -> PathBuf {
        self.path.join("state")
    }

    /// Where redo files are.
    pub fn redo_path(&self) -> PathBuf {
        self.path.join("redo")
    }

    /// Where snapshot files are.
    pub fn snapshots_path(&self) -> PathBuf {
        self.path.join("snapshots")
    }

    /// Records durably that the directory belongs to this cluster. From then on it refuses any other.
    pub fn record_cluster(&mut self, cluster: ClusterId) -> Result<(), IdentityError> {
        match self.identity.cluster_id {
            Some(recorded) if recorded == cluster => Ok(()),
            Some(recorded) => {
                Err(IdentityError::OtherCluster { path: show(&self.path), recorded, asked: cluster })
            }
            None => self.record(Identity { cluster_id: Some(cluster), ..self.identity }),
        }
    }

    /// Records durably which member of which cluster this is. It is never changed again.
    pub fn record_member(&mut self, cluster: ClusterId, node: NodeId) -> Result<(), IdentityError> {
        self.record_cluster(cluster)?;
        match self.identity.node {
            Some(recorded) if recorded == node => Ok(()),
            Some(recorded) => Err(IdentityError::OtherNode { path: show(&self.path), recorded, asked: node }),
            None => self.record(Identity { node: Some(node), ..self.identity }),
        }
    }

    fn record(&mut self, identity: Identity) -> Result<(), IdentityError> {
        write_identity(&self.path, &identity)?;
        self.identity = identity;
        Ok(())
    }

    /// Keeps the bytes of a cluster map for the next start.
    pub fn save_map(&self, map: &[u8]) -> Result<(), IdentityError> {
        let bytes = seal(MAP_MAGIC, MAP_FORMAT_VERSION, map);
        atomic_file::replace(&self.path.join(MAP), &bytes).map_err(from_storage)
    }

    /// The map that was saved last. It is only a cache: a damaged one or one that can't be read
    /// counts as absent, with a warning in the log.
    pub fn load_map(&self) -> Option<Vec<u8>> {
        load_map(&self.path)
    }
}

fn load_map(dir: &Path) -> Option<Vec<u8>> {
    let path = dir.join(MAP);
    let reason = match fs::read(&path) {
        Ok(bytes) => match unseal(MAP_MAGIC, &bytes) {
            Ok((MAP_FORMAT_VERSION, body)) => return Some(body.to_vec()),
            Ok((version, _)) => format!("unknown format {version}"),
            Err(reason) => reason,
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        Err(error) => error.to_string(),
    };
    tracing::warn!(file = %path.display(), reason, "the saved cluster map is not used");
    None
}

/// Whether a directory has an identity file of ours, be it damaged or newer. Only such a directory
/// may ever be deleted.
pub fn is_ours(path: &Path) -> bool {
    let mut magic = [0; 8];
    File::open(path.join(IDENTITY))
        .and_then(|mut file| file.read_exact(&mut magic))
        .is_ok_and(|()| &magic == IDENTITY_MAGIC)
}

/// Refuses with [`IdentityError::InUse`] if a process uses the directory. One that is not a data
/// directory is not in use.
pub fn check_unused(path: &Path) -> Result<(), IdentityError> {
    if path.join(LOCK).exists() {
        lock(path)?;
    }
    Ok(())
}

/// Removes a data directory that isn't in use, its identity last, so that a removal that is cut short
/// can be repeated. False: there is content and no identity of ours; nothing was touched.
pub fn remove(path: &Path) -> Result<bool, IdentityError> {
    if !is_ours(path) && !matches!(survey(path), Ok(None)) {
        return Ok(false);
    }
    let _lock = lock(path)?;
    for item in fs::read_dir(path).map_err(io_error("listing", path))? {
        let item = item.map_err(io_error("listing", path))?;
        // A link is removed, not what it leads to.
        let is_dir = item.file_type().map_err(io_error("reading", &item.path()))?.is_dir();
        let removed = match item.file_name().to_str() {
            Some(IDENTITY | LOCK | "lost+found") => Ok(()),
            _ if is_dir => fs::remove_dir_all(item.path()),
            _ => fs::remove_file(item.path()),
        };
        removed.map_err(io_error("removing", &item.path()))?;
    }
    for name in [IDENTITY, LOCK] {
        let file = path.join(name);
        match fs::remove_file(&file) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(io_error("removing", &file)(error));
            }
            _ => {}
        }
    }
    match fs::remove_dir(path) {
        // A file system of its own: as empty as it gets.
        Err(error)
            if matches!(error.kind(), io::ErrorKind::ResourceBusy | io::ErrorKind::DirectoryNotEmpty) => {}
        result => result.map_err(io_error("removing", path))?,
    }
    Ok(true)
}

/// `Some` if the directory is ours, `None` if it is as good as empty.
fn survey(path: &Path) -> Result<Option<()>, IdentityError> {
    let mut empty = true;
    for item in fs::read_dir(path).map_err(io_error("listing", path))? {
        let name = item.map_err(io_error("listing", path))?.file_name();
        match name.to_str() {
            Some(IDENTITY) => return Ok(Some(())),
            // What a crash before the first IDENTITY leaves, and what a file system puts there.
            Some(LOCK | "IDENTITY.tmp" | "lost+found") => {}
            _ => empty = false,
        }
    }
    if empty {
        Ok(None)
    } else if anew::holds_stores(path)? {
        Err(IdentityError::Nameless { path: show(path) })
    } else {
        Err(IdentityError::NotOurs { path: show(path) })
    }
}

fn create_dir(path: &Path) -> Result<(), IdentityError> {
    if path.is_dir() {
        return Ok(());
    }
    if let Some(parent) = path.parent()
        && !parent.as_os_str().is_empty()
    {
        create_dir(parent)?;
    }
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let reason = "it is there and is no directory; choose another";
            Err(io_error("creating", path)(io::Error::new(error.kind(), reason)))
        }
        Err(error) => Err(io_error("creating", path)(error)),
        Ok(()) => atomic_file::sync_parent(path).map_err(from_storage),
    }
}

fn lock(path: &Path) -> Result<File, IdentityError> {
    let lock_path = path.join(LOCK);
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&lock_path)
        .map_err(io_error("opening", &lock_path))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut text = String::new();
            // Whoever holds it may be about to write its id: then it stays unnamed.
            let known = file.read_to_string(&mut text).is_ok() && !text.trim().is_empty();
            return Err(IdentityError::InUse {
                path: show(path),
                holder: if known { format!(" (pid {})", text.trim()) } else { String::new() },
            });
        }
        Err(TryLockError::Error(error)) => return Err(io_error("locking", &lock_path)(error)),
    }
    file.set_len(0)
        .and_then(|()| file.rewind())
        .and_then(|()| writeln!(file, "{}", std::process::id()))
        .map_err(io_error("writing", &lock_path))?;
    Ok(file)
}

fn write_identity(path: &Path, identity: &Identity) -> Result<(), IdentityError> {
    let mut message = Builder::new_default();
    let mut root = message.init_root::<identity::Builder<'_>>();
    root.set_store_id(&identity.store_id.0);
    if let Some(cluster) = &identity.cluster_id {
        root.set_cluster_id(&cluster.0);
    }
    root.set_node(identity.node.map_or(0, |node| node.0));
    root.set_rejoins(identity.rejoins);
    let body = capnp::serialize::write_message_to_words(&message);
    let bytes = seal(IDENTITY_MAGIC, FORMAT_VERSION, &body);
    atomic_file::replace(&path.join(IDENTITY), &bytes).map_err(from_storage)
}

fn read_identity(path: &Path) -> Result<Identity, IdentityError> {
    let file = path.join(IDENTITY);
    let bytes = fs::read(&file).map_err(io_error("reading", &file))?;
    let damaged = |detail: String| IdentityError::Damaged { path: show(&file), detail };
    let (version, body) = unseal(IDENTITY_MAGIC, &bytes).map_err(damaged)?;
    if version > FORMAT_VERSION {
        return Err(IdentityError::Newer { path: show(path), found: version, known: FORMAT_VERSION });
    }
    if version != FORMAT_VERSION {
        return Err(damaged(format!("unknown format {version}")));
    }
    parse_identity(body)
        .map_err(|error| damaged(error.to_string()))?
        .ok_or_else(|| damaged("an id has the wrong length".into()))
}

fn parse_identity(mut body: &[u8]) -> capnp::Result<Option<Identity>> {
    let message = capnp::serialize::read_message(&mut body, ReaderOptions::new())?;
    let root = message.get_root::<identity::Reader<'_>>()?;
    let cluster = root.get_cluster_id()?;
    let Some(store_id) = RandomId::from_slice(root.get_store_id()?) else {
        return Ok(None);
    };
    let cluster_id = RandomId::from_slice(cluster);
    if cluster_id.is_none() && !cluster.is_empty() {
        return Ok(None);
    }
    let node = (root.get_node() != 0).then(|| NodeId(root.get_node()));
    Ok(Some(Identity { store_id, cluster_id, node, rejoins: root.get_rejoins() }))
}

/// Magic, format version, length (8 bytes), body, crc32c of all before; numbers big endian.
fn seal(magic: &[u8; 8], version: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = magic.to_vec();
    bytes.extend_from_slice(&version.to_be_bytes());
    bytes.extend_from_slice(&(body.len() as u64).to_be_bytes());
    bytes.extend_from_slice(body);
    let sum = crc32c::crc32c(&bytes);
    bytes.extend_from_slice(&sum.to_be_bytes());
    bytes
}

/// Format version and body of what [`seal`] made, of whatever version: the frame stays the same.
fn unseal<'a>(magic: &[u8; 8], bytes: &'a [u8]) -> Result<(u32, &'a [u8]), String> {
    let short = || format!("{} bytes are too few", bytes.len());
    let (content, sum) = bytes.split_last_chunk::<4>().ok_or_else(short)?;
    let (found, rest) = content.split_first_chunk::<8>().ok_or_else(short)?;
    if found != magic {
        return Err("it does not begin as it should".into());
    }
    let (version, rest) = rest.split_first_chunk::<4>().ok_or_else(short)?;
    let (len, body) = rest.split_first_chunk::<8>().ok_or_else(short)?;
    if u64::from_be_bytes(*len) != body.len() as u64 {
        return Err("its length is not what it says".into());
    }
    if u32::from_be_bytes(*sum) != crc32c::crc32c(content) {
        return Err("its checksum does not match".into());
    }
    Ok((u32::from_be_bytes(*version), body))
}

fn show(path: &Path) -> String {
    path.display().to_string()
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> IdentityError + use<> {
    let path = show(path);
    move |source| IdentityError::Io { action, path, source }
}

fn from_storage(error: StorageError) -> IdentityError {
    match error {
        StorageError::Io { action, path, source } => IdentityError::Io { action, path: show(&path), source },
        other => IdentityError::Sync(other.to_string()),
    }
}

#[cfg(test)]
#[path = "identity_tests.rs"]
mod tests;
