//! What clients are told of the cluster map: encoded once for all on this thread that knew the same version before.
//!
//! Picking what has changed out of a great map, and writing it down, is most of the work of an answer; after a change a
//! thousand clients ask for the same. While shards move they don't all have the same version, so some answers are kept.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use capnp::message::{Builder, HeapAllocator, TypedReader};

use crate::codec::records::write_delta;
use crate::ids::ClusterId;
use crate::limits::MAP_NEWS_KEPT;
use crate::placement::map::ClusterMap;
use crate::schema::types_capnp::map_delta;

/// A `MapDelta` as it goes into answers.
pub(super) type Encoded = TypedReader<Builder<HeapAllocator>, map_delta::Owned>;

/// See the module page. One per thread.
#[derive(Default)]
pub(crate) struct News(RefCell<Kept>);

/// Answers that lead to one version of the map.
#[derive(Default)]
struct Kept {
    cluster_id: ClusterId,
    version: u64,
    /// With the version that whoever asked had; the oldest first.
    since: VecDeque<(u64, Rc<Encoded>)>,
}

impl News {
    /// What has changed in `map` after version `since`.
    pub(super) fn since(&self, map: &ClusterMap, since: u64) -> Rc<Encoded> {
        let mut kept = self.0.borrow_mut();
        if (kept.cluster_id, kept.version) != (map.cluster_id, map.version) {
            *kept = Kept { cluster_id: map.cluster_id, version: map.version, since: VecDeque::new() };
        }
        if let Some((_, news)) = kept.since.iter().find(|(of, _)| *of == since) {
            return news.clone();
        }
        let mut message = Builder::new_default();
        write_delta(&map.delta(since), message.init_root());
        let news = Rc::new(TypedReader::new(message.into_reader()));
        if kept.since.len() >= MAP_NEWS_KEPT {
            kept.since.pop_front();
        }
        kept.since.push_back((since, news.clone()));
        news
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::records::read_delta;
    use crate::ids::{NodeId, RandomId};
    use crate::placement::map::{NodeRecord, Standing};

    /// A map at `version` in which node n last changed at version n.
    fn map(version: u64) -> ClusterMap {
        let node = |id: u64| NodeRecord {
            id: NodeId(id),
            label: String::new(),
            client_address: format!("c:{id}"),
            peer_address: format!("p:{id}"),
            zone: String::new(),
            weight: 100,
            store_id: RandomId::default(),
            standing: Standing::Member,
            changed_at: id,
        };
        let nodes = (1..=version).map(|id| (NodeId(id), node(id))).collect();
        ClusterMap { cluster_id: RandomId([3; 16]), version, nodes, ..ClusterMap::default() }
    }

    #[test]
    fn clients_at_several_versions_share_what_is_encoded_and_hear_nothing_old() {
        let news = News::default();
        let kept = MAP_NEWS_KEPT as u64;
        let now = map(kept + 5);
        let first: Vec<_> = (0..kept).map(|since| news.since(&now, since)).collect();
        for (since, before) in (0..).zip(&first) {
            let again = news.since(&now, since);
            assert!(Rc::ptr_eq(before, &again), "version {since}");
            assert_eq!(read_delta(again.get().unwrap()).unwrap(), now.delta(since));
        }
        // One more takes the place of the one that was kept longest.
        news.since(&now, kept);
        assert!(!Rc::ptr_eq(&first[0], &news.since(&now, 0)));
        assert!(Rc::ptr_eq(&first[2], &news.since(&now, 2)));
        let next = map(kept + 6);
        assert_eq!(read_delta(news.since(&next, 2).get().unwrap()).unwrap(), next.delta(2));
        assert_eq!(news.0.borrow().since.len(), 1, "nobody asks for an old map");
        let other = ClusterMap { cluster_id: RandomId([4; 16]), ..next };
        assert_eq!(read_delta(news.since(&other, 2).get().unwrap()).unwrap().cluster_id, other.cluster_id);
    }
}
