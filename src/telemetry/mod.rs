//! Logging, metrics and health.
