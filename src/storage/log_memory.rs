//! The raft log in memory, for tests and simulation.
