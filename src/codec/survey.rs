//! What the reconciler asks of nodes, and orders from them: surveys and orders as parts of requests
//! between nodes.

use capnp::primitive_list;

use super::CodecError;
use super::records::{length, malformed, read_members, read_text, write_ids, write_members};
use crate::balance::facts::{ShardReport, SickReplica, Survey};
use crate::group::types::{FollowerStatus, MembershipChange};
use crate::ids::{Epoch, NodeId, ReplicaId, ShardId};
use crate::schema::peer_capnp::{follower_report, held_replica, order, shard_report, sick_replica, survey};

/// What the leader of a shard, on the node that is asked, is to do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Order {
    /// The shard.
    pub shard: ShardId,
    /// What to do.
    pub what: Ordered,
}

/// See [`Order`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Ordered {
    /// Change the members.
    Change {
        /// The conf version that is known; refused with another one. Conf versions never come again, and no move ends,
        /// done or rolled back, before the shard's has grown past every one at which the leader of the metadata shard
        /// that ends it, or one before, had ordered a step; one that is rolled back before its first step has it raised
        /// for nothing, as a fence. So an order that was merely long on its way belongs to a move that is under way
        /// still, or is refused.
        ///
        /// Not so one of a deposed leader that hasn't noticed yet: for a second or two it goes on with a map in which
        /// the move isn't called off, and may learn the conf version after the fence from a survey of its own. The
        /// learners that it then orders are added although the move has ended. That does no harm: the shard is the
        /// truth, the map follows it, a replica whose record is ahead of the map isn't buried, and the next step of the
        /// reconciler has the strays removed.
        conf: u64,
        /// What to change.
        change: MembershipChange,
    },
    /// Hand leadership to the replica on this node. Late, it moves a leader once more; whoever may lead then is
    /// for the group to say.
    Transfer(NodeId),
}

/// Writes an order.
pub(super) fn write_order(from: &Order, mut to: order::Builder<'_>) {
    fn ids(from: &[ReplicaId]) -> impl Iterator<Item = u64> {
        from.iter().map(|replica| replica.0)
    }
    to.set_shard(from.shard.0);
    let change = match &from.what {
        Ordered::Transfer(node) => return to.set_transfer(node.0),
        Ordered::Change { conf, change } => {
            to.set_conf(*conf);
            change
        }
    };
    match change {
        MembershipChange::AddLearners(members) => {
            write_members(members, to.init_add_learners(length(members.len())));
        }
        MembershipChange::Exchange { promote, remove } => {
            let mut to = to.init_exchange();
            write_ids(ids(promote), to.reborrow().init_promote(length(promote.len())));
            write_ids(ids(remove), to.init_remove(length(remove.len())));
        }
        MembershipChange::RemoveLearners(replicas) => {
            write_ids(ids(replicas), to.init_remove_learners(length(replicas.len())));
        }
    }
}

/// Reads an order. One of a kind that this version doesn't know is an error.
pub(super) fn read_order(from: order::Reader<'_>) -> Result<Order, CodecError> {
    let change = match from.which()? {
        order::AddLearners(members) => MembershipChange::AddLearners(read_members(members?)?),
        order::Exchange(exchange) => MembershipChange::Exchange {
            promote: read_replicas(exchange.get_promote()?)?,
            remove: read_replicas(exchange.get_remove()?)?,
        },
        order::RemoveLearners(replicas) => MembershipChange::RemoveLearners(read_replicas(replicas?)?),
        order::Transfer(node) => {
            let what = Ordered::Transfer(read_node(node)?);
            return Ok(Order { shard: ShardId(from.get_shard()), what });
        }
    };
    let what = Ordered::Change { conf: from.get_conf(), change };
    Ok(Order { shard: ShardId(from.get_shard()), what })
}

