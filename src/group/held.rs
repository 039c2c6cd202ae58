//! Log that leaders keep behind snapshots on their way, all groups of a node together: one bound in bytes, shared.
//!
//! A group may hold half of what the others leave. So one that is alone comes to half of the bound, n that hold as much
//! as they may to an (n + 1)th part each, and none has to know of any other. While the disk has no room to spare
//! nothing is granted.
//!
//! Invariant: what is counted never exceeds the bound by more than groups have appended since they last settled, which
//! they do whenever their logs are compacted.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// See the module page. One per node.
#[derive(Debug)]
pub struct HeldLog {
    bound: u64,
    held: AtomicU64,
    outrun: AtomicU64,
    withdrawn: AtomicBool,
}

impl HeldLog {
    /// Nothing held, of so many bytes that may be.
    pub fn new(bound: u64) -> HeldLog {
        HeldLog {
            bound,
            held: AtomicU64::new(0),
            outrun: AtomicU64::new(0),
            withdrawn: AtomicBool::new(false),
        }
    }

    /// Bytes that are held.
    pub fn bytes(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    /// How often a follower has lost the log behind its snapshot, because it came to more than was granted.
    pub fn outrun(&self) -> u64 {
        self.outrun.load(Ordering::Relaxed)
    }

    /// Whether anything is granted from now on: not while the disk is short of space.
    pub fn grant(&self, granted: bool) {
        self.withdrawn.store(!granted, Ordering::Relaxed);
    }
}

/// What one group holds of it; given back when this is dropped.
#[derive(Debug)]
pub struct Share {
    node: Arc<HeldLog>,
    own: u64,
}

impl Share {
    /// Nothing yet.
    pub fn new(node: Arc<HeldLog>) -> Share {
        Share { node, own: 0 }
    }

    /// So much the group may hold.
    pub fn granted(&self) -> u64 {
        if self.node.withdrawn.load(Ordering::Relaxed) {
            return 0;
        }
        let others = self.node.bytes().saturating_sub(self.own);
        self.node.bound.saturating_sub(others) / 2
    }

    /// So much it holds.
    pub fn settle(&mut self, bytes: u64) {
        // More at first, so that no other group sees less than there is.
        self.node.held.fetch_add(bytes, Ordering::Relaxed);
        self.node.held.fetch_sub(self.own, Ordering::Relaxed);
        self.own = bytes;
    }

    /// A follower has lost what was held for it.
    pub fn note_outrun(&self) {
        self.node.outrun.fetch_add(1, Ordering::Relaxed);
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.settle(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_may_hold_half_of_what_the_others_leave() {
        let node = Arc::new(HeldLog::new(1_200));
        let mut shares: Vec<Share> = (0..3).map(|_| Share::new(node.clone())).collect();
        assert_eq!(shares[0].granted(), 600);
        for _ in 0..50 {
            for share in &mut shares {
                share.settle(share.granted());
            }
        }
        for share in &shares {
            assert!((295..=305).contains(&share.granted()), "{shares:?}");
        }
        assert!(node.bytes() <= 1_200);
        shares.truncate(1);
        assert_eq!(node.bytes(), shares[0].own, "what a group held is given back with it");
        assert_eq!(shares[0].granted(), 600);
    }

    #[test]
    fn nothing_is_granted_while_the_disk_is_short_of_space() {
        let node = Arc::new(HeldLog::new(1_000));
        let mut share = Share::new(node.clone());
        share.settle(400);
        node.grant(false);
        assert_eq!(share.granted(), 0);
        node.grant(true);
        assert_eq!(share.granted(), 500);
    }
}
