//! Nodes as processes of their own, on real sockets and disks, for tests of what a user sees.
#![allow(dead_code)] // Each test binary uses its own part.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use pontoon::client::options::ClientOptions;
use pontoon::client::{Client, Database};

/// The binary under test.
pub fn pontoon() -> Command {
    Command::new(env!("CARGO_BIN_EXE_pontoon"))
}

/// Runs a subcommand to its end.
pub fn run(args: &[&str]) -> Output {
    pontoon().args(args).stdin(Stdio::null()).output().expect("running pontoon")
}

/// Ports that the processes of these tests share out among themselves: below those that the system gives to whoever asks
/// for any, such as a connection of a node, and those that `pontoon setup` takes by chance, such as one of a node that is
/// to start again.
const PORTS: Range<u16> = 10_240..19_968;
/// Ports that a process takes at a time.
const BLOCK: u16 = 64;

/// For a node to become ready.
const READY: Duration = Duration::from_secs(60);

/// For a node to end that was told to, or has to: three times what is promised.
pub const STOPPED: Duration = Duration::from_millis(3 * pontoon::limits::STOP_MS_MAX);

/// Some ports, for one process.
struct Block {
    /// On the first of them, for as long as the process runs: then it is nobody else's.
    _claim: TcpListener,
    left: Range<u16>,
}

impl Block {
    fn claim() -> Block {
        let blocks = u32::from((PORTS.end - PORTS.start) / BLOCK);
        // Not all begin at the same.
        let claims = (0..blocks).map(|n| PORTS.start + ((std::process::id() + n) % blocks) as u16 * BLOCK);
        let mut claimed = claims.filter_map(|first| {
            let claim = TcpListener::bind(("127.0.0.1", first)).ok()?;
            Some(Block { _claim: claim, left: first + 1..first + BLOCK })
        });
        claimed.next().expect("free ports")
    }
}

/// Ports of 127.0.0.1 that are free, and that no other process of these tests is given.
pub fn free_ports(count: usize) -> Vec<u16> {
    static BLOCKS: Mutex<Vec<Block>> = Mutex::new(Vec::new());
    let mut blocks = BLOCKS.lock().unwrap_or_else(PoisonError::into_inner);
    let mut ports = Vec::new();
    while ports.len() < count {
        match blocks.last_mut().and_then(|block| block.left.next()) {
            Some(port) if TcpListener::bind(("127.0.0.1", port)).is_ok() => ports.push(port),
            // A stranger's.
            Some(_) => {}
            None => blocks.push(Block::claim()),
        }
    }
    ports
}

/// Asks an HTTP port of 127.0.0.1: the status and the body.
pub fn http_get(port: u16, path: &str) -> std::io::Result<(u16, String)> {
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    write!(stream, "GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    Ok((status.expect("a status line"), body.to_owned()))
}

/// The sum of a metric over all its labels, as in the text of /metrics.
pub fn metric(text: &str, name: &str) -> Option<f64> {
    let samples = text.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        let (labels, value) = rest.rsplit_once(' ')?;
        (labels.is_empty() || labels.starts_with('{')).then(|| value.parse::<f64>().expect("a number"))
    });
    samples.fold(None, |sum, value| Some(sum.unwrap_or(0.0) + value))
}

/// One daemon and its settings.
pub struct Node {
    pub config: PathBuf,
    pub data: PathBuf,
    pub client: String,
    pub peer: String,
    child: Option<Child>,
}

/// Daemons of one cluster, in one temporary directory. Dropped: killed and removed.
pub struct Cluster {
    pub dir: tempfile::TempDir,
    pub nodes: Vec<Node>,
    /// For nodes that come later.
    options: Options,
}

/// What a node's settings may differ in.
#[derive(Clone, Default)]
pub struct Options {
    /// Peer addresses to advertise instead of the real ones: those of proxies.
    pub advertise: Option<Vec<String>>,
    /// Lines of TOML added to the section `node` of each file.
    pub node: String,
    /// Lines of TOML added to the section `storage` of each file, and others behind it.
    pub extra: String,
    /// What the environment of each process has beside that of the test.
    pub env: Vec<(&'static str, String)>,
}

impl Cluster {
    /// Writes settings for `count` nodes and starts them, without waiting.
    pub fn new(count: usize) -> Cluster {
        Cluster::with(count, &free_ports(2 * count), Options::default())
    }

    /// The same on given ports: clients first, then peers.
    pub fn with(count: usize, ports: &[u16], options: Options) -> Cluster {
        let mut cluster = Cluster::prepared(count, ports, options);
        for node in 0..count {
            cluster.spawn(node);
        }
        cluster
    }

