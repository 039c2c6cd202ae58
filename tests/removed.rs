//! Nodes that aren't to be members, or not yet, or not twice: none of them disturbs the others, and each says
//! what there is to do.

#[path = "support/cluster.rs"]
mod cluster;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use cluster::{Cluster, Options, free_ports};
use pontoon::client::Client;
use pontoon::codec::peer::{PeerRequest, PeerResponse};
use pontoon::ids::{ClusterId, METADATA_SHARD, NodeId};
use pontoon::machine::command::{MetaCommand, MetaReply, PolicyChange};
use pontoon::placement::map::{ClusterMap, Standing};
use pontoon::transport::call::{HelloConfig, PeerClient};
use raft::StateRole;

const PATIENCE: Duration = Duration::from_secs(60);

/// One more node, for the cluster `of`: it joins.
fn joining(of: &Cluster) -> Cluster {
    let more = Cluster::prepared(1, &free_ports(2), Options::default());
    let config = &more.nodes[0].config;
    let text = fs::read_to_string(config).expect("its settings");
    let peers: Vec<String> = of.nodes.iter().map(|node| format!("\"{}\"", node.peer)).collect();
    let own = format!("initial = [\"{}\"]", more.nodes[0].peer);
    assert!(text.contains(&own), "{text}");
    fs::write(config, text.replace(&own, &format!("join = [{}]", peers.join(", ")))).expect("written");
    more
}

fn copy_all(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a directory");
    for item in fs::read_dir(from).expect("listing") {
        let item = item.expect("an entry");
        let target = to.join(item.file_name());
        match item.file_type().expect("its type").is_dir() {
            true => copy_all(&item.path(), &target),
            false => drop(fs::copy(item.path(), target).expect("copied")),
        }
    }
}

