//! Great messages on their way in: how many bytes of them all connections of a thread may hold at a time.
//!
//! The RPC library takes the memory for a message when it has read its head, and has it until the rest
//! is there. One connection is bounded by the greatest message; thousands are not. So the heads are
//! read here first, and that of a message beyond [`ARRIVING_FREE_BYTES`] is given on only once its whole
//! length fits what is left of the thread's budget; until then the connection isn't read, and its
//! sender feels it.
//!
//! ```text
//!   socket ─► head: length ─► fits the budget? ─► body ─► library
//!                                 │ no: wait in line        └ arrived whole: the budget has it back
//!                                 └ a body that hardly moves while others wait: its connection ends
//! ```
//!
//! Reserved is the whole length, before the first byte of the body: if bytes were counted as they come,
//! many half messages could fill the budget, and none of them ever be whole.
//!
//! There are two lines, each with its budget: messages no greater than a usual batch don't wait behind
//! great ones. In either, what stands still is found out before the clients that wait behind it take the
//! node for a hung one.

use std::cell::Cell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_util::io::AsyncRead;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep, sleep};
use tokio_util::sync::PollSemaphore;

use crate::limits::{ARRIVING_BATCH_BYTES_MAX, ARRIVING_FREE_BYTES, ARRIVING_WHOLE_MS, TRAVERSAL_BYTES_MAX};

/// What a permit of the budget stands for, in bytes.
const UNIT: usize = 1024;
/// The segments that a message may have, as the library has it.
const SEGMENTS_MAX: usize = 512;

/// The budgets of one thread.
pub struct Arrivals {
    /// For messages no greater than a usual batch.
    batches: Rc<Line>,
    /// For those beyond.
    great: Rc<Line>,
    window: Duration,
}

/// One budget, and who waits for it.
struct Line {
    room: Arc<Semaphore>,
    /// Connections that wait for room.
    waiting: Cell<usize>,
}

impl Line {
    /// Room for so many bytes; never less than the greatest message of the line takes.
    fn new(bytes: usize, greatest: usize) -> Rc<Line> {
        let units = bytes.max(greatest).div_ceil(UNIT);
        Rc::new(Line { room: Arc::new(Semaphore::new(units)), waiting: Cell::new(0) })
    }
}

impl Arrivals {
    /// Room for so many bytes of batches and so many of great messages, and for one of either at the least.
    /// While others wait, each that arrives must move at such a pace, in each `window`, that the whole takes
    /// [`ARRIVING_WHOLE_MS`].
    pub fn new(batches: usize, great: usize, window: Duration) -> Rc<Arrivals> {
        Rc::new(Arrivals {
            batches: Line::new(batches, ARRIVING_BATCH_BYTES_MAX),
            great: Line::new(great, TRAVERSAL_BYTES_MAX),
            window,
        })
    }

    /// Counts great messages of one connection against the budgets.
    pub fn pace<R>(self: &Rc<Arrivals>, inner: R) -> Paced<R> {
        Paced { inner, arrivals: self.clone(), head: Vec::new(), given: 0, body: 0, stage: Stage::Head }
    }
}

/// Somebody waits for room; until this is dropped.
struct Waiting(Rc<Line>);

impl Waiting {
    fn new(line: &Rc<Line>) -> Waiting {
        line.waiting.set(line.waiting.get() + 1);
        Waiting(line.clone())
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.waiting.set(self.0.waiting.get() - 1);
    }
}

/// Where the message stands that is being read.
enum Stage {
    /// Its head is read, and kept here.
    Head,
    /// The head is whole; the message needs room.
    Waits(Wait),
    /// The head and then the body are given to the library; a great message has its room.
    Given(Option<Arrival>),
}

/// A great message that isn't begun.
struct Wait {
    line: Rc<Line>,
    room: PollSemaphore,
    /// What it needs.
    units: u32,
    waiting: Option<Waiting>,
}

/// A great message that arrives.
struct Arrival {
    _room: OwnedSemaphorePermit,
    line: Rc<Line>,
    /// Bytes by which it must move in a window while others wait.
    due: usize,
    /// The end of the present window of time.
    window: Pin<Box<Sleep>>,
    /// Bytes in this window.
    moved: usize,
}

/// The reading half of a connection. See the module page.
pub struct Paced<R> {
    inner: R,
    arrivals: Rc<Arrivals>,
    /// What has been read of the message's head.
    head: Vec<u8>,
    /// Of these, given on.
    given: usize,
    /// Bytes of the body that are to come, once the head is whole.
    body: usize,
    stage: Stage,
}

