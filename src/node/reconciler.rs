//! The reconciler at work: asks all nodes how they are, has [`Reconciler`] decide, and carries that out. It
//! runs on the node that leads the metadata shard, and begins anew wherever that is.
//!
//! ```text
//!   every second      survey ─► all nodes ─► facts ─┐
//!                     map (as applied here) ────────┴─► Reconciler::step ─► actions
//!   actions           commands ─► the metadata shard        orders ─► leaders of shards, here or elsewhere
//! ```
//!
//! Nothing here waits for anything: what is under way ends when it ends, within its time, and what isn't
//! done is named again at a later step. Deciding may take a second where there are very many shards, so that
//! happens off the arbiter, which the metadata replica needs for its heartbeats. Two of these may be at work for a moment while leadership moves. That does no
//! harm: each command and each order names the conf version that it is about.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::future::LocalBoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::task::JoinError;

use super::handle::NodeHandle;
use crate::balance::facts::{Action, Survey};
use crate::balance::reconciler::Reconciler;
use crate::codec::peer::{PeerRequest, PeerResponse};
use crate::codec::survey::{Order, Ordered};
use crate::failpoints::failpoint;
use crate::ids::{METADATA_SHARD, NodeId, ShardId};
use crate::limits;
use crate::machine::command::{MetaCommand, MetaReply};
use crate::placement::map::{ClusterMap, MemberRole, NodeRecord, Standing};
use crate::refusal::Refusal;
use crate::telemetry::metrics as names;
use crate::transport::call::{PeerClient, PeerLine};

mod choice;

/// What the reconciler on this node knows and is at, as of its last step.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct BalanceStatus {
    /// Shards for which something stands still, and why.
    pub stuck: Vec<(ShardId, String)>,
    /// Moves under way.
    pub moves: Vec<MoveProgress>,
    /// Nodes that don't answer, and for how many milliseconds they haven't.
    pub silent_ms: BTreeMap<NodeId, u64>,
    /// Bytes of snapshots that each node has sent since it started, of those that answered last time.
    pub snapshot_bytes: BTreeMap<NodeId, u64>,
}

/// How far a move is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MoveProgress {
    /// The shard.
    pub shard: ShardId,
    /// The move.
    pub id: u64,
    /// How far it is.
    pub step: MoveStep,
}

/// The steps of a move, in order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum MoveStep {
    /// Its new replicas are no members yet.
    Begun,
    /// They are learners, and get the shard's state and log.
    CatchingUp,
    /// They become voters, and others go.
    Joint,
    /// The members are as wanted; that is to be noted.
    Ending,
    /// It is being rolled back.
    RollingBack,
}

/// Where the reconciler shows how it is; `None` while it doesn't run here.
#[derive(Clone, Default)]
pub struct Balance(Arc<Mutex<Option<Arc<BalanceStatus>>>>);

impl Balance {
    /// As of its last step.
    pub fn status(&self) -> Option<Arc<BalanceStatus>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn show(&self, status: Option<BalanceStatus>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = status.map(Arc::new);
    }
}

/// Something that the reconciler is to know.
enum News {
    /// A node has answered, at this time.
    Heard(u64, Survey),
    /// A step for this shard was refused, and why.
    Refused(ShardId, String),
    /// One was taken.
    Done(ShardId),
}

impl News {
    fn tell(self, reconciler: &mut Reconciler) {
        match self {
            News::Heard(now, survey) => reconciler.heard(now, survey),
            News::Refused(shard, why) => reconciler.refused(shard, why),
            News::Done(shard) => reconciler.done(shard),
        }
    }
}

/// A decision, and the map that it was made by.
struct Step {
    reign: u64,
    decided: Result<(Reconciler, Arc<ClusterMap>, Vec<Action>), JoinError>,
}

/// What an action came to.
#[derive(Debug)]
enum Outcome {
    Done,
    Refused(String),
    /// It may have been done or not; the next surveys tell.
    Failed(String),
}

