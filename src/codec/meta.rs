//! Commands and replies of the metadata shard as Cap'n Proto messages (schema/store.capnp): embedded
//! in log entries, and carried as opaque bytes between nodes.
//!
//! The bytes come from a log or a peer and may begin at any address, while capnp reads aligned words
//! only. [`decode_command`] and [`decode_reply`] therefore copy the message into words of their own:
//! such messages are small and rare, and the crate's `unaligned` feature would slow every other
//! reader of the program down instead.

use capnp::Word;
use capnp::message::{Builder, ReaderOptions};
use capnp::{serialize, struct_list};

use super::CodecError;
use super::records::{
    length, malformed, read_cause, read_database, read_id, read_members, read_node, read_node_ids,
    read_nodes, read_range, read_rebalance_state, read_shard, read_standing, read_text, write_cause,
    write_database, write_ids, write_members, write_node, write_rebalance_state, write_shard, write_standing,
};
use crate::ids::{DatabaseId, NodeId, ReplicaId, ShardId};
use crate::limits;
use crate::machine::command::{MetaCommand, MetaRefusal, MetaReply, PlannedTarget, PolicyChange};
use crate::machine::meta::fixed;
use crate::placement::plan::PlannedShard;
use crate::schema::store_capnp::{
    meta_command, meta_refusal, meta_reply, planned_shard, planned_target, policy_change,
};

/// Reading follows no pointer of a message more often than this, so what is read is at most this many
/// times the message; one that promises more (lists that overlap) is refused.
const READS_PER_BYTE: usize = 8;

/// A message under the limits of [`read_message`].
pub(crate) type MessageReader<'a> = capnp::message::Reader<serialize::BufferSegments<&'a [u8]>>;

/// The bytes of a metadata command.
pub fn encode_command(command: &MetaCommand) -> Vec<u8> {
    let mut message = Builder::new_default();
    write_command(command, message.init_root());
    serialize::write_message_to_words(&message)
}

