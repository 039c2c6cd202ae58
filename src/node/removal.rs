//! The end of replicas that aren't to be on this node any more, and of a node that its cluster has removed.
//!
//! A removed node may have been away when that was decided, and come back years later from its old disk. It
//! disturbs nobody: the others refuse its connections, with a word that programs understand. It then asks for
//! the cluster map; only that is believed, and only if it says so of this very directory. What the node
//! holds is replaced elsewhere by then, so it buries its replicas: none of them may ever vote again. Then it
//! ends, and says what to do.

use std::collections::HashSet;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use actix::prelude::*;
use futures_util::future::join_all;
use raft::eraftpb::EntryType;
use tokio::sync::{oneshot, watch};

use super::handle::NodeHandle;
use super::hub::Forget;
use super::membership::ask_for_map_at;
use super::messages::{MapNews, StopReplica};
use super::patience::Patience;
use super::replica::ReplicaAddr;
use super::replicas::is_ahead;
use super::router::Route;
use super::shared::Shared;
use super::supervisor::Supervisor;
use super::{NodeError, map_cache};
use crate::codec::hello::RefusalKind;
use crate::codec::membership;
use crate::failpoints::failpoint;
use crate::ids::{ClusterId, Incarnation, NodeId, ReplicaId, ShardId, StoreId, generation_of};
use crate::limits;
use crate::placement::map::{ClusterMap, Member, Standing};
use crate::storage::StorageError;
use crate::storage::log::{LogStore, RecordedMembership, ReplicaPhase, ReplicaRecord};
use crate::transport::network::OnRefused;

/// Whether `map` says that the node with this directory was removed.
pub fn is_removed(map: &ClusterMap, node: NodeId, store_id: StoreId) -> bool {
    map.nodes.get(&node).is_some_and(|own| own.standing == Standing::Removed && own.store_id == store_id)
}

/// What a person is told of a removed node.
pub fn farewell(cluster: ClusterId, node: NodeId) -> String {
    format!(
        "node {node} was removed from cluster {cluster}, for good, and its replicas here are given up. To have this \
         machine join as a new node, start it with `--rejoin`, or delete its data directory first; else take \
         the service out of operation"
    )
}

/// What has become of a replica that is not to be here any more.
enum Burial {
    /// There is a tombstone, durably.
    Done,
    /// Its own record is ahead of the one that it was to go for: its group counts on it.
    Kept(RecordedMembership),
    /// The log couldn't be written, or not be read, so that nobody knows whether the group counts on it. There is no
    /// tombstone, and its files stay. It doesn't run any more, so it promises nothing to anybody, and what it has promised
    /// stays on disk; the node's next start tries anew, and each after that, for as long as its log is damaged. The node's log
    /// tells each time, as an error.
    Failed,
}

/// Makes a replica a tombstone, unless its group counts on it ([`counts`]); nothing of it may be queued any more. Without
/// a conf version it goes whatever it says. One whose log would have to be read for that, and can't be, is left as it is:
/// who may be counted on must not be forgotten.
fn bury(log: &dyn LogStore, replica: ReplicaId, conf: Option<u64>) -> Result<Burial, StorageError> {
    if let Some(conf) = conf {
        let record = log.catalogue()?.into_iter().find(|record| record.replica == replica);
        if let Some(record) = record.filter(|record| record.phase == ReplicaPhase::Active)
            && counts(log, &record, conf)?
        {
            return Ok(Burial::Kept(record.membership()));
        }
    }
    failpoint!(LogRemoveBefore, replica);
    let removed = log.remove(&[replica]);
    failpoint!(LogRemoveAfter, replica);
    removed.map(|()| Burial::Done)
}

