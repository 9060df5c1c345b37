//! Which hosts to ask for an image: mirrors and per-registry settings as in containerd's
//! `hosts.toml` (containerd docs/hosts.md). Pure, but for [`load`].

use std::{
    collections::BTreeMap,
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use reqwest::header::{HeaderName, HeaderValue};
use serde::Deserialize;

use super::ImageError;

/// One host to ask, in order of preference.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Host {
    pub(crate) scheme: Scheme,
    /// Host and port.
    pub(crate) address: String,
    /// Where the API is: `/v2`, or what `override_path` says.
    pub(crate) path: String,
    /// Whether it stands in for another registry and is told so by `?ns=`.
    pub(crate) mirror: bool,
    /// Whether it may be asked for content.
    pub(crate) pull: bool,
    /// Whether it may turn a tag into a digest.
    pub(crate) resolve: bool,
    pub(crate) skip_verify: bool,
    /// PEM files that vouch for it, beside the system's.
    pub(crate) ca: Vec<PathBuf>,
    /// PEM files of client certificates, each with its key's file where that is another.
    pub(crate) client: Vec<(PathBuf, Option<PathBuf>)>,
    /// Sent with each request to this host, and to no other.
    pub(crate) headers: Vec<(String, String)>,
    /// How long connecting may take, if the store's default is not meant.
    pub(crate) dial_timeout: Option<Duration>,
}

/// What is spoken to a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scheme {
    Https,
    Http,
    /// On loopback, without a word on it in the configuration: whichever of the two it answers.
    Either,
}

#[derive(Deserialize)]
struct File {
    server: Option<String>,
    #[serde(default)]
    host: toml::Table,
    #[serde(flatten)]
    own: Settings,
}

#[derive(Default, Deserialize)]
struct Settings {
    capabilities: Option<Vec<String>>,
    ca: Option<OneOrMany<PathBuf>>,
    client: Option<OneOrMany<ClientPair>>,
    #[serde(default)]
    skip_verify: bool,
    #[serde(default)]
    override_path: bool,
    header: Option<BTreeMap<String, OneOrMany<String>>>,
    dial_timeout: Option<String>,
}

#[derive(Clone, Deserialize)]
#[serde(untagged)]
enum OneOrMany<T> {
    Many(Vec<T>),
    One(T),
}

impl<T: Clone> OneOrMany<T> {
    fn list(&self) -> &[T] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Many(many) => many,
        }
    }
}

/// A file with certificate and key, or two files.
#[derive(Clone, Deserialize)]
#[serde(untagged)]
enum ClientPair {
    File(PathBuf),
    Pair([PathBuf; 2]),
}

/// Reads the settings for `registry` from the first of `folders` that exists.
///
/// # Errors
/// [`ImageError::Config`] for a file that can't be used.
pub(crate) fn load(registry: &str, folders: &[PathBuf]) -> Result<Vec<Host>, ImageError> {
    let Some(base) = folders.iter().find(|folder| folder.is_dir()) else {
        return Ok(vec![origin(registry)]);
    };
    let Some(folder) =
        folder_names(registry).iter().map(|name| base.join(name)).find(|folder| folder.is_dir())
    else {
        return Ok(vec![origin(registry)]);
    };
    let path = folder.join("hosts.toml");
    match fs::read_to_string(&path) {
        Ok(text) if !text.is_empty() => plan(registry, &folder, &text)
            .map_err(|reason| ImageError::Config { path: path.clone(), reason }),
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(ImageError::io("read", &path)(error))
        }
        _ => {
            let entries = fs::read_dir(&folder).map_err(ImageError::io("read", &folder))?;
            let files: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
            Ok(vec![with_certificates(origin(registry), files)])
        }
    }
}

/// The folders that may hold a registry's settings, the most special first. A colon is no
/// character of file names everywhere, so there is a form without.
fn folder_names(registry: &str) -> Vec<String> {
    let mut names = Vec::new();
    if let Some((host, port)) = registry.rsplit_once(':') {
        names.push(format!("{host}_{port}_"));
    }
    names.extend([registry.to_owned(), "_default".to_owned()]);
    names
}

