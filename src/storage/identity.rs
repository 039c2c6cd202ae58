//! Who owns a data directory. BRIDGE
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use super::{StorageError, atomic_file};
use crate::ids::{ClusterId, NodeId, RandomId, StoreId};

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
    /// Other.
    #[error("{0}")]
    Other(String),
}

/// Identity.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Store.
    pub store_id: StoreId,
    /// Cluster.
    pub cluster_id: Option<ClusterId>,
    /// Node.
    pub node: Option<NodeId>,
}

/// The directory.
pub struct DataDir {
    path: PathBuf,
    identity: Mutex<Identity>,
    _lock: File,
}

fn other(e: impl std::fmt::Display) -> IdentityError {
    IdentityError::Other(e.to_string())
}

impl DataDir {
    /// Opens.
    pub fn open(path: &Path) -> Result<DataDir, IdentityError> {
        fs::create_dir_all(path).map_err(other)?;
        let lock = File::create(path.join("LOCK")).map_err(other)?;
        lock.try_lock().map_err(|_| IdentityError::InUse { path: path.display().to_string(), holder: String::new() })?;
        let identity = match fs::read(path.join("IDENTITY")) {
            Ok(b) if b.len() == 40 => {
                let node = u64::from_be_bytes(b[32..].try_into().unwrap_or_default());
                let cluster = RandomId::from_slice(&b[16..32]).filter(|c| *c != RandomId::default());
                Identity { store_id: RandomId::from_slice(&b[..16]).unwrap_or_default(), cluster_id: cluster, node: (node != 0).then_some(NodeId(node)) }
            }
            _ => Identity { store_id: RandomId::random(), cluster_id: None, node: None },
        };
        let dir = DataDir { path: path.to_owned(), identity: Mutex::new(identity), _lock: lock };
        dir.save(identity)?;
        Ok(dir)
    }

    fn save(&self, identity: Identity) -> Result<(), IdentityError> {
        let mut b = identity.store_id.0.to_vec();
        b.extend(identity.cluster_id.unwrap_or_default().0);
        b.extend(identity.node.unwrap_or_default().0.to_be_bytes());
        atomic_file::replace(&self.path.join("IDENTITY"), &b).map_err(other)?;
        if let Ok(mut i) = self.identity.lock() {
            *i = identity;
        }
        Ok(())
    }

    /// Identity.
    pub fn identity(&self) -> Identity {
        *self.identity.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Cluster.
    pub fn record_cluster(&self, cluster: ClusterId) -> Result<(), IdentityError> {
        self.save(Identity { cluster_id: Some(cluster), ..self.identity() })
    }

    /// Member.
    pub fn record_member(&self, cluster: ClusterId, node: NodeId) -> Result<(), IdentityError> {
        self.save(Identity { cluster_id: Some(cluster), node: Some(node), ..self.identity() })
    }

    /// Map.
    pub fn save_map(&self, bytes: &[u8]) -> Result<(), StorageError> {
        atomic_file::replace(&self.path.join("map"), bytes)
    }

    /// Map.
    pub fn load_map(&self) -> Result<Option<Vec<u8>>, StorageError> {
        Ok(fs::read(self.path.join("map")).ok())
    }

    /// Path.
    pub fn log_path(&self) -> PathBuf {
        self.path.join("log")
    }
    /// Path.
    pub fn state_path(&self) -> PathBuf {
        self.path.join("state")
    }
    /// Path.
    pub fn redo_path(&self) -> PathBuf {
        self.path.join("redo")
    }
}
