//! A replica's state as it is found at a start, held against its log.
//!
//! The log is the measure: what it was truncated up to was in a durable state once. A state that is
//! missing is rebuilt from a log that begins at the beginning, and is lost otherwise; one that stands
//! before the log's beginning is lost as well. A state that is ahead of the log tells that the *log* lost
//! entries that this replica had acknowledged: that is an error, and no reason to give up the state.
//!
//! Who the members are, state and log tell; but for a replica that an operator has had go on alone. Its
//! record names it alone, under a later generation of conf versions than its state, and that counts.

use std::sync::Arc;

use super::StorageError;
use super::engine::Engine;
use super::generations;
use super::log::{LogState, ReplicaRecord};
use super::state::{ReplicaState, StateHeader, conf_state_of};
use crate::ids::Position;

/// A replica's state at a start.
pub enum OpenedState {
    /// It goes on from its applied index with the entries of its log.
    Whole(ReplicaState),
    /// The replica has its vote and its log, and needs another state: a snapshot at the log's beginning or
    /// later, loaded into a later generation than the record's, since the engine may hold remains of this one.
    Lost {
        /// Stands where the log begins, with the members of the replica's record. Nothing of it may be
        /// read: what it should hold isn't there.
        state: ReplicaState,
        /// How that was seen.
        why: String,
    },
}

impl OpenedState {
    /// Reads what the engine has of a replica. A state that is ahead of the log is
    /// [`StorageError::Damaged`]: the log is. Other errors are the engine's.
    pub fn open(
        engine: &Arc<dyn Engine>,
        record: &ReplicaRecord,
        log: &LogState,
    ) -> Result<OpenedState, StorageError> {
        let (replica, generation) = (record.replica, record.generation);
        let lost = |why| {
            let state = ReplicaState::at(engine.clone(), replica, generation, header(log, log.truncated));
            Ok(OpenedState::Lost { state, why })
        };
        // Stands at no entry, unless the engine has a header.
        let initial = header(log, Position::default());
        let mut state = match ReplicaState::open(engine.clone(), replica, generation, initial) {
            Ok(state) => state,
            Err(error @ StorageError::Damaged { .. }) => return lost(error.to_string()),
            Err(error) => return Err(error),
        };
        if state.header().applied == Position::default() {
            // A newcomer has nothing yet, and its log nothing either.
            let beginning = log.membership.beginning();
            if log.truncated != beginning {
                return lost(format!(
                    "the state store has none, and its log begins after entry {}",
                    log.truncated.index
                ));
            }
            // Whatever it stands at, the log's first entries come before it.
            if !generations::is_empty(&**engine, replica, generation)? {
                return lost("the state store has data of it, but not where it stands".into());
            }
            state = ReplicaState::at(engine.clone(), replica, generation, header(log, beginning));
        }
        let applied = state.header().applied;
        if applied.index > log.last {
            return Err(StorageError::Damaged {
                what: format!("the raft log of replica {replica}"),
                detail: format!("it ends at {}, the state is applied up to {}", log.last, applied.index),
            });
        }
        if applied.index < log.truncated.index {
            return lost(format!(
                "it is applied up to entry {}, and its log begins after entry {}",
                applied.index, log.truncated.index
            ));
        }
        if log.membership.epoch.generation() > state.header().epoch.generation() {
            // An operator has had this replica go on alone. Whatever the log says of members before that doesn't count.
            state.set_membership(log.membership.epoch, log.membership.members.clone());
        }
        Ok(OpenedState::Whole(state))
    }
}

