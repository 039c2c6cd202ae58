//! Whole clusters of the same core under simulated time, network and disk.
