//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::peer::Kind;

/// Puts the same load on three etcd and on three Pontoon servers, in turn, and prints the ratios
#[derive(Parser)]
#[command(name = "benches/peers/run", args_conflicts_with_subcommands = true)]
pub struct Options {
    /// What is to be done, other than comparing
    #[command(subcommand)]
    pub what: Option<What>,
    /// Of both
    #[command(flatten)]
    pub common: Common,
    /// Of comparing
    #[command(flatten)]
    pub compare: Compare,
}

/// What is to be done.
#[derive(Subcommand)]
pub enum What {
    /// Pontoon alone, with more keys, with greater values, and for ten minutes
    Growth(Growth),
}

/// Where servers come from, and where their data goes.
#[derive(Args, Clone)]
pub struct Common {
    /// Directory under which each cluster's data is made, and removed; on the disk that is to be measured
    #[arg(long, global = true, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../../target"))]
    pub dir: PathBuf,
    /// The `pontoon` to be measured
    #[arg(long, global = true, default_value_os_t = beside())]
    pub pontoon: PathBuf,
    /// The `etcd` to be measured
    #[arg(long, global = true, default_value = "etcd")]
    pub etcd: PathBuf,
    /// Clients that share a connection to etcd
    #[arg(long, global = true, value_name = "CLIENTS", default_value_t = 16,
        value_parser = clap::value_parser!(u32).range(1..))]
    pub etcd_share: u32,
    /// Which of etcd's servers its clients call
    #[arg(long, global = true, value_enum, default_value = "leader")]
    pub etcd_call: Call,
    /// Shards of Pontoon's database
    #[arg(long, global = true, default_value_t = 8)]
    pub shards: u32,
    /// Write the figures of each round, as JSON
    #[arg(long, global = true, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Draw the figures, as SVG
    #[arg(long, global = true, value_name = "FILE.svg")]
    pub plot: Option<PathBuf>,
}

/// Which of three servers clients call.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Call {
    /// The one that leads; others would have to ask it
    Leader,
    /// All, in equal shares
    All,
}

/// How the two are compared.
#[derive(Args, Clone)]
pub struct Compare {
    /// Rounds, of each; medians are told
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    pub rounds: u32,
    /// Seconds that each workload is measured for, after one to warm up
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u64).range(1..))]
    pub seconds: u64,
    /// Numbers of clients, each in a closed loop
    #[arg(long, value_delimiter = ',', default_value = "1,16,64,256")]
    pub clients: Vec<u32>,
    /// Keys, of 16 bytes
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u64).range(1..))]
    pub keys: u64,
    /// Bytes in a value
    #[arg(long, default_value_t = 128)]
    pub value_bytes: usize,
    /// Only this one
    #[arg(long, value_enum)]
    pub only: Option<Kind>,
    /// Don't end servers under load to see how long nobody can write
    #[arg(long)]
    pub no_faults: bool,
}

/// How growth is measured.
#[derive(Args, Clone)]
pub struct Growth {
    /// Numbers of keys, with values of 128 bytes
    #[arg(long, value_delimiter = ',', default_value = "100000,1000000,5000000")]
    pub keys: Vec<u64>,
    /// Bytes in a value, with as many keys as make 512 MiB, 100,000 at most
    #[arg(long, value_delimiter = ',', default_value = "128,4096,262144")]
    pub values: Vec<usize>,
    /// Clients, each in a closed loop
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub clients: u32,
    /// Seconds that each workload is measured for, after one to warm up
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    pub seconds: u64,
    /// Minutes of puts without a pause, on 1,000,000 keys or the greatest number of them that is less; 0: none
    #[arg(long, default_value_t = 10)]
    pub minutes: u64,
}

/// The program that was built with this one, wherever that was.
fn beside() -> PathBuf {
    std::env::current_exe().map_or_else(|_| "pontoon".into(), |path| path.with_file_name("pontoon"))
}
