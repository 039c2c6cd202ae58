//! Waiting for what the cluster does by itself: with a bar on stderr if that is a terminal, else with a line there
//! now and then.

use std::collections::VecDeque;
use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use crate::cli::context::{Context, Session};
use crate::cli::failure::{Exit, Failure};
use crate::cli::output;

/// Pause between two looks.
const PAUSE: Duration = Duration::from_millis(200);

/// Where there is no bar, a line tells of changes at most so often.
const NOTES: Duration = Duration::from_secs(10);

/// Over so much of the past a pace is measured.
const PACE: Duration = Duration::from_secs(60);

/// A pace of less than this is chance.
const PACE_MIN: Duration = Duration::from_secs(2);

/// How far something is.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Progress {
    /// How much is done, in whatever `total` is in.
    pub done: u64,
    /// How much there is in all.
    pub total: u64,
    /// What that is counted in, in the plural.
    pub unit: &'static str,
    /// What else to tell, beside the bar.
    pub told: String,
    /// Seconds until it ends, where that is known better than by how much is done in which time.
    pub eta_s: Option<u64>,
    /// What stands still, and why.
    pub obstacle: Option<String>,
    /// How it ended, if it has.
    pub end: Option<Result<(), Failure>>,
}

impl Progress {
    /// All of it on one line, with the estimate that `pace` gives if there is no better one.
    fn text(&self, eta_s: Option<u64>) -> String {
        let mut text = format!("{} of {} {}", self.done, self.total, self.unit);
        if !self.told.is_empty() {
            text.push_str(&format!(", {}", self.told));
        }
        if let Some(seconds) = eta_s {
            text.push_str(&format!(", {} left", humantime::format_duration(Duration::from_secs(seconds))));
        }
        if let Some(obstacle) = &self.obstacle {
            text.push_str(&format!(", {}", output::printable(obstacle.as_bytes())));
        }
        text
    }

    fn json(&self, eta_s: Option<u64>) -> Value {
        json!({"progress": {
            "done": self.done,
            "total": self.total,
            "unit": self.unit,
            "told": self.told,
            "eta_s": eta_s,
            "obstacle": self.obstacle,
        }})
    }
}

/// How fast a number grows, by what it was in the last minute.
#[derive(Clone, Debug, Default)]
pub struct Pace(VecDeque<(Instant, u64)>);

impl Pace {
    /// The number is this now. One that has shrunk begins anew.
    pub fn heard(&mut self, now: Instant, number: u64) {
        if self.0.back().is_some_and(|(_, last)| *last > number) {
            self.0.clear();
        }
        self.0.push_back((now, number));
        while self.0.len() > 2 && self.0.get(1).is_some_and(|(at, _)| now.duration_since(*at) >= PACE) {
            self.0.pop_front();
        }
    }

    /// By how much it grows in a second; `None`: it isn't known for long enough.
    pub fn per_second(&self) -> Option<f64> {
        let ((since, first), (until, last)) = (self.0.front()?, self.0.back()?);
        let time = until.duration_since(*since);
        (time >= PACE_MIN).then(|| (last - first) as f64 / time.as_secs_f64())
    }

    /// Seconds until it has grown by `left` more; `None`: not to be told.
    pub fn eta_s(&self, left: u64) -> Option<u64> {
        let pace = self.per_second().filter(|pace| *pace > 0.0 && left > 0)?;
        Some((left as f64 / pace).ceil() as u64)
    }
}

/// What is told where there is no bar: what has changed, and not too often.
#[derive(Debug, Default)]
struct Notes(Option<(Instant, String)>);

