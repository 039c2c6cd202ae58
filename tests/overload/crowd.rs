//! Many callers by hand: batches of writes, each sent as soon as the one before is answered, and no
//! library that would hold back.

use std::cell::RefCell;
use std::fmt::{self, Display};
use std::rc::Rc;
use std::time::{Duration, Instant};

use capnp::capability::RemotePromise;
use futures_util::future::join_all;
use pontoon::client::Client;
use pontoon::codec::refusal::read_refusal;
use pontoon::refusal::Refusal;
use pontoon::schema::kv_capnp::{batch_response, kv, op_result};

use crate::cluster::Cluster;
use crate::wire::dial;

/// What a call gives the node.
pub const DEADLINE: Duration = Duration::from_secs(5);
/// Operations of a call.
const BATCH: u32 = 64;
/// Connections to each node.
const CONNECTIONS: usize = 4;
const VALUE_BYTES: usize = 512;

/// What a caller does when it is told to come back later.
#[derive(Clone, Copy, PartialEq)]
pub enum Manners {
    /// It waits for as long as it was told.
    Polite,
    /// It comes back in a millisecond.
    Hasty,
}

/// How calls ended.
#[derive(Default)]
pub struct Tally {
    time: Duration,
    /// Operations that were done within the time.
    done: u64,
    /// Operations that were refused as too many.
    pub busy: u64,
    /// Operations that ended at their deadline.
    late: u64,
    /// The longest call that was accepted.
    pub slowest: Duration,
    sum: Duration,
    accepted: u32,
    /// What is no proper answer.
    pub failures: Vec<String>,
}

impl Tally {
    /// Operations done in a second.
    pub fn rate(&self) -> f64 {
        self.done as f64 / self.time.as_secs_f64()
    }
}

impl Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mean = self.sum / self.accepted.max(1);
        let (done, busy, late, slowest) = (self.rate(), self.busy, self.late, self.slowest);
        write!(
            f,
            "{done:.0} operations/s, {busy} busy, {late} late; a call took {mean:?}, at most {slowest:?}"
        )
    }
}

/// Where the one shard of a database is.
pub struct Crowd {
    addresses: Vec<String>,
    shard: u64,
    range_version: u64,
}

/// With its connections. Needs a `LocalSet`.
pub struct Connected {
    crowd: Crowd,
    /// By node.
    connections: Vec<Vec<kv::Client>>,
}

impl Crowd {
    pub async fn new(cluster: &Cluster, client: &Client, database: &str) -> Crowd {
        let map = client.map().await.expect("the map");
        let shard = map.database(database).and_then(|d| map.shards.get(&d.shards[0])).expect("its shard");
        Crowd { addresses: cluster.addresses(), shard: shard.id.0, range_version: shard.epoch.range }
    }

    pub async fn connect(self) -> Connected {
        let mut connections = Vec::new();
        for address in &self.addresses {
            let dialled = join_all((0..CONNECTIONS).map(|_| dial(address))).await;
            connections.push(dialled.into_iter().map(|kv| kv.expect("connected")).collect());
        }
        Connected { crowd: self, connections }
    }

    /// One read, sent.
    pub fn get(&self, kv: &kv::Client, key: &str) -> RemotePromise<kv::batch_results::Owned> {
        let mut call = kv.batch_request();
        let mut request = call.get().init_request();
        request.set_shard(self.shard);
        request.set_range_version(self.range_version);
        let mut operation = request.init_operations(1).get(0);
        operation.set_key(key.as_bytes());
        operation.set_get(());
        call.send()
    }
}

/// The ends of a batch: of all its operations, or of each.
async fn ends(kv: &kv::Client, crowd: &Crowd, caller: usize) -> Result<Vec<Option<Refusal>>, capnp::Error> {
    let mut call = kv.batch_request();
    let mut request = call.get().init_request();
    request.set_shard(crowd.shard);
    request.set_range_version(crowd.range_version);
    request.set_timeout_ms(DEADLINE.as_millis() as u32);
    let mut list = request.init_operations(BATCH);
    for at in 0..BATCH {
        let mut operation = list.reborrow().get(at);
        // The same keys again and again: it is the log that is to be overloaded, not the disk's size.
        operation.set_key(format!("{}-{at}", caller % 16).as_bytes());
        operation.set_put(&[7; VALUE_BYTES]);
    }
    let answer = call.send().promise.await?;
    match answer.get()?.get_response()?.which()? {
        batch_response::Error(error) => Ok(vec![Some(read_refusal(error?)); BATCH as usize]),
        batch_response::Results(results) => results?
            .iter()
            .map(|result| match result.which()? {
                op_result::Error(error) => Ok(Some(read_refusal(error?))),
                _ => Ok(None),
            })
            .collect(),
    }
}

impl Connected {
    /// Lets so many callers call for a while, and waits for their last answers.
    pub async fn run(&self, callers: usize, manners: Manners, time: Duration) -> Tally {
        let tally = Rc::new(RefCell::new(Tally { time, ..Tally::default() }));
        let end = Instant::now() + time;
        join_all((0..callers).map(|caller| self.caller(caller, manners, end, tally.clone()))).await;
        tally.take()
    }

    async fn caller(&self, caller: usize, manners: Manners, end: Instant, tally: Rc<RefCell<Tally>>) {
        let mut node = 0;
        while Instant::now() < end {
            let begun = Instant::now();
            let kv = &self.connections[node][caller % CONNECTIONS];
            let patience = DEADLINE + Duration::from_secs(20);
            let answer = tokio::time::timeout(patience, ends(kv, &self.crowd, caller)).await;
            let mut pause = Duration::ZERO;
            {
                let mut tally = tally.borrow_mut();
                let ends = match answer {
                    Ok(Ok(ends)) => ends,
                    Ok(Err(error)) => return tally.failures.push(error.to_string()),
                    Err(_) => return tally.failures.push("no answer".into()),
                };
                if ends.iter().any(Option::is_none) {
                    tally.accepted += 1;
                    tally.sum += begun.elapsed();
                    tally.slowest = tally.slowest.max(begun.elapsed());
                }
                for end_of_one in ends {
                    match end_of_one {
                        None => tally.done += u64::from(Instant::now() < end),
                        Some(Refusal::Busy { retry_after_ms, .. }) if retry_after_ms > 0 => {
                            tally.busy += 1;
                            pause = Duration::from_millis(retry_after_ms.into());
                        }
                        Some(Refusal::Deadline) => tally.late += 1,
                        // Under load leadership may move; whoever led says what it can't know.
                        Some(Refusal::NotLeader { .. }) => pause = Duration::from_millis(1),
                        Some(Refusal::Unknown(_) | Refusal::Superseded) => {}
                        Some(other) => tally.failures.push(other.to_string()),
                    }
                }
            }
            if pause == Duration::from_millis(1) {
                node = (node + 1) % self.connections.len();
            } else if manners == Manners::Hasty {
                pause = pause.min(Duration::from_millis(1));
            }
            if !pause.is_zero() {
                tokio::time::sleep(pause).await;
            }
        }
    }
}
