//! `admin node ...`: the nodes of the cluster, and what is decided about them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::args::{NodeAddArgs, NodeCommand, NodeDrainArgs, NodeRemoveArgs};
use super::wait::{Pace, Progress, wait};
use super::{change_failed, shards_on};
use crate::cli::context::{Context, Session, with_session};
use crate::cli::data::after_effect;
use crate::cli::failure::{Exit, Failure};
use crate::cli::output;
use crate::cli::overview::standing_name;
use crate::cli::status::{REPORT_TIMEOUT, Reports, ask};
use crate::ids::{METADATA_SHARD, NodeId, ShardId};
use crate::placement::map::{ClusterMap, NodeRecord, Standing};

mod list;

/// So many shards are named; of more, how many there are.
const NAMED: usize = 10;

/// Where no wait measures it, so long it is looked how fast a node is emptied.
const LOOK: Duration = Duration::from_secs(1);

/// How to find out what became of a decision.
const LIST: &str = "`pontoon admin node list` tells";

/// `admin node ...`
pub fn node(context: &Context, command: &NodeCommand) -> Result<Exit, Failure> {
    match command {
        NodeCommand::List(args) => list::list(context, args),
        NodeCommand::Add(args) => add(context, args),
        NodeCommand::Drain(args) if args.cancel => cancel_drain(context, args),
        NodeCommand::Drain(args) => drain(context, args),
        NodeCommand::Remove(args) => remove(context, args),
    }
}

/// All nodes of the map are asked at once; those that were removed aren't.
pub(super) async fn reports(session: &Session, map: &ClusterMap, patience: Duration) -> Reports {
    let there = map.nodes.values().filter(|node| node.standing != Standing::Removed).map(|node| node.id);
    ask(&session.client, map, there, patience).await
}

/// A map with that node, unless there is certainly none of that number.
async fn map_with(session: &Session, node: NodeId) -> Result<Arc<ClusterMap>, Failure> {
    let is_there = move |map: &ClusterMap| map.nodes.contains_key(&node);
    Ok(session.client.map_with(format!("a node {node}"), is_there).await?)
}

/// The record of a node.
fn find(map: &ClusterMap, node: NodeId) -> Result<&NodeRecord, Failure> {
    map.nodes.get(&node).ok_or_else(|| {
        let there = map.nodes.values().filter(|node| node.standing != Standing::Removed);
        let there: Vec<_> = there.map(|node| format!("{} ({})", node.id, node.label)).collect();
        Failure::negative("unknown_node", format!("there is no node {node}; there are: {}", there.join(", ")))
    })
}

fn wrong_standing(node: &NodeRecord, why: &str) -> Failure {
    let text = format!("node {} ({}) is {}: {why}", node.id, node.label, standing_name(node.standing));
    Failure::negative("wrong_standing", text)
}

async fn decide(
    session: &Session,
    node: &NodeRecord,
    standing: Standing,
    within: Duration,
) -> Result<(), Failure> {
    let decided = session.client.set_standing(node.id, standing, within).await;
    let what = format!("making node {} ({}) {}", node.id, node.label, standing_name(standing));
    decided.map(drop).map_err(|error| change_failed(&what, LIST, error))
}

fn add(context: &Context, args: &NodeAddArgs) -> Result<Exit, Failure> {
    let (node, was) = with_session(context, async |session| {
        let address = args.address.clone();
        let what = format!("a node at {address}");
        let map = session.client.map_with(what, move |map| at_address(map, &address).is_ok()).await?;
        let node = at_address(&map, &args.address)?;
        match node.standing {
            Standing::Pending => decide(session, node, Standing::Member, session.remaining()).await?,
            Standing::Member => {}
            _ => return Err(wrong_standing(node, "it has been let in before")),
        }
        Ok((node.clone(), node.standing))
    })?;
    let added = was == Standing::Pending;
    if context.json() {
        after_effect(output::json(&json!({"node": node.id.0, "standing": "member", "added": added})))?;
    } else {
        let done = if added { "let in:" } else { "a member already:" };
        after_effect(output::line(format!("{done} node {} ({}) at {}", node.id, node.label, args.address)))?;
    }
    Ok(Exit::Done)
}

/// The newest node that has this client or peer address.
fn at_address<'a>(map: &'a ClusterMap, address: &str) -> Result<&'a NodeRecord, Failure> {
    let has = |node: &&NodeRecord| node.client_address == address || node.peer_address == address;
    let there = map.nodes.values().rev().find(|node| has(node) && node.standing != Standing::Removed);
    there.ok_or_else(|| {
        let pending = map.nodes.values().filter(|node| node.standing == Standing::Pending);
        let pending: Vec<_> = pending.map(|node| node.client_address.as_str()).collect();
        let who = if pending.is_empty() { "no node".into() } else { pending.join(", ") };
        Failure::negative(
            "unknown_node",
            format!(
                "no node at {address} has asked to join ({who} waits to be let in). Start it first, with some \
                 members in cluster.join of its settings"
            ),
        )
    })
}

