//! From an offered snapshot to a replica that stands at it: judged, received, checked, loaded beside the
//! running replica, and then switched to by one write of the log.

use std::collections::HashSet;
use std::sync::Arc;

use actix::prelude::*;
use tokio::sync::oneshot;

use super::inbox::{Finish, Part, PartSink};
use super::worker::{Load, LoadError};
use crate::codec::snapshot::{SnapshotAnswer, SnapshotOffer};
use crate::failpoints::failpoint;
use crate::ids::ReplicaId;
use crate::limits::SNAPSHOT_BUSY_MS;
use crate::node::handle::ReplicaHealth;
use crate::node::hub::Forget;
use crate::node::messages::{AskStatus, StopReplica};
use crate::node::removal::destroy;
use crate::node::router::Route;
use crate::node::shared::Shared;
use crate::node::supervisor::Supervisor;
use crate::storage::StorageError;
use crate::storage::log::Install;
use crate::telemetry::metrics as names;
use crate::transport::snapshot::receiver::SnapshotSink;

/// Peer connection → supervisor: may this replica take the snapshot? What it has now if it may, else what
/// to answer.
#[derive(Message)]
#[rtype(result = "Result<Present, SnapshotAnswer>")]
pub struct JudgeSnapshot(pub SnapshotOffer);

/// What a replica has that takes a snapshot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Present {
    /// The generation of its state.
    pub generation: u32,
    /// That state is lost: the replica takes what its log goes on from.
    pub state_lost: bool,
}

/// Peer connection → supervisor: the snapshot is loaded and durable, go on from it. Inside an error:
/// what to answer.
#[derive(Message)]
#[rtype(result = "Result<(), SnapshotAnswer>")]
pub struct InstallSnapshot {
    /// Which replica.
    pub replica: ReplicaId,
    /// What it becomes.
    pub install: Install,
}

fn busy() -> SnapshotAnswer {
    SnapshotAnswer::Busy { retry_after_ms: SNAPSHOT_BUSY_MS }
}

/// Takes what is offered, if a replica of this node can use it. Inside an error: what to answer.
pub async fn take(
    shared: Arc<Shared>,
    supervisor: Addr<Supervisor>,
    offer: SnapshotOffer,
) -> Result<Box<dyn SnapshotSink>, SnapshotAnswer> {
    judge(&supervisor, &offer).await?;
    let inbox = shared.snapshots.inbox.clone();
    let part = tokio::task::spawn_blocking(move || inbox.begin(&offer)).await.map_err(|_| busy())??;
    tracing::info!(
        shard = %offer.shard, replica = %offer.to, index = offer.position.index, bytes = offer.bytes, at = part.offset(),
        "receiving a snapshot"
    );
    let finish: Finish = Box::new(move |part| {
        let (done, answer) = oneshot::channel();
        // On its own: it is worth ending even if the connection ends before.
        actix::spawn(async move {
            let answer = install(&shared, &supervisor, part).await;
            if done.send(answer).is_err() {
                tracing::debug!("nobody waits for the installation of a snapshot");
            }
        });
        Box::pin(async move { answer.await.unwrap_or_else(|_| busy()) })
    });
    Ok(Box::new(PartSink::new(part, finish)))
}

async fn judge(supervisor: &Addr<Supervisor>, offer: &SnapshotOffer) -> Result<Present, SnapshotAnswer> {
    supervisor.send(JudgeSnapshot(*offer)).await.unwrap_or_else(|_| Err(busy()))
}