/// Runs for as long as it is polled.
pub async fn run(handle: NodeHandle) {
    let mut shell = Shell::new(handle);
    let mut next = Instant::now();
    loop {
        tokio::select! {
            () = tokio::time::sleep_until(next.into()) => {
                next = Instant::now() + Duration::from_millis(limits::SURVEY_MS);
                if shell.handle.leads(METADATA_SHARD).await {
                    // Whoever hasn't answered the last survey is asked when he has, or his time is over.
                    if !shell.surveys.is_empty() {
                        shell.step();
                    }
                    shell.ask_all();
                } else {
                    shell.rest();
                }
            }
            Some((node, answer)) = shell.surveys.next(), if !shell.surveys.is_empty() => {
                shell.heard(node, answer);
                if shell.surveys.is_empty() {
                    shell.step();
                }
            }
            Some(step) = shell.steps.next(), if !shell.steps.is_empty() => shell.decided(step),
            Some((action, outcome)) = shell.actions.next(), if !shell.actions.is_empty() => {
                if shell.ended(&action, outcome) {
                    // What comes after it needn't wait for a whole second.
                    next = next.min(Instant::now() + Duration::from_millis(limits::SURVEY_SOON_MS));
                }
            }
        }
    }
}

/// The state of [`run`].
struct Shell {
    handle: NodeHandle,
    began: Instant,
    /// While this node leads the metadata shard: which time it does.
    reign: Option<u64>,
    reigns: u64,
    /// While it leads; but not while it decides.
    reconciler: Option<Reconciler>,
    /// What has come while it decides.
    news: Vec<News>,
    steps: FuturesUnordered<LocalBoxFuture<'static, Step>>,
    surveys: FuturesUnordered<LocalBoxFuture<'static, (NodeId, Result<Surveyed, String>)>>,
    asked: HashSet<NodeId>,
    /// Connections to nodes that have answered the last survey, while this node leads.
    lines: HashMap<NodeId, PeerLine>,
    actions: FuturesUnordered<LocalBoxFuture<'static, (Action, Outcome)>>,
    /// Those that are under way.
    at_work: Vec<Action>,
    snapshot_bytes: BTreeMap<NodeId, u64>,
}

impl Shell {
    fn new(handle: NodeHandle) -> Shell {
        Shell {
            handle,
            began: Instant::now(),
            reign: None,
            reigns: 0,
            reconciler: None,
            news: Vec::new(),
            steps: FuturesUnordered::new(),
            surveys: FuturesUnordered::new(),
            asked: HashSet::new(),
            lines: HashMap::new(),
            actions: FuturesUnordered::new(),
            at_work: Vec::new(),
            snapshot_bytes: BTreeMap::new(),
        }
    }

    /// Another node leads: nothing is known that was learned before.
    fn rest(&mut self) {
        if self.reign.take().is_some() {
            self.reconciler = None;
            self.news.clear();
            tracing::info!(
                "this node doesn't lead the metadata shard any more, and leaves moves to the one that does"
            );
            self.surveys.clear();
            self.asked.clear();
            self.lines.clear();
            self.snapshot_bytes.clear();
            self.handle.balance_cell().show(None);
        }
    }

    /// Asks all nodes that belong to the cluster and haven't been asked yet.
    fn ask_all(&mut self) {
        if self.reign.is_none() {
            tracing::debug!("this node leads the metadata shard: the reconciler begins");
            self.reigns += 1;
            self.reign = Some(self.reigns);
            self.reconciler = Some(Reconciler::new());
        }
        let map = self.handle.map();
        for record in map.nodes.values().filter(|record| is_asked(record)) {
            if self.asked.insert(record.id) {
                let (handle, node, address) = (self.handle.clone(), record.id, record.peer_address.clone());
                let line = self.lines.remove(&node).filter(|line| line.address() == address);
                self.surveys
                    .push(Box::pin(async move { (node, survey(&handle, node, &address, line).await) }));
            }
        }
        // Those of nodes that don't belong to the cluster any more.
        self.lines.retain(|node, _| map.nodes.get(node).is_some_and(is_asked));
    }

    fn heard(&mut self, node: NodeId, answer: Result<Surveyed, String>) {
        self.asked.remove(&node);
        let now = self.now_ms();
        match answer {
            Ok(Surveyed { survey, line }) => {
                self.lines.extend(line.map(|line| (node, line)));
                self.snapshot_bytes.insert(node, survey.snapshot_bytes);
                self.tell(News::Heard(now, survey));
            }
            Err(error) => {
                self.snapshot_bytes.remove(&node);
                tracing::debug!(%node, error, "a node doesn't tell how it is");
            }
        }
    }

    /// Time since this began, in milliseconds: a clock that never goes back.
    fn now_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn tell(&mut self, news: News) {
        match &mut self.reconciler {
            Some(reconciler) => news.tell(reconciler),
            None if self.reign.is_some() => self.news.push(news),
            None => {}
        }
    }

