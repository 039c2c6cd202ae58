//! What the documentation says is held against the program: links, command lines, settings, metrics,
//! bounds, test vectors, names of tests, and the examples in other languages.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use clap::CommandFactory;
use clap::error::ErrorKind;
use pontoon::cli::args::{Cli, modernise};
use pontoon::settings::Settings;
use pontoon::telemetry::metrics::METRICS;
use pontoon::{limits, placement};

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A page and its text.
struct Page {
    path: PathBuf,
    text: String,
}

fn pages() -> Vec<Page> {
    let docs =
        fs::read_dir(repository().join("docs")).expect("docs").map(|entry| entry.expect("an entry").path());
    let mut paths: Vec<PathBuf> = docs.filter(|path| path.extension().is_some_and(|e| e == "md")).collect();
    paths.push(repository().join("README.md"));
    paths.sort();
    paths
        .into_iter()
        .map(|path| Page { text: fs::read_to_string(&path).expect("a page in UTF-8"), path })
        .collect()
}

impl Page {
    fn name(&self) -> String {
        self.path.strip_prefix(repository()).expect("within the repository").display().to_string()
    }

    /// Fenced blocks: language and lines.
    fn blocks(&self) -> Vec<(&str, Vec<&str>)> {
        let mut blocks: Vec<(&str, Vec<&str>)> = Vec::new();
        let mut inside = false;
        for line in self.text.lines() {
            match (line.strip_prefix("```"), inside) {
                (Some(language), false) => blocks.push((language.trim(), Vec::new())),
                (None, true) => blocks.last_mut().expect("begun").1.push(line),
                (Some(_), true) | (None, false) => {}
            }
            inside ^= line.starts_with("```");
        }
        assert!(!inside, "{}: a block is not closed", self.name());
        blocks
    }

    /// The text outside fenced blocks.
    fn prose(&self) -> String {
        let mut inside = false;
        let mut prose = String::new();
        for line in self.text.lines() {
            if line.starts_with("```") {
                inside = !inside;
            } else if !inside {
                prose.push_str(line);
                prose.push('\n');
            }
        }
        prose
    }

    /// What stands in backticks outside fenced blocks.
    fn code(&self) -> Vec<String> {
        self.prose().split('`').skip(1).step_by(2).map(|code| code.replace('\n', " ")).collect()
    }

    /// Anchors of its headings, as GitHub makes them.
    fn anchors(&self) -> BTreeSet<String> {
        let prose = self.prose();
        let headings = prose.lines().filter(|line| line.starts_with('#'));
        headings.map(|line| anchor(line.trim_start_matches('#').trim())).collect()
    }
}

fn anchor(heading: &str) -> String {
    let kept = heading
        .to_lowercase()
        .chars()
        .filter(|c| c.is_alphanumeric() || " -_".contains(*c))
        .collect::<String>();
    kept.replace(' ', "-")
}

#[test]
fn links_lead_somewhere() {
    let pages = pages();
    let mut broken = Vec::new();
    for page in &pages {
        let prose = page.prose();
        for link in prose.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if link.contains("://") {
                continue;
            }
            let (file, fragment) = link.split_once('#').unwrap_or((link, ""));
            let target = match file {
                "" => page.path.clone(),
                file => page.path.parent().expect("a directory").join(file),
            };
            if !target.exists() {
                broken.push(format!("{}: {link}", page.name()));
            } else if !fragment.is_empty() {
                let target = target.canonicalize().expect("it exists");
                let found = pages.iter().find(|p| p.path.canonicalize().is_ok_and(|path| path == target));
                if !found.is_some_and(|p| p.anchors().contains(fragment)) {
                    broken.push(format!("{}: {link}: no such heading", page.name()));
                }
            }
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
}

/// The words of a shell line, up to a comment, and its operators as words of their own.
fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    for c in line.chars() {
        match (quote, c) {
            (Some(q), c) if c == q => quote = None,
            (Some(_), c) => word.get_or_insert_default().push(c),
            (None, '\'' | '"') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None, '#') if word.is_none() => break,
            (None, ' ') => words.extend(word.take()),
            (None, '|' | '&' | ';' | '>' | '<') => {
                words.extend(word.take());
                words.push(c.to_string());
            }
            (None, c) => word.get_or_insert_default().push(c),
        }
    }
    assert!(quote.is_none(), "an open quote in `{line}`");
    words.extend(word);
    words
}

