//! Whether an answer read without verification comes from the right cluster. Pure.
//!
//! `kube-public/cluster-info` carries, for each bootstrap token, a detached JWS (RFC 7515 appendix
//! F) over its kubeconfig, made by HMAC-SHA256 with the token's secret; and the operator may pin the
//! cluster's CA by the SHA-256 of its public key (RFC 7469 SPKI).

use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use hmac::{Hmac, KeyInit, Mac};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::token::BootstrapToken;

/// Why discovery is not to be trusted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VerifyError {
    /// `cluster-info` has no `kubeconfig`.
    #[error("kube-public/cluster-info holds no kubeconfig: is this a kubeadm cluster?")]
    NoKubeconfig,
    /// No signature for this token.
    #[error(
        "the control plane does not know token {id}: it has expired, was deleted, or belongs to \
         another cluster; `kubeadm token create --print-join-command` makes a new one"
    )]
    UnknownToken {
        /// Token id.
        id: String,
    },
    /// The signature is not made with this token.
    #[error(
        "the signature of cluster-info does not match token {id}: the token is wrong, or this is \
         not the cluster that issued it; `kubeadm token create --print-join-command` on the right \
         control plane prints the values to use"
    )]
    BadSignature {
        /// Token id.
        id: String,
    },
    /// The CA in cluster-info is not a certificate.
    #[error("the certificate authority in cluster-info cannot be read: {0}")]
    BadAuthority(String),
    /// No pinned hash fits.
    #[error(
        "no CA certificate of the cluster matches --discovery-token-ca-cert-hash (it presents \
         {found}): the hash is wrong, or somebody stands between; `kubeadm token create \
         --print-join-command` on the control plane prints the right one"
    )]
    PinMismatch {
        /// What the cluster presents, `sha256:...`, comma-separated.
        found: String,
    },
    /// A hash that is none.
    #[error(
        "`{0}` is not of the form sha256:<64 hex digits> (or, as RFC 7469 writes it, \
         pin-sha256=\"<base64>\")"
    )]
    BadPin(String),
}

/// The SHA-256 of a public key (SubjectPublicKeyInfo), as kubeadm prints it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CaPin([u8; 32]);

impl CaPin {
    /// Reads `sha256:<hex>`, or `pin-sha256="<base64>"` as RFC 7469 writes it.
    pub fn parse(text: &str) -> Result<Self, VerifyError> {
        let bad = || VerifyError::BadPin(text.to_owned());
        if let Some(pin) = text.trim().strip_prefix("pin-sha256=") {
            let hash = STANDARD.decode(pin.trim_matches('"')).map_err(|_| bad())?;
            return hash.try_into().map(Self).map_err(|_| bad());
        }
        let hex = text.trim().strip_prefix("sha256:").ok_or_else(bad)?;
        if hex.len() != 64 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(bad());
        }
        let mut hash = [0; 32];
        for (i, byte) in hash.iter_mut().enumerate() {
            let digits = hex.get(2 * i..2 * i + 2).ok_or_else(bad)?;
            *byte = u8::from_str_radix(digits, 16).map_err(|_| bad())?;
        }
        Ok(Self(hash))
    }

    fn of(certificate: &CertificateDer<'_>) -> Result<Self, VerifyError> {
        let (_, parsed) = X509Certificate::from_der(certificate)
            .map_err(|e| VerifyError::BadAuthority(e.to_string()))?;
        Ok(Self(Sha256::digest(parsed.public_key().raw).into()))
    }
}

impl std::fmt::Display for CaPin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("sha256:")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The kubeconfig in the data of `cluster-info`, once its signature is found to be made with
/// `token`.
pub fn signed_kubeconfig<'a>(
    data: &'a BTreeMap<String, String>,
    token: &BootstrapToken,
) -> Result<&'a str, VerifyError> {
    let kubeconfig = data.get("kubeconfig").ok_or(VerifyError::NoKubeconfig)?;
    let unknown = || VerifyError::UnknownToken { id: token.id().to_owned() };
    let jws = data.get(&format!("jws-kubeconfig-{}", token.id())).ok_or_else(unknown)?;
    if jws.is_empty() {
        return Err(unknown());
    }
    if detached_jws_is_valid(jws, kubeconfig.as_bytes(), token) {
        Ok(kubeconfig)
    } else {
        Err(VerifyError::BadSignature { id: token.id().to_owned() })
    }
}

#[derive(Deserialize)]
struct JwsHeader {
    alg: String,
    kid: Option<String>,
}

/// Whether `jws` (`header..signature`) is the HS256 signature of `content` by `token`.
fn detached_jws_is_valid(jws: &str, content: &[u8], token: &BootstrapToken) -> bool {
    let mut parts = jws.trim().split('.');
    let (Some(header), Some(""), Some(signature), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return false;
    };
    let fits = URL_SAFE_NO_PAD
        .decode(header)
        .ok()
        .and_then(|json| serde_json::from_slice::<JwsHeader>(&json).ok())
        .is_some_and(|h| h.alg == "HS256" && h.kid.as_deref() == Some(token.id()));
    if !fits {
        return false;
    }
    let (Ok(signature), Ok(mut mac)) = (
        URL_SAFE_NO_PAD.decode(signature),
        Hmac::<Sha256>::new_from_slice(token.secret().as_bytes()),
    ) else {
        return false;
    };
    mac.update(header.as_bytes());
    mac.update(b".");
    mac.update(URL_SAFE_NO_PAD.encode(content).as_bytes());
    mac.verify_slice(&signature).is_ok()
}

