//! The sessions of a client: which tag a command gets, and what the shard is told that it may forget.
//! Sans-I/O: ids and time come from outside.
//!
//! A lane tags its commands under one session at a time, and takes a new one when that no longer serves:
//!
//! ```text
//!           first command             an answer proves that the shard has it
//!   (none) ───────────────► opening ───────────────────────────────────────► open
//!                              │                                               │
//!                              └──► left: new commands get another session ◄───┘
//!                                   idle too long, expired at the shard, or a deadline
//!                                   that it doesn't cover
//! ```
//!
//! While it is opening every command asks for it to be opened, so whichever comes first does: a session
//! costs no call and no log entry of its own. Commands of a session that was left keep their tags until
//! they end. That is the rule everything here serves: a command that may have been applied is never sent
//! under another tag.
//!
//! A shard keeps the results from the first command under way on, and only so many. Where one is held up,
//! the lane's next commands wait rather than take another session: what a session that was left has of
//! results stays with the shard until it expires, at the cost of all.
//!
//! A shard forgets a session that wasn't used for its time to live, measured in time during which it had
//! a leader. A tag is used for half of that, by a clock which also counts while the machine sleeps. So a
//! repetition meets the session that knows of the first attempt, unless the network kept it for the
//! other half.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use crate::ids::SessionId;
use crate::limits::TIMEOUT_MAX_MS;
use crate::machine::session::{LIFETIME_MS, RESULTS_MAX};

/// Time to live of a session, in the greatest deadlines of its commands.
const TTL_DEADLINES: u32 = 10;
/// What a shard makes of less.
const TTL_MIN: Duration = Duration::from_millis(*LIFETIME_MS.start() as u64);

const _: () = assert!(TTL_DEADLINES as u64 * TIMEOUT_MAX_MS <= *LIFETIME_MS.end() as u64);

/// A point in time on the client's clock: since some moment in the past, always the same.
pub type Moment = Duration;

/// What a call says of its session.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// Which session.
    pub id: SessionId,
    /// Its time to live if it must be opened, in milliseconds; 0: the shard has it.
    pub open_ttl_ms: u32,
    /// Every command below this has ended; its result may be forgotten.
    pub acked_below: u64,
}

/// One session. Invariant: `window` is empty, or begins with a command under way.
pub struct Session {
    id: SessionId,
    ttl: Duration,
    state: RefCell<State>,
}

struct State {
    /// An answer has proved that the shard has it.
    open: bool,
    /// The shard has it no more.
    lost: bool,
    /// When the last call left that is known to have used it; at first, when it began.
    used: Moment,
    acked_below: u64,
    /// The commands from `acked_below` on: whether each is under way.
    window: VecDeque<bool>,
}

impl Session {
    fn new(id: SessionId, within: Duration, now: Moment) -> Rc<Session> {
        let state =
            State { open: false, lost: false, used: now, acked_below: 1, window: VecDeque::default() };
        Rc::new(Session { id, ttl: ttl(within), state: RefCell::new(state) })
    }

    /// What a call that leaves now says of it.
    pub fn header(&self) -> Header {
        let state = self.state.borrow();
        let ttl_ms = u32::try_from(self.ttl.as_millis()).unwrap_or(u32::MAX);
        Header {
            id: self.id,
            open_ttl_ms: if state.open { 0 } else { ttl_ms },
            acked_below: state.acked_below,
        }
    }

    /// An answer to a call that left at `sent` proves that the shard had it.
    pub fn proved(&self, sent: Moment) {
        let mut state = self.state.borrow_mut();
        state.open = true;
        state.used = state.used.max(sent);
    }

    /// The shard doesn't have it any more: no new command gets a tag of it.
    pub fn lost(&self) {
        self.state.borrow_mut().lost = true;
    }

    /// Whether a new command with so much time may have a tag of it.
    fn serves(&self, within: Duration, now: Moment) -> bool {
        let state = self.state.borrow();
        !state.lost && ttl(within) <= self.ttl && now.saturating_sub(state.used) <= self.ttl / 2
    }

    /// `None`: the shard might have no room for one more result.
    fn tag(self: &Rc<Session>, now: Moment) -> Option<Tag> {
        let mut state = self.state.borrow_mut();
        if state.window.len() >= RESULTS_MAX {
            return None;
        }
        let sequence = state.acked_below + state.window.len() as u64;
        state.window.push_back(true);
        Some(Tag { session: self.clone(), sequence, given: now })
    }

