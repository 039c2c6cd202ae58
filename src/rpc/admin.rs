//! The service `Admin`.
//!
//! - Here: reports, databases, leadership. - `cluster`: nodes, replica counts, settings. - `counters`: what the process has counted. - `rebalance`: plans, and what
//!   becomes of them. - `recover`: shards whose majority is gone. - `verify`: whether replicas are equal. - `survey`: what all nodes tell.
//!   - `answers`: the program's types in protocol form.

mod answers;
mod cluster;
mod counters;
mod rebalance;
mod recover;
mod survey;
mod verify;

pub use cluster::check_setting;

use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::{Duration, Instant};

use futures_util::stream::{FuturesUnordered, Stream, StreamExt};

use super::{Service, timeout, wire};
use crate::client::admin::answers::RebalanceOrder;
use crate::codec::records::{read_standing, write_database};
use crate::codec::refusal::write_refusal;
use crate::ids::{DatabaseId, NodeId, ShardId};
use crate::limits::{DROP_SETTLE_MS_MAX, NAME_BYTES_MAX, PLAN_SETTLE_MS_MAX, REPLICAS_MAX, SHARDS_MAX};
use crate::machine::command::{MetaCommand, MetaRefusal, MetaReply};
use crate::node::handle::NodeReport;
use crate::placement::map::{ClusterMap, DatabaseRecord, ShardRecord, Standing};
use crate::placement::plan::{PlanError, PlannedShard, plan_among, plan_database};
use crate::refusal::Refusal;
use crate::schema::admin_capnp::{self, admin, database_result, void_result};

/// Pause between two looks at who leads the shards of a new database; doubles up to the second.
const LEADER_POLL: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(160));
/// A node is waited for so long when it is asked for its report.
const REPORT: Duration = Duration::from_secs(1);
/// Nodes that are named when there are too few for a database because they get no new replicas.
const PASSED_OVER_NAMED: usize = 8;

/// Administration.
pub(crate) struct Admin {
    service: Rc<Service>,
}

impl Admin {
    pub(crate) fn new(service: Rc<Service>) -> Admin {
        Admin { service }
    }
}

impl admin::Server for Admin {
    async fn node_status(
        self: Rc<Self>,
        params: admin::NodeStatusParams,
        mut results: admin::NodeStatusResults,
    ) -> Result<(), capnp::Error> {
        let brief = params.get()?.get_brief();
        let report = match brief {
            true => self.service.node.brief_report(),
            false => self.service.node.report().await,
        };
        let map = self.service.node.map();
        let status = results.get().init_status();
        wire::write_report(&report, map.cluster_id, map.version, status);
        Ok(())
    }

    async fn create_database(
        self: Rc<Self>,
        params: admin::CreateDatabaseParams,
        mut results: admin::CreateDatabaseResults,
    ) -> Result<(), capnp::Error> {
        let request = params.get()?;
        let name = request.get_name()?.to_string()?;
        let (replicas, shards) = (request.get_replicas(), request.get_shards());
        let deadline = Instant::now() + timeout(request.get_timeout_ms());
        drop(params);
        let made = match self.service.load.enter(1, 0) {
            Ok(_guard) => self.create(name, replicas, shards, deadline).await,
            Err(refusal) => Err(refusal),
        };
        write_database_result(made, results.get().init_result());
        Ok(())
    }

    async fn drop_database(
        self: Rc<Self>,
        params: admin::DropDatabaseParams,
        mut results: admin::DropDatabaseResults,
    ) -> Result<(), capnp::Error> {
        let request = params.get()?;
        let name = request.get_name()?.to_string()?;
        let within = timeout(request.get_timeout_ms());
        let id = Some(request.get_database()).filter(|id| *id != 0).map(DatabaseId);
        drop(params);
        let dropped = match self.service.load.enter(1, 0) {
            Ok(_guard) => self.drop_everywhere(name, id, within).await,
            Err(refusal) => Err(refusal),
        };
        write_database_result(dropped, results.get().init_result());
        Ok(())
    }

