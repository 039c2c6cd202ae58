//! What a simulation did and what came of it.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::checks::Violation;
use super::{SimOptions, Time};

/// The result of [`super::run`].
#[derive(Clone, PartialEq, Debug)]
pub struct Report {
    /// What was simulated; running it again gives the same.
    pub options: SimOptions,
    /// What must not happen and did.
    pub violation: Option<Violation>,
    /// Faults and other events worth counting, by kind.
    pub counts: BTreeMap<&'static str, u64>,
    /// Simulated time, in microseconds.
    pub time: Time,
    /// Events handled.
    pub events: u64,
    /// Operations by what clients were told.
    pub operations: BTreeMap<&'static str, u64>,
    /// Keys whose linearizability was not decided.
    pub undecided: usize,
    /// Stands for everything that happened, in order.
    pub trace_hash: u64,
    /// The last events, if [`SimOptions::trace`] asked for them.
    pub trace: Vec<String>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let options = &self.options;
        writeln!(
            f,
            "seed {}: {} nodes, {} shards of {} replicas, {} operations; planted: {:?}",
            options.seed,
            options.nodes,
            options.shards,
            options.replicas,
            options.operations,
            options.planted
        )?;
        writeln!(f, "faults {}", options.faults.names())?;
        writeln!(
            f,
            "{:.1} s simulated, {} events, trace {:016x}",
            self.time as f64 / 1e6,
            self.events,
            self.trace_hash
        )?;
        writeln!(f, "counts {:?}", self.counts)?;
        writeln!(f, "operations {:?}, keys undecided {}", self.operations, self.undecided)?;
        for line in &self.trace {
            writeln!(f, "  {line}")?;
        }
        match &self.violation {
            None => write!(f, "no violation"),
            Some(violation) => {
                write!(f, "VIOLATION of `{}` at seed {}: {}", violation.check, options.seed, violation.detail)
            }
        }
    }
}

/// Everything that happens, in order, as one number, and the last of it as text.
pub struct Trace {
    hash: u64,
    keep: usize,
    lines: VecDeque<String>,
    line: String,
}

impl Trace {
    /// Keeps the last `keep` lines.
    pub fn new(keep: usize) -> Trace {
        Trace { hash: 0, keep, lines: VecDeque::new(), line: String::new() }
    }

    /// Something happens.
    pub fn note(&mut self, what: fmt::Arguments<'_>) {
        self.line.clear();
        // Formatting into a string fails only if a `Display` does, which the next comparison would show.
        if fmt::Write::write_fmt(&mut self.line, what).is_err() {
            self.line.push_str("unprintable");
        }
        self.hash = xxh3_64_with_seed(self.line.as_bytes(), self.hash);
        if self.keep > 0 {
            if self.lines.len() == self.keep {
                self.lines.pop_front();
            }
            self.lines.push_back(self.line.clone());
        }
    }

    /// Stands for all of it.
    pub fn hash(&self) -> u64 {
        self.hash
    }

    /// The last lines.
    pub fn into_lines(self) -> Vec<String> {
        self.lines.into()
    }
}
