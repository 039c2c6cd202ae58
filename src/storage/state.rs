//! One replica's state: an active memtable, frozen memtables on their way into the engine, and the
//! engine, newest first. Above the engine lies what is known of it without asking (`read_cache.rs`).
//!
//! ```text
//! put, delete ─► active ──freeze()──► frozen … frozen ──flush──► engine
//! sessions ───────────────┘               └──release(index)──► read cache ─► forgotten
//! ```
//!
//! The session table is held in memory as a whole, beside the layers; at a freeze the records of sessions
//! that changed join the frozen table. They are read back at the next opening only.
//!
//! Invariants: a key's value is what the newest of them that knows the key says; frozen tables are
//! ordered by applied index, strictly; each layer holds whole entries of the log only: what an
//! entry wrote is never split between the active table and a frozen one.
//!
//! Not promised: a scan on another thread isn't a snapshot of one moment. For each key it sees the
//! state at the time the reader was made or a later one, since a flush may bring later writes into
//! the engine while it reads.

use std::cell::Cell;
use std::ops::Bound;
use std::sync::Arc;

use bytes::Bytes;

use super::engine::{Engine, Mutation};
pub use super::header::{StateHeader, conf_state_of};
use super::memtable::Memtable;
use super::merge::{self, Layer};
use super::read_cache::ReadCache;
use super::sessions::SessionTable;
use super::{StateBatch, StateView, StorageError, keys};
use crate::ids::{Epoch, Index, Position, ReplicaId};
use crate::placement::map::Member;

/// A frozen memtable with the header that was true when it was frozen. Immutable.
#[derive(Debug)]
pub struct Frozen {
    /// Whose state.
    pub replica: ReplicaId,
    /// Install generation of its keys.
    pub generation: u32,
    /// The header after the last write in `table`.
    pub header: StateHeader,
    /// The writes.
    pub table: Arc<Memtable>,
    /// Records of the sessions that changed, by id.
    pub sessions: Memtable,
}

impl Frozen {
    /// Its parts, each with the kind of its keys; in the order of the engine's keys.
    pub fn parts(&self) -> [(u8, &Memtable); 2] {
        [(keys::KIND_USER, &*self.table), (keys::KIND_SESSION, &self.sessions)]
    }

    /// Everything in it as the engine gets it, sorted: the header first.
    pub fn mutations(&self) -> Vec<Mutation> {
        let (replica, generation) = (self.replica, self.generation);
        let header = (keys::header_key(replica, generation), Some(self.header.encode().into()));
        let changes = self.parts().into_iter().flat_map(|(kind, table)| {
            let key = move |key: &[u8]| keys::key_of_kind(replica, generation, kind, key);
            table.entries.iter().map(move |(of, value)| (key(of), value.clone()))
        });
        std::iter::once(header).chain(changes).collect()
    }

    /// Bytes of its tables, about.
    pub fn bytes(&self) -> usize {
        self.table.bytes + self.sessions.bytes
    }
}

/// One replica's state. Owned by its group; what other threads may use are [`Frozen`] tables and
/// [`StateReader`]s.
pub struct ReplicaState {
    replica: ReplicaId,
    generation: u32,
    header: StateHeader,
    /// Applied index of the newest frozen table, or of the engine if there never was one.
    frozen_to: Index,
    /// Something was written since `header.applied` moved: an entry is half applied.
    within_entry: bool,
    active: Memtable,
    sessions: SessionTable,
    /// Oldest first.
    frozen: Vec<Arc<Frozen>>,
    known: ReadCache,
    engine: Arc<dyn Engine>,
    /// Keys that this state's owner had to ask the engine for.
    engine_reads: Cell<u64>,
}

/// A handle that reads a replica's frozen tables and engine on another thread, where waiting for the
/// disk holds nobody up. From [`ReplicaState::reader`] for keys of which [`ReplicaState::lookup`]
/// says [`Lookup::AskEngine`], or from [`ReplicaState::scan_reader`] for one page of a scan.
#[derive(Clone)]
pub struct StateReader {
    /// Frozen tables, newest last.
    pub frozen: Vec<Arc<Frozen>>,
    /// The engine below.
    pub engine: Arc<dyn Engine>,
    /// Whose keys.
    pub replica: ReplicaId,
    /// Their generation.
    pub generation: u32,
    /// The shard's revision counter when the reader was made.
    revision: u64,
    /// Which state of the engine it reads, or a later one.
    stamp: u64,
    /// Copied from the active memtable for a scan.
    page: Option<PageCopy>,
}

