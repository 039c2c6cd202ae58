//! `setup --detach`: this program again, in the background, and what it says until it is ready.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::args::SetupArgs;
use super::context::Context;
use super::failure::{Exit, Failure};
use super::local::{Holder, LocalDir};
use super::output;
use super::serve::ignore_closed_pipe;
use super::setup::timeout;
use super::signals::Signals;

/// How often the parent looks whether its child is ready.
const POLL: Duration = Duration::from_millis(20);

/// Starts this program again in the background and waits until it is ready or has failed.
pub fn detach(context: &Context, args: &SetupArgs, dir: &LocalDir) -> Result<Exit, Failure> {
    let signals = Signals::listen(None)?;
    let logs = dir.logs_dir();
    fs::create_dir_all(&logs).map_err(|error| Failure::io("creating", &logs, error))?;
    let err_path = dir.log_path();
    // The child's own: should two setups run at once, neither may take the other's `ready` for its.
    let (out, told) = Told::create(dir.told_path(std::process::id()))?;
    let mut err = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&err_path)
        .map_err(|error| Failure::io("writing", &err_path, error))?;
    let err_start = err.seek(SeekFrom::End(0)).map_err(|error| Failure::io("writing", &err_path, error))?;
    let program = std::env::current_exe()
        .map_err(|error| Failure::internal(format!("finding this program: {error}")))?;
    let mut child = Command::new(&program)
        .args(child_arguments())
        .stdin(Stdio::null())
        .stdout(out)
        .stderr(err)
        // Its own group: a Ctrl-C in this terminal is not meant for it.
        .process_group(0)
        .spawn()
        .map_err(|error| Failure::io("starting", &program, error))?;

    // The child gives up by itself; this is for one that can't even do that.
    let deadline = Instant::now() + timeout(context, args) * 2 + Duration::from_secs(10);
    loop {
        let exited = child
            .try_wait()
            .map_err(|error| Failure::internal(format!("waiting for the cluster: {error}")))?;
        let text = told.read()?;
        // The one that runs the nodes stays; one that found others running ends when it is ready.
        let done = match exited {
            Some(status) => status.success(),
            None => dir.holder()? == Holder::Process(Some(child.id())),
        };
        if done && is_ready(&text, context.json()) {
            output::bytes(&text).or_else(ignore_closed_pipe)?;
            return Ok(Exit::Done);
        }
        if let Some(status) = exited {
            return Err(child_failure(status.code(), &err_path, err_start));
        }
        if signals.is_stopped() || Instant::now() >= deadline {
            end(&mut child);
            return Err(Failure::unavailable(if signals.is_stopped() {
                "stopped before the cluster was ready".to_owned()
            } else {
                format!("the cluster was not ready in time; see {}", err_path.display())
            }));
        }
        std::thread::sleep(POLL);
    }
}

/// What the child has written to its stdout so far; of no use once it has been passed on.
struct Told {
    path: PathBuf,
}

impl Told {
    fn create(path: PathBuf) -> Result<(File, Told), Failure> {
        let file = File::create(&path).map_err(|e| Failure::io("writing", &path, e))?;
        Ok((file, Told { path }))
    }

    fn read(&self) -> Result<Vec<u8>, Failure> {
        fs::read(&self.path).map_err(|error| Failure::io("reading", &self.path, error))
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        // If it stays, `clean` removes it.
        fs::remove_file(&self.path).ok();
    }
}

/// The arguments of this process, with `--detach` turned into what tells the child its part.
fn child_arguments() -> Vec<std::ffi::OsString> {
    let args = super::args::modernise(std::env::args_os().collect());
    args.into_iter().skip(1).map(|arg| if arg == "--detach" { "--detached".into() } else { arg }).collect()
}

/// Whether the child has written all it writes when ready.
fn is_ready(text: &[u8], json: bool) -> bool {
    if json { text.ends_with(b"}\n") } else { text.ends_with(b"\nready\n") }
}

/// The child's own error, as it told it.
fn child_failure(code: Option<i32>, log: &Path, start: u64) -> Failure {
    let read = || -> io::Result<String> {
        let mut file = File::open(log)?;
        file.seek(SeekFrom::Start(start))?;
        io::read_to_string(file)
    };
    let text = read().unwrap_or_default();
    let told = text.lines().rev().find_map(|line| {
        let from_json = || {
            let value: serde_json::Value = serde_json::from_str(line).ok()?;
            Some(value["error"]["message"].as_str()?.to_owned())
        };
        line.strip_prefix("error: ").map(str::to_owned).or_else(from_json)
    });
    let log = log.display();
    let message = match told {
        Some(message) => format!("{message} (log: {log})"),
        None => format!("the cluster ended before it was ready; see {log}"),
    };
    match code {
        Some(1) => Failure::negative("setup_failed", message),
        Some(2) => Failure::usage("setup_failed", message),
        Some(3) => Failure::unavailable(message),
        Some(4) => Failure::unknown(message),
        _ => Failure::internal(message),
    }
}

/// Stops a child that nobody waits for any more.
fn end(child: &mut Child) {
    if let Some(pid) = Pid::from_raw(child.id() as i32) {
        kill_process(pid, Signal::TERM).ok();
    }
    let deadline = Instant::now() + Duration::from_secs(6);
    while Instant::now() < deadline {
        if !matches!(child.try_wait(), Ok(None)) {
            return;
        }
        std::thread::sleep(POLL);
    }
    child.kill().ok();
    child.wait().ok();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_childs_error_is_told() {
        let temp = tempfile::tempdir().unwrap();
        let log = temp.path().join("setup.log");
        let old = "error: of last time\n";
        fs::write(&log, format!("{old}INFO starting\nerror: port taken\nINFO bye\n")).unwrap();
        let failure = child_failure(Some(2), &log, old.len() as u64);
        assert_eq!(failure.exit, Exit::Usage);
        assert!(failure.message.starts_with("port taken"), "{failure}");
        fs::write(&log, r#"{"error":{"code":"x","message":"no room"}}"#).unwrap();
        assert!(child_failure(Some(70), &log, 0).message.starts_with("no room"));
        let failure = child_failure(None, &log, 1000);
        assert_eq!(failure.exit, Exit::Internal);
        assert!(failure.message.contains("setup.log"));
    }

    #[test]
    fn ready_is_the_last_line() {
        assert!(is_ready(b"table\nready\n", false));
        assert!(!is_ready(b"table\nread", false));
        assert!(!is_ready(b"", true));
        assert!(is_ready(b"{\"ready\":true}\n", true));
    }
}
