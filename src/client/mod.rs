//! The client library.
//!
//! A [`Client`] keeps a routing cache and a connection per node on a thread of its own, so it may be
//! used from any runtime or thread; or in the `LocalSet` of whoever makes it, which saves each operation two
//! changes of threads. Operations that run at the same time and belong to the same
//! shard travel in one call. Redirects heal the cache, and what changes in the cluster is told to it as it
//! happens, so it may run for longer than any node. A dead node, a moved leader or `Busy` is
//! retried until the deadline where that is safe.
//!
//! - [`routing`]: the cached map and who leads; [`retry`]: what a failure means; `lanes`: which
//!   operations share a call; `session`: what makes a repeated command take effect once; `silence`: whether
//!   a node is slow or gone; `trouble`: what to tell of a shard that doesn't answer; `dropping`: which database a drop
//!   means. These are sans-I/O.
//! - `driver`: the tokio shell around them; `calls`, `refresh`, `connection`: what it sends and where; `follow`: how
//!   it hears of new nodes and places while nothing fails;
//!   `traced`: one operation, and where its time went; `race`: several nodes of which any will do; `ticket`: an operation and its caller; `wire`: the protocol.
//! - `local`: the same for use inside a node, on a thread that is there already.
//!
//! What it promises: every operation ends at its deadline at the latest, with a result or an error that
//! says what the caller may conclude. A put, delete or cas takes effect at most once, however often it has
//! to be sent: each carries a tag, by which the shard knows it again. One that succeeds took effect
//! exactly once.

pub mod admin;
mod calls;
mod connection;
mod driver;
mod dropping;
mod follow;
mod gather;
mod lanes;
pub(crate) mod local;
pub mod options;
mod order;
mod race;
mod refresh;
pub mod retry;
pub mod routing;
mod scan;
mod session;
mod silence;
mod ticket;
mod traced;
mod trouble;
pub(crate) mod wire;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::task::LocalSet;

use crate::limits::{KEY_BYTES_MAX, TIMEOUT_MAX_MS, VALUE_BYTES_MAX};
use crate::machine::command::Expect;
use crate::placement::map::ClusterMap;
use crate::refusal::Refusal;
use driver::{Driver, Job, Setup};
use options::ClientOptions;
pub use scan::{Scan, ScanOptions};
use ticket::{Deadline, End};
pub use traced::Traced;

/// A value and the version that wrote it.
pub use crate::machine::command::Versioned;

/// Why an operation got no result. Says what the caller may conclude about its effect.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ClientError {
    /// Certainly not applied, now or later.
    #[error("not applied: {0}")]
    NotApplied(NotApplied),
    /// It may have been applied; if so, once.
    #[error("outcome unknown: {0}")]
    Unknown(Unknown),
    /// The operation breaks a rule; it was not sent or not accepted, and no retry helps.
    #[error("{0}")]
    Invalid(String),
}

impl ClientError {
    /// The same with `why` in place of what happened last, where that is what it tells.
    fn because(mut self, why: String) -> ClientError {
        if let ClientError::NotApplied(NotApplied::Unavailable { last, .. })
        | ClientError::Unknown(Unknown::NoAnswer(last)) = &mut self
        {
            *last = why;
        }
        self
    }
}

/// Why nobody can tell whether an operation was applied.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Unknown {
    /// There was an attempt without an answer, and none after it that told until the deadline. What
    /// happened last.
    #[error("{0}")]
    NoAnswer(String),
    /// The shard has forgotten the session under which an earlier attempt was made. Rare: the operation
    /// was held up for longer than its deadline, by a machine that slept for instance.
    #[error("{}", Refusal::SessionExpired)]
    SessionExpired,
}

impl From<String> for Unknown {
    fn from(text: String) -> Unknown {
        Unknown::NoAnswer(text)
    }
}

impl From<&str> for Unknown {
    fn from(text: &str) -> Unknown {
        text.to_owned().into()
    }
}

/// Why an operation was certainly not applied.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NotApplied {
    /// No node answered, or no leader was found, before the deadline.
    #[error("no answer within {within:?}: {last}")]
    Unavailable {
        /// The time that was given.
        within: Duration,
        /// The last failure seen.
        last: String,
    },
    /// The cluster has no database of this name.
    #[error("there is no database `{0}`; create it with `pontoon db create`")]
    UnknownDatabase(String),
    /// The cluster says no, and will say no again.
    #[error("{0}")]
    Refused(Refusal),
    /// The client was closed.
    #[error("the client is closed")]
    Closed,
}

