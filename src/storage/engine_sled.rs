//! STUB
#![allow(missing_docs)]
use super::{StorageError, engine_memory::MemoryEngine};
pub struct SledOptions { pub cache_bytes: u64 }
pub struct SledEngine;
impl SledEngine {
    pub fn open(_: &std::path::Path, _: SledOptions, _: crate::ids::StoreId) -> Result<MemoryEngine, StorageError> { Ok(MemoryEngine::new()) }
}
