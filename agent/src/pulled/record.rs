//! What is kept of a pull, in kubelet's format (`ImagePulledRecord`, `ImagePullIntent` of
//! `kubelet.config.k8s.io`), so that either may take over from the other. Pure. Of a Secret it has the
//! coordinates and a digest of what was used of it.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

const VERSION: &str = "kubelet.config.k8s.io/v1beta1";
const OLDER: &str = "kubelet.config.k8s.io/v1alpha1";

/// A Secret that opened a registry, and what of it did.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PullSecret {
    /// `metadata.uid`.
    pub uid: String,
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// SHA-256 of the login, hexadecimal; empty is of none.
    pub credential_hash: String,
}

impl PullSecret {
    /// Whether they are one object, whatever is in it.
    pub fn is_same_object(&self, other: &Self) -> bool {
        (&self.uid, &self.namespace, &self.name) == (&other.uid, &other.namespace, &other.name)
    }
}

/// A service account for which a provider opened a registry.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PullAccount {
    /// `metadata.uid`.
    pub uid: String,
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
}

/// Who may use an image under one of its names.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct PullCredentials {
    /// Those with one of these Secrets.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub kubernetes_secrets: Vec<PullSecret>,
    /// Those that run as one of these.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub kubernetes_service_accounts: Vec<PullAccount>,
    /// All pods of the node.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub node_pods_accessible: bool,
}

/// An image that was pulled by this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PulledRecord {
    kind: String,
    api_version: String,
    /// When it was last changed, RFC 3339.
    last_updated_time: String,
    /// The runtime's id of the image.
    pub image_ref: String,
    /// Who may use it, by the names (without tag and digest) that pods asked for.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub credential_mapping: BTreeMap<String, PullCredentials>,
}

/// An image that is being pulled.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Intent {
    kind: String,
    api_version: String,
    image: String,
}

fn is_version(kind: &str, api_version: &str, wanted: &str) -> Result<(), String> {
    match kind == wanted && [VERSION, OLDER].contains(&api_version) {
        true => Ok(()),
        false => Err(format!("is a {kind} of {api_version}, not a {wanted} of {VERSION}")),
    }
}

