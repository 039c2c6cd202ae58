//! The services `Gate` and `Kv`.

use std::borrow::Cow;
use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::gather::Gathered;
use super::wire::{self, Room};
use super::{SOFTWARE, Service, admin, timeout};
use crate::client::{self, ClientError, OperationResult};
use crate::codec::refusal::write_refusal;
use crate::codec::trace::write_trace;
use crate::group::types::{Operation, Output};
use crate::ids::{METADATA_SHARD, ShardId};
use crate::limits::{
    BATCH_OPERATIONS_MAX, GATHER_REQUESTS_MAX, KEY_BYTES_MAX, MAP_CUT_OFF_MS, MAP_NEWS_JITTER_MS,
    MAP_NEWS_MS, MAP_WATCH_DEFAULT_MS, MAP_WATCH_MS_MAX, MAP_WATCHES_MAX, SCAN_PAIRS_MAX,
};
use crate::machine::command::{Answer, KvReply, Query, Reply};
use crate::node::load::Admitted;
use crate::node::trace::Sheet;
use crate::placement::ring;
use crate::refusal::{Outcome, Refusal};
use crate::schema::kv_capnp::{batch_request, batch_response, gate, kv, op_result, scan_request};
use crate::transport::backlog::Backlog;
use crate::version::{FEATURE_GATHER, PROTOCOL_MAX, PROTOCOL_MIN};

/// The door: versions first, then the services.
pub(crate) struct Gate {
    service: Rc<Service>,
    backlog: Rc<Backlog>,
    watches: Rc<Cell<usize>>,
}

impl Gate {
    /// Of a connection with this backlog.
    pub(crate) fn new(service: Rc<Service>, backlog: Rc<Backlog>) -> Gate {
        Gate { service, backlog, watches: Rc::default() }
    }
}

impl gate::Server for Gate {
    async fn open(
        self: Rc<Self>,
        params: gate::OpenParams,
        mut results: gate::OpenResults,
    ) -> Result<(), capnp::Error> {
        let hello = params.get()?.get_hello()?;
        let asked = hello.get_protocol()?;
        let (min, max) = (asked.get_min(), asked.get_max());
        let version = max.min(PROTOCOL_MAX);
        if min > max || version < min.max(PROTOCOL_MIN) {
            return Err(capnp::Error::failed(format!(
                "no shared protocol version: you speak {min} to {max}, this node {PROTOCOL_MIN} to \
                 {PROTOCOL_MAX} ({SOFTWARE}); upgrade the older side"
            )));
        }
        let software = hello.get_software()?.to_string().unwrap_or_default();
        tracing::debug!(software, version, "a client opened the gate");
        let node = &self.service.node;
        let mut answer = results.get();
        let mut welcome = answer.reborrow().init_welcome();
        welcome.set_protocol(version);
        welcome.set_cluster_id(&node.map().cluster_id.0);
        welcome.set_node(node.node().0);
        welcome.set_software(SOFTWARE);
        welcome.init_features(1).set(0, FEATURE_GATHER);
        let (service, backlog) = (self.service.clone(), self.backlog.clone());
        let kv = Kv { service, backlog, watches: self.watches.clone(), answered: Cell::default() };
        answer.set_kv(capnp_rpc::new_client(kv));
        let service = self.service.clone();
        answer.set_admin(capnp_rpc::new_client(admin::Admin::new(service)));
        Ok(())
    }
}

/// Data.
pub(super) struct Kv {
    service: Rc<Service>,
    /// Answers that this connection hasn't read.
    pub(super) backlog: Rc<Backlog>,
    /// Its calls that wait for a newer map.
    watches: Rc<Cell<usize>>,
    /// When the last such call was answered.
    answered: Cell<Option<Instant>>,
}

