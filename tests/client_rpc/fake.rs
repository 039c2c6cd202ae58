//! Scripted nodes: each listens on a port of its own, answers the public protocol, and fails on cue.
//! All share one store, whose version counts every write.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::io::Write;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use capnp_rpc::rpc_twoparty_capnp::Side;
use capnp_rpc::{RpcSystem, new_client, twoparty};
use pontoon::codec::records::{read_standing, write_database, write_delta};
use pontoon::codec::refusal::write_refusal;
use pontoon::ids::{DatabaseId, Epoch, NodeId, RandomId, ReplicaId, ShardId};
use pontoon::placement::map::{
    ClusterMap, DatabaseRecord, Member, MemberRole, NodeRecord, ShardRecord, Standing,
};
use pontoon::placement::ring::{self, equal_ranges};
use pontoon::refusal::Refusal;
use pontoon::schema::admin_capnp::admin;
use pontoon::schema::kv_capnp::{batch_request, batch_response, expect, gate, kv, op_result, operation};
use pontoon::transport::rpc_stream::{reader_options, rpc_streams};
use tokio::sync::{Notify, oneshot};
use tokio::task::spawn_local;

/// What a node does with a batch.
#[derive(Clone, Debug)]
pub enum Act {
    Serve,
    Slow(Duration),
    NotLeader(Option<u64>),
    Busy(u32),
    /// Applies everything, but says that the outcome is unknown.
    Unknown,
    /// Applies everything, then closes the connection instead of answering.
    ApplyAndDrop,
    /// Forgets all sessions, as a shard does in time, then serves.
    Forget,
    /// Takes the call and never answers.
    Hang,
    /// Stands still for so long, as a stopped process does, and goes on then.
    Freeze(Duration),
    /// Refuses at the gate.
    WrongVersion,
}

type Store = BTreeMap<Vec<u8>, (Vec<u8>, u64)>;

/// What became of an operation.
#[derive(Clone)]
enum Done {
    Value(Option<(Vec<u8>, u64)>),
    Written(u64),
    Deleted(Option<u64>),
    Mismatch(Option<(Vec<u8>, u64)>),
}

/// What a batch said of its session.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Tags {
    pub session: Vec<u8>,
    pub open_ttl_ms: u32,
    pub acked_below: u64,
    pub sequences: Vec<u64>,
}

#[derive(Default)]
struct Shared {
    map: ClusterMap,
    store: Store,
    version: u64,
    always: HashMap<u64, Act>,
    next: HashMap<u64, VecDeque<Act>>,
    /// Operations in each batch, by node.
    calls: HashMap<u64, Vec<usize>>,
    /// What each of those batches said of its session.
    tags: Vec<Tags>,
    /// Ids that databases were to be dropped by.
    drops: Vec<u64>,
    orders: Vec<u64>,
    /// Nodes that know of no call that waits for a newer map.
    old: BTreeSet<u64>,
    /// Nodes that say that they don't hear from the metadata shard.
    cut_off: BTreeSet<u64>,
    /// Nodes that have heard of nothing since, and the map from then.
    behind: HashMap<u64, ClusterMap>,
    /// Connections that are open, by node.
    open: HashMap<u64, usize>,
    /// Calls for the map, by node: those that wait, and those that don't.
    map_calls: HashMap<u64, (usize, usize)>,
    /// By shard and session: what its commands came to.
    sessions: HashMap<(u64, Vec<u8>), HashMap<u64, Done>>,
}

/// A cluster of scripted nodes with one database, `db`, each of whose shards has a replica on each node.
pub struct Fakes {
    shared: Arc<Mutex<Shared>>,
    stops: Mutex<HashMap<u64, oneshot::Sender<()>>>,
}

/// An address on which nobody listens.
pub fn dead_address() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

/// An address at which connections are accepted, and nothing more comes, while the listener lives: the
/// client port of a node that hangs.
pub fn hung_address() -> (std::net::TcpListener, String) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (listener, address)
}

