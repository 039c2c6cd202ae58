//! Snapshots in the simulation: made from what the leader's disk has, brought to the follower's node in
//! one piece, late or not at all, and installed there in the steps between which a crash can come.
//!
//! ```text
//!   leader                         follower's node
//!   asked ─► made, at B ──image──► loaded in batches ─► synced ─► replica ended, its writes done
//!     ▲                                                              │ log.install: the one step
//!     └────────────── installed, not needed, or nothing ◄── reopened ┘
//! ```
//!
//! Not simulated: the file between the two, and how it is made beside flushes and resumed (the suites of
//! the storage and the tests of processes do that); here it appears when no flush is under way.

use std::ops::Bound;
use std::sync::Arc;

use bytes::Bytes;

use super::Time;
use super::checks::Violation;
use super::planted::Planted;
use super::report::{Shown, note};
use super::shell::{NodeEvent, ReplicaEvent};
use super::world::{Event, World};
use crate::group::types::SnapshotWanted;
use crate::ids::{Epoch, NodeId, Position, ReplicaId, Term};
use crate::placement::map::Member;
use crate::storage::engine::{Engine, Mutation};
use crate::storage::log::Install;
use crate::storage::state::StateHeader;
use crate::storage::{StorageError, keys};

/// Time after which a leader gives up a snapshot of which it hears nothing.
const PATIENCE: Time = 3_000_000;

/// A replica's state as the engine has it, under keys that name no replica.
pub(super) struct Image {
    records: Vec<(Vec<u8>, Bytes)>,
    position: Position,
    epoch: Epoch,
    members: Vec<Member>,
}

/// Where a snapshot comes from and goes to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Route {
    /// The leader's node.
    from: NodeId,
    /// The leader.
    leader: ReplicaId,
    /// The follower's node.
    node: NodeId,
    /// The follower.
    to: ReplicaId,
    /// The leader's term.
    term: Term,
}

/// A snapshot on its way.
pub(super) enum SnapshotEvent {
    /// To the leader's replica: it is time to make it.
    Make(SnapshotWanted),
    /// To the leader's replica: the follower has it, or there's nothing to be heard of it.
    Done(ReplicaId, bool),
}

/// A snapshot at the follower's node.
pub(super) enum InstallEvent {
    /// It arrives.
    Arrived(Route, Arc<Image>),
    /// So many of its records are loaded, by the process with this number.
    Loaded(u64, Route, Arc<Image>, usize),
    /// All are loaded and durable; the replica has to end. Whether its state was lost.
    Switch(u64, Route, Arc<Image>, bool),
    /// What is left of another generation than the replica's goes.
    Sweep(u64, ReplicaId),
}

fn failed(error: StorageError) -> Violation {
    Violation::new("disk", error.to_string())
}

impl World {
    /// A group wants a follower to have a snapshot.
    pub(super) fn want_snapshot(&mut self, id: NodeId, replica: ReplicaId, wanted: SnapshotWanted) {
        self.count("snapshots wanted");
        let delay = self.dice.between(500, 50_000);
        self.later(id, replica, delay, SnapshotEvent::Make(wanted));
    }

    fn later(&mut self, id: NodeId, replica_id: ReplicaId, delay: Time, event: SnapshotEvent) {
        let Some(incarnation) = self.replica(id, replica_id).map(|replica| replica.incarnation) else {
            return;
        };
        let event = NodeEvent::Replica(replica_id, incarnation, ReplicaEvent::Snapshot(event));
        self.clock.after(delay, Event::Node(id, event));
    }