/// How long the head is of which `head` is the beginning, as far as that tells. The number of segments
/// less one, their lengths in words, 32 bits each, filled up to a whole word:
/// <https://capnproto.org/encoding.html#serialization-over-a-stream>.
fn head_bytes(head: &[u8]) -> usize {
    let Some(segments) = head.first_chunk() else { return 8 };
    let segments = (u32::from_le_bytes(*segments) as usize).saturating_add(1);
    // A head of more is refused by the library when it has read the first word of it.
    if segments > SEGMENTS_MAX { 8 } else { (4 * (segments + 1)).next_multiple_of(8) }
}

/// The length of the body that follows a whole head.
fn body_bytes(head: &[u8]) -> usize {
    let segments = head.first_chunk().map_or(0, |n| u32::from_le_bytes(*n) as usize + 1);
    let lengths = head.as_chunks::<4>().0.iter().skip(1).take(segments.min(SEGMENTS_MAX));
    lengths
        .map(|words| (u32::from_le_bytes(*words) as usize).saturating_mul(8))
        .fold(0, usize::saturating_add)
}

impl<R: AsyncRead + Unpin> Paced<R> {
    /// Reads the rest of the head. False: the connection has ended.
    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        let mut buffer = [0; 64];
        loop {
            let missing = head_bytes(&self.head) - self.head.len();
            if missing == 0 {
                break;
            }
            let buffer = &mut buffer[..missing.min(64)];
            let read = ready!(Pin::new(&mut self.inner).poll_read(cx, buffer))?;
            if read == 0 {
                return Poll::Ready(Ok(false));
            }
            self.head.extend_from_slice(&buffer[..read]);
        }
        self.body = body_bytes(&self.head);
        // A message beyond the greatest is refused by the library once it has the head.
        let line = match self.body {
            bytes if !(ARRIVING_FREE_BYTES..=TRAVERSAL_BYTES_MAX).contains(&bytes) => None,
            bytes if bytes <= ARRIVING_BATCH_BYTES_MAX => Some(&self.arrivals.batches),
            _ => Some(&self.arrivals.great),
        };
        self.stage = line.map_or(Stage::Given(None), |line| self.waits(line));
        Poll::Ready(Ok(true))
    }

    /// The message whose head is whole waits in `line`.
    fn waits(&self, line: &Rc<Line>) -> Stage {
        let units = u32::try_from(self.body.div_ceil(UNIT)).unwrap_or(u32::MAX);
        let room = PollSemaphore::new(line.room.clone());
        Stage::Waits(Wait { line: line.clone(), room, units, waiting: None })
    }

    /// Waits until the head may be given on, for which the library makes room.
    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Stage::Waits(wait) = &mut self.stage else { return Poll::Ready(Ok(())) };
        let Poll::Ready(room) = wait.room.poll_acquire_many(cx, wait.units) else {
            wait.waiting.get_or_insert_with(|| Waiting::new(&wait.line));
            return Poll::Pending;
        };
        let room = room.ok_or_else(|| io::Error::other("the thread takes no messages any more"))?;
        let (line, window) = (wait.line.clone(), self.arrivals.window);
        let due = self.body as u128 * window.as_millis() / u128::from(ARRIVING_WHOLE_MS);
        self.stage = Stage::Given(Some(Arrival {
            _room: room,
            line,
            due: usize::try_from(due).unwrap_or(usize::MAX),
            window: Box::pin(sleep(window)),
            moved: 0,
        }));
        Poll::Ready(Ok(()))
    }

    fn poll_message(&mut self, cx: &mut Context<'_>, into: &mut [u8]) -> Poll<io::Result<usize>> {
        let length;
        if self.given < self.head.len() {
            let head = &self.head[self.given..];
            length = into.len().min(head.len());
            into[..length].copy_from_slice(&head[..length]);
            self.given += length;
        } else {
            let most = into.len().min(self.body);
            let Poll::Ready(read) = Pin::new(&mut self.inner).poll_read(cx, &mut into[..most]) else {
                // What is there is read before it is judged: this thread may be the slow one.
                self.check_pace(cx)?;
                return Poll::Pending;
            };
            length = read?;
            self.body -= length;
            if let Stage::Given(Some(arrival)) = &mut self.stage {
                arrival.moved += length;
            }
        }
        if self.body == 0 && self.given == self.head.len() {
            self.head.clear();
            self.given = 0;
            self.stage = Stage::Head;
        }
        Poll::Ready(Ok(length))
    }

    /// An error if the message that arrives is too slow, and others wait for its room.
    fn check_pace(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        let Stage::Given(Some(arrival)) = &mut self.stage else { return Ok(()) };
        while arrival.window.as_mut().poll(cx).is_ready() {
            if arrival.moved < arrival.due && arrival.line.waiting.get() > 0 {
                let (left, moved, due) = (self.body, arrival.moved, arrival.due);
                tracing::info!(left, moved, due, "closed a client connection whose message came too slowly");
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("{left} bytes of a message arrive too slowly while others wait for the room"),
                ));
            }
            arrival.moved = 0;
            arrival.window.as_mut().reset(Instant::now() + self.arrivals.window);
        }
        Ok(())
    }
}

