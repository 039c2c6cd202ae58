//! A node as its services see it.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use actix::Addr;
use actix::prelude::SendError;
use tokio::sync::{oneshot, watch};

use super::disk::DiskHealth;
use super::load::Admitted;
#[cfg(feature = "test-hooks")]
use super::messages::Inject;
use super::messages::{AskStatus, Report, Reported, Submit};
use super::reconciler::{Balance, BalanceStatus};
use super::replica::ReplicaAddr;
use super::router::Router;
use super::supervisor::Supervisor;
use super::trace::Sheet;
use crate::codec::peer::{PeerRequest, PeerResponse};
use crate::codec::trace::Moment;
use crate::group::types::{GroupStatus, Operation, Output};
use crate::ids::{METADATA_SHARD, NodeId, ReplicaId, ShardId};
use crate::limits;
use crate::machine::command::{Command, MetaCommand, MetaReply, Reply};
use crate::placement::map::ClusterMap;
use crate::refusal::{Outcome, Refusal};
use crate::transport::call::{CallError, HelloConfig, PeerClient};

/// What a service on any thread of the node may do with it. Cheap to clone.
#[derive(Clone)]
pub struct NodeHandle {
    inner: Arc<Inner>,
}

struct Inner {
    label: String,
    started: Instant,
    phase: watch::Sender<NodePhase>,
    disk_bytes: AtomicU64,
    disk: Arc<DiskHealth>,
    in_flight: AtomicUsize,
    empty_map: Arc<ClusterMap>,
    balance: Balance,
    member: OnceLock<Member>,
}

/// What there is once the node belongs to a cluster.
pub struct Member {
    /// This node.
    pub node: NodeId,
    /// Which start of its process this is.
    pub incarnation: u64,
    /// Its replicas, and the map.
    pub router: Arc<Router>,
    /// Who watches over them.
    pub supervisor: Addr<Supervisor>,
}

/// What a node is doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NodePhase {
    /// Opening, forming or joining.
    Starting,
    /// Serving.
    Ready,
    /// On its way out.
    Stopping,
    /// Serving, but no new values: its disk is nearly full. In reports; the node itself is `Ready`.
    ReadOnly,
}

/// How a replica is, as its supervisor sees it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ReplicaHealth {
    /// Running.
    Serving,
    /// Re-applying its log after a start.
    Recovering,
    /// Too far behind for the log of its leader: receives or installs a snapshot.
    Installing,
    /// Its state is lost, for this reason: it votes and follows, and waits for a snapshot of its leader.
    Refetching(String),
    /// Crashed; will be rebuilt.
    Restarting(String),
    /// Crashed too often.
    Quarantined(String),
    /// Its disk state can't be used.
    Failed(String),
}

/// One replica in a node's report.
#[derive(Clone, Debug)]
pub struct ReplicaReport {
    /// The shard.
    pub shard: ShardId,
    /// The replica.
    pub replica: ReplicaId,
    /// How it is.
    pub health: ReplicaHealth,
    /// What it tells of itself; `None` while it isn't running.
    pub group: Option<GroupStatus>,
    /// Restarts since the node started.
    pub restarts: u32,
    /// Keys in its state, as last counted; an estimate.
    pub keys: u64,
    /// Bytes of them and their values, likewise.
    pub bytes: u64,
}

/// What a node tells of itself.
#[derive(Clone, Debug)]
pub struct NodeReport {
    /// Its id; 0 while not a member.
    pub node: NodeId,
    /// Its label.
    pub label: String,
    /// What it is doing.
    pub phase: NodePhase,
    /// Bytes in its data directory, as last measured.
    pub disk_bytes: u64,
    /// Its replicas, by shard.
    pub replicas: Vec<ReplicaReport>,
    /// Time since it started.
    pub uptime: Duration,
    /// Bytes that it has sent in snapshots since then.
    pub snapshot_bytes: u64,
    /// Of the node that leads the metadata shard: where members should change and can't, and why.
    pub stuck: Vec<(ShardId, String)>,
}

impl NodeHandle {
    /// A node that is starting.
    pub fn new(label: String) -> NodeHandle {
        NodeHandle {
            inner: Arc::new(Inner {
                label,
                started: Instant::now(),
                phase: watch::Sender::new(NodePhase::Starting),
                disk_bytes: AtomicU64::new(0),
                disk: Arc::default(),
                in_flight: AtomicUsize::new(0),
                empty_map: Arc::default(),
                balance: Balance::default(),
                member: OnceLock::new(),
            }),
        }
    }

