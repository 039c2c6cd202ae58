//! The state engine on sled 0.34.
use std::fs::File;
use std::ops::Bound;
use std::path::{Path, PathBuf};

use bytes::Bytes;

use super::StorageError;
use super::engine::{Engine, Mutation};
use crate::ids::StoreId;

/// Options.
pub struct SledOptions {
    /// Cache in bytes.
    pub cache_bytes: u64,
}

/// The engine.
pub struct SledEngine {
    db: sled::Db,
    file: File,
    path: PathBuf,
}

fn failed(error: sled::Error) -> StorageError {
    StorageError::Engine { engine: "sled", reason: error.to_string() }
}

impl SledEngine {
    /// Opens.
    pub fn open(path: &Path, options: SledOptions, _store_id: StoreId) -> Result<SledEngine, StorageError> {
        let db = sled::Config::new()
            .path(path)
            .cache_capacity(options.cache_bytes)
            .flush_every_ms(None)
            .open()
            .map_err(failed)?;
        db.flush().map_err(failed)?;
        let path = path.join("db");
        let file = File::open(&path).map_err(|source| StorageError::Io {
            action: "opening",
            path: path.clone(),
            source,
        })?;
        Ok(SledEngine { db, file, path })
    }
}

impl Engine for SledEngine {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StorageError> {
        Ok(self.db.get(key).map_err(failed)?.map(|v| Bytes::copy_from_slice(&v)))
    }

    fn scan(
        &self,
        from: Bound<&[u8]>,
        to: &[u8],
        visit: &mut dyn FnMut(&[u8], Bytes) -> bool,
    ) -> Result<(), StorageError> {
        for pair in self.db.range::<&[u8], _>((from, Bound::Unbounded)) {
            let (key, value) = pair.map_err(failed)?;
            if (!to.is_empty() && &key[..] >= to) || !visit(&key, Bytes::copy_from_slice(&value)) {
                break;
            }
        }
        Ok(())
    }

    fn write(&self, batch: &[Mutation]) -> Result<(), StorageError> {
        let mut sled_batch = sled::Batch::default();
        for (key, value) in batch {
            match value {
                Some(value) => sled_batch.insert(&key[..], &value[..]),
                None => sled_batch.remove(&key[..]),
            }
        }
        self.db.apply_batch(sled_batch).map_err(failed)
    }

    fn sync(&self) -> Result<(), StorageError> {
        self.db.flush().map_err(failed)?;
        self.file
            .sync_data()
            .map_err(|e| StorageError::SyncFailed { path: self.path.clone(), reason: e.to_string() })
    }

    fn disk_bytes(&self) -> u64 {
        self.db.size_on_disk().unwrap_or(0)
    }

    fn name(&self) -> &'static str {
        "sled"
    }
}
