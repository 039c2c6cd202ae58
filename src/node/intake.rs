//! Between the connections of peers and the replicas: what leaders send is counted until a replica
//! has taken it, and only as much is let in as the log can take.
//!
//! ```text
//! peers ──admit──► hub ──► replica ──► log writer ──► disk
//!          │   └──── counted here ──┘└─ by the writer ─┘
//!          └ appends are dropped where both together would come to LOG_QUEUE_BYTES_MAX, great ones before
//! ```
//!
//! A connection is read as fast as the network delivers, and a leader sends a follower that was away
//! many appends before it waits for the first acknowledgement, in each of its groups. Raft is made
//! for loss: the next append is refused, with a hint from where to go on, and leaders find the pace
//! of the slowest part by that. What is left of the room is shared as memory is ([`Sharing`]): appends of a megabyte, to
//! replicas that catch up, leave some of it for the small ones of all others.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use raft::eraftpb::{Entry, MessageType};

use super::memory::Sharing;
use crate::codec::{GroupMessage, trace};
use crate::limits;
use crate::telemetry::metrics as names;

/// See the module page. One per node.
pub struct Intake {
    /// Bytes on their way to replicas.
    waiting: Arc<AtomicUsize>,
    /// Bytes on their way from replicas to the disk.
    log: Box<dyn Fn() -> usize + Send + Sync>,
}

/// Messages that count as waiting until this is dropped.
pub struct Arrived {
    messages: Vec<GroupMessage>,
    bytes: usize,
    waiting: Arc<AtomicUsize>,
    /// When they arrived, if one of them is about a trace.
    stamped: Option<Instant>,
}

impl Intake {
    /// An intake in front of a log for which so many bytes wait as `log` tells.
    pub fn new(log: Box<dyn Fn() -> usize + Send + Sync>) -> Intake {
        Intake { waiting: Arc::default(), log }
    }

    /// Bytes that wait, for a replica or for the disk.
    pub fn bytes(&self) -> usize {
        self.waiting.load(Ordering::Relaxed) + (self.log)()
    }

    /// Takes messages in; appends of entries only if there is room for them.
    pub fn admit(&self, mut messages: Vec<GroupMessage>) -> Arrived {
        let had = messages.len();
        let mut bytes = self.bytes();
        if bytes > limits::LOG_QUEUE_BYTES_MAX / 2 {
            let room = Sharing::new(limits::LOG_QUEUE_BYTES_MAX);
            messages.retain(|message| {
                let message = &message.message;
                let adds = size(&message.entries);
                let admitted = message.get_msg_type() != MessageType::MsgAppend
                    || message.entries.is_empty()
                    || room.admits(bytes, 0, adds);
                bytes += if admitted { adds } else { 0 };
                admitted
            });
            metrics::counter!(names::APPENDS_DROPPED).increment((had - messages.len()) as u64);
        }
        let traced = messages.iter().any(|message| trace::may_concern(&message.message));
        Arrived::new(messages, self.waiting.clone(), traced.then(Instant::now))
    }
}

impl Arrived {
    fn new(messages: Vec<GroupMessage>, waiting: Arc<AtomicUsize>, stamped: Option<Instant>) -> Arrived {
        let bytes = messages.iter().map(|message| size(&message.message.entries)).sum();
        waiting.fetch_add(bytes, Ordering::Relaxed);
        Arrived { messages, bytes, waiting, stamped }
    }

    /// Bytes of all entries in them.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether there are no messages.
    pub fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    /// The messages apart by `part`, each part's in their order.
    pub fn split(mut self, parts: usize, part: impl Fn(&GroupMessage) -> usize) -> Vec<Arrived> {
        let mut split: Vec<Vec<GroupMessage>> = (0..parts).map(|_| Vec::new()).collect();
        let mut places = self.messages.iter().map(&part);
        match places.next() {
            // Mostly all are for one.
            Some(first) if places.all(|place| place == first) => {
                split[first] = std::mem::take(&mut self.messages);
            }
            _ => {
                for message in self.messages.drain(..) {
                    split[part(&message)].push(message);
                }
            }
        }
        let part = |messages| Arrived::new(messages, self.waiting.clone(), self.stamped);
        split.into_iter().map(part).collect()
    }

    /// The messages apart by receiver, as far as neighbours are for the same one, with its number.
    pub fn by_receiver(mut self) -> Vec<(u64, Arrived)> {
        let mut runs = Vec::new();
        let mut messages = std::mem::take(&mut self.messages).into_iter().peekable();
        while let Some(first) = messages.next() {
            let to = first.message.to;
            let mut run = vec![first];
            while let Some(next) = messages.next_if(|m| m.message.to == to) {
                run.push(next);
            }
            runs.push((to, Arrived::new(run, self.waiting.clone(), self.stamped)));
        }
        runs
    }

