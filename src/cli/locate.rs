//! Where the cluster is: named by addresses, or the local one in a directory.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::args::Global;
use super::failure::Failure;

/// The environment variables that say where the cluster is; an empty one counts as unset.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Environment {
    /// `PONTOON_CLUSTER`: client addresses.
    pub cluster: Option<OsString>,
    /// `PONTOON_DATA`: directory of the local cluster.
    pub data: Option<OsString>,
    /// `XDG_DATA_HOME`
    pub xdg_data_home: Option<OsString>,
    /// `HOME`
    pub home: Option<OsString>,
}

impl Environment {
    /// That of this process.
    pub fn of_process() -> Environment {
        let read = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        Environment {
            cluster: read("PONTOON_CLUSTER"),
            data: read("PONTOON_DATA"),
            xdg_data_home: read("XDG_DATA_HOME"),
            home: read("HOME"),
        }
    }
}

/// Where the cluster is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// At these client addresses.
    Addresses(Vec<String>),
    /// The local cluster in this directory, if there is one.
    Local(PathBuf),
}

/// Finds where the cluster is: `--cluster`, else `PONTOON_CLUSTER`, else the local one in [`data_dir`].
pub fn place(global: &Global, environment: &Environment) -> Result<Place, Failure> {
    if let Some(list) = &global.cluster {
        return addresses("--cluster", list).map(Place::Addresses);
    }
    if let Some(list) = &environment.cluster {
        return addresses("PONTOON_CLUSTER", &list.to_string_lossy()).map(Place::Addresses);
    }
    data_dir(global, environment).map(Place::Local)
}

/// The directory of the local cluster: `--data`, else `PONTOON_DATA`, else
/// `$XDG_DATA_HOME/pontoon` (which counts only if it is absolute, as its specification says), else
/// `~/.local/share/pontoon`. Always absolute, so that its name is the same in every message and for a
/// process that runs elsewhere.
pub fn data_dir(global: &Global, environment: &Environment) -> Result<PathBuf, Failure> {
    let dir = if let Some(dir) = &global.data {
        dir.clone()
    } else if let Some(dir) = &environment.data {
        PathBuf::from(dir)
    } else if let Some(base) = environment.xdg_data_home.as_ref().filter(|base| Path::new(base).is_absolute())
    {
        PathBuf::from(base).join("pontoon")
    } else if let Some(home) = &environment.home {
        PathBuf::from(home).join(".local/share/pontoon")
    } else {
        return Err(Failure::usage(
            "no_directory",
            "there is no place for a local cluster: HOME is not set; name a directory with --data \
             or PONTOON_DATA",
        ));
    };
    std::path::absolute(&dir).map_err(|error| Failure::io("using", &dir, error))
}

/// Reads `HOST:PORT,...`.
fn addresses(source: &str, list: &str) -> Result<Vec<String>, Failure> {
    let addresses: Vec<String> =
        list.split(',').map(str::trim).filter(|address| !address.is_empty()).map(str::to_owned).collect();
    if addresses.is_empty() {
        return Err(Failure::usage(
            "usage",
            format!("{source} names no address; write it as HOST:PORT,HOST:PORT"),
        ));
    }
    for address in &addresses {
        let good = address.rsplit_once(':').is_some_and(|(host, port)| {
            let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
            let host = bare.unwrap_or(host);
            // A bare IPv6 address can't be told from one with a port.
            !host.is_empty()
                && (bare.is_some() || !host.contains(':'))
                && port.parse::<u16>().is_ok_and(|port| port != 0)
        });
        if !good {
            return Err(Failure::usage(
                "usage",
                format!(
                    "{source}: `{address}` is not an address; write it as HOST:PORT, for instance \
                     127.0.0.1:7101 or [::1]:7101"
                ),
            ));
        }
    }
    Ok(addresses)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::failure::Exit;

    fn global(cluster: Option<&str>, data: Option<&str>) -> Global {
        Global { cluster: cluster.map(Into::into), data: data.map(Into::into), ..Global::default() }
    }

    fn environment(fields: [Option<&str>; 4]) -> Environment {
        let [cluster, data, xdg_data_home, home] = fields.map(|f| f.map(OsString::from));
        Environment { cluster, data, xdg_data_home, home }
    }

    #[test]
    fn the_order_of_places() {
        let all = environment([Some("e:1"), Some("/data"), Some("/xdg"), Some("/home")]);
        let found = place(&global(Some("f:1,g:2"), Some("/flag")), &all).unwrap();
        assert_eq!(found, Place::Addresses(vec!["f:1".into(), "g:2".into()]));
        let found = place(&global(None, Some("/flag")), &all).unwrap();
        assert_eq!(found, Place::Addresses(vec!["e:1".into()]));
        for (data, fields, dir) in [
            (Some("/flag"), [None, Some("/data"), Some("/xdg"), Some("/home")], "/flag"),
            (None, [None, Some("/data"), Some("/xdg"), Some("/home")], "/data"),
            (None, [None, None, Some("/xdg"), Some("/home")], "/xdg/pontoon"),
            (None, [None, None, None, Some("/home")], "/home/.local/share/pontoon"),
            (None, [None, None, Some("xdg"), Some("/home")], "/home/.local/share/pontoon"),
        ] {
            let found = place(&global(None, data), &environment(fields)).unwrap();
            assert_eq!(found, Place::Local(dir.into()));
        }
        let failure = place(&global(None, None), &Environment::default()).unwrap_err();
        assert_eq!(failure.exit, Exit::Usage);
    }

    #[test]
    fn addresses_are_checked() {
        for good in ["h:1", "h:1, i:2,", "127.0.0.1:7101", "[::1]:7101"] {
            assert!(addresses("x", good).is_ok(), "{good}");
        }
        for bad in ["", ",", "h", "h:", ":1", "h:0", "h:65536", "::1:7101", "[]:1", "h:x"] {
            assert!(addresses("x", bad).is_err(), "{bad}");
        }
    }
}
