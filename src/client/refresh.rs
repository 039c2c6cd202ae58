//! Fresh cluster maps: who is asked, how often, and what waits for them.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::task::spawn_local;

use super::connection::{Obstacle, Obstacles};
use super::driver::Driver;
use super::race::Race;
use super::retry::Failure;
use super::ticket::Ticket;
use crate::codec::records::read_delta;
use crate::ids::METADATA_SHARD;
use crate::limits::{ATTEMPT_MS_MAX, MAP_ASKED_MAX, MAP_REFRESH_MS_MIN};
use crate::placement::map::MapDelta;
use crate::refusal::Refusal;

/// After one node has answered with the map, the others are waited for so long.
const SECOND_OPINION: Duration = Duration::from_millis(300);

/// A refresh in the background takes no longer than this: operations that come meanwhile ask anew.
const REFRESH: Duration = Duration::from_secs(10);

/// Whether and when the map is asked for.
#[derive(Default)]
pub(super) struct Refresh {
    /// Operations whose key has no shard under the map in the cache, each with the number of refreshes
    /// that had begun when it came: only a later one may say that its database doesn't exist.
    parked: RefCell<Vec<(u64, Ticket)>>,
    /// Refreshes begun.
    begun: Cell<u64>,
    /// A refresh is under way.
    running: Cell<bool>,
    /// Another was wanted meanwhile.
    again: Cell<bool>,
    /// When the last one began.
    last: Cell<Option<Instant>>,
}

impl Refresh {
    /// Has an operation wait for the next fresh map.
    pub fn park(&self, ticket: Ticket) {
        self.parked.borrow_mut().push((self.begun.get(), ticket));
    }

    /// Answers what has waited too long. Returns whether anything still waits.
    pub fn expire(&self, now: Instant) -> bool {
        let mut parked = self.parked.borrow_mut();
        for (_, ticket) in parked.iter_mut() {
            ticket.expire(now, "no node answered with the cluster map");
        }
        parked.retain(|(_, ticket)| ticket.open());
        !parked.is_empty()
    }
}

/// How many answers a refresh needs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Ask {
    /// Any one.
    One,
    /// Those of all nodes asked at a time: to say that there is no such database takes more than one
    /// node that hasn't heard of it.
    All,
}

/// What the answers are worth if they don't name what was looked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Word {
    /// There is no such thing.
    Certain,
    /// All who answered are cut off from the metadata shard: others may know of it.
    Unsure,
}

impl Word {
    /// Why an operation on `database` fails, which nobody who answered has named.
    pub fn absent(self, database: &str) -> Failure {
        match self {
            Word::Certain => Failure::Refused(Refusal::UnknownDatabase(database.to_owned())),
            Word::Unsure => unsure(&format!("a database `{database}`")),
        }
    }
}

/// Why a call fails for now that asks for a thing which only nodes without news don't know.
pub(super) fn unsure(thing: &str) -> Failure {
    Failure::NotSent(format!(
        "no node that answers has heard from the metadata shard, and whether there is {thing} isn't known without that"
    ))
}

impl Driver {
    /// Has the map refreshed in the background, not too often.
    pub fn refresh_soon(self: &Rc<Driver>) {
        if self.refresh.running.replace(true) {
            self.refresh.again.set(true);
            return;
        }
        let driver = self.clone();
        spawn_local(async move {
            let running = Running(driver);
            loop {
                running.0.refresh_once().await;
                if !running.0.refresh.again.replace(false) {
                    return;
                }
            }
        });
    }

    async fn refresh_once(self: &Rc<Driver>) {
        if let Some(last) = self.refresh.last.get() {
            let pause = Duration::from_millis(MAP_REFRESH_MS_MIN);
            tokio::time::sleep_until((last + pause).into()).await;
        }
        let need = if self.refresh.parked.borrow().is_empty() { Ask::One } else { Ask::All };
        let round = self.refresh.begun.get() + 1;
        self.refresh.begun.set(round);
        self.refresh.last.set(Some(Instant::now()));
        let asked = self.ask_map(need, REFRESH).await;
        self.prune();
        let mut failures = Vec::new();
        for (came, ticket) in self.refresh.parked.take() {
            let known = self.routing.borrow().knows(&ticket.database);
            if came >= round {
                self.enqueue(ticket);
                continue;
            }
            let failure = match &asked {
                Err(failure) => failure.clone(),
                Ok(_) if known => Failure::NotSent("no shard of the map owns the key's position".into()),
                Ok(word) => word.absent(&ticket.database),
            };
            failures.push((ticket, failure));
        }
        self.failed(failures);
        self.flush();
    }

    /// Sends on what waited for a map and has a route under the one in the cache.
    pub(super) fn release(self: &Rc<Driver>) {
        let routed = {
            let (routing, mut parked) = (self.routing.borrow(), self.refresh.parked.borrow_mut());
            let (routed, left): (Vec<_>, Vec<_>) = parked.drain(..).partition(|(_, ticket)| {
                let route = routing.route_at(&ticket.database, ticket.position);
                route.is_some()
            });
            *parked = left;
            routed
        };
        for (_, ticket) in routed {
            self.enqueue(ticket);
        }
        self.flush();
    }

