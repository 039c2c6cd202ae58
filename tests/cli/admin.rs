//! What operators decide, on clusters of real processes.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::cluster::Cluster;
use crate::degraded::ask;
use crate::harness::{Home, PORTS, keys};

/// For what the cluster does by itself.
const PATIENCE: Duration = Duration::from_secs(60);

fn started(nodes: usize) -> (Home, Cluster) {
    let ports = PORTS.read().unwrap_or_else(|poisoned| poisoned.into_inner());
    let mut cluster = Cluster::new(nodes);
    cluster.wait_all_ready();
    drop(ports);
    (Home::new(), cluster)
}

fn list<'a>(value: &'a Value, field: &str) -> &'a Vec<Value> {
    value[field].as_array().unwrap_or_else(|| panic!("no list {field:?} in {value}"))
}

/// Asks until the answer is as wanted.
fn until(
    cluster: &Cluster,
    home: &Home,
    args: &[&str],
    what: &str,
    wanted: impl Fn(&Value) -> bool,
) -> Value {
    let begun = Instant::now();
    loop {
        let ended = ask(cluster, home, args);
        if matches!(ended.code, Some(0 | 1)) && wanted(&ended.json()) {
            return ended.json();
        }
        assert!(begun.elapsed() < PATIENCE, "not in time: {what}; {}{}", ended.text(), ended.errors());
        std::thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn three_nodes_are_listed_and_what_cant_be_is_refused_with_the_reason() {
    let (home, mut cluster) = started(3);
    ask(&cluster, &home, &["db", "create", "db", "3", "4"]).ok();
    ask(&cluster, &home, &["set", "db", "k", "v"]).ok();

    let nodes = ask(&cluster, &home, &["admin", "node", "list", "--json"]).ok().json();
    assert_eq!(list(&nodes, "nodes").len(), 3);
    for node in list(&nodes, "nodes") {
        assert_eq!(
            keys(node),
            [
                "id",
                "label",
                "address",
                "peer_address",
                "zone",
                "weight",
                "standing",
                "state",
                "up",
                "replicas",
                "leaders",
                "bytes",
                "disk_bytes"
            ]
        );
        assert_eq!(
            (&node["standing"], &node["up"], &node["replicas"]),
            (&"member".into(), &true.into(), &5.into())
        );
    }
    let error = ask(&cluster, &home, &["admin", "node", "remove", "3", "--json"]).exits(1).json_error();
    assert_eq!(error["code"], "node_in_use");
    assert!(error["message"].as_str().unwrap().contains("5 shards: 0 ((metadata)), 1 (db)"), "{error}");
    let error =
        ask(&cluster, &home, &["admin", "node", "remove", "3", "--dead", "--json"]).exits(1).json_error();
    assert_eq!(error["code"], "node_answers");
    ask(&cluster, &home, &["admin", "node", "drain", "9"]).exits(1).says(&["no node 9", "3 (n3)"]);
    ask(&cluster, &home, &["admin", "node", "add", "127.0.0.1:1"]).exits(1).says(&["cluster.join"]);
    ask(&cluster, &home, &["admin", "node", "add", &cluster.nodes[0].peer]).ok();

    // Its leadership goes, its replicas can't. That it drains was decided all the same.
    let error =
        ask(&cluster, &home, &["admin", "node", "drain", "3", "--wait", "--json"]).exits(1).last_json_error();
    let text = error["message"].as_str().unwrap();
    for part in ["node 3 (n3) drains; ", "stands still", "set-replicas"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert_eq!((&error["code"], &error["outcome"]), (&"stuck".into(), &"unknown".into()), "{error}");
    let left = ask(&cluster, &home, &["admin", "node", "drain", "3", "--json"]).ok().json();
    assert_eq!(
        keys(&left),
        ["node", "standing", "empty", "replicas", "leaders", "bytes", "rate", "eta_s", "obstacle"]
    );
    assert_eq!(
        (&left["replicas"], &left["leaders"], &left["rate"]),
        (&4.into(), &0.into(), &0.into()),
        "{left}"
    );
    let nodes = ask(&cluster, &home, &["admin", "node", "list", "--json"]).ok().json();
    let third = &list(&nodes, "nodes")[2];
    assert_eq!((&third["standing"], &third["leaders"]), (&"draining".into(), &0.into()), "{third}");
    ask(&cluster, &home, &["admin", "node", "drain", "3", "--cancel"]).ok();

    ask(&cluster, &home, &["admin", "database", "set-replicas", "db", "5"])
        .exits(1)
        .says(&["nodes that are up", "not 3"]);
    ask(&cluster, &home, &["admin", "database", "set-replicas", "none", "3"])
        .exits(1)
        .says(&["no database `none`"]);
    ask(&cluster, &home, &["admin", "transfer-leader", "db", "9", "1"])
        .exits(1)
        .says(&["no shard 9", "1, 2, 3, 4"]);
    for node in ["1", "2", "1"] {
        let moved =
            ask(&cluster, &home, &["admin", "transfer-leader", "db", "1", node, "--json"]).ok().json();
        assert_eq!(moved["leader"], node.parse::<u64>().unwrap());
    }
    ask(&cluster, &home, &["admin", "recover", "db", "1", "--from", "1"]).exits(1).says(&["isn't lost"]);
    assert_eq!(ask(&cluster, &home, &["get", "db", "k"]).ok().text(), "v");

    // Given up, whatever becomes of the command; and taken back.
    cluster.kill(2);
    let given_up =
        ask(&cluster, &home, &["admin", "node", "remove", "3", "--dead", "--timeout", "8s", "--json"]);
    assert!(matches!(given_up.code, Some(1 | 4)), "{given_up:?}");
    let error = given_up.last_json_error();
    assert_eq!(error["outcome"], "unknown", "{error}");
    assert!(error["message"].as_str().unwrap().contains("node 3 (n3) is given up; "), "{error}");
    let nodes = ask(&cluster, &home, &["admin", "node", "list", "--json"]).ok().json();
    assert_eq!(list(&nodes, "nodes")[2]["standing"], "leaving");
    let back = ask(&cluster, &home, &["admin", "node", "drain", "3", "--cancel", "--json"]).ok().json();
    assert_eq!(back["standing"], "member");
    let nodes = ask(&cluster, &home, &["admin", "node", "list", "--json"]).ok().json();
    assert_eq!(list(&nodes, "nodes")[2]["standing"], "member");
}

#[test]
fn settings_of_the_cluster_are_read_and_changed() {
    let (home, cluster) = started(1);
    let all = ask(&cluster, &home, &["admin", "settings", "get", "--json"]).ok().json();
    for setting in list(&all, "settings") {
        assert_eq!(keys(setting), ["key", "value", "default", "unit", "meaning"]);
        assert_eq!(setting["value"], setting["default"], "{setting}");
    }
    assert_eq!(list(&all, "settings").len(), 5);
    let changed =
        ask(&cluster, &home, &["admin", "settings", "set", "placement.replace_after", "30m", "--json"])
            .ok()
            .json();
    assert_eq!((&changed["value"], &changed["before"]), (&1_800_000.into(), &600_000.into()));
    assert_eq!(
        ask(&cluster, &home, &["admin", "settings", "get", "placement.replace_after"]).ok().text(),
        "30m\n"
    );
    ask(&cluster, &home, &["admin", "settings", "set", "join.approve", "on"]).ok();
    assert_eq!(ask(&cluster, &home, &["admin", "settings", "get", "join.approve"]).ok().text(), "on\n");
    ask(&cluster, &home, &["admin", "settings", "set", "placement.moves_at_a_time", "0"])
        .exits(2)
        .says(&["1 to 1024"]);
    ask(&cluster, &home, &["admin", "settings", "set", "placement.replace_after", "0s"]).ok();
    assert_eq!(
        ask(&cluster, &home, &["admin", "settings", "get", "placement.replace_after"]).ok().text(),
        "never\n"
    );
}

#[test]
fn nodes_join_take_their_share_and_go_again() {
    let (home, mut cluster) = started(1);
    ask(&cluster, &home, &["db", "create", "db", "1", "8"]).ok();
    ask(&cluster, &home, &["mset", "db", "a", "1", "b", "2", "c", "3"]).ok();
    ask(&cluster, &home, &["admin", "settings", "set", "placement.automatic", "off"]).ok();
    let nothing = ask(&cluster, &home, &["admin", "rebalance", "start", "--json"]).ok().json();
    assert_eq!((&nothing["started"], &nothing["plan_id"]), (&false.into(), &Value::Null));
    ask(&cluster, &home, &["admin", "rebalance", "pause"]).exits(1).says(&["no rebalancing is under way"]);
    ask(&cluster, &home, &["admin", "rebalance", "undo"]).exits(1).says(&["no rebalancing yet"]);

    let ports = PORTS.read().unwrap_or_else(|poisoned| poisoned.into_inner());
    let second = cluster.join();
    drop(ports);
    let there = |nodes: &Value| list(nodes, "nodes").len() == 2;
    until(&cluster, &home, &["admin", "node", "list", "--json"], "the second node is there", there);
    let plan = until(&cluster, &home, &["admin", "rebalance", "plan", "--json"], "there is a plan", |plan| {
        plan["total"]["moves"] == 4
    });
    assert_eq!(keys(&plan), ["plan_id", "map_version", "moves", "total", "minimum", "shards_left", "silent"]);
    assert_eq!(
        (keys(&plan["total"]), keys(&plan["minimum"])),
        (vec!["moves", "bytes", "keys"], vec!["moves"])
    );
    for one in list(&plan, "moves") {
        assert_eq!(keys(one), ["shard", "from", "to", "kind", "bytes", "keys"]);
    }
    let id = plan["plan_id"].as_str().unwrap().to_owned();
    ask(&cluster, &home, &["admin", "rebalance", "start", "123456789abcdef0"]).exits(1).says(&["stale"]);
    ask(&cluster, &home, &["admin", "rebalance", "start", &id, "--wait"]).ok();
    let status = ask(&cluster, &home, &["admin", "rebalance", "status", "--json"]).ok().json();
    assert_eq!(keys(&status)[..7], ["state", "done", "total", "bytes_done", "bytes_total", "rate", "eta_s"]);
    assert_eq!((&status["state"], &status["done"], &status["total"]), (&"idle".into(), &4.into(), &4.into()));
    assert_eq!(status["plan_id"], id);
    let replicas = |node: usize| {
        let nodes = ask(&cluster, &home, &["admin", "node", "list", "--json"]).ok().json();
        let of_metadata = 1;
        list(&nodes, "nodes")[node]["replicas"].as_u64().unwrap() - of_metadata * u64::from(node == 0)
    };
    assert_eq!((replicas(0), replicas(1)), (4, 4));
    ask(&cluster, &home, &["admin", "rebalance", "undo", "--wait"]).ok();
    assert_eq!((replicas(0), replicas(1)), (8, 0));
    ask(&cluster, &home, &["admin", "rebalance", "start", "--wait"]).ok();

    let set = ask(&cluster, &home, &["admin", "database", "set-replicas", "db", "2", "--json"]).ok().json();
    assert_eq!((&set["replicas"], &set["before"]), (&2.into(), &1.into()));
    ask(&cluster, &home, &["admin", "database", "set-replicas", "db", "1"]).ok();
    let drained = ask(&cluster, &home, &["admin", "node", "drain", "2", "--wait", "--json"]).ok().json();
    assert_eq!((&drained["empty"], &drained["replicas"]), (&true.into(), &0.into()));
    ask(&cluster, &home, &["admin", "node", "remove", "2"]).ok();
    ask(&cluster, &home, &["admin", "node", "remove", "2"]).ok();
    assert_eq!(cluster.wait_exit(second, PATIENCE).code(), Some(1), "it was removed for good");
    let nodes = ask(&cluster, &home, &["admin", "node", "list", "--json"]).ok().json();
    assert_eq!(list(&nodes, "nodes").len(), 1);
    let status = ask(&cluster, &home, &["status", "--json"]).ok().json();
    assert_eq!(list(&status, "nodes").len(), 1, "{status}");
    let nodes = ask(&cluster, &home, &["admin", "node", "list", "--all", "--json"]).ok().json();
    assert_eq!(list(&nodes, "nodes")[1]["standing"], "removed");
    assert_eq!(ask(&cluster, &home, &["mget", "db", "a", "b", "c"]).ok().text(), "a\t1\nb\t2\nc\t3\n");
}

/// The nodes of each shard of a database.
fn shards(status: &Value) -> Vec<(u64, Vec<u64>)> {
    let of = |shard: &Value| {
        let nodes = list(shard, "replicas").iter().map(|replica| replica["node"].as_u64().unwrap());
        (shard["id"].as_u64().unwrap(), nodes.collect())
    };
    list(&list(status, "databases")[0], "shards").iter().map(of).collect()
}

#[test]
fn a_shard_that_lost_its_majority_goes_on_with_what_is_left() {
    let (home, mut cluster) = started(5);
    ask(&cluster, &home, &["admin", "settings", "set", "placement.replace_after", "never"]).ok();
    ask(&cluster, &home, &["db", "create", "db", "1", "8"]).ok();
    let names: Vec<String> = (0..40).map(|n| format!("k{n}")).collect();
    let pairs: Vec<&str> = names.iter().flat_map(|name| [name.as_str(), "value"]).collect();
    ask(&cluster, &home, &[&["mset", "db"], &pairs[..]].concat()).ok();
    // The second and third replicas begin with snapshots: so the members are in the states on disk.
    ask(&cluster, &home, &["admin", "database", "set-replicas", "db", "3"]).ok();
    // So that every replica has everything: what the others alone had would be lost.
    let caught_up = |status: &Value| {
        let shards = list(&list(status, "databases")[0], "shards");
        shards.iter().flat_map(|shard| list(shard, "replicas")).all(|replica| replica["lag"] == 0)
    };
    let status = until(&cluster, &home, &["status", "db", "--json"], "all replicas have all", caught_up);
    let both = |nodes: &[u64], a, b| nodes.contains(&a) && nodes.contains(&b);
    let pairs = (1..=5).flat_map(|a| (1..a).map(move |b| (a, b)));
    let lost = |(a, b): &(u64, u64)| shards(&status).iter().filter(|(_, nodes)| both(nodes, *a, *b)).count();
    let (a, b) = pairs.max_by_key(lost).unwrap();
    for node in [a, b] {
        cluster.kill(node as usize - 1);
    }
    let left: Vec<(u64, u64)> = shards(&status)
        .iter()
        .filter(|(_, nodes)| both(nodes, a, b))
        .map(|(shard, nodes)| (*shard, *nodes.iter().find(|node| ![a, b].contains(*node)).unwrap()))
        .collect();
    assert!(!left.is_empty(), "{status}");
    for (at, (shard, node)) in left.iter().enumerate() {
        let (shard, node) = (shard.to_string(), node.to_string());
        let recover = ["admin", "recover", "db", &shard, "--from", &node];
        let shown = ask(&cluster, &home, &[&recover[..], &["--json"]].concat()).exits(1).json();
        assert_eq!((&shown["done"], list(&shown, "gone").len()), (&false.into(), 2), "{shown}");
        let report = home.file(&format!("report-{at}.json"));
        let accept = ["--accept-data-loss", "--report", report.to_str().unwrap()];
        ask(&cluster, &home, &[&recover[..], &accept].concat()).ok();
        let report: Value = serde_json::from_slice(&std::fs::read(&report).unwrap()).unwrap();
        assert_eq!(report["kept"]["node"].to_string(), node);
        assert_eq!((&report["done"], list(&report, "gone").len()), (&true.into(), 2), "{report}");
        // It isn't lost any more: that is done, as it says as long as the shard hasn't grown again.
        let again = ask(&cluster, &home, &recover);
        assert!(matches!(again.code, Some(0 | 1)), "{again:?}");
    }
    assert_eq!(values(&cluster, &home, &names), names.len());
    // Replicas are added again on nodes that are up, and the old ones go when their nodes come back.
    for node in [a, b] {
        cluster.spawn(node as usize - 1);
    }
    for node in [a, b] {
        cluster.wait_ready(node as usize - 1);
    }
    let whole = |status: &Value| {
        let shards = list(&list(status, "databases")[0], "shards");
        shards.iter().all(|shard| shard["state"] == "ok" && list(shard, "replicas").len() == 3)
    };
    until(&cluster, &home, &["status", "db", "--json"], "each shard has three replicas", whole);
    assert_eq!(values(&cluster, &home, &names), names.len());
    ask(&cluster, &home, &["set", "db", "k0", "new"]).ok();
    assert_eq!(ask(&cluster, &home, &["get", "db", "k0"]).ok().text(), "new");
}

/// How many of these keys have the value that they were given.
fn values(cluster: &Cluster, home: &Home, names: &[String]) -> usize {
    let names = names.iter().map(String::as_str);
    let got = ask(cluster, home, &["mget", "db"].into_iter().chain(names).collect::<Vec<_>>()).ok();
    got.text().lines().filter(|line| line.ends_with("\tvalue")).count()
}

#[test]
fn one_of_three_nodes_is_left_and_goes_on() {
    let (home, mut cluster) = started(3);
    ask(&cluster, &home, &["db", "create", "db", "3", "2"]).ok();
    ask(&cluster, &home, &["mset", "db", "a", "1", "b", "2", "c", "3"]).ok();
    let caught_up = |status: &Value| {
        let shards = list(&list(status, "databases")[0], "shards").iter().chain([&status["metadata"]]);
        shards.flat_map(|shard| list(shard, "replicas")).all(|replica| replica["lag"] == 0)
    };
    until(&cluster, &home, &["status", "--json"], "all replicas have all", caught_up);
    cluster.kill(0);
    cluster.kill(1);
    let recover = |db: &str, shard: &str, timeout: &str, more: &[&str]| {
        let report = home.file(&format!("report-{shard}.json"));
        let line = ["admin", "recover", db, shard, "--from", "3", "--timeout", timeout];
        let more = more.iter().map(|word| if *word == "FILE" { report.to_str().unwrap() } else { word });
        ask(&cluster, &home, &line.into_iter().chain(more).collect::<Vec<_>>())
    };
    let accept = ["--accept-data-loss", "--report", "FILE"];
    recover("(metadata)", "0", "20s", &[]).exits(1).says(&["nothing was changed"]);
    // Nobody decides anything before that, and no report is left of what wasn't done.
    let early = recover("db", "1", "2s", &accept);
    assert!(matches!(early.code, Some(1 | 3 | 4)), "{early:?}");
    assert_eq!(home.file("report-1.json").exists(), early.code == Some(4));
    std::fs::remove_file(home.file("report-1.json")).ok();
    recover("(metadata)", "0", "20s", &accept).ok();
    // In doubt, the same again tells, and keeps to its file.
    let again = recover("(metadata)", "0", "20s", &[]).ok();
    assert!(again.text().contains("decided, and done"), "{again:?}");
    recover("(metadata)", "0", "20s", &accept).ok();
    for shard in ["1", "2"] {
        recover("db", shard, "20s", &accept).ok();
    }
    assert_eq!(ask(&cluster, &home, &["mget", "db", "a", "b", "c"]).ok().text(), "a\t1\nb\t2\nc\t3\n");
    ask(&cluster, &home, &["set", "db", "a", "4"]).ok();
    let version = ask(&cluster, &home, &["get", "db", "a", "--json"]).ok().json()["version"].clone();
    assert!(version.as_u64() > Some(1 << 32), "{version}");
    ask(&cluster, &home, &["admin", "settings", "set", "placement.replace_after", "1h"]).ok();

    // It outlives a restart, and grows again: with one more node there is a second copy of everything.
    cluster.kill(2);
    cluster.spawn(2);
    cluster.wait_ready(2);
    assert_eq!(ask(&cluster, &home, &["get", "db", "a"]).ok().text(), "4");
    let serve = |copies: usize| {
        move |status: &Value| {
            let shards = list(&list(status, "databases")[0], "shards").iter().chain([&status["metadata"]]);
            let serving = |shard| list(shard, "replicas").iter().filter(|r| r["state"] == "serving").count();
            shards.map(serving).all(|serving| serving == copies)
        }
    };
    for copies in [2, 3] {
        let ports = PORTS.read().unwrap_or_else(|poisoned| poisoned.into_inner());
        cluster.join();
        drop(ports);
        let what = format!("{copies} replicas of each shard");
        until(&cluster, &home, &["status", "--json"], &what, serve(copies));
        assert_eq!(ask(&cluster, &home, &["mget", "db", "a", "b", "c"]).ok().text(), "a\t4\nb\t2\nc\t3\n");
    }
}
