//! Calls to nodes: a batch of operations to one shard, a page of a scan, administration.

use std::rc::Rc;
use std::time::{Duration, Instant};

use super::connection::{Connection, Watch};
use super::driver::{Driver, moment};
use super::gather::{Answer, Request};
use super::retry::{self, Attempts, Decision, Failure, Kind};
use super::routing::Target;
use super::session::{Moment, Session};
use super::ticket::{Deadline, Ticket};
use super::{ClientError, wire};
use crate::codec::records::read_delta;
use crate::ids::ShardId;
use crate::limits::{ATTEMPT_BYTES_PER_MS, ATTEMPT_MS_MAX};
use crate::refusal::Refusal;
use crate::schema::kv_capnp::batch_response;
use crate::schema::types_capnp::map_delta;

/// The time a node is given for one attempt that carries so many bytes.
fn patience(bytes: usize) -> Duration {
    Duration::from_millis(ATTEMPT_MS_MAX + bytes as u64 / ATTEMPT_BYTES_PER_MS)
}

/// The deadline that a node is told: a little before our own, so that its answer, which knows more, is
/// still heard.
pub(super) fn told(patience: Duration) -> u32 {
    let ms = (patience - patience / 10).as_millis().max(1);
    u32::try_from(ms).unwrap_or(u32::MAX)
}

impl Driver {
    /// Sends a batch to the leader of `shard` and sees to each operation's end.
    pub async fn call(self: &Rc<Driver>, shard: ShardId, mut batch: Vec<Ticket>) {
        let bytes = batch.iter().map(|t| t.operation.size()).sum();
        let Some(target) = self.routing.borrow().target(shard) else {
            self.refresh_soon();
            let why = format!("no node of shard {shard} is known");
            return self.fail_all(batch, &Failure::NotSent(why));
        };
        // A node that hangs accepts connections, and welcomes nobody.
        let limit = match self.routing.borrow().has_others(shard, target.node) {
            true => self.pool.slow_at(&target.address),
            false => Instant::now() + patience(0),
        };
        let dialled = self.connect(&target, true);
        let connection =
            match within(&mut batch, limit, None, || format!("connecting to {}", target.address), dialled)
                .await
            {
                Waited::Done(Ok(connection)) => connection,
                Waited::Done(Err(why)) => {
                    self.unreachable(shard, &target, &why);
                    return self.fail_all(batch, &Failure::NotSent(why));
                }
                // Nobody waits any more; that says nothing about the node.
                Waited::Nobody => return,
                Waited::Over | Waited::Gone => {
                    let why = format!("{}: no welcome yet", target.address);
                    self.slow(shard, &target, &why);
                    return self.fail_all(batch, &Failure::NotSent(why));
                }
            };
        batch.retain(Ticket::open);
        let sent = moment();
        self.drop_outlived(&mut batch, sent);
        if batch.is_empty() {
            return;
        }
        let now = Instant::now();
        let longest = batch.iter().map(|t| t.deadline.left(now)).max();
        let patience = patience(bytes).min(longest.unwrap_or_default());
        let promise = self.send_batch(&connection, shard, patience, bytes, &mut batch);
        let waiting = || format!("node {} at {} did not answer in time", target.node, target.address);
        // What may not be repeated is waited for while there is hope.
        let repeatable = batch.iter().all(|ticket| ticket.kind != Kind::Once);
        let watch = connection.watch(bytes);
        let watching = repeatable.then_some(&watch);
        let answer = within(&mut batch, now + patience, watching, waiting, promise).await;
        let silent = watch.silent();
        drop(watch);
        let outcome = match answer {
            Waited::Done(Ok(answer)) => match answer.response() {
                Ok(response) => return self.answered(shard, &target, batch, sent, response),
                Err(error) => Failure::Lost(unreadable(&target, &error)),
            },
            Waited::Done(Err(error)) => call_failure(&target, &error),
            // That nobody waits any more says nothing about the node; a long silence does.
            Waited::Nobody if !silent => return,
            Waited::Nobody | Waited::Over => self.silence(&connection, &target, now, false),
            Waited::Gone => self.silence(&connection, &target, now, true),
        };
        self.unreachable(shard, &target, &outcome.text());
        self.fail_all(batch, &outcome);
    }

    /// Takes out the commands whose session the shard may have forgotten, and treats them as if it had
    /// said so. Deadlines are much shorter than that; but their clock may stand still while the machine
    /// sleeps, and a session that this call would begin anew knows of no earlier attempt.
    fn drop_outlived(self: &Rc<Driver>, batch: &mut Vec<Ticket>, now: Moment) {
        let outlived = |ticket: &mut Ticket| ticket.tag.as_ref().is_some_and(|tag| !tag.holds(now));
        let outlived: Vec<Ticket> = batch.extract_if(.., outlived).collect();
        if !outlived.is_empty() {
            self.fail_all(outlived, &Failure::Refused(Refusal::SessionExpired));
        }
    }

