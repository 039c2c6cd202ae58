//! `serve`: one node, until it is told to stop; and what it shares with `setup`: the system that
//! nodes run on, the ports, the end.

use std::future::Future;
use std::io::Read;
use std::net::{SocketAddr, TcpListener};
use std::thread;
use std::time::Duration;

use futures_util::future::{join_all, select_all};

use super::args::ServeArgs;
use super::context::Context;
use super::failure::{Exit, Failure};
use super::output;
use super::signals::Signals;
use crate::limits::STOP_MS_MAX;
use crate::node::{self, Listeners, NodeError, RunningNode};
use crate::settings::{LogSettings, Settings};
use crate::storage::StorageError;
use crate::telemetry;
use crate::telemetry::log::LogWriter;

/// The process ends this long after the first signal, whatever still runs.
pub const STOP_LIMIT: Duration = Duration::from_millis(STOP_MS_MAX - 300);

/// Nodes are given this long to stop cleanly.
const STOP_DEADLINE: Duration = Duration::from_millis(STOP_MS_MAX - 1_000);

/// `serve --config FILE`
pub fn serve(context: &Context, args: &ServeArgs) -> Result<Exit, Failure> {
    let mut settings =
        Settings::load(&args.config).map_err(|errors| Failure::usage("config", errors.to_string()))?;
    if args.print_config {
        if context.json() {
            output::json(&settings.to_json())?;
        } else {
            output::bytes(settings.to_toml().as_bytes())?;
        }
        return Ok(Exit::Done);
    }
    if args.check {
        let config = args.config.display();
        if context.json() {
            output::json(&serde_json::json!({"config": config.to_string(), "ok": true}))?;
        } else {
            output::line(format!("{config}: ok"))?;
        }
        return Ok(Exit::Done);
    }
    if args.until_stdin_closes {
        exit_with_stdin()?;
    }
    // From here on a signal stops the node cleanly, even while it starts.
    let signals = Signals::listen(Some(STOP_LIMIT))?;
    let listeners = Listeners {
        client: bind("client.listen", settings.client.listen)?,
        peer: bind("peer.listen", settings.peer.listen)?,
        http: settings.http_listen.map(|address| bind("http.listen", address)).transpose()?,
    };
    settings.client.bound(bound_to(&listeners.client)?);
    settings.peer.bound(bound_to(&listeners.peer)?);
    start_log(&settings.log)?;

    let json = context.json();
    let client = settings.client.advertise.clone();
    let peer = settings.peer.advertise.clone();
    let rejoin = args.rejoin;
    on_system(async move {
        let start = async {
            if rejoin {
                node::start_rejoining(settings, listeners).await
            } else {
                node::start(settings, listeners).await
            }
        };
        let node = match until_stopped(&signals, start).await {
            None => return Ok(Exit::Done),
            Some(node) => node.map_err(failed_node)?,
        };
        let ready = async {
            tokio::select! {
                ready = node.ready() => ready,
                error = node.failed() => Err(error),
            }
        };
        match until_stopped(&signals, ready).await {
            None => {}
            Some(Err(error)) => {
                let failure = failed_node(error);
                stop_all(vec![node]).await;
                return Err(failure);
            }
            Some(Ok(())) => {
                let id = node.handle().node();
                if json {
                    output::json(&serde_json::json!({
                        "ready": true, "node": id.0, "client": client, "peer": peer,
                    }))
                } else {
                    output::line(format!("ready node={id} client={client} peer={peer}"))
                }
                // Nobody reads the line: no reason not to serve.
                .or_else(ignore_closed_pipe)?;
            }
        }
        run_until_stopped(vec![node], &signals).await
    })
}

/// Serves with these nodes until a stop is asked for, one of them fails for good, or none is left.
pub async fn run_until_stopped(mut nodes: Vec<RunningNode>, signals: &Signals) -> Result<Exit, Failure> {
    loop {
        let failed = {
            let failures = select_all(nodes.iter().map(|node| Box::pin(node.failed())));
            tokio::select! {
                () = signals.stopped() => None,
                (error, at, _) = failures => Some((error, at)),
            }
        };
        match failed {
            None => {
                stop_all(nodes).await;
                return Ok(Exit::Done);
            }
            // It was removed from the cluster; the others serve on.
            Some((error @ NodeError::Removed(_), at)) => {
                stop_all(vec![nodes.remove(at)]).await;
                if nodes.is_empty() {
                    return Err(failed_node(error));
                }
                output::note(error.to_string());
            }
            // A thread that others rely on is gone: what a clean stop would touch may be in any state.
            Some((error, _)) => return Err(failed_node(error)),
        }
    }
}

