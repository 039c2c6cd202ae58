//! Administration of a cluster: the map, reports of nodes, databases, leadership; in `cluster`, what
//! operators decide.

pub mod answers;
mod cluster;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use capnp::capability::{Promise, Response};

use super::calls::{persist, told};
use super::connection::{Connection, Obstacle, Obstacles};
use super::driver::Driver;
use super::dropping::Dropping;
use super::race::Race;
use super::refresh::{Ask, Word, unsure};
use super::retry::{Failure, Kind};
use super::ticket::Deadline;
use super::{Client, ClientError, NotApplied, closed, wire};
use crate::codec::CodecError;
use crate::codec::records::{read_database, read_delta};
use crate::codec::refusal::read_refusal;
use crate::ids::{ClusterId, DatabaseId, NodeId, ShardId};
use crate::limits::{ATTEMPT_MS_MAX, META_ATTEMPT_MS, TIMEOUT_MAX_MS};
use crate::node::handle::NodeReport;
use crate::placement::map::{ClusterMap, DatabaseRecord};
use crate::refusal::{Outcome, Refusal};
use crate::schema::admin_capnp::{admin, database_result, void_result};
use crate::telemetry::counters::Counters;

impl Client {
    /// What the node at `address` tells of itself and its replicas, asked of that node alone.
    pub async fn node_report(&self, address: &str, timeout: Duration) -> Result<NodeReport, ClientError> {
        let (address, deadline) = (address.to_owned(), bounded(timeout));
        self.run(closed(), move |driver| async move {
            let asked = driver.report_of(&address, false, deadline).await;
            asked.map_err(|last| unavailable(deadline, last))
        })
        .await
    }

    /// What the node at `address` has counted since its process began, asked of that node alone.
    pub async fn node_counters(&self, address: &str, timeout: Duration) -> Result<Counters, ClientError> {
        let (address, deadline) = (address.to_owned(), bounded(timeout));
        self.run(closed(), move |driver| async move {
            let ask = |admin: &admin::Client| admin.counters_request().send().promise;
            let read = |answer: Response<admin::counters_results::Owned>| {
                wire::read_counters(answer.get()?.get_counters()?)
            };
            let asked = driver.answer_of(&address, deadline, ask, read).await;
            asked.map_err(|last| unavailable(deadline, last))
        })
        .await
    }

    /// Creates a database and waits until each of its shards has a leader. True: made now (or by an
    /// attempt of this call whose answer was lost); false: it existed with the same numbers. With other
    /// numbers: `NotApplied::Refused`.
    pub async fn create_database(
        &self,
        name: &str,
        replicas: u32,
        shards: u32,
        timeout: Duration,
    ) -> Result<(DatabaseRecord, bool), ClientError> {
        let (name, deadline) = (name.to_owned(), bounded(timeout));
        self.run(lost(), move |driver| async move {
            // Set once an attempt may have made it: then it is this call's, though it exists already.
            let (tried, turn) = (Cell::new(false), Cell::new(0));
            let (name, tried, turn) = (&name, &tried, &turn);
            let made = persist(Kind::Repeatable, deadline, |left| {
                let driver = driver.clone();
                async move {
                    let patience = patience(left);
                    let (address, connection) = driver.any_node(turn).await?;
                    let mut call = connection.admin.create_database_request();
                    let mut request = call.get();
                    request.set_name(name.as_str());
                    request.set_replicas(replicas);
                    request.set_shards(shards);
                    request.set_timeout_ms(told(patience));
                    let before = tried.replace(true);
                    let answer = driver.heard(&address, &connection, patience, call.send().promise).await?;
                    let result = answer.get().and_then(|a| a.get_result());
                    let result = result.map_err(|e| lost_answer(&address, &e))?;
                    let record = read_database_result(&address, result).inspect_err(|failure| {
                        tried.set(before || failure.outcome() == Outcome::Unknown);
                    })?;
                    // That node has the shards in its map by now: operations may follow at once.
                    if let Err(error) = driver.map_of(&connection).await {
                        tracing::debug!(address, error, "no fresh map after creating a database");
                    }
                    Ok((record, result.get_created() || before))
                }
            });
            made.await
        })
        .await
    }

