//! `sim placement`: how good plans are, and how long they take, for clusters of any size.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use serde_json::{Value, json};

use super::args::PlacementArgs;
use super::context::Context;
use super::failure::{Exit, Failure};
use super::output;
use crate::ids::{DatabaseId, Epoch, NodeId, RandomId, ReplicaId, ShardId};
use crate::placement::map::{
    ClusterMap, DatabaseRecord, Member, MemberRole, NodeRecord, ShardRecord, Standing,
};
use crate::placement::plan::plan_database;
use crate::placement::rebalance::{Known, MoveKind, Plan, plan_whole};

const NAME: &str = "simulated";

/// What one plan came to.
struct Row {
    what: String,
    moves: u32,
    minimum: u32,
    handovers: usize,
    /// By how much the node farthest from its share is off, in percent of it and in whole units.
    replicas: (f64, f64),
    leaders: (f64, f64),
    /// Shards with two replicas in one zone although there are zones enough.
    crowded: usize,
    seconds: f64,
}

/// `sim placement`
pub fn placement(context: &Context, args: &PlacementArgs) -> Result<Exit, Failure> {
    if args.nodes < args.replicas {
        return Err(Failure::usage("usage", "a shard can't have more replicas than there are nodes"));
    }
    let mut map = ClusterMap::default();
    for _ in 0..args.nodes {
        join(&mut map, args.zones);
    }
    let mut rows = Vec::new();
    let began = Instant::now();
    let planned = plan_database(&map, NAME, args.replicas, args.shards)
        .map_err(|error| Failure::usage("usage", error.to_string()))?;
    let seconds = began.elapsed().as_secs_f64();
    let replicas = args.replicas;
    let record = |(id, shard): (u64, crate::placement::plan::PlannedShard)| {
        let members = shard.nodes.iter().map(|node| member(id, *node)).collect();
        let record = ShardRecord {
            id: ShardId(id),
            database: DatabaseId(1),
            range: shard.range,
            epoch: Epoch { range: 1, conf: 1 },
            members,
            dropped: false,
            moving: None,
            target: None,
            previous: None,
            changed_at: 1,
        };
        (record.id, record)
    };
    map.shards = (1..).zip(planned).map(record).collect();
    let shards = map.shards.keys().copied().collect();
    let (id, name) = (DatabaseId(1), NAME.into());
    let database = DatabaseRecord { id, name, replicas, shards, dropped: false, changed_at: 1 };
    map.databases.insert(id, database);
    let created = Plan::default();
    rows.push(row(&map, "a new database".into(), &created, args.zones, seconds));

    rows.push(replan(&mut map, "nothing has changed".into(), args.zones));
    join(&mut map, args.zones);
    rows.push(replan(&mut map, "1 node has joined".into(), args.zones));
    let more = args.nodes.div_ceil(10);
    for _ in 0..more {
        join(&mut map, args.zones);
    }
    rows.push(replan(&mut map, format!("{more} more have joined"), args.zones));
    if let Some(node) = map.nodes.values_mut().next() {
        node.standing = Standing::Draining;
        rows.push(replan(&mut map, "1 node is to be emptied".into(), args.zones));
    }
    print(context, args, &rows)?;
    Ok(Exit::Done)
}

fn print(context: &Context, args: &PlacementArgs, rows: &[Row]) -> Result<(), Failure> {
    if context.json() {
        let PlacementArgs { nodes, shards, replicas, zones } = args;
        let plans: Vec<Value> = rows.iter().map(row_json).collect();
        return output::json(&json!({
            "nodes": nodes, "shards": shards, "replicas": replicas, "zones": zones, "plans": plans,
        }));
    }
    let headings =
        ["after", "moves", "least", "ratio", "handovers", "replicas off", "leaders off", "crowded", "time"];
    let mut table = output::table(&headings);
    for row in rows {
        let off = |(percent, units): (f64, f64)| format!("{percent:.1} %, {units:.1}");
        table.add_row([
            row.what.clone(),
            row.moves.to_string(),
            row.minimum.to_string(),
            format!("{:.2}", ratio(row)),
            row.handovers.to_string(),
            off(row.replicas),
            off(row.leaders),
            row.crowded.to_string(),
            format!("{:.2} s", row.seconds),
        ]);
    }
    output::line(table.to_string())?;
    output::line(
        "off: of the node farthest from its share, in percent of that and in whole replicas or leaders",
    )
}

