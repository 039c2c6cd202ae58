//! Keys and values through the command line: every byte as it was given, every limit told.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;

use serde_json::json;

use crate::harness::Home;

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;

/// Every byte there is, and line ends where tools like to add or remove them.
fn all_bytes() -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..=255).collect();
    bytes.extend_from_slice(b"\r\n\xff\xfe\0\n\n");
    bytes
}

#[test]
fn values_are_bytes() {
    let home = Home::with_cluster("db", 1, 2);
    let bytes = all_bytes();
    let file = home.file("value");
    fs::write(&file, &bytes).unwrap();
    home.run(&["set", "db", "from-file", "--file", file.to_str().unwrap()]).ok();
    assert_eq!(home.run(&["get", "db", "from-file"]).ok().stdout, bytes);
    home.run_with(&["set", "db", "from-stdin", "--stdin"], &bytes).ok();
    assert_eq!(home.run(&["get", "db", "from-stdin"]).ok().stdout, bytes);
    // Arguments may be any bytes but 0.
    let argument: Vec<u8> = (1..=255).collect();
    let key = OsStr::from_bytes(b"key\xff\x80\n");
    home.run(&["set".as_ref(), "db".as_ref(), key, OsStr::from_bytes(&argument)]).ok();
    assert_eq!(home.run(&["get".as_ref(), "db".as_ref(), key]).ok().stdout, argument);
    // The empty value is a value.
    home.run(&["set", "db", "empty", ""]).ok();
    assert_eq!(home.run(&["get", "db", "empty"]).ok().stdout, b"");
    home.run_with(&["set", "db", "empty", "--stdin"], b"").ok();
    home.run(&["cas", "db", "empty", "--expect", "", "full"]).ok();
    assert_eq!(home.run(&["get", "db", "empty"]).ok().stdout, b"full");
    // cas from a file and from stdin.
    home.run(&["cas", "db", "c", "--absent", "--file", file.to_str().unwrap()]).ok();
    home.run_with(&["cas", "db", "c2", "--absent", "--stdin"], &bytes).ok();
    assert_eq!(home.run(&["get", "db", "c2"]).ok().stdout, bytes);
    let missing = home.file("missing");
    home.run(&["set", "db", "k", "--file", missing.to_str().unwrap()]).exits(2).says(&["missing"]);
    home.run(&["stop"]).ok();
}

#[test]
fn json_of_get_cas_and_delete() {
    let home = Home::with_cluster("db", 1, 1);
    let set = home.run(&["set", "db", "bob", "hello", "--json"]).ok().json();
    let version = set["version"].as_u64().expect("a version");
    let got = home.run(&["get", "db", "bob", "--json"]).ok();
    assert_eq!(
        got.text(),
        format!(
            "{{\"key\":\"bob\",\"value\":\"hello\",\"encoding\":\"utf8\",\"version\":{version},\"found\":true}}\n"
        )
    );
    let absent = home.run(&["get", "db", "eve", "--json"]).exits(1).json();
    let expected = json!({"key": "eve", "value": null, "encoding": "utf8", "version": null, "found": false});
    assert_eq!(absent, expected);
    home.run_with(&["set", "db", "bin", "--stdin"], b"\xff\0").ok();
    let got = home.run(&["get", "db", "bin", "--json"]).ok().json();
    assert_eq!(
        (&got["key"], &got["value"], &got["encoding"]),
        (&json!("Ymlu"), &json!("/wA="), &json!("base64"))
    );

    home.run(&["cas", "db", "bob", "--version", &version.to_string(), "bye"]).ok();
    let there =
        home.run(&["cas", "db", "bob", "--version", &version.to_string(), "no", "--json"]).exits(1).json();
    assert_eq!((&there["value"], &there["found"]), (&json!("bye"), &json!(true)));
    let newer = there["version"].as_u64().unwrap();
    assert!(newer > version, "versions grow: {version}, {newer}");
    let deleted = home.run(&["delete", "db", "bob", "--json"]).ok().json();
    assert_eq!(deleted["found"], true);
    let again = home.run(&["delete", "db", "bob", "--json"]).exits(1).json();
    assert_eq!(again["found"], false);
    // A key made anew never has a version it had before.
    let anew = home.run(&["set", "db", "bob", "again", "--json"]).ok().json();
    assert!(anew["version"].as_u64().unwrap() > newer, "{anew}");
    home.run(&["stop"]).ok();
}

