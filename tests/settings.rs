//! Settings as an operator meets them: what wrong ones are told, what overrides what, and that the
//! shipped files are right.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use pontoon::settings::{DEFAULT_TOML, LogFormat, Settings};
use proptest::prelude::*;

/// The least that loads.
const LEAST: &str = r#"[node]
id = "n1"
data_dir = "/tmp/n1"
[cluster]
initial = ["127.0.0.1:7201"]
"#;

fn load(text: &str, environment: &[(&str, &str)]) -> Result<Settings, String> {
    let environment = environment.iter().map(|(name, value)| (name.to_string(), value.to_string()));
    Settings::load_str("f.toml", text, environment).map_err(|errors| errors.to_string())
}

/// LEAST with one more section, or another value of a key in it.
fn least_with(more: &str) -> String {
    format!("{LEAST}{more}")
}

#[track_caller]
fn wrong(text: &str, environment: &[(&str, &str)], expected: &[&str]) {
    let errors = load(text, environment).expect_err("must be refused");
    let errors: Vec<&str> = errors.lines().collect();
    assert_eq!(errors, expected);
}

#[test]
fn the_least_loads_with_the_defaults() {
    let settings = load(LEAST, &[]).unwrap();
    assert_eq!(settings.node.id, "n1");
    assert_eq!(settings.node.data_dir, Path::new("/tmp/n1"));
    assert_eq!(settings.node.weight, 100);
    assert_eq!(settings.client.listen.to_string(), "127.0.0.1:7101");
    assert_eq!(settings.client.advertise, "127.0.0.1:7101");
    assert_eq!(settings.peer.advertise, "127.0.0.1:7201");
    assert_eq!(settings.http_listen, None);
    assert_eq!(settings.log.level, "info");
    assert_eq!(settings.log.format, LogFormat::Text);
    assert_eq!(settings.storage.cache_bytes, 32 << 20);
    assert_eq!(settings.storage.memtable_bytes, 32 << 20);
    assert_eq!(settings.storage.log_file_bytes, 32 << 20);
    assert_eq!(settings.storage.log_bytes, 256 << 20);
    assert_eq!(settings.storage.log_spare_files, 2);
}

#[test]
fn an_empty_file_lacks_what_has_no_default() {
    let expected = [
        "f.toml: node.id: is not set; give the node a label of its own, as \"n1\"",
        "f.toml: node.data_dir: is not set; name the directory for this node's data",
        "f.toml: cluster.initial: neither cluster.initial nor cluster.join is set; list the peer \
         addresses of all first nodes in cluster.initial to form a cluster, or those of some \
         members in cluster.join to enter one",
    ];
    wrong("", &[], &expected);
    // The reference itself sets those three to nothing, so it says so line by line.
    let errors = load(DEFAULT_TOML, &[]).unwrap_err();
    assert_eq!(errors.lines().count(), 3, "{errors}");
    assert!(errors.contains(": node.id: is empty; "), "{errors}");
}

#[test]
fn all_errors_are_told_at_once_with_their_lines() {
    let text = r#"[node]
id = 7
wieght = 5
weight = 0
data_dir = ""

[client]
listen = "localhost:7101"

[peer]
listen = "0.0.0.0:7201"

[clutser]
name = "x"
initial = []

[storage]
cache_bytes = "64MB"
"#;
    wrong(
        text,
        &[
            ("PONTOON__LOG__LEVEL", "inof"),
            ("PONTOON__NODE__ZON", "a"),
            ("PONTOON_CLUSTER", "not ours"),
            ("HOME", "/root"),
        ],
        &[
            "f.toml:2: node.id: must be a string in quotes, not the number 7",
            "f.toml:3: node.wieght: unknown key; did you mean node.weight?",
            "f.toml:4: node.weight: 0 is out of range, 1 to 10000",
            "f.toml:5: node.data_dir: is empty; name the directory for this node's data",
            "f.toml:8: client.listen: \"localhost:7101\" is not IP:PORT; write an address of this \
             machine as \"127.0.0.1:7101\", or \"0.0.0.0:7101\" for all of them",
            "f.toml:13: clutser: unknown section; did you mean cluster?",
            "f.toml:18: storage.cache_bytes: \"64MB\" is not a size; write bytes as 67108864, or \
             with a unit of KiB, MiB or GiB as \"64MiB\"",
            "f.toml: peer.advertise: is not set, and peer.listen is 0.0.0.0:7201, which nobody can \
             dial; set the HOST:PORT at which others reach this node",
            "environment PONTOON__LOG__LEVEL: log.level: \"inof\" is not a level; write error, \
             warn, info, debug, trace or off, or directives as \"info,pontoon::group=debug\"",
            "environment PONTOON__NODE__ZON: node.zon: unknown key; did you mean PONTOON__NODE__ZONE?",
        ],
    );
}

