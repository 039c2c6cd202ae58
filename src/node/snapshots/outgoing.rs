//! Snapshots on their way out: made when a leader wants one for a follower, brought to the follower's
//! node, kept for a while in case another follower, or another attempt, can use them.
//!
//! Everything but the making happens on a thread of its own, so that no replica and no client waits
//! behind bulk: one task for each follower, a few of which send at a time.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::rc::Rc;
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use actix::Addr;
use tokio::sync::{Mutex, Semaphore, SemaphorePermit, mpsc, oneshot};
use tokio::task::{AbortHandle, JoinSet, LocalSet};

use super::attempts::{Attempts, Next};
use super::inbox::Inbox;
use super::worker::{Build, BuildError, Worker};
use crate::codec::snapshot::SnapshotOffer;
use crate::failpoints::failpoint;
use crate::ids::{ClusterId, Index, NodeId, ReplicaId, ShardId, Term};
use crate::limits::{
    SNAPSHOT_FLUSH_WAIT_MS, SNAPSHOT_FLUSH_WAITS_MAX, SNAPSHOT_KEEP_MS, SNAPSHOT_TIDY_MS, SNAPSHOTS_SENT_MAX,
};
use crate::node::fatal::Fatal;
use crate::node::messages::{Freeze, SnapshotDone, SnapshotMade};
use crate::node::replica::ReplicaActor;
use crate::storage::snapshot::SnapshotFile;
use crate::storage::snapshot_dir::SnapshotDir;
use crate::telemetry::metrics as names;
use crate::transport::Timings;
use crate::transport::network::PeerNetwork;
use crate::transport::snapshot::sender::{Delivery, Parties, send};
use crate::transport::snapshot::throttle::Throttle;

/// A follower that needs a snapshot, and who says so.
pub struct Order {
    /// The shard.
    pub shard: ShardId,
    /// The leader.
    pub from: ReplicaId,
    /// The generation of its state.
    pub generation: u32,
    /// The term in which it leads.
    pub term: Term,
    /// A snapshot at an earlier index is of no use; so much is applied.
    pub least: Index,
    /// The follower.
    pub to: ReplicaId,
    /// The follower's node.
    pub node: NodeId,
    /// The leader's mailbox, which hears of what is made and how it ends.
    pub replica: Addr<ReplicaActor>,
}

enum Command {
    /// Replaces an order for the same follower.
    Bring(Order),
    /// This replica doesn't lead any more.
    Cancel(ReplicaId),
    /// This replica is removed.
    Forget(ReplicaId),
}

/// Who sends, and how fast.
pub struct Origin {
    /// The cluster.
    pub cluster_id: ClusterId,
    /// This node.
    pub node: NodeId,
    /// Which start of its process.
    pub incarnation: u64,
    /// Knows where nodes are.
    pub network: PeerNetwork,
    /// Bytes per second, over all transfers, as the node's settings allow; the cluster may allow fewer.
    pub bytes_per_second: u64,
}

/// What the thread works with.
pub struct Tools {
    /// Who sends.
    pub origin: Origin,
    /// Makes the files.
    pub worker: Arc<Worker>,
    /// Where they are.
    pub dir: SnapshotDir,
    /// What comes in, to be tidied too.
    pub inbox: Inbox,
}

/// The way to the thread. Bounded: a replica has one order for each follower, and takes it back with
/// its leadership.
pub struct Outgoing {
    commands: std::sync::Mutex<Option<mpsc::UnboundedSender<Command>>>,
    throttle: Arc<Throttle>,
}

impl Outgoing {
    /// Starts the thread.
    ///
    /// # Errors
    /// The system has no thread or no runtime to give.
    pub fn start(tools: Tools, fatal: &Fatal) -> io::Result<(Outgoing, JoinHandle<()>)> {
        let (commands, queue) = mpsc::unbounded_channel();
        let throttle = Arc::new(Throttle::new(tools.origin.bytes_per_second));
        let shared = throttle.clone();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let thread = fatal.thread("pontoon-snapout", "the thread that sends snapshots", move || {
            LocalSet::new().block_on(&runtime, run(Rc::new(Sending::new(tools, shared)), queue));
        })?;
        Ok((Outgoing { commands: std::sync::Mutex::new(Some(commands)), throttle }, thread))
    }

