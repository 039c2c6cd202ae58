//! The binary without a cluster: arguments, old spellings, exit codes, messages.

use std::ffi::OsString;
use std::fs;
use std::net::TcpListener;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use clap::{CommandFactory, FromArgMatches};
use pontoon::cli::args::{Cli, modernise};
use proptest::prelude::*;

/// Runs `pontoon` with a data directory of its own and nothing of this machine's environment.
fn pontoon(dir: &Path, args: &[&str]) -> Output {
    command(dir, args).output().expect("the binary runs")
}

fn command(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pontoon"));
    command
        .args(args)
        .env_remove("PONTOON_CLUSTER")
        .env_remove("XDG_DATA_HOME")
        .env("PONTOON_DATA", dir)
        .stdin(Stdio::null());
    command
}

fn code(output: &Output) -> i32 {
    output.status.code().expect("it exits by itself")
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// An address on which nobody listens.
fn closed_port() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("an address").to_string()
}

#[test]
fn help_and_version_go_to_stdout() {
    let temp = tempfile::tempdir().unwrap();
    let output = pontoon(temp.path(), &["--version"]);
    assert_eq!(code(&output), 0);
    for part in ["pontoon ", "commit", "protocol", "disk format"] {
        assert!(stdout(&output).contains(part), "{}", stdout(&output));
    }
    let output = pontoon(temp.path(), &["--help"]);
    assert_eq!(code(&output), 0);
    assert!(stdout(&output).contains("pontoon setup testDB 3 5"));
}

#[test]
fn every_subcommand_has_examples() {
    let temp = tempfile::tempdir().unwrap();
    for line in [
        "setup",
        "stop",
        "clean",
        "serve",
        "set",
        "get",
        "delete",
        "cas",
        "mset",
        "mget",
        "scan",
        "import",
        "export",
        "status",
        "route",
        "health",
        "db",
        "db list",
        "db create",
        "db drop",
        "admin",
        "admin node",
        "admin node list",
        "admin node add",
        "admin node drain",
        "admin node remove",
        "admin rebalance",
        "admin rebalance plan",
        "admin rebalance start",
        "admin rebalance status",
        "admin rebalance pause",
        "admin rebalance resume",
        "admin rebalance cancel",
        "admin rebalance undo",
        "admin transfer-leader",
        "admin database",
        "admin database set-replicas",
        "admin database verify",
        "admin settings",
        "admin settings get",
        "admin settings set",
        "admin recover",
        "test",
        "test leader-failure",
        "test replication",
        "trace",
        "trace put",
        "trace get",
        "bench",
        "completions",
    ] {
        let args: Vec<&str> = line.split(' ').chain(["--help"]).collect();
        let output = pontoon(temp.path(), &args);
        assert_eq!(code(&output), 0, "{line}");
        let text = stdout(&output);
        assert!(text.contains("Examples:"), "{line}: {text}");
        assert!(text.contains(&format!("pontoon {line}")), "{line}: {text}");
        let (own, common) = text.split_once("Options of every command:").expect("both");
        assert!(!own.contains("--timeout") && common.contains("--json"), "{line}: {text}");
    }
}

