//! Clients that read, write, compare and delete a few keys at a time, what they were told, and whether
//! that is linearizable.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pontoon::client::{Cas, ClientError, Database, Versioned};
use pontoon::ids::ShardId;
use pontoon::machine::command::Expect;
use pontoon::sim::checks::linear::linearizable;
use pontoon::sim::history::{Action, Call, Condition, Found, History, Key, Told};

/// Clients that share a key.
const CLIENTS_PER_KEY: usize = 3;
/// Operations on a key, after which its clients go on to the next: the check takes longer the longer a
/// history is.
const CALLS_PER_KEY: u64 = 120;
/// Steps after which the check of one key is given up.
const STEPS_MAX: usize = 300_000;

/// Clients under way.
pub struct Registers {
    stop: Arc<AtomicBool>,
    history: Arc<Mutex<History>>,
    clients: Vec<tokio::task::JoinHandle<()>>,
}

struct Client {
    number: usize,
    /// The clients that share keys with this one.
    group: usize,
    round: u64,
    /// Operations begun by all of these.
    begun: Arc<AtomicU64>,
    /// The last value given out: each write has its own.
    values: Arc<AtomicU64>,
    history: Arc<Mutex<History>>,
    seen: Found,
}

impl Registers {
    /// Starts groups of clients. The keys are new ones: no other `round` has them.
    pub fn start(database: &Database, groups: usize, round: u64) -> Registers {
        let (stop, history) = (Arc::<AtomicBool>::default(), Arc::<Mutex<History>>::default());
        let values = Arc::<AtomicU64>::default();
        let mut clients = Vec::new();
        for group in 0..groups {
            let begun = Arc::<AtomicU64>::default();
            for _ in 0..CLIENTS_PER_KEY {
                let mut client = Client {
                    number: clients.len(),
                    group,
                    round,
                    begun: begun.clone(),
                    values: values.clone(),
                    history: history.clone(),
                    seen: None,
                };
                let (database, stop) = (database.with_timeout(Duration::from_secs(3)), stop.clone());
                clients.push(tokio::spawn(async move {
                    while !stop.load(Ordering::Relaxed) && client.operate(&database).await {
                        tokio::time::sleep(Duration::from_millis(7)).await;
                    }
                }));
            }
        }
        Registers { stop, history, clients }
    }

    /// Ends them and checks every key: how many, how many of them were too hard to check, and how many
    /// operations have an unknown outcome.
    pub async fn check(self) -> (usize, usize, usize) {
        self.stop.store(true, Ordering::Relaxed);
        for client in self.clients {
            client.await.expect("a client");
        }
        let mut history = self.history.lock().expect("no client panicked");
        let mut keys: BTreeMap<(ShardId, Key), Vec<Call>> = BTreeMap::new();
        let calls = std::mem::take(&mut history.calls);
        let unknown =
            calls.iter().filter(|call| call.told == Told::Unknown && call.action != Action::Get).count();
        for call in calls {
            keys.entry((call.shard, call.key)).or_default().push(call);
        }
        let mut undecided = 0;
        for (key, calls) in &keys {
            match linearizable(calls, STEPS_MAX) {
                Some(true) => {}
                Some(false) => {
                    for call in calls {
                        let Call { client, action, invoked, returned, told, .. } = call;
                        println!("{invoked} to {returned}: client {client} {action:?}: {told:?}");
                    }
                    panic!("key {} of group {} is not linearizable", key.1, key.0);
                }
                None => undecided += 1,
            }
        }
        (keys.len(), undecided, unknown)
    }
}

impl Client {
    /// One operation. False: there are no keys left.
    async fn operate(&mut self, database: &Database) -> bool {
        let turn = self.begun.fetch_add(1, Ordering::Relaxed);
        let Ok(key) = Key::try_from(turn / CALLS_PER_KEY) else { return false };
        let name = format!("register-{}-{}-{key}", self.round, self.group);
        let value = self.values.fetch_add(1, Ordering::Relaxed) + 1;
        let action = match (turn * 7 + self.number as u64) % 10 {
            0..4 => Action::Get,
            4..7 => Action::Put(value),
            7 => Action::Delete,
            _ => {
                let condition = match self.seen {
                    None => Condition::Absent,
                    Some((value, _)) if turn.is_multiple_of(2) => Condition::Value(value),
                    Some((_, version)) => Condition::Version(version),
                };
                Action::Cas(condition, value)
            }
        };
        // The history knows keys by number; the group takes the place of the shard.
        let shard = ShardId(self.group as u64);
        let call = self.history.lock().expect("the history").invoke(self.number, shard, key, action);
        let told = act(database, name, action).await;
        self.history.lock().expect("the history").end(call, told);
        match (action, told) {
            (_, Told::Found(found) | Told::Mismatch(found)) => self.seen = found,
            (Action::Put(value) | Action::Cas(_, value), Told::Written(version)) => {
                self.seen = Some((value, version));
            }
            _ => self.seen = None,
        }
        true
    }
}

fn found(value: Option<Versioned>) -> Found {
    value.map(|v| (String::from_utf8_lossy(&v.value).parse().expect("a number"), v.version))
}

async fn act(database: &Database, key: String, action: Action) -> Told {
    let told = match action {
        Action::Get => database.get(key).await.map(|value| Told::Found(found(value))),
        Action::Put(value) => database.put(key, value.to_string()).await.map(Told::Written),
        Action::Delete => {
            database.delete(key).await.map(|version| version.map_or(Told::Absent, Told::Deleted))
        }
        Action::Cas(condition, value) => {
            let expect = match condition {
                Condition::Absent => Expect::Absent,
                Condition::Value(value) => Expect::Value(value.to_string().into()),
                Condition::Version(version) => Expect::Version(version),
            };
            database.cas(key, expect, value.to_string()).await.map(|cas| match cas {
                Cas::Written(version) => Told::Written(version),
                Cas::Mismatch(there) => Told::Mismatch(found(there)),
            })
        }
    };
    match told {
        Ok(told) => told,
        Err(ClientError::NotApplied(_)) => Told::Refused,
        Err(ClientError::Unknown(_)) => Told::Unknown,
        Err(error @ ClientError::Invalid(_)) => panic!("{action:?}: {error}"),
    }
}
