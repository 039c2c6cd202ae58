//! What the supervisor knows of its replicas, and what it decides about them: plain state, no actors.
//! Time is passed in.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use super::handle::ReplicaHealth;
use crate::codec::snapshot::{SnapshotAnswer, SnapshotOffer};
use crate::ids::{Incarnation, Index, METADATA_SHARD, NodeId, ReplicaId, ShardId};
use crate::limits;
use crate::machine::MachineKind;
use crate::placement::map::{ClusterMap, ShardRecord};
use crate::storage::log::{Install, ReplicaPhase, ReplicaRecord};

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
        members_at: 0,
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
            moving: None,
            target: None,
            previous: None,
            changed_at: 3,
        };
        ClusterMap { shards: [(shard.id, shard)].into(), ..ClusterMap::default() }
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
