//! What a group does with committed entries, with the reads that wait for them, and with what they have
//! written.

use std::sync::Arc;

use bytes::Bytes;
use raft::eraftpb::{Entry, EntryType};

use super::driver::{Group, GroupError};
use super::marks::is_mark;
use super::types::{Effects, Output};
use crate::failpoints::failpoint;
use crate::ids::{Index, Position};
use crate::limits;
use crate::machine::ApplyError;
use crate::machine::command::{FormatError, Query, Reply, decode_entry};
use crate::refusal::Refusal;
use crate::storage::state::{Frozen, Lookup};
use crate::telemetry::hot::hot;

impl<T> Group<T> {
    /// Applies committed entries: those just handed out if nothing waits, else from the log.
    pub(super) fn apply(&mut self, committed: Vec<Entry>) -> Result<(), GroupError> {
        let caught_up = self.handed == self.done_to();
        if let Some(last) = committed.last() {
            assert!(committed[0].index == self.handed + 1, "raft hands out committed entries in order");
            self.handed = last.index;
        }
        if self.holds_apply() {
            // Entries go on arriving for as long as the others are a quorum without this replica. Those
            // that raft has handed out are read from the log again when applying resumes.
            self.raft.mut_store().trim_cache(self.handed);
            return Ok(());
        }
        let entries = if caught_up {
            committed
        } else {
            let (low, high) = (self.done_to() + 1, self.handed + 1);
            self.raft.store().read(low, high, limits::APPLY_PASS_BYTES as usize)?
        };
        // A read that memory can't answer waits for the state engine, which this thread can't afford to
        // often in one pass: neighbours would miss their heartbeats. The rest is for the next pass.
        let reads_before = self.state.engine_reads();
        let (mut count, mut last) = (0, None);
        for entry in entries {
            let index = entry.index;
            let is_change = entry.get_entry_type() == EntryType::EntryConfChangeV2;
            if is_change && !self.apply_change(&entry)? {
                break;
            }
            count += 1;
            last = Some(index);
            if is_change {
                // raft has to know that it is applied before the next can be proposed.
                break;
            }
            if self.state_lost {
                continue;
            }
            if self.apply_entry(entry)? {
                // The shell is to see the state as it is here.
                break;
            }
            if self.state.engine_reads() - reads_before >= limits::APPLY_PASS_READS {
                break;
            }
        }
        let Some(last) = last else { return Ok(()) };
        if self.state_lost {
            self.looked_to = last;
        }
        self.raft.advance_apply_to(last);
        self.raft.mut_store().trim_cache(last);
        hot().applied.increment(count);
        Ok(())
    }

    /// The entry that was being applied when the group panicked or failed, if that is when it did.
    pub fn applying(&self) -> Option<Index> {
        self.applying
    }

    /// Applies an entry; true: it was a mark.
    fn apply_entry(&mut self, entry: Entry) -> Result<bool, GroupError> {
        let position = Position { index: entry.index, term: entry.term };
        self.applying = Some(position.index);
        failpoint!(ApplyBefore, self.replica, &entry.data, why => {
            return Err(crate::storage::StorageError::Engine { engine: "state", reason: why }.into());
        });
        if entry.get_entry_type() != EntryType::EntryNormal {
            // Never skipped: nobody of this version has made it.
            return Err(ApplyError::Format(FormatError::Unknown {
                what: "entry type",
                value: entry.get_entry_type() as u64,
            })
            .into());
        }
        let mut replies = Vec::new();
        // An empty entry is a new leader's first, or a mark.
        let is_mark = is_mark(&entry);
        if !entry.data.is_empty() {
            let entry = decode_entry(&entry.data).map_err(ApplyError::Format)?;
            replies = self.machine.apply_entry(&entry, &mut self.state)?;
        }
        failpoint!(ApplyMiddle, self.replica);
        self.state.set_applied(position);
        self.applying = None;
        failpoint!(ApplyAfter, self.replica);
        let decided = self.proposals.decide(position);
        if is_mark {
            self.marked = Some(position.index);
            let marked = || Ok(Output::Marked(position.index));
            self.done.extend(decided.applied.into_iter().map(|token| (token, marked())));
        } else if !decided.applied.is_empty() && decided.applied.len() != replies.len() {
            // Not the entry that was proposed here, though it is of the term in which this replica led: so a
            // peer lies, and what became of the proposal nobody can tell.
            tracing::error!(shard = %self.shard, index = position.index, term = position.term, "an entry is another's than its leader's");
            let unknown = || Refusal::Unknown("another entry bears its place and term in the log".into());
            self.done.extend(decided.applied.into_iter().map(|token| (token, Err(unknown()))));
        } else {
            self.done.extend(decided.applied.into_iter().zip(replies.into_iter().map(conclude)));
        }
        self.done.extend(decided.superseded.into_iter().map(|t| (t, Err(Refusal::Superseded))));
        Ok(is_mark)
    }

    /// Answers reads whose index is applied: at once if memory knows the key, else by the shell.
    pub(super) fn serve_reads(&mut self, effects: &mut Effects<T>) -> Result<(), GroupError> {
        let ready = self.reads.ready(self.applied());
        if ready.is_empty() {
            return Ok(());
        }
        let (count, elsewhere) = (ready.len(), effects.reads.len());
        for (token, query) in ready {
            if let Query::Get { key } = &query
                && let Lookup::Known(stored) = self.state.recall(key)
            {
                let answer = self.machine.answer(key, stored.as_ref())?;
                self.done.push((token, Ok(Output::Answer(answer))));
            } else {
                effects.reads.push((token, query));
            }
        }
        let elsewhere = effects.reads.len() - elsewhere;
        hot().reads.increment(count as u64);
        hot().reads_memory.increment((count - elsewhere) as u64);
        hot().reads_engine.increment(elsewhere as u64);
        Ok(())
    }

    /// Freezes recent writes for a flush; `None` if there are none.
    pub fn freeze(&mut self) -> Option<Arc<Frozen>> {
        // On disk, an empty state with a header would look like a whole one.
        if self.state_lost { None } else { self.state.freeze() }
    }

    /// The engine has all that was frozen up to `index`: its memory is free, or known of the engine.
    pub fn release(&mut self, index: Index) {
        self.state.release(index);
    }

    /// Says by how many bytes that may grow which is known of the engine, from here on.
    pub fn allow_known(&mut self, room: usize) {
        self.state.allow_known(room);
    }

    /// Forgets of the engine what wasn't asked for lately; called twice in a row, all of it.
    pub fn forget_known(&mut self) {
        self.state.forget_known();
    }

    /// Takes in what a reader of the state with this stamp was told by the engine.
    pub fn learn(&mut self, stamp: u64, read: Vec<(Bytes, Option<Bytes>)>) {
        for (key, value) in read {
            self.state.learn(stamp, &key, value);
        }
    }
}

/// What a caller is told of the reply to its command.
fn conclude(reply: Reply) -> Result<Output, Refusal> {
    match reply {
        Reply::Session(reply) => Err(reply.into()),
        reply => Ok(Output::Reply(reply)),
    }
}