/// One operation of a batch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Operation {
    /// Read a key.
    Get(Bytes),
    /// Set a key's value.
    Put(Bytes, Bytes),
    /// Remove a key.
    Delete(Bytes),
    /// Set a key's value if the condition holds.
    Cas(Bytes, Expect, Bytes),
}

/// The result of one operation.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum OperationResult {
    /// Get: the value, if the key exists.
    Value(Option<Versioned>),
    /// Put, or a cas whose condition held: the new version.
    Written(u64),
    /// Delete: the version of the deletion, or `None` if there was no such key.
    Deleted(Option<u64>),
    /// Cas: the condition didn't hold; what is there instead.
    Mismatch(Option<Versioned>),
}

/// The result of a compare-and-set.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Cas {
    /// The condition held; the new version.
    Written(u64),
    /// It didn't; what is there instead.
    Mismatch(Option<Versioned>),
}

/// A connection to a cluster. Cheap to clone; all clones share routes and connections.
#[derive(Clone)]
pub struct Client {
    shared: Arc<Shared>,
}

struct Shared {
    options: ClientOptions,
    jobs: mpsc::UnboundedSender<Job>,
    /// Bounds the operations in the channel and beyond it.
    in_flight: Arc<Semaphore>,
    /// Its sender is dropped when the driver has ended.
    ended: watch::Receiver<()>,
}

impl Client {
    /// Connects to a cluster through any of `addresses` (HOST:PORT of client ports). Succeeds as soon
    /// as one of them has answered with the cluster map, or fails when the options' timeout is over.
    pub async fn connect<A: Into<String>>(
        addresses: impl IntoIterator<Item = A>,
    ) -> Result<Client, ClientError> {
        Client::connect_with(ClientOptions::new(addresses)).await
    }

    /// Connects with options of one's own.
    pub async fn connect_with(options: ClientOptions) -> Result<Client, ClientError> {
        Client::unconnected(options)?.connected().await
    }

    /// [`Client::connect_with`] for a program that has a [`LocalSet`]: see [`Client::unconnected_here`].
    ///
    /// # Panics
    /// Outside of one.
    pub async fn connect_here(options: ClientOptions) -> Result<Client, ClientError> {
        Client::unconnected_here(options)?.connected().await
    }

    /// The client, once a node has answered it with the cluster map.
    async fn connected(self) -> Result<Client, ClientError> {
        match self.fresh_map(self.shared.options.timeout).await {
            Ok(_) => Ok(self),
            Err(error) => {
                self.close().await;
                Err(error)
            }
        }
    }

    /// A client that has asked nobody yet: its first operation does. For callers that want an answer
    /// from nodes which can't tell of a cluster yet ([`Client::node_report`]).
    pub fn unconnected(options: ClientOptions) -> Result<Client, ClientError> {
        Client::new(options, |setup, queue, running| {
            let thread = std::thread::Builder::new().name("pontoon-client".into());
            let started = thread.spawn(move || {
                // Dropped at the end of the thread, on unwinding too.
                let _running = running;
                run(setup, queue);
            });
            started.map(drop).map_err(|error| format!("starting the client's thread: {error}"))
        })
    }

    /// [`Client::unconnected`] without a thread of its own: a task of the current [`LocalSet`] does the work. An
    /// operation that is asked for in that set then changes threads neither on its way out nor with its answer, which is a
    /// good part of its time where little else goes on. While that thread is busy with something else nothing
    /// moves here, deadlines included; and once the set is dropped, every operation is [`NotApplied::Closed`].
    ///
    /// # Panics
    /// Outside of a `LocalSet`.
    pub fn unconnected_here(options: ClientOptions) -> Result<Client, ClientError> {
        Client::new(options, |setup, queue, running| {
            tokio::task::spawn_local(async move {
                let _running = running;
                // What the client still does in the background ends with it.
                let local = LocalSet::new();
                local.run_until(async move { Driver::start(setup).serve(queue).await }).await;
            });
            Ok(())
        })
    }

    /// A client of which `start` sets the driver to work; that drops the sender when it has ended.
    fn new(
        options: ClientOptions,
        start: impl FnOnce(Setup, mpsc::UnboundedReceiver<Job>, watch::Sender<()>) -> Result<(), String>,
    ) -> Result<Client, ClientError> {
        if options.addresses.is_empty() {
            return Err(ClientError::Invalid("no address of a node is given".into()));
        }
        let (jobs, queue) = mpsc::unbounded_channel();
        let (running, ended) = watch::channel(());
        let setup = Setup { seeds: options.addresses.clone(), source: None, forwarded: false };
        start(setup, queue, running).map_err(|error| unavailable(&options, error))?;
        let permits = options.in_flight_max.clamp(1, Semaphore::MAX_PERMITS);
        Ok(Client {
            shared: Arc::new(Shared { in_flight: Arc::new(Semaphore::new(permits)), options, jobs, ended }),
        })
    }

