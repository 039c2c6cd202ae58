//! The local cluster: several nodes in one process, in one directory.
//!
//! ```text
//! DIR/cluster.json   what it is and how to reach it; replaced atomically; marks DIR as ours
//! DIR/lock           locked by the process that runs the nodes, for as long as it lives
//! DIR/nodes/n1, ...  data directories of the nodes
//! DIR/logs/          output of a cluster that runs in the background
//! ```
//!
//! `cluster.json` is a hint: the addresses in it are where the nodes were last, the databases are
//! those last seen. Whether the cluster runs is told by the lock alone, which the system releases
//! however its holder dies; a process id might have been given to somebody else since.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::failure::Failure;
use crate::storage::identity::{self, IdentityError};

/// Version of the format of `cluster.json`.
const FORMAT_VERSION: u32 = 1;

/// What `cluster.json` is known by.
const FORMAT: &str = "pontoon local cluster";

/// Ports of local nodes are looked for here, below the range that systems give to outgoing
/// connections, so that a port is still free when the cluster comes back.
const PORTS: std::ops::Range<u16> = 20_000..30_000;

/// Content of `cluster.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterFile {
    /// What the file is known by; always the same.
    pub format: String,
    /// Version of this format.
    pub version: u32,
    /// Identity of the cluster; `None` until it is formed.
    pub cluster_id: Option<String>,
    /// The process that runs or last ran the nodes; `None` after a clean stop.
    pub pid: Option<u32>,
    /// The nodes.
    pub nodes: Vec<NodeEntry>,
    /// The databases, as last seen.
    pub databases: Vec<DatabaseEntry>,
}

/// A node in `cluster.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeEntry {
    /// Its label, and the name of its directory.
    pub label: String,
    /// Address of its client port.
    pub client: SocketAddr,
    /// Address of its peer port.
    pub peer: SocketAddr,
}

/// A database in `cluster.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatabaseEntry {
    /// Its name.
    pub name: String,
    /// Replicas of each shard.
    pub replicas: u32,
    /// Shards.
    pub shards: u32,
}

impl ClusterFile {
    /// That of a cluster which isn't formed yet.
    pub fn new(nodes: Vec<NodeEntry>) -> ClusterFile {
        ClusterFile {
            format: FORMAT.to_owned(),
            version: FORMAT_VERSION,
            cluster_id: None,
            pid: None,
            nodes,
            databases: Vec::new(),
        }
    }

    /// Client addresses of the nodes.
    pub fn addresses(&self) -> Vec<String> {
        self.nodes.iter().map(|n| n.client.to_string()).collect()
    }
}

/// A directory that holds a local cluster, or may come to.
#[derive(Clone, Debug)]
pub struct LocalDir {
    path: PathBuf,
}

/// The right to run, or to remove, the local cluster; ends with this value or with the process.
#[derive(Debug)]
pub struct LocalLock {
    // Held for its lock.
    _file: File,
}

/// Who runs the local cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holder {
    /// Nobody.
    None,
    /// A process; its id where the lock file tells it.
    Process(Option<u32>),
}

impl LocalDir {
    /// A directory; nothing is touched yet.
    pub fn new(path: PathBuf) -> LocalDir {
        LocalDir { path }
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Data directory of a node.
    pub fn node_dir(&self, label: &str) -> PathBuf {
        self.path.join("nodes").join(label)
    }

    /// Where the output of a cluster in the background goes.
    pub fn logs_dir(&self) -> PathBuf {
        self.path.join("logs")
    }

    /// The file with its log.
    pub fn log_path(&self) -> PathBuf {
        self.logs_dir().join("setup.log")
    }

    /// The file through which the start with this process id is told that it is ready.
    pub fn told_path(&self, pid: u32) -> PathBuf {
        self.logs_dir().join(format!("setup-{pid}.out"))
    }

    fn cluster_path(&self) -> PathBuf {
        self.path.join("cluster.json")
    }

    fn lock_path(&self) -> PathBuf {
        self.path.join("lock")
    }

    /// Reads `cluster.json`; `None` if there is none. A file that isn't ours or is newer than this
    /// program is a failure.
    pub fn read(&self) -> Result<Option<ClusterFile>, Failure> {
        let path = self.cluster_path();
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if is_missing(&error) => return Ok(None),
            Err(error) => return Err(Failure::io("reading", &path, error)),
        };
        // The version first: a newer format may look different everywhere else.
        #[derive(Deserialize)]
        struct Head {
            format: String,
            version: u32,
        }
        let foreign = |reason: String| {
            Failure::usage(
                "foreign_directory",
                format!(
                    "{} is not the description of a local cluster ({reason}); choose another \
                     directory with --data",
                    path.display()
                ),
            )
        };
        let head: Head = serde_json::from_slice(&bytes).map_err(|e| foreign(e.to_string()))?;
        if head.format != FORMAT {
            return Err(foreign(format!("its format is `{}`", head.format)));
        }
        if head.version > FORMAT_VERSION {
            return Err(Failure::usage(
                "newer_format",
                format!(
                    "{} has format version {}, this program knows up to {FORMAT_VERSION}; use a \
                     newer pontoon",
                    path.display(),
                    head.version
                ),
            ));
        }
        serde_json::from_slice(&bytes).map(Some).map_err(|e| foreign(e.to_string()))
    }

