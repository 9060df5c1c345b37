//! Credentials for registries out of docker configuration, in Secrets or in a file of the node.
//! Pure. Nothing here is ever printed: the types have no `Debug` that shows a secret.

use std::collections::BTreeMap;
use std::fmt;

use base64::Engine;
use cri_shim::api::AuthConfig;
use k8s_openapi::api::core::v1::Secret;
use serde::Deserialize;

use super::image_name::{DEFAULT_REGISTRY, ImageName};

#[derive(Deserialize, Default)]
struct Entry {
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
    #[serde(default)]
    auth: String,
    #[serde(default, rename = "identitytoken")]
    identity_token: String,
    #[serde(default, rename = "registrytoken")]
    registry_token: String,
}

#[derive(Deserialize, Default)]
struct DockerConfig {
    #[serde(default)]
    auths: BTreeMap<String, Entry>,
}

/// Credentials by registry and path.
#[derive(Default)]
pub struct Keyring {
    keys: Vec<(String, AuthConfig)>,
}

impl fmt::Debug for Keyring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Keyring({} entries)", self.keys.len())
    }
}

/// A pull secret that cannot be read. Says nothing of its content.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("pull secret {0}: {1}")]
pub struct BadSecret(pub String, pub &'static str);

impl Keyring {
    /// Takes in the credentials of an `imagePullSecrets` entry.
    pub fn add_secret(&mut self, secret: &Secret) -> Result<(), BadSecret> {
        let name = || secret.metadata.name.clone().unwrap_or_default();
        let data =
            |key: &str| secret.data.as_ref().and_then(|d| d.get(key)).map(|b| b.0.as_slice());
        let added = if let Some(json) = data(".dockerconfigjson") {
            self.add_config(json)
        } else if let Some(json) = data(".dockercfg") {
            self.add_legacy(json)
        } else {
            return Err(BadSecret(name(), "has neither .dockerconfigjson nor .dockercfg"));
        };
        added.ok_or_else(|| BadSecret(name(), "is not valid docker configuration"))
    }

    /// Takes in the text of a docker `config.json`. `None` where it is none.
    pub fn add_config(&mut self, json: &[u8]) -> Option<()> {
        let config: DockerConfig = serde_json::from_slice(json).ok()?;
        self.add(config.auths);
        Some(())
    }

    /// Takes in the older form without `auths`.
    fn add_legacy(&mut self, json: &[u8]) -> Option<()> {
        self.add(serde_json::from_slice(json).ok()?);
        Some(())
    }

    fn add(&mut self, auths: BTreeMap<String, Entry>) {
        for (server, entry) in auths {
            let (mut username, mut password) = (entry.username, entry.password);
            if username.is_empty() && !entry.auth.is_empty() {
                let decoded = base64::engine::general_purpose::STANDARD
                    .decode(entry.auth.trim())
                    .ok()
                    .and_then(|bytes| String::from_utf8(bytes).ok());
                if let Some((user, pass)) = decoded.as_deref().and_then(|t| t.split_once(':')) {
                    username = user.to_owned();
                    password = pass.trim_end_matches('\0').to_owned();
                }
            }
            let key = normalized(&server);
            let auth = AuthConfig {
                username,
                password,
                auth: String::new(),
                server_address: key.split('/').next().unwrap_or_default().to_owned(),
                identity_token: entry.identity_token,
                registry_token: entry.registry_token,
            };
            self.keys.push((key, auth));
        }
    }

    /// Credentials to try for `image`, the most specific first.
    pub fn lookup(&self, image: &ImageName) -> Vec<AuthConfig> {
        let mut found: Vec<&(String, AuthConfig)> =
            self.keys.iter().filter(|(key, _)| covers(key, &image.repository)).collect();
        found.sort_by_key(|(key, _)| std::cmp::Reverse(key.len()));
        found.into_iter().map(|(_, auth)| auth.clone()).collect()
    }
}

/// `https://index.docker.io/v1/` and its like as `host[:port][/path]`.
fn normalized(server: &str) -> String {
    let rest = server.split_once("://").map_or(server, |(_, rest)| rest);
    let rest = rest.trim_end_matches('/');
    let rest = rest.strip_suffix("/v1").or_else(|| rest.strip_suffix("/v2")).unwrap_or(rest);
    match rest {
        "index.docker.io" | "registry-1.docker.io" => DEFAULT_REGISTRY.to_owned(),
        other => other.to_owned(),
    }
}

/// Whether credentials for `key` are for `repository`: the same host (`*` stands for one part of a
/// name), and a path that begins with the key's.
fn covers(key: &str, repository: &str) -> bool {
    let (key_host, key_path) = key.split_once('/').unwrap_or((key, ""));
    let (host, path) = repository.split_once('/').unwrap_or((repository, ""));
    let parts = |text: &str| {
        let (name, port) = text.rsplit_once(':').unwrap_or((text, ""));
        (name.split('.').map(str::to_owned).collect::<Vec<_>>(), port.to_owned())
    };
    let ((key_parts, key_port), (host_parts, port)) = (parts(key_host), parts(host));
    let same_host = key_port == port
        && key_parts.len() == host_parts.len()
        && key_parts.iter().zip(&host_parts).all(|(k, h)| glob(k, h));
    same_host && path.starts_with(key_path)
}

fn glob(pattern: &str, text: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == text,
        Some((head, tail)) => {
            text.len() >= head.len() + tail.len() && text.starts_with(head) && text.ends_with(tail)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::image_name::parse_image;

    fn users(keyring: &Keyring, image: &str) -> Vec<String> {
        let name = parse_image(image).unwrap();
        keyring.lookup(&name).into_iter().map(|a| a.username).collect()
    }

    #[test]
    fn the_most_specific_credentials_come_first() {
        let mut keyring = Keyring::default();
        keyring
            .add_config(
                br#"{"auths":{
                  "https://index.docker.io/v1/":{"auth":"aHViOnB3"},
                  "r.example:5000":{"username":"all","password":"p"},
                  "r.example:5000/team":{"username":"team","password":"p"},
                  "*.cloud.example":{"username":"wild","password":"p"}}}"#,
            )
            .unwrap();
        for (image, expected) in [
            ("busybox", vec!["hub"]),
            ("r.example:5000/team/app", vec!["team", "all"]),
            ("r.example:5000/other", vec!["all"]),
            ("r.example/other", vec![]),
            ("eu.cloud.example/x", vec!["wild"]),
            ("a.b.cloud.example/x", vec![]),
        ] {
            assert_eq!(users(&keyring, image), expected, "{image}");
        }
        assert_eq!(format!("{keyring:?}"), "Keyring(4 entries)");
    }

    #[test]
    fn secrets_of_both_kinds() {
        let mut keyring = Keyring::default();
        let legacy: Secret = serde_json::from_value(serde_json::json!({
            "data": {".dockercfg": base64::engine::general_purpose::STANDARD
                .encode(r#"{"r.io":{"username":"u","password":"p"}}"#)}
        }))
        .unwrap();
        keyring.add_secret(&legacy).unwrap();
        assert_eq!(users(&keyring, "r.io/a"), ["u"]);
        assert!(keyring.add_secret(&Secret::default()).is_err());
    }
}
