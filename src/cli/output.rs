//! What the commands write: data on stdout, everything else on stderr. A reader that goes away is
//! no reason to panic.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use comfy_table::presets::UTF8_BORDERS_ONLY;
use comfy_table::{ContentArrangement, Table};
use serde_json::{Value, json};

use super::failure::Failure;
use crate::refusal::Outcome;

/// Writes bytes to stdout, exactly, and flushes them.
pub fn bytes(bytes: &[u8]) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    out.write_all(bytes).and_then(|()| out.flush()).map_err(failed)
}

/// Writes text and a newline to stdout.
pub fn line(text: impl AsRef<str>) -> Result<(), Failure> {
    let mut line = text.as_ref().to_owned();
    line.push('\n');
    bytes(line.as_bytes())
}

/// Writes a JSON value on one line to stdout.
pub fn json(value: &Value) -> Result<(), Failure> {
    line(value.to_string())
}

/// The failure of a write to stdout.
pub fn failed(error: io::Error) -> Failure {
    if error.kind() == io::ErrorKind::BrokenPipe {
        Failure::pipe_closed()
    } else {
        Failure::usage("io", format!("writing to stdout: {error}"))
    }
}

/// Whether stdout is a terminal.
pub fn on_terminal() -> bool {
    io::stdout().is_terminal()
}

/// Tells people something, on stderr. With nobody there to read it, it is not worth failing for.
pub fn note(text: impl AsRef<str>) {
    let mut line = text.as_ref().to_owned();
    line.push('\n');
    // In one write, so that lines of several processes don't mix.
    io::stderr().write_all(line.as_bytes()).ok();
}

/// Tells of a failure on stderr, as text or as JSON.
pub fn failure(as_json: bool, failure: &Failure) {
    if failure.message.is_empty() {
        return;
    }
    if as_json {
        note(failure_json(failure).to_string());
    } else {
        note(format!("error: {}", failure.message));
    }
}

/// The JSON form of a failure.
pub fn failure_json(failure: &Failure) -> Value {
    json!({"error": {
        "code": failure.code,
        "message": failure.message,
        "retryable": failure.retryable,
        "outcome": outcome(failure.outcome),
    }})
}

fn outcome(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::NotApplied => "not_applied",
        Outcome::Unknown => "unknown",
    }
}

/// A table with these headings.
pub fn table(headings: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_style(UTF8_BORDERS_ONLY)
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header(headings.to_vec());
    table
}

/// Bytes for a line of text: what would break the line, or isn't UTF-8, is escaped as in Rust.
pub fn printable(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for char in chunk.valid().chars() {
            if char == '\\' || char.is_control() {
                text.extend(char.escape_default());
            } else {
                text.push(char);
            }
        }
        for byte in chunk.invalid() {
            text.push_str(&format!("\\x{byte:02x}"));
        }
    }
    text
}

/// Bytes in the unit that people read.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// A number of things, by the name of one.
pub fn count(number: impl Into<u64>, one: &str) -> String {
    match number.into() {
        1 => format!("1 {one}"),
        number => format!("{number} {one}s"),
    }
}

/// A time that was given or taken, as people say it.
pub fn seconds(time: Duration) -> String {
    let ms = time.as_millis();
    if ms < 1_000 && !ms.is_multiple_of(100) && time.subsec_nanos().is_multiple_of(1_000_000) {
        return format!("{ms} ms");
    }
    let text = format!("{:.1}", time.as_secs_f64());
    format!("{} s", text.strip_suffix(".0").unwrap_or(&text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::failure::Exit;

    #[test]
    fn a_failure_in_json_has_the_four_fields() {
        let failure = Failure {
            exit: Exit::Unknown,
            code: "outcome_unknown",
            message: "lost".into(),
            retryable: false,
            outcome: Outcome::Unknown,
        };
        assert_eq!(
            failure_json(&failure).to_string(),
            r#"{"error":{"code":"outcome_unknown","message":"lost","retryable":false,"outcome":"unknown"}}"#
        );
        let failure = Failure::unavailable("nobody");
        assert_eq!(
            failure_json(&failure).to_string(),
            r#"{"error":{"code":"unavailable","message":"nobody","retryable":true,"outcome":"not_applied"}}"#
        );
    }

    #[test]
    fn printable_text_is_one_line() {
        assert_eq!(printable("héllo".as_bytes()), "héllo");
        assert_eq!(printable(b"a\tb\nc\\d\x00"), "a\\tb\\nc\\\\d\\u{0}");
        assert_eq!(printable(b"\xff\x41\xc3"), "\\xffA\\xc3");
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(1023), "1023 B");
        assert_eq!(size(1536), "1.5 KiB");
        assert_eq!(size(5 << 30), "5.0 GiB");
    }

    #[test]
    fn one_is_not_many() {
        assert_eq!(
            ["0 nodes", "1 node", "2 nodes"].map(str::to_owned),
            [0u32, 1, 2].map(|n| count(n, "node"))
        );
        assert_eq!(seconds(Duration::from_micros(497_912)), "0.5 s");
        assert_eq!(seconds(Duration::from_millis(150)), "150 ms");
        assert_eq!(seconds(Duration::from_millis(500)), "0.5 s");
        assert_eq!(seconds(Duration::from_secs(10)), "10 s");
        assert_eq!(seconds(Duration::from_millis(1_250)), "1.2 s");
    }
}