/// Whether a replica may count in its group's quorums by a conf version that comes after `conf`: its record says so
/// ([`is_ahead`]), or its log does, in an entry that isn't in force here yet. A newcomer acknowledges the entry that makes it
/// a voter before it applies it, and its record doesn't name it until then; the leader may have it in force by
/// then. The record is all that is looked at where it names the replica: then so does every map from which that was
/// learnt, or a later one that knows better.
fn counts(log: &dyn LogStore, record: &ReplicaRecord, conf: u64) -> Result<bool, StorageError> {
    let replica = record.replica;
    let names = |members: &[Member]| members.iter().any(|member| member.replica == replica);
    if names(&record.members) {
        return Ok(is_ahead(replica, record.epoch, &record.members, conf));
    }
    let state = log.load(replica)?;
    let mut next = state.membership.index.max(state.truncated.index) + 1;
    while next <= state.last {
        let entries = log.entries(replica, next, state.last + 1, limits::APPEND_TARGET_BYTES)?;
        let Some(last) = entries.last() else {
            break;
        };
        next = last.index + 1;
        let changes = entries.iter().filter(|entry| entry.get_entry_type() == EntryType::EntryConfChangeV2);
        for change in changes {
            // What can't be read can't be ruled out.
            let counts = membership::decode(&change.context)
                .map_or(true, |change| change.conf + 1 > conf && names(&change.members));
            if counts {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// Stops a start of a replica, and buries it, if that is still right when nothing of it is under way any more.
async fn end(
    shared: Arc<Shared>,
    replica: ReplicaId,
    incarnation: Incarnation,
    addr: Option<ReplicaAddr>,
    conf: Option<u64>,
) -> Burial {
    if let Some(addr) = addr
        && let Err(error) = addr.send(StopReplica).await
    {
        tracing::debug!(%error, "the replica had ended already");
    }
    shared.fence(replica, incarnation).await;
    // Who was asked to read its state has to be done before that goes.
    if shared.reader.barrier().await.is_err() {
        tracing::debug!("the read thread has ended");
    }
    let then = shared.clone();
    let (done, buried) = oneshot::channel();
    shared.log_writer.run(Box::new(move |log| {
        let burial = bury(log, replica, conf).unwrap_or_else(|error| {
            tracing::error!(
                %replica, %error,
                "a replica that isn't to be here can't be removed; it is stopped, and the node's next start tries again"
            );
            Burial::Failed
        });
        if matches!(burial, Burial::Done) {
            destroy(&then, vec![replica]);
        }
        if done.send(burial).is_err() {
            tracing::debug!(%replica, "nobody waits for a tombstone");
        }
    }));
    let burial = buried.await.unwrap_or(Burial::Failed);
    if !matches!(burial, Burial::Kept(_))
        && let Err(error) = tokio::task::spawn_blocking(move || shared.snapshots.forget(replica)).await
    {
        tracing::debug!(%error, "the node ended while it removed snapshots");
    }
    burial
}

impl Supervisor {
    /// Ends a replica for good that the map's record of its shard, of conf version `conf`, doesn't order any more,
    /// unless the replica's own record turns out to be ahead of that: then it goes on, and the next map decides anew.
    /// False: not now, it is being opened, or is stopped for something else.
    pub(super) fn remove_unordered(
        &mut self,
        replica: ReplicaId,
        conf: u64,
        ctx: &mut Context<Self>,
    ) -> bool {
        let Ok((shard, incarnation)) = self.replicas.begin_install(replica) else {
            return false;
        };
        tracing::info!(%shard, %replica, conf, "removing a replica that isn't to be here any more");
        let addr = self.detach(shard, replica, incarnation);
        let end = end(self.shared.clone(), replica, incarnation, addr, Some(conf));
        ctx.spawn(fut::wrap_future(end).map(move |burial, act: &mut Self, ctx| match burial {
            Burial::Kept(membership) => {
                tracing::warn!(%shard, %replica, ?membership, conf, "the replica stays: its group counts on it");
                // Removed meanwhile, with its shard or the node.
                if let Some(record) = act.replicas.end_recovery(replica, Some(membership)) {
                    act.open(vec![record], HashSet::new(), ctx);
                }
            }
            Burial::Done | Burial::Failed => {
                act.replicas.removed(replica);
                act.untried.remove(&replica);
                act.tell_readiness();
            }
        }));
        true
    }

    /// Nobody reaches a replica any more that is to be stopped; its address, if it runs.
    fn detach(
        &mut self,
        shard: ShardId,
        replica: ReplicaId,
        incarnation: Incarnation,
    ) -> Option<ReplicaAddr> {
        // The route may be that of the replica which is here in its place.
        let is_own = |route: &Route| route.replica == replica;
        self.shared.router.update(|routes| {
            routes.extract_if(|of, route| *of == shard && is_own(route)).for_each(drop);
        });
        let mut others = self.replicas.iter().filter(|slot| slot.record.replica != replica);
        if !others.any(|slot| slot.record.shard == shard) {
            self.led.remove(&shard);
        }
        self.shared.snapshots.outgoing.cancel(replica);
        self.hub(shard).do_send(Forget(replica, incarnation));
        self.resting.remove(&replica);
        self.addrs.remove(&replica)
    }

    /// Ends a replica for good, whatever its record says: its shard is dropped, or this node removed. The tombstone is
    /// durable before its data goes. What is returned does the work, and tells whether there is a tombstone.
    pub(super) fn remove(&mut self, replica: ReplicaId) -> impl Future<Output = bool> + use<> {
        let ended = self.replicas.get_mut(replica).map(|slot| (slot.record.shard, slot.incarnation));
        let ended = ended.map(|(shard, incarnation)| {
            tracing::info!(%shard, %replica, "removing a replica that isn't to be here any more");
            self.replicas.removed(replica);
            self.untried.remove(&replica);
            self.tell_readiness();
            let addr = self.detach(shard, replica, incarnation);
            end(self.shared.clone(), replica, incarnation, addr, None)
        });
        async move {
            match ended {
                Some(end) => matches!(end.await, Burial::Done),
                None => true,
            }
        }
    }

    /// Gives up all replicas, durably, then the node.
    pub(super) fn leave(&mut self, ctx: &mut Context<Self>) {
        if std::mem::replace(&mut self.leaving, true) {
            return;
        }
        let replicas: Vec<ReplicaId> = self.replicas.iter().map(|slot| slot.record.replica).collect();
        let (node, map) = (self.site.node, self.shared.router.map());
        tracing::warn!(%node, replicas = replicas.len(), "this node was removed from its cluster: giving up what it holds");
        self.shared.network.set_peers(&[]);
        let removals: Vec<_> = replicas.iter().map(|replica| self.remove(*replica)).collect();
        // What was told to be untried is gone: nobody is to wait for it.
        self.tell_readiness();
        let data_dir = self.site.data_dir.clone();
        let (shared, fatal) = (self.shared.clone(), self.fatal.clone());
        ctx.spawn(fut::wrap_future(async move {
            let buried = join_all(removals).await.into_iter().all(|buried| buried);
            // So that the next start knows before it does anything.
            let to_save = map.clone();
            let saved = tokio::task::spawn_blocking(move || {
                let dir = data_dir.lock().unwrap_or_else(PoisonError::into_inner);
                dir.save_map(&map_cache::encode(&to_save))
            });
            match saved.await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(%error, "saving the cluster map"),
                Err(error) => tracing::warn!(%error, "saving the cluster map"),
            }
            if !buried {
                let why =
                    "the node was removed from its cluster, and can't record that its replicas are given up";
                return fatal.raise(why.into());
            }
            // Their data may take long to go, and is of no use to anybody: then it stays with the directory.
            let gone = join_all(replicas.iter().map(|replica| shared.flusher.barrier(*replica)));
            let patience = Duration::from_millis(limits::LEAVE_MS_MAX);
            if tokio::time::timeout(patience, gone).await.is_err() {
                tracing::info!("data of replicas that were given up is still on disk");
            }
            fatal.raise_error(NodeError::Removed(farewell(map.cluster_id, node)));
        }));
    }
}

/// Has the state of tombstones removed, and that noted in the log.
pub(super) fn destroy(shared: &Arc<Shared>, replicas: Vec<ReplicaId>) {
    let then = shared.clone();
    let done = move |replicas: &[ReplicaId]| {
        let replicas = replicas.to_vec();
        then.log_writer.run(Box::new(move |log| {
            if let Err(error) = log.destroyed(&replicas) {
                tracing::warn!(%error, "noting that the state of removed replicas is gone");
            }
        }));
    };
    shared.flusher.destroy(replicas, Box::new(done));
}

/// Nodes that refuse this one as removed, to be asked for the map, which tells whether it is. The last one
/// is as good as any.
pub struct Refusals(watch::Sender<Option<NodeId>>);

impl Default for Refusals {
    fn default() -> Refusals {
        Refusals(watch::Sender::new(None))
    }
}

impl Refusals {
    /// For the links, which hear the refusals.
    pub fn sink(&self) -> OnRefused {
        let last = self.0.clone();
        Arc::new(move |node, refusal| {
            if refusal.kind == RefusalKind::Removed {
                last.send_replace(Some(node));
            }
        })
    }

    /// Asks those who refuse, one at a time, for as long as it is polled; ever more seldom while what they answer
    /// doesn't say so of this directory: then another has its number.
    pub async fn follow(self, cluster: ClusterId, handle: NodeHandle, supervisor: Addr<Supervisor>) {
        let mut refused = self.0.subscribe();
        let mut patience = Patience::default();
        let generation = || generation_of(handle.map().version);
        while refused.changed().await.is_ok() {
            let node = *refused.borrow_and_update();
            let map = handle.map();
            if let Some(record) = node.and_then(|node| map.nodes.get(&node)) {
                match ask_for_map_at(&record.peer_address, cluster, 0).await {
                    Ok(delta) => supervisor.do_send(MapNews(delta)),
                    Err(error) => tracing::debug!(error, "asking whether this node was removed"),
                }
            }
            patience.refused(generation(), Instant::now());
            while !patience.is_over(generation(), Instant::now()) {
                tokio::time::sleep(Duration::from_millis(limits::NODE_HEARTBEAT_MS)).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::RandomId;
    use raft::eraftpb::{Entry, HardState};

    use crate::codec::membership::MembershipEntry;
    use crate::ids::Epoch;
    use crate::node::test_node::record;
    use crate::placement::map::{MemberRole, NodeRecord};
    use crate::storage::log::LogWrite;
    use crate::storage::log_memory::MemoryLog;

    /// A newcomer with a snapshot of conf version 4, and the change to 5 in its log, which it hasn't applied.
    #[test]
    fn a_newcomer_whose_log_makes_it_a_voter_is_not_buried() {
        let replica = ReplicaId(9);
        let member = |id, role| Member { replica: ReplicaId(id), node: NodeId(id), role };
        let epoch = Epoch { range: 1, conf: 4 };
        let old = vec![member(1, MemberRole::Voter)];
        let newcomer = ReplicaRecord { epoch, members: old, ordered_at: 7, ..record(9) };
        let change = |members| MembershipEntry { conf: 4, members };
        let buried = |context: Vec<u8>, conf| {
            let log = MemoryLog::new();
            log.create(std::slice::from_ref(&newcomer)).unwrap();
            let first = log.load(replica).unwrap().last + 1;
            let put = Entry { index: first, term: 6, data: vec![1; 9].into(), ..Entry::default() };
            let entry_type = EntryType::EntryConfChangeV2;
            let change =
                Entry { index: first + 1, term: 6, entry_type, context: context.into(), ..Entry::default() };
            let hard_state = Some(HardState { term: 6, ..HardState::default() });
            let write = LogWrite { replica, entries: vec![put, change], hard_state, membership: None };
            log.write(&[write]).unwrap();
            matches!(bury(&log, replica, conf).unwrap(), Burial::Done)
        };
        let joins =
            membership::encode(&change(vec![member(1, MemberRole::Voter), member(9, MemberRole::Incoming)]));
        assert!(!buried(joins.clone(), Some(4)), "the map doesn't know of it yet");
        assert!(buried(joins.clone(), Some(5)), "the map knows better");
        assert!(buried(joins, None), "its shard is dropped");
        assert!(buried(membership::encode(&change(vec![member(1, MemberRole::Voter)])), Some(4)));
        assert!(!buried(b"damaged".to_vec(), Some(4)));
    }

    #[test]
    fn a_replica_whose_log_cannot_be_read_is_not_buried_where_it_would_tell() {
        let replica = ReplicaId(9);
        let member = |id| Member { replica: ReplicaId(id), node: NodeId(id), role: MemberRole::Voter };
        let attempt = |members: Vec<Member>, conf| {
            let log = MemoryLog::new();
            let epoch = Epoch { range: 1, conf: 4 };
            log.create(&[ReplicaRecord { epoch, members, ordered_at: 7, ..record(9) }]).unwrap();
            log.damage(replica);
            let buried = bury(&log, replica, conf);
            (buried, log.catalogue().unwrap()[0].phase)
        };
        let newcomer = attempt(vec![member(1)], Some(4));
        assert!(matches!(newcomer, (Err(StorageError::Damaged { .. }), ReplicaPhase::Active)));
        // Here its record says that it went with an earlier change, or nobody counts on anybody.
        for (members, conf) in [(vec![member(1), member(9)], Some(4)), (vec![member(1)], None)] {
            assert!(
                matches!(attempt(members, conf), (Ok(Burial::Done), ReplicaPhase::Tombstone)),
                "{conf:?}"
            );
        }
    }

    #[test]
    fn only_a_record_of_this_very_directory_counts() {
        let map = |standing| {
            let record = NodeRecord {
                id: NodeId(2),
                label: String::new(),
                client_address: String::new(),
                peer_address: String::new(),
                zone: String::new(),
                weight: 100,
                store_id: RandomId([7; 16]),
                standing,
                changed_at: 1,
            };
            ClusterMap { nodes: [(record.id, record)].into(), ..ClusterMap::default() }
        };
        let own = RandomId([7; 16]);
        assert!(is_removed(&map(Standing::Removed), NodeId(2), own));
        assert!(!is_removed(&map(Standing::Leaving), NodeId(2), own));
        assert!(!is_removed(&map(Standing::Removed), NodeId(3), own));
        assert!(!is_removed(&map(Standing::Removed), NodeId(2), RandomId([8; 16])));
        assert!(!is_removed(&ClusterMap::default(), NodeId(2), own));
    }
}
