//! `admin settings`: what operators have set for the cluster as a whole. It is kept by the metadata shard, not
//! in any node's file.

use std::time::Duration;

use serde_json::{Value, json};

use super::args::{SettingsCommand, SettingsGetArgs, SettingsSetArgs};
use super::change_failed;
use crate::cli::context::{Context, with_session};
use crate::cli::data::after_effect;
use crate::cli::failure::{Exit, Failure};
use crate::cli::output;
use crate::limits::{BYTES_PER_SECOND_MAX, MOVES_AT_A_TIME_MAX, REPAIR_MOVES_FACTOR, REPLACE_AFTER_MS_MAX};
use crate::machine::command::PolicyChange;
use crate::placement::map::PolicyRecord;
use crate::rpc::admin::check_setting;

/// One setting of the cluster.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Key {
    /// `placement.replace_after`
    ReplaceAfter,
    /// `placement.moves_at_a_time`
    MovesAtATime,
    /// `placement.bytes_per_second`
    BytesPerSecond,
    /// `placement.automatic`
    Automatic,
    /// `join.approve`
    ApproveJoins,
}

/// All settings, in the order in which they are shown.
const KEYS: [Key; 5] =
    [Key::ReplaceAfter, Key::MovesAtATime, Key::BytesPerSecond, Key::Automatic, Key::ApproveJoins];

/// Their names.
pub const NAMES: [&str; 5] = [KEYS[0].name(), KEYS[1].name(), KEYS[2].name(), KEYS[3].name(), KEYS[4].name()];

/// What may be said instead of 0 where that means «no such limit».
const NEVER: &str = "never";
const UNLIMITED: &str = "unlimited";

impl Key {
    /// The setting of this name.
    pub fn of(name: &str) -> Option<Key> {
        KEYS.into_iter().find(|key| key.name() == name)
    }

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Key::ReplaceAfter => "placement.replace_after",
            Key::MovesAtATime => "placement.moves_at_a_time",
            Key::BytesPerSecond => "placement.bytes_per_second",
            Key::Automatic => "placement.automatic",
            Key::ApproveJoins => "join.approve",
        }
    }

    /// The unit of its value in JSON.
    fn unit(self) -> &'static str {
        match self {
            Key::ReplaceAfter => "ms",
            Key::MovesAtATime => "shards",
            Key::BytesPerSecond => "bytes/s",
            Key::Automatic | Key::ApproveJoins => "on/off",
        }
    }

    /// What it is for.
    fn meaning(self) -> String {
        match self {
            Key::ReplaceAfter => "a node gone for so long is replaced".into(),
            Key::MovesAtATime => {
                format!(
                    "shards whose members change at the same time; for repairs {REPAIR_MOVES_FACTOR} times as many"
                )
            }
            Key::BytesPerSecond => "most that a node sends in snapshots".into(),
            Key::Automatic => "spread replicas and leaders anew when nodes come and go".into(),
            Key::ApproveJoins => "new nodes wait for `pontoon admin node add`".into(),
        }
    }

    /// Its value, as JSON has it: in its unit, 0 for `never` and `unlimited`.
    fn json(self, policy: &PolicyRecord) -> Value {
        match self {
            Key::ReplaceAfter => policy.replace_after_ms.into(),
            Key::MovesAtATime => policy.moves_at_a_time.into(),
            Key::BytesPerSecond => policy.bytes_per_second.into(),
            Key::Automatic => policy.automatic.into(),
            Key::ApproveJoins => policy.approve_joins.into(),
        }
    }

    /// Its value, as people write it. [`Key::parse`] reads it.
    fn text(self, policy: &PolicyRecord) -> String {
        let switch = |on: bool| if on { "on" } else { "off" }.to_owned();
        match self {
            Key::ReplaceAfter if policy.replace_after_ms == 0 => NEVER.into(),
            Key::ReplaceAfter => {
                humantime::format_duration(Duration::from_millis(policy.replace_after_ms)).to_string()
            }
            Key::MovesAtATime => policy.moves_at_a_time.to_string(),
            Key::BytesPerSecond if policy.bytes_per_second == 0 => UNLIMITED.into(),
            Key::BytesPerSecond => exact_size(policy.bytes_per_second),
            Key::Automatic => switch(policy.automatic),
            Key::ApproveJoins => switch(policy.approve_joins),
        }
    }

    /// Reads a value for it, and checks it.
    fn parse(self, text: &str) -> Result<PolicyChange, String> {
        let text = text.trim();
        let change = match self {
            Key::ReplaceAfter => PolicyChange::ReplaceAfterMs(parse_time(text)?),
            Key::MovesAtATime => PolicyChange::MovesAtATime(text.parse().map_err(|_| {
                format!("`{text}` is no number of shards from 1 to {MOVES_AT_A_TIME_MAX}; write it as 8")
            })?),
            Key::BytesPerSecond => PolicyChange::BytesPerSecond(parse_size(text)?),
            Key::Automatic => PolicyChange::Automatic(parse_switch(text)?),
            Key::ApproveJoins => PolicyChange::ApproveJoins(parse_switch(text)?),
        };
        check_setting(change).map(|()| change)
    }
}