/// The peer port of a node whose client port is 192.0.2.1:7101, as a client sees it.
pub fn peer_port() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let answer = pontoon::transport::foreign::abort_for_client("192.0.2.1:7101").unwrap();
            // A client that is gone already needs no answer.
            stream.write_all(&answer).and_then(|()| stream.shutdown(std::net::Shutdown::Write)).ok();
            std::io::copy(&mut stream, &mut std::io::sink()).ok();
        }
    });
    address
}

impl Fakes {
    pub fn start(nodes: u64, shards: u32) -> Fakes {
        let shared = Arc::new(Mutex::new(Shared::default()));
        let mut map = ClusterMap { cluster_id: RandomId([1; 16]), version: 1, ..ClusterMap::default() };
        let mut stops = HashMap::new();
        for id in 1..=nodes {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            listener.set_nonblocking(true).unwrap();
            let record = NodeRecord {
                id: NodeId(id),
                label: String::new(),
                client_address: listener.local_addr().unwrap().to_string(),
                peer_address: String::new(),
                zone: String::new(),
                weight: 100,
                store_id: RandomId::default(),
                standing: Standing::Member,
                changed_at: 1,
            };
            map.nodes.insert(record.id, record);
            let (stop, stopped) = oneshot::channel();
            stops.insert(id, stop);
            let shared = shared.clone();
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                let local = tokio::task::LocalSet::new();
                local.block_on(&runtime, async {
                    tokio::select! {
                        _ = stopped => (),
                        () = listen(listener, id, shared) => (),
                    }
                });
            });
        }
        let ranges = equal_ranges(shards);
        for (id, range) in (1u64..).zip(ranges) {
            let members = (1..=nodes).map(|node| Member {
                replica: ReplicaId(id * 100 + node),
                node: NodeId(node),
                role: MemberRole::Voter,
            });
            let record = ShardRecord {
                id: ShardId(id),
                database: DatabaseId(1),
                range,
                epoch: Epoch { range: 1, conf: 1 },
                members: members.collect(),
                dropped: false,
                moving: None,
                target: None,
                previous: None,
                changed_at: 1,
            };
            map.shards.insert(record.id, record);
        }
        let database = DatabaseRecord {
            id: DatabaseId(1),
            name: "db".into(),
            replicas: nodes as u32,
            shards: map.shards.keys().copied().collect(),
            dropped: false,
            changed_at: 1,
        };
        map.databases.insert(database.id, database);
        shared.lock().unwrap().map = map;
        Fakes { shared, stops: Mutex::new(stops) }
    }

    pub fn address(&self, node: u64) -> String {
        let shared = self.shared.lock().unwrap();
        shared.map.nodes[&NodeId(node)].client_address.clone()
    }

    /// What `node` does where nothing else is next.
    pub fn always(&self, node: u64, act: Act) {
        self.shared.lock().unwrap().always.insert(node, act);
    }

    /// What `node` does once.
    pub fn next(&self, node: u64, act: Act) {
        let mut shared = self.shared.lock().unwrap();
        shared.next.entry(node).or_default().push_back(act);
    }

    /// Sizes of the batches that came to `node`.
    pub fn calls(&self, node: u64) -> Vec<usize> {
        let shared = self.shared.lock().unwrap();
        shared.calls.get(&node).cloned().unwrap_or_default()
    }

    /// What the batches to all nodes said of their sessions.
    pub fn tags(&self) -> Vec<Tags> {
        self.shared.lock().unwrap().tags.clone()
    }

    /// The ids in all requests to drop a database.
    pub fn drops(&self) -> Vec<u64> {
        self.shared.lock().unwrap().drops.clone()
    }

    /// By which map version each order about a node was given.
    pub fn orders(&self) -> Vec<u64> {
        self.shared.lock().unwrap().orders.clone()
    }

    /// `node` is one of an older version, where no call can wait for a newer map.
    pub fn is_old(&self, node: u64) {
        self.shared.lock().unwrap().old.insert(node);
    }

    /// `node` says from now on whether it is cut off from the metadata shard.
    pub fn is_cut_off(&self, node: u64, cut_off: bool) {
        let shared = &mut self.shared.lock().unwrap().cut_off;
        if cut_off {
            shared.insert(node)
        } else {
            shared.remove(&node)
        };
    }

    /// `node` is cut off, and hears of no change of the map from now on.
    pub fn stays_behind(&self, node: u64) {
        self.is_cut_off(node, true);
        let mut shared = self.shared.lock().unwrap();
        let map = shared.map.clone();
        shared.behind.insert(node, map);
    }

    /// Connections to `node` that are open.
    pub fn open(&self, node: u64) -> usize {
        self.shared.lock().unwrap().open.get(&node).copied().unwrap_or_default()
    }

    /// Calls for the map that came to `node`: those that wait for news, and those that don't.
    pub fn map_calls(&self, node: u64) -> (usize, usize) {
        let shared = self.shared.lock().unwrap();
        shared.map_calls.get(&node).copied().unwrap_or_default()
    }

    pub fn change_map(&self, change: impl FnOnce(&mut ClusterMap)) {
        change(&mut self.shared.lock().unwrap().map);
    }

    /// Closes the port and all connections of `node`.
    pub fn kill(&self, node: u64) {
        self.stops.lock().unwrap().remove(&node);
        std::thread::sleep(Duration::from_millis(50));
    }
}

