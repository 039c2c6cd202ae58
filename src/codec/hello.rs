//! The first frame each way on a peer connection: who dials, whom they mean, what for; and the answer.

use bytes::Bytes;

use super::CodecError;
use super::peer::{read_frame_bytes, write_frame_bytes};
use super::records::malformed;
use crate::ids::{ClusterId, NodeId};
use crate::limits::REFUSAL_BYTES_MAX;
use crate::schema::peer_capnp::{self, peer_hello, peer_welcome};

/// Least version of the peer protocol that this build speaks.
pub const PROTOCOL_MIN: u32 = 1;
/// Greatest version of the peer protocol that this build speaks.
pub const PROTOCOL_MAX: u32 = 1;

/// A connection's class. Each has a connection of its own, so that bulk never delays liveness.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Lane {
    /// Heartbeats, votes, read rounds.
    Control,
    /// Log entries and their acknowledgements.
    Append,
    /// Formation, join, map pulls: request and answer.
    Request,
    /// One snapshot of one shard: an offer, its bytes, and answers.
    Snapshot,
}

impl Lane {
    /// Its name in logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Lane::Control => "control",
            Lane::Append => "append",
            Lane::Request => "request",
            Lane::Snapshot => "snapshot",
        }
    }
}

/// Protocol versions a side speaks, both ends included.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ProtocolRange {
    /// The least.
    pub min: u32,
    /// The greatest.
    pub max: u32,
}

impl ProtocolRange {
    /// What this build speaks.
    pub const OURS: ProtocolRange = ProtocolRange { min: PROTOCOL_MIN, max: PROTOCOL_MAX };

    /// The greatest version that both speak.
    pub fn common(self, other: ProtocolRange) -> Option<u32> {
        let version = self.max.min(other.max);
        (version >= self.min.max(other.min)).then_some(version)
    }
}

/// What a dialler says first.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PeerHello {
    /// Versions it speaks.
    pub protocol: ProtocolRange,
    /// Its cluster; `None`: not yet a member (lane `request` only).
    pub cluster_id: Option<ClusterId>,
    /// Its id; 0: not yet a member (lane `request` only).
    pub from_node: NodeId,
    /// The node it means; 0: whoever answers (lane `request` only).
    pub to_node: NodeId,
    /// What the connection is for.
    pub lane: Lane,
    /// Drawn at each start of its process.
    pub incarnation: u64,
}

/// What the other side answers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PeerWelcome {
    /// The protocol version spoken from here on, or why not.
    pub outcome: Result<u32, HelloRefusal>,
    /// Who answers; 0 while not a member.
    pub node: NodeId,
    /// Which start of its process this is.
    pub incarnation: u64,
}

/// Why a connection is refused.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HelloRefusal {
    /// As far as the dialler has to act on it.
    pub kind: RefusalKind,
    /// For the dialler's log.
    pub text: String,
}

/// What a refused dialler has to act on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RefusalKind {
    /// Nothing: see the text.
    Other,
    /// It was removed from the cluster, or its record was lost: the cluster map tells.
    Removed,
    /// A process that is alive says that it is the same node.
    Duplicate,
}

impl From<String> for HelloRefusal {
    fn from(text: String) -> HelloRefusal {
        HelloRefusal { kind: RefusalKind::Other, text }
    }
}

impl std::fmt::Display for HelloRefusal {
    fn fmt(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        to.write_str(&self.text)
    }
}

impl PeerHello {
    /// Its bytes, as the payload of a frame.
    pub fn encode(&self) -> Result<Vec<u8>, CodecError> {
        let mut message = capnp::message::Builder::new_default();
        let mut to = message.init_root::<peer_hello::Builder<'_>>();
        let mut protocol = to.reborrow().init_protocol();
        protocol.set_min(self.protocol.min);
        protocol.set_max(self.protocol.max);
        if let Some(cluster_id) = self.cluster_id {
            to.set_cluster_id(&cluster_id.0);
        }
        to.set_from_node(self.from_node.0);
        to.set_to_node(self.to_node.0);
        to.set_incarnation(self.incarnation);
        to.set_lane(match self.lane {
            Lane::Control => peer_capnp::Lane::Control,
            Lane::Append => peer_capnp::Lane::Append,
            Lane::Request => peer_capnp::Lane::Request,
            Lane::Snapshot => peer_capnp::Lane::Snapshot,
        });
        let mut out = Vec::new();
        write_frame_bytes(&message, &mut out)?;
        Ok(out)
    }