/// The CA certificates in `pem`, if one of them fits one of the pins: several pins are for a CA that
/// is being replaced. With no pins (the operator chose to skip the check) all of them.
pub fn pinned_authorities(
    pem: &[u8],
    pins: &[CaPin],
) -> Result<Vec<CertificateDer<'static>>, VerifyError> {
    let all = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| VerifyError::BadAuthority(e.to_string()))?;
    if all.is_empty() {
        return Err(VerifyError::BadAuthority("it holds no certificate".to_owned()));
    }
    if pins.is_empty() {
        return Ok(all);
    }
    let found = all.iter().map(CaPin::of).collect::<Result<Vec<_>, _>>()?;
    if found.iter().any(|pin| pins.contains(pin)) {
        return Ok(all);
    }
    let found = found.iter().map(CaPin::to_string).collect::<Vec<_>>().join(", ");
    Err(VerifyError::PinMismatch { found })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn sign(header: &str, content: &str, secret: &str) -> String {
        let header = URL_SAFE_NO_PAD.encode(header);
        let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).unwrap();
        mac.update(format!("{header}.{}", URL_SAFE_NO_PAD.encode(content)).as_bytes());
        format!("{header}..{}", URL_SAFE_NO_PAD.encode(mac.finalize().into_bytes()))
    }

    fn info(jws: String) -> BTreeMap<String, String> {
        [
            ("kubeconfig".to_owned(), "apiVersion: v1\n".to_owned()),
            ("jws-kubeconfig-abcdef".to_owned(), jws),
        ]
        .into()
    }

    const SECRET: &str = "0123456789abcdef";

    #[test]
    fn a_signature_is_valid_only_for_its_token_content_and_algorithm() {
        let token = BootstrapToken::parse("abcdef.0123456789abcdef").unwrap();
        let header = r#"{"alg":"HS256","kid":"abcdef"}"#;
        let good = sign(header, "apiVersion: v1\n", SECRET);
        assert_eq!(signed_kubeconfig(&info(good.clone()), &token).unwrap(), "apiVersion: v1\n");

        let bad = Err(VerifyError::BadSignature { id: "abcdef".to_owned() });
        for jws in [
            sign(header, "apiVersion: v2\n", SECRET),
            sign(header, "apiVersion: v1\n", "0123456789abcdeX"),
            sign(r#"{"alg":"none","kid":"abcdef"}"#, "apiVersion: v1\n", SECRET),
            sign(r#"{"alg":"HS256","kid":"other1"}"#, "apiVersion: v1\n", SECRET),
            good.replace("..", "."),
            good.replace("..", ".YQ."),
            good[..good.len() - 2].to_owned(),
            "..".to_owned(),
            "junk".to_owned(),
        ] {
            assert_eq!(signed_kubeconfig(&info(jws.clone()), &token), bad, "{jws}");
        }
        let other = BootstrapToken::parse("fedcba.0123456789abcdef").unwrap();
        let unknown = VerifyError::UnknownToken { id: "fedcba".to_owned() };
        assert_eq!(signed_kubeconfig(&info(good), &other), Err(unknown));
        assert_eq!(signed_kubeconfig(&BTreeMap::new(), &token), Err(VerifyError::NoKubeconfig));
    }

    #[test]
    fn a_pin_is_the_hash_of_the_public_key() {
        let key = rcgen::KeyPair::generate().unwrap();
        let ca = rcgen::CertificateParams::default().self_signed(&key).unwrap();
        let (pem, der) = (ca.pem(), ca.der().clone());
        let pin = CaPin::of(&der).unwrap();
        assert_eq!(
            pin.0,
            <[u8; 32]>::from(Sha256::digest(rcgen::PublicKeyData::subject_public_key_info(&key)))
        );
        assert_eq!(CaPin::parse(&pin.to_string()).unwrap(), pin);
        let rfc = format!("pin-sha256=\"{}\"", STANDARD.encode(pin.0));
        assert_eq!(CaPin::parse(&rfc).unwrap(), pin);
        assert_eq!(
            CaPin::parse(&pin.to_string().to_uppercase().replace("SHA", "sha")).unwrap(),
            pin
        );
        let other = CaPin([7; 32]);
        assert_eq!(pinned_authorities(pem.as_bytes(), &[other, pin]).unwrap().len(), 1);
        assert_eq!(pinned_authorities(pem.as_bytes(), &[]).unwrap().len(), 1);
        assert_eq!(
            pinned_authorities(pem.as_bytes(), &[other]),
            Err(VerifyError::PinMismatch { found: pin.to_string() })
        );
        assert!(matches!(pinned_authorities(b"junk", &[pin]), Err(VerifyError::BadAuthority(_))));
        for bad in [
            "",
            "sha256:",
            "md5:00",
            "sha256:zz",
            &format!("sha256:{}", "é".repeat(32)),
            &format!("sha256:{}", "+f".repeat(32)),
            "pin-sha256=\"YQ==\"",
        ] {
            assert!(CaPin::parse(bad).is_err(), "{bad}");
        }
    }
}
