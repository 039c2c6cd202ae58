//! The format of a stored value.
//!
//! ```text
//! value = format(1 byte: 1)  flags(1 byte: 0)  revision(8 bytes, big-endian)  bytes of the user
//! ```
//!
//! The revision is the shard's counter at the write, which clients see as the key's version. A format or
//! flag this version doesn't know is an error; flags are reserved for an expiry and for values kept
//! elsewhere.

use bytes::{BufMut, Bytes, BytesMut};

use super::command::{FormatError, Versioned};

const FORMAT: u8 = 1;

/// Bytes before those of the user.
pub const HEADER_BYTES: usize = 10;

/// The stored form of a value written at `revision`.
pub fn encode(revision: u64, value: &[u8]) -> Bytes {
    let mut bytes = BytesMut::with_capacity(HEADER_BYTES + value.len());
    bytes.put_u8(FORMAT);
    bytes.put_u8(0);
    bytes.put_u64(revision);
    bytes.put_slice(value);
    bytes.freeze()
}

/// Reads a stored value. The result shares the buffer of `stored`.
pub fn decode(stored: &Bytes) -> Result<Versioned, FormatError> {
    let (version, _) = header(stored)?;
    Ok(Versioned { value: stored.slice(HEADER_BYTES..), version })
}

/// Revision and length of a stored value, for those who don't need its bytes.
pub fn header(stored: &[u8]) -> Result<(u64, usize), FormatError> {
    let Some((header, value)) = stored.split_first_chunk::<HEADER_BYTES>() else {
        return Err(FormatError::Truncated("the header of a stored value"));
    };
    let [format, flags, revision @ ..] = *header;
    for (what, found, wanted) in
        [("format of a stored value", format, FORMAT), ("flags of a stored value", flags, 0)]
    {
        if found != wanted {
            let value = found.into();
            return Err(FormatError::Unknown { what, value });
        }
    }
    Ok((u64::from_be_bytes(revision), value.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_form_is_pinned() {
        let stored = encode(0x0102, b"val");
        assert_eq!(stored.as_ref(), b"\x01\x00\0\0\0\0\0\0\x01\x02val");
        let read = decode(&stored).unwrap();
        assert_eq!((read.version, read.value.as_ref()), (0x0102, &b"val"[..]));
        assert_eq!(read.value.as_ptr(), stored[HEADER_BYTES..].as_ptr());
    }

    #[test]
    fn other_forms_are_refused() {
        let refused = |bytes: &'static [u8]| decode(&bytes.into()).unwrap_err().to_string();
        assert_eq!(refused(b"\x01\x00\0\0\0\0\0\0\0"), "the bytes end within the header of a stored value");
        assert_eq!(refused(b"\x02\x00\0\0\0\0\0\0\0\x01"), "unknown format of a stored value 2");
        assert_eq!(refused(b"\x01\x80\0\0\0\0\0\0\0\x01"), "unknown flags of a stored value 128");
    }
}
