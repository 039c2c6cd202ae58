//! Rebalancing: plans are made on the node that is asked, from its map and what all nodes tell; the metadata
//! shard refuses the ones that don't fit any more.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Admin;
use super::cluster::unanswered;
use super::survey::Reports;
use crate::client::admin::answers::{RebalanceOrder, RebalanceStatus};
use crate::ids::{NodeId, ShardId};
use crate::machine::command::MetaCommand;
use crate::placement::map::{
    ClusterMap, MemberRole, NodeRecord, RebalanceRecord, RebalanceState, ShardRecord,
};
use crate::placement::rebalance::{Known, Plan, ShardSize, plan_rebalance, plan_undo};
use crate::refusal::Refusal;

/// Over this time it is measured how much the nodes send: with the two surveys, who looks each second gets an
/// answer each second.
const RATE_WINDOW: Duration = Duration::from_millis(800);

impl Admin {
    pub(super) async fn plan(
        &self,
        leaders_only: bool,
        since: u64,
        deadline: Instant,
    ) -> Result<(Plan, Vec<NodeId>), Refusal> {
        let (map, known, silent) = self.facts(since, deadline).await?;
        let names = silent.iter().map(|node| node.id).collect();
        Ok((off_thread(move || plan_rebalance(&map, &known, leaders_only)).await?, names))
    }

    /// Begins a plan. What it returns is the version of a map in which this plan is the last one.
    pub(super) async fn start(
        &self,
        plan: u64,
        since: u64,
        seen: u64,
        deadline: Instant,
    ) -> Result<u64, Refusal> {
        // Each plan that moves anything has a name above 0. Where none was ever begun the last one is called so too, and
        // is at its end: it must not pass for one that was asked for.
        if plan == 0 {
            let text = "plan 0000000000000000 moves nothing: there is nothing to begin";
            return Err(Refusal::Refused(text.into()));
        }
        let (map, known, silent) = self.facts(since, deadline).await?;
        let last = map.rebalance.clone();
        if last.plan == plan && matches!(last.state, RebalanceState::Running | RebalanceState::Paused) {
            return Ok(map.version);
        }
        // The id tells which of the two kinds of plan it was.
        let wanted = off_thread(move || {
            let plans = [false, true].map(|leaders_only| plan_rebalance(&map, &known, leaders_only));
            plans.into_iter().find(|one| one.id == plan)
        });
        let Some(wanted) = wanted.await? else {
            // Whoever repeats what was in doubt learns that it was done.
            if is_done(&last, plan) {
                return Ok(self.service.node.map().version);
            }
            let silent = match silent.is_empty() {
                true => String::new(),
                false => format!(" ({})", unanswered(&silent)),
            };
            return Err(Refusal::Refused(format!(
                "plan {plan:016x} is stale: nodes, replicas or leaders have changed since{silent}; make a new one with \
                 `pontoon admin rebalance plan`"
            )));
        };
        self.begin(wanted, 0, seen, deadline).await
    }

    pub(super) async fn undo(
        &self,
        plan: u64,
        since: u64,
        seen: u64,
        deadline: Instant,
    ) -> Result<(u64, u64), Refusal> {
        let (map, known, _) = self.facts(since, deadline).await?;
        if let Some(way_back) = undone_already(&map, plan) {
            return Ok((way_back, map.version));
        }
        if map.rebalance.plan != plan {
            return Err(Refusal::Refused(format!(
                "plan {plan:016x} is not the last one, which is {:016x}",
                map.rebalance.plan
            )));
        }
        let way_back = off_thread(move || plan_undo(&map, &known)).await?;
        let way_back = way_back.map_err(|error| Refusal::Refused(error.to_string()))?;
        if way_back.targets.is_empty() {
            let text = format!("everything is where it was before plan {plan:016x}");
            return Err(Refusal::Refused(text));
        }
        let id = way_back.id;
        Ok((id, self.begin(way_back, plan, seen, deadline).await?))
    }

