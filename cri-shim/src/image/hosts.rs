//! Which hosts to ask for an image: mirrors and per-registry settings as in containerd's
//! `hosts.toml` (containerd docs/hosts.md). Pure, but for [`load`].

use std::{
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use super::ImageError;

/// One host to ask, in order of preference.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Host {
    pub(crate) plain_http: bool,
    /// Host, port, and the path before `/v2/` if there is one.
    pub(crate) authority: String,
    /// Goes before the repository: the path behind `/v2/`.
    pub(crate) repository_prefix: String,
    /// Whether it stands in for another registry and is told so by `?ns=`.
    pub(crate) mirror: bool,
    /// Whether it may turn a tag into a digest.
    pub(crate) resolve: bool,
    pub(crate) skip_verify: bool,
    pub(crate) ca: Vec<PathBuf>,
    /// Only asked when the one before it could not be talked to: plain http on loopback.
    pub(crate) only_after_failed_tls: bool,
    /// Whether a first failure is enough, as the next host is the same over plain http.
    pub(crate) probe: bool,
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
    ca: Option<OneOrMany>,
    client: Option<toml::Value>,
    #[serde(default)]
    skip_verify: bool,
    #[serde(default)]
    override_path: bool,
    header: Option<toml::Value>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(PathBuf),
    Many(Vec<PathBuf>),
}

/// Reads the settings for `registry` from the first of `folders` that exists.
///
/// # Errors
/// [`ImageError::Config`] for a file that can't be used.
pub(crate) fn load(registry: &str, folders: &[PathBuf]) -> Result<Vec<Host>, ImageError> {
    let Some(base) = folders.iter().find(|folder| folder.is_dir()) else {
        return Ok(origin(registry));
    };
    let mut names = vec![registry.to_owned()];
    if let Some((host, port)) = registry.rsplit_once(':') {
        names.push(format!("{host}_{port}_"));
    }
    names.push("_default".to_owned());
    let Some(folder) = names.iter().map(|name| base.join(name)).find(|folder| folder.is_dir())
    else {
        return Ok(origin(registry));
    };
    let path = folder.join("hosts.toml");
    match fs::read_to_string(&path) {
        Ok(text) => plan(registry, &folder, &text)
            .map_err(|reason| ImageError::Config { path: path.clone(), reason }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            // Docker's older way: certificates alone.
            let mut hosts = origin(registry);
            let entries = fs::read_dir(&folder).map_err(ImageError::io("read", &folder))?;
            let ca: Vec<_> = entries
                .flatten()
                .map(|entry| entry.path())
                .filter(|path| path.extension().is_some_and(|extension| extension == "crt"))
                .collect();
            hosts.iter_mut().for_each(|host| host.ca.clone_from(&ca));
            Ok(hosts)
        }
        Err(error) => Err(ImageError::io("read", &path)(error)),
    }
}

/// The registry itself. A loopback one may speak plain http.
fn origin(registry: &str) -> Vec<Host> {
    let authority = if registry == "docker.io" { "registry-1.docker.io" } else { registry };
    let host = Host {
        plain_http: false,
        authority: authority.to_owned(),
        repository_prefix: String::new(),
        mirror: false,
        resolve: true,
        skip_verify: false,
        ca: Vec::new(),
        only_after_failed_tls: false,
        probe: is_loopback(registry),
    };
    let mut hosts = vec![host.clone()];
    if host.probe {
        hosts.push(Host { plain_http: true, only_after_failed_tls: true, probe: false, ..host });
    }
    hosts
}

fn is_loopback(registry: &str) -> bool {
    let host = match registry.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((v6, _)) => v6,
        None => registry.split(':').next().unwrap_or(registry),
    };
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// Plans the hosts from a `hosts.toml` in `folder`: those listed in their order, then the server.
fn plan(registry: &str, folder: &Path, text: &str) -> Result<Vec<Host>, String> {
    let file: File = toml::from_str(text).map_err(|error| error.to_string())?;
    let mut hosts = Vec::new();
    for (url, settings) in file.host {
        let settings: Settings =
            settings.try_into().map_err(|error| format!("host {url:?}: {error}"))?;
        hosts.extend(host(&url, &settings, registry, folder)?);
    }
    match &file.server {
        Some(url) => hosts.extend(host(url, &file.own, registry, folder)?),
        // The file may be about nothing but the registry itself.
        None if hosts.iter().any(|host| !host.mirror) => {}
        None => hosts.extend(origin(registry)),
    }
    Ok(hosts)
}

