//! Commands of the `placement` scripts. A script begins with an empty cluster.
//!
//! | command | does |
//! |---|---|
//! | `position KEY` | what of the key is hashed, and its position on the ring |
//! | `ranges N` | the ring cut into N shards |
//! | `node ID [zone=] [weight=]` | adds or changes a node |
//! | `rank DATABASE START` | the nodes as the shard that begins at START (hexadecimal) prefers them |
//! | `plan DATABASE REPLICAS SHARDS [show=no]` | plans a database and adds it to the cluster |
//! | `loads` | replicas and first places of each node |
//! | `owner DATABASE KEY` | the shard of a key |

use std::collections::BTreeMap;

use pontoon::ids::{DatabaseId, Epoch, NodeId, RandomId, ReplicaId, ShardId};
use pontoon::placement::map::{
    ClusterMap, DatabaseRecord, Member, MemberRole, NodeRecord, ShardRecord, Standing,
};
use pontoon::placement::plan::plan_database;
use pontoon::placement::{rendezvous, ring};

use crate::script::{Command, Interpreter, quoted};

/// The cluster of one script.
#[derive(Default)]
pub struct Placement {
    map: ClusterMap,
}

impl Interpreter for Placement {
    fn execute(&mut self, line: &Command) -> Result<String, String> {
        match line.name.as_str() {
            "position" => {
                let key = line.word(0)?;
                let hashed = quoted(ring::hashed_part(key));
                Ok(format!("{hashed} at {:016x}", ring::position(key)))
            }
            "ranges" => {
                let ranges = ring::equal_ranges(line.number(0)?);
                let lines = ranges.iter().map(|r| format!("{:016x}-{:016x}", r.start, r.end));
                Ok(lines.collect::<Vec<_>>().join("\n"))
            }
            "node" => {
                let id = NodeId(line.number(0)?);
                let record = NodeRecord {
                    id,
                    label: String::new(),
                    client_address: String::new(),
                    peer_address: String::new(),
                    zone: line.named_text("zone")?.unwrap_or_default(),
                    weight: line.named_number("weight", 100)?,
                    store_id: RandomId::default(),
                    standing: Standing::Member,
                    changed_at: 1,
                };
                self.map.nodes.insert(id, record);
                Ok(String::new())
            }
            "rank" => {
                let start = u64::from_str_radix(&line.text(1)?, 16).map_err(|e| e.to_string())?;
                let nodes = self.map.nodes.values().map(|n| (n.id, n.weight));
                let ranked = rendezvous::rank(rendezvous::shard_key(&line.text(0)?, start), nodes);
                Ok(join(&ranked))
            }
            "plan" => {
                self.plan(line.text(0)?, line.number(1)?, line.number(2)?, line.named("show") != Some(b"no"))
            }
            "loads" => Ok(self.loads()),
            "owner" => {
                let name = line.text(0)?;
                let database = self.map.database(&name);
                let database = database.ok_or_else(|| format!("no database `{name}`"))?;
                let shard = self.map.shard_of_key(database, line.word(1)?);
                Ok(shard.map_or("no shard".into(), |s| format!("shard {}", s.id)))
            }
            other => Err(format!("unknown command `{other}`")),
        }
    }
}

impl Placement {
    fn plan(&mut self, name: String, replicas: u32, shards: u32, show: bool) -> Result<String, String> {
        let plan = plan_database(&self.map, &name, replicas, shards).map_err(|e| e.to_string())?;
        let database = DatabaseId(self.map.databases.len() as u64 + 1);
        let mut ids = Vec::new();
        let mut lines = Vec::new();
        for shard in plan {
            let id = ShardId(self.map.shards.len() as u64 + 1);
            ids.push(id);
            lines.push(format!("{id} from {:016x}: {}", shard.range.start, join(&shard.nodes)));
            let members = (1..).zip(shard.nodes).map(|(replica, node)| Member {
                replica: ReplicaId(replica),
                node,
                role: MemberRole::Voter,
            });
            let record = ShardRecord {
                id,
                database,
                range: shard.range,
                epoch: Epoch::default(),
                members: members.collect(),
                dropped: false,
                moving: None,
                target: None,
                previous: None,
                changed_at: 1,
            };
            self.map.shards.insert(id, record);
        }
        let record =
            DatabaseRecord { id: database, name, replicas, shards: ids, dropped: false, changed_at: 1 };
        self.map.databases.insert(database, record);
        Ok(if show { lines.join("\n") } else { String::new() })
    }

    fn loads(&self) -> String {
        let mut loads: BTreeMap<NodeId, (u32, u32)> = self.map.nodes.keys().map(|id| (*id, (0, 0))).collect();
        for shard in self.map.shards.values() {
            for (at, member) in shard.members.iter().enumerate() {
                let load = loads.entry(member.node).or_default();
                load.0 += 1;
                load.1 += u32::from(at == 0);
            }
        }
        let line = |(id, (replicas, first)): (NodeId, (u32, u32))| {
            let node = &self.map.nodes[&id];
            let zone = if node.zone.is_empty() { "-" } else { &node.zone };
            format!("node {id} zone {zone} weight {}: {replicas} replicas, first in {first}", node.weight)
        };
        loads.into_iter().map(line).collect::<Vec<_>>().join("\n")
    }
}

fn join(ids: &[NodeId]) -> String {
    let ids: Vec<_> = ids.iter().map(ToString::to_string).collect();
    ids.join(" ")
}