    pub(super) fn on_snapshot(
        &mut self,
        id: NodeId,
        replica_id: ReplicaId,
        event: SnapshotEvent,
    ) -> Result<(), Violation> {
        let wanted = match event {
            SnapshotEvent::Make(wanted) => wanted,
            SnapshotEvent::Done(to, installed) => {
                if let Some(replica) = self.replica(id, replica_id) {
                    replica.group.snapshot_done(to, installed);
                }
                self.queue_pump(id, replica_id);
                return Ok(());
            }
        };
        let Some(node) = self.nodes.get_mut(&id) else { return Ok(()) };
        if node.disk.is_flushing(replica_id) {
            let delay = self.dice.between(500, 5_000);
            self.later(id, replica_id, delay, SnapshotEvent::Make(wanted));
            return Ok(());
        }
        let Some(generation) = node.record(replica_id).map(|record| record.generation) else { return Ok(()) };
        if node.disk.faulty.is_rotten(replica_id) || (node.unreadable && self.dice.chance(300)) {
            self.count("snapshots not made by read errors");
            self.later(id, replica_id, 1_000, SnapshotEvent::Done(wanted.to, false));
            return Ok(());
        }
        if node.replica(replica_id).is_none_or(|r| r.group.status().applied < wanted.least) {
            return Err(Violation::new("snapshots", format!("{wanted:?} isn't applied at its leader")));
        }
        let image = image(&*node.disk.engine, replica_id, generation).map_err(failed)?;
        let Some(mut image) = image.filter(|image| image.position.index >= wanted.least) else {
            self.count("flushes for a snapshot");
            self.freeze(id, replica_id);
            let delay = self.dice.between(500, 5_000);
            self.later(id, replica_id, delay, SnapshotEvent::Make(wanted));
            return Ok(());
        };
        let (at, conf) = (image.position.index, image.epoch.conf);
        if let Some((shard, truth)) =
            node.record(replica_id).and_then(|r| self.truths.get_key_value(&r.shard))
        {
            truth.members.compare(*shard, replica_id, (at, 0), conf, &image.members)?;
        }
        let planted = self.options.planted;
        if planted.is(Planted::SnapshotWithoutSessions) {
            image.records.retain(|(local, _)| local.first() != Some(&keys::KIND_SESSION));
        }
        if let Some(replica) = node.replica(replica_id).filter(|_| planted.is(Planted::SnapshotAhead)) {
            image.position = replica.group.state().header().applied;
        }
        let made =
            node.replica_mut(replica_id).is_some_and(|r| r.group.snapshot_made(wanted.to, image.position));
        if !made {
            self.count("snapshots given up");
            return Ok(());
        }
        let route =
            Route { from: id, leader: replica_id, node: wanted.node, to: wanted.to, term: wanted.term };
        note!(self.trace, "{} snapshot at {:?} {:?}", self.clock.now, image.position, Shown(route));
        self.later(id, replica_id, PATIENCE, SnapshotEvent::Done(wanted.to, false));
        let delay = self.dice.between(1_000, 1_000_000);
        if !self.network.is_blocked(id, wanted.node) && !self.dice.chance(100) {
            let event = NodeEvent::Install(InstallEvent::Arrived(route, Arc::new(image)));
            self.clock.after(delay, Event::Node(wanted.node, event));
        }
        Ok(())
    }

