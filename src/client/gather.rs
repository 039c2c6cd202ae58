//! Calls of several lanes to one node that leave together.
//!
//! A database of many shards has few operations under way for each of them, so a lane's call holds one or two, and what a
//! call costs is most of what they do. So the calls to a node that are made in one pass leave as one message, and its
//! answer brings all of theirs that were ready about then; the others follow ([`Rest`](crate::schema::kv_capnp::rest)). Nothing
//! else is shared: each call has its own deadline, session and end.
//!
//! ```text
//! lane ──send──►┐                                                  ┌──► the answer to each
//! lane ──send──►├──(nothing else is ready to run here)──► a call ──┤
//! lane ──send──►┘                                                  └──► rest ──► the answers to others
//! ```
//!
//! A call waits longer only while [`GATHERS_PER_NODE_MAX`] messages to the node are under way that left lately
//! ([`CALL_GATHER_MS`]), and at most [`GATHER_HOLD_MS`] then: who waits for a slow shard doesn't hold up the others. Calls leave in
//! the order in which they were made. What nobody waits for any more is given up.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::{Duration, Instant};

use capnp::capability::Response;
use tokio::sync::oneshot;
use tokio::task::spawn_local;

use super::session::Header;
use super::{Operation, wire};
use crate::ids::ShardId;
use crate::limits::{
    BATCH_BYTES_MAX, BATCH_OPERATIONS_MAX, CALL_BYTES_MIN, CALL_GATHER_MS, GATHER_HOLD_MS,
    GATHERS_PER_NODE_MAX,
};
use crate::schema::kv_capnp::{answers, batch_request, batch_response, kv, rest};

/// What a call asks of a node: a batch of operations to one shard.
pub struct Request {
    /// The shard.
    pub shard: ShardId,
    /// The range version by which it was chosen.
    pub range_version: u64,
    /// When the node is to give up, in milliseconds.
    pub timeout_ms: u32,
    /// For a plain call to another node.
    pub forwarded: bool,
    /// The session of those with a sequence.
    pub session: Option<Header>,
    /// Each with its sequence; 0: it has none.
    pub operations: Vec<(u64, Operation)>,
    /// Of keys and values.
    pub bytes: usize,
}

impl Request {
    fn write(&self, mut to: batch_request::Builder<'_>) {
        to.set_shard(self.shard.0);
        to.set_range_version(self.range_version);
        to.set_timeout_ms(self.timeout_ms);
        to.set_forwarded(self.forwarded);
        if let Some(session) = &self.session {
            wire::write_session(session, to.reborrow());
        }
        let count = u32::try_from(self.operations.len()).unwrap_or(u32::MAX);
        let mut list = to.init_operations(count);
        for (at, (sequence, operation)) in (0..count).zip(&self.operations) {
            let mut to = list.reborrow().get(at);
            to.set_sequence(*sequence);
            wire::write_operation(operation, to);
        }
    }
}

/// The answer to one call, in the message that brought it.
pub enum Answer {
    /// Of a call that left alone.
    Alone(Response<kv::batch_results::Owned>),
    /// In this place of those that came together.
    Among(Rc<Message>, u32),
}

impl Answer {
    /// What it says.
    pub fn response(&self) -> capnp::Result<batch_response::Reader<'_>> {
        match self {
            Answer::Alone(response) => response.get()?.get_response(),
            Answer::Among(message, place) => message.answers()?.get_list()?.get(*place).get_response(),
        }
    }
}

/// A message with answers to several calls.
pub enum Message {
    /// The first of those to the calls that left together.
    First(Response<kv::gather_results::Owned>),
    /// Further ones.
    Further(Response<rest::next_results::Owned>),
}

impl Message {
    fn answers(&self) -> capnp::Result<answers::Reader<'_>> {
        match self {
            Message::First(message) => message.get()?.get_answers(),
            Message::Further(message) => message.get()?.get_answers(),
        }
    }
}

/// Where the answer to a call is waited for; closed if it isn't any more.
type Reply = oneshot::Sender<Result<Answer, capnp::Error>>;

/// See the module page. One per connection.
pub struct Gatherer {
    kv: kv::Client,
    /// The node takes several calls in one message.
    able: bool,
    state: RefCell<State>,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<(Request, Reply)>,
    /// Messages whose first answer hasn't come, by number, and when each left.
    under_way: Vec<(u64, Instant)>,
    /// The number of the last one.
    last: u64,
    /// A task that sends what waits is about to run.
    leaving: bool,
    /// One that does so after a while.
    held: bool,
}

