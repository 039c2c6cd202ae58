//! How a node becomes a member of a cluster: it forms one with the nodes listed in
//! `cluster.initial`, or joins one through any member.
//!
//! Only the first listed node forms, and only once ALL listed nodes have answered that they belong
//! to no cluster and have durably recorded the new cluster's random id; a node that has recorded one
//! refuses any other. So two clusters can't come of one list, whatever is restarted or wiped
//! meanwhile. Each step may be repeated:
//!
//! ```text
//!   first listed                          every other listed node
//!   probe ───────────────────────────────► empty
//!   record cluster id
//!   claim(id) ───────────────────────────► record cluster id
//!   record node 1, first map
//!   form(map, node k), first voters only ► record node k, first map     → start as members
//!                                          others: join through a member
//! ```
//!
//! A listed node that finds a member instead joins that cluster as a new node; where joins are to be approved, it
//! has a record from then on, and waits for an operator's word. One that rejoins
//! ([`DataDir::rejoins`]) does only that: it was a member before, so there is a cluster, and if all its nodes
//! had lost their directories, forming it again would pass off an empty one as the same.
//!
//! A member keeps what the cluster knows of it up to date ([`keep_record`]), and may have to ask the same
//! nodes for a cluster map, if its own is lost.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use actix::Addr;
use futures_util::future::join_all;
use tokio::sync::watch;

use super::NodeError;
use super::handle::NodeHandle;
use super::map_cache;
use super::messages::MapNews;
use super::patience::Patience;
use super::supervisor::Supervisor;
use crate::codec::peer::{Formation, Membership, PeerRequest, PeerResponse, ProbeAnswer};
use crate::ids::{
    ClusterId, Epoch, METADATA_DATABASE, METADATA_SHARD, NodeId, RandomId, ReplicaId, generation_of,
};
use crate::limits;
use crate::machine::command::{MetaCommand, MetaRefusal, MetaReply};
use crate::placement::map::{ClusterMap, MapDelta, Member, MemberRole, NodeRecord, ShardRecord};
use crate::placement::ring::RingRange;
use crate::refusal::Refusal;
use crate::settings::ClusterSettings;
use crate::storage::identity::DataDir;
use crate::transport::call::{HelloConfig, PeerClient};

/// A node on its way into a cluster, or arrived. Shared with the service that answers peers.
pub struct Applicant {
    /// Locked while something is recorded, so that two peers can't be promised different things.
    data_dir: Arc<Mutex<DataDir>>,
    record: NodeRecord,
    settings: ClusterSettings,
    /// It joins a cluster and forms none.
    rejoins: bool,
    /// It waits to be approved: no need to ask often.
    waits: AtomicBool,
    stage: watch::Sender<Membership>,
}

impl Applicant {
    /// A node with this directory; `record` tells others of it and has id 0.
    pub fn new(data_dir: Arc<Mutex<DataDir>>, record: NodeRecord, settings: ClusterSettings) -> Applicant {
        let (cluster, node, rejoins) = {
            let dir = locked(&data_dir);
            (dir.cluster_id(), dir.node(), dir.rejoins())
        };
        let stage = match (cluster, node) {
            (None, _) => Membership::Empty,
            (Some(cluster), None) => Membership::Claimed(cluster),
            (Some(cluster), Some(node)) => Membership::Member(cluster, node),
        };
        let stage = watch::Sender::new(stage);
        Applicant { data_dir, record, settings, rejoins, waits: AtomicBool::new(false), stage }
    }

    /// How far the node is.
    pub fn stage(&self) -> Membership {
        *self.stage.borrow()
    }

    /// What a probe is answered.
    pub fn answer(&self) -> ProbeAnswer {
        let membership = self.stage();
        let mut record = self.record.clone();
        if let Membership::Member(_, node) = membership {
            record.id = node;
        }
        ProbeAnswer { membership, record }
    }

    /// This node as others should know it.
    pub fn record(&self) -> &NodeRecord {
        &self.record
    }

