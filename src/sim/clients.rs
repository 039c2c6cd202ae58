//! What clients do: an operation begins, is tried, and tried again, until it is answered, refused for good, or given
//! up; then the client rests, and chooses another.

use super::Time;
use super::checks::Violation;
use super::history::{Action, Told};
use super::operator;
use super::planted::Planted;
use super::report::{Shown, note};
use super::shell::NodeEvent;
use super::workload::{self, Client, GIVE_UP, Waiting};
use super::world::{Event, World};
use crate::group::types::Output;
use crate::refusal::{Outcome, Refusal};

/// Clients of each shard.
pub(super) const CLIENTS_PER_SHARD: usize = 4;
/// What a client sends arrives within this time, if it does.
const LATE: Time = 4_000_000;
/// Bounds of a rest where groups are to fall asleep.
const LULLS: (Time, Time) = (1_000, 5_000_000);
/// Bounds of a long rest.
const RESTS: (Time, Time) = (15_000_000, 40_000_000);

impl World {
    pub(super) fn begin(&mut self, number: usize) {
        let client = &mut self.clients[number];
        if client.waiting.is_some() {
            return;
        }
        let Some((key, action)) = client.choose(&mut self.dice) else { return };
        let call = self.history.invoke(number, client.shard, key, action);
        let token = client.next_token();
        let tag = if action == Action::Get { None } else { client.next_tag(&mut self.dice) };
        self.history.calls[call].tag = tag.map(|tag| (tag.session, tag.sequence));
        client.waiting =
            Some(Waiting { call, key, action, since: self.clock.now, token, tag, perhaps_applied: false });
        note!(self.trace, "{} client {} k{} {:?}", self.clock.now, number, key, action);
        self.attempt(token);
    }

    /// The client of an attempt, if it still waits for that one.
    fn waiting(&mut self, token: u64) -> Option<&mut Client> {
        let client = self.clients.get_mut(Client::of_token(token))?;
        client.waiting.as_ref().is_some_and(|waiting| waiting.token == token).then_some(client)
    }

    pub(super) fn attempt(&mut self, token: u64) {
        let Some(client) = self.waiting(token) else { return };
        let (shard, leader) = (client.shard, client.leader);
        let Some(waiting) = client.waiting.as_ref() else { return };
        let (key, action, again) = (waiting.key, waiting.action, waiting.perhaps_applied);
        let mut tag = waiting.tag;
        let members = self.truths.get(&shard).and_then(|truth| truth.members.newest());
        let members = members.map_or(&[][..], |newest| &newest.members);
        let Some(node) = leader.or_else(|| self.dice.pick(members).map(|m| m.node)) else { return };
        // Now and then a connection is stuck, and what was sent on it arrives after a later attempt.
        let late = self.options.faults.messages && self.dice.chance(50);
        let delay = self.dice.between(50, if late { LATE } else { 1_000 });
        if again && tag.is_some() {
            self.count("commands sent again");
            if let Some(tag) = tag.as_mut().filter(|_| self.options.planted.is(Planted::RetryAppliesTwice)) {
                tag.sequence += token << 20;
            }
        }
        let operation = Box::new(workload::operation(key, action, tag));
        self.clock.after(delay, Event::Node(node, NodeEvent::Request { token, shard, operation }));
        let patience = if action == Action::Get || tag.is_some() { 1_000_000 } else { 4_000_000 };
        let patience = self.dice.between(patience / 2, patience);
        self.clock.after(patience, Event::Timeout(token));
    }

    pub(super) fn on_answer(&mut self, token: u64, result: Result<Output, Refusal>) -> Result<(), Violation> {
        let now = self.clock.now;
        note!(self.trace, "{} answer {:x} {:?}", now, token, Shown(&result));
        if operator::is_its(token) {
            return self.on_changed(token, result);
        }
        let Some(client) = self.waiting(token) else { return Ok(()) };
        let Some(waiting) = client.waiting.as_ref() else { return Ok(()) };
        let (action, tagged) = (waiting.action, waiting.tag.is_some());
        match result {
            Ok(output) => {
                if tagged {
                    client.session_is(true);
                }
                let told =
                    workload::told(action, &output).map_err(|detail| Violation::new("answers", detail))?;
                self.end(token, told);
                Ok(())
            }
            Err(refusal) => self.on_refusal(token, &refusal),
        }
    }

