//! What a simulation did and what came of it.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::hash::{Hash, Hasher};

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::checks::{CHECKS, Violation};
use super::planted::Plant;
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
            "seed {}: {} nodes, {} shards of {} replicas, {} operations{}",
            options.seed,
            options.nodes,
            options.shards,
            options.replicas,
            options.operations,
            if options.planted == Plant::NONE { String::new() } else { format!("; {:?}", options.planted) }
        )?;
        writeln!(f, "faults: {}", options.faults.names())?;
        writeln!(
            f,
            "{:.1} s simulated, {} events, trace {:016x}",
            self.time as f64 / 1e6,
            self.events,
            self.trace_hash
        )?;
        writeln!(f, "happened: {}", listed(&self.counts))?;
        writeln!(f, "operations: {}", listed(&self.operations))?;
        if self.undecided > 0 {
            writeln!(f, "linearizability of {} keys was not decided", self.undecided)?;
        }
        // The first violation ends a run: what would have been checked after it isn't known.
        match &self.violation {
            None => writeln!(f, "checked: {}", CHECKS.map(|(name, _)| name).join(", "))?,
            Some(violation) => writeln!(f, "checked until `{}` failed", violation.check)?,
        }
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

/// What was counted, for a person.
pub fn listed(counts: &BTreeMap<&'static str, u64>) -> String {
    counts.iter().map(|(what, times)| format!("{times} {what}")).collect::<Vec<_>>().join(", ")
}

/// Everything that happens, in order, as one number, and the last of it as text. The text is made only if
/// somebody asked for it: making it would take longer than all the rest.
pub struct Trace {
    digest: Digest,
    keep: usize,
    lines: VecDeque<String>,
}

/// Notes something in a trace: a text with `{}`, and what goes there, which is hashed too.
macro_rules! note {
    ($trace:expr, $text:literal $(, $what:expr)* $(,)?) => {{
        let digest = $trace.digest($text);
        $(std::hash::Hash::hash(&$what, digest);)*
        if $trace.keeps() {
            $trace.keep(format!($text $(, $what)*));
        }
    }};
}
pub(super) use note;

impl Trace {
    /// Keeps the last `keep` lines.
    pub fn new(keep: usize) -> Trace {
        Trace { digest: Digest(0), keep, lines: VecDeque::new() }
    }

    /// Something happens that begins with `text`; the rest of it goes into what this returns.
    pub fn digest(&mut self, text: &'static str) -> &mut impl Hasher {
        text.hash(&mut self.digest);
        &mut self.digest
    }

    /// Whether lines are kept.
    pub fn keeps(&self) -> bool {
        self.keep > 0
    }

    /// Keeps a line.
    pub fn keep(&mut self, line: String) {
        if self.lines.len() == self.keep {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }

    /// Stands for all of it.
    pub fn hash(&self) -> u64 {
        self.digest.finish()
    }

    /// The last lines.
    pub fn into_lines(self) -> Vec<String> {
        self.lines.into()
    }
}

/// A hash that is the same in every run and on every machine.
struct Digest(u64);

impl Hasher for Digest {
    fn write(&mut self, bytes: &[u8]) {
        self.0 = xxh3_64_with_seed(bytes, self.0);
    }

    fn write_u8(&mut self, n: u8) {
        self.write_u64(n.into());
    }

    fn write_u32(&mut self, n: u32) {
        self.write_u64(n.into());
    }

    fn write_u64(&mut self, n: u64) {
        // As far as one number needs: each bit of it, and of those before, reaches the upper half, which the
        // rotation brings down.
        self.0 = (self.0.rotate_left(29) ^ n).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    fn write_usize(&mut self, n: usize) {
        self.write_u64(n as u64);
    }

    fn finish(&self) -> u64 {
        self.0 ^ self.0 >> 32
    }
}

/// Something that is rare in a trace: it is hashed as it is shown.
pub struct Shown<T>(pub T);

impl<T: fmt::Debug> fmt::Debug for Shown<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<T: fmt::Debug> Hash for Shown<T> {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        format!("{:?}", self.0).hash(hasher);
    }
}
