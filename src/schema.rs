//! The generated Cap'n Proto bindings, one module per file in `schema/`. Nothing here is written by
//! hand; see `schema/build.rs`.
#![allow(missing_docs, clippy::all, clippy::pedantic, clippy::unimplemented)]

macro_rules! generated {
    ($module:ident) => {
        pub mod $module {
            include!(concat!(env!("OUT_DIR"), "/", stringify!($module), ".rs"));
        }
    };
}

generated!(types_capnp);
generated!(kv_capnp);
generated!(admin_capnp);
generated!(peer_capnp);
generated!(store_capnp);