    /// Asks nodes for the map: the ones known, the metadata shard's first, then the seeds; for at most
    /// `limit`. What their answers are worth; the error tells what they said.
    pub async fn ask_map(self: &Rc<Driver>, need: Ask, limit: Duration) -> Result<Word, Failure> {
        self.adopt();
        let addresses = self.addresses();
        let at_once = if need == Ask::One { 1 } else { MAP_ASKED_MAX };
        let asked = addresses.iter().map(|address| async move { (address, self.ask_node(address).await) });
        let mut race = Race::new(asked, at_once);
        let (mut obstacles, mut answered) = (Obstacles::default(), None);
        let mut silent: BTreeSet<&String> = addresses.iter().collect();
        let mut until = tokio::time::Instant::now() + limit;
        loop {
            match tokio::time::timeout_at(until, race.next()).await {
                Ok(Some((_, Ok(word)))) => {
                    self.release();
                    if need == Ask::One {
                        return Ok(word);
                    }
                    if answered.is_none() {
                        // Once one has answered, a hung one isn't waited for.
                        until = until.min(tokio::time::Instant::now() + SECOND_OPINION);
                        race.close();
                    }
                    // One who knows is enough.
                    answered = answered.filter(|before| *before == Word::Certain).or(Some(word));
                }
                Ok(Some((address, Err(obstacle)))) => {
                    silent.remove(address);
                    obstacles.add(&obstacle);
                }
                Ok(None) | Err(_) if let Some(word) = answered => return Ok(word),
                Ok(None) => return Err(obstacles.failure()),
                Err(_) => {
                    let silence = |address| Obstacle::from(format!("{address}: no answer"));
                    silent.into_iter().for_each(|address| obstacles.add(&silence(address)));
                    return Err(obstacles.failure());
                }
            }
        }
    }

    /// Addresses to ask: those of the metadata shard's nodes; then the rest, beginning anywhere, and those
    /// that the client was given with them, unless the cluster has removed the node there: those are the last resort.
    pub fn addresses(&self) -> Vec<String> {
        let routing = self.routing.borrow();
        let map = routing.map();
        let members = map.shards.get(&METADATA_SHARD).into_iter();
        let nodes: BTreeSet<_> = members.flat_map(|shard| shard.members.iter().map(|m| m.node)).collect();
        let known: BTreeSet<&str> = routing.addresses().collect();
        let first: BTreeSet<&str> = (map.nodes.values().filter(|node| nodes.contains(&node.id)))
            .map(|node| node.client_address.as_str())
            .filter(|address| known.contains(address))
            .collect();
        let seeds = self.setup.seeds.iter().map(String::as_str);
        let (last, others): (BTreeSet<&str>, BTreeSet<&str>) = (known.iter().copied().chain(seeds))
            .filter(|address| !first.contains(address))
            .partition(|address| !known.contains(address) && routing.is_abandoned(address));
        let mut others: Vec<&str> = others.into_iter().collect();
        if !others.is_empty() {
            let begin = rand::random::<u64>() % others.len() as u64;
            others.rotate_left(begin as usize);
        }
        first.into_iter().chain(others).chain(last).map(str::to_owned).collect()
    }

    /// Asks one node for the map and takes over what it tells; what its answer is worth.
    pub(super) async fn ask_node(self: &Rc<Driver>, address: &str) -> Result<Word, Obstacle> {
        let connection = self.pool.get(address, true).await?;
        let since = self.routing.borrow().map().version;
        let mut request = connection.kv.map_request();
        request.get().set_since(since);
        let limit = Duration::from_millis(ATTEMPT_MS_MAX);
        let began = Instant::now();
        let watch = connection.watch_aside();
        let answer = watch.answer(request.send().promise);
        let answer = match tokio::time::timeout(limit, answer).await {
            Ok(Some(answer)) => answer,
            none => {
                self.pool.unanswered(&connection, began, none.is_ok());
                return Err(format!("{address}: no cluster map within {:.1?}", began.elapsed()).into());
            }
        };
        let told = |error: &dyn std::fmt::Display| Obstacle::from(format!("{address}: {error}"));
        let answer = answer.map_err(|e| told(&e))?;
        let answer = answer.get().map_err(|e| told(&e))?;
        let word = if answer.get_cut_off() { Word::Unsure } else { Word::Certain };
        let delta = answer.get_delta().map_err(|e| told(&e))?;
        let delta = read_delta(delta).map_err(|e| told(&e))?;
        if delta.version == 0 {
            return Err(told(&"the node isn't a member of a cluster yet"));
        }
        self.learn(delta, address)?;
        Ok(word)
    }

    /// Takes over what the node at `address` tells of the map.
    pub fn learn(&self, delta: MapDelta, address: &str) -> Result<(), String> {
        let learned = self.routing.borrow_mut().learn(delta);
        learned.map_err(|other| {
            format!("{address} belongs to cluster {other}, this client to another: check the addresses")
        })?;
        self.mapped.notify_one();
        Ok(())
    }
}

/// Marks a refresh as under way until it ends, however that comes.
struct Running(Rc<Driver>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.refresh.running.set(false);
    }
}
