//! What a node sends to its peers: one [`PeerNetwork`] for all its groups and threads.
//!
//! [`PeerNetwork::send`] is called from any thread, once per pass over a thread's groups, and only
//! sorts messages into outboxes. [`PeerNetwork::run`] keeps one link per peer and lane, on the runtime
//! it is awaited on.
//!
//! Two lanes, so that bulk delays neither liveness nor reads: appends, their acknowledgements and
//! snapshot headers on one, in order per group; everything else on the other. Raft doesn't mind that a
//! heartbeat overtakes an append: the commit index it carries is one the follower has acknowledged.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use metrics::counter;
use raft::eraftpb::MessageType;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tracing::warn;

use super::Timings;
use super::link::{LinkState, run_link};
use super::outbox::Outbox;
use crate::codec::GroupMessage;
use crate::codec::hello::{HelloRefusal, Lane};
use crate::codec::messages::{check, wire_size};
use crate::codec::peer::NodeHeartbeat;
use crate::ids::{ClusterId, NodeId};
use crate::limits::{FRAME_BYTES_MAX, FRAME_TARGET_BYTES, OUTBOX_BYTES_MAX, OUTBOX_CONTROL_BYTES_MAX};
use crate::telemetry::metrics as names;

/// Called when messages to a node were lost; from the thread that sent them or from the link's. It
/// must not block, and may be called often.
pub type OnUnreachable = Arc<dyn Fn(NodeId) + Send + Sync>;

/// Called when a process of a node seems to have ended: it had a connection of this node, and its port refuses another, or
/// another process answers there. With the number of the start; from the thread of the links, at each
/// attempt. It must not block.
pub type OnGone = Arc<dyn Fn(NodeId, u64) + Send + Sync>;

/// Called when a node refuses this one's connection, at every attempt; from the thread of the links. It must
/// not block.
pub type OnRefused = Arc<dyn Fn(NodeId, &HelloRefusal) + Send + Sync>;

/// Who sends, and how much may wait.
#[derive(Clone)]
pub struct PeerNetworkConfig {
    /// The cluster this node belongs to.
    pub cluster_id: ClusterId,
    /// This node.
    pub node: NodeId,
    /// Which start of its process this is.
    pub incarnation: u64,
    /// Whom to tell of lost messages.
    pub on_unreachable: OnUnreachable,
    /// Whom to tell of refused connections.
    pub on_refused: OnRefused,
    /// Whom to tell of processes that have ended.
    pub on_gone: OnGone,
    /// Clocks of the links.
    pub timings: Timings,
    /// Bytes that may wait for one peer on the append lane.
    pub append_bytes_max: usize,
    /// Bytes that may wait for one peer on the control lane.
    pub control_bytes_max: usize,
}

impl PeerNetworkConfig {
    /// With the bounds of [`crate::limits`], and nobody to tell of refusals.
    pub fn new(
        cluster_id: ClusterId,
        node: NodeId,
        incarnation: u64,
        on_unreachable: OnUnreachable,
    ) -> PeerNetworkConfig {
        PeerNetworkConfig {
            cluster_id,
            node,
            incarnation,
            on_unreachable,
            on_refused: Arc::new(|_, _| ()),
            on_gone: Arc::new(|_, _| ()),
            timings: Timings::default(),
            append_bytes_max: OUTBOX_BYTES_MAX,
            control_bytes_max: OUTBOX_CONTROL_BYTES_MAX,
        }
    }
}

/// The way to all peers. Cheap to clone; usable from any thread.
#[derive(Clone)]
pub struct PeerNetwork {
    shared: Arc<Shared>,
}

struct Shared {
    config: PeerNetworkConfig,
    peers: ArcSwap<HashMap<NodeId, Arc<Peer>>>,
    /// Held while `peers` is replaced.
    changing: Mutex<()>,
    changed: Notify,
}

