//! Changes on their way to an engine that takes them in batches: those of a flush, and those of a redo file that a crash
//! has left.

use std::path::Path;

use bytes::Bytes;

use super::engine::{Engine, Mutation};
use super::flush_source::held;
use super::redo::{Record, RedoReader, Section};
use super::{StorageError, keys, pulse};
use crate::limits::{FLUSH_BATCH_BYTES, FLUSH_BATCH_KEYS};

/// Collects changes and hands them to the engine in bounded, sorted batches, so that nobody who
/// reads beside waits for long.
pub(super) struct Batch<'a> {
    engine: &'a dyn Engine,
    mutations: Vec<Mutation>,
    bytes: usize,
}

impl<'a> Batch<'a> {
    pub fn new(engine: &'a dyn Engine) -> Batch<'a> {
        Batch { engine, mutations: Vec::with_capacity(FLUSH_BATCH_KEYS), bytes: 0 }
    }

    /// Adds a change; true if that completed a batch, which the engine then has.
    pub fn push(&mut self, key: Vec<u8>, value: Option<Bytes>) -> Result<bool, StorageError> {
        self.bytes += key.len() + value.as_ref().map_or(0, Bytes::len);
        self.mutations.push((key, value));
        let full = self.mutations.len() >= FLUSH_BATCH_KEYS || self.bytes >= FLUSH_BATCH_BYTES;
        if full {
            self.write()?;
        }
        Ok(full)
    }

    /// Writes what is left of a section, then its header, as the last thing.
    pub fn finish(&mut self, section: &Section) -> Result<(), StorageError> {
        self.write()?;
        let key = keys::header_key(section.replica, section.generation);
        self.mutations.push((key, Some(section.header.encode().into())));
        self.write()
    }

    /// Writes what is left.
    pub fn write(&mut self) -> Result<(), StorageError> {
        if !self.mutations.is_empty() {
            self.engine.write(&self.mutations)?;
            self.mutations.clear();
            self.bytes = 0;
            pulse::beat();
        }
        Ok(())
    }
}

/// Writes everything in a redo file to the engine again.
pub(super) fn reapply(path: &Path, sequence: u64, engine: &dyn Engine) -> Result<(), StorageError> {
    let mut reader = RedoReader::open(path, sequence)?;
    let mut batch = Batch::new(engine);
    let mut current: Option<Section> = None;
    while let Some(record) = reader.read()? {
        match record {
            Record::Section(section) => {
                if let Some(complete) = current.take() {
                    batch.finish(&complete)?;
                }
                check_fits(path, engine, &section)?;
                current = Some(section);
            }
            Record::Change(kind, key, value) => {
                let Some(section) = &current else {
                    return Err(StorageError::Damaged {
                        what: format!("redo file {}", path.display()),
                        detail: "a change precedes the first section".into(),
                    });
                };
                let key = keys::key_of_kind(section.replica, section.generation, kind, &key);
                batch.push(key, value)?;
            }
        }
    }
    if let Some(complete) = current {
        batch.finish(&complete)?;
    }
    tracing::info!(file = %path.display(), "re-applied a redo file");
    Ok(())
}

/// A redo file is made to the state that the engine held durably, and goes before the engine gets
/// anything newer. An engine that is behind its base has lost what was durable; one that is ahead of
/// its header would be taken back by a file that somebody has put there.
fn check_fits(path: &Path, engine: &dyn Engine, section: &Section) -> Result<(), StorageError> {
    let held = held(engine, section.replica, section.generation)?;
    let to = section.header.applied.index;
    if held < section.base {
        return Err(StorageError::Damaged {
            what: format!("state of replica {}", section.replica),
            detail: format!(
                "it was durable up to entry {}, but the {} store has it up to {held} only",
                section.base,
                engine.name()
            ),
        });
    }
    if held > to {
        return Err(StorageError::Damaged {
            what: format!("redo file {}", path.display()),
            detail: format!(
                "it leads replica {} to entry {to}, but the state is at {held} already",
                section.replica
            ),
        });
    }
    Ok(())
}
