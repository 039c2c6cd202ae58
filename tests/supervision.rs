//! What fails, fails alone: a replica that panics is rebuilt beside untouched neighbours, one that
//! keeps panicking is quarantined, and only the failure of what all share ends the node.

#[path = "support/cluster.rs"]
mod cluster;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cluster::{Cluster, Options, free_ports};
use pontoon::client::{Client, ClientError, Database};
use pontoon::ids::{METADATA_SHARD, ShardId};
use pontoon::limits;
use pontoon::node::handle::{ReplicaHealth, ReplicaReport};

const PATIENCE: Duration = Duration::from_secs(30);

/// A key in each shard of a database.
async fn key_per_shard(client: &Client, database: &str) -> BTreeMap<ShardId, String> {
    let map = client.map().await.expect("the map");
    let record = map.database(database).expect("the database");
    let mut keys = BTreeMap::new();
    for number in 0.. {
        let key = format!("key-{number}");
        let shard = map.shard_of_key(record, key.as_bytes()).expect("a shard").id;
        keys.entry(shard).or_insert(key);
        if keys.len() == record.shards.len() {
            break;
        }
    }
    keys
}

/// What the node at `address` tells of its replica of `shard`.
async fn replica(client: &Client, address: &str, shard: ShardId) -> ReplicaReport {
    let report = client.node_report(address, PATIENCE).await.expect("a report");
    report.replicas.into_iter().find(|r| r.shard == shard).expect("a replica of the shard")
}

