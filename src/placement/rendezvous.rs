//! Shard → nodes by weighted rendezvous hashing.
