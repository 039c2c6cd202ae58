//! From text and environment to merged values that know where they came from.
//!
//! The `config` crate does the layering (shipped defaults, file, environment). It doesn't keep
//! lines, so the file is walked a second time with `toml_edit` for the place of each key, and that
//! walk is also what finds unknown keys.

use std::borrow::Cow;
use std::collections::BTreeMap;

use config::{Config, Environment, File, FileFormat, Value, ValueKind};
use toml_edit::{Document, DocumentMut, Item, TableLike};

use super::error::{Place, SettingsError};
use super::keys::{self, ENVIRONMENT_PREFIX};

/// The text without what is in no section, which is reported elsewhere: the `config` crate reads such names as
/// expressions, and `'a[9999999999]' = 1` has it make a list of that length.
fn sections(text: &str) -> Cow<'_, str> {
    let Ok(mut document) = text.parse::<DocumentMut>() else { return text.into() };
    if document.iter().all(|(name, _)| keys::is_section(name)) {
        return text.into();
    }
    document.as_table_mut().retain(|name, _| keys::is_section(name));
    document.to_string().into()
}

/// Where a value stands.
#[derive(Clone, Debug)]
struct Origin {
    place: Place,
    /// For an array in the file: the line of each element, where known.
    elements: Vec<Option<usize>>,
}

/// The merged layers.
pub(super) struct Layers {
    file: String,
    config: Config,
    origins: BTreeMap<&'static str, Origin>,
    errors: Vec<SettingsError>,
}

impl Layers {
    /// Merges. `Err` if the text is no TOML at all, for then nothing can be said about its keys.
    pub fn read(
        file: &str,
        text: &str,
        environment: impl Iterator<Item = (String, String)>,
    ) -> Result<Layers, Vec<SettingsError>> {
        let mut layers = Layers {
            file: file.into(),
            config: Config::default(),
            origins: BTreeMap::new(),
            errors: Vec::new(),
        };
        // The file first, so that a variable takes the key over from its line.
        let document = Document::parse(text);
        if let Ok(document) = &document {
            layers.walk(text, document.as_table(), "");
        }
        let variables = layers.variables(environment);
        if let Err(error) = document {
            let line = error.span().map(|span| line_of(text, span.start));
            let reason = error.message().trim().replace('\n', ", ");
            layers.error(line.map_or(Place::File, Place::Line), "", reason);
            return Err(layers.errors);
        }
        let merged = Config::builder()
            .add_source(File::from_str(super::DEFAULT_TOML, FileFormat::Toml))
            .add_source(File::from_str(&sections(text), FileFormat::Toml))
            .add_source(
                Environment::default()
                    .prefix(ENVIRONMENT_PREFIX.trim_end_matches('_'))
                    .separator("__")
                    .source(Some(variables)),
            )
            .build();
        match merged {
            Ok(config) => layers.config = config,
            Err(error) => {
                layers.error(Place::File, "", error.to_string().replace('\n', ", "));
                return Err(layers.errors);
            }
        }
        Ok(layers)
    }

    /// The merged value of a key; `None` if a section was replaced by something else, which has
    /// been reported then.
    pub fn value(&self, key: &str) -> Option<ValueKind> {
        self.config.get::<Value>(key).ok().map(|value| value.kind)
    }

    /// Whether a key comes from the shipped defaults.
    pub fn is_default(&self, key: &str) -> bool {
        !self.origins.contains_key(key)
    }

    /// Whether a key comes from the environment.
    pub fn is_environment(&self, key: &str) -> bool {
        self.origins.get(key).is_some_and(|origin| matches!(origin.place, Place::Environment(_)))
    }

    /// Records an error of a key, at the place where the key is set.
    pub fn reject(&mut self, key: &str, reason: impl Into<String>) {
        let place = self.origins.get(key).map_or(Place::File, |origin| origin.place.clone());
        self.error(place, key, reason);
    }

    /// As [`Layers::reject`], for one element of an array.
    pub fn reject_element(&mut self, key: &str, element: usize, reason: impl Into<String>) {
        let line = self.origins.get(key).and_then(|origin| origin.elements.get(element).copied().flatten());
        match line {
            Some(line) => self.error(Place::Line(line), key, reason),
            None => self.reject(key, reason),
        }
    }

    /// All errors so far.
    pub fn into_errors(self) -> Vec<SettingsError> {
        self.errors
    }

    fn error(&mut self, place: Place, key: &str, reason: impl Into<String>) {
        self.errors.push(SettingsError {
            file: self.file.clone(),
            place,
            key: key.into(),
            reason: reason.into(),
        });
    }

    /// Notes the place of each key of a table and reports those that don't exist. An unknown
    /// section is one error, not one for each key in it.
    fn walk(&mut self, text: &str, table: &dyn TableLike, section: &str) {
        for (name, item) in table.iter() {
            let key = table.key(name);
            // Quoted where it has to be, so that `"node.id"` isn't taken for `node.id`.
            let shown = key.map_or(name.into(), |key| key.display_repr().into_owned());
            let path = match section {
                "" => shown,
                _ => format!("{section}.{shown}"),
            };
            let span = key.and_then(|key| key.span()).or_else(|| item.span());
            let place = span.map_or(Place::File, |span| Place::Line(line_of(text, span.start)));
            if let Some(known) = keys::find(&path) {
                self.origins.insert(known.name, Origin { elements: element_lines(text, item), place });
            } else if section.is_empty() && keys::is_section(&path) {
                match item.as_table_like() {
                    Some(table) => self.walk(text, table, &path),
                    None => self.error(place, &path, format!("is a section; write [{path}]")),
                }
            } else {
                let meant = keys::suggestion(&path)
                    .map(|meant| format!("; did you mean {meant}?"))
                    .unwrap_or_default();
                let what = if item.is_table_like() { "section" } else { "key" };
                self.error(place, &path, format!("unknown {what}{meant}"));
            }
        }
    }

    /// Picks the variables that are ours, notes them as origins, and reports those that name no key.
    fn variables(
        &mut self,
        environment: impl Iterator<Item = (String, String)>,
    ) -> config::Map<String, String> {
        let mut ours: Vec<(String, String)> =
            environment.filter(|(name, _)| name.starts_with(ENVIRONMENT_PREFIX)).collect();
        ours.sort();
        let mut known = config::Map::new();
        for (variable, value) in ours {
            let path = variable[ENVIRONMENT_PREFIX.len()..].replace("__", ".").to_lowercase();
            match keys::find(&path).filter(|key| keys::environment_name(key.name) == variable) {
                Some(key) => {
                    self.origins.insert(
                        key.name,
                        Origin { place: Place::Environment(variable.clone()), elements: Vec::new() },
                    );
                    known.insert(variable, value);
                }
                None => {
                    let meant = keys::suggestion(&path)
                        .filter(|meant| meant.contains('.'))
                        .map(|meant| format!("; did you mean {}?", keys::environment_name(meant)))
                        .unwrap_or_default();
                    self.error(Place::Environment(variable), &path, format!("unknown key{meant}"));
                }
            }
        }
        known
    }
}

/// Lines are counted from 1.
fn line_of(text: &str, offset: usize) -> usize {
    let before = text.as_bytes().iter().take(offset);
    1 + before.filter(|byte| **byte == b'\n').count()
}

fn element_lines(text: &str, item: &Item) -> Vec<Option<usize>> {
    let Some(array) = item.as_array() else {
        return Vec::new();
    };
    array.iter().map(|value| value.span().map(|span| line_of(text, span.start))).collect()
}
