//! The supervisor and its hubs over stores in memory.

use super::*;
use crate::node::test_node::TestNode;

/// The log may refuse a write of a replica while others of its node are still on their way up.
#[actix::test]
async fn a_replica_that_must_end_while_others_start_ends() {
    let dir = tempfile::tempdir().expect("a directory");
    let node = TestNode::new(dir.path());
    // The thread of replica 2 is busy: replica 1 runs long before both do.
    let (release, held) = std::sync::mpsc::channel::<()>();
    node.threads[0].spawn_fn(move || {
        held.recv().ok();
    });
    node.supervisor.do_send(OpenAll);
    let begun = Instant::now();
    while node.report(1).await.restarts == 0 {
        let reason = "a write that contradicts the log".to_owned();
        node.supervisor.do_send(EndReplica { replica: ReplicaId(1), incarnation: 1, reason });
        assert!(begun.elapsed() < Duration::from_secs(20), "it goes on, though nothing it writes is kept");
        actix::clock::sleep(Duration::from_millis(20)).await;
    }
    release.send(()).expect("the thread waits");
    // And it is there again, with the other.
    node.serves(1, 2).await;
    node.serves(2, 1).await;
    assert_eq!((node.report(1).await.restarts, node.report(2).await.restarts), (1, 0));
    node.stop().await;
}
