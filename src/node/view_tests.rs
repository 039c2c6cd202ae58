//! A state that is kept still at a mark, until its digest is taken.

use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::fence_tests::{hold, put};
use super::messages::{AskDigest, Digesting, Freeze, Tick};
use super::snapshots::worker::DigestError;
use super::test_node::{PATIENCE, TestNode};
use crate::group::types::{Operation, Output};
use crate::ids::{Index, ShardId};
use crate::limits;
use crate::storage::digest::StateDigest;

type Taken = oneshot::Receiver<Result<StateDigest, DigestError>>;

impl TestNode {
    async fn mark(&self) -> Index {
        let results = self.submit(Operation::Mark).await.expect("an answer").expect("started").remove(0);
        match results {
            Ok(Output::Marked(index)) => index,
            other => panic!("{other:?}"),
        }
    }

    async fn write(&self, key: &str, bytes: usize) {
        let done = self.submit(put(key, &"x".repeat(bytes))).await;
        done.expect("an answer").expect("started").remove(0).expect("written");
    }

    async fn ask(&self, index: Index) -> Digesting {
        let addr = self.shared.router.replica(ShardId(1)).expect("it runs");
        addr.send(AskDigest(index)).await.expect("it runs")
    }

    /// Asks until the digest is begun.
    async fn begun(&self, index: Index) -> Taken {
        let begun = Instant::now();
        loop {
            match self.ask(index).await {
                Digesting::Begun(_, digest) => return digest,
                Digesting::Behind(why) | Digesting::Coming(why) => {
                    assert!(begun.elapsed() < PATIENCE, "{why}");
                }
                Digesting::GoneOn(why) | Digesting::Never(why) => panic!("{why}"),
            }
            actix::clock::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn digest(&self, index: Index) -> StateDigest {
        self.begun(index).await.await.expect("taken").expect("a digest")
    }

    async fn tick(&self, times: u64) {
        for _ in 0..times {
            self.replica().send(Tick).await.expect("it runs");
        }
    }

    fn replica(&self) -> super::replica::ReplicaAddr {
        self.shared.router.replica(ShardId(1)).expect("it runs")
    }
}

#[actix::test]
async fn what_is_written_behind_a_mark_is_not_in_its_digest() {
    let dir = tempfile::tempdir().expect("a directory");
    let node = TestNode::leading(dir.path()).await;
    let mark = node.mark().await;
    // More than a replica keeps in memory otherwise.
    let bytes = node.shared.memory.replica_limit();
    for key in ["d", "e"] {
        node.write(key, bytes / 2 + 1).await;
    }
    let digest = node.digest(mark).await;
    assert_eq!((digest.index, digest.keys), (mark, 3));
    assert!(matches!(node.ask(mark + 1000).await, Digesting::Behind(_)), "nobody has applied that yet");

    // Memory comes first.
    node.replica().send(Freeze { for_log: false }).await.expect("it runs");
    assert!(matches!(node.ask(mark).await, Digesting::GoneOn(_)));
    // The flush of the next mark waits for that one, if it is under way still.
    let next = node.mark().await;
    let after = node.digest(next).await;
    assert_eq!((after.index, after.keys), (next, 5));
    assert_ne!(after.data, digest.data);
    node.stop().await;
}

#[actix::test]
async fn a_state_for_which_nobody_asks_is_let_go() {
    let dir = tempfile::tempdir().expect("a directory");
    let node = TestNode::leading(dir.path()).await;
    let mark = node.mark().await;
    // The node ticks by itself, too: a busy machine has the rest of the time to ask in.
    node.tick(limits::VIEW_TICKS / 10).await;
    node.digest(mark).await;
    let mark = node.mark().await;
    node.tick(limits::VIEW_TICKS).await;
    assert!(matches!(node.ask(mark).await, Digesting::GoneOn(_)));
    node.stop().await;
}

#[actix::test]
async fn a_state_that_is_read_stays_when_another_is_asked_for() {
    let dir = tempfile::tempdir().expect("a directory");
    let node = TestNode::leading(dir.path()).await;
    // Between flushes the digest begins and ends: this one goes on until the thread is free.
    let mark = node.mark().await;
    // Its flush is on its way: the mark was applied before this.
    node.tick(1).await;
    let (held, wait) = hold();
    node.shared.flusher.run(Box::new(move |_| wait()));
    let first = node.begun(mark).await;
    node.write("d", 10).await;
    let other = node.mark().await;
    match node.ask(other).await {
        Digesting::GoneOn(why) => assert!(why.contains(&format!("at entry {mark} ")), "{why}"),
        _ => panic!("the first is read still"),
    }
    drop(held);
    let first = first.await.expect("taken").expect("a digest");
    assert_eq!((first.index, first.keys), (mark, 3));
    // Who comes again is next.
    let other = node.mark().await;
    assert_eq!(node.digest(other).await.keys, 4);
    node.stop().await;
}

#[actix::test]
async fn a_state_that_is_asked_for_stays_until_it_is_flushed() {
    let dir = tempfile::tempdir().expect("a directory");
    let node = TestNode::leading(dir.path()).await;
    let (mut held, wait) = hold();
    node.shared.flusher.run(Box::new(move |_| wait()));
    // Of what it finds together the thread does flushes first.
    held.begun().await;
    let mark = node.mark().await;
    for _ in 0..8 {
        assert!(matches!(node.ask(mark).await, Digesting::Coming(_)));
        node.tick(limits::VIEW_TICKS / 5).await;
    }
    // A later mark doesn't take its place.
    let other = node.mark().await;
    assert!(matches!(node.ask(other).await, Digesting::GoneOn(_)));
    drop(held);
    assert_eq!(node.digest(mark).await.index, mark);
    node.stop().await;
}
