//! Generates the Rust bindings of the schemas from the stored `schema/pontoon.request`, which is
//! the Cap'n Proto compiler's own intermediate form: a build needs no `capnp` tool. After a change
//! to a schema, `schema/update` renews it; a test compares the two wherever `capnp` is installed.
//! And tells the program its git commit, as `PONTOON_COMMIT`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

fn main() {
    println!("cargo::rerun-if-changed=schema/pontoon.request");
    println!("cargo::rerun-if-changed=schema/build.rs");
    println!("cargo::rustc-env=PONTOON_COMMIT={}", commit());
    let request = fs::File::open("schema/pontoon.request").expect("schema/pontoon.request");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    capnpc::codegen::CodeGenerationCommand::new()
        .output_directory(&out)
        .default_parent_module(vec!["schema".into()])
        .run(request)
        .expect("generating the Cap'n Proto bindings");
}

/// The commit, shortened; `unknown` without git or a repository of our own. Never fails a build.
fn commit() -> String {
    // Unpacked inside some other repository, its commit would be told as ours.
    if git(&["rev-parse", "--show-cdup"]).is_none_or(|up| !up.is_empty()) {
        return "unknown".into();
    }
    // The reflog changes with every commit and checkout. Only what exists is named: cargo takes a
    // missing file for a changed one, and would run this at each build.
    let branch = git(&["symbolic-ref", "--quiet", "HEAD"]).unwrap_or_default();
    for name in ["HEAD", "logs/HEAD", "packed-refs", &branch] {
        if name.is_empty() {
            continue;
        }
        if let Some(path) = git(&["rev-parse", "--git-path", name])
            && Path::new(&path).exists()
        {
            println!("cargo::rerun-if-changed={path}");
        }
    }
    git(&["rev-parse", "--short", "HEAD"]).unwrap_or_else(|| "unknown".into())
}

fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}
