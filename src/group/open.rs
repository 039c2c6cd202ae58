//! From what is on disk to a running [`Group`].

use std::collections::VecDeque;
use std::sync::Arc;

use raft::{Config, RawNode};

use super::beats::Beats;
use super::catch_up::{CatchUp, Retention};
use super::clock::SessionClock;
use super::driver::{Group, GroupError};
use super::election::{self, Ambition};
use super::held::HeldLog;
use super::log::{CachedBytes, GroupLog};
use super::membership;
use super::per_member::PerMember;
use super::proposals::Proposals;
use super::queue::Queue;
use super::reads::Reads;
use super::sleep::Sleep;
use super::types::LeaderChange;
use crate::ids::{Incarnation, ReplicaId, ShardId, Term};
use crate::limits;
use crate::machine::MachineKind;
use crate::storage::StorageError;
use crate::storage::log::{LogState, LogStore};
use crate::storage::state::{ReplicaState, conf_state_of};

/// Who a group is.
pub struct GroupOptions {
    /// The shard.
    pub shard: ShardId,
    /// The machine it runs.
    pub machine: MachineKind,
    /// This replica.
    pub replica: ReplicaId,
    /// Which start of the replica this is.
    pub incarnation: Incarnation,
    /// What is kept of the log for followers that lag.
    pub retention: Retention,
    /// Where raft-rs logs.
    pub logger: slog::Logger,
    /// Log entries in memory of all groups of the node.
    pub cached: Arc<CachedBytes>,
    /// Log that leaders of the node keep behind snapshots.
    pub held: Arc<HeldLog>,
    /// Its state is lost: the one it is opened with is empty and stands where the log begins. See
    /// [`super::lost`].
    pub state_lost: bool,
}

impl<T> Group<T> {
    /// Rebuilds a replica from its log and state. Nothing in memory survives a crash; whatever was
    /// promised is on disk.
    pub fn open(
        options: GroupOptions,
        store: Arc<dyn LogStore>,
        mut log: LogState,
        state: ReplicaState,
    ) -> Result<Group<T>, GroupError> {
        let applied = state.header().applied;
        if log.last < applied.index {
            return Err(damaged(
                options.replica,
                format!("the log ends at {}, the state is applied up to {}", log.last, applied.index),
            ));
        }
        if applied.index < log.truncated.index {
            return Err(damaged(
                options.replica,
                format!(
                    "the state is applied up to {}, the log begins after {}",
                    applied.index, log.truncated.index
                ),
            ));
        }
        if options.state_lost && applied != log.truncated {
            return Err(damaged(
                options.replica,
                format!(
                    "a lost state stands at {}, the log begins after {}",
                    applied.index, log.truncated.index
                ),
            ));
        }
        if log.hard_state.commit > log.last {
            return Err(damaged(
                options.replica,
                format!("entry {} is committed, the log ends at {}", log.hard_state.commit, log.last),
            ));
        }
        if log.hard_state.commit < log.membership.index {
            return Err(damaged(
                options.replica,
                format!(
                    "its record names the members of entry {}, only entry {} is committed",
                    log.membership.index, log.hard_state.commit
                ),
            ));
        }
        let (members, conf_state) = (&state.header().members, &state.header().conf_state);
        if !membership::is_same(&conf_state_of(members), conf_state) {
            return Err(damaged(
                options.replica,
                format!("its members are {members:?}, its configuration is {conf_state:?}"),
            ));
        }
        // The commit index is stored with the next write, not for its own sake: the state may be ahead.
        log.hard_state.commit = log.hard_state.commit.max(applied.index);
        let recover_to = log.hard_state.commit;
        let durable_term = log.hard_state.term;
        let recorded = log.membership.index;
        // Without its state it has its members from the catalogue, and looks for changes of them behind that.
        let handed = if options.state_lost { applied.index.max(recorded) } else { applied.index };
        let config = Config {
            id: options.replica.0,
            election_tick: limits::ELECTION_TICKS_MIN,
            heartbeat_tick: limits::HEARTBEAT_TICKS,
            min_election_tick: limits::ELECTION_TICKS_MIN,
            max_election_tick: limits::ELECTION_TICKS_MAX + election::LOST_TICKS,
            applied: handed,
            max_size_per_msg: limits::APPEND_TARGET_BYTES as u64,
            max_inflight_msgs: limits::APPENDS_IN_FLIGHT_MAX,
            check_quorum: true,
            pre_vote: true,
            batch_append: true,
            max_uncommitted_size: limits::UNCOMMITTED_BYTES_MAX as u64,
            // Followers hear of a commit with the next append, or the next heartbeat: telling them at once would
            // double the messages of a write, and nobody waits for them to apply it. But for the metadata shard,
            // whose followers' nodes take the map from it.
            skip_bcast_commit: options.machine == MachineKind::Kv,
            max_committed_size_per_ready: limits::APPLY_PASS_BYTES,
            ..Config::default()
        };
        let conf_state = state.header().conf_state.clone();
        let marks = options.retention.mark_bytes();
        let log = GroupLog::new(options.replica, store, log, conf_state, marks, options.cached);
        let mut raft = RawNode::new(&config, log, &options.logger)?;
        raft.mut_store().begun();
        let mut group = Group {
            shard: options.shard,
            machine: options.machine,
            replica: options.replica,
            incarnation: options.incarnation,
            leader: LeaderChange { term: raft.raft.term, leader: None, local: false },
            raft,
            state,
            queued: Queue::new(),
            changes: Vec::new(),
            marks: Vec::new(),
            marked: None,
            proposals: Proposals::new(),
            reads: Reads::new(options.incarnation),
            unpersisted: VecDeque::new(),
            passed_over: false,
            writes: 0,
            durable_term,
            recover_to,
            handed,
            looked_to: handed,
            recorded,
            ahead_to: 0,
            barrier: None,
            confs: PerMember::default(),
            strangers: PerMember::default(),
            applying: None,
            paused_at: None,
            state_lost: options.state_lost,
            fetching: None,
            ticks: 0,
            clock: SessionClock::default(),
            stepped_down: None,
            timeout: (Term::MAX, 0),
            ambition: Ambition::Usual,
            gives_way_at: 0,
            handing_over: None,
            lapsed: None,
            safe_index: 0,
            catch_up: CatchUp::new(options.retention, options.held),
            beats: Beats::default(),
            sleep: Sleep::never(),
            vacancy: Default::default(),
            messages: Vec::new(),
            done: Vec::new(),
        };
        group.draw_timeout();
        Ok(group)
    }
}

fn damaged(replica: ReplicaId, detail: String) -> GroupError {
    StorageError::Damaged { what: format!("replica {replica}"), detail }.into()
}
