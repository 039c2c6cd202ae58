//! The cluster map as a node keeps it on disk, to start from while the metadata shard is out of
//! reach. A cache: damage is noticed by the file's checksum, and what is lost is had again, from the
//! node's own metadata replica if it has one, else from a peer.

use std::sync::Arc;

use super::open::{OpenedState, open_stores};
use crate::codec::CodecError;
use crate::codec::records::{read_delta, write_delta};
use crate::ids::{ClusterId, METADATA_DATABASE, METADATA_SHARD};
use crate::limits;
use crate::machine::meta;
use crate::placement::map::{ClusterMap, NodeRecord, ShardRecord};
use crate::schema::types_capnp::map_delta;
use crate::storage::StorageError;
use crate::storage::engine::Engine;
use crate::storage::identity::DataDir;
use crate::storage::log::{LogStore, ReplicaPhase};

/// The map in `dir`, if it is there, whole, and of `cluster`; else why it is of no use.
pub fn load(dir: &DataDir, cluster: ClusterId) -> Result<ClusterMap, String> {
    let bytes = dir.load_map().ok_or("it is missing or damaged")?;
    let map = decode(&bytes).map_err(|error| error.to_string())?;
    if map.cluster_id != cluster {
        return Err(format!("it is of cluster {}, the node belongs to {cluster}", map.cluster_id));
    }
    Ok(map)
}

/// The map as the metadata replica of the node `own` has it on disk, if it has one there. It may be older
/// than the cached one was: the replica's log and the peers bring the rest. If the node is the only voter
/// nobody else is needed for that, and the little that its catalogue tells is enough to begin.
pub fn of_own_replica(
    log: &dyn LogStore,
    engine: &Arc<dyn Engine>,
    cluster: ClusterId,
    own: NodeRecord,
) -> Result<Option<ClusterMap>, StorageError> {
    let mut catalogue = log.catalogue()?.into_iter();
    let metadata = catalogue.find(|r| r.shard == METADATA_SHARD && r.phase == ReplicaPhase::Active);
    let Some(record) = metadata else {
        return Ok(None);
    };
    let (_, state) = open_stores(log, engine, &record)?;
    let OpenedState::Whole(state) = state else {
        return Ok(None);
    };
    let map = meta::cluster_map(&state)?;
    if map.cluster_id == cluster {
        return Ok(Some(map));
    }
    // A newcomer has no members at all until it has a snapshot: the voters of its group are others.
    if record.members.is_empty() || !record.members.iter().all(|member| member.node == own.id) {
        return Ok(None);
    }
    let metadata = ShardRecord {
        id: METADATA_SHARD,
        database: METADATA_DATABASE,
        range: record.range,
        epoch: record.epoch,
        members: record.members,
        dropped: false,
        moving: None,
        target: None,
        previous: None,
        changed_at: 0,
    };
    Ok(Some(ClusterMap {
        cluster_id: cluster,
        nodes: [(own.id, own)].into(),
        shards: [(METADATA_SHARD, metadata)].into(),
        ..ClusterMap::default()
    }))
}

/// The bytes of the file's content.
pub fn encode(map: &ClusterMap) -> Vec<u8> {
    let mut message = capnp::message::Builder::new_default();
    write_delta(&map.delta(0), message.init_root::<map_delta::Builder<'_>>());
    capnp::serialize::write_message_to_words(&message)
}

fn options() -> capnp::message::ReaderOptions {
    let mut options = capnp::message::ReaderOptions::new();
    options
        .traversal_limit_in_words(Some(limits::TRAVERSAL_BYTES_MAX / 8))
        .nesting_limit(limits::NESTING_MAX);
    options
}

/// Reads the file's content.
pub fn decode(mut bytes: &[u8]) -> Result<ClusterMap, CodecError> {
    let message = capnp::serialize::read_message(&mut bytes, options())?;
    let mut map = ClusterMap::default();
    map.merge(read_delta(message.get_root()?)?);
    Ok(map)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{NodeId, RandomId};
    use crate::machine::MachineKind;
    use crate::node::test_node::record;
    use crate::placement::map::{Member, Standing};
    use crate::storage::engine_memory::MemoryEngine;
    use crate::storage::log::ReplicaRecord;
    use crate::storage::log_memory::MemoryLog;

    #[test]
    fn only_the_voter_of_a_group_of_one_begins_with_a_map_of_itself() {
        let own = NodeRecord {
            id: NodeId(1),
            label: String::new(),
            client_address: String::new(),
            peer_address: String::new(),
            zone: String::new(),
            weight: 100,
            store_id: RandomId::default(),
            standing: Standing::Member,
            changed_at: 0,
        };
        let cluster = RandomId([7; 16]);
        let begins = |members: Vec<Member>| {
            let metadata = ReplicaRecord {
                shard: METADATA_SHARD,
                database: METADATA_DATABASE,
                machine: MachineKind::Metadata,
                members,
                ..record(1)
            };
            let log = MemoryLog::new();
            log.create(&[metadata]).unwrap();
            let engine: Arc<dyn Engine> = Arc::new(MemoryEngine::new());
            of_own_replica(&log, &engine, cluster, own.clone()).unwrap()
        };
        let alone = record(1).members;
        let map = begins(alone.clone()).expect("nobody else is needed");
        assert_eq!((map.cluster_id, map.version, map.nodes.len()), (cluster, 0, 1));
        let other = Member { node: NodeId(2), ..alone[0] };
        assert_eq!(begins(vec![alone[0], other]), None);
        // Ordered to take a replica, and no snapshot has come yet.
        assert_eq!(begins(Vec::new()), None);
    }
}
