//! `trace`: one operation, and the microseconds that it spends in each stage.
//!
//! The stages in a row make up the whole. What runs beside something else (the disks of leader and
//! followers) is told apart, below.

pub mod args;
mod stages;

use serde_json::{Value, json};

use self::args::{Repeat, TraceCommand, TraceGetArgs, TracePutArgs};
use self::stages::{FollowerStages, LogStages, Stages, median, stages};
use super::args::PutArgs;
use super::context::{Context, Session, with_session};
use super::data::read_value;
use super::encoding;
use super::failure::{Exit, Failure};
use super::output;
use crate::client::{Operation, Traced};
use crate::ids::{NodeId, ReplicaId, ShardId};
use crate::placement::map::ClusterMap;

/// `trace put`, `trace get`
pub fn trace(context: &Context, command: TraceCommand) -> Result<Exit, Failure> {
    let (name, db, operation, repeat) = match command {
        TraceCommand::Put(TracePutArgs { put: PutArgs { db, key, value, source }, repeat }) => {
            let (key, value) = (encoding::key(key)?, read_value(value, &source)?);
            ("put", db, Operation::Put(key, value), repeat)
        }
        TraceCommand::Get(TraceGetArgs { db, key, repeat }) => {
            ("get", db, Operation::Get(encoding::key(key)?), repeat)
        }
    };
    with_session(context, async |session| {
        let traces = run(session, &db, &operation, repeat).await?;
        let map = session.client.map().await?;
        let Some(last) = traces.last() else {
            return Err(Failure::internal("nothing was traced"));
        };
        let shown = Shown {
            operation: name,
            database: &db,
            last,
            stages: median(&traces.iter().map(stages).collect::<Vec<_>>()),
            map: &map,
        };
        if context.json() {
            output::json(&shown.json(repeat))?;
        } else {
            shown.print(repeat)?;
        }
        Ok(Exit::Done)
    })
}

async fn run(
    session: &Session,
    db: &str,
    operation: &Operation,
    repeat: Repeat,
) -> Result<Vec<Traced>, Failure> {
    // The connections are made first: who waits for a handshake measures no write.
    session.database(db).get(operation.key().to_vec()).await?;
    let mut traces = Vec::new();
    for _ in 0..repeat.times {
        traces.push(session.database_for_many(db).traced(operation.clone()).await?);
    }
    Ok(traces)
}

/// What is told of one operation, or of the median of many.
struct Shown<'a> {
    operation: &'static str,
    database: &'a str,
    last: &'a Traced,
    stages: Stages,
    map: &'a ClusterMap,
}

impl Shown<'_> {
    /// What is told of the shard and where it was answered; of the last operation, if leadership has moved.
    fn place(&self) -> (ShardId, NodeId) {
        (self.last.shard, self.last.node)
    }

    fn node_of(&self, replica: ReplicaId) -> Option<NodeId> {
        let members = &self.map.shards.get(&self.last.shard)?.members;
        members.iter().find(|member| member.replica == replica).map(|member| member.node)
    }

    fn json(&self, repeat: Repeat) -> Value {
        let (shard, node) = self.place();
        let stage = |(name, us): &(&str, Option<u64>)| json!({"stage": name, "us": us});
        let log = |log: &LogStages| json!({"wait_us": log.wait, "sync_us": log.sync, "told_us": log.told, "whole_us": log.whole});
        let follower = |follower: &FollowerStages| {
            json!({
                "replica": follower.replica.0,
                "node": self.node_of(follower.replica).map(|node| node.0),
                "network_us": follower.network,
                "wait_us": follower.wait,
                "sync_us": follower.sync,
                "rest_us": follower.rest,
                "whole_us": follower.whole,
                "in_time": follower.in_time,
            })
        };
        json!({
            "operation": self.operation,
            "database": self.database,
            "shard": shard.0,
            "node": node.0,
            "repeat": repeat.times,
            "total_us": self.stages.total,
            "stages": self.stages.in_a_row.iter().map(stage).collect::<Vec<_>>(),
            "leader_log": self.stages.log.as_ref().map(log),
            "followers": self.stages.followers.iter().map(follower).collect::<Vec<_>>(),
        })
    }

    fn print(&self, repeat: Repeat) -> Result<(), Failure> {
        let (shard, node) = self.place();
        let many = match repeat.times {
            1 => String::new(),
            times => format!("; medians of {times}, each stage for itself"),
        };
        let operation = self.operation;
        output::line(format!("{operation} in shard {shard}, led by node {node}{many}"))?;
        let mut table = output::table(&["stage", "µs", "what it is"]);
        for (name, us) in &self.stages.in_a_row {
            table.add_row([(*name).to_owned(), shown(*us), stages::meaning(name).to_owned()]);
        }
        table.add_row([
            "total".to_owned(),
            shown(Some(self.stages.total)),
            "as the client sees it".to_owned(),
        ]);
        output::line(table.to_string())?;
        if self.stages.log.is_none() && self.stages.followers.is_empty() {
            return Ok(());
        }
        output::line("Within `replicate`, side by side:")?;
        let headings = ["replica", "network", "log wait", "log sync", "rest", "whole", ""];
        let mut table = output::table(&headings);
        if let Some(log) = &self.stages.log {
            table.add_row([
                format!("leader on node {node}"),
                "-".to_owned(),
                shown(log.wait),
                shown(log.sync),
                shown(log.told),
                shown(log.whole),
                String::new(),
            ]);
        }
        for follower in &self.stages.followers {
            let place = match self.node_of(follower.replica) {
                Some(node) => format!("follower on node {node}"),
                None => format!("follower, replica {}", follower.replica),
            };
            let note = match repeat.times {
                times if follower.in_time == times as usize => String::new(),
                1 => "not before the write was answered".to_owned(),
                times => format!("in time for {} of {times}", follower.in_time),
            };
            table.add_row([
                place,
                shown(follower.network),
                shown(follower.wait),
                shown(follower.sync),
                shown(follower.rest),
                shown(follower.whole),
                note,
            ]);
        }
        output::line(table.to_string())
    }
}

fn shown(us: Option<u64>) -> String {
    us.map_or_else(|| "?".to_owned(), |us| us.to_string())
}
