//! What the replicas of one thread write to the raft log, pass by pass.
//!
//! A frame of a peer, or the end of a sync, sets several replicas of a thread to work, one after the other. If
//! each handed its write to the log writer by itself, the first would wake it, and the others would wait for the
//! sync of that one. So they are put down here, and handed over together once all who are ready to run on this
//! thread have had their turn: one wake-up and one sync for all.
//!
//! ```text
//! replica ──put──►┐
//! replica ──put──►├──(the thread has nothing else to run)──► log writer
//! replica ──put──►┘
//! ```
//!
//! The order in which writes are put here is kept. What is dropped here, with its thread, nobody was told of.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use super::log_writer::WriteTask;
use super::shared::Shared;

/// See the module page. One per thread that owns replicas; clones are the same one.
#[derive(Clone)]
pub struct Gather {
    shared: Arc<Shared>,
    /// Not empty: a task that hands them over is about to run.
    tasks: Rc<RefCell<Vec<WriteTask>>>,
}

impl Gather {
    /// Nothing yet.
    pub fn new(shared: Arc<Shared>) -> Gather {
        Gather { shared, tasks: Rc::default() }
    }

    /// A write that goes to the log writer with the others of this pass. On the thread of an arbiter.
    pub fn put(&self, task: WriteTask) {
        let mut tasks = self.tasks.borrow_mut();
        tasks.push(task);
        if tasks.len() == 1 {
            let gathered = self.clone();
            // It runs after those that are ready now, and after the connections to other nodes have sent what these have for
            // them: a write takes its way over a follower for longer than over this node's own disk.
            actix::spawn(async move {
                tokio::task::yield_now().await;
                let tasks = gathered.tasks.take();
                gathered.shared.log_writer.submit(tasks);
            });
        }
    }
}
