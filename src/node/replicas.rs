//! What the supervisor knows of its replicas, and what it decides about them: plain state, no actors.
//! Time is passed in.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use super::handle::ReplicaHealth;
use crate::codec::snapshot::{SnapshotAnswer, SnapshotOffer};
use crate::ids::{Epoch, Incarnation, Index, METADATA_SHARD, NodeId, ReplicaId, ShardId, generation_of};
use crate::limits;
use crate::machine::MachineKind;
use crate::placement::map::{ClusterMap, Member, MemberRole, ShardRecord};
use crate::storage::log::{Install, RecordedMembership, ReplicaPhase, ReplicaRecord};

/// One replica of this node.
#[derive(Debug)]
pub struct Slot {
    /// Its entry in the catalogue.
    pub record: ReplicaRecord,
    /// The current, or last, start of it; 0 before the first.
    pub incarnation: Incarnation,
    /// How it is.
    pub health: ReplicaHealth,
    /// Why its state is lost, from the start that found it so until one that has another.
    lost: Option<String>,
    /// Restarts since the node started.
    pub restarts: u32,
    crashes: VecDeque<Instant>,
    /// The entry at which it crashed last, and how often in a row at that one.
    stuck: Option<(Index, usize)>,
    /// Attempts to open it that have failed since it last served.
    failures: u32,
    /// It is being read from disk and started, or soon will be.
    opening: bool,
    /// It is stopped for a while: to be switched to a snapshot, or to go on alone, or maybe for good.
    installing: bool,
    /// The last start of it that is known to have ended.
    ended: Incarnation,
}

/// What to do about a crashed replica.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Rebuild it from disk after this time.
    Restart(Duration),
    /// It crashed too often: leave it down until the node restarts.
    Quarantine,
}

/// The end of a replica that nobody ordered.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Crash {
    /// Why.
    pub reason: String,
    /// The entry that it was applying.
    pub applying: Option<Index>,
    /// When.
    pub at: Instant,
}

/// What the end of an attempt to start a replica means.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Started {
    /// It serves, after so many attempts that failed.
    Serving {
        /// Attempts.
        failures: u32,
    },
    /// It runs, but its state is lost.
    WithoutState {
        /// It hadn't been found so before.
        news: bool,
    },
    /// It can't be opened. The reason may pass, as a want of memory or file descriptors does.
    Failed {
        /// Time until the next attempt.
        again: Duration,
        /// The last attempt did not fail for the same reason.
        news: bool,
    },
    /// No news any more: the replica was removed, or this start of it has crashed, which may become known
    /// first.
    Old,
}

/// How far a node's replicas are, for whoever waits for them or asks.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Readiness {
    /// Replicas of the catalogue that have not been tried yet; `None` before they are counted.
    pub untried: Option<usize>,
    /// Which replicas were open or should be, and aren't, and why; for a person.
    pub closed: Option<String>,
}

impl Readiness {
    /// Whether all replicas that the node held before have been tried.
    pub fn all_tried(&self) -> bool {
        self.untried == Some(0)
    }
}

/// What a cluster map asks of a node.
#[derive(Debug, Default)]
pub struct Orders {
    /// Replicas to create: their shard's record places them on this node.
    pub create: Vec<ReplicaRecord>,
    /// Replicas to remove: their shard was dropped, or they were replaced.
    pub remove: Vec<ReplicaId>,
}

/// Whether a replica's own record says that it is a member, by a conf version that comes after `conf`.
///
/// What the map doesn't know of yet may have been ordered by a leader of the metadata shard that had been deposed.
/// Such a replica may count in its group's quorums, so it has to stay whatever an older record says.
pub(super) fn is_ahead(replica: ReplicaId, epoch: Epoch, members: &[Member], conf: u64) -> bool {
    epoch.conf > conf && members.iter().any(|member| member.replica == replica)
}

/// The conf version of a group whose members were never changed.
const FIRST_CONF: u64 = 1;

