//! Nodes that are killed while they form a cluster: whatever the moment, they become one cluster.

#[path = "support/cluster.rs"]
mod cluster;

use std::collections::BTreeSet;
use std::time::Duration;

use cluster::{Cluster, Options, free_ports};
use pontoon::client::Client;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_any_moment_of_its_formation_it_becomes_one_cluster() {
    for round in 0..10 {
        let seed = rand::random::<u64>();
        println!("round {round}, seed {seed}");
        let mut random = StdRng::seed_from_u64(seed);
        let count = random.random_range(2..=4);
        let mut cluster = Cluster::prepared(count, &free_ports(2 * count), Options::default());
        for node in 0..count {
            cluster.spawn(node);
        }
        for _ in 0..random.random_range(1..=4) {
            tokio::time::sleep(Duration::from_millis(random.random_range(0..250))).await;
            // Mostly the one that forms the cluster.
            let victim = if random.random_bool(0.6) { 0 } else { random.random_range(0..count) };
            cluster.kill(victim);
            tokio::time::sleep(Duration::from_millis(random.random_range(0..100))).await;
            cluster.spawn(victim);
        }
        cluster.wait_all_ready();

        let (mut clusters, mut ids) = (BTreeSet::new(), BTreeSet::new());
        for node in &cluster.nodes {
            let client = Client::connect([node.client.clone()]).await.expect("connecting");
            clusters.insert(client.map().await.expect("the map").cluster_id);
            ids.insert(
                client.node_report(&node.client, Duration::from_secs(5)).await.expect("a report").node,
            );
            client.close().await;
        }
        assert_eq!(clusters.len(), 1, "seed {seed}: {clusters:?}");
        assert_eq!(ids.len(), count, "seed {seed}: {ids:?}");
        let client = cluster.client().await;
        let replicas = count.min(3) as u32;
        let database = cluster.database(&client, "db", replicas, 2).await;
        database.put("k", "v").await.expect("a write");
        client.close().await;
    }
}