/// When a call that waited for a newer map is answered, now that there is one: not soon after the `last` answer on that
/// connection, so that changes which come one upon the other are told together, and not at the moment of all others.
/// `is_old`: there was a newer one when it came; then it is alone with that, and isn't held back for the others.
fn due(now: Instant, last: Option<Instant>, is_old: bool, dice: u64) -> Instant {
    let next = last.map(|last| last + Duration::from_millis(MAP_NEWS_MS)).filter(|next| *next > now);
    if next.is_none() && is_old {
        return now;
    }
    next.unwrap_or(now) + Duration::from_millis(dice % (MAP_NEWS_JITTER_MS + 1))
}

/// A call that waits for a newer map, until its end, however that comes.
struct MapWatch(Rc<Cell<usize>>);

impl MapWatch {
    /// `None`: too many wait on that connection.
    fn begin(watches: &Rc<Cell<usize>>) -> Option<MapWatch> {
        if watches.get() >= MAP_WATCHES_MAX {
            return None;
        }
        watches.set(watches.get() + 1);
        Some(MapWatch(watches.clone()))
    }
}

impl Drop for MapWatch {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

/// A batch as read from the message: what goes to the replica, and what is refused before.
pub(super) struct Batch {
    shard: ShardId,
    range_version: u64,
    timeout_ms: u32,
    /// One per operation: the reason why it isn't handed on, if it isn't.
    refused: Vec<Option<Refusal>>,
    operations: Vec<Operation>,
    bytes: usize,
}

/// What came of a batch.
pub(super) struct Ended {
    shard: ShardId,
    refused: Vec<Option<Refusal>>,
    /// Of those that weren't refused before; or what holds for all.
    ends: Result<Vec<Result<Output, Refusal>>, Refusal>,
    sheet: Option<Arc<Sheet>>,
}

impl Ended {
    /// Of the values that its answer is to bring.
    pub(super) fn value_bytes(&self) -> usize {
        let ends = self.ends.iter().flatten().flatten();
        let values = ends.filter_map(|output| match output {
            Output::Answer(Answer::Value(value)) => value.as_ref(),
            Output::Reply(Reply::Kv(KvReply::Mismatch(there))) => there.as_ref(),
            _ => None,
        });
        values.map(|versioned| versioned.value.len()).sum()
    }
}

impl kv::Server for Kv {
    async fn map(
        self: Rc<Self>,
        params: kv::MapParams,
        mut results: kv::MapResults,
    ) -> Result<(), capnp::Error> {
        let since = params.get()?.get_since();
        let node = &self.service.node;
        let news = self.service.news.since(&node.map(), since);
        let mut answer = results.get();
        answer.set_delta(news.get()?)?;
        answer.set_cut_off(node.is_cut_off());
        Ok(())
    }

    async fn watch_map(
        self: Rc<Self>,
        params: kv::WatchMapParams,
        mut results: kv::WatchMapResults,
    ) -> Result<(), capnp::Error> {
        let (since, ms) = (params.get()?.get_since(), params.get()?.get_timeout_ms());
        drop(params);
        let within = Duration::from_millis(match u64::from(ms) {
            0 => MAP_WATCH_DEFAULT_MS,
            ms => ms.min(MAP_WATCH_MS_MAX),
        });
        let Some(_watch) = MapWatch::begin(&self.watches) else {
            return Err(capnp::Error::overloaded(format!(
                "{MAP_WATCHES_MAX} calls of this connection wait for a newer map already"
            )));
        };
        let node = &self.service.node;
        let until = Instant::now() + within;
        let is_old = node.map().version > since;
        let cut_off = async {
            tokio::time::sleep(Duration::from_millis(MAP_CUT_OFF_MS)).await;
            node.cut_off().await;
        };
        tokio::select! {
            _ = node.map_after(since) => {
                let due = due(Instant::now(), self.answered.get(), is_old, rand::random());
                tokio::time::sleep_until(due.min(until).into()).await;
            }
            () = cut_off => {}
            () = tokio::time::sleep_until(until.into()) => {}
        }
        self.answered.set(Some(Instant::now()));
        // Whatever has come meanwhile goes along.
        let news = self.service.news.since(&node.map(), since);
        let mut answer = results.get();
        answer.set_delta(news.get()?)?;
        answer.set_cut_off(node.is_cut_off());
        Ok(())
    }