/// The part of an active memtable that one page of a scan may need.
#[derive(Clone)]
struct PageCopy {
    recent: Memtable,
    /// The scan ends before this key; empty: at the last key.
    to: Vec<u8>,
    /// The last key that `recent` covers, if it doesn't cover all up to `to`.
    horizon: Option<Vec<u8>>,
}

/// What memory knows of a key.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Lookup {
    /// Written, removed or read recently.
    Known(Option<Bytes>),
    /// The engine must be asked, which may wait for the disk.
    AskEngine,
}

impl ReplicaState {
    /// Opens the state of a replica from the engine, or the empty state `initial` if the engine has
    /// none. Errors: the engine's; a header or session that can't be read is [`StorageError::Damaged`].
    pub fn open(
        engine: Arc<dyn Engine>,
        replica: ReplicaId,
        generation: u32,
        initial: StateHeader,
    ) -> Result<ReplicaState, StorageError> {
        let header = match engine.get(&keys::header_key(replica, generation))? {
            Some(bytes) => {
                StateHeader::decode(&bytes, &format!("state of replica {replica} (generation {generation})"))?
            }
            None => initial,
        };
        let sessions = load_sessions(&*engine, replica, generation, header.log_time)?;
        Ok(ReplicaState { sessions, ..ReplicaState::at(engine, replica, generation, header) })
    }

    /// A state of which nothing is known but where it should stand: that of a replica whose state is lost.
    /// Nothing of it may be read or written.
    pub fn at(
        engine: Arc<dyn Engine>,
        replica: ReplicaId,
        generation: u32,
        header: StateHeader,
    ) -> ReplicaState {
        ReplicaState {
            replica,
            generation,
            sessions: SessionTable::new(header.log_time),
            frozen_to: header.applied.index,
            header,
            within_entry: false,
            active: Memtable::default(),
            frozen: Vec::new(),
            known: ReadCache::default(),
            engine,
            engine_reads: Cell::new(0),
        }
    }

    /// Where the state stands.
    pub fn header(&self) -> &StateHeader {
        &self.header
    }

    /// Records that everything up to `position` is applied, writes included. It only grows.
    ///
    /// # Panics
    /// If it doesn't grow: an entry applied twice would diverge this replica from the others.
    pub fn set_applied(&mut self, position: Position) {
        assert!(
            position.index > self.header.applied.index && position.term >= self.header.applied.term,
            "applied must grow: {position:?} after {:?}",
            self.header.applied
        );
        self.header.applied = position;
        self.header.log_time = self.sessions.log_time();
        self.within_entry = false;
    }

    /// Records a new configuration, as applied by a conf change. It becomes durable with the next
    /// freeze after the applied index has moved.
    pub fn set_membership(&mut self, epoch: Epoch, members: Vec<Member>) {
        self.header.epoch = epoch;
        self.header.conf_state = conf_state_of(&members);
        self.header.members = members;
    }

    /// Clients' sessions.
    pub fn session_table(&self) -> &SessionTable {
        &self.sessions
    }

    /// Bytes that the next freeze takes and a flush frees, and those in frozen tables that the engine
    /// doesn't have yet. Sessions that haven't changed are in neither: flushing doesn't free them, and
    /// [`crate::machine::session`] bounds them.
    pub fn memory_bytes(&self) -> (usize, usize) {
        let active = self.active.bytes + self.sessions.changed_bytes();
        (active, self.frozen.iter().map(|frozen| frozen.bytes()).sum())
    }

    /// Freezes the active memtable for a flush. `None` if nothing was applied since the last freeze.
    /// An empty table is frozen too if the applied index has moved: its header lets the log go.
    ///
    /// # Panics
    /// If an entry is half applied: a crash after the flush would apply it a second time.
    pub fn freeze(&mut self) -> Option<Arc<Frozen>> {
        assert!(!self.within_entry, "freezing within an entry after {:?}", self.header.applied);
        if self.header.applied.index == self.frozen_to {
            return None;
        }
        let frozen = Arc::new(Frozen {
            replica: self.replica,
            generation: self.generation,
            header: self.header.clone(),
            table: Arc::new(std::mem::take(&mut self.active)),
            sessions: self.sessions.take_changes(),
        });
        self.frozen_to = self.header.applied.index;
        self.frozen.push(frozen.clone());
        Some(frozen)
    }

