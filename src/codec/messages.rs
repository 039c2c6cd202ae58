//! Raft messages on the wire, and the rules they must keep.
//!
//! raft-rs trusts what it is told: a message with a gap in its entries, a local message type, or a
//! read index without its context makes it panic. [`check`] states what a message between replicas
//! looks like. A sender applies it before a message is queued, so that a bug of ours costs one message
//! and not the connection; a receiver applies it before a message can reach `step()`.
//! What depends on the state of the group (is the sender a member? is the commit index within the
//! log?) can't be checked here and is the group's business.
//!
//! Entries are copied out of the frame: one stays in its group's cache for long, and as a slice it would
//! keep the whole buffer alive, which carries the entries of many groups. So what an entry costs in
//! memory is its own bytes, and a connection reads all its frames into one buffer.

use std::collections::HashSet;

use bytes::Bytes;
use protobuf::ProtobufEnum;
use raft::eraftpb::{Entry, EntryType, Message, MessageType, Snapshot};

use super::records::malformed;
use super::{CodecError, GroupMessage, SleepWord};
use crate::ids::{Epoch, NodeId, ShardId};
use crate::limits::{FRAME_ENTRIES_MAX, MESSAGE_ENTRIES_MAX, SNAPSHOT_MEMBERS_MAX};
use crate::schema::peer_capnp::{raft_message, snapshot_header};

/// Greatest index and greatest term a message may carry: far beyond any real one, and small enough
/// that raft's own additions can't overflow.
pub const POSITION_MAX: u64 = u64::MAX >> 2;

/// Words of a `RaftMessage` without what it points to, with its epoch.
const MESSAGE_BYTES: usize = 8 * (13 + 5 + 2);
/// Bytes of a `SleepWord`.
const SLEEP_BYTES: usize = 8 * 2;
/// Bytes of a `RaftEntry` without what it points to.
const ENTRY_BYTES: usize = 8 * (3 + 2);
/// Bytes of a `SnapshotHeader` without its lists.
const SNAPSHOT_BYTES: usize = 8 * (4 + 4);

/// Bytes a message takes in a frame; exact but for a few words.
pub fn wire_size(message: &GroupMessage) -> usize {
    let sleep = if message.sleep.is_some() { SLEEP_BYTES } else { 0 };
    let message = &message.message;
    let entries: usize =
        message.entries.iter().map(|e| ENTRY_BYTES + padded(e.data.len()) + padded(e.context.len())).sum();
    let snapshot = message.snapshot.as_ref().map_or(0, |s| {
        let state = s.get_metadata().get_conf_state();
        SNAPSHOT_BYTES
            + 8 * (state.voters.len()
                + state.learners.len()
                + state.voters_outgoing.len()
                + state.learners_next.len())
    });
    MESSAGE_BYTES + 8 + padded(message.context.len()) + entries + snapshot + sleep
}

fn padded(bytes: usize) -> usize {
    bytes.next_multiple_of(8)
}

fn wrong(detail: impl Into<String>) -> CodecError {
    malformed("RaftMessage", detail)
}

/// Whether a message is one that a replica may send to another. Errors name the rule it breaks.
pub fn check(group_message: &GroupMessage) -> Result<(), CodecError> {
    let m = &group_message.message;
    let kind = m.get_msg_type();
    use MessageType::*;
    match kind {
        MsgAppend
        | MsgAppendResponse
        | MsgRequestVote
        | MsgRequestVoteResponse
        | MsgSnapshot
        | MsgHeartbeat
        | MsgHeartbeatResponse
        | MsgTransferLeader
        | MsgTimeoutNow
        | MsgReadIndex
        | MsgReadIndexResp
        | MsgRequestPreVote
        | MsgRequestPreVoteResponse => {}
        MsgHup | MsgBeat | MsgPropose | MsgUnreachable | MsgSnapStatus | MsgCheckQuorum => {
            return Err(wrong(format!("{kind:?} is never sent between replicas")));
        }
    }
    if m.to == 0 || m.from == 0 || m.to == m.from {
        return Err(wrong(format!("from replica {} to {}", m.from, m.to)));
    }
    let positions = [
        m.term,
        m.log_term,
        m.index,
        m.commit,
        m.commit_term,
        m.reject_hint,
        m.request_snapshot,
        group_message.safe_index,
        group_message.epoch.range,
        group_message.epoch.conf,
    ];
    if let Some(position) = positions.iter().find(|p| **p > POSITION_MAX) {
        return Err(wrong(format!("index or term {position} is out of range")));
    }
    // raft sends a read index that it forwards without a term, and nothing else.
    if (m.term == 0) != (kind == MsgReadIndex) {
        return Err(wrong(format!("{kind:?} of term {}", m.term)));
    }
    if m.term != 0 && (m.log_term > m.term || m.commit_term > m.term) {
        return Err(wrong(format!(
            "log term {} or commit term {} beyond term {}",
            m.log_term, m.commit_term, m.term
        )));
    }
    if m.has_snapshot() != (kind == MsgSnapshot) {
        return Err(wrong(format!("{kind:?} with or without a snapshot")));
    }
    if group_message.sleep.is_some() && !matches!(kind, MsgHeartbeat | MsgHeartbeatResponse) {
        return Err(wrong(format!("{kind:?} with a word about sleep")));
    }
    match kind {
        MsgAppend => check_entries(m)?,
        // raft-rs takes the first entry for the request's context without looking.
        MsgReadIndex | MsgReadIndexResp if m.entries.len() != 1 || m.entries[0].data.is_empty() => {
            return Err(wrong(format!("{kind:?} without its context")));
        }
        MsgReadIndex | MsgReadIndexResp => {}
        MsgSnapshot => check_snapshot(m)?,
        _ if !m.entries.is_empty() => return Err(wrong(format!("{kind:?} with entries"))),
        _ => {}
    }
    Ok(())
}