    async fn transfer_leader(
        self: Rc<Self>,
        params: admin::TransferLeaderParams,
        mut results: admin::TransferLeaderResults,
    ) -> Result<(), capnp::Error> {
        let request = params.get()?;
        let (shard, to) = (ShardId(request.get_shard()), NodeId(request.get_node()));
        let within = timeout(request.get_timeout_ms());
        let moved = match self.service.load.enter(1, 0) {
            Ok(_guard) => self.transfer(shard, to, within).await,
            Err(refusal) => Err(refusal),
        };
        write_void_result(moved, results.get().init_result());
        Ok(())
    }

    async fn inject(
        self: Rc<Self>,
        params: admin::InjectParams,
        mut results: admin::InjectResults,
    ) -> Result<(), capnp::Error> {
        let shard = ShardId(params.get()?.get_shard());
        let fault = params.get()?.get_fault()?.to_string()?;
        let done = self.service.node.inject(shard, &fault).await;
        write_void_result(done, results.get().init_result());
        Ok(())
    }

    async fn set_standing(
        self: Rc<Self>,
        params: admin::SetStandingParams,
        mut results: admin::SetStandingResults,
    ) -> Result<(), capnp::Error> {
        let request = params.get()?;
        let (node, within) = (NodeId(request.get_node()), timeout(request.get_timeout_ms()));
        let seen = request.get_seen();
        let standing = read_standing(request.get_standing());
        let done = match (self.service.load.enter(1, 0), standing) {
            (Ok(_guard), Ok(standing)) => self.stand(node, standing, seen, within).await,
            (_, Err(error)) => Err(Refusal::Invalid(error.to_string())),
            (Err(refusal), _) => Err(refusal),
        };
        answers::write_change(done, results.get().init_result());
        Ok(())
    }

    async fn plan_rebalance(
        self: Rc<Self>,
        params: admin::PlanRebalanceParams,
        mut results: admin::PlanRebalanceResults,
    ) -> Result<(), capnp::Error> {
        let request = params.get()?;
        let (leaders_only, since) = (request.get_leaders_only(), request.get_since());
        let deadline = Instant::now() + timeout(request.get_timeout_ms());
        let plan = match self.service.load.enter(1, 0) {
            Ok(_guard) => self.plan(leaders_only, since, deadline).await,
            Err(refusal) => Err(refusal),
        };
        answers::write_plan(plan, results.get().init_result());
        Ok(())
    }

    async fn start_rebalance(
        self: Rc<Self>,
        params: admin::StartRebalanceParams,
        mut results: admin::StartRebalanceResults,
    ) -> Result<(), capnp::Error> {
        let request = params.get()?;
        let (plan, since, seen) = (request.get_plan(), request.get_since(), request.get_seen());
        let deadline = Instant::now() + timeout(request.get_timeout_ms());
        let started = match self.service.load.enter(1, 0) {
            Ok(_guard) => self.start(plan, since, seen, deadline).await,
            Err(refusal) => Err(refusal),
        };
        answers::write_change(started, results.get().init_result());
        Ok(())
    }

    async fn rebalance_status(
        self: Rc<Self>,
        params: admin::RebalanceStatusParams,
        mut results: admin::RebalanceStatusResults,
    ) -> Result<(), capnp::Error> {
        let request = params.get()?;
        let since = request.get_since();
        let deadline = Instant::now() + timeout(request.get_timeout_ms());
        let status = match self.service.load.enter(1, 0) {
            Ok(_guard) => self.status(since, deadline).await,
            Err(refusal) => Err(refusal),
        };
        answers::write_status(status, results.get().init_result());
        Ok(())
    }

