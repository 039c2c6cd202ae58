//! The read thread: answers queries that memory can't, so that no replica waits for the disk or for
//! the state engine's lock. Jobs come in batches, one per replica and pass.

use std::io;
use std::sync::mpsc;
use std::thread::JoinHandle;

use tokio::sync::oneshot;

use super::fatal::Fatal;
use super::ticket::Ticket;
use crate::group::types::Output;
use crate::machine::MachineKind;
use crate::machine::command::Query;
use crate::refusal::Refusal;
use crate::storage::state::StateReader;

/// Queries of one replica whose read index is confirmed and applied.
pub struct ReadJob {
    /// The shard's machine.
    pub machine: MachineKind,
    /// The state to read.
    pub reader: StateReader,
    /// The queries and who asks.
    pub reads: Vec<(Ticket, Query)>,
}

/// See the module page. Bounded by what replicas accept (`limits::REPLICA_PENDING_MAX` each).
pub struct ReadThread {
    work: mpsc::Sender<Work>,
}

enum Work {
    Read(ReadJob),
    /// Answered when everything submitted before is done.
    Barrier(oneshot::Sender<()>),
}

impl ReadThread {
    /// Starts the thread; it ends when this handle is dropped and its work is done. `fatal` is raised
    /// if it panics: nobody else could answer what waits.
    pub fn start(fatal: &Fatal) -> io::Result<(ReadThread, JoinHandle<()>)> {
        let (work, queue) = mpsc::channel();
        let thread = fatal.thread("pontoon-read", "the read thread", move || {
            for work in queue {
                let job = match work {
                    Work::Read(job) => job,
                    Work::Barrier(done) => {
                        if done.send(()).is_err() {
                            tracing::trace!("nobody waits any more: the node is stopping");
                        }
                        continue;
                    }
                };
                for (ticket, query) in job.reads {
                    let result =
                        job.machine.query(&query, &job.reader).map(Output::Answer).map_err(|error| {
                            tracing::error!(replica = %job.reader.replica, %error, "reading the state store");
                            Refusal::Unavailable("the node can't read its state store".into())
                        });
                    ticket.finish(result);
                }
            }
        })?;
        Ok((ReadThread { work }, thread))
    }

    /// Hands over a job. If the thread is gone the tickets are dropped, which answers them.
    pub fn submit(&self, job: ReadJob) {
        self.send(Work::Read(job));
    }

    /// Resolves when everything submitted before is done; before state is removed that may be read.
    pub fn barrier(&self) -> oneshot::Receiver<()> {
        let (done, receiver) = oneshot::channel();
        self.send(Work::Barrier(done));
        receiver
    }

    fn send(&self, work: Work) {
        if self.work.send(work).is_err() {
            tracing::debug!("the read thread has ended");
        }
    }
}
