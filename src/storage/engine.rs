//! The ordered key-value engine under the state, behind a small trait.

use std::ops::Bound;

use bytes::Bytes;

use super::StorageError;
pub use super::trust::OnDamage;

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

    /// Begins a sorted run, if the engine takes in such: the cheapest way for many changes. By default it
    /// takes none.
    fn begin_run(&self) -> Result<Option<Box<dyn Run + '_>>, StorageError> {
        Ok(None)
    }

    /// Lets go of what it can of a range of keys at once, before all of that is removed by writes: of the range any state that
    /// it was ever in may be what is left, and of everything else nothing changes. `to` empty: no upper bound. By default
    /// all is left.
    ///
    /// Once for each removal, and before its first write: what it lets go of may be the marks of writes that removed.
    fn forget_range(&self, _from: &[u8], _to: &[u8]) -> Result<(), StorageError> {
        Ok(())
    }

    /// Makes everything written so far durable.
    fn sync(&self) -> Result<(), StorageError>;

    /// Whether a call that finds no [space](StorageError::is_full), whichever it is, leaves the engine with what it had, and may
    /// be made again. By default that isn't known, and who wrote must stop. Only for one that takes [runs](Engine::begin_run).
    fn bears_a_full_disk(&self) -> bool {
        false
    }

    /// Bytes on disk.
    fn disk_bytes(&self) -> u64;

    /// Its name, for messages.
    fn name(&self) -> &'static str;
}

/// Changes that an [`Engine`] takes in at once. Dropped before it is finished, nothing of it counts.
pub trait Run {
    /// Adds a change to a key above all before it.
    fn push(&mut self, key: &[u8], value: Option<&Bytes>) -> Result<(), StorageError>;

    /// Makes all of it durable, together with what was written before, and then visible, whole. After a crash in
    /// here all of it is there or nothing; after an error too, and if that [was for want of
    /// space](StorageError::is_full) it is nothing.
    fn finish(self: Box<Self>) -> Result<(), StorageError>;
}

/// Bounds of a scan.
pub(super) type Bounds = (Bound<Vec<u8>>, Bound<Vec<u8>>);

/// The bounds of `[from, to)`, of which an empty `to` is none; `None` if they are crossed.
pub(super) fn bounds(from: Bound<&[u8]>, to: &[u8]) -> Option<Bounds> {
    let crossed = match from {
        Bound::Included(from) | Bound::Excluded(from) => !to.is_empty() && from >= to,
        Bound::Unbounded => false,
    };
    let upper = if to.is_empty() { Bound::Unbounded } else { Bound::Excluded(to.to_vec()) };
    (!crossed).then(|| (from.map(<[u8]>::to_vec), upper))
}

/// Visits what `next` gives until that is nothing, or `visit` returns false.
pub(super) fn visit_each<T>(
    mut next: impl FnMut() -> Result<Option<T>, StorageError>,
    mut visit: impl FnMut(T) -> Result<bool, StorageError>,
) -> Result<(), StorageError> {
    while let Some(item) = next()? {
        if !visit(item)? {
            break;
        }
    }
    Ok(())
}

/// An engine whose store is a directory of its own.
pub trait Store: Engine {
    /// Whether this opening made the store. It must not, once the node is a member of a cluster.
    fn created(&self) -> bool;

    /// Has `hook` told of damage that is found from now on, and of writes of which it isn't known what is on disk; the
    /// store is of no use any more then.
    fn on_damage(&self, hook: OnDamage);

    /// Makes what is under `key` something that can't be read, as damage would.
    #[cfg(test)]
    fn spoil(&self, key: &[u8]);
}
