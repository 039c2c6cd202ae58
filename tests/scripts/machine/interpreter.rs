//! Commands of the `machine` scripts. A script has two shards at hand, both empty at its start: one of keys
//! and values, and the metadata shard.
//!
//! | command | does |
//! |---|---|
//! | `put KEY VALUE`, `delete KEY` | writes |
//! | `cas KEY VALUE [value=V] [version=N]` | writes under a condition; neither: the key must be absent |
//! | `get KEY`, `scan [prefix=] [after=] [limit=] [keys=only]` | reads |
//! | `entry COMMAND… [stamp=MS]` | the quoted writes in one log entry: prints its bytes, then applies it from those. A write may have a tag: `session=BYTE seq=N [acked=N] [open=MS]` |
//! | `sessions` | time and content of the session table |
//! | `decode HEX` | reads an entry |
//! | `state`, `metadata-state` | every stored key, with revision and length |
//! | `form [nodes=N] [cluster=BYTE]` | forms a cluster of nodes 1 to N, all of them voters |
//! | `node STORE [zone=] [weight=] [address=]` | adds or updates the node with that store id |
//! | `create NAME REPLICAS SHARDS` | a database as the planner places it |
//! | `plan NAME REPLICAS START-END:NODE,…  …` | a database as given; the ends are hexadecimal |
//! | `drop NAME` | removes a database |
//! | `replicas NAME N` | how many replicas it should have |
//! | `standing NODE STANDING` | decides about a node |
//! | `policy KEY VALUE` | one setting of the cluster |
//! | `move SHARD [conf=N] [add=NODE,…] [remove=REPLICA,…] [cause=]` | begins a move; a repair, of conf version 1 |
//! | `cancel SHARD MOVE`, `end SHARD MOVE` | rolls it back, ends it |
//! | `observe SHARD CONF REPLICA:NODE[:ROLE] …` | what a shard says of itself |
//! | `recover SHARD REPLICA CONF` | makes it the only one |
//! | `rebalance PLAN SHARD@CONF:NODE,… … [moves=] [bytes=]` | gives shards targets |
//! | `control PLAN STATE [reason=]` | what becomes of it |
//! | `standing`, `replicas`, `policy`, `rebalance`, `control` with `seen=N` | the same as an order by the map of version N |
//! | `map [since=N]` | the map, or what changed after version N |
//!
//! After every command the map is checked to be sound.

use bytes::Bytes;
use pontoon::ids::{DatabaseId, Epoch, METADATA_DATABASE, METADATA_SHARD, NodeId, RandomId, ReplicaId};
use pontoon::machine::command::{
    Answer, Command, Expect, KvCommand, KvReply, MetaCommand, MetaReply, Query, Reply, Versioned,
    decode_entry, encode_entry,
};
use pontoon::machine::memory::MemoryState;
use pontoon::machine::meta::check::{check_change, check_map};
use pontoon::machine::session::SessionTag;
use pontoon::machine::{MachineKind, meta, value};
use pontoon::placement::map::{ClusterMap, Member, MemberRole, NodeRecord, ShardRecord, Standing};
use pontoon::placement::plan::{PlannedShard, plan_database};
use pontoon::placement::ring::RingRange;

use crate::script::{self, Interpreter, quoted};
use membership::list;

mod membership;

/// The shards of one script.
#[derive(Default)]
pub struct Machines {
    kv: MemoryState,
    metadata: MemoryState,
    /// What the metadata shard held after the last command.
    map: ClusterMap,
}

