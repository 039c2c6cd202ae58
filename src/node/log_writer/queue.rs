//! What waits for the log writer, and what of it goes to the disk together.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::oneshot;

use super::{LogJob, WriteTask};
use crate::ids::{Incarnation, ReplicaId};
use crate::limits;

/// Under the writer's lock.
#[derive(Default)]
pub(super) struct Queue {
    pub(super) items: VecDeque<Item>,
    /// Changed under the lock alone, read without it.
    pub(super) bytes: Arc<AtomicUsize>,
    /// `bytes` passed the limit and a warning said so.
    pub(super) warned: bool,
    /// The writer waits on `wake`.
    pub(super) asleep: bool,
    /// A batch or a job is out of the queue and not yet done.
    pub(super) busy: bool,
    /// Fences that wait for that one.
    pub(super) fences: Vec<oneshot::Sender<()>>,
    /// The last fenced incarnation of each replica: its tasks are dropped also when they come late.
    pub(super) fenced: HashMap<ReplicaId, Incarnation>,
    pub(super) phase: Phase,
}

/// How far the writer is.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Phase {
    #[default]
    Running,
    /// Nothing more is accepted; what is queued will be done.
    Stopping,
    Stopped,
    /// What is on disk is unknown.
    Failed,
}

/// Something to be done.
pub(super) enum Item {
    Write(WriteTask),
    /// A job, and on behalf of whom, if it is.
    Job(Option<(ReplicaId, Incarnation)>, LogJob),
}

impl Item {
    fn size(&self) -> usize {
        match self {
            Item::Write(task) => task.write.size(),
            Item::Job(..) => limits::LOG_JOB_BYTES,
        }
    }

    /// The start of a replica that it is of.
    fn owner(&self) -> Option<(ReplicaId, Incarnation)> {
        match self {
            Item::Write(task) => Some((task.write.replica, task.incarnation)),
            Item::Job(owner, _) => *owner,
        }
    }
}

/// What the writer does next.
pub(super) enum Work {
    Batch(Vec<WriteTask>),
    Job(LogJob),
}

impl Queue {
    fn is_fenced(&self, item: &Item) -> bool {
        let last = |(replica, incarnation)| Some(incarnation <= *self.fenced.get(&replica)?);
        item.owner().and_then(last).unwrap_or(false)
    }

    /// Drops the tasks and jobs of all incarnations of `replica` up to `incarnation`, now and in future.
    pub(super) fn fence(&mut self, replica: ReplicaId, incarnation: Incarnation) {
        let last = self.fenced.entry(replica).or_default();
        *last = incarnation.max(*last);
        let last = *last;
        let bytes = &self.bytes;
        self.items.retain(|item| {
            let drop = item.owner().is_some_and(|(of, start)| of == replica && start <= last);
            if drop {
                bytes.fetch_sub(item.size(), Ordering::Relaxed);
            }
            !drop
        });
    }

    /// Adds an item, unless its owner is fenced.
    pub(super) fn push(&mut self, item: Item) {
        if self.is_fenced(&item) {
            return;
        }
        let size = item.size();
        let bytes = self.bytes.fetch_add(size, Ordering::Relaxed) + size;
        self.items.push_back(item);
        if bytes > limits::LOG_QUEUE_BYTES_MAX && !self.warned {
            self.warned = true;
            tracing::warn!(
                bytes,
                "more waits for the log than should: the disk is slow, or the groups' limits are too wide"
            );
        }
    }

    /// Takes a job, or writes up to the target size, but at least one.
    pub(super) fn take(&mut self) -> Option<Work> {
        let (work, size) = match self.items.pop_front()? {
            Item::Job(_, job) => (Work::Job(job), limits::LOG_JOB_BYTES),
            Item::Write(first) => {
                let mut batch = Batch::of(first);
                if self.bytes.load(Ordering::Relaxed) > limits::LOG_WRITE_TARGET_BYTES {
                    batch.gather_fairly(&mut self.items);
                }
                batch.gather(&mut self.items);
                (Work::Batch(batch.tasks), batch.bytes)
            }
        };
        if self.items.is_empty() && self.items.capacity() > limits::LOG_QUEUE_ROOM_KEPT {
            // As in an outbox: a burst of all groups is seldom.
            self.items = VecDeque::new();
        }
        let bytes = self.bytes.fetch_sub(size, Ordering::Relaxed) - size;
        if bytes <= limits::LOG_QUEUE_BYTES_MAX / 2 {
            self.warned = false;
        }
        self.busy = true;
        Some(work)
    }
}

/// Writes that go to the disk together.
struct Batch {
    tasks: Vec<WriteTask>,
    bytes: usize,
}

impl Batch {
    fn of(first: WriteTask) -> Batch {
        let bytes = first.write.size();
        Batch { tasks: vec![first], bytes }
    }

    fn has_room_for(&self, task: &WriteTask) -> bool {
        self.bytes + task.write.size() <= limits::LOG_WRITE_TARGET_BYTES
    }

    fn push(&mut self, task: WriteTask) {
        self.bytes += task.write.size();
        self.tasks.push(task);
    }

    /// Adds what is first in the queue, as far as it fits.
    fn gather(&mut self, items: &mut VecDeque<Item>) {
        let fits = |batch: &Batch, item: &Item| matches!(item, Item::Write(task) if batch.has_room_for(task));
        while items.front().is_some_and(|item| fits(self, item)) {
            if let Some(Item::Write(task)) = items.pop_front() {
                self.push(task);
            }
        }
    }

    /// More waits than fits: adds a part of each replica's, before anybody has more than that. One that catches up has
    /// tens of megabytes queued, and what others want to write needn't wait for all of them. What is passed
    /// over stays first in the queue.
    ///
    /// What is of one replica keeps its order: from the first of it that is passed over, all of it is. Nothing passes by
    /// a job that is on nobody's behalf.
    fn gather_fairly(&mut self, items: &mut VecDeque<Item>) {
        let part = limits::LOG_WRITE_TARGET_BYTES / limits::LOG_WRITE_PARTS;
        let mut parts: HashMap<ReplicaId, usize> =
            self.tasks.iter().map(|task| (task.write.replica, task.write.size())).collect();
        let mut passed: Vec<Item> = Vec::new();
        while passed.len() < limits::LOG_PASSED_MAX {
            let Some(item) = items.pop_front() else { break };
            let Some((replica, _)) = item.owner() else {
                items.push_front(item);
                break;
            };
            let taken = parts.entry(replica).or_default();
            match item {
                Item::Write(task) if *taken + task.write.size() <= part && self.has_room_for(&task) => {
                    *taken += task.write.size();
                    self.push(task);
                }
                item => {
                    *taken = part;
                    passed.push(item);
                }
            }
        }
        for item in passed.into_iter().rev() {
            items.push_front(item);
        }
    }
}
