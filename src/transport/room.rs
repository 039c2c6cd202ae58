//! The room that a buffer keeps between uses. A burst makes it large, as when thousands of groups are made and all of them
//! speak at once; while it is used like that it is kept, since to grow it anew takes copies, and soon after it is given back.

/// A buffer of so many bytes is kept whatever it is used for.
pub(super) const ROOM_KEPT_BYTES: usize = 128 * 1024;
/// Uses in a row of less than a part of a large buffer, after which it is given back.
const SPARING_USES_MAX: u32 = 16;
/// The part: a use of less is a sparing one.
const SPARING_PART: usize = 8;

/// Tells when a buffer is to be given back.
#[derive(Debug, Default)]
pub(super) struct Room {
    sparing: u32,
}

impl Room {
    /// The buffer, whose capacity is this, was used for so many bytes. Whether it is to be given back now.
    pub(super) fn is_excess(&mut self, used: usize, capacity: usize) -> bool {
        self.sparing = match capacity > ROOM_KEPT_BYTES && used < capacity / SPARING_PART {
            true => self.sparing + 1,
            false => 0,
        };
        if self.sparing < SPARING_USES_MAX {
            return false;
        }
        self.sparing = 0;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_given_back_when_it_has_not_been_needed_for_a_while() {
        let (mut room, large) = (Room::default(), 4 * ROOM_KEPT_BYTES);
        for _ in 0..10 {
            for _ in 1..SPARING_USES_MAX {
                assert!(!room.is_excess(8, large));
            }
            assert!(!room.is_excess(large / SPARING_PART, large), "it was needed once more");
        }
        let given_back = (1..).find(|_| room.is_excess(8, large));
        assert_eq!(given_back, Some(SPARING_USES_MAX));
        assert!((0..100).all(|_| !room.is_excess(8, ROOM_KEPT_BYTES)), "so little is kept");
    }
}