fn host(
    url: &str,
    settings: &Settings,
    registry: &str,
    folder: &Path,
) -> Result<Option<Host>, String> {
    if settings.client.is_some() {
        return Err(format!("host {url:?}: client certificates are not supported"));
    }
    if settings.header.is_some() {
        return Err(format!("host {url:?}: headers are not supported"));
    }
    let can = |what: &str| {
        settings.capabilities.as_ref().is_none_or(|list| list.iter().any(|have| have == what))
    };
    if !can("pull") {
        return Ok(None);
    }
    let (plain_http, rest) = match url.split_once("://") {
        Some(("https", rest)) => (false, rest),
        Some(("http", rest)) => (true, rest),
        Some((scheme, _)) => return Err(format!("host {url:?}: unknown scheme {scheme:?}")),
        None => (is_loopback(url), url),
    };
    let (address, path) = rest.split_once('/').unwrap_or((rest, ""));
    if address.is_empty() {
        return Err(format!("host {url:?}: no host name"));
    }
    let path = path.trim_matches('/');
    // Without override_path the API is at <path>/v2; with it, the path is where the API is.
    let (before, behind) = if settings.override_path {
        match path.split_once("v2") {
            Some((before, behind))
                if (before.is_empty() || before.ends_with('/'))
                    && (behind.is_empty() || behind.starts_with('/')) =>
            {
                (before.trim_matches('/'), behind.trim_matches('/'))
            }
            _ => return Err(format!("host {url:?}: override_path needs a path with /v2 in it")),
        }
    } else {
        (path.strip_suffix("v2").unwrap_or(path).trim_matches('/'), "")
    };
    let authority =
        if before.is_empty() { address.to_owned() } else { format!("{address}/{before}") };
    let docker = registry == "docker.io" && address.ends_with("docker.io");
    let ca = match &settings.ca {
        None => Vec::new(),
        Some(OneOrMany::One(path)) => vec![folder.join(path)],
        Some(OneOrMany::Many(paths)) => paths.iter().map(|path| folder.join(path)).collect(),
    };
    Ok(Some(Host {
        plain_http,
        mirror: address != registry && !docker,
        authority: if address == "docker.io" {
            "registry-1.docker.io".to_owned()
        } else {
            authority
        },
        repository_prefix: behind.to_owned(),
        resolve: can("resolve"),
        skip_verify: settings.skip_verify,
        ca,
        only_after_failed_tls: false,
        probe: false,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(hosts: &[Host]) -> Vec<String> {
        hosts
            .iter()
            .map(|h| {
                format!(
                    "{}://{}/v2/{}{}",
                    if h.plain_http { "http" } else { "https" },
                    h.authority,
                    h.repository_prefix,
                    if h.mirror { " ns" } else { "" }
                )
            })
            .collect()
    }

    #[test]
    fn hosts_are_asked_in_the_files_order_and_the_server_last() {
        let text = r#"
            server = "https://docker.io"
            [host."http://z-mirror:5000"]
              capabilities = ["pull", "resolve"]
            [host."https://harbor.lan/v2/hub"]
              override_path = true
              ca = ["a.pem", "/b.pem"]
            [host."https://a-mirror/sub"]
              skip_verify = true
              capabilities = ["pull"]
            [host."https://push-only"]
              capabilities = ["push"]
        "#;
        let hosts = plan("docker.io", Path::new("/etc/x"), text).unwrap();
        assert_eq!(
            shown(&hosts),
            [
                "http://z-mirror:5000/v2/ ns",
                "https://harbor.lan/v2/hub ns",
                "https://a-mirror/sub/v2/ ns",
                "https://registry-1.docker.io/v2/",
            ]
        );
        assert_eq!(hosts[1].ca, [Path::new("/etc/x/a.pem"), Path::new("/b.pem")]);
        assert!(hosts[2].skip_verify && !hosts[2].resolve);
    }

    #[test]
    fn without_a_file_the_registry_itself_is_asked() {
        assert_eq!(shown(&origin("quay.io")), ["https://quay.io/v2/"]);
        assert_eq!(shown(&origin("docker.io")), ["https://registry-1.docker.io/v2/"]);
        for loopback in ["localhost:5000", "127.0.0.9", "[::1]:5000"] {
            let hosts = origin(loopback);
            assert!(hosts.len() == 2 && hosts[1].plain_http && hosts[1].only_after_failed_tls);
        }
    }

    #[test]
    fn unusable_files_say_why() {
        for (text, want) in [
            ("server = ", "TOML"),
            ("[host.\"ftp://x\"]", "scheme"),
            ("[host.\"https://x\"]\nclient = \"c.pem\"", "client certificates"),
            ("[host.\"https://x\"]\nskip_verify = 3", "boolean"),
            ("[host.\"https://x/y\"]\noverride_path = true", "/v2"),
        ] {
            let error = plan("quay.io", Path::new("/"), text).unwrap_err();
            assert!(error.contains(want), "{text}: {error}");
        }
    }
}
