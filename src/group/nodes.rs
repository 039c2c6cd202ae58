//! What a node hears of the others, for the groups that sleep on it.
//!
//! While a group sleeps ([`super::sleep`]) its leader sends no heartbeats: those of the leader's node stand for them.
//! So they have to tell what heartbeats of the group would: that the process in which the leader went to sleep is
//! alive, and that no replica in it has ended since: the leader, or a follower that its leader counts on. And of a node that isn't
//! there they have to tell that it is back, in whatever process: some may sleep without it. [`Nodes`] counts time in the ticks of
//! whoever owns it, like a group: of a process that stood still nobody is silent for longer than it was itself awake.
//!
//! Invariant: whenever [`Nodes::process`] of a node becomes another, [`Nodes::heard`], [`Nodes::gone`] or [`Nodes::tick`] has an
//! alarm. So whoever falls asleep by what it says, and is told of alarms from then on, misses nothing.

use std::collections::BTreeMap;

use crate::ids::NodeId;
use crate::limits;

/// So many ticks after its last heartbeat a node is silent: a follower of an awake group could begin an election then.
pub const SILENT_TICKS: u64 = limits::ELECTION_TICKS_MIN as u64;

/// Something about a node that groups asleep have to know.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Alarm {
    /// It hasn't been heard for [`SILENT_TICKS`].
    Silent,
    /// Its process is another one: whatever led there has ended.
    Restarted,
    /// Its process has ended, and no other is there: its connections have, and its port refuses new ones.
    Gone,
    /// A replica has ended on it, while its process goes on: which one isn't said.
    ReplicaEnded,
    /// It is heard, and wasn't: for the first time, or after it was silent or taken for gone, in the same process.
    Returned,
}

#[derive(Clone, Copy, Debug)]
struct Heard {
    process: u64,
    ended: u64,
    /// The tick of its last heartbeat.
    at: u64,
    /// That process has ended.
    gone: bool,
    /// The one that was told to have ended before it, if neither was heard since.
    gone_before: Option<u64>,
}

/// See the module page. One for each thread that owns groups.
#[derive(Default)]
pub struct Nodes {
    now: u64,
    heard: BTreeMap<NodeId, Heard>,
}

impl Nodes {
    /// Nothing has been heard yet.
    pub fn new() -> Nodes {
        Nodes::default()
    }

    /// Ticks since it began.
    pub fn now(&self) -> u64 {
        self.now
    }

    /// Time: one tick has passed. Returns who has fallen silent with it.
    pub fn tick(&mut self) -> Vec<NodeId> {
        self.now += 1;
        let now = self.now;
        let silent = self.heard.iter().filter(|(_, heard)| now - heard.at == SILENT_TICKS);
        silent.map(|(node, _)| *node).collect()
    }

    /// A heartbeat has come from a node: of which process it is, and how many replicas have ended in that.
    pub fn heard(&mut self, node: NodeId, process: u64, ended: u64) -> Option<Alarm> {
        let was_there = self.process(node).is_some();
        let now = Heard { process, ended, at: self.now, gone: false, gone_before: None };
        match self.heard.insert(node, now) {
            Some(before) if before.process != process => Some(Alarm::Restarted),
            // Whoever relied on one of its replicas has been awake since it was silent.
            _ if !was_there => Some(Alarm::Returned),
            // Of the same process: heartbeats of one connection come in their order, a new connection may bring an
            // older one, and to wake for nothing does no harm.
            Some(before) => (before.ended != ended).then_some(Alarm::ReplicaEnded),
            None => None,
        }
    }

    /// A process on a node is gone. Told once for each, until it is heard after all; not told of one before that which
    /// was heard last. As long as the node is down it is found again and again, and each of its two links remembers
    /// the process that it was connected to last, which may be another one.
    pub fn gone(&mut self, node: NodeId, process: u64) -> Option<Alarm> {
        let before = self.heard.get(&node).copied();
        if before.is_some_and(|heard| {
            (heard.process == process) == heard.gone || heard.gone_before == Some(process)
        }) {
            return None;
        }
        let ended = before.filter(|heard| heard.process == process).map_or(0, |heard| heard.ended);
        let gone_before = before.filter(|heard| heard.gone).map(|heard| heard.process);
        self.heard.insert(node, Heard { process, ended, at: self.now, gone: true, gone_before });
        Some(Alarm::Gone)
    }

    /// For how many ticks a node has been silent; [`SILENT_TICKS`] if it was never heard.
    pub fn silence(&self, node: NodeId) -> u64 {
        self.heard.get(&node).filter(|heard| !heard.gone).map_or(SILENT_TICKS, |heard| self.now - heard.at)
    }