    async fn batch(
        self: Rc<Self>,
        params: kv::BatchParams,
        mut results: kv::BatchResults,
    ) -> Result<(), capnp::Error> {
        let request = params.get()?.get_request()?;
        let sheet = request.get_trace().then(|| Sheet::begin(Instant::now()));
        let batch = self.read_batch(request)?;
        // The request's memory is not needed while the operations run.
        drop(params);
        let ended = self.run(batch, sheet).await;
        self.write_end(ended, &mut Room::on(&self.backlog), results.get().init_response());
        Ok(())
    }

    async fn gather(
        self: Rc<Self>,
        params: kv::GatherParams,
        mut results: kv::GatherResults,
    ) -> Result<(), capnp::Error> {
        let batches = self.read_gather(params.get()?.get_requests()?)?;
        drop(params);
        let mut gathered = Gathered::begin(&self, batches);
        gathered.wait().await;
        gathered.write(results.get().init_answers());
        Ok(())
    }

    async fn scan(
        self: Rc<Self>,
        params: kv::ScanParams,
        mut results: kv::ScanResults,
    ) -> Result<(), capnp::Error> {
        let node = &self.service.node;
        let request = params.get()?.get_request()?;
        let shard = ShardId(request.get_shard());
        let (version, within) = (request.get_range_version(), timeout(request.get_timeout_ms()));
        let query = read_scan(request)?;
        drop(params);
        let answer = match (query, self.service.load.enter(1, 0)) {
            (Ok(query), Ok(guard)) => {
                let (operations, admitted) = (vec![Operation::Query(query)], Some(guard.admitted()));
                let ends = node.submit_admitted(shard, version, operations, within, admitted, None).await;
                ends.and_then(|ends| ends.into_iter().next().unwrap_or(Err(NO_ANSWER)))
            }
            (Err(refusal), _) | (_, Err(refusal)) => Err(refusal),
        };
        let mut response = results.get().init_response();
        match answer {
            Ok(Output::Answer(Answer::Page { .. })) if self.backlog.full() => {
                write_refusal(&wire::unread(), response.init_error());
            }
            Ok(Output::Answer(Answer::Page { pairs, more })) => {
                wire::write_page(&pairs, more, response);
            }
            Ok(_) => write_refusal(&NO_ANSWER, response.init_error()),
            Err(refusal) => {
                write_refusal(&refusal, response.reborrow().init_error());
                if wire::wants_route(&refusal) {
                    wire::write_route(&node.map(), shard, response.init_route());
                }
            }
        }
        Ok(())
    }

    async fn get(
        self: Rc<Self>,
        params: kv::GetParams,
        mut results: kv::GetResults,
    ) -> Result<(), capnp::Error> {
        let request = params.get()?;
        let database = text(request.get_database()?)?;
        let operation = client::Operation::Get(copy(request.get_key()?));
        let ms = request.get_timeout_ms();
        drop(params);
        let end = self.plain(&database, operation, ms).await;
        write_plain(end, &self.backlog, results.get().init_result());
        Ok(())
    }

    async fn put(
        self: Rc<Self>,
        params: kv::PutParams,
        mut results: kv::PutResults,
    ) -> Result<(), capnp::Error> {
        let request = params.get()?;
        let database = text(request.get_database()?)?;
        let (key, value) = (copy(request.get_key()?), copy(request.get_value()?));
        let ms = request.get_timeout_ms();
        drop(params);
        let operation = client::Operation::Put(key, value);
        let end = self.plain(&database, operation, ms).await;
        write_plain(end, &self.backlog, results.get().init_result());
        Ok(())
    }

    async fn delete(
        self: Rc<Self>,
        params: kv::DeleteParams,
        mut results: kv::DeleteResults,
    ) -> Result<(), capnp::Error> {
        let request = params.get()?;
        let database = text(request.get_database()?)?;
        let operation = client::Operation::Delete(copy(request.get_key()?));
        let ms = request.get_timeout_ms();
        drop(params);
        let end = self.plain(&database, operation, ms).await;
        write_plain(end, &self.backlog, results.get().init_result());
        Ok(())
    }

