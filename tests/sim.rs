//! Whole clusters under simulated faults, seed by seed.
//!
//! `PONTOON_SEEDS=A..B cargo test --test sim seeds` runs other seeds than the default ones;
//! `PONTOON_SEEDS=A..B PONTOON_TRACE=400` also shows the last events before a violation.
//! `cargo test --test sim planted -- --nocapture` prints the table of planted bugs in docs/testing.md.

use std::collections::BTreeMap;
use std::ops::Range;

use pontoon::sim::checks::CHECKS;
use pontoon::sim::{Faults, Plant, Planted, SimOptions, run};

/// Seeds that once showed a bug, and the bug. A change of the simulation gives them other events: then find
/// others by taking the fix out.
const REGRESSIONS: &[(u64, &str)] = &[
    (6, "raft-rs batched entries into an empty append that they didn't follow on"),
    (213, "the same, far behind"),
    (561, "raft-rs went back further than a follower had acknowledged, to where the log was compacted"),
    (23, "a deletion that had found nothing came again, late, and deleted"),
    (187, "the same, in a session of many commands"),
];

/// The same of runs in which members change, by an operator or by the cluster itself: with all faults of the seed.
const MEMBER_REGRESSIONS: &[(u64, &str)] = &[
    (10255, "of its day: a cluster that governs itself didn't become what its map wants"),
    (10982, "the same"),
    (21487, "all who stay had lost their state, and none of them let one lead who leaves and has it"),
    (21656, "the same, and a move stood still for it"),
    (22777, "two logs rotten and one node given up: that one was to go first, and couldn't"),
    (50740, "of the check: a leader without its state told of members that nobody had applied yet"),
];

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
    for seed in seeds(0..120) {
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
        "frames corrupted",
        "half-open links",
        "flaps",
        "torn writes",
        "replicas stopped by read errors",
        "replica crashes within a pass",
        "refusals to open a rotten replica",
        "state stores lost",
        "older copies of a state store",
        "replicas without a state",
        "states fetched",
        "flushes for a snapshot",
        "changes of members",
        "changes done",
        "changes refused",
        "changes that make no sense",
        "moves done",
        "moves given up",
        "replicas made",
        "replicas removed",
        "nodes joined",
        "nodes lost for good",
        "decisions made",
        "decisions refused",
        "steps of the reconciler",
        "leaders moved",
        "groups that fell asleep",
        "members without which a group fell asleep",
        "wakes by a request",
        "leaders found gone",
        "living nodes taken for gone",
        "wakes by an alarm",
    ];
    for what in expected {
        assert!(totals.get(what).is_some_and(|count| *count > 0), "no {what}: {totals:?}");
    }
    assert_eq!(undecided, 0, "histories too long for the check of linearizability");
}

#[test]
fn seeds_that_once_failed_show_no_violation() {
    for (seed, bug) in REGRESSIONS {
        // Kinds of faults that came later would give them other events.
        let options = of_seed(*seed);
        let later = Faults { membership: false, newcomers: false, node_loss: false, ..options.faults };
        let later = Faults { rebalancing: false, ..later };
        let faults = Faults { state_loss: false, boundaries: false, ..later };
        let report = run(SimOptions { faults, sleep_after: 0, ..options });
        assert_eq!(report.violation, None, "{bug}\n{report}");
    }
}

