//! The six lines of the report that Pontoon goes back to, as they stand there.

use rustix::process::Signal;

use crate::cluster::STOPPED;
use crate::harness::{HANG, Home, PORTS};

/// Takes the time off the end of a line: `At host … (1.23 s)`.
fn untimed(line: &str) -> &str {
    let (text, time) = line.rsplit_once(" (").unwrap_or_else(|| panic!("no time in {line:?}"));
    let seconds = time.strip_suffix(" s)").unwrap_or_else(|| panic!("no time in {line:?}"));
    seconds.parse::<f64>().unwrap_or_else(|_| panic!("no time in {line:?}"));
    text
}

/// Reads `At host ADDR, WHEN ADDR`.
fn view<'a>(line: &'a str, when: &str) -> Option<(&'a str, &'a str)> {
    untimed(line).strip_prefix("At host ")?.split_once(&format!(", {when} "))
}

fn test(kind: &str) -> Vec<String> {
    let home = Home::new();
    let _ports = PORTS.read().unwrap_or_else(|poisoned| poisoned.into_inner());
    let ended = home.run(&["-test", kind, "4"]).ok();
    home.assert_nothing_left();
    assert!(!home.data().exists(), "a test has nothing to do with the local cluster");
    ended.text().lines().map(str::to_owned).collect()
}

#[test]
fn the_lines_for_a_database() {
    let home = Home::new();
    let server = home.foreground(&["-setup", "testDB", "3", "5"]);
    home.run(&["-set", "testDB", "bob", "hello"]).ok();
    let got = home.run(&["-get", "testDB", "bob"]).ok();
    assert_eq!(got.text(), "hello");
    // The state can't be cleaned away under a server.
    home.run(&["-clean"]).exits(1);
    server.signal(Signal::INT);
    server.end(STOPPED).ok();
    // Without a terminal nobody can say yes.
    home.run(&["-clean"]).exits(2).says(&["--yes"]);
    home.run(&["-clean", "--yes"]).ok();
    home.run(&["-clean"]).ok();
    assert!(!home.data().exists());
    home.assert_nothing_left();
}

#[test]
fn leader_failure() {
    let lines = test("leaderFailure");
    let initial: Vec<_> = lines.iter().map_while(|line| view(line, "initial leader")).collect();
    assert_eq!(initial.len(), 4, "each of the four nodes is asked: {lines:#?}");
    let leader = initial[0].1;
    assert!(initial.iter().all(|view| view.1 == leader), "{initial:?}");
    assert!(initial.iter().any(|view| view.0 == leader), "the leader is one of them: {initial:?}");

    assert_eq!(untimed(&lines[4]), format!("Crashing leader at {leader}"));

    let after: Vec<_> = lines[5..].iter().map_while(|line| view(line, "after reelection")).collect();
    assert_eq!(after.len(), 3, "each survivor is asked: {lines:#?}");
    let successor = after[0].1;
    assert!(after.iter().all(|view| view.1 == successor && view.0 != leader), "{after:?}");
    assert_ne!(successor, leader);

    let mut closed: Vec<_> = lines[8..11]
        .iter()
        .map(|line| untimed(line).strip_prefix("Closed server at ").expect("a closed server"))
        .collect();
    let mut survivors: Vec<_> = after.iter().map(|view| view.0).collect();
    closed.sort_unstable();
    survivors.sort_unstable();
    assert_eq!(closed, survivors);

    assert_eq!(untimed(&lines[11]), "Leader reelection test is done");
    assert_eq!(lines.len(), 12, "{lines:#?}");
}

#[test]
fn replication() {
    let lines = test("replicationTest");
    let position = |text: &str| {
        let found = lines.iter().position(|line| line.starts_with(text));
        found.unwrap_or_else(|| panic!("no {text:?} in {lines:#?}"))
    };
    let order = [
        position("Adding a testkey with testval to the cluster .."),
        position("Crashing leader to trigger a reelection .."),
        position("Crashing leader at "),
        position("Polling the cluster for testkey .."),
        position("Closed server at "),
        position("The cluster returned (which should be 'testval'): testval"),
    ];
    assert!(order.is_sorted(), "{lines:#?}");
    assert_eq!(lines.iter().filter(|line| line.starts_with("Closed server at ")).count(), 3);
    assert_eq!(lines.last().unwrap(), "The cluster returned (which should be 'testval'): testval");
}

#[test]
fn the_tests_in_json_are_one_object() {
    let home = Home::new();
    let _ports = PORTS.read().unwrap_or_else(|poisoned| poisoned.into_inner());
    let object = home.run(&["test", "leader-failure", "3", "--json"]).ok().json();
    assert_eq!(object["passed"], true);
    assert_eq!(object["initial"].as_array().unwrap().len(), 3);
    assert_eq!(object["after"].as_array().unwrap().len(), 2);
    assert_eq!(object["closed"].as_array().unwrap().len(), 2);
    let object = home.run(&["test", "replication", "3", "--json"]).ok().json();
    assert_eq!(object["passed"], true);
    assert_eq!(object["returned"], "testval");
    home.assert_nothing_left();
}

#[test]
fn a_test_stopped_by_ctrl_c_leaves_nothing_behind() {
    let home = Home::new();
    let ports = PORTS.read().unwrap_or_else(|poisoned| poisoned.into_inner());
    let running = home.spawn(&["test", "leader-failure", "3"]);
    running.wait_for("Crashing leader", HANG);
    running.signal(Signal::INT);
    let ended = running.end(HANG);
    drop(ports);
    // It may have been done in that moment.
    assert!(matches!(ended.code, Some(0 | 1)), "{ended:?}");
    home.assert_nothing_left();
}