impl Interpreter for Machines {
    fn execute(&mut self, line: &script::Command) -> Result<String, String> {
        match line.name.as_str() {
            "put" | "delete" | "cas" => self.apply(&Command::Kv(write(line)?)),
            "get" => self.query(&Query::Get { key: bytes(line.word(0)?) }),
            "scan" => self.query(&Query::Scan {
                prefix: bytes(line.named("prefix").unwrap_or_default()),
                after: bytes(line.named("after").unwrap_or_default()),
                limit: line.named_number("limit", 0)?,
                keys_only: line.named("keys").is_some_and(|keys| keys == b"only"),
            }),
            "entry" => {
                let lines = line.words_from(0).into_iter();
                let commands: Result<Vec<_>, String> = lines
                    .map(|text| {
                        let line = script::Command::parse_bytes(text)?;
                        Ok((Command::Kv(write(&line)?), tag(&line)?))
                    })
                    .collect();
                let data = Bytes::from(encode_entry(&commands?, line.named_number("stamp", 0)?));
                let entry = decode_entry(&data).map_err(|e| e.to_string())?;
                let replies = MachineKind::Kv.apply_entry(&entry, &mut self.kv).map_err(|e| e.to_string())?;
                let lines = replies.into_iter().map(|reply| format!("\n{}", said(reply)));
                Ok(hex(&data) + &lines.collect::<String>())
            }
            "decode" => {
                let data = unhex(&line.text(0)?)?;
                let entry = decode_entry(&data).map_err(|e| e.to_string())?;
                let stamp = entry.stamp.map(|stamp| format!("stamp {stamp}"));
                let commands = entry.commands.iter().map(|(command, tag)| match tag {
                    None => format!("{command:?}"),
                    Some(tag) => format!("{command:?} {tag:?}"),
                });
                Ok(stamp.into_iter().chain(commands).collect::<Vec<_>>().join("\n"))
            }
            "sessions" => Ok(sessions(&self.kv)),
            "state" => Ok(state(&self.kv)),
            "metadata-state" => Ok(state(&self.metadata)),
            "form" => {
                let nodes = line.named_number("nodes", 3)?;
                let cluster = line.named_number("cluster", 0xc1)?;
                self.apply(&Command::Meta(form(nodes, cluster)))
            }
            "node" => {
                let store: u8 = line.number(0)?;
                let mut record = node(store);
                record.id = NodeId(0);
                record.zone = line.named_text("zone")?.unwrap_or_default();
                record.weight = line.named_number("weight", 100)?;
                if let Some(address) = line.named_text("address")? {
                    record.peer_address = address;
                }
                self.apply(&Command::Meta(MetaCommand::AddNode(record)))
            }
            "create" => {
                let (name, replicas) = (line.text(0)?, line.number(1)?);
                let map = meta::cluster_map(&self.metadata).map_err(|e| e.to_string())?;
                let shards =
                    plan_database(&map, &name, replicas, line.number(2)?).map_err(|e| e.to_string())?;
                self.create(name, replicas, shards)
            }
            "plan" => {
                let words = line.words_from(2).into_iter();
                let shards = words.map(planned).collect::<Result<_, _>>()?;
                self.create(line.text(0)?, line.number(1)?, shards)
            }
            "drop" => {
                let id = Some(line.named_number("id", 0)?).filter(|id| *id > 0).map(DatabaseId);
                self.apply(&Command::Meta(MetaCommand::DropDatabase { name: line.text(0)?, id }))
            }
            "map" => self.map(line.named_number("since", 0)?),
            other => match membership::command(line)? {
                Some(command) => self.apply(&Command::Meta(command)),
                None => Err(format!("unknown command `{other}`")),
            },
        }
    }
}

impl Machines {
    fn apply(&mut self, command: &Command) -> Result<String, String> {
        let reply = match command {
            Command::Kv(_) => MachineKind::Kv.apply(command, &mut self.kv),
            Command::Meta(_) => MachineKind::Metadata.apply(command, &mut self.metadata),
        };
        let map = meta::cluster_map(&self.metadata).map_err(|e| e.to_string())?;
        check_map(&map).and_then(|()| check_change(&self.map, &map))?;
        self.map = map;
        reply.map(said).map_err(|e| e.to_string())
    }

    fn create(&mut self, name: String, replicas: u32, shards: Vec<PlannedShard>) -> Result<String, String> {
        self.apply(&Command::Meta(MetaCommand::CreateDatabase { name, replicas, shards }))
    }

    fn query(&self, query: &Query) -> Result<String, String> {
        match MachineKind::Kv.query(query, &self.kv) {
            Ok(Answer::Value(found)) => Ok(versioned(&found)),
            Ok(Answer::Page { pairs, more }) => {
                let line = |(key, value): &(Bytes, Versioned)| {
                    let value = &Some(value.clone());
                    format!("{}: {}", quoted(key), versioned(value))
                };
                let mut lines: Vec<_> = pairs.iter().map(line).collect();
                lines.push(if more { "more" } else { "end" }.into());
                Ok(lines.join("\n"))
            }
            Err(error) => Err(error.to_string()),
        }
    }

    fn map(&self, since: u64) -> Result<String, String> {
        let map = meta::cluster_map(&self.metadata).map_err(|e| e.to_string())?;
        Ok(membership::print(&map.delta(since)))
    }
}

fn write(line: &script::Command) -> Result<KvCommand, String> {
    let key = bytes(line.word(0)?);
    match line.name.as_str() {
        "put" => Ok(KvCommand::Put { key, value: bytes(line.word(1)?) }),
        "delete" => Ok(KvCommand::Delete { key }),
        "cas" => Ok(KvCommand::Cas {
            key,
            expect: match (line.named("value"), line.named("version")) {
                (Some(value), _) => Expect::Value(bytes(value)),
                (None, Some(_)) => Expect::Version(line.named_number("version", 0)?),
                (None, None) => Expect::Absent,
            },
            value: bytes(line.word(1)?),
        }),
        other => Err(format!("`{other}` is not a write")),
    }
}