    pub(super) async fn control(
        &self,
        plan: u64,
        order: RebalanceOrder,
        seen: u64,
        deadline: Instant,
    ) -> Result<u64, Refusal> {
        // Where none was ever begun the last one is called so: what is cancelled must have been asked for.
        if plan == 0 {
            return Err(Refusal::Refused("no rebalancing was ever begun by plan 0000000000000000".into()));
        }
        let map = self.service.node.map();
        let (state, reason) = match order {
            RebalanceOrder::Pause => (RebalanceState::Paused, ""),
            RebalanceOrder::Resume => (RebalanceState::Running, ""),
            RebalanceOrder::Cancel => (RebalanceState::Cancelling, "cancelled by an operator"),
        };
        // It may have gone on since; the metadata shard has the last word.
        if map.rebalance.plan == plan {
            if (map.rebalance.state, order) == (RebalanceState::Idle, RebalanceOrder::Cancel) {
                return Ok(map.version);
            }
            allowed(map.rebalance.state, order).map_err(|why| Refusal::Refused(why.into()))?;
        }
        let command = MetaCommand::ControlRebalance { plan, state, reason: reason.into() };
        self.decide(command.seen(seen), left(deadline)).await
    }

    pub(super) async fn status(&self, since: u64, deadline: Instant) -> Result<RebalanceStatus, Refusal> {
        self.caught_up(since, deadline).await?;
        let reports = self.survey(&self.service.node.map(), deadline).await;
        let map = self.service.node.map();
        let mut status = progress(&map, &reports.sizes());
        status.stuck = reports.0.values().flat_map(|report| report.stuck.iter().cloned()).collect();
        if status.has_ended() && status.moving == 0 {
            status.rate = Some(0);
            return Ok(status);
        }
        if left(deadline) <= 2 * RATE_WINDOW {
            return Ok(status);
        }
        let began = Instant::now();
        tokio::time::sleep(RATE_WINDOW).await;
        let later = self.survey(&map, deadline).await;
        status.rate = Some(rate(&reports.sent(), &later.sent(), began.elapsed()));
        status.eta_s = eta(&status);
        Ok(status)
    }

    /// The map, what the nodes tell, and which of them tell nothing: a plan moves nothing to those.
    async fn facts(
        &self,
        since: u64,
        deadline: Instant,
    ) -> Result<(Arc<ClusterMap>, Known, Vec<NodeRecord>), Refusal> {
        self.caught_up(since, deadline).await?;
        let reports: Reports = self.survey_again(&self.service.node.map(), deadline).await;
        let map = self.service.node.map();
        let (known, silent) = (reports.known(&map), reports.silent(&map).cloned().collect());
        Ok((map, known, silent))
    }

    /// Begins a plan that takes back that of `undoes`, or, at 0, none.
    async fn begin(&self, plan: Plan, undoes: u64, seen: u64, deadline: Instant) -> Result<u64, Refusal> {
        let command = MetaCommand::BeginRebalance {
            plan: plan.id,
            undoes,
            targets: plan.targets,
            moves: plan.total.moves,
            bytes: plan.total.bytes,
        };
        self.decide(command.seen(seen), left(deadline)).await
    }
}

fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}

/// Great maps take a second or two, in which the thread has other clients.
async fn off_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Refusal> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| Refusal::Refused(format!("the planner failed: {error}; please report it")))
}

/// Whether this plan was the last, and came to its end. One that was cancelled didn't; 0 names none.
fn is_done(last: &RebalanceRecord, plan: u64) -> bool {
    plan != 0 && last.plan == plan && last.state == RebalanceState::Idle && last.reason.is_empty()
}

/// The plan that takes this one back, if that was begun, and wasn't given up.
fn undone_already(map: &ClusterMap, plan: u64) -> Option<u64> {
    let last = &map.rebalance;
    let goes_on = matches!(last.state, RebalanceState::Running | RebalanceState::Paused);
    (plan != 0 && last.undoes == plan && (goes_on || is_done(last, last.plan))).then_some(last.plan)
}

/// Whether a rebalancing in this state can be given the order; if not, why.
fn allowed(state: RebalanceState, order: RebalanceOrder) -> Result<(), &'static str> {
    use RebalanceOrder::{Cancel, Pause, Resume};
    use RebalanceState::{Cancelling, Failed, Idle, Paused, Running};
    match (state, order) {
        (Running | Paused, _) | (Cancelling, Cancel) => Ok(()),
        (Cancelling, Pause | Resume) => Err("the rebalancing is being cancelled"),
        (Idle, _) => Err("no rebalancing is under way"),
        (Failed, _) => Err("the last rebalancing has failed; start another"),
    }
}

