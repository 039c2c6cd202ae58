//! How a replica goes on alone whose group has lost its majority for good.
//!
//! An operator has decided that, and the metadata shard has recorded it: the shard's record names one voter alone,
//! under a conf version of a later *generation* ([`Epoch::generation`]) than any that the group came to by itself. The
//! node that holds that replica does the rest whenever it sees such a record, so nothing is lost if it is down,
//! or goes down meanwhile:
//!
//! ```text
//!   stopped ─► fenced ─► one write of the log ─► opened ─► elected by itself
//!                            │
//!                            entry of a new term behind all others; all of it committed; the record names one member
//! ```
//!
//! The metadata shard can't record a decision about itself while it has no leader: its node is asked to go ahead at once
//! ([`NodeHandle::go_on_alone`]), and the record is that one entry. So it comes before anything that is proposed to the
//! replica that goes on: of what the shard had told of the map, and which ids it had given out, the replica may have
//! missed the last. See [`crate::machine::meta`] on generations.
//!
//! *What is kept.* All entries of its log, committed as far as it knows or not: those that the majority acknowledged
//! are among them as far as this replica has them, and which ones those are nobody can tell any more. So nothing is
//! dropped that might have been acknowledged.
//!
//! *What is lost is not made again.* A client may know a version of a key that is lost. So the versions of the writes
//! that follow are of the new generation: the entry says so, and each replica that applies it does the same.
//!
//! *Why one write is enough.* The members in the replica's record count for more than those in its state if they are of a
//! later generation: see [`crate::storage::opened`]. Changes of members in the log that came before are of
//! earlier conf versions, and passed over when the log is applied.
//!
//! *Why nobody else goes on.* The other replicas are not in the map any more, so their nodes remove them as soon as they
//! see it. If a majority of them isn't gone at all but only cut off, both it and this replica may
//! serve until then: that is what an operator accepts who says that it is gone.

use std::collections::HashSet;
use std::time::Duration;

use actix::prelude::*;
use raft::eraftpb::{Entry, HardState};
use tokio::sync::oneshot;

use super::handle::{NodeHandle, ReplicaHealth};
use super::hub::Forget;
use super::messages::StopReplica;
use super::router::Route;
use super::supervisor::Supervisor;
use crate::failpoints::failpoint;
use crate::ids::{Epoch, METADATA_SHARD, NodeId, ReplicaId, ShardId};
use crate::limits::DISK_WATCH_MS;
use crate::machine::command::{Command, MetaCommand};
use crate::machine::entry::{encode_beginning, encode_entry};
use crate::placement::map::{Member, MemberRole};
use crate::refusal::Refusal;
use crate::storage::StorageError;
use crate::storage::log::{LogState, LogStore, LogWrite, RecordedMembership, ReplicaRecord};

/// What has a replica go on alone under `epoch`.
///
/// # Errors
/// [`StorageError::Inconsistent`]: there is no later term or index.
fn alone(
    log: &LogState,
    record: &ReplicaRecord,
    node: NodeId,
    epoch: Epoch,
) -> Result<LogWrite, StorageError> {
    let replica = record.replica;
    let last_term = log.terms.last().map_or(log.truncated.term, |(_, term)| *term);
    let next = |number: u64| {
        let reason = "there is no later term or index".to_owned();
        number.checked_add(1).ok_or(StorageError::Inconsistent { replica, reason })
    };
    // Nobody was elected in this term, and the record of its vote is as before: none.
    let term = next(log.hard_state.term.max(last_term))?;
    let index = next(log.last)?;
    let members = vec![Member { replica, node, role: MemberRole::Voter }];
    let data = match record.shard {
        METADATA_SHARD => {
            let command =
                MetaCommand::RecoverShard { shard: METADATA_SHARD, keep: replica, conf: epoch.conf };
            encode_entry(&[(Command::Meta(command), None)], 0)
        }
        _ => encode_beginning(epoch.conf),
    };
    Ok(LogWrite {
        replica,
        // As a leader's first: members in the record are of an entry of their own.
        entries: vec![Entry { term, index, data: data.into(), ..Entry::default() }],
        hard_state: Some(HardState { term, vote: 0, commit: index, ..HardState::default() }),
        membership: Some(RecordedMembership { index, epoch, members }),
    })
}

fn write(
    log: &dyn LogStore,
    record: &ReplicaRecord,
    node: NodeId,
    epoch: Epoch,
) -> Result<RecordedMembership, StorageError> {
    let replica = record.replica;
    let state = log.load(replica)?;
    if state.membership.epoch.generation() >= epoch.generation() {
        // Done before a crash, or by the attempt before.
        return Ok(state.membership);
    }
    let write = alone(&state, record, node, epoch)?;
    log.write(std::slice::from_ref(&write))?;
    let kept = (state.last, state.hard_state.commit, state.hard_state.term);
    tracing::warn!(%replica, last = kept.0, committed = kept.1, term = kept.2, "the replica goes on alone");
    Ok(write.membership.unwrap_or_default())
}