    /// The engine has every write of the frozen tables up to applied index `index`: forgets them, but for what
    /// there is room to know of the engine.
    pub fn release(&mut self, index: Index) {
        let absorbed = self.frozen.partition_point(|f| f.header.applied.index <= index);
        for frozen in self.frozen.drain(..absorbed) {
            self.known.absorb(frozen.table.clone());
        }
    }

    /// Says by how many bytes that may grow which is known of the engine, from here on.
    pub fn allow_known(&mut self, room: usize) {
        self.known.allow(room);
    }

    /// Bytes by which what is known of the engine may still grow.
    pub fn known_room(&self) -> usize {
        self.known.room()
    }

    /// Bytes of what is known of the engine: nobody needs them.
    pub fn known_bytes(&self) -> usize {
        self.known.bytes()
    }

    /// Forgets of the engine what wasn't asked for lately; called twice in a row, all of it.
    pub fn forget_known(&mut self) {
        self.known.forget_older();
    }

    /// Gives back the room that what it knows doesn't need: nothing happens to it for a while.
    pub fn shrink(&mut self) {
        self.sessions.shrink();
        self.frozen.shrink_to_fit();
    }

    /// Takes in what a reader with this [`StateReader::stamp`] was told by the engine of `key`.
    pub fn learn(&mut self, stamp: u64, key: &[u8], value: Option<Bytes>) {
        self.known.learn(stamp, key, value);
    }

    /// How often [`StateView::get`] had to ask the engine, which may wait for the disk.
    pub fn engine_reads(&self) -> u64 {
        self.engine_reads.get()
    }

    /// What memory knows of `key`, without touching the engine.
    pub fn lookup(&self, key: &[u8]) -> Lookup {
        self.written(key).or_else(|| self.known.get(key)).map_or(Lookup::AskEngine, Lookup::Known)
    }

    /// Like [`ReplicaState::lookup`], for a client: what is asked for is known for longer.
    pub fn recall(&mut self, key: &[u8]) -> Lookup {
        self.written(key).or_else(|| self.known.recall(key)).map_or(Lookup::AskEngine, Lookup::Known)
    }

    /// What the memtables know of `key`.
    fn written(&self, key: &[u8]) -> Option<Option<Bytes>> {
        self.active.get(key).or_else(|| lookup_frozen(&self.frozen, key))
    }

    /// A handle for reading frozen tables and engine on another thread.
    pub fn reader(&self) -> StateReader {
        StateReader {
            frozen: self.frozen.clone(),
            engine: self.engine.clone(),
            replica: self.replica,
            generation: self.generation,
            revision: self.header.revision,
            stamp: self.known.stamp(),
            page: None,
        }
    }

    /// A handle for one page of a scan on another thread: of keys in `[from, to)` (`to` empty: no
    /// upper bound), of which no more than `pairs` will be visited. Copies as much of the active
    /// memtable as can show up in such a page: `pairs` keys with values (the values are shared), and
    /// the removed keys between them.
    pub fn scan_reader(&self, from: Bound<&[u8]>, to: &[u8], pairs: usize) -> StateReader {
        let mut recent = Memtable::default();
        let mut horizon = None;
        let mut live = 0;
        for (key, value) in self.active.range(from, to) {
            recent.insert(key, value.clone());
            live += usize::from(value.is_some());
            if live >= pairs {
                // Every live key of the active table is in the result, whatever lies below: a page
                // of `pairs` ends here at the latest.
                horizon = Some(key.to_vec());
                break;
            }
        }
        StateReader { page: Some(PageCopy { recent, to: to.to_vec(), horizon }), ..self.reader() }
    }

    fn layers<'a>(&'a self, from: Bound<&[u8]>) -> Vec<Layer<'a>> {
        std::iter::once(&self.active)
            .chain(self.frozen.iter().rev().map(|f| &*f.table))
            .map(|table| merge::layer(table, from, &[]))
            .collect()
    }
}

#[cfg(feature = "test-hooks")]
impl ReplicaState {
    /// Test hook: changes the last byte of a value in the engine, behind everybody's back. False: the engine
    /// doesn't have the key.
    ///
    /// # Errors
    /// The engine's.
    pub fn alter(&self, key: &[u8]) -> Result<bool, StorageError> {
        let key = keys::user_key(self.replica, self.generation, key);
        let Some(mut value) = self.engine.get(&key)?.map(Vec::from) else {
            return Ok(false);
        };
        let Some(last) = value.last_mut() else {
            return Ok(false);
        };
        *last ^= 1;
        self.engine.write(&[(key, Some(value.into()))])?;
        Ok(true)
    }
}

