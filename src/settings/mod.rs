//! Settings of a node: shipped defaults, then a TOML file, then the environment, merged by the
//! `config` crate and validated as a whole into one [`Settings`]. `config/default.toml` is the
//! reference of all keys; [`SettingsErrors`] tells everything that is wrong at once, with places.
//!
//! `keys` says what exists, `load` merges and remembers where each value stands, `check` reads and
//! validates, `address` knows addresses.

mod address;
mod check;
mod error;
mod keys;
mod load;

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

pub use error::{Place, SettingsError, SettingsErrors};

/// The shipped reference of all keys, which is also where the defaults come from.
pub const DEFAULT_TOML: &str = include_str!("../../config/default.toml");

/// Everything an operator can set, validated as a whole. `config/default.toml` documents each key.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// `node.*`
    pub node: NodeSettings,
    /// `client.*`: the port for clients.
    pub client: ListenSettings,
    /// `peer.*`: the port for other nodes.
    pub peer: ListenSettings,
    /// `http.listen`: health and metrics; `None` turns it off.
    pub http_listen: Option<SocketAddr>,
    /// `cluster.*`
    pub cluster: ClusterSettings,
    /// `raft.*`
    pub raft: RaftSettings,
    /// `log.*`
    pub log: LogSettings,
    /// `storage.*`
    pub storage: StorageSettings,
    /// `snapshot.*`
    pub snapshot: SnapshotSettings,
}

/// Who this node is.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeSettings {
    /// A label for people; the cluster gives the NodeId.
    pub id: String,
    /// Where everything is kept. A relative path counts from the working directory of the process.
    pub data_dir: PathBuf,
    /// Failure domain; empty for none.
    pub zone: String,
    /// Share of replicas relative to other nodes, 100 is ordinary.
    pub weight: u32,
    /// Threads that own replicas and client connections; 0: one less than the cores, at least 1.
    pub data_threads: usize,
}

/// A port.
#[derive(Clone, Debug, PartialEq)]
pub struct ListenSettings {
    /// Address to listen on.
    pub listen: SocketAddr,
    /// HOST:PORT that others dial; defaults to `listen`. Port 0 only while `listen` has port 0 and
    /// isn't bound yet, see [`ListenSettings::bound`].
    pub advertise: String,
}

/// Which cluster, and how to get into it.
#[derive(Clone, Debug, PartialEq)]
pub struct ClusterSettings {
    /// Its name, for people.
    pub name: String,
    /// Peer addresses of all first nodes, the same list in each file; the first of them forms the cluster.
    pub initial: Vec<String>,
    /// Peer addresses of members to join through.
    pub join: Vec<String>,
}

/// How groups of replicas behave.
#[derive(Clone, Debug, PartialEq)]
pub struct RaftSettings {
    /// Idleness, in milliseconds, after which a group goes to sleep; 0: groups don't.
    pub hibernate_after_ms: u64,
}

impl RaftSettings {
    /// The same in ticks, rounded up.
    pub fn sleep_ticks(&self) -> u64 {
        self.hibernate_after_ms.div_ceil(crate::limits::TICK_MS)
    }
}

/// Format of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// What is logged, and how.
#[derive(Clone, Debug, PartialEq)]
pub struct LogSettings {
    /// A level or filter directives as `info,pontoon::group=debug`.
    pub level: String,
    /// The format.
    pub format: LogFormat,
}

/// Bounds of memory and disk.
#[derive(Clone, Debug, PartialEq)]
pub struct StorageSettings {
    /// Cache of the state engine, in bytes.
    pub cache_bytes: u64,
    /// Memtables of all replicas together, in bytes: above half of this they are flushed; above all
    /// of it, applying pauses.
    pub memtable_bytes: u64,
    /// Size of one raft log file, in bytes.
    pub log_file_bytes: u64,
    /// Raft log size above which old entries are flushed and compacted, in bytes.
    pub log_bytes: u64,
    /// Raft log of one shard that is kept for a replica which doesn't answer, in bytes.
    pub log_keep_bytes: u64,
    /// Log files prepared ahead for reuse.
    pub log_spare_files: usize,
    /// Free space of the data directory's file system, in bytes, below which the node takes no new
    /// values; 0: it takes them to the end.
    pub reserve_bytes: u64,
}