/// Docker's older layout, files alone: `*.crt` are CAs, `*.cert` client certificates with their
/// `*.key` beside them.
fn with_certificates(mut host: Host, mut files: Vec<PathBuf>) -> Host {
    files.sort();
    let is = |path: &&PathBuf, kind: &str| path.extension().is_some_and(|have| have == kind);
    host.ca = files.iter().filter(|path| is(path, "crt")).cloned().collect();
    host.client = files
        .iter()
        .filter(|path| is(path, "cert"))
        .map(|path| {
            let key = path.with_extension("key");
            let key = files.contains(&key).then_some(key);
            (path.clone(), key)
        })
        .collect();
    host
}

/// The registry itself. A loopback one may speak plain http.
fn origin(registry: &str) -> Host {
    let address = if registry == "docker.io" { "registry-1.docker.io" } else { registry };
    Host {
        scheme: if is_loopback(registry) { Scheme::Either } else { Scheme::Https },
        address: address.to_owned(),
        path: "/v2".to_owned(),
        mirror: false,
        pull: true,
        resolve: true,
        skip_verify: false,
        ca: Vec::new(),
        client: Vec::new(),
        headers: Vec::new(),
        dial_timeout: None,
    }
}

fn is_loopback(registry: &str) -> bool {
    let host = match registry.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((v6, _)) => v6,
        None => registry.split(':').next().unwrap_or(registry),
    };
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// Plans the hosts from a `hosts.toml` in `folder`: those listed in their order, then the server,
/// which is the registry itself unless the file names another.
pub(crate) fn plan(registry: &str, folder: &Path, text: &str) -> Result<Vec<Host>, String> {
    let file: File = toml::from_str(text).map_err(|error| error.to_string())?;
    let mut hosts = Vec::new();
    for (url, settings) in file.host {
        let settings: Settings =
            settings.try_into().map_err(|error| format!("host {url:?}: {error}"))?;
        hosts.push(host(&url, &settings, registry, folder)?);
    }
    let server = file.server.filter(|server| !server.is_empty());
    match server {
        Some(url) => hosts.push(host(&url, &file.own, registry, folder)?),
        // The file may be about nothing but the registry itself.
        None if hosts.iter().any(|host| !host.mirror) => {}
        None => hosts.push(set(origin(registry), &file.own, folder)?),
    }
    hosts.retain(|host| host.pull || host.resolve);
    Ok(hosts)
}

fn host(url: &str, settings: &Settings, registry: &str, folder: &Path) -> Result<Host, String> {
    let (scheme, rest) = match url.split_once("://") {
        Some(("https", rest)) => (Scheme::Https, rest),
        Some(("http", rest)) => (Scheme::Http, rest),
        Some((scheme, _)) => return Err(format!("host {url:?}: unknown scheme {scheme:?}")),
        None => (Scheme::Https, url),
    };
    let (address, path) = rest.split_once('/').unwrap_or((rest, ""));
    let bad = |c: char| c.is_whitespace() || c.is_control() || matches!(c, '@' | '?' | '#' | '\\');
    if address.is_empty() || address.contains(bad) {
        return Err(format!("host {url:?}: no host name"));
    }
    if path.contains(bad) || path.split('/').any(|part| matches!(part, "." | "..")) {
        return Err(format!("host {url:?}: the path is not a plain one"));
    }
    let parts: Vec<_> = path.split('/').filter(|part| !part.is_empty()).collect();
    let mut path: String = parts.iter().flat_map(|part| ["/", part]).collect();
    // Without override_path the API is at <path>/v2; with it, the path is where the API is.
    if !settings.override_path && parts.last() != Some(&"v2") {
        path.push_str("/v2");
    }
    let docker = registry == "docker.io" && is_docker_hub(address);
    let planned = Host {
        scheme,
        mirror: address != registry && !docker,
        address: if address == "docker.io" { "registry-1.docker.io" } else { address }.to_owned(),
        path,
        ..origin(registry)
    };
    set(planned, settings, folder).map_err(|reason| format!("host {url:?}: {reason}"))
}

fn is_docker_hub(address: &str) -> bool {
    matches!(address, "docker.io" | "index.docker.io" | "registry-1.docker.io")
}

