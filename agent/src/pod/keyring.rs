//! Credentials for registries out of docker configuration, in Secrets or in a file of the node.
//! Pure. Nothing here is ever printed: the types have no `Debug` that shows a secret.

use std::collections::BTreeMap;
use std::fmt;

use base64::Engine;
use cri_shim::api::AuthConfig;
use k8s_openapi::api::core::v1::Secret;
use serde::Deserialize;

use super::image_name::{DEFAULT_REGISTRY, ImageName};
use crate::credential::{Account, Logins, Source, glob};
use crate::pulled::record::login_hash;

#[derive(Deserialize, Default)]
struct Entry {
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
    #[serde(default)]
    email: String,
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

/// Credentials to try, and whose they are.
#[derive(Clone)]
pub struct Credential {
    /// What the runtime is given.
    pub auth: AuthConfig,
    /// Who may use it.
    pub source: Source,
    /// The digest by which it is told from others.
    pub hash: String,
}

/// Credentials by registry and path.
#[derive(Default)]
pub struct Keyring {
    keys: Vec<(String, Credential)>,
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
        let metadata = &secret.metadata;
        let name = metadata.name.clone().unwrap_or_default();
        let source = Source::Secret(Account {
            uid: metadata.uid.clone().unwrap_or_default(),
            namespace: metadata.namespace.clone().unwrap_or_default(),
            name: name.clone(),
        });
        let data =
            |key: &str| secret.data.as_ref().and_then(|d| d.get(key)).map(|b| b.0.as_slice());
        let read = if let Some(json) = data(".dockerconfigjson") {
            serde_json::from_slice::<DockerConfig>(json).map(|config| config.auths)
        } else if let Some(json) = data(".dockercfg") {
            serde_json::from_slice(json)
        } else {
            return Err(BadSecret(name, "has neither .dockerconfigjson nor .dockercfg"));
        };
        let auths = read.map_err(|_| BadSecret(name, "is not valid docker configuration"))?;
        self.add(auths, &source);
        Ok(())
    }

    /// Takes in the text of a docker `config.json` of the node's. `None` where it is none.
    pub fn add_config(&mut self, json: &[u8]) -> Option<()> {
        let config: DockerConfig = serde_json::from_slice(json).ok()?;
        self.add(config.auths, &Source::Node);
        Some(())
    }

    /// Takes in the older form, without `auths`.
    pub fn add_legacy(&mut self, json: &[u8]) -> Option<()> {
        self.add(serde_json::from_slice(json).ok()?, &Source::Node);
        Some(())
    }

    /// Takes in what a credential provider answered.
    pub fn add_logins(&mut self, logins: &Logins, source: &Source) {
        let entries = logins.iter().map(|(server, login)| {
            let (username, password) = (login.username.clone(), login.password.clone());
            (server.clone(), Entry { username, password, ..Entry::default() })
        });
        self.add(entries.collect(), source);
    }

    fn add(&mut self, auths: BTreeMap<String, Entry>, source: &Source) {
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
            let hash = login_hash(&username, &password, &entry.email);
            let auth = AuthConfig {
                username,
                password,
                auth: String::new(),
                // A pattern names no server.
                server_address: Some(key.split('/').next().unwrap_or_default())
                    .filter(|host| !host.contains(['*', '?', '[']))
                    .unwrap_or_default()
                    .to_owned(),
                identity_token: entry.identity_token,
                registry_token: entry.registry_token,
            };
            self.keys.push((key, Credential { auth, source: source.clone(), hash }));
        }
    }

    /// Credentials to try for `image`, the most specific first: keys in reverse order, as kubelet has
    /// them, and those of one key as they came in.
    pub fn lookup(&self, image: &ImageName) -> Vec<Credential> {
        let mut found: Vec<&(String, Credential)> =
            self.keys.iter().filter(|(key, _)| glob::covers(key, &image.repository)).collect();
        found.sort_by(|(a, _), (b, _)| b.cmp(a));
        found.into_iter().map(|(_, credential)| credential.clone()).collect()
    }
}

/// `https://index.docker.io/v1/` and its like as `host[:port][/path]`.
fn normalized(server: &str) -> String {
    let rest = server.split_once("://").map_or(server, |(_, rest)| rest);
    let (host, path) = rest.find('/').map_or((rest, ""), |slash| rest.split_at(slash));
    let versioned = ["/v1", "/v2"].into_iter().find_map(|version| {
        path.strip_prefix(version).filter(|rest| rest.is_empty() || rest.starts_with('/'))
    });
    let path = match versioned.unwrap_or(path) {
        "/" => "",
        path => path,
    };
    match host {
        "index.docker.io" | "registry-1.docker.io" => format!("{DEFAULT_REGISTRY}{path}"),
        host => format!("{host}{path}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::image_name::parse_image;

    fn users(keyring: &Keyring, image: &str) -> Vec<String> {
        let name = parse_image(image).unwrap();
        keyring.lookup(&name).into_iter().map(|c| c.auth.username).collect()
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
                  "s.example/team/":{"username":"folder","password":"p"},
                  "https://v.example/v2/path":{"username":"versioned","password":"p"},
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
            ("r.example:5000/teamwork", vec!["team", "all"]),
            ("s.example/team/app", vec!["folder"]),
            ("s.example/teamwork", vec![]),
            ("v.example/path/app", vec!["versioned"]),
        ] {
            assert_eq!(users(&keyring, image), expected, "{image}");
        }
        assert_eq!(format!("{keyring:?}"), "Keyring(6 entries)");
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

    #[test]
    fn logins_of_programs_name_no_server_by_a_pattern() {
        let login =
            |user: &str| crate::credential::Login { username: user.into(), password: "p".into() };
        let logins =
            Logins::from([("*.r.io".into(), login("any")), ("eu.r.io".into(), login("eu"))]);
        let mut keyring = Keyring::default();
        keyring.add_logins(&logins, &Source::Node);
        let found = keyring.lookup(&parse_image("eu.r.io/a").unwrap());
        let shown: Vec<_> = found
            .iter()
            .map(|c| (c.auth.username.as_str(), c.auth.server_address.as_str()))
            .collect();
        assert_eq!(shown, [("eu", "eu.r.io"), ("any", "")]);
    }
}
