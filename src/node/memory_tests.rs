//! The rule by itself, then in a node that flushes slowly, drawn at random.

use rand::rngs::SmallRng;
use rand::{Rng, RngExt, SeedableRng};

use super::*;
use crate::limits;

const MIB: usize = 1 << 20;
const LIMIT: usize = 32 * MIB;
const PASS: usize = limits::APPLY_PASS_BYTES as usize;

#[test]
fn where_little_is_free_on_disk_tables_stay_small() {
    let gauge = MemoryGauge::new(LIMIT);
    gauge.update((0, 0), (4 * MIB, 30 * MIB));
    assert!(!gauge.must_flush());
    let free = |mib: usize| (mib * MIB) as u64;
    assert!(!gauge.is_much_for(free(32)), "what is frozen is on its way");
    assert!(gauge.is_much_for(free(31)) && gauge.is_much_for(1));
    assert!(!gauge.is_much_for(0), "nobody has looked");
}

#[test]
fn a_gauge_follows_its_sums_both_ways() {
    let gauge = MemoryGauge::new(100);
    gauge.update((0, 0), (30, 0));
    gauge.update((0, 0), (25, 0));
    assert!(gauge.must_flush() && gauge.admits(30, 1));
    gauge.update((30, 0), (0, 30));
    assert!(!gauge.must_flush());
    gauge.update((25, 0), (75, 0));
    assert!(!gauge.admits(0, 0), "nothing is left");
    assert!(!gauge.is_much_for(8), "a flush that small isn't worth its syncs");
    gauge.update((0, 30), (0, 0));
    gauge.update((75, 0), (0, 0));
    assert_eq!(gauge.bytes(), (0, 0));
    assert_eq!((gauge.room(true), gauge.room(false)), (50, 12));
    gauge.update((0, 0), (40, 30));
    gauge.update_known(0, 25);
    assert_eq!((gauge.room(true), gauge.is_tight(), gauge.must_flush()), (5, true, false));
    assert_eq!(gauge.room(false), 0, "leaders have use for it");
    gauge.update((40, 30), (90, 0));
    assert_eq!((gauge.room(true), gauge.known()), (0, 25));
    gauge.update_known(25, 0);
    assert_eq!(gauge.room(true), 10);
    gauge.update((90, 0), (0, 0));
    gauge.update_sessions(0, 3);
    gauge.update_sessions(2, 1);
    assert_eq!(gauge.sessions(), 2);
    gauge.update_paused(false, true);
    assert_eq!(gauge.paused(), 1);
    gauge.update_paused(true, false);
    assert_eq!(gauge.paused(), 0);
}

/// What each of `count` that take what they get comes to hold, and what is left, in thousandths of the bound.
fn alone_together(count: usize) -> (usize, usize) {
    let (sharing, step) = (Sharing::new(LIMIT), LIMIT / 10_000);
    let mut held = 0;
    while sharing.admits(count * held, held, step) && count * held <= LIMIT {
        held += step;
    }
    (held * 1000 / LIMIT, (LIMIT - count * held) * 1000 / LIMIT)
}

#[test]
fn shares_are_what_the_page_says() {
    assert_eq!(alone_together(1), (703, 296));
    assert_eq!(alone_together(2), (389, 220));
    assert_eq!(alone_together(8), (110, 116));
    let sharing = Sharing::new(LIMIT);
    // A whole pass of one that holds nothing, and what it leaves.
    let last = (0..LIMIT).step_by(1 << 12).rfind(|total| sharing.admits(*total, 0, PASS));
    let left = LIMIT - last.expect("some") - PASS;
    assert!((2 * MIB..2 * MIB + (1 << 13)).contains(&left), "{left}");
    assert_eq!((sharing.share(LIMIT), sharing.share(usize::MAX)), (0, 0));
    // At the ends of what can be set, and beyond.
    for limit in [0, 1, 16 * MIB, 64 << 30, usize::MAX] {
        let sharing = Sharing::new(limit);
        assert!(sharing.admits(limit / 2, limit / 2, usize::MAX), "half is never refused");
        assert!(!sharing.admits(usize::MAX, 0, 0) || limit == usize::MAX);
        assert!(sharing.share(0) >= limit);
    }
}

#[test]
fn who_is_refused_would_hold_more_than_anybody_who_is_not() {
    let sharing = Sharing::new(LIMIT);
    let mut random = SmallRng::seed_from_u64(1);
    for _ in 0..100_000 {
        let total = random.random_range(0..LIMIT + MIB);
        let mut draw = || (random.random_range(0..total + 1), random.random_range(0..=PASS));
        let (one, other) = (draw(), draw());
        if one.0 <= other.0 && one.1 <= other.1 {
            let (one, other) = (sharing.admits(total, one.0, one.1), sharing.admits(total, other.0, other.1));
            assert!(one >= other, "{total}");
        }
    }
}

