//! Connections to nodes: one per address, made when first needed and shared by all calls.
//!
//! A node that can't be reached is dialled again only after a delay that doubles; until then whoever
//! asks gets the last error at once, and may go elsewhere. A connection that breaks fails its calls at
//! once and is replaced at the next call; one whose node is [silent](super::silence) is given up by the
//! calls that wait.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::fmt;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use capnp_rpc::rpc_twoparty_capnp::Side;
use capnp_rpc::{RpcSystem, twoparty};
use futures_util::io::AsyncRead;
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::{AbortHandle, spawn_local};

use super::gather::Gatherer;
use super::retry::Failure;
use super::silence::{self, Signs, Verdict};
use crate::ids::{ClusterId, NodeId, RandomId};
use crate::limits::{
    CONNECTION_IDLE_MS, DIAL_BACKOFF_MS_MAX, DIAL_MS_MAX, DIAL_SLOW_MS, NODES_TOLD_MAX, RETRY_MS_MIN,
    SILENCE_MS_MAX,
};
use crate::refusal::Refusal;
use crate::schema::{admin_capnp::admin, kv_capnp::gate, kv_capnp::kv};
use crate::transport::foreign::is_abort_for_client;
use crate::transport::rpc_stream::{RpcReader, reader_options, rpc_streams};
use crate::version::{FEATURE_GATHER, PROTOCOL_MAX, PROTOCOL_SESSIONS};

/// Why a node is of no use for now.
#[derive(Clone, Debug)]
pub struct Obstacle {
    text: Rc<str>,
    /// The address is that of another port than a client's.
    wrong_port: bool,
}

impl From<String> for Obstacle {
    fn from(text: String) -> Obstacle {
        Obstacle { text: text.into(), wrong_port: false }
    }
}

/// For a person.
impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// What stood in the way at each of the nodes asked.
#[derive(Default)]
pub struct Obstacles {
    wrong_ports: Vec<String>,
    others: Vec<String>,
    /// Those that are not told.
    more: usize,
}

impl Obstacles {
    /// One more.
    pub fn add(&mut self, obstacle: &Obstacle) {
        let kept = if obstacle.wrong_port { &mut self.wrong_ports } else { &mut self.others };
        if kept.len() < NODES_TOLD_MAX { kept.push(obstacle.to_string()) } else { self.more += 1 }
    }

    /// What it means for whoever asked. A node that is down may come back; but if every address is that
    /// of a wrong port, waiting helps nobody.
    pub fn failure(self) -> Failure {
        if self.others.is_empty() && !self.wrong_ports.is_empty() {
            return Failure::Refused(Refusal::Invalid(self.wrong_ports.join("; ")));
        }
        let mut told = self.others;
        told.extend(self.wrong_ports);
        match (told.is_empty(), self.more) {
            (true, _) => Failure::NotSent("no address of any node is known".into()),
            (false, 0) => Failure::NotSent(told.join("; ")),
            (false, more) => Failure::NotSent(format!("{}; and {more} more", told.join("; "))),
        }
    }
}

/// What those hear who give the address of a web server, most likely that of a node's metrics.
const HTTP_PORT: &str =
    "an HTTP server answers there, perhaps the `http` port of a node; clients use its `client` port";

type Dialled = Result<Rc<Connection>, Obstacle>;

/// A connection that a node has welcomed.
pub struct Connection {
    /// Its data.
    pub kv: kv::Client,
    /// Batches of operations on it.
    pub batches: Rc<Gatherer>,
    /// Its administration.
    pub admin: admin::Client,
    /// The node that answered.
    pub node: NodeId,
    /// The cluster that the node belongs to; all zeros while it belongs to none.
    pub cluster_id: ClusterId,
    line: Rc<Line>,
    /// When the node was last asked for a sign of life.
    asked: Cell<Option<Instant>>,
    /// Bytes of the calls under way.
    owed: Cell<usize>,
    /// When the last call began that wasn't for the map alone.
    used: Cell<Option<Instant>>,
    broken: Rc<Cell<bool>>,
    _tasks: Tasks,
}