    /// Has the reconciler decide, unless it is at it.
    fn step(&mut self) {
        let (now, map) = (self.now_ms(), self.handle.map());
        if map.version == 0 {
            // The cluster isn't formed.
            return;
        }
        let Some((mut reconciler, reign)) = self.reconciler.take().zip(self.reign) else {
            return;
        };
        self.steps.push(Box::pin(async move {
            let decide = move || {
                let actions = reconciler.step(now, &map);
                (reconciler, map, actions)
            };
            Step { reign, decided: tokio::task::spawn_blocking(decide).await }
        }));
    }

    /// The reconciler has decided: begins what is to be done.
    fn decided(&mut self, Step { reign, decided }: Step) {
        if self.reign != Some(reign) {
            return;
        }
        let (mut reconciler, map, actions) = match decided {
            Ok(decided) => decided,
            Err(error) => {
                // The cluster serves on as it is; and a panic here must not go from leader to leader.
                let reason = super::panics::last().unwrap_or_else(|| error.to_string());
                tracing::error!(reason, "the reconciler has failed, and begins anew");
                self.reconciler = Some(Reconciler::new());
                self.news.clear();
                return;
            }
        };
        for news in self.news.drain(..) {
            news.tell(&mut reconciler);
        }
        let silent = map.nodes.values().filter(|record| is_asked(record)).map(|record| record.id);
        let silent = silent.map(|node| (node, reconciler.silent_ms(node))).filter(|(_, ms)| *ms > 0);
        let status = BalanceStatus {
            stuck: reconciler.stuck(),
            moves: progress(&map),
            silent_ms: silent.collect(),
            snapshot_bytes: self.snapshot_bytes.clone(),
        };
        self.handle.balance_cell().show(Some(status));
        let (begun, put_off) = choice::choose(actions, &self.at_work, limits::ORDERS_MAX);
        for action in &put_off {
            reconciler.put_off(action);
        }
        self.reconciler = Some(reconciler);
        for action in begun {
            tracing::debug!(?action, "the reconciler acts");
            self.at_work.push(action.clone());
            let (handle, map) = (self.handle.clone(), map.clone());
            self.actions.push(Box::pin(async move {
                let outcome = carry_out(&handle, &map, &action).await;
                (action, outcome)
            }));
        }
    }

    /// An action has come to its end. Whether it did what it was to do.
    fn ended(&mut self, action: &Action, outcome: Outcome) -> bool {
        if let Some(at) = self.at_work.iter().position(|other| other == action) {
            self.at_work.swap_remove(at);
        }
        let label = match &outcome {
            Outcome::Done => "done",
            Outcome::Refused(_) => "refused",
            Outcome::Failed(_) => "failed",
        };
        metrics::counter!(names::RECONCILER_STEPS, "outcome" => label).increment(1);
        match outcome {
            Outcome::Done => {
                count_end(action, &self.handle.map());
                tracing::info!(action = describe(action), "the reconciler has done a step");
                if let Some(shard) = shard_of(action) {
                    self.tell(News::Done(shard));
                }
                true
            }
            Outcome::Refused(why) | Outcome::Failed(why) => {
                tracing::debug!(action = describe(action), why, label, "a step of the reconciler");
                if let Some(shard) = shard_of(action) {
                    self.tell(News::Refused(shard, why));
                }
                false
            }
        }
    }
}

/// Whether a node is asked how it is: one that belongs to the cluster, or did and may still hold something.
fn is_asked(record: &NodeRecord) -> bool {
    !matches!(record.standing, Standing::Pending | Standing::Removed)
}

/// What a node has told, and the connection for the next time; none to this node itself.
struct Surveyed {
    survey: Survey,
    line: Option<PeerLine>,
}

/// Asks a node how it is, on the connection `line` if there is one that leads there and still stands.
async fn survey(
    handle: &NodeHandle,
    node: NodeId,
    address: &str,
    line: Option<PeerLine>,
) -> Result<Surveyed, String> {
    let patience = Duration::from_millis(limits::SURVEY_MS_MAX);
    let asked = async {
        if node == handle.node() {
            let survey = handle.survey().await.map_err(|refusal| refusal.to_string())?;
            return Ok(Surveyed { survey, line: None });
        }
        let answered = match line {
            Some(line) => line.ask(PeerRequest::Survey, patience).await.ok(),
            None => None,
        };
        let (line, response) = match answered {
            Some(answered) => answered,
            // The node may have been started anew, or have closed it; nothing comes of asking twice.
            None => {
                let line = PeerLine::open(address, handle.hello(), patience).await;
                let asked = line.map_err(|error| error.to_string())?.ask(PeerRequest::Survey, patience).await;
                asked.map_err(|error| error.to_string())?
            }
        };
        match response {
            // Another may run at its address by now.
            PeerResponse::Survey(survey) if survey.node == node => Ok(Surveyed { survey, line: Some(line) }),
            PeerResponse::Survey(survey) => Err(format!("node {} answers at {address}", survey.node)),
            PeerResponse::Refused(refusal) => Err(refusal.to_string()),
            _ => Err("it gave an answer to another question".into()),
        }
    };
    tokio::time::timeout(patience, asked).await.unwrap_or_else(|_| Err("it took too long".to_owned()))
}

