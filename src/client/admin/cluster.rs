//! What operators decide: about nodes, replicas, where shards are, settings of the cluster. Any node takes
//! these. Each may be repeated, and is until the deadline: a decision that is made twice is made once, and none
//! undoes a later one, as [`Order`] has it.
//!
//! A change tells the version of the cluster map from which on it holds. The client has that map before it
//! returns, if it can be had, and tells its version with what it asks later: so nobody who waits for the
//! consequences of a change is answered by a node that hasn't heard of it.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::{Duration, Instant};

use futures_util::future::LocalBoxFuture;

use super::answers::{
    Answer, RebalanceOrder, RebalancePlan, RebalanceStatus, Recovery, ShardCheck, read_change,
    read_check_result, read_plan_result, read_recovery_result, read_status_result, read_undo,
};
use super::{bounded, lost, patience};
use crate::client::calls::{persist, told};
use crate::client::connection::Connection;
use crate::client::driver::Driver;
use crate::client::order::Order;
use crate::client::refresh::Ask;
use crate::client::retry::{Failure, Kind, give_up};
use crate::client::ticket::Deadline;
use crate::client::{Client, ClientError, closed};
use crate::codec::CodecError;
use crate::codec::records::write_standing;
use crate::ids::{METADATA_SHARD, NodeId, ShardId};
use crate::limits::{MARKERS_MAX, META_RETRY_MS};
use crate::machine::command::PolicyChange;
use crate::placement::map::Standing;
use crate::refusal::Refusal;
use crate::schema::admin_capnp::{self, admin};

/// What goes with every request.
#[derive(Clone, Copy)]
struct Terms {
    /// The time that the node is told, in milliseconds.
    timeout_ms: u32,
    /// A node whose map is older than this version waits until it has it.
    since: u64,
    /// The version of the map by which an order is given; 0 for what is none.
    seen: u64,
}

/// Asks one node, once.
type Question<T> = Box<dyn Fn(&admin::Client, Terms) -> LocalBoxFuture<'static, Answer<T>> + Send>;

/// A question whose request is filled in and whose result is read as given.
macro_rules! question {
    ($method:ident, |$request:ident, $terms:ident| $fill:block, $read:path) => {{
        let question: Question<_> = Box::new(move |admin: &admin::Client, $terms: Terms| {
            let mut call = admin.$method();
            let mut $request = call.get();
            $request.set_timeout_ms($terms.timeout_ms);
            $fill
            let promise = call.send().promise;
            Box::pin(async move { $read(promise.await?.get()?.get_result()?) })
        });
        question
    }};
}

impl Client {
    /// Decides about a node: see `setStanding` in `admin.capnp`. Returns the version of the cluster map from
    /// which on it holds.
    pub async fn set_standing(
        &self,
        node: NodeId,
        standing: Standing,
        timeout: Duration,
    ) -> Result<u64, ClientError> {
        let question = question!(
            set_standing_request,
            |request, terms| {
                request.set_node(node.0);
                request.set_standing(write_standing(standing));
                request.set_seen(terms.seen);
            },
            read_change
        );
        self.change(timeout, question).await
    }

    /// How many voters each shard of a database should have from now on. Returns once that is decided, not
    /// once they are there: the version of the cluster map from which on it holds.
    pub async fn set_replicas(
        &self,
        database: &str,
        replicas: u32,
        timeout: Duration,
    ) -> Result<u64, ClientError> {
        let database = database.to_owned();
        let question = question!(
            set_replicas_request,
            |request, terms| {
                request.set_database(database.as_str());
                request.set_seen(terms.seen);
                request.set_replicas(replicas);
            },
            read_change
        );
        self.change(timeout, question).await
    }

