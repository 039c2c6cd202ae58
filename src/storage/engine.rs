//! The ordered key-value engine under the state, behind a small trait.

use std::ops::Bound;

use bytes::Bytes;

use super::StorageError;

/// One change to an engine: a key and its new value, or `None` to remove it.
pub type Mutation = (Vec<u8>, Option<Bytes>);

/// An ordered key-value store. Nothing written is durable before [`Engine::sync`] has returned; what
/// was written before a crash and not synced may be there in part.
pub trait Engine: Send + Sync + 'static {
    /// The value of `key`.
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StorageError>;

    /// Calls `visit` with each pair in `[from, to)` in key order until it returns false. `to` empty:
    /// no upper bound. Beside a writer, a pair may be seen as it was before or after the write.
    fn scan(
        &self,
        from: Bound<&[u8]>,
        to: &[u8],
        visit: &mut dyn FnMut(&[u8], Bytes) -> bool,
    ) -> Result<(), StorageError>;

    /// Like [`Engine::scan`], of the keys alone.
    fn scan_keys(
        &self,
        from: Bound<&[u8]>,
        to: &[u8],
        visit: &mut dyn FnMut(&[u8]) -> bool,
    ) -> Result<(), StorageError> {
        self.scan(from, to, &mut |key, _| visit(key))
    }

    /// Applies mutations sorted by key, without repeats. Not atomic towards a crash.
    fn write(&self, batch: &[Mutation]) -> Result<(), StorageError>;

    /// Makes everything written so far durable.
    fn sync(&self) -> Result<(), StorageError>;

    /// Bytes on disk.
    fn disk_bytes(&self) -> u64;

    /// Its name, for messages.
    fn name(&self) -> &'static str;
}
