//! Marks in the logs of shards, and digests of replicas at them: by which an operator compares replicas.

use std::time::{Duration, Instant};

use super::handle::NodeHandle;
use super::messages::{AskDigest, AskStatus, Digesting};
use super::snapshots::worker::DigestError;
use crate::codec::digest::{DigestRequest, Marked, ReplicaDigest};
use crate::codec::peer::{PeerRequest, PeerResponse};
use crate::group::types::{Operation, Output};
use crate::ids::{NodeId, ReplicaId, ShardId};
use crate::limits;
use crate::placement::map::ClusterMap;
use crate::refusal::Refusal;
use crate::storage::digest::StateDigest;
use crate::transport::call::{CallError, PeerClient, PeerLine};

/// What is left of the time that an asker waits, so that it hears why there is no answer: a twentieth is kept back, or
/// a second.
pub fn heard_within(asker_waits: Duration) -> Duration {
    asker_waits - (asker_waits / 20).min(Duration::from_secs(1))
}

fn unavailable(why: impl Into<String>) -> Refusal {
    Refusal::Unavailable(why.into().into())
}

impl NodeHandle {
    /// Puts a mark into the log of a shard, wherever that is led. May be repeated: it changes nothing.
    ///
    /// # Errors
    /// [`Refusal::Refused`]: the map that this node has names no such shard. Or it has no leader within `timeout`.
    pub async fn mark(&self, shard: ShardId, timeout: Duration) -> Result<Marked, Refusal> {
        let deadline = Instant::now() + timeout;
        let (mut hint, mut last) = (Some(self.node()), None);
        for attempt in 0.. {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let map = self.map();
            let record = map.shards.get(&shard).filter(|record| !record.dropped);
            let record = record.ok_or_else(|| Refusal::Refused(format!("there is no shard {shard}")))?;
            // The leader, if an answer named one; else each member in turn.
            let target = hint.take().filter(|node| record.member_on(*node).is_some());
            let in_turn = record.members.get(attempt % record.members.len().max(1));
            let Some(target) = target.or(in_turn.map(|member| member.node)) else {
                return Err(unavailable(format!("the map names no replica of shard {shard}")));
            };
            let patience = left.min(Duration::from_millis(limits::META_ATTEMPT_MS));
            let answer = if target == self.node() {
                self.mark_here(shard, patience).await
            } else {
                match self.ask(&map, target, PeerRequest::Mark(shard), patience).await {
                    Ok(PeerResponse::Marked(marked)) => Ok(marked),
                    Ok(_) => Err(unavailable(format!("node {target} answered another question"))),
                    Err(refusal) => Err(refusal),
                }
            };
            match answer {
                Ok(marked) => return Ok(marked),
                Err(Refusal::NotLeader { leader, .. }) => hint = leader,
                Err(refusal) => last = Some(refusal),
            }
            tokio::time::sleep(Duration::from_millis(limits::META_RETRY_MS).min(left)).await;
        }
        let why = last.map_or_else(String::new, |refusal| format!("; at last: {refusal}"));
        Err(unavailable(format!("shard {shard} has no leader that is in reach{why}")))
    }

    /// Puts a mark into the log of a shard, if it is led here.
    ///
    /// # Errors
    /// It isn't, or the mark wasn't applied within `timeout`.
    pub async fn mark_here(&self, shard: ShardId, timeout: Duration) -> Result<Marked, Refusal> {
        let range_version = self.map().shards.get(&shard).map_or(0, |record| record.epoch.range);
        let results = self.submit(shard, range_version, vec![Operation::Mark], timeout).await?;
        let index = match results.into_iter().next() {
            Some(Ok(Output::Marked(index))) => index,
            Some(Err(refusal)) => return Err(refusal),
            _ => return Err(Refusal::Unknown("the shard gave no answer to a mark".into())),
        };
        let addr = self.replica(shard)?;
        let patience = Duration::from_millis(limits::STATUS_MS_MAX);
        let status = tokio::time::timeout(patience, addr.send(AskStatus)).await;
        let status = status.ok().and_then(Result::ok);
        let status = status.ok_or_else(|| unavailable("the replica that led is too busy, or has ended"))?;
        let leader = status.leader.ok_or_else(|| unavailable("the shard has lost its leader"))?;
        Ok(Marked { index, leader, members: status.members })
    }

    /// The digest of the replica on `node` at a mark. To read a replica takes as long as it takes: it is waited for while
    /// the node is there.
    ///
    /// # Errors
    /// [`Refusal::Busy`]: the replica has gone on; another mark may bring more luck. All else: why there is none.
    pub async fn digest(
        &self,
        node: NodeId,
        replica: ReplicaId,
        request: DigestRequest,
    ) -> Result<StateDigest, Refusal> {
        let answer = if node == self.node() {
            self.digest_here(request).await?
        } else {
            let timeout = Duration::from_millis(request.timeout_ms.into());
            let map = self.map();
            let asked = self.ask(&map, node, PeerRequest::Digest(request), timeout);
            let answer = tokio::select! {
                answer = asked => answer?,
                gone = self.gone(&map, node) => return Err(gone),
            };
            match answer {
                PeerResponse::Digest(answer) => answer,
                _ => return Err(unavailable(format!("node {node} answered another question"))),
            }
        };
        // Never compared with what is of another index, or of another replica on the node than is meant.
        if (answer.replica, answer.digest.index) != (replica, request.index) {
            return Err(unavailable(format!(
                "node {node} told of replica {} at {}, not of {replica} at {}",
                answer.replica, answer.digest.index, request.index
            )));
        }
        Ok(answer.digest)
    }

