//! A node that hangs, and addresses that lead elsewhere: what a user with little time sees.

use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;

use crate::cluster::{Cluster, Options, free_ports};
use crate::degraded::ask;
use crate::harness::{Ended, Home, PORTS};

/// Less than a node has to welcome a client.
const BRIEF: &str = "900ms";
/// How often a command is tried that has so little time.
const ATTEMPTS: usize = 3;

/// Runs a command within [`BRIEF`]. One that comes to nothing is tried again: what else the machine does may take that
/// long, and what a node that hangs does to it, it does each time.
fn briefly(cluster: &Cluster, home: &Home, args: &[&str]) -> Ended {
    let args = [&["--timeout", BRIEF], args].concat();
    let mut ended = ask(cluster, home, &args);
    for _ in 1..ATTEMPTS {
        if ended.code != Some(3) {
            break;
        }
        ended = ask(cluster, home, &args);
    }
    ended
}

/// Waits until every shard has a leader on another node than `hung`.
fn wait_led_without(cluster: &Cluster, home: &Home, hung: u64) {
    let begun = Instant::now();
    loop {
        let status = ask(cluster, home, &["status", "--json"]);
        let led = status.code == Some(0) && {
            let object = status.json();
            let shards = object["databases"][0]["shards"].as_array().unwrap();
            shards.iter().chain([&object["metadata"]]).all(|shard| shard["leader"] != hung)
        };
        if led {
            return;
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "{status:?}");
    }
}

#[test]
fn a_hung_node_costs_no_command_its_deadline() {
    let home = Home::new();
    let ports = PORTS.read().unwrap_or_else(|poisoned| poisoned.into_inner());
    let mut cluster = Cluster::new(3);
    cluster.wait_all_ready();
    drop(ports);
    ask(&cluster, &home, &["db", "create", "db", "3", "4"]).ok();
    let keys = ["a", "b", "c", "d", "e", "f", "g", "h"];
    for key in keys {
        ask(&cluster, &home, &["set", "db", key, "v"]).ok();
    }
    let status = ask(&cluster, &home, &["status", "--json"]).ok().json();
    let hung = status["nodes"].as_array().unwrap().iter().find(|n| n["label"] == "n1").unwrap();
    let hung = hung["id"].as_u64().unwrap();
    cluster.signal(0, Signal::STOP);
    wait_led_without(&cluster, &home, hung);

    for key in keys {
        assert_eq!(briefly(&cluster, &home, &["get", "db", key]).ok().text(), "v");
    }
    for command in [
        &["set", "db", "a", "w"][..],
        &["cas", "db", "a", "--expect", "w", "x"],
        &["scan", "db"],
        &["route", "db", "a"],
        &["db", "list"],
    ] {
        briefly(&cluster, &home, command).ok();
    }
    briefly(&cluster, &home, &["mget", "db", "a", "b", "c", "d"]).ok();
    let status = briefly(&cluster, &home, &["status"]).ok().text();
    assert!(
        status.contains("unreachable") && status.contains(&format!("node {hung} unreachable")),
        "{status}"
    );
    briefly(&cluster, &home, &["health"]).exits(1);
    ask(&cluster, &home, &["db", "drop", "db", "--yes", "--timeout", "3s"]).ok();
    cluster.signal(0, Signal::CONT);
}

#[test]
fn without_a_leader_each_node_is_told_of() {
    let home = Home::new();
    let ports = PORTS.read().unwrap_or_else(|poisoned| poisoned.into_inner());
    let mut cluster = Cluster::new(3);
    cluster.wait_all_ready();
    drop(ports);
    ask(&cluster, &home, &["db", "create", "db", "3", "1"]).ok();
    ask(&cluster, &home, &["set", "db", "k", "v"]).ok();
    cluster.signal(0, Signal::STOP);
    cluster.kill(1);
    let begun = Instant::now();
    loop {
        let error =
            ask(&cluster, &home, &["get", "db", "k", "--timeout", "2s", "--json"]).exits(3).json_error();
        let message = error["message"].as_str().unwrap().to_owned();
        assert!(message.starts_with("no answer within 2 s: "), "{message}");
        let all = cluster.addresses().iter().all(|address| message.contains(address));
        if all && message.contains("no leader") && message.contains("Connection refused") {
            break;
        }
        // The third may lead for a moment yet, until it finds itself alone.
        assert!(begun.elapsed() < Duration::from_secs(15), "{message}");
    }
    // Nor is what the nodes say lost in the last attempt, for which no time is left.
    let error = ask(&cluster, &home, &["scan", "db", "--timeout", "2s", "--json"]).exits(3).json_error();
    assert!(error["message"].as_str().unwrap().contains("no leader"), "{error}");
    cluster.signal(0, Signal::CONT);
}

#[test]
fn a_client_on_an_http_port_is_told_so() {
    let home = Home::new();
    let ports = PORTS.read().unwrap_or_else(|poisoned| poisoned.into_inner());
    let ports3 = free_ports(3);
    let extra = format!("[http]\nlisten = \"127.0.0.1:{}\"", ports3[2]);
    let mut cluster = Cluster::with(1, &ports3[..2], Options { extra, ..Options::default() });
    cluster.wait_all_ready();
    drop(ports);
    let http = format!("127.0.0.1:{}", ports3[2]);
    let ended = home.run(&["status", "--cluster", &http, "--json"]).exits(2);
    assert!(ended.took < Duration::from_secs(5), "{:?}", ended.took);
    let error = ended.json_error();
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("HTTP") && message.contains(&http), "{message}");
    // Beside the right one it does no harm.
    let both = format!("{http},{}", cluster.nodes[0].client);
    let status: Value = home.run(&["status", "--cluster", &both, "--json"]).ok().json();
    assert_eq!(status["nodes"].as_array().unwrap().len(), 1);
}
