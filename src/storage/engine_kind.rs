//! Which engine keeps the state of a data directory: what was chosen, and what is there.
//!
//! A directory keeps the engine that made its state. Nothing opens files of another one, and nothing takes
//! them for no state at all.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use super::engine::Store;
use super::engine_fjall::{FjallEngine, FjallOptions};
use super::engine_sled::{SledEngine, SledOptions};
use super::identity::IdentityError;
use super::{StorageError, beside, fjall_files, sled_files, sled_sums};
use crate::ids::StoreId;

/// An engine that keeps its state on disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EngineKind {
    /// [`super::engine_sled`]
    Sled,
    /// [`super::engine_fjall`]
    Fjall,
}

/// How to open the state of a data directory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StateOptions {
    /// The engine; `None`: the one that made what is there, or else [`EngineKind::DEFAULT`].
    pub engine: Option<EngineKind>,
    /// Memory for what the engine has read, in bytes.
    pub cache_bytes: u64,
    /// See [`SledOptions::synchronous`].
    pub synchronous: bool,
}

impl EngineKind {
    /// All of them.
    pub const ALL: [EngineKind; 2] = [EngineKind::Sled, EngineKind::Fjall];

    /// The engine of a new data directory, unless another is asked for. That this changes between versions of the
    /// program is no matter for a directory that is there.
    pub const DEFAULT: EngineKind = EngineKind::Fjall;

    /// Its name, as in settings.
    pub fn name(self) -> &'static str {
        match self {
            EngineKind::Sled => "sled",
            EngineKind::Fjall => "fjall",
        }
    }

    /// The engine of that name.
    pub fn parse(name: &str) -> Option<EngineKind> {
        EngineKind::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// Whether any of them has made files in directory `state`.
    pub fn is_there(state: &Path) -> bool {
        sled_files::is_there(state) || fjall_files::is_there(state)
    }

    /// The engine to open the state in directory `state` with. Errors: [`IdentityError::OtherEngine`]; files of
    /// several engines.
    pub fn of(state: &Path, asked: Option<EngineKind>) -> Result<EngineKind, StorageError> {
        let sled = sled_files::is_there(state) || beside(state, sled_sums::ENDING).exists();
        let found = match (sled, fjall_files::is_there(state)) {
            (true, true) => {
                return Err(StorageError::Engine {
                    engine: "state",
                    reason: format!(
                        "{} has files of sled and of fjall; move those away that don't count",
                        state.display()
                    ),
                });
            }
            (true, false) => Some(EngineKind::Sled),
            (false, true) => Some(EngineKind::Fjall),
            (false, false) => None,
        };
        match (found, asked) {
            (Some(found), Some(asked)) if found != asked => {
                let path = state.display().to_string();
                Err(IdentityError::OtherEngine { path, found: found.name(), asked: asked.name() }.into())
            }
            _ => Ok(found.or(asked).unwrap_or(EngineKind::DEFAULT)),
        }
    }

    /// Opens the state in directory `state`, or creates it.
    pub fn open(
        self,
        state: &Path,
        options: StateOptions,
        store_id: StoreId,
    ) -> Result<Arc<dyn Store>, StorageError> {
        let StateOptions { cache_bytes, synchronous, .. } = options;
        Ok(match self {
            EngineKind::Sled => {
                Arc::new(SledEngine::open(state, SledOptions { cache_bytes, synchronous }, store_id)?)
            }
            EngineKind::Fjall => Arc::new(FjallEngine::open(state, FjallOptions { cache_bytes }, store_id)?),
        })
    }
}

impl fmt::Display for EngineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::RandomId;

    #[test]
    fn a_directory_keeps_the_engine_that_made_it_whatever_a_new_one_gets() {
        for made in EngineKind::ALL {
            let home = tempfile::tempdir().unwrap();
            let state = home.path().join("state");
            assert_eq!(EngineKind::of(&state, None).unwrap(), EngineKind::DEFAULT);
            assert_eq!(EngineKind::of(&state, Some(made)).unwrap(), made);
            assert!(!EngineKind::is_there(&state));
            let options = StateOptions { engine: Some(made), cache_bytes: 1 << 20, synchronous: false };
            drop(made.open(&state, options, RandomId([1; 16])).unwrap());
            assert!(EngineKind::is_there(&state));
            assert_eq!(EngineKind::of(&state, None).unwrap(), made);
            for asked in EngineKind::ALL {
                assert_eq!(EngineKind::of(&state, Some(asked)).is_ok(), asked == made, "{asked} of {made}");
            }
        }
    }
}
