//! Log matching: an index and a term name one entry everywhere, and one entry before it.

use std::collections::BTreeMap;

use raft::eraftpb::Entry;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::Violation;
use crate::ids::{Index, ReplicaId, ShardId, Term};

/// A number that stands for the content of an entry.
pub fn fingerprint(entry: &Entry) -> u64 {
    let context = xxh3_64_with_seed(&entry.context, entry.get_entry_type() as u64);
    xxh3_64_with_seed(&entry.data, context)
}

/// Every entry that any replica ever had.
#[derive(Default)]
pub struct Logs {
    /// By shard, index and term: its content, and the term of the entry before it.
    seen: BTreeMap<(ShardId, Index, Term), (u64, Term)>,
}

impl Logs {
    /// `replica` appends `entries` after an entry of term `before`.
    pub fn observe(
        &mut self,
        shard: ShardId,
        replica: ReplicaId,
        mut before: Term,
        entries: &[Entry],
    ) -> Result<(), Violation> {
        for entry in entries {
            let found = (fingerprint(entry), before);
            let known = *self.seen.entry((shard, entry.index, entry.term)).or_insert(found);
            if known != found {
                let (index, term) = (entry.index, entry.term);
                let what = if known.0 == found.0 { "follows different terms" } else { "has two contents" };
                let detail = format!(
                    "entry {index} of term {term} of shard {shard} {what}, as replica {replica} has it"
                );
                return Err(Violation::new("logs", detail));
            }
            before = entry.term;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn different_entries_at_one_position_are_seen() {
        let entry =
            |index, term, data: &'static str| Entry { index, term, data: data.into(), ..Entry::default() };
        let mut logs = Logs::default();
        let (shard, a, b) = (ShardId(1), ReplicaId(1), ReplicaId(2));
        logs.observe(shard, a, 5, &[entry(6, 6, "x"), entry(7, 6, "y")]).unwrap();
        logs.observe(shard, b, 6, &[entry(7, 6, "y")]).unwrap();
        logs.observe(shard, b, 6, &[entry(7, 7, "z")]).unwrap();
        assert!(logs.observe(shard, b, 6, &[entry(7, 6, "z")]).is_err());
        assert!(logs.observe(shard, b, 5, &[entry(7, 6, "y")]).is_err());
    }
}
