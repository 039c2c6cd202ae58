//! Writes a key, reads it, scans, removes it.
//!
//! Start a cluster in another terminal with `pontoon setup demo 3 4`, then run
//! `cargo run --example quickstart -- ADDRESS` with one of the addresses it prints.

use pontoon::client::{Client, ScanOptions};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let address = std::env::args().nth(1).ok_or("usage: quickstart ADDRESS")?;
    let client = Client::connect([address]).await?;
    let demo = client.database("demo");

    let version = demo.put("greeting", "hello").await?;
    println!("written as version {version}");
    if let Some(found) = demo.get("greeting").await? {
        println!("read back: {}", String::from_utf8_lossy(&found.value));
    }
    let mut scan = demo.scan(ScanOptions::default());
    loop {
        let page = scan.next_page().await?;
        if page.is_empty() {
            break;
        }
        for (key, found) in page {
            println!("{} (version {})", String::from_utf8_lossy(&key), found.version);
        }
    }
    demo.delete("greeting").await?;
    client.close().await;
    Ok(())
}
