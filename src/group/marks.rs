//! Marks: entries that change nothing, by which all replicas know the same place in the log.
//!
//! A mark is an empty entry with a context. To a program that doesn't know of marks, or a replica whose shell does
//! nothing about them, it is an empty entry like that of a new leader: what applying it comes to is the same
//! everywhere. Where it is applied a pump ends, and tells ([`Effects::marked`](super::types::Effects::marked)).

use raft::eraftpb::{Entry, EntryType};

use super::driver::{Group, busy};

/// The context of a mark.
const MARK: &[u8] = b"mark";

/// Whether a committed entry is one.
pub(super) fn is_mark(entry: &Entry) -> bool {
    entry.get_entry_type() == EntryType::EntryNormal && entry.data.is_empty() && *entry.context == *MARK
}

impl<T> Group<T> {
    /// Proposes one mark for all who wait for one. As a follower it does nothing: `follow_leadership` sends them away.
    pub(super) fn propose_mark(&mut self) {
        if self.marks.is_empty() || !self.leads() {
            return;
        }
        let tokens = std::mem::take(&mut self.marks);
        match self.raft.propose(MARK.to_vec(), Vec::new()) {
            Ok(()) => {
                self.proposals.insert(self.last_proposed(), tokens);
            }
            // Dropped before it entered the log: leadership is moving.
            Err(_) => {
                let refuse = |token| (token, Err(busy("uncommitted entries of the shard")));
                self.done.extend(tokens.into_iter().map(refuse));
            }
        }
    }
}