fn cancel_drain(context: &Context, args: &NodeDrainArgs) -> Result<Exit, Failure> {
    let node = with_session(context, async |session| {
        let map = map_with(session, args.node).await?;
        let node = find(&map, args.node)?;
        match node.standing {
            // Also one that was given up: what is left of it is kept then.
            Standing::Draining | Standing::Leaving => {
                decide(session, node, Standing::Member, session.remaining()).await?
            }
            Standing::Member => {}
            Standing::Pending | Standing::Removed => {
                return Err(wrong_standing(node, "no drain is under way"));
            }
        }
        Ok(node.clone())
    })?;
    if context.json() {
        after_effect(output::json(&json!({"node": node.id.0, "standing": "member"})))?;
    } else {
        after_effect(output::line(format!(
            "node {} ({}) takes replicas again; what has moved away comes back when it is rebalanced",
            node.id, node.label
        )))?;
    }
    Ok(Exit::Done)
}

fn drain(context: &Context, args: &NodeDrainArgs) -> Result<Exit, Failure> {
    let (node, left) = with_session(context, async |session| {
        let map = map_with(session, args.node).await?;
        let node = find(&map, args.node)?;
        match node.standing {
            Standing::Draining => {}
            Standing::Member => {
                let others = |other: &NodeRecord| other.id != node.id && takes_replicas(&map, other);
                if !map.nodes.values().any(others) {
                    return Err(Failure::negative(
                        "no_other_node",
                        format!("no other node takes replicas: node {} can't be emptied", node.id),
                    ));
                }
                decide(session, node, Standing::Draining, session.remaining()).await?;
            }
            _ => return Err(wrong_standing(node, "only a member can be drained")),
        }
        let (done, was) = (format!("node {} ({}) drains", node.id, node.label), node.standing);
        let left = emptied(context, session, node, args.wait, was == Standing::Draining).await;
        Ok((node.clone(), left.map_err(|failure| failure.after(&done))?))
    })?;
    if context.json() {
        after_effect(output::json(&left.json(node.id)))?;
    } else if left.shards.is_empty() {
        after_effect(output::line(format!(
            "node {id} ({}) is empty: stop it, or `pontoon admin node remove {id}`",
            node.label,
            id = node.id
        )))?;
    } else {
        after_effect(output::line(format!(
            "node {} ({}) is being drained: {}; the same command with --wait waits for the end",
            node.id,
            node.label,
            left.text()
        )))?;
    }
    Ok(Exit::Done)
}

/// What is left on a node that drains: once it has nothing, or now, with the pace if that can be seen.
async fn emptied(
    context: &Context,
    session: &Session,
    node: &NodeRecord,
    waits: bool,
    has_begun: bool,
) -> Result<Left, Failure> {
    if waits {
        empty(context, session, node, &format!("emptying node {} ({})", node.id, node.label)).await?;
    }
    let left = what_is_left(session, node.id).await?;
    if left.shards.is_empty() || !has_begun || session.remaining() < 3 * LOOK {
        return Ok(left);
    }
    let (began, before) = (Instant::now(), left.sent);
    tokio::time::sleep(LOOK).await;
    let left = what_is_left(session, node.id).await?;
    let rate = sent_since(&before, &left.sent) as f64 / began.elapsed().as_secs_f64();
    Ok(Left { rate: Some(rate as u64), ..left })
}

fn remove(context: &Context, args: &NodeRemoveArgs) -> Result<Exit, Failure> {
    let (node, removed) = with_session(context, async |session| {
        let map = map_with(session, args.node).await?;
        let node = find(&map, args.node)?;
        if node.standing == Standing::Removed {
            return Ok((node.clone(), false));
        }
        if args.dead && node.standing != Standing::Pending {
            give_up(session, &map, node).await?;
            let buried = bury(context, session, node).await;
            let done = format!("node {} ({}) is given up", node.id, node.label);
            return buried.map(|()| (node.clone(), true)).map_err(|failure| failure.after(&done));
        } else {
            let held = shards_on(&map, node.id);
            if !held.is_empty() {
                return Err(in_use(node, &held));
            }
        }
        decide(session, node, Standing::Removed, session.remaining()).await?;
        Ok((node.clone(), true))
    })?;
    if context.json() {
        after_effect(output::json(&json!({"node": node.id.0, "standing": "removed", "removed": removed})))?;
    } else {
        let done = if removed { "removed" } else { "removed already:" };
        after_effect(output::line(format!("{done} node {} ({})", node.id, node.label)))?;
    }
    Ok(Exit::Done)
}

