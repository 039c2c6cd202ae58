//! A plain build has no test hooks: nothing in it makes a replica fail on purpose.
//!
//! Compiling the program again without the feature would cost minutes. What decides is asked instead:
//! cargo, which features a plain build has; and the source, whether each hook is behind the feature. A
//! binary built plainly can be named by PONTOON_PLAIN_BINARY, and is then searched too.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;

/// In the text of every failure that a hook makes.
const MARK: &str = "injected";
const FEATURE: &str = "test-hooks";

/// Conditions under which code is left out of a plain build. Written without spaces.
const GATES: [&str; 3] =
    ["cfg(test)", "cfg(feature=\"test-hooks\")", "cfg(any(test,feature=\"test-hooks\"))"];
/// The one other condition on the feature that there may be.
const OPPOSITE: &str = "cfg(not(feature=\"test-hooks\"))";

#[test]
fn a_plain_build_does_not_turn_the_feature_on() {
    let features = |edges: &str| {
        let tree = Command::new(env!("CARGO"))
            .args(["tree", "--offline", "--locked", "--depth", "0", "--edges", edges, "--format", "{f}"])
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .output()
            .expect("running cargo");
        assert!(tree.status.success(), "{}", String::from_utf8_lossy(&tree.stderr));
        let text = String::from_utf8(tree.stdout).expect("text");
        text.lines().next().unwrap_or_default().to_owned()
    };
    assert_eq!(features("normal,build"), "", "features of a plain build");
    assert_eq!(features("normal,build,dev"), FEATURE, "features of a build for tests");
}

#[test]
fn every_hook_in_the_source_is_behind_the_feature() {
    let source = Source::read();
    // The search finds what there is.
    for name in ["Inject", "Hooks", "FailOpens", "Point", "Rules"] {
        assert!(source.hooks.contains(name), "{name} is not among the hooks found: {:?}", source.hooks);
    }
    assert!(source.plain.len() > 80, "only {} files were found", source.plain.len());
    assert!(source.plain.contains_key(Path::new("src/node/replica.rs")));
    assert!(!source.plain.contains_key(Path::new("src/node/hooks.rs")));

    // The source is full of points; what is left of them is their names.
    let points = &source.plain[Path::new("src/failpoints.rs")];
    assert!(points.contains("macro_rules! failpoint"), "{points}");
    assert!(!points.contains("at(") && !points.contains("fails("), "points do something: {points}");

    let mut wrong = Vec::new();
    for (path, text) in &source.plain {
        for (number, line) in (1..).zip(text.lines()) {
            let named = words(line).find(|word| source.hooks.contains(*word));
            if named.is_some() || line.contains(MARK) || line.contains(FEATURE) {
                wrong.push(format!("{}:{number}: {}", path.display(), line.trim()));
            }
        }
    }
    assert!(wrong.is_empty(), "in a plain build too: {wrong:#?}");
}

#[test]
fn a_plain_binary_has_no_hooks() {
    // The mark alone is a word that others use too.
    let texts = Source::read().texts;
    assert!(texts.contains("injected panic"), "{texts:?}");
    let contains = |path: &Path| {
        let bytes = fs::read(path).expect("reading the binary");
        let bytes = String::from_utf8_lossy(&bytes);
        texts.iter().any(|text| bytes.contains(text.as_str()))
    };
    assert!(contains(Path::new(env!("CARGO_BIN_EXE_pontoon"))), "this is how a build with hooks looks");
    match std::env::var_os("PONTOON_PLAIN_BINARY") {
        Some(plain) => assert!(!contains(Path::new(&plain)), "{} has test hooks", plain.display()),
        None => println!("no PONTOON_PLAIN_BINARY is named; docs/testing.md says how to make one"),
    }
}

/// The source of the package as a plain build compiles it.
#[derive(Default)]
struct Source {
    /// Text of each file without comments and without what is left out, its lines kept.
    plain: BTreeMap<PathBuf, String>,
    /// Names of types that only a build with the feature has.
    hooks: BTreeSet<String>,
    /// Texts with the mark that only such a build has.
    texts: BTreeSet<String>,
}