    async fn cas(
        self: Rc<Self>,
        params: kv::CasParams,
        mut results: kv::CasResults,
    ) -> Result<(), capnp::Error> {
        let request = params.get()?;
        let database = text(request.get_database()?)?;
        let expect = wire::read_expect(request.get_expect()?).map_err(unreadable)?;
        let (key, value) = (copy(request.get_key()?), copy(request.get_value()?));
        let ms = request.get_timeout_ms();
        drop(params);
        let operation = client::Operation::Cas(key, expect, value);
        let end = self.plain(&database, operation, ms).await;
        write_plain(end, &self.backlog, results.get().init_result());
        Ok(())
    }
}

impl Kv {
    /// Has the replica of a batch's shard execute what is to be executed of it.
    pub(super) async fn run(&self, batch: Result<Batch, Refusal>, sheet: Option<Arc<Sheet>>) -> Ended {
        let batch = match batch {
            Ok(batch) => batch,
            Err(refusal) => {
                // It is no matter of the route, so which shard it was isn't told.
                return Ended { shard: METADATA_SHARD, refused: Vec::new(), ends: Err(refusal), sheet };
            }
        };
        let Batch { shard, range_version, timeout_ms, refused, operations, bytes } = batch;
        let ends = match self.service.load.enter(operations.len(), bytes) {
            Ok(_guard) if operations.is_empty() => Ok(Vec::new()),
            Ok(guard) => {
                let (within, admitted) = (timeout(timeout_ms), Some(guard.admitted()));
                let node = &self.service.node;
                node.submit_admitted(shard, range_version, operations, within, admitted, sheet.clone()).await
            }
            Err(refusal) => Err(refusal),
        };
        Ended { shard, refused, ends, sheet }
    }

    /// Writes the answer to a batch.
    pub(super) fn write_end(&self, ended: Ended, room: &mut Room, mut response: batch_response::Builder<'_>) {
        let Ended { shard, refused, ends, sheet } = ended;
        let map = || self.service.node.map();
        match ends {
            Ok(ends) => {
                let lost = write_ends(refused, ends, room, response.reborrow());
                if lost {
                    wire::write_route(&map(), shard, response.reborrow().init_route());
                }
                if let Some(sheet) = sheet {
                    write_trace(&sheet.end(Instant::now()), response.init_trace());
                }
            }
            Err(refusal) => {
                write_refusal(&refusal, response.reborrow().init_error());
                if wire::wants_route(&refusal) {
                    wire::write_route(&map(), shard, response.init_route());
                }
            }
        }
    }

    /// Reads and checks the batches of a call for several shards.
    fn read_gather(
        &self,
        requests: capnp::struct_list::Reader<'_, batch_request::Owned>,
    ) -> Result<Vec<Result<Batch, Refusal>>, capnp::Error> {
        let count = requests.len() as usize;
        // A list of nothing takes no bytes, however long it is: not even looked through.
        if count > GATHER_REQUESTS_MAX {
            return Err(capnp::Error::failed(format!(
                "{count} batches in one call; at most {GATHER_REQUESTS_MAX} are allowed: split it"
            )));
        }
        let mut operations = 0;
        for request in requests.iter() {
            operations += request.get_operations()?.len() as usize;
        }
        if operations > BATCH_OPERATIONS_MAX {
            return Err(capnp::Error::failed(format!(
                "{operations} operations in {count} batches in one call; at most {BATCH_OPERATIONS_MAX} are \
                 allowed: split it"
            )));
        }
        requests.iter().map(|request| self.read_batch(request)).collect()
    }

