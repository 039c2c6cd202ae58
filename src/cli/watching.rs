//! Commands that show something again and again until they are stopped.

use std::convert::Infallible;
use std::time::Duration;

use tokio::time::MissedTickBehavior;

use super::context::{Context, Session, block_on};
use super::failure::{Exit, Failure};
use super::output;
use super::serve::until_stopped;
use super::signals::Signals;

/// Has `print` show what `look` sees, every `interval`, until a signal comes. What goes wrong in between is told and
/// doesn't end it; how it ends, the last look decides.
///
/// # Errors
/// There is no connection to begin with, or what is seen can't be printed.
pub fn watch<T>(
    context: &Context,
    interval: Duration,
    look: impl AsyncFn(&Session) -> Result<T, Failure>,
    print: impl Fn(&T) -> Result<(), Failure>,
    exit_of: impl Fn(&T) -> Exit,
) -> Result<Exit, Failure> {
    let signals = Signals::listen(None)?;
    block_on(async {
        let Some(session) = until_stopped(&signals, context.connect()).await.transpose()? else {
            return Ok(Exit::Done);
        };
        let mut exit = Exit::Done;
        let watching = async {
            // The looks themselves take time.
            let mut ticks = tokio::time::interval(interval);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                ticks.tick().await;
                match look(&session).await {
                    Ok(seen) => {
                        exit = exit_of(&seen);
                        if !context.json() && output::on_terminal() {
                            // Home, and clear what is below: no flicker.
                            output::bytes(b"\x1b[H\x1b[J")?;
                        }
                        print(&seen)?;
                    }
                    Err(failure) => {
                        exit = failure.exit;
                        output::failure(context.json(), &failure);
                    }
                }
            }
        };
        let ended: Option<Result<Infallible, Failure>> = until_stopped(&signals, watching).await;
        session.client.close().await;
        match ended {
            Some(Err(failure)) => Err(failure),
            Some(Ok(never)) => match never {},
            None => Ok(exit),
        }
    })
}
