use super::*;
use proptest::prelude::*;

fn node(id: u64, changed_at: u64) -> NodeRecord {
    NodeRecord {
        id: NodeId(id),
        label: format!("n{id} of {changed_at}"),
        client_address: String::new(),
        peer_address: String::new(),
        zone: String::new(),
        weight: 100,
        store_id: StoreId::default(),
        standing: Standing::Member,
        changed_at,
    }
}

fn database(id: u64, changed_at: u64, shards: Vec<ShardId>) -> DatabaseRecord {
    DatabaseRecord {
        id: DatabaseId(id),
        name: format!("db{id}"),
        replicas: 1,
        shards,
        dropped: false,
        changed_at,
    }
}

fn shard(id: u64, changed_at: u64, range: RingRange) -> ShardRecord {
    ShardRecord {
        id: ShardId(id),
        database: DatabaseId(1),
        range,
        epoch: Epoch { range: 1, conf: 1 },
        members: Vec::new(),
        dropped: false,
        moving: None,
        target: None,
        previous: None,
        changed_at,
    }
}

/// A map whose version 1, 2, … each came from changing the record that `changes` names.
fn history(changes: &[u64]) -> Vec<ClusterMap> {
    let mut map =
        ClusterMap { cluster_id: ClusterId::from_slice(&[7; 16]).unwrap(), ..ClusterMap::default() };
    let mut versions = vec![map.clone()];
    for (version, change) in (1..).zip(changes) {
        map.version = version;
        match change % 3 {
            0 => drop(map.nodes.insert(NodeId(*change), node(*change, version))),
            1 => {
                let record = database(*change, version, vec![ShardId(version)]);
                map.databases.insert(DatabaseId(*change), record);
            }
            _ => {
                let record = shard(*change, version, RingRange::ALL);
                map.shards.insert(ShardId(*change), record);
            }
        }
        versions.push(map.clone());
    }
    versions
}

fn with_ranges(shards: u32) -> ClusterMap {
    let mut map = ClusterMap::default();
    let ids: Vec<_> = (1..=u64::from(shards)).map(ShardId).collect();
    for (id, range) in ids.iter().zip(ring::equal_ranges(shards)) {
        map.shards.insert(*id, shard(id.0, 1, range));
    }
    map.databases.insert(DatabaseId(1), database(1, 1, ids));
    map
}

#[test]
fn a_delta_of_another_cluster_is_ignored() {
    let mut map = history(&[3, 4]).pop().unwrap();
    let mut foreign = history(&[6, 7, 8]).pop().unwrap().delta(0);
    foreign.cluster_id = ClusterId::from_slice(&[8; 16]).unwrap();
    let before = map.clone();
    assert!(!map.merge(foreign));
    assert_eq!(map, before);
}

#[test]
fn a_gap_holds_the_version_back() {
    let versions = history(&[3, 4, 5]);
    let mut map = versions[1].clone();
    assert!(map.merge(versions[3].delta(2)));
    assert_eq!((map.version, map.shards.len()), (1, 1));
    assert!(map.merge(versions[3].delta(1)));
    assert_eq!(map, versions[3]);
    assert!(!map.merge(versions[3].delta(1)));
}

#[test]
fn a_map_of_a_later_generation_replaces_what_was_known() {
    let known = history(&[3, 4, 5, 6]).pop().unwrap();
    // Went on from version 2, and has come to its third version since.
    let mut later = history(&[3, 4, 7]).pop().unwrap();
    later.version = (1 << 32) + 2;
    for record in later.nodes.values_mut() {
        record.changed_at = 1 << 32;
    }
    let mut map = known.clone();
    let part = MapDelta { since: 1 << 32, ..later.delta(1 << 32) };
    assert!(!map.merge(part), "it tells too little");
    assert_eq!(map, known);
    // Asked for what came after a version that is lost, it tells everything.
    let whole = later.delta(known.version);
    assert_eq!(whole.since, 0);
    assert!(map.merge(whole.clone()));
    assert_eq!(map, later, "nothing of what was lost is left");
    assert!(!map.merge(whole));
    for old in [known.delta(0), known.delta(known.version - 1)] {
        assert!(!map.merge(old));
    }
    assert_eq!(map, later);
    let ahead = known.delta(later.version);
    assert_eq!((ahead.nodes.len(), ahead.shards.len()), (0, 0));
}

