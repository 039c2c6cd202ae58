//! One raft group's replica, sans I/O: inputs go in, one [`types::Effects`] value comes out.
//!
//! [`driver::Group`] wraps raft-rs's `RawNode` and the replica's state. It never sleeps, reads a
//! clock, draws randomness or opens a socket; the only disk it touches is the raft log, for old
//! entries, through the [`crate::storage::log::LogStore`] it is given. The actors of
//! [`crate::node`] and the simulator of [`crate::sim`] are two shells around it.
//!
//! ```text
//!   submit, step, tick, on_persisted, on_fetched      (only enqueue)
//!                      │
//!                    pump ──► Effects { messages, write, done, reads, fetch, snapshot, leader, marked, more }
//! ```
//!
//! What the shell owes the group:
//! 1. `messages` leave in order, per receiver; any may be lost.
//! 2. `write` is made durable, in the order of numbers, before `on_persisted(number)`; if it fails,
//!    the node stops.
//! 3. `pump` is called after inputs, once per batch of them, and again while `more` is set.
//! 4. A snapshot that a follower needs is made, brought and installed, or given up, and the group is
//!    told of either ([`catch_up`]). A follower installs it by being rebuilt from disk, not here.
//! 5. A replica whose state is lost is opened without it ([`lost`]), and anew once a snapshot is installed.
//! 6. A message comes with the node that it is from.
//! 7. A replica that is asleep is not ticked, and woken before anything else happens to it, or when a node it relies on
//!    isn't what it was ([`sleep`]).
//! 8. After an error or a panic the group is dropped and rebuilt from disk, never reused.
//!
//! What the group promises:
//! - `compacted ≤ flushed ≤ applied ≤ committed`, and `applied ≤ persisted ≤ last`.
//! - A reply to a command is given only after its entry is durable at a quorum and applied here.
//! - A command of a session takes effect at most once, however often it is submitted, and where, until
//!   its session ends (see [`crate::machine::session`]).
//! - An answer to a query reflects everything that was acknowledged before the query arrived.
//! - A change of members takes effect here only when it is durable here that it is committed ([`membership`]).
//! - Every submitted operation ends exactly once: with an output or a refusal that tells whether it
//!   may have had an effect.

mod apply;
mod beats;
pub mod catch_up;
pub mod clock;
pub mod driver;
pub mod election;
mod followers;
pub mod held;
mod leadership;
pub mod log;
pub mod lost;
mod marks;
pub mod membership;
mod messages;
pub mod nodes;
pub mod open;
mod pause;
mod per_member;
pub mod proposals;
pub mod queue;
pub mod reads;
pub mod sleep;
pub mod types;
mod vacancy;
