//! The log engine behind guards against what raft-engine 0.4.2 does when it is in trouble:
//!
//! - It *panics when a sync fails*, holding its locks, and a later write would wait for them for
//!   ever. The panic is caught here; from then on nothing reaches the engine, and every write is
//!   [`StorageError::SyncFailed`]. The engine is then leaked: dropping it would sync once more.
//! - It *keeps the last block it read in the thread*, without asking which engine it came from: with
//!   two engines in a process (several nodes in one, or one opened again after a crash) a thread could
//!   read one log and get the other's entries. So a thread belongs to the first engine that reads on
//!   it; another one reads on a thread of its own for the moment. A node's threads read one log only.
//! - It *looks up and reads entries in two steps*, between which a purge may move them. A read that
//!   fails is tried again: what was moved is found at its new place at once. Only if that fails too,
//!   again and again, is it tried with purges held off, for which it may have to wait long.
//! - It *takes a full disk for an error like any other*, which it isn't: what it wrote of the batch it
//!   cuts off again, so the log is as it was. That error alone leaves the guard usable.
//! - It *panics during recovery* on a log it can't make sense of. That is damage.
//! - It *takes what it can't find or read for what was never written*. So the files are read before it
//!   opens them ([`super::check`]) and held against the mark ([`super::mark`]), which every synced write
//!   moves on.

use std::cell::Cell;
use std::fs::{File, TryLockError};
use std::io::{self, ErrorKind};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use raft_engine::env::FileSystem;
use raft_engine::internals::LogQueue;
use raft_engine::{Config, Engine, Error, LogBatch, ReadableSize, RecoveryMode};

use super::mark::{self, Found, Reach};
use super::record::{self, CATALOGUE_GROUP, IDENTITY_KEY, REACH_KEY};
use super::watch::{Listener, Watch, WatchedFiles};
use super::{DiskLogOptions, check};
use crate::ids::StoreId;
use crate::storage::identity::IdentityError;
use crate::storage::{StorageError, atomic_file};

/// Name of the engine in errors.
const ENGINE: &str = "raft log";

/// Further tries of a read that failed, beside a purge that may be running.
const READS_BESIDE_PURGE: usize = 2;

/// Threads that read the files when the log opens.
const RECOVERY_THREADS: usize = 2;

static ENGINES: AtomicU64 = AtomicU64::new(1);

thread_local! {
    /// Number of the engine to which this thread's block cache belongs; 0: none yet.
    static HOME: Cell<u64> = const { Cell::new(0) };
}

/// The engine on files that are watched.
pub type WatchedEngine<F> = Engine<WatchedFiles<F>>;

/// A raft-engine that can fail but not panic or hang.
pub struct EngineGuard<F: FileSystem + 'static> {
    engine: Arc<WatchedEngine<F>>,
    watch: Arc<Watch<F>>,
    dir: PathBuf,
    /// Unique among the engines of this process.
    number: u64,
    failed: AtomicBool,
    /// Held during a purge, and by reads that must not race with one.
    purge: Mutex<()>,
}

/// What opening found, until the log is begun.
pub struct Recovered {
    files: check::Listing,
    mark: Found,
    /// What the last synced batch says; `None`: a program wrote it that said nothing.
    record: Option<Reach>,
}

/// Why something couldn't be read, for a person.
#[derive(Debug, PartialEq, Eq)]
pub struct Unread {
    /// The engine's words.
    pub detail: String,
    /// What is on the disk is wrong, and will be.
    pub damaged: bool,
}

impl From<Error> for Unread {
    fn from(error: Error) -> Unread {
        let damaged = matches!(error, Error::Corruption(_) | Error::Codec(_) | Error::Protobuf(_));
        Unread { detail: error.to_string(), damaged }
    }
}

