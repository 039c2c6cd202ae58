//! `bench`: a closed loop of clients, and how fast the cluster answers them.
//!
//! Each client has one call outstanding. A call counts if it begins after the warm-up and before the
//! end; those under way at the end are waited for and counted too, so that slow ones are not lost.

mod explain;

use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::{join_all, try_join_all};
use hdrhistogram::Histogram;
use indicatif::{ProgressBar, ProgressStyle};
use rand::rngs::SmallRng;
use rand::{Rng, RngExt, SeedableRng};
use serde_json::json;
use tokio::task::LocalSet;

use self::explain::{Explained, Looks};
use super::args::{BenchArgs, Workload};
use super::context::{Context, Session, block_on};
use super::failure::{Exit, Failure};
use super::output;
use super::setup;
use super::signals::Signals;
use crate::client::{ClientError, Database, Operation, OperationResult};
use crate::limits::{BATCH_BYTES_MAX, BATCH_OPERATIONS_MAX, KEY_BYTES_MAX};

/// The database of a benchmark that names none.
const DATABASE: &str = "bench";
const SHARDS: u32 = 8;
const REPLICAS_MAX: usize = 3;

/// Longest latency told apart, in microseconds: a greater one counts as this.
const LATENCY_US_MAX: u64 = 600_000_000;

/// Batches on the way while the keys are written before the measurement.
const PRELOAD_IN_FLIGHT: usize = 16;

/// What the clients saw.
struct Tally {
    latency: Histogram<u64>,
    operations: u64,
    errors: u64,
    first_error: Option<String>,
    /// When the last counted call ended.
    last: Option<Instant>,
}

/// `bench [DB]`
pub fn bench(context: &Context, args: &BenchArgs) -> Result<Exit, Failure> {
    let signals = Signals::listen(None)?;
    let load = async {
        let addresses = context.addresses()?;
        let timeout = context.timeout();
        // Where one is enough, it works on the thread of the load. Several are for more than one thread can do.
        let sessions = match args.connections {
            1 => vec![Session::open_here(addresses, timeout).await?],
            several => try_join_all((0..several).map(|_| Session::open(addresses.clone(), timeout))).await?,
        };
        let result = run(context, args, &sessions, &signals).await;
        join_all(sessions.iter().map(|session| session.client.close())).await;
        result
    };
    // Dropped within the runtime, whose timers and sockets it may hold.
    block_on(async { LocalSet::new().run_until(load).await })
}

async fn run(
    context: &Context,
    args: &BenchArgs,
    sessions: &[Session],
    signals: &Signals,
) -> Result<Exit, Failure> {
    let Some(first) = sessions.first() else {
        return Err(Failure::usage("usage", "a benchmark needs a connection"));
    };
    let name = match &args.db {
        Some(name) => name.clone(),
        None => {
            let map = first.client.map_naming(DATABASE).await?;
            // One that is there is used as it is.
            if map.database(DATABASE).is_none() {
                let replicas = map.nodes.len().clamp(1, REPLICAS_MAX) as u32;
                let time = first.timeout();
                setup::create_database(&first.client, DATABASE, replicas, SHARDS, time).await?;
            }
            DATABASE.to_owned()
        }
    };
    let databases: Vec<Database> = sessions.iter().map(|session| session.database_for_many(&name)).collect();
    // A database that isn't there, or a shard that nobody leads, is told now, not counted as errors.
    match super::serve::until_stopped(signals, databases[0].get(key(0))).await {
        Some(found) => drop(found?),
        None => return Err(Failure::negative("stopped", "stopped before measuring")),
    }
    let mut value = vec![0; args.value_bytes as usize];
    SmallRng::seed_from_u64(0).fill_bytes(&mut value);
    let value = Bytes::from(value);
    let bar = progress();
    if args.workload != Workload::Put {
        let load = preload(&databases[0], args, &value, &bar);
        match super::serve::until_stopped(signals, load).await {
            Some(result) => result?,
            None => return Err(Failure::negative("stopped", "stopped before measuring")),
        }
    }

    let tally = Rc::new(RefCell::new(Tally::new()?));
    let warm = Instant::now() + Duration::from_secs(args.warmup);
    let end = warm + Duration::from_secs(args.seconds);
    let clients = (0..args.clients).map(|number| {
        let database = &databases[number as usize % databases.len()];
        let (value, tally) = (value.clone(), tally.clone());
        client(database, args, u64::from(number), value, warm, end, tally)
    });
    let looks = match args.explain {
        true => Some(Looks::at_nodes(&first.client, first.timeout()).await?),
        false => None,
    };
    let begin = async {
        if let Some(looks) = &looks {
            tokio::time::sleep_until(warm.into()).await;
            looks.begin().await;
        }
    };
    let show = async {
        let mut before = 0;
        loop {
            tokio::time::sleep(Duration::from_secs(1)).await;
            let tally = tally.borrow();
            bar.set_message(match warm.checked_duration_since(Instant::now()) {
                Some(left) => format!("warming up, {:.0} s left", left.as_secs_f64().ceil()),
                None => format!(
                    "{}/{} s  {} ops/s  p50 {} µs  p99 {} µs  errors {}",
                    warm.elapsed().as_secs().min(args.seconds),
                    args.seconds,
                    tally.operations - before,
                    tally.latency.value_at_quantile(0.5),
                    tally.latency.value_at_quantile(0.99),
                    tally.errors
                ),
            });
            before = tally.operations;
        }
    };
    tokio::select! {
        _ = async { tokio::join!(join_all(clients), begin) } => {}
        () = signals.stopped() => output::note("stopped early; these are the figures so far"),
        () = show => {}
    }
    bar.finish_and_clear();
    let explained = match looks {
        Some(looks) => Some(looks.end().await?),
        None => None,
    };
    let tally = tally.borrow();
    report(context, args, &name, &tally, warm, explained.as_ref())
}