/// Milliseconds: `10m`, `1h 30m`, a bare number of seconds; 0, in any unit, or `never`.
fn parse_time(text: &str) -> Result<u64, String> {
    if text == NEVER {
        return Ok(0);
    }
    let too_long = || {
        format!(
            "`{text}` is too long; the longest is {} days; say {NEVER}",
            REPLACE_AFTER_MS_MAX / 86_400_000
        )
    };
    let time = match text.parse::<u64>() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => humantime::parse_duration(text).map_err(|error| match error {
            humantime::DurationError::NumberOverflow => too_long(),
            error => format!("`{text}` is no time: {error}; write it as 90s, 10m, 1h, or {NEVER}"),
        })?,
    };
    let ms = u64::try_from(time.as_millis()).map_err(|_| too_long())?;
    if ms == 0 && !time.is_zero() { Err(format!("`{text}` is less than a millisecond")) } else { Ok(ms) }
}

const UNITS: [(&str, u64); 4] = [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];

/// Bytes: `32MiB`, `1 GiB`, a bare number of bytes; 0 or `unlimited`. Powers of 1024; a whole number of them.
fn parse_size(text: &str) -> Result<u64, String> {
    let wrong =
        || format!("`{text}` is no size; write it as 500KiB, 32MiB, 1GiB, a number of bytes, or {UNLIMITED}");
    if text == UNLIMITED {
        return Ok(0);
    }
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let unit = unit.trim_start().trim_end_matches("/s");
    let factor = match unit {
        "" | "B" => 1,
        unit => UNITS.iter().find(|(name, _)| *name == unit).map(|(_, factor)| *factor).ok_or_else(wrong)?,
    };
    number.checked_mul(factor).ok_or_else(|| {
        format!("`{text}` is too much; the most is {}; say {UNLIMITED}", exact_size(BYTES_PER_SECOND_MAX))
    })
}

fn parse_switch(text: &str) -> Result<bool, String> {
    match text {
        "on" | "true" | "yes" => Ok(true),
        "off" | "false" | "no" => Ok(false),
        _ => Err(format!("`{text}` is neither on nor off")),
    }
}

/// Bytes in the greatest unit of which they are a whole number.
fn exact_size(bytes: u64) -> String {
    match UNITS.iter().find(|(_, factor)| bytes > 0 && bytes.is_multiple_of(*factor)) {
        Some((name, factor)) => format!("{}{name}", bytes / factor),
        None => format!("{bytes}B"),
    }
}

/// `admin settings ...`
pub fn settings(context: &Context, command: &SettingsCommand) -> Result<Exit, Failure> {
    match command {
        SettingsCommand::Get(args) => get(context, args),
        SettingsCommand::Set(args) => set(context, args),
    }
}

