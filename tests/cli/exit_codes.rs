//! Every exit code, and the error objects of `--json`.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::json;

use crate::cluster::free_ports;
use crate::harness::{HANG, Home, PORTS, Running};

/// How often a test is tried that its cluster may have passed too soon.
const ATTEMPTS: usize = 10;

/// One daemon behind a proxy that it advertises, so that every client call goes through there.
struct Proxied {
    home: Home,
    proxy: Proxy,
    _node: Running,
}

/// Carries bytes both ways. Once a request holds the marker, it is carried still, and nothing comes
/// back any more.
#[derive(Clone)]
struct Proxy {
    address: String,
    state: Arc<ProxyState>,
}

#[derive(Default)]
struct ProxyState {
    /// The bytes to look for; none: everything is carried.
    marker: Mutex<Vec<u8>>,
    /// A request with the marker went by.
    seen: AtomicBool,
    /// Something came back since, and was held back.
    answered: AtomicBool,
    /// What happens then: the connection is closed, or stays open and silent.
    close: AtomicBool,
    /// It is closed, or will be in a moment.
    cut: AtomicBool,
}

/// For an answer to come, on a busy machine.
const ANSWER: Duration = Duration::from_secs(2);

impl Proxy {
    fn start(to: String) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let state = Arc::new(ProxyState::default());
        let shared = state.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(server) = TcpStream::connect(&to) else { continue };
                carry(client, server, shared.clone());
            }
        });
        Proxy { address, state }
    }

    fn cut_at(&self, marker: &str, close: bool) {
        self.state.close.store(close, Ordering::SeqCst);
        for flag in [&self.state.seen, &self.state.answered, &self.state.cut] {
            flag.store(false, Ordering::SeqCst);
        }
        *self.state.marker.lock().unwrap() = marker.as_bytes().to_vec();
    }

    /// Carries everything again; says whether the marker went by.
    fn heal(&self) -> bool {
        self.state.marker.lock().unwrap().clear();
        self.state.seen.swap(false, Ordering::SeqCst)
    }
}

fn carry(client: TcpStream, server: TcpStream, state: Arc<ProxyState>) {
    let (mut from_client, mut to_server) = (client.try_clone().unwrap(), server.try_clone().unwrap());
    let forth = state.clone();
    std::thread::spawn(move || {
        let mut chunk = [0; 65536];
        let mut tail = Vec::new();
        while let Ok(read @ 1..) = from_client.read(&mut chunk) {
            let marker = forth.marker.lock().unwrap().clone();
            tail.extend_from_slice(&chunk[..read]);
            let found = !marker.is_empty() && tail.windows(marker.len()).any(|window| window == marker);
            if found {
                // Before the request is on its way: its answer can't be faster.
                forth.seen.store(true, Ordering::SeqCst);
            }
            tail.drain(..tail.len().saturating_sub(64));
            if to_server.write_all(&chunk[..read]).is_err() {
                break;
            }
            if found && forth.close.load(Ordering::SeqCst) {
                // Once it is answered, or should be, the line is dead.
                let begun = Instant::now();
                while !forth.answered.load(Ordering::SeqCst) && begun.elapsed() < ANSWER {
                    std::thread::sleep(Duration::from_millis(5));
                }
                forth.cut.store(true, Ordering::SeqCst);
                break;
            }
        }
        from_client.shutdown(Shutdown::Both).ok();
        to_server.shutdown(Shutdown::Both).ok();
    });
    let (mut from_server, mut to_client) = (server, client);
    std::thread::spawn(move || {
        let mut chunk = [0; 65536];
        while let Ok(read @ 1..) = from_server.read(&mut chunk) {
            if state.seen.load(Ordering::SeqCst) {
                state.answered.store(true, Ordering::SeqCst);
                continue;
            }
            if to_client.write_all(&chunk[..read]).is_err() {
                break;
            }
        }
        from_server.shutdown(Shutdown::Both).ok();
        to_client.shutdown(Shutdown::Both).ok();
    });
}

