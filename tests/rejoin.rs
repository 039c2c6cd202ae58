//! `serve --rejoin`: a node whose directory is damaged becomes another node of its cluster, and nothing
//! else becomes of it.

#[path = "support/cluster.rs"]
mod cluster;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cluster::{Cluster, Options, free_ports};
use pontoon::client::Client;
use pontoon::ids::NodeId;
use serde_json::Value;

/// A running cluster with a write in it.
async fn with_a_write(nodes: usize) -> (Cluster, Client) {
    let mut cluster = Cluster::with(nodes, &free_ports(2 * nodes), Options::default());
    cluster.wait_all_ready();
    let client = cluster.client().await;
    cluster.database(&client, "db", nodes as u32, 2).await.put("k", "v").await.expect("a write");
    (cluster, client)
}

fn asides(data: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(data).expect("listing").map(|entry| entry.expect("an entry").path());
    entries
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("aside-")))
        .collect()
}

async fn until_it_says(cluster: &Cluster, node: usize, what: &str) {
    let begun = Instant::now();
    while !cluster.whole_log(node).contains(what) {
        assert!(begun.elapsed() < Duration::from_secs(60), "no word of `{what}`:\n{}", cluster.log(node));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn number_of(cluster: &Cluster, client: &Client, node: usize) -> NodeId {
    let report = client.node_report(&cluster.nodes[node].client, Duration::from_secs(5)).await;
    report.expect("a report").node
}

async fn reads_back(cluster: &Cluster) {
    let client = cluster.client().await;
    assert_eq!(client.database("db").get("k").await.expect("a read").expect("there").value, "v");
    client.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_node_rejoins_and_forms_nothing() {
    let (mut cluster, client) = with_a_write(3).await;
    let id = client.map().await.expect("the map").cluster_id;
    client.close().await;
    for node in 0..3 {
        cluster.kill(node);
    }
    let data = cluster.nodes[0].data.clone();
    fs::remove_dir_all(data.join("log")).expect("removed");
    cluster.spawn(0);
    assert_eq!(cluster.ready_or_exit(0, Duration::from_secs(60)), Some(Some(2)));
    assert!(cluster.log(0).contains("--rejoin"), "{}", cluster.log(0));
    assert_eq!(asides(&data), [] as [PathBuf; 0], "not without being told to");

    // It is the one that may form the cluster, and nobody is there.
    cluster.spawn_with(0, &["--rejoin"]);
    until_it_says(&cluster, 0, "after `--rejoin` this node forms no cluster of its own").await;
    assert!(cluster.log(0).contains(&format!("joins cluster {id} as a new one")), "{}", cluster.log(0));
    // Nor does it when it is started again, as always.
    cluster.kill(0);
    cluster.spawn(0);
    tokio::time::sleep(Duration::from_millis(500)).await;
    for node in 1..3 {
        cluster.spawn(node);
    }
    cluster.wait_all_ready();
    let client = cluster.client().await;
    assert_eq!(number_of(&cluster, &client, 0).await, NodeId(4));
    assert_eq!(client.map().await.expect("the map").cluster_id, id);
    reads_back(&cluster).await;
    let [aside] = &asides(&data)[..] else { panic!("{:?}", asides(&data)) };
    assert!(aside.join("IDENTITY").exists() && aside.join("state/current").exists());

    // The cluster knows one from the other.
    let output = cluster.run(&["status", "--json"]);
    let status: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let states: Vec<&str> = status["nodes"]
        .as_array()
        .expect("nodes")
        .iter()
        .map(|n| n["state"].as_str().expect("a state"))
        .collect();
    assert_eq!(states, ["replaced", "ready", "ready", "ready"], "{status}");
    let replicas = status["databases"][0]["shards"][0]["replicas"].as_array().expect("replicas");
    let lost = replicas.iter().find(|replica| replica["node"] == 1).expect("it is in the map");
    assert_eq!(lost["state"], "unreachable", "{status}");
    assert_eq!(lost["message"], "node 4 runs in place of its node", "{status}");
    // What is made from now on has replicas that exist.
    cluster.database(&client, "new", 3, 4).await.put("k", "v").await.expect("a write");
    let map = client.map().await.expect("the map");
    let new = map.database("new").expect("it is there");
    for shard in &new.shards {
        assert_eq!(map.shards[shard].member_on(NodeId(1)), None, "{:?}", map.shards[shard]);
    }
    client.close().await;

    // The option is left in its command line: it stays who it is, with all it has.
    cluster.kill(0);
    cluster.spawn_with(0, &["--rejoin"]);
    cluster.wait_ready(0);
    assert!(cluster.log(0).contains("keeps node 4 from starting"), "{}", cluster.log(0));
    let client = cluster.client().await;
    assert_eq!(number_of(&cluster, &client, 0).await, NodeId(4));
    assert_eq!(asides(&data).len(), 1);
    client.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn if_all_nodes_have_lost_their_directories_no_empty_cluster_takes_the_place_of_theirs() {
    let (mut cluster, client) = with_a_write(3).await;
    client.close().await;
    for node in 0..3 {
        cluster.kill(node);
        let log = cluster.nodes[node].data.join("log");
        fs::rename(&log, cluster.dir.path().join(format!("log-{node}"))).expect("moved");
        cluster.spawn_with(node, &["--rejoin"]);
    }
    for node in 0..3 {
        until_it_says(&cluster, node, "this node forms no cluster of its own").await;
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    for node in 0..3 {
        let memberships = cluster.log(node).matches(": member cluster=").count();
        assert_eq!(memberships, 1, "{}", cluster.log(node));
        cluster.kill(node);
    }
    // What was set aside can be put back.
    for node in 0..3 {
        let data = cluster.nodes[node].data.clone();
        let [aside] = &asides(&data)[..] else { panic!("{:?}", asides(&data)) };
        let kept = cluster.dir.path().join(format!("kept-{node}"));
        fs::rename(aside, &kept).expect("moved");
        fs::rename(cluster.dir.path().join(format!("log-{node}")), kept.join("log")).expect("moved");
        fs::remove_dir_all(&data).expect("removed");
        fs::rename(kept, data).expect("moved");
        cluster.spawn(node);
    }
    cluster.wait_all_ready();
    reads_back(&cluster).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lone_node_has_nobody_to_rejoin_and_keeps_what_it_has() {
    let (mut cluster, client) = with_a_write(1).await;
    client.close().await;
    cluster.kill(0);
    let data = cluster.nodes[0].data.clone();
    let identity = fs::read(data.join("IDENTITY")).expect("its identity");
    fs::write(data.join("IDENTITY"), "").expect("written");
    cluster.spawn_with(0, &["--rejoin"]);
    assert_eq!(cluster.ready_or_exit(0, Duration::from_secs(60)), Some(Some(1)));
    assert!(cluster.log(0).contains("name no other node"), "{}", cluster.log(0));
    assert_eq!(asides(&data), [] as [PathBuf; 0]);
    fs::write(data.join("IDENTITY"), identity).expect("written");
    cluster.spawn_with(0, &["--rejoin"]);
    cluster.wait_ready(0);
    reads_back(&cluster).await;
    // Nor does it form an empty cluster where there should be one to rejoin.
    cluster.kill(0);
    fs::rename(&data, data.with_extension("lost")).expect("moved");
    cluster.spawn_with(0, &["--rejoin"]);
    assert_eq!(cluster.ready_or_exit(0, Duration::from_secs(60)), Some(Some(1)));
    assert!(cluster.log(0).contains("leave out `--rejoin`"), "{}", cluster.log(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_its_identity_a_node_rejoins_the_cluster_of_its_map() {
    let (mut cluster, client) = with_a_write(3).await;
    let id = client.map().await.expect("the map").cluster_id;
    client.close().await;
    cluster.kill(2);
    fs::remove_file(cluster.nodes[2].data.join("IDENTITY")).expect("removed");
    cluster.spawn_with(2, &["--rejoin"]);
    cluster.wait_ready(2);
    assert!(cluster.log(2).contains(&format!("joins cluster {id} as a new one")), "{}", cluster.log(2));
    let client = cluster.client().await;
    assert_eq!(number_of(&cluster, &client, 2).await, NodeId(4));
    client.close().await;
    reads_back(&cluster).await;
}