/// Stops nodes cleanly, all at once. Errors are told and no more: acknowledged writes are on disk.
pub async fn stop_all(nodes: Vec<RunningNode>) {
    let stops = nodes.into_iter().map(|node| node.stop(STOP_DEADLINE));
    for result in join_all(stops).await {
        if let Err(error) = result {
            output::note(format!("stopping: {error}"));
        }
    }
}

/// Runs a future, unless a stop is asked for first: then `None`.
pub async fn until_stopped<T>(signals: &Signals, future: impl Future<Output = T>) -> Option<T> {
    tokio::select! {
        biased;
        result = future => Some(result),
        () = signals.stopped() => None,
    }
}

/// Runs a command on an actor system on this thread.
pub fn on_system<T>(future: impl Future<Output = T>) -> T {
    let system = actix::System::new();
    let result = system.block_on(future);
    // Taking the system apart would wait for threads that may never end; the process ends now.
    std::mem::forget(system);
    result
}

/// Binds a port of a node.
pub fn bind(what: &str, address: SocketAddr) -> Result<TcpListener, Failure> {
    TcpListener::bind(address).map_err(|error| {
        let way_out = match error.kind() {
            std::io::ErrorKind::AddrInUse => {
                "another process has it (`ss -ltnp` shows which); stop that one or choose another \
                 address"
            }
            std::io::ErrorKind::AddrNotAvailable => {
                "no interface of this machine has it; listen on 0.0.0.0 and set `advertise`"
            }
            std::io::ErrorKind::PermissionDenied => "choose a port above 1023",
            _ => "choose another address",
        };
        Failure::usage("address", format!("{what} {address} can't be used: {error}; {way_out}"))
    })
}

/// The address a port was bound to.
pub fn bound_to(listener: &TcpListener) -> Result<SocketAddr, Failure> {
    listener.local_addr().map_err(|error| Failure::internal(format!("asking for a bound address: {error}")))
}

/// Starts logging to stderr.
pub fn start_log(settings: &LogSettings) -> Result<(), Failure> {
    telemetry::log::init(settings, LogWriter::Stderr)
        .map_err(|error| Failure::usage("config", error.to_string()))
}

/// What a node's failure means for the process.
pub fn failed_node(error: NodeError) -> Failure {
    let message = error.to_string();
    match error {
        // Starting it again changes nothing, so a service manager shouldn't.
        NodeError::Storage(error) if error.ends_identity() => Failure::usage(
            "damaged",
            format!(
                "{message}. Look after the disk first. Then `pontoon serve --config FILE --rejoin` sets the \
                 directory aside and has the node join its cluster as a new one"
            ),
        ),
        NodeError::Storage(StorageError::Identity(_)) => Failure::usage("directory", message),
        // It may start as soon as there is space: a service manager should go on trying.
        NodeError::Storage(error) if error.is_full() => {
            Failure::internal(format!("{message}; free some space on that disk, then start the node again"))
        }
        NodeError::Storage(StorageError::Io { .. }) => Failure::usage("io", message),
        NodeError::Storage(_) => Failure::internal(message),
        NodeError::Membership(_) => Failure::negative("membership", message),
        // Starting it again changes nothing either.
        NodeError::Removed(_) => Failure::negative("removed", message),
        NodeError::Stalled(_) | NodeError::Fatal(_) => Failure::internal(message),
    }
}

/// A closed stdout is no failure of a process that serves.
pub fn ignore_closed_pipe(failure: Failure) -> Result<(), Failure> {
    if failure == Failure::pipe_closed() { Ok(()) } else { Err(failure) }
}

/// Ends the process at once when stdin ends, which it does when the parent dies, however it dies.
fn exit_with_stdin() -> Result<(), Failure> {
    thread::Builder::new()
        .name("stdin".into())
        .spawn(|| {
            let mut buffer = [0; 64];
            let mut stdin = std::io::stdin().lock();
            loop {
                match stdin.read(&mut buffer) {
                    Ok(read) if read > 0 => {}
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                    _ => std::process::exit(i32::from(Exit::Negative.code())),
                }
            }
        })
        .map(drop)
        .map_err(|error| Failure::internal(format!("watching stdin: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_store_comes_with_the_way_out() {
        let error = StorageError::Damaged { what: "state store /d/state".into(), detail: "torn".into() };
        let failure = failed_node(NodeError::Storage(error));
        assert_eq!((failure.exit, failure.code), (Exit::Usage, "damaged"));
        assert!(failure.message.starts_with("state store /d/state is damaged: torn. "), "{failure}");
        assert!(failure.message.contains("--rejoin"), "{failure}");
    }
}
