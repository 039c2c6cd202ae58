//! The HTTP port of a daemon: alive, ready, and metrics that move.

#[path = "support/cluster.rs"]
mod cluster;

use std::io::Write;
use std::time::{Duration, Instant};

use cluster::{Cluster, Options, STOPPED, free_ports, http_get, metric};

fn metrics(port: u16) -> String {
    let (status, text) = http_get(port, "/metrics").expect("an answer");
    assert_eq!(status, 200, "{text}");
    text
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_tells_when_it_is_ready_and_what_it_does() {
    let http = free_ports(3);
    let mut cluster = Cluster::prepared(3, &free_ports(6), Options::default());
    for (node, port) in cluster.nodes.iter().zip(&http) {
        let text = std::fs::read_to_string(&node.config).expect("its settings");
        std::fs::write(&node.config, format!("{text}[http]\nlisten = \"127.0.0.1:{port}\"\n"))
            .expect("written");
    }

    // Alone it can't form a cluster: it is alive and not ready, and says why.
    cluster.spawn(0);
    let begun = Instant::now();
    let (status, why) = loop {
        match http_get(http[0], "/readyz") {
            Ok(answer) => break answer,
            Err(error) => assert!(begun.elapsed() < Duration::from_secs(60), "{error}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    assert_eq!(status, 503);
    assert!(why.contains("not yet a member"), "{why}");
    assert_eq!(http_get(http[0], "/healthz").expect("an answer").0, 200);
    assert_eq!(http_get(http[0], "/nowhere").expect("an answer").0, 404);

    cluster.spawn(1);
    cluster.spawn(2);
    cluster.wait_all_ready();
    for port in &http {
        assert_eq!(http_get(*port, "/readyz").expect("an answer"), (200, "ok\n".into()));
    }

    let client = cluster.client().await;
    let database = cluster.database(&client, "counted", 3, 2).await;
    let before: Vec<_> = http.iter().map(|port| metrics(*port)).collect();
    for number in 0..40 {
        database.put(format!("key-{number}"), "v").await.expect("a write");
        database.get(format!("key-{number}")).await.expect("a read").expect("there");
    }
    let after: Vec<_> = http.iter().map(|port| metrics(*port)).collect();
    let sum = |texts: &[String], name: &str| -> f64 {
        texts.iter().map(|text| metric(text, name).unwrap_or(0.0)).sum()
    };
    for (name, least) in [
        ("pontoon_proposals_total", 40.0),
        ("pontoon_reads_total", 40.0),
        ("pontoon_log_sync_seconds_count", 40.0),
        ("pontoon_log_entries_total", 40.0),
        ("pontoon_log_writes_total", 40.0),
        ("pontoon_apply_entries_total", 80.0),
    ] {
        let moved = sum(&after, name) - sum(&before, name);
        assert!(moved >= least, "{name} moved by {moved}");
    }
    let settles = |name: &str, count: f64| {
        let begun = Instant::now();
        while sum(&http.iter().map(|port| metrics(*port)).collect::<Vec<_>>(), name) != count {
            assert!(begun.elapsed() < Duration::from_secs(60), "{name} isn't {count}");
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    // Two shards and the metadata shard. What leads just now may be on its way to another node.
    settles("pontoon_leaders", 3.0);
    settles("pontoon_replicas", 9.0);

    // What hasn't happened yet is there all the same, and a stranger on the peer port is counted.
    for name in
        ["pontoon_replica_restarts_total", "pontoon_peer_malformed_total", "pontoon_peer_foreign_total"]
    {
        assert_eq!(metric(&after[0], name), Some(0.0), "{name}");
    }
    let mut stranger = std::net::TcpStream::connect(&cluster.nodes[0].peer).expect("connected");
    stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").expect("sent");
    let begun = Instant::now();
    while metric(&metrics(http[0]), "pontoon_peer_foreign_total") != Some(1.0) {
        assert!(begun.elapsed() < Duration::from_secs(60), "it isn't counted");
        std::thread::sleep(Duration::from_millis(20));
    }

    // Every line is a comment or a sample.
    for line in after.iter().flat_map(|text| text.lines()).filter(|line| !line.is_empty()) {
        let sample = line
            .rsplit_once(' ')
            .is_some_and(|(name, value)| name.starts_with("pontoon_") && value.parse::<f64>().is_ok());
        assert!(line.starts_with("# ") || sample, "{line}");
    }

    // Those of a database that is dropped are gone here too.
    client.drop_database("counted", Duration::from_secs(10)).await.expect("dropped");
    settles("pontoon_replicas", 3.0);
    settles("pontoon_leaders", 1.0);
    client.close().await;

    // A connection that says nothing doesn't hold up the stop.
    let _idle = std::net::TcpStream::connect(("127.0.0.1", http[0])).expect("connected");
    cluster.signal(0, rustix::process::Signal::TERM);
    assert_eq!(cluster.wait_exit(0, STOPPED).code(), Some(0));
}
