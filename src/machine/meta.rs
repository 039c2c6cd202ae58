//! The metadata shard's machine: nodes, databases, the shard map, moves, and the allocation of ids.
//!
//! The map version is the shard's revision counter: a command that changes anything takes exactly one
//! revision and stamps it on every record it writes (`changed_at`); a command that changes nothing takes
//! none. Ids are counted up and never reused, replica ids across the whole cluster.
//!
//! *Generations.* If the metadata shard loses its majority for good, an operator may have it go on with one replica
//! alone, which may have missed the last of what was told of the map. From then on versions are of the next
//! generation ([`generation_of`]): one command raises them to its beginning, and passes over all ids that may be
//! in use, before any other is applied. Whoever knows an earlier map drops it: [`ClusterMap::merge`].
//!
//! *Determinism.* The result depends on the command and the state alone. Placement is not computed here: the
//! plan travels in the command and is only checked. The bounds in [`fixed`] belong to the format of the
//! commands: they don't follow [`crate::limits`], since two versions of the program with other limits must
//! still agree on each committed command.
//!
//! *Whoever proposes may be wrong.* A deposed leader's command, or one that was sent twice, is committed like
//! any other. So each rule that the map relies on is checked when a command is applied, however well it was
//! checked before; [`check::check_map`] and [`check::check_change`] say what holds of every map, and from one
//! to the next.
//!
//! *Orders.* A decision of operators may be on its way for long, and be sent again while its answer is in doubt:
//! minutes later it may meet a record that somebody has decided about anew. So it says which map its giver knew
//! ([`MetaCommand::Order`]), and counts only for a record that hasn't changed since. One that has been carried
//! out finds the record as it wants it, or changed: it is never carried out twice.

use super::ApplyError;
use super::command::{MetaCommand, MetaRefusal, MetaReply};
use crate::ids::generation_of;
use crate::placement::map::{ClusterMap, DatabaseRecord, NodeRecord, ShardRecord, take_over};
use crate::storage::{StateBatch, StateView, StorageError};
pub use databases::check_name;
use records::Counters;

pub mod check;
mod databases;
mod moves;
mod nodes;
mod policy;
mod rebalance;
mod records;

/// What any version of the program accepts in a committed command. To raise one is to change the format:
/// it needs a feature level of the cluster. The limits at admission may be lower, never higher.
pub mod fixed {
    use crate::limits;

    /// Longest database name in bytes.
    pub const NAME_BYTES: usize = 64;
    /// Most voters of a shard.
    pub const REPLICAS: u32 = 7;
    /// Most shards of a database.
    pub const SHARDS: usize = 16 * 1024;
    /// Most shards of a database that is created by the first kind of command for it. A version that knows no other refuses
    /// more of them, so a command for more is of a kind that it stops at: it must not refuse what others carry out.
    pub const SHARDS_NARROW: usize = 4096;
    /// Greatest id in the command that forms a cluster; later ones are counted on from there.
    pub const FIRST_ID: u64 = u32::MAX as u64;
    /// Most members of a shard in what it says of itself: all voters change at once, and as many learners.
    pub const MEMBERS: usize = 3 * REPLICAS as usize;
    /// Most shards that one rebalancing moves.
    pub const TARGETS: usize = 16 * 1024;
    /// Most shards whose members change at the same time.
    pub const MOVES_AT_A_TIME: u32 = 1024;
    /// Shards that are named in a refusal to remove a node.
    pub const SHARDS_NAMED: usize = 8;
    /// The reason of a rebalancing's end is cut off behind so many bytes.
    pub const REASON_BYTES: usize = 1024;

    const _: () = assert!(limits::NAME_BYTES_MAX <= NAME_BYTES);
    const _: () = assert!(limits::REPLICAS_MAX <= REPLICAS);
    const _: () = assert!(limits::SHARDS_MAX as usize <= SHARDS);
    const _: () = assert!(SHARDS <= TARGETS);
}

/// Why a command gets no ordinary reply: the rules refuse it, which is a reply too, or the storage fails.
enum Stop {
    Refused(MetaRefusal),
    Failed(StorageError),
}

/// What the giver of a command knew of the record that it is about.
#[derive(Clone, Copy)]
enum Known {
    /// Whatever there is.
    Any,
    /// The map of this version.
    At(u64),
}

impl Known {
    /// Refuses a command about `what`, which changed at a version of the map that its giver didn't know. Asked once
    /// it is certain that the command would change the record: one that is as it should be is success.
    fn check(self, what: impl FnOnce() -> String, changed_at: u64) -> Result<(), MetaRefusal> {
        match self {
            Known::At(seen) if changed_at > seen => {
                Err(MetaRefusal::Changed { what: what(), version: changed_at })
            }
            Known::Any | Known::At(_) => Ok(()),
        }
    }
}

impl From<StorageError> for Stop {
    fn from(error: StorageError) -> Stop {
        Stop::Failed(error)
    }
}

impl From<MetaRefusal> for Stop {
    fn from(refusal: MetaRefusal) -> Stop {
        Stop::Refused(refusal)
    }
}