/// The entries of an append follow on its index, whose term it names, and their terms never fall.
fn check_entries(m: &Message) -> Result<(), CodecError> {
    if m.entries.len() > MESSAGE_ENTRIES_MAX {
        return Err(wrong(format!("{} entries", m.entries.len())));
    }
    // raft-rs takes term 0 for that of any entry beyond its log, and would go on from there over a gap.
    if m.log_term == 0 && m.index > 0 {
        return Err(wrong(format!("an append to entry {} of no term", m.index)));
    }
    let (mut index, mut term) = (m.index, m.log_term.max(1));
    for entry in m.entries.iter() {
        index += 1;
        if entry.index != index {
            return Err(wrong(format!("entry {} where {index} must follow", entry.index)));
        }
        if entry.term < term || entry.term > m.term {
            return Err(wrong(format!(
                "entry {index} of term {} between terms {term} and {}",
                entry.term, m.term
            )));
        }
        term = entry.term;
    }
    Ok(())
}

fn check_snapshot(m: &Message) -> Result<(), CodecError> {
    let metadata = m.get_snapshot().get_metadata();
    if !m.get_snapshot().data.is_empty() {
        return Err(wrong("snapshot data in a message"));
    }
    if metadata.index == 0 || metadata.index > POSITION_MAX || metadata.term == 0 || metadata.term > m.term {
        return Err(wrong(format!("snapshot at index {} of term {}", metadata.index, metadata.term)));
    }
    let state = metadata.get_conf_state();
    let lists = [&state.voters, &state.learners, &state.voters_outgoing, &state.learners_next];
    for list in lists {
        let distinct: HashSet<_> = list.iter().collect();
        if list.len() > SNAPSHOT_MEMBERS_MAX || distinct.len() < list.len() || list.contains(&0) {
            return Err(wrong("a snapshot's membership names a replica twice, none, or too many"));
        }
    }
    let joint = !state.voters_outgoing.is_empty();
    let is_voter = |id: &u64| state.voters.contains(id) || state.voters_outgoing.contains(id);
    if state.voters.is_empty()
        || state.learners.iter().any(is_voter)
        || !state
            .learners_next
            .iter()
            .all(|id| state.voters_outgoing.contains(id) && !state.voters.contains(id))
        || (state.auto_leave && !joint)
    {
        return Err(wrong("a snapshot's membership contradicts itself"));
    }
    Ok(())
}

/// Writes a message. The caller has checked it.
pub(super) fn write_message(from: &GroupMessage, mut to: raft_message::Builder<'_>) {
    let m = &from.message;
    to.set_shard(from.shard.0);
    to.set_safe_index(from.safe_index);
    if from.epoch != Epoch::default() {
        let mut epoch = to.reborrow().init_epoch();
        epoch.set_range(from.epoch.range);
        epoch.set_conf(from.epoch.conf);
    }
    // All of raft's message types and entry types fit a byte.
    to.set_kind(m.get_msg_type().value() as u8);
    to.set_to(m.to);
    to.set_from(m.from);
    to.set_term(m.term);
    to.set_log_term(m.log_term);
    to.set_index(m.index);
    to.set_commit(m.commit);
    to.set_commit_term(m.commit_term);
    to.set_reject(m.reject);
    to.set_reject_hint(m.reject_hint);
    to.set_request_snapshot(m.request_snapshot);
    to.set_priority(m.priority);
    if !m.context.is_empty() {
        to.set_context(&m.context);
    }
    if !m.entries.is_empty() {
        let mut entries = to.reborrow().init_entries(m.entries.len() as u32);
        for (at, entry) in m.entries.iter().enumerate() {
            let mut to = entries.reborrow().get(at as u32);
            to.set_term(entry.term);
            to.set_index(entry.index);
            to.set_kind(entry.get_entry_type().value() as u8);
            if !entry.data.is_empty() {
                to.set_data(&entry.data);
            }
            if !entry.context.is_empty() {
                to.set_context(&entry.context);
            }
        }
    }
    if let Some(word) = from.sleep {
        let mut sleep = to.reborrow().init_sleep();
        sleep.set_process(word.process);
        sleep.set_round(word.round);
    }
    if let Some(snapshot) = m.snapshot.as_ref() {
        write_snapshot(snapshot, to.init_snapshot());
    }
}

