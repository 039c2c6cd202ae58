//! Clients in closed loops, and what they saw.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use hdrhistogram::Histogram;
use rand::rngs::SmallRng;
use rand::{Rng, RngExt, SeedableRng};

use crate::peer::{Peer, Session};
use crate::servers::{Servers, usage};

/// Longest latency told apart, in microseconds: a greater one counts as this.
const LATENCY_US_MAX: u64 = 600_000_000;

/// Before it is counted.
const WARM_UP: Duration = Duration::from_secs(1);

/// Batches on the way, bytes and keys of one, and how often one is tried, while the keys are written beforehand.
const FILL_CLIENTS: usize = 8;
const FILL_BYTES: usize = 1 << 20;
const FILL_KEYS: usize = 1_000;
const FILL_ATTEMPTS: u32 = 5;

/// What clients do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Workload {
    /// Set a key's value
    Put,
    /// Read a key
    Get,
}

impl Workload {
    /// Both.
    pub const ALL: [Workload; 2] = [Workload::Put, Workload::Get];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Workload::Put => "put",
            Workload::Get => "get",
        }
    }
}

/// A load.
#[derive(Clone)]
pub struct Load {
    /// What clients do.
    pub workload: Workload,
    /// How many of them.
    pub clients: u32,
    /// Among how many keys they choose.
    pub keys: u64,
    /// Bytes in a value.
    pub value_bytes: usize,
    /// For how long it is measured.
    pub seconds: u64,
}

/// What clients saw, and what it took.
pub struct Figures {
    /// What it is of.
    pub load: Load,
    /// Operations that ended well within the time.
    pub operations: u64,
    /// Operations that failed, and how the first of them did.
    pub errors: u64,
    /// See [`Figures::errors`].
    pub first_error: Option<String>,
    /// Of operations that began within the time, in microseconds.
    pub latency: Histogram<u64>,
    /// Operations of each second.
    pub series: Vec<u64>,
    /// Time of all servers on processors, in microseconds.
    pub server_cpu_us: u64,
    /// Time of this process, likewise.
    pub client_cpu_us: u64,
}

impl Figures {
    fn new(load: Load) -> Figures {
        let latency = Histogram::new_with_bounds(1, LATENCY_US_MAX, 3).expect("right bounds");
        let series = vec![0; load.seconds as usize];
        let (operations, errors, first_error) = (0, 0, None);
        Figures { load, operations, errors, first_error, latency, series, server_cpu_us: 0, client_cpu_us: 0 }
    }

    /// Operations a second.
    pub fn rate(&self) -> f64 {
        self.operations as f64 / self.load.seconds as f64
    }

    /// A quantile of latency, in milliseconds.
    pub fn ms(&self, quantile: f64) -> f64 {
        self.latency.value_at_quantile(quantile) as f64 / 1000.0
    }

    /// Time of the servers on processors for one operation, in microseconds.
    pub fn server_us(&self) -> f64 {
        self.server_cpu_us as f64 / self.operations.max(1) as f64
    }

    /// Time of the load itself, likewise.
    pub fn client_us(&self) -> f64 {
        self.client_cpu_us as f64 / self.operations.max(1) as f64
    }

    fn count(&mut self, began: Instant, warm: Instant, result: Result<(), String>) {
        let now = Instant::now();
        match result {
            Ok(()) => {
                if began >= warm {
                    let us = u64::try_from(now.duration_since(began).as_micros()).unwrap_or(u64::MAX);
                    self.latency.saturating_record(us.max(1));
                }
                let second = now.checked_duration_since(warm).map(|since| since.as_secs() as usize);
                if let Some(second) = second.and_then(|second| self.series.get_mut(second)) {
                    *second += 1;
                    self.operations += 1;
                }
            }
            Err(error) => {
                self.errors += 1;
                self.first_error.get_or_insert(error);
            }
        }
    }
}

