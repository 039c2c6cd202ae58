//! The session table of one shard: what is remembered of each client session, so that a command that
//! arrives again doesn't take effect again.
//!
//! Which command gets through is [`crate::machine::session`]'s to say; this is the memory it has. The
//! table lies in memory as a whole. It changes with the entries that are applied, and is part of the
//! state like any key: at a freeze the sessions that changed become records, which reach the redo file
//! and the engine together with the header, and are read again when the state is opened.
//!
//! Its content, time included, depends on the applied entries alone. What is not content: in which
//! order the map holds the sessions, when their end is looked at next, and which of them changed since
//! the last freeze.
//!
//! ```text
//! record  = version(1 byte: 1)  lifetime  last use  acknowledged below  count  result{count}
//! result  = gap  kind(1 byte)  [revision]        gap: sequences left out since the result before,
//!                                                or since `acknowledged below`
//! kind    = 0 unchanged | 1 written, with its revision | 2 deleted, with its revision
//! ```
//!
//! All other numbers are varints; times are milliseconds.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap, VecDeque};

use bytes::Bytes;

use super::StorageError;
use super::memtable::{ENTRY_OVERHEAD_BYTES, Memtable};
use crate::codec::varint;
use crate::ids::SessionId;

const VERSION: u8 = 1;

const UNCHANGED: u8 = 0;
const WRITTEN: u8 = 1;
const DELETED: u8 = 2;

/// What a session costs beside its results, as a record on its way into the engine, about.
const SESSION_BYTES: usize = ENTRY_OVERHEAD_BYTES + 64;
/// What a result costs, about.
const RESULT_BYTES: usize = 24;

/// Room for so many results stays allocated while a session has fewer.
const ROOM_KEPT: usize = 256;

/// What a command came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SessionResult {
    /// It changed nothing: its condition failed, or there was nothing to delete.
    Unchanged,
    /// It wrote, at this revision.
    Written(u64),
    /// It deleted, at this revision.
    Deleted(u64),
}

/// One session.
#[derive(Clone, Debug)]
pub struct Session {
    lifetime_ms: u32,
    last_used: u64,
    acked_below: u64,
    /// In ascending order of sequences. Most commands come in order: appended, trimmed at the front.
    results: VecDeque<(u64, SessionResult)>,
    /// Its record in frozen tables and engine is out of date.
    changed: bool,
}

impl Session {
    /// The log time after which it ends if it isn't used.
    pub fn ends(&self) -> u64 {
        self.last_used.saturating_add(self.lifetime_ms.into())
    }

    /// Results below this sequence are forgotten.
    pub fn acked_below(&self) -> u64 {
        self.acked_below
    }

    /// How many results are remembered.
    pub fn results(&self) -> usize {
        self.results.len()
    }

    /// What the command with this sequence came to, if that is remembered.
    pub fn find(&self, sequence: u64) -> Option<SessionResult> {
        // A new command is usually the latest.
        if self.results.back().is_none_or(|(last, _)| *last < sequence) {
            return None;
        }
        let at = self.results.binary_search_by_key(&sequence, |(of, _)| *of).ok()?;
        Some(self.results[at].1)
    }

    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(24 + 4 * self.results.len());
        bytes.push(VERSION);
        let head = [self.lifetime_ms.into(), self.last_used, self.acked_below, self.results.len() as u64];
        head.into_iter().for_each(|number| varint::write(&mut bytes, number));
        let mut next = self.acked_below;
        for (sequence, result) in &self.results {
            varint::write(&mut bytes, sequence - next);
            next = sequence.wrapping_add(1); // Wraps behind the last possible result only.
            let (kind, revision) = match result {
                SessionResult::Unchanged => (UNCHANGED, None),
                SessionResult::Written(revision) => (WRITTEN, Some(*revision)),
                SessionResult::Deleted(revision) => (DELETED, Some(*revision)),
            };
            bytes.push(kind);
            if let Some(revision) = revision {
                varint::write(&mut bytes, revision);
            }
        }
        bytes
    }

    fn decode(mut bytes: &[u8]) -> Result<Session, String> {
        let from = &mut bytes;
        match byte(from)? {
            VERSION => {}
            other => return Err(format!("format {other}; this program reads {VERSION}")),
        }
        let lifetime_ms = u32::try_from(number(from)?).map_err(|_| "its lifetime is too long")?;
        let (last_used, acked_below, count) = (number(from)?, number(from)?, number(from)?);
        let mut results = VecDeque::new();
        let mut next = Some(acked_below);
        for _ in 0..count {
            let gap = number(from)?;
            let sequence = next.and_then(|next| next.checked_add(gap)).ok_or("a sequence is too great")?;
            next = sequence.checked_add(1);
            let result = match byte(from)? {
                UNCHANGED => SessionResult::Unchanged,
                WRITTEN => SessionResult::Written(number(from)?),
                DELETED => SessionResult::Deleted(number(from)?),
                other => return Err(format!("unknown kind of result {other}")),
            };
            results.push_back((sequence, result));
        }
        if !from.is_empty() {
            return Err("bytes follow its end".into());
        }
        Ok(Session { lifetime_ms, last_used, acked_below, results, changed: false })
    }
}

