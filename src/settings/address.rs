//! Addresses: which can be dialled, in the one form in which two of them can be compared, and which
//! listeners get in each other's way.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Whether two listeners can't both have their port.
pub(super) fn collide(a: SocketAddr, b: SocketAddr) -> bool {
    a.port() == b.port()
        && a.port() != 0
        && (a.ip() == b.ip() || a.ip().is_unspecified() || b.ip().is_unspecified())
}

/// An address that others dial, in the one form in which two of them can be compared.
pub(super) struct Address {
    host: String,
    pub port: u16,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

/// Reads HOST:PORT; the host is a name, an IPv4 address, or an IPv6 address in brackets.
pub(super) fn parse_address(text: &str) -> Result<Address, String> {
    let malformed = || format!("{text:?} is not HOST:PORT, as \"node1.example:7201\" or \"[::1]:7201\"");
    let (host, port) = text.rsplit_once(':').ok_or_else(malformed)?;
    let digits = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
    let port: u16 = match port.parse() {
        Ok(port) if digits => port,
        _ if digits => return Err(format!("{text:?}: ports end at 65535")),
        _ => return Err(malformed()),
    };
    let bracketed = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
    let ip = match bracketed {
        Some(host) => Some(IpAddr::V6(host.parse::<Ipv6Addr>().map_err(|_| malformed())?)),
        None => host.parse::<Ipv4Addr>().ok().map(IpAddr::V4),
    };
    if ip.is_some_and(|ip| ip.is_unspecified()) {
        return Err(format!(
            "{text:?} can't be dialled from elsewhere; write the address at which others reach the node"
        ));
    }
    let host = match ip {
        Some(IpAddr::V6(ip)) => format!("[{ip}]"),
        Some(IpAddr::V4(ip)) => ip.to_string(),
        None if is_host_name(host) => host.to_ascii_lowercase(),
        None => return Err(malformed()),
    };
    Ok(Address { host, port })
}

fn is_host_name(host: &str) -> bool {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
    };
    // Digits and dots alone are a misspelt IPv4 address, never a name.
    host.len() <= 253
        && host.split('.').all(label)
        && !host.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_one_form() {
        for (text, form) in [
            ("127.0.0.1:7201", "127.0.0.1:7201"),
            ("Node1.Example:7201", "node1.example:7201"),
            ("[0:0::1]:7201", "[::1]:7201"),
            ("a_b-c:1", "a_b-c:1"),
            ("host:0", "host:0"),
        ] {
            let address = parse_address(text).map(|address| address.to_string());
            assert_eq!(address.as_deref(), Ok(form), "{text}");
        }
        for text in [
            "",
            ":",
            ":7201",
            "host",
            "host:",
            "host:x",
            "host:+1",
            "host:65536",
            "::1:7201",
            "[::1:7201",
            "[host]:1",
            "1.2.3:7201",
            "256.0.0.1:1",
            "a b:1",
            "-a:1",
            "a..b:1",
            "0.0.0.0:7201",
            "[::]:7201",
            "http://host:1",
        ] {
            assert!(parse_address(text).is_err(), "{text}");
        }
    }

    #[test]
    fn listeners_collide_only_on_one_port_of_one_address() {
        let collide = |a: &str, b: &str| collide(a.parse().unwrap(), b.parse().unwrap());
        assert!(collide("127.0.0.1:1", "127.0.0.1:1"));
        assert!(collide("0.0.0.0:1", "127.0.0.1:1"));
        assert!(collide("[::]:1", "127.0.0.1:1"));
        assert!(!collide("127.0.0.1:1", "127.0.0.2:1"));
        assert!(!collide("127.0.0.1:0", "127.0.0.1:0"));
        assert!(!collide("127.0.0.1:1", "127.0.0.1:2"));
    }
}
