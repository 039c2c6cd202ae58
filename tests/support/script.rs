//! Text-driven tests. A script is a file of blocks; a block is commands, a line `----`, and the output
//! they must have, up to the next blank line:
//!
//! ```text
//! # What this script shows; every script begins so.
//!
//! # A comment on the block.
//! put color "light blue"
//! get color
//! ----
//! written 1
//! "light blue" version 1
//! ```
//!
//! A command is words and `name=value` pairs; `"…"` keeps blanks together and knows `\n`, `\"`, `\\` and
//! `\xNN` (values are bytes). Whoever runs scripts brings an [`Interpreter`], made anew for each file. A
//! command that fails prints `error: …`, which a script may expect. `REWRITE=1 cargo test --test scripts`
//! writes what the commands print into the files; read the difference before you commit it.

use std::cell::RefCell;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{env, fs};

/// Executes the commands of one script.
pub trait Interpreter {
    /// The output of one command, without blank lines. `Err` is printed as `error: …`.
    fn execute(&mut self, command: &Command) -> Result<String, String>;
}

/// One line of a script.
#[derive(Debug)]
pub struct Command {
    /// The first word.
    pub name: String,
    words: Vec<Vec<u8>>,
    named: Vec<(String, Vec<u8>)>,
    /// Which words and pairs the interpreter has asked for; asking for too few is a mistake in the script.
    seen: RefCell<Vec<String>>,
}

impl Command {
    /// The word at `at`, counted from 0 behind the name.
    pub fn word(&self, at: usize) -> Result<&[u8], String> {
        self.optional(at)
            .ok_or_else(|| format!("`{}` needs {} words", self.name, at + 1))
    }

    /// The word at `at`, if there is one.
    pub fn optional(&self, at: usize) -> Option<&[u8]> {
        self.seen.borrow_mut().push(at.to_string());
        self.words.get(at).map(Vec::as_slice)
    }

    /// All words from `at` on.
    pub fn words_from(&self, at: usize) -> Vec<&[u8]> {
        (at..self.words.len())
            .filter_map(|at| self.optional(at))
            .collect()
    }

    /// The word at `at` as text.
    pub fn text(&self, at: usize) -> Result<String, String> {
        text(self.word(at)?)
    }

    /// The word at `at` as a number.
    pub fn number<T: std::str::FromStr>(&self, at: usize) -> Result<T, String> {
        number(&self.text(at)?)
    }

    /// The value of the pair of that name.
    pub fn named(&self, name: &str) -> Option<&[u8]> {
        self.seen.borrow_mut().push(name.to_owned());
        let pair = self.named.iter().find(|(n, _)| n == name);
        pair.map(|(_, value)| value.as_slice())
    }

    /// The value of the pair of that name as text.
    pub fn named_text(&self, name: &str) -> Result<Option<String>, String> {
        self.named(name).map(text).transpose()
    }

    /// The value of the pair of that name as a number, or `default`.
    pub fn named_number<T: std::str::FromStr>(&self, name: &str, default: T) -> Result<T, String> {
        let value = self.named_text(name)?;
        value.map_or(Ok(default), |value| number(&value))
    }

    /// Reads a command that is itself a word of a script.
    pub fn parse_bytes(line: &[u8]) -> Result<Command, String> {
        Command::parse(&text(line)?)
    }

    fn parse(line: &str) -> Result<Command, String> {
        let mut words = Vec::new();
        let mut named = Vec::new();
        let mut rest = line.trim_start();
        while !rest.is_empty() {
            let word_end = rest.find(|c: char| c.is_whitespace() || c == '"' || c == '=');
            let (start, tail) = rest.split_at(word_end.unwrap_or(rest.len()));
            let name = tail.starts_with('=').then(|| start.to_owned());
            let (value, tail) = match (&name, tail.strip_prefix(['=', '"'])) {
                (Some(_), Some(tail)) => match tail.strip_prefix('"') {
                    Some(quoted) => unquote(quoted)?,
                    None => {
                        let end = tail.find(char::is_whitespace).unwrap_or(tail.len());
                        (tail[..end].into(), &tail[end..])
                    }
                },
                (None, Some(quoted)) if start.is_empty() => unquote(quoted)?,
                (None, Some(_)) => return Err(format!("a quote inside a word: {line}")),
                (_, None) => (start.into(), tail),
            };
            if !tail.is_empty() && !tail.starts_with(char::is_whitespace) {
                return Err(format!("no blank after a quoted word: {line}"));
            }
            match name {
                Some(name) => named.push((name, value)),
                None => words.push(value),
            }
            rest = tail.trim_start();
        }
        if words.is_empty() {
            return Err(format!("no command: {line}"));
        }
        Ok(Command {
            name: text(&words.remove(0))?,
            words,
            named,
            seen: RefCell::default(),
        })
    }

