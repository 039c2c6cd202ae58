//! Shards that nobody uses: they fall asleep, a request wakes one of them, and the end of the node that led them wakes
//! all the others, which are served again as soon as if they had been awake. They sleep without a node that is down, and
//! wake for it when it is back.

#[path = "support/cluster.rs"]
mod cluster;

use std::time::{Duration, Instant};

use cluster::{Cluster, Options, free_ports, http_get, metric};
use pontoon::client::Database;
use pontoon::limits::{ELECTION_TICKS_MAX, TICK_MS};

const SHARDS: u32 = 48;
/// Shards fall asleep after this time without use.
const IDLE_MS: u64 = 1_000;
/// For whatever takes a moment, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// For a shard without a leader to be served again: an election timeout, behind which a sleeping one is no later than by
/// a heartbeat of a node.
const PROMISE_MS: u64 = ELECTION_TICKS_MAX as u64 * TICK_MS;

/// What all nodes that answer tell of a metric.
fn sum(ports: &[u16], name: &str) -> f64 {
    let told = |port: &u16| {
        let (_, text) = http_get(*port, "/metrics").ok()?;
        Some(metric(&text, name).unwrap_or(0.0))
    };
    ports.iter().filter_map(told).sum()
}

fn until(what: &str, cluster: &Cluster, mut reached: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !reached() {
        assert!(begun.elapsed() < PATIENCE, "not {what} in time; node 1 says:\n{}", cluster.log(0));
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Writes to many keys, so that each shard gets some.
async fn write_everywhere(database: &Database, round: u32) {
    let writes = (0..16 * SHARDS).map(|key| {
        let database = database.clone();
        async move { database.put(format!("key-{key}"), format!("{round}")).await.expect("a write") }
    });
    futures_util::future::join_all(writes).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_shards_sleep_and_wake_for_a_request_and_for_the_end_of_their_leaders_node() {
    let http = free_ports(3);
    let extra = format!("[raft]\nhibernate_after_ms = {IDLE_MS}\n");
    let options = Options { extra, ..Options::default() };
    let mut cluster = Cluster::prepared(3, &free_ports(6), options);
    for (node, port) in cluster.nodes.iter().zip(&http) {
        let text = std::fs::read_to_string(&node.config).expect("its settings");
        let text = format!("{text}[http]\nlisten = \"127.0.0.1:{port}\"\n");
        std::fs::write(&node.config, text).expect("written");
    }
    (0..3).for_each(|node| cluster.spawn(node));
    cluster.wait_all_ready();
    let client = cluster.client().await;
    let database = cluster.database(&client, "quiet", 3, SHARDS).await;
    write_everywhere(&database, 1).await;

    let asleep = |ports: &[u16]| sum(ports, "pontoon_replicas_asleep");
    let all = f64::from(3 * SHARDS);
    until("asleep", &cluster, || asleep(&http) == all);

    // A request wakes the shard that it is for, and no other. It is asked for something until that was seen: on a busy
    // machine it is asleep again before anybody looks.
    let begun = Instant::now();
    let sleep = loop {
        database.put("key-1", "awake").await.expect("a write to a shard that sleeps");
        let sleep = asleep(&http);
        if sleep < all {
            break sleep;
        }
        assert!(begun.elapsed() < PATIENCE, "it doesn't wake");
    };
    assert!(sleep >= all - 3.0, "{sleep} of {all} sleep");
    let read = database.get("key-1").await.expect("a read").expect("it is there");
    assert_eq!(&read.value[..], b"awake");
    until("asleep again", &cluster, || asleep(&http) == all);

    // The node that leads a third of them is gone at once, and all the time nobody asks for anything.
    cluster.kill(0);
    let begun = Instant::now();
    write_everywhere(&database, 2).await;
    let took = begun.elapsed();
    assert!(took < 3 * Duration::from_millis(PROMISE_MS), "all shards served writes again after {took:?}");

    // The others sleep without the member that is down; when it is back it hears from all their leaders, gets what it has
    // missed, and sleeps with them.
    let others = f64::from(2 * SHARDS);
    until("asleep without a node that is down", &cluster, || asleep(&http[1..]) == others);
    cluster.spawn(0);
    cluster.wait_ready(0);
    until("asleep with the node that is back", &cluster, || asleep(&http) == all);

    // The same of one that only stood still, in the process that it was. Who elect new leaders have noticed that it does:
    // nobody sleeps for the reason that nothing has come to light yet.
    let leaders = |ports: &[u16]| sum(ports, "pontoon_leaders");
    let all_led = f64::from(SHARDS) + 1.0;
    until("led by it too", &cluster, || leaders(&http[..1]) >= 2.0 && asleep(&http) == all);
    cluster.signal(0, rustix::process::Signal::STOP);
    until("led by the others", &cluster, || leaders(&http[1..]) >= all_led);
    until("asleep without a node that stands still", &cluster, || asleep(&http[1..]) == others);
    cluster.signal(0, rustix::process::Signal::CONT);
    // It leads shards that others lead by now, until these wake for it: it is told so, and nobody asks for anything.
    until("led by one node each", &cluster, || {
        http_get(http[0], "/metrics").is_ok() && leaders(&http) == all_led
    });
    until("asleep with the node that goes on", &cluster, || asleep(&http) == all);

    // While one is down and the others sleep, the node of a leader ends. When the first is back there is a majority, which
    // has a leader for each shard though nobody asks for anything.
    until("led by it again", &cluster, || leaders(&http[..1]) >= 1.0 && asleep(&http) == all);
    cluster.kill(0);
    until("led by the others", &cluster, || leaders(&http[1..]) >= all_led);
    until("asleep without a node that is down", &cluster, || asleep(&http[1..]) == others);
    cluster.kill(2);
    cluster.spawn(0);
    until("led by those who are left", &cluster, || leaders(&http[..2]) >= all_led);
    cluster.wait_ready(0);
    cluster.spawn(2);
    cluster.wait_ready(2);
    until("asleep once more", &cluster, || asleep(&http) == all);

    // Nobody writes now: those whose leaders were on it have new ones all the same.
    cluster.kill(1);
    let left = [http[0], http[2]];
    until("led", &cluster, || leaders(&left) >= all_led);
    for key in ["key-1", "key-2"] {
        assert!(database.get(key).await.expect("a read").is_some());
    }
}
