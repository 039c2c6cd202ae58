//! The queue between the threads that send and the link that writes: one per peer and lane, bounded
//! in bytes. When it is full, messages are dropped, which raft is built for; when the peer can't be
//! reached, the link empties it, since raft's messages age fast.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};

use tokio::sync::Notify;

use crate::codec::GroupMessage;
use crate::codec::messages::wire_size;
use crate::codec::peer::NodeHeartbeat;
use crate::limits::{FRAME_MESSAGES_MAX, OUTBOX_ROOM_KEPT};

/// Messages that wait for one peer on one lane.
#[derive(Debug)]
pub struct Outbox {
    queue: Mutex<Queue>,
    wake: Notify,
    bytes_max: usize,
}

#[derive(Debug, Default)]
struct Queue {
    messages: VecDeque<(usize, GroupMessage)>,
    /// Of `messages` and of what the link is writing.
    bytes: usize,
    /// The newest replaces one that wasn't sent yet.
    heartbeat: Option<NodeHeartbeat>,
    /// Set once; the link ends.
    closed: bool,
}

/// What a link takes to write at once.
#[derive(Debug, Default)]
pub struct Batch {
    /// To go first.
    pub heartbeat: Option<NodeHeartbeat>,
    /// In the order they were sent.
    pub messages: Vec<GroupMessage>,
    /// To be given back to [`Outbox::written`].
    pub bytes: usize,
}

impl Batch {
    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.heartbeat.is_none() && self.messages.is_empty()
    }
}

impl Outbox {
    /// An empty one that holds at most `bytes_max` bytes, with what is being written.
    pub fn new(bytes_max: usize) -> Outbox {
        Outbox { queue: Mutex::default(), wake: Notify::new(), bytes_max }
    }

    /// A panic while the lock is held can't leave the queue inconsistent: nothing in here panics
    /// between two steps that belong together, so a poisoned lock is taken as it is.
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Queues messages; returns how many found no room and were dropped.
    pub fn push(&self, messages: impl IntoIterator<Item = GroupMessage>) -> usize {
        let mut dropped = 0;
        let mut queue = self.lock();
        let idle = queue.messages.is_empty();
        for message in messages {
            let bytes = wire_size(&message);
            if queue.closed || queue.bytes + bytes > self.bytes_max {
                dropped += 1;
                continue;
            }
            queue.bytes += bytes;
            queue.messages.push_back((bytes, message));
        }
        let wake = idle && !queue.messages.is_empty();
        drop(queue);
        if wake {
            self.wake.notify_one();
        }
        dropped
    }

    /// Sets the heartbeat to send next.
    pub fn set_heartbeat(&self, heartbeat: NodeHeartbeat) {
        self.lock().heartbeat = Some(heartbeat);
        self.wake.notify_one();
    }

    /// Takes messages until their bytes reach `target`: at least one if there is one.
    pub fn take(&self, target: usize) -> Batch {
        let mut queue = self.lock();
        let mut batch = Batch { heartbeat: queue.heartbeat.take(), ..Batch::default() };
        while batch.bytes < target && batch.messages.len() < FRAME_MESSAGES_MAX {
            let Some((bytes, message)) = queue.messages.pop_front() else {
                break;
            };
            batch.bytes += bytes;
            batch.messages.push(message);
        }
        if queue.messages.is_empty() && queue.messages.capacity() > OUTBOX_ROOM_KEPT {
            // When thousands of groups are made they all speak at once, and then never again.
            queue.messages = VecDeque::new();
        }
        batch
    }

    /// A batch of so many bytes has left memory, written or dropped.
    pub fn written(&self, bytes: usize) {
        let mut queue = self.lock();
        queue.bytes = queue.bytes.saturating_sub(bytes);
    }

    /// Drops what waits; returns how many messages that was.
    pub fn clear(&self) -> usize {
        let mut queue = self.lock();
        queue.heartbeat = None;
        let dropped = std::mem::take(&mut queue.messages);
        let bytes: usize = dropped.iter().map(|(bytes, _)| bytes).sum();
        queue.bytes = queue.bytes.saturating_sub(bytes);
        drop(queue);
        dropped.len()
    }

    /// Ends the outbox and its link.
    pub fn close(&self) {
        self.lock().closed = true;
        self.clear();
        self.wake.notify_one();
    }

    /// Whether it was closed.
    pub fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// Makes the link look at its state again.
    pub fn wake(&self) {
        self.wake.notify_one();
    }

    /// Returns when something was queued, or [`Outbox::wake`] was called. For one waiter.
    pub async fn changed(&self) {
        self.wake.notified().await;
    }

    /// Bytes that wait or are being written.
    pub fn bytes(&self) -> usize {
        self.lock().bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{Epoch, NodeId, ShardId};

    fn message(shard: u64) -> GroupMessage {
        GroupMessage {
            shard: ShardId(shard),
            epoch: Epoch::default(),
            safe_index: 0,
            message: raft::eraftpb::Message::default(),
            node: NodeId::default(),
            sleep: None,
        }
    }

    #[test]
    fn a_burst_leaves_no_room_behind() {
        let outbox = Outbox::new(usize::MAX);
        for (count, kept) in [(OUTBOX_ROOM_KEPT as u64 / 2, true), (8 * OUTBOX_ROOM_KEPT as u64, false)] {
            assert_eq!(outbox.push((0..count).map(message)), 0);
            assert_eq!(outbox.take(usize::MAX).messages.len() as u64, count);
            assert_eq!(outbox.lock().messages.capacity() > 0, kept, "{count} messages");
        }
    }

    #[test]
    fn messages_keep_their_order_and_count_until_written() {
        let size = wire_size(&message(0));
        let outbox = Outbox::new(3 * size);
        assert_eq!(outbox.push((0..5).map(message)), 2);
        let batch = outbox.take(2 * size);
        let shards: Vec<u64> = batch.messages.iter().map(|m| m.shard.0).collect();
        assert_eq!(shards, [0, 1]);
        // What is being written still counts.
        assert_eq!(outbox.push([message(5)]), 1);
        outbox.written(batch.bytes);
        assert_eq!(outbox.push([message(6)]), 0);
        assert_eq!(outbox.bytes(), 2 * size);
        assert_eq!(outbox.clear(), 2);
        assert_eq!(outbox.bytes(), 0);
    }

    #[test]
    fn the_newest_heartbeat_replaces_an_older_one() {
        let outbox = Outbox::new(1024);
        for map_version in [1, 2] {
            outbox.set_heartbeat(NodeHeartbeat {
                node: NodeId(1),
                incarnation: 1,
                map_version,
                disk_full: false,
                map_age_ms: None,
                ended: 0,
            });
        }
        let batch = outbox.take(1024);
        assert_eq!(batch.heartbeat.map(|h| h.map_version), Some(2));
        assert!(outbox.take(1024).is_empty());
    }

    #[test]
    fn a_closed_outbox_takes_nothing() {
        let outbox = Outbox::new(1024 * 1024);
        outbox.push([message(1)]);
        outbox.close();
        assert_eq!(outbox.push([message(2)]), 1);
        assert!(outbox.take(1).is_empty());
    }
}
