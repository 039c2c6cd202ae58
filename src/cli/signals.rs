//! Ctrl-C and SIGTERM: the first asks for a clean stop, the second ends the process at once.
//!
//! A thread of its own listens, so that the second signal works whatever the rest is doing.

use std::future;
use std::thread;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

use super::failure::{Exit, Failure};
use super::output;

/// Tells whether a stop was asked for. Cheap to clone, usable from any runtime.
#[derive(Clone, Debug)]
pub struct Signals {
    stop: watch::Receiver<bool>,
}

impl Signals {
    /// Listens from now on. If the process still lives `stop_limit` after the first signal, it ends
    /// there, with code 0: whatever was acknowledged is on disk without a clean stop too.
    pub fn listen(stop_limit: Option<Duration>) -> Result<Signals, Failure> {
        let failed = |error: std::io::Error| Failure::internal(format!("listening for signals: {error}"));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let (sender, stop) = watch::channel(false);
        // Registered before this returns: no moment in which a signal kills the process.
        let (mut interrupt, mut terminate) = {
            let _entered = runtime.enter();
            (
                signal(SignalKind::interrupt()).map_err(failed)?,
                signal(SignalKind::terminate()).map_err(failed)?,
            )
        };
        thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                runtime.block_on(async move {
                    either(&mut interrupt, &mut terminate).await;
                    sender.send_replace(true);
                    tokio::select! {
                        () = either(&mut interrupt, &mut terminate) => {
                            std::process::exit(i32::from(Exit::Interrupted.code()));
                        }
                        () = limit(stop_limit) => {
                            output::note("the stop takes too long; ending without finishing it");
                            std::process::exit(i32::from(Exit::Done.code()));
                        }
                    }
                });
            })
            .map_err(failed)?;
        Ok(Signals { stop })
    }

    /// Waits until a stop is asked for.
    pub async fn stopped(&self) {
        let mut stop = self.stop.clone();
        if stop.wait_for(|stop| *stop).await.is_err() {
            // The listening thread is gone, so nobody can ask any more.
            future::pending::<()>().await;
        }
    }

    /// Whether a stop was asked for.
    pub fn is_stopped(&self) -> bool {
        *self.stop.borrow()
    }
}

async fn either(one: &mut Signal, other: &mut Signal) {
    tokio::select! {
        _ = one.recv() => {}
        _ = other.recv() => {}
    }
}

async fn limit(time: Option<Duration>) {
    match time {
        Some(time) => tokio::time::sleep(time).await,
        None => future::pending().await,
    }
}