/// The command lines of our program in a shell line, the program's name first.
fn invocations(line: &str) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    for command in words(line).split(|word| ["|", "&", ";", ">", "<"].contains(&word.as_str())) {
        let is_assignment = |word: &&String| {
            word.split_once('=')
                .is_some_and(|(name, _)| name.chars().all(|c| c.is_ascii_uppercase() || c == '_'))
        };
        let command: Vec<String> = command.iter().skip_while(is_assignment).cloned().collect();
        let ours = |word: &str| word == "pontoon" || word.ends_with("/pontoon");
        match command.first().map(String::as_str) {
            Some(program) if ours(program) => found.push(command),
            Some("cargo") => {
                // `cargo run --release -- …`, without an example
                if let Some(at) = command.iter().position(|word| word == "--")
                    && command.get(1).is_some_and(|word| word == "run")
                    && !command[..at].iter().any(|word| word == "--example")
                {
                    let rest = command[at + 1..].iter().cloned();
                    found.push(std::iter::once("pontoon".to_owned()).chain(rest).collect());
                }
            }
            _ => {}
        }
    }
    found
}

fn parse_error(command: Vec<String>) -> Option<String> {
    let shown = command.join(" ");
    let args = modernise(command.into_iter().map(OsString::from).collect());
    let error = Cli::command().version("0").try_get_matches_from(args).err()?;
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => None,
        _ => Some(format!("`{shown}`: {error}")),
    }
}