    /// Brings a snapshot to a follower; the leader hears of the outcome ([`SnapshotDone`]).
    pub fn bring(&self, order: Order) {
        self.command(Command::Bring(order));
    }

    /// Nothing of this replica is wanted any more: it doesn't lead. Files are kept for a while.
    pub fn cancel(&self, from: ReplicaId) {
        self.command(Command::Cancel(from));
    }

    /// The replica is removed for good.
    pub fn forget(&self, from: ReplicaId) {
        self.command(Command::Forget(from));
    }

    /// From now on the cluster allows each node so many bytes a second; 0: any number. The node's own limit
    /// holds beside it.
    pub fn limit(&self, bytes_per_second: u64) {
        self.throttle.limit(bytes_per_second);
    }

    /// Bytes of snapshots that have been sent.
    pub fn sent_bytes(&self) -> u64 {
        self.throttle.passed()
    }

    /// Ends the thread, and what it is sending.
    pub fn close(&self) {
        self.commands.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    fn command(&self, command: Command) {
        let commands = self.commands.lock().unwrap_or_else(PoisonError::into_inner);
        if commands.as_ref().is_none_or(|commands| commands.send(command).is_err()) {
            tracing::debug!("the thread that sends snapshots has ended");
        }
    }
}

/// The newest file made of one replica.
struct Kept {
    file: SnapshotFile,
    /// Open from the start: it can be sent on after it was removed.
    handle: Arc<File>,
    used: Instant,
}

/// Locked while the file is made, so that a second follower waits for it instead of making another.
type Slot = Rc<Mutex<Option<Kept>>>;

struct Sending {
    tools: Tools,
    throttle: Arc<Throttle>,
    places: Semaphore,
    files: RefCell<BTreeMap<ReplicaId, Slot>>,
}

async fn run(sending: Rc<Sending>, mut commands: mpsc::UnboundedReceiver<Command>) {
    sending.find_files();
    let mut jobs = JoinSet::new();
    // By follower: who leads, and how to stop it.
    let mut running: HashMap<ReplicaId, (ReplicaId, AbortHandle)> = HashMap::new();
    let mut tidy = tokio::time::interval(Duration::from_millis(SNAPSHOT_TIDY_MS));
    loop {
        tokio::select! {
            command = commands.recv() => match command {
                None => return,
                Some(Command::Bring(order)) => {
                    let (from, to) = (order.from, order.to);
                    let sending = sending.clone();
                    let job = jobs.spawn_local(async move { sending.carry_out(order).await });
                    if let Some((_, older)) = running.insert(to, (from, job)) {
                        older.abort();
                    }
                }
                Some(Command::Cancel(gone)) => stop(&mut running, gone),
                Some(Command::Forget(gone)) => {
                    stop(&mut running, gone);
                    sending.forget(gone);
                }
            },
            Some(ended) = jobs.join_next() => {
                if let Err(error) = ended && error.is_panic() {
                    std::panic::resume_unwind(error.into_panic());
                }
                running.retain(|_, (_, job)| !job.is_finished());
            }
            _ = tidy.tick() => sending.tidy(Instant::now()),
        }
    }
}

fn stop(running: &mut HashMap<ReplicaId, (ReplicaId, AbortHandle)>, gone: ReplicaId) {
    running.retain(|to, (from, job)| {
        if *from == gone {
            tracing::info!(replica = %from, %to, "a snapshot isn't wanted any more");
            job.abort();
        }
        *from != gone
    });
}

impl Sending {
    fn new(tools: Tools, throttle: Arc<Throttle>) -> Sending {
        Sending { throttle, places: Semaphore::new(SNAPSHOTS_SENT_MAX), files: RefCell::default(), tools }
    }

    /// What was made before the start of the process may be what a follower has a part of.
    fn find_files(&self) {
        let found = match self.tools.dir.made() {
            Ok(found) => found,
            Err(error) => return tracing::warn!(%error, "looking for snapshots that were made before"),
        };
        let mut newest: BTreeMap<ReplicaId, Kept> = BTreeMap::new();
        for file in found {
            let replica = file.origin.replica;
            let position = |file: &SnapshotFile| file.summary.header.applied;
            if newest.get(&replica).is_some_and(|kept| position(&kept.file) >= position(&file)) {
                self.remove(&file);
                continue;
            }
            let older = match keep(&file) {
                Ok(kept) => newest.insert(replica, kept),
                Err(error) => {
                    tracing::warn!(%error, "a snapshot that was made before can't be read");
                    self.remove(&file);
                    None
                }
            };
            if let Some(older) = older {
                self.remove(&older.file);
            }
        }
        let slots = newest.into_iter().map(|(replica, kept)| (replica, Rc::new(Mutex::new(Some(kept)))));
        self.files.borrow_mut().extend(slots);
    }