impl State {
    /// Whether so many messages are under way that what waits had better share the next. One that takes long says
    /// nothing of when that is.
    fn is_busy(&self) -> bool {
        let long = Duration::from_millis(CALL_GATHER_MS);
        self.under_way.iter().filter(|(_, left)| left.elapsed() < long).count() >= GATHERS_PER_NODE_MAX
    }

    /// Those that leave now: the first, and as many after it as a message holds.
    fn take(&mut self) -> Vec<(Request, Reply)> {
        let (mut taken, mut operations, mut bytes) = (Vec::new(), 0, 0);
        while let Some((request, _)) = self.waiting.front() {
            operations += request.operations.len();
            bytes += request.bytes;
            let full = operations > BATCH_OPERATIONS_MAX || bytes > BATCH_BYTES_MAX;
            if full && !taken.is_empty() {
                break;
            }
            let Some(next) = self.waiting.pop_front() else { break };
            // Nobody waits for the others.
            if !next.1.is_closed() {
                taken.push(next);
            }
        }
        taken
    }
}

impl Gatherer {
    /// For calls of this service. `able`: its node takes several in one message.
    pub fn new(kv: kv::Client, able: bool) -> Rc<Gatherer> {
        Rc::new(Gatherer { kv, able, state: RefCell::default() })
    }

    /// Sends a call, with others of this pass if there are any, and waits for its answer. If that is dropped before the call
    /// leaves, it doesn't; and later, the node may have executed it or not.
    pub fn send(
        self: &Rc<Gatherer>,
        request: Request,
    ) -> impl Future<Output = Result<Answer, capnp::Error>> + use<> {
        let (reply, answer) = oneshot::channel();
        // As great a one is worth a message of its own, and shouldn't hold up small ones.
        if !self.able || request.bytes >= CALL_BYTES_MIN {
            spawn_local(self.clone().alone(request, reply));
        } else {
            self.state.borrow_mut().waiting.push_back((request, reply));
            self.look();
        }
        async {
            let lost = |_| Err(capnp::Error::disconnected("the client was closed".into()));
            answer.await.unwrap_or_else(lost)
        }
    }

    /// Has what waits leave when those who are ready to run have had their turn, if it may; else in a while.
    fn look(self: &Rc<Gatherer>) {
        let mut state = self.state.borrow_mut();
        if state.waiting.is_empty() || state.leaving {
            return;
        }
        let gatherer = self.clone();
        if !state.is_busy() {
            state.leaving = true;
            spawn_local(gatherer.leave());
        } else if !state.held {
            state.held = true;
            spawn_local(async move {
                tokio::time::sleep(Duration::from_millis(GATHER_HOLD_MS)).await;
                let mut state = gatherer.state.borrow_mut();
                state.held = false;
                if !state.leaving && !state.waiting.is_empty() {
                    state.leaving = true;
                    spawn_local(gatherer.clone().leave());
                }
            });
        }
    }

    async fn leave(self: Rc<Gatherer>) {
        let (mut taken, number) = {
            let mut state = self.state.borrow_mut();
            state.leaving = false;
            let taken = state.take();
            state.last += 1;
            let number = state.last;
            if !taken.is_empty() {
                state.under_way.push((number, Instant::now()));
            }
            (taken, number)
        };
        self.look();
        match (taken.len(), taken.pop()) {
            (_, None) => (),
            (1, Some((request, reply))) => {
                self.clone().alone(request, reply).await;
                self.arrived(number);
            }
            (_, Some(last)) => {
                taken.push(last);
                self.together(taken, number).await;
            }
        }
    }

    /// A message has its first answer, or none will come.
    fn arrived(self: &Rc<Gatherer>, number: u64) {
        self.state.borrow_mut().under_way.retain(|(of, _)| *of != number);
        self.look();
    }

    async fn alone(self: Rc<Gatherer>, request: Request, reply: Reply) {
        let mut call = self.kv.batch_request();
        request.write(call.get().init_request());
        drop(request);
        let mut reply = [Some(reply)];
        let answer = while_wanted(&mut reply, call.send().promise).await;
        if let (Some(answer), [Some(reply)]) = (answer, reply) {
            tell(reply, answer.map(Answer::Alone));
        }
    }

