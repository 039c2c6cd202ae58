//! Several tasks add to one counter. None may lose an addition, so each writes with a compare-and-set
//! against the version it read, and tries again if another was faster.
//!
//! `cargo run --example counter_cas -- ADDRESS`, against a cluster with a database `demo`.

use pontoon::client::{Cas, Client, ClientError, Database};
use pontoon::machine::command::Expect;

async fn add_one(database: &Database) -> Result<u64, ClientError> {
    loop {
        let found = database.get("counter").await?;
        let (expect, count) = match found {
            None => (Expect::Absent, 0),
            Some(found) => {
                let text = String::from_utf8_lossy(&found.value);
                (Expect::Version(found.version), text.parse().unwrap_or(0))
            }
        };
        let next = (count + 1u64).to_string();
        // A lost answer is asked for again by the library. `ClientError::Unknown` would mean that none came
        // until the deadline: whether this addition counts can't be told. Here it ends the run.
        if let Cas::Written(_) = database.cas("counter", expect, next).await? {
            return Ok(count + 1);
        }
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let address = std::env::args().nth(1).ok_or("usage: counter_cas ADDRESS")?;
    let client = Client::connect([address]).await?;
    let tasks: Vec<_> = (0..4)
        .map(|_| {
            let demo = client.database("demo");
            tokio::spawn(async move { add_one(&demo).await })
        })
        .collect();
    for task in tasks {
        println!("counter is {}", task.await??);
    }
    client.close().await;
    Ok(())
}