fn node(number: u8) -> NodeRecord {
    NodeRecord {
        id: NodeId(number.into()),
        label: format!("n{number}"),
        client_address: format!("127.0.0.1:71{number:02}"),
        peer_address: format!("127.0.0.1:72{number:02}"),
        zone: String::new(),
        weight: 100,
        store_id: RandomId([number; 16]),
        standing: Standing::Member,
        changed_at: 0,
    }
}

fn form(nodes: u8, cluster: u8) -> MetaCommand {
    let voter = |number: u8| Member {
        replica: ReplicaId(number.into()),
        node: NodeId(number.into()),
        role: MemberRole::Voter,
    };
    MetaCommand::Form {
        cluster_id: RandomId([cluster; 16]),
        nodes: (1..=nodes).map(node).collect(),
        metadata: Box::new(ShardRecord {
            id: METADATA_SHARD,
            database: METADATA_DATABASE,
            range: RingRange::ALL,
            epoch: Epoch { range: 1, conf: 1 },
            members: (1..=nodes).map(voter).collect(),
            dropped: false,
            moving: None,
            target: None,
            previous: None,
            changed_at: 0,
        }),
    }
}

fn planned(word: &[u8]) -> Result<PlannedShard, String> {
    let text = String::from_utf8_lossy(word);
    let parts = text.split_once(':').and_then(|(range, nodes)| {
        let (start, end) = range.split_once('-')?;
        let range = RingRange {
            start: u64::from_str_radix(start, 16).ok()?,
            end: u64::from_str_radix(end, 16).ok()?,
        };
        let nodes = nodes.split(',').map(|n| n.parse().ok().map(NodeId));
        let nodes = nodes.collect::<Option<_>>()?;
        Some(PlannedShard { range, nodes })
    });
    parts.ok_or_else(|| format!("`{text}` is not START-END:NODE,…"))
}

fn state(state: &MemoryState) -> String {
    let mut lines = vec![format!("revision {}", state.revision)];
    lines.extend(state.pairs.iter().map(|(key, stored)| {
        let held = match value::header(stored) {
            Ok((revision, length)) => format!("{length} bytes of revision {revision}"),
            Err(error) => error.to_string(),
        };
        format!("{}: {held}", quoted(key))
    }));
    lines.join("\n")
}

fn versioned(found: &Option<Versioned>) -> String {
    match found {
        Some(found) => format!("{} version {}", quoted(&found.value), found.version),
        None => "absent".into(),
    }
}

fn bytes(bytes: &[u8]) -> Bytes {
    Bytes::copy_from_slice(bytes)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Result<Bytes, String> {
    let digits = |at: usize| text.get(at..at + 2).and_then(|d| u8::from_str_radix(d, 16).ok());
    (0..text.len())
        .step_by(2)
        .map(|at| digits(at).ok_or_else(|| format!("`{text}` is not hexadecimal")))
        .collect()
}

fn said(reply: Reply) -> String {
    match reply {
        Reply::Kv(KvReply::Written(version)) => format!("written {version}"),
        Reply::Kv(KvReply::Deleted(version)) => format!("deleted {version}"),
        Reply::Kv(KvReply::Absent) => "absent".into(),
        Reply::Kv(KvReply::Mismatch(found)) => format!("mismatch: {}", versioned(&found)),
        Reply::Meta(MetaReply::Formed(version)) => format!("formed, map version {version}"),
        Reply::Meta(MetaReply::Node(id)) => format!("node {id}"),
        Reply::Meta(MetaReply::Done(version)) => format!("done, map version {version}"),
        Reply::Meta(MetaReply::Database { record, created }) => format!(
            "database {} `{}`, {} replicas, shards {}{}{}",
            record.id,
            record.name,
            record.replicas,
            list(&record.shards),
            if record.dropped { ", dropped" } else { "" },
            if created { ", created" } else { "" },
        ),
        Reply::Meta(MetaReply::Refused(refusal)) => format!("refused: {refusal}"),
        Reply::Session(reply) => format!("{reply:?}"),
    }
}

/// The tag of a write that names a session.
fn tag(line: &script::Command) -> Result<Option<SessionTag>, String> {
    if line.named("session").is_none() {
        return Ok(None);
    }
    Ok(Some(SessionTag {
        session: RandomId([line.named_number("session", 0)?; 16]),
        sequence: line.named_number("seq", 0)?,
        acked_below: line.named_number("acked", 0)?,
        open: line.named("open").map(|_| line.named_number("open", 0)).transpose()?,
    }))
}

fn sessions(state: &MemoryState) -> String {
    let mut output = format!("time {}", state.sessions.log_time());
    for (id, record) in state.sessions.records() {
        output += &format!("\n{:02x} {}", id.0[0], hex(&record));
    }
    output
}