/// One client: a call, its answer, the next call.
async fn client(
    database: &Database,
    args: &BenchArgs,
    number: u64,
    value: Bytes,
    warm: Instant,
    end: Instant,
    tally: Rc<RefCell<Tally>>,
) {
    let mut random = SmallRng::seed_from_u64(number + 1);
    loop {
        let begin = Instant::now();
        if begin >= end {
            return;
        }
        let (operations, results) = call(database, args, &mut random, &value).await;
        if begin >= warm {
            tally.borrow_mut().count(begin, operations, results);
        }
    }
}

/// Makes one call. Returns how many operations it had, and what failed.
async fn call(
    database: &Database,
    args: &BenchArgs,
    random: &mut SmallRng,
    value: &Bytes,
) -> (u64, Vec<String>) {
    let draw = |random: &mut SmallRng| {
        let key = key(random.random_range(0..args.keys));
        let put = match args.workload {
            Workload::Put => true,
            Workload::Get => false,
            Workload::Mixed => random.random_bool(0.5),
        };
        (key, put)
    };
    if args.batch > 1 {
        let operations: Vec<Operation> = (0..args.batch)
            .map(|_| match draw(random) {
                (key, true) => Operation::Put(key, value.clone()),
                (key, false) => Operation::Get(key),
            })
            .collect();
        let results = database.batch(operations).await;
        return (args.batch, results.into_iter().filter_map(problem).collect());
    }
    let result = match draw(random) {
        (key, true) => {
            let put = database.put(key, value.clone()).await;
            put.map(OperationResult::Written)
        }
        (key, false) => database.get(key).await.map(OperationResult::Value),
    };
    (1, problem(result).into_iter().collect())
}

/// What is wrong with a result; a get that finds nothing is an error.
fn problem(result: Result<OperationResult, ClientError>) -> Option<String> {
    match result {
        Ok(OperationResult::Value(None)) => Some("a key that was written before is not there".to_owned()),
        Ok(_) => None,
        Err(error) => Some(error.to_string()),
    }
}

/// Writes all keys once.
async fn preload(
    database: &Database,
    args: &BenchArgs,
    value: &Bytes,
    bar: &ProgressBar,
) -> Result<(), Failure> {
    let fitting = BATCH_BYTES_MAX / (value.len() + KEY_BYTES_MAX).max(1);
    let size = fitting.clamp(1, BATCH_OPERATIONS_MAX) as u64;
    let mut next = 0;
    while next < args.keys {
        let mut batches = Vec::new();
        while batches.len() < PRELOAD_IN_FLIGHT && next < args.keys {
            let until = (next + size).min(args.keys);
            let puts = (next..until).map(|n| Operation::Put(key(n), value.clone()));
            batches.push(database.batch(puts.collect()));
            next = until;
        }
        for result in join_all(batches).await.into_iter().flatten() {
            result.map_err(|error| {
                let failure = Failure::from(error);
                Failure { message: format!("writing the keys beforehand: {}", failure.message), ..failure }
            })?;
        }
        bar.set_message(format!("writing keys: {next}/{}", args.keys));
    }
    Ok(())
}

/// A key of 16 bytes.
fn key(number: u64) -> Bytes {
    Bytes::from(format!("k{number:015}"))
}