    fn forms(&self) -> bool {
        !self.rejoins && self.settings.initial.first() == Some(&self.record.peer_address)
    }

    /// A peer asks to record its cluster id. Blocks for the disk.
    pub fn claim(&self, cluster: ClusterId) -> Result<(), Refusal> {
        let mut dir = locked(&self.data_dir);
        match self.stage() {
            Membership::Claimed(have) | Membership::Member(have, _) if have == cluster => Ok(()),
            Membership::Claimed(have) | Membership::Member(have, _) => {
                Err(Refusal::Refused(format!("this node has recorded cluster {have}, not {cluster}")))
            }
            Membership::Empty if self.rejoins => Err(Refusal::Refused(
                "this node was started with `--rejoin`: it joins a cluster, it forms none".into(),
            )),
            Membership::Empty if self.settings.initial.is_empty() => Err(Refusal::Refused(
                "this node has no `cluster.initial`: it joins a cluster, it forms none".into(),
            )),
            Membership::Empty if self.forms() => Err(Refusal::Refused(
                "this node is the first of its own `cluster.initial`: the lists differ between nodes".into(),
            )),
            Membership::Empty => {
                self.record_claim(&mut dir, cluster)?;
                Ok(())
            }
        }
    }

    fn record_claim(&self, dir: &mut DataDir, cluster: ClusterId) -> Result<(), Refusal> {
        dir.record_cluster(cluster).map_err(cant_record)?;
        self.stage.send_replace(Membership::Claimed(cluster));
        Ok(())
    }

    /// A peer makes this node one of the first voters. Blocks for the disk.
    pub fn form(&self, formation: &Formation) -> Result<(), Refusal> {
        let mut dir = locked(&self.data_dir);
        match self.stage() {
            Membership::Member(cluster, node)
                if (cluster, node) == (formation.cluster_id, formation.node) =>
            {
                Ok(())
            }
            Membership::Claimed(cluster) if cluster == formation.cluster_id && !self.rejoins => {
                self.record_member(&mut dir, &first_map(formation), formation.node)
            }
            stage => Err(Refusal::Refused(format!(
                "this node is {stage:?}, it can't become node {} of cluster {}",
                formation.node, formation.cluster_id
            ))),
        }
    }

    /// The map first, then the identity: a member always has a map to start from.
    fn record_member(&self, dir: &mut DataDir, map: &ClusterMap, node: NodeId) -> Result<(), Refusal> {
        dir.save_map(&map_cache::encode(map)).map_err(cant_record)?;
        dir.record_member(map.cluster_id, node).map_err(cant_record)?;
        self.stage.send_replace(Membership::Member(map.cluster_id, node));
        Ok(())
    }

