//! The local cluster's life: setup, stop, clean.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;

use crate::harness::{HANG, Home, PORTS};

fn cluster_json(home: &Home) -> Value {
    serde_json::from_slice(&fs::read(home.data().join("cluster.json")).unwrap()).unwrap()
}

fn ports(cluster: &Value) -> Vec<String> {
    let nodes = cluster["nodes"].as_array().unwrap().iter();
    nodes.flat_map(|node| [node["client"].to_string(), node["peer"].to_string()]).collect()
}

/// Stops and runs `setup` again, while nobody else takes ports.
fn restart(home: &Home, setup: &[&str]) {
    let _ports = PORTS.write().unwrap_or_else(|poisoned| poisoned.into_inner());
    let stopped = home.run(&["stop"]).ok();
    assert!(stopped.took < Duration::from_secs(6), "{:?}", stopped.took);
    home.run(setup).ok();
}

#[test]
fn foreground_prints_nodes_shards_and_ready_and_ends_on_ctrl_c() {
    let home = Home::new();
    let server = home.foreground(&["setup", "testDB", "3", "5"]);
    let shown = server.stdout();
    assert!(shown.ends_with("\nready\n"), "{shown}");
    let cluster = cluster_json(&home);
    assert_eq!(cluster["version"], 1);
    assert_eq!(cluster["pid"], server.child.id());
    assert_eq!(cluster["databases"][0]["name"], "testDB");
    assert!(shown.contains(cluster["cluster_id"].as_str().unwrap()), "{shown}");
    for node in cluster["nodes"].as_array().unwrap() {
        assert!(shown.contains(node["client"].as_str().unwrap()), "{shown}");
    }
    let shards: Vec<&str> = shown.lines().filter(|line| line.contains("│ testDB ")).collect();
    assert_eq!(shards.len(), 5, "{shown}");
    assert!(shards.iter().all(|line| line.contains("(127.0.0.1:")), "each has a leader:\n{shown}");

    let asked = Instant::now();
    server.signal(Signal::INT);
    let ended = server.end(Duration::from_secs(10)).ok();
    assert!(asked.elapsed() < Duration::from_secs(5), "{:?}", asked.elapsed());
    assert_eq!(ended.errors(), "", "a clean stop has nothing to complain about");
    assert_eq!(cluster_json(&home)["pid"], Value::Null);
    home.run(&["get", "testDB", "k", "--timeout", "2s"]).exits(3).says(&["pontoon setup testDB 3 5"]);
    home.assert_nothing_left();
}

#[test]
fn sigterm_ends_a_foreground_cluster_too() {
    let home = Home::new();
    let server = home.foreground(&["setup", "testDB", "1", "1"]);
    server.signal(Signal::TERM);
    server.end(Duration::from_secs(5)).ok();
    home.assert_nothing_left();
}

#[test]
fn ctrl_c_while_it_starts_ends_it_within_five_seconds() {
    let home = Home::new();
    for wait in [20, 150, 400] {
        let ports = PORTS.read().unwrap_or_else(|poisoned| poisoned.into_inner());
        let server = home.spawn(&["setup", "testDB", "3", "5"]);
        // The file is written before the nodes start.
        let begun = Instant::now();
        while !home.data().join("lock").exists() {
            assert!(begun.elapsed() < HANG, "{}", server.stderr());
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(wait));
        server.signal(Signal::INT);
        server.end(Duration::from_secs(6)).ok();
        drop(ports);
        home.run(&["clean", "--yes"]).ok();
    }
    home.assert_nothing_left();
}