/// A replica as the rule sees it.
#[derive(Clone, Default)]
struct Replica {
    active: usize,
    frozen: usize,
    /// What it applies at a time, and for how many rounds it has nothing to apply then.
    adds: usize,
    every: usize,
    /// The round from which it has something.
    due: usize,
    /// What it has applied in all, and how often it was refused.
    applied: usize,
    refused: usize,
}

/// A node whose flushes take some rounds; in a round each replica begins a pass if it may.
struct Model {
    sharing: Sharing,
    replicas: Vec<Replica>,
    /// Passes that are begun before the first of them is counted.
    threads: usize,
    flush_rounds: usize,
    /// Rounds until the flush under way is over.
    flushing: usize,
    round: usize,
    most: usize,
}

impl Model {
    fn new(replicas: Vec<Replica>, threads: usize, flush_rounds: usize) -> Model {
        let sharing = Sharing::new(LIMIT);
        Model { sharing, replicas, threads, flush_rounds, flushing: 0, round: 0, most: 0 }
    }

    fn total(&self) -> usize {
        self.replicas.iter().map(|replica| replica.active + replica.frozen).sum()
    }

    fn round(&mut self, random: &mut impl Rng) {
        self.round += 1;
        self.flushing = self.flushing.saturating_sub(1);
        if self.flushing == 0 {
            self.replicas.iter_mut().for_each(|replica| replica.frozen = 0);
            let active: usize = self.replicas.iter().map(|replica| replica.active).sum();
            let all = self.sharing.must_flush(active);
            for replica in &mut self.replicas {
                if all || replica.active > self.sharing.replica_limit() {
                    replica.frozen = std::mem::take(&mut replica.active);
                    self.flushing = self.flush_rounds;
                }
            }
        }
        // Whoever is told first is another each time.
        let (count, first) = (self.replicas.len(), random.random_range(0..self.replicas.len()));
        let order: Vec<usize> = (0..count).map(|at| (at + first) % count).collect();
        for together in order.chunks(self.threads) {
            let total = self.total();
            for &at in together {
                let replica = &mut self.replicas[at];
                if self.round < replica.due {
                    continue;
                }
                if self.sharing.admits(total, replica.active + replica.frozen, replica.adds) {
                    replica.active += replica.adds;
                    replica.applied += replica.adds;
                    replica.due = self.round + replica.every;
                } else {
                    replica.refused += 1;
                }
            }
            self.most = self.most.max(self.total());
        }
    }
}

#[test]
fn all_together_stay_within_the_bound_and_a_pass_for_each_thread() {
    let mut random = SmallRng::seed_from_u64(2);
    for case in 0..300 {
        let threads = random.random_range(1..=4);
        // Now and then an entry of the greatest size among them.
        let (greatest, count) = if case % 3 == 0 { (limits::VALUE_BYTES_MAX, 20) } else { (PASS, 100) };
        let count = random.random_range(1..count);
        let replicas = (0..count).map(|_| Replica {
            adds: random.random_range(1..=greatest),
            every: random.random_range(1..=3),
            ..Replica::default()
        });
        let mut model = Model::new(replicas.collect(), threads, case % 7);
        for _ in 0..400 {
            model.round(&mut random);
        }
        let most = LIMIT + (threads - 1) * greatest;
        assert!(model.most <= most, "case {case}: {} of {most}", model.most);
        let stuck = model.replicas.iter().position(|replica| replica.applied == 0);
        assert_eq!(stuck, None, "case {case}: everybody goes on");
    }
}

#[test]
fn those_that_hold_little_go_on_beside_any_number_that_fill_memory() {
    let mut random = SmallRng::seed_from_u64(3);
    for (great, flush_rounds) in [0, 1, 2, 5, 30, 200, 2000].into_iter().zip([20, 60].into_iter().cycle()) {
        let small = Replica { adds: 1 << 10, every: 1, ..Replica::default() };
        let mut replicas = vec![small; 8];
        replicas.resize(8 + great, Replica { adds: PASS, every: 1, ..Replica::default() });
        let mut model = Model::new(replicas, 1, flush_rounds);
        for _ in 0..1000 {
            model.round(&mut random);
        }
        let (small, great) = model.replicas.split_at(8);
        for replica in small {
            assert_eq!((replica.refused, replica.applied), (0, 1000 * (1 << 10)), "beside {}", great.len());
        }
        assert!(great.is_empty() || great.iter().any(|replica| replica.refused > 0), "the case is one");
    }
}

#[test]
fn many_that_fill_memory_come_to_about_as_much_each() {
    let mut random = SmallRng::seed_from_u64(4);
    for count in [2, 8, 30, 100] {
        let mut replicas = vec![Replica { adds: PASS, every: 1, ..Replica::default() }; count];
        // One was there before the others, and holds all that one can.
        replicas[0].active = LIMIT * 7 / 10;
        let mut model = Model::new(replicas, 1, 5);
        for _ in 0..5000 {
            model.round(&mut random);
        }
        let applied = model.replicas.iter().map(|replica| replica.applied);
        let (least, most) = (applied.clone().min().expect("some"), applied.max().expect("some"));
        assert!(most <= least * 2, "of {count} one applied {least}, another {most} bytes");
    }
}
