//! What other nodes hear from this one: raft messages go to the threads that own the replicas,
//! heartbeats tell of newer maps, requests are answered.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use actix::Addr;
use futures_util::future::LocalBoxFuture;

use super::claims::Claims;
use super::disk::DiskHealth;
use super::handle::NodeHandle;
use super::hub::{Deliver, Hub, NodeHeard, hub_of};
use super::intake::Intake;
use super::membership::Applicant;
use super::messages::{MapConfirmed, MapNews};
use super::shared::Shared;
use super::snapshots::install;
use super::supervisor::Supervisor;
use crate::codec::GroupMessage;
use crate::codec::hello::{HelloRefusal, Lane, PeerHello};
use crate::codec::peer::{Membership, NodeHeartbeat, PeerRequest, PeerResponse};
use crate::codec::snapshot::{SnapshotAnswer, SnapshotOffer};
use crate::ids::{ClusterId, METADATA_SHARD, NodeId};
use crate::limits;
use crate::machine::command::{MetaCommand, MetaReply};
use crate::placement::map::{NodeRecord, Standing};
use crate::refusal::Refusal;
use crate::telemetry::metrics as names;
use crate::transport::call::PeerClient;
use crate::transport::handshake::Identity;
use crate::transport::listener::PeerHandler;
use crate::transport::snapshot::receiver::SnapshotSink;

/// Where messages go once the node is a member.
pub struct Destinations {
    /// Threads that own replicas of databases.
    pub data_hubs: Vec<Addr<Hub>>,
    /// The thread that owns the metadata replica.
    pub control_hub: Addr<Hub>,
    /// What they pass on their way.
    pub intake: Arc<Intake>,
    /// For snapshots.
    pub shared: Arc<Shared>,
    /// For news of the map, and snapshots.
    pub supervisor: Addr<Supervisor>,
    /// For news of disks.
    pub disk: Arc<DiskHealth>,
}

/// See the module page. One per node, used by every thread that has peer connections.
pub struct PeerService {
    asked: Asked,
    incarnation: u64,
    destinations: OnceLock<Destinations>,
    pulling: Arc<AtomicBool>,
    claims: Claims,
}

/// What answers requests; owned by each answer under way.
#[derive(Clone)]
struct Asked {
    applicant: Arc<Applicant>,
    handle: NodeHandle,
}

impl PeerService {
    /// A service of a node that may still be on its way into a cluster.
    pub fn new(applicant: Arc<Applicant>, handle: NodeHandle, incarnation: u64) -> PeerService {
        let asked = Asked { applicant, handle };
        let claims = Claims::default();
        PeerService { asked, incarnation, destinations: OnceLock::new(), pulling: Arc::default(), claims }
    }

    /// Whether the connection is open on which this start of a node sends its heartbeats.
    pub fn hears(&self, node: NodeId, incarnation: u64) -> bool {
        self.claims.hears(node, incarnation)
    }

    /// The node is a member. Once.
    pub fn set_destinations(&self, destinations: Destinations) {
        if self.destinations.set(destinations).is_err() {
            unreachable!("a node becomes a member once");
        }
    }
}

