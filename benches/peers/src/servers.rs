//! Three servers, each a process, and their end whatever happens.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use crate::options::Common;
use crate::peer::Kind;

/// Servers of a cluster.
pub const SERVERS: usize = 3;

/// A server ends with whoever holds the other end of its keeper's input, however that one ends, and its data with it;
/// a line there keeps the data. The first line that the keeper prints is the server's process id. Settings and log,
/// named like the data, go with it, and the last one takes the directory of all.
const KEEPER: &str = r#"log=$1 data=$2; shift 2; "$0" "$@" >>"$log" 2>&1 </dev/null & server=$!; echo "$server"
exec >/dev/null 2>&1; read -r word; kill -KILL "$server"; wait "$server"; [ -n "$word" ] || { rm -rf "$data"*; rmdir "${data%/*}"; }"#;

/// One server, and who keeps it.
struct Server {
    /// HOST:PORT for clients.
    client: String,
    program: PathBuf,
    args: Vec<String>,
    data: PathBuf,
    log: PathBuf,
    kept: Option<Kept>,
}

/// A server that runs, or has run until it was killed.
struct Kept {
    keeper: Child,
    pid: Pid,
}

/// A cluster of three on this machine. Dropped: killed and removed.
pub struct Servers {
    /// Which program it is.
    pub kind: Kind,
    // Before the directory, which is theirs.
    servers: Vec<Server>,
    dir: tempfile::TempDir,
}

/// What processes have used.
#[derive(Clone, Copy, Default)]
pub struct Usage {
    /// Time on processors, in microseconds, to the next hundredth of a second.
    pub cpu_us: u64,
    /// Memory that is resident now, in bytes.
    pub resident_bytes: u64,
}

impl Servers {
    /// A cluster with nothing in it, not started yet.
    pub fn new(kind: Kind, common: &Common) -> Result<Servers, String> {
        let fail = |error: std::io::Error| format!("making a directory in {}: {error}", common.dir.display());
        std::fs::create_dir_all(&common.dir).map_err(fail)?;
        let dir = tempfile::Builder::new().prefix("peers-").tempdir_in(&common.dir).map_err(fail)?;
        let ports = free_ports(2 * SERVERS)?;
        let (clients, peers) = ports.split_at(SERVERS);
        let mut servers = Vec::new();
        for number in 0..SERVERS {
            let data = dir.path().join(format!("n{number}"));
            let (program, args) = match kind {
                Kind::Etcd => (common.etcd.clone(), etcd_args(number, clients, peers, &data)),
                Kind::Pontoon => {
                    let config = data.with_extension("toml");
                    let text = pontoon_settings(number, clients, peers, &data);
                    std::fs::write(&config, text).map_err(fail)?;
                    let args = ["serve".to_owned(), "--config".to_owned(), config.display().to_string()];
                    (common.pontoon.clone(), args.to_vec())
                }
            };
            let (client, log) = (address(clients[number]), data.with_extension("log"));
            servers.push(Server { client, program, args, data, log, kept: None });
        }
        Ok(Servers { kind, servers, dir })
    }

    /// Starts those that don't run, all at once.
    pub fn start(&mut self) -> Result<(), String> {
        self.servers.iter_mut().filter(|server| server.kept.is_none()).try_for_each(Server::start)
    }

    /// HOST:PORT of all, for clients.
    pub fn addresses(&self) -> Vec<String> {
        self.servers.iter().map(|server| server.client.clone()).collect()
    }

    /// Sends server `at` a signal that ends it. It is started again by [`Servers::revive`].
    pub fn signal(&mut self, at: usize, signal: Signal) -> Result<(), String> {
        let Some(kept) = &self.servers[at].kept else { return Err("that server doesn't run".into()) };
        kill_process(kept.pid, signal).map_err(|error| format!("ending a server: {error}"))
    }

    /// Starts server `at` again, on its data.
    pub fn revive(&mut self, at: usize) -> Result<(), String> {
        let server = &mut self.servers[at];
        if let Some(mut kept) = server.kept.take() {
            let told = kept.keeper.stdin.take().map_or(Ok(()), |mut input| input.write_all(b"keep\n"));
            told.and_then(|()| kept.keeper.wait()).map_err(|error| format!("a server's end: {error}"))?;
        }
        server.start()
    }

    /// What all together have used since they were started, and use.
    pub fn usage(&self) -> Usage {
        let each = self.servers.iter().filter_map(|server| server.kept.as_ref());
        each.map(|kept| usage(&kept.pid.as_raw_nonzero().to_string())).fold(Usage::default(), |all, one| {
            Usage { cpu_us: all.cpu_us + one.cpu_us, resident_bytes: all.resident_bytes + one.resident_bytes }
        })
    }