    /// A database by name. Asks nobody: a name that doesn't exist shows at the first operation.
    pub fn database(&self, name: impl Into<String>) -> Database {
        let timeout = self.shared.options.timeout;
        Database { client: self.clone(), name: Arc::from(name.into()), timeout, given: timeout }
    }

    /// The cluster map, freshly asked of a node.
    pub async fn map(&self) -> Result<Arc<ClusterMap>, ClientError> {
        self.fresh_map(self.shared.options.timeout).await
    }

    /// Stops accepting operations, answers those in flight, and ends the client's thread, or task, all within
    /// a second.
    pub async fn close(&self) {
        // An error means that it has ended already.
        self.shared.jobs.send(Job::Close).ok();
        let mut ended = self.shared.ended.clone();
        while ended.changed().await.is_ok() {}
    }

    /// Waits until there is room for `operations` more.
    async fn admit(&self, operations: usize) -> Result<OwnedSemaphorePermit, ClientError> {
        let most = self.shared.options.in_flight_max.max(1);
        let count = u32::try_from(operations.clamp(1, most)).unwrap_or(u32::MAX);
        let semaphore = self.shared.in_flight.clone();
        let permit = semaphore.acquire_many_owned(count).await;
        permit.map_err(|_| closed())
    }

    /// Runs a future of the driver's thread. `lost` is the error if the client is closed meanwhile.
    async fn run<T, F, Fut>(&self, lost: ClientError, task: F) -> Result<T, ClientError>
    where
        T: Send + 'static,
        F: FnOnce(std::rc::Rc<Driver>) -> Fut + Send + 'static,
        Fut: Future<Output = Result<T, ClientError>> + 'static,
    {
        let permit = self.admit(1).await?;
        let (reply, done) = oneshot::channel();
        let job: driver::Task = Box::new(move |driver| {
            let future = task(driver);
            Box::pin(async move {
                // The caller may have stopped waiting; its business.
                reply.send(future.await).ok();
                drop(permit);
            })
        });
        self.shared.jobs.send(Job::Task(job)).map_err(|_| closed())?;
        done.await.unwrap_or(Err(lost))
    }
}

/// The thread of a client.
fn run(setup: Setup, jobs: mpsc::UnboundedReceiver<Job>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            // The jobs are dropped, which answers them as `Closed`.
            tracing::error!(%error, "a client can't start its runtime");
            return;
        }
    };
    let local = LocalSet::new();
    local.block_on(&runtime, async move {
        Driver::start(setup).serve(jobs).await;
    });
    // Within the runtime: what is dropped may hold timers and sockets.
    let entered = runtime.enter();
    drop(local);
    drop(entered);
    // Not waiting for name look-ups under way, which block.
    runtime.shutdown_background();
}

fn closed() -> ClientError {
    ClientError::NotApplied(NotApplied::Closed)
}

fn unavailable(options: &ClientOptions, last: String) -> ClientError {
    ClientError::NotApplied(NotApplied::Unavailable { within: options.timeout, last })
}

/// A database of a cluster. Cheap to clone.
#[derive(Clone)]
pub struct Database {
    client: Client,
    name: Arc<str>,
    timeout: Duration,
    /// For messages: the time of which `timeout` is the rest.
    given: Duration,
}

impl Database {
    /// The same database with another deadline per operation, at most
    /// [`TIMEOUT_MAX_MS`].
    pub fn with_timeout(&self, timeout: Duration) -> Database {
        Database { timeout, given: timeout, ..self.clone() }
    }

    /// Reads a key, linearizably.
    pub async fn get(&self, key: impl Into<Bytes>) -> Result<Option<Versioned>, ClientError> {
        match self.one(Operation::Get(key.into())).await? {
            OperationResult::Value(value) => Ok(value),
            other => Err(mismatched(&other)),
        }
    }

    /// Sets a key's value; the new version.
    pub async fn put(&self, key: impl Into<Bytes>, value: impl Into<Bytes>) -> Result<u64, ClientError> {
        match self.one(Operation::Put(key.into(), value.into())).await? {
            OperationResult::Written(version) => Ok(version),
            other => Err(mismatched(&other)),
        }
    }

    /// Removes a key; the version of the deletion, or `None` if there was no such key.
    pub async fn delete(&self, key: impl Into<Bytes>) -> Result<Option<u64>, ClientError> {
        match self.one(Operation::Delete(key.into())).await? {
            OperationResult::Deleted(version) => Ok(version),
            other => Err(mismatched(&other)),
        }
    }

