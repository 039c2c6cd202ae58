//! The composition root and the actors of one node.
pub mod handle;