/// The header of a state that stands at `applied` with the members that the replica's record names.
fn header(log: &LogState, applied: Position) -> StateHeader {
    StateHeader {
        applied,
        revision: 0,
        log_time: 0,
        epoch: log.membership.epoch,
        members: log.membership.members.clone(),
        conf_state: conf_state_of(&log.membership.members),
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use raft::eraftpb::HardState;

    use super::*;
    use crate::ids::{DatabaseId, Epoch, GROUP_START, Index, NodeId, ReplicaId, ShardId};
    use crate::machine::MachineKind;
    use crate::placement::map::{Member, MemberRole};
    use crate::placement::ring::RingRange;
    use crate::storage::engine_memory::MemoryEngine;
    use crate::storage::identity::IdentityError;
    use crate::storage::keys;
    use crate::storage::log::{RecordedMembership, ReplicaPhase};

    fn members() -> Vec<Member> {
        [(7, MemberRole::Voter), (8, MemberRole::Learner)]
            .map(|(id, role)| Member { replica: ReplicaId(id), node: NodeId(id), role })
            .into()
    }

    fn record(generation: u32) -> ReplicaRecord {
        ReplicaRecord {
            replica: ReplicaId(7),
            shard: ShardId(1),
            database: DatabaseId(1),
            machine: MachineKind::Kv,
            phase: ReplicaPhase::Active,
            range: RingRange::ALL,
            epoch: Epoch { range: 1, conf: 3 },
            members: members(),
            members_at: 0,
            ordered_at: 0,
            generation,
        }
    }

    fn log(truncated: Index, last: Index) -> LogState {
        LogState {
            hard_state: HardState::default(),
            truncated: Position { index: truncated, term: GROUP_START.term },
            last,
            terms: Vec::new(),
            membership: record(0).membership(),
        }
    }

    /// Puts a state of generation 1 there, applied up to an entry.
    fn put(engine: &Arc<dyn Engine>, applied: Index) {
        let header = header(&log(5, applied), Position { index: applied, term: GROUP_START.term });
        engine.write(&[(keys::header_key(ReplicaId(7), 1), Some(header.encode().into()))]).unwrap();
    }

    fn whole(engine: &Arc<dyn Engine>, record: &ReplicaRecord, log: LogState) -> ReplicaState {
        match OpenedState::open(engine, record, &log).unwrap() {
            OpenedState::Whole(state) => state,
            OpenedState::Lost { why, .. } => panic!("lost: {why}"),
        }
    }

    fn lost(engine: &Arc<dyn Engine>, record: &ReplicaRecord, log: LogState) -> (ReplicaState, String) {
        match OpenedState::open(engine, record, &log).unwrap() {
            OpenedState::Whole(state) => panic!("whole: {:?}", state.header()),
            OpenedState::Lost { state, why } => (state, why),
        }
    }

    fn engine() -> Arc<dyn Engine> {
        Arc::new(MemoryEngine::new())
    }

    #[test]
    fn a_state_within_its_log_is_whole() {
        let engine = engine();
        put(&engine, 9);
        for log in [log(5, 9), log(9, 9), log(9, 20)] {
            assert_eq!(whole(&engine, &record(1), log).header().applied.index, 9);
        }
    }

    #[test]
    fn a_new_replica_has_lost_nothing() {
        for last in [5, 9] {
            let state = whole(&engine(), &record(0), log(5, last));
            assert_eq!(state.header().applied, GROUP_START);
            assert_eq!(state.header().conf_state.voters, [7]);
            assert_eq!(state.header().conf_state.learners, [8]);
        }
    }

    #[test]
    fn one_that_goes_on_alone_has_the_members_of_its_record() {
        let engine = engine();
        put(&engine, 9);
        let mut log = log(5, 12);
        let alone = vec![members()[0]];
        let membership =
            |conf| RecordedMembership { index: 12, epoch: Epoch { range: 1, conf }, members: alone.clone() };
        // A change that the group made itself is in force when it is applied, not before.
        log.membership = membership(4);
        assert_eq!(whole(&engine, &record(1), log.clone()).header().members, members());
        log.membership = membership(1 << 32);
        let state = whole(&engine, &record(1), log.clone());
        assert_eq!((state.header().applied.index, state.header().epoch.conf), (9, 1 << 32));
        assert_eq!((&state.header().members, &state.header().conf_state.voters[..]), (&alone, &[7][..]));
        // From then on the state knows better.
        let later = StateHeader {
            epoch: Epoch { range: 1, conf: (1 << 32) + 2 },
            ..header(&log, Position { index: 12, term: 9 })
        };
        let later = StateHeader { members: members(), conf_state: conf_state_of(&members()), ..later };
        engine.write(&[(keys::header_key(ReplicaId(7), 1), Some(later.encode().into()))]).unwrap();
        assert_eq!(whole(&engine, &record(1), log).header().members, members());
    }

    #[test]
    fn a_missing_state_is_lost_if_the_log_does_not_begin_at_the_beginning() {
        let (state, why) = lost(&engine(), &record(0), log(9, 20));
        assert_eq!((state.header().applied.index, state.header().epoch.conf), (9, 3));
        assert_eq!(why, "the state store has none, and its log begins after entry 9");
    }

    #[test]
    fn data_that_stands_nowhere_is_lost() {
        let engine = engine();
        engine.write(&[(keys::user_key(ReplicaId(7), 0, b"k"), Some("v".into()))]).unwrap();
        lost(&engine, &record(0), log(5, 9));
        whole(&engine, &record(1), log(5, 9));
    }

    #[test]
    fn a_state_from_before_the_log_is_lost_and_one_ahead_of_it_damages_the_log() {
        let engine = engine();
        put(&engine, 9);
        let (state, why) = lost(&engine, &record(1), log(10, 20));
        assert_eq!(state.header().applied.index, 10);
        assert_eq!(why, "it is applied up to entry 9, and its log begins after entry 10");
        let error = OpenedState::open(&engine, &record(1), &log(5, 8)).err().unwrap();
        assert_eq!(
            error.to_string(),
            "the raft log of replica 7 is damaged: it ends at 8, the state is applied up to 9"
        );
    }

    #[test]
    fn what_cannot_be_read_is_lost_unless_it_is_newer() {
        let engine = engine();
        put(&engine, 9);
        let key = keys::header_key(ReplicaId(7), 1);
        let bytes = engine.get(&key).unwrap().unwrap().to_vec();
        engine.write(&[(key.clone(), Some(Bytes::copy_from_slice(&bytes[..9])))]).unwrap();
        let (_, why) = lost(&engine, &record(1), log(5, 9));
        assert!(why.starts_with("state of replica 7 (generation 1) is damaged"), "{why}");
        let newer = [&[0, 0, 0, 9], &bytes[4..]].concat();
        engine.write(&[(key, Some(newer.into()))]).unwrap();
        let error = OpenedState::open(&engine, &record(1), &log(5, 9)).err().unwrap();
        assert!(matches!(error, StorageError::Identity(IdentityError::Newer { found: 9, .. })), "{error}");
    }
}