async fn listen(listener: std::net::TcpListener, node: u64, shared: Arc<Mutex<Shared>>) {
    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let (reader, writer, flusher) = rpc_streams(stream).unwrap();
        let network = twoparty::VatNetwork::new(reader, writer, Side::Server, reader_options());
        let fake = Fake { node, shared: shared.clone(), drop: Rc::default() };
        let gone = fake.drop.clone();
        let gate: gate::Client = new_client(fake);
        let system = RpcSystem::new(Box::new(network), Some(gate.client));
        let flusher = spawn_local(flusher);
        *shared.lock().unwrap().open.entry(node).or_default() += 1;
        let shared = shared.clone();
        spawn_local(async move {
            tokio::select! {
                _ = system => (),
                () = gone.notified() => flusher.abort(),
            }
            *shared.lock().unwrap().open.entry(node).or_default() -= 1;
        });
    }
}

#[derive(Clone)]
struct Fake {
    node: u64,
    shared: Arc<Mutex<Shared>>,
    /// Closes the connection.
    drop: Rc<Notify>,
}

impl Fake {
    fn act(&self) -> Act {
        let mut shared = self.shared.lock().unwrap();
        let next = shared.next.get_mut(&self.node);
        next.and_then(VecDeque::pop_front)
            .or_else(|| shared.always.get(&self.node).cloned())
            .unwrap_or(Act::Serve)
    }
}

impl gate::Server for Fake {
    async fn open(
        self: Rc<Self>,
        _: gate::OpenParams,
        mut results: gate::OpenResults,
    ) -> Result<(), capnp::Error> {
        let shared = self.shared.lock().unwrap();
        if let Some(Act::WrongVersion) = shared.always.get(&self.node) {
            return Err(capnp::Error::failed("no shared protocol version".into()));
        }
        let mut answer = results.get();
        let mut welcome = answer.reborrow().init_welcome();
        welcome.set_protocol(pontoon::version::PROTOCOL_MAX);
        welcome.set_node(self.node);
        welcome.set_cluster_id(&shared.map.cluster_id.0);
        answer.set_kv(new_client((*self).clone()));
        answer.set_admin(new_client((*self).clone()));
        Ok(())
    }
}

