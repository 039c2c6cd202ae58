//! The engine without clients: three nodes in one process, with everything that they are but the RPC of clients.
//!
//! `cargo bench --bench engine`, or with arguments behind `--`, such as `--in-flight 1,64,256`; `--test` does a tiny
//! run. Puts are handed to the mailbox of the replica that leads, as the service for clients does, by closed loops
//! that share a thread; all else is real: peers talk over loopback, and a put is acknowledged when it is on the disk
//! of a majority. Settings are those of `serve`.
//!
//! The directory is made under `PONTOON_BENCH_DIR`, or else under `target`: the temporary directory may lie in memory,
//! where a sync costs nothing.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bytes::Bytes;
use clap::Parser;
use futures_util::future::join_all;
use hdrhistogram::Histogram;
use pontoon::client::Client;
use pontoon::client::options::ClientOptions;
use pontoon::group::types::{Operation, Output};
use pontoon::ids::ShardId;
use pontoon::machine::command::{Command, KvCommand};
use pontoon::node::handle::NodeHandle;
use pontoon::node::{self, Listeners, RunningNode};
use pontoon::refusal::Refusal;
use pontoon::settings::Settings;
use rand::rngs::SmallRng;
use rand::{Rng, RngExt, SeedableRng};
use rustix::time::{ClockId, clock_gettime};

/// That of the program.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const NODES: usize = 3;
const DATABASE: &str = "bench";
const PATIENCE: Duration = Duration::from_secs(30);
/// Before a leader is looked for again.
const PAUSE: Duration = Duration::from_millis(20);