impl<R: AsyncRead + Unpin> AsyncRead for Paced<R> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut [u8]) -> Poll<io::Result<usize>> {
        if matches!(self.stage, Stage::Head) && !ready!(self.poll_head(cx))? {
            return Poll::Ready(Ok(0));
        }
        ready!(self.poll_room(cx))?;
        self.poll_message(cx, into)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use capnp::message::{AllocationStrategy, Builder, HeapAllocator, ReaderOptions};
    use futures_util::io::AsyncReadExt;
    use proptest::prelude::*;
    use tokio::io::{AsyncWriteExt, duplex};
    use tokio::time::timeout;
    use tokio_util::compat::TokioAsyncReadCompatExt;

    /// A message with one segment of so many words.
    fn message(words: u32) -> Vec<u8> {
        let mut bytes = [0u32.to_le_bytes(), words.to_le_bytes()].concat();
        bytes.resize(8 + 8 * words as usize, 7);
        bytes
    }

    const GREAT: u32 = (TRAVERSAL_BYTES_MAX / 8) as u32;
    const SHORT: Duration = Duration::from_millis(20);
    const WINDOW: Duration = Duration::from_millis(200);
    const SOON: Duration = Duration::from_secs(20);

    #[test]
    fn heads_tell_the_length_of_what_follows() {
        let head = |numbers: &[u32]| -> Vec<u8> { numbers.iter().flat_map(|n| n.to_le_bytes()).collect() };
        assert_eq!((head_bytes(&[]), head_bytes(&head(&[0, 9]))), (8, 8));
        assert_eq!((head_bytes(&head(&[1])), head_bytes(&head(&[2])), head_bytes(&head(&[3]))), (16, 16, 24));
        assert_eq!(head_bytes(&head(&[u32::MAX])), 8);
        assert_eq!(body_bytes(&head(&[0, 9])), 72);
        // The last number fills up the word.
        assert_eq!(body_bytes(&head(&[1, 2, 3, 99])), 40);
        assert_eq!(body_bytes(&head(&[2, 1, 2, 3])), 48);
    }

    #[tokio::test]
    async fn a_great_message_waits_for_room_and_gives_it_back() {
        let arrivals = Arrivals::new(0, 0, SOON);
        let (mut far, near) = duplex(1 << 20);
        let mut first = arrivals.pace(near.compat());
        far.write_all(&message(GREAT)[..1000]).await.unwrap();
        let mut buffer = vec![0; TRAVERSAL_BYTES_MAX + 8];
        assert_eq!(first.read(&mut buffer).await.unwrap(), 8, "the head");
        assert_eq!(first.read(&mut buffer).await.unwrap(), 992);

        let (mut other, near) = duplex(1 << 20);
        let mut second = arrivals.pace(near.compat());
        let all = [message(3), message(GREAT / 2), message(1)].concat();
        let written = tokio::spawn(async move {
            other.write_all(&all).await.unwrap();
            other
        });
        let mut small = vec![0; 8 + 24];
        timeout(SOON, second.read_exact(&mut small)).await.expect("a small one passes").unwrap();
        assert!(timeout(SHORT, second.read(&mut buffer)).await.is_err(), "no room");
        assert_eq!(arrivals.great.waiting.get(), 1);
        let rest = tokio::spawn(async move {
            far.write_all(&message(GREAT)[1000..]).await.unwrap();
            far
        });
        let left = TRAVERSAL_BYTES_MAX + 8 - 1000;
        timeout(SOON, first.read_exact(&mut buffer[..left])).await.expect("it arrives").unwrap();
        let left = 8 + GREAT as usize / 2 * 8 + 16;
        timeout(SOON, second.read_exact(&mut buffer[..left])).await.expect("now there is room").unwrap();
        assert_eq!(arrivals.great.waiting.get(), 0);
        assert_eq!(arrivals.great.room.available_permits() * UNIT, TRAVERSAL_BYTES_MAX);
        rest.await.unwrap();
        written.await.unwrap();
    }

    #[tokio::test]
    async fn a_batch_doesnt_wait_behind_great_messages() {
        let arrivals = Arrivals::new(0, 0, WINDOW);
        let mut buffer = vec![0; 2 << 20];
        // One has all the room of its line, and another waits for it.
        let mut great =
            [0, 1].map(|_| duplex(1 << 20)).map(|(far, near)| (far, arrivals.pace(near.compat())));
        for (far, paced) in &mut great {
            far.write_all(&message(GREAT)[..8]).await.unwrap();
            assert_eq!(
                timeout(SHORT, paced.read(&mut buffer)).await.is_ok(),
                arrivals.great.waiting.get() == 0
            );
        }
        let words = (ARRIVING_BATCH_BYTES_MAX / 8) as u32;
        let (mut far, near) = duplex(2 << 20);
        let mut batch = arrivals.pace(near.compat());
        far.write_all(&message(words)).await.unwrap();
        let whole = &mut buffer[..8 + ARRIVING_BATCH_BYTES_MAX];
        timeout(SOON, batch.read_exact(whole)).await.expect("no wait").unwrap();
    }

