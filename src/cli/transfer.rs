//! `import` and `export`: all pairs of a database as JSON lines.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use tokio::sync::mpsc;

use super::args::{ExportArgs, ImportArgs};
use super::context::{Context, with_session};
use super::encoding::{self, Record};
use super::failure::{Exit, Failure};
use super::output;
use super::signals::Signals;
use crate::client::{ClientError, Database, NotApplied, Operation, OperationResult, ScanOptions};
use crate::limits::{
    BATCH_BYTES_MAX, IMPORT_BATCH_PAIRS, IMPORT_BATCHES_IN_FLIGHT, IMPORT_FAILURES_TOLD,
    IMPORT_LINE_BYTES_MAX,
};

/// A line of the input.
struct Line {
    number: u64,
    pair: Result<(Bytes, Bytes), String>,
    /// Bytes of input it took, for the progress bar.
    bytes: u64,
}

/// Pairs that travel together; no key twice.
#[derive(Default)]
struct Batch {
    numbers: Vec<u64>,
    keys: Vec<Bytes>,
    operations: Vec<Operation>,
    bytes: usize,
}

/// What came of an import.
#[derive(Default)]
struct Tally {
    imported: u64,
    failed: u64,
    told: Vec<String>,
    exit: Option<Exit>,
    /// The database isn't there: no line can go in.
    no_database: Option<Failure>,
}

/// `import DB [FILE]`
pub fn import(context: &Context, args: ImportArgs) -> Result<Exit, Failure> {
    let (input, length) = open_input(args.file.as_deref())?;
    let signals = Signals::listen(None)?;
    let progress = progress(length);
    let tally = with_session(context, async |session| {
        let database = session.database_for_many(&args.db);
        let (sender, lines) = mpsc::channel(IMPORT_BATCH_PAIRS);
        // Reading blocks, on a pipe without end; the thread ends with the process.
        std::thread::Builder::new()
            .name("import".into())
            .spawn(move || read_lines(input, &sender))
            .map_err(|error| Failure::internal(format!("starting to read: {error}")))?;
        Ok(run_import(&database, lines, &signals, &progress).await)
    })?;
    progress.finish_and_clear();
    if let Some(failure) = tally.no_database.filter(|_| tally.imported == 0) {
        return Err(failure);
    }
    let cut_short = signals.is_stopped();
    if context.json() {
        output::json(&json!({
            "imported": tally.imported,
            "failed": tally.failed,
            "complete": !cut_short,
            "errors": tally.told,
        }))?;
    } else {
        for text in &tally.told {
            output::note(text);
        }
        if tally.failed > tally.told.len() as u64 {
            let more = tally.failed - tally.told.len() as u64;
            output::note(format!("and {more} more"));
        }
        output::line(format!(
            "imported {}, failed {}{}",
            tally.imported,
            tally.failed,
            if cut_short { ", cut short" } else { "" }
        ))?;
    }
    let interrupted = cut_short.then_some(Exit::Negative);
    Ok(tally.exit.or(interrupted).unwrap_or(Exit::Done))
}

async fn run_import(
    database: &Database,
    mut lines: mpsc::Receiver<Line>,
    signals: &Signals,
    progress: &ProgressBar,
) -> Tally {
    let mut tally = Tally::default();
    let mut batch = Batch::default();
    let mut on_the_way = FuturesUnordered::new();
    // Keys of `batch` and of all that is on the way: a second line with such a key must wait, for
    // nothing orders batches among each other.
    let mut keys = HashSet::new();
    let stopped = signals.stopped();
    tokio::pin!(stopped);
    while tally.no_database.is_none() {
        let full = on_the_way.len() >= IMPORT_BATCHES_IN_FLIGHT;
        tokio::select! {
            biased;
            () = &mut stopped => break,
            Some(done) = on_the_way.next(), if !on_the_way.is_empty() => {
                tally.take(done, &mut keys);
            }
            line = lines.recv(), if !full => {
                let Some(line) = line else { break };
                progress.inc(line.bytes);
                let (key, value) = match line.pair {
                    Ok(pair) => pair,
                    Err(reason) => {
                        tally.fail(line.number, &reason, Exit::Usage);
                        continue;
                    }
                };
                if keys.contains(&key) {
                    on_the_way.push(send(database, std::mem::take(&mut batch)));
                    while let Some(done) = on_the_way.next().await {
                        tally.take(done, &mut keys);
                    }
                }
                keys.insert(key.clone());
                batch.push(line.number, key, value);
                if batch.is_full() || lines.is_empty() {
                    on_the_way.push(send(database, std::mem::take(&mut batch)));
                }
            }
        }
    }
    on_the_way.push(send(database, batch));
    while let Some(done) = on_the_way.next().await {
        tally.take(done, &mut keys);
    }
    tally
}

