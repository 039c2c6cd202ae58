//! What must be so once a cluster has come to rest, and that it comes to rest at all.
#![allow(dead_code)] // Each test binary uses its own part.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pontoon::client::admin::answers::{RebalancePlan, Verdict};
use pontoon::client::{Client, ScanOptions, Versioned};
use pontoon::ids::{METADATA_SHARD, NodeId, ReplicaId, ShardId};
use pontoon::machine::command::PolicyChange;
use pontoon::node::handle::{NodePhase, NodeReport, ReplicaHealth};
use pontoon::placement::map::{ClusterMap, MemberRole, RebalanceState, ShardRecord, Standing};

use crate::cluster::Cluster;

/// For whatever changes the cluster, and for a node's answer.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// At rest: every shard has as many voters as it should, on nodes that run, and nothing moves; each node holds
/// what the map places on it, and nothing else.
#[derive(Clone, Copy, Default)]
pub struct Rest {
    /// Voters of the metadata shard.
    pub metadata: usize,
    /// Replicas and leaders are spread evenly, too.
    pub even: bool,
    /// Nobody writes: all replicas of a shard have applied the same.
    pub quiet: bool,
}

impl Rest {
    /// Waits until it is so. Panics with what isn't, and all that the cluster tells of itself.
    pub async fn reached(&self, client: &Client, cluster: &Cluster, within: Duration) -> Arc<ClusterMap> {
        let begun = Instant::now();
        loop {
            let missing = match self.missing(client, cluster).await {
                Ok(map) => return map,
                Err(missing) => missing,
            };
            if begun.elapsed() > within {
                panic!("not at rest after {within:?}: {missing}\n{}", picture(cluster));
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// What isn't so yet.
    async fn missing(&self, client: &Client, cluster: &Cluster) -> Result<Arc<ClusterMap>, String> {
        let reports = reports(client, cluster).await?;
        // After the reports, so that it names everything that they can know of.
        let map = client.map().await.map_err(|error| format!("no map: {error}"))?;
        for shard in living(&map) {
            self.shard(&map, shard, &reports)?;
        }
        for report in reports.values() {
            holds_what_it_should(&map, report)?;
        }
        if map.rebalance.state != RebalanceState::Idle {
            return Err(format!("the rebalancing is {:?}", map.rebalance));
        }
        if self.even {
            let holders = |shard: &ShardRecord| shard.members.iter().map(|m| m.node).collect();
            spread("replicas", &map, &reports, living(&map).flat_map(holders as fn(_) -> Vec<_>))?;
            // The metadata shard is led wherever it is: that is no load.
            let data = living(&map).filter(|shard| shard.id != METADATA_SHARD);
            let leaders = |shard: &ShardRecord| {
                reports.values().filter(|r| leads(r, shard.id)).map(|r| r.node).collect::<Vec<_>>()
            };
            spread("leaders", &map, &reports, data.flat_map(leaders))?;
        }
        Ok(map)
    }

    fn shard(
        &self,
        map: &ClusterMap,
        shard: &ShardRecord,
        reports: &BTreeMap<NodeId, NodeReport>,
    ) -> Result<(), String> {
        let wanted = match shard.id {
            METADATA_SHARD => self.metadata,
            _ => map.databases[&shard.database].replicas as usize,
        };
        let nodes: BTreeSet<NodeId> = shard.members.iter().map(|m| m.node).collect();
        let whole = shard.members.iter().all(|m| m.role == MemberRole::Voter)
            && shard.moving.is_none()
            && shard.target.is_none()
            && shard.members.len() == wanted
            && nodes.len() == wanted;
        if !whole {
            return Err(format!("shard {} should have {wanted} voters: {shard:?}", shard.id));
        }
        if let Some(gone) = nodes.iter().find(|node| !reports.contains_key(node)) {
            return Err(format!("shard {} has a replica on node {gone}, which doesn't run", shard.id));
        }
        let mut leaders = Vec::new();
        let mut applied = BTreeSet::new();
        for report in nodes.iter().map(|node| &reports[node]) {
            let group = report.replicas.iter().find(|r| r.shard == shard.id).and_then(|r| r.group.as_ref());
            let Some(group) = group else {
                return Err(format!("node {} has no running replica of shard {}", report.node, shard.id));
            };
            if group.epoch.conf != shard.epoch.conf {
                return Err(format!(
                    "node {} has conf {} of shard {}, the map {}",
                    report.node, group.epoch.conf, shard.id, shard.epoch.conf
                ));
            }
            applied.extend([group.applied, group.last]);
            leaders.extend((group.role == raft::StateRole::Leader).then_some(report.node));
        }
        if leaders.len() != 1 {
            return Err(format!("{leaders:?} lead shard {}", shard.id));
        }
        if self.quiet && applied.len() > 1 {
            return Err(format!("replicas of shard {} are at {applied:?}", shard.id));
        }
        Ok(())
    }
}

/// All shards that there should be.
pub fn living(map: &ClusterMap) -> impl Iterator<Item = &ShardRecord> {
    map.shards.values().filter(|shard| !shard.dropped)
}

pub fn leads(report: &NodeReport, shard: ShardId) -> bool {
    let here = report.replicas.iter().find(|r| r.shard == shard).and_then(|r| r.group.as_ref());
    here.is_some_and(|group| group.role == raft::StateRole::Leader)
}

/// What the nodes that run tell of themselves.
async fn reports(client: &Client, cluster: &Cluster) -> Result<BTreeMap<NodeId, NodeReport>, String> {
    let mut reports = BTreeMap::new();
    for node in (0..cluster.nodes.len()).filter(|node| cluster.runs(*node)) {
        let report = client.node_report(&cluster.nodes[node].client, Duration::from_secs(5)).await;
        let report = report.map_err(|error| format!("no report of node {node}: {error}"))?;
        if report.phase != NodePhase::Ready {
            return Err(format!("node {node} is {:?}", report.phase));
        }
        if let Some(twice) = reports.insert(report.node, report) {
            return Err(format!("two processes are node {}", twice.node));
        }
    }
    Ok(reports)
}

/// Neither an orphan nor one that is missing, and all serve.
fn holds_what_it_should(map: &ClusterMap, report: &NodeReport) -> Result<(), String> {
    let should: BTreeSet<(ShardId, ReplicaId)> = living(map)
        .flat_map(|shard| shard.members.iter().map(move |m| (shard.id, m)))
        .filter(|(_, member)| member.node == report.node)
        .map(|(shard, member)| (shard, member.replica))
        .collect();
    let does: BTreeSet<_> = report.replicas.iter().map(|r| (r.shard, r.replica)).collect();
    if should != does {
        return Err(format!("node {} should hold {should:?}, and holds {does:?}", report.node));
    }
    match report.replicas.iter().find(|r| r.health != ReplicaHealth::Serving) {
        Some(sick) => Err(format!("node {}: {sick:?}", report.node)),
        None => Ok(()),
    }
}

/// Each node that takes replicas has its share, within 15 % or one. All nodes here have the same weight.
fn spread(
    what: &str,
    map: &ClusterMap,
    reports: &BTreeMap<NodeId, NodeReport>,
    on: impl Iterator<Item = NodeId>,
) -> Result<(), String> {
    let takes = |node: &&NodeId| map.nodes.get(node).is_some_and(|n| n.standing == Standing::Member);
    let mut counts: BTreeMap<NodeId, usize> = reports.keys().filter(takes).map(|node| (*node, 0)).collect();
    for node in on {
        *counts.entry(node).or_default() += 1;
    }
    let share = counts.values().sum::<usize>() as f64 / counts.len() as f64;
    let slack = (0.15 * share).max(1.0);
    match counts.values().all(|count| (*count as f64 - share).abs() <= slack) {
        true => Ok(()),
        false => Err(format!("{what} are spread as {counts:?}, {share:.1} each would be even")),
    }
}

/// All that the cluster tells of itself, for a message.
pub fn picture(cluster: &Cluster) -> String {
    let mut picture = String::new();
    for args in [&["admin", "rebalance", "status", "--json"][..], &["status", "--json"]] {
        let output = cluster.run(args);
        let (told, failed) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        picture.push_str(&format!("$ pontoon {}\n{told}{failed}\n", args.join(" ")));
    }
    for node in 0..cluster.nodes.len() {
        let state = if cluster.runs(node) { "runs" } else { "doesn't run" };
        picture.push_str(&format!("--- node {} {state}; its log:\n{}\n", node + 1, cluster.log(node)));
    }
    picture
}

/// What the replicas of a database and of the metadata shard hold is the same, as their digests tell; and as a client
/// reads it when each replica of each shard leads in turn. Nobody writes.
pub async fn assert_equal_content(client: &Client, name: &str) {
    let map = client.map().await.expect("the map");
    let shards = &map.database(name).expect("the database").shards;
    for shard in shards.iter().chain([&METADATA_SHARD]) {
        assert_equal_digests(client, *shard).await;
    }
    // Leaders are not to be spread meanwhile.
    set(client, PolicyChange::Automatic(false)).await;
    let map = client.map().await.expect("the map");
    let database = map.database(name).expect("the database");
    let mut first: Option<BTreeMap<Vec<u8>, Versioned>> = None;
    for turn in 0..database.replicas as usize {
        for shard in &database.shards {
            lead(client, &map, *shard, map.shards[shard].members[turn].node).await;
        }
        let mut pairs = BTreeMap::new();
        let mut scan = client.database(name).scan(ScanOptions::default());
        loop {
            let page = scan.next_page().await.expect("a page");
            if page.is_empty() {
                break;
            }
            pairs.extend(page.into_iter().map(|(key, value)| (key.to_vec(), value)));
        }
        for shard in &database.shards {
            let node = map.shards[shard].members[turn].node;
            let report = client.node_report(&map.nodes[&node].client_address, PATIENCE).await;
            assert!(leads(&report.expect("a report"), *shard), "another node was read from");
        }
        match &first {
            None => first = Some(pairs),
            Some(first) => {
                let differ = first.keys().chain(pairs.keys()).find(|key| first.get(*key) != pairs.get(*key));
                assert_eq!(differ.map(|key| String::from_utf8_lossy(key)), None, "replica {turn}");
            }
        }
    }
    set(client, PolicyChange::Automatic(true)).await;
}

/// Each replica of a shard tells the same, at the same entry of the log.
pub async fn assert_equal_digests(client: &Client, shard: ShardId) {
    let begun = Instant::now();
    loop {
        let check = client.verify_shard(shard, PATIENCE).await.expect("a check");
        match check.verdict() {
            Verdict::Equal => return,
            // Flushes for other reasons, and nodes that are busy.
            Verdict::GoneOn | Verdict::Unknown if begun.elapsed() < PATIENCE => {}
            verdict => panic!("{verdict:?}: {check:#?}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn lead(client: &Client, map: &ClusterMap, shard: ShardId, node: NodeId) {
    let begun = Instant::now();
    loop {
        let report = client.node_report(&map.nodes[&node].client_address, PATIENCE).await.expect("a report");
        if leads(&report, shard) {
            return;
        }
        if let Err(error) = client.transfer_leader(shard, node, Duration::from_secs(2)).await {
            assert!(begun.elapsed() < PATIENCE, "node {node}, shard {shard}: {error}");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Changes a setting of the cluster.
pub async fn set(client: &Client, change: PolicyChange) {
    client.change_setting(change, PATIENCE).await.expect("set");
}

/// Which node of the map a process is, whether or not it runs.
pub async fn id(client: &Client, cluster: &Cluster, node: usize) -> NodeId {
    let begun = Instant::now();
    loop {
        let map = client.map().await.expect("the map");
        let here = map.nodes.values().find(|record| record.client_address == cluster.nodes[node].client);
        if let Some(here) = here {
            return here.id;
        }
        assert!(begun.elapsed() < PATIENCE, "node {node} is none of {:?}", map.nodes);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Which process leads `shard`; waits until one does.
pub async fn leader(client: &Client, cluster: &Cluster, shard: ShardId) -> usize {
    let begun = Instant::now();
    loop {
        for node in (0..cluster.nodes.len()).filter(|node| cluster.runs(*node)) {
            let report = client.node_report(&cluster.nodes[node].client, Duration::from_secs(2)).await;
            if report.is_ok_and(|report| leads(&report, shard)) {
                return node;
            }
        }
        assert!(begun.elapsed() < PATIENCE, "nobody leads shard {shard}\n{}", picture(cluster));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Waits until something is so of the map.
pub async fn until(
    client: &Client,
    cluster: &Cluster,
    what: &str,
    mut so: impl FnMut(&ClusterMap) -> bool,
) -> Arc<ClusterMap> {
    let begun = Instant::now();
    loop {
        match client.map().await {
            Ok(map) if so(&map) => return map,
            _ => assert!(begun.elapsed() < 2 * PATIENCE, "not in time: {what}\n{}", picture(cluster)),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Does it again while it fails: on a busy machine a node that is asked late looks gone, and what is ordered by what was so a
/// moment ago is stale.
pub async fn patiently<T>(what: &str, mut order: impl AsyncFnMut() -> Result<T, String>) -> T {
    let begun = Instant::now();
    loop {
        match order().await {
            Ok(done) => return done,
            Err(error) => assert!(begun.elapsed() < PATIENCE, "{what}: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Plans a rebalancing that moves something, and begins it.
pub async fn rebalance(client: &Client) -> RebalancePlan {
    patiently("a rebalancing", async || {
        let plan = client.plan_rebalance(false, PATIENCE).await.map_err(|error| error.to_string())?;
        // One that was made without somebody isn't the one that is tested.
        if plan.total.moves == 0 || !plan.silent.is_empty() {
            return Err(format!("nothing to move, or not heard by all: {plan:?}"));
        }
        client.start_rebalance(plan.id, PATIENCE).await.map_err(|error| error.to_string())?;
        Ok(plan)
    })
    .await
}

/// Begins the way back.
pub async fn take_back(client: &Client, plan: u64) -> u64 {
    let undo = async || client.undo_rebalance(plan, PATIENCE).await.map_err(|error| error.to_string());
    patiently("the way back", undo).await
}

/// Has a node give away all that it holds, and be no member any more; waits for both.
pub async fn empty_and_remove(client: &Client, cluster: &Cluster, node: NodeId) {
    client.set_standing(node, Standing::Draining, PATIENCE).await.expect("draining");
    until(client, cluster, "the node is empty", |map| {
        living(map).all(|shard| shard.ordered().all(|member| member.node != node))
    })
    .await;
    client.set_standing(node, Standing::Removed, PATIENCE).await.expect("removed");
}