    async fn together(self: Rc<Gatherer>, calls: Vec<(Request, Reply)>, number: u64) {
        let mut call = self.kv.gather_request();
        let count = u32::try_from(calls.len()).unwrap_or(u32::MAX);
        let mut list = call.get().init_requests(count);
        let mut replies = Vec::with_capacity(calls.len());
        for (at, (request, reply)) in (0..count).zip(calls) {
            request.write(list.reborrow().get(at));
            replies.push(Some(reply));
        }
        let first = while_wanted(&mut replies, call.send().promise).await;
        self.arrived(number);
        let Some(first) = first else { return };
        let mut message = first.map(Message::First);
        // Until all have been answered, or there is nothing more to come.
        let why = loop {
            let rest = match message.and_then(|message| hand_out(message, &mut replies)) {
                Ok(Some(rest)) if replies.iter().any(|r| r.as_ref().is_some_and(|r| !r.is_closed())) => rest,
                Ok(_) => break capnp::Error::failed("the answer to a call is missing".into()),
                Err(error) => break error,
            };
            let further = while_wanted(&mut replies, rest.next_request().send().promise).await;
            let Some(further) = further else { return };
            message = further.map(Message::Further);
        };
        for reply in replies.into_iter().flatten() {
            tell(reply, Err(why.clone()));
        }
    }
}

/// Hands the answers of a message to those who wait for them; the way to the others, if there are more.
fn hand_out(message: Message, replies: &mut [Option<Reply>]) -> capnp::Result<Option<rest::Client>> {
    let message = Rc::new(message);
    let answers = message.answers()?;
    let list = answers.get_list()?;
    if list.is_empty() {
        // Asking again might go on for ever.
        return Err(capnp::Error::failed("answers without any".into()));
    }
    for (place, answer) in (0..).zip(list.iter()) {
        let reply = replies.get_mut(answer.get_request() as usize).and_then(Option::take);
        let reply = reply.ok_or_else(|| capnp::Error::failed("an answer to no call".into()))?;
        tell(reply, Ok(Answer::Among(message.clone(), place)));
    }
    if answers.has_rest() { answers.get_rest().map(Some) } else { Ok(None) }
}

/// The answer to a call, waited for while anybody waits for one of `replies`. After that the call is given up, of which its node
/// is told. It may be that nothing else would end it: where a connection was left that is dead without a sign, no answer and no
/// failure comes any more.
async fn while_wanted<T>(replies: &mut [Option<Reply>], answer: impl Future<Output = T>) -> Option<T> {
    let nobody = async {
        for reply in replies.iter_mut().flatten() {
            reply.closed().await;
        }
    };
    tokio::select! {
        biased;
        answer = answer => Some(answer),
        () = nobody => None,
    }
}

