//! Batches to several shards in one call.
//!
//! Each is run as if it had come alone. The call is answered when the first has ended, with those that end soon after:
//! as long again as the first took, up to [`GATHER_ANSWER_MS_MAX`], the others are waited for. Batches that came together mostly end
//! together, since they share the log writer's sync and the frames to other nodes; and who waits for a slow shard is told later, by a
//! [`Rest`](rest), instead of holding up the others. So are values that one answer has no room for.
//!
//! Nobody works on a rest that isn't asked for, and its operations count as under way all the same: what the node does for others
//! is bounded together with them. So it is given up after [`GATHER_REST_MS`].

use std::cell::Cell;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::Poll;
use std::time::{Duration, Instant};

use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::task::{AbortHandle, spawn_local};

use super::kv::{Batch, Ended, Kv};
use super::wire::Room;
use crate::limits::{ANSWER_BYTES_MAX, GATHER_ANSWER_MS, GATHER_ANSWER_MS_MAX, GATHER_REST_MS};
use crate::refusal::Refusal;
use crate::schema::kv_capnp::{answers, rest};

/// The end of a batch, with its place in the call.
type Running = Pin<Box<dyn Future<Output = (u32, Ended)>>>;

/// The batches of one call that haven't been answered. What is dropped here is given up.
pub(super) struct Gathered {
    kv: Rc<Kv>,
    running: FuturesUnordered<Running>,
    /// Those that have ended.
    done: Vec<(u32, Ended)>,
}

impl Gathered {
    /// These batches, in their order; they begin with the first wait.
    pub(super) fn begin(kv: &Rc<Kv>, batches: Vec<Result<Batch, Refusal>>) -> Gathered {
        let running = (0u32..).zip(batches).map(|(place, batch)| {
            let kv = kv.clone();
            Box::pin(async move { (place, kv.run(batch, None).await) }) as Running
        });
        Gathered { kv: kv.clone(), running: running.collect(), done: Vec::new() }
    }

    /// Waits until some of them have ended that weren't told, if there are any.
    pub(super) async fn wait(&mut self) {
        if !self.done.is_empty() {
            return;
        }
        let begun = Instant::now();
        let Some(first) = self.running.next().await else {
            return;
        };
        self.done.push(first);
        let longer = Duration::from_millis(GATHER_ANSWER_MS)..=Duration::from_millis(GATHER_ANSWER_MS_MAX);
        let longer = begun.elapsed().clamp(*longer.start(), *longer.end());
        let mut over = pin!(tokio::time::sleep(longer));
        poll_fn(|context| {
            while let Poll::Ready(Some(end)) = self.running.poll_next_unpin(context) {
                self.done.push(end);
            }
            if self.running.is_empty() { Poll::Ready(()) } else { over.as_mut().poll(context) }
        })
        .await;
    }

    /// Writes the answers to those that are done, as far as a message has room for their values, and the way to the others.
    pub(super) fn write(mut self, mut to: answers::Builder<'_>) {
        let mut bytes = 0;
        let fit = self.done.iter().take_while(|(_, ended)| {
            bytes += ended.value_bytes();
            bytes <= ANSWER_BYTES_MAX
        });
        // What one batch alone is too great for, it is told itself.
        let fit = fit.count().max(1).min(self.done.len());
        let count = u32::try_from(fit).unwrap_or(u32::MAX);
        let mut list = to.reborrow().init_list(count);
        let mut room = Room::on(&self.kv.backlog);
        for (at, (place, ended)) in (0..count).zip(self.done.drain(..fit)) {
            let mut answer = list.reborrow().get(at);
            answer.set_request(place);
            self.kv.write_end(ended, &mut room, answer.init_response());
        }
        if !self.running.is_empty() || !self.done.is_empty() {
            to.set_rest(capnp_rpc::new_client(Rest::of(self)));
        }
    }
}

/// Those that the call's answer didn't tell of.
struct Rest {
    /// Empty once they were asked for, or given up.
    gathered: Rc<Cell<Option<Gathered>>>,
    /// What gives them up.
    patience: AbortHandle,
}

impl Rest {
    fn of(gathered: Gathered) -> Rest {
        let gathered = Rc::new(Cell::new(Some(gathered)));
        let kept = gathered.clone();
        let patience = spawn_local(async move {
            tokio::time::sleep(Duration::from_millis(GATHER_REST_MS)).await;
            if kept.take().is_some() {
                tracing::debug!("a client didn't ask for what was left of its call");
            }
        });
        Rest { gathered, patience: patience.abort_handle() }
    }
}

impl Drop for Rest {
    fn drop(&mut self) {
        self.patience.abort();
    }
}

impl rest::Server for Rest {
    async fn next(
        self: Rc<Self>,
        _: rest::NextParams,
        mut results: rest::NextResults,
    ) -> Result<(), capnp::Error> {
        let Some(mut gathered) = self.gathered.take() else {
            let why = "the rest was asked for before, and is in that answer, or too late";
            return Err(capnp::Error::failed(why.into()));
        };
        self.patience.abort();
        gathered.wait().await;
        gathered.write(results.get().init_answers());
        Ok(())
    }
}