/// One peer: written by `set_peers`, read by senders and links.
pub(super) struct Peer {
    pub(super) node: NodeId,
    /// HOST:PORT; resolved at each dial.
    pub(super) address: ArcSwap<String>,
    pub(super) control: PeerLane,
    pub(super) append: PeerLane,
}

/// One lane of a peer.
pub(super) struct PeerLane {
    pub(super) lane: Lane,
    pub(super) outbox: Outbox,
    /// To dial without further delay, if there is no connection.
    pub(super) redial: Notify,
    pub(super) state: Mutex<LinkState>,
}

impl PeerLane {
    fn new(lane: Lane, bytes_max: usize) -> PeerLane {
        PeerLane { lane, outbox: Outbox::new(bytes_max), redial: Notify::new(), state: Mutex::default() }
    }

    pub(super) fn state(&self) -> std::sync::MutexGuard<'_, LinkState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Peer {
    pub(super) fn lane(&self, lane: Lane) -> &PeerLane {
        match lane {
            Lane::Append => &self.append,
            _ => &self.control,
        }
    }

    fn close(&self) {
        self.control.outbox.close();
        self.append.outbox.close();
    }
}

/// How the links to one peer are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PeerStatus {
    /// The peer.
    pub node: NodeId,
    /// Where it is dialled.
    pub address: String,
    /// The control lane.
    pub control: LinkState,
    /// The append lane.
    pub append: LinkState,
    /// Bytes that wait for it on both lanes.
    pub queued_bytes: usize,
}

/// The lane a message travels on.
fn lane_of(message: &GroupMessage) -> Lane {
    match message.message.get_msg_type() {
        MessageType::MsgAppend | MessageType::MsgAppendResponse | MessageType::MsgSnapshot => Lane::Append,
        _ => Lane::Control,
    }
}

impl PeerNetwork {
    /// Without any peer yet.
    pub fn new(config: PeerNetworkConfig) -> PeerNetwork {
        PeerNetwork {
            shared: Arc::new(Shared {
                config,
                peers: ArcSwap::default(),
                changing: Mutex::default(),
                changed: Notify::new(),
            }),
        }
    }

    /// Sets who the peers are and at which HOST:PORT they listen. Links to those no longer listed end;
    /// a changed address is dialled at once. This node itself may be listed, and is passed over.
    pub fn set_peers(&self, peers: &[(NodeId, String)]) {
        let shared = &self.shared;
        let _changing = shared.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let before = shared.peers.load_full();
        let mut after = HashMap::with_capacity(peers.len());
        for (node, address) in peers.iter().filter(|(n, _)| *n != shared.config.node) {
            let peer = match before.get(node) {
                Some(peer) => {
                    if **peer.address.load() != *address {
                        peer.address.store(Arc::new(address.clone()));
                        peer.control.outbox.wake();
                        peer.append.outbox.wake();
                    }
                    peer.clone()
                }
                None => Arc::new(Peer {
                    node: *node,
                    address: ArcSwap::from_pointee(address.clone()),
                    control: PeerLane::new(Lane::Control, shared.config.control_bytes_max),
                    append: PeerLane::new(Lane::Append, shared.config.append_bytes_max),
                }),
            };
            after.insert(*node, peer);
        }
        for (node, peer) in before.iter() {
            if !after.contains_key(node) {
                peer.close();
            }
        }
        shared.peers.store(Arc::new(after));
        shared.changed.notify_one();
    }

    /// Hands messages to the links of their nodes. Never blocks. What finds no room, or no such peer,
    /// is dropped, counted, and its node reported as unreachable.
    pub fn send(&self, batches: Vec<(NodeId, Vec<GroupMessage>)>) {
        let peers = self.shared.peers.load();
        for (node, messages) in batches {
            let sent = messages.len();
            let (append, control): (Vec<_>, Vec<_>) = messages
                .into_iter()
                .filter(|message| self.sendable(node, message))
                .partition(|message| lane_of(message) == Lane::Append);
            let dropped = match peers.get(&node) {
                Some(peer) => {
                    let dropped =
                        [(&peer.append, append), (&peer.control, control)].map(|(lane, messages)| {
                            if messages.is_empty() {
                                return 0;
                            }
                            let dropped = lane.outbox.push(messages);
                            count_dropped(lane.lane, "full", dropped);
                            dropped
                        });
                    dropped.iter().sum()
                }
                None => {
                    count_dropped(Lane::Append, "no such peer", append.len());
                    count_dropped(Lane::Control, "no such peer", control.len());
                    sent
                }
            };
            if dropped > 0 {
                (self.shared.config.on_unreachable)(node);
            }
        }
    }