    async fn control_rebalance(
        self: Rc<Self>,
        params: admin::ControlRebalanceParams,
        mut results: admin::ControlRebalanceResults,
    ) -> Result<(), capnp::Error> {
        let request = params.get()?;
        let (plan, seen) = (request.get_plan(), request.get_seen());
        let order = match request.get_order() {
            Ok(admin_capnp::RebalanceOrder::Pause) => Ok(RebalanceOrder::Pause),
            Ok(admin_capnp::RebalanceOrder::Resume) => Ok(RebalanceOrder::Resume),
            Ok(admin_capnp::RebalanceOrder::Cancel) => Ok(RebalanceOrder::Cancel),
            Err(_) => Err(Refusal::Invalid("this node doesn't know the order: it is older than you".into())),
        };
        let deadline = Instant::now() + timeout(request.get_timeout_ms());
        let done = match (self.service.load.enter(1, 0), order) {
            (Ok(_guard), Ok(order)) => self.control(plan, order, seen, deadline).await,
            (Err(refusal), _) | (_, Err(refusal)) => Err(refusal),
        };
        answers::write_change(done, results.get().init_result());
        Ok(())
    }

    async fn undo_rebalance(
        self: Rc<Self>,
        params: admin::UndoRebalanceParams,
        mut results: admin::UndoRebalanceResults,
    ) -> Result<(), capnp::Error> {
        let request = params.get()?;
        let (plan, since, seen) = (request.get_plan(), request.get_since(), request.get_seen());
        let deadline = Instant::now() + timeout(request.get_timeout_ms());
        let begun = match self.service.load.enter(1, 0) {
            Ok(_guard) => self.undo(plan, since, seen, deadline).await,
            Err(refusal) => Err(refusal),
        };
        answers::write_undo(begun, results.get().init_result());
        Ok(())
    }

    async fn set_replicas(
        self: Rc<Self>,
        params: admin::SetReplicasParams,
        mut results: admin::SetReplicasResults,
    ) -> Result<(), capnp::Error> {
        let request = params.get()?;
        let name = request.get_database()?.to_string()?;
        let (replicas, seen) = (request.get_replicas(), request.get_seen());
        let deadline = Instant::now() + timeout(request.get_timeout_ms());
        drop(params);
        let done = match self.service.load.enter(1, 0) {
            Ok(_guard) => self.replicate(name, replicas, seen, deadline).await,
            Err(refusal) => Err(refusal),
        };
        answers::write_change(done, results.get().init_result());
        Ok(())
    }

    async fn change_setting(
        self: Rc<Self>,
        params: admin::ChangeSettingParams,
        mut results: admin::ChangeSettingResults,
    ) -> Result<(), capnp::Error> {
        let request = params.get()?;
        let change = cluster::read_setting(request.get_setting()?);
        let (seen, within) = (request.get_seen(), timeout(request.get_timeout_ms()));
        let done = match (self.service.load.enter(1, 0), change) {
            (Ok(_guard), Ok(change)) => self.change(change, seen, within).await,
            (Err(refusal), _) | (_, Err(refusal)) => Err(refusal),
        };
        answers::write_change(done, results.get().init_result());
        Ok(())
    }

    async fn recover_shard(
        self: Rc<Self>,
        params: admin::RecoverShardParams,
        mut results: admin::RecoverShardResults,
    ) -> Result<(), capnp::Error> {
        let request = params.get()?;
        let (shard, node) = (ShardId(request.get_shard()), NodeId(request.get_node()));
        let accepted = request.get_accept_data_loss();
        let deadline = Instant::now() + timeout(request.get_timeout_ms());
        let recovered = match self.service.load.enter(1, 0) {
            Ok(_guard) => self.recover(shard, node, accepted, deadline).await,
            Err(refusal) => Err(refusal),
        };
        answers::write_recovery(recovered, results.get().init_result());
        Ok(())
    }

    async fn verify_shard(
        self: Rc<Self>,
        params: admin::VerifyShardParams,
        mut results: admin::VerifyShardResults,
    ) -> Result<(), capnp::Error> {
        let request = params.get()?;
        let (shard, within) = (ShardId(request.get_shard()), timeout(request.get_timeout_ms()));
        let since = request.get_since();
        let check = match self.service.load.enter(1, 0) {
            Ok(_guard) => self.verify(shard, since, within).await,
            Err(refusal) => Err(refusal),
        };
        answers::write_check(check, results.get().init_result());
        Ok(())
    }