    /// Replaces `cluster.json`: after a crash there is the old one or the new one, whole.
    pub fn write(&self, cluster: &ClusterFile) -> Result<(), Failure> {
        let path = self.cluster_path();
        let staged = self.path.join("cluster.json.new");
        let mut text = serde_json::to_vec_pretty(cluster)
            .map_err(|error| Failure::internal(format!("writing {}: {error}", path.display())))?;
        text.push(b'\n');
        let replace = || {
            let mut file = File::create(&staged)?;
            file.write_all(&text)?;
            file.sync_all()?;
            fs::rename(&staged, &path)?;
            File::open(&self.path)?.sync_all()
        };
        replace().map_err(|error| Failure::io("writing", &path, error))
    }

    /// Makes the directory if need be and takes the lock. `Ok(Err(holder))`: somebody else has it.
    pub fn lock(&self) -> Result<Result<LocalLock, Holder>, Failure> {
        fs::create_dir_all(&self.path).map_err(|error| Failure::io("creating", &self.path, error))?;
        let path = self.lock_path();
        let failed = |error| Failure::io("locking", &path, error);
        let mut holder = Holder::Process(None);
        // A process that only looks whether the lock is held holds it for a moment itself.
        for attempt in 0..10 {
            if attempt > 0 {
                std::thread::sleep(Duration::from_millis(10));
            }
            let mut file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)
                .map_err(failed)?;
            match file.try_lock() {
                // Somebody may have removed the file between our opening and our locking it: then
                // this lock excludes nobody.
                Ok(()) if !is_at(&file, &path) => {}
                Ok(()) => {
                    file.set_len(0).and_then(|()| write!(file, "{}", std::process::id())).map_err(failed)?;
                    return Ok(Ok(LocalLock { _file: file }));
                }
                Err(TryLockError::WouldBlock) => holder = Holder::Process(read_pid(&mut file)),
                Err(TryLockError::Error(error)) => return Err(failed(error)),
            }
        }
        Ok(Err(holder))
    }

    /// Who runs the local cluster now.
    pub fn holder(&self) -> Result<Holder, Failure> {
        let path = self.lock_path();
        let mut file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if is_missing(&error) => return Ok(Holder::None),
            Err(error) => return Err(Failure::io("reading", &path, error)),
        };
        match file.try_lock_shared() {
            Ok(()) => Ok(Holder::None),
            Err(TryLockError::WouldBlock) => Ok(Holder::Process(read_pid(&mut file))),
            Err(TryLockError::Error(error)) => Err(Failure::io("locking", &path, error)),
        }
    }

    /// Refuses a directory with content of somebody else's. Call it before writing anything.
    pub fn check_ours(&self) -> Result<(), Failure> {
        if self.read()?.is_some() {
            return Ok(());
        }
        match self.strangers()?.first() {
            None => Ok(()),
            Some(name) => Err(Failure::usage(
                "foreign_directory",
                format!(
                    "{} holds `{name}` and no cluster.json: it is not the directory of a local \
                     cluster; choose an empty one with --data",
                    self.path.display()
                ),
            )),
        }
    }

    /// Names in the directory that no local cluster puts there.
    pub fn strangers(&self) -> Result<Vec<String>, Failure> {
        // The first three may be there before the identity: logs of a start that failed early.
        const OURS: [&str; 5] = ["lock", "logs", "cluster.json.new", "cluster.json", "nodes"];
        let failed = |error| Failure::io("reading", &self.path, error);
        let entries = match fs::read_dir(&self.path) {
            Ok(entries) => entries,
            Err(error) if is_missing(&error) => return Ok(Vec::new()),
            Err(error) => return Err(failed(error)),
        };
        let ours: &[&str] = if self.read()?.is_some() { &OURS } else { &OURS[..3] };
        let mut strangers = Vec::new();
        for entry in entries {
            let name = entry.map_err(failed)?.file_name().to_string_lossy().into_owned();
            if !ours.contains(&name.as_str()) {
                strangers.push(name);
            }
        }
        strangers.sort();
        Ok(strangers)
    }

    /// Removes what a local cluster puts into its directory, the identity last, so that a removal
    /// that is cut short can be repeated; then the directory itself, if nothing else is in it. Returns
    /// what is left because it isn't ours.
    pub fn remove(&self, lock: LocalLock) -> Result<Vec<PathBuf>, Failure> {
        let mut left = Vec::new();
        let nodes = self.path.join("nodes");
        for path in entries(&nodes)? {
            // Only what has the identity of a node, or nothing yet, is a node's.
            let removed = path.is_dir() && !path.is_symlink() && identity::remove(&path).map_err(kept)?;
            if !removed {
                left.push(path);
            }
        }
        let files = ["cluster.json.new", "cluster.json", "lock"].map(|name| self.path.join(name));
        let (logs, others): (Vec<_>, _) =
            entries(&self.logs_dir())?.into_iter().partition(|path| is_log(path));
        left.extend(others);
        for path in logs.into_iter().chain(files) {
            absent_is_fine(fs::remove_file(&path)).map_err(|error| Failure::io("removing", &path, error))?;
        }
        for path in [&nodes, &self.logs_dir()] {
            remove_empty(path)?;
        }
        let strangers = self.strangers()?;
        left.extend(strangers.into_iter().filter(|name| name != "nodes").map(|name| self.path.join(name)));
        drop(lock);
        remove_empty(&self.path)?;
        Ok(left)
    }
}

