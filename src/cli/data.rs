//! `set`, `get`, `delete`, `cas`, `mset`, `mget`, `scan`.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use bytes::Bytes;
use serde_json::{Value, json};

use super::args::{
    CasArgs, CasCondition, DeleteArgs, GetArgs, MgetArgs, MsetArgs, PutArgs, ScanArgs, SetArgs, ValueSource,
};
use super::context::{Context, with_session};
use super::encoding::{self, Record};
use super::failure::{Exit, Failure};
use super::output;
use crate::client::{Cas, ClientError, Operation, OperationResult, ScanOptions, Versioned};
use crate::limits::VALUE_BYTES_MAX;
use crate::machine::command::Expect;

/// `set DB KEY VALUE`
pub fn set(context: &Context, args: SetArgs) -> Result<Exit, Failure> {
    let PutArgs { db, key, value, source } = args.put;
    let (key, value) = (encoding::key(key)?, read_value(value, &source)?);
    with_session(context, async |session| {
        let version = session.database(&db).put(key.clone(), value).await?;
        written(context, &key, version)?;
        Ok(Exit::Done)
    })
}

/// `get DB KEY`
pub fn get(context: &Context, args: GetArgs) -> Result<Exit, Failure> {
    let key = encoding::key(args.key)?;
    let found =
        with_session(context, async |session| Ok(session.database(&args.db).get(key.clone()).await?))?;
    if context.json() {
        output::json(&Record::new(&key, found.as_ref()).json_found())?;
        return Ok(if found.is_some() { Exit::Done } else { Exit::Negative });
    }
    let Some(found) = found else {
        return Err(absent(&args.db, &key));
    };
    output::bytes(&found.value)?;
    if output::on_terminal() {
        output::bytes(b"\n")?;
    }
    Ok(Exit::Done)
}

/// `delete DB KEY`
pub fn delete(context: &Context, args: DeleteArgs) -> Result<Exit, Failure> {
    let key = encoding::key(args.key)?;
    let deleted =
        with_session(context, async |session| Ok(session.database(&args.db).delete(key.clone()).await?))?;
    if context.json() {
        let mut object = Record::new(&key, None).json();
        object["version"] = deleted.into();
        object["found"] = deleted.is_some().into();
        after_effect(output::json(&object))?;
        return Ok(if deleted.is_some() { Exit::Done } else { Exit::Negative });
    }
    match deleted {
        Some(version) => {
            after_effect(output::line(format!("deleted version={version}")))?;
            Ok(Exit::Done)
        }
        None => Err(absent(&args.db, &key)),
    }
}

/// `cas DB KEY --expect OLD|--absent|--version V NEW`
pub fn cas(context: &Context, args: CasArgs) -> Result<Exit, Failure> {
    let key = encoding::key(args.key)?;
    let expect = condition(args.condition)?;
    let value = read_value(args.new, &args.source)?;
    let result = with_session(context, async |session| {
        let database = session.database(&args.db);
        Ok(database.cas(key.clone(), expect.clone(), value).await?)
    })?;
    match result {
        Cas::Written(version) => {
            written(context, &key, version)?;
            Ok(Exit::Done)
        }
        Cas::Mismatch(there) => {
            if context.json() {
                let mut object = Record::new(&key, there.as_ref()).json_found();
                object["written"] = false.into();
                output::json(&object)?;
                return Ok(Exit::Negative);
            }
            Err(Failure::negative(
                "mismatch",
                format!(
                    "`{}` was not changed: {}",
                    output::printable(&key),
                    mismatch(&expect, there.as_ref())
                ),
            ))
        }
    }
}

/// `mset DB KEY VALUE KEY VALUE ...`
pub fn mset(context: &Context, args: MsetArgs) -> Result<Exit, Failure> {
    if !args.pairs.len().is_multiple_of(2) {
        return Err(Failure::usage(
            "usage",
            "mset takes keys and values in turn, and the last key has no value",
        ));
    }
    let mut operations = Vec::new();
    let mut keys = Vec::<Bytes>::new();
    let mut rest = args.pairs.into_iter();
    while let (Some(key), Some(value)) = (rest.next(), rest.next()) {
        let key = encoding::key(key)?;
        if keys.contains(&key) {
            // Operations of a batch have no order among them.
            return Err(Failure::usage(
                "usage",
                format!("mset names the key `{}` twice", output::printable(&key)),
            ));
        }
        let value = encoding::value(encoding::argument(value))?;
        keys.push(key.clone());
        operations.push(Operation::Put(key, value));
    }
    let results =
        with_session(context, async |session| Ok(session.database(&args.db).batch(operations).await))?;
    let mut items = Items::new(context);
    for (key, result) in keys.iter().zip(results) {
        match result {
            Ok(OperationResult::Written(version)) if context.json() => {
                items.answered(written_json(key, version));
            }
            Ok(OperationResult::Written(version)) => {
                let line = format!("{} version={version}", output::printable(key));
                after_effect(output::line(line))?;
            }
            Ok(other) => items.failed(key, unexpected(&other)),
            Err(error) => items.failed(key, error.into()),
        }
    }
    after_effect(items.print())?;
    items.end(Exit::Done)
}

