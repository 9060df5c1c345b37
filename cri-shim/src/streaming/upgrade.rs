//! What a request asks to become, decided from its headers: SPDY or WebSocket, which version of
//! Kubernetes' protocol over it, or why not.

use hyper::header::{CONNECTION, HeaderMap, HeaderName, UPGRADE};

use super::websocket::channels::Protocol;

const STREAM_PROTOCOL: &str = "x-stream-protocol-version";
const WEBSOCKET_PROTOCOL: &str = "sec-websocket-protocol";
const WEBSOCKET_KEY: &str = "sec-websocket-key";
const WEBSOCKET_VERSION: &str = "sec-websocket-version";

const SPDY_COMMANDS: &[&str] =
    &["v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io"];
const SPDY_FORWARDS: &[&str] = &["portforward.k8s.io"];
const WEBSOCKET_COMMANDS: &[&str] = &[
    "v5.channel.k8s.io",
    "v4.channel.k8s.io",
    "v4.base64.channel.k8s.io",
    "channel.k8s.io",
    "base64.channel.k8s.io",
];
const WEBSOCKET_FORWARDS: &[&str] = &[TUNNEL, "v4.channel.k8s.io", "v4.base64.channel.k8s.io"];
const TUNNEL: &str = "SPDY/3.1+portforward.k8s.io";

/// What is asked for at an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// Exec and attach.
    Command,
    PortForward,
}