#[test]
fn mistakes_of_usage_end_with_2_and_touch_nothing() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("data");
    let long_key = "k".repeat(4097);
    for args in [
        &["nonsense"][..],
        &[],
        &["setup"],
        &["setup", "db", "0", "1"],
        &["setup", "db", "8", "1"],
        &["setup", "db", "3", "0"],
        &["setup", "db", "3", "16385"],
        &["setup", "no spaces", "3", "5"],
        &["setup", "db", "3", "5", "--nodes", "2"],
        &["-setup", "db", "x", "5"],
        &["db", "create", "x y", "1", "1"],
        &["set", "db", "key"],
        &["set", "db", "", "value"],
        &["set", "db", &long_key, "value"],
        &["set", "db", "key", "--file", "/does/not/exist"],
        &["get", "db"],
        &["get", "db", ""],
        &["cas", "db", "key", "new"],
        &["mset", "db", "a", "1", "b"],
        &["mset", "db", "a"],
        &["mset", "db", "a", "1", "a", "2"],
        &["mset", "db", "-a", "1"],
        &["mget", "db", "a", "-b"],
        &["status", "--timeout", "0s"],
        &["status", "--cluster", "nowhere"],
        &["status", "--cluster", "h:99999"],
        &["admin"],
        &["admin", "node"],
        &["admin", "node", "add"],
        &["admin", "node", "drain"],
        &["admin", "node", "drain", "n3"],
        &["admin", "node", "drain", "0"],
        &["admin", "node", "drain", "3", "--wait", "--cancel"],
        &["admin", "node", "remove", "-1"],
        &["admin", "rebalance", "start", "nonsense"],
        &["admin", "rebalance", "start", "5f1c0a92e4b7d380", "--leaders-only"],
        &["admin", "rebalance", "status", "--watch", "0s"],
        &["admin", "transfer-leader", "db", "1"],
        &["admin", "transfer-leader", "db", "x", "1"],
        &["admin", "database", "set-replicas", "db", "0"],
        &["admin", "database", "set-replicas", "db", "8"],
        &["admin", "database", "verify"],
        &["admin", "database", "verify", "db", "--shard", "x"],
        &["admin", "settings", "get", "nonsense"],
        &["admin", "settings", "set", "placement.automatic"],
        &["admin", "settings", "set", "nonsense", "1"],
        &["admin", "settings", "set", "placement.automatic", "maybe"],
        &["admin", "settings", "set", "placement.replace_after", "10ms"],
        &["admin", "settings", "set", "placement.bytes_per_second", "32MB"],
        &["admin", "recover", "db", "1"],
        &["admin", "recover", "db", "1", "--from", "x"],
        &["admin", "recover", "db", "1", "--from", "2", "--report", "f"],
        &["test", "leader-failure", "2"],
        &["-test", "leaderFailure", "1"],
        &["-test", "replicationTest", "8"],
        &["trace", "put", "db", "k"],
        &["trace", "get", "db", "k", "--repeat", "0"],
        &["bench", "--clients", "0"],
        &["bench", "--workload", "dance"],
        &["serve"],
        &["serve", "--config", "/does/not/exist.toml"],
        &["import", "db", "/does/not/exist.jsonl"],
        &["completions", "tcsh"],
    ] {
        let output = pontoon(&dir, args);
        assert_eq!(code(&output), 2, "{args:?}: {}", stderr(&output));
        assert!(output.stdout.is_empty(), "{args:?}");
        assert!(!output.stderr.is_empty(), "{args:?}");
        assert!(!dir.exists(), "{args:?}");
    }
}

#[test]
fn a_test_of_too_few_nodes_says_why() {
    let temp = tempfile::tempdir().unwrap();
    let output = pontoon(temp.path(), &["test", "leader-failure", "2"]);
    assert!(stderr(&output).contains("majority"), "{}", stderr(&output));
    assert!(stderr(&output).contains("at least 3"), "{}", stderr(&output));
}

#[test]
fn errors_in_json_are_one_object_on_stderr() {
    let temp = tempfile::tempdir().unwrap();
    for (args, exit, error_code) in [
        (&["--json", "get", "db"][..], 2, "usage"),
        (&["get", "db", "", "--json"], 2, "invalid"),
        (&["get", "db", "key", "--json"], 3, "no_cluster"),
        (&["clean", "--json", "--cluster"], 2, "usage"),
    ] {
        let output = pontoon(temp.path(), args);
        assert_eq!(code(&output), exit, "{args:?}: {}", stderr(&output));
        assert!(output.stdout.is_empty(), "{args:?}");
        let object: serde_json::Value = serde_json::from_slice(&output.stderr).unwrap();
        let error = &object["error"];
        assert_eq!(error["code"], error_code, "{args:?}: {error}");
        assert!(error["message"].as_str().is_some_and(|m| !m.is_empty()), "{error}");
        assert_eq!(error["retryable"], exit == 3, "{error}");
        assert_eq!(error["outcome"], "not_applied", "{error}");
    }
}

/// Whatever stands before them, and behind them: only `--` makes a value of an option.
#[test]
fn options_count_wherever_they_stand_in_a_list_of_keys() {
    let temp = tempfile::tempdir().unwrap();
    for (args, is_json) in [
        (&["mget", "db", "a", "b", "--json", "--timeout", "2s"][..], true),
        (&["mget", "db", "a", "--timeout=2s", "--json", "b"], true),
        (&["mset", "db", "a", "1", "--timeout", "2s", "b", "2", "--json"], true),
        (&["mset", "db", "a", "--json", "1"], true),
        (&["mget", "--timeout", "2s", "db", "a", "--", "--json", "-b"], false),
        (&["mset", "db", "--", "a", "--json"], false),
    ] {
        let output = pontoon(temp.path(), args);
        assert_eq!(code(&output), 3, "{args:?}: {}", stderr(&output));
        let object = serde_json::from_slice::<serde_json::Value>(&output.stderr);
        assert_eq!(object.is_ok(), is_json, "{args:?}: {}", stderr(&output));
    }
    for args in
        [&["mget", "db", "a", "b", "--timeout", "soon"][..], &["mset", "db", "a", "1", "--timeout", "soon"]]
    {
        let output = pontoon(temp.path(), args);
        assert_eq!(code(&output), 2, "{args:?}: {}", stderr(&output));
        assert!(stderr(&output).contains("--timeout"), "{args:?}: {}", stderr(&output));
    }
    let output = pontoon(temp.path(), &["mget", "db", "a", "-b"]);
    assert!(stderr(&output).contains("'-- -b'"), "{}", stderr(&output));
}

