//! A cluster for a test: nodes that are processes of their own, in a directory of their own, and
//! that end with the test whatever becomes of it.
//!
//! Each child runs `serve` with settings made for it. Three things see to its end: `close` stops it
//! cleanly; dropping the [`Trial`] kills it; and should this process be killed itself, the child's
//! stdin ends, upon which it exits.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use futures_util::future::{join_all, try_join_all};
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

use super::failure::{Exit, Failure};
use super::local::bind_free_port;
use super::serve::bound_to;
use crate::ids::RandomId;
use crate::limits::STOP_MS_MAX;
use crate::settings::Settings;

/// Lines of a node's log that are shown when it fails.
const TAIL_LINES: usize = 15;

/// How often a start with new ports is tried.
const ATTEMPTS: u32 = 3;

/// The cluster.
pub struct Trial {
    dir: PathBuf,
    nodes: Vec<TrialNode>,
}

/// A node of it.
struct TrialNode {
    label: String,
    client: String,
    log: PathBuf,
    child: Child,
    // Held so that the child never writes to a closed pipe.
    stdout: Lines<BufReader<ChildStdout>>,
    alive: bool,
}

impl Trial {
    /// Starts `count` nodes and waits until each is ready.
    pub async fn start(count: u32, timeout: Duration) -> Result<Trial, Failure> {
        let mut attempt = 1;
        loop {
            match Trial::start_once(count, timeout).await {
                // Between the choice of a port and its use somebody else may take it.
                Err(failure) if failure.exit == Exit::Usage && attempt < ATTEMPTS => attempt += 1,
                result => return result,
            }
        }
    }

    async fn start_once(count: u32, timeout: Duration) -> Result<Trial, Failure> {
        let name = format!("pontoon-test-{}", RandomId::random());
        let dir = std::env::temp_dir().join(name);
        fs::create_dir(&dir).map_err(|error| Failure::io("creating", &dir, error))?;
        // From here on, dropping it removes what is there.
        let mut trial = Trial { dir, nodes: Vec::new() };
        let mut ports = Vec::new();
        for _ in 0..2 * count {
            ports.push(
                bind_free_port().map_err(|error| {
                    Failure::usage("address", format!("no free port on 127.0.0.1: {error}"))
                })?,
            );
        }
        let addresses = ports.iter().map(bound_to).collect::<Result<Vec<_>, _>>()?;
        let (clients, peers) = addresses.split_at(count as usize);
        let initial: Vec<String> = peers.iter().map(ToString::to_string).collect();
        // Given free for the children.
        drop(ports);
        for (number, (client, peer)) in clients.iter().zip(peers).enumerate() {
            let label = format!("n{}", number + 1);
            let data = trial.dir.join(&label);
            let settings = Settings::for_local_node(data, &label, *client, *peer, initial.clone());
            let node = TrialNode::spawn(&trial.dir, label, &settings)?;
            trial.nodes.push(node);
        }
        let ready = try_join_all(trial.nodes.iter_mut().map(TrialNode::ready));
        match tokio::time::timeout(timeout, ready).await {
            Ok(result) => result.map(drop)?,
            Err(_) => {
                return Err(Failure::unavailable(format!(
                    "the nodes were not ready within {timeout:?}; allow more time with \
                     --timeout{}",
                    trial.tails()
                )));
            }
        }
        Ok(trial)
    }

    /// Client addresses of the nodes that live.
    pub fn hosts(&self) -> Vec<String> {
        let alive = self.nodes.iter().filter(|node| node.alive);
        alive.map(|node| node.client.clone()).collect()
    }

    /// Kills the node at a client address with SIGKILL, and waits until it is dead.
    pub async fn crash(&mut self, host: &str) -> Result<(), Failure> {
        let Some(node) = self.nodes.iter_mut().find(|node| node.client == host) else {
            return Err(Failure::internal(format!("no node of this test is at {host}")));
        };
        node.alive = false;
        node.child
            .kill()
            .await
            .map_err(|error| Failure::internal(format!("killing the node at {host}: {error}")))
    }

