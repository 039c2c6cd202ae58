//! The command line as a user runs it: the real binary, a directory and an environment of its own,
//! and an eye on what it leaves behind.

use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// Nothing here takes so long; what does, hangs.
pub const HANG: Duration = Duration::from_secs(90);

/// A cluster that is down keeps its ports only in `cluster.json`. Who starts a new one holds this
/// for reading, who restarts one for writing: nobody takes the ports between.
pub static PORTS: RwLock<()> = RwLock::new(());

/// A user's home: everything that `pontoon` touches is in here. Dropped: what runs is killed.
pub struct Home {
    dir: tempfile::TempDir,
}

impl Home {
    pub fn new() -> Home {
        let dir = tempfile::tempdir().expect("a temporary directory");
        fs::create_dir(dir.path().join("tmp")).expect("a directory for temporary files");
        Home { dir }
    }

    /// A home with a cluster in the background.
    pub fn with_cluster(name: &str, replicas: u32, shards: u32) -> Home {
        let home = Home::new();
        home.start(&["setup", name, &replicas.to_string(), &shards.to_string(), "--detach"]).ok();
        home
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Where the local cluster is; made by `setup`.
    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// A path for a file of the test's own.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn command<S: AsRef<OsStr>>(&self, args: &[S]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pontoon"));
        command.args(args);
        self.environment(&mut command);
        command
    }

    /// Nothing of this machine's environment, and this home.
    pub fn environment(&self, command: &mut Command) {
        for name in ["PONTOON_CLUSTER", "XDG_DATA_HOME", "PONTOON__LOG__LEVEL"] {
            command.env_remove(name);
        }
        command
            .env("PONTOON_DATA", self.data())
            .env("HOME", self.path())
            .env("TMPDIR", self.dir.path().join("tmp"))
            .stdin(Stdio::null());
    }

    /// Runs a subcommand to its end.
    pub fn run<S: AsRef<OsStr>>(&self, args: &[S]) -> Ended {
        Running::spawn(self.command(args)).end(HANG)
    }

    /// The same with something on stdin.
    pub fn run_with<S: AsRef<OsStr>>(&self, args: &[S], stdin: &[u8]) -> Ended {
        let mut command = self.command(args);
        command.stdin(Stdio::piped());
        let mut running = Running::spawn(command);
        let mut pipe = running.child.stdin.take().expect("stdin");
        let bytes = stdin.to_vec();
        // A command that refuses its input early doesn't read it all.
        let writer = std::thread::spawn(move || pipe.write_all(&bytes).ok());
        let ended = running.end(HANG);
        writer.join().expect("the writer");
        ended
    }

    /// Runs a subcommand that may choose ports.
    pub fn start<S: AsRef<OsStr>>(&self, args: &[S]) -> Ended {
        let _ports = PORTS.read().unwrap_or_else(|poisoned| poisoned.into_inner());
        self.run(args)
    }

    /// Starts a subcommand that runs until it is told to stop.
    pub fn spawn<S: AsRef<OsStr>>(&self, args: &[S]) -> Running {
        Running::spawn(self.command(args))
    }

    /// Starts `setup` in the foreground and waits until it says `ready`.
    pub fn foreground<S: AsRef<OsStr>>(&self, args: &[S]) -> Running {
        let _ports = PORTS.read().unwrap_or_else(|poisoned| poisoned.into_inner());
        let running = self.spawn(args);
        running.wait_for("ready\n", HANG);
        running
    }

    /// The process of the local cluster, as `cluster.json` tells.
    pub fn pid(&self) -> u32 {
        let text = fs::read(self.data().join("cluster.json")).expect("cluster.json");
        let cluster: Value = serde_json::from_slice(&text).expect("JSON");
        u32::try_from(cluster["pid"].as_u64().expect("a pid")).expect("a pid")
    }

    /// Processes of this home that run still, found by their environment.
    pub fn processes(&self) -> Vec<u32> {
        let mark = self.path().as_os_str().as_bytes();
        let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
        let numbers = entries.flatten().filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
        numbers
            .filter(|pid| {
                // Of a zombie, and of other people's processes, nothing is read.
                let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
                environment.windows(mark.len()).any(|window| window == mark)
            })
            .collect()
    }

    /// Asserts that no process runs and no temporary file is left.
    pub fn assert_nothing_left(&self) {
        assert_eq!(self.processes(), Vec::<u32>::new(), "processes are left");
        let left: Vec<_> = fs::read_dir(self.dir.path().join("tmp"))
            .expect("the directory for temporary files")
            .map(|entry| entry.expect("an entry").path())
            .collect();
        assert_eq!(left, Vec::<PathBuf>::new(), "temporary files are left");
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        for pid in self.processes() {
            if let Some(pid) = Pid::from_raw(pid as i32) {
                kill_process(pid, Signal::KILL).ok();
            }
        }
    }
}

/// A command that runs, its output being read.
pub struct Running {
    pub child: Child,
    began: Instant,
    stdout: Arc<Mutex<Vec<u8>>>,
    stderr: Arc<Mutex<Vec<u8>>>,
    closed: [Receiver<()>; 2],
    ended: bool,
}

