//! Key → position on the 64-bit ring → shard range.
//!
//! The position of a key is the xxh3-64 hash, seed 0, of the key, or of the key's *tag* if it has one.
//! The tag is what stands between the first `{` of the key and the next `}` after it, if that is at
//! least one byte; only this first pair counts. Keys with the same tag live in the same shard. Keys
//! are bytes; no character set is assumed. Clients in other languages compute the same:
//!
//! | key | hashed | position |
//! |---|---|---|
//! | *(empty; never a valid key)* | *(empty)* | `2d06800538d394c2` |
//! | `abc` | `abc` | `78af5f94892f3950` |
//! | `user:{42}:name` | `42` | `1217cb28c0ef2191` |
//! | `{42}` | `42` | `1217cb28c0ef2191` |
//! | `a{}{42}` | `a{}{42}`: the first pair is empty | `5697edf8f5b01bfd` |
//! | `a}b{c` | `a}b{c`: nothing is closed | `c5229b109a89e4ea` |
//! | `{{x}}` | `{x` | `b65c3bdd13e85126` |
//! | `00 ff 80` (three bytes) | `00 ff 80` | `2682fcb65dac5d83` |

use xxhash_rust::xxh3::xxh3_64;

/// A contiguous part of the ring, both ends included.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct RingRange {
    /// First position.
    pub start: u64,
    /// Last position.
    pub end: u64,
}

impl RingRange {
    /// The whole ring.
    pub const ALL: RingRange = RingRange { start: 0, end: u64::MAX };

    /// Whether `position` lies in this range.
    pub fn contains(&self, position: u64) -> bool {
        self.start <= position && position <= self.end
    }
}

/// The position of `key` on the ring.
pub fn position(key: &[u8]) -> u64 {
    xxh3_64(hashed_part(key))
}

/// The part of `key` that decides its position: its tag, or all of it.
pub fn hashed_part(key: &[u8]) -> &[u8] {
    let Some(open) = key.iter().position(|&byte| byte == b'{') else {
        return key;
    };
    let inner = &key[open + 1..];
    match inner.iter().position(|&byte| byte == b'}') {
        Some(close) if close > 0 => &inner[..close],
        _ => key,
    }
}

/// The ring cut into `shards` ranges that differ in length by at most one position, in ascending
/// order. None for 0.
pub fn equal_ranges(shards: u32) -> Vec<RingRange> {
    // Range i begins at ⌊i · 2^64 / shards⌋.
    let begin = |at: u32| (u128::from(at) << 64) / u128::from(shards);
    (0..shards).map(|at| RingRange { start: begin(at) as u64, end: (begin(at + 1) - 1) as u64 }).collect()
}

/// Whether `ranges`, in the order given, cover the whole ring without gap or overlap.
pub fn covers_ring(ranges: impl IntoIterator<Item = RingRange>) -> bool {
    // The position that must come next; `None` once the ring's end is covered.
    let mut next = Some(0);
    for range in ranges {
        if next != Some(range.start) || range.end < range.start {
            return false;
        }
        next = range.end.checked_add(1);
    }
    next.is_none()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The table on the module page; published in the protocol's description too.
    #[test]
    fn golden_positions() {
        let vectors: &[(&[u8], &[u8], u64)] = &[
            (b"", b"", 0x2d06_8005_38d3_94c2),
            (b"abc", b"abc", 0x78af_5f94_892f_3950),
            (b"user:{42}:name", b"42", 0x1217_cb28_c0ef_2191),
            (b"{42}", b"42", 0x1217_cb28_c0ef_2191),
            (b"a{}{42}", b"a{}{42}", 0x5697_edf8_f5b0_1bfd),
            (b"a}b{c", b"a}b{c", 0xc522_9b10_9a89_e4ea),
            (b"{{x}}", b"{x", 0xb65c_3bdd_13e8_5126),
            (b"\x00\xff\x80", b"\x00\xff\x80", 0x2682_fcb6_5dac_5d83),
        ];
        let found: Vec<(&[u8], &[u8], u64)> =
            vectors.iter().map(|(key, ..)| (*key, hashed_part(key), position(key))).collect();
        assert_eq!(found, vectors, "{found:x?}");
    }

    #[test]
    fn ranges_are_equal_and_cover_the_ring() {
        assert_eq!(equal_ranges(0), []);
        assert_eq!(equal_ranges(1), [RingRange::ALL]);
        assert_eq!(equal_ranges(2)[1].start, 1 << 63);
        assert_eq!(equal_ranges(3)[1].start, 0x5555_5555_5555_5555);
        for shards in (1..200).chain([4095, 4096, 10_007]) {
            let ranges = equal_ranges(shards);
            assert!(covers_ring(ranges.iter().copied()));
            let lengths = || ranges.iter().map(|r| r.end - r.start);
            assert!(lengths().max().unwrap() - lengths().min().unwrap() <= 1);
        }
    }

    #[test]
    fn gaps_overlaps_and_disorder_are_seen() {
        let range = |start, end| RingRange { start, end };
        assert!(!covers_ring([]));
        assert!(!covers_ring([range(0, 5)]));
        assert!(!covers_ring([range(0, 5), range(7, u64::MAX)]));
        assert!(!covers_ring([range(0, 5), range(5, u64::MAX)]));
        assert!(!covers_ring([range(6, u64::MAX), range(0, 5)]));
        assert!(!covers_ring([RingRange::ALL, RingRange::ALL]));
        assert!(covers_ring([range(0, 5), range(6, u64::MAX)]));
    }

    proptest! {
        #[test]
        fn keys_with_one_tag_share_a_position(
            tag in "[^{}]{1,8}", before in "[^{]{0,8}", after in ".{0,8}",
        ) {
            let key = format!("{before}{{{tag}}}{after}");
            prop_assert_eq!(position(key.as_bytes()), xxh3_64(tag.as_bytes()));
        }

        #[test]
        fn each_position_lies_in_exactly_one_range(shards in 1..5000_u32, position: u64) {
            let ranges = equal_ranges(shards);
            prop_assert_eq!(ranges.iter().filter(|r| r.contains(position)).count(), 1);
        }
    }
}
