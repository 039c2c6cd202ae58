//! Snapshots between this node and others: which to make, to send, to take and to install.

pub mod inbox;