#[test]
fn without_a_cluster_every_client_command_ends_with_3_at_once() {
    let temp = tempfile::tempdir().unwrap();
    for args in [
        &["set", "db", "k", "v"][..],
        &["-set", "testDB", "bob", "hello"],
        &["-get", "testDB", "bob"],
        &["get", "db", "-k"],
        &["delete", "db", "k"],
        &["cas", "db", "k", "--absent", "v"],
        &["mset", "db", "a", "-1"],
        &["mset", "db", "--", "-a", "-1"],
        &["mget", "db", "a"],
        &["scan", "db"],
        &["export", "db"],
        &["import", "db"],
        &["status"],
        &["route", "db", "k"],
        &["health"],
        &["db", "list"],
        &["db", "create", "db", "1", "1"],
        &["db", "drop", "db", "--yes"],
        &["admin", "node", "list"],
        &["admin", "node", "add", "127.0.0.1:7101"],
        &["admin", "node", "drain", "3", "--wait"],
        &["admin", "node", "drain", "3", "--cancel"],
        &["admin", "node", "remove", "3", "--dead"],
        &["admin", "rebalance", "plan"],
        &["admin", "rebalance", "start"],
        &["admin", "rebalance", "status"],
        &["admin", "rebalance", "status", "--watch"],
        &["admin", "rebalance", "cancel"],
        &["admin", "rebalance", "undo"],
        &["admin", "transfer-leader", "db", "1", "2"],
        &["admin", "database", "set-replicas", "db", "3"],
        &["admin", "database", "verify", "db"],
        &["admin", "database", "verify", "(metadata)", "--shard", "0", "--wait"],
        &["admin", "settings", "get"],
        &["admin", "settings", "set", "placement.automatic", "off"],
        &["admin", "recover", "db", "1", "--from", "2"],
        &["trace", "put", "db", "k", "v"],
        &["trace", "get", "db", "k"],
        &["bench"],
    ] {
        let began = Instant::now();
        let output = pontoon(temp.path(), args);
        assert_eq!(code(&output), 3, "{args:?}: {}", stderr(&output));
        assert!(stderr(&output).contains("pontoon setup"), "{args:?}: {}", stderr(&output));
        assert!(began.elapsed() < Duration::from_secs(5), "{args:?}");
    }
}

#[test]
fn closed_ports_end_with_3_within_the_deadline() {
    let temp = tempfile::tempdir().unwrap();
    let ports = format!("{},{}", closed_port(), closed_port());
    for args in [
        &["get", "db", "k"][..],
        &["set", "db", "k", "v"],
        &["status"],
        &["db", "list"],
        &["setup", "db", "3", "5"],
    ] {
        let line = [args, &["--cluster", &ports, "--timeout", "300ms"]].concat();
        let began = Instant::now();
        let output = pontoon(temp.path(), &line);
        assert_eq!(code(&output), 3, "{args:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(ports.split(',').next().unwrap()), "{}", stderr(&output));
        assert!(began.elapsed() < Duration::from_secs(5), "{args:?}");
    }
    // The environment says where the cluster is, unless the command line does.
    let mut by_environment = command(temp.path(), &["get", "db", "k", "--timeout", "300ms"]);
    let output = by_environment.env("PONTOON_CLUSTER", &ports).output().unwrap();
    assert_eq!(code(&output), 3);
    assert!(stderr(&output).contains(ports.split(',').next().unwrap()), "{}", stderr(&output));
}

#[test]
fn stop_and_clean_with_nothing_there_are_done() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("data");
    for args in [&["stop"][..], &["clean"], &["-clean"], &["clean", "--yes"]] {
        let output = pontoon(&dir, args);
        assert_eq!(code(&output), 0, "{args:?}: {}", stderr(&output));
        assert!(!dir.exists(), "{args:?}");
    }
    let output = pontoon(&dir, &["stop", "--json"]);
    assert_eq!(stdout(&output), "{\"stopped\":false,\"pid\":null}\n");
}

