//! Snapshots on their way in: one partial file per replica, which outlives the connection that
//! brought it, and the process. Bounded in number and in bytes.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::LocalBoxFuture;

use crate::codec::snapshot::{SnapshotAnswer, SnapshotOffer};
use crate::failpoints::failpoint;
use crate::ids::{ReplicaId, ShardId};
use crate::limits::{
    SNAPSHOT_BUSY_MS, SNAPSHOT_FILES_BYTES_MAX, SNAPSHOT_PART_MS_MAX, SNAPSHOTS_RECEIVED_MAX,
};
use crate::storage::StorageError;
use crate::storage::snapshot_dir::{Partial, SnapshotDir};
use crate::transport::snapshot::receiver::SnapshotSink;

/// See the module page. All methods but [`Inbox::receives`] may wait for the disk.
#[derive(Clone)]
pub struct Inbox(Arc<Shared>);

struct Shared {
    dir: SnapshotDir,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Running transfers: the whole size of what each receives.
    receiving: BTreeMap<ReplicaId, u64>,
    /// Parts that nobody adds to, and since when that is known.
    idle: BTreeMap<(ShardId, ReplicaId), Instant>,
}

impl State {
    fn takes(&self, offer: &SnapshotOffer) -> bool {
        let bytes = self.receiving.values().fold(offer.bytes, |sum, bytes| sum.saturating_add(*bytes));
        // A connection that has just been lost may not have ended here yet: one per replica.
        !self.receiving.contains_key(&offer.to)
            && self.receiving.len() < SNAPSHOTS_RECEIVED_MAX
            && bytes <= SNAPSHOT_FILES_BYTES_MAX
    }
}

/// A snapshot being received or installed; while it lives, no other transfer to its replica begins.
/// Dropped, it leaves what is there for the next one.
pub struct Part {
    offer: SnapshotOffer,
    partial: Partial,
    reservation: Reservation,
}

/// The place of a transfer among the running ones.
struct Reservation {
    shared: Arc<Shared>,
    replica: ReplicaId,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.shared.state().receiving.remove(&self.replica);
    }
}

impl Shared {
    /// Taken as it is if a panic poisoned it: no two steps on it belong together.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn discard(&self, shard: ShardId, replica: ReplicaId) {
        if let Err(error) = self.dir.discard(shard, replica) {
            tracing::warn!(%shard, %replica, %error, "a part of a snapshot stays");
        }
    }
}

impl Inbox {
    /// Takes snapshots into a directory.
    pub fn new(dir: SnapshotDir) -> Inbox {
        Inbox(Arc::new(Shared { dir, state: Mutex::default() }))
    }

    /// Whether a snapshot for this replica is being received or installed.
    pub fn receives(&self, replica: ReplicaId) -> bool {
        self.0.state().receiving.contains_key(&replica)
    }

    /// Begins or goes on to receive what is offered. Inside an error: what to answer.
    pub fn begin(&self, offer: &SnapshotOffer) -> Result<Part, SnapshotAnswer> {
        if offer.bytes > SNAPSHOT_FILES_BYTES_MAX {
            return Err(SnapshotAnswer::Refused(format!(
                "a snapshot of {} bytes, a node takes {SNAPSHOT_FILES_BYTES_MAX} at most",
                offer.bytes
            )));
        }
        let reservation = {
            let mut state = self.0.state();
            if !state.takes(offer) {
                return Err(busy());
            }
            state.receiving.insert(offer.to, offer.bytes);
            Reservation { shared: self.0.clone(), replica: offer.to }
        };
        let receive = || self.0.dir.receive(offer.shard, offer.to, offer.stream, offer.bytes);
        let received = receive().or_else(|error| {
            // Others' parts give way to one that somebody wants to send now.
            tracing::info!(replica = %offer.to, %error, "making room for a snapshot");
            self.remove_idle(|_, _| true)?;
            receive()
        });
        match received {
            Ok(partial) => Ok(Part { offer: *offer, partial, reservation }),
            Err(error) => {
                tracing::warn!(replica = %offer.to, %error, "no place for a snapshot");
                Err(busy())
            }
        }
    }

