//! Frames on a byte stream: `[length u32][crc32c u32][payload]`, little-endian, after a preamble.
//!
//! Preamble and header take eight bytes each and a payload takes whole words, so that every payload
//! lies aligned in a buffer that begins aligned: Cap'n Proto reads it in place. A length is checked
//! against the connection's limit before anything is allocated, and the buffer grows as bytes arrive,
//! not as a stranger announces them. Whatever is wrong, the stream can't be trusted to go on.

use bytes::{Buf, Bytes, BytesMut};
use std::io;
use tokio::io::{AsyncRead, AsyncReadExt};

use super::TransportError;
use super::room::Room;
use crate::codec::CodecError;
use crate::limits::{FRAME_BYTES_MAX, READ_BUFFER_BYTES_MAX, READ_CHUNK_BYTES};

/// First bytes of a peer connection, both ways.
pub const MAGIC: [u8; 4] = *b"PNTP";
/// Version of the framing. What is in the frames has a version of its own, agreed upon in the handshake.
pub const FRAMING_VERSION: u16 = 1;
/// Length of the preamble: magic, version, two bytes reserved (zero).
pub const PREAMBLE_BYTES: usize = 8;
/// Length of a frame's header.
pub const HEADER_BYTES: usize = 8;

/// Bytes that are not a frame.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FrameError {
    /// The length is zero, not in whole words, or beyond the limit.
    #[error("a frame of {length} bytes, which must be a multiple of 8 and at most {max}")]
    Length {
        /// What the header says.
        length: usize,
        /// The limit on this connection.
        max: usize,
    },
    /// The payload isn't what was sent.
    #[error("a frame of {length} bytes fails its checksum")]
    Checksum {
        /// Its length.
        length: usize,
    },
    /// The first bytes are another protocol's.
    #[error("the other side doesn't speak the peer protocol")]
    Foreign,
    /// The first bytes are of a version this build doesn't know.
    #[error("the other side frames by version {theirs}, this build by version {FRAMING_VERSION}")]
    Version {
        /// Its version.
        theirs: u16,
    },
}

/// The bytes that open a peer connection.
pub fn preamble() -> [u8; PREAMBLE_BYTES] {
    let mut bytes = [0; PREAMBLE_BYTES];
    bytes[..4].copy_from_slice(&MAGIC);
    bytes[4..6].copy_from_slice(&FRAMING_VERSION.to_le_bytes());
    bytes
}

/// Whether a connection that begins with `bytes` is a peer's. Needs four bytes to say yes.
pub fn is_peer_preamble(bytes: &[u8]) -> bool {
    bytes.starts_with(&MAGIC)
}

/// Checks the other side's preamble.
pub fn check_preamble(bytes: &[u8; PREAMBLE_BYTES]) -> Result<(), FrameError> {
    if !is_peer_preamble(bytes) {
        return Err(FrameError::Foreign);
    }
    match u16::from_le_bytes([bytes[4], bytes[5]]) {
        FRAMING_VERSION => Ok(()),
        theirs => Err(FrameError::Version { theirs }),
    }
}

/// Appends a frame to `out` whose payload `write` appends. On an error `out` is as it was.
pub fn append<E: From<FrameError>>(
    out: &mut Vec<u8>,
    write: impl FnOnce(&mut Vec<u8>) -> Result<(), E>,
) -> Result<(), E> {
    let start = out.len();
    out.extend_from_slice(&[0; HEADER_BYTES]);
    let result = write(out).and_then(|()| {
        let payload = &out[start + HEADER_BYTES..];
        let header = header(payload)?;
        out[start..start + HEADER_BYTES].copy_from_slice(&header);
        Ok(())
    });
    if result.is_err() {
        out.truncate(start);
    }
    result
}

fn header(payload: &[u8]) -> Result<[u8; HEADER_BYTES], FrameError> {
    let length = payload.len();
    check_length(length, FRAME_BYTES_MAX)?;
    let mut header = [0; HEADER_BYTES];
    header[..4].copy_from_slice(&(length as u32).to_le_bytes());
    header[4..].copy_from_slice(&crc32c::crc32c(payload).to_le_bytes());
    Ok(header)
}