    pub(super) fn on_install(&mut self, id: NodeId, event: InstallEvent) -> Result<(), Violation> {
        let Some(node) = self.nodes.get_mut(&id) else { return Ok(()) };
        let Some(number) = node.process_number() else { return Ok(()) };
        match event {
            InstallEvent::Arrived(route, image) => {
                let index = image.position.index;
                let status = node.replica(route.to).map(|replica| replica.group.status());
                let least = status.as_ref().and_then(|status| status.state_lost);
                let needed = match least {
                    Some(least) => index >= least,
                    None => status.is_some_and(|status| status.applied < index),
                };
                if !needed || node.installing.contains(&route.to) {
                    let installed = !needed && least.is_none();
                    self.report(route, installed);
                    return Ok(());
                }
                node.installing.insert(route.to);
                // What an earlier attempt has left would mix with it.
                let Some(generation) = node.record(route.to).map(|record| record.generation) else {
                    return Ok(());
                };
                node.disk.sweep(route.to, generation).map_err(failed)?;
                self.install_later(id, InstallEvent::Loaded(number, route, image, 0));
                Ok(())
            }
            InstallEvent::Loaded(process, ..)
            | InstallEvent::Switch(process, ..)
            | InstallEvent::Sweep(process, _)
                if process != number =>
            {
                Ok(())
            }
            InstallEvent::Loaded(_, route, image, count) => {
                let Some(generation) = node.record(route.to).map(|record| record.generation + 1) else {
                    return Ok(());
                };
                let rest = image.records.get(count..).unwrap_or_default();
                let batch: Vec<Mutation> = (rest.iter().take(1 + self.dice.below(4)))
                    .map(|(key, value)| (keys::from_local(route.to, generation, key), Some(value.clone())))
                    .collect();
                node.disk.engine.write(&batch).map_err(failed)?;
                let count = count + batch.len();
                if count < image.records.len() {
                    self.install_later(id, InstallEvent::Loaded(number, route, image, count));
                    return Ok(());
                }
                if !self.options.planted.is(Planted::InstallUnsynced) {
                    node.disk.engine.sync().map_err(failed)?;
                }
                let state_lost = node.replica(route.to).is_some_and(|replica| replica.group.state_lost());
                self.end_replica(id, route.to);
                self.install_later(id, InstallEvent::Switch(number, route, image, state_lost));
                Ok(())
            }
            InstallEvent::Switch(_, route, image, state_lost) => {
                if node.disk.is_busy_with(route.to) {
                    self.install_later(id, InstallEvent::Switch(number, route, image, state_lost));
                    return Ok(());
                }
                let Some(generation) = node.record(route.to).map(|record| record.generation + 1) else {
                    return Ok(());
                };
                let install = Install {
                    generation,
                    position: image.position,
                    leader_term: route.term,
                    epoch: image.epoch,
                    members: image.members.clone(),
                    state_lost,
                };
                node.installing.remove(&route.to);
                let installed = match node.disk.install(route.to, &install) {
                    Ok(()) => {
                        self.count(if state_lost { "states fetched" } else { "snapshots installed" });
                        true
                    }
                    // It has caught up by itself meanwhile.
                    Err(StorageError::Inconsistent { reason, .. }) => {
                        note!(self.trace, "{} not installed: {}", self.clock.now, reason);
                        self.count("snapshots not needed");
                        true
                    }
                    Err(error) => return Err(failed(error)),
                };
                if let Some(node) = self.nodes.get_mut(&id) {
                    node.reload_records().map_err(failed)?;
                }
                self.report(route, installed);
                self.install_later(id, InstallEvent::Sweep(number, route.to));
                self.open(id, route.to)
            }
            InstallEvent::Sweep(_, replica) => {
                let Some(generation) = node.record(replica).map(|record| record.generation) else {
                    return Ok(());
                };
                if !node.installing.contains(&replica) {
                    node.disk.sweep(replica, generation).map_err(failed)?;
                }
                Ok(())
            }
        }
    }

    fn install_later(&mut self, id: NodeId, event: InstallEvent) {
        let delay = self.dice.between(200, 20_000);
        self.clock.after(delay, Event::Node(id, NodeEvent::Install(event)));
    }

    /// The leader hears of the end, or it doesn't.
    fn report(&mut self, route: Route, installed: bool) {
        if self.network.is_blocked(route.node, route.from) || self.dice.chance(100) {
            return;
        }
        let delay = self.dice.between(200, 50_000);
        self.later(route.from, route.leader, delay, SnapshotEvent::Done(route.to, installed));
    }
}

/// What the engine has of a replica; `None` if nothing was ever flushed.
fn image(engine: &dyn Engine, replica: ReplicaId, generation: u32) -> Result<Option<Image>, StorageError> {
    let (from, to) = keys::generation_range(replica, generation);
    let mut records = Vec::new();
    engine.scan(Bound::Included(&from), &to, &mut |key, value| {
        if let Some(local) = keys::local_key(key) {
            records.push((local.to_vec(), value));
        }
        true
    })?;
    let Some(header) = engine.get(&keys::header_key(replica, generation))? else { return Ok(None) };
    let StateHeader { applied, epoch, members, .. } = StateHeader::decode(&header, "a simulated state")?;
    // Where it stands comes last: a state that is loaded in part stands nowhere.
    records.sort_by_key(|(local, _)| local.first() == Some(&keys::KIND_HEADER));
    Ok(Some(Image { records, position: applied, epoch, members }))
}