    /// Changes one setting of the cluster. The map's `policy` has them all.
    pub async fn change_setting(&self, change: PolicyChange, timeout: Duration) -> Result<u64, ClientError> {
        let question = question!(
            change_setting_request,
            |request, terms| {
                request.set_seen(terms.seen);
                let mut setting = request.init_setting();
                match change {
                    PolicyChange::ReplaceAfterMs(ms) => setting.set_replace_after_ms(ms),
                    PolicyChange::MovesAtATime(moves) => setting.set_moves_at_a_time(moves),
                    PolicyChange::BytesPerSecond(bytes) => setting.set_bytes_per_second(bytes),
                    PolicyChange::Automatic(on) => setting.set_automatic(on),
                    PolicyChange::ApproveJoins(on) => setting.set_approve_joins(on),
                }
            },
            read_change
        );
        self.change(timeout, question).await
    }

    /// What a rebalancing would do now, of replicas and leadership, or of leadership alone.
    pub async fn plan_rebalance(
        &self,
        leaders_only: bool,
        timeout: Duration,
    ) -> Result<RebalancePlan, ClientError> {
        let question = question!(
            plan_rebalance_request,
            |request, terms| {
                request.set_leaders_only(leaders_only);
                request.set_since(terms.since);
            },
            read_plan_result
        );
        self.ask(Kind::Read, timeout, question).await
    }

    /// Begins the plan of this id. Refused if the cluster isn't any more as it was when the plan was made, and for 0, which
    /// is the id of a plan that moves nothing; the last one, under way or at its end, is begun already.
    pub async fn start_rebalance(&self, plan: u64, timeout: Duration) -> Result<u64, ClientError> {
        let question = question!(
            start_rebalance_request,
            |request, terms| {
                request.set_plan(plan);
                request.set_seen(terms.seen);
                request.set_since(terms.since);
            },
            read_change
        );
        self.change(timeout, question).await
    }

    /// How the last rebalancing is.
    pub async fn rebalance_status(&self, timeout: Duration) -> Result<RebalanceStatus, ClientError> {
        let question = question!(
            rebalance_status_request,
            |request, terms| { request.set_since(terms.since) },
            read_status_result
        );
        self.ask(Kind::Read, timeout, question).await
    }

    /// Pauses, resumes or cancels the rebalancing of this plan. Refused for 0, by which none was ever begun.
    pub async fn control_rebalance(
        &self,
        plan: u64,
        order: RebalanceOrder,
        timeout: Duration,
    ) -> Result<u64, ClientError> {
        let order = match order {
            RebalanceOrder::Pause => admin_capnp::RebalanceOrder::Pause,
            RebalanceOrder::Resume => admin_capnp::RebalanceOrder::Resume,
            RebalanceOrder::Cancel => admin_capnp::RebalanceOrder::Cancel,
        };
        let question = question!(
            control_rebalance_request,
            |request, terms| {
                request.set_plan(plan);
                request.set_seen(terms.seen);
                request.set_order(order);
            },
            read_change
        );
        self.change(timeout, question).await
    }

    /// Begins a rebalancing back to where each shard was before that of `plan`, the last one, unless that has been
    /// begun already. Returns the plan that does it.
    pub async fn undo_rebalance(&self, plan: u64, timeout: Duration) -> Result<u64, ClientError> {
        let question = question!(
            undo_rebalance_request,
            |request, terms| {
                request.set_plan(plan);
                request.set_seen(terms.seen);
                request.set_since(terms.since);
            },
            read_undo
        );
        let deadline = bounded(timeout);
        self.run(lost(), move |driver| async move {
            let (plan, version) = driver.order(deadline, question).await?;
            driver.catch_up(version, deadline.left(Instant::now())).await;
            Ok(plan)
        })
        .await
    }