impl Asked {
    async fn recorded<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Applicant) -> Result<T, Refusal> + Send + 'static,
    ) -> Result<T, Refusal> {
        let applicant = self.applicant.clone();
        match tokio::task::spawn_blocking(move || work(&applicant)).await {
            Ok(result) => result,
            Err(error) => Err(Refusal::Refused(format!("the node can't record its membership: {error}"))),
        }
    }

    /// `named`: the cluster that the caller says it is of. Who asks to form or to join may not know it
    /// yet. All else comes from a member, and must mean this cluster: an address may have changed hands
    /// between two, and a command for one must not be executed by the other.
    /// `from`: the node that it says it is.
    async fn answer(
        &self,
        named: Option<ClusterId>,
        from: NodeId,
        request: PeerRequest,
    ) -> Result<PeerResponse, Refusal> {
        let timeout = Duration::from_millis(limits::JOIN_MS_MAX);
        match request {
            PeerRequest::Probe => Ok(PeerResponse::Probe(self.applicant.answer())),
            PeerRequest::Claim(cluster) => {
                self.recorded(move |a| a.claim(cluster)).await.map(|()| PeerResponse::Claimed)
            }
            PeerRequest::Form(formation) => {
                self.recorded(move |a| a.form(&formation)).await.map(|()| PeerResponse::Formed)
            }
            PeerRequest::Join { cluster_id, record } => {
                let own = self.cluster()?;
                if cluster_id.is_some_and(|asked| asked != own) {
                    return Err(Refusal::Refused(format!("this node belongs to cluster {own}")));
                }
                self.admit(record, timeout).await
            }
            PeerRequest::Map { since } => {
                self.of_this_cluster(named)?;
                let (own, map) = (self.cluster()?, self.handle.map());
                if map.cluster_id != own {
                    // Its cached map was lost, and it looks for another itself.
                    return Err(Refusal::Unavailable("the node has no cluster map yet".into()));
                }
                Ok(PeerResponse::Map(map.delta(since)))
            }
            PeerRequest::Meta(command) => {
                self.of_this_cluster(named)?;
                self.handle.meta_here(command, timeout).await.map(PeerResponse::Meta)
            }
            PeerRequest::Survey => {
                self.of_a_member(named, from)?;
                self.handle.survey().await.map(PeerResponse::Survey)
            }
            PeerRequest::Order(order) => {
                self.of_a_member(named, from)?;
                let timeout = Duration::from_millis(limits::ORDER_MS_MAX);
                self.handle.order(order, timeout).await.map(|()| PeerResponse::Done)
            }
            PeerRequest::Mark(shard) => {
                self.of_a_member(named, from)?;
                let timeout = Duration::from_millis(limits::ORDER_MS_MAX);
                self.handle.mark_here(shard, timeout).await.map(PeerResponse::Marked)
            }
            PeerRequest::Digest(request) => {
                self.of_a_member(named, from)?;
                self.handle.digest_here(request).await.map(PeerResponse::Digest)
            }
        }
    }

    /// Makes a node a member, or has it wait for an operator's word.
    async fn admit(&self, record: NodeRecord, timeout: Duration) -> Result<PeerResponse, Refusal> {
        // Whoever asks to join has no id yet, whatever it says.
        let record = NodeRecord { id: NodeId(0), ..record };
        // It asks again and again: only the first time that is anything for the log.
        let known = self.handle.map();
        let known = known.nodes.values().find(|known| known.store_id == record.store_id);
        if let Some(known) = known.filter(|known| known.standing == Standing::Pending)
            && (NodeRecord { id: NodeId(0), changed_at: 0, standing: record.standing, ..known.clone() })
                == record
        {
            return Ok(PeerResponse::Pending(known.id));
        }
        let node = match self.handle.meta(MetaCommand::AddNode(record), timeout).await? {
            MetaReply::Node(node) => node,
            MetaReply::Refused(refusal) => return Err(Refusal::Refused(refusal.to_string())),
            _ => return Err(Refusal::Unknown("the metadata shard answered another question".into())),
        };
        // What it is to be, only the map tells: it is a moment behind where another node leads.
        let deadline = Instant::now() + Duration::from_millis(limits::JOIN_SEEN_MS_MAX);
        loop {
            let map = self.handle.map();
            match map.nodes.get(&node).map(|record| record.standing) {
                Some(Standing::Pending) => return Ok(PeerResponse::Pending(node)),
                Some(_) => return Ok(PeerResponse::Joined { node, map: map.delta(0) }),
                None if Instant::now() > deadline => {
                    return Err(Refusal::Unavailable("the node's record is on its way".into()));
                }
                None => tokio::time::sleep(Duration::from_millis(limits::META_RETRY_MS)).await,
            }
        }
    }

    fn cluster(&self) -> Result<ClusterId, Refusal> {
        match self.applicant.stage() {
            Membership::Member(cluster, _) => Ok(cluster),
            _ => Err(Refusal::Unavailable("the node is not yet a member of a cluster".into())),
        }
    }

    /// What only the reconciler and the services of nodes ask, which run on nodes of the cluster.
    fn of_a_member(&self, named: Option<ClusterId>, from: NodeId) -> Result<(), Refusal> {
        self.of_this_cluster(named)?;
        match self.handle.map().nodes.get(&from).map(|record| record.standing) {
            Some(standing) if !matches!(standing, Standing::Pending | Standing::Removed) => Ok(()),
            _ => Err(Refusal::Refused("only a node of the cluster may ask for that".into())),
        }
    }

    fn of_this_cluster(&self, named: Option<ClusterId>) -> Result<(), Refusal> {
        let own = self.cluster()?;
        match named {
            Some(named) if named == own => Ok(()),
            Some(_) => Err(Refusal::Refused(format!("this node belongs to cluster {own}"))),
            None => Err(Refusal::Refused("the caller doesn't say which cluster it means".into())),
        }
    }
}

impl PeerHandler for Arc<PeerService> {
    fn hello(&self, hello: &PeerHello) -> Result<Identity, HelloRefusal> {
        let identity = |node| Ok(Identity { node, incarnation: self.incarnation });
        let (cluster, node) = match self.asked.applicant.stage() {
            Membership::Member(cluster, node) => (cluster, node),
            _ if hello.lane == Lane::Request => return identity(NodeId(0)),
            _ => return Err("this node is not yet a member of a cluster".to_owned().into()),
        };
        let anyone = hello.lane == Lane::Request && hello.to_node == NodeId(0);
        if hello.cluster_id == Some(cluster) {
            self.claims.judge(hello, (node, self.incarnation), &self.asked.handle.map())?;
        }
        // Who asks to join, or to form, need not know the cluster yet. Who names one must mean this one.
        if hello.cluster_id != Some(cluster) && !(anyone && hello.cluster_id.is_none()) {
            return Err(format!("this node belongs to cluster {cluster}").into());
        }
        if anyone {
            return identity(node);
        }
        if hello.to_node != node {
            let text = format!("this is node {node}, not {}: its address has changed hands", hello.to_node);
            return Err(text.into());
        }
        // It listens before it dials.
        if let Some(to) = self.destinations.get().filter(|_| hello.lane == Lane::Control) {
            to.shared.network.redial(hello.from_node);
        }
        identity(node)
    }

