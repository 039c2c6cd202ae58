//! What a process takes of its machine.
#![allow(dead_code)] // Each test binary uses its own part.

/// Resident memory of a process, in bytes.
pub fn resident(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("its status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("its memory");
    line.trim().trim_end_matches("kB").trim().parse::<u64>().expect("a number") * 1024
}

/// Connections to a port of 127.0.0.1 that are established at its side.
pub fn connections(port: u16) -> usize {
    let table = std::fs::read_to_string("/proc/net/tcp").expect("the connections");
    let here = format!("0100007F:{port:04X}");
    let is_here = |line: &&str| {
        let mut fields = line.split_whitespace().skip(1);
        fields.next() == Some(here.as_str()) && fields.nth(1) == Some("01")
    };
    table.lines().filter(is_here).count()
}