fn write_snapshot(snapshot: &Snapshot, mut to: snapshot_header::Builder<'_>) {
    let metadata = snapshot.get_metadata();
    let state = metadata.get_conf_state();
    to.set_index(metadata.index);
    to.set_term(metadata.term);
    to.set_auto_leave(state.auto_leave);
    let mut list = to.reborrow().init_voters(state.voters.len() as u32);
    (0..).zip(&state.voters).for_each(|(at, id)| list.set(at, *id));
    let mut list = to.reborrow().init_learners(state.learners.len() as u32);
    (0..).zip(&state.learners).for_each(|(at, id)| list.set(at, *id));
    let outgoing = &state.voters_outgoing;
    let mut list = to.reborrow().init_voters_outgoing(outgoing.len() as u32);
    (0..).zip(outgoing).for_each(|(at, id)| list.set(at, *id));
    let next = &state.learners_next;
    let mut list = to.reborrow().init_learners_next(next.len() as u32);
    (0..).zip(next).for_each(|(at, id)| list.set(at, *id));
}

/// Reads a message and checks it. `entries_left` counts down over all messages of a frame, since a few
/// bytes can claim very many empty entries.
pub(super) fn read_message(
    from: raft_message::Reader<'_>,
    entries_left: &mut usize,
) -> Result<GroupMessage, CodecError> {
    let kind = from.get_kind();
    let epoch = from.get_epoch()?;
    let mut m = Message {
        msg_type: MessageType::from_i32(kind.into())
            .ok_or_else(|| wrong(format!("unknown message type {kind}")))?,
        to: from.get_to(),
        from: from.get_from(),
        term: from.get_term(),
        log_term: from.get_log_term(),
        index: from.get_index(),
        commit: from.get_commit(),
        commit_term: from.get_commit_term(),
        reject: from.get_reject(),
        reject_hint: from.get_reject_hint(),
        request_snapshot: from.get_request_snapshot(),
        priority: from.get_priority(),
        // As raft's own sender fills the old field from the new one.
        deprecated_priority: from.get_priority().max(0) as u64,
        ..Message::default()
    };
    let entries = from.get_entries()?;
    *entries_left = entries_left
        .checked_sub(entries.len() as usize)
        .ok_or_else(|| wrong(format!("more than {FRAME_ENTRIES_MAX} entries in a frame")))?;
    m.context = Bytes::copy_from_slice(from.get_context()?);
    let mut list = Vec::with_capacity(entries.len() as usize);
    for entry in entries {
        let kind = entry.get_kind();
        list.push(Entry {
            entry_type: EntryType::from_i32(kind.into())
                .ok_or_else(|| wrong(format!("unknown entry type {kind}")))?,
            term: entry.get_term(),
            index: entry.get_index(),
            data: Bytes::copy_from_slice(entry.get_data()?),
            context: Bytes::copy_from_slice(entry.get_context()?),
            ..Entry::default()
        });
    }
    m.entries = list.into();
    if from.has_snapshot() {
        m.set_snapshot(read_snapshot(from.get_snapshot()?)?);
    }
    let sleep = match from.has_sleep() {
        true => {
            let word = from.get_sleep()?;
            Some(SleepWord { process: word.get_process(), round: word.get_round() })
        }
        false => None,
    };
    let message = GroupMessage {
        shard: ShardId(from.get_shard()),
        epoch: Epoch { range: epoch.get_range(), conf: epoch.get_conf() },
        safe_index: from.get_safe_index(),
        message: m,
        node: NodeId::default(),
        sleep,
    };
    check(&message)?;
    Ok(message)
}

fn read_snapshot(from: snapshot_header::Reader<'_>) -> Result<Snapshot, CodecError> {
    let list = |ids: capnp::primitive_list::Reader<'_, u64>| {
        if ids.len() as usize > SNAPSHOT_MEMBERS_MAX {
            return Err(wrong(format!("{} members in a snapshot", ids.len())));
        }
        Ok(ids.iter().collect::<Vec<u64>>())
    };
    let mut snapshot = Snapshot::default();
    let metadata = snapshot.mut_metadata();
    metadata.index = from.get_index();
    metadata.term = from.get_term();
    let state = metadata.mut_conf_state();
    state.voters = list(from.get_voters()?)?;
    state.learners = list(from.get_learners()?)?;
    state.voters_outgoing = list(from.get_voters_outgoing()?)?;
    state.learners_next = list(from.get_learners_next()?)?;
    state.auto_leave = from.get_auto_leave();
    Ok(snapshot)
}

#[cfg(test)]
pub(crate) mod tests;
