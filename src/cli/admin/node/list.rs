//! `admin node list`.

use std::collections::BTreeMap;

use raft::StateRole;
use serde_json::{Value, json};

use super::reports;
use crate::cli::admin::args::NodeListArgs;
use crate::cli::context::{Context, with_session};
use crate::cli::failure::{Exit, Failure};
use crate::cli::output;
use crate::cli::overview::{phase_name, standing_name};
use crate::cli::status::{REPORT_TIMEOUT, Reports};
use crate::ids::NodeId;
use crate::node::handle::{NodeReport, ReplicaHealth};
use crate::placement::map::{ClusterMap, NodeRecord, Standing};

/// A node in the list.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Row {
    pub(super) id: NodeId,
    label: String,
    address: String,
    peer_address: String,
    zone: String,
    weight: u32,
    standing: Standing,
    /// `ready`, `read-only`, `starting`, `stopping`, `unreachable`, `replaced` (another runs at its address), or `removed`.
    state: &'static str,
    /// Shards of which the map places a replica here.
    replicas: usize,
    /// Shards that it leads, as it says; `None`: it doesn't answer.
    leaders: Option<usize>,
    /// Bytes of its replicas, as it last counted them, likewise.
    bytes: Option<u64>,
    /// Bytes in its directory, likewise.
    disk_bytes: Option<u64>,
}

/// Map and reports, put together: all nodes, or those that were not removed.
pub(super) fn rows(map: &ClusterMap, reports: &Reports, all: bool) -> Vec<Row> {
    let mut held: BTreeMap<NodeId, usize> = BTreeMap::new();
    for shard in map.shards.values().filter(|shard| !shard.dropped) {
        for member in shard.ordered() {
            *held.entry(member.node).or_default() += 1;
        }
    }
    let replaced = map.replaced();
    let shown = map.nodes.values().filter(|node| all || node.standing != Standing::Removed);
    let row = |node: &NodeRecord| {
        let report = match reports.get(&node.id) {
            Some(Ok(report)) if report.node == node.id || report.node == NodeId(0) => Some(report),
            _ => None,
        };
        Row {
            id: node.id,
            label: node.label.clone(),
            address: node.client_address.clone(),
            peer_address: node.peer_address.clone(),
            zone: node.zone.clone(),
            weight: node.weight,
            standing: node.standing,
            state: match report {
                _ if node.standing == Standing::Removed => "removed",
                _ if replaced.contains(&node.id) => "replaced",
                Some(report) => phase_name(report.phase),
                None => "unreachable",
            },
            replicas: held.get(&node.id).copied().unwrap_or(0),
            leaders: report.map(leads),
            bytes: report.map(holds),
            disk_bytes: report.map(|report| report.disk_bytes),
        }
    };
    shown.map(row).collect()
}

/// Shards that a node leads, with a state.
pub(super) fn leads(report: &NodeReport) -> usize {
    let leads = report.replicas.iter().filter(|replica| {
        let whole = !matches!(replica.health, ReplicaHealth::Refetching(_));
        whole && replica.group.as_ref().is_some_and(|group| group.role == StateRole::Leader)
    });
    leads.count()
}

/// Bytes of keys and values that a node holds, as it last counted.
pub(super) fn holds(report: &NodeReport) -> u64 {
    report.replicas.iter().fold(0, |bytes, replica| bytes.saturating_add(replica.bytes))
}

impl Row {
    fn is_up(&self) -> bool {
        !matches!(self.state, "unreachable" | "replaced" | "removed")
    }

    pub(super) fn json(&self) -> Value {
        json!({
            "id": self.id.0,
            "label": self.label,
            "address": self.address,
            "peer_address": self.peer_address,
            "zone": self.zone,
            "weight": self.weight,
            "standing": standing_name(self.standing),
            "state": self.state,
            "up": self.is_up(),
            "replicas": self.replicas,
            "leaders": self.leaders,
            "bytes": self.bytes,
            "disk_bytes": self.disk_bytes,
        })
    }
}

pub(super) fn table(rows: &[Row]) -> String {
    let mut table = output::table(&[
        "node", "label", "address", "peer", "zone", "weight", "standing", "state", "leaders", "replicas",
        "disk",
    ]);
    for row in rows {
        table.add_row([
            row.id.to_string(),
            row.label.clone(),
            row.address.clone(),
            row.peer_address.clone(),
            if row.zone.is_empty() { "-".into() } else { row.zone.clone() },
            row.weight.to_string(),
            standing_name(row.standing).to_owned(),
            row.state.to_owned(),
            row.leaders.map_or("-".into(), |leaders| leaders.to_string()),
            row.replicas.to_string(),
            row.disk_bytes.map_or("-".into(), output::size),
        ]);
    }
    table.to_string()
}

/// `admin node list`
pub(super) fn list(context: &Context, args: &NodeListArgs) -> Result<Exit, Failure> {
    let rows = with_session(context, async |session| {
        let map = session.client.map().await?;
        let reports = reports(session, &map, REPORT_TIMEOUT.min(session.remaining() / 2)).await;
        Ok(rows(&map, &reports, args.all))
    })?;
    if context.json() {
        output::json(&json!({"nodes": rows.iter().map(Row::json).collect::<Value>()}))?;
    } else {
        output::line(table(&rows))?;
    }
    Ok(Exit::Done)
}
