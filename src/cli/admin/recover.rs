//! `admin recover`: what is left of a shard whose majority is gone for good.

use std::fs::OpenOptions;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde_json::{Value, json};

use super::args::RecoverArgs;
use super::database::check_shard;
use super::{METADATA, change_failed, role_name};
use crate::cli::context::{Context, with_session};
use crate::cli::data::after_effect;
use crate::cli::failure::{Exit, Failure};
use crate::cli::output;
use crate::client::admin::answers::{Recovery, ShardCopy};
use crate::ids::METADATA_SHARD;
use crate::refusal::Outcome;

/// `admin recover DB SHARD --from NODE`
pub fn recover(context: &Context, args: &RecoverArgs) -> Result<Exit, Failure> {
    let (recovery, report) = with_session(context, async |session| {
        if args.db != METADATA || args.shard != METADATA_SHARD {
            let map = session.client.map_naming(&args.db).await?;
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
        let mut report = Report::begin(path, &before)?;
        match ask(true).await {
            Ok(after) => {
                after_effect(report.end(&after))?;
                Ok((after, Some(report.path)))
            }
            Err(failure) => {
                if failure.outcome == Outcome::NotApplied && !before.decided {
                    report.discard();
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

/// The file that tells what was kept and what was given up.
struct Report {
    path: PathBuf,
    object: Value,
    /// It was begun by this command, not by one before whose end isn't known.
    is_new: bool,
}

impl Report {
    /// Writes what is to be done. The file must be new, for a report of an earlier recovery is not to be lost; or
    /// it is of this very one, which is gone on with: then it knows what there was before.
    fn begin(path: PathBuf, recovery: &Recovery) -> Result<Report, Failure> {
        let object = json_of(recovery);
        let file = OpenOptions::new().write(true).create_new(true).open(&path);
        let written =
            file.and_then(|mut file| file.write_all(&text_in(&object)).and_then(|()| file.sync_all()));
        match written {
            Ok(()) => Ok(Report { path, object, is_new: true }),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => match same_decision(&path, &object) {
                Some(object) => Ok(Report { path, object, is_new: false }),
                None => Err(Failure::io("writing", &path, error)),
            },
            Err(error) => Err(Failure::io("writing", &path, error)),
        }
    }

    /// Writes what was done, in place of what was to be done: with the conf version under which it was.
    fn end(&mut self, recovery: &Recovery) -> Result<(), Failure> {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
        // By then the map knows of no other replicas; those before do.
        self.object["conf"] = recovery.conf.into();
        self.object["done"] = recovery.done.into();
        self.object["time"] = now.into();
        let beside = self.path.with_extension("new");
        let file = OpenOptions::new().write(true).create(true).truncate(true).open(&beside);
        let text = text_in(&self.object);
        let written = file.and_then(|mut file| file.write_all(&text).and_then(|()| file.sync_all()));
        let renamed = written.and_then(|()| std::fs::rename(&beside, &self.path));
        renamed.map_err(|error| Failure::io("writing", &self.path, error))
    }

    /// It tells of what was not done.
    fn discard(self) {
        if self.is_new
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            output::note(format!("{} tells of what was not done: {error}", self.path.display()));
        }
    }
}

fn text_in(object: &Value) -> Vec<u8> {
    format!("{object:#}\n").into_bytes()
}

/// The report in a file, if it is of the same decision.
fn same_decision(path: &Path, object: &Value) -> Option<Value> {
    let there: Value = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
    let same = |key: &str| there[key] == object[key];
    let kept = there["kept"]["replica"] == object["kept"]["replica"];
    (same("shard") && same("database") && same("conf") && kept).then_some(there)
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
            "last_term": copy.last_term,
            "keys": copy.keys,
            "bytes": copy.bytes,
        })
    };
    let others = |answers| {
        let others = recovery.copies.iter().filter(|copy| copy.replica != recovery.keep);
        others.filter(|copy| copy.answers == answers).map(copy).collect::<Value>()
    };
    json!({
        "shard": recovery.shard.0,
        "database": recovery.database,
        "conf": recovery.conf,
        "kept": kept(recovery).map(copy),
        "gone": others(false),
        "given_up": others(true),
        "done": recovery.done,
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
    format!(
        "shard {} of {}, as its replicas are now:\n{table}\n{}",
        recovery.shard,
        recovery.database,
        consequences(recovery)
    )
}

/// What would be kept and lost, in sentences.
fn consequences(recovery: &Recovery) -> String {
    let (node, last, term) =
        kept(recovery).map_or((0, 0, 0), |copy| (copy.node.0, copy.last, copy.last_term));
    let others = |is: fn(&ShardCopy) -> bool| {
        let others = recovery.copies.iter().filter(|copy| copy.replica != recovery.keep);
        let nodes = others.filter(|copy| is(copy)).map(|copy| copy.node.to_string());
        nodes.collect::<Vec<_>>().join(", ")
    };
    let (there, lost) = (others(|copy| copy.serves), others(|copy| !copy.serves));
    let mut text = format!(
        "the replica on node {node} would go on alone, with all that it has: entries up to {last} of term {term}"
    );
    if !lost.is_empty() {
        text.push_str(&format!(
            "\nlost: what only the replicas that are gone or unusable had (of nodes {lost}), also writes that were \
             acknowledged; nobody can tell whether there were any, or which"
        ));
    }
    if !there.is_empty() {
        // Who wins an election against another has all that was committed and is there (Raft §5.4.1).
        text.push_str(&format!(
            "\ngiven up, though they are there: the replicas of nodes {there}; what they have of acknowledged writes, \
             node {node} has too"
        ));
    }
    if recovery.shard == METADATA_SHARD {
        text.push_str(
            "\nthis shard holds the cluster map: what was decided since that replica last heard of it is lost. Databases \
             made since aren't served any more, those dropped since are listed again without their data, and settings, \
             drains and removals are as they were; nodes that joined since make themselves known again. Versions of \
             the map and new ids go on far above all that were in use",
        );
    } else {
        text.push_str(
            "\nversions of keys that are written from then on are far above all before; more replicas are added by \
             themselves while there are nodes for them",
        );
    }
    text
}

fn refuse(context: &Context, recovery: &Recovery) -> Result<Exit, Failure> {
    if context.json() {
        let mut object = json_of(recovery);
        object["decided"] = recovery.decided.into();
        output::json(&object)?;
    } else if recovery.decided {
        let node = kept(recovery).map_or(0, |copy| copy.node.0);
        output::line(format!(
            "shard {} of {} goes on with the replica on node {node}: that is decided{}",
            recovery.shard,
            recovery.database,
            if recovery.done { ", and done" } else { "; it doesn't lead yet" }
        ))?;
    } else {
        output::line(text_of(recovery))?;
        output::note(
            "nothing was changed. If a node that is gone can be brought back with its disk, do that instead. If not, the \
             same command with --accept-data-loss does it",
        );
    }
    Ok(if recovery.done { Exit::Done } else { Exit::Negative })
}

fn done(context: &Context, recovery: &Recovery, report: &Path) -> Result<Exit, Failure> {
    if context.json() {
        let mut object = json_of(recovery);
        object["decided"] = true.into();
        object["report"] = report.display().to_string().into();
        after_effect(output::json(&object))?;
    } else {
        let node = kept(recovery).map_or(0, |copy| copy.node.0);
        // What else there is to do, in the order in which it has to be done.
        let next = match recovery.shard {
            METADATA_SHARD => {
                "; next, the other shards that have lost their majority, which `pontoon status` shows, then `pontoon admin \
                 node remove ID --dead` for each node that is gone"
            }
            _ => "",
        };
        after_effect(output::line(format!(
            "shard {} of {} goes on with the replica on node {node}; which replicas were kept and given up is in {}{next}",
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
            last_term: 3,
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
            decided: false,
        }
    }

    #[test]
    fn what_is_kept_and_lost_is_told_apart() {
        let object = json_of(&recovery());
        assert_eq!(object["kept"]["node"], 1);
        assert_eq!(object["gone"].as_array().unwrap().len(), 2);
        let mut given_up = recovery();
        (given_up.copies[1].answers, given_up.copies[1].serves) = (true, true);
        let object = json_of(&given_up);
        assert_eq!((&object["gone"][0]["node"], &object["given_up"][0]["node"]), (&3.into(), &2.into()));
        assert_eq!((&object["shard"], &object["database"]), (&7.into(), &"demo".into()));
        let text = text_of(&recovery());
        for part in [
            "goes on",
            "gone",
            "node 1 would go on",
            "entries up to 40 of term 3",
            "of nodes 2, 3",
            "acknowledged",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(!text.contains("given up, though") && !text.contains("cluster map"), "{text}");
        let text = text_of(&given_up);
        for part in
            ["of nodes 3)", "given up, though they are there: the replicas of nodes 2;", "node 1 has too"]
        {
            assert!(text.contains(part), "{part}: {text}");
        }
        let text = text_of(&Recovery { shard: METADATA_SHARD, database: METADATA.into(), ..recovery() });
        assert!(
            text.contains("joined since make themselves known") && !text.contains("versions of keys"),
            "{text}"
        );
    }

    #[test]
    fn a_report_overwrites_nothing_but_what_it_goes_on_with() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("report.json");
        let read = || serde_json::from_slice::<Value>(&std::fs::read(&path).unwrap()).unwrap();
        let begin = |recovery: &Recovery| Report::begin(path.clone(), recovery);
        assert!(begin(&recovery()).unwrap().is_new);
        assert_eq!(read(), json_of(&recovery()));
        let other = Recovery { conf: 2 << 32, ..recovery() };
        assert_eq!(begin(&other).err().unwrap().exit, Exit::Usage);
        // The map has forgotten the others by the time that it is gone on with.
        let mut goes_on = Recovery { decided: true, ..recovery() };
        goes_on.copies.truncate(1);
        let mut report = begin(&goes_on).unwrap();
        report.end(&Recovery { done: true, ..goes_on }).unwrap();
        let told = read();
        assert_eq!((&told["done"], told["gone"].as_array().unwrap().len()), (&true.into(), 2));
        assert!(told["time"].as_u64().unwrap() > 1_500_000_000, "{told}");
        report.discard();
        assert!(path.exists());
        std::fs::write(&path, "something else").unwrap();
        assert_eq!(begin(&recovery()).err().unwrap().exit, Exit::Usage);
    }
}
