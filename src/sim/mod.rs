//! Whole clusters of the same core under simulated time, network and disk.
//!
//! [`run`] takes a seed and lets a cluster of [`crate::group::driver::Group`]s live through faults for
//! a while, and then without them, in one thread and without a clock: the same seed gives the same
//! events. What is real: groups with raft-rs, state machines, memtables, commands and their encoding,
//! the log and engine contracts. What is simulated:
//!
//! - [`world`]: time, as a queue of events. `shell`, `life` and `pump`: what [`crate::node`] does around
//!   groups with actors. [`faults`]: what goes wrong; `strikes`: when, and whom.
//! - [`network`]: delay, loss, duplication, reordering, corruption, partitions of all shapes, links that are
//!   dead in one direction, nodes whose links flap.
//! - [`disk`]: log writes take time, and are lost in whole, in part or torn by a crash before they are
//!   done; writes to the engine survive a crash as they like until they are synced; flushes have steps
//!   between which a crash can come; a state store can be gone, or be an older copy. [`media`]: reads that
//!   fail, records that have rotted.
//! - `membership`: replicas that nodes make and remove, nodes that join and that are gone for good. `operator`:
//!   who changes the members of shards; or `governor`, the metadata shard with its reconciler and the maps of
//!   nodes, and `administrator`, who decides about nodes, numbers of replicas and load.
//! - `rest`: how groups that sleep are woken, and heartbeats of nodes.
//! - [`planted`]: bugs put in on purpose.
//! - [`workload`], `clients` and [`history`]: what clients ask for, how often they try, and what they were told.
//!   [`checks`]: what must hold.
//!
//! Not simulated: how the stores notice bytes that are torn or rotten, and a log that loses what it has
//! acknowledged (the suites of the storage test those on files), the codec and the transport beneath
//! messages, what the supervisor decides but for which replicas to make and to remove, how a cluster is formed,
//! how a node that was removed is told, more than one database, clients in other processes.
//!
//! A seed picks which kinds of faults it uses, so that no kind always hides another.

mod administrator;
pub mod checks;
mod clients;
mod dice;
pub mod disk;
pub mod faults;
mod governor;
pub mod history;
mod life;
pub mod media;
mod membership;
pub mod network;
mod operator;
pub mod planted;
mod pump;
pub mod report;
mod rest;
mod shell;
mod snapshots;
mod strikes;
pub mod workload;
pub mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};

use checks::Violation;
use dice::Dice;
pub use faults::Faults;
pub use planted::{Plant, Planted};
pub use report::Report;
use world::World;

/// Simulated time in microseconds since the start.
pub type Time = u64;

/// What to simulate.
#[derive(Clone, PartialEq, Debug)]
pub struct SimOptions {
    /// Decides everything that is left to chance.
    pub seed: u64,
    /// Nodes.
    pub nodes: usize,
    /// Shards.
    pub shards: usize,
    /// Replicas of each shard; at most `nodes`.
    pub replicas: usize,
    /// Operations of all clients together.
    pub operations: usize,
    /// Bytes of log that a group keeps for a follower that is silent.
    pub retention: u64,
    /// Ticks of idleness after which a group goes to sleep; 0: groups don't. If they do, clients rest more.
    pub sleep_after: u64,
    /// What goes wrong.
    pub faults: Faults,
    /// A bug to put in.
    pub planted: Plant,
    /// How many of the last events the report tells.
    pub trace: usize,
}

impl SimOptions {
    /// A cluster and faults as a seed decides.
    pub fn of_seed(seed: u64) -> SimOptions {
        // Another sequence than that of the run.
        let mut dice = Dice::new(!seed);
        let replicas = [3, 3, 3, 3, 3, 3, 5, 5, 2, 1][dice.below(10)];
        SimOptions {
            seed,
            nodes: replicas.max(3) + dice.below(3),
            shards: 1 + dice.below(3),
            replicas,
            operations: 300,
            retention: [0, 100, 1_000, 5_000, u64::MAX][dice.below(5)],
            faults: Faults::some(&mut dice),
            sleep_after: [0, 0, 2, 8][dice.below(4)],
            planted: Plant::NONE,
            trace: 0,
        }
    }

    /// Bytes of log that a node keeps behind snapshots: sometimes fewer than are written meanwhile.
    fn held_bytes(&self) -> u64 {
        self.retention.saturating_mul(4).saturating_add(4_000)
    }

    /// Bytes that a replica may know of its engine without asking; so few that it forgets all the time. None
    /// in half of the runs, and where a planted bug might hide behind what is known.
    fn known_bytes_max(&self) -> usize {
        if self.seed % 2 == 1 && self.planted == Plant::NONE { 2_000 } else { 0 }
    }
}

/// Simulates. A panic of the core is a violation like any other.
pub fn run(options: SimOptions) -> Report {
    let mut world = World::new(options);
    let outcome = catch_unwind(AssertUnwindSafe(|| world.live()));
    let violation = match outcome {
        Ok(Ok(())) => None,
        Ok(Err(violation)) => Some(violation),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
            Some(Violation::new("panic", text.unwrap_or("a panic without a text")))
        }
    };
    world.into_report(violation)
}
