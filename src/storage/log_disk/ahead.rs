//! Writes the blocks of a log file before they are needed.
//!
//! The engine reserves space for a file that it makes, two megabytes at a time. That costs nothing, but the first write into
//! each reserved block changes what the file system knows of the file, and so a sync of it writes
//! that too: one or more further blocks, one after the other, for nearly every sync of a busy log. A sync into blocks that were written before writes
//! those alone. So whenever a write comes to the end of what was written, zeros follow it, a good many syncs' worth, and the
//! next sync takes them along.
//!
//! Nothing that a reader can see changes: what was reserved and not written reads as zeros. The zeros never lie where
//! anything was written, since they begin where the last write has ended, and the one writer of a file makes both. Files that are used again,
//! and those written ahead when the log opens, were written whole: the engine reserves nothing for them.

use std::io::{self, Seek, SeekFrom, Write};
use std::ops::Range;

use raft_engine::env::WriteExt;

/// How much is written ahead at a time. A sync takes it along in the time of a few others.
const AHEAD_BYTES: usize = 256 << 10;

/// What is written ahead, in pieces of this.
static ZEROS: [u8; 32 << 10] = [0; 32 << 10];

/// The writer of one file.
pub struct AheadWriter<W> {
    inner: W,
    /// What is reserved and holds nothing yet. Empty: nothing is to be written ahead.
    reserved: Range<u64>,
    /// Whether anything is ever written ahead.
    on: bool,
}

impl<W: Write + Seek> AheadWriter<W> {
    /// In front of another one. Not `on`: as if that were used by itself.
    pub fn new(inner: W, on: bool) -> AheadWriter<W> {
        AheadWriter { inner, reserved: 0..0, on }
    }

    /// A write has ended. If it used up what was written ahead, there is more after this. An error: the next write would
    /// not begin where this one has ended.
    fn go_ahead(&mut self) -> io::Result<()> {
        let at = match self.inner.stream_position() {
            Ok(at) => at,
            Err(error) => {
                self.give_up(&error);
                return Ok(());
            }
        };
        if at <= self.reserved.start || at >= self.reserved.end {
            return Ok(());
        }
        let end = self.reserved.end.min(at + AHEAD_BYTES as u64);
        let mut left = usize::try_from(end - at).unwrap_or(0);
        self.reserved.start = end;
        while left > 0 {
            let piece = left.min(ZEROS.len());
            if let Err(error) = self.inner.write_all(&ZEROS[..piece]) {
                // It is for speed alone, and what was written counts whatever comes of it.
                self.give_up(&error);
                break;
            }
            left -= piece;
        }
        // What follows belongs where the zeros begin, however far they came. Of no kind of its own: the writer would make the
        // same write again, there, if it were told of an interruption.
        let back = self.inner.seek(SeekFrom::Start(at));
        back.map(drop).map_err(|error| io::Error::other(format!("going back to byte {at}: {error}")))
    }

    fn give_up(&mut self, error: &io::Error) {
        tracing::debug!(%error, "a file of the raft log isn't written ahead any more");
        self.reserved = 0..0;
    }
}

impl<W: Write + Seek> Write for AheadWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        if !self.reserved.is_empty() {
            self.go_ahead()?;
        }
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl<W: Seek> Seek for AheadWriter<W> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.inner.seek(to)
    }
}

impl<W: WriteExt> WriteExt for AheadWriter<W> {
    fn truncate(&mut self, offset: usize) -> io::Result<()> {
        self.reserved = 0..0;
        self.inner.truncate(offset)
    }

