//! What the reconciler hears of this node, and what it may order of it.

use std::time::Duration;

use actix::prelude::*;
use futures_util::future::join_all;

use super::counting::Counted;
use super::handle::{NodeHandle, ReplicaHealth};
use super::messages::LeaderRests;
use super::replica::ReplicaActor;
use super::supervisor::Supervisor;
use crate::balance::facts::{ShardReport, SickReplica, Survey};
use crate::codec::survey::{Order, Ordered};
use crate::failpoints::failpoint;
use crate::group::types::{GroupStatus, Operation, Output};
use crate::ids::{ReplicaId, ShardId};
use crate::limits;
use crate::refusal::Refusal;

/// Service → supervisor: what does this node hold and lead, and how is it?
#[derive(Message)]
#[rtype(result = "Survey")]
pub struct TakeSurvey;

/// Supervisor → replica: how is the group, if it is led here, and its members can be told? Until a majority of the voters
/// knows of them they can't: who isn't among them any more may have to vote once more
/// ([`Group::members_are_known`](crate::group::driver::Group::members_are_known)).
#[derive(Message)]
#[rtype(result = "Option<GroupStatus>")]
struct AskLed;

impl Handler<AskLed> for ReplicaActor {
    type Result = Option<GroupStatus>;
    fn handle(&mut self, _: AskLed, _: &mut Context<Self>) -> Option<GroupStatus> {
        (self.group.leads() && self.group.members_are_known()).then(|| self.group.status())
    }
}

impl Handler<TakeSurvey> for Supervisor {
    type Result = ResponseFuture<Survey>;
    fn handle(&mut self, _: TakeSurvey, _: &mut Context<Self>) -> Self::Result {
        let mut survey = Survey {
            node: self.site.node,
            disk_full: self.shared.disk.is_full(),
            led: Vec::new(),
            held: Vec::new(),
            sick: Vec::new(),
            snapshot_bytes: self.shared.snapshots.outgoing.sent_bytes(),
        };
        let mut asked = Vec::new();
        for slot in self.replicas.iter() {
            let (shard, replica) = (slot.record.shard, slot.record.replica);
            survey.held.push((shard, replica));
            if let ReplicaHealth::Quarantined(why) | ReplicaHealth::Failed(why) = &slot.health {
                survey.sick.push(SickReplica { shard, replica, why: why.clone() });
            }
            // Only of what this node leads: the others are asked elsewhere.
            let Some(addr) = self.addrs.get(&replica).filter(|_| self.led.contains(&shard)) else { continue };
            let counted = self.counts.of(replica);
            match self.resting.get(&replica) {
                // With thousands of shards that nobody uses, asking would be most of what a node does.
                Some(status) => survey.led.push(report(shard, replica, counted, GroupStatus::clone(status))),
                None => asked.push((shard, replica, counted, addr.clone())),
            }
        }
        let asked = asked.into_iter().map(|(shard, replica, counted, addr)| async move {
            let patience = Duration::from_millis(limits::STATUS_MS_MAX);
            // What it knows as a follower is no report.
            let status = tokio::time::timeout(patience, addr.send(AskLed)).await.ok()?.ok()??;
            Some(report(shard, replica, counted, status))
        });
        let asked = join_all(asked);
        Box::pin(async move {
            survey.led.extend(asked.await.into_iter().flatten());
            survey
        })
    }
}

fn report(shard: ShardId, leader: ReplicaId, counted: Counted, status: GroupStatus) -> ShardReport {
    ShardReport {
        shard,
        leader,
        term: status.term,
        epoch: status.epoch,
        members: status.members,
        followers: status.followers,
        last: status.last,
        keys: counted.keys,
        bytes: counted.bytes,
    }
}

impl Handler<LeaderRests> for Supervisor {
    type Result = ();
    fn handle(&mut self, rests: LeaderRests, _: &mut Context<Self>) {
        match rests.status {
            Some(status) if self.addrs.contains_key(&rests.replica) => {
                self.resting.insert(rests.replica, status);
            }
            _ => drop(self.resting.remove(&rests.replica)),
        }
    }
}

impl NodeHandle {
    /// What this node tells the reconciler of itself.
    ///
    /// # Errors
    /// It isn't a member yet, or is stopping.
    pub async fn survey(&self) -> Result<Survey, Refusal> {
        let supervisor = self.supervisor()?;
        supervisor.send(TakeSurvey).await.map_err(|_| Refusal::Unavailable("the node is stopping".into()))
    }

    /// Carries out what was ordered of a leader on this node: the change is then committed and in force, or
    /// leadership has moved. When `timeout` passes first, the outcome is unknown.
    ///
    /// # Errors
    /// Why not; of a change whose conf version isn't the shard's any more too.
    pub async fn order(&self, order: Order, timeout: Duration) -> Result<(), Refusal> {
        let shard = order.shard;
        failpoint!(OrderReceived);
        let done = match order.what {
            Ordered::Transfer(to) => self.transfer(shard, to, timeout).await,
            Ordered::Change { conf, change } => {
                let range_version = self.map().shards.get(&shard).map_or(0, |record| record.epoch.range);
                let operation = Operation::Change { conf, change };
                let results = self.submit(shard, range_version, vec![operation], timeout).await?;
                match results.into_iter().next() {
                    Some(Ok(Output::Changed(_))) => Ok(()),
                    Some(Err(refusal)) => Err(refusal),
                    _ => Err(Refusal::Unknown("the shard gave no answer to a change of its members".into())),
                }
            }
        };
        failpoint!(OrderCarriedOut);
        done
    }
}