    /// The node has become a member. Once.
    pub fn set_member(&self, member: Member) {
        if self.inner.member.set(member).is_err() {
            unreachable!("a node becomes a member once");
        }
    }

    /// The node goes on to `phase`.
    pub fn set_phase(&self, phase: NodePhase) {
        self.inner.phase.send_replace(phase);
    }

    /// What the node is doing.
    pub fn phase(&self) -> NodePhase {
        *self.inner.phase.borrow()
    }

    /// Bytes in the data directory, as just measured.
    pub fn set_disk_bytes(&self, bytes: u64) {
        self.inner.disk_bytes.store(bytes, Ordering::Relaxed);
    }

    /// How the node's disk is.
    pub fn disk(&self) -> &Arc<DiskHealth> {
        &self.inner.disk
    }

    pub(super) fn member(&self) -> Result<&Member, Refusal> {
        self.inner
            .member
            .get()
            .ok_or(Refusal::Unavailable("the node is not yet a member of a cluster".into()))
    }

    pub(super) fn supervisor(&self) -> Result<&Addr<Supervisor>, Refusal> {
        self.member().map(|member| &member.supervisor)
    }

    /// The mailbox of this node's replica of a shard.
    pub(super) fn replica(&self, shard: ShardId) -> Result<ReplicaAddr, Refusal> {
        self.member()?.router.replica(shard)
    }

    /// This node's id; 0 while it isn't a member.
    pub fn node(&self) -> NodeId {
        self.inner.member.get().map_or(NodeId(0), |m| m.node)
    }

    /// How this node introduces itself when it asks another: as a member of its cluster, so that a node
    /// of another one, at an address that changed hands, refuses.
    pub fn hello(&self) -> HelloConfig {
        match self.inner.member.get() {
            Some(member) => HelloConfig {
                cluster_id: Some(member.router.map().cluster_id),
                node: member.node,
                incarnation: member.incarnation,
            },
            None => HelloConfig::default(),
        }
    }

    /// The cluster map as this node knows it; a cheap snapshot. Empty while it isn't a member.
    pub fn map(&self) -> Arc<ClusterMap> {
        self.inner.member.get().map_or_else(|| self.inner.empty_map.clone(), |m| m.router.map())
    }

    /// Waits until this node knows a cluster map newer than version `since`.
    pub async fn map_after(&self, since: u64) -> Arc<ClusterMap> {
        let mut phase = self.inner.phase.subscribe();
        loop {
            if let Some(member) = self.inner.member.get() {
                return member.router.map_after(since).await;
            }
            // It becomes a member before it is ready.
            if phase.changed().await.is_err() {
                unreachable!("the sender is this node's own");
            }
        }
    }

    /// Whether others may know more of the map than this node: see [`Hearing`](super::hearing::Hearing).
    pub fn is_cut_off(&self) -> bool {
        self.inner.member.get().is_none_or(|member| member.router.hearing().is_cut_off(Instant::now()))
    }

    /// Waits until that is so.
    pub async fn cut_off(&self) {
        if let Some(member) = self.inner.member.get() {
            member.router.hearing().cut_off().await;
        }
    }

    /// Hands operations to this node's replica of `shard`, if `range_version` is the one in force,
    /// and waits for their ends. An outer refusal holds for all of them and means none was started.
    /// When `timeout` passes first, the outcome of each write is unknown.
    pub async fn submit(
        &self,
        shard: ShardId,
        range_version: u64,
        operations: Vec<Operation>,
        timeout: Duration,
    ) -> Result<Vec<Result<Output, Refusal>>, Refusal> {
        self.submit_admitted(shard, range_version, operations, timeout, None, None).await
    }