impl<F: FileSystem + 'static> EngineGuard<F> {
    /// Opens the engine in a directory that exists, if the log there is whole. But for a torn tail nothing
    /// is changed that says what was written, and no mark is made before [`EngineGuard::begin`].
    pub fn open(
        dir: &Path,
        options: DiskLogOptions,
        store_id: StoreId,
        file_system: Arc<F>,
    ) -> Result<(EngineGuard<F>, Recovered), StorageError> {
        let config = config(dir, options)?;
        let mark = mark::read(&mark::path_of(dir), store_id)?;
        let floor = match mark {
            Found::Mark(_, reach) => reach,
            Found::Absent | Found::Unusable(_) => Reach::default(),
        };
        let checked = {
            let _lock = lock(dir)?;
            let checked = check::check(dir, &floor);
            if let Ok(checked) = &checked {
                checked.cut(dir, &*file_system)?;
            }
            checked
        };
        let checked = match checked {
            Ok(checked) => checked,
            Err(error) => {
                // Another node's log is damaged in no other way than that.
                return Err(match foreign(dir, &config, store_id, file_system) {
                    Some(foreign) => foreign.into(),
                    None => error,
                });
            }
        };
        let watch = Watch::new(file_system, dir, floor);
        let engine = engine(dir, config, &watch).map_err(|error| match (error, &checked.missing) {
            // A hole is what makes the engine stumble over the rest.
            (StorageError::Damaged { .. }, Some(detail)) => super::refused(dir, detail.clone()),
            (error, _) => error,
        })?;
        owner(dir, &engine, store_id)?;
        let damaged = |detail| super::refused(dir, detail);
        let record = engine.get(CATALOGUE_GROUP, REACH_KEY);
        let record = record.map(|value| record::decode_reach(&value)).transpose().map_err(damaged)?;
        missing(&checked.files, &floor, record.as_ref()).map_err(damaged)?;
        let guard = EngineGuard {
            engine: Arc::new(engine),
            watch,
            dir: dir.to_path_buf(),
            number: ENGINES.fetch_add(1, Ordering::Relaxed),
            failed: AtomicBool::new(false),
            purge: Mutex::new(()),
        };
        Ok((guard, Recovered { files: checked.files, mark, record }))
    }

    /// Makes all durable that opening found, and the mark with it. Nothing is written before.
    pub fn begin(&self, recovered: Recovered, store_id: StoreId) -> Result<(), StorageError> {
        let Recovered { files, mark, record } = recovered;
        let path = mark::path_of(&self.dir);
        let version = match &mark {
            Found::Mark(version, _) => *version,
            Found::Absent | Found::Unusable(_) => 0,
        };
        let shown = path.display();
        match mark {
            Found::Mark(..) => {}
            Found::Absent if self.engine.is_empty() => {}
            Found::Absent if record.is_none() => {
                tracing::info!("the raft log is of an older program, without a mark; {shown} is made");
            }
            Found::Absent => tracing::warn!(
                "{shown}, the mark of the raft log, is missing and is made anew; the log is whole as far as it \
                 can tell, but a tail that it lost while the mark was gone would not be missed"
            ),
            Found::Unusable(reason) => tracing::warn!(
                "{shown}, the mark of the raft log, is damaged ({reason}) and is made anew; the log is whole as far \
                 as it can tell, but a tail that it lost meanwhile would not be missed"
            ),
        }
        let is_known = record.is_some() || version > 0;
        let spans = self.file_spans();
        self.watch.start(spans, &files, record.unwrap_or_default().writes)?;
        self.watch.open_mark(&path, store_id, version)?;
        // What a purge had freed, and the next one never hears of: the engine passes over files before a
        // hole. In a log without any account of its files it may be more than that.
        for (queue, (first, _)) in mark::QUEUES.into_iter().zip(spans).filter(|_| is_known) {
            for (seq, _) in files[queue as usize].range(..first) {
                let path = self.dir.join(check::file_name(queue, *seq));
                tracing::info!(path = %path.display(), "removing a file of the raft log that isn't needed any more");
                self.watch.remove(&path).map_err(atomic_file::io_error("removing", &path))?;
            }
        }
        Ok(())
    }

    fn file_spans(&self) -> [(u64, u64); 2] {
        mark::QUEUES.map(|queue: LogQueue| self.engine.file_span(queue))
    }

    /// The engine, for what neither writes nor reads files.
    pub fn get(&self) -> &WatchedEngine<F> {
        &self.engine
    }

    /// Writes a batch, durably if `sync`; not beside another write. After an error nothing works any more,
    /// unless the disk is full ([`StorageError::is_full`]): then nothing is written, and it may be tried
    /// again.
    pub fn write(&self, mut batch: LogBatch, sync: bool) -> Result<(), StorageError> {
        self.unless_failed()?;
        let reach = self.watch.next();
        if sync {
            let value = record::encode_reach(&reach);
            batch.put(CATALOGUE_GROUP, REACH_KEY.to_vec(), value).map_err(|e| self.error(e))?;
        }
        match catch_unwind(AssertUnwindSafe(|| self.engine.write(&mut batch, sync))) {
            // Only now: the mark is never ahead of what is durable.
            Ok(Ok(_)) if sync => self.watch.acknowledge(reach.writes).map_err(|reason| self.fail(reason)),
            Ok(Ok(_)) => Ok(()),
            // The engine has taken back what it wrote of the batch, and begun another file if it could;
            // what it was told to sync it has synced. Its memory holds nothing of the batch.
            Ok(Err(Error::Io(source))) if is_full(&source) => Err(self.full(source)),
            // The same, twice over: there was room for the other file's head, and no more.
            Ok(Err(Error::TryAgain(_))) => Err(self.full(ErrorKind::StorageFull.into())),
            Ok(Err(e)) => Err(self.fail(e.to_string())),
            Err(panic) => Err(self.fail(panic_text(panic.as_ref()))),
        }
    }

    fn full(&self, source: io::Error) -> StorageError {
        StorageError::Io { action: "writing to the raft log in", path: self.dir.clone(), source }
    }

    /// Frees files that hold nothing needed and names the groups that hold back the most. Whether any
    /// file was freed.
    pub fn purge(&self) -> Result<(Vec<u64>, bool), StorageError> {
        self.unless_failed()?;
        let _purge = self.purge.lock().unwrap_or_else(PoisonError::into_inner);
        let purged = self.at_home(|| {
            catch_unwind(AssertUnwindSafe(|| self.engine.purge_expired_files()))
                .map_err(|panic| panic_text(panic.as_ref()))
        });
        match purged {
            Ok(Ok(Ok(groups))) => Ok((groups, self.watch.purged(self.file_spans().map(|span| span.0)))),
            // A file must not go whose going the mark can't tell.
            Ok(Ok(Err(_))) if self.watch.failed().is_some() => {
                Err(self.fail(self.watch.failed().unwrap_or_default()))
            }
            // It rewrites what lies in the way, and couldn't read it.
            Ok(Ok(Err(e @ (Error::Corruption(_) | Error::Codec(_))))) => {
                let what = format!("the raft log in {}", self.dir.display());
                Err(StorageError::Damaged { what, detail: e.to_string() })
            }
            Ok(Ok(Err(e))) => Err(self.error(e)),
            Ok(Err(panic)) => Err(self.fail(panic)),
            Err(e) => Err(e),
        }
    }

    /// Reads through the engine.
    pub fn read<T: Send>(
        &self,
        read: impl Fn(&WatchedEngine<F>) -> raft_engine::Result<T> + Sync,
    ) -> Result<T, Unread> {
        let attempt = || {
            self.at_home(|| match catch_unwind(AssertUnwindSafe(|| read(&self.engine))) {
                Ok(read) => read.map_err(Unread::from),
                Err(panic) => Err(Unread { detail: panic_text(panic.as_ref()), damaged: true }),
            })
            .map_err(|e| Unread { detail: e.to_string(), damaged: false })?
        };
        // A purge would have to move the same entries again in between.
        (0..READS_BESIDE_PURGE).fold(attempt(), |read, _| read.or_else(|_| attempt())).or_else(|_| {
            let _purge = self.purge.lock().unwrap_or_else(PoisonError::into_inner);
            attempt()
        })
    }

    /// An error of the engine that leaves the log as it was.
    pub fn error(&self, error: Error) -> StorageError {
        StorageError::Engine { engine: ENGINE, reason: format!("{}: {error}", self.dir.display()) }
    }

    fn unless_failed(&self) -> Result<(), StorageError> {
        if self.failed.load(Ordering::Acquire) {
            return Err(self.fail("an earlier write or sync failed".into()));
        }
        Ok(())
    }

    fn fail(&self, reason: String) -> StorageError {
        self.failed.store(true, Ordering::Release);
        StorageError::SyncFailed { path: self.dir.clone(), reason }
    }

    /// Runs `read` on a thread whose block cache belongs to this engine.
    fn at_home<T: Send>(&self, read: impl FnOnce() -> T + Send) -> Result<T, StorageError> {
        let home = HOME.with(|home| {
            if home.get() == 0 {
                home.set(self.number);
            }
            home.get()
        });
        if home == self.number {
            return Ok(read());
        }
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new()
                .name("log-read".into())
                .spawn_scoped(scope, read)
                .map_err(|source| StorageError::Io {
                    action: "starting a thread to read",
                    path: self.dir.clone(),
                    source,
                })?;
            Ok(thread.join().unwrap_or_else(|panic| resume_unwind(panic)))
        })
    }
}