/// How followers that lag too far are brought up to date.
#[derive(Clone, Debug, PartialEq)]
pub struct SnapshotSettings {
    /// Bytes that a node sends in a second, over all snapshots.
    pub bytes_per_second: u64,
}

impl Settings {
    /// Reads a file, with the variables `PONTOON__…` of this process laid over it.
    ///
    /// # Errors
    /// Everything that is wrong with file and variables, a file that can't be read included.
    pub fn load(path: &Path) -> Result<Settings, SettingsErrors> {
        let name = path.display().to_string();
        let (environment, mut errors) = own_environment(&name);
        let text = match std::fs::read(path).map(String::from_utf8) {
            Ok(Ok(text)) => Ok(text),
            Ok(Err(_)) => Err("is not UTF-8 text".to_owned()),
            Err(cause) => Err(format!("can't be read: {cause}")),
        };
        let loaded = text
            .map_err(|reason| {
                vec![SettingsError { file: name.clone(), place: Place::File, key: String::new(), reason }]
            })
            .and_then(|text| read(&name, &text, environment.into_iter()));
        match loaded {
            Ok(settings) if errors.is_empty() => return Ok(settings),
            Ok(_) => {}
            Err(more) => errors.extend(more),
        }
        Err(SettingsErrors::from_list(errors))
    }

    /// Reads TOML text with the given environment laid over it; `name` stands for the file in
    /// errors. Variables that don't begin with `PONTOON__` are ignored.
    ///
    /// # Errors
    /// Everything that is wrong.
    pub fn load_str(
        name: &str,
        text: &str,
        environment: impl Iterator<Item = (String, String)>,
    ) -> Result<Settings, SettingsErrors> {
        read(name, text, environment).map_err(SettingsErrors::from_list)
    }

    /// The names of all keys, as `node.id`, in the order of [`DEFAULT_TOML`].
    pub fn keys() -> impl Iterator<Item = &'static str> {
        keys::KEYS.iter().map(|key| key.name)
    }

    /// Settings of a node that `pontoon setup` keeps on this machine beside others: loopback
    /// addresses, and a profile small enough for seven nodes in one process: small caches, small
    /// log files, none of them prepared ahead. Port 0 lets the system choose; `initial` may be
    /// empty only until the caller has filled it in.
    pub fn for_local_node(
        data_dir: PathBuf,
        label: &str,
        client: SocketAddr,
        peer: SocketAddr,
        initial: Vec<String>,
    ) -> Settings {
        const MIB: u64 = 1024 * 1024;
        Settings {
            node: NodeSettings {
                id: label.into(),
                data_dir,
                zone: String::new(),
                weight: 100,
                data_threads: 1,
            },
            client: ListenSettings::at(client),
            peer: ListenSettings::at(peer),
            http_listen: None,
            cluster: ClusterSettings { name: "local".into(), initial, join: Vec::new() },
            raft: RaftSettings { hibernate_after_ms: 10_000 },
            log: LogSettings { level: "info".into(), format: LogFormat::Text },
            storage: StorageSettings {
                cache_bytes: 16 * MIB,
                memtable_bytes: 32 * MIB,
                log_file_bytes: 8 * MIB,
                log_bytes: 64 * MIB,
                log_keep_bytes: 8 * MIB,
                log_spare_files: 0,
                reserve_bytes: 64 * MIB,
            },
            snapshot: SnapshotSettings { bytes_per_second: 64 * MIB },
        }
    }

    /// All settings in effect as TOML, each key written out. Loads again to an equal value. (A
    /// `data_dir` that is not UTF-8, which no file can hold, is written with replacement characters.)
    pub fn to_toml(&self) -> String {
        let mut out = String::new();
        for (name, values) in self.sections() {
            let gap = if out.is_empty() { "" } else { "\n" };
            // Writing to a string can't fail.
            let _ = writeln!(out, "{gap}[{name}]");
            for (key, value) in values {
                let _ = writeln!(out, "{key} = {value}");
            }
        }
        out
    }

    /// The same as a JSON object: a section is an object, a list an array.
    pub fn to_json(&self) -> serde_json::Value {
        let sections = self.sections().into_iter().map(|(name, values)| {
            let values = values.into_iter().map(|(key, value)| (key.to_owned(), json_of(&value)));
            (name.to_owned(), serde_json::Value::Object(values.collect()))
        });
        serde_json::Value::Object(sections.collect())
    }

    /// All settings in effect, by section and key.
    fn sections(&self) -> Vec<(&'static str, Vec<(&'static str, toml_edit::Value)>)> {
        let port = |port: &ListenSettings| {
            vec![("listen", port.listen.to_string().into()), ("advertise", (&port.advertise).into())]
        };
        let http = self.http_listen.map_or(String::new(), |a| a.to_string());
        let node = vec![
            ("id", (&self.node.id).into()),
            ("data_dir", self.node.data_dir.to_string_lossy().as_ref().into()),
            ("zone", (&self.node.zone).into()),
            ("weight", i64::from(self.node.weight).into()),
            ("data_threads", whole(self.node.data_threads as u64)),
        ];
        let cluster = vec![
            ("name", (&self.cluster.name).into()),
            ("initial", self.cluster.initial.iter().collect()),
            ("join", self.cluster.join.iter().collect()),
        ];
        let raft = vec![("hibernate_after_ms", whole(self.raft.hibernate_after_ms))];
        let log = vec![("level", (&self.log.level).into()), ("format", self.log.format.name().into())];
        let storage = vec![
            ("cache_bytes", whole(self.storage.cache_bytes)),
            ("memtable_bytes", whole(self.storage.memtable_bytes)),
            ("log_file_bytes", whole(self.storage.log_file_bytes)),
            ("log_bytes", whole(self.storage.log_bytes)),
            ("log_keep_bytes", whole(self.storage.log_keep_bytes)),
            ("log_spare_files", whole(self.storage.log_spare_files as u64)),
            ("reserve_bytes", whole(self.storage.reserve_bytes)),
        ];
        let snapshot = vec![("bytes_per_second", whole(self.snapshot.bytes_per_second))];
        vec![
            ("node", node),
            ("client", port(&self.client)),
            ("peer", port(&self.peer)),
            ("http", vec![("listen", http.into())]),
            ("cluster", cluster),
            ("raft", raft),
            ("log", log),
            ("storage", storage),
            ("snapshot", snapshot),
        ]
    }
}

