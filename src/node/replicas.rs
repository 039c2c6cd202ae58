//! What the supervisor knows of its replicas, and what it decides about them: plain state, no actors.
//! Time is passed in.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use super::handle::ReplicaHealth;
use crate::codec::snapshot::{SnapshotAnswer, SnapshotOffer};
use crate::ids::{Epoch, Incarnation, Index, METADATA_SHARD, NodeId, ReplicaId, ShardId};
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
    /// It is stopped for a while, to be switched to a snapshot.
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

/// The conf version of a group whose members were never changed.
const FIRST_CONF: u64 = 1;

/// The replicas of a node, tombstones included.
#[derive(Default)]
pub struct Replicas {
    slots: BTreeMap<ReplicaId, Slot>,
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
        self.slots.insert(slot.record.replica, slot);
    }

    /// All living replicas.
    pub fn iter(&self) -> impl Iterator<Item = &Slot> {
        self.slots.values()
    }

    /// Takes those that were removed before the node started, and whose state may still be on disk.
    pub fn take_remains(&mut self) -> Vec<ReplicaId> {
        std::mem::take(&mut self.remains)
    }

    /// One of the living.
    pub fn get_mut(&mut self, replica: ReplicaId) -> Option<&mut Slot> {
        self.slots.get_mut(&replica)
    }

    /// What `map` asks of `node` and is not done yet. A replica that was started once, a tombstone
    /// too, is never created again: its vote and its log would begin anew.
    ///
    /// A replica goes only if a record of its own shard says so that is newer than the one that ordered it.
    /// An old map doesn't name it yet, and what a node holds must not depend on whether it has read the
    /// newest: what is removed never comes back.
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
                shard.dropped || !ordered && is_newer(shard, record)
            })
        };
        orders.remove.extend(self.slots.values().filter(goes).map(|slot| slot.record.replica));
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
        self.slots.values().filter_map(due).collect()
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

    /// The attempt to start `incarnation` of `replica` has come to an end: it runs, and why its state is
    /// lost, if it is; or why it can't.
    pub fn started(
        &mut self,
        replica: ReplicaId,
        incarnation: Incarnation,
        result: Result<Option<String>, String>,
    ) -> Started {
        let current = |slot: &&mut Slot| slot.incarnation == incarnation && slot.ended < incarnation;
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
    /// A replica that was stopped ([`Replicas::begin_install`]) goes on alone, or as it was; its record, from which it
    /// is to be opened. `None` if it was removed meanwhile.
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
        if offer.epoch.range < record.epoch.range || offer.epoch.conf < record.epoch.conf {
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

    /// A replica is to be stopped and switched to a snapshot: its shard and the start of it that ends.
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
fn is_newer(shard: &ShardRecord, record: &ReplicaRecord) -> bool {
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
mod tests {
    use super::*;
    use crate::ids::DatabaseId;
    use crate::placement::map::{Member, MemberRole, MoveCause, ShardMove};
    use crate::placement::ring::RingRange;

    fn map(dropped: bool) -> ClusterMap {
        let shard = ShardRecord {
            id: ShardId(4),
            database: DatabaseId(1),
            range: RingRange::ALL,
            epoch: Epoch { range: 1, conf: 1 },
            members: vec![Member { replica: ReplicaId(9), node: NodeId(2), role: MemberRole::Voter }],
            dropped,
            moving: None,
            target: None,
            previous: None,
            changed_at: 3,
        };
        ClusterMap { shards: [(shard.id, shard)].into(), ..ClusterMap::default() }
    }

    /// The same after `change`, by a record of version `changed_at`.
    fn changed(changed_at: u64, change: impl FnOnce(&mut ShardRecord)) -> ClusterMap {
        let mut map = map(false);
        let shard = map.shards.get_mut(&ShardId(4)).unwrap();
        shard.changed_at = changed_at;
        change(shard);
        map
    }

    fn member(replica: u64, node: u64, role: MemberRole) -> Member {
        Member { replica: ReplicaId(replica), node: NodeId(node), role }
    }

    fn moving(adds: Vec<Member>) -> Option<ShardMove> {
        Some(ShardMove { id: 4, adds, removes: Vec::new(), cancelling: false, cause: MoveCause::Repair })
    }

    #[test]
    fn only_a_first_member_knows_the_group_from_the_start() {
        use MemberRole::{Learner, Voter};
        let replicas = Replicas::default();
        let created = |map: ClusterMap, node| {
            let mut create = replicas.orders(&map, NodeId(node)).create;
            assert_eq!(create.len(), 1);
            create.pop().unwrap()
        };
        let first = created(map(false), 2);
        assert_eq!((first.members.len(), first.epoch.conf, first.ordered_at), (1, 1, 3));
        // By a move; and later, when the group has taken it in already before this node heard of it.
        let coming = changed(4, |shard| shard.moving = moving(vec![member(12, 3, Learner)]));
        let there = changed(5, |shard| {
            shard.epoch.conf = 2;
            shard.members.push(member(12, 3, Learner));
            shard.moving = moving(vec![member(12, 3, Learner)]);
        });
        let moved = changed(6, |shard| {
            shard.epoch.conf = 4;
            shard.members = vec![member(12, 3, Voter)];
        });
        for map in [coming, there, moved] {
            let newcomer = created(map, 3);
            assert_eq!((newcomer.replica, newcomer.members.len()), (ReplicaId(12), 0));
            assert_eq!(newcomer.epoch, Epoch { range: 1, conf: 0 });
        }
        // A first member whose node was away while the group went on.
        let late = created(changed(5, |shard| shard.epoch.conf = 2), 2);
        assert!(late.members.is_empty());
    }

    #[test]
    fn a_replica_goes_by_a_newer_record_of_its_own_shard_alone() {
        use MemberRole::{Learner, Voter};
        let mut replicas = Replicas::default();
        let coming = changed(5, |shard| shard.moving = moving(vec![member(12, 3, Learner)]));
        replicas.created(&replicas.orders(&coming, NodeId(3)).create);
        let removed = |map: &ClusterMap| replicas.orders(map, NodeId(3)).remove;
        assert_eq!(removed(&coming), []);
        // Maps from before the move, as a node may have cached one, or hear of it from another that lags.
        assert_eq!(removed(&map(false)), []);
        assert_eq!(removed(&changed(4, |_| ())), []);
        assert_eq!(removed(&changed(5, |_| ())), []);
        assert_eq!(removed(&ClusterMap::default()), [], "it says nothing of the shard");
        // It is a member, the move is over: it stays.
        assert_eq!(removed(&changed(6, |shard| shard.members.push(member(12, 3, Voter)))), []);
        // Rolled back, without any change of the shard's conf version that the map has seen.
        assert_eq!(removed(&changed(6, |_| ())), [ReplicaId(12)]);
        // On this node there is another one by now.
        let again = changed(7, |shard| shard.moving = moving(vec![member(13, 3, Learner)]));
        assert_eq!(removed(&again), [ReplicaId(12)]);
        assert_eq!(replicas.orders(&again, NodeId(3)).create[0].replica, ReplicaId(13));
        let dropped = changed(4, |shard| shard.dropped = true);
        assert_eq!(removed(&dropped), [ReplicaId(12)]);
    }

    #[test]
    fn only_who_is_named_alone_in_a_later_generation_goes_on_alone() {
        use MemberRole::{Learner, Voter};
        let mut replicas = Replicas::default();
        let three = |shard: &mut ShardRecord| {
            shard.members = (2..=4).map(|node| member(7 + node, node, Voter)).collect();
        };
        replicas.created(&replicas.orders(&changed(3, three), NodeId(2)).create);
        let alone = |conf, members: &[Member]| {
            let members = members.to_vec();
            let map = changed(9, |shard| (shard.epoch.conf, shard.members) = (conf, members));
            replicas.recoveries(&map, NodeId(2)).into_iter().map(|(replica, _)| replica).collect::<Vec<_>>()
        };
        let (own, other) = (member(9, 2, Voter), member(10, 3, Voter));
        // Its group has shrunk to it by itself; it will learn that from its log.
        assert_eq!(alone(7, &[own]), []);
        assert_eq!(alone(1 << 32, &[own]), [ReplicaId(9)]);
        assert_eq!(alone((1 << 32) + 5, &[own, member(14, 5, Learner)]), [], "not alone any more");
        assert_eq!(alone(1 << 32, &[other]), []);
        assert_eq!(alone(1 << 32, &[member(9, 2, Learner)]), []);
        // Once, and again if another operator decides it again.
        let epoch = Epoch { range: 1, conf: 1 << 32 };
        let membership = RecordedMembership { index: 20, epoch, members: vec![own] };
        let stopped = |replicas: &mut Replicas| {
            replicas.get_mut(ReplicaId(9)).unwrap().opening = false;
            replicas.begin_install(ReplicaId(9)).unwrap();
        };
        stopped(&mut replicas);
        let as_it_was = replicas.end_recovery(ReplicaId(9), None).unwrap();
        assert_eq!(as_it_was.members.len(), 3);
        stopped(&mut replicas);
        let record = replicas.end_recovery(ReplicaId(9), Some(membership)).unwrap();
        assert_eq!((record.epoch, record.members_at, record.members), (epoch, 20, vec![own]));
        let due = |conf| {
            let map = changed(9, |shard| (shard.epoch.conf, shard.members) = (conf, vec![own]));
            replicas.recoveries(&map, NodeId(2)).len()
        };
        assert_eq!((due(1 << 32), due((1 << 32) + 4), due(2 << 32)), (0, 0, 1));
        // A newcomer has no log to go on with.
        let mut replicas = Replicas::default();
        let newcomer = changed(9, |shard| (shard.epoch.conf, shard.members) = (1 << 32, vec![own]));
        replicas.created(&replicas.orders(&newcomer, NodeId(2)).create);
        assert_eq!(replicas.recoveries(&newcomer, NodeId(2)), []);
    }

    fn boom(at: Instant) -> Crash {
        Crash { reason: "boom".into(), applying: None, at }
    }

    #[test]
    fn a_started_id_is_never_created_again() {
        let mut replicas = Replicas::default();
        assert!(replicas.orders(&map(false), NodeId(1)).create.is_empty(), "another node's");
        let orders = replicas.orders(&map(false), NodeId(2));
        assert_eq!(orders.create.len(), 1);
        replicas.created(&orders.create);
        assert!(replicas.orders(&map(false), NodeId(2)).create.is_empty());
        assert_eq!(replicas.orders(&map(true), NodeId(2)).remove, vec![ReplicaId(9)]);
        replicas.removed(ReplicaId(9));
        assert!(replicas.orders(&map(false), NodeId(2)).create.is_empty(), "a tombstone stays one");
    }

    #[test]
    fn only_the_state_of_tombstones_that_may_have_one_is_looked_for() {
        let phases = [ReplicaPhase::Active, ReplicaPhase::Tombstone, ReplicaPhase::Destroyed];
        let records = (1..).zip(phases).map(|(number, phase)| ReplicaRecord {
            replica: ReplicaId(number),
            phase,
            ..record_of(&map(false).shards[&ShardId(4)], ReplicaId(number))
        });
        let mut replicas = Replicas::new(records.collect());
        assert_eq!(replicas.take_remains(), [ReplicaId(2)]);
        assert_eq!(replicas.take_remains(), []);
        assert_eq!(replicas.iter().map(|slot| slot.record.replica).collect::<Vec<_>>(), [ReplicaId(1)]);
    }

    #[test]
    fn a_crash_that_is_known_before_the_start_is_not_forgotten() {
        let mut replicas = Replicas::default();
        replicas.created(&replicas.orders(&map(false), NodeId(2)).create);
        let now = Instant::now();
        for incarnation in 1..=limits::CRASHES_MAX as Incarnation {
            replicas.get_mut(ReplicaId(9)).unwrap().incarnation = incarnation;
            assert!(replicas.crashed(ReplicaId(9), incarnation, &boom(now)).is_some());
            assert_eq!(replicas.started(ReplicaId(9), incarnation, Ok(None)), Started::Old);
        }
        let health = replicas.get_mut(ReplicaId(9)).unwrap().health.clone();
        assert_eq!(health, ReplicaHealth::Quarantined("boom".into()));
        assert_eq!(replicas.started(ReplicaId(8), 1, Ok(None)), Started::Old, "removed");
        assert!(replicas.closed().expect("one is down").contains("shard 4 is quarantined: boom"));
        replicas.get_mut(ReplicaId(9)).unwrap().incarnation += 1;
        let next = limits::CRASHES_MAX as Incarnation + 1;
        assert_eq!(replicas.started(ReplicaId(9), next, Ok(None)), Started::Serving { failures: 0 });
        assert_eq!(replicas.get_mut(ReplicaId(9)).unwrap().health, ReplicaHealth::Serving);
        assert_eq!(replicas.closed(), None);
    }

    #[test]
    fn a_replica_that_cant_be_opened_is_tried_again_ever_more_slowly() {
        let mut replicas = Replicas::default();
        replicas.created(&replicas.orders(&map(false), NodeId(2)).create);
        assert_eq!(replicas.closed(), None, "it was not tried yet");
        let mut last = Duration::ZERO;
        for incarnation in 1..20 {
            replicas.get_mut(ReplicaId(9)).unwrap().incarnation = incarnation;
            let reason = if incarnation < 10 { "no descriptors" } else { "no memory" };
            let Started::Failed { again, news } =
                replicas.started(ReplicaId(9), incarnation, Err(reason.into()))
            else {
                panic!("it failed");
            };
            assert!(again > last || again == Duration::from_millis(limits::REOPEN_MS_MAX), "{again:?}");
            assert_eq!(news, incarnation == 1 || incarnation == 10);
            last = again;
        }
        assert_eq!(last, Duration::from_millis(limits::REOPEN_MS_MAX));
        assert_eq!(
            replicas.closed().as_deref(),
            Some("1 of 1 replicas can't serve; that of shard 4 is failed: no memory")
        );
        replicas.get_mut(ReplicaId(9)).unwrap().incarnation = 20;
        assert_eq!(replicas.started(ReplicaId(9), 20, Ok(None)), Started::Serving { failures: 19 });
        replicas.get_mut(ReplicaId(9)).unwrap().incarnation = 21;
        let Started::Failed { again, .. } = replicas.started(ReplicaId(9), 21, Err("no".into())) else {
            panic!("it failed");
        };
        assert_eq!(again, Duration::from_millis(limits::RESTART_BACKOFF_MS), "it begins anew");
    }

    fn offer() -> SnapshotOffer {
        SnapshotOffer {
            stream: crate::ids::RandomId([1; 16]),
            shard: ShardId(4),
            from: ReplicaId(8),
            to: ReplicaId(9),
            epoch: Epoch { range: 1, conf: 1 },
            position: crate::ids::Position { index: 80, term: 6 },
            leader_term: 6,
            bytes: 100,
        }
    }

    fn refused(verdict: Result<u32, SnapshotAnswer>) -> bool {
        matches!(verdict, Err(SnapshotAnswer::Refused(_)))
    }

    #[test]
    fn snapshots_are_for_replicas_of_this_node_that_are_not_just_being_opened() {
        let mut replicas = Replicas::default();
        assert_eq!(replicas.judge(&offer()), Err(busy()), "not created yet");
        replicas.created(&replicas.orders(&map(false), NodeId(2)).create);
        assert_eq!(replicas.judge(&offer()), Err(busy()), "being opened");
        replicas.get_mut(ReplicaId(9)).unwrap().incarnation = 1;
        assert_eq!(replicas.started(ReplicaId(9), 1, Ok(None)), Started::Serving { failures: 0 });
        assert_eq!(replicas.judge(&offer()), Ok(1));
        assert!(refused(replicas.judge(&SnapshotOffer { shard: ShardId(5), ..offer() })));
        assert!(refused(replicas.judge(&SnapshotOffer { epoch: Epoch { range: 0, conf: 1 }, ..offer() })));
        assert!(refused(replicas.judge(&SnapshotOffer { epoch: Epoch { range: 1, conf: 0 }, ..offer() })));
        let now = Instant::now();
        assert!(replicas.crashed(ReplicaId(9), 1, &boom(now)).is_some());
        assert_eq!(replicas.judge(&offer()), Err(busy()), "about to be opened");
        assert_eq!(replicas.begin_install(ReplicaId(9)), Err(busy()));
        for _ in 1..limits::CRASHES_MAX {
            replicas.crashed(ReplicaId(9), 1, &boom(now));
        }
        assert!(refused(replicas.judge(&offer())), "quarantined");
        replicas.removed(ReplicaId(9));
        assert!(refused(replicas.judge(&offer())), "removed");
    }

    #[test]
    fn an_installation_ends_one_start_and_the_record_names_the_next_generation() {
        let mut replicas = Replicas::default();
        replicas.created(&replicas.orders(&map(false), NodeId(2)).create);
        replicas.get_mut(ReplicaId(9)).unwrap().incarnation = 1;
        assert_eq!(replicas.started(ReplicaId(9), 1, Ok(None)), Started::Serving { failures: 0 });
        assert_eq!(replicas.begin_install(ReplicaId(9)), Ok((ShardId(4), 1)));
        assert_eq!(replicas.begin_install(ReplicaId(9)), Err(busy()), "one at a time");
        assert_eq!(replicas.judge(&offer()), Err(busy()));
        assert_eq!(replicas.crashed(ReplicaId(9), 1, &boom(Instant::now())), None, "its end is no crash");
        let install = Install {
            generation: 2,
            position: offer().position,
            leader_term: 6,
            epoch: Epoch { range: 1, conf: 3 },
            members: Vec::new(),
            state_lost: false,
        };
        let record = replicas.end_install(ReplicaId(9), Some(install)).expect("a replica");
        assert_eq!((record.generation, record.epoch.conf), (2, 3));
        assert_eq!(replicas.judge(&offer()), Err(SnapshotAnswer::Refused(
            "replica 9 knows of Epoch { range: 1, conf: 3 }, the snapshot is of Epoch { range: 1, conf: 1 }".into()
        )));
        replicas.get_mut(ReplicaId(9)).unwrap().incarnation = 2;
        assert_eq!(replicas.started(ReplicaId(9), 2, Ok(None)), Started::Serving { failures: 0 });
        // One that comes to nothing leaves the record as it was.
        assert_eq!(replicas.begin_install(ReplicaId(9)), Ok((ShardId(4), 2)));
        assert_eq!(replicas.end_install(ReplicaId(9), None), Some(record));
        replicas.removed(ReplicaId(9));
        assert_eq!(replicas.end_install(ReplicaId(9), None), None);
    }

    #[test]
    fn a_replica_without_its_state_runs_and_is_told_of_until_it_has_another() {
        let mut replicas = Replicas::default();
        replicas.created(&replicas.orders(&map(false), NodeId(2)).create);
        let start = |replicas: &mut Replicas, incarnation, lost: Option<&str>| {
            replicas.get_mut(ReplicaId(9)).unwrap().incarnation = incarnation;
            replicas.started(ReplicaId(9), incarnation, Ok(lost.map(str::to_owned)))
        };
        let told = "1 of 1 replicas can't serve; that of shard 4 is refetching: gone";
        assert_eq!(start(&mut replicas, 1, Some("gone")), Started::WithoutState { news: true });
        let health = replicas.get_mut(ReplicaId(9)).unwrap().health.clone();
        assert_eq!(health, ReplicaHealth::Refetching("gone".into()));
        assert_eq!(replicas.closed().as_deref(), Some(told));
        assert_eq!(replicas.judge(&offer()), Ok(1), "it takes snapshots");
        assert_eq!(replicas.begin_install(ReplicaId(9)), Ok((ShardId(4), 1)));
        assert_eq!(replicas.closed().as_deref(), Some(told), "not yet");
        assert!(replicas.end_install(ReplicaId(9), None).is_some());
        assert_eq!(replicas.closed().as_deref(), Some(told), "nor when it is opened");
        assert_eq!(start(&mut replicas, 2, Some("gone")), Started::WithoutState { news: false });
        assert_eq!(start(&mut replicas, 3, None), Started::Serving { failures: 0 });
        assert_eq!(replicas.closed(), None);
    }

    #[test]
    fn an_entry_that_crashes_each_start_is_found_however_long_they_take_to_reach_it() {
        let mut replicas = Replicas::default();
        replicas.created(&replicas.orders(&map(false), NodeId(2)).create);
        let mut now = Instant::now();
        let mut crash = |replicas: &mut Replicas, applying| {
            now += Duration::from_millis(limits::CRASH_WINDOW_MS + 1);
            let crash = Crash { applying, ..boom(now) };
            replicas.crashed(ReplicaId(9), 0, &crash).map(|(_, verdict)| verdict)
        };
        let restart = Some(Verdict::Restart(Duration::from_millis(limits::RESTART_BACKOFF_MS)));
        // Others than always the same one mean nothing, nor does what is no entry's fault.
        for entry in 1..20 {
            assert_eq!(crash(&mut replicas, Some(entry)), restart);
            assert_eq!(crash(&mut replicas, None), restart);
        }
        for _ in 1..limits::CRASHES_MAX {
            assert_eq!(crash(&mut replicas, Some(77)), restart);
        }
        assert_eq!(crash(&mut replicas, Some(77)), Some(Verdict::Quarantine));
        let why = replicas.closed().expect("it is closed");
        assert!(why.contains("entry 77 of its log crashed it 5 times in a row: boom"), "{why}");
    }

    #[test]
    fn crashes_back_off_then_quarantine_and_old_news_is_ignored() {
        let mut replicas = Replicas::default();
        replicas.created(&replicas.orders(&map(false), NodeId(2)).create);
        let now = Instant::now();
        let crash =
            |replicas: &mut Replicas, at| replicas.crashed(ReplicaId(9), 0, &boom(at)).map(|(_, v)| v);
        let first = crash(&mut replicas, now);
        let second = crash(&mut replicas, now);
        assert_eq!(first, Some(Verdict::Restart(Duration::from_millis(limits::RESTART_BACKOFF_MS))));
        assert_eq!(second, Some(Verdict::Restart(Duration::from_millis(2 * limits::RESTART_BACKOFF_MS))));
        assert_eq!(replicas.crashed(ReplicaId(9), 7, &boom(now)), None);
        for _ in 2..limits::CRASHES_MAX - 1 {
            crash(&mut replicas, now);
        }
        let later = now + Duration::from_millis(limits::CRASH_WINDOW_MS + 1);
        assert!(matches!(crash(&mut replicas, later), Some(Verdict::Restart(_))), "old crashes don't count");
        for _ in 1..limits::CRASHES_MAX - 1 {
            crash(&mut replicas, later);
        }
        assert_eq!(crash(&mut replicas, later), Some(Verdict::Quarantine));
    }
}