impl Tally {
    fn new() -> Result<Tally, Failure> {
        Ok(Tally {
            latency: Histogram::new_with_bounds(1, LATENCY_US_MAX, 3)
                .map_err(|error| Failure::internal(format!("making a histogram: {error}")))?,
            operations: 0,
            errors: 0,
            first_error: None,
            last: None,
        })
    }

    /// Counts a call. Only what succeeded counts as an operation.
    fn count(&mut self, begin: Instant, operations: u64, problems: Vec<String>) {
        let end = Instant::now();
        let failed = problems.len() as u64;
        self.errors += failed;
        if self.first_error.is_none() {
            self.first_error = problems.into_iter().next();
        }
        if failed < operations {
            self.operations += operations - failed;
            let us = end.duration_since(begin).as_micros();
            self.latency.saturating_record(u64::try_from(us).unwrap_or(u64::MAX).max(1));
        }
        self.last = Some(self.last.map_or(end, |last| last.max(end)));
    }
}

fn report(
    context: &Context,
    args: &BenchArgs,
    database: &str,
    tally: &Tally,
    warm: Instant,
    explained: Option<&Explained>,
) -> Result<Exit, Failure> {
    let seconds = tally.last.map_or(0.0, |last| last.duration_since(warm).as_secs_f64());
    let ops_s = if seconds > 0.0 { tally.operations as f64 / seconds } else { 0.0 };
    let at = |quantile| tally.latency.value_at_quantile(quantile);
    let workload = match args.workload {
        Workload::Put => "put",
        Workload::Get => "get",
        Workload::Mixed => "mixed",
    };
    if let Some(error) = &tally.first_error {
        output::note(format!("{} errors; the first: {error}", tally.errors));
    }
    if context.json() {
        let mut object = json!({
            "workload": workload,
            "clients": args.clients,
            "ops_s": (ops_s * 10.0).round() / 10.0,
            "p50_us": at(0.5),
            "p95_us": at(0.95),
            "p99_us": at(0.99),
            "p999_us": at(0.999),
            "max_us": tally.latency.max(),
            "mean_us": (tally.latency.mean() * 10.0).round() / 10.0,
            "errors": tally.errors,
            "operations": tally.operations,
            "seconds": (seconds * 1000.0).round() / 1000.0,
            "database": database,
            "keys": args.keys,
            "value_bytes": args.value_bytes,
            "batch": args.batch,
            "connections": args.connections,
        });
        if let Some(explained) = explained {
            object["explain"] = explained.json(tally.operations);
        }
        output::json(&object)?;
    } else {
        let headings = ["workload", "clients", "ops/s", "p50", "p95", "p99", "p99.9", "max", "errors"];
        let mut table = output::table(&headings);
        let us = |value: u64| format!("{value} µs");
        table.add_row([
            workload.to_owned(),
            args.clients.to_string(),
            format!("{ops_s:.0}"),
            us(at(0.5)),
            us(at(0.95)),
            us(at(0.99)),
            us(at(0.999)),
            us(tally.latency.max()),
            tally.errors.to_string(),
        ]);
        output::line(table.to_string())?;
        if let Some(explained) = explained {
            explained.print(tally.operations)?;
        }
    }
    if tally.operations == 0 && tally.errors > 0 {
        return Ok(Exit::Unavailable);
    }
    Ok(if tally.errors == 0 { Exit::Done } else { Exit::Negative })
}

/// A line on stderr; hidden where stderr is no terminal.
fn progress() -> ProgressBar {
    let bar = ProgressBar::new_spinner();
    match ProgressStyle::with_template("{spinner} {msg}") {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_have_sixteen_bytes() {
        assert_eq!(&key(0)[..], b"k000000000000000");
        assert_eq!(key(999_999_999).len(), 16);
    }

    #[test]
    fn only_what_succeeded_counts() {
        let mut tally = Tally::new().unwrap();
        let begin = Instant::now();
        tally.count(begin, 1, Vec::new());
        tally.count(begin, 1, vec!["no".into()]);
        tally.count(begin, 10, vec!["no".into(); 3]);
        assert_eq!((tally.operations, tally.errors, tally.latency.len()), (8, 4, 2));
        assert_eq!(tally.first_error.as_deref(), Some("no"));
    }

    #[test]
    fn a_get_that_finds_nothing_is_an_error() {
        assert!(problem(Ok(OperationResult::Value(None))).is_some());
        assert!(problem(Ok(OperationResult::Written(1))).is_none());
    }
}