    /// Reads and checks a batch. The inner error holds for all its operations.
    fn read_batch(&self, request: batch_request::Reader<'_>) -> Result<Result<Batch, Refusal>, capnp::Error> {
        let shard = ShardId(request.get_shard());
        let list = request.get_operations()?;
        let count = list.len() as usize;
        if count > BATCH_OPERATIONS_MAX {
            return Ok(Err(Refusal::Invalid(format!(
                "the batch has {count} operations; at most {BATCH_OPERATIONS_MAX} are allowed: split it"
            ))));
        }
        if let Err(refusal) = data_shard(shard) {
            return Ok(Err(refusal));
        }
        let session = match wire::read_session(request)? {
            Ok(session) => session,
            Err(refusal) => return Ok(Err(refusal)),
        };
        let range_version = request.get_range_version();
        // The replica checks the version and not the keys. A key in the wrong shard would never be found
        // again, so a client that errs is told here, wherever the map at hand can tell.
        let map = self.service.node.map();
        let record = map.shards.get(&shard);
        let range = record.filter(|s| s.epoch.range == range_version);
        let range = range.map(|s| s.range);
        let mut batch = Batch {
            shard,
            range_version,
            timeout_ms: request.get_timeout_ms(),
            refused: Vec::with_capacity(count),
            operations: Vec::with_capacity(count),
            bytes: 0,
        };
        for operation in list.iter() {
            let tag = wire::read_tag(operation, session.as_ref());
            let operation = wire::read_operation(operation).map_err(unreadable)?;
            let misplaced = range.is_some_and(|r| !r.contains(ring::position(operation.key())));
            let refused = match (client::check(&operation), tag) {
                (Err(error), _) => Some(Refusal::Invalid(error.to_string())),
                (_, Err(refusal)) => Some(refusal),
                _ if misplaced => Some(Refusal::Invalid(format!(
                    "the key does not belong to shard {shard}; route by its position on the ring"
                ))),
                (Ok(()), Ok(tag)) => {
                    batch.bytes += operation.size();
                    batch.operations.push(wire::to_group(operation, tag));
                    None
                }
            };
            batch.refused.push(refused);
        }
        Ok(Ok(batch))
    }

    /// Runs an operation by key: here if this node leads the shard, else at the node that does.
    async fn plain(
        &self,
        database: &str,
        operation: client::Operation,
        timeout_ms: u32,
    ) -> Result<OperationResult, ClientError> {
        client::check(&operation)?;
        let refused = |refusal| ClientError::NotApplied(client::NotApplied::Refused(refusal));
        let guard = self.service.load.enter(1, operation.size());
        let guard = guard.map_err(refused)?;
        let within = timeout(timeout_ms);
        let deadline = Instant::now() + within;
        match self.here(database, &operation, within, guard.admitted()).await {
            Some(Ok(result)) => return Ok(result),
            Some(Err(refusal)) if refusal.outcome() == Outcome::Unknown => {
                return Err(ClientError::Unknown(refusal.to_string().into()));
            }
            // Certainly not applied: whoever leads, or will, may still do it.
            Some(Err(refusal)) if refusal.retryable() => (),
            Some(Err(refusal)) => return Err(refused(refusal)),
            None => (),
        }
        let left = deadline.saturating_duration_since(Instant::now());
        self.service.client.run(database, operation, left).await
    }