#[test]
fn seeds_of_changing_members_that_once_failed_show_no_violation() {
    for (seed, bug) in MEMBER_REGRESSIONS {
        let options = SimOptions { sleep_after: 0, ..of_seed(*seed) };
        assert!(options.faults.membership || options.faults.rebalancing, "nobody changes members at {seed}");
        let report = run(options);
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

#[test]
fn a_flapping_node_takes_no_leadership_from_others() {
    let mut flaps = 0;
    for seed in 0..20 {
        // The bound on elections is the check `flapping`.
        let options = SimOptions {
            nodes: 3,
            replicas: 3,
            faults: Faults { flapping: true, ..Faults::NONE },
            ..SimOptions::of_seed(seed)
        };
        let report = run(options);
        assert_eq!(report.violation, None, "{report}");
        flaps += report.counts.get("flaps").copied().unwrap_or(0);
    }
    assert!(flaps > 50, "only {flaps} flaps in all");
}

#[test]
fn members_come_and_go_and_all_is_in_place_in_the_end() {
    let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
    for seed in 0..10 {
        let faults = Faults { membership: true, newcomers: true, node_loss: seed % 2 == 1, ..Faults::NONE };
        let report = run(SimOptions { nodes: 5, replicas: 3, faults, ..SimOptions::of_seed(seed) });
        assert_eq!(report.violation, None, "{report}");
        for (what, count) in report.counts {
            *counts.entry(what).or_insert(0) += count;
        }
    }
    for what in ["moves done", "replicas made", "replicas removed", "changes refused"] {
        assert!(counts.get(what).is_some_and(|count| *count > 10), "{what}: {counts:?}");
    }
    for what in ["moves given up", "nodes joined", "nodes lost for good"] {
        assert!(counts.contains_key(what), "{what}: {counts:?}");
    }
}

#[test]
fn a_cluster_that_governs_itself_becomes_what_its_map_wants() {
    let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
    for seed in 0..6 {
        let faults = Faults { rebalancing: true, newcomers: true, node_loss: seed % 2 == 1, ..Faults::NONE };
        let report = run(SimOptions { nodes: 5, replicas: 3, faults, ..SimOptions::of_seed(seed) });
        assert_eq!(report.violation, None, "{report}");
        for (what, count) in report.counts {
            *counts.entry(what).or_insert(0) += count;
        }
    }
    for what in
        ["decisions made", "steps of the reconciler", "replicas made", "replicas removed", "changes done"]
    {
        assert!(counts.get(what).is_some_and(|count| *count > 10), "{what}: {counts:?}");
    }
    for what in ["nodes joined", "nodes lost for good", "leaders moved"] {
        assert!(counts.contains_key(what), "{what}: {counts:?}");
    }
}

#[test]
fn a_minority_of_rotten_replicas_stays_closed_and_the_others_go_on() {
    let mut refusals = 0;
    for seed in 0..10 {
        let faults = Faults { rot: true, crashes: true, ..Faults::NONE };
        let report = run(SimOptions { nodes: 3, replicas: 3, faults, ..SimOptions::of_seed(seed) });
        assert_eq!(report.violation, None, "{report}");
        refusals += report.counts.get("refusals to open a rotten replica").copied().unwrap_or(0);
    }
    assert!(refusals > 0, "no rotten replica was ever opened");
}

#[test]
fn a_minority_without_its_state_gets_it_back_and_the_others_go_on() {
    let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
    for seed in 0..20 {
        let faults = Faults { state_loss: true, crashes: true, ..Faults::NONE };
        let retention = if seed % 2 == 0 { 0 } else { u64::MAX };
        let options = SimOptions { nodes: 3, replicas: 3, faults, retention, ..SimOptions::of_seed(seed) };
        let report = run(options);
        assert_eq!(report.violation, None, "{report}");
        for (what, count) in report.counts {
            *counts.entry(what).or_insert(0) += count;
        }
    }
    for what in ["replicas without a state", "states fetched"] {
        assert!(counts.get(what).is_some_and(|count| *count > 10), "{what}: {counts:?}");
    }
}

const CRASHES: Faults = Faults { crashes: true, power: true, slow_disks: true, ..Faults::NONE };
const TEARS: Faults = Faults { torn: true, ..CRASHES };
const ROT: Faults = Faults { rot: true, ..CRASHES };
const READ_ERRORS: Faults = Faults { eio: true, ..CRASHES };
/// What a minority of damaged replicas would hide is left out.
const ANY: Faults =
    Faults { drift: false, rot: false, eio: false, state_loss: false, boundaries: false, ..FIXED };
/// The members of shards stay as they are.
const FIXED: Faults =
    Faults { membership: false, newcomers: false, node_loss: false, rebalancing: false, ..Faults::ALL };
const LOSSES: Faults = Faults { state_loss: true, transfers: true, ..CRASHES };
const ENDS: Faults = Faults { replicas: true, slow_disks: true, transfers: true, ..CRASHES };

/// What may happen while groups sleep.
const NIGHT: Faults = Faults {
    messages: true,
    partitions: true,
    half_open: true,
    crashes: true,
    pauses: true,
    replicas: true,
    node_loss: true,
    ..Faults::NONE
};

const MOVES: Faults = Faults { membership: true, newcomers: true, partitions: true, transfers: true, ..ENDS };

/// Under which faults a bug is looked for, how many seeds it may need, and by which checks it is seen: others
/// would be a coincidence.
fn hunt(bug: Planted) -> (Faults, u64, &'static [&'static str]) {
    match bug {
        Planted::AcknowledgeEarly => {
            (CRASHES, 20, &["state", "open", "leaders", "logs", "durable", "linear", "quorum"])
        }
        Planted::VoteNotPersisted => (ANY, 100, &["leaders", "logs", "state"]),
        Planted::StaleReads => (ANY, 60, &["linear"]),
        Planted::FollowerReads => (ANY, 20, &["linear"]),
        Planted::CompactEarly => (CRASHES, 60, &["open"]),
        Planted::NoRedoFile | Planted::RedoRemovedEarly => (CRASHES, 60, &["state", "open"]),
        Planted::ReleaseEarly => (CRASHES, 20, &["state", "panic"]),
        Planted::SessionsForgotten => (CRASHES, 60, &["state", "open", "once"]),
        Planted::RetryAppliesTwice => (ANY, 20, &["once"]),
        Planted::InstallUnsynced => (CRASHES, 600, &["state", "open"]),
        Planted::SnapshotWithoutSessions => (CRASHES, 100, &["state"]),
        Planted::SnapshotAhead => (CRASHES, 100, &["state", "open"]),
        Planted::OldIncarnationWrites => (ENDS, 100, &["disk", "state", "open", "logs", "leaders"]),
        Planted::TornAccepted => (TEARS, 100, &["disk", "open"]),
        Planted::RotUnnoticed => (ROT, 60, &["state"]),
        Planted::ErrorReadAsAbsent => (READ_ERRORS, 60, &["state", "linear", "durable", "open"]),
        Planted::LostStateServed => (LOSSES, 20, &["state"]),
        Planted::LogResetWithState => (LOSSES, 60, &["leaders", "logs", "state", "durable", "linear"]),
        Planted::SuffixDropped => (LOSSES, 100, &["leaders", "logs", "state", "durable", "liveness"]),
        Planted::LearnerCounted => (MOVES, 1200, &["quorum", "leaders", "logs", "state", "durable"]),
        Planted::TombstoneLate => (MOVES, 100, &["open", "members"]),
        Planted::StaleReportTaken => (Faults { rebalancing: true, ..CRASHES }, 20, &["map"]),
        Planted::ReplicaIdReused => (MOVES, 20, &["members"]),
        Planted::AgreementAssumed => (NIGHT, 60, &["sleep"]),
        Planted::AlarmsUnheard => (NIGHT, 400, &["liveness"]),
        Planted::ChangeUnrecorded => {
            (MOVES, 500, &["quorum", "leaders", "logs", "state", "durable", "members"])
        }
    }
}

/// The first seed at which a bug is seen, and the check that sees it.
fn caught(bug: Planted) -> Option<(u64, &'static str)> {
    let (faults, seeds, among) = hunt(bug);
    let sleeps = [Planted::AgreementAssumed, Planted::AlarmsUnheard].contains(&bug);
    let snapshots = [
        Planted::InstallUnsynced,
        Planted::SnapshotWithoutSessions,
        Planted::SnapshotAhead,
        Planted::LostStateServed,
        Planted::LogResetWithState,
        Planted::SuffixDropped,
        Planted::TombstoneLate,
    ]
    .contains(&bug);
    (0..seeds).find_map(|seed| {
        let report = run(SimOptions {
            nodes: if faults.membership || faults.rebalancing { 5 } else { 3 },
            shards: 3,
            replicas: 3,
            retention: if snapshots { 0 } else { u64::MAX },
            sleep_after: if sleeps { 4 } else { 0 },
            faults,
            planted: Plant::of(bug),
            ..SimOptions::of_seed(seed)
        });
        let check = report.violation?.check;
        among.contains(&check).then_some((seed, check))
    })
}

#[test]
fn planted_bugs_are_caught() {
    // Two at a time.
    let all = std::thread::scope(|scope| {
        let halves = [0, 1].map(|half| {
            let bugs = Planted::ALL.into_iter().skip(half).step_by(2);
            scope.spawn(move || bugs.map(|bug| (bug, caught(bug))).collect::<Vec<_>>())
        });
        halves.map(|half| half.join().expect("no check of ours panics")).concat()
    });
    println!("| bug | what it does | seeds | caught by |\n|---|---|---|---|");
    let mut missed = Vec::new();
    for bug in Planted::ALL {
        match all.iter().find(|(of, _)| *of == bug).and_then(|(_, caught)| *caught) {
            Some((seed, check)) => println!("| `{bug:?}` | {} | {} | `{check}` |", bug.text(), seed + 1),
            None => missed.push(bug),
        }
    }
    assert!(missed.is_empty(), "not caught: {missed:?}");
}

#[test]
fn the_page_on_tests_lists_every_check_fault_and_planted_bug() {
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/testing.md")).unwrap();
    for (name, what) in CHECKS {
        assert!(page.contains(&format!("| `{name}` | {what} |")), "check {name}");
    }
    for name in Faults::NAMES {
        assert!(page.contains(&format!("`{name}`")), "fault {name}");
    }
    for bug in Planted::ALL {
        assert!(page.contains(&format!("| `{bug:?}` | {} |", bug.text())), "planted {bug:?}");
    }
}