    /// Removes a database with all its data: the one that has this name when the first request arrives.
    /// Another that is made under the name while an answer of ours is in doubt is left alone, however often
    /// the request has to be sent.
    pub async fn drop_database(&self, name: &str, timeout: Duration) -> Result<(), ClientError> {
        let (name, deadline) = (name.to_owned(), bounded(timeout));
        self.run(lost(), move |driver| async move {
            let mut plan = Dropping::new(name);
            // First by itself: whatever becomes of that, nothing was sent that could be in doubt.
            let database = persist(Kind::Read, deadline, |left| {
                let (driver, name) = (driver.clone(), plan.name().to_owned());
                async move { driver.resolve(&name, left).await }
            });
            let database = database.await?;
            plan.resolve(database);
            let (plan, turn) = (&RefCell::new(plan), &Cell::new(0));
            let dropped = persist(Kind::Repeatable, deadline, |left| {
                let driver = driver.clone();
                async move {
                    let name = plan.borrow().name().to_owned();
                    if !plan.borrow().is_resolved() {
                        let database = driver.resolve(&name, left).await?;
                        plan.borrow_mut().resolve(database);
                    }
                    let database = plan.borrow().next()?;
                    let patience = patience(left);
                    let (address, connection) = driver.any_node(turn).await?;
                    let mut call = connection.admin.drop_database_request();
                    let mut request = call.get();
                    request.set_name(name.as_str());
                    request.set_database(database.map_or(0, |id| id.0));
                    request.set_timeout_ms(told(patience));
                    let before = plan.borrow_mut().begin();
                    let answer = driver.heard(&address, &connection, patience, call.send().promise).await?;
                    let result = answer.get().and_then(|a| a.get_result());
                    let result = result.map_err(|e| lost_answer(&address, &e))?;
                    let end = read_database_result(&address, result).map(drop);
                    plan.borrow_mut().end(before, end)?;
                    if let Err(error) = driver.map_of(&connection).await {
                        tracing::debug!(address, error, "no fresh map after dropping a database");
                    }
                    Ok(())
                }
            });
            dropped.await
        })
        .await
    }

    /// Moves the leadership of a shard to the replica on `node`.
    pub async fn transfer_leader(
        &self,
        shard: ShardId,
        node: NodeId,
        timeout: Duration,
    ) -> Result<(), ClientError> {
        let deadline = bounded(timeout);
        self.run(lost(), move |driver| async move {
            // By itself: whatever becomes of that, nothing was sent that could be in doubt.
            let known = persist(Kind::Read, deadline, |left| {
                let driver = driver.clone();
                async move { driver.knows_shard(shard, left).await }
            });
            known.await?;
            let moved = persist(Kind::Repeatable, deadline, |left| {
                let driver = driver.clone();
                async move {
                    let (target, connection) = driver.leader(shard).await?;
                    let mut call = connection.admin.transfer_leader_request();
                    let mut request = call.get();
                    request.set_shard(shard.0);
                    request.set_node(node.0);
                    let patience = patience(left);
                    request.set_timeout_ms(told(patience));
                    let answer =
                        driver.attempt(shard, &connection, &target, patience, call.send().promise).await?;
                    let result = answer.get().and_then(|a| a.get_result());
                    let result = result.map_err(|e| lost_answer(&target.address, &e))?;
                    match read_void_result(&target.address, result) {
                        Err(Failure::Refused(refusal)) => {
                            Err(Failure::Refused(driver.refused(shard, &target, refusal)))
                        }
                        read => read,
                    }
                }
            });
            moved.await
        })
        .await
    }