/// How the last rebalancing is, by the map: what has moved is what isn't where it was before.
fn progress(map: &ClusterMap, sizes: &BTreeMap<ShardId, ShardSize>) -> RebalanceStatus {
    let last = &map.rebalance;
    let mut status = RebalanceStatus {
        plan: last.plan,
        state: last.state,
        total: last.moves,
        bytes_total: last.bytes,
        reason: last.reason.clone(),
        map_version: map.version,
        ..RebalanceStatus::default()
    };
    for shard in map.shards.values().filter(|shard| !shard.dropped) {
        status.moving += u32::from(shard.moving.is_some());
        let moved = u32::try_from(moved(shard, last.plan)).unwrap_or(u32::MAX);
        let bytes = sizes.get(&shard.id).map_or(0, |size| size.bytes);
        status.done = status.done.saturating_add(moved);
        status.bytes_done = status.bytes_done.saturating_add(bytes.saturating_mul(moved.into()));
    }
    // Other moves (of a drain, say) may have moved more, and shards grow.
    status.done = status.done.min(status.total);
    status.bytes_done = status.bytes_done.min(status.bytes_total);
    if status.state == RebalanceState::Idle && status.reason.is_empty() {
        // It came to its end, whatever has moved elsewhere since.
        status.done = status.total;
    }
    if status.done == status.total {
        status.bytes_done = status.bytes_total;
    }
    status
}

/// Voters of a shard that were not on their nodes before the rebalancing of this plan.
fn moved(shard: &ShardRecord, plan: u64) -> usize {
    let Some(before) = shard.previous.as_ref().filter(|before| before.plan == plan) else {
        return 0;
    };
    let before: BTreeSet<NodeId> = before.nodes.iter().copied().collect();
    let voters = shard.members.iter().filter(|member| member.role == MemberRole::Voter);
    voters.filter(|member| !before.contains(&member.node)).count()
}

/// Bytes per second that were sent between two surveys. A node that has restarted counts from then on; one
/// that was not heard both times is left out.
fn rate(before: &BTreeMap<NodeId, u64>, after: &BTreeMap<NodeId, u64>, within: Duration) -> u64 {
    let sent = |(node, after): (&NodeId, &u64)| Some(after.saturating_sub(*before.get(node)?));
    let bytes: u64 = after.iter().filter_map(sent).sum();
    (bytes as f64 / within.as_secs_f64().max(0.001)) as u64
}

