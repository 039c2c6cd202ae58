//! `admin rebalance ...`: plans, and what becomes of them.

use std::time::Duration;

use serde_json::{Value, json};

use super::args::{PlanArgs, RebalanceCommand, RebalanceStatusArgs, StartArgs, WaitArgs};
use super::wait::{Progress, wait};
use super::{change_failed, node};
use crate::cli::context::{Context, Session, with_session};
use crate::cli::data::after_effect;
use crate::cli::failure::{Exit, Failure};
use crate::cli::output;
use crate::cli::overview::ShardView;
use crate::cli::status::{REPORT_TIMEOUT, Reports};
use crate::cli::watching::watch;
use crate::client::admin::answers::{RebalanceOrder, RebalancePlan, RebalanceStatus};
use crate::client::{ClientError, NotApplied};
use crate::ids::{NodeId, ShardId};
use crate::placement::map::{ClusterMap, RebalanceState, ShardRecord};
use crate::placement::rebalance::MoveKind;

/// So often a plan is made and begun: each time the cluster may have changed in between.
const STARTS: u32 = 5;

/// So many moves are listed; `--json` lists all.
const LISTED: usize = 100;

/// So many shards that stand still are told of; `--json` has all.
const STUCK: usize = 5;

/// So many nodes that don't answer are named; `--json` has all.
const SILENT: usize = 8;

/// What there is to say of a plan without moves.
const NOTHING: &str = "nothing to do: replicas and leaders are where they should be";

/// How to find out what became of an order.
const STATUS: &str = "`pontoon admin rebalance status` tells";

/// `admin rebalance ...`
pub fn rebalance(context: &Context, command: &RebalanceCommand) -> Result<Exit, Failure> {
    match command {
        RebalanceCommand::Plan(args) => plan(context, args),
        RebalanceCommand::Start(args) => start(context, args),
        RebalanceCommand::Status(args) => status(context, args),
        RebalanceCommand::Pause => control(context, RebalanceOrder::Pause, None),
        RebalanceCommand::Resume => control(context, RebalanceOrder::Resume, None),
        RebalanceCommand::Cancel(args) => control(context, RebalanceOrder::Cancel, Some(args)),
        RebalanceCommand::Undo(args) => undo(context, args),
    }
}

/// A plan's name: JSON numbers don't hold 64 bits everywhere.
fn name(plan: u64) -> String {
    format!("{plan:016x}")
}

fn kind_name(kind: MoveKind) -> &'static str {
    match kind {
        MoveKind::Replica => "replica",
        MoveKind::Leader => "leader",
    }
}

fn state_name(state: RebalanceState) -> &'static str {
    match state {
        RebalanceState::Idle => "idle",
        RebalanceState::Running => "running",
        RebalanceState::Paused => "paused",
        RebalanceState::Cancelling => "cancelling",
        RebalanceState::Failed => "failed",
    }
}

fn plan(context: &Context, args: &PlanArgs) -> Result<Exit, Failure> {
    let plan = with_session(context, async |session| {
        Ok(session.client.plan_rebalance(args.leaders_only, session.remaining()).await?)
    })?;
    if context.json() {
        output::json(&plan_json(&plan))?
    } else {
        output::line(plan_text(&plan))?
    }
    Ok(Exit::Done)
}

fn plan_json(plan: &RebalancePlan) -> Value {
    let moves = plan.moves.iter().map(|one| {
        json!({
            "shard": one.shard.0,
            "from": one.from.0,
            "to": one.to.0,
            "kind": kind_name(one.kind),
            "bytes": one.bytes,
            "keys": one.keys,
        })
    });
    json!({
        "plan_id": name(plan.id),
        "map_version": plan.map_version,
        "moves": moves.collect::<Value>(),
        "total": {"moves": plan.total.moves, "bytes": plan.total.bytes, "keys": plan.total.keys},
        "minimum": {"moves": plan.minimum},
        "shards_left": plan.left,
        "silent": plan.silent.iter().map(|node| node.0).collect::<Value>(),
    })
}

