//! Connections to nodes: one per address, made when first needed and shared by all calls.
//!
//! A node that can't be reached is dialled again only after a delay that doubles; until then whoever
//! asks gets the last error at once, and may go elsewhere. A connection that breaks fails its calls at
//! once and is replaced at the next call.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::fmt;
use std::rc::Rc;
use std::time::{Duration, Instant};

use capnp_rpc::rpc_twoparty_capnp::Side;
use capnp_rpc::{RpcSystem, twoparty};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::{AbortHandle, spawn_local};

use super::retry::Failure;
use crate::ids::{ClusterId, NodeId, RandomId};
use crate::limits::{DIAL_BACKOFF_MS_MAX, DIAL_MS_MAX, RETRY_MS_MIN};
use crate::refusal::Refusal;
use crate::schema::{admin_capnp::admin, kv_capnp::gate, kv_capnp::kv};
use crate::transport::foreign::is_abort_for_client;
use crate::transport::rpc_stream::{reader_options, rpc_streams};
use crate::version::{PROTOCOL_MAX, PROTOCOL_SESSIONS};

/// Why a node is of no use for now.
#[derive(Clone, Debug)]
pub struct Obstacle {
    text: Rc<str>,
    /// The address is that of a node's peer port.
    peer_port: bool,
}

impl From<String> for Obstacle {
    fn from(text: String) -> Obstacle {
        Obstacle { text: text.into(), peer_port: false }
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
    peer_ports: Vec<String>,
    last: Option<String>,
}

impl Obstacles {
    /// One more.
    pub fn add(&mut self, obstacle: &Obstacle) {
        let text = obstacle.to_string();
        if obstacle.peer_port { self.peer_ports.push(text) } else { self.last = Some(text) }
    }

    /// What it means for whoever asked. A node that is down may come back; but if every address is that
    /// of a peer port, waiting helps nobody.
    pub fn failure(self) -> Failure {
        let wrong = self.peer_ports.join("; ");
        match self.last {
            Some(last) if wrong.is_empty() => Failure::NotSent(last),
            Some(last) => Failure::NotSent(format!("{last}; {wrong}")),
            None if wrong.is_empty() => Failure::NotSent("no address of any node is known".into()),
            None => Failure::Refused(Refusal::Invalid(wrong)),
        }
    }
}

type Dialled = Result<Rc<Connection>, Obstacle>;

/// A connection that a node has welcomed.
pub struct Connection {
    /// Its data.
    pub kv: kv::Client,
    /// Its administration.
    pub admin: admin::Client,
    /// The node that answered.
    pub node: NodeId,
    /// The cluster that the node belongs to; all zeros while it belongs to none.
    pub cluster_id: ClusterId,
    /// When the last answer came.
    pub heard: Cell<Instant>,
    broken: Rc<Cell<bool>>,
    _tasks: Tasks,
}

impl Connection {
    /// Whether it is known to be of no use any more.
    pub fn broken(&self) -> bool {
        self.broken.get()
    }
}

enum Slot {
    Dialling(Vec<oneshot::Sender<Dialled>>),
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
                Some(Slot::Dialling(waiting)) => {
                    waiting.push(tell);
                }
                found => {
                    if let Some(Slot::Failed { delay: last, .. }) = found {
                        delay = *last;
                    }
                    slots.insert(address.to_owned(), Slot::Dialling(vec![tell]));
                    // A task of its own: who asked first may stop waiting before the others.
                    spawn_local(self.clone().dial(address.to_owned(), delay));
                }
            }
        }
        let given_up = |_| Err(Obstacle::from(format!("{address}: dialling was given up")));
        dialled.await.unwrap_or_else(given_up)
    }

    async fn dial(self: Rc<Pool>, address: String, last_delay: Duration) {
        let limit = Duration::from_millis(DIAL_MS_MAX);
        let dialled: Dialled = match tokio::time::timeout(limit, dial(&address)).await {
            Ok(Ok(connection)) => Ok(Rc::new(connection)),
            Ok(Err(why)) => {
                Err(Obstacle { text: format!("{address}: {why}").into(), peer_port: why.peer_port })
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
        if let Some(Slot::Dialling(waiting)) = before {
            for waiter in waiting {
                // A waiter whose deadline passed is gone.
                waiter.send(dialled.clone()).ok();
            }
        }
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
    let text = |e: capnp::Error| Obstacle { text: e.to_string().into(), peer_port: is_abort_for_client(&e) };
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
    Ok(Connection {
        kv: response.get_kv().map_err(text)?,
        admin: response.get_admin().map_err(text)?,
        node: NodeId(welcome.get_node()),
        cluster_id: cluster_id.unwrap_or_default(),
        heard: Cell::new(Instant::now()),
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