/// Seconds until everything has moved, by the present rate.
fn eta(status: &RebalanceStatus) -> Option<u64> {
    let left = status.bytes_total.saturating_sub(status.bytes_done);
    let rate = status.rate.filter(|rate| *rate > 0)?;
    (status.state == RebalanceState::Running && left > 0).then(|| left.div_ceil(rate))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{DatabaseId, Epoch, ReplicaId};
    use crate::placement::map::{Member, ShardTarget};
    use crate::placement::ring::RingRange;

    /// A shard whose voters are on `now`, and were on `before` when plan 4 began.
    fn shard(id: u64, now: &[u64], before: &[u64]) -> ShardRecord {
        let member = |node: &u64| Member {
            replica: ReplicaId(10 * id + node),
            node: NodeId(*node),
            role: MemberRole::Voter,
        };
        ShardRecord {
            id: ShardId(id),
            database: DatabaseId(1),
            range: RingRange::ALL,
            epoch: Epoch { range: 1, conf: 1 },
            members: now.iter().map(member).collect(),
            dropped: false,
            moving: None,
            target: None,
            previous: Some(ShardTarget { plan: 4, nodes: before.iter().copied().map(NodeId).collect() }),
            changed_at: 1,
        }
    }

    fn map(state: RebalanceState, moves: u32, shards: Vec<ShardRecord>) -> ClusterMap {
        ClusterMap {
            version: 9,
            shards: shards.into_iter().map(|shard| (shard.id, shard)).collect(),
            rebalance: RebalanceRecord { plan: 4, state, moves, bytes: 400, ..RebalanceRecord::default() },
            ..ClusterMap::default()
        }
    }

    fn size(bytes: u64) -> ShardSize {
        ShardSize { keys: 1, bytes }
    }

    #[test]
    fn what_isnt_where_it_was_has_moved() {
        let shards = vec![shard(1, &[1, 2, 4], &[1, 2, 3]), shard(2, &[1, 2, 3], &[1, 2, 3])];
        let mut map = map(RebalanceState::Running, 3, shards);
        let sizes = BTreeMap::from([(ShardId(1), size(100)), (ShardId(2), size(300))]);
        let status = progress(&map, &sizes);
        assert_eq!((status.done, status.total, status.bytes_done, status.bytes_total), (1, 3, 100, 400));
        // One that comes doesn't count before it counts alone.
        map.shards.get_mut(&ShardId(1)).unwrap().members[2].role = MemberRole::Incoming;
        assert_eq!(progress(&map, &sizes).done, 0);
        // Of an older plan nothing is told, and a dropped shard has moved nowhere.
        map.shards.get_mut(&ShardId(1)).unwrap().members[2].role = MemberRole::Voter;
        map.rebalance.plan = 5;
        assert_eq!(progress(&map, &sizes).done, 0);
        map.rebalance.plan = 4;
        map.shards.get_mut(&ShardId(1)).unwrap().dropped = true;
        assert_eq!(progress(&map, &sizes).done, 0);
    }

    #[test]
    fn no_more_is_done_than_there_is() {
        let mut map = map(RebalanceState::Idle, 1, vec![shard(1, &[4, 5, 6], &[1, 2, 3])]);
        let status = progress(&map, &BTreeMap::from([(ShardId(1), size(1000))]));
        assert_eq!((status.done, status.bytes_done), (1, 400));
        // Whatever the sizes were estimated to be, when all is done all is done.
        assert_eq!(progress(&map, &BTreeMap::new()).bytes_done, 400);
        // Its end counts, not what came later; unless it was cancelled before that.
        map.shards.insert(ShardId(1), shard(1, &[1, 2, 3], &[1, 2, 3]));
        assert_eq!(progress(&map, &BTreeMap::new()).done, 1);
        map.rebalance.reason = "asked to".into();
        assert_eq!(progress(&map, &BTreeMap::new()).done, 0);
    }

    #[test]
    fn a_rate_is_of_those_that_were_heard_twice() {
        let before = BTreeMap::from([(NodeId(1), 100), (NodeId(2), 500), (NodeId(3), 7)]);
        let after = BTreeMap::from([(NodeId(1), 300), (NodeId(2), 0), (NodeId(4), 9_000)]);
        assert_eq!(rate(&before, &after, Duration::from_secs(2)), 100);
        let mut status = RebalanceStatus {
            state: RebalanceState::Running,
            bytes_done: 1,
            bytes_total: 202,
            rate: Some(100),
            ..RebalanceStatus::default()
        };
        assert_eq!(eta(&status), Some(3));
        for none in [Some(0), None] {
            status.rate = none;
            assert_eq!(eta(&status), None);
        }
        status = RebalanceStatus { rate: Some(9), state: RebalanceState::Paused, ..status };
        assert_eq!(eta(&status), None, "it would never end");
    }

    #[test]
    fn who_repeats_what_was_in_doubt_learns_that_it_was_done() {
        for (state, reason, done, undone) in [
            (RebalanceState::Running, "", false, true),
            (RebalanceState::Paused, "", false, true),
            (RebalanceState::Cancelling, "asked to", false, false),
            (RebalanceState::Idle, "", true, true),
            (RebalanceState::Idle, "asked to", false, false),
            (RebalanceState::Failed, "no room", false, false),
        ] {
            let mut map = map(state, 1, Vec::new());
            map.rebalance.reason = reason.into();
            map.rebalance.undoes = 3;
            assert_eq!(is_done(&map.rebalance, 4), done, "{state:?} {reason}");
            assert!(!is_done(&map.rebalance, 5));
            assert_eq!(undone_already(&map, 3), undone.then_some(4), "{state:?} {reason}");
            assert_eq!(undone_already(&map, 4), None);
            map.rebalance.undoes = 0;
            assert_eq!(undone_already(&map, 0), None, "there was none");
            assert!(!is_done(&RebalanceRecord::default(), 0), "there was none");
        }
    }
}
