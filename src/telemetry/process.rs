//! What the operating system has counted for this process.
//!
//! Read from `/proc` where there is such a thing (Linux), and nothing elsewhere: what can't be read isn't
//! there. Times are those of the threads that live: a thread that has ended takes its own with it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// Time on a processor of all threads, in microseconds.
pub const CPU_US: &str = "process_cpu_us";
/// Times that a thread gave up its processor by itself: to wait for something.
pub const SWITCHES_VOLUNTARY: &str = "process_switches_voluntary";
/// Times that it was taken from a thread.
pub const SWITCHES_FORCED: &str = "process_switches_forced";
/// System calls that read: files, and sockets as far as they are read like files.
pub const READ_CALLS: &str = "process_read_calls";
/// System calls that write, likewise.
pub const WRITE_CALLS: &str = "process_write_calls";
/// Bytes of memory that are resident.
pub const RESIDENT_BYTES: &str = "process_resident_bytes";

/// What is known, by the names above; [`CPU_US`] also with the label `thread`, by the name of the threads.
pub fn counters() -> BTreeMap<String, f64> {
    read(Path::new("/proc/self"))
}

fn read(dir: &Path) -> BTreeMap<String, f64> {
    let mut counters = BTreeMap::new();
    let mut add = |name: String, value: f64| *counters.entry(name).or_insert(0.0) += value;
    let io = fs::read_to_string(dir.join("io")).unwrap_or_default();
    for (field, name) in [("syscr:", READ_CALLS), ("syscw:", WRITE_CALLS)] {
        if let Some(calls) = field_of(&io, field) {
            add(name.into(), calls);
        }
    }
    let status = fs::read_to_string(dir.join("status")).unwrap_or_default();
    if let Some(kib) = field_of(&status, "VmRSS:") {
        add(RESIDENT_BYTES.into(), kib * 1024.0);
    }
    let threads = fs::read_dir(dir.join("task")).into_iter().flatten().flatten();
    for thread in threads {
        // A thread may end while it is looked at.
        let text = |file| fs::read_to_string(thread.path().join(file)).unwrap_or_default();
        let status = text("status");
        for (field, name) in [
            ("voluntary_ctxt_switches:", SWITCHES_VOLUNTARY),
            ("nonvoluntary_ctxt_switches:", SWITCHES_FORCED),
        ] {
            if let Some(switches) = field_of(&status, field) {
                add(name.into(), switches);
            }
        }
        // Nanoseconds on a processor, then in its queue, then how often.
        let cpu = text("schedstat").split(' ').next().and_then(|ns| ns.parse::<f64>().ok());
        if let Some(ns) = cpu {
            let name: String = text("comm").trim().chars().filter(|c| !"\"\\{}".contains(*c)).collect();
            add(format!("{CPU_US}{{thread=\"{name}\"}}"), ns / 1000.0);
            add(CPU_US.into(), ns / 1000.0);
        }
    }
    counters
}

/// The number that follows `field` at the beginning of a line.
fn field_of(text: &str, field: &str) -> Option<f64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(field))?;
    rest.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_there_is_is_read_and_the_rest_is_not_there() {
        let dir = tempfile::tempdir().unwrap();
        assert!(read(dir.path()).is_empty());
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("io", "rchar: 9\nsyscr: 12\nsyscw: 34\n");
        write("status", "Name:\tx\nVmRSS:\t    2048 kB\n");
        for (thread, name, ns) in [(1, "arbiter", 5_000), (2, "log-writer", 7_000), (3, "arbiter", 11_000)] {
            write(&format!("task/{thread}/comm"), &format!("{name}\n"));
            write(&format!("task/{thread}/schedstat"), &format!("{ns} 17 3\n"));
            let switches = "voluntary_ctxt_switches:\t4\nnonvoluntary_ctxt_switches:\t1\n";
            write(&format!("task/{thread}/status"), switches);
        }
        let expected = [
            (READ_CALLS, 12.0),
            (WRITE_CALLS, 34.0),
            (RESIDENT_BYTES, 2_097_152.0),
            (SWITCHES_VOLUNTARY, 12.0),
            (SWITCHES_FORCED, 3.0),
            (CPU_US, 23.0),
            ("process_cpu_us{thread=\"arbiter\"}", 16.0),
            ("process_cpu_us{thread=\"log-writer\"}", 7.0),
        ];
        let expected = expected.map(|(name, value)| (name.to_owned(), value));
        assert_eq!(read(dir.path()), BTreeMap::from(expected));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_process_uses_a_processor() {
        // One thread's alone: those of other tests take theirs with them when they end.
        let busy = || {
            let begun = std::time::Instant::now();
            let mut sum = 0_u64;
            loop {
                let counters = counters();
                let used = counters[&format!("{CPU_US}{{thread=\"busy\"}}")];
                if used > 1_000.0 {
                    return counters;
                }
                // Others may use the processors for a while.
                assert!(begun.elapsed() < std::time::Duration::from_secs(60), "{used} µs");
                (0..100_000).for_each(|_| sum = std::hint::black_box(sum.wrapping_add(1)));
            }
        };
        let busy = std::thread::Builder::new().name("busy".into()).spawn(busy).unwrap();
        let counters = busy.join().unwrap();
        assert!(counters[CPU_US] > 1_000.0, "of all threads");
        assert!(counters[RESIDENT_BYTES] > 0.0 && counters[READ_CALLS] > 0.0);
    }
}