/// Puts a load on a cluster.
pub async fn run(peer: &Peer, servers: &Servers, load: Load) -> Result<Figures, String> {
    let sessions = peer.sessions(load.clients as usize).await?;
    let value = value(load.value_bytes);
    let figures = Rc::new(RefCell::new(Figures::new(load.clone())));
    let warm = Instant::now() + WARM_UP;
    let end = warm + Duration::from_secs(load.seconds);
    let mut clients = tokio::task::JoinSet::new();
    for (number, session) in sessions.into_iter().enumerate() {
        clients.spawn_local(client(
            session,
            number,
            load.clone(),
            value.clone(),
            (warm, end),
            figures.clone(),
        ));
    }
    tokio::time::sleep_until(warm.into()).await;
    let before = (servers.usage().cpu_us, usage("self").cpu_us);
    tokio::time::sleep_until(end.into()).await;
    let after = (servers.usage().cpu_us, usage("self").cpu_us);
    while let Some(ended) = clients.join_next().await {
        ended.map_err(|error| format!("a client: {error}"))?;
    }
    let mut figures = Rc::into_inner(figures).expect("all clients have ended").into_inner();
    figures.server_cpu_us = after.0.saturating_sub(before.0);
    figures.client_cpu_us = after.1.saturating_sub(before.1);
    if figures.operations == 0 {
        let why = figures.first_error.as_deref().unwrap_or("no answer");
        return Err(format!("not one {} succeeded: {why}", load.workload.name()));
    }
    Ok(figures)
}

/// One client: a call, its answer, the next call.
async fn client(
    session: Session,
    number: usize,
    load: Load,
    value: Bytes,
    (warm, end): (Instant, Instant),
    figures: Rc<RefCell<Figures>>,
) {
    let mut random = SmallRng::seed_from_u64(number as u64 + 1);
    loop {
        let began = Instant::now();
        if began >= end {
            return;
        }
        let key = key(random.random_range(0..load.keys));
        let result = match load.workload {
            Workload::Put => session.put(key, value.clone()).await,
            Workload::Get => match session.get(key).await {
                Ok(Some(length)) if length == load.value_bytes => Ok(()),
                Ok(found) => Err(format!("a value of {found:?} bytes, not {}", load.value_bytes)),
                Err(error) => Err(error),
            },
        };
        figures.borrow_mut().count(began, warm, result);
    }
}

/// Writes all keys once.
pub async fn fill(peer: &Peer, keys: u64, value_bytes: usize) -> Result<(), String> {
    let value = value(value_bytes);
    let size = (FILL_BYTES / value_bytes.max(1)).clamp(1, FILL_KEYS) as u64;
    let next = Rc::new(RefCell::new(0));
    let mut clients = tokio::task::JoinSet::new();
    for session in peer.sessions(FILL_CLIENTS).await? {
        let (next, value) = (next.clone(), value.clone());
        clients.spawn_local(async move {
            loop {
                let first = next.replace_with(|next| *next + size);
                let pairs: Vec<_> =
                    (first..keys.min(first + size)).map(|n| (key(n), value.clone())).collect();
                if pairs.is_empty() {
                    return Ok(());
                }
                // More arrives than the disk takes, so some of it may be refused for longer than a client waits.
                let mut attempts = 1;
                while let Err(error) = session.put_all(pairs.clone()).await {
                    if attempts == FILL_ATTEMPTS {
                        return Err(error);
                    }
                    eprintln!("writing keys beforehand, once more: {error}");
                    attempts += 1;
                }
            }
        });
    }
    while let Some(ended) = clients.join_next().await {
        ended
            .map_err(|error| error.to_string())
            .flatten()
            .map_err(|error| format!("writing keys beforehand: {error}"))?;
    }
    Ok(())
}

/// A key of 16 bytes.
pub fn key(number: u64) -> Bytes {
    Bytes::from(format!("k{number:015}"))
}

/// A value that doesn't get shorter by compression.
pub fn value(bytes: usize) -> Bytes {
    let mut value = vec![0; bytes];
    SmallRng::seed_from_u64(0).fill_bytes(&mut value);
    Bytes::from(value)
}