fn in_use(node: &NodeRecord, held: &[(ShardId, String)]) -> Failure {
    let named = held.iter().take(NAMED).map(|(shard, database)| format!("{shard} ({database})"));
    let mut named = named.collect::<Vec<_>>().join(", ");
    if held.len() > NAMED {
        named.push_str(&format!(", and {} more", held.len() - NAMED));
    }
    Failure::negative(
        "node_in_use",
        format!(
            "node {id} ({}) holds replicas of {}: {named}. Empty it with `pontoon admin node drain {id} --wait`, or, \
             if it is gone for good, say --dead",
            node.label,
            output::count(held.len() as u64, "shard"),
            id = node.id
        ),
    )
}

/// Decides that a node is gone for good, unless it answers.
async fn give_up(session: &Session, map: &ClusterMap, node: &NodeRecord) -> Result<(), Failure> {
    if node.standing == Standing::Leaving {
        return Ok(());
    }
    let patience = REPORT_TIMEOUT.min(session.remaining() / 2);
    let answers = ask(&session.client, map, [node.id], patience).await;
    if matches!(answers.get(&node.id), Some(Ok(report)) if report.node == node.id) {
        return Err(Failure::negative(
            "node_answers",
            format!(
                "node {id} ({}) answers: it isn't dead. Empty it with `pontoon admin node drain {id} --wait`, \
                 or stop it first",
                node.label,
                id = node.id
            ),
        ));
    }
    decide(session, node, Standing::Leaving, session.remaining()).await
}

/// Waits until nothing of a node that was given up is left, and the cluster has removed it.
async fn bury(context: &Context, session: &Session, node: &NodeRecord) -> Result<(), Failure> {
    let what = format!("replacing what node {} ({}) held", node.id, node.label);
    empty(context, session, node, &what).await?;
    let map = session.client.map().await?;
    match find(&map, node.id)?.standing {
        Standing::Removed => Ok(()),
        // Taken back when it held nothing any more.
        standing => Err(called_off(&what, standing)),
    }
}

fn called_off(what: &str, standing: Standing) -> Failure {
    Failure::negative(
        "called_off",
        format!("{what} was called off: it is {} by now", standing_name(standing)),
    )
}

/// What a node that is to be emptied still has.
#[derive(Debug, Default)]
struct Left {
    shards: Vec<(ShardId, String)>,
    /// Shards that it leads; `None`: it doesn't answer.
    leaders: Option<usize>,
    /// Bytes of its replicas, as it last counted; likewise.
    bytes: Option<u64>,
    /// Bytes per second that all nodes together send in snapshots; `None`: it wasn't measured.
    rate: Option<u64>,
    /// Bytes that each node has sent in snapshots.
    sent: BTreeMap<NodeId, u64>,
    /// Why no other node can take what is left, if so.
    stuck: Option<String>,
    /// What stands in the way at this moment, of one shard.
    obstacle: Option<String>,
    /// What the cluster has decided about the node by now.
    standing: Standing,
}

impl Left {
    /// Seconds until its bytes are elsewhere; `None`: not to be told.
    fn eta_s(&self) -> Option<u64> {
        let rate = self.rate.filter(|rate| *rate > 0)?;
        self.bytes.filter(|bytes| *bytes > 0).map(|bytes| bytes.div_ceil(rate))
    }

    fn text(&self) -> String {
        let mut text = output::count(self.shards.len() as u64, "replica") + " left";
        if let Some(leaders @ 1..) = self.leaders {
            text.push_str(&format!(", leads {leaders}"));
        }
        if let Some(bytes @ 1..) = self.bytes {
            text.push_str(&format!(", {}", output::size(bytes)));
        }
        if let Some(rate @ 1..) = self.rate {
            text.push_str(&format!(", {}/s", output::size(rate)));
        }
        text
    }

    fn json(&self, node: NodeId) -> Value {
        json!({
            "node": node.0,
            "standing": standing_name(self.standing),
            "empty": self.shards.is_empty(),
            "replicas": self.shards.len(),
            "leaders": self.leaders,
            "bytes": self.bytes,
            "rate": self.rate,
            "eta_s": self.eta_s(),
            "obstacle": self.obstacle,
        })
    }
}

