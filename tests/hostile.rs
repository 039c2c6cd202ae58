//! Real daemons under thousands of inputs that nobody meant: arbitrary bytes, real conversations cut
//! short, mutated, and put together anew, on all three ports. Meanwhile ordinary clients are served; and
//! afterwards every process and every replica is as before, and no larger.
//!
//! Peers are believed (docs/guarantees.md): what is sent here in a peer's name claims no leadership, or
//! one that is over. That no message at all makes a replica panic is tried in `src/group/hostile_tests.rs`.

#[path = "support/cluster.rs"]
mod cluster;
#[path = "hostile/corpus.rs"]
mod corpus;
#[path = "support/process.rs"]
mod process;
#[path = "sessions/wire.rs"]
#[allow(dead_code)]
mod wire;

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use cluster::{Cluster, Options, free_ports, http_get, metric};
use corpus::{Corpus, Port, input};
use pontoon::client::Database;
use pontoon::node::handle::ReplicaHealth;
use rand::SeedableRng;
use rand::rngs::StdRng;

/// For how long, and with which seed: `PONTOON_HOSTILE_SECONDS`, `PONTOON_HOSTILE_SEED`.
fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |text| text.parse().expect("a number"))
}

/// Sends it all and leaves, or listens for a moment first. A node may close before it has read all.
fn send(address: &str, bytes: &[u8], listen: bool) -> std::io::Result<()> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_write_timeout(Some(Duration::from_secs(2)))?;
    stream.set_read_timeout(Some(Duration::from_millis(20)))?;
    let sent = stream.write_all(bytes).and_then(|()| stream.shutdown(Shutdown::Write));
    let mut answer = [0; 4096];
    while listen && sent.is_ok() {
        match stream.read(&mut answer) {
            Ok(1..) => {}
            _ => break,
        }
    }
    Ok(())
}

/// Writes and reads until told to stop; every call must succeed. How many did.
async fn customer(database: Database, number: usize, stop: Arc<AtomicBool>) -> u64 {
    let key = format!("customer-{number}");
    for round in 0.. {
        if stop.load(Ordering::Relaxed) {
            return round;
        }
        database.put(key.clone(), round.to_string()).await.expect("a write");
        let found = database.get(key.clone()).await.expect("a read").expect("there");
        assert_eq!(found.value, round.to_string());
    }
    unreachable!("rounds have no end")
}

/// Inputs to the ports of a kind that say anything.
const ENOUGH: u64 = 100;
const PATIENCE: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inputs_that_nobody_meant_change_nothing() {
    let seed = number("PONTOON_HOSTILE_SEED", 4711);
    let time = Duration::from_secs(number("PONTOON_HOSTILE_SECONDS", 6));
    println!("PONTOON_HOSTILE_SEED={seed}");
    let http = free_ports(3);
    let mut cluster = Cluster::prepared(3, &free_ports(6), Options::default());
    for (node, port) in cluster.nodes.iter().zip(&http) {
        let text = std::fs::read_to_string(&node.config).expect("its settings");
        std::fs::write(&node.config, format!("{text}[http]\nlisten = \"127.0.0.1:{port}\"\n"))
            .expect("written");
    }
    (0..3).for_each(|node| cluster.spawn(node));
    cluster.wait_all_ready();
    let client = cluster.client().await;
    let database = cluster.database(&client, "served", 3, 2).await.with_timeout(Duration::from_secs(30));
    let corpus = Arc::new(tokio::task::LocalSet::new().run_until(Corpus::gather(&cluster, &client)).await);

    let stop = Arc::<AtomicBool>::default();
    let customers: Vec<_> =
        (0..4).map(|n| tokio::spawn(customer(database.clone(), n, stop.clone()))).collect();
    // Warm: what a node needs for its ordinary work is there.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let before: Vec<u64> = (0..3).map(|node| process::resident(cluster.pid(node))).collect();

    let counts: Arc<[AtomicU64; 3]> = Arc::default();
    let end = Instant::now() + time;
    let senders: Vec<_> = (0..4u64)
        .map(|sender| {
            let (corpus, counts) = (corpus.clone(), counts.clone());
            let clients: Vec<_> = cluster.nodes.iter().map(|n| n.client.clone()).collect();
            let peers: Vec<_> = cluster.nodes.iter().map(|n| n.peer.clone()).collect();
            let http: Vec<_> = http.iter().map(|port| format!("127.0.0.1:{port}")).collect();
            std::thread::spawn(move || {
                let mut dice = StdRng::seed_from_u64(seed + sender);
                // On a slow machine until there were enough to say anything.
                let few = || counts.iter().any(|count| count.load(Ordering::Relaxed) < ENOUGH);
                while Instant::now() < end || few() && Instant::now() < end + PATIENCE {
                    let (port, node, bytes, listen) = input(&corpus, &mut dice);
                    let address = match port {
                        Port::Client => &clients[node],
                        Port::Peer => &peers[node],
                        Port::Http => &http[node],
                    };
                    match send(address, &bytes, listen) {
                        Ok(()) => counts[port as usize].fetch_add(1, Ordering::Relaxed),
                        // More wait to be accepted than the system lets wait.
                        Err(error) if error.kind() != ErrorKind::ConnectionRefused => continue,
                        Err(error) => panic!("node {node} doesn't listen any more: {error}"),
                    };
                }
            })
        })
        .collect();
    let joined = tokio::task::spawn_blocking(|| senders.into_iter().try_for_each(|s| s.join()));
    joined.await.expect("joined").expect("all nodes listen");
    stop.store(true, Ordering::Relaxed);
    let mut served = 0;
    for customer in customers {
        served += customer.await.expect("no call failed");
    }
    let counts: Vec<u64> = counts.iter().map(|count| count.load(Ordering::Relaxed)).collect();
    // Memtables of the ordinary load, and whatever an allocator keeps; it gives back within seconds.
    let resident = || (0..3).map(|node| process::resident(cluster.pid(node))).collect::<Vec<u64>>();
    let as_before =
        |after: &[u64]| after.iter().zip(&before).all(|(after, before)| *after < before + (64 << 20));
    let at_once = resident();
    let mut after = at_once.clone();
    let patience = Instant::now() + PATIENCE;
    while !as_before(&after) && Instant::now() < patience {
        tokio::time::sleep(Duration::from_millis(100)).await;
        after = resident();
    }
    println!("client, peer, http: {counts:?} inputs; {served} rounds served");
    println!("memory {before:?} before, {at_once:?} at the end, {after:?} then");
    assert!(as_before(&after), "a node keeps memory: {before:?} before, {after:?} after");
    assert!(counts.iter().all(|count| *count >= ENOUGH), "too few to say anything: {counts:?}");
    assert!(served >= 50, "only {served} rounds of ordinary clients");

    // Every replica is in its first life, and serves.
    let mut malformed = 0.0;
    for (node, port) in http.iter().enumerate() {
        let (_, text) = http_get(*port, "/metrics").expect("an answer");
        assert_eq!(metric(&text, "pontoon_replica_restarts_total"), Some(0.0), "{}", cluster.log(node));
        malformed += metric(&text, "pontoon_peer_malformed_total").unwrap_or(0.0);
        let address = &cluster.nodes[node].client;
        let report = client.node_report(address, Duration::from_secs(10)).await.expect("a report");
        assert_eq!(report.replicas.len(), 3);
        for replica in report.replicas {
            assert_eq!(replica.health, ReplicaHealth::Serving, "{}", cluster.log(node));
        }
    }
    assert!(malformed > 50.0, "only {malformed} of the peer inputs were refused for their form");
    client.close().await;
}