    /// [`NodeHandle::submit`] of operations that count, as `admitted`, until they have really ended:
    /// that may be after the return of this. Where their time goes is noted on `trace`.
    pub async fn submit_admitted(
        &self,
        shard: ShardId,
        range_version: u64,
        operations: Vec<Operation>,
        timeout: Duration,
        admitted: Option<Arc<Admitted>>,
        trace: Option<Arc<Sheet>>,
    ) -> Result<Vec<Result<Output, Refusal>>, Refusal> {
        let addr = self.member()?.router.replica(shard)?;
        if operations.is_empty() {
            return Ok(Vec::new());
        }
        // Counted before the look at the phase: who waits for the count sees this one or stops it.
        let _counted = InFlight::begin(&self.inner);
        if self.phase() == NodePhase::Stopping {
            return Err(Refusal::Unavailable("the node is stopping".into()));
        }
        let (reply, results) = oneshot::channel();
        let writes: Vec<bool> = operations.iter().map(|o| !matches!(o, Operation::Query(_))).collect();
        if let Some(trace) = &trace {
            trace.stamp(Moment::Submitted, Instant::now());
        }
        addr.try_send(Submit { range_version, operations, reply, admitted, trace }).map_err(|error| {
            match error {
                SendError::Full(_) => Refusal::Busy {
                    what: "the shard's mailbox".into(),
                    retry_after_ms: limits::BUSY_RETRY_MS,
                },
                SendError::Closed(_) => {
                    Refusal::Unavailable("the replica is being rebuilt after a crash".into())
                }
            }
        })?;
        match tokio::time::timeout(timeout, results).await {
            Ok(Ok(results)) => results,
            // The mailbox was dropped with the message in it: the replica crashed before it saw it.
            Ok(Err(_)) => Err(Refusal::Unavailable("the replica is being rebuilt after a crash".into())),
            Err(_) => Ok(writes.into_iter().map(|writes| Err(timed_out(writes))).collect()),
        }
    }

    /// Waits until nothing that was submitted is under way. For the end of a node, so it looks now
    /// and then instead of costing every operation a wake-up.
    pub async fn idle(&self) {
        while self.inner.in_flight.load(Ordering::SeqCst) > 0 {
            tokio::time::sleep(Duration::from_millis(limits::LAST_ANSWERS_MS)).await;
        }
    }

    /// Has the metadata shard's leader, wherever it is, execute a command. Retried until `timeout`:
    /// the metadata commands are made for that, but for a drop by name and a decision that doesn't say by which map it
    /// was made ([`MetaCommand::is_order`]), which end at the first attempt that is in doubt. A refusal in the metadata shard's words means that the command had no effect;
    /// where an earlier attempt may have had one, the outcome is unknown.
    pub async fn meta(&self, command: MetaCommand, timeout: Duration) -> Result<MetaReply, Refusal> {
        let deadline = Instant::now() + timeout;
        let mut attempts = MetaAttempts::at(&command);
        let mut hint = Some(self.node());
        for attempt in 0.. {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(attempts.given_up());
            }
            let map = self.map();
            let Some(metadata) = map.shards.get(&METADATA_SHARD) else {
                return Err(Refusal::Unavailable("the node is not yet a member of a cluster".into()));
            };
            // The leader, if the last answer named one; else each voter in turn.
            let target = hint.take().filter(|node| metadata.member_on(*node).is_some());
            let in_turn = metadata.members.get(attempt % metadata.members.len().max(1));
            let Some(target) = target.or(in_turn.map(|member| member.node)) else {
                return Err(Refusal::Unavailable("the map names no replica of the metadata shard".into()));
            };
            let patience = left.min(Duration::from_millis(limits::META_ATTEMPT_MS));
            let answer = if target == self.node() {
                self.meta_here(command.clone(), patience).await
            } else {
                match map.nodes.get(&target) {
                    Some(node) => {
                        meta_there(&node.peer_address, self.hello(), command.clone(), patience).await
                    }
                    None => {
                        Err(Refusal::Unavailable("the address of the metadata leader is not known".into()))
                    }
                }
            };
            if let Err(Refusal::NotLeader { leader: Some(leader), .. }) = answer {
                hint = Some(leader);
            }
            if let Some(end) = attempts.end(answer) {
                return end;
            }
            tokio::time::sleep(Duration::from_millis(limits::META_RETRY_MS).min(left)).await;
        }
        Err(attempts.given_up())
    }

    /// Executes a metadata command if this node leads the metadata shard.
    pub async fn meta_here(&self, command: MetaCommand, timeout: Duration) -> Result<MetaReply, Refusal> {
        let operation = Operation::Command { command: Command::Meta(command), session: None };
        let range_version = self.map().shards.get(&METADATA_SHARD).map_or(0, |s| s.epoch.range);
        let results = self.submit(METADATA_SHARD, range_version, vec![operation], timeout).await?;
        match results.into_iter().next() {
            Some(Ok(Output::Reply(Reply::Meta(reply)))) => Ok(reply),
            Some(Err(refusal)) => Err(refusal),
            _ => Err(Refusal::Unknown("the metadata shard gave no answer".into())),
        }
    }

    /// This node's own view of itself and its replicas.
    pub async fn report(&self) -> NodeReport {
        let Reported { replicas, snapshot_bytes } = match self.inner.member.get() {
            Some(member) => member.supervisor.send(Report).await.unwrap_or_default(),
            None => Reported::default(),
        };
        NodeReport { replicas, snapshot_bytes, ..self.brief_report() }
    }

    /// The same without what only its replicas, and whoever owns them, can tell: nobody is asked.
    pub fn brief_report(&self) -> NodeReport {
        NodeReport {
            node: self.node(),
            label: self.inner.label.clone(),
            phase: match self.phase() {
                NodePhase::Ready if self.inner.disk.is_full() => NodePhase::ReadOnly,
                phase => phase,
            },
            disk_bytes: self.inner.disk_bytes.load(Ordering::Relaxed),
            replicas: Vec::new(),
            uptime: self.inner.started.elapsed(),
            snapshot_bytes: 0,
            stuck: self.balance().map_or_else(Vec::new, |balance| balance.stuck.clone()),
        }
    }

    /// What the reconciler knows and is at; `None` unless this node leads the metadata shard.
    pub fn balance(&self) -> Option<Arc<BalanceStatus>> {
        self.inner.balance.status()
    }

    pub(super) fn balance_cell(&self) -> &Balance {
        &self.inner.balance
    }

    /// Whether this node's replica of `shard` leads, as far as it knows.
    pub(super) async fn leads(&self, shard: ShardId) -> bool {
        let Some(addr) = self.inner.member.get().and_then(|member| member.router.replica(shard).ok()) else {
            return false;
        };
        let patience = Duration::from_millis(limits::STATUS_MS_MAX);
        let status = tokio::time::timeout(patience, addr.send(AskStatus)).await;
        matches!(status, Ok(Ok(status)) if status.role == raft::StateRole::Leader)
    }

    /// Test hook: makes this node's replica of `shard` fail in the named way. A build without the
    /// feature `test-hooks` refuses.
    pub async fn inject(&self, shard: ShardId, fault: &str) -> Result<(), Refusal> {
        #[cfg(feature = "test-hooks")]
        {
            // These are the whole process's.
            if let Some(rules) = fault.strip_prefix("arm=") {
                return crate::failpoints::arm(rules).map_err(Refusal::Invalid);
            }
            let addr = self.member()?.router.replica(shard)?;
            // The answer never comes if the fault is a panic.
            addr.do_send(Inject(fault.to_owned()));
            Ok(())
        }
        #[cfg(not(feature = "test-hooks"))]
        {
            Err(Refusal::Refused(format!("this build has no test hooks: shard {shard} will not `{fault}`")))
        }
    }
}

