//! Frames of the peer port: the payload of one frame is one Cap'n Proto message, a `PeerFrame`.
//!
//! Reading checks everything in the payload and copies what it holds. A frame with anything wrong in it is refused whole: the
//! connection it came on is closed, and the sender starts anew.

use bytes::Bytes;
use capnp::Word;
use capnp::message::{HeapAllocator, Reader, ReaderOptions};
use capnp::serialize::{self, BufferSegments};

use crate::balance::facts::Survey;
use crate::codec::digest::{
    DigestRequest, Marked, ReplicaDigest, read_digest, read_digest_request, read_marked, write_digest,
    write_digest_request, write_marked,
};
use crate::codec::messages::{self, check, read_message, write_message};
use crate::codec::meta::{decode_command, decode_reply, encode_command, encode_reply};
use crate::codec::records::{
    length, malformed, read_delta, read_id, read_node, read_nodes, read_shard, read_text, write_delta,
    write_node, write_shard,
};
use crate::codec::refusal::{read_refusal, write_refusal};
use crate::codec::snapshot::{SnapshotFrame, read_snapshot, write_snapshot};
use crate::codec::survey::{
    Order, read_node as read_member, read_order, read_survey, write_order, write_survey,
};
use crate::codec::{CodecError, GroupMessage};
use crate::ids::{ClusterId, NodeId, ShardId};
use crate::limits::{FRAME_ENTRIES_MAX, FRAME_MESSAGES_MAX, NESTING_MAX};
use crate::machine::command::{MetaCommand, MetaReply};
use crate::placement::map::{MapDelta, NodeRecord, ShardRecord, Standing};
use crate::refusal::Refusal;
use crate::schema::peer_capnp::{
    formation, node_heartbeat, peer_frame, peer_request, peer_response, probe_answer,
};

/// One frame between nodes.
#[derive(Clone, PartialEq, Debug)]
pub enum PeerFrame {
    /// Messages of many groups.
    Raft(Vec<GroupMessage>),
    /// A node's liveness and the map version it holds.
    Heartbeat(NodeHeartbeat),
    /// A question; the id is echoed in the answer.
    Request(u64, PeerRequest),
    /// The answer to the request of that id.
    Response(u64, PeerResponse),
    /// A step of a snapshot's way to a follower.
    Snapshot(SnapshotFrame),
}

/// Liveness of a node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NodeHeartbeat {
    /// Who.
    pub node: NodeId,
    /// Which start of its process.
    pub incarnation: u64,
    /// Version of the cluster map it holds.
    pub map_version: u64,
    /// Its disk has less free than its reserve: it should not lead.
    pub disk_full: bool,
    /// Milliseconds since that map was known to be what the metadata shard's leader has, if it ever was since
    /// the sender started. Less than [`u32::MAX`].
    pub map_age_ms: Option<u32>,
    /// Replicas that have ended by themselves, since its process started: its heartbeats stood for those of groups that
    /// sleep, and for one of them they no longer do.
    pub ended: u64,
}

/// A question between nodes.
#[derive(Clone, PartialEq, Debug)]
pub enum PeerRequest {
    /// Formation: who are you?
    Probe,
    /// Formation: record this cluster id durably.
    Claim(ClusterId),
    /// Formation: become this voter of the metadata shard.
    Form(Formation),
    /// Make me a member.
    Join {
        /// The cluster meant; `None`: any.
        cluster_id: Option<ClusterId>,
        /// Who I am, with id 0.
        record: NodeRecord,
    },
    /// What changed in the cluster map after this version?
    Map {
        /// The version the asker has.
        since: u64,
    },
    /// A command for the metadata shard, if you lead it.
    Meta(MetaCommand),
    /// What do you hold and lead, and how is it?
    Survey,
    /// Something for the leader of a shard, if that is you.
    Order(Order),
    /// Put a mark into the log of a shard, if you lead it.
    Mark(ShardId),
    /// What is the state of your replica of a shard, at a mark?
    Digest(DigestRequest),
}

/// The answer to a [`PeerRequest`].
#[derive(Clone, PartialEq, Debug)]
pub enum PeerResponse {
    /// No.
    Refused(Refusal),
    /// To `Probe`.
    Probe(ProbeAnswer),
    /// To `Claim`.
    Claimed,
    /// To `Form`.
    Formed,
    /// To `Join`.
    Joined {
        /// The id given.
        node: NodeId,
        /// The whole map.
        map: MapDelta,
    },
    /// To `Map`.
    Map(MapDelta),
    /// To `Meta`.
    Meta(MetaReply),
    /// To `Survey`.
    Survey(Survey),
    /// To `Join`: the node is known under this id, and waits for an operator's word. To be asked again.
    Pending(NodeId),
    /// To `Order`: the change is committed and in force, or leadership has moved.
    Done,
    /// To `Mark`: it is applied.
    Marked(Marked),
    /// To `Digest`.
    Digest(ReplicaDigest),
}

