//! Key → position on the 64-bit ring → shard range.

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
    pub const ALL: RingRange = RingRange {
        start: 0,
        end: u64::MAX,
    };

    /// Whether `position` lies in this range.
    pub fn contains(&self, position: u64) -> bool {
        self.start <= position && position <= self.end
    }
}