    /// Only the settings, nothing started.
    pub fn prepared(count: usize, ports: &[u16], options: Options) -> Cluster {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let (clients, peers) = ports.split_at(count);
        let advertise = (options.advertise.clone())
            .unwrap_or_else(|| peers.iter().map(|port| format!("127.0.0.1:{port}")).collect());
        let initial: Vec<String> = advertise.iter().map(|a| format!("\"{a}\"")).collect();
        let members = format!("initial = [{}]", initial.join(", "));
        let mut cluster = Cluster { dir, nodes: Vec::new(), options: Options::default() };
        for i in 0..count {
            cluster.configure(clients[i], peers[i], &advertise[i], &members, &options);
        }
        cluster.options = options;
        cluster
    }

    /// The settings of one more node, which is to join through any of those that are there. Returns it, not
    /// started.
    pub fn add(&mut self) -> usize {
        let ports = free_ports(2);
        let peers: Vec<String> = self.nodes.iter().map(|node| format!("\"{}\"", node.peer)).collect();
        let (members, options) = (format!("join = [{}]", peers.join(", ")), self.options.clone());
        self.configure(ports[0], ports[1], &format!("127.0.0.1:{}", ports[1]), &members, &options);
        self.nodes.len() - 1
    }

    /// The same, started, and waited for until it is ready.
    pub fn join(&mut self) -> usize {
        let node = self.add();
        self.spawn(node);
        self.wait_ready(node);
        node
    }

    /// Writes the settings of the next node.
    fn configure(&mut self, client: u16, peer: u16, advertise: &str, members: &str, options: &Options) {
        let number = self.nodes.len() + 1;
        let data = self.dir.path().join(format!("n{number}"));
        let config = self.dir.path().join(format!("n{number}.toml"));
        let (client, peer) = (format!("127.0.0.1:{client}"), format!("127.0.0.1:{peer}"));
        let text = format!(
            "[node]\nid = \"n{number}\"\ndata_dir = {data:?}\n{}\n[client]\nlisten = \"{client}\"\n[peer]\nlisten = \"{peer}\"\n\
             advertise = \"{advertise}\"\n[cluster]\n{members}\n[storage]\ncache_bytes = \"16MiB\"\nmemtable_bytes = \"32MiB\"\n\
             log_file_bytes = \"8MiB\"\nlog_bytes = \"64MiB\"\nlog_spare_files = 0\n{}\n",
            options.node, options.extra,
        );
        std::fs::write(&config, text).expect("writing settings");
        self.nodes.push(Node { config, data, client, peer, child: None });
    }

    /// One more line in the section `node` of a node's settings, for its next start.
    pub fn amend(&self, node: usize, line: &str) {
        let config = &self.nodes[node].config;
        let text = std::fs::read_to_string(config).expect("its settings");
        assert_eq!(text.matches("\n[client]\n").count(), 1, "{text}");
        let amended = text.replace("\n[client]\n", &format!("\n{line}\n[client]\n"));
        std::fs::write(config, amended).expect("writing settings");
    }

    /// Starts a node, without waiting.
    pub fn spawn(&mut self, node: usize) {
        self.start(node, &[], "");
    }

    /// The same with more arguments.
    pub fn spawn_with(&mut self, node: usize, args: &[&str]) {
        self.start(node, args, "");
    }

    /// The same with rules about what goes wrong in it, from the start.
    pub fn spawn_armed(&mut self, node: usize, rules: &str) {
        self.start(node, &[], rules);
    }

    fn start(&mut self, node: usize, args: &[&str], rules: &str) {
        let node = &mut self.nodes[node];
        assert!(node.child.is_none(), "it runs");
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(node.config.with_extension("log"))
            .expect("the log file");
        let child = pontoon()
            .args(["serve", "--config"])
            .arg(&node.config)
            .args(args)
            .env("PONTOON_TEST_HOOKS", rules)
            .envs(self.options.env.iter().cloned())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .expect("starting a node");
        node.child = Some(child);
    }

    /// Waits until a node that was just started prints its ready line; returns it. Panics where it, or another that isn't
    /// ready yet, ends instead: without that one, this one may wait for ever.
    pub fn wait_ready(&mut self, node: usize) -> String {
        let (line, begun) = (self.first_line(node), Instant::now());
        loop {
            match line.recv_timeout(Duration::from_millis(100)) {
                Ok(Ok(line)) if line.starts_with("ready ") => return line,
                Ok(told) => panic!("node {node} said {told:?}; its log:\n{}", self.log(node)),
                Err(_) => assert!(begun.elapsed() < READY, "node {node} isn't ready: {}", self.log(node)),
            }
            for other in 0..self.nodes.len() {
                let child = self.nodes[other].child.as_mut().filter(|child| child.stdout.is_some());
                if let Some(status) = child.and_then(|child| child.try_wait().expect("its state")) {
                    panic!("node {other} has ended, {status}, unready; its log:\n{}", self.log(other));
                }
            }
        }
    }