/// Service → supervisor: have this node's replica of a shard go on alone, under this conf version. For the
/// metadata shard, which can't record such a decision about itself while it has no leader.
#[derive(Message)]
#[rtype(result = "Result<(), Refusal>")]
struct GoOnAlone {
    shard: ShardId,
    conf: u64,
}

impl NodeHandle {
    /// Begins to have this node's replica of a shard go on alone, under a conf version of a later generation. The
    /// caller has made sure that the shard's majority is gone.
    ///
    /// # Errors
    /// The node has no replica of the shard; or the replica is being opened, or switched to a snapshot: try again.
    pub async fn go_on_alone(&self, shard: ShardId, conf: u64) -> Result<(), Refusal> {
        let stopping = |_| Refusal::Unavailable("the node is stopping".into());
        self.supervisor()?.send(GoOnAlone { shard, conf }).await.map_err(stopping)?
    }
}

impl Handler<GoOnAlone> for Supervisor {
    type Result = Result<(), Refusal>;
    fn handle(&mut self, order: GoOnAlone, ctx: &mut Context<Self>) -> Self::Result {
        let GoOnAlone { shard, conf } = order;
        let Some(slot) = self.replicas.iter().find(|slot| slot.record.shard == shard) else {
            return Err(Refusal::Refused(format!("this node has no replica of shard {shard}")));
        };
        let (replica, epoch) = (slot.record.replica, Epoch { conf, ..slot.record.epoch });
        match self.recover_replica(replica, epoch, ctx) {
            true => Ok(()),
            false => Err(Refusal::Unavailable("the replica is being opened".into())),
        }
    }
}

impl Supervisor {
    /// Has those replicas go on alone that the map says so of, and aren't yet.
    pub(super) fn recover(&mut self, ctx: &mut Context<Self>) {
        let map = self.shared.router.map();
        for (replica, epoch) in self.replicas.recoveries(&map, self.site.node) {
            if !self.recover_replica(replica, epoch, ctx) {
                self.recover_again(ctx);
            }
        }
    }

    fn recover_again(&mut self, ctx: &mut Context<Self>) {
        ctx.run_later(Duration::from_millis(DISK_WATCH_MS), |act, ctx| act.recover(ctx));
    }

    /// False: not now, it is being opened, or switched to a snapshot.
    fn recover_replica(&mut self, replica: ReplicaId, epoch: Epoch, ctx: &mut Context<Self>) -> bool {
        if self.stopping {
            return false;
        }
        let Ok((shard, incarnation)) = self.replicas.begin_install(replica) else {
            return false;
        };
        let Some(record) = self.replicas.get_mut(replica).map(|slot| slot.record.clone()) else {
            return false;
        };
        tracing::warn!(%shard, %replica, ?epoch, "an operator has given the other replicas of the shard up");
        failpoint!(RecoverBefore, replica);
        self.led.remove(&shard);
        self.shared.snapshots.outgoing.cancel(replica);
        self.shared.router.update(|routes| {
            routes.insert(shard, Route { replica, target: Err(ReplicaHealth::Installing) });
        });
        self.hub(shard).do_send(Forget(replica, incarnation));
        self.resting.remove(&replica);
        let (addr, shared, node) = (self.addrs.remove(&replica), self.shared.clone(), self.site.node);
        let written = async move {
            if let Some(addr) = addr
                && let Err(error) = addr.send(StopReplica).await
            {
                tracing::debug!(%error, "the replica had ended already");
            }
            // What it has promised is on disk, and nothing of it comes later.
            shared.fence(replica, incarnation).await;
            let (done, written) = oneshot::channel();
            shared.log_writer.run(Box::new(move |log| {
                if done.send(write(log, &record, node, epoch)).is_err() {
                    tracing::debug!(%replica, "nobody waits for the record of a replica that goes on alone");
                }
            }));
            written.await
        };
        ctx.spawn(fut::wrap_future(written).map(move |written, act: &mut Self, ctx| match written {
            Ok(written) => act.recovered(replica, written, ctx),
            // It says itself why it has ended.
            Err(_) => tracing::debug!("the log writer has ended"),
        }));
        true
    }

