//! The numbers of flushes that an engine holds, see [`super::flush`].

use std::path::PathBuf;

use bytes::Bytes;

use super::engine::Engine;
use super::{StorageError, keys};

/// The numbers of flushes that an engine holds.
/// Invariant: `complete <= begun`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Numbers {
    pub complete: u64,
    pub begun: u64,
}

impl Numbers {
    pub fn complete(number: u64) -> Numbers {
        Numbers { complete: number, begun: number }
    }

    pub fn encode(self) -> Bytes {
        [self.complete.to_be_bytes(), self.begun.to_be_bytes()].concat().into()
    }

    pub fn write(self, engine: &dyn Engine) -> Result<(), StorageError> {
        engine.write(&[(keys::flush_key(), Some(self.encode()))])
    }
}

/// What the engine knows of flushes; `None` if it was never told.
pub(super) fn last_flush(engine: &dyn Engine) -> Result<Option<Numbers>, StorageError> {
    let Some(bytes) = engine.get(&keys::flush_key())? else {
        return Ok(None);
    };
    let numbers = bytes.split_first_chunk::<8>().and_then(|(complete, begun)| {
        let begun = u64::from_be_bytes(begun.try_into().ok()?);
        Some(Numbers { complete: u64::from_be_bytes(*complete), begun })
    });
    numbers.map(Some).ok_or_else(|| StorageError::Damaged {
        what: format!("the {} store", engine.name()),
        detail: format!("{} bytes are no numbers of flushes", bytes.len()),
    })
}

/// Whether redo files lead on from what the engine holds, see the head of this file.
pub(super) fn check_numbers(
    files: &[(u64, PathBuf)],
    held: Numbers,
    engine: &dyn Engine,
) -> Result<(), StorageError> {
    let Numbers { complete, begun } = held;
    let damaged =
        |detail| Err(StorageError::Damaged { what: format!("the {} store", engine.name()), detail });
    let Some(((first, path), (last, _))) = files.first().zip(files.last()) else {
        if begun == complete {
            return Ok(());
        }
        return damaged(format!("it holds a part of flush {begun}, and the redo file of that is missing"));
    };
    let contiguous = files.windows(2).all(|pair| pair[0].0.checked_add(1) == Some(pair[1].0));
    if contiguous && (first.saturating_sub(1)..=*last).contains(&complete) && begun <= *last {
        return Ok(());
    }
    damaged(format!(
        "its last flush has the number {complete}, and the redo files beside it begin with {}",
        path.display()
    ))
}