impl ListenSettings {
    /// Listens on an address and advertises the same.
    pub fn at(listen: SocketAddr) -> ListenSettings {
        ListenSettings { listen, advertise: listen.to_string() }
    }

    /// Takes over the address that the socket was really bound to: where the port was left to the
    /// system (0), the advertised one becomes the chosen one.
    pub fn bound(&mut self, address: SocketAddr) {
        if self.listen.port() == 0
            && let Some(host) = self.advertise.strip_suffix(":0")
        {
            self.advertise = format!("{host}:{}", address.port());
        }
        self.listen = address;
    }
}

impl LogFormat {
    /// As written in TOML.
    pub fn name(self) -> &'static str {
        match self {
            LogFormat::Text => "text",
            LogFormat::Json => "json",
        }
    }
}

/// A setting in JSON. There are texts, whole numbers, and lists of texts.
fn json_of(value: &toml_edit::Value) -> serde_json::Value {
    match value {
        toml_edit::Value::Integer(number) => (*number.value()).into(),
        toml_edit::Value::Array(list) => list.iter().map(json_of).collect(),
        other => other.as_str().map_or_else(|| other.to_string().into(), Into::into),
    }
}

/// TOML has no unsigned numbers; no setting comes near the bound.
fn whole(value: u64) -> toml_edit::Value {
    i64::try_from(value).unwrap_or(i64::MAX).into()
}

fn read(
    name: &str,
    text: &str,
    environment: impl Iterator<Item = (String, String)>,
) -> Result<Settings, Vec<SettingsError>> {
    check::settings(load::Layers::read(name, text, environment)?)
}

/// The variables of this process that are ours. Those that aren't Unicode can't be meant well.
fn own_environment(file: &str) -> (Vec<(String, String)>, Vec<SettingsError>) {
    let mut variables = Vec::new();
    let mut errors = Vec::new();
    for (name, value) in std::env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        if !name.starts_with(keys::ENVIRONMENT_PREFIX) {
            continue;
        }
        match value.into_string() {
            Ok(value) => variables.push((name, value)),
            Err(_) => errors.push(SettingsError {
                file: file.into(),
                place: Place::Environment(name),
                key: String::new(),
                reason: "is not UTF-8 text".into(),
            }),
        }
    }
    (variables, errors)
}
