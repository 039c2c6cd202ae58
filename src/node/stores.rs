//! A node's directory and the stores in it, opened and checked before it is known which cluster the node
//! belongs to; and what `--rejoin` makes of a directory that can't be opened.

use std::path::Path;
use std::sync::Arc;

use super::handle::NodeHandle;
use super::{NodeError, disk, map_cache, removal, state_store};
use crate::limits;
use crate::settings::{Settings, StorageSettings};
use crate::storage::StorageError;
use crate::storage::engine::Store;
use crate::storage::engine_kind::StateOptions;
use crate::storage::flush::Flusher;
use crate::storage::identity::DataDir;
use crate::storage::log_disk::{DiskLog, DiskLogOptions};
use crate::storage::pulse::Pulse;
use crate::storage::snapshot_dir::SnapshotDir;

/// The stores of a node, opened and checked.
pub(super) struct Stores {
    pub(super) log: Arc<DiskLog>,
    pub(super) engine: Arc<dyn Store>,
    pub(super) flusher: Flusher,
    pub(super) snapshots: SnapshotDir,
}

/// Opens directory and stores, on a thread that may block; `pulse` tells how that gets on. With `rejoins`, see
/// [`open_or_begin_anew`].
pub(super) async fn open(
    settings: &Settings,
    handle: NodeHandle,
    pulse: Pulse,
    rejoins: bool,
) -> Result<(DataDir, Stores), NodeError> {
    let settings = settings.clone();
    let open = move || -> Result<_, NodeError> {
        let _attached = pulse.attach();
        let storage = &settings.storage;
        let dir = &settings.node.data_dir;
        match disk::free_bytes(dir) {
            Ok(free) => {
                disk::room_to_start(dir, free)?;
                // Before anybody is served.
                handle.disk().measured(free, storage.reserve_bytes);
            }
            Err(error) => tracing::warn!(%error, "measuring the free space of {}", dir.display()),
        }
        if rejoins {
            let own = &settings.peer.advertise;
            let alone = settings.cluster.initial.iter().chain(&settings.cluster.join).all(|peer| peer == own);
            return open_or_begin_anew(dir, alone, |data_dir| open_stores(data_dir, storage));
        }
        Ok(open_stores(DataDir::open(dir).map_err(StorageError::from)?, storage)?)
    };
    let opened = tokio::task::spawn_blocking(open).await;
    opened.map_err(|error| NodeError::Fatal(format!("opening the stores: {error}")))?
}

fn open_stores(data_dir: DataDir, storage: &StorageSettings) -> Result<(DataDir, Stores), StorageError> {
    let options = DiskLogOptions {
        file_bytes: storage.log_file_bytes,
        purge_bytes: storage.log_bytes,
        spare_files: storage.log_spare_files,
    };
    let path = data_dir.log_path();
    let store_id = data_dir.store_id();
    let log = match data_dir.node() {
        Some(_) => DiskLog::open_existing(&path, options, store_id)?,
        None => DiskLog::open(&path, options, store_id)?,
    };
    let options =
        StateOptions { engine: storage.engine, cache_bytes: storage.cache_bytes, synchronous: true };
    let (engine, flusher) = state_store::open(&data_dir, options, &log)?;
    let snapshots = SnapshotDir::open(&data_dir.snapshots_path(), limits::SNAPSHOT_FILES_BYTES_MAX)?;
    Ok((data_dir, Stores { log: Arc::new(log), engine, flusher, snapshots }))
}

/// Why a node can't go on as who it was.
struct Lost(String);

/// Why the node of this directory is none any more, as far as the directory itself tells.
fn removed(dir: &DataDir) -> Option<String> {
    let (cluster, node) = (dir.cluster_id()?, dir.node()?);
    let map = map_cache::load(dir, cluster).ok()?;
    removal::is_removed(&map, node, dir.store_id())
        .then(|| format!("node {node} was removed from cluster {cluster}"))
}

/// What `--rejoin` asks for: opens a directory as always, and only if the node was removed from its cluster,
/// or that fails because it may have lost what it promised to keep ([`StorageError::ends_identity`]), sets its
/// content aside and opens it as that of a new node, which joins the cluster and never forms one. So the
/// option may be given again, or be left in a service's command line, without harm to a directory that is
/// whole.
///
/// `alone`: no other node is named that could be joined. Then a damaged directory stays as it is, and only
/// a member's is opened.
fn open_or_begin_anew<T>(
    path: &Path,
    alone: bool,
    open: impl Fn(DataDir) -> Result<(DataDir, T), StorageError>,
) -> Result<(DataDir, T), NodeError> {
    let data_dir = if alone { DataDir::open(path) } else { DataDir::open_to_rejoin(path) };
    let data_dir = data_dir.map_err(StorageError::from);
    let shown = path.display();
    // One that was removed is as good as lost; its stores needn't be looked at.
    let removed = data_dir.as_ref().ok().and_then(removed);
    let opened = match removed {
        Some(why) => {
            // It is to be locked anew.
            drop(data_dir);
            Err(Lost(why))
        }
        None => match data_dir.and_then(&open) {
            Err(error) if error.ends_identity() => Err(Lost(error.to_string())),
            Err(error) => return Err(error.into()),
            Ok(opened) => Ok(opened),
        },
    };
    let why = match opened {
        Err(Lost(why)) => why,
        Ok((data_dir, stores)) => {
            match data_dir.node() {
                Some(node) => tracing::warn!(
                    "--rejoin: nothing in {shown} keeps node {node} from starting, so it starts as it is; take the \
                     option out of its command line"
                ),
                None if alone => {
                    return Err(NodeError::Membership(format!(
                        "{shown} is that of no member, and the settings name no other node to rejoin through: name \
                         some members in `cluster.join`, or leave out `--rejoin` to form a new cluster, empty"
                    )));
                }
                None => tracing::info!("--rejoin: {shown} is that of no member yet; it joins as a new node"),
            }
            return Ok((data_dir, stores));
        }
    };
    if alone {
        return Err(NodeError::Membership(format!(
            "{why}; and the settings name no other node, so there is no cluster to rejoin: what is left in {shown} \
             may be the only copy, and nothing in it was changed. Name some members in `cluster.join`, or set \
             the directory aside yourself to form a new cluster, empty"
        )));
    }
    tracing::warn!("--rejoin: {why}; setting the content of {shown} aside");
    let cluster_of = |map: &[u8]| map_cache::decode(map).ok().map(|map| map.cluster_id);
    let (data_dir, aside) = DataDir::begin_anew(path, cluster_of).map_err(StorageError::from)?;
    let cluster =
        data_dir.cluster_id().map_or("the cluster that it finds".into(), |id| format!("cluster {id}"));
    let aside = aside.map_or("earlier".into(), |aside| format!("into {}", aside.display()));
    tracing::warn!(
        "--rejoin: what was in {shown} was moved {aside}, and is not used any more; this node joins {cluster} as a \
         new one. The replicas of the old one stay missing: see `pontoon status`"
    );
    Ok(open(data_dir)?)
}