    fn send_batch(
        &self,
        connection: &Connection,
        shard: ShardId,
        patience: Duration,
        bytes: usize,
        batch: &mut [Ticket],
    ) -> impl Future<Output = Result<Answer, capnp::Error>> + use<> {
        let session = session_of(batch).map(Session::header);
        let operations = batch.iter_mut().map(|ticket| {
            ticket.sent = true;
            (ticket.tag.as_ref().map_or(0, |tag| tag.sequence()), ticket.operation.clone())
        });
        let operations = operations.collect();
        connection.batches.send(Request {
            shard,
            // All tickets of a batch carry the version under which the batch was made up.
            range_version: batch.first().map_or(0, |t| t.range_version),
            timeout_ms: told(patience),
            forwarded: self.setup.forwarded,
            session,
            operations,
            bytes,
        })
    }

    /// Takes in the answer to a batch that left at `sent`.
    fn answered(
        self: &Rc<Driver>,
        shard: ShardId,
        target: &Target,
        mut batch: Vec<Ticket>,
        sent: Moment,
        response: batch_response::Reader<'_>,
    ) {
        if response.has_route() {
            self.take_route(response.get_route(), &target.address);
        }
        let results = match response.which() {
            Ok(batch_response::Results(Ok(results))) if results.len() as usize == batch.len() => results,
            Ok(batch_response::Error(Ok(error))) => {
                let refusal = crate::codec::refusal::read_refusal(error);
                let refusal = self.refused(shard, target, refusal);
                return self.fail_all(batch, &Failure::Refused(refusal));
            }
            Ok(batch_response::Results(Err(e)) | batch_response::Error(Err(e))) => {
                let why = unreadable(target, &e);
                return self.fail_all(batch, &Failure::Lost(why));
            }
            Ok(batch_response::Results(Ok(results))) => {
                let counts = format!("{} results for {} operations", results.len(), batch.len());
                let why = unreadable(target, &counts);
                return self.fail_all(batch, &Failure::Lost(why));
            }
            Err(not_in_schema) => {
                let why = unreadable(target, &not_in_schema);
                return self.fail_all(batch, &Failure::Lost(why));
            }
        };
        let (mut succeeded, mut refusal) = (false, None);
        let mut failures = Vec::new();
        for (mut ticket, result) in batch.drain(..).zip(results.iter()) {
            match wire::read_result(&ticket.operation, result) {
                Ok(Ok(result)) => {
                    succeeded = true;
                    // It went through the session's table.
                    if let Some(tag) = &ticket.tag {
                        tag.session().proved(sent);
                    }
                    ticket.answer(Ok(result));
                }
                Ok(Err(refused)) => {
                    refusal.get_or_insert_with(|| refused.clone());
                    failures.push((ticket, Failure::Refused(refused)));
                }
                Err(error) => {
                    failures.push((ticket, Failure::Lost(unreadable(target, &error))));
                }
            }
        }
        if let Some(refusal) = refusal {
            self.refused(shard, target, refusal);
        } else if succeeded {
            self.routing.borrow_mut().succeeded(shard, target.node);
        }
        if !failures.is_empty() {
            self.failed(failures);
        }
    }

    fn fail_all(self: &Rc<Driver>, batch: Vec<Ticket>, failure: &Failure) {
        let batch = batch.into_iter().filter(Ticket::open);
        self.failed(batch.map(|ticket| (ticket, failure.clone())).collect());
    }

    /// One page of one shard of a scan.
    pub async fn scan_page(
        self: &Rc<Driver>,
        shard: ShardId,
        range_version: u64,
        page: &PageRequest,
        patience: Duration,
    ) -> Result<wire::Page, Failure> {
        let (target, connection) = self.leader(shard).await?;
        let mut call = connection.kv.scan_request();
        let mut request = call.get().init_request();
        request.set_shard(shard.0);
        request.set_range_version(range_version);
        request.set_prefix(&page.prefix);
        request.set_after(&page.after);
        request.set_limit(page.limit);
        request.set_keys_only(page.keys_only);
        request.set_timeout_ms(told(patience));
        let answer = self.attempt(shard, &connection, &target, patience, call.send().promise).await?;
        let read = |error: &dyn std::fmt::Display| Failure::Lost(unreadable(&target, error));
        let response = answer.get().and_then(|a| a.get_response());
        let response = response.map_err(|e| read(&e))?;
        if response.has_route() {
            self.take_route(response.get_route(), &target.address);
        }
        match wire::read_page(response).map_err(|e| read(&e))? {
            Ok(page) => {
                self.routing.borrow_mut().succeeded(shard, target.node);
                Ok(page)
            }
            Err(refusal) => Err(Failure::Refused(self.refused(shard, &target, refusal))),
        }
    }