/// The replicas of a node, tombstones included.
#[derive(Default)]
pub struct Replicas {
    /// Boxed: nodes of a map that grows at its end stay half empty.
    slots: BTreeMap<ReplicaId, Box<Slot>>,
    tombstones: BTreeSet<ReplicaId>,
    /// Tombstones of the catalogue whose state may still be on disk.
    remains: Vec<ReplicaId>,
}

impl Replicas {
    /// Those that the catalogue lists.
    pub fn new(catalogue: Vec<ReplicaRecord>) -> Replicas {
        let mut replicas = Replicas::default();
        for record in catalogue {
            match record.phase {
                ReplicaPhase::Active => replicas.insert(record),
                ReplicaPhase::Tombstone => {
                    replicas.tombstones.insert(record.replica);
                    replicas.remains.push(record.replica);
                }
                ReplicaPhase::Destroyed => {
                    replicas.tombstones.insert(record.replica);
                }
            }
        }
        replicas
    }

    fn insert(&mut self, record: ReplicaRecord) {
        let slot = Slot {
            record,
            incarnation: 0,
            health: ReplicaHealth::Recovering,
            lost: None,
            restarts: 0,
            crashes: VecDeque::new(),
            stuck: None,
            failures: 0,
            opening: true,
            installing: false,
            ended: 0,
        };
        self.slots.insert(slot.record.replica, Box::new(slot));
    }

    /// All living replicas.
    pub fn iter(&self) -> impl Iterator<Item = &Slot> {
        self.slots.values().map(Box::as_ref)
    }

    /// Takes those that were removed before the node started, and whose state may still be on disk.
    pub fn take_remains(&mut self) -> Vec<ReplicaId> {
        std::mem::take(&mut self.remains)
    }

    /// One of the living.
    pub fn get_mut(&mut self, replica: ReplicaId) -> Option<&mut Slot> {
        self.slots.get_mut(&replica).map(Box::as_mut)
    }

    /// What `map` asks of `node` and is not done yet. A replica that was started once, a tombstone
    /// too, is never created again: its vote and its log would begin anew.
    ///
    /// A replica goes only if a record of its own shard says so that is newer than the one that ordered it.
    /// An old map doesn't name it yet, and what a node holds must not depend on whether it has read the
    /// newest: what is removed never comes back. Nor does one go whose own record is ahead of the shard's
    /// (`is_ahead`), unless the shard is dropped.
    pub fn orders(&self, map: &ClusterMap, node: NodeId) -> Orders {
        let mut orders = Orders::default();
        for shard in map.shards.values().filter(|shard| !shard.dropped) {
            for member in shard.ordered().filter(|member| member.node == node) {
                let replica = member.replica;
                if !self.slots.contains_key(&replica) && !self.tombstones.contains(&replica) {
                    orders.create.push(record_of(shard, replica));
                }
            }
        }
        let goes = |slot: &&Slot| {
            let record = &slot.record;
            map.shards.get(&record.shard).is_some_and(|shard| {
                let ordered = shard.ordered().any(|member| member.replica == record.replica);
                let ahead = is_ahead(record.replica, record.epoch, &record.members, shard.epoch.conf);
                shard.dropped || !ordered && is_newer(shard, record) && !ahead
            })
        };
        orders.remove.extend(self.iter().filter(goes).map(|slot| slot.record.replica));
        orders
    }

    /// Replicas that are to go on alone, and aren't yet: the map names nobody else, under a conf version of a
    /// later generation than theirs.
    pub fn recoveries(&self, map: &ClusterMap, node: NodeId) -> Vec<(ReplicaId, Epoch)> {
        let due = |slot: &Slot| {
            let record = &slot.record;
            let shard = map.shards.get(&record.shard).filter(|shard| !shard.dropped)?;
            let only = Member { replica: record.replica, node, role: MemberRole::Voter };
            // A newcomer has never been a voter of an earlier generation.
            let was_member = !record.members.is_empty();
            (was_member && shard.epoch.generation() > record.epoch.generation() && shard.members == [only])
                .then_some((record.replica, shard.epoch))
        };
        self.iter().filter_map(due).collect()
    }