    fn ended(&self, sequence: u64) {
        let mut state = self.state.borrow_mut();
        let at = sequence.checked_sub(state.acked_below).and_then(|at| usize::try_from(at).ok());
        if let Some(place) = at.and_then(|at| state.window.get_mut(at)) {
            *place = false;
        }
        while state.window.front() == Some(&false) {
            state.window.pop_front();
            state.acked_below += 1;
        }
    }
}

/// Time to live of a session whose commands have at most so much time.
fn ttl(within: Duration) -> Duration {
    within.saturating_mul(TTL_DEADLINES).max(TTL_MIN)
}

/// What makes a command one of its kind: a session and a sequence number in it. Counts as under way until
/// it is dropped.
pub struct Tag {
    session: Rc<Session>,
    sequence: u64,
    given: Moment,
}

impl Tag {
    /// The session.
    pub fn session(&self) -> &Rc<Session> {
        &self.session
    }

    /// The command's number in it, from 1.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Whether an attempt that leaves now still meets what the shard knows of earlier ones.
    pub fn holds(&self, now: Moment) -> bool {
        now.saturating_sub(self.given) <= self.session.ttl / 2
    }
}

impl Drop for Tag {
    fn drop(&mut self) {
        self.session.ended(self.sequence);
    }
}

/// The session under which a lane's new commands go.
#[derive(Default)]
pub struct Current(Option<Rc<Session>>);

impl Current {
    /// A tag for a command with so much time; `None` if it has to wait: because it would be one of another
    /// session than `only`, or until a command before it has ended. `draw` gives the id of a new session
    /// where one is needed.
    pub fn tag(
        &mut self,
        within: Duration,
        only: Option<&Rc<Session>>,
        now: Moment,
        draw: &mut dyn FnMut() -> SessionId,
    ) -> Option<Tag> {
        let session = match &mut self.0 {
            Some(session) if session.serves(within, now) => session,
            current => current.insert(Session::new(draw(), within, now)),
        };
        match only {
            Some(only) if !Rc::ptr_eq(only, session) => None,
            _ => session.tag(now),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::RandomId;
    use proptest::prelude::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// A lane whose sessions have the ids 1, 2, …
    #[derive(Default)]
    struct Lane {
        current: Current,
        drawn: u8,
    }

    impl Lane {
        fn tag(&mut self, within: Duration, now: Moment) -> Tag {
            let drawn = &mut self.drawn;
            let mut draw = || {
                *drawn += 1;
                RandomId([*drawn; 16])
            };
            self.current.tag(within, None, now, &mut draw).unwrap()
        }
    }

    fn place(tag: &Tag) -> (u8, u64) {
        (tag.session.header().id.0[0], tag.sequence)
    }

    #[test]
    fn it_asks_to_be_opened_until_that_is_proved() {
        let mut lane = Lane::default();
        let first = lane.tag(20 * SECOND, SECOND);
        let header = first.session.header();
        assert_eq!((header.open_ttl_ms, header.acked_below), (200_000, 1));
        let second = lane.tag(SECOND, SECOND);
        assert_eq!((place(&first), place(&second)), ((1, 1), (1, 2)));
        assert_eq!(second.session.header(), header);
        first.session.proved(SECOND);
        assert_eq!(second.session.header(), Header { open_ttl_ms: 0, ..header });
    }

    #[test]
    fn what_has_ended_is_acknowledged_up_to_the_first_under_way() {
        let mut lane = Lane::default();
        let mut tags: Vec<Option<Tag>> = (0..4).map(|_| Some(lane.tag(SECOND, SECOND))).collect();
        let session = tags[0].as_ref().unwrap().session.clone();
        let mut end = |n: usize| {
            tags[n - 1] = None;
            session.header().acked_below
        };
        assert_eq!((end(2), end(4), end(1), end(3)), (1, 1, 3, 5));
        assert_eq!(place(&lane.tag(SECOND, SECOND)), (1, 5));
    }

    #[test]
    fn a_session_is_left_when_it_no_longer_serves() {
        let mut lane = Lane::default();
        // Ten deadlines, at least ten seconds; half of that without use.
        assert_eq!(place(&lane.tag(SECOND / 10, Duration::ZERO)), (1, 1));
        assert_eq!(place(&lane.tag(SECOND, 5 * SECOND)), (1, 2));
        let late = 5 * SECOND + Duration::from_millis(1);
        assert_eq!(place(&lane.tag(SECOND, late)), (2, 1));
        // A longer deadline; shorter ones are covered by what covers that.
        assert_eq!(place(&lane.tag(3 * SECOND, late)), (3, 1));
        let tag = lane.tag(SECOND, late);
        assert_eq!(place(&tag), (3, 2));
        // Use is what an answer proves, from the time when the call left; not the answer's own.
        tag.session.proved(20 * SECOND);
        assert_eq!(place(&lane.tag(SECOND, 35 * SECOND)), (3, 3));
        assert_eq!(place(&lane.tag(SECOND, 36 * SECOND)), (4, 1));
        lane.tag(SECOND, 36 * SECOND).session.lost();
        let next = lane.tag(SECOND, 36 * SECOND);
        assert_eq!(place(&next), (5, 1));
        // The commands of the one that was left keep their tags.
        assert_eq!(place(&tag), (3, 2));
    }

    #[test]
    fn no_more_commands_are_given_than_the_shard_keeps_results() {
        let mut lane = Lane::default();
        let mut draw = || RandomId([1; 16]);
        let mut next = || lane.current.tag(SECOND, None, SECOND, &mut draw);
        let stuck = next().unwrap();
        for _ in 1..RESULTS_MAX {
            assert!(next().is_some());
        }
        assert!(next().is_none());
        assert_eq!(stuck.session.header().acked_below, 1);
        drop(stuck);
        assert_eq!(next().map(|tag| tag.sequence), Some(RESULTS_MAX as u64 + 1));
    }

    #[test]
    fn a_call_has_one_session() {
        let mut lane = Lane::default();
        let old = lane.tag(SECOND, SECOND);
        let mut draw = || RandomId([9; 16]);
        let mut another = |within, only| lane.current.tag(within, Some(only), SECOND, &mut draw);
        assert!(another(SECOND, &old.session).is_some());
        assert!(another(2 * SECOND, &old.session).is_none());
        assert!(another(SECOND, &old.session).is_none());
    }

    #[test]
    fn a_tag_holds_for_half_the_life_of_its_session() {
        let mut lane = Lane::default();
        let tag = lane.tag(2 * SECOND, 3 * SECOND);
        assert!(tag.holds(13 * SECOND));
        // Not even if others used the session since: whether the shard opened it anew can't be seen.
        tag.session.proved(13 * SECOND);
        assert!(!tag.holds(14 * SECOND));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Tag { within_s: u64 },
        End { at: usize },
        Pass { ms: u64 },
        Prove,
        Lose,
    }

    fn any_step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => (1u64..4).prop_map(|within_s| Step::Tag { within_s }),
            6 => any::<usize>().prop_map(|at| Step::End { at }),
            2 => (0u64..8_000).prop_map(|ms| Step::Pass { ms }),
            2 => Just(Step::Prove),
            1 => Just(Step::Lose),
        ]
    }

