//! What the replicas of one thread write to the raft log and send to other nodes, pass by pass.
//!
//! A frame of a peer, or the end of a sync, sets several replicas of a thread to work, one after the other. If
//! each handed its write to the log writer by itself, the first would wake it, and the others would wait for the
//! sync of that one; and each would take the lock of the outbox for one message. So they are put down here, and handed over
//! together once all who are ready to run on this thread have had their turn: one wake-up and one sync for all.
//!
//! ```text
//! replica ──send──►┐                                            ┌──► network
//! replica ──put───►├──(the thread has nothing else to run)──────┤
//! replica ──put───►┘                                            └──► log writer
//! ```
//!
//! The order in which writes are put here is kept, and that of the messages to a node. Messages leave before the writes that were
//! put here after them. What is dropped here, with its thread, nobody was told of.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use super::log_writer::WriteTask;
use super::shared::Shared;
use crate::codec::GroupMessage;
use crate::ids::NodeId;

/// See the module page. One per thread that owns replicas; clones are the same one.
#[derive(Clone)]
pub struct Gather {
    shared: Arc<Shared>,
    pass: Rc<RefCell<Pass>>,
}

#[derive(Default)]
struct Pass {
    /// Messages by receiver, each receiver's in order.
    messages: Vec<(NodeId, Vec<GroupMessage>)>,
    tasks: Vec<WriteTask>,
    /// A task that hands them over is about to run.
    ends: bool,
}

impl Gather {
    /// Nothing yet.
    pub fn new(shared: Arc<Shared>) -> Gather {
        Gather { shared, pass: Rc::default() }
    }

    /// Messages that leave with the others of this pass. On the thread of an arbiter.
    pub fn send(&self, messages: Vec<(NodeId, GroupMessage)>) {
        if messages.is_empty() {
            return;
        }
        let mut pass = self.pass.borrow_mut();
        for (node, message) in messages {
            match pass.messages.iter_mut().find(|(to, _)| *to == node) {
                Some((_, batch)) => batch.push(message),
                None => pass.messages.push((node, vec![message])),
            }
        }
        self.end(&mut pass);
    }

    /// A write that goes to the log writer with the others of this pass. On the thread of an arbiter.
    pub fn put(&self, task: WriteTask) {
        let mut pass = self.pass.borrow_mut();
        pass.tasks.push(task);
        self.end(&mut pass);
    }

    /// Sees to it that the pass ends.
    fn end(&self, pass: &mut Pass) {
        if std::mem::replace(&mut pass.ends, true) {
            return;
        }
        let gathered = self.clone();
        // It runs after those that are ready now.
        actix::spawn(async move {
            let messages = std::mem::take(&mut gathered.pass.borrow_mut().messages);
            gathered.leave(messages);
            // After the connections to other nodes have sent what there is for them: a write takes its way over a follower
            // for longer than over this node's own disk. What is put down meanwhile belongs to this pass too: if it
            // had an end of its own, that might come before this one.
            tokio::task::yield_now().await;
            let Pass { messages, tasks, .. } = gathered.pass.take();
            gathered.leave(messages);
            if !tasks.is_empty() {
                gathered.shared.log_writer.submit(tasks);
            }
        });
    }

    fn leave(&self, messages: Vec<(NodeId, Vec<GroupMessage>)>) {
        if !messages.is_empty() {
            self.shared.network.send(messages);
        }
    }
}