    /// Stops all nodes that live, cleanly where they can, and calls `closed` for each.
    pub async fn close(&mut self, mut closed: impl FnMut(&str)) {
        let alive = self.nodes.iter_mut().filter(|node| node.alive);
        let hosts = join_all(alive.map(async |node| {
            node.stop().await;
            node.client.clone()
        }));
        for host in hosts.await {
            closed(&host);
        }
    }

    /// The end of each node's log, for when something went wrong.
    pub fn tails(&self) -> String {
        let tails = self.nodes.iter().map(TrialNode::tail);
        tails.collect()
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        for node in &mut self.nodes {
            // Fails only if it is dead already.
            node.child.start_kill().ok();
        }
        let deadline = Instant::now() + Duration::from_secs(2);
        for node in &mut self.nodes {
            while matches!(node.child.try_wait(), Ok(None)) && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        if let Err(error) = fs::remove_dir_all(&self.dir) {
            super::output::note(format!("removing {}: {error}", self.dir.display()));
        }
    }
}

impl TrialNode {
    fn spawn(dir: &Path, label: String, settings: &Settings) -> Result<TrialNode, Failure> {
        let config = dir.join(format!("{label}.toml"));
        let log = dir.join(format!("{label}.log"));
        fs::write(&config, settings.to_toml()).map_err(|error| Failure::io("writing", &config, error))?;
        let stderr = File::create(&log).map_err(|e| Failure::io("writing", &log, e))?;
        let program = std::env::current_exe()
            .map_err(|error| Failure::internal(format!("finding this program: {error}")))?;
        let mut command = Command::new(&program);
        command
            .arg("serve")
            .arg("--config")
            .arg(&config)
            .arg("--until-stdin-closes")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(stderr)
            // Its own group: a Ctrl-C in this terminal reaches this process alone, which then acts.
            .process_group(0)
            .kill_on_drop(true);
        // The file says everything; what is meant for other nodes must not change it.
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("PONTOON__") {
                command.env_remove(name);
            }
        }
        let mut child = command.spawn().map_err(|error| Failure::io("starting", &program, error))?;
        let Some(stdout) = child.stdout.take() else {
            return Err(Failure::internal("a child has no stdout"));
        };
        Ok(TrialNode {
            label,
            client: settings.client.advertise.clone(),
            log,
            child,
            stdout: BufReader::new(stdout).lines(),
            alive: true,
        })
    }

    /// Waits for the ready line.
    async fn ready(&mut self) -> Result<(), Failure> {
        loop {
            match self.stdout.next_line().await {
                Ok(Some(line)) if line.starts_with("ready ") => return Ok(()),
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => break,
            }
        }
        let (code, status) = match self.child.wait().await {
            Ok(status) => (status.code(), status.to_string()),
            Err(error) => (None, error.to_string()),
        };
        let message = format!("node {} ended before it was ready ({status}){}", self.label, self.tail());
        Err(if code == Some(i32::from(Exit::Usage.code())) {
            Failure::usage("node_refused", message)
        } else {
            Failure::internal(message)
        })
    }

    /// SIGTERM, and SIGKILL if that takes longer than it may.
    async fn stop(&mut self) {
        let pid = self.child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
        if let Some(pid) = pid {
            // Fails only if it is dead already.
            kill_process(pid, Signal::TERM).ok();
        }
        let limit = Duration::from_millis(STOP_MS_MAX);
        if tokio::time::timeout(limit, self.child.wait()).await.is_err() {
            super::output::note(format!(
                "node {} has not stopped within {} s and is killed",
                self.label,
                STOP_MS_MAX / 1000
            ));
            self.child.kill().await.ok();
        }
        self.alive = false;
    }

    fn tail(&self) -> String {
        let text = fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        let from = lines.len().saturating_sub(TAIL_LINES);
        if lines.is_empty() {
            return String::new();
        }
        format!("\n--- log of {}:\n{}", self.label, lines[from..].join("\n"))
    }
}
