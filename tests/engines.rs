//! Nodes whose state is kept by different engines, real processes: they are one cluster, whichever of them is
//! killed meanwhile, and a directory stays with its engine.

#[path = "support/cluster.rs"]
mod cluster;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use cluster::{Cluster, Options, STOPPED, free_ports};
use pontoon::client::Database;
use pontoon::storage::engine_kind::EngineKind;
use rustix::process::Signal;

/// One sled and two fjall: a majority is either of both kinds or of fjall alone.
const ENGINES: [EngineKind; 3] = [EngineKind::Sled, EngineKind::Fjall, EngineKind::Fjall];

/// Keys of one writer, which go round: with values of this length they are flushed all the time.
const KEYS: u64 = 200;
const VALUE_BYTES: usize = 8000;

fn configure(cluster: &Cluster, node: usize, replace: &str, with: &str) {
    let config = &cluster.nodes[node].config;
    let text = std::fs::read_to_string(config).expect("its settings");
    assert!(text.contains(replace), "{text}");
    std::fs::write(config, text.replace(replace, with)).expect("written");
}

/// Lets the node be started with an engine.
fn choose(cluster: &Cluster, node: usize, from: &str, to: &str) {
    configure(cluster, node, &format!("engine = \"{from}\"\n"), &format!("engine = \"{to}\"\n"));
}

fn started() -> Cluster {
    let options = Options { extra: "engine = \"auto\"\n".into(), ..Options::default() };
    let mut cluster = Cluster::prepared(3, &free_ports(6), options);
    for (node, engine) in ENGINES.iter().enumerate() {
        configure(&cluster, node, "memtable_bytes = \"32MiB\"", "memtable_bytes = \"16MiB\"");
        choose(&cluster, node, "auto", engine.name());
        cluster.spawn(node);
    }
    cluster.wait_all_ready();
    cluster
}

/// A value that tells its number.
fn value(number: u64) -> String {
    format!("{number:0>VALUE_BYTES$}")
}

/// Writers that put greater and greater numbers under keys of their own. Returns what was acknowledged last
/// under each key.
fn load(
    database: &Database,
    stop: &Arc<AtomicBool>,
    writes: &Arc<AtomicU64>,
) -> Vec<tokio::task::JoinHandle<BTreeMap<String, u64>>> {
    let writer = |writer: usize| {
        let (database, stop, writes) = (database.clone(), stop.clone(), writes.clone());
        tokio::spawn(async move {
            let mut acknowledged = BTreeMap::new();
            for number in 1.. {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                let key = format!("writer-{writer}-{}", number % KEYS);
                if number % 13 == 0 {
                    database.delete(key.clone()).await.expect("a deletion");
                    acknowledged.insert(key, 0);
                } else {
                    database.put(key.clone(), value(number)).await.expect("a write");
                    acknowledged.insert(key, number);
                }
                writes.fetch_add(1, Ordering::Relaxed);
            }
            acknowledged
        })
    };
    (0..8).map(writer).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_of_both_engines_are_killed_beside_flushes_and_stay_equal() {
    let mut cluster = started();
    let client = cluster.client().await;
    cluster.database(&client, "mixed", 3, 4).await;
    let database = client.database("mixed").with_timeout(Duration::from_secs(180));
    let (stop, writes) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let writers = load(&database, &stop, &writes);
    let progress = |count: u64| {
        let (writes, begun) = (writes.clone(), Instant::now());
        async move {
            let until = writes.load(Ordering::Relaxed) + count;
            while writes.load(Ordering::Relaxed) < until {
                assert!(begun.elapsed() < Duration::from_secs(180), "writes stand still");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    };
    for victim in [1, 2, 1, 0, 2, 1] {
        progress(1500).await;
        cluster.kill(victim);
        progress(300).await;
        cluster.spawn(victim);
        cluster.wait_ready(victim);
    }
    stop.store(true, Ordering::Relaxed);
    for writer in writers {
        for (key, number) in writer.await.expect("a writer") {
            let found = database.get(key.clone()).await.expect("a read").map(|found| found.value);
            let expected = (number != 0).then(|| value(number));
            assert!(found.as_deref() == expected.as_deref().map(str::as_bytes), "{key}: not {number}");
        }
    }
    // Each has flushed, and none has found its state damaged.
    for node in 0..3 {
        let log = std::fs::read_to_string(cluster.nodes[node].config.with_extension("log")).expect("its log");
        assert!(!log.contains("set aside") && !log.contains("is lost"), "node {node}: {log}");
    }
    let verify = || cluster.run(&["admin", "database", "verify", "mixed", "--json"]);
    let begun = Instant::now();
    let told = loop {
        let told = String::from_utf8(verify().stdout).expect("text");
        if told.contains("\"equal\"") || begun.elapsed() > Duration::from_secs(120) {
            break told;
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    };
    let told: serde_json::Value = serde_json::from_str(&told).expect("JSON");
    assert_eq!(told["result"], "equal", "{told:#}");
    client.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_engine_is_refused_and_given_by_way_of_the_others() {
    let mut cluster = started();
    let client = cluster.client().await;
    let database = cluster.database(&client, "kept", 3, 2).await;
    for key in 0..50u64 {
        database.put(format!("key-{key}"), value(key)).await.expect("a write");
    }
    let stop = |cluster: &mut Cluster, node| {
        cluster.signal(node, Signal::TERM);
        assert_eq!(cluster.wait_exit(node, STOPPED).code(), Some(0));
    };
    stop(&mut cluster, 0);
    choose(&cluster, 0, "sled", "fjall");
    cluster.spawn(0);
    assert_eq!(cluster.ready_or_exit(0, Duration::from_secs(60)), Some(Some(2)));
    let log = cluster.log(0);
    assert!(log.contains("holds a state made by sled, and `storage.engine` is \"fjall\""), "{log}");
    // What is there counts, unless another is asked for.
    choose(&cluster, 0, "fjall", "auto");
    cluster.spawn(0);
    cluster.wait_ready(0);
    let log = cluster.log(0);
    assert!(log.contains("the state stays on the engine that made it"), "{log}");
    stop(&mut cluster, 0);
    // The way out: its replicas get their state from the others.
    let data = cluster.nodes[0].data.clone();
    let away = cluster.dir.path().join("away");
    std::fs::create_dir(&away).expect("a directory");
    for part in ["state", "state.sums", "redo"] {
        std::fs::rename(data.join(part), away.join(part)).expect("moved");
    }
    choose(&cluster, 0, "auto", "fjall");
    cluster.spawn(0);
    cluster.wait_ready(0);
    assert!(data.join("state").join("current").exists());
    for node in [1, 2] {
        stop(&mut cluster, node);
        cluster.spawn(node);
        cluster.wait_ready(node);
    }
    for key in 0..50u64 {
        let found = database.get(format!("key-{key}")).await.expect("a read").expect("it is there");
        assert!(found.value == value(key).as_bytes(), "key-{key}");
    }
    client.close().await;
}
