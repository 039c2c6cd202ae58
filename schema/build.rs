//! Generates the Rust bindings of the schemas from the stored `schema/pontoon.request`, which is
//! the Cap'n Proto compiler's own intermediate form: a build needs no `capnp` tool. After a change
//! to a schema, `schema/update` renews it; a test compares the two wherever `capnp` is installed.

use std::{env, fs, path::PathBuf};

fn main() {
    println!("cargo::rerun-if-changed=schema/pontoon.request");
    println!("cargo::rerun-if-changed=schema/build.rs");
    println!("cargo::rerun-if-changed=.git/HEAD");
    let request = fs::File::open("schema/pontoon.request").expect("schema/pontoon.request");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    capnpc::codegen::CodeGenerationCommand::new()
        .output_directory(&out)
        .default_parent_module(vec!["schema".into()])
        .run(request)
        .expect("generating the Cap'n Proto bindings");
}