fn plan_text(plan: &RebalancePlan) -> String {
    if plan.moves.is_empty() {
        return format!("{NOTHING}{}", silent_text(&plan.silent));
    }
    let mut table = output::table(&["shard", "kind", "from", "to", "keys", "size"]);
    for one in plan.moves.iter().take(LISTED) {
        let copied = one.kind == MoveKind::Replica;
        table.add_row([
            one.shard.to_string(),
            kind_name(one.kind).to_owned(),
            one.from.to_string(),
            one.to.to_string(),
            if copied { one.keys.to_string() } else { "-".into() },
            if copied { output::size(one.bytes) } else { "-".into() },
        ]);
    }
    let mut text = table.to_string();
    if plan.moves.len() > LISTED {
        text.push_str(&format!("\nand {} more; --json lists all", plan.moves.len() - LISTED));
    }
    let leaders = plan.moves.iter().filter(|one| one.kind == MoveKind::Leader).count();
    text.push_str(&format!(
        "\n{} to move (the least possible: {}), with {} and {}; leadership of {}\nbegin it with `pontoon admin \
         rebalance start {}`",
        output::count(plan.total.moves, "replica"),
        plan.minimum,
        output::count(plan.total.keys, "key"),
        output::size(plan.total.bytes),
        output::count(leaders as u64, "shard"),
        name(plan.id)
    ));
    text.push_str(&left_text(plan.left));
    text.push_str(&silent_text(&plan.silent));
    text
}

/// Who wasn't heard when a plan was made. It may look as if they were left out for good.
fn silent_text(silent: &[NodeId]) -> String {
    if silent.is_empty() {
        return String::new();
    }
    let named: Vec<_> = silent.iter().take(SILENT).map(NodeId::to_string).collect();
    let more = if silent.len() > SILENT { ", …" } else { "" };
    format!("\nno answer from node {}{more}: nothing moves there", named.join(", "))
}

/// A plan that is under way.
#[derive(Clone, Copy, Debug, Default)]
struct Begun {
    plan: u64,
    /// Shards that it leaves for another plan.
    left: u32,
    /// Once it has ended: how many of its shards are led by whom it wants, and how many it has.
    leaders: Option<(usize, usize)>,
}

fn start(context: &Context, args: &StartArgs) -> Result<Exit, Failure> {
    let begun = with_session(context, async |session| {
        let begun = match args.plan {
            Some(plan) => begin(session, plan).await.map(|()| Ok(Begun { plan, ..Begun::default() }))?,
            None => begin_any(session, args.leaders_only).await?,
        };
        // One that has begun by itself is what was wanted.
        let begun = match begun {
            Err(silent) => under_way(session).await?.ok_or(silent),
            begun => begun,
        };
        match begun {
            Ok(begun) if args.wait.wait => finished(context, session, begun).await.map(Ok),
            begun => Ok(begun),
        }
    })?;
    let silent = match begun {
        Ok(begun) => return report_begun(context, &begun),
        Err(silent) => silent,
    };
    if context.json() {
        let silent: Value = silent.iter().map(|node| node.0).collect();
        output::json(&json!({"plan_id": null, "started": false, "silent": silent}))?;
    } else {
        output::line(format!("{NOTHING}{}", silent_text(&silent)))?;
    }
    Ok(Exit::Done)
}

fn report_begun(context: &Context, begun: &Begun) -> Result<Exit, Failure> {
    if context.json() {
        after_effect(output::json(&begun_json(begun)))?;
    } else {
        after_effect(output::line(begun_text(begun)))?;
    }
    Ok(Exit::Done)
}

fn begun_json(begun: &Begun) -> Value {
    json!({
        "plan_id": name(begun.plan),
        "started": true,
        "ended": begun.leaders.is_some(),
        "shards_left": begun.left,
        "leaders": begun.leaders.map(|(placed, total)| json!({"placed": placed, "total": total})),
    })
}

