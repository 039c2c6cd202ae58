//! How the supervisor opens replicas: log and state are read from disk, off its thread; then each group is
//! started on the thread of its shard, or tried again later if it can't be.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use actix::prelude::*;

use super::handle::ReplicaHealth;
use super::hub::StartReplica;
use super::messages::{Campaign, StopReplica};
use super::open::{OpenedState, open_stores};
use super::panics::contained;
use super::replica::ReplicaAddr;
use super::replicas::Started;
use super::router::Route;
use super::supervisor::Supervisor;
use crate::group::open::GroupOptions;
use crate::ids::{Incarnation, ReplicaId, ShardId};
use crate::limits;
use crate::storage::engine::Engine;
use crate::storage::log::{LogState, LogStore, ReplicaRecord};
use crate::storage::state::ReplicaState;
use crate::telemetry;
use crate::telemetry::metrics as names;

/// What the disk has of a replica.
struct Found {
    log: LogState,
    state: ReplicaState,
    /// Why the state is lost, if it is.
    lost: Option<String>,
}

struct Opened {
    record: ReplicaRecord,
    found: Result<Found, String>,
}

/// A replica that was started, or why it can't be.
struct Attempt {
    shard: ShardId,
    replica: ReplicaId,
    incarnation: Incarnation,
    lost: Option<String>,
    result: Result<ReplicaAddr, String>,
}

fn find(log: &dyn LogStore, engine: &Arc<dyn Engine>, record: &ReplicaRecord) -> Result<Found, String> {
    match open_stores(log, engine, record).map_err(|error| error.to_string())? {
        (log, OpenedState::Whole(state)) => Ok(Found { log, state, lost: None }),
        // Only a leader can give it another state, and nobody else can lead.
        (log, OpenedState::Lost { why, .. }) if is_only_voter(record.replica, &log) => Err(format!(
            "the state of the shard's only copy is lost: {why}; restore its database from a backup"
        )),
        (log, OpenedState::Lost { state, why }) => Ok(Found { log, state, lost: Some(why) }),
    }
}

fn is_only_voter(replica: ReplicaId, log: &LogState) -> bool {
    let mut voters = log.membership.members.iter().filter(|member| member.role.votes()).peekable();
    voters.peek().is_some() && voters.all(|member| member.replica == replica)
}

impl Supervisor {
    /// Reads log and state of `records` from disk, off this thread, and starts their actors, so many at a time
    /// ([`limits::REPLICAS_OPENED_AT_A_TIME`]): what thousands need for it together would be most of what they ever do.
    /// `campaign`: those to elect at once.
    pub(super) fn open(
        &mut self,
        records: Vec<ReplicaRecord>,
        campaign: HashSet<ReplicaId>,
        ctx: &mut Context<Self>,
    ) {
        self.open_next(records.into(), campaign, ctx);
    }

    fn open_next(
        &mut self,
        mut waiting: VecDeque<ReplicaRecord>,
        campaign: HashSet<ReplicaId>,
        ctx: &mut Context<Self>,
    ) {
        if self.stopping || waiting.is_empty() {
            return;
        }
        let now = waiting.len().min(limits::REPLICAS_OPENED_AT_A_TIME);
        // While it waited its record may have changed, or gone; then it is nothing for `start` either.
        let records: Vec<_> = (waiting.drain(..now))
            .map(|record| self.replicas.get_mut(record.replica).map_or(record, |slot| slot.record.clone()))
            .collect();
        let log = self.shared.log.clone();
        let engine = self.site.engine.clone();
        let read = tokio::task::spawn_blocking(move || {
            let open = |record: ReplicaRecord| {
                let found = contained(|| find(log.as_ref(), &engine, &record)).and_then(|found| found);
                Opened { record, found }
            };
            records.into_iter().map(open).collect::<Vec<_>>()
        });
        ctx.spawn(fut::wrap_future(read).map(move |opened, act: &mut Self, ctx| match opened {
            Ok(opened) => act.start(opened, waiting, campaign, ctx),
            Err(error) => tracing::debug!(%error, "the node ended while it opened replicas"),
        }));
    }

    fn start(
        &mut self,
        opened: Vec<Opened>,
        waiting: VecDeque<ReplicaRecord>,
        campaign: HashSet<ReplicaId>,
        ctx: &mut Context<Self>,
    ) {
        let mut starts = Vec::new();
        let tried: Vec<_> = opened.iter().map(|opened| opened.record.replica).collect();
        for Opened { record, found } in opened {
            #[cfg(feature = "test-hooks")]
            let found = self.hooks.open(record.replica).and(found);
            let Some(incarnation) = self.replicas.begin_start(record.replica) else {
                continue;
            };
            let (shard, replica) = (record.shard, record.replica);
            let hub = self.hub(shard).clone();
            let supervisor = ctx.address();
            let retention = self.site.retention;
            let cached = self.shared.cached_entries.clone();
            let held = self.shared.held_log.clone();
            starts.push(async move {
                let mut attempt =
                    Attempt { shard, replica, incarnation, lost: None, result: Err(String::new()) };
                attempt.result = match found {
                    Ok(Found { log, state, lost }) => {
                        let options = GroupOptions {
                            shard,
                            machine: record.machine,
                            replica,
                            incarnation,
                            retention,
                            logger: telemetry::log::raft_logger(shard, replica),
                            cached,
                            held,
                            state_lost: lost.is_some(),
                        };
                        attempt.lost = lost;
                        let start = StartReplica { options, log, state, supervisor };
                        hub.send(start)
                            .await
                            .unwrap_or_else(|error| Err(format!("its thread has ended: {error}")))
                    }
                    Err(error) => Err(error),
                };
                attempt
            });
        }
        let all = futures_util::future::join_all(starts);
        ctx.spawn(fut::wrap_future(all).map(move |attempts, act: &mut Self, ctx| {
            act.started_all(attempts, &campaign, ctx);
            for replica in &tried {
                act.untried.remove(replica);
            }
            act.tell_readiness();
            act.open_next(waiting, campaign, ctx);
        }));
    }