    fn allocate(&mut self, offset: usize, size: usize) -> io::Result<()> {
        self.reserved = 0..0;
        self.inner.allocate(offset, size)?;
        if self.on {
            self.reserved = offset as u64..(offset + size) as u64;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::io::Cursor;
    use std::rc::Rc;

    /// A file in memory that counts the bytes written to it, and refuses those beyond a limit; and to move, if it is told so.
    struct File {
        bytes: Cursor<Vec<u8>>,
        written: Rc<Cell<usize>>,
        limit: usize,
        stuck: bool,
    }

    impl Write for File {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if self.bytes.position() as usize + bytes.len() > self.limit {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.written.set(self.written.get() + bytes.len());
            self.bytes.write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Seek for File {
        fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
            match to {
                SeekFrom::Start(_) if self.stuck => Err(io::ErrorKind::Interrupted.into()),
                to => self.bytes.seek(to),
            }
        }
    }

    impl WriteExt for File {
        fn truncate(&mut self, offset: usize) -> io::Result<()> {
            self.bytes.get_mut().truncate(offset);
            self.bytes.set_position(offset as u64);
            Ok(())
        }

        fn allocate(&mut self, offset: usize, size: usize) -> io::Result<()> {
            let length = self.bytes.get_ref().len().max(offset + size);
            self.bytes.get_mut().resize(length, 0);
            Ok(())
        }
    }

    fn writer(limit: usize, on: bool) -> (AheadWriter<File>, Rc<Cell<usize>>) {
        let written = Rc::<Cell<usize>>::default();
        let file = File { bytes: Cursor::default(), written: written.clone(), limit, stuck: false };
        (AheadWriter::new(file, on), written)
    }

    #[test]
    fn zeros_are_written_ahead_and_nothing_else_changes() {
        const SPACE: usize = 2 * AHEAD_BYTES + 5000;
        let ((mut ahead, counted), (mut plain, plainly)) =
            (writer(usize::MAX, true), writer(usize::MAX, false));
        for writer in [&mut ahead, &mut plain] {
            writer.allocate(0, 7).unwrap();
            writer.write_all(&[1; 7]).unwrap();
            writer.allocate(7, SPACE).unwrap();
        }
        let mut most = 0;
        for number in 0..=SPACE / 999 {
            let before = counted.get();
            let bytes =
                vec![number as u8 | 1; 999.min(SPACE + 7 - plain.stream_position().unwrap() as usize)];
            for writer in [&mut ahead, &mut plain] {
                writer.write_all(&bytes).unwrap();
            }
            most = most.max(counted.get() - before);
            assert_eq!(ahead.stream_position().unwrap(), plain.stream_position().unwrap());
            assert_eq!(ahead.inner.bytes.get_ref(), plain.inner.bytes.get_ref());
        }
        assert_eq!(most, AHEAD_BYTES + 999, "a bounded part at a time");
        let twice = counted.get() - plainly.get();
        assert!((2 * AHEAD_BYTES..SPACE).contains(&twice), "each byte once: {twice}");

        // What was cut off is reserved anew, or isn't.
        ahead.allocate(7 + SPACE, 2 * AHEAD_BYTES).unwrap();
        ahead.truncate(7 + SPACE + 100).unwrap();
        let before = counted.get();
        ahead.write_all(&[2; 10]).unwrap();
        let length = ahead.inner.bytes.get_ref().len();
        assert_eq!((counted.get() - before, length), (10, 7 + SPACE + 110));
    }

    #[test]
    fn a_write_counts_though_none_can_be_made_ahead() {
        let (mut writer, _) = writer(AHEAD_BYTES, true);
        writer.allocate(0, 2 * AHEAD_BYTES).unwrap();
        for number in 1..=3 {
            writer.write_all(&[number; 10]).unwrap();
        }
        let bytes = writer.inner.bytes.get_ref();
        assert_eq!((&bytes[..10], &bytes[20..30], bytes[30]), (&[1; 10][..], &[3; 10][..], 0));
        assert!(writer.reserved.is_empty());
    }

    /// Else the next write would lie behind zeros, which end the log for whoever reads it.
    #[test]
    fn a_write_fails_after_which_the_next_would_lie_elsewhere() {
        let (mut writer, counted) = writer(usize::MAX, true);
        writer.allocate(0, 2 * AHEAD_BYTES).unwrap();
        writer.inner.stuck = true;
        let error = writer.write_all(&[1; 10]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::Other, "{error}");
        assert_eq!(counted.get(), 10 + AHEAD_BYTES, "it isn't made a second time");
    }
}