    /// The believed leader of a shard and a connection to it.
    pub async fn leader(self: &Rc<Driver>, shard: ShardId) -> Result<(Target, Rc<Connection>), Failure> {
        let target = self.routing.borrow().target(shard);
        let Some(target) = target else {
            self.refresh_soon();
            let why = format!("no node of shard {shard} is known");
            return Err(Failure::NotSent(why));
        };
        let dialled = self.connect(&target, true);
        let others = self.routing.borrow().has_others(shard, target.node);
        let dialled = match others {
            true => tokio::time::timeout_at(self.pool.slow_at(&target.address).into(), dialled).await,
            false => Ok(dialled.await),
        };
        let Ok(dialled) = dialled else {
            let why = format!("{}: no welcome yet", target.address);
            self.slow(shard, &target, &why);
            return Err(Failure::NotSent(why));
        };
        match dialled {
            Ok(connection) => Ok((target, connection)),
            Err(why) => {
                self.unreachable(shard, &target, &why);
                Err(Failure::NotSent(why))
            }
        }
    }

    /// Waits for the answer of a node to a call about a shard.
    pub async fn attempt<T>(
        self: &Rc<Driver>,
        shard: ShardId,
        connection: &Rc<Connection>,
        target: &Target,
        patience: Duration,
        promise: impl Future<Output = Result<T, capnp::Error>>,
    ) -> Result<T, Failure> {
        let began = Instant::now();
        let watch = connection.watch(0);
        let failure = match tokio::time::timeout(patience, watch.answer(promise)).await {
            Ok(Some(Ok(answer))) => return Ok(answer),
            Ok(Some(Err(error))) => call_failure(target, &error),
            Ok(None) => self.silence(connection, target, began, true),
            Err(_) => self.silence(connection, target, began, false),
        };
        self.unreachable(shard, target, &failure.text());
        Err(failure)
    }

    /// A connection to the node that `target` names; another node at its address won't do.
    async fn connect(self: &Rc<Driver>, target: &Target, patient: bool) -> Result<Rc<Connection>, String> {
        let connection = self.pool.get(&target.address, patient).await;
        let connection = connection.map_err(|why| why.to_string())?;
        let ours = self.routing.borrow().map().cluster_id;
        if connection.node != target.node || connection.cluster_id != ours {
            self.pool.discard(&connection);
            return Err(format!(
                "{} is node {} of cluster {}, not node {}",
                target.address, connection.node, connection.cluster_id, target.node
            ));
        }
        Ok(connection)
    }

    /// No answer came in time, or the node is `gone`.
    fn silence(&self, connection: &Rc<Connection>, target: &Target, began: Instant, gone: bool) -> Failure {
        self.pool.unanswered(connection, began, gone);
        Failure::Lost(format!(
            "node {} at {} did not answer within {} ms",
            target.node,
            target.address,
            began.elapsed().as_millis()
        ))
    }

    /// The node doesn't welcome as fast as others may: they are asked meanwhile. It is dialled on, and may
    /// be far away rather than hung, so nothing is held against it.
    fn slow(self: &Rc<Driver>, shard: ShardId, target: &Target, why: &str) {
        let mut routing = self.routing.borrow_mut();
        routing.trouble(shard, target.node, why, Instant::now());
        routing.unavailable(shard, target.node);
        drop(routing);
        self.refresh_soon();
    }

    fn unreachable(self: &Rc<Driver>, shard: ShardId, target: &Target, why: &str) {
        let now = Instant::now();
        let mut routing = self.routing.borrow_mut();
        routing.trouble(shard, target.node, why, now);
        routing.unreachable(shard, target.node, now);
        drop(routing);
        // Its address may have changed.
        self.refresh_soon();
    }

    /// Corrects the routes by a refusal of a whole call. The refusal, or what it means with those of other
    /// nodes.
    pub fn refused(self: &Rc<Driver>, shard: ShardId, target: &Target, refusal: Refusal) -> Refusal {
        let (mut routing, now) = (self.routing.borrow_mut(), Instant::now());
        match &refusal {
            Refusal::NotLeader { leader, .. } => {
                let says = match leader {
                    Some(leader) => format!("it follows node {leader}"),
                    None => "it knows no leader".to_owned(),
                };
                routing.trouble(shard, target.node, &says, now);
                routing.not_leader(shard, target.node, *leader, now);
            }
            Refusal::StaleRoute { asked, range_version, .. } => {
                // A node that knows the shard better than we do is the right one to ask again; one that has no
                // replica of it (any more) isn't.
                let elsewhere = *range_version == 0 || range_version < asked;
                if elsewhere {
                    routing.unavailable(shard, target.node);
                }
                let healed = routing.range_version(shard) >= Some(*range_version);
                drop(routing);
                if !healed || elsewhere {
                    self.refresh_soon();
                }
            }
            Refusal::Unavailable(_) | Refusal::Unknown(_) => {
                routing.trouble(shard, target.node, &refusal.to_string(), now);
                routing.unavailable(shard, target.node);
            }
            Refusal::Quarantined(reason) => {
                routing.trouble(shard, target.node, &refusal.to_string(), now);
                let all = routing.quarantined(shard, target.node, now);
                if all {
                    return Refusal::ShardQuarantined(reason.clone());
                }
            }
            Refusal::Other { retryable, .. } if *retryable => {
                routing.trouble(shard, target.node, &refusal.to_string(), now);
                routing.unavailable(shard, target.node);
            }
            _ => (),
        }
        refusal
    }