    /// Removes what is there for a replica that doesn't need it any more.
    ///
    /// # Errors
    /// The disk.
    pub fn forget(&self, replica: ReplicaId) -> Result<(), StorageError> {
        self.remove_idle(|found, _| found == replica)
    }

    /// Removes parts that nobody has added to for long, as of `now`. To be called now and then.
    ///
    /// # Errors
    /// The disk.
    pub fn expire(&self, now: Instant) -> Result<(), StorageError> {
        let age = Duration::from_millis(SNAPSHOT_PART_MS_MAX);
        self.remove_idle(|_, since| since.is_some_and(|since| now.saturating_duration_since(since) > age))?;
        let parts = self.0.dir.received()?;
        let mut state = self.0.state();
        let known = std::mem::take(&mut state.idle);
        for part in parts {
            if !state.receiving.contains_key(&part.1) {
                let since = known.get(&part).copied().unwrap_or(now);
                state.idle.insert(part, since);
            }
        }
        Ok(())
    }

    fn remove_idle(&self, which: impl Fn(ReplicaId, Option<Instant>) -> bool) -> Result<(), StorageError> {
        let parts = self.0.dir.received()?;
        // Held until they are removed: no transfer may go on with one of them meanwhile.
        let mut state = self.0.state();
        for (shard, replica) in parts {
            let since = state.idle.get(&(shard, replica)).copied();
            if !state.receiving.contains_key(&replica) && which(replica, since) {
                self.0.dir.discard(shard, replica)?;
                state.idle.remove(&(shard, replica));
            }
        }
        Ok(())
    }
}

fn busy() -> SnapshotAnswer {
    SnapshotAnswer::Busy { retry_after_ms: SNAPSHOT_BUSY_MS }
}

impl Part {
    /// What it is a part of.
    pub fn offer(&self) -> &SnapshotOffer {
        &self.offer
    }

    /// The file. Whole once [`Part::is_whole`], and even then not yet checked.
    pub fn path(&self) -> &Path {
        self.partial.path()
    }

    /// Bytes that are there.
    pub fn offset(&self) -> u64 {
        self.partial.offset()
    }

    /// Whether all bytes are there.
    pub fn is_whole(&self) -> bool {
        self.partial.is_complete()
    }

    /// Appends the next bytes. Inside an error: what to answer. Nothing may be appended after one; what
    /// is there is looked through when it is gone on with.
    pub fn append(&mut self, data: &[u8]) -> Result<(), SnapshotAnswer> {
        failpoint!(SnapshotReceive, self.offer.to, why => {
            tracing::warn!(replica = %self.offer.to, why, "receiving a snapshot");
            return Err(busy());
        });
        self.partial.append(self.partial.offset(), data).map_err(|error| {
            tracing::warn!(replica = %self.offer.to, %error, "receiving a snapshot");
            busy()
        })
    }

    /// Removes the file: it was used, or can't be.
    pub fn discard(self) {
        self.reservation.shared.discard(self.offer.shard, self.offer.to);
    }
}

/// What becomes of a whole file.
pub type Finish = Box<dyn FnOnce(Part) -> LocalBoxFuture<'static, SnapshotAnswer>>;

/// A part as the sink of a connection; the disk is waited for on threads made for that.
pub struct PartSink {
    /// `None` while a write is under way, and for ever after one has failed.
    part: Option<Part>,
    offset: u64,
    finish: Finish,
}

impl PartSink {
    /// Bytes go into `part`; the whole goes to `finish`.
    pub fn new(part: Part, finish: Finish) -> PartSink {
        PartSink { offset: part.offset(), part: Some(part), finish }
    }
}

impl SnapshotSink for PartSink {
    fn offset(&self) -> u64 {
        self.offset
    }