/// What the attempts at one metadata command have come to.
#[derive(Default)]
struct MetaAttempts {
    /// No attempt may follow one that is in doubt.
    once: bool,
    /// The last one whose outcome is unknown: the command's then is too, whatever is refused after it.
    unknown: Option<Refusal>,
    /// Why the last one failed.
    last: Option<Refusal>,
}

impl MetaAttempts {
    /// No attempt at `command` yet.
    fn at(command: &MetaCommand) -> MetaAttempts {
        // Repeated, it would hit whichever database has got the name meanwhile, or undo what was decided meanwhile.
        let by_name = matches!(command, MetaCommand::DropDatabase { id: None, .. });
        let once = by_name || command.is_order();
        MetaAttempts { once, ..MetaAttempts::default() }
    }

    /// What `answer` makes of the command; `None` if it is to be tried again.
    ///
    /// After an attempt that may have been carried out, or may yet be, a refusal tells nothing: "there
    /// is no such database" may be what this very command, dropping it, has brought about.
    fn end(&mut self, answer: Result<MetaReply, Refusal>) -> Option<Result<MetaReply, Refusal>> {
        let refused = match answer {
            Ok(MetaReply::Refused(refused)) if self.unknown.is_some() => refused.to_string(),
            Ok(reply) => return Some(Ok(reply)),
            Err(refusal) if refusal.retryable() || refusal == Refusal::Deadline => {
                if refusal.outcome() == Outcome::Unknown {
                    if self.once {
                        return Some(Err(refusal));
                    }
                    self.unknown = Some(refusal.clone());
                }
                self.last = Some(refusal);
                return None;
            }
            Err(refusal) if self.unknown.is_some() => refusal.to_string(),
            Err(refusal) => return Some(Err(refusal)),
        };
        let text = format!("an attempt may have been carried out, and the next was refused: {refused}");
        Some(Err(Refusal::Unknown(text.into())))
    }

    /// The end of a command for which there is no time left.
    fn given_up(self) -> Refusal {
        self.unknown.or(self.last).unwrap_or(Refusal::Deadline)
    }
}