async fn what_is_left(session: &Session, node: NodeId) -> Result<Left, Failure> {
    let map = session.client.map().await?;
    // All of them: whoever leads the metadata shard tells why something stands still.
    let reports = reports(session, &map, REPORT_TIMEOUT / 2).await;
    let report = match reports.get(&node) {
        Some(Ok(report)) if report.node == node => Some(report),
        _ => None,
    };
    let shards = shards_on(&map, node);
    let told = reports.values().flatten();
    Ok(Left {
        // Of one that holds nothing any more any shard may be in the way.
        obstacle: obstacle(&reports, |shard| {
            shards.is_empty() || shards.iter().any(|(held, _)| *held == shard)
        }),
        leaders: report.map(list::leads),
        bytes: report.map(list::holds),
        rate: None,
        sent: told.map(|report| (report.node, report.snapshot_bytes)).collect(),
        stuck: stuck(&map, node),
        standing: find(&map, node)?.standing,
        shards,
    })
}

/// What stands in the way of one of those shards, if anything.
pub(super) fn obstacle(reports: &Reports, concerns: impl Fn(ShardId) -> bool) -> Option<String> {
    let mut told = reports.values().flatten().flat_map(|report| &report.stuck);
    told.find(|(shard, _)| concerns(*shard)).map(|(shard, why)| format!("shard {shard}: {why}"))
}

/// Bytes that were sent in between, by the nodes that told of it both times. One that has restarted counts from
/// then on.
fn sent_since(before: &BTreeMap<NodeId, u64>, after: &BTreeMap<NodeId, u64>) -> u64 {
    after.iter().filter_map(|(node, sent)| Some(sent.saturating_sub(*before.get(node)?))).sum()
}

/// Waits until the map places nothing on a node any more; of one that was given up, until it is removed.
async fn empty(context: &Context, session: &Session, node: &NodeRecord, what: &str) -> Result<(), Failure> {
    let mut most = 0;
    let (mut sent, mut before, mut pace) = (0_u64, BTreeMap::new(), Pace::default());
    wait(context, session, what, async || {
        let mut left = what_is_left(session, node.id).await?;
        most = most.max(left.shards.len());
        sent = sent.saturating_add(sent_since(&before, &left.sent));
        before = std::mem::take(&mut left.sent);
        pace.heard(Instant::now(), sent);
        left.rate = pace.per_second().map(|rate| rate as u64);
        Ok(progress(&left, most, what))
    })
    .await
}

/// How far it is with a node that had so many replicas.
fn progress(left: &Left, most: usize, what: &str) -> Progress {
    let end = if left.shards.is_empty() {
        // One that was given up the cluster removes itself, as soon as all shards have told that nothing of them is
        // there: the map alone may know too little for a step that is for good.
        (left.standing != Standing::Leaving).then_some(Ok(()))
    } else if !matches!(left.standing, Standing::Draining | Standing::Leaving) {
        Some(Err(called_off(what, left.standing)))
    } else if left.leaders.unwrap_or(0) == 0 {
        // Leadership can go even where replicas can't.
        let failed = |why| Err(Failure::negative("stuck", format!("{what} stands still: {why}")));
        left.stuck.as_ref().map(failed)
    } else {
        None
    };
    Progress {
        done: (most - left.shards.len()) as u64,
        total: most as u64,
        unit: "replicas",
        told: left.text(),
        eta_s: left.eta_s(),
        obstacle: left.obstacle.clone(),
        end,
    }
}

/// Whether a node may get replicas, as far as the map tells.
fn takes_replicas(map: &ClusterMap, node: &NodeRecord) -> bool {
    node.standing.takes_replicas() && node.weight > 0 && !map.replaced().contains(&node.id)
}

/// Why nothing that a node still holds can go elsewhere: every other node that takes replicas has one of each
/// shard already. The metadata shard does with fewer replicas then.
fn stuck(map: &ClusterMap, node: NodeId) -> Option<String> {
    let takers: Vec<NodeId> =
        map.nodes.values().filter(|other| takes_replicas(map, other)).map(|other| other.id).collect();
    let held = map.shards.values().filter(|s| !s.dropped && s.ordered().any(|member| member.node == node));
    let mut any = false;
    for shard in held {
        let free = |taker: &NodeId| shard.ordered().all(|member| member.node != *taker);
        // More than it should have: one can simply go.
        let wanted = map.databases.get(&shard.database).map_or(0, |database| database.replicas as usize);
        if shard.id == METADATA_SHARD
            || shard.moving.is_some()
            || shard.members.len() > wanted
            || takers.iter().any(free)
        {
            return None;
        }
        any = true;
    }
    any.then(|| {
        format!(
            "the {} that take replicas hold one of each shard already; add a node, or let the databases have fewer \
             replicas with `pontoon admin database set-replicas`",
            output::count(takers.len() as u64, "node")
        )
    })
}

#[cfg(test)]
mod tests;
