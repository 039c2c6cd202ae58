//! `clean`: removes the data of the local cluster.

use std::io::{self, BufRead, IsTerminal};

use serde_json::json;

use super::args::CleanArgs;
use super::context::Context;
use super::failure::{Exit, Failure};
use super::local::{ClusterFile, Holder, LocalDir};
use super::output;

/// `clean [--yes]`
pub fn clean(context: &Context, args: &CleanArgs) -> Result<Exit, Failure> {
    let dir = context.local_dir()?;
    if let Holder::Process(pid) = dir.holder()? {
        return Err(running(&dir, pid));
    }
    let Some(cluster) = dir.read()? else {
        if let Some(stranger) = dir.strangers()?.first() {
            output::note(format!(
                "{} holds `{stranger}` and no cluster.json: it is not the directory of a local \
                 cluster, and nothing in it was touched",
                dir.path().display()
            ));
        }
        report(context, &dir, false)?;
        return Ok(Exit::Done);
    };
    if !args.yes && !confirmed(&question(&cluster, &dir))? {
        return Err(Failure::negative("declined", "nothing was removed"));
    }
    // Between the question and the answer somebody may have started it.
    let lock = match dir.lock()? {
        Ok(lock) => lock,
        Err(Holder::Process(pid)) => return Err(running(&dir, pid)),
        Err(Holder::None) => return Err(running(&dir, None)),
    };
    for path in dir.remove(lock)? {
        output::note(format!("left {}, which no local cluster puts there", path.display()));
    }
    report(context, &dir, true)?;
    Ok(Exit::Done)
}

fn running(dir: &LocalDir, pid: Option<u32>) -> Failure {
    let pid = pid.map_or(String::new(), |pid| format!(" (pid {pid})"));
    Failure::negative(
        "running",
        format!(
            "the local cluster in {} is running{pid}; stop it first with `pontoon stop`",
            dir.path().display()
        ),
    )
}

fn question(cluster: &ClusterFile, dir: &LocalDir) -> String {
    let names: Vec<&str> = cluster.databases.iter().map(|db| db.name.as_str()).collect();
    format!(
        "Remove the local cluster in {} ({}; databases: {}) with all its data? [y/N] ",
        dir.path().display(),
        output::count(cluster.nodes.len() as u64, "node"),
        if names.is_empty() { "none".to_owned() } else { names.join(", ") }
    )
}

/// Asks on the terminal. Without one, nobody can have meant yes.
pub fn confirmed(question: &str) -> Result<bool, Failure> {
    let stdin = io::stdin();
    if !stdin.is_terminal() {
        return Err(Failure::usage(
            "no_terminal",
            "there is no terminal to ask on; say --yes to go ahead without asking",
        ));
    }
    io::Write::write_all(&mut io::stderr(), question.as_bytes()).ok();
    let mut answer = String::new();
    stdin
        .lock()
        .read_line(&mut answer)
        .map_err(|error| Failure::usage("io", format!("reading the answer: {error}")))?;
    Ok(matches!(answer.trim().to_lowercase().as_str(), "y" | "yes"))
}

fn report(context: &Context, dir: &LocalDir, removed: bool) -> Result<(), Failure> {
    if context.json() {
        return output::json(&json!({"removed": removed, "data": dir.path().display().to_string()}));
    }
    let dir = dir.path().display();
    if removed {
        output::line(format!("removed the local cluster in {dir}"))
    } else {
        output::line(format!("no local cluster in {dir}, nothing to remove"))
    }
}
