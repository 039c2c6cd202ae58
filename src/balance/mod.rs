//! The reconciler: what the leader of the metadata shard does so that the cluster becomes what it should be.
//! Pure: time and facts go in, actions come out.
//!
//! The cluster map says what is wanted: standings of nodes, replica counts, targets, moves. The shards say
//! what is: each reports its own members, and the map follows by conf version, never the reverse. The
//! reconciler compares the two and names the next step of each move. It keeps nothing that a new leader
//! couldn't learn by asking again: every step may be repeated, and a step of the past is refused by the
//! conf version that it names.
//!
//! - [`facts`]: what nodes tell, and what is asked of them. [`reconciler`]: one round of it all.
//! - `ears`: what was heard and for how long nothing was; `view`: what of it counts in one step.
//! - `moves`: the next step of a move under way. `wants`: which move to begin. `departures`: who goes with it, and
//!   in which order. `even`: load and leaders spread anew. `pace`: how often a step is repeated.
//!
//! *The order of things.* A shard's move is one change of members, whatever is behind it: newcomers are added
//! as learners, catch up, and take the place of those that go in one joint change. In every round, first the
//! map takes over what shards report; then moves under way get their next step; then leaders leave nodes that
//! are to be emptied; then moves are begun, as many as the policy allows: repairs, those with the fewest
//! replicas left first; emptying; replica counts; the targets of a rebalancing. Only when all is quiet is
//! load spread anew.
//!
//! *What is never done.* No step is named whose quorums, present and resulting, wouldn't answer: that is
//! told in [`reconciler::Reconciler::stuck`] instead. No silence counts in which the reconciler itself stood
//! still. No report rolls back what a later one has told.

mod departures;
mod ears;
mod even;
pub mod facts;
mod moves;
mod pace;
pub mod reconciler;
mod view;
mod wants;