type Sent = (Batch, Vec<Result<OperationResult, ClientError>>);

async fn send(database: &Database, mut batch: Batch) -> Sent {
    let operations = std::mem::take(&mut batch.operations);
    let results = if operations.is_empty() { Vec::new() } else { database.batch(operations).await };
    (batch, results)
}

impl Batch {
    fn push(&mut self, number: u64, key: Bytes, value: Bytes) {
        self.bytes += key.len() + value.len();
        self.numbers.push(number);
        self.keys.push(key.clone());
        self.operations.push(Operation::Put(key, value));
    }

    fn is_full(&self) -> bool {
        self.operations.len() >= IMPORT_BATCH_PAIRS || self.bytes >= BATCH_BYTES_MAX
    }
}

impl Tally {
    fn take(&mut self, (batch, results): Sent, keys: &mut HashSet<Bytes>) {
        for key in &batch.keys {
            keys.remove(key);
        }
        for (number, result) in batch.numbers.into_iter().zip(results) {
            match result {
                Ok(_) => self.imported += 1,
                Err(error) => {
                    let no_database =
                        matches!(error, ClientError::NotApplied(NotApplied::UnknownDatabase(_)));
                    let failure = Failure::from(error);
                    self.fail(number, &failure.message, failure.exit);
                    if no_database {
                        self.no_database = Some(failure);
                    }
                }
            }
        }
    }

    /// The greatest exit code tells most: an unknown outcome before none, no answer before a bad line.
    fn fail(&mut self, number: u64, reason: &str, exit: Exit) {
        self.failed += 1;
        if self.told.len() < IMPORT_FAILURES_TOLD {
            self.told.push(format!("line {number}: {reason}"));
        }
        if self.exit.is_none_or(|have| have.code() < exit.code()) {
            self.exit = Some(exit);
        }
    }
}

fn open_input(path: Option<&Path>) -> Result<(Box<dyn Read + Send>, Option<u64>), Failure> {
    match path.filter(|path| *path != Path::new("-")) {
        None => Ok((Box::new(io::stdin()), None)),
        Some(path) => {
            let file = File::open(path).map_err(|e| Failure::io("reading", path, e))?;
            let length = file.metadata().ok().filter(|m| m.is_file()).map(|m| m.len());
            Ok((Box::new(file), length))
        }
    }
}

/// Reads lines until the end or until nobody takes them any more. Empty lines are passed over.
fn read_lines(input: impl Read, sender: &mpsc::Sender<Line>) {
    let mut input = BufReader::new(input);
    let mut text = Vec::new();
    for number in 1.. {
        text.clear();
        let read = (&mut input).take(IMPORT_LINE_BYTES_MAX as u64).read_until(b'\n', &mut text);
        let bytes = text.len() as u64;
        let (pair, last) = match read {
            Ok(0) => return,
            Ok(IMPORT_LINE_BYTES_MAX) if text.last() != Some(&b'\n') => {
                (Err("the line is longer than any pair; reading ends here".to_owned()), true)
            }
            Ok(_) if text.trim_ascii().is_empty() => continue,
            Ok(_) => (encoding::parse_line(&text), false),
            Err(error) => (Err(format!("reading failed: {error}")), true),
        };
        let line = Line { number, pair, bytes };
        if sender.blocking_send(line).is_err() || last {
            return;
        }
    }
}

/// `export DB [--prefix P] [--output FILE]`
pub fn export(context: &Context, args: ExportArgs) -> Result<Exit, Failure> {
    let mut sink = Sink::open(args.output.clone())?;
    let progress = progress(None);
    let count = with_session(context, async |session| {
        let mut scan = session.database_for_many(&args.db).scan(ScanOptions {
            prefix: encoding::argument(args.prefix.clone().unwrap_or_default()).into(),
            limit: None,
            keys_only: false,
        });
        let mut count = 0_u64;
        loop {
            let page = scan.next_page().await?;
            if page.is_empty() {
                return Ok(count);
            }
            for (key, found) in &page {
                let line = Record::new(key, Some(found)).json().to_string();
                progress.inc(line.len() as u64 + 1);
                sink.line(&line)?;
            }
            count += page.len() as u64;
        }
    })?;
    sink.finish()?;
    progress.finish_and_clear();
    output::note(format!("exported {}", output::count(count, "key")));
    Ok(Exit::Done)
}