fn write_command(command: &MetaCommand, root: meta_command::Builder<'_>) {
    match command {
        MetaCommand::Form { cluster_id, nodes, metadata } => {
            let mut form = root.init_form();
            form.set_cluster_id(&cluster_id.0);
            let mut list = form.reborrow().init_nodes(length(nodes.len()));
            for (at, node) in (0..).zip(nodes) {
                write_node(node, list.reborrow().get(at));
            }
            write_shard(metadata, form.init_metadata());
        }
        MetaCommand::AddNode(record) => write_node(record, root.init_add_node()),
        MetaCommand::CreateDatabase { name, replicas, shards } if shards.len() <= fixed::SHARDS_NARROW => {
            let mut create = root.init_create_database();
            create.set_name(name.as_str());
            create.set_replicas(*replicas);
            write_plan(shards, create.init_shards(length(shards.len())));
        }
        // A kind of its own: a version that takes no more shards than those must not refuse what others carry out.
        MetaCommand::CreateDatabase { name, replicas, shards } => {
            let mut create = root.init_create_wide_database();
            create.set_name(name.as_str());
            create.set_replicas(*replicas);
            write_plan(shards, create.init_shards(length(shards.len())));
        }
        MetaCommand::DropDatabase { name, id: None } => {
            let mut root = root;
            root.set_drop_database(name.as_str());
        }
        // A kind of its own: a version that doesn't know it must not drop by name alone.
        MetaCommand::DropDatabase { name, id: Some(id) } => {
            let mut drop = root.init_drop_database_id();
            drop.set_name(name.as_str());
            drop.set_id(id.0);
        }
        MetaCommand::ObserveShard { shard, conf, members } => {
            let mut observe = root.init_observe_shard();
            observe.set_shard(shard.0);
            observe.set_conf(*conf);
            write_members(members, observe.init_members(length(members.len())));
        }
        MetaCommand::BeginMove { shard, conf, adds, removes, cause } => {
            let mut begin = root.init_begin_move();
            begin.set_shard(shard.0);
            begin.set_conf(*conf);
            write_ids(adds.iter().map(|node| node.0), begin.reborrow().init_adds(length(adds.len())));
            let ids = removes.iter().map(|replica| replica.0);
            write_ids(ids, begin.reborrow().init_removes(length(removes.len())));
            begin.set_cause(write_cause(*cause));
        }
        MetaCommand::CancelMove { shard, id } => {
            let mut cancel = root.init_cancel_move();
            cancel.set_shard(shard.0);
            cancel.set_move(*id);
        }
        MetaCommand::EndMove { shard, id } => {
            let mut end = root.init_end_move();
            end.set_shard(shard.0);
            end.set_move(*id);
        }
        MetaCommand::SetStanding { node, standing } => {
            let mut set = root.init_set_standing();
            set.set_node(node.0);
            set.set_standing(write_standing(*standing));
        }
        MetaCommand::SetPolicy(change) => {
            let mut set = root.init_set_policy();
            match *change {
                PolicyChange::ReplaceAfterMs(ms) => set.set_replace_after_ms(ms),
                PolicyChange::MovesAtATime(moves) => set.set_moves_at_a_time(moves),
                PolicyChange::BytesPerSecond(bytes) => set.set_bytes_per_second(bytes),
                PolicyChange::Automatic(on) => set.set_automatic(on),
                PolicyChange::ApproveJoins(on) => set.set_approve_joins(on),
            }
        }
        MetaCommand::BeginRebalance { plan, undoes, targets, moves, bytes } => {
            let mut begin = root.init_begin_rebalance();
            begin.set_plan(*plan);
            begin.set_undoes(*undoes);
            begin.set_moves(*moves);
            begin.set_bytes(*bytes);
            let mut list = begin.init_targets(length(targets.len()));
            for (at, target) in (0..).zip(targets) {
                let mut to = list.reborrow().get(at);
                to.set_shard(target.shard.0);
                to.set_conf(target.conf);
                write_ids(target.nodes.iter().map(|node| node.0), to.init_nodes(length(target.nodes.len())));
            }
        }
        MetaCommand::ControlRebalance { plan, state, reason } => {
            let mut control = root.init_control_rebalance();
            control.set_plan(*plan);
            control.set_state(write_rebalance_state(*state));
            control.set_reason(reason.as_str());
        }
        MetaCommand::SetReplicas { name, replicas } => {
            let mut set = root.init_set_replicas();
            set.set_name(name.as_str());
            set.set_replicas(*replicas);
        }
        MetaCommand::RecoverShard { shard, keep, conf } => {
            let mut recover = root.init_recover_shard();
            recover.set_shard(shard.0);
            recover.set_keep(keep.0);
            recover.set_conf(*conf);
        }
        MetaCommand::Order { seen, command } => {
            let mut order = root.init_order();
            order.set_seen(*seen);
            write_command(command, order.init_what());
        }
    }
}

/// Reads a metadata command. Errors: not a message, longer or shorter than it says, an unknown kind of
/// command, or a malformed field. A command this version doesn't know is an error, never skipped.
pub fn decode_command(bytes: &[u8]) -> Result<MetaCommand, CodecError> {
    read_message("MetaCommand", bytes, |message| read_command(message.get_root()?))
}

