//! Scans over all shards of a database.

use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::calls::{PageRequest, persist};
use super::driver::Driver;
use super::refresh::Ask;
use super::retry::{Failure, Kind};
use super::ticket::Deadline;
use super::{ClientError, Database, Versioned, closed, wire};
use crate::limits::{ATTEMPT_MS_MAX, KEY_BYTES_MAX, SCAN_PAIRS_MAX};

/// What to scan.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ScanOptions {
    /// Only keys that begin so.
    pub prefix: Bytes,
    /// At most so many pairs.
    pub limit: Option<usize>,
    /// Leave out the values.
    pub keys_only: bool,
}

/// A scan under way.
pub struct Scan {
    database: Database,
    options: ScanOptions,
    /// Where it goes on; `None` at its end.
    place: Option<Place>,
}

/// A place in a scan: a shard, named by a ring position of its range so that it survives a split, and
/// the last key seen there.
#[derive(Clone, Debug)]
struct Place {
    position: u64,
    after: Bytes,
}

impl Scan {
    pub(super) fn new(database: Database, options: ScanOptions) -> Scan {
        let place = Some(Place { position: 0, after: Bytes::new() });
        Scan { database, options, place }
    }

    /// The next page of pairs; empty when there are no more. After an error the same page may be asked
    /// for again.
    pub async fn next_page(&mut self) -> Result<Vec<(Bytes, Versioned)>, ClientError> {
        if self.options.prefix.len() > KEY_BYTES_MAX {
            let text = format!("the prefix is longer than any key: {KEY_BYTES_MAX} bytes");
            return Err(ClientError::Invalid(text));
        }
        while let Some(place) = self.place.clone() {
            let limit = self.options.limit.unwrap_or(usize::MAX).min(SCAN_PAIRS_MAX);
            if limit == 0 {
                self.place = None;
                break;
            }
            let request = PageRequest {
                prefix: self.options.prefix.clone(),
                after: place.after,
                limit: u32::try_from(limit).unwrap_or(u32::MAX),
                keys_only: self.options.keys_only,
            };
            let (name, position) = (self.database.name.clone(), place.position);
            let deadline = self.database.deadline();
            let ((pairs, more), end) = self
                .database
                .client
                .run(closed(), move |driver| async move {
                    page(&driver, &name, position, request, deadline).await
                })
                .await?;
            self.place = match pairs.last() {
                Some((key, _)) if more => Some(Place { position, after: key.clone() }),
                _ => end.checked_add(1).map(|position| Place { position, after: Bytes::new() }),
            };
            if let Some(limit) = &mut self.options.limit {
                *limit = limit.saturating_sub(pairs.len());
            }
            if !pairs.is_empty() {
                return Ok(pairs);
            }
        }
        Ok(Vec::new())
    }
}

/// A page of the shard at `position`, and the end of that shard's range.
async fn page(
    driver: &Rc<Driver>,
    database: &str,
    position: u64,
    request: PageRequest,
    deadline: Deadline,
) -> Result<(wire::Page, u64), ClientError> {
    let asked = persist(Kind::Read, deadline, |left| {
        let request = &request;
        async move {
            driver.adopt();
            let route = driver.routing.borrow().route_at(database, position);
            let Some(route) = route else {
                let word = driver.ask_map(Ask::All, left).await?;
                if driver.routing.borrow().knows(database) {
                    let why = "the map has just come".to_owned();
                    return Err(Failure::NotSent(why));
                }
                return Err(word.absent(database));
            };
            let patience = left.min(Duration::from_millis(ATTEMPT_MS_MAX));
            let page = driver.scan_page(route.shard, route.range_version, request, patience).await?;
            Ok((page, route.end))
        }
    });
    asked.await.map_err(|error| {
        let routing = driver.routing.borrow();
        let route = routing.route_at(database, position);
        match route.and_then(|route| routing.told(route.shard, Instant::now())) {
            Some(told) => error.because(told),
            None => error,
        }
    })
}
