//! Who is where while a simulation runs: replicas that nodes make and remove, nodes that come and that are
//! gone for good, and what a shard can spare.
//!
//! ```text
//! ordered to go ─► replica ended ─► its writes done ─► tombstone (log.remove) ─► state removed ─► noted
//! ```

use super::checks::Violation;
use super::checks::members::{Configuration, majority};
use super::planted::Planted;
use super::report::note;
use super::shell::{Node, NodeEvent};
use super::world::{Event, World};
use crate::ids::{Index, NodeId, ReplicaId, ShardId};
use crate::node::replicas::Replicas;
use crate::placement::map::{Member, MemberRole};
use crate::storage::StorageError;
use crate::storage::engine_memory::CrashLoss;
use crate::storage::log::{LogStore, ReplicaPhase, ReplicaRecord};

/// Nodes that may join while a simulation runs.
const NEWCOMERS_MAX: usize = 3;

/// Nodes that may be gone for good.
const LOSSES_MAX: usize = 2;

/// A step of the removal of a replica, by the process with this number.
#[derive(Clone, Copy, Debug)]
pub(super) enum RemoveEvent {
    /// It is to go.
    Order(ReplicaId),
    /// It has ended. Whether its state is removed already, which is a planted bug.
    Tombstone(u64, ReplicaId, bool),
    /// It has a tombstone.
    State(u64, ReplicaId),
}

fn failed(error: StorageError) -> Violation {
    Violation::new("disk", error.to_string())
}

impl Node {
    /// Whether a replica is still to go now that nothing of it is under way: its last write may have said that it is a
    /// member by a change which the map doesn't know of yet.
    fn is_to_go(&self, replica: ReplicaId) -> Result<bool, StorageError> {
        let catalogue = self.disk.log.catalogue()?;
        Ok(Replicas::new(catalogue).orders(&self.map, self.id).remove.contains(&replica))
    }
}

impl World {
    /// The newest configuration of a shard that anybody has applied.
    pub(super) fn configuration(&self, shard: ShardId) -> Option<&Configuration> {
        self.truths.get(&shard)?.members.newest()
    }

    /// Its members.
    pub(super) fn members(&self, shard: ShardId) -> &[Member] {
        self.configuration(shard).map_or(&[], |newest| &newest.members)
    }

    /// The shard that a replica is or was a member of.
    pub(super) fn shard_of(&self, node: NodeId, replica: ReplicaId) -> Option<ShardId> {
        Some(self.nodes.get(&node)?.record(replica)?.shard)
    }

    /// Nodes that are not gone for good.
    pub(super) fn living(&self) -> Vec<NodeId> {
        self.nodes.values().filter(|node| !node.lost).map(|node| node.id).collect()
    }

    /// Whether a node is gone for good.
    pub(super) fn is_lost(&self, node: NodeId) -> bool {
        self.nodes.get(&node).is_none_or(|node| node.lost)
    }

    // ---------------------------------------------------------------------------------- replicas

    /// A node is told to have a replica.
    pub(super) fn make_replica(&mut self, id: NodeId, record: ReplicaRecord) -> Result<(), Violation> {
        let Some(node) = self.nodes.get_mut(&id).filter(|node| node.process.is_some()) else {
            return Ok(());
        };
        let replica = record.replica;
        if node.disk.log.catalogue().map_err(failed)?.iter().any(|record| record.replica == replica) {
            return Ok(());
        }
        node.disk.create(&[record]).map_err(failed)?;
        node.reload_records().map_err(failed)?;
        note!(self.trace, "{} node {} makes replica {}", self.clock.now, id, replica);
        self.count("replicas made");
        self.replicas.make(replica, id)?;
        self.open(id, replica)
    }

    pub(super) fn on_remove(&mut self, id: NodeId, event: RemoveEvent) -> Result<(), Violation> {
        let governed = self.is_governed();
        let Some(node) = self.nodes.get_mut(&id) else { return Ok(()) };
        let Some(number) = node.process_number() else { return Ok(()) };
        match event {
            RemoveEvent::Order(replica) => {
                if node.record(replica).is_none() || !node.removing.insert(replica) {
                    return Ok(());
                }
                node.installing.remove(&replica);
                note!(self.trace, "{} node {} removes replica {}", self.clock.now, id, replica);
                self.end_replica(id, replica);
                self.remove_later(id, RemoveEvent::Tombstone(number, replica, false));
                Ok(())
            }
            RemoveEvent::Tombstone(process, ..) | RemoveEvent::State(process, _) if process != number => {
                Ok(())
            }
            RemoveEvent::Tombstone(_, replica, bare) => {
                if node.disk.is_busy_with(replica) {
                    self.remove_later(id, event);
                } else if governed && !bare && !node.is_to_go(replica).map_err(failed)? {
                    node.removing.remove(&replica);
                    node.switching.remove(&replica);
                    node.reload_records().map_err(failed)?;
                    note!(self.trace, "{} node {} keeps replica {}", self.clock.now, id, replica);
                    self.count("replicas kept");
                    return self.open(id, replica);
                } else if self.options.planted.is(Planted::TombstoneLate) && !bare {
                    node.disk.destroy(replica).map_err(failed)?;
                    let event = RemoveEvent::Tombstone(number, replica, true);
                    self.clock.after(500_000, Event::Node(id, NodeEvent::Remove(event)));
                } else {
                    node.disk.remove(replica).map_err(failed)?;
                    node.removing.remove(&replica);
                    node.switching.remove(&replica);
                    node.reload_records().map_err(failed)?;
                    self.replicas.remove(replica);
                    self.count("replicas removed");
                    self.remove_later(id, RemoveEvent::State(number, replica));
                }
                Ok(())
            }
            RemoveEvent::State(_, replica) => {
                node.disk.destroy(replica).map_err(failed)?;
                node.disk.log.destroyed(&[replica]).map_err(failed)
            }
        }
    }

