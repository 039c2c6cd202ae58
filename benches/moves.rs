//! What moving a great shard costs those who use other shards meanwhile.
//!
//! `cargo bench --bench moves`, or with arguments behind `--`, such as `--pairs 5 --size 256 --trace`; `--test` does
//! a tiny one, for a few seconds. Four nodes, each a process, on one disk and with this machine's cores between them
//! and the clients: that is harder on the clients than four machines are. Nodes 3 and 4 give each other all they hold,
//! back and forth: the one shard of a database of `--size` MiB, and followers of a small one. The
//! shards of the small one are led by nodes 1 and 2 throughout, and are written, or read, by clients in closed loops,
//! once with nothing moving and once from the word to move until the node that gave is empty, its disk too. Figures
//! are of such pairs; a ratio is of one pair, and the median of them is what counts on a machine that isn't idle.
//!
//! The directory is made under `PONTOON_BENCH_DIR`, or else under `target`: the temporary directory may lie in memory,
//! where a sync costs nothing. `PONTOON_BENCH_BINARY` names another build of the program to be measured.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use clap::Parser;
use futures_util::future::join_all;
use hdrhistogram::Histogram;
use pontoon::client::options::ClientOptions;
use pontoon::client::{Client, Database, Operation};
use pontoon::ids::{NodeId, ShardId};
use pontoon::machine::command::PolicyChange;
use pontoon::node::handle::NodeReport;
use pontoon::placement::map::{ClusterMap, Standing};
use rand::rngs::SmallRng;
use rand::{Rng, RngExt, SeedableRng};
use tokio::signal::unix::{SignalKind, signal};

const NODES: usize = 4;
/// Nodes that the databases are made on; the rest joins after that.
const FIRST: usize = 3;
const GREAT_VALUE_BYTES: usize = 64 << 10;
/// Values in one call while the great shard is filled, and such calls at a time.
const FILL: (usize, usize) = (15, 4);
const CLIENTS: u64 = 8;
const VALUE_BYTES: usize = 256;
const KEYS: u64 = 10_000;
/// For whatever changes the cluster.
const PATIENCE: Duration = Duration::from_secs(30);
/// For a move to end.
const MOVE: Duration = Duration::from_secs(1_200);
/// Between a round and the next.
const REST: Duration = Duration::from_secs(3);
const SAMPLE: Duration = Duration::from_secs(1);
const MIB: f64 = (1 << 20) as f64;

/// A node ends with whoever holds the other end of its keeper's input, however that one ends, and its data with it.
/// The keeper itself doesn't hold the node's output: that ends with the node, even one that is never ready.
const KEEPER: &str = r#""$0" serve --config "$1" & node=$!; exec >/dev/null; read -r word
kill -KILL $node; wait $node; rm -rf "$2""#;

#[derive(Parser)]
struct Options {
    /// MiB in the shard that moves.
    #[arg(long, default_value_t = 1024)]
    size: usize,
    /// Pairs of rounds for each workload.
    #[arg(long, default_value_t = 3)]
    pairs: usize,
    /// Seconds of a round in which nothing moves.
    #[arg(long, default_value_t = 20)]
    seconds: u64,
    /// Shards of the small database.
    #[arg(long, default_value_t = 8)]
    shards: u32,
    /// Only this workload: put or get.
    #[arg(long)]
    only: Option<String>,
    /// Print each second of a round in which something moves.
    #[arg(long)]
    trace: bool,
    /// A tiny run.
    #[arg(long)]
    test: bool,
    /// Told by cargo where this is run as a benchmark.
    #[arg(long, hide = true)]
    bench: bool,
}

/// One node, and who keeps it.
struct Node {
    client: String,
    peer: String,
    keeper: Child,
}

/// Dropped: killed and removed.
struct Cluster {
    // Before the directory, which is theirs.
    nodes: Vec<Node>,
    dir: tempfile::TempDir,
}

impl Cluster {
    fn new() -> Cluster {
        let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("target");
        let under = std::env::var_os("PONTOON_BENCH_DIR").map_or(target, PathBuf::from);
        std::fs::create_dir_all(&under).expect("a directory");
        Cluster { nodes: Vec::new(), dir: tempfile::tempdir_in(under).expect("a directory") }
    }