    /// Test hook: makes the replica of `shard` on the node at `address` fail in the named way.
    pub async fn inject(&self, address: &str, shard: ShardId, fault: &str) -> Result<(), ClientError> {
        let (address, fault) = (address.to_owned(), fault.to_owned());
        let deadline = bounded(self.shared.options.timeout);
        self.run(lost(), move |driver| async move {
            let (address, fault) = (&address, &fault);
            persist(Kind::Once, deadline, |_| {
                let driver = driver.clone();
                async move {
                    let connection = driver.pool.get(address, false).await;
                    let connection = connection.map_err(|e| Failure::NotSent(e.to_string()))?;
                    let mut call = connection.admin.inject_request();
                    call.get().set_shard(shard.0);
                    call.get().set_fault(fault.as_str());
                    let answer = call.send().promise.await;
                    let answer = answer.map_err(|e| failure(address, &e))?;
                    let result = answer.get().and_then(|a| a.get_result());
                    read_void_result(address, result.map_err(|e| lost_answer(address, &e))?)
                }
            })
            .await
        })
        .await
    }

    /// The cluster map, freshly asked of as many nodes as it takes to find in it what `is_there` looks for, or to say for
    /// certain that it isn't: who is cut off from the metadata shard can't. Fails as unavailable, with `what`, if no other
    /// node answers.
    pub async fn map_with(
        &self,
        what: impl Into<String>,
        is_there: impl Fn(&ClusterMap) -> bool + Send + 'static,
    ) -> Result<Arc<ClusterMap>, ClientError> {
        let (what, deadline) = (what.into(), bounded(self.shared.options.timeout));
        self.run(closed(), move |driver| async move {
            let (what, find) = (&what, &|map: &ClusterMap| is_there(map).then_some(()));
            persist(Kind::Read, deadline, |left| {
                let driver = driver.clone();
                async move {
                    driver.look_up(what, left, find).await?;
                    Ok(driver.routing.borrow().map().clone())
                }
            })
            .await
        })
        .await
    }

    /// The same for a database.
    pub async fn map_naming(&self, database: &str) -> Result<Arc<ClusterMap>, ClientError> {
        let name = database.to_owned();
        self.map_with(format!("a database `{name}`"), move |map| map.database(&name).is_some()).await
    }

    /// A map that a node answered with just now.
    pub(super) async fn fresh_map(&self, timeout: Duration) -> Result<Arc<ClusterMap>, ClientError> {
        let deadline = bounded(timeout);
        self.run(closed(), move |driver| async move {
            persist(Kind::Read, deadline, |left| {
                let driver = driver.clone();
                async move {
                    // A little less, so that what the nodes said is told rather than that time ran out.
                    driver.ask_map(Ask::One, left - left / 20).await?;
                    Ok(driver.routing.borrow().map().clone())
                }
            })
            .await
        })
        .await
    }
}

impl Driver {
    /// Asks one node for its report; `brief`: without its replicas. The error is for a person.
    pub async fn report_of(
        self: &Rc<Driver>,
        address: &str,
        brief: bool,
        deadline: Deadline,
    ) -> Result<NodeReport, String> {
        let ask = |admin: &admin::Client| {
            let mut request = admin.node_status_request();
            request.get().set_brief(brief);
            request.send().promise
        };
        self.answer_of(address, deadline, ask, |answer| wire::read_report(answer.get()?.get_status()?)).await
    }