    /// When they arrived; known only if one of those that came with them is about a trace.
    pub fn stamped(&self) -> Option<Instant> {
        self.stamped
    }

    /// Takes the messages out; they count until this is dropped.
    pub fn take(&mut self) -> Vec<GroupMessage> {
        std::mem::take(&mut self.messages)
    }
}

/// What entries count for, as in [`crate::storage::log::LogWrite::size`].
fn size(entries: &[Entry]) -> usize {
    entries.iter().map(|entry| 32 + entry.data.len() + entry.context.len()).sum()
}

impl Drop for Arrived {
    fn drop(&mut self) {
        self.waiting.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{Epoch, NodeId, ShardId};
    use raft::eraftpb::Message;

    fn message(kind: MessageType, to: u64, bytes: usize) -> GroupMessage {
        let mut message = Message { to, ..Message::default() };
        message.set_msg_type(kind);
        if bytes > 0 {
            message.set_entries(vec![Entry { data: vec![0; bytes].into(), ..Entry::default() }].into());
        }
        GroupMessage {
            shard: ShardId(to),
            epoch: Epoch::default(),
            safe_index: 0,
            message,
            node: NodeId::default(),
            sleep: None,
        }
    }

    fn kinds(arrived: &mut Arrived) -> Vec<MessageType> {
        arrived.take().iter().map(|m| m.message.get_msg_type()).collect()
    }

    #[test]
    fn appends_are_dropped_while_too_much_waits_and_nothing_else_is() {
        use MessageType::{MsgAppend, MsgHeartbeat};
        let log = Arc::new(AtomicUsize::new(0));
        let of_log = log.clone();
        let intake = Intake::new(Box::new(move || of_log.load(Ordering::Relaxed)));
        let all = || vec![message(MsgAppend, 1, 10), message(MsgHeartbeat, 1, 0), message(MsgAppend, 1, 0)];
        let mut first = intake.admit(all());
        assert_eq!(kinds(&mut first).len(), 3);
        assert_eq!(intake.bytes(), 42, "until the replica is done with them");

        log.store(limits::LOG_QUEUE_BYTES_MAX - (1 << 20), Ordering::Relaxed);
        let mut second = intake.admit(all());
        assert_eq!(kinds(&mut second).len(), 3, "there is room for small ones");
        let great = || vec![message(MsgAppend, 1, 1 << 19), message(MsgHeartbeat, 1, 0)];
        assert_eq!(kinds(&mut intake.admit(great())), [MsgHeartbeat], "they leave some for others");
        log.store(limits::LOG_QUEUE_BYTES_MAX / 2, Ordering::Relaxed);
        assert_eq!(kinds(&mut intake.admit(great())), [MsgAppend, MsgHeartbeat]);
        log.store(limits::LOG_QUEUE_BYTES_MAX, Ordering::Relaxed);
        // One that carries nothing asks where this replica is: its answer is what leaders go by.
        assert_eq!(kinds(&mut intake.admit(all())), [MsgHeartbeat, MsgAppend]);
        drop((first, second));
        log.store(0, Ordering::Relaxed);
        assert_eq!(kinds(&mut intake.admit(all())).len(), 3);
        assert_eq!(intake.bytes(), 0);
    }

    #[test]
    fn parts_count_as_the_whole_did() {
        use MessageType::MsgAppend;
        let intake = Intake::new(Box::new(|| 0));
        let messages = [(1, 1), (1, 2), (2, 4), (1, 8)];
        let messages = messages.map(|(to, bytes)| message(MsgAppend, to, bytes));
        let mut parts = intake.admit(messages.into()).split(2, |m| m.shard.0 as usize % 2);
        assert_eq!(intake.bytes(), 4 * 32 + 15);
        let odd = parts.pop().expect("two parts");
        drop(parts);
        assert_eq!(intake.bytes(), 3 * 32 + 11);
        let runs = odd.by_receiver();
        assert_eq!(runs.iter().map(|(to, run)| (*to, run.messages.len())).collect::<Vec<_>>(), [(1, 3)]);
        let all = vec![message(MsgAppend, 1, 16), message(MsgAppend, 2, 32), message(MsgAppend, 1, 64)];
        let more = intake.admit(all).by_receiver();
        assert_eq!(more.iter().map(|(to, _)| *to).collect::<Vec<_>>(), [1, 2, 1]);
        assert_eq!(intake.bytes(), 6 * 32 + 11 + 112);
        drop((runs, more));
        assert_eq!(intake.bytes(), 0);
    }
}