    /// Replicas that are being created.
    pub fn created(&mut self, records: &[ReplicaRecord]) {
        for record in records {
            self.insert(record.clone());
        }
    }

    /// A replica is removed for good.
    pub fn removed(&mut self, replica: ReplicaId) {
        self.slots.remove(&replica);
        self.tombstones.insert(replica);
    }

    /// A replica whose files were read is about to be started: which start of it that is. `None`: it isn't to be, for
    /// it was removed meanwhile, or is stopped for its log to be changed, and what was read is old.
    pub fn begin_start(&mut self, replica: ReplicaId) -> Option<Incarnation> {
        let slot = self.slots.get_mut(&replica).filter(|slot| !slot.installing)?;
        slot.incarnation += 1;
        Some(slot.incarnation)
    }

    /// A replica is to be opened once more that couldn't be: its record. `None` if it was removed, or has been opened
    /// or stopped since. Until it has been tried nothing else may be begun with its log.
    pub fn begin_reopen(&mut self, replica: ReplicaId, incarnation: Incarnation) -> Option<ReplicaRecord> {
        let failed = |slot: &&mut Box<Slot>| {
            slot.incarnation == incarnation && matches!(slot.health, ReplicaHealth::Failed(_))
        };
        let slot = self.slots.get_mut(&replica).filter(failed)?;
        slot.opening = true;
        Some(slot.record.clone())
    }

    /// The attempt to start `incarnation` of `replica` has come to an end: it runs, and why its state is
    /// lost, if it is; or why it can't.
    pub fn started(
        &mut self,
        replica: ReplicaId,
        incarnation: Incarnation,
        result: Result<Option<String>, String>,
    ) -> Started {
        // One that can't be recorded fails before its first start, which would be number 1.
        let unborn = incarnation == 0 && result.is_err();
        let current =
            |slot: &&mut Box<Slot>| slot.incarnation == incarnation && (slot.ended < incarnation || unborn);
        let Some(slot) = self.slots.get_mut(&replica).filter(current) else {
            return Started::Old;
        };
        slot.opening = false;
        match result {
            Ok(lost) => {
                let news = slot.lost.is_none();
                slot.lost = lost;
                let failures = std::mem::take(&mut slot.failures);
                match &slot.lost {
                    None => {
                        slot.health = ReplicaHealth::Serving;
                        Started::Serving { failures }
                    }
                    Some(why) => {
                        slot.health = ReplicaHealth::Refetching(why.clone());
                        Started::WithoutState { news }
                    }
                }
            }
            Err(reason) => {
                let health = ReplicaHealth::Failed(reason);
                let news = slot.health != health;
                slot.health = health;
                let delay = limits::RESTART_BACKOFF_MS << slot.failures.min(16);
                slot.failures = slot.failures.saturating_add(1);
                Started::Failed { again: Duration::from_millis(delay.min(limits::REOPEN_MS_MAX)), news }
            }
        }
    }

    /// Which replicas are not open although they were, or were tried, or have no state, and why; for a
    /// person.
    pub fn closed(&self) -> Option<String> {
        let closed = self.iter().filter_map(|slot| match &slot.health {
            ReplicaHealth::Serving => None,
            // Its state is on its way still while a snapshot is installed.
            ReplicaHealth::Recovering | ReplicaHealth::Installing => {
                slot.lost.as_ref().map(|why| (slot, "refetching", why))
            }
            ReplicaHealth::Refetching(why) => Some((slot, "refetching", why)),
            ReplicaHealth::Restarting(why) => Some((slot, "restarting", why)),
            ReplicaHealth::Quarantined(why) => Some((slot, "quarantined", why)),
            ReplicaHealth::Failed(why) => Some((slot, "failed", why)),
        });
        let (mut count, mut first) = (0, None);
        for (slot, state, why) in closed {
            count += 1;
            first.get_or_insert_with(|| format!("that of shard {} is {state}: {why}", slot.record.shard));
        }
        first.map(|first| format!("{count} of {} replicas can't serve; {first}", self.slots.len()))
    }