async fn carry_out(handle: &NodeHandle, map: &ClusterMap, action: &Action) -> Outcome {
    let (node, order) = match action {
        Action::Meta(command) => return propose(handle, command.clone()).await,
        Action::Change { node, shard, conf, change } => {
            let what = Ordered::Change { conf: *conf, change: change.clone() };
            (*node, Order { shard: *shard, what })
        }
        Action::Transfer { node, shard, to } => {
            (*node, Order { shard: *shard, what: Ordered::Transfer(*to) })
        }
    };
    failpoint!(ReconcileOrderBefore);
    let patience = Duration::from_millis(limits::ORDER_MS_MAX);
    let answer = if node == handle.node() {
        handle.order(order, patience).await
    } else {
        order_there(handle, map, node, order, patience).await
    };
    failpoint!(ReconcileOrderAfter);
    match answer {
        Ok(()) => Outcome::Done,
        Err(refusal) if refusal.outcome() == crate::refusal::Outcome::Unknown => {
            Outcome::Failed(refusal.to_string())
        }
        Err(refusal) => Outcome::Refused(refusal.to_string()),
    }
}

async fn propose(handle: &NodeHandle, command: MetaCommand) -> Outcome {
    failpoint!(ReconcileMetaBefore);
    let patience = Duration::from_millis(limits::ORDER_MS_MAX);
    // Here or nowhere: if another node leads by now, that one decides what is to be done.
    let reply = handle.meta_here(command, patience).await;
    failpoint!(ReconcileMetaAfter);
    match reply {
        Ok(MetaReply::Refused(refusal)) => Outcome::Refused(refusal.to_string()),
        Ok(_) => Outcome::Done,
        Err(refusal) => Outcome::Failed(refusal.to_string()),
    }
}

async fn order_there(
    handle: &NodeHandle,
    map: &ClusterMap,
    node: NodeId,
    order: Order,
    patience: Duration,
) -> Result<(), Refusal> {
    let Some(record) = map.nodes.get(&node) else {
        return Err(Refusal::Unavailable(format!("node {node} isn't known").into()));
    };
    // The other side gives up first, and says how far it came.
    let patience = patience + Duration::from_millis(limits::CONNECT_MS_MAX);
    let request = PeerRequest::Order(order);
    match PeerClient::call(&record.peer_address, handle.hello(), request, patience).await {
        Ok(PeerResponse::Done) => Ok(()),
        Ok(PeerResponse::Refused(refusal)) => Err(refusal),
        Ok(_) => Err(Refusal::Unknown("a node gave an answer to another question".into())),
        Err(error) => Err(Refusal::Unknown(error.to_string().into())),
    }
}

/// The shard that an action is about.
fn shard_of(action: &Action) -> Option<ShardId> {
    match action {
        Action::Change { shard, .. } | Action::Transfer { shard, .. } => Some(*shard),
        Action::Meta(
            MetaCommand::ObserveShard { shard, .. }
            | MetaCommand::BeginMove { shard, .. }
            | MetaCommand::CancelMove { shard, .. }
            | MetaCommand::EndMove { shard, .. },
        ) => Some(*shard),
        Action::Meta(_) => None,
    }
}

/// An action in a line of the log.
fn describe(action: &Action) -> String {
    match action {
        Action::Meta(MetaCommand::ObserveShard { shard, conf, .. }) => {
            format!("shard {shard} has conf version {conf}")
        }
        Action::Meta(MetaCommand::BeginMove { shard, adds, removes, cause, .. }) => {
            format!("begin a move of shard {shard}: {adds:?} for {removes:?} ({cause:?})")
        }
        Action::Meta(MetaCommand::CancelMove { shard, id }) => {
            format!("roll back move {id} of shard {shard}")
        }
        Action::Meta(MetaCommand::EndMove { shard, id }) => format!("end move {id} of shard {shard}"),
        Action::Meta(MetaCommand::BeginRebalance { plan, moves, .. }) => {
            format!("begin rebalancing {plan} of {moves} replicas")
        }
        Action::Meta(command) => format!("{command:?}"),
        Action::Change { node, shard, change, .. } => {
            format!("shard {shard}, led on node {node}: {change:?}")
        }
        Action::Transfer { node, shard, to } => format!("shard {shard}: node {to} leads instead of {node}"),
    }
}

