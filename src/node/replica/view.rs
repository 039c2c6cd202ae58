//! How a replica keeps still what its state is at a mark in its log, until a digest of that is taken.
//!
//! At the mark its memtable is frozen, and flushed like any other. From then to its next flush the state engine holds
//! the state as it was there, whatever is applied since: so for a while nothing more is frozen, unless memory or
//! log call for it. Whoever takes the digest finds out by itself whether the engine has gone on
//! ([`crate::storage::digest`]): this helps it to succeed, and isn't needed for it to be right.
//!
//! One state is kept at a time. While somebody waits for it or reads it, a later mark is passed over: who put that
//! hears that the replica has gone on, and tries again. Two who compare the same shard so come one after the other; if
//! the later mark won, neither would come to an end.

use std::sync::{Arc, Weak};

use actix::prelude::*;
use tokio::sync::oneshot;

use super::ReplicaActor;
use crate::ids::Index;
use crate::limits;
use crate::node::messages::{AskDigest, Digesting};
use crate::node::snapshots::worker::TakeDigest;

/// A state that is kept still.
pub(super) struct Hold {
    index: Index,
    /// The engine holds it.
    is_flushed: bool,
    /// The tick from which it is let go, unless somebody reads it.
    until: u64,
    /// Somebody has asked for it while it was being flushed.
    is_awaited: bool,
    /// Alive while somebody reads it, or waits to.
    reading: Weak<()>,
}

impl Hold {
    /// Somebody reads it, or has it queued to be read.
    fn is_read(&self) -> bool {
        self.reading.strong_count() > 0
    }
}

impl ReplicaActor {
    /// A mark was applied, and nothing behind it.
    pub(super) fn keep_still(&mut self, index: Index) {
        if self.hold.as_ref().is_some_and(|hold| hold.is_awaited || hold.is_read()) {
            return;
        }
        // Those that are re-applied after a start were for others. And one flush may wait for another, no more.
        if self.group.recovering() || self.flush_waiting.is_some() {
            return;
        }
        let Some(frozen) = self.group.freeze() else {
            return;
        };
        let until = self.ticks + limits::VIEW_TICKS;
        let reading = Weak::new();
        self.hold = Some(Box::new(Hold { index, is_flushed: false, until, is_awaited: false, reading }));
        if self.flushing {
            self.account_memory();
            self.flush_waiting = Some(frozen);
        } else {
            self.flush(frozen);
        }
    }

    /// The engine holds what was flushed up to this index.
    pub(super) fn flushed_to(&mut self, index: Index) {
        if let Some(hold) = self.hold.as_mut().filter(|hold| hold.index == index) {
            hold.is_flushed = true;
        }
    }

    /// Lets a state go for which nobody has asked in time, or which was read.
    pub(super) fn let_go(&mut self) {
        let ticks = self.ticks;
        self.hold.take_if(|hold| ticks >= hold.until && !hold.is_read());
    }
}

impl Handler<AskDigest> for ReplicaActor {
    type Result = MessageResult<AskDigest>;
    fn handle(&mut self, AskDigest(index): AskDigest, _: &mut Context<Self>) -> MessageResult<AskDigest> {
        let replica = self.replica;
        if self.group.state_lost() {
            return MessageResult(Digesting::Never(format!("replica {replica} has lost its state")));
        }
        let applied = self.group.state().header().applied.index;
        let other = self.hold.as_ref().map(|hold| hold.index).filter(|held| *held != index);
        MessageResult(match self.hold.as_mut().filter(|hold| hold.index == index) {
            Some(hold) if hold.is_flushed => {
                let (reading, (done, digest)) = (Arc::new(()), oneshot::channel());
                (hold.reading, hold.until) = (Arc::downgrade(&reading), self.ticks);
                hold.is_awaited = false;
                let generation = self.group.state().reader().generation;
                self.shared.snapshots.worker.digest(TakeDigest { replica, generation, index, reading, done });
                Digesting::Begun(replica, digest)
            }
            Some(hold) => {
                // A flush takes as long as it takes. Who asks again and again still finds the state after it.
                (hold.until, hold.is_awaited) = (self.ticks + limits::VIEW_TICKS, true);
                Digesting::Coming(format!("replica {replica} is being flushed"))
            }
            None if applied < index => {
                Digesting::Behind(format!("replica {replica} has applied {applied} of {index} entries"))
            }
            None => Digesting::GoneOn(match other {
                Some(other) => format!("replica {replica} is being compared at entry {other} for another"),
                None => format!("replica {replica} has gone on"),
            }),
        })
    }
}

#[cfg(feature = "test-hooks")]
impl ReplicaActor {
    /// Damage that no sum of the disk shows: a value in the engine is another one.
    pub(super) fn alter(&self, key: &str) {
        match self.group.state().alter(key.as_bytes()) {
            Ok(true) => {}
            Ok(false) => tracing::warn!(key, "injected alteration: the engine doesn't have the key"),
            Err(error) => tracing::warn!(key, %error, "injected alteration"),
        }
    }
}
