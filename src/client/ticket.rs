//! An operation under way, and the promise that whoever waits for it is answered.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, OwnedSemaphorePermit, oneshot};

use super::retry::{self, Attempts, Failure, Kind};
use super::session::Tag;
use super::{ClientError, NotApplied, Operation, OperationResult};
use crate::machine::command::Expect;
use crate::placement::ring;

/// The end of one operation.
pub type End = Result<OperationResult, ClientError>;

/// How much a driver has accepted and not yet answered.
#[derive(Default)]
pub struct Load {
    count: Cell<usize>,
    idle: Notify,
}

impl Load {
    /// Counts one piece of work until the guard is dropped.
    pub fn enter(self: &Rc<Load>) -> LoadGuard {
        self.count.set(self.count.get() + 1);
        LoadGuard(self.clone())
    }

    /// Waits until nothing is under way.
    pub async fn idle(&self) {
        while self.count.get() > 0 {
            self.idle.notified().await;
        }
    }
}

/// Counts as load while it exists.
pub struct LoadGuard(Rc<Load>);

impl Drop for LoadGuard {
    fn drop(&mut self) {
        self.0.count.set(self.0.count.get() - 1);
        if self.0.count.get() == 0 {
            self.0.idle.notify_one();
        }
    }
}

/// The time an operation has.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    /// When it is over.
    pub at: Instant,
    /// How much it was, for messages.
    pub within: Duration,
}

impl Deadline {
    /// From now on.
    pub fn after(within: Duration) -> Deadline {
        Deadline { at: Instant::now() + within, within }
    }

    /// What is left at `now`.
    pub fn left(&self, now: Instant) -> Duration {
        self.at.saturating_duration_since(now)
    }
}

/// Where an operation's end is delivered.
pub enum Reply {
    /// To a caller that waits for this operation alone.
    One(oneshot::Sender<End>, Option<OwnedSemaphorePermit>),
    /// To the place of this operation in a batch.
    Part(Rc<Parts>, usize),
}

/// The ends of a batch; delivered when the last part is answered.
pub struct Parts {
    ends: RefCell<Vec<Option<End>>>,
    whole: Cell<Option<oneshot::Sender<Vec<End>>>>,
    _permit: Option<OwnedSemaphorePermit>,
}

impl Parts {
    /// Room for `count` ends.
    pub fn new(
        count: usize,
        whole: oneshot::Sender<Vec<End>>,
        permit: Option<OwnedSemaphorePermit>,
    ) -> Rc<Parts> {
        Rc::new(Parts {
            ends: RefCell::new((0..count).map(|_| None).collect()),
            whole: Cell::new(Some(whole)),
            _permit: permit,
        })
    }
}

impl Drop for Parts {
    fn drop(&mut self) {
        let ends = self.ends.take().into_iter();
        let closed = || Err(ClientError::NotApplied(NotApplied::Closed));
        let ends = ends.map(|end| end.unwrap_or_else(closed)).collect();
        if let Some(whole) = self.whole.take() {
            // The caller may have stopped waiting; its business.
            whole.send(ends).ok();
        }
    }
}

/// One operation, from its acceptance to its answer. Invariant: it is answered exactly once; one that
/// is dropped unanswered (the client is closed, its thread panics) is answered then, with the truth
/// about what may have happened.
pub struct Ticket {
    /// What is asked.
    pub operation: Operation,
    /// Database by name.
    pub database: Arc<str>,
    /// The key's place on the ring.
    pub position: u64,
    /// What may be repeated.
    pub kind: Kind,
    /// The time it has.
    pub deadline: Deadline,
    /// Range version of the shard to whose queue it was added.
    pub range_version: u64,
    /// Attempts that failed.
    pub attempts: Attempts,
    /// How the last attempt failed.
    pub last: Option<String>,
    /// True while an attempt is on its way.
    pub sent: bool,
    /// Of a command that was put into a call: kept for all its attempts, until it is answered.
    pub tag: Option<Tag>,
    reply: Option<Reply>,
    _load: LoadGuard,
}

impl Ticket {
    /// Accepts an operation. With `once` a write has no session, and isn't repeated after an unknown
    /// outcome.
    pub fn new(
        operation: Operation,
        database: Arc<str>,
        deadline: Deadline,
        once: bool,
        reply: Reply,
        load: &Rc<Load>,
    ) -> Ticket {
        let kind = match operation {
            Operation::Get(_) => Kind::Read,
            _ if once => Kind::Once,
            _ => Kind::ExactlyOnce,
        };
        Ticket {
            position: ring::position(operation.key()),
            operation,
            database,
            kind,
            deadline,
            range_version: 0,
            attempts: Attempts::default(),
            last: None,
            sent: false,
            tag: None,
            reply: Some(reply),
            _load: load.enter(),
        }
    }

