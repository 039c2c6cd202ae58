//! What the supervisor knows of its replicas, and what it decides about them: plain state, no actors.
//! Time is passed in.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use super::handle::ReplicaHealth;
use crate::ids::{Incarnation, METADATA_SHARD, NodeId, ReplicaId, ShardId};
use crate::limits;
use crate::machine::MachineKind;
use crate::placement::map::{ClusterMap, ShardRecord};
use crate::storage::log::{ReplicaPhase, ReplicaRecord};

/// One replica of this node.
#[derive(Debug)]
pub struct Slot {
    /// Its entry in the catalogue.
    pub record: ReplicaRecord,
    /// The current, or last, start of it; 0 before the first.
    pub incarnation: Incarnation,
    /// How it is.
    pub health: ReplicaHealth,
    /// Restarts since the node started.
    pub restarts: u32,
    crashes: VecDeque<Instant>,
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

/// What a cluster map asks of a node.
#[derive(Debug, Default)]
pub struct Orders {
    /// Replicas to create: their shard's record names this node.
    pub create: Vec<ReplicaRecord>,
    /// Replicas to remove: their shard was dropped.
    pub remove: Vec<ReplicaId>,
}

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
            restarts: 0,
            crashes: VecDeque::new(),
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
    pub fn orders(&self, map: &ClusterMap, node: NodeId) -> Orders {
        let mut orders = Orders::default();
        for shard in map.shards.values() {
            let Some(member) = shard.member_on(node) else {
                continue;
            };
            if shard.dropped {
                if self.slots.contains_key(&member.replica) {
                    orders.remove.push(member.replica);
                }
            } else if !self.slots.contains_key(&member.replica) && !self.tombstones.contains(&member.replica)
            {
                orders.create.push(record_of(shard, member.replica));
            }
        }
        orders
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

    /// The attempt to start `incarnation` of `replica` has come to an end: it serves, or why it can't.
    /// False if that is no news any more: the replica was removed, or this start of it has crashed,
    /// which may become known first.
    pub fn started(
        &mut self,
        replica: ReplicaId,
        incarnation: Incarnation,
        result: Result<(), String>,
    ) -> bool {
        let Some(slot) = self.slots.get_mut(&replica) else {
            return false;
        };
        let current = slot.incarnation == incarnation && slot.ended < incarnation;
        if current {
            slot.health = match result {
                Ok(()) => ReplicaHealth::Serving,
                Err(reason) => ReplicaHealth::Failed(reason),
            };
        }
        current
    }

    /// Incarnation `incarnation` of `replica` ended at `now` for `reason`. `None` if it isn't the
    /// current one: old news.
    pub fn crashed(
        &mut self,
        replica: ReplicaId,
        incarnation: Incarnation,
        reason: &str,
        now: Instant,
    ) -> Option<(ShardId, Verdict)> {
        let slot = self.slots.get_mut(&replica)?;
        if slot.incarnation != incarnation {
            return None;
        }
        slot.ended = incarnation;
        let window = Duration::from_millis(limits::CRASH_WINDOW_MS);
        slot.crashes.push_back(now);
        while slot.crashes.front().is_some_and(|&at| now.duration_since(at) > window) {
            slot.crashes.pop_front();
        }
        let verdict = if slot.crashes.len() >= limits::CRASHES_MAX {
            slot.health = ReplicaHealth::Quarantined(reason.to_owned());
            Verdict::Quarantine
        } else {
            slot.health = ReplicaHealth::Restarting(reason.to_owned());
            let doublings = slot.crashes.len().saturating_sub(1) as u32;
            Verdict::Restart(Duration::from_millis(limits::RESTART_BACKOFF_MS << doublings))
        };
        Some((slot.record.shard, verdict))
    }
}

/// The catalogue entry of a replica that `shard` orders.
pub fn record_of(shard: &ShardRecord, replica: ReplicaId) -> ReplicaRecord {
    let machine = if shard.id == METADATA_SHARD { MachineKind::Metadata } else { MachineKind::Kv };
    ReplicaRecord {
        replica,
        shard: shard.id,
        database: shard.database,
        machine,
        phase: ReplicaPhase::Active,
        range: shard.range,
        epoch: shard.epoch,
        members: shard.members.clone(),
        generation: 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{DatabaseId, Epoch};
    use crate::placement::map::{Member, MemberRole};
    use crate::placement::ring::RingRange;

    fn map(dropped: bool) -> ClusterMap {
        let shard = ShardRecord {
            id: ShardId(4),
            database: DatabaseId(1),
            range: RingRange::ALL,
            epoch: Epoch { range: 1, conf: 1 },
            members: vec![Member { replica: ReplicaId(9), node: NodeId(2), role: MemberRole::Voter }],
            dropped,
            changed_at: 3,
        };
        ClusterMap { shards: [(shard.id, shard)].into(), ..ClusterMap::default() }
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
            assert!(replicas.crashed(ReplicaId(9), incarnation, "boom", now).is_some());
            assert!(!replicas.started(ReplicaId(9), incarnation, Ok(())));
        }
        let health = replicas.get_mut(ReplicaId(9)).unwrap().health.clone();
        assert_eq!(health, ReplicaHealth::Quarantined("boom".into()));
        assert!(!replicas.started(ReplicaId(8), 1, Ok(())), "removed");
        replicas.get_mut(ReplicaId(9)).unwrap().incarnation += 1;
        let next = limits::CRASHES_MAX as Incarnation + 1;
        assert!(replicas.started(ReplicaId(9), next, Ok(())));
        assert_eq!(replicas.get_mut(ReplicaId(9)).unwrap().health, ReplicaHealth::Serving);
        assert!(replicas.started(ReplicaId(9), next, Err("no".into())));
        assert_eq!(replicas.get_mut(ReplicaId(9)).unwrap().health, ReplicaHealth::Failed("no".into()));
    }

    #[test]
    fn crashes_back_off_then_quarantine_and_old_news_is_ignored() {
        let mut replicas = Replicas::default();
        replicas.created(&replicas.orders(&map(false), NodeId(2)).create);
        let now = Instant::now();
        let crash =
            |replicas: &mut Replicas, at| replicas.crashed(ReplicaId(9), 0, "boom", at).map(|(_, v)| v);
        let first = crash(&mut replicas, now);
        let second = crash(&mut replicas, now);
        assert_eq!(first, Some(Verdict::Restart(Duration::from_millis(limits::RESTART_BACKOFF_MS))));
        assert_eq!(second, Some(Verdict::Restart(Duration::from_millis(2 * limits::RESTART_BACKOFF_MS))));
        assert_eq!(replicas.crashed(ReplicaId(9), 7, "boom", now), None);
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
