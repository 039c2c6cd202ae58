//! One raft group's replica, sans I/O: inputs go in, one [`Effects`] value comes out.

pub mod types;
