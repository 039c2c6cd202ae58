//! From merged values to [`Settings`]: types, ranges, addresses, and what must hold between keys.
//! Every check runs as far as its inputs are known, so that one mistake doesn't hide another.

use std::net::SocketAddr;

use config::ValueKind;

use super::address::{collide, parse_address};
use super::error::SettingsError;
use super::keys::{self, ADDRESSES_MAX, Kind, LABEL_BYTES_MAX, LOG_FILES_MIN, parse_size, show_size};
use super::load::Layers;
use super::*;

/// Reads and validates everything.
pub(super) fn settings(layers: Layers) -> Result<Settings, Vec<SettingsError>> {
    let mut reader = Reader { layers };
    let settings = reader.settings();
    let errors = reader.layers.into_errors();
    match settings {
        Some(settings) if errors.is_empty() => Ok(settings),
        _ => Err(errors),
    }
}

struct Reader {
    layers: Layers,
}

impl Reader {
    /// `None` only together with an error. All parts are read before the first `?`.
    fn settings(&mut self) -> Option<Settings> {
        let node = self.node();
        let client = self.port("client");
        let peer = self.port("peer");
        let http_listen = self.http();
        let cluster = self.cluster();
        let log = self.log();
        let storage = self.storage();
        let hibernate_after_ms = self.number("raft.hibernate_after_ms");
        let bytes_per_second = self.number("snapshot.bytes_per_second");
        self.ports(client.as_ref(), peer.as_ref(), http_listen.flatten());
        if let (Some(cluster), Some(peer)) = (&cluster, &peer) {
            self.membership(cluster, peer);
        }
        Some(Settings {
            node: node?,
            client: client?,
            peer: peer?,
            http_listen: http_listen?,
            cluster: cluster?,
            log: log?,
            storage: storage?,
            raft: RaftSettings { hibernate_after_ms: hibernate_after_ms? },
            snapshot: SnapshotSettings { bytes_per_second: bytes_per_second? },
        })
    }

    fn node(&mut self) -> Option<NodeSettings> {
        let id = self.label("node.id");
        if id.as_ref().is_some_and(String::is_empty) {
            self.missing("node.id", "give the node a label of its own, as \"n1\"");
        }
        let data_dir = self.text("node.data_dir");
        if let Some(path) = &data_dir {
            if path.trim().is_empty() {
                self.missing("node.data_dir", "name the directory for this node's data");
            } else if path.contains('\0') {
                self.layers.reject("node.data_dir", "is not a path");
            }
        }
        let zone = self.label("node.zone");
        let weight = self.number("node.weight");
        let data_threads = self.number("node.data_threads");
        Some(NodeSettings {
            id: id?,
            data_dir: data_dir?.into(),
            zone: zone?,
            weight: weight?.try_into().ok()?,
            data_threads: data_threads?.try_into().ok()?,
        })
    }

    fn port(&mut self, section: &str) -> Option<ListenSettings> {
        let listen = self.listen(&format!("{section}.listen"));
        let key = format!("{section}.advertise");
        let advertise = self.text(&key)?;
        if !advertise.is_empty() {
            let checked = parse_address(&advertise).and_then(|address| match (address.port, listen) {
                (0, Some(listen)) if listen.port() != 0 => {
                    Err(format!("{advertise:?} has no port that can be dialled"))
                }
                _ => Ok(address),
            });
            return match checked {
                Ok(address) => Some(ListenSettings { listen: listen?, advertise: address.to_string() }),
                Err(reason) => {
                    self.layers.reject(&key, reason);
                    None
                }
            };
        }
        let listen = listen?;
        if listen.ip().is_unspecified() {
            let reason = format!(
                "is not set, and {section}.listen is {listen}, which nobody can dial; \
                 set the HOST:PORT at which others reach this node"
            );
            self.layers.reject(&key, reason);
            return None;
        }
        Some(ListenSettings::at(listen))
    }

    fn http(&mut self) -> Option<Option<SocketAddr>> {
        match self.text("http.listen")?.is_empty() {
            true => Some(None),
            false => self.listen("http.listen").map(Some),
        }
    }

    fn cluster(&mut self) -> Option<ClusterSettings> {
        let name = self.label("cluster.name");
        if name.as_ref().is_some_and(String::is_empty) {
            self.layers.reject("cluster.name", "must not be empty");
        }
        let initial = self.addresses("cluster.initial");
        let join = self.addresses("cluster.join");
        Some(ClusterSettings { name: name?, initial: initial?, join: join? })
    }

    fn log(&mut self) -> Option<LogSettings> {
        let level = self.text("log.level");
        let checked = level.as_deref().map(crate::telemetry::log::parse_level);
        if let Some(Err(reason)) = checked {
            self.layers.reject("log.level", reason);
        }
        let format = match self.text("log.format")?.as_str() {
            "text" => Some(LogFormat::Text),
            "json" => Some(LogFormat::Json),
            other => {
                let reason = format!("{other:?} is neither \"text\" nor \"json\"");
                self.layers.reject("log.format", reason);
                None
            }
        };
        Some(LogSettings { level: level?, format: format? })
    }

