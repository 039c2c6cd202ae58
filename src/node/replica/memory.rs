//! What a replica does about memory: counts its memtables, pauses where it holds more than its share, and has them
//! flushed.

use std::sync::Arc;

use actix::prelude::*;

use super::ReplicaActor;
use crate::failpoints::failpoint;
use crate::node::flusher::FlushJob;
use crate::node::messages::{Flushed, Freeze, MemoryFreed};
use crate::storage::flush::FlushStep;
use crate::storage::state::Frozen;

impl ReplicaActor {
    /// Applies or pauses, as there is memory.
    pub(super) fn mind_memory(&mut self) {
        let adds = self.group.next_pass_bytes();
        self.group.pause_apply(self.memory.must_pause(adds));
    }

    /// As [`ReplicaActor::mind_memory`], of a replica that nothing may wake otherwise.
    pub(super) fn go_on(&mut self, ctx: &mut Context<Self>) {
        let paused = self.memory.is_paused();
        self.mind_memory();
        if paused && !self.memory.is_paused() {
            self.queue_pump(ctx);
        }
    }

    /// Who holds much is flushed before all have to be; who pauses, with less.
    pub(super) fn freeze_in_time(&mut self) {
        let much = self.shared.memory.replica_limit();
        // Not with nearly nothing: a flush costs what it costs, and others hold the rest.
        let much = if self.memory.is_paused() { much / 16 } else { much };
        if self.memory.active() > much && self.hold.is_none() {
            self.freeze();
        }
    }

    pub(super) fn account_memory(&mut self) {
        let had = self.memory.active() > 0;
        self.memory.set(self.group.state().memory_bytes());
        let has = self.memory.active() > 0;
        if has != had {
            self.roster.set_unflushed(self.replica, has);
        }
        self.memory.set_known(self.group.state().known_bytes());
        self.memory.set_sessions(self.group.state().session_table().len());
    }

    /// Hands recent writes to the flush thread; one flush of a replica at a time.
    fn freeze(&mut self) {
        if self.flushing {
            return;
        }
        failpoint!(FreezeBefore, self.replica);
        if let Some(frozen) = self.group.freeze() {
            failpoint!(FreezeMiddle, self.replica);
            self.flush(frozen);
            failpoint!(FreezeAfter, self.replica);
        }
    }

    pub(super) fn flush(&mut self, frozen: Arc<Frozen>) {
        self.flushing = true;
        self.account_memory();
        self.shared.flusher.submit(FlushJob {
            incarnation: self.incarnation,
            frozen,
            done: self.sink.clone(),
        });
    }
}

impl Handler<Flushed> for ReplicaActor {
    type Result = ();
    fn handle(&mut self, flushed: Flushed, _: &mut Context<Self>) {
        match flushed.step {
            FlushStep::Logged => {
                failpoint!(FlushLogged, self.replica);
                self.flushed = flushed.position;
                self.compact();
            }
            FlushStep::Absorbed => {
                failpoint!(FlushAbsorbed, self.replica);
                self.allow_known();
                self.group.release(flushed.position.index);
                self.flushed_to(flushed.position.index);
                self.flushing = false;
                self.account_memory();
                match self.flush_waiting.take() {
                    Some(next) => self.flush(next),
                    None => self.freeze_in_time(),
                }
            }
        }
    }
}

impl Handler<Freeze> for ReplicaActor {
    type Result = ();
    fn handle(&mut self, freeze: Freeze, _: &mut Context<Self>) {
        if freeze.for_log {
            self.group.press_log();
            // Who sleeps has no tick at which it would look, and may keep log for a member without which it does.
            self.compact();
        }
        if !self.flushing {
            self.hold = None;
        }
        self.freeze();
    }
}

impl Handler<MemoryFreed> for ReplicaActor {
    type Result = ();
    fn handle(&mut self, _: MemoryFreed, ctx: &mut Context<Self>) {
        self.go_on(ctx);
    }
}
