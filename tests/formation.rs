//! Nodes that are killed while they form a cluster: whatever the moment, they become one cluster.

#[path = "support/cluster.rs"]
mod cluster;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_address_reaches_the_cluster_whatever_the_cached_map_says() {
    let ports = free_ports(7);
    let mut cluster = Cluster::with(3, &ports[..6], Options::default());
    cluster.wait_all_ready();
    let client = cluster.client().await;
    let known_as = async |address: &str| {
        let begun = Instant::now();
        loop {
            let map = client.map().await.expect("the map");
            let found: Vec<_> = map.nodes.values().map(|node| node.client_address.clone()).collect();
            if found.iter().any(|known| known == address) {
                return;
            }
            assert!(begun.elapsed() < Duration::from_secs(60), "{address} is not among {found:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let (first, second) = (cluster.nodes[2].client.clone(), format!("127.0.0.1:{}", ports[6]));
    let (config, map) = (cluster.nodes[2].config.clone(), cluster.nodes[2].data.join("map"));
    let settings = std::fs::read_to_string(&config).expect("its settings");

    // It moves while it is down.
    cluster.kill(2);
    let old_map = std::fs::read(&map).expect("its map");
    std::fs::write(&config, settings.replace(&first, &second)).expect("written");
    cluster.spawn(2);
    cluster.wait_ready(2);
    known_as(&second).await;

    // It moves back, and the map on its disk never heard that it had moved.
    cluster.kill(2);
    std::fs::write(&map, old_map).expect("written");
    std::fs::write(&config, settings).expect("written");
    cluster.spawn(2);
    cluster.wait_ready(2);
    known_as(&first).await;
    client.close().await;
}