#[test]
fn command_lines_are_ones_the_program_takes() {
    let (mut wrong, mut count) = (Vec::new(), 0);
    for page in pages() {
        let mut lines: Vec<String> = Vec::new();
        for (language, block) in page.blocks() {
            match language {
                "sh" => lines.extend(block.iter().map(ToString::to_string)),
                "console" => {
                    lines.extend(block.iter().filter_map(|line| line.strip_prefix("$ ")).map(str::to_owned))
                }
                "text" | "toml" | "python" | "rust" | "json" | "yaml" => {}
                other => {
                    wrong.push(format!("{}: a block in `{other}`; which commands does it hold?", page.name()))
                }
            }
        }
        lines.extend(
            page.code()
                .into_iter()
                .filter(|code| code.starts_with("pontoon ") || code.starts_with("target/")),
        );
        for line in lines {
            for command in invocations(&line) {
                count += 1;
                // A command is named, without its arguments.
                let named = command.len() <= 3
                    && command[1..].iter().all(|word| {
                        !word.starts_with('-') && word.chars().all(|c| c.is_ascii_lowercase() || c == '-')
                    });
                let asked = if named { [command.clone(), vec!["--help".into()]].concat() } else { command };
                wrong.extend(parse_error(asked).map(|error| format!("{}: {error}", page.name())));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(count > 30, "only {count} command lines were found: the search is broken");
}

#[test]
fn settings_and_variables_exist() {
    let keys: BTreeSet<&str> = Settings::keys().collect();
    let sections: BTreeSet<&str> = keys.iter().filter_map(|key| key.split('.').next()).collect();
    let (mut wrong, mut count) = (Vec::new(), 0);
    for page in pages() {
        for code in page.code() {
            let Some((section, name)) = code.split_once('.') else { continue };
            let is_file = ["rs", "toml", "json", "capnp", "md", "py", "txt", "mark", "sums"].contains(&name);
            if !sections.contains(section)
                || is_file
                || !name.chars().all(|c| c.is_ascii_lowercase() || c == '_')
            {
                continue;
            }
            count += 1;
            if !keys.contains(code.as_str()) {
                wrong.push(format!("{}: setting {code}", page.name()));
            }
        }
        for rest in page.text.split("PONTOON__").skip(1) {
            let name: String = rest.chars().take_while(|c| c.is_ascii_uppercase() || *c == '_').collect();
            let key = name.to_lowercase().replacen("__", ".", 1);
            if !name.is_empty() && !keys.contains(key.as_str()) {
                wrong.push(format!("{}: variable PONTOON__{name}", page.name()));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(count > 10, "only {count} settings were found: the search is broken");
}

#[test]
fn metrics_exist() {
    let mut wrong = Vec::new();
    for page in pages() {
        for code in page.code() {
            let name = code.split(['{', '[', ' ']).next().unwrap_or_default();
            if name.starts_with("pontoon_") && METRICS.iter().all(|metric| metric.name != name) {
                wrong.push(format!("{}: {name}", page.name()));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Constants whose values are quoted, and their values: bytes, numbers, milliseconds for `_MS`, or ticks for `_TICKS`.
fn bounds() -> Vec<(&'static str, u64)> {
    macro_rules! bounds {
        ($($name:ident),* $(,)?) => { vec![$((stringify!($name), limits::$name as u64)),*] };
    }
    bounds![
        KEY_BYTES_MAX,
        HELD_LOG_FACTOR,
        TRANSFER_TICKS_MAX,
        TRANSFER_AGAIN_MS_MIN,
        TRANSFER_AGAIN_MS_MAX,
        VALUE_BYTES_MAX,
        NAME_BYTES_MAX,
        REPLICAS_MAX,
        SHARDS_MAX,
        BATCH_OPERATIONS_MAX,
        GATHER_REQUESTS_MAX,
        ANSWER_BYTES_MAX,
        SCAN_PAIRS_MAX,
        MAP_NEWS_MS,
        MAP_WATCH_MS_MAX,
        MAP_WATCHES_MAX,
        SCAN_BYTES_MAX,
        SCAN_READ_BYTES_MAX,
        CONNECTION_UNSENT_BYTES_MAX,
        CONNECTION_STUCK_MS_MAX,
        DROP_SETTLE_MS_MAX,
        TRAVERSAL_BYTES_MAX,
        NESTING_MAX,
        GREETING_MS_MAX,
        TIMEOUT_MAX_MS,
        TIMEOUT_DEFAULT_MS,
        FRAME_BYTES_MAX,
        HELLO_FRAME_BYTES_MAX,
        KEEPALIVE_MS,
        PEER_IDLE_MS_MAX,
        SNAPSHOTS_SENT_MAX,
        SNAPSHOTS_RECEIVED_MAX,
        CRASHES_MAX,
        CRASH_WINDOW_MS,
        REOPEN_MS_MAX,
        STOP_MS_MAX,
        LOG_STALL_MS,
        STATE_STALL_MS,
        DISK_WATCH_MS,
        DISK_FULL_WAIT_MS,
        START_FREE_BYTES_MIN,
        METADATA_VOTERS_MAX,
        REBALANCE_TARGETS_MAX,
        REPAIR_MOVES_FACTOR,
        HELD_UP_TICKS,
        SNAPSHOT_DISK_FACTOR,
        CLIENT_CONNECTIONS_MAX,
        PEER_CONNECTIONS_MAX,
        SILENCE_MS_MAX,
        SIGN_MS_MAX,
        DIAL_SLOW_MS,
        CLIENT_UNACKED_MS_MAX,
        THREAD_ARRIVING_BATCHES_BYTES_MAX,
        THREAD_ARRIVING_BYTES_MAX,
        ARRIVING_WHOLE_MS,
        ARRIVING_WINDOW_MS,
        VERIFY_ATTEMPTS_MAX,
        VERIFY_MS_MAX,
        HELD_UP_TICKS,
    ]
}

/// How a bound may be written.
fn spellings(name: &str, value: u64) -> Vec<String> {
    if let Some(span) = name.strip_suffix("_TICKS") {
        return spellings(&format!("{span}_MS"), value * limits::TICK_MS);
    }
    let mut digits = value.to_string();
    for at in (1..digits.len()).rev().filter(|at| (digits.len() - at).is_multiple_of(3)).collect::<Vec<_>>() {
        digits.insert(at, ',');
    }
    let mut spellings = vec![digits];
    if name.contains("_MS") {
        spellings = vec![format!("{value} ms"), format!("{} s", value / 1000)];
        spellings.retain(|text| value.is_multiple_of(1000) || text.ends_with("ms"));
        if value == 60_000 {
            spellings.push("a minute".into());
        }
    } else if name.contains("_BYTES") {
        for (unit, size) in [("KiB", 1 << 10), ("MiB", 1 << 20)] {
            if value.is_multiple_of(size) && value / size < 1024 {
                spellings.push(format!("{} {unit}", value / size));
            }
        }
    }
    spellings
}

#[test]
fn bounds_are_quoted_as_they_are() {
    let bounds = bounds();
    let mut wrong = Vec::new();
    for page in pages() {
        // A constant is named in the line that quotes it.
        for line in page.prose().lines() {
            for code in line.split('`').skip(1).step_by(2) {
                let constant = code.contains('_') && code.chars().all(|c| c.is_ascii_uppercase() || c == '_');
                if !constant || code.starts_with("PONTOON_") {
                    continue;
                }
                match bounds.iter().find(|(name, _)| *name == code) {
                    None => {
                        wrong.push(format!("{}: {code} is not known here; add it to `bounds`", page.name()))
                    }
                    Some((name, value)) => {
                        let spellings = spellings(name, *value);
                        if !spellings.iter().any(|text| line.contains(text.as_str())) {
                            wrong.push(format!("{}: {name} is {spellings:?}: {line}", page.name()));
                        }
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    let readme = fs::read_to_string(repository().join("README.md")).expect("README.md").replace('\n', " ");
    for sentence in [
        format!("Key 1 B–{} KiB", limits::KEY_BYTES_MAX / 1024),
        format!("value up to {} MiB", limits::VALUE_BYTES_MAX / 1024 / 1024),
        format!("1–{} replicas", limits::REPLICAS_MAX),
        format!("1–{} shards", spellings("", limits::SHARDS_MAX.into())[0]),
    ] {
        assert!(readme.contains(&sentence), "README.md should say: {sentence}");
    }
}

#[test]
fn tests_and_files_that_are_named_exist() {
    let mut wrong = Vec::new();
    let mut count = 0;
    for page in pages() {
        for code in page.code() {
            let (path, function) = match code.split_once(": ") {
                Some((path, function)) => (path, Some(function)),
                None => (code.as_str(), None),
            };
            let rooted = ["src/", "tests/", "config/", "schema/", "examples/", "benches/", "docs/", ".ci/"];
            let plain = path.chars().all(|c| c.is_ascii_alphanumeric() || "/._-".contains(c));
            if !plain || !rooted.iter().any(|root| path.starts_with(root)) {
                continue;
            }
            count += 1;
            match (fs::read_to_string(repository().join(path)), function) {
                (Ok(text), Some(function)) if !text.contains(&format!("fn {function}(")) => {
                    wrong.push(format!("{}: {path} has no test {function}", page.name()));
                }
                (Ok(_), _) => {}
                (Err(_), None) if repository().join(path).is_dir() => {}
                (Err(_), _) => wrong.push(format!("{}: there is no {path}", page.name())),
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(count > 20, "only {count} files were found: the search is broken");
}

#[test]
fn the_protocol_has_the_test_vectors_of_the_ring() {
    let text = fs::read_to_string(repository().join("docs/protocol.md")).expect("docs/protocol.md");
    let rows = text.lines().filter_map(|line| {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let position = cells.get(3)?.trim_matches('`');
        let is_position = position.len() == 16 && position.bytes().all(|b| b.is_ascii_hexdigit());
        is_position.then(|| (cells[1].to_owned(), u64::from_str_radix(position, 16).expect("hexadecimal")))
    });
    let mut count = 0;
    for (cell, position) in rows {
        let quoted = cell.split('`').nth(1).unwrap_or_default();
        let key = if cell.ends_with("(three bytes)") {
            quoted.split(' ').map(|byte| u8::from_str_radix(byte, 16).expect("hexadecimal")).collect()
        } else {
            quoted.as_bytes().to_vec()
        };
        assert_eq!(placement::ring::position(&key), position, "{cell}");
        count += 1;
    }
    assert_eq!(count, 8);
}

/// The only Python program in the documentation is the example.
#[test]
fn the_python_client_is_shown_as_it_is() {
    let example = fs::read_to_string(repository().join("examples/python/client.py")).expect("the example");
    let page = fs::read_to_string(repository().join("docs/protocol.md")).expect("docs/protocol.md");
    assert!(page.contains(&format!("```python\n{example}```")), "docs/protocol.md shows another client.py");
}

/// A cluster in the background that ends with the test.
struct LocalCluster(tempfile::TempDir);

impl LocalCluster {
    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pontoon"));
        command.args(args).arg("--data").arg(self.0.path().join("data")).env_remove("PONTOON_CLUSTER");
        command
    }
}

impl Drop for LocalCluster {
    fn drop(&mut self) {
        if let Err(error) = self.command(&["stop"]).stdout(Stdio::null()).status() {
            eprintln!("stopping the cluster: {error}");
        }
    }
}

#[test]
fn the_python_client_works() {
    let python = std::env::var_os("PYTHON").unwrap_or_else(|| "python3".into());
    let has_capnp = Command::new(&python).args(["-c", "import capnp"]).stderr(Stdio::null()).status();
    if !has_capnp.is_ok_and(|status| status.success()) {
        println!(
            "skipped: {} has no pycapnp (`pip install pycapnp`; PYTHON names another)",
            python.display()
        );
        return;
    }
    let cluster = LocalCluster(tempfile::tempdir().expect("a directory"));
    let pontoon = |args: &[&str]| {
        let output = cluster.command(args).output().expect("running pontoon");
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{args:?}: {error}");
        String::from_utf8(output.stdout).expect("UTF-8")
    };
    pontoon(&["setup", "demo", "3", "4", "--detach"]);
    let status: serde_json::Value =
        serde_json::from_str(&pontoon(&["status", "--json"])).expect("a JSON object");
    let mut said = Vec::new();
    for node in status["nodes"].as_array().expect("nodes") {
        let address = node["address"].as_str().expect("an address");
        let output = Command::new(&python)
            .args(["examples/python/client.py", address, "demo"])
            .current_dir(repository())
            .output()
            .expect("running Python");
        said.push(format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        ));
    }
    let expected: Vec<String> =
        (1..=3).map(|version| format!("put: version {version}\nget: hello, bridge\n")).collect();
    assert_eq!(said, expected, "any node takes plain calls");
}
