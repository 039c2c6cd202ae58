//! Shard → nodes by weighted rendezvous hashing: each node draws a number for the shard, the lowest
//! wins. A node that joins or leaves changes the winners only of the shards it wins or held.
//!
//! The draw of node n for shard key s is that of an exponential variable with rate weight(n):
//!
//! ```text
//! h    = xxh3-64, seed 0, of s and n, each as 8 bytes, big-endian
//! u    = (h + 1) / 2^64                              in (0, 1]
//! draw = -log2(u) / weight(n)                        lower is better
//! ```
//!
//! so that n comes first with probability weight(n) / sum of weights. The logarithm is computed in
//! integers, with 32 binary digits after the point: the last bit of a floating-point `ln` differs
//! between platforms and libraries, and a plan must not. Equal draws (about one in 2^30) are ordered by
//! node id.

use xxhash_rust::xxh3::xxh3_64;

use crate::ids::NodeId;

/// Binary digits after the point of [`minus_log2`].
const LOG_DIGITS: u32 = 32;

/// Binary digits by which a draw is finer than the logarithm, so that dividing by a weight loses nothing
/// that matters. The greatest logarithm is 64: 7 bits before the point, 32 after it, 24 more: 63.
const WEIGHT_DIGITS: u32 = 24;

/// The hash under which the shard of database `name` whose range begins at `start` is placed: xxh3-64,
/// seed 0, of `start` as 8 bytes, big-endian, then the name. Known before the shard has an id.
pub fn shard_key(name: &str, start: u64) -> u64 {
    xxh3_64(&[&start.to_be_bytes(), name.as_bytes()].concat())
}

/// The draw of `node` for a shard: lower is better. `None` for weight 0: the node takes no replicas.
pub fn draw(shard_key: u64, node: NodeId, weight: u32) -> Option<u64> {
    draw_of(hash(shard_key, node), weight)
}

/// What the draw is made of. Of nodes of one weight, that of the greatest hash has the lowest draw.
pub(super) fn hash(shard_key: u64, node: NodeId) -> u64 {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&shard_key.to_be_bytes());
    bytes[8..].copy_from_slice(&node.0.to_be_bytes());
    xxh3_64(&bytes)
}

/// The draw that a [`hash`] comes to.
pub(super) fn draw_of(hash: u64, weight: u32) -> Option<u64> {
    (minus_log2(hash) << WEIGHT_DIGITS).checked_div(u64::from(weight))
}

/// The nodes that may hold the shard, best first.
pub fn rank(shard_key: u64, nodes: impl IntoIterator<Item = (NodeId, u32)>) -> Vec<NodeId> {
    let mut draws: Vec<(u64, NodeId)> =
        nodes.into_iter().filter_map(|(node, weight)| Some((draw(shard_key, node, weight)?, node))).collect();
    draws.sort_unstable();
    draws.into_iter().map(|(_, node)| node).collect()
}

/// -log2((h + 1) / 2^64) in units of 2^-32, rounded up to the next unit: from 0 to 64 · 2^32.
fn minus_log2(h: u64) -> u64 {
    let Some(x) = h.checked_add(1) else {
        return 0; // u = 1
    };
    // x = m · 2^floor with m in [1, 2); m is kept with 63 digits after the point.
    let floor = x.ilog2();
    let mut m = x << (63 - floor);
    // Squaring m doubles its logarithm: the digit before the point is the next digit of log2(m).
    let mut digits = 0_u64;
    for _ in 0..LOG_DIGITS {
        let square = u128::from(m) * u128::from(m);
        digits <<= 1;
        if square >> 127 == 1 {
            digits |= 1;
            m = (square >> 64) as u64;
        } else {
            m = (square >> 63) as u64;
        }
    }
    (64 << LOG_DIGITS) - ((u64::from(floor) << LOG_DIGITS) | digits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn alike(nodes: u64) -> impl Iterator<Item = (NodeId, u32)> {
        (1..=nodes).map(|id| (NodeId(id), 100))
    }

    #[test]
    fn golden_draws() {
        let vectors = [
            ("orders", 0, 1, 100, 319_744_029_879_173),
            ("orders", 0, 2, 100, 874_640_234_271_211),
            ("orders", 1 << 63, 1, 100, 1_110_688_365_302_251),
            ("orders", 1 << 63, 1, 50, 2_221_376_730_604_503),
            ("", 0, u64::MAX, 1, 118_527_379_478_937_600),
        ];
        let found = vectors.map(|(name, start, node, weight, _)| {
            let draw = draw(shard_key(name, start), NodeId(node), weight).unwrap();
            (name, start, node, weight, draw)
        });
        assert_eq!(found, vectors);
        let ranked = rank(shard_key("orders", 0), alike(7)).into_iter();
        assert_eq!(ranked.map(|n| n.0).collect::<Vec<_>>(), [6, 7, 1, 2, 3, 5, 4]);
    }

    #[test]
    fn the_logarithm_is_right_and_monotone() {
        assert_eq!(minus_log2(u64::MAX), 0);
        assert_eq!(minus_log2(u64::MAX >> 1), 1 << 32);
        assert_eq!(minus_log2(0), 64 << 32);
        let mut last = u64::MAX;
        for step in 0..10_000_u64 {
            let h = step * (u64::MAX / 10_000);
            let log = minus_log2(h);
            assert!(log <= last);
            last = log;
            let exact = 64.0 - (h as f64 + 1.0).log2();
            let found = log as f64 / (1_u64 << 32) as f64;
            assert!((found - exact).abs() < 1e-8, "{h}: {found} {exact}");
        }
    }

    #[test]
    fn nodes_win_in_proportion_to_their_weight() {
        let nodes = [(NodeId(1), 100), (NodeId(2), 200), (NodeId(3), 0), (NodeId(4), 100)];
        let mut wins = [0_u32; 5];
        for shard in 0..20_000 {
            wins[rank(shard, nodes)[0].0 as usize] += 1;
        }
        let near = |wins: u32, wanted: u32| wins.abs_diff(wanted) < 400;
        assert!(near(wins[1], 5_000) && near(wins[2], 10_000) && near(wins[4], 5_000));
        assert_eq!(wins[3], 0);
    }

    #[test]
    fn a_new_node_wins_its_share_and_moves_nothing_else() {
        let mut moved = 0;
        for shard in 0..10_000 {
            let mut after = rank(shard, alike(11));
            moved += u32::from(after[..3].contains(&NodeId(11)));
            after.retain(|node| *node != NodeId(11));
            assert_eq!(after, rank(shard, alike(10)));
        }
        let share = 10_000 * 3 / 11;
        assert!(moved.abs_diff(share) < share / 10, "{moved} of {share}");
    }

    proptest! {
        #[test]
        fn the_order_of_nodes_does_not_matter(
            key: u64, nodes in prop::collection::vec((any::<u64>(), 0..300_u32), 0..20),
        ) {
            let nodes = || nodes.iter().map(|&(id, weight)| (NodeId(id), weight));
            prop_assert_eq!(rank(key, nodes()), rank(key, nodes().rev()));
        }
    }
}