    /// Asks one node something that it answers by itself. The error is for a person.
    async fn answer_of<A: capnp::traits::Pipelined + capnp::traits::Owned + Unpin + 'static, T>(
        self: &Rc<Driver>,
        address: &str,
        deadline: Deadline,
        ask: impl Fn(&admin::Client) -> Promise<Response<A>, capnp::Error>,
        read: impl Fn(Response<A>) -> Result<T, CodecError>,
    ) -> Result<T, String> {
        let asked = async {
            let mut fresh = false;
            loop {
                let connection = self.pool.get(address, false).await;
                let connection = connection.map_err(|e| e.to_string())?;
                let (began, watch) = (Instant::now(), connection.watch(0));
                let answer = watch.answer(ask(&connection.admin));
                let answer = match tokio::time::timeout_at(deadline.at.into(), answer).await {
                    Ok(Some(answer)) => answer,
                    none => {
                        self.pool.unanswered(&connection, began, none.is_ok());
                        return Err(format!("{address}: no answer within {:.1?}", began.elapsed()));
                    }
                };
                let answer = match answer {
                    // The connection was made for the last report, and the node has restarted since.
                    Err(_) if connection.broken() && !fresh => {
                        fresh = true;
                        continue;
                    }
                    answer => answer.map_err(|e| format!("{address}: {e}"))?,
                };
                return read(answer).map_err(|e| format!("{address}: {e}"));
            }
        };
        tokio::time::timeout_at(deadline.at.into(), asked)
            .await
            .unwrap_or_else(|_| Err(format!("{address}: no answer within {:.0?}", deadline.within)))
    }

    /// The living database of that name, as a node says that is asked now. None: there is certainly none.
    async fn resolve(self: &Rc<Driver>, name: &str, left: Duration) -> Result<Option<DatabaseId>, Failure> {
        let find = |map: &ClusterMap| map.database(name).map(|record| record.id);
        self.look_up(&format!("a database `{name}`"), left, &find).await
    }

    /// Fails if there is no such shard, by the map in the cache or one that nodes answer with now.
    async fn knows_shard(self: &Rc<Driver>, shard: ShardId, left: Duration) -> Result<(), Failure> {
        let known = || self.routing.borrow().range_version(shard).is_some();
        if known() {
            return Ok(());
        }
        match self.ask_map(Ask::All, left - left / 20).await? {
            _ if known() => Ok(()),
            Word::Certain => Err(Failure::Refused(Refusal::Refused(format!("there is no shard {shard}")))),
            Word::Unsure => Err(unsure(&format!("a shard {shard}"))),
        }
    }

    /// What `find` has of the map that nodes answer with now. None: there is certainly no such thing. `what` is for a
    /// person, where nobody can say.
    async fn look_up<T>(
        self: &Rc<Driver>,
        what: &str,
        left: Duration,
        find: &impl Fn(&ClusterMap) -> Option<T>,
    ) -> Result<Option<T>, Failure> {
        let find = || find(self.routing.borrow().map());
        // A little less, so that what the nodes said is told rather than that time ran out.
        let until = Instant::now() + (left - left / 20);
        let left = || until.saturating_duration_since(Instant::now());
        self.ask_map(Ask::One, left()).await?;
        if let Some(found) = find() {
            return Ok(Some(found));
        }
        // One that hasn't heard of it isn't to be believed, nor are all of them where none hears anything.
        let word = self.ask_map(Ask::All, left()).await?;
        match (find(), word) {
            (None, Word::Unsure) => Err(unsure(what)),
            (found, _) => Ok(found),
        }
    }

    /// A connection to any node of the cluster, the metadata shard's first, and beginning with another
    /// one each `turn`.
    async fn any_node(self: &Rc<Driver>, turn: &Cell<usize>) -> Result<(String, Rc<Connection>), Failure> {
        let mut obstacles = Obstacles::default();
        let mut addresses = self.addresses();
        let begin = turn.replace(turn.get() + 1) % addresses.len().max(1);
        addresses.rotate_left(begin);
        let dialled = addresses.into_iter().map(|address| async move {
            let connection = self.pool.get(&address, true).await;
            (address, connection)
        });
        let mut race = Race::new(dialled, 1);
        while let Some((address, dialled)) = race.next().await {
            match dialled {
                Ok(connection) if self.foreign(&connection) => {
                    self.pool.discard(&connection);
                    let why = format!("{address} belongs to another cluster, {}", connection.cluster_id);
                    obstacles.add(&Obstacle::from(why));
                }
                Ok(connection) => return Ok((address, connection)),
                Err(obstacle) => obstacles.add(&obstacle),
            }
        }
        Err(obstacles.failure())
    }

    /// Whether a node is of another cluster than the map that this client knows: its address has changed
    /// hands, and a change meant for one cluster must not be made in the other.
    fn foreign(&self, connection: &Connection) -> bool {
        let ours = self.routing.borrow().map().cluster_id;
        ours != ClusterId::default() && connection.cluster_id != ours
    }

    /// Waits for the answer of the node behind `connection`, for `patience`, unless it is gone.
    async fn heard<T>(
        &self,
        address: &str,
        connection: &Rc<Connection>,
        patience: Duration,
        promise: impl Future<Output = Result<T, capnp::Error>>,
    ) -> Result<T, Failure> {
        let began = Instant::now();
        let watch = connection.watch(0);
        let answer = tokio::time::timeout(patience, watch.answer(promise)).await;
        let answer = match answer {
            Ok(Some(answer)) => answer,
            none => {
                self.pool.unanswered(connection, began, none.is_ok());
                let ms = began.elapsed().as_millis();
                return Err(Failure::Lost(format!("{address} did not answer within {ms} ms")));
            }
        };
        answer.map_err(|e| failure(address, &e))
    }

    /// Takes over the map of the node behind `connection`.
    async fn map_of(&self, connection: &Connection) -> Result<(), String> {
        let mut request = connection.kv.map_request();
        let since = self.routing.borrow().map().version;
        request.get().set_since(since);
        let limit = Duration::from_millis(ATTEMPT_MS_MAX);
        let answer = tokio::time::timeout(limit, request.send().promise);
        let answer = answer.await.map_err(|_| "no answer".to_owned())?;
        let answer = answer.map_err(|e| e.to_string())?;
        let delta = answer.get().and_then(|a| a.get_delta());
        let delta = read_delta(delta.map_err(|e| e.to_string())?).map_err(|e| e.to_string())?;
        self.learn(delta, "the node")
    }
}