    /// Runs an operation at this node's own replica; `None` if it has none of that shard.
    async fn here(
        &self,
        database: &str,
        operation: &client::Operation,
        within: std::time::Duration,
        admitted: Arc<Admitted>,
    ) -> Option<Result<OperationResult, Refusal>> {
        let node = &self.service.node;
        let (shard, version) = {
            let map = node.map();
            let shard = map.shard_of_key(map.database(database)?, operation.key())?;
            // The shard may know of its new member before the map does.
            shard.ordered().find(|member| member.node == node.node())?;
            (shard.id, shard.epoch.range)
        };
        let operations = vec![wire::to_group(operation.clone(), None)];
        let ends = node.submit_admitted(shard, version, operations, within, Some(admitted), None).await;
        Some(ends.and_then(|ends| match ends.into_iter().next() {
            Some(Ok(output)) => wire::from_group(output),
            Some(Err(refusal)) => Err(refusal),
            None => Err(NO_ANSWER),
        }))
    }
}

const NO_ANSWER: Refusal = Refusal::Unknown(Cow::Borrowed("the replica gave no answer"));

/// Writes the ends of a batch's operations in their order. Returns whether the sender needs a route.
fn write_ends(
    refused: Vec<Option<Refusal>>,
    ends: Vec<Result<Output, Refusal>>,
    room: &mut Room,
    response: batch_response::Builder<'_>,
) -> bool {
    let mut ends = ends.into_iter();
    let count = u32::try_from(refused.len()).unwrap_or(u32::MAX);
    let mut list = response.init_results(count);
    let mut lost = false;
    for (at, refused) in (0..count).zip(refused) {
        let end = match refused {
            Some(refusal) => Err(refusal),
            None => match ends.next() {
                Some(end) => end.and_then(wire::from_group),
                None => Err(NO_ANSWER),
            },
        };
        lost |= end.as_ref().is_err_and(wire::wants_route);
        wire::write_result(end, room, list.reborrow().get(at));
    }
    lost
}

fn write_plain(end: Result<OperationResult, ClientError>, connection: &Backlog, to: op_result::Builder<'_>) {
    match end {
        Ok(result) => wire::write_result(Ok(result), &mut Room::on(connection), to),
        Err(error) => wire::write_client_error(&error, to.init_error()),
    }
}

fn read_scan(request: scan_request::Reader<'_>) -> Result<Result<Query, Refusal>, capnp::Error> {
    let (prefix, after) = (request.get_prefix()?, request.get_after()?);
    if let Err(refusal) = data_shard(ShardId(request.get_shard())) {
        return Ok(Err(refusal));
    }
    if prefix.len() > KEY_BYTES_MAX || after.len() > KEY_BYTES_MAX {
        return Ok(Err(Refusal::Invalid(format!(
            "`prefix` or `after` is longer than any key: {KEY_BYTES_MAX} bytes"
        ))));
    }
    Ok(Ok(Query::Scan {
        prefix: copy(prefix),
        after: copy(after),
        limit: match request.get_limit() as usize {
            0 => SCAN_PAIRS_MAX,
            limit => limit.min(SCAN_PAIRS_MAX),
        },
        keys_only: request.get_keys_only(),
    }))
}

/// The metadata shard runs another machine, which a key-value command in its log would stop for good.
fn data_shard(shard: ShardId) -> Result<(), Refusal> {
    if shard == METADATA_SHARD {
        return Err(Refusal::Invalid("shard 0 is the metadata shard; it holds no keys".into()));
    }
    Ok(())
}

fn copy(bytes: &[u8]) -> Bytes {
    Bytes::copy_from_slice(bytes)
}

fn text(from: capnp::text::Reader<'_>) -> Result<String, capnp::Error> {
    Ok(from.to_string()?)
}

fn unreadable(error: crate::codec::CodecError) -> capnp::Error {
    capnp::Error::failed(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn news_are_told_at_most_once_a_second_and_not_to_all_at_one_moment() {
        let ms = Duration::from_millis;
        let now = Instant::now() + ms(10 * MAP_NEWS_MS);
        assert_eq!(due(now, None, true, 7), now, "it is behind alone");
        assert_eq!(due(now, None, false, 7), now + ms(7));
        assert_eq!(due(now, None, false, u64::MAX) - now, ms(u64::MAX % (MAP_NEWS_JITTER_MS + 1)));
        // The one before was a moment ago: the next comes when a second has passed, whether or not more has come.
        let last = now - ms(100);
        for is_old in [false, true] {
            assert_eq!(due(now, Some(last), is_old, 0), last + ms(MAP_NEWS_MS));
            assert_eq!(due(now, Some(last), is_old, 9), last + ms(MAP_NEWS_MS + 9));
        }
        let last = now - ms(MAP_NEWS_MS);
        assert_eq!(due(now, Some(last), true, 9), now);
        assert_eq!(due(now, Some(last), false, 9), now + ms(9));
    }
}
