//! The only source of chance in a simulation: a generator seeded once.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// See the module page.
pub struct Dice(StdRng);

impl Dice {
    /// A generator that gives the same sequence for the same seed, in one version of the program.
    pub fn new(seed: u64) -> Dice {
        Dice(StdRng::seed_from_u64(seed))
    }

    /// A number in `[low, high)`; `low` if that is empty.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        if low < high { self.0.random_range(low..high) } else { low }
    }

    /// A number in `[0, high)`, for choosing among `high` things.
    pub fn below(&mut self, high: usize) -> usize {
        usize::try_from(self.between(0, high as u64)).unwrap_or(0)
    }

    /// True in `permille` of 1000 cases.
    pub fn chance(&mut self, permille: u64) -> bool {
        self.between(0, 1000) < permille
    }

    /// One of `items`.
    pub fn pick<'a, T>(&mut self, items: &'a [T]) -> Option<&'a T> {
        items.get(self.below(items.len()))
    }

    /// Any number.
    pub fn any(&mut self) -> u64 {
        self.0.random()
    }
}