fn read_command(from: meta_command::Reader<'_>) -> Result<MetaCommand, CodecError> {
    match from.which() {
        Ok(meta_command::Form(form)) => Ok(MetaCommand::Form {
            cluster_id: read_id("clusterId", form.get_cluster_id()?)?,
            nodes: read_nodes(form.get_nodes()?)?,
            metadata: Box::new(read_shard(form.get_metadata()?)?),
        }),
        Ok(meta_command::AddNode(record)) => Ok(MetaCommand::AddNode(read_node(record?)?)),
        Ok(meta_command::CreateDatabase(create)) => Ok(MetaCommand::CreateDatabase {
            name: read_text(create.get_name()?)?,
            replicas: create.get_replicas(),
            shards: read_plan(create.get_shards()?, false)?,
        }),
        Ok(meta_command::CreateWideDatabase(create)) => Ok(MetaCommand::CreateDatabase {
            name: read_text(create.get_name()?)?,
            replicas: create.get_replicas(),
            shards: read_plan(create.get_shards()?, true)?,
        }),
        Ok(meta_command::DropDatabase(name)) => {
            Ok(MetaCommand::DropDatabase { name: read_text(name?)?, id: None })
        }
        Ok(meta_command::DropDatabaseId(drop)) => Ok(MetaCommand::DropDatabase {
            name: read_text(drop.get_name()?)?,
            id: Some(DatabaseId(drop.get_id())),
        }),
        Ok(meta_command::ObserveShard(observe)) => Ok(MetaCommand::ObserveShard {
            shard: ShardId(observe.get_shard()),
            conf: observe.get_conf(),
            members: read_members(observe.get_members()?)?,
        }),
        Ok(meta_command::BeginMove(begin)) => Ok(MetaCommand::BeginMove {
            shard: ShardId(begin.get_shard()),
            conf: begin.get_conf(),
            adds: read_node_ids(begin.get_adds()?),
            removes: begin.get_removes()?.iter().map(ReplicaId).collect(),
            cause: read_cause(begin.get_cause())?,
        }),
        Ok(meta_command::CancelMove(cancel)) => {
            Ok(MetaCommand::CancelMove { shard: ShardId(cancel.get_shard()), id: cancel.get_move() })
        }
        Ok(meta_command::EndMove(end)) => {
            Ok(MetaCommand::EndMove { shard: ShardId(end.get_shard()), id: end.get_move() })
        }
        Ok(meta_command::SetStanding(set)) => Ok(MetaCommand::SetStanding {
            node: NodeId(set.get_node()),
            standing: read_standing(set.get_standing())?,
        }),
        Ok(meta_command::SetPolicy(change)) => Ok(MetaCommand::SetPolicy(read_policy_change(change?)?)),
        Ok(meta_command::BeginRebalance(begin)) => Ok(MetaCommand::BeginRebalance {
            plan: begin.get_plan(),
            undoes: begin.get_undoes(),
            targets: begin.get_targets()?.iter().map(read_planned_target).collect::<Result<_, _>>()?,
            moves: begin.get_moves(),
            bytes: begin.get_bytes(),
        }),
        Ok(meta_command::ControlRebalance(control)) => Ok(MetaCommand::ControlRebalance {
            plan: control.get_plan(),
            state: read_rebalance_state(control.get_state())?,
            reason: read_text(control.get_reason()?)?,
        }),
        Ok(meta_command::SetReplicas(set)) => {
            Ok(MetaCommand::SetReplicas { name: read_text(set.get_name()?)?, replicas: set.get_replicas() })
        }
        Ok(meta_command::RecoverShard(recover)) => Ok(MetaCommand::RecoverShard {
            shard: ShardId(recover.get_shard()),
            keep: ReplicaId(recover.get_keep()),
            conf: recover.get_conf(),
        }),
        Ok(meta_command::Order(order)) => {
            let command = order.get_what()?;
            // Before it is read: orders don't nest.
            if let Ok(meta_command::Order(_)) = command.which() {
                return Err(malformed("MetaCommand", "an order of an order"));
            }
            let command = Box::new(read_command(command)?);
            match command.is_order() {
                true => Ok(MetaCommand::Order { seen: order.get_seen(), command }),
                false => Err(malformed("MetaCommand", "a command as an order that can be none")),
            }
        }
        Err(unknown) => Err(malformed("MetaCommand", unknown.to_string())),
    }
}

/// The bytes of a metadata reply.
pub fn encode_reply(reply: &MetaReply) -> Vec<u8> {
    let mut message = Builder::new_default();
    let mut root = message.init_root::<meta_reply::Builder<'_>>();
    match reply {
        MetaReply::Formed(version) => root.set_formed(*version),
        MetaReply::Node(node) => root.set_node(node.0),
        MetaReply::Database { record, created } => {
            root.set_created(*created);
            write_database(record, root.init_database());
        }
        MetaReply::Done(version) => root.set_done(*version),
        MetaReply::Refused(refusal) => {
            root.set_refused(refusal.to_string().as_str());
            write_meta_refusal(refusal, root.init_refusal());
        }
    }
    serialize::write_message_to_words(&message)
}