#[test]
fn keys_and_values_may_look_like_options() {
    let home = Home::with_cluster("db", 1, 2);
    for (key, value) in [("-k", "-v"), ("-1", "-2"), ("--key", "--value"), ("-", "-"), ("-get", "-set")] {
        home.run(&["set", "db", key, value]).ok();
        assert_eq!(home.run(&["get", "db", key]).ok().text(), value, "{key}");
        home.run(&["cas", "db", key, "--expect", value, "-new"]).ok();
        assert_eq!(home.run(&["get", "db", key]).ok().text(), "-new", "{key}");
        home.run(&["route", "db", key]).ok();
        home.run(&["delete", "db", key]).ok();
        home.run(&["get", "db", key]).exits(1);
    }
    // After `--` nothing is an option.
    for (key, value) in [("--json", "-h"), ("--help", "--stdin"), ("--", "--"), ("-h", "--version")] {
        home.run(&["set", "db", "--", key, value]).ok();
        let got = home.run(&["get", "db", "--", key]).ok();
        assert_eq!(got.text(), value, "{key}");
        home.run(&["cas", "--expect", value, "db", "--", key, "--data"]).ok();
        home.run(&["mset", "db", "--", key, "--file"]).ok();
        let got = home.run(&["mget", "db", "--", key]).ok();
        assert_eq!(got.text(), format!("{key}\t--file\n"));
        home.run(&["delete", "db", "--", key]).ok();
    }
    home.run(&["mset", "db", "--", "-a", "-1", "-b", "-2"]).ok();
    assert_eq!(home.run(&["mget", "db", "--", "-b", "-a"]).ok().text(), "-b\t-2\n-a\t-1\n");
    home.run(&["stop"]).ok();
}

#[test]
fn many_keys_at_once() {
    let home = Home::with_cluster("db", 3, 4);
    let mut args = vec!["mset".to_owned(), "db".to_owned()];
    for i in 0..200 {
        args.extend([format!("key{i}"), format!("value{i}")]);
    }
    home.run(&args).ok();
    let mut args = vec!["mget".to_owned(), "db".to_owned()];
    args.extend((0..200).map(|i| format!("key{i}")));
    let got = home.run(&args).ok().text();
    for (i, line) in got.lines().enumerate() {
        assert_eq!(line, format!("key{i}\tvalue{i}"), "in the order asked for");
    }
    assert_eq!(got.lines().count(), 200);
    // What is there is printed, what isn't is told, and the exit code says so.
    let some = home.run(&["mget", "db", "key1", "nobody", "key2"]).exits(1).says(&["nobody"]);
    assert_eq!(some.text(), "key1\tvalue1\nkey2\tvalue2\n");
    let some = home.run(&["mget", "--json", "db", "key1", "nobody"]).exits(1).json();
    assert_eq!(some["items"][0]["value"], "value1");
    assert_eq!(some["items"][1]["found"], false);
    let set = home.run(&["mset", "--json", "db", "x", "1", "y", "2"]).ok().json();
    assert_eq!(
        crate::harness::keys(&set["items"][0]),
        ["key", "encoding", "version", "written"],
        "as `set`'s"
    );
    home.run(&["mset", "db", "a", "1", "b"]).exits(2);
    home.run(&["mset", "db", "a", "1", "a", "2"]).exits(2);
    home.run(&["get", "db", "a"]).exits(1);
    home.run(&["stop"]).ok();
}

#[test]
fn scan_sees_all_shards() {
    let home = Home::with_cluster("db", 1, 8);
    let pairs: BTreeMap<String, String> =
        (0..300).map(|i| (format!("user:{i:03}"), format!("v{i}"))).collect();
    let lines: String = pairs.iter().map(|(k, v)| format!("{}\n", json!({"key": k, "value": v}))).collect();
    home.run_with(&["import", "db"], lines.as_bytes()).ok();
    home.run(&["mset", "db", "other", "1", "tab\tkey", "line\nvalue"]).ok();

    let all = home.run(&["scan", "db", "--prefix", "user:"]).ok().text();
    let found: BTreeMap<String, String> = all
        .lines()
        .map(|line| line.split_once('\t').expect("KEY, tab, VALUE"))
        .map(|(k, v)| (k.to_owned(), v.to_owned()))
        .collect();
    assert_eq!(found, pairs);
    assert_eq!(all.lines().count(), 300, "each once");
    let shards: BTreeSet<String> = ["user:001", "user:002", "user:003", "user:004", "user:005", "user:006"]
        .iter()
        .map(|key| home.run(&["route", "db", key, "--json"]).ok().json()["shard"].to_string())
        .collect();
    assert!(shards.len() > 1, "they are in several shards: {shards:?}");

    let keys = home.run(&["scan", "db", "--keys-only"]).ok().text();
    assert_eq!(keys.lines().count(), 302);
    assert!(keys.lines().any(|line| line == "tab\\tkey"), "a key is one line");
    assert!(!keys.contains('\t'), "no values");
    for limit in [0, 1, 7, 299, 300, 1000] {
        let some = home.run(&["scan", "db", "--prefix", "user:", "--limit", &limit.to_string()]).ok();
        assert_eq!(some.text().lines().count(), limit.min(300), "limit {limit}");
    }
    let object = home.run(&["scan", "db", "--prefix", "user:00", "--json"]).ok().json();
    assert_eq!(object["count"], 10);
    assert_eq!(object["pairs"].as_array().unwrap().len(), 10);
    let none = home.run(&["scan", "db", "--prefix", "nothing", "--json"]).ok().json();
    assert_eq!(none, json!({"pairs": [], "count": 0}));
    assert_eq!(home.run(&["scan", "db", "--prefix", "nothing"]).ok().text(), "");
    home.run(&["scan", "nodb"]).exits(1).says(&["no database `nodb`"]);
    home.run(&["stop"]).ok();
}