fn stamp(now: Timestamp) -> String {
    now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

impl PulledRecord {
    /// A record of the image with this id, of which nobody may be sure yet.
    pub fn new(image_ref: &str, now: Timestamp) -> Self {
        Self {
            kind: "ImagePulledRecord".to_owned(),
            api_version: VERSION.to_owned(),
            last_updated_time: stamp(now),
            image_ref: image_ref.to_owned(),
            credential_mapping: BTreeMap::new(),
        }
    }

    /// Reads a record.
    ///
    /// # Errors
    /// What it is instead.
    pub fn decode(text: &[u8]) -> Result<Self, String> {
        let read: Self = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        is_version(&read.kind, &read.api_version, "ImagePulledRecord")?;
        Ok(Self { api_version: VERSION.to_owned(), ..read })
    }

    /// As text, with the line's end that kubelet writes.
    pub fn encode(&self) -> Vec<u8> {
        lined(self)
    }

    /// Whether it has not been changed since.
    pub fn is_older_than(&self, moment: Timestamp) -> bool {
        // What has no time is of unknown age.
        self.last_updated_time.parse::<Timestamp>().is_ok_and(|changed| changed < moment)
    }

    /// Adds who may use the image as `name`; whether that is new.
    pub fn merge(&mut self, name: &str, more: &PullCredentials, now: Timestamp) -> bool {
        let nobody = !more.node_pods_accessible
            && more.kubernetes_secrets.is_empty()
            && more.kubernetes_service_accounts.is_empty();
        let known = self.credential_mapping.get(name).cloned().unwrap_or_default();
        if nobody || known.node_pods_accessible {
            return false;
        }
        let merged = if more.node_pods_accessible {
            PullCredentials { node_pods_accessible: true, ..PullCredentials::default() }
        } else {
            let mut secrets = known.kubernetes_secrets.clone();
            for secret in &more.kubernetes_secrets {
                match secrets.iter_mut().find(|s| s.is_same_object(secret)) {
                    Some(same) => same.credential_hash.clone_from(&secret.credential_hash),
                    None => secrets.push(secret.clone()),
                }
            }
            secrets.sort_by(|a, b| {
                (&a.namespace, &a.name, &a.uid).cmp(&(&b.namespace, &b.name, &b.uid))
            });
            let accounts: BTreeSet<_> = known
                .kubernetes_service_accounts
                .iter()
                .chain(&more.kubernetes_service_accounts)
                .cloned()
                .collect();
            let mut accounts: Vec<_> = accounts.into_iter().collect();
            accounts.sort_by(|a, b| {
                (&a.namespace, &a.name, &a.uid).cmp(&(&b.namespace, &b.name, &b.uid))
            });
            PullCredentials {
                kubernetes_secrets: secrets,
                kubernetes_service_accounts: accounts,
                node_pods_accessible: false,
            }
        };
        if merged == known && self.credential_mapping.contains_key(name) {
            return false;
        }
        self.credential_mapping.insert(name.to_owned(), merged);
        self.last_updated_time = stamp(now);
        true
    }
}

/// The text of an intent to pull `image`.
pub fn encode_intent(image: &str) -> Vec<u8> {
    lined(&Intent {
        kind: "ImagePullIntent".to_owned(),
        api_version: VERSION.to_owned(),
        image: image.to_owned(),
    })
}

/// The image that an intent is about.
///
/// # Errors
/// What it is instead.
pub fn decode_intent(text: &[u8]) -> Result<String, String> {
    let read: Intent = serde_json::from_slice(text).map_err(|error| error.to_string())?;
    is_version(&read.kind, &read.api_version, "ImagePullIntent")?;
    Ok(read.image)
}

fn lined(object: &impl Serialize) -> Vec<u8> {
    // Maps of strings always have a text.
    let mut text = serde_json::to_vec(object).unwrap_or_default();
    text.push(b'\n');
    text
}

/// The name of the file about an image or its id.
pub fn file_name(key: &str) -> String {
    format!("sha256-{}", hex(&Sha256::digest(key)))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The digest by which kubelet tells logins apart: of the login's JSON as Go writes it.
pub fn login_hash(username: &str, password: &str, email: &str) -> String {
    let fields = [("username", username), ("password", password), ("email", email)];
    let given = fields.into_iter().filter(|(_, value)| !value.is_empty());
    let text: Vec<String> =
        given.map(|(name, value)| format!("\"{name}\":{}", go_string(value))).collect();
    hex(&Sha256::digest(format!("{{{}}}", text.join(","))))
}

/// Go escapes what could end a script in HTML.
fn go_string(text: &str) -> String {
    let quoted = serde_json::Value::from(text).to_string();
    let mut out = String::with_capacity(quoted.len());
    for c in quoted.chars() {
        match c {
            '<' | '>' | '&' | '\u{2028}' | '\u{2029}' => {
                out.push_str(&format!("\\u{:04x}", u32::from(c)));
            }
            other => out.push(other),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::testing::at;

    fn secret(name: &str, hash: &str) -> PullCredentials {
        PullCredentials {
            kubernetes_secrets: vec![PullSecret {
                uid: format!("uid-{name}"),
                namespace: "ns".into(),
                name: name.into(),
                credential_hash: hash.into(),
            }],
            ..PullCredentials::default()
        }
    }

    /// As kubelet 1.36 writes them.
    const KUBELETS: &str = r#"{"kind":"ImagePulledRecord","apiVersion":"kubelet.config.k8s.io/v1beta1","lastUpdatedTime":"2025-11-01T08:09:10Z","imageRef":"sha256:0a1b","credentialMapping":{"r.example/team/app":{"kubernetesSecrets":[{"uid":"u1","namespace":"default","name":"pull","credentialHash":"ab"}]},"r.example/open":{"nodePodsAccessible":true}}}
"#;

    #[test]
    fn kubelets_records_are_read_and_written_alike() {
        let read = PulledRecord::decode(KUBELETS.as_bytes()).unwrap();
        assert!(read.credential_mapping["r.example/open"].node_pods_accessible);
        let again = PulledRecord::decode(&read.encode()).unwrap();
        assert_eq!(read, again);
        let order = read.encode();
        assert!(order.starts_with(b"{\"kind\":\"ImagePulledRecord\",\"apiVersion\":"));
        assert!(order.ends_with(b"}\n"));
        assert!(PulledRecord::decode(KUBELETS.replace("v1beta1", "v1alpha1").as_bytes()).is_ok());
        for (from, to) in [("v1beta1", "v9"), ("PulledRecord", "PullIntent"), ("imageRef", "image")]
        {
            assert!(PulledRecord::decode(KUBELETS.replace(from, to).as_bytes()).is_err(), "{to}");
        }
        assert_eq!(
            String::from_utf8(encode_intent("r.io/a:1")).unwrap(),
            "{\"kind\":\"ImagePullIntent\",\"apiVersion\":\"kubelet.config.k8s.io/v1beta1\",\
             \"image\":\"r.io/a:1\"}\n"
        );
        assert_eq!(decode_intent(&encode_intent("r.io/a:1")).as_deref(), Ok("r.io/a:1"));
        assert!(decode_intent(KUBELETS.as_bytes()).is_err());
        assert_eq!(
            file_name("test-brokenhash"),
            "sha256-38a8906435c4dd5f4258899d46621bfd8eea3ad6ff494ee3c2f17ef0321625bd"
        );
    }

    #[test]
    fn what_is_new_is_added_and_more_than_all_is_not() {
        let mut record = PulledRecord::new("id", at(0));
        assert!(!record.merge("a", &PullCredentials::default(), at(1)));
        assert!(record.merge("a", &secret("one", "h1"), at(1)));
        assert!(!record.merge("a", &secret("one", "h1"), at(2)));
        assert!(record.is_older_than(at(2)) && !record.is_older_than(at(1)));
        assert!(record.merge("a", &secret("one", "h2"), at(3)), "what is in it changed");
        assert!(record.merge("a", &secret("another", "h3"), at(3)));
        let names: Vec<_> = record.credential_mapping["a"]
            .kubernetes_secrets
            .iter()
            .map(|s| (s.name.as_str(), s.credential_hash.as_str()))
            .collect();
        assert_eq!(names, [("another", "h3"), ("one", "h2")]);
        let all = PullCredentials { node_pods_accessible: true, ..PullCredentials::default() };
        assert!(record.merge("a", &all, at(4)));
        assert!(!record.merge("a", &secret("two", "h"), at(5)));
        assert!(record.credential_mapping["a"].kubernetes_secrets.is_empty());
        assert!(record.merge("b", &secret("two", "h"), at(5)), "another name is another matter");
        let account = PullAccount { uid: "u".into(), namespace: "n".into(), name: "sa".into() };
        let accounts = PullCredentials {
            kubernetes_service_accounts: vec![account],
            ..PullCredentials::default()
        };
        assert!(record.merge("b", &accounts, at(6)));
        assert!(!record.merge("b", &accounts, at(6)));
    }

    #[test]
    fn logins_have_kubelets_digests() {
        // printf '{"username":"tester","password":"s3cret"}' | sha256sum
        let plain = hex(&Sha256::digest(r#"{"username":"tester","password":"s3cret"}"#));
        assert_eq!(login_hash("tester", "s3cret", ""), plain);
        let odd = hex(&Sha256::digest(r#"{"password":"a\u003c\u0026\"\\\n","email":"e"}"#));
        assert_eq!(login_hash("", "a<&\"\\\n", "e"), odd);
    }
}
