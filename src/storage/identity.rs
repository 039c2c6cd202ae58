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