    /// What a node that was just started prints first; nothing, if it ends before. Read on a thread of its own.
    fn first_line(&mut self, node: usize) -> mpsc::Receiver<std::io::Result<String>> {
        let child = self.nodes[node].child.as_mut().expect("running");
        let stdout = child.stdout.take().expect("its ready line is read once");
        let (told, line) = mpsc::channel();
        std::thread::spawn(move || {
            let mut line = String::new();
            let read = BufReader::new(stdout).read_line(&mut line);
            // Killed meanwhile: nobody waits for it any more.
            told.send(read.map(|_| line)).ok();
        });
        line
    }

    /// Waits until a node that was just started prints its ready line (`None`), or exits: with which code.
    /// Panics after `within`.
    pub fn ready_or_exit(&mut self, node: usize, within: Duration) -> Option<Option<i32>> {
        match self.first_line(node).recv_timeout(within) {
            Ok(line) if line.as_ref().is_ok_and(|line| line.starts_with("ready ")) => None,
            Ok(_) => Some(self.wait_exit(node, within).code()),
            Err(_) => panic!("node {node} is neither ready nor gone; its log:\n{}", self.log(node)),
        }
    }

    /// Waits for all of them.
    pub fn wait_all_ready(&mut self) {
        for node in 0..self.nodes.len() {
            self.wait_ready(node);
        }
    }

    /// kill -9, if it runs.
    pub fn kill_if_running(&mut self, node: usize) {
        if self.nodes[node].child.is_some() {
            self.kill(node);
        }
    }

    /// kill -9.
    pub fn kill(&mut self, node: usize) {
        let mut child = self.nodes[node].child.take().expect("running");
        child.kill().expect("killing it");
        child.wait().expect("its end");
    }

    /// Whether its process was started and not seen to end.
    pub fn runs(&self, node: usize) -> bool {
        self.nodes[node].child.is_some()
    }

    /// Process id of a running node.
    pub fn pid(&self, node: usize) -> u32 {
        self.nodes[node].child.as_ref().expect("running").id()
    }

    /// Sends a signal. Once it has been stopped, it does nothing more: on a busy machine its threads may go on for a while
    /// after the signal.
    pub fn signal(&self, node: usize, signal: rustix::process::Signal) {
        use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};
        let child = self.nodes[node].child.as_ref().expect("running");
        let pid = Pid::from_raw(child.id() as i32).expect("a pid");
        kill_process(pid, signal).expect("signalling it");
        let begun = Instant::now();
        let stopped = WaitIdOptions::STOPPED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
        while signal == Signal::STOP && waitid(WaitId::Pid(pid), stopped).expect("its state").is_none() {
            assert!(begun.elapsed() < Duration::from_secs(30), "node {node} doesn't stop");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits until a node ends by itself; panics after `within`.
    pub fn wait_exit(&mut self, node: usize, within: Duration) -> ExitStatus {
        let mut child = self.nodes[node].child.take().expect("running");
        let begun = Instant::now();
        loop {
            if let Some(status) = child.try_wait().expect("its state") {
                return status;
            }
            if begun.elapsed() > within {
                let _ = child.kill();
                panic!("node {node} still ran after {within:?}; its log:\n{}", self.log(node));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// What a node has logged last.
    pub fn log(&self, node: usize) -> String {
        tail(&self.nodes[node].config.with_extension("log"))
    }

    /// All that a node has logged.
    pub fn whole_log(&self, node: usize) -> String {
        std::fs::read_to_string(self.nodes[node].config.with_extension("log")).unwrap_or_default()
    }

    /// How a node's process has ended, if it has.
    pub fn ended(&mut self, node: usize) -> Option<ExitStatus> {
        let status = self.nodes[node].child.as_mut()?.try_wait().expect("its state")?;
        self.nodes[node].child = None;
        Some(status)
    }

    /// Client addresses of all nodes.
    pub fn addresses(&self) -> Vec<String> {
        self.nodes.iter().map(|n| n.client.clone()).collect()
    }

    /// A client that knows all nodes.
    pub async fn client(&self) -> Client {
        let options = ClientOptions::new(self.addresses());
        Client::connect_with(options).await.expect("connecting")
    }

    /// Creates a database and returns it.
    pub async fn database(&self, client: &Client, name: &str, replicas: u32, shards: u32) -> Database {
        let begun = Instant::now();
        loop {
            match client.create_database(name, replicas, shards, Duration::from_secs(30)).await {
                Ok(_) => return client.database(name),
                // On a busy machine one that was started just now doesn't answer in time, and counts as down.
                Err(error) if error.to_string().contains("that are up") && begun.elapsed() < READY => {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                Err(error) => panic!("creating {name}: {error}; node 1 says:\n{}", self.log(0)),
            }
        }
    }

    /// Runs a subcommand against this cluster.
    pub fn run(&self, args: &[&str]) -> Output {
        let addresses = self.addresses().join(",");
        pontoon()
            .args(args)
            .env("PONTOON_CLUSTER", addresses)
            .stdin(Stdio::null())
            .output()
            .expect("running pontoon")
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for node in &mut self.nodes {
            if let Some(mut child) = node.child.take() {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
    }
}

fn tail(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(40)..].join("\n")
}
