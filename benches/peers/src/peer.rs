//! What the two have in common: a cluster that is found, clients of it, and what a client can do.

use std::time::Duration;

use bytes::Bytes;
use clap::ValueEnum;

use crate::etcd::{self, Etcd};
use crate::options::Common;
use crate::pontoon::{self, Pontoon};
use crate::servers::Servers;

/// Which program is measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Kind {
    /// etcd
    Etcd,
    /// Pontoon
    Pontoon,
}

/// Time that one attempt may take before it counts as failed, in a measurement.
const ATTEMPT: Duration = Duration::from_secs(30);

/// The same where servers end and clients have to find others: long enough for any that works, and short enough that
/// a lost attempt doesn't hide that another would have succeeded.
const ATTEMPT_IN_TROUBLE: Duration = Duration::from_millis(500);

/// Between two attempts that fail at once.
const PAUSE: Duration = Duration::from_millis(5);

impl Kind {
    /// Its name, as people write it.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Etcd => "etcd",
            Kind::Pontoon => "Pontoon",
        }
    }
}

/// A cluster, seen by its clients.
pub enum Peer {
    /// etcd
    Etcd(Etcd),
    /// Pontoon
    Pontoon(Pontoon),
}

/// One client.
pub enum Session {
    /// etcd's
    Etcd(etcd::Session),
    /// Pontoon's
    Pontoon(pontoon::Session),
}

impl Peer {
    /// The cluster of `servers`. Asks nobody.
    pub fn new(servers: &Servers, common: &Common) -> Result<Peer, String> {
        Ok(match servers.kind {
            Kind::Etcd => Peer::Etcd(Etcd::new(servers.addresses(), common)),
            Kind::Pontoon => Peer::Pontoon(Pontoon::new(servers.addresses(), common.shards)?),
        })
    }

    /// Waits until a new cluster takes its first put: a database that is needed is made.
    pub async fn first_put(&self) -> Result<(), String> {
        if let Peer::Pontoon(pontoon) = self {
            pontoon.make_database().await?;
        }
        let sessions = self.sessions(1).await?;
        sessions[0]
            .attempt(Bytes::from_static(b"first"), Bytes::from_static(b"value"), ATTEMPT_IN_TROUBLE)
            .await
    }

    /// `count` clients.
    pub async fn sessions(&self, count: usize) -> Result<Vec<Session>, String> {
        Ok(match self {
            Peer::Etcd(etcd) => etcd.sessions(count).await?.into_iter().map(Session::Etcd).collect(),
            Peer::Pontoon(pontoon) => pontoon.sessions(count).map(Session::Pontoon).collect(),
        })
    }

    /// A server that leads, by its place among the addresses.
    pub async fn leader(&self) -> Result<usize, String> {
        match self {
            Peer::Etcd(etcd) => etcd.leader().await,
            Peer::Pontoon(pontoon) => pontoon.leader().await,
        }
    }

    /// Ends its connections.
    pub async fn close(self) {
        if let Peer::Pontoon(pontoon) = self {
            pontoon.close().await;
        }
    }
}

impl Session {
    /// Sets a key's value.
    pub async fn put(&self, key: Bytes, value: Bytes) -> Result<(), String> {
        self.attempt(key, value, ATTEMPT).await
    }

    /// Sets a key's value, however often it takes, at whichever server it takes.
    pub async fn put_persistently(&self, key: Bytes, value: Bytes) {
        while self.attempt(key.clone(), value.clone(), ATTEMPT_IN_TROUBLE).await.is_err() {
            if let Session::Etcd(session) = self {
                session.turn();
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Reads a key, linearizably; the length of its value, where there is one.
    pub async fn get(&self, key: Bytes) -> Result<Option<usize>, String> {
        match self {
            Session::Etcd(session) => within(ATTEMPT, session.get(key)).await,
            Session::Pontoon(session) => session.get(key).await,
        }
    }

    /// Sets many keys, in as few calls as the server likes best.
    pub async fn put_all(&self, pairs: Vec<(Bytes, Bytes)>) -> Result<(), String> {
        match self {
            Session::Etcd(session) => within(ATTEMPT, session.put_all(pairs)).await,
            Session::Pontoon(session) => session.put_all(pairs).await,
        }
    }

    /// Pontoon's client finds the right server by itself, and ends its attempts by a deadline of its own.
    async fn attempt(&self, key: Bytes, value: Bytes, limit: Duration) -> Result<(), String> {
        match self {
            Session::Etcd(session) => within(limit, session.put(key, value)).await,
            Session::Pontoon(session) => session.put(key, value).await,
        }
    }
}

async fn within<T>(limit: Duration, work: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    let ended = tokio::time::timeout(limit, work).await;
    ended.unwrap_or_else(|_| Err(format!("no answer within {limit:?}")))
}