    /// Has a shard whose majority is gone for good go on with the replica on `node` alone, or, unless data
    /// loss is accepted, tells what would be kept. See `recoverShard` in `admin.capnp`.
    pub async fn recover_shard(
        &self,
        shard: ShardId,
        node: NodeId,
        accept_data_loss: bool,
        timeout: Duration,
    ) -> Result<Recovery, ClientError> {
        let question = question!(
            recover_shard_request,
            |request, _terms| {
                request.set_shard(shard.0);
                request.set_node(node.0);
                request.set_accept_data_loss(accept_data_loss);
            },
            read_recovery_result
        );
        let kind = if accept_data_loss { Kind::Repeatable } else { Kind::Read };
        let deadline = bounded(timeout);
        self.run(lost(), move |driver| async move {
            // Nobody but its own node can do it while the metadata shard has no leader.
            let at = match shard {
                METADATA_SHARD => driver.address_of(node),
                _ => None,
            };
            driver.ask_someone(kind, deadline, patience, at, question).await
        })
        .await
    }

    /// Has each replica of a shard tell what its state is at one entry of the log, once, and while the shard
    /// is written to. See `verifyShard` in `admin.capnp`; [`ShardCheck::verdict`] says what it shows. Each replica has to
    /// be read within nine tenths of `timeout`, of which no more than [`VERIFY_MS_MAX`](crate::limits::VERIFY_MS_MAX) counts.
    ///
    /// # Errors
    /// [`NotApplied::Refused`](crate::client::NotApplied::Refused) with a refusal that isn't retryable: there is no such
    /// shard, or the node that was asked is too old for this. All else: the shard has no leader now, or nobody answers.
    pub async fn verify_shard(&self, shard: ShardId, timeout: Duration) -> Result<ShardCheck, ClientError> {
        let question = question!(
            verify_shard_request,
            |request, terms| {
                request.set_shard(shard.0);
                request.set_since(terms.since);
            },
            read_check_result
        );
        // A node that is cut off finds no leader where another does. What several say is so: the shard has none.
        let asked = Cell::new(0);
        let question: Question<Result<ShardCheck, Refusal>> = Box::new(move |admin, terms| {
            asked.set(asked.get() + 1);
            let (answer, is_last) = (question(admin, terms), asked.get() >= MARKERS_MAX);
            Box::pin(async move {
                Ok(match answer.await {
                    Ok(Err(refusal)) if is_last => Ok(Err(refusal)),
                    Ok(answer) => answer.map(Ok),
                    Err(CodecError::Capnp(error)) if error.kind == capnp::ErrorKind::Unimplemented => {
                        let why =
                            "the node that was asked is of an older version, which can't compare replicas";
                        Err(Refusal::Refused(why.into()))
                    }
                    Err(error) => return Err(error),
                })
            })
        });
        let deadline = bounded(timeout);
        self.run(closed(), move |driver| async move {
            // All of the time: half of it isn't enough for a shard that takes more than half of it to be read.
            let asked = driver.ask_someone(Kind::Read, deadline, |left| left, None, question).await?;
            asked.map_err(|refusal| give_up(false, Failure::Refused(refusal), deadline.within))
        })
        .await
    }

    async fn ask<T: Send + 'static>(
        &self,
        kind: Kind,
        timeout: Duration,
        question: Question<T>,
    ) -> Result<T, ClientError> {
        let deadline = bounded(timeout);
        let lost = if kind == Kind::Read { closed() } else { lost() };
        self.run(lost, move |driver| async move { driver.ask_anyone(kind, deadline, question).await }).await
    }

    /// Gives an order whose answer is the version of the map from which on it holds.
    async fn change(&self, timeout: Duration, question: Question<u64>) -> Result<u64, ClientError> {
        let deadline = bounded(timeout);
        self.run(lost(), move |driver| async move {
            let version = driver.order(deadline, question).await?;
            driver.catch_up(version, deadline.left(Instant::now())).await;
            Ok(version)
        })
        .await
    }
}

impl Driver {
    /// Asks one node after the other until one answers.
    async fn ask_anyone<T>(
        self: &Rc<Driver>,
        kind: Kind,
        deadline: Deadline,
        question: Question<T>,
    ) -> Result<T, ClientError> {
        self.ask_someone(kind, deadline, patience, None, question).await
    }

