//! Damage to the files of a stopped node: each is repaired, with nothing lost, or the node doesn't start and
//! says what to do.

#[path = "support/cluster.rs"]
mod cluster;
#[path = "damage/files.rs"]
mod files;
#[path = "damage/patient.rs"]
mod patient;

use files::{Class, Damage};
use futures_util::FutureExt;
use patient::{NODE, Patient, Stop};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "minutes: every file, every damage"]
async fn every_damage_to_every_file() {
    let mut patient = Patient::new().await;
    patient.stop(Stop::InFlush).await;
    patient.cluster.spawn(NODE);
    patient.cluster.wait_ready(NODE);
    patient.whole().await;
    patient.all_there().await;
    patient.stop(Stop::InFlush).await;
    for file in files::files(&patient.dir()) {
        println!("{}: {}", file.display(), std::fs::metadata(&file).unwrap().len());
    }
    for class in Class::ALL {
        for damage in Damage::ALL {
            let begun = std::time::Instant::now();
            let stop = match class {
                Class::RedoFile | Class::Redo => Stop::InFlush,
                Class::StateDb | Class::StateConf | Class::StateSnap | Class::StateSums | Class::State => {
                    Stop::Flushed
                }
                _ => Stop::Clean,
            };
            let outcome =
                std::panic::AssertUnwindSafe(patient.try_out(class, damage, stop)).catch_unwind().await;
            println!("RESULT {class} {damage}: {outcome:?} {:?}", begun.elapsed());
            if outcome.is_err() {
                patient = Patient::new().await;
                patient.stop(Stop::InFlush).await;
                patient.cluster.spawn(NODE);
                patient.cluster.wait_ready(NODE);
                patient.stop(Stop::InFlush).await;
            }
        }
    }
}