    fn write(&mut self, data: Bytes) -> LocalBoxFuture<'_, Result<(), SnapshotAnswer>> {
        Box::pin(async move {
            let mut part = self.part.take().ok_or_else(busy)?;
            // The part goes along: if the connection is lost meanwhile, it is free once this is done.
            let append = move || part.append(&data).map(|()| part);
            let part = tokio::task::spawn_blocking(append).await.map_err(|_| busy())??;
            self.offset = part.offset();
            self.part = Some(part);
            Ok(())
        })
    }

    fn finish(mut self: Box<Self>) -> LocalBoxFuture<'static, SnapshotAnswer> {
        match self.part.take() {
            Some(part) => (self.finish)(part),
            None => Box::pin(std::future::ready(busy())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{Epoch, Position, RandomId};

    const BYTES_MAX: u64 = 1000;

    fn offer(to: u64, bytes: u64) -> SnapshotOffer {
        SnapshotOffer {
            stream: RandomId([1; 16]),
            shard: ShardId(1),
            from: ReplicaId(99),
            to: ReplicaId(to),
            epoch: Epoch::default(),
            position: Position { index: 7, term: 6 },
            leader_term: 6,
            bytes,
        }
    }

    fn inbox(dir: &Path) -> Inbox {
        Inbox::new(SnapshotDir::open(dir, BYTES_MAX).unwrap())
    }

    fn parts(inbox: &Inbox) -> Vec<u64> {
        inbox.0.dir.received().unwrap().iter().map(|(_, replica)| replica.0).collect()
    }

    #[test]
    fn transfers_are_bounded_and_one_per_replica() {
        let dir = tempfile::tempdir().unwrap();
        let inbox = inbox(dir.path());
        let great = offer(1, SNAPSHOT_FILES_BYTES_MAX + 1);
        assert!(matches!(inbox.begin(&great), Err(SnapshotAnswer::Refused(_))));
        let one = inbox.begin(&offer(1, 10)).unwrap();
        assert!(inbox.receives(ReplicaId(1)));
        assert_eq!(inbox.begin(&offer(1, 10)).err(), Some(busy()), "the same again");
        let others: Vec<_> =
            (2..=SNAPSHOTS_RECEIVED_MAX as u64).map(|to| inbox.begin(&offer(to, 10)).unwrap()).collect();
        assert_eq!(inbox.begin(&offer(50, 10)).err(), Some(busy()), "too many");
        drop((one, others));
        assert!(!inbox.receives(ReplicaId(1)));
        assert!(inbox.begin(&offer(50, 10)).is_ok());
    }

    #[test]
    fn idle_parts_give_way_to_one_that_is_sent_now() {
        let dir = tempfile::tempdir().unwrap();
        let inbox = inbox(dir.path());
        inbox.begin(&offer(1, 600)).unwrap().append(&[7; 600]).unwrap();
        let running = inbox.begin(&offer(2, 100)).unwrap();
        assert_eq!(parts(&inbox), [1, 2]);
        assert!(inbox.begin(&offer(3, 700)).is_ok());
        assert_eq!(parts(&inbox), [2, 3], "not the one that is being received");
        drop(running);
        assert_eq!(inbox.begin(&offer(4, BYTES_MAX + 1)).err(), Some(busy()), "nothing helps");
    }

    #[test]
    fn parts_expire_and_are_forgotten_unless_they_are_in_use() {
        let dir = tempfile::tempdir().unwrap();
        let inbox = inbox(dir.path());
        let now = Instant::now();
        let late = now + Duration::from_millis(SNAPSHOT_PART_MS_MAX + 1);
        let part = inbox.begin(&offer(1, 10)).unwrap();
        inbox.expire(now).unwrap();
        inbox.expire(late).unwrap();
        inbox.forget(ReplicaId(1)).unwrap();
        assert_eq!(parts(&inbox), [1]);
        drop(part);
        inbox.expire(late).unwrap();
        assert_eq!(parts(&inbox), [1], "idle from now on");
        drop(inbox.begin(&offer(2, 10)).unwrap());
        inbox.forget(ReplicaId(2)).unwrap();
        assert_eq!(parts(&inbox), [1]);
        inbox.expire(late + (late - now)).unwrap();
        assert!(parts(&inbox).is_empty());
    }

    #[test]
    fn a_used_file_goes() {
        let dir = tempfile::tempdir().unwrap();
        let inbox = inbox(dir.path());
        let mut part = inbox.begin(&offer(1, 10)).unwrap();
        part.append(&[7; 10]).unwrap();
        assert!(part.is_whole());
        part.discard();
        assert!(parts(&inbox).is_empty());
        assert!(!inbox.receives(ReplicaId(1)));
    }
}
