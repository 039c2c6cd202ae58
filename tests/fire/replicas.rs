//! What the replicas of the nodes hold, and how far they are.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use pontoon::client::{Client, Database, ScanOptions, Versioned};
use pontoon::ids::{NodeId, ShardId};
use pontoon::node::handle::NodeReport;

use crate::PATIENCE;
use crate::cluster::Cluster;

/// What a node tells of itself.
pub async fn report(client: &Client, cluster: &Cluster, node: usize) -> NodeReport {
    let begun = Instant::now();
    loop {
        match client.node_report(&cluster.nodes[node].client, Duration::from_secs(5)).await {
            Ok(report) => return report,
            Err(error) => assert!(begun.elapsed() < PATIENCE, "node {node}: {error}"),
        }
    }
}

/// All pairs of a database, as its leaders have them.
pub async fn content(database: &Database) -> BTreeMap<Vec<u8>, Versioned> {
    let mut scan = database.scan(ScanOptions::default());
    let mut pairs = BTreeMap::new();
    loop {
        let page = scan.next_page().await.expect("a page");
        if page.is_empty() {
            return pairs;
        }
        pairs.extend(page.into_iter().map(|(key, value)| (key.to_vec(), value)));
    }
}

/// Has each node lead all shards in turn: what they hold is the same.
pub async fn assert_equal_replicas(client: &Client, cluster: &Cluster, name: &str) {
    let (database, map) = (client.database(name), client.map().await.expect("the map"));
    let shards = &map.database(name).expect("the database").shards;
    let mut first: Option<BTreeMap<Vec<u8>, Versioned>> = None;
    for node in 0..cluster.nodes.len() {
        let id = report(client, cluster, node).await.node;
        let begun = Instant::now();
        let pairs = loop {
            for shard in shards {
                lead(client, cluster, node, id, *shard).await;
            }
            let pairs = content(&database).await;
            let report = report(client, cluster, node).await;
            // On a busy machine another may have been elected meanwhile, and then it was the one that was read.
            match shards.iter().find(|shard| !leads(&report, **shard)) {
                None => break pairs,
                Some(shard) => {
                    assert!(begun.elapsed() < PATIENCE, "node {node} doesn't stay leader of shard {shard}")
                }
            }
        };
        match &first {
            None => first = Some(pairs),
            Some(first) => {
                let differ = |key: &&Vec<u8>| first.get(*key) != pairs.get(*key);
                let differ = first.keys().chain(pairs.keys()).find(differ);
                assert_eq!(differ.map(|key| String::from_utf8_lossy(key)), None, "node {node}");
            }
        }
    }
}

pub fn leads(report: &NodeReport, shard: ShardId) -> bool {
    let here = report.replicas.iter().find(|r| r.shard == shard).and_then(|r| r.group.as_ref());
    here.is_some_and(|group| group.role == raft::StateRole::Leader)
}

async fn lead(client: &Client, cluster: &Cluster, node: usize, id: NodeId, shard: ShardId) {
    let begun = Instant::now();
    while !leads(&report(client, cluster, node).await, shard) {
        if let Err(error) = client.transfer_leader(shard, id, Duration::from_secs(2)).await {
            assert!(begun.elapsed() < PATIENCE, "node {node}, shard {shard}: {error}");
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Whether a node's replica has applied nearly all that is committed, as the leader tells too; if not, how much.
async fn has_caught_up(
    client: &Client,
    cluster: &Cluster,
    node: usize,
    shard: ShardId,
) -> Result<(), String> {
    let (mut applied, mut committed, mut led) = (0, 0, false);
    for other in 0..3 {
        let Ok(report) = client.node_report(&cluster.nodes[other].client, Duration::from_secs(2)).await
        else {
            continue;
        };
        let Some(group) = report.replicas.into_iter().find(|r| r.shard == shard).and_then(|r| r.group) else {
            continue;
        };
        committed = committed.max(group.committed);
        led |= group.role == raft::StateRole::Leader;
        if other == node {
            applied = group.applied;
        }
    }
    if led && applied > 0 && applied + 50 >= committed {
        Ok(())
    } else {
        Err(format!("{applied} of {committed}"))
    }
}

/// Waits until it has.
pub async fn caught_up(client: &Client, cluster: &Cluster, node: usize, shard: ShardId) {
    let begun = Instant::now();
    while let Err(lacks) = has_caught_up(client, cluster, node, shard).await {
        assert!(begun.elapsed() < PATIENCE, "node {node}: {lacks}\n{}", cluster.log(node));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