fn begun_text(begun: &Begun) -> String {
    let mut text = match begun.leaders {
        Some((placed, total)) => {
            let shards = output::count(total as u64, "shard");
            format!("plan {} is done; {placed} of its {shards} are led as it wants", name(begun.plan))
        }
        None => format!(
            "plan {} is under way; `pontoon admin rebalance status` shows how far it is",
            name(begun.plan)
        ),
    };
    text.push_str(&left_text(begun.left));
    text
}

/// What a plan leaves, for it is too great for one.
fn left_text(left: u32) -> String {
    if left == 0 {
        return String::new();
    }
    format!(
        "\nleft for another plan: {}; start again when this one is done",
        output::count(left, "more shard")
    )
}

async fn begin(session: &Session, plan: u64) -> Result<(), Failure> {
    let begun = session.client.start_rebalance(plan, session.remaining()).await;
    begun.map(drop).map_err(|error| change_failed(&format!("starting plan {}", name(plan)), STATUS, error))
}

/// Makes a plan and begins it, and again if the cluster changed in between. Where there is nothing to do: which nodes the
/// plan was made without.
async fn begin_any(session: &Session, leaders_only: bool) -> Result<Result<Begun, Vec<NodeId>>, Failure> {
    let mut last = None;
    for _ in 0..STARTS {
        let plan = session.client.plan_rebalance(leaders_only, session.remaining()).await?;
        if plan.moves.is_empty() {
            return Ok(Err(plan.silent));
        }
        match session.client.start_rebalance(plan.id, session.remaining()).await {
            Ok(_) => return Ok(Ok(Begun { plan: plan.id, left: plan.left, leaders: None })),
            // The same plan again: it wasn't stale, something else is the matter.
            Err(error) if !is_refusal(&error) || last == Some(plan.id) => {
                return Err(change_failed(&format!("starting plan {}", name(plan.id)), STATUS, error));
            }
            Err(_) => last = Some(plan.id),
        }
    }
    Err(Failure::negative("stale", "the cluster changes faster than a plan can be begun; try again later"))
}

/// The plan that is being carried out.
async fn under_way(session: &Session) -> Result<Option<Begun>, Failure> {
    let status = session.client.rebalance_status(session.remaining()).await?;
    Ok((!status.has_ended()).then_some(Begun { plan: status.plan, ..Begun::default() }))
}

fn is_refusal(error: &ClientError) -> bool {
    matches!(error, ClientError::NotApplied(NotApplied::Refused(_)))
}

/// Waits for the end of a plan that has begun, and looks who leads then.
async fn finished(context: &Context, session: &Session, begun: Begun) -> Result<Begun, Failure> {
    let end = async {
        ended(context, session, begun.plan).await?;
        let map = session.client.map().await?;
        let reports = node::reports(session, &map, REPORT_TIMEOUT / 2).await;
        Ok(Begun { leaders: Some(led_as_planned(&map, &reports, begun.plan)), ..begun })
    };
    end.await.map_err(|failure: Failure| failure.after(&format!("plan {} was begun", name(begun.plan))))
}

/// Of how many shards of a plan the leader is the one that it wants, and how many shards it has. One that has
/// arrived has its members in the order of the plan, who should lead first.
fn led_as_planned(map: &ClusterMap, reports: &Reports, plan: u64) -> (usize, usize) {
    let of_plan = |shard: &&ShardRecord| {
        !shard.dropped && shard.previous.as_ref().is_some_and(|before| before.plan == plan)
    };
    let shards: Vec<&ShardRecord> = map.shards.values().filter(of_plan).collect();
    let placed = shards.iter().filter(|shard| {
        let wanted = shard.members.first().map(|member| member.node);
        wanted.is_some() && ShardView::new(map, shard, reports).leader == wanted
    });
    (placed.count(), shards.len())
}

/// Waits until the rebalancing of this plan has ended. One that was cancelled, has failed, or was followed by
/// another before its end was seen is an error.
async fn ended(context: &Context, session: &Session, plan: u64) -> Result<(), Failure> {
    let mut seen = Seen::default();
    wait(context, session, &format!("rebalancing by plan {}", name(plan)), async || {
        let status = session.client.rebalance_status(session.timeout()).await?;
        let obstacle = status.stuck.first().map(|(shard, why)| format!("shard {shard}: {why}"));
        seen.look(&status, plan);
        Ok(Progress {
            done: status.done.into(),
            total: status.total.into(),
            unit: "replicas",
            told: told(&status),
            eta_s: status.eta_s,
            obstacle,
            end: seen.end(&status, plan),
        })
    })
    .await
}

