//! Data directories that a node must not use: it says why, ends, and changes nothing.

#[path = "support/cluster.rs"]
mod cluster;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use cluster::{Cluster, Options, STOPPED, free_ports, pontoon};
use pontoon::client::Client;

/// Every file below `dir` with its content; LOCK, which is rewritten by whoever looks, is left out,
/// and so are directories, of which empty ones are made on the way.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    fn gather(dir: &Path, base: &Path, found: &mut BTreeMap<String, Vec<u8>>) {
        for entry in std::fs::read_dir(dir).expect("listing") {
            let path = entry.expect("an entry").path();
            let name = path.strip_prefix(base).expect("below").display().to_string();
            if path.is_dir() {
                gather(&path, base, found);
            } else if !name.ends_with("LOCK") {
                found.insert(name, std::fs::read(&path).expect("reading"));
            }
        }
    }
    let mut found = BTreeMap::new();
    gather(dir, dir, &mut found);
    found
}

fn assert_same(before: &BTreeMap<String, Vec<u8>>, after: &BTreeMap<String, Vec<u8>>) {
    let names = |files: &BTreeMap<String, Vec<u8>>| files.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(before), names(after), "files came or went");
    for (name, content) in before {
        assert!(content == &after[name], "{name} was changed");
    }
}

/// Runs a node that should refuse to start; its exit code and what it says.
fn refused(cluster: &Cluster, node: usize) -> (Option<i32>, String) {
    let mut child = pontoon()
        .args(["serve", "--config"])
        .arg(&cluster.nodes[node].config)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("starting");
    let begun = Instant::now();
    while child.try_wait().expect("its state").is_none() {
        if begun.elapsed() > Duration::from_secs(60) {
            let _ = child.kill();
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let output = child.wait_with_output().expect("its output");
    assert_eq!(output.stdout, b"", "it says it is ready");
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

/// Two clusters of one node each, with a write in them, stopped.
async fn two_stopped() -> [Cluster; 2] {
    let mut clusters = [Cluster::new(1), Cluster::new(1)];
    for cluster in &mut clusters {
        cluster.wait_all_ready();
        let client = cluster.client().await;
        cluster.database(&client, "db", 1, 1).await.put("k", "v").await.expect("a write");
        client.close().await;
        cluster.signal(0, rustix::process::Signal::TERM);
        assert_eq!(cluster.wait_exit(0, STOPPED).code(), Some(0));
    }
    clusters
}

#[test]
fn a_directory_with_other_content_is_left_alone() {
    let cluster = Cluster::prepared(1, &free_ports(2), Options::default());
    let data = &cluster.nodes[0].data;
    std::fs::create_dir_all(data.join("photos")).expect("a directory");
    std::fs::write(data.join("photos/cat.jpg"), "not ours").expect("a file");
    let before = files(data);
    let (code, says) = refused(&cluster, 0);
    assert_eq!(code, Some(2), "{says}");
    assert!(
        says.contains("not a Pontoon data directory") && says.contains(&data.display().to_string()),
        "{says}"
    );
    assert_same(&before, &files(data));
    assert!(!data.join("LOCK").exists() && !data.join("log").exists(), "nothing is put there");
}

#[test]
fn a_directory_in_use_names_its_holder() {
    let mut cluster = Cluster::new(1);
    cluster.wait_all_ready();
    // A second process with other ports and the same directory.
    let text = std::fs::read_to_string(&cluster.nodes[0].config).expect("its settings");
    let ports = free_ports(2);
    let text = text
        .replace(&cluster.nodes[0].client, &format!("127.0.0.1:{}", ports[0]))
        .replace(&cluster.nodes[0].peer, &format!("127.0.0.1:{}", ports[1]));
    let config = cluster.dir.path().join("second.toml");
    std::fs::write(&config, text).expect("written");
    let output = pontoon().args(["serve", "--config"]).arg(&config).output().expect("running");
    let says = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{says}");
    assert!(says.contains("in use") && says.contains("pid"), "{says}");
    // The holder is as well as before.
    cluster.signal(0, rustix::process::Signal::TERM);
    assert_eq!(cluster.wait_exit(0, STOPPED).code(), Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_of_a_newer_format_is_refused() {
    let [cluster, _] = two_stopped().await;
    let identity = cluster.nodes[0].data.join("IDENTITY");
    let mut bytes = std::fs::read(&identity).expect("the identity");
    // Magic, version (four bytes, big endian), length, body, checksum.
    bytes[8..12].copy_from_slice(&99_u32.to_be_bytes());
    let content = bytes.len() - 4;
    let sum = crc32c::crc32c(&bytes[..content]);
    bytes[content..].copy_from_slice(&sum.to_be_bytes());
    std::fs::write(&identity, bytes).expect("written");
    let before = files(&cluster.nodes[0].data);
    let (code, says) = refused(&cluster, 0);
    assert_eq!(code, Some(2), "{says}");
    assert!(says.contains("format 99") && says.contains("newer"), "{says}");
    assert_same(&before, &files(&cluster.nodes[0].data));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_identity_is_refused() {
    let [cluster, _] = two_stopped().await;
    let identity = cluster.nodes[0].data.join("IDENTITY");
    let mut bytes = std::fs::read(&identity).expect("the identity");
    bytes[30] ^= 1;
    std::fs::write(&identity, bytes).expect("written");
    let before = files(&cluster.nodes[0].data);
    let (code, says) = refused(&cluster, 0);
    assert_eq!(code, Some(2), "{says}");
    assert!(says.contains("damaged"), "{says}");
    assert_same(&before, &files(&cluster.nodes[0].data));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parts_of_two_directories_are_not_taken_for_one() {
    for part in ["log", "state"] {
        let [cluster, other] = two_stopped().await;
        let (data, foreign) = (&cluster.nodes[0].data, &other.nodes[0].data);
        std::fs::remove_dir_all(data.join(part)).expect("removed");
        std::fs::rename(foreign.join(part), data.join(part)).expect("moved");
        let (code, says) = refused(&cluster, 0);
        assert_eq!(code, Some(2), "{part}: {says}");
        assert!(says.contains("store id"), "{part}: {says}");
        // Opening a store may tidy its files, but a second try fares no better.
        let (code, says) = refused(&cluster, 0);
        assert_eq!(code, Some(2), "{part}, again: {says}");
        // Put back where it belongs, nothing is lost.
        if part == "state" {
            let mut other = other;
            std::fs::rename(data.join(part), other.nodes[0].data.join(part)).expect("moved back");
            other.spawn(0);
            other.wait_ready(0);
            let client = other.client().await;
            let found = client.database("db").get("k").await.expect("a read").expect("there");
            assert_eq!(found.value, "v");
            client.close().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_whose_log_is_gone_doesnt_start_however_often_it_is_tried() {
    let [cluster, _] = two_stopped().await;
    let data = &cluster.nodes[0].data;
    std::fs::remove_dir_all(data.join("log")).expect("removed");
    let before = files(data);
    for attempt in 1..=3 {
        let (code, says) = refused(&cluster, 0);
        assert_eq!(code, Some(2), "attempt {attempt}: {says}");
        assert!(says.contains("raft log") || says.contains("/log"), "{says}");
        assert!(says.contains("missing") && says.contains("join"), "{says}");
        assert_same(&before, &files(data));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_whose_log_is_empty_doesnt_start_however_often_it_is_tried() {
    let [cluster, _] = two_stopped().await;
    let data = &cluster.nodes[0].data;
    for entry in std::fs::read_dir(data.join("log")).expect("listing") {
        let path = entry.expect("an entry").path();
        std::fs::File::options().write(true).truncate(true).open(&path).expect("emptied");
    }
    for attempt in 1..=3 {
        let (code, says) = refused(&cluster, 0);
        assert_eq!(code, Some(2), "attempt {attempt}: {says}");
        assert!(says.contains("/log") && says.contains("missing"), "{says}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stores_without_an_identity_are_refused_however_often_it_is_tried() {
    let [cluster, _] = two_stopped().await;
    let data = &cluster.nodes[0].data;
    std::fs::remove_file(data.join("IDENTITY")).expect("removed");
    // First all of it, then each part alone.
    for gone in ["map", "redo", "state", "log"] {
        let before = files(data);
        for attempt in 1..=3 {
            let (code, says) = refused(&cluster, 0);
            assert_eq!(code, Some(2), "before {gone} went, attempt {attempt}: {says}");
            assert!(says.contains("IDENTITY is missing") && says.contains("--rejoin"), "{says}");
            assert_same(&before, &files(data));
        }
        let path = data.join(gone);
        match gone {
            "map" => std::fs::remove_file(path).expect("removed"),
            _ => std::fs::remove_dir_all(path).expect("removed"),
        }
    }
}

async fn reads(cluster: &Cluster, node: usize) {
    let client = Client::connect([cluster.nodes[node].client.clone()]).await.expect("connecting");
    let found = client.database("db").get("k").await.expect("a read").expect("there");
    assert_eq!(found.value, "v");
    client.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lone_node_whose_cluster_map_is_lost_or_damaged_finds_it_in_its_own_log() {
    let [mut cluster, _] = two_stopped().await;
    let map = cluster.nodes[0].data.join("map");
    for damage in [None, Some("rubbish")] {
        match damage {
            None => std::fs::remove_file(&map).expect("removed"),
            Some(text) => std::fs::write(&map, text).expect("written"),
        }
        cluster.spawn(0);
        cluster.wait_ready(0);
        reads(&cluster, 0).await;
        cluster.kill(0);
        assert!(std::fs::read(&map).expect("made anew").starts_with(b"PONTCMAP"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_whose_cluster_map_is_lost_gets_it_from_its_peers() {
    // The last of four has no replica of the metadata shard.
    let mut cluster = Cluster::new(4);
    cluster.wait_all_ready();
    let client = cluster.client().await;
    cluster.database(&client, "db", 3, 2).await.put("k", "v").await.expect("a write");
    client.close().await;
    for node in [0, 3] {
        cluster.kill(node);
        std::fs::remove_file(cluster.nodes[node].data.join("map")).expect("removed");
        cluster.spawn(node);
        cluster.wait_ready(node);
        reads(&cluster, node).await;
    }
    // With nobody there yet it waits, and says for what.
    for node in 0..4 {
        cluster.kill(node);
    }
    std::fs::write(cluster.nodes[3].data.join("map"), "rubbish").expect("written");
    let before = cluster.whole_log(3).len();
    cluster.spawn(3);
    let begun = Instant::now();
    while !cluster.whole_log(3)[before..].contains("waiting for the cluster map") {
        assert!(begun.elapsed() < Duration::from_secs(60), "{}", cluster.log(3));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    for node in 0..3 {
        cluster.spawn(node);
    }
    cluster.wait_all_ready();
    reads(&cluster, 3).await;
}