    async fn carry_out(&self, order: Order) {
        let installed = self.bring(&order).await;
        order.replica.do_send(SnapshotDone { to: order.to, installed });
    }

    /// Whether the follower then has what it needs.
    async fn bring(&self, order: &Order) -> bool {
        let Ok(place) = self.places.acquire().await else {
            return false;
        };
        let (shard, from, to) = (order.shard, order.from, order.to);
        let Some((file, handle)) = self.prepare(order).await else {
            return false;
        };
        let position = file.summary.header.applied;
        let offer = SnapshotOffer {
            stream: file.origin.stream,
            shard,
            from,
            to,
            epoch: file.summary.header.epoch,
            position,
            leader_term: order.term,
            bytes: file.bytes,
        };
        tracing::info!(%shard, %from, %to, node = %order.node, index = position.index, bytes = file.bytes, "sending a snapshot");
        failpoint!(SnapshotSend, from);
        let begun = Instant::now();
        match self.deliver(order, &offer, &handle, place).await {
            Next::Done => {
                metrics::counter!(names::SNAPSHOTS_SENT).increment(1);
                tracing::info!(%shard, %from, %to, took = ?begun.elapsed(), "a follower stands at the snapshot");
                true
            }
            Next::GiveUp(reason) => {
                metrics::counter!(names::SNAPSHOTS_FAILED, "step" => "send").increment(1);
                tracing::warn!(%shard, %from, %to, reason, "a snapshot could not be brought to a follower");
                false
            }
            Next::Discard(reason) => {
                metrics::counter!(names::SNAPSHOTS_FAILED, "step" => "send").increment(1);
                tracing::error!(%shard, %from, %to, reason, "a snapshot is of no use and is made anew");
                self.discard(&file).await;
                false
            }
            Next::Again(_) => false,
        }
    }

    /// A file that serves the order: the one that is there, if the log goes on from it, or a new one.
    /// `None` if there is none, or the order doesn't stand any more.
    async fn prepare(&self, order: &Order) -> Option<(SnapshotFile, Arc<File>)> {
        let slot = self.files.borrow_mut().entry(order.from).or_default().clone();
        let mut kept = slot.lock().await;
        if let Some(old) = &mut *kept {
            if self.is_wanted(order, &old.file).await {
                old.used = Instant::now();
                return Some((old.file.clone(), old.handle.clone()));
            }
            self.remove(&old.file);
            *kept = None;
        }
        let file = match self.make(order).await {
            Ok(file) => file,
            Err(error) => {
                metrics::counter!(names::SNAPSHOTS_FAILED, "step" => "make").increment(1);
                tracing::warn!(shard = %order.shard, replica = %order.from, %error, "a snapshot can't be made");
                return None;
            }
        };
        metrics::counter!(names::SNAPSHOTS_MADE).increment(1);
        if !self.is_wanted(order, &file).await {
            self.remove(&file);
            return None;
        }
        match keep(&file) {
            Ok(new) => {
                let new = kept.insert(new);
                Some((file, new.handle.clone()))
            }
            Err(error) => {
                tracing::warn!(%error, "a snapshot that was just made can't be read");
                self.remove(&file);
                None
            }
        }
    }

    /// Whether the leader, as such, can go on from a snapshot.
    async fn is_wanted(&self, order: &Order, file: &SnapshotFile) -> bool {
        let made = SnapshotMade { to: order.to, position: file.summary.header.applied };
        order.replica.send(made).await.unwrap_or(false)
    }