fn read_database_result(address: &str, from: database_result::Reader<'_>) -> Result<DatabaseRecord, Failure> {
    match from.which().map_err(|e| lost_answer(address, &e))? {
        database_result::Database(record) => {
            let record = record.map_err(|e| lost_answer(address, &e))?;
            read_database(record).map_err(|e| lost_answer(address, &e))
        }
        database_result::Error(error) => {
            let error = error.map_err(|e| lost_answer(address, &e))?;
            Err(Failure::Refused(read_refusal(error)))
        }
    }
}

fn read_void_result(address: &str, from: void_result::Reader<'_>) -> Result<(), Failure> {
    match from.which().map_err(|e| lost_answer(address, &e))? {
        void_result::Ok(()) => Ok(()),
        void_result::Error(error) => {
            let error = error.map_err(|e| lost_answer(address, &e))?;
            Err(Failure::Refused(read_refusal(error)))
        }
    }
}

fn lost_answer(address: &str, error: &dyn std::fmt::Display) -> Failure {
    Failure::Lost(format!("{address} gave an unreadable answer: {error}"))
}

fn failure(address: &str, error: &capnp::Error) -> Failure {
    let text = format!("{address}: {error}");
    match error.kind {
        capnp::ErrorKind::Unimplemented => Failure::NotSent(text),
        _ => Failure::Lost(text),
    }
}

/// The time a node is given for one attempt: as much as there may be to wait for (new shards elect their
/// leaders), but so that one that hangs, or is cut off from the others, leaves time for another.
fn patience(left: Duration) -> Duration {
    (left / 2).max(Duration::from_millis(META_ATTEMPT_MS)).min(left)
}

fn bounded(timeout: Duration) -> Deadline {
    Deadline::after(timeout.min(Duration::from_millis(TIMEOUT_MAX_MS)))
}

fn unavailable(deadline: Deadline, last: String) -> ClientError {
    ClientError::NotApplied(NotApplied::Unavailable { within: deadline.within, last })
}

/// The end of a change that was under way when the client was closed.
fn lost() -> ClientError {
    ClientError::Unknown("the client was closed before the answer came".into())
}
