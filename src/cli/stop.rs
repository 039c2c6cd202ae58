//! `stop`: ends the local cluster that runs in the background or in another terminal.

use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use super::context::Context;
use super::failure::{Exit, Failure};
use super::local::{Holder, LocalDir};
use super::output;
use crate::limits::STOP_MS_MAX;

/// `stop`
pub fn stop(context: &Context) -> Result<Exit, Failure> {
    let dir = context.local_dir()?;
    let pid = match dir.holder()? {
        Holder::None => {
            report(context, &dir, None)?;
            return Ok(Exit::Done);
        }
        Holder::Process(pid) => pid,
    };
    let Some((number, pid)) = pid.and_then(|n| Some((n, Pid::from_raw(i32::try_from(n).ok()?)?))) else {
        return Err(Failure::negative(
            "unknown_process",
            format!(
                "a process holds {}, and its lock file doesn't tell which; `fuser {}/lock` does",
                dir.path().display(),
                dir.path().display()
            ),
        ));
    };
    let asked = Instant::now();
    match kill_process(pid, Signal::TERM) {
        // Gone on its own in this moment.
        Ok(()) | Err(Errno::SRCH) => {}
        Err(error) => {
            return Err(Failure::negative(
                "not_permitted",
                format!("process {number} can't be told to stop: {error}; stop it as its owner"),
            ));
        }
    }
    // Until the lock is free: the process ends it with its life, so nothing of it runs after.
    while dir.holder()? == Holder::Process(Some(number)) {
        if asked.elapsed() > Duration::from_millis(STOP_MS_MAX) {
            return Err(Failure::negative(
                "still_running",
                format!(
                    "process {number} has not ended within {} s; `kill -9 {number}` ends it, and no \
                     acknowledged write is lost by that",
                    STOP_MS_MAX / 1000
                ),
            ));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    report(context, &dir, Some(number))?;
    Ok(Exit::Done)
}

fn report(context: &Context, dir: &LocalDir, stopped: Option<u32>) -> Result<(), Failure> {
    if context.json() {
        return output::json(&json!({"stopped": stopped.is_some(), "pid": stopped}));
    }
    let dir = dir.path().display();
    match stopped {
        Some(pid) => output::line(format!("stopped the local cluster in {dir} (pid {pid})")),
        None => output::line(format!("no local cluster runs in {dir}")),
    }
}