/// Waits until the replica is as wanted.
async fn until(
    client: &Client,
    address: &str,
    shard: ShardId,
    what: &str,
    wanted: impl Fn(&ReplicaReport) -> bool,
) -> ReplicaReport {
    let begun = Instant::now();
    loop {
        let report = replica(client, address, shard).await;
        if wanted(&report) {
            return report;
        }
        assert!(begun.elapsed() < PATIENCE, "not {what} in time: {report:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn serving(report: &ReplicaReport) -> bool {
    report.health == ReplicaHealth::Serving && report.group.is_some()
}

/// The index of the node that leads `shard`.
async fn leader(cluster: &Cluster, client: &Client, shard: ShardId) -> usize {
    let begun = Instant::now();
    loop {
        for (i, node) in cluster.nodes.iter().enumerate() {
            let Ok(report) = client.node_report(&node.client, Duration::from_secs(2)).await else { continue };
            let here = report.replicas.into_iter().find(|r| r.shard == shard);
            if here.and_then(|r| r.group).is_some_and(|g| g.role == raft::StateRole::Leader) {
                return i;
            }
        }
        assert!(begun.elapsed() < PATIENCE, "nobody leads shard {shard}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Writers, one per key, until stopped: the last number written, and the longest write.
struct Writers {
    stop: Arc<AtomicBool>,
    writers: Vec<tokio::task::JoinHandle<(String, u64, Duration)>>,
}

impl Writers {
    fn start(database: &Database, keys: impl IntoIterator<Item = String>) -> Writers {
        let stop = Arc::new(AtomicBool::new(false));
        let writers = keys.into_iter().map(|key| {
            let (database, stop) = (database.clone(), stop.clone());
            tokio::spawn(async move {
                let (mut number, mut longest) = (0, Duration::ZERO);
                while !stop.load(Ordering::Relaxed) {
                    let begun = Instant::now();
                    number += 1;
                    let put = database.put(key.clone(), number.to_string()).await;
                    put.unwrap_or_else(|error| panic!("writing {key}: {error}"));
                    longest = longest.max(begun.elapsed());
                }
                (key, number, longest)
            })
        });
        Writers { writers: writers.collect(), stop }
    }

    async fn stop(self) -> BTreeMap<String, (u64, Duration)> {
        self.stop.store(true, Ordering::Relaxed);
        let mut ends = BTreeMap::new();
        for writer in self.writers {
            let (key, number, longest) = writer.await.expect("no write failed");
            ends.insert(key, (number, longest));
        }
        ends
    }
}

async fn holds(database: &Database, key: &str, value: &str) {
    let found = database.get(key.to_owned()).await.expect("a read").expect("there");
    assert_eq!(found.value, value, "{key}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_fails_is_rebuilt_and_its_neighbours_dont_notice() {
    let mut cluster = Cluster::new(3);
    cluster.wait_all_ready();
    let client = cluster.client().await;
    let database = cluster.database(&client, "fails", 3, 4).await;
    let keys = key_per_shard(&client, "fails").await;
    for (restarts, (fault, victim)) in (1..).zip([("panic", 0), ("error", 0)]) {
        let shard = *keys.keys().nth(victim).expect("four shards");
        let address = cluster.nodes[leader(&cluster, &client, shard).await].client.clone();
        let before = replica(&client, &address, shard).await;
        let mut terms = BTreeMap::new();
        for &neighbour in keys.keys().filter(|other| **other != shard) {
            terms.insert(neighbour, replica(&client, &address, neighbour).await.group.expect("running").term);
        }
        let writers = Writers::start(&database, keys.values().cloned());
        tokio::time::sleep(Duration::from_millis(300)).await;
        client.inject(&address, shard, fault).await.expect("injected");
        let after =
            until(&client, &address, shard, "rebuilt", |r| serving(r) && r.restarts > before.restarts).await;
        assert!(after.group.expect("running").incarnation > before.group.expect("running").incarnation);
        tokio::time::sleep(Duration::from_millis(3000)).await;
        let ends = writers.stop().await;
        for (key, (number, longest)) in &ends {
            holds(&database, key, &number.to_string()).await;
            if *key != keys[&shard] {
                // What else the machine does may hold it up for a moment.
                assert!(*longest < Duration::from_secs(6), "{fault}: {key} waited for {longest:?}");
            }
        }
        for (&neighbour, _) in keys.iter().filter(|(other, _)| **other != shard) {
            let report = replica(&client, &address, neighbour).await;
            assert_eq!(report.restarts, 0, "a neighbour of the {restarts}. failure: {report:?}");
            let term = report.group.as_ref().expect("running").term;
            assert_eq!(term, terms[&neighbour], "it had an election: {report:?}");
        }
    }
    client.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lone_replica_comes_back_with_its_data_and_gives_its_memory_back() {
    let port = free_ports(1)[0];
    let extra = format!("[http]\nlisten = \"127.0.0.1:{port}\"\n");
    let mut cluster = Cluster::with(1, &free_ports(2), Options { extra, ..Options::default() });
    cluster.wait_all_ready();
    let client = cluster.client().await;
    let database = cluster.database(&client, "lone", 1, 1).await;
    let shard = *key_per_shard(&client, "lone").await.keys().next().expect("a shard");
    let address = cluster.nodes[0].client.clone();
    let value = "v".repeat(1 << 20);
    for number in 0..3 {
        database.put(format!("key-{number}"), value.clone()).await.expect("a write");
    }
    for round in 1..limits::CRASHES_MAX as u32 {
        client.inject(&address, shard, "panic").await.expect("injected");
        until(&client, &address, shard, "rebuilt", |r| serving(r) && r.restarts == round).await;
        database.put("after", round.to_string()).await.expect("a write after the panic");
        for number in 0..3 {
            holds(&database, &format!("key-{number}"), &value).await;
        }
    }
    // What dead incarnations held in memory is not counted for ever: else a few panics would throttle
    // the node until its next start.
    let begun = Instant::now();
    loop {
        let text = cluster::http_get(port, "/metrics").expect("metrics").1;
        let bytes = cluster::metric(&text, "pontoon_memtable_bytes").expect("the gauge");
        if (3.0 * 1048576.0..4.5 * 1048576.0).contains(&bytes) {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(5), "{bytes} bytes in memtables");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    client.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_cant_be_opened_for_a_while_serves_in_the_end() {
    let port = free_ports(1)[0];
    let extra = format!("[http]\nlisten = \"127.0.0.1:{port}\"\n");
    let mut cluster = Cluster::with(1, &free_ports(2), Options { extra, ..Options::default() });
    cluster.wait_all_ready();
    let client = cluster.client().await;
    let database = cluster.database(&client, "shut", 1, 2).await;
    let keys = key_per_shard(&client, "shut").await;
    let (&shard, key) = keys.iter().next().expect("two shards");
    database.put(key.clone(), "before").await.expect("a write");
    let address = cluster.nodes[0].client.clone();
    assert_eq!(cluster::http_get(port, "/readyz").expect("an answer"), (200, "ok\n".into()));

    client.inject(&address, shard, "open-error").await.expect("injected");
    let failed =
        |r: &ReplicaReport| matches!(&r.health, ReplicaHealth::Failed(why) if why.contains("injected"));
    until(&client, &address, shard, "failed", failed).await;
    let (status, why) = cluster::http_get(port, "/readyz").expect("an answer");
    assert_eq!(status, 503, "{why}");
    assert!(why.contains("1 of 3 replicas") && why.contains(&format!("shard {shard} is failed")), "{why}");
    // The others serve meanwhile.
    let neighbour = keys.values().nth(1).expect("two shards");
    database.put(neighbour.clone(), "meanwhile").await.expect("a write");

    let report = until(&client, &address, shard, "open", serving).await;
    assert_eq!(report.restarts, 1, "an attempt that failed is no restart");
    holds(&database, key, "before").await;
    assert_eq!(cluster::http_get(port, "/readyz").expect("an answer"), (200, "ok\n".into()));
    client.close().await;
    let told = cluster.log(0).matches("replica can't be opened").count();
    assert_eq!(told, 1, "once per reason, not once per attempt");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_keeps_failing_is_quarantined_until_its_node_restarts() {
    let mut cluster = Cluster::new(3);
    cluster.wait_all_ready();
    let client = cluster.client().await;
    let database = cluster.database(&client, "bad", 3, 2).await;
    let keys = key_per_shard(&client, "bad").await;
    let (&shard, key) = keys.iter().next().expect("two shards");
    database.put(key.clone(), "before").await.expect("a write");
    let victim = leader(&cluster, &client, shard).await;
    let address = cluster.nodes[victim].client.clone();
    let quarantined = |r: &ReplicaReport| matches!(r.health, ReplicaHealth::Quarantined(_));
    for _ in 0..limits::CRASHES_MAX {
        let report =
            until(&client, &address, shard, "up or quarantined", |r| serving(r) || quarantined(r)).await;
        assert!(serving(&report), "quarantined too early: {report:?}");
        client.inject(&address, shard, "panic").await.expect("injected");
        until(&client, &address, shard, "down", |r| !serving(r) || r.restarts > report.restarts).await;
    }
    let report = until(&client, &address, shard, "quarantined", quarantined).await;
    let ReplicaHealth::Quarantined(reason) = &report.health else { unreachable!() };
    assert!(reason.contains("injected panic"), "{reason}");

    // People see it, and it is no reason to refuse a write: two of three replicas are left.
    let status = cluster.run(&["status", "bad", "--json"]);
    let text = String::from_utf8_lossy(&status.stdout).to_lowercase();
    assert!(text.contains("quarantined"), "{text}");
    for key in keys.values() {
        database.put(key.clone(), "meanwhile").await.expect("the others serve");
        holds(&database, key, "meanwhile").await;
    }
    let neighbour = *keys.keys().nth(1).expect("two shards");
    assert!(serving(&replica(&client, &address, neighbour).await), "the rest of the node serves");

    cluster.signal(victim, rustix::process::Signal::TERM);
    assert_eq!(cluster.wait_exit(victim, Duration::from_secs(5)).code(), Some(0));
    cluster.spawn(victim);
    cluster.wait_ready(victim);
    let report = until(&client, &address, shard, "back", serving).await;
    assert_eq!(report.restarts, 0);
    let begun = Instant::now();
    loop {
        let group = replica(&client, &address, shard).await.group.expect("running");
        if group.leader.is_some() && group.applied == group.committed {
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "it doesn't catch up: {group:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    holds(&database, key, "meanwhile").await;
    client.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_metadata_replica_that_panics_is_rebuilt_too() {
    let mut cluster = Cluster::new(3);
    cluster.wait_all_ready();
    let client = cluster.client().await;
    cluster.database(&client, "first", 3, 1).await;
    let address = cluster.nodes[leader(&cluster, &client, METADATA_SHARD).await].client.clone();
    client.inject(&address, METADATA_SHARD, "panic").await.expect("injected");
    let database = cluster.database(&client, "second", 3, 1).await;
    database.put("k", "v").await.expect("a write");
    let report = until(&client, &address, METADATA_SHARD, "rebuilt", |r| serving(r) && r.restarts == 1).await;
    assert_eq!(report.restarts, 1);
    client.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_writer_that_panics_ends_the_node_with_70() {
    let mut cluster = Cluster::new(3);
    cluster.wait_all_ready();
    let client = cluster.client().await;
    let database = cluster.database(&client, "log", 3, 1).await;
    database.put("k", "before").await.expect("a write");
    let address = cluster.nodes[0].client.clone();
    match client.inject(&address, METADATA_SHARD, "log-writer-panic").await {
        // The node may be gone before it has answered.
        Ok(()) | Err(ClientError::Unknown(_)) => {}
        Err(other) => panic!("{other}"),
    }
    let status = cluster.wait_exit(0, Duration::from_secs(5));
    let log = cluster.log(0);
    assert_eq!(status.code(), Some(70), "{log}");
    let last = log.lines().last().unwrap_or_default();
    assert!(last.contains("log") && last.contains("injected panic of the log writer"), "{log}");
    database.put("k", "without it").await.expect("the others serve");
    cluster.spawn(0);
    cluster.wait_ready(0);
    holds(&database, "k", "without it").await;
    client.close().await;
}