/// What a local cluster that was stopped leaves behind.
fn stopped_cluster(dir: &Path) {
    fs::create_dir_all(dir.join("nodes/n1")).unwrap();
    fs::write(dir.join("nodes/n1/data"), "x").unwrap();
    // A node's directory is known by what its identity begins with.
    fs::write(dir.join("nodes/n1/IDENTITY"), "PONTNODE").unwrap();
    fs::create_dir(dir.join("logs")).unwrap();
    let (client, peer) = (closed_port(), closed_port());
    let text = serde_json::json!({
        "format": "pontoon local cluster",
        "version": 1,
        "cluster_id": null,
        "pid": null,
        "nodes": [{"label": "n1", "client": client, "peer": peer}],
        "databases": [{"name": "db", "replicas": 1, "shards": 4}],
    });
    fs::write(dir.join("cluster.json"), text.to_string()).unwrap();
}

#[test]
fn clean_asks_unless_told_not_to() {
    let temp = tempfile::tempdir().unwrap();
    stopped_cluster(temp.path());
    let output = pontoon(temp.path(), &["clean"]);
    assert_eq!(code(&output), 2, "{}", stderr(&output));
    assert!(stderr(&output).contains("--yes"));
    assert!(temp.path().join("nodes/n1/data").exists());

    let output = pontoon(temp.path(), &["clean", "--yes"]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    assert!(!temp.path().exists());
}

#[test]
fn clean_removes_only_what_is_ours() {
    let temp = tempfile::tempdir().unwrap();
    fs::create_dir(temp.path().join("nodes")).unwrap();
    fs::write(temp.path().join("nodes/thesis"), "years of work").unwrap();
    let output = pontoon(temp.path(), &["clean", "--yes"]);
    assert_eq!(code(&output), 0, "nothing of ours is there");
    assert!(temp.path().join("nodes/thesis").exists());

    fs::write(temp.path().join("cluster.json"), "{\"name\":\"something else\"}").unwrap();
    let output = pontoon(temp.path(), &["clean", "--yes"]);
    assert_eq!(code(&output), 2, "{}", stderr(&output));
    assert!(temp.path().join("nodes/thesis").exists());
}

#[test]
fn clean_refuses_while_the_cluster_runs() {
    let temp = tempfile::tempdir().unwrap();
    stopped_cluster(temp.path());
    let lock = fs::File::create(temp.path().join("lock")).unwrap();
    lock.lock().unwrap();
    fs::write(temp.path().join("lock"), "4711").unwrap();
    let output = pontoon(temp.path(), &["clean", "--yes"]);
    assert_eq!(code(&output), 1, "{}", stderr(&output));
    for part in ["4711", "pontoon stop"] {
        assert!(stderr(&output).contains(part), "{}", stderr(&output));
    }
    assert!(temp.path().join("nodes/n1/data").exists());
}

#[test]
fn setup_answers_from_what_is_known_of_a_stopped_cluster() {
    let temp = tempfile::tempdir().unwrap();
    stopped_cluster(temp.path());
    let output = pontoon(temp.path(), &["setup", "db", "1", "5"]);
    assert_eq!(code(&output), 1, "{}", stderr(&output));
    for part in ["1 replica and 4 shards", "1 replica and 5 shards"] {
        assert!(stderr(&output).contains(part), "{}", stderr(&output));
    }
    let output = pontoon(temp.path(), &["setup", "db", "3", "4"]);
    assert_eq!(code(&output), 1, "the database first: {}", stderr(&output));
    for args in [&["setup", "x", "3", "4"][..], &["setup", "x", "1", "4", "--nodes", "2"]] {
        let output = pontoon(temp.path(), args);
        assert_eq!(code(&output), 2, "{args:?}: {}", stderr(&output));
    }
    // A stopped cluster is found to be so at once, with the way to start it.
    let output = pontoon(temp.path(), &["get", "db", "k"]);
    assert_eq!(code(&output), 3);
    assert!(stderr(&output).contains("pontoon setup db 1 4"), "{}", stderr(&output));
}

#[test]
fn setup_refuses_a_directory_of_somebody_elses() {
    let temp = tempfile::tempdir().unwrap();
    fs::write(temp.path().join("thesis.tex"), "").unwrap();
    let output = pontoon(temp.path(), &["setup", "db", "1", "1"]);
    assert_eq!(code(&output), 2, "{}", stderr(&output));
    assert!(stderr(&output).contains("thesis.tex"), "{}", stderr(&output));
    assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 1);
}