    #[tokio::test]
    async fn the_pace_is_that_of_the_whole() {
        let arrivals = Arrivals::new(0, 0, WINDOW);
        let (mut far, near) = duplex(1 << 20);
        let mut first = arrivals.pace(near.compat());
        far.write_all(&message(GREAT)[..8]).await.unwrap();
        let mut buffer = vec![0; 1 << 20];
        first.read_exact(&mut buffer[..8]).await.unwrap();
        let (mut other, near) = duplex(1 << 20);
        let mut second = arrivals.pace(near.compat());
        other.write_all(&message(GREAT)[..8]).await.unwrap();
        // More than enough for a small one: 64 KiB twice in a window, where this one needs twenty times that.
        let slowly = async {
            loop {
                sleep(WINDOW / 2).await;
                if far.write_all(&[7; 64 << 10]).await.is_err() {
                    return std::future::pending::<()>().await;
                }
            }
        };
        let mut more = [0; 8];
        let begun = timeout(SOON, async {
            let ended = async {
                let error = loop {
                    if let Err(error) = first.read(&mut buffer).await {
                        break error;
                    }
                };
                drop(first);
                assert_eq!(error.kind(), io::ErrorKind::TimedOut);
            };
            tokio::select! {
                ((), read) = async { tokio::join!(ended, second.read(&mut more)) } => read.unwrap(),
                () = slowly => 0,
            }
        });
        assert_eq!(begun.await.expect("soon"), 8);
    }

    #[tokio::test]
    async fn one_that_hardly_moves_ends_when_others_wait_and_not_before() {
        let arrivals = Arrivals::new(0, 0, WINDOW);
        let (mut far, near) = duplex(1 << 20);
        let mut first = arrivals.pace(near.compat());
        far.write_all(&message(GREAT)[..1000]).await.unwrap();
        let mut buffer = vec![0; 1 << 20];
        first.read_exact(&mut buffer[..1000]).await.unwrap();
        let long = 5 * WINDOW;
        assert!(timeout(long, first.read(&mut buffer)).await.is_err(), "nobody minds");

        let (mut other, near) = duplex(1 << 20);
        let mut second = arrivals.pace(near.compat());
        other.write_all(&message(GREAT)[..1000]).await.unwrap();
        let mut more = vec![0; 1000];
        let (ended, begun) = tokio::join!(
            timeout(SOON, async {
                // It sends a little now and then.
                let error = loop {
                    far.write_all(&[7]).await.unwrap();
                    tokio::select! {
                        read = first.read_exact(&mut buffer) => break read.expect_err("it isn't whole"),
                        () = sleep(SHORT) => (),
                    }
                    sleep(SHORT).await;
                };
                drop(first);
                error
            }),
            second.read(&mut more),
        );
        assert_eq!(ended.expect("soon").kind(), io::ErrorKind::TimedOut);
        assert_eq!(begun.unwrap(), 8);
    }

    proptest! {
        /// Whatever passes, passes unchanged, in whatever pieces; and a message of the library's is
        /// read as it is.
        #[test]
        fn nothing_is_changed(
            sizes in prop::collection::vec((0u32..9, 0usize..9000), 1..5),
            piece in 1usize..5000,
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            runtime.block_on(async {
                let mut sent = Vec::new();
                for (segments, bytes) in &sizes {
                    // Small first segments make the library add others.
                    let allocator = HeapAllocator::new().first_segment_words(*segments + 1);
                    let mut message =
                        Builder::new(allocator.allocation_strategy(AllocationStrategy::FixedSize));
                    message.initn_root::<capnp::data::Builder<'_>>(*bytes as u32).fill(7);
                    sent.extend(capnp::serialize::write_message_to_words(&message));
                }
                let (mut far, near) = duplex(piece);
                let mut paced = Arrivals::new(0, 0, WINDOW).pace(near.compat());
                let feed = sent.clone();
                let fed = tokio::spawn(async move { far.write_all(&feed).await.map(|()| far) });
                for (_, bytes) in &sizes {
                    let read = capnp_futures::serialize::read_message(&mut paced, ReaderOptions::new());
                    let read = read.await.expect("a message");
                    assert_eq!(read.get_root::<capnp::data::Reader<'_>>().unwrap(), vec![7u8; *bytes]);
                    assert_eq!((paced.body, paced.head.len()), (0, 0), "it knows where messages begin");
                }
                fed.await.unwrap().unwrap();
            });
        }
    }
}
