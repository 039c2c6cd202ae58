//! The tokio shell around routing, retry and lanes: accepts operations, sends calls, takes answers in.
//!
//! ```text
//!   caller ─► Ticket ─► route ─► lane of the shard ─► call ─► node
//!                ▲        │ no route                   │
//!                │        ▼                            ▼
//!                │   parked until a fresh map      answer, or failure ─► retry: later, give up
//!                └────────────────────────────────────────────────┘
//! ```
//!
//! Everything here runs on one thread, in a `LocalSet`: a client's own, or an arbiter's of a node.
//! No `RefCell` is borrowed across an await.

use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, OwnedSemaphorePermit, mpsc, oneshot};
use tokio::task::spawn_local;

use super::Operation;
use super::connection::Pool;
use super::follow::follow;
use super::lanes::{LaneId, Lanes, Next};
use super::refresh::Refresh;
use super::retry::{self, Decision, Failure};
use super::routing::Routing;
use super::session::Moment;
use super::ticket::{Deadline, End, Load, Parts, Reply, Ticket};
use crate::ids::SessionId;
use crate::limits::CLOSE_MS_MAX;
use crate::placement::map::ClusterMap;
use crate::refusal::Refusal;

/// How often queues are searched for operations whose time is over, while there are any.
const SWEEP: Duration = Duration::from_millis(5);
/// Jobs taken from the channel before the calls they make leave.
const JOBS_PER_PASS: usize = 1024;

/// Work for a client's thread.
pub(super) enum Job {
    /// One operation.
    One {
        database: Arc<str>,
        operation: Operation,
        deadline: Deadline,
        reply: oneshot::Sender<End>,
        permit: OwnedSemaphorePermit,
    },
    /// Independent operations.
    Batch {
        database: Arc<str>,
        operations: Vec<Operation>,
        deadline: Deadline,
        reply: oneshot::Sender<Vec<End>>,
        permit: OwnedSemaphorePermit,
    },
    /// Anything else: a future that runs beside the rest.
    Task(Task),
    /// End.
    Close,
}

/// Makes a future on the client's thread.
pub(super) type Task = Box<dyn FnOnce(Rc<Driver>) -> Pin<Box<dyn Future<Output = ()>>> + Send + 'static>;

/// Reads the map of the node that a client lives in.
pub(crate) type MapSource = Box<dyn Fn() -> Arc<ClusterMap> + Send>;

/// What makes one driver differ from another.
pub(super) struct Setup {
    /// Addresses to start from.
    pub seeds: Vec<String>,
    /// The map of the node that the client lives in, if it does.
    pub source: Option<MapSource>,
    /// Calls are made for plain calls of another client: marked so, without a session, and no write is
    /// sent twice if the first may have been applied.
    pub forwarded: bool,
}

/// The time by which sessions live: unlike that of deadlines it goes on while the machine sleeps, as
/// it does for the cluster.
pub(super) fn moment() -> Moment {
    use rustix::time::{ClockId, clock_gettime};
    #[cfg(any(target_os = "linux", target_os = "android"))]
    const CLOCK: ClockId = ClockId::Boottime;
    // Where there is no other clock, this one is that.
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    const CLOCK: ClockId = ClockId::Monotonic;
    // It counts from a moment in the past, so it is never negative.
    Moment::try_from(clock_gettime(CLOCK)).unwrap_or_default()
}

/// One client's state; see the module page.
pub(super) struct Driver {
    pub setup: Setup,
    pub routing: RefCell<Routing>,
    pub pool: Rc<Pool>,
    pub refresh: Refresh,
    pub load: Rc<Load>,
    lanes: RefCell<Lanes>,
    /// Lanes with new operations or a free call, some named twice; see [`Driver::flush`].
    touched: RefCell<Vec<LaneId>>,
    /// Wakes the sweeper.
    queued: Rc<Notify>,
    /// Something of the map is known: it can be followed.
    pub mapped: Rc<Notify>,
    closed: Cell<bool>,
}

impl Driver {
    /// A driver on the current `LocalSet`.
    pub fn start(setup: Setup) -> Rc<Driver> {
        let driver = Rc::new(Driver {
            setup,
            routing: RefCell::default(),
            pool: Rc::default(),
            refresh: Refresh::default(),
            load: Rc::default(),
            lanes: RefCell::default(),
            touched: RefCell::default(),
            queued: Rc::default(),
            mapped: Rc::default(),
            closed: Cell::new(false),
        });
        spawn_local(sweep(Rc::downgrade(&driver), driver.queued.clone()));
        // Inside a node there is the node's own map.
        if driver.setup.source.is_none() {
            spawn_local(follow(Rc::downgrade(&driver), driver.mapped.clone()));
        }
        driver
    }