#[test]
fn each_mistake_has_its_message() {
    let table: &[(&str, &[&str])] = &[
        ("[node", &["f.toml:6: unclosed table, expected `]`"]),
        ("[log]\nlevel = \"a\nformat = \"text\"", &["f.toml:7: invalid basic string, expected `\"`"]),
        ("[log]\nlevel = \"info\"\nlevel = \"debug\"", &["f.toml:8: duplicate key"]),
        (
            "[http]\nlisten = \"127.0.0.1:7101\"",
            &["f.toml:7: http.listen: 127.0.0.1:7101 is taken by client.listen (127.0.0.1:7101)"],
        ),
        (
            "[http]\nlisten = \"0.0.0.0:7201\"",
            &["f.toml:7: http.listen: 0.0.0.0:7201 is taken by peer.listen (127.0.0.1:7201)"],
        ),
        (
            "[client]\nadvertise = \"0.0.0.0:7101\"",
            &["f.toml:7: client.advertise: \"0.0.0.0:7101\" can't be dialled from elsewhere; write \
             the address at which others reach the node"],
        ),
        (
            "[client]\nadvertise = \"host\"",
            &["f.toml:7: client.advertise: \"host\" is not HOST:PORT, as \"node1.example:7201\" or \
             \"[::1]:7201\""],
        ),
        (
            "[client]\nadvertise = \"host:0\"",
            &["f.toml:7: client.advertise: \"host:0\" has no port that can be dialled"],
        ),
        (
            "[peer]\nadvertise = \"other:7201\"",
            &["f.toml:5: cluster.initial: does not list this node's own peer.advertise \
             \"other:7201\"; add it, or leave cluster.initial empty and name members in \
             cluster.join"],
        ),
        (
            "[peer]\nlisten = \"127.0.0.2:7201\"\nadvertise = \"127.0.0.1:7101\"",
            &[
                "f.toml:5: cluster.initial: does not list this node's own peer.advertise \
             \"127.0.0.1:7101\"; add it, or leave cluster.initial empty and name members in \
             cluster.join",
                "f.toml:8: peer.advertise: \"127.0.0.1:7101\" is also client.advertise",
            ],
        ),
        (
            "join = [\"a:1\",\n  \"b\",\n  \"A:1\", 5, \"c:0\"]",
            &["f.toml:8: cluster.join: must hold strings in quotes, not the number 5"],
        ),
        (
            "join = [\"a:1\",\n  \"b\",\n  \"A:1\",\n \"c:0\"]",
            &[
                "f.toml:7: cluster.join: \"b\" is not HOST:PORT, as \"node1.example:7201\" or \
             \"[::1]:7201\"",
                "f.toml:8: cluster.join: \"A:1\" is listed twice",
                "f.toml:9: cluster.join: \"c:0\" has no port that can be dialled",
            ],
        ),
        ("join = \"a:1\"", &["f.toml:6: cluster.join: must be an array of strings, not \"a:1\""]),
        ("name = \"\"", &["f.toml:6: cluster.name: must not be empty"]),
        ("name = \"a b\"", &["f.toml:6: cluster.name: \"a b\" has spaces or control characters"]),
        (
            "[storage]\ncache_bytes = 1.5",
            &["f.toml:7: storage.cache_bytes: must be a whole number of bytes or a string as \
             \"64MiB\", not the number 1.5"],
        ),
        (
            "[storage]\ncache_bytes = -5",
            &["f.toml:7: storage.cache_bytes: a negative number is out of range, 1MiB to 64GiB"],
        ),
        (
            "[storage]\nmemtable_bytes = 1024",
            &["f.toml:7: storage.memtable_bytes: 1KiB is out of range, 16MiB to 64GiB"],
        ),
        (
            "[storage]\nlog_bytes = \"64MiB\"",
            &["f.toml:7: storage.log_bytes: must be at least 4 times storage.log_file_bytes \
             (32MiB), that is 128MiB"],
        ),
        (
            "[storage]\nlog_spare_files = 9",
            &["f.toml:7: storage.log_spare_files: 9 files of 32MiB are more than storage.log_bytes \
             (256MiB) has room for; at most 8"],
        ),
        (
            "[storage]\nlog_spare_files = \"2\"",
            &["f.toml:7: storage.log_spare_files: must be a whole number, not \"2\""],
        ),
        ("[log]\nformat = \"xml\"", &["f.toml:7: log.format: \"xml\" is neither \"text\" nor \"json\""]),
        (
            "[log]\nlevel = \"info,debug\"",
            &["f.toml:7: log.level: \"info,debug\" has two levels without a target"],
        ),
        ("[log.level]\nx = 1", &["f.toml:6: log.level: must be a string in quotes, not a section"]),
        ("[[http]]\nlisten = \"\"", &["f.toml:6: http: is a section; write [http]"]),
        ("[tls]\ncertificate = \"x\"\nkey = \"y\"", &["f.toml:6: tls: unknown section"]),
        (
            "[http]\n\"li sten\" = \"\"\ntls.on = true",
            &["f.toml:7: http.\"li sten\": unknown key", "f.toml:8: http.tls: unknown section"],
        ),
    ];
    for (more, expected) in table {
        wrong(&least_with(more), &[], expected);
    }
    // Keys that stand before any section.
    wrong(
        &format!("data_dir = \"x\"\n\"node.id\" = \"x\"\nhttp = 5\n{LEAST}"),
        &[],
        &[
            "f.toml:1: data_dir: unknown key; did you mean node.data_dir?",
            "f.toml:2: \"node.id\": unknown key; did you mean node.id?",
            "f.toml:3: http: is a section; write [http]",
        ],
    );
    // Not a place in a list of so many: that would take more memory than there is.
    wrong(
        &format!("'node.data_dir[355555555555550]' = 1\n{LEAST}join = 5\n"),
        &[],
        &[
            "f.toml:1: \"node.data_dir[355555555555550]\": unknown key",
            "f.toml:7: cluster.join: must be an array of strings, not the number 5",
        ],
    );
}

