//! The read thread: answers queries that memory can't, so that no replica waits for the disk or for
//! the state engine's lock. Jobs come in batches, one per replica and pass.
//!
//! What waits is bounded by [`limits::READS_WAITING_MAX`], beyond which queries are `Busy`. Those whose
//! caller has given up are passed over: after a stall the living would else wait behind the dead, give
//! up in turn, and come again.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use actix::Recipient;
use bytes::Bytes;
use tokio::sync::oneshot;

use super::counting::{Page, count_page};
use super::fatal::Fatal;
use super::messages::Learned;
use super::ticket::Ticket;
use crate::failpoints::failpoint;
use crate::group::types::Output;
use crate::limits;
use crate::machine::command::Query;
use crate::machine::{ApplyError, MachineKind};
use crate::refusal::Refusal;
use crate::storage::pulse::{self, Pulse};
use crate::storage::state::StateReader;
use crate::telemetry::metrics as names;

/// Queries of one replica whose read index is confirmed and applied.
pub struct ReadJob {
    /// The shard's machine.
    pub machine: MachineKind,
    /// The state to read.
    pub reader: StateReader,
    /// The queries and who asks.
    pub reads: Vec<(Ticket, Query)>,
    /// Who keeps what is read, so that it needn't be read again soon.
    pub learns: Option<Recipient<Learned>>,
}

impl ReadJob {
    /// What it counts for: a scan holds a copy of what memory adds to its page.
    fn weight(&self) -> usize {
        let weight = |query: &Query| match query {
            Query::Get { .. } => 1,
            Query::Scan { .. } => limits::SCAN_WEIGHT,
        };
        self.reads.iter().map(|(_, query)| weight(query)).sum()
    }

    /// Answers all of it.
    fn answer(self) {
        let ReadJob { machine, reader, reads, learns } = self;
        let mut learned = Vec::new();
        for (ticket, query) in reads {
            if ticket.abandoned() {
                ticket.finish(Err(Refusal::Deadline));
                continue;
            }
            let answer = match &query {
                Query::Get { key } => reader.get(key).map_err(ApplyError::from).and_then(|stored| {
                    let answer = machine.answer(key, stored.as_ref());
                    if learns.is_some() && stored.as_ref().map_or(0, Bytes::len) <= limits::LEARNED_BYTES_MAX
                    {
                        learned.push((key.clone(), stored));
                    }
                    answer
                }),
                Query::Scan { .. } => machine.query(&query, &reader),
            };
            ticket.finish(answer.map(Output::Answer).map_err(|error| {
                tracing::error!(replica = %reader.replica, %error, "reading the state store");
                Refusal::Unavailable("the node can't read its state store".into())
            }));
            pulse::beat();
        }
        if let Some(learns) = learns.filter(|_| !learned.is_empty())
            && learns.try_send(Learned(reader.stamp(), learned)).is_err()
        {
            tracing::trace!("a replica is too busy to learn what was read for it");
        }
    }
}

/// See the module page.
pub struct ReadThread {
    work: mpsc::Sender<Work>,
    waiting: Arc<AtomicUsize>,
}

enum Work {
    Read(ReadJob),
    /// A page that begins after a key, of whose pairs and bytes are to be counted.
    Count(StateReader, Bytes, oneshot::Sender<Page>),
    /// Answered when everything submitted before is done.
    Barrier(oneshot::Sender<()>),
}

impl ReadThread {
    /// Starts the thread; it ends when this handle is dropped and its work is done. `fatal` is raised
    /// if it panics: nobody else could answer what waits. `pulse` tells how it gets on.
    pub fn start(fatal: &Fatal, pulse: Pulse) -> io::Result<(ReadThread, JoinHandle<()>)> {
        let (work, queue) = mpsc::channel();
        let waiting = Arc::<AtomicUsize>::default();
        let done = waiting.clone();
        let thread = fatal.thread("pontoon-read", "the read thread", move || {
            let _attached = pulse.attach();
            for work in queue {
                let _working = pulse::work();
                let job = match work {
                    Work::Read(job) => job,
                    Work::Count(reader, after, done) => {
                        match count_page(&reader, &after) {
                            // Whoever asked has ended, or hears by the channel that there is no answer.
                            Ok(page) => drop(done.send(page)),
                            Err(error) => {
                                tracing::warn!(replica = %reader.replica, %error, "counting the keys of a shard");
                            }
                        }
                        continue;
                    }
                    Work::Barrier(done) => {
                        if done.send(()).is_err() {
                            tracing::trace!("nobody waits any more: the node is stopping");
                        }
                        continue;
                    }
                };
                failpoint!(ReadEngine, job.reader.replica);
                let weight = job.weight();
                job.answer();
                done.fetch_sub(weight, Ordering::Relaxed);
            }
        })?;
        Ok((ReadThread { work, waiting }, thread))
    }

