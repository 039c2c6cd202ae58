//! `admin database ...` and `admin transfer-leader`.

use serde_json::json;

use super::args::{DatabaseCommand, SetReplicasArgs, TransferLeaderArgs};
use super::verify::verify;
use super::wait::{Progress, wait};
use super::{change_failed, node};
use crate::cli::context::{Context, with_session};
use crate::cli::data::after_effect;
use crate::cli::failure::{Exit, Failure};
use crate::cli::output;
use crate::cli::status::{REPORT_TIMEOUT, unknown_database};
use crate::ids::ShardId;
use crate::placement::map::{ClusterMap, DatabaseRecord, MemberRole};

/// `admin database ...`
pub fn database(context: &Context, command: &DatabaseCommand) -> Result<Exit, Failure> {
    match command {
        DatabaseCommand::SetReplicas(args) => set_replicas(context, args),
        DatabaseCommand::Verify(args) => verify(context, args),
    }
}

fn set_replicas(context: &Context, args: &SetReplicasArgs) -> Result<Exit, Failure> {
    let (name, replicas) = (args.db.as_str(), args.replicas);
    let (before, shards) = with_session(context, async |session| {
        let map = session.client.map_naming(name).await?;
        let before = map.database(name).ok_or_else(|| unknown_database(&map, name))?.clone();
        let set = session.client.set_replicas(name, replicas, session.remaining()).await;
        set.map_err(|error| {
            let what = format!("giving `{name}` {}", output::count(replicas, "replica"));
            change_failed(&what, "`pontoon db list` tells", error)
        })?;
        let what = format!("giving each shard of `{name}` {}", output::count(replicas, "replica"));
        let done = format!("`{name}` should have {} from now on", output::count(replicas, "replica"));
        wait(context, session, &what, async || {
            let map = session.client.map_naming(name).await?;
            let database = map.database(name).ok_or_else(|| unknown_database(&map, name))?;
            let mut progress = progress(&map, database, replicas);
            if progress.end.is_none() {
                let reports = node::reports(session, &map, REPORT_TIMEOUT / 2).await;
                progress.obstacle = node::obstacle(&reports, |shard| database.shards.contains(&shard));
            }
            Ok(progress)
        })
        .await
        .map_err(|failure| failure.after(&done))?;
        Ok((before.replicas, before.shards.len() as u64))
    })?;
    if context.json() {
        after_effect(output::json(&json!({"name": name, "replicas": replicas, "before": before})))?;
    } else {
        after_effect(output::line(format!(
            "each of the {} of {name} has {} (it was {before})",
            output::count(shards, "shard"),
            output::count(replicas, "replica")
        )))?;
    }
    Ok(Exit::Done)
}

/// How many shards have as many voters as they should, and nothing else.
fn progress(map: &ClusterMap, database: &DatabaseRecord, replicas: u32) -> Progress {
    let settled = |id: &&ShardId| {
        map.shards.get(id).is_some_and(|shard| {
            let voters = shard.members.iter().all(|member| member.role == MemberRole::Voter);
            voters && shard.members.len() == replicas as usize && shard.moving.is_none()
        })
    };
    let done = database.shards.iter().filter(settled).count();
    let end = if database.replicas != replicas {
        Some(Err(Failure::negative(
            "changed",
            format!(
                "somebody else has set {} for `{}` meanwhile",
                output::count(database.replicas, "replica"),
                database.name
            ),
        )))
    } else {
        (done == database.shards.len()).then_some(Ok(()))
    };
    let (done, total) = (done as u64, database.shards.len() as u64);
    Progress { done, total, unit: "shards", end, ..Progress::default() }
}

