//! Refusals and the wire's `Error`.
