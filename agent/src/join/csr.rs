//! The request for a node's client certificate: its key, its contents, what became of it. Pure.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::{
    CertificateSigningRequest, CertificateSigningRequestSpec,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, SanType};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use sha2::{Digest, Sha256};
use x509_parser::prelude::{FromDer, X509Certificate};

/// Signer of node client certificates.
pub const SIGNER: &str = "kubernetes.io/kube-apiserver-client-kubelet";
/// Signer of the certificates that nodes serve their API with.
pub const SERVING_SIGNER: &str = "kubernetes.io/kubelet-serving";
/// Group of all nodes.
const NODES: &str = "system:nodes";
/// User name prefix of nodes.
const NODE_USER: &str = "system:node:";

/// Why a request could not be made or was not answered with a certificate.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CsrError {
    /// Key or request could not be made.
    #[error("cannot make a key and certificate request: {0}")]
    Make(String),
    /// Somebody said no.
    #[error("certificate request {name} was denied: {message}; ask the cluster's administrator")]
    Denied {
        /// CSR object.
        name: String,
        /// What they said.
        message: String,
    },
    /// The signer failed.
    #[error(
        "certificate request {name} failed: {message}; look at the logs of kube-controller-manager"
    )]
    Failed {
        /// CSR object.
        name: String,
        /// What the signer said.
        message: String,
    },
    /// The certificate is not what was asked for.
    #[error("the certificate issued for {name} cannot be used: {cause}")]
    Unusable {
        /// CSR object.
        name: String,
        /// Why.
        cause: String,
    },
}

/// A key and the request made with it.
pub struct NodeRequest {
    /// The private key, PEM (PKCS#8).
    pub key_pem: String,
    /// The object to create.
    pub object: CertificateSigningRequest,
}

/// A request for node `node_name`, with the key in `key_pem` or a new one. The object's name is
/// derived from the key, so that asking again with the same key finds the same object.
pub fn node_request(node_name: &str, key_pem: Option<&str>) -> Result<NodeRequest, CsrError> {
    request(node_name, key_pem, "node-csr", SIGNER, "client auth", Vec::new())
}

/// A request, with a new key, for the certificate that node `node_name` serves its API with, at
/// `names` (DNS names and addresses).
pub fn serving_request(node_name: &str, names: &[String]) -> Result<NodeRequest, CsrError> {
    let san = |name: &String| match name.parse() {
        Ok(ip) => Ok(SanType::IpAddress(ip)),
        Err(_) => name.as_str().try_into().map(SanType::DnsName),
    };
    let names = names.iter().map(san).collect::<Result<_, rcgen::Error>>();
    let names = names.map_err(|e| CsrError::Make(e.to_string()))?;
    request(node_name, None, "csr", SERVING_SIGNER, "server auth", names)
}

fn request(
    node_name: &str,
    key_pem: Option<&str>,
    prefix: &str,
    signer: &str,
    usage: &str,
    names: Vec<SanType>,
) -> Result<NodeRequest, CsrError> {
    let make = |e: rcgen::Error| CsrError::Make(e.to_string());
    let key = match key_pem {
        Some(pem) => KeyPair::from_pem(pem).map_err(make)?,
        None => KeyPair::generate().map_err(make)?,
    };
    let mut params = CertificateParams::default();
    let mut name = DistinguishedName::new();
    name.push(DnType::OrganizationName, NODES);
    name.push(DnType::CommonName, format!("{NODE_USER}{node_name}"));
    params.distinguished_name = name;
    params.subject_alt_names = names;
    let request = params.serialize_request(&key).and_then(|r| r.pem()).map_err(make)?;
    let public = rcgen::PublicKeyData::subject_public_key_info(&key);
    let digest = Sha256::new().chain_update(public).chain_update(node_name).finalize();
    let suffix = URL_SAFE_NO_PAD.encode(digest).to_lowercase().replace('_', "-");
    let suffix = suffix.trim_matches('-');
    Ok(NodeRequest {
        key_pem: key.serialize_pem(),
        object: CertificateSigningRequest {
            metadata: ObjectMeta {
                name: Some(format!("{prefix}-{suffix}")),
                ..ObjectMeta::default()
            },
            spec: CertificateSigningRequestSpec {
                request: ByteString(request.into_bytes()),
                signer_name: signer.to_owned(),
                usages: Some(vec!["digital signature".to_owned(), usage.to_owned()]),
                ..CertificateSigningRequestSpec::default()
            },
            status: None,
        },
    })
}

