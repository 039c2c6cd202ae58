//! Whole clusters under simulated faults, seed by seed.
//!
//! `PONTOON_SEEDS=A..B cargo test --test sim seeds` runs other seeds than the default ones;
//! `PONTOON_SEEDS=A..B PONTOON_TRACE=400` also shows the last events before a violation.

use std::ops::Range;

use pontoon::sim::{Faults, Planted, Report, SimOptions, run};

fn seeds(default: Range<u64>) -> Range<u64> {
    let Ok(text) = std::env::var("PONTOON_SEEDS") else { return default };
    let parsed = text.split_once("..").and_then(|(from, to)| Some(from.parse().ok()?..to.parse().ok()?));
    parsed.unwrap_or_else(|| panic!("PONTOON_SEEDS is `A..B`, not `{text}`"))
}

fn trace() -> usize {
    std::env::var("PONTOON_TRACE").ok().and_then(|text| text.parse().ok()).unwrap_or(0)
}

#[test]
fn seeds_show_no_violation() {
    let mut failed = Vec::new();
    let mut totals = std::collections::BTreeMap::new();
    let mut undecided = 0;
    for seed in seeds(0..40) {
        let report = run(SimOptions { trace: trace(), ..SimOptions::of_seed(seed) });
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
}
