//! Keys and values in JSON: as text where both are UTF-8, else both in base64.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::failure::Failure;
use crate::client::Versioned;
use crate::limits::{KEY_BYTES_MAX, VALUE_BYTES_MAX};

/// How bytes are written in JSON.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Encoding {
    /// As text.
    #[default]
    Utf8,
    /// In base64 with padding.
    Base64,
}

/// A key and its value in JSON.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Record {
    /// The key.
    pub key: String,
    /// The value; `None` if there is none or it was not asked for.
    pub value: Option<String>,
    /// Of key and value.
    pub encoding: Encoding,
    /// The version that wrote the value; `None` if there is none.
    pub version: Option<u64>,
}

impl Record {
    /// A key with what was found there.
    pub fn new(key: &[u8], found: Option<&Versioned>) -> Record {
        Record::of(key, found.map(|v| &v.value[..]), found.map(|v| v.version))
    }

    /// A key alone, with the version of its value.
    pub fn key_only(key: &[u8], version: u64) -> Record {
        Record::of(key, None, Some(version))
    }

    /// A key alone, of which nothing is known.
    pub fn of_key(key: &[u8]) -> Record {
        Record::of(key, None, None)
    }

    fn of(key: &[u8], value: Option<&[u8]>, version: Option<u64>) -> Record {
        let texts = (std::str::from_utf8(key), value.map(std::str::from_utf8).transpose());
        if let (Ok(key), Ok(value)) = texts {
            return Record {
                key: key.to_owned(),
                value: value.map(str::to_owned),
                encoding: Encoding::Utf8,
                version,
            };
        }
        Record {
            key: STANDARD.encode(key),
            value: value.map(|value| STANDARD.encode(value)),
            encoding: Encoding::Base64,
            version,
        }
    }

    /// As a JSON object.
    pub fn json(&self) -> serde_json::Value {
        serde_json::json!({
            "key": self.key,
            "value": self.value,
            "encoding": self.encoding,
            "version": self.version,
        })
    }

    /// As the JSON object that `get` prints.
    pub fn json_found(&self) -> serde_json::Value {
        let mut object = self.json();
        object["found"] = self.version.is_some().into();
        object
    }
}

/// A line of an import: only key and value are taken from it.
#[derive(Deserialize)]
struct ImportLine {
    key: String,
    value: String,
    #[serde(default)]
    encoding: Encoding,
}

/// Reads a line of an import. The error says what is wrong with it.
pub fn parse_line(line: &[u8]) -> Result<(Bytes, Bytes), String> {
    let record: ImportLine = serde_json::from_slice(line)
        .map_err(|error| error.to_string().replace(" at line 1 column", " at column"))?;
    let (key, value) = match record.encoding {
        Encoding::Utf8 => (record.key.into_bytes(), record.value.into_bytes()),
        Encoding::Base64 => {
            let decode = |what: &str, text: &str| {
                STANDARD.decode(text).map_err(|error| format!("the {what} is not base64: {error}"))
            };
            (decode("key", &record.key)?, decode("value", &record.value)?)
        }
    };
    check_key(&key)?;
    check_value(&value)?;
    Ok((key.into(), value.into()))
}

/// A key from the command line, checked before anybody is asked.
pub fn key(argument: OsString) -> Result<Bytes, Failure> {
    let bytes = argument.into_vec();
    check_key(&bytes).map_err(|reason| Failure::usage("invalid", reason))?;
    Ok(bytes.into())
}

/// A value, checked before anybody is asked.
pub fn value(bytes: Vec<u8>) -> Result<Bytes, Failure> {
    check_value(&bytes).map_err(|reason| Failure::usage("invalid", reason))?;
    Ok(bytes.into())
}

/// The bytes of an argument.
pub fn argument(argument: OsString) -> Vec<u8> {
    argument.into_vec()
}

fn check_key(key: &[u8]) -> Result<(), String> {
    if key.is_empty() {
        return Err("the key is empty; a key has at least one byte".into());
    }
    if key.len() > KEY_BYTES_MAX {
        return Err(format!("the key has {} bytes; the longest key has {KEY_BYTES_MAX}", key.len()));
    }
    Ok(())
}

fn check_value(value: &[u8]) -> Result<(), String> {
    if value.len() > VALUE_BYTES_MAX {
        return Err(format!("the value has {} bytes; the longest value has {VALUE_BYTES_MAX}", value.len()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn versioned(value: &[u8], version: u64) -> Versioned {
        Versioned { value: Bytes::copy_from_slice(value), version }
    }

    #[test]
    fn the_object_has_the_documented_shape() {
        let found = Record::new(b"bob", Some(&versioned(b"hello", 7)));
        assert_eq!(
            found.json_found().to_string(),
            r#"{"key":"bob","value":"hello","encoding":"utf8","version":7,"found":true}"#
        );
        assert_eq!(
            Record::new(b"bob", None).json_found().to_string(),
            r#"{"key":"bob","value":null,"encoding":"utf8","version":null,"found":false}"#
        );
        assert_eq!(
            Record::new(b"bob", Some(&versioned(b"\xff\x00", 1))).json().to_string(),
            r#"{"key":"Ym9i","value":"/wA=","encoding":"base64","version":1}"#
        );
        assert_eq!(
            Record::new(b"\xff", Some(&versioned(b"text", 1))).json().to_string(),
            r#"{"key":"/w==","value":"dGV4dA==","encoding":"base64","version":1}"#
        );
    }

    #[test]
    fn bad_lines_say_why() {
        for (line, reason) in [
            (r#"{"key":"a"}"#, "value"),
            (r#"{"value":"a"}"#, "key"),
            (r#"{"key":"","value":"a"}"#, "empty"),
            (r#"{"key":"!","value":"a","encoding":"base64"}"#, "base64"),
            (r#"{"key":"a","value":"a","encoding":"hex"}"#, "hex"),
            ("nonsense", "expected"),
            ("", "EOF"),
        ] {
            let error = parse_line(line.as_bytes()).unwrap_err();
            assert!(error.contains(reason), "{line}: {error}");
        }
        let long = format!(r#"{{"key":"{}","value":""}}"#, "k".repeat(KEY_BYTES_MAX + 1));
        assert!(parse_line(long.as_bytes()).unwrap_err().contains("4096"));
    }

    #[test]
    fn limits_hold_before_anybody_is_asked() {
        assert!(key("".into()).is_err());
        assert!(key("k".repeat(KEY_BYTES_MAX).into()).is_ok());
        assert!(key("k".repeat(KEY_BYTES_MAX + 1).into()).is_err());
        assert!(value(vec![0; VALUE_BYTES_MAX]).is_ok());
        assert!(value(vec![0; VALUE_BYTES_MAX + 1]).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]
        #[test]
        fn every_pair_survives_export_and_import(
            key in proptest::collection::vec(any::<u8>(), 1..40),
            value in proptest::collection::vec(any::<u8>(), 0..80),
        ) {
            let line = Record::new(&key, Some(&versioned(&value, 3))).json().to_string();
            prop_assert!(!line.contains('\n'));
            let (k, v) = parse_line(line.as_bytes()).unwrap();
            prop_assert_eq!((&k[..], &v[..]), (&key[..], &value[..]));
        }
    }
}