impl Notes {
    /// Whether this is to be told now.
    fn is_due(&mut self, now: Instant, text: &str) -> bool {
        let quiet = |(at, last): &(Instant, String)| last == text || now.duration_since(*at) < NOTES;
        if self.0.as_ref().is_some_and(quiet) {
            return false;
        }
        self.0 = Some((now, text.to_owned()));
        true
    }
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
    let bar = io::stderr().is_terminal().then(bar);
    let limit = context.global.timeout.map(|_| Instant::now() + session.remaining());
    let mut silent = false;
    let mut last = "nothing is known of it".to_owned();
    let (mut pace, mut notes) = (Pace::default(), Notes::default());
    let ended = loop {
        match look().await {
            Ok(progress) => {
                silent = false;
                let now = Instant::now();
                pace.heard(now, progress.done);
                let eta_s =
                    progress.eta_s.or_else(|| pace.eta_s(progress.total.saturating_sub(progress.done)));
                last = progress.text(eta_s);
                if let Some(end) = progress.end {
                    break end;
                }
                match &bar {
                    Some(bar) => {
                        bar.set_length(progress.total);
                        bar.set_position(progress.done);
                        bar.set_message(last.clone());
                    }
                    None if notes.is_due(now, &last) => match context.json() {
                        true => output::note(progress.json(eta_s).to_string()),
                        false => output::note(format!("{what}: {last}")),
                    },
                    None => {}
                }
            }
            Err(failure) if failure.exit == Exit::Unavailable => {
                if !std::mem::replace(&mut silent, true) {
                    let tell = || output::note(format!("waiting: {}", failure.message));
                    match &bar {
                        Some(bar) => bar.suspend(tell),
                        None => tell(),
                    }
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
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    ended
}

/// A bar, with everything else beside it.
fn bar() -> ProgressBar {
    let bar = ProgressBar::new(0);
    match ProgressStyle::with_template("{bar:40} {msg}") {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pace_is_of_the_last_minute_and_of_what_grows() {
        let begun = Instant::now();
        let at = |seconds| begun + Duration::from_secs(seconds);
        let mut pace = Pace::default();
        pace.heard(at(0), 0);
        pace.heard(at(1), 100);
        assert_eq!((pace.per_second(), pace.eta_s(10)), (None, None), "too short");
        pace.heard(at(10), 100);
        assert_eq!((pace.per_second(), pace.eta_s(95)), (Some(10.0), Some(10)));
        assert_eq!(pace.eta_s(0), None, "nothing is left");
        // What was long ago counts no more.
        pace.heard(at(100), 100);
        pace.heard(at(110), 100);
        assert_eq!((pace.per_second(), pace.eta_s(95)), (Some(0.0), None));
        pace.heard(at(111), 5);
        assert_eq!(pace.per_second(), None, "it begins anew");
    }

    #[test]
    fn changes_are_noted_and_not_too_often() {
        let begun = Instant::now();
        let at = |seconds| begun + Duration::from_secs(seconds);
        let mut notes = Notes::default();
        assert!(notes.is_due(at(0), "1 of 3"), "at once");
        assert!(!notes.is_due(at(9), "2 of 3"), "too soon");
        assert!(notes.is_due(at(10), "2 of 3"));
        assert!(!notes.is_due(at(100), "2 of 3"), "nothing new");
        assert!(notes.is_due(at(101), "3 of 3"));
    }

    #[test]
    fn progress_has_one_estimate_and_says_what_stands_still() {
        let mut progress = Progress { done: 1, total: 3, unit: "shards", ..Progress::default() };
        assert_eq!(progress.text(None), "1 of 3 shards");
        progress.told = "2 KiB/s".into();
        progress.obstacle = Some("shard 4: no\nroom".into());
        assert_eq!(progress.text(Some(61)), "1 of 3 shards, 2 KiB/s, 1m 1s left, shard 4: no\\nroom");
        assert_eq!(
            progress.json(Some(61)).to_string(),
            concat!(
                r#"{"progress":{"done":1,"total":3,"unit":"shards","told":"2 KiB/s","eta_s":61,"#,
                r#""obstacle":"shard 4: no\nroom"}}"#
            )
        );
    }
}
