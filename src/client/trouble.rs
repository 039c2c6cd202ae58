//! What to tell a person of a shard that doesn't serve: since when, who was asked, and what each said
//! last. Sans-I/O.
//!
//! Kept from the first failure of a node until one of them answers as the leader. An operation that is
//! given up shows it instead of the failure that it met last, which is that of one node among several.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use crate::ids::{NodeId, ShardId};
use crate::limits::REPLICAS_MAX;

/// Nodes kept for a shard: its members, and as many that were before.
const NODES_MAX: usize = 2 * REPLICAS_MAX as usize;
/// Trouble that nobody added to for so long is an old story: what comes then is told anew.
const OLD: Duration = Duration::from_secs(10);

struct Story {
    since: Instant,
    last: Instant,
    /// In the order in which the nodes were asked first.
    said: Vec<(NodeId, String)>,
}

/// The troubles of all shards.
#[derive(Default)]
pub struct Troubles(HashMap<ShardId, Story>);

impl Troubles {
    /// `node` didn't serve `shard`, and why.
    pub fn add(&mut self, shard: ShardId, node: NodeId, why: &str, now: Instant) {
        let begin = || Story { since: now, last: now, said: Vec::new() };
        let story = self.0.entry(shard).or_insert_with(begin);
        if now.saturating_duration_since(story.last) > OLD {
            *story = begin();
        }
        story.last = now;
        let known = story.said.len();
        match story.said.iter_mut().find(|(of, _)| *of == node) {
            Some((_, said)) => why.clone_into(said),
            None if known < NODES_MAX => story.said.push((node, why.to_owned())),
            None => (),
        }
    }

    /// A node served `shard`.
    pub fn over(&mut self, shard: ShardId) {
        if !self.0.is_empty() {
            self.0.remove(&shard);
        }
    }

    /// Forgets shards that are gone.
    pub fn retain(&mut self, keep: impl Fn(ShardId) -> bool) {
        self.0.retain(|shard, _| keep(*shard));
    }

    /// The story of `shard`, if more than one node has a part in it. `name` gives a node's address.
    pub fn tell(&self, shard: ShardId, now: Instant, name: impl Fn(NodeId) -> String) -> Option<String> {
        let story = self.0.get(&shard).filter(|story| story.said.len() > 1)?;
        let age = now.saturating_duration_since(story.since);
        let mut text = format!("shard {shard} had no leader that answered for {:.1} s", age.as_secs_f64());
        for (at, (node, said)) in story.said.iter().enumerate() {
            let address = name(*node);
            // Some failures begin with the address, for where they are told alone.
            let said = said.strip_prefix(&format!("node {node} at ")).unwrap_or(said);
            let said = said.strip_prefix(&address).map_or(said, |rest| rest.trim_start_matches([':', ' ']));
            let mark = if at == 0 { ':' } else { ';' };
            write!(text, "{mark} node {node} at {address}: {said}").expect("writing to a string");
        }
        Some(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_node_is_told_with_what_it_said_last() {
        let (begun, shard) = (Instant::now(), ShardId(4));
        let at = |ms| begun + Duration::from_millis(ms);
        let name = |node: NodeId| format!("n{node}:1");
        let mut troubles = Troubles::default();
        assert_eq!(troubles.tell(shard, at(0), name), None);
        troubles.add(shard, NodeId(3), "it knows no leader", at(0));
        // One alone says it better itself.
        assert_eq!(troubles.tell(shard, at(0), name), None);
        troubles.add(shard, NodeId(1), "node 1 at n1:1: Disconnected", at(50));
        troubles.add(shard, NodeId(1), "n1:1: Connection refused", at(100));
        troubles.add(shard, NodeId(3), "it follows node 2", at(200));
        troubles.add(shard, NodeId(2), "node 2 at n2:1 did not answer within 1000 ms", at(1_200));
        let text = "shard 4 had no leader that answered for 1.5 s: node 3 at n3:1: it follows node 2; \
                    node 1 at n1:1: Connection refused; node 2 at n2:1: did not answer within 1000 ms";
        assert_eq!(troubles.tell(shard, at(1_500), name).as_deref(), Some(text));
        assert_eq!(troubles.tell(ShardId(5), at(1_500), name), None);
        troubles.over(shard);
        assert_eq!(troubles.tell(shard, at(1_500), name), None);
    }

    #[test]
    fn what_is_long_past_is_not_mixed_in() {
        let (begun, shard) = (Instant::now(), ShardId(4));
        let mut troubles = Troubles::default();
        for node in 1..=3 {
            troubles.add(shard, NodeId(node), "gone", begun);
        }
        let later = begun + OLD + Duration::from_secs(1);
        troubles.add(shard, NodeId(1), "gone", later);
        assert_eq!(troubles.tell(shard, later, |node| node.to_string()), None);
        // Bounded, whatever nodes there were.
        for node in 0..1_000 {
            troubles.add(shard, NodeId(node), "gone", later);
        }
        assert_eq!(troubles.0[&shard].said.len(), NODES_MAX);
        troubles.retain(|kept| kept != shard);
        assert!(troubles.0.is_empty());
    }
}
