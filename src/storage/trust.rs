//! Whether an open store may still be believed, and who is told when it may not.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{StorageError, aside};

/// Told why an open store isn't believed any more: of damage that was found in it, or a write of unknown outcome.
pub type OnDamage = Box<dyn Fn(&StorageError) + Send + Sync>;

/// The standing of one open store.
pub(super) struct Trust {
    engine: &'static str,
    path: PathBuf,
    /// The store is damaged, or a sync has failed: it answers nothing but errors.
    broken: AtomicBool,
    on_damage: OnceLock<OnDamage>,
}

impl Trust {
    /// Of the store in `path`, which was just opened.
    pub fn new(engine: &'static str, path: &Path) -> Trust {
        Trust { engine, path: path.to_owned(), broken: AtomicBool::new(false), on_damage: OnceLock::new() }
    }

    /// Has `hook` told of damage that is found from now on, and of writes that fail.
    pub fn on_damage(&self, hook: OnDamage) {
        if self.on_damage.set(hook).is_err() {
            tracing::debug!("somebody else is told of damage");
        }
    }

    /// An error if nothing of the store may be believed any more.
    pub fn check(&self) -> Result<(), StorageError> {
        if self.is_broken() {
            return Err(StorageError::Engine {
                engine: self.engine,
                reason: format!("{} failed before; restart the node to recover it", self.path.display()),
            });
        }
        Ok(())
    }

    /// Whether that is so.
    pub fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Relaxed)
    }

    /// From here on nothing of it is believed.
    pub fn distrust(&self) {
        self.broken.store(true, Ordering::Relaxed);
    }

    /// Sees to it that damage isn't forgotten: a store in which something is wrong may have more of it.
    /// `on_disk` tells by its detail whether it will be there at the next start too.
    pub fn note<T>(
        &self,
        result: Result<T, StorageError>,
        on_disk: impl Fn(&str) -> bool,
    ) -> Result<T, StorageError> {
        match &result {
            Err(error @ StorageError::Damaged { detail, .. }) => {
                self.distrust();
                // While it is being opened, its opener sees to that.
                if let Some(hook) = self.on_damage.get() {
                    if on_disk(detail)
                        && let Err(second) = aside::note_damage(&self.path, detail)
                    {
                        tracing::error!(%second, "damage of the state store could not be noted for the next start");
                    }
                    hook(error);
                }
            }
            Err(error @ StorageError::SyncFailed { .. }) => {
                self.distrust();
                // It may have been a thread of the store's own, and nobody else would say so: the store answers
                // nothing any more.
                if let Some(hook) = self.on_damage.get() {
                    hook(error);
                }
            }
            _ => {}
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn a_write_of_unknown_outcome_is_told_and_not_noted_as_damage() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("state");
        let trust = Trust::new("test", &path);
        let told = Arc::new(Mutex::new(Vec::new()));
        let hears = told.clone();
        trust.on_damage(Box::new(move |error| hears.lock().unwrap().push(error.to_string())));
        let failed = StorageError::SyncFailed { path: path.clone(), reason: "gone".into() };
        let text = failed.to_string();
        assert!(trust.note(Err::<(), _>(failed), |_| true).is_err());
        assert_eq!(*told.lock().unwrap(), [text]);
        assert!(trust.is_broken() && trust.check().is_err());
        assert_eq!(aside::noted_damage(&path).unwrap(), None);
    }
}