    pub(super) fn take_route(&self, route: capnp::Result<map_delta::Reader<'_>>, address: &str) {
        let learned = match route.map(read_delta) {
            Ok(Ok(delta)) => self.learn(delta, address),
            Ok(Err(error)) => Err(error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        if let Err(error) = learned {
            tracing::debug!(address, error, "a node attached a route that is of no use");
        }
    }
}

/// What to ask of a shard in a scan.
#[derive(Clone, Debug)]
pub(super) struct PageRequest {
    pub prefix: bytes::Bytes,
    pub after: bytes::Bytes,
    pub limit: u32,
    pub keys_only: bool,
}

/// Repeats `attempt`, which is given the time it may take, until it succeeds or `deadline` passes. The
/// error tells how the last attempt ended that did.
pub(super) async fn persist<T, F>(
    kind: Kind,
    deadline: Deadline,
    mut attempt: impl FnMut(Duration) -> F,
) -> Result<T, ClientError>
where
    F: Future<Output = Result<T, Failure>>,
{
    let mut attempts = Attempts::default();
    let mut last = "no answer in the time given".to_owned();
    loop {
        let left = deadline.left(Instant::now());
        let tried = tokio::time::timeout(left, attempt(left)).await;
        let failure = match tried {
            Ok(Ok(done)) => return Ok(done),
            Ok(Err(failure)) => failure,
            Err(_) => Failure::Lost(last.clone()),
        };
        last = failure.text();
        let left = deadline.left(Instant::now());
        match retry::decide(kind, &mut attempts, failure, left, deadline.within, rand::random()) {
            Decision::Fail(error) => return Err(error),
            Decision::Retry(after) | Decision::Renew(after) => tokio::time::sleep(after).await,
        }
    }
}

/// What came of waiting.
enum Waited<T> {
    /// What was waited for.
    Done(T),
    /// The time was over.
    Over,
    /// The node is gone, as far as one can tell.
    Gone,
    /// Nobody waits for the operations any more.
    Nobody,
}

/// Waits for `future` until `limit`, or until the node that is watched is gone; and meanwhile answers
/// operations whose own time is over.
async fn within<T>(
    batch: &mut [Ticket],
    limit: Instant,
    watch: Option<&Watch>,
    waiting: impl Fn() -> String,
    future: impl Future<Output = T>,
) -> Waited<T> {
    let mut future = std::pin::pin!(future);
    loop {
        let open = batch.iter().filter(|t| t.open());
        let Some(earliest) = open.map(|t| t.deadline.at).min() else {
            return Waited::Nobody;
        };
        let Some(look) = watch.map_or(Some(limit), Watch::look) else {
            return Waited::Gone;
        };
        let next = earliest.min(limit).min(look);
        if let Ok(done) = tokio::time::timeout_at(next.into(), &mut future).await {
            return Waited::Done(done);
        }
        let now = Instant::now();
        if earliest <= now {
            let why = waiting();
            batch.iter_mut().for_each(|ticket| ticket.expire(now, &why));
        }
        if now >= limit {
            return Waited::Over;
        }
        if look <= now {
            // This process may have been stopped too: what came meanwhile is read first.
            tokio::task::yield_now().await;
        }
    }
}

/// The session that the commands of a batch share, if it has any.
fn session_of(batch: &[Ticket]) -> Option<&Session> {
    let tag = batch.iter().find_map(|ticket| ticket.tag.as_ref())?;
    Some(tag.session())
}

/// What a failed call means.
fn call_failure(target: &Target, error: &capnp::Error) -> Failure {
    let text = format!("node {} at {}: {error}", target.node, target.address);
    match error.kind {
        // The other side doesn't know the method, so it can't have executed it.
        capnp::ErrorKind::Unimplemented => Failure::NotSent(text),
        _ => Failure::Lost(text),
    }
}

fn unreadable(target: &Target, error: &dyn std::fmt::Display) -> String {
    format!("node {} at {} gave an unreadable answer: {error}", target.node, target.address)
}
