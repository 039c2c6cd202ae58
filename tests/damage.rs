//! Damage to the files of a stopped node: it is repaired, with nothing lost and nothing wrong, or the node
//! doesn't start and says what to do.
//!
//! A few cases of each kind are tried in every run. All of them, which take minutes, make the table in
//! docs/operations.md, which the few are held against:
//! `REWRITE=1 cargo test --test damage -- --ignored`

#[path = "support/cluster.rs"]
mod cluster;
#[path = "damage/files.rs"]
mod files;
#[path = "damage/patient.rs"]
mod patient;
#[path = "damage/table.rs"]
mod table;

use std::time::Instant;

use files::{Class, Damage};
use patient::{Patient, Stop};
use pontoon::storage::engine_kind::EngineKind;
use table::Table;

/// Tries these out, one after the other.
async fn try_out(
    engine: EngineKind,
    cases: impl IntoIterator<Item = (Class, Damage, Stop)>,
    table: &mut Table,
) {
    let mut patient = Patient::new(engine).await;
    for (class, damage, stop) in cases {
        let begun = Instant::now();
        if let Some(outcome) = patient.try_out(class, damage, stop).await {
            println!("{engine}: {class}, {damage}, {stop:?}: {outcome:?}, {:.1?}", begun.elapsed());
            table.note(class, damage, outcome);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_file_is_repaired_or_refused_as_the_table_says() {
    let mut table = Table::default();
    let cases = [
        (Class::Identity, Damage::FlipMiddle, Stop::Clean),
        (Class::LogFirst, Damage::Delete, Stop::Clean),
        (Class::LogMiddle, Damage::FlipMiddle, Stop::Clean),
        (Class::LogLast, Damage::Half, Stop::Clean),
        (Class::LogRewrite, Damage::Delete, Stop::Clean),
        (Class::Log, Damage::Delete, Stop::Clean),
        (Class::Map, Damage::Empty, Stop::Clean),
        (Class::LogLast, Damage::Older, Stop::Kill),
        (Class::LogLast, Damage::FlipEnd, Stop::Kill),
        (Class::LogLast, Damage::Older, Stop::Clean),
        (Class::Log, Damage::Older, Stop::Kill),
        (Class::LogMark, Damage::Delete, Stop::Kill),
        (Class::StateCurrent, Damage::FlipStart, Stop::Flushed),
        (Class::StateCurrent, Damage::Delete, Stop::Flushed),
        (Class::StateVersion, Damage::FlipMiddle, Stop::Flushed),
        (Class::StateVersion, Damage::Half, Stop::Flushed),
        (Class::StateTable, Damage::FlipMany, Stop::Flushed),
        (Class::StateTable, Damage::Delete, Stop::Flushed),
        (Class::StateTable, Damage::Empty, Stop::InFlush),
        (Class::State, Damage::Delete, Stop::Flushed),
        // There for some milliseconds only: killed in time by one that is written without pause, and so never stops flushing.
        (Class::RedoFile, Damage::FlipMiddle, Stop::InFlush),
        (Class::RedoFile, Damage::Delete, Stop::InFlush),
        (Class::SnapshotFile, Damage::FlipMiddle, Stop::InInstall),
    ];
    try_out(EngineKind::Fjall, cases, &mut table).await;
    table.check();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_file_of_sled_is_repaired_as_the_table_says() {
    let mut table = Table::default();
    let cases = [
        (Class::StateSnap, Damage::Half, Stop::Flushed),
        (Class::StateDb, Damage::FlipMany, Stop::Flushed),
        (Class::StateDb, Damage::Older, Stop::Flushed),
        (Class::State, Damage::Delete, Stop::Flushed),
        (Class::RedoFile, Damage::FlipMiddle, Stop::InFlush),
        (Class::RedoFile, Damage::Delete, Stop::InFlush),
    ];
    try_out(EngineKind::Sled, cases, &mut table).await;
    table.check();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "every damage to every file takes ten minutes"]
async fn every_damage_to_every_file_comes_to_what_the_table_says() {
    let stops = |class| match class {
        // Each time a little later in the flush.
        Class::RedoFile | Class::Redo => &[Stop::InFlush; 3][..],
        Class::SnapshotFile => &[Stop::InInstall],
        Class::StateDb => &[Stop::Flushed, Stop::InFlush],
        Class::StateConf | Class::StateSnap | Class::StateSums | Class::State => &[Stop::Flushed],
        Class::StateCurrent | Class::StateVersion | Class::StateTable => &[Stop::Flushed, Stop::InFlush],
        _ => &[Stop::Clean, Stop::Kill],
    };
    let cases = Class::ALL.into_iter().flat_map(|class| {
        stops(class).iter().flat_map(move |stop| Damage::ALL.map(|damage| (class, damage, *stop)))
    });
    let mut table = Table::default();
    // What no engine has made is tried beside the default one alone.
    for engine in EngineKind::ALL {
        let of_engine = |class: Class| class.engine().is_none_or(|made| made == engine);
        let tried = |class: Class| of_engine(class) && (engine == EngineKind::DEFAULT || class.is_state());
        try_out(engine, cases.clone().filter(|(class, ..)| tried(*class)), &mut table).await;
    }
    if std::env::var_os("REWRITE").is_some() {
        table.write();
    }
    table.check();
}
