//! The end of a node that its cluster has removed.
//!
//! A removed node may have been away when that was decided, and come back years later from its old disk. It
//! disturbs nobody: the others refuse its connections, with a word that programs understand. It then asks for
//! the cluster map; only that is believed, and only if it says so of this very directory. What the node
//! holds is replaced elsewhere by then, so it buries its replicas: none of them may ever vote again. Then it
//! ends, and says what to do.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use actix::prelude::*;
use futures_util::future::join_all;
use tokio::sync::watch;

use super::handle::NodeHandle;
use super::membership::ask_for_map_at;
use super::messages::MapNews;
use super::supervisor::Supervisor;
use super::{NodeError, map_cache};
use crate::codec::hello::RefusalKind;
use crate::ids::{ClusterId, NodeId, ReplicaId, StoreId};
use crate::limits;
use crate::placement::map::{ClusterMap, Standing};
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

impl Supervisor {
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

    /// Asks those who refuse, one at a time, for as long as it is polled.
    pub async fn follow(self, cluster: ClusterId, handle: NodeHandle, supervisor: Addr<Supervisor>) {
        let mut refused = self.0.subscribe();
        while refused.changed().await.is_ok() {
            let node = *refused.borrow_and_update();
            let map = handle.map();
            if let Some(record) = node.and_then(|node| map.nodes.get(&node)) {
                match ask_for_map_at(&record.peer_address, cluster, 0).await {
                    Ok(delta) => supervisor.do_send(MapNews(delta)),
                    Err(error) => tracing::debug!(error, "asking whether this node was removed"),
                }
            }
            tokio::time::sleep(Duration::from_millis(limits::NODE_HEARTBEAT_MS)).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::RandomId;
    use crate::placement::map::NodeRecord;

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