/// A batch of operations that was submitted, until its caller has the results or gave up.
struct InFlight<'a>(&'a Inner);

impl InFlight<'_> {
    fn begin(inner: &Inner) -> InFlight<'_> {
        inner.in_flight.fetch_add(1, Ordering::SeqCst);
        InFlight(inner)
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::SeqCst);
    }
}

fn timed_out(writes: bool) -> Refusal {
    if writes {
        Refusal::Unknown("the deadline passed while the entry was being replicated".into())
    } else {
        Refusal::Unavailable("the deadline passed while the read waited for a quorum".into())
    }
}

async fn meta_there(
    address: &str,
    hello: HelloConfig,
    command: MetaCommand,
    timeout: Duration,
) -> Result<MetaReply, Refusal> {
    match PeerClient::call(address, hello, PeerRequest::Meta(command), timeout).await {
        Ok(PeerResponse::Meta(reply)) => Ok(reply),
        Ok(PeerResponse::Refused(refusal)) => Err(refusal),
        Ok(_) => Err(Refusal::Unknown("a peer gave an answer to another question".into())),
        Err(error @ (CallError::Unreachable { .. } | CallError::Refused { .. })) => {
            tracing::debug!(address, %error, "asking for a metadata command");
            Err(Refusal::Unavailable("the leader of the metadata shard is not in reach".into()))
        }
        Err(error) => {
            tracing::debug!(address, %error, "asking for a metadata command");
            Err(Refusal::Unknown("the connection to the metadata leader was lost".into()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::DatabaseId;
    use crate::machine::command::MetaRefusal;

    #[test]
    fn a_drop_by_name_is_not_repeated_while_an_attempt_is_in_doubt() {
        let drop = |id| MetaCommand::DropDatabase { name: "app".into(), id };
        let elsewhere = || Err(Refusal::NotLeader { shard: METADATA_SHARD, leader: None });
        let lost = || Err(Refusal::Unknown("the connection was lost".into()));
        let mut by_name = MetaAttempts::at(&drop(None));
        assert_eq!(by_name.end(elsewhere()), None, "it certainly had no effect");
        assert_eq!(by_name.end(Err(Refusal::Unavailable("not in reach".into()))), None);
        assert_eq!(by_name.end(lost()), Some(lost()));
        let mut by_id = MetaAttempts::at(&drop(Some(DatabaseId(5))));
        assert_eq!(by_id.end(lost()), None, "the same one is meant");
    }

    #[test]
    fn a_decision_is_repeated_only_if_it_says_by_which_map_it_was_made() {
        let lost = || Err(Refusal::Unknown("the connection was lost".into()));
        let decision = |seen| MetaCommand::SetReplicas { name: "app".into(), replicas: 3 }.seen(seen);
        assert_eq!(MetaAttempts::at(&decision(0)).end(lost()), Some(lost()));
        let mut order = MetaAttempts::at(&decision(7));
        assert_eq!(order.end(lost()), None, "it counts once");
        assert_eq!(order.end(Ok(MetaReply::Done(9))), Some(Ok(MetaReply::Done(9))));
    }

    #[test]
    fn a_refusal_after_an_attempt_in_doubt_is_no_answer() {
        let no_such = || Ok(MetaReply::Refused(MetaRefusal::UnknownDatabase("app".into())));
        let mut attempts = MetaAttempts::default();
        assert_eq!(attempts.end(no_such()), Some(no_such()), "certain at the first attempt");

        let lost = || Err(Refusal::Unknown("the connection was lost".into()));
        let outcome = |end: Option<Result<MetaReply, Refusal>>| end.map(|end| end.map_err(|r| r.outcome()));
        for later in [no_such(), Err(Refusal::Refused("no".into())), Err(Refusal::Invalid("no".into()))] {
            let mut attempts = MetaAttempts::default();
            assert_eq!(attempts.end(Err(Refusal::Unavailable("not in reach".into()))), None);
            assert_eq!(attempts.end(lost()), None);
            assert_eq!(attempts.end(Err(Refusal::Deadline)), None, "certain, but about the last alone");
            assert_eq!(outcome(attempts.end(later)), Some(Err(Outcome::Unknown)));
            assert_eq!(attempts.given_up().outcome(), Outcome::Unknown);
        }
        let mut attempts = MetaAttempts::default();
        assert_eq!(attempts.end(lost()), None);
        assert_eq!(attempts.end(Ok(MetaReply::Formed(1))), Some(Ok(MetaReply::Formed(1))));
    }
}
