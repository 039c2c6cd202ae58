use super::*;

fn parse(line: &[&str]) -> Result<Cli, clap::Error> {
    let args = std::iter::once("pontoon").chain(line.iter().copied());
    Cli::try_parse_from(modernise(args.map(OsString::from).collect()))
}

#[test]
fn the_parser_is_consistent() {
    use clap::CommandFactory;
    Cli::command().debug_assert();
}

#[test]
fn the_reports_lines_are_subcommands() {
    let cli = parse(&["-setup", "testDB", "3", "5"]).unwrap();
    let Command::Setup(setup) = cli.command else { panic!("not setup") };
    assert_eq!((setup.name.as_str(), setup.replicas, setup.partitions), ("testDB", 3, 5));
    assert!(matches!(parse(&["-set", "testDB", "bob", "hello"]).unwrap().command, Command::Set(_)));
    assert!(matches!(parse(&["-get", "testDB", "bob"]).unwrap().command, Command::Get(_)));
    assert!(matches!(parse(&["-clean"]).unwrap().command, Command::Clean(_)));
    assert!(matches!(
        parse(&["-test", "leaderFailure", "4"]).unwrap().command,
        Command::Test(TestCommand::LeaderFailure(TestArgs { nodes: 4 }))
    ));
    assert!(matches!(
        parse(&["-test", "replicationTest", "4"]).unwrap().command,
        Command::Test(TestCommand::Replication(TestArgs { nodes: 4 }))
    ));
}

#[test]
fn only_the_first_argument_is_read_as_an_old_spelling() {
    let Command::Set(set) = parse(&["set", "db", "-get", "-set"]).unwrap().command else { panic!("not set") };
    assert_eq!(set.put.key, "-get");
    assert_eq!(set.put.value.unwrap(), "-set");
}

#[test]
fn keys_and_values_may_begin_with_a_hyphen() {
    for (key, value) in [("-1", "-x=2"), ("--key", "--value"), ("-", "--"), ("-key", "v")] {
        if value == "--" {
            continue; // `--` itself ends the options; it takes another `--` before it
        }
        let Command::Set(set) = parse(&["set", "db", key, value, "--json"]).unwrap().command else {
            panic!("not set")
        };
        assert_eq!(set.put.key, key);
        assert_eq!(set.put.value.unwrap(), value);
    }
    let Command::Set(set) = parse(&["set", "db", "--", "--json", "-h"]).unwrap().command else {
        panic!("not set")
    };
    assert_eq!((set.put.key.to_str(), set.put.value.unwrap().to_str()), (Some("--json"), Some("-h")));
    let cas = ["cas", "db", "-k", "--expect", "-old", "-new"];
    let Command::Cas(cas) = parse(&cas).unwrap().command else { panic!("not cas") };
    assert_eq!(cas.key, "-k");
    assert_eq!(cas.condition.expect.unwrap(), "-old");
    assert_eq!(cas.new.unwrap(), "-new");
}

#[test]
fn cas_takes_exactly_one_condition() {
    assert!(parse(&["cas", "db", "k", "new"]).is_err());
    assert!(parse(&["cas", "db", "k", "--absent", "--version", "1", "new"]).is_err());
    assert!(parse(&["cas", "db", "k", "--version", "1", "new"]).is_ok());
    assert!(parse(&["cas", "db", "k", "--absent", "new"]).is_ok());
}

#[test]
fn a_value_comes_from_exactly_one_place() {
    assert!(parse(&["set", "db", "k"]).is_err());
    assert!(parse(&["set", "db", "k", "v", "--stdin"]).is_err());
    assert!(parse(&["set", "db", "k", "--file", "f", "--stdin"]).is_err());
    assert!(parse(&["set", "db", "k", "--file", "f"]).is_ok());
    assert!(parse(&["set", "db", "k", "--stdin"]).is_ok());
    assert!(parse(&["set", "db", "k", ""]).is_ok());
}

#[test]
fn numbers_and_names_have_bounds() {
    for (name, replicas, partitions, ok) in [
        ("a", "1", "1", true),
        ("A-z_9", "7", "16384", true),
        ("-a", "3", "5", true),
        ("a", "0", "1", false),
        ("a", "8", "1", false),
        ("a", "1", "0", false),
        ("a", "1", "16385", false),
        ("a b", "1", "1", false),
        ("ä", "1", "1", false),
        ("", "1", "1", false),
        (&"x".repeat(64), "1", "1", true),
        (&"x".repeat(65), "1", "1", false),
    ] {
        for command in [&["setup"][..], &["db", "create"]] {
            let line = [command, &[name, replicas, partitions]].concat();
            assert_eq!(parse(&line).is_ok(), ok, "{line:?}");
        }
    }
}

#[test]
fn times_are_read_with_and_without_units() {
    assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
    assert_eq!(duration("1m 30s"), Ok(Duration::from_secs(90)));
    assert_eq!(duration("7"), Ok(Duration::from_secs(7)));
    for bad in ["", "0", "0s", "-1s", "ten", "1y"] {
        assert!(duration(bad).is_err(), "{bad}");
    }
}

#[test]
fn help_fits_on_a_hundred_columns() {
    use clap::CommandFactory;
    fn look(command: &clap::Command) {
        for help in [command.get_after_help(), command.get_after_long_help()].into_iter().flatten() {
            for line in help.to_string().lines() {
                assert!(line.chars().count() <= 100, "{}: {line}", command.get_name());
            }
        }
        command.get_subcommands().for_each(look);
    }
    look(&Cli::command());
}
