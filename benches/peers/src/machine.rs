//! Where it was measured.

use std::fs;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::{Instant, SystemTime};

use crate::options::Common;
use crate::peer::Kind;

/// Writes of which the median is told, and their size.
const SYNCS: usize = 200;
const SYNC_BYTES: usize = 4096;

/// What a reader has to know to judge figures, as lines of a name and what it is.
pub fn describe(common: &Common, kinds: &[Kind]) -> Result<Vec<(&'static str, String)>, String> {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .map_or("?", |rest| rest.trim_start_matches([' ', '\t', ':']).trim());
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = memory.lines().find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next());
    let gib = kib.and_then(|kib| kib.parse::<f64>().ok()).unwrap_or(0.0) / 1024.0 / 1024.0;
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut lines = vec![
        ("date", humantime::format_rfc3339_seconds(SystemTime::now()).to_string()),
        ("machine", format!("{cores} cores of {model}, {gib:.0} GiB, Linux {}", kernel.trim())),
        ("disk", disk(&common.dir)?),
        ("load average before", load_average()),
    ];
    for kind in kinds {
        lines.push(match kind {
            Kind::Etcd => ("etcd", version(*kind, &common.etcd)?),
            Kind::Pontoon => ("Pontoon", version(*kind, &common.pontoon)?),
        });
    }
    Ok(lines)
}

/// Load averages over 1, 5 and 15 minutes.
pub fn load_average() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().take(3).collect::<Vec<_>>().join(" ")
}

/// The first line that a program tells of its version.
fn version(kind: Kind, program: &Path) -> Result<String, String> {
    let name = program.display();
    let output = Command::new(program).arg("--version").output().map_err(|error| {
        let hint = if kind == Kind::Etcd {
            "; on Debian, `apt-get install etcd-server` brings it, `--etcd` names another, \
             and `--only pontoon` does without"
        } else {
            "; `cargo build --release` makes it, `--pontoon` names another"
        };
        format!("running {name}: {error}{hint}")
    })?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().next().unwrap_or("?").to_owned())
}

/// The file system of `dir`, its device, and what making a small write durable takes there.
fn disk(dir: &Path) -> Result<String, String> {
    let fail = |error: std::io::Error| format!("writing in {}: {error}", dir.display());
    fs::create_dir_all(dir).map_err(fail)?;
    let dir = dir.canonicalize().map_err(fail)?;
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let holds = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ');
        let (device, at, kind) = (fields.next()?, fields.next()?, fields.next()?);
        dir.starts_with(at).then_some((at.len(), format!("{kind} on {device}")))
    });
    let (_, system) = holds.max_by_key(|(length, _)| *length).unwrap_or((0, "?".to_owned()));
    let mut file = tempfile::tempfile_in(&dir).map_err(fail)?;
    let block = [7; SYNC_BYTES];
    file.write_all(&vec![0; SYNC_BYTES * SYNCS]).and_then(|()| file.sync_all()).map_err(fail)?;
    let mut times = Vec::new();
    for number in 0..SYNCS {
        let begun = Instant::now();
        file.write_all_at(&block, (number * SYNC_BYTES) as u64)
            .and_then(|()| file.sync_data())
            .map_err(fail)?;
        times.push(begun.elapsed());
    }
    times.sort_unstable();
    let us = |at: usize| times[at].as_micros();
    Ok(format!(
        "{system}; {SYNC_BYTES} bytes and fdatasync: median {} µs, 9 of 10 below {} µs",
        us(SYNCS / 2),
        us(SYNCS * 9 / 10)
    ))
}
