//! Whether a node that owes an answer is slow or gone. Sans-I/O: the times come from outside.
//!
//! A call may take long for good reasons: a quorum that is slow, a queue. A node whose process is stopped,
//! or a connection that lost a direction, looks the same, and is worth leaving much sooner. So a node of
//! which nothing at all was heard for [`SILENCE_MS_MAX`] is asked a question that it answers by itself, at
//! once; when neither that answer nor anything else comes within [`SIGN_MS_MAX`], it is gone. Bytes that are
//! still on their way to it are allowed their time before either.
//!
//! ```text
//!   call begins / last byte heard          asked                          gone
//!   ├──────── SILENCE_MS_MAX + bytes ──────┼──── SIGN_MS_MAX + bytes ─────┤
//! ```

use std::time::{Duration, Instant};

use crate::limits::{ATTEMPT_BYTES_PER_MS, SIGN_MS_MAX, SILENCE_MS_MAX};

/// What is known of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Signs {
    /// When a byte was last heard.
    pub heard: Instant,
    /// When the node was last asked for a sign.
    pub asked: Option<Instant>,
    /// Bytes of the calls that wait for an answer.
    pub owed: usize,
}

/// What to think of the node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Look again then.
    Wait(Instant),
    /// Ask it for a sign.
    Ask,
    /// It is gone, or the way to it is.
    Gone,
}

/// How long a node may be silent that has so many bytes still to hear.
pub fn patience(owed: usize) -> Duration {
    Duration::from_millis(SILENCE_MS_MAX) + sending(owed)
}

/// The time that bytes are allowed to be on their way.
fn sending(bytes: usize) -> Duration {
    Duration::from_millis(bytes as u64 / ATTEMPT_BYTES_PER_MS)
}

/// The verdict at `now`, for a call that began at `began`.
pub fn verdict(signs: &Signs, began: Instant, now: Instant) -> Verdict {
    // What was asked before the call began tells of the time before it.
    match signs.asked.filter(|asked| *asked >= signs.heard.max(began)) {
        Some(asked) => {
            let gone = asked + Duration::from_millis(SIGN_MS_MAX) + sending(signs.owed);
            if gone <= now { Verdict::Gone } else { Verdict::Wait(gone) }
        }
        None => {
            let silent = signs.heard.max(began) + patience(signs.owed);
            if silent <= now { Verdict::Ask } else { Verdict::Wait(silent) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_silent_node_is_asked_and_then_gone() {
        let began = Instant::now();
        let mut signs = Signs { heard: began - ms(60_000), asked: None, owed: 0 };
        let at = |signs: &Signs, after| verdict(signs, began, began + after);
        let silent = ms(SILENCE_MS_MAX);
        // That nothing came while nothing was asked means nothing.
        assert_eq!(at(&signs, ms(0)), Verdict::Wait(began + silent));
        assert_eq!(at(&signs, silent - ms(1)), Verdict::Wait(began + silent));
        assert_eq!(at(&signs, silent), Verdict::Ask);
        signs.asked = Some(began + silent);
        let gone = silent + ms(SIGN_MS_MAX);
        assert_eq!(at(&signs, silent), Verdict::Wait(began + gone));
        assert_eq!(at(&signs, gone), Verdict::Gone);
        // A byte in between, and all begins anew.
        signs.heard = began + gone - ms(1);
        assert_eq!(at(&signs, gone), Verdict::Wait(signs.heard + silent));
        assert_eq!(at(&signs, gone + silent), Verdict::Ask);
    }

    #[test]
    fn a_sign_asked_for_before_the_call_is_nothing_to_it() {
        let began = Instant::now();
        let signs = Signs { heard: began - ms(60_000), asked: Some(began - ms(50_000)), owed: 0 };
        assert_eq!(verdict(&signs, began, began), Verdict::Wait(began + ms(SILENCE_MS_MAX)));
        assert_eq!(verdict(&signs, began, began + ms(SILENCE_MS_MAX)), Verdict::Ask);
    }

    #[test]
    fn a_large_request_is_allowed_its_time() {
        let began = Instant::now();
        let owed = 8 << 20;
        let mut signs = Signs { heard: began, asked: None, owed };
        let sending = ms(owed as u64 / ATTEMPT_BYTES_PER_MS);
        let asked = began + ms(SILENCE_MS_MAX) + sending;
        assert_eq!(verdict(&signs, began, asked - ms(1)), Verdict::Wait(asked));
        assert_eq!(verdict(&signs, began, asked), Verdict::Ask);
        signs.asked = Some(asked);
        assert_eq!(verdict(&signs, began, asked), Verdict::Wait(asked + ms(SIGN_MS_MAX) + sending));
    }
}
