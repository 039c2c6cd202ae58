use super::*;
use crate::placement::rebalance::{PlannedMove, Totals};

fn plan_of(moves: Vec<PlannedMove>) -> RebalancePlan {
    RebalancePlan {
        id: 0xab,
        map_version: 7,
        moves,
        total: Totals { moves: 1, keys: 10, bytes: 2048 },
        minimum: 1,
        left: 0,
        silent: Vec::new(),
    }
}

fn moves() -> Vec<PlannedMove> {
    let one = |kind, keys, bytes| PlannedMove {
        shard: ShardId(4),
        from: NodeId(1),
        to: NodeId(3),
        kind,
        keys,
        bytes,
    };
    vec![one(MoveKind::Replica, 10, 2048), one(MoveKind::Leader, 0, 0)]
}

#[test]
fn a_plan_has_the_documented_shape() {
    assert_eq!(
        plan_json(&plan_of(moves())).to_string(),
        concat!(
            r#"{"plan_id":"00000000000000ab","map_version":7,"#,
            r#""moves":[{"shard":4,"from":1,"to":3,"kind":"replica","bytes":2048,"keys":10},"#,
            r#"{"shard":4,"from":1,"to":3,"kind":"leader","bytes":0,"keys":0}],"#,
            r#""total":{"moves":1,"bytes":2048,"keys":10},"minimum":{"moves":1},"shards_left":0,"silent":[]}"#
        )
    );
    let text = plan_text(&plan_of(moves()));
    for part in [
        "1 replica to move (the least possible: 1), with 10 keys and 2.0 KiB; leadership of 1 shard",
        "pontoon admin rebalance start 00000000000000ab",
    ] {
        assert!(text.contains(part), "{part}:\n{text}");
    }
    assert!(plan_text(&plan_of(Vec::new())).starts_with("nothing to do"));
    let many = plan_text(&plan_of([moves(), moves()].concat().repeat(30)));
    assert!(many.contains("and 20 more"), "{many}");
}