fn collect(mut from: impl Read + Send + 'static) -> (Arc<Mutex<Vec<u8>>>, Receiver<()>) {
    let text = Arc::new(Mutex::new(Vec::new()));
    let (sender, closed) = mpsc::channel();
    let all = text.clone();
    std::thread::spawn(move || {
        let mut chunk = [0; 65536];
        while let Ok(read @ 1..) = from.read(&mut chunk) {
            all.lock().expect("the text").extend_from_slice(&chunk[..read]);
        }
        sender.send(()).ok();
    });
    (text, closed)
}

impl Running {
    pub fn spawn(mut command: Command) -> Running {
        let began = Instant::now();
        let mut child =
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary runs");
        let (stdout, out_closed) = collect(child.stdout.take().expect("stdout"));
        let (stderr, err_closed) = collect(child.stderr.take().expect("stderr"));
        Running { child, began, stdout, stderr, closed: [out_closed, err_closed], ended: false }
    }

    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.stdout.lock().expect("the text")).into_owned()
    }

    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.stderr.lock().expect("the text")).into_owned()
    }

    /// Waits until stdout holds `text`.
    pub fn wait_for(&self, text: &str, within: Duration) {
        let begun = Instant::now();
        while !self.stdout().contains(text) {
            assert!(
                begun.elapsed() < within,
                "no {text:?} within {within:?}; stdout:\n{}\nstderr:\n{}",
                self.stdout(),
                self.stderr()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.child.id() as i32).expect("a pid");
        kill_process(pid, signal).expect("it runs");
    }

    /// Waits for its end, at most so long after now.
    pub fn end(mut self, within: Duration) -> Ended {
        let from = Instant::now();
        let status: ExitStatus = loop {
            if let Some(status) = self.child.try_wait().expect("its state") {
                break status;
            }
            assert!(
                from.elapsed() < within,
                "still running after {within:?}; stdout:\n{}\nstderr:\n{}",
                self.stdout(),
                self.stderr()
            );
            std::thread::sleep(Duration::from_millis(5));
        };
        self.ended = true;
        let took = self.began.elapsed();
        for closed in &self.closed {
            // A child of its own that it left behind may hold the pipe.
            closed.recv_timeout(Duration::from_secs(5)).expect("its output ends with it");
        }
        Ended {
            code: status.code(),
            stdout: std::mem::take(&mut *self.stdout.lock().expect("the text")),
            stderr: std::mem::take(&mut *self.stderr.lock().expect("the text")),
            took,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.ended {
            self.child.kill().ok();
            self.child.wait().ok();
        }
    }
}

/// What became of a command.
#[derive(Debug)]
pub struct Ended {
    /// `None`: a signal ended it.
    pub code: Option<i32>,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    /// From its start.
    pub took: Duration,
}

impl Ended {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    pub fn errors(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Asserts the exit code.
    #[track_caller]
    pub fn exits(self, code: i32) -> Ended {
        assert_eq!(
            self.code,
            Some(code),
            "after {:?}; stdout:\n{:.2000}\nstderr:\n{:.4000}",
            self.took,
            self.text(),
            self.errors()
        );
        self
    }

    /// Asserts that it is done as asked.
    #[track_caller]
    pub fn ok(self) -> Ended {
        self.exits(0)
    }

    /// Asserts that stderr has these parts.
    #[track_caller]
    pub fn says(self, parts: &[&str]) -> Ended {
        for part in parts {
            assert!(self.errors().contains(part), "no {part:?} in:\n{}", self.errors());
        }
        self
    }

    /// The one JSON object on stdout.
    #[track_caller]
    pub fn json(&self) -> Value {
        let text = self.text();
        assert_eq!(text.lines().count(), 1, "not one line:\n{text}");
        let value: Value = serde_json::from_str(&text).expect("stdout is JSON");
        assert!(value.is_object(), "{value}");
        value
    }

    /// The error object on stderr, its four fields checked.
    #[track_caller]
    pub fn json_error(&self) -> Value {
        assert_eq!(self.text(), "", "an error has nothing on stdout");
        let text = self.errors();
        assert_eq!(text.lines().count(), 1, "not one line:\n{text}");
        self.last_json_error()
    }

    /// The error object on the last line of stderr, its four fields checked; before it, how far something was.
    #[track_caller]
    pub fn last_json_error(&self) -> Value {
        assert_eq!(self.text(), "", "an error has nothing on stdout");
        let text = self.errors();
        let mut lines = text.lines().rev();
        let value: Value = serde_json::from_str(lines.next().unwrap_or("")).expect("stderr is JSON");
        for line in lines {
            let value: Value = serde_json::from_str(line).expect("stderr is JSON");
            assert_eq!(keys(&value), ["progress"]);
        }
        assert_eq!(keys(&value), ["error"]);
        let error = &value["error"];
        assert_eq!(keys(error), ["code", "message", "retryable", "outcome"]);
        assert!(error["code"].as_str().is_some_and(|code| !code.is_empty()), "{error}");
        assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()), "{error}");
        assert!(error["retryable"].is_boolean(), "{error}");
        assert!(matches!(error["outcome"].as_str(), Some("not_applied" | "unknown")), "{error}");
        error.clone()
    }
}

/// The names of an object's fields, in order.
pub fn keys(value: &Value) -> Vec<&str> {
    value.as_object().expect("an object").keys().map(String::as_str).collect()
}
