//! Where the time of an operation goes, and what the nodes do for one: `trace` and `bench --explain`.

use serde_json::{Value, json};

use crate::harness::Home;

fn us(of: &Value, field: &str) -> u64 {
    of[field].as_u64().unwrap_or_else(|| panic!("no `{field}` in {of}"))
}

/// The stages in a row, by name.
fn stages(trace: &Value) -> Vec<(&str, u64)> {
    let stages = trace["stages"].as_array().expect("stages");
    stages.iter().map(|stage| (stage["stage"].as_str().expect("a name"), us(stage, "us"))).collect()
}

#[test]
fn the_stages_of_a_write_make_up_the_whole() {
    let home = Home::with_cluster("db", 3, 2);
    let trace = home.run(&["trace", "put", "db", "bob", "hello", "--json"]).ok().json();
    assert_eq!(home.run(&["get", "db", "bob"]).ok().text(), "hello", "it is a write like any other");
    assert_eq!(
        (&trace["operation"], &trace["database"], &trace["repeat"]),
        (&json!("put"), &json!("db"), &json!(1))
    );
    let stages = stages(&trace);
    let names: Vec<_> = stages.iter().map(|(name, _)| *name).collect();
    assert_eq!(names, ["client", "network", "router", "mailbox", "propose", "replicate", "apply", "reply"]);
    let (sum, total) = (stages.iter().map(|(_, us)| us).sum::<u64>(), us(&trace, "total_us"));
    // Each is rounded for itself.
    assert!(sum <= total && total - sum <= stages.len() as u64, "{sum} of {total}: {trace}");
    let replicate = stages[5].1;
    assert!(replicate > 0, "{trace}");

    let log = &trace["leader_log"];
    let parts = us(log, "wait_us") + us(log, "sync_us") + us(log, "told_us");
    assert!(us(log, "sync_us") > 0 && parts <= us(log, "whole_us"), "{trace}");
    let followers = trace["followers"].as_array().expect("followers");
    assert_eq!(followers.len(), 2, "{trace}");
    let in_time: Vec<_> = followers.iter().filter(|follower| follower["in_time"] == json!(1)).collect();
    assert!(!in_time.is_empty(), "the leader alone is no majority: {trace}");
    // Nor is it needed for one, if both others were faster.
    assert!(us(log, "whole_us") <= replicate + 1 || in_time.len() == 2, "{trace}");
    for follower in in_time {
        let parts = ["network_us", "wait_us", "sync_us", "rest_us"].map(|part| us(follower, part));
        assert!(parts.iter().sum::<u64>() <= us(follower, "whole_us") + 4, "{follower}");
        assert!(parts[2] > 0 && us(follower, "whole_us") <= replicate + 1, "{trace}");
        assert_ne!(follower["node"], trace["node"]);
    }

    // For people, and the median of many.
    let ended = home.run(&["trace", "put", "db", "bob", "again", "--repeat", "20"]).ok();
    let text = ended.text();
    for part in
        ["shard", "medians of 20", "mailbox", "replicate", "log sync", "leader on node", "follower on node"]
    {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(!text.contains('?'), "all is known: {text}");
    home.run(&["stop"]).ok();
}

#[test]
fn a_read_is_traced_and_mistakes_end_as_ever() {
    let home = Home::with_cluster("db", 3, 1);
    home.run(&["set", "db", "bob", "hello"]).ok();
    for key in ["bob", "nobody"] {
        let trace = home.run(&["trace", "get", "db", key, "--repeat", "5", "--json"]).ok().json();
        let names: Vec<_> = stages(&trace).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["client", "network", "router", "mailbox", "round", "read", "reply"], "{trace}");
        assert_eq!((&trace["leader_log"], &trace["followers"]), (&Value::Null, &json!([])));
        assert!(us(&trace, "total_us") > 0);
    }
    home.run(&["trace", "put", "nodb", "k", "v"]).exits(1).says(&["no database `nodb`"]);
    home.run(&["trace", "put", "db", "", "v"]).exits(2);
    home.run(&["trace", "put", "db", "k"]).exits(2);
    let closed = ["trace", "put", "db", "k", "v", "--cluster", "127.0.0.1:1", "--timeout", "300ms"];
    home.run(&closed).exits(3);
    home.run(&["stop"]).ok();
}

#[test]
fn a_benchmark_explains_what_an_operation_costs() {
    let home = Home::with_cluster("db", 3, 2);
    let bench = [
        "bench",
        "db",
        "--workload",
        "put",
        "--clients",
        "4",
        "--seconds",
        "1",
        "--warmup",
        "0",
        "--explain",
    ];
    let result = home.run(&[&bench[..], &["--json"]].concat()).ok().json();
    let explain = &result["explain"];
    // All nodes of a local cluster are one process, whose counters count once.
    assert_eq!((&explain["processes"], &explain["missing"]), (&json!(1), &json!([])));
    assert_eq!(explain["not_counted"].as_array().map(Vec::len), Some(1));
    let each = &explain["per_operation"];
    let figure = |name: &str| each[name].as_f64().unwrap_or_else(|| panic!("no `{name}` in {each}"));
    // What was under way at the begin or the end makes it a little more or less than one.
    assert!((0.8..1.5).contains(&figure("commands")), "{each}");
    for name in [
        "fsyncs",
        "log_writes",
        "log_entries",
        "log_bytes",
        "entries",
        "entries_applied",
        "readies",
        "messages",
        "frames",
        "peer_bytes",
    ] {
        assert!(figure(name) > 0.0, "{name}: {each}");
    }
    assert!(figure("log_bytes") > 128.0, "each value goes into three logs: {each}");
    assert!(each["messages_by_kind"]["append"].as_f64().is_some_and(|appends| appends > 0.0), "{each}");
    assert_eq!(figure("reads"), 0.0);
    #[cfg(target_os = "linux")]
    for name in ["read_calls", "write_calls", "switches_voluntary", "server_cpu_us", "client_cpu_us"] {
        assert!(figure(name) > 0.0, "{name}: {each}");
    }
    let text = home.run(&bench).ok().text();
    for part in ["for one operation", "syncs of files", "raft messages", "append", "server processes"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    // Without it nobody is asked.
    let plain =
        home.run(&["bench", "db", "--seconds", "1", "--warmup", "0", "--clients", "1", "--json"]).ok().json();
    assert_eq!(plain["explain"], Value::Null);
    home.run(&["stop"]).ok();
}