#[test]
fn a_status_has_the_documented_shape() {
    let mut status = RebalanceStatus {
        plan: 0xab,
        state: RebalanceState::Running,
        done: 1,
        total: 3,
        bytes_done: 1024,
        bytes_total: 4096,
        rate: Some(512),
        eta_s: Some(6),
        reason: String::new(),
        map_version: 9,
        moving: 2,
        stuck: Vec::new(),
    };
    assert_eq!(
        status_json(&status).to_string(),
        concat!(
            r#"{"state":"running","done":1,"total":3,"bytes_done":1024,"bytes_total":4096,"rate":512,"eta_s":6,"#,
            r#""plan_id":"00000000000000ab","moving":2,"reason":null,"stuck":[]}"#
        )
    );
    assert_eq!(
        status_text(&status),
        "running, plan 00000000000000ab: 1 of 3 replicas moved, 1.0 KiB of 4.0 KiB, 512 B/s, 6s left; 2 shards \
         changing members now"
    );
    status = RebalanceStatus { state: RebalanceState::Failed, eta_s: None, rate: None, ..status };
    status.reason = "no node\ncan".into();
    assert_eq!(exit_of(&status), Exit::Negative);
    assert!(status_text(&status).ends_with("; no node\\ncan"), "one line");
    assert!(status_json(&status).to_string().contains(r#""rate":null,"eta_s":null"#));
    status.stuck = (1..=7).map(|shard| (ShardId(shard), format!("reason {shard}"))).collect();
    let text = status_text(&status);
    assert!(text.contains("\nshard 5 stands still: reason 5\nand 2 more"), "{text}");
    assert_eq!(status_json(&status)["stuck"][6]["why"], "reason 7");
    for (state, word) in [
        (RebalanceState::Idle, "idle"),
        (RebalanceState::Running, "running"),
        (RebalanceState::Paused, "paused"),
        (RebalanceState::Cancelling, "cancelling"),
        (RebalanceState::Failed, "failed"),
    ] {
        assert_eq!(state_name(state), word);
    }
}

#[test]
fn a_wait_ends_as_the_rebalancing_did() {
    let status = |state, done, reason: &str| RebalanceStatus {
        plan: 4,
        state,
        done,
        total: 3,
        reason: reason.into(),
        ..RebalanceStatus::default()
    };
    let code = |status: &RebalanceStatus, cancelled| {
        let mut seen = Seen { cancelled, ..Seen::default() };
        seen.look(status, 4);
        seen.end(status, 4).map(|end| end.err().map(|failure| failure.code))
    };
    assert_eq!(code(&status(RebalanceState::Running, 1, ""), false), None);
    assert_eq!(code(&status(RebalanceState::Paused, 1, ""), false), None);
    assert_eq!(code(&status(RebalanceState::Cancelling, 1, ""), true), None);
    assert_eq!(code(&status(RebalanceState::Idle, 3, ""), false), Some(None));
    // A database was dropped meanwhile: nobody gave up.
    assert_eq!(code(&status(RebalanceState::Idle, 2, ""), false), Some(None));
    assert_eq!(code(&status(RebalanceState::Idle, 2, "asked to"), false), Some(Some("cancelled")));
    assert_eq!(code(&status(RebalanceState::Idle, 2, ""), true), Some(Some("cancelled")));
    assert_eq!(code(&status(RebalanceState::Failed, 2, "no room"), false), Some(Some("failed")));

    // Another follows: this one is done only if all of it was seen to be.
    let other = RebalanceStatus { plan: 6, ..status(RebalanceState::Running, 0, "") };
    for (moved, expected) in [
        (None, Some("superseded")),
        (Some((2, 3)), Some("superseded")),
        (Some((3, 3)), None),
        (Some((0, 0)), Some("superseded")),
    ] {
        let end = Seen { cancelled: false, moved }.end(&other, 4).expect("it is over");
        assert_eq!(end.as_ref().err().map(|failure| failure.code), expected, "{moved:?}");
        if let (Err(failure), Some((done, total))) = (end, moved) {
            assert!(failure.message.contains("by plan 0000000000000006"), "{failure}");
            assert!(
                failure.message.ends_with(&format!("{done} of {total} replicas have moved")),
                "{failure}"
            );
        }
    }
}

#[test]
fn what_has_begun_or_ended_says_what_is_left_and_who_leads() {
    let begun = Begun { plan: 0xab, left: 5, leaders: None };
    assert_eq!(
        begun_json(&begun).to_string(),
        r#"{"plan_id":"00000000000000ab","started":true,"ended":false,"shards_left":5,"leaders":null}"#
    );
    let text = begun_text(&begun);
    assert!(text.contains("under way") && text.contains("\nleft for another plan: 5 more shards;"), "{text}");
    let ended = Begun { left: 0, leaders: Some((5, 6)), ..begun };
    assert_eq!(begun_json(&ended)["leaders"].to_string(), r#"{"placed":5,"total":6}"#);
    assert_eq!(begun_text(&ended), "plan 00000000000000ab is done; 5 of its 6 shards are led as it wants");
    let cut = plan_text(&RebalancePlan { left: 1, ..plan_of(moves()) });
    assert!(
        cut.ends_with("\nleft for another plan: 1 more shard; start again when this one is done"),
        "{cut}"
    );
}

#[test]
fn a_plan_says_whom_it_was_made_without() {
    let silent = vec![NodeId(4), NodeId(5)];
    for of in [moves(), Vec::new()] {
        let plan = RebalancePlan { silent: silent.clone(), ..plan_of(of) };
        let text = plan_text(&plan);
        assert!(text.ends_with("\nno answer from node 4, 5: nothing moves there"), "{text}");
        assert_eq!(plan_json(&plan)["silent"].to_string(), "[4,5]");
    }
    let many = RebalancePlan { silent: (1..=20).map(NodeId).collect(), ..plan_of(Vec::new()) };
    assert!(plan_text(&many).ends_with("7, 8, …: nothing moves there"), "{}", plan_text(&many));
}