#[test]
fn other_ways_to_write_the_same() {
    let plain = load(&least_with("[log]\nlevel = \"debug\"\nformat = \"json\"\n"), &[]).unwrap();
    for text in [
        "log = { level = \"debug\", format = \"json\" }\n".to_owned() + LEAST,
        "log.level = \"debug\"\nlog.format = 'json'\n".to_owned() + LEAST,
        least_with("[log]\r\nlevel = \"debug\"\r\nformat = \"json\"\r\n"),
    ] {
        assert_eq!(load(&text, &[]).unwrap(), plain, "{text}");
    }
    wrong(
        &("log = { level = \"debug\",\n  fromat = \"json\" }\n".to_owned() + LEAST),
        &[],
        &["f.toml:2: log.fromat: unknown key; did you mean log.format?"],
    );
}

#[test]
fn the_environment_overrides_the_file_and_the_file_the_defaults() {
    let file = least_with("[storage]\ncache_bytes = \"48MiB\"\nmemtable_bytes = \"128MiB\"\n");
    let settings = load(
        &file,
        &[
            ("PONTOON__NODE__ID", "007"),
            ("PONTOON__NODE__WEIGHT", "250"),
            ("PONTOON__STORAGE__CACHE_BYTES", "16MiB"),
            ("PONTOON__STORAGE__LOG_SPARE_FILES", "0"),
            ("PONTOON__CLUSTER__INITIAL", "127.0.0.1:7201, other:7201"),
            ("PONTOON__HTTP__LISTEN", "127.0.0.1:7301"),
        ],
    )
    .unwrap();
    assert_eq!(settings.node.id, "007", "text stays text");
    assert_eq!(settings.node.weight, 250);
    assert_eq!(settings.storage.cache_bytes, 16 << 20, "environment over file");
    assert_eq!(settings.storage.memtable_bytes, 128 << 20, "file over default");
    assert_eq!(settings.storage.log_bytes, 256 << 20, "default");
    assert_eq!(settings.storage.log_spare_files, 0);
    assert_eq!(settings.cluster.initial, ["127.0.0.1:7201", "other:7201"]);
    assert_eq!(settings.http_listen, Some("127.0.0.1:7301".parse().unwrap()));
    // An empty value sets a key to nothing, it doesn't fall back.
    let joined = [("PONTOON__CLUSTER__INITIAL", ""), ("PONTOON__CLUSTER__JOIN", "a:1,b:1")];
    let settings = load(LEAST, &joined).unwrap();
    assert!(settings.cluster.initial.is_empty());
    assert_eq!(settings.cluster.join, ["a:1", "b:1"]);
    // A wrong value in the file doesn't matter where the environment overrides it.
    let file = least_with("[log]\nformat = 5\n");
    assert!(load(&file, &[("PONTOON__LOG__FORMAT", "json")]).is_ok());
}

