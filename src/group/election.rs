//! Election timeouts that never collide.
//!
//! raft-rs draws timeouts at random per replica; two replicas of a group can draw the same one and
//! split the vote, again and again. Here all replicas of a group derive one permutation from (shard,
//! term) and take distinct slots of it, each one tick wide, so exactly one campaigns first, and
//! another first in the next term.

use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::ids::{ReplicaId, ShardId, Term};
use crate::limits::{ELECTION_TICKS_MAX, ELECTION_TICKS_MIN};

/// How far a replica seeks to lead.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Ambition {
    /// Like any other.
    #[default]
    Usual,
    /// Only if nobody else does: its timeouts are longer than any of the others'.
    Last,
    /// Not at all: it begins no election, nor takes leadership that is handed to it.
    None,
}

/// What is added to the timeout of a replica of [`Ambition::Last`]: its window comes after the others'.
pub const LAST_TICKS: usize = ELECTION_TICKS_MAX - ELECTION_TICKS_MIN;

/// What is added to the timeout of a replica whose state is lost: its window comes when all the others have
/// tried, those of [`Ambition::Last`] included, and had the time to win.
pub const LOST_TICKS: usize = 4 * LAST_TICKS;

/// The election timeout in ticks of the replica that is `rank`-th among its group's members, in `term`.
pub fn timeout_ticks(shard: ShardId, term: Term, rank: usize) -> usize {
    let slots = ELECTION_TICKS_MAX - ELECTION_TICKS_MIN;
    let mut order: Vec<usize> = (0..slots).collect();
    order.sort_by_key(|&slot| {
        (xxh3_64_with_seed(&(slot as u64).to_le_bytes(), shard.0 ^ term.rotate_left(32)), slot)
    });
    ELECTION_TICKS_MIN + order[rank % slots]
}

/// The rank of `replica` among `members`: its place in ascending order of ids.
pub fn rank(replica: ReplicaId, members: impl Iterator<Item = ReplicaId>) -> usize {
    members.filter(|&member| member < replica).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_of_a_group_never_share_a_timeout() {
        for shard in 0..50 {
            for term in 5..50 {
                let mut timeouts: Vec<_> =
                    (0..7).map(|rank| timeout_ticks(ShardId(shard), term, rank)).collect();
                assert!(timeouts.iter().all(|t| (ELECTION_TICKS_MIN..ELECTION_TICKS_MAX).contains(t)));
                timeouts.sort_unstable();
                timeouts.dedup();
                assert_eq!(timeouts.len(), 7, "shard {shard} term {term}");
            }
        }
    }

    #[test]
    fn the_first_to_campaign_changes_with_the_term() {
        let first = |term| (0..3).min_by_key(|&rank| timeout_ticks(ShardId(1), term, rank));
        let firsts: std::collections::BTreeSet<_> = (5..40).map(first).collect();
        assert_eq!(firsts.len(), 3);
    }
}
