//! `sim`: the simulator, for whoever wants to see for themselves.

use std::collections::BTreeMap;
use std::panic;
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use super::args::{SimArgs, SimCommand};
use super::context::Context;
use super::failure::{Exit, Failure};
use super::output;
use super::signals::Signals;
use super::sim_placement;
use crate::sim::checks::CHECKS;
use crate::sim::report::listed;
use crate::sim::{self, Report, SimOptions};

/// What all runs together did.
#[derive(Default)]
struct Totals {
    runs: u64,
    simulated_us: u64,
    events: u64,
    undecided: usize,
    counts: BTreeMap<&'static str, u64>,
    operations: BTreeMap<&'static str, u64>,
    /// Seeds of runs that violated something.
    failed: Vec<u64>,
}

impl Totals {
    fn add(&mut self, report: &Report) {
        self.runs += 1;
        self.simulated_us += report.time;
        self.events += report.events;
        self.undecided += report.undecided;
        for (totals, counts) in
            [(&mut self.counts, &report.counts), (&mut self.operations, &report.operations)]
        {
            for (what, count) in counts {
                *totals.entry(what).or_default() += count;
            }
        }
        if report.violation.is_some() {
            self.failed.push(report.options.seed);
        }
    }
}

/// `sim`
pub fn sim(context: &Context, args: &SimArgs) -> Result<Exit, Failure> {
    if let Some(SimCommand::Placement(args)) = &args.what {
        return sim_placement::placement(context, args);
    }
    let replicas = args.replicas.unwrap_or(1);
    if args.nodes.is_some_and(|nodes| nodes < replicas) {
        return Err(Failure::usage("usage", "a shard can't have more replicas than there are nodes"));
    }
    let seeds = args.seeds.clone().unwrap_or_else(|| {
        let seed = args.seed.unwrap_or(0);
        seed..seed.saturating_add(1)
    });
    let signals = Signals::listen(None)?;
    // A panic of the core is a finding of the run, which tells it; the text of a backtrace would come
    // between the lines.
    panic::set_hook(Box::new(|_| {}));
    let progress = ProgressBar::new(seeds.end - seeds.start);
    if seeds.end - seeds.start == 1 || context.json() {
        progress.set_draw_target(indicatif::ProgressDrawTarget::hidden());
    }
    progress.set_style(
        ProgressStyle::with_template("{bar:30} {pos}/{len} seeds, {msg} failed, {eta} left")
            .unwrap_or_else(|_| ProgressStyle::default_bar()),
    );
    progress.set_message("0");
    let (began, mut totals, mut reports) = (Instant::now(), Totals::default(), Vec::new());
    for seed in seeds.clone() {
        if signals.is_stopped() {
            break;
        }
        let report = sim::run(options(args, seed));
        totals.add(&report);
        progress.inc(1);
        progress.set_message(totals.failed.len().to_string());
        let one = seeds.end - seeds.start == 1;
        if report.violation.is_some() || one {
            if context.json() {
                reports.push(report_json(&report));
            } else {
                progress.suspend(|| output::line(report.to_string()))?;
            }
        }
    }
    progress.finish_and_clear();
    drop(panic::take_hook());
    let seconds = began.elapsed().as_secs_f64();
    let ratio = totals.simulated_us as f64 / 1e6 / seconds.max(1e-9);
    if context.json() {
        output::json(&json!({
            "runs": totals.runs,
            "simulated_s": totals.simulated_us as f64 / 1e6,
            "seconds": seconds,
            "ratio": ratio,
            "events": totals.events,
            "counts": totals.counts,
            "operations": totals.operations,
            "checks": CHECKS.map(|(name, _)| name),
            "undecided": totals.undecided,
            "failed_seeds": totals.failed,
            "reports": reports,
        }))?;
    } else {
        if seeds.end - seeds.start > 1 {
            output::line(counts_table(&totals.counts))?;
            output::line(format!("operations: {}", listed(&totals.operations)))?;
            output::line(format!("checked: {}", CHECKS.map(|(name, _)| name).join(", ")))?;
            if totals.undecided > 0 {
                output::line(format!("linearizability of {} keys was not decided", totals.undecided))?;
            }
        }
        output::line(format!(
            "{} runs, {:.0} s simulated in {seconds:.1} s ({ratio:.0} times as fast as life), {}",
            totals.runs,
            totals.simulated_us as f64 / 1e6,
            verdict(&totals, args)
        ))?;
    }
    Ok(if totals.failed.is_empty() { Exit::Done } else { Exit::Negative })
}

/// Faults and other events, three to a line.
fn counts_table(counts: &BTreeMap<&'static str, u64>) -> String {
    let mut table = output::table(&["what", "times", "what", "times", "what", "times"]);
    let cells: Vec<String> =
        counts.iter().flat_map(|(what, times)| [(*what).to_owned(), times.to_string()]).collect();
    for row in cells.chunks(6) {
        table.add_row(row);
    }
    table.to_string()
}

fn verdict(totals: &Totals, args: &SimArgs) -> String {
    let Some(first) = totals.failed.first() else { return "no violation".into() };
    let mut again = format!("pontoon sim --seed {first}");
    let numbers =
        [("nodes", args.nodes), ("shards", args.shards), ("replicas", args.replicas), ("ops", args.ops)];
    for (name, number) in numbers {
        if let Some(number) = number {
            again += &format!(" --{name} {number}");
        }
    }
    if let Some(faults) = args.faults {
        again += &format!(" --faults {}", faults.names());
    }
    format!("VIOLATIONS at seeds {:?}; to see the first again: {again} --trace 200", totals.failed)
}

/// What the seed decides, as far as the command line doesn't.
fn options(args: &SimArgs, seed: u64) -> SimOptions {
    let mut options = SimOptions::of_seed(seed);
    if let Some(replicas) = args.replicas {
        options.replicas = replicas as usize;
    }
    if let Some(nodes) = args.nodes {
        options.nodes = nodes as usize;
    }
    // What wasn't given gives way.
    if args.nodes.is_none() {
        options.nodes = options.nodes.max(options.replicas);
    }
    options.replicas = options.replicas.min(options.nodes);
    if let Some(shards) = args.shards {
        options.shards = shards as usize;
    }
    if let Some(ops) = args.ops {
        options.operations = ops as usize;
    }
    if let Some(faults) = args.faults {
        options.faults = faults;
    }
    options.trace = args.trace as usize;
    options
}

fn report_json(report: &Report) -> Value {
    let options = &report.options;
    json!({
        "seed": options.seed,
        "nodes": options.nodes,
        "shards": options.shards,
        "replicas": options.replicas,
        "operations": options.operations,
        "faults": options.faults.names(),
        "simulated_s": report.time as f64 / 1e6,
        "events": report.events,
        "trace_hash": format!("{:016x}", report.trace_hash),
        "violation": report.violation.as_ref().map(|v| json!({"check": v.check, "detail": v.detail})),
        "trace": report.trace,
    })
}