    fn on_refusal(&mut self, token: u64, refusal: &Refusal) -> Result<(), Violation> {
        let now = self.clock.now;
        let Some(client) = self.waiting(token) else { return Ok(()) };
        client.leader = match refusal {
            Refusal::NotLeader { leader, .. } => *leader,
            _ => None,
        };
        let scripted = client.budget == 0;
        let Some(waiting) = client.waiting.as_mut() else { return Ok(()) };
        let (action, before) = (waiting.action, waiting.perhaps_applied);
        let patient = scripted || now <= waiting.since + GIVE_UP;
        match (refusal, waiting.tag) {
            (Refusal::SessionExpired, Some(_)) => {
                client.session_is(false);
                self.count("sessions expired");
                if before {
                    self.end(token, Told::Unknown);
                } else {
                    self.tag_anew(token);
                    self.try_again(token);
                }
            }
            // It changed nothing, which another attempt's lost answer said, and won't under this tag: none
            // of its own is below what the client has acknowledged.
            (Refusal::StaleCommand, Some(_)) if before && matches!(action, Action::Cas(..)) => {
                waiting.perhaps_applied = false;
                client.session_is(true);
                self.count("commands stale");
                self.tag_anew(token);
                self.try_again(token);
            }
            (refusal, tag) if action != Action::Get && refusal.outcome() == Outcome::Unknown => {
                if matches!(refusal, Refusal::SessionExpired | Refusal::StaleCommand) {
                    return Err(Violation::new("answers", format!("{action:?} under {tag:?}: {refusal}")));
                }
                waiting.perhaps_applied = true;
                if patient && tag.is_some() {
                    self.try_again(token);
                } else {
                    self.end(token, Told::Unknown);
                }
            }
            (refusal, _) if !refusal.retryable() => {
                let detail = format!("{action:?} is refused for ever: {refusal}");
                return Err(Violation::new("answers", detail));
            }
            _ if patient => self.try_again(token),
            _ => self.end(token, if before { Told::Unknown } else { Told::Refused }),
        }
        Ok(())
    }

    /// A command that certainly had no effect goes on under a new session.
    fn tag_anew(&mut self, token: u64) {
        let Some(client) = self.clients.get_mut(Client::of_token(token)) else { return };
        let tag = client.next_tag(&mut self.dice);
        let Some(waiting) = &mut client.waiting else { return };
        waiting.tag = tag;
        self.history.calls[waiting.call].tag = tag.map(|tag| (tag.session, tag.sequence));
    }

    pub(super) fn on_timeout(&mut self, token: u64) {
        let now = self.clock.now;
        let Some(client) = self.waiting(token) else { return };
        client.leader = None;
        let scripted = client.budget == 0;
        let Some(waiting) = &mut client.waiting else { return };
        waiting.perhaps_applied = true;
        let again = waiting.tag.is_some() && (scripted || now <= waiting.since + GIVE_UP);
        if waiting.action == Action::Get || again {
            self.try_again(token);
        } else {
            note!(self.trace, "{} timeout {:x}", now, token);
            self.end(token, Told::Unknown);
        }
    }

    fn try_again(&mut self, token: u64) {
        let delay = self.dice.between(1_000, 50_000);
        let Some(client) = self.waiting(token) else { return };
        let next = client.next_token();
        if let Some(waiting) = &mut client.waiting {
            waiting.token = next;
        }
        self.clock.after(delay, Event::Attempt(next));
    }

    fn end(&mut self, token: u64, told: Told) {
        let number = Client::of_token(token);
        // Now and then a client rests until its session has ended. Nobody waits for it then.
        let idle = self.clients.get(number).is_some_and(|client| client.budget > 0);
        let rest = if idle && self.dice.chance(10) { RESTS } else { (1_000, 120_000) };
        // Long enough, now and then, for a shard to fall asleep.
        let lulls = idle && self.options.sleep_after > 0 && self.dice.chance(400);
        let rest = if lulls { LULLS } else { rest };
        let pause = self.dice.between(rest.0, rest.1);
        let Some(client) = self.waiting(token) else { return };
        let Some(Waiting { call, key, action, .. }) = client.waiting.take() else { return };
        client.learn(key, action, told);
        let told_result = !matches!(told, Told::Unknown | Told::Refused);
        client.scripted += usize::from(told_result);
        if !told_result && client.budget == 0 && number >= self.options.shards * CLIENTS_PER_SHARD {
            // What a script asks for must succeed; another value, since this one may have been written.
            let client = &mut self.clients[number];
            let action = if let Action::Put(_) = action { Action::Put(client.next_value()) } else { action };
            client.script.insert(0, (key, action));
        }
        self.history.end(call, told);
        self.clock.after(pause, Event::Begin(number));
    }
}
