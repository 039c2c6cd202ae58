//! Where the time of a traced batch goes, while it goes: its sheet, and the stamps of log writes.
//!
//! A batch that isn't traced has no sheet, and costs a look at an `Option`.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use crate::codec::trace::{FollowerTimes, FollowerTrace, Moment, Trace};
use crate::ids::ReplicaId;

/// What is known so far of one batch. Its service begins it, and takes it at the end; between, its replica and whoever
/// answers write on it.
#[derive(Debug)]
pub struct Sheet {
    began: Instant,
    trace: Mutex<Trace>,
}

/// When a log write was begun and done; written by the log writer.
#[derive(Debug)]
pub struct WriteStamps {
    /// When it was queued.
    pub queued: Instant,
    begun: OnceLock<Instant>,
    synced: OnceLock<Instant>,
}

impl Sheet {
    /// Of a call that arrived at `now`.
    pub fn begin(now: Instant) -> Arc<Sheet> {
        Arc::new(Sheet { began: now, trace: Mutex::default() })
    }

    /// That is `moment`, unless there was an earlier one.
    pub fn stamp(&self, moment: Moment, now: Instant) {
        self.open().stamp(moment, self.us(now));
    }

    /// That is `moment`, whatever there was before.
    pub fn stamp_last(&self, moment: Moment, now: Instant) {
        self.open().stamp_last(moment, self.us(now));
    }

    /// Its log write is known to be on disk.
    pub fn logged(&self, write: &WriteStamps, now: Instant) {
        let mut trace = self.open();
        let known = [
            (Moment::LogQueued, Some(write.queued)),
            (Moment::LogBegun, write.begun.get().copied()),
            (Moment::LogSynced, write.synced.get().copied()),
            (Moment::LogTold, Some(now)),
        ];
        for (moment, at) in known {
            if let Some(at) = at {
                trace.stamp(moment, self.us(at));
            }
        }
    }

    /// Its entry leaves for a follower, maybe not for the first time.
    pub fn sent(&self, replica: ReplicaId, now: Instant) {
        let mut trace = self.open();
        if trace.followers.iter().all(|follower| follower.replica != replica) {
            trace.followers.push(FollowerTrace { replica, sent_us: self.us(now), answered: None });
        }
    }

    /// A follower acknowledges it.
    pub fn acknowledged(&self, replica: ReplicaId, times: FollowerTimes, now: Instant) {
        let us = self.us(now);
        let mut trace = self.open();
        if let Some(follower) = trace.followers.iter_mut().find(|follower| follower.replica == replica) {
            follower.answered.get_or_insert((us, times));
        }
    }

    /// What is known now; the answer is made.
    pub fn end(&self, now: Instant) -> Trace {
        let mut trace = self.open();
        trace.stamp(Moment::Done, self.us(now));
        trace.clone()
    }

    fn us(&self, at: Instant) -> u32 {
        micros(self.began, at)
    }

    fn open(&self) -> MutexGuard<'_, Trace> {
        // No panic happens while it is held.
        self.trace.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl WriteStamps {
    /// Of a write that is queued at `now`.
    pub fn queued(now: Instant) -> Arc<WriteStamps> {
        Arc::new(WriteStamps { queued: now, begun: OnceLock::new(), synced: OnceLock::new() })
    }

    /// The log writer begins it. One that is tried again, because the disk was full, began at first.
    pub fn begin(&self, now: Instant) {
        self.begun.get_or_init(|| now);
    }

    /// It is on disk.
    pub fn synced(&self, now: Instant) {
        self.synced.get_or_init(|| now);
    }

    /// Since `since`: until it began, and then until it was on disk, in microseconds.
    pub fn times(&self, since: Instant) -> Option<(u32, u32)> {
        let (begun, synced) = (*self.begun.get()?, *self.synced.get()?);
        Some((micros(since, begun), micros(begun, synced)))
    }
}

/// Microseconds from one moment to a later one; none if it isn't later, and over an hour is all the same.
pub fn micros(from: Instant, to: Instant) -> u32 {
    u32::try_from(to.saturating_duration_since(from).as_micros()).unwrap_or(u32::MAX - 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_sheet_has_what_was_stamped_since_its_call() {
        let began = Instant::now();
        let at = |us| began + Duration::from_micros(us);
        let sheet = Sheet::begin(began);
        sheet.stamp(Moment::Submitted, at(5));
        sheet.stamp(Moment::Submitted, at(50));
        let write = WriteStamps::queued(at(20));
        assert_eq!(write.times(at(10)), None, "not yet on disk");
        write.begin(at(30));
        write.begin(at(35));
        write.synced(at(230));
        assert_eq!(write.times(at(10)), Some((20, 200)));
        sheet.logged(&write, at(240));
        sheet.sent(ReplicaId(2), at(21));
        sheet.sent(ReplicaId(3), at(22));
        sheet.sent(ReplicaId(2), at(90));
        let times = FollowerTimes { total_us: 150, log_us: Some((1, 140)) };
        sheet.acknowledged(ReplicaId(3), times, at(260));
        sheet.acknowledged(ReplicaId(9), times, at(261));
        sheet.stamp_last(Moment::Answered, at(262));
        sheet.stamp_last(Moment::Answered, at(263));
        let trace = sheet.end(at(270));
        let known: Vec<_> = Moment::ALL.into_iter().filter_map(|m| Some((m, trace.at(m)?))).collect();
        let expected = [
            (Moment::Submitted, 5),
            (Moment::LogQueued, 20),
            (Moment::LogBegun, 30),
            (Moment::LogSynced, 230),
            (Moment::LogTold, 240),
            (Moment::Answered, 263),
            (Moment::Done, 270),
        ];
        assert_eq!(known, expected);
        let followers = [(2, 21, None), (3, 22, Some((260, times)))];
        let followers = followers.map(|(replica, sent_us, answered)| FollowerTrace {
            replica: ReplicaId(replica),
            sent_us,
            answered,
        });
        assert_eq!(trace.followers, followers);
        // The clock of a thread may have been read a little before that of another.
        assert_eq!(micros(at(9), at(7)), 0);
    }
}
