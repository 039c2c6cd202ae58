//! What a group does while its node has no memory for what it would apply.
//!
//! Committed entries stay in the log, acknowledgements and votes go on. As a leader it can serve nobody: callers are
//! `Busy`. If that lasts it counts as *held up*: its shell looks for another to lead, and it takes no leadership itself,
//! nor stands for election before the others had their turn. All of them may be held up; then whoever leads stays.

use super::driver::Group;
use crate::limits;

impl<T> Group<T> {
    /// Stops or resumes applying, because of memory.
    pub fn pause_apply(&mut self, paused: bool) {
        match paused {
            true => self.paused_at = self.paused_at.or(Some(self.ticks)),
            false => self.paused_at = None,
        }
    }

    /// Bytes of the entries that the next pass applies, about: of those that are committed and durable here. Those
    /// that have left memory count for a whole pass.
    pub fn next_pass_bytes(&self) -> usize {
        let log = &self.raft.raft.raft_log;
        let (from, to) = (self.done_to() + 1, log.committed.min(log.persisted) + 1);
        match from < to && !self.state_lost {
            true => self.raft.store().pass_bytes(from, to, limits::APPLY_PASS_BYTES as usize),
            false => 0,
        }
    }

    /// For how many ticks the replica has been held up; zero at the tick at which it begins to be.
    pub fn held_up_ticks(&self) -> Option<u64> {
        let paused = self.ticks - self.paused_at?;
        paused.checked_sub(limits::HELD_UP_TICKS)
    }

    pub(super) fn is_held_up(&self) -> bool {
        self.held_up_ticks().is_some()
    }
}