fn check_length(length: usize, max: usize) -> Result<(), FrameError> {
    if length == 0 || length > max || !length.is_multiple_of(8) {
        return Err(FrameError::Length { length, max });
    }
    Ok(())
}

/// A payload as a frame of its own.
pub fn sealed(payload: &[u8]) -> Result<Vec<u8>, FrameError> {
    let mut out = Vec::with_capacity(HEADER_BYTES + payload.len());
    append(&mut out, |out| {
        out.extend_from_slice(payload);
        Ok::<_, FrameError>(())
    })?;
    Ok(out)
}

impl From<FrameError> for CodecError {
    fn from(error: FrameError) -> CodecError {
        CodecError::Malformed { what: "frame", detail: error.to_string() }
    }
}

/// Cuts what arrives into frames.
#[derive(Debug)]
pub struct FrameReader {
    buffer: BytesMut,
    /// Bytes for which the buffer has had room since it was made, about.
    capacity: usize,
    room: Room,
    max: usize,
}

impl FrameReader {
    /// For payloads of at most `max` bytes.
    pub fn new(max: usize) -> FrameReader {
        FrameReader { buffer: BytesMut::new(), capacity: 0, room: Room::default(), max }
    }

    /// Sets another limit, for the frames not yet taken.
    pub fn set_max(&mut self, max: usize) {
        self.max = max;
    }

    /// The next whole payload, if there is one: a slice of the read buffer. Once it is dropped its place
    /// is read into again, so it should be soon, and what is kept of it be a copy.
    pub fn take(&mut self) -> Result<Option<Bytes>, FrameError> {
        let Some((length, checksum)) = self.header()? else {
            return Ok(None);
        };
        let Some(payload) = self.buffer.get(HEADER_BYTES..HEADER_BYTES + length) else {
            return Ok(None);
        };
        if crc32c::crc32c(payload) != checksum {
            return Err(FrameError::Checksum { length });
        }
        let mut frame = self.buffer.split_to(HEADER_BYTES + length);
        frame.advance(HEADER_BYTES);
        if length > READ_BUFFER_BYTES_MAX {
            // So large a buffer goes with its frame.
            self.renew();
        }
        Ok(Some(frame.freeze()))
    }

    fn header(&self) -> Result<Option<(usize, u32)>, FrameError> {
        let Some((length, rest)) = self.buffer.split_first_chunk::<4>() else {
            return Ok(None);
        };
        let length = u32::from_le_bytes(*length) as usize;
        check_length(length, self.max)?;
        let checksum = rest.first_chunk::<4>();
        Ok(checksum.map(|checksum| (length, u32::from_le_bytes(*checksum))))
    }

    /// Reads more from `from`: returns the number of bytes, 0 at its end. May be dropped while it
    /// waits; nothing is lost. The buffer at most doubles with each read, up to the frame's length.
    pub async fn fill(&mut self, from: &mut (impl AsyncRead + Unpin)) -> io::Result<usize> {
        let missing = match self.header() {
            Ok(Some((length, _))) => (HEADER_BYTES + length).saturating_sub(self.buffer.len()),
            _ => 0,
        };
        let growth = missing.min(self.buffer.len()).max(READ_CHUNK_BYTES);
        if self.room.is_excess(self.buffer.len() + missing, self.capacity) {
            self.renew();
        }
        self.buffer.reserve(growth);
        self.capacity = self.capacity.max(self.buffer.capacity());
        from.read_buf(&mut self.buffer).await
    }

    /// Goes on with a buffer no larger than what is in it.
    fn renew(&mut self) {
        self.buffer = BytesMut::from(&self.buffer[..]);
        self.capacity = 0;
    }

    /// Reads until there is a whole payload.
    pub async fn read(&mut self, from: &mut (impl AsyncRead + Unpin)) -> Result<Bytes, TransportError> {
        loop {
            if let Some(payload) = self.take()? {
                return Ok(payload);
            }
            if self.fill(from).await? == 0 {
                return Err(TransportError::Closed);
            }
        }
    }

