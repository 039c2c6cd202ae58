//! How the ends of a batch's operations find back to who asked.
//!
//! Each operation of a batch has a [`Ticket`]; whoever ends it, on whatever thread, puts the result
//! in its place, and the last one wakes the asker. A ticket that is dropped unanswered, because its
//! replica crashed, ends its operation too, so that every caller is always answered.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tokio::sync::oneshot;

use super::load::Admitted;
use super::trace::Sheet;
use crate::codec::trace::Moment;
use crate::group::types::{Operation, Output};
use crate::refusal::Refusal;

/// The results of one batch, in the order of its operations; or why none of them was started.
pub type Results = Result<Vec<Result<Output, Refusal>>, Refusal>;

struct Open {
    results: Vec<Option<Result<Output, Refusal>>>,
    missing: usize,
    reply: Option<oneshot::Sender<Results>>,
}

/// A batch whose results come in one by one.
struct Batch {
    open: Mutex<Open>,
    /// What the batch counts for on its node, until the last of its operations has ended.
    _admitted: Option<Arc<Admitted>>,
    /// Where its time goes, if anybody wants to know.
    trace: Option<Arc<Sheet>>,
}

/// The place of one operation's result.
pub struct Ticket {
    batch: Arc<Batch>,
    index: u32,
    /// Whether an operation that ends without a result may have had an effect.
    writes: bool,
    ended: bool,
}

/// Tickets for `operations`, whose results go to `reply` together. `admitted` is what they count for, `trace` where
/// their time is noted.
pub fn tickets(
    operations: &[Operation],
    reply: oneshot::Sender<Results>,
    admitted: Option<Arc<Admitted>>,
    trace: Option<Arc<Sheet>>,
) -> Vec<Ticket> {
    let count = operations.len();
    let open = Open { results: (0..count).map(|_| None).collect(), missing: count, reply: Some(reply) };
    let batch = Arc::new(Batch { open: Mutex::new(open), _admitted: admitted, trace });
    let tickets = operations.iter().zip(0..).map(|(operation, index)| Ticket {
        batch: batch.clone(),
        index,
        writes: !matches!(operation, Operation::Query(_)),
        ended: false,
    });
    tickets.collect()
}

impl Ticket {
    /// Ends the operation.
    pub fn finish(mut self, result: Result<Output, Refusal>) {
        self.put(result);
    }

    /// Whether nobody waits for the result any more.
    pub fn abandoned(&self) -> bool {
        let open = self.batch.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.reply.as_ref().is_none_or(oneshot::Sender::is_closed)
    }

    /// Whether it is of the batch that this is the sheet of.
    pub fn is_of(&self, sheet: &Arc<Sheet>) -> bool {
        self.batch.trace.as_ref().is_some_and(|trace| Arc::ptr_eq(trace, sheet))
    }

    fn put(&mut self, result: Result<Output, Refusal>) {
        self.ended = true;
        if let Some(trace) = &self.batch.trace {
            trace.stamp_last(Moment::Answered, Instant::now());
        }
        // The lock is held for a few moves that can't panic.
        let mut open = self.batch.open.lock().unwrap_or_else(PoisonError::into_inner);
        let place = &mut open.results[self.index as usize];
        debug_assert!(place.is_none(), "an operation ends once");
        *place = Some(result);
        open.missing -= 1;
        if open.missing > 0 {
            return;
        }
        let results = std::mem::take(&mut open.results).into_iter().flatten().collect();
        if let Some(reply) = open.reply.take()
            && reply.send(Ok(results)).is_err()
        {
            // The asker gave up, at its deadline; it has reported the outcome as unknown.
            tracing::trace!("nobody waits for the results of a batch");
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if !self.ended {
            let refusal = if self.writes {
                Refusal::Unknown("the replica crashed before it could answer".into())
            } else {
                Refusal::Unavailable("the replica crashed before it could answer".into())
            };
            self.put(Err(refusal));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::command::{Answer, Command, KvCommand, Query};

    #[test]
    fn results_arrive_together_in_order_and_a_dropped_ticket_counts() {
        let operations = [
            Operation::Query(Query::Get { key: "a".into() }),
            Operation::Command { command: Command::Kv(KvCommand::Delete { key: "b".into() }), session: None },
        ];
        let (reply, mut results) = oneshot::channel();
        let mut tickets = tickets(&operations, reply, None, None);
        drop(tickets.pop());
        assert!(results.try_recv().is_err());
        let answer = Ok(Output::Answer(Answer::Value(None)));
        tickets.pop().expect("first").finish(answer.clone());
        let results = results.try_recv().expect("complete").expect("started");
        assert_eq!(results[0], answer);
        assert!(matches!(results[1], Err(Refusal::Unknown(_))));
    }
    #[test]
    fn a_batch_counts_until_its_last_operation_has_ended_and_is_abandoned_before() {
        let load = Arc::<crate::node::load::Load>::default();
        let admitted = load.admit(2, 10).ok().map(Arc::new);
        let operations = [(); 2].map(|()| Operation::Query(Query::Get { key: "a".into() }));
        let (reply, results) = oneshot::channel();
        let mut tickets = tickets(&operations, reply, admitted, None);
        assert!(!tickets[0].abandoned());
        drop(results);
        assert!(tickets[0].abandoned());
        drop(tickets.pop());
        assert_eq!(load.operations(), 2);
        drop(tickets);
        assert_eq!(load.operations(), 0);
    }
}
