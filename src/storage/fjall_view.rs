//! What readers of a fjall tree read: its tables as of one moment, and the writes that aren't in a table yet.
//!
//! The tree's own reads take a lock that flushes and compactions hold while they sync files, which would have
//! readers wait for the disk. So readers get a view, which is replaced as a whole when tables have changed.
//! Tables are never written to again, and those of a view aren't removed before it is dropped.

use std::sync::Arc;

use lsm_tree::table::filter::standard_bloom::Builder as Bloom;
use lsm_tree::{AbstractTree, AnyTree, KvPair, Memtable, SeqNo, Tree, UserValue};

use super::engine::Bounds;

/// Pairs in key order.
pub(super) type Items = Box<dyn Iterator<Item = lsm_tree::Result<KvPair>>>;

// The types of the tree that these hold can't be named outside its crate.
type Get = dyn Fn(&[u8]) -> lsm_tree::Result<Option<UserValue>> + Send + Sync;
type Range = dyn Fn(&Bounds) -> Items + Send + Sync;

/// One state of a tree.
pub(super) struct View {
    /// What was written and isn't in a table yet. It grows; each of its entries is newer than all tables.
    pub pending: Arc<Memtable>,
    get: Box<Get>,
    range: Box<Range>,
}

impl View {
    /// The tree as it is now, below `pending`. Nobody may add tables meanwhile.
    pub fn new(tree: &AnyTree, pending: Arc<Memtable>) -> View {
        let version = tree.current_version();
        let get = move |key: &[u8]| {
            let hash = Bloom::get_hash(key);
            for run in version.iter_levels().flat_map(|level| level.iter()) {
                let Some(table) = run.get_for_key(key) else { continue };
                if let Some(found) = table.get(key, SeqNo::MAX, hash)? {
                    return Ok((!found.is_tombstone()).then_some(found.value));
                }
            }
            Ok(None)
        };
        let whole = tree.get_version_history_lock().latest_version();
        let above = pending.clone();
        let range = move |bounds: &Bounds| -> Items {
            let items = Tree::create_internal_range(
                whole.clone(),
                bounds,
                SeqNo::MAX,
                Some((above.clone(), SeqNo::MAX)),
            );
            Box::new(items.map(|item| item.map(|pair| (pair.key.user_key, pair.value))))
        };
        View { pending, get: Box::new(get), range: Box::new(range) }
    }

    /// The value of `key`.
    pub fn get(&self, key: &[u8]) -> lsm_tree::Result<Option<UserValue>> {
        match self.pending.get(key, SeqNo::MAX) {
            Some(entry) => Ok((!entry.is_tombstone()).then_some(entry.value)),
            None => (self.get)(key),
        }
    }

    /// The pairs within bounds that aren't crossed.
    pub fn range(&self, bounds: &Bounds) -> Items {
        (self.range)(bounds)
    }
}