#[derive(Parser)]
struct Options {
    /// Puts under way at a time, one figure for each.
    #[arg(long, value_delimiter = ',', default_value = "1,64,256,1024")]
    in_flight: Vec<usize>,
    /// Shards of the database.
    #[arg(long, default_value_t = 8)]
    shards: u32,
    /// Seconds that are measured, after one that isn't.
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// Keys, drawn evenly.
    #[arg(long, default_value_t = 100_000)]
    keys: u64,
    /// Bytes in a value.
    #[arg(long, default_value_t = 128)]
    value_bytes: usize,
    /// A tiny run.
    #[arg(long)]
    test: bool,
    /// Told by cargo where this is run as a benchmark.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Where a shard's operations go.
#[derive(Clone)]
struct Lead {
    node: NodeHandle,
    range_version: u64,
}

fn main() {
    let mut options = Options::parse();
    if options.test || !options.bench {
        options.in_flight = vec![16];
        options.seconds = 0.2;
        options.keys = 1_000;
    }
    let system = actix::System::new();
    system.block_on(run(&options));
}

async fn run(options: &Options) {
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("target");
    let under = std::env::var_os("PONTOON_BENCH_DIR").map_or(target, PathBuf::from);
    std::fs::create_dir_all(&under).expect("a directory");
    let dir = tempfile::tempdir_in(under).expect("a directory");
    let nodes = start(dir.path()).await;
    let handles: Vec<NodeHandle> = nodes.iter().map(RunningNode::handle).collect();
    let addresses: Vec<String> =
        handles[0].map().nodes.values().map(|node| node.client_address.clone()).collect();
    let client = Client::connect_with(ClientOptions::new(addresses)).await.expect("a client");
    client.create_database(DATABASE, NODES as u32, options.shards, PATIENCE).await.expect("a database");
    client.close().await;
    println!(
        "puts of {} bytes to {} keys in {} shards, on {NODES} nodes in one process",
        options.value_bytes, options.keys, options.shards
    );
    println!("in flight     puts/s   p50 µs   p99 µs   processor µs a put, all and the load");
    for in_flight in &options.in_flight {
        measure(options, *in_flight, &handles).await;
    }
    for node in nodes {
        node.stop(PATIENCE).await.expect("a clean stop");
    }
}

/// Three nodes that are members of one cluster.
async fn start(dir: &Path) -> Vec<RunningNode> {
    let bind = || TcpListener::bind("127.0.0.1:0").expect("a port");
    let ports: Vec<(TcpListener, TcpListener)> = (0..NODES).map(|_| (bind(), bind())).collect();
    let address = |port: &TcpListener| port.local_addr().expect("an address").to_string();
    let initial: Vec<String> = ports.iter().map(|(_, peer)| address(peer)).collect();
    let mut nodes = Vec::new();
    for (at, (client, peer)) in ports.into_iter().enumerate() {
        let text = format!(
            "[node]\nid = \"n{at}\"\ndata_dir = {:?}\n[client]\nlisten = {:?}\n[peer]\nlisten = {:?}\n\
             [http]\nlisten = \"\"\n[cluster]\ninitial = {initial:?}\n",
            dir.join(format!("n{at}")),
            address(&client),
            address(&peer),
        );
        let settings = Settings::load_str("bench", &text, std::iter::empty()).expect("settings");
        let listeners = Listeners { client, peer, http: None };
        nodes.push(node::start(settings, listeners).await.expect("a node"));
    }
    let ready = join_all(nodes.iter().map(RunningNode::ready));
    for ready in tokio::time::timeout(PATIENCE, ready).await.expect("nodes that are ready in time") {
        ready.expect("a node that is ready");
    }
    nodes
}

/// Who leads each shard; waits until all have somebody.
async fn leads(handles: &[NodeHandle]) -> BTreeMap<ShardId, Lead> {
    let until = Instant::now() + PATIENCE;
    loop {
        let map = handles[0].map();
        let database = map.database(DATABASE).expect("the database");
        let mut leads = BTreeMap::new();
        for node in handles {
            for replica in node.report().await.replicas {
                let Some(group) = replica.group else { continue };
                if group.role == raft::StateRole::Leader && database.shards.contains(&replica.shard) {
                    let range_version = group.epoch.range;
                    leads.insert(replica.shard, Lead { node: node.clone(), range_version });
                }
            }
        }
        if leads.len() == database.shards.len() {
            return leads;
        }
        assert!(Instant::now() < until, "{} of {} shards are led", leads.len(), database.shards.len());
        tokio::time::sleep(PAUSE).await;
    }
}

async fn measure(options: &Options, in_flight: usize, handles: &[NodeHandle]) {
    let leads = leads(handles).await;
    let begin = Instant::now() + Duration::from_secs_f64(options.seconds.min(1.0));
    let end = begin + Duration::from_secs_f64(options.seconds);
    let loops = (0..in_flight as u64).map(|seed| {
        let (handles, leads) = (handles.to_vec(), leads.clone());
        put_until(end, begin, seed, options, handles, leads)
    });
    let load = async {
        tokio::time::sleep_until(begin.into()).await;
        let before = Processor::now();
        tokio::time::sleep_until(end.into()).await;
        (before, Processor::now())
    };
    let (latencies, (before, after)) = futures_util::join!(join_all(loops), load);
    let mut all = Histogram::<u64>::new(3).expect("a histogram");
    for latencies in latencies {
        all.add(latencies).expect("histograms of one kind");
    }
    assert!(!all.is_empty(), "no put ended");
    let each = |seconds: f64| seconds * 1e6 / all.len() as f64;
    println!(
        "{in_flight:>9} {:>10.0} {:>8} {:>8}   {:.1} and {:.1}",
        all.len() as f64 / options.seconds,
        all.value_at_quantile(0.5),
        all.value_at_quantile(0.99),
        each(after.process - before.process),
        each(after.thread - before.thread),
    );
}

/// Puts one after the other; returns the microseconds of those that ended while it was measured.
async fn put_until(
    end: Instant,
    begin: Instant,
    seed: u64,
    options: &Options,
    handles: Vec<NodeHandle>,
    mut leads: BTreeMap<ShardId, Lead>,
) -> Histogram<u64> {
    let mut latencies = Histogram::new(3).expect("a histogram");
    let mut random = SmallRng::seed_from_u64(seed);
    let map = handles[0].map();
    let database = map.database(DATABASE).expect("the database");
    while Instant::now() < end {
        let key = Bytes::from(format!("key-{:012}", random.random_range(0..options.keys)));
        let mut value = vec![0; options.value_bytes];
        random.fill_bytes(&mut value);
        let shard = map.shard_of_key(database, &key).expect("a shard").id;
        let put = Command::Kv(KvCommand::Put { key, value: value.into() });
        let began = Instant::now();
        // A leader may go while the first loops begin: then the put counts from its first attempt.
        loop {
            let Lead { node, range_version } = &leads[&shard];
            let operation = Operation::Command { command: put.clone(), session: None };
            let ended = node.submit(shard, *range_version, vec![operation], PATIENCE).await;
            match ended.and_then(|mut ends| ends.pop().expect("an end for each")) {
                Ok(Output::Reply(_)) => break,
                Ok(other) => panic!("a put ended as {other:?}"),
                Err(Refusal::NotLeader { .. } | Refusal::Busy { .. } | Refusal::Unavailable(_)) => {
                    tokio::time::sleep(PAUSE).await;
                    leads = self::leads(&handles).await;
                }
                Err(refusal) => panic!("a put failed: {refusal}"),
            }
        }
        let now = Instant::now();
        if now >= begin && now < end {
            latencies.record(now.duration_since(began).as_micros() as u64).expect("a latency");
        }
    }
    latencies
}

/// Seconds of processor that were used so far.
struct Processor {
    /// By the process.
    process: f64,
    /// By this thread: the load.
    thread: f64,
}

impl Processor {
    fn now() -> Processor {
        let used = |clock| {
            let time = clock_gettime(clock);
            time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
        };
        Processor { process: used(ClockId::ProcessCPUTime), thread: used(ClockId::ThreadCPUTime) }
    }
}
