//! What is wrong with a set of settings, all of it at once, each with its place.

use std::fmt;

/// Where a setting was given, or should have been.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// A line of the file.
    Line(usize),
    /// The file as a whole: it lacks something, or can't be read.
    File,
    /// An environment variable.
    Environment(String),
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SettingsError {
    /// Name of the file, as the caller gave it.
    pub file: String,
    /// Where.
    pub place: Place,
    /// The key, as `node.id`; empty where the text as a whole is at fault.
    pub key: String,
    /// What is wrong and what would be right.
    pub reason: String,
}

impl fmt::Display for SettingsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::Line(line) => write!(f, "{}:{line}: ", self.file)?,
            Place::File => write!(f, "{}: ", self.file)?,
            Place::Environment(variable) => write!(f, "environment {variable}: ")?,
        }
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        f.write_str(&self.reason)
    }
}

/// Everything that is wrong, by place: lines of the file in order, then what the file lacks, then
/// the environment. Displayed as one line each. Never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SettingsErrors(Vec<SettingsError>);

impl SettingsErrors {
    pub(super) fn from_list(mut errors: Vec<SettingsError>) -> SettingsErrors {
        debug_assert!(!errors.is_empty());
        // Stable: within one place, the order in which they were found.
        errors.sort_by(|a, b| a.place.cmp(&b.place));
        SettingsErrors(errors)
    }

    /// The errors, by place.
    pub fn iter(&self) -> impl Iterator<Item = &SettingsError> {
        self.0.iter()
    }
}

impl fmt::Display for SettingsErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, error) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{error}")?;
        }
        Ok(())
    }
}

impl std::error::Error for SettingsErrors {}
