//! What the cluster tells of itself, and what the program tells of itself.

use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;

use crate::cluster::free_ports;
use crate::harness::{Home, PORTS, keys};

fn with_keys<'a>(object: &'a Value, expected: &[&str]) -> &'a Value {
    let have = keys(object);
    for key in expected {
        assert!(have.contains(key), "no {key:?} in {object}");
    }
    object
}

#[test]
fn status_in_json_has_the_documented_shape() {
    let home = Home::with_cluster("one", 3, 4);
    home.run(&["db", "create", "two", "1", "2"]).ok();
    let status = home.run(&["status", "--json"]).ok().json();
    with_keys(&status, &["cluster_id", "nodes", "databases"]);
    assert!(status["cluster_id"].as_str().is_some_and(|id| id.len() == 32), "{status}");
    let nodes = status["nodes"].as_array().unwrap();
    assert_eq!(nodes.len(), 3);
    let (mut leaders, mut replicas) = (0, 0);
    for node in nodes {
        with_keys(node, &["id", "address", "zone", "state", "leaders", "replicas", "disk_bytes"]);
        assert!(node["id"].is_u64() && node["address"].is_string() && node["zone"].is_string(), "{node}");
        assert_eq!(node["state"], "ready");
        assert!(node["disk_bytes"].as_u64().is_some_and(|bytes| bytes > 0), "{node}");
        leaders += node["leaders"].as_u64().unwrap();
        replicas += node["replicas"].as_u64().unwrap();
    }
    // 4 shards of 3, 2 of 1, and the metadata shard.
    assert_eq!((leaders, replicas), (4 + 2 + 1, 12 + 2 + 3));

    let databases = status["databases"].as_array().unwrap();
    let names: Vec<_> = databases.iter().map(|db| db["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["one", "two"]);
    for (database, (copies, count)) in databases.iter().zip([(3, 4), (1, 2)]) {
        with_keys(database, &["name", "replicas", "shards"]);
        assert_eq!(database["replicas"], copies);
        let shards = database["shards"].as_array().unwrap();
        assert_eq!(shards.len(), count);
        let mut next = Some(0_u64);
        for shard in shards {
            with_keys(shard, &["id", "start", "end", "epoch", "leader", "state", "replicas"]);
            let position = |field: &str| u64::from_str_radix(shard[field].as_str().unwrap(), 16).unwrap();
            assert_eq!(Some(position("start")), next, "the shards cover the ring without a gap");
            next = position("end").checked_add(1);
            assert_eq!(shard["state"], "ok");
            let replicas = shard["replicas"].as_array().unwrap();
            assert_eq!(replicas.len(), copies as usize);
            for replica in replicas {
                with_keys(replica, &["node", "role", "state", "applied", "lag"]);
                assert_eq!(replica["state"], "serving");
                assert!(replica["applied"].is_u64() && replica["lag"].is_u64(), "{replica}");
            }
            let leads: Vec<_> = replicas.iter().filter(|replica| replica["role"] == "leader").collect();
            assert_eq!(leads.len(), 1, "{shard}");
            assert_eq!(leads[0]["node"], shard["leader"]);
        }
        assert_eq!(next, None, "up to the end of the ring");
    }

    let one = home.run(&["status", "two", "--json"]).ok().json();
    assert_eq!(one["databases"].as_array().unwrap().len(), 1);
    let table = home.run(&["status", "one"]).ok().text();
    assert!(table.contains("│ one ") && !table.contains("│ two "), "{table}");
    home.run(&["status", "three"]).exits(1).says(&["no database `three`", "one, two"]);
    home.run(&["stop"]).ok();
}

#[test]
fn route_says_where_a_key_belongs() {
    let home = Home::with_cluster("db", 3, 8);
    home.run(&["set", "db", "bob", "hello"]).ok();
    let route = home.run(&["route", "db", "bob", "--json"]).ok().json();
    with_keys(&route, &["hash", "shard", "range", "replicas", "leader"]);
    let number = |value: &Value| u64::from_str_radix(value.as_str().unwrap(), 16).unwrap();
    let hash = number(&route["hash"]);
    assert!((number(&route["range"]["start"])..=number(&route["range"]["end"])).contains(&hash), "{route}");
    assert_eq!(route["replicas"].as_array().unwrap().len(), 3);
    assert!(route["replicas"].as_array().unwrap().contains(&route["leader"]), "{route}");
    // The same in `status`: the shard, its range, its leader.
    let status = home.run(&["status", "db", "--json"]).ok().json();
    let shards = status["databases"][0]["shards"].as_array().unwrap();
    let shard = shards.iter().find(|shard| shard["id"] == route["shard"]).expect("the shard");
    assert_eq!(shard["start"], route["range"]["start"]);
    assert_eq!(shard["leader"], route["leader"]["node"]);

    let text = home.run(&["route", "db", "bob"]).ok().text();
    for part in ["hash", "shard", "range", "replicas", "leader", route["hash"].as_str().unwrap()] {
        assert!(text.contains(part), "{part}:\n{text}");
    }
    // Any key has a place, whether it is there or not; always the same one.
    let again = home.run(&["route", "db", "bob", "--json"]).ok().json();
    assert_eq!((&again["hash"], &again["shard"]), (&route["hash"], &route["shard"]));
    home.run(&["route", "db", "nobody"]).ok();
    home.run(&["stop"]).ok();
}

#[test]
fn health_asks_each_endpoint() {
    let home = Home::with_cluster("db", 3, 1);
    let health = home.run(&["health", "--json"]).ok().json();
    let endpoints = health["endpoints"].as_array().unwrap().clone();
    assert_eq!(endpoints.len(), 3);
    for endpoint in &endpoints {
        with_keys(endpoint, &["address", "healthy", "state", "took_ms", "error"]);
        assert_eq!((&endpoint["healthy"], &endpoint["state"]), (&true.into(), &"ready".into()));
    }
    let table = home.run(&["health"]).ok().text();
    let address = endpoints[0]["address"].as_str().unwrap();
    assert!(table.contains(address) && table.contains("ready"), "{table}");

    // One given address where nobody listens: a negative answer; the others are still asked.
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let both = format!("{nobody},{address}");
    let health = home.run(&["health", "--json", "--cluster", &both]).exits(1).json();
    let endpoints = health["endpoints"].as_array().unwrap();
    assert_eq!(endpoints.len(), 4);
    let dead = endpoints.iter().find(|endpoint| endpoint["address"] == *nobody).unwrap();
    assert_eq!(dead["healthy"], false);
    let error = dead["error"].as_str().expect("a reason");
    assert!(!error.contains(&nobody), "which address it is stands beside it: {error}");
    // And any of the given addresses may be down for the other commands.
    home.run(&["status", "--cluster", &both]).ok();
    home.run(&["set", "db", "k", "v", "--cluster", &both]).ok();
    home.run(&["stop"]).ok();
    home.run(&["health"]).exits(3);

    // Nobody anywhere: each is told, and at once.
    let table = home.run(&["health", "--cluster", &both]).exits(3);
    assert!(table.took < Duration::from_secs(5), "{:?}", table.took);
    assert!(table.text().contains(&nobody) && table.text().contains(address), "{}", table.text());
    let health = home.run(&["health", "--json", "--cluster", &both]).exits(3).json();
    assert_eq!(health["endpoints"].as_array().unwrap().len(), 2);
}

#[test]
fn health_knows_a_node_that_waits_for_its_cluster() {
    let home = Home::new();
    let _ports = PORTS.read().unwrap_or_else(|poisoned| poisoned.into_inner());
    let ports = free_ports(3).into_iter().map(|port| format!("127.0.0.1:{port}")).collect::<Vec<_>>();
    let [client, peer, nobody] = &ports[..] else { unreachable!("three ports") };
    let config = home.file("n1.toml");
    let text = format!(
        "[node]\nid = \"n1\"\ndata_dir = {:?}\n[client]\nlisten = \"{client}\"\n[peer]\nlisten = \"{peer}\"\n\
         [cluster]\ninitial = [\"{peer}\", \"{nobody}\"]\n",
        home.file("n1")
    );
    std::fs::write(&config, text).unwrap();
    let _node = home.spawn(&["serve", "--config", config.to_str().unwrap()]);
    let begun = Instant::now();
    loop {
        let ended = home.run(&["health", "--json", "--cluster", client]);
        assert!(begun.elapsed() < Duration::from_secs(30), "{ended:?}");
        let health = ended.json();
        if health["endpoints"][0]["state"] == "starting" {
            assert_eq!((ended.code, &health["endpoints"][0]["healthy"]), (Some(1), &false.into()));
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn watching_ends_with_ctrl_c() {
    let home = Home::with_cluster("db", 1, 1);
    let watch = home.spawn(&["status", "db", "--watch", "100ms"]);
    let begun = Instant::now();
    while watch.stdout().matches("cluster ").count() < 3 {
        assert!(begun.elapsed() < Duration::from_secs(15), "{}\n{}", watch.stdout(), watch.stderr());
        std::thread::sleep(Duration::from_millis(20));
    }
    let asked = Instant::now();
    watch.signal(Signal::INT);
    watch.end(Duration::from_secs(5)).ok();
    assert!(asked.elapsed() < Duration::from_secs(3), "{:?}", asked.elapsed());

    // With `--json` one object a line; a bare --watch is every second.
    let watch = home.spawn(&["status", "--watch", "100ms", "--json"]);
    watch.wait_for("}\n{", Duration::from_secs(15));
    watch.signal(Signal::INT);
    let text = watch.end(Duration::from_secs(5)).ok().text();
    for line in text.lines() {
        with_keys(&serde_json::from_str(line).unwrap(), &["cluster_id", "nodes", "databases"]);
    }
    let watch = home.spawn(&["status", "--watch"]);
    watch.wait_for("cluster ", Duration::from_secs(15));
    watch.signal(Signal::TERM);
    watch.end(Duration::from_secs(5)).ok();
    home.run(&["stop"]).ok();
}

#[test]
fn the_version_tells_commit_protocol_and_disk_format() {
    let home = Home::new();
    let text = home.run(&["--version"]).ok().text();
    assert_eq!(text.lines().count(), 1, "{text}");
    for part in [concat!("pontoon ", env!("CARGO_PKG_VERSION")), "commit ", "protocol ", "disk format "] {
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn each_shell_gets_its_completions() {
    let home = Home::new();
    for (shell, mark) in
        [("bash", "complete -F"), ("zsh", "#compdef pontoon"), ("fish", "complete -c pontoon")]
    {
        let script = home.run(&["completions", shell]).ok().text();
        assert!(script.contains(mark), "{shell}");
        assert!(script.contains("setup") && script.contains("leader-failure"), "{shell}");
    }
    home.run(&["completions", "tcsh"]).exits(2);
}