    /// The digest of this node's replica of a shard, at a mark.
    ///
    /// # Errors
    /// As [`NodeHandle::digest`].
    pub async fn digest_here(&self, request: DigestRequest) -> Result<ReplicaDigest, Refusal> {
        let asker_waits = Duration::from_millis(request.timeout_ms.into());
        let timeout = heard_within(asker_waits.min(Duration::from_millis(limits::VERIFY_MS_MAX)));
        let deadline = Instant::now() + timeout;
        let there_by = deadline.min(Instant::now() + Duration::from_millis(limits::VIEW_MS_MAX));
        let gone_on =
            |what: String| Refusal::Busy { what: what.into(), retry_after_ms: limits::BUSY_RETRY_MS };
        let (replica, digest) = loop {
            let asked = match self.replica(request.shard) {
                Ok(addr) => addr.send(AskDigest(request.index)).await,
                // This node may hear later of a new shard than the one that leads it, or opens its replica just now.
                Err(refusal @ (Refusal::StaleRoute { .. } | Refusal::Unavailable(_))) => {
                    Ok(Digesting::Behind(refusal.to_string()))
                }
                Err(refusal) => return Err(refusal),
            };
            // It has ended, and is rebuilt.
            let asked = asked.unwrap_or_else(|_| Digesting::Behind("the replica has ended".into()));
            let (why, until) = match asked {
                Digesting::Begun(replica, digest) => break (replica, digest),
                Digesting::GoneOn(what) => return Err(gone_on(what)),
                Digesting::Never(why) => return Err(unavailable(why)),
                Digesting::Behind(why) => (why, there_by),
                Digesting::Coming(why) => (why, deadline),
            };
            if Instant::now() >= until {
                return Err(unavailable(why));
            }
            tokio::time::sleep(Duration::from_millis(limits::VIEW_POLL_MS)).await;
        };
        match tokio::time::timeout_at(deadline.into(), digest).await {
            Ok(Ok(Ok(digest))) => Ok(ReplicaDigest { replica, digest }),
            Ok(Ok(Err(DigestError::GoneOn))) => Err(gone_on(format!("replica {replica} has gone on"))),
            Ok(Ok(Err(error @ DigestError::Storage(_)))) => {
                tracing::error!(%replica, %error, "taking the digest of a replica");
                Err(unavailable(format!(
                    "the state of replica {replica} can't be read; see the log of its node"
                )))
            }
            Ok(Ok(Err(DigestError::Stopping)) | Err(_)) => Err(unavailable("the node is stopping")),
            Err(_) => Err(unavailable(format!("reading the state of replica {replica} takes longer"))),
        }
    }

    /// Comes to an end once a node has given no sign of life several times: it hangs, or is cut off, and the connection on
    /// which an answer is awaited doesn't tell.
    async fn gone(&self, map: &ClusterMap, node: NodeId) -> Refusal {
        let mut failed = 0;
        loop {
            tokio::time::sleep(Duration::from_millis(limits::VERIFY_LOOK_MS)).await;
            let Some(record) = map.nodes.get(&node) else {
                return unavailable(format!("node {node} isn't known"));
            };
            // A welcome is enough: so much of it works that a connection gets through to its threads.
            let limit = Duration::from_millis(limits::VERIFY_LOOK_MS);
            match PeerLine::open(&record.peer_address, self.hello(), limit).await {
                Ok(_) | Err(CallError::Refused { .. }) => failed = 0,
                Err(error) => {
                    failed += 1;
                    if failed == limits::VERIFY_LOOKS_MAX {
                        return unavailable(format!("node {node} gives no sign of life any more: {error}"));
                    }
                }
            }
        }
    }

    async fn ask(
        &self,
        map: &ClusterMap,
        node: NodeId,
        request: PeerRequest,
        timeout: Duration,
    ) -> Result<PeerResponse, Refusal> {
        let record = map.nodes.get(&node);
        let address = &record.ok_or_else(|| unavailable(format!("node {node} isn't known")))?.peer_address;
        match PeerClient::call(address, self.hello(), request, timeout).await {
            Ok(PeerResponse::Refused(refusal)) => Err(refusal),
            Ok(answer) => Ok(answer),
            Err(
                error @ (CallError::Unreachable { .. }
                | CallError::Refused { .. }
                | CallError::Timeout { .. }),
            ) => Err(unavailable(error.to_string())),
            // So ends a node of an earlier version a conversation that it doesn't understand.
            Err(error @ CallError::Failed { .. }) => {
                Err(unavailable(format!("{error}; the node may be older than this one")))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearly_all_of_the_time_is_left_for_reading() {
        // What a client is given, an operator's node of that, and the node that reads.
        let told = Duration::from_millis(limits::VERIFY_MS_MAX) * 9 / 10;
        let reading = heard_within(heard_within(told));
        assert!(reading >= Duration::from_secs(538), "{reading:?}");
        let short = heard_within(Duration::from_millis(100));
        assert_eq!(short, Duration::from_millis(95));
    }
}
