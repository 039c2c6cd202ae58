//! Connections between clients and nodes that stay open and carry nothing in one direction, as when a
//! firewall forgets them or a machine goes away without a word: operations end by their deadlines, take
//! effect once, and go on elsewhere well before those.

#[path = "support/cluster.rs"]
mod cluster;
#[path = "support/counters.rs"]
mod counters;
#[path = "support/process.rs"]
mod process;
#[path = "support/replies.rs"]
mod replies;

use std::time::{Duration, Instant};

use cluster::{Cluster, Options, free_ports};
use counters::{Load, assert_exact};
use pontoon::client::options::ClientOptions;
use pontoon::client::{Client, ClientError, Database, NotApplied};
use replies::{Replies, Way};

const WAYS: [Way; 2] = [Way::Requests, Way::Replies];
/// How often it is tried to be done in time, where what else the machine does may hold it up.
const ATTEMPTS: usize = 3;

/// A cluster whose clients come through a proxy.
fn start() -> (Cluster, Replies) {
    let mut cluster = Cluster::prepared(3, &free_ports(6), Options::default());
    let proxies = Replies::new(&cluster.addresses(), 11);
    for (node, address) in proxies.addresses().iter().enumerate() {
        let config = &cluster.nodes[node].config;
        let text = std::fs::read_to_string(config).expect("its settings");
        let advertised = format!("advertise = \"{address}\"\n[peer]\n");
        std::fs::write(config, text.replace("[peer]\n", &advertised)).expect("written");
        cluster.spawn(node);
    }
    cluster.wait_all_ready();
    (cluster, proxies)
}

async fn connect(proxies: &Replies) -> Client {
    Client::connect_with(ClientOptions::new(proxies.addresses())).await.expect("connecting")
}

/// Waits until no client is connected to any node.
async fn assert_all_freed(cluster: &Cluster) {
    let begun = Instant::now();
    loop {
        let ports = cluster.nodes.iter().map(|node| node.client.rsplit_once(':').expect("a port").1);
        let open: usize = ports.map(|port| process::connections(port.parse().expect("a number"))).sum();
        if open == 0 {
            return;
        }
        assert!(begun.elapsed() < Duration::from_secs(10), "{open} connections are left");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_lost_a_direction_is_left_and_nothing_is_done_twice() {
    let (cluster, proxies) = start();
    let mut clients = Vec::new();
    for _ in 0..3 {
        clients.push(connect(&proxies).await);
    }
    cluster.database(&clients[0], "exact", 3, 4).await;
    let databases: Vec<Database> =
        clients.iter().map(|client| client.database("exact").with_timeout(Duration::from_secs(60))).collect();
    let load = Load::start(&databases, 12);
    for _ in 0..2 {
        for way in WAYS {
            load.progress(300).await;
            proxies.mute(way, false);
            // As many as there are workers may have been under way; the others wait for new connections.
            load.progress(100).await;
        }
    }
    let tally = load.stop().await;
    assert_eq!(tally.errors, []);
    assert_exact(&clients[0], "exact", &databases[0], &tally).await;

    // One alone, on a connection on which nothing else is under way.
    let alone = cluster.database(&clients[0], "alone", 3, 1).await;
    let mut number = 0;
    for way in WAYS {
        let mut least = Duration::MAX;
        for _ in 0..ATTEMPTS {
            alone.get("k").await.expect("a read");
            proxies.mute(way, false);
            let begun = Instant::now();
            number += 1;
            assert_eq!(alone.put("k", "v").await, Ok(number), "once");
            let took = begun.elapsed();
            assert!(took > Duration::from_millis(900), "{took:?}: it went by another way");
            least = least.min(took);
            if least < Duration::from_millis(1_900) {
                break;
            }
        }
        assert!(least < Duration::from_millis(1_900), "{least:?}: as long as a whole attempt");
    }
    for client in clients {
        client.close().await;
    }
    drop(proxies);
    assert_all_freed(&cluster).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_no_way_is_left_deadlines_hold_and_the_outcome_is_told() {
    let (cluster, proxies) = start();
    let client = connect(&proxies).await;
    let database = cluster.database(&client, "parted", 3, 1).await;
    let brief = database.with_timeout(Duration::from_millis(1_500));
    let mut written = 0;
    for way in WAYS {
        database.put("k", "v").await.expect("a write");
        proxies.mute(way, true);
        let begun = Instant::now();
        let (read, write) = tokio::join!(brief.get("k"), brief.put("k", "w"));
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(3), "{took:?}");
        assert!(matches!(read, Err(ClientError::NotApplied(NotApplied::Unavailable { .. }))), "{read:?}");
        assert!(matches!(write, Err(ClientError::Unknown(_))), "it was sent: {write:?}");
        // Once all connections are known for what they are, nothing is sent, and that is certain.
        let mut certain = false;
        for _ in 0..5 {
            let write = brief.put("k", "x").await;
            certain |= matches!(write, Err(ClientError::NotApplied(NotApplied::Unavailable { .. })));
            assert!(certain || matches!(write, Err(ClientError::Unknown(_))), "{write:?}");
        }
        assert!(certain);
        proxies.heal();
        // Lost requests never came; of lost replies the request did, once.
        written += 1 + u64::from(matches!(way, Way::Replies));
        let found = database.get("k").await.expect("a read").expect("there");
        let expected: &[u8] = if matches!(way, Way::Replies) { b"w" } else { b"v" };
        assert_eq!((&found.value[..], found.version), (expected, written));
    }
    client.close().await;
    drop(proxies);
    assert_all_freed(&cluster).await;
}
