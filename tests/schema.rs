//! The public protocol keeps its form: ids, ordinals, types and places of everything in `schema/` are
//! held against a listing, and the stored compiler output against the schemas themselves.
//!
//! `REWRITE=1 cargo test --test schema` writes the listing anew. Lines may be added; a line that
//! changes or goes breaks clients, other nodes or directories of an older version.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use capnp::message::ReaderOptions;
use capnp::schema_capnp::{brand, code_generator_request, field, node, type_, value};

/// The arguments of `schema/update`.
const FILES: [&str; 5] = ["types.capnp", "kv.capnp", "admin.capnp", "peer.capnp", "store.capnp"];

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn listing_path() -> PathBuf {
    repository().join("tests/schema/ordinals.txt")
}

/// Everything in a `CodeGeneratorRequest` that the wire depends on, a line each, sorted.
fn listing(request: &[u8]) -> capnp::Result<Vec<String>> {
    let message = capnp::serialize::read_message(request, ReaderOptions::new())?;
    let request = message.get_root::<code_generator_request::Reader<'_>>()?;
    let mut names = BTreeMap::new();
    for node in request.get_nodes()? {
        names.insert(node.get_id(), node.get_display_name()?.to_str()?.to_owned());
    }
    let mut lines = Vec::new();
    for node in request.get_nodes()? {
        list_node(node, &names, &mut lines)?;
    }
    lines.sort();
    Ok(lines)
}

type Names = BTreeMap<u64, String>;

fn list_node(node: node::Reader<'_>, names: &Names, lines: &mut Vec<String>) -> capnp::Result<()> {
    let name = node.get_display_name()?.to_str()?;
    let id = node.get_id();
    match node.which()? {
        node::File(()) => lines.push(format!("{name} file {id:#x}")),
        node::Struct(it) => {
            // A group's id and name come from its parent; what matters is where its fields lie.
            lines.push(format!("{name} struct {id:#x}"));
            for field in it.get_fields()? {
                let mut line = format!("{name}.{}", field.get_name()?.to_str()?);
                match field.get_ordinal().which()? {
                    field::ordinal::Explicit(ordinal) => write!(line, " @{ordinal}"),
                    field::ordinal::Implicit(()) => write!(line, " @-"),
                }
                .expect("writing to a string");
                match field.which()? {
                    field::Slot(slot) => {
                        let (ty, offset) = (slot.get_type()?, slot.get_offset());
                        let ty = type_name(ty, names)?;
                        let default = default(slot.get_default_value()?)?;
                        write!(line, " {ty} at {offset}{default}")
                    }
                    field::Group(group) => write!(line, " group {}", known(names, group.get_type_id())),
                }
                .expect("writing to a string");
                if field.get_discriminant_value() != field::NO_DISCRIMINANT {
                    let (value, at) = (field.get_discriminant_value(), it.get_discriminant_offset());
                    write!(line, " when {value} at {at}").expect("writing to a string");
                }
                lines.push(line);
            }
        }
        node::Enum(it) => {
            lines.push(format!("{name} enum {id:#x}"));
            for (ordinal, enumerant) in it.get_enumerants()?.iter().enumerate() {
                lines.push(format!("{name}.{} @{ordinal}", enumerant.get_name()?.to_str()?));
            }
        }
        node::Interface(it) => {
            lines.push(format!("{name} interface {id:#x}"));
            for superclass in it.get_superclasses()? {
                lines.push(format!("{name} extends {}", known(names, superclass.get_id())));
            }
            for (ordinal, method) in it.get_methods()?.iter().enumerate() {
                let from = known(names, method.get_param_struct_type());
                let to = known(names, method.get_result_struct_type());
                lines.push(format!("{name}.{} @{ordinal} {from} -> {to}", method.get_name()?.to_str()?));
            }
        }
        node::Const(_) | node::Annotation(_) => {}
    }
    Ok(())
}

fn known(names: &Names, id: u64) -> String {
    names.get(&id).cloned().unwrap_or_else(|| format!("{id:#x}"))
}

fn type_name(ty: type_::Reader<'_>, names: &Names) -> capnp::Result<String> {
    let plain = |brand: brand::Reader<'_>| -> capnp::Result<()> {
        assert!(brand.get_scopes()?.is_empty(), "generic types are not listed yet");
        Ok(())
    };
    Ok(match ty.which()? {
        type_::Void(()) => "Void".into(),
        type_::Bool(()) => "Bool".into(),
        type_::Int8(()) => "Int8".into(),
        type_::Int16(()) => "Int16".into(),
        type_::Int32(()) => "Int32".into(),
        type_::Int64(()) => "Int64".into(),
        type_::Uint8(()) => "UInt8".into(),
        type_::Uint16(()) => "UInt16".into(),
        type_::Uint32(()) => "UInt32".into(),
        type_::Uint64(()) => "UInt64".into(),
        type_::Float32(()) => "Float32".into(),
        type_::Float64(()) => "Float64".into(),
        type_::Text(()) => "Text".into(),
        type_::Data(()) => "Data".into(),
        type_::List(list) => format!("List({})", type_name(list.get_element_type()?, names)?),
        type_::Enum(it) => {
            plain(it.get_brand()?)?;
            known(names, it.get_type_id())
        }
        type_::Struct(it) => {
            plain(it.get_brand()?)?;
            known(names, it.get_type_id())
        }
        type_::Interface(it) => {
            plain(it.get_brand()?)?;
            known(names, it.get_type_id())
        }
        type_::AnyPointer(_) => "AnyPointer".into(),
    })
}