/// The first content of a cluster, alike for all its first voters.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Formation {
    /// Identity of the cluster.
    pub cluster_id: ClusterId,
    /// Which of `nodes` the receiver is.
    pub node: NodeId,
    /// The first nodes.
    pub nodes: Vec<NodeRecord>,
    /// The metadata shard.
    pub metadata: ShardRecord,
}

/// How far a node is on its way into a cluster.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Membership {
    /// No cluster id recorded.
    Empty,
    /// Has recorded this cluster id, not yet a member.
    Claimed(ClusterId),
    /// Belongs to this cluster.
    Member(ClusterId, NodeId),
}

/// The answer to a probe.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ProbeAnswer {
    /// How far the node is.
    pub membership: Membership,
    /// Who it is: id 0 unless a member.
    pub record: NodeRecord,
}

/// Appends the payload of a frame to `out`. Fails on a message that a peer may not send, so that a bug
/// here doesn't close connections there, and on lists beyond what Cap'n Proto can hold.
pub fn encode(frame: &PeerFrame, out: &mut Vec<u8>) -> Result<(), CodecError> {
    match frame {
        PeerFrame::Raft(messages) => {
            messages.iter().try_for_each(check)?;
            encode_raft(messages, out)
        }
        PeerFrame::Heartbeat(heartbeat) => write(out, 64, |to| {
            let mut to = to.init_heartbeat();
            to.set_node(heartbeat.node.0);
            to.set_incarnation(heartbeat.incarnation);
            to.set_map_version(heartbeat.map_version);
            to.set_disk_full(heartbeat.disk_full);
            to.set_map_age(heartbeat.map_age_ms.map_or(0, |age| age.saturating_add(1)));
            to.set_ended(heartbeat.ended);
        }),
        PeerFrame::Request(id, request) => write(out, 1024, |to| {
            let mut to = to.init_request();
            to.set_id(*id);
            write_request(request, to);
        }),
        PeerFrame::Response(id, response) => write(out, 4096, |to| {
            let mut to = to.init_response();
            to.set_id(*id);
            write_response(response, to);
        }),
        PeerFrame::Snapshot(frame) => {
            write(out, frame.size(), |to| write_snapshot(frame, to.init_snapshot()))
        }
    }
}

/// Appends the payload of a frame of raft messages to `out`. The messages passed
/// [`messages::check`] before, when they were queued.
pub fn encode_raft(messages: &[GroupMessage], out: &mut Vec<u8>) -> Result<(), CodecError> {
    if messages.len() > FRAME_MESSAGES_MAX {
        return Err(malformed("frame", format!("{} messages", messages.len())));
    }
    let bytes: usize = messages.iter().map(messages::wire_size).sum();
    write(out, bytes, |to| {
        let mut list = to.init_raft(length(messages.len()));
        for (at, message) in (0..).zip(messages) {
            write_message(message, list.reborrow().get(at));
        }
    })
}

