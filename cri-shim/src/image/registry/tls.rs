//! How registries are known, and how they know this node: certificates.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        ResolvesClientCert,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
    sign::CertifiedKey,
};

use super::{super::ImageError, hosts::Host};

/// Makes aws-lc-rs the TLS provider of the process. Calling it again, or after someone else chose
/// one, changes nothing.
pub fn init_tls() {
    if CryptoProvider::get_default().is_none() {
        // Losing a race means that another thread installed the same.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    }
}

/// The TLS settings for a host, and those for wherever it redirects to: the same but for the client
/// certificate, which is this host's business.
pub(super) struct Settings {
    pub(super) own: ClientConfig,
    pub(super) elsewhere: ClientConfig,
    /// There is nothing on this machine to know a registry by.
    pub(super) no_roots: bool,
}

/// Reads what `host` says of certificates.
///
/// # Errors
/// [`ImageError::Config`] with the file that can't be used.
pub(super) fn settings(host: &Host) -> Result<Settings, ImageError> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    for path in &host.ca {
        let certificates = certificates(path)?;
        if roots.add_parsable_certificates(certificates).0 == 0 {
            return Err(bad(path, "there is no usable certificate in it"));
        }
    }
    let no_roots = roots.is_empty() && !host.skip_verify;
    let keys = host
        .client
        .iter()
        .map(|(certificate, key)| client_key(&provider, certificate, key.as_deref()))
        .collect::<Result<Vec<_>, _>>()?;
    let builder = || {
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| bad(Path::new("TLS"), &error.to_string()))?;
        Ok(if host.skip_verify {
            let verifier = Arc::new(Unverified(Arc::clone(&provider)));
            builder.dangerous().with_custom_certificate_verifier(verifier)
        } else {
            builder.with_root_certificates(roots.clone())
        })
    };
    let elsewhere = builder()?.with_no_client_auth();
    let own = match keys.is_empty() {
        true => elsewhere.clone(),
        false => builder()?.with_client_cert_resolver(Arc::new(ClientKeys(keys))),
    };
    Ok(Settings { own, elsewhere, no_roots })
}

fn bad(path: &Path, reason: &str) -> ImageError {
    ImageError::Config { path: path.to_owned(), reason: reason.to_owned() }
}

fn read(path: &Path) -> Result<Vec<u8>, ImageError> {
    std::fs::read(path).map_err(|error: io::Error| bad(path, &error.to_string()))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, ImageError> {
    CertificateDer::pem_slice_iter(&read(path)?)
        .collect::<Result<_, _>>()
        .map_err(|error| bad(path, &error.to_string()))
}

fn client_key(
    provider: &CryptoProvider,
    certificate: &Path,
    key: Option<&Path>,
) -> Result<Arc<CertifiedKey>, ImageError> {
    let chain = certificates(certificate)?;
    if chain.is_empty() {
        return Err(bad(certificate, "there is no client certificate in it"));
    }
    let path: PathBuf = key.unwrap_or(certificate).to_owned();
    // What is wrong with a key is said without its content.
    let key = PrivateKeyDer::from_pem_slice(&read(&path)?)
        .map_err(|_| bad(&path, "there is no usable private key in it"))?;
    let key = CertifiedKey::from_der(chain, key, provider).map_err(|error| {
        bad(&path, &format!("the key does not fit {}: {error}", certificate.display()))
    })?;
    Ok(Arc::new(key))
}

/// Client certificates, of which one is shown to a registry that asks.
#[derive(Debug)]
struct ClientKeys(Vec<Arc<CertifiedKey>>);

impl ResolvesClientCert for ClientKeys {
    /// The first that a CA has issued which the registry names, else the first that can sign.
    fn resolve(&self, issuers: &[&[u8]], schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        let usable = || self.0.iter().filter(|key| key.key.choose_scheme(schemes).is_some());
        // An issuer's name is in the certificate as it is in the question, byte for byte.
        let issued = |key: &&Arc<CertifiedKey>| {
            issuers.iter().any(|issuer| key.cert.iter().any(|c| contains(c, issuer)))
        };
        usable().find(issued).or_else(|| usable().next()).cloned()
    }

    fn has_certs(&self) -> bool {
        true
    }
}

fn contains(whole: &[u8], part: &[u8]) -> bool {
    !part.is_empty() && whole.windows(part.len()).any(|window| window == part)
}

/// `skip_verify`: any certificate will do, but the connection must be the certificate owner's.
#[derive(Debug)]
struct Unverified(Arc<CryptoProvider>);

impl ServerCertVerifier for Unverified {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