    /// Waits until this node is a member, doing its part. Returns its cluster and id.
    pub async fn become_member(self: &Arc<Self>) -> Result<(ClusterId, NodeId), NodeError> {
        let mut told = String::new();
        let mut stage = self.stage.subscribe();
        let mut pauses = Pauses::default();
        loop {
            if let Membership::Member(cluster, node) = self.stage() {
                return Ok((cluster, node));
            }
            let obstacle = tokio::select! {
                obstacle = self.attempt() => obstacle,
                // A peer's `form` may come while we ask around.
                _ = stage.changed() => continue,
            };
            if let Some(obstacle) = obstacle
                && obstacle != told
            {
                tracing::info!("waiting to become a member: {obstacle}");
                told = obstacle;
            }
            let pause = match self.waits.load(Ordering::Relaxed) {
                true => Duration::from_millis(limits::APPROVAL_MS),
                false => pauses.next(),
            };
            // What a peer makes of this node meanwhile is what it waits for.
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                _ = stage.changed() => {}
            }
        }
    }

    /// Peer addresses of the nodes that the settings list, without this one's.
    pub(super) fn others(&self) -> Vec<&str> {
        let own = self.record.peer_address.as_str();
        let mut addresses: Vec<&str> = Vec::new();
        for address in self.settings.initial.iter().chain(&self.settings.join).map(String::as_str) {
            if address != own && !addresses.contains(&address) {
                addresses.push(address);
            }
        }
        addresses
    }

    /// The cluster map of a node that the settings list, as soon as one of them answers with it. `None` if
    /// they list no other.
    pub async fn map_of_a_peer(&self, cluster: ClusterId) -> Option<ClusterMap> {
        let mut told = String::new();
        while !self.others().is_empty() {
            match self.ask_for_map(cluster, 0).await {
                Ok(delta) => {
                    let mut map = ClusterMap::default();
                    map.merge(delta);
                    return Some(map);
                }
                Err(obstacle) if obstacle == told => {}
                Err(obstacle) => {
                    tracing::info!("waiting for the cluster map: {obstacle}");
                    told = obstacle;
                }
            }
            tokio::time::sleep(Duration::from_millis(limits::MEMBERSHIP_RETRY_MS)).await;
        }
        None
    }

    /// What changed in the cluster map after version `since`: the newest answer of the nodes that the
    /// settings list, all asked at once.
    async fn ask_for_map(&self, cluster: ClusterId, since: u64) -> Result<MapDelta, String> {
        let answers = self.others().into_iter().map(|address| ask_for_map_at(address, cluster, since));
        let mut newest: Result<MapDelta, String> = Err("there is nobody to ask".to_owned());
        for answer in join_all(answers).await {
            let better = match (&newest, &answer) {
                (Ok(have), Ok(delta)) => delta.version > have.version,
                (Ok(_), Err(_)) => false,
                (Err(_), _) => true,
            };
            if better {
                newest = answer;
            }
        }
        newest
    }

    /// One round; what stands in the way, if anything.
    async fn attempt(self: &Arc<Self>) -> Option<String> {
        let addresses = self.others();
        let answers: BTreeMap<&str, Result<ProbeAnswer, String>> =
            join_all(addresses.iter().map(|&address| async move { (address, probe(address).await) }))
                .await
                .into_iter()
                .collect();
        let claimed = match self.stage() {
            Membership::Claimed(cluster) => Some(cluster),
            _ => None,
        };
        // A cluster that exists comes first: whoever was wiped joins it as a new node.
        let mut obstacle = None;
        for (address, answer) in &answers {
            let Ok(ProbeAnswer { membership: Membership::Member(cluster, _), .. }) = answer else {
                continue;
            };
            if claimed.is_some_and(|claimed| claimed != *cluster) {
                obstacle =
                    Some(format!("{address} belongs to cluster {cluster}, this node has recorded another"));
                continue;
            }
            match self.join(address, *cluster).await {
                Ok(()) => return None,
                Err(reason) => obstacle = Some(format!("joining through {address}: {reason}")),
            }
        }
        if obstacle.is_some() {
            return obstacle;
        }
        if self.forms() {
            self.lead_formation(&answers).await.err()
        } else if self.rejoins {
            Some("no member answers yet, and after `--rejoin` this node forms no cluster of its own".into())
        } else {
            Some("no member answers yet".into())
        }
    }

    async fn join(self: &Arc<Self>, address: &str, cluster: ClusterId) -> Result<(), String> {
        let request = PeerRequest::Join { cluster_id: Some(cluster), record: self.record.clone() };
        let timeout = Duration::from_millis(limits::JOIN_MS_MAX);
        match ask(address, request, timeout).await? {
            PeerResponse::Joined { node, map } => {
                let mut joined = ClusterMap::default();
                joined.merge(map);
                self.off_thread(move |applicant| {
                    let mut dir = locked(&applicant.data_dir);
                    match applicant.stage() {
                        Membership::Member(..) => Ok(()),
                        _ => applicant.record_member(&mut dir, &joined, node),
                    }
                })
                .await
            }
            PeerResponse::Pending(node) => {
                self.waits.store(true, Ordering::Relaxed);
                let own = &self.record.peer_address;
                Err(format!(
                    "this node is to be node {node} of cluster {cluster}, and waits to be approved: \
                     `pontoon admin node add {own}`"
                ))
            }
            PeerResponse::Refused(refusal) => Err(refusal.to_string()),
            other => Err(format!("unexpected answer {other:?}")),
        }
    }

    async fn lead_formation(
        self: &Arc<Self>,
        answers: &BTreeMap<&str, Result<ProbeAnswer, String>>,
    ) -> Result<(), String> {
        let own_claim = match self.stage() {
            Membership::Claimed(cluster) => Some(cluster),
            _ => None,
        };
        let others = &self.settings.initial[1..];
        let mut records = vec![self.record.clone()];
        for address in others {
            match answers.get(address.as_str()) {
                Some(Ok(answer)) => match answer.membership {
                    Membership::Empty => {}
                    Membership::Claimed(cluster) if Some(cluster) == own_claim => {}
                    other => {
                        return Err(format!("{address} is {other:?}; a new cluster needs empty nodes"));
                    }
                },
                Some(Err(reason)) => return Err(format!("{address} doesn't answer: {reason}")),
                None => return Err(format!("{address} was not asked")),
            }
            if let Some(Ok(answer)) = answers.get(address.as_str()) {
                records.push(answer.record.clone());
            }
        }
        let cluster = match own_claim {
            Some(cluster) => cluster,
            None => {
                let cluster = RandomId::random();
                self.off_thread(move |applicant| {
                    let mut dir = locked(&applicant.data_dir);
                    applicant.record_claim(&mut dir, cluster)
                })
                .await?;
                cluster
            }
        };
        for address in others {
            match ask(address, PeerRequest::Claim(cluster), PROBE_TIMEOUT).await? {
                PeerResponse::Claimed => {}
                PeerResponse::Refused(refusal) => return Err(format!("{address}: {refusal}")),
                other => return Err(format!("{address}: unexpected answer {other:?}")),
            }
        }
        let formation = first_formation(cluster, records);
        let map = first_map(&formation);
        // From here on the cluster exists: this node starts, and tells the other voters (`spread`)
        // until they have heard.
        self.off_thread(move |applicant| {
            let mut dir = locked(&applicant.data_dir);
            applicant.record_member(&mut dir, &map, formation.node)
        })
        .await
    }

    async fn off_thread(
        self: &Arc<Self>,
        work: impl FnOnce(&Applicant) -> Result<(), Refusal> + Send + 'static,
    ) -> Result<(), String> {
        let applicant = self.clone();
        let done = tokio::task::spawn_blocking(move || work(&applicant)).await;
        done.map_err(|error| error.to_string())?.map_err(|refusal| refusal.to_string())
    }
}

