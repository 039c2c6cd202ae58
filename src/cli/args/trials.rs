//! Commands that try the program out: tests on real processes, measurements, simulations.

use clap::{Args, Subcommand, ValueEnum};

use crate::limits;
use crate::sim::Faults;

/// `test`
#[derive(Subcommand, Debug)]
pub enum TestCommand {
    /// Kill the leader of a fresh shard; the others must elect another
    #[command(
        name = "leader-failure",
        alias = "leaderFailure",
        after_help = "Examples:\n  pontoon test leader-failure 4\n\nN is 3 to 7. The nodes are processes of their own and are killed with SIGKILL."
    )]
    LeaderFailure(TestArgs),
    /// Set a key, kill the leader, and read the key from the others
    #[command(
        name = "replication",
        alias = "replicationTest",
        after_help = "Examples:\n  pontoon test replication 4\n\nN is 3 to 7. The nodes are processes of their own and are killed with SIGKILL."
    )]
    Replication(TestArgs),
}

/// Arguments of a test.
#[derive(Args, Debug, Clone)]
pub struct TestArgs {
    /// Nodes, all of which hold a replica
    #[arg(value_name = "N")]
    pub nodes: u32,
}

/// What a benchmark does.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workload {
    /// Sets keys
    Put,
    /// Reads keys
    Get,
    /// Half and half
    Mixed,
}

/// `bench`
#[derive(Args, Debug, Clone)]
#[command(after_help = "\
Examples:
  pontoon bench --workload put --clients 64 --seconds 10
  pontoon bench testDB --workload get --clients 256 --seconds 10 --json
  pontoon bench --workload put --explain

Closed loop: each client has one call outstanding. Keys are uniform. Get and mixed first write all
keys, untimed. Without DB: database `bench` with up to 3 replicas and 8 shards, made if missing.

--explain asks each node for its counters before and after, sums them, and divides by the operations
measured. It counts whatever the nodes do, for others too. Processor time, context switches, memory
and system calls are those of the processes, as Linux counts them; of system calls only those that
read and write (`/proc/PID/io`). Allocations aren't counted.")]
pub struct BenchArgs {
    /// Database
    #[arg(value_name = "DB")]
    pub db: Option<String>,
    /// What to do
    #[arg(long, value_enum, default_value = "put")]
    pub workload: Workload,
    /// Concurrent clients
    #[arg(long, value_name = "C", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=i64::from(limits::BENCH_CLIENTS_MAX)))]
    pub clients: u32,
    /// Seconds to measure
    #[arg(long, value_name = "S", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub seconds: u64,
    /// Seconds to run before measuring
    #[arg(long, value_name = "S", default_value_t = 2, value_parser = clap::value_parser!(u64).range(0..=3_600))]
    pub warmup: u64,
    /// Bytes of each value
    #[arg(long, value_name = "B", default_value_t = 128, value_parser = clap::value_parser!(u64).range(0..=limits::VALUE_BYTES_MAX as u64))]
    pub value_bytes: u64,
    /// Different keys
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(1..=1_000_000_000))]
    pub keys: u64,
    /// Operations in each call
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=limits::BATCH_OPERATIONS_MAX as u64))]
    pub batch: u64,
    /// Client libraries, each with its connections, that share the clients
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub connections: u32,
    /// Show what the nodes do for one operation: syncs, messages, system calls, processor time
    #[arg(long)]
    pub explain: bool,
}

/// `sim`
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  pontoon sim --seed 42
  pontoon sim --seeds 0..1000
  pontoon sim --seed 42 --nodes 5 --shards 8 --faults crashes,power,partitions --trace 200
  pontoon sim placement --nodes 1000 --shards 100000

The code of a node's replicas (raft, state machines, sessions, memtables) under simulated time,
network and disk, in one thread: faults first, then none, when everything must heal. Prints what
went wrong on purpose and a verdict; exits with 1 if anything was violated, naming the seed that
shows it again. The same seed with the same options gives the same run, to the last event. What
isn't given, the seed decides.

Faults: messages corruption partitions half-open flapping crashes power torn eio rot pauses
transfers slow-disks memory replicas campaigns drift state-loss boundaries membership newcomers
node-loss rebalancing,
separated by commas; all; none.")]
#[command(args_conflicts_with_subcommands = true)]
pub struct SimArgs {
    /// Something else than a simulated cluster's life
    #[command(subcommand)]
    pub what: Option<SimCommand>,
    /// One seed [default: 0]
    #[arg(long, value_name = "S", conflicts_with = "seeds")]
    pub seed: Option<u64>,
    /// Every seed from A on, below B
    #[arg(long, value_name = "A..B", value_parser = seed_range)]
    pub seeds: Option<std::ops::Range<u64>>,
    /// Nodes of the cluster
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(limits::LOCAL_NODES_MAX)))]
    pub nodes: Option<u32>,
    /// Shards
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256))]
    pub shards: Option<u32>,
    /// Replicas of each shard
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(limits::REPLICAS_MAX)))]
    pub replicas: Option<u32>,
    /// Operations of all clients together
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub ops: Option<u32>,
    /// What goes wrong
    #[arg(long, value_name = "LIST", value_parser = fault_list)]
    pub faults: Option<Faults>,
    /// Show so many of the last events of a run that violates something
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    pub trace: u32,
}

/// What else can be simulated.
#[derive(Subcommand, Debug)]
pub enum SimCommand {
    /// Plan the shards of a large cluster, and show how good the plans are and how long they take
    Placement(PlacementArgs),
}

/// `sim placement`
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  pontoon sim placement --nodes 1000 --shards 100000
  pontoon sim placement --nodes 30 --shards 1000 --zones 3 --json

Plans a new database, and then what moves when nodes join and leave. Beside the moves stands the
least there can be for that change; then, how far the node farthest from its share is off it.
Nothing runs.")]
pub struct PlacementArgs {
    /// Nodes of the cluster
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub nodes: u32,
    /// Shards
    #[arg(long, value_name = "N", default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub shards: u32,
    /// Replicas of each shard
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=i64::from(limits::REPLICAS_MAX)))]
    pub replicas: u32,
    /// Zones that the nodes are in, in turn; 0: none
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=100))]
    pub zones: u32,
}

fn seed_range(text: &str) -> Result<std::ops::Range<u64>, String> {
    let range = text.split_once("..").and_then(|(from, to)| Some(from.parse().ok()?..to.parse().ok()?));
    match range {
        Some(range) if range.start < range.end => Ok(range),
        _ => Err("seeds are a range A..B, with A less than B".into()),
    }
}

fn fault_list(text: &str) -> Result<Faults, String> {
    Faults::parse(text).map_err(|name| {
        format!("`{name}` is no kind of fault; there are {}, all, none", Faults::NAMES.join(", "))
    })
}