#[test]
fn detached_it_serves_until_it_is_stopped_and_comes_back_with_data_and_ports() {
    let home = Home::new();
    // Also when none runs, and none ever did.
    home.run(&["stop"]).ok();
    assert!(!home.data().exists());

    let setup = ["setup", "testDB", "3", "4", "--detach"];
    let started = home.start(&setup).ok();
    assert!(started.text().ends_with("\nready\n"), "{}", started.text());
    let before = cluster_json(&home);
    assert_eq!(home.processes(), [home.pid()], "one process serves");
    assert!(home.data().join("logs").is_dir());
    for i in 0..20 {
        home.run(&["set", "testDB", &format!("key{i}"), &format!("value{i}")]).ok();
    }
    restart(&home, &setup);
    let after = cluster_json(&home);
    assert_eq!(before["cluster_id"], after["cluster_id"]);
    assert_eq!(ports(&before), ports(&after));
    for i in 0..20 {
        let got = home.run(&["get", "testDB", &format!("key{i}")]).ok();
        assert_eq!(got.text(), format!("value{i}"));
    }
    let stopped = home.run(&["stop"]).ok();
    assert!(stopped.took < Duration::from_secs(6), "{:?}", stopped.took);
    home.assert_nothing_left();
    home.run(&["stop"]).ok();
}

#[test]
fn a_killed_cluster_comes_back_too() {
    let home = Home::with_cluster("testDB", 3, 2);
    home.run(&["set", "testDB", "bob", "hello"]).ok();
    let held = PORTS.write().unwrap_or_else(|poisoned| poisoned.into_inner());
    let pid = rustix::process::Pid::from_raw(home.pid() as i32).unwrap();
    rustix::process::kill_process(pid, Signal::KILL).unwrap();
    let begun = Instant::now();
    while !home.processes().is_empty() {
        assert!(begun.elapsed() < Duration::from_secs(10));
        std::thread::sleep(Duration::from_millis(10));
    }
    // Nobody holds it, whatever `cluster.json` still says.
    home.run(&["stop"]).ok();
    home.run(&["get", "testDB", "bob"]).exits(3).says(&["not running", "pontoon setup testDB 3 2"]);
    home.run(&["setup", "testDB", "3", "2", "--detach"]).ok();
    drop(held);
    assert_eq!(home.run(&["get", "testDB", "bob"]).ok().text(), "hello");
    home.run(&["stop"]).ok();
}