    /// Incarnation `incarnation` of `replica` has ended. `None` if it isn't the current one: old news.
    ///
    /// Two things put a replica in quarantine: so many crashes within a window, whatever they were of;
    /// and so many in a row at one entry, however long each start took to come to it again. The second is
    /// what an entry does that no replica can apply.
    pub fn crashed(
        &mut self,
        replica: ReplicaId,
        incarnation: Incarnation,
        crash: &Crash,
    ) -> Option<(ShardId, Verdict)> {
        let slot = self.slots.get_mut(&replica)?;
        if slot.incarnation != incarnation || slot.installing {
            return None;
        }
        slot.ended = incarnation;
        let window = Duration::from_millis(limits::CRASH_WINDOW_MS);
        slot.crashes.push_back(crash.at);
        while slot.crashes.front().is_some_and(|&at| crash.at.duration_since(at) > window) {
            slot.crashes.pop_front();
        }
        slot.stuck = crash.applying.map(|entry| match slot.stuck {
            Some((last, times)) if last == entry => (entry, times + 1),
            _ => (entry, 1),
        });
        let reason = match slot.stuck {
            Some((entry, times)) if times > 1 => {
                format!("entry {entry} of its log crashed it {times} times in a row: {}", crash.reason)
            }
            _ => crash.reason.clone(),
        };
        let stuck = slot.stuck.is_some_and(|(_, times)| times >= limits::CRASHES_MAX);
        let quarantine = stuck || slot.crashes.len() >= limits::CRASHES_MAX;
        slot.opening = !quarantine;
        let verdict = if quarantine {
            slot.health = ReplicaHealth::Quarantined(reason);
            Verdict::Quarantine
        } else {
            slot.health = ReplicaHealth::Restarting(reason);
            let doublings = slot.crashes.len().saturating_sub(1) as u32;
            Verdict::Restart(Duration::from_millis(limits::RESTART_BACKOFF_MS << doublings))
        };
        Some((slot.record.shard, verdict))
    }
}

impl Replicas {
    /// A replica that was stopped ([`Replicas::begin_install`]) goes on, with these members in its record, or as it was;
    /// its record, from which it is to be opened. `None` if it was removed meanwhile.
    pub fn end_recovery(
        &mut self,
        replica: ReplicaId,
        membership: Option<RecordedMembership>,
    ) -> Option<ReplicaRecord> {
        let record = self.end_install(replica, None)?;
        let slot = self.slots.get_mut(&replica)?;
        if let Some(RecordedMembership { index: members_at, epoch, members }) = membership {
            slot.record = ReplicaRecord { epoch, members, members_at, ..record };
        }
        Some(slot.record.clone())
    }

    /// Whether a replica may take a snapshot: the generation of its state, or what to answer.
    pub fn judge(&self, offer: &SnapshotOffer) -> Result<u32, SnapshotAnswer> {
        let replica = offer.to;
        let Some(slot) = self.slots.get(&replica) else {
            return Err(match self.tombstones.contains(&replica) {
                true => SnapshotAnswer::Refused(format!("replica {replica} was removed from this node")),
                // Created by an order of the metadata shard alone, which may be on its way.
                false => busy(),
            });
        };
        let record = &slot.record;
        if record.shard != offer.shard {
            return Err(SnapshotAnswer::Refused(format!(
                "replica {replica} is of shard {}, not of {}",
                record.shard, offer.shard
            )));
        }
        // The record of a replica may be ahead of all states that were ever flushed, wherever: a change of members is
        // recorded before it is in force. Whoever has lost its state takes one from before the change, and goes on from
        // there by its log. From before an operator gave the others up it takes none.
        let is_older = match slot.lost {
            None => offer.epoch.conf < record.epoch.conf,
            Some(_) => offer.epoch.generation() < record.epoch.generation(),
        };
        if offer.epoch.range < record.epoch.range || is_older {
            return Err(SnapshotAnswer::Refused(format!(
                "replica {replica} knows of {:?}, the snapshot is of {:?}",
                record.epoch, offer.epoch
            )));
        }
        match &slot.health {
            _ if slot.opening || slot.installing => Err(busy()),
            ReplicaHealth::Quarantined(reason) => {
                Err(SnapshotAnswer::Refused(format!("replica {replica} crashed too often: {reason}")))
            }
            _ => Ok(record.generation),
        }
    }