/// The times between attempts: short at first, since nodes of one list are often started together.
struct Pauses(u64);

impl Default for Pauses {
    fn default() -> Pauses {
        Pauses(limits::MEMBERSHIP_RETRY_MS_MIN)
    }
}

impl Pauses {
    fn next(&mut self) -> Duration {
        let pause = self.0;
        self.0 = (2 * pause).min(limits::MEMBERSHIP_RETRY_MS);
        Duration::from_millis(pause)
    }
}

const PROBE_TIMEOUT: Duration = Duration::from_millis(limits::PROBE_MS_MAX);

fn locked(dir: &Mutex<DataDir>) -> MutexGuard<'_, DataDir> {
    // A panic while recording leaves the old identity or the new one: both are whole.
    dir.lock().unwrap_or_else(PoisonError::into_inner)
}

fn cant_record(error: impl std::fmt::Display) -> Refusal {
    Refusal::Refused(format!("the node can't record its membership: {error}"))
}

/// What changed in the map of a cluster after version `since`, as the node at `address` knows it. Asked
/// without a name: whoever it is that asks.
pub(super) async fn ask_for_map_at(
    address: &str,
    cluster: ClusterId,
    since: u64,
) -> Result<MapDelta, String> {
    let timeout = Duration::from_millis(limits::MAP_PULL_MS_MAX);
    let hello = HelloConfig { cluster_id: Some(cluster), ..HelloConfig::default() };
    let answer = PeerClient::call(address, hello, PeerRequest::Map { since }, timeout).await;
    let refused = match answer.map_err(|error| error.to_string()) {
        Ok(PeerResponse::Map(delta)) if delta.cluster_id == cluster => return Ok(delta),
        Ok(PeerResponse::Map(delta)) => format!("it belongs to cluster {}", delta.cluster_id),
        Ok(PeerResponse::Refused(refusal)) => refusal.to_string(),
        Ok(other) => format!("unexpected answer {other:?}"),
        Err(error) => error,
    };
    Err(format!("{address}: {refused}"))
}

