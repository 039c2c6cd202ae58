//! What a user is told when not all is well.

use std::io::Write;
use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::cluster::Cluster;
use crate::harness::{HANG, Home, PORTS, Running};

/// Runs a subcommand against daemons.
pub fn ask(cluster: &Cluster, home: &Home, args: &[&str]) -> crate::harness::Ended {
    let mut command = home.command(args);
    command.env("PONTOON_CLUSTER", cluster.addresses().join(","));
    Running::spawn(command).end(HANG)
}

#[test]
fn one_of_three_nodes_dead_is_degraded_and_two_are_no_leader() {
    let home = Home::new();
    let ports = PORTS.read().unwrap_or_else(|poisoned| poisoned.into_inner());
    let mut cluster = Cluster::new(3);
    cluster.wait_all_ready();
    drop(ports);
    ask(&cluster, &home, &["db", "create", "db", "3", "4"]).ok();
    ask(&cluster, &home, &["set", "db", "k", "old"]).ok();

    cluster.kill(0);
    // The others elect leaders; operations wait for that by themselves.
    ask(&cluster, &home, &["set", "db", "k", "new"]).ok();
    let begun = Instant::now();
    let status = loop {
        let status = ask(&cluster, &home, &["status", "--json"]);
        if status.code == Some(0) {
            break status.json();
        }
        assert!(begun.elapsed() < Duration::from_secs(15), "{status:?}");
    };
    let states: Vec<&Value> = status["nodes"].as_array().unwrap().iter().map(|n| &n["state"]).collect();
    assert_eq!(states.iter().filter(|state| **state == "unreachable").count(), 1, "{status}");
    for shard in status["databases"][0]["shards"].as_array().unwrap() {
        assert_eq!(shard["state"], "degraded", "{shard}");
        let replicas = shard["replicas"].as_array().unwrap();
        let dead: Vec<_> = replicas.iter().filter(|r| r["state"] == "unreachable").collect();
        assert_eq!(dead.len(), 1, "{shard}");
        assert_eq!((&dead[0]["applied"], &dead[0]["lag"]), (&Value::Null, &Value::Null));
    }
    ask(&cluster, &home, &["health"]).exits(1);

    cluster.kill(1);
    let begun = Instant::now();
    loop {
        let status = ask(&cluster, &home, &["status", "--json"]);
        let object = status.json();
        let shards = object["databases"][0]["shards"].as_array().unwrap();
        if shards.iter().all(|shard| shard["leader"].is_null()) {
            assert!(shards.iter().all(|shard| shard["state"] == "unavailable"), "{object}");
            status.exits(1);
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(15), "{object}");
    }
    let table = ask(&cluster, &home, &["status", "db"]).exits(1).text();
    assert!(table.contains("4 shards have no leader"), "{table}");
    // Without a leader nothing is proposed: certainly not applied, and told in time. Only where the
    // deadline meets a request on its way the client can't know; that is no rule.
    for command in
        [&["get", "db", "k"][..], &["set", "db", "k", "newest"], &["cas", "db", "k", "--expect", "new", "x"]]
    {
        let certain = (0..5).any(|_| {
            let ended = ask(&cluster, &home, &[command, &["--timeout", "1s", "--json"]].concat());
            assert!(ended.took < Duration::from_secs(3), "{command:?}: {:?}", ended.took);
            if ended.code == Some(4) {
                assert_ne!(command[0], "get", "a read has no effect to be unsure about");
                assert_eq!(ended.json_error()["outcome"], "unknown");
                return false;
            }
            let error = ended.exits(3).json_error();
            assert_eq!((&error["retryable"], &error["outcome"]), (&json!(true), &json!("not_applied")));
            true
        });
        assert!(certain, "{command:?}");
    }
    ask(&cluster, &home, &["route", "db", "k"]).ok();

    cluster.kill(2);
    ask(&cluster, &home, &["status", "--timeout", "1s"]).exits(3);
    ask(&cluster, &home, &["health", "--timeout", "1s"]).exits(3);
    for node in 0..3 {
        cluster.spawn(node);
    }
    cluster.wait_all_ready();
    assert_eq!(ask(&cluster, &home, &["get", "db", "k"]).ok().text(), "new");
}

#[test]
fn a_client_on_a_peer_port_is_told_so() {
    let home = Home::new();
    let ports = PORTS.read().unwrap_or_else(|poisoned| poisoned.into_inner());
    let mut cluster = Cluster::new(1);
    cluster.wait_all_ready();
    drop(ports);
    let (peer, client) = (cluster.nodes[0].peer.clone(), cluster.nodes[0].client.clone());
    let error = home.run(&["status", "--cluster", &peer, "--timeout", "2s", "--json"]).exits(2).json_error();
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("peer port") && message.contains(&client), "{message}");
}