/// Counts a move that has just ended. `map`: from before, or from after that; then nobody tells any more
/// whether it was rolled back, which is rare.
fn count_end(action: &Action, map: &ClusterMap) {
    if let Action::Meta(MetaCommand::EndMove { shard, .. }) = action {
        let moving = map.shards.get(shard).and_then(|record| record.moving.as_ref());
        let outcome = if moving.is_some_and(|moving| moving.cancelling) { "rolled_back" } else { "done" };
        metrics::counter!(names::MOVES_ENDED, "outcome" => outcome).increment(1);
    }
}

/// How far the moves are, as the map tells.
fn progress(map: &ClusterMap) -> Vec<MoveProgress> {
    let moving = map.shards.values().filter_map(|record| {
        let moving = record.moving.as_ref()?;
        let is_member = |replica| record.node_of(replica).is_some();
        let joint = |role| matches!(role, MemberRole::Incoming | MemberRole::Outgoing);
        let joint = record.members.iter().any(|member| joint(member.role));
        let added = moving.adds.iter().filter(|add| is_member(add.replica)).count();
        let voters = moving.adds.iter().all(|add| {
            let member = record.members.iter().find(|member| member.replica == add.replica);
            member.is_some_and(|member| member.role.stays_voter())
        });
        let step = if joint {
            MoveStep::Joint
        } else if voters && !moving.removes.iter().any(|replica| is_member(*replica)) {
            MoveStep::Ending
        } else if moving.cancelling {
            MoveStep::RollingBack
        } else if added < moving.adds.len() {
            MoveStep::Begun
        } else {
            MoveStep::CatchingUp
        };
        Some(MoveProgress { shard: record.id, id: moving.id, step })
    });
    moving.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{DatabaseId, Epoch, ReplicaId};
    use crate::placement::map::{Member, MoveCause, ShardMove, ShardRecord};
    use crate::placement::ring::RingRange;

    fn map(members: &[(u64, MemberRole)], moving: Option<ShardMove>) -> ClusterMap {
        let member = |&(id, role)| Member { replica: ReplicaId(id), node: NodeId(id), role };
        let record = ShardRecord {
            id: ShardId(4),
            database: DatabaseId(1),
            range: RingRange::ALL,
            epoch: Epoch { range: 1, conf: 3 },
            members: members.iter().map(member).collect(),
            dropped: false,
            moving,
            target: None,
            previous: None,
            changed_at: 9,
        };
        ClusterMap { shards: [(record.id, record)].into(), ..ClusterMap::default() }
    }

    #[test]
    fn how_far_a_move_is_the_members_tell() {
        use MemberRole::{Incoming, Learner, Outgoing, Voter};
        let step = |members: &[(u64, MemberRole)], cancelling| {
            let add = Member { replica: ReplicaId(9), node: NodeId(9), role: Learner };
            let (adds, removes) = (vec![add], vec![ReplicaId(1)]);
            let moving = ShardMove { id: 7, adds, removes, cancelling, cause: MoveCause::Repair };
            let [progress] = progress(&map(members, Some(moving)))[..] else { panic!("one move") };
            assert_eq!((progress.shard, progress.id), (ShardId(4), 7));
            progress.step
        };
        let steps = [
            (&[(1, Voter), (2, Voter)][..], MoveStep::Begun),
            (&[(1, Voter), (2, Voter), (9, Learner)], MoveStep::CatchingUp),
            (&[(1, Outgoing), (2, Voter), (9, Incoming)], MoveStep::Joint),
            (&[(2, Voter), (9, Voter)], MoveStep::Ending),
        ];
        for (members, expected) in steps {
            assert_eq!(step(members, false), expected);
            // One that has come to the joint change ends as it was meant to.
            let rolls_back = expected < MoveStep::Joint;
            assert_eq!(step(members, true), if rolls_back { MoveStep::RollingBack } else { expected });
        }
        assert_eq!(progress(&map(&[(1, Voter)], None)), []);
    }
}