    /// Reads one. On every lane but `request`, the cluster and both nodes must be named.
    pub fn decode(payload: Bytes) -> Result<PeerHello, CodecError> {
        let wrong = |detail: &str| malformed("PeerHello", detail);
        read_frame_bytes(payload, |reader| {
            let from = reader.get_root::<peer_hello::Reader<'_>>()?;
            let protocol = from.get_protocol()?;
            let hello = PeerHello {
                protocol: ProtocolRange { min: protocol.get_min(), max: protocol.get_max() },
                cluster_id: match from.get_cluster_id()? {
                    [] => None,
                    bytes => Some(ClusterId::from_slice(bytes).ok_or_else(|| wrong("cluster id"))?),
                },
                from_node: NodeId(from.get_from_node()),
                to_node: NodeId(from.get_to_node()),
                lane: match from.get_lane()? {
                    peer_capnp::Lane::Control => Lane::Control,
                    peer_capnp::Lane::Append => Lane::Append,
                    peer_capnp::Lane::Request => Lane::Request,
                    peer_capnp::Lane::Snapshot => Lane::Snapshot,
                },
                incarnation: from.get_incarnation(),
            };
            let anonymous = hello.cluster_id.is_none() || hello.from_node.0 == 0 || hello.to_node.0 == 0;
            if anonymous && hello.lane != Lane::Request {
                return Err(wrong("the cluster and both nodes must be named"));
            }
            Ok(hello)
        })
    }

    /// What every node checks of a hello, whatever it is doing: that it is the node meant, in the
    /// cluster meant, and not talking to itself. `cluster_id` is the one this node has recorded. The
    /// error is for the dialler's log.
    pub fn check(&self, cluster_id: Option<ClusterId>, node: NodeId) -> Result<(), String> {
        if let Some(theirs) = self.cluster_id
            && cluster_id != Some(theirs)
            && (cluster_id.is_some() || self.lane != Lane::Request)
        {
            return Err(match cluster_id {
                Some(ours) => {
                    format!("this node belongs to cluster {ours}, the caller to {theirs}")
                }
                None => "this node is not yet a member of a cluster".to_owned(),
            });
        }
        if self.to_node.0 != 0 && self.to_node != node {
            return Err(format!(
                "this is node {node}, the caller means node {}; is an address in use by another node?",
                self.to_node
            ));
        }
        if self.from_node.0 != 0 && self.from_node == node {
            return Err(format!(
                "the caller says it is node {node}, which is this node; was a directory copied?"
            ));
        }
        Ok(())
    }
}

impl PeerWelcome {
    /// Its bytes, as the payload of a frame.
    pub fn encode(&self) -> Result<Vec<u8>, CodecError> {
        let mut message = capnp::message::Builder::new_default();
        let mut to = message.init_root::<peer_welcome::Builder<'_>>();
        match &self.outcome {
            Ok(version) => to.set_accepted(*version),
            Err(refusal) => {
                to.set_refused(printable(&refusal.text).as_str());
                to.set_reason(match refusal.kind {
                    RefusalKind::Other => peer_capnp::HelloRefusal::Other,
                    RefusalKind::Removed => peer_capnp::HelloRefusal::Removed,
                    RefusalKind::Duplicate => peer_capnp::HelloRefusal::Duplicate,
                });
            }
        }
        to.set_node(self.node.0);
        to.set_incarnation(self.incarnation);
        let mut out = Vec::new();
        write_frame_bytes(&message, &mut out)?;
        Ok(out)
    }

    /// Reads one.
    pub fn decode(payload: Bytes) -> Result<PeerWelcome, CodecError> {
        read_frame_bytes(payload, |reader| {
            let from = reader.get_root::<peer_welcome::Reader<'_>>()?;
            let outcome = match from.which()? {
                peer_welcome::Accepted(version) => Ok(version),
                peer_welcome::Refused(reason) => Err(HelloRefusal {
                    text: printable(&String::from_utf8_lossy(reason?.as_bytes())),
                    kind: match from.get_reason() {
                        Ok(peer_capnp::HelloRefusal::Removed) => RefusalKind::Removed,
                        Ok(peer_capnp::HelloRefusal::Duplicate) => RefusalKind::Duplicate,
                        // One that this version doesn't know has its text.
                        Ok(peer_capnp::HelloRefusal::Other) | Err(_) => RefusalKind::Other,
                    },
                }),
            };
            Ok(PeerWelcome { outcome, node: NodeId(from.get_node()), incarnation: from.get_incarnation() })
        })
    }
}

/// Text of a stranger, fit for a log: bounded and without control characters.
pub(super) fn printable(text: &str) -> String {
    let mut end = text.len().min(REFUSAL_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}