    fn storage(&mut self) -> Option<StorageSettings> {
        let engine = self.engine();
        let cache_bytes = self.number("storage.cache_bytes");
        let memtable_bytes = self.number("storage.memtable_bytes");
        let log_file_bytes = self.number("storage.log_file_bytes");
        let log_bytes = self.number("storage.log_bytes");
        let log_keep_bytes = self.number("storage.log_keep_bytes");
        let log_spare_files = self.number("storage.log_spare_files");
        let reserve_bytes = self.number("storage.reserve_bytes");
        if let (Some(file), Some(log)) = (log_file_bytes, log_bytes) {
            let files = log / file;
            if files < LOG_FILES_MIN {
                let reason = format!(
                    "must be at least {LOG_FILES_MIN} times storage.log_file_bytes ({}), \
                     that is {}",
                    show_size(file),
                    show_size(LOG_FILES_MIN * file)
                );
                self.layers.reject("storage.log_bytes", reason);
            } else if let Some(spare) = log_spare_files
                && spare > files
            {
                let reason = format!(
                    "{spare} files of {} are more than storage.log_bytes ({}) has room for; \
                     at most {files}",
                    show_size(file),
                    show_size(log)
                );
                self.layers.reject("storage.log_spare_files", reason);
            }
        }
        Some(StorageSettings {
            engine: engine?,
            cache_bytes: cache_bytes?,
            memtable_bytes: memtable_bytes?,
            log_file_bytes: log_file_bytes?,
            log_bytes: log_bytes?,
            log_keep_bytes: log_keep_bytes?,
            log_spare_files: log_spare_files?.try_into().ok()?,
            reserve_bytes: reserve_bytes?,
        })
    }

    /// `Some(None)`: whatever made the state that is there.
    fn engine(&mut self) -> Option<Option<EngineKind>> {
        let name = self.text("storage.engine")?;
        let engine = EngineKind::parse(&name);
        if engine.is_none() && name != "auto" {
            let known = EngineKind::ALL.map(|kind| format!("{:?}", kind.name())).join(", ");
            self.layers.reject("storage.engine", format!("{name:?} is none of \"auto\", {known}"));
            return None;
        }
        Some(engine)
    }

    /// No two of our listeners on one port, no two advertised addresses the same.
    fn ports(
        &mut self,
        client: Option<&ListenSettings>,
        peer: Option<&ListenSettings>,
        http: Option<SocketAddr>,
    ) {
        let listeners = [
            ("client.listen", client.map(|port| port.listen)),
            ("peer.listen", peer.map(|port| port.listen)),
            ("http.listen", http),
        ];
        for (i, (key, address)) in listeners.iter().enumerate() {
            for (earlier, other) in &listeners[..i] {
                if let (Some(address), Some(other)) = (address, other)
                    && collide(*address, *other)
                {
                    let reason = format!("{address} is taken by {earlier} ({other})");
                    self.layers.reject(key, reason);
                }
            }
        }
        if let (Some(client), Some(peer)) = (client, peer)
            && client.advertise == peer.advertise
            && !collide(client.listen, peer.listen)
            && !client.advertise.ends_with(":0")
        {
            let reason = format!("{:?} is also client.advertise", peer.advertise);
            self.layers.reject("peer.advertise", reason);
        }
    }

    /// A way into a cluster, and this node among the first ones if those are listed.
    fn membership(&mut self, cluster: &ClusterSettings, peer: &ListenSettings) {
        let own = &peer.advertise;
        if cluster.initial.is_empty() && cluster.join.is_empty() {
            self.layers.reject(
                "cluster.initial",
                "neither cluster.initial nor cluster.join is set; list the peer addresses of all \
                 first nodes in cluster.initial to form a cluster, or those of some members in \
                 cluster.join to enter one",
            );
        } else if !cluster.initial.is_empty() && !cluster.initial.contains(own) {
            let reason = format!(
                "does not list this node's own peer.advertise {own:?}; add it, or leave \
                 cluster.initial empty and name members in cluster.join"
            );
            self.layers.reject("cluster.initial", reason);
        } else if cluster.initial.is_empty() && cluster.join.iter().all(|member| member == own) {
            let reason = format!("names no other node than this one ({own:?})");
            self.layers.reject("cluster.join", reason);
        }
    }

