//! What all nodes tell, for whoever decides about the cluster as a whole.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use futures_util::stream::{FuturesUnordered, StreamExt};

use super::{Admin, REPORT};
use crate::ids::{NodeId, ShardId};
use crate::node::handle::{NodePhase, NodeReport, ReplicaHealth, ReplicaReport};
use crate::placement::map::{ClusterMap, NodeRecord, Standing};
use crate::placement::rebalance::{Known, ShardSize};
use crate::refusal::Refusal;

/// Pause between two looks at this node's own map.
const MAP_POLL: Duration = Duration::from_millis(20);

/// What the nodes told that answered.
#[derive(Debug, Default)]
pub(super) struct Reports(pub BTreeMap<NodeId, NodeReport>);

impl Admin {
    /// Waits until this node knows the cluster map of `version`: who made a change must not be answered from
    /// an older one.
    pub(super) async fn caught_up(&self, version: u64, deadline: Instant) -> Result<(), Refusal> {
        loop {
            let have = self.service.node.map().version;
            if have > 0 && have >= version {
                return Ok(());
            }
            if Instant::now() + MAP_POLL >= deadline {
                return Err(Refusal::Unavailable(
                    format!("the node has version {have} of the cluster map, not yet {version}").into(),
                ));
            }
            tokio::time::sleep(MAP_POLL).await;
        }
    }

    /// Asks all nodes of the map that may hold anything. Who doesn't answer within a second is left out.
    pub(super) async fn survey(&self, map: &ClusterMap, deadline: Instant) -> Reports {
        self.ask(map, false, deadline, |_| true).await
    }

    /// The same, for what is decided about nodes that weren't heard: those are asked once more, in half of the time that is
    /// left. It may have been the connection alone that was dead, of which the first question has told; the next dials anew.
    pub(super) async fn survey_again(&self, map: &ClusterMap, deadline: Instant) -> Reports {
        let mut reports = self.survey(map, deadline).await;
        let by = Instant::now() + deadline.saturating_duration_since(Instant::now()) / 2;
        let later = self.ask(map, false, by, |node| !reports.0.contains_key(&node)).await;
        reports.add(later);
        reports
    }

    /// Asks them only whether they are there: one with thousands of replicas may need more than a second to tell of them.
    pub(super) async fn present(&self, map: &ClusterMap, deadline: Instant) -> Reports {
        self.ask(map, true, deadline, |_| true).await
    }

    async fn ask(
        &self,
        map: &ClusterMap,
        brief: bool,
        deadline: Instant,
        whom: impl Fn(NodeId) -> bool,
    ) -> Reports {
        let (node, client) = (&self.service.node, &self.service.client);
        let within = deadline.saturating_duration_since(Instant::now()).min(REPORT);
        let asked = expected(map).filter(|record| whom(record.id)).map(|record| async move {
            let report = match (record.id == node.node(), brief) {
                (true, true) => Ok(node.brief_report()),
                (true, false) => Ok(node.report().await),
                (false, true) => client.brief_report(&record.client_address, within).await,
                (false, false) => client.report(&record.client_address, within).await,
            };
            let report = report.inspect_err(|error| tracing::debug!(error, "no report of a node")).ok()?;
            // Another may run at its address by now.
            (report.node == record.id).then_some((record.id, report))
        });
        let reports = asked.collect::<FuturesUnordered<_>>().filter_map(std::future::ready);
        Reports(reports.collect().await)
    }
}

/// The nodes of a map that may hold anything.
fn expected(map: &ClusterMap) -> impl Iterator<Item = &NodeRecord> {
    let counts = |record: &&NodeRecord| !matches!(record.standing, Standing::Pending | Standing::Removed);
    map.nodes.values().filter(counts)
}

impl Reports {
    /// The nodes of a map that should have told, and didn't.
    pub(super) fn silent<'a>(&'a self, map: &'a ClusterMap) -> impl Iterator<Item = &'a NodeRecord> {
        expected(map).filter(|record| !self.0.contains_key(&record.id))
    }

    /// Takes later ones in. Who answered before and doesn't now is still there, as far as he said.
    pub(super) fn add(&mut self, later: Reports) {
        self.0.extend(later.0);
    }

    /// What nodes told of their replicas of a shard.
    pub(super) fn of(&self, shard: ShardId) -> impl Iterator<Item = (NodeId, &ReplicaReport)> {
        let of = move |report: &&ReplicaReport| report.shard == shard;
        self.0.iter().flat_map(move |(node, report)| {
            report.replicas.iter().filter(of).map(move |replica| (*node, replica))
        })
    }

    /// Whether a node answered, and isn't about to go.
    pub(super) fn is_up(&self, node: NodeId) -> bool {
        self.0.get(&node).is_some_and(|report| report.phase != NodePhase::Stopping)
    }

    /// What planners should know.
    pub(super) fn known(&self, map: &ClusterMap) -> Known {
        let mut known = Known { sizes: self.sizes(), ..Known::default() };
        let mut terms = BTreeMap::new();
        for (node, report) in &self.0 {
            for replica in &report.replicas {
                let Some(group) = replica.group.as_ref().filter(|g| g.role == raft::StateRole::Leader) else {
                    continue;
                };
                // An old leader that is cut off still believes in itself; the newest term is right.
                let term = terms.entry(replica.shard).or_insert(0);
                if group.term > *term {
                    *term = group.term;
                    known.leaders.insert(replica.shard, *node);
                }
            }
        }
        let unfit = |node: &NodeId| {
            !self.is_up(*node) || self.0.get(node).is_some_and(|report| report.phase == NodePhase::ReadOnly)
        };
        known.taken_over = map.replaced().into_iter().filter(|node| !self.is_up(*node)).collect();
        known.unfit = map.nodes.keys().copied().filter(unfit).collect();
        known
    }

    /// How great each shard is: as the fullest of its replicas says, for one that lags or is being made holds
    /// less.
    pub(super) fn sizes(&self) -> BTreeMap<ShardId, ShardSize> {
        let mut sizes: BTreeMap<ShardId, ShardSize> = BTreeMap::new();
        for replica in self.0.values().flat_map(|report| &report.replicas) {
            if matches!(replica.health, ReplicaHealth::Serving | ReplicaHealth::Recovering) {
                let size = sizes.entry(replica.shard).or_default();
                size.keys = size.keys.max(replica.keys);
                size.bytes = size.bytes.max(replica.bytes);
            }
        }
        sizes
    }

    /// Bytes of snapshots that each node has sent since it started.
    pub(super) fn sent(&self) -> BTreeMap<NodeId, u64> {
        self.0.iter().map(|(node, report)| (*node, report.snapshot_bytes)).collect()
    }
}