    /// A word or pair that the interpreter never asked for.
    fn unseen(&self) -> Option<String> {
        let seen = self.seen.borrow();
        let words = (0..self.words.len()).map(|at| at.to_string());
        let names = self.named.iter().map(|(name, _)| name.clone());
        words.chain(names).find(|what| !seen.contains(what))
    }
}

/// Runs every script in tests/scripts/`area`, each with an interpreter of its own, and panics with all
/// differences at the end.
pub fn run_area<I: Interpreter>(area: &str, new: impl Fn() -> I) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/scripts")
        .join(area);
    let entries = fs::read_dir(&directory).unwrap_or_else(|e| panic!("{directory:?}: {e}"));
    let mut files: Vec<PathBuf> = entries
        .map(|entry| entry.expect("directory entry").path())
        .filter(|path| path.extension().is_some_and(|e| e == "txt"))
        .collect();
    files.sort();
    assert!(!files.is_empty(), "no script in {directory:?}");
    let rewrite = env::var_os("REWRITE").is_some_and(|value| value == "1");
    let mut report = String::new();
    for file in files {
        let script = fs::read_to_string(&file).unwrap_or_else(|e| panic!("{file:?}: {e}"));
        match run_script(&script, &mut new()) {
            Err(mistake) => report += &format!("{}: {mistake}\n", file.display()),
            Ok(run) if rewrite => {
                if run.rewritten != script {
                    fs::write(&file, run.rewritten).unwrap_or_else(|e| panic!("{file:?}: {e}"));
                }
            }
            Ok(run) => {
                for difference in run.differences {
                    report += &format!("{}:{difference}\n", file.display());
                }
            }
        }
    }
    assert!(
        report.is_empty(),
        "scripts differ (REWRITE=1 rewrites them):\n{report}"
    );
}

struct Run {
    /// One text per block that printed something else than expected; begins with its line number.
    differences: Vec<String>,
    /// The script with the output there was.
    rewritten: String,
}

/// `Err`: the script itself is malformed.
fn run_script(script: &str, interpreter: &mut dyn Interpreter) -> Result<Run, String> {
    if !script.starts_with("# ") {
        return Err("a script begins with a comment that says what it shows".into());
    }
    let mut run = Run {
        differences: Vec::new(),
        rewritten: String::new(),
    };
    let mut lines = script.lines().enumerate().peekable();
    let mut commands: Vec<Command> = Vec::new();
    let mut block_line = 0;
    while let Some((at, line)) = lines.next() {
        run.rewritten += line;
        run.rewritten.push('\n');
        if line.starts_with('#') || (line.trim().is_empty() && commands.is_empty()) {
            continue;
        }
        if line.trim().is_empty() {
            return Err(format!("{}: the block ends without `----`", at + 1));
        }
        if line != "----" {
            if commands.is_empty() {
                block_line = at + 1;
            }
            commands.push(Command::parse(line).map_err(|e| format!("{}: {e}", at + 1))?);
            continue;
        }
        let mut expected = String::new();
        while let Some((_, line)) = lines.next_if(|(_, line)| !line.trim().is_empty()) {
            expected += line;
            expected.push('\n');
        }
        let found = execute(&std::mem::take(&mut commands), interpreter)
            .map_err(|e| format!("{block_line}: {e}"))?;
        run.rewritten += &found;
        if found != expected {
            let text = format!("{block_line}:\n--- expected\n{expected}--- found\n{found}");
            run.differences.push(text);
        }
    }
    if commands.is_empty() {
        Ok(run)
    } else {
        Err(format!("{block_line}: the block ends without `----`"))
    }
}

fn execute(commands: &[Command], interpreter: &mut dyn Interpreter) -> Result<String, String> {
    let mut found = String::new();
    for command in commands {
        let output = match interpreter.execute(command) {
            Ok(output) => {
                if let Some(what) = command.unseen() {
                    return Err(format!("`{}` makes no use of `{what}`", command.name));
                }
                output
            }
            Err(error) => format!("error: {error}"),
        };
        let output = output.trim_end();
        if output.lines().any(|line| line.trim().is_empty()) && !output.is_empty() {
            return Err(format!("`{}` prints a blank line", command.name));
        }
        if !output.is_empty() {
            found += output;
            found.push('\n');
        }
    }
    if found.is_empty() {
        found += "ok\n";
    }
    Ok(found)
}