/// Writes a survey.
pub(super) fn write_survey(from: &Survey, mut to: survey::Builder<'_>) {
    to.set_node(from.node.0);
    to.set_disk_full(from.disk_full);
    to.set_snapshot_bytes(from.snapshot_bytes);
    let mut led = to.reborrow().init_led(length(from.led.len()));
    for (at, report) in (0..).zip(&from.led) {
        write_report(report, led.reborrow().get(at));
    }
    let mut held = to.reborrow().init_held(length(from.held.len()));
    for (at, (shard, replica)) in (0..).zip(&from.held) {
        let mut to = held.reborrow().get(at);
        to.set_shard(shard.0);
        to.set_replica(replica.0);
    }
    let mut sick = to.init_sick(length(from.sick.len()));
    for (at, from) in (0..).zip(&from.sick) {
        let mut to = sick.reborrow().get(at);
        to.set_shard(from.shard.0);
        to.set_replica(from.replica.0);
        to.set_why(from.why.as_str());
    }
}

/// Reads a survey.
pub(super) fn read_survey(from: survey::Reader<'_>) -> Result<Survey, CodecError> {
    let held =
        |from: held_replica::Reader<'_>| Ok((ShardId(from.get_shard()), read_replica(from.get_replica())?));
    let sick = |from: sick_replica::Reader<'_>| {
        Ok(SickReplica {
            shard: ShardId(from.get_shard()),
            replica: read_replica(from.get_replica())?,
            why: read_text(from.get_why()?)?,
        })
    };
    Ok(Survey {
        node: read_node(from.get_node())?,
        disk_full: from.get_disk_full(),
        led: from.get_led()?.iter().map(read_report).collect::<Result<_, _>>()?,
        held: from.get_held()?.iter().map(held).collect::<Result<_, CodecError>>()?,
        sick: from.get_sick()?.iter().map(sick).collect::<Result<_, CodecError>>()?,
        snapshot_bytes: from.get_snapshot_bytes(),
    })
}

fn write_report(from: &ShardReport, mut to: shard_report::Builder<'_>) {
    to.set_shard(from.shard.0);
    to.set_leader(from.leader.0);
    to.set_term(from.term);
    let mut epoch = to.reborrow().init_epoch();
    epoch.set_range(from.epoch.range);
    epoch.set_conf(from.epoch.conf);
    write_members(&from.members, to.reborrow().init_members(length(from.members.len())));
    to.set_last(from.last);
    to.set_keys(from.keys);
    to.set_bytes(from.bytes);
    let mut followers = to.init_followers(length(from.followers.len()));
    for (at, from) in (0..).zip(&from.followers) {
        let mut to = followers.reborrow().get(at);
        to.set_replica(from.replica.0);
        to.set_matched(from.matched);
        to.set_active(from.active);
        to.set_caught_up(from.caught_up);
    }
}

fn read_report(from: shard_report::Reader<'_>) -> Result<ShardReport, CodecError> {
    let follower = |from: follower_report::Reader<'_>| {
        Ok(FollowerStatus {
            replica: read_replica(from.get_replica())?,
            matched: from.get_matched(),
            active: from.get_active(),
            caught_up: from.get_caught_up(),
        })
    };
    let epoch = from.get_epoch()?;
    Ok(ShardReport {
        shard: ShardId(from.get_shard()),
        leader: read_replica(from.get_leader())?,
        term: from.get_term(),
        epoch: Epoch { range: epoch.get_range(), conf: epoch.get_conf() },
        members: read_members(from.get_members()?)?,
        followers: from.get_followers()?.iter().map(follower).collect::<Result<_, CodecError>>()?,
        last: from.get_last(),
        keys: from.get_keys(),
        bytes: from.get_bytes(),
    })
}

/// A replica id that must name a replica.
pub(super) fn read_replica(replica: u64) -> Result<ReplicaId, CodecError> {
    match replica {
        0 => Err(malformed("ReplicaId", "0 names no replica")),
        replica => Ok(ReplicaId(replica)),
    }
}

fn read_replicas(from: primitive_list::Reader<'_, u64>) -> Result<Vec<ReplicaId>, CodecError> {
    from.iter().map(read_replica).collect()
}