    async fn counters(
        self: Rc<Self>,
        _: admin::CountersParams,
        mut results: admin::CountersResults,
    ) -> Result<(), capnp::Error> {
        let counters = counters::read().await?;
        answers::write_counters(self.service.node.node(), &counters, results.get().init_counters());
        Ok(())
    }
}

impl Admin {
    async fn create(
        &self,
        name: String,
        replicas: u32,
        shards: u32,
        deadline: Instant,
    ) -> Result<(DatabaseRecord, bool), Refusal> {
        check_numbers(&name, replicas, shards)?;
        // What of the nodes is up is told by who proposes it: the plan travels in the command, and whoever applies it
        // looks at the plan and the map alone.
        let command = MetaCommand::CreateDatabase {
            shards: self.placement(&name, replicas, shards, deadline).await?,
            name,
            replicas,
        };
        let left = deadline.saturating_duration_since(Instant::now());
        let (record, created) = self.meta(command, left).await?;
        self.led(&record, deadline).await?;
        Ok((record, created))
    }

    /// A placement for a new database, on nodes that answer as far as they suffice. A node that has just started may
    /// not have heard of others that joined before, and others may be starting: that there are too few is believed
    /// only after a while.
    async fn placement(
        &self,
        name: &str,
        replicas: u32,
        shards: u32,
        deadline: Instant,
    ) -> Result<Vec<PlannedShard>, Refusal> {
        let until = deadline.min(Instant::now() + Duration::from_millis(PLAN_SETTLE_MS_MAX));
        loop {
            let map = self.service.node.map();
            if map.version == 0 {
                return Err(Refusal::Unavailable("starting".into()));
            }
            // Of one that is there already the plan is not looked at: it exists, whoever is up.
            let plan = match map.database(name) {
                Some(_) => plan_database(&map, name, replicas, shards),
                None => {
                    // Who hangs takes no more than half of the time: the other half is for making it.
                    let heard_by = Instant::now() + deadline.saturating_duration_since(Instant::now()) / 2;
                    let present = self.present(&map, heard_by).await;
                    plan_among(&map, name, replicas, shards, |node| present.is_up(node))
                }
            };
            match plan {
                Ok(plan) => return Ok(plan),
                Err(PlanError::TooFewNodes { .. } | PlanError::TooFewUp { .. })
                    if Instant::now() + LEADER_POLL.1 < until =>
                {
                    tokio::time::sleep(LEADER_POLL.1).await;
                }
                Err(error) => return Err(Refusal::Refused(why_no_plan(&map, &error))),
            }
        }
    }

    /// Drops a database, and waits until none of its shards can commit anything any more.
    async fn drop_everywhere(
        &self,
        name: String,
        id: Option<DatabaseId>,
        within: Duration,
    ) -> Result<(DatabaseRecord, bool), Refusal> {
        let deadline = Instant::now() + within;
        let dropped = self.meta(MetaCommand::DropDatabase { name, id }, within).await?;
        let settled = Instant::now() + Duration::from_millis(DROP_SETTLE_MS_MAX);
        self.ended(&dropped.0, deadline.min(settled)).await;
        Ok(dropped)
    }

    /// Waits until a majority of the replicas of each shard of a dropped database has ended: then no
    /// write that begins later is acknowledged by a leader that hasn't heard. Not beyond `deadline`: the
    /// database is dropped, whether or not nodes that are down or cut off have heard.
    async fn ended(&self, database: &DatabaseRecord, deadline: Instant) {
        let mut missing: BTreeSet<ShardId> = database.shards.iter().copied().collect();
        let mut pause = LEADER_POLL.0;
        loop {
            let map = self.service.node.map();
            let mut heard = Vec::new();
            let mut reports = std::pin::pin!(self.reports(&missing, deadline));
            // Looked at one by one: a node that hangs isn't needed for a majority.
            while !missing.is_empty()
                && let Some(report) = reports.next().await
            {
                heard.push(report);
                missing.retain(|id| map.shards.get(id).is_none_or(|shard| can_commit(shard, &heard)));
            }
            if missing.is_empty() {
                return;
            }
            if Instant::now() + pause >= deadline {
                let (name, shards) = (&database.name, missing.len());
                tracing::info!(name, shards, "a dropped database whose replicas haven't all heard");
                return;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LEADER_POLL.1);
        }
    }