/// Reads a metadata reply. A refusal of a kind this version doesn't know is read as
/// [`MetaRefusal::Other`] with its text.
pub fn decode_reply(bytes: &[u8]) -> Result<MetaReply, CodecError> {
    read_message("MetaReply", bytes, |message| {
        let root = message.get_root::<meta_reply::Reader<'_>>()?;
        match root.which() {
            Ok(meta_reply::Formed(version)) => Ok(MetaReply::Formed(version)),
            Ok(meta_reply::Node(node)) => Ok(MetaReply::Node(NodeId(node))),
            Ok(meta_reply::Database(record)) => {
                Ok(MetaReply::Database { record: read_database(record?)?, created: root.get_created() })
            }
            Ok(meta_reply::Done(version)) => Ok(MetaReply::Done(version)),
            Ok(meta_reply::Refused(text)) => {
                Ok(MetaReply::Refused(read_meta_refusal(root.get_refusal()?, read_text(text?)?)?))
            }
            Err(unknown) => Err(malformed("MetaReply", unknown.to_string())),
        }
    })
}

fn read_policy_change(from: policy_change::Reader<'_>) -> Result<PolicyChange, CodecError> {
    match from.which() {
        Ok(policy_change::ReplaceAfterMs(ms)) => Ok(PolicyChange::ReplaceAfterMs(ms)),
        Ok(policy_change::MovesAtATime(moves)) => Ok(PolicyChange::MovesAtATime(moves)),
        Ok(policy_change::BytesPerSecond(bytes)) => Ok(PolicyChange::BytesPerSecond(bytes)),
        Ok(policy_change::Automatic(on)) => Ok(PolicyChange::Automatic(on)),
        Ok(policy_change::ApproveJoins(on)) => Ok(PolicyChange::ApproveJoins(on)),
        Err(unknown) => Err(malformed("PolicyChange", unknown.to_string())),
    }
}

fn read_planned_target(from: planned_target::Reader<'_>) -> Result<PlannedTarget, CodecError> {
    Ok(PlannedTarget {
        shard: ShardId(from.get_shard()),
        conf: from.get_conf(),
        nodes: read_node_ids(from.get_nodes()?),
    })
}

fn write_plan(shards: &[PlannedShard], mut list: struct_list::Builder<'_, planned_shard::Owned>) {
    for (at, shard) in (0..).zip(shards) {
        write_planned(shard, list.reborrow().get(at));
    }
}

/// Reads the shards of a new database, which are so many as a command of this kind is for.
fn read_plan(
    list: struct_list::Reader<'_, planned_shard::Owned>,
    wide: bool,
) -> Result<Vec<PlannedShard>, CodecError> {
    if (list.len() as usize > fixed::SHARDS_NARROW) != wide {
        return Err(malformed("MetaCommand", format!("{} shards in a command of another kind", list.len())));
    }
    list.iter().map(read_planned).collect()
}

fn write_planned(shard: &PlannedShard, mut to: planned_shard::Builder<'_>) {
    to.set_start(shard.range.start);
    to.set_end(shard.range.end);
    write_ids(shard.nodes.iter().map(|node| node.0), to.init_nodes(length(shard.nodes.len())));
}

fn read_planned(from: planned_shard::Reader<'_>) -> Result<PlannedShard, CodecError> {
    Ok(PlannedShard {
        range: read_range(from.get_start(), from.get_end())?,
        nodes: read_node_ids(from.get_nodes()?),
    })
}

fn write_meta_refusal(refusal: &MetaRefusal, mut to: meta_refusal::Builder<'_>) {
    match refusal {
        MetaRefusal::OtherCluster { have, asked } => {
            let mut other = to.init_other_cluster();
            other.set_have(&have.0);
            other.set_asked(&asked.0);
        }
        MetaRefusal::NameTaken { name, replicas, shards } => {
            let mut taken = to.init_name_taken();
            taken.set_name(name.as_str());
            taken.set_replicas(*replicas);
            taken.set_shards(length(*shards));
        }
        MetaRefusal::UnknownDatabase(name) => to.set_unknown_database(name.as_str()),
        MetaRefusal::UnknownNode(node) => to.set_unknown_node(node.0),
        MetaRefusal::InvalidPlan(reason) => to.set_invalid_plan(reason.as_str()),
        MetaRefusal::NotFormed => to.set_not_formed(()),
        MetaRefusal::Stale(what) => to.init_stale().set_what(what.as_str()),
        MetaRefusal::NodeInUse { node, shards, total } => {
            let mut used = to.init_node_in_use();
            used.set_node(node.0);
            used.set_total(*total);
            write_ids(shards.iter().map(|shard| shard.0), used.init_shards(length(shards.len())));
        }
        MetaRefusal::NodeRemoved(node) => to.set_node_removed(node.0),
        MetaRefusal::NotAllowed(why) => to.set_not_allowed(why.as_str()),
        MetaRefusal::Changed { what, version } => {
            let mut changed = to.init_changed();
            changed.set_what(what.as_str());
            changed.set_version(*version);
        }
        MetaRefusal::Other(_) => to.set_other(()),
    }
}