    /// The process that runs on a node, if that isn't silent.
    pub fn process(&self, node: NodeId) -> Option<u64> {
        let heard = self.heard.get(&node).filter(|heard| !heard.gone && self.now - heard.at < SILENT_TICKS);
        heard.map(|heard| heard.process)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: NodeId = NodeId(1);
    const B: NodeId = NodeId(2);

    #[test]
    fn a_node_falls_silent_once_and_is_heard_again() {
        let mut nodes = Nodes::new();
        assert_eq!((nodes.silence(A), nodes.process(A)), (SILENT_TICKS, None), "never heard");
        assert_eq!(nodes.heard(A, 7, 0), Some(Alarm::Returned), "some may sleep without it");
        assert_eq!(nodes.heard(B, 9, 0), Some(Alarm::Returned));
        for _ in 1..SILENT_TICKS {
            assert_eq!(nodes.heard(B, 9, 0), None);
            assert_eq!(nodes.tick(), []);
        }
        assert_eq!((nodes.silence(A), nodes.process(A)), (SILENT_TICKS - 1, Some(7)));
        assert_eq!(nodes.tick(), [A]);
        assert_eq!((nodes.silence(A), nodes.process(A)), (SILENT_TICKS, None));
        assert_eq!(nodes.tick(), [], "told once");
        assert_eq!(nodes.heard(A, 7, 0), Some(Alarm::Returned));
        assert_eq!(nodes.heard(A, 7, 0), None, "told once");
        assert_eq!((nodes.silence(A), nodes.process(A)), (0, Some(7)));
    }

    #[test]
    fn whenever_another_process_is_there_or_none_somebody_is_told() {
        let mut drawn = 7u64;
        let mut below = |high: u64| {
            drawn = drawn.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (drawn >> 33) % high
        };
        let mut nodes = Nodes::new();
        for step in 0..20_000 {
            let (before, process) = (nodes.process(A), below(3));
            let told = match below(12) {
                0 => nodes.heard(A, process, below(2)).is_some(),
                1 => nodes.gone(A, process).is_some(),
                _ => nodes.tick() == [A],
            };
            assert!(
                told || nodes.process(A) == before,
                "step {step}: {before:?}, now {:?}",
                nodes.process(A)
            );
        }
    }

    #[test]
    fn a_process_is_gone_once_and_a_late_word_of_an_earlier_one_says_nothing() {
        let mut nodes = Nodes::new();
        nodes.heard(A, 7, 0);
        assert_eq!(nodes.gone(A, 6), None, "another one is heard by now");
        assert_eq!(nodes.gone(A, 7), Some(Alarm::Gone));
        assert_eq!((nodes.silence(A), nodes.process(A)), (SILENT_TICKS, None));
        assert_eq!(nodes.gone(A, 7), None, "told once");
        assert_eq!(nodes.gone(A, 8), Some(Alarm::Gone), "the next one wasn't heard before it ended");
        assert_eq!(nodes.heard(A, 9, 0), Some(Alarm::Restarted));
        assert_eq!(nodes.process(A), Some(9));
        assert_eq!(nodes.gone(A, 9), Some(Alarm::Gone));
        assert_eq!(nodes.heard(A, 9, 0), Some(Alarm::Returned), "it wasn't after all");
        assert_eq!(nodes.process(A), Some(9));
        assert_eq!(nodes.gone(A, 9), Some(Alarm::Gone));
        assert_eq!(nodes.gone(B, 1), Some(Alarm::Gone), "never heard");
    }

    #[test]
    fn two_links_that_remember_two_processes_tell_of_each_once() {
        let mut nodes = Nodes::new();
        nodes.heard(A, 7, 0);
        let told = |nodes: &mut Nodes| {
            let found = (0..10).flat_map(|_| [6, 7]);
            found.filter_map(|process| nodes.gone(A, process).map(|_| process)).collect::<Vec<_>>()
        };
        assert_eq!(told(&mut nodes), [7, 6]);
        assert_eq!(nodes.process(A), None);
        nodes.heard(A, 8, 0);
        assert_eq!(told(&mut nodes), [] as [u64; 0], "another one is heard by now");
    }

    #[test]
    fn another_process_and_the_end_of_a_replica_are_alarms() {
        let mut nodes = Nodes::new();
        nodes.heard(A, 7, 0);
        assert_eq!(nodes.heard(A, 7, 1), Some(Alarm::ReplicaEnded));
        assert_eq!(nodes.heard(A, 7, 1), None);
        assert_eq!(nodes.heard(A, 8, 0), Some(Alarm::Restarted));
        assert_eq!(nodes.process(A), Some(8));
    }
}
