//! Whether cost grows as it should: more keys, greater values, more time.

use serde_json::{Value, json};

use crate::compare::told;
use crate::faults::cold_start;
use crate::load::{self, Figures, Load, Workload};
use crate::machine;
use crate::options::{Common, Growth};
use crate::peer::{Kind, Peer};
use crate::plot::{Line, Plot, Scale};
use crate::report::{self, Table, least_and_most, median};
use crate::servers::Servers;

const MIB: u64 = 1 << 20;
/// Keys and values together, where values are great.
const DATA_BYTES: u64 = 512 * MIB;
const KEYS_MAX: u64 = 100_000;
/// Where the number of keys is what grows.
const VALUE_BYTES: usize = 128;
/// For the long run, at most.
const LONG_KEYS_MAX: u64 = 1_000_000;
/// Seconds that a point of the long run's picture stands for.
const POINT_SECONDS: usize = 5;

/// A cluster with so much in it.
struct Row {
    keys: u64,
    value_bytes: usize,
    fill_seconds: f64,
    figures: Vec<Figures>,
    resident_bytes: u64,
    disk_bytes: u64,
}

/// Measures, and prints.
pub async fn run(common: &Common, options: &Growth) -> Result<(), String> {
    let about = machine::describe(common, &[Kind::Pontoon])?;
    report::print_about(&about);
    let mut sizes: Vec<(u64, usize)> = options.keys.iter().map(|keys| (*keys, VALUE_BYTES)).collect();
    let keys_of = |value: &usize| (DATA_BYTES / (*value).max(1) as u64).clamp(1, KEYS_MAX);
    sizes.extend(options.values.iter().map(|value| (keys_of(value), *value)));
    // Where both lists say the same.
    let mut seen = std::collections::HashSet::new();
    sizes.retain(|size| seen.insert(*size));
    // What fails takes nothing with it: the rest may have taken half an hour.
    let (mut rows, mut failed) = (Vec::new(), Vec::new());
    for (keys, value_bytes) in sizes {
        let mut servers = Servers::new(Kind::Pontoon, common)?;
        match row(common, options, (keys, value_bytes), &mut servers).await {
            Ok(row) => rows.push(row),
            Err(error) => {
                servers.print_logs();
                failed.push(format!("FAILED: {keys} keys, values of {value_bytes} bytes: {error}"));
            }
        }
    }
    println!("\nload average after: {}\n", machine::load_average());
    print_rows(options, &rows);
    failed.iter().for_each(|failure| println!("{failure}"));
    let mut long = None;
    if options.minutes > 0 {
        let mut servers = Servers::new(Kind::Pontoon, common)?;
        let figures = long_run(common, options, &mut servers).await;
        let figures = figures.inspect_err(|_| servers.print_logs())?;
        print_long(&figures);
        if let Some(path) = &common.plot {
            report::write(path, &plot(&about, &figures).svg())?;
        }
        long = Some(figures);
    }
    if let Some(path) = &common.json {
        report::write(path, &format!("{:#}\n", as_json(&about, &rows, long.as_ref())))?;
    }
    if failed.is_empty() { Ok(()) } else { Err(failed.join("\n")) }
}

