//! The raft log on raft-engine.