impl Proxied {
    fn start() -> Proxied {
        let home = Home::new();
        let _ports = PORTS.read().unwrap_or_else(|poisoned| poisoned.into_inner());
        let addresses: Vec<String> = free_ports(2).iter().map(|port| format!("127.0.0.1:{port}")).collect();
        let (client, peer) = (&addresses[0], &addresses[1]);
        let proxy = Proxy::start(client.clone());
        let config = home.file("n1.toml");
        let text = format!(
            "[node]\nid = \"n1\"\ndata_dir = {:?}\n[client]\nlisten = \"{client}\"\nadvertise = \"{}\"\n\
             [peer]\nlisten = \"{peer}\"\n[cluster]\ninitial = [\"{peer}\"]\n",
            home.file("n1"),
            proxy.address,
        );
        std::fs::write(&config, text).unwrap();
        let node = home.spawn(&["serve", "--config", config.to_str().unwrap()]);
        node.wait_for("ready node=", Duration::from_secs(30));
        let proxied = Proxied { home, proxy, _node: node };
        proxied.run(&["db", "create", "db", "1", "1"]).ok();
        proxied
    }

    fn command(&self, args: &[&str]) -> std::process::Command {
        let mut command = self.home.command(args);
        command.env("PONTOON_CLUSTER", &self.proxy.address);
        command
    }

    fn run(&self, args: &[&str]) -> crate::harness::Ended {
        Running::spawn(self.command(args)).end(Duration::from_secs(60))
    }
}

#[test]
fn a_cas_without_any_answer_ends_with_4() {
    let cluster = Proxied::start();
    cluster.run(&["set", "db", "lock", "free"]).ok();
    for (close, key) in [(true, "closed"), (false, "silent")] {
        cluster.proxy.cut_at(&format!("holder-{key}"), close);
        let ended = cluster.run(&[
            "cas",
            "db",
            key,
            "--absent",
            &format!("holder-{key}"),
            "--json",
            "--timeout",
            "3s",
        ]);
        assert!(cluster.proxy.heal(), "{key}: the request went by");
        assert!(ended.took < Duration::from_secs(9), "{key}: {:?}", ended.took);
        let error = ended.exits(4).json_error();
        assert_eq!(error["code"], "outcome_unknown", "{key}");
        assert_eq!(error["outcome"], "unknown", "{key}");
        // The same command again would be another one, in a session of its own.
        assert_eq!(error["retryable"], false, "{key}");
        // It was applied, exactly once, and a read tells.
        let got = cluster.run(&["get", "db", key]).ok();
        assert_eq!(got.text(), format!("holder-{key}"));
    }
    // As text.
    cluster.proxy.cut_at("third-holder", true);
    let ended = cluster.run(&["cas", "db", "lock", "--expect", "free", "third-holder", "--timeout", "2s"]);
    cluster.proxy.heal();
    ended.exits(4).says(&["error: ", "read the key"]);
    assert_eq!(cluster.run(&["get", "db", "lock"]).ok().text(), "third-holder");
}