#[test]
fn a_local_cluster_that_hangs_is_named_and_can_be_killed() {
    let home = Home::with_cluster("db", 1, 1);
    home.run(&["set", "db", "k", "v"]).ok();
    let number = home.pid();
    let pid = Pid::from_raw(number as i32).unwrap();
    kill_process(pid, Signal::STOP).unwrap();
    let ended = home.run(&["stop"]).exits(1).says(&[&format!("kill -9 {number}")]);
    assert!(ended.took < Duration::from_secs(8), "{:?}", ended.took);
    kill_process(pid, Signal::KILL).unwrap();
    let held = PORTS.write().unwrap_or_else(|poisoned| poisoned.into_inner());
    let begun = Instant::now();
    while !home.processes().is_empty() {
        assert!(begun.elapsed() < Duration::from_secs(10));
        std::thread::sleep(Duration::from_millis(10));
    }
    home.run(&["setup", "db", "1", "1", "--detach"]).ok();
    drop(held);
    assert_eq!(home.run(&["get", "db", "k"]).ok().text(), "v");
    home.run(&["stop"]).ok();
}

#[test]
fn a_port_that_somebody_took_is_named() {
    let home = Home::with_cluster("db", 1, 1);
    let text = std::fs::read(home.data().join("cluster.json")).unwrap();
    let cluster: Value = serde_json::from_slice(&text).unwrap();
    let address = cluster["nodes"][0]["client"].as_str().unwrap();
    let held = PORTS.write().unwrap_or_else(|poisoned| poisoned.into_inner());
    home.run(&["stop"]).ok();
    let taken = TcpListener::bind(address).expect("the port is free after the stop");
    drop(held);
    let foreground = home.run(&["setup", "db", "1", "1"]).exits(2).says(&[address, "pontoon clean"]);
    assert_eq!(foreground.text(), "");
    // In the background the same is told by the process that returns.
    home.run(&["setup", "db", "1", "1", "--detach"]).exits(2).says(&[address, "pontoon clean"]);
    let error = home.run(&["setup", "db", "1", "1", "--detach", "--json"]).exits(2).json_error();
    assert!(error["message"].as_str().unwrap().contains(address), "{error}");
    drop(taken);
    assert_eq!(home.processes(), Vec::<u32>::new());
}

#[test]
fn a_detached_setup_that_is_interrupted_leaves_no_process() {
    let home = Home::new();
    let ports = PORTS.read().unwrap_or_else(|poisoned| poisoned.into_inner());
    let setup = home.spawn(&["setup", "db", "3", "64", "--detach"]);
    let begun = Instant::now();
    while !home.data().join("cluster.json").exists() {
        assert!(begun.elapsed() < HANG, "{}", setup.stderr());
        std::thread::sleep(Duration::from_millis(1));
    }
    setup.signal(Signal::INT);
    let ended = setup.end(Duration::from_secs(10));
    drop(ports);
    if ended.code == Some(0) {
        // It was ready in that moment.
        home.run(&["stop"]).ok();
    } else {
        ended.exits(3);
    }
    home.assert_nothing_left();
    home.run(&["clean", "--yes"]).ok();
}

/// Runs a command line on a terminal of its own, with something typed; output as the terminal shows it.
fn on_terminal(home: &Home, line: &str, typed: &str) -> crate::harness::Ended {
    let mut command = Command::new("script");
    home.environment(&mut command);
    command.args(["-qec", line, "/dev/null"]).stdin(Stdio::piped());
    let mut running = Running::spawn(command);
    let mut stdin = running.child.stdin.take().unwrap();
    stdin.write_all(typed.as_bytes()).unwrap();
    let ended = running.end(HANG);
    drop(stdin);
    ended
}

#[test]
#[cfg(target_os = "linux")]
fn on_a_terminal_get_ends_the_line_and_clean_asks() {
    let home = Home::with_cluster("db", 1, 1);
    home.run(&["set", "db", "k", "v"]).ok();
    let binary = env!("CARGO_BIN_EXE_pontoon");
    let got = on_terminal(&home, &format!("{binary} get db k"), "").ok();
    assert_eq!(got.text(), "v\r\n", "the terminal makes \\n two");
    home.run(&["stop"]).ok();

    let declined = on_terminal(&home, &format!("{binary} clean"), "n\n").exits(1);
    assert!(declined.text().contains("databases: db"), "it says what would go: {}", declined.text());
    assert!(home.data().join("cluster.json").exists());
    on_terminal(&home, &format!("{binary} clean"), "y\n").ok();
    assert!(!home.data().exists());
}