fn json_of(key: Key, policy: &PolicyRecord) -> Value {
    json!({
        "key": key.name(),
        "value": key.json(policy),
        "default": key.json(&PolicyRecord::default()),
        "unit": key.unit(),
        "meaning": key.meaning(),
    })
}

fn get(context: &Context, args: &SettingsGetArgs) -> Result<Exit, Failure> {
    let policy = with_session(context, async |session| Ok(session.client.map().await?.policy))?;
    match (args.key, context.json()) {
        (Some(key), true) => output::json(&json_of(key, &policy))?,
        (Some(key), false) => output::line(key.text(&policy))?,
        (None, true) => {
            let all = KEYS.iter().map(|key| json_of(*key, &policy));
            output::json(&json!({"settings": all.collect::<Value>()}))?;
        }
        (None, false) => output::line(table(&policy))?,
    }
    Ok(Exit::Done)
}

fn table(policy: &PolicyRecord) -> String {
    let mut table = output::table(&["setting", "value", "default", "unit", "meaning"]);
    let unit = |key: Key| match key {
        Key::ReplaceAfter => "time",
        key => key.unit(),
    };
    for key in KEYS {
        table.add_row([
            key.name().to_owned(),
            key.text(policy),
            key.text(&PolicyRecord::default()),
            unit(key).to_owned(),
            key.meaning(),
        ]);
    }
    table.to_string()
}