    /// Whether nothing is left: a stream that ends here ends between two frames.
    pub fn is_empty(&self) -> bool {
        self.buffer.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn feed(reader: &mut FrameReader, bytes: &[u8]) {
        reader.buffer.extend_from_slice(bytes);
    }

    #[test]
    fn preambles_are_told_apart() {
        assert!(is_peer_preamble(&preamble()));
        assert!(!is_peer_preamble(&preamble()[..3]));
        assert_eq!(check_preamble(&preamble()), Ok(()));
        assert_eq!(check_preamble(b"GET / HT"), Err(FrameError::Foreign));
        assert_eq!(check_preamble(b"PNTP\x02\0\0\0"), Err(FrameError::Version { theirs: 2 }));
    }

    #[test]
    fn a_length_beyond_the_limit_is_refused_before_its_bytes_arrive() {
        for length in [0u32, 7, 12, 1032, u32::MAX] {
            let mut reader = FrameReader::new(1024);
            feed(&mut reader, &length.to_le_bytes());
            let refused = FrameError::Length { length: length as usize, max: 1024 };
            assert_eq!(reader.take(), Err(refused));
        }
    }

    #[tokio::test]
    async fn an_announced_length_is_not_allocated() {
        let mut reader = FrameReader::new(FRAME_BYTES_MAX);
        let mut bytes = (FRAME_BYTES_MAX as u32).to_le_bytes().to_vec();
        bytes.extend_from_slice(&[0; 12]);
        let mut stream = &bytes[..];
        while reader.fill(&mut stream).await.unwrap() > 0 {}
        assert_eq!(reader.take(), Ok(None));
        assert!(reader.buffer.capacity() <= 4 * READ_CHUNK_BYTES);
    }

    #[tokio::test]
    async fn a_large_frame_leaves_no_room_behind() {
        let mut reader = FrameReader::new(FRAME_BYTES_MAX);
        let large = sealed(&vec![7; READ_BUFFER_BYTES_MAX / 2]).unwrap();
        assert_eq!(reader.read(&mut &large[..]).await.unwrap().len(), READ_BUFFER_BYTES_MAX / 2);
        let small = sealed(&[9; 64]).unwrap();
        for at in 0..100 {
            // Also while a part of the next frame is there already.
            let (first, rest) = small.split_at(at % small.len());
            feed(&mut reader, first);
            assert_eq!(reader.read(&mut &rest[..]).await.unwrap(), [9; 64][..]);
        }
        assert!(reader.capacity < READ_BUFFER_BYTES_MAX / 2, "{} bytes", reader.capacity);
    }

    #[test]
    fn a_changed_bit_is_noticed() {
        let whole = sealed(&[7; 64]).unwrap();
        for bit in 32..whole.len() * 8 {
            let mut bytes = whole.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let mut reader = FrameReader::new(1024);
            feed(&mut reader, &bytes);
            assert_eq!(reader.take(), Err(FrameError::Checksum { length: 64 }));
        }
    }

    #[test]
    fn an_error_while_writing_leaves_nothing_behind() {
        let mut out = vec![1, 2, 3];
        let result = append(&mut out, |out| {
            out.extend_from_slice(&[0; 12]);
            Ok::<_, FrameError>(())
        });
        assert!(matches!(result, Err(FrameError::Length { length: 12, .. })));
        assert_eq!(out, [1, 2, 3]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// However a stream is cut, the frames come out whole, in order, and aligned.
        #[test]
        fn frames_survive_any_cut(
            words in prop::collection::vec(prop_oneof![1usize..40, 8000usize..20000], 1..6),
            cuts in prop::collection::vec(1usize..100_000, 1..20),
        ) {
            let payloads: Vec<Vec<u8>> = words
                .iter()
                .enumerate()
                .map(|(at, words)| vec![at as u8; words * 8])
                .collect();
            let mut stream = Vec::new();
            for payload in &payloads {
                stream.extend(sealed(payload).unwrap());
            }
            let mut reader = FrameReader::new(FRAME_BYTES_MAX);
            let mut got = Vec::new();
            let mut rest = &stream[..];
            for cut in cuts.iter().cycle() {
                let (now, later) = rest.split_at((*cut).min(rest.len()));
                feed(&mut reader, now);
                while let Some(payload) = reader.take().unwrap() {
                    got.push(payload);
                }
                rest = later;
                if rest.is_empty() {
                    break;
                }
            }
            prop_assert!(reader.is_empty());
            prop_assert_eq!(got, payloads);
        }
    }
}