fn byte(from: &mut &[u8]) -> Result<u8, String> {
    let (&byte, rest) = from.split_first().ok_or("it ends early")?;
    *from = rest;
    Ok(byte)
}

fn number(from: &mut &[u8]) -> Result<u64, String> {
    let (number, taken) = varint::read(from).map_err(|error| error.to_string())?;
    *from = &from[taken..];
    Ok(number)
}

impl PartialEq for Session {
    fn eq(&self, other: &Session) -> bool {
        (self.lifetime_ms, self.last_used, self.acked_below, &self.results)
            == (other.lifetime_ms, other.last_used, other.acked_below, &other.results)
    }
}

impl Eq for Session {}

/// See the module page.
#[derive(Clone, Default, Debug)]
pub struct SessionTable {
    log_time: u64,
    sessions: HashMap<SessionId, Session>,
    /// Results of all sessions together.
    results: usize,
    /// When to look whether a session has ended: one item per session, never later than its end.
    due: BinaryHeap<Reverse<(u64, SessionId)>>,
    /// Sessions whose records are out of date: changed or ended since the last freeze.
    changed: Vec<SessionId>,
    /// Results of those of them that still exist.
    changed_results: usize,
}

impl PartialEq for SessionTable {
    fn eq(&self, other: &SessionTable) -> bool {
        (self.log_time, &self.sessions) == (other.log_time, &other.sessions)
    }
}

impl Eq for SessionTable {}

impl SessionTable {
    /// A table without sessions whose clock stands at `log_time`.
    pub fn new(log_time: u64) -> SessionTable {
        SessionTable { log_time, ..SessionTable::default() }
    }

    /// The greatest stamp of the log so far, in milliseconds: the time by which sessions end.
    pub fn log_time(&self) -> u64 {
        self.log_time
    }

    /// How many sessions there are.
    pub fn len(&self) -> usize {
        self.sessions.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.sessions.is_empty()
    }

    /// How many results of all sessions are remembered.
    pub fn results(&self) -> usize {
        self.results
    }

    /// Bytes that the next freeze will hand on, about.
    pub fn changed_bytes(&self) -> usize {
        self.changed.len() * SESSION_BYTES + self.changed_results * RESULT_BYTES
    }

    /// An entry with this stamp is applied: time passes, and sessions that weren't used for their
    /// lifetime end. Time never goes back.
    pub fn advance(&mut self, stamp: u64) {
        self.log_time = self.log_time.max(stamp);
        while let Some(Reverse((at, id))) = self.due.peek().copied()
            && at < self.log_time
        {
            self.due.pop();
            match self.sessions.get(&id).map(Session::ends) {
                Some(ends) if ends < self.log_time => self.remove(id),
                // Used since: looked at again when it would end now.
                Some(ends) => self.due.push(Reverse((ends, id))),
                None => {}
            }
        }
    }

    fn remove(&mut self, id: SessionId) {
        let Some(session) = self.sessions.remove(&id) else { return };
        self.results -= session.results.len();
        if session.changed {
            self.changed_results -= session.results.len();
        } else {
            self.changed.push(id);
        }
    }

