//! Pontoon beside its peers: starts a cluster of three etcd servers and one of three `pontoon serve` on the same
//! disk, one after the other, puts the same load on both, and prints the ratios.
//!
//! `benches/peers/run --help`; docs/performance.md says how to read what it prints.
//!
//! - [`servers`]: processes, and their end whatever happens. [`peer`]: what the two have in common.
//! - [`etcd`], [`grpc`]: a lean client of etcd. [`pontoon`]: the client library.
//! - [`load`]: clients in closed loops. [`faults`]: cold start, and how long nobody can write when a leader ends.
//! - [`compare`]: rounds of both. [`growth`]: more keys, greater values, more time.
//! - [`machine`], [`report`], [`plot`]: where it was measured, tables, pictures.

mod compare;
mod etcd;
mod faults;
mod growth;
mod grpc;
mod load;
mod machine;
mod options;
mod peer;
mod plot;
mod pontoon;
mod report;
mod servers;

use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};

use options::{Options, What};

/// What the program that is measured uses; the load is to cost as little as can be.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() {
    let options = Options::parse();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let ended = runtime.map_err(|error| format!("starting a runtime: {error}")).and_then(|runtime| {
        let local = tokio::task::LocalSet::new();
        let ended = local.block_on(&runtime, async {
            let terminated = signal(SignalKind::terminate());
            let mut terminated = terminated.map_err(|error| format!("listening for signals: {error}"))?;
            // Whatever is dropped here takes its servers and their data with it.
            tokio::select! {
                ended = run(&options) => ended,
                _ = tokio::signal::ctrl_c() => Err("stopped".to_owned()),
                _ = terminated.recv() => Err("stopped".to_owned()),
            }
        });
        // Within the runtime: what is dropped may hold timers and sockets.
        let entered = runtime.enter();
        drop(local);
        drop(entered);
        ended
    });
    if let Err(error) = ended {
        eprintln!("{error}");
        std::process::exit(1);
    }
}

async fn run(options: &Options) -> Result<(), String> {
    match &options.what {
        None => compare::run(&options.common, &options.compare).await,
        Some(What::Growth(growth)) => growth::run(&options.common, growth).await,
    }
}
