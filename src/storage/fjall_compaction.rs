//! The thread that merges the tables of a fjall tree, so that few have to be looked at for a read.
//!
//! One thread, which lets all others have the cores first. It is woken after each flush and works until there is
//! nothing to merge. A flush that finds too many tables merges them itself ([`super::engine_fjall`]): that
//! is how writes are held back where merging can't keep up.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use lsm_tree::compaction::filter::{CompactionFilter, Context, Factory, ItemAccessor, Verdict};

use super::engine_fjall::Core;
use crate::limits::COMPACTION_NICE;
use crate::nice::be_nice;

/// Has merges given up once the store is being closed: a great one takes seconds, and changes nothing
/// before it is done.
#[derive(Clone)]
pub(super) struct Ending(pub Arc<AtomicBool>);

impl Ending {
    pub fn has_begun(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

impl Factory for Ending {
    fn name(&self) -> &str {
        "ending"
    }

    fn make_filter(&self, _: &Context) -> Box<dyn CompactionFilter> {
        Box::new(self.clone())
    }
}

impl CompactionFilter for Ending {
    fn filter_item(&mut self, _: ItemAccessor<'_>, _: &Context) -> lsm_tree::Result<Verdict> {
        if self.has_begun() {
            return Err(io::Error::from(io::ErrorKind::Interrupted).into());
        }
        Ok(Verdict::Keep)
    }
}

/// Its handle. Dropping it ends the thread.
pub(super) struct Compaction {
    wake: Option<SyncSender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Compaction {
    pub fn start(core: Arc<Core>) -> std::io::Result<Compaction> {
        let (wake, woken) = sync_channel(1);
        let thread =
            std::thread::Builder::new().name("compaction".into()).spawn(move || run(&core, &woken))?;
        Ok(Compaction { wake: Some(wake), thread: Some(thread) })
    }

    /// There may be something to do.
    pub fn wake(&self) {
        // It is woken already, or has ended since the store is broken.
        let _ = self.wake.as_ref().map(|wake| wake.try_send(()));
    }
}

impl Drop for Compaction {
    fn drop(&mut self) {
        drop(self.wake.take());
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the compaction thread has panicked");
        }
    }
}

fn run(core: &Core, woken: &Receiver<()>) {
    be_nice("compaction", COMPACTION_NICE);
    while woken.recv().is_ok() {
        // Whatever goes wrong, the tree is as it was before, unless the store is broken.
        loop {
            match core.compact() {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) if core.is_broken() => {
                    tracing::error!(%error, "merging tables of the state store");
                    return;
                }
                Err(error) => {
                    tracing::warn!(%error, "merging tables of the state store; tried again after the next flush");
                    break;
                }
            }
        }
    }
}
