//! Whether the replicas of a shard are equal.

use std::time::{Duration, Instant};

use futures_util::future::join_all;

use super::Admin;
use crate::client::admin::answers::{CheckedReplica, CheckedState, ShardCheck};
use crate::codec::digest::DigestRequest;
use crate::ids::ShardId;
use crate::limits::MARK_MS_MAX;
use crate::node::digest::heard_within;
use crate::refusal::Refusal;

impl Admin {
    /// Has the leader put a mark into the log, and each member tell what its state is there; once. Who can't is named.
    /// A little is left of the time, so that what is known is told rather than that time ran out. That there is no such
    /// shard is believed of a cluster map of version `since`, or a later one.
    ///
    /// All members read at the same time. One after the other, the last would keep its state still, and what is written
    /// meanwhile in memory, for as long as all the others read.
    pub(super) async fn verify(
        &self,
        shard: ShardId,
        since: u64,
        within: Duration,
    ) -> Result<ShardCheck, Refusal> {
        let node = &self.service.node;
        let deadline = Instant::now() + heard_within(within);
        let marked_by = Instant::now() + (within / 2).min(Duration::from_millis(MARK_MS_MAX));
        self.caught_up(since, marked_by).await?;
        let marked = node.mark(shard, marked_by.saturating_duration_since(Instant::now())).await?;
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout_ms = u32::try_from(left.as_millis()).unwrap_or(u32::MAX);
        let request = DigestRequest { shard, index: marked.index, timeout_ms };
        let asked = marked.members.iter().map(|member| async move {
            let state = match node.digest(member.node, member.replica, request).await {
                Ok(digest) => CheckedState::Digest(digest),
                Err(Refusal::Busy { what, .. }) => CheckedState::GoneOn(what.into_owned()),
                Err(refusal) => CheckedState::Missing(refusal.to_string()),
            };
            CheckedReplica { node: member.node, replica: member.replica, role: member.role, state }
        });
        let replicas = join_all(asked).await;
        Ok(ShardCheck { shard, index: marked.index, leader: marked.leader, replicas })
    }
}