/// Bytes as a script shows them: in quotes, escaped.
pub fn quoted(bytes: &[u8]) -> String {
    let mut to = String::from("\"");
    for &byte in bytes {
        match byte {
            b'"' => to += "\\\"",
            b'\\' => to += "\\\\",
            b'\n' => to += "\\n",
            b' '..=b'~' => to.push(byte.into()),
            _ => write!(to, "\\x{byte:02x}").expect("writing to a string"),
        }
    }
    to + "\""
}

fn unquote(from: &str) -> Result<(Vec<u8>, &str), String> {
    let mut bytes = Vec::new();
    let mut rest = from;
    loop {
        let mut chars = rest.chars();
        let Some(char) = chars.next() else {
            return Err(format!("a quote is never closed: \"{from}"));
        };
        rest = chars.as_str();
        let escape = rest.chars().next().filter(|_| char == '\\');
        match (char, escape) {
            ('"', _) => return Ok((bytes, rest)),
            ('\\', Some('x')) => {
                let digits = rest.get(1..3).and_then(|d| u8::from_str_radix(d, 16).ok());
                bytes.push(digits.ok_or_else(|| format!("\\x without two digits: {from}"))?);
                rest = &rest[3..];
            }
            ('\\', Some(char @ ('n' | '"' | '\\'))) => {
                bytes.push(if char == 'n' { b'\n' } else { char as u8 });
                rest = &rest[1..];
            }
            ('\\', _) => return Err(format!("an unknown escape: {from}")),
            (char, _) => bytes.extend(char.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
}

fn text(bytes: &[u8]) -> Result<String, String> {
    String::from_utf8(bytes.to_vec()).map_err(|_| format!("{} is not text", quoted(bytes)))
}

fn number<T: std::str::FromStr>(text: &str) -> Result<T, String> {
    text.parse()
        .map_err(|_| format!("`{text}` is not a number here"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `say WORD… [loud=yes]` prints the words.
    struct Echo;

    impl Interpreter for Echo {
        fn execute(&mut self, command: &Command) -> Result<String, String> {
            if command.name != "say" {
                return Err(format!("unknown command `{}`", command.name));
            }
            let words: Vec<_> = command.words_from(0).into_iter().map(quoted).collect();
            let loud = command.named("loud").map_or("", |_| "!");
            Ok(words.join(" ") + loud)
        }
    }

    fn run(script: &str) -> Result<Run, String> {
        run_script(script, &mut Echo)
    }

    #[test]
    fn differences_are_found_and_rewritten() {
        let script = "# Shows it.\n\nsay a \"b c\\x00\\\"\" loud=yes\nsay\n----\n\"a\"\n\n# More.\nsing\n----\n";
        let found = run(script).unwrap();
        assert_eq!(found.differences.len(), 2);
        assert!(found.differences[0].starts_with("3:\n--- expected\n\"a\"\n--- found\n"));
        assert_eq!(
            found.rewritten,
            "# Shows it.\n\nsay a \"b c\\x00\\\"\" loud=yes\nsay\n----\n\"a\" \"b c\\x00\\\"\"!\n\n# More.\n\
             sing\n----\nerror: unknown command `sing`\n"
        );
        let again = run(&found.rewritten).unwrap();
        assert_eq!(
            (again.differences.len(), again.rewritten),
            (0, found.rewritten)
        );
        assert_eq!(
            run("# It.\n\nsay\n----\nok\n").unwrap().differences.len(),
            0
        );
    }

    #[test]
    fn malformed_scripts_are_refused() {
        let refused = |script: &str| run(script).err().unwrap();
        assert_eq!(
            refused("say\n----\n"),
            "a script begins with a comment that says what it shows"
        );
        assert_eq!(
            refused("# It.\n\nsay\n"),
            "3: the block ends without `----`"
        );
        assert_eq!(
            refused("# It.\nsay\n\n----\n"),
            "3: the block ends without `----`"
        );
        assert_eq!(
            refused("# It.\nsay x=1\n----\n"),
            "2: `say` makes no use of `x`"
        );
        assert_eq!(
            refused("# It.\nsay \"x\n----\n"),
            "2: a quote is never closed: \"x"
        );
        assert_eq!(
            refused("# It.\nsay a\"x\"\n----\n"),
            "2: a quote inside a word: say a\"x\""
        );
    }
}