    /// Has the metadata shard execute a command about a database.
    async fn meta(&self, command: MetaCommand, within: Duration) -> Result<(DatabaseRecord, bool), Refusal> {
        match self.execute(command, within).await? {
            MetaReply::Database { record, created } => Ok((record, created)),
            _ => Err(Refusal::Unknown("the metadata shard answered another question".into())),
        }
    }

    /// Has the metadata shard execute a command of operators. Returns the version of the map from which on it
    /// holds.
    async fn decide(&self, command: MetaCommand, within: Duration) -> Result<u64, Refusal> {
        match self.execute(command, within).await? {
            MetaReply::Done(version) => Ok(version),
            _ => Err(Refusal::Unknown("the metadata shard answered another question".into())),
        }
    }

    /// Has the metadata shard execute a command that it doesn't refuse.
    async fn execute(&self, command: MetaCommand, within: Duration) -> Result<MetaReply, Refusal> {
        let done = self.service.node.meta(command, within).await;
        // Which of its replicas was asked last is nothing to the caller.
        let leaderless = |refusal| match refusal {
            Refusal::NotLeader { .. } => Refusal::Unavailable("the metadata shard has no leader".into()),
            refusal => refusal,
        };
        match done.map_err(leaderless)? {
            MetaReply::Refused(MetaRefusal::NotFormed) => Err(Refusal::Unavailable("starting".into())),
            MetaReply::Refused(refused) => Err(refused.into()),
            reply => Ok(reply),
        }
    }

    /// Waits until each shard of a database has a leader, as the leaders themselves say.
    async fn led(&self, database: &DatabaseRecord, deadline: Instant) -> Result<(), Refusal> {
        let mut missing: BTreeSet<ShardId> = database.shards.iter().copied().collect();
        let mut pause = LEADER_POLL.0;
        loop {
            let mut reports = std::pin::pin!(self.reports(&missing, deadline));
            while !missing.is_empty()
                && let Some(report) = reports.next().await
            {
                for replica in report.replicas {
                    let leads = replica.group.is_some_and(|g| g.role == raft::StateRole::Leader);
                    if leads {
                        missing.remove(&replica.shard);
                    }
                }
            }
            if missing.is_empty() {
                return Ok(());
            }
            if Instant::now() + pause >= deadline {
                return Err(wire::not_yet(format!(
                    "database `{}` is there, but {} of its {} shards had no leader in time; see \
                     `pontoon status {}`",
                    database.name,
                    missing.len(),
                    database.shards.len(),
                    database.name
                )));
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LEADER_POLL.1);
        }
    }

    /// Reports of all nodes that hold a replica of one of `shards`, as they come; a node that doesn't
    /// answer is left out. A shard that the map doesn't have yet has no nodes.
    fn reports<'a>(
        &'a self,
        shards: &BTreeSet<ShardId>,
        deadline: Instant,
    ) -> impl Stream<Item = NodeReport> + use<'a> {
        let node = &self.service.node;
        let map = node.map();
        let members = shards.iter().filter_map(|shard| map.shards.get(shard));
        let holders: BTreeSet<NodeId> =
            members.flat_map(|shard| shard.members.iter().map(|m| m.node)).collect();
        let within = deadline.saturating_duration_since(Instant::now()).min(REPORT);
        let asked = holders.into_iter().map(|holder| {
            let address = map.nodes.get(&holder).map(|n| n.client_address.clone());
            async move {
                if holder == node.node() {
                    return Some(node.report().await);
                }
                let report = self.service.client.report(&address?, within).await;
                report.inspect_err(|error| tracing::debug!(error, "no report of a node")).ok()
            }
        });
        asked.collect::<FuturesUnordered<_>>().filter_map(std::future::ready)
    }

    async fn transfer(&self, shard: ShardId, to: NodeId, within: Duration) -> Result<(), Refusal> {
        let node = &self.service.node;
        let map = node.map();
        let record = map.shards.get(&shard);
        if record.is_some_and(|s| s.member_on(to).is_none()) {
            return Err(Refusal::Refused(format!("node {to} holds no replica of shard {shard}")));
        }
        let report = node.report().await;
        let here = report.replicas.into_iter().find(|r| r.shard == shard);
        let group = here.and_then(|replica| replica.group);
        if group.as_ref().is_some_and(|g| g.role == raft::StateRole::Leader) {
            if to == node.node() {
                return Ok(());
            }
            return node.transfer(shard, to, within).await;
        }
        let leader = group.and_then(|g| g.leader);
        Err(Refusal::NotLeader {
            shard,
            leader: leader.and_then(|leader| record.and_then(|s| s.node_of(leader))),
        })
    }
}