#[test]
fn wrong_variables_are_told_by_name() {
    wrong(
        LEAST,
        &[
            ("PONTOON__NODE__WEIGHT", "heavy"),
            ("PONTOON__NODE__DATA_THREADS", "-1"),
            ("PONTOON__CLUSTER__JOIN", "a:1,b"),
            ("PONTOON__node__id", "n2"),
            ("PONTOON__", "x"),
        ],
        &[
            "environment PONTOON__: unknown key",
            "environment PONTOON__CLUSTER__JOIN: cluster.join: \"b\" is not HOST:PORT, as \
             \"node1.example:7201\" or \"[::1]:7201\"",
            "environment PONTOON__NODE__DATA_THREADS: node.data_threads: \"-1\" is not a whole number",
            "environment PONTOON__NODE__WEIGHT: node.weight: \"heavy\" is not a whole number",
            "environment PONTOON__node__id: node.id: unknown key; did you mean PONTOON__NODE__ID?",
        ],
    );
}

#[test]
fn addresses_are_brought_to_one_form() {
    let text = least_with(
        "join = [\"Other.Example:7201\"]\n[peer]\nlisten = \"[::]:7201\"\nadvertise = \"NODE-1:7201\"\n",
    )
    .replace("127.0.0.1:7201", "node-1:7201");
    let settings = load(&text, &[]).unwrap();
    assert_eq!(settings.peer.advertise, "node-1:7201");
    assert_eq!(settings.cluster.join, ["other.example:7201"]);
}

#[test]
fn a_port_left_to_the_system_is_advertised_once_it_is_known() {
    let text = least_with("[client]\nlisten = \"127.0.0.1:0\"\n[http]\nlisten = \"127.0.0.1:0\"\n");
    let mut settings = load(&text, &[]).unwrap();
    assert_eq!(settings.client.advertise, "127.0.0.1:0");
    assert_eq!(load(&settings.to_toml(), &[]).unwrap(), settings);
    settings.client.bound("127.0.0.1:4711".parse().unwrap());
    assert_eq!(settings.client.advertise, "127.0.0.1:4711");
    settings.peer.bound("127.0.0.1:7201".parse().unwrap());
    assert_eq!(settings.peer.advertise, "127.0.0.1:7201");
}