    /// Whether a replica is known to have no state, from its last start that could tell.
    pub fn lacks_state(&self, replica: ReplicaId) -> bool {
        self.slots.get(&replica).is_some_and(|slot| slot.lost.is_some())
    }

    /// A replica is to be stopped, for instance to be switched to a snapshot: its shard and the start of it that ends.
    /// From here on its end is no crash. Inside an error: what to answer.
    pub fn begin_install(&mut self, replica: ReplicaId) -> Result<(ShardId, Incarnation), SnapshotAnswer> {
        let slot = self.slots.get_mut(&replica).ok_or_else(busy)?;
        if slot.opening || slot.installing {
            return Err(busy());
        }
        slot.installing = true;
        slot.health = ReplicaHealth::Installing;
        Ok((slot.record.shard, slot.incarnation))
    }

    /// It is switched, if `installed` says to what, or goes on as it was; its record, from which it is to
    /// be opened. `None` if it was removed meanwhile.
    pub fn end_install(&mut self, replica: ReplicaId, installed: Option<Install>) -> Option<ReplicaRecord> {
        let slot = self.slots.get_mut(&replica)?;
        slot.installing = false;
        slot.opening = true;
        slot.health = ReplicaHealth::Recovering;
        if let Some(Install { generation, position, epoch, members, .. }) = installed {
            let members_at = position.index;
            slot.record = ReplicaRecord { generation, epoch, members, members_at, ..slot.record.clone() };
        }
        Some(slot.record.clone())
    }
}

fn busy() -> SnapshotAnswer {
    SnapshotAnswer::Busy { retry_after_ms: limits::SNAPSHOT_BUSY_MS }
}

/// Whether the map's record of a shard is from after the replica was ordered.
///
/// If the metadata shard has gone on since with one replica alone, the order itself may be lost, so that the record is
/// older than it for all that its version is later. Then only the shard's own word counts: members of a later conf
/// version than the replica has come to. It was ordered for the conf version that the map had, and whatever the
/// shard has said since it became a member names it, until it is none any more.
fn is_newer(shard: &ShardRecord, record: &ReplicaRecord) -> bool {
    if generation_of(shard.changed_at) > generation_of(record.ordered_at) {
        return shard.epoch.conf > record.epoch.conf;
    }
    shard.changed_at > record.ordered_at
}

/// The catalogue entry of a replica that `shard` orders.
///
/// One of a group's first members knows all of them, and begins where the group does. Any other is a
/// newcomer, also if it is a member by now, and also if it was one of the first and its group has gone on
/// without it: it knows nobody, not even itself, until it has a snapshot. It is of no conf version, so it
/// takes the snapshot of any.
pub fn record_of(shard: &ShardRecord, replica: ReplicaId) -> ReplicaRecord {
    let machine = if shard.id == METADATA_SHARD { MachineKind::Metadata } else { MachineKind::Kv };
    let first = shard.epoch.conf == FIRST_CONF && shard.node_of(replica).is_some();
    let (epoch, members) = match first {
        true => (shard.epoch, shard.members.clone()),
        false => (Epoch { conf: 0, ..shard.epoch }, Vec::new()),
    };
    ReplicaRecord {
        replica,
        shard: shard.id,
        database: shard.database,
        machine,
        phase: ReplicaPhase::Active,
        range: shard.range,
        epoch,
        members,
        members_at: 0,
        generation: 1,
        ordered_at: shard.changed_at,
    }
}

#[cfg(test)]
#[path = "replicas_tests.rs"]
mod tests;
