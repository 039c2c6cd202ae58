//! What an engine comes to when the same keys are written over and over, and what it costs to remove much at once.
//! Measurements, not checks: they print what docs/performance.md quotes.
//! `cargo test --release --test endurance -- --ignored --nocapture`

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use pontoon::ids::{RandomId, ReplicaId};
use pontoon::storage::engine::{Mutation, Store};
use pontoon::storage::engine_kind::{EngineKind, StateOptions};
use pontoon::storage::{generations, keys};

const VALUE_BYTES: usize = 128;

fn open(kind: EngineKind, path: &Path) -> Arc<dyn Store> {
    let options = StateOptions { engine: Some(kind), cache_bytes: 32 << 20, synchronous: true };
    kind.open(path, options, RandomId([7; 16])).expect("opened")
}

/// What a flush does: sorted changes, as one run where the engine takes such.
fn flush(engine: &dyn Store, batch: &[Mutation]) {
    match engine.begin_run().expect("begun") {
        Some(mut run) => {
            for (key, value) in batch {
                run.push(key, value.as_ref()).expect("pushed");
            }
            run.finish().expect("durable");
        }
        None => {
            for part in batch.chunks(512) {
                engine.write(part).expect("written");
            }
            engine.sync().expect("durable");
        }
    }
}

fn value(number: u64) -> Bytes {
    let mut random = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let bytes = (0..VALUE_BYTES / 8).flat_map(|_| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random.to_le_bytes()
    });
    bytes.collect()
}

/// A number of `/proc/self/…`.
fn of_process(file: &str, name: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/self/{file}")).expect("what the system tells");
    let line = text.lines().find(|line| line.starts_with(name)).expect("a line");
    line.split_whitespace().nth(1).and_then(|number| number.parse().ok()).expect("a number")
}

fn open_files() -> usize {
    fs::read_dir("/proc/self/fd").expect("the files").count()
}

/// For how much `PONTOON_LONG_WRITES` says, 10 million writes unless it does.
#[test]
#[ignore = "a measurement of minutes"]
fn random_overwrites() {
    const KEYS: u64 = 200_000;
    const RUN: u64 = 40_000;
    let writes =
        std::env::var("PONTOON_LONG_WRITES").map_or(10_000_000, |writes| writes.parse().expect("a number"));
    let home = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let engine = open(EngineKind::DEFAULT, &home.path().join("state"));
    let content = KEYS * (VALUE_BYTES as u64 + 28);
    let (mut random, mut done) = (1u64, 0);
    let (begun, mut longest, mut most_bytes, mut most_files) = (Instant::now(), Duration::ZERO, 0, 0);
    while done < writes {
        let mut batch: Vec<Mutation> = (0..RUN)
            .map(|number| {
                random =
                    random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let key = (random >> 33) % KEYS;
                (keys::user_key(ReplicaId(3), 1, &key.to_be_bytes()), Some(value(done + number)))
            })
            .collect();
        batch.sort_by(|one, other| one.0.cmp(&other.0));
        batch.dedup_by(|one, other| one.0 == other.0);
        let before = Instant::now();
        flush(&*engine, &batch);
        longest = longest.max(before.elapsed());
        most_bytes = most_bytes.max(engine.disk_bytes());
        most_files = most_files.max(open_files());
        done += RUN;
        if done % (writes / 10).max(RUN) < RUN {
            println!(
                "{done} writes, {:.0} s: on disk {:.2} × the content, at most {:.2} ×; longest flush {longest:?}; \
                 {} MiB written in all; memory {} MiB; files open {}, at most {most_files}",
                begun.elapsed().as_secs_f64(),
                engine.disk_bytes() as f64 / content as f64,
                most_bytes as f64 / content as f64,
                of_process("io", "write_bytes:") >> 20,
                of_process("status", "VmRSS:") >> 10,
                open_files(),
            );
            (longest, most_bytes) = (Duration::ZERO, 0);
        }
    }
}

/// A million keys beside as many of another replica.
#[test]
#[ignore = "a measurement of a minute"]
fn removal_of_a_large_generation() {
    const KEYS: u64 = 1_000_000;
    for kind in EngineKind::ALL {
        let home = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
        let engine = open(kind, &home.path().join("state"));
        for first in (0..KEYS).step_by(50_000) {
            let both = [3, 4].into_iter().flat_map(|replica| {
                (first..first + 50_000).map(move |key| {
                    (keys::user_key(ReplicaId(replica), 1, &key.to_be_bytes()), Some(value(key)))
                })
            });
            flush(&*engine, &both.collect::<Vec<Mutation>>());
        }
        // Until merges have ended.
        let mut bytes = 0;
        while std::mem::replace(&mut bytes, engine.disk_bytes()) != engine.disk_bytes() {
            std::thread::sleep(Duration::from_secs(1));
        }
        let (begun, written) = (Instant::now(), of_process("io", "wchar:"));
        let (mut from, mut longest) = (Vec::new(), Duration::ZERO);
        loop {
            let before = Instant::now();
            let gone = generations::destroy(&*engine, ReplicaId(3), 1, &mut from, 4096).expect("removed");
            longest = longest.max(before.elapsed());
            if gone {
                break;
            }
        }
        engine.sync().expect("durable");
        println!(
            "{kind}: {:.2} s, longest step {longest:?}, {} MiB written, on disk {} → {} MiB",
            begun.elapsed().as_secs_f64(),
            (of_process("io", "wchar:") - written) >> 20,
            bytes >> 20,
            engine.disk_bytes() >> 20
        );
        std::thread::sleep(Duration::from_secs(5));
        println!("{kind}: 5 s later {} MiB on disk", engine.disk_bytes() >> 20);
    }
}
