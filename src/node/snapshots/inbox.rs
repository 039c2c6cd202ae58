//! Snapshots on their way in: one partial file per replica, which outlives the connection that
//! brought it, and the process. Bounded in number and in bytes.
//!
//! A part is named by its replica and by the stream it is a part of; its length is what is there of
//! it. Nothing is synced: after a power loss a part may hold what was never written, which shows
//! when the whole file is checked, and costs one transfer. What is received is only a copy.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::future::LocalBoxFuture;

use crate::codec::snapshot::{SnapshotAnswer, SnapshotOffer};
use crate::ids::{RandomId, ReplicaId, StreamId};
use crate::limits::{
    SNAPSHOT_BUSY_MS, SNAPSHOT_PART_MS_MAX, SNAPSHOTS_RECEIVED_BYTES_MAX, SNAPSHOTS_RECEIVED_MAX,
};
use crate::transport::snapshot::receiver::SnapshotSink;

/// Ending of a part's name.
const PART: &str = "part";

/// How much may come in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct InboxBounds {
    /// Transfers at a time.
    pub transfers: usize,
    /// Bytes of all parts, counting those of running transfers as if they were whole.
    pub bytes: u64,
    /// A part that nobody has added to for so long is removed.
    pub age: Duration,
}

impl Default for InboxBounds {
    fn default() -> InboxBounds {
        InboxBounds {
            transfers: SNAPSHOTS_RECEIVED_MAX,
            bytes: SNAPSHOTS_RECEIVED_BYTES_MAX,
            age: Duration::from_millis(SNAPSHOT_PART_MS_MAX),
        }
    }
}

/// See the module page. All methods may wait for the disk.
#[derive(Clone)]
pub struct Inbox {
    shared: Arc<Shared>,
}

struct Shared {
    dir: PathBuf,
    bounds: InboxBounds,
    /// Running transfers: the whole size of what each receives.
    receiving: Mutex<BTreeMap<ReplicaId, u64>>,
}

/// A snapshot being received; while it lives, no other transfer to its replica begins. Dropped, it
/// leaves the part for the next one.
pub struct Part {
    offer: SnapshotOffer,
    path: PathBuf,
    file: File,
    at: u64,
    _reservation: Reservation,
}

/// The place of a transfer among the running ones.
struct Reservation {
    shared: Arc<Shared>,
    replica: ReplicaId,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.shared.receiving().remove(&self.replica);
    }
}

/// A part on disk.
struct Found {
    replica: ReplicaId,
    stream: StreamId,
    path: PathBuf,
    bytes: u64,
    changed: SystemTime,
}

impl Shared {
    /// Taken as it is if a panic poisoned it: no two steps on it belong together.
    fn receiving(&self) -> MutexGuard<'_, BTreeMap<ReplicaId, u64>> {
        self.receiving.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inbox {
    /// Uses a directory of its own, created if need be. Removes from it what is no part.
    ///
    /// # Errors
    /// The directory can't be created or read.
    pub fn open(dir: PathBuf, bounds: InboxBounds) -> io::Result<Inbox> {
        fs::create_dir_all(&dir)?;
        for entry in fs::read_dir(&dir)? {
            let path = entry?.path();
            if parse(&path).is_none() {
                tracing::info!(file = %path.display(), "removing what is no part of a snapshot");
                fs::remove_file(&path)?;
            }
        }
        Ok(Inbox { shared: Arc::new(Shared { dir, bounds, receiving: Mutex::default() }) })
    }

    /// Begins or goes on to receive what is offered. Inside an error: what to answer.
    pub fn begin(&self, offer: &SnapshotOffer) -> Result<Part, SnapshotAnswer> {
        let reservation = self.reserve(offer)?;
        let opened = self.make_room(offer).and_then(|()| self.open_part(offer));
        match opened {
            Ok((path, file, at)) => Ok(Part { offer: *offer, path, file, at, _reservation: reservation }),
            Err(error) => {
                tracing::warn!(replica = %offer.to, %error, "no place for a snapshot");
                Err(busy())
            }
        }
    }

    fn reserve(&self, offer: &SnapshotOffer) -> Result<Reservation, SnapshotAnswer> {
        let bounds = self.shared.bounds;
        if offer.bytes > bounds.bytes {
            return Err(SnapshotAnswer::Refused(format!(
                "a snapshot of {} bytes, this node takes {} at most",
                offer.bytes, bounds.bytes
            )));
        }
        let mut receiving = self.shared.receiving();
        let bytes = receiving.values().fold(offer.bytes, |sum, bytes| sum.saturating_add(*bytes));
        // A connection that has just been lost may not have ended here yet.
        if receiving.contains_key(&offer.to) || receiving.len() >= bounds.transfers || bytes > bounds.bytes {
            return Err(busy());
        }
        receiving.insert(offer.to, offer.bytes);
        Ok(Reservation { shared: self.shared.clone(), replica: offer.to })
    }

    /// Removes other streams' parts of the same replica, then as many of the oldest idle parts as
    /// the bound demands.
    fn make_room(&self, offer: &SnapshotOffer) -> io::Result<()> {
        let mut idle = Vec::new();
        for found in self.parts()? {
            if found.replica != offer.to {
                idle.push(found);
            } else if found.stream != offer.stream {
                remove(&found.path)?;
            }
        }
        // Held until they are removed: no transfer may go on with one of them meanwhile.
        let receiving = self.shared.receiving();
        idle.retain(|found| !receiving.contains_key(&found.replica));
        idle.sort_by_key(|found| found.changed);
        let mut bytes: u64 =
            receiving.values().sum::<u64>() + idle.iter().map(|found| found.bytes).sum::<u64>();
        for found in idle {
            if bytes <= self.shared.bounds.bytes {
                break;
            }
            remove(&found.path)?;
            bytes -= found.bytes;
        }
        Ok(())
    }

    fn open_part(&self, offer: &SnapshotOffer) -> io::Result<(PathBuf, File, u64)> {
        let path = self.shared.dir.join(format!("{}-{}.{PART}", offer.to, offer.stream));
        let file =
            File::options().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path)?;
        let mut at = file.metadata()?.len();
        if at > offer.bytes {
            file.set_len(0)?;
            at = 0;
        }
        Ok((path, file, at))
    }

