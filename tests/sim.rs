//! Whole clusters under simulated faults, seed by seed.
//!
//! `PONTOON_SEEDS=A..B cargo test --test sim seeds` runs other seeds than the default ones;
//! `PONTOON_SEEDS=A..B PONTOON_TRACE=400` also shows the last events before a violation.

use std::collections::BTreeMap;
use std::ops::Range;

use pontoon::sim::{Faults, Planted, SimOptions, run};

/// Seeds that once showed a bug, and the bug. A change of the simulation gives them other events: then find
/// others by taking the fix out.
const REGRESSIONS: &[(u64, &str)] = &[
    (6, "raft-rs batched entries into an empty append that they didn't follow on"),
    (213, "the same, far behind"),
    (561, "raft-rs went back further than a follower had acknowledged, to where the log was compacted"),
    (23, "a deletion that had found nothing came again, late, and deleted"),
    (187, "the same, in a session of many commands"),
];

const CRASHES: Faults = Faults { crashes: true, power: true, slow_disks: true, ..Faults::NONE };
const ANY: Faults = Faults { drift: false, ..Faults::ALL };

fn seeds(default: Range<u64>) -> Range<u64> {
    let Ok(text) = std::env::var("PONTOON_SEEDS") else { return default };
    let parsed = text.split_once("..").and_then(|(from, to)| Some(from.parse().ok()?..to.parse().ok()?));
    parsed.unwrap_or_else(|| panic!("PONTOON_SEEDS is `A..B`, not `{text}`"))
}

fn trace() -> usize {
    std::env::var("PONTOON_TRACE").ok().and_then(|text| text.parse().ok()).unwrap_or(0)
}

fn of_seed(seed: u64) -> SimOptions {
    SimOptions { trace: trace(), ..SimOptions::of_seed(seed) }
}

#[test]
fn seeds_show_no_violation() {
    let mut failed = Vec::new();
    let mut totals: BTreeMap<&str, u64> = BTreeMap::new();
    let mut undecided = 0;
    for seed in seeds(0..100) {
        let report = run(of_seed(seed));
        if seed % 500 == 499 {
            println!("up to seed {seed}: {} failed", failed.len());
        }
        for (what, count) in report.counts.iter().chain(&report.operations) {
            *totals.entry(*what).or_insert(0) += count;
        }
        undecided += report.undecided;
        if report.violation.is_some() {
            println!("{report}\n");
            failed.push(seed);
        }
    }
    println!("{totals:?}, keys undecided {undecided}");
    assert!(failed.is_empty(), "violations at seeds {failed:?}");
    if totals.get("answered").is_none_or(|answered| *answered < 10_000) {
        return; // Too few seeds for what follows.
    }
    // A simulation in which nothing happens shows nothing.
    let expected = [
        "answered",
        "unknown",
        "crashes",
        "partitions",
        "fetches",
        "flushes",
        "compactions",
        "commands sent again",
        "sessions expired",
        "snapshots installed",
        "snapshots not needed",
    ];
    for what in expected {
        assert!(totals.get(what).is_some_and(|count| *count > 0), "no {what}: {totals:?}");
    }
    assert_eq!(undecided, 0, "histories too long for the check of linearizability");
}

#[test]
fn seeds_that_once_failed_show_no_violation() {
    for (seed, bug) in REGRESSIONS {
        let report = run(of_seed(*seed));
        assert_eq!(report.violation, None, "{bug}\n{report}");
    }
}

#[test]
fn the_same_seed_gives_the_same_events() {
    for seed in [1, 7, 26] {
        let options = SimOptions { trace: 20, ..SimOptions::of_seed(seed) };
        let (first, second) = (run(options.clone()), run(options));
        assert_eq!(first, second, "seed {seed}");
    }
    let hashes = [1, 2].map(|seed| run(SimOptions::of_seed(seed)).trace_hash);
    assert_ne!(hashes[0], hashes[1], "different seeds give different events");
}

#[test]
fn without_faults_every_operation_is_answered() {
    let options = SimOptions { faults: Faults::NONE, ..SimOptions::of_seed(3) };
    let report = run(options);
    assert_eq!(report.violation, None, "{report}");
    assert_eq!(report.operations.keys().copied().collect::<Vec<_>>(), ["answered"], "{report}");
}

/// Runs seeds with a bug put in until one of the checks `among` sees it.
fn is_caught(planted: Planted, faults: Faults, seeds_max: u64, among: &[&str]) {
    for seed in 0..seeds_max {
        let options = SimOptions {
            nodes: 3,
            shards: 3,
            replicas: 3,
            retention: if planted == Planted::InstallUnsynced { 0 } else { u64::MAX },
            faults,
            planted: Some(planted),
            ..SimOptions::of_seed(seed)
        };
        let report = run(options);
        if let Some(violation) = report.violation.filter(|violation| among.contains(&violation.check)) {
            println!("{planted:?} is caught at seed {seed}: {violation:?}");
            return;
        }
    }
    panic!("{planted:?} is not caught within {seeds_max} seeds");
}

#[test]
fn a_disk_that_acknowledges_before_it_is_durable_is_caught() {
    is_caught(
        Planted::AcknowledgeEarly,
        CRASHES,
        20,
        &["state", "open", "leaders", "logs", "durable", "linear"],
    );
}

#[test]
fn a_vote_that_is_not_persisted_is_caught() {
    is_caught(Planted::VoteNotPersisted, ANY, 100, &["leaders", "logs", "state"]);
}

#[test]
fn reads_that_skip_the_quorum_are_caught() {
    is_caught(Planted::StaleReads, ANY, 60, &["linear"]);
}

#[test]
fn a_log_that_is_compacted_before_the_flush_is_durable_is_caught() {
    is_caught(Planted::CompactEarly, CRASHES, 60, &["open"]);
}

#[test]
fn a_snapshot_installed_before_it_is_durable_is_caught() {
    is_caught(Planted::InstallUnsynced, CRASHES, 200, &["state", "open"]);
}

#[test]
fn a_flush_without_a_redo_file_is_caught() {
    is_caught(Planted::NoRedoFile, CRASHES, 60, &["state", "open"]);
}

#[test]
fn a_flush_without_the_sessions_is_caught() {
    is_caught(Planted::SessionsForgotten, CRASHES, 60, &["state", "open", "once"]);
}

#[test]
fn a_retry_that_is_taken_for_another_command_is_caught() {
    is_caught(Planted::RetryAppliesTwice, ANY, 20, &["once"]);
}
