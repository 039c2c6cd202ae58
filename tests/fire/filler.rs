//! Great values, so that memtables are flushed and logs compacted.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pontoon::client::Database;

use crate::PATIENCE;

/// Writes great values until it is stopped, so that memtables are flushed and logs compacted.
pub struct Filler {
    stop: Arc<AtomicBool>,
    writes: Arc<AtomicU64>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Filler {
    pub fn start(database: &Database, tasks: usize, pause: Duration) -> Filler {
        let (stop, writes) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let tasks = (0..tasks).map(|task| {
            let (database, stop, writes) = (database.clone(), stop.clone(), writes.clone());
            tokio::spawn(async move {
                for number in 0_usize.. {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let key = format!("great-{task}-{}", number % 40);
                    database.put(key, vec![task as u8; 64 * 1024]).await.expect("written in the end");
                    writes.fetch_add(1, Ordering::Relaxed);
                    tokio::time::sleep(pause).await;
                }
            })
        });
        Filler { tasks: tasks.collect(), writes, stop }
    }

    /// Waits until there were so many writes, for as long as there are more of them.
    pub async fn progress(&self, writes: u64) {
        let (first, mut last, mut begun) = (Instant::now(), 0, Instant::now());
        while self.writes.load(Ordering::Relaxed) < writes {
            let now = self.writes.load(Ordering::Relaxed);
            if now > last {
                (last, begun) = (now, Instant::now());
            }
            let in_time = begun.elapsed() < PATIENCE && first.elapsed() < 2 * PATIENCE;
            assert!(in_time, "the writers stand still");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub async fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.expect("no write failed");
        }
    }
}
