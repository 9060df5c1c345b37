//! `podCertificate` in projected volumes: the request for a certificate, and what becomes of it. Pure,
//! but for the making of keys.
//!
//! A key is made here and never leaves the node; a PodCertificateRequest asks for a certificate of it.
//! What was issued is used until it begins to need renewal; then another key and request follow, and
//! the files keep what they have until that is answered. The files themselves are the memory of what
//! was issued: after a restart they are used on, and renewed at once.

use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1beta1::{PodCertificateRequest, PodCertificateRequestSpec};
use k8s_openapi::api::core::v1::{Pod, PodCertificateProjection};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference, Time};
use rcgen::{CertificateParams, DistinguishedName, KeyPair, RsaKeySize};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::trust_bundle::{CERTIFICATE, blocks, pem};

/// A request that cannot be found for so long is taken to have been deleted, in seconds.
const ABANDON: i64 = 600;
/// At most so much later than it could, a certificate is renewed: others do not all do at once.
const SPREAD: i64 = 300;
/// None is renewed sooner than so many seconds after it came.
const SOONEST: i64 = 10;

/// A key and the certificates of it, in PEM.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Credential {
    pub(super) key: String,
    pub(super) chain: String,
    /// In seconds since the epoch.
    renew_at: i64,
    expires: i64,
}

/// A request that was made.
#[derive(Clone, PartialEq, Eq)]
struct Asked {
    name: String,
    key: String,
    abandon_at: i64,
}

/// One certificate of a pod.
#[derive(Clone, Default, PartialEq, Eq)]
pub(super) struct State {
    pub(super) held: Option<Credential>,
    asked: Option<Asked>,
    /// Why there will be none (any more).
    refused: Option<String>,
}

/// What there is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Nothing: what is held is good, or it was refused.
    Nothing,
    /// Ask for a certificate.
    Ask,
    /// Look what became of this request.
    Look(String),
}

impl State {
    /// Of what the files of an earlier run hold.
    pub(super) fn of_files(key: Option<&[u8]>, chain: Option<&[u8]>, now: i64) -> Self {
        let (Some(key), Some(chain)) = (key.and_then(text), chain.and_then(text)) else {
            return Self::default();
        };
        let expires = blocks(chain.as_bytes()).next().and_then(|leaf| ends(&leaf));
        match expires.filter(|expires| *expires > now) {
            // When it was to be renewed is not told there.
            Some(expires) => Self {
                held: Some(Credential { key, chain, renew_at: now, expires }),
                ..Self::default()
            },
            None => Self::default(),
        }
    }

    pub(super) fn step(&self, now: i64) -> Step {
        match (&self.refused, &self.asked, &self.held) {
            (Some(_), ..) => Step::Nothing,
            (None, Some(asked), _) => Step::Look(asked.name.clone()),
            (None, None, Some(held)) if now < held.renew_at => Step::Nothing,
            (None, None, _) => Step::Ask,
        }
    }

    /// A request has been made, with this key.
    pub(super) fn asked(&mut self, name: String, key: String, now: i64) {
        self.asked = Some(Asked { name, key, abandon_at: now + ABANDON });
    }