    /// Hands over a job, or ends its queries as `Busy` if too many wait. If the thread is gone the
    /// tickets are dropped, which answers them.
    pub fn submit(&self, job: ReadJob) {
        let weight = job.weight();
        if self.waiting.fetch_add(weight, Ordering::Relaxed) >= limits::READS_WAITING_MAX {
            self.waiting.fetch_sub(weight, Ordering::Relaxed);
            let what = "reads of the node's state store";
            let busy = Refusal::Busy { what: what.into(), retry_after_ms: limits::BUSY_RETRY_MS };
            metrics::counter!(names::REFUSALS, "reason" => busy.kind()).increment(job.reads.len() as u64);
            for (ticket, _) in job.reads {
                ticket.finish(Err(busy.clone()));
            }
            return;
        }
        self.send(Work::Read(job));
    }

    /// Counts a page of a state, after those who asked before; without an answer if it can't be read. One
    /// is asked for at a time, so it needs no bound.
    pub fn count(&self, reader: StateReader, after: Bytes, done: oneshot::Sender<Page>) {
        self.send(Work::Count(reader, after, done));
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

#[cfg(test)]
mod tests {
    use std::ops::Bound;
    use std::sync::Mutex;

    use bytes::Bytes;
    use tokio::sync::oneshot;

    use super::*;
    use crate::group::types::Operation;
    use crate::ids::{GROUP_START, ReplicaId};
    use crate::node::ticket::{Results, tickets};
    use crate::storage::StorageError;
    use crate::storage::engine::{Engine, Mutation};
    use crate::storage::engine_memory::MemoryEngine;
    use crate::storage::state::{ReplicaState, StateHeader};

    /// Its reads of one key wait for the gate, and are counted.
    struct Gated {
        inner: MemoryEngine,
        gate: Mutex<()>,
        reads: AtomicUsize,
    }

    impl Engine for Gated {
        fn name(&self) -> &'static str {
            "gated"
        }
        fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StorageError> {
            let _open = self.gate.lock().expect("the gate");
            self.reads.fetch_add(1, Ordering::Relaxed);
            self.inner.get(key)
        }
        fn scan(
            &self,
            from: Bound<&[u8]>,
            to: &[u8],
            visit: &mut dyn FnMut(&[u8], Bytes) -> bool,
        ) -> Result<(), StorageError> {
            self.inner.scan(from, to, visit)
        }
        fn write(&self, batch: &[Mutation]) -> Result<(), StorageError> {
            self.inner.write(batch)
        }
        fn sync(&self) -> Result<(), StorageError> {
            self.inner.sync()
        }
        fn disk_bytes(&self) -> u64 {
            self.inner.disk_bytes()
        }
    }

    fn gets(reader: &StateReader, count: usize) -> (ReadJob, oneshot::Receiver<Results>) {
        let query = Query::Get { key: "k".into() };
        let operations = vec![Operation::Query(query.clone()); count];
        let (reply, results) = oneshot::channel();
        let tickets = tickets(&operations, reply, None, None);
        let reads = tickets.into_iter().map(|ticket| (ticket, query.clone())).collect();
        (ReadJob { machine: MachineKind::Kv, reader: reader.clone(), reads, learns: None }, results)
    }

    #[test]
    fn a_stall_lets_so_much_wait_and_the_dead_are_passed_over() {
        let engine = Arc::new(Gated {
            inner: MemoryEngine::new(),
            gate: Mutex::default(),
            reads: AtomicUsize::new(0),
        });
        let initial = StateHeader {
            applied: GROUP_START,
            revision: 0,
            log_time: 0,
            epoch: Default::default(),
            members: Vec::new(),
            conf_state: Default::default(),
        };
        let state = ReplicaState::open(engine.clone(), ReplicaId(1), 1, initial).expect("a state");
        let reader = state.reader();
        let (threads, thread) = ReadThread::start(&Fatal::new(), Default::default()).expect("a thread");
        let before = engine.reads.load(Ordering::Relaxed);

        let gate = engine.gate.lock().expect("the gate");
        let (first, one) = gets(&reader, 1);
        threads.submit(first);
        let (dead, nobody) = gets(&reader, limits::READS_WAITING_MAX - 2);
        threads.submit(dead);
        drop(nobody);
        let (last, two) = gets(&reader, 1);
        threads.submit(last);
        let (more, refused) = gets(&reader, 2);
        threads.submit(more);
        let refused = refused.blocking_recv().expect("an answer at once").expect("tried");
        assert!(refused.iter().all(|end| matches!(end, Err(Refusal::Busy { .. }))), "{refused:?}");

        drop(gate);
        for answered in [one, two] {
            let ends = answered.blocking_recv().expect("an answer").expect("tried");
            assert!(ends.iter().all(Result::is_ok), "{ends:?}");
        }
        assert_eq!(engine.reads.load(Ordering::Relaxed) - before, 2, "of the living alone");
        drop(threads);
        thread.join().expect("no panic");
    }
}
