//! Who claims to be which node.
//!
//! A node is what its data directory says. A directory that was copied makes two processes of one node: each would
//! vote for itself, and both for the other's rivals. So one that starts first asks the other nodes,
//! and whoever listens at the address that the map has of it, whether they hear from that node already; and they
//! take no connection of a second one while the first is alive. The one that is alive stays: it has promised
//! things that the other doesn't know of.
//!
//! That is no proof. Where two processes of one node can be seen by nobody in common, nobody notices.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::future::join_all;

use super::NodeError;
use super::membership::Applicant;
use crate::codec::hello::{HelloRefusal, Lane, PeerHello, RefusalKind};
use crate::codec::peer::PeerRequest;
use crate::ids::{NodeId, generation_of};
use crate::limits;
use crate::placement::map::{ClusterMap, Standing};
use crate::transport::call::{CallError, HelloConfig, PeerClient};

/// The nodes that this one hears, and which start of each.
#[derive(Debug, Default)]
pub struct Claims(Mutex<HashMap<NodeId, Alive>>);

/// A node that was heard.
#[derive(Clone, Copy, Debug)]
struct Alive {
    incarnation: u64,
    at: Instant,
}

impl Claims {
    /// Whether a node of this cluster may connect. `own`: this node, and which start of it.
    pub fn judge(&self, hello: &PeerHello, own: (NodeId, u64), map: &ClusterMap) -> Result<(), HelloRefusal> {
        let (node, incarnation) = (hello.from_node, hello.incarnation);
        if node == NodeId(0) || (node, incarnation) == own {
            // Nobody in particular; or this process, which may ask itself.
            return Ok(());
        }
        if node == own.0 {
            return Err(duplicate(node));
        }
        // By requests one that was forgotten makes itself known again.
        if hello.lane != Lane::Request || map.nodes.contains_key(&node) {
            still_member(node, map)?;
        }
        self.check(node, incarnation, Instant::now())
    }

    /// A heartbeat has come. Inside an error: why its sender isn't to be heard any more.
    pub fn heard(&self, node: NodeId, incarnation: u64, map: &ClusterMap) -> Result<(), HelloRefusal> {
        still_member(node, map)?;
        self.note(node, incarnation, Instant::now())
    }

    /// Whether a connection of this start of a node is open, and its heartbeats have come on it.
    pub fn hears(&self, node: NodeId, incarnation: u64) -> bool {
        let alive = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        alive.get(&node).is_some_and(|alive| alive.incarnation == incarnation)
    }

    /// The connection on which its heartbeats came has ended: it needn't be alive.
    pub fn gone(&self, node: NodeId, incarnation: u64) {
        let mut alive = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if alive.get(&node).is_some_and(|alive| alive.incarnation == incarnation) {
            alive.remove(&node);
        }
    }

    fn check(&self, node: NodeId, incarnation: u64, now: Instant) -> Result<(), HelloRefusal> {
        let alive = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let recent =
            |alive: &Alive| now.saturating_duration_since(alive.at) < Duration::from_millis(limits::ALIVE_MS);
        match alive.get(&node) {
            Some(other) if other.incarnation != incarnation && recent(other) => Err(duplicate(node)),
            _ => Ok(()),
        }
    }

    fn note(&self, node: NodeId, incarnation: u64, now: Instant) -> Result<(), HelloRefusal> {
        self.check(node, incarnation, now)?;
        let mut alive = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        alive.insert(node, Alive { incarnation, at: now });
        Ok(())
    }
}

fn still_member(node: NodeId, map: &ClusterMap) -> Result<(), HelloRefusal> {
    match map.nodes.get(&node).map(|record| record.standing) {
        Some(Standing::Removed) => Err(HelloRefusal {
            kind: RefusalKind::Removed,
            text: format!("node {node} was removed from this cluster"),
        }),
        // It joined, and the metadata shard has lost that since: it has to hear of it.
        None if generation_of(node.0) < generation_of(map.version) => Err(HelloRefusal {
            kind: RefusalKind::Removed,
            text: format!(
                "node {node} isn't known in this cluster any more: the metadata shard has lost its record"
            ),
        }),
        // One that isn't known here may have joined a moment ago.
        _ => Ok(()),
    }
}

fn duplicate(node: NodeId) -> HelloRefusal {
    HelloRefusal {
        kind: RefusalKind::Duplicate,
        text: format!("another process that is alive is node {node}; was a data directory copied?"),
    }
}

/// Waits until nobody who can be reached hears of another process that is the node of `hello`.
///
/// # Errors
/// Somebody does, and goes on to.
pub async fn settle(
    applicant: &Arc<Applicant>,
    map: &ClusterMap,
    hello: HelloConfig,
) -> Result<(), NodeError> {
    let mut addresses: Vec<String> = applicant.others().into_iter().map(str::to_owned).collect();
    for record in map.nodes.values().filter(|record| record.standing != Standing::Removed) {
        let own = record.id == hello.node && record.peer_address == applicant.record().peer_address;
        if !own && !record.peer_address.is_empty() && !addresses.contains(&record.peer_address) {
            addresses.push(record.peer_address.clone());
        }
    }
    let begun = Instant::now();
    loop {
        let asked = addresses.iter().map(|address| says_duplicate(address, hello));
        let Some((address, text)) = join_all(asked).await.into_iter().flatten().next() else {
            return Ok(());
        };
        if begun.elapsed() >= Duration::from_millis(limits::DUPLICATE_MS_MAX) {
            return Err(NodeError::Membership(format!(
                "{address} says: {text} This process doesn't start as node {} beside it. If this directory is a copy, \
                 delete it: then this machine joins as a new node. Else stop the other process first",
                hello.node
            )));
        }
        tracing::warn!(address, text, "another process may be this node; asking again");
        tokio::time::sleep(Duration::from_millis(limits::MEMBERSHIP_RETRY_MS)).await;
    }
}