    /// What became of the request; `spread` is in 0..=1.
    pub(super) fn found(&mut self, request: Option<&PodCertificateRequest>, now: i64, spread: f64) {
        let Some(asked) = self.asked.clone() else { return };
        let Some(request) = request else {
            if now > asked.abandon_at {
                self.asked = None;
            }
            return;
        };
        let status = request.status.clone().unwrap_or_default();
        for condition in status.conditions.iter().flatten() {
            let refusal = match condition.type_.as_str() {
                "Issued" => {
                    let chain = status.certificate_chain.as_deref().unwrap_or_default();
                    let seconds =
                        |time: &Option<Time>| time.as_ref().map(|time| time.0.as_second());
                    let expires = seconds(&status.not_after).unwrap_or(i64::MAX);
                    let renew_at = seconds(&status.begin_refresh_at).unwrap_or(expires);
                    let later = (SPREAD as f64 * spread) as i64;
                    let clean = blocks(chain.as_bytes()).map(|der| pem(CERTIFICATE, &der));
                    self.held = Some(Credential {
                        key: asked.key,
                        chain: clean.collect(),
                        renew_at: renew_at.saturating_add(later).max(now + SOONEST),
                        expires,
                    });
                    self.asked = None;
                    return;
                }
                "Denied" => "denied",
                "Failed" => "failed",
                _ => continue,
            };
            self.asked = None;
            self.refused = Some(format!(
                "PodCertificateRequest was permanently {refusal}: reason={:?} message={:?}",
                condition.reason, condition.message
            ));
            return;
        }
    }

    /// What the files hold, or why there is nothing for them.
    pub(super) fn credential(&self) -> Result<&Credential, String> {
        match (&self.held, &self.refused) {
            (Some(held), _) => Ok(held),
            (None, Some(why)) => Err(why.clone()),
            (None, None) => Err("credential bundle is not issued yet".into()),
        }
    }

    /// When to look again, in seconds since the epoch.
    pub(super) fn due(&self, now: i64) -> Option<i64> {
        match (&self.refused, &self.asked, &self.held) {
            (Some(_), ..) => None,
            // What becomes of it is told; whether it is gone is not.
            (None, Some(asked), _) => Some(asked.abandon_at.max(now) + 1),
            (None, None, held) => held.as_ref().map(|held| held.renew_at),
        }
    }

    /// Whether the certificate that the files hold is no longer good.
    pub(super) fn has_expired(&self, now: i64) -> bool {
        self.held.as_ref().is_some_and(|held| held.expires <= now)
    }

    pub(super) fn is_waiting(&self) -> bool {
        self.asked.is_some() && self.held.is_none()
    }

    pub(super) fn refusal(&self) -> Option<&str> {
        self.refused.as_deref()
    }
}

fn text(bytes: &[u8]) -> Option<String> {
    String::from_utf8(bytes.to_vec()).ok().filter(|text| !text.is_empty())
}

fn ends(leaf: &[u8]) -> Option<i64> {
    let (_, certificate) = X509Certificate::from_der(leaf).ok()?;
    Some(certificate.validity().not_after.timestamp())
}

/// Key and certificates of one file that holds both.
pub(super) fn split(bundle: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
    let text = std::str::from_utf8(bundle).ok()?;
    let at = text.find(&format!("-----BEGIN {CERTIFICATE}-----"))?;
    let (key, chain) = text.split_at(at);
    Some((key.as_bytes().to_vec(), chain.as_bytes().to_vec()))
}

/// A new key of `kind` (PKCS#8, PEM), and the request that proves that it is ours (PKCS#10, DER). Takes a
/// while for RSA.
pub(super) fn make_key(kind: &str) -> Result<(String, Vec<u8>), String> {
    let key = match kind {
        "RSA3072" => KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, RsaKeySize::_3072),
        "RSA4096" => KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, RsaKeySize::_4096),
        "ECDSAP256" => KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256),
        "ECDSAP384" => KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384),
        "ECDSAP521" => KeyPair::generate_for(&rcgen::PKCS_ECDSA_P521_SHA512),
        "ED25519" => KeyPair::generate_for(&rcgen::PKCS_ED25519),
        other => return Err(format!("unknown key type {other:?}")),
    };
    let failed = |error: rcgen::Error| format!("while generating a {kind} key: {error}");
    let key = key.map_err(failed)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    let request = params.serialize_request(&key).map_err(failed)?;
    Ok((key.serialize_pem(), request.der().to_vec()))
}

/// Who asks: what a request says beside what the volume says.
pub(super) struct Asking<'a> {
    pub(super) pod: &'a Pod,
    pub(super) account_uid: String,
    pub(super) node_name: &'a str,
    pub(super) node_uid: String,
}

