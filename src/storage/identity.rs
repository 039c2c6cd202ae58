//! Who owns a data directory.

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
}

/// STUB
pub struct Identity { /// a
pub store_id: crate::ids::StoreId, /// b
pub cluster_id: Option<crate::ids::ClusterId>, /// c
pub node: Option<crate::ids::NodeId> }
/// STUB
pub struct DataDir;
#[allow(missing_docs, clippy::all)]
impl DataDir {
    pub fn open(_: &std::path::Path) -> Result<DataDir, IdentityError> { Ok(DataDir) }
    pub fn identity(&self) -> Identity { Identity { store_id: Default::default(), cluster_id: None, node: None } }
    pub fn record_cluster(&self, _: crate::ids::ClusterId) -> Result<(), IdentityError> { Ok(()) }
    pub fn record_member(&self, _: crate::ids::ClusterId, _: crate::ids::NodeId) -> Result<(), IdentityError> { Ok(()) }
    pub fn save_map(&self, _: &[u8]) -> Result<(), super::StorageError> { Ok(()) }
    pub fn load_map(&self) -> Result<Option<Vec<u8>>, super::StorageError> { Ok(None) }
    pub fn log_path(&self) -> std::path::PathBuf { "log".into() }
    pub fn state_path(&self) -> std::path::PathBuf { "state".into() }
    pub fn redo_path(&self) -> std::path::PathBuf { "redo".into() }
}