/// Applies one command. A command that is refused has changed nothing.
pub fn apply(command: &MetaCommand, state: &mut dyn StateBatch) -> Result<MetaReply, ApplyError> {
    let reply = match command {
        MetaCommand::Order { seen, command } => order(*seen, command, state),
        command => execute(command, Known::Any, state),
    };
    match reply {
        Ok(reply) => Ok(reply),
        Err(Stop::Refused(refusal)) => Ok(MetaReply::Refused(refusal)),
        Err(Stop::Failed(error)) => Err(error.into()),
    }
}

fn order(seen: u64, command: &MetaCommand, state: &mut dyn StateBatch) -> Result<MetaReply, Stop> {
    formed(state)?;
    if !command.is_order() {
        return not_allowed("a command can't be an order that is about no single record");
    }
    // It would count whatever has changed until then.
    if !(1..=state.revision()).contains(&seen) {
        return not_allowed(format!("there is no map of version {seen} yet that an order could go by"));
    }
    execute(command, Known::At(seen), state)
}

fn execute(command: &MetaCommand, known: Known, state: &mut dyn StateBatch) -> Result<MetaReply, Stop> {
    match command {
        MetaCommand::Form { cluster_id, nodes, metadata } => nodes::form(*cluster_id, nodes, metadata, state),
        MetaCommand::AddNode(record) => nodes::add_node(record, state),
        MetaCommand::SetStanding { node, standing } => nodes::set_standing(*node, *standing, known, state),
        MetaCommand::CreateDatabase { name, replicas, shards } => {
            databases::create(name, *replicas, shards, state)
        }
        MetaCommand::DropDatabase { name, id } => databases::drop(name, *id, state),
        MetaCommand::SetReplicas { name, replicas } => databases::set_replicas(name, *replicas, known, state),
        MetaCommand::ObserveShard { shard, conf, members } => moves::observe(*shard, *conf, members, state),
        MetaCommand::BeginMove { shard, conf, adds, removes, cause } => {
            moves::begin(*shard, *conf, adds, removes, *cause, state)
        }
        MetaCommand::CancelMove { shard, id } => moves::cancel(*shard, *id, state),
        MetaCommand::EndMove { shard, id } => moves::end(*shard, *id, state),
        MetaCommand::RecoverShard { shard, keep, conf } => moves::recover(*shard, *keep, *conf, state),
        MetaCommand::SetPolicy(change) => policy::set(*change, known, state),
        MetaCommand::BeginRebalance { plan, undoes, targets, moves, bytes } => {
            rebalance::begin(*plan, *undoes, targets, *moves, *bytes, known, state)
        }
        MetaCommand::ControlRebalance { plan, state: wanted, reason } => {
            rebalance::control(*plan, *wanted, reason, known, state)
        }
        MetaCommand::Order { .. } => not_allowed("an order of an order"),
    }
}

/// The cluster map that the state holds. Reads every record: whoever has an older map calls [`refresh`].
/// Before the cluster is formed it is the empty map.
pub fn cluster_map(state: &dyn StateView) -> Result<ClusterMap, StorageError> {
    let mut map = ClusterMap::default();
    refresh(&mut map, state)?;
    Ok(map)
}

/// Brings a map that was had from an older state of the same shard up to date. Looks at every record, but reads
/// only those that changed since: call it after changes, not per request. After an error the map is as it was.
pub fn refresh(map: &mut ClusterMap, state: &dyn StateView) -> Result<(), StorageError> {
    let Some(counters) = records::load_counters(state)? else {
        *map = ClusterMap::default();
        return Ok(());
    };
    let version = state.revision();
    // A map of the future, of an earlier generation, or of another cluster, is no older state of this shard.
    let same = map.cluster_id == counters.cluster_id && generation_of(map.version) == generation_of(version);
    let since = if same && map.version <= version { map.version } else { 0 };
    let nodes: Vec<NodeRecord> = records::changed(since, state)?;
    let databases: Vec<DatabaseRecord> = records::changed(since, state)?;
    let shards: Vec<ShardRecord> = records::changed(since, state)?;
    let (policy, rebalance) = (records::load_single(state)?, records::load_single(state)?);
    if since == 0 {
        *map = ClusterMap { cluster_id: counters.cluster_id, ..ClusterMap::default() };
    }
    // No record is ever deleted.
    take_over(&mut map.nodes, nodes.into_iter().map(|node| (node.id, node)));
    take_over(&mut map.databases, databases.into_iter().map(|database| (database.id, database)));
    take_over(&mut map.shards, shards.into_iter().map(|shard| (shard.id, shard)));
    (map.policy, map.rebalance, map.version) = (policy, rebalance, version);
    Ok(())
}

/// The counters of a formed cluster, without which no command but the forming one is accepted.
fn formed(state: &dyn StateView) -> Result<Counters, Stop> {
    Ok(records::load_counters(state)?.ok_or(MetaRefusal::NotFormed)?)
}

fn not_allowed<T>(why: impl Into<String>) -> Result<T, Stop> {
    Err(Stop::Refused(MetaRefusal::NotAllowed(why.into())))
}

fn stale<T>(what: impl Into<String>) -> Result<T, Stop> {
    Err(Stop::Refused(MetaRefusal::Stale(what.into())))
}

#[cfg(test)]
mod tests;