impl Asking<'_> {
    /// The request to make.
    pub(super) fn request(
        self,
        source: &PodCertificateProjection,
        proof: Vec<u8>,
    ) -> PodCertificateRequest {
        let metadata = &self.pod.metadata;
        let (name, uid) =
            (metadata.name.clone().unwrap_or_default(), metadata.uid.clone().unwrap_or_default());
        let owner = OwnerReference {
            api_version: "v1".into(),
            kind: "Pod".into(),
            name: name.clone(),
            uid: uid.clone(),
            ..OwnerReference::default()
        };
        PodCertificateRequest {
            metadata: ObjectMeta {
                namespace: metadata.namespace.clone(),
                generate_name: Some("req-".into()),
                owner_references: Some(vec![owner]),
                ..ObjectMeta::default()
            },
            spec: PodCertificateRequestSpec {
                signer_name: source.signer_name.clone(),
                pod_name: name,
                pod_uid: uid,
                service_account_name: account_of(self.pod).to_owned(),
                service_account_uid: self.account_uid,
                node_name: self.node_name.to_owned(),
                node_uid: self.node_uid,
                max_expiration_seconds: source.max_expiration_seconds,
                stub_pkc_s10_request: ByteString(proof),
                unverified_user_annotations: source.user_annotations.clone(),
                ..PodCertificateRequestSpec::default()
            },
            status: None,
        }
    }
}

