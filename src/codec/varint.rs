//! Numbers in as few bytes as they need: groups of 7 bits, low ones first, one per byte, the high bit set
//! in all but the last. Each number has exactly one form, the shortest.

/// Why bytes are not a number.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum VarintError {
    /// They end within it.
    #[error("the bytes end within a varint")]
    Truncated,
    /// It has more than 64 bits.
    #[error("it has more than 64 bits")]
    TooLong,
    /// It has more bytes than it needs.
    #[error("it is not in the fewest bytes")]
    NotShortest,
}

/// Appends a number.
pub fn write(to: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        to.push(number as u8 | 0x80);
        number >>= 7;
    }
    to.push(number as u8);
}

/// The number at the start of `bytes`, and how many of them it takes.
pub fn read(bytes: &[u8]) -> Result<(u64, usize), VarintError> {
    let mut number = 0_u64;
    for (taken, shift) in (1..).zip((0..64).step_by(7)) {
        let byte = *bytes.get(taken - 1).ok_or(VarintError::Truncated)?;
        let group = u64::from(byte & 0x7f);
        if group << shift >> shift != group {
            return Err(VarintError::TooLong);
        }
        number |= group << shift;
        if byte & 0x80 == 0 {
            return if byte == 0 && shift > 0 { Err(VarintError::NotShortest) } else { Ok((number, taken)) };
        }
    }
    Err(VarintError::TooLong)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn other_forms_are_refused() {
        assert_eq!(read(b""), Err(VarintError::Truncated));
        assert_eq!(read(b"\x80"), Err(VarintError::Truncated));
        assert_eq!(read(b"\x80\x00"), Err(VarintError::NotShortest));
        assert_eq!(read(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x02"), Err(VarintError::TooLong));
        assert_eq!(read(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"), Err(VarintError::TooLong));
    }

    proptest! {
        #[test]
        fn numbers_survive(number: u64, shift in 0..64_u32, rest: Vec<u8>) {
            let number = number >> shift;
            let mut bytes = Vec::new();
            write(&mut bytes, number);
            let taken = bytes.len();
            bytes.extend(rest);
            prop_assert_eq!(read(&bytes), Ok((number, taken)));
        }
    }
}