/// `mget DB KEY ...`
pub fn mget(context: &Context, args: MgetArgs) -> Result<Exit, Failure> {
    let keys = args.keys.into_iter().map(encoding::key).collect::<Result<Vec<Bytes>, _>>()?;
    let operations = keys.iter().cloned().map(Operation::Get).collect();
    let results =
        with_session(context, async |session| Ok(session.database(&args.db).batch(operations).await))?;
    let mut items = Items::new(context);
    let mut exit = Exit::Done;
    for (key, result) in keys.iter().zip(results) {
        match result {
            Ok(OperationResult::Value(found)) => {
                if found.is_none() {
                    exit = Exit::Negative;
                }
                if context.json() {
                    items.answered(Record::new(key, found.as_ref()).json_found());
                } else if let Some(found) = found {
                    output::line(pair_line(key, &found.value))?;
                } else {
                    output::note(absent(&args.db, key).message);
                }
            }
            Ok(other) => items.failed(key, unexpected(&other)),
            Err(error) => items.failed(key, error.into()),
        }
    }
    items.print()?;
    items.end(exit)
}

/// `scan DB [--prefix P] [--limit N] [--keys-only]`
pub fn scan(context: &Context, args: ScanArgs) -> Result<Exit, Failure> {
    with_session(context, async |session| {
        let mut scan = session.database_for_many(&args.db).scan(ScanOptions {
            prefix: encoding::argument(args.prefix.clone().unwrap_or_default()).into(),
            limit: args.limit,
            keys_only: args.keys_only,
        });
        // One object in all, yet written page by page: a scan may be larger than memory.
        let mut count = 0_u64;
        loop {
            let page = match scan.next_page().await {
                Ok(page) => page,
                Err(error) => {
                    // What was begun is ended, so that it can be read, and says that it isn't all.
                    if context.json() && count > 0 {
                        output::line(format!("],\"count\":{count},\"complete\":false}}"))?;
                    }
                    return Err(error.into());
                }
            };
            if page.is_empty() {
                break;
            }
            let mut text = Vec::new();
            for (key, found) in &page {
                if context.json() {
                    text.extend_from_slice(if count == 0 { b"{\"pairs\":[" } else { b"," });
                    let record = if args.keys_only {
                        Record::key_only(key, found.version)
                    } else {
                        Record::new(key, Some(found))
                    };
                    text.extend_from_slice(record.json().to_string().as_bytes());
                } else {
                    let line =
                        if args.keys_only { output::printable(key) } else { pair_line(key, &found.value) };
                    text.extend_from_slice(line.as_bytes());
                    text.push(b'\n');
                }
                count += 1;
            }
            output::bytes(&text)?;
        }
        close_array(context, count)?;
        Ok(Exit::Done)
    })
}

fn close_array(context: &Context, count: u64) -> Result<(), Failure> {
    match (context.json(), count) {
        (false, _) => Ok(()),
        (true, 0) => output::line("{\"pairs\":[],\"count\":0}"),
        (true, _) => output::line(format!("],\"count\":{count}}}")),
    }
}

fn pair_line(key: &[u8], value: &[u8]) -> String {
    format!("{}\t{}", output::printable(key), output::printable(value))
}

fn written(context: &Context, key: &[u8], version: u64) -> Result<(), Failure> {
    after_effect(if context.json() {
        output::json(&written_json(key, version))
    } else {
        output::line(format!("ok version={version}"))
    })
}

fn written_json(key: &[u8], version: u64) -> Value {
    let mut object = Record::key_only(key, version).json();
    if let Some(fields) = object.as_object_mut() {
        fields.shift_remove("value");
    }
    object["written"] = true.into();
    object
}

/// What is written once a change is made: should that fail, the failure may not say that nothing was
/// changed.
pub fn after_effect(told: Result<(), Failure>) -> Result<(), Failure> {
    told.map_err(|failure| match failure.exit {
        // Nobody is there to be told.
        Exit::Done => failure,
        _ => Failure::unknown(format!("it was done, but {}", failure.message)),
    })
}

/// The answers of a command with many keys, each with an end of its own.
struct Items {
    json: bool,
    list: Vec<Value>,
    answered: bool,
    worst: Option<Failure>,
}

impl Items {
    fn new(context: &Context) -> Items {
        Items { json: context.json(), list: Vec::new(), answered: false, worst: None }
    }

    /// An answer, for the object of `--json`.
    fn answered(&mut self, item: Value) {
        self.answered = true;
        self.list.push(item);
    }

    /// A key without an answer: in JSON told in its place among the others, else on stderr.
    fn failed(&mut self, key: &[u8], failure: Failure) {
        if self.json {
            let mut item = Record::of_key(key).json();
            if let Some(fields) = item.as_object_mut() {
                fields.retain(|name, _| name == "key" || name == "encoding");
                fields.extend(output::failure_json(&failure).as_object().cloned().unwrap_or_default());
            }
            self.list.push(item);
        }
        if let Some(passed_over) = worse(&mut self.worst, key, failure)
            && !self.json
        {
            output::note(passed_over.message);
        }
    }

