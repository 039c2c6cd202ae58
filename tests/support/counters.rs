//! Work whose effects can be counted: what was acknowledged is there, each once, and nothing else.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pontoon::client::{Cas, Client, ClientError, Database};
use pontoon::ids::ShardId;
use pontoon::machine::command::Expect;

/// What one worker knows to have happened.
#[derive(Default)]
pub struct Tally {
    /// Writes that were acknowledged and changed something, by key.
    pub writes: BTreeMap<String, u64>,
    /// Additions among them.
    pub added: u64,
    pub errors: Vec<ClientError>,
}

impl Tally {
    /// What another knows, too.
    pub fn add(&mut self, other: Tally) {
        for (key, count) in other.writes {
            *self.writes.entry(key).or_default() += count;
        }
        self.added += other.added;
        self.errors.extend(other.errors);
    }
}

/// Adds one to a counter, by reading it and comparing.
async fn add(database: &Database, key: &str, tally: &mut Tally) -> Result<(), ClientError> {
    let found = database.get(key.to_owned()).await?;
    let (expect, count) = match &found {
        None => (Expect::Absent, 0),
        Some(found) => (Expect::Version(found.version), number(&found.value)),
    };
    if let Cas::Written(_) = database.cas(key.to_owned(), expect, (count + 1).to_string()).await? {
        *tally.writes.entry(key.to_owned()).or_default() += 1;
        tally.added += 1;
    }
    Ok(())
}

/// Puts and deletes a key that nobody else writes: each must find what the one before left.
async fn rewrite(database: &Database, key: &str, round: u64, tally: &mut Tally) -> Result<(), ClientError> {
    if round % 8 == 7 {
        let deleted = database.delete(key.to_owned()).await?;
        assert!(deleted.is_some(), "{key}: what was put is there, and is deleted once");
    } else {
        database.put(key.to_owned(), round.to_string()).await?;
    }
    *tally.writes.entry(key.to_owned()).or_default() += 1;
    Ok(())
}

fn number(value: &[u8]) -> u64 {
    String::from_utf8_lossy(value).parse().expect("a number")
}

/// Counters that all workers share.
const COUNTERS: usize = 5;

/// Two kinds of workers, of several clients, until told to stop.
pub struct Load {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    workers: Vec<tokio::task::JoinHandle<Tally>>,
}

impl Load {
    /// Starts so many workers, spread over `databases`, each of which is a client's. None of what they do may fail within
    /// the deadline that these have.
    pub fn start(databases: &[Database], workers: usize) -> Load {
        let (stop, rounds) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let workers = (0..workers)
            .map(|worker| {
                let database = databases[worker % databases.len()].clone();
                let (stop, rounds) = (stop.clone(), rounds.clone());
                tokio::spawn(async move {
                    let mut tally = Tally::default();
                    for round in 0.. {
                        if stop.load(Ordering::Relaxed) {
                            break;
                        }
                        let done = if worker % 2 == 0 {
                            let key = format!("counter-{}", (worker as u64 + round) % COUNTERS as u64);
                            add(&database, &key, &mut tally).await
                        } else {
                            rewrite(&database, &format!("own-{worker}"), round, &mut tally).await
                        };
                        if let Err(error) = done {
                            tally.errors.push(error);
                            break;
                        }
                        rounds.fetch_add(1, Ordering::Relaxed);
                    }
                    tally
                })
            })
            .collect();
        Load { stop, rounds, workers }
    }

    /// Waits until `count` more rounds have ended.
    pub async fn progress(&self, count: u64) {
        let until = self.rounds.load(Ordering::Relaxed) + count;
        let (first, mut last, mut begun) = (Instant::now(), 0, Instant::now());
        while self.rounds.load(Ordering::Relaxed) < until {
            let now = self.rounds.load(Ordering::Relaxed);
            if now > last {
                (last, begun) = (now, Instant::now());
            }
            let in_time =
                begun.elapsed() < Duration::from_secs(90) && first.elapsed() < Duration::from_secs(300);
            assert!(in_time, "the workers stand still");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Ends the workers: what they know.
    pub async fn stop(self) -> Tally {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Tally::default();
        for worker in self.workers {
            all.add(worker.await.expect("a worker"));
        }
        all
    }
}

/// That the database `name`, which nobody else has written to, holds what the workers know of, each once.
pub async fn assert_exact(client: &Client, name: &str, database: &Database, tally: &Tally) {
    // Each counter shows the additions that were acknowledged.
    let mut sum = 0;
    for counter in 0..COUNTERS {
        let found = database.get(format!("counter-{counter}")).await.expect("a read");
        sum += found.map_or(0, |found| number(&found.value));
    }
    assert_eq!(sum, tally.added);
    // And nothing else was done: a shard counts its writes, and one more tells how many there were.
    let map = client.map().await.expect("the map");
    let record = map.database(name).expect("the database");
    let mut writes = BTreeMap::<ShardId, (u64, String)>::new();
    for (key, count) in &tally.writes {
        let shard = map.shard_of_key(record, key.as_bytes()).expect("a shard");
        let (sum, last) = writes.entry(shard.id).or_default();
        (*sum, *last) = (*sum + count, key.clone());
    }
    for (shard, (sum, key)) in writes {
        let version = database.put(key, "last").await.expect("a write");
        assert_eq!(version, sum + 1, "shard {shard}: {sum} writes were acknowledged");
    }
}