/// A node id that must name a node.
pub(super) fn read_node(node: u64) -> Result<NodeId, CodecError> {
    match node {
        0 => Err(malformed("NodeId", "0 names no node")),
        node => Ok(NodeId(node)),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::codec::records::tests::any_members;
    use proptest::collection::vec;
    use proptest::prelude::*;

    fn any_replica() -> impl Strategy<Value = ReplicaId> {
        (1..u64::MAX).prop_map(ReplicaId)
    }

    pub(in crate::codec) fn any_order() -> impl Strategy<Value = Order> {
        let change = prop_oneof![
            any_members(4).prop_map(MembershipChange::AddLearners),
            (vec(any_replica(), 0..4), vec(any_replica(), 0..4))
                .prop_map(|(promote, remove)| MembershipChange::Exchange { promote, remove }),
            vec(any_replica(), 0..4).prop_map(MembershipChange::RemoveLearners),
        ];
        let what = prop_oneof![
            (any::<u64>(), change).prop_map(|(conf, change)| Ordered::Change { conf, change }),
            (1..u64::MAX).prop_map(|node| Ordered::Transfer(NodeId(node))),
        ];
        (any::<u64>(), what).prop_map(|(shard, what)| Order { shard: ShardId(shard), what })
    }

    fn any_report() -> impl Strategy<Value = ShardReport> {
        let follower = (any_replica(), any::<u64>(), any::<bool>(), any::<bool>()).prop_map(
            |(replica, matched, active, caught_up)| FollowerStatus { replica, matched, active, caught_up },
        );
        (any::<[u64; 7]>(), any_replica(), any_members(4), vec(follower, 0..4)).prop_map(
            |([shard, term, range, conf, last, keys, bytes], leader, members, followers)| ShardReport {
                shard: ShardId(shard),
                leader,
                term,
                epoch: Epoch { range, conf },
                members,
                followers,
                last,
                keys,
                bytes,
            },
        )
    }

    pub(in crate::codec) fn any_survey() -> impl Strategy<Value = Survey> {
        let held = (any::<u64>().prop_map(ShardId), any_replica());
        let sick = (any::<u64>(), any_replica(), ".{0,20}").prop_map(|(shard, replica, why)| SickReplica {
            shard: ShardId(shard),
            replica,
            why,
        });
        let lists = (vec(any_report(), 0..4), vec(held, 0..4), vec(sick, 0..3));
        (1..u64::MAX, any::<bool>(), any::<u64>(), lists).prop_map(
            |(node, disk_full, snapshot_bytes, (led, held, sick))| Survey {
                node: NodeId(node),
                disk_full,
                led,
                held,
                sick,
                snapshot_bytes,
            },
        )
    }

    #[test]
    fn an_order_that_names_nobody_is_refused() {
        let mut message = capnp::message::Builder::new_default();
        let mut read = |change: fn(order::Builder<'_>)| {
            change(message.init_root());
            read_order(message.get_root_as_reader().unwrap()).map_err(|error| error.to_string())
        };
        let nobody = |what: &str| Err(format!("malformed {what}"));
        assert_eq!(read(|mut to| to.set_transfer(0)), nobody("NodeId: 0 names no node"));
        let replica = "ReplicaId: 0 names no replica";
        assert_eq!(
            read(|to| {
                to.init_remove_learners(1);
            }),
            nobody(replica)
        );
        assert_eq!(
            read(|to| {
                to.init_exchange().init_promote(1);
            }),
            nobody(replica)
        );
        assert!(
            read(|to| {
                to.init_add_learners(1);
            })
            .is_err()
        );
        let none = MembershipChange::RemoveLearners(Vec::new());
        let order = Order { shard: ShardId(0), what: Ordered::Change { conf: 0, change: none } };
        assert_eq!(
            read(|to| {
                to.init_remove_learners(0);
            }),
            Ok(order),
            "raises the conf version"
        );
    }
}