/// Has the metadata shard execute a command, wherever it is led.
async fn decide(cluster: &Cluster, id: ClusterId, command: MetaCommand) -> MetaReply {
    let begun = Instant::now();
    loop {
        for node in &cluster.nodes {
            let hello = HelloConfig { cluster_id: Some(id), ..HelloConfig::default() };
            let request = PeerRequest::Meta(command.clone());
            let answer = PeerClient::call(&node.peer, hello, request, Duration::from_secs(5)).await;
            if let Ok(PeerResponse::Meta(reply)) = answer {
                return reply;
            }
        }
        assert!(begun.elapsed() < PATIENCE, "nobody carries out {command:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The same; it must be done.
async fn decided(cluster: &Cluster, id: ClusterId, command: MetaCommand) {
    let reply = decide(cluster, id, command.clone()).await;
    assert!(matches!(reply, MetaReply::Done(_)), "{command:?}: {reply:?}");
}

/// Waits until the map of the first node is as wanted.
async fn until(
    cluster: &Cluster,
    client: &Client,
    what: &str,
    wanted: impl Fn(&ClusterMap) -> bool,
) -> ClusterMap {
    let begun = Instant::now();
    loop {
        let map = client.map().await.expect("the map");
        if wanted(&map) {
            return ClusterMap::clone(&map);
        }
        assert!(begun.elapsed() < PATIENCE, "not {what}: {map:#?}\n{}", cluster.log(0));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn until_it_says(cluster: &Cluster, node: usize, what: &str) {
    let begun = Instant::now();
    while !cluster.whole_log(node).contains(what) {
        assert!(begun.elapsed() < PATIENCE, "no word of `{what}`:\n{}", cluster.log(node));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn exits_with(cluster: &mut Cluster, node: usize, code: i32) {
    assert_eq!(cluster.wait_exit(node, PATIENCE).code(), Some(code), "{}", cluster.log(node));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_process_of_a_node_starts_only_when_the_first_is_gone() {
    let mut cluster = Cluster::new(3);
    cluster.wait_all_ready();
    let client = cluster.client().await;
    let database = cluster.database(&client, "db", 3, 4).await;
    database.put("k", "1").await.expect("a write");
    cluster.kill(2);
    let mut second = joining(&cluster);
    copy_all(&cluster.nodes[2].data, &second.nodes[0].data);
    cluster.spawn(2);
    cluster.wait_ready(2);

    second.spawn(0);
    exits_with(&mut second, 0, 1);
    let told = second.whole_log(0);
    assert!(told.contains("another process that is alive is node 3; was a data directory copied?"), "{told}");
    assert!(told.contains("doesn't start as node 3 beside it"), "{told}");
    // It has told nobody that node 3 is where it is, and the first one serves on.
    let map = client.map().await.expect("the map");
    assert_eq!(map.nodes[&NodeId(3)].peer_address, cluster.nodes[2].peer);
    database.put("k", "2").await.expect("a write");

    // A directory that was moved, to a machine of another address, is another thing.
    cluster.kill(2);
    second.spawn(0);
    second.wait_ready(0);
    let there = second.nodes[0].peer.clone();
    until(&cluster, &client, "moved", |map| map.nodes[&NodeId(3)].peer_address == there).await;
    cluster.kill(1);
    database.put("k", "3").await.expect("a write, with the one that moved");
    cluster.spawn(1);
    cluster.wait_ready(1);
    // And what is left at the old place is the second now.
    cluster.spawn(2);
    exits_with(&mut cluster, 2, 1);
    client.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lone_node_that_was_copied_is_noticed_at_its_own_address() {
    let mut cluster = Cluster::new(1);
    cluster.wait_all_ready();
    let mut second = Cluster::prepared(1, &free_ports(2), Options::default());
    // As it is: what it copies of the stores doesn't matter, it never gets to serve.
    cluster.kill(0);
    copy_all(&cluster.nodes[0].data, &second.nodes[0].data);
    cluster.spawn(0);
    cluster.wait_ready(0);
    second.spawn(0);
    exits_with(&mut second, 0, 1);
    assert!(second.whole_log(0).contains("doesn't start as node 1 beside it"), "{}", second.whole_log(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_to_be_approved_waits_and_says_so() {
    let mut cluster = Cluster::new(1);
    cluster.wait_all_ready();
    let client = cluster.client().await;
    let id = client.map().await.expect("the map").cluster_id;
    decided(&cluster, id, MetaCommand::SetPolicy(PolicyChange::ApproveJoins(true))).await;

    let mut more = joining(&cluster);
    more.spawn(0);
    until_it_says(&more, 0, "waits to be approved: `pontoon admin node add").await;
    let pending =
        |map: &ClusterMap| map.nodes.get(&NodeId(2)).is_some_and(|n| n.standing == Standing::Pending);
    let version = until(&cluster, &client, "known", pending).await.version;
    // It asks now and then, and that is no news.
    tokio::time::sleep(Duration::from_secs(5)).await;
    let map = until(&cluster, &client, "known", pending).await;
    assert_eq!(map.version, version);
    assert_eq!(more.whole_log(0).matches("waits to be approved").count(), 1, "{}", more.whole_log(0));

    decided(&cluster, id, MetaCommand::SetStanding { node: NodeId(2), standing: Standing::Member }).await;
    more.wait_ready(0);
    let own = Client::connect([more.nodes[0].client.clone()]).await.expect("connecting");
    assert!(own.map().await.expect("the map").policy.approve_joins, "it knows what is set");
    // From now on it is a member like any other.
    more.kill(0);
    more.spawn(0);
    more.wait_ready(0);
    own.close().await;
    client.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_removed_while_it_runs_ends() {
    let mut cluster = Cluster::new(3);
    cluster.wait_all_ready();
    let client = cluster.client().await;
    let id = client.map().await.expect("the map").cluster_id;
    let mut more = joining(&cluster);
    more.spawn(0);
    more.wait_ready(0);
    let standing = |standing| MetaCommand::SetStanding { node: NodeId(4), standing };
    until(&cluster, &client, "joined", |map| map.nodes.contains_key(&NodeId(4))).await;
    // Nothing is there yet that would have to go first.
    decided(&cluster, id, standing(Standing::Draining)).await;
    decided(&cluster, id, standing(Standing::Removed)).await;
    exits_with(&mut more, 0, 1);
    let farewell = "node 4 was removed from cluster";
    assert!(more.whole_log(0).contains(farewell), "{}", more.whole_log(0));
    assert!(more.whole_log(0).contains("--rejoin"), "{}", more.whole_log(0));
    // At every further start, whoever is there to be asked.
    more.spawn(0);
    exits_with(&mut more, 0, 1);
    assert!(more.whole_log(0).matches(farewell).count() >= 2, "{}", more.whole_log(0));
    // Until it is told to begin anew.
    more.spawn_with(0, &["--rejoin"]);
    more.wait_ready(0);
    let map = until(&cluster, &client, "back", |map| map.nodes.contains_key(&NodeId(5))).await;
    assert_eq!(map.nodes[&NodeId(4)].standing, Standing::Removed);
    assert_eq!(map.nodes[&NodeId(5)].peer_address, more.nodes[0].peer);
    client.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_node_that_comes_back_from_its_old_disk_cleans_up() {
    let mut cluster = Cluster::new(4);
    cluster.wait_all_ready();
    let client = cluster.client().await;
    let id = client.map().await.expect("the map").cluster_id;
    let database = cluster.database(&client, "db", 3, 8).await;
    for key in 0..100 {
        database.put(format!("k{key}"), "v").await.expect("a write");
    }
    // One that holds something, and isn't needed for the metadata shard.
    let map = client.map().await.expect("the map");
    let holds = |map: &ClusterMap, node| {
        let shards = map.shards.values().filter(|shard| !shard.dropped);
        shards.filter(|shard| shard.ordered().any(|member| member.node == node)).count()
    };
    let victim = *map
        .nodes
        .keys()
        .find(|node| map.shards[&METADATA_SHARD].member_on(**node).is_none())
        .expect("a fourth node");
    assert!(holds(&map, victim) > 0, "{map:#?}");
    let at = cluster
        .nodes
        .iter()
        .position(|node| node.peer == map.nodes[&victim].peer_address)
        .expect("it is one of them");
    cluster.kill(at);
    let standing = |standing| MetaCommand::SetStanding { node: victim, standing };
    decided(&cluster, id, standing(Standing::Leaving)).await;
    until(&cluster, &client, "replaced", |map| holds(map, victim) == 0).await;
    decided(&cluster, id, standing(Standing::Removed)).await;
    let removed = |map: &ClusterMap| map.nodes[&victim].standing == Standing::Removed;
    let record = until(&cluster, &client, "removed", removed).await.nodes[&victim].clone();

    cluster.spawn(at);
    exits_with(&mut cluster, at, 1);
    let told = cluster.whole_log(at);
    assert!(told.contains("giving up what it holds"), "{told}");
    assert!(told.contains("was removed from cluster"), "{told}");
    // Nothing has come of it: the map has of it what it had, and what the others hold is there.
    let map = until(&cluster, &client, "removed", removed).await;
    assert_eq!((&map.nodes[&victim], holds(&map, victim)), (&record, 0));
    for key in 0..100 {
        assert_eq!(database.get(format!("k{key}")).await.expect("a read").expect("there").value, "v");
    }
    // There is nothing left of its replicas that could ever run again.
    cluster.spawn(at);
    exits_with(&mut cluster, at, 1);
    assert_eq!(cluster.whole_log(at).matches("replicas=0").count(), 1, "{}", cluster.whole_log(at));
    client.close().await;
}

/// How many shards a node leads.
async fn led(cluster: &Cluster, client: &Client, node: usize) -> usize {
    let report = client.node_report(&cluster.nodes[node].client, PATIENCE).await.expect("a report");
    let groups = report.replicas.iter().filter_map(|replica| replica.group.as_ref());
    groups.filter(|group| group.role == StateRole::Leader).count()
}

async fn until_it_leads(
    cluster: &Cluster,
    client: &Client,
    node: usize,
    what: &str,
    wanted: fn(usize) -> bool,
) {
    let begun = Instant::now();
    loop {
        let led = led(cluster, client, node).await;
        if wanted(led) {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "not {what}, it leads {led}:\n{}", cluster.log(node));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_to_be_emptied_hands_over_what_it_leads_and_seeks_nothing() {
    let mut cluster = Cluster::new(3);
    cluster.wait_all_ready();
    let client = cluster.client().await;
    let id = client.map().await.expect("the map").cluster_id;
    let database = cluster.database(&client, "db", 3, 9).await;
    database.put("k", "1").await.expect("a write");
    until_it_leads(&cluster, &client, 0, "leading", |led| led > 0).await;
    let standing = |standing| MetaCommand::SetStanding { node: NodeId(1), standing };
    let at = {
        let map = client.map().await.expect("the map");
        let first = &map.nodes[&NodeId(1)].peer_address;
        cluster.nodes.iter().position(|node| node.peer == *first).expect("it is one of them")
    };
    decided(&cluster, id, standing(Standing::Draining)).await;
    until_it_leads(&cluster, &client, at, "empty", |led| led == 0).await;
    database.put("k", "2").await.expect("a write");
    // There is nowhere to put its replicas; but it leads none of them, when the others start anew either.
    for other in (0..3).filter(|node| *node != at) {
        cluster.kill(other);
        database.put("k", "3").await.expect("a write");
        cluster.spawn(other);
        cluster.wait_ready(other);
        until_it_leads(&cluster, &client, at, "empty again", |led| led == 0).await;
    }
    // Until it may again.
    decided(&cluster, id, standing(Standing::Member)).await;
    for other in (0..3).filter(|node| *node != at) {
        cluster.kill(other);
        cluster.spawn(other);
        cluster.wait_ready(other);
    }
    database.put("k", "4").await.expect("a write");
    client.close().await;
}