    /// Whether somebody still waits for its end.
    pub fn open(&self) -> bool {
        match &self.reply {
            Some(Reply::One(caller, _)) => !caller.is_closed(),
            Some(Reply::Part(..)) => true,
            None => false,
        }
    }

    /// Delivers its end; further ones are ignored.
    pub fn answer(&mut self, end: End) {
        // Whatever is still under way for it, nobody will ask for it again.
        self.tag = None;
        match self.reply.take() {
            // The caller may have stopped waiting; its business.
            Some(Reply::One(caller, _permit)) => drop(caller.send(end)),
            Some(Reply::Part(parts, at)) => {
                if let Some(place) = parts.ends.borrow_mut().get_mut(at) {
                    *place = Some(end);
                }
            }
            None => (),
        }
    }

    /// Answers it if its time is over, saying how its last attempt failed, or `why` if it had none.
    pub fn expire(&mut self, now: Instant, why: &str) {
        if self.deadline.at <= now && self.open() {
            let unknown = self.may_have_happened();
            let why = self.last.take().unwrap_or_else(|| why.to_owned());
            let failure = Failure::NotSent(why);
            self.answer(Err(retry::give_up(unknown, failure, self.deadline.within)));
        }
    }

    fn may_have_happened(&self) -> bool {
        self.attempts.unknown || (self.sent && self.kind != Kind::Read)
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.reply.is_some() {
            let error = if self.may_have_happened() {
                ClientError::Unknown("the client was closed before the answer came".into())
            } else {
                ClientError::NotApplied(NotApplied::Closed)
            };
            self.answer(Err(error));
        }
    }
}

impl Operation {
    /// The key it is about.
    pub fn key(&self) -> &[u8] {
        match self {
            Operation::Get(key)
            | Operation::Put(key, _)
            | Operation::Delete(key)
            | Operation::Cas(key, ..) => key,
        }
    }

    /// Bytes of its key and values.
    pub fn size(&self) -> usize {
        self.key().len()
            + match self {
                Operation::Get(_) | Operation::Delete(_) => 0,
                Operation::Put(_, value) => value.len(),
                Operation::Cas(_, Expect::Value(old), new) => old.len() + new.len(),
                Operation::Cas(_, _, new) => new.len(),
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    fn ticket(operation: Operation, load: &Rc<Load>) -> (Ticket, oneshot::Receiver<End>) {
        let (reply, end) = oneshot::channel();
        let deadline = Deadline::after(Duration::from_secs(1_000));
        let reply = Reply::One(reply, None);
        (Ticket::new(operation, "db".into(), deadline, false, reply, load), end)
    }

    fn put() -> Operation {
        Operation::Put(Bytes::from_static(b"k"), Bytes::from_static(b"v"))
    }

    #[test]
    fn a_dropped_ticket_tells_the_truth() {
        let load = Rc::default();
        let closed = Err(ClientError::NotApplied(NotApplied::Closed));
        let (idle, mut end) = ticket(put(), &load);
        drop(idle);
        assert_eq!(end.try_recv().unwrap(), closed);
        let (mut sent, mut end) = ticket(put(), &load);
        sent.sent = true;
        drop(sent);
        assert!(matches!(end.try_recv().unwrap(), Err(ClientError::Unknown(_))));
        let (mut read, mut end) = ticket(Operation::Get(Bytes::from_static(b"k")), &load);
        read.sent = true;
        drop(read);
        assert_eq!(end.try_recv().unwrap(), closed);
        assert_eq!(load.count.get(), 0);
    }

    #[test]
    fn a_batch_is_delivered_whole() {
        let load = Rc::default();
        let (whole, mut ends) = oneshot::channel();
        let parts = Parts::new(2, whole, None);
        let deadline = Deadline::after(Duration::from_secs(1_000));
        let mut tickets: Vec<Ticket> = (0..2)
            .map(|at| {
                let reply = Reply::Part(parts.clone(), at);
                Ticket::new(put(), "db".into(), deadline, false, reply, &load)
            })
            .collect();
        drop(parts);
        tickets[1].answer(Ok(OperationResult::Written(4)));
        assert!(ends.try_recv().is_err());
        drop(tickets);
        let closed = Err(ClientError::NotApplied(NotApplied::Closed));
        let expected = vec![closed, Ok(OperationResult::Written(4))];
        assert_eq!(ends.try_recv().unwrap(), expected);
    }

    #[test]
    fn time_runs_out_once() {
        let load = Rc::default();
        let (mut ticket, mut end) = ticket(put(), &load);
        ticket.expire(Instant::now(), "early");
        assert!(end.try_recv().is_err());
        ticket.sent = true;
        ticket.expire(Instant::now() + Duration::from_secs(2_000), "no answer");
        ticket.answer(Ok(OperationResult::Written(1)));
        let unknown = ClientError::Unknown("no answer".into());
        assert_eq!(end.try_recv().unwrap(), Err(unknown));
    }
}