    fn remove_later(&mut self, id: NodeId, event: RemoveEvent) {
        let delay = self.dice.between(200, 50_000);
        self.clock.after(delay, Event::Node(id, NodeEvent::Remove(event)));
    }

    /// A crash may have come between a tombstone and the end of the deletion.
    pub(super) fn remove_remains(&mut self, id: NodeId) -> Result<(), Violation> {
        let Some(node) = self.nodes.get(&id) else { return Ok(()) };
        let Some(number) = node.process_number() else { return Ok(()) };
        let tombstones = node.disk.log.catalogue().map_err(failed)?.into_iter();
        let remains = tombstones.filter(|record| record.phase == ReplicaPhase::Tombstone);
        for replica in remains.map(|record| record.replica) {
            self.remove_later(id, RemoveEvent::State(number, replica));
        }
        Ok(())
    }

    // ------------------------------------------------------------------------------------- nodes

    /// A node joins.
    pub(super) fn join(&mut self) {
        if self.nodes.len() >= self.options.nodes + NEWCOMERS_MAX {
            return;
        }
        let Some(id) = self.nodes.keys().next_back().map(|last| NodeId(last.0 + 1)) else { return };
        let tick = self.draw_tick();
        self.nodes.insert(id, Node::new(id, &self.options, tick));
        self.clock.after(0, Event::Node(id, NodeEvent::Start));
        self.count("nodes joined");
    }

    /// A node is gone for good, unless a shard needs what it has.
    pub(super) fn lose_node(&mut self, id: NodeId) -> Result<(), Violation> {
        let lost = self.nodes.values().filter(|node| node.lost).count();
        if lost >= LOSSES_MAX
            || self.is_lost(id)
            || !self.truths.keys().all(|shard| self.can_spare(*shard, id))
        {
            return Ok(());
        }
        self.crash(id, CrashLoss::Nothing, false, 0)?;
        if let Some(node) = self.nodes.get_mut(&id) {
            // Its disk stays, for the checks to look at: nobody else reads it any more.
            node.lost = true;
        }
        note!(self.trace, "{} node {} is gone for good", self.clock.now, id);
        self.count("nodes lost for good");
        Ok(())
    }

    // ------------------------------------------------------------------------------------ limits

    /// Whether a shard goes on without what a node has of it: whatever members are or may come into force,
    /// a majority of them has all that it should, and knows which are in force.
    pub(super) fn can_spare(&self, shard: ShardId, id: NodeId) -> bool {
        // A learner may be about to be promoted by a leader that has just heard of it.
        let learns = |m: &Member| m.node == id && m.role == MemberRole::Learner;
        let learns = self.is_governed() && self.members(shard).iter().any(learns);
        if learns || self.operator.exchanges(shard, self.clock.now) {
            return false;
        }
        self.possible(shard).all(|members| self.would_go_on(shard, members, Some(id)))
    }

    /// Whether a shard of these members would go on without what is on one node.
    pub(super) fn would_go_on(&self, shard: ShardId, members: &[Member], without: Option<NodeId>) -> bool {
        majority(members, |member| {
            Some(member.node) != without && !self.is_damaged(member) && self.knows_members(shard, member)
        })
    }

    /// The newest members of a shard, and those that changes would make which are proposed and not decided.
    pub(super) fn possible(&self, shard: ShardId) -> impl Iterator<Item = &[Member]> {
        let last = self.truths.get(&shard).map_or(0, |truth| truth.last());
        let proposed = self.proposed.get(&shard).into_iter().flatten();
        let proposed = proposed.filter(move |(index, _)| *index > last).map(|(_, members)| &members[..]);
        std::iter::once(self.members(shard)).chain(proposed)
    }

    /// Whether a replica has on disk that the newest members of its shard are in force.
    pub(super) fn knows_members(&self, shard: ShardId, member: &Member) -> bool {
        let since = self.configuration(shard).map_or(Index::MAX, |newest| newest.index);
        let log = self.nodes.get(&member.node).and_then(|node| node.disk.log.load(member.replica).ok());
        log.is_some_and(|log| log.hard_state.commit.max(log.truncated.index) >= since)
    }

    // ------------------------------------------------------------------------------------ checks

    /// Entry `index` of `term` is found to be committed.
    pub(super) fn check_commit(&self, shard: ShardId, index: Index, term: u64) -> Result<(), Violation> {
        let Some(truth) = self.truths.get(&shard) else { return Ok(()) };
        let durable = |member: &Member| {
            let node = self.nodes.get(&member.node);
            node.is_some_and(|node| node.disk.has_entry(member.replica, index, term))
        };
        truth.members.check_commit(shard, index, durable)
    }

    /// Whether every shard has voters alone, all of them on living nodes and knowing each other, and no node
    /// holds anything else.
    pub(super) fn members_in_place(&self) -> bool {
        self.truths.keys().all(|shard| {
            let Some(newest) = self.configuration(*shard) else { return false };
            let held = self.nodes.values().filter(|node| !node.lost).flat_map(|node| {
                node.records.iter().filter(|record| record.shard == *shard).map(|record| record.replica)
            });
            let mut held: Vec<ReplicaId> = held.collect();
            let mut members: Vec<ReplicaId> = newest.members.iter().map(|m| m.replica).collect();
            held.sort_unstable();
            members.sort_unstable();
            held == members
                && newest.members.iter().all(|member| {
                    let replica = self.nodes.get(&member.node).and_then(|node| node.replica(member.replica));
                    member.role == MemberRole::Voter
                        && replica.is_some_and(|replica| replica.group.epoch().conf == newest.conf)
                })
        })
    }
}