/// Opens the engine on files that are watched.
fn engine<F: FileSystem + 'static>(
    dir: &Path,
    config: Config,
    watch: &Arc<Watch<F>>,
) -> Result<WatchedEngine<F>, StorageError> {
    let (files, listener) = (Arc::new(WatchedFiles(watch.clone())), Arc::new(Listener(watch.clone())));
    let opened = catch_unwind(AssertUnwindSafe(|| Engine::open_with(config, files, vec![listener])));
    let damaged = |detail| super::refused(dir, detail);
    Err(match opened {
        Ok(Ok(engine)) => return Ok(engine),
        Ok(Err(Error::Corruption(detail))) => damaged(detail),
        Ok(Err(Error::Codec(e))) => damaged(e.to_string()),
        Ok(Err(Error::Io(source))) => match watch.refused_cut() {
            Some(detail) => damaged(detail),
            None => StorageError::Io { action: "opening the raft log in", path: dir.to_path_buf(), source },
        },
        // The engine has no error of its own for a lock that is held.
        Ok(Err(e)) if e.to_string().contains("lock file") => in_use(dir),
        Ok(Err(e)) => StorageError::Engine { engine: ENGINE, reason: e.to_string() },
        Err(panic) => damaged(panic_text(panic.as_ref())),
    })
}

