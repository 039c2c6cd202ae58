//! Pontoon, through its client library.

use std::time::Duration;

use bytes::Bytes;
use pontoon::client::options::ClientOptions;
use pontoon::client::{Client, Database, Operation};

/// The database that is measured.
const DATABASE: &str = "bench";
const REPLICAS: u32 = 3;

/// For an operation, and for making the database.
const PATIENCE: Duration = Duration::from_secs(30);

/// Bytes of a batch of puts.
const BATCH_BYTES: usize = 256 << 10;
const BATCH_MAX: usize = 1_000;

/// What a key is taken to add to its value.
const KEY_BYTES: usize = 16;

/// A cluster of Pontoon, and the client that all share: it has a connection to each node, and does its work on the thread
/// of the load, as etcd's does.
pub struct Pontoon {
    addresses: Vec<String>,
    client: Client,
    database: Database,
    shards: u32,
}

/// One client.
pub struct Session(Database);

impl Pontoon {
    /// A cluster of these servers. Asks nobody.
    pub fn new(addresses: Vec<String>, shards: u32) -> Result<Pontoon, String> {
        let options = ClientOptions { timeout: PATIENCE, ..ClientOptions::new(addresses.clone()) };
        let client = Client::unconnected_here(options).map_err(|error| error.to_string())?;
        let database = client.database(DATABASE).with_timeout(PATIENCE);
        Ok(Pontoon { addresses, client, database, shards })
    }

    /// Makes the database, and waits until each of its shards has a leader.
    pub async fn make_database(&self) -> Result<(), String> {
        let made = self.client.create_database(DATABASE, REPLICAS, self.shards, PATIENCE).await;
        made.map(drop).map_err(|error| error.to_string())
    }

    /// `count` clients.
    pub fn sessions(&self, count: usize) -> impl Iterator<Item = Session> {
        (0..count).map(|_| Session(self.database.clone()))
    }

    /// The server that leads most shards.
    pub async fn leader(&self) -> Result<usize, String> {
        let mut most = (0, Err("no server leads a shard".to_owned()));
        for (at, address) in self.addresses.iter().enumerate() {
            match self.client.node_report(address, PATIENCE).await {
                Ok(report) => {
                    let led = report.replicas.iter().filter(|replica| {
                        replica.group.as_ref().is_some_and(|group| group.leader == Some(replica.replica))
                    });
                    let leads = led.count();
                    if leads > most.0 {
                        most = (leads, Ok(at));
                    }
                }
                Err(error) if most.0 == 0 => most.1 = Err(error.to_string()),
                Err(_) => {}
            }
        }
        most.1
    }

    /// Ends its connections.
    pub async fn close(self) {
        self.client.close().await;
    }
}

impl Session {
    /// Sets a key's value.
    pub async fn put(&self, key: Bytes, value: Bytes) -> Result<(), String> {
        self.0.put(key, value).await.map(drop).map_err(|error| error.to_string())
    }

    /// Reads a key; the length of its value, where there is one.
    pub async fn get(&self, key: Bytes) -> Result<Option<usize>, String> {
        let found = self.0.get(key).await.map_err(|error| error.to_string())?;
        Ok(found.map(|found| found.value.len()))
    }

    /// Sets many keys.
    pub async fn put_all(&self, pairs: Vec<(Bytes, Bytes)>) -> Result<(), String> {
        let pair_bytes = pairs.iter().map(|(_, value)| KEY_BYTES + value.len()).max().unwrap_or(1);
        for pairs in pairs.chunks((BATCH_BYTES / pair_bytes).clamp(1, BATCH_MAX)) {
            let puts = pairs.iter().map(|(key, value)| Operation::Put(key.clone(), value.clone()));
            for result in self.0.batch(puts.collect()).await {
                result.map_err(|error| error.to_string())?;
            }
        }
        Ok(())
    }
}
