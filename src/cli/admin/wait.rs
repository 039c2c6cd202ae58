//! Waiting for what the cluster does by itself, with a bar on stderr if that is a terminal.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::cli::context::{Context, Session};
use crate::cli::failure::{Exit, Failure};
use crate::cli::output;

/// Pause between two looks.
const PAUSE: Duration = Duration::from_millis(200);

/// How far something is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Progress {
    /// How much is done, in whatever `total` is in.
    pub done: u64,
    /// How much there is in all.
    pub total: u64,
    /// What else to tell, beside the bar.
    pub told: String,
    /// How it ended, if it has.
    pub end: Option<Result<(), Failure>>,
}

/// Looks again and again until the thing has ended, or the command's `--timeout` is over: without one, as long
/// as it takes. `what` goes on without this command. A look that gets no answer is told once, and no reason
/// to give up: nodes may be restarted meanwhile.
pub async fn wait(
    context: &Context,
    session: &Session,
    what: &str,
    mut look: impl AsyncFnMut() -> Result<Progress, Failure>,
) -> Result<(), Failure> {
    let bar = bar();
    let limit = context.global.timeout.map(|_| Instant::now() + session.remaining());
    let mut silent = false;
    let mut last = String::new();
    let ended = loop {
        match look().await {
            Ok(progress) => {
                silent = false;
                bar.set_length(progress.total);
                bar.set_position(progress.done);
                bar.set_message(progress.told.clone());
                last = match progress.told.as_str() {
                    "" => format!("{} of {}", progress.done, progress.total),
                    told => format!("{} of {}, {told}", progress.done, progress.total),
                };
                if let Some(end) = progress.end {
                    break end;
                }
            }
            Err(failure) if failure.exit == Exit::Unavailable => {
                if !std::mem::replace(&mut silent, true) {
                    bar.suspend(|| output::note(format!("waiting: {}", failure.message)));
                }
            }
            Err(failure) => break Err(failure),
        }
        if limit.is_some_and(|limit| Instant::now() + PAUSE >= limit) {
            break Err(Failure::unknown(format!(
                "{what} isn't done within {} ({last}); the cluster goes on with it",
                output::seconds(context.timeout())
            )));
        }
        tokio::time::sleep(PAUSE).await;
    };
    bar.finish_and_clear();
    ended
}

/// The time for what follows on a wait: the rest of `--timeout`, or, where the wait took as long as it took, as
/// much as a command has.
pub fn rest(context: &Context, session: &Session) -> Duration {
    match context.global.timeout {
        Some(_) => session.remaining(),
        None => session.timeout(),
    }
}

/// A bar with what is done, what there is, a word beside it, and an estimate.
fn bar() -> ProgressBar {
    let bar = ProgressBar::new(0);
    match ProgressStyle::with_template("{bar:40} {pos}/{len} {msg} {eta}") {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}