/// What was seen of a plan until now.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    cancelled: bool,
    /// Replicas that had moved, of how many.
    moved: Option<(u32, u32)>,
}

impl Seen {
    fn look(&mut self, status: &RebalanceStatus, plan: u64) {
        if status.plan == plan {
            self.cancelled |= status.state == RebalanceState::Cancelling;
            self.moved = Some((status.done, status.total));
        }
    }

    /// How the rebalancing of `plan` has ended, if it has.
    fn end(self, status: &RebalanceStatus, plan: u64) -> Option<Result<(), Failure>> {
        let told = |code, how: &str, why: &str| {
            let mut text = format!("plan {} {how}", name(plan));
            if !why.is_empty() {
                text.push_str(&format!(": {why}"));
            }
            if let Some((done, total)) = self.moved {
                text.push_str(&format!("; {done} of {total} replicas have moved"));
            }
            Some(Err(Failure::negative(code, text)))
        };
        let early = |code, how| told(code, how, &status.reason);
        match status.state {
            // All had moved: only leadership was left.
            _ if status.plan != plan
                && self.moved.is_some_and(|(done, total)| total > 0 && done == total) =>
            {
                Some(Ok(()))
            }
            _ if status.plan != plan => {
                let how = format!("was superseded by plan {} before its end was seen", name(status.plan));
                told("superseded", &how, "")
            }
            RebalanceState::Failed => early("failed", "has failed"),
            RebalanceState::Idle
                if self.cancelled || (status.done < status.total && !status.reason.is_empty()) =>
            {
                early("cancelled", "was cancelled")
            }
            RebalanceState::Idle => Some(Ok(())),
            RebalanceState::Running | RebalanceState::Paused | RebalanceState::Cancelling => None,
        }
    }
}

/// Bytes, rate, and the state if it isn't the ordinary one.
fn told(status: &RebalanceStatus) -> String {
    let mut told = format!("{} of {}", output::size(status.bytes_done), output::size(status.bytes_total));
    if let Some(rate @ 1..) = status.rate {
        told.push_str(&format!(", {}/s", output::size(rate)));
    }
    if matches!(status.state, RebalanceState::Paused | RebalanceState::Cancelling) {
        told.push_str(&format!(", {}", state_name(status.state)));
    }
    told
}

fn status_json(status: &RebalanceStatus) -> Value {
    let stuck = status.stuck.iter().map(|(shard, why)| json!({"shard": shard.0, "why": why}));
    json!({
        "state": state_name(status.state),
        "done": status.done,
        "total": status.total,
        "bytes_done": status.bytes_done,
        "bytes_total": status.bytes_total,
        "rate": status.rate,
        "eta_s": status.eta_s,
        "plan_id": if status.plan == 0 { Value::Null } else { name(status.plan).into() },
        "moving": status.moving,
        "reason": if status.reason.is_empty() { Value::Null } else { status.reason.as_str().into() },
        "stuck": stuck.collect::<Value>(),
    })
}

fn status_text(status: &RebalanceStatus) -> String {
    if status.plan == 0 {
        let mut text = "idle; there was no rebalancing yet".to_owned();
        stuck_text(&mut text, &status.stuck);
        return text;
    }
    let mut text = format!(
        "{}, plan {}: {} of {} moved, {}",
        state_name(status.state),
        name(status.plan),
        status.done,
        output::count(status.total, "replica"),
        told(status)
    );
    if let Some(seconds) = status.eta_s {
        text.push_str(&format!(", {} left", humantime::format_duration(Duration::from_secs(seconds))));
    }
    if status.moving > 0 {
        text.push_str(&format!("; {} changing members now", output::count(status.moving, "shard")));
    }
    if !status.reason.is_empty() {
        text.push_str(&format!("; {}", output::printable(status.reason.as_bytes())));
    }
    stuck_text(&mut text, &status.stuck);
    text
}

