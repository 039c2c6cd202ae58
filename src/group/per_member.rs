//! A value for each of a few replicas of a group, in the order of their ids.
//!
//! A vector with no more room than it needs: each node of a tree has room for eleven, and thousands of groups keep several of
//! these. Groups have few members ([`crate::limits::MEMBERS_MAX`]), so to look through them costs no more than a tree does.

use crate::ids::ReplicaId;

/// See the module page.
#[derive(Clone, Debug)]
pub(super) struct PerMember<V>(Vec<(ReplicaId, V)>);

impl<V> Default for PerMember<V> {
    fn default() -> Self {
        PerMember(Vec::new())
    }
}

impl<V> PerMember<V> {
    fn place(&self, of: ReplicaId) -> Result<usize, usize> {
        self.0.binary_search_by_key(&of, |(replica, _)| *replica)
    }

    /// Of how many there is one.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether there is one of this replica.
    pub(super) fn contains(&self, of: ReplicaId) -> bool {
        self.place(of).is_ok()
    }

    /// That of a replica.
    pub(super) fn get(&self, of: ReplicaId) -> Option<&V> {
        Some(&self.0[self.place(of).ok()?].1)
    }

    /// The same, to change it.
    pub(super) fn get_mut(&mut self, of: ReplicaId) -> Option<&mut V> {
        let at = self.place(of).ok()?;
        Some(&mut self.0[at].1)
    }

    /// That of a replica, to change it; `value` if there was none.
    pub(super) fn or_insert(&mut self, of: ReplicaId, value: V) -> &mut V {
        let at = match self.place(of) {
            Ok(at) => at,
            Err(at) => {
                self.0.reserve_exact(1);
                self.0.insert(at, (of, value));
                at
            }
        };
        &mut self.0[at].1
    }

    /// Sets that of a replica.
    pub(super) fn insert(&mut self, of: ReplicaId, value: V) {
        match self.get_mut(of) {
            Some(known) => *known = value,
            None => _ = self.or_insert(of, value),
        }
    }

    /// Forgets that of a replica.
    pub(super) fn remove(&mut self, of: ReplicaId) {
        if let Ok(at) = self.place(of) {
            self.0.remove(at);
        }
    }

    /// Forgets all, and gives their room back.
    pub(super) fn clear(&mut self) {
        self.0 = Vec::new();
    }

    /// Forgets those that `keeps` doesn't say yes to.
    pub(super) fn retain(&mut self, keeps: impl Fn(ReplicaId) -> bool) {
        self.0.retain(|(replica, _)| keeps(*replica));
    }

    /// All, in the order of their replicas.
    pub(super) fn iter(&self) -> impl Iterator<Item = (ReplicaId, &V)> {
        self.0.iter().map(|(replica, value)| (*replica, value))
    }

    /// The same, to change them.
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = (ReplicaId, &mut V)> {
        self.0.iter_mut().map(|(replica, value)| (*replica, value))
    }

    /// All without their replicas.
    pub(super) fn values(&self) -> impl Iterator<Item = &V> {
        self.0.iter().map(|(_, value)| value)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// It does as a tree does, and keeps no room to spare as long as it grows.
        #[test]
        fn it_is_a_map(steps in prop::collection::vec((0u8..5, 0u64..6, 0u32..9), 0..60)) {
            let (mut ours, mut tree) = (PerMember::default(), BTreeMap::new());
            for (what, replica, value) in steps {
                let of = ReplicaId(replica);
                match what {
                    0 | 1 => {
                        ours.insert(of, value);
                        tree.insert(of, value);
                    }
                    2 => prop_assert_eq!(*ours.or_insert(of, value), *tree.entry(of).or_insert(value)),
                    3 => {
                        ours.remove(of);
                        tree.remove(&of);
                    }
                    _ => {
                        ours.retain(|replica| replica.0 % 2 == u64::from(value % 2));
                        tree.retain(|replica, _| replica.0 % 2 == u64::from(value % 2));
                    }
                }
                prop_assert_eq!(ours.get(of), tree.get(&of));
                prop_assert_eq!(ours.contains(of), tree.contains_key(&of));
                prop_assert_eq!((ours.len(), ours.is_empty()), (tree.len(), tree.is_empty()));
                let all: Vec<_> = ours.iter().map(|(of, value)| (of, *value)).collect();
                prop_assert_eq!(all, tree.iter().map(|(of, value)| (*of, *value)).collect::<Vec<_>>());
                prop_assert!(ours.0.capacity() <= 6);
            }
        }
    }
}
