//! Framed Cap'n Proto between nodes.