impl Connection {
    /// Whether it is known to be of no use any more.
    pub fn broken(&self) -> bool {
        self.broken.get()
    }

    /// Whether anything was heard since `then`.
    fn heard_since(&self, then: Instant) -> bool {
        self.line.heard.get() > then
    }

    /// A call that sends `bytes` begins, for as long as the watch lives.
    pub fn watch(self: &Rc<Connection>, bytes: usize) -> Watch {
        self.used.set(Some(Instant::now()));
        self.owed.set(self.owed.get() + bytes);
        Watch { connection: self.clone(), began: Instant::now(), bytes }
    }

    /// The same for a call that asks for the map. Any node would do for that, so it is no reason to keep the connection.
    pub fn watch_aside(self: &Rc<Connection>) -> Watch {
        Watch { connection: self.clone(), began: Instant::now(), bytes: 0 }
    }

    /// Asks the node something that it answers by itself, and nothing if all is as we know it.
    fn ask_for_a_sign(&self) {
        self.asked.set(Some(Instant::now()));
        let mut request = self.kv.map_request();
        request.get().set_since(u64::MAX);
        let sign = request.send().promise;
        // What is in the answer doesn't matter; it ends with the connection at the latest.
        spawn_local(async move { drop(sign.await) });
    }
}

/// Watches the node behind a connection while a call waits.
pub struct Watch {
    connection: Rc<Connection>,
    began: Instant,
    bytes: usize,
}

impl Watch {
    /// Waits for the answer. `None`: the node is gone, as far as one can tell.
    pub async fn answer<T>(&self, answer: impl Future<Output = T>) -> Option<T> {
        let mut answer = std::pin::pin!(answer);
        loop {
            let look = self.look()?;
            if let Ok(done) = tokio::time::timeout_at(look.into(), &mut answer).await {
                return Some(done);
            }
            // This process may have been stopped too: what came meanwhile is read first.
            tokio::task::yield_now().await;
        }
    }

    /// Whether nothing at all was heard since the call began, for so long that it should have been.
    pub fn silent(&self) -> bool {
        let patience = silence::patience(self.connection.owed.get());
        self.began.elapsed() >= patience && !self.connection.heard_since(self.began)
    }

    /// When to look again; `None`: the node is gone.
    pub fn look(&self) -> Option<Instant> {
        let connection = &self.connection;
        loop {
            let signs = Signs {
                heard: connection.line.heard.get(),
                asked: connection.asked.get(),
                owed: connection.owed.get(),
            };
            match silence::verdict(&signs, self.began, Instant::now()) {
                Verdict::Wait(until) => return Some(until),
                Verdict::Ask => connection.ask_for_a_sign(),
                Verdict::Gone => return None,
            }
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.connection.owed.set(self.connection.owed.get() - self.bytes);
    }
}

/// What comes in on a connection, before it is understood.
struct Line {
    heard: Cell<Instant>,
    /// How the first bytes begin.
    first: Cell<[u8; 4]>,
    /// So many bytes came, up to those of `first`.
    count: Cell<usize>,
}

impl Line {
    fn new() -> Rc<Line> {
        Rc::new(Line { heard: Cell::new(Instant::now()), first: Cell::default(), count: Cell::default() })
    }

    fn note(&self, bytes: &[u8]) {
        self.heard.set(Instant::now());
        let (mut first, count) = (self.first.get(), self.count.get());
        for (place, byte) in first[count..].iter_mut().zip(bytes) {
            *place = *byte;
        }
        self.first.set(first);
        self.count.set((count + bytes.len()).min(first.len()));
    }

    /// Whether a web server answered. No message of ours begins so: it would have more segments than
    /// any may have.
    fn is_http(&self) -> bool {
        self.first.get() == *b"HTTP"
    }
}

/// A reader that notes what comes.
struct Noted(RpcReader, Rc<Line>);

impl AsyncRead for Noted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let count = ready!(Pin::new(&mut self.0).poll_read(context, buffer))?;
        if let Some(read @ [_, ..]) = buffer.get(..count) {
            self.1.note(read);
        }
        Poll::Ready(Ok(count))
    }
}

