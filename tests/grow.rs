//! A cluster that grows and shrinks while it is used: real processes, and nobody who watches.

#[path = "support/cluster.rs"]
mod cluster;
#[path = "support/counters.rs"]
mod counters;
#[path = "grow/journal.rs"]
mod journal;
#[path = "grow/rest.rs"]
mod rest;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use cluster::Cluster;
use counters::{Load, assert_exact};
use journal::Journal;
use pontoon::client::options::ClientOptions;
use pontoon::client::{Client, Database};
use pontoon::ids::{METADATA_SHARD, NodeId, ReplicaId, ShardId};
use pontoon::machine::command::PolicyChange;
use pontoon::placement::map::{ClusterMap, Standing};
use pontoon::placement::rebalance::MoveKind;
use rest::{
    PATIENCE, Rest, assert_equal_content, empty_and_remove, id, leads, living, patiently, rebalance, set,
    take_back, until,
};
use rustix::process::Signal;
use tokio::sync::{Semaphore, SemaphorePermit};

/// For a cluster to come to rest after nodes came or went.
const SETTLE: Duration = Duration::from_secs(120);

/// Clusters that run at the same time: each has a handful of processes.
static ROOM: Semaphore = Semaphore::const_new(2);

async fn started(nodes: usize) -> (SemaphorePermit<'static>, Cluster, Client) {
    let room = ROOM.acquire().await.expect("it isn't closed");
    let mut cluster = Cluster::new(nodes);
    cluster.wait_all_ready();
    let client = cluster.client().await;
    (room, cluster, client)
}