#[test]
fn export_and_import_carry_everything() {
    let home = Home::with_cluster("db", 1, 4);
    home.run(&["db", "create", "copy", "1", "3"]).ok();
    let lines: String = (0..2500)
        .map(|i| format!("{}\n", json!({"key": format!("k{i}"), "value": "x".repeat(i % 97)})))
        .collect();
    let input = home.file("in.jsonl");
    fs::write(&input, &lines).unwrap();
    let done = home.run(&["import", "db", input.to_str().unwrap()]).ok();
    assert!(done.text().contains("imported 2500, failed 0"), "{}", done.text());
    home.run_with(&["set", "db", "bytes", "--stdin"], &all_bytes()).ok();
    let binary = OsStr::from_bytes(b"\xff\xfe");
    home.run(&["set".as_ref(), "db".as_ref(), binary, "text".as_ref()]).ok();

    let exported = home.run(&["export", "db"]).ok().stdout;
    assert_eq!(exported.iter().filter(|b| **b == b'\n').count(), 2502);
    home.run_with(&["import", "copy"], &exported).ok();
    assert_eq!(home.run(&["get", "copy", "bytes"]).ok().stdout, all_bytes());
    assert_eq!(home.run(&["get".as_ref(), "copy".as_ref(), binary]).ok().stdout, b"text");
    let output = home.file("out.jsonl");
    home.run(&["export", "copy", "--output", output.to_str().unwrap()]).ok();
    let pairs = |bytes: &[u8]| -> BTreeSet<(String, String)> {
        String::from_utf8(bytes.to_vec())
            .unwrap()
            .lines()
            .map(|line| serde_json::from_str::<serde_json::Value>(line).expect("JSON lines"))
            .map(|o| (o["key"].as_str().unwrap().to_owned(), o["value"].as_str().unwrap().to_owned()))
            .collect()
    };
    assert_eq!(pairs(&exported), pairs(&fs::read(&output).unwrap()));
    let some = home.run(&["export", "db", "--prefix", "k24"]).ok();
    assert_eq!(some.text().lines().count(), 111);

    // Of the same key the last line wins; a bad line is told by its number, the others go in.
    let mixed = "{\"key\":\"twice\",\"value\":\"1\"}\nnonsense\n\n{\"key\":\"twice\",\"value\":\"2\"}\n";
    let ended = home.run_with(&["import", "copy", "-"], mixed.as_bytes()).exits(2).says(&["line 2"]);
    assert!(ended.text().contains("imported 2, failed 1"), "{}", ended.text());
    assert_eq!(home.run(&["get", "copy", "twice"]).ok().text(), "2");
    // Nothing of an export that fails.
    let bad = home.file("bad.jsonl");
    home.run(&["export", "nodb", "--output", bad.to_str().unwrap()]).exits(1);
    assert!(!bad.exists() && !home.file("bad.jsonl.part").exists());
    // Told once, not for each line.
    let told = home.run_with(&["import", "nodb"], lines.as_bytes()).exits(1).says(&["no database `nodb`"]);
    assert_eq!((told.errors().lines().count(), told.text()), (1, String::new()), "{}", told.errors());
    let told = home.run_with(&["import", "nodb", "--json"], lines.as_bytes()).exits(1).json_error();
    assert_eq!(told["code"], "unknown_database");
    home.run(&["stop"]).ok();
}