/// Checks, loads and installs a file that has arrived whole; what to answer.
async fn install(shared: &Shared, supervisor: &Addr<Supervisor>, part: Part) -> SnapshotAnswer {
    let SnapshotOffer { shard, to: replica, position, .. } = *part.offer();
    let answer = match load_and_switch(shared, supervisor, &part).await {
        Ok(()) => SnapshotAnswer::Installed,
        Err(answer) => answer,
    };
    match &answer {
        SnapshotAnswer::Installed => {
            metrics::counter!(names::SNAPSHOTS_INSTALLED).increment(1);
            tracing::info!(%shard, %replica, index = position.index, "installed a snapshot");
        }
        SnapshotAnswer::NotNeeded => {
            tracing::info!(%shard, %replica, index = position.index, "a snapshot wasn't needed after all");
        }
        other => {
            metrics::counter!(names::SNAPSHOTS_FAILED, "step" => "install").increment(1);
            tracing::warn!(%shard, %replica, index = position.index, answer = ?other, "a snapshot was not installed");
        }
    }
    // What can be tried again is kept.
    if !matches!(answer, SnapshotAnswer::Busy { .. })
        && let Err(error) = tokio::task::spawn_blocking(move || part.discard()).await
    {
        tracing::warn!(%error, "removing a received snapshot");
    }
    answer
}

async fn load_and_switch(
    shared: &Shared,
    supervisor: &Addr<Supervisor>,
    part: &Part,
) -> Result<(), SnapshotAnswer> {
    let offer = *part.offer();
    let worker = &shared.snapshots.worker;
    // Asked for anew: as long as this part lives, nobody else gives the replica another generation.
    let Present { generation: current, state_lost } = judge(supervisor, &offer).await?;
    let Some(generation) = current.checked_add(1) else {
        return Err(SnapshotAnswer::Refused("the replica's state has no generations left".into()));
    };
    // A load begins by removing what is of no use: queries of an earlier life must have ended.
    shared.reader.barrier().await.map_err(|_| busy())?;
    let (done, loaded) = oneshot::channel();
    worker.load(Load { path: part.path().to_owned(), offer, current, done });
    let summary = match loaded.await.map_err(|_| busy())? {
        Ok(summary) => summary,
        Err(error) => {
            worker.sweep(offer.to, current);
            return Err(match error {
                LoadError::Unusable(reason) => SnapshotAnswer::Failed(reason),
                LoadError::Local(error) => {
                    tracing::warn!(replica = %offer.to, %error, "loading a snapshot");
                    busy()
                }
            });
        }
    };
    let header = summary.header;
    let install = Install {
        generation,
        position: header.applied,
        leader_term: offer.leader_term,
        epoch: header.epoch,
        members: header.members,
        state_lost,
    };
    // What was loaded is removed by the supervisor if it isn't switched to. Without its answer it may
    // have been, and must stay.
    let switched = supervisor.send(InstallSnapshot { replica: offer.to, install }).await;
    switched.unwrap_or_else(|_| Err(busy()))
}

impl Handler<JudgeSnapshot> for Supervisor {
    type Result = ResponseFuture<Result<Present, SnapshotAnswer>>;
    fn handle(&mut self, JudgeSnapshot(offer): JudgeSnapshot, _: &mut Context<Self>) -> Self::Result {
        let verdict = self.replicas.judge(&offer);
        let addr = self.addrs.get(&offer.to).cloned();
        let lacks_state = self.replicas.lacks_state(offer.to);
        Box::pin(async move {
            let mut present = Present { generation: verdict?, state_lost: false };
            let Some(addr) = addr else {
                // It doesn't run, and can't say how far its log is: the install itself tells, if it is known
                // what to ask of it.
                return if lacks_state { Ok(Present { state_lost: true, ..present }) } else { Err(busy()) };
            };
            let status = addr.send(AskStatus).await.map_err(|_| busy())?;
            let index = offer.position.index;
            match status.state_lost {
                // Its leader knows that, unless it has asked another one.
                Some(least) if index < least => {
                    return Err(SnapshotAnswer::Refused(format!(
                        "the replica's log begins after entry {least}, the snapshot is of entry {index}"
                    )));
                }
                Some(_) => present.state_lost = true,
                None if status.committed >= index => return Err(SnapshotAnswer::NotNeeded),
                None => {}
            }
            Ok(present)
        })
    }
}

