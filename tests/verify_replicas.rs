//! Replicas are compared by digests while clients write, and one that differs is found.

#[path = "support/cluster.rs"]
mod cluster;
#[path = "support/counters.rs"]
mod counters;
#[path = "grow/journal.rs"]
mod journal;
#[path = "grow/rest.rs"]
mod rest;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use cluster::Cluster;
use counters::{Load, assert_exact};
use journal::Journal;
use pontoon::client::admin::answers::Verdict;
use pontoon::client::{Client, ClientError, NotApplied};
use pontoon::ids::{METADATA_SHARD, NodeId, ShardId};
use pontoon::placement::map::Standing;
use rest::{PATIENCE, Rest, id, leader, living, until};
use serde_json::{Value, json};
use tokio::sync::Semaphore;

/// For a cluster to come to rest after nodes came or went.
const SETTLE: Duration = Duration::from_secs(120);

/// Clusters that run at the same time: each has a handful of processes.
static ROOM: Semaphore = Semaphore::const_new(2);

async fn started(nodes: usize) -> (Cluster, Client) {
    let mut cluster = Cluster::new(nodes);
    cluster.wait_all_ready();
    let client = cluster.client().await;
    (cluster, client)
}

/// Where the database `db` keeps a key.
async fn shard_of(client: &Client, key: &str) -> ShardId {
    let map = client.map().await.expect("the map");
    let database = map.database("db").expect("the database");
    map.shard_of_key(database, key.as_bytes()).expect("a shard").id
}

/// What the command tells, and its exit code.
fn verify(cluster: &Cluster, args: &[&str]) -> (Value, i32) {
    let output = cluster.run(&[&["admin", "database", "verify", "--json"], args].concat());
    let told = serde_json::from_slice(&output.stdout);
    let told = told.unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)));
    (told, output.status.code().expect("it ended by itself"))
}

/// All that is told of replicas, with their shards.
fn replicas(told: &Value) -> impl Iterator<Item = (u64, &Value)> {
    let shards = told["shards"].as_array().expect("shards").iter();
    shards.flat_map(|shard| {
        let replicas = shard["replicas"].as_array().expect("replicas").iter();
        replicas.map(move |replica| (shard["shard"].as_u64().expect("a number"), replica))
    })
}

