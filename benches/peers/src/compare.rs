//! Rounds of both, in turn.

use std::time::Duration;

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::faults;
use crate::load::{self, Figures, Load, Workload};
use crate::machine;
use crate::options::{Common, Compare};
use crate::peer::{Kind, Peer};
use crate::plot::{Line, Plot, Scale};
use crate::report::{self, Table, least_and_most, median};
use crate::servers::Servers;

/// A cluster from its start to its end.
struct Round {
    kind: Kind,
    number: u32,
    load_average: String,
    cold_start: Duration,
    figures: Vec<Figures>,
    /// Of all servers, after the last load.
    resident_bytes: u64,
    disk_bytes: u64,
    /// How long somebody couldn't write after a leader was killed, and after one was told to stop.
    killed: Option<Duration>,
    stopped: Option<Duration>,
}

/// What a load is told by: workload and number of clients.
type Cell = (Workload, u32);

/// Compares, and prints.
pub async fn run(common: &Common, options: &Compare) -> Result<(), String> {
    let kinds: Vec<Kind> = [Kind::Etcd, Kind::Pontoon]
        .into_iter()
        .filter(|kind| options.only.is_none_or(|only| only == *kind))
        .collect();
    let about = machine::describe(common, &kinds)?;
    report::print_about(&about);
    let mut rounds: Vec<Round> = Vec::new();
    for number in 1..=options.rounds {
        for kind in &kinds {
            let mut servers = Servers::new(*kind, common)?;
            let round = round(common, options, number, &mut servers).await;
            rounds.push(round.inspect_err(|_| servers.print_logs())?);
            if let Some(path) = &common.json {
                report::write(path, &format!("{:#}\n", as_json(&about, options, &rounds)))?;
            }
        }
    }
    println!("\nload average after: {}\n", machine::load_average());
    print_loads(options, &kinds, &rounds);
    print_rest(&kinds, &rounds);
    match &common.plot {
        Some(path) => report::write(path, &plot(&about, options, &kinds, &rounds).svg()),
        None => Ok(()),
    }
}

async fn round(
    common: &Common,
    options: &Compare,
    number: u32,
    servers: &mut Servers,
) -> Result<Round, String> {
    let kind = servers.kind;
    let peer = Peer::new(servers, common)?;
    let load_average = machine::load_average();
    let name = format!("round {number} of {}, {}", options.rounds, kind.name());
    let cold_start = faults::cold_start(&peer, servers).await?;
    eprintln!("{name}: started in {:.0} ms; load average {load_average}", cold_start.as_secs_f64() * 1000.0);
    load::fill(&peer, options.keys, options.value_bytes).await?;
    let mut figures = Vec::new();
    for clients in &options.clients {
        for workload in Workload::ALL {
            let (keys, value_bytes, seconds) = (options.keys, options.value_bytes, options.seconds);
            let load = Load { workload, clients: *clients, keys, value_bytes, seconds };
            let seen = load::run(&peer, servers, load).await?;
            eprintln!("{name}: {}", told(&seen));
            figures.push(seen);
        }
    }
    let (resident_bytes, disk_bytes) = (servers.usage().resident_bytes, servers.disk_bytes());
    let (mut killed, mut stopped) = (None, None);
    if !options.no_faults {
        let ends = [("kill -9", Signal::KILL, &mut killed), ("SIGTERM", Signal::TERM, &mut stopped)];
        for (said, signal, gap) in ends {
            let longest = faults::gap(&peer, servers, signal).await?;
            eprintln!("{name}: {longest:.3?} without a write after {said} to a server that leads");
            *gap = Some(longest);
        }
    }
    peer.close().await;
    Ok(Round { kind, number, load_average, cold_start, figures, resident_bytes, disk_bytes, killed, stopped })
}

/// Figures as a line.
pub fn told(figures: &Figures) -> String {
    let Load { workload, clients, .. } = figures.load;
    let errors = match &figures.first_error {
        Some(error) => format!("; {} ERRORS, the first: {error}", figures.errors),
        None => String::new(),
    };
    format!(
        "{} {clients:>3} clients: {:>7.0}/s, p50 {:.2} ms, p99 {:.2} ms, CPU per operation: servers {:.0} µs, \
         load {:.0} µs{errors}",
        workload.name(),
        figures.rate(),
        figures.ms(0.5),
        figures.ms(0.99),
        figures.server_us(),
        figures.client_us(),
    )
}

/// A figure of each round of `kind`.
fn of(rounds: &[Round], kind: Kind, figure: impl Fn(&Round) -> Option<f64>) -> Vec<f64> {
    rounds.iter().filter(|round| round.kind == kind).filter_map(figure).collect()
}

/// A figure of a load, in each round of `kind`.
fn of_load(rounds: &[Round], kind: Kind, cell: Cell, figure: impl Fn(&Figures) -> f64) -> Vec<f64> {
    of(rounds, kind, |round| {
        let found =
            round.figures.iter().find(|figures| (figures.load.workload, figures.load.clients) == cell);
        found.map(&figure)
    })
}

/// Pontoon's figure to etcd's, of each pair of rounds.
fn ratios(figures: impl Fn(Kind) -> Vec<f64>) -> Vec<f64> {
    let pairs = figures(Kind::Pontoon).into_iter().zip(figures(Kind::Etcd));
    pairs.filter(|(_, etcd)| *etcd > 0.0).map(|(pontoon, etcd)| pontoon / etcd).collect()
}