/// Whether the log carries a store id: the caller's, or this is the error.
pub fn owner<F: FileSystem>(
    dir: &Path,
    engine: &WatchedEngine<F>,
    store_id: StoreId,
) -> Result<bool, StorageError> {
    let Some(value) = engine.get(CATALOGUE_GROUP, IDENTITY_KEY) else {
        return Ok(false);
    };
    let found = record::decode_identity(&value).map_err(|e| super::refused(dir, e))?;
    if found != store_id {
        let (path, found) = (dir.display().to_string(), found.to_string());
        return Err(IdentityError::ForeignStore { path, found, expected: store_id }.into());
    }
    Ok(true)
}

/// Whether a log that doesn't fit its mark is another node's. Looked at without a cut into its files, and
/// only if the engine would make none.
fn foreign<F: FileSystem + 'static>(
    dir: &Path,
    config: &Config,
    store_id: StoreId,
    file_system: Arc<F>,
) -> Option<IdentityError> {
    let files = check::list(dir).ok()?;
    if files.iter().any(|queue| queue.is_empty()) {
        return None;
    }
    let engine = engine(dir, config.clone(), &Watch::new(file_system, dir, Reach::MAX)).ok()?;
    match owner(dir, &engine, store_id) {
        Err(StorageError::Identity(foreign)) => Some(foreign),
        _ => None,
    }
}

/// Takes the engine's own lock, which it then takes itself: nobody may write to what is being checked.
fn lock(dir: &Path) -> Result<File, StorageError> {
    let path = dir.join("LOCK");
    let lock = File::create(&path).map_err(atomic_file::io_error("opening", &path))?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => Err(in_use(dir)),
        Err(TryLockError::Error(error)) => Err(atomic_file::io_error("locking", &path)(error)),
    }
}

fn in_use(dir: &Path) -> StorageError {
    IdentityError::InUse { path: dir.display().to_string(), holder: String::new() }.into()
}

/// What the log lacks, seen by the mark (`floor`) and by what the log says of itself.
fn missing(files: &check::Listing, floor: &Reach, record: Option<&Reach>) -> Result<(), String> {
    let record = record.copied().unwrap_or_default();
    if record.writes < floor.writes {
        return Err(format!(
            "its last write is number {}, but number {} was acknowledged",
            record.writes, floor.writes
        ));
    }
    // Either may be the later one to know that old files aren't needed any more: the mark if the power
    // went before the next write, the record if the mark is an old copy.
    let first = [0, 1].map(|q| floor.spans[q].first.max(record.spans[q].first));
    check::hole(files, first)?;
    check::compare(files, floor, first)?;
    check::compare(files, &record, first)
}

impl<F: FileSystem + 'static> Drop for EngineGuard<F> {
    fn drop(&mut self) {
        if !self.failed.load(Ordering::Acquire) {
            self.watch.close();
        }
        if self.failed.load(Ordering::Acquire) {
            // One reference for ever: see the head of this file.
            std::mem::forget(self.engine.clone());
        }
    }
}