/// What a connection becomes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Upgrade {
    /// SPDY after the headers.
    Spdy { protocol: &'static str },
    /// SPDY within WebSocket messages.
    Tunnel { protocol: &'static str, key: String },
    /// WebSocket messages with a channel each.
    Channels { protocol: Option<&'static str>, key: String },
}

/// Why a request becomes nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The HTTP status code.
    pub status: u16,
    pub message: String,
    /// What would have been accepted, as headers of the answer.
    pub headers: Vec<(&'static str, &'static str)>,
}

impl Refusal {
    fn bad_request(message: String) -> Self {
        Refusal { status: 400, message, headers: Vec::new() }
    }
}

/// Decides by the request's headers; of several protocols the client's first that is known counts.
///
/// # Errors
/// A [`Refusal`] to answer with.
pub fn negotiate(headers: &HeaderMap, endpoint: Endpoint) -> Result<Upgrade, Refusal> {
    let upgrade = values(headers, UPGRADE);
    let asked = |name: &str| upgrade.iter().any(|v| v.eq_ignore_ascii_case(name));
    let upgrades = values(headers, CONNECTION).iter().any(|v| v.eq_ignore_ascii_case("upgrade"));
    if upgrades && asked("websocket") {
        return websocket(headers, endpoint);
    }
    if !upgrades || !asked("SPDY/3.1") {
        return Err(Refusal::bad_request(
            "unable to upgrade: ask for SPDY/3.1 or websocket in the headers Connection and Upgrade"
                .to_owned(),
        ));
    }
    let known = match endpoint {
        Endpoint::Command => SPDY_COMMANDS,
        Endpoint::PortForward => SPDY_FORWARDS,
    };
    let offered = values(headers, HeaderName::from_static(STREAM_PROTOCOL));
    if offered.is_empty() {
        let message = format!("unable to upgrade: header {STREAM_PROTOCOL} is missing");
        return Err(Refusal::bad_request(message));
    }
    match first_known(&offered, known) {
        Some(protocol) => Ok(Upgrade::Spdy { protocol }),
        None => Err(Refusal {
            status: 403,
            message: format!("unable to negotiate: offered {offered:?}, supported are {known:?}"),
            headers: known.iter().map(|p| ("x-accepted-stream-protocol-versions", *p)).collect(),
        }),
    }
}

fn websocket(headers: &HeaderMap, endpoint: Endpoint) -> Result<Upgrade, Refusal> {
    let version = values(headers, HeaderName::from_static(WEBSOCKET_VERSION));
    if version != ["13"] {
        return Err(Refusal {
            headers: vec![(WEBSOCKET_VERSION, "13")],
            ..Refusal::bad_request(format!("WebSocket version {version:?} is not 13"))
        });
    }
    let key = match values(headers, HeaderName::from_static(WEBSOCKET_KEY)).as_slice() {
        [key] if key.len() <= 64 => (*key).to_owned(),
        _ => return Err(Refusal::bad_request(format!("header {WEBSOCKET_KEY} is missing"))),
    };
    let known = match endpoint {
        Endpoint::Command => WEBSOCKET_COMMANDS,
        Endpoint::PortForward => WEBSOCKET_FORWARDS,
    };
    let offered = values(headers, HeaderName::from_static(WEBSOCKET_PROTOCOL));
    match first_known(&offered, known) {
        Some(protocol) if protocol == TUNNEL => Ok(Upgrade::Tunnel { protocol, key }),
        Some(protocol) => Ok(Upgrade::Channels { protocol: Some(protocol), key }),
        None if offered.is_empty() => Ok(Upgrade::Channels { protocol: None, key }),
        None => Err(Refusal {
            status: 403,
            message: format!("unable to negotiate: offered {offered:?}, supported are {known:?}"),
            headers: Vec::new(),
        }),
    }
}

/// The version of the remote command protocol by its name; a client that names none speaks the first.
pub fn version(protocol: Option<&str>) -> u8 {
    let digit = protocol.and_then(|p| p.strip_prefix('v')).and_then(|p| p.bytes().next());
    digit.filter(u8::is_ascii_digit).map_or(1, |digit| digit - b'0')
}

/// How a protocol with channels uses them.
pub fn channels(protocol: Option<&str>) -> Protocol {
    Protocol {
        base64: protocol.is_some_and(|p| p.contains("base64.")),
        close: version(protocol) >= 5,
    }
}

/// The comma-separated values of all headers of a name.
fn values(headers: &HeaderMap, name: HeaderName) -> Vec<&str> {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .filter(|value| !value.is_empty())
        .collect()
}

fn first_known(offered: &[&str], known: &[&'static str]) -> Option<&'static str> {
    offered.iter().find_map(|offer| known.iter().find(|known| *known == offer).copied())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in pairs {
            map.append(*name, value.parse().unwrap());
        }
        map
    }

    fn spdy(protocols: &'static str) -> HeaderMap {
        headers(&[("connection", "Upgrade"), ("upgrade", "SPDY/3.1"), (STREAM_PROTOCOL, protocols)])
    }

    fn web(protocols: &'static str) -> HeaderMap {
        headers(&[
            ("connection", "keep-alive, Upgrade"),
            ("upgrade", "WebSocket"),
            (WEBSOCKET_VERSION, "13"),
            (WEBSOCKET_KEY, "key"),
            (WEBSOCKET_PROTOCOL, protocols),
        ])
    }

    #[test]
    fn the_clients_first_known_protocol_is_taken() {
        let asked = spdy("v9.channel.k8s.io, v3.channel.k8s.io,v4.channel.k8s.io");
        let taken = negotiate(&asked, Endpoint::Command);
        assert_eq!(taken, Ok(Upgrade::Spdy { protocol: "v3.channel.k8s.io" }));
        let taken = negotiate(&spdy("portforward.k8s.io"), Endpoint::PortForward);
        assert_eq!(taken, Ok(Upgrade::Spdy { protocol: "portforward.k8s.io" }));
        let key = || "key".to_owned();
        let taken = negotiate(&web("v5.channel.k8s.io, v4.channel.k8s.io"), Endpoint::Command);
        let protocol = Some("v5.channel.k8s.io");
        assert_eq!(taken, Ok(Upgrade::Channels { protocol, key: key() }));
        let taken = negotiate(&web("SPDY/3.1+portforward.k8s.io"), Endpoint::PortForward);
        assert_eq!(taken, Ok(Upgrade::Tunnel { protocol: TUNNEL, key: key() }));
        let taken = negotiate(&web(""), Endpoint::Command);
        assert_eq!(taken, Ok(Upgrade::Channels { protocol: None, key: key() }));
    }

    #[test]
    fn what_cannot_be_agreed_on_is_refused_with_what_could() {
        let status =
            |headers: &HeaderMap, endpoint| negotiate(headers, endpoint).unwrap_err().status;
        assert_eq!(status(&headers(&[]), Endpoint::Command), 400);
        assert_eq!(status(&spdy(""), Endpoint::Command), 400);
        assert_eq!(status(&spdy("v4.channel.k8s.io"), Endpoint::PortForward), 403);
        assert_eq!(status(&web("SPDY/3.1+portforward.k8s.io"), Endpoint::Command), 403);
        let refusal = negotiate(&spdy("v9.channel.k8s.io"), Endpoint::Command).unwrap_err();
        assert_eq!(refusal.headers.len(), SPDY_COMMANDS.len());
        let mut old = web("v4.channel.k8s.io");
        old.insert(WEBSOCKET_VERSION, "8".parse().unwrap());
        assert_eq!(status(&old, Endpoint::Command), 400);
    }

    #[test]
    fn names_say_version_and_encoding() {
        let cases = [
            (None, 1, false, false),
            (Some("channel.k8s.io"), 1, false, false),
            (Some("base64.channel.k8s.io"), 1, true, false),
            (Some("v4.base64.channel.k8s.io"), 4, true, false),
            (Some("v5.channel.k8s.io"), 5, false, true),
        ];
        for (protocol, number, base64, close) in cases {
            assert_eq!(version(protocol), number);
            assert_eq!(channels(protocol), Protocol { base64, close });
        }
    }
}
