//! The server's side of TLS: what is spoken, with which certificate.
//!
//! Clients are asked for a certificate and need not have one. The handshake proves only that they
//! hold its key; whether it is believed is decided for each request (`authenticate`), so that one
//! that expires on an open connection stops counting, and the CA can change under the server.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use rcgen::{CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, KeyPair};
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{
    DigitallySignedStruct, DistinguishedName as IssuerName, ServerConfig, SignatureScheme,
};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::NodeApiError;
use super::reload::Reloaded;
use crate::config::node_api::{ServerTls, TlsVersion};
use crate::join::files::write_atomic;

/// Names of suites that Go offers and that this node never speaks, as they lack forward secrecy or
/// authenticated encryption; they are left out with a warning.
const NEVER_SPOKEN: [&str; 13] = [
    "TLS_RSA_WITH_RC4_128_SHA",
    "TLS_RSA_WITH_3DES_EDE_CBC_SHA",
    "TLS_RSA_WITH_AES_128_CBC_SHA",
    "TLS_RSA_WITH_AES_256_CBC_SHA",
    "TLS_RSA_WITH_AES_128_CBC_SHA256",
    "TLS_RSA_WITH_AES_128_GCM_SHA256",
    "TLS_RSA_WITH_AES_256_GCM_SHA384",
    "TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA",
    "TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA",
    "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA",
    "TLS_ECDHE_RSA_WITH_AES_256_CBC_SHA",
    "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA256",
];

/// What is spoken; `certificate` is asked at each handshake.
pub(super) fn server_config(
    options: &ServerTls,
    certificate: Arc<dyn ResolvesServerCert>,
    ask_for_certificates: bool,
) -> Result<ServerConfig, NodeApiError> {
    let mut provider = aws_lc_rs::default_provider();
    if !options.cipher_suites.is_empty() {
        let wanted = wanted_suites(&options.cipher_suites)?;
        // Those of TLS 1.3 are not for choosing, here as in Go.
        provider.cipher_suites.retain(|suite| {
            let name = suite.suite().as_str().unwrap_or_default();
            suite.tls13().is_some() || wanted.iter().any(|wanted| wanted == name)
        });
    }
    if !options.curves.is_empty() {
        provider.kx_groups = wanted_groups(&options.curves)?;
    }
    let versions: &[_] = match options.min_version {
        TlsVersion::V12 => &[&rustls::version::TLS13, &rustls::version::TLS12],
        TlsVersion::V13 => &[&rustls::version::TLS13],
    };
    let speaks12 = provider.cipher_suites.iter().any(|suite| suite.tls13().is_none());
    let versions = if speaks12 { versions } else { &versions[..1] };
    let provider = Arc::new(provider);
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(versions)
        .map_err(|error| NodeApiError::Tls(error.to_string()))?;
    let builder = if ask_for_certificates {
        builder.with_client_cert_verifier(Arc::new(AnyClient(provider)))
    } else {
        builder.with_no_client_auth()
    };
    let mut config = builder.with_cert_resolver(certificate);
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

/// The key exchanges that are asked for, in the usual order: as in Go, they are a set.
fn wanted_groups(
    curves: &[u16],
) -> Result<Vec<&'static dyn rustls::crypto::SupportedKxGroup>, NodeApiError> {
    let all = aws_lc_rs::ALL_KX_GROUPS;
    for curve in curves {
        if !all.iter().any(|group| u16::from(group.name()) == *curve) {
            tracing::warn!(
                curve,
                "tlsCurvePreferences names a key exchange that is not spoken here"
            );
        }
    }
    let wanted = all.iter().copied().filter(|group| curves.contains(&u16::from(group.name())));
    let wanted: Vec<_> = wanted.collect();
    if wanted.is_empty() {
        return Err(NodeApiError::Tls(format!(
            "KubeletConfiguration.tlsCurvePreferences {curves:?}: none of them is spoken here; add \
             29 (X25519), 23 (P-256), 24 (P-384) or 4588 (X25519MLKEM768)"
        )));
    }
    Ok(wanted)
}

fn wanted_suites(names: &[String]) -> Result<Vec<String>, NodeApiError> {
    let known = aws_lc_rs::ALL_CIPHER_SUITES;
    let mut wanted = Vec::new();
    for name in names {
        // IANA and Go name TLS 1.3's without the version, the library with it.
        let thirteen = name.replacen("TLS_", "TLS13_", 1);
        // An old name of Go's.
        let name = name
            .strip_suffix("_POLY1305")
            .map_or_else(|| name.clone(), |stem| format!("{stem}_POLY1305_SHA256"));
        let is = |other: &str| known.iter().any(|suite| suite.suite().as_str() == Some(other));
        if is(&name) || is(&thirteen) {
            wanted.push(name);
        } else if NEVER_SPOKEN.contains(&name.as_str()) {
            tracing::warn!(suite = name, "tlsCipherSuites names a suite that is not spoken here");
        } else {
            return Err(NodeApiError::Tls(format!(
                "KubeletConfiguration.tlsCipherSuites: {name:?} is no cipher suite"
            )));
        }
    }
    Ok(wanted)
}

