//! `status`, `route`, `health`: what the cluster looks like, put together from the map and from what
//! each node tells of itself.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde_json::{Value, json};

use super::args::{RouteArgs, StatusArgs};
use super::context::{Context, Session, block_on, with_session};
use super::encoding::{self, Record};
use super::failure::{Exit, Failure};
use super::output;
use super::overview::Overview;
use super::watching::watch;
use crate::client::options::ClientOptions;
use crate::client::{Client, ClientError, NotApplied};
use crate::ids::{METADATA_DATABASE, NodeId};
use crate::node::handle::{NodePhase, NodeReport};
use crate::placement::map::{ClusterMap, DatabaseRecord, Standing};
use crate::placement::ring;

/// A node that doesn't tell of itself within this time counts as unreachable.
pub const REPORT_TIMEOUT: Duration = Duration::from_secs(2);

/// The time that nodes have to tell of themselves, if so much is left of a command's: one that hangs must
/// leave some in which the others are shown.
fn patience(left: Duration) -> Duration {
    REPORT_TIMEOUT.min(left / 2)
}

/// What each node told of itself, or why it didn't.
pub type Reports = BTreeMap<NodeId, Result<NodeReport, ClientError>>;

/// The databases that people made and have not dropped, by name.
pub fn databases(map: &ClusterMap) -> impl Iterator<Item = &DatabaseRecord> {
    let mut all: Vec<&DatabaseRecord> =
        map.databases.values().filter(|db| !db.dropped && db.id != METADATA_DATABASE).collect();
    all.sort_by(|a, b| a.name.cmp(&b.name));
    all.into_iter()
}

/// Looks at the whole cluster, or at one database with the nodes, which have `patience` to tell of
/// themselves.
pub async fn look(client: &Client, db: Option<&str>, patience: Duration) -> Result<Overview, Failure> {
    let map = match db {
        Some(db) => client.map_naming(db).await?,
        None => client.map().await?,
    };
    if let Some(db) = db
        && map.database(db).is_none()
    {
        return Err(unknown_database(&map, db));
    }
    let living = map.nodes.values().filter(|node| node.standing != Standing::Removed);
    let nodes: Vec<NodeId> = living.map(|node| node.id).collect();
    let reports = ask(client, &map, nodes, patience).await;
    Ok(Overview::new(&map, &reports, db))
}

/// Asks nodes of the map for their reports, all at once.
pub(super) async fn ask(
    client: &Client,
    map: &ClusterMap,
    nodes: impl IntoIterator<Item = NodeId>,
    patience: Duration,
) -> Reports {
    let asked = nodes.into_iter().filter_map(|id| map.nodes.get(&id));
    join_all(asked.map(async |node| {
        let report = client.node_report(&node.client_address, patience).await;
        (node.id, report)
    }))
    .await
    .into_iter()
    .collect()
}

pub(super) fn unknown_database(map: &ClusterMap, name: &str) -> Failure {
    let names: Vec<&str> = databases(map).map(|db| db.name.as_str()).collect();
    let have = if names.is_empty() {
        "the cluster has none".to_owned()
    } else {
        format!("there are: {}", names.join(", "))
    };
    Failure::negative(
        "unknown_database",
        format!("there is no database `{name}`; {have}. `pontoon db create` makes one"),
    )
}

/// `status [DB] [--watch TIME]`
pub fn status(context: &Context, args: &StatusArgs) -> Result<Exit, Failure> {
    if let Some(interval) = args.watch {
        let db = args.db.as_deref();
        let look = async |session: &Session| {
            bounded(session, look(&session.client, db, patience(session.timeout()))).await
        };
        return watch(context, interval, look, |seen| print(context, seen), exit_of);
    }
    let seen = with_session(context, async |session| {
        let patience = patience(session.remaining());
        bounded(session, look(&session.client, args.db.as_deref(), patience)).await
    })?;
    print(context, &seen)?;
    Ok(exit_of(&seen))
}

fn exit_of(seen: &Overview) -> Exit {
    if seen.every_shard_is_led() { Exit::Done } else { Exit::Negative }
}

fn print(context: &Context, seen: &Overview) -> Result<(), Failure> {
    if context.json() { output::json(&seen.json()) } else { output::bytes(seen.text().as_bytes()) }
}

/// A look that takes longer than the command's deadline is a cluster that doesn't answer.
async fn bounded<T>(session: &Session, look: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    tokio::time::timeout(session.timeout(), look).await.unwrap_or_else(|_| {
        Err(Failure::unavailable(format!(
            "no node answered within {} ({})",
            output::seconds(session.timeout()),
            session.addresses.join(", ")
        )))
    })
}