impl Handler<InstallSnapshot> for Supervisor {
    type Result = ResponseActFuture<Self, Result<(), SnapshotAnswer>>;
    fn handle(&mut self, order: InstallSnapshot, _: &mut Context<Self>) -> Self::Result {
        let InstallSnapshot { replica, install } = order;
        failpoint!(InstallBefore, replica);
        let (shard, incarnation) = match self.replicas.begin_install(replica) {
            Ok(begun) => begun,
            Err(answer) => {
                if let Some(slot) = self.replicas.get_mut(replica) {
                    self.shared.snapshots.worker.sweep(replica, slot.record.generation);
                }
                return Box::pin(fut::ready(Err(answer)));
            }
        };
        self.led.remove(&shard);
        self.shared.router.update(|routes| {
            routes.insert(shard, Route { replica, target: Err(ReplicaHealth::Installing) });
        });
        self.hub(shard).do_send(Forget(replica, incarnation));
        self.resting.remove(&replica);
        let addr = self.addrs.remove(&replica);
        let shared = self.shared.clone();
        let switch = async move {
            if let Some(addr) = addr
                && let Err(error) = addr.send(StopReplica).await
            {
                tracing::debug!(%error, "the replica had ended already");
            }
            shared.fence(replica, incarnation).await;
            let (done, written) = oneshot::channel();
            let to_write = install.clone();
            shared.log_writer.run(Box::new(move |log| {
                failpoint!(LogInstallBefore, replica);
                let installed = log.install(replica, &to_write);
                failpoint!(LogInstallAfter, replica);
                if done.send(installed).is_err() {
                    tracing::debug!(%replica, "nobody waits for the switch to a snapshot");
                }
            }));
            let written = written.await;
            // From here on the state before may be removed: whoever was asked to read it has to be done.
            if shared.reader.barrier().await.is_err() {
                tracing::debug!("the read thread has ended");
            }
            (install, written)
        };
        Box::pin(fut::wrap_future(switch).map(move |(install, written), act: &mut Self, ctx| {
            match written {
                Ok(written) => act.go_on(replica, install, written, ctx),
                // It says itself why it has ended; nothing is opened or removed after that.
                Err(_) => Err(busy()),
            }
        }))
    }
}

impl Supervisor {
    /// Opens a replica again that was stopped to be switched to a snapshot.
    fn go_on(
        &mut self,
        replica: ReplicaId,
        install: Install,
        written: Result<(), StorageError>,
        ctx: &mut Context<Self>,
    ) -> Result<(), SnapshotAnswer> {
        if let Err(error) = &written
            && !matches!(error, StorageError::Inconsistent { .. })
        {
            // Which of the two states the log names is unknown: neither may be removed, nor used.
            self.fatal.raise(format!("switching replica {replica} to a snapshot: {error}"));
            return Err(busy());
        }
        failpoint!(InstallReopen, replica);
        if written.is_ok() && install.state_lost {
            metrics::counter!(names::STATES_REFETCHED).increment(1);
            tracing::info!(%replica, index = install.position.index, "the replica has a state again, in place of the lost one");
        }
        let state_lost = install.state_lost;
        let installed = written.is_ok().then_some(install);
        let Some(record) = self.replicas.end_install(replica, installed) else {
            // Its shard was dropped meanwhile, and its state removed, maybe not all that was loaded.
            destroy(&self.shared, vec![replica]);
            return Err(SnapshotAnswer::Refused("the replica was removed".into()));
        };
        self.shared.snapshots.worker.sweep(replica, record.generation);
        self.open(vec![record], HashSet::new(), ctx);
        match written {
            Ok(()) => Ok(()),
            // It isn't that it has caught up: its log and the snapshot contradict each other.
            Err(error) if state_lost => {
                tracing::warn!(%replica, %error, "not switching to a snapshot, though the replica's state is lost");
                Err(SnapshotAnswer::Refused(error.to_string()))
            }
            Err(error) => {
                tracing::info!(%replica, %error, "not switching to a snapshot");
                Err(SnapshotAnswer::NotNeeded)
            }
        }
    }
}