/// Takes over what the file says beside the address.
fn set(mut host: Host, settings: &Settings, folder: &Path) -> Result<Host, String> {
    if let Some(capabilities) = settings.capabilities.as_ref().filter(|list| !list.is_empty()) {
        let known = ["pull", "resolve", "push", "referrers"];
        let lower: Vec<_> = capabilities.iter().map(|have| have.to_ascii_lowercase()).collect();
        if let Some(unknown) = lower.iter().find(|have| !known.contains(&have.as_str())) {
            return Err(format!("unknown capability {unknown:?}"));
        }
        let can = |what: &str| lower.iter().any(|have| have == what);
        (host.pull, host.resolve) = (can("pull"), can("resolve"));
    }
    host.skip_verify = settings.skip_verify;
    let files = |list: &OneOrMany<PathBuf>| -> Vec<_> {
        list.list().iter().map(|path| folder.join(path)).collect()
    };
    host.ca = settings.ca.as_ref().map(files).unwrap_or_default();
    let pair = |pair: &ClientPair| match pair {
        ClientPair::File(both) => (folder.join(both), None),
        ClientPair::Pair([certificate, key]) => (folder.join(certificate), Some(folder.join(key))),
    };
    host.client = settings.client.iter().flat_map(|list| list.list().iter().map(pair)).collect();
    for (name, values) in settings.header.iter().flatten() {
        for value in values.list() {
            let fits = HeaderName::from_bytes(name.as_bytes()).is_ok()
                && HeaderValue::from_str(value).is_ok();
            if !fits {
                return Err(format!("header {name:?} can't be sent"));
            }
            host.headers.push((name.clone(), value.clone()));
        }
    }
    host.dial_timeout = settings
        .dial_timeout
        .as_deref()
        .filter(|text| !text.is_empty())
        .map(|text| {
            duration(text).ok_or_else(|| format!("dial_timeout {text:?} is not like \"1m30s\""))
        })
        .transpose()?;
    Ok(host)
}