    /// A message that the other side would refuse must not reach it: it would cost the connection,
    /// which all groups share. None such should be made.
    fn sendable(&self, node: NodeId, message: &GroupMessage) -> bool {
        let size = wire_size(message);
        let problem = match check(message) {
            Err(error) => error.to_string(),
            Ok(()) if size > FRAME_BYTES_MAX - FRAME_TARGET_BYTES => {
                format!("a message of {size} bytes doesn't fit a frame")
            }
            Ok(()) => return true,
        };
        warn!(%node, shard = %message.shard, problem, "not sending a message to a peer");
        count_dropped(lane_of(message), "invalid", 1);
        false
    }

    /// Sends this node's heartbeat to all peers, ahead of what waits for them. One that wasn't sent yet
    /// is replaced.
    pub fn broadcast_heartbeat(&self, heartbeat: NodeHeartbeat) {
        for peer in self.shared.peers.load().values() {
            peer.control.outbox.set_heartbeat(heartbeat);
        }
    }

    /// There is news of a node: whoever waits to dial it does so now.
    pub fn redial(&self, node: NodeId) {
        if let Some(peer) = self.shared.peers.load().get(&node) {
            for lane in [&peer.control, &peer.append] {
                // Who doesn't wait looks by itself.
                lane.redial.notify_waiters();
            }
        }
    }

    /// The HOST:PORT at which a peer listens; `None`: no such peer.
    pub fn address(&self, node: NodeId) -> Option<String> {
        self.shared.peers.load().get(&node).map(|peer| peer.address.load().to_string())
    }

    /// How the links are, by node.
    pub fn status(&self) -> Vec<PeerStatus> {
        let peers = self.shared.peers.load();
        let mut all: Vec<PeerStatus> = peers
            .values()
            .map(|peer| PeerStatus {
                node: peer.node,
                address: peer.address.load().to_string(),
                control: peer.control.state().clone(),
                append: peer.append.state().clone(),
                queued_bytes: peer.control.outbox.bytes() + peer.append.outbox.bytes(),
            })
            .collect();
        all.sort_by_key(|status| status.node);
        all
    }

    /// Keeps the links: two tasks per peer, spawned on the current runtime. Never returns; dropping the
    /// future ends all links. To be run once. A panic in a link is passed on.
    pub async fn run(&self) {
        let mut links = JoinSet::new();
        let mut running: HashMap<NodeId, Arc<Peer>> = HashMap::new();
        loop {
            let peers = self.shared.peers.load_full();
            running.retain(|node, peer| peers.get(node).is_some_and(|now| Arc::ptr_eq(now, peer)));
            for (node, peer) in peers.iter() {
                if !running.contains_key(node) {
                    for lane in [Lane::Control, Lane::Append] {
                        let config = self.shared.config.clone();
                        links.spawn(run_link(config, peer.clone(), lane));
                    }
                    running.insert(*node, peer.clone());
                }
            }
            tokio::select! {
                () = self.shared.changed.notified() => {}
                Some(ended) = links.join_next() => {
                    if let Err(error) = ended && error.is_panic() {
                        std::panic::resume_unwind(error.into_panic());
                    }
                }
            }
        }
    }
}

pub(super) fn count_dropped(lane: Lane, why: &'static str, messages: usize) {
    if messages > 0 {
        counter!(names::PEER_MESSAGES_DROPPED, "lane" => lane.name(), "why" => why)
            .increment(messages as u64);
    }
}