fn shipped(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("config").join(path)
}

#[test]
fn the_shipped_cluster_of_three_loads() {
    let mut initial = BTreeSet::new();
    for n in 1..=3u16 {
        let settings = Settings::load(&shipped(&format!("cluster-3/n{n}.toml"))).unwrap();
        assert_eq!(settings.node.id, format!("n{n}"));
        assert_eq!(settings.node.data_dir, PathBuf::from(format!("./data/n{n}")));
        assert_eq!(settings.client.listen.port(), 7100 + n);
        assert_eq!(settings.peer.listen.port(), 7200 + n);
        assert_eq!(settings.http_listen.unwrap().port(), 7300 + n);
        assert_eq!(settings.cluster.initial.len(), 3);
        initial.insert(settings.cluster.initial);
    }
    assert_eq!(initial.len(), 1, "the same list, in the same order, in each");
}

/// `section.name` of each key that a text sets, with the line before it.
fn keys_of(text: &str) -> Vec<(String, String)> {
    let mut section = String::new();
    let mut before = String::new();
    let mut keys = Vec::new();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('[') {
            section = name.trim_end_matches(']').to_owned();
        } else if let Some((name, _)) = line.split_once(" = ")
            && !line.starts_with('#')
        {
            keys.push((format!("{section}.{name}"), before));
        }
        before = line.to_owned();
    }
    keys
}

#[test]
fn the_reference_documents_exactly_the_keys_that_exist() {
    let documented = keys_of(DEFAULT_TOML);
    for (key, before) in &documented {
        assert!(before.starts_with("# "), "{key} has no comment");
    }
    let documented: Vec<String> = documented.into_iter().map(|(key, _)| key).collect();
    // What exists: what is accepted, and what is in effect; both in the reference's order.
    let known: Vec<&str> = Settings::keys().collect();
    assert_eq!(documented, known);
    let effective = keys_of(&load(LEAST, &[]).unwrap().to_toml());
    let effective: Vec<String> = effective.into_iter().map(|(key, _)| key).collect();
    assert_eq!(effective, known);
}

#[test]
fn the_defaults_are_those_of_the_reference() {
    // Stated twice over, so that a default can't be changed in passing.
    for (key, value) in [
        ("zone", "\"\""),
        ("weight", "100"),
        ("data_threads", "0"),
        ("cache_bytes", "\"32MiB\""),
        ("memtable_bytes", "\"32MiB\""),
        ("log_file_bytes", "\"32MiB\""),
        ("log_bytes", "\"256MiB\""),
        ("log_keep_bytes", "\"8MiB\""),
        ("log_spare_files", "2"),
        ("reserve_bytes", "\"256MiB\""),
        ("bytes_per_second", "\"64MiB\""),
        ("level", "\"info\""),
    ] {
        assert!(DEFAULT_TOML.contains(&format!("\n{key} = {value}\n")), "{key}");
    }
}

#[test]
fn files_that_cant_be_read_are_told() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("n1.toml");
    let errors = Settings::load(&path).unwrap_err().to_string();
    let expected = format!("{}: can't be read: No such file", path.display());
    assert!(errors.starts_with(&expected), "{errors}");
    std::fs::write(&path, b"[node]\nid = \"\xff\"\n").unwrap();
    let errors = Settings::load(&path).unwrap_err();
    assert_eq!(errors.to_string(), format!("{}: is not UTF-8 text", path.display()));
    assert_eq!(errors.iter().count(), 1);
    std::fs::write(&path, LEAST).unwrap();
    assert_eq!(Settings::load(&path).unwrap(), load(LEAST, &[]).unwrap());
}

#[test]
fn settings_for_a_local_node_are_valid() {
    let settings = Settings::for_local_node(
        "/tmp/with \"quotes\" and \\".into(),
        "n2",
        "127.0.0.1:5001".parse().unwrap(),
        "127.0.0.1:5002".parse().unwrap(),
        vec!["127.0.0.1:4002".into(), "127.0.0.1:5002".into()],
    );
    assert_eq!(load(&settings.to_toml(), &[]).unwrap(), settings);
    assert_eq!(settings.client.advertise, "127.0.0.1:5001");
    assert_eq!(settings.storage.log_spare_files, 0);
}