impl Source {
    fn read() -> Source {
        let mut source = Source::default();
        for root in ["src/lib.rs", "src/main.rs"] {
            source.add(Path::new(root));
        }
        source
    }

    /// Adds a file and the modules it declares.
    fn add(&mut self, path: &Path) {
        let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path));
        let text = text.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let (plain, left_out) = split(&text);
        for (gate, text) in left_out {
            if gate.contains(FEATURE) {
                self.add_hooks(&text);
                for module in modules(&text) {
                    let file = fs::read_to_string(module_file(path, &module)).expect("a module's file");
                    self.add_hooks(&split(&file).0);
                }
            }
        }
        for module in modules(&plain) {
            self.add(&module_file(path, &module));
        }
        self.plain.insert(path.to_owned(), plain);
    }

    fn add_hooks(&mut self, text: &str) {
        self.hooks.extend(types(text));
        let quoted = text.lines().flat_map(|line| line.split('"').skip(1).step_by(2));
        self.texts.extend(quoted.filter(|text| text.contains(MARK)).map(str::to_owned));
    }
}

/// The file of a module that `parent` declares.
fn module_file(parent: &Path, name: &str) -> PathBuf {
    let stem = parent.file_stem().and_then(|stem| stem.to_str()).expect("a name");
    let dir = match stem {
        "lib" | "main" | "mod" => parent.with_file_name(""),
        _ => parent.with_extension(""),
    };
    let flat = dir.join(format!("{name}.rs"));
    if flat.exists() { flat } else { dir.join(name).join("mod.rs") }
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty())
}

fn types(text: &str) -> BTreeSet<String> {
    let all: Vec<&str> = words(text).collect();
    let named = all.windows(2).filter(|pair| ["struct", "enum", "trait"].contains(&pair[0]));
    named.map(|pair| pair[1].to_owned()).collect()
}

/// Modules declared by `mod NAME;`.
fn modules(text: &str) -> Vec<String> {
    let declared = text.lines().filter_map(|line| {
        let (before, rest) = line.trim().split_once("mod ")?;
        (before.is_empty() || before.starts_with("pub")).then_some(rest.strip_suffix(';')?)
    });
    declared.map(str::to_owned).collect()
}

/// Splits a file into what a plain build has, comments blanked out, and what it leaves out, with the
/// condition for each.
fn split(text: &str) -> (String, Vec<(String, String)>) {
    let (mut plain, code) = (text.as_bytes().to_vec(), kinds(text.as_bytes()));
    for (byte, kind) in plain.iter_mut().zip(&code) {
        if *kind == Kind::Comment && *byte != b'\n' {
            *byte = b' ';
        }
    }
    let commentless = plain.clone();
    let mut left_out = Vec::new();
    let mut at = 0;
    while let Some(found) = find(&text.as_bytes()[at..], b"#[cfg(") {
        let start = at + found;
        at = start + 1;
        if code[start] != Kind::Code {
            continue;
        }
        let end = closing(&commentless, &code, start + 1);
        let condition: String = text[start + 2..end].chars().filter(|c| !c.is_whitespace()).collect();
        let remove = if GATES.contains(&condition.as_str()) {
            start..item_end(&commentless, &code, end + 1)
        } else if condition == OPPOSITE {
            start..end + 1
        } else {
            continue;
        };
        at = remove.end;
        left_out.push((condition, String::from_utf8_lossy(&commentless[remove.clone()]).into_owned()));
        blank(&mut plain, remove);
    }
    (String::from_utf8(plain).expect("text"), left_out)
}

fn blank(text: &mut [u8], range: Range<usize>) {
    for byte in &mut text[range] {
        if *byte != b'\n' {
            *byte = b' ';
        }
    }
}

fn find(text: &[u8], what: &[u8]) -> Option<usize> {
    text.windows(what.len()).position(|window| window == what)
}

