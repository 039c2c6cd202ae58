//! Logging, metrics and health: what a node tells of itself to those who run it.

pub mod counters;
pub mod hot;
pub mod http;
pub mod log;
pub mod metrics;
pub mod process;
