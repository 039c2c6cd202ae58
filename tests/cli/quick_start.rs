//! README's commands, read from README itself: only the path of the binary is another, and where
//! ports are given, the ports.

use std::fs;
use std::path::Path;
use std::process::Command;

use rustix::process::Signal;

use crate::cluster::{STOPPED, free_ports};
use crate::harness::{HANG, Home, PORTS, Running};

const BINARY: &str = env!("CARGO_BIN_EXE_pontoon");

/// A fenced block: its language and its lines.
type Block = (String, Vec<String>);

/// The blocks below a heading, up to the next heading of its kind or a greater one.
fn blocks(heading: &str) -> Vec<Block> {
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    let mut lines = readme.lines().skip_while(|line| *line != heading);
    lines.next().unwrap_or_else(|| panic!("README has no `{heading}`"));
    let mut blocks: Vec<Block> = Vec::new();
    let mut inside = false;
    for line in lines {
        if let Some(language) = line.strip_prefix("```") {
            inside = !inside;
            if inside {
                blocks.push((language.to_owned(), Vec::new()));
            }
        } else if inside {
            blocks.last_mut().unwrap().1.push(line.to_owned());
        } else if line.starts_with("##") {
            break;
        }
    }
    blocks
}

/// Runs a line as the shell would.
fn shell(home: &Home, line: &str) -> Running {
    let mut command = Command::new("sh");
    // `exec`: a signal goes to the binary, not to a shell around it.
    command.args(["-c", &format!("exec {line}")]);
    home.environment(&mut command);
    Running::spawn(command)
}

/// A command and the lines that README shows below it.
fn session(lines: &[String]) -> Vec<(String, Vec<String>)> {
    let mut steps: Vec<(String, Vec<String>)> = Vec::new();
    for line in lines {
        match line.strip_prefix("$ ") {
            Some(command) => steps.push((command.to_owned(), Vec::new())),
            None => steps.last_mut().expect("a command first").1.push(line.clone()),
        }
    }
    steps
}

#[test]
fn readme_quick_start() {
    let blocks = blocks("## Quick start");
    let [(sh, start), (console, lines), (_, check)] = &blocks[..] else {
        panic!("not a start, a session and the tests: {blocks:#?}")
    };
    assert_eq!((sh.as_str(), console.as_str()), ("sh", "console"));
    assert_eq!(check, &["cargo test"], "this is the command that runs this test");
    let [start] = &start[..] else { panic!("one command does the set-up, not {start:?}") };
    let start = start.replace("cargo run --release --", BINARY);
    assert!(start.contains(BINARY), "{start}");

    let home = Home::new();
    let ports = PORTS.read().unwrap_or_else(|poisoned| poisoned.into_inner());
    let server = shell(&home, &start);
    server.wait_for("\nready\n", HANG);
    drop(ports);
    let shown = server.stdout();
    for text in ["n1", "n2", "n3", "127.0.0.1:"] {
        assert!(shown.contains(text), "the nodes are shown:\n{shown}");
    }
    assert_eq!(shown.matches("│ demo ").count(), 8, "the shard map is shown:\n{shown}");

    let steps = session(lines);
    assert!(steps.len() >= 3, "{steps:?}");
    for (command, expected) in &steps {
        let ended = shell(&home, &command.replace("target/release/pontoon", BINARY)).end(HANG).ok();
        // What README doesn't show is left to the command; what it shows is all there is.
        if !expected.is_empty() {
            assert_eq!(ended.text().lines().collect::<Vec<_>>(), *expected, "{command}");
        }
    }
    server.signal(Signal::INT);
    let ended = server.end(STOPPED).ok();
    assert_eq!(ended.errors(), "", "nothing to complain about");

    // «running it again brings the same cluster and data back»
    let ports = PORTS.write().unwrap_or_else(|poisoned| poisoned.into_inner());
    let server = shell(&home, &start);
    server.wait_for("\nready\n", HANG);
    drop(ports);
    let (get, expected) = steps.iter().find(|(command, _)| command.contains(" get ")).unwrap();
    let got = shell(&home, &get.replace("target/release/pontoon", BINARY)).end(HANG).ok();
    assert_eq!(got.text().lines().collect::<Vec<_>>(), *expected);
    server.signal(Signal::INT);
    server.end(STOPPED).ok();
    home.assert_nothing_left();
}

#[test]
fn readme_three_daemons_and_a_kill() {
    let blocks = blocks("### Three daemons and a kill");
    let [(_, lines)] = &blocks[..] else { panic!("not one block: {blocks:#?}") };
    let home = Home::new();
    let ports_held = PORTS.read().unwrap_or_else(|poisoned| poisoned.into_inner());

    // The shipped files, on ports that are free here.
    let free = free_ports(9);
    let elsewhere = |text: &str| {
        let mut text = text.to_owned();
        for (i, port) in free.iter().enumerate() {
            let shipped = 7101 + 100 * (i / 3) + i % 3;
            text = text.replace(&format!("127.0.0.1:{shipped}"), &format!("127.0.0.1:{port}"));
        }
        text
    };
    let configs = home.file("config/cluster-3");
    fs::create_dir_all(&configs).unwrap();
    for name in ["n1.toml", "n2.toml", "n3.toml"] {
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/cluster-3").join(name);
        let text = elsewhere(&fs::read_to_string(shipped).unwrap());
        assert!(!text.contains(":7101") && !text.contains(":7201"), "{text}");
        fs::write(configs.join(name), text).unwrap();
    }

    let (build, rest) = lines.split_first().unwrap();
    assert_eq!(build, "cargo build --release");
    let mut script = String::from("set -e\n");
    for line in rest {
        script.push_str(&elsewhere(line).replace("target/release/pontoon", BINARY));
        script.push('\n');
    }
    // What a reader would do next.
    script.push_str("\np2=$(jobs -p %2) p3=$(jobs -p %3)\nkill $p2 $p3\nwait $p2\nwait $p3\n");
    let mut command = Command::new("bash");
    home.environment(&mut command);
    command.args(["-c", &script]).current_dir(home.path()).env_remove("PONTOON_DATA");
    let ended = Running::spawn(command).end(HANG).ok();
    drop(ports_held);
    let text = ended.text();
    assert_eq!(text.matches("ready node=").count(), 3, "{text}");
    let expected = lines.last().unwrap().rsplit_once("# ").expect("README says what is printed").1;
    assert!(text.ends_with(expected), "the value outlives the node: {text:?}");
    assert!(home.file("data/n1").is_dir(), "the data is where the files say");
    home.assert_nothing_left();
}
