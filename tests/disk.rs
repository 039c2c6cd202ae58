//! Disks that are full, hang, or fall behind: a node keeps what room it has for what must go on, gives leadership to
//! those that are better off, and comes back by itself.

#[path = "support/cluster.rs"]
mod cluster;
#[path = "support/local.rs"]
mod local;

use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use cluster::{Cluster, Options, free_ports};
use futures_util::future::join_all;
use local::{LocalCluster, PATIENCE, eventually};
use pontoon::client::{ClientError, Database, NotApplied, Operation};
use pontoon::group::types::GroupStatus;
use pontoon::ids::{METADATA_SHARD, ShardId};
use pontoon::machine::command::PolicyChange;
use pontoon::node::handle::NodePhase;
use pontoon::settings::Settings;

/// Has a node see so much free space, and waits until it does.
async fn free_bytes(cluster: &LocalCluster, node: usize, shard: ShardId, fault: &str, full: bool) {
    let handle = cluster.handle(node);
    handle.inject(shard, fault).await.expect("injected");
    eventually("the node has looked at its disk", || handle.disk().is_full() == full).await;
    let phase = if full { NodePhase::ReadOnly } else { NodePhase::Ready };
    assert_eq!(handle.report().await.phase, phase);
}

async fn until_leads(cluster: &LocalCluster, shard: ShardId, what: &str, wanted: impl Fn(usize) -> bool) {
    let begun = Instant::now();
    while !wanted(cluster.leader(shard).await) {
        assert!(begun.elapsed() < PATIENCE, "{what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Writes a value that is refused, within a second: what is told. Where the deadline meets a request on its way, as it may
/// on a busy machine, the client can't be certain, and it is tried again.
async fn refused(database: &Database) -> String {
    let begun = Instant::now();
    loop {
        match database.with_timeout(Duration::from_secs(1)).put("a", "refused").await {
            Err(ClientError::NotApplied(NotApplied::Unavailable { last, .. })) => return last.to_string(),
            Err(ClientError::Unknown(_)) if begun.elapsed() < PATIENCE => {}
            other => panic!("{other:?}"),
        }
    }
}

#[actix::test]
async fn a_full_node_gives_leadership_away_and_a_full_cluster_still_reads_and_deletes() {
    let mut cluster = LocalCluster::start(3).await;
    let client = cluster.client().await;
    let (database, shards) = cluster.database(&client, "full", 3, 1).await;
    let shard = shards[0];
    for key in ["a", "b"] {
        database.put(key, "old").await.expect("a write");
    }
    let first = cluster.leader(shard).await;
    free_bytes(&cluster, first, shard, "free-bytes=1000", true).await;
    database.put("a", "moved").await.expect("the others have room");
    until_leads(&cluster, shard, "a node with room leads", |leader| leader != first).await;

    // The one that still has room leads, but what it commits the two others must keep too.
    let second = cluster.leader(shard).await;
    let third = 3 - first - second;
    free_bytes(&cluster, third, shard, "free-bytes=1000", true).await;
    tokio::time::sleep(Duration::from_millis(1_200)).await;
    until_leads(&cluster, shard, "the one with room leads", |leader| leader == second).await;
    let told = refused(&database).await;
    assert!(told.contains("2 of the 3 nodes"), "no majority has room: {told}");

    free_bytes(&cluster, second, shard, "free-bytes=1000", true).await;
    let told = refused(&database).await;
    assert!(told.contains("too little disk space"), "{told}");
    let read = database.get("a").await.expect("reads go on").expect("there");
    assert_eq!(read.value, "moved", "what was refused was not applied");
    assert!(database.delete("b").await.expect("deletes go on").is_some());
    assert!(database.get("b").await.expect("a read").is_none());

    // A write under way waits for space, within its deadline.
    let waiting = database.clone();
    let waiting = tokio::spawn(async move { waiting.put("a", "after").await });
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!waiting.is_finished());
    for node in 0..3 {
        free_bytes(&cluster, node, shard, "free-bytes", false).await;
    }
    waiting.await.expect("the task").expect("applied when there is space again");
    assert_eq!(database.get("a").await.expect("a read").expect("there").value, "after");
    client.close().await;
    cluster.stop_all().await;
}

fn write_on(database: &Database, stop: &Arc<AtomicBool>) -> tokio::task::JoinHandle<Duration> {
    write_key(database, "k".into(), stop)
}

/// Writes one after the other, until stopped; the longest time between two that succeeded.
fn write_key(database: &Database, key: String, stop: &Arc<AtomicBool>) -> tokio::task::JoinHandle<Duration> {
    let (database, stop) = (database.clone(), stop.clone());
    tokio::spawn(async move {
        let (mut longest, mut last) = (Duration::ZERO, Instant::now());
        while !stop.load(Ordering::Relaxed) {
            database.put(key.clone(), "v").await.expect("no write fails within its deadline");
            longest = longest.max(last.elapsed());
            last = Instant::now();
        }
        longest
    })
}

/// The longest gap between writes while the leader's log disk hangs for `ms`; whether leadership moved.
async fn gap_of_a_stall(ms: u64, hand_over: bool) -> (Duration, bool) {
    let mut cluster = LocalCluster::start(3).await;
    let client = cluster.client().await;
    let (database, shards) = cluster.database(&client, "stall", 3, 1).await;
    let shard = shards[0];
    database.put("k", "v").await.expect("a write");
    let leader = cluster.leader(shard).await;
    let handle = cluster.handle(leader);
    if !hand_over {
        handle.inject(shard, "keep-leading").await.expect("injected");
    }
    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..4).map(|_| write_on(&database, &stop)).collect();
    tokio::time::sleep(Duration::from_millis(300)).await;
    handle.inject(shard, &format!("log-stall={ms}")).await.expect("injected");
    // Once it has moved, it may move back when the disk is well again.
    let (begun, mut moved) = (Instant::now(), false);
    while begun.elapsed() < Duration::from_millis(ms + 500) {
        moved |= cluster.leader(shard).await != leader;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    stop.store(true, Ordering::Relaxed);
    let mut longest = Duration::ZERO;
    for writer in writers {
        longest = longest.max(writer.await.expect("no write failed"));
    }
    client.close().await;
    cluster.stop_all().await;
    (longest, moved)
}

#[actix::test]
async fn a_leader_whose_disk_hangs_hands_over() {
    let (gap, moved) = gap_of_a_stall(4_000, true).await;
    assert!(moved, "leadership stayed");
    assert!(gap < Duration::from_millis(3_500), "no write for {gap:?}");
}

/// Of all memtables of a node in the tests below: the least there can be.
const MEMTABLE_BYTES: usize = 16 << 20;

/// Three nodes with little memory.
async fn with_little_memory() -> LocalCluster {
    let alter = |settings: &mut Settings| settings.storage.memtable_bytes = MEMTABLE_BYTES as u64;
    let cluster = LocalCluster::start_set(3, |peers| peers.to_vec(), alter).await;
    cluster.wait_ready().await;
    cluster
}

/// Writes so many bytes in values of 64 KiB.
async fn fill(database: &Database, bytes: usize) {
    let value = Bytes::from(vec![7; 64 << 10]);
    let keys: Vec<String> = (0..bytes / value.len()).map(|key| format!("great-{key}")).collect();
    for keys in keys.chunks(15) {
        let puts = keys.iter().map(|key| Operation::Put(key.clone().into(), value.clone()));
        for written in database.batch(puts.collect()).await {
            written.expect("no write fails within its deadline");
        }
    }
}

/// How a node's replica of a shard stands.
async fn standing(cluster: &LocalCluster, node: usize, shard: ShardId) -> GroupStatus {
    let replicas = cluster.handle(node).report().await.replicas;
    let here = replicas.into_iter().find(|replica| replica.shard == shard);
    here.and_then(|replica| replica.group).expect("a replica that runs")
}

#[actix::test]
async fn a_node_that_catches_up_one_shard_serves_its_others() {
    let mut cluster = with_little_memory().await;
    let client = cluster.client().await;
    let (great, great_shard) = cluster.database(&client, "great", 3, 1).await;
    let (small, small_shards) = cluster.database(&client, "small", 3, 4).await;
    let leader = cluster.leader(great_shard[0]).await;
    let behind = (leader + 1) % 3;
    // Nobody else spreads the leaders that are put on one node here.
    client.change_setting(PolicyChange::Automatic(false), PATIENCE).await.expect("set");
    for shard in &small_shards {
        cluster.leader(*shard).await;
        let to = cluster.handle(behind).node();
        client.transfer_leader(*shard, to, PATIENCE).await.expect("handed over");
        until_leads(&cluster, *shard, "the node leads the small ones", |leader| leader == behind).await;
    }
    // From now on one flush takes longer than it takes to fill that node's memory twice.
    let slow = cluster.handle(behind);
    slow.inject(great_shard[0], "slow-flush=7000").await.expect("injected");
    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..8).map(|number| write_key(&small, format!("k{number}"), &stop)).collect();
    // Where the others' disks are slow too, one flush may be over before as much was written.
    let begun = Instant::now();
    loop {
        fill(&great, 2 * MEMTABLE_BYTES).await;
        let ahead = standing(&cluster, leader, great_shard[0]).await;
        let back = standing(&cluster, behind, great_shard[0]).await;
        if back.applied < ahead.applied {
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "it keeps up: {} of {}", back.applied, ahead.applied);
    }
    tokio::time::sleep(Duration::from_secs(4)).await;
    for shard in &small_shards {
        assert_eq!(cluster.leader(*shard).await, behind, "it leads still");
    }
    slow.inject(great_shard[0], "slow-flush").await.expect("injected");
    stop.store(true, Ordering::Relaxed);
    for writer in writers {
        let gap = writer.await.expect("no write failed");
        assert!(gap < Duration::from_millis(2_500), "no write for {gap:?}");
    }
    cluster.converge().await;
    client.close().await;
    cluster.stop_all().await;
}

#[actix::test]
async fn a_leader_whose_state_store_takes_nothing_for_seconds_hands_over() {
    let mut cluster = with_little_memory().await;
    let client = cluster.client().await;
    let (database, shards) = cluster.database(&client, "held", 3, 1).await;
    let leader = cluster.leader(shards[0]).await;
    cluster.handle(leader).inject(shards[0], "slow-flush=12000").await.expect("injected");
    let stop = Arc::new(AtomicBool::new(false));
    let writer = write_on(&database, &stop);
    fill(&database, 2 * MEMTABLE_BYTES).await;
    until_leads(&cluster, shards[0], "another leads", |now| now != leader).await;
    stop.store(true, Ordering::Relaxed);
    let gap = writer.await.expect("no write failed");
    assert!(gap < Duration::from_secs(7), "no write for {gap:?}");
    cluster.handle(leader).inject(shards[0], "slow-flush").await.expect("injected");
    cluster.converge().await;
    client.close().await;
    cluster.stop_all().await;
}

/// Not a check: what a hand-over is worth, for whom it may concern.
#[actix::test]
#[ignore = "a measurement of 40 s"]
async fn gaps_with_and_without_a_hand_over() {
    for ms in [2_000, 5_000] {
        for hand_over in [true, false] {
            for _ in 0..3 {
                let (gap, moved) = gap_of_a_stall(ms, hand_over).await;
                eprintln!("stall {ms} ms, hand-over {hand_over}: gap {gap:?}, moved {moved}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_takes_no_leadership_is_tried_with_one_shard_before_it_is_handed_others() {
    let mut cluster = Cluster::new(3);
    cluster.wait_all_ready();
    let client = cluster.client().await;
    let database = cluster.database(&client, "shy", 3, 6).await;
    client.change_setting(PolicyChange::Automatic(false), PATIENCE).await.expect("leaders stay");
    let report = |node: usize| client.node_report(&cluster.nodes[node].client, PATIENCE);
    let (leader, shy) = (report(0).await.expect("a report").node, report(1).await.expect("a report").node);
    let map = client.map().await.expect("the map");
    let shards: Vec<ShardId> = map.shards.keys().copied().filter(|shard| *shard != METADATA_SHARD).collect();
    assert_eq!(shards.len(), 6);
    let hand = async |to, shards: &[ShardId]| {
        let all = shards.iter().map(|shard| client.transfer_leader(*shard, to, Duration::from_secs(1)));
        join_all(all).await.into_iter().filter(|handed| handed.is_ok()).count()
    };
    let begun = Instant::now();
    while hand(leader, &shards).await < shards.len() {
        assert!(begun.elapsed() < PATIENCE, "one node leads all\n{}", cluster.log(0));
    }
    let lapsed = || cluster.log(0).matches("leadership was handed over, and not taken").count();
    assert_eq!(lapsed(), 0);
    // Its disk hangs; it answers, and its vote for itself waits.
    client.inject(&cluster.nodes[1].client, shards[0], "log-stall=15000").await.expect("injected");
    let hangs = Instant::now();
    while lapsed() == 0 {
        assert_eq!(hand(shy, &shards[..1]).await, 0, "it takes none");
        assert!(hangs.elapsed() < PATIENCE, "nothing was handed to it\n{}", cluster.log(0));
    }
    assert_eq!(lapsed(), 1);
    // Nothing is handed to it for two seconds. When they are over all others ask for it at once, for longer than an attempt lasts.
    let refused = Instant::now();
    while refused.elapsed() < Duration::from_millis(4_500) || lapsed() < 2 {
        assert_eq!(hand(shy, &shards[1..]).await, 0);
        assert!(refused.elapsed() < PATIENCE, "it is never tried again\n{}", cluster.log(0));
    }
    // The next is tried four seconds later, which on a busy machine may have come.
    assert!([2, 3].contains(&lapsed()), "one shard is tried at a time:\n{}", cluster.log(0));
    for (number, key) in ["a", "b", "c", "d", "e", "f", "g", "h"].iter().enumerate() {
        database.put(*key, format!("{number}")).await.expect("a majority has disks that are well");
    }
    let begun = Instant::now();
    while hand(shy, &shards).await < shards.len() {
        assert!(begun.elapsed() < PATIENCE, "it is well again, and leads all\n{}", cluster.log(0));
    }
    client.close().await;
}

#[test]
fn a_node_that_starts_below_its_reserve_is_read_only_and_says_so() {
    let http = free_ports(1)[0];
    let extra = format!("reserve_bytes = \"1024GiB\"\n[http]\nlisten = \"127.0.0.1:{http}\"\n");
    let mut cluster = Cluster::with(1, &free_ports(2), Options { extra, ..Options::default() });
    cluster.wait_all_ready();
    assert!(cluster.run(&["db", "create", "d", "1", "1"]).status.success());
    let set = || cluster.run(&["set", "d", "k", "v", "--timeout", "1s"]);
    // Where the deadline meets a request on its way, as it may on a busy machine, it can't be certain, and is tried again.
    let set =
        (0..20).map(|_| set()).find(|set| set.status.code() != Some(4)).expect("it is certain in the end");
    let says = String::from_utf8_lossy(&set.stderr);
    assert_eq!(set.status.code(), Some(3), "{says}");
    assert!(says.contains("too little disk space is left for new values"), "{says}");
    assert_eq!(cluster.run(&["get", "d", "k"]).status.code(), Some(1), "it is absent");
    let delete = cluster.run(&["delete", "d", "k"]);
    assert_eq!(delete.status.code(), Some(1), "deletes are carried out: {delete:?}");
    let status = cluster.run(&["status", "--json"]);
    assert_eq!(status.status.code(), Some(0), "it serves");
    assert!(String::from_utf8_lossy(&status.stdout).contains("\"read-only\""), "{status:?}");
    assert_eq!(cluster::http_get(http, "/readyz").expect("an answer").0, 200);
    let metrics = cluster::http_get(http, "/metrics").expect("metrics").1;
    assert_eq!(cluster::metric(&metrics, "pontoon_read_only"), Some(1.0));
    assert!(cluster::metric(&metrics, "pontoon_disk_free_bytes").is_some_and(|free| free > 0.0));
    assert!(cluster.log(0).contains("the disk is nearly full"), "{}", cluster.log(0));
}

#[test]
fn a_node_without_space_to_start_changes_nothing_and_asks_to_be_tried_again() {
    let cluster = Cluster::prepared(1, &free_ports(2), Options::default());
    let node = &cluster.nodes[0];
    let log = node.config.with_extension("log");
    let mut serve = cluster::pontoon();
    serve.args(["serve", "--config"]).arg(&node.config).env("PONTOON_TEST_FREE_BYTES", "1000");
    serve.stdin(Stdio::null()).stdout(Stdio::null()).stderr(std::fs::File::create(&log).expect("a file"));
    let mut child = serve.spawn().expect("running pontoon");
    let begun = Instant::now();
    let status = loop {
        match child.try_wait().expect("its state") {
            Some(status) => break status,
            None if begun.elapsed() > PATIENCE => {
                child.kill().expect("killing it");
                panic!("it serves");
            }
            None => std::thread::sleep(Duration::from_millis(10)),
        }
    };
    let says = std::fs::read_to_string(&log).expect("what it says");
    assert_eq!(status.code(), Some(70), "{says}");
    assert!(says.contains("has 1000 bytes free") && says.contains("free some space"), "{says}");
    assert!(!node.data.exists(), "nothing was made");
}