fn read_meta_refusal(from: meta_refusal::Reader<'_>, text: String) -> Result<MetaRefusal, CodecError> {
    Ok(match from.which() {
        Ok(meta_refusal::OtherCluster(other)) => MetaRefusal::OtherCluster {
            have: read_id("have", other.get_have()?)?,
            asked: read_id("asked", other.get_asked()?)?,
        },
        Ok(meta_refusal::NameTaken(taken)) => MetaRefusal::NameTaken {
            name: read_text(taken.get_name()?)?,
            replicas: taken.get_replicas(),
            shards: taken.get_shards() as usize,
        },
        Ok(meta_refusal::UnknownDatabase(name)) => MetaRefusal::UnknownDatabase(read_text(name?)?),
        Ok(meta_refusal::UnknownNode(node)) => MetaRefusal::UnknownNode(NodeId(node)),
        Ok(meta_refusal::InvalidPlan(reason)) => MetaRefusal::InvalidPlan(read_text(reason?)?),
        Ok(meta_refusal::NotFormed(())) => MetaRefusal::NotFormed,
        Ok(meta_refusal::Stale(stale)) => MetaRefusal::Stale(read_text(stale.get_what()?)?),
        Ok(meta_refusal::NodeInUse(used)) => MetaRefusal::NodeInUse {
            node: NodeId(used.get_node()),
            shards: used.get_shards()?.iter().map(ShardId).collect(),
            total: used.get_total(),
        },
        Ok(meta_refusal::NodeRemoved(node)) => MetaRefusal::NodeRemoved(NodeId(node)),
        Ok(meta_refusal::NotAllowed(why)) => MetaRefusal::NotAllowed(read_text(why?)?),
        Ok(meta_refusal::Changed(changed)) => {
            MetaRefusal::Changed { what: read_text(changed.get_what()?)?, version: changed.get_version() }
        }
        Ok(meta_refusal::Other(())) | Err(_) => MetaRefusal::Other(text),
    })
}

/// Copies `bytes` to aligned words and hands them to `read` as one whole message.
pub(crate) fn read_message<T>(
    what: &'static str,
    bytes: &[u8],
    read: impl FnOnce(&MessageReader<'_>) -> Result<T, CodecError>,
) -> Result<T, CodecError> {
    if bytes.len() > limits::TRAVERSAL_BYTES_MAX {
        let most = limits::TRAVERSAL_BYTES_MAX;
        return Err(malformed(what, format!("{} bytes, more than {most}", bytes.len())));
    }
    let mut words = Word::allocate_zeroed_vec(bytes.len().div_ceil(size_of::<Word>()));
    let aligned = Word::words_to_bytes_mut(&mut words);
    aligned[..bytes.len()].copy_from_slice(bytes);
    let traversal = bytes.len().saturating_mul(READS_PER_BYTE).min(limits::TRAVERSAL_BYTES_MAX);
    let mut options = ReaderOptions::new();
    options
        .traversal_limit_in_words(Some(traversal.div_ceil(size_of::<Word>())))
        .nesting_limit(limits::NESTING_MAX);
    let mut rest = &aligned[..bytes.len()];
    let message = serialize::read_message_from_flat_slice(&mut rest, options)?;
    if !rest.is_empty() {
        return Err(malformed(what, format!("{} bytes follow its end", rest.len())));
    }
    read(&message)
}

#[cfg(test)]
pub(crate) mod tests;
