//! The table in docs/operations.md: which damage to which file came to what.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::path::Path;

use crate::files::{Class, Damage};
use crate::patient::Outcome;

const BEGIN: &str = "<!-- made by tests/damage.rs -->\n";
const END: &str = "<!-- end -->\n";

/// The columns.
const KINDS: [(&str, &[Damage]); 4] = [
    ("bits flipped", &[Damage::FlipStart, Damage::FlipMiddle, Damage::FlipEnd, Damage::FlipMany]),
    ("cut short", &[Damage::Half, Damage::Empty]),
    ("deleted", &[Damage::Delete]),
    ("an older copy", &[Damage::Older]),
];

/// What came of each.
#[derive(Default)]
pub struct Table(BTreeMap<(Class, Damage), BTreeSet<Outcome>>);

impl Table {
    pub fn note(&mut self, class: Class, damage: Damage, outcome: Outcome) {
        self.0.entry((class, damage)).or_default().insert(outcome);
    }

    fn cell(&self, class: Class, damages: &[Damage]) -> BTreeSet<Outcome> {
        damages.iter().filter_map(|damage| self.0.get(&(class, *damage))).flatten().copied().collect()
    }

    /// As lines of Markdown.
    fn markdown(&self) -> String {
        let mut text = String::from("| file |");
        for (name, _) in KINDS {
            write!(text, " {name} |").expect("writing to a string");
        }
        text.push_str("\n|---|---|---|---|---|\n");
        for class in Class::ALL {
            write!(text, "| {class} |").expect("writing to a string");
            for (_, damages) in KINDS {
                write!(text, " {} |", words(&self.cell(class, damages))).expect("writing to a string");
            }
            text.push('\n');
        }
        text
    }

    /// Writes it into the page.
    pub fn write(&self) {
        let (page, text, range) = page();
        let new = format!("{}{}{}", &text[..range.start], self.markdown(), &text[range.end..]);
        fs::write(page, new).expect("the page");
    }

    /// Everything that was seen is in the page's table.
    pub fn check(&self) {
        let (_, text, range) = page();
        let told: BTreeMap<&str, Vec<&str>> = text[range]
            .lines()
            .filter_map(|line| line.strip_prefix("| ")?.strip_suffix(" |"))
            .map(|line| line.split(" | ").collect::<Vec<_>>())
            .map(|cells| (cells[0], cells[1..].to_vec()))
            .collect();
        let mut wrong = Vec::new();
        for ((class, damage), outcomes) in &self.0 {
            let kind = KINDS.iter().position(|(_, damages)| damages.contains(damage)).expect("a column");
            let cell = told.get(class.to_string().as_str()).map_or("no such line", |cells| cells[kind]);
            for outcome in outcomes {
                if !cell.split(", or ").any(|told| told == word(*outcome)) {
                    wrong.push(format!("{class}, {damage}: {}; told: {cell}", word(*outcome)));
                }
            }
        }
        assert!(
            wrong.is_empty(),
            "the table in docs/operations.md doesn't tell (REWRITE=1 cargo test --test damage -- --ignored \
             writes it anew): {wrong:#?}"
        );
    }
}

fn page() -> (std::path::PathBuf, String, std::ops::Range<usize>) {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/operations.md");
    let text = fs::read_to_string(&page).expect("the page");
    let begin = text.find(BEGIN).expect("where the table begins") + BEGIN.len();
    let end = begin + text[begin..].find(END).expect("where the table ends");
    (page, text, begin..end)
}

fn words(outcomes: &BTreeSet<Outcome>) -> String {
    let words: Vec<&str> = outcomes.iter().map(|outcome| word(*outcome)).collect();
    if words.is_empty() { "–".into() } else { words.join(", or ") }
}

fn word(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Whole => "nothing",
        Outcome::Remade => "made anew",
        Outcome::Refetched => "state fetched",
        Outcome::Refused => "refused",
    }
}