/// The pod's service account.
pub(super) fn account_of(pod: &Pod) -> &str {
    let spec = pod.spec.as_ref();
    let name = spec.and_then(|spec| spec.service_account_name.as_deref());
    name.filter(|name| !name.is_empty()).unwrap_or("default")
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn request(status: Value) -> PodCertificateRequest {
        serde_json::from_value(json!({"metadata": {"name": "req-1"}, "status": status, "spec":
            {"signerName": "s/x", "podName": "p", "podUID": "u", "serviceAccountName": "a",
             "serviceAccountUID": "b", "nodeName": "n", "nodeUID": "m", "stubPKCS10Request": ""}}))
        .unwrap()
    }

    fn condition(kind: &str) -> Value {
        json!([{"type": kind, "status": "True", "reason": "Why", "message": "words",
            "lastTransitionTime": "2026-01-01T00:00:00Z"}])
    }

    fn issued(refresh: &str) -> PodCertificateRequest {
        request(json!({"conditions": condition("Issued"),
            "certificateChain": format!("junk\n{}", pem(CERTIFICATE, b"leaf")),
            "beginRefreshAt": refresh, "notAfter": "1970-01-01T03:00:00Z"}))
    }

    #[test]
    fn a_certificate_is_asked_for_used_and_renewed() {
        let mut state = State::default();
        assert_eq!(state.step(0), Step::Ask);
        state.asked("req-1".into(), "key".into(), 0);
        assert!(state.is_waiting());
        assert_eq!(state.step(1), Step::Look("req-1".into()));
        state.found(Some(&request(json!(null))), 1, 0.0);
        assert_eq!(state.credential().err().unwrap(), "credential bundle is not issued yet");
        state.found(Some(&issued("1970-01-01T01:00:00Z")), 2, 0.5);
        let held = state.credential().ok().unwrap().clone();
        assert_eq!((&*held.key, held.chain), ("key", pem(CERTIFICATE, b"leaf")));
        assert_eq!((state.due(2), state.step(3749)), (Some(3750), Step::Nothing));
        assert_eq!(state.step(3750), Step::Ask);
        state.asked("req-2".into(), "key-2".into(), 3750);
        assert!(!state.is_waiting() && state.credential().ok().unwrap().key == "key");
        // It is not there (yet), and later it is taken to be gone.
        state.found(None, 4000, 0.0);
        assert_eq!(state.step(4000), Step::Look("req-2".into()));
        state.found(None, 4351, 0.0);
        assert_eq!(state.step(4351), Step::Ask);
        assert!(!state.has_expired(10_799) && state.has_expired(10_800));
    }

    #[test]
    fn a_refusal_is_final_and_what_is_held_stays() {
        for (kind, word) in [("Denied", "denied"), ("Failed", "failed")] {
            let mut state = State::default();
            state.asked("req-1".into(), "key".into(), 0);
            state.found(Some(&request(json!({"conditions": condition(kind)}))), 1, 0.0);
            let why = state.credential().err().unwrap();
            assert!(why.contains(word) && why.contains("\"words\""), "{why}");
            assert_eq!((state.step(1 << 40), state.due(1)), (Step::Nothing, None));
        }
        let mut state = State::default();
        state.asked("req-1".into(), "key".into(), 0);
        state.found(Some(&issued("1970-01-01T00:00:00Z")), 1, 0.0);
        state.asked("req-2".into(), "key-2".into(), 1);
        state.found(Some(&request(json!({"conditions": condition("Denied")}))), 2, 0.0);
        assert_eq!(state.credential().ok().unwrap().key, "key");
        assert!(state.refusal().is_some());
    }

    #[test]
    fn what_the_files_hold_is_used_on_and_renewed_at_once() {
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::default().self_signed(&key).unwrap();
        let both = format!("{}{}", key.serialize_pem(), certificate.pem());
        let (k, chain) = split(both.as_bytes()).unwrap();
        let state = State::of_files(Some(&k), Some(&chain), 1_800_000_000);
        assert_eq!(state.credential().ok().unwrap().key, key.serialize_pem());
        assert_eq!(state.step(1_800_000_000), Step::Ask);
        assert!(State::of_files(Some(&k), Some(&chain), i64::MAX) == State::default());
        assert!(State::of_files(None, Some(&chain), 0) == State::default());
        assert_eq!(split(b"nothing"), None);
    }

    #[test]
    fn keys_of_each_kind_prove_themselves() {
        for kind in ["RSA3072", "ECDSAP256", "ECDSAP384", "ECDSAP521", "ED25519"] {
            let (key, proof) = make_key(kind).unwrap();
            assert!(key.contains("BEGIN PRIVATE KEY"), "{kind}");
            let (_, request) =
                x509_parser::certification_request::X509CertificationRequest::from_der(&proof)
                    .unwrap();
            let info = &request.certification_request_info;
            assert_eq!(info.subject.iter().count(), 0, "{kind}");
        }
        assert!(make_key("DSA").unwrap_err().contains("unknown key type"));
    }

    #[test]
    fn a_request_says_for_whom_it_is() {
        let pod: Pod = serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "ns",
            "uid": "u"}, "spec": {"containers": [], "serviceAccountName": "a"}}))
        .unwrap();
        let source: PodCertificateProjection = serde_json::from_value(json!({"signerName": "s/x",
            "keyType": "ED25519", "maxExpirationSeconds": 7200, "userAnnotations": {"s/k": "v"}}))
        .unwrap();
        let asking =
            Asking { pod: &pod, account_uid: "b".into(), node_name: "n", node_uid: "m".into() };
        let made = serde_json::to_value(asking.request(&source, b"proof".to_vec())).unwrap();
        assert_eq!(made["apiVersion"], "certificates.k8s.io/v1beta1");
        assert_eq!(
            made["metadata"],
            json!({"namespace": "ns", "generateName": "req-",
            "ownerReferences": [{"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": "u"}]})
        );
        assert_eq!(
            made["spec"],
            json!({"signerName": "s/x", "podName": "p", "podUID": "u",
            "serviceAccountName": "a", "serviceAccountUID": "b", "nodeName": "n", "nodeUID": "m",
            "maxExpirationSeconds": 7200, "stubPKCS10Request": "cHJvb2Y=",
            "unverifiedUserAnnotations": {"s/k": "v"}})
        );
    }
}
