//! State machine safety: the first replica that applies an entry decides what is committed at its
//! index. All others must apply the same, and at each applied index their state, read through
//! memtables, flushes, crashes and redo files, must be that of a plain map.

use std::collections::BTreeMap;
use std::ops::Bound;

use bytes::Bytes;
use raft::eraftpb::{Entry, EntryType};
use xxhash_rust::xxh3::Xxh3;

use super::Violation;
use super::logs::fingerprint;
use super::members::Members;
use super::once::Effects;
use crate::codec::membership;
use crate::ids::{GROUP_START, Index, ReplicaId, ShardId, Term};
use crate::machine::MachineKind;
use crate::machine::command::{Command, KvCommand, KvReply, Reply, decode_entry};
use crate::machine::memory::MemoryState;
use crate::machine::meta::cluster_map;
use crate::placement::map::{ClusterMap, Member};
use crate::storage::sessions::SessionTable;
use crate::storage::{StateView, StorageError};

/// A number that stands for a state.
pub fn state_hash(state: &dyn StateView, sessions: &SessionTable) -> Result<u64, StorageError> {
    let mut hash = Xxh3::new();
    hash.update(&state.revision().to_le_bytes());
    hash.update(&sessions.log_time().to_le_bytes());
    for (id, record) in sessions.records() {
        hash.update(&id.0);
        hash.update(&record);
    }
    state.scan(Bound::Unbounded, &mut |key, value| {
        for part in [key, value] {
            hash.update(&(part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        true
    })?;
    Ok(hash.digest())
}

/// A committed entry.
struct Committed {
    term: Term,
    content: u64,
    /// The state after it.
    state: u64,
    /// Term of the replica that first applied it: it was committed in this or an earlier one.
    known_in: Term,
}

/// What is committed in one shard.
#[derive(Default)]
pub struct Truth {
    entries: Vec<Committed>,
    model: MemoryState,
    /// The change that made each version: the key, and its value unless it was deleted.
    changes: BTreeMap<u64, (Vec<u8>, Option<Bytes>)>,
    /// Which commands made them.
    pub effects: Effects,
    /// Whose entries they are.
    pub members: Members,
    metadata: bool,
}

impl Truth {
    /// Nothing yet, in a shard of these members.
    pub fn new(members: Members) -> Truth {
        Truth { members, ..Truth::default() }
    }

    /// The same, of the metadata shard.
    pub fn of_metadata(members: Members) -> Truth {
        Truth { metadata: true, ..Truth::new(members) }
    }

    /// The map that the metadata shard has come to.
    pub fn map(&self) -> Result<ClusterMap, StorageError> {
        cluster_map(&self.model)
    }

    /// The highest index known to be committed.
    pub fn last(&self) -> Index {
        GROUP_START.index + self.entries.len() as u64
    }

    /// The change that made a version.
    pub fn change(&self, version: u64) -> Option<&(Vec<u8>, Option<Bytes>)> {
        self.changes.get(&version)
    }

    fn at(&self, index: Index) -> Option<&Committed> {
        let place = index.checked_sub(GROUP_START.index + 1)?;
        self.entries.get(usize::try_from(place).ok()?)
    }

    /// `replica`, in term `known_in`, applied `entry`.
    pub fn apply(
        &mut self,
        shard: ShardId,
        replica: ReplicaId,
        known_in: Term,
        entry: &Entry,
    ) -> Result<(), Violation> {
        let violation = |detail: String| Violation::new("state", detail);
        let content = fingerprint(entry);
        if let Some(known) = self.at(entry.index) {
            if (known.term, known.content) == (entry.term, content) {
                return Ok(());
            }
            return Err(violation(format!(
                "replica {replica} of shard {shard} applies entry {} of term {} where one of term {} is committed",
                entry.index, entry.term, known.term
            )));
        }
        if entry.index != self.last() + 1 {
            let last = self.last();
            return Err(violation(format!(
                "replica {replica} of shard {shard} applies entry {} after {last}",
                entry.index
            )));
        }
        let unreadable = |error: &dyn std::fmt::Display| violation(format!("entry {}: {error}", entry.index));
        if let Some((conf, members)) = changed(entry).map_err(|e| unreadable(&e))? {
            self.members.change(shard, entry.index, conf, &members)?;
        } else if !entry.data.is_empty() {
            let decoded = decode_entry(&entry.data).map_err(|e| unreadable(&e))?;
            let machine = if self.metadata { MachineKind::Metadata } else { MachineKind::Kv };
            let replies = machine.apply_entry(&decoded, &mut self.model);
            let replies = replies.map_err(|e| unreadable(&e))?;
            for ((command, tag), reply) in decoded.commands.into_iter().zip(replies) {
                let Command::Kv(command) = command else { continue };
                let (version, key, value) = match (command, reply) {
                    (
                        KvCommand::Put { key, value } | KvCommand::Cas { key, value, .. },
                        Reply::Kv(KvReply::Written(version)),
                    ) => (version, key, Some(value)),
                    (KvCommand::Delete { key }, Reply::Kv(KvReply::Deleted(version))) => (version, key, None),
                    _ => continue,
                };
                if self.changes.contains_key(&version) {
                    continue; // The answer to a command that came again.
                }
                self.effects.add(shard, tag, value.as_ref(), version)?;
                self.changes.insert(version, (key.to_vec(), value));
            }
        }
        let state = state_hash(&self.model, &self.model.sessions).map_err(|e| violation(e.to_string()))?;
        self.entries.push(Committed { term: entry.term, content, state, known_in });
        Ok(())
    }

    /// The state of `replica`, applied up to `applied`, must be the model's.
    pub fn compare(
        &self,
        shard: ShardId,
        replica: ReplicaId,
        applied: Index,
        state: &dyn StateView,
        sessions: &SessionTable,
    ) -> Result<(), Violation> {
        let found = state_hash(state, sessions).map_err(|e| Violation::new("state", e.to_string()))?;
        match self.at(applied) {
            Some(known) if known.state != found => Err(Violation::new(
                "state",
                format!(
                    "replica {replica} of shard {shard} has another state than it should at entry {applied}"
                ),
            )),
            // A group's beginning, and that of a newcomer which has no snapshot yet.
            None if ![0, GROUP_START.index].contains(&applied) => Err(Violation::new(
                "state",
                format!(
                    "replica {replica} of shard {shard} starts at entry {applied}, which nobody committed"
                ),
            )),
            _ => Ok(()),
        }
    }

    /// Leader completeness: the leader of `term`, in whose log entries have the terms that
    /// `term_of` tells, has all that was committed in earlier terms.
    pub fn check_leader(
        &self,
        shard: ShardId,
        replica: ReplicaId,
        term: Term,
        term_of: impl Fn(Index) -> Option<Term>,
    ) -> Result<(), Violation> {
        for (index, entry) in (GROUP_START.index + 1..).zip(&self.entries) {
            let has = term_of(index);
            if entry.known_in < term && has.is_some_and(|has| has != entry.term) {
                return Err(Violation::new(
                    "leaders",
                    format!(
                        "replica {replica} leads term {term} of shard {shard} without entry {index} of term {}, \
                         which is committed",
                        entry.term
                    ),
                ));
            }
        }
        Ok(())
    }
}

/// The conf version and the members that an entry makes, if it is a change of them.
pub fn changed(entry: &Entry) -> Result<Option<(u64, Vec<Member>)>, String> {
    if entry.get_entry_type() == EntryType::EntryNormal {
        return Ok(None);
    }
    let change = membership::decode(&entry.context).map_err(|error| error.to_string())?;
    Ok(Some((change.conf + 1, change.members)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::command::encode_entry;

    fn put(index: Index, term: Term, value: &'static str) -> Entry {
        let put = Command::Kv(KvCommand::Put { key: "k".into(), value: value.into() });
        Entry { index, term, data: encode_entry(&[(put, None)], 0).into(), ..Entry::default() }
    }

    #[test]
    fn divergence_is_seen_in_entries_and_in_states() {
        let mut truth = Truth::default();
        let (shard, replica) = (ShardId(1), ReplicaId(1));
        truth.apply(shard, replica, 6, &put(6, 6, "x")).unwrap();
        truth.apply(shard, ReplicaId(2), 6, &put(6, 6, "x")).unwrap();
        assert!(truth.apply(shard, replica, 6, &put(6, 6, "y")).is_err());
        assert!(truth.apply(shard, replica, 6, &put(6, 7, "x")).is_err());
        assert!(truth.apply(shard, replica, 6, &put(8, 7, "x")).is_err());
        assert_eq!(truth.change(1), Some(&(b"k".to_vec(), Some("x".into()))));

        let mut state = MemoryState::default();
        assert!(truth.compare(shard, replica, 6, &state, &state.sessions).is_err());
        assert!(truth.compare(shard, replica, 5, &state, &state.sessions).is_ok());
        assert!(truth.compare(shard, replica, 7, &state, &state.sessions).is_err());
        let entry = decode_entry(&put(6, 6, "x").data).unwrap();
        MachineKind::Kv.apply_entry(&entry, &mut state).unwrap();
        assert!(truth.compare(shard, replica, 6, &state, &state.sessions).is_ok());
        state.sessions.advance(1);
        assert!(truth.compare(shard, replica, 6, &state, &state.sessions).is_err());
    }

    #[test]
    fn a_leader_without_a_committed_entry_is_seen() {
        let mut truth = Truth::default();
        let (shard, replica) = (ShardId(1), ReplicaId(1));
        truth.apply(shard, replica, 6, &put(6, 6, "x")).unwrap();
        assert!(truth.check_leader(shard, replica, 7, |_| Some(6)).is_ok());
        assert!(truth.check_leader(shard, replica, 7, |_| Some(5)).is_err());
        assert!(truth.check_leader(shard, replica, 6, |_| Some(5)).is_ok());
    }
}