/// Builds a message of about `bytes` bytes (an exact guess saves allocations) and appends it to `out`.
fn write(
    out: &mut Vec<u8>,
    bytes: usize,
    fill: impl FnOnce(peer_frame::Builder<'_>),
) -> Result<(), CodecError> {
    // Four words for the root, its pointer and the list's tag, and some to spare.
    let words = u32::try_from(bytes / 8 + 16).unwrap_or(u32::MAX).min(1 << 28);
    let allocator = HeapAllocator::new().first_segment_words(words);
    let mut message = capnp::message::Builder::new(allocator);
    fill(message.init_root());
    write_frame_bytes(&message, out)
}

/// Appends a Cap'n Proto message with its segment table to `out`.
pub(super) fn write_frame_bytes(
    message: &capnp::message::Builder<HeapAllocator>,
    out: &mut Vec<u8>,
) -> Result<(), CodecError> {
    out.reserve(8 * serialize::compute_serialized_size_in_words(message));
    Ok(serialize::write_message(out, message)?)
}

/// The owner of a payload that had to be moved to where Cap'n Proto can read it.
struct Aligned {
    words: Vec<Word>,
}

impl AsRef<[u8]> for Aligned {
    fn as_ref(&self) -> &[u8] {
        Word::words_to_bytes(&self.words)
    }
}

/// Hands a payload to `read` as a Cap'n Proto message. The message may be
/// traversed about once: pointers that share their target can't make it seem larger than it is.
pub(super) fn read_frame_bytes<T>(
    payload: Bytes,
    read: impl FnOnce(&Reader<BufferSegments<&[u8]>>) -> Result<T, CodecError>,
) -> Result<T, CodecError> {
    // Buffers begin at an aligned address and frames take whole words, so this hardly ever copies.
    let payload = if payload.as_ptr().align_offset(8) == 0 {
        payload
    } else {
        let mut words = Word::allocate_zeroed_vec(payload.len().div_ceil(8));
        Word::words_to_bytes_mut(&mut words)[..payload.len()].copy_from_slice(&payload);
        Bytes::from_owner(Aligned { words })
    };
    let options = ReaderOptions {
        traversal_limit_in_words: Some(payload.len() / 4 + 1024),
        nesting_limit: NESTING_MAX,
    };
    let mut rest = &payload[..];
    let reader = serialize::read_message_from_flat_slice(&mut rest, options)?;
    if rest.len() >= 8 {
        return Err(malformed("frame", format!("{} bytes left over", rest.len())));
    }
    read(&reader)
}

/// Reads the payload of a frame. Nothing in it is taken on trust.
pub fn decode(payload: Bytes) -> Result<PeerFrame, CodecError> {
    read_frame_bytes(payload, |reader| match reader.get_root::<peer_frame::Reader<'_>>()?.which()? {
        peer_frame::Raft(list) => {
            let list = list?;
            if list.len() as usize > FRAME_MESSAGES_MAX {
                return Err(malformed("frame", format!("{} messages", list.len())));
            }
            let mut entries_left = FRAME_ENTRIES_MAX;
            let messages = list
                .iter()
                .map(|message| read_message(message, &mut entries_left))
                .collect::<Result<_, _>>()?;
            Ok(PeerFrame::Raft(messages))
        }
        peer_frame::Heartbeat(from) => Ok(PeerFrame::Heartbeat(read_heartbeat(from?)?)),
        peer_frame::Request(from) => {
            let from = from?;
            Ok(PeerFrame::Request(from.get_id(), read_request(from)?))
        }
        peer_frame::Response(from) => {
            let from = from?;
            Ok(PeerFrame::Response(from.get_id(), read_response(from)?))
        }
        peer_frame::Snapshot(from) => Ok(PeerFrame::Snapshot(read_snapshot(from?)?)),
    })
}

fn read_heartbeat(from: node_heartbeat::Reader<'_>) -> Result<NodeHeartbeat, CodecError> {
    Ok(NodeHeartbeat {
        node: read_member(from.get_node())?,
        incarnation: from.get_incarnation(),
        map_version: from.get_map_version(),
        disk_full: from.get_disk_full(),
        map_age_ms: from.get_map_age().checked_sub(1),
        ended: from.get_ended(),
    })
}

fn write_request(request: &PeerRequest, mut to: peer_request::Builder<'_>) {
    match request {
        PeerRequest::Probe => to.set_probe(()),
        PeerRequest::Claim(cluster_id) => to.set_claim(&cluster_id.0),
        PeerRequest::Form(formation) => {
            let mut to = to.init_form();
            to.set_cluster_id(&formation.cluster_id.0);
            to.set_node(formation.node.0);
            let mut nodes = to.reborrow().init_nodes(length(formation.nodes.len()));
            for (at, node) in (0..).zip(&formation.nodes) {
                write_node(node, nodes.reborrow().get(at));
            }
            write_shard(&formation.metadata, to.init_metadata());
        }
        PeerRequest::Join { cluster_id, record } => {
            let mut to = to.init_join();
            if let Some(cluster_id) = cluster_id {
                to.set_cluster_id(&cluster_id.0);
            }
            write_node(record, to.init_record());
        }
        PeerRequest::Map { since } => to.set_map(*since),
        PeerRequest::Meta(command) => to.set_meta(&encode_command(command)),
        PeerRequest::Survey => to.set_survey(()),
        PeerRequest::Order(order) => write_order(order, to.init_order()),
        PeerRequest::Mark(shard) => to.set_mark(shard.0),
        PeerRequest::Digest(request) => write_digest_request(*request, to.init_digest()),
    }
}

fn read_request(from: peer_request::Reader<'_>) -> Result<PeerRequest, CodecError> {
    Ok(match from.which()? {
        peer_request::Probe(()) => PeerRequest::Probe,
        peer_request::Claim(id) => PeerRequest::Claim(read_id("clusterId", id?)?),
        peer_request::Form(form) => PeerRequest::Form(read_formation(form?)?),
        peer_request::Join(join) => {
            let join = join?;
            PeerRequest::Join {
                cluster_id: match join.get_cluster_id()? {
                    [] => None,
                    id => Some(read_id("clusterId", id)?),
                },
                record: read_node(join.get_record()?)?,
            }
        }
        peer_request::Map(since) => PeerRequest::Map { since },
        peer_request::Meta(command) => PeerRequest::Meta(decode_command(command?)?),
        peer_request::Survey(()) => PeerRequest::Survey,
        peer_request::Order(order) => PeerRequest::Order(read_order(order?)?),
        peer_request::Mark(shard) => PeerRequest::Mark(ShardId(shard)),
        peer_request::Digest(request) => PeerRequest::Digest(read_digest_request(request?)),
    })
}

