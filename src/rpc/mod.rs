//! Cap'n Proto services for clients.