    /// The session, if there is one.
    pub fn get(&self, id: SessionId) -> Option<&Session> {
        self.sessions.get(&id)
    }

    /// Makes the session, or gives it a longer lifetime. It ends this long after its last use.
    pub fn open(&mut self, id: SessionId, lifetime_ms: u32) {
        if let Some(session) = self.sessions.get_mut(&id) {
            // Whoever opens it uses it next, which makes its record be written again.
            session.lifetime_ms = session.lifetime_ms.max(lifetime_ms);
            return;
        }
        let (last_used, results) = (self.log_time, VecDeque::new());
        let session = Session { lifetime_ms, last_used, acked_below: 0, results, changed: true };
        self.due.push(Reverse((session.ends(), id)));
        self.changed.push(id);
        self.sessions.insert(id, session);
    }

    /// Notes that the session is used now, and forgets its results below `acked_below`, which never
    /// falls. Gives the session, if there is one.
    pub fn touch(&mut self, id: SessionId, acked_below: u64) -> Option<&Session> {
        let session = self.sessions.get_mut(&id)?;
        if !session.changed {
            session.changed = true;
            self.changed.push(id);
            self.changed_results += session.results.len();
        }
        session.last_used = self.log_time;
        session.acked_below = session.acked_below.max(acked_below);
        let before = session.results.len();
        while session.results.front().is_some_and(|(sequence, _)| *sequence < session.acked_below) {
            session.results.pop_front();
        }
        let forgotten = before - session.results.len();
        // What a burst needed is not kept for ever: the bound of all results is one of memory too.
        if forgotten > 0 && session.results.capacity() > ROOM_KEPT.max(8 * session.results.len()) {
            session.results.shrink_to((2 * session.results.len()).max(ROOM_KEPT));
        }
        self.results -= forgotten;
        self.changed_results -= forgotten;
        Some(session)
    }

    /// Remembers what a command of the session came to. The session has been touched for it, and
    /// doesn't know the sequence.
    pub fn remember(&mut self, id: SessionId, sequence: u64, result: SessionResult) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        debug_assert!(session.changed && sequence >= session.acked_below, "touched before");
        let at = match session.results.back() {
            Some((last, _)) if *last >= sequence => session.results.partition_point(|(of, _)| *of < sequence),
            _ => session.results.len(),
        };
        session.results.insert(at, (sequence, result));
        self.results += 1;
        self.changed_results += 1;
    }

    /// The records that are out of date, as they should be: a session's, or `None` for one that
    /// ended. From here on only later changes count.
    pub fn take_changes(&mut self) -> Memtable {
        let mut records = Memtable::default();
        for id in std::mem::take(&mut self.changed) {
            let record = self.sessions.get_mut(&id).map(|session| {
                session.changed = false;
                Bytes::from(session.encode())
            });
            records.insert(&id.0, record);
        }
        self.changed_results = 0;
        records
    }

    /// Gives back the room of sessions and results that are no more.
    pub fn shrink(&mut self) {
        self.sessions.shrink_to_fit();
        self.sessions.values_mut().for_each(|session| session.results.shrink_to_fit());
        self.due.shrink_to_fit();
        self.changed.shrink_to_fit();
    }

    /// Takes in a record, when the state is opened.
    pub fn load(&mut self, id: &[u8], record: &[u8]) -> Result<(), StorageError> {
        let damaged =
            |detail| StorageError::Damaged { what: format!("session {}", id.escape_ascii()), detail };
        let id =
            SessionId::from_slice(id).ok_or_else(|| damaged(format!("its id has {} bytes", id.len())))?;
        let session = Session::decode(record).map_err(damaged)?;
        self.results += session.results.len();
        self.due.push(Reverse((session.ends(), id)));
        self.sessions.insert(id, session);
        Ok(())
    }

    /// Every session's record, in the order of ids: the content of the table, as bytes.
    pub fn records(&self) -> BTreeMap<SessionId, Vec<u8>> {
        self.sessions.iter().map(|(id, session)| (*id, session.encode())).collect()
    }
}

#[cfg(test)]
#[path = "sessions_tests.rs"]
mod tests;
