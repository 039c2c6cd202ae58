//! Parts of a cluster that are gone while it is used: the majority of the metadata shard, a zone, a node that
//! comes back when it was replaced already.

#[path = "support/cluster.rs"]
mod cluster;
#[path = "support/counters.rs"]
mod counters;
#[path = "grow/journal.rs"]
mod journal;
#[path = "grow/rest.rs"]
mod rest;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cluster::{Cluster, Options, free_ports};
use counters::{Load, assert_exact};
use journal::Journal;
use pontoon::client::Client;
use pontoon::client::options::ClientOptions;
use pontoon::ids::{METADATA_SHARD, NodeId, ReplicaId, StoreId};
use pontoon::machine::command::PolicyChange;
use pontoon::node::handle::NodeReport;
use pontoon::placement::map::{ClusterMap, ShardRecord};
use pontoon::storage::engine_kind::{EngineKind, StateOptions};
use rest::{PATIENCE, Rest, assert_equal_content, empty_and_remove, id, living, picture, set, until};
use rustix::process::Signal;
use serde_json::Value;
use tokio::sync::Semaphore;

/// For a cluster to come to rest after nodes came or went.
const SETTLE: Duration = Duration::from_secs(120);
/// The shortest time after which a node that is gone is replaced.
const REPLACE_AFTER_MS: u64 = 10_000;

/// Clusters that run at the same time: each has a handful of processes.
static ROOM: Semaphore = Semaphore::const_new(2);

async fn report(client: &Client, cluster: &Cluster, node: usize) -> NodeReport {
    client.node_report(&cluster.nodes[node].client, PATIENCE).await.expect("a report")
}

