//! Election safety: at most one leader per shard and term.

use std::collections::BTreeMap;

use super::Violation;
use crate::ids::{ReplicaId, ShardId, Term};

/// Who led which term.
#[derive(Default)]
pub struct Leaders {
    seen: BTreeMap<(ShardId, Term), ReplicaId>,
}

impl Leaders {
    /// `replica` leads.
    pub fn observe(&mut self, shard: ShardId, term: Term, replica: ReplicaId) -> Result<(), Violation> {
        let first = *self.seen.entry((shard, term)).or_insert(replica);
        if first == replica {
            return Ok(());
        }
        let detail = format!("replicas {first} and {replica} of shard {shard} both lead term {term}");
        Err(Violation::new("leaders", detail))
    }

    /// How many terms had a leader.
    pub fn elections(&self) -> u64 {
        self.seen.len() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_leaders_of_a_term_are_seen() {
        let mut leaders = Leaders::default();
        leaders.observe(ShardId(1), 6, ReplicaId(1)).unwrap();
        leaders.observe(ShardId(1), 6, ReplicaId(1)).unwrap();
        leaders.observe(ShardId(2), 6, ReplicaId(2)).unwrap();
        leaders.observe(ShardId(1), 7, ReplicaId(2)).unwrap();
        assert!(leaders.observe(ShardId(1), 6, ReplicaId(2)).is_err());
    }
}
