//! A state that is kept still at a mark, until its digest is taken.

use std::time::{Duration, Instant};

use super::fence_tests::put;
use super::messages::{AskDigest, Digesting, Freeze, Tick};
use super::test_node::{PATIENCE, TestNode};
use crate::group::types::{Operation, Output};
use crate::ids::{Index, ShardId};
use crate::limits;
use crate::storage::digest::StateDigest;

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

    async fn digest(&self, index: Index) -> StateDigest {
        let begun = Instant::now();
        loop {
            match self.ask(index).await {
                Digesting::Begun(_, digest) => return digest.await.expect("taken").expect("a digest"),
                Digesting::Coming(why) => assert!(begun.elapsed() < PATIENCE, "{why}"),
                Digesting::GoneOn(why) | Digesting::Never(why) => panic!("{why}"),
            }
            actix::clock::sleep(Duration::from_millis(5)).await;
        }
    }

    fn replica(&self) -> actix::Addr<super::replica::ReplicaActor> {
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
    assert!(matches!(node.ask(mark + 1000).await, Digesting::Coming(_)), "nobody has applied that yet");

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
    // The node ticks by itself, too.
    for _ in 0..limits::VIEW_TICKS / 2 {
        node.replica().send(Tick).await.expect("it runs");
    }
    node.digest(mark).await;
    let mark = node.mark().await;
    for _ in 0..limits::VIEW_TICKS {
        node.replica().send(Tick).await.expect("it runs");
    }
    assert!(matches!(node.ask(mark).await, Digesting::GoneOn(_)));
    node.stop().await;
}