    fn addresses(&mut self, key: &str) -> Option<Vec<String>> {
        let list = self.list(key)?;
        if list.len() > ADDRESSES_MAX {
            let reason = format!("has {} addresses, at most {ADDRESSES_MAX}", list.len());
            self.layers.reject(key, reason);
            return None;
        }
        let mut addresses: Vec<String> = Vec::new();
        let mut sound = true;
        for (i, text) in list.iter().enumerate() {
            let checked = parse_address(text).and_then(|address| match address.to_string() {
                _ if address.port == 0 => Err(format!("{text:?} has no port that can be dialled")),
                address if addresses.contains(&address) => Err(format!("{text:?} is listed twice")),
                address => Ok(address),
            });
            match checked {
                Ok(address) => addresses.push(address),
                Err(reason) => {
                    self.layers.reject_element(key, i, reason);
                    sound = false;
                }
            }
        }
        sound.then_some(addresses)
    }

    fn listen(&mut self, key: &str) -> Option<SocketAddr> {
        let text = self.text(key)?;
        let parsed = text.parse();
        if parsed.is_err() {
            let reason = format!(
                "{text:?} is not IP:PORT; write an address of this machine as \
                 \"127.0.0.1:7101\", or \"0.0.0.0:7101\" for all of them"
            );
            self.layers.reject(key, reason);
        }
        parsed.ok()
    }

    /// A name for people: bounded, printable.
    fn label(&mut self, key: &str) -> Option<String> {
        let text = self.text(key)?;
        let reason = if text.len() > LABEL_BYTES_MAX {
            format!("has {} bytes, at most {LABEL_BYTES_MAX}", text.len())
        } else if text.chars().any(|c| c.is_control() || c.is_whitespace()) {
            format!("{text:?} has spaces or control characters")
        } else {
            return Some(text);
        };
        self.layers.reject(key, reason);
        None
    }

    fn text(&mut self, key: &str) -> Option<String> {
        match self.layers.value(key)? {
            ValueKind::String(text) => Some(text),
            other => {
                let reason = format!("must be a string in quotes, not {}", show(&other));
                self.layers.reject(key, reason);
                None
            }
        }
    }

    /// A count or a size, within the range of its key.
    fn number(&mut self, key: &str) -> Option<u64> {
        let (min, max, is_size) = match keys::find(key)?.kind {
            Kind::Count { min, max } => (min, max, false),
            Kind::Size { min, max } => (min, max, true),
            Kind::Text | Kind::List => return None,
        };
        let parsed = match self.layers.value(key)? {
            // A negative number is below any least value.
            ValueKind::I64(number) => Ok(u64::try_from(number).ok()),
            ValueKind::String(text) if is_size => parse_size(&text).map(Some),
            // Whatever comes from the environment is a string.
            ValueKind::String(text) if self.layers.is_environment(key) => {
                text.trim().parse().map(Some).map_err(|_| format!("{text:?} is not a whole number"))
            }
            other if is_size => {
                Err(format!("must be a whole number of bytes or a string as \"64MiB\", not {}", show(&other)))
            }
            other => Err(format!("must be a whole number, not {}", show(&other))),
        };
        let show = |number| match is_size {
            true => show_size(number),
            false => number.to_string(),
        };
        let reason = match parsed {
            Ok(Some(number)) if (min..=max).contains(&number) => return Some(number),
            Ok(number) => format!(
                "{} is out of range, {} to {}",
                number.map_or("a negative number".into(), show),
                show(min),
                show(max)
            ),
            Err(reason) => reason,
        };
        self.layers.reject(key, reason);
        None
    }

    fn list(&mut self, key: &str) -> Option<Vec<String>> {
        match self.layers.value(key)? {
            ValueKind::Array(values) => {
                let mut list = Vec::new();
                let count = values.len();
                for (i, value) in values.into_iter().enumerate() {
                    match value.kind {
                        ValueKind::String(text) => list.push(text),
                        other => {
                            let reason = format!("must hold strings in quotes, not {}", show(&other));
                            self.layers.reject_element(key, i, reason);
                        }
                    }
                }
                (list.len() == count).then_some(list)
            }
            ValueKind::String(text) if self.layers.is_environment(key) => Some(
                text.split(',').map(|part| part.trim().to_owned()).filter(|part| !part.is_empty()).collect(),
            ),
            other => {
                let reason = format!("must be an array of strings, not {}", show(&other));
                self.layers.reject(key, reason);
                None
            }
        }
    }

    /// Rejects an empty value of a required key.
    fn missing(&mut self, key: &str, remedy: &str) {
        let what = match self.layers.is_default(key) {
            true => "is not set",
            false => "is empty",
        };
        self.layers.reject(key, format!("{what}; {remedy}"));
    }
}

fn show(value: &ValueKind) -> String {
    match value {
        ValueKind::Nil => "nothing".into(),
        ValueKind::Boolean(value) => format!("the boolean {value}"),
        ValueKind::Float(value) => format!("the number {value:?}"),
        ValueKind::String(value) => format!("{value:?}"),
        ValueKind::Table(_) => "a section".into(),
        ValueKind::Array(_) => "an array".into(),
        other => format!("the number {other}"),
    }
}