async fn ask(address: &str, request: PeerRequest, timeout: Duration) -> Result<PeerResponse, String> {
    PeerClient::call(address, HelloConfig::default(), request, timeout)
        .await
        .map_err(|error| error.to_string())
}

async fn probe(address: &str) -> Result<ProbeAnswer, String> {
    match ask(address, PeerRequest::Probe, PROBE_TIMEOUT).await? {
        PeerResponse::Probe(answer) => Ok(answer),
        PeerResponse::Refused(refusal) => Err(refusal.to_string()),
        other => Err(format!("unexpected answer {other:?}")),
    }
}

/// The first voters of the metadata shard, in the order of the list: an odd number, at most five.
fn first_formation(cluster_id: ClusterId, records: Vec<NodeRecord>) -> Formation {
    let voters = records.len().min(limits::METADATA_VOTERS_MAX);
    let voters = if voters.is_multiple_of(2) { voters - 1 } else { voters };
    let nodes: Vec<_> = (records.into_iter().take(voters).zip(1..))
        .map(|(record, id)| NodeRecord { id: NodeId(id), changed_at: 1, ..record })
        .collect();
    let member =
        |node: &NodeRecord| Member { replica: ReplicaId(node.id.0), node: node.id, role: MemberRole::Voter };
    let metadata = ShardRecord {
        id: METADATA_SHARD,
        database: METADATA_DATABASE,
        range: RingRange::ALL,
        epoch: Epoch { range: 1, conf: 1 },
        members: nodes.iter().map(member).collect(),
        dropped: false,
        moving: None,
        target: None,
        previous: None,
        changed_at: 1,
    };
    Formation { cluster_id, node: NodeId(1), nodes, metadata }
}

/// The map that a formation amounts to, before the metadata shard has written its own: version 0.
fn first_map(formation: &Formation) -> ClusterMap {
    ClusterMap {
        cluster_id: formation.cluster_id,
        version: 0,
        nodes: formation.nodes.iter().map(|n| (n.id, n.clone())).collect(),
        databases: BTreeMap::new(),
        shards: [(formation.metadata.id, formation.metadata.clone())].into(),
        ..ClusterMap::default()
    }
}

/// Tells every first voter of a cluster that it is one, until it has heard. Run by node 1 at each
/// start while the map is still the first one: it may have crashed halfway.
pub async fn spread(map: Arc<ClusterMap>) {
    let Some(metadata) = map.shards.get(&METADATA_SHARD) else {
        return;
    };
    let nodes: Vec<_> = map.nodes.values().cloned().collect();
    let tell = metadata.members.iter().filter(|m| m.node != NodeId(1)).filter_map(|member| {
        let address = map.nodes.get(&member.node)?.peer_address.clone();
        let formation = Formation {
            cluster_id: map.cluster_id,
            node: member.node,
            nodes: nodes.clone(),
            metadata: metadata.clone(),
        };
        Some(async move {
            let (mut told, mut pauses) = (String::new(), Pauses::default());
            loop {
                let obstacle = match ask(&address, PeerRequest::Form(formation.clone()), PROBE_TIMEOUT).await
                {
                    Ok(PeerResponse::Formed) => return,
                    Ok(PeerResponse::Refused(refusal)) => refusal.to_string(),
                    Ok(other) => format!("unexpected answer {other:?}"),
                    Err(error) => error,
                };
                if obstacle != told {
                    tracing::info!("telling {address} that it is node {}: {obstacle}", formation.node);
                    told = obstacle;
                }
                tokio::time::sleep(pauses.next()).await;
            }
        })
    });
    join_all(tell).await;
}

