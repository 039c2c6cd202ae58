//! The commands of docs/operations.md on nodes that come and go, read from the page itself: only the path of the
//! binary is another, and the ports.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::cluster::free_ports;
use crate::harness::{HANG, Home, PORTS, Running};

const BINARY: &str = env!("CARGO_BIN_EXE_pontoon");

/// The lines of the `sh` blocks between a heading and the next of its kind.
fn commands(heading: &str) -> Vec<String> {
    let page = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/operations.md")).unwrap();
    let mut lines = page.lines().skip_while(|line| *line != heading);
    lines.next().unwrap_or_else(|| panic!("the page has no `{heading}`"));
    let (mut found, mut inside) = (Vec::new(), false);
    for line in lines.take_while(|line| !line.starts_with("## ")) {
        match line {
            "```sh" => inside = true,
            "```" => inside = false,
            line if inside => found.push(line.to_owned()),
            _ => {}
        }
    }
    found
}

/// Runs a line as the shell would.
fn shell(home: &Home, line: &str, cluster: &str) -> Running {
    let mut command = Command::new("sh");
    // `exec`: a signal goes to the binary, not to a shell around it.
    command.args(["-c", &format!("exec {line}")]);
    home.environment(&mut command);
    command.env("PONTOON_CLUSTER", cluster).current_dir(home.path());
    Running::spawn(command)
}

#[test]
fn nodes_come_and_go_as_the_page_says() {
    let home = Home::new();
    let ports_held = PORTS.read().unwrap_or_else(|poisoned| poisoned.into_inner());
    let free = free_ports(15);
    let elsewhere = |text: &str| {
        let mut text = text.to_owned();
        for (i, port) in free.iter().enumerate() {
            let shipped = 7101 + 100 * (i / 5) + i % 5;
            text = text.replace(&format!("127.0.0.1:{shipped}"), &format!("127.0.0.1:{port}"));
        }
        text
    };
    let configs = home.file("config/cluster-3");
    fs::create_dir_all(&configs).unwrap();
    for name in (1..=5).map(|n| format!("n{n}.toml")) {
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/cluster-3").join(&name);
        fs::write(configs.join(&name), elsewhere(&fs::read_to_string(shipped).unwrap())).unwrap();
    }
    let cluster = elsewhere("127.0.0.1:7101,127.0.0.1:7102,127.0.0.1:7103");
    let lines = [commands("## Three daemons"), commands("## Nodes that come and go")].concat();
    assert!(lines.len() > 20, "{lines:#?}");

    let mut daemons: Vec<Running> = Vec::new();
    let mut approving = false;
    for line in lines.iter().filter(|line| !line.trim().is_empty() && !line.starts_with("export ")) {
        let (program, rest) = line.split_once(' ').unwrap();
        assert_eq!(program, "pontoon", "{line}");
        let here = elsewhere(&format!("{BINARY} {rest}"));
        if rest.starts_with("serve ") {
            let daemon = shell(&home, &here, &cluster);
            if daemons.len() >= 2 && !approving {
                // The first ones wait for one another.
                daemons.iter().chain([&daemon]).for_each(|daemon| daemon.wait_for("ready node=", HANG));
            }
            daemons.push(daemon);
            if approving {
                let begun = Instant::now();
                let list = format!("{BINARY} admin node list");
                while !shell(&home, &list, &cluster).end(HANG).ok().text().contains("pending") {
                    assert!(begun.elapsed() < HANG, "it doesn't ask to be let in");
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
            continue;
        }
        approving |= rest.starts_with("admin settings set join.approve on");
        if rest.contains("--dead") {
            // «When it is gone for good»: the fourth.
            daemons[3].signal(Signal::KILL);
        }
        let running = shell(&home, &here, &cluster);
        if rest.contains("--watch") {
            running.wait_for("\n", HANG);
            running.signal(Signal::INT);
        }
        let ended = running.end(Duration::from_secs(120));
        if rest.starts_with("admin recover") {
            ended.exits(1).says(&["isn't lost"]);
        } else {
            assert_eq!(ended.code, Some(0), "{line}: {}{}", ended.text(), ended.errors());
        }
        if rest.starts_with("admin node add") {
            daemons[4].wait_for("ready node=5", HANG);
        }
    }
    drop(ports_held);
    assert_eq!(daemons.len(), 5);
    for daemon in daemons.drain(..3) {
        daemon.signal(Signal::TERM);
        daemon.end(HANG).ok();
    }
}