    /// Takes jobs until there can be no more or one says `Close`; then lets what is in flight end
    /// within [`CLOSE_MS_MAX`].
    pub async fn serve(self: &Rc<Driver>, mut jobs: mpsc::UnboundedReceiver<Job>) {
        let mut pass = Vec::new();
        let mut open = true;
        while open && jobs.recv_many(&mut pass, JOBS_PER_PASS).await > 0 {
            for job in pass.drain(..) {
                match job {
                    // What follows is dropped, which answers it.
                    Job::Close => open = false,
                    _ if !open => (),
                    job => self.take(job),
                }
            }
            self.flush();
        }
        self.closed.set(true);
        jobs.close();
        while jobs.try_recv().is_ok() {}
        let limit = Duration::from_millis(CLOSE_MS_MAX);
        if !open && tokio::time::timeout(limit, self.load.idle()).await.is_err() {
            tracing::debug!("a client was closed with operations in flight");
        }
    }

    fn take(self: &Rc<Driver>, job: Job) {
        match job {
            Job::One { database, operation, deadline, reply, permit } => {
                self.accept(operation, database, deadline, Reply::One(reply, Some(permit)))
            }
            Job::Batch { database, operations, deadline, reply, permit } => {
                let parts = Parts::new(operations.len(), reply, Some(permit));
                for (at, operation) in operations.into_iter().enumerate() {
                    let reply = Reply::Part(parts.clone(), at);
                    self.accept(operation, database.clone(), deadline, reply);
                }
            }
            Job::Task(task) => {
                let (guard, future) = (self.load.enter(), task(self.clone()));
                spawn_local(async move {
                    future.await;
                    drop(guard);
                });
            }
            Job::Close => (),
        }
    }

    /// Accepts an operation; its call leaves at the next [`Driver::flush`].
    pub fn accept(
        self: &Rc<Driver>,
        operation: Operation,
        database: Arc<str>,
        deadline: Deadline,
        reply: Reply,
    ) {
        let once = self.setup.forwarded;
        self.enqueue(Ticket::new(operation, database, deadline, once, reply, &self.load));
    }

    /// Adds an operation to the queue of the shard that its key belongs to; without one it waits for a
    /// fresh map.
    pub fn enqueue(self: &Rc<Driver>, mut ticket: Ticket) {
        ticket.expire(Instant::now(), "it came too late to be sent");
        if self.closed.get() || !ticket.open() {
            return;
        }
        self.adopt();
        let route = self.routing.borrow().route_at(&ticket.database, ticket.position);
        match route {
            Some(route) => {
                ticket.range_version = route.range_version;
                let lane = self.lanes.borrow_mut().push(route.shard, ticket);
                self.touched.borrow_mut().push(lane);
            }
            None => {
                self.refresh.park(ticket);
                self.queued.notify_one();
                self.refresh_soon();
            }
        }
    }

    /// Takes the map of the node that the client lives in, if it does and that is newer.
    pub fn adopt(&self) {
        if let Some(source) = &self.setup.source
            && self.routing.borrow_mut().adopt(source())
        {
            self.prune();
        }
    }

    /// Sends the calls that the operations accepted so far make.
    pub fn flush(self: &Rc<Driver>) {
        let now = moment();
        loop {
            let Some(lane) = self.touched.borrow_mut().pop() else {
                return;
            };
            let shard = lane.shard;
            loop {
                let version = self.routing.borrow().range_version(shard);
                let next = self.lanes.borrow_mut().next(lane, version, now, &mut SessionId::random);
                let Next::Call { batch, stale } = next else {
                    // What had to wait may have to be answered before its turn comes.
                    self.queued.notify_one();
                    break;
                };
                for ticket in stale {
                    self.enqueue(ticket);
                }
                if !batch.is_empty() {
                    let call = LaneCall(self.clone(), lane);
                    let is_lone = batch.len() == 1;
                    spawn_local(async move {
                        let driver = call.0.clone();
                        driver.call(shard, batch).await;
                        // Those who were answered have their turn, and what they ask for next is taken in: it shares the
                        // next call with what waited. Else callers in closed loops go on in halves that take turns.
                        if !is_lone || driver.lanes.borrow().holds_any(lane) {
                            tokio::task::yield_now().await;
                            tokio::task::yield_now().await;
                        }
                        drop(call);
                        driver.flush();
                    });
                }
            }
        }
    }

    /// What to tell of the shard of an operation that failed, if that is more than its last failure.
    fn told(&self, ticket: &Ticket, failure: &Failure) -> Option<String> {
        if !failure.is_of_the_node() {
            return None;
        }
        let routing = self.routing.borrow();
        let route = routing.route_at(&ticket.database, ticket.position)?;
        routing.told(route.shard, Instant::now())
    }