/// A default other than zero is XORed into the wire. We have none; one that appears is shown.
fn default(value: value::Reader<'_>) -> capnp::Result<String> {
    let number: i128 = match value.which()? {
        value::Bool(it) => i128::from(it),
        value::Int8(it) => i128::from(it),
        value::Int16(it) => i128::from(it),
        value::Int32(it) => i128::from(it),
        value::Int64(it) => i128::from(it),
        value::Uint8(it) => i128::from(it),
        value::Uint16(it) | value::Enum(it) => i128::from(it),
        value::Uint32(it) => i128::from(it),
        value::Uint64(it) => i128::from(it),
        value::Float32(it) => i128::from(it.to_bits()),
        value::Float64(it) => i128::from(it.to_bits()),
        _ => 0,
    };
    Ok(if number == 0 { String::new() } else { format!(" = {number}") })
}

fn stored() -> Vec<u8> {
    fs::read(repository().join("schema/pontoon.request")).expect("schema/pontoon.request")
}

/// What went and what came, as lines with `-` and `+`.
fn difference(old: &[String], new: &[String]) -> (Vec<String>, Vec<String>) {
    let (before, after): (BTreeSet<_>, BTreeSet<_>) = (old.iter().collect(), new.iter().collect());
    let gone = before.difference(&after).map(|line| format!("- {line}")).collect();
    let come = after.difference(&before).map(|line| format!("+ {line}")).collect();
    (gone, come)
}

#[test]
fn nothing_in_the_schemas_changes_its_place() {
    let found = listing(&stored()).expect("schema/pontoon.request is readable");
    if std::env::var_os("REWRITE").is_some() {
        fs::write(listing_path(), found.join("\n") + "\n").expect("writing the listing");
        return;
    }
    let text = fs::read_to_string(listing_path()).expect("tests/schema/ordinals.txt");
    let pinned: Vec<String> = text.lines().map(str::to_owned).collect();
    let (gone, come) = difference(&pinned, &found);
    assert!(
        gone.is_empty(),
        "what others rely on has changed or is gone; give it back its name, id, ordinal and type, and \
         append instead:\n{}\n{}",
        gone.join("\n"),
        come.join("\n")
    );
    assert!(
        come.is_empty(),
        "new in the schemas; `REWRITE=1 cargo test --test schema` adds it to the listing:\n{}",
        come.join("\n")
    );
}

/// Compiles the schemas in `dir`; `None` if the tool isn't there.
fn compile(dir: &Path) -> Option<Vec<u8>> {
    let output = Command::new("capnp").args(["compile", "-o-"]).args(FILES).current_dir(dir).output();
    let output = match output {
        Ok(output) => output,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            println!("skipped: `capnp` is not installed");
            return None;
        }
        Err(error) => panic!("running capnp: {error}"),
    };
    assert!(output.status.success(), "capnp: {}", String::from_utf8_lossy(&output.stderr));
    Some(output.stdout)
}

fn compiler_version(request: &[u8]) -> capnp::Result<(u16, u8, u8)> {
    let message = capnp::serialize::read_message(request, ReaderOptions::new())?;
    let version = message.get_root::<code_generator_request::Reader<'_>>()?.get_capnp_version()?;
    Ok((version.get_major(), version.get_minor(), version.get_micro()))
}

#[test]
fn the_stored_request_is_what_the_schemas_compile_to() {
    let Some(compiled) = compile(&repository().join("schema")) else { return };
    let stored = stored();
    let listings = |bytes| listing(bytes).expect("a readable request");
    let (gone, come) = difference(&listings(&stored), &listings(&compiled));
    let changes = [gone, come].concat().join("\n");
    assert!(changes.is_empty(), "run schema/update and commit schema/pontoon.request:\n{changes}");
    // Another version of the tool writes more or less beside that (comments, places in the source).
    let version = |bytes| compiler_version(bytes).expect("a readable request");
    if version(&compiled) == version(&stored) {
        assert!(compiled == stored, "comments changed: run schema/update, commit schema/pontoon.request");
    }
}

/// The listing notices what it is for: each edit of a schema below breaks somebody.
#[test]
fn every_breaking_edit_shows_in_the_listing() {
    let schemas = repository().join("schema");
    if compile(&schemas).is_none() {
        return;
    }
    let pinned = listing(&stored()).expect("readable");
    for (file, old, new) in [
        ("types.capnp", "@0xf1b3a9c47d20e651", "@0xf1b3a9c47d20e652"),
        ("types.capnp", "retryAfterMs @2 :UInt32", "retryAfterMs @2 :Int32"),
        ("types.capnp", "min @0 :UInt32", "least @0 :UInt32"),
        ("types.capnp", "no @0; ", "yes @0;"),
        ("types.capnp", "weight @5 :UInt32", "weight @5 :UInt32 = 100"),
        ("kv.capnp", "more @1 :Bool", "more @1 :UInt8"),
        ("kv.capnp", "since :UInt64", "since :UInt32"),
        ("kv.capnp", "absent @2 :Void;         # get", "missing @2 :Void;        # get"),
        ("admin.capnp", "shard :UInt64, node :UInt64", "node :UInt64, shard :UInt64"),
    ] {
        let dir = tempfile::tempdir().expect("a directory");
        for name in FILES {
            let mut text = fs::read_to_string(schemas.join(name)).expect(name);
            if name == file {
                assert!(text.contains(old), "{file} has no `{old}`: adapt this test");
                text = text.replacen(old, new, 1);
            }
            fs::write(dir.path().join(name), text).expect("writing a schema");
        }
        let compiled = compile(dir.path()).expect("capnp was there");
        let (gone, _) = difference(&pinned, &listing(&compiled).expect("readable"));
        assert!(!gone.is_empty(), "`{old}` → `{new}` goes unnoticed");
    }
}