fn assert_all_equal(told: &(Value, i32), replicas: usize) {
    let (told, code) = told;
    assert_eq!((told["result"].as_str(), *code), (Some("equal"), 0), "{told:#}");
    for shard in told["shards"].as_array().expect("shards") {
        assert_eq!(shard["replicas"].as_array().map(Vec::len), Some(replicas), "{told:#}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_are_equal_while_they_are_written_to_and_their_members_change() {
    let _room = ROOM.acquire().await.expect("it isn't closed");
    let (mut cluster, client) = started(3).await;
    let exact = cluster.database(&client, "exact", 3, 4).await;
    let noted = cluster.database(&client, "noted", 3, 2).await;
    let load = Load::start(&[exact.with_timeout(SETTLE)], 4);
    let journal = Journal::start(&noted, 4, 1024, Duration::from_millis(2));
    Rest { metadata: 3, ..Rest::default() }.reached(&client, &cluster, SETTLE).await;
    load.progress(100).await;
    journal.progress(200).await;
    let under_load = ["--wait", "--timeout", "60s"];
    for name in ["exact", "noted", "(metadata)"] {
        assert_all_equal(&verify(&cluster, &[&[name][..], &under_load].concat()), 3);
    }
    // Each of them has been written to meanwhile: it is the same content at other places of the log.
    let places = |told: &(Value, i32)| -> Vec<u64> {
        let shards = told.0["shards"].as_array().expect("shards").iter();
        shards.map(|shard| shard["index"].as_u64().expect("an index")).collect()
    };
    let (before, after) = (
        verify(&cluster, &[&["noted"][..], &under_load].concat()),
        verify(&cluster, &[&["noted"][..], &under_load].concat()),
    );
    assert!(places(&before).iter().zip(places(&after)).all(|(before, after)| *before < after), "{after:?}");

    cluster.join();
    let new = id(&client, &cluster, 3).await;
    until(&client, &cluster, "the new node gets replicas", |map| {
        living(map).any(|shard| shard.members.iter().any(|member| member.node == new))
    })
    .await;
    // Never different, whatever becomes of the members; that all can be asked is not said.
    let (told, code) = verify(&cluster, &["exact"]);
    assert_ne!((told["result"].as_str(), code), (Some("different"), 1), "{told:#}");
    client.set_replicas("exact", 4, PATIENCE).await.expect("decided");
    Rest { metadata: 3, even: true, ..Rest::default() }.reached(&client, &cluster, SETTLE).await;
    assert_all_equal(&verify(&cluster, &[&["exact"][..], &under_load].concat()), 4);
    let gone = id(&client, &cluster, 0).await;
    client.set_replicas("exact", 3, PATIENCE).await.expect("decided");
    client.set_standing(gone, Standing::Draining, PATIENCE).await.expect("draining");
    until(&client, &cluster, "the node is empty", |map| {
        living(map).all(|shard| shard.ordered().all(|member| member.node != gone))
    })
    .await;
    let (tally, record) = (load.stop().await, journal.stop().await);
    assert_eq!(tally.errors, []);
    for (name, replicas) in [("exact", 3), ("noted", 3), ("(metadata)", 3)] {
        let told = verify(&cluster, &[&[name][..], &under_load].concat());
        assert_all_equal(&told, replicas);
        assert!(self::replicas(&told.0).all(|(_, replica)| replica["node"] != gone.0), "{told:?}");
    }
    record.assert_kept(&noted).await;
    assert_exact(&client, "exact", &exact, &tally).await;
    client.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_with_another_value_is_found_and_replaced() {
    let _room = ROOM.acquire().await.expect("it isn't closed");
    let (mut cluster, client) = started(3).await;
    let database = cluster.database(&client, "db", 3, 4).await;
    for key in 0..50 {
        database.put(format!("key-{key}"), "a value").await.expect("a write");
    }
    let equal = verify(&cluster, &["db", "--wait", "--timeout", "60s"]);
    assert_all_equal(&equal, 3);
    let keys: u64 = equal.0["shards"]
        .as_array()
        .expect("shards")
        .iter()
        .map(|shard| shard["replicas"][0]["keys"].as_u64().expect("a number"))
        .sum();
    assert_eq!(keys, 50);

    // By now all is flushed: a value on the disk of one follower becomes another, and no sum there tells.
    let shard = shard_of(&client, "key-7").await;
    let leads = leader(&client, &cluster, shard).await;
    let victim = (leads + 1) % 3;
    let damaged = id(&client, &cluster, victim).await;
    client.inject(&cluster.nodes[victim].client, shard, "alter=key-7").await.expect("altered");
    let (told, code) = verify(&cluster, &["db", "--wait", "--timeout", "60s"]);
    assert_eq!((told["result"].as_str(), code), (Some("different"), 1), "{told:#}");
    let differ = told["shards"].as_array().expect("shards").iter().filter(|one| one["result"] == "different");
    assert_eq!(differ.map(|one| one["shard"].clone()).collect::<Vec<_>>(), [json!(shard.0)], "{told:#}");
    let of = |node: &dyn Fn(u64) -> bool| -> BTreeSet<String> {
        let ours = replicas(&told)
            .filter(|(of, replica)| *of == shard.0 && node(replica["node"].as_u64().expect("a number")));
        ours.map(|(_, replica)| replica["data"].to_string()).collect()
    };
    let (alike, other) = (of(&|node| node != damaged.0), of(&|node| node == damaged.0));
    assert!(alike.len() == 1 && other.len() == 1 && alike != other, "{told:#}");
    // Sessions are not touched by that.
    let sessions: BTreeSet<_> = replicas(&told)
        .filter(|(of, _)| *of == shard.0)
        .map(|(_, replica)| replica["sessions"].to_string())
        .collect();
    assert_eq!(sessions.len(), 1, "{told:#}");
    let plain = cluster.run(&["admin", "database", "verify", "db", "--shard", &shard.to_string()]);
    let plain = String::from_utf8_lossy(&plain.stdout).into_owned();
    assert!(plain.contains(&format!("shard {shard}: replicas differ at entry ")), "{plain}");
    assert!(plain.contains(&format!("node {damaged}: ")), "{plain}");

    // The page says: give its place to another.
    cluster.join();
    client.set_standing(damaged, Standing::Draining, PATIENCE).await.expect("draining");
    until(&client, &cluster, "the node is empty", |map| {
        living(map).all(|shard| shard.ordered().all(|member| member.node != damaged))
    })
    .await;
    assert_all_equal(&verify(&cluster, &["db", "--wait", "--timeout", "60s"]), 3);
    let value = database.get("key-7").await.expect("a read").expect("there").value;
    assert_eq!(value, "a value");
    client.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_database_is_verified_at_once_and_by_two_at_a_time() {
    let (cluster, client) = started(3).await;
    for number in 0..5 {
        let name = format!("new-{number}");
        client.create_database(&name, 3, 2, PATIENCE).await.expect("a database");
        let map = client.map().await.expect("the map");
        for shard in &map.database(&name).expect("the database").shards {
            let begun = Instant::now();
            loop {
                let check = client.verify_shard(*shard, PATIENCE).await.expect("a check");
                match check.verdict() {
                    Verdict::Equal | Verdict::GoneOn => break,
                    // A node that is busy.
                    Verdict::Unknown if begun.elapsed() < SETTLE => {}
                    verdict => panic!("{verdict:?}: {check:?}"),
                }
            }
        }
        let args = [&name[..], "--wait", "--timeout", "60s"];
        let both = std::thread::scope(|scope| {
            [(); 2].map(|()| scope.spawn(|| verify(&cluster, &args))).map(|one| one.join().expect("it ran"))
        });
        both.iter().for_each(|told| assert_all_equal(told, 3));
    }
    client.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_asked_is_undecided_and_not_different() {
    let _room = ROOM.acquire().await.expect("it isn't closed");
    let (mut cluster, client) = started(3).await;
    let database = cluster.database(&client, "db", 3, 1).await;
    database.put("k", "v").await.expect("a write");
    let shard = shard_of(&client, "k").await;
    let leads = leader(&client, &cluster, shard).await;
    let dead = (leads + 1) % 3;
    let node: NodeId = id(&client, &cluster, dead).await;
    cluster.kill(dead);
    // On a busy machine one that is asked may have gone on; what can be asked tells in the end.
    let begun = Instant::now();
    loop {
        let (told, code) = verify(&cluster, &["db"]);
        assert_eq!((told["result"].as_str(), code), (Some("undecided"), 3), "{told:#}");
        let is_known = |replica: &Value| replica["data"].is_string() && replica["why"].is_null();
        assert!(replicas(&told).all(|(_, one)| one["node"] != node.0 || !is_known(one)), "{told:#}");
        let known = replicas(&told).filter(|(_, one)| is_known(one)).count();
        if known == 2 {
            let gone = replicas(&told).find(|(_, one)| one["node"] == node.0);
            assert!(gone.is_some_and(|(_, one)| one["why"].is_string()), "{told:#}");
            break;
        }
        assert!(begun.elapsed() < SETTLE, "{told:#}");
    }
    // Once it is back, its log replayed, it is equal.
    cluster.spawn(dead);
    assert_all_equal(&verify(&cluster, &["db", "--wait", "--timeout", "60s"]), 3);

    // That there is no such shard is no reason to wait for it.
    let dropping = cluster.database(&client, "gone", 3, 1).await;
    let dropped = client.map().await.expect("the map").database("gone").expect("the database").shards[0];
    drop(dropping);
    client.drop_database("gone", PATIENCE).await.expect("dropped");
    let begun = Instant::now();
    let none = client.verify_shard(dropped, Duration::from_secs(600)).await;
    assert!(matches!(none, Err(ClientError::NotApplied(NotApplied::Refused(_)))), "{none:?}");
    assert!(begun.elapsed() < SETTLE);

    let unknown = cluster.run(&["admin", "database", "verify", "nothing"]);
    assert_eq!(unknown.status.code(), Some(1));
    let check = client.verify_shard(METADATA_SHARD, PATIENCE).await.expect("a check");
    assert_eq!(check.replicas.len(), 3, "{check:?}");
    let none = client.verify_shard(ShardId(4711), PATIENCE).await;
    assert!(
        none.as_ref().is_err_and(|error| error.to_string().contains("there is no shard 4711")),
        "{none:?}"
    );
    client.close().await;
}