    /// Bytes that their files take on the disk, logs for people included.
    pub fn disk_bytes(&self) -> u64 {
        allocated(self.dir.path())
    }

    /// What the servers have logged last, for one who wonders why something failed.
    pub fn print_logs(&self) {
        for (server, number) in self.servers.iter().zip(1..) {
            let text = std::fs::read_to_string(&server.log).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            eprintln!(
                "{} {number}:\n{}",
                self.kind.name(),
                lines[lines.len().saturating_sub(8)..].join("\n")
            );
        }
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        for kept in self.servers.iter_mut().filter_map(|server| server.kept.as_mut()) {
            drop(kept.keeper.stdin.take());
        }
        for kept in self.servers.iter_mut().filter_map(|server| server.kept.as_mut()) {
            if let Err(error) = kept.keeper.wait() {
                eprintln!("a server's end: {error}");
            }
        }
    }
}

impl Server {
    fn start(&mut self) -> Result<(), String> {
        let fail = |error: std::io::Error| format!("starting {}: {error}", self.program.display());
        File::create(&self.log).map_err(fail)?;
        let mut keeper = Command::new("sh")
            .args(["-c", KEEPER])
            .arg(&self.program)
            .args([&self.log, &self.data])
            .args(&self.args)
            // Variables would change what is measured.
            .env_clear()
            .envs(std::env::var_os("PATH").map(|path| ("PATH", path)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // What a terminal sends to all in the foreground is for this process alone.
            .process_group(0)
            .spawn()
            .map_err(fail)?;
        let mut line = String::new();
        if let Some(output) = keeper.stdout.take() {
            BufReader::new(output).read_line(&mut line).map_err(fail)?;
        }
        let pid = line.trim().parse().ok().and_then(Pid::from_raw);
        let pid = pid.ok_or_else(|| format!("starting {}: no process id", self.program.display()))?;
        self.kept = Some(Kept { keeper, pid });
        Ok(())
    }
}

fn address(port: u16) -> String {
    format!("127.0.0.1:{port}")
}

/// etcd as it comes: nothing is set but names and addresses.
fn etcd_args(number: usize, clients: &[u16], peers: &[u16], data: &Path) -> Vec<String> {
    let url = |port: u16| format!("http://{}", address(port));
    let cluster: Vec<String> =
        peers.iter().enumerate().map(|(at, port)| format!("n{at}={}", url(*port))).collect();
    [
        ("name", format!("n{number}")),
        ("data-dir", data.display().to_string()),
        ("listen-client-urls", url(clients[number])),
        ("advertise-client-urls", url(clients[number])),
        ("listen-peer-urls", url(peers[number])),
        ("initial-advertise-peer-urls", url(peers[number])),
        ("initial-cluster", cluster.join(",")),
        ("initial-cluster-state", "new".to_owned()),
    ]
    .map(|(name, value)| format!("--{name}={value}"))
    .to_vec()
}

/// Pontoon as it comes, likewise.
fn pontoon_settings(number: usize, clients: &[u16], peers: &[u16], data: &Path) -> String {
    let all: Vec<String> = peers.iter().copied().map(address).collect();
    format!(
        "[node]\nid = \"n{number}\"\ndata_dir = {data:?}\n[client]\nlisten = \"{}\"\n\
         [peer]\nlisten = \"{}\"\n[cluster]\ninitial = {all:?}\n",
        address(clients[number]),
        all[number]
    )
}

/// Ports of 127.0.0.1 that were free a moment ago.
fn free_ports(count: usize) -> Result<Vec<u16>, String> {
    let bound: Result<Vec<TcpListener>, _> = (0..count).map(|_| TcpListener::bind("127.0.0.1:0")).collect();
    let ports = bound.and_then(|bound| bound.iter().map(|l| Ok(l.local_addr()?.port())).collect());
    ports.map_err(|error: std::io::Error| format!("finding free ports: {error}"))
}

/// What the process `pid` has used; `self` is this one. Nothing, of one that is gone.
pub fn usage(pid: &str) -> Usage {
    let read = |name: &str| std::fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap_or_default();
    // Behind the name, which may hold anything: from the third field on.
    let (stat, status) = (read("stat"), read("status"));
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace();
    // User and system time, in hundredths of a second, as Linux tells all programs.
    let hundredths: u64 = fields.skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = resident.and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    Usage { cpu_us: hundredths * 10_000, resident_bytes: kib.unwrap_or(0) * 1024 }
}

/// Bytes that the files under `dir` take. Files that vanish meanwhile count as nothing.
fn allocated(dir: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let Ok(entries) = std::fs::read_dir(dir) else { return 0 };
    let sizes = entries.flatten().map(|entry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => allocated(&entry.path()),
        Ok(metadata) => metadata.blocks() * 512,
        Err(_) => 0,
    });
    sizes.sum()
}
