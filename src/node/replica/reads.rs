//! Reads that memory can't answer, and what is kept of them: it takes what memtables leave of their bound, as long
//! as they leave it.

use actix::prelude::*;

use super::ReplicaActor;
use crate::limits;
use crate::machine::command::Query;
use crate::machine::kv;
use crate::node::messages::Learned;
use crate::node::reader::ReadJob;
use crate::node::ticket::Ticket;

impl ReplicaActor {
    /// Queries that memory can't answer go to the read thread: gets together, a scan with its own
    /// copy of what the active memtable adds to its page.
    pub(super) fn read_elsewhere(&mut self, mut reads: Vec<(Ticket, Query)>, ctx: &mut Context<Self>) {
        if reads.is_empty() {
            return;
        }
        let state = self.group.state();
        let machine = self.group.machine();
        for (ticket, query) in reads.extract_if(.., |(_, query)| matches!(query, Query::Scan { .. })) {
            if let Query::Scan { prefix, after, .. } = &query {
                // One more than fits a page tells whether there are more.
                let reader =
                    state.scan_reader(kv::scan_start(prefix, after), &[], limits::SCAN_PAIRS_MAX + 1);
                self.shared.reader.submit(ReadJob {
                    machine,
                    reader,
                    reads: vec![(ticket, query)],
                    learns: None,
                });
            }
        }
        if !reads.is_empty() {
            let learns = (state.known_room() > 0).then(|| ctx.address().recipient());
            self.shared.reader.submit(ReadJob { machine, reader: state.reader(), reads, learns });
        }
    }

    /// Says how much may be known of the engine, as there is memory. Of a replica that sleeps nothing: it isn't ticked, so it
    /// would never give it back to those that are asked.
    pub(super) fn allow_known(&mut self) {
        let room = match self.asleep_since {
            Some(_) => 0,
            None => self.shared.memory.room(self.group.leads()),
        };
        self.group.allow_known(room);
    }

    /// Nothing is known of the engine any more.
    pub(super) fn forget_all_known(&mut self) {
        // Both generations.
        self.group.forget_known();
        self.group.forget_known();
        self.account_memory();
    }

    /// Gives memory back that nobody needs, if the node is short of it: at once beyond its bound, else
    /// what wasn't asked for in a while, so that those who read much get the share of those who don't.
    pub(super) fn make_room(&mut self) {
        let room = self.shared.memory.room(self.group.leads());
        let aged = self.ticks.is_multiple_of(limits::KNOWN_AGE_TICKS) && self.shared.memory.is_tight();
        if self.group.state().known_bytes() > 0 && (room == 0 || aged) {
            self.group.forget_known();
            self.account_memory();
        }
    }
}

impl Handler<Learned> for ReplicaActor {
    type Result = ();
    fn handle(&mut self, Learned(stamp, read): Learned, _: &mut Context<Self>) {
        self.allow_known();
        self.group.learn(stamp, read);
        self.account_memory();
    }
}