/// Whether a shard may still commit something, as far as `reports` tell: unless a majority of its nodes
/// say that they hold no replica of it. A node that doesn't say so may.
fn can_commit(shard: &ShardRecord, reports: &[NodeReport]) -> bool {
    let ended = |node: NodeId| {
        let report = reports.iter().find(|report| report.node == node);
        report.is_some_and(|report| report.replicas.iter().all(|replica| replica.shard != shard.id))
    };
    shard.members.iter().filter(|member| ended(member.node)).count() <= shard.members.len() / 2
}

/// Why there is no plan for a new database, and which nodes were passed over.
fn why_no_plan(map: &ClusterMap, error: &PlanError) -> String {
    let passed = map.nodes.values().filter(|node| !node.standing.takes_replicas());
    let told = passed.filter_map(|node| match node.standing {
        Standing::Pending => Some(format!("node {} waits to be accepted", node.id)),
        Standing::Draining => Some(format!("node {} is being drained", node.id)),
        Standing::Leaving => Some(format!("node {} is leaving", node.id)),
        Standing::Member | Standing::Removed => None,
    });
    let told: Vec<String> = told.take(PASSED_OVER_NAMED).collect();
    if let PlanError::TooFewUp { down, .. } = error {
        return format!(
            "{error} ({})",
            cluster::unanswered(down.iter().filter_map(|node| map.nodes.get(node)))
        );
    }
    match (error, told.as_slice()) {
        (PlanError::TooFewNodes { .. }, [_, ..]) => format!("{error} ({})", told.join(", ")),
        _ => error.to_string(),
    }
}

/// The rules for a new database that need no map.
fn check_numbers(name: &str, replicas: u32, shards: u32) -> Result<(), Refusal> {
    let legal = |c: u8| c.is_ascii_alphanumeric() || c == b'_' || c == b'-';
    if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.bytes().all(legal) {
        return Err(Refusal::Invalid(format!(
            "`{name}` can't name a database: use 1 to {NAME_BYTES_MAX} of A-Z, a-z, 0-9, `_`, `-`"
        )));
    }
    if !(1..=REPLICAS_MAX).contains(&replicas) {
        return Err(Refusal::Invalid(format!("{replicas} replicas: a shard has 1 to {REPLICAS_MAX}")));
    }
    if !(1..=SHARDS_MAX).contains(&shards) {
        return Err(Refusal::Invalid(format!("{shards} shards: a database has 1 to {SHARDS_MAX}")));
    }
    Ok(())
}

fn write_database_result(
    result: Result<(DatabaseRecord, bool), Refusal>,
    mut to: database_result::Builder<'_>,
) {
    match result {
        Ok((record, created)) => {
            to.set_created(created);
            write_database(&record, to.init_database());
        }
        Err(refusal) => write_refusal(&refusal, to.init_error()),
    }
}

fn write_void_result(result: Result<(), Refusal>, mut to: void_result::Builder<'_>) {
    match result {
        Ok(()) => to.set_ok(()),
        Err(refusal) => write_refusal(&refusal, to.init_error()),
    }
}

#[cfg(test)]
mod tests;
