//! Commands of the `balance` scripts, over the model of a cluster in model.rs.
//!
//! | command | does |
//! |---|---|
//! | `cluster N [zones=a,b,…]` | forms a cluster of N nodes, zones in turn |
//! | `database NAME REPLICAS SHARDS` | creates a database |
//! | `join [zone=] [weight=]` | a node joins |
//! | `kill NODE`, `start NODE` | a node ends, or begins again |
//! | `full NODE [no=yes]` | its disk is full, or isn't any more |
//! | `sick SHARD NODE` | the replica there doesn't serve any more |
//! | `standing NODE WORD` | `member`, `draining`, `leaving`, `removed` |
//! | `policy replace=SECONDS`, `moves=N`, `automatic=yes` | settings |
//! | `replicas NAME N` | how many each shard should have |
//! | `rebalance [leaders=yes]` | an operator plans and begins |
//! | `undo`, `pause`, `resume`, `cancel` | an operator decides about the last one |
//! | `cancel-move SHARD` | an operator rolls a move back |
//! | `lose N` | the next actions come to nothing |
//! | `forget` | another reconciler takes over |
//! | `run SECONDS [show=no]` | prints what is done, without what the map takes over |
//! | `quiet` | runs until nothing was done for a minute; prints how often what was done |
//! | `shards` | the nodes of each shard, its leader marked; `loads`: replicas and leaders of each node |
//! | `stuck` | what stands still |

use std::collections::BTreeMap;

use pontoon::balance::reconciler::Reconciler;
use pontoon::ids::{NodeId, ShardId};
use pontoon::machine::command::{MetaCommand, PolicyChange};
use pontoon::placement::map::{MemberRole, RebalanceState, Standing};
use pontoon::placement::rebalance::{Plan, plan_rebalance, plan_undo};

use crate::script::{Command, Interpreter};
use model::Model;

mod chaos;
mod model;

/// The cluster of one script.
#[derive(Default)]
pub struct Balance {
    model: Option<Model>,
}

impl Interpreter for Balance {
    fn execute(&mut self, line: &Command) -> Result<String, String> {
        if line.name == "cluster" {
            let zones = line.named_text("zones")?.unwrap_or_default();
            let zones: Vec<&str> = zones.split(',').collect();
            let count: usize = line.number(0)?;
            let nodes: Vec<_> = (0..count).map(|at| (zones[at % zones.len()].to_owned(), 100)).collect();
            self.model = Some(Model::form(&nodes));
            return Ok(String::new());
        }
        let model = self.model.as_mut().ok_or("there is no cluster yet")?;
        let node = |at| line.number(at).map(NodeId);
        let mut output = String::new();
        match line.name.as_str() {
            "database" => model.create(&line.text(0)?, line.number(1)?, line.number(2)?)?,
            "join" => {
                let zone = line.named_text("zone")?.unwrap_or_default();
                model.join(&zone, line.named_number("weight", 100)?);
            }
            "kill" => model.kill(node(0)?),
            "start" => model.start(node(0)?),
            "full" => {
                let machine = model.machines.get_mut(&node(0)?).ok_or("no such node")?;
                machine.disk_full = line.named("no").is_none();
            }
            "sick" => model.sicken(ShardId(line.number(0)?), node(1)?),
            "standing" => {
                let standing = match line.text(1)?.as_str() {
                    "member" => Standing::Member,
                    "draining" => Standing::Draining,
                    "leaving" => Standing::Leaving,
                    "removed" => Standing::Removed,
                    other => return Err(format!("unknown standing `{other}`")),
                };
                model.propose(MetaCommand::SetStanding { node: node(0)?, standing })?;
            }
            "policy" => {
                let mut changes = Vec::new();
                if let Some(seconds) = line.named_text("replace")? {
                    let seconds: u64 = seconds.parse().map_err(|_| "no number")?;
                    changes.push(PolicyChange::ReplaceAfterMs(1000 * seconds));
                }
                if let Some(moves) = line.named_text("moves")? {
                    changes.push(PolicyChange::MovesAtATime(moves.parse().map_err(|_| "no number")?));
                }
                if let Some(automatic) = line.named("automatic") {
                    changes.push(PolicyChange::Automatic(automatic == b"yes"));
                }
                for change in changes {
                    model.propose(MetaCommand::SetPolicy(change))?;
                }
            }
            "replicas" => {
                let (name, replicas) = (line.text(0)?, line.number(1)?);
                model.propose(MetaCommand::SetReplicas { name, replicas })?;
            }
            "rebalance" => {
                let leaders_only = line.named("leaders").is_some();
                let plan = plan_rebalance(&model.map, model.reconciler.known(), leaders_only);
                output = begin(model, plan)?;
            }
            "undo" => {
                let plan = plan_undo(&model.map, model.reconciler.known()).map_err(|e| e.to_string())?;
                output = begin(model, plan)?;
            }
            "pause" => control(model, RebalanceState::Paused)?,
            "resume" => control(model, RebalanceState::Running)?,
            "cancel" => control(model, RebalanceState::Cancelling)?,
            "cancel-move" => {
                let shard = ShardId(line.number(0)?);
                let moving = model.map.shards.get(&shard).and_then(|record| record.moving.as_ref());
                let id = moving.ok_or("it doesn't move")?.id;
                model.propose(MetaCommand::CancelMove { shard, id })?;
            }
            "lose" => model.lose = line.number(0)?,
            "forget" => model.reconciler = Reconciler::new(),
            "run" => {
                let seconds: u64 = line.number(0)?;
                let show = line.named("show") != Some(b"no");
                let mut lines = Vec::new();
                for second in 1..=seconds {
                    model.second();
                    let done = model.trace.drain(..).filter(|done| !done.starts_with("map: shard "));
                    lines.extend(done.map(|done| format!("{second:>3} {done}")));
                }
                if show {
                    output = lines.join("\n");
                }
            }
            "quiet" => output = quiet(model)?,
            "shards" => output = shards(model),
            "loads" => output = loads(model),
            "stuck" => {
                let stuck = model.reconciler.stuck();
                let lines = stuck.into_iter().map(|(shard, why)| format!("shard {shard}: {why}"));
                output = lines.collect::<Vec<_>>().join("\n");
            }
            other => return Err(format!("unknown command `{other}`")),
        }
        match model.wrongs.first() {
            Some(wrong) => Err(format!("a step that loses a quorum: {wrong}")),
            None => Ok(output),
        }
    }
}