fn set(context: &Context, args: &SettingsSetArgs) -> Result<Exit, Failure> {
    let key = args.key;
    let change =
        key.parse(&args.value).map_err(|why| Failure::usage("usage", format!("{}: {why}", key.name())))?;
    let (before, after) = with_session(context, async |session| {
        let before = session.client.map().await?.policy;
        let changed = session.client.change_setting(change, session.remaining()).await;
        changed.map_err(|error| {
            change_failed(&format!("setting {}", key.name()), "`pontoon admin settings get` tells", error)
        })?;
        let mut after = before;
        match change {
            PolicyChange::ReplaceAfterMs(ms) => after.replace_after_ms = ms,
            PolicyChange::MovesAtATime(moves) => after.moves_at_a_time = moves,
            PolicyChange::BytesPerSecond(bytes) => after.bytes_per_second = bytes,
            PolicyChange::Automatic(on) => after.automatic = on,
            PolicyChange::ApproveJoins(on) => after.approve_joins = on,
        }
        Ok((before, after))
    })?;
    if context.json() {
        let mut object = json_of(key, &after);
        object["before"] = key.json(&before);
        after_effect(output::json(&object))?;
    } else {
        after_effect(output::line(format!(
            "{} is {} (it was {})",
            key.name(),
            key.text(&after),
            key.text(&before)
        )))?;
    }
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_read_as_people_write_them() {
        use PolicyChange::{ApproveJoins, Automatic, BytesPerSecond, MovesAtATime, ReplaceAfterMs};
        for (key, text, change) in [
            (Key::ReplaceAfter, "10m", ReplaceAfterMs(600_000)),
            (Key::ReplaceAfter, "1h 30m", ReplaceAfterMs(5_400_000)),
            (Key::ReplaceAfter, "90", ReplaceAfterMs(90_000)),
            (Key::ReplaceAfter, "10500ms", ReplaceAfterMs(10_500)),
            (Key::ReplaceAfter, "never", ReplaceAfterMs(0)),
            (Key::ReplaceAfter, "0", ReplaceAfterMs(0)),
            (Key::ReplaceAfter, "0s", ReplaceAfterMs(0)),
            (Key::ReplaceAfter, "0ms", ReplaceAfterMs(0)),
            (Key::MovesAtATime, "8", MovesAtATime(8)),
            (Key::BytesPerSecond, "32MiB", BytesPerSecond(32 << 20)),
            (Key::BytesPerSecond, "1 GiB/s", BytesPerSecond(1 << 30)),
            (Key::BytesPerSecond, "65536", BytesPerSecond(65_536)),
            (Key::BytesPerSecond, "unlimited", BytesPerSecond(0)),
            (Key::BytesPerSecond, "0", BytesPerSecond(0)),
            (Key::Automatic, "off", Automatic(false)),
            (Key::ApproveJoins, " true ", ApproveJoins(true)),
        ] {
            assert_eq!(key.parse(text), Ok(change), "{text}");
        }
    }

    #[test]
    fn mistakes_are_told_with_the_way_out() {
        for (key, text, told) in [
            (Key::ReplaceAfter, "soon", "10m"),
            (Key::ReplaceAfter, "-5m", "10m"),
            (Key::ReplaceAfter, "9s", "the shortest is 10s"),
            (Key::ReplaceAfter, "150ms", "150ms is too short"),
            (Key::ReplaceAfter, "150ms", "the shortest is 10s"),
            (Key::ReplaceAfter, "100y", "the longest is 365 days"),
            (Key::ReplaceAfter, "99999999999999999999", "the longest is 365 days"),
            (Key::MovesAtATime, "99999999999", "1 to 1024"),
            (Key::BytesPerSecond, "2TiB", "the most is 1099511627776"),
            (Key::ReplaceAfter, "1us", "less than a millisecond"),
            (Key::MovesAtATime, "0", "1 to 1024"),
            (Key::MovesAtATime, "2.5", "write it as 8"),
            (Key::MovesAtATime, "1025", "1 to 1024"),
            (Key::BytesPerSecond, "32MB", "32MiB"),
            (Key::BytesPerSecond, "MiB", "32MiB"),
            (Key::BytesPerSecond, "", "32MiB"),
            (Key::BytesPerSecond, "1KiB", "65536"),
            (Key::BytesPerSecond, "99999999999TiB", "unlimited"),
            (Key::Automatic, "maybe", "on nor off"),
        ] {
            let error = key.parse(text).unwrap_err();
            assert!(error.contains(told), "{} {text}: {error}", key.name());
        }
    }

    #[test]
    fn what_is_shown_can_be_set_again() {
        let other = PolicyRecord {
            replace_after_ms: 90_500,
            moves_at_a_time: 3,
            bytes_per_second: 70_001,
            automatic: false,
            approve_joins: true,
            changed_at: 1,
        };
        let none = PolicyRecord { replace_after_ms: 0, bytes_per_second: 0, ..other };
        for policy in [PolicyRecord::default(), other, none] {
            for key in KEYS {
                let text = key.text(&policy);
                let expected = match key {
                    Key::ReplaceAfter => PolicyChange::ReplaceAfterMs(policy.replace_after_ms),
                    Key::MovesAtATime => PolicyChange::MovesAtATime(policy.moves_at_a_time),
                    Key::BytesPerSecond => PolicyChange::BytesPerSecond(policy.bytes_per_second),
                    Key::Automatic => PolicyChange::Automatic(policy.automatic),
                    Key::ApproveJoins => PolicyChange::ApproveJoins(policy.approve_joins),
                };
                assert_eq!(key.parse(&text), Ok(expected), "{text}");
            }
        }
    }

    #[test]
    fn each_is_listed_with_value_default_unit_and_meaning() {
        let policy = PolicyRecord { replace_after_ms: 0, ..PolicyRecord::default() };
        let table = table(&policy);
        for name in NAMES {
            assert!(table.contains(name), "{table}");
        }
        for text in ["never", "10m", "32MiB", "bytes/s", "on/off"] {
            assert!(table.contains(text), "{text}: {table}");
        }
        assert_eq!(
            json_of(Key::ReplaceAfter, &policy).to_string(),
            r#"{"key":"placement.replace_after","value":0,"default":600000,"unit":"ms","meaning":"a node gone for so long is replaced"}"#
        );
    }
}