    /// Starts `count` nodes: the first ones form a cluster, later ones join it. Returns when they are ready.
    async fn start(&mut self, count: usize) {
        let ports = free_ports(2 * count);
        let address = |port: &u16| format!("127.0.0.1:{port}");
        let mut peers: Vec<String> = self.nodes.iter().map(|node| node.peer.clone()).collect();
        let word = if peers.is_empty() { "initial" } else { "join" };
        if peers.is_empty() {
            peers.extend(ports[count..].iter().map(address));
        }
        let before = self.nodes.len();
        for (client, peer) in ports[..count].iter().zip(&ports[count..]) {
            self.start_one(address(client), address(peer), &format!("{word} = {peers:?}"));
        }
        let until = Instant::now() + PATIENCE;
        for at in before..self.nodes.len() {
            let output = self.nodes[at].keeper.stdout.take().expect("read once");
            let line = first_line(output, until).await;
            if !line.as_ref().is_ok_and(|line| line.starts_with("ready ")) {
                self.print_logs();
                panic!("node {} isn't ready: {line:?}", at + 1);
            }
        }
    }

    fn start_one(&mut self, client: String, peer: String, members: &str) {
        let name = format!("n{}", self.nodes.len() + 1);
        let data = self.dir.path().join(&name);
        let config = data.with_extension("toml");
        let text = format!(
            "[node]\nid = \"{name}\"\ndata_dir = {data:?}\n[client]\nlisten = \"{client}\"\n\
             [peer]\nlisten = \"{peer}\"\n[cluster]\n{members}\n"
        );
        std::fs::write(&config, text).expect("writing settings");
        let log = std::fs::File::create(data.with_extension("log")).expect("a log file");
        let binary = std::env::var_os("PONTOON_BENCH_BINARY");
        let keeper = Command::new("sh")
            .args(["-c", KEEPER])
            .arg(binary.unwrap_or_else(|| OsString::from(env!("CARGO_BIN_EXE_pontoon"))))
            .args([&config, &data])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            // What a terminal sends to all in the foreground is for this process alone.
            .process_group(0)
            .spawn()
            .expect("starting a node");
        self.nodes.push(Node { client, peer, keeper });
    }

    /// What the nodes have logged last, for one who wonders why a round takes so long.
    fn print_logs(&self) {
        for number in 1..=self.nodes.len() {
            let log = self.dir.path().join(format!("n{number}.log"));
            let text = std::fs::read_to_string(log).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            eprintln!("node {number}:\n{}", lines[lines.len().saturating_sub(8)..].join("\n"));
        }
    }

    fn addresses(&self) -> Vec<String> {
        self.nodes.iter().map(|node| node.client.clone()).collect()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for node in &mut self.nodes {
            drop(node.keeper.stdin.take());
        }
        for node in &mut self.nodes {
            if let Err(error) = node.keeper.wait() {
                eprintln!("a node's end: {error}");
            }
        }
    }
}

/// The first line of a node's output, or of nothing where it has ended. On a thread of its own: who is told to stop
/// meanwhile isn't to wait for it.
async fn first_line(output: ChildStdout, until: Instant) -> Result<String, String> {
    let (told, line) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let mut line = String::new();
        let read = BufReader::new(output).read_line(&mut line);
        // Nobody waits for it any more once the time is over.
        told.send(read.map(|_| line)).ok();
    });
    match tokio::time::timeout_at(until.into(), line).await {
        Ok(Ok(line)) => line.map_err(|error| error.to_string()),
        Ok(Err(_)) => Err("its output can't be read".into()),
        Err(_) => Err(format!("it says nothing within {PATIENCE:?}")),
    }
}

/// Ports of 127.0.0.1 that were free a moment ago.
fn free_ports(count: usize) -> Vec<u16> {
    let listeners: Vec<_> =
        (0..count).map(|_| TcpListener::bind("127.0.0.1:0").expect("a free port")).collect();
    listeners.iter().map(|listener| listener.local_addr().expect("an address").port()).collect()
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Workload {
    Put,
    Get,
}

/// What clients saw.
struct Tally {
    begun: Instant,
    seconds: f64,
    whole: Histogram<u64>,
    /// Each second by itself.
    parts: Vec<Histogram<u64>>,
}

impl Tally {
    fn new() -> Tally {
        Tally { begun: Instant::now(), seconds: 0.0, whole: histogram(), parts: Vec::new() }
    }

    fn count(&mut self, began: Instant) {
        let us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.whole.saturating_record(us);
        let part = self.begun.elapsed().as_secs() as usize;
        while self.parts.len() <= part {
            self.parts.push(histogram());
        }
        self.parts[part].saturating_record(us);
    }

    fn rate(&self) -> f64 {
        self.whole.len() as f64 / self.seconds
    }
}

fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 600_000_000, 3).expect("right bounds")
}