/// Where a request stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Nobody has approved it yet.
    WaitsForApproval,
    /// Approved, not signed yet.
    WaitsForIssue,
    /// The certificate chain, PEM.
    Issued(Vec<u8>),
}

/// What `object` says of itself.
pub fn progress(object: &CertificateSigningRequest) -> Result<Progress, CsrError> {
    let name = object.metadata.name.clone().unwrap_or_default();
    let Some(status) = object.status.as_ref() else { return Ok(Progress::WaitsForApproval) };
    let mut approved = false;
    for condition in status.conditions.iter().flatten() {
        let message = condition
            .message
            .clone()
            .or_else(|| condition.reason.clone())
            .unwrap_or_else(|| "no reason is given".to_owned());
        match condition.type_.as_str() {
            "Denied" => return Err(CsrError::Denied { name, message }),
            "Failed" => return Err(CsrError::Failed { name, message }),
            "Approved" => approved = true,
            _ => {}
        }
    }
    match status.certificate.as_ref().filter(|c| !c.0.is_empty()) {
        Some(certificate) if approved => Ok(Progress::Issued(certificate.0.clone())),
        _ if approved => Ok(Progress::WaitsForIssue),
        _ => Ok(Progress::WaitsForApproval),
    }
}

/// What a node needs to know of its own certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeCertificate {
    /// Node it was issued for.
    pub node_name: String,
    /// Seconds since the epoch.
    pub not_before: i64,
    /// Seconds since the epoch.
    pub not_after: i64,
}

impl NodeCertificate {
    /// Reads the first certificate in `pem`; `None` unless it is a node's.
    pub fn read(pem: &[u8]) -> Option<Self> {
        let der = CertificateDer::from_pem_slice(pem).ok()?;
        let (_, certificate) = X509Certificate::from_der(&der).ok()?;
        let name = certificate.subject().iter_common_name().next()?.as_str().ok()?;
        Some(Self {
            node_name: name.strip_prefix(NODE_USER)?.to_owned(),
            not_before: certificate.validity().not_before.timestamp(),
            not_after: certificate.validity().not_after.timestamp(),
        })
    }

    /// Whether it can be used at `now` (seconds since the epoch).
    pub fn is_valid_at(&self, now: i64) -> bool {
        (self.not_before..self.not_after).contains(&now)
    }

    /// When to ask for the next one: between 70 % and 90 % of its life, by `random` in 0..1.
    pub fn renew_at(&self, random: f64) -> i64 {
        let life = (self.not_after - self.not_before) as f64;
        self.not_before + (life * (0.7 + 0.2 * random.clamp(0.0, 1.0))) as i64
    }
}