fn begin(model: &mut Model, plan: Plan) -> Result<String, String> {
    if plan.targets.is_empty() {
        return Ok("nothing to do".into());
    }
    let (moves, bytes, minimum) = (plan.total.moves, plan.total.bytes, plan.minimum);
    let text = format!("{} shards, {moves} moves, {minimum} at least", plan.targets.len());
    let (plan, undoes, targets) = (plan.id, 0, plan.targets);
    model.propose(MetaCommand::BeginRebalance { plan, undoes, targets, moves, bytes })?;
    Ok(text)
}

fn control(model: &mut Model, state: RebalanceState) -> Result<(), String> {
    let plan = model.map.rebalance.plan;
    let reason = if state == RebalanceState::Cancelling { "by hand" } else { "" };
    model.propose(MetaCommand::ControlRebalance { plan, state, reason: reason.into() })
}

fn quiet(model: &mut Model) -> Result<String, String> {
    let mut counts: BTreeMap<String, u32> = BTreeMap::new();
    let (mut still, mut seconds) = (0, 0);
    while still < 60 {
        model.second();
        seconds += 1;
        still = if model.trace.is_empty() { still + 1 } else { 0 };
        for done in model.trace.drain(..) {
            let kind = ["observe", "begin", "end", "cancel", "leader", "add", "promote", "remove"];
            let word = |kind: &&&str| done.contains(&format!(" {kind} "));
            let mut kind = kind.iter().find(word).copied().unwrap_or(&done).to_owned();
            if done.starts_with("map: shard ") {
                kind = "observe".into();
            }
            if done.contains(": refused, ") {
                kind += " refused";
            }
            *counts.entry(kind).or_default() += 1;
        }
        if seconds > 20_000 {
            return Err(format!("it doesn't come to rest: {counts:?}"));
        }
    }
    let lines: Vec<_> = counts.into_iter().map(|(kind, count)| format!("{count} x {kind}")).collect();
    Ok(format!("{} seconds\n{}", seconds - 60, lines.join("\n")))
}

fn shards(model: &Model) -> String {
    let living = model.map.shards.values().filter(|shard| !shard.dropped);
    let line = |id: ShardId| {
        let leader = model.leader(id);
        let member = |member: &pontoon::placement::map::Member| {
            let role = match member.role {
                MemberRole::Voter if Some(member.node) == leader => "*",
                MemberRole::Voter => "",
                MemberRole::Learner => "?",
                MemberRole::Incoming => "+",
                MemberRole::Outgoing => "-",
            };
            format!("{}{role}", member.node)
        };
        let members: Vec<_> = model.members(id).iter().map(member).collect();
        format!("shard {id}: {}", members.join(" "))
    };
    living.map(|shard| line(shard.id)).collect::<Vec<_>>().join("\n")
}

fn loads(model: &Model) -> String {
    let mut loads: BTreeMap<NodeId, (u32, u32)> = model.map.nodes.keys().map(|id| (*id, (0, 0))).collect();
    for shard in model.map.shards.values().filter(|shard| !shard.dropped) {
        for member in model.members(shard.id) {
            loads.entry(member.node).or_default().0 += 1;
        }
        if let Some(leader) = model.leader(shard.id) {
            loads.entry(leader).or_default().1 += 1;
        }
    }
    let line = |(id, (replicas, leads))| format!("node {id}: {replicas} replicas, leads {leads}");
    loads.into_iter().map(line).collect::<Vec<_>>().join("\n")
}
