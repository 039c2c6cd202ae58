//! Commands of the `machine` scripts that change who holds what, and how a map is printed.

use pontoon::ids::{NodeId, ReplicaId, ShardId};
use pontoon::machine::command::{MetaCommand, PlannedTarget, PolicyChange};
use pontoon::placement::map::{
    MapDelta, Member, MemberRole, MoveCause, RebalanceState, ShardRecord, ShardTarget, Standing,
};

use crate::script;

/// The command of a line; none if it is of another kind.
pub fn command(line: &script::Command) -> Result<Option<MetaCommand>, String> {
    let command = plain_command(line)?;
    Ok(match command {
        Some(command) if command.is_order() => Some(command.seen(line.named_number("seen", 0)?)),
        command => command,
    })
}

fn plain_command(line: &script::Command) -> Result<Option<MetaCommand>, String> {
    Ok(Some(match line.name.as_str() {
        "standing" => MetaCommand::SetStanding {
            node: NodeId(line.number(0)?),
            standing: named(&line.text(1)?, &STANDINGS)?,
        },
        "observe" => MetaCommand::ObserveShard {
            shard: ShardId(line.number(0)?),
            conf: line.number(1)?,
            members: line.words_from(2).into_iter().map(member).collect::<Result<_, _>>()?,
        },
        "move" => MetaCommand::BeginMove {
            shard: ShardId(line.number(0)?),
            conf: line.named_number("conf", 1)?,
            adds: numbers(&line.named_text("add")?.unwrap_or_default())?.into_iter().map(NodeId).collect(),
            removes: numbers(&line.named_text("remove")?.unwrap_or_default())?
                .into_iter()
                .map(ReplicaId)
                .collect(),
            cause: named(&line.named_text("cause")?.unwrap_or_else(|| "repair".into()), &CAUSES)?,
        },
        "cancel" => MetaCommand::CancelMove { shard: ShardId(line.number(0)?), id: line.number(1)? },
        "end" => MetaCommand::EndMove { shard: ShardId(line.number(0)?), id: line.number(1)? },
        "recover" => MetaCommand::RecoverShard {
            shard: ShardId(line.number(0)?),
            keep: ReplicaId(line.number(1)?),
            conf: line.number(2)?,
        },
        "replicas" => MetaCommand::SetReplicas { name: line.text(0)?, replicas: line.number(1)? },
        "policy" => MetaCommand::SetPolicy(match line.text(0)?.as_str() {
            "replace-after-ms" => PolicyChange::ReplaceAfterMs(line.number(1)?),
            "moves-at-a-time" => PolicyChange::MovesAtATime(line.number(1)?),
            "bytes-per-second" => PolicyChange::BytesPerSecond(line.number(1)?),
            "automatic" => PolicyChange::Automatic(line.number(1)?),
            "approve-joins" => PolicyChange::ApproveJoins(line.number(1)?),
            other => return Err(format!("unknown setting `{other}`")),
        }),
        "rebalance" => MetaCommand::BeginRebalance {
            plan: line.number(0)?,
            undoes: line.named_number("undoes", 0)?,
            targets: line.words_from(1).into_iter().map(target).collect::<Result<_, _>>()?,
            moves: line.named_number("moves", 0)?,
            bytes: line.named_number("bytes", 0)?,
        },
        "control" => MetaCommand::ControlRebalance {
            plan: line.number(0)?,
            state: named(&line.text(1)?, &STATES)?,
            reason: line.named_text("reason")?.unwrap_or_default(),
        },
        _ => return Ok(None),
    }))
}

const STANDINGS: [(&str, Standing); 5] = [
    ("member", Standing::Member),
    ("pending", Standing::Pending),
    ("draining", Standing::Draining),
    ("leaving", Standing::Leaving),
    ("removed", Standing::Removed),
];

const ROLES: [(&str, MemberRole); 4] = [
    ("voter", MemberRole::Voter),
    ("learner", MemberRole::Learner),
    ("incoming", MemberRole::Incoming),
    ("outgoing", MemberRole::Outgoing),
];

const CAUSES: [(&str, MoveCause); 4] = [
    ("rebalance", MoveCause::Rebalance),
    ("repair", MoveCause::Repair),
    ("drain", MoveCause::Drain),
    ("replicas", MoveCause::Replicas),
];

const STATES: [(&str, RebalanceState); 5] = [
    ("idle", RebalanceState::Idle),
    ("running", RebalanceState::Running),
    ("paused", RebalanceState::Paused),
    ("cancelling", RebalanceState::Cancelling),
    ("failed", RebalanceState::Failed),
];

fn named<T: Copy>(word: &str, all: &[(&str, T)]) -> Result<T, String> {
    let found = all.iter().find(|(name, _)| *name == word);
    found.map(|(_, value)| *value).ok_or_else(|| format!("unknown word `{word}`"))
}