fn as_json(about: &[(&'static str, String)], rows: &[Row], long: Option<&Figures>) -> Value {
    let rows = rows.iter().map(|row| {
        json!({
            "keys": row.keys,
            "value_bytes": row.value_bytes,
            "fill_seconds": row.fill_seconds,
            "resident_bytes": row.resident_bytes,
            "disk_bytes": row.disk_bytes,
            "loads": row.figures.iter().map(report::figures_as_json).collect::<Vec<_>>(),
        })
    });
    json!({
        "about": report::about_as_json(about),
        "rows": rows.collect::<Vec<_>>(),
        "long": long.map(report::figures_as_json),
    })
}

async fn row(
    common: &Common,
    options: &Growth,
    (keys, value_bytes): (u64, usize),
    servers: &mut Servers,
) -> Result<Row, String> {
    let peer = Peer::new(servers, common)?;
    cold_start(&peer, servers).await?;
    let begun = std::time::Instant::now();
    load::fill(&peer, keys, value_bytes).await?;
    let fill_seconds = begun.elapsed().as_secs_f64();
    eprintln!("{keys} keys, values of {value_bytes} bytes: written in {fill_seconds:.1} s");
    let mut figures = Vec::new();
    for workload in Workload::ALL {
        let load = Load { workload, clients: options.clients, keys, value_bytes, seconds: options.seconds };
        let seen = load::run(&peer, servers, load).await?;
        eprintln!("{keys} keys, values of {value_bytes} bytes: {}", told(&seen));
        figures.push(seen);
    }
    let (resident_bytes, disk_bytes) = (servers.usage().resident_bytes, servers.disk_bytes());
    peer.close().await;
    Ok(Row { keys, value_bytes, fill_seconds, figures, resident_bytes, disk_bytes })
}

async fn long_run(common: &Common, options: &Growth, servers: &mut Servers) -> Result<Figures, String> {
    let fitting = options.keys.iter().copied().filter(|keys| *keys <= LONG_KEYS_MAX).max();
    let keys = fitting.unwrap_or(LONG_KEYS_MAX);
    let peer = Peer::new(servers, common)?;
    cold_start(&peer, servers).await?;
    load::fill(&peer, keys, VALUE_BYTES).await?;
    let load = Load {
        workload: Workload::Put,
        clients: options.clients,
        keys,
        value_bytes: VALUE_BYTES,
        seconds: options.minutes * 60,
    };
    let figures = load::run(&peer, servers, load).await?;
    eprintln!("{} min, {keys} keys: {}", options.minutes, told(&figures));
    peer.close().await;
    Ok(figures)
}

fn print_rows(options: &Growth, rows: &[Row]) {
    let headings = [
        "keys",
        "bytes in a value",
        "put/s",
        "put p50 / p99 ms",
        "put µs CPU",
        "get/s",
        "get p50 / p99 ms",
        "get µs CPU",
        "fill keys/s",
        "memory of the three, MiB",
        "disk of the three, MiB",
    ];
    let mut table = Table::new(headings.map(str::to_owned).to_vec());
    for row in rows {
        let mut cells = vec![row.keys.to_string(), row.value_bytes.to_string()];
        for figures in &row.figures {
            cells.push(format!("{:.0}", figures.rate()));
            cells.push(format!("{:.2} / {:.1}", figures.ms(0.5), figures.ms(0.99)));
            cells.push(format!("{:.0}", figures.server_us()));
        }
        cells.push(format!("{:.0}", row.keys as f64 / row.fill_seconds));
        cells.push((row.resident_bytes / MIB).to_string());
        cells.push((row.disk_bytes / MIB).to_string());
        table.row(cells);
        for figures in row.figures.iter().filter(|figures| figures.errors > 0) {
            println!("ERRORS: {}", told(figures));
        }
    }
    println!("{} clients\n\n{table}", options.clients);
}

/// Operations a second in each minute, or in what there is of one.
fn minutes(figures: &Figures) -> Vec<f64> {
    figures.series.chunks(60).map(|minute| minute.iter().sum::<u64>() as f64 / minute.len() as f64).collect()
}

fn print_long(figures: &Figures) {
    let mut table = Table::new(["minute", "put/s"].map(str::to_owned).to_vec());
    let minutes = minutes(figures);
    for (number, rate) in minutes.iter().enumerate() {
        table.row(vec![(number + 1).to_string(), format!("{rate:.0}")]);
    }
    let seconds: Vec<f64> = figures.series.iter().map(|count| *count as f64).collect();
    let (first, last) = (minutes.first().copied().unwrap_or(0.0), minutes.last().copied().unwrap_or(0.0));
    println!("{}\n\n{table}", told(figures));
    println!(
        "last minute to first: {:.2}; seconds: median {:.0}/s, least {:.0}/s",
        last / first,
        median(&seconds),
        least_and_most(&seconds).0
    );
}

fn plot(about: &[(&'static str, String)], figures: &Figures) -> Plot {
    let points = figures.series.chunks(POINT_SECONDS).enumerate().map(|(at, part)| {
        let rate = part.iter().sum::<u64>() as f64 / part.len() as f64;
        ((at * POINT_SECONDS) as f64 / 60.0, rate)
    });
    let Load { clients, keys, value_bytes, .. } = figures.load;
    Plot {
        title: format!("Puts without a pause: {clients} clients, {keys} keys, {value_bytes} B values"),
        about: report::caption(about),
        x: ("minutes".into(), Scale::Linear),
        y: ("puts a second".into(), Scale::Linear),
        lines: vec![Line { name: "Pontoon put".into(), hue: 1, dashed: false, points: points.collect() }],
    }
}
