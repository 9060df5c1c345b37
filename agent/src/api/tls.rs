//! rustls configuration for API clients.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};

use super::kubeconfig::{Endpoint, Identity};

/// Why certificates or keys cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// CA certificates.
    #[error("the certificate authority of {server} cannot be used: {cause}")]
    Authority {
        /// The server.
        server: String,
        /// Why.
        cause: String,
    },
    /// Client certificate or key.
    #[error(
        "the client certificate for {server} cannot be used: {cause}; run `longshore join` again \
         to get a new one"
    )]
    Identity {
        /// The server.
        server: String,
        /// Why.
        cause: String,
    },
    /// The server's address.
    #[error("`{server}` is not an address of an API server: {cause}")]
    Server {
        /// The server.
        server: String,
        /// Why.
        cause: String,
    },
    /// A configuration that TLS refuses.
    #[error("TLS: {0}")]
    Config(#[from] rustls::Error),
}

/// What is wrong with a server's certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Its time is over.
    Expired,
    /// Its time has not come.
    NotYetValid,
    /// It is not for the address that was asked.
    WrongName,
    /// No known CA has signed it.
    UnknownIssuer,
    /// Anything else.
    Other,
}

/// Why TLS refused the server's certificate, if that is what `error` comes down to.
pub fn server_fault(error: &(dyn std::error::Error + 'static)) -> Option<Fault> {
    use rustls::CertificateError as Refused;
    if let Some(error) = error.downcast_ref::<rustls::Error>() {
        let rustls::Error::InvalidCertificate(refused) = error else { return None };
        return Some(match refused {
            Refused::Expired | Refused::ExpiredContext { .. } => Fault::Expired,
            Refused::NotValidYet | Refused::NotValidYetContext { .. } => Fault::NotYetValid,
            Refused::NotValidForName | Refused::NotValidForNameContext { .. } => Fault::WrongName,
            Refused::UnknownIssuer | Refused::BadSignature => Fault::UnknownIssuer,
            _ => Fault::Other,
        });
    }
    // An io::Error names as its source the source of what it holds, not that itself.
    let held = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
    match held {
        Some(held) => server_fault(held),
        None => error.source().and_then(server_fault),
    }
}

/// For servers outside of the cluster: the certificate authorities that this machine trusts.
pub fn system_config() -> Result<ClientConfig, TlsError> {
    let found = rustls_native_certs::load_native_certs();
    let mut store = RootCertStore::empty();
    store.add_parsable_certificates(found.certs);
    if store.is_empty() {
        return Err(TlsError::Authority {
            server: "the web".to_owned(),
            cause: "this machine trusts none (install the package ca-certificates)".to_owned(),
        });
    }
    with_roots(store)
}

/// For connections without TLS.
pub fn trusting_nobody() -> Result<ClientConfig, TlsError> {
    with_roots(RootCertStore::empty())
}

fn with_roots(store: RootCertStore) -> Result<ClientConfig, TlsError> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    Ok(ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(store)
        .with_no_client_auth())
}

/// The TLS side of `endpoint`.
pub fn client_config(endpoint: &Endpoint) -> Result<ClientConfig, TlsError> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()?;
    let builder = match (&endpoint.ca, endpoint.insecure) {
        (_, true) => builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyServer(provider.clone()))),
        (Some(ca), false) => builder.with_root_certificates(roots(&endpoint.server, ca)?),
        (None, false) if endpoint.server.starts_with("https") => {
            return Err(TlsError::Authority {
                server: endpoint.server.clone(),
                cause: "none is given".to_owned(),
            });
        }
        (None, false) => builder.with_root_certificates(RootCertStore::empty()),
    };
    match &endpoint.identity {
        Identity::Certificate { chain, key } => {
            let unusable =
                |cause: String| TlsError::Identity { server: endpoint.server.clone(), cause };
            let chain: Vec<_> = CertificateDer::pem_slice_iter(chain)
                .collect::<Result<_, _>>()
                .map_err(|e| unusable(format!("certificate: {e}")))?;
            let key =
                PrivateKeyDer::from_pem_slice(key).map_err(|e| unusable(format!("key: {e}")))?;
            builder.with_client_auth_cert(chain, key).map_err(|e| unusable(e.to_string()))
        }
        Identity::Anonymous | Identity::Token(_) => Ok(builder.with_no_client_auth()),
    }
}

fn roots(server: &str, pem: &[u8]) -> Result<RootCertStore, TlsError> {
    let unusable = |cause: String| TlsError::Authority { server: server.to_owned(), cause };
    let mut store = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pem) {
        let certificate = certificate.map_err(|e| unusable(e.to_string()))?;
        store.add(certificate).map_err(|e| unusable(e.to_string()))?;
    }
    if store.is_empty() {
        return Err(unusable("it holds no certificate".to_owned()));
    }
    Ok(store)
}

/// Takes any certificate, and still checks that the server holds its key. Only for the first read
/// of `cluster-info`, which is checked by token and pin, where a kubeconfig asks for it, and for
/// probes, which ask whether a server answers and not who it is.
#[derive(Debug)]
pub(crate) struct AnyServer(pub(crate) Arc<CryptoProvider>);

impl ServerCertVerifier for AnyServer {
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
        verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