impl StateView for ReplicaState {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StorageError> {
        match self.lookup(key) {
            Lookup::Known(value) => Ok(value),
            Lookup::AskEngine => {
                self.engine_reads.set(self.engine_reads.get() + 1);
                self.engine.get(&keys::user_key(self.replica, self.generation, key))
            }
        }
    }

    fn scan(
        &self,
        from: Bound<&[u8]>,
        visit: &mut dyn FnMut(&[u8], &Bytes) -> bool,
    ) -> Result<(), StorageError> {
        let range = merge::UserRange { replica: self.replica, generation: self.generation, from, to: &[] };
        merge::scan(self.layers(from), &*self.engine, range, visit)
    }

    fn revision(&self) -> u64 {
        self.header.revision
    }
}

impl StateBatch for ReplicaState {
    fn put(&mut self, key: &[u8], value: Bytes) {
        self.within_entry = true;
        self.active.insert(key, Some(value));
    }

    fn delete(&mut self, key: &[u8]) {
        self.within_entry = true;
        self.active.insert(key, None);
    }

    fn next_revision(&mut self) -> u64 {
        self.within_entry = true;
        self.header.revision += 1;
        self.header.revision
    }

    fn raise_revision(&mut self, least: u64) {
        self.within_entry = true;
        self.header.revision = self.header.revision.max(least);
    }

    fn sessions(&mut self) -> &mut SessionTable {
        self.within_entry = true;
        &mut self.sessions
    }
}

fn load_sessions(
    engine: &dyn Engine,
    replica: ReplicaId,
    generation: u32,
    log_time: u64,
) -> Result<SessionTable, StorageError> {
    let mut sessions = SessionTable::new(log_time);
    let from = keys::prefix(replica, generation, keys::KIND_SESSION);
    let to = keys::prefix(replica, generation, keys::KIND_SESSION + 1);
    let mut loaded = Ok(());
    engine.scan(Bound::Included(&from), &to, &mut |key, record| {
        loaded = sessions.load(&key[keys::PREFIX_BYTES..], &record);
        loaded.is_ok()
    })?;
    loaded.map(|()| sessions)
}

impl StateReader {
    /// Tells the state of which engine's state this reads ([`ReplicaState::learn`]).
    pub fn stamp(&self) -> u64 {
        self.stamp
    }

    /// The value of `key`, which must not be in the active memtable ([`Lookup::AskEngine`]).
    pub fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StorageError> {
        if let Some(known) = lookup_frozen(&self.frozen, key) {
            return Ok(known);
        }
        self.engine.get(&keys::user_key(self.replica, self.generation, key))
    }

    /// Calls `visit` with each pair from `from` on, in key order, until it returns false. Only for
    /// a reader from [`ReplicaState::scan_reader`], from there on, and no further than its page;
    /// else an error says so.
    pub fn scan(
        &self,
        from: Bound<&[u8]>,
        visit: &mut dyn FnMut(&[u8], &Bytes) -> bool,
    ) -> Result<(), StorageError> {
        let misuse = |reason: &str| StorageError::Engine { engine: "memtable", reason: reason.to_owned() };
        let Some(page) = &self.page else {
            return Err(misuse("a reader for single keys was asked to scan"));
        };
        let layers = std::iter::once(&page.recent)
            .chain(self.frozen.iter().rev().map(|f| &*f.table))
            .map(|table| merge::layer(table, from, &page.to))
            .collect();
        let range =
            merge::UserRange { replica: self.replica, generation: self.generation, from, to: &page.to };
        let mut overrun = false;
        merge::scan(layers, &*self.engine, range, &mut |key, value| {
            // Beyond the horizon the active table is not known: older layers would be taken for it.
            overrun = page.horizon.as_deref().is_some_and(|last| key > last);
            !overrun && visit(key, value)
        })?;
        if overrun {
            return Err(misuse("a scan went beyond the page it was opened for"));
        }
        Ok(())
    }
}

impl StateView for StateReader {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StorageError> {
        StateReader::get(self, key)
    }

    fn scan(
        &self,
        from: Bound<&[u8]>,
        visit: &mut dyn FnMut(&[u8], &Bytes) -> bool,
    ) -> Result<(), StorageError> {
        StateReader::scan(self, from, visit)
    }

    fn revision(&self) -> u64 {
        self.revision
    }
}

fn lookup_frozen(frozen: &[Arc<Frozen>], key: &[u8]) -> Option<Option<Bytes>> {
    frozen.iter().rev().find_map(|f| f.table.get(key))
}

#[cfg(test)]
#[path = "state_tests.rs"]
pub(crate) mod tests;
