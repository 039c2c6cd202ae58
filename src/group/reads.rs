//! Linearizable reads without a log entry (ReadIndex, Raft thesis §6.4).
//!
//! A read waits for a round of heartbeats that began after it arrived and that a quorum
//! acknowledged; then for everything committed at the round's start to be applied. All reads that
//! wait when a round starts share it. raft-rs silently drops a read index asked for before its
//! leader has committed in its own term, so rounds start only after that.

use std::collections::VecDeque;

use crate::ids::{Incarnation, Index};
use crate::limits;

struct Round<T> {
    number: u64,
    /// Known once a quorum has acknowledged the round.
    index: Option<Index>,
    readers: Vec<T>,
}

/// Reads under way on one replica.
pub struct Reads<T> {
    incarnation: Incarnation,
    arrived: Vec<T>,
    /// In the order of their start; indexes are known from the front on.
    rounds: VecDeque<Round<T>>,
    next_round: u64,
    count: usize,
}

impl<T> Reads<T> {
    /// None yet. The incarnation tells this replica's rounds from those it started before a restart.
    pub fn new(incarnation: Incarnation) -> Reads<T> {
        Reads { incarnation, arrived: Vec::new(), rounds: VecDeque::new(), next_round: 0, count: 0 }
    }

    /// How many reads wait.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// A read arrives.
    pub fn push(&mut self, reader: T) {
        self.count += 1;
        self.arrived.push(reader);
    }

    /// The context of a new round for all reads that arrived since the last one, if there are any
    /// and not too many rounds are under way.
    pub fn start_round(&mut self) -> Option<Vec<u8>> {
        let unacknowledged = self.rounds.iter().filter(|r| r.index.is_none()).count();
        if self.arrived.is_empty() || unacknowledged >= limits::READ_ROUNDS_MAX {
            return None;
        }
        let number = self.next_round;
        self.next_round += 1;
        self.rounds.push_back(Round { number, index: None, readers: std::mem::take(&mut self.arrived) });
        let mut context = Vec::with_capacity(16);
        context.extend_from_slice(&self.incarnation.to_be_bytes());
        context.extend_from_slice(&number.to_be_bytes());
        Some(context)
    }

    /// A quorum acknowledged the round with this context, at this commit index. It answers for all
    /// earlier rounds too.
    pub fn confirm(&mut self, context: &[u8], index: Index) {
        let Some((incarnation, number)) = context.split_first_chunk::<8>() else {
            return;
        };
        let Ok(number) = number.try_into().map(u64::from_be_bytes) else {
            return;
        };
        if u64::from_be_bytes(*incarnation) != self.incarnation {
            return;
        }
        for round in self.rounds.iter_mut().take_while(|r| r.number <= number) {
            round.index.get_or_insert(index);
        }
    }

    /// Takes the reads that may be answered from a state that is applied up to `applied`.
    pub fn ready(&mut self, applied: Index) -> Vec<T> {
        let mut ready = Vec::new();
        while self.rounds.front().is_some_and(|r| r.index.is_some_and(|index| index <= applied)) {
            if let Some(round) = self.rounds.pop_front() {
                ready.extend(round.readers);
            }
        }
        self.count -= ready.len();
        ready
    }

    /// Takes the reads that are `gone`: nobody waits for them.
    pub fn discard(&mut self, gone: impl Fn(&T) -> bool) -> Vec<T> {
        let mut dead = Vec::new();
        let rounds = self.rounds.iter_mut().map(|round| &mut round.readers);
        for readers in rounds.chain([&mut self.arrived]) {
            dead.extend(readers.extract_if(.., |reader| gone(reader)));
        }
        self.count -= dead.len();
        dead
    }

    /// Gives back the room that those under way don't need.
    pub fn shrink(&mut self) {
        self.arrived.shrink_to_fit();
        self.rounds.shrink_to_fit();
    }

    /// Takes all reads: leadership is lost, and they are to be asked elsewhere.
    pub fn drain(&mut self) -> Vec<T> {
        self.count = 0;
        let mut all = Vec::new();
        for round in self.rounds.drain(..) {
            all.extend(round.readers);
        }
        all.append(&mut self.arrived);
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_share_a_round_and_wait_for_its_index() {
        let mut reads = Reads::new(3);
        reads.push('a');
        reads.push('b');
        let context = reads.start_round().expect("a round");
        assert!(reads.start_round().is_none(), "nothing arrived since");
        reads.confirm(&context, 10);
        assert!(reads.ready(9).is_empty());
        assert_eq!(reads.ready(10), vec!['a', 'b']);
        assert!(reads.is_empty());
    }

    #[test]
    fn a_round_of_another_incarnation_confirms_nothing() {
        let mut old = Reads::new(1);
        old.push('x');
        let stale = old.start_round().expect("a round");
        let mut reads = Reads::new(2);
        reads.push('a');
        reads.start_round().expect("a round");
        reads.confirm(&stale, 1);
        reads.confirm(b"short", 1);
        assert!(reads.ready(100).is_empty());
    }

    #[test]
    fn reads_that_nobody_waits_for_leave_the_others_in_place() {
        let mut reads = Reads::new(1);
        reads.push('a');
        reads.push('b');
        let context = reads.start_round().expect("a round");
        reads.push('c');
        reads.push('d');
        assert_eq!(reads.discard(|&reader| reader == 'a' || reader == 'd'), vec!['a', 'd']);
        assert_eq!(reads.len(), 2);
        reads.confirm(&context, 5);
        assert_eq!(reads.ready(5), vec!['b']);
        assert_eq!(reads.drain(), vec!['c']);
    }

    #[test]
    fn a_read_never_joins_a_round_that_began_before_it() {
        let mut reads = Reads::new(1);
        reads.push('a');
        let first = reads.start_round().expect("a round");
        reads.push('b');
        reads.confirm(&first, 5);
        assert_eq!(reads.ready(5), vec!['a']);
        assert_eq!(reads.drain(), vec!['b']);
    }
}