    /// Removes what is there for a replica that needs it no more.
    ///
    /// # Errors
    /// The disk.
    pub fn forget(&self, replica: ReplicaId) -> io::Result<()> {
        self.remove_idle(|found| found.replica == replica)
    }

    /// Removes parts that nobody has added to for long.
    ///
    /// # Errors
    /// The disk.
    pub fn expire(&self) -> io::Result<()> {
        let now = SystemTime::now();
        let age = self.shared.bounds.age;
        // A clock that was set back makes a part young, which does no harm.
        self.remove_idle(|found| now.duration_since(found.changed).is_ok_and(|since| since > age))
    }

    fn remove_idle(&self, which: impl Fn(&Found) -> bool) -> io::Result<()> {
        let parts = self.parts()?;
        let receiving = self.shared.receiving();
        parts
            .iter()
            .filter(|found| which(found) && !receiving.contains_key(&found.replica))
            .try_for_each(|found| remove(&found.path))
    }

    fn parts(&self) -> io::Result<Vec<Found>> {
        let mut parts = Vec::new();
        for entry in fs::read_dir(&self.shared.dir)? {
            let entry = entry?;
            let path = entry.path();
            let Some((replica, stream)) = parse(&path) else {
                continue;
            };
            // One that a transfer has just removed.
            let metadata = match entry.metadata() {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                metadata => metadata?,
            };
            parts.push(Found { replica, stream, path, bytes: metadata.len(), changed: metadata.modified()? });
        }
        Ok(parts)
    }
}

fn busy() -> SnapshotAnswer {
    SnapshotAnswer::Busy { retry_after_ms: SNAPSHOT_BUSY_MS }
}

