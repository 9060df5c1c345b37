//! kubeconfig files: what of them a node needs, read and written.
//!
//! Node kubeconfigs are written by kubeadm or by `longshore join`: one cluster, one user, with a
//! client certificate (as files) or a bootstrap token. Exec plugins and auth providers are refused
//! by name.

use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

/// Why a kubeconfig cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KubeconfigError {
    /// A file that cannot be read.
    #[error("cannot read {}: {cause}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: std::io::Error,
    },
    /// Not a kubeconfig.
    #[error("{origin} is not a kubeconfig: {cause}")]
    Parse {
        /// Where it came from.
        origin: String,
        /// What is wrong.
        cause: String,
    },
    /// A part that is missing or not supported.
    #[error("kubeconfig {origin}: {cause}")]
    Unusable {
        /// Where it came from.
        origin: String,
        /// What is wrong.
        cause: String,
    },
}

/// A kubeconfig as far as nodes use it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Kubeconfig {
    #[serde(rename = "apiVersion")]
    api_version: Option<String>,
    kind: Option<String>,
    #[serde(default)]
    clusters: Vec<Named<ClusterField>>,
    #[serde(default)]
    users: Option<Vec<Named<UserField>>>,
    #[serde(default)]
    contexts: Option<Vec<Named<ContextField>>>,
    #[serde(default)]
    current_context: Option<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Named<T> {
    name: String,
    #[serde(flatten)]
    value: T,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct ClusterField {
    cluster: Cluster,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct UserField {
    user: User,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct ContextField {
    context: Context,
}

/// Where a cluster is.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Cluster {
    /// URL of the API server.
    #[serde(default)]
    pub server: String,
    /// CA certificates, base64 of PEM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certificate_authority_data: Option<String>,
    /// CA certificates, a PEM file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certificate_authority: Option<String>,
    /// Name to verify in the server's certificate instead of the URL's host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_server_name: Option<String>,
    /// Do not verify the server's certificate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub insecure_skip_tls_verify: Option<bool>,
}

#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct User {
    #[serde(skip_serializing_if = "Option::is_none")]
    client_certificate: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    client_certificate_data: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    client_key: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    client_key_data: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token: Option<String>,
    #[serde(rename = "tokenFile", skip_serializing_if = "Option::is_none")]
    token_file: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    exec: Option<serde_json::Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    auth_provider: Option<serde_json::Value>,
}

impl std::fmt::Debug for User {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("User(..)")
    }
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Context {
    cluster: String,
    #[serde(default)]
    user: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    namespace: Option<String>,
}

/// Who the client is to the server.
#[derive(Clone)]
pub enum Identity {
    /// Nobody.
    Anonymous,
    /// A bearer token.
    Token(String),
    /// A client certificate chain and its key, both PEM (they may be in one text).
    Certificate {
        /// Certificates, PEM.
        chain: Vec<u8>,
        /// Key, PEM.
        key: Vec<u8>,
    },
}

/// Everything needed to talk to one API server, contents of files included.
#[derive(Clone)]
pub struct Endpoint {
    /// `https://host:port`.
    pub server: String,
    /// CA certificates in PEM; `None` leaves only an unverified connection.
    pub ca: Option<Vec<u8>>,
    /// Do not verify the server.
    pub insecure: bool,
    /// Name to verify instead of the host.
    pub server_name: Option<String>,
    /// Who we are.
    pub identity: Identity,
}

impl Endpoint {
    /// The current context of the kubeconfig at `path`; relative file names in it are relative to
    /// its folder.
    pub fn load(path: &Path) -> Result<Self, KubeconfigError> {
        let origin = path.display().to_string();
        let text = read(path)?;
        let text = String::from_utf8(text)
            .map_err(|_| parse_error(&origin, "it is not UTF-8 text".to_owned()))?;
        Kubeconfig::parse(&text, &origin)?
            .endpoint(&origin, path.parent().unwrap_or(Path::new("/")))
    }
}

impl Kubeconfig {
    /// Reads YAML or JSON; `origin` names it in errors.
    pub fn parse(text: &str, origin: &str) -> Result<Self, KubeconfigError> {
        let parsed: Self =
            serde_saphyr::from_str(text).map_err(|e| parse_error(origin, e.to_string()))?;
        match parsed.kind.as_deref() {
            Some("Config") | None => Ok(parsed),
            Some(other) => Err(parse_error(origin, format!("its kind is {other}, not Config"))),
        }
    }

    /// A kubeconfig with one cluster and a client certificate in files.
    pub fn with_certificate(cluster: Cluster, user: &str, pem: &Path) -> Self {
        let file = Some(pem.display().to_string());
        Self::one(
            cluster,
            user,
            User { client_certificate: file.clone(), client_key: file, ..User::default() },
        )
    }

    /// A kubeconfig with one cluster and a bearer token.
    pub fn with_token(cluster: Cluster, user: &str, token: &str) -> Self {
        Self::one(cluster, user, User { token: Some(token.to_owned()), ..User::default() })
    }

    fn one(cluster: Cluster, user: &str, value: User) -> Self {
        let (name, context) = ("kubernetes".to_owned(), format!("{user}@kubernetes"));
        Self {
            api_version: Some("v1".to_owned()),
            kind: Some("Config".to_owned()),
            clusters: vec![Named { name: name.clone(), value: ClusterField { cluster } }],
            users: Some(vec![Named { name: user.to_owned(), value: UserField { user: value } }]),
            contexts: Some(vec![Named {
                name: context.clone(),
                value: ContextField {
                    context: Context { cluster: name, user: user.to_owned(), namespace: None },
                },
            }]),
            current_context: Some(context),
        }
    }

    /// As YAML.
    pub fn to_yaml(&self) -> Result<String, KubeconfigError> {
        serde_saphyr::to_string(self).map_err(|e| parse_error("to write", e.to_string()))
    }

    /// The cluster of the current context, else the only one there is (cluster-info has no
    /// contexts).
    pub fn cluster(&self, origin: &str) -> Result<&Cluster, KubeconfigError> {
        let found = match self.context() {
            Some(context) => self.clusters.iter().find(|c| c.name == context.cluster),
            None => self.clusters.first(),
        };
        match found {
            Some(c) if !c.value.cluster.server.is_empty() => Ok(&c.value.cluster),
            Some(_) => Err(unusable(origin, "its cluster has no server".to_owned())),
            None => Err(unusable(origin, "it names no cluster".to_owned())),
        }
    }

    fn context(&self) -> Option<&Context> {
        let name = self.current_context.as_deref().filter(|n| !n.is_empty())?;
        let contexts = self.contexts.as_deref().unwrap_or_default();
        contexts.iter().find(|c| c.name == name).map(|c| &c.value.context)
    }

    /// What the current context says, with the files it names read; relative names are under `base`.
    pub fn endpoint(&self, origin: &str, base: &Path) -> Result<Endpoint, KubeconfigError> {
        let cluster = self.cluster(origin)?;
        let user = self.context().and_then(|context| {
            self.users.as_deref().unwrap_or_default().iter().find(|u| u.name == context.user)
        });
        Ok(Endpoint {
            server: cluster.server.trim_end_matches('/').to_owned(),
            ca: cluster.ca(origin, base)?,
            insecure: cluster.insecure_skip_tls_verify.unwrap_or(false),
            server_name: cluster.tls_server_name.clone().filter(|n| !n.is_empty()),
            identity: match user {
                Some(user) => user.value.user.identity(origin, base)?,
                None => Identity::Anonymous,
            },
        })
    }
}

impl Cluster {
    /// The CA certificates in PEM, from the data or the file.
    pub fn ca(&self, origin: &str, base: &Path) -> Result<Option<Vec<u8>>, KubeconfigError> {
        pem(
            origin,
            base,
            "certificate-authority",
            self.certificate_authority_data.as_deref(),
            self.certificate_authority.as_deref(),
        )
    }
}

impl User {
    fn identity(&self, origin: &str, base: &Path) -> Result<Identity, KubeconfigError> {
        if self.exec.is_some() || self.auth_provider.is_some() {
            let cause = "exec and auth-provider users are not supported for nodes; use a client \
                         certificate or a token";
            return Err(unusable(origin, cause.to_owned()));
        }
        let chain = pem(
            origin,
            base,
            "client-certificate",
            self.client_certificate_data.as_deref(),
            self.client_certificate.as_deref(),
        )?;
        let key = pem(
            origin,
            base,
            "client-key",
            self.client_key_data.as_deref(),
            self.client_key.as_deref(),
        )?;
        if let (Some(chain), Some(key)) = (chain, key) {
            return Ok(Identity::Certificate { chain, key });
        }
        if let Some(token) = self.token.as_deref().filter(|t| !t.is_empty()) {
            return Ok(Identity::Token(token.to_owned()));
        }
        if let Some(file) = self.token_file.as_deref().filter(|f| !f.is_empty()) {
            let token = String::from_utf8_lossy(&read(&base.join(file))?).trim().to_owned();
            return Ok(Identity::Token(token));
        }
        Ok(Identity::Anonymous)
    }
}

fn pem(
    origin: &str,
    base: &Path,
    field: &str,
    data: Option<&str>,
    file: Option<&str>,
) -> Result<Option<Vec<u8>>, KubeconfigError> {
    if let Some(data) = data.filter(|d| !d.is_empty()) {
        let text: String = data.split_whitespace().collect();
        return STANDARD
            .decode(text)
            .map(Some)
            .map_err(|e| unusable(origin, format!("{field}-data is not base64: {e}")));
    }
    match file.filter(|f| !f.is_empty()) {
        Some(file) => read(&base.join(file)).map(Some),
        None => Ok(None),
    }
}

fn read(path: &Path) -> Result<Vec<u8>, KubeconfigError> {
    std::fs::read(path).map_err(|cause| KubeconfigError::Read { path: path.to_owned(), cause })
}

fn parse_error(origin: &str, cause: String) -> KubeconfigError {
    KubeconfigError::Parse { origin: origin.to_owned(), cause }
}

fn unusable(origin: &str, cause: String) -> KubeconfigError {
    KubeconfigError::Unusable { origin: origin.to_owned(), cause }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn a_written_kubeconfig_reads_back() {
        let dir = tempfile::tempdir().unwrap();
        let pem = dir.path().join("current.pem");
        std::fs::write(&pem, "PEM").unwrap();
        let cluster = Cluster {
            server: "https://10.0.0.1:6443/".to_owned(),
            certificate_authority_data: Some(STANDARD.encode("CA")),
            ..Cluster::default()
        };
        let text = Kubeconfig::with_certificate(cluster, "default-auth", &pem).to_yaml().unwrap();
        let file = dir.path().join("kubelet.conf");
        std::fs::write(&file, text).unwrap();
        let endpoint = Endpoint::load(&file).unwrap();
        assert_eq!(endpoint.server, "https://10.0.0.1:6443");
        assert_eq!(endpoint.ca.as_deref(), Some(&b"CA"[..]));
        let Identity::Certificate { chain, key } = endpoint.identity else { panic!("identity") };
        assert_eq!((chain, key), (b"PEM".to_vec(), b"PEM".to_vec()));
    }

    #[test]
    fn cluster_info_has_a_cluster_and_no_user() {
        let text = "apiVersion: v1\nclusters:\n- cluster:\n    certificate-authority-data: Q0E=\n    \
                    server: https://h:6443\n  name: \"\"\ncontexts: null\ncurrent-context: \"\"\n\
                    kind: Config\npreferences: {}\nusers: null\n";
        let parsed = Kubeconfig::parse(text, "cluster-info").unwrap();
        let endpoint = parsed.endpoint("cluster-info", Path::new("/")).unwrap();
        assert_eq!(endpoint.server, "https://h:6443");
        assert!(matches!(endpoint.identity, Identity::Anonymous));
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        for (text, says) in [
            ("- 1", "not a kubeconfig"),
            ("kind: Pod", "its kind is Pod"),
            ("kind: Config", "names no cluster"),
            ("clusters: [{name: a, cluster: {server: ''}}]", "no server"),
            (
                "clusters: [{name: a, cluster: {server: 'https://h', \
                 certificate-authority-data: '!'}}]",
                "certificate-authority-data is not base64",
            ),
            (
                "clusters: [{name: a, cluster: {server: 'https://h'}}]\ncurrent-context: c\n\
                 contexts: [{name: c, context: {cluster: a, user: u}}]\n\
                 users: [{name: u, user: {exec: {command: x}}}]",
                "exec and auth-provider",
            ),
        ] {
            let result = Kubeconfig::parse(text, "f").and_then(|k| k.endpoint("f", Path::new("/")));
            let error = result.err().unwrap().to_string();
            assert!(error.contains(says), "{text:?} says {error:?}, not {says:?}");
        }
    }
}