    /// Decides about operations whose attempt failed: each is answered, or tried again later.
    pub fn failed(self: &Rc<Driver>, failures: Vec<(Ticket, Failure)>) {
        let now = Instant::now();
        let mut again = Vec::new();
        // They came from one call and may share the next, so the shortest delay holds for all.
        let mut after = Duration::MAX;
        for (mut ticket, failure) in failures {
            ticket.sent = false;
            let deadline = ticket.deadline;
            let left = deadline.left(now);
            let text = self.told(&ticket, &failure).unwrap_or_else(|| failure.text());
            if let (Some(tag), Failure::Refused(Refusal::SessionExpired)) = (&ticket.tag, &failure) {
                tag.session().lost();
            }
            match retry::decide(
                ticket.kind,
                &mut ticket.attempts,
                failure,
                left,
                deadline.within,
                rand::random(),
            ) {
                Decision::Fail(error) => ticket.answer(Err(error.because(text))),
                decision @ (Decision::Retry(delay) | Decision::Renew(delay)) => {
                    if matches!(decision, Decision::Renew(_)) {
                        ticket.tag = None;
                    }
                    after = after.min(delay);
                    ticket.last = Some(text);
                    again.push(ticket);
                }
            }
        }
        if again.is_empty() {
            return;
        }
        let driver = self.clone();
        spawn_local(async move {
            if after > Duration::ZERO {
                tokio::time::sleep(after).await;
            }
            for ticket in again {
                driver.enqueue(ticket);
            }
            driver.flush();
        });
    }

    /// Forgets the queues of shards that are dropped: the map keeps these for ever.
    pub fn prune(&self) {
        let routing = self.routing.borrow();
        self.lanes.borrow_mut().prune(|shard| routing.range_version(shard).is_some());
    }
}

/// A call under way; at its end, however it comes, the lane may send the next at the next flush.
struct LaneCall(Rc<Driver>, LaneId);

impl Drop for LaneCall {
    fn drop(&mut self) {
        self.0.lanes.borrow_mut().finished(self.1);
        self.0.touched.borrow_mut().push(self.1);
    }
}

/// Answers operations whose time is over while they wait in a queue. Sleeps while none do.
async fn sweep(driver: Weak<Driver>, queued: Rc<Notify>) {
    loop {
        // The driver wakes this one last time when it is dropped.
        queued.notified().await;
        loop {
            tokio::time::sleep(SWEEP).await;
            let Some(driver) = driver.upgrade() else {
                return;
            };
            let now = Instant::now();
            let waiting = driver.lanes.borrow_mut().expire(now) | driver.refresh.expire(now);
            // What they wait for may have ended without a call: given up between two attempts.
            driver.touched.borrow_mut().extend(driver.lanes.borrow().held(moment()));
            driver.flush();
            if !waiting {
                break;
            }
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.queued.notify_one();
        self.mapped.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use bytes::Bytes;
    use tokio::task::LocalSet;

    use super::*;
    use crate::ids::{DatabaseId, Epoch, ShardId};
    use crate::placement::map::{DatabaseRecord, ShardRecord};
    use crate::placement::ring::RingRange;

    /// A database of one shard, of which nobody has a replica.
    fn map(version: u64, dropped: bool) -> Arc<ClusterMap> {
        let (id, shard, changed_at) = (DatabaseId(1), ShardId(1), version);
        let database =
            DatabaseRecord { id, name: "db".into(), replicas: 1, shards: vec![shard], dropped, changed_at };
        let record = ShardRecord {
            id: shard,
            database: id,
            range: RingRange::ALL,
            epoch: Epoch { range: 1, conf: 1 },
            members: Vec::new(),
            dropped,
            moving: None,
            target: None,
            previous: None,
            changed_at,
        };
        let (databases, shards) = ([(id, database)].into(), [(shard, record)].into());
        Arc::new(ClusterMap { version, databases, shards, ..ClusterMap::default() })
    }

    /// A client outlives databases that come and go; what is dropped stays in the map, marked.
    #[tokio::test]
    async fn nothing_is_kept_for_a_shard_that_was_dropped() {
        let run = async {
            let shown = Arc::new(Mutex::new(map(1, false)));
            let seen = shown.clone();
            let source: MapSource = Box::new(move || seen.lock().expect("no panic").clone());
            let driver = Driver::start(Setup { seeds: Vec::new(), source: Some(source), forwarded: false });
            let (reply, end) = oneshot::channel();
            let (get, deadline) =
                (Operation::Get(Bytes::from_static(b"k")), Deadline::after(Duration::from_secs(1_000)));
            driver.accept(get, "db".into(), deadline, Reply::One(reply, None));
            assert_eq!(driver.lanes.borrow().len(), 1);
            // Its caller is gone: it isn't sent, and nothing waits in the lane any more.
            drop(end);
            driver.flush();
            assert_eq!(driver.lanes.borrow().len(), 1);
            *shown.lock().expect("no panic") = map(2, true);
            driver.adopt();
            assert_eq!(driver.lanes.borrow().len(), 0);
        };
        LocalSet::new().run_until(run).await;
    }
}