    proptest! {
        /// Against the plain reading: no tag is given twice, a session acknowledges exactly what lies below
        /// its first command under way, and a command's deadline is a tenth of its session's life.
        #[test]
        fn tags_are_unique_and_acknowledgements_true(steps in prop::collection::vec(any_step(), 1..200)) {
            let (mut lane, mut now) = (Lane::default(), Duration::ZERO);
            let mut under_way: Vec<Tag> = Vec::new();
            let mut given = std::collections::BTreeMap::<u8, u64>::new();
            for step in steps {
                match step {
                    Step::Tag { within_s } if lane.drawn < u8::MAX => {
                        let within = Duration::from_secs(within_s);
                        let tag = lane.tag(within, now);
                        let (session, sequence) = place(&tag);
                        let last = given.insert(session, sequence).unwrap_or(0);
                        prop_assert_eq!(sequence, last + 1);
                        prop_assert!(tag.session.ttl >= TTL_DEADLINES * within && tag.holds(now + within));
                        under_way.push(tag);
                    }
                    Step::Tag { .. } => (),
                    Step::End { at } if !under_way.is_empty() => {
                        let at = at % under_way.len();
                        drop(under_way.swap_remove(at));
                    }
                    Step::End { .. } => (),
                    Step::Pass { ms } => now += Duration::from_millis(ms),
                    Step::Prove => under_way.iter().for_each(|tag| tag.session.proved(now)),
                    Step::Lose => under_way.iter().for_each(|tag| tag.session.lost()),
                }
                for tag in &under_way {
                    let (session, _) = place(tag);
                    let same = under_way.iter().filter(|other| place(other).0 == session);
                    let first = same.map(Tag::sequence).min();
                    prop_assert_eq!(Some(tag.session.header().acked_below), first);
                }
            }
        }
    }
}