fn ms(histogram: &Histogram<u64>, quantile: f64) -> f64 {
    histogram.value_at_quantile(quantile) as f64 / 1000.0
}

/// Has clients work until `until` has ended; what they saw, and what that came to.
async fn measured<T>(database: &Database, workload: Workload, until: impl Future<Output = T>) -> (Tally, T) {
    let (tally, stop) = (RefCell::new(Tally::new()), Cell::new(false));
    let clients = join_all((0..CLIENTS).map(|number| client(database, workload, number, &tally, &stop)));
    let ending = async {
        let outcome = until.await;
        stop.set(true);
        outcome
    };
    let (_, outcome) = futures_util::future::join(clients, ending).await;
    let mut tally = tally.into_inner();
    tally.seconds = tally.begun.elapsed().as_secs_f64();
    (tally, outcome)
}

async fn client(
    database: &Database,
    workload: Workload,
    number: u64,
    tally: &RefCell<Tally>,
    stop: &Cell<bool>,
) {
    let mut random = SmallRng::seed_from_u64(number);
    let value = random_value(&mut random, VALUE_BYTES);
    while !stop.get() {
        let key = key(random.random_range(0..KEYS));
        let began = Instant::now();
        match workload {
            Workload::Put => drop(database.put(key, value.clone()).await.expect("a put")),
            Workload::Get => {
                assert!(database.get(key).await.expect("a get").is_some(), "it was written before")
            }
        }
        tally.borrow_mut().count(began);
    }
}

fn key(number: u64) -> Bytes {
    format!("k{number:015}").into()
}

fn random_value(random: &mut SmallRng, bytes: usize) -> Bytes {
    let mut value = vec![0; bytes];
    random.fill_bytes(&mut value);
    value.into()
}

/// Writes `count` keys once, `at_once` calls of `batch` at a time.
async fn fill(database: &Database, count: u64, bytes: usize, (batch, at_once): (usize, usize)) {
    let mut random = SmallRng::seed_from_u64(count);
    let value = random_value(&mut random, bytes);
    let numbers: Vec<u64> = (0..count).collect();
    let batches: Vec<&[u64]> = numbers.chunks(batch).collect();
    for some in batches.chunks(at_once) {
        let calls = some.iter().map(|numbers| {
            database.batch(numbers.iter().map(|n| Operation::Put(key(*n), value.clone())).collect())
        });
        for result in join_all(calls).await.into_iter().flatten() {
            result.expect("a put");
        }
    }
}

/// What is measured: the cluster, as clients see it.
struct Bench<'a> {
    options: &'a Options,
    client: Client,
    nodes: Vec<String>,
    small: Database,
    small_shards: Vec<ShardId>,
    great_shard: ShardId,
}