#[test]
fn bad_settings_are_all_told_and_nothing_is_made() {
    let temp = tempfile::tempdir().unwrap();
    let file = temp.path().join("bad.toml");
    fs::write(&file, "[node]\nid = 7\ncolour = \"red\"\n[client]\nlisten = \"nowhere\"\n").unwrap();
    for extra in [&[][..], &["--check"], &["--print-config"]] {
        let line = [&["serve", "--config", file.to_str().unwrap()][..], extra].concat();
        let output = pontoon(temp.path(), &line);
        assert_eq!(code(&output), 2, "{line:?}: {}", stderr(&output));
        for part in ["bad.toml:3", "colour", "bad.toml:5", "client.listen"] {
            assert!(stderr(&output).contains(part), "{part}: {}", stderr(&output));
        }
    }
    assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 1);
}

#[test]
fn good_settings_are_checked_and_printed_without_effect() {
    let temp = tempfile::tempdir().unwrap();
    let file = temp.path().join("good.toml");
    let data = temp.path().join("n1");
    let text = format!(
        "[node]\nid = \"n1\"\ndata_dir = {data:?}\n[client]\nlisten = \"127.0.0.1:7101\"\n[peer]\nlisten = \
         \"127.0.0.1:7201\"\n[cluster]\ninitial = [\"127.0.0.1:7201\"]\n"
    );
    fs::write(&file, text).unwrap();
    let path = file.to_str().unwrap();
    let output = pontoon(temp.path(), &["serve", "--config", path, "--check"]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    let output = pontoon(temp.path(), &["serve", "--config", path, "--print-config"]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    assert!(stdout(&output).contains("127.0.0.1:7201"));
    // With --json one object each.
    let json = |flag| -> serde_json::Value {
        let output = pontoon(temp.path(), &["serve", "--config", path, flag, "--json"]);
        assert_eq!(code(&output), 0, "{}", stderr(&output));
        serde_json::from_str(&stdout(&output)).expect("one object")
    };
    assert_eq!(json("--check"), serde_json::json!({"config": path, "ok": true}));
    let settings = json("--print-config");
    assert_eq!(settings["node"]["id"], "n1");
    assert_eq!(settings["node"]["weight"], 100);
    assert_eq!(settings["cluster"]["initial"], serde_json::json!(["127.0.0.1:7201"]));
    assert!(!data.exists());
}

#[test]
fn an_address_in_use_is_named_and_nothing_is_made() {
    let temp = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let file = temp.path().join("node.toml");
    let data = temp.path().join("n1");
    let text = format!(
        "[node]\nid = \"n1\"\ndata_dir = {data:?}\n[client]\nlisten = \"{address}\"\n[peer]\nlisten = \
         \"127.0.0.1:0\"\nadvertise = \"127.0.0.1:7201\"\n[cluster]\ninitial = [\"127.0.0.1:7201\"]\n"
    );
    fs::write(&file, text).unwrap();
    let output = pontoon(temp.path(), &["serve", "--config", file.to_str().unwrap()]);
    assert_eq!(code(&output), 2, "{}", stderr(&output));
    for part in [address.to_string().as_str(), "client.listen", "another process"] {
        assert!(stderr(&output).contains(part), "{part}: {}", stderr(&output));
    }
    assert!(!data.exists());
}

#[test]
fn completions_for_three_shells() {
    let temp = tempfile::tempdir().unwrap();
    for shell in ["bash", "zsh", "fish"] {
        let output = pontoon(temp.path(), &["completions", shell]);
        assert_eq!(code(&output), 0, "{shell}");
        assert!(stdout(&output).contains("leader-failure"), "{shell}");
    }
}

#[test]
fn a_reader_that_goes_away_is_no_panic() {
    let temp = tempfile::tempdir().unwrap();
    for args in [&["completions", "bash"][..], &["--help"], &["stop"]] {
        let mut child =
            command(temp.path(), args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert_eq!(code(&output), 0, "{args:?}");
        assert!(!stderr(&output).contains("panicked"), "{args:?}: {}", stderr(&output));
    }
}

#[test]
fn sim_runs_seeds_and_the_same_seed_gives_the_same_trace() {
    let temp = tempfile::tempdir().unwrap();
    let report = |args: &[&str]| -> serde_json::Value {
        let output = pontoon(temp.path(), &[&["sim", "--json"], args].concat());
        assert_eq!(code(&output), 0, "{args:?}: {}", stderr(&output));
        serde_json::from_str(&stdout(&output)).expect("one object")
    };
    let small = ["--seed", "3", "--nodes", "3", "--shards", "1", "--ops", "40", "--faults", "crashes,torn"];
    let (first, second) = (report(&small), report(&small));
    let run = &first["reports"][0];
    assert_eq!((&run["seed"], &run["nodes"], &run["shards"]), (&3.into(), &3.into(), &1.into()));
    assert_eq!(run["faults"], "crashes,torn");
    assert_eq!(run["violation"], serde_json::Value::Null);
    assert_eq!(run["trace_hash"].as_str().map(str::len), Some(16), "{run}");
    assert_eq!(run, &second["reports"][0]);
    // Asking for the last events changes none of them.
    let traced = report(&[&small[..], &["--trace", "5"]].concat());
    assert_eq!(traced["reports"][0]["trace_hash"], run["trace_hash"]);
    assert_eq!(traced["reports"][0]["trace"].as_array().map(Vec::len), Some(5));
    let other = report(&[&["--seed", "4"], &small[2..]].concat());
    assert_ne!(other["reports"][0]["trace_hash"], run["trace_hash"]);

    let range = report(&[&["--seeds", "5..8"], &small[2..]].concat());
    assert_eq!(range["runs"], 3);
    assert_eq!(range["failed_seeds"], serde_json::json!([]));
    assert_eq!(range["reports"], serde_json::json!([]), "only what failed is told");
    for key in ["simulated_s", "seconds", "ratio", "events", "undecided"] {
        assert!(range[key].is_number(), "{key}: {range}");
    }
    for key in ["counts", "operations"] {
        assert!(range[key].is_object(), "{key}: {range}");
    }
    assert!(range["checks"].as_array().is_some_and(|checks| checks.contains(&"linear".into())));
}

#[test]
fn sim_refuses_what_makes_no_sense() {
    let temp = tempfile::tempdir().unwrap();
    for args in [
        &["--seeds", "8..5"][..],
        &["--seeds", "5"],
        &["--seed", "1", "--seeds", "1..2"],
        &["--nodes", "2", "--replicas", "3"],
        &["--faults", "crashes,floods"],
        &["--shards", "0"],
        // A bug can't be asked for.
        &["--planted", "StaleReads"],
    ] {
        let output = pontoon(temp.path(), &[&["sim"], args].concat());
        assert_eq!(code(&output), 2, "{args:?}: {}", stderr(&output));
        assert_eq!(stdout(&output), "", "{args:?}");
    }
}

/// Words that mean something.
const KNOWN: &[&str] = &[
    "setup",
    "-setup",
    "serve",
    "set",
    "get",
    "delete",
    "cas",
    "mset",
    "mget",
    "scan",
    "import",
    "export",
    "status",
    "route",
    "health",
    "db",
    "list",
    "create",
    "drop",
    "test",
    "trace",
    "bench",
    "sim",
    "completions",
    "--json",
    "--timeout",
    "--cluster",
    "--config",
    "--file",
    "--nodes",
    "--seeds",
    "--help",
    "--",
    "-",
    "--expect",
    "--limit",
    "5s",
    "1..2",
    "9..1",
    "0",
    "-1",
    "18446744073709551616",
    "127.0.0.1:7101",
    "[::",
    "db/k",
    "k=v",
    "=",
    "",
];

/// Those, and others.
fn word() -> impl Strategy<Value = OsString> {
    prop_oneof![
        6 => prop::sample::select(KNOWN).prop_map(OsString::from),
        2 => "\\PC{0,12}".prop_map(OsString::from),
        1 => "--[a-z-]{1,10}(=\\PC{0,8})?".prop_map(OsString::from),
        1 => prop::collection::vec(any::<u8>(), 0..12).prop_map(OsString::from_vec),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    #[test]
    fn no_arguments_make_the_parser_panic(words in prop::collection::vec(word(), 0..8)) {
        let args = std::iter::once(OsString::from("pontoon")).chain(words).collect();
        let parsed = Cli::command().try_get_matches_from(modernise(args));
        if let Err(error) = parsed.and_then(|matches| Cli::from_arg_matches(&matches)) {
            prop_assert!(!error.render().to_string().trim().is_empty());
        }
    }
}
