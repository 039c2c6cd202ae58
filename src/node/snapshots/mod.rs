//! Snapshots between this node and others. A follower that was away for longer than its leader keeps
//! log for it gets the whole state of the shard instead.
//!
//! ```text
//! leader's node    replica ─order─► outgoing ─► worker (makes the file, beside flushes)
//!                     ▲                 └──── transport: snapshot lane ────┐
//!                     └─ made? done ────┘                                  ▼
//! follower's node  supervisor ◄─ install ─ worker (checks, loads) ◄─── inbox (partial files)
//! ```
//!
//! - [`outgoing`]: what leaders want brought to followers; [`attempts`]: what to do after each try.
//! - [`inbox`]: what is received, in files that outlive connection and process.
//! - [`worker`]: the thread that makes, loads and removes.
//! - [`install`]: from a whole file to a replica that stands at it.
//!
//! Promises: a replica goes on with its old state, votes and follows, until the new one is loaded,
//! durable and checked; then one write of the log switches it, and it is opened anew as after any
//! crash. A crash at any point leaves the old replica or the new one, and what is left over of the
//! other is removed. Bulk waits for nobody and nobody waits for bulk: it has connections and threads of
//! its own, bounds on bytes per second, on transfers, and on disk.

pub mod attempts;
pub mod inbox;
pub mod install;
pub mod outgoing;
pub mod worker;

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use crate::ids::ReplicaId;
use inbox::Inbox;
use outgoing::Outgoing;
use worker::Worker;

/// What the threads of a node use of it.
pub struct Snapshots {
    /// What comes in.
    pub inbox: Inbox,
    /// What goes out.
    pub outgoing: Outgoing,
    /// Who does the work.
    pub worker: Arc<Worker>,
}

impl Snapshots {
    /// Starts the threads, which are returned too.
    ///
    /// # Errors
    /// The system has no thread to give.
    pub fn start(
        tools: worker::Tools,
        origin: outgoing::Origin,
    ) -> io::Result<(Snapshots, [JoinHandle<()>; 2])> {
        let (dir, fatal) = (tools.dir.clone(), tools.fatal.clone());
        let (worker, working) = Worker::start(tools)?;
        let (worker, inbox) = (Arc::new(worker), Inbox::new(dir.clone()));
        let tools = outgoing::Tools { origin, worker: worker.clone(), dir, inbox: inbox.clone() };
        let (outgoing, sending) = Outgoing::start(tools, &fatal)?;
        Ok((Snapshots { inbox, outgoing, worker }, [working, sending]))
    }

    /// From now on the cluster allows each node to send so many bytes a second, and to make and load in
    /// proportion; 0: any number. The node's own limit holds beside it.
    pub fn limit(&self, bytes_per_second: u64) {
        self.outgoing.limit(bytes_per_second);
        self.worker.limit(bytes_per_second);
    }

    /// Takes no more work; the threads end after their present steps.
    pub fn close(&self) {
        self.outgoing.close();
        self.worker.close();
    }

    /// A replica is removed for good: nothing that was made of it or received for it is of use. May
    /// wait for the disk.
    pub fn forget(&self, replica: ReplicaId) {
        self.outgoing.forget(replica);
        if let Err(error) = self.inbox.forget(replica) {
            tracing::warn!(%replica, %error, "a part of a snapshot for a removed replica stays");
        }
    }
}