/// Whether a file in the directory of the logs is one of ours.
fn is_log(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name == "setup.log" || (name.starts_with("setup-") && name.ends_with(".out"))
}

/// A node's directory that can't be removed: somebody uses it, or the system refuses.
fn kept(error: IdentityError) -> Failure {
    match error {
        IdentityError::InUse { .. } => Failure::negative("running", error.to_string()),
        error => Failure::usage("io", error.to_string()),
    }
}

/// What is in a directory, in order; nothing if it isn't there.
fn entries(path: &Path) -> Result<Vec<PathBuf>, Failure> {
    let failed = |error| Failure::io("reading", path, error);
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if is_missing(&error) => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut paths =
        entries.map(|entry| entry.map(|e| e.path())).collect::<Result<Vec<_>, _>>().map_err(failed)?;
    paths.sort();
    Ok(paths)
}

/// Removes a directory if nothing is in it. One that is a file system of its own, or stands where
/// this user may remove nothing, stays, empty.
fn remove_empty(path: &Path) -> Result<(), Failure> {
    match fs::remove_dir(path) {
        Err(error) if is_missing(&error) => Ok(()),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::DirectoryNotEmpty
                    | io::ErrorKind::ResourceBusy
                    | io::ErrorKind::PermissionDenied
            ) =>
        {
            Ok(())
        }
        result => result.map_err(|error| Failure::io("removing", path, error)),
    }
}

/// Whether `path` still names this very file.
fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::metadata(path)) {
        (Ok(held), Ok(named)) => (held.dev(), held.ino()) == (named.dev(), named.ino()),
        _ => false,
    }
}