    /// Prints the object of `--json`, if there is anything in it but failures.
    fn print(&self) -> Result<(), Failure> {
        if self.answered { output::json(&json!({"items": self.list})) } else { Ok(()) }
    }

    /// The end of the command: the worst failure, or `exit`.
    fn end(self, exit: Exit) -> Result<Exit, Failure> {
        self.worst.map_or(Ok(exit), Err)
    }
}

fn absent(db: &str, key: &[u8]) -> Failure {
    Failure::negative("absent", format!("there is no key `{}` in database `{db}`", output::printable(key)))
}

/// Why a condition doesn't hold, with what is there instead.
fn mismatch(expect: &Expect, there: Option<&Versioned>) -> String {
    let there = match there {
        None => return "the key doesn't exist".into(),
        Some(there) => there,
    };
    match expect {
        Expect::Absent => format!("the key exists, at version {}", there.version),
        Expect::Version(asked) => format!("its version is {}, not {asked}", there.version),
        Expect::Value(_) => {
            format!("its value at version {} is another; read it with `pontoon get`", there.version)
        }
    }
}

/// Keeps the failure that says most: an unknown outcome before one known to have had no effect. Returns
/// the one that isn't kept.
fn worse(worst: &mut Option<Failure>, key: &[u8], failure: Failure) -> Option<Failure> {
    let failure =
        Failure { message: format!("`{}`: {}", output::printable(key), failure.message), ..failure };
    if worst.as_ref().is_none_or(|have| have.exit.code() < failure.exit.code()) {
        worst.replace(failure)
    } else {
        Some(failure)
    }
}

fn unexpected(result: &OperationResult) -> Failure {
    ClientError::Unknown(format!("the answer doesn't fit the question: {result:?}").into()).into()
}

fn condition(condition: CasCondition) -> Result<Expect, Failure> {
    match (condition.expect, condition.version) {
        (Some(old), _) => Ok(Expect::Value(encoding::value(encoding::argument(old))?)),
        (None, Some(version)) => Ok(Expect::Version(version)),
        (None, None) => Ok(Expect::Absent),
    }
}

/// The value from the command line, a file or stdin, checked before anybody is asked.
pub(super) fn read_value(
    argument: Option<std::ffi::OsString>,
    source: &ValueSource,
) -> Result<Bytes, Failure> {
    if let Some(argument) = argument {
        return encoding::value(encoding::argument(argument));
    }
    match &source.file {
        Some(path) => {
            let file = File::open(path).map_err(|e| Failure::io("reading", path, e))?;
            read_bounded(file, path)
        }
        None => read_bounded(io::stdin().lock(), Path::new("stdin")),
    }
}

/// Reads one byte more than a value may have, so that a greater one is noticed without reading it all.
fn read_bounded(from: impl Read, name: &Path) -> Result<Bytes, Failure> {
    let mut bytes = Vec::new();
    from.take(VALUE_BYTES_MAX as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| Failure::io("reading", name, error))?;
    if bytes.len() > VALUE_BYTES_MAX {
        return Err(Failure::usage(
            "invalid",
            format!(
                "{} is too long for a value; the longest value has {VALUE_BYTES_MAX} bytes",
                name.display()
            ),
        ));
    }
    Ok(bytes.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_from_a_stream_is_read_exactly_and_bounded() {
        let name = Path::new("stdin");
        assert_eq!(&read_bounded(&b"a\n\x00"[..], name).unwrap()[..], b"a\n\x00");
        let most = io::repeat(7).take(VALUE_BYTES_MAX as u64);
        assert_eq!(read_bounded(most, name).unwrap().len(), VALUE_BYTES_MAX);
        let failure = read_bounded(io::repeat(7), name).unwrap_err();
        assert_eq!(failure.exit, Exit::Usage);
    }

    #[test]
    fn the_worst_failure_decides() {
        let mut worst = None;
        assert_eq!(worse(&mut worst, b"a", Failure::unavailable("late")), None);
        let passed_over = worse(&mut worst, b"b", ClientError::Unknown("lost".into()).into());
        assert!(passed_over.unwrap().message.starts_with("`a`"));
        assert!(worse(&mut worst, b"c", Failure::negative("refused", "no")).is_some());
        let worst = worst.unwrap();
        assert_eq!(worst.exit, Exit::Unknown);
        assert!(worst.message.starts_with("`b`"), "{worst}");
    }

    #[test]
    fn a_mismatch_says_what_is_there() {
        let there = Versioned { value: Bytes::from_static(b"x"), version: 7 };
        assert!(mismatch(&Expect::Absent, Some(&there)).contains("version 7"));
        assert!(mismatch(&Expect::Version(3), Some(&there)).contains("7, not 3"));
        assert!(mismatch(&Expect::Version(3), None).contains("doesn't exist"));
    }
}