/// Waits until none of these nodes leads the metadata shard, and none knows who does.
async fn until_headless(client: &Client, cluster: &Cluster, nodes: &[usize]) {
    let begun = Instant::now();
    loop {
        let mut known = Vec::new();
        for node in nodes {
            let report = report(client, cluster, *node).await;
            let here = report.replicas.iter().find(|replica| replica.shard == METADATA_SHARD);
            known.extend(here.and_then(|here| here.group.as_ref()?.leader));
        }
        if known.is_empty() {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "{known:?} leads the metadata shard\n{}", picture(cluster));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Nobody decides anything.
async fn assert_headless(client: &Client, cluster: &Cluster, nodes: &[usize]) {
    until_headless(client, cluster, nodes).await;
    // Not applied; or unknown, if the deadline met the request on its way.
    let decided = client.create_database("late", 1, 1, Duration::from_secs(1)).await;
    assert!(decided.is_err(), "{decided:?}");
}

/// A client that hasn't asked anybody before, and its work in a database of its own. It knows the addresses of all
/// nodes, and so does a command beside it.
async fn fresh(cluster: &Cluster, database: &str) -> (Client, Journal) {
    let begun = Instant::now();
    let client = Client::connect_with(ClientOptions::new(cluster.addresses())).await.expect("connecting");
    let journal = Journal::start(&client.database(database), 2, 256, Duration::from_millis(5));
    journal.progress(40).await;
    println!("a fresh client's first writes took {:?}", begun.elapsed());
    let told = cluster.run(&["get", database, "{0}-00000000", "--json"]);
    assert!(told.status.success(), "{told:?}");
    (client, journal)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn data_is_served_while_nobody_leads_the_metadata_shard() {
    let _room = ROOM.acquire().await.expect("it isn't closed");
    let mut cluster = Cluster::prepared(6, &free_ports(12), Options::default());
    // Three of the five voters of the metadata shard are on nodes without data; all of it is on the others.
    let (keepers, holders) = ([0, 1, 2], [3, 4, 5]);
    for node in 0..6 {
        let weight = if keepers.contains(&node) { "weight = 1" } else { "weight = 10000" };
        cluster.amend(node, weight);
        cluster.spawn(node);
    }
    cluster.wait_all_ready();
    let client = cluster.client().await;
    let exact = cluster.database(&client, "exact", 3, 3).await;
    for name in ["second", "third"] {
        cluster.database(&client, name, 3, 2).await;
    }
    let map = Rest { metadata: 5, ..Rest::default() }.reached(&client, &cluster, SETTLE).await;
    let mut ids = Vec::new();
    for node in 0..6 {
        ids.push(id(&client, &cluster, node).await);
    }
    for shard in living(&map) {
        let on_keepers = keepers.iter().filter(|node| shard.member_on(ids[**node]).is_some()).count();
        assert_eq!(on_keepers, if shard.id == METADATA_SHARD { 3 } else { 0 }, "{shard:?}");
    }
    let other = cluster.client().await;
    let patient = [exact.clone(), other.database("exact")].map(|exact| exact.with_timeout(SETTLE));
    let load = Load::start(&patient, 4);
    load.progress(100).await;

    // They hang: whoever asks them gets no answer, and no refusal either.
    for node in keepers {
        cluster.signal(node, Signal::STOP);
    }
    until_headless(&client, &cluster, &holders).await;
    load.progress(300).await;
    let (second, journal) = fresh(&cluster, "second").await;
    load.progress(100).await;
    // A shard elects another leader by itself, and a node starts from the map that it has.
    for node in [4, 5] {
        cluster.kill(node);
        load.progress(50).await;
        journal.progress(20).await;
        cluster.spawn(node);
        cluster.wait_ready(node);
        load.progress(50).await;
    }
    assert_headless(&client, &cluster, &holders).await;

    // They are gone.
    for node in keepers {
        cluster.kill(node);
    }
    load.progress(100).await;
    let (third, later) = fresh(&cluster, "third").await;
    assert_headless(&second, &cluster, &holders).await;
    journal.progress(20).await;
    for node in keepers {
        cluster.spawn(node);
    }
    for node in keepers {
        cluster.wait_ready(node);
    }
    cluster.database(&client, "decided", 3, 1).await;
    load.progress(50).await;
    let tally = load.stop().await;
    assert_eq!(tally.errors, []);
    journal.stop().await.assert_kept(&client.database("second")).await;
    later.stop().await.assert_kept(&client.database("third")).await;
    assert_exact(&client, "exact", &exact, &tally).await;
    Rest { metadata: 5, quiet: true, ..Rest::default() }.reached(&client, &cluster, SETTLE).await;
    assert_equal_content(&client, "exact").await;
    for client in [client, other, second, third] {
        client.close().await;
    }
}

const ZONES: [&str; 3] = ["a", "b", "c"];

/// Two nodes in each zone; 0 and 3 are in the first.
async fn zoned() -> (Cluster, Client) {
    let mut cluster = Cluster::prepared(6, &free_ports(12), Options::default());
    for node in 0..6 {
        cluster.amend(node, &format!("zone = \"{}\"", ZONES[node % 3]));
        cluster.spawn(node);
    }
    cluster.wait_all_ready();
    let client = cluster.client().await;
    (cluster, client)
}

/// Replicas of a shard in each zone, when the change under way has ended.
fn zones(map: &ClusterMap, shard: &ShardRecord) -> BTreeMap<String, usize> {
    let mut zones = BTreeMap::new();
    for member in shard.members.iter().filter(|member| member.role.stays_voter()) {
        *zones.entry(map.nodes[&member.node].zone.clone()).or_default() += 1;
    }
    zones
}

/// Shards that have more replicas in a zone than they must in three.
fn crowded(map: &ClusterMap) -> Vec<String> {
    let crowded = living(map).filter(|shard| {
        let zones = zones(map, shard);
        zones.values().any(|there| *there > zones.values().sum::<usize>().div_ceil(ZONES.len()))
    });
    crowded.map(|shard| format!("{:?}: {shard:?}", zones(map, shard))).collect()
}

/// Looks at every map from now on, those in the middle of a change included.
struct Watch {
    stop: Arc<AtomicBool>,
    seen: tokio::task::JoinHandle<Vec<String>>,
}

impl Watch {
    fn start(client: &Client) -> Watch {
        let (client, stop) = (client.clone(), Arc::<AtomicBool>::default());
        let stopped = stop.clone();
        let seen = tokio::spawn(async move {
            let mut seen = Vec::new();
            while !stopped.load(Ordering::Relaxed) && seen.is_empty() {
                seen = client.map().await.map_or(Vec::new(), |map| crowded(&map));
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            seen
        });
        Watch { stop, seen }
    }

    /// That no shard ever crowded a zone.
    async fn assert_spread(self, while_what: &str) {
        self.stop.store(true, Ordering::Relaxed);
        assert_eq!(self.seen.await.expect("it looked"), [""; 0], "while {while_what}");
    }
}

/// Waits until nothing is on any of these nodes.
async fn until_empty(client: &Client, cluster: &Cluster, nodes: &[NodeId]) {
    until(client, cluster, "the nodes are empty", |map| {
        living(map).all(|shard| shard.ordered().all(|member| !nodes.contains(&member.node)))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_two_replicas_of_a_shard_are_in_one_zone_whoever_comes_goes_or_dies() {
    let _room = ROOM.acquire().await.expect("it isn't closed");
    let (mut cluster, client) = zoned().await;
    set(&client, PolicyChange::ReplaceAfterMs(REPLACE_AFTER_MS)).await;
    let watch = Watch::start(&client);
    let database = cluster.database(&client, "db", 3, 8).await;
    let journal = Journal::start(&database, 4, 256, Duration::from_millis(5));
    let rest = Rest { metadata: 5, ..Rest::default() };
    Rest { even: true, ..rest }.reached(&client, &cluster, SETTLE).await;
    watch.assert_spread("the database was made").await;

    let watch = Watch::start(&client);
    let node = cluster.add();
    cluster.amend(node, "zone = \"a\"");
    cluster.spawn(node);
    cluster.wait_ready(node);
    let new = id(&client, &cluster, node).await;
    until(&client, &cluster, "the new node has a share", |map| held(map, new) >= 2).await;
    rest.reached(&client, &cluster, SETTLE).await;
    watch.assert_spread("a node joined").await;

    let watch = Watch::start(&client);
    let old = id(&client, &cluster, 0).await;
    empty_and_remove(&client, &cluster, old).await;
    cluster.wait_exit(0, PATIENCE);
    rest.reached(&client, &cluster, SETTLE).await;
    watch.assert_spread("a node was drained").await;

    let watch = Watch::start(&client);
    let dead = id(&client, &cluster, 1).await;
    cluster.kill(1);
    until_empty(&client, &cluster, &[dead]).await;
    rest.reached(&client, &cluster, SETTLE).await;
    watch.assert_spread("a dead node was replaced").await;
    journal.stop().await.assert_kept(&database).await;
    client.close().await;
}

/// Replicas of databases on a node.
fn held(map: &ClusterMap, node: NodeId) -> usize {
    let shards = living(map).filter(|shard| shard.id != METADATA_SHARD);
    shards.filter(|shard| shard.ordered().any(|member| member.node == node)).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_zone_that_is_gone_is_done_without_and_used_again_when_it_is_back() {
    let _room = ROOM.acquire().await.expect("it isn't closed");
    let (mut cluster, client) = zoned().await;
    set(&client, PolicyChange::ReplaceAfterMs(REPLACE_AFTER_MS)).await;
    let database = cluster.database(&client, "db", 3, 6).await;
    let journal = Journal::start(&database, 6, 256, Duration::from_millis(5));
    let rest = Rest { metadata: 5, even: true, ..Rest::default() };
    let before = rest.reached(&client, &cluster, SETTLE).await;
    assert_eq!(crowded(&before), [""; 0]);
    let zone = [id(&client, &cluster, 2).await, id(&client, &cluster, 5).await];
    assert!(zone.iter().all(|node| held(&before, *node) > 0), "{before:#?}");

    for node in [2, 5] {
        cluster.kill(node);
    }
    // Two of three replicas are there, in two zones.
    journal.progress(200).await;
    // Then the other two zones take what it held, evenly.
    until_empty(&client, &cluster, &zone).await;
    let without = Rest { metadata: 3, ..rest }.reached(&client, &cluster, SETTLE).await;
    for shard in living(&without) {
        let zones = zones(&without, shard);
        assert!(zones.len() == 2 && zones.values().all(|there| *there <= 2), "{zones:?}: {shard:?}");
    }
    journal.progress(100).await;

    for node in [2, 5] {
        cluster.spawn(node);
        cluster.wait_ready(node);
    }
    until(&client, &cluster, "each shard is in each zone", |map| crowded(map).is_empty()).await;
    let after = rest.reached(&client, &cluster, SETTLE).await;
    assert_eq!(crowded(&after), [""; 0]);
    journal.progress(100).await;
    journal.stop().await.assert_kept(&database).await;
    Rest { quiet: true, ..rest }.reached(&client, &cluster, SETTLE).await;
    client.close().await;
}

/// Replicas that a node which doesn't run has any state of in its engine.
fn with_state(data: &Path, store: StoreId) -> BTreeSet<ReplicaId> {
    let (path, options) =
        (data.join("state"), StateOptions { engine: None, cache_bytes: 1 << 20, synchronous: true });
    let engine =
        EngineKind::of(&path, None).expect("its engine").open(&path, options, store).expect("its state");
    let mut replicas = BTreeSet::new();
    let mut visit = |key: &[u8]| {
        let replica = key.first_chunk().map_or(0, |replica| u64::from_be_bytes(*replica));
        // 0: what the store knows of itself.
        replicas.extend((replica > 0).then_some(ReplicaId(replica)));
        true
    };
    engine.scan_keys(Bound::Unbounded, &[], &mut visit).expect("its keys");
    replicas
}

/// What the raft library says of elections, in the nodes' logs.
const ELECTIONS: &str = "[log]\nlevel = \"info,pontoon::raft=debug\"";

/// Lines of a node's log from `begin` on in which one of these replicas, which should be gone, gets a vote, or has another
/// go on to its term. That it asks and is refused, or ignored, is no harm; nor are elections that others hold.
fn disturbed(log: &str, begin: usize, gone: &BTreeSet<ReplicaId>) -> Vec<String> {
    let harm: Vec<String> = gone
        .iter()
        .flat_map(|gone| {
            [format!(" cast vote for {gone} "), format!("received a message with higher term from {gone} ")]
        })
        .collect();
    let lines = log[begin..].lines().filter(|line| harm.iter().any(|harm| line.contains(harm.as_str())));
    lines.map(str::to_owned).collect()
}

/// What `pontoon admin node list` tells of a node.
fn listed(cluster: &Cluster, node: NodeId) -> Value {
    let listed = cluster.run(&["admin", "node", "list", "--json"]);
    let listed: Value = serde_json::from_slice(&listed.stdout).expect("JSON");
    let mut nodes = listed["nodes"].as_array().expect("nodes").iter();
    nodes.find(|listed| listed["id"] == node.0).expect("it is listed").clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_back_when_it_was_replaced_cleans_up_disturbs_nobody_and_gets_others() {
    let _room = ROOM.acquire().await.expect("it isn't closed");
    let options = Options { extra: ELECTIONS.into(), ..Options::default() };
    let mut cluster = Cluster::with(4, &free_ports(8), options);
    cluster.wait_all_ready();
    let client = cluster.client().await;
    let filled = cluster.database(&client, "filled", 3, 4).await;
    let used = cluster.database(&client, "used", 3, 4).await;
    set(&client, PolicyChange::ReplaceAfterMs(REPLACE_AFTER_MS)).await;
    let filler = Journal::start(&filled, 8, 64 << 10, Duration::ZERO);
    filler.progress(640).await;
    let filling = filler.stop().await;
    let rest = Rest { metadata: 3, ..Rest::default() };
    let before = Rest { even: true, quiet: true, ..rest }.reached(&client, &cluster, SETTLE).await;
    // One that has a voter of the metadata shard, too.
    let away = before.shards[&METADATA_SHARD].members[2].node;
    let address = &before.nodes[&away].client_address;
    let at = cluster.nodes.iter().position(|node| node.client == *address).expect("it is one of them");
    let others: Vec<usize> = (0..4).filter(|node| *node != at).collect();
    let journal = Journal::start(&used, 4, 256, Duration::from_millis(5));
    journal.progress(50).await;
    cluster.kill(at);
    let replicas = |map: &ClusterMap| -> BTreeSet<_> {
        living(map).filter_map(|shard| Some(shard.member_on(away)?.replica)).collect()
    };
    let gone = replicas(&before);
    until_empty(&client, &cluster, &[away]).await;
    // Nothing is to move but by what it does itself.
    set(&client, PolicyChange::Automatic(false)).await;
    rest.reached(&client, &cluster, SETTLE).await;
    let told = listed(&cluster, away);
    assert_eq!((&told["up"], &told["replicas"]), (&false.into(), &0.into()), "{told}");

    let logs: Vec<usize> = others.iter().map(|node| cluster.whole_log(*node).len()).collect();
    cluster.spawn(at);
    cluster.wait_ready(at);
    // It learns that it should hold nothing, and holds nothing.
    let map = rest.reached(&client, &cluster, SETTLE).await;
    assert_eq!(held(&map, away), 0);
    journal.progress(100).await;
    for (node, begin) in others.iter().zip(logs) {
        let log = cluster.whole_log(*node);
        assert!(log[..begin].contains(" cast vote for "), "they tell of elections");
        assert_eq!(disturbed(&log, begin, &gone), [""; 0], "its old replicas were heard by node {node}");
    }
    let own = listed(&cluster, away);
    assert_eq!((&own["state"], &own["up"]), (&"ready".into(), &true.into()), "{own}");
    assert_eq!(
        (&own["replicas"], &own["leaders"], &own["bytes"]),
        (&0.into(), &0.into(), &0.into()),
        "{own}"
    );
    // Their data is gone from its disk, and it starts without them.
    cluster.signal(at, Signal::TERM);
    assert_eq!(cluster.wait_exit(at, PATIENCE).code(), Some(0), "{}", cluster.log(at));
    let store = map.nodes[&away].store_id;
    assert_eq!(with_state(&cluster.nodes[at].data, store), BTreeSet::new());
    cluster.spawn(at);
    cluster.wait_ready(at);

    set(&client, PolicyChange::Automatic(true)).await;
    let after = Rest { even: true, ..rest }.reached(&client, &cluster, SETTLE).await;
    assert!(held(&after, away) > 0);
    // They have other numbers than before: those never come back.
    assert!(gone.is_disjoint(&replicas(&after)));
    journal.progress(50).await;
    journal.stop().await.assert_kept(&used).await;
    filling.assert_kept(&filled).await;
    Rest { even: true, quiet: true, ..rest }.reached(&client, &cluster, SETTLE).await;
    for name in ["filled", "used"] {
        assert_equal_content(&client, name).await;
    }
    client.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_database_is_placed_on_nodes_that_are_up() {
    let _room = ROOM.acquire().await.expect("it isn't closed");
    let mut cluster = Cluster::with(4, &free_ports(8), Options::default());
    let client = cluster.client().await;
    set(&client, PolicyChange::Automatic(false)).await;
    let mut ids = Vec::new();
    for node in 0..4 {
        ids.push(id(&client, &cluster, node).await);
    }
    let holders = async |name: &str| -> Vec<BTreeSet<NodeId>> {
        let map = client.map_naming(name).await.expect("the map");
        let shards = &map.database(name).expect("it").shards;
        let nodes = |shard: &ShardRecord| shard.members.iter().map(|member| member.node).collect();
        shards.iter().map(|shard| nodes(&map.shards[shard])).collect()
    };
    // It hangs: that it doesn't answer is all that is known of it.
    cluster.signal(3, Signal::STOP);
    for (name, replicas) in [("lone", 1), ("three", 3)] {
        let database = cluster.database(&client, name, replicas, 8).await;
        let journal = Journal::start(&database, 4, 256, Duration::from_millis(5));
        journal.progress(40).await;
        journal.stop().await.assert_kept(&database).await;
        for nodes in holders(name).await {
            assert!(nodes.len() == replicas as usize && !nodes.contains(&ids[3]), "{name}: {nodes:?}");
        }
    }
    // Four are needed, and three are a majority of them.
    let database = cluster.database(&client, "four", 4, 8).await;
    let journal = Journal::start(&database, 4, 256, Duration::from_millis(5));
    journal.progress(40).await;
    assert!(holders("four").await.iter().all(|nodes| nodes.len() == 4));
    journal.stop().await.assert_kept(&database).await;
    // Two wouldn't be one.
    cluster.kill(2);
    let refused = cluster.run(&["db", "create", "more", "4", "8"]);
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{text}");
    for node in [2, 3] {
        assert!(text.contains(&format!("{} (", ids[node])), "{text}");
    }
    cluster.signal(3, Signal::CONT);
    cluster.spawn(2);
    cluster.wait_ready(2);
    cluster.database(&client, "more", 4, 8).await;
    client.close().await;
}
