//! Log lines: `tracing` for the whole program, and a bridge that brings raft-rs's messages, which
//! come through `slog`, to the same place.

use std::fmt::{self, Write as _};
use std::fs::File;
use std::io::IsTerminal;
use std::sync::Arc;

use slog::{Drain, KV, Level as RaftLevel, Never, OwnedKVList, Record};
use tracing::Level;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::prelude::*;

use crate::ids::{ReplicaId, ShardId};
use crate::settings::{LogFormat, LogSettings};

/// Target of the raft library's messages, for filter directives.
pub const RAFT_TARGET: &str = "pontoon::raft";

/// Longest line made of a raft message, in bytes. Its most verbose ones print whole entries.
const RAFT_LINE_BYTES_MAX: usize = 1024;

/// Where log lines go.
#[derive(Debug)]
pub enum LogWriter {
    /// To standard error, in colours if that is a terminal.
    Stderr,
    /// To a file, opened for appending by the caller.
    File(File),
}

/// Why logging can't be set up.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum LogError {
    /// `log.level` is not a filter.
    #[error("log.level: {0}")]
    Level(String),
    /// The process logs already: there is one log for all its nodes.
    #[error("logging is set up already; a process has one log for all its nodes")]
    AlreadySet,
}

/// Sets up logging for the process.
///
/// # Errors
/// A level that is no filter, and a second call.
pub fn init(settings: &LogSettings, writer: LogWriter) -> Result<(), LogError> {
    let subscriber = match writer {
        LogWriter::Stderr => {
            let colours = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
            subscriber(settings, std::io::stderr, colours)?
        }
        LogWriter::File(file) => subscriber(settings, Arc::new(file), false)?,
    };
    tracing::subscriber::set_global_default(subscriber).map_err(|_| LogError::AlreadySet)
}

fn subscriber<W>(
    settings: &LogSettings,
    writer: W,
    colours: bool,
) -> Result<Box<dyn tracing::Subscriber + Send + Sync>, LogError>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let filter = parse_level(&settings.level).map_err(LogError::Level)?;
    let lines = tracing_subscriber::fmt::layer().with_writer(writer).with_ansi(colours);
    let registry = tracing_subscriber::registry().with(filter);
    Ok(match settings.format {
        LogFormat::Text => Box::new(registry.with(lines)),
        LogFormat::Json => Box::new(registry.with(lines.json().flatten_event(true))),
    })
}

/// Reads `log.level`: a level, or directives `TARGET=LEVEL` separated by commas, of which one may
/// be a level alone. Stricter than the filter itself, to which a misspelt level is a target.
pub fn parse_level(text: &str) -> Result<Targets, String> {
    let mut filter = Targets::new();
    let mut default = None;
    for directive in text.split(',').map(str::trim) {
        let (target, level) = match directive.split_once('=') {
            Some((target, level)) => (Some(target.trim()), level.trim()),
            None => (None, directive),
        };
        let level = match level.to_ascii_lowercase().as_str() {
            "off" => LevelFilter::OFF,
            "error" => LevelFilter::ERROR,
            "warn" => LevelFilter::WARN,
            "info" => LevelFilter::INFO,
            "debug" => LevelFilter::DEBUG,
            "trace" => LevelFilter::TRACE,
            _ => {
                return Err(format!(
                    "{level:?} is not a level; write error, warn, info, debug, trace or off, or \
                     directives as \"info,pontoon::group=debug\""
                ));
            }
        };
        let allowed = |c: char| c.is_ascii_alphanumeric() || "_:-".contains(c);
        match target {
            Some(target) if target.is_empty() || !target.chars().all(allowed) => {
                return Err(format!("{target:?} is not a part of the program, as \"pontoon::group\""));
            }
            Some(target) => filter = filter.with_target(target, level),
            None if default.is_some() => {
                return Err(format!("{text:?} has two levels without a target"));
            }
            None => default = Some(level),
        }
    }
    Ok(filter.with_default(default.unwrap_or(LevelFilter::OFF)))
}

/// The logger for the raft library's state of one replica. Its messages appear under
/// [`RAFT_TARGET`] with the shard and the replica; nothing is formatted for a level that is off.
pub fn raft_logger(shard: ShardId, replica: ReplicaId) -> slog::Logger {
    slog::Logger::root(RaftDrain { shard, replica }, slog::o!())
}

struct RaftDrain {
    shard: ShardId,
    replica: ReplicaId,
}

/// raft-rs speaks of its ordinary life at `info` and of lost leadership at `warn`, once per group;
/// with thousands of groups that is too loud, so each level is taken one lower. Errors, which it
/// doesn't expect itself, stay.
fn level(record: &Record<'_>) -> Level {
    match record.level() {
        RaftLevel::Critical | RaftLevel::Error => Level::ERROR,
        RaftLevel::Warning => match record.msg().as_str() {
            // The leader lost its quorum: the operator wants to see it.
            Some("stepped down to follower since quorum is not active") => Level::INFO,
            // A snapshot that doesn't belong here: should never happen.
            Some(message) if message.contains("attempted to restore snapshot") => Level::WARN,
            _ => Level::DEBUG,
        },
        RaftLevel::Info => Level::DEBUG,
        RaftLevel::Debug | RaftLevel::Trace => Level::TRACE,
    }
}

impl Drain for RaftDrain {
    type Ok = ();
    type Err = Never;