    fn gone(&self, hello: &PeerHello) {
        if hello.lane == Lane::Control {
            self.claims.gone(hello.from_node, hello.incarnation);
            // If it has ended its port says so.
            if let Some(to) = self.destinations.get() {
                to.shared.network.redial(hello.from_node);
            }
        }
    }

    fn raft(&self, _from: NodeId, messages: Vec<GroupMessage>) {
        let Some(to) = self.destinations.get() else {
            return;
        };
        let hubs = to.data_hubs.len();
        let batches = to.intake.admit(messages).split(hubs + 1, |message| match message.shard {
            METADATA_SHARD => hubs,
            shard => hub_of(shard, hubs),
        });
        for (hub, batch) in to.data_hubs.iter().chain([&to.control_hub]).zip(batches) {
            if !batch.is_empty() && hub.try_send(Deliver(batch)).is_err() {
                metrics::counter!(names::PEER_DROPPED).increment(1);
            }
        }
    }

    fn heartbeat(&self, heartbeat: NodeHeartbeat) -> Result<(), HelloRefusal> {
        let Some(to) = self.destinations.get() else {
            return Ok(());
        };
        self.claims.heard(heartbeat.node, heartbeat.incarnation, &self.asked.handle.map())?;
        to.disk.heard(heartbeat.node, heartbeat.disk_full);
        let news = NodeHeard { node: heartbeat.node, process: heartbeat.incarnation, ended: heartbeat.ended };
        for hub in to.data_hubs.iter().chain([&to.control_hub]) {
            // Another one comes a moment later.
            if hub.try_send(news).is_err() {
                tracing::debug!(node = %news.node, "a thread is too busy to hear of a node");
            }
        }
        let map = self.asked.handle.map();
        let age = heartbeat.map_age_ms.map(|age| Duration::from_millis(age.into()));
        let confirmed = age.and_then(|age| Instant::now().checked_sub(age));
        let confirmed = confirmed.map(|at| MapConfirmed { version: heartbeat.map_version, at });
        if heartbeat.map_version <= map.version {
            confirmed.into_iter().for_each(|confirmed| to.supervisor.do_send(confirmed));
            return Ok(());
        }
        if self.pulling.swap(true, Ordering::Relaxed) {
            return Ok(());
        }
        let pulling = self.pulling.clone();
        let hello = self.asked.handle.hello();
        let supervisor = to.supervisor.clone();
        actix::spawn(async move {
            if let Some(node) = map.nodes.get(&heartbeat.node) {
                let request = PeerRequest::Map { since: map.version };
                let timeout = Duration::from_millis(limits::MAP_PULL_MS_MAX);
                match PeerClient::call(&node.peer_address, hello, request, timeout).await {
                    Ok(PeerResponse::Map(delta)) => {
                        supervisor.do_send(MapNews(delta));
                        confirmed.into_iter().for_each(|confirmed| supervisor.do_send(confirmed));
                    }
                    Ok(other) => tracing::debug!(?other, "pulling the cluster map"),
                    Err(error) => tracing::debug!(%error, "pulling the cluster map"),
                }
            }
            pulling.store(false, Ordering::Relaxed);
        });
        Ok(())
    }

    fn request(&self, hello: &PeerHello, request: PeerRequest) -> LocalBoxFuture<'static, PeerResponse> {
        let (asked, named, from) = (self.asked.clone(), hello.cluster_id, hello.from_node);
        Box::pin(
            async move { asked.answer(named, from, request).await.unwrap_or_else(PeerResponse::Refused) },
        )
    }

    fn snapshot(
        &self,
        _from: NodeId,
        offer: SnapshotOffer,
    ) -> LocalBoxFuture<'static, Result<Box<dyn SnapshotSink>, SnapshotAnswer>> {
        let Some(to) = self.destinations.get() else {
            let busy = SnapshotAnswer::Busy { retry_after_ms: limits::SNAPSHOT_BUSY_MS };
            return Box::pin(std::future::ready(Err(busy)));
        };
        if to.shared.disk.is_full() {
            // A whole state needs more room than the log that it replaces.
            let busy = SnapshotAnswer::Busy { retry_after_ms: limits::SNAPSHOT_BUSY_MS };
            return Box::pin(std::future::ready(Err(busy)));
        }
        Box::pin(install::take(to.shared.clone(), to.supervisor.clone(), offer))
    }

    fn client_address(&self) -> String {
        self.asked.applicant.record().client_address.clone()
    }
}
