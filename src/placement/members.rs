//! Members of a group on one line, for the log.

use std::fmt;

use super::map::{Member, MemberRole};

impl fmt::Display for Member {
    /// Replica and node, as `28@3`; one that comes as `+28@3`, one that goes as `-28@3`, a learner in brackets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (replica, node) = (self.replica, self.node);
        match self.role {
            MemberRole::Voter => write!(f, "{replica}@{node}"),
            MemberRole::Learner => write!(f, "({replica}@{node})"),
            MemberRole::Incoming => write!(f, "+{replica}@{node}"),
            MemberRole::Outgoing => write!(f, "-{replica}@{node}"),
        }
    }
}

/// Members on one line: see [`Member`].
#[derive(Clone, Copy, Debug)]
pub struct Members<'a>(pub &'a [Member]);

impl fmt::Display for Members<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, member) in self.0.iter().enumerate() {
            let gap = if at == 0 { "" } else { " " };
            write!(f, "{gap}{member}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{NodeId, ReplicaId};

    #[test]
    fn members_fit_on_a_line() {
        let member = |replica, node, role| Member { replica: ReplicaId(replica), node: NodeId(node), role };
        let members = [
            member(28, 3, MemberRole::Voter),
            member(29, 2, MemberRole::Voter),
            member(81, 5, MemberRole::Incoming),
            member(30, 1, MemberRole::Outgoing),
            member(44, 6, MemberRole::Learner),
        ];
        assert_eq!(Members(&members).to_string(), "28@3 29@2 +81@5 -30@1 (44@6)");
        assert_eq!(Members(&[]).to_string(), "");
    }
}
