//! `admin recover`: what is left of a shard whose majority is gone for good.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::args::RecoverArgs;
use super::database::check_shard;
use super::{change_failed, role_name};
use crate::cli::context::{Context, with_session};
use crate::cli::data::after_effect;
use crate::cli::failure::{Exit, Failure};
use crate::cli::output;
use crate::client::admin::answers::{Recovery, ShardCopy};
use crate::ids::METADATA_SHARD;
use crate::refusal::Outcome;

/// The metadata shard has no database; so `pontoon status` calls it, and no database can be called so.
const METADATA: &str = "(metadata)";

/// `admin recover DB SHARD --from NODE`
pub fn recover(context: &Context, args: &RecoverArgs) -> Result<Exit, Failure> {
    let (recovery, report) = with_session(context, async |session| {
        let map = session.client.map().await?;
        if args.db != METADATA || args.shard != METADATA_SHARD {
            check_shard(&map, &args.db, args.shard)?;
        }
        let ask = async |accepted| {
            let asked = session.client.recover_shard(args.shard, args.from, accepted, session.remaining());
            asked.await.map_err(|error| {
                let what = format!("recovering shard {} of `{}`", args.shard, args.db);
                change_failed(&what, "the same command again tells, and goes on", error)
            })
        };
        let before = ask(false).await?;
        if !args.accept_data_loss {
            return Ok((before, None));
        }
        // Before anything is done: that it can't be written must not be found out afterwards.
        let path: PathBuf = match &args.report {
            Some(path) => path.clone(),
            None => format!("recover-{}-{}.json", before.shard, before.conf).into(),
        };
        write_report(&path, &before)?;
        match ask(true).await {
            Ok(after) => Ok((after, Some(path))),
            Err(failure) => {
                if failure.outcome == Outcome::NotApplied
                    && let Err(error) = std::fs::remove_file(&path)
                {
                    output::note(format!("{} tells of what was not done: {error}", path.display()));
                }
                Err(failure)
            }
        }
    })?;
    match report {
        Some(path) => done(context, &recovery, &path),
        None => refuse(context, &recovery),
    }
}

/// The file must be new: a report of an earlier recovery is not to be lost.
fn write_report(path: &Path, recovery: &Recovery) -> Result<(), Failure> {
    let mut text = format!("{:#}", json_of(recovery));
    text.push('\n');
    let file = OpenOptions::new().write(true).create_new(true).open(path);
    let written = file.and_then(|mut file| file.write_all(text.as_bytes()).and_then(|()| file.sync_all()));
    written.map_err(|error| Failure::io("writing", path, error))
}

fn kept(recovery: &Recovery) -> Option<&ShardCopy> {
    recovery.copies.iter().find(|copy| copy.replica == recovery.keep)
}

fn json_of(recovery: &Recovery) -> Value {
    let copy = |copy: &ShardCopy| {
        json!({
            "node": copy.node.0,
            "replica": copy.replica.0,
            "role": role_name(copy.role),
            "answers": copy.answers,
            "serves": copy.serves,
            "term": copy.term,
            "applied": copy.applied,
            "committed": copy.committed,
            "last": copy.last,
            "keys": copy.keys,
            "bytes": copy.bytes,
        })
    };
    let lost = recovery.copies.iter().filter(|copy| copy.replica != recovery.keep);
    json!({
        "shard": recovery.shard.0,
        "database": recovery.database,
        "conf": recovery.conf,
        "kept": kept(recovery).map(copy),
        "lost": lost.map(copy).collect::<Value>(),
    })
}

/// What would be kept and lost, for a person.
fn text_of(recovery: &Recovery) -> String {
    let mut table =
        output::table(&["node", "replica", "role", "state", "term", "applied", "last", "keys", "size"]);
    for copy in &recovery.copies {
        let known = |number: u64| if copy.answers { number.to_string() } else { "-".into() };
        let state = match copy {
            copy if copy.replica == recovery.keep => "goes on",
            ShardCopy { answers: false, .. } => "gone",
            ShardCopy { serves: true, .. } => "given up",
            _ => "unusable",
        };
        table.add_row([
            copy.node.to_string(),
            copy.replica.to_string(),
            role_name(copy.role).to_owned(),
            state.to_owned(),
            known(copy.term),
            known(copy.applied),
            known(copy.last),
            known(copy.keys),
            if copy.answers { output::size(copy.bytes) } else { "-".into() },
        ]);
    }
    let last = kept(recovery).map_or(0, |copy| copy.last);
    format!(
        "shard {} of {}\n{table}\nkept: its entries up to {last}. Lost: what only the replicas that are gone had, also \
         writes that were acknowledged; nobody can tell which",
        recovery.shard, recovery.database
    )
}

fn refuse(context: &Context, recovery: &Recovery) -> Result<Exit, Failure> {
    if context.json() {
        let mut object = json_of(recovery);
        object["done"] = false.into();
        output::json(&object)?;
    } else {
        output::line(text_of(recovery))?;
        output::note(
            "nothing was changed. If the others are gone for good, the same command with --accept-data-loss does it; if \
             any of their nodes can be brought back, do that instead",
        );
    }
    Ok(Exit::Negative)
}

fn done(context: &Context, recovery: &Recovery, report: &Path) -> Result<Exit, Failure> {
    if context.json() {
        let mut object = json_of(recovery);
        object["done"] = true.into();
        object["report"] = report.display().to_string().into();
        after_effect(output::json(&object))?;
    } else {
        let node = kept(recovery).map_or(0, |copy| copy.node.0);
        after_effect(output::line(format!(
            "shard {} of {} goes on with the replica on node {node}; what was kept and lost is in {}",
            recovery.shard,
            recovery.database,
            report.display()
        )))?;
    }
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{NodeId, ReplicaId, ShardId};
    use crate::placement::map::MemberRole;

    fn recovery() -> Recovery {
        let copy = |node, answers, last| ShardCopy {
            node: NodeId(node),
            replica: ReplicaId(10 + node),
            role: MemberRole::Voter,
            answers,
            serves: answers,
            term: 3,
            applied: last,
            committed: last,
            last,
            keys: 5,
            bytes: 100,
        };
        Recovery {
            shard: ShardId(7),
            database: "demo".into(),
            keep: ReplicaId(11),
            conf: 1 << 32,
            copies: vec![copy(1, true, 40), copy(2, false, 0), copy(3, false, 0)],
            done: false,
        }
    }

    #[test]
    fn what_is_kept_and_lost_is_told_apart() {
        let object = json_of(&recovery());
        assert_eq!(object["kept"]["node"], 1);
        assert_eq!(object["lost"].as_array().unwrap().len(), 2);
        assert_eq!((&object["shard"], &object["database"]), (&7.into(), &"demo".into()));
        let text = text_of(&recovery());
        for part in ["goes on", "gone", "entries up to 40", "acknowledged"] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[test]
    fn a_report_overwrites_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("report.json");
        write_report(&path, &recovery()).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), json_of(&recovery()));
        assert_eq!(write_report(&path, &recovery()).unwrap_err().exit, Exit::Usage);
    }
}
