//! Cold start, and how long nobody can write when a server ends that leads.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::load::{key, value};
use crate::peer::{Peer, Session};
use crate::servers::Servers;

/// Clients that write meanwhile, each a key of its own.
const CLIENTS: usize = 64;
const VALUE_BYTES: usize = 128;

/// They write for so long before the server ends, and so long after it.
const BEFORE: Duration = Duration::from_secs(2);
const AFTER: Duration = Duration::from_secs(8);

/// A cluster that doesn't take its first put for so long never will.
const START: Duration = Duration::from_secs(60);

/// Between two attempts of a client to be served by servers that start.
const AGAIN: Duration = Duration::from_millis(5);

/// Starts a new cluster; the time from that to the end of its first put.
pub async fn cold_start(peer: &Peer, servers: &mut Servers) -> Result<Duration, String> {
    let begun = Instant::now();
    servers.start()?;
    wait(peer, begun).await?;
    Ok(begun.elapsed())
}

async fn wait(peer: &Peer, begun: Instant) -> Result<(), String> {
    while let Err(error) = peer.first_put().await {
        if begun.elapsed() > START {
            return Err(format!("it doesn't start: {error}"));
        }
        tokio::time::sleep(AGAIN).await;
    }
    Ok(())
}

/// Ends a server that leads, while clients write; the longest time that one of them went without a write that
/// succeeded. Then starts it again.
pub async fn gap(peer: &Peer, servers: &mut Servers, signal: Signal) -> Result<Duration, String> {
    let (longest, stop) = (Rc::new(RefCell::new(Duration::ZERO)), Rc::new(Cell::new(false)));
    let mut clients = tokio::task::JoinSet::new();
    for (number, session) in peer.sessions(CLIENTS).await?.into_iter().enumerate() {
        clients.spawn_local(client(session, number as u64, longest.clone(), stop.clone()));
    }
    tokio::time::sleep(BEFORE).await;
    let leader = peer.leader().await?;
    // What is longest now is of a machine that does other things, too.
    longest.replace(Duration::ZERO);
    servers.signal(leader, signal)?;
    tokio::time::sleep(AFTER).await;
    stop.set(true);
    while let Some(ended) = clients.join_next().await {
        ended.map_err(|error| format!("a client: {error}"))?;
    }
    servers.revive(leader)?;
    wait(peer, Instant::now()).await?;
    Ok(*longest.borrow())
}

async fn client(session: Session, number: u64, longest: Rc<RefCell<Duration>>, stop: Rc<Cell<bool>>) {
    let value = value(VALUE_BYTES);
    let mut last = Instant::now();
    while !stop.get() {
        session.put_persistently(key(number), value.clone()).await;
        let now = Instant::now();
        let gap = now.duration_since(last);
        longest.replace_with(|longest| gap.max(*longest));
        last = now;
    }
}