/// All replicas of databases.
fn replicas(map: &ClusterMap) -> BTreeSet<(ReplicaId, NodeId)> {
    let shards = living(map).filter(|shard| shard.id != METADATA_SHARD);
    shards.flat_map(|shard| shard.members.iter().map(|m| (m.replica, m.node))).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_nodes_become_five_and_three_again_under_load() {
    let (_room, mut cluster, client) = started(3).await;
    let exact = cluster.database(&client, "exact", 3, 4).await;
    let noted = cluster.database(&client, "noted", 3, 4).await;
    let other = cluster.client().await;
    let patient = [exact.clone(), other.database("exact")].map(|exact| exact.with_timeout(SETTLE));
    let load = Load::start(&patient, 4);
    let journal = Journal::start(&noted, 4, 1024, Duration::from_millis(5));
    load.progress(100).await;
    let before = Rest { metadata: 3, ..Rest::default() }.reached(&client, &cluster, SETTLE).await;

    let joined = [cluster.join(), cluster.join()];
    let mut new = BTreeSet::new();
    for node in joined {
        new.insert(id(&client, &cluster, node).await);
    }
    let grown = Rest { metadata: 5, even: true, ..Rest::default() }.reached(&client, &cluster, SETTLE).await;
    // Only the new nodes got replicas, and no more than their share.
    let came: Vec<_> = replicas(&grown).difference(&replicas(&before)).copied().collect();
    assert!(came.iter().all(|(_, node)| new.contains(node)), "{came:?} came, {new:?} are new");
    let share = replicas(&grown).len() as f64 / 5.0;
    assert!(came.len() as f64 <= 1.15 * 2.0 * share.ceil(), "{} of {share} each came", came.len());
    println!("{} of {} replicas moved", came.len(), replicas(&grown).len());
    load.progress(100).await;

    // Those that go are the first: the one that formed the cluster among them.
    for node in [0, 1] {
        let old = id(&client, &cluster, node).await;
        empty_and_remove(&client, &cluster, old).await;
        load.progress(50).await;
        if cluster.ended(node).is_none() {
            cluster.signal(node, Signal::TERM);
            cluster.wait_exit(node, PATIENCE);
        }
    }
    Rest { metadata: 3, even: true, ..Rest::default() }.reached(&client, &cluster, SETTLE).await;
    load.progress(50).await;
    let (tally, record) = (load.stop().await, journal.stop().await);
    assert_eq!(tally.errors, []);
    record.assert_kept(&noted).await;
    assert_exact(&client, "exact", &exact, &tally).await;
    Rest { metadata: 3, even: true, quiet: true }.reached(&client, &cluster, SETTLE).await;
    for name in ["exact", "noted"] {
        assert_equal_content(&client, name).await;
    }
    other.close().await;
    client.close().await;
}

/// On which nodes each shard of databases is.
fn places(map: impl AsRef<ClusterMap>) -> BTreeMap<ShardId, BTreeSet<NodeId>> {
    let shards = living(map.as_ref()).filter(|shard| shard.id != METADATA_SHARD);
    shards.map(|shard| (shard.id, shard.members.iter().map(|m| m.node).collect())).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plan_moves_what_it_says_and_can_be_taken_back() {
    let (_room, mut cluster, client) = started(3).await;
    let database = cluster.database(&client, "db", 2, 6).await;
    let journal = Journal::start(&database, 4, 1024, Duration::from_millis(5));
    set(&client, PolicyChange::Automatic(false)).await;
    cluster.join();
    let grown = Rest { metadata: 3, ..Rest::default() };
    let before = places(grown.reached(&client, &cluster, SETTLE).await);
    client.plan_rebalance(false, PATIENCE).await.expect("a plan");
    assert_eq!(places(client.map().await.expect("the map")), before, "nothing moves by itself");

    let plan = rebalance(&client).await;
    let moves: Vec<_> = plan.moves.iter().filter(|one| one.kind == MoveKind::Replica).collect();
    assert!(plan.total.moves > 0 && moves.len() == plan.total.moves as usize, "{plan:?}");
    assert!(f64::from(plan.total.moves) <= 1.15 * f64::from(plan.minimum), "{plan:?}");
    let mut planned = before.clone();
    for one in &moves {
        let nodes = planned.get_mut(&one.shard).expect("a shard of the database");
        assert!(nodes.remove(&one.from) && nodes.insert(one.to), "{one:?} of {plan:?}");
    }
    // Begun again, it is the same.
    client.start_rebalance(plan.id, PATIENCE).await.expect("begun already");
    let even = Rest { even: true, ..grown };
    assert_eq!(places(even.reached(&client, &cluster, SETTLE).await), planned);
    let status = client.rebalance_status(PATIENCE).await.expect("its status");
    assert_eq!((status.plan, status.done, status.total), (plan.id, plan.total.moves, plan.total.moves));
    // There is nothing left to do.
    patiently("a plan made with all nodes", async || {
        let next = client.plan_rebalance(false, PATIENCE).await.map_err(|error| error.to_string())?;
        if !next.silent.is_empty() {
            return Err(format!("{next:?}"));
        }
        assert_eq!((next.total.moves, next.minimum), (0, 0), "{next:?}");
        Ok(())
    })
    .await;
    take_back(&client, plan.id).await;
    assert_eq!(places(grown.reached(&client, &cluster, SETTLE).await), before);
    let record = journal.stop().await;
    record.assert_kept(&database).await;
    client.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_that_began_with_one_node_has_three_and_five_copies_of_its_map() {
    let (_room, mut cluster, client) = started(1).await;
    let database = cluster.database(&client, "db", 1, 2).await;
    let journal = Journal::start(&database, 2, 256, Duration::from_millis(10));
    Rest { metadata: 1, ..Rest::default() }.reached(&client, &cluster, SETTLE).await;
    for (nodes, metadata) in [(3, 3), (5, 5)] {
        while cluster.nodes.len() < nodes {
            cluster.join();
        }
        Rest { metadata, even: true, ..Rest::default() }.reached(&client, &cluster, SETTLE).await;
        // One voter more is no help if the data has but one copy.
        let copies = nodes as u32;
        client.set_replicas("db", copies, PATIENCE).await.expect("decided");
        Rest { metadata, ..Rest::default() }.reached(&client, &cluster, SETTLE).await;
    }
    // The one that began it all dies, and another: there is a majority of everything.
    cluster.kill(0);
    cluster.kill(1);
    journal.progress(50).await;
    client.set_replicas("db", 3, PATIENCE).await.expect("the metadata shard decides");
    let record = journal.stop().await;
    record.assert_kept(&database).await;
    client.close().await;
}

/// The longest write beside a drain and a stop.
const HANDED_OVER: Duration = Duration::from_millis(3 * 200);

/// Leadership is handed over; nobody waits for an election. What else the machine does may hold up a write, so it is
/// tried again: what a drain does to writes it does each time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drained_node_stops_and_no_write_fails() {
    let mut longest = Vec::new();
    for _ in 0..3 {
        longest.push(longest_beside_a_drain().await);
        println!("the longest write beside a drain and a stop took {longest:?}");
        if longest.last() < Some(&HANDED_OVER) {
            return;
        }
    }
    panic!("writes took {longest:?}");
}

async fn longest_beside_a_drain() -> Duration {
    let (_room, mut cluster, client) = started(4).await;
    let database = cluster.database(&client, "db", 3, 4).await;
    let journal = Journal::start(&database, 8, 256, Duration::from_millis(2));
    Rest { metadata: 3, even: true, ..Rest::default() }.reached(&client, &cluster, SETTLE).await;
    journal.progress(200).await;
    // Evenly may be two of one and none of another.
    let mut leading = Vec::new();
    for at in 0..4 {
        let report = client.node_report(&cluster.nodes[at].client, PATIENCE).await.expect("a report");
        leading.extend(report.replicas.iter().any(|r| leads(&report, r.shard)).then_some(at));
    }
    let at = *leading.first().expect("one that leads");
    let node = id(&client, &cluster, at).await;
    client.set_standing(node, Standing::Draining, PATIENCE).await.expect("draining");
    until(&client, &cluster, "the node is empty", |map| {
        living(map).all(|shard| shard.ordered().all(|member| member.node != node))
    })
    .await;
    cluster.signal(at, Signal::TERM);
    assert_eq!(cluster.wait_exit(at, PATIENCE).code(), Some(0), "{}", cluster.log(at));
    journal.progress(200).await;
    let record = journal.stop().await;
    record.assert_kept(&database).await;
    Rest { metadata: 3, even: true, quiet: true }.reached(&client, &cluster, SETTLE).await;
    client.close().await;
    record.longest
}

async fn reads(database: &Database, value: &str) {
    assert_eq!(database.get("k").await.expect("a read").expect("there").value, value);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_follows_a_cluster_whose_every_original_address_was_replaced() {
    let (_room, mut cluster, idle) = started(3).await;
    let database = cluster.database(&idle, "db", 3, 2).await;
    database.put("k", "old").await.expect("a write");
    // The other one does all that is done from now on.
    let originals = cluster.addresses();
    let client = Client::connect_with(ClientOptions::new(originals.clone())).await.expect("connecting");
    for _ in 0..3 {
        cluster.join();
    }
    for node in 0..3 {
        let old = id(&client, &cluster, node).await;
        empty_and_remove(&client, &cluster, old).await;
    }
    for node in 0..3 {
        if cluster.ended(node).is_none() {
            cluster.kill(node);
        }
    }
    Rest { metadata: 3, even: true, quiet: true }.reached(&client, &cluster, SETTLE).await;
    // Nobody is where it began.
    let newcomer = Client::connect_with(ClientOptions {
        timeout: Duration::from_millis(500),
        ..ClientOptions::new(originals.clone())
    });
    assert!(newcomer.await.is_err(), "somebody answers at {originals:?}");
    let asked = Instant::now();
    reads(&database, "old").await;
    assert!(asked.elapsed() < Duration::from_secs(6), "{:?}", asked.elapsed());
    client.database("db").put("k", "new").await.expect("a write");
    reads(&database, "new").await;
    set(&idle, PolicyChange::Automatic(true)).await;
    client.close().await;
    idle.close().await;
}