/// Adds a line for each of the first few shards for which something stands still.
fn stuck_text(text: &mut String, stuck: &[(ShardId, String)]) {
    for (shard, why) in stuck.iter().take(STUCK) {
        text.push_str(&format!("\nshard {shard} stands still: {}", output::printable(why.as_bytes())));
    }
    if stuck.len() > STUCK {
        text.push_str(&format!("\nand {} more", stuck.len() - STUCK));
    }
}

fn exit_of(status: &RebalanceStatus) -> Exit {
    if status.state == RebalanceState::Failed { Exit::Negative } else { Exit::Done }
}

fn print(context: &Context, status: &RebalanceStatus) -> Result<(), Failure> {
    if context.json() { output::json(&status_json(status)) } else { output::line(status_text(status)) }
}

fn status(context: &Context, args: &RebalanceStatusArgs) -> Result<Exit, Failure> {
    if let Some(interval) = args.watch {
        let look = async |session: &Session| {
            let status = session.client.rebalance_status(session.timeout()).await;
            status.map_err(Failure::from)
        };
        return watch(context, interval, look, |status| print(context, status), exit_of);
    }
    let status = with_session(context, async |session| {
        Ok(session.client.rebalance_status(session.remaining()).await?)
    })?;
    print(context, &status)?;
    Ok(exit_of(&status))
}

fn control(context: &Context, order: RebalanceOrder, args: Option<&WaitArgs>) -> Result<Exit, Failure> {
    let (verb, done) = match order {
        RebalanceOrder::Pause => ("pausing", "paused: moves under way end, none is begun"),
        RebalanceOrder::Resume => ("resuming", "goes on"),
        RebalanceOrder::Cancel => {
            ("cancelling", "is being cancelled: moves under way end or are rolled back")
        }
    };
    let waits = args.is_some_and(|args| args.wait);
    let plan = with_session(context, async |session| {
        let status = session.client.rebalance_status(session.remaining()).await?;
        if status.has_ended() {
            let text = format!("no rebalancing is under way: it is {}", state_name(status.state));
            return Err(Failure::negative("nothing_under_way", text));
        }
        let ordered = session.client.control_rebalance(status.plan, order, session.remaining()).await;
        ordered
            .map_err(|error| change_failed(&format!("{verb} plan {}", name(status.plan)), STATUS, error))?;
        if waits {
            let decided = format!("plan {} is being cancelled", name(status.plan));
            match ended(context, session, status.plan).await {
                // That is what was asked for; and it is over, if another has begun.
                Err(failure) if matches!(failure.code, "cancelled" | "superseded") => {}
                end => end.map_err(|failure| failure.after(&decided))?,
            }
        }
        Ok(status.plan)
    })?;
    if context.json() {
        let mut object = json!({"plan_id": name(plan), "ended": waits});
        object["order"] = match order {
            RebalanceOrder::Pause => "pause",
            RebalanceOrder::Resume => "resume",
            RebalanceOrder::Cancel => "cancel",
        }
        .into();
        after_effect(output::json(&object))?;
    } else {
        after_effect(output::line(format!(
            "plan {} {}",
            name(plan),
            if waits { "has ended" } else { done }
        )))?;
    }
    Ok(Exit::Done)
}

fn undo(context: &Context, args: &WaitArgs) -> Result<Exit, Failure> {
    let begun = with_session(context, async |session| {
        let status = session.client.rebalance_status(session.remaining()).await?;
        if status.plan == 0 {
            return Err(Failure::negative("nothing_to_undo", "there was no rebalancing yet"));
        }
        let begun = session.client.undo_rebalance(status.plan, session.remaining()).await;
        let plan = begun
            .map_err(|error| change_failed(&format!("undoing plan {}", name(status.plan)), STATUS, error))?;
        let begun = Begun { plan, ..Begun::default() };
        if args.wait { finished(context, session, begun).await } else { Ok(begun) }
    })?;
    report_begun(context, &begun)
}

#[cfg(test)]
mod tests;