/// `route DB KEY`
pub fn route(context: &Context, args: RouteArgs) -> Result<Exit, Failure> {
    let key = encoding::key(args.key)?;
    let (map, reports) = with_session(context, async |session| {
        bounded(session, async {
            let map = session.client.map_naming(&args.db).await?;
            let members: Vec<NodeId> = map
                .database(&args.db)
                .and_then(|db| map.shard_at(db, ring::position(&key)))
                .map(|shard| shard.members.iter().map(|m| m.node).collect())
                .unwrap_or_default();
            let reports = ask(&session.client, &map, members, patience(session.remaining())).await;
            Ok((map, reports))
        })
        .await
    })?;
    let Some(database) = map.database(&args.db) else {
        return Err(unknown_database(&map, &args.db));
    };
    let position = ring::position(&key);
    let Some(shard) = map.shard_at(database, position) else {
        return Err(Failure::internal(format!(
            "the map of the cluster has no shard for position {position:016x} of `{}`",
            args.db
        )));
    };
    let seen = super::overview::ShardView::new(&map, shard, &reports);
    if context.json() {
        let mut object = Record::new(&key, None).json();
        if let Some(fields) = object.as_object_mut() {
            fields.shift_remove("value");
            fields.shift_remove("version");
        }
        object["hash"] = format!("{position:016x}").into();
        object["shard"] = shard.id.0.into();
        object["range"] = json!({"start": seen.start(), "end": seen.end()});
        object["replicas"] = seen
            .replicas
            .iter()
            .map(|replica| json!({"node": replica.node.0, "address": replica.address}))
            .collect();
        object["leader"] = seen.leader.map_or(
            Value::Null,
            |node| json!({"node": node.0, "address": map.nodes.get(&node).map(|n| &n.client_address)}),
        );
        output::json(&object)?;
        return Ok(Exit::Done);
    }
    let mut table = output::table(&["hash", "shard", "range", "replicas", "leader"]);
    table.add_row([
        format!("{position:016x}"),
        shard.id.to_string(),
        format!("{}-{}", seen.start(), seen.end()),
        seen.replicas_text(),
        seen.leader_text(),
    ]);
    output::line(table.to_string())?;
    Ok(Exit::Done)
}

/// What one address says of itself.
struct Endpoint {
    address: String,
    result: Result<NodePhase, String>,
    took: Duration,
}

/// `health`: asks each endpoint, those given and those in the map. What can't be reached is told as
/// such at once: nothing is tried again.
pub fn health(context: &Context) -> Result<Exit, Failure> {
    let given = context.addresses()?;
    let deadline = Instant::now() + context.timeout();
    let endpoints = block_on(async {
        // Not a session: that waits for a map, which nodes without a cluster don't have.
        let client = Client::unconnected(ClientOptions {
            timeout: context.timeout().min(REPORT_TIMEOUT),
            ..ClientOptions::new(given.clone())
        })?;
        // Those in the map are asked after those given, one of which may hang.
        let first = Instant::now() + context.timeout() / 2;
        let mut endpoints = ask_each(&client, given.into_iter().collect(), first).await;
        if endpoints.iter().any(|endpoint| endpoint.result.is_ok()) {
            match client.map().await {
                Ok(map) => {
                    let known = map.nodes.values().map(|node| node.client_address.clone());
                    let asked: BTreeSet<String> = endpoints.iter().map(|e| e.address.clone()).collect();
                    let others = known.filter(|address| !asked.contains(address)).collect();
                    endpoints.extend(ask_each(&client, others, deadline).await);
                }
                // Nodes that answer all the same are what was asked for.
                Err(error) => output::note(format!("the map of the cluster can't be had: {error}")),
            }
        }
        client.close().await;
        endpoints.sort_by(|a, b| a.address.cmp(&b.address));
        Ok(endpoints)
    })?;
    let healthy = |endpoint: &Endpoint| matches!(endpoint.result, Ok(NodePhase::Ready | NodePhase::ReadOnly));
    if context.json() {
        let list: Vec<Value> = endpoints
            .iter()
            .map(|endpoint| {
                json!({
                    "address": endpoint.address,
                    "healthy": healthy(endpoint),
                    "state": endpoint.result.as_ref().ok().map(|p| super::overview::phase_name(*p)),
                    "took_ms": endpoint.took.as_secs_f64() * 1e3,
                    "error": endpoint.result.as_ref().err(),
                })
            })
            .collect();
        output::json(&json!({"endpoints": list}))?;
    } else {
        let mut table = output::table(&["address", "state", "took"]);
        for endpoint in &endpoints {
            table.add_row([
                endpoint.address.clone(),
                match &endpoint.result {
                    Ok(phase) => super::overview::phase_name(*phase).to_owned(),
                    Err(error) => output::printable(error.as_bytes()),
                },
                format!("{:.1} ms", endpoint.took.as_secs_f64() * 1e3),
            ]);
        }
        output::line(table.to_string())?;
    }
    Ok(if endpoints.iter().all(healthy) {
        Exit::Done
    } else if endpoints.iter().any(|endpoint| endpoint.result.is_ok()) {
        Exit::Negative
    } else {
        Exit::Unavailable
    })
}

async fn ask_each(client: &Client, addresses: BTreeSet<String>, deadline: Instant) -> Vec<Endpoint> {
    join_all(addresses.into_iter().map(async |address| {
        let began = Instant::now();
        let left = deadline.saturating_duration_since(began).max(Duration::from_millis(1));
        let report = client.node_report(&address, REPORT_TIMEOUT.min(left)).await;
        Endpoint {
            result: report.map(|r| r.phase).map_err(|error| match error {
                // Which address it is stands beside it.
                ClientError::NotApplied(NotApplied::Unavailable { last, .. }) => {
                    last.strip_prefix(&format!("{address}: ")).map_or(last.clone(), str::to_owned)
                }
                error => error.to_string(),
            }),
            took: began.elapsed(),
            address,
        }
    }))
    .await
}