/// Tells the metadata shard of this node's addresses, zone and weight, once per start, however long it
/// takes. The map at hand can't say whether that is news: it may be older than what the cluster has heard
/// since. To tell what is known already changes nothing.
///
/// And again once per generation of the map: the metadata shard may have gone on without what it had heard, even
/// that there is this node. It keeps its id then, under which replicas of shards are here. Where that is refused, the
/// cluster takes the node for another, and is asked ever more seldom.
pub async fn keep_record(applicant: Arc<Applicant>, handle: NodeHandle, supervisor: Addr<Supervisor>) {
    let mut obstacle = String::new();
    let (mut told, mut patience) = (None, Patience::default());
    loop {
        let map = handle.map();
        let generation = generation_of(map.version);
        if map.version > 0 && told != Some(generation) && patience.is_over(generation, Instant::now()) {
            let record = NodeRecord { id: handle.node(), ..applicant.record.clone() };
            match handle.meta(MetaCommand::AddNode(record), Duration::from_millis(limits::JOIN_MS_MAX)).await
            {
                Ok(MetaReply::Node(node)) => {
                    if generation > 0 && !map.nodes.contains_key(&node) {
                        tracing::warn!(%node, "the metadata shard had lost the record of this node, and has it again");
                    }
                    told = Some(generation);
                    obstacle.clear();
                    continue;
                }
                Ok(MetaReply::Refused(MetaRefusal::NodeRemoved(_))) => {
                    tracing::debug!("this node was removed: the cluster map will tell");
                    patience.refused(generation, Instant::now());
                }
                Ok(MetaReply::Refused(refusal)) => {
                    patience.refused(generation, Instant::now());
                    let refused = refusal.to_string();
                    if refused != obstacle {
                        tracing::error!(
                            "the cluster doesn't know this node any more as what it is: {refused}. To have this \
                             machine join as a new node, start it with `--rejoin`"
                        );
                        obstacle = refused;
                    }
                }
                Ok(other) => tracing::debug!(?other, "telling the cluster of this node's addresses"),
                Err(error) => tracing::debug!(%error, "telling the cluster of this node's addresses"),
            }
            // The others may have moved too, all of them: then the settings know better than the map.
            match applicant.ask_for_map(map.cluster_id, map.version).await {
                Ok(delta) => supervisor.do_send(MapNews(delta)),
                Err(obstacle) => tracing::debug!(obstacle, "asking for the cluster map"),
            }
        }
        tokio::time::sleep(Duration::from_millis(limits::NODE_HEARTBEAT_MS)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::placement::map::Standing;

    fn record(port: u16) -> NodeRecord {
        NodeRecord {
            id: NodeId(0),
            label: String::new(),
            client_address: format!("127.0.0.1:{port}"),
            peer_address: format!("127.0.0.1:{}", port + 100),
            zone: String::new(),
            weight: 100,
            store_id: RandomId::default(),
            standing: Standing::Member,
            changed_at: 0,
        }
    }

    #[test]
    fn the_metadata_shard_begins_with_an_odd_number_of_voters() {
        let voters = |n: u16| {
            first_formation(RandomId::default(), (0..n).map(record).collect()).metadata.members.len()
        };
        assert_eq!((1..=7).map(voters).collect::<Vec<_>>(), [1, 1, 3, 3, 5, 5, 5]);
    }

    #[test]
    fn the_first_map_survives_its_cache() {
        let formation = first_formation(RandomId([7; 16]), (0..3).map(record).collect());
        let map = first_map(&formation);
        assert_eq!(map_cache::decode(&map_cache::encode(&map)).expect("readable"), map);
        assert_eq!(map.nodes.keys().copied().collect::<Vec<_>>(), [NodeId(1), NodeId(2), NodeId(3)]);
    }
}