#[test]
fn a_write_whose_answer_is_lost_is_sent_again_and_done_once() {
    let cluster = Proxied::start();
    // The marker goes by once, the line is cut, and the second attempt gets through.
    let with_a_lost_answer = |marker: &str, command: &[&str]| {
        cluster.proxy.cut_at(marker, true);
        let healer = cluster.proxy.clone();
        let heal = std::thread::spawn(move || {
            let begun = Instant::now();
            while !healer.state.cut.load(Ordering::SeqCst) {
                assert!(begun.elapsed() < Duration::from_secs(30), "no request went by");
                std::thread::sleep(Duration::from_millis(1));
            }
            healer.heal();
        });
        let ended = cluster.run(&[command, &["--json"]].concat()).ok();
        heal.join().unwrap();
        ended.json()
    };
    // Versions are counted in the shard: none is left out, so nothing was done twice.
    let set = with_a_lost_answer("once-only", &["set", "db", "k", "once-only"]);
    assert_eq!(set["version"], 1);
    assert_eq!(cluster.run(&["get", "db", "k"]).ok().text(), "once-only");
    let cas = with_a_lost_answer("and-once", &["cas", "db", "k", "--expect", "once-only", "and-once"]);
    assert_eq!((&cas["written"], &cas["version"]), (&json!(true), &json!(2)));
    cluster.run(&["set", "db", "doomed", "v"]).ok();
    let deleted = with_a_lost_answer("doomed", &["delete", "db", "doomed"]);
    assert_eq!((&deleted["found"], &deleted["version"]), (&json!(true), &json!(4)));

    // Cut for as long as it tries: nobody can know.
    cluster.proxy.cut_at("never-told", false);
    let ended = cluster.run(&["set", "db", "k", "never-told", "--timeout", "1s", "--json"]);
    cluster.proxy.heal();
    assert!(ended.took < Duration::from_secs(3), "{:?}", ended.took);
    let error = ended.exits(4).json_error();
    assert_eq!(error["outcome"], "unknown");
    // A read has no effect that could be unknown.
    cluster.run(&["set", "db", "read-me", "v"]).ok();
    cluster.proxy.cut_at("read-me", false);
    let ended = cluster.run(&["get", "db", "read-me", "--timeout", "1s", "--json"]);
    cluster.proxy.heal();
    assert!(ended.took < Duration::from_secs(3), "{:?}", ended.took);
    let error = ended.exits(3).json_error();
    assert_eq!((&error["outcome"], &error["retryable"]), (&json!("not_applied"), &json!(true)));
}

#[test]
fn nobody_there_ends_with_3_within_the_timeout() {
    let home = Home::new();
    // No cluster at all: at once.
    for command in
        [&["get", "db", "k"][..], &["set", "db", "k", "v"], &["status"], &["health"], &["db", "list"]]
    {
        let ended = home.run(command).exits(3).says(&["pontoon setup"]);
        assert!(ended.took < Duration::from_secs(2), "{command:?}: {:?}", ended.took);
        let error = home.run(&[command, &["--json"]].concat()).exits(3).json_error();
        assert_eq!((&error["outcome"], &error["retryable"]), (&json!("not_applied"), &json!(true)));
    }
    // At an address where nobody listens: the default deadline is the same for all.
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let ended = home.run(&["setup", "db", "1", "1", "--cluster", &nobody]).exits(3).says(&[&nobody]);
    assert!(ended.took < Duration::from_secs(20), "{:?}", ended.took);
    // One that is there and doesn't answer: its processes stand still.
    let home = Home::with_cluster("db", 3, 2);
    home.run(&["set", "db", "k", "old"]).ok();
    let pid = rustix::process::Pid::from_raw(home.pid() as i32).unwrap();
    rustix::process::kill_process(pid, Signal::STOP).unwrap();
    for command in [
        &["get", "db", "k"][..],
        &["set", "db", "k", "new"],
        &["delete", "db", "k"],
        &["cas", "db", "k", "--expect", "old", "new"],
        &["status"],
        &["db", "create", "two", "1", "1"],
    ] {
        let ended = home.run(&[command, &["--timeout", "1s", "--json"]].concat());
        let took = ended.took;
        let error = ended.exits(3).json_error();
        assert_eq!((&error["outcome"], &error["retryable"]), (&json!("not_applied"), &json!(true)));
        assert!(took > Duration::from_millis(900), "{command:?}: it tries for the whole time: {took:?}");
        assert!(took < Duration::from_secs(3), "{command:?}: {took:?}");
    }
    rustix::process::kill_process(pid, Signal::CONT).unwrap();
    // «Certainly not applied», also now that it goes on.
    assert_eq!(home.run(&["get", "db", "k"]).ok().text(), "old");
    home.run(&["stop"]).ok();
}