fn read_pid(file: &mut File) -> Option<u32> {
    let mut text = String::new();
    file.take(16).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

fn is_missing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Binds a free loopback port, preferably one that no outgoing connection will ever take.
pub fn bind_free_port() -> io::Result<TcpListener> {
    for _ in 0..32 {
        let port = rand::random_range(PORTS);
        match TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
            Ok(listener) => return Ok(listener),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            Err(error) => return Err(error),
        }
    }
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::failure::Exit;
    use crate::storage::identity::DataDir;

    fn sample() -> ClusterFile {
        ClusterFile {
            cluster_id: Some("ab".repeat(16)),
            pid: Some(42),
            databases: vec![DatabaseEntry { name: "testDB".into(), replicas: 3, shards: 5 }],
            ..ClusterFile::new(vec![NodeEntry {
                label: "n1".into(),
                client: "127.0.0.1:20001".parse().unwrap(),
                peer: "127.0.0.1:20002".parse().unwrap(),
            }])
        }
    }

    fn made() -> (tempfile::TempDir, LocalDir) {
        let temp = tempfile::tempdir().unwrap();
        let dir = LocalDir::new(temp.path().join("cluster"));
        fs::create_dir(dir.path()).unwrap();
        (temp, dir)
    }

    #[test]
    fn cluster_json_comes_back_as_written() {
        let (_temp, dir) = made();
        assert_eq!(dir.read().unwrap(), None);
        dir.write(&sample()).unwrap();
        assert_eq!(dir.read().unwrap(), Some(sample()));
        let other = ClusterFile { pid: None, ..sample() };
        dir.write(&other).unwrap();
        assert_eq!(dir.read().unwrap(), Some(other));
        assert!(dir.check_ours().is_ok());
    }

    #[test]
    fn foreign_and_newer_files_are_refused() {
        let (_temp, dir) = made();
        for (text, code) in [
            ("", "foreign_directory"),
            ("{}", "foreign_directory"),
            (r#"{"format":"x","version":1}"#, "foreign_directory"),
            (r#"{"format":"pontoon local cluster","version":1}"#, "foreign_directory"),
            (r#"{"format":"pontoon local cluster","version":2}"#, "newer_format"),
        ] {
            fs::write(dir.cluster_path(), text).unwrap();
            let failure = dir.read().unwrap_err();
            assert_eq!((failure.exit, failure.code), (Exit::Usage, code), "{text}");
            assert!(dir.check_ours().is_err());
        }
    }

    #[test]
    fn a_directory_of_somebody_elses_is_refused() {
        let (_temp, dir) = made();
        assert!(dir.check_ours().is_ok(), "an empty one is fine");
        fs::write(dir.path().join("thesis.tex"), "").unwrap();
        let failure = dir.check_ours().unwrap_err();
        assert!(failure.message.contains("thesis.tex"), "{failure}");
        fs::remove_file(dir.path().join("thesis.tex")).unwrap();
        fs::create_dir(dir.path().join("nodes")).unwrap();
        assert!(dir.check_ours().is_err(), "`nodes` alone doesn't make it ours");
    }

    #[test]
    fn one_holder_at_a_time() {
        let (_temp, dir) = made();
        assert_eq!(dir.holder().unwrap(), Holder::None);
        let lock = dir.lock().unwrap().unwrap();
        let me = Holder::Process(Some(std::process::id()));
        assert_eq!(dir.holder().unwrap(), me);
        assert_eq!(dir.lock().unwrap().unwrap_err(), me);
        drop(lock);
        assert_eq!(dir.holder().unwrap(), Holder::None);
        assert!(dir.lock().unwrap().is_ok());
    }

    #[test]
    fn removal_leaves_what_is_not_ours() {
        let (_temp, dir) = made();
        dir.write(&sample()).unwrap();
        drop(DataDir::open(&dir.node_dir("n1")).unwrap());
        fs::write(dir.path().join("notes"), "mine").unwrap();
        let thesis = dir.node_dir("thesis");
        fs::create_dir(&thesis).unwrap();
        fs::write(thesis.join("chapter.tex"), "years of work").unwrap();
        // A link to a node's directory is no directory of this cluster.
        let elsewhere = dir.path().with_file_name("elsewhere");
        drop(DataDir::open(&elsewhere).unwrap());
        std::os::unix::fs::symlink(&elsewhere, dir.node_dir("n2")).unwrap();
        let lock = dir.lock().unwrap().unwrap();
        let left = dir.remove(lock).unwrap();
        assert_eq!(left, [dir.node_dir("n2"), thesis.clone(), dir.path().join("notes")]);
        assert_eq!(entries(dir.path()).unwrap(), [dir.path().join("nodes"), dir.path().join("notes")]);
        assert_eq!(fs::read_to_string(thesis.join("chapter.tex")).unwrap(), "years of work");
        assert!(identity::is_ours(&elsewhere));

        fs::remove_file(dir.path().join("notes")).unwrap();
        fs::remove_dir_all(dir.path().join("nodes")).unwrap();
        dir.write(&sample()).unwrap();
        // What a start leaves that was cut short, and a removal.
        fs::create_dir_all(dir.node_dir("n1")).unwrap();
        fs::write(dir.node_dir("n1").join("LOCK"), "").unwrap();
        drop(DataDir::open(&dir.node_dir("n2")).unwrap());
        fs::remove_dir(dir.node_dir("n2").join("log")).unwrap();
        fs::create_dir(dir.logs_dir()).unwrap();
        fs::write(dir.log_path(), "").unwrap();
        fs::write(dir.told_path(7), "").unwrap();
        let lock = dir.lock().unwrap().unwrap();
        assert_eq!(dir.remove(lock).unwrap(), Vec::<PathBuf>::new());
        assert!(!dir.path().exists());
    }

    #[test]
    fn a_node_in_use_is_not_removed() {
        let (_temp, dir) = made();
        dir.write(&sample()).unwrap();
        let node = DataDir::open(&dir.node_dir("n1")).unwrap();
        let failure = dir.remove(dir.lock().unwrap().unwrap()).unwrap_err();
        assert_eq!((failure.exit, failure.code), (Exit::Negative, "running"), "{failure}");
        assert!(dir.read().unwrap().is_some(), "it can be repeated");
        drop(node);
        assert_eq!(dir.remove(dir.lock().unwrap().unwrap()).unwrap(), Vec::<PathBuf>::new());
        assert!(!dir.path().exists());
    }

    #[test]
    fn ports_are_free_and_different() {
        let one = bind_free_port().unwrap();
        let two = bind_free_port().unwrap();
        assert_ne!(one.local_addr().unwrap(), two.local_addr().unwrap());
    }
}
