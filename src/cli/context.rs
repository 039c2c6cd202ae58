//! What every command is given, and how the client commands reach their cluster.

use std::future::Future;
use std::net::TcpStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::args::Global;
use super::failure::Failure;
use super::local::{Holder, LocalDir};
use super::locate::{self, Environment, Place};
use super::output;
use crate::client::options::ClientOptions;
use crate::client::{Client, ClientError, Database, NotApplied};
use crate::limits::TIMEOUT_DEFAULT_MS;

/// How long a node on this machine may take to accept, when it is asked only whether it is there.
const PROBE: Duration = Duration::from_millis(200);

/// The global options and the environment.
#[derive(Clone, Debug, Default)]
pub struct Context {
    /// From the command line.
    pub global: Global,
    /// From the environment.
    pub environment: Environment,
}

impl Context {
    /// Whether output is JSON.
    pub fn json(&self) -> bool {
        self.global.json
    }

    /// The deadline: `--timeout` or 10 s.
    pub fn timeout(&self) -> Duration {
        self.timeout_or(Duration::from_millis(TIMEOUT_DEFAULT_MS))
    }

    /// The deadline: `--timeout` or `default`.
    pub fn timeout_or(&self, default: Duration) -> Duration {
        self.global.timeout.unwrap_or(default)
    }

    /// Where the cluster is.
    pub fn place(&self) -> Result<Place, Failure> {
        locate::place(&self.global, &self.environment)
    }

    /// The directory of the local cluster, for a command that works on nothing else, whatever
    /// `PONTOON_CLUSTER` says. Who names another cluster on the command line means another cluster.
    pub fn local_dir(&self) -> Result<LocalDir, Failure> {
        if self.global.cluster.is_some() {
            return Err(Failure::usage(
                "usage",
                "this command works on the local cluster only; leave out --cluster, and name its directory \
                 with --data if it isn't the usual one",
            ));
        }
        locate::data_dir(&self.global, &self.environment).map(LocalDir::new)
    }

    /// Client addresses of the cluster.
    pub fn addresses(&self) -> Result<Vec<String>, Failure> {
        match self.place()? {
            Place::Addresses(addresses) => Ok(addresses),
            Place::Local(path) => local_addresses(path),
        }
    }

    /// Connects to the cluster. The deadline runs from here.
    pub async fn connect(&self) -> Result<Session, Failure> {
        Session::open(self.addresses()?, self.timeout()).await
    }
}

/// Addresses from `cluster.json`. It is a hint; but if its process is gone and nobody listens there,
/// waiting for the deadline would help nobody.
fn local_addresses(path: PathBuf) -> Result<Vec<String>, Failure> {
    let dir = LocalDir::new(path);
    let no_cluster = |message: String| Failure { code: "no_cluster", ..Failure::unavailable(message) };
    let Some(cluster) = dir.read()? else {
        return Err(no_cluster(format!(
            "there is no local cluster in {}; start one with `pontoon setup NAME REPLICAS \
             PARTITIONS`, or name a cluster with --cluster or PONTOON_CLUSTER",
            dir.path().display()
        )));
    };
    let listening = |address| TcpStream::connect_timeout(&address, PROBE).is_ok();
    if dir.holder()? == Holder::None && !cluster.nodes.iter().any(|n| listening(n.client)) {
        return Err(no_cluster(format!(
            "the local cluster in {} is not running; start it again with {}",
            dir.path().display(),
            match cluster.databases.first() {
                Some(db) => format!("`pontoon setup {} {} {}`", db.name, db.replicas, db.shards),
                None => "`pontoon setup NAME REPLICAS PARTITIONS`".to_owned(),
            }
        )));
    }
    Ok(cluster.addresses())
}

/// A connection to a cluster and the time left for the command.
pub struct Session {
    /// The connection.
    pub client: Client,
    /// The addresses it was made from.
    pub addresses: Vec<String>,
    deadline: Instant,
    timeout: Duration,
}

impl Session {
    /// Connects through any of `addresses`; the deadline of the command runs from here.
    pub async fn open(addresses: Vec<String>, timeout: Duration) -> Result<Session, Failure> {
        Session::with(addresses, timeout, Client::connect_with).await
    }

    /// The same on this thread, in the `LocalSet` that this is awaited in.
    pub async fn open_here(addresses: Vec<String>, timeout: Duration) -> Result<Session, Failure> {
        Session::with(addresses, timeout, Client::connect_here).await
    }

    async fn with(
        addresses: Vec<String>,
        timeout: Duration,
        connect: impl AsyncFnOnce(ClientOptions) -> Result<Client, ClientError>,
    ) -> Result<Session, Failure> {
        let deadline = Instant::now() + timeout;
        let options = ClientOptions { timeout, ..ClientOptions::new(addresses.clone()) };
        let client = connect(options).await.map_err(|error| match error {
            ClientError::NotApplied(NotApplied::Unavailable { within, last }) => Failure::unavailable(format!(
                "no node answered within {}: {last}; nothing was changed. Check that the nodes run and that \
                 these are their client ports",
                output::seconds(within)
            )),
            error => error.into(),
        })?;
        Ok(Session { client, addresses, deadline, timeout })
    }

    /// Time left for the whole command; never nothing, so that a late step fails by itself.
    pub fn remaining(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1))
    }

    /// The deadline as it was given.
    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    /// A database, its next operation bounded by the time left for the command.
    pub fn database(&self, name: &str) -> Database {
        self.client.database(name).with_rest(self.remaining(), self.timeout)
    }

    /// A database for a command of many operations, each of which has the whole time.
    pub fn database_for_many(&self, name: &str) -> Database {
        self.client.database(name).with_timeout(self.timeout)
    }
}

/// Runs a command that needs no nodes, on this thread.
pub fn block_on<T>(future: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::internal(format!("starting the runtime: {error}")))?
        .block_on(future)
}

/// Runs a client command on this thread: connects, runs it, closes the connection whatever came.
pub fn with_session<T, F>(context: &Context, command: F) -> Result<T, Failure>
where
    F: AsyncFnOnce(&Session) -> Result<T, Failure>,
{
    block_on(async {
        let session = context.connect().await?;
        let result = command(&session).await;
        session.client.close().await;
        result
    })
}
