//! The layout of keys in the state engine.