enum Slot {
    Dialling { since: Instant, waiting: Vec<oneshot::Sender<Dialled>> },
    Ready(Rc<Connection>),
    Failed { why: Obstacle, delay: Duration, again: Instant },
}

/// All connections of a client, by address.
#[derive(Default)]
pub struct Pool {
    slots: RefCell<HashMap<String, Slot>>,
}

impl Pool {
    /// The connection to `address`, dialled if need be. Takes at most [`DIAL_MS_MAX`]. With
    /// `patient` false, a node that couldn't be reached just now is dialled all the same.
    pub async fn get(self: &Rc<Pool>, address: &str, patient: bool) -> Dialled {
        let (tell, dialled) = oneshot::channel();
        {
            let mut slots = self.slots.borrow_mut();
            let mut delay = Duration::ZERO;
            match slots.get_mut(address) {
                Some(Slot::Ready(connection)) if !connection.broken() => {
                    return Ok(connection.clone());
                }
                Some(Slot::Failed { why, again, .. }) if patient && Instant::now() < *again => {
                    return Err(why.clone());
                }
                Some(Slot::Dialling { waiting, .. }) => {
                    waiting.push(tell);
                }
                found => {
                    if let Some(Slot::Failed { delay: last, .. }) = found {
                        delay = *last;
                    }
                    let dialling = Slot::Dialling { since: Instant::now(), waiting: vec![tell] };
                    slots.insert(address.to_owned(), dialling);
                    // A task of its own: who asked first may stop waiting before the others.
                    spawn_local(self.clone().dial(address.to_owned(), delay));
                }
            }
        }
        let given_up = |_| Err(Obstacle::from(format!("{address}: dialling was given up")));
        dialled.await.unwrap_or_else(given_up)
    }

    /// Until when the node at `address` is worth waiting for where there are others: it is slow to
    /// welcome if that takes longer.
    pub fn slow_at(&self, address: &str) -> Instant {
        let since = match self.slots.borrow().get(address) {
            Some(Slot::Dialling { since, .. }) => *since,
            _ => Instant::now(),
        };
        since + Duration::from_millis(DIAL_SLOW_MS)
    }

    async fn dial(self: Rc<Pool>, address: String, last_delay: Duration) {
        let limit = Duration::from_millis(DIAL_MS_MAX);
        let dialled: Dialled = match tokio::time::timeout(limit, dial(&address)).await {
            Ok(Ok(connection)) => Ok(Rc::new(connection)),
            Ok(Err(why)) => {
                Err(Obstacle { text: format!("{address}: {why}").into(), wrong_port: why.wrong_port })
            }
            Err(_) => Err(format!("{address}: no welcome within {limit:?}").into()),
        };
        let slot = match &dialled {
            Ok(connection) => Slot::Ready(connection.clone()),
            Err(why) => {
                let delay = (last_delay * 2)
                    .clamp(Duration::from_millis(RETRY_MS_MIN), Duration::from_millis(DIAL_BACKOFF_MS_MAX));
                Slot::Failed { why: why.clone(), delay, again: Instant::now() + delay }
            }
        };
        let before = self.slots.borrow_mut().insert(address, slot);
        if let Some(Slot::Dialling { waiting, .. }) = before {
            for waiter in waiting {
                // A waiter whose deadline passed is gone.
                waiter.send(dialled.clone()).ok();
            }
        }
    }

    /// A call that began at `began` on `connection` got no answer in time, or its watch says that the node is
    /// `gone`. Then, or if nothing at all was heard there meanwhile, it may be dead without knowing: later
    /// calls dial anew, which costs little. After a long silence that holds for all others too on which
    /// nothing was heard: what forgot the one may have forgotten all.
    pub fn unanswered(&self, connection: &Rc<Connection>, began: Instant, gone: bool) {
        if connection.heard_since(began) && !gone {
            return;
        }
        self.discard(connection);
        if began.elapsed() >= Duration::from_millis(SILENCE_MS_MAX) {
            let mut slots = self.slots.borrow_mut();
            slots.retain(|_, slot| !matches!(slot, Slot::Ready(c) if !c.heard_since(began)));
        }
    }

