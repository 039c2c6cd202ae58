//! A record of acknowledged writes, and of how long the longest took.
#![allow(dead_code)] // Each test binary uses its own part.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pontoon::client::{Database, ScanOptions};

/// For a write: how long it takes is told, and on a busy machine an election may take several attempts.
const DEADLINE: Duration = Duration::from_secs(60);

/// Writers that put a new key each time, until told to stop. The keys of a writer are of one shard.
pub struct Journal {
    stop: Arc<AtomicBool>,
    writes: Arc<AtomicU64>,
    writers: Vec<tokio::task::JoinHandle<Page>>,
}

/// What a writer knows.
struct Page {
    writer: usize,
    acknowledged: Vec<u64>,
    errors: Vec<String>,
    longest: Duration,
}

/// What came of the writes.
pub struct Record {
    acknowledged: BTreeSet<String>,
    /// Whatever failed within its deadline.
    pub errors: Vec<String>,
    /// The longest time that a writer stood still.
    pub longest: Duration,
}

fn key(writer: usize, number: u64) -> String {
    format!("{{{writer}}}-{number:08}")
}

impl Journal {
    /// Starts so many writers of values of `bytes` each, which pause for so long after each write.
    pub fn start(database: &Database, writers: usize, bytes: usize, pause: Duration) -> Journal {
        let database = database.with_timeout(DEADLINE);
        let (stop, writes) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let writers = (0..writers).map(|writer| {
            let (database, stop, writes) = (database.clone(), stop.clone(), writes.clone());
            tokio::spawn(async move {
                let mut page =
                    Page { writer, acknowledged: Vec::new(), errors: Vec::new(), longest: Duration::ZERO };
                for number in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let begun = Instant::now();
                    match database.put(key(writer, number), vec![writer as u8; bytes]).await {
                        Ok(_) => page.acknowledged.push(number),
                        Err(error) => page.errors.push(error.to_string()),
                    }
                    page.longest = page.longest.max(begun.elapsed());
                    writes.fetch_add(1, Ordering::Relaxed);
                    tokio::time::sleep(pause).await;
                }
                page
            })
        });
        Journal { writers: writers.collect(), stop, writes }
    }

    /// Waits until `count` more writes have ended.
    pub async fn progress(&self, count: u64) {
        let until = self.writes.load(Ordering::Relaxed) + count;
        let (first, mut last, mut begun) = (Instant::now(), 0, Instant::now());
        while self.writes.load(Ordering::Relaxed) < until {
            let now = self.writes.load(Ordering::Relaxed);
            if now > last {
                (last, begun) = (now, Instant::now());
            }
            let in_time =
                begun.elapsed() < Duration::from_secs(60) && first.elapsed() < Duration::from_secs(300);
            assert!(in_time, "the writers stand still");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Ends the writers.
    pub async fn stop(self) -> Record {
        self.stop.store(true, Ordering::Relaxed);
        let mut record =
            Record { acknowledged: BTreeSet::new(), errors: Vec::new(), longest: Duration::ZERO };
        for writer in self.writers {
            let page = writer.await.expect("a writer");
            record.acknowledged.extend(page.acknowledged.iter().map(|number| key(page.writer, *number)));
            record.errors.extend(page.errors);
            record.longest = record.longest.max(page.longest);
        }
        record
    }
}

impl Record {
    /// That no write failed, and each that was acknowledged is there.
    pub async fn assert_kept(&self, database: &Database) {
        assert_eq!(self.errors, Vec::<String>::new(), "writes failed within their deadline");
        let mut scan = database.scan(ScanOptions { keys_only: true, ..ScanOptions::default() });
        let mut found = BTreeSet::new();
        loop {
            let page = scan.next_page().await.expect("a page");
            if page.is_empty() {
                break;
            }
            found.extend(page.into_iter().map(|(key, _)| String::from_utf8_lossy(&key).into_owned()));
        }
        let lost: Vec<&String> = self.acknowledged.difference(&found).collect();
        assert!(lost.is_empty(), "{} of {} are lost: {lost:?}", lost.len(), self.acknowledged.len());
        println!("{} writes, the longest took {:?}", self.acknowledged.len(), self.longest);
    }
}