/// A duration as Go writes it, such as `1m30s` or `1.5s`.
fn duration(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let unit = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let seconds = match &rest[..unit] {
            "ns" => 1e-9,
            "us" | "µs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        rest = &rest[unit..];
        total = total.checked_add(Duration::try_from_secs_f64(number * seconds).ok()?)?;
    }
    (!text.is_empty()).then_some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(hosts: &[Host]) -> Vec<String> {
        hosts
            .iter()
            .map(|h| {
                let scheme = match h.scheme {
                    Scheme::Https => "https",
                    Scheme::Http => "http",
                    Scheme::Either => "either",
                };
                format!("{scheme}://{}{}{}", h.address, h.path, if h.mirror { " ns" } else { "" })
            })
            .collect()
    }

    #[test]
    fn hosts_are_asked_in_the_files_order_and_the_server_last() {
        let text = r#"
            server = "https://docker.io"
            [host."http://z-mirror:5000"]
              capabilities = ["pull", "resolve"]
            [host."https://harbor.lan/v2/hub/"]
              override_path = true
              ca = ["a.pem", "/b.pem"]
            [host."https://a-mirror/sub"]
              skip_verify = true
              capabilities = ["pull"]
            [host."https://push-only"]
              capabilities = ["push"]
            [host."https://bare"]
              override_path = true
            [host."same:5000/v2"]
        "#;
        let hosts = plan("docker.io", Path::new("/etc/x"), text).unwrap();
        assert_eq!(
            shown(&hosts),
            [
                "http://z-mirror:5000/v2 ns",
                "https://harbor.lan/v2/hub ns",
                "https://a-mirror/sub/v2 ns",
                "https://bare ns",
                "https://same:5000/v2 ns",
                "https://registry-1.docker.io/v2",
            ]
        );
        assert_eq!(hosts[1].ca, [Path::new("/etc/x/a.pem"), Path::new("/b.pem")]);
        assert!(hosts[2].skip_verify && hosts[2].pull && !hosts[2].resolve);
    }

    #[test]
    fn certificates_headers_and_timeouts_have_several_forms() {
        let pair = |c: &str, k: &str| (PathBuf::from(c), Some(PathBuf::from(k)));
        let both = |path: &str| (PathBuf::from(path), None);
        for (client, want) in [
            (r#""both.pem""#, vec![both("/x/both.pem")]),
            (r#"["a.pem", "/b.pem"]"#, vec![both("/x/a.pem"), both("/b.pem")]),
            (r#"[["c", "k"], ["/d", "/l"]]"#, vec![pair("/x/c", "/x/k"), pair("/d", "/l")]),
            (r#"[["c", "k"], "both"]"#, vec![pair("/x/c", "/x/k"), both("/x/both")]),
        ] {
            let text = format!("[host.\"https://h\"]\nclient = {client}");
            assert_eq!(plan("quay.io", Path::new("/x"), &text).unwrap()[0].client, want);
        }
        let text = r#"
            dial_timeout = "1m1.5s"
            ca = "own.pem"
            [host."https://h".header]
              x-one = "1"
              x-two = ["2", "3"]
        "#;
        let hosts = plan("quay.io", Path::new("/x"), text).unwrap();
        let header = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(
            hosts[0].headers,
            [header("x-one", "1"), header("x-two", "2"), header("x-two", "3")]
        );
        // What stands at the top is about the registry itself.
        assert_eq!(shown(&hosts), ["https://h/v2 ns", "https://quay.io/v2"]);
        assert_eq!(hosts[1].dial_timeout, Some(Duration::from_millis(61_500)));
        assert_eq!((hosts[1].ca.len(), hosts[0].ca.len()), (1, 0));
        for (text, want) in [("3s", Some(3000)), ("250ms", Some(250)), ("5", None), ("s", None)] {
            assert_eq!(duration(text), want.map(Duration::from_millis), "{text}");
        }
    }

    #[test]
    fn without_a_file_the_registry_itself_is_asked() {
        assert_eq!(shown(&[origin("quay.io")]), ["https://quay.io/v2"]);
        assert_eq!(shown(&[origin("docker.io")]), ["https://registry-1.docker.io/v2"]);
        for loopback in ["localhost:5000", "127.0.0.9", "[::1]:5000"] {
            assert_eq!(origin(loopback).scheme, Scheme::Either);
        }
        assert_eq!(folder_names("a.b:5000"), ["a.b_5000_", "a.b:5000", "_default"]);
        assert_eq!(folder_names("[::1]:5000"), ["[::1]_5000_", "[::1]:5000", "_default"]);
        assert_eq!(folder_names("quay.io"), ["quay.io", "_default"]);
        let files = ["b.crt", "a.cert", "a.key", "c.cert", "x.txt"].map(PathBuf::from);
        let host = with_certificates(origin("quay.io"), files.to_vec());
        assert_eq!(host.ca, [Path::new("b.crt")]);
        let key = Some(PathBuf::from("a.key"));
        assert_eq!(host.client, [("a.cert".into(), key), ("c.cert".into(), None)]);
    }

    #[test]
    fn unusable_files_say_why() {
        for (text, want) in [
            ("server = ", "TOML"),
            ("[host.\"ftp://x\"]", "scheme"),
            ("[host.\"https://\"]", "host name"),
            ("[host.\"https://user:pw@x\"]", "host name"),
            ("[host.\"https://x/../y\"]", "path"),
            ("[host.\"https://x\"]\nclient = [[\"c\"]]", "client"),
            ("[host.\"https://x\"]\nskip_verify = 3", "boolean"),
            ("[host.\"https://x\"]\ncapabilities = [\"fly\"]", "fly"),
            ("[host.\"https://x\".header]\n\"a b\" = \"c\"", "a b"),
            ("[host.\"https://x\"]\ndial_timeout = \"soon\"", "soon"),
        ] {
            let error = plan("quay.io", Path::new("/"), text).err().unwrap();
            assert!(error.contains(want), "{text}: {error}");
        }
    }

    proptest::proptest! {
        #[test]
        fn whatever_is_planned_has_a_host(
            url in r"(https?://)?[a-z0-9.:/@_\[\]-]{0,20}",
            line in r#"(capabilities|ca|client|header|dial_timeout|skip_verify) = [a-z0-9"\[\],]{0,12}"#,
        ) {
            let text = format!("[host.\"{url}\"]\n{line}");
            for host in plan("quay.io", Path::new("/x"), &text).unwrap_or_default() {
                proptest::prop_assert!(!host.address.is_empty());
                proptest::prop_assert!(!host.path.contains("//"));
            }
        }
    }
}