#[test]
fn only_a_living_database_is_found_by_name() {
    let mut map = with_ranges(1);
    assert_eq!(map.database("db1").unwrap().id, DatabaseId(1));
    map.databases.get_mut(&DatabaseId(1)).unwrap().dropped = true;
    assert_eq!(map.database("db1"), None);
    let mut again = database(2, 2, vec![]);
    again.name = "db1".into();
    map.databases.insert(again.id, again);
    assert_eq!(map.database("db1").unwrap().id, DatabaseId(2));
}

#[test]
fn a_node_is_replaced_by_the_next_at_its_address_that_was_not_removed() {
    let at = |id: u64, standing| NodeRecord { peer_address: "p:1".into(), standing, ..node(id, 1) };
    let replaced = |nodes: &[NodeRecord]| {
        let nodes = nodes.iter().map(|node| (node.id, node.clone())).collect();
        ClusterMap { nodes, ..ClusterMap::default() }
            .replaced()
            .into_iter()
            .map(|id| id.0)
            .collect::<Vec<_>>()
    };
    let first = at(1, Standing::Member);
    assert_eq!(replaced(&[first.clone(), at(2, Standing::Member), at(3, Standing::Leaving)]), [1, 2]);
    // Anybody may ask to be accepted, and name any address.
    assert!(replaced(&[first.clone(), at(2, Standing::Pending)]).is_empty());
    assert_eq!(replaced(&[first.clone(), at(2, Standing::Pending), at(3, Standing::Member)]), [1]);
    assert_eq!(replaced(&[at(1, Standing::Pending), at(2, Standing::Member)]), [1]);
    assert!(replaced(&[first, at(2, Standing::Removed)]).is_empty());
    assert!(replaced(&[at(1, Standing::Removed), at(2, Standing::Member)]).is_empty());
}

#[test]
fn a_missing_record_hides_only_its_own_range() {
    for missing in 1..=8 {
        let mut map = with_ranges(8);
        map.shards.remove(&ShardId(missing));
        for (id, range) in (1..).zip(ring::equal_ranges(8)) {
            let found = map.shard_at(&map.databases[&DatabaseId(1)], range.end);
            assert_eq!(found.map(|s| s.id.0), (id != missing).then_some(id));
        }
    }
}

proptest! {
    #[test]
    fn each_position_has_the_shard_whose_range_holds_it(shards in 1..300_u32, position: u64) {
        let map = with_ranges(shards);
        let found = map.shard_at(&map.databases[&DatabaseId(1)], position).unwrap();
        let holders = map.shards.values().filter(|s| s.range.contains(position));
        prop_assert_eq!(holders.map(|s| s.id).collect::<Vec<_>>(), [found.id]);
    }

    #[test]
    fn deltas_in_any_order_converge(
        changes in prop::collection::vec(0..9_u64, 1..30),
        picks in prop::collection::vec(any::<(prop::sample::Index, prop::sample::Index)>(), 0..20),
    ) {
        let versions = history(&changes);
        let mut map = ClusterMap::default();
        for (since, version) in picks {
            let since = since.index(versions.len()) as u64;
            let before = map.version;
            map.merge(version.get(&versions).delta(since));
            // What the map says it knows, it knows: no record is older than its version allows.
            prop_assert!(map.version >= before);
            for record in versions[map.version as usize].nodes.values() {
                prop_assert!(map.nodes[&record.id].changed_at >= record.changed_at);
            }
        }
        let newest = versions.last().unwrap();
        map.merge(newest.delta(map.version));
        prop_assert_eq!(&map, newest);
    }
}

#[test]
fn many_records_at_once_are_taken_over_like_one_by_one() {
    let whole = RingRange::ALL;
    let records: Vec<_> = (1..=600).map(|id| shard(id, id, whole)).collect();
    let delta =
        |shards: Vec<ShardRecord>| MapDelta { version: 600, shards, ..ClusterMap::default().delta(0) };
    let mut one_by_one = ClusterMap::default();
    for record in &records {
        one_by_one.merge(delta(vec![record.clone()]));
    }
    let mut at_once = ClusterMap::default();
    at_once.merge(delta(records[..20].to_vec()));
    // An older one of a shard that is there, and of one that comes with it.
    let older = [5, 300].map(|id| shard(id, 1, whole));
    assert!(at_once.merge(delta(records[10..].iter().cloned().chain(older).collect())));
    assert_eq!(at_once, one_by_one);
    assert!(!at_once.merge(delta(records)), "nothing new");
}