fn read_formation(from: formation::Reader<'_>) -> Result<Formation, CodecError> {
    Ok(Formation {
        cluster_id: read_id("clusterId", from.get_cluster_id()?)?,
        node: read_member(from.get_node())?,
        nodes: read_nodes(from.get_nodes()?)?,
        metadata: read_shard(from.get_metadata()?)?,
    })
}

fn write_response(response: &PeerResponse, mut to: peer_response::Builder<'_>) {
    match response {
        PeerResponse::Refused(refusal) => write_refusal(refusal, to.init_error()),
        PeerResponse::Probe(answer) => write_probe(answer, to.init_probe()),
        PeerResponse::Claimed => to.set_claimed(()),
        PeerResponse::Formed => to.set_formed(()),
        PeerResponse::Joined { node, map } => {
            let mut to = to.init_joined();
            to.set_node(node.0);
            write_delta(map, to.init_map());
        }
        PeerResponse::Map(map) => write_delta(map, to.init_map()),
        PeerResponse::Meta(reply) => to.set_meta(&encode_reply(reply)),
        PeerResponse::Survey(survey) => write_survey(survey, to.init_survey()),
        PeerResponse::Pending(node) => to.set_pending(node.0),
        PeerResponse::Done => to.set_done(()),
        PeerResponse::Marked(marked) => write_marked(marked, to.init_marked()),
        PeerResponse::Digest(digest) => write_digest(digest, to.init_digest()),
    }
}

fn read_response(from: peer_response::Reader<'_>) -> Result<PeerResponse, CodecError> {
    Ok(match from.which()? {
        peer_response::Error(error) => PeerResponse::Refused(read_refusal(error?)),
        peer_response::Probe(answer) => PeerResponse::Probe(read_probe(answer?)?),
        peer_response::Claimed(()) => PeerResponse::Claimed,
        peer_response::Formed(()) => PeerResponse::Formed,
        peer_response::Joined(joined) => {
            let joined = joined?;
            PeerResponse::Joined {
                node: read_member(joined.get_node())?,
                map: read_delta(joined.get_map()?)?,
            }
        }
        peer_response::Map(map) => PeerResponse::Map(read_delta(map?)?),
        peer_response::Meta(reply) => PeerResponse::Meta(decode_reply(reply?)?),
        peer_response::Survey(survey) => PeerResponse::Survey(read_survey(survey?)?),
        peer_response::Pending(node) => PeerResponse::Pending(read_member(node)?),
        peer_response::Done(()) => PeerResponse::Done,
        peer_response::Marked(marked) => PeerResponse::Marked(read_marked(marked?)?),
        peer_response::Digest(digest) => PeerResponse::Digest(read_digest(digest?)?),
    })
}

fn write_probe(answer: &ProbeAnswer, mut to: probe_answer::Builder<'_>) {
    match answer.membership {
        Membership::Empty => to.set_empty(()),
        Membership::Claimed(cluster_id) => to.set_claimed(&cluster_id.0),
        Membership::Member(cluster_id, node) => {
            to.set_member(&cluster_id.0);
            to.set_node(node.0);
        }
    }
    let record = &answer.record;
    to.set_store_id(&record.store_id.0);
    to.set_peer_address(record.peer_address.as_str());
    to.set_client_address(record.client_address.as_str());
    to.set_zone(record.zone.as_str());
    to.set_weight(record.weight);
    to.set_label(record.label.as_str());
}

fn read_probe(from: probe_answer::Reader<'_>) -> Result<ProbeAnswer, CodecError> {
    let membership = match from.which()? {
        probe_answer::Empty(()) => Membership::Empty,
        probe_answer::Claimed(id) => Membership::Claimed(read_id("clusterId", id?)?),
        probe_answer::Member(id) => {
            Membership::Member(read_id("clusterId", id?)?, read_member(from.get_node())?)
        }
    };
    Ok(ProbeAnswer {
        membership,
        record: NodeRecord {
            id: match membership {
                Membership::Member(_, node) => node,
                _ => NodeId(0),
            },
            label: read_text(from.get_label()?)?,
            client_address: read_text(from.get_client_address()?)?,
            peer_address: read_text(from.get_peer_address()?)?,
            zone: read_text(from.get_zone()?)?,
            weight: from.get_weight(),
            store_id: read_id("storeId", from.get_store_id()?)?,
            standing: Standing::Member,
            // The answer is a description for formation, not a record of the map.
            changed_at: 0,
        },
    })
}

#[cfg(test)]
mod tests;
