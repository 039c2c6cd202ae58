//! Who waits for which log entry.
//!
//! A proposal is remembered by (index, term). The entry that is applied at its index decides: the
//! same term, and its replies are the answers; another term, and the proposal certainly never
//! happened. Since terms never fall along a log, an applied entry of term t also proves that no
//! entry of a lower term can appear behind it.

use std::collections::BTreeMap;

use crate::ids::{Position, Term};

/// Proposals in the log, not yet decided. `T` is what the caller is answered with.
pub struct Proposals<T> {
    waiting: BTreeMap<(u64, u64), Vec<T>>,
    count: usize,
    /// No term in `waiting` is below this.
    least_term: Term,
}

/// What an applied entry decided.
pub struct Decided<T> {
    /// Those who proposed this very entry, one per command, in order.
    pub applied: Vec<T>,
    /// Those whose proposals certainly never take effect.
    pub superseded: Vec<T>,
}

impl<T> Proposals<T> {
    /// None yet.
    pub fn new() -> Proposals<T> {
        Proposals { waiting: BTreeMap::new(), count: 0, least_term: Term::MAX }
    }

    /// How many callers wait.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// `callers` proposed the entry at `position`.
    pub fn insert(&mut self, position: Position, callers: Vec<T>) {
        self.count += callers.len();
        let previous = self.waiting.insert((position.index, position.term), callers);
        assert!(previous.is_none(), "two proposals at one position");
        self.least_term = self.least_term.min(position.term);
    }

    /// The entry of the last caller that `which` is true of.
    pub fn position(&self, which: impl Fn(&T) -> bool) -> Option<Position> {
        let mut waiting = self.waiting.iter().rev();
        let (&(index, term), _) = waiting.find(|(_, callers)| callers.iter().any(&which))?;
        Some(Position { index, term })
    }

    /// The entry at `position` is applied.
    pub fn decide(&mut self, position: Position) -> Decided<T> {
        let mut decided = Decided { applied: Vec::new(), superseded: Vec::new() };
        while let Some(first) = self.waiting.first_entry() {
            let &(index, term) = first.key();
            if index > position.index {
                break;
            }
            let callers = first.remove();
            self.count -= callers.len();
            if (index, term) == (position.index, position.term) {
                decided.applied = callers;
            } else {
                decided.superseded.extend(callers);
            }
        }
        // Behind the applied entry only those of a lower term are lost. Usually there are none, and as
        // many wait as a slow quorum makes wait: they are not walked through for every entry.
        if self.least_term < position.term {
            let lost: Vec<_> =
                self.waiting.keys().filter(|&&(_, term)| term < position.term).copied().collect();
            for key in lost {
                if let Some(callers) = self.waiting.remove(&key) {
                    self.count -= callers.len();
                    decided.superseded.extend(callers);
                }
            }
            self.least_term = self.waiting.keys().map(|(_, term)| *term).min().unwrap_or(Term::MAX);
        }
        decided
    }

    /// Whether anyone waits for an entry of a term below `term`.
    pub fn any_below(&self, term: Term) -> bool {
        self.waiting.keys().any(|&(_, of)| of < term)
    }

    /// Takes everyone who waits for an entry of a term below `term`.
    pub fn drain_below(&mut self, term: Term) -> Vec<T> {
        let (below, rest) =
            std::mem::take(&mut self.waiting).into_iter().partition(|((_, of), _)| *of < term);
        self.waiting = rest;
        let below: BTreeMap<_, Vec<T>> = below;
        let drained: Vec<T> = below.into_values().flatten().collect();
        self.count -= drained.len();
        drained
    }

    /// Everyone who waits, because the outcome can't be awaited here any longer.
    pub fn drain(&mut self) -> impl Iterator<Item = T> {
        self.count = 0;
        std::mem::take(&mut self.waiting).into_values().flatten()
    }
}

impl<T> Default for Proposals<T> {
    fn default() -> Self {
        Proposals::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(index: u64, term: u64) -> Position {
        Position { index, term }
    }

    #[test]
    fn the_entry_with_my_term_answers_me() {
        let mut proposals = Proposals::new();
        proposals.insert(at(7, 2), vec!['a', 'b']);
        proposals.insert(at(8, 2), vec!['c']);
        let decided = proposals.decide(at(7, 2));
        assert_eq!((decided.applied, decided.superseded), (vec!['a', 'b'], vec![]));
        assert_eq!(proposals.len(), 1);
        assert_eq!(proposals.position(|caller| *caller == 'c'), Some(at(8, 2)));
        assert_eq!(proposals.position(|caller| *caller == 'a'), None, "it is decided");
    }

    #[test]
    fn those_of_older_terms_are_drained_alone() {
        let mut proposals = Proposals::new();
        proposals.insert(at(7, 2), vec!['a', 'b']);
        proposals.insert(at(8, 3), vec!['c']);
        assert_eq!(proposals.drain_below(3), vec!['a', 'b']);
        assert_eq!(proposals.len(), 1);
        assert_eq!(proposals.decide(at(8, 3)).applied, vec!['c']);
    }

    #[test]
    fn another_term_at_my_index_supersedes_me() {
        let mut proposals = Proposals::new();
        proposals.insert(at(7, 2), vec!['a']);
        let decided = proposals.decide(at(7, 3));
        assert_eq!((decided.applied, decided.superseded), (vec![], vec!['a']));
    }

    #[test]
    fn a_higher_term_before_my_index_supersedes_me_too() {
        let mut proposals = Proposals::new();
        proposals.insert(at(9, 2), vec!['a']);
        proposals.insert(at(9, 4), vec!['b']);
        let decided = proposals.decide(at(7, 4));
        assert_eq!(decided.superseded, vec!['a']);
        assert_eq!(proposals.decide(at(9, 4)).applied, vec!['b']);
        assert!(proposals.is_empty());
    }
}