#[test]
fn the_greatest_value_goes_through_and_a_greater_one_is_refused() {
    let home = Home::with_cluster("db", 3, 2);
    let greatest: Vec<u8> = (0..8 * MIB).map(|i| (i * 31 % 251) as u8).collect();
    home.run_with(&["set", "db", "big", "--stdin"], &greatest).ok();
    assert!(home.run(&["get", "db", "big"]).ok().stdout == greatest, "8 MiB come back as they were");
    assert!(home.run(&["scan", "db", "--json"]).ok().json()["pairs"][0]["value"].is_string());

    let mut greater = greatest.clone();
    greater.push(0);
    let limit = (8 * MIB).to_string();
    home.run_with(&["set", "db", "big", "--stdin"], &greater).exits(2).says(&[&limit]);
    let file = home.file("greater");
    fs::write(&file, &greater).unwrap();
    home.run(&["set", "db", "big", "--file", file.to_str().unwrap()]).exits(2).says(&["greater", &limit]);
    let error = home
        .run(&["cas", "db", "new", "--absent", "--file", file.to_str().unwrap(), "--json"])
        .exits(2)
        .json_error();
    assert_eq!((&error["code"], &error["outcome"]), (&json!("invalid"), &json!("not_applied")));
    home.run(&["get", "db", "new"]).exits(1);
    assert!(home.run(&["get", "db", "big"]).ok().stdout == greatest, "it is still what it was");
    home.run(&["stop"]).ok();
}

#[test]
fn keys_have_limits() {
    let home = Home::with_cluster("db", 1, 2);
    let longest = "k".repeat(4 * KIB);
    home.run(&["set", "db", &longest, "v"]).ok();
    assert_eq!(home.run(&["get", "db", &longest]).ok().text(), "v");
    let longer = "k".repeat(4 * KIB + 1);
    for command in [&["set", "db", &longer, "v"][..], &["get", "db", &longer], &["delete", "db", &longer]] {
        home.run(command).exits(2).says(&["4097", "4096"]);
    }
    for command in [
        &["set", "db", "", "v"][..],
        &["get", "db", ""],
        &["delete", "db", ""],
        &["cas", "db", "", "--absent", "v"],
        &["mset", "db", "", "v"],
        &["mget", "db", ""],
        &["route", "db", ""],
    ] {
        home.run(command).exits(2).says(&["key is empty"]);
    }
    let error = home.run(&["set", "db", "", "v", "--json"]).exits(2).json_error();
    assert_eq!(error["code"], "invalid");
    home.run(&["stop"]).ok();
}

#[test]
fn a_change_that_is_made_and_cannot_be_told_is_not_called_undone() {
    let home = Home::with_cluster("db", 1, 1);
    let full = || fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    for command in [
        &["set", "db", "k", "v"][..],
        &["cas", "db", "k", "--expect", "v", "w"],
        &["delete", "db", "k"],
        &["mset", "db", "k", "x"],
        &["db", "create", "two", "1", "1"],
        &["db", "drop", "two", "--yes"],
    ] {
        let mut untold = home.command(&[&["--json"], command].concat());
        let output = untold.stdout(full()).output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(4), "{command:?}: {text}");
        assert!(text.contains("it was done") && text.contains(r#""outcome":"unknown""#), "{text}");
    }
    assert_eq!(home.run(&["get", "db", "k"]).ok().text(), "x");
    assert_eq!(home.run(&["db", "list", "--json"]).ok().json()["databases"].as_array().unwrap().len(), 1);
    // A read has no effect.
    let output = home.command(&["get", "db", "k"]).stdout(full()).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    home.run(&["stop"]).ok();
}

#[test]
fn an_unknown_database_comes_with_the_way_out() {
    let home = Home::with_cluster("db", 1, 1);
    for command in [
        &["set", "nodb", "k", "v"][..],
        &["get", "nodb", "k"],
        &["delete", "nodb", "k"],
        &["cas", "nodb", "k", "--absent", "v"],
        &["mset", "nodb", "k", "v"],
        &["mget", "nodb", "k"],
        &["scan", "nodb"],
        &["export", "nodb"],
        &["route", "nodb", "k"],
        &["status", "nodb"],
    ] {
        let ended = home.run(command).exits(1).says(&["no database `nodb`", "pontoon db create"]);
        assert!(ended.took.as_secs() < 5, "{command:?}: no waiting for what won't come: {:?}", ended.took);
        let error = home.run(&[command, &["--json"]].concat()).exits(1).json_error();
        assert_eq!(error["code"], "unknown_database", "{command:?}");
        assert_eq!((&error["retryable"], &error["outcome"]), (&json!(false), &json!("not_applied")));
    }
    // A benchmark says so too, instead of counting errors for its ten seconds.
    let ended = home.run(&["bench", "nodb"]).exits(1).says(&["no database `nodb`"]);
    assert!(ended.took.as_secs() < 5, "{:?}", ended.took);
    // Names that no database has.
    home.run(&["get", "no such name", "k"]).exits(1);
    home.run(&["stop"]).ok();
}