    /// Closes connections that nobody holds and that are of no use but to ask for the map, which any of the others is
    /// too: those that have had no other call within [`CONNECTION_IDLE_MS`].
    pub fn close_idle(&self, now: Instant) {
        let idle = Duration::from_millis(CONNECTION_IDLE_MS);
        let lately = |used: Instant| now.saturating_duration_since(used) < idle;
        let is_kept = |c: &Rc<Connection>| Rc::strong_count(c) > 1 || c.used.get().is_some_and(lately);
        self.slots.borrow_mut().retain(|_, slot| !matches!(slot, Slot::Ready(c) if !is_kept(c)));
    }

    /// Has the next call dial anew instead of using `connection`. Calls under way on it go on.
    pub fn discard(&self, connection: &Rc<Connection>) {
        self.slots
            .borrow_mut()
            .retain(|_, slot| !matches!(slot, Slot::Ready(c) if Rc::ptr_eq(c, connection)));
    }
}

async fn dial(address: &str) -> Result<Connection, Obstacle> {
    let stream = TcpStream::connect(address).await;
    let stream = stream.map_err(|e| e.to_string())?;
    let (reader, writer, flusher) = rpc_streams(stream).map_err(|e| e.to_string())?;
    let line = Line::new();
    let reader = Noted(reader, line.clone());
    let network = twoparty::VatNetwork::new(reader, writer, Side::Client, reader_options());
    let mut system = RpcSystem::new(Box::new(network), None);
    let gate: gate::Client = system.bootstrap(Side::Server);
    let broken = Rc::new(Cell::new(false));
    let ended = broken.clone();
    let name = address.to_owned();
    let system = spawn_local(async move {
        if let Err(error) = system.await {
            tracing::debug!(address = name, %error, "connection to a node broke");
        }
        ended.set(true);
    });
    let ended = broken.clone();
    let flusher = spawn_local(async move {
        // A failed write is seen by the reading side too, which says so.
        flusher.await.ok();
        ended.set(true);
    });
    // From here on an early return must end the tasks too.
    let tasks = Tasks([system.abort_handle(), flusher.abort_handle()]);
    let mut request = gate.open_request();
    let mut hello = request.get().init_hello();
    hello.set_software(concat!("pontoon-rust ", env!("CARGO_PKG_VERSION")));
    let mut range = hello.init_protocol();
    // A node without sessions would apply a repeated command again.
    range.set_min(PROTOCOL_SESSIONS);
    range.set_max(PROTOCOL_MAX);
    let text = |e: capnp::Error| match line.is_http() {
        true => Obstacle { text: HTTP_PORT.into(), wrong_port: true },
        false => Obstacle { text: e.to_string().into(), wrong_port: is_abort_for_client(&e) },
    };
    let response = request.send().promise.await.map_err(text)?;
    let response = response.get().map_err(text)?;
    let welcome = response.get_welcome().map_err(text)?;
    let protocol = welcome.get_protocol();
    if !(PROTOCOL_SESSIONS..=PROTOCOL_MAX).contains(&protocol) {
        return Err(Obstacle::from(format!(
            "the node speaks protocol {protocol}, this client {PROTOCOL_SESSIONS} to {PROTOCOL_MAX}"
        )));
    }
    let cluster_id = RandomId::from_slice(welcome.get_cluster_id().map_err(text)?);
    let features = welcome.get_features().map_err(text)?;
    let gathers = features.iter().any(|name| name.is_ok_and(|name| name == FEATURE_GATHER));
    let kv = response.get_kv().map_err(text)?;
    Ok(Connection {
        batches: Gatherer::new(kv.clone(), gathers),
        kv,
        admin: response.get_admin().map_err(text)?,
        node: NodeId(welcome.get_node()),
        cluster_id: cluster_id.unwrap_or_default(),
        line,
        asked: Cell::default(),
        owed: Cell::default(),
        used: Cell::default(),
        broken,
        _tasks: tasks,
    })
}

/// The tasks of a connection; they end with it.
struct Tasks([AbortHandle; 2]);

impl Drop for Tasks {
    fn drop(&mut self) {
        for task in &self.0 {
            task.abort();
        }
    }
}