/// Which replica and stream a file is a part for.
fn parse(path: &Path) -> Option<(ReplicaId, StreamId)> {
    let name = path.file_name()?.to_str()?.strip_suffix(PART)?.strip_suffix('.')?;
    let (replica, stream) = name.split_once('-')?;
    if stream.len() != 32 || !stream.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let stream = u128::from_str_radix(stream, 16).ok()?;
    Some((ReplicaId(replica.parse().ok()?), RandomId(stream.to_be_bytes())))
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

impl Part {
    /// What it is a part of.
    pub fn offer(&self) -> &SnapshotOffer {
        &self.offer
    }

    /// The file. Whole once [`Part::is_whole`], and even then not yet checked.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes that are there.
    pub fn offset(&self) -> u64 {
        self.at
    }

    /// Whether all bytes are there.
    pub fn is_whole(&self) -> bool {
        self.at == self.offer.bytes
    }

    /// Appends the next bytes. Inside an error: what to answer; the part is then as it was before.
    pub fn write(&mut self, data: &[u8]) -> Result<(), SnapshotAnswer> {
        if let Err(error) = self.file.write_all_at(data, self.at) {
            tracing::warn!(file = %self.path.display(), %error, "writing a part of a snapshot");
            if let Err(error) = self.file.set_len(self.at) {
                tracing::warn!(file = %self.path.display(), %error, "cutting a part of a snapshot");
            }
            return Err(busy());
        }
        self.at += data.len() as u64;
        Ok(())
    }

    /// Removes the file: it was used, or can't be.
    pub fn discard(self) {
        if let Err(error) = remove(&self.path) {
            tracing::warn!(file = %self.path.display(), %error, "a part of a snapshot stays");
        }
    }
}

/// What becomes of a whole file.
pub type Finish = Box<dyn FnOnce(Part) -> LocalBoxFuture<'static, SnapshotAnswer>>;

/// A part as the sink of a connection; the disk is waited for on threads made for that.
pub struct PartSink {
    /// `None` while a write is under way, and for ever if it was given up.
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
            // Only a connection that goes on after a failed write would find none.
            let mut part = self.part.take().ok_or_else(busy)?;
            let write = move || {
                let written = part.write(&data);
                (part, written)
            };
            // The part goes along: if the connection is lost meanwhile, it is free once this write is done.
            let (part, written) = tokio::task::spawn_blocking(write).await.map_err(|_| busy())?;
            self.offset = part.offset();
            self.part = Some(part);
            written
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
    use crate::ids::{Epoch, Position, ShardId};

    fn offer(to: u64, stream: u8, bytes: u64) -> SnapshotOffer {
        SnapshotOffer {
            stream: RandomId([stream; 16]),
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
        let bounds = InboxBounds { transfers: 2, bytes: 100, age: Duration::from_secs(3600) };
        Inbox::open(dir.join("in"), bounds).unwrap()
    }

    fn files(dir: &Path) -> usize {
        fs::read_dir(dir.join("in")).unwrap().count()
    }

    #[test]
    fn a_part_survives_its_connection_and_the_process_but_not_another_stream() {
        let dir = tempfile::tempdir().unwrap();
        let first = inbox(dir.path());
        let mut part = first.begin(&offer(1, 1, 50)).unwrap();
        assert_eq!(part.offset(), 0);
        part.write(&[7; 30]).unwrap();
        assert!(!part.is_whole());
        drop(part);
        drop(first);
        let again = inbox(dir.path());
        let mut part = again.begin(&offer(1, 1, 50)).unwrap();
        assert_eq!(part.offset(), 30);
        part.write(&[8; 20]).unwrap();
        assert!(part.is_whole());
        let bytes = fs::read(part.path()).unwrap();
        assert_eq!((&bytes[..30], &bytes[30..]), (&[7; 30][..], &[8; 20][..]));
        drop(part);
        let part = again.begin(&offer(1, 2, 50)).unwrap();
        assert_eq!(part.offset(), 0, "another stream begins anew");
        assert_eq!(files(dir.path()), 1, "and replaces what was there");
        part.discard();
        assert_eq!(files(dir.path()), 0);
    }

    #[test]
    fn a_part_that_is_longer_than_the_offer_is_not_believed() {
        let dir = tempfile::tempdir().unwrap();
        let inbox = inbox(dir.path());
        inbox.begin(&offer(1, 1, 50)).unwrap().write(&[7; 50]).unwrap();
        assert_eq!(inbox.begin(&offer(1, 1, 20)).unwrap().offset(), 0);
    }

    #[test]
    fn transfers_and_bytes_are_bounded_and_the_oldest_idle_part_gives_way() {
        let dir = tempfile::tempdir().unwrap();
        let inbox = inbox(dir.path());
        assert!(matches!(inbox.begin(&offer(1, 1, 101)), Err(SnapshotAnswer::Refused(_))));
        let mut one = inbox.begin(&offer(1, 1, 40)).unwrap();
        assert_eq!(inbox.begin(&offer(1, 1, 40)).err(), Some(busy()), "one transfer per replica");
        assert_eq!(inbox.begin(&offer(2, 1, 61)).err(), Some(busy()), "bytes");
        let two = inbox.begin(&offer(2, 1, 60)).unwrap();
        assert_eq!(inbox.begin(&offer(3, 1, 1)).err(), Some(busy()), "transfers");
        drop(two);
        one.write(&[1; 40]).unwrap();
        let old = SystemTime::now() - Duration::from_secs(60);
        one.file.set_modified(old).unwrap();
        drop(one);
        inbox.begin(&offer(2, 1, 60)).unwrap().write(&[2; 60]).unwrap();
        assert_eq!(files(dir.path()), 2);
        let third = inbox.begin(&offer(3, 1, 10)).unwrap();
        assert_eq!(files(dir.path()), 2, "the older of two idle parts made room");
        drop(third);
        assert_eq!(inbox.begin(&offer(2, 1, 60)).unwrap().offset(), 60, "the younger one stays");
    }

    #[test]
    fn parts_expire_and_are_forgotten_unless_they_are_in_use() {
        let dir = tempfile::tempdir().unwrap();
        let inbox = inbox(dir.path());
        let part = inbox.begin(&offer(1, 1, 10)).unwrap();
        part.file.set_modified(SystemTime::now() - Duration::from_secs(2 * 3600)).unwrap();
        inbox.expire().unwrap();
        inbox.forget(ReplicaId(1)).unwrap();
        assert_eq!(files(dir.path()), 1);
        drop(part);
        inbox.forget(ReplicaId(2)).unwrap();
        assert_eq!(files(dir.path()), 1);
        inbox.expire().unwrap();
        assert_eq!(files(dir.path()), 0);
    }

    #[test]
    fn what_is_no_part_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("in")).unwrap();
        let good = format!("7-{}.part", RandomId([0xab; 16]));
        for name in [good.as_str(), "7-12.part", "x", "7-zz.part", "snapshot.tmp"] {
            fs::write(dir.path().join("in").join(name), "x").unwrap();
        }
        let inbox = inbox(dir.path());
        let left: Vec<_> = inbox.parts().unwrap().iter().map(|found| (found.replica, found.stream)).collect();
        assert_eq!(left, [(ReplicaId(7), RandomId([0xab; 16]))]);
    }
}
