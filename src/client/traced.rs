//! One operation, and where its time went.
//!
//! It is sent alone, in a call of its own past the lanes, so that nothing waits with it. A write has no session:
//! it is sent again only after an attempt that certainly had no effect.

use std::rc::Rc;
use std::time::{Duration, Instant};

use super::calls::{persist, told};
use super::driver::Driver;
use super::refresh::Ask;
use super::retry::{Failure, Kind};
use super::ticket::Deadline;
use super::{ClientError, Database, Operation, OperationResult, check, wire};
use crate::codec::refusal::read_refusal;
use crate::codec::trace::{Trace, read_trace};
use crate::ids::{NodeId, ShardId};
use crate::limits::ATTEMPT_MS_MAX;
use crate::schema::kv_capnp::batch_response;

/// An operation that was traced.
#[derive(Clone, Debug)]
pub struct Traced {
    /// What came of it.
    pub result: OperationResult,
    /// The shard of its key.
    pub shard: ShardId,
    /// The node that answered: it leads the shard.
    pub node: NodeId,
    /// From the call of the library to its return.
    pub total: Duration,
    /// Of that: from the leaving of the call to its answer.
    pub call: Duration,
    /// Where the time went on the node; `None`: its program is older and doesn't tell.
    pub trace: Option<Trace>,
}

impl Database {
    /// Runs one operation and tells where its time went.
    pub async fn traced(&self, operation: Operation) -> Result<Traced, ClientError> {
        check(&operation)?;
        let begun = Instant::now();
        let (name, deadline) = (self.name.clone(), self.deadline());
        let lost = ClientError::Unknown("the client was closed before the answer came".into());
        let mut traced = self
            .client
            .run(lost, move |driver| async move { persist_traced(&driver, &name, operation, deadline).await })
            .await?;
        traced.total = begun.elapsed();
        Ok(traced)
    }
}

async fn persist_traced(
    driver: &Rc<Driver>,
    database: &str,
    operation: Operation,
    deadline: Deadline,
) -> Result<Traced, ClientError> {
    let kind = match operation {
        Operation::Get(_) => Kind::Read,
        _ => Kind::Once,
    };
    let operation = &operation;
    persist(kind, deadline, |left| async move {
        driver.adopt();
        let route = driver.routing.borrow().route(database, operation.key());
        let Some(route) = route else {
            let word = driver.ask_map(Ask::All, left).await?;
            if driver.routing.borrow().knows(database) {
                return Err(Failure::NotSent("the map has just come".to_owned()));
            }
            return Err(word.absent(database));
        };
        let patience = left.min(Duration::from_millis(ATTEMPT_MS_MAX));
        driver.trace_one(route.shard, route.range_version, operation, patience).await
    })
    .await
}

impl Driver {
    /// Sends one operation alone to the leader of its shard.
    async fn trace_one(
        self: &Rc<Driver>,
        shard: ShardId,
        range_version: u64,
        operation: &Operation,
        patience: Duration,
    ) -> Result<Traced, Failure> {
        let (target, connection) = self.leader(shard).await?;
        let mut call = connection.kv.batch_request();
        let mut request = call.get().init_request();
        request.set_shard(shard.0);
        request.set_range_version(range_version);
        request.set_timeout_ms(told(patience));
        request.set_trace(true);
        wire::write_operation(operation, request.init_operations(1).get(0));
        let sent = Instant::now();
        let answer = self.attempt(shard, &connection, &target, patience, call.send().promise).await?;
        let call = sent.elapsed();
        let unreadable = |error: &dyn std::fmt::Display| {
            Failure::Lost(format!(
                "node {} at {} gave an unreadable answer: {error}",
                target.node, target.address
            ))
        };
        let response = answer.get().and_then(|a| a.get_response()).map_err(|e| unreadable(&e))?;
        if response.has_route() {
            self.take_route(response.get_route(), &target.address);
        }
        let result = match response.which().map_err(|e| unreadable(&e))? {
            batch_response::Results(results) => {
                let results = results.map_err(|e| unreadable(&e))?;
                if results.len() != 1 {
                    return Err(unreadable(&format!("{} results of one operation", results.len())));
                }
                wire::read_result(operation, results.get(0)).map_err(|e| unreadable(&e))?
            }
            batch_response::Error(error) => Err(read_refusal(error.map_err(|e| unreadable(&e))?)),
        };
        let result = match result {
            Ok(result) => result,
            Err(refusal) => return Err(Failure::Refused(self.refused(shard, &target, refusal))),
        };
        self.routing.borrow_mut().succeeded(shard, target.node);
        let trace = match response.has_trace() {
            true => {
                let trace = response.get_trace().map_err(|e| unreadable(&e))?;
                Some(read_trace(trace).map_err(|e| unreadable(&e))?)
            }
            false => None,
        };
        Ok(Traced { result, shard, node: target.node, total: call, call, trace })
    }
}
