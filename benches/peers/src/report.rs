//! What is printed and written.

use std::fmt;
use std::path::Path;

use serde_json::{Value, json};

use crate::load::Figures;

/// A table as documentation has them.
pub struct Table(Vec<Vec<String>>);

impl Table {
    /// One without rows.
    pub fn new(headings: Vec<String>) -> Table {
        Table(vec![headings])
    }

    /// Adds a row, of as many cells as there are headings.
    pub fn row(&mut self, cells: Vec<String>) {
        assert_eq!(cells.len(), self.0[0].len(), "a row of another length");
        self.0.push(cells);
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, row) in self.0.iter().enumerate() {
            writeln!(f, "| {} |", row.join(" | "))?;
            if number == 0 {
                writeln!(f, "|{}", "---|".repeat(row.len()))?;
            }
        }
        Ok(())
    }
}

/// The middle one, or the mean of the two in the middle; not a number where there is none.
pub fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_unstable_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[n / 2],
        n => (values[n / 2 - 1] + values[n / 2]) / 2.0,
    }
}

/// The bounds that values lie between.
pub fn least_and_most(values: &[f64]) -> (f64, f64) {
    (values.iter().copied().fold(f64::NAN, f64::min), values.iter().copied().fold(f64::NAN, f64::max))
}

/// Prints where it is measured, with the command behind it.
pub fn print_about(about: &[(&'static str, String)]) {
    let args: Vec<String> = std::env::args().skip(1).collect();
    println!("command: benches/peers/run {}", args.join(" "));
    for (name, what) in about {
        println!("{name}: {what}");
    }
}

/// The same as a caption: when and where, and of what.
pub fn caption(about: &[(&'static str, String)]) -> [String; 2] {
    [["date", "machine"], ["etcd", "Pontoon"]].map(|names| {
        let wanted = about.iter().filter(|(name, _)| names.contains(name));
        wanted.map(|(_, what)| what.as_str()).collect::<Vec<_>>().join(" · ")
    })
}

/// The same for programs.
pub fn about_as_json(about: &[(&'static str, String)]) -> Value {
    about.iter().map(|(name, what)| ((*name).to_owned(), Value::from(what.as_str()))).collect()
}

/// Figures of a load, for programs.
pub fn figures_as_json(figures: &Figures) -> Value {
    json!({
        "workload": figures.load.workload.name(),
        "clients": figures.load.clients,
        "keys": figures.load.keys,
        "value_bytes": figures.load.value_bytes,
        "seconds": figures.load.seconds,
        "ops_s": figures.rate(),
        "p50_ms": figures.ms(0.5),
        "p99_ms": figures.ms(0.99),
        "p999_ms": figures.ms(0.999),
        "max_ms": figures.ms(1.0),
        "server_us": figures.server_us(),
        "client_us": figures.client_us(),
        "errors": figures.errors,
        "series": figures.series,
    })
}

/// Writes a file.
pub fn write(path: &Path, text: &str) -> Result<(), String> {
    std::fs::write(path, text).map_err(|error| format!("writing {}: {error}", path.display()))
}