fn settings() -> impl Strategy<Value = Settings> {
    let label = "[a-zA-Z0-9_.\"'\\\\é-]{1,20}";
    let node = (label, "[^\0]*[^\0 \\s]", label, 1u32..=10_000, 0usize..=256);
    let ports = (1024u16..20_000, 20_000u16..30_000, prop::option::of(30_000u16..40_000));
    let hosts = (
        prop_oneof![Just("127.0.0.1"), Just("[::1]"), Just("0.0.0.0")],
        "[a-z][a-z0-9]{0,9}(\\.[a-z]{1,5})?",
    );
    let cluster = (label, prop::collection::btree_set("[a-z]{1,8}:[1-9][0-9]{0,3}", 0..5));
    let log = (prop_oneof![Just("info"), Just("warn,pontoon::group=debug"), Just("off")], any::<bool>());
    let storage =
        ((1u64 << 20)..(64 << 30), (16u64 << 20)..(64 << 30), (1u64 << 20)..(1 << 30), 4u64..100, 0usize..=4);
    (node, ports, hosts, cluster, log, storage).prop_map(
        |(node, (client, peer, http), (ip, host), (name, others), (level, json), storage)| {
            let mut text =
                format!("[peer]\nlisten = \"{ip}:{peer}\"\n[client]\nlisten = \"{ip}:{client}\"\n");
            text += "[cluster]\njoin = [\"seed:1\"]\n[node]\nid = \"x\"\ndata_dir = \"x\"\n";
            let environment = [
                ("PONTOON__PEER__ADVERTISE".to_owned(), format!("{host}:{peer}")),
                ("PONTOON__CLIENT__ADVERTISE".to_owned(), format!("{host}:{client}")),
            ];
            let mut settings = Settings::load_str("base", &text, environment.into_iter()).unwrap();
            settings.node.id = node.0;
            settings.node.data_dir = node.1.into();
            settings.node.zone = node.2;
            settings.node.weight = node.3;
            settings.node.data_threads = node.4;
            settings.http_listen = http.map(|port| ([127, 0, 0, 1], port).into());
            settings.cluster.name = name;
            if !others.is_empty() {
                settings.cluster.initial = others.into_iter().collect();
                settings.cluster.initial.push(settings.peer.advertise.clone());
            }
            settings.log.level = level.into();
            if json {
                settings.log.format = LogFormat::Json;
            }
            settings.storage.cache_bytes = storage.0;
            settings.storage.memtable_bytes = storage.1;
            settings.storage.log_file_bytes = storage.2;
            settings.storage.log_bytes = storage.2 * storage.3;
            settings.storage.log_keep_bytes = storage.2;
            settings.storage.log_spare_files = storage.4;
            settings.storage.reserve_bytes = storage.0;
            settings.snapshot.bytes_per_second = storage.2;
            settings
        },
    )
}

proptest! {
    #[test]
    fn printed_settings_load_again(settings in settings()) {
        let text = settings.to_toml();
        let loaded = load(&text, &[]);
        prop_assert_eq!(loaded, Ok(settings), "{}", text);
    }

    #[test]
    fn no_text_and_no_environment_panics(
        text in "([a-z\\[\\]=.\"{}\n -]|node|peer|id|listen|initial|0|é){0,80}",
        variable in "PONTOON__(NODE|PEER|_|é){0,3}(ID|LISTEN|__){0,2}",
        value in "\\PC{0,20}",
    ) {
        if let Err(errors) = load(&text, &[(&variable, &value)]) {
            prop_assert!(!errors.is_empty());
            for line in errors.lines() {
                prop_assert!(line.starts_with("f.toml:") || line.starts_with("environment PONTOON__"), "{}", line);
            }
        }
    }
}
