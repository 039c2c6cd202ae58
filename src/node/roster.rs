//! What a hub and the replicas of its thread know in common, without messages: who is awake, who has anything to
//! flush, and what is heard of other nodes.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};

use crate::group::nodes::{Alarm, Nodes};
use crate::ids::{Incarnation, NodeId, ReplicaId};
use crate::telemetry::metrics as names;

/// See the module page. One per thread that owns replicas. No borrow of it outlives a call.
#[derive(Default)]
pub struct Roster {
    nodes: RefCell<Nodes>,
    awake: RefCell<BTreeMap<ReplicaId, Incarnation>>,
    asleep: RefCell<BTreeMap<ReplicaId, Incarnation>>,
    unflushed: RefCell<BTreeSet<ReplicaId>>,
    shown: Cell<usize>,
}

impl Roster {
    /// This start of a replica is awake.
    pub fn wakes(&self, replica: ReplicaId, incarnation: Incarnation) {
        self.asleep.borrow_mut().remove(&replica);
        self.awake.borrow_mut().insert(replica, incarnation);
    }

    /// This start of a replica has fallen asleep; the tick at which it did.
    pub fn sleeps(&self, replica: ReplicaId, incarnation: Incarnation) -> u64 {
        self.awake.borrow_mut().remove(&replica);
        self.asleep.borrow_mut().insert(replica, incarnation);
        self.nodes.borrow().now()
    }

    /// This start of a replica has ended. The next may have begun: that one stays.
    pub fn leaves(&self, replica: ReplicaId, incarnation: Incarnation) {
        let mut was_here = false;
        for of in [&self.awake, &self.asleep] {
            let mut of = of.borrow_mut();
            if of.get(&replica) == Some(&incarnation) {
                of.remove(&replica);
                was_here = true;
            }
        }
        if was_here {
            self.unflushed.borrow_mut().remove(&replica);
        }
    }

    /// Whether a replica has writes that nobody has begun to flush.
    pub fn set_unflushed(&self, replica: ReplicaId, unflushed: bool) {
        match unflushed {
            true => self.unflushed.borrow_mut().insert(replica),
            false => self.unflushed.borrow_mut().remove(&replica),
        };
    }

    /// Those that are awake.
    pub fn awake(&self) -> Vec<ReplicaId> {
        self.awake.borrow().keys().copied().collect()
    }

    /// Those that are asleep.
    pub fn asleep(&self) -> Vec<ReplicaId> {
        self.asleep.borrow().keys().copied().collect()
    }

    /// Those that have writes to flush.
    pub fn unflushed(&self) -> Vec<ReplicaId> {
        self.unflushed.borrow().iter().copied().collect()
    }

    /// A tick has passed; who has fallen silent with it.
    pub fn tick(&self) -> Vec<NodeId> {
        self.nodes.borrow_mut().tick()
    }

    /// A heartbeat has come from a node.
    pub fn heard(&self, node: NodeId, process: u64, ended: u64) -> Option<Alarm> {
        self.nodes.borrow_mut().heard(node, process, ended)
    }

    /// A process on a node is gone.
    pub fn gone(&self, node: NodeId, process: u64) -> Option<Alarm> {
        self.nodes.borrow_mut().gone(node, process)
    }

    /// Asks about other nodes.
    pub fn ask<T>(&self, question: impl FnOnce(&Nodes) -> T) -> T {
        question(&self.nodes.borrow())
    }

    /// Shows in the metrics how many are asleep, as this thread's part of the sum.
    pub fn show(&self) {
        let asleep = self.asleep.borrow().len();
        let shown = self.shown.replace(asleep);
        if asleep != shown {
            metrics::gauge!(names::REPLICAS_ASLEEP).increment(asleep as f64 - shown as f64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: ReplicaId = ReplicaId(1);

    #[test]
    fn a_replica_is_awake_or_asleep_and_its_next_start_outlives_the_end_of_the_last() {
        let roster = Roster::default();
        roster.wakes(ONE, 1);
        roster.set_unflushed(ONE, true);
        assert_eq!((roster.awake(), roster.asleep(), roster.unflushed()), (vec![ONE], vec![], vec![ONE]));
        roster.tick();
        assert_eq!(roster.sleeps(ONE, 1), 1);
        assert_eq!((roster.awake(), roster.asleep()), (vec![], vec![ONE]));
        roster.wakes(ONE, 2);
        roster.leaves(ONE, 1);
        assert_eq!((roster.awake(), roster.asleep()), (vec![ONE], vec![]));
        roster.leaves(ONE, 2);
        assert_eq!((roster.awake(), roster.unflushed()), (vec![], vec![]));
    }
}