/// Where an export goes: stdout, or a file that gets its name once it is complete.
enum Sink {
    Stdout(BufWriter<io::Stdout>),
    File { writer: BufWriter<File>, staged: PathBuf, path: PathBuf, complete: bool },
}

impl Sink {
    fn open(path: Option<PathBuf>) -> Result<Sink, Failure> {
        let Some(path) = path else {
            return Ok(Sink::Stdout(BufWriter::new(io::stdout())));
        };
        let mut staged = path.clone().into_os_string();
        staged.push(".part");
        let staged = PathBuf::from(staged);
        let file = File::create(&staged).map_err(|e| Failure::io("writing", &staged, e))?;
        Ok(Sink::File { writer: BufWriter::new(file), staged, path, complete: false })
    }

    fn line(&mut self, line: &str) -> Result<(), Failure> {
        match self {
            Sink::Stdout(writer) => writeln!(writer, "{line}").map_err(output::failed),
            Sink::File { writer, staged, .. } => {
                writeln!(writer, "{line}").map_err(|e| Failure::io("writing", staged, e))
            }
        }
    }

    fn finish(&mut self) -> Result<(), Failure> {
        match self {
            Sink::Stdout(writer) => writer.flush().map_err(output::failed),
            Sink::File { writer, staged, path, complete } => {
                writer
                    .flush()
                    .and_then(|()| writer.get_ref().sync_all())
                    .and_then(|()| std::fs::rename(&*staged, &*path))
                    .map_err(|error| Failure::io("writing", path, error))?;
                *complete = true;
                Ok(())
            }
        }
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        if let Sink::File { staged, complete: false, .. } = self {
            // The failure that cut the export short is the one to tell.
            std::fs::remove_file(staged).ok();
        }
    }
}

/// A progress bar in bytes on stderr; hidden where stderr is no terminal.
fn progress(length: Option<u64>) -> ProgressBar {
    let (bar, template) = match length {
        Some(length) => (ProgressBar::new(length), "{bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}"),
        None => (ProgressBar::new_spinner(), "{spinner} {bytes} {bytes_per_sec}"),
    };
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_all(input: &'static [u8]) -> Vec<Line> {
        let (sender, mut receiver) = mpsc::channel(100);
        read_lines(input, &sender);
        drop(sender);
        std::iter::from_fn(|| receiver.blocking_recv()).collect()
    }

    #[test]
    fn lines_are_numbered_and_bad_ones_kept_as_such() {
        let lines = read_all(
            b"{\"key\":\"a\",\"value\":\"1\"}\n\n  \nnonsense\n{\"key\":\"b\",\"value\":\"2\",\"version\":9}",
        );
        let numbers: Vec<u64> = lines.iter().map(|l| l.number).collect();
        assert_eq!(numbers, [1, 4, 5]);
        assert!(lines[0].pair.is_ok() && lines[1].pair.is_err());
        assert_eq!(lines[2].pair.as_ref().unwrap().0, "b");
    }

    #[test]
    fn the_exit_code_is_the_one_that_tells_most() {
        let mut tally = Tally::default();
        tally.fail(1, "bad", Exit::Usage);
        tally.fail(2, "lost", Exit::Unknown);
        tally.fail(3, "late", Exit::Unavailable);
        assert_eq!(tally.exit, Some(Exit::Unknown));
        assert_eq!((tally.failed, tally.told.len()), (3, 3));
    }

    #[test]
    fn an_export_that_fails_leaves_no_file() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("out.jsonl");
        let mut sink = Sink::open(Some(path.clone())).unwrap();
        sink.line("{}").unwrap();
        drop(sink);
        assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), 0);
        let mut sink = Sink::open(Some(path.clone())).unwrap();
        sink.line("{}").unwrap();
        sink.finish().unwrap();
        drop(sink);
        assert_eq!(std::fs::read_to_string(path).unwrap(), "{}\n");
    }
}