/// Checks that the chain `pem` issued for CSR `name` is node `node_name`'s and belongs to the key.
pub fn check_issued(
    name: &str,
    pem: &[u8],
    node_name: &str,
    key_pem: &str,
) -> Result<NodeCertificate, CsrError> {
    let unusable = |cause: String| CsrError::Unusable { name: name.to_owned(), cause };
    let found = NodeCertificate::read(pem)
        .ok_or_else(|| unusable("it is not a node's certificate".to_owned()))?;
    if found.node_name != node_name {
        return Err(unusable(format!("it is for node {}, not {node_name}", found.node_name)));
    }
    let der = CertificateDer::from_pem_slice(pem).map_err(|e| unusable(e.to_string()))?;
    let (_, parsed) = X509Certificate::from_der(&der).map_err(|e| unusable(e.to_string()))?;
    let key = KeyPair::from_pem(key_pem).map_err(|e| unusable(e.to_string()))?;
    if rcgen::PublicKeyData::subject_public_key_info(&key) != parsed.public_key().raw {
        return Err(unusable("it belongs to another key".to_owned()));
    }
    Ok(found)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use k8s_openapi::api::certificates::v1::{
        CertificateSigningRequestCondition, CertificateSigningRequestStatus,
    };
    use x509_parser::certification_request::X509CertificationRequest;

    use super::*;

    #[test]
    fn the_request_says_what_the_kubelet_signer_demands_and_nothing_else() {
        let made = node_request("n1", None).unwrap();
        let spec = &made.object.spec;
        assert_eq!(spec.signer_name, SIGNER);
        assert_eq!(spec.usages.as_ref().unwrap(), &["digital signature", "client auth"]);
        let (_, pem) = x509_parser::pem::parse_x509_pem(&spec.request.0).unwrap();
        assert_eq!(pem.label, "CERTIFICATE REQUEST");
        let (_, request) = X509CertificationRequest::from_der(&pem.contents).unwrap();
        let info = &request.certification_request_info;
        assert_eq!(info.subject.to_string(), "O=system:nodes, CN=system:node:n1");
        assert_eq!(request.requested_extensions().map_or(0, Iterator::count), 0, "no SANs");
        assert_eq!(
            rcgen::PublicKeyData::subject_public_key_info(
                &KeyPair::from_pem(&made.key_pem).unwrap()
            ),
            info.subject_pki.raw
        );
    }

    #[test]
    fn a_serving_request_names_the_addresses_of_the_node() {
        let names = ["n1".to_owned(), "10.0.0.1".to_owned(), "fd00::1".to_owned()];
        let made = serving_request("n1", &names).unwrap();
        let spec = &made.object.spec;
        assert_eq!(spec.signer_name, SERVING_SIGNER);
        assert_eq!(spec.usages.as_ref().unwrap(), &["digital signature", "server auth"]);
        let (_, pem) = x509_parser::pem::parse_x509_pem(&spec.request.0).unwrap();
        let (_, request) = X509CertificationRequest::from_der(&pem.contents).unwrap();
        let subject = request.certification_request_info.subject.to_string();
        assert_eq!(subject, "O=system:nodes, CN=system:node:n1");
        assert_eq!(request.requested_extensions().map_or(0, Iterator::count), 1, "the SANs");
    }

    #[test]
    fn the_same_key_gives_the_same_object() {
        let first = node_request("n1", None).unwrap();
        let name = |r: &NodeRequest| r.object.metadata.name.clone().unwrap();
        let again = node_request("n1", Some(&first.key_pem)).unwrap();
        assert_eq!(name(&first), name(&again));
        assert_ne!(name(&first), name(&node_request("n2", Some(&first.key_pem)).unwrap()));
        assert!(
            name(&first).bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        );
    }

    fn answered(conditions: &[&str], certificate: Option<&str>) -> CertificateSigningRequest {
        CertificateSigningRequest {
            status: Some(CertificateSigningRequestStatus {
                certificate: certificate.map(|c| ByteString(c.into())),
                conditions: Some(
                    conditions
                        .iter()
                        .map(|c| CertificateSigningRequestCondition {
                            type_: (*c).to_owned(),
                            status: "True".to_owned(),
                            message: Some("because".to_owned()),
                            ..Default::default()
                        })
                        .collect(),
                ),
            }),
            ..node_request("n", None).unwrap().object
        }
    }

    #[test]
    fn progress_follows_the_conditions() {
        let fresh = node_request("n", None).unwrap().object;
        assert_eq!(progress(&fresh), Ok(Progress::WaitsForApproval));
        assert_eq!(progress(&answered(&[], Some("c"))), Ok(Progress::WaitsForApproval));
        assert_eq!(progress(&answered(&["Approved"], None)), Ok(Progress::WaitsForIssue));
        assert_eq!(
            progress(&answered(&["Approved"], Some("c"))),
            Ok(Progress::Issued(b"c".to_vec()))
        );
        assert!(matches!(progress(&answered(&["Denied"], None)), Err(CsrError::Denied { .. })));
        assert!(matches!(
            progress(&answered(&["Approved", "Failed"], None)),
            Err(CsrError::Failed { .. })
        ));
    }

    #[test]
    fn an_issued_certificate_must_be_ours() {
        let issue = |cn: &str, key: &KeyPair| {
            let mut params = CertificateParams::default();
            params.distinguished_name = DistinguishedName::new();
            params.distinguished_name.push(DnType::CommonName, cn);
            params.self_signed(key).unwrap().pem()
        };
        let (ours, other) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let check = |pem: String| check_issued("csr", pem.as_bytes(), "n", &ours.serialize_pem());
        let certificate = check(issue("system:node:n", &ours)).unwrap();
        assert!(certificate.is_valid_at(certificate.not_before));
        assert!(!certificate.is_valid_at(certificate.not_after));
        let renew = certificate.renew_at(0.5);
        assert!(certificate.not_before < renew && renew < certificate.not_after);
        for pem in [
            issue("system:node:m", &ours),
            issue("admin", &ours),
            issue("system:node:n", &other),
            "junk".to_owned(),
        ] {
            assert!(check(pem).is_err());
        }
    }
}