impl admin::Server for Fake {
    async fn set_standing(
        self: Rc<Self>,
        params: admin::SetStandingParams,
        mut results: admin::SetStandingResults,
    ) -> Result<(), capnp::Error> {
        let act = self.act();
        let request = params.get()?;
        let (node, seen) = (NodeId(request.get_node()), request.get_seen());
        let standing = read_standing(request.get_standing()).unwrap();
        {
            let mut shared = self.shared.lock().unwrap();
            shared.orders.push(seen);
            let mut version = shared.map.version;
            let record = shared.map.nodes.get_mut(&node).unwrap();
            if record.standing != standing {
                if record.changed_at > seen {
                    let refusal = Refusal::Changed { what: "the node".into(), version: record.changed_at };
                    write_refusal(&refusal, results.get().init_result().init_error());
                    return Ok(());
                }
                version += 1;
                (record.standing, record.changed_at) = (standing, version);
            }
            results.get().init_result().set_version(version);
            if let Act::ApplyAndDrop = act {
                // Before anybody asks again, somebody else takes it back.
                version += 1;
                (record.standing, record.changed_at) = (Standing::Member, version);
            }
            shared.map.version = version;
        }
        if let Act::ApplyAndDrop = act {
            self.drop.notify_one();
            std::future::pending::<()>().await;
        }
        Ok(())
    }

    async fn drop_database(
        self: Rc<Self>,
        params: admin::DropDatabaseParams,
        mut results: admin::DropDatabaseResults,
    ) -> Result<(), capnp::Error> {
        let act = self.act();
        if let Act::Hang = act {
            std::future::pending::<()>().await;
        }
        let (name, id) = (params.get()?.get_name()?.to_string()?, params.get()?.get_database());
        {
            let mut shared = self.shared.lock().unwrap();
            shared.drops.push(id);
            let living =
                shared.map.database(&name).map(|d| d.id).filter(|living| [0, living.0].contains(&id));
            let Some(living) = living else {
                write_refusal(&Refusal::UnknownDatabase(name), results.get().init_result().init_error());
                return Ok(());
            };
            shared.map.version += 1;
            let changed_at = shared.map.version;
            let database = shared.map.databases.get_mut(&living).unwrap();
            (database.dropped, database.changed_at) = (true, changed_at);
            write_database(database, results.get().init_result().init_database());
            if let Act::ApplyAndDrop = act {
                // Before anybody asks again, somebody else makes another of the name.
                let id = DatabaseId(living.0 + 1);
                let another = DatabaseRecord { id, dropped: false, ..database.clone() };
                shared.map.databases.insert(id, another);
            }
        }
        if let Act::ApplyAndDrop = act {
            self.drop.notify_one();
            std::future::pending::<()>().await;
        }
        Ok(())
    }
}

impl kv::Server for Fake {
    async fn map(
        self: Rc<Self>,
        params: kv::MapParams,
        mut results: kv::MapResults,
    ) -> Result<(), capnp::Error> {
        let mut shared = self.shared.lock().unwrap();
        shared.map_calls.entry(self.node).or_default().1 += 1;
        let map = shared.behind.get(&self.node).unwrap_or(&shared.map);
        let delta = map.delta(params.get()?.get_since());
        results.get().set_cut_off(shared.cut_off.contains(&self.node));
        write_delta(&delta, results.get().init_delta());
        Ok(())
    }