/// Who says that another process is this node, and in which words.
async fn says_duplicate(address: &str, hello: HelloConfig) -> Option<(String, String)> {
    let timeout = Duration::from_millis(limits::PROBE_MS_MAX);
    match PeerClient::call(address, hello, PeerRequest::Probe, timeout).await {
        Err(CallError::Refused { reason, .. }) if reason.kind == RefusalKind::Duplicate => {
            Some((address.to_owned(), reason.text))
        }
        // It hears nobody else, or can't be asked: a cluster may start all at once.
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::hello::{Lane, ProtocolRange};
    use crate::ids::StoreId;
    use crate::placement::map::NodeRecord;

    fn map(standing: Standing) -> ClusterMap {
        let record = NodeRecord {
            id: NodeId(2),
            label: String::new(),
            client_address: String::new(),
            peer_address: "a:1".into(),
            zone: String::new(),
            weight: 100,
            store_id: StoreId::default(),
            standing,
            changed_at: 1,
        };
        ClusterMap { nodes: [(record.id, record)].into(), ..ClusterMap::default() }
    }

    fn hello(node: u64, incarnation: u64) -> PeerHello {
        PeerHello {
            protocol: ProtocolRange::OURS,
            cluster_id: None,
            from_node: NodeId(node),
            to_node: NodeId(1),
            lane: Lane::Control,
            incarnation,
        }
    }

    fn kind(verdict: Result<(), HelloRefusal>) -> Option<RefusalKind> {
        verdict.err().map(|refusal| refusal.kind)
    }

    #[test]
    fn a_second_process_of_a_node_is_refused_while_the_first_is_alive() {
        let (claims, map) = (Claims::default(), map(Standing::Member));
        let judge = |node, incarnation| kind(claims.judge(&hello(node, incarnation), (NodeId(1), 7), &map));
        assert_eq!(judge(2, 1), None);
        assert_eq!(claims.heard(NodeId(2), 1, &map), Ok(()));
        assert_eq!(judge(2, 1), None, "it has several connections");
        assert_eq!(judge(2, 5), Some(RefusalKind::Duplicate));
        assert_eq!(kind(claims.heard(NodeId(2), 5, &map)), Some(RefusalKind::Duplicate), "connected before");
        claims.gone(NodeId(2), 5);
        assert_eq!(judge(2, 5), Some(RefusalKind::Duplicate), "the other one's connection has ended");
        claims.gone(NodeId(2), 1);
        assert_eq!(judge(2, 5), None);
        // One that hangs, or whose connection is half open, isn't waited for.
        let now = Instant::now();
        assert_eq!(claims.note(NodeId(2), 5, now), Ok(()));
        let later = now + Duration::from_millis(limits::ALIVE_MS);
        assert!(claims.check(NodeId(2), 6, later - Duration::from_millis(1)).is_err());
        assert_eq!(claims.note(NodeId(2), 6, later), Ok(()));
        assert_eq!(
            kind(claims.check(NodeId(2), 5, later)),
            Some(RefusalKind::Duplicate),
            "it comes back too late"
        );
        // This node itself: another process of it, its own questions, and a stranger's.
        assert_eq!(judge(1, 8), Some(RefusalKind::Duplicate));
        assert_eq!((judge(1, 7), judge(0, 0)), (None, None));
    }

    #[test]
    fn a_removed_node_is_told_so_and_nobody_else() {
        for standing in [Standing::Member, Standing::Draining, Standing::Leaving, Standing::Removed] {
            let (claims, map) = (Claims::default(), map(standing));
            let removed = (standing == Standing::Removed).then_some(RefusalKind::Removed);
            assert_eq!(kind(claims.judge(&hello(2, 1), (NodeId(1), 7), &map)), removed);
            assert_eq!(kind(claims.heard(NodeId(2), 1, &map)), removed);
            assert_eq!(kind(claims.judge(&hello(3, 1), (NodeId(1), 7), &map)), None, "not known here yet");
        }
    }

    #[test]
    fn a_node_whose_record_was_lost_hears_of_it_and_can_make_itself_known_again() {
        let (claims, mut map) = (Claims::default(), map(Standing::Member));
        map.version = (1 << 32) + 4;
        let judge =
            |node, lane| kind(claims.judge(&PeerHello { lane, ..hello(node, 1) }, (NodeId(1), 7), &map));
        for lane in [Lane::Control, Lane::Request] {
            assert_eq!(judge(2, lane), None);
            assert_eq!(judge((1 << 32) + 3, lane), None, "it has joined since");
        }
        assert_eq!(judge(3, Lane::Control), Some(RefusalKind::Removed));
        assert_eq!(judge(3, Lane::Request), None);
        assert_eq!(kind(claims.heard(NodeId(3), 1, &map)), Some(RefusalKind::Removed), "connected before");
    }
}