/// The certificate in one or two files, read again when they change.
pub(super) struct Certificate(Reloaded<CertifiedKey>);

impl Certificate {
    /// Chain and key in one file or in two.
    pub(super) fn of(chain: &Path, key: &Path) -> Self {
        Self(Reloaded::new(vec![chain.to_owned(), key.to_owned()], certified))
    }

    /// Whether there is one that can be used.
    pub(super) fn is_there(&self) -> bool {
        self.0.get().is_some()
    }
}

impl fmt::Debug for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Certificate")
    }
}

impl ResolvesServerCert for Certificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.get()
    }
}

fn certified(contents: &[Vec<u8>]) -> Result<CertifiedKey, String> {
    let [chain, key] = contents else { return Err("two files are needed".into()) };
    let chain: Vec<_> = CertificateDer::pem_slice_iter(chain)
        .collect::<Result<_, _>>()
        .map_err(|error| format!("certificate: {error}"))?;
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|error| format!("key: {error}"))?;
    if chain.is_empty() {
        return Err("there is no certificate".into());
    }
    CertifiedKey::from_der(chain, key, &aws_lc_rs::default_provider())
        .map_err(|error| error.to_string())
}

/// Makes `kubelet.crt` and `kubelet.key` in `dir` unless there is a pair that is good for `names`
/// now. Clients cannot check it; it serves clusters that do not issue serving certificates.
pub(super) fn ensure_self_signed(
    dir: &Path,
    names: &[String],
    now: i64,
) -> Result<Certificate, NodeApiError> {
    let (chain, key) = (dir.join("kubelet.crt"), dir.join("kubelet.key"));
    let there = Certificate::of(&chain, &key);
    let good = || {
        let pem = std::fs::read(&chain).ok()?;
        let der = CertificateDer::from_pem_slice(&pem).ok()?;
        let (_, parsed) = X509Certificate::from_der(&der).ok()?;
        (parsed.validity().not_after.timestamp() > now).then_some(())
    };
    if good().is_some() && there.is_there() {
        return Ok(there);
    }
    let make = |error: rcgen::Error| NodeApiError::Tls(format!("make a certificate: {error}"));
    let pair = KeyPair::generate().map_err(make)?;
    let mut params = CertificateParams::new(names.to_vec()).map_err(make)?;
    let mut name = DistinguishedName::new();
    let host = names.first().map_or("node", String::as_str);
    name.push(DnType::CommonName, format!("{host}@{now}"));
    params.distinguished_name = name;
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let begin = jiff::Timestamp::from_second(now - 3600).unwrap_or_default();
    let day = begin.to_zoned(jiff::tz::TimeZone::UTC).date();
    params.not_before = rcgen::date_time_ymd(day.year().into(), day.month() as u8, day.day() as u8);
    params.not_after =
        rcgen::date_time_ymd(i32::from(day.year()) + 1, day.month() as u8, day.day().min(28) as u8);
    let certificate = params.self_signed(&pair).map_err(make)?;
    let write = |path: &Path, mode, text: String| {
        write_atomic(path, mode, text.as_bytes())
            .map_err(|error| NodeApiError::Tls(error.to_string()))
    };
    write(&key, 0o600, pair.serialize_pem())?;
    write(&chain, 0o644, certificate.pem())?;
    Ok(Certificate::of(&chain, &key))
}

/// Takes any client certificate whose key the client holds.
#[derive(Debug)]
struct AnyClient(Arc<CryptoProvider>);

impl ClientCertVerifier for AnyClient {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[IssuerName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(
            message,
            certificate,
            signed,
            &self.0.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            certificate,
            signed,
            &self.0.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_exchanges_are_those_asked_for() {
        let names = |curves: &[u16]| -> Result<Vec<u16>, String> {
            let groups = wanted_groups(curves).map_err(|error| error.to_string())?;
            Ok(groups.iter().map(|group| group.name().into()).collect())
        };
        assert_eq!(names(&[29]), Ok(vec![29]));
        let mut some = names(&[24, 25, 23]).unwrap();
        some.sort_unstable();
        // 25 (P-521) is not spoken.
        assert_eq!(some, [23, 24]);
        assert!(names(&[25]).unwrap_err().contains("none of them is spoken here"));
    }
}