/// Times as many, and between which bounds the rounds were.
fn times(ratios: &[f64]) -> String {
    let (least, most) = least_and_most(ratios);
    format!("**{:.2} ×** ({least:.2}–{most:.2})", median(ratios))
}

fn print_loads(options: &Compare, kinds: &[Kind], rounds: &[Round]) {
    let both = kinds.len() == 2;
    let mut headings = vec!["".to_owned(), "clients".to_owned()];
    let push = |headings: &mut Vec<String>, unit: &str, ratio: bool| {
        headings.extend(kinds.iter().map(|kind| format!("{} {unit}", kind.name())));
        headings.extend((both && ratio).then(|| "ratio".to_owned()));
    };
    push(&mut headings, "/s", true);
    push(&mut headings, "p50 ms", true);
    push(&mut headings, "p99 ms", true);
    push(&mut headings, "µs CPU", true);
    let mut table = Table::new(headings);
    for workload in Workload::ALL {
        for clients in &options.clients {
            let cell = (workload, *clients);
            let mut row = vec![workload.name().to_owned(), clients.to_string()];
            let mut push = |digits: usize, figure: &dyn Fn(&Figures) -> f64| {
                for kind in kinds {
                    row.push(format!("{:.digits$}", median(&of_load(rounds, *kind, cell, figure))));
                }
                if both {
                    row.push(times(&ratios(|kind| of_load(rounds, kind, cell, figure))));
                }
            };
            push(0, &Figures::rate);
            push(2, &|figures| figures.ms(0.5));
            push(2, &|figures| figures.ms(0.99));
            push(0, &Figures::server_us);
            table.row(row);
        }
    }
    println!("{table}");
    for round in rounds {
        for figures in round.figures.iter().filter(|figures| figures.errors > 0) {
            println!("ERRORS: {} {}: {}", round.kind.name(), round.number, told(figures));
        }
    }
}

fn print_rest(kinds: &[Kind], rounds: &[Round]) {
    const MIB: f64 = (1 << 20) as f64;
    let mut headings = vec!["of a cluster".to_owned()];
    headings.extend(kinds.iter().map(|kind| kind.name().to_owned()));
    headings.extend((kinds.len() == 2).then(|| "ratio".to_owned()));
    let mut table = Table::new(headings);
    let ms = |time: Duration| time.as_secs_f64() * 1000.0;
    let mut push = |name: &str, figure: &dyn Fn(&Round) -> Option<f64>| {
        let each: Vec<Vec<f64>> = kinds.iter().map(|kind| of(rounds, *kind, figure)).collect();
        if each.iter().any(Vec::is_empty) {
            return;
        }
        let mut row = vec![name.to_owned()];
        row.extend(each.iter().map(|each| {
            let (least, most) = least_and_most(each);
            format!("{:.0} ({least:.0}–{most:.0})", median(each))
        }));
        if kinds.len() == 2 {
            row.push(times(&ratios(|kind| of(rounds, kind, figure))));
        }
        table.row(row);
    };
    push("memory of the three after the load, MiB", &|round| Some(round.resident_bytes as f64 / MIB));
    push("disk of the three after the load, MiB", &|round| Some(round.disk_bytes as f64 / MIB));
    push("cold start to the first put, ms", &|round| Some(ms(round.cold_start)));
    push("longest without a write after kill -9 of a leader, ms", &|round| round.killed.map(ms));
    push("longest without a write after SIGTERM to a leader, ms", &|round| round.stopped.map(ms));
    println!("{table}");
}

fn plot(about: &[(&'static str, String)], options: &Compare, kinds: &[Kind], rounds: &[Round]) -> Plot {
    let mut lines = Vec::new();
    for kind in kinds {
        for workload in Workload::ALL {
            let points = options.clients.iter().map(|clients| {
                let rates = of_load(rounds, *kind, (workload, *clients), Figures::rate);
                (f64::from(*clients), median(&rates))
            });
            lines.push(Line {
                name: format!("{} {}", kind.name(), workload.name()),
                hue: usize::from(*kind == Kind::Pontoon),
                dashed: workload == Workload::Get,
                points: points.collect(),
            });
        }
    }
    Plot {
        title: format!("{} B values, {} keys, three servers", options.value_bytes, options.keys),
        about: report::caption(about),
        x: ("clients".into(), Scale::Logarithmic),
        y: ("operations a second".into(), Scale::Logarithmic),
        lines,
    }
}

fn as_json(about: &[(&'static str, String)], options: &Compare, rounds: &[Round]) -> Value {
    let rounds = rounds.iter().map(|round| {
        json!({
            "peer": round.kind.name(),
            "round": round.number,
            "load_average": round.load_average,
            "cold_start_ms": round.cold_start.as_millis() as u64,
            "resident_bytes": round.resident_bytes,
            "disk_bytes": round.disk_bytes,
            "gap_killed_ms": round.killed.map(|gap| gap.as_millis() as u64),
            "gap_stopped_ms": round.stopped.map(|gap| gap.as_millis() as u64),
            "loads": round.figures.iter().map(report::figures_as_json).collect::<Vec<_>>(),
        })
    });
    json!({
        "about": report::about_as_json(about),
        "keys": options.keys,
        "value_bytes": options.value_bytes,
        "rounds": rounds.collect::<Vec<_>>(),
    })
}