#[test]
fn negative_answers_end_with_1() {
    let home = Home::with_cluster("db", 1, 1);
    let absent = home.run(&["get", "db", "nobody"]).exits(1).says(&["nobody"]);
    assert_eq!(absent.text(), "", "a message is no data");
    home.run(&["delete", "db", "nobody"]).exits(1).says(&["nobody"]);
    home.run(&["set", "db", "k", "v"]).ok();
    for condition in [&["--absent"][..], &["--expect", "w"], &["--version", "999"]] {
        let command = [&["cas", "db", "k"], condition, &["new"]].concat();
        home.run(&command).exits(1).says(&["`k` was not changed"]);
        let there = home.run(&[&command[..], &["--json"]].concat()).exits(1).json();
        assert_eq!((&there["value"], &there["written"]), (&json!("v"), &json!(false)));
    }
    home.run(&["cas", "db", "nobody", "--expect", "w", "new"]).exits(1).says(&["doesn't exist"]);
    assert_eq!(home.run(&["get", "db", "k"]).ok().text(), "v");
    home.run(&["get", "nodb", "k"]).exits(1);
    home.run(&["setup", "db", "1", "2"]).exits(1);
    // Refused by the cluster: it has one node.
    let error = home.run(&["db", "create", "two", "3", "1", "--json"]).exits(1).json_error();
    assert_eq!((&error["retryable"], &error["outcome"]), (&json!(false), &json!("not_applied")));
    home.run(&["stop"]).ok();
}

#[test]
fn a_test_that_fails_ends_with_1() {
    let home = Home::new();
    let ports = PORTS.read().unwrap_or_else(|poisoned| poisoned.into_inner());
    // With a second of three nodes dead nobody can be elected. The others can be done with the first
    // death before this process gets to the second one: then the test passes, as it should, and is tried again.
    let failed = (0..ATTEMPTS).any(|_| {
        let test = home.spawn(&["test", "leader-failure", "3", "--timeout", "8s"]);
        let begun = Instant::now();
        let mut nodes = Vec::new();
        while nodes.len() < 3 {
            assert!(begun.elapsed() < HANG, "three nodes; stderr:\n{}", test.stderr());
            std::thread::sleep(Duration::from_millis(5));
            nodes = serving(&home);
        }
        test.wait_for("Crashing leader at ", HANG);
        let leader = test.stdout().lines().last().unwrap().split(' ').nth(3).unwrap().to_owned();
        for (pid, config) in nodes {
            if !config.contains(&leader) {
                // Fails only if it is gone already.
                rustix::process::kill_process(pid, Signal::KILL).ok();
            }
        }
        let ended = test.end(Duration::from_secs(25));
        let passed = ended.code == Some(0);
        if !passed {
            ended.exits(1).says(&["the test failed"]);
        }
        !passed
    });
    assert!(failed, "{ATTEMPTS} tests were done before a second node was killed");
    drop(ports);
    home.assert_nothing_left();
}

/// The nodes that a test has started so far, and their settings.
fn serving(home: &Home) -> Vec<(rustix::process::Pid, String)> {
    let of = |pid: u32| {
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let words: Vec<_> = command.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
        let config = words.iter().find(|word| word.ends_with(".toml"))?;
        let config = std::fs::read_to_string(&**config).ok()?;
        let pid = rustix::process::Pid::from_raw(pid as i32)?;
        (words.get(1)? == "serve").then_some((pid, config))
    };
    home.processes().into_iter().filter_map(of).collect()
}