impl Bench<'_> {
    async fn report(&self, node: NodeId) -> NodeReport {
        let address = &self.nodes[node.0 as usize - 1];
        let report = self.client.node_report(address, PATIENCE).await.expect("a report");
        assert_eq!(report.node, node, "nodes are numbered as they were started");
        report
    }

    async fn map(&self) -> std::sync::Arc<ClusterMap> {
        self.client.map().await.expect("the map")
    }

    /// Has the nodes that nothing is moved from lead.
    async fn settle_leaders(&self) {
        for (number, shard) in self.small_shards.iter().chain([&self.great_shard]).enumerate() {
            let node = NodeId(1 + number as u64 % 2);
            self.client.transfer_leader(*shard, node, PATIENCE).await.expect("another leader");
        }
    }

    async fn stand(&self, node: NodeId, standing: Standing) {
        self.client.set_standing(node, standing, PATIENCE).await.expect("a decision");
    }

    /// Moves all that is on `from` to the one node that has nothing. Returns the bytes of snapshots that had been sent,
    /// second by second.
    async fn empty(&self, from: NodeId) -> Vec<u64> {
        let begun = Instant::now();
        let mut sent = Vec::new();
        self.stand(from, Standing::Draining).await;
        let mut tick = tokio::time::interval_at((begun + SAMPLE).into(), SAMPLE);
        loop {
            tick.tick().await;
            sent.push(self.sent().await);
            let map = self.map().await;
            let moved = map.shards.values().filter(|shard| !shard.dropped).all(|shard| {
                shard.moving.is_none() && shard.members.iter().all(|member| member.node != from)
            });
            if moved && self.report(from).await.replicas.is_empty() {
                break;
            }
            assert!(begun.elapsed() < MOVE, "node {from} isn't empty yet: {:?}", map.shards);
        }
        self.stand(from, Standing::Member).await;
        sent
    }

    /// Bytes of snapshots that all nodes have sent.
    async fn sent(&self) -> u64 {
        let reports = join_all((1..=NODES as u64).map(|node| self.report(NodeId(node)))).await;
        reports.iter().map(|report| report.snapshot_bytes).sum()
    }

    /// One round with nothing moving, and one in which all moves from one node to another.
    async fn pair(&self, number: usize, workload: Workload, from: NodeId) -> Pair {
        self.settle_leaders().await;
        tokio::time::sleep(REST).await;
        let time = Duration::from_secs(self.options.seconds);
        let (quiet, ()) = measured(&self.small, workload, tokio::time::sleep(time)).await;
        print_round(number, workload, "quiet", &quiet, "");
        tokio::time::sleep(REST).await;
        let before = self.sent().await;
        let (moving, sent) = measured(&self.small, workload, self.empty(from)).await;
        let speed = speed(before, &sent);
        print_round(number, workload, "moving", &moving, &speed);
        if self.options.trace {
            print_trace(&moving, before, &sent);
        }
        Pair { quiet, moving }
    }
}

struct Pair {
    quiet: Tally,
    moving: Tally,
}

fn print_round(number: usize, workload: Workload, state: &str, tally: &Tally, remark: &str) {
    let Tally { seconds, whole, .. } = tally;
    println!(
        "{number:>2} {:4} {state:7} {seconds:>6.1} s {:>7.0}/s  p50 {:>6.2} ms  p99 {:>6.2} ms  p99.9 {:>6.2} ms  max {:>6.1} ms  {remark}",
        format!("{workload:?}").to_lowercase(),
        tally.rate(),
        ms(whole, 0.5),
        ms(whole, 0.99),
        ms(whole, 0.999),
        ms(whole, 1.0),
    );
}

fn print_trace(tally: &Tally, before: u64, sent: &[u64]) {
    let mut last = before;
    for (second, part) in tally.parts.iter().enumerate() {
        let now = sent.get(second).copied().unwrap_or(last);
        println!(
            "   {second:>4} s {:>7}/s  p50 {:>6.2} ms  p99 {:>6.2} ms  max {:>6.1} ms  {:>6.1} MiB sent",
            part.len(),
            ms(part, 0.5),
            ms(part, 0.99),
            ms(part, 1.0),
            now.saturating_sub(last) as f64 / MIB,
        );
        last = now;
    }
}

/// How much was sent, and how fast while the most of it was.
fn speed(before: u64, sent: &[u64]) -> String {
    let all = sent.last().map_or(0, |last| last - before);
    // Without the tails: what small shards send before and after.
    let at = |part: f64| sent.iter().filter(|sent| ((**sent - before) as f64) < part * all as f64).count();
    let (first, last) = (at(0.1), at(0.9));
    let rate = match last > first {
        true => (sent[last] - sent[first]) as f64 / MIB / (last - first) as f64,
        false => return format!("{:.0} MiB sent", all as f64 / MIB),
    };
    format!("{:.0} MiB sent, {rate:.1} MiB/s", all as f64 / MIB)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let half = values.len() / 2;
    match values.len() % 2 {
        1 => values[half],
        _ => (values[half - 1] + values[half]) / 2.0,
    }
}