fn name<T: PartialEq>(value: &T, all: &[(&'static str, T)]) -> &'static str {
    all.iter().find(|(_, known)| known == value).map_or("unknown", |(name, _)| name)
}

fn numbers(text: &str) -> Result<Vec<u64>, String> {
    let parts = text.split(',').filter(|part| !part.is_empty());
    parts.map(|part| part.parse().map_err(|_| format!("`{part}` is no number"))).collect()
}

/// `REPLICA:NODE[:ROLE]`.
fn member(word: &[u8]) -> Result<Member, String> {
    let text = String::from_utf8_lossy(word);
    let parts: Vec<&str> = text.split(':').collect();
    let [replica, node, role @ ..] = parts.as_slice() else {
        return Err(format!("`{text}` is not REPLICA:NODE[:ROLE]"));
    };
    let number = |text: &str| text.parse().map_err(|_| format!("`{text}` is no number"));
    let role = named(role.first().unwrap_or(&"voter"), &ROLES)?;
    Ok(Member { replica: ReplicaId(number(replica)?), node: NodeId(number(node)?), role })
}

/// `SHARD@CONF:NODE,…`.
fn target(word: &[u8]) -> Result<PlannedTarget, String> {
    let text = String::from_utf8_lossy(word);
    let parts = text.split_once(':').and_then(|(shard, nodes)| {
        let (shard, conf) = shard.split_once('@')?;
        Some((shard.parse().ok()?, conf.parse().ok()?, nodes))
    });
    let (shard, conf, nodes) = parts.ok_or_else(|| format!("`{text}` is not SHARD@CONF:NODE,…"))?;
    let nodes = numbers(nodes)?.into_iter().map(NodeId).collect();
    Ok(PlannedTarget { shard: ShardId(shard), conf, nodes })
}

/// A map, or what changed in it, line by line. What is as it always begins is left out.
pub fn print(delta: &MapDelta) -> String {
    let mut lines = vec![format!("version {}", delta.version)];
    lines.extend(delta.nodes.iter().map(|n| {
        let zone = if n.zone.is_empty() { "-" } else { &n.zone };
        let standing = match n.standing {
            Standing::Member => String::new(),
            other => format!(" {}", name(&other, &STANDINGS)),
        };
        format!(
            "node {} {} zone {zone} weight {}{standing} @{}",
            n.id, n.peer_address, n.weight, n.changed_at
        )
    }));
    lines.extend(delta.databases.iter().map(|d| {
        let dropped = if d.dropped { " dropped" } else { "" };
        let shards = list(&d.shards);
        format!("database {} `{}` shards {shards}{dropped} @{}", d.id, d.name, d.changed_at)
    }));
    lines.extend(delta.shards.iter().map(shard));
    lines.extend(delta.policy.filter(|policy| policy.changed_at > 0).map(|p| {
        format!(
            "policy replace after {} ms, {} moves at a time, {} bytes per second, automatic {}, approve joins {} @{}",
            p.replace_after_ms, p.moves_at_a_time, p.bytes_per_second, p.automatic, p.approve_joins, p.changed_at
        )
    }));
    lines.extend(delta.rebalance.iter().filter(|last| last.plan > 0).map(|last| {
        let (state, reason) = (name(&last.state, &STATES), &last.reason);
        format!(
            "rebalance {} {state} moves {} bytes {} `{reason}` @{}",
            last.plan, last.moves, last.bytes, last.changed_at
        )
    }));
    lines.join("\n")
}

fn shard(s: &ShardRecord) -> String {
    let mut line = format!(
        "shard {} {:016x}-{:016x} epoch {},{} replicas on nodes {}{} @{}",
        s.id,
        s.range.start,
        s.range.end,
        s.epoch.range,
        s.epoch.conf,
        members(&s.members),
        if s.dropped { " dropped" } else { "" },
        s.changed_at,
    );
    if let Some(moving) = &s.moving {
        let cancelling = if moving.cancelling { ", cancelling" } else { "" };
        line += &format!(
            "\n  move {} ({}{cancelling}) adds {} removes {}",
            moving.id,
            name(&moving.cause, &CAUSES),
            members(&moving.adds),
            list(&moving.removes),
        );
    }
    let planned = [("target", &s.target), ("previous", &s.previous)];
    for (what, ShardTarget { plan, nodes }) in planned.iter().filter_map(|(w, t)| Some((w, t.as_ref()?))) {
        line += &format!("\n  {what} of plan {plan}: nodes {}", list(nodes));
    }
    line
}

fn members(members: &[Member]) -> String {
    let member = |m: &Member| match m.role {
        MemberRole::Voter => format!("{}:{}", m.replica, m.node),
        role => format!("{}:{}:{}", m.replica, m.node, name(&role, &ROLES)),
    };
    members.iter().map(member).collect::<Vec<_>>().join(" ")
}

/// Ids with commas between them.
pub fn list(ids: &[impl ToString]) -> String {
    let ids: Vec<_> = ids.iter().map(ToString::to_string).collect();
    ids.join(",")
}
