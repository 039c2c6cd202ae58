//! Commands that wait to be proposed, bounded by who fills it: [`Queue::bytes`] tells.

use std::collections::VecDeque;

/// First come, first proposed. `T` is what the caller is answered with, `C` a command.
pub struct Queue<T, C> {
    waiting: VecDeque<Waiting<T, C>>,
    bytes: usize,
}

struct Waiting<T, C> {
    caller: T,
    command: C,
    bytes: usize,
}

impl<T, C> Queue<T, C> {
    /// An empty one.
    pub fn new() -> Queue<T, C> {
        Queue { waiting: VecDeque::new(), bytes: 0 }
    }

    /// How many commands wait.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Bytes of all that wait.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// A command of so many bytes arrives.
    pub fn push(&mut self, caller: T, command: C, bytes: usize) {
        self.bytes += bytes;
        self.waiting.push_back(Waiting { caller, command, bytes });
    }

    /// The next command, and its bytes.
    pub fn next(&self) -> Option<(&C, usize)> {
        self.waiting.front().map(|next| (&next.command, next.bytes))
    }

    /// Takes the next command.
    pub fn pop(&mut self) -> Option<(T, C)> {
        let next = self.waiting.pop_front()?;
        self.bytes -= next.bytes;
        Some((next.caller, next.command))
    }

    /// Takes every command whose caller is `gone`, and returns the callers.
    pub fn discard(&mut self, gone: impl Fn(&T) -> bool) -> Vec<T> {
        if !self.waiting.iter().any(|waiting| gone(&waiting.caller)) {
            return Vec::new();
        }
        let (dead, waiting) =
            std::mem::take(&mut self.waiting).into_iter().partition::<VecDeque<_>, _>(|w| gone(&w.caller));
        self.waiting = waiting;
        self.bytes -= dead.iter().map(|dead| dead.bytes).sum::<usize>();
        dead.into_iter().map(|dead| dead.caller).collect()
    }

    /// Gives back the room that those who wait don't need.
    pub fn shrink(&mut self) {
        self.waiting.shrink_to_fit();
    }

    /// Takes all, and returns the callers.
    pub fn drain(&mut self) -> Vec<T> {
        self.bytes = 0;
        self.waiting.drain(..).map(|waiting| waiting.caller).collect()
    }
}

impl<T, C> Default for Queue<T, C> {
    fn default() -> Self {
        Queue::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_bytes_are_those_of_what_waits() {
        let mut queue = Queue::new();
        for (caller, bytes) in [('a', 10), ('b', 20), ('c', 30), ('d', 40)] {
            queue.push(caller, "command", bytes);
        }
        assert_eq!((queue.next(), queue.bytes()), (Some((&"command", 10)), 100));
        assert_eq!(queue.pop(), Some(('a', "command")));
        assert_eq!(queue.bytes(), 90);
        assert_eq!(queue.discard(|_| false), vec![]);
        assert_eq!(queue.discard(|&caller| caller != 'c'), vec!['b', 'd']);
        assert_eq!((queue.len(), queue.bytes()), (1, 30));
        assert_eq!(queue.drain(), vec!['c']);
        assert_eq!((queue.is_empty(), queue.bytes()), (true, 0));
    }
}
