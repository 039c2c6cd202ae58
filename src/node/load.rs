//! What a node works on for its clients, in operations and bytes.
//!
//! An operation counts until it has really ended, not until its caller has given up: a command in a
//! queue takes its memory whether or not anybody waits. So what is admitted travels with the
//! operations, through mailbox, queue and log, and is given back by whoever ends the last of them.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::limits::{BUSY_RETRY_MS, THREAD_BYTES_MAX, THREAD_OPERATIONS_MAX};
use crate::refusal::Refusal;

/// What was admitted by one thread of a node and hasn't ended.
#[derive(Default)]
pub struct Load {
    operations: AtomicUsize,
    bytes: AtomicUsize,
}

impl Load {
    /// Admits so many operations and bytes, or says why not. They count until what is returned is
    /// dropped. What is too large for the bounds is admitted when there is nothing else.
    pub fn admit(self: &Arc<Load>, operations: usize, bytes: usize) -> Result<Admitted, Refusal> {
        // Only the thread that owns this adds; others subtract. So it may be less by now, never more.
        let (now, bytes_now) = (self.operations(), self.bytes.load(Ordering::Relaxed));
        let full = now + operations > THREAD_OPERATIONS_MAX || bytes_now + bytes > THREAD_BYTES_MAX;
        if full && now > 0 {
            return Err(Refusal::Busy { what: "client calls".into(), retry_after_ms: BUSY_RETRY_MS });
        }
        self.operations.fetch_add(operations, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        Ok(Admitted { load: self.clone(), operations, bytes })
    }

    /// Operations that were admitted and haven't ended.
    pub fn operations(&self) -> usize {
        self.operations.load(Ordering::Relaxed)
    }
}

/// See [`Load::admit`].
pub struct Admitted {
    load: Arc<Load>,
    operations: usize,
    bytes: usize,
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.load.operations.fetch_sub(self.operations, Ordering::Relaxed);
        self.load.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn load_is_bounded_but_never_refuses_what_is_alone() {
        let load = Arc::<Load>::default();
        let great = load.admit(1, 2 * THREAD_BYTES_MAX).unwrap();
        assert!(matches!(load.admit(1, 1), Err(Refusal::Busy { .. })));
        drop(great);
        let one = load.admit(THREAD_OPERATIONS_MAX, 1).unwrap();
        assert!(load.admit(1, 1).is_err());
        drop(one);
        assert!(load.admit(1, 1).is_ok());
        assert_eq!(load.operations(), 0);
    }
}
