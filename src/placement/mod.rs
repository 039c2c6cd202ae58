//! Where keys and shards belong: key → ring position → shard → nodes. Pure functions over plain
//! data, pinned by golden vectors, since clients in other languages compute the same.
//!
//! - [`ring`]: a key's position on the 64-bit ring, and the equal ranges of a new database.
//! - [`rendezvous`]: which nodes should hold a shard (weighted rendezvous hashing with a load bound).
//! - [`map`]: the cluster map, its deltas, and lookups in it.
//! - [`members`]: members on one line.
//! - [`plan`]: the placement of a new database's shards.
//! - [`loads`]: how much nodes hold, and who gets a replica that is lacking.
//! - [`rebalance`]: plans for even load, when nodes came or went.

pub mod loads;
pub mod map;
pub mod members;
pub mod plan;
pub mod rebalance;
pub mod rendezvous;
pub mod ring;