/// Whether it is for want of space. The engine keeps the kind of a system's error, not its number.
fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded)
}

fn config(dir: &Path, options: DiskLogOptions) -> Result<Config, StorageError> {
    let refuse = |reason: String| StorageError::Engine { engine: ENGINE, reason };
    let name = dir
        .to_str()
        .ok_or_else(|| refuse(format!("the path {} isn't UTF-8; choose another", dir.display())))?;
    if options.file_bytes == 0 || options.purge_bytes < options.file_bytes {
        return Err(refuse(format!(
            "{} bytes for all files must allow for one of {} bytes",
            options.purge_bytes, options.file_bytes
        )));
    }
    // The engine prepares half as many files again as the limit has room for.
    let spare_files = options.spare_files as u64;
    let limit_files = (0..=spare_files).rev().find(|files| files * 3 / 2 <= spare_files).unwrap_or(0);
    Ok(Config {
        dir: name.to_owned(),
        recovery_mode: RecoveryMode::TolerateTailCorruption,
        recovery_threads: RECOVERY_THREADS,
        batch_compression_threshold: ReadableSize(0),
        target_file_size: ReadableSize(options.file_bytes),
        purge_threshold: ReadableSize(options.purge_bytes),
        prefill_for_recycle: limit_files > 0,
        prefill_limit: (limit_files > 0).then_some(ReadableSize(limit_files * options.file_bytes)),
        ..Config::default()
    })
}

/// What a caught panic said.
pub(crate) fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "panicked without a message".into())
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    const STORE: StoreId = crate::ids::RandomId([7; 16]);

    fn options(spare_files: usize) -> DiskLogOptions {
        DiskLogOptions { file_bytes: 4096, purge_bytes: 65536, spare_files }
    }

    #[test]
    fn no_more_spare_files_are_prepared_than_allowed() {
        for (allowed, prepared) in [(0, 0), (1, 1), (2, 1), (3, 3), (5, 4), (6, 6)] {
            let dir = tempfile::tempdir().unwrap();
            let file_system = Arc::new(raft_engine::env::DefaultFileSystem);
            let log = dir.path().join("log");
            std::fs::create_dir(&log).unwrap();
            let _engine = EngineGuard::open(&log, options(allowed), STORE, file_system).unwrap();
            let spare = std::fs::read_dir(&log)
                .unwrap()
                .filter(|file| {
                    let name = file.as_ref().unwrap().file_name();
                    name.to_string_lossy().ends_with(".reserved")
                })
                .count();
            assert_eq!(spare, prepared, "of {allowed} allowed");
        }
    }

    /// An arbiter may read; a purge takes as long as rewriting hundreds of megabytes does.
    #[test]
    fn a_read_that_a_purge_disturbed_does_not_wait_for_its_end() {
        const LONG: Duration = Duration::from_secs(10);
        let dir = tempfile::tempdir().unwrap();
        let file_system = Arc::new(raft_engine::env::DefaultFileSystem);
        let (guard, _) = EngineGuard::open(dir.path(), options(0), STORE, file_system).unwrap();
        let guard = Arc::new(guard);
        // The first so many tries find what they looked up moved away.
        let read = |moves: u64| {
            let (tell, told) = mpsc::channel();
            let guard = guard.clone();
            std::thread::spawn(move || {
                let tries = AtomicU64::new(0);
                tell.send(guard.read(|_| match tries.fetch_add(1, Ordering::Relaxed) {
                    this if this < moves => Err(Error::Corruption("moved".into())),
                    _ => Ok(7),
                }))
            });
            told
        };
        let purge = guard.purge.lock().unwrap();
        assert_eq!(read(2).recv_timeout(LONG), Ok(Ok(7)));
        // What goes on failing is tried with no purge beside it.
        let late = read(3);
        assert!(late.recv_timeout(Duration::from_millis(20)).is_err());
        drop(purge);
        assert_eq!(late.recv_timeout(LONG), Ok(Ok(7)));
    }

    #[test]
    fn impossible_options_are_errors() {
        let mut bad = options(0);
        bad.purge_bytes = 1;
        assert!(config(Path::new("log"), bad).is_err());
        bad.file_bytes = 0;
        assert!(config(Path::new("log"), bad).is_err());
    }
}