    async fn watch_map(
        self: Rc<Self>,
        params: kv::WatchMapParams,
        mut results: kv::WatchMapResults,
    ) -> Result<(), capnp::Error> {
        let (since, ms) = (params.get()?.get_since(), params.get()?.get_timeout_ms());
        {
            let mut shared = self.shared.lock().unwrap();
            if shared.old.contains(&self.node) {
                return Err(capnp::Error::unimplemented("no such method".into()));
            }
            shared.map_calls.entry(self.node).or_default().0 += 1;
        }
        let until = tokio::time::Instant::now() + Duration::from_millis(ms.into());
        loop {
            let (map, cut_off) = {
                let shared = self.shared.lock().unwrap();
                (shared.map.clone(), shared.cut_off.contains(&self.node))
            };
            if cut_off || map.version > since || tokio::time::Instant::now() >= until {
                results.get().set_cut_off(cut_off);
                write_delta(&map.delta(since), results.get().init_delta());
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn batch(
        self: Rc<Self>,
        params: kv::BatchParams,
        mut results: kv::BatchResults,
    ) -> Result<(), capnp::Error> {
        let request = params.get()?.get_request()?;
        let operations = request.get_operations()?;
        let shard = ShardId(request.get_shard());
        let act = self.act();
        let stale = {
            let mut shared = self.shared.lock().unwrap();
            let calls = shared.calls.entry(self.node).or_default();
            calls.push(operations.len() as usize);
            shared.tags.push(Tags {
                session: request.get_session()?.to_vec(),
                open_ttl_ms: request.get_open_ttl_ms(),
                acked_below: request.get_acked_below(),
                sequences: operations.iter().map(|o| o.get_sequence()).collect(),
            });
            let record = &shared.map.shards[&shard];
            let keys = operations.iter().map(|o| o.get_key().unwrap());
            for key in keys {
                assert!(record.range.contains(ring::position(key)), "misrouted");
            }
            (record.epoch.range != request.get_range_version()).then_some(record.epoch.range)
        };
        let refusal = match act {
            Act::Serve | Act::WrongVersion | Act::ApplyAndDrop => None,
            Act::Forget => {
                self.shared.lock().unwrap().sessions.clear();
                None
            }
            Act::Slow(time) => {
                tokio::time::sleep(time).await;
                None
            }
            Act::Hang => {
                std::future::pending::<()>().await;
                None
            }
            Act::Freeze(time) => {
                std::thread::sleep(time);
                None
            }
            Act::NotLeader(leader) => Some(Refusal::NotLeader { shard, leader: leader.map(NodeId) }),
            Act::Busy(retry_after_ms) => {
                Some(Refusal::Busy { what: "pending operations".into(), retry_after_ms })
            }
            Act::Unknown => Some(Refusal::Unknown("leadership was lost".into())),
        };
        let act = (act, refusal, stale);
        let closes = self.answer(act, request, results.get().init_response())?;
        if closes {
            self.drop.notify_one();
            std::future::pending::<()>().await;
        }
        Ok(())
    }

    async fn scan(
        self: Rc<Self>,
        params: kv::ScanParams,
        mut results: kv::ScanResults,
    ) -> Result<(), capnp::Error> {
        let request = params.get()?.get_request()?;
        let shared = self.shared.lock().unwrap();
        let range = shared.map.shards[&ShardId(request.get_shard())].range;
        let (prefix, after) = (request.get_prefix()?, request.get_after()?);
        // Small pages, so that there are many.
        let limit = request.get_limit().min(7) as usize;
        let wanted =
            |key: &[u8]| range.contains(ring::position(key)) && key.starts_with(prefix) && key > after;
        let found: Vec<_> = shared.store.iter().filter(|(k, _)| wanted(k)).collect();
        let mut page = results.get().init_response().init_page();
        page.set_more(found.len() > limit);
        let count = found.len().min(limit) as u32;
        let mut pairs = page.init_pairs(count);
        for (at, (key, (value, version))) in (0..count).zip(found) {
            let mut pair = pairs.reborrow().get(at);
            pair.set_key(key);
            pair.set_value(value);
            pair.set_version(*version);
        }
        Ok(())
    }
}

impl Fake {
    /// Does what `act` says with a batch. Returns whether the connection is to be closed instead of
    /// answering.
    fn answer(
        &self,
        (act, refusal, stale): (Act, Option<Refusal>, Option<u64>),
        request: batch_request::Reader<'_>,
        mut response: batch_response::Builder<'_>,
    ) -> Result<bool, capnp::Error> {
        let (shard, operations) = (ShardId(request.get_shard()), request.get_operations()?);
        let mut shared = self.shared.lock().unwrap();
        if let Some(range_version) = stale {
            let refusal = Refusal::StaleRoute { shard, asked: request.get_range_version(), range_version };
            write_refusal(&refusal, response.reborrow().init_error());
            let mut route = shared.map.delta(0);
            route.since = route.version;
            write_delta(&route, response.init_route());
            return Ok(false);
        }
        let unknown = matches!(act, Act::Unknown);
        let mut list = match refusal {
            Some(refusal) if !unknown => {
                write_refusal(&refusal, response.init_error());
                return Ok(false);
            }
            refusal => {
                let mut list = response.init_results(operations.len());
                if let Some(refusal) = refusal {
                    for at in 0..list.len() {
                        write_refusal(&refusal, list.reborrow().get(at).init_error());
                    }
                }
                list
            }
        };
        let tag = &Tags {
            session: request.get_session()?.to_vec(),
            open_ttl_ms: request.get_open_ttl_ms(),
            acked_below: request.get_acked_below(),
            sequences: Vec::new(),
        };
        for (at, operation) in operations.iter().enumerate() {
            let done = once(&mut shared, (shard.0, tag), operation)?;
            if !unknown {
                write(done, list.reborrow().get(at as u32));
            }
        }
        Ok(matches!(act, Act::ApplyAndDrop))
    }
}

/// Applies an operation unless its session tells that it was applied before.
fn once(
    shared: &mut Shared,
    (shard, tags): (u64, &Tags),
    operation: operation::Reader<'_>,
) -> Result<Result<Done, Refusal>, capnp::Error> {
    let sequence = operation.get_sequence();
    if sequence == 0 {
        return apply(shared, operation).map(Ok);
    }
    let key = (shard, tags.session.clone());
    if tags.open_ttl_ms > 0 {
        shared.sessions.entry(key.clone()).or_default();
    }
    let Some(results) = shared.sessions.get_mut(&key) else {
        return Ok(Err(Refusal::SessionExpired));
    };
    results.retain(|sequence, _| *sequence >= tags.acked_below);
    if let Some(done) = results.get(&sequence) {
        return Ok(Ok(done.clone()));
    }
    let done = apply(shared, operation)?;
    shared.sessions.entry(key).or_default().insert(sequence, done.clone());
    Ok(Ok(done))
}

fn apply(shared: &mut Shared, operation: operation::Reader<'_>) -> Result<Done, capnp::Error> {
    let key = operation.get_key()?.to_vec();
    let there = shared.store.get(&key).cloned();
    let mut write = |value: &[u8]| {
        shared.version += 1;
        shared.store.insert(key.clone(), (value.to_vec(), shared.version));
        Done::Written(shared.version)
    };
    Ok(match operation.which()? {
        operation::Get(()) => Done::Value(there),
        operation::Put(value) => write(value?),
        operation::Delete(()) => {
            let existed = shared.store.remove(&key).is_some();
            shared.version += u64::from(existed);
            Done::Deleted(existed.then_some(shared.version))
        }
        operation::Cas(cas) => {
            let holds = match cas.get_expect()?.which()? {
                expect::Absent(()) => there.is_none(),
                expect::Value(value) => there.as_ref().is_some_and(|(v, _)| v == value.unwrap()),
                expect::Version(version) => there.as_ref().is_some_and(|(_, v)| *v == version),
            };
            match holds {
                true => write(cas.get_value()?),
                false => Done::Mismatch(there),
            }
        }
    })
}

fn write(done: Result<Done, Refusal>, mut to: op_result::Builder<'_>) {
    match done {
        Ok(Done::Value(Some((value, version)))) => {
            let mut found = to.init_value();
            found.set_value(&value);
            found.set_version(version);
        }
        Ok(Done::Value(None) | Done::Deleted(None)) => to.set_absent(()),
        Ok(Done::Written(version)) => to.set_written(version),
        Ok(Done::Deleted(Some(version))) => to.set_deleted(version),
        Ok(Done::Mismatch(there)) => {
            let mut mismatch = to.init_mismatch();
            mismatch.set_found(there.is_some());
            if let Some((value, version)) = there {
                mismatch.set_value(&value);
                mismatch.set_version(version);
            }
        }
        Err(refusal) => write_refusal(&refusal, to.init_error()),
    }
}
