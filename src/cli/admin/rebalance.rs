//! `admin rebalance ...`: plans, and what becomes of them.

use std::time::Duration;

use serde_json::{Value, json};

use super::args::{PlanArgs, RebalanceCommand, RebalanceStatusArgs, StartArgs, WaitArgs};
use super::change_failed;
use super::wait::{Progress, wait};
use crate::cli::context::{Context, Session, block_on, with_session};
use crate::cli::data::after_effect;
use crate::cli::failure::{Exit, Failure};
use crate::cli::output;
use crate::cli::serve::until_stopped;
use crate::cli::signals::Signals;
use crate::client::admin::answers::{RebalanceOrder, RebalancePlan, RebalanceStatus};
use crate::client::{ClientError, NotApplied};
use crate::ids::ShardId;
use crate::placement::map::RebalanceState;
use crate::placement::rebalance::MoveKind;

/// So often a plan is made and begun: each time the cluster may have changed in between.
const STARTS: u32 = 5;

/// So many moves are listed; `--json` lists all.
const LISTED: usize = 100;

/// So many shards that stand still are told of; `--json` has all.
const STUCK: usize = 5;

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
    })
}

fn plan_text(plan: &RebalancePlan) -> String {
    if plan.moves.is_empty() {
        return "nothing to do: replicas and leaders are where they should be".into();
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
    text
}

fn start(context: &Context, args: &StartArgs) -> Result<Exit, Failure> {
    let begun = with_session(context, async |session| {
        let begun = match args.plan {
            Some(plan) => begin(session, plan).await.map(|()| Some(plan))?,
            None => begin_any(session, args.leaders_only).await?,
        };
        // One that has begun by itself is what was wanted.
        let begun = match begun {
            None => under_way(session).await?,
            begun => begun,
        };
        if let Some(plan) = begun.filter(|_| args.wait.wait) {
            ended(context, session, plan).await?;
        }
        Ok(begun)
    })?;
    let Some(plan) = begun else {
        if context.json() {
            output::json(&json!({"plan_id": null, "started": false}))?;
        } else {
            output::line("nothing to do: replicas and leaders are where they should be")?;
        }
        return Ok(Exit::Done);
    };
    report_begun(context, plan, args.wait.wait)
}

fn report_begun(context: &Context, plan: u64, waited: bool) -> Result<Exit, Failure> {
    if context.json() {
        after_effect(output::json(&json!({"plan_id": name(plan), "started": true, "ended": waited})))?;
    } else {
        let told = if waited {
            "is done"
        } else {
            "is under way; `pontoon admin rebalance status` shows how far it is"
        };
        after_effect(output::line(format!("plan {} {told}", name(plan))))?;
    }
    Ok(Exit::Done)
}

async fn begin(session: &Session, plan: u64) -> Result<(), Failure> {
    let begun = session.client.start_rebalance(plan, session.remaining()).await;
    begun.map(drop).map_err(|error| change_failed(&format!("starting plan {}", name(plan)), STATUS, error))
}

/// Makes a plan and begins it, and again if the cluster changed in between. `None`: nothing to do.
async fn begin_any(session: &Session, leaders_only: bool) -> Result<Option<u64>, Failure> {
    let mut last = None;
    for _ in 0..STARTS {
        let plan = session.client.plan_rebalance(leaders_only, session.remaining()).await?;
        if plan.moves.is_empty() {
            return Ok(None);
        }
        match session.client.start_rebalance(plan.id, session.remaining()).await {
            Ok(_) => return Ok(Some(plan.id)),
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
async fn under_way(session: &Session) -> Result<Option<u64>, Failure> {
    let status = session.client.rebalance_status(session.remaining()).await?;
    Ok((!status.has_ended()).then_some(status.plan))
}

fn is_refusal(error: &ClientError) -> bool {
    matches!(error, ClientError::NotApplied(NotApplied::Refused(_)))
}

/// Waits until the rebalancing of this plan has ended. One that was cancelled or has failed is an error.
async fn ended(context: &Context, session: &Session, plan: u64) -> Result<(), Failure> {
    let mut cancelled = false;
    wait(context, session, &format!("rebalancing by plan {}", name(plan)), async || {
        let status = session.client.rebalance_status(session.timeout()).await?;
        cancelled |= status.state == RebalanceState::Cancelling;
        Ok(Progress {
            done: status.done.into(),
            total: status.total.into(),
            told: told(&status),
            end: end_of(&status, plan, cancelled),
        })
    })
    .await
}

/// How the rebalancing of `plan` has ended, if it has.
fn end_of(status: &RebalanceStatus, plan: u64, cancelled: bool) -> Option<Result<(), Failure>> {
    let early = |code, how: &str| {
        let why = if status.reason.is_empty() { String::new() } else { format!(": {}", status.reason) };
        let moved = format!("{} of {} replicas have moved", status.done, status.total);
        Some(Err(Failure::negative(code, format!("plan {} {how}{why}; {moved}", name(plan)))))
    };
    match status.state {
        // Another has begun since, so this one is over.
        _ if status.plan != plan => Some(Ok(())),
        RebalanceState::Failed => early("failed", "has failed"),
        RebalanceState::Idle if cancelled || (status.done < status.total && !status.reason.is_empty()) => {
            early("cancelled", "was cancelled")
        }
        RebalanceState::Idle => Some(Ok(())),
        RebalanceState::Running | RebalanceState::Paused | RebalanceState::Cancelling => None,
    }
}

/// Bytes, rate, estimate, and the state if it isn't the ordinary one.
fn told(status: &RebalanceStatus) -> String {
    let mut told = format!("{} of {}", output::size(status.bytes_done), output::size(status.bytes_total));
    if status.rate > 0 {
        told.push_str(&format!(", {}/s", output::size(status.rate)));
    }
    if let Some(seconds) = status.eta_s {
        told.push_str(&format!(", {} left", humantime::format_duration(Duration::from_secs(seconds))));
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
        return watch(context, interval);
    }
    let status = with_session(context, async |session| {
        Ok(session.client.rebalance_status(session.remaining()).await?)
    })?;
    print(context, &status)?;
    Ok(exit_of(&status))
}

/// Shows the status again and again. What goes wrong in between is told and doesn't end it.
fn watch(context: &Context, interval: Duration) -> Result<Exit, Failure> {
    let signals = Signals::listen(None)?;
    block_on(async {
        let Some(session) = until_stopped(&signals, context.connect()).await.transpose()? else {
            return Ok(Exit::Done);
        };
        let mut exit = Exit::Done;
        let watching = async {
            loop {
                match session.client.rebalance_status(session.timeout()).await {
                    Ok(status) => {
                        exit = exit_of(&status);
                        if !context.json() && output::on_terminal() {
                            // Home, and clear what is below: no flicker.
                            output::bytes(b"\x1b[H\x1b[J")?;
                        }
                        print(context, &status)?;
                    }
                    Err(error) => {
                        let failure = Failure::from(error);
                        exit = failure.exit;
                        output::failure(context.json(), &failure);
                    }
                }
                tokio::time::sleep(interval).await;
            }
        };
        let ended: Option<Result<std::convert::Infallible, Failure>> =
            until_stopped(&signals, watching).await;
        session.client.close().await;
        match ended {
            Some(Err(failure)) => Err(failure),
            Some(Ok(never)) => match never {},
            None => Ok(exit),
        }
    })
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
            match ended(context, session, status.plan).await {
                // That is what was asked for.
                Err(failure) if failure.code == "cancelled" => {}
                end => end?,
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
    let plan = with_session(context, async |session| {
        let status = session.client.rebalance_status(session.remaining()).await?;
        if status.plan == 0 {
            return Err(Failure::negative("nothing_to_undo", "there was no rebalancing yet"));
        }
        let begun = session.client.undo_rebalance(status.plan, session.remaining()).await;
        let plan = begun
            .map_err(|error| change_failed(&format!("undoing plan {}", name(status.plan)), STATUS, error))?;
        if args.wait {
            ended(context, session, plan).await?;
        }
        Ok(plan)
    })?;
    report_begun(context, plan, args.wait)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::NodeId;
    use crate::placement::rebalance::{PlannedMove, Totals};

    fn plan_of(moves: Vec<PlannedMove>) -> RebalancePlan {
        RebalancePlan {
            id: 0xab,
            map_version: 7,
            moves,
            total: Totals { moves: 1, keys: 10, bytes: 2048 },
            minimum: 1,
        }
    }

    fn moves() -> Vec<PlannedMove> {
        let one = |kind, keys, bytes| PlannedMove {
            shard: ShardId(4),
            from: NodeId(1),
            to: NodeId(3),
            kind,
            keys,
            bytes,
        };
        vec![one(MoveKind::Replica, 10, 2048), one(MoveKind::Leader, 0, 0)]
    }

    #[test]
    fn a_plan_has_the_documented_shape() {
        assert_eq!(
            plan_json(&plan_of(moves())).to_string(),
            concat!(
                r#"{"plan_id":"00000000000000ab","map_version":7,"#,
                r#""moves":[{"shard":4,"from":1,"to":3,"kind":"replica","bytes":2048,"keys":10},"#,
                r#"{"shard":4,"from":1,"to":3,"kind":"leader","bytes":0,"keys":0}],"#,
                r#""total":{"moves":1,"bytes":2048,"keys":10},"minimum":{"moves":1}}"#
            )
        );
        let text = plan_text(&plan_of(moves()));
        for part in [
            "1 replica to move (the least possible: 1), with 10 keys and 2.0 KiB; leadership of 1 shard",
            "pontoon admin rebalance start 00000000000000ab",
        ] {
            assert!(text.contains(part), "{part}:\n{text}");
        }
        assert!(plan_text(&plan_of(Vec::new())).starts_with("nothing to do"));
        let many = plan_text(&plan_of([moves(), moves()].concat().repeat(30)));
        assert!(many.contains("and 20 more"), "{many}");
    }

    #[test]
    fn a_status_has_the_documented_shape() {
        let mut status = RebalanceStatus {
            plan: 0xab,
            state: RebalanceState::Running,
            done: 1,
            total: 3,
            bytes_done: 1024,
            bytes_total: 4096,
            rate: 512,
            eta_s: Some(6),
            reason: String::new(),
            map_version: 9,
            moving: 2,
            stuck: Vec::new(),
        };
        assert_eq!(
            status_json(&status).to_string(),
            concat!(
                r#"{"state":"running","done":1,"total":3,"bytes_done":1024,"bytes_total":4096,"rate":512,"eta_s":6,"#,
                r#""plan_id":"00000000000000ab","moving":2,"reason":null,"stuck":[]}"#
            )
        );
        assert_eq!(
            status_text(&status),
            "running, plan 00000000000000ab: 1 of 3 replicas moved, 1.0 KiB of 4.0 KiB, 512 B/s, 6s left; 2 shards \
             changing members now"
        );
        status = RebalanceStatus { state: RebalanceState::Failed, eta_s: None, rate: 0, ..status };
        status.reason = "no node\ncan".into();
        assert_eq!(exit_of(&status), Exit::Negative);
        assert!(status_text(&status).ends_with("; no node\\ncan"), "one line");
        assert!(status_json(&status).to_string().contains(r#""eta_s":null"#));
        status.stuck = (1..=7).map(|shard| (ShardId(shard), format!("reason {shard}"))).collect();
        let text = status_text(&status);
        assert!(text.contains("\nshard 5 stands still: reason 5\nand 2 more"), "{text}");
        assert_eq!(status_json(&status)["stuck"][6]["why"], "reason 7");
        for (state, word) in [
            (RebalanceState::Idle, "idle"),
            (RebalanceState::Running, "running"),
            (RebalanceState::Paused, "paused"),
            (RebalanceState::Cancelling, "cancelling"),
            (RebalanceState::Failed, "failed"),
        ] {
            assert_eq!(state_name(state), word);
        }
    }

    #[test]
    fn a_wait_ends_as_the_rebalancing_did() {
        let status = |state, done, reason: &str| RebalanceStatus {
            plan: 4,
            state,
            done,
            total: 3,
            reason: reason.into(),
            ..RebalanceStatus::default()
        };
        let code = |status: &RebalanceStatus, cancelled| {
            end_of(status, 4, cancelled).map(|end| end.err().map(|failure| failure.code))
        };
        assert_eq!(code(&status(RebalanceState::Running, 1, ""), false), None);
        assert_eq!(code(&status(RebalanceState::Paused, 1, ""), false), None);
        assert_eq!(code(&status(RebalanceState::Cancelling, 1, ""), true), None);
        assert_eq!(code(&status(RebalanceState::Idle, 3, ""), false), Some(None));
        // A database was dropped meanwhile: nobody gave up.
        assert_eq!(code(&status(RebalanceState::Idle, 2, ""), false), Some(None));
        assert_eq!(code(&status(RebalanceState::Idle, 2, "asked to"), false), Some(Some("cancelled")));
        assert_eq!(code(&status(RebalanceState::Idle, 2, ""), true), Some(Some("cancelled")));
        assert_eq!(code(&status(RebalanceState::Failed, 2, "no room"), false), Some(Some("failed")));
        assert!(matches!(end_of(&status(RebalanceState::Running, 0, ""), 5, false), Some(Ok(()))));
    }
}
