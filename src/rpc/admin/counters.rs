//! Counters of this process for those who ask, one after the other.
//!
//! Reading them takes milliseconds of a thread that may block, the more so the more threads there are. Of many that ask at
//! the same time each would get a thread of its own, which all the others then read of, and none would be left for the log.

use tokio::sync::Semaphore;

use crate::telemetry::counters::Counters;

/// Of the process, since that is what is read.
static TURN: Semaphore = Semaphore::const_new(1);

/// What this process has counted.
pub(super) async fn read() -> Result<Counters, capnp::Error> {
    let failed = |error: &dyn std::fmt::Display| capnp::Error::failed(format!("reading counters: {error}"));
    let turn = TURN.acquire().await.map_err(|error| failed(&error))?;
    let read = move || {
        // Until it is read: who asked may be gone before.
        let counters = Counters::read();
        drop(turn);
        counters
    };
    tokio::task::spawn_blocking(read).await.map_err(|error| failed(&error))
}