fn tell(reply: Reply, answer: Result<Answer, capnp::Error>) {
    if reply.send(answer).is_err() {
        tracing::trace!("nobody waits for the answer to a call any more");
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use bytes::Bytes;
    use tokio::task::{LocalSet, yield_now};

    use super::*;

    /// A node that answers a request with the number of its shard, as the version that was written.
    #[derive(Default)]
    struct Fake {
        /// Requests in each message so far; 0: it was a `batch`.
        messages: RefCell<Vec<usize>>,
        /// Answers are held back while this is true.
        silent: Cell<bool>,
        /// The answers to shards above this come later, each in a message of its own.
        soon: Cell<u64>,
        /// Calls that it works on.
        working: Cell<usize>,
    }

    /// A call that it works on, until it has ended or was given up.
    struct Work(Rc<Fake>);

    impl Work {
        fn begin(on: &Rc<Fake>) -> Work {
            on.working.set(on.working.get() + 1);
            Work(on.clone())
        }
    }

    impl Drop for Work {
        fn drop(&mut self) {
            self.0.working.set(self.0.working.get() - 1);
        }
    }

    fn answer(shard: u64, response: batch_response::Builder<'_>) {
        response.init_results(1).get(0).set_written(shard);
    }

    struct Node(Rc<Fake>);
    struct Rest(RefCell<Vec<(u32, u64)>>);

    impl Fake {
        /// Waits until it has so many messages.
        async fn sent(&self, messages: usize) {
            while self.messages.borrow().len() < messages {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }

        /// Waits until it works on so many.
        async fn works_on(&self, calls: usize) {
            while self.working.get() != calls {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }

        async fn patience(&self) {
            while self.silent.get() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
    }

    fn some(of: Vec<(u32, u64)>, soon: usize, mut to: answers::Builder<'_>) {
        let mut list = to.reborrow().init_list(soon as u32);
        for (at, (request, shard)) in (0..).zip(&of[..soon]) {
            let mut to = list.reborrow().get(at);
            to.set_request(*request);
            answer(*shard, to.init_response());
        }
        if soon < of.len() {
            to.set_rest(capnp_rpc::new_client(Rest(RefCell::new(of[soon..].to_vec()))));
        }
    }

    impl kv::Server for Node {
        async fn batch(
            self: Rc<Self>,
            params: kv::BatchParams,
            mut results: kv::BatchResults,
        ) -> Result<(), capnp::Error> {
            self.0.messages.borrow_mut().push(0);
            let _work = Work::begin(&self.0);
            self.0.patience().await;
            answer(params.get()?.get_request()?.get_shard(), results.get().init_response());
            Ok(())
        }

        async fn gather(
            self: Rc<Self>,
            params: kv::GatherParams,
            mut results: kv::GatherResults,
        ) -> Result<(), capnp::Error> {
            let requests = params.get()?.get_requests()?;
            self.0.messages.borrow_mut().push(requests.len() as usize);
            let _work = Work::begin(&self.0);
            self.0.patience().await;
            let mut of: Vec<(u32, u64)> = (0..).zip(requests.iter().map(|r| r.get_shard())).collect();
            if of.iter().any(|(_, shard)| *shard == 0) {
                return Err(capnp::Error::overloaded("no".into()));
            }
            let soon = self.0.soon.get();
            // The last of them first.
            of.sort_by_key(|(request, shard)| (*shard > soon, u32::MAX - request));
            let soon = of.iter().filter(|(_, shard)| *shard <= soon).count();
            some(of, soon, results.get().init_answers());
            Ok(())
        }
    }

    impl rest::Server for Rest {
        async fn next(
            self: Rc<Self>,
            _: rest::NextParams,
            mut results: rest::NextResults,
        ) -> Result<(), capnp::Error> {
            some(self.0.take(), 1, results.get().init_answers());
            Ok(())
        }
    }

    fn start() -> (Rc<Fake>, Rc<Gatherer>) {
        let fake = Rc::new(Fake { soon: Cell::new(u64::MAX), ..Fake::default() });
        let kv = capnp_rpc::new_client(Node(fake.clone()));
        (fake.clone(), Gatherer::new(kv, true))
    }

    /// A call that comes to the version written, or the kind of its failure.
    fn call(
        gatherer: &Rc<Gatherer>,
        shard: u64,
        bytes: usize,
    ) -> impl Future<Output = Result<u64, capnp::ErrorKind>> + use<> {
        let sent = gatherer.send(Request {
            shard: ShardId(shard),
            range_version: 1,
            timeout_ms: 1,
            forwarded: false,
            session: None,
            operations: vec![(0, Operation::Get(Bytes::from_static(b"k")))],
            bytes,
        });
        async {
            let answer = sent.await.map_err(|error| error.kind)?;
            let response = answer.response().expect("a response");
            let Ok(batch_response::Results(Ok(results))) = response.which() else { panic!("no results") };
            match results.get(0).which() {
                Ok(crate::schema::kv_capnp::op_result::Written(version)) => Ok(version),
                _ => panic!("another result"),
            }
        }
    }

    #[tokio::test]
    async fn calls_of_one_pass_share_a_message_and_each_has_its_answer() {
        let (fake, gatherer) = start();
        let calls = async {
            assert_eq!(call(&gatherer, 7, 1).await, Ok(7));
            fake.soon.set(3);
            let mut all: Vec<_> = (1..=6).map(|shard| call(&gatherer, shard, 1)).collect();
            // Great ones go alone.
            all.push(call(&gatherer, 8, CALL_BYTES_MIN));
            drop(all.remove(1));
            let answers = futures_util::future::join_all(all).await;
            assert_eq!(answers, [1, 3, 4, 5, 6, 8].map(Ok));
            fake.messages.borrow_mut().sort_unstable();
            assert_eq!(*fake.messages.borrow(), [0, 0, 5], "who is gone isn't sent");
            // A failure is that of each; one that comes later isn't touched by it.
            let failed = tokio::join!(call(&gatherer, 0, 1), call(&gatherer, 1, 1));
            assert_eq!(failed, (Err(capnp::ErrorKind::Overloaded), Err(capnp::ErrorKind::Overloaded)));
            assert_eq!(call(&gatherer, 9, 1).await, Ok(9));
        };
        LocalSet::new().run_until(calls).await;
    }

    #[tokio::test]
    async fn calls_wait_for_messages_under_way_but_not_for_long() {
        let (fake, gatherer) = start();
        let calls = async {
            fake.silent.set(true);
            let mut all = Vec::new();
            let begun = Instant::now();
            for shard in 1..=GATHERS_PER_NODE_MAX as u64 {
                all.push(call(&gatherer, shard, 1));
                while fake.messages.borrow().len() < shard as usize {
                    yield_now().await;
                }
            }
            let last = GATHERS_PER_NODE_MAX as u64 + 3;
            all.extend((GATHERS_PER_NODE_MAX as u64 + 1..=last).map(|shard| call(&gatherer, shard, 1)));
            for _ in 0..20 {
                yield_now().await;
            }
            let sent = fake.messages.borrow().len();
            // On a machine that has much to do that took longer than they wait.
            if begun.elapsed() < Duration::from_millis(GATHER_HOLD_MS) {
                assert_eq!(sent, GATHERS_PER_NODE_MAX, "they wait");
            }
            fake.sent(GATHERS_PER_NODE_MAX + 1).await;
            assert_eq!(fake.messages.borrow()[GATHERS_PER_NODE_MAX..], [3], "nobody answers, and they leave");
            fake.silent.set(false);
            let answers = futures_util::future::join_all(all).await;
            assert_eq!(answers, (1..=last).map(Ok).collect::<Vec<_>>());
        };
        LocalSet::new().run_until(calls).await;
    }

    #[tokio::test]
    async fn calls_dont_wait_for_messages_that_take_long() {
        let (fake, gatherer) = start();
        let calls = async {
            fake.silent.set(true);
            let mut all = Vec::new();
            for shard in 1..=GATHERS_PER_NODE_MAX as u64 {
                all.push(call(&gatherer, shard, 1));
                fake.sent(shard as usize).await;
            }
            tokio::time::sleep(Duration::from_millis(CALL_GATHER_MS)).await;
            all.push(call(&gatherer, 9, 1));
            for _ in 0..20 {
                yield_now().await;
            }
            assert_eq!(fake.messages.borrow().len(), GATHERS_PER_NODE_MAX + 1);
        };
        LocalSet::new().run_until(calls).await;
    }

    #[tokio::test]
    async fn what_nobody_waits_for_any_more_is_given_up() {
        let (fake, gatherer) = start();
        let calls = async {
            fake.silent.set(true);
            let alone = call(&gatherer, 1, 1);
            fake.sent(1).await;
            let great = call(&gatherer, 2, CALL_BYTES_MIN);
            let (third, fourth) = (call(&gatherer, 3, 1), call(&gatherer, 4, 1));
            fake.sent(3).await;
            assert_eq!(fake.working.get(), 3);
            drop((alone, great, third));
            fake.works_on(1).await;
            for _ in 0..20 {
                yield_now().await;
            }
            assert_eq!(fake.working.get(), 1, "one of those that left together is waited for");
            drop(fourth);
            fake.works_on(0).await;
            assert!(gatherer.state.borrow().under_way.is_empty());
        };
        LocalSet::new().run_until(calls).await;
    }

    #[tokio::test]
    async fn a_node_that_takes_one_batch_at_a_time_is_sent_that() {
        let (fake, gatherer) = start();
        let gatherer = Gatherer::new(gatherer.kv.clone(), false);
        let calls = async {
            let answers = tokio::join!(call(&gatherer, 1, 1), call(&gatherer, 2, 1));
            assert_eq!(answers, (Ok(1), Ok(2)));
            assert_eq!(*fake.messages.borrow(), [0, 0]);
        };
        LocalSet::new().run_until(calls).await;
    }
}