/// `admin transfer-leader DB SHARD NODE`
pub fn transfer_leader(context: &Context, args: &TransferLeaderArgs) -> Result<Exit, Failure> {
    with_session(context, async |session| {
        let map = session.client.map_naming(&args.db).await?;
        check_shard(&map, &args.db, args.shard)?;
        let moved = session.client.transfer_leader(args.shard, args.node, session.remaining()).await;
        moved.map_err(|error| {
            let what = format!("having node {} lead shard {}", args.node, args.shard);
            change_failed(&what, "`pontoon status` tells who leads", error)
        })
    })?;
    if context.json() {
        let object = json!({"database": args.db, "shard": args.shard.0, "leader": args.node.0});
        after_effect(output::json(&object))?;
    } else {
        after_effect(output::line(format!("node {} leads shard {}", args.node, args.shard)))?;
    }
    Ok(Exit::Done)
}

/// Whether the shard is one of that database; a slip of a number must not hit another.
pub(super) fn check_shard(map: &ClusterMap, name: &str, shard: ShardId) -> Result<(), Failure> {
    let database = map.database(name).ok_or_else(|| unknown_database(map, name))?;
    if database.shards.contains(&shard) {
        return Ok(());
    }
    let there: Vec<_> = database.shards.iter().take(20).map(ShardId::to_string).collect();
    let more = if database.shards.len() > there.len() { ", …" } else { "" };
    Err(Failure::negative(
        "unknown_shard",
        format!("database `{name}` has no shard {shard}; it has {}{more}", there.join(", ")),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{DatabaseId, Epoch, NodeId, ReplicaId};
    use crate::placement::map::{Member, MoveCause, ShardMove, ShardRecord};
    use crate::placement::ring::RingRange;

    fn map() -> ClusterMap {
        let mut map = ClusterMap::default();
        let shards = vec![ShardId(4), ShardId(5)];
        for id in &shards {
            let member =
                |node| Member { replica: ReplicaId(node), node: NodeId(node), role: MemberRole::Voter };
            let record = ShardRecord {
                id: *id,
                database: DatabaseId(1),
                range: RingRange::ALL,
                epoch: Epoch { range: 1, conf: 1 },
                members: (1..=3).map(member).collect(),
                dropped: false,
                moving: None,
                target: None,
                previous: None,
                changed_at: 1,
            };
            map.shards.insert(*id, record);
        }
        let (name, replicas) = ("demo".to_owned(), 3);
        let record =
            DatabaseRecord { id: DatabaseId(1), name, replicas, shards, dropped: false, changed_at: 1 };
        map.databases.insert(record.id, record);
        map
    }

    #[test]
    fn a_shard_counts_once_all_its_replicas_vote_and_nothing_moves() {
        let mut map = map();
        let of = |map: &ClusterMap| progress(map, &map.databases[&DatabaseId(1)], 3);
        assert_eq!((of(&map).done, of(&map).total, of(&map).end), (2, 2, Some(Ok(()))));
        let shard = map.shards.get_mut(&ShardId(5)).unwrap();
        shard.members[2].role = MemberRole::Incoming;
        assert_eq!((of(&map).done, of(&map).end), (1, None));
        let shard = map.shards.get_mut(&ShardId(5)).unwrap();
        shard.members[2].role = MemberRole::Voter;
        let (adds, removes, cause) = (Vec::new(), Vec::new(), MoveCause::Replicas);
        shard.moving = Some(ShardMove { id: 1, adds, removes, cancelling: false, cause });
        assert_eq!(of(&map).done, 1);
        // Another operator wants something else by now.
        map.databases.get_mut(&DatabaseId(1)).unwrap().replicas = 5;
        assert!(matches!(of(&map).end, Some(Err(_))));
    }

    #[test]
    fn a_shard_of_another_database_is_refused() {
        let map = map();
        assert!(check_shard(&map, "demo", ShardId(4)).is_ok());
        let failure = check_shard(&map, "demo", ShardId(1)).unwrap_err();
        assert_eq!((failure.exit, failure.code), (Exit::Negative, "unknown_shard"));
        assert!(failure.message.ends_with("it has 4, 5"), "{failure}");
        assert_eq!(check_shard(&map, "other", ShardId(4)).unwrap_err().code, "unknown_database");
    }
}