    fn address_of(&self, node: NodeId) -> Option<String> {
        self.routing.borrow().map().nodes.get(&node).map(|record| record.client_address.clone())
    }

    /// Asks the node at this address, or any, until there is an answer. `patience` is the time for an attempt, of what is
    /// left.
    async fn ask_someone<T>(
        self: &Rc<Driver>,
        kind: Kind,
        deadline: Deadline,
        patience: fn(Duration) -> Duration,
        at: Option<String>,
        question: Question<T>,
    ) -> Result<T, ClientError> {
        let (turn, question, at) = (&Cell::new(0), &question, &at);
        persist(kind, deadline, |left| async move {
            let patience = patience(left);
            let (address, connection) = match at {
                Some(address) => {
                    let connection = self.pool.get(address, true).await;
                    (address.clone(), connection.map_err(|obstacle| Failure::NotSent(obstacle.to_string()))?)
                }
                None => self.any_node(turn).await?,
            };
            self.ask_once(&address, &connection, patience, 0, question).await
        })
        .await
    }

    /// Gives an order to one node after the other until one has it carried out: by the map that this client has, which
    /// it follows.
    async fn order<T>(
        self: &Rc<Driver>,
        deadline: Deadline,
        question: Question<T>,
    ) -> Result<T, ClientError> {
        let (order, turn, question) = (&RefCell::new(Order::default()), &Cell::new(0), &question);
        // First by itself: whatever becomes of that, nothing was sent that could be in doubt.
        persist(Kind::Read, deadline, |left| self.settle(order, left)).await?;
        persist(Kind::Repeatable, deadline, |left| async move {
            self.settle(order, left).await?;
            let patience = patience(left);
            let (address, connection) = self.any_node(turn).await?;
            let (seen, before) = order.borrow_mut().begin();
            let end = self.ask_once(&address, &connection, patience, seen, question).await;
            order.borrow_mut().end(before, end)
        })
        .await
    }

    /// Settles by which map an order is given, if it isn't.
    async fn settle(self: &Rc<Driver>, order: &RefCell<Order>, left: Duration) -> Result<(), Failure> {
        let Some(least) = order.borrow().wants() else {
            return Ok(());
        };
        let version = || self.routing.borrow().map().version;
        if version() < least {
            // A little less, so that what the nodes said is told rather than that time ran out.
            self.ask_map(Ask::One, left - left / 20).await?;
        }
        if version() < least {
            return Err(Failure::NotSent(format!("no node has told the cluster map of version {least} yet")));
        }
        order.borrow_mut().settle(version());
        Ok(())
    }

    /// Asks the node behind `connection`, once.
    async fn ask_once<T>(
        &self,
        address: &str,
        connection: &Rc<Connection>,
        patience: Duration,
        seen: u64,
        question: &Question<T>,
    ) -> Result<T, Failure> {
        let since = self.routing.borrow().map().version;
        let terms = Terms { timeout_ms: told(patience), since, seen };
        let asked = question(&connection.admin, terms);
        // What can't be read is an answer of which nothing is known.
        let asked = async { asked.await.map_err(unreadable) };
        let answer = self.heard(address, connection, patience, asked).await?;
        answer.map_err(Failure::Refused)
    }

    /// Waits until this client has the cluster map of `version`, or the time is over: it is known well enough
    /// that the change was made.
    async fn catch_up(self: &Rc<Driver>, version: u64, left: Duration) {
        let until = Instant::now() + left;
        while self.routing.borrow().map().version < version {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            if let Err(failure) = self.ask_map(Ask::One, left).await {
                tracing::debug!(failure = failure.text(), "no fresh map after a change");
            }
            tokio::time::sleep(Duration::from_millis(META_RETRY_MS).min(left)).await;
        }
    }
}

fn unreadable(error: CodecError) -> capnp::Error {
    match error {
        CodecError::Capnp(error) => error,
        malformed => capnp::Error::failed(malformed.to_string()),
    }
}