/// The place of the bracket that closes the one at `open`.
fn closing(text: &[u8], code: &[Kind], open: usize) -> usize {
    let mut depth = 0;
    for at in (open..text.len()).filter(|at| code[*at] == Kind::Code) {
        match text[at] {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return at;
        }
    }
    panic!("a bracket is not closed");
}

/// Where the item, field or statement ends that begins after `at`, further attributes included.
fn item_end(text: &[u8], code: &[Kind], mut at: usize) -> usize {
    loop {
        let is = |byte| code[at] == Kind::Code && text[at] == byte;
        if is(b'#') {
            at = closing(text, code, at + 1) + 1;
        } else if is(b'(') || is(b'[') {
            at = closing(text, code, at) + 1;
        } else if is(b'{') {
            return closing(text, code, at) + 1;
        } else if is(b';') || is(b',') {
            return at + 1;
        } else if is(b'}') {
            return at;
        } else {
            at += 1;
        }
    }
}

/// What a byte of a source file belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Code,
    Comment,
    Text,
}

fn kinds(text: &[u8]) -> Vec<Kind> {
    let mut kinds = vec![Kind::Code; text.len()];
    let mut at = 0;
    while at < text.len() {
        let rest = &text[at..];
        let (kind, len) = if rest.starts_with(b"//") {
            (Kind::Comment, find(rest, b"\n").unwrap_or(rest.len()))
        } else if rest.starts_with(b"/*") {
            (Kind::Comment, find(rest, b"*/").map_or(rest.len(), |end| end + 2))
        } else if let Some(len) = raw_text(rest) {
            (Kind::Text, len)
        } else if rest[0] == b'"' {
            (Kind::Text, quoted(rest, b'"'))
        } else if rest[0] == b'\'' && (rest.get(1) == Some(&b'\\') || rest.get(2) == Some(&b'\'')) {
            // Not a lifetime.
            (Kind::Text, quoted(rest, b'\''))
        } else {
            (Kind::Code, 1)
        };
        kinds[at..at + len].fill(kind);
        at += len;
    }
    kinds
}

/// The length of the literal at the start of `text`, which begins with `quote`.
fn quoted(text: &[u8], quote: u8) -> usize {
    let mut at = 1;
    while at < text.len() && text[at] != quote {
        at += if text[at] == b'\\' { 2 } else { 1 };
    }
    (at + 1).min(text.len())
}

/// The length of a literal `r"…"` or `r#"…"#`, if `text` begins with one.
fn raw_text(text: &[u8]) -> Option<usize> {
    let rest = text.strip_prefix(b"r")?;
    let hashes = rest.iter().take_while(|byte| **byte == b'#').count();
    if rest.get(hashes) != Some(&b'"') {
        return None;
    }
    let end = [b"\"".as_slice(), &rest[..hashes]].concat();
    let body = hashes + 1;
    find(&rest[body..], &end).map(|found| 1 + body + found + end.len())
}

#[test]
fn what_is_left_out_is_found() {
    let text = r##"
use a; // #[cfg(test)]
#[cfg(feature = "test-hooks")]
/// A hook.
#[derive(Message)]
pub struct Hook(String);
fn kept() {
    let text = "#[cfg(test)] }";
    #[cfg(feature = "test-hooks")]
    let value = hook((1, 2)).and(text);
    #[cfg(not(feature = "test-hooks"))]
    { refuse('}', r#"}""#) }
}
#[cfg(test)]
mod tests { fn gone<'a>() {} }
struct Kept { #[cfg(feature = "test-hooks")] hooks: Hooks, other: u8 }
if cfg!(feature = "test-hooks") {}
"##;
    let (plain, left_out) = split(text);
    assert_eq!(plain.lines().count(), text.lines().count());
    let squeezed: Vec<&str> = words(&plain).collect();
    let expected = "use a fn kept let text cfg test refuse r struct Kept other u8 if cfg feature test hooks";
    assert_eq!(squeezed, expected.split(' ').collect::<Vec<_>>());
    assert_eq!(left_out.len(), 5);
    assert_eq!(types(&left_out[0].1).into_iter().collect::<Vec<_>>(), ["Hook"]);
}
