//! The reconciler: what the leader of the metadata shard does so that the cluster becomes what it should be.
//! Pure: time and facts go in, actions come out.
//!
//! The cluster map says what is wanted: standings of nodes, replica counts, targets, moves. The shards say
//! what is: each reports its own members, and the map follows by conf version, never the reverse. The
//! reconciler compares the two and names the next step of each move. It keeps nothing that a new leader
//! couldn't learn by asking again: every step may be repeated, and a step of the past is refused by the
//! conf version that it names.

pub mod facts;
pub mod reconciler;