#[test]
fn further_databases_go_to_the_running_cluster() {
    let home = Home::with_cluster("one", 3, 2);
    let pid = home.pid();
    // The same numbers again, in the foreground: nothing to serve, so it returns.
    for detach in [&["setup", "one", "3", "2"][..], &["setup", "one", "3", "2", "--detach"]] {
        let again = home.run(detach).ok();
        assert!(again.text().ends_with("ready\n"), "{}", again.text());
    }
    // Other numbers: both are shown.
    home.run(&["setup", "one", "3", "5"])
        .exits(1)
        .says(&["3 replicas and 2 shards", "3 replicas and 5 shards"]);
    home.run(&["setup", "one", "1", "2"])
        .exits(1)
        .says(&["3 replicas and 2 shards", "1 replica and 2 shards"]);
    // A second one.
    home.run(&["setup", "two", "1", "3"]).ok();
    home.run(&["set", "two", "k", "v"]).ok();
    assert_eq!(home.run(&["get", "two", "k"]).ok().text(), "v");
    home.run(&["get", "one", "k"]).exits(1);
    assert_eq!(home.pid(), pid, "one process serves both");
    // More replicas than the cluster has nodes.
    home.run(&["setup", "three", "5", "1"]).exits(2).says(&["5 replicas", "has 3 nodes"]);
    home.run(&["setup", "one", "5", "2"])
        .exits(1)
        .says(&["3 replicas and 2 shards", "5 replicas and 2 shards"]);
    // By address: with `--cluster` nothing local is looked at.
    let address = cluster_json(&home)["nodes"][1]["client"].as_str().unwrap().to_owned();
    let other = Home::new();
    other.run(&["setup", "four", "2", "2", "--cluster", &address]).ok();
    other
        .run(&["setup", "four", "2", "3", "--cluster", &address])
        .exits(1)
        .says(&["2 replicas and 2 shards", "2 replicas and 3 shards"]);
    assert!(!other.data().exists());

    // `cluster.json` follows.
    let begun = Instant::now();
    loop {
        let names: Vec<String> = cluster_json(&home)["databases"]
            .as_array()
            .unwrap()
            .iter()
            .map(|db| db["name"].as_str().unwrap().to_owned())
            .collect();
        if names == ["four", "one", "two"] {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(5), "{names:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
    // Which answers for a cluster that doesn't run.
    home.run(&["stop"]).ok();
    home.run(&["setup", "two", "3", "3"])
        .exits(1)
        .says(&["1 replica and 3 shards", "3 replicas and 3 shards"]);
    assert_eq!(home.processes(), Vec::<u32>::new());
}

#[test]
fn cluster_json_is_put_right_while_the_cluster_runs() {
    let home = Home::with_cluster("db", 1, 1);
    let path = home.data().join("cluster.json");
    let right = cluster_json(&home);
    // That of another time, with other ports; garbage; none at all.
    let mut stale = right.clone();
    stale["nodes"][0]["client"] = "127.0.0.1:9".into();
    for wrong in [Some(stale.to_string()), Some("{".into()), None] {
        match &wrong {
            Some(text) => std::fs::write(&path, text).unwrap(),
            None => std::fs::remove_file(&path).unwrap(),
        }
        let begun = Instant::now();
        while std::fs::read(&path).ok().and_then(|text| serde_json::from_slice(&text).ok())
            != Some(right.clone())
        {
            assert!(begun.elapsed() < Duration::from_secs(10), "{wrong:?} stays");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    home.run(&["set", "db", "k", "v"]).ok();
    let created = home.run(&["db", "create", "one", "1", "1"]).ok();
    assert_eq!(created.text(), "created database one with 1 replica and 1 shard\n");
    home.run(&["stop"]).ok();
}

#[test]
fn two_setups_at_once_make_one_cluster() {
    let home = Home::new();
    let held = PORTS.read().unwrap_or_else(|poisoned| poisoned.into_inner());
    let one = home.spawn(&["setup", "one", "3", "2", "--detach"]);
    let two = home.spawn(&["setup", "two", "3", "2", "--detach"]);
    one.end(HANG).ok();
    two.end(HANG).ok();
    drop(held);
    // The one that found a cluster ends a moment after it has said so.
    let begun = Instant::now();
    while home.processes() != [home.pid()] {
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", home.processes());
        std::thread::sleep(Duration::from_millis(20));
    }
    let list = home.run(&["db", "list", "--json"]).ok().json();
    let names: Vec<_> = list["databases"].as_array().unwrap().iter().map(|db| &db["name"]).collect();
    assert_eq!(names, ["one", "two"]);
    home.run(&["stop"]).ok();
    home.assert_nothing_left();
}

#[test]
fn more_nodes_than_replicas() {
    let home = Home::new();
    home.run(&["setup", "testDB", "3", "1", "--nodes", "2"]).exits(2).says(&["--nodes 3"]);
    assert!(!home.data().exists(), "nothing was created");
    home.start(&["setup", "testDB", "1", "8", "--nodes", "4", "--detach"]).ok();
    let status = home.run(&["status", "--json"]).ok().json();
    assert_eq!(status["nodes"].as_array().unwrap().len(), 4);
    home.run(&["setup", "testDB", "1", "8", "--nodes", "3"]).exits(2).says(&["4 nodes"]);
    home.run(&["stop"]).ok();
}

#[test]
fn databases_are_listed_created_and_dropped() {
    let home = Home::with_cluster("one", 1, 1);
    home.run(&["db", "create", "two", "1", "3"]).ok();
    home.run(&["db", "create", "two", "1", "3"]).ok();
    home.run(&["db", "create", "two", "1", "4"]).exits(1).says(&["3 shards", "4 shards"]);
    let refused = home.run(&["db", "create", "three", "2", "4", "--json"]).exits(1).json_error();
    assert!(refused["message"].as_str().unwrap().contains("2 replicas"), "{refused}");
    let list = home.run(&["db", "list", "--json"]).ok().json();
    assert_eq!(list["databases"][1], serde_json::json!({"name": "two", "replicas": 1, "shards": 3}));
    let table = home.run(&["db", "list"]).ok().text();
    assert!(table.contains("one") && table.contains("two"), "{table}");

    home.run(&["set", "two", "k", "old"]).ok();
    home.run(&["db", "drop", "two"]).exits(2).says(&["--yes"]);
    assert_eq!(home.run(&["get", "two", "k"]).ok().text(), "old");
    home.run(&["db", "drop", "two", "--yes"]).ok();
    home.run(&["get", "two", "k"]).exits(1).says(&["no database `two`"]);
    home.run(&["db", "drop", "two", "--yes"]).exits(1).says(&["no database `two`"]);
    // One of the same name is another one.
    home.run(&["db", "create", "two", "1", "2"]).ok();
    home.run(&["get", "two", "k"]).exits(1).says(&["no key `k`"]);
    home.run(&["stop"]).ok();
}

#[test]
fn clean_keeps_its_hands_off_what_runs_and_what_is_foreign() {
    let home = Home::new();
    home.run(&["clean"]).ok();
    home.run(&["clean", "--yes"]).ok();
    home.start(&["setup", "testDB", "1", "2", "--detach"]).ok();
    home.run(&["set", "testDB", "k", "v"]).ok();
    let pid = home.pid().to_string();
    home.run(&["clean"]).exits(1).says(&[&pid, "pontoon stop"]);
    home.run(&["clean", "--yes"]).exits(1).says(&[&pid, "pontoon stop"]);
    let error = home.run(&["clean", "--yes", "--json"]).exits(1).json_error();
    assert_eq!(error["code"], "running");
    assert_eq!(home.run(&["get", "testDB", "k"]).ok().text(), "v");
    home.run(&["stop"]).ok();
    home.run(&["clean"]).exits(2).says(&["--yes"]);
    assert!(home.data().join("cluster.json").exists());
    fs::write(home.data().join("notes.txt"), "mine").unwrap();
    // Another cluster was named: no reason to remove this one.
    for command in [&["clean", "--yes"][..], &["stop"]] {
        home.run(&[command, &["--cluster", "127.0.0.1:1"]].concat()).exits(2).says(&["--cluster", "--data"]);
    }
    assert!(home.data().join("nodes/n1").exists());
    fs::create_dir(home.data().join("nodes/mine")).unwrap();
    fs::write(home.data().join("nodes/mine/chapter.tex"), "years of work").unwrap();
    home.run(&["clean", "--yes"]).ok().says(&["left", "notes.txt", "nodes/mine"]);
    assert_eq!(names(&home.data()), ["nodes", "notes.txt"], "what is a stranger's stays, and nothing else");
    assert_eq!(names(&home.data().join("nodes")), ["mine"]);

    // A directory without our identity is never touched.
    let foreign = home.file("thesis");
    fs::create_dir_all(foreign.join("nodes/n1")).unwrap();
    fs::create_dir(foreign.join("logs")).unwrap();
    fs::write(foreign.join("nodes/n1/chapter.tex"), "years of work").unwrap();
    let data = foreign.to_str().unwrap();
    home.run(&["clean", "--yes", "--data", data]).ok();
    home.run(&["setup", "testDB", "1", "1", "--data", data]).exits(2).says(&["nodes", "--data"]);
    fs::write(foreign.join("cluster.json"), r#"{"clusters": 5}"#).unwrap();
    home.run(&["clean", "--yes", "--data", data]).exits(2);
    home.run(&["setup", "testDB", "1", "1", "--data", data]).exits(2);
    assert_eq!(fs::read_to_string(foreign.join("nodes/n1/chapter.tex")).unwrap(), "years of work");
    assert_eq!(names(&foreign), ["cluster.json", "logs", "nodes"]);
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