    fn recovered(
        &mut self,
        replica: ReplicaId,
        written: Result<RecordedMembership, StorageError>,
        ctx: &mut Context<Self>,
    ) {
        let membership = match written {
            Ok(membership) => Some(membership),
            Err(error) if error.is_full() || matches!(error, StorageError::Inconsistent { .. }) => {
                tracing::error!(%replica, %error, "the replica can't go on alone yet");
                self.recover_again(ctx);
                None
            }
            Err(error) => {
                return self.fatal.raise(format!("having replica {replica} go on alone: {error}"));
            }
        };
        failpoint!(RecoverReopen, replica);
        // Removed meanwhile, with its shard.
        if let Some(record) = self.replicas.end_recovery(replica, membership) {
            self.open(vec![record], HashSet::from([replica]), ctx);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{DatabaseId, Position};
    use crate::machine::MachineKind;
    use crate::machine::entry::decode_entry;
    use crate::placement::ring::RingRange;
    use crate::storage::log::{Install, ReplicaPhase, ReplicaRecord};
    use crate::storage::log_memory::MemoryLog;

    const ONE: ReplicaId = ReplicaId(1);

    fn member(id: u64) -> Member {
        Member { replica: ReplicaId(id), node: NodeId(id), role: MemberRole::Voter }
    }

    /// A log of three voters with entries 6 to 9, of which 7 is committed as far as this replica knows.
    fn log() -> MemoryLog {
        let record = record();
        let log = MemoryLog::new();
        log.create(&[record]).unwrap();
        let entries = (6..=9).map(|index| Entry { index, term: 7, ..Entry::default() }).collect();
        let hard_state = Some(HardState { term: 8, vote: 2, commit: 7, ..HardState::default() });
        log.write(&[LogWrite { replica: ONE, entries, hard_state, membership: None }]).unwrap();
        log
    }

    fn record() -> ReplicaRecord {
        ReplicaRecord {
            replica: ONE,
            shard: ShardId(4),
            database: DatabaseId(1),
            machine: MachineKind::Kv,
            phase: ReplicaPhase::Active,
            range: RingRange::ALL,
            epoch: Epoch { range: 1, conf: 1 },
            members: (1..=3).map(member).collect(),
            members_at: 0,
            generation: 1,
            ordered_at: 1,
        }
    }

    #[test]
    fn all_entries_are_kept_and_one_member_is_left() {
        let log = log();
        let epoch = Epoch { range: 1, conf: 1 << 32 };
        let membership = write(&log, &record(), NodeId(1), epoch).unwrap();
        let state = log.load(ONE).unwrap();
        assert_eq!(state.membership, membership);
        assert_eq!((membership.epoch, membership.members), (epoch, vec![member(1)]));
        assert_eq!((state.last, state.hard_state.commit), (10, 10), "also what wasn't known to be committed");
        assert_eq!((state.hard_state.term, state.hard_state.vote), (9, 0), "a term of which nobody was");
        assert_eq!(state.terms.last(), Some(&(10, 9)));
        let entry = log.entries(ONE, 10, 11, usize::MAX).unwrap().remove(0);
        assert_eq!(decode_entry(&entry.data).unwrap().begins, Some(1 << 32));
    }

    #[test]
    fn a_second_time_changes_nothing() {
        let log = log();
        let epoch = Epoch { range: 1, conf: 1 << 32 };
        write(&log, &record(), NodeId(1), epoch).unwrap();
        let once = log.load(ONE).unwrap();
        write(&log, &record(), NodeId(1), epoch).unwrap();
        assert_eq!(log.load(ONE).unwrap(), once);
        // A later generation is another decision.
        write(&log, &record(), NodeId(1), Epoch { range: 1, conf: 2 << 32 }).unwrap();
        assert_eq!(log.load(ONE).unwrap().last, once.last + 1);
    }

    #[test]
    fn a_snapshot_that_was_on_its_way_does_not_undo_it() {
        let log = log();
        // Of a leader that was given up, and further on than this replica was.
        let install = |conf| Install {
            generation: 2,
            position: Position { index: 90, term: 8 },
            leader_term: 20,
            epoch: Epoch { range: 1, conf },
            members: (1..=3).map(member).collect(),
            state_lost: false,
        };
        write(&log, &record(), NodeId(1), Epoch { range: 1, conf: 1 << 32 }).unwrap();
        let alone = log.load(ONE).unwrap();
        for state_lost in [false, true] {
            let refused = log.install(ONE, &Install { state_lost, ..install(9) });
            assert!(matches!(refused, Err(StorageError::Inconsistent { .. })), "{refused:?}");
            assert_eq!(log.load(ONE).unwrap(), alone);
        }
        // By a leader of those who went on with it, it may be brought up to date.
        log.install(ONE, &install((1 << 32) + 3)).unwrap();
        assert_eq!(log.load(ONE).unwrap().last, 90);
    }

    #[test]
    fn the_metadata_shard_begins_with_the_record_of_it() {
        let log = log();
        let metadata = ReplicaRecord { shard: METADATA_SHARD, ..record() };
        let conf = 1 << 32;
        write(&log, &metadata, NodeId(1), Epoch { range: 1, conf }).unwrap();
        let entry = log.entries(ONE, 10, 11, usize::MAX).unwrap().remove(0);
        let command = MetaCommand::RecoverShard { shard: METADATA_SHARD, keep: ONE, conf };
        assert_eq!(decode_entry(&entry.data).unwrap().commands, [(Command::Meta(command), None)]);
    }

    #[test]
    fn there_is_an_end_to_terms() {
        let mut state = log().load(ONE).unwrap();
        state.hard_state.term = u64::MAX;
        assert!(alone(&state, &record(), NodeId(1), Epoch::default()).is_err());
    }
}