    async fn make(&self, order: &Order) -> Result<SnapshotFile, BuildError> {
        let mut waits = 0;
        loop {
            let (done, made) = oneshot::channel();
            self.tools.worker.build(Build {
                shard: order.shard,
                replica: order.from,
                generation: order.generation,
                least: order.least,
                done,
            });
            match made.await.unwrap_or(Err(BuildError::Stopping)) {
                Err(BuildError::NotFlushed) if waits < SNAPSHOT_FLUSH_WAITS_MAX => {
                    waits += 1;
                    order.replica.do_send(Freeze { for_log: false });
                    tokio::time::sleep(Duration::from_millis(SNAPSHOT_FLUSH_WAIT_MS)).await;
                }
                result => return result,
            }
        }
    }

    /// Tries until there is an outcome. While it waits for a node that is busy, others may have its `place`.
    async fn deliver<'a>(
        &'a self,
        order: &Order,
        offer: &SnapshotOffer,
        file: &Arc<File>,
        place: SemaphorePermit<'a>,
    ) -> Next {
        let mut place = Some(place);
        let origin = &self.tools.origin;
        let parties = Parties {
            cluster_id: origin.cluster_id,
            from: origin.node,
            incarnation: origin.incarnation,
            to: order.node,
        };
        let timings = Timings::default();
        let mut attempts = Attempts::new();
        loop {
            let Some(address) = origin.network.address(order.node) else {
                return Next::GiveUp(format!("node {} is not known", order.node));
            };
            let resumed = |at| {
                metrics::counter!(names::SNAPSHOTS_RESUMED).increment(1);
                tracing::info!(to = %offer.to, at, of = offer.bytes, "a snapshot goes on where its transfer was cut");
                attempts.resumed(at);
            };
            let sent = send(&address, &parties, offer, file, &self.throttle, &timings, resumed).await;
            if let Err(error) = &sent {
                tracing::info!(to = %offer.to, node = %order.node, %error, "the transfer of a snapshot was cut");
            }
            let busy = matches!(sent, Ok(Delivery::Busy(_)));
            match attempts.after(sent, Instant::now()) {
                Next::Again(after) => {
                    place = place.filter(|_| !busy);
                    tokio::time::sleep(after).await;
                }
                end => return end,
            }
            if place.is_none() {
                place = match self.places.acquire().await {
                    Ok(place) => Some(place),
                    Err(_) => return Next::GiveUp("the node is being stopped".into()),
                };
            }
        }
    }

    fn remove(&self, file: &SnapshotFile) {
        if let Err(error) = self.tools.dir.remove(file) {
            tracing::warn!(%error, "a snapshot file stays");
        }
    }

    /// A file is of no use, unless it was replaced already.
    async fn discard(&self, file: &SnapshotFile) {
        let slot = self.files.borrow().get(&file.origin.replica).cloned();
        let Some(slot) = slot else {
            return;
        };
        let mut kept = slot.lock().await;
        if kept.as_ref().is_some_and(|kept| kept.file.origin.stream == file.origin.stream) {
            self.remove(file);
            *kept = None;
        }
    }

    /// Removes the files that nobody has used for long.
    fn tidy(&self, now: Instant) {
        if let Err(error) = self.tools.inbox.expire(now) {
            tracing::warn!(%error, "removing old parts of snapshots");
        }
        let keep = Duration::from_millis(SNAPSHOT_KEEP_MS);
        self.drop_files(|_, kept| {
            // Being sent, which may take longer than that, and be worth going on with.
            if Arc::strong_count(&kept.handle) > 1 {
                kept.used = now;
            }
            now.saturating_duration_since(kept.used) > keep
        });
    }

    fn forget(&self, replica: ReplicaId) {
        self.drop_files(|of, _| of == replica);
    }

    fn drop_files(&self, which: impl Fn(ReplicaId, &mut Kept) -> bool) {
        self.files.borrow_mut().retain(|replica, slot| {
            // Locked: it is just being made. Held by another: somebody is about to look into it.
            let held = Rc::strong_count(slot) > 1;
            let Ok(mut kept) = slot.try_lock() else {
                return true;
            };
            if let Some(unused) = kept.take_if(|kept| which(*replica, kept)) {
                self.remove(&unused.file);
            }
            held || kept.is_some()
        });
    }
}

fn keep(file: &SnapshotFile) -> io::Result<Kept> {
    let handle = Arc::new(File::open(&file.path)?);
    Ok(Kept { file: file.clone(), handle, used: Instant::now() })
}
