//! What the supervisor tells of its replicas.

use actix::prelude::*;

use super::Supervisor;
use crate::node::handle::{ReplicaHealth, ReplicaReport};
use crate::node::messages::{AskStatus, Report, Reported};
use crate::node::replicas::Slot;

impl Handler<Report> for Supervisor {
    type Result = ResponseFuture<Reported>;
    fn handle(&mut self, _: Report, _: &mut Context<Self>) -> Self::Result {
        let asked = self.replicas.iter().map(|slot: &Slot| {
            let addr = self.addrs.get(&slot.record.replica).cloned();
            let receives = self.shared.snapshots.inbox.receives(slot.record.replica);
            let counted = self.counts.of(slot.record.replica);
            let mut report = ReplicaReport {
                shard: slot.record.shard,
                replica: slot.record.replica,
                health: slot.health.clone(),
                group: None,
                restarts: slot.restarts,
                keys: counted.keys,
                bytes: counted.bytes,
            };
            async move {
                if let Some(addr) = addr
                    && let Ok(status) = addr.send(AskStatus).await
                {
                    if status.recovering {
                        report.health = ReplicaHealth::Recovering;
                    } else if receives && status.state_lost.is_none() {
                        report.health = ReplicaHealth::Installing;
                    }
                    report.group = Some(status);
                }
                report
            }
        });
        let asked: Vec<_> = asked.collect();
        let snapshot_bytes = self.shared.snapshots.outgoing.sent_bytes();
        Box::pin(async move {
            let mut replicas = futures_util::future::join_all(asked).await;
            replicas.sort_by_key(|r| r.shard);
            Reported { replicas, snapshot_bytes }
        })
    }
}