    fn log(&self, record: &Record<'_>, _: &OwnedKVList) -> Result<(), Never> {
        // Each level needs a call site of its own: whether it is on is remembered there.
        macro_rules! forward {
            ($level:expr) => {
                if tracing::enabled!(target: RAFT_TARGET, $level) {
                    let line = Line::of(record);
                    tracing::event!(
                        target: RAFT_TARGET,
                        $level,
                        shard = self.shard.0,
                        replica = self.replica.0,
                        "{line}"
                    );
                }
            };
        }
        match level(record) {
            Level::ERROR => forward!(Level::ERROR),
            Level::WARN => forward!(Level::WARN),
            Level::INFO => forward!(Level::INFO),
            Level::DEBUG => forward!(Level::DEBUG),
            Level::TRACE => forward!(Level::TRACE),
        }
        Ok(())
    }
}

/// A message and its values on one line, cut at [`RAFT_LINE_BYTES_MAX`].
struct Line {
    text: String,
    cut: bool,
}

impl Line {
    fn of(record: &Record<'_>) -> Line {
        let mut line = Line { text: String::new(), cut: false };
        let written = write!(line, "{}", record.msg());
        if written.is_err() || record.kv().serialize(record, &mut line).is_err() {
            // The line is full, which ended the formatting early, or a value can't show itself.
            line.cut = true;
        }
        line
    }
}

impl fmt::Write for Line {
    fn write_str(&mut self, more: &str) -> fmt::Result {
        let room = RAFT_LINE_BYTES_MAX - self.text.len();
        let end = more.floor_char_boundary(room);
        self.text.push_str(&more[..end]);
        if end < more.len() {
            return Err(fmt::Error);
        }
        Ok(())
    }
}

impl slog::Serializer for Line {
    fn emit_arguments(&mut self, key: slog::Key, value: &fmt::Arguments<'_>) -> slog::Result {
        write!(self, " {key}={value}").map_err(slog::Error::Fmt)
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)?;
        f.write_str(if self.cut { " …" } else { "" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[derive(Clone, Default)]
    struct Capture(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Capture {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged(level: &str, format: LogFormat, f: impl FnOnce()) -> Vec<String> {
        let capture = Capture::default();
        let writer = capture.clone();
        let settings = LogSettings { level: level.into(), format };
        let subscriber = subscriber(&settings, move || writer.clone(), false).unwrap();
        tracing::subscriber::with_default(subscriber, f);
        let bytes = capture.0.lock().unwrap().clone();
        let text = String::from_utf8(bytes).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    /// Counts how often it is formatted.
    struct Probe<'a>(&'a AtomicUsize);

    impl fmt::Display for Probe<'_> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            self.0.fetch_add(1, Ordering::Relaxed);
            f.write_str("probe")
        }
    }

    #[test]
    fn raft_messages_carry_shard_and_replica_at_a_fitting_level() {
        let lines = logged("debug", LogFormat::Json, || {
            let logger = raft_logger(ShardId(7), ReplicaId(9));
            slog::error!(logger, "bad"; "error" => "e");
            slog::warn!(logger, "stepped down to follower since quorum is not active");
            slog::warn!(logger, "non-follower attempted to restore snapshot");
            slog::warn!(logger, "index({}) is out of range", 1);
            slog::info!(logger, "became leader at term {term}", term = 3);
            slog::debug!(logger, "sending");
        });
        let seen: Vec<_> = lines
            .iter()
            .map(|line| {
                let line: serde_json::Value = serde_json::from_str(line).unwrap();
                assert_eq!(line["shard"], 7);
                assert_eq!(line["replica"], 9);
                assert_eq!(line["target"], RAFT_TARGET);
                let text = |name: &str| line[name].as_str().unwrap().to_owned();
                (text("level"), text("message"))
            })
            .collect();
        let expected = [
            ("ERROR", "bad error=e"),
            ("INFO", "stepped down to follower since quorum is not active"),
            ("WARN", "non-follower attempted to restore snapshot"),
            ("DEBUG", "index(1) is out of range"),
            // slog hands a named argument over as a value too.
            ("DEBUG", "became leader at term 3 term=3"),
        ];
        assert_eq!(seen, expected.map(|(a, b)| (a.to_owned(), b.to_owned())));
    }

    #[test]
    fn nothing_is_formatted_for_a_level_that_is_off() {
        let count = AtomicUsize::new(0);
        let log = || {
            let logger = raft_logger(ShardId(1), ReplicaId(1));
            slog::info!(logger, "{}", Probe(&count); "value" => %Probe(&count));
        };
        assert!(logged("info", LogFormat::Text, log).is_empty());
        assert_eq!(count.load(Ordering::Relaxed), 0);
        let lines = logged("info,pontoon::raft=debug", LogFormat::Text, log);
        assert!(lines[0].ends_with("probe value=probe shard=1 replica=1"), "{lines:?}");
        assert_eq!(count.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn long_messages_are_cut_between_characters() {
        let lines = logged("debug", LogFormat::Text, || {
            let logger = raft_logger(ShardId(1), ReplicaId(1));
            slog::info!(logger, "x{}", "é".repeat(RAFT_LINE_BYTES_MAX));
        });
        assert!(lines[0].contains("é …"));
        assert!(lines[0].len() < RAFT_LINE_BYTES_MAX + 200);
    }

    #[test]
    fn levels() {
        for good in ["info", "INFO", "off", "warn,pontoon::group=debug", "pontoon=trace, sled=error"] {
            assert!(parse_level(good).is_ok(), "{good}");
        }
        for bad in ["", "inof", "info,", "info,debug", "=info", "pontoon=", "a b=info", "5"] {
            assert!(parse_level(bad).is_err(), "{bad}");
        }
        let filter = parse_level("warn,pontoon::group=debug").unwrap();
        assert!(filter.would_enable("pontoon::group", &Level::DEBUG));
        assert!(!filter.would_enable("pontoon::node", &Level::INFO));
        assert!(filter.would_enable("pontoon::node", &Level::WARN));
    }
}
