//! Batches to several shards in one call.
//!
//! Each is run as if it had come alone. The call is answered when the first has ended, with those that end soon after:
//! as long again as the first took, the others are waited for. Batches that came together mostly end together, since they share
//! the log writer's sync and the frames to other nodes; and who waits for a slow shard is told later, by a
//! [`Rest`](rest), instead of holding up the others.

use std::cell::Cell;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::Poll;
use std::time::{Duration, Instant};

use futures_util::stream::{FuturesUnordered, StreamExt};

use super::kv::{Batch, Ended, Kv};
use super::wire::Room;
use crate::limits::GATHER_ANSWER_MS;
use crate::refusal::Refusal;
use crate::schema::kv_capnp::{answers, rest};

/// The end of a batch, with its place in the call.
type Running = Pin<Box<dyn Future<Output = (u32, Ended)>>>;

/// The batches of one call that haven't been answered. What is dropped here is given up.
pub(super) struct Gathered {
    kv: Rc<Kv>,
    running: FuturesUnordered<Running>,
}

impl Gathered {
    /// These batches, in their order; they begin with the first wait.
    pub(super) fn begin(kv: &Rc<Kv>, batches: Vec<Result<Batch, Refusal>>) -> Gathered {
        let running = (0u32..).zip(batches).map(|(place, batch)| {
            let kv = kv.clone();
            Box::pin(async move { (place, kv.run(batch, None).await) }) as Running
        });
        Gathered { kv: kv.clone(), running: running.collect() }
    }

    /// Waits for some of them; none if there are no more.
    pub(super) async fn next(&mut self) -> Vec<(u32, Ended)> {
        let begun = Instant::now();
        let Some(first) = self.running.next().await else {
            return Vec::new();
        };
        let mut done = vec![first];
        let longer = begun.elapsed().max(Duration::from_millis(GATHER_ANSWER_MS));
        let mut over = pin!(tokio::time::sleep(longer));
        poll_fn(|context| {
            while let Poll::Ready(Some(end)) = self.running.poll_next_unpin(context) {
                done.push(end);
            }
            if self.running.is_empty() { Poll::Ready(()) } else { over.as_mut().poll(context) }
        })
        .await;
        done
    }

    /// Writes the answers to those that are done, and the way to the others.
    pub(super) fn write(self, done: Vec<(u32, Ended)>, mut to: answers::Builder<'_>) {
        let count = u32::try_from(done.len()).unwrap_or(u32::MAX);
        let mut list = to.reborrow().init_list(count);
        // One message, so one room for all their values.
        let mut room = Room::on(&self.kv.backlog);
        for (at, (place, ended)) in (0..count).zip(done) {
            let mut answer = list.reborrow().get(at);
            answer.set_request(place);
            self.kv.write_end(ended, &mut room, answer.init_response());
        }
        if !self.running.is_empty() {
            to.set_rest(capnp_rpc::new_client(Rest(Cell::new(Some(self)))));
        }
    }
}

/// Those that weren't done when the call was answered; empty once they were asked for.
struct Rest(Cell<Option<Gathered>>);

impl rest::Server for Rest {
    async fn next(
        self: Rc<Self>,
        _: rest::NextParams,
        mut results: rest::NextResults,
    ) -> Result<(), capnp::Error> {
        let Some(mut gathered) = self.0.take() else {
            return Err(capnp::Error::failed("the rest was asked for before: it is in that answer".into()));
        };
        let done = gathered.next().await;
        gathered.write(done, results.get().init_answers());
        Ok(())
    }
}