    /// Sets a key's value if the condition holds.
    pub async fn cas(
        &self,
        key: impl Into<Bytes>,
        expect: Expect,
        value: impl Into<Bytes>,
    ) -> Result<Cas, ClientError> {
        let operation = Operation::Cas(key.into(), expect, value.into());
        match self.one(operation).await? {
            OperationResult::Written(version) => Ok(Cas::Written(version)),
            OperationResult::Mismatch(there) => Ok(Cas::Mismatch(there)),
            other => Err(mismatched(&other)),
        }
    }

    /// Runs independent operations, each with its own result, in the order given. They are grouped by
    /// shard into as few calls as possible; no order among them is promised.
    pub async fn batch(&self, operations: Vec<Operation>) -> Vec<Result<OperationResult, ClientError>> {
        let mut ends: Vec<Option<End>> =
            operations.iter().map(|operation| check(operation).err().map(Err)).collect();
        let valid: Vec<Operation> = operations
            .into_iter()
            .zip(&ends)
            .filter(|(_, end)| end.is_none())
            .map(|(operation, _)| operation)
            .collect();
        let mut answers = self.all(valid).await.into_iter();
        let places = ends.iter_mut().filter(|end| end.is_none());
        for place in places {
            *place = answers.next();
        }
        let ends = ends.into_iter();
        ends.map(|end| end.unwrap_or_else(|| Err(closed()))).collect()
    }

    /// Begins a scan over all shards. Pages come shard by shard: keys are ordered within a shard, not
    /// among shards.
    pub fn scan(&self, options: ScanOptions) -> Scan {
        Scan::new(self.clone(), options)
    }

    /// The same database with the rest of the time that a person gave for more than one operation.
    pub(crate) fn with_rest(&self, timeout: Duration, given: Duration) -> Database {
        Database { timeout, given, ..self.clone() }
    }

    fn deadline(&self) -> Deadline {
        let most = Duration::from_millis(TIMEOUT_MAX_MS);
        let rest = Deadline::after(self.timeout.min(most));
        // Sessions live by it, so it is never less than the rest, nor more than a node grants.
        Deadline { within: self.given.min(most).max(rest.within), ..rest }
    }

    async fn one(&self, operation: Operation) -> End {
        check(&operation)?;
        let deadline = self.deadline();
        let permit = self.client.admit(1).await?;
        let (reply, end) = oneshot::channel();
        let job = Job::One { database: self.name.clone(), operation, deadline, reply, permit };
        let sent = self.client.shared.jobs.send(job);
        sent.map_err(|_| closed())?;
        // A job that the thread never took is dropped, and so is its end.
        end.await.unwrap_or_else(|_| Err(closed()))
    }

    async fn all(&self, operations: Vec<Operation>) -> Vec<End> {
        if operations.is_empty() {
            return Vec::new();
        }
        let (count, deadline) = (operations.len(), self.deadline());
        let all = |error: ClientError| vec![Err(error); count];
        let permit = match self.client.admit(count).await {
            Ok(permit) => permit,
            Err(error) => return all(error),
        };
        let (reply, ends) = oneshot::channel();
        let job = Job::Batch { database: self.name.clone(), operations, deadline, reply, permit };
        if self.client.shared.jobs.send(job).is_err() {
            return all(closed());
        }
        ends.await.unwrap_or_else(|_| all(closed()))
    }
}

/// An answer to another kind of operation. `wire` lets none through.
fn mismatched(result: &OperationResult) -> ClientError {
    ClientError::Unknown(format!("the answer is of another kind: {result:?}").into())
}

/// Whether an operation keeps the rules; what it holds is not sent otherwise.
pub(crate) fn check(operation: &Operation) -> Result<(), ClientError> {
    let invalid = |text: String| Err(ClientError::Invalid(text));
    match operation.key().len() {
        0 => return invalid("the key is empty".into()),
        1..=KEY_BYTES_MAX => (),
        n => {
            return invalid(format!("the key has {n} bytes; at most {KEY_BYTES_MAX} are allowed"));
        }
    }
    let values: [&[u8]; 2] = match operation {
        Operation::Get(_) | Operation::Delete(_) => [&[], &[]],
        Operation::Put(_, value) => [value, &[]],
        Operation::Cas(_, Expect::Value(old), new) => [old, new],
        Operation::Cas(_, _, new) => [new, &[]],
    };
    match values.iter().map(|value| value.len()).max() {
        Some(n) if n > VALUE_BYTES_MAX => {
            invalid(format!("the value has {n} bytes; at most {VALUE_BYTES_MAX} are allowed"))
        }
        _ => Ok(()),
    }
}