#[test]
fn mistakes_end_with_2() {
    let home = Home::with_cluster("db", 1, 1);
    let long = "x".repeat(65);
    for command in [
        &["nonsense"][..],
        &["set", "db", "k"],
        &["get", "db"],
        &["get", "db", "k", "extra"],
        &["get", "db", "k", "--timeout", "soon"],
        &["get", "db", "k", "--cluster", "nowhere"],
        &["cas", "db", "k", "v"],
        &["setup", "two", "0", "1"],
        &["setup", "two", "8", "1"],
        &["setup", "two", "1", "0"],
        &["setup", "two", "1", "16385"],
        &["setup", "a b", "1", "1"],
        &["setup", "", "1", "1"],
        &["setup", &long, "1", "1"],
        &["setup", "two", "3", "1", "--nodes", "2"],
        &["db", "create", "ä", "1", "1"],
        &["test", "leader-failure", "2"],
        &["test", "replication", "2"],
        &["test", "replication", "8"],
        &["serve", "--config", "/nowhere.toml"],
        &["completions", "tcsh"],
    ] {
        let ended = home.run(command).exits(2);
        assert_eq!(ended.text(), "", "{command:?}");
        assert!(!ended.errors().is_empty(), "{command:?}");
        // `--json` first: what follows the keys of some commands is a key.
        let error = home.run(&[&["--json"], command].concat()).exits(2).json_error();
        assert_eq!((&error["retryable"], &error["outcome"]), (&json!(false), &json!("not_applied")));
    }
    home.run(&["test", "leader-failure", "2"]).exits(2).says(&["majority", "at least 3"]);
    home.run(&["stop"]).ok();
}

#[test]
fn a_second_ctrl_c_ends_with_130_at_once() {
    let home = Home::with_cluster("db", 1, 1);
    let pid = rustix::process::Pid::from_raw(home.pid() as i32).unwrap();
    // It connects, it reads, and then the cluster stands still with lines on the way.
    let mut command = home.command(&["import", "db", "--timeout", "60s"]);
    command.stdin(Stdio::piped());
    let mut import = Running::spawn(command);
    let mut stdin = import.child.stdin.take().unwrap();
    stdin.write_all(b"{\"key\":\"first\",\"value\":\"1\"}\n").unwrap();
    let begun = Instant::now();
    while home.run(&["get", "db", "first"]).code != Some(0) {
        assert!(begun.elapsed() < Duration::from_secs(30), "{}", import.stderr());
    }
    rustix::process::kill_process(pid, Signal::STOP).unwrap();
    stdin.write_all(b"{\"key\":\"second\",\"value\":\"2\"}\n").unwrap();
    std::thread::sleep(Duration::from_millis(300));
    import.signal(Signal::INT);
    std::thread::sleep(Duration::from_millis(300));
    assert!(import.child.try_wait().unwrap().is_none(), "the first waits for what is on the way");
    // One that comes before the first has been taken up is one with it, so there are more on a busy machine.
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(2) && import.child.try_wait().unwrap().is_none() {
        import.signal(Signal::INT);
        std::thread::sleep(Duration::from_millis(50));
    }
    import.end(Duration::from_secs(2)).exits(130);
    rustix::process::kill_process(pid, Signal::CONT).unwrap();
    home.run(&["stop"]).ok();
}

#[test]
fn a_second_ctrl_c_ends_a_node_that_takes_its_time() {
    // Alone of three: handing over leadership finds nobody.
    let mut cluster = crate::cluster::Cluster::new(3);
    cluster.wait_all_ready();
    for node in 1..3 {
        cluster.signal(node, Signal::STOP);
    }
    // One that comes before the first has been taken up is one with it, so there are more on a busy machine.
    let begun = Instant::now();
    let status = loop {
        cluster.signal(0, Signal::INT);
        std::thread::sleep(Duration::from_millis(100));
        if let Some(status) = cluster.ended(0) {
            break status;
        }
        assert!(begun.elapsed() < Duration::from_secs(2), "it goes on:\n{}", cluster.log(0));
    };
    // If it led nothing, it had nothing to hand over and was faster.
    assert!(matches!(status.code(), Some(130 | 0)), "{status:?}");
}
