//! Counters of what happens for each operation, message or write, with their handles kept.
//!
//! A handle is an atomic number; a macro of `metrics` would look it up by its name each time, which was
//! 0.6 % of a busy node's time. They are bound when the recorder is installed
//! ([`super::metrics::install`]); before that, and where there is none, they count nothing. A recorder
//! that holds for one thread only, as in tests, doesn't see them.

use std::sync::OnceLock;

use metrics::{Counter, Histogram, counter, histogram};
use raft::eraftpb::MessageType;

use super::metrics as names;

/// Kinds of raft messages that are counted by name; all others are `other`.
const KINDS: [(MessageType, &str); 6] = [
    (MessageType::MsgAppend, "append"),
    (MessageType::MsgAppendResponse, "append_response"),
    (MessageType::MsgHeartbeat, "heartbeat"),
    (MessageType::MsgHeartbeatResponse, "heartbeat_response"),
    (MessageType::MsgRequestVote, "vote"),
    (MessageType::MsgRequestVoteResponse, "vote_response"),
];

/// Lanes of peer connections that carry raft messages or snapshots, by the names that [`Lane`] gives them.
///
/// [`Lane`]: crate::codec::hello::Lane
const LANES: [&str; 4] = ["control", "append", "request", "snapshot"];

/// The handles; see the module page.
pub struct Hot {
    /// Commands accepted by leaders for the log.
    pub proposals: Counter,
    /// Entries made of them.
    pub entries_proposed: Counter,
    /// Passes over a replica with a raft-rs `Ready`.
    pub readies: Counter,
    /// Entries executed.
    pub applied: Counter,
    /// Linearizable reads accepted.
    pub reads: Counter,
    /// Those answered from memory.
    pub reads_memory: Counter,
    /// Those answered by the read thread.
    pub reads_engine: Counter,
    /// Appends to the raft log.
    pub log_writes: Counter,
    /// Syncs of its files.
    pub log_syncs: Counter,
    /// Entries in those appends.
    pub log_entries: Counter,
    /// Bytes in them.
    pub log_bytes: Counter,
    /// How long each took, in seconds.
    pub log_sync_seconds: Histogram,
    /// Syncs of other files.
    pub state_syncs: Counter,
    messages: [Counter; KINDS.len() + 1],
    sent: [Traffic; LANES.len()],
    received: [Traffic; LANES.len()],
}

/// What goes over one lane, one way.
pub struct Traffic {
    /// Frames.
    pub frames: Counter,
    /// Raft messages in them.
    pub messages: Counter,
    /// Bytes of them.
    pub bytes: Counter,
}

static BOUND: OnceLock<Hot> = OnceLock::new();
static NONE: Hot = Hot::none();

/// The handles in force.
pub fn hot() -> &'static Hot {
    BOUND.get().unwrap_or(&NONE)
}

/// Binds the handles to the recorder that was just installed.
pub(super) fn bind() {
    // A process has one recorder: a second call would bind the same.
    BOUND.get_or_init(Hot::bound);
}

impl Traffic {
    const NONE: Traffic =
        Traffic { frames: Counter::noop(), messages: Counter::noop(), bytes: Counter::noop() };
}

impl Hot {
    const fn none() -> Hot {
        Hot {
            proposals: Counter::noop(),
            entries_proposed: Counter::noop(),
            readies: Counter::noop(),
            applied: Counter::noop(),
            reads: Counter::noop(),
            reads_memory: Counter::noop(),
            reads_engine: Counter::noop(),
            log_writes: Counter::noop(),
            log_syncs: Counter::noop(),
            log_entries: Counter::noop(),
            log_bytes: Counter::noop(),
            log_sync_seconds: Histogram::noop(),
            state_syncs: Counter::noop(),
            messages: [const { Counter::noop() }; KINDS.len() + 1],
            sent: [Traffic::NONE; LANES.len()],
            received: [Traffic::NONE; LANES.len()],
        }
    }

    fn bound() -> Hot {
        let kind = |at: usize| KINDS.get(at).map_or("other", |(_, name)| *name);
        Hot {
            proposals: counter!(names::PROPOSALS),
            entries_proposed: counter!(names::ENTRIES_PROPOSED),
            readies: counter!(names::READIES),
            applied: counter!(names::APPLY_ENTRIES),
            reads: counter!(names::READS),
            reads_memory: counter!(names::READS_SERVED, "source" => "memory"),
            reads_engine: counter!(names::READS_SERVED, "source" => "engine"),
            log_writes: counter!(names::LOG_WRITES),
            log_syncs: counter!(names::LOG_SYNCS),
            log_entries: counter!(names::LOG_ENTRIES),
            log_bytes: counter!(names::LOG_BYTES),
            log_sync_seconds: histogram!(names::LOG_SYNC_SECONDS),
            state_syncs: counter!(names::STATE_SYNCS),
            messages: std::array::from_fn(|at| counter!(names::RAFT_MESSAGES, "kind" => kind(at))),
            sent: LANES.map(|lane| Traffic {
                frames: counter!(names::PEER_SENT_FRAMES, "lane" => lane),
                messages: counter!(names::PEER_SENT_MESSAGES, "lane" => lane),
                bytes: counter!(names::PEER_SENT_BYTES, "lane" => lane),
            }),
            received: LANES.map(|lane| Traffic {
                frames: counter!(names::PEER_RECEIVED_FRAMES, "lane" => lane),
                messages: counter!(names::PEER_RECEIVED_MESSAGES, "lane" => lane),
                bytes: counter!(names::PEER_RECEIVED_BYTES, "lane" => lane),
            }),
        }
    }

    /// Raft messages of this kind that replicas send.
    pub fn message(&self, kind: MessageType) -> &Counter {
        let at = KINDS.iter().position(|(known, _)| *known == kind).unwrap_or(KINDS.len());
        &self.messages[at]
    }

    /// What leaves over the lane of this name.
    pub fn sent(&self, lane: &str) -> &Traffic {
        &self.sent[lane_index(lane)]
    }

    /// What arrives over the lane of this name.
    pub fn received(&self, lane: &str) -> &Traffic {
        &self.received[lane_index(lane)]
    }
}

fn lane_index(lane: &str) -> usize {
    LANES.iter().position(|known| *known == lane).unwrap_or_else(|| unreachable!("no lane is called {lane}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::hello::Lane;
    use crate::telemetry::metrics::install;

    #[test]
    fn what_is_counted_through_a_handle_is_on_the_page() {
        let page = install().unwrap();
        hot().readies.increment(3);
        hot().message(MessageType::MsgAppend).increment(2);
        hot().message(MessageType::MsgTimeoutNow).increment(5);
        for lane in [Lane::Control, Lane::Append, Lane::Request, Lane::Snapshot] {
            hot().sent(lane.name()).frames.increment(1);
            hot().received(lane.name()).frames.increment(1);
        }
        let page = page.render();
        // Other tests of the process may count too.
        let value = |series: &str| -> u64 {
            let line = page.lines().find_map(|line| line.strip_prefix(series)).expect(series);
            line.trim().parse().expect(series)
        };
        assert!(value("pontoon_readies_total") >= 3);
        assert!(value("pontoon_raft_messages_total{kind=\"append\"}") >= 2);
        assert!(value("pontoon_raft_messages_total{kind=\"other\"}") >= 5);
        assert!(value("pontoon_peer_sent_frames_total{lane=\"append\"}") >= 1);
        assert!(value("pontoon_peer_received_frames_total{lane=\"control\"}") >= 1);
    }
}