    /// Tries once more to open a replica that couldn't be, unless it was removed or has been since.
    fn reopen(&mut self, replica: ReplicaId, incarnation: Incarnation, ctx: &mut Context<Self>) {
        if let Some(record) = self.replicas.begin_reopen(replica, incarnation) {
            self.open(vec![record], HashSet::new(), ctx);
        }
    }

    fn started_all(
        &mut self,
        attempts: Vec<Attempt>,
        campaign: &HashSet<ReplicaId>,
        ctx: &mut Context<Self>,
    ) {
        let mut routes = Vec::new();
        for Attempt { shard, replica, incarnation, lost, result } in attempts {
            let outcome = result.as_ref().map(|_| lost.clone()).map_err(String::clone);
            match self.replicas.started(replica, incarnation, outcome) {
                Started::Serving { failures: 0 } => {}
                Started::Serving { failures } => {
                    tracing::info!(%shard, %replica, failures, "replica is open after all");
                }
                Started::WithoutState { news: false } => {
                    tracing::debug!(%shard, %replica, "the replica is open again, still without its state");
                }
                Started::WithoutState { news: true } => {
                    metrics::counter!(names::STATES_LOST).increment(1);
                    tracing::warn!(
                        %shard, %replica, why = lost,
                        "the replica's state is lost; its vote and its log are whole, and the state is fetched from its leader"
                    );
                }
                Started::Failed { again, news } => {
                    let reason = result.as_ref().err();
                    match news {
                        true => tracing::error!(%shard, %replica, reason, ?again, "replica can't be opened"),
                        false => tracing::debug!(%shard, %replica, reason, ?again, "replica can't be opened"),
                    }
                    ctx.run_later(again, move |act, ctx| act.reopen(replica, incarnation, ctx));
                }
                Started::Old => {
                    // Its shard was dropped while it started, and `remove` found no address to stop; or
                    // it has crashed already, and then this reaches nobody.
                    if let Ok(addr) = result {
                        addr.do_send(StopReplica);
                    }
                    continue;
                }
            }
            let target = match result {
                Ok(addr) => {
                    if campaign.contains(&replica) {
                        addr.do_send(Campaign);
                    }
                    self.addrs.insert(replica, addr.clone());
                    Ok(addr)
                }
                Err(reason) => Err(ReplicaHealth::Failed(reason)),
            };
            routes.push((shard, Route { replica, target }));
        }
        self.shared.router.update(|all| all.extend(routes));
        metrics::gauge!(names::REPLICAS).set(self.addrs.len() as f64);
    }
}

#[cfg(test)]
mod tests {
    use raft::eraftpb::Entry;

    use super::*;
    use crate::ids::{DatabaseId, Epoch, NodeId, Position};
    use crate::machine::MachineKind;
    use crate::placement::map::Member;
    use crate::placement::map::MemberRole;
    use crate::placement::ring::RingRange;
    use crate::storage::engine_memory::MemoryEngine;
    use crate::storage::log::{LogWrite, ReplicaPhase};
    use crate::storage::log_memory::MemoryLog;

    /// Replica 1 of these, with a log that begins after entry 7, and nothing else.
    fn found(members: &[(u64, MemberRole)]) -> Result<Found, String> {
        let replica = ReplicaId(1);
        let member = |&(id, role)| Member { replica: ReplicaId(id), node: NodeId(id), role };
        let record = ReplicaRecord {
            replica,
            shard: ShardId(1),
            database: DatabaseId(1),
            machine: MachineKind::Kv,
            phase: ReplicaPhase::Active,
            range: RingRange::ALL,
            epoch: Epoch { range: 1, conf: 1 },
            members: members.iter().map(member).collect(),
            members_at: 0,
            ordered_at: 0,
            generation: 1,
        };
        let log = MemoryLog::new();
        log.create(std::slice::from_ref(&record)).unwrap();
        let entries = (6..=8).map(|index| Entry { index, term: 6, ..Entry::default() }).collect();
        log.write(&[LogWrite { replica, entries, hard_state: None, membership: None }]).unwrap();
        log.compact(replica, Position { index: 7, term: 6 }).unwrap();
        let engine: Arc<dyn Engine> = Arc::new(MemoryEngine::new());
        find(&log, &engine, &record)
    }

    #[test]
    fn a_replica_without_its_state_runs_if_another_may_lead() {
        use MemberRole::{Learner, Voter};
        let found_lost = found(&[(1, Voter), (2, Voter)]).unwrap();
        assert_eq!(found_lost.state.header().applied, found_lost.log.truncated);
        assert!(found_lost.lost.is_some());
        for alone in [&[(1, Voter)][..], &[(1, Voter), (2, Learner)]] {
            let why = found(alone).err().expect("nobody can give it a state");
            assert!(why.contains("only copy is lost") && why.contains("from a backup"), "{why}");
        }
    }
}
