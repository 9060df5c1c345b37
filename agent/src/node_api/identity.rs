//! Who asks, and what for. Pure: the names, verbs and subresources under which a request to the node
//! API is judged (KEP-2862 for the fine-grained ones).

use std::collections::BTreeMap;

use rustls::pki_types::CertificateDer;
use sha2::{Digest, Sha256};
use x509_parser::prelude::{FromDer, X509Certificate};

/// Group of everybody who is known.
pub(super) const AUTHENTICATED: &str = "system:authenticated";
/// User of everybody else.
const ANONYMOUS: &str = "system:anonymous";
/// Group of everybody else.
const UNAUTHENTICATED: &str = "system:unauthenticated";
/// Extra field that names a certificate.
const CREDENTIAL_ID: &str = "authentication.kubernetes.io/credential-id";

/// Somebody, as authenticated.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Identity {
    /// User name.
    pub user: String,
    /// UID; empty if there is none.
    pub uid: String,
    /// Groups.
    pub groups: Vec<String>,
    /// More that the authenticator knows.
    pub extra: BTreeMap<String, Vec<String>>,
}

impl Identity {
    /// Who brought no credentials.
    pub(super) fn anonymous() -> Self {
        Self { user: ANONYMOUS.into(), groups: vec![UNAUTHENTICATED.into()], ..Self::default() }
    }

    /// Whom a certificate names: common name and organizations. `None` if it names nobody.
    pub(super) fn of_certificate(der: &CertificateDer<'_>) -> Option<Self> {
        let (_, certificate) = X509Certificate::from_der(der).ok()?;
        let subject = certificate.subject();
        let text = |name: &x509_parser::x509::AttributeTypeAndValue<'_>| {
            name.as_str().ok().map(str::to_owned)
        };
        let user = subject.iter_common_name().last().and_then(text)?;
        let groups = subject.iter_organization().filter_map(text).collect();
        let digest = Sha256::digest(der.as_ref());
        let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        let extra = BTreeMap::from([(CREDENTIAL_ID.into(), vec![format!("X509SHA256={hex}")])]);
        (!user.is_empty()).then_some(Self { user, uid: String::new(), groups, extra })
    }

    /// With the group of everybody who is known.
    pub(super) fn authenticated(mut self) -> Self {
        if !self.groups.iter().any(|group| group == AUTHENTICATED) {
            self.groups.push(AUTHENTICATED.into());
        }
        self
    }
}

/// The verb of a method.
pub(super) fn verb(method: &str) -> &'static str {
    match method {
        "POST" => "create",
        "GET" => "get",
        "PUT" => "update",
        "PATCH" => "patch",
        "DELETE" => "delete",
        _ => "",
    }
}

/// Subresources of the node, any of which lets a request for `path` (decoded) pass; the narrowest
/// first.
pub(super) fn subresources(path: &str) -> &'static [&'static str] {
    let under = |prefix: &str| {
        path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    if under("/pods") || under("/runningpods") {
        &["pods", "proxy"]
    } else if under("/healthz") {
        &["healthz", "proxy"]
    } else if under("/configz") {
        &["configz", "proxy"]
    } else if under("/stats") {
        &["stats"]
    } else if under("/metrics") {
        &["metrics"]
    } else if under("/logs") {
        &["log"]
    } else if under("/checkpoint") {
        &["checkpoint"]
    } else if under("/statusz") {
        &["statusz"]
    } else if under("/flagz") {
        &["configz"]
    } else {
        &["proxy"]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_judged_as_upstream_judges_them() {
        for (path, expected) in [
            ("/pods", &["pods", "proxy"][..]),
            ("/pods/", &["pods", "proxy"]),
            ("/podsy", &["proxy"]),
            ("/runningpods/", &["pods", "proxy"]),
            ("/healthz", &["healthz", "proxy"]),
            ("/healthz/syncloop", &["healthz", "proxy"]),
            ("/healthzx", &["proxy"]),
            ("/configz", &["configz", "proxy"]),
            ("/stats/summary", &["stats"]),
            ("/metrics", &["metrics"]),
            ("/metrics/cadvisor", &["metrics"]),
            ("/metricsx", &["proxy"]),
            ("/logs/", &["log"]),
            ("/logs/syslog", &["log"]),
            ("/checkpoint/ns/p/c", &["checkpoint"]),
            ("/statusz", &["statusz"]),
            ("/flagz", &["configz"]),
            ("/exec/ns/p/c", &["proxy"]),
            ("/containerLogs/ns/p/c", &["proxy"]),
            ("/debug/pprof/", &["proxy"]),
            ("/", &["proxy"]),
            ("", &["proxy"]),
        ] {
            assert_eq!(subresources(path), expected, "{path}");
        }
    }

    #[test]
    fn a_certificate_names_user_and_groups() {
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::CommonName, "ann");
        params.distinguished_name.push(rcgen::DnType::OrganizationName, "dev");
        let key = rcgen::KeyPair::generate().unwrap();
        let der = params.self_signed(&key).unwrap().der().clone();
        let ann = Identity::of_certificate(&der).unwrap().authenticated().authenticated();
        assert_eq!(ann.user, "ann");
        assert_eq!(ann.groups, ["dev", AUTHENTICATED]);
        assert!(ann.extra[CREDENTIAL_ID][0].starts_with("X509SHA256="));
        params.distinguished_name = rcgen::DistinguishedName::new();
        let nobody = params.self_signed(&key).unwrap().der().clone();
        assert_eq!(Identity::of_certificate(&nobody), None);
    }
}