fn print_ratios(workload: Workload, pairs: &[Pair]) {
    let ratios = |of: &dyn Fn(&Tally) -> f64| -> Vec<f64> {
        pairs.iter().map(|pair| of(&pair.moving) / of(&pair.quiet)).collect()
    };
    let p99 = ratios(&|tally| ms(&tally.whole, 0.99));
    let told: Vec<String> = p99.iter().map(|ratio| format!("{ratio:.2}")).collect();
    println!(
        "{}: moving/quiet, median of {}: p99 {:.2} ({}), p50 {:.2}, operations {:.2}",
        format!("{workload:?}").to_lowercase(),
        pairs.len(),
        median(p99),
        told.join(" "),
        median(ratios(&|tally| ms(&tally.whole, 0.5))),
        median(ratios(&Tally::rate)),
    );
}

fn print_machine(options: &Options) {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo");
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("");
    println!(
        "{}, {} × {}, load {}; {} MiB in one shard of 3 replicas beside 3 × {} small ones, {CLIENTS} clients, \
         values of {VALUE_BYTES} bytes",
        humantime::format_rfc3339_seconds(SystemTime::now()),
        std::thread::available_parallelism().map_or(0, usize::from),
        model.trim_start_matches(['\t', ' ', ':']),
        read("/proc/loadavg").split(' ').next().unwrap_or_default(),
        options.size,
        options.shards,
    );
}

async fn run(options: &Options, cluster: &mut Cluster) {
    print_machine(options);
    cluster.start(FIRST).await;
    let client = Client::connect_with(ClientOptions::new(cluster.addresses())).await.expect("connecting");
    client.change_setting(PolicyChange::Automatic(false), PATIENCE).await.expect("a setting");
    let mut shards = BTreeMap::new();
    for (name, count) in [("great", 1), ("small", options.shards)] {
        client.create_database(name, FIRST as u32, count, PATIENCE).await.expect("a database");
        let map = client.map().await.expect("the map");
        shards.insert(name, map.database(name).expect("just made").shards.clone());
    }
    cluster.start(NODES - FIRST).await;
    let great = client.database("great").with_timeout(PATIENCE);
    let begun = Instant::now();
    fill(&great, (options.size << 20).div_ceil(GREAT_VALUE_BYTES) as u64, GREAT_VALUE_BYTES, FILL).await;
    let small = client.database("small").with_timeout(PATIENCE);
    fill(&small, KEYS, VALUE_BYTES, (1000, 1)).await;
    println!("filled in {:.0} s", begun.elapsed().as_secs_f64());
    let bench = Bench {
        options,
        client,
        nodes: cluster.addresses(),
        small,
        small_shards: shards["small"].clone(),
        great_shard: shards["great"][0],
    };
    let mut from = NodeId(FIRST as u64);
    let both = [Workload::Put, Workload::Get];
    let is_wanted = |workload: &Workload| {
        options.only.as_ref().is_none_or(|only| only.eq_ignore_ascii_case(&format!("{workload:?}")))
    };
    let workloads: Vec<Workload> = both.into_iter().filter(is_wanted).collect();
    let mut pairs: Vec<Vec<Pair>> = workloads.iter().map(|_| Vec::new()).collect();
    for number in 1..=options.pairs {
        for (workload, pairs) in workloads.iter().zip(&mut pairs) {
            pairs.push(bench.pair(number, *workload, from).await);
            from = if from == NodeId(3) { NodeId(4) } else { NodeId(3) };
        }
    }
    for (workload, pairs) in workloads.iter().zip(&pairs) {
        print_ratios(*workload, pairs);
    }
    bench.client.close().await;
}

fn main() {
    let mut options = Options::parse();
    // As other benchmarks take it: `cargo test` runs them without either word.
    if options.test || !options.bench {
        options = Options { size: 4, pairs: 1, seconds: 1, shards: 2, ..options };
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let mut cluster = Cluster::new();
    let stopped = runtime.block_on(async {
        let mut terminated = signal(SignalKind::terminate()).expect("a handler");
        tokio::select! {
            () = run(&options, &mut cluster) => false,
            _ = tokio::signal::ctrl_c() => true,
            _ = terminated.recv() => true,
        }
    });
    if stopped {
        cluster.print_logs();
    }
    // Not by `exit`, before the nodes are gone.
    drop(cluster);
    if stopped {
        eprintln!("stopped");
        std::process::exit(1);
    }
}