fn ratio(row: &Row) -> f64 {
    if row.minimum == 0 { 1.0 } else { f64::from(row.moves) / f64::from(row.minimum) }
}

fn row_json(row: &Row) -> Value {
    json!({
        "after": row.what,
        "moves": row.moves,
        "minimum": {"moves": row.minimum},
        "handovers": row.handovers,
        "replicas_off": {"percent": row.replicas.0, "units": row.replicas.1},
        "leaders_off": {"percent": row.leaders.0, "units": row.leaders.1},
        "crowded": row.crowded,
        "seconds": row.seconds,
    })
}

/// Another node, in the zone whose turn it is.
fn join(map: &mut ClusterMap, zones: u32) {
    let id = map.nodes.len() as u64 + 1;
    let record = NodeRecord {
        id: NodeId(id),
        label: String::new(),
        client_address: String::new(),
        peer_address: String::new(),
        zone: if zones == 0 { String::new() } else { format!("zone-{}", id % u64::from(zones)) },
        weight: 100,
        store_id: RandomId::default(),
        standing: Standing::Member,
        changed_at: 1,
    };
    map.nodes.insert(record.id, record);
}

fn member(shard: u64, node: NodeId) -> Member {
    Member { replica: ReplicaId((shard << 20) + node.0), node, role: MemberRole::Voter }
}

/// Plans, and has the map be as planned.
fn replan(map: &mut ClusterMap, what: String, zones: u32) -> Row {
    let began = Instant::now();
    let plan = plan_whole(map, &Known::default(), false);
    let seconds = began.elapsed().as_secs_f64();
    for target in &plan.targets {
        if let Some(shard) = map.shards.get_mut(&target.shard) {
            shard.members = target.nodes.iter().map(|node| member(target.shard.0, *node)).collect();
        }
    }
    row(map, what, &plan, zones, seconds)
}

fn row(map: &ClusterMap, what: String, plan: &Plan, zones: u32, seconds: f64) -> Row {
    let takers = map.nodes.values().filter(|node| node.standing == Standing::Member);
    let mut loads: BTreeMap<NodeId, (u32, u32)> = takers.map(|node| (node.id, (0, 0))).collect();
    let mut crowded = 0;
    for shard in map.shards.values() {
        for (at, member) in shard.members.iter().enumerate() {
            let load = loads.entry(member.node).or_default();
            load.0 += 1;
            load.1 += u32::from(at == 0);
        }
        let zone = |member: &Member| map.nodes.get(&member.node).map(|node| node.zone.as_str());
        let different: BTreeSet<_> = shard.members.iter().filter_map(zone).collect();
        crowded += usize::from(different.len() < shard.members.len().min(zones as usize));
    }
    let off = |count: fn(&(u32, u32)) -> u32| {
        let sum: u32 = loads.values().map(count).sum();
        let share = f64::from(sum) / loads.len().max(1) as f64;
        let far = loads.values().map(|load| (f64::from(count(load)) - share).abs()).fold(0.0, f64::max);
        (100.0 * far / share.max(f64::MIN_POSITIVE), far)
    };
    Row {
        what,
        moves: plan.total.moves,
        minimum: plan.minimum,
        handovers: plan.moves.iter().filter(|planned| planned.kind == MoveKind::Leader).count(),
        replicas: off(|load| load.0),
        leaders: off(|load| load.1),
        crowded,
        seconds,
    }
}
